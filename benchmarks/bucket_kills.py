"""Builds in a bucket of a real object store: killed at every step of their writing, several at once, failing requests.

As `kills.py`, with a cache in a bucket of SeaweedFS, which the tests' packages bring along. A
step is a request that changes the bucket, before and after it. A killed build is run once more; then all that lies in
the bucket is copied out by plain HTTP, and must be what an undisturbed build makes on a disk: the same names, the same
bytes. Prints JSON; exits with 1 when a cache differed.

    python benchmarks/bucket_kills.py --every 1 --random 40 --stops 10 --together 20 --rate 0.2
"""

import json
import os
import random
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from measuring.builders import Bench, Builder, Steps
from measuring.kills import CacheThere, Tally, conclude, parser_of, run

import kcache.places.bucket
import kcache.places.client

SUPPORT = Path(__file__).parents[1] / "tests" / "support"
sys.path.insert(0, str(SUPPORT))
from filer import copy_in, copy_out, listed  # noqa: E402  # from the tests' folder

KINDS = ("slow_down", "conflict", "landed_500", "lost_answer", "lost_request", "stall", "cut", "wrong_bytes")
BUCKET = "s3://caches"
_SERVER = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
from contextlib import ExitStack
from faulty_s3 import faulty_s3
from s3_server import s3_server
rates = json.loads(sys.argv[2])
with ExitStack() as stack:
    environment = stack.enter_context(s3_server())
    os.environ |= environment
    faults = {kind: stack.enter_context(faulty_s3(os.environ, "s3://caches")) for kind in rates}
    for kind, fault in faults.items():
        fault.stall_seconds = 0.2
        fault.rates = {kind: rates[kind]}
    print(json.dumps(environment | {"proxies": {kind: fault.endpoint for kind, fault in faults.items()}}), flush=True)
    for line in sys.stdin:
        fault = faults[line.strip()]
        print(json.dumps({"happened": fault.happened.total(), "requests": fault.requests}), flush=True)
        fault.happened.clear()
        fault.requests.clear()
"""


class Store:
    """The server and its proxies, in a process of their own: builders are forks, and obstore does not survive one."""

    def __init__(self, rates: dict[str, float]) -> None:
        command = [sys.executable, "-c", _SERVER, str(SUPPORT), json.dumps(rates)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._asked, self._said = cast("IO[str]", self._process.stdin), cast("IO[str]", self._process.stdout)
        said = self._told()
        self.proxies: dict[str, str] = said.pop("proxies")
        os.environ |= said
        self.endpoint = said["AWS_ENDPOINT_URL"]

    def _told(self) -> dict[str, Any]:
        line = self._said.readline()
        if not line:
            raise RuntimeError("the object store did not start")
        found: dict[str, Any] = json.loads(line)
        return found

    def counts(self, kind: str) -> dict[str, Any]:
        """How many requests came to the proxy of a kind since the last call, and how many failed."""
        self._asked.write(f"{kind}\n")
        self._asked.flush()
        return self._told()

    @contextmanager
    def failing(self, kind: str) -> Iterator[None]:
        """In the block, builders come to the store by the proxy of a kind."""
        os.environ["AWS_ENDPOINT_URL"] = self.proxies[kind]
        try:
            yield
        finally:
            os.environ["AWS_ENDPOINT_URL"] = self.endpoint

    def end(self) -> None:
        """End the server."""
        self._asked.close()
        self._process.wait(60)


class Requests(Steps):
    """Steps of a builder of a bucket."""

    def watch(self) -> None:
        """Count every request of this process that changes the bucket, before and after."""
        plain, steps = kcache.places.client.store_of, self

        class Counted:
            def __init__(self, store: Any) -> None:
                self._store = store

            def __getattr__(self, name: str) -> Any:
                call = getattr(self._store, name)
                return steps.around(name, call) if name in ("put", "delete") else call

        kcache.places.bucket.store_of = lambda bucket: Counted(plain(bucket))  # type: ignore[attr-defined]


@dataclass
class Copied:
    """A cache in the bucket, looked at by plain HTTP."""

    name: str
    folder: Path
    """For a copy of it."""

    @property
    def target(self) -> str:
        """Its URL."""
        return f"{BUCKET}/{self.name}"

    def names(self) -> list[str]:
        """All files below it."""
        return listed(self.name)

    def check(self, tally: Tally, expected: Path) -> None:
        """Copy it out and compare it with one that lies on a disk.

        What a builder tried the store with that was killed then goes with a later trial.
        """
        copy = copy_out(self.name, self.folder / "copy")
        for path in copy.glob(".tmp-probe-*"):
            path.unlink()
            tally.at["left for a later trial"] += 1
        tally.check(copy, expected)


@dataclass
class Bucket:
    """Caches in the bucket, where what was superseded stays until `kcache cache-gc`."""

    folder: Path
    kill_seconds: float = 1.0
    keeps_superseded: bool = True

    @contextmanager
    def fresh(self, base: Path | None) -> Iterator[Copied]:
        """Where a new cache goes, with what `base` holds; its copies are gone afterwards."""
        cache = Copied(secrets.token_hex(6), Path(tempfile.mkdtemp(dir=self.folder)))
        if base is not None:
            copy_in(base, cache.name)
        try:
            yield cache
        finally:
            shutil.rmtree(cache.folder)

    def wait(self, builder: Builder, cache: CacheThere, rng: random.Random) -> None:
        """For a while that a build takes."""
        time.sleep(rng.uniform(0.2, 2))

    def builders(self, number: int) -> int:
        """Always four."""
        return 4


def failing(bench: Bench, ground: Bucket, store: Store, form: str, kind: str, expected: Path) -> dict[str, Any]:
    """A build while requests fail; one that ends with an error is run again, up to ten times."""
    tally, codes, found = Tally(), list[int](), Counter[str]()
    with ground.fresh(None) as cache, store.failing(kind):
        while not codes or (codes[-1] and len(codes) < 10):
            code, told = bench.start_command(cache.target, form).end()
            codes.append(code)
            if code not in (0, 1, 4) or any("Traceback" in line for line in told):
                tally.differing += told[-3:]
            if code:
                found[told[-1][:300] if told else ""] += 1
        counts = store.counts(kind)
        if codes[-1]:
            tally.differing.append(f"{kind}: still failing after {len(codes)} builds")
        cache.check(tally, expected)
    return {"codes": codes, "errors": dict(found), **counts, **tally.result()}


def main() -> int:
    """Do what the arguments say, print the JSON, return the exit code."""
    parser = parser_of(__doc__, random=40, stops=10)
    parser.add_argument("--rate", type=float, default=0.2, help="share of the requests that fail; 0 for no such build")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="how they fail, one build each")
    arguments = parser.parse_args()
    kinds = arguments.kinds if arguments.rate else ()
    torch.set_num_threads(1)
    store = Store(dict.fromkeys(kinds, arguments.rate))
    try:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["KCACHE_HOME"] = folder
            bench, ground = Bench(Path(folder), Requests, arguments.shapes), Bucket(Path(folder))
            bench.preload()
            start = time.monotonic()

            def more(form: str, expected: Path) -> dict[str, Any]:
                return {kind: failing(bench, ground, store, form, kind, expected) for kind in kinds}

            results = run(bench, ground, arguments, more)
    finally:
        store.end()
    return conclude(arguments, start, results)


if __name__ == "__main__":
    sys.exit(main())
