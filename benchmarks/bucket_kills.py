"""Builds in a bucket of a real object store: killed at every step of their writing, several at once, failing requests.

As `kills.py`, whose builders these are, with a cache in a bucket of SeaweedFS, which the tests' packages bring along. A
step is a request that changes the bucket, before and after it. A killed build is run once more; then all that lies in
the bucket is copied out by plain HTTP, and must be what an undisturbed build makes on a disk: the same names, the same
bytes. Prints JSON; exits with 1 when a cache differed.

    python benchmarks/bucket_kills.py --every 1 --random 40 --stops 10 --together 20 --rate 0.2
"""

import argparse
import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import torch
from kills import FORMATS, HANG_SECONDS, Bench, Steps, Tally
from measuring.record import machine

import kcache.places.bucket
from kcache.build.claims import TURN
from kcache.build.plan import CLAIMS

SUPPORT = Path(__file__).parents[1] / "tests" / "support"
sys.path.insert(0, str(SUPPORT))
from filer import copy_out, listed  # noqa: E402  # from the tests' folder

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
        plain, steps = kcache.places.bucket.store_of, self

        class Counted:
            def __init__(self, store: Any) -> None:
                self._store = store

            def __getattr__(self, name: str) -> Any:
                call = getattr(self._store, name)
                return steps._around(name, call) if name in ("put", "delete") else call

        kcache.places.bucket.store_of = lambda bucket: Counted(plain(bucket))


@contextmanager
def fresh(folder: Path, base: Path | None) -> Iterator["Cache"]:
    """Where a new cache goes, with what `base` holds; gone afterwards."""
    from filer import copy_in

    cache = Cache(secrets.token_hex(6), Path(tempfile.mkdtemp(dir=folder)))
    if base is not None:
        copy_in(base, cache.name)
    try:
        yield cache
    finally:
        shutil.rmtree(cache.folder)


class Cache:
    """A cache in the bucket."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder, self.url = name, folder, f"{BUCKET}/{name}"

    def check(self, tally: Tally, expected: Path) -> None:
        """Copy it out and compare it with one that lies on a disk.

        What a builder tried the store with that was killed then goes with `kcache cache-gc`, a day later.
        """
        copy = copy_out(self.name, self.folder / "copy")
        for path in copy.glob(".tmp-probe-*"):
            path.unlink()
            tally.at["left for cache-gc"] += 1
        tally.check(copy, expected)


def kill_at_steps(bench: Bench, form: str, source: Path, base: Path | None, expected: Path, every: int) -> Tally:
    """Kill a builder at each `every`-th step of its writing."""
    with fresh(bench.folder, base) as cache:
        code, steps = bench.start(source, cache.url, form, watch=0).end()
        if code:
            raise RuntimeError(f"the traced build ended with {code}")
    tally = Tally()
    for step in range(1, len(steps) + 1, every):
        with fresh(bench.folder, base) as cache:
            code, told = bench.start(source, cache.url, form, watch=step).end()
            tally.kills += code == -signal.SIGKILL
            tally.finished_before += code == 0
            tally.at.update(told)
            bench.build(source, cache.url, form)
            cache.check(tally, expected)
    return tally


def kill_at_random(bench: Bench, form: str, kills: int, expected: Path) -> Tally:
    """Kill builders of one cache at random moments until it is finished, and again with the next."""
    rng, tally = random.Random(0), Tally()
    with fresh(bench.folder, None) as cache:
        start = time.monotonic()
        bench.build(bench.pictures, cache.url, form)
        duration = time.monotonic() - start
    while tally.kills < kills:
        with fresh(bench.folder, None) as cache:
            code = -signal.SIGKILL
            while code and tally.kills < kills:
                builder = bench.start(bench.pictures, cache.url, form)
                time.sleep(rng.uniform(0, duration))
                os.kill(builder.pid, signal.SIGKILL)
                code, _ = builder.end()
                tally.kills += code == -signal.SIGKILL
            tally.finished_before += code == 0
            bench.build(bench.pictures, cache.url, form)
            cache.check(tally, expected)
    return tally


def stop_at_random(bench: Bench, form: str, stops: int, expected: Path) -> dict[str, Any]:
    """Stop builders with Ctrl-C's signal and with SIGTERM, by turns, and look at what they leave behind."""
    rng, tally, left, codes = random.Random(0), Tally(), set[str](), Counter[str]()
    for number in range(stops):
        with fresh(bench.folder, None) as cache:
            builder = bench.start_command(cache.url, form)
            time.sleep(rng.uniform(0.2, 2))
            os.kill(builder.pid, (signal.SIGINT, signal.SIGTERM)[number % 2])
            code, told = builder.end()
            codes[str(code)] += 1
            if code not in (0, 130, 143):
                tally.differing += told[-3:]
            left |= {name for name in listed(cache.name) if name.startswith((".tmp-", TURN)) or f"/{CLAIMS}/" in name}
            bench.build(bench.pictures, cache.url, form)
            cache.check(tally, expected)
    return {"codes": dict(codes), "left_behind": sorted(left), **tally.result()}


def together(bench: Bench, form: str, runs: int, expected: Path) -> dict[str, Any]:
    """Four builders of one cache at once; in runs of an odd number, one of them is killed at a random moment."""
    tally, encoded, rng = Tally(), list[int](), random.Random(0)
    for number in range(runs):
        with fresh(bench.folder, None) as cache:
            start = time.monotonic()
            builders = [bench.start(bench.pictures, cache.url, form, worker=f"{i}/4") for i in range(4)]
            if number % 2:
                time.sleep(rng.uniform(0, 1))
                os.kill(builders[rng.randrange(4)].pid, signal.SIGKILL)
            ends = [builder.end() for builder in builders]
            codes = [code for code, _ in ends]
            tally.kills += codes.count(-signal.SIGKILL)
            encoded.append(sum(bool(told) for _, told in ends))
            if any(code not in (0, -signal.SIGKILL) for code in codes) or time.monotonic() - start > HANG_SECONDS:
                tally.differing.append(f"run {number}: builders ended with {codes}")
            if ".turn" in listed(cache.name):  # of the killed one, when the others had ended: the next build takes it
                bench.build(bench.pictures, cache.url, form)
            cache.check(tally, expected)
    return {"runs": runs, "builders_that_encoded": encoded, **tally.result()}


def failing(bench: Bench, store: Store, form: str, kind: str, expected: Path) -> dict[str, Any]:
    """A build while requests fail; one that ends with an error is run again, up to ten times."""
    tally, codes, found = Tally(), list[int](), Counter[str]()
    with fresh(bench.folder, None) as cache, store.failing(kind):
        while not codes or (codes[-1] and len(codes) < 10):
            code, told = bench.start_command(cache.url, form).end()
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


def run(bench: Bench, store: Store, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that was asked for, for both forms."""
    results: dict[str, Any] = {}
    for form in FORMATS:
        first, incremental = bench.folder / f"{form}-first", bench.folder / f"{form}-incremental"
        bench.build(bench.pictures, first, form)
        shutil.copytree(first, incremental)
        bench.build(bench.changed, incremental, form)
        # In a bucket what was superseded stays until `kcache cache-gc`.
        shutil.copytree(first, kept := bench.folder / f"{form}-kept")
        shutil.copytree(incremental, kept, dirs_exist_ok=True)
        results[form] = result = {}
        if arguments.every:
            result["steps_of_a_first_build"] = kill_at_steps(
                bench, form, bench.pictures, None, first, arguments.every
            ).result()
            result["steps_of_an_incremental_build"] = kill_at_steps(
                bench, form, bench.changed, first, kept, arguments.every
            ).result()
        if arguments.random:
            result["random"] = kill_at_random(bench, form, arguments.random // len(FORMATS), first).result()
        if arguments.stops:
            result["stops"] = stop_at_random(bench, form, arguments.stops // len(FORMATS), first)
        if arguments.together:
            result["together"] = together(bench, form, arguments.together // len(FORMATS), first)
        for kind in arguments.kinds if arguments.rate else ():
            result[kind] = failing(bench, store, form, kind, first)
    return results


def main() -> int:
    """Do what the arguments say, print the JSON, return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="kill at every so many steps; 0 for none")
    parser.add_argument("--random", type=int, default=40, help="kills at random moments, over both forms")
    parser.add_argument("--stops", type=int, default=10, help="stops by signals at random moments, over both forms")
    parser.add_argument("--together", type=int, default=20, help="runs with four builders, over both forms")
    parser.add_argument("--rate", type=float, default=0.2, help="share of the requests that fail; 0 for no such build")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="how they fail, one build each")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    store = Store(dict.fromkeys(arguments.kinds, arguments.rate) if arguments.rate else {})
    try:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["KCACHE_HOME"] = folder
            bench = Bench(Path(folder), steps=Requests)
            bench.preload()
            start = time.monotonic()
            results = run(bench, store, arguments)
    finally:
        store.end()
    seconds = round(time.monotonic() - start, 1)
    print(json.dumps({**machine(), "arguments": vars(arguments), "seconds": seconds, "results": results}, indent=2))
    kinds = [kind for form in results.values() for kind in form.values()]
    return int(any(kind["rows_lost"] or kind["rows_doubled"] or kind["differing"] for kind in kinds))


if __name__ == "__main__":
    sys.exit(main())
