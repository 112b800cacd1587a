"""Builders that are killed, at random moments and at every step of their writing, stopped, and several side by side.

Every builder is a fork of this process, which has imported everything and loaded the encoders but computed nothing, so
that a kill lands in the build. A killed build is run once more; the cache must then hold the bytes that an undisturbed
build gives, with no row lost and none twice. Prints JSON; exits with 1 when a cache differed.

    python benchmarks/kills.py --random 200 --every 1 --stops 40 --together 40
"""

import argparse
import dataclasses
import functools
import hashlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
from measuring.record import machine

import kcache.build.encode  # imported before the first fork: a builder then starts at once
import kcache.encoders.frozen
from kcache.build.build import build_cache
from kcache.build.claims import TURN, holder
from kcache.build.plan import CLAIMS
from kcache.build.survey import survey
from kcache.config import BuildConfig
from kcache.demo.digits import write_digits
from kcache.demo.tiny import demo_models
from kcache_cli import app

FORMATS = ("zarr", "webdataset")
PICTURES = 6
CALLS = ("fsync", "rename", "replace", "link", "unlink", "remove", "mkdir", "rmdir")
"""What of `os` changes the disk, writing to an open file left out; pathlib and shutil use these."""
KILL_SECONDS = 0.3
"""How long after the start of several builders one of them is killed, at most."""
HANG_SECONDS = 60.0


@dataclass
class Steps:
    """Counts the steps of a builder's writing; at the step `kill_at` the builder kills itself."""

    kill_at: int | None
    told: int
    """Descriptor that every step, or only the last one before a kill, is written to, a line each."""
    count: int = 0
    lock: Any = field(default_factory=threading.RLock)

    def at(self, name: str) -> bool:
        """Count one step; returns True where the builder is to end after half of what it is about to write."""
        with self.lock:
            self.count += 1
            if self.kill_at in (None, self.count):
                os.write(self.told, f"{name}\n".encode())
            if self.count == self.kill_at and not name.startswith("half"):
                os.kill(os.getpid(), signal.SIGKILL)
            return self.count == self.kill_at

    def watch(self) -> None:
        """Count every call in this process that changes the disk, before and after."""
        for name in CALLS:
            setattr(os, name, self._around(name, getattr(os, name)))
        plain_open, steps = io.open, self

        class CountedFile(io.FileIO):
            def write(self, content: Any) -> int:
                steps.at("before write")
                if steps.at("half write"):
                    super().write(bytes(content)[: len(content) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
                written = super().write(content)
                steps.at("after write")
                return written

        def counted_open(file: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
            if mode not in ("xb", "wb"):
                return plain_open(file, mode, *arguments, **named)
            steps.at("before open")
            opened = io.BufferedWriter(CountedFile(file, mode.replace("b", "")))
            steps.at("after open")
            return opened

        io.open = counted_open  # type: ignore[assignment]

    def _around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def counted(*arguments: Any, **named: Any) -> Any:
            self.at(f"before {name}")
            result = call(*arguments, **named)
            self.at(f"after {name}")
            return result

        return counted


@dataclass
class Builder:
    """A builder in a process of its own."""

    pid: int
    told: int

    def end(self) -> tuple[int, list[str]]:
        """Wait for its end: exit code, or minus the signal that ended it, and the lines that it told."""
        with os.fdopen(self.told) as pipe:
            lines = pipe.read().splitlines()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), lines


@dataclass
class Bench:
    """Small pictures, a tiny pair of models, and where the caches go."""

    folder: Path
    steps: type[Steps] = Steps
    """What is counted as a step."""

    def __post_init__(self) -> None:
        self.prior, self.decoder = demo_models(self.folder / "models")
        self.pictures, self.changed = self.folder / "pictures", self.folder / "changed"
        write_digits(self.pictures, PICTURES)
        write_digits(self.changed, PICTURES + 2)
        metadata = self.changed / "metadata.jsonl"
        lines = [json.loads(line) for line in metadata.read_text().splitlines()]
        lines[1]["text"] = lines[2]["text"]
        (self.changed / lines[3]["file_name"]).write_bytes(b"no picture")
        metadata.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def config(self, form: str, worker: str | None = None) -> BuildConfig:
        """Settings that make two shards of each table."""
        return BuildConfig(
            format="zarr" if form == "zarr" else "webdataset",
            resolution=(32,),
            dtype="float32",
            batch_size=2,
            num_workers=2,
            rows_per_shard=5,
            device="cpu",
            worker=worker,
            pretrained_prior_model_name_or_path=str(self.prior),
            pretrained_decoder_model_name_or_path=str(self.decoder),
        )

    def preload(self) -> None:
        """Load the encoders once, and what pyarrow loads when it first makes a table; builders take both over."""
        pyarrow.table({"id": ["a"]})
        job = survey(str(self.pictures), self.folder / "none", self.config("zarr"), lambda _: None)
        load, device = kcache.encoders.frozen.load_encoder, torch.device("cpu")
        encoders = {r.fingerprint: load(r, job.repository(name), device) for name, r in job.recipes.items()}
        kcache.encoders.frozen.load_encoder = lambda recipe, *_: encoders[recipe.fingerprint]

    def start(
        self, source: Path, cache: Path | str, form: str, *, worker: str | None = None, watch: int = -1
    ) -> Builder:
        """Start a builder; `watch` 0 makes it tell every step, k > 0 kills it at step k.

        A `worker` tells, a line each, how many rows it encoded itself.
        """
        read, write = os.pipe()
        pid = os.fork()
        if pid:
            os.close(write)
            return Builder(pid, read)
        code = 1
        try:
            os.close(read)
            if watch >= 0:
                self.steps(watch or None, write).watch()
            own: dict[str, int] = {}
            config = dataclasses.replace(self.config(form, worker), replace=True)  # other pictures take their place
            build_cache(str(source), str(cache), config, report=lambda now: own.update({now.table: now.done}))
            if worker:
                os.write(write, b"row\n" * sum(own.values()))
            code = 0
        except BaseException as error:
            sys.stderr.write(f"builder {worker or ''}: {error!r}\n")
            raise
        finally:
            os._exit(code)

    def start_command(self, cache: Path, form: str) -> Builder:
        """Start `kcache cache-build` as it is typed."""
        config = dataclasses.asdict(self.config(form))
        flags = {name: value for name, value in config.items() if value not in (None, False)} | {"resolution": 32}
        sys.argv = ["kcache", "cache-build", str(self.pictures), str(cache)]
        sys.argv += [f"--{name}={value}" for name, value in flags.items()]
        read, write = os.pipe()
        pid = os.fork()
        if pid:
            os.close(write)
            return Builder(pid, read)
        code = 1
        try:
            os.dup2(write, 1)
            os.dup2(write, 2)
            app.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            os._exit(code)

    def build(self, source: Path, cache: Path | str, form: str) -> None:
        """Build undisturbed; raises RuntimeError when that fails."""
        code, _ = self.start(source, cache, form).end()
        if code:
            raise RuntimeError(f"the builder of {cache} ended with {code}")


def digests(cache: Path) -> dict[str, str]:
    """sha256 of every file of a cache, by relative path."""
    files = sorted(path for path in cache.rglob("*") if path.is_file())
    return {path.relative_to(cache).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rows(cache: Path) -> Counter[str]:
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
        here, there = rows(cache), rows(expected)
        self.rows_lost += (there - here).total()
        self.rows_doubled += (here - there).total()
        ours, theirs = digests(cache), digests(expected)
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


@contextmanager
def fresh(folder: Path, base: Path | None) -> Iterator[Path]:
    """Where a new cache goes, or a copy of the cache `base`; gone afterwards."""
    cache = Path(tempfile.mkdtemp(dir=folder)) / "cache"
    try:
        if base is not None:
            shutil.copytree(base, cache)
        yield cache
    finally:
        shutil.rmtree(cache.parent)


def kill_at_steps(bench: Bench, form: str, source: Path, base: Path | None, expected: Path, every: int) -> Tally:
    """Kill a builder at each `every`-th step of its writing."""
    with fresh(bench.folder, base) as cache:
        code, steps = bench.start(source, cache, form, watch=0).end()
        if code:
            raise RuntimeError(f"the traced build ended with {code}")
    tally = Tally()
    for step in range(1, len(steps) + 1, every):
        with fresh(bench.folder, base) as cache:
            code, told = bench.start(source, cache, form, watch=step).end()
            tally.kills += code == -signal.SIGKILL
            tally.finished_before += code == 0
            tally.at.update(told)
            bench.build(source, cache, form)
            tally.check(cache, expected)
    return tally


def kill_at_random(bench: Bench, form: str, kills: int, expected: Path) -> Tally:
    """Kill builders of one cache at random moments until it is finished, and again with the next."""
    rng, tally = random.Random(0), Tally()
    with fresh(bench.folder, None) as cache:
        start = time.monotonic()
        bench.build(bench.pictures, cache, form)
        duration = time.monotonic() - start
    while tally.kills < kills:
        with fresh(bench.folder, None) as cache:
            code = -signal.SIGKILL
            while code and tally.kills < kills:
                builder = bench.start(bench.pictures, cache, form)
                time.sleep(rng.uniform(0, duration))
                os.kill(builder.pid, signal.SIGKILL)
                code, _ = builder.end()
                tally.kills += code == -signal.SIGKILL
            tally.finished_before += code == 0
            bench.build(bench.pictures, cache, form)
            tally.check(cache, expected)
    return tally


def stop_at_random(bench: Bench, form: str, stops: int, expected: Path) -> dict[str, Any]:
    """Stop builders with Ctrl-C's signal and with SIGTERM, by turns, and look at what they leave behind."""
    rng, tally, left = random.Random(0), Tally(), set()
    for number in range(stops):
        with fresh(bench.folder, None) as cache:
            builder = bench.start_command(cache, form)
            while not cache.exists() and not os.waitid(os.P_PID, builder.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                time.sleep(0.001)
            time.sleep(rng.uniform(0, KILL_SECONDS))
            os.kill(builder.pid, (signal.SIGINT, signal.SIGTERM)[number % 2])
            code, told = builder.end()
            tally.at[str(code)] += 1
            if code not in (0, 130, 143):
                tally.differing += told[-3:]
            left |= {p.name for p in cache.rglob("*") if p.name.startswith((".tmp-", TURN)) or p.parent.name == CLAIMS}
            bench.build(bench.pictures, cache, form)
            tally.check(cache, expected)
    codes = dict(tally.at)
    tally.at.clear()
    return {"codes": codes, "left_behind": sorted(left), **tally.result()}


def build_together(bench: Bench, form: str, expected: Path, number: int) -> Tally:
    """Two to four builders of one cache at once; in runs of an odd number, one of four is killed at a random moment."""
    kill, rng, tally = number % 2 == 1, random.Random(number), Tally()
    count = 4 if kill else 2 + number // 2 % 3
    killed = 0
    with fresh(bench.folder, None) as cache:
        start = time.monotonic()
        builders = [bench.start(bench.pictures, cache, form, worker=f"{i}/{count}") for i in range(count)]
        if kill:
            time.sleep(rng.uniform(0, KILL_SECONDS))
            killed = builders[rng.randrange(count)].pid
            os.kill(killed, signal.SIGKILL)
        ends = [builder.end() for builder in builders]
        # One that is killed when the others have ended may leave the claim that it held; the next build takes it over.
        if (left := holder(cache / TURN)) is not None and left.pid == killed:
            (cache / TURN).unlink()
        codes = [code for code, _ in ends]
        tally.kills = codes.count(-signal.SIGKILL)
        tally.at["builders that encoded"] = sum(bool(told) for _, told in ends)
        if any(code not in (0, -signal.SIGKILL) for code in codes) or time.monotonic() - start > HANG_SECONDS:
            tally.differing.append(f"run {number}: builders ended with {codes}")
        tally.check(cache, expected)
    return tally


def together(bench: Bench, form: str, runs: int, expected: Path) -> dict[str, Any]:
    """`runs` runs with several builders."""
    tallies = [build_together(bench, form, expected, number) for number in range(runs)]
    return {
        "runs": runs,
        "builders_that_encoded": [tally.at["builders that encoded"] for tally in tallies],
        "kills": sum(tally.kills for tally in tallies),
        "rows_lost": sum(tally.rows_lost for tally in tallies),
        "rows_doubled": sum(tally.rows_doubled for tally in tallies),
        "differing": [name for tally in tallies for name in tally.differing],
    }


def run(bench: Bench, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that was asked for, for both forms."""
    results: dict[str, Any] = {}
    for form in FORMATS:
        first, incremental = bench.folder / f"{form}-first", bench.folder / f"{form}-incremental"
        bench.build(bench.pictures, first, form)
        shutil.copytree(first, incremental)
        bench.build(bench.changed, incremental, form)
        results[form] = result = {}
        if arguments.every:
            steps = functools.partial(kill_at_steps, bench, form, every=arguments.every)
            result["steps_of_a_first_build"] = steps(bench.pictures, None, first).result()
            result["steps_of_an_incremental_build"] = steps(bench.changed, first, incremental).result()
        if arguments.random:
            result["random"] = kill_at_random(bench, form, arguments.random // len(FORMATS), first).result()
        if arguments.stops:
            result["stops"] = stop_at_random(bench, form, arguments.stops // len(FORMATS), first)
        if arguments.together:
            result["together"] = together(bench, form, arguments.together // len(FORMATS), first)
    return results


def main() -> int:
    """Do what the arguments say, print the JSON, return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", type=int, default=200, help="kills at random moments, over both forms")
    parser.add_argument("--every", type=int, default=1, help="kill at every so many steps; 0 for none")
    parser.add_argument("--stops", type=int, default=40, help="stops by signals at random moments, over both forms")
    parser.add_argument("--together", type=int, default=20, help="runs with several builders, over both forms")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    memory = Path("/dev/shm")  # noqa: S108  # fsync costs nothing there, and a kill loses nothing that was written
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        os.environ["KCACHE_HOME"] = folder
        bench = Bench(Path(folder))
        bench.preload()
        start = time.monotonic()
        results = run(bench, arguments)
    seconds = round(time.monotonic() - start, 1)
    print(json.dumps({**machine(), "arguments": vars(arguments), "seconds": seconds, "results": results}, indent=2))
    kinds = [kind for form in results.values() for kind in form.values()]
    return int(any(kind["rows_lost"] or kind["rows_doubled"] or kind["differing"] for kind in kinds))


if __name__ == "__main__":
    sys.exit(main())
