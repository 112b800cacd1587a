"""Builds with control images: hints, masks and loss masks in the latents' own crop, never stale, and none lost."""

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from controlled import FLAGS, SHAPED, SIZES, build_controlled
from documents import ROOT, blocks_of
from PIL import Image
from small_builds import encoded

from kcache import Cache
from kcache.encoders.decoding import Decoding, decode_image
from kcache.encoders.pixels import movq_pixels
from kcache.errors import ConfigError, SourceError
from kcache.store.samples import read_refused
from kcache.upkeep.convert import convert_cache

FIELDS = ["hint_own", "hint_edges", "masks", "loss_masks", "latents"]


def refusals(cache: Path) -> dict[str, str]:
    return {each.name: each.reason for each in read_refused(cache)}


@pytest.mark.parametrize("mirrored", [False, True])
def test_rows_are_cropped_as_the_picture_behind_the_latents_is(controlled: Path, mirrored: bool) -> None:
    parts, seen = Cache.open(controlled / "cache", buckets=True).by_shape("latents"), set()
    assert len(parts) == 3
    for part in parts:
        assert part.shape is not None
        names = part.samples["name"].to_pylist()
        rows = part.read(range(len(part)), FIELDS, mirrored=np.full(len(part), mirrored))
        for name, own, edges, mask, counted in zip(names, *(rows[each] for each in FIELDS[:4]), strict=True):
            seen.add(name)
            picture = decode_image((controlled / "source" / name).with_suffix(".own.png").read_bytes(), Decoding())
            pixels = (movq_pixels(picture, part.shape) + 1) * 127.5
            turn = slice(None, None, -1 if mirrored else 1)
            assert np.abs(own[..., turn] - pixels).max() < 1e-4  # 8 bits, as MoVQ was fed them
            assert edges.shape == (1, *part.shape)
            assert counted.shape == mask.shape == (1, part.shape[0] // 8, part.shape[1] // 8)
            assert (mask == 0).any() == bool(int(name[1]) % 2)
            assert set(np.unique(mask)) <= {0, 1}
            half = counted.shape[2] // 2
            expected = [0, 255] if name == "p2.png" else [255, 255]
            sides = counted[..., turn]
            assert [sides[..., : half - 1].max(), sides[..., half + 1 :].min()] == expected
    assert len(seen) == len(SIZES)


def test_the_documented_reader_reads_both_forms(controlled: Path, tmp_path: Path) -> None:
    """That of docs/cache-format.md, which knows nothing of kcache."""
    read, look = (each for each in python_of("cache-format.md") if "class Reader" in each or "control_image" in each)
    names: dict[str, Any] = {"io": io}
    exec(read.partition("\n\n\nfor folder")[0] + "\n" + look, names)  # noqa: S102
    convert_cache(controlled / "cache", tmp_path / "tars", "webdataset")
    for folder in (controlled / "cache", tmp_path / "tars"):
        reader = names["Reader"](folder)
        for part in Cache.open(folder, buckets=True).by_shape("latents"):
            numbers, mirrored = part.held.selected, np.ones(len(part), np.bool_)
            expected = part.read(range(len(part)), FIELDS[:4], mirrored=mirrored)
            for at, number in enumerate([] if numbers is None else numbers.tolist()):
                found = reader.sample(number, 0, True)
                for field in FIELDS[:4]:
                    picture = np.asarray(names["control_image"](found, part.table_of(field), field))
                    picture = picture[None] if picture.ndim == 2 else picture.transpose(2, 0, 1)
                    assert np.array_equal(np.broadcast_to(picture, expected[field][at].shape), expected[field][at])


def python_of(document: str) -> list[str]:
    return [block.text for block in blocks_of(ROOT / "docs" / document) if block.language == "python"]


def test_a_hole_is_every_latent_with_white_in_it(controlled: Path, oracle: Path, tmp_path: Path) -> None:
    source = shutil.copytree(controlled / "source", tmp_path / "source")
    thin = Image.new("L", (128, 128))
    thin.paste(255, (5, 0, 7, 128))  # in the first column of latents of 64 pixels, a pixel wide there
    thin.save(source / "p2.hole.png")
    build_controlled(source, tmp_path / "cache", oracle)
    cache = Cache.open(tmp_path / "cache")
    [mask] = cache.read([cache.samples["name"].to_pylist().index("p2.png")], ["masks"])["masks"]
    assert (mask[0, :, 0] == 0).all()
    assert (mask[0, :, 1:] == 1).all()


@pytest.mark.parametrize("form", ["zarr", "webdataset"])
def test_they_join_a_cache_that_is_there_and_nothing_else_is_encoded(
    controlled: Path, oracle: Path, tmp_path: Path, form: str
) -> None:
    source, cache = shutil.copytree(controlled / "source", tmp_path / "source"), tmp_path / "cache"
    few: dict[str, Any] = {"format": form, "max_train_samples": 3}
    none = few | {"hint_column": (), "mask_column": None, "loss_mask_alpha": False}
    for path in source.glob("*.*.*"):  # a build that is not told of them would take them for pictures
        path.rename(tmp_path / path.name)
    build_controlled(source, cache, oracle, **none)
    before = {path: path.stat().st_mtime_ns for path in cache.glob("latents-*/**/*") if path.is_file()}
    for path in tmp_path.glob("p*.*.*"):
        path.rename(source / path.name)
    assert encoded(build_controlled(source, cache, oracle, **few)) == {
        "hint-own-64": 3, "hint-edges-64": 3, "masks-64": 2, "loss_masks-64": 4
    }  # fmt: skip
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert encoded(build_controlled(source, cache, oracle, **few)) == {}
    first = Cache.open(cache).read(range(3), FIELDS)
    # Another image under the same name is another row, and the only one that is made.
    Image.new("L", (160, 100), 77).save(source / "p0.edges.tif")
    assert encoded(build_controlled(source, cache, oracle, **few)) == {"hint-edges-64": 1}
    now = Cache.open(cache).read(range(3), FIELDS)
    assert (now["hint_edges"][0] == 77).all()
    assert all(np.array_equal(now[name][1:], first[name][1:]) for name in FIELDS)
    # And the same picture edited has all of its rows made anew.
    with Image.open(source / "p1.png") as picture:
        picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(source / "p1.png")
    assert encoded(build_controlled(source, cache, oracle, **few)) == {
        "image_embeds": 1, "latents-64": 1, "hint-own-64": 1, "hint-edges-64": 1, "masks-64": 1, "loss_masks-64": 1
    }  # fmt: skip


def test_what_cannot_be_a_row_refuses_its_picture_by_name(controlled: Path, oracle: Path, tmp_path: Path) -> None:
    source = shutil.copytree(controlled / "source", tmp_path / "source")
    (source / "p0.own.png").unlink()
    Image.new("RGB", (100, 100)).save(source / "p1.own.png")
    (source / "p2.edges.tif").write_bytes(b"no picture")
    shutil.copyfile(source / "p3.own.png", source / "p3.own.webp")
    (source / "p4.hole.png").write_bytes((source / "p1.hole.png").read_bytes()[:60])
    Image.new("L", (9, 9)).save(source / "p9.own.png")
    result = build_controlled(source, tmp_path / "cache", oracle)
    assert (result.samples, Cache.open(tmp_path / "cache").samples["name"].to_pylist()) == (1, ["p5.png"])
    found, said = refusals(tmp_path / "cache"), {
        "p0.png": "there is no 'p0.own.png' beside it, for --hint-column own=COLUMN",
        "p1.png": "its hint-own is 100×100, the picture 100×160; expected the same proportions",
        "p2.png": "its hint-edges: not an image in a known format",
        "p3.png": "'p3.own.png' and 'p3.own.webp' are both its own; expected one",
        "p4.png": "its masks: damaged or cut short",
        "p9.own.png": "an image called .own without a picture 'p9' that it goes with",
    }  # fmt: skip
    assert found.keys() == said.keys()
    assert [name for name, words in said.items() if words not in found[name]] == []


def test_greys_colours_palettes_and_what_is_transparent(oracle: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    grey = Image.fromarray(np.full((64, 64), 40_000, np.uint16))
    colour = Image.new("RGB", (64, 64), (10, 20, 30))
    clear = Image.new("LA", (64, 64), (200, 0))
    kinds = {"a": grey, "b": colour, "c": colour.quantize(2), "d": clear, "e": Image.new("1", (64, 64), 1)}
    for number, (name, hint) in enumerate(kinds.items()):
        Image.new("RGB", (64, 64), (number, 9, 9)).save(source / f"{name}.png")
        hint.save(source / f"{name}.depth.png")
    build_controlled(source, tmp_path / "cache", oracle, hint_column=("depth=depth",), mask_column=None)
    cache = Cache.open(tmp_path / "cache")
    values = [cache.read([i], ["hint_depth"])["hint_depth"][0, :, 5, 5].tolist() for i in range(5)]
    assert values == [[156], [10, 20, 30], [10, 20, 30], [0], [255]]
    assert cache.read([0, 1], ["hint_depth"])["hint_depth"][0, :, 0, 0].tolist() == [156] * 3


def test_columns_of_a_table_hold_control_images(controlled: Path, oracle: Path, tmp_path: Path) -> None:
    names = [f"p{i}" for i in range(4)]
    read = {
        column: [_bytes(controlled / "source" / f"{name}{suffix}") for name in names]
        for column, suffix in (("image", ".png"), ("conditioning_image", ".own.png"), ("hole", ".hole.png"))
    }
    rows = [{"bytes": content, "path": None} for content in read["conditioning_image"]]
    pq.write_table(pa.table(read | {"conditioning_image": rows}), tmp_path / "data.parquet")
    flags = {"hint_column": ("own=conditioning_image",), "loss_mask_alpha": False, "image_column": "image"}
    build_controlled(tmp_path / "data.parquet", tmp_path / "cache", oracle, **flags)
    build_controlled(controlled / "source", tmp_path / "other", oracle)
    one, other = (Cache.open(tmp_path / name).read(range(4), ["hint_own", "masks"]) for name in ("cache", "other"))
    assert all(np.array_equal(one[name], other[name]) for name in one)
    with pytest.raises(
        SourceError, match=r"has no column 'depth'; .* name the right one with --hint-column own=COLUMN"
    ):
        build_controlled(
            tmp_path / "data.parquet", tmp_path / "third", oracle, **flags | {"hint_column": ("own=depth",)}
        )


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hint_column": ("own=own",)}, r"rows of hint-edges, .* give --hint-column edges=COLUMN again"),
        ({"mask_column": None}, r"rows of masks, .* give --mask-column COLUMN again"),
        ({"hint_column": ("own",)}, "--hint-column is 'own'; expected NAME=COLUMN"),
        ({"hint_column": ("Own=own",)}, "--hint-column is 'Own=own'; expected NAME=COLUMN"),
        ({"hint_column": ("own=a", "own=b")}, "--hint-column names own twice"),
        ({"loss_mask_column": "counts"}, "--loss-mask-alpha with --loss-mask-column counts"),
    ],
)
def test_flags_that_are_missing_or_wrong_are_said_before_anything_is_done(
    controlled: Path, oracle: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        build_controlled(controlled / "source", controlled / "cache", oracle, **SHAPED | FLAGS | changes)
