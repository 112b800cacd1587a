"""What becomes of caches whose builders are killed, stopped, or several side by side: the flow, wherever caches lie.

A killed build is run once more; the cache must then hold the bytes that an undisturbed build gives, with no row lost
and none twice.
"""

import argparse
import functools
import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from kcache.build.claims import TURN
from kcache.build.plan import CLAIMS
from measuring.builders import Bench, Builder
from measuring.record import machine

FORMATS = ("zarr", "webdataset")
HANG_SECONDS = 60.0


class CacheThere(Protocol):
    """A cache that is built and looked at."""

    @property
    def target(self) -> Path | str:
        """Its path or URL."""
        ...

    def names(self) -> list[str]:
        """All that is below it."""
        ...

    def check(self, tally: "Tally", expected: Path) -> None:
        """Compare it, finished, with one that was built undisturbed on a disk."""
        ...


class Ground(Protocol):
    """Where caches lie."""

    kill_seconds: float
    """How long after the start of several builders one of them is killed, at most."""
    keeps_superseded: bool
    """Whether what a build supersedes stays."""

    def fresh(self, base: Path | None) -> AbstractContextManager[CacheThere]:
        """Where a new cache goes, with what the cache `base` holds; gone afterwards."""
        ...

    def wait(self, builder: Builder, cache: CacheThere, rng: random.Random) -> None:
        """Until a moment at which a builder may be writing."""
        ...

    def builders(self, number: int) -> int:
        """How many build together in run `number`."""
        ...


def _digests(cache: Path) -> dict[str, str]:
    """sha256 of every file of a cache, by relative path."""
    files = sorted(path for path in cache.rglob("*") if path.is_file())
    return {path.relative_to(cache).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _rows(cache: Path) -> Counter[str]:
    """How often each key is committed, by folder and table."""
    found: Counter[str] = Counter()
    for side in cache.glob("*/*.rows.npy"):
        array = np.load(side)
        if array.dtype.names:  # those of joined samples hold their keys alone
            table = f"{side.parent.name} {side.name.split('.', 1)[1]}"
            found.update(f"{table} {key.tobytes().hex()}" for key in array["key"])
    return found


@dataclass
class Tally:
    """What came out, over all kills of one kind."""

    kills: int = 0
    at: Counter[str] = field(default_factory=Counter)
    finished_before: int = 0
    rows_lost: int = 0
    rows_doubled: int = 0
    differing: list[str] = field(default_factory=list)

    def check(self, cache: Path, expected: Path) -> None:
        """Compare a finished cache with an undisturbed one."""
        here, there = _rows(cache), _rows(expected)
        self.rows_lost += (there - here).total()
        self.rows_doubled += (here - there).total()
        ours, theirs = _digests(cache), _digests(expected)
        if ours != theirs:
            self.differing += sorted(f"{cache.parent.name}: {name}" for name, _ in ours.items() ^ theirs.items())[:5]

    def result(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "kills": self.kills,
            "at": dict(sorted(self.at.items())),
            "finished_before_the_kill": self.finished_before,
            "rows_lost": self.rows_lost,
            "rows_doubled": self.rows_doubled,
            "differing": self.differing,
        }


def kill_at_steps(
    bench: Bench, ground: Ground, form: str, source: Path, base: Path | None, expected: Path, every: int
) -> Tally:
    """Kill a builder at each `every`-th step of its writing."""
    with ground.fresh(base) as cache:
        code, steps = bench.start(source, cache.target, form, watch=0).end()
        if code:
            raise RuntimeError(f"the traced build ended with {code}")
    tally = Tally()
    for step in range(1, len(steps) + 1, every):
        with ground.fresh(base) as cache:
            code, told = bench.start(source, cache.target, form, watch=step).end()
            tally.kills += code == -signal.SIGKILL
            tally.finished_before += code == 0
            tally.at.update(told)
            bench.build(source, cache.target, form)
            cache.check(tally, expected)
    return tally


def kill_at_random(bench: Bench, ground: Ground, form: str, kills: int, expected: Path) -> Tally:
    """Kill builders of one cache at random moments until it is finished, and again with the next."""
    rng, tally = random.Random(0), Tally()
    with ground.fresh(None) as cache:
        start = time.monotonic()
        bench.build(bench.pictures, cache.target, form)
        duration = time.monotonic() - start
    while tally.kills < kills:
        with ground.fresh(None) as cache:
            code = -signal.SIGKILL
            while code and tally.kills < kills:
                builder = bench.start(bench.pictures, cache.target, form)
                time.sleep(rng.uniform(0, duration))
                os.kill(builder.pid, signal.SIGKILL)
                code, _ = builder.end()
                tally.kills += code == -signal.SIGKILL
            tally.finished_before += code == 0
            bench.build(bench.pictures, cache.target, form)
            cache.check(tally, expected)
    return tally


def stop_at_random(bench: Bench, ground: Ground, form: str, stops: int, expected: Path) -> dict[str, Any]:
    """Stop builders with Ctrl-C's signal and with SIGTERM, by turns, and look at what they leave behind."""
    rng, tally, left, codes = random.Random(0), Tally(), set[str](), Counter[str]()
    for number in range(stops):
        with ground.fresh(None) as cache:
            builder = bench.start_command(cache.target, form)
            ground.wait(builder, cache, rng)
            os.kill(builder.pid, (signal.SIGINT, signal.SIGTERM)[number % 2])
            code, told = builder.end()
            codes[str(code)] += 1
            if code not in (0, 130, 143):
                tally.differing += told[-3:]
            for *above, name in (path.split("/") for path in cache.names()):
                if name.startswith((".tmp-", TURN)) or above[-1:] == [CLAIMS]:
                    left.add(name)
            bench.build(bench.pictures, cache.target, form)
            cache.check(tally, expected)
    return {"codes": dict(codes), "left_behind": sorted(left), **tally.result()}


def together(bench: Bench, ground: Ground, form: str, runs: int, expected: Path) -> dict[str, Any]:
    """Several builders of one cache at once; in runs of an odd number, one of them is killed at a random moment."""
    tally, encoded = Tally(), list[int]()
    for number in range(runs):
        rng, kill, count = random.Random(number), number % 2 == 1, ground.builders(number)
        with ground.fresh(None) as cache:
            start = time.monotonic()
            builders = [bench.start(bench.pictures, cache.target, form, worker=f"{i}/{count}") for i in range(count)]
            if kill:
                time.sleep(rng.uniform(0, ground.kill_seconds))
                os.kill(builders[rng.randrange(count)].pid, signal.SIGKILL)
            ends = [builder.end() for builder in builders]
            codes = [code for code, _ in ends]
            tally.kills += codes.count(-signal.SIGKILL)
            encoded.append(sum(bool(told) for _, told in ends))
            if any(code not in (0, -signal.SIGKILL) for code in codes) or time.monotonic() - start > HANG_SECONDS:
                tally.differing.append(f"run {number}: builders ended with {codes}")
            # One that is killed when the others have ended may leave the turn that it had; the next build takes it.
            if kill and TURN in cache.names():
                bench.build(bench.pictures, cache.target, form)
            cache.check(tally, expected)
    return {"runs": runs, "builders_that_encoded": encoded, **tally.result()}


def run(
    bench: Bench,
    ground: Ground,
    arguments: argparse.Namespace,
    more: Callable[[str, Path], dict[str, Any]] = lambda form, expected: {},
) -> dict[str, Any]:
    """Everything that was asked for, for both forms, and `more` of a form beside an undisturbed cache."""
    results: dict[str, Any] = {}
    for form in FORMATS:
        first, incremental = bench.folder / f"{form}-first", bench.folder / f"{form}-incremental"
        bench.build(bench.pictures, first, form)
        shutil.copytree(first, incremental)
        bench.build(bench.changed, incremental, form)
        if ground.keeps_superseded:
            shutil.copytree(first, kept := bench.folder / f"{form}-kept")
            incremental = shutil.copytree(incremental, kept, dirs_exist_ok=True)
        results[form] = result = {}
        share = len(FORMATS)
        if arguments.every:
            steps = functools.partial(kill_at_steps, bench, ground, form, every=arguments.every)
            result["steps_of_a_first_build"] = steps(bench.pictures, None, first).result()
            result["steps_of_an_incremental_build"] = steps(bench.changed, first, incremental).result()
        if arguments.random:
            result["random"] = kill_at_random(bench, ground, form, arguments.random // share, first).result()
        if arguments.stops:
            result["stops"] = stop_at_random(bench, ground, form, arguments.stops // share, first)
        if arguments.together:
            result["together"] = together(bench, ground, form, arguments.together // share, first)
        result |= more(form, first)
    return results


def parser_of(text: str | None, *, random: int, stops: int) -> argparse.ArgumentParser:
    """The arguments of both scripts, with their defaults."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="kill at every so many steps; 0 for none")
    parser.add_argument("--random", type=int, default=random, help="kills at random moments, over both forms")
    parser.add_argument("--stops", type=int, default=stops, help="stops by signals at random moments, over both forms")
    parser.add_argument("--together", type=int, default=20, help="runs with several builders, over both forms")
    parser.add_argument("--shapes", action="store_true", help="caches of shapes, mirror images, hints and masks")
    return parser


def conclude(arguments: argparse.Namespace, start: float, results: dict[str, Any]) -> int:
    """Print the JSON; 1 when a row was lost or doubled, or a cache differed."""
    seconds = round(time.monotonic() - start, 1)
    print(json.dumps({**machine(), "arguments": vars(arguments), "seconds": seconds, "results": results}, indent=2))
    kinds = [kind for form in results.values() for kind in form.values()]
    return int(any(kind["rows_lost"] or kind["rows_doubled"] or kind["differing"] for kind in kinds))
