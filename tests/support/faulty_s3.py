"""A proxy before a real object store that makes what networks and stores do now and then happen often.

Which request meets what is decided by a seed, the request and how often it was made before: threads and the order of
requests change nothing, and a request that is made again and again is answered well at last.
"""

import hashlib
import http.client
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any, get_args
from typing import Literal as One
from urllib.parse import parse_qs, unquote, urlsplit

Kind = One[
    "slow_down",  # 503 SlowDown
    "conflict",  # 409 ConditionalRequestConflict, of a conditional write that is not made
    "landed_500",  # 500 of a write that is made
    "lost_answer",  # the connection is closed after a write that is made
    "lost_request",  # the connection is closed, and nothing is made
    "stall",  # nothing for `stall_seconds`, then as ever
    "cut",  # half of the body, then the connection is closed
    "wrong_bytes",  # one bit of an object's body is another one
    "unconditional",  # a conditional write is made whatever is there, as by a store that does not know the condition
    "denied",  # 403 AccessDenied
]
KINDS: tuple[Kind, ...] = get_args(Kind)
_CODES = {
    "slow_down": (503, "SlowDown"),
    "conflict": (409, "ConditionalRequestConflict"),
    "denied": (403, "AccessDenied"),
}
_OF_A_CONNECTION = ("connection", "transfer-encoding", "keep-alive", "content-length", "date", "server")


@dataclass
class Faults:
    """What goes wrong how often; may be changed while the server runs."""

    url: str
    """Of a place in the bucket where nothing is."""
    endpoint: str = ""
    """What AWS_ENDPOINT_URL must be to come here."""
    rates: dict[Kind, float] = field(default_factory=dict)
    """The share of the requests which a kind applies to that meet it."""
    seed: int = 0
    stall_seconds: float = 1.0
    conditions: tuple[str, ...] = ("If-None-Match", "If-Match")
    """Headers that make a write a conditional one."""
    happened: Counter[str] = field(default_factory=Counter)
    """How often each kind was met."""
    requests: Counter[str] = field(default_factory=Counter)
    """How often each method was asked for, "LIST" among them."""
    _made: Counter[str] = field(default_factory=Counter)
    _lock: Lock = field(default_factory=Lock)

    def fate(self, method: str, target: str, headers: Mapping[str, str]) -> Kind | None:
        """What a request meets; it is counted."""
        query = parse_qs(urlsplit(target).query)
        conditional = any(name in headers for name in self.conditions)
        applies: dict[Kind, bool] = {
            "conflict": method == "PUT" and conditional, "unconditional": method == "PUT" and conditional,
            "landed_500": method in ("PUT", "POST"), "lost_answer": method in ("PUT", "POST", "DELETE"),
            "cut": method == "GET", "wrong_bytes": method == "GET" and "list-type" not in query,
        }  # fmt: skip
        # Names of places differ from run to run, and so do those that a store gives to uploads.
        name = unquote(urlsplit(target).path).split("/", 3)[-1]
        prefix = query.get("prefix", [""])[0].partition("/")[2]
        what = f"{method} {name} {prefix} {query.get('partNumber')} {headers.get('Range')}"
        with self._lock:
            self.requests["LIST" if "list-type" in query else method] += 1
            self._made[what] += 1
            for kind in KINDS:
                drawn = hashlib.sha256(f"{self.seed} {kind} {what} {self._made[what]}".encode()).digest()
                if applies.get(kind, True) and int.from_bytes(drawn[:4], "big") < self.rates.get(kind, 0) * 2**32:
                    self.happened[kind] += 1
                    return kind
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: "_Proxy"

    def log_message(self, *_: Any) -> None: ...

    def handle(self) -> None:
        with suppress(OSError):  # who asked has gone
            super().handle()

    def _pass_on(self) -> None:
        faults = self.server.faults
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        kind = faults.fate(self.command, self.path, self.headers)
        if kind == "stall":
            time.sleep(faults.stall_seconds)
        if kind in _CODES:
            return self._refuse(*_CODES[kind])
        if kind == "lost_request":
            self.close_connection = True
            return None
        if kind == "unconditional":
            self.server.store.put(unquote(self.path).split("/", 2)[2], body, use_multipart=False)
            return self._answer(200, {"ETag": '"whatever"'}, b"")
        status, headers, content = self._ask(body)
        if kind == "landed_500":
            return self._refuse(500, "InternalError")
        if kind == "lost_answer":
            self.close_connection = True
            return None
        if kind == "wrong_bytes" and status < 300 and content:
            at, bit = divmod(5 * faults.happened[kind] % (8 * len(content)), 8)  # each time another one
            content = content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]
        self._answer(status, headers, content, half=kind == "cut" and len(content) > 1)
        return None

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on  # noqa: N815  # so does http.server name them

    def _ask(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.server.behind, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():  # "Host" among them: it is signed
                connection.putheader(name, value)
            connection.endheaders(body or None)
            answer = connection.getresponse()
            headers = {name: value for name, value in answer.getheaders() if name.lower() not in _OF_A_CONNECTION}
            if self.command == "HEAD" and (length := answer.getheader("Content-Length")):
                headers["Content-Length"] = length
            return answer.status, headers, answer.read()
        finally:
            connection.close()

    def _refuse(self, status: int, code: str) -> None:
        content = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>On purpose</Message></Error>".encode()
        self._answer(status, {"Content-Type": "application/xml"}, b"" if self.command == "HEAD" else content)

    def _answer(self, status: int, headers: Mapping[str, str], content: bytes, *, half: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if self.command != "HEAD" and status not in (204, 304):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if half else content)
        self.close_connection |= half


class _Proxy(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, environment: Mapping[str, str], bucket: str, faults: Faults) -> None:
        from obstore.store import S3Store

        super().__init__(("127.0.0.1", 0), _Handler)
        self.behind = environment["AWS_ENDPOINT_URL"].removeprefix("http://")
        self.faults = faults
        self.store = S3Store(
            bucket,
            access_key_id=environment["AWS_ACCESS_KEY_ID"],
            secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
            region=environment["AWS_REGION"],
            endpoint=environment["AWS_ENDPOINT_URL"],
            client_options={"allow_http": True},
        )


@contextmanager
def faulty_s3(environment: Mapping[str, str], url: str) -> Iterator[Faults]:
    """A proxy before the server that `environment` leads to; `url` is a place there. Gives the faults, none as yet."""
    faults = Faults(url)
    server = _Proxy(environment, url.split("/")[2], faults)
    faults.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield faults
    finally:
        server.shutdown()
        server.server_close()
