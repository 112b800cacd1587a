"""A real object store on this machine, for as long as a test session: SeaweedFS, which keeps to S3's rules."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

BUCKET = "caches"
_SECONDS = 60.0
"""Until it must be up: it takes one or two alone, and more beside other tests."""
_KEEPER = 'folder=$1; shift; "$@" >"$folder/log" 2>&1 & read -r _; kill -9 $!; wait $!; rm -rf "$folder"'
"""A shell that has the server, and clears up when its input ends: also when who has the other end is killed."""


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on; the server also takes each one's number plus 10,000."""
    sockets, ports = [], list[int]()
    while len(ports) < count:
        sockets.append(held := socket.socket())
        held.bind(("127.0.0.1", 0))
        if (port := held.getsockname()[1]) < 55_000:
            ports.append(port)
    for held in sockets:
        held.close()
    return ports


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """A server with an empty bucket, "s3://caches"; gives the environment that leads there."""
    names = ("s3.port", "master.port", "volume.port", "filer.port", "admin.port", "s3.port.iceberg", "s3.port.lance")
    ports = dict(zip(names, _free_ports(len(names)), strict=True))
    folder = Path(tempfile.mkdtemp(prefix="kcache-s3-"))
    environment = {
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": "no secret",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports['s3.port']}",
        "FILER_URL": f"http://127.0.0.1:{ports['filer.port']}/buckets/{BUCKET}",
    }
    command = [
        str(Path(sys.executable).parent / "weed"), "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        "-webdav=false", "-admin.ui=false", "-master.telemetry=false", *(f"-{n}={port}" for n, port in ports.items()),
    ]  # fmt: skip
    keeper = subprocess.Popen(
        ["sh", "-c", _KEEPER, "sh", str(folder), *command],
        env={**os.environ, **environment, "S3_BUCKET": BUCKET},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        start_new_session=True,  # a Ctrl-C is not for it
    )
    try:
        _wait_for(environment, folder / "log")
        yield environment
    finally:
        keeper.communicate()  # asked to end, the server would take half a minute


def _wait_for(environment: dict[str, str], log: Path) -> None:
    from obstore.store import S3Store

    store = S3Store(
        BUCKET,
        access_key_id=environment["AWS_ACCESS_KEY_ID"],
        secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        region=environment["AWS_REGION"],
        endpoint=environment["AWS_ENDPOINT_URL"],
        client_options={"allow_http": True},
        retry_config={"max_retries": 0},
    )
    host, port = environment["AWS_ENDPOINT_URL"].removeprefix("http://").split(":")
    end = time.monotonic() + _SECONDS
    while True:
        try:
            with closing(socket.create_connection((host, int(port)), timeout=1)):
                store.put("up", b"")
            store.delete("up")
            return
        except Exception:  # noqa: BLE001  # whatever it is, the server is not up yet
            if time.monotonic() > end:
                raise RuntimeError(f"the object store did not start: {log.read_text()[-2000:]}") from None
            time.sleep(0.1)
