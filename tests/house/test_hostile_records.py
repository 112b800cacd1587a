"""Forged manifests, commit records and plans: their names lead nowhere else, and each is refused in one message."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forgery import MANY, NOT_JSON, OUT, VALUES, resealed, set_in, use_all
from hypothesis import given
from hypothesis import strategies as st
from small_builds import build

from kcache import Cache
from kcache.build.plan import open_plan
from kcache.errors import CacheCorruptError, CacheMismatchError, KcacheError
from kcache.store.manifest import read_manifest
from kcache.store.recipe import canonical_json
from kcache.store.shards import read_commits

PLACES = {
    "data": ("tables", "latents-64", "shards", 0, "data"),
    "name": ("tables", "latents-64", "shards", 0, "name"),
    "rows": ("tables", "latents-64", "shards", 0, "rows"),
    "bytes": ("tables", "latents-64", "bytes"),
    "shards": ("tables", "latents-64", "shards"),
    "table": ("tables", "latents-64", "recipe", "table"),
    "dtype": ("tables", "latents-64", "recipe", "stored_dtype"),
    "fields": ("tables", "latents-64", "recipe", "fields"),
    "field name": ("tables", "latents-64", "recipe", "fields", 0, "name"),
    "field shape": ("tables", "latents-64", "recipe", "fields", 0, "shape"),
    "tables": ("tables",),
    "new table": ("tables", OUT),
    "samples": ("samples",),
    "samples digest": ("samples_digest",),
    "index digest": ("index_digest",),
    "rejected": ("rejected",),
    "models": ("models",),
    "model": ("models", "prior"),
}


@pytest.mark.parametrize("place", PLACES)
def test_hostile_manifests_are_refused(forged: Path, place: str) -> None:
    whole = (forged / "manifest.json").read_bytes()
    for value in VALUES:
        (forged / "manifest.json").write_bytes(whole)
        resealed(forged / "manifest.json", set_in(*PLACES[place])(value))
        if json.loads((forged / "manifest.json").read_bytes())[PLACES[place][0]] == json.loads(whole)[PLACES[place][0]]:
            continue
        with suppress(KcacheError):
            use_all(forged)
            # What can be used names nothing that lies elsewhere.
            for entry in read_manifest(forged).tables.values():
                for path in [forged / entry.recipe.directory, *(forged / shard.data for shard in entry.shards)]:
                    assert path.resolve().is_relative_to(forged.resolve())


@pytest.mark.parametrize(
    "place", ["data", "name", "field name", "samples digest", "index digest", "table", "new table"]
)
def test_names_that_lead_out_of_a_cache_are_refused(forged: Path, place: str) -> None:
    for value in (OUT, "/etc/passwd", "..", "00000/../../../x"):
        resealed(forged / "manifest.json", set_in(*PLACES[place])(value))
        with pytest.raises(CacheCorruptError, match="is damaged"):
            Cache.open(forged)


@pytest.mark.parametrize("pattern", ["manifest.json", "*/00000.json", "plans/x/plan.json"])
def test_files_that_are_not_the_right_json_are_refused(forged: Path, pattern: str) -> None:
    (forged / "plans" / "x").mkdir(parents=True)
    (forged / "plans" / "x" / "plan.json").write_bytes(b"{}")
    for content in NOT_JSON:
        for path in forged.glob(pattern):
            path.write_bytes(content)
        with pytest.raises((CacheCorruptError, CacheMismatchError)):
            use_all(forged)


COMMIT_PLACES = [
    ("name",), ("data",), ("rows",), ("files",), ("files", 0, "path"), ("files", 0, "bytes"), ("rejected",),
    ("absent",), ("provenance",), ("fingerprint",), ("schema_version",), ("surprise",),
]  # fmt: skip


@pytest.mark.parametrize("place", COMMIT_PLACES, ids=lambda place: place[-1])
def test_hostile_commit_records_are_refused(forged: Path, place: tuple[Any, ...]) -> None:
    recipe = read_manifest(forged).tables["latents-64"].recipe
    record = forged / recipe.directory / "00000.json"
    whole = record.read_bytes()
    hostile = [*VALUES, [OUT], [{"key": OUT, "stage": "s", "reason": "r"}], [{"path": OUT, "bytes": 1, "crc32c": 1}]]
    for value in hostile:
        record.write_bytes(whole)
        resealed(record, set_in(*place)(value))
        with suppress(KcacheError):
            for commit in read_commits(record.parent, recipe):
                paths = [file.path for file in commit.files] + [commit.data or "."]
                assert all((record.parent / path).resolve().is_relative_to(record.parent.resolve()) for path in paths)


@pytest.mark.parametrize("value", VALUES, ids=repr)
@pytest.mark.parametrize("place", ["rows_per_shard", "first_shard", "rows", "recipe", "table", "name"])
def test_hostile_plans_are_refused(forged: Path, built: Path, oracle: Path, place: str, value: Any) -> None:
    recipe = read_manifest(forged).tables["image_embeds"].recipe.to_json()
    table = {"recipe": recipe, "rows_per_shard": 4, "first_shard": 1, "rows": 1}
    if place in table:
        table[place] = value
    else:
        (recipe if place == "table" else recipe["fields"][0])[place] = value
    folder = forged / "plans" / "x"
    folder.mkdir(parents=True)
    np.save(folder / "image_embeds.keys.npy", np.zeros((1, 16), np.uint8))
    digest = hashlib.sha256(canonical_json(table).encode() + bytes(16)).hexdigest()
    (folder / "plan.json").write_text(json.dumps({"schema_version": 1, "digest": digest, "tables": [table]}))
    try:
        plan = open_plan(forged)
    except KcacheError:
        return
    assert plan is not None
    assert [shard.name for table in plan.tables for shard in table.shards] != []
    build(built / "pictures", forged, oracle)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(OUT),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in nested JSON."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(inner, (*path, key))


@MANY
@given(data=st.data())
def test_no_change_of_a_manifest_escapes(built: Path, data: st.DataObject, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    if not cache.exists():
        shutil.copytree(built / "cache", cache)
    manifest = json.loads((built / "cache" / "manifest.json").read_bytes())
    place = data.draw(st.sampled_from(sorted(places(manifest), key=repr)))
    value = data.draw(JSON)
    shutil.copyfile(built / "cache" / "manifest.json", cache / "manifest.json")
    with suppress(ValueError):  # NaN has no canonical form to seal
        resealed(cache / "manifest.json", set_in(*place)(value))
    with suppress(KcacheError):
        use_all(cache)
