"""Attention within the samples of a packed batch, computed in three ways that agree up to rounding."""

from collections.abc import Callable
from inspect import signature
from typing import Any, Literal, get_args

import torch
from diffusers import PriorTransformer
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn

from kcache.errors import ConfigError
from kcache.packing_plan import DRAW_TOKENS, PackingPlan, bucket_step, sees

__all__ = ["Attend", "PackedWay", "choose_way", "packed_attention"]

PackedWay = Literal["grouped", "padded", "varlen"]
"""Who computes attention within the samples of a packed batch; all give the same up to rounding.

"grouped" runs one batch per caption length: the fastest on a CPU, but it waits for the lengths, and its shapes are as
many as there are sets of them. "padded" spreads keys, queries and values over equally long rows, which needs no more
than torch. "varlen" is torch's flash attention for packed sequences: CUDA, half precision, one draw of noise.
"""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries (N, H, d) of all places, the spare ones included, or (B K, H, d) of the last place of each draw; keys and
values (N, H, d) of all places; out as the queries."""


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

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        whole = query.shape[0] == key.shape[0]
        asking = query.split(sizes if whole else asked)
        attended = []
        for count, mask, *part in zip(counts, masks, asking, key.split(sizes), value.split(sizes), strict=True):
            # Samples of one length lie behind each other: a batch without padding, and nothing is copied.
            q, k, v = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in part)
            if mask is not None:
                out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask if whole else mask[_ends(plan)])
            else:
                out = functional.scaled_dot_product_attention(q, k, v, is_causal=whole)
            attended.append(out.transpose(1, 2).flatten(0, 1))
        return torch.cat(attended)

    return attend


def _group_mask(length: int, plan: PackingPlan) -> Tensor:
    """What the tokens of a sample that takes `length` places see, (length, length) bool."""
    place = torch.arange(length, device=plan.rows.device)
    return sees(place[:, None], place, length - DRAW_TOKENS * plan.draws)


def _ends(plan: PackingPlan) -> Tensor:
    """(K,) int64: the last place of each draw, counted from a sample's end."""
    return plan.last[: plan.draws] - plan.boundaries[1]


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
