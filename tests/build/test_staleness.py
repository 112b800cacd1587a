"""Staleness: what decides a table's bytes, changed alone, makes exactly that table's rows missing; nothing else does.

Nothing is encoded here but the one cache that all cases look at: what a build would encode is what its plan says.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from small_builds import build, copy_pictures, foretold, missing

import kcache.encoders.tokenizers
from kcache import Cache
from kcache.build.estimate import BuildEstimate
from kcache.config import BuildConfig
from kcache.errors import CacheMismatchError
from kcache.store.recipe import Recipe

pytestmark = pytest.mark.usefixtures("form")

IMAGE, TEXT, LATENTS = {"image_embeds": 4}, {"text": 4}, {"latents-64": 3}
ALL = IMAGE | TEXT | LATENTS
"""The rows of three pictures with a caption each, the reserved ones among them."""

SETTINGS: list[tuple[dict[str, Any], dict[str, int], str]] = [
    ({"alpha": "drop"}, IMAGE | LATENTS, "preprocess.alpha"),
    ({"color": "as-is"}, IMAGE | LATENTS, "preprocess.color preprocess.color_intent"),
    ({"dtype": "float16"}, ALL, "stored_dtype"),
    ({"mixed_precision": "bf16"}, ALL, "compute_dtype"),
    ({"batch_size": 2}, ALL, "batch_shape"),
    ({"text_padding": "trimmed"}, TEXT, "preprocess.pad_to_multiple_of preprocess.padding"),
    ({"resolution": (32,)}, {"latents-32": 3}, ""),
]
"""What is changed in the settings, what is missing then, and which field of the recipes says why."""

HARMLESS: list[dict[str, Any]] = [
    {"stage": "prior"},
    {"max_train_samples": 3},
    {"num_workers": 1},
    {"rows_per_shard": 1},
    {"device": "cpu:0"},
    {"worker": "1/2"},
    {"rehash": True},
    {"retry_rejected": True},
    {"replace": True},
    {"take_over": True},
    {"max_pixels": 100_000},
]
ELSEWHERE = {
    "pretrained_prior_model_name_or_path", "pretrained_decoder_model_name_or_path", "format",
    "revision", "prior_revision", "decoder_revision",
    "image_column", "caption_column", "split", "follow_links", "engine", "address",
    "aspect_ratio_buckets", "max_upscale", "flip",
    "hint_column", "mask_column", "loss_mask_column", "loss_mask_alpha", "weight_column", "repeats_column",
}  # fmt: skip
"""Settings with a test of their own."""


def shift_weights(file: Path) -> None:
    tensors = load_file(file)
    name = min(tensors)
    save_file(tensors | {name: tensors[name] + 1e-3}, file, metadata={"format": "pt"})


def edit(**changes: Any) -> Callable[[Path], None]:
    def apply(file: Path) -> None:
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return apply


def append_line(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"zz zz\n")


def append_newline(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\n")


def remove(file: Path) -> None:
    file.unlink()


def split_weights(file: Path) -> None:
    """The same tensors in two shards."""
    tensors, halves = load_file(file), {"a.safetensors": 0, "b.safetensors": 1}
    parts = {name: dict(list(tensors.items())[half::2]) for name, half in halves.items()}
    for name, part in parts.items():
        save_file(part, file.with_name(name), metadata={"format": "pt", "half": name})
    weight_map = {key: name for name, part in parts.items() for key in part}
    file.with_name(f"{file.name}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    file.unlink()


PROCESSOR = "prior/image_processor/preprocessor_config.json"
TOKENIZER = "prior/tokenizer/tokenizer_config.json"
NETWORKS: list[tuple[str, Callable[[Path], None], dict[str, int], str]] = [
    ("prior/image_encoder/model.safetensors", shift_weights, IMAGE, "weights"),
    ("prior/text_encoder/model.safetensors", shift_weights, TEXT, "weights"),
    ("decoder/movq/diffusion_pytorch_model.safetensors", shift_weights, LATENTS, "weights"),
    ("prior/image_encoder/config.json", edit(layer_norm_eps=1e-6), IMAGE, "config"),
    ("prior/text_encoder/config.json", edit(hidden_act="quick_gelu"), TEXT, "config"),
    ("decoder/movq/config.json", edit(act_fn="gelu"), LATENTS, "config"),
    ("prior/image_encoder/config.json", edit(projection_dim=64), IMAGE, "config fields"),
    ("decoder/movq/config.json", edit(vq_embed_dim=8), LATENTS, "config fields"),
    (PROCESSOR, edit(resample=2), IMAGE, "preprocess.processor.resample"),
    (PROCESSOR, edit(image_mean=[0.5, 0.5, 0.5]), IMAGE, "preprocess.processor.image_mean"),
    (PROCESSOR, edit(image_std=[0.5, 0.5, 0.5]), IMAGE, "preprocess.processor.image_std"),
    (PROCESSOR, edit(rescale_factor=1 / 127.5), IMAGE, "preprocess.processor.rescale_factor"),
    (PROCESSOR, edit(do_rescale=False), IMAGE, "preprocess.processor.do_rescale"),
    (PROCESSOR, edit(do_normalize=False), IMAGE, "preprocess.processor.do_normalize"),
    (PROCESSOR, edit(size={"shortest_edge": 256}), IMAGE, "preprocess.processor.size.shortest_edge"),
    ("prior/tokenizer/vocab.json", edit(another=1), TEXT, "preprocess.tokenizer"),
    ("prior/tokenizer/merges.txt", append_line, TEXT, "preprocess.tokenizer"),
    ("prior/tokenizer/tokenizer.json", edit(normalizer=None), TEXT, "preprocess.tokenizer"),
    ("prior/tokenizer/special_tokens_map.json", edit(unk_token="!"), TEXT, "preprocess.tokenizer"),  # noqa: S106
    (TOKENIZER, edit(do_lower_case=False), TEXT, "preprocess.tokenizer"),
    (TOKENIZER, edit(model_max_length=64), TEXT, "batch_shape preprocess.tokenizer"),
    # What decides no row.
    ("prior/image_encoder/model.safetensors", split_weights, {}, ""),
    ("decoder/movq/diffusion_pytorch_model.safetensors", split_weights, {}, ""),
    ("prior/tokenizer/tokenizer.json", append_newline, {}, ""),
    ("prior/tokenizer/tokenizer.json", remove, {}, ""),
    ("prior/tokenizer/vocab.json", append_newline, {}, ""),
    ("prior/tokenizer/special_tokens_map.json", remove, {}, ""),
    ("prior/image_encoder/config.json", edit(dtype="float16", transformers_version="4.0"), {}, ""),
    (TOKENIZER, edit(name_or_path="/home/x"), {}, ""),
    ("prior/prior/diffusion_pytorch_model.safetensors", shift_weights, {}, ""),
    ("decoder/unet/diffusion_pytorch_model.safetensors", shift_weights, {}, ""),
    ("prior/scheduler/scheduler_config.json", edit(num_train_timesteps=10), {}, ""),
]
"""A file of a pipeline, what is done to it, what is missing then, and which fields of the recipe say why."""


@pytest.fixture(scope="module")
def built(form: str, oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source of three pictures and its cache, which nothing here writes to."""
    folder = tmp_path_factory.mktemp("staleness")
    source = copy_pictures(oracle, folder / "pictures", 3)
    build(source, folder / "cache", oracle)
    return source, folder / "cache"


@pytest.fixture
def models(oracle: Path, tmp_path: Path) -> Path:
    """A copy of both pipelines, to be changed."""
    for part in ("prior", "decoder"):
        shutil.copytree(oracle / part, tmp_path / "models" / part)
    return tmp_path / "models"


def assert_explained(found: BuildEstimate, tables: dict[str, int], differing: str) -> None:
    """Each table's reason names exactly the fields that differ."""
    for name in tables:
        assert re.findall(r"([\w.]+): \S+ → ", found.tables[name].why.replace(", ", ",")) == differing.split()


def test_nothing_is_missing_where_nothing_changed(built: tuple[Path, Path], oracle: Path, models: Path) -> None:
    assert missing(foretold(*built, oracle)) == {}
    assert missing(foretold(*built, models)) == {}  # equal pipelines at another path


@pytest.mark.parametrize(("change", "tables", "differing"), SETTINGS, ids=lambda value: str(value))
def test_a_setting_that_decides_rows_makes_those_missing(
    built: tuple[Path, Path], oracle: Path, change: dict[str, Any], tables: dict[str, int], differing: str
) -> None:
    found = foretold(*built, oracle, **change)
    assert missing(found) == tables
    assert_explained(found, tables, differing)


@pytest.mark.parametrize("change", HARMLESS, ids=lambda change: next(iter(change)))
def test_any_other_setting_makes_nothing_missing(
    built: tuple[Path, Path], oracle: Path, change: dict[str, Any]
) -> None:
    assert missing(foretold(*built, oracle, **change)) == {}


@pytest.mark.parametrize(("file", "change", "tables", "differing"), NETWORKS)
def test_a_changed_file_of_a_pipeline_makes_its_table_missing(
    built: tuple[Path, Path],
    models: Path,
    file: str,
    change: Callable[[Path], None],
    tables: dict[str, int],
    differing: str,
) -> None:
    change(models / file)
    found = foretold(*built, models)
    assert missing(found) == tables
    assert_explained(found, tables, differing)


def test_a_cache_whose_recipes_name_files_goes_on(
    form: str, oracle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As recipes did before they named contents: nothing is encoded again."""
    source = copy_pictures(oracle, tmp_path / "pictures", 3)
    shutil.copytree(oracle, tmp_path / "models")
    movq = tmp_path / "models/decoder/movq/diffusion_pytorch_model.safetensors"
    save_file(load_file(movq), movq, metadata={"format": "pt", "saved by": "something else"})
    of_file, tokens = hashlib.sha256(movq.read_bytes()).hexdigest(), "0" * 64
    with monkeypatch.context() as patch:
        patch.setattr("kcache.encoders.weights._of_tensors", lambda files, digests: digests[files[0].name])
        patch.setattr("kcache.encoders.tokenizers._tokenizer", lambda *_: tokens)
        build(source, tmp_path / "cache", tmp_path / "models")
    cache = Cache.open(tmp_path / "cache")
    assert cache.recipes["latents-64"].weights == of_file
    recorded = cache.recipes["text"].preprocess["tokenizer"]
    real = kcache.encoders.tokenizers.json_digest
    monkeypatch.setattr(
        "kcache.encoders.tokenizers.json_digest", lambda value: recorded if "files" in value else real(value)
    )
    assert missing(foretold(source, tmp_path / "cache", tmp_path / "models")) == {}


def test_the_limit_on_the_form_of_pictures_decides_what_is_made_of_them(
    built: tuple[Path, Path], oracle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kcache.encoders.recipes.MAX_ASPECT_RATIO", 50)
    found = foretold(*built, oracle)
    assert missing(found) == IMAGE | LATENTS
    assert_explained(found, IMAGE | LATENTS, "preprocess.max_aspect_ratio")


def test_another_schema_or_form_is_refused_rather_than_taken_for_fresh(
    built: tuple[Path, Path], oracle: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = {"zarr": "webdataset", "webdataset": "zarr"}[form]
    with pytest.raises(CacheMismatchError, match=f"is a {form} cache; --format {other} was asked for"):
        foretold(*built, oracle, format=other)
    monkeypatch.setattr("kcache.store.manifest.SCHEMA_VERSIONS", (3, 4))
    with pytest.raises(CacheMismatchError, match="has schema version 2; this kcache reads 3 and 4"):
        foretold(*built, oracle)


def test_every_field_of_a_recipe_and_every_setting_has_a_case() -> None:
    named = " ".join([case[-1] for case in SETTINGS] + [case[-1] for case in NETWORKS]).split()
    # A table is known by its name, which says the encoder; another schema is refused.
    assert {path.partition(".")[0] for path in named} == {f.name for f in fields(Recipe)} - {
        "table", "encoder", "schema_version"
    }  # fmt: skip
    changed = [name for case in SETTINGS for name in case[0]] + [name for case in HARMLESS for name in case]
    assert {*changed, *ELSEWHERE} == {field.name for field in fields(BuildConfig)}
