"""Builds of shapes, several resolutions and mirrored pictures: what is encoded, into which tables, and how it moves."""

import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_builds
import torch
from bucketed_builds import BUCKETED, SHAPES, SIZES, bucketed_source
from diffusers import VQModel
from photos import picture, saved
from PIL import Image
from small_builds import build, digests, encoded, foretold, small_config

from kcache import Cache
from kcache.build.build import build_cache, checked_survey, complete
from kcache.build.builder import Builder
from kcache.build.claims import Patience
from kcache.build.pictures.asked import wanted
from kcache.build.pictures.remembered import remember, remembered
from kcache.build.pictures.sizes import PictureSizes, resized
from kcache.build.plan import open_plan, unfinished
from kcache.build.survey import Survey
from kcache.config import unheard
from kcache.config.shapes import ShapeSet, parse_shapes, square_set
from kcache.encoders import decoding, frozen
from kcache.errors import ConfigError
from kcache.store.digests import Keys, content_key, mirrored_key
from kcache.store.formats.side_files import SIZES as SIZES_OF
from kcache.store.index import table_state
from kcache.store.manifest import read_manifest
from kcache.store.rows import field_files, gather
from kcache.store.samples import read_refused
from kcache.store.shaped.wants import Wants


@pytest.fixture(autouse=True)
def of_zarr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_builds, "FORM", "zarr")


def rows_of(cache: Path, table: str) -> dict[bytes, np.ndarray]:
    """All rows of a table by key, whoever uses them."""
    recipe = read_manifest(cache).tables[table].recipe
    stored = table_state(cache, recipe).stored
    [field] = recipe.fields
    files = field_files(cache, field, np.dtype(recipe.stored_dtype), stored.shards)
    entries = stored.entries[stored.find(stored.known)]
    return dict(zip(stored.known, gather(files, entries, np.empty)[0], strict=True))


def shapes_kept(width: int, height: int) -> tuple[int, int]:
    """Height and width of the shape that keeps most of a picture, by the words of docs/shapes.md."""
    shapes = [(32, 96), (48, 80), (64, 64), (80, 48), (96, 32)]
    return max(shapes, key=lambda s: min(width * s[0], height * s[1]) / max(width * s[0], height * s[1]))


@torch.inference_mode()
def test_rows_are_what_an_independent_encoding_gives(bucketed: Path, oracle: Path) -> None:
    movq = VQModel.from_pretrained(oracle / "decoder" / "movq")
    rows = {
        name: rows_of(bucketed / "cache", name) for name in read_manifest(bucketed / "cache").tables if "lat" in name
    }
    assert sum(map(len, rows.values())) == 4 * len(SIZES)
    for path in sorted((bucketed / "source").glob("*.png")):
        key, whole = content_key(path.read_bytes()), Image.open(path).convert("RGB")
        flipped = Image.fromarray(np.asarray(whole)[:, ::-1])
        for own, image in ((key, whole), (mirrored_key(key), flipped)):
            for height, width in ((32, 32), shapes_kept(*whole.size)):
                box_width = min(whole.width, int(whole.height * width / height + 0.5))
                box_height = min(whole.height, int(whole.width * height / width + 0.5))
                left, top = (whole.width - box_width) / 2, (whole.height - box_height) / 2
                cut = image.crop((left, top, left + box_width, top + box_height))
                small = cut.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=1)
                pixels = torch.from_numpy(np.array(small, np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
                name = f"latents-{height}" if height == width else f"latents-{height}x{width}"
                found = torch.from_numpy(rows[name][own])
                torch.testing.assert_close(found, movq.encode(pixels).latents[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", ["zarr", "webdataset"])
def test_what_squares_have_is_taken_over_and_another_list_encodes_only_what_moves(
    tmp_path: Path, oracle: Path, form: str
) -> None:
    source = bucketed_source(tmp_path / "source", SIZES[:8])
    changes: dict[str, Any] = {"format": form, "rows_per_shard": 4}
    build(source, tmp_path / "cache", oracle, **changes)
    buckets = build(source, tmp_path / "cache", oracle, **(BUCKETED | changes | {"flip": None}))
    assert encoded(buckets) == {"latents-32x96": 1, "latents-48x80": 2, "latents-80x48": 2, "latents-96x32": 1}
    manifest = read_manifest(tmp_path / "cache")
    assert [each.is_square for each in manifest.shape_sets] == [True, False]
    # The pictures of the shape that goes move into the next best, and nothing else does.
    fewer = build(source, tmp_path / "cache", oracle, aspect_ratio_buckets="48,80;64,64;80,48;96,32", **changes)
    assert encoded(fewer) == {"latents-48x80": 1}
    assert any("5 shapes → 4, 1 of them not any more (32,96); their rows stay" in note for note in fewer.notes)
    again = build(source, tmp_path / "cache", oracle, resolution=(), **changes)
    assert (encoded(again), again.samples) == ({}, 8)
    cache = Cache.open(tmp_path / "cache", resolution=64, buckets=True)
    assert {part.shape: len(part) for part in cache.by_shape("latents")} == {
        (48, 80): 3, (64, 64): 2, (80, 48): 2, (96, 32): 1
    }  # fmt: skip


@pytest.mark.parametrize("form", ["zarr", "webdataset"])
def test_pictures_that_are_too_small_are_named_until_the_limit_lets_them_in(
    tmp_path: Path, oracle: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small_builds, "FORM", form)
    source = bucketed_source(tmp_path / "source", ((96, 64), (20, 20), (20, 31)))
    two = build(source, tmp_path / "cache", oracle, **(BUCKETED | {"flip": None}))
    assert (two.samples, two.rejected) == (1, 2)
    assert {refusal.name: refusal.stage for refusal in read_refused(tmp_path / "cache")} == {
        "01.png": "shape", "02.png": "shape"
    }  # fmt: skip
    four = build(source, tmp_path / "cache", oracle, resolution=(), max_upscale=4.0)
    assert (four.samples, four.rejected) == (3, 0)
    assert encoded(four) == {"image_embeds": 2, "text": 2, "latents-64": 1, "latents-80x48": 1}
    # The tables stay the same, and so do the names of the tars' samples: rows are added to these, and left out again.
    for flip, images in ((True, 3), (False, 0)):
        again = build(source, tmp_path / "cache", oracle, resolution=(), flip=flip)
        assert (again.samples, again.rejected, encoded(again).get("image_embeds", 0)) == (3, 0, images)
        assert read_manifest(tmp_path / "cache").flip == flip


@pytest.mark.parametrize("form", ["zarr", "webdataset"])
def test_another_builder_takes_the_sizes_over_that_one_has_found_meanwhile(
    tmp_path: Path, oracle: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was told other sizes by the headers, before the first builder began."""
    monkeypatch.setenv("KCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("kcache.encoders.decoding.picture_size", lambda content: (150, 60))
    source, cache = bucketed_source(tmp_path / "source", SIZES[:3]), tmp_path / "cache"
    settings = BUCKETED | {"format": form}
    late = checked_survey(str(source), str(cache), small_config(oracle, **settings), unheard)
    build(source, cache, oracle, **settings)
    files = digests(cache)
    complete(late)
    assert digests(cache) == files


@pytest.mark.parametrize("form", ["zarr", "webdataset"])
def test_sizes_that_another_builder_finds_while_this_one_looks_count_for_the_next_plan(
    tmp_path: Path, oracle: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("kcache.encoders.decoding.picture_size", lambda content: (150, 60))
    source, cache = bucketed_source(tmp_path / "source", SIZES[:5]), tmp_path / "cache"
    settings = BUCKETED | {"format": form}
    build(source, tmp_path / "undisturbed", oracle, **settings)
    late = checked_survey(str(source), str(cache), small_config(oracle, **settings), unheard)
    left = iter(range(1))

    def stop() -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("kcache.build.work.progress.stop_here", stop)
        with pytest.raises(KeyboardInterrupt):
            build(source, cache, oracle, **settings)
    plan = open_plan(cache)
    assert plan is not None
    assert unfinished(cache, plan)
    encoded_meanwhile = list[int]()

    def looked(job: Survey) -> Survey:
        found = resized(job)
        if not encoded_meanwhile:
            encoded_meanwhile.append(plan.rows)
            other = Builder(job, (0, 1), Patience(say=unheard), None, PictureSizes(job, unheard))
            other.work_off(plan, job.committed())
        return found

    monkeypatch.setattr("kcache.build.build.resized", looked)
    complete(late)
    assert digests(cache) == digests(tmp_path / "undisturbed")


def test_a_picture_whose_header_says_another_size_ends_where_its_pixels_belong(
    tmp_path: Path, oracle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KCACHE_HOME", str(tmp_path / "right home"))
    source = bucketed_source(tmp_path / "source", SIZES[:3])
    build(source, tmp_path / "right", oracle, **BUCKETED)
    monkeypatch.setattr("kcache.encoders.decoding.picture_size", lambda content: (150, 60))
    monkeypatch.setenv("KCACHE_HOME", str(tmp_path / "wrong home"))
    build(source, tmp_path / "wrong", oracle, **BUCKETED)
    found, expected = (read_manifest(tmp_path / name) for name in ("wrong", "right"))
    assert (found.samples_file_digest, found.rejected) == (expected.samples_file_digest, 0)
    for table in ("latents-48x80", "latents-64", "latents-80x48"):
        rows, right = rows_of(tmp_path / "wrong", table), rows_of(tmp_path / "right", table)
        assert rows.keys() == right.keys()
        assert all(np.array_equal(rows[key], right[key]) for key in right)


def test_a_picture_is_read_once_for_its_size_whatever_is_built_and_whatever_becomes_of_it(
    tmp_path: Path, oracle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of four are too small for the first cache, which so knows nothing of them."""
    monkeypatch.setenv("KCACHE_HOME", str(tmp_path / "home"))
    read, sizes_in = list[bytes](), decoding.picture_size

    def noted(content: bytes) -> tuple[int, int]:
        if len(read) == stop_at:
            raise KeyboardInterrupt
        read.append(content)
        return sizes_in(content)

    monkeypatch.setattr(decoding, "picture_size", noted)
    source, stop_at = bucketed_source(tmp_path / "source", ((96, 64), (20, 20), (64, 96), (20, 31))), 3
    config = small_config(oracle, **(BUCKETED | {"num_workers": 1}))
    with pytest.raises(KeyboardInterrupt):
        build_cache(str(source), str(tmp_path / "cache"), config)
    stop_at = -1
    for cache, samples in (("cache", 2), ("cache", 2), ("other", 4)):
        found = build(source, tmp_path / cache, oracle, **(BUCKETED | {"max_upscale": 2.0 if samples == 2 else 4.0}))
        assert (found.samples, len(read), len(set(read))) == (samples, 4, 4)
    kept = tmp_path / "home" / "sizes.npy"
    for damage in (b"", kept.read_bytes()[:-5], b"no array"):
        kept.write_bytes(damage)
        read.clear()
        assert build(source, tmp_path / "cache", oracle).samples == 2
        assert len(read) == 2  # those that the cache knows nothing of
    shutil.rmtree(tmp_path / "home")
    (tmp_path / "home").write_text("no folder")
    assert build(source, tmp_path / "cache", oracle).samples == 2


@pytest.mark.parametrize("rows", [1, 3])
def test_of_more_sizes_than_are_kept_the_last_ones_are(
    tmp_path: Path, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("kcache.build.pictures.remembered._MOST", 4)
    monkeypatch.setattr("kcache.build.pictures.remembered._TOGETHER", 2)
    sizes = np.zeros(7, SIZES_OF)
    sizes["key"], sizes["width"], sizes["height"] = np.arange(7)[:, None], np.arange(1, 8), 9
    sizes["height"][2] = 0  # of which nothing is known
    for first in range(0, 7, rows):
        remember(sizes[first : first + rows])
    found = np.concatenate(list(remembered(Keys(sizes["key"]))))
    assert found.tobytes() == sizes[3:].tobytes()
    assert not len(np.concatenate(list(remembered(Keys(sizes["key"][:2])))))


def test_few_pictures_wait_for_the_threads_that_find_their_sizes(
    tmp_path: Path, oracle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("kcache.build.pictures.sizes._TOGETHER", 3)
    given, waiting = ThreadPoolExecutor.submit, list[Future[Any]]()

    def noted(self: ThreadPoolExecutor, *call: Any) -> Future[Any]:
        waiting[:] = [each for each in waiting if not each.done()]
        assert len(waiting) < 3
        waiting.append(given(self, *call))
        return waiting[-1]

    monkeypatch.setattr(ThreadPoolExecutor, "submit", noted)
    source = bucketed_source(tmp_path / "source", SIZES[:7])
    job = checked_survey(str(source), str(tmp_path / "cache"), small_config(oracle, **BUCKETED), unheard)
    assert [(each.width, each.height) for each in job.samples] == list(SIZES[:7])


@pytest.mark.parametrize("form", ["zarr", "webdataset"])
def test_a_first_build_that_was_stopped_goes_on_with_its_shapes_unasked_to_the_same_bytes(
    tmp_path: Path, oracle: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = bucketed_source(tmp_path / "source", SIZES[:5])
    build(source, tmp_path / "undisturbed", oracle, **(BUCKETED | {"format": form}))
    for stops in range(2):
        left = [4]

        def stop(left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt

        # The first time it is told of shapes, afterwards it is as the build was begun.
        told = BUCKETED if stops == 0 else {"resolution": (), "rows_per_shard": 4}
        with monkeypatch.context() as patch:
            patch.setattr("kcache.build.work.progress.stop_here", stop)
            with pytest.raises(KeyboardInterrupt):
                build(source, tmp_path / "cache", oracle, format=form, **told)
        assert not (tmp_path / "cache" / "manifest.json").exists()
    build(source, tmp_path / "cache", oracle, resolution=(), rows_per_shard=4, format=form)
    assert digests(tmp_path / "cache") == digests(tmp_path / "undisturbed")


def test_the_network_of_latents_is_loaded_once_for_all_shapes(
    tmp_path: Path, oracle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    load = frozen.load_pretrained

    def noted(kind: type, *rest: Any) -> Any:
        loaded.append(kind.__name__)
        return load(kind, *rest)

    monkeypatch.setattr(frozen, "load_pretrained", noted)
    build(bucketed_source(tmp_path / "source", SIZES[:4]), tmp_path / "cache", oracle, **BUCKETED)
    assert loaded == ["CLIPVisionModelWithProjection", "CLIPTextModelWithProjection", "VQModel"]


def test_what_is_asked_for_in_another_way_than_before_is_said_as_what_it_is(oracle: Path, tmp_path: Path) -> None:
    """Mirror images of all pictures, then a shorter list of shapes, with a new picture each time."""
    source, cache = bucketed_source(tmp_path / "source", SIZES[:4]), tmp_path / "cache"
    buckets = BUCKETED | {"flip": None}
    build(source, cache, oracle, **buckets)

    def new(number: int, size: tuple[int, int]) -> None:
        (source / f"{number:02d}.png").write_bytes(saved(picture(number, size), "PNG"))
        (source / f"{number:02d}.txt").write_text(f"picture {number}")

    def reasons(**changes: Any) -> dict[str, str]:
        return {
            name: table.why for name, table in foretold(source, cache, oracle, **changes).tables.items() if table.why
        }

    new(4, (96, 64))
    one_more = "1 image and its mirror image new or edited since the last build"
    assert reasons(**buckets | {"flip": True}) == {
        "image_embeds": f"{one_more}, 4 mirror images not asked for before",
        "text": "1 caption new or edited since the last build",
        "latents-48x80": f"{one_more}, 1 mirror image not asked for before",
        **dict.fromkeys(("latents-64", "latents-32x96", "latents-80x48"), "1 mirror image not asked for before"),
    }
    build(source, cache, oracle, **buckets | {"flip": True})
    assert reasons() == {}
    assert reasons(resolution=(32,))["latents-32"] == "the table is new: 5 images and their mirror images"
    new(5, (96, 64))
    assert reasons(aspect_ratio_buckets="48,80;64,64;80,48")["latents-48x80"] == (
        f"{one_more}, 1 image and its mirror image of this shape now"
    )
    build(source, cache, oracle, aspect_ratio_buckets="48,80;64,64;80,48")
    new(6, (150, 60))
    new(7, (20, 20))
    # What is missing of a list that the cache had before its own is not what was left undone.
    assert reasons(aspect_ratio_buckets=SHAPES, max_upscale=2.0)["latents-32x96"] == one_more
    later = reasons(max_upscale=4.0)
    assert later["latents-48x80"] == one_more
    assert later["latents-64"] == "1 image and its mirror image too small for --max-upscale before"
    assert later["text"] == "2 captions new or edited since the last build"
    for path in source.glob("0[67].*"):
        path.unlink()
    shutil.rmtree(next(cache.glob("latents-80x48-*")))
    assert reasons()["latents-80x48"] == "1 image and its mirror image whose rows are lost"


def test_a_resolution_that_is_named_without_a_list_has_squares_where_it_is_new(oracle: Path) -> None:
    had = Wants((ShapeSet(64, parse_shapes(SHAPES), 2.0),), flip=True)
    assert wanted(small_config(oracle, resolution=(32, 64)), had, 16) == Wants((square_set(32), *had.sets), flip=True)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"aspect_ratio_buckets": "48x80"}, "expected auto, square, or heights and widths"),
        ({"aspect_ratio_buckets": "48,80", "resolution": (64, 32)}, "lists shapes, and there are 2 resolutions"),
        ({"aspect_ratio_buckets": "48,83"}, "48,83; expected multiples of"),
        ({"max_upscale": 3.0}, "--max-upscale is 3, but squares take pictures of any size"),
        ({"max_upscale": 0.0, "aspect_ratio_buckets": "auto"}, "--max-upscale is 0.0; expected a number above 0"),
        ({"aspect_ratio_buckets": "auto", "resolution": (65,)}, "--resolution is 65; expected a multiple of"),
    ],
)
def test_flags_that_make_no_shapes_are_one_message(
    bucketed: Path, tmp_path: Path, oracle: Path, settings: dict[str, Any], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        build(bucketed / "source", tmp_path / "cache", oracle, **settings)
