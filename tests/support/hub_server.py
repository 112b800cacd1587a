"""A Hub of our own on the loopback interface: as much of it as uploading a model, or fetching one, needs."""

import base64
import hashlib
import json
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Hub:
    """What arrived, and how the next requests are answered."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    """Contents by path of the one repository."""
    requests: list[tuple[str, str | None, bytes]] = field(default_factory=list)
    """Path, Authorization header and body of every request."""
    refuse: dict[str, int] = field(default_factory=dict)
    """Status for requests whose path contains the key."""

    def answer(self, path: str, authorization: str | None, body: bytes) -> tuple[int, object]:
        """Status and JSON for a request."""
        self.requests.append((path, authorization, body))
        if authorization != "Bearer hf_right":
            return 401, {"error": "who are you?"}
        status = next((status for part, status in self.refuse.items() if part in path), 200)
        return status, self._accept(path, body) if status == 200 else {"error": "no"}

    def _accept(self, path: str, body: bytes) -> object:
        if path == "/api/repos/create":
            asked = json.loads(body)
            return {"url": f"{self.url}/{asked.get('organization') or 'me'}/{asked['name']}"}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if "/preupload/" in path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            return {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
        assert "/commit/" in path, path
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return {"commitUrl": f"{self.url}/me/run/commit/{'a' * 40}", "commitOid": "a" * 40}


@contextmanager
def serve() -> Iterator[Hub]:
    """Run the server while the block runs; accepts the token "hf_right" of the user "me" and no other."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status, content = hub.answer(self.path, self.headers["Authorization"], body)
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


_COMMIT = "a" * 40


class _Files(BaseHTTPRequestHandler):
    """A Hub whose every repository is a folder, and whose weights are refused, or broken off in the middle."""

    root: Path
    fault: str
    ended: threading.Event

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        names = [path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if path.is_file()]
        if name := self.path.partition(f"/resolve/{_COMMIT}/")[2]:
            self._file(name)
        elif "/tree/" in self.path:
            listed = [{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in names]
            self._answer(200, json.dumps(listed).encode())
        else:
            about = {"id": "o/r", "sha": _COMMIT, "siblings": [{"rfilename": name} for name in names]}
            self._answer(200, json.dumps(about).encode())

    def _file(self, name: str) -> None:
        content = (self.root / name).read_bytes()
        broken = self.fault if name.endswith(".safetensors") and self.command == "GET" else ""
        if broken.isdecimal():
            self._answer(int(broken), b"")
            return
        self._answer(200, content, len(content) // 2 if broken else len(content))
        if broken == "hang":
            self.ended.wait(60)
        if broken == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def _answer(self, status: int, content: bytes, sent: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", _COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[:sent])

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serve_files(root: Path, fault: str = "") -> Iterator[str]:
    """The address of a Hub whose every repository is the folder `root`, while the block runs.

    Weights meet with a `fault`: a status such as "500", or "cut", "reset" or "hang" in the middle of a file.
    """
    ended = threading.Event()
    handler = type("Handler", (_Files,), {"root": root, "fault": fault, "ended": ended})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        ended.set()
        server.shutdown()
        thread.join()
        server.server_close()
