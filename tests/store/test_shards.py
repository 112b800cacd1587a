"""Shards: named by their content, committed once, the same on a disk and in a bucket."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kcache.build import committed
from kcache.build.joined_tars import TarWriter
from kcache.build.plan import PlannedShard
from kcache.places import Place, place_of
from kcache.places.effects import make_folder, write_bytes
from kcache.store import shards
from kcache.store.digests import ZERO_IMAGE_KEY, pack_keys
from kcache.store.formats.side_files import size_rows
from kcache.store.index import table_state
from kcache.store.recipe import RESERVED, SAMPLES, Field, Recipe, json_digest
from kcache.store.samples import Sample
from kcache.store.shards import Commit, Rejection, RowBlock, commit_shard, read_commits, record_commit

RECIPE = Recipe(
    table="image_embeds", encoder="E", weights="0" * 64, config="0" * 64, preprocess={}, compute_dtype="float32",
    batch_shape=(2, 3), stored_dtype="float16", fields=(Field(name="image_embeds", shape=(5,), ragged=False),),
)  # fmt: skip
KEYS = (b"a" * 16, b"b" * 16, ZERO_IMAGE_KEY)


@pytest.fixture(params=["disk", "bucket"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """A folder for a table in which nothing is, in either form of a place."""
    return tmp_path / "x" if request.param == "disk" else place_of(request.getfixturevalue("bucket") + "/x")


def block(value: float = 0.0) -> RowBlock:
    rows = np.full((len(KEYS), 5), value, np.float16)
    return RowBlock(keys=pack_keys(KEYS), arrays={"image_embeds": rows}, sizes=size_rows(KEYS, {}))


def commit(folder: Place, rows: RowBlock) -> Commit:
    make_folder(folder)
    return commit_shard(folder, "00000", RECIPE, rows, provenance={"device": "cpu"})


def files(folder: Place) -> dict[str, bytes]:
    """The content of all files below a folder, by their path from there."""
    if isinstance(folder, Path):
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {path.key.removeprefix(f"{folder.key}/"): path.read_bytes() for path, _ in folder.below()}


def test_names_and_bytes_are_the_same_on_a_disk_and_in_a_bucket(tmp_path: Path, bucket: str) -> None:
    commit(tmp_path / "x", block())
    commit(place_of(f"{bucket}/x"), block())
    found = files(tmp_path / "x")
    assert found == files(place_of(f"{bucket}/x"))
    record = json.loads(found.pop("00000.json"))
    behind = [[path.removeprefix(record["data"]), hashlib.sha256(found[path]).hexdigest()] for path in found]
    assert record["data"] == f"00000-{json_digest(sorted(behind))[:16]}"
    assert {file["path"]: file["bytes"] for file in record["files"]} == {path: len(found[path]) for path in found}
    assert record["schema_version"] == 2


def test_tars_are_the_same_on_a_disk_and_in_a_bucket(tmp_path: Path, bucket: str) -> None:
    commit(tmp_path / "rows" / RECIPE.directory, block())
    tables = {RECIPE.table: table_state(tmp_path / "rows", RECIPE)}
    sample = Sample(id="6161", name="a.png", image_key=KEYS[0], captions=(), caption_keys=(), width=3, height=4)
    for cache in (tmp_path / "cache", place_of(f"{bucket}/cache")):
        make_folder(cache)
        writer = TarWriter(cache, tables, {"device": "cpu"}, rows_from=tmp_path / "rows")
        for name in (RESERVED, SAMPLES):
            writer.write(name, [PlannedShard(name="00000", keys=(b"k" * 16,))], lambda keys: {keys[0]: sample})
    found = files(tmp_path / "cache")
    assert found == files(place_of(f"{bucket}/cache"))
    records = [json.loads(content) for path, content in found.items() if path.endswith(".json")]
    assert sorted(len(found) for found in [records, *(record["files"] for record in records)]) == [2, 3, 3]


def test_of_two_writers_with_other_bytes_one_wins_and_the_other_says_so(
    folder: Place, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish, others = shards.publish_shard, list[Commit]()

    def beaten(*arguments: Any) -> Any:
        """Just before this writer commits, another one does."""
        monkeypatch.setattr(shards, "publish_shard", publish)
        made = publish(*arguments)
        others.append(commit(folder, block(1.0)))
        return made

    monkeypatch.setattr(shards, "publish_shard", beaten)
    with caplog.at_level(logging.WARNING, "kcache"):
        mine = commit(folder, block())
    assert [mine] == others == read_commits(folder, RECIPE)
    [line] = caplog.messages
    assert "00000.json was committed by another builder first" in line
    assert {path.partition("/")[0].partition(".")[0] for path in files(folder)} > {"00000", mine.data}


def test_a_twin_is_not_spoken_of(folder: Place, caplog: pytest.LogCaptureFixture) -> None:
    made = commit(folder, block())
    named = {"rows": made.rows, "data": made.data, "files": made.files}
    with caplog.at_level(logging.WARNING, "kcache"):
        assert record_commit(folder, "00000", RECIPE, provenance={"device": "another"}, **named) == made
    assert caplog.messages == []


def test_rejections_take_the_next_number_where_another_writer_took_theirs(
    folder: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    rejected, seen = [Rejection(key="0" * 32, stage="decode", reason="no picture")], shards.read_commits

    def stale(*arguments: Any) -> list[Commit]:
        """What lay there before the other writer committed."""
        monkeypatch.setattr(committed, "read_commits", seen)
        found = seen(*arguments)
        commit(folder, block())
        return found

    monkeypatch.setattr(committed, "read_commits", stale)
    committed.record_rejections(folder, RECIPE, rejected, {})
    assert [(each.name, len(each.rejected)) for each in read_commits(folder, RECIPE)] == [("00000", 0), ("00001", 1)]


def test_what_a_killed_writer_left_is_written_over(folder: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_commit", killed)
        with pytest.raises(KeyboardInterrupt):
            commit(folder, block())
    left = files(folder)
    damaged = next(path for path in left if path.endswith("/c/0/0") and "image_embeds" in path)
    write_bytes(folder / damaged, left[damaged][:-1])
    commit(folder, block())
    assert {path: content for path, content in files(folder).items() if path in left} == left
    assert len(files(folder)) == len(left) + 1
