"""Caches with control images looked after: in both forms, nothing of them is lost, and what is broken is made again."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from controlled import FLAGS, build_controlled, controlled_source
from PIL import Image
from small_builds import encoded

from kcache import Cache
from kcache.config import SourceConfig
from kcache.errors import CacheIncompleteError, ConfigError, SourceError
from kcache.store.recipe import controls_of, kind_of
from kcache.upkeep.compare import compare_online
from kcache.upkeep.convert import convert_cache
from kcache.upkeep.garbage import collect_garbage
from kcache.upkeep.info import describe_cache
from kcache.upkeep.merge import merge_caches
from kcache.upkeep.repair import repair_cache
from kcache.upkeep.verify import verify_cache

FIELDS = ["hint_own", "hint_edges", "masks", "loss_masks", "latents"]
READING = SourceConfig(**FLAGS)
KINDS = ("hint-edges", "hint-own", "loss_masks", "masks")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return controlled_source(tmp_path_factory.mktemp("controlled") / "source", captions=False)


@pytest.fixture(scope="module")
def caches(source: Path, oracle: Path) -> Path:
    """One cache of `source`, in both forms: zarr, and webdataset made of it."""
    build_controlled(source, source.parent / "zarr", oracle)
    convert_cache(source.parent / "zarr", source.parent / "webdataset", "webdataset")
    return source.parent


@pytest.fixture(params=["zarr", "webdataset"])
def cache(caches: Path, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(caches / request.param, tmp_path / "cache"))


def rows(cache: Path, fields: list[str] = FIELDS) -> dict[str, Any]:
    """By field, all rows, in the order of the samples' names."""
    opened = Cache.open(cache)
    names = opened.samples["name"].to_pylist()
    read = opened.read(np.argsort(names), fields)
    return {"name": sorted(names), **{field: read[field].tolist() for field in fields}}


def break_row(cache: Path, field: str, name: str) -> None:
    """Change a byte of the row that the sample called `name` has."""
    opened = Cache.open(cache)
    entry = opened.entries(field)[opened.samples["name"].to_pylist().index(name)]
    path = opened.field_files(field).files[entry["shard"]].path
    assert isinstance(path, Path)
    content = bytearray(path.read_bytes())
    content[int(entry[field]["offset"]) + 20] ^= 1
    path.unlink()  # others may have it by a link
    path.write_bytes(content)


def test_both_forms_have_the_same_rows_and_lead_back(caches: Path, source: Path, oracle: Path, tmp_path: Path) -> None:
    convert_cache(caches / "webdataset", tmp_path / "back", "zarr")
    one, other, back = (rows(folder) for folder in (caches / "zarr", caches / "webdataset", tmp_path / "back"))
    assert one == other == back
    for folder in (caches / "webdataset", tmp_path / "back"):
        found = verify_cache(folder)
        assert (found.corrupt, found.orphaned) == (False, ())
    assert encoded(build_controlled(source, tmp_path / "back", oracle)) == {}
    assert encoded(build_controlled(source, caches / "webdataset", oracle, format="webdataset")) == {}


def test_a_changed_control_image_is_packed_anew_beside_what_was_there_and_the_old_one_goes(
    cache: Path, source: Path, oracle: Path, tmp_path: Path
) -> None:
    changed, before = shutil.copytree(source, tmp_path / "source"), rows(cache)
    Image.new("L", (160, 100), 77).save(changed / "p0.edges.tif")
    form = Cache.open(cache).manifest.format
    assert encoded(build_controlled(changed, cache, oracle, format=form)) == {"hint-edges-64": 1}
    assert describe_cache(cache)["orphaned_bytes"] > 0
    collect_garbage(cache, compact=True)
    assert describe_cache(cache)["orphaned_bytes"] == 0
    after = rows(cache)
    assert np.unique(after["hint_edges"][0]).tolist() == [77]
    after["hint_edges"][0] = before["hint_edges"][0]
    assert after == before
    assert not verify_cache(cache).corrupt


@pytest.mark.parametrize(("field", "name", "users"), [("hint_own", "p1.png", 1), ("masks", "p0.png", 4)])
def test_broken_rows_are_named_and_made_again(cache: Path, source: Path, field: str, name: str, users: int) -> None:
    before = rows(cache)
    break_row(cache, field, name)
    found = verify_cache(cache).rows
    assert ({row.field for row in found}, len(found)) == ({field}, users)
    assert name in {row.name for row in found}
    assert field != "masks" or "no mask" in {row.name for row in found}
    with pytest.raises(ConfigError, match=r"was not told where these images are now; .* --hint-column edges=COLUMN"):
        repair_cache(str(source), cache, device="cpu")
    result = repair_cache(str(source), cache, reading=READING, device="cpu")
    # In tars, each sample without a mask has a row that says so.
    assert set(result.encoded.values()) <= {1}
    assert rows(cache) == before
    assert not verify_cache(cache).corrupt


def test_a_source_without_the_image_behind_a_broken_row_changes_nothing(
    caches: Path, source: Path, tmp_path: Path
) -> None:
    cache, other = (Path(shutil.copytree(each, tmp_path / each.name)) for each in (caches / "zarr", source))
    break_row(cache, "hint_own", "p1.png")
    (other / "p1.own.png").unlink()
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    with pytest.raises(SourceError, match=r"of the hint-own behind broken rows it lacks 1, such as p1\.png"):
        repair_cache(str(other), cache, reading=READING, device="cpu")
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before


def test_merged_samples_have_the_masks_of_either_cache(cache: Path, source: Path, oracle: Path, tmp_path: Path) -> None:
    other = shutil.copytree(source, tmp_path / "source")
    for path in other.glob("*.hole.png"):
        path.unlink()
    Image.new("L", (128, 128), 255).save(other / "p2.hole.png")
    Image.new("L", (160, 100), 77).save(other / "p0.edges.tif")
    form = Cache.open(cache).manifest.format
    build_controlled(other, tmp_path / "other", oracle, format=form, max_train_samples=3)
    merge_caches(tmp_path / "merged", [tmp_path / "other", cache])
    merged, had = rows(tmp_path / "merged"), rows(cache)
    assert merged["name"] == had["name"]
    assert merged["latents"] == had["latents"]
    assert np.unique(merged["hint_edges"][0]).tolist() == [77]  # the first cache's
    assert merged["hint_edges"][1:] == had["hint_edges"][1:]
    holes = [not np.all(mask) for mask in merged["masks"]]
    assert holes == [False, True, True, True, False, True]
    assert not verify_cache(tmp_path / "merged").corrupt


def test_what_a_stage_does_not_read_is_left_behind(oracle: Path, tmp_path: Path) -> None:
    source = controlled_source(tmp_path / "source")
    build_controlled(source, tmp_path / "all", oracle, stage="all", max_train_samples=2)
    for _ in range(2):  # the second time it is there already
        for stage, controls in (("prior", ()), ("decoder", KINDS)):
            manifest = convert_cache(tmp_path / "all", tmp_path / stage, "zarr", stage=stage)  # type: ignore[arg-type]
            assert controls_of(manifest.tables) == controls
            assert not verify_cache(tmp_path / stage).corrupt
    assert Cache.open(tmp_path / "prior").samples["control_keys"].to_pylist() == [[], []]
    with pytest.raises(CacheIncompleteError, match="--hint-column own=COLUMN --loss-mask-alpha --mask-column COLUMN"):
        Cache.open(tmp_path / "decoder").read([0], ["hint_depth"])


def test_cached_equals_online_and_says_which_flags_it_lacks(caches: Path, source: Path) -> None:
    found = compare_online(str(source), caches / "zarr", 3, reading=READING, device="cpu")
    of_controls = {each.table: each.absolute for each in found if kind_of(each.table).per == "control"}
    assert of_controls == {f"{kind}-64": 0.0 for kind in KINDS}
    with pytest.raises(ConfigError, match="was not told where its hint-edges and hint-own and loss_masks and masks"):
        compare_online(str(source), caches / "zarr", 1, device="cpu")
