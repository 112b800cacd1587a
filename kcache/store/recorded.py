"""The settings that a cache was built with, and the command that adds to it what it lacks."""

import shlex
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kcache.config import COMPUTE_DTYPES, BuildConfig
from kcache.config.build import DEFAULT_RESOLUTION
from kcache.config.shapes import resolutions_of
from kcache.config.source import flag_of
from kcache.places import Place
from kcache.store.manifest import Manifest
from kcache.store.recipe import KINDS, LATENTS, LOSS_MASKS, is_control, kind_of, stage_of

MODEL_SETTINGS = {
    "prior": "pretrained_prior_model_name_or_path",
    "decoder": "pretrained_decoder_model_name_or_path",
}
"""The setting, of a build and of a run, that names the repository of each role of `models`."""
_BUILD_FLAGS = (
    "stage", "format", *MODEL_SETTINGS.values(), "dtype", "mixed_precision", "batch_size", "alpha", "text_padding",
    "resolution",
)  # fmt: skip
"""What decides which tables a build makes, and their recipes."""


def recorded_config(manifest: Manifest) -> BuildConfig:
    """The settings behind the recipes of a manifest, as far as one set of settings can have made them all.

    Shapes and mirrored pictures are not among them: a build that is not told of any keeps those that its cache has.
    """
    # Of control images nothing is recorded: their recipes hold whatever the settings are.
    recipes = [entry.recipe for name, entry in manifest.tables.items() if kind_of(name).per != "control"]
    alphas = [recipe.preprocess["alpha"] for recipe in recipes if "alpha" in recipe.preprocess]
    precisions = {dtype: name for name, dtype in COMPUTE_DTYPES.items()}
    settings: dict[str, Any] = {
        "stage": stage_of(manifest.tables),
        "format": manifest.format,
        "resolution": tuple(resolutions_of(manifest.shape_sets)) or DEFAULT_RESOLUTION,
        "alpha": alphas[0] if alphas else BuildConfig.alpha,
        "color": "srgb" if any(r.preprocess.get("color") == "srgb" for r in recipes) else "as-is",
        "text_padding": "trimmed" if any("pad_to_multiple_of" in r.preprocess for r in recipes) else "full",
        **{MODEL_SETTINGS[role]: model["name"] for role, model in manifest.models.items()},
    }
    for recipe in recipes[:1]:
        settings |= {
            "dtype": recipe.stored_dtype,
            "mixed_precision": precisions.get(recipe.compute_dtype, "no"),
            "batch_size": recipe.batch_shape[0],
        }
    return BuildConfig(**settings)


def build_line(
    folder: Place, manifest: Manifest, field: str, resolution: int | None = None, *, more: Sequence[str] = ()
) -> str:
    """The command that adds the table of `field`, with the settings that the cache at `folder` was built with.

    `more` are flags that it has beside these.
    """
    asked = [name for name in (field, field.replace("_", "-", 1)) if is_control(name)]
    beside = LATENTS.fields[0] if asked else field
    tables = [*manifest.tables, *(kind.name for kind in KINDS if beside in kind.fields)]
    # A resolution that is named joins those that there are; flags of shapes are for all that are named.
    had = [] if more and resolution is not None else resolutions_of(manifest.shape_sets)
    sides = {*had, *([] if resolution is None else [resolution])}
    stage = stage_of(tables)
    config = replace(recorded_config(manifest), stage=stage, resolution=tuple(sorted(sides)) or DEFAULT_RESOLUTION)
    words = ["kcache", "cache-build", "SOURCE", str(folder)]
    for name in _BUILD_FLAGS:
        value = getattr(config, name)
        if value != getattr(BuildConfig, name):
            for given in value if isinstance(value, tuple) else (value,):
                words += ["--" + name.replace("_", "-"), str(given)]
    return shlex.join([*words, *_control_words(manifest, asked), *more])


def _control_words(manifest: Manifest, asked: Sequence[str]) -> list[str]:
    """The flags that say where control images are: of the kinds that the cache holds, and of those `asked` for."""
    words: list[str] = []
    for name in sorted({*manifest.wants.controls, *asked}):
        recipes = [entry.recipe for table, entry in manifest.tables.items() if kind_of(table).name == name]
        if name == LOSS_MASKS and any(recipe.preprocess["from"] == "alpha" for recipe in recipes):
            words.append("--loss-mask-alpha")
        else:
            words += flag_of(name).partition(" or ")[0].split()
    return words
