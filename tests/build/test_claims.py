"""Claims: one process each, taken over from the dead alone."""

import errno
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kcache.build.claims import Patience, holder, is_mine, let_go, renewed, take, turn, worker_place
from kcache.config import BuildConfig
from kcache.disk.durable import json_bytes, remove_leftovers, write_json
from kcache.disk.leases import LEASE_SECONDS, seconds_left
from kcache.errors import CacheCorruptError, ConfigError
from kcache.places import Place, effects, leases, place_of
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


@pytest.fixture(params=["disk", "memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Where nothing is, on a disk and in buckets."""
    if request.param == "disk":
        return tmp_path
    return place_of(
        f"memory://test/{tmp_path.name}" if request.param == "memory" else request.getfixturevalue("bucket")
    )


def test_a_claim_is_held_by_one_and_says_by_whom(folder: Place) -> None:
    claim = folder / "text-00000"
    assert take(claim) is None
    assert take(claim) == this_process()
    said = json.loads(claim.read_bytes())
    assert (said["pid"], said["host"]) == (os.getpid(), this_process().host)
    assert said["boot"]
    assert said["started"]


@pytest.mark.parametrize("dead", [{"started": "1"}, {"boot": "before"}, {"pid": 2**22 + 1}])
def test_the_claim_of_the_dead_is_taken_over(folder: Place, dead: dict[str, object]) -> None:
    effects.write_json(folder / "claim", asdict(replace(this_process(), **dead)))
    assert take(folder / "claim") is None
    assert holder(folder / "claim") == this_process()


ELSEWHERE = [{"host": "elsewhere", "boot": "before"}, {"namespace": "1"}, {"machine": "namesake"}]
"""Processes of which nothing is known here: of another machine, of a container, of a host of the same name."""


def backdate(path: Path, seconds: float) -> None:
    """As if the file had last been renewed so many seconds ago."""
    (path.parent / "now").touch()
    then = (path.parent / "now").stat().st_mtime - seconds
    os.utime(path, (then, then))


@pytest.mark.parametrize("elsewhere", ELSEWHERE)
def test_the_claim_of_another_machine_is_respected_until_its_lease_runs_out(
    tmp_path: Path, elsewhere: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    claim, other = tmp_path / "claim", replace(this_process(), **elsewhere)
    write_json(claim, asdict(other))
    monkeypatch.setattr("time.time", lambda: 0.0)  # this machine's clock says nothing
    assert take(claim) == other
    backdate(claim, LEASE_SECONDS - 30)
    assert take(claim) == other
    backdate(claim, -(10**9))  # by a clock that has been put back since
    assert take(claim) == other
    assert 0 < seconds_left(claim) <= LEASE_SECONDS
    backdate(claim, LEASE_SECONDS + 30)
    assert take(claim) is None
    assert holder(claim) == this_process()


@pytest.mark.parametrize("elsewhere", ELSEWHERE)
def test_in_a_bucket_a_lease_runs_from_when_it_was_last_seen_to_change(
    bucket: str, elsewhere: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    claim, other = place_of(bucket) / "claim", replace(this_process(), **elsewhere)
    said, now = asdict(other) | {"token": "theirs"}, 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    effects.write_json(claim, said)
    assert take(claim) == other
    now += leases.BUCKET_SECONDS - 1
    assert take(claim) == other
    leases.renew(claim, said)  # as its holder does
    now += 1
    assert take(claim) == other
    now += leases.BUCKET_SECONDS - 1
    assert take(claim) == other
    now += 1
    assert take(claim) is None
    assert holder(claim) == this_process()
    leases.renew(claim, said)  # by the one that was only suspended
    assert is_mine(claim)


def test_a_claim_that_is_renewed_meanwhile_is_not_taken_over(folder: Place) -> None:
    claim, said = folder / "claim", asdict(replace(this_process(), host="elsewhere"))

    def gives_up(_: Place, found: Process) -> bool:
        if renewals:
            effects.write_json(claim, said | {"renewed": renewals.pop()})
            return True
        return False

    effects.write_json(claim, said)
    renewals = [2, 1]
    assert take(claim, gives_up) == replace(this_process(), host="elsewhere")
    assert json.loads(claim.read_bytes()) == said | {"renewed": 2}


def test_one_that_follows_a_process_with_its_number_does_not_hold_what_that_held(folder: Place) -> None:
    claim = folder / "claim"
    effects.write_json(claim, asdict(this_process()) | {"token": "before"})
    assert not is_mine(claim)
    assert take(claim) is None
    assert is_mine(claim)
    effects.write_json(claim, asdict(this_process()) | {"token": "after"})
    assert not is_mine(claim)
    let_go(claim)
    assert claim.exists()


def test_a_process_that_runs_here_keeps_its_claim_however_old(tmp_path: Path) -> None:
    assert take(tmp_path / "claim") is None
    backdate(tmp_path / "claim", 10 * LEASE_SECONDS)
    assert take(tmp_path / "claim", lambda *_: True) == this_process()


def test_leases_are_renewed_while_a_builder_works_and_only_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, lost = tmp_path / "mine", tmp_path / "lost"
    assert take(mine) is take(lost) is None
    write_json(lost, asdict(replace(this_process(), host="elsewhere")))
    for claim in (mine, lost):
        backdate(claim, 500)
    monkeypatch.setattr("kcache.build.claims.RENEW_SECONDS", 0.001)
    with renewed():
        while seconds_left(mine) < LEASE_SECONDS - 400:
            pass
    assert seconds_left(lost) < LEASE_SECONDS - 400
    assert (is_mine(mine), is_mine(lost)) == (True, False)
    let_go(mine)
    let_go(lost)
    assert (mine.exists(), lost.exists()) == (False, True)


def test_in_a_bucket_leases_are_renewed_by_what_changes_and_given_back(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, lost = place_of(bucket) / "mine", place_of(bucket) / "lost"
    assert take(mine) is take(lost) is None
    theirs = json_bytes(asdict(replace(this_process(), host="elsewhere")))
    effects.write_bytes(lost, theirs)
    monkeypatch.setattr("kcache.build.claims.RENEW_SECONDS", 0.001)
    seen = {mine.read_bytes()}
    with renewed():
        while len(seen) < 4:
            seen.add(mine.read_bytes())
    assert lost.read_bytes() == theirs
    assert (is_mine(mine), is_mine(lost)) == (True, False)
    let_go(mine)
    let_go(lost)
    assert (mine.exists(), lost.exists()) == (False, True)


def test_take_over_does_not_wait_and_says_so_once(folder: Place) -> None:
    said: list[str] = []
    other = replace(this_process(), host="pod-a")
    for name in ("text-00000", "text-00001"):
        effects.write_json(folder / name, asdict(other))
        assert take(folder / name, Patience(say=said.append).gives_up) == other
    patience = Patience(say=said.append, take_over=True)
    assert [take(folder / name, patience.gives_up) for name in ("text-00000", "text-00001")] == [None, None]
    assert said == [f"taking over what process {os.getpid()} on pod-a left unfinished, as --take-over says"]


def test_a_long_wait_names_all_whom_it_is_for_and_how_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("kcache.build.claims.POLL_SECONDS", 0.0)
    monkeypatch.setattr("kcache.build.claims.QUIET_SECONDS", 0.0)
    far, near = replace(this_process(), host="elsewhere"), replace(this_process(), pid=7)
    held = {tmp_path / "a": far, tmp_path / "b": near, tmp_path / "c": far}
    for claim, process in held.items():
        write_json(claim, asdict(process))
    backdate(tmp_path / "c", 300)
    patience = Patience(say=said.append)
    for _ in range(3):
        patience.wait(held)
    [message] = said
    assert f"process {os.getpid()} on elsewhere, which holds a, c in {tmp_path}; nothing is known of it here" in message
    assert "its lease has to run out, in 15 min unless it renews it; if it has ended, --take-over takes" in message
    assert f"process 7 on {near.host}, which holds b in {tmp_path}" in message


def test_where_there_are_no_locks_claims_are_taken_over_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    write_json(tmp_path / "claim", asdict(replace(this_process(), started="1")))
    monkeypatch.setattr("fcntl.flock", refuse)
    assert take(tmp_path / "claim") is None


def test_what_a_writer_elsewhere_left_goes_when_its_lease_has_run_out(tmp_path: Path) -> None:
    label = replace(this_process(), host="pod-a").label
    old, new = tmp_path / f".tmp-01-{label}", tmp_path / f".tmp-02-{label}"
    for folder in (old, new):
        folder.mkdir()
        (folder / "part").write_bytes(b"half a shard")
    backdate(old / "part", 2 * LEASE_SECONDS)
    (old / "now").unlink(missing_ok=True)
    backdate(new / "part", -(10**9))
    for folder in (old, new):
        backdate(folder, 2 * LEASE_SECONDS)
    remove_leftovers(tmp_path)
    assert (old.exists(), new.exists()) == (False, True)


@pytest.mark.parametrize("content", [b"{}", b"[]", b"null", b"{", b"\xff"])
def test_a_damaged_claim_is_named(folder: Place, content: bytes) -> None:
    effects.write_bytes(folder / "claim", content)
    with pytest.raises(CacheCorruptError, match="claim cannot be read"):
        take(folder / "claim")


def _take_over(url: str, takers: Path, start: "multiprocessing.synchronize.Barrier") -> None:
    start.wait(60)
    for number in range(50):
        if take(place_of(url) / str(number)) is None:
            with (takers / f"{number}.takers").open("a") as file:
                file.write("x")
    start.wait(60)  # all live until the last is done: a claim of one that has ended may rightly be taken over


@pytest.mark.parametrize("kind", ["disk", "bucket"])
def test_of_many_who_take_over_one_gets_it(request: pytest.FixtureRequest, kind: str, tmp_path: Path) -> None:
    url = str(tmp_path) if kind == "disk" else request.getfixturevalue("bucket")
    for number in range(50):
        effects.write_json(place_of(url) / str(number), asdict(replace(this_process(), started="1")))
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(3)
    takers = [context.Process(target=_take_over, args=(url, tmp_path, start)) for _ in range(3)]
    for taker in takers:
        taker.start()
    for taker in takers:
        taker.join(60)
    assert all(len((tmp_path / f"{number}.takers").read_text()) == 1 for number in range(50))


def test_a_turn_ends_with_its_claim(folder: Place) -> None:
    with turn(folder, Patience(say=print)):
        assert [entry.name for entry in folder.iterdir()] == [".turn"]
    assert list(folder.iterdir()) == []


def test_the_longer_a_wait_the_more_seldom_it_is_looked(folder: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    effects.write_json(folder / ".turn", asdict(replace(this_process(), host="elsewhere")))
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 40:
            effects.remove(folder / ".turn")

    monkeypatch.setattr("kcache.build.claims.time.sleep", sleep)
    with turn(folder, Patience(say=print)):
        pass
    assert pauses == sorted(pauses)
    assert (len(pauses), pauses[0], pauses[-1]) == (40, 0.1, 2.0)


@pytest.mark.parametrize(
    ("worker", "environment", "place"),
    [
        (None, {}, (0, 1)),
        ("1/3", {"RANK": "0", "WORLD_SIZE": "2"}, (1, 3)),
        (None, {"RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "5", "SLURM_NTASKS": "8"}, (1, 2)),
        (None, {"SLURM_PROCID": "5", "SLURM_NTASKS": "8"}, (5, 8)),
        (None, {"RANK": "1"}, (0, 1)),
        (None, {"SLURM_ARRAY_TASK_ID": "1"}, (0, 1)),
    ],
)
def test_the_place_among_the_builders(worker: str | None, environment: dict[str, str], place: tuple[int, int]) -> None:
    assert worker_place(worker, environment) == place


def _of_array(ids: Sequence[int], step: int) -> list[dict[str, str]]:
    """What Slurm 22.05 tells each job of an array with these numbers, `step` being one that its text names, else 1."""
    said = {"MIN": min(ids), "MAX": max(ids), "COUNT": len(ids), "STEP": step}
    return [{f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in {**said, "ID": i}.items()} for i in ids]


@pytest.mark.parametrize(
    ("ids", "step", "places"),
    [
        ([1, 2, 3, 4], 1, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ([1, 5, 9], 4, [(0, 3), (1, 3), (2, 3)]),
        ([6], 1, [(0, 1)]),
        ([3, 7], 1, [(0, 5), (4, 5)]),  # --array=3,7: modulo the number of jobs they would be one
        ([0, 3, 8], 4, [(0, 3), (3, 9), (2, 3)]),  # --array=0,3-3:4,8
    ],
)
def test_the_place_in_an_array_of_jobs(ids: list[int], step: int, places: list[tuple[int, int]]) -> None:
    assert [worker_place(None, environment) for environment in _of_array(ids, step)] == places


@settings(deadline=None)
@given(st.sets(st.integers(0, 60), min_size=1, max_size=20), st.integers(1, 9), st.integers(1, 4), st.booleans())
def test_no_two_processes_of_an_array_have_one_place(ids: set[int], step: int, processes: int, launched: bool) -> None:
    names = ("RANK", "WORLD_SIZE") if launched else ("SLURM_PROCID", "SLURM_NTASKS")
    places = [
        worker_place(None, {**job, names[0]: str(process), names[1]: str(processes)})
        for job in _of_array(sorted(ids), step)
        for process in range(processes)
    ]
    assert len(set(places)) == len(ids) * processes
    assert all(0 <= place < count for place, count in places)


@settings(deadline=None)
@given(st.integers(0, 99), st.integers(1, 9), st.integers(1, 20), st.integers(1, 4))
def test_the_places_of_an_even_array_are_counted_without_gaps(first: int, step: int, jobs: int, tasks: int) -> None:
    places = [
        worker_place(None, {**job, "SLURM_PROCID": str(task), "SLURM_NTASKS": str(tasks)})
        for job in _of_array(range(first, first + jobs * step, step), step)
        for task in range(tasks)
    ]
    assert places == [(place, jobs * tasks) for place in range(jobs * tasks)]


@pytest.mark.parametrize("worker", ["4/4", "1", "a/b", "-1/2", "0/0", ""])
def test_a_place_that_is_none_is_refused(worker: str) -> None:
    with pytest.raises(ConfigError, match="--worker"):
        BuildConfig(worker=worker)
