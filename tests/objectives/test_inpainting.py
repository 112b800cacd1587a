"""The decoders that fill holes and follow hints see what the stock pipelines show them, and learn from it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    KandinskyV22ControlnetPipeline,
    KandinskyV22InpaintPipeline,
    UNet2DConditionModel,
)
from recorded import load_objective, recorded_steps
from torch import Tensor

from kcache.errors import ModelError
from kcache.loader.masks import grow
from kcache.objectives import DecoderObjective, HintObjective, InpaintObjective, Objective
from kcache.objectives.inpainting import grown
from kcache.objectives.widening import widen, widen_for_hints, widen_for_masks

GAMMA = 5.0
Inputs = tuple[dict[str, Tensor], Tensor, Tensor]


def plain(oracle: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(oracle / "decoder", subfolder="unet")


def scheduler(oracle: Path) -> DDPMScheduler:
    return DDPMScheduler.from_pretrained(oracle / "decoder", subfolder="scheduler")


def inpainting(oracle: Path, *, seen: float = 0.0, **settings: Any) -> InpaintObjective:
    """The objective with a widened decoder, whose new weights are random numbers of scale `seen`."""
    unet = plain(oracle)
    widen_for_masks(unet)
    with torch.no_grad():
        unet.conv_in.weight[:, 4:] = seen * torch.randn(32, 5, 3, 3, generator=torch.manual_seed(1))
    return InpaintObjective(unet, scheduler(oracle), **settings).eval()


def masked(oracle: Path) -> Inputs:
    """A recorded step, with one mask without much of a hole and one with a large one."""
    step = recorded_steps(oracle, "decoder")[0]
    mask = torch.ones(2, 1, *step["latents"].shape[2:])
    mask[0, 0, 3, 4] = 0
    mask[1, 0, 1:] = 0
    return {**step, "mask": mask}, step["noise"], torch.tensor([40, 700])


def test_the_network_sees_what_the_stock_pipeline_shows_it(oracle: Path) -> None:
    """Its input but for the order of samples: noise, kept latents and mask of the picture that was given."""
    objective, shown = inpainting(oracle, seen=0.1), list[Tensor]()
    pipeline = KandinskyV22InpaintPipeline.from_pretrained(oracle / "decoder", unet=objective.network)
    pipeline.set_progress_bar_config(disable=True)
    objective.network.register_forward_pre_hook(
        lambda _, arguments, named: shown.append(named["sample"]), with_kwargs=True
    )
    picture = torch.rand(1, 3, 64, 64, generator=torch.manual_seed(2)) * 2 - 1
    holes = torch.zeros(1, 1, 64, 64)
    holes[..., 16:32, 24:48] = 1
    noise = torch.randn(1, 4, 8, 8, generator=torch.manual_seed(3))
    embeds = torch.zeros(1, 32)
    pipeline(
        embeds, picture, holes, embeds, height=64, width=64, latents=noise, num_inference_steps=1, output_type="pt"
    )
    latents = pipeline.movq.encode(picture).latents
    mask = torch.ones(1, 1, 8, 8)
    mask[..., 1:5, 2:7] = 0
    mask[..., 1, 6] = mask[..., 4, 2] = 1  # two diagonals do not grow
    expected = objective.network_input(noise, {"latents": latents, "mask": mask})
    assert torch.allclose(shown[0][:1, 4:], expected[:, 4:], atol=1e-6)
    assert shown[0].shape[1] == expected.shape[1] == 9


def test_a_widened_decoder_predicts_what_it_did_whatever_it_is_shown(oracle: Path) -> None:
    batch, *rest = masked(oracle)
    batch["hint"] = torch.rand(2, 3, 64, 64, generator=torch.manual_seed(4))
    hinted = plain(oracle)
    widen_for_hints(hinted)
    objectives = [load_objective(oracle, "decoder"), inpainting(oracle), HintObjective(hinted, scheduler(oracle))]
    with torch.no_grad():
        before, *after = (objective.eval().predict(batch, *rest)[0] for objective in objectives)
    for prediction in after:
        assert torch.equal(prediction, before)
    own = objectives[0].network.state_dict()
    for objective in objectives[1:]:
        found = objective.network.state_dict()
        new = {name for name in found if name not in own}
        assert all("input_hint_block" in name for name in new)
        assert torch.equal(found["conv_in.weight"][:, :4], own["conv_in.weight"])
        assert not found["conv_in.weight"][:, 4:].any()
        assert all(torch.equal(found[name], own[name]) for name in own if name != "conv_in.weight")


@pytest.mark.parametrize(
    ("wide", "channels", "embeds"), [(widen_for_masks, 9, "image"), (widen_for_hints, 8, "image_hint")]
)
def test_a_widened_decoder_is_saved_and_loaded_as_any(
    oracle: Path, tmp_path: Path, wide: Any, channels: int, embeds: str
) -> None:
    first, again = plain(oracle), plain(oracle)
    wide(first)
    torch.rand(3)  # what was drawn before has no say
    state = torch.get_rng_state()
    wide(again)
    assert torch.equal(torch.get_rng_state(), state)
    first.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    assert (loaded.config.in_channels, loaded.config.addition_embed_type) == (channels, embeds)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_what_is_new_learns(oracle: Path) -> None:
    batch, *rest = masked(oracle)
    hinted = plain(oracle)
    widen_for_hints(hinted)
    batch["hint"] = torch.rand(2, 3, 64, 64, generator=torch.manual_seed(4))
    for objective in (inpainting(oracle), HintObjective(hinted, scheduler(oracle))):
        objective(batch, *rest).backward()
        assert (objective.network.conv_in.weight.grad[:, 4:].abs().amax((0, 2, 3)) > 0).all()
    assert objective.row_shapes["latents"] == (4, None, None)
    hinted.conv_in.weight.data[:, 4:] = 0.1
    objective(batch, *rest).backward()
    assert hinted.add_embedding.input_hint_block[0].weight.grad.any()
    with torch.no_grad():
        assert objective.loss({**batch, "hint": 1 - batch["hint"]}, *rest) != objective.loss(batch, *rest)


@pytest.mark.parametrize("hole_loss", [False, True])
def test_the_loss_is_over_all_latents_or_over_the_hole(oracle: Path, hole_loss: bool) -> None:
    objective = inpainting(oracle, seen=0.1, hole_loss=hole_loss)
    batch, noise, timesteps = masked(oracle)
    with torch.no_grad():
        prediction, target = objective.predict(batch, noise, timesteps)
        squares, hole = (prediction - target).square().mean(1), 1 - batch["mask"][:, 0]
        overall, inside = squares.mean((1, 2)), (squares * hole).sum((1, 2)) / hole.sum((1, 2))
        # One of 64 latents: its hole counts as one of 2 %.
        learnt = torch.stack([inside[0] * (1 / 64) / 0.02, inside[1]]) if hole_loss else overall
        alphas = objective.scheduler.alphas_cumprod[timesteps]
        snr = alphas / (1 - alphas)
        weighted = (learnt * snr.clamp(max=GAMMA) / snr).mean()
        assert objective(batch, noise, timesteps).item() == pytest.approx(learnt.mean().item(), rel=1e-5)
        assert objective(batch, noise, timesteps, GAMMA).item() == pytest.approx(weighted.item(), rel=1e-5)
        counted = {**batch, "weight": torch.tensor([0.5, 2.0])}
        halves = (learnt * counted["weight"]).mean()
        assert objective(counted, noise, timesteps).item() == pytest.approx(halves.item(), rel=1e-5)
        measured = objective.measure(batch, noise, timesteps)
    assert objective.measures == ("loss", "hole")
    assert torch.allclose(measured, torch.stack([overall, inside]), rtol=1e-5)
    assert not torch.allclose(overall, inside, rtol=1e-2)


def test_half_precision_rows_and_other_shapes_are_taken(oracle: Path) -> None:
    objective = inpainting(oracle, seen=0.1)
    batch, noise, timesteps = masked(oracle)
    half = {name: tensor.half() for name, tensor in batch.items()}
    with torch.no_grad():
        loss = objective.loss(half, noise, timesteps)
        assert loss.item() == pytest.approx(objective.loss(batch, noise, timesteps).item(), rel=1e-3)
        wide = {name: torch.cat([batch[name]] * 2, 3) for name in ("latents", "mask")} | {
            "image_embeds": batch["image_embeds"]
        }
        objective.loss(wide, torch.cat([noise] * 2, 3), timesteps)
    assert loss.dtype == torch.float32


def test_a_hint_is_seen_as_the_stock_pipeline_shows_it_however_it_is_stored(oracle: Path) -> None:
    hinted, shown = plain(oracle), list[dict[str, Tensor]]()
    widen_for_hints(hinted)
    objective = HintObjective(hinted, scheduler(oracle), hint="hint_depth").eval()
    pipeline = KandinskyV22ControlnetPipeline.from_pretrained(oracle / "decoder", unet=hinted)
    pipeline.set_progress_bar_config(disable=True)
    hinted.register_forward_pre_hook(
        lambda _, arguments, named: shown.append(named["added_cond_kwargs"]), with_kwargs=True
    )
    stored = torch.randint(256, (2, 1, 64, 64), generator=torch.manual_seed(2)).to(torch.uint8)
    embeds = torch.zeros(1, 32)
    hint = stored[:1].float().expand(-1, 3, -1, -1) / 255
    pipeline(embeds, embeds, hint, height=64, width=64, num_inference_steps=1, output_type="pt")
    found = objective.conditions({"image_embeds": torch.zeros(2, 32), "hint_depth": stored})["hint"]
    assert torch.equal(found[:1], shown[0]["hint"][:1])
    assert torch.equal(objective.conditions({"image_embeds": embeds, "hint_depth": hint})["hint"], hint)
    assert objective.row_shapes["hint_depth"] == (None, None, None)


def test_samples_may_take_masks_of_their_own(oracle: Path) -> None:
    batch, noise, _ = masked(oracle)
    own = torch.ones(2, 1, *noise.shape[2:], dtype=torch.uint8)
    own[1, 0, 2:4, 5] = 0
    takes = torch.tensor([True, True])
    for growth in (True, False):
        objective = inpainting(oracle, own_share=0.5, growth=growth).train()
        mask = objective.mask({**batch, "masks": own, "own_mask": takes})
        assert torch.equal(mask[0], batch["mask"][0])  # its own has no hole: there is none
        expected = torch.from_numpy(grow(own.numpy())) if growth else own
        assert torch.equal(mask[1], expected[1].float())
        drawn = objective.mask({**batch, "masks": own, "own_mask": ~takes})
        assert torch.equal(drawn, batch["mask"])
        assert objective.drawn == ("noise", "timesteps", "mask", "own_mask")
        assert objective.row_shapes["masks"] == (1, None, None)
        held_out = objective.eval().mask({**batch, "masks": own, "own_mask": takes})
        assert torch.equal(held_out[1], torch.from_numpy(grow(own.numpy()))[1].float())
        shown = objective.network_input(noise, {**batch, "masks": own, "own_mask": takes})
        assert torch.equal(shown[:, 8:], held_out)
    assert inpainting(oracle).drawn == ("noise", "timesteps", "mask")


def test_holes_grow_as_they_do_where_they_are_drawn() -> None:
    masks = (torch.rand(20, 1, 9, 6, generator=torch.manual_seed(5)) < 0.8).float()
    assert torch.equal(grown(masks), torch.from_numpy(grow(masks.numpy())))
    assert not torch.equal(grown(masks), masks)


@pytest.mark.parametrize("hole_loss", [None, False, True])
def test_what_a_loss_mask_leaves_out_counts_nothing(oracle: Path, hole_loss: bool | None) -> None:
    batch, noise, timesteps = masked(oracle)
    levels = torch.zeros(2, 1, *noise.shape[2:], dtype=torch.uint8)
    levels[1, 0, 3:6, 1:5] = 255
    levels[1, 0, 3, 1] = 51
    batch["loss_masks"] = levels
    if hole_loss is None:
        objective: DecoderObjective = DecoderObjective(plain(oracle), scheduler(oracle), loss_mask=True).eval()
    else:
        objective = inpainting(oracle, hole_loss=hole_loss, loss_mask=True)
    with torch.no_grad():
        prediction, target = objective.predict(batch, noise, timesteps)
        counted = levels[:, 0] / 255 * (1 - batch["mask"][:, 0] if hole_loss else 1)
        squares = (prediction - target).square().mean(1)[1]
        expected = torch.stack([torch.zeros(()), (squares * counted[1]).sum() / counted[1].sum()])
        assert torch.allclose(objective.losses(batch, noise, timesteps), expected, rtol=1e-5)
        assert objective(batch, noise, timesteps).item() == pytest.approx(expected.mean().item(), rel=1e-5)
        assert objective.measure(batch, noise, timesteps)[0, 1].item() == pytest.approx(
            ((squares * levels[1, 0] / 255).sum() / (levels[1, 0] / 255).sum()).item(), rel=1e-5
        )
    assert objective.row_shapes["loss_masks"] == (1, None, None)


@pytest.mark.parametrize("kind", [InpaintObjective, HintObjective])
def test_another_decoder_is_refused(oracle: Path, kind: type[Objective]) -> None:
    with pytest.raises(ModelError, match="has 4 input channels and embeds 'image'; expected"):
        kind(plain(oracle), scheduler(oracle))
    other = plain(oracle)
    widen(other, 7)
    with pytest.raises(ModelError, match="has 7 input channels"):
        kind(other, scheduler(oracle))
    assert issubclass(kind, DecoderObjective)
