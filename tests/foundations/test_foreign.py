"""Whatever a library raises becomes one line that says what happened and what to do."""

import errno
import io
import socket
import ssl
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub.errors as hub
import numpy as np
import pytest
import requests
import torch
import urllib3.exceptions
from hub_server import serve_files
from huggingface_hub import constants
from safetensors import SafetensorError

import kcache_cli.app
from kcache.decoration import decoration
from kcache.encoders.repositories import find_repository
from kcache.errors import CacheWriteError, MemoryShortError, ModelError, SourceError
from kcache.foreign import advice, is_fault, out_of_memory, reason, told, within_memory
from kcache_cli.progress import say


def caused(*errors: Exception) -> Exception:
    """The first of `errors`, each raised from the next."""
    for error, cause in pairwise(errors):
        error.__cause__ = cause
    return errors[0]


def answered(status: int) -> Exception:
    """What the Hub's library raises for an answer of that status."""
    return hub.HfHubHTTPError("said", response=httpx2.Response(status, request=httpx2.Request("GET", "http://hub")))


REFUSED = urllib3.exceptions.MaxRetryError(None, "/x", urllib3.exceptions.ProxyError("no", OSError("x")))  # type: ignore[arg-type]
CUT = httpx2.RemoteProtocolError("peer closed connection (received 9 bytes, expected 10)")
FOREIGN = [
    (CUT, "the connection broke off (peer closed connection (received 9 bytes, expected 10))", "what was fetched"),
    (httpx2.ReadError("[Errno 104] reset"), "the connection broke off", "run the same command again"),
    (requests.exceptions.ChunkedEncodingError("x"), "the connection broke off", "run the same command again"),
    (RuntimeError("Data processing error: CAS service error : Reqwest"), "the connection broke off", "again"),
    (httpx2.ReadTimeout("timed out"), "no answer in time", "run the same command again"),
    (requests.exceptions.ReadTimeout("x"), "no answer in time", "run the same command again"),
    (requests.ConnectionError(REFUSED), "the proxy gives no connection", "HTTPS_PROXY"),
    (caused(hub.LocalEntryNotFoundError("page"), httpx2.ConnectError("x"), socket.gaierror(-2, "no name")),
     "the server's name cannot be looked up ([Errno -2] no name)", None),
    (caused(httpx2.ConnectError("x"), ssl.SSLCertVerificationError("self-signed")), "is not trusted", "SSL_CERT_FILE"),
    (caused(hub.LocalEntryNotFoundError("x"), answered(503)), "the server is in trouble", "wait a while"),
    (answered(429), "too many requests", "wait some minutes"),
    (answered(401), "who asks", "hf auth login"),
    (hub.OfflineModeIsEnabled("x"), "HF_HUB_OFFLINE", None),
    (hub.LocalEntryNotFoundError("no snapshot"), "not in the Hub's cache here", None),
    (OSError(errno.ENOSPC, "No space left on device", "/hub/blob"), "no room on the disk", "make room"),
    (ExceptionGroup("several", [CUT]), "the connection broke off", "run the same command again"),
    (SafetensorError("HeaderTooLarge"), "no whole safetensors file (HeaderTooLarge)", None),
    (PermissionError(errno.EACCES, "Permission denied", "/hub"), "Permission denied: /hub", None),
    (ValueError("first\nsecond"), "first second", None),
    (KeyError("vocab"), "KeyError: 'vocab'", None),
    (RuntimeError(""), "RuntimeError", None),
]  # fmt: skip


@pytest.mark.parametrize(("error", "words", "do"), FOREIGN, ids=lambda value: type(value).__name__)
def test_an_error_is_told_in_plain_words(error: Exception, words: str, do: str | None) -> None:
    assert words in reason(error)
    assert "\n" not in reason(error)
    assert do is None if advice(error) is None else do is not None and do in str(advice(error))
    with pytest.raises(SourceError) as caught, told(SourceError, "it cannot be had", "correct it"):
        raise error
    assert str(caught.value) == f"it cannot be had: {reason(error)}; {advice(error) or 'correct it'}"


def test_what_kcache_raised_is_told_in_its_own_words() -> None:
    error = caused(CacheWriteError("/run/x could not be written;\nmake room"), OSError(errno.ENOSPC, "No space left"))
    assert reason(error) == "/run/x could not be written; make room"


@pytest.mark.parametrize("debugging", ["0", "1"])
def test_a_decoration_that_fails_says_why_and_where_it_is_asked(
    debugging: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("KCACHE_DEBUG", debugging)
    with decoration("no curves"):
        raise KeyError("loss")
    assert "no curves (KeyError: 'loss'); the work goes on" in caplog.text
    assert ("Traceback" in caplog.text) == (debugging == "1")


def no_memory_here() -> None:
    np.empty(1 << 60, np.uint8)


LACKING: list[Callable[[], Any]] = [
    no_memory_here,
    lambda: torch.empty(1 << 60, dtype=torch.uint8),
    lambda: bytearray(1 << 62),
    *(
        lambda error=error: (_ for _ in ()).throw(error)
        for error in (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
            RuntimeError("MPS backend out of memory (MPS allocated: 17 GB)"),
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
            RuntimeError("NCCL error: unhandled cuda error, Cuda failure 'out of memory'"),
            RuntimeError("std::bad_alloc"),
            OSError(errno.ENOMEM, "Cannot allocate memory"),
            SafetensorError("I/O error: Cannot allocate memory (os error 12)"),
            caused(ValueError("could not load"), MemoryError()),
        )
    ),
]


@pytest.mark.parametrize("lack", range(len(LACKING)))
def test_lack_of_memory_is_recognised_and_says_what_takes_less(lack: int) -> None:
    with (
        pytest.raises(MemoryShortError, match=r"^memory ran out while training \(.+\); give --less$"),
        within_memory("training", lambda: "give --less"),
        told(ModelError, "it cannot be loaded", "fetch it again"),
    ):
        LACKING[lack]()


def test_nothing_else_is_taken_for_it() -> None:
    for error in (RuntimeError("shapes differ"), ValueError("out of memory"), OSError(errno.ENOSPC, "out of memory")):
        assert not out_of_memory(error)
        with pytest.raises(type(error)), within_memory("training", "give --less"):
            raise error


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (TypeError("unhashable"), "kcache: TypeError: unhashable; this is a fault of kcache or"),
        (RecursionError("too deep"), "kcache: RecursionError: too deep; this is a fault"),
        (OSError(errno.ENOLCK, "No locks available", "/x"), "kcache: No locks available: /x\n"),
        (CUT, "kcache: the connection broke off"),
        (MemoryError(), "kcache: memory ran out: MemoryError; free some memory\n"),
    ],
)  # fmt: skip
def test_what_nobody_foresaw_is_one_line_and_a_traceback_only_when_asked_for(
    error: Exception,
    line: str,
    kcache_command: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(**_: Any) -> None:
        raise error

    monkeypatch.setattr(kcache_cli.app, "app", fail)
    assert kcache_command("cache-info", "x") == 1
    said = capsys.readouterr().err
    assert said.startswith(line)
    assert said.count("\n") == 1
    monkeypatch.setenv("KCACHE_DEBUG", "1")
    assert kcache_command("cache-info", "x") == 1
    assert "Traceback" in capsys.readouterr().err
    assert is_fault(error) == ("fault" in line)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("cut", "the connection broke off"),
        ("reset", "the connection broke off"),
        ("hang", "no answer in time"),
        ("500", "the server is in trouble"),
        ("403", "does not let this account have it"),
    ],
)
def test_a_download_that_fails_is_one_line(
    fault: str, words: str, oracle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    with serve_files(oracle / "decoder", fault) as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        with pytest.raises(ModelError) as caught:
            find_repository("o/decoder", None, ["movq"], str(tmp_path))
    assert str(caught.value).startswith("o/decoder is neither a local folder nor a Hub repository")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_what_an_encoding_lacks_is_written_as_an_escape(
    encoding: str, kcache_command: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", err)

    def show(**_: Any) -> None:
        say("4 × 图 \udcff…")
        raise SourceError("图.jpg")

    monkeypatch.setattr(kcache_cli.app, "app", show)
    assert kcache_command("cache-info", "x") == 1
    out.flush()
    err.flush()
    assert b"\\u56fe \\udcff" in out.buffer.getvalue()  # type: ignore[attr-defined]
    assert err.buffer.getvalue() == b"kcache: \\u56fe.jpg\n"  # type: ignore[attr-defined]
