"""What streaming out of an object store waits for, when the store gives twice what training needs, and when half.

    python benchmarks/streaming.py --output streaming.json

Puts a cache with the prior's tables into SeaweedFS, which the tests' packages bring along, behind a line of limited
rate. A consumer takes batches and pretends to compute, so long that it needs `--need` MB/s. Once the stage is full it
is measured for `--seconds`, at twice and at half of what it needs: the share of the time that it waits for the store,
for verification and for copying. With twice the rate it should wait at most 1 % of the time, with half the rate half of
it, less what the stage still held, and for the store. Then it says how long the first samples and the state of an order
of a hundred million samples take, and how much memory. Prints a table and writes JSON.
"""

import argparse
import os
import socket
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from measuring.record import machine, write_outcome
from measuring.synthetic import write_synthetic_cache

from kcache import Cache
from kcache.loader import CacheLoader
from kcache.loader.course import Course
from kcache.loader.parts import Part
from kcache.loader.schedule import Schedule
from kcache.loader.state import States
from kcache.loader.streaming.streamed import StreamShape
from kcache.places.bucket import BucketPath
from kcache.places.effects import write_bytes

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))
from s3_server import BUCKET, s3_server  # from the tests' folder

FIELDS = ["image_embeds", "text_embeds", "text_encoder_hidden_states"]
DIM = 640
"""Half of the published width: half of the bytes are enough to fill a stage in a minute."""
SHAPE = StreamShape(block_rows=16, lanes=64, window_blocks=4)
BATCH = 64
SETTLE_SECONDS = 15.0
"""Until the stage holds what it holds in the middle of a run."""
RATES = {"twice": 2.0, "half": 0.5}
"""What the line carries, in parts of what is needed."""
AIM = 0.01
LARGE = 10**8


class Line:
    """A way to a server on this machine that carries only so many bytes a second back."""

    def __init__(self, port: int) -> None:
        self.bytes_per_second = float("inf")
        self._port = port
        self._free_at = 0.0
        self._lock = threading.Lock()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Let nobody in any more."""
        self._listening.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                server = socket.create_connection(("127.0.0.1", self._port))
                threading.Thread(target=self._carry, args=(client, server, False), daemon=True).start()
                threading.Thread(target=self._carry, args=(server, client, True), daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket, limited: bool) -> None:
        with suppress(OSError):
            while content := source.recv(1 << 16):
                if limited:
                    self._wait(len(content))
                target.sendall(content)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _wait(self, count: int) -> None:
        with self._lock:
            begin = max(self._free_at, time.monotonic())
            self._free_at = begin + count / self.bytes_per_second
        time.sleep(max(0.0, begin - time.monotonic()))


@contextmanager
def served(samples: int) -> Iterator[tuple[str, Line]]:
    """The URL of a cache in an object store behind a line, which carries as much as it can until it is told."""
    with tempfile.TemporaryDirectory() as folder, s3_server() as environment:
        os.environ.update(environment)
        local = Path(folder) / "cache"
        write_synthetic_cache(local, samples, dim=DIM, tables=("image_embeds", "text"), rows_per_shard=2048)
        place = BucketPath.of(f"s3://{BUCKET}/cache")
        for path in sorted(path for path in local.rglob("*") if path.is_file()):
            write_bytes(place / path.relative_to(local).as_posix(), path.read_bytes())
        line = Line(int(environment["AWS_ENDPOINT_URL"].rpartition(":")[2]))
        os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{line.port}"
        forget_stores()
        yield str(place), line
        line.close()


def forget_stores() -> None:
    """Have connections made anew, which lead where the environment says now."""
    from kcache.places.client import forget_stores

    forget_stores()


def measure(url: str, line: Line, rate: float, need: float, seconds: float) -> dict[str, float]:
    """Shares of the time that a consumer of `need` bytes a second waits, of a line that gives `rate` times as much."""
    line.bytes_per_second = float("inf")
    cache = Cache.open(url)
    sample = cache.resident_bytes(FIELDS) / len(cache)
    loader = CacheLoader(cache, FIELDS, BATCH, shuffle="stream", residency="stream", shape=SHAPE)
    batches = loader.forever()
    step, computed = BATCH * sample / need, 0.0
    line.bytes_per_second = rate * need
    begun, waits, waited, end = time.monotonic(), dict[str, float](), 0.0, None
    for _ in batches:
        now = time.monotonic()
        if end is None and now - begun > SETTLE_SECONDS:
            begun, end, waits, waited = now, now + seconds, dict(loader.waits), loader.waited
        if end is not None and now >= end:
            break
        time.sleep(step)
        computed += step
    took = time.monotonic() - begun
    batches.close()
    shares = {name: (total - waits.get(name, 0.0)) / took for name, total in loader.waits.items()}
    return {"all": (loader.waited - waited) / took, **shares}


def measure_large() -> dict[str, float]:
    """Seconds and bytes until the first batch's samples, and a state, of an order of a hundred million samples."""
    rows = cast(Any, Rows())
    tracemalloc.start()
    begun = time.perf_counter()
    course, schedule = Course(len(rows), 0, "stream"), Schedule([len(rows)], [BATCH], 0)
    first = next(schedule.forever(schedule.begin()))
    samples = course.samples(course.share(first, 0, 1).places)
    part = Part(rows, [], BATCH, course, 0, {})
    state = States(rows, [part], 0, "stream").told(first.after)
    took = time.perf_counter() - begun
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {"seconds": took, "bytes": float(most), "distinct": len(set(samples.tolist())), "epoch": state["epoch"]}


class Rows(SimpleNamespace):
    """As many samples, of which nothing is known but their number."""

    samples_digest = "0" * 64
    caption_bounds = np.array([LARGE])

    def __len__(self) -> int:
        return LARGE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=8192)
    parser.add_argument("--need", type=float, default=16.0, help="MB a second")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    large = measure_large()
    with served(arguments.samples) as (url, line):
        found = {
            name: measure(url, line, rate, arguments.need * 1e6, arguments.seconds) for name, rate in RATES.items()
        }
    print(f"{machine()['cpu']}: share of the time that a consumer of {arguments.need} MB/s waits")
    for name, shares in found.items():
        parts = ", ".join(f"{what} {share:.1%}" for what, share in shares.items())
        print(f"  a store that gives {name} of that: {parts}")
    print(f"at most {AIM:.0%} with twice the rate: {'yes' if found['twice']['all'] <= AIM else 'NO'}")
    print(
        f"the first {BATCH} of {LARGE:,} samples and a state: {large['seconds']:.2f} s, {large['bytes'] / 1e6:.0f} MB"
    )
    write_outcome(arguments.output, "streaming", vars(arguments), {"waits": found, "large": large})


if __name__ == "__main__":
    main()
