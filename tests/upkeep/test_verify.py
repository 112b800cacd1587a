"""Verifying a whole cache, naming what is broken, repairing exactly that, and comparing rows with their encoders."""

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from in_bucket import contents, put
from safetensors.torch import load_file, save_file
from small_builds import build, copy_pictures, digests

from kcache import Cache
from kcache.build.dataset_card import CARD
from kcache.errors import CacheCorruptError, CacheMismatchError, SourceError, UnreadableError
from kcache.store.manifest import MANIFEST, read_manifest
from kcache.store.rows import gather
from kcache.store.shards import read_commit, read_side_files
from kcache.upkeep.compare import compare_online
from kcache.upkeep.convert import convert_cache
from kcache.upkeep.garbage import collect_garbage
from kcache.upkeep.merge import merge_caches
from kcache.upkeep.repair import repair_cache
from kcache.upkeep.verify import VerifyProgress, verify_cache
from kcache_cli import app as cli

pytestmark = pytest.mark.usefixtures("form")

FIELDS = ["image_embeds", "latents", "text_embeds", "text_encoder_hidden_states"]


@pytest.fixture(scope="module")
def built(form: str, oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source of six pictures, one of them broken, and its cache in shards of two; tests copy both."""
    folder = tmp_path_factory.mktemp("built")
    source = copy_pictures(oracle, folder / "pictures", 7)
    (source / "img_05.png").write_bytes(b"no picture")
    build(source, folder / "cache", oracle, rows_per_shard=2)
    return source, folder / "cache"


@pytest.fixture
def copies(built: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    return tuple(Path(shutil.copytree(path, tmp_path / path.name)) for path in built)  # type: ignore[return-value]


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)


def row_place(cache: Path, field: str, sample: int) -> tuple[Path, int]:
    """File and offset of a sample's row."""
    opened = Cache.open(cache)
    entry = opened.index[opened.table_of(field)][sample]
    return opened.field_files(field).files[entry["shard"]].path, int(entry[field]["offset"])


def everything(cache: Path) -> dict[str, Any]:
    opened = Cache.open(cache)
    rows = {name: array.tobytes() for name, array in opened.read(range(len(opened)), FIELDS).items()}
    reserved = {}
    for name in ("image_embeds", "text_embeds"):
        index = opened.index[opened.table_of(name)]
        reserved[name] = gather(opened.field_files(name), index[-1:], np.empty)[0].tobytes()
    return {"rows": rows, "reserved": reserved, "samples": opened.samples.to_pylist()}


def test_a_sound_cache_is_read_to_the_last_byte(built: tuple[Path, Path]) -> None:
    seen: list[VerifyProgress] = []
    result = verify_cache(built[1], seen.append)
    assert (result.files, result.rows, result.orphaned, result.corrupt) == ((), (), (), False)
    records = [json.loads(path.read_bytes()) for path in built[1].glob("*/[0-9]*.json")]
    committed = sum(file["bytes"] for record in records for file in record["files"])
    assert result.bytes == committed == seen[-1].done == seen[-1].total


def test_a_broken_row_is_named_with_its_sample(copies: tuple[Path, Path]) -> None:
    _, cache = copies
    path, offset = row_place(cache, "latents", 3)
    flip(path, offset + 5)
    result = verify_cache(cache)
    [file], [row] = result.files, result.rows
    assert file.path == path.relative_to(cache).as_posix()
    assert "crc32c" in file.reason
    sample = Cache.open(cache).samples.to_pylist()[3]
    assert (row.table, row.field, row.sample, row.name) == ("latents-64", "latents", sample["id"], sample["name"])
    assert row.shard == file.shard
    assert path.relative_to(cache).as_posix().startswith(row.shard)


def test_foreign_files_are_orphaned_not_corrupt(copies: tuple[Path, Path]) -> None:
    _, cache = copies
    shard = Path(verify_shard(cache))
    (cache / "notes.txt").write_text("mine")
    (cache / ".tmp-1-abc").mkdir()
    (cache / "index-0123456789abcdef").mkdir()
    (cache / shard.parent / "99999.rows.npy").write_bytes(b"left over")
    result = verify_cache(cache)
    assert not result.corrupt
    assert result.orphaned == tuple(
        sorted([".tmp-1-abc/", "index-0123456789abcdef/", "notes.txt", f"{shard.parent}/99999.rows.npy"])
    )


def verify_shard(cache: Path) -> str:
    """What a shard of the latents is called."""
    return read_manifest(cache).tables["latents-64"].shards[0].label


def test_a_card_says_what_the_manifest_does_or_is_its_owners(copies: tuple[Path, Path]) -> None:
    _, cache = copies
    text = (cache / CARD).read_text()
    (cache / CARD).write_text(text.replace("6 samples", "7 samples"))
    assert [file.path for file in verify_cache(cache).files] == [CARD]
    (cache / CARD).write_text("# My cache\n")
    assert not verify_cache(cache).corrupt


def assert_counted(cache: Path) -> None:
    """The manifest counts what the side files, the list of samples and that of the rejected have."""
    manifest = read_manifest(cache)
    assert manifest.samples == len(Cache.open(cache).samples)
    assert manifest.rejected == (cache / "rejected.jsonl").read_bytes().count(b"\n")
    for table, entry in manifest.tables.items():
        for shard in entry.shards:
            record = cache / f"{shard.label}.json"
            part = table if shard.data.endswith(".tar") else ""
            [side] = read_side_files(record.parent, [read_commit(record)], entry.recipe, part)
            size = sum(int(side[field.name]["length"].sum(dtype=np.int64)) for field in entry.recipe.fields)
            assert (shard.rows, shard.bytes) == (len(side), size)
        totals = [(shard.rows, shard.bytes) for shard in entry.shards]
        assert (entry.rows, entry.bytes) == tuple(map(sum, zip(*totals, strict=True)))


def test_no_way_to_a_cache_miscounts(copies: tuple[Path, Path], oracle: Path, form: str, tmp_path: Path) -> None:
    source, cache = copies
    (source / "img_01.txt").write_text("another caption")
    shutil.copyfile(source / "img_02.png", source / "img_09.png")
    build(source, cache, oracle, rows_per_shard=2)
    more = copy_pictures(oracle, tmp_path / "more", 9)
    build(more, tmp_path / "second", oracle, rows_per_shard=3)
    merge_caches(tmp_path / "merged", [cache, tmp_path / "second"])
    convert_cache(cache, tmp_path / "converted", "zarr" if form == "webdataset" else "webdataset")
    for compact in (False, True):
        collect_garbage(shutil.copytree(cache, tmp_path / f"collected-{compact}"), compact=compact)
    for name in ("second", "merged", "converted", "collected-False", "collected-True"):
        assert_counted(tmp_path / name)
    assert_counted(cache)


@pytest.mark.parametrize("fault", ["cut short", "changed", "removed"])
def test_a_side_file_that_cannot_be_trusted_is_named(copies: tuple[Path, Path], fault: str) -> None:
    _, cache = copies
    [side] = (
        cache.glob("text-*/00001-*.rows.npy")
        if read_manifest(cache).format == "zarr"
        else cache.glob("samples-*/00001-*.text.rows.npy")
    )
    if fault == "cut short":
        side.write_bytes(side.read_bytes()[:-7])
    elif fault == "changed":
        flip(side, side.stat().st_size - 3)
    else:
        side.unlink()
    assert [file.path for file in verify_cache(cache).files] == [side.relative_to(cache).as_posix()]


def test_what_the_system_keeps_from_a_process_is_not_called_damaged(
    copies: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, cache = copies
    numbers = cycle([errno.EACCES, errno.EMFILE, errno.ENOMEM, errno.ESTALE])
    real = Path.open
    for withheld, number in zip(sorted(path for path in cache.rglob("*") if path.is_file()), numbers, strict=False):

        def opened(path: Path, *how: Any, hidden: Path = withheld, number: int = number, **more: Any) -> Any:
            if path == hidden:
                raise OSError(number, os.strerror(number), str(path))
            return real(path, *how, **more)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", opened)
            with pytest.raises(OSError, match=os.strerror(number)):
                verify_cache(cache)
    monkeypatch.setattr("kcache.store.rows.mapped", lambda path: (_ for _ in ()).throw(OSError(errno.ENOMEM, "none")))
    with pytest.raises(UnreadableError, match="; free some memory"):
        Cache.open(cache).read([0], ["image_embeds"])


def test_only_the_broken_row_is_encoded_again(copies: tuple[Path, Path], form: str) -> None:
    source, cache = copies
    before, files = everything(cache), digests(cache)
    for field, sample in (("latents", 3), ("image_embeds", -1)):
        path, offset = row_place(cache, field, sample)
        flip(path, offset + 5)
    result = repair_cache(str(source), cache)
    assert result.encoded == {"latents-64": 1, "image_embeds": 1}
    assert len(result.before.rows) == 2
    assert not result.after.corrupt
    assert verify_cache(cache).orphaned == ()
    assert everything(cache) == before
    after = digests(cache)
    broken = tuple(result.before.shards)
    untouched = {n: d for n, d in files.items() if "/" in n and not n.startswith((*broken, "index-"))}
    assert untouched
    assert {name: after.get(name) for name in untouched} == untouched
    assert after["rejected.jsonl"] == files["rejected.jsonl"]


@pytest.mark.parametrize("damage", ["emptied", "removed"])
def test_every_kind_of_file_can_be_repaired(copies: tuple[Path, Path], damage: str) -> None:
    source, cache = copies
    before, files = everything(cache), sorted(digests(cache))
    whole = shutil.copytree(cache, cache.parent / "whole")
    # One shard of each folder, and one of a zarr group's many small files.
    shards = [name for name in files if "/00001" in name and not name.endswith("zarr.json")]
    groups = [name for name in files if name.endswith("/zarr.json") and name.count("/") == 2 and "/00001" in name]
    others = [name for name in files if "/0" not in name and name not in (MANIFEST, CARD)]
    for name in [*shards, *groups[:1], *others]:
        shutil.rmtree(cache)
        shutil.copytree(whole, cache)
        (cache / name).unlink()
        if damage == "emptied":
            (cache / name).touch()
        result = repair_cache(str(source), cache)
        lost = {(row.table, row.entry) for row in result.before.rows}
        assert (result.before.corrupt, sum(result.encoded.values())) == (True, len(lost)), name
        assert (verify_cache(cache).corrupt, everything(cache)) == (False, before), name


def test_repair_changes_nothing_but_what_was_broken_when_the_source_moved_on(copies: tuple[Path, Path]) -> None:
    source, cache = copies
    before = everything(cache)
    path, offset = row_place(cache, "latents", 3)
    flip(path, offset + 5)
    (source / "img_00.png").unlink()
    (source / "img_01.txt").write_text("another caption")
    shutil.copyfile(source / "img_02.png", source / "img_09.png")
    (source / "img_09.txt").write_text("one more")
    assert repair_cache(str(source), cache).encoded == {"latents-64": 1}
    assert everything(cache) == before


def test_repair_refuses_what_it_cannot_do_exactly(copies: tuple[Path, Path], oracle: Path, tmp_path: Path) -> None:
    source, _ = copies
    prior = Path(shutil.copytree(oracle / "prior", tmp_path / "prior"))
    build(source, tmp_path / "own", oracle, pretrained_prior_model_name_or_path=str(prior))
    path, offset = row_place(tmp_path / "own", "image_embeds", 3)
    flip(path, offset)
    files = digests(tmp_path / "own")
    weights = prior / "image_encoder" / "model.safetensors"
    save_file({name: tensor + 1e-3 for name, tensor in load_file(weights).items()}, weights, metadata={"format": "pt"})
    with pytest.raises(CacheMismatchError, match=r"image_embeds encoded now .* another recipe .*weights: "):
        repair_cache(str(source), tmp_path / "own")
    shutil.copyfile(oracle / "prior" / "image_encoder" / "model.safetensors", weights)
    (source / "img_03.png").unlink()
    with pytest.raises(SourceError, match=r"it lacks 1, such as img_03\.png"):
        repair_cache(str(source), tmp_path / "own")
    assert digests(tmp_path / "own") == files
    flip(tmp_path / "own" / "manifest.json", 100)
    with pytest.raises(CacheCorruptError, match="nothing says which encoders"):
        repair_cache(str(source), tmp_path / "own")


def test_settings_are_taken_from_the_recipes(oracle: Path, tmp_path: Path) -> None:
    source = copy_pictures(oracle, tmp_path / "pictures", 2)  # on some processors bfloat16 is slow
    settings = {"dtype": "float16", "mixed_precision": "bf16", "alpha": "drop", "batch_size": 2, "resolution": (32, 64)}
    for stage in ("prior", "decoder", "all"):
        cache = tmp_path / stage
        build(source, cache, oracle, stage=stage, **settings)
        path, offset = row_place(cache, "image_embeds", 1)
        flip(path, offset)
        assert repair_cache(str(source), cache).encoded == {"image_embeds": 1}


def test_float32_rows_are_what_the_encoders_give(built: tuple[Path, Path]) -> None:
    found = compare_online(str(built[0]), built[1], 4, seed=1)
    assert {difference.field for difference in found} == set(FIELDS)
    assert [(d.rows, d.absolute, d.relative) for d in found] == [(4, 0.0, 0.0)] * 4


def test_a_difference_is_measured(copies: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    source, cache = copies
    read = Cache.read

    def moved(self: Cache, *arguments: Any, **options: Any) -> dict[str, np.ndarray]:
        rows = read(self, *arguments, **options)
        for name in set(rows) & {"latents"}:
            rows[name][1] += 0.25
        return rows

    monkeypatch.setattr(Cache, "read", moved)
    found = {difference.field: difference for difference in compare_online(str(source), cache, 6)}
    assert found["latents"].absolute == pytest.approx(0.25, rel=1e-5)
    largest = np.abs(read(Cache.open(cache), [1], ["latents"])["latents"]).max()
    assert found["latents"].relative == pytest.approx(0.25 / largest, rel=1e-5)
    assert found["image_embeds"].absolute == 0


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `kcache cache-verify` in this process; returns exit status, stdout and stderr."""

    def command(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kcache", "cache-verify", *map(str, arguments)])
        with pytest.raises(SystemExit) as exited:
            cli.main()
        captured = capsys.readouterr()
        return exited.value.code or 0, captured.out, captured.err  # type: ignore[return-value]

    return command


def test_the_command_names_what_is_broken_repairs_and_compares(
    copies: tuple[Path, Path], run: Callable[..., tuple[int, str, str]]
) -> None:
    source, cache = copies
    path, offset = row_place(cache, "latents", 3)
    flip(path, offset + 5)
    status, out, err = run(cache)
    assert status == 4
    assert f"broken file: {path.relative_to(cache)}: crc32c is" in out
    assert "img_03.png" in out
    assert "--repair" in err
    status, out, _ = run(cache, "--json")
    about = json.loads(out)
    assert (status, about["corrupt"], [row["name"] for row in about["rows"]]) == (4, True, ["img_03.png"])
    status, out, err = run(cache, "--repair")
    assert (status, "--source SOURCE" in err) == (1, True)
    status, out, _ = run(cache, "--source", source, "--repair", "--against-online", "3")
    assert status == 0
    assert "repaired file: " in out
    assert "rows encoded again: 1 of latents-64" in out
    assert "latents-64 latents: 3 rows, largest difference 0.00e+00" in out
    assert run(cache)[0] == 0


def test_in_a_bucket_a_repair_comes_to_the_same(copies: tuple[Path, Path], bucket: str) -> None:
    source, cache = copies
    path, offset = row_place(cache, "latents", 3)
    flip(path, offset + 5)
    place = put(cache, f"{bucket}/cache")
    results = [repair_cache(str(source), where, device="cpu") for where in (cache, str(place))]
    assert [result.encoded for result in results] == [{"latents-64": 1}, {"latents-64": 1}]
    there, here = contents(place), contents(cache)
    superseded = {name for name in there if name.startswith("index-") and name not in here}
    assert {name: content for name, content in there.items() if name not in superseded} == here
    assert {name.partition("/")[0] for name in superseded} == {
        path.rstrip("/") for path in verify_cache(str(place)).orphaned
    }
