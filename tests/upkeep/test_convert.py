"""Converting: the other form holds the same samples and rows, comes whole or not at all, and others read it."""

import gc
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import webdataset
from in_bucket import contents, put
from short_runs import config as short_run
from short_runs import course
from small_builds import build, copy_pictures, digests, encoded

import kcache.build.builder
import kcache.build.claims
from kcache import Cache
from kcache.build.builder import BuildProgress
from kcache.build.joined_tars import SAMPLES
from kcache.build.plan import claims_folder, open_plan
from kcache.errors import CacheCorruptError, CacheMismatchError, CacheNotFoundError, ConfigError
from kcache.places import place_of
from kcache.places.bucket import BucketPath
from kcache.store.shards import publish_shard, record_commit
from kcache.training import train
from kcache.upkeep.convert import convert_cache
from kcache.upkeep.verify import verify_cache

FIELDS = ["image_embeds", "latents", "text_embeds", "text_encoder_hidden_states"]
OTHER = {"zarr": "webdataset", "webdataset": "zarr"}


@pytest.fixture(scope="module")
def source(oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures: one with two captions, two with the same caption, one image under two names, one that is none."""
    folder = copy_pictures(oracle, tmp_path_factory.mktemp("convert") / "pictures")
    (folder / "img_02.txt").write_text("the first caption\nand a second, longer one")
    (folder / "img_03.txt").write_text("picture number 0")
    shutil.copyfile(folder / "img_04.png", folder / "img_05.png")
    (folder / "img_06.png").write_bytes(b"no picture")
    (folder / "img_06.txt").write_text("a caption whose picture cannot be decoded")
    return folder


@pytest.fixture(scope="module")
def caches(source: Path, oracle: Path) -> dict[str, Path]:
    """A cache of the source in each form, built."""
    built = {}
    for form in OTHER:
        built[form] = source.parent / form
        build(source, built[form], oracle, dtype="float16", format=form, rows_per_shard=4)
    return built


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


def test_there_and_back_gives_the_same_bytes(oracle: Path, source: Path, tmp_path: Path) -> None:
    clean = Path(shutil.copytree(source, tmp_path / "clean"))
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
    caches: dict[str, Path], source: Path, oracle: Path, form: str, tmp_path: Path
) -> None:
    convert_cache(caches[form], tmp_path / "new", OTHER[form])
    before = digests(tmp_path / "new")
    result = build(source, tmp_path / "new", oracle, dtype="float16", format=OTHER[form])
    assert (encoded(result), result.rejected) == ({}, 1)
    assert digests(tmp_path / "new") == before


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


def test_rows_that_no_sample_uses_are_left_behind(
    caches: dict[str, Path], source: Path, oracle: Path, tmp_path: Path
) -> None:
    pictures = Path(shutil.copytree(source, tmp_path / "pictures"))
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


def tars(cache: Path) -> list[str]:
    return sorted(str(path) for path in cache.glob("samples-*/*.tar"))


def test_webdataset_reads_the_tars(caches: dict[str, Path]) -> None:
    cache = Cache.open(caches["webdataset"])
    ids = cache.samples["id"].to_pylist()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves files for the garbage collector to close
        members = list(webdataset.WebDataset(tars(caches["webdataset"]), shardshuffle=False))
        gc.collect()
    seen = []
    for member in members:
        i = ids.index(member["__key__"])
        seen.append(i)
        captions = cache.samples["captions"].to_pylist()[i]
        assert member["txt"].decode() == captions[0]
        assert json.loads(member["json"])["captions"] == captions
        for number in range(len(captions)):
            suffix = f".{number}" if number else ""
            expected = cache.read([i], FIELDS, number)
            for name in ("text_embeds", "text_encoder_hidden_states"):
                row = np.load(io.BytesIO(member[f"{name}{suffix}.npy"]), allow_pickle=False)
                np.testing.assert_array_equal(row, expected[name].reshape(row.shape))
                assert row.dtype == expected[name].dtype
        for name in ("image_embeds", "latents"):
            row = np.load(io.BytesIO(member[f"{name}.npy"]), allow_pickle=False)
            np.testing.assert_array_equal(row, expected[name][0])
    assert sorted(seen) == list(range(len(cache)))


def test_datasets_reads_the_tars(source: Path, oracle: Path, tmp_path: Path) -> None:
    pictures = Path(shutil.copytree(source, tmp_path / "pictures"))
    (pictures / "img_02.txt").write_text("only one caption")
    build(pictures, tmp_path / "cache", oracle, dtype="float16", format="webdataset", rows_per_shard=4)
    cache = Cache.open(tmp_path / "cache")
    loaded = datasets.load_dataset(
        "webdataset", data_files=tars(tmp_path / "cache"), split="train", cache_dir=str(tmp_path / "hf")
    )
    assert sorted(loaded["__key__"]) == sorted(cache.samples["id"].to_pylist())
    ids = cache.samples["id"].to_pylist()
    for member in loaded:
        i = ids.index(member["__key__"])
        expected = cache.read([i], FIELDS)
        # Arrays come as nested lists; their dtype is in the features.
        for name in FIELDS:
            row = np.array(member[f"{name}.npy"], np.float16)
            np.testing.assert_array_equal(row, expected[name].reshape(row.shape))
        assert (member["txt"], member["json"]["name"]) == (
            cache.samples["captions"].to_pylist()[i][0],
            cache.samples["name"].to_pylist()[i],
        )
    # numpy and torch formats give arrays, in float32, which holds every float16.
    [latents] = loaded.with_format("numpy")[:1]["latents.npy"]
    assert (latents.shape, latents.dtype) == ((4, 8, 8), np.float32)


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
