"""A run on plain squares trains on what it always did, and goes on from states of before there were shapes.

What is expected was noted with a kcache that knew of squares alone, from a cache of the first schema.
"""

import hashlib
import tarfile
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kcache import Cache
from kcache.loader import CacheLoader
from kcache.loader.turns import draw_turns

ARCHIVE = Path(__file__).parents[1] / "data" / "schema-1.tar.xz"
FIELDS = ["image_embeds", "latents", "text_embeds", "text_encoder_hidden_states"]
STATE = {
    "version": 1, "samples_digest": "f5c99758bd6dea7bf96f8a2bbac01daf5617c28b5bf141b8f9ea08a128e3f64f", "seed": 7,
    "epoch": 3, "samples_consumed": 12, "samples": 40, "captions": 40,
}  # fmt: skip
"""After 22 batches of two processes, in the fourth epoch."""
EXPECTED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "full": ("cfe7a85c4c0642c1", "043d628e953a6c8b", {}),
    "block": ("97eb22d94a1569a8", "ab80e17e9adcc94b", {}),
    "stream": (
        "6b66432a57f36d5f",
        "582b2267c44600dd",
        {"stream": {"block_rows": 16, "lanes": 64, "window_blocks": 16}},
    ),
}
"""By shuffle: the digests of those batches, and of the rest of that epoch; and what the state says of the order."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Of forty samples: the three that there are, over and over."""
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return Cache.open(folder / "zarr").select([number % 3 for number in range(40)])


def begun(cache: Cache, shuffle: str) -> CacheLoader:
    """The second of two processes, each of which takes three samples at a time."""

    def draws(turns: np.ndarray) -> dict[str, np.ndarray]:
        return {"turns": turns, **draw_turns(7, turns, cache.field("latents").shape, 1000, 2)}

    dropouts = {"caption_dropout": 0.3, "image_dropout": 0.3}
    return CacheLoader(cache, FIELDS, 3, seed=7, shuffle=shuffle, rank=1, world_size=2, draws=draws, **dropouts)


def digest(batches: Iterable[dict[str, torch.Tensor]]) -> str:
    """Of all arrays; noise in thousandths, as the last bits of its logarithms are the processor's."""
    found = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            array = batch[name].numpy()
            array = np.rint(array * 1000).astype(np.int32) if name == "noise" else array
            found.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return found.hexdigest()[:16]


@pytest.mark.parametrize("shuffle", ["full", "block", "stream"])
def test_batches_and_states_are_what_they_were(cache: Cache, shuffle: str) -> None:
    batches, rest, order = EXPECTED[shuffle]
    state = STATE | {"shuffle": shuffle} | order
    loader = begun(cache, shuffle)
    assert digest(islice(loader.forever(), 22)) == batches
    assert loader.state_dict() == state
    again = begun(cache, shuffle)
    again.load_state_dict(state)
    assert digest(again) == rest
