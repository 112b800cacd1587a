"""Where each token stands when captions are laid behind each other without padding, and which others it sees.

A caption that learns from K draws of noise at once takes n + 1 + 3 K places: its text and text_embed stand there once,
and behind them each draw's three tokens (time, noisy embedding, prediction). The prior's attention is causal, so what
the first n + 1 compute depends on no draw; a draw sees them and itself. K copies of the caption would take K (n + 4).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kcache.errors import ModelError

__all__ = ["DRAW_TOKENS", "EXTRA_TOKENS", "PackingPlan", "bucket_step", "plan_packing", "sees"]

EXTRA_TOKENS = 4
"""Tokens behind the text: text_embed, time, noisy embedding, prediction."""
DRAW_TOKENS = 3
"""Those of them that each draw of noise has of its own: all but text_embed."""
BUCKET = 16
"""Rounded up to a multiple of this is the longest caption of a batch whose shapes are to be few."""


@dataclass(frozen=True, kw_only=True)
class PackingPlan:
    """Where each token of a batch stands: B samples, T text tokens and K draws take N = T + (1 + 3 K) B places."""

    rows: Tensor
    """(N,) int64: which token stands at each place: text token i is row i, extra token j of sample b row T + E b + j,
    with E = 1 + 3 K: text_embed, then three tokens of each draw."""
    positions: Tensor
    """(N,) int64: the row of the positional embedding that belongs to each place."""
    boundaries: Tensor
    """(B + 1,) int32: the k-th packed sample takes the places boundaries[k] to boundaries[k + 1]."""
    order: Tensor
    """(B,) int64: which sample of the batch is the k-th packed one."""
    longest: int
    """No sample takes more places than this."""
    draws: int
    """Draws of noise per sample, K."""
    spare: int
    """Places behind the N, of no sample, that round their number up."""

    @property
    def last(self) -> Tensor:
        """(B K,) int64: the places that the packed samples' predictions are read from: the last of each draw."""
        before_end = DRAW_TOKENS * torch.arange(self.draws - 1, -1, -1, device=self.boundaries.device) + 1
        return (self.boundaries[1:, None].long() - before_end).flatten()

    @property
    def shared(self) -> Tensor:
        """(B,) int64: how many of a packed sample's places its draws share: text and text_embed."""
        return self.boundaries.diff().long() - DRAW_TOKENS * self.draws


def plan_packing(
    offsets: Tensor, text_tokens: int, num_embeddings: int, *, draws: int = 1, bucketed: bool = False
) -> PackingPlan:
    """Plan the packing of captions with tokens offsets[i] to offsets[i + 1] of `text_tokens`, (B + 1,) int64.

    `bucketed` rounds the shapes up, so that batches have few different ones. A CUDA device is never waited for: lengths
    are then not checked, and `longest` is what `num_embeddings` allows. Raises ModelError on the CPU if a caption is
    longer than `num_embeddings`, or the offsets do not end at `text_tokens`.
    """
    longest = num_embeddings
    if offsets.device.type == "cpu":
        longest = _check_offsets(offsets, text_tokens, num_embeddings)
        longest = -(-longest // BUCKET) * BUCKET if bucketed else longest
    lengths, order = offsets.diff().sort(stable=True)
    samples, extra_tokens = lengths.numel(), 1 + DRAW_TOKENS * draws
    packed = lengths + extra_tokens
    boundaries = functional.pad(packed.cumsum(0), (1, 0))
    total = text_tokens + extra_tokens * samples
    numbers = torch.arange(samples, device=offsets.device)
    # The size is known without asking the device for the sum of the lengths.
    k = numbers.repeat_interleave(packed, output_size=total)
    within = torch.arange(total, device=offsets.device) - boundaries[k]
    extra = within - lengths[k]
    # All draws stand at the positions of the first.
    position = extra - (extra - 1).clamp(min=0) // DRAW_TOKENS * DRAW_TOKENS
    return PackingPlan(
        rows=torch.where(extra < 0, offsets[order[k]] + within, text_tokens + extra_tokens * order[k] + extra),
        positions=torch.where(extra < 0, within, num_embeddings + position),
        boundaries=boundaries.int(),
        order=order,
        longest=longest + extra_tokens,
        draws=draws,
        spare=-total % bucket_step(total) if bucketed else 0,
    )


def bucket_step(total: int) -> int:
    """The multiple that a number of places is rounded up to: an eighth of the power of two below it, at least 8.

    At most an eighth is added, and there are at most eight different numbers up to the next power of two.
    """
    return max(8, 1 << (total.bit_length() - 4)) if total >= 8 else 8


def sees(query: Tensor, key: Tensor, shared: Tensor | int) -> Tensor:
    """Whether the token at a sample's place `query` sees the one at place `key`: bool, all three broadcast.

    It sees itself and those before it, except for what another draw has of its own; `shared` places are all draws'.
    """
    draw = (query - shared).div(DRAW_TOKENS, rounding_mode="floor")
    same = draw == (key - shared).div(DRAW_TOKENS, rounding_mode="floor")
    return (key <= query) & ((key < shared) | same)


def _check_offsets(offsets: Tensor, text_tokens: int, num_embeddings: int) -> int:
    """The longest caption, once the offsets are known to be sound."""
    longest, end = int(offsets.diff().max()), int(offsets[-1])
    if longest > num_embeddings or end != text_tokens:
        raise ModelError(
            f"captions have up to {longest} tokens, {end} in all; expected at most {num_embeddings}, the prior's "
            f"num_embeddings, and {text_tokens} in all; train the prior on a cache built with its own text encoder"
        )
    return longest
