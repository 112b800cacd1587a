"""Converting by several, or with interruptions: a cache comes whole or not at all, whoever wrote it."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from in_bucket import contents, put
from small_builds import digests

import kcache.build.builder
import kcache.build.claims
from kcache import Cache
from kcache.build.joined_tars import SAMPLES
from kcache.build.plan import claims_folder, open_plan
from kcache.build.work.progress import BuildProgress
from kcache.errors import CacheMismatchError, CacheNotFoundError
from kcache.places import place_of
from kcache.store.formats.shard_files import publish_shard
from kcache.store.shards import record_commit
from kcache.upkeep.convert import convert_cache

OTHER = {"zarr": "webdataset", "webdataset": "zarr"}


@pytest.mark.parametrize("form", OTHER)
def test_an_interrupted_conversion_is_no_cache_and_is_finished(
    caches: dict[str, Path], form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert_cache(caches[form], tmp_path / "whole", OTHER[form], rows_per_shard=2)
    for plan_is_lost in (False, True, False, True):
        left = 1

        def interrupted(*arguments: object, **options: object) -> object:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return record_commit(*arguments, **options)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr("kcache.store.shards.record_commit", interrupted)
            patch.setattr("kcache.build.joined_tars.record_commit", interrupted)
            patch.setattr("kcache.build.committed.record_commit", interrupted)
            with pytest.raises(KeyboardInterrupt):
                convert_cache(caches[form], tmp_path / "new", OTHER[form], rows_per_shard=2)
        with pytest.raises(CacheNotFoundError):
            Cache.open(tmp_path / "new")
        if plan_is_lost:  # the records alone say what is there
            shutil.rmtree(tmp_path / "new" / "plans", ignore_errors=True)
    made = list[str]()

    def counted(temporary: Path, folder: Path, name: str) -> Any:
        made.append(name)
        return publish_shard(temporary, folder, name)

    monkeypatch.setattr("kcache.store.shards.publish_shard", counted)
    monkeypatch.setattr("kcache.build.joined_tars.publish_shard", counted)
    there = len(list((tmp_path / "new").glob("*/0*.json")))
    convert_cache(caches[form], tmp_path / "new", OTHER[form], rows_per_shard=2)
    assert digests(tmp_path / "new") == digests(tmp_path / "whole")
    shards = {shard.data for entry in Cache.open(tmp_path / "new").manifest.tables.values() for shard in entry.shards}
    assert (there, len(made)) == (4, len(shards) - 4)
    convert_cache(caches[form], tmp_path / "new", OTHER[form], rows_per_shard=2)
    assert digests(tmp_path / "new") == digests(tmp_path / "whole")


def test_several_write_one_cache_together(caches: dict[str, Path], tmp_path: Path) -> None:
    """Two processes at once, after one that was killed with a claim on what it had just committed."""
    convert_cache(caches["zarr"], tmp_path / "alone", "webdataset", rows_per_shard=1)
    line = "import sys; from kcache.upkeep.convert import convert_cache as c; a = sys.argv; "
    line += "c(a[1], a[2], a[3], rows_per_shard=1, worker=a[4], report=REPORT)"
    killed = line.replace("REPORT", "lambda *_: __import__('os')._exit(9)")
    arguments = [str(caches["zarr"]), str(tmp_path / "new"), "webdataset"]
    first = subprocess.run([sys.executable, "-c", killed, *arguments, "1/2"], check=False, capture_output=True)
    assert first.returncode == 9
    plan = open_plan(tmp_path / "new")
    assert plan is not None
    assert any(claims_folder(tmp_path / "new", plan).iterdir())
    together = [
        subprocess.Popen([sys.executable, "-c", line.replace("REPORT", "None"), *arguments, f"{index}/2"])
        for index in range(2)
    ]
    assert [process.wait() for process in together] == [0, 0]
    assert digests(tmp_path / "new") == digests(tmp_path / "alone")


@pytest.mark.parametrize("form", OTHER)
def test_one_that_comes_back_when_another_has_finished_harms_nothing(
    caches: dict[str, Path], form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, kept, before = tmp_path / "new", kcache.build.builder.Claims.kept, dict[str, str]()

    def suspended(claims: Any, table: Any, shard: Any) -> bool:
        monkeypatch.setattr(kcache.build.builder.Claims, "kept", kept)
        plan = open_plan(new)
        assert plan is not None
        for claim in claims_folder(new, plan).iterdir():
            claim.unlink()
        held = kcache.build.claims._held.copy()
        kcache.build.claims._held.clear()  # as in the other process
        convert_cache(caches[form], new, OTHER[form], rows_per_shard=2)
        kcache.build.claims._held.update(held)
        before.update(digests(new))
        return bool(kept(claims, table, shard))

    monkeypatch.setattr(kcache.build.builder.Claims, "kept", suspended)
    convert_cache(caches[form], new, OTHER[form], rows_per_shard=2)
    assert digests(new) == before


def test_a_folder_in_which_something_else_is_built_is_left_alone(
    caches: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("kcache.upkeep.convert.work_off", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert_cache(caches["zarr"], tmp_path / "new", "webdataset")
    before = digests(tmp_path / "new")
    with pytest.raises(CacheMismatchError, match="is being built, of other inputs or in another form"):
        convert_cache(caches["zarr"], tmp_path / "new", "zarr")
    assert digests(tmp_path / "new") == before


def test_a_signal_that_comes_last_is_not_lost(caches: dict[str, Path], tmp_path: Path) -> None:
    def report(progress: BuildProgress) -> None:
        if progress.table == SAMPLES and progress.done == progress.total:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        convert_cache(caches["zarr"], tmp_path / "new", "webdataset", report=report)
    assert len(Cache.open(tmp_path / "new")) == len(Cache.open(caches["zarr"]))


@pytest.mark.parametrize("form", OTHER)
def test_a_conversion_in_a_bucket_is_the_same(caches: dict[str, Path], form: str, tmp_path: Path, bucket: str) -> None:
    said = list[str]()
    convert_cache(caches[form], tmp_path / "new", OTHER[form], rows_per_shard=2, say=said.append)
    assert said == []  # nothing goes over the network
    old, new = str(put(caches[form], f"{bucket}/old")), f"{bucket}/new"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_cache(old, new, OTHER[form], rows_per_shard=2, report=stop, say=said.append)
    there = {path for path in contents(place_of(new)) if path.endswith(".json") and "plans" not in path}
    convert_cache(old, new, OTHER[form], rows_per_shard=2, say=said.append)
    assert contents(place_of(new)) == contents(tmp_path / "new")
    records = {path for path in contents(place_of(new)) if path.endswith(".json") and "/0" in path}
    assert set() < there < records
    size = sum(entry.bytes for entry in Cache.open(new).manifest.tables.values())
    assert [line.partition(" to copy")[2] for line in said] == [f", through this machine, from {old} to {new}"] * 2
    assert float(said[0].split()[0]) == pytest.approx(size / 1e6, abs=0.1)
