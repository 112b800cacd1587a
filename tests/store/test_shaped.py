"""Shapes and mirrored pictures in a cache: which rows tables have, and that every sample is read with its own."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from documents import ROOT, blocks_of
from hypothesis import given
from hypothesis import strategies as st
from shaped_caches import ALL, BUCKETS, OTHERS, SIZES, row_of, write_shaped_cache

from kcache import Cache
from kcache.config.shapes import NO_SHAPE, ShapeSet, square_set
from kcache.disk.durable import json_bytes
from kcache.errors import CacheCorruptError, CacheIncompleteError, ConfigError
from kcache.store.digests import Keys, content_key, mirrored_key, mirrored_keys
from kcache.store.formats import index_files
from kcache.store.formats.columns import Sample, Samples
from kcache.store.formats.parts import PARTS, list_parts
from kcache.store.manifest import MANIFEST, read_manifest
from kcache.store.recipe import LATENTS, json_digest, shape_of, table_name
from kcache.store.shaped.joined import Joined
from kcache.store.shaped.standing import BOUNDS, ORDER, Standing, order_arrays
from kcache.store.shaped.wants import Wants, in_order

FIELDS = ["image_embeds", "latents", "text_embeds"]
SHARED = (BUCKETS, ShapeSet(72, ((48, 80), (72, 72), (80, 48)), 2.0), square_set(64))
"""Two resolutions that have two shapes in common, one beside squares."""


def samples_of(sizes: Sequence[tuple[int, int]]) -> list[Sample]:
    return [
        Sample(
            name=f"{i}.png", image_key=content_key(b"image %d" % i), captions=("a", "b"),
            caption_keys=(content_key(b"a%d" % i), content_key(b"b")), width=width, height=height,
        )
        for i, (width, height) in enumerate(sizes)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def flipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shaped") / "flipped"
    write_shaped_cache(folder, sets=ALL, flip=True)
    return folder


def test_a_mirrored_key_leads_back() -> None:
    keys = Keys.of(content_key(b"%d" % i) for i in range(9))
    assert mirrored_keys(mirrored_keys(keys)) == keys
    assert not mirrored_keys(keys).among(keys).any()
    assert list(mirrored_keys(keys)) == [mirrored_key(key) for key in keys]


@given(
    sizes=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 200)), max_size=12),
    sets=st.sampled_from([(), (BUCKETS,), ALL, SHARED, (square_set(64), square_set(32)), (OTHERS, BUCKETS)]),
    flip=st.booleans(),
)
def test_tables_want_the_rows_of_the_samples_that_have_their_shape(
    sizes: list[tuple[int, int]], sets: tuple[ShapeSet, ...], flip: bool
) -> None:
    samples, wants = samples_of(sizes), Wants(in_order(sets), flip)
    shapes = {each: each.choose(*np.array(sizes or [(1, 1)]).T) for each in sets}
    for table in ["image_embeds", "text", *(table_name(LATENTS, shape) for each in sets for shape in each.shapes)]:
        holders = [
            sample
            for i, sample in enumerate(samples)
            if shape_of(table) is None
            or any(numbers[i] >= 0 and each.shapes[numbers[i]] == shape_of(table) for each, numbers in shapes.items())
        ]
        keys = [key for s in holders for key in (s.caption_keys if table == "text" else (s.image_key,))]
        mirrored = [mirrored_key(key) for key in keys] if flip and table != "text" else []
        assert list(wants.keys(table, samples)) == keys + mirrored
        indexed = {name: list(keys) for name, keys in wants.indexed(table, samples).items()}
        reserved = list(wants.wanted(table, []))
        assert indexed == {table: keys + reserved} | (
            {f"{table}-mirrored": mirrored} if flip and table != "text" else {}
        )
        assert sorted(wants.wanted(table, samples)) == sorted(reserved + keys + mirrored)
        assert sum(wants.by_sample(table, samples), []) == [
            key
            for s in holders
            for key in (s.caption_keys if table == "text" else (s.image_key, mirrored_key(s.image_key))[: 1 + flip])
        ]
        if table != "text" and keys:
            stored = Keys.of({*keys, *mirrored} - {(mirrored or keys)[-1]})
            there = wants.are_there(table, Samples.of(samples), stored)
            assert [s for s, is_there in zip(samples, there, strict=True) if not is_there] == [holders[-1]]


def test_rows_that_are_read_together_stand_together() -> None:
    samples = samples_of(SIZES)
    wants = Wants(in_order(ALL), flip=True)
    order = list(wants.wanted("image_embeds", samples))[1:]
    assert order[1::2] == [mirrored_key(key) for key in order[::2]]
    numbers = [BUCKETS.choose(*np.array([SIZES[i]]).T)[0] for i in range(len(SIZES))]
    shapes = {sample.image_key: number for sample, number in zip(samples, numbers, strict=True)}
    assert [shapes[key] for key in order[::2]] == sorted(numbers)
    for number in range(5):
        table = table_name(LATENTS, BUCKETS.shapes[number])
        assert list(wants.wanted(table, samples)) == [
            k for k in order if shapes.get(k, shapes.get(mirrored_key(k))) == number
        ]
    assert list(Wants((square_set(64),)).wanted("latents-64", samples)) == [sample.image_key for sample in samples]


@pytest.mark.parametrize("sets", [ALL, SHARED], ids=["two resolutions", "shared shapes"])
def test_standing_says_which_samples_have_which_shape(sets: tuple[ShapeSet, ...]) -> None:
    samples = Samples.of(samples_of(SIZES * 3))
    standing = Standing(in_order(sets), order_arrays(in_order(sets), samples), len(samples))
    wants = Wants(in_order(sets))
    for each in sets:
        numbers = samples.in_shapes(each)
        assert np.array_equal(standing.numbers(each), numbers)
        assert list(standing.counts(each).values()) == [int((numbers == i).sum()) for i in range(len(each.shapes))]
        for number, shape in enumerate(each.shapes):
            table = table_name(LATENTS, shape)
            holders, expected = standing.holders(table), wants.samples_of(table, samples)
            assert (holders is None) == (expected is None)
            assert holders is None or np.array_equal(holders, expected)
            assert standing.rows(table) == (len(samples) if expected is None else len(expected))
            mine = np.flatnonzero(numbers == number)
            places = standing.places(table, mine)
            assert np.array_equal(mine if expected is None else expected[places], mine)


ASKED: list[Any] = [slice(None), slice(3, 9), np.array([6, 0, 8, 3]), [1, 2], 4, 7, "offset", np.array([], np.int64)]


@pytest.mark.parametrize("rows", ASKED, ids=str)
def test_joined_entries_are_asked_as_one_array_is(rows: Any) -> None:
    whole = np.zeros(9, [("shard", "<u4"), ("offset", "<u8")])
    whole["shard"], whole["offset"] = np.arange(9), np.arange(9) * 7
    joined = Joined(whole[:5], whole[5:])
    assert (len(joined), joined.dtype) == (9, whole.dtype)
    assert np.array_equal(joined[rows], whole[rows])


def assert_read_right(folder: Path, cache: Cache, mirrored: np.ndarray | None = None) -> None:
    """All rows of a cache or a part of one are those that stand under their samples' keys."""
    found = cache.read(np.arange(len(cache)), FIELDS, 1, mirrored=mirrored)
    is_mirrored = np.zeros(len(cache), np.bool_) if mirrored is None else mirrored
    for i, row in enumerate(cache.samples.select(["image_key", "caption_keys"]).to_pylist()):
        key = mirrored_key(row["image_key"]) if is_mirrored[i] else row["image_key"]
        for name in FIELDS:
            stored = row_of(
                folder, cache.table_of(name), cache.field(name), row["caption_keys"][1] if "text" in name else key
            )
            assert np.array_equal(found[name][i], stored), (name, i)


def test_every_part_reads_the_rows_of_its_samples(flipped: Path) -> None:
    cache = Cache.open(flipped, resolution=(32, 64))
    parts = cache.by_shape(*FIELDS)
    assert [part.shape for part in parts] == [(32, 32), *BUCKETS.shapes]
    assert [part.resolution for part in parts] == [32, 64, 64, 64, 64, 64]
    names = np.array(cache.samples["name"].to_pylist())
    numbers = BUCKETS.choose(*np.array(SIZES * 3).T)
    assert (numbers == NO_SHAPE).sum() == 6
    rng = np.random.default_rng(0)
    for part, number in zip(parts, [None, *range(5)], strict=True):
        expected = names if number is None else names[numbers == number]
        assert part.samples["name"].to_pylist() == list(expected)
        assert part.by_shape("latents") == (part,)
        assert part.field("latents").shape == (4, *(side // 8 for side in part.shape or ()))
        assert_read_right(flipped, part)
        assert_read_right(flipped, part, rng.random(len(part)) < 0.5)
    assert cache.by_shape("image_embeds", "text_embeds") == (cache,)


def test_parts_of_chosen_samples_keep_their_order(flipped: Path) -> None:
    cache = Cache.open(flipped, resolution=64, flip=False)
    chosen = cache.select([29, 3, 0, 12, 7, 0, 25, 10]).where("width != 60")
    assert not chosen.flip
    parts = chosen.by_shape("latents")
    for part in parts:
        order = [name for name in chosen.samples["name"].to_pylist() if name in part.samples["name"].to_pylist()]
        assert part.samples["name"].to_pylist() == order
        assert_read_right(flipped, part)
        assert_read_right(flipped, part.select(np.arange(len(part))[::-1]))
    assert len(chosen.having("latents")) == sum(map(len, parts)) == len(chosen) - 1


def test_reads_of_every_kind_know_the_mirrored_rows(flipped: Path) -> None:
    [part] = [part for part in Cache.open(flipped, 64).by_shape("latents") if part.shape == (64, 64)]
    rows, mirrored = np.arange(len(part)), np.arange(len(part)) % 2 == 0
    mapped = part.read(rows, FIELDS, mirrored=mirrored)
    dropped = part.read(rows, ["image_embeds"], mirrored=mirrored, drop_image=mirrored)["image_embeds"]
    zero = part.read(rows, ["image_embeds"], drop_image=np.ones(len(part), np.bool_))["image_embeds"]
    assert np.array_equal(dropped, np.where(mirrored[:, None], zero, mapped["image_embeds"]))
    before = part.resident_bytes(FIELDS)
    part.make_resident(FIELDS)
    assert part.table_length("latents") == 2 * len(part)
    assert before == sum(part._resident[name][0].nbytes for name in FIELDS)
    again = part.read(rows, FIELDS, mirrored=mirrored)
    assert all(np.array_equal(mapped[name], again[name]) for name in FIELDS)


def test_shapes_that_two_resolutions_share_are_one_table(tmp_path: Path) -> None:
    write_shaped_cache(tmp_path / "c", 20, sets=SHARED)
    cache = Cache.open(tmp_path / "c", resolution=(64, 72), buckets=None)
    with pytest.raises(ConfigError, match=r"latents of 64 and 64 in 5 shapes pixels; say which: --aspect"):
        cache.by_shape("latents")
    for resolution, buckets, shapes in [
        (72, None, SHARED[1].shapes),
        (64, True, BUCKETS.shapes),
        (64, False, ((64, 64),)),
    ]:
        parts = Cache.open(tmp_path / "c", resolution, buckets).by_shape("latents")
        assert tuple(part.shape for part in parts) == shapes
        for part in parts:
            assert_read_right(tmp_path / "c", part)
    assert [part.resolution for part in Cache.open(tmp_path / "c", (64, 72), True).by_shape("latents")] == [64] * 5 + [
        72
    ] * 3
    held = cache.of_table("latents-48x80")
    assert (held.shape, held.resolution) == ((48, 80), 64)
    assert len(cache.of_table("text")) == len(cache.of_table("latents-64")) == 20


def test_what_is_not_clear_or_not_there_is_said(flipped: Path, tmp_path: Path) -> None:
    undecided = Cache.open(flipped)
    for ask in (undecided.table_of, undecided.field, undecided.by_shape, undecided.having):
        with pytest.raises(ConfigError, match=r"latents at 32, 64 pixels; say which: --resolution"):
            ask("latents")
    with pytest.raises(ConfigError, match=r"several shapes \(64 in 5 shapes\), .*ask a part, of Cache.by_shape"):
        Cache.open(flipped, 64).read([0], ["latents"])
    assert Cache.open(flipped, 32).field("latents").shape == (4, 4, 4)
    with pytest.raises(
        CacheIncompleteError, match=r"no table latents-96; .*--resolution 32 --resolution 64 --resolution 96"
    ):
        Cache.open(flipped, [32, 96])
    with pytest.raises(
        CacheIncompleteError, match=r"asks for squares, and .* 64 in 5 shapes pixels; .*-buckets square"
    ):
        Cache.open(flipped, 64, buckets=False)
    with pytest.raises(
        CacheIncompleteError, match=r"asks for buckets, and .* has latents of 32 pixels; .*-buckets auto"
    ):
        Cache.open(flipped, 32, buckets=True)
    with pytest.raises(ConfigError, match="opened without rows of mirrored pictures"):
        Cache.open(flipped, flip=False).read([0], ["image_embeds"], mirrored=np.array([True]))
    write_shaped_cache(tmp_path / "plain", 4)
    with pytest.raises(CacheIncompleteError, match=r"no rows of mirrored pictures; run `.* --flip`"):
        Cache.open(tmp_path / "plain", flip=True)
    write_shaped_cache(tmp_path / "prior", 4, tables=("image_embeds", "text"), sets=())
    with pytest.raises(CacheIncompleteError, match="holds no 'latents'"):
        Cache.open(tmp_path / "prior").by_shape("latents")[0].read([0], ["latents"])


@pytest.mark.parametrize(
    ("sets", "flip", "more"),
    [
        ((square_set(64), square_set(32)), False, None),
        ((square_set(64),), True, {"image_embeds-mirrored", "latents-64-mirrored"}),
        ((BUCKETS,), False, {"order-64", "bounds-64"}),
    ],
    ids=["squares", "flips", "shapes"],
)
def test_only_what_is_new_needs_the_schema_that_says_it(
    tmp_path: Path, sets: tuple[ShapeSet, ...], flip: bool, more: set[str] | None
) -> None:
    manifest = write_shaped_cache(tmp_path / "c", 6, sets=sets, flip=flip)
    told = json.loads((tmp_path / "c" / MANIFEST).read_bytes())
    assert read_manifest(tmp_path / "c") == manifest
    assert manifest.shape_sets == in_order(sets)
    assert told["schema_version"] == (2 if more is None else 3)
    assert ("shapes" in told, "flip" in told) == (bool(more), bool(more))
    found = {path.stem for path in (tmp_path / "c" / manifest.index_folder).glob("*.npy")}
    assert found == {"captions", *manifest.tables, *(more or ())}


def test_the_documented_reader_reads_them(flipped: Path, tmp_path: Path) -> None:
    """That of docs/cache-format.md, which knows nothing of kcache."""
    block = next(block for block in blocks_of(ROOT / "docs" / "cache-format.md") if block.language == "python")
    names: dict[str, Any] = {}
    exec(block.text.partition("\n\n\nfor folder")[0], names)  # noqa: S102
    write_shaped_cache(tmp_path / "shared", 12, sets=SHARED)
    for folder, sets, mirrored in [(flipped, ALL, True), (tmp_path / "shared", SHARED, False)]:
        reader, whole = names["Reader"](folder), Cache.open(folder)
        for number in range(12):
            found = reader.sample(number, 1, mirrored)
            row, size = whole.samples.slice(number, 1).to_pylist()[0], np.array([SIZES[number % len(SIZES)]]).T
            shapes = {each.shapes[int(k)] for each in sets for k in each.choose(*size) if k != NO_SHAPE}
            assert {table for table, _ in found} == {"image_embeds", "text", *(table_name(LATENTS, s) for s in shapes)}
            for (table, name), value in found.items():
                field = next(f for f in whole.recipes[table].fields if f.name == name)
                key = mirrored_key(row["image_key"]) if mirrored else row["image_key"]
                if not field.ragged:
                    stored = row_of(folder, table, field, row["caption_keys"][1] if table == "text" else key)
                    assert np.array_equal(value, stored)


def test_other_shapes_are_another_cache_to_train_from(tmp_path: Path) -> None:
    manifest = write_shaped_cache(tmp_path / "c", 12)
    others = [replace(BUCKETS, max_upscale=3.0), replace(BUCKETS, max_upscale=None)]
    prints = {replace(manifest, shapes=(each,)).fingerprint for each in (BUCKETS, *others)}
    prints.add(replace(manifest, flip=True).fingerprint)
    assert len(prints) == 4
    assert manifest.fingerprint in prints


def forge(cache: Path, **changes: Any) -> None:
    """Change a manifest, with a digest that fits."""
    told = json.loads((cache / MANIFEST).read_bytes()) | changes
    told.pop("digest")
    (cache / MANIFEST).write_bytes(json_bytes(told | {"digest": json_digest(told)}))


@pytest.mark.parametrize(
    "changes",
    [
        {"shapes": []},
        {"shapes": [{"resolution": 64, "shapes": [[64, 64]], "max_upscale": 2.0}]},
        {"shapes": [{"resolution": 64, "shapes": [[96, 32], [32, 96]], "max_upscale": 2.0}]},
        {"shapes": [{"resolution": 64, "shapes": [["64", 64]], "max_upscale": None}]},
        {"shapes": 5},
        {"flip": 1},
        {"schema_version": 2},
    ],
    ids=str,
)
def test_shapes_that_cannot_be_are_noticed(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_shaped_cache(tmp_path / "c", 6)
    forge(tmp_path / "c", **changes)
    with pytest.raises(CacheCorruptError, match="damaged"):
        Cache.open(tmp_path / "c")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (f"{BOUNDS}64", np.array([0, 5, 3, 8, 8, 10])),
        (f"{BOUNDS}64", np.array([0, 99, 99, 99, 99, 99])),
        (f"{BOUNDS}64", np.array([0, 1])),
        (f"{ORDER}64", np.arange(3, dtype=np.uint32)),
        (f"{ORDER}64", np.full(8, 12, np.uint32)),
    ],
    ids=["bounds that fall", "more samples than there are", "too few bounds", "too short an order", "no such sample"],
)
@pytest.mark.parametrize("soon", [0, 64 << 20], ids=["part by part", "at once"])
def test_an_index_that_gives_samples_no_shape_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: np.ndarray, soon: int
) -> None:
    manifest = write_shaped_cache(tmp_path / "c", 10)
    folder = tmp_path / "c" / manifest.index_folder
    np.save(folder / f"{name}.npy", content)
    arrays = [path.stem for path in folder.glob("*.npy")]
    (folder / PARTS).write_bytes(list_parts(folder, sorted(arrays)))
    digest = hashlib.sha256((folder / PARTS).read_bytes()).hexdigest()
    folder.rename(tmp_path / "c" / f"index-{digest[:16]}")
    forge(tmp_path / "c", index_digest=digest)
    monkeypatch.setattr(index_files, "_SOON", soon)
    with pytest.raises(CacheCorruptError, match=f"{name}|latents"):
        Cache.open(tmp_path / "c").by_shape("latents")


def test_samples_of_each_shape_are_counted(flipped: Path) -> None:
    cache = Cache.open(str(flipped), resolution=64)
    counts = {part.shape: len(part) for part in cache.by_shape("latents")}
    assert {shape: count for shape, count in cache.held.shapes().items() if count} == counts
    assert sum(counts.values()) < len(cache)
    some = cache.select([0, 1, 2, 11, 21])
    assert {shape: count for shape, count in some.held.shapes().items() if count} == {
        (32, 96): 3,
        (64, 64): 1,
        (96, 32): 1,
    }
    [part] = [part for part in some.by_shape("latents") if part.shape == (32, 96)]
    assert part.held.shapes() == {(32, 96): 3}
    both = Cache.open(str(flipped), resolution=[32, 64])
    assert both.held.shapes() == counts | {(32, 32): len(cache)}
