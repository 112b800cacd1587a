"""A finished cache of random rows, written without encoders: for measuring and testing what reads caches."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kcache.build.finish import finish_cache
from kcache.build.plan import plan_table
from kcache.config.shapes import ShapeSet, square_set
from kcache.store.digests import caption_key, content_key, pack_keys
from kcache.store.index import table_state
from kcache.store.manifest import Manifest
from kcache.store.recipe import IMAGE_EMBEDS, LATENTS, TEXT, Field, Recipe, kind_of, shape_of
from kcache.store.samples import Refusal, Sample, with_ids
from kcache.store.shaped.wants import Wants, in_order, tables_of
from kcache.store.shards import RowBlock, commit_shard


def synthetic_recipe(table: str, fields: tuple[Field, ...], dtype: str) -> Recipe:
    """A recipe for rows that no encoder made; captions would have 77 tokens at most."""
    return Recipe(
        table=table, encoder="Random", weights="0" * 64, config="0" * 64, preprocess={},
        compute_dtype="float32", batch_shape=(1, 77) if table == TEXT.name else (1,), stored_dtype=dtype, fields=fields,
    )  # fmt: skip


def write_synthetic_cache(
    folder: Path,
    samples: int,
    *,
    dim: int = 1280,
    latent_side: int = 96,
    tables: tuple[str, ...] = ("image_embeds", "text", "latents"),
    dtype: str = "float16",
    rows_per_shard: int = 3456,
    captions: int = 1,
    seed: int = 0,
    refused: Sequence[Refusal] = (),
    sets: Sequence[ShapeSet] | None = None,
    sizes: Sequence[tuple[int, int]] = ((1, 1),),
    flip: bool = False,
    counts: Sequence[tuple[float, int]] = ((1.0, 1),),
) -> Manifest:
    """Write `samples` samples of random normal rows; captions have 4 to 30 tokens. Returns the manifest.

    Latents are of `sets`, None being the square of `latent_side`, an eighth as high and wide as the pictures. `sizes`,
    widths and heights, are those of the samples' pictures, over and over; `flip` makes rows of their mirror images.
    `counts` are weights and repeats of the samples, over and over.
    """
    folder.mkdir(parents=True)
    rows = with_ids([_sample(i, captions, *sizes[i % len(sizes)], *counts[i % len(counts)]) for i in range(samples)])
    wants = Wants(in_order([square_set(latent_side * 8)] if sets is None else sets), flip)
    rng = np.random.default_rng(seed)
    fields = {
        IMAGE_EMBEDS: (Field(name="image_embeds", shape=(dim,)),),
        TEXT: (
            Field(name="text_embeds", shape=(dim,)),
            Field(name="text_encoder_hidden_states", shape=(dim,), ragged=True),
        ),
    }
    states = {}
    kinds = list(map(kind_of, tables))
    for name in [
        *(kind.name for kind in kinds if not kind.sided),
        *(tables_of(wants.sets) if LATENTS in kinds else []),
    ]:
        height, width = shape_of(name) or (0, 0)
        latents = (Field(name="latents", shape=(4, height // 8, width // 8)),)
        recipe = synthetic_recipe(name, fields.get(kind_of(name), latents), dtype)
        table = folder / recipe.directory
        table.mkdir()
        plan = plan_table(recipe, wants.wanted(name, rows), (), (), rows_per_shard=rows_per_shard, first_shard=0)
        for shard in plan.shards:
            block = random_rows(recipe, shard.keys, rng)
            commit_shard(table, shard.name, recipe, block, provenance={"made by": "numpy"})
        states[name] = table_state(folder, recipe)
    models = {"prior": {"name": "synthetic", "revision": None}}
    wants = wants if LATENTS in kinds else Wants((), flip)
    return finish_cache(folder, rows, refused, states, models, "zarr", {}, wants)


def _sample(i: int, captions: int, width: int, height: int, weight: float, repeats: int) -> Sample:
    texts = tuple(f"caption {c} of sample {i}" for c in range(captions))
    return Sample(
        name=f"sample {i}", image_key=content_key(b"synthetic image %d" % i), captions=texts,
        caption_keys=tuple(map(caption_key, texts)), width=width, height=height,
        weight=weight, repeats=repeats,
    )  # fmt: skip


def random_rows(recipe: Recipe, keys: Sequence[bytes], rng: np.random.Generator) -> RowBlock:
    """Rows of random normal numbers for `keys`; ragged ones have 4 to 30 tokens."""
    lengths = rng.integers(4, 31, len(keys))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    arrays = {
        field.name: rng.standard_normal(
            (offsets[-1] if field.ragged else len(keys), *field.shape), dtype=np.float32
        ).astype(recipe.stored_dtype)
        for field in recipe.fields
    }
    ragged = any(field.ragged for field in recipe.fields)
    return RowBlock(keys=pack_keys(keys), arrays=arrays, offsets=offsets if ragged else None)
