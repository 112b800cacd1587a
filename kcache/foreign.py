"""What the errors of libraries and of the system mean, in plain words: whoever calls a library asks here.

Classes are known by their names, so that nothing is imported to ask. A library may raise anything, so nobody keeps a
list of what it raises: `told` takes all.
"""

import errno
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from kcache.errors import CacheCorruptError, ConfigError, KcacheError, MemoryShortError, StoreError, UnreadableError

_CPP = re.compile(r"\(?Exception raised from|C\+\+ CapturedTraceback|\nframe #0|For more information check:")
"""Where what only programmers read begins: the stack of C++, in messages of torch's, and links."""
_LONGEST = 300
"""Characters of a library's own words that are shown: some put a page into a message."""

_AGAIN = "run the same command again: what was fetched is kept"
_LOGIN = "accept the terms on its page where it has some, and log in: hf auth login, or set HF_TOKEN"
_NAME = "check the name and the revision"


class _Meaning(NamedTuple):
    """What a class of errors says happened, and what to do; None where that depends on who called."""

    words: str
    advice: str | None = None


def _by_name(*rows: tuple[str, str, str | None]) -> dict[str, _Meaning]:
    """The meaning of each class in rows of bare names of classes, words and advice."""
    return {name: _Meaning(words, do) for names, words, do in rows for name in names.split()}


_OF_THE_HUB = _by_name(
    ("GatedRepoError", "the Hub gives it only to those who have accepted its terms", _LOGIN),
    ("DisabledRepoError", "the Hub has taken it down", _NAME),
    ("RevisionNotFoundError", "it has no such revision", _NAME),
    ("RepositoryNotFoundError", "there is no such repository, or it is private and wants `hf auth login`", None),
    ("RemoteEntryNotFoundError", "it lacks a file", _NAME),
    ("LocalTokenNotFoundError", "there is no token for the Hub", _LOGIN),
    ("IncompleteSnapshotError", "its download is unfinished", f"go online, and {_AGAIN}"),
    ("HFValidationError", "that is no name of a repository", None),
)
# From the most to the least telling: the error that broke off a connection often stands behind several more. Without a
# connection only the caller can know whether a name on the Hub was meant at all.
_OF_NETWORKS = _by_name(
    ("ProxyError ProxyConnectionError", "the proxy gives no connection", f"look at HTTPS_PROXY, and {_AGAIN}"),
    (
        "SSLCertVerificationError CertificateError",
        "the server's certificate is not trusted here",
        "look at the clock and, behind a proxy, at SSL_CERT_FILE",
    ),
    ("SSLError SSLEOFError", "the secure connection failed", _AGAIN),
    ("gaierror NameResolutionError ClientConnectorDNSError", "the server's name cannot be looked up", None),
    ("TimeoutError TimeoutException Timeout ReadTimeoutError ConnectTimeoutError", "no answer in time", _AGAIN),
    (
        "ProtocolError RemoteProtocolError ReadError WriteError CloseError ConnectionResetError ConnectionAbortedError "
        "IncompleteRead ChunkedEncodingError ContentDecodingError DecodingError ClientPayloadError "
        "ServerDisconnectedError RemoteDisconnected",
        "the connection broke off",
        _AGAIN,
    ),
    ("OfflineModeIsEnabled", "HF_HUB_OFFLINE forbids to fetch it", None),
    (
        "ConnectionRefusedError ConnectError ConnectionError NewConnectionError MaxRetryError ClientConnectionError "
        "ClientConnectorError NetworkError TransportError XetDownloadError",
        "there is no connection to the server",
        None,
    ),
    ("LocalEntryNotFoundError", "it is not in the Hub's cache here, and cannot be fetched", None),
)
_OF_FILES = _by_name(
    ("SafetensorError", "that is no whole safetensors file", None),
    ("JSONDecodeError", "that is not JSON", None),
    ("UnicodeDecodeError", "that is not UTF-8 text", None),
    (
        "ImportError",
        "a library cannot be loaded",
        "install it, anew where it is there, or give more memory where a limit (`ulimit -v`) leaves little",
    ),
)

_STATUSES = {
    401: _Meaning("the server wants to know who asks", _LOGIN),
    403: _Meaning("the server does not let this account have it", _LOGIN),
    404: _Meaning("there is nothing of that name", _NAME),
    429: _Meaning("the server has had too many requests from here", f"wait some minutes, then {_AGAIN}"),
}
_TROUBLE = _Meaning("the server is in trouble", f"wait a while, then {_AGAIN}")

# hf_xet, which fetches large files, raises RuntimeErrors of these words.
_XET = ("cas service", "cas client", "data processing error", "xet", "reqwest", "error sending request")

_ROOM = "make room there"
SYSTEM_ADVICE = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: "the quota there is used up: remove some of your files, or have it raised",
    errno.EFBIG: "no file there may be so large: a limit of the file system or of `ulimit -f`; write to another place",
    errno.EACCES: "permit writing there, or give another place",
    errno.EPERM: "permit writing there, or give another place",
    errno.EROFS: "nothing can be written there: give another place",
    errno.ENAMETOOLONG: "the path is too long for that file system: give a shorter one",
    errno.ENOENT: "a folder was moved or removed meanwhile: put it back",
    errno.ESTALE: "the network file system lost the folder: mount it again",
    errno.ENOTCONN: "the network file system is gone: mount it again",
    errno.EIO: "the disk or the network file system fails: look at its messages (dmesg), and give another place",
    errno.EMFILE: "too many files are open: raise `ulimit -n`",
    errno.ENFILE: "too many files are open on this machine",
    errno.ENOMEM: "free some memory",
    errno.EISDIR: "a folder is where a file is to be: move it away",
    errno.ENOTDIR: "a file is where a folder is to be: move it away",
    errno.EEXIST: "something is there already: move it away",
    errno.EINVAL: "the file system there does not take such a name or such a file: give another place",
    errno.EILSEQ: "the file system there does not take such a name: give another one",
}
"""What to do where the system refuses to write, by the number of its error."""
_LATER = "mount the network file system again, or wait for its server"
_WITHHELD = {
    **dict.fromkeys((errno.EACCES, errno.EPERM), "give this user the permission for it"),
    **{number: SYSTEM_ADVICE[number] for number in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)},
    **dict.fromkeys((errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH), _LATER),
}
"""What to do where the system keeps a file from this process, however sound it is."""
_ALSO_OF_READING = _WITHHELD | {number: SYSTEM_ADVICE[number] for number in (errno.ENOSPC, errno.EDQUOT, errno.EIO)}

_OUT_OF_MEMORY = (
    "out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "unable to allocate",
    "failed to allocate", "bad_alloc", "bad allocation", "alloc_failed", "cudaerrormemoryallocation",
    "cuda_error_out_of_memory", "cudnn_status_alloc_failed", "insufficient memory", "failed to cuda calloc",
)  # fmt: skip
"""What libraries write, in any case, that raise a RuntimeError for lack of memory."""


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the machine or of a device, here or in what `error` was caused by."""
    return any(map(_lacks_memory, _chain(error)))


def _lacks_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or "OutOfMemoryError" in _names(error):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    foreign = isinstance(error, RuntimeError | OSError) or type(error).__name__ in (
        "SafetensorError",
        "XlaRuntimeError",
    )
    return foreign and any(words in str(error).lower() for words in _OUT_OF_MEMORY)


def reason(error: BaseException) -> str:
    """What happened, in one line: in plain words where the error is known, with what the library itself says of it.

    What kcache raised on purpose says it already.
    """
    if isinstance(error, KcacheError):
        return " ".join(str(error).split())
    if out_of_memory(error):
        return f"memory ran out: {_own_words(error)}"
    meaning, known = _meaning(error)
    if meaning is not None:
        said = _own_words(known)
        return f"{meaning.words} ({said})" if said != type(known).__name__ else meaning.words
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    return _own_words(error)


def advice(error: BaseException) -> str | None:
    """What to do about it; None where only the caller can know."""
    if out_of_memory(error):
        return "free some memory"
    if (number := system_number(error)) in _ALSO_OF_READING:
        return _ALSO_OF_READING[number]
    meaning, _ = _meaning(error)
    return None if meaning is None else meaning.advice


def tracebacks_are_wanted() -> bool:
    """Whether whoever started this process wants to see where things go wrong."""
    return os.environ.get("KCACHE_DEBUG") == "1"


def is_fault(error: BaseException) -> bool:
    """Whether it is none of what happens to sound programs: nothing of the system's, the network's or memory's."""
    return not (isinstance(error, OSError) or out_of_memory(error) or _meaning(error)[0] is not None)


def check_withheld(error: Exception, path: object) -> None:
    """Raise what says nothing of `path`: UnreadableError, or the StoreError or ConfigError that an error of it is."""
    if isinstance(error, StoreError | ConfigError):
        raise error
    number = error.errno if isinstance(error, OSError) else None
    if number in _WITHHELD:
        found = f"{path} cannot be read now ({os.strerror(number)}), which does not mean that it is damaged"
        raise UnreadableError(f"{found}; {_WITHHELD[number]}") from error


def corrupt(error: Exception, path: object, do: str) -> CacheCorruptError:
    """What to raise where `path`, a part of a cache, cannot be read, and what to `do`; see `check_withheld`."""
    check_withheld(error, path)
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return CacheCorruptError(f"{error.filename} is not there; if the cache was copied, finish that, else {do}")
    return CacheCorruptError(f"{path} cannot be read ({error}); {do}")


@contextmanager
def told(kind: type[KcacheError], what: str, do: str) -> Iterator[None]:
    """Turn whatever is raised in the block into a `kind`: `what` could not be done, why, and what to `do`.

    Where the error itself says what to do, as a connection that broke off does, that stands in place of `do`. Errors of
    kcache's, and lack of memory, which `within_memory` tells of, go on as they are.
    """
    try:
        yield
    except KcacheError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        raise kind(f"{what}: {reason(error)}; {advice(error) or do}") from error


@contextmanager
def within_memory(doing: str, do: str | Callable[[], str]) -> Iterator[None]:
    """Turn running out of memory in the block into MemoryShortError: while `doing` what, and which flags take less.

    A function in place of `do` is asked only then.
    """
    try:
        yield
    except KcacheError:
        raise
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise MemoryShortError(
            f"memory ran out while {doing} ({_own_words(error)}); {do() if callable(do) else do}"
        ) from error


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, and those that it was raised for or in the handling of; groups are looked into."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        each = waiting.pop(0)
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        if isinstance(each, BaseExceptionGroup):
            waiting += each.exceptions
        waiting.append(each.__cause__ or (None if each.__suppress_context__ else each.__context__))
        # requests and urllib3 keep the error beneath among their arguments.
        arguments = (*each.args, getattr(each, "reason", None))
        waiting += [argument for argument in arguments if isinstance(argument, BaseException)]


def _names(error: BaseException) -> list[str]:
    return [kind.__name__ for kind in type(error).__mro__]


def system_number(error: BaseException) -> int:
    """errno of the system's error behind it, also where a library of Rust only writes it; 0 for none."""
    for each in _chain(error):
        if isinstance(each, OSError) and each.errno:
            return each.errno
        if found := re.search(r"\(os error (\d+)\)", str(each)):
            return int(found[1])
    return 0


def _meaning(error: BaseException) -> tuple[_Meaning | None, BaseException]:
    """What is known of an error, and which one of its chain says so."""
    chain = list(_chain(error))
    for each in chain:
        if (meaning := _of_the_system(each)) is not None:
            return meaning, each
    if (found := _named(_OF_THE_HUB, chain)) is not None:
        return found
    for each in chain:
        status = getattr(getattr(each, "response", None), "status_code", None)
        if isinstance(status, int) and (meaning := _TROUBLE if status >= 500 else _STATUSES.get(status)) is not None:
            return meaning, each
    if (found := _named(_OF_NETWORKS, chain)) is not None:
        return found
    for each in chain:
        if isinstance(each, RuntimeError) and any(words in str(each).lower() for words in _XET):
            return _OF_NETWORKS["RemoteProtocolError"], each
    return _named(_OF_FILES, chain) or (None, error)


def _of_the_system(error: BaseException) -> _Meaning | None:
    """What is known of an error by what the system says, whoever asked it."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _Meaning("there is no room on the disk")
    if isinstance(error, FileNotFoundError) and error.errno and error.filename is None:  # of os.getcwd
        return _Meaning("the folder that this runs in is gone", "go to one that is there")
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return _Meaning("no more threads may be started here", "raise `ulimit -u`, or a container's limit of pids")
    return None


def _named(meanings: Mapping[str, _Meaning], chain: Sequence[BaseException]) -> tuple[_Meaning, BaseException] | None:
    for name, meaning in meanings.items():
        for each in chain:
            if name in _names(each):
                return meaning, each
    return None


def _own_words(error: BaseException) -> str:
    """The error's message in one line, without the stack that C++ appends; with its class where that says more."""
    text = _CPP.split(re.sub(r"^\[enforce fail at [^\]]*\] (err == 0\. )?", "", str(error)))[0]
    text = " ".join("".join(c if c.isprintable() or c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text).split())
    if len(text) > _LONGEST:
        text = text[:_LONGEST] + "…"
    name = type(error).__name__
    plain = isinstance(error, OSError | RuntimeError | ValueError | MemoryError) or type(error).__module__ != "builtins"
    if not text:
        return name
    return text if plain else f"{name}: {text}"
