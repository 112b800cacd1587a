"""Builds a cache again and again, killing the builder at random moments: run by test_kill.py in a process of its own.

Each builder is a fork of this process, which has imported everything but computed nothing, so a kill lands in the build
and not in Python's start-up. Prints one JSON line: caches finished, kills that hit a running builder.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from building import build

import kcache.encoders  # imported before the first fork: a builder then starts at once
import kcache.encoding  # noqa: F401


def start_builder(source: Path, cache: Path, oracle: Path) -> int:
    """Fork a builder; returns its process id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            import torch

            torch.set_num_threads(1)
            build(source, cache, oracle, rows_per_shard=2)
            code = 0
        finally:
            os._exit(code)
    return pid


def main(source: Path, caches: Path, oracle: Path, kills_wanted: int) -> None:
    start = time.monotonic()
    _, status = os.waitpid(start_builder(source, caches / "uninterrupted", oracle), 0)
    duration = time.monotonic() - start
    if status:
        raise SystemExit("the uninterrupted build failed")
    rng, kills, finished = random.Random(0), 0, 0
    while kills < kills_wanted:
        pid = start_builder(source, caches / f"killed-{finished}", oracle)
        time.sleep(rng.uniform(0, duration))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            kills += 1
        elif os.waitstatus_to_exitcode(status) == 0:
            finished += 1
        else:
            raise SystemExit(f"a builder failed with {os.waitstatus_to_exitcode(status)} after {kills} kills")
    _, status = os.waitpid(start_builder(source, caches / f"killed-{finished}", oracle), 0)
    if status:
        raise SystemExit("the build after the last kill failed")
    sys.stdout.write(json.dumps({"finished": finished + 1, "kills": kills}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
