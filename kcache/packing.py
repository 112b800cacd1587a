"""The prior over the tokens that there are: captions laid behind each other, without padding.

The stock forward pass computes 77 text tokens for every caption, though most are padding that its mask then excludes.
Here a sample takes part with its own text tokens and the four that follow them (text_embed, time, noisy embedding,
prediction), each with the positional row that it has in the padded sequence; attention stays within a sample. The
network, its modules and its weights are the stock ones, and so is the result, up to the order of sums (Krell et al.
2021, Efficient Sequence Packing without Cross-contamination, arXiv 2107.02027). In the last block only the tokens that
the prediction is read from ask; the others just answer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any, Literal, get_args

import torch
from diffusers import PriorTransformer
from diffusers.models.attention_processor import Attention
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn

from kcache.errors import ConfigError, ModelError

__all__ = ["PackedAttention", "PackedWay", "PackingPlan", "allow_packing", "plan_packing", "predict_packed"]

PackedWay = Literal["grouped", "padded", "varlen"]
"""Who computes attention within the samples of a packed batch; all give the same up to rounding.

"grouped" runs one batch per caption length: the fastest on a CPU, but it waits for the lengths. "padded" spreads keys,
queries and values over equally long rows, which needs no more than torch. "varlen" is torch's flash attention for
packed sequences: CUDA and half precision.
"""

EXTRA_TOKENS = 4
"""Tokens behind the text: text_embed, time, noisy embedding, prediction."""

_Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries (N, H, d) of all tokens or (B, H, d) of each sample's last, keys and values (N, H, d); out as the queries."""


@dataclass(frozen=True, kw_only=True)
class PackingPlan:
    """Where each token of a batch stands when B samples with T text tokens are packed into N = T + 4 B places.

    Samples stand in the order of their lengths, so that those of one length lie behind each other.
    """

    rows: Tensor
    """(N,) int64: which token stands at each place: text token i is row i, extra token j of sample b T + 4 b + j."""
    positions: Tensor
    """(N,) int64: the row of the positional embedding that belongs to each place."""
    boundaries: Tensor
    """(B + 1,) int32: the k-th packed sample takes the places boundaries[k] to boundaries[k + 1]."""
    order: Tensor
    """(B,) int64: which sample of the batch is the k-th packed one."""
    longest: int
    """No sample takes more places than this."""

    @property
    def last(self) -> Tensor:
        """(B,) int64: the place of each packed sample's last token, from which the prediction is read."""
        return self.boundaries[1:].long() - 1


def plan_packing(offsets: Tensor, text_tokens: int, num_embeddings: int) -> PackingPlan:
    """Plan the packing of captions with tokens offsets[i] to offsets[i + 1] of `text_tokens`, (B + 1,) int64.

    A CUDA device is never waited for: lengths are then not checked, and `longest` is what `num_embeddings` allows.
    Raises ModelError on the CPU if a caption is longer than `num_embeddings`, or the offsets do not end at
    `text_tokens`.
    """
    longest = num_embeddings
    if offsets.device.type == "cpu":
        longest = _check_offsets(offsets, text_tokens, num_embeddings)
    lengths, order = offsets.diff().sort(stable=True)
    samples = lengths.numel()
    packed = lengths + EXTRA_TOKENS
    boundaries = functional.pad(packed.cumsum(0), (1, 0))
    total = text_tokens + EXTRA_TOKENS * samples
    numbers = torch.arange(samples, device=offsets.device)
    # The size is known without asking the device for the sum of the lengths.
    k = numbers.repeat_interleave(packed, output_size=total)
    within = torch.arange(total, device=offsets.device) - boundaries[k]
    extra = within - lengths[k]
    return PackingPlan(
        rows=torch.where(extra < 0, offsets[order[k]] + within, text_tokens + EXTRA_TOKENS * order[k] + extra),
        positions=torch.where(extra < 0, within, num_embeddings + extra),
        boundaries=boundaries.int(),
        order=order,
        longest=longest + EXTRA_TOKENS,
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


def allow_packing(prior: PriorTransformer) -> None:
    """Let the attention of every block of a prior take packed batches; its stock forward pass stays as it is.

    Raises ModelError for a prior whose sequence is not the one of Kandinsky 2.2.
    """
    config = prior.config
    expected = {"added_emb_type": "prd", "additional_embeddings": EXTRA_TOKENS}
    for name, value in expected.items():
        if config[name] != value:
            raise ModelError(
                f"the prior has {name} {config[name]!r}; expected {value!r}, as in Kandinsky 2.2, for its sequence to "
                "be packed; train this one with padded captions"
            )
    for block in prior.transformer_blocks:
        if not isinstance(block.attn1.processor, PackedAttention):
            block.attn1.set_processor(PackedAttention(block.attn1.processor))


def predict_packed(
    prior: PriorTransformer,
    noisy: Tensor,
    timesteps: Tensor,
    text_embeds: Tensor,
    hidden_states: Tensor,
    offsets: Tensor,
    *,
    attention: PackedWay | None = None,
) -> Tensor:
    """What the prior's stock forward pass predicts, (B, D), from captions without padding.

    `noisy` (B, D), `timesteps` (B,) int64, `text_embeds` (B, D); `hidden_states` (T, D) holds the text tokens of
    caption i at offsets[i] to offsets[i + 1]; `offsets` (B + 1,) int64. The prior was prepared by `allow_packing`. No
    `attention` takes "varlen" where the device can, otherwise "grouped" on a CPU and "padded" elsewhere. Raises
    ModelError if the prior was not prepared or captions do not fit it, ConfigError if the attention asked for is not
    to be had.
    """
    _check_prepared(prior)
    plan = plan_packing(offsets, hidden_states.shape[0], prior.config.num_embeddings)
    attend = _attention(attention or _best_way(prior, noisy.device), prior, plan)
    tokens = _embed_tokens(prior, noisy, timesteps, text_embeds, hidden_states).index_select(0, plan.rows)
    # Looked up before it is rounded, so that the gradients of all samples are summed in the parameter's precision.
    tokens = tokens + functional.embedding(plan.positions, prior.positional_embedding[0]).to(tokens.dtype)
    if prior.norm_in is not None:
        tokens = prior.norm_in(tokens)
    *blocks, final = prior.transformer_blocks
    for block in blocks:
        tokens = block(tokens, cross_attention_kwargs={"attend": attend})
    # All tokens answer, normalised inside the block: whatever wraps the block (checkpointing, sharding) covers that.
    answering = partial(final.norm1, tokens)
    asking = tokens.index_select(0, plan.last)
    asking = final(asking, cross_attention_kwargs={"attend": attend, "answering": answering})
    predictions = prior.proj_to_clip_embeddings(prior.norm_out(asking))
    return predictions.index_select(0, plan.order.argsort())


def _check_prepared(prior: PriorTransformer) -> None:
    # Any other processor would ignore what it is given, and let all samples attend to each other.
    for name, processor in prior.attn_processors.items():
        if not isinstance(processor, PackedAttention):
            raise ModelError(
                f"the prior's {name} is {type(processor).__name__}; expected PackedAttention; call "
                "allow_packing(prior) after the last change of its attention processors"
            )


def _embed_tokens(
    prior: PriorTransformer, noisy: Tensor, timesteps: Tensor, text_embeds: Tensor, hidden_states: Tensor
) -> Tensor:
    """All tokens, (T + 4 B, C): the text of all samples, then four tokens of each sample."""
    # The projection of the timesteps has no weights: float32 always.
    time = prior.time_embedding(prior.time_proj(timesteps).to(prior.dtype))
    if prior.embedding_proj_norm is not None:
        text_embeds = prior.embedding_proj_norm(text_embeds)
    if prior.encoder_hidden_states_proj is not None:
        hidden_states = prior.encoder_hidden_states_proj(hidden_states)
    noisy = prior.proj_in(noisy)
    prediction = prior.prd_embedding[0].to(noisy.dtype).expand_as(noisy)
    extra = torch.stack([prior.embedding_proj(text_embeds), time, noisy, prediction], dim=1)
    return torch.cat([hidden_states, extra.flatten(0, 1)])


class PackedAttention:
    """Attention processor that takes packed batches when it is told how they attend, and else leaves all to another."""

    def __init__(self, unpacked: Callable[..., Tensor]) -> None:
        self.unpacked = unpacked

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        attend: _Attend | None = None,
        answering: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """Attention of the tokens (N, C), or of B tokens (B, C) to all that `answering` gives, (N, C)."""
        if attend is None:
            return self.unpacked(attn, hidden_states, encoder_hidden_states, attention_mask)
        others = hidden_states if answering is None else answering()
        query, key, value = attn.to_q(hidden_states), attn.to_k(others), attn.to_v(others)
        heads = (attn.heads, -1)
        attended = attend(query.unflatten(1, heads), key.unflatten(1, heads), value.unflatten(1, heads))
        projection, dropout = attn.to_out
        return dropout(projection(attended.flatten(1)))


def _best_way(prior: PriorTransformer, device: torch.device) -> PackedWay:
    if device.type == "cpu":
        return "grouped"
    return "varlen" if _can_flash(prior, device) else "padded"


def _can_flash(prior: PriorTransformer, device: torch.device) -> bool:
    """Whether flash attention takes what this prior computes: half precision on a GPU not older than Ampere."""
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else prior.dtype
    fits = dtype in (torch.float16, torch.bfloat16) and prior.config.attention_head_dim % 8 == 0
    return fits and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _attention(way: PackedWay, prior: PriorTransformer, plan: PackingPlan) -> _Attend:
    match way:
        case "grouped":
            return _attend_grouped(plan)
        case "padded":
            return _attend_padded(plan)
        case "varlen" if not _can_flash(prior, plan.rows.device):
            raise ConfigError(
                f"packed attention is 'varlen' on {plan.rows.device}; expected a CUDA GPU of compute capability 8.0 or "
                "more, float16 or bfloat16, and heads of a multiple of 8; leave the choice open, or take 'padded'"
            )
        case "varlen":
            return _attend_varlen(plan)
    raise ConfigError(f"packed attention is {way!r}; expected one of {', '.join(get_args(PackedWay))}")


def _attend_grouped(plan: PackingPlan) -> _Attend:
    lengths, counts = (x.tolist() for x in plan.boundaries.diff().unique_consecutive(return_counts=True))
    sizes = [length * count for length, count in zip(lengths, counts, strict=True)]

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        whole = query.shape[0] == key.shape[0]
        asking = query.split(sizes if whole else counts)
        attended = []
        for count, *part in zip(counts, asking, key.split(sizes), value.split(sizes), strict=True):
            # Samples of one length lie behind each other: a batch without padding, and nothing is copied.
            q, k, v = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in part)
            out = functional.scaled_dot_product_attention(q, k, v, is_causal=whole)
            attended.append(out.transpose(1, 2).flatten(0, 1))
        return torch.cat(attended)

    return attend


def _attend_padded(plan: PackingPlan) -> _Attend:
    lengths, longest = plan.boundaries.diff(), plan.longest
    numbers = torch.arange(lengths.numel(), device=lengths.device)
    places = torch.arange(plan.rows.numel(), device=lengths.device)
    shift = numbers * longest - plan.boundaries[:-1]
    slots = places + shift.repeat_interleave(lengths, output_size=places.numel())
    valid = (torch.arange(longest, device=lengths.device) < lengths[:, None])[:, None, None]

    def spread(x: Tensor) -> Tensor:
        # Zeros, not whatever lay in memory: 0 times NaN would reach the result.
        padded = x.new_zeros(numbers.numel() * longest, *x.shape[1:]).index_copy(0, slots, x)
        return padded.unflatten(0, (-1, longest)).transpose(1, 2)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if query.shape[0] != key.shape[0]:
            last = query[:, :, None]
            return functional.scaled_dot_product_attention(last, spread(key), spread(value), attn_mask=valid)[:, :, 0]
        # Padding comes last in a row: no token sees it, and causality is all the mask that is needed.
        out = functional.scaled_dot_product_attention(spread(query), spread(key), spread(value), is_causal=True)
        return out.transpose(1, 2).flatten(0, 1).index_select(0, slots)

    return attend


def _attend_varlen(plan: PackingPlan) -> _Attend:
    every = plan.boundaries
    single = torch.arange(every.numel(), dtype=every.dtype, device=every.device)
    attention: Callable[..., Any] = varlen_attn
    # torch 2.10 called it otherwise.
    causal = {"window_size": (-1, 0)} if "window_size" in signature(attention).parameters else {"is_causal": True}

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if query.shape[0] != key.shape[0]:
            return attention(query, key, value, single, every, 1, plan.longest)
        return attention(query, key, value, every, every, plan.longest, plan.longest, **causal)

    return attend
