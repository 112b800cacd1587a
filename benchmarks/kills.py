"""Builders that are killed, at random moments and at every step of their writing, stopped, and several side by side.

A killed build is run once more; the cache must then hold the bytes that an undisturbed build gives, with no row lost
and none twice. A step is a call that changes the disk, before and after it. Prints JSON; exits with 1 when a cache
differed.

    python benchmarks/kills.py --random 200 --every 1 --stops 40 --together 40
"""

import io
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring.builders import Bench, Builder, Steps
from measuring.kills import CacheThere, Tally, conclude, parser_of, run

CALLS = ("fsync", "rename", "replace", "link", "unlink", "remove", "mkdir", "rmdir")
"""What of `os` changes the disk, writing to an open file left out; pathlib and shutil use these."""


class Calls(Steps):
    """Steps of a builder on a disk."""

    def watch(self) -> None:
        """Count every call of this process that changes the disk, before and after."""
        for name in CALLS:
            setattr(os, name, self.around(name, getattr(os, name)))
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

        io.open = counted_open


@dataclass
class Folder:
    """A cache on a disk."""

    target: Path

    def names(self) -> list[str]:
        """All files and folders below it."""
        return [path.relative_to(self.target).as_posix() for path in self.target.rglob("*")]

    def check(self, tally: Tally, expected: Path) -> None:
        """Compare it, finished, with an undisturbed one."""
        tally.check(self.target, expected)


@dataclass
class Disk:
    """Caches in a folder of this machine."""

    folder: Path
    kill_seconds: float = 0.3
    keeps_superseded: bool = False

    @contextmanager
    def fresh(self, base: Path | None) -> Iterator[Folder]:
        """Where a new cache goes, or a copy of the cache `base`; gone afterwards."""
        cache = Path(tempfile.mkdtemp(dir=self.folder)) / "cache"
        try:
            if base is not None:
                shutil.copytree(base, cache)
            yield Folder(cache)
        finally:
            shutil.rmtree(cache.parent)

    def wait(self, builder: Builder, cache: CacheThere, rng: random.Random) -> None:
        """Until some moment after the cache's folder is there."""
        while not Path(cache.target).exists() and not os.waitid(
            os.P_PID, builder.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT
        ):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, self.kill_seconds))

    def builders(self, number: int) -> int:
        """Two to four; four where one of them is killed."""
        return 4 if number % 2 else 2 + number // 2 % 3


def main() -> int:
    """Do what the arguments say, print the JSON, return the exit code."""
    arguments = parser_of(__doc__, random=200, stops=40).parse_args()
    torch.set_num_threads(1)
    memory = Path("/dev/shm")  # noqa: S108  # fsync costs nothing there, and a kill loses nothing that was written
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        os.environ["KCACHE_HOME"] = folder
        bench = Bench(Path(folder), Calls, arguments.shapes)
        bench.preload()
        start = time.monotonic()
        results = run(bench, Disk(bench.folder), arguments)
    return conclude(arguments, start, results)


if __name__ == "__main__":
    sys.exit(main())
