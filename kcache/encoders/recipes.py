"""The recipe of each table, decided by the networks and the build's settings."""

import math
from dataclasses import replace
from typing import Any

from kcache.config import BuildConfig, Say, unheard
from kcache.config.shapes import Shape
from kcache.disk.memo import DigestMemo
from kcache.encoders.color import INTENT
from kcache.encoders.repositories import COMPONENTS, Configuration, Repository
from kcache.encoders.tokenizers import tokenizer_digest
from kcache.encoders.weights import weights_digest
from kcache.errors import ConfigError, ModelError
from kcache.store.controls.packed import packed_field
from kcache.store.recipe import IMAGE_EMBEDS, LATENTS, LOSS_MASKS, MASKS, Field, Recipe, kind_of, shape_of

MAX_PIXELS = 64_000_000
"""Pictures with more pixels are decoded one at a time, where they are let in: 64 Mpx of RGB take 192 MB in memory."""
MAX_ASPECT_RATIO = 100
"""Images longer than this many times their width are rejected: resizing the short side to 224 would blow them up."""

CONTROL = "packing"
"""What stands for the network in the recipe of a table of control images, which has none."""
_SHARD_BYTES = 256_000_000
_ROWS_PER_CHUNK = 64
_TOKENS = 16
_TRIMMED_MULTIPLE = 8
"""Captions of up to 77 tokens fall into 10 lengths; what half-precision matrix products are fast at, too."""


def table_recipe(
    table: str,
    config: BuildConfig,
    repository: Repository,
    memo: DigestMemo,
    rehash: bool = False,
    say: Say = unheard,
    *,
    known: Recipe | None = None,
) -> Recipe:
    """The recipe of a table under the settings given, its encoder in `repository`.

    Where no `color` is given it is that of numbers as they are, see `in_srgb`. `known` is the recipe that the table has
    so far: what names there the same content by other digests is kept. `say` is told of large files that have to be
    digested. Raises ConfigError for a shape that the networks cannot take, ModelError for repositories that do not
    fit.
    """
    kind, shape = kind_of(table), shape_of(table)
    if kind.per == "control" and shape is not None:
        return _control_recipe(table, shape, config, repository)
    network = repository.read(kind.component)
    if kind == LATENTS and shape is not None:
        preprocess, sample_shape, fields = _latents(shape, config, network)
    elif kind == IMAGE_EMBEDS:
        preprocess, sample_shape, fields = _image_embeds(config, network)
    else:
        recorded = None if known is None else known.preprocess.get("tokenizer")
        preprocess, sample_shape, fields = _text(config, network, recorded)
    weights = None if known is None else known.weights
    recipe = Recipe(
        table=table,
        encoder=str(COMPONENTS[kind.component].class_name),
        weights=weights_digest(repository, kind.component, memo, rehash, say, known=weights),
        config=network.digest,
        preprocess=preprocess,
        compute_dtype=config.compute_dtype,
        batch_shape=(config.batch_size, *sample_shape),
        stored_dtype=config.dtype,
        fields=fields,
    )
    return in_srgb(recipe) if config.color == "srgb" else recipe


def in_srgb(recipe: Recipe) -> Recipe:
    """The recipe of the same table with colours converted to sRGB; of captions the recipe itself.

    That numbers are taken as they are stands in no recipe: those are as old as the format, and conversion is not.
    """
    if kind_of(recipe.table).per != "image":
        return recipe
    return replace(recipe, preprocess={**recipe.preprocess, "color": "srgb", "color_intent": INTENT})


def default_rows_per_shard(*recipes: Recipe) -> int:
    """Rows that make a shard of about 256 MB: a multiple of 64, the rows of one chunk.

    Of several recipes it is samples of a tar, which have a row of each. A row of text counts as 16 tokens, what
    captions of a dozen words have.
    """
    return max(_SHARD_BYTES // (sum(map(_row_bytes, recipes)) * _ROWS_PER_CHUNK), 1) * _ROWS_PER_CHUNK


def _row_bytes(recipe: Recipe) -> int:
    """About what a row takes."""
    if recipe.encoder == CONTROL:
        return int(mean_tokens(recipe, 0.0) * math.prod(recipe.fields[0].shape))
    itemsize = {"float16": 2, "float32": 4}[recipe.stored_dtype]
    return itemsize * sum(math.prod(field.shape) * (_TOKENS if field.ragged else 1) for field in recipe.fields)


def mean_tokens(recipe: Recipe, of_text: float) -> float:
    """About how many tokens a ragged row of a table has, `of_text` being those of captions.

    Packed images count as greys, or masks of 1 bit, of half the size that they have unpacked.
    """
    if recipe.encoder != CONTROL:
        return of_text
    pixels = math.prod(recipe.batch_shape[2:]) // recipe.preprocess["cells"] ** 2
    packed = pixels // (16 if kind_of(recipe.table).name == MASKS else 2)
    return float(-(-packed // recipe.fields[0].shape[0]))


_KEPT = {MASKS: "kept where no pixel of the latent is white", LOSS_MASKS: "mean of the latent's pixels"}
"""What is made of the pixels of control images that are brought to the size of the latents."""


def _control_recipe(table: str, shape: Shape, config: BuildConfig, decoder: Repository) -> Recipe:
    """That of a table of control images: no network is in it, nor anything that only decides how one runs."""
    kind, factor = kind_of(table).name, decoder.read("movq").downsampling
    _check_shape(shape, factor, decoder)
    preprocess = {
        **_decoding(config),
        "alpha": "black",
        "from": "alpha" if kind == LOSS_MASKS and config.loss_mask_alpha else "image",
        "size": [*shape],
        "center_crop": "short side" if shape[0] == shape[1] else f"ratio {shape[0]}:{shape[1]}",
        "resample": "bicubic",
        "reducing_gap": 1,
        "cells": factor if kind in _KEPT else 1,
        "row": _KEPT.get(kind, "greys or RGB"),
        "packed": "png",
    }
    return Recipe(
        table=table,
        encoder=CONTROL,
        weights="",
        config="",
        preprocess=preprocess,
        compute_dtype="float32",
        batch_shape=(1, 3, *shape),
        stored_dtype="uint8",
        fields=(packed_field(kind),),
    )


_Parts = tuple[dict[str, Any], tuple[int, ...], tuple[Field, ...]]
"""Preprocessing, shape of one input, fields of one row."""


def _image_embeds(config: BuildConfig, network: Configuration) -> _Parts:
    prior = network.repository
    processor = processor_settings(prior)
    side, width = network.whole_number("image_size"), network.whole_number("projection_dim")
    output = processor["crop_size"] if processor["do_center_crop"] else processor["size"]
    if output != {"height": side, "width": side}:
        raise ModelError(f"{prior.name}: image_processor makes images of {output}; image_encoder expects {side}×{side}")
    preprocess = {**_decoding(config), "processor": processor}
    return preprocess, (3, side, side), (Field(name="image_embeds", shape=(width,)),)


def _text(config: BuildConfig, network: Configuration, known: str | None) -> _Parts:
    prior = network.repository
    positions = network.whole_number("max_position_embeddings")
    length = prior.read("tokenizer").whole_number("model_max_length")
    if length > positions:
        raise ModelError(f"{prior.name}: tokenizer makes {length} tokens; text_encoder has {positions} positions")
    padding: dict[str, Any] = {"padding": "max_length"}
    if config.text_padding != "full":
        # By a caption's own length and not by the longest in its batch: a row must not depend on its companions.
        padding = {"padding": "own length", "pad_to_multiple_of": _TRIMMED_MULTIPLE}
    preprocess = {
        "tokenizer": tokenizer_digest(prior, known=known),
        **padding,
        "truncation": True,
        # As in the upstream scripts: the mask only says which states are of the caption.
        "attention_mask": None,
    }
    fields = (
        Field(name="text_embeds", shape=(network.whole_number("projection_dim"),)),
        Field(name="text_encoder_hidden_states", shape=(network.whole_number("hidden_size"),), ragged=True),
    )
    return preprocess, (length,), fields


def _latents(shape: Shape, config: BuildConfig, network: Configuration) -> _Parts:
    (height, width), factor = shape, network.downsampling
    _check_shape(shape, factor, network.repository)
    channels = network.values.get("vq_embed_dim") or network.whole_number("latent_channels")
    preprocess = {
        **_decoding(config),
        "center_crop": "short side" if height == width else f"ratio {height}:{width}",
        "resample": "bicubic",
        "reducing_gap": 1,
        "scale": "x / 127.5 - 1",
    }
    field = Field(name="latents", shape=(channels, height // factor, width // factor))
    return preprocess, (3, height, width), (field,)


def _decoding(config: BuildConfig) -> dict[str, Any]:
    return {
        "backend": "pil",
        "alpha": config.alpha,
        "exif_orientation": "applied",
        "frame": 0,
        "wide_values": "scaled",
        # Decides no row, and is not what --max-pixels says: recipes have had it since before that could be set.
        "max_pixels": MAX_PIXELS,
        "max_aspect_ratio": MAX_ASPECT_RATIO,
    }


def processor_settings(prior: Repository) -> dict[str, Any]:
    """Settings of CLIPImageProcessor, defaults filled in and in one spelling: size 224 is {"shortest_edge": 224}."""
    given = prior.read("image_processor").values
    size, crop = given.get("size", 224), given.get("crop_size", 224)
    return {
        "do_resize": given.get("do_resize", True),
        "size": {"shortest_edge": size} if isinstance(size, int) else size,
        "resample": given.get("resample", 3),
        "do_center_crop": given.get("do_center_crop", True),
        "crop_size": {"height": crop, "width": crop} if isinstance(crop, int) else crop,
        "do_rescale": given.get("do_rescale", True),
        "rescale_factor": given.get("rescale_factor", 1 / 255),
        "do_normalize": given.get("do_normalize", True),
        "image_mean": given.get("image_mean", [0.48145466, 0.4578275, 0.40821073]),
        "image_std": given.get("image_std", [0.26862954, 0.26130258, 0.27577711]),
    }


def side_step(decoder: Repository, factor: int) -> tuple[int, str]:
    """What sides of pictures must be multiples of, in pixels, for a MoVQ that shrinks them `factor` times; and why."""
    step, reason = factor, f"MoVQ shrinks each side {factor} times"
    if (decoder.path / "unet" / "config.json").is_file():
        halvings = decoder.read("unet").downsampling
        step, reason = factor * halvings, f"{reason}, the UNet another {halvings} times"
    return step, reason


def step_of_sides(decoder: Repository) -> int:
    """What sides of pictures must be multiples of, in pixels, for the networks in a decoder's repository."""
    return side_step(decoder, decoder.read("movq").downsampling)[0]


def _check_shape(shape: Shape, factor: int, decoder: Repository) -> None:
    step, reason = side_step(decoder, factor)
    for side in shape:
        if side % step:
            given, what = f"--aspect-ratio-buckets has {shape[0]},{shape[1]}", f"multiples of {step}"
            if shape[0] == shape[1]:
                given, what = f"--resolution is {side}", f"a multiple of {step}"
            below, above = side // step * step, (side // step + 1) * step
            nearest = f"{below} and {above}" if below else f"{above}"
            raise ConfigError(f"{given}; expected {what}, as {reason}; the nearest such values: {nearest}")
