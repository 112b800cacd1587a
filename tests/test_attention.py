"""xformers is chosen where it works, and refused with a reason where it does not."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers.models import attention_processor
from test_objectives import load_objective, recorded_steps
from torch import Tensor

from kcache.attention import check_attention, choose_attention
from kcache.errors import ConfigError


@pytest.fixture
def xformers_found(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine on which xformers is installed."""
    monkeypatch.setattr("kcache.attention.is_xformers_available", lambda: True)
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
    check_attention("sdpa", stage)
    choose_attention(network, "sdpa")
    assert {name: type(processor) for name, processor in network.attn_processors.items()} == before
    assert all(processor.__name__.endswith("2_0") for processor in before.values())


def test_xformers_is_refused_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kcache.attention.is_xformers_available", lambda: False)
    with pytest.raises(ConfigError, match=r"not installed; .*pip install xformers, or use --attention sdpa"):
        check_attention("xformers", "decoder")


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
