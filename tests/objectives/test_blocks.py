"""Recomputed blocks give the same numbers from less memory; xformers is chosen where it works, else refused."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models import attention_processor
from recorded import load_objective, recorded_steps
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kcache.errors import ConfigError
from kcache.objectives.blocks import check_attention, choose_attention, recompute_blocks
from kcache.objectives.lora import add_lora
from kcache.objectives.losses import Objective


@pytest.fixture
def xformers_found(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine on which xformers is installed."""
    monkeypatch.setattr("kcache.objectives.blocks.is_xformers_available", lambda: True)
    monkeypatch.setattr(attention_processor, "is_xformers_available", lambda: True)
    return monkeypatch


@pytest.fixture
def cuda_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with CUDA, as far as diffusers' own trial of xformers can tell."""
    randn = torch.randn
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "randn", lambda *args, device=None, **kwargs: randn(*args, **kwargs))


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_sdpa_is_what_the_networks_use_anyway(oracle: Path, stage: str) -> None:
    network = load_objective(oracle, stage, packed=False).network
    before = {name: type(processor) for name, processor in network.attn_processors.items()}
    check_attention("sdpa", type(network))
    choose_attention(network, "sdpa")
    assert {name: type(processor) for name, processor in network.attn_processors.items()} == before
    assert all(processor.__name__.endswith("2_0") for processor in before.values())


def test_xformers_is_refused_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kcache.objectives.blocks.is_xformers_available", lambda: False)
    with pytest.raises(ConfigError, match=r"not installed; .*pip install xformers, or use --attention sdpa"):
        check_attention("xformers", UNet2DConditionModel)


@pytest.mark.usefixtures("xformers_found")
def test_xformers_is_refused_without_cuda(oracle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    network = load_objective(oracle, "decoder", packed=False).network
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        choose_attention(network, "xformers")


@pytest.mark.usefixtures("xformers_found", "cuda_found")
def test_xformers_is_refused_for_the_masks_of_the_prior(oracle: Path) -> None:
    network = load_objective(oracle, "prior", packed=False).network
    with pytest.raises(ConfigError, match="masks its 81 tokens"):
        choose_attention(network, "xformers")


@pytest.mark.usefixtures("cuda_found")
def test_an_xformers_without_kernels_is_named(oracle: Path, xformers_found: pytest.MonkeyPatch) -> None:
    def memory_efficient_attention(*args: Tensor, **kwargs: object) -> Tensor:
        raise NotImplementedError("No operator found\n  for these inputs")

    ops = SimpleNamespace(memory_efficient_attention=memory_efficient_attention)
    xformers_found.setattr(attention_processor, "xformers", SimpleNamespace(ops=ops))
    network = load_objective(oracle, "decoder", packed=False).network
    with pytest.raises(ConfigError, match=r"fails on this machine \(No operator found for these inputs\)"):
        choose_attention(network, "xformers")


@pytest.mark.usefixtures("cuda_found")
def test_the_decoder_computes_the_same_through_xformers(oracle: Path, xformers_found: pytest.MonkeyPatch) -> None:
    objective = load_objective(oracle, "decoder", packed=False)
    step = recorded_steps(oracle, "decoder")[0]
    expected = objective(step, step["noise"], step["timesteps"])
    calls = []

    def memory_efficient_attention(
        query: Tensor, key: Tensor, value: Tensor, attn_bias: None = None, op: None = None, scale: float | None = None
    ) -> Tensor:
        # What xformers computes from (batch * heads, tokens, channels); a mask is what it could not take.
        assert attn_bias is None
        calls.append(key.shape[1] - query.shape[1])
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scale)

    ops = SimpleNamespace(memory_efficient_attention=memory_efficient_attention)
    xformers_found.setattr(attention_processor, "xformers", SimpleNamespace(ops=ops))
    choose_attention(objective.network, "xformers")
    calls.clear()
    loss = objective(step, step["noise"], step["timesteps"])
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    image_tokens = objective.network.encoder_hid_proj.num_image_text_embeds
    assert calls == [image_tokens] * len(objective.network.attn_processors)


STAGES = ["prior", "decoder"]
BLOCKS = {"prior": 2, "decoder": 14}  # transformer blocks; 10 resnets and 4 attentions


class Alive(TorchDispatchMode):
    """Counts the bytes of all that was computed under it and still exists."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._storages[StorageWeakRef(storage)] = storage.nbytes()
        return result

    def bytes(self) -> int:
        return sum(size for storage, size in self._storages.items() if not storage.expired())


def objective(oracle: Path, stage: str, recompute: bool, lora: bool = False) -> Objective:
    made = load_objective(oracle, stage, packed=False).train()
    if lora:
        add_lora(made.network, rank=4, alpha=None, dropout=0.5, target_modules=(), seed=0)
    if recompute:
        recompute_blocks(made.network)
    return made


def loss_and_gradients(made: Objective, oracle: Path, stage: str, autocast: bool = False) -> dict[str, Tensor]:
    step = recorded_steps(oracle, stage)[0]
    with torch.random.fork_rng(devices=[]), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        torch.manual_seed(0)
        loss = made(step, step["noise"], step["timesteps"])
        loss.backward()
    return {"loss": loss} | {name: p.grad for name, p in made.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("lora", "autocast"), [(False, False), (False, True), (True, False), (True, True)])
def test_loss_and_gradients_are_the_same_bits(oracle: Path, stage: str, lora: bool, autocast: bool) -> None:
    kept = loss_and_gradients(objective(oracle, stage, False, lora), oracle, stage, autocast)
    again = loss_and_gradients(objective(oracle, stage, True, lora), oracle, stage, autocast)
    assert kept.keys() == again.keys()
    assert len(kept) > 10
    assert all(torch.equal(kept[name], again[name]) for name in kept)


@pytest.mark.parametrize("stage", STAGES)
def test_each_block_is_computed_again_once(oracle: Path, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *args: calls.append(1) or linear(*args))
    counts = []
    for recompute in (False, True):
        calls.clear()
        loss_and_gradients(objective(oracle, stage, recompute), oracle, stage)
        counts.append(len(calls))
    assert counts[0] < counts[1] <= 2 * counts[0]


@pytest.mark.parametrize(("stage", "share"), [("prior", 0.4), ("decoder", 0.6)])
def test_less_is_kept_until_the_backward_pass(oracle: Path, stage: str, share: float) -> None:
    step = recorded_steps(oracle, stage)[0]
    kept = []
    for recompute in (False, True):
        made = objective(oracle, stage, recompute)
        with Alive() as alive:
            loss = made(step, step["noise"], step["timesteps"])
            kept.append(alive.bytes())
        del loss
    assert kept[1] < share * kept[0]


def test_the_attentions_of_the_decoder_are_covered_too(oracle: Path) -> None:
    step = recorded_steps(oracle, "decoder")[0]
    kept = []
    for ours in (False, True):
        made = objective(oracle, "decoder", ours)
        if not ours:
            made.network.enable_gradient_checkpointing()
        with Alive() as alive:
            loss = made(step, step["noise"], step["timesteps"])
            kept.append(alive.bytes())
        del loss
    assert kept[1] < 0.75 * kept[0]


@pytest.mark.parametrize("stage", STAGES)
def test_names_of_parameters_stay(oracle: Path, stage: str, tmp_path: Path) -> None:
    plain, changed = objective(oracle, stage, False).network, objective(oracle, stage, True).network
    assert changed.state_dict().keys() == plain.state_dict().keys()
    changed.save_pretrained(tmp_path)
    assert type(plain).from_pretrained(tmp_path).state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("stage", STAGES)
def test_a_copy_computes_with_its_own_weights(oracle: Path, stage: str) -> None:
    original = objective(oracle, stage, True)
    duplicate = copy.deepcopy(original)
    before = loss_and_gradients(duplicate, oracle, stage)["loss"]
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.zero_()
    assert torch.equal(loss_and_gradients(duplicate, oracle, stage)["loss"], before)


@pytest.mark.parametrize("stage", STAGES)
def test_without_gradients_nothing_is_wrapped(oracle: Path, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = objective(oracle, stage, True).eval()
    calls: list[int] = []
    monkeypatch.setattr(
        "kcache.objectives.blocks.checkpoint",
        lambda forward, *args, use_reentrant, **kwargs: calls.append(1) or forward(*args, **kwargs),
    )
    step = recorded_steps(oracle, stage)[0]
    with torch.no_grad():
        made(step, step["noise"], step["timesteps"])
    assert calls == []
    made(step, step["noise"], step["timesteps"])
    assert len(calls) == BLOCKS[stage]
