"""Converting: the other form holds the same samples and rows, of all tables or of those that one trainer reads."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from in_bucket import put
from short_runs import config as short_run
from short_runs import course
from small_builds import build, copy_pictures, digests, encoded

from kcache import Cache
from kcache.errors import CacheCorruptError, CacheMismatchError, CacheNotFoundError, ConfigError
from kcache.places.bucket import BucketPath
from kcache.training import train
from kcache.upkeep.convert import convert_cache
from kcache.upkeep.verify import verify_cache

FIELDS = ["image_embeds", "latents", "text_embeds", "text_encoder_hidden_states"]
OTHER = {"zarr": "webdataset", "webdataset": "zarr"}


def all_rows(path: Path) -> dict[str, np.ndarray]:
    """Every row of a cache, all captions of all samples and the reserved rows."""
    cache = Cache.open(path)
    counts = np.diff(cache.caption_bounds)
    samples = np.concatenate([np.repeat(np.arange(len(cache)), counts), [0]])
    captions = np.concatenate([*[np.arange(count) for count in counts], [0]])
    drop = np.arange(len(samples)) == len(samples) - 1
    return cache.read(samples, FIELDS, captions, drop_caption=drop, drop_image=drop)


@pytest.mark.parametrize("form", OTHER)
def test_the_other_form_holds_the_same(caches: dict[str, Path], form: str, tmp_path: Path) -> None:
    manifest = convert_cache(caches[form], tmp_path / "new", OTHER[form], rows_per_shard=3)
    old, new = Cache.open(caches[form]), Cache.open(tmp_path / "new")
    assert (manifest.format, new.manifest.format) == (OTHER[form], OTHER[form])
    assert (new.samples_digest, new.fingerprint, new.recipes) == (old.samples_digest, old.fingerprint, old.recipes)
    assert (new.models, new.samples) == (old.models, old.samples)
    expected, found = all_rows(caches[form]), all_rows(tmp_path / "new")
    assert expected.keys() == found.keys()
    assert all(np.array_equal(expected[name], found[name]) for name in expected)
    assert (tmp_path / "new" / "rejected.jsonl").read_bytes() == (caches[form] / "rejected.jsonl").read_bytes()


@pytest.fixture(scope="module")
def sides(oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Four pictures, one with a caption that is cut off, and a cache of them with latents of two sides."""
    folder = tmp_path_factory.mktemp("sides")
    pictures = copy_pictures(oracle, folder / "pictures", 4)
    (pictures / "img_01.txt").write_text("a word " * 200)
    build(pictures, folder / "cache", oracle, dtype="float16", format="zarr", rows_per_shard=3, resolution=(32, 64))
    return pictures, folder / "cache"


@pytest.mark.parametrize(
    ("form", "stage", "asked", "tables", "models"),
    [
        ("webdataset", "prior", (), {"image_embeds", "text"}, {"prior"}),
        ("zarr", "decoder", (32,), {"image_embeds", "latents-32"}, {"decoder", "prior"}),
        ("webdataset", "all", (64,), {"image_embeds", "latents-64", "text"}, {"decoder", "prior"}),
    ],
)
def test_what_one_trainer_reads_is_a_cache_that_a_build_makes_alike(
    sides: tuple[Path, Path], oracle: Path, tmp_path: Path,
    form: str, stage: Any, asked: tuple[int, ...], tables: set[str], models: set[str],
) -> None:  # fmt: skip
    pictures, cache = sides
    manifest = convert_cache(cache, tmp_path / "new", form, stage=stage, resolution=asked, rows_per_shard=3)
    assert (set(manifest.tables), set(manifest.models)) == (tables, models)
    assert manifest.samples_digest == Cache.open(cache).samples_digest
    assert not verify_cache(tmp_path / "new").corrupt
    before = digests(tmp_path / "new")
    settings: dict[str, Any] = {"dtype": "float16", "format": form, "stage": stage, "resolution": asked or (64,)}
    assert encoded(build(pictures, tmp_path / "new", oracle, **settings)) == {}
    assert digests(tmp_path / "new") == before
    card = (tmp_path / "new" / "README.md").read_text()
    assert {name for name in ("image_embeds", "text", "latents-32", "latents-64") if f"| `{name}` |" in card} == tables
    # What was left out can be left out of tars, too, and the form may stay.
    again = {"zarr": "webdataset", "webdataset": "zarr"}[form]
    convert_cache(cache, tmp_path / "all", again)
    convert_cache(tmp_path / "all", tmp_path / "again", form, stage=stage, resolution=asked, rows_per_shard=3)
    assert digests(tmp_path / "again") == before


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_what_one_trainer_reads_trains_alike(caches: dict[str, Path], tmp_path: Path, stage: Any) -> None:
    courses = []
    convert_cache(caches["zarr"], tmp_path / "new", "webdataset", stage=stage)
    for number, cache in enumerate((caches["zarr"], tmp_path / "new")):
        run = tmp_path / f"run-{number}"
        train(str(cache), short_run(run, stage, max_train_steps=2))
        courses.append(course(run))
    assert courses[0] == courses[1]


def test_what_is_not_there_to_be_taken_is_said(caches: dict[str, Path], tmp_path: Path) -> None:
    convert_cache(caches["zarr"], tmp_path / "prior", "zarr", stage="prior")
    with pytest.raises(
        ConfigError, match=r"--stage decoder reads latents, but .* has image_embeds, text; .*cache-build"
    ):
        convert_cache(tmp_path / "prior", tmp_path / "new", "zarr", stage="decoder")
    with pytest.raises(
        ConfigError, match=r"--resolution 512 .* has image_embeds, latents-64, text; .*--resolution 512"
    ):
        convert_cache(caches["zarr"], tmp_path / "new", "zarr", resolution=(64, 512))
    with pytest.raises(ConfigError, match="--stage prior reads no latents; leave it out"):
        convert_cache(caches["zarr"], tmp_path / "new", "zarr", stage="prior", resolution=(64,))
    with pytest.raises(ConfigError, match="--worker is '2/2'; expected I/N"):
        convert_cache(caches["zarr"], tmp_path / "new", "zarr", worker="2/2")
    with pytest.raises(CacheMismatchError, match=r"not empty \(found text-"):
        convert_cache(caches["zarr"], tmp_path / "prior", "zarr", stage="decoder")
    assert not (tmp_path / "new").exists()


def test_there_and_back_gives_the_same_bytes(oracle: Path, pictures: Path, tmp_path: Path) -> None:
    clean = Path(shutil.copytree(pictures, tmp_path / "clean"))
    (clean / "img_06.png").unlink()
    (clean / "img_06.txt").unlink()
    for form in OTHER:
        build(clean, tmp_path / form, oracle, dtype="float16", format=form, rows_per_shard=4)
    convert_cache(tmp_path / "zarr", tmp_path / "there", "webdataset", rows_per_shard=4)
    convert_cache(tmp_path / "there", tmp_path / "back", "zarr", rows_per_shard=4)
    assert digests(tmp_path / "there") == digests(tmp_path / "webdataset")
    assert digests(tmp_path / "back") == digests(tmp_path / "zarr")


@pytest.mark.parametrize("form", OTHER)
def test_building_on_has_nothing_to_do(
    caches: dict[str, Path], pictures: Path, oracle: Path, form: str, tmp_path: Path
) -> None:
    convert_cache(caches[form], tmp_path / "new", OTHER[form])
    before = digests(tmp_path / "new")
    result = build(pictures, tmp_path / "new", oracle, dtype="float16", format=OTHER[form])
    assert (encoded(result), result.rejected) == ({}, 1)
    assert digests(tmp_path / "new") == before


def test_rows_that_no_sample_uses_are_left_behind(
    caches: dict[str, Path], pictures: Path, oracle: Path, tmp_path: Path
) -> None:
    pictures = Path(shutil.copytree(pictures, tmp_path / "pictures"))
    cache = Path(shutil.copytree(caches["zarr"], tmp_path / "cache"))
    (pictures / "img_00.txt").write_text("another caption")
    build(pictures, cache, oracle, dtype="float16", format="zarr")
    old, new = Cache.open(cache).manifest, convert_cache(cache, tmp_path / "new", "webdataset")
    again = convert_cache(tmp_path / "new", tmp_path / "again", "zarr")
    assert again.tables["text"].rows == len(
        {"", *Cache.open(cache).samples["captions"].combine_chunks().flatten().to_pylist()}
    )
    assert (new.samples_digest, again.fingerprint) == (old.samples_digest, old.fingerprint)


def test_a_damaged_row_stops_the_conversion(caches: dict[str, Path], tmp_path: Path) -> None:
    cache = Path(shutil.copytree(caches["zarr"], tmp_path / "cache"))
    path = next(cache.glob("latents-64-*/00000-*/latents/c/0/0/0/0"))
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(CacheCorruptError, match="corrupt in the row"):
        convert_cache(cache, tmp_path / "new", "webdataset")
    with pytest.raises(CacheNotFoundError):
        Cache.open(tmp_path / "new")


def test_a_folder_with_something_else_is_left_alone(caches: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "letter.txt").write_text("dear reader")
    with pytest.raises(CacheMismatchError, match=r"not empty \(found letter.txt\)"):
        convert_cache(caches["zarr"], tmp_path / "notes", "webdataset")
    other = Path(shutil.copytree(caches["zarr"], tmp_path / "other"))
    with pytest.raises(CacheMismatchError, match="is a zarr cache"):
        convert_cache(caches["zarr"], other, "webdataset")
    with pytest.raises(ConfigError, match="expected zarr or webdataset"):
        convert_cache(caches["zarr"], tmp_path / "new", "tar")


def test_rows_that_stand_together_are_fetched_together(
    caches: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, read = list[str](), BucketPath.read_range

    def read_range(path: BucketPath, start: int, length: int) -> memoryview:
        asked.append(path.key)
        return read(path, start, length)

    monkeypatch.setattr(BucketPath, "read_range", read_range)
    old = put(caches["zarr"], f"memory://convert/{tmp_path.name}")
    asked.clear()
    convert_cache(old, tmp_path / "new", "webdataset")
    rows = [key for key in asked if "/c/" in key]
    # One tar of samples and one of the reserved rows, of four fields in two shards each at most.
    assert 0 < len(rows) <= 2 * 4 * 2
