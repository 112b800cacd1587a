"""Attention among captions that are laid behind each other without padding: where tokens stand, and what they see.

A caption that learns from K draws of noise at once takes n + 1 + 3 K places: its text and text_embed stand there once,
and behind them each draw's three tokens (time, noisy embedding, prediction). The prior's attention is causal, so what
the first n + 1 compute depends on no draw; a draw sees them and itself. K copies of the caption would take K (n + 4).
A `PackingPlan` says where each token of a batch stands; given that, the attention is computed in one of three ways,
which agree up to rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal, get_args

import torch
from diffusers import PriorTransformer
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn

from kcache.errors import ConfigError, ModelError

EXTRA_TOKENS = 4
"""Tokens behind the text: text_embed, time, noisy embedding, prediction."""
DRAW_TOKENS = 3
"""Those of them that each draw of noise has of its own: all but text_embed."""
BUCKET = 16
"""Rounded up to a multiple of this is the longest caption of a batch whose shapes are to be few."""

PackedWay = Literal["grouped", "padded", "varlen"]
"""Who computes attention within the samples of a packed batch; all give the same up to rounding.

"grouped" runs one batch per caption length: the fastest on a CPU, but it waits for the lengths, and its shapes are as
many as there are sets of them. "padded" spreads keys, queries and values over equally long rows, which needs no more
than torch. "varlen" is torch's flash attention for packed sequences: CUDA, half precision, one draw of noise.
"""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries (N, H, d) of all places, the spare ones included, or (B K, H, d) of the last place of each draw; keys and
values (N, H, d) of all places; out as the queries."""


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


def _check_offsets(offsets: Tensor, text_tokens: int, num_embeddings: int) -> int:
    """The longest caption, once the offsets are known to be sound."""
    longest, end = int(offsets.diff().max()), int(offsets[-1])
    if longest > num_embeddings or end != text_tokens:
        raise ModelError(
            f"captions have up to {longest} tokens, {end} in all; expected at most {num_embeddings}, the prior's "
            f"num_embeddings, and {text_tokens} in all; train the prior on a cache built with its own text encoder"
        )
    return longest


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


def choose_way(prior: PriorTransformer, plan: PackingPlan, *, bucketed: bool) -> PackedWay:
    """The fastest way that the plan's device has, and whose shapes are few if they are to be `bucketed`."""
    device = plan.rows.device
    if plan.draws == 1 and _can_flash(prior, device):
        return "varlen"
    return "grouped" if device.type == "cpu" and not bucketed else "padded"


def packed_attention(way: PackedWay, prior: PriorTransformer, plan: PackingPlan) -> Attend:
    """The attention of `plan`; raises ConfigError if `way` is not to be had."""
    match way:
        case "grouped" if plan.spare:
            raise ConfigError("packed attention is 'grouped', with rounded shapes; expected 'padded' or 'varlen'")
        case "grouped":
            return _attend_grouped(plan)
        case "padded":
            return _attend_padded(plan)
        case "varlen" if plan.draws > 1:
            raise ConfigError(
                f"packed attention is 'varlen' with {plan.draws} draws of noise; expected one: flash attention takes "
                "no mask; leave the choice open, or take 'padded'"
            )
        case "varlen" if not _can_flash(prior, plan.rows.device):
            raise ConfigError(
                f"packed attention is 'varlen' on {plan.rows.device}; expected a CUDA GPU of compute capability 8.0 or "
                "more, float16 or bfloat16, and heads of a multiple of 8; leave the choice open, or take 'padded'"
            )
        case "varlen":
            return _attend_varlen(plan)
    raise ConfigError(f"packed attention is {way!r}; expected one of {', '.join(get_args(PackedWay))}")


def _can_flash(prior: PriorTransformer, device: torch.device) -> bool:
    """Whether flash attention takes what this prior computes: half precision on a GPU not older than Ampere."""
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else prior.dtype
    fits = dtype in (torch.float16, torch.bfloat16) and prior.config.attention_head_dim % 8 == 0
    return fits and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _attend_grouped(plan: PackingPlan) -> Attend:
    lengths, counts = (x.tolist() for x in plan.boundaries.diff().unique_consecutive(return_counts=True))
    sizes = [length * count for length, count in zip(lengths, counts, strict=True)]
    asked = [plan.draws * count for count in counts]
    # One draw sees all before it: causality, or for the last token nothing, is all the mask that is needed.
    masks = [None if plan.draws == 1 else _group_mask(length, plan) for length in lengths]
    # Counted from a sample's end.
    ends = plan.last[: plan.draws] - plan.boundaries[1]

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        whole = query.shape[0] == key.shape[0]
        asking = query.split(sizes if whole else asked)
        attended = []
        for count, mask, *part in zip(counts, masks, asking, key.split(sizes), value.split(sizes), strict=True):
            # Samples of one length lie behind each other: a batch without padding, and nothing is copied.
            q, k, v = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in part)
            if mask is not None:
                out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask if whole else mask[ends])
            else:
                out = functional.scaled_dot_product_attention(q, k, v, is_causal=whole)
            attended.append(out.transpose(1, 2).flatten(0, 1))
        return torch.cat(attended)

    return attend


def _group_mask(length: int, plan: PackingPlan) -> Tensor:
    """What the tokens of a sample that takes `length` places see, (length, length) bool."""
    place = torch.arange(length, device=plan.rows.device)
    return sees(place[:, None], place, length - DRAW_TOKENS * plan.draws)


def _attend_padded(plan: PackingPlan) -> Attend:
    lengths, longest, draws = plan.boundaries.diff(), plan.longest, plan.draws
    samples = lengths.numel()
    numbers = torch.arange(samples, device=lengths.device)
    places = torch.arange(plan.rows.numel(), device=lengths.device)
    shift = numbers * longest - plan.boundaries[:-1]
    slots = places + shift.repeat_interleave(lengths, output_size=places.numel())
    # Spare places go into a slot behind all rows, which is cut off, and take any answer: nobody reads what they say.
    slots = functional.pad(slots, (0, plan.spare), value=samples * longest)
    answers = slots.clamp(max=samples * longest - 1)
    place, shared = torch.arange(longest, device=lengths.device), plan.shared[:, None, None]
    last = (plan.last.unflatten(0, (samples, draws)) - plan.boundaries[:-1, None])[:, :, None]
    last_sees = sees(last, place, shared)[:, None]
    # Padding comes last in a row: no token sees it, and for one draw causality is all the mask that is needed.
    every_sees = None if draws == 1 else sees(place[:, None], place, shared)[:, None]

    def spread(x: Tensor) -> Tensor:
        # Zeros, not whatever lay in memory: 0 times NaN would reach the result.
        padded = x.new_zeros(samples * longest + 1, *x.shape[1:]).index_copy(0, slots, x)
        return padded[:-1].unflatten(0, (-1, longest)).transpose(1, 2)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if query.shape[0] != key.shape[0]:
            asking = query.unflatten(0, (samples, draws)).transpose(1, 2)
            out = functional.scaled_dot_product_attention(asking, spread(key), spread(value), attn_mask=last_sees)
            return out.transpose(1, 2).flatten(0, 1)
        out = functional.scaled_dot_product_attention(
            spread(query), spread(key), spread(value), attn_mask=every_sees, is_causal=every_sees is None
        )
        return out.transpose(1, 2).flatten(0, 1).index_select(0, answers)

    return attend


def _attend_varlen(plan: PackingPlan) -> Attend:
    every, longest = plan.boundaries, plan.longest
    single = torch.arange(every.numel(), dtype=every.dtype, device=every.device)
    if plan.spare:
        # One more sequence: what lies behind the last one is never written, and what lay in memory would be learnt.
        total = plan.rows.numel() + plan.spare
        every, longest = functional.pad(every, (0, 1), value=total), max(longest, bucket_step(total))
    attention: Callable[..., Any] = varlen_attn
    # torch 2.10 called it otherwise.
    causal = {"window_size": (-1, 0)} if "window_size" in signature(attention).parameters else {"is_causal": True}

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if query.shape[0] != key.shape[0]:
            return attention(query, key, value, single, every, 1, longest)
        return attention(query, key, value, every, every, longest, longest, **causal)

    return attend
