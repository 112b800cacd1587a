"""The connection to an object store: one per bucket and process, by the ecosystem's conventions for credentials.

Nothing of a credential is kept, shown or written here: obstore reads `AWS_*`, `GOOGLE_*` and `AZURE_*` itself, or asks
the machine it runs on; profiles of `~/.aws` count where boto3 is installed. Of what a library says of an error nothing
is shown: it holds URLs, in which signatures may be, and pages of its own data.
"""

import errno
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any, TypeVar
from urllib.parse import urlsplit

from kcache.errors import ConfigError, KcacheError, StoreError

logger = logging.getLogger(__name__)

_TIMEOUTS = {"connect_timeout": "5s", "timeout": "120s", "read_timeout": "20s"}
"""Of a whole request 120 seconds, its body counted: by default obstore has 30, too few for a slow line."""
_BACKOFF = {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=15), "base": 2}
# Retries sign with the credentials of the first try, which may end within minutes.
_PATIENT = {"max_retries": 30, "retry_timeout": timedelta(minutes=3), "backoff": _BACKOFF}
"""Of a store that has answered before: it may be started anew, or be throttling."""
_GREETING = {"max_retries": 8, "retry_timeout": timedelta(seconds=15), "backoff": _BACKOFF}
"""Of one that never has: its address may be wrong, and whoever typed it is waiting."""
_NAME = ".kcache-hello"
"""Of a file that is asked for to hear whether a store answers at all; nobody ever writes it."""
_LAST_WORD_SECONDS = 1.0
_SILENT_SECONDS = 30.0
"""After which it is said that a store is waited for, and how long."""
_TRIES = 8
"""How often a request is made that breaks off."""

_Answer = TypeVar("_Answer")

_users: set[int] = set()
"""Processes that have used a store: this one, and those that it was forked from."""


def store_of(bucket: str) -> Any:
    """The obstore store of `bucket`, "s3://name"; the first time the store is asked whether it is there.

    Raises StoreError where it is not, and in a process that was forked from one that had used a store: obstore's
    threads do not survive that, and what they wait by is shared, so that a request would hang here and break off there.
    """
    _users.add(os.getpid())
    if len(_users) > 1:
        raise StoreError(
            f"{bucket} was asked for in a process forked from one that had used an object store; expected a process of "
            "its own, as connections do not survive a fork; start it by spawn or forkserver, or fork before"
        )
    return _memory(bucket) if bucket.startswith("memory:") else _store(bucket)


def forget_stores() -> None:
    """Let the next request read the environment again."""
    _store.cache_clear()


@cache
def _memory(bucket: str) -> Any:
    from obstore.store import MemoryStore

    return MemoryStore()


@lru_cache(maxsize=32)
def _store(bucket: str) -> Any:
    from obstore import store

    from_url: Any = store.from_url
    options: dict[str, Any] = {"client_options": _TIMEOUTS} | (_s3_options() if bucket.startswith("s3:") else {})
    try:
        ask(bucket, lambda: from_url(bucket, **options, retry_config=_GREETING).head(_NAME))
    except FileNotFoundError:
        pass
    except StoreError as error:  # whatever it answers, it is there
        if not _ANSWERED.search(str(error.__cause__)) or _NO_CREDENTIALS.search(str(error.__cause__)):
            raise
    with told(bucket):
        return from_url(bucket, **options, retry_config=_PATIENT)


def _s3_options() -> dict[str, Any]:
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    name, endpoint = next(((name, os.environ[name]) for name in names if os.environ.get(name)), ("", ""))
    options: dict[str, Any] = {}
    if endpoint:
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            raise ConfigError(
                f"{name} is no URL of a server; expected http://host:port or https://host, without a name or password "
                "in it; credentials belong into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
        # Who names an endpoint of http wants no encryption.
        options = {"endpoint": endpoint, "client_options": _TIMEOUTS | {"allow_http": parts.scheme == "http"}}
    if (provider := _profile()) is not None:
        options["credential_provider"] = provider
    return options


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


def ask(place: object, request: Callable[[], _Answer]) -> _Answer:
    """What `request` to a store gives; raises as `told` does. In the main thread a signal need not wait for the store.

    The library asks again by itself, but not where a listing or a removal breaks off: such a request is made anew here.
    So it must be one that may be made twice.
    """
    for _ in range(_TRIES - 1):
        with suppress(_BrokeOff):
            return _asked(place, request)
    return _asked(place, request)


def _asked(place: object, request: Callable[[], _Answer]) -> _Answer:
    """The libraries' calls take no notice of signals, and a store may be waited for for minutes."""
    with told(place):
        if threading.current_thread() is not threading.main_thread():
            return request()
        answer: Future[_Answer] = Future()

        def work() -> None:
            try:
                answer.set_result(request())
            except BaseException as error:  # noqa: BLE001  # it is raised where the answer is waited for
                answer.set_exception(error)

        threading.Thread(target=work, name="kcache-ask", daemon=True).start()
        try:
            return answer.result()
        except (KeyboardInterrupt, SystemExit):
            wait([answer], _LAST_WORD_SECONDS)  # of one that is under way the end is nearly always near
            raise


class _BrokeOff(StoreError):
    """A connection that ended in the middle of a request which the library did not make again."""


@contextmanager
def told(place: object) -> Iterator[None]:
    """Turn what a store or a library of it raises into StoreError, which says of `place` what happened and what to do.

    But that nothing is there is FileNotFoundError, as on a disk.
    """
    try:
        with _watched(place):
            yield
    except (KcacheError, MemoryError):
        raise
    except FileNotFoundError as error:
        if _NO_BUCKET.search(str(error)) is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(place)) from None
        raise _failed(place, error) from None
    except Exception as error:  # noqa: BLE001  # providers of credentials raise what they like
        from obstore.exceptions import BaseError

        kind = type(error) if isinstance(error, BaseError) else None
        # For KCACHE_DEBUG: all that was said, but for what stands behind the ? of a URL.
        raise _failed(place, error) from (kind and kind(re.sub(r"\?[^\s\"',)]*", "?…", str(error))))


_waiting: dict[object, tuple[float, object]] = {}
"""Of each request that is under way: since when, and for what."""


@contextmanager
def _watched(place: object) -> Iterator[None]:
    """Have it said when the block takes long: stores are asked for minutes, and whoever waits must know."""
    _watch()
    request = object()
    _waiting[request] = (time.monotonic(), place)
    try:
        yield
    finally:
        del _waiting[request]


@cache
def _watch() -> None:
    def work() -> None:
        while True:
            time.sleep(_SILENT_SECONDS)
            if word := _word(time.monotonic()):
                logger.warning(word)

    threading.Thread(target=work, name="kcache-watch", daemon=True).start()


def _word(now: float) -> str | None:
    """What there is to say of the request that has waited longest, if long; `now` is of `time.monotonic`."""
    began, place = min(list(_waiting.values()), key=lambda request: request[0], default=(now, ""))
    if now - began < _SILENT_SECONDS:
        return None
    return f"{place}: waiting for the object store for {now - began:.0f} s; it is asked again for some minutes"


def is_silence(error: StoreError) -> bool:
    """Whether a store did not answer at all, so that asking it something else would wait as long again."""
    return _SILENCE.search(str(error.__cause__)) is not None


_SILENCE = re.compile(r"[Tt]imed ?out|deadline|kind: (?:Timeout|Connect)|onnection refused|dns error")
_ANSWERED = re.compile(r"status code: \d|\bstatus: \d")
_NO_CREDENTIALS = re.compile(
    r"169\.254\.|metadata\.google|No credentials|credential.*not (?:found|provided)|Missing ?(?:Acc|Secret)"
)
_NO_BUCKET = re.compile(r"NoSuchBucket|ContainerNotFound|[Tt]he specified (?:bucket|container) does not exist")
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
_ENDPOINTS = {"s3": "AWS_ENDPOINT_URL, ", "az": "AZURE_STORAGE_ACCOUNT_NAME, "}
_AGAIN = "start again: what was finished is kept"
_MEANINGS = [
    (_NO_BUCKET.pattern, "there is no such bucket", "check its name, or make it with the store's own tools"),
    (_NO_CREDENTIALS.pattern, "there are no credentials for the object store", "set {credentials}"),
    ("SignatureDoesNotMatch|AuthenticationFailed", "the secret does not fit the account", "check {credentials}"),
    ("InvalidAccessKeyId", "the object store does not know the account", "check {credentials}"),
    (
        "ExpiredToken|TokenRefreshRequired|InvalidToken|invalid_grant",
        "the credentials have run out",
        "get new ones, and {again}",
    ),
    (
        "RequestTimeTooSkewed|RequestExpired",
        "this machine's clock is wrong, says the object store",
        "set the clock, and {again}",
    ),
    (
        "PermanentRedirect|AuthorizationHeaderMalformed|IllegalLocationConstraint|without LOCATION",
        "the bucket lies in another region",
        "set AWS_REGION to the bucket's",
    ),
    (
        "PermissionDenied|AccessDenied|status code: 403|AuthorizationPermissionMismatch",
        "the object store does not permit it",
        "give the account of {credentials} the right to list and read there, and to write and delete for a build",
    ),
    ("Unauthenticated|status code: 401", "the object store does not know the account", "check {credentials}"),
    ("NotImplemented|NotSupported|status code: 501", "the object store cannot do that", "give one that can, or a disk"),
    (
        "SlowDown|TooManyRequests|ServerBusy|status code: (?:503|429)",
        "the object store has had too many requests",
        "wait some minutes, have fewer processes ask at once, and {again}",
    ),
    ("InsufficientStorage|QuotaExceeded|status code: 507", "the object store is full", "make room there, and {again}"),
    ("status code: 5", "the object store is in trouble", "wait a while, and {again}"),
    (
        "invalid peer certificate|UnknownIssuer|CertificateError|certificate",
        "the certificate of the object store is not trusted here",
        "check {endpoint}the clock, and SSL_CERT_FILE",
    ),
    (
        "InvalidContentType|InvalidMessage|corrupt message",
        "what answers does not speak HTTPS",
        "check {endpoint}of which one without encryption begins with http://",
    ),
    (
        "dns error|lookup address",
        "the name of the object store's server cannot be looked up",
        "check {endpoint}and the network",
    ),
    (
        "[Tt]imed ?out|deadline|kind: Timeout",
        "the object store gave no answer in time",
        "check {endpoint}and the network, and {again}",
    ),
    (
        "kind: Connect|onnection refused|tcp connect",
        "there is no connection to the object store",
        "check {endpoint}and the network",
    ),
    (
        "AlreadyExists|Precondition",
        "the object store says that the file is there, or was changed, and it is not so",
        "have fewer processes write it at once, and {again}",
    ),
    (
        "IncompleteMessage|onnection (?:closed|reset)|response body|kind: (?:Request|Interrupted|Decode)|end of file",
        "the connection to the object store broke off again and again",
        "check the network, and {again}",
    ),
]
"""By a part of what the library says, from the most to the least telling: what happened, and what to do."""


def _failed(place: object, error: BaseException) -> StoreError:
    text, scheme = str(error), str(place).partition(":")[0]
    status = re.search(r"status code: (\d{3})", text)
    answered = (
        f"the object store answers {status[1]}" if status else f"the object store failed ({type(error).__name__})"
    )
    found = ((words, advice) for pattern, words, advice in _MEANINGS if re.search(pattern, text))
    words, advice = next(found, (answered, "check {endpoint}and the URL, and {again}"))
    credentials = _CREDENTIALS.get(scheme, "the store")
    do = advice.format(credentials=credentials, endpoint=_ENDPOINTS.get(scheme, ""), again=_AGAIN)
    broke_off = words == _MEANINGS[-1][1] and not re.search(r"\bretries: [1-9]", text)
    return (_BrokeOff if broke_off else StoreError)(f"{place}: {words}; {do}")
