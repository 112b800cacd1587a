"""Each choice that decides a table's bytes is in its recipe, and nothing else is."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kcache.config import BuildConfig, Stage
from kcache.disk.memo import DigestMemo
from kcache.encoders.recipes import default_rows_per_shard, table_recipe
from kcache.encoders.repositories import Repository
from kcache.errors import ConfigError, ModelError
from kcache.store.recipe import (
    LATENTS,
    SHARD_FOLDER,
    TABLE_NAME,
    Field,
    Recipe,
    components,
    kind_of,
    recipe_differences,
    shape_of,
    sides_of,
    table_name,
    table_names,
)

TABLES = ("image_embeds", "text", "latents-64")
TINY = BuildConfig(resolution=(64,), batch_size=4)


@pytest.fixture
def models(oracle: Path, tmp_path: Path) -> Path:
    """A copy of the tiny pair, to be changed."""
    shutil.copytree(oracle, tmp_path / "models")
    return tmp_path / "models"


def recipe_of(table: str, models: Path, config: BuildConfig = TINY) -> Recipe:
    role = kind_of(table).role
    with DigestMemo(models / "digests.sqlite") as memo:
        return table_recipe(table, config, Repository(name=role, path=models / role, revision=None), memo)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("stage", "tables", "prior", "decoder"),
    [
        ("prior", ("image_embeds", "text"), 4, ()),
        ("decoder", ("image_embeds", "latents-768", "latents-512"), 2, ("movq",)),
        ("all", ("image_embeds", "text", "latents-768", "latents-512"), 4, ("movq",)),
    ],
)
def test_a_stage_has_its_tables(stage: Stage, tables: tuple[str, ...], prior: int, decoder: tuple[str, ...]) -> None:
    assert table_names(stage, ((768, 768), (512, 512), (768, 768))) == tables
    assert len(components("prior", stage)) == prior
    assert components("decoder", stage) == decoder


def test_shapes_are_read_from_the_configurations(oracle: Path) -> None:
    image, text, latents = (recipe_of(table, oracle) for table in TABLES)
    assert (image.batch_shape, image.fields) == ((4, 3, 224, 224), (Field(name="image_embeds", shape=(32,)),))
    assert text.batch_shape == (4, 77)
    assert text.fields == (
        Field(name="text_embeds", shape=(32,)),
        Field(name="text_encoder_hidden_states", shape=(32,), ragged=True),
    )
    assert (latents.batch_shape, latents.fields) == ((4, 3, 64, 64), (Field(name="latents", shape=(4, 8, 8)),))


def test_a_shape_that_is_no_square_says_so_in_its_recipe_alone(oracle: Path) -> None:
    square, tall = recipe_of("latents-64", oracle), recipe_of("latents-96x48", oracle)
    assert (tall.batch_shape, tall.fields) == ((4, 3, 96, 48), (Field(name="latents", shape=(4, 12, 6)),))
    differences = [line for line in recipe_differences(square, tall) if not line.startswith("fields: ")]
    assert differences == [
        "batch_shape: [4,3,64,64] → [4,3,96,48]",
        "preprocess.center_crop: short side → ratio 96:48",
        "table: latents-64 → latents-96x48",
    ]
    assert Recipe.from_json(json.loads(json.dumps(tall.to_json()))) == tall
    assert SHARD_FOLDER.fullmatch(tall.directory)
    with pytest.raises(ConfigError, match=r"--aspect-ratio-buckets has 96,44; expected multiples of 16, as .*nearest"):
        recipe_of("latents-96x44", oracle)


def test_names_of_tables_say_their_shapes() -> None:
    for name, shape in (("latents-768", (768, 768)), ("latents-640x896", (640, 896))):
        assert shape_of(name) == shape
        assert table_name(LATENTS, shape) == name
        assert TABLE_NAME.fullmatch(name)
    assert shape_of("text") is None
    assert sides_of(["latents-640x896", "latents-768", "latents-512", "image_embeds", "samples"]) == [512, 768]
    assert not any(TABLE_NAME.fullmatch(f"latents-{shape}") for shape in ("640x", "x896", "0x64", "64x064", "1x2x3"))


def test_only_trimmed_captions_are_told_of_in_the_recipe(oracle: Path) -> None:
    """Recipes of padded captions, and with them the fingerprints of caches in the world, are as they were."""
    padded, trimmed = (recipe_of("text", oracle, replace(TINY, text_padding=how)) for how in ("full", "trimmed"))
    assert set(padded.preprocess) == {"tokenizer", "padding", "truncation", "attention_mask"}
    assert padded.preprocess["padding"] == "max_length"
    assert recipe_differences(padded, trimmed) == [
        "preprocess.pad_to_multiple_of: null → 8",
        "preprocess.padding: max_length → own length",
    ]


def test_other_networks_give_other_shapes(models: Path) -> None:
    edit_json(models / "prior" / "image_encoder" / "config.json", projection_dim=1280)
    edit_json(models / "decoder" / "movq" / "config.json", vq_embed_dim=None, latent_channels=6)
    edit_json(models / "decoder" / "movq" / "config.json", block_out_channels=[32, 32, 64])
    assert recipe_of("image_embeds", models).fields[0].shape == (1280,)
    assert recipe_of("latents-64", models).fields[0].shape == (6, 16, 16)


@pytest.mark.parametrize("table", TABLES)
def test_a_recipe_survives_json(oracle: Path, table: str) -> None:
    recipe = recipe_of(table, oracle)
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))).fingerprint == recipe.fingerprint


@pytest.mark.parametrize(
    ("change", "tables"),
    [
        ({"alpha": "drop"}, {"image_embeds", "latents-64"}),
        ({"text_padding": "trimmed"}, {"text"}),
        ({"batch_size": 5}, set(TABLES)),
        ({"mixed_precision": "bf16"}, set(TABLES)),
        ({"dtype": "float32"}, set(TABLES)),
        ({"resolution": (64, 128)}, set()),
        ({"image_column": "picture", "num_workers": 3, "rows_per_shard": 7, "device": "cpu", "rehash": True}, set()),
    ],
)
def test_a_setting_changes_the_recipes_that_it_concerns(oracle: Path, change: dict[str, Any], tables: set[str]) -> None:
    other = replace(TINY, **change)
    changed = {t for t in TABLES if recipe_of(t, oracle, other).fingerprint != recipe_of(t, oracle).fingerprint}
    assert changed == tables


@pytest.mark.parametrize(
    ("file", "change", "table", "difference"),
    [
        (
            "prior/image_processor/preprocessor_config.json",
            {"resample": 2},
            "image_embeds",
            "preprocess.processor.resample",
        ),
        ("prior/image_encoder/config.json", {"hidden_act": "relu"}, "image_embeds", "config"),
        ("prior/tokenizer/tokenizer_config.json", {"do_lower_case": False}, "text", "preprocess.tokenizer"),
        ("decoder/movq/config.json", {"act_fn": "gelu"}, "latents-64", "config"),
    ],
)
def test_a_changed_network_changes_its_table_only(
    models: Path, file: str, change: dict[str, Any], table: str, difference: str
) -> None:
    before = {name: recipe_of(name, models) for name in TABLES}
    edit_json(models / file, **change)
    differences = {name: recipe_differences(before[name], recipe_of(name, models)) for name in TABLES}
    assert [name for name in TABLES if differences[name]] == [table]
    assert differences[table][0].startswith(f"{difference}: ")


def test_a_processor_is_the_same_in_its_old_spelling(models: Path) -> None:
    before = recipe_of("image_embeds", models)
    path = models / "prior" / "image_processor" / "preprocessor_config.json"
    old = {"size": 224, "crop_size": 224, "resample": 3, "feature_extractor_type": "CLIPFeatureExtractor"}
    path.write_text(json.dumps(old))
    assert recipe_of("image_embeds", models).fingerprint == before.fingerprint


@pytest.mark.parametrize("side", [63, 72, 60])
def test_a_resolution_that_the_networks_cannot_take_is_refused_with_good_ones(oracle: Path, side: int) -> None:
    # MoVQ divides by 8, the tiny UNet by another 2.
    below, above = side // 16 * 16, side // 16 * 16 + 16
    with pytest.raises(ConfigError, match=rf"multiple of 16, .*: {below} and {above}"):
        recipe_of(f"latents-{side}", oracle)


def test_without_a_unet_only_movq_limits_the_resolution(models: Path) -> None:
    shutil.rmtree(models / "decoder" / "unet")
    assert recipe_of("latents-72", models).fields[0].shape == (4, 9, 9)
    with pytest.raises(ConfigError, match=r"nearest such values: 8$"):
        recipe_of("latents-3", models)


@pytest.mark.parametrize(
    ("file", "change", "table"),
    [
        ("prior/image_encoder/config.json", {"projection_dim": None}, "image_embeds"),
        ("prior/image_encoder/config.json", {"image_size": 336}, "image_embeds"),
        ("prior/image_processor/preprocessor_config.json", {"do_center_crop": False}, "image_embeds"),
        ("prior/tokenizer/tokenizer_config.json", {"model_max_length": 10**30}, "text"),
        ("prior/text_encoder/config.json", {"hidden_size": "wide"}, "text"),
        ("decoder/movq/config.json", {"block_out_channels": []}, "latents-64"),
    ],
)
def test_networks_that_do_not_fit_are_refused(models: Path, file: str, change: dict[str, Any], table: str) -> None:
    edit_json(models / file, **change)
    with pytest.raises(ModelError):
        recipe_of(table, models)


@pytest.mark.parametrize("table", TABLES)
def test_a_shard_is_about_256_megabytes(oracle: Path, table: str) -> None:
    recipe = recipe_of(table, oracle)
    row = {"image_embeds": 32 * 2, "text": (32 + 16 * 32) * 2, "latents-64": 4 * 8 * 8 * 2}[table]
    rows = default_rows_per_shard(recipe)
    assert rows % 64 == 0
    assert 256e6 - 64 * row < rows * row <= 256e6


def test_a_huge_row_still_fills_a_chunk(oracle: Path) -> None:
    recipe = replace(recipe_of("latents-64", oracle), fields=(Field(name="latents", shape=(4, 4096, 4096)),))
    assert default_rows_per_shard(recipe) == 64


CONTROLS = ("hint-own-64", "hint-own-48x80", "masks-64", "loss_masks-64")


@pytest.mark.parametrize("table", CONTROLS)
def test_control_images_are_the_same_whatever_networks_run_in(oracle: Path, table: str) -> None:
    """Settings of encoders, and how transparent pictures are taken, decide nothing of them."""
    recipe, others = recipe_of(table, oracle), {"mixed_precision": "bf16", "dtype": "float32", "alpha": "drop"}
    assert recipe_of(table, oracle, replace(TINY, batch_size=7, **others)) == recipe  # type: ignore[arg-type]
    assert (recipe.stored_dtype, recipe.weights, recipe.config) == ("uint8", "", "")
    alpha = recipe_of(table, oracle, replace(TINY, loss_mask_alpha=True))
    assert (alpha == recipe) == (table != "loss_masks-64")
    assert 0 < default_rows_per_shard(recipe, recipe_of("latents-64", oracle)) <= default_rows_per_shard(recipe)


def test_recipes_need_no_torch() -> None:
    code = (
        "import sys, kcache.encoders.recipes; sys.exit(bool({'torch', 'transformers', 'diffusers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
