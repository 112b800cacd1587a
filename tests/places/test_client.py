"""What a store that does not answer, or does not want to, comes to: one line that says what to do, and soon."""

import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator

import pytest
from faulty_s3 import Faults
from obstore.exceptions import GenericError

from kcache.build.plan import open_plan
from kcache.errors import ConfigError, KcacheError, StoreError
from kcache.places import client, place_of
from kcache.places.bucket import BucketPath
from kcache.places.client import ask, forget_stores, told
from kcache.places.effects import write_bytes

HIDDEN = "sUpErSeCrEt"


@pytest.fixture
def environment(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Sets variables for the stores that are asked after it."""

    def change(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        forget_stores()

    yield change
    forget_stores()


def read(url: str) -> str:
    """What is said when the file at `url` is read, listed and written; each says one line without what is secret."""
    path, said = place_of(url), []
    assert isinstance(path, BucketPath)
    for request in (path.read_bytes, lambda: list(path.below()), lambda: write_bytes(path, b"1")):
        with pytest.raises(KcacheError) as caught:
            request()
        assert HIDDEN not in "".join(traceback.format_exception(caught.value))
        assert "\n" not in str(caught.value)
        said.append(str(caught.value).partition(": ")[2])
    assert len(set(said)) == 1
    return said[0]


def test_wrong_credentials(environment: Callable[..., None]) -> None:
    environment(AWS_SECRET_ACCESS_KEY=HIDDEN)
    assert read("s3://caches/x") == (
        "the secret does not fit the account; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    )
    environment(AWS_ACCESS_KEY_ID=HIDDEN)
    assert read("s3://caches/x") == (
        "the object store does not know the account; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    )


def test_a_bucket_that_is_not_there_is_no_file_that_is_not_there(s3: str) -> None:
    for request in (BucketPath.of("s3://nowhere/x").read_bytes, lambda: list(BucketPath.of("s3://nowhere").below())):
        with pytest.raises(
            StoreError, match=r"^s3://nowhere(/x)?: there is no such bucket; check its name, or make it"
        ):
            request()
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: 's3://caches/nothing'$"):
        BucketPath.of("s3://caches/nothing").read_bytes()
    with pytest.raises(FileNotFoundError):
        BucketPath.of("s3://caches").read_bytes()


@pytest.mark.parametrize(
    ("endpoint", "said"),
    [
        ("http://127.0.0.1:9", "there is no connection to the object store; check AWS_ENDPOINT_URL, and the network"),
        ("http://nothing.invalid", "the name of the object store's server cannot be looked up; check AWS_ENDPOINT_URL"),
        ("https://{server}", "what answers does not speak HTTPS; check AWS_ENDPOINT_URL, of which one without"),
    ],
)
def test_a_store_that_is_not_there(
    environment: Callable[..., None], monkeypatch: pytest.MonkeyPatch, endpoint: str, said: str
) -> None:
    monkeypatch.setattr(client, "_GREETING", client._GREETING | {"max_retries": 1})
    environment(AWS_ENDPOINT_URL=endpoint.format(server=os.environ["AWS_ENDPOINT_URL"].partition("//")[2]))
    assert read("s3://caches/x").startswith(said)


@pytest.mark.parametrize("endpoint", ["localhost:9000", "http://", "ftp://x", f"https://name:{HIDDEN}@server"])
def test_an_endpoint_that_is_none(environment: Callable[..., None], endpoint: str) -> None:
    environment(AWS_ENDPOINT_URL=endpoint)
    with pytest.raises(
        ConfigError, match=r"^AWS_ENDPOINT_URL is no URL of a server; expected http://host:port"
    ) as said:
        BucketPath.of("s3://caches/x").read_bytes()
    assert HIDDEN not in str(said.value)
    with pytest.raises(ConfigError):  # it says nothing of what lies there
        open_plan(BucketPath.of("s3://caches/x"))


def test_no_answer_is_told_from_one() -> None:
    for text, silent in (("kind: Timeout, operation timed out", True), ("status code: 416 Range Not", False)):
        with pytest.raises(StoreError) as caught, told("s3://b/k"):
            raise GenericError(text)
        assert client.is_silence(caught.value) is silent


def test_whoever_waits_for_a_store_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_waiting", {})
    with told("s3://b/k"):
        assert client._word(time.monotonic()) is None
        assert client._word(time.monotonic() + 31) == (
            "s3://b/k: waiting for the object store for 31 s; it is asked again for some minutes"
        )
    assert client._word(time.monotonic() + 31) is None


def test_a_store_that_throttles_without_end(faulty: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_PATIENT", client._PATIENT | {"max_retries": 1})
    monkeypatch.setattr(client, "_GREETING", client._GREETING | {"max_retries": 1})
    faulty.rates = {"slow_down": 1}
    assert read(faulty.url).startswith("the object store has had too many requests; wait some minutes")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("403 Forbidden: <Code>RequestTimeTooSkewed</Code>", "this machine's clock is wrong, says the object store"),
        ("status code: 403 Forbidden: <Code>AccessDenied</Code>", "the object store does not permit it; give the acc"),
        ("<Code>ExpiredToken</Code>", "the credentials have run out; get new ones, and start again"),
        ("Received redirect without LOCATION", "the bucket lies in another region; set AWS_REGION to the bucket's"),
        ("PUT http://169.254.169.254/latest/api/token", "there are no credentials for the object store; set AWS_ACC"),
        ("Missing SecretAccessKey", "there are no credentials for the object store; set AWS_ACCESS_KEY_ID and AWS_SEC"),
        ("status code: 500 Internal", "the object store is in trouble; wait a while, and start again"),
        ("status code: 418 I'm a teapot", "the object store answers 418; check AWS_ENDPOINT_URL"),
        ("", "the object store failed (GenericError); check AWS_ENDPOINT_URL"),
        ("kind: Timeout, operation timed out", "the object store gave no answer in time; check AWS_ENDPOINT_URL"),
    ],
)
def test_what_stores_say_in_plain_words_and_nothing_secret(text: str, said: str) -> None:
    url = f"https://x.blob.core.windows.net/c/k?sv=1&sig={HIDDEN}"
    with pytest.raises(StoreError) as caught, told("s3://b/k"):
        raise GenericError(f'{text}\nurl "{url}"')
    assert str(caught.value).startswith(f"s3://b/k: {said}")
    shown = "".join(traceback.format_exception(caught.value))
    assert HIDDEN not in shown
    assert f"{text}\nurl" in shown  # for KCACHE_DEBUG


def test_a_signal_does_not_wait_for_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_LAST_WORD_SECONDS", 0)
    answered, ended, asking = threading.Event(), threading.Event(), list[threading.Thread]()

    def request() -> None:
        asking.append(threading.current_thread())
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        answered.wait(60)
        ended.set()

    with pytest.raises(KeyboardInterrupt):
        ask("s3://b/k", request)
    assert not ended.is_set()
    assert asking != [threading.main_thread()]
    answered.set()
    assert ended.wait(60)


FORKED = """
import os, signal, sys
from kcache.errors import StoreError
from kcache.places import place_of

path = place_of(sys.argv[1])
def ask_in_child():
    if (child := os.fork()) == 0:
        signal.alarm(20)
        try:
            path.read_bytes()
            code = 0
        except StoreError as error:
            code = 3 if "forked" in str(error) and "spawn" in str(error) else 4
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

before = ask_in_child()
path.read_bytes()
after = ask_in_child()
path.read_bytes()
sys.exit(10 * before + after)
"""


def test_a_forked_process_has_its_own_store_or_says_why_not(bucket: str) -> None:
    write_bytes(place_of(f"{bucket}/file"), b"content")
    ran = subprocess.run([sys.executable, "-c", FORKED, f"{bucket}/file"], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stderr) == (3, "")
