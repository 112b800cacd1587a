"""Builders killed at random moments and at steps of their writing, alone and together: the cache ends as it would.

All steps, and more random moments: python benchmarks/kills.py, and python benchmarks/bucket_kills.py for buckets.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = """
import json, os, sys
import bucket_kills, kills

for line in sys.stdin:
    name, output, *arguments = json.loads(line)
    if pid := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    else:
        sys.argv = [name, *arguments]
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT, 0o600), 1)
        code = sys.modules[name].main()
        sys.stdout.flush()
        os._exit(code)
"""
"""A process that runs the scripts that it is told, each in a fork of its own: all of them load the same libraries."""
Results = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Results]:
    """Runs a script, and gives what it says."""
    output = tmp_path_factory.mktemp("kills") / "output"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command, pipe = [sys.executable, "-c", SCRIPTS], subprocess.PIPE
    with subprocess.Popen(command, cwd=BENCHMARKS, env=environment, stdin=pipe, stdout=pipe, text=True) as scripts:
        asked, told = scripts.stdin, scripts.stdout
        assert asked
        assert told

        def results(script: str, *arguments: str) -> dict[str, Any]:
            output.write_bytes(b"")
            asked.write(json.dumps([script, str(output), *arguments]) + "\n")
            asked.flush()
            code = told.readline()
            assert code in ("0\n", "1\n"), code
            found: dict[str, Any] = json.loads(output.read_text())["results"]
            return found

        yield results
        scripts.kill()  # nothing runs, or something hangs


@pytest.fixture(scope="module")
def outcome(results: Results) -> dict[str, Any]:
    """What the script says of 6 random kills, a kill at every 283rd step, 8 stops, and 4 builds by several processes.

    Of these, two to four at once, every other loses one. All of it is over both forms of a cache.
    """
    return results("kills", "--random", "6", "--every", "283", "--stops", "8", "--together", "4")


@pytest.fixture(scope="module")
def in_bucket(results: Results) -> dict[str, Any]:
    """The same of a cache in a bucket, killed at every 149th step, and of builds whose requests' answers are lost."""
    together = ["--together", "4", "--rate", "0.2", "--kinds", "lost_answer"]
    return results("bucket_kills", "--random", "0", "--stops", "0", "--every", "149", *together)


@pytest.fixture(scope="module")
def of_shapes(results: Results) -> dict[str, Any]:
    """The same of a cache of shapes, mirror images, hints and masks on a disk, killed at every 1531st step."""
    return results("kills", "--shapes", "--random", "0", "--stops", "0", "--every", "1531", "--together", "4")


@pytest.mark.parametrize("form", ["zarr", "webdataset"])
@pytest.mark.parametrize("kind", ["steps_of_a_first_build", "steps_of_an_incremental_build", "random"])
def test_a_killed_build_ends_with_the_bytes_of_an_undisturbed_one(
    outcome: dict[str, Any], form: str, kind: str
) -> None:
    result = outcome[form][kind]
    assert result["kills"] >= 3
    assert (result["rows_lost"], result["rows_doubled"], result["differing"]) == (0, 0, [])


@pytest.mark.parametrize("form", ["zarr", "webdataset"])
def test_a_stopped_build_clears_up_and_goes_on_later(outcome: dict[str, Any], form: str) -> None:
    result = outcome[form]["stops"]
    assert set(result["codes"]) <= {"0", str(128 + signal.SIGINT), str(128 + signal.SIGTERM)}
    assert len(result["codes"]) > 1
    assert result["left_behind"] == []
    assert (result["rows_lost"], result["rows_doubled"], result["differing"]) == (0, 0, [])


@pytest.mark.parametrize("form", ["zarr", "webdataset"])
def test_processes_share_a_build_and_lose_nothing_with_one_of_them(outcome: dict[str, Any], form: str) -> None:
    result = outcome[form]["together"]
    assert result["runs"] == 2
    assert result["kills"] >= 1
    assert max(result["builders_that_encoded"]) > 1
    assert (result["rows_lost"], result["rows_doubled"], result["differing"]) == (0, 0, [])


@pytest.mark.parametrize("form", ["zarr", "webdataset"])
def test_a_build_in_a_bucket_ends_with_the_names_and_bytes_of_one_on_a_disk(
    in_bucket: dict[str, Any], form: str
) -> None:
    kinds = {"steps_of_a_first_build", "steps_of_an_incremental_build", "together", "lost_answer"}
    assert in_bucket[form].keys() == kinds
    for result in in_bucket[form].values():
        assert (result["rows_lost"], result["rows_doubled"], result["differing"]) == (0, 0, [])
    assert in_bucket[form]["steps_of_a_first_build"]["kills"] >= 2
    assert in_bucket[form]["together"]["kills"] >= 1
    assert max(in_bucket[form]["together"]["builders_that_encoded"]) > 1
    assert in_bucket[form]["lost_answer"]["happened"] > 5


@pytest.mark.parametrize("form", ["zarr", "webdataset"])
def test_a_build_of_shapes_whose_sizes_turn_out_wrong_ends_with_the_bytes_of_an_undisturbed_one(
    of_shapes: dict[str, Any], form: str
) -> None:
    for result in of_shapes[form].values():
        assert (result["rows_lost"], result["rows_doubled"], result["differing"]) == (0, 0, [])
    assert of_shapes[form]["steps_of_a_first_build"]["kills"] >= 2
    assert of_shapes[form]["steps_of_an_incremental_build"]["kills"] >= 2
    assert of_shapes[form]["together"]["kills"] == 1
    assert max(of_shapes[form]["together"]["builders_that_encoded"]) > 1
