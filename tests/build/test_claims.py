"""Claims: one process each, taken over from the dead alone."""

import json
import multiprocessing
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from kcache.build.claims import Patience, holder, take, turn, worker_place
from kcache.config import BuildConfig
from kcache.durable import write_json
from kcache.errors import CacheBusyError, CacheCorruptError, ConfigError
from kcache.processes import Process, is_gone, this_process


def _an_ended_process() -> Process:
    """A process that has ended and is not collected yet, so that its number cannot be given away meanwhile."""
    script = "from kcache.processes import *; print(this_process().label)"
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    label = child.stdout.readline()
    child.stdout.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    pid, started, *_ = label.split("-")
    assert int(pid) == child.pid
    child.returncode = 0  # it stays a zombie until pytest ends
    return replace(this_process(), pid=child.pid, started=started)


def test_only_the_certainly_dead_are_gone() -> None:
    here = this_process()
    assert not is_gone(here)
    assert is_gone(replace(here, started="1"))  # its number was given away
    assert is_gone(replace(here, boot="before"))
    assert is_gone(_an_ended_process())
    assert not is_gone(replace(here, host="elsewhere", boot="before", started="1"))
    assert not is_gone(replace(here, machine="namesake", boot="before"))
    assert not is_gone(replace(here, namespace="1", started="1"))


def test_a_claim_is_held_by_one_and_says_by_whom(tmp_path: Path) -> None:
    claim = tmp_path / "text-00000"
    assert take(claim) is None
    assert take(claim) == this_process()
    said = json.loads(claim.read_text())
    assert (said["pid"], said["host"]) == (os.getpid(), this_process().host)
    assert said["boot"]
    assert said["started"]


@pytest.mark.parametrize("dead", [{"started": "1"}, {"boot": "before"}, {"pid": 2**22 + 1}])
def test_the_claim_of_the_dead_is_taken_over(tmp_path: Path, dead: dict[str, object]) -> None:
    write_json(tmp_path / "claim", asdict(replace(this_process(), **dead)))
    assert take(tmp_path / "claim") is None
    assert holder(tmp_path / "claim") == this_process()


def test_the_claim_of_another_machine_is_respected_however_old(tmp_path: Path) -> None:
    other = replace(this_process(), host="elsewhere", boot="before")
    write_json(tmp_path / "claim", asdict(other))
    os.utime(tmp_path / "claim", (0, 0))
    assert take(tmp_path / "claim") == other
    with pytest.raises(CacheBusyError, match=rf"claim is held by process {os.getpid()} on elsewhere"):
        Patience(alone=True, say=print).wait(tmp_path / "claim", other)


def test_a_long_wait_names_whom_it_is_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("kcache.build.claims.POLL_SECONDS", 0.0)
    monkeypatch.setattr("kcache.build.claims.QUIET_SECONDS", 0.0)
    patience, other = Patience(alone=False, say=said.append), replace(this_process(), host="elsewhere")
    for _ in range(3):
        patience.wait(tmp_path / "claim", other)
    assert said == [f"waiting for process {os.getpid()} on elsewhere, which holds {tmp_path / 'claim'}"]


def test_a_damaged_claim_is_named(tmp_path: Path) -> None:
    (tmp_path / "claim").write_text("{}")
    with pytest.raises(CacheCorruptError, match="claim cannot be read"):
        take(tmp_path / "claim")


def _take_over(folder: Path, start: "multiprocessing.synchronize.Barrier") -> None:
    start.wait(60)
    for number in range(50):
        if take(folder / str(number)) is None:
            with (folder / f"{number}.takers").open("a") as file:
                file.write("x")


def test_of_many_who_take_over_one_gets_it(tmp_path: Path) -> None:
    for number in range(50):
        write_json(tmp_path / str(number), asdict(replace(this_process(), started="1")))
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(3)
    takers = [context.Process(target=_take_over, args=(tmp_path, start)) for _ in range(3)]
    for taker in takers:
        taker.start()
    # All live until the last is done: a claim of one that has ended may rightly be taken over.
    for taker in takers:
        taker.join(60)
    assert all(len((tmp_path / f"{number}.takers").read_text()) == 1 for number in range(50))


def test_a_turn_ends_with_its_claim(tmp_path: Path) -> None:
    with turn(tmp_path, Patience(alone=True, say=print)):
        assert [entry.name for entry in tmp_path.iterdir()] == [".turn"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("worker", "environment", "place"),
    [
        (None, {}, (0, 1)),
        ("1/3", {"RANK": "0", "WORLD_SIZE": "2"}, (1, 3)),
        (None, {"RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "5", "SLURM_NTASKS": "8"}, (1, 2)),
        (None, {"SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_TASK_COUNT": "4"}, (0, 4)),
        (None, {"SLURM_PROCID": "5", "SLURM_NTASKS": "8"}, (5, 8)),
        (None, {"RANK": "1"}, (0, 1)),
    ],
)
def test_the_place_among_the_builders(worker: str | None, environment: dict[str, str], place: tuple[int, int]) -> None:
    assert worker_place(worker, environment) == place


@pytest.mark.parametrize("worker", ["4/4", "1", "a/b", "-1/2", "0/0", ""])
def test_a_place_that_is_none_is_refused(worker: str) -> None:
    with pytest.raises(ConfigError, match="--worker"):
        BuildConfig(worker=worker)
