"""Building: what is new is encoded, what is there is not, what cannot be is named, and nothing else happens."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from small_builds import build, copy_pictures, digests, encoded, foretold, missing

from kcache import Cache
from kcache.build.committed import check_target
from kcache.disk.durable import exclusive
from kcache.encoders.frozen import PictureEncoder
from kcache.errors import CacheBusyError, CacheMismatchError, ConfigError, SourceError
from kcache.upkeep.convert import convert_cache

pytestmark = pytest.mark.usefixtures("form")


@pytest.fixture
def source(oracle: Path, tmp_path: Path) -> Path:
    return copy_pictures(oracle, tmp_path / "pictures")


@pytest.fixture(scope="module")
def built(form: str, oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source of six pictures and its cache; tests copy both before changing them."""
    folder = tmp_path_factory.mktemp("built")
    source = copy_pictures(oracle, folder / "pictures")
    build(source, folder / "cache", oracle)
    return source, folder / "cache"


@pytest.fixture
def copies(built: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    return tuple(Path(shutil.copytree(path, tmp_path / path.name)) for path in built)  # type: ignore[return-value]


def test_a_build_encodes_every_row_and_the_reserved_ones(source: Path, oracle: Path, tmp_path: Path) -> None:
    result = build(source, tmp_path / "cache", oracle)
    assert encoded(result) == {"image_embeds": 7, "text": 7, "latents-64": 6}
    assert (result.samples, result.rejected) == (6, 0)
    rows = Cache.open(tmp_path / "cache").read(range(6), ["image_embeds", "latents", "text_embeds"])
    assert {name: array.shape for name, array in rows.items()} == {
        "image_embeds": (6, 32),
        "latents": (6, 4, 8, 8),
        "text_embeds": (6, 32),
    }


def test_building_again_does_nothing(copies: tuple[Path, Path], oracle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, cache = copies
    before = digests(cache)
    monkeypatch.setattr("kcache.encoders.frozen.load_encoder", lambda *_: pytest.fail("an encoder was loaded"))
    result = build(source, cache, oracle)
    assert encoded(result) == {}
    assert digests(cache) == before


def test_a_changed_caption_encodes_one_caption(copies: tuple[Path, Path], oracle: Path) -> None:
    source, cache = copies
    (source / "img_02.txt").write_text("something else\nand a second caption")
    assert encoded(build(source, cache, oracle)) == {"text": 2}
    assert Cache.open(cache).samples["captions"].to_pylist()[2] == ["something else", "and a second caption"]


def test_an_added_picture_touches_one_row(copies: tuple[Path, Path], oracle: Path) -> None:
    source, cache = copies
    ids = Cache.open(cache).samples["id"].to_pylist()
    before = Cache.open(cache).read(range(6), ["image_embeds", "latents"])
    shutil.copyfile(oracle / "data" / "img_15.png", source / "img_00b.png")
    (source / "img_00b.txt").write_text("picture number 0")
    assert encoded(build(source, cache, oracle)) == {"image_embeds": 1, "latents-64": 1}
    after = Cache.open(cache)
    assert [i for i in after.samples["id"].to_pylist() if i in ids] == ids
    kept = [after.samples["id"].to_pylist().index(i) for i in ids]
    assert all((after.read(kept, [name])[name] == before[name]).all() for name in before)


def test_a_removed_picture_encodes_nothing_and_leaves_the_samples(copies: tuple[Path, Path], oracle: Path) -> None:
    source, cache = copies
    before = Cache.open(cache).read([0, 1, 3, 4, 5], ["latents"])["latents"]
    (source / "img_02.png").unlink()
    (source / "img_02.txt").unlink()
    result = build(source, cache, oracle)
    assert (encoded(result), result.samples) == ({}, 5)
    assert (Cache.open(cache).read(range(5), ["latents"])["latents"] == before).all()


def test_an_edited_picture_is_encoded_again(copies: tuple[Path, Path], oracle: Path) -> None:
    source, cache = copies
    old = Cache.open(cache).read([1], ["latents"])["latents"]
    shutil.copyfile(oracle / "data" / "img_15.png", source / "img_01.png")
    assert encoded(build(source, cache, oracle)) == {"image_embeds": 1, "latents-64": 1}
    assert (Cache.open(cache).read([1], ["latents"])["latents"] != old).any()


def test_another_resolution_encodes_latents_only(copies: tuple[Path, Path], oracle: Path) -> None:
    source, cache = copies
    assert encoded(build(source, cache, oracle, resolution=(32,))) == {"latents-32": 6}
    assert Cache.open(cache, resolution=32).read([0], ["latents"])["latents"].shape == (1, 4, 4, 4)
    assert Cache.open(cache, resolution=64).read([0], ["latents"])["latents"].shape == (1, 4, 8, 8)
    shutil.copyfile(oracle / "data" / "img_15.png", source / "img_08.png")
    (source / "img_08.txt").write_text("picture number 0")
    expected = {"image_embeds": 1, "latents-32": 1, "latents-64": 1}
    assert encoded(build(source, cache, oracle, resolution=(32,))) == expected


def test_other_weights_under_the_same_path_are_noticed_and_explained(
    copies: tuple[Path, Path], oracle: Path, tmp_path: Path
) -> None:
    source, cache = copies
    prior = Path(shutil.copytree(oracle / "prior", tmp_path / "prior"))
    assert encoded(build(source, cache, oracle, pretrained_prior_model_name_or_path=str(prior))) == {}
    weights = prior / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    name = next(iter(tensors))
    tensors[name] = tensors[name] + 1e-3
    save_file(tensors, weights, metadata={"format": "pt"})
    changed = {"pretrained_prior_model_name_or_path": str(prior)}
    assert missing(foretold(source, cache, oracle, **changed)) == {"text": 7}
    result = build(source, cache, oracle, **changed)
    assert encoded(result) == {"text": 7}
    [note] = [note for note in result.notes if "another recipe" in note]
    assert "text in the cache is of another recipe" in note
    assert "weights: " in note
    assert "config" not in note


@pytest.mark.parametrize(
    ("change", "tables"),
    [
        ({"alpha": "drop"}, {"image_embeds": 7, "latents-64": 6}),
        ({"dtype": "float16"}, {"image_embeds": 7, "latents-64": 6, "text": 7}),
        ({"mixed_precision": "bf16"}, {"image_embeds": 7, "latents-64": 6, "text": 7}),
        ({"batch_size": 2}, {"image_embeds": 7, "latents-64": 6, "text": 7}),
        ({"rows_per_shard": 2}, {}),
        ({"num_workers": 1}, {}),
    ],
)
def test_each_setting_invalidates_what_it_decides(
    built: tuple[Path, Path], oracle: Path, change: dict[str, object], tables: dict[str, int]
) -> None:
    assert missing(foretold(*built, oracle, **change)) == tables


def test_bad_inputs_cost_themselves_and_are_named(source: Path, oracle: Path, tmp_path: Path) -> None:
    (source / "img_01.png").write_bytes((source / "img_01.png").read_bytes()[:200])
    (source / "img_03.png").write_bytes(b"")
    (source / "img_04.txt").unlink()
    (source / "lonely.txt").write_text("a caption without a picture")
    result = build(source, tmp_path / "cache", oracle)
    assert (result.samples, result.rejected) == (3, 4)
    lines = [json.loads(line) for line in (tmp_path / "cache" / "rejected.jsonl").read_text().splitlines()]
    assert [(line["name"], line["stage"]) for line in lines] == [
        ("img_01.png", "decode"),
        ("img_03.png", "decode"),
        ("img_04.png", "source"),
        ("lonely.txt", "source"),
    ]
    assert all(line["reason"] for line in lines)


def test_rejected_inputs_are_tried_again_only_when_asked(
    copies: tuple[Path, Path], oracle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, cache = copies
    (source / "img_01.png").write_bytes(b"no picture")
    build(source, cache, oracle)
    tried: list[bytes] = []
    decode = PictureEncoder.picture
    monkeypatch.setattr(PictureEncoder, "picture", lambda self, content: tried.append(content) or decode(self, content))
    build(source, cache, oracle)
    assert tried == []
    assert build(source, cache, oracle, retry_rejected=True).rejected == 1
    assert tried == [b"no picture"] * 2  # for image_embeds and for latents


def test_values_beyond_float16_are_refused_by_name(source: Path, oracle: Path, tmp_path: Path) -> None:
    prior = Path(shutil.copytree(oracle / "prior", tmp_path / "prior"))
    weights = prior / "image_encoder" / "model.safetensors"
    tensors = load_file(weights)
    tensors["visual_projection.weight"] = tensors["visual_projection.weight"] * 1e6
    save_file(tensors, weights, metadata={"format": "pt"})
    changes = {"dtype": "float16", "stage": "decoder", "pretrained_prior_model_name_or_path": str(prior)}
    with pytest.raises(SourceError, match=r"6 × encode: image_embeds holds .*, more than float16 can"):
        build(source, tmp_path / "cache", oracle, **changes)
    record = json.loads(next((tmp_path / "cache").glob("image_embeds-*/00000.json")).read_bytes())
    assert {entry["stage"] for entry in record["rejected"]} == {"encode"}
    assert "more than float16 can; build with --dtype float32" in record["rejected"][0]["reason"]


def test_a_decoder_cache_needs_no_captions(source: Path, oracle: Path, tmp_path: Path) -> None:
    for caption in source.glob("*.txt"):
        caption.unlink()
    result = build(source, tmp_path / "cache", oracle, stage="decoder")
    assert encoded(result) == {"image_embeds": 7, "latents-64": 6}
    assert result.samples == 6
    with pytest.raises(SourceError, match="caption"):
        build(source, tmp_path / "other", oracle, stage="prior")


def test_only_one_process_writes(copies: tuple[Path, Path], oracle: Path) -> None:
    source, cache = copies
    with exclusive(cache), pytest.raises(CacheBusyError, match="in use by another process"):
        build(source, cache, oracle)


def test_foreign_folders_are_left_alone(source: Path, oracle: Path, tmp_path: Path) -> None:
    with pytest.raises(CacheMismatchError, match="is not empty and not a cache"):
        build(source, source, oracle)
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheMismatchError, match="is a file"):
        build(source, tmp_path / "file", oracle)


def test_no_cache_is_begun_inside_of_another_one(
    copies: tuple[Path, Path], oracle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, cache = copies
    monkeypatch.chdir(cache)
    for inside in (cache / "more" / "inside", Path("inside")):
        with pytest.raises(CacheMismatchError, match=rf"inside is inside of the cache {cache}, .* give another folder"):
            build(source, inside, oracle)
    with pytest.raises(CacheMismatchError, match="is inside of the cache"):
        convert_cache(cache, cache / "inside", "zarr")
    (tmp_path / "manifest.json").write_text('{"name": "a program of the web", "schema_version": 9}')
    check_target(tmp_path / "beside")


def test_a_resolution_that_does_not_divide_is_refused(source: Path, oracle: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="60"):
        build(source, tmp_path / "cache", oracle, resolution=(60,))
    assert not (tmp_path / "cache").exists()


def test_a_lost_shard_is_encoded_again(copies: tuple[Path, Path], oracle: Path, form: str) -> None:
    source, cache = copies
    before = digests(cache)
    [record, *_] = sorted([*cache.glob("latents-64-*/00000.json"), *cache.glob("samples-*/00000.json")])
    record.unlink()
    lost = {"latents-64": 6} if form == "zarr" else {"image_embeds": 6, "text": 6, "latents-64": 6}
    assert encoded(build(source, cache, oracle)) == lost
    assert digests(cache) == before


def test_shards_are_cut_by_rows_and_hold_the_same(built: tuple[Path, Path], oracle: Path, tmp_path: Path) -> None:
    source, cache = built
    result = build(source, tmp_path / "cut", oracle, rows_per_shard=2)
    cut = Cache.open(tmp_path / "cut")
    shards = {"image_embeds": 4, "text": 4, "latents-64": 3}
    assert {name: len(entry.shards) for name, entry in cut.manifest.tables.items()} == shards
    assert cut.fingerprint == Cache.open(cache).fingerprint
    fields = ["image_embeds", "latents", "text_embeds", "text_encoder_hidden_states"]
    whole = Cache.open(cache).read(range(6), fields)
    for name, rows in cut.read(range(6), fields).items():
        np.testing.assert_allclose(rows, whole[name], rtol=0, atol=1e-6)
    assert result.samples == 6


def test_the_bytes_do_not_depend_on_threads(built: tuple[Path, Path], oracle: Path, tmp_path: Path) -> None:
    source, cache = built
    build(source, tmp_path / "again", oracle, num_workers=1)
    assert digests(tmp_path / "again") == digests(cache)


def test_a_cache_can_be_moved(copies: tuple[Path, Path], tmp_path: Path) -> None:
    _, cache = copies
    before = Cache.open(cache).read([0], ["latents"])["latents"]
    moved = cache.rename(tmp_path / "moved")
    assert (Cache.open(moved).read([0], ["latents"])["latents"] == before).all()
