"""A small prior, captions of many lengths, and what the prior makes of them with padding, as diffusers runs it."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import PriorTransformer
from torch import Tensor
from torch.nn import functional

LENGTHS = (5, 0, 77, 1, 16, 16, 5, 76)


def make_prior(**config: Any) -> PriorTransformer:
    """A tiny prior in evaluation mode whose every weight is random: the stock positions and biases start as zeros."""
    config = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 3, "embedding_dim": 24} | config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        prior = PriorTransformer(**config).eval()
        for parameter in prior.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return prior


def make_batch(lengths: Sequence[int], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def draw(count: int) -> Tensor:
        return torch.randn(count, 24, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "noisy": draw(len(lengths)),
        "timesteps": torch.arange(len(lengths)) * 97 + 3,
        "text_embeds": draw(len(lengths)),
        "hidden_states": draw(sum(lengths)),
        "offsets": functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)),
    }


def assert_equal_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float = 1e-12) -> None:
    assert found.keys() == expected.keys()
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        # A constant added to all keys moves all scores of a query alike: its gradient is zero but for rounding.
        if name.endswith("to_k.bias"):
            assert found[name].abs().max() <= bound * scale, name
        else:
            assert relative_error(found[name], gradient) <= bound, name


def predict_padded(prior: PriorTransformer, batch: dict[str, Tensor]) -> Tensor:
    captions = batch["hidden_states"].split(batch["offsets"].diff().tolist())
    room = prior.config.num_embeddings
    states = torch.stack([functional.pad(caption, (0, 0, 0, room - len(caption))) for caption in captions])
    mask = torch.arange(room, device=states.device) < batch["offsets"].diff()[:, None]
    return prior(
        batch["noisy"],
        timestep=batch["timesteps"],
        proj_embedding=batch["text_embeds"],
        encoder_hidden_states=states,
        attention_mask=mask,
    ).predicted_image_embedding


def gradients(prior: PriorTransformer, prediction: Tensor) -> dict[str, Tensor]:
    """Of a sum in which every number predicted has a weight of its own."""
    prior.zero_grad()
    (
        prediction * torch.linspace(-1, 1, prediction.numel(), dtype=prediction.dtype).view_as(prediction)
    ).sum().backward()
    return {name: p.grad.clone() for name, p in prior.named_parameters() if p.grad is not None}


def relative_error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return ((found - expected).norm() / expected.norm()).item()
