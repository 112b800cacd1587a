"""A decoder is trained by hints, own masks and loss masks of a cache: the same online, interrupted, of all shapes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from controlled import FLAGS
from diffusers import KandinskyV22ControlnetPipeline
from filling import MODEL
from PIL import Image
from short_runs import LORA_WEIGHTS, WEIGHTS, assert_equal_tensors, config, course

from kcache import Cache
from kcache.config.shapes import crop_box
from kcache.errors import CacheIncompleteError, ConfigError
from kcache.loader.batches import CacheLoader
from kcache.loader.chance import draw_noise
from kcache.objectives import InpaintObjective
from kcache.training.trainer import train
from kcache.training.validation import first_looked_at, split_by_key


def online(folder: Path) -> dict[str, Any]:
    return {"online": str(folder / "source"), **FLAGS}


STEPS = 2
"""In which held-out pictures are drawn."""
WATCHED: dict[str, Any] = {"val_fraction": 0.1, "validation_steps": 30}  # two of six
RUNS: dict[str, dict[str, Any]] = {
    "hint": {"hint": "edges", "loss_mask": True, **WATCHED},
    "masks": {"inpaint": True, "mask_share": 0.7, **WATCHED},
    "lora": {"hint": "own", "lora_rank": 2, **WATCHED},
}


def held_out(folder: Path) -> list[tuple[Cache, int, int]]:
    """The held-out samples that are drawn, as `first_looked_at` has them."""
    _, rest = split_by_key(Cache.open(folder / "cache", buckets=True, flip=True), WATCHED["val_fraction"])
    return first_looked_at(rest, ("image_embeds", "latents", "hint_edges"), 4)


def check_held_out(folder: Path, run: Path) -> None:
    """Each held-out picture is what stock diffusers draw with the result of `run`, by edges cut from their own file."""
    pipeline = KandinskyV22ControlnetPipeline.from_pretrained(run)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.movq_scale_factor = 1  # or it would round sides up to multiples of 64
    shapes = set()
    for number, (part, sample, turn) in enumerate(held_out(folder)):
        height, width = part.shape or (64, 64)
        shapes.add((height, width))
        pictures = [Image.open(run / f"pictures/held-out-000030/{3 * number + i:02d}.png") for i in range(3)]
        _, shown, drawn = (np.asarray(picture).astype(int) for picture in pictures)
        with Image.open(folder / "source" / f"{Path(part.told(sample, 'name')).stem}.edges.tif") as edges:
            cut = edges.convert("L").crop(crop_box(*edges.size, (height, width)))
            hint = np.asarray(cut.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=1))
        assert (np.abs(shown - hint[..., None]) <= 1).all()
        rows = part.read([sample, sample], ["image_embeds"], drop_image=np.array([False, True]))["image_embeds"]
        [expected] = pipeline(
            image_embeds=torch.from_numpy(rows[:1]).float(),
            negative_image_embeds=torch.from_numpy(rows[1:]).float(),
            hint=torch.from_numpy(hint.copy()).expand(1, 3, -1, -1) / 255,
            latents=torch.from_numpy(draw_noise(0, np.array([turn]), (4, height // 8, width // 8))),
            generator=[torch.Generator().manual_seed(number)],
            height=height // 8,
            width=width // 8,
            num_inference_steps=STEPS,
        ).images
        assert np.abs(drawn - np.asarray(expected)).max() <= 2
    assert len(shapes) > 1


@pytest.mark.parametrize("kind", RUNS)
def test_thirty_steps_from_the_cache_equal_thirty_with_the_encoders_in_the_loop(
    controlled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("kcache.report.held_out.DECODER_STEPS", STEPS)
    settings = {"max_train_steps": 30, "gradient_accumulation_steps": 1} | RUNS[kind]
    settings |= {MODEL: str(controlled / "following")} if kind == "hint" else {}
    settings |= {"num_validation_images": 0} if kind == "masks" else {}
    train(controlled / "cache", config(tmp_path / "cached", "decoder", **settings))
    train(controlled / "cache", config(tmp_path / "online", "decoder", **settings, **online(controlled)))
    assert len(course(tmp_path / "cached")) == 30
    assert course(tmp_path / "online") == course(tmp_path / "cached")
    weights = LORA_WEIGHTS if kind == "lora" else WEIGHTS["decoder"]
    assert_equal_tensors(tmp_path / "online" / weights, tmp_path / "cached" / weights)
    drawn, again = (
        [path.read_bytes() for path in sorted((tmp_path / run / "pictures").glob("held-out-000030/*.png"))]
        for run in ("cached", "online")
    )
    assert drawn == again
    assert len(drawn) == (0 if kind == "masks" else 3 * len(held_out(controlled)))
    if kind == "hint":
        check_held_out(controlled, tmp_path / "cached")


@pytest.mark.parametrize(("kind", "points"), [("hint", range(1, 6)), ("masks", [2])])
def test_an_interrupted_run_goes_on_bit_for_bit(
    controlled: Path, tmp_path: Path, kind: str, points: Sequence[int]
) -> None:
    settings = {"gradient_accumulation_steps": 1, "max_train_steps": 6, "num_validation_images": 0} | RUNS[kind]
    train(controlled / "cache", config(tmp_path / "whole", "decoder", **settings, checkpointing_steps=1))
    for step in points:
        path = str(tmp_path / "whole" / f"checkpoint-{step}")
        part = config(tmp_path / f"from-{step}", "decoder", **settings, resume_from_checkpoint=path)
        train(controlled / "cache", part)
        assert course(tmp_path / f"from-{step}") == course(tmp_path / "whole")[step:]
        assert_equal_tensors(tmp_path / f"from-{step}" / WEIGHTS["decoder"], tmp_path / "whole" / WEIGHTS["decoder"])


def test_batches_are_equal_wherever_rows_wait(controlled: Path) -> None:
    fields = ["latents", "hint_own", "masks", "image_embeds", "loss_masks"]
    for name, buckets in (("cache", True), ("squares", None)):
        cache, found = Cache.open(controlled / name, buckets=buckets), {}
        for residency in ("gpu", "ram", "mmap", "stream"):
            opened = Cache.open(controlled / name, buckets=buckets)
            order = CacheLoader(opened, fields, 2, seed=3, residency=residency, shuffle="stream", image_dropout=0.3)
            found[residency] = list(order)
        assert len(found["ram"]) >= len(cache) // 2
        for residency in ("gpu", "mmap", "stream"):
            for one, other in zip(found[residency], found["ram"], strict=True):
                assert one.keys() == other.keys()
                assert all(torch.equal(one[field], other[field]) for field in one)


def test_own_masks_take_their_share_and_drawn_ones_the_rest(
    controlled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[tuple[torch.Tensor, torch.Tensor]] = []
    mask = InpaintObjective.mask

    def watched(self: InpaintObjective, batch: Any) -> torch.Tensor:
        found = mask(self, batch)
        taken.append((found, batch["masks"] if self.own_share else found))
        return found

    monkeypatch.setattr(InpaintObjective, "mask", watched)
    settings = {"inpaint": True, "max_train_steps": 12, "gradient_accumulation_steps": 1, "mask_growth": False}
    counts = []
    for share in (1.0, None, 0.0):
        taken.clear()
        train(controlled / "squares", config(tmp_path / str(share), "decoder", **settings, mask_share=share))
        pairs = [(m, o) for masks, own in taken for m, o in zip(masks, own, strict=True) if (o == 0).any()]
        counts.append(np.mean([torch.equal(m, o.float()) for m, o in pairs]) if share != 0.0 else 0)
    assert counts[0] == 1
    assert 0 < counts[1] < 1


def test_what_is_not_there_is_said(cache: str, controlled: Path, tmp_path: Path) -> None:
    squares, hinted = str(controlled / "squares"), str(controlled / "following")
    cases: list[tuple[str, dict[str, Any], type[Exception], str]] = [
        (squares, {"hint": "depth"}, CacheIncompleteError, "--hint depth .*: its hints are edges, own; build it again"),
        (cache, {"hint": "depth"}, CacheIncompleteError, "--hint depth wants hint-depth, .*: it has none; build it"),
        (cache, {"inpaint": True, "mask_share": 0.5}, CacheIncompleteError, "--mask-share 0.5 .* with --mask-column"),
        (cache, {"loss_mask": True}, CacheIncompleteError, "--loss-mask True .* or --loss-mask-alpha"),
        (squares, RUNS["hint"] | {"online": str(controlled / "source")}, ConfigError, "its hint-edges and loss_masks"),
    ]
    for given, settings, kind, said in cases:
        base = {MODEL: hinted} if "hint" in settings else {}
        with pytest.raises(kind, match=said):
            train(given, config(tmp_path / "run", "decoder", **base | settings))
