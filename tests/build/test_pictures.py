"""What decoding finds out about a picture is kept with its row: it is decoded once per table, and never again."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import small_builds
from photos import P3, SRGB_CURVE, Photo, exif_block, jpeg_with, matrix_profile, photos, picture, saved
from small_builds import build, digests, encoded, foretold, missing

from kcache import Cache
from kcache.config import BuildConfig
from kcache.disk.durable import json_bytes
from kcache.encoders import frozen
from kcache.encoders.decoding import Decoding, decode_image
from kcache.errors import ConfigError
from kcache.store.manifest import shard_number
from kcache.store.recorded import recorded_config
from kcache.store.shards import read_commit, record_json
from kcache.upkeep.compare import compare_online
from kcache.upkeep.repair import repair_cache
from kcache.upkeep.verify import verify_cache


@pytest.fixture(autouse=True)
def zarr_unless_both_are_asked_for(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The form of the caches here; the fixture `form` may have left another."""
    if "form" not in request.fixturenames:
        monkeypatch.setattr(small_builds, "FORM", "zarr")


def as_source(folder: Path, files: dict[str, bytes]) -> Path:
    """A folder of pictures with a caption each."""
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
        (folder / name).with_suffix(".txt").write_text(f"a picture, {name}")
    return folder


def oriented() -> dict[str, bytes]:
    """Pictures of 64 × 48 whose orientation is of several types and values, by the name that says what is right."""
    blocks = {
        "ascii-64x48": (2, 2, b"6\0"), "nine-64x48": (3, 1, b"\x09\0"), "none-64x48": (3, 0, b""),
        "short-48x64": (3, 1, b"\x06\0"), "long-48x64": (4, 1, b"\x08\0\0\0"),
        "rational-48x64": (5, 1, b"\6\0\0\0\1\0\0\0"),
    }  # fmt: skip
    return {
        f"{name}.jpg": jpeg_with(
            saved(picture(number, (64, 48)), "JPEG"), 0xE1, b"Exif\0\0" + exif_block(274, kind, count, data)
        )
        for number, (name, (kind, count, data)) in enumerate(blocks.items())
    }


def sizes(cache: Path) -> dict[str, str]:
    """WIDTHxHEIGHT by name, as the samples of a cache have it."""
    table = pq.read_table(next(cache.glob("samples-*.parquet"))).to_pydict()
    return {
        name: f"{width}x{height}"
        for name, width, height in zip(table["name"], table["width"], table["height"], strict=True)
    }


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The files that are decoded while a test runs, by whomever."""
    seen: list[bytes] = []

    def watched(content: bytes, how: Decoding) -> Any:
        seen.append(content)
        time.sleep(0.01)  # so that whoever waits for a picture is asked to stop before the next
        return decode_image(content, how)

    monkeypatch.setattr(frozen, "decode_image", watched)
    monkeypatch.setattr("kcache.encoders.decoding.decode_image", watched)
    return seen


@pytest.mark.usefixtures("form")
def test_sizes_are_those_of_the_decoded_pictures_which_are_decoded_once_a_table(
    oracle: Path, tmp_path: Path, decoded: list[bytes]
) -> None:
    source, cache = as_source(tmp_path / "source", oriented()), tmp_path / "cache"
    build(source, cache, oracle, rows_per_shard=2)
    assert all(name.removesuffix(".jpg").endswith(size) for name, size in sizes(cache).items())
    assert len(sizes(cache)) == len(decoded) // 2 == 6
    before = digests(cache)
    assert encoded(build(source, cache, oracle, rows_per_shard=2)) == {}
    assert (len(decoded), digests(cache)) == (12, before)
    assert not verify_cache(cache).corrupt


def as_before(cache: Path) -> None:
    """Make a cache what a kcache that recorded no sizes leaves when it is stopped before the manifest."""
    for path in cache.glob("*-*/*.sizes.npy"):
        path.unlink()
        record = path.with_name(f"{shard_number(path.name)}.json")
        data = record_json(read_commit(record))
        data["files"] = [file for file in data["files"] if file["path"] != path.name]
        data.pop("digest")
        record.write_bytes(json_bytes(data | {"digest": _digest(data)}))
    for path in [cache / "manifest.json", *cache.glob("samples-*.parquet")]:
        path.unlink()


def _digest(data: dict[str, Any]) -> str:
    from kcache.store.recipe import json_digest

    return json_digest(data)


def test_shards_without_sizes_are_built_on_and_their_pictures_measured_by_the_same_rule(
    oracle: Path, tmp_path: Path, decoded: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, cache = as_source(tmp_path / "source", oriented()), tmp_path / "cache"
    build(source, cache, oracle)
    finished = sizes(cache)
    as_before(cache)
    decoded.clear()

    def stop() -> None:
        if decoded:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("kcache.build.pictures.sizes.stop_here", stop)
        with pytest.raises(KeyboardInterrupt):
            build(source, cache, oracle, num_workers=1)
    assert len(decoded) < 6  # stopped between two pictures
    decoded.clear()
    (source / "nine-64x48.jpg").write_bytes(b"another content")
    result = build(source, cache, oracle)
    assert encoded(result) == {}
    assert len(decoded) == 5 + 2  # the new content is tried for both tables
    finished.pop("nine-64x48.jpg")
    assert sizes(cache) == finished
    lines = (cache / "rejected.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in lines] == ["nine-64x48.jpg"]


@pytest.mark.parametrize("damage", [b"", None])
def test_sizes_that_are_damaged_are_found_again(
    oracle: Path, tmp_path: Path, decoded: list[bytes], damage: bytes | None
) -> None:
    source, cache = as_source(tmp_path / "source", oriented()), tmp_path / "cache"
    build(source, cache, oracle)
    before = digests(cache)
    for path in cache.glob("*-*/*.sizes.npy"):
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if damage is None else damage)
    assert len(verify_cache(cache).files) == 2
    next(cache.glob("samples-*.parquet")).unlink()
    decoded.clear()
    assert encoded(build(source, cache, oracle)) == {}
    assert len(decoded) == 6
    names = {name for name in before if "sizes" not in name}
    assert {name: digest for name, digest in digests(cache).items() if name in names} == {n: before[n] for n in names}
    repair_cache(str(source), cache)
    assert not verify_cache(cache).corrupt
    assert len(decoded) == 6


def test_one_build_of_every_photo_names_or_caches_each(oracle: Path, tmp_path: Path) -> None:
    every = photos(3, damaged=60)[::3]
    source = as_source(tmp_path / "source", {photo.name: photo.content for photo in every})
    build(source, tmp_path / "cache", oracle, stage="decoder", batch_size=16)
    found = sizes(tmp_path / "cache")
    named = {json.loads(line)["name"] for line in (tmp_path / "cache" / "rejected.jsonl").read_text().splitlines()}
    assert found.keys() | named == {photo.name for photo in every}
    assert {p.name: found.get(p.name) for p in every if p.sound} == {p.name: _text(p) for p in every if p.sound}
    for photo in every:
        if not photo.sound and photo.name in found:
            assert found[photo.name] == "{}x{}".format(*decode_image(photo.content, Decoding()).size)


def _text(photo: Photo) -> str:
    assert photo.size is not None
    return f"{photo.size[0]}x{photo.size[1]}"


# ---- colours


@pytest.fixture
def colorful(tmp_path: Path) -> Path:
    """Pictures with a profile and one without."""
    files = {f"{n}.png": saved(picture(n), "PNG", icc_profile=matrix_profile(P3, SRGB_CURVE)) for n in range(3)}
    return as_source(tmp_path / "colorful", {**files, "plain.png": saved(picture(9), "PNG")})


@pytest.mark.usefixtures("form")
def test_colours_stay_what_a_cache_was_begun_with_and_are_srgb_in_a_new_one(
    oracle: Path, tmp_path: Path, colorful: Path
) -> None:
    new, before = tmp_path / "new", tmp_path / "before"
    build(colorful, new, oracle)
    build(colorful, before, oracle, color="as-is")
    assert recorded_config(Cache.open(new).manifest).color == "srgb"
    assert "color" not in Cache.open(before).recipes["latents-64"].preprocess
    for cache, given, other in ((new, "srgb", "as-is"), (before, "as-is", "srgb")):
        for color in (None, given):
            assert missing(foretold(colorful, cache, oracle, color=color)) == {}
        estimate = foretold(colorful, cache, oracle, color=other)
        assert missing(estimate) == {"image_embeds": 5, "latents-64": 4}
        assert f"preprocess.color: {given} → {other}" in estimate.tables["latents-64"].why
        # Without a manifest the folders of its tables, or tars, say it.
        (cache / "manifest.json").unlink()
        assert missing(foretold(colorful, cache, oracle)) == {}
        build(colorful, cache, oracle)
    rows = {cache.name: Cache.open(cache).read(range(4), ["latents"])["latents"] for cache in (new, before)}
    names = Cache.open(new).samples["name"].to_pylist()
    same = [bool(np.array_equal(a, b)) for a, b in zip(rows["new"], rows["before"], strict=True)]
    assert same == [name == "plain.png" for name in names]


def test_encoders_in_the_loop_and_a_repair_convert_colours_as_the_recipe_says(
    oracle: Path, tmp_path: Path, colorful: Path
) -> None:
    for color in ("srgb", "as-is"):
        cache = tmp_path / color
        build(colorful, cache, oracle, color=color)
        assert {(d.table, d.absolute) for d in compare_online(str(colorful), cache, 4, device="cpu")} == {
            ("image_embeds", 0.0), ("latents-64", 0.0), ("text", 0.0)
        }  # fmt: skip
        made_by = json.loads(next(cache.glob("latents-*/00000.json")).read_bytes())["provenance"]
        assert made_by["littlecms"][0].isdecimal()
        before = Cache.open(cache).read(range(4), ["latents"])["latents"]
        latents = next(cache.glob("latents-*/00000-*/latents/c/0/0/0/0"))
        latents.write_bytes(bytes(latents.stat().st_size))
        assert repair_cache(str(colorful), cache, device="cpu").encoded == {"latents-64": 4}
        repaired = Cache.open(cache).read(range(4), ["latents"])["latents"]
        np.testing.assert_array_equal(repaired, before)


def test_a_build_that_cannot_convert_is_refused_before_any_work(
    oracle: Path, tmp_path: Path, colorful: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kcache.encoders.color.features.check", lambda name: False)
    for color in (None, "srgb"):
        with pytest.raises(
            ConfigError, match=r"without littlecms2.*; install Pillow from its wheel, or give --color as-is"
        ):
            build(colorful, tmp_path / "cache", oracle, color=color)
    assert not (tmp_path / "cache").exists()
    build(colorful, tmp_path / "cache", oracle, color="as-is")


# ---- large pictures


def test_the_limit_of_pixels_is_the_builds_and_not_the_caches(oracle: Path, tmp_path: Path) -> None:
    source = as_source(
        tmp_path / "source", {"large.png": saved(picture(1, (80, 60)), "PNG"), "small.png": saved(picture(2), "PNG")}
    )
    cache = tmp_path / "cache"
    assert build(source, cache, oracle, max_pixels=4000).samples == 1
    assert build(source, cache, oracle, max_pixels=5000).samples == 1
    assert build(source, cache, oracle, max_pixels=5000, retry_rejected=True).samples == 2
    # What a cache has is no matter of the limit any more: a build with less, the encoders in the loop, a repair.
    assert encoded(build(source, cache, oracle, max_pixels=4000)) == {}
    assert len(Cache.open(cache)) == 2
    assert BuildConfig().max_pixels == 64_000_000
    assert len(compare_online(str(source), cache, 2, device="cpu")) == 4
    shutil.rmtree(next(cache.glob("latents-*/00001-*/")))
    assert sum(repair_cache(str(source), cache, device="cpu").encoded.values()) == 1
