"""The dry run, explained: true reasons, sizes within 5 % of what is written, and savings that add up."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from small_builds import build, copy_pictures, foretold, small_config

from kcache.build.estimate import BuildEstimate, estimate_build, zarr_bytes
from kcache.build.plan import TablePlan
from kcache.store.recipe import Field, Recipe
from kcache.store.shards import RowBlock, commit_shard

pytestmark = pytest.mark.usefixtures("form")

SHARD_FOLDERS = ("image_embeds-*", "text-*", "latents-*", "samples-*/", "reserved-*")


@pytest.fixture(scope="module")
def built(form: str, oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, BuildEstimate]:
    """Eight pictures, one of them with two captions; what was estimated for them; and the cache that was then built."""
    folder = tmp_path_factory.mktemp("estimate")
    source = copy_pictures(oracle, folder / "pictures", 8)
    (source / "img_01.txt").write_text("a caption of some more words than the others have\nand another")
    estimate = estimate_build(str(source), str(folder / "cache"), small_config(oracle, rows_per_shard=4))
    assert not (folder / "cache").exists()
    build(source, folder / "cache", oracle, rows_per_shard=4)
    return source, folder / "cache", estimate


@pytest.fixture
def copies(built: tuple[Path, Path, BuildEstimate], tmp_path: Path) -> tuple[Path, Path]:
    source, cache, _ = built
    return Path(shutil.copytree(source, tmp_path / "pictures")), Path(shutil.copytree(cache, tmp_path / "cache"))


def shard_bytes(cache: Path) -> int:
    folders = [path for pattern in SHARD_FOLDERS for path in cache.glob(pattern) if path.is_dir()]
    return sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())


def add_pictures(oracle: Path, folder: Path, numbers: range) -> None:
    """Pictures whose files differ, with one or two captions of several lengths each."""
    folder.mkdir(exist_ok=True)
    pictures = sorted((oracle / "data").glob("img_*.png"))
    for i in numbers:
        picture = pictures[i % len(pictures)].read_bytes()
        (folder / f"{i:03d}.png").write_bytes(picture + str(i).encode())
        lines = [f"picture {i}, " + "and more of it " * (i % 4 + line) for line in range(1 + i % 2)]
        (folder / f"{i:03d}.txt").write_text("\n".join(lines))


def test_bytes_are_foretold_of_a_new_cache_and_of_as_many_pictures_more(
    form: str, oracle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kcache.build.estimate.MEASURED_SECONDS", 0.0)
    source, cache = tmp_path / "pictures", tmp_path / "cache"
    # Tars so small that what each takes beside its samples counts.
    settings = {"rows_per_shard": {"zarr": 100, "webdataset": 10}[form]}
    for numbers in (range(80), range(80, 160)):
        add_pictures(oracle, source, numbers)
        before = shard_bytes(cache)
        estimate = estimate_build(str(source), str(cache), small_config(oracle, **settings))
        build(source, cache, oracle, **settings)
        assert estimate.bytes == pytest.approx(shard_bytes(cache) - before, rel=0.05)


@pytest.mark.parametrize(("rows", "width", "ragged"), [
    (1, 1280, False), (1, 1280, True), (63, 1280, False), (64, 1280, True), (65, 1280, False), (200, 1280, True),
    (20_000, 8, False),
])  # fmt: skip
def test_a_shard_is_as_large_as_computed_but_for_some_metadata(
    rows: int, width: int, ragged: bool, tmp_path: Path
) -> None:
    fields = (Field(name="text_embeds", shape=(width,)),)
    fields += (Field(name="text_encoder_hidden_states", shape=(width,), ragged=True),) if ragged else ()
    recipe = Recipe(
        table="text", encoder="CLIPTextModelWithProjection", weights="0" * 64, config="0" * 64, preprocess={},
        compute_dtype="float32", batch_shape=(16, 77), stored_dtype="float16", fields=fields,
    )  # fmt: skip
    lengths = np.arange(rows) % 20 + 2
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    arrays = {"text_embeds": np.zeros((rows, width), np.float16)}
    if ragged:
        arrays["text_encoder_hidden_states"] = np.zeros((offsets[-1], width), np.float16)
    keys = np.frombuffer(np.arange(rows * 2, dtype=np.int64).tobytes(), np.uint8).reshape(-1, 16)
    block = RowBlock(keys=keys, arrays=arrays, offsets=offsets if ragged else None)
    commit_shard(tmp_path, "00000", recipe, block, provenance={"torch": "2.13.0", "device": "cpu (x86_64)"})
    written = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    planned = tuple(key.tobytes() for key in keys)
    plan = TablePlan(recipe=recipe, rows_per_shard=rows, first_shard=0, keys=planned)
    assert zarr_bytes(plan, float(lengths.mean())) == pytest.approx(written, abs=3_000)


def test_everything_of_a_new_cache_is_missing(built: tuple[Path, Path, BuildEstimate]) -> None:
    tables = built[2].tables
    assert {name: (table.missing, table.why) for name, table in tables.items()} == {
        "image_embeds": (9, "the table is new: 8 images"),
        "text": (10, "the table is new: 9 captions"),
        "latents-64": (8, "the table is new: 8 images"),
    }
    assert all(table.row_seconds > 0 for table in tables.values())
    assert built[2].seconds == pytest.approx(sum(table.seconds for table in tables.values()))


def test_savings_are_the_encoder_time_of_what_a_stage_reads(built: tuple[Path, Path, BuildEstimate]) -> None:
    estimate = built[2]
    row = {name: table.row_seconds for name, table in estimate.tables.items()}
    assert estimate.savings["prior"].sample_seconds == pytest.approx(row["image_embeds"] + row["text"])
    assert estimate.savings["decoder"].sample_seconds == pytest.approx(row["image_embeds"] + row["latents-64"])
    saving = estimate.savings["decoder"]
    assert saving.epochs * saving.sample_seconds * 8 == pytest.approx(estimate.seconds)


def test_nothing_to_do_is_said_without_an_encoder(
    built: tuple[Path, Path, BuildEstimate], oracle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kcache.build.estimate.load_encoder", lambda *_: pytest.fail("an encoder was loaded"))
    estimate = estimate_build(str(built[0]), str(built[1]), small_config(oracle, rows_per_shard=4))
    assert (estimate.bytes, estimate.seconds, estimate.savings) == (0, 0.0, {})
    assert {table.missing for table in estimate.tables.values()} == {0}


def test_edits_additions_and_removals_are_told_apart(copies: tuple[Path, Path], oracle: Path) -> None:
    source, cache = copies
    (source / "img_02.txt").write_text("an edited caption")
    shutil.copyfile(oracle / "data" / "img_15.png", source / "img_08.png")
    (source / "img_08.txt").write_text("a new picture's caption")
    (source / "img_03.png").unlink()
    (source / "img_03.txt").unlink()
    estimate = estimate_build(str(source), str(cache), small_config(oracle, rows_per_shard=4))
    assert {name: (table.missing, table.why, table.unused) for name, table in estimate.tables.items()} == {
        "image_embeds": (1, "1 image new or edited since the last build", 1),
        "text": (2, "2 captions new or edited since the last build", 2),
        "latents-64": (1, "1 image new or edited since the last build", 1),
    }


def test_another_recipe_is_said_field_by_field(copies: tuple[Path, Path], oracle: Path) -> None:
    tables = foretold(*copies, oracle, alpha="drop").tables
    expected = "the table in the cache is of another recipe (preprocess.alpha: white → drop)"
    assert {name: table.why for name, table in tables.items()} == {
        "image_embeds": expected,
        "text": "",
        "latents-64": expected,
    }


def test_lost_and_rejected_rows_are_told_apart(copies: tuple[Path, Path], oracle: Path, form: str) -> None:
    source, cache = copies
    (source / "img_00.png").write_bytes(b"no picture")
    build(source, cache, oracle, rows_per_shard=4)
    record = max(cache.glob("latents-64-*/0*.json" if form == "zarr" else "samples-*/00000.json"))
    if form == "zarr":
        record = min(record.parent.glob("0*.json"))
    record.unlink()
    why = foretold(source, cache, oracle, retry_rejected=True).tables["latents-64"].why
    assert "whose rows are lost" in why
    assert "1 image rejected before, to be tried again" in why
