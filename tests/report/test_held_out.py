"""Held-out pictures: what the stock pipeline makes of the pictures themselves, from the cache's rows alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    KandinskyV22ControlnetPipeline,
    KandinskyV22InpaintPipeline,
    UNet2DConditionModel,
    VQModel,
)
from filling import fills_holes, sees_hints
from PIL import Image

from kcache.config import TrainConfig
from kcache.encoders.decoding import Decoding, decode_image
from kcache.encoders.pixels import movq_pixels
from kcache.encoders.repositories import PIPELINES, find_repository
from kcache.loader import draw_masks
from kcache.loader.chance import draw_noise, draw_own_mask
from kcache.report import held_out
from kcache.report.held_out import GREY, HeldOut, HeldOutPictures, read_held_out
from kcache.store.cache import Cache

SEED, TURN, STEPS = 7, 11, 2


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_out, "DECODER_STEPS", STEPS)


@pytest.fixture(scope="module")
def network(oracle: Path) -> UNet2DConditionModel:
    unet = UNet2DConditionModel.from_pretrained(oracle / "decoder", subfolder="unet")
    fills_holes(unet)
    return unet.train()


@pytest.fixture(scope="module")
def following(oracle: Path) -> UNet2DConditionModel:
    unet = UNet2DConditionModel.from_pretrained(oracle / "decoder", subfolder="unet")
    sees_hints(unet)
    return unet.train()


def hint_of(shape: tuple[int, int], channels: int) -> torch.Tensor:
    return torch.randint(256, (1, channels, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def drawer(oracle: Path, *samples: HeldOut, **settings: Any) -> HeldOutPictures:
    kind: dict[str, Any] = {"inpaint": True} if samples[0].hint is None else {"hint": "own"}
    config = TrainConfig(stage="decoder", output_dir="run", seed=SEED, **kind, **settings)
    base = find_repository(str(oracle / "decoder"), None, PIPELINES["decoder"].components)
    scheduler = DDPMScheduler.from_pretrained(oracle / "decoder", subfolder="scheduler")
    return HeldOutPictures(samples, config, base, scheduler, "cpu")


def filled_by_the_stock_pipeline(oracle: Path, network: UNet2DConditionModel, pixels: Any, rows: Any) -> Image.Image:
    """What it makes of a picture's own pixels, which it encodes, and of the mask before it has grown."""
    scheduler = DDPMScheduler.from_pretrained(oracle / "decoder", subfolder="scheduler")
    movq = VQModel.from_pretrained(oracle / "decoder", subfolder="movq")
    pipeline = KandinskyV22InpaintPipeline(unet=network.eval(), scheduler=scheduler, movq=movq)
    pipeline.set_progress_bar_config(disable=True)
    hole = 1 - draw_masks(SEED, np.array([TURN]), 8, 8, growth=False)
    drawn = pipeline(
        image_embeds=torch.from_numpy(rows["image_embeds"][:1]),
        negative_image_embeds=torch.from_numpy(rows["image_embeds"][1:]),
        image=torch.from_numpy(pixels)[None],
        mask_image=torch.from_numpy(hole.repeat(8, 2).repeat(8, 3)),
        latents=torch.from_numpy(draw_noise(SEED, np.array([TURN]), (4, 8, 8))),
        generator=[torch.Generator().manual_seed(SEED)],
        height=64, width=64, num_inference_steps=STEPS,
    )  # fmt: skip
    network.train()
    [image] = drawn.images
    return image


def test_a_hole_is_filled_as_the_stock_pipeline_fills_it_in_the_picture_itself(
    oracle: Path, cache: str, network: UNet2DConditionModel
) -> None:
    opened = Cache.open(cache)
    name = opened.told(3, "name")
    how = Decoding.of(opened.recipes[opened.table_of("image_embeds")])
    pixels = movq_pixels(decode_image((oracle / "data" / name).read_bytes(), how), (64, 64))
    rows = opened.read([3, 3], ["image_embeds"], drop_image=np.array([False, True]))
    expected = filled_by_the_stock_pipeline(oracle, network, pixels, rows)

    drawing = drawer(oracle, read_held_out(opened, 3, TURN, SEED))
    before, state = [module.training for module in network.modules()], torch.get_rng_state()
    whole, hole, filled = drawing.draw(network)
    assert [module.training for module in network.modules()] == before
    assert torch.equal(torch.get_rng_state(), state)
    assert np.abs(np.asarray(filled).astype(int) - np.asarray(expected)).max() <= 1
    assert drawing.prompts == [f"1. {name}: as it is, its hole, filled"] * 3

    kept = draw_masks(SEED, np.array([TURN]), 8, 8)[0, 0].repeat(8, 0).repeat(8, 1) > 0
    assert 0 < kept.mean() < 1
    assert (np.asarray(hole)[~kept] == GREY).all()
    assert np.array_equal(np.asarray(hole)[kept], np.asarray(whole)[kept])
    again = drawing.draw(network)
    assert [picture.tobytes() for picture in again] == [picture.tobytes() for picture in (whole, hole, filled)]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_is_drawn_by_its_hint_as_the_stock_pipeline_draws_it(
    oracle: Path, cache: str, following: UNet2DConditionModel, channels: int
) -> None:
    opened, hint = Cache.open(cache), hint_of((64, 64), channels)
    sample = read_held_out(opened, 3, TURN, SEED)
    drawing, other = (drawer(oracle, replace(sample, hint=given)) for given in (hint, 255 - hint))
    before, state = [module.training for module in following.modules()], torch.get_rng_state()
    whole, shown, drawn = drawing.draw(following)
    assert [module.training for module in following.modules()] == before
    assert torch.equal(torch.get_rng_state(), state)
    assert whole.tobytes() != drawn.tobytes()
    assert np.array_equal(np.asarray(shown), hint.expand(-1, 3, -1, -1)[0].permute(1, 2, 0).numpy())
    assert drawing.prompts == [f"1. {opened.told(3, 'name')}: as it is, its hint, drawn by it"] * 3

    scheduler = DDPMScheduler.from_pretrained(oracle / "decoder", subfolder="scheduler")
    movq = VQModel.from_pretrained(oracle / "decoder", subfolder="movq")
    pipeline = KandinskyV22ControlnetPipeline(unet=following.eval(), scheduler=scheduler, movq=movq)
    pipeline.set_progress_bar_config(disable=True)
    rows = opened.read([3, 3], ["image_embeds"], drop_image=np.array([False, True]))
    [expected] = pipeline(
        image_embeds=torch.from_numpy(rows["image_embeds"][:1]),
        negative_image_embeds=torch.from_numpy(rows["image_embeds"][1:]),
        hint=hint.expand(-1, 3, -1, -1) / 255,
        latents=torch.from_numpy(draw_noise(SEED, np.array([TURN]), (4, 8, 8))),
        generator=[torch.Generator().manual_seed(SEED)],
        height=64, width=64, num_inference_steps=STEPS,
    ).images  # fmt: skip
    following.train()
    assert np.abs(np.asarray(drawn).astype(int) - np.asarray(expected)).max() <= 1
    assert np.abs(np.asarray(other.draw(following)[2]).astype(int) - np.asarray(expected)).max() > 1


@pytest.mark.parametrize("channels", [0, 1])
def test_pictures_have_the_shapes_that_they_have_in_the_cache(
    oracle: Path, bucketed: Path, network: UNet2DConditionModel, following: UNet2DConditionModel, channels: int
) -> None:
    parts = Cache.open(bucketed / "cache", (64,)).by_shape("latents")
    samples = [read_held_out(part, 0, TURN, SEED) for part in parts]
    if channels:
        samples = [
            replace(sample, hint=hint_of(part.shape or (0, 0), channels))
            for sample, part in zip(samples, parts, strict=True)
        ]
    drawn = drawer(oracle, *samples, mixed_precision="bf16").draw(following if channels else network)
    expected = [(width, height) for height, width in (part.shape or (0, 0) for part in parts) for _ in range(3)]
    assert [picture.size for picture in drawn] == expected
    assert len(set(expected)) > 2


def test_the_hole_is_the_samples_own_where_its_turn_takes_that(controlled: Path) -> None:
    part, turns = Cache.open(controlled / "squares"), range(40)
    own = [part.read([sample], ["masks"])["masks"][0, 0] for sample in range(len(part))]
    sample = next(number for number, mask in enumerate(own) if not mask.all())
    whole = next(number for number, mask in enumerate(own) if mask.all())

    def takes(number: int, turn: int, share: float) -> bool:
        drawn, taken = (read_held_out(part, number, turn, SEED, own_share=each).mask for each in (0.0, share))
        assert np.array_equal(taken, drawn) or np.array_equal(taken, own[number])
        return not np.array_equal(taken, drawn)

    assert all(takes(sample, turn, 1.0) for turn in turns)
    assert not any(takes(whole, turn, 1.0) for turn in turns)
    assert 0 < sum(takes(sample, turn, 0.5) for turn in turns) < len(turns)
    as_measured = [bool(draw_own_mask(SEED, np.array([turn]), 0.5)[0]) for turn in turns]
    assert [takes(sample, turn, 0.5) for turn in turns] == as_measured
