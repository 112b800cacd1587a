"""Builders killed at random moments: the cache ends up with the same bytes as if nothing had happened."""

import json
import os
import subprocess
import sys
from pathlib import Path

from building import copy_pictures, digests

from kcache import Cache

KILLS = 30


def test_a_killed_build_ends_with_the_bytes_of_an_uninterrupted_one(oracle: Path, tmp_path: Path) -> None:
    source = copy_pictures(oracle, tmp_path / "pictures", 8)
    (source / "img_03.png").write_bytes(b"no picture")
    caches = tmp_path / "caches"
    caches.mkdir()
    script = Path(__file__).parent / "killed_builds.py"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, str(script), str(source), str(caches), str(oracle), str(KILLS)],
        check=False, capture_output=True, text=True, env=environment, timeout=280,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    outcome = json.loads(run.stdout.splitlines()[-1])
    assert outcome["kills"] == KILLS
    expected = digests(caches / "uninterrupted")
    for number in range(outcome["finished"]):
        assert digests(caches / f"killed-{number}") == expected, f"killed-{number} differs"
    keys = Cache.open(caches / "killed-0").samples["image_key"].to_pylist()
    assert len(keys) == len(set(keys)) == 7
