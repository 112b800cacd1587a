"""The loss of a prior that learns beside its class rows: as DreamBooth has it, and by the network's one pass."""

from pathlib import Path

import pytest
import torch
from recorded import load_objective, recorded_steps
from torch import Tensor

from kcache.objectives.losses import PriorObjective
from kcache.objectives.preservation import PreservationObjective


def halves(oracle: Path, draws: int = 1) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The batches of two recorded steps, with noise and timesteps."""
    generator = torch.Generator().manual_seed(0)
    steps = recorded_steps(oracle, "prior")[:2]
    for step in steps:
        count = draws * len(step["image_embeds"])
        step["noise"] = torch.randn(count, step["image_embeds"].shape[1], generator=generator)
        step["timesteps"] = torch.randint(1000, (count,), generator=generator)
    return steps[0], steps[1]


def together(own: dict[str, Tensor], kept: dict[str, Tensor]) -> dict[str, Tensor]:
    return own | {f"class_{name}": array for name, array in kept.items()}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("snr_gamma", "draws", "weigh"), [(None, 1, False), (5.0, 1, False), (None, 3, False), (5.0, 3, True)]
)
def test_the_loss_is_that_of_the_instances_and_weight_times_that_of_the_class_rows(
    oracle: Path, packed: bool, snr_gamma: float | None, draws: int, weigh: bool
) -> None:
    """Samples may have weights, class rows have none."""
    network = load_objective(oracle, "prior").network
    plain, objective = PriorObjective(network), PreservationObjective(network, weight=0.25, packed=packed)
    own, kept = halves(oracle, draws)
    own |= {"weight": torch.tensor([0.5, 3.0])} if weigh else {}
    parts = [plain.loss(each, each["noise"], each["timesteps"], snr_gamma) for each in (own, kept)]
    (expected,) = torch.autograd.grad(parts[0] + 0.25 * parts[1], [network.proj_in.weight])
    loss = objective(together(own, kept), own["noise"], own["timesteps"], snr_gamma)
    assert loss.item() == pytest.approx((parts[0] + 0.25 * parts[1]).item(), rel=1e-5)
    assert objective.told(loss).tolist() == pytest.approx([part.item() for part in parts], rel=1e-5)
    assert not objective.told(loss).requires_grad
    (found,) = torch.autograd.grad(loss, [network.proj_in.weight])
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_the_formula_by_hand(oracle: Path) -> None:
    objective = PreservationObjective(load_objective(oracle, "prior").network, weight=2.0)
    own, kept = halves(oracle)
    with torch.no_grad():
        loss = objective(together(own, kept), own["noise"], own["timesteps"])
        squares = []
        for each in (own, kept):
            prior, step = objective.network, each["timesteps"]
            target = (each["image_embeds"] - prior.clip_mean) / prior.clip_std
            alpha = objective.scheduler.alphas_cumprod[step][:, None]
            noisy = alpha.sqrt() * target + (1 - alpha).sqrt() * each["noise"]
            predicted = prior(
                noisy, step, each["text_embeds"], each["last_hidden_state"], each["text_mask"].bool()
            ).predicted_image_embedding
            squares.append(((predicted - target) ** 2).mean())
    assert loss.item() == pytest.approx((squares[0] + 2 * squares[1]).item(), rel=1e-5)


def test_held_out_samples_have_no_class_rows(oracle: Path) -> None:
    network = load_objective(oracle, "prior").network
    own, _ = halves(oracle)
    inputs = own, own["noise"], own["timesteps"]
    with torch.no_grad():
        found, expected = (
            kind.measure(*inputs) for kind in (PreservationObjective(network, weight=1.0), PriorObjective(network))
        )
    assert torch.equal(found, expected)
