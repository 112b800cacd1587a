"""The objectives compute what the upstream scripts computed, step for step."""

from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from recorded import flat_text, load_objective, recorded_steps
from torch import Tensor

from kcache.errors import ModelError
from kcache.objectives.losses import DecoderObjective


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_ten_steps_give_the_losses_of_the_upstream_script(oracle: Path, stage: str) -> None:
    objective = load_objective(oracle, stage).train()
    parameters = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)
    for step in recorded_steps(oracle, stage):
        loss = objective(step, step["noise"], step["timesteps"])
        assert loss.item() == pytest.approx(step["loss"].item(), abs=1e-6)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(("stage", "divides"), [("prior", False), ("decoder", True)])
def test_min_snr_weighs_each_sample(oracle: Path, stage: str, divides: bool) -> None:
    objective = load_objective(oracle, stage)
    step = recorded_steps(oracle, stage)[0]
    timesteps = torch.tensor([5, 900])
    alphas = objective.scheduler.alphas_cumprod[timesteps]
    snr = alphas / (1 - alphas)
    weight = torch.minimum(snr, torch.full_like(snr, 5.0))
    weight = weight / snr if divides else weight
    with torch.no_grad():
        alone = [objective.loss(one_sample(step, i), step["noise"][i : i + 1], timesteps[i : i + 1]) for i in range(2)]
        weighted = objective.loss(step, step["noise"], timesteps, snr_gamma=5.0)
    assert weighted.item() == pytest.approx((torch.stack(alone) * weight).mean().item(), rel=1e-5)


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_the_loss_is_the_mean_of_the_losses(oracle: Path, stage: str) -> None:
    objective = load_objective(oracle, stage)
    step = recorded_steps(oracle, stage)[0]
    inputs = step, step["noise"], step["timesteps"]
    with torch.no_grad():
        prediction, target = objective.predict(*inputs)
        losses, weighted = objective.losses(*inputs), objective.losses(*inputs, snr_gamma=5.0)
        assert losses.shape == weighted.shape == (len(step["timesteps"]),)
        assert torch.equal(objective.loss(*inputs), torch.nn.functional.mse_loss(prediction, target))
        assert torch.allclose(objective.loss(*inputs), losses.mean(), rtol=1e-6)
        assert torch.equal(objective.loss(*inputs, snr_gamma=5.0), weighted.mean())
        measured = objective.measure(*inputs)
    assert measured.shape == (len(objective.measures), len(losses))
    assert torch.equal(measured[objective.measures.index("loss")], losses)


@pytest.mark.parametrize("stage", ["prior", "decoder"])
@pytest.mark.parametrize("snr_gamma", [None, 5.0])
def test_a_sample_counts_its_weight_and_is_measured_without(oracle: Path, stage: str, snr_gamma: float | None) -> None:
    """The mean of weight × loss, not divided by the sum of the weights."""
    objective = load_objective(oracle, stage)
    step = recorded_steps(oracle, stage)[0]
    draws = 2 if stage == "prior" else 1
    noise, timesteps = (step[name].repeat_interleave(draws, 0) for name in ("noise", "timesteps"))
    weight = torch.tensor([0.25, 3.0])
    with torch.no_grad():
        losses = objective.losses(step, noise, timesteps, snr_gamma).reshape(2, draws)
        weighted = objective.loss({**step, "weight": weight}, noise, timesteps, snr_gamma)
        assert weighted.item() == pytest.approx((losses * weight[:, None]).mean().item(), rel=1e-5)
        assert objective.loss({**step, "weight": torch.zeros(2)}, noise, timesteps, snr_gamma).item() == 0
        assert objective.loss({**step, "weight": 2 * torch.ones(2)}, noise, timesteps, snr_gamma).item() == (
            pytest.approx(2 * losses.mean().item(), rel=1e-5)
        )


def one_sample(step: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    sample = {name: array[i : i + 1] for name, array in step.items() if name != "text_encoder_hidden_states"}
    if "text_mask" in sample:
        sample.update(flat_text(sample))
    return sample


def test_the_constants_of_the_prior_do_not_learn(oracle: Path) -> None:
    objective = load_objective(oracle, "prior")
    learning = {name for name, parameter in objective.named_parameters() if parameter.requires_grad}
    step = recorded_steps(oracle, "prior")[0]
    objective(step, step["noise"], step["timesteps"]).backward()
    assert learning == {name for name, parameter in objective.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_half_precision_rows_give_a_float32_loss(oracle: Path, stage: str) -> None:
    objective = load_objective(oracle, stage)
    step = recorded_steps(oracle, stage)[0]
    kept = {"noise", "timesteps", "text_offsets"}
    half = {
        name: array.half() if name not in kept and array.is_floating_point() else array for name, array in step.items()
    }
    loss = objective.loss(half, step["noise"], step["timesteps"])
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(step["loss"].item(), rel=1e-3)


def test_a_scheduler_of_another_kind_of_model_is_refused(oracle: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(oracle / "decoder", subfolder="unet")
    with pytest.raises(ModelError, match=r"'v_prediction'.*'epsilon'"):
        DecoderObjective(unet, DDPMScheduler(prediction_type="v_prediction"))
