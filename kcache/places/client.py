"""The connection to an object store: one per bucket and process, by the ecosystem's conventions for credentials.

Nothing of a credential is kept, shown or written here: obstore reads `AWS_*`, `GOOGLE_*` and `AZURE_*` itself, or asks
the machine it runs on; profiles of `~/.aws` count where boto3 is installed.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from kcache.errors import ConfigError, KcacheError, StoreError

_TIMEOUTS = {"connect_timeout": "5s", "timeout": "120s", "read_timeout": "20s"}
"""Of a whole request 120 seconds, its body counted: by default obstore has 30, too few for a slow line."""
_RETRIES = {
    "max_retries": 10,
    # Retries sign with the credentials of the first try, which may end within minutes.
    "retry_timeout": timedelta(minutes=3),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=15), "base": 2},
}


def store_of(bucket: str) -> Any:
    """The obstore store of `bucket`, "s3://name": made anew in each process, as connections do not survive a fork."""
    return _store(bucket, os.getpid())


def forget_stores() -> None:
    """Let the next request read the environment again; what lay in `memory` is gone."""
    _store.cache_clear()


@lru_cache(maxsize=32)
def _store(bucket: str, process: int) -> Any:  # part of what is remembered
    from obstore.store import from_url

    scheme = bucket.partition(":")[0]
    options: dict[str, Any] = {"client_options": dict(_TIMEOUTS), "retry_config": _RETRIES}
    with told(bucket):
        if scheme == "memory":
            return from_url("memory:///")
        if scheme == "s3":
            endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
            if endpoint.startswith("http://"):  # who names such an endpoint wants no encryption
                options["client_options"]["allow_http"] = True
            if (provider := _profile()) is not None:
                options["credential_provider"] = provider
        return from_url(bucket, **options)


def _profile() -> Any:
    """What gives the credentials of a profile of `~/.aws`, where one is asked for and boto3 there to read it."""
    if "AWS_PROFILE" not in os.environ or os.environ.get("AWS_ACCESS_KEY_ID"):
        return None
    if find_spec("boto3") is None:
        raise ConfigError(
            f"AWS_PROFILE is {os.environ['AWS_PROFILE']!a}, but boto3, which reads profiles, is not installed; "
            "expected it, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; install it: pip install boto3"
        )
    from obstore.auth.boto3 import Boto3CredentialProvider

    return Boto3CredentialProvider()


@contextmanager
def told(place: object) -> Iterator[None]:
    """Turn an error of the store, but that nothing is there (FileNotFoundError), into StoreError: `place`, and why."""
    from obstore.exceptions import BaseError

    try:
        yield
    except (KcacheError, FileNotFoundError):
        raise
    except (BaseError, OSError, ValueError) as error:
        raise StoreError(f"{place}: the object store failed ({str(error).splitlines()[0][:300]})") from error
