"""Upkeep of caches of shapes, several resolutions and mirrored pictures: no row is lost, none is called broken."""

import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bucketed_builds import bucketed_source, build_bucketed
from shaped_caches import ALL, BUCKETS, SIZES, write_shaped_cache

from kcache.build.dataset_card import CARD
from kcache.config.shapes import ShapeSet
from kcache.errors import CacheMismatchError
from kcache.store.cache import Cache
from kcache.store.formats import format_of
from kcache.store.index import CAPTION_BOUNDS, open_index
from kcache.store.manifest import read_manifest
from kcache.store.recipe import kind_of
from kcache.store.rows import field_files, gather
from kcache.upkeep.compare import compare_online
from kcache.upkeep.convert import convert_cache
from kcache.upkeep.garbage import collect_garbage
from kcache.upkeep.info import describe_cache
from kcache.upkeep.merge import merge_caches
from kcache.upkeep.repair import repair_cache
from kcache.upkeep.verify import verify_cache


def rows_of(cache: Path) -> dict[str, list[bytes]]:
    """Every row that the index leads to, by index array and field, checked as it is read."""
    manifest, rows = read_manifest(cache), dict[str, list[bytes]]()
    index = open_index(cache, manifest)
    assert CAPTION_BOUNDS in index
    for table, entry in manifest.tables.items():
        for name in manifest.wants.arrays(table):
            entries = np.asarray(index[name][: len(index[name])])
            for field in entry.recipe.fields:
                files = field_files(cache, field, np.dtype(entry.recipe.stored_dtype), entry.shards)
                found = [gather(files, entries[i : i + 1], np.empty)[0] for i in range(len(entries))]
                rows[f"{name} {field.name}"] = [array.tobytes() for array in found]
    return rows


def is_sound(cache: Path) -> bool:
    result = verify_cache(cache)
    return not result.corrupt and not result.orphaned


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 samples in five shapes and squares of another resolution, with mirrored pictures."""
    folder = tmp_path_factory.mktemp("shaped") / "cache"
    write_shaped_cache(folder, sets=ALL, flip=True)
    return folder


def test_both_ways_of_conversion_keep_every_row(cache: Path, tmp_path: Path) -> None:
    expected = rows_of(cache)
    convert_cache(cache, tmp_path / "tars", "webdataset", rows_per_shard=7)
    convert_cache(tmp_path / "tars", tmp_path / "zarr", "zarr")
    assert '- name: "latents-48x80.1.npy"' in (tmp_path / "tars" / CARD).read_text()
    for each in (cache, tmp_path / "tars", tmp_path / "zarr"):
        assert rows_of(each) == expected
        assert is_sound(each)
        assert "height × width: 32×96, 48×80, 64×64, 80×48, 96×32; none" in (each / CARD).read_text()
        assert "rows of the mirrored pictures" in (each / CARD).read_text()
        assert read_manifest(each).fingerprint == read_manifest(cache).fingerprint


@pytest.mark.parametrize("resolution", [32, 64])
def test_one_resolution_is_converted_with_all_its_shapes(cache: Path, tmp_path: Path, resolution: int) -> None:
    convert_cache(cache, tmp_path / "new", "zarr", resolution=(resolution,))
    manifest = read_manifest(tmp_path / "new")
    assert manifest.shape_sets == tuple(each for each in ALL if each.resolution == resolution)
    assert manifest.flip
    assert is_sound(tmp_path / "new")
    kept = rows_of(tmp_path / "new")
    assert kept == {name: rows for name, rows in rows_of(cache).items() if name in kept}
    assert len([name for name in kept if name.startswith("latents")]) == (2 if resolution == 32 else 10)


@pytest.mark.parametrize("form", ["zarr", "webdataset"])
def test_equal_shapes_are_merged_and_compacted_with_mirrored_rows(cache: Path, tmp_path: Path, form: str) -> None:
    more = tmp_path / "more"
    write_shaped_cache(more, 36, sets=ALL, flip=True)  # 30 of them are the cache's
    parts = [cache, more]
    if form == "webdataset":
        parts = [tmp_path / "tars0", tmp_path / "tars1"]
        for old, new in zip((cache, more), parts, strict=True):
            convert_cache(old, new, form, rows_per_shard=7)
    merged = tmp_path / "merged"
    merge_caches(merged, parts)
    first, second, found = rows_of(cache), rows_of(more), rows_of(merged)
    for name, rows in found.items():
        assert len(rows) == len(second[name])
        assert set(rows) <= {*first[name], *second[name]}
    garbage = collect_garbage(merged, dry_run=True)
    assert garbage.unused_bytes or garbage.paths
    collect_garbage(merged, compact=True)
    assert collect_garbage(merged, dry_run=True).unused_bytes == 0
    assert rows_of(merged) == found
    assert is_sound(merged)


@pytest.mark.parametrize("form", ["zarr", "webdataset"])
def test_shapes_that_no_picture_has_are_merged_and_cleared(tmp_path: Path, form: str) -> None:
    sets, parts = (ShapeSet(64, ((16, 256), *BUCKETS.shapes), 2.0),), [tmp_path / "one", tmp_path / "two"]
    for samples, part in zip((6, 9), parts, strict=True):
        write_shaped_cache(tmp_path / f"zarr{samples}", samples, sets=sets)
        convert_cache(tmp_path / f"zarr{samples}", part, form)
    assert read_manifest(parts[0]).tables["latents-16x256"].rows == 0
    merge_caches(tmp_path / "new", parts)
    found, (first, second) = rows_of(tmp_path / "new"), map(rows_of, parts)
    for name, rows in found.items():  # those of the first are among those of the second
        assert len(rows) == len(second[name])
        assert set(rows) <= {*first[name], *second[name]}
    collect_garbage(tmp_path / "new", compact=True)
    assert rows_of(tmp_path / "new") == found
    assert is_sound(tmp_path / "new")


def test_other_shapes_are_not_merged(cache: Path, tmp_path: Path) -> None:
    other = ShapeSet(BUCKETS.resolution, BUCKETS.shapes, 3.0)
    write_shaped_cache(tmp_path / "other", sets=(ALL[0], other), flip=False)
    text = r"shapes: 32 and 64 as .*up to 3 times → 32 and 64 .*up to 2 times; flip: False → True; .* or both"
    with pytest.raises(CacheMismatchError, match=text):
        merge_caches(tmp_path / "new", [cache, tmp_path / "other"])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("table", ["image_embeds", "latents-48x80"])
@pytest.mark.parametrize("mirrored", [False, True])
def test_only_the_broken_row_is_encoded_again(bucketed: Path, tmp_path: Path, table: str, mirrored: bool) -> None:
    cache = Path(shutil.copytree(bucketed / "cache", tmp_path / "cache"))
    expected, manifest = rows_of(cache), read_manifest(cache)
    entry = manifest.tables[table]
    array = manifest.wants.arrays(table)[mirrored]
    [field] = entry.recipe.fields
    broken = open_index(cache, manifest)[array][1]
    data = entry.shards[int(broken["shard"])].data
    with (cache / format_of(data).field_file(data, field)).open("r+b") as file:
        file.seek(int(broken[field.name]["offset"]))
        value = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([value[0] ^ 1]))
    [row] = verify_cache(cache).rows
    held = Cache.open(bucketed / "cache").of_table(table).samples
    assert (row.table, row.field, row.mirrored) == (table, field.name, mirrored)
    assert (row.sample, row.name) == (held["id"][1].as_py(), held["name"][1].as_py())
    result = repair_cache(str(bucketed / "source"), cache, device="cpu")
    assert dict(result.encoded) == {table: 1}
    assert rows_of(cache) == expected
    assert read_manifest(cache).fingerprint == manifest.fingerprint


@pytest.mark.parametrize("member", ["latents-48x80.1.npy", "image_embeds.npy", ""])
def test_a_tar_of_shapes_is_mended_in_all_its_rows(bucketed: Path, tmp_path: Path, member: str) -> None:
    """A bit of a mirrored or of a plain row is flipped, or the whole tar gone."""
    cache = tmp_path / "cache"
    convert_cache(bucketed / "cache", cache, "webdataset", rows_per_shard=4)
    expected, fingerprint = rows_of(cache), read_manifest(cache).fingerprint
    tar = next(path for path in sorted(cache.glob("samples-*/*.tar")) if member.encode() in path.read_bytes())
    if member:
        with tarfile.open(tar) as opened:
            place = next(each for each in opened if each.name.endswith(f".{member}"))
        with tar.open("r+b") as file:
            file.seek(place.offset_data + place.size - 1)
            value = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([value[0] ^ 1]))
    else:
        tar.unlink()
    assert not is_sound(cache)
    repair_cache(str(bucketed / "source"), cache, device="cpu")
    assert rows_of(cache) == expected
    assert is_sound(cache)
    assert read_manifest(cache).fingerprint == fingerprint


@pytest.mark.parametrize("form", ["zarr", "webdataset"])
def test_what_a_replaced_list_of_shapes_left_is_garbage_and_nothing_else(
    oracle: Path, tmp_path: Path, form: str
) -> None:
    source, cache = bucketed_source(tmp_path / "source"), tmp_path / "cache"
    build_bucketed(source, cache, oracle, format=form)
    build_bucketed(source, cache, oracle, format=form, aspect_ratio_buckets="32,96;64,64;96,32")
    expected = rows_of(cache)
    assert not [name for name in read_manifest(cache).tables if "48x80" in name]
    garbage = collect_garbage(cache)
    assert garbage.bytes > 0
    if form == "zarr":
        assert {path for path in garbage.paths if "latents-48x80" in path or "latents-80x48" in path}
    assert not list(cache.glob("latents-48x80*"))
    assert not list(cache.glob("latents-80x48*"))
    assert rows_of(cache) == expected
    assert is_sound(cache)
    assert collect_garbage(cache, dry_run=True).paths == ()


def test_rows_of_all_shapes_are_compared_as_they_are_and_mirrored(bucketed: Path) -> None:
    found = {each.table: each for each in compare_online(str(bucketed / "source"), bucketed / "cache", 3, device="cpu")}
    assert {each.absolute for each in found.values()} == {0.0}
    assert found.keys() == read_manifest(bucketed / "cache").tables.keys()  # none of the rare shapes is left out
    assert (found["image_embeds"].rows, found["latents-32"].rows, found["text"].rows) == (6, 6, 3)
    assert all(each.rows % 2 == 0 and each.rows for each in found.values() if kind_of(each.table).sided)


def test_info_counts_shapes_and_what_is_cropped_away(
    tmp_path: Path, kcache_command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    write_shaped_cache(cache, sets=ALL, flip=True, tables=("image_embeds", "latents"))
    about = describe_cache(cache)
    squares, shapes = about["shapes"]
    assert (about["flip"], about["resolutions"]) == (True, [32, 64])
    assert (squares["samples"], squares["too_small"], squares["max_upscale"]) == ({"32x32": 30}, 0, None)
    assert squares["cropped"] == squares["cropped_by_squares"]
    # Each of ten sizes three times: 20 by 20 and 33 by 31 pixels are too small.
    assert (shapes["name"], shapes["too_small"]) == ("64 in 5 shapes", 6)
    known = [size for size in SIZES if size not in ((20, 20), (33, 31))]
    shares = [max(min(w * b, h * a) / max(w * b, h * a) for b, a in BUCKETS.shapes) for w, h in known]
    assert shapes["cropped"] == pytest.approx(1 - sum(shares) / len(shares), abs=1e-6)
    by_squares = [min(size) / max(size) for size in known]
    assert shapes["cropped_by_squares"] == pytest.approx(1 - sum(by_squares) / len(by_squares), abs=1e-6)
    assert sum(shapes["samples"].values()) == 24
    for shape, count in shapes["samples"].items():
        tall, wide = map(int, shape.split("x"))
        table = "latents-64" if tall == wide else f"latents-{shape}"
        assert len(Cache.open(cache, 64).of_table(table)) == count
    assert kcache_command("cache-info", str(cache)) == 0
    said = capsys.readouterr().out
    assert "6 pictures too small, enlarged up to 2 times" in said
    assert f"squares would take {shapes['cropped_by_squares']:.1%}" in said
    assert f"{shapes['samples']['96x32']} of 96x32" in said
