"""A finished cache of random rows, written without encoders: for measuring and testing what reads caches."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kcache.build.finish import Candidate, assemble
from kcache.build.plan import plan_table
from kcache.errors import InputRejected
from kcache.store.digests import EMPTY_CAPTION_KEY, ZERO_IMAGE_KEY, DigestMemo, caption_key, content_key
from kcache.store.index import TableState, stored_rows
from kcache.store.manifest import Manifest
from kcache.store.recipe import Field, Recipe
from kcache.store.samples import Refusal
from kcache.store.shards import RowBlock, commit_shard


class SyntheticSource:
    """Images that are only named: their bytes are a 1-pixel picture, the same for all, and their keys differ."""

    description = "synthetic samples"
    refused: tuple[Refusal, ...] = ()

    def __init__(self, samples: int, captions: int = 1) -> None:
        self._samples = samples
        self._captions = captions

    def __len__(self) -> int:
        return self._samples

    def name(self, i: int) -> str:
        return f"sample {i}"

    def captions(self, i: int) -> tuple[str, ...]:
        return tuple(f"caption {c} of sample {i}" for c in range(self._captions))

    def image(self, i: int) -> bytes:
        if not 0 <= i < self._samples:
            raise InputRejected("source", f"there is no sample {i}")
        return b"P6 1 1 255\n\x00\x00\x00"

    def image_key(self, i: int, memo: DigestMemo, rehash: bool) -> bytes:
        return content_key(b"synthetic image %d" % i)


def synthetic_recipe(table: str, fields: tuple[Field, ...], dtype: str) -> Recipe:
    """A recipe for rows that no encoder made."""
    return Recipe(
        table=table, encoder="Random", weights="0" * 64, config="0" * 64, preprocess={},
        compute_dtype="float32", batch_shape=(1,), stored_dtype=dtype, fields=fields,
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
) -> Manifest:
    """Write `samples` samples of random normal rows; captions have 4 to 30 tokens. Returns the manifest."""
    folder.mkdir(parents=True)
    source = SyntheticSource(samples, captions)
    candidates = [_candidate(source, i) for i in range(samples)]
    rng = np.random.default_rng(seed)
    image_keys = [candidate.image_key for candidate in candidates]
    caption_keys = [key for candidate in candidates for key in candidate.caption_keys]
    wanted = {
        "image_embeds": ([ZERO_IMAGE_KEY, *image_keys], (Field(name="image_embeds", shape=(dim,)),)),
        "text": (
            [EMPTY_CAPTION_KEY, *caption_keys],
            (
                Field(name="text_embeds", shape=(dim,)),
                Field(name="text_encoder_hidden_states", shape=(dim,), ragged=True),
            ),
        ),
        "latents": (image_keys, (Field(name="latents", shape=(4, latent_side, latent_side)),)),
    }
    states = {}
    for kind in tables:
        keys, fields = wanted[kind]
        name = f"latents-{latent_side * 8}" if kind == "latents" else kind
        recipe = synthetic_recipe(name, fields, dtype)
        table = folder / recipe.directory
        table.mkdir()
        plan = plan_table(recipe, keys, (), (), rows_per_shard=rows_per_shard, first_shard=0)
        commits = [
            commit_shard(
                table, shard.name, recipe, random_rows(recipe, shard.keys, rng), provenance={"made by": "numpy"}
            )
            for shard in plan.shards()
        ]
        states[name] = TableState(recipe=recipe, stored=stored_rows(table, commits, recipe))
    return assemble(
        folder, source, candidates, refused, states, {"prior": {"name": "synthetic", "revision": None}}, "zarr"
    )


def _candidate(source: SyntheticSource, i: int) -> Candidate:
    captions = source.captions(i)
    keys = tuple(caption_key(caption) for caption in captions)
    image_key = content_key(b"synthetic image %d" % i)
    return Candidate(position=i, name=source.name(i), image_key=image_key, captions=captions, caption_keys=keys)


def random_rows(recipe: Recipe, keys: tuple[bytes, ...], rng: np.random.Generator) -> RowBlock:
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
    return RowBlock(
        keys=np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16), arrays=arrays, offsets=offsets if ragged else None
    )
