"""A packed prior predicts and learns what the stock, padded one does."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from padded import LENGTHS, assert_equal_gradients, gradients, make_batch, make_prior, predict_padded, relative_error
from peft import LoraConfig
from torch import Tensor
from torch.nn import functional

from kcache.errors import ConfigError, ModelError
from kcache.objectives import packed_attention as packing_ways
from kcache.objectives import packing
from kcache.objectives.blocks import recompute_blocks
from kcache.objectives.packed_attention import bucket_step, plan_packing
from kcache.objectives.packing import PackedWay, allow_packing, predict_packed


def several_draws(batch: dict[str, Tensor], draws: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A batch with `draws` draws of noise for each caption, and the same with a copy of the caption for each."""
    generator = torch.Generator().manual_seed(2)
    captions = batch["hidden_states"].split(batch["offsets"].diff().tolist())
    rows = draws * len(captions)
    noise = torch.randn(rows, 24, generator=generator, dtype=torch.float64).to(batch["noisy"].dtype)
    drawn = {"noisy": noise, "timesteps": torch.randint(0, 1000, (rows,), generator=generator)}
    copies = {
        "text_embeds": batch["text_embeds"].repeat_interleave(draws, 0),
        "hidden_states": torch.cat([caption for caption in captions for _ in range(draws)]),
        "offsets": functional.pad(batch["offsets"].diff().repeat_interleave(draws).cumsum(0), (1, 0)),
    }
    return batch | drawn, copies | drawn


def attend_one_by_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """What torch's varlen_attn does, sequence by sequence, with its demands on the arguments."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert int(cu_seq_q.diff().max()) <= max_q
    assert int(cu_seq_k.diff().max()) <= max_k
    assert int(cu_seq_q[-1]) == query.shape[0]
    assert int(cu_seq_k[-1]) == key.shape[0]
    attended = []
    for (q0, q1), (k0, k1) in zip(pairwise(cu_seq_q.tolist()), pairwise(cu_seq_k.tolist()), strict=True):
        scores = torch.einsum("qhd,khd->hqk", query[q0:q1], key[k0:k1]) * query.shape[-1] ** -0.5
        if window_size == (-1, 0):
            # Aligned at the bottom right: the last query sees all keys.
            hidden = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).triu(1 + (k1 - k0) - (q1 - q0))
            scores = scores.masked_fill(hidden, -torch.inf)
        attended.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), value[k0:k1]))
    return torch.cat(attended)


@pytest.fixture
def flash_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing_ways, "_can_flash", lambda prior, device: True)
    monkeypatch.setattr(packing_ways, "varlen_attn", attend_one_by_one)


@pytest.mark.parametrize("lengths", [LENGTHS, (7, 7, 7), (77, 77)], ids=str)
def test_captions_are_filled_up_for_the_stock_forward_pass(lengths: tuple[int, ...]) -> None:
    prior, batch = make_prior(), make_batch(lengths)
    assert torch.equal(packing.predict_padded(prior, **batch), predict_padded(prior, batch))


@pytest.mark.usefixtures("flash_on_cpu")
@pytest.mark.parametrize("attention", [None, "grouped", "padded", "varlen"])
@pytest.mark.parametrize("lengths", [LENGTHS, (7, 7, 7), (12,), (0,), (77, 77)], ids=str)
def test_predictions_are_those_of_the_padded_prior(lengths: tuple[int, ...], attention: PackedWay | None) -> None:
    prior, batch = make_prior(), make_batch(lengths)
    expected = predict_padded(prior, batch)
    allow_packing(prior)
    found = predict_packed(prior, **batch, attention=attention)
    assert relative_error(found, expected) <= 1e-6


@pytest.mark.parametrize(
    "config",
    [
        {"norm_in_type": "layer", "embedding_proj_norm_type": "layer"},
        {"encoder_hid_proj_type": None, "embedding_dim": 32, "embedding_proj_dim": 24},
        {"time_embed_act_fn": "gelu", "time_embed_dim": 40, "clip_embed_dim": 20, "num_layers": 1},
        {"num_embeddings": 80, "dropout": 0.5},
    ],
    ids=str,
)
def test_every_setting_of_the_prior_is_honoured(config: dict[str, Any]) -> None:
    prior, batch = make_prior(**config), make_batch(LENGTHS)
    width = prior.config.embedding_dim
    for name in ("noisy", "hidden_states"):
        batch[name] = functional.pad(batch[name], (0, width - 24), value=0.5)
    expected = predict_padded(prior, batch)
    allow_packing(prior)
    found = predict_packed(prior, **batch)
    assert found.shape == expected.shape
    assert relative_error(found, expected) <= 1e-6


@pytest.mark.usefixtures("flash_on_cpu")
@pytest.mark.parametrize("attention", ["grouped", "padded", "varlen"])
def test_gradients_are_those_of_the_padded_prior(attention: PackedWay) -> None:
    prior, batch = make_prior().double(), make_batch(LENGTHS, torch.float64)
    expected = gradients(prior, predict_padded(prior, batch))
    allow_packing(prior)
    found = gradients(prior, predict_packed(prior, **batch, attention=attention))
    assert_equal_gradients(found, expected)


@pytest.mark.usefixtures("flash_on_cpu")
@pytest.mark.parametrize("attention", ["padded", "varlen"])
@pytest.mark.parametrize("lengths", [LENGTHS, (7, 7, 7), (1,)], ids=str)
def test_what_rounds_shapes_up_has_no_influence(lengths: tuple[int, ...], attention: PackedWay) -> None:
    prior, batch = make_prior(), make_batch(lengths)
    exact_prior, exact = make_prior().double(), make_batch(lengths, torch.float64)
    expected, gradient = predict_padded(prior, batch), gradients(exact_prior, predict_padded(exact_prior, exact))
    allow_packing(prior)
    allow_packing(exact_prior)
    rows: set[int] = set()
    prior.transformer_blocks[0].register_forward_hook(lambda _, inputs, output: rows.add(inputs[0].shape[0]))
    assert relative_error(predict_packed(prior, **batch, attention=attention, bucketed=True), expected) <= 1e-6
    assert rows == {{228: 240, 33: 40, 5: 8}[sum(lengths) + 4 * len(lengths)]}
    found = predict_packed(exact_prior, **exact, attention=attention, bucketed=True)
    assert_equal_gradients(gradients(exact_prior, found), gradient)


@pytest.mark.parametrize(("attention", "bucketed"), [("grouped", False), ("padded", False), (None, True)])
@pytest.mark.parametrize("draws", [2, 5])
def test_draws_that_share_a_caption_are_those_of_its_copies(
    draws: int, attention: PackedWay | None, bucketed: bool
) -> None:
    prior, exact_prior = make_prior(), make_prior().double()
    shared, copies = several_draws(make_batch(LENGTHS), draws)
    exact_shared, exact_copies = several_draws(make_batch(LENGTHS, torch.float64), draws)
    expected = predict_padded(prior, copies)
    gradient = gradients(exact_prior, predict_padded(exact_prior, exact_copies))
    allow_packing(prior)
    allow_packing(exact_prior)
    found = predict_packed(prior, **shared, attention=attention, bucketed=bucketed)
    assert relative_error(found, expected) <= 1e-6
    exact = predict_packed(exact_prior, **exact_shared, attention=attention, bucketed=bucketed)
    assert_equal_gradients(gradients(exact_prior, exact), gradient)


def test_draws_share_the_tokens_of_their_caption() -> None:
    prior, batch = make_prior(), several_draws(make_batch(LENGTHS), 4)[0]
    allow_packing(prior)
    rows: list[int] = []
    for name in ("transformer_blocks.0.ff", "transformer_blocks.2.attn1.to_k", "transformer_blocks.2.ff"):
        prior.get_submodule(name).register_forward_hook(lambda _, inputs, output: rows.append(inputs[0].shape[0]))
    predict_packed(prior, **batch)
    every = sum(LENGTHS) + (1 + 3 * 4) * len(LENGTHS)
    assert rows == [every, every, 4 * len(LENGTHS)]


def test_positions_that_only_padding_has_get_no_gradient() -> None:
    prior, batch = make_prior(), make_batch((3, 9, 5))
    allow_packing(prior)
    gradient = gradients(prior, predict_packed(prior, **batch))["positional_embedding"][0]
    learning = gradient.abs().sum(1) > 0
    assert learning.nonzero().flatten().tolist() == [*range(9), *range(77, 81)]


def test_the_last_block_asks_only_for_what_is_read() -> None:
    prior, batch = make_prior(), make_batch(LENGTHS)
    allow_packing(prior)
    rows: dict[str, int] = {}

    def count(name: str) -> None:
        rows[name] = 0
        module = prior.get_submodule(name)
        module.register_forward_hook(lambda _, inputs, output: rows.__setitem__(name, inputs[0].shape[0]))

    for name in ("to_q", "to_k", "to_v", "to_out.0", "to_out.1"):
        count(f"transformer_blocks.2.attn1.{name}")
    for name in ("transformer_blocks.1.ff", "transformer_blocks.2.ff", "norm_out"):
        count(name)
    predict_packed(prior, **batch)
    every, last = sum(LENGTHS) + 4 * len(LENGTHS), len(LENGTHS)
    assert list(rows.values()) == [last, every, every, last, last, every, last, last]


@pytest.mark.parametrize("automatic", [False, True], ids=["bfloat16 weights", "autocast"])
@pytest.mark.parametrize("attention", ["grouped", "padded"])
def test_bfloat16_is_as_exact_as_the_padded_prior(automatic: bool, attention: PackedWay) -> None:
    prior, lengths = make_prior(), LENGTHS * 8
    exact = predict_padded(make_prior().double(), make_batch(lengths, torch.float64))
    batch = make_batch(lengths)
    if not automatic:
        prior = prior.bfloat16()
        batch = {name: x.bfloat16() if x.is_floating_point() else x for name, x in batch.items()}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=automatic):
        padded = predict_padded(prior, batch)
        allow_packing(prior)
        packed = predict_packed(prior, **batch, attention=attention)
    assert packed.dtype == padded.dtype == torch.bfloat16
    assert relative_error(packed, exact) <= 1.1 * relative_error(padded, exact)


def test_gradients_under_autocast_are_as_exact_as_the_padded_priors() -> None:
    prior, lengths = make_prior(), LENGTHS * 8
    exact_prior = make_prior().double()
    exact = gradients(exact_prior, predict_padded(exact_prior, make_batch(lengths, torch.float64)))
    batch = make_batch(lengths)
    with torch.autocast("cpu", torch.bfloat16):
        padded = gradients(prior, predict_padded(prior, batch).float())
        allow_packing(prior)
        packed = gradients(prior, predict_packed(prior, **batch).float())

    def error(found: dict[str, Tensor]) -> float:
        joined = [torch.cat([grads[name].double().flatten() for name in exact]) for grads in (found, exact)]
        return relative_error(*joined)

    assert error(packed) <= 1.1 * error(padded)


def test_adapters_take_part() -> None:
    prior, batch = make_prior().double(), make_batch(LENGTHS, torch.float64)
    plain = predict_padded(prior, batch).detach()
    prior.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    for name, parameter in prior.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    expected = gradients(prior, padded := predict_padded(prior, batch))
    allow_packing(prior)
    found = gradients(prior, packed := predict_packed(prior, **batch))
    assert relative_error(packed, plain) > 1e-3
    assert relative_error(packed, padded) <= 1e-12
    assert found.keys() == expected.keys()
    assert len(found) == 3 * 4 * 2
    for name, gradient in expected.items():
        assert relative_error(found[name], gradient) <= 1e-11, name


def test_recomputing_blocks_changes_nothing() -> None:
    prior, batch = make_prior(), make_batch(LENGTHS)
    allow_packing(prior)
    kept = gradients(prior, predict_packed(prior, **batch))
    recompute_blocks(prior)
    calls: list[int] = []
    for number, block in enumerate(prior.transformer_blocks):
        block.attn1.to_k.register_forward_hook(lambda *_, number=number: calls.append(number))
    recomputed = gradients(prior, predict_packed(prior, **batch))
    assert sorted(calls) == [0, 0, 1, 1, 2, 2]
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


def test_the_stock_forward_pass_stays_as_it_was() -> None:
    prior, batch = make_prior(), make_batch(LENGTHS)
    before, names = predict_padded(prior, batch), set(prior.state_dict())
    allow_packing(prior)
    allow_packing(prior)
    predict_packed(prior, **batch)
    assert torch.equal(predict_padded(prior, batch), before)
    assert set(prior.state_dict()) == names


def test_places_follow_the_captions_in_the_order_of_their_lengths() -> None:
    plan = plan_packing(torch.tensor([0, 2, 5, 5, 7]), 7, 10)
    assert plan.order.tolist() == [2, 0, 3, 1]
    assert plan.boundaries.tolist() == [0, 4, 10, 16, 23]
    assert plan.last.tolist() == [3, 9, 15, 22]
    samples = [[15, 16, 17, 18], [0, 1, 7, 8, 9, 10], [5, 6, 19, 20, 21, 22], [2, 3, 4, 11, 12, 13, 14]]
    assert plan.rows.tolist() == sum(samples, [])
    positions = [[10, 11, 12, 13], [0, 1, 10, 11, 12, 13], [0, 1, 10, 11, 12, 13], [0, 1, 2, 10, 11, 12, 13]]
    assert plan.positions.tolist() == sum(positions, [])
    assert plan.longest == 7


def test_a_batch_has_few_shapes_when_they_are_rounded_up() -> None:
    for total in range(1, 5000):
        rounded = total + -total % bucket_step(total)
        assert rounded <= max(1.125 * total, total + 7)
    assert len({total + -total % bucket_step(total) for total in range(1025, 2049)}) == 8
    plans = [
        plan_packing(functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)), sum(lengths), 77, bucketed=True)
        for lengths in [(20, 15), (18, 17), (22, 14)]
    ]
    assert {(plan.rows.numel() + plan.spare, plan.longest) for plan in plans} == {(48, 36)}


@pytest.mark.parametrize(("attention", "draws"), [("padded", 1), ("varlen", 1), ("padded", 3)])
@pytest.mark.parametrize("bucketed", [False, True])
def test_nothing_waits_for_the_device(
    monkeypatch: pytest.MonkeyPatch, attention: PackedWay, draws: int, bucketed: bool
) -> None:
    # Tensors of the meta device have no values: asking for one is an error. torch's varlen_attn itself runs here.
    monkeypatch.setattr(packing_ways, "_can_flash", lambda prior, device: True)
    prior = make_prior().to("meta")
    allow_packing(prior)
    batch = {name: x.to("meta") for name, x in several_draws(make_batch(LENGTHS), draws)[0].items()}
    prediction = predict_packed(prior, **batch, attention=attention, bucketed=bucketed)
    prediction.sum().backward()
    assert prediction.shape == (draws * len(LENGTHS), 24)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("attention", ["grouped", "padded", "varlen", None])
def test_a_gpu_predicts_the_same(attention: PackedWay | None) -> None:
    lengths = LENGTHS * 8
    exact = predict_padded(make_prior().double(), make_batch(lengths, torch.float64))
    prior = make_prior().bfloat16().to("cuda")
    batch = {name: x.to("cuda") for name, x in make_batch(lengths, torch.bfloat16).items()}
    padded = predict_padded(prior, batch).cpu()
    allow_packing(prior)
    packed = predict_packed(prior, **batch, attention=attention)
    packed.float().sum().backward()
    assert relative_error(packed.cpu(), exact) <= 1.1 * relative_error(padded, exact)
    assert all(bool(p.grad.isfinite().all()) for p in prior.parameters() if p.grad is not None)


@pytest.mark.parametrize("config", [{"added_emb_type": None}, {"additional_embeddings": 5}], ids=str)
def test_a_prior_with_another_sequence_is_refused(config: dict[str, Any]) -> None:
    (name,) = config
    with pytest.raises(ModelError, match=f"{name} .*expected.*padded captions"):
        allow_packing(make_prior(**config))


def test_a_prior_that_was_not_prepared_is_refused() -> None:
    prior, batch = make_prior(), make_batch((3,))
    with pytest.raises(ModelError, match=r"AttnProcessor2_0; expected PackedAttention"):
        predict_packed(prior, **batch)
    allow_packing(prior)
    prior.transformer_blocks[1].attn1.set_processor(prior.transformer_blocks[0].attn1.processor.unpacked)
    with pytest.raises(ModelError, match=r"transformer_blocks\.1\.attn1"):
        predict_packed(prior, **batch)


def test_captions_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ModelError, match=r"up to 78 tokens, 80 in all; expected at most 77"):
        plan_packing(torch.tensor([0, 2, 80]), 80, 77)
    with pytest.raises(ModelError, match=r"80 in all; expected .* 81 in all"):
        plan_packing(torch.tensor([0, 40, 80]), 81, 77)


def test_attention_that_is_not_to_be_had_is_refused() -> None:
    prior, batch = make_prior(), make_batch((3,))
    allow_packing(prior)
    with pytest.raises(ConfigError, match=r"'varlen' on cpu; expected a CUDA GPU"):
        predict_packed(prior, **batch, attention="varlen")
    with pytest.raises(ConfigError, match=r"'grouped', with rounded shapes; expected 'padded' or 'varlen'"):
        predict_packed(prior, **batch, attention="grouped", bucketed=True)
    with pytest.raises(ConfigError, match=r"'varlen' with 2 draws of noise; expected one"):
        predict_packed(prior, **several_draws(batch, 2)[0], attention="varlen")
    with pytest.raises(ConfigError, match=r"'dense'; expected one of grouped, padded, varlen"):
        predict_packed(prior, **batch, attention="dense")  # type: ignore[arg-type]
