"""The largest batch that a run meets, without its rows: names, shapes and dtypes, and captions of real lengths."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import NamedTuple

import numpy as np
import torch

from kcache.config import TrainConfig
from kcache.loader.schedule import batches_of
from kcache.objectives.losses import Objective
from kcache.objectives.preservation import CLASS
from kcache.store.cache import Cache
from kcache.store.index import tokens_of
from kcache.store.recipe import HINT, TEXT, kind_of, shape_of
from kcache.store.shards import OFFSETS

DRAWN_BATCHES = 1000
"""Batches of captions that are drawn; the one with the most tokens is the largest."""
_TOKENS = "text_encoder_hidden_states"


class LargestBatch(NamedTuple):
    """A batch, and what makes it the largest."""

    tensors: Mapping[str, torch.Tensor]
    """By the names that objectives have: on the meta device but for `text_offsets` and `timesteps`."""
    samples: int
    shape: tuple[int, int] | None
    """Height and width of its pictures, in pixels; None where none are read."""
    tokens: int | None
    """Valid tokens of its captions; None where none are read."""


def largest_batch(objective: Objective, parts: Sequence[Cache], config: TrainConfig, *, weighted: bool) -> LargestBatch:
    """The largest batch of `objective` from the `parts` of a cache, each of which has pictures of one shape.

    Of several shapes it is the one with the most pixels in a batch. Of captions it is the longest of `DRAWN_BATCHES`
    that are drawn, so that it is one that a run meets. `weighted` batches have the weights of their samples.
    """
    sizes = batches_of(config.train_batch_size, [(part.shape, part.resolution) for part in parts])
    if len(parts) > 1:
        sizes = [min(size, len(part)) for size, part in zip(sizes, parts, strict=True)]
    pixels = [size * prod(part.field(objective.noised_field).shape) for size, part in zip(sizes, parts, strict=True)]
    number = int(np.argmax(pixels))
    part, size = parts[number], sizes[number]
    lengths = _lengths(part, size) if objective.most_tokens is not None else None
    tensors = {}
    for name in objective.row_shapes:
        if part.is_packed(name):
            tensors[name] = _empty(size, *_control_shape(part, name, objective), dtype=torch.uint8)
        elif name == _TOKENS and lengths is not None:
            tensors[name] = _rows_of(part, name, int(lengths.sum()))
        else:
            tensors[name] = _rows_of(part, name, size)
    if lengths is not None:
        tensors[OFFSETS] = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    if weighted:
        tensors["weight"] = _empty(size)
    tensors |= _drawn(objective, part, size, config.noise_draws)
    if config.class_prompt:  # as many rows of the class, about as long
        tensors |= {CLASS + name: tensor for name, tensor in tensors.items() if name != "weight"}
    tokens = None if lengths is None else int(lengths.sum()) * (2 if config.class_prompt else 1)
    return LargestBatch(tensors, size, part.shape if tokens is None else None, tokens)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _rows_of(part: Cache, name: str, count: int) -> torch.Tensor:
    return _empty(count, *part.field(name).shape, dtype=torch.from_numpy(np.empty(0, part.dtype(name))).dtype)


def _drawn(objective: Objective, part: Cache, size: int, draws: int) -> dict[str, torch.Tensor]:
    """What `kcache.loader.turns.draw_turns` gives."""
    shape = part.field(objective.noised_field).shape
    drawn = {"noise": _empty(size * draws, *shape), "timesteps": torch.zeros(size * draws, dtype=torch.int64)}
    if "mask" in objective.drawn:
        drawn["mask"] = _empty(size, 1, *shape[-2:])
    if "own_mask" in objective.drawn:
        drawn["own_mask"] = _empty(size, dtype=torch.bool)
    return drawn


def _control_shape(part: Cache, name: str, objective: Objective) -> tuple[int, ...]:
    """Of a control image as a batch has it: hints of three channels and the pictures' size, masks as the latents."""
    table = part.table_of(name)
    if kind_of(table).name.startswith(HINT):
        return (3, *(shape_of(table) or ()))
    return (1, *part.field(objective.noised_field).shape[-2:])


def _lengths(part: Cache, size: int) -> np.ndarray:
    """Tokens of the captions of a batch, (size,) int64."""
    entries = part.entries(_TOKENS)
    captions = len(entries) - 1  # the last row is that of the empty caption
    chosen = np.random.default_rng(0).integers(max(1, captions), size=(DRAWN_BATCHES, size))
    numbers, places = np.unique(chosen, return_inverse=True)
    batches = tokens_of(part.recipes[TEXT.name], entries[numbers])[places.reshape(chosen.shape)]
    return np.asarray(batches[batches.sum(1).argmax()], np.int64)
