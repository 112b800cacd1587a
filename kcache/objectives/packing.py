"""The prior over the tokens that there are: captions laid behind each other, without padding.

The stock forward pass computes 77 text tokens for every caption, though most are padding that its mask then excludes.
Here a sample takes part with its own text tokens and the four that follow them (text_embed, time, noisy embedding,
prediction), each with the positional row that it has in the padded sequence; attention stays within a sample. The
network, its modules and its weights are the stock ones, and so is the result, up to the order of sums (Krell et al.
2021, Efficient Sequence Packing without Cross-contamination, arXiv 2107.02027). In the last block only the tokens that
the prediction is read from ask; the others just answer.

With K draws of noise per caption, its text and text_embed run once for all of them (see `packed_attention`): at n = 16
tokens and K = 4 that takes 29 tokens through the blocks instead of 80, which is 2.8 times less arithmetic per draw. In
the last block keys and values are of n + 1 + 3 K tokens, all else of K, as without sharing.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from diffusers import PriorTransformer
from diffusers.models.attention_processor import Attention
from torch import Tensor
from torch.nn import functional

from kcache.errors import ModelError
from kcache.objectives.packed_attention import (
    EXTRA_TOKENS,
    Attend,
    PackedWay,
    choose_way,
    packed_attention,
    plan_packing,
)


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
    bucketed: bool = False,
) -> Tensor:
    """What the prior's stock forward pass predicts, (B K, D), from B captions without padding and K draws for each.

    `noisy` (B K, D) and `timesteps` (B K,) int64 hold draw j of caption i at i K + j; `text_embeds` (B, D);
    `hidden_states` (T, D) holds the text tokens of caption i at offsets[i] to offsets[i + 1]; `offsets` (B + 1,) int64.
    The prior was prepared by `allow_packing`. `bucketed` rounds the number of tokens up, for all blocks but the last,
    with tokens that have no influence: few shapes are then met. No `attention` takes "varlen" where the device can,
    otherwise "grouped" on a CPU, unless `bucketed`, and "padded" elsewhere. Raises ModelError if the prior was not
    prepared or captions do not fit it, ConfigError if the attention asked for is not to be had.
    """
    _check_prepared(prior)
    draws = noisy.shape[0] // text_embeds.shape[0]
    width = prior.config.num_embeddings
    plan = plan_packing(offsets, hidden_states.shape[0], width, draws=draws, bucketed=bucketed)
    way = attention or choose_way(prior, plan, bucketed=bucketed)
    attend = packed_attention(way, prior, plan)
    tokens = _embed_tokens(prior, noisy, timesteps, text_embeds, hidden_states).index_select(0, plan.rows)
    # Looked up before it is rounded, so that the gradients of all samples are summed in the parameter's precision.
    tokens = tokens + functional.embedding(plan.positions, prior.positional_embedding[0]).to(tokens.dtype)
    if prior.norm_in is not None:
        tokens = prior.norm_in(tokens)
    tokens = functional.pad(tokens, (0, 0, 0, plan.spare))
    *blocks, final = prior.transformer_blocks
    for block in blocks:
        tokens = block(tokens, cross_attention_kwargs={"attend": attend})
    if plan.spare:
        tokens, attend = tokens[: plan.rows.numel()], packed_attention(way, prior, replace(plan, spare=0))
    # All tokens answer, normalised inside the block: whatever wraps the block (checkpointing, sharding) covers that.
    answering = partial(final.norm1, tokens)
    asking = tokens.index_select(0, plan.last)
    asking = final(asking, cross_attention_kwargs={"attend": attend, "answering": answering})
    predictions = prior.proj_to_clip_embeddings(prior.norm_out(asking))
    return predictions.unflatten(0, (-1, draws)).index_select(0, plan.order.argsort()).flatten(0, 1)


def predict_padded(
    prior: PriorTransformer,
    noisy: Tensor,
    timesteps: Tensor,
    text_embeds: Tensor,
    hidden_states: Tensor,
    offsets: Tensor,
) -> Tensor:
    """What `predict_packed` predicts, by the stock forward pass of any prior, its captions filled up with zeros.

    What stands in the filled-up rows has no influence: the mask and the read-out at the last token exclude them.
    """
    draws = noisy.shape[0] // text_embeds.shape[0]
    position = torch.arange(prior.config.num_embeddings, device=offsets.device)
    mask = position < offsets.diff()[:, None]
    # A gather, as assigning through a boolean mask would wait for the device to count it.
    index = (offsets[:-1, None] + position).clamp(max=hidden_states.shape[0] - 1)
    states = hidden_states[index].where(mask[..., None], 0)
    return prior(
        noisy,
        timestep=timesteps,
        proj_embedding=text_embeds.repeat_interleave(draws, 0),
        encoder_hidden_states=states.repeat_interleave(draws, 0),
        attention_mask=mask.repeat_interleave(draws, 0),
    ).predicted_image_embedding


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
    """All tokens, (T + (1 + 3 K) B, C): the text of all samples, then what else each has, in a PackingPlan's order."""
    # The projection of the timesteps has no weights: float32 always.
    time = prior.time_embedding(prior.time_proj(timesteps).to(prior.dtype))
    if prior.embedding_proj_norm is not None:
        text_embeds = prior.embedding_proj_norm(text_embeds)
    if prior.encoder_hidden_states_proj is not None:
        hidden_states = prior.encoder_hidden_states_proj(hidden_states)
    noisy = prior.proj_in(noisy)
    prediction = prior.prd_embedding[0].to(noisy.dtype).expand_as(noisy)
    drawn = torch.stack([time, noisy, prediction], dim=1).view(len(text_embeds), -1, noisy.shape[-1])
    extra = torch.cat([prior.embedding_proj(text_embeds)[:, None], drawn], dim=1)
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
        attend: Attend | None = None,
        answering: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """Attention of the tokens (N, C), or of the last ones (B K, C) to all that `answering` gives, (N, C)."""
        if attend is None:
            return self.unpacked(attn, hidden_states, encoder_hidden_states, attention_mask)
        others = hidden_states if answering is None else answering()
        query, key, value = attn.to_q(hidden_states), attn.to_k(others), attn.to_v(others)
        heads = (attn.heads, -1)
        attended = attend(query.unflatten(1, heads), key.unflatten(1, heads), value.unflatten(1, heads))
        projection, dropout = attn.to_out
        return dropout(projection(attended.flatten(1)))
