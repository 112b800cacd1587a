"""The demo of filling holes: what is asked for, how it is judged, and all of it in a few steps."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from kcache.demo.digits import INKS, PAPERS, SIDE, Drawing, is_held_out, write_lesson
from kcache.demo.exam import real_scans
from kcache.demo.holes.exam import (
    EACH,
    LATENT,
    PLAIN,
    TASKS,
    TINTED,
    given_pictures,
    hole,
    real_fillings,
    repaints,
)
from kcache.demo.holes.judging import score_holes
from kcache.demo.holes.kept import ALONE, REAL, kept_mask, measure_kept
from kcache.demo.holes.papers import PAPER, TINT, Edge, Lesson, paper_of, tint_of, written
from kcache.demo.holes.run import HolesSize
from kcache.store.run_directory import read_config
from kcache_cli.app import app


def test_what_is_asked_for_was_never_seen_and_what_is_given_was() -> None:
    asked = repaints(20)
    assert len(asked) == len(TASKS) * 20 * EACH
    for one in asked:
        assert is_held_out(one.wanted)
        assert not is_held_out(one.source)
        assert one.source.paper == one.wanted.paper
        assert (one.edge is not None) == (one.source.ink == one.wanted.ink) == (one.task == TINTED)
        assert (one.source.digit == one.wanted.digit) == (one.task == PLAIN[0])
    assert {(one.task, one.source.digit) for one in asked} == {(task, digit) for task in TASKS for digit in range(10)}
    assert len({one.wanted for one in asked if one.task == PLAIN[1]}) > 25
    tinted = [one for one in asked if one.task == TINTED]
    assert {one.wanted.digit for one in tinted} == set(range(10))
    assert len({one.edge for one in tinted}) == 20


def test_a_hole_has_all_of_the_digit_and_leaves_paper_around() -> None:
    mask = np.asarray(hole()) > 0
    assert mask.sum() == SIDE * SIDE
    asked = repaints(4)
    for picture, one in zip(given_pictures(asked), asked, strict=True):
        np.testing.assert_array_equal(np.asarray(picture)[~mask], np.round(paper_of(one.source, one.edge))[~mask])
    kept = kept_mask()[0, 0]
    assert kept.shape == (PAPER // LATENT, PAPER // LATENT)
    assert (kept[2:-2, 2:-2] == 0).all()
    assert kept.sum() == 4 * (PAPER // LATENT - 1) + 2  # a border, and corners of two of the diagonals


def test_half_of_tinted_paper_is_covered_beyond_a_straight_edge() -> None:
    right = tint_of(Edge(angle=0.0, offset=0.0))
    half = PAPER // 2
    assert (right[:, half:] == TINT).all()
    assert (right[:, :half] == 0).all()
    np.testing.assert_allclose(tint_of(Edge(angle=math.pi / 2, offset=0.0)), right.T, atol=1e-12)  # below
    assert (tint_of(Edge(angle=0.0, offset=3.0))[:, half : half + 3] == 0).all()
    assert tint_of(None).max() == 0
    drawing = Drawing(digit=3, ink="red", paper="mint")
    assert (paper_of(drawing, None) == PAPERS["mint"]).all()
    covered = TINT * np.array(INKS["red"]) + (1 - TINT) * np.array(PAPERS["mint"])
    np.testing.assert_allclose(paper_of(drawing, Edge(angle=0.0, offset=0.0))[0, -1], covered)


def test_every_other_picture_of_the_lesson_is_tinted_and_said_to_be(tmp_path: Path) -> None:
    write_lesson(tmp_path, 20, write=Lesson().write)
    lines = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    for number, line in enumerate(lines):
        with Image.open(tmp_path / line["file_name"]) as picture:
            corners = {picture.getpixel((x, y)) for x in (0, PAPER - 1) for y in (0, PAPER - 1)}
        assert (len(corners) > 1) == (number % 2 == 1)
        assert (len(line["text"]) == 1 and line["text"][0].startswith("the digit")) == (number % 2 == 1)


@pytest.mark.parametrize("task", TASKS)
def test_real_digits_on_paper_that_goes_on_are_right(task: str) -> None:
    asked = [one for one in repaints(10) if one.task == task]
    real = score_holes(real_fillings(asked), asked)
    assert (real.ink, real.paper, real.seamless) == (100, 100, 100)
    assert min(real.digit, real.everything, real.repaint) > 90
    assert real.off < 5
    given = score_holes(given_pictures(asked), asked)
    assert given.everything == 0
    assert (given.paper, given.seamless) == (100, 100)


def test_paper_that_does_not_go_on_is_seen_whatever_the_digit() -> None:
    asked = [one for one in repaints(10) if one.task == TINTED]
    scans = real_scans([one.wanted for one in asked])
    edges = [one.edge for one in asked if one.edge is not None]
    for others in (
        [None] * len(edges),
        [replace(edge, angle=edge.angle + 3) for edge in edges],
    ):
        pictures = [written(scan, one.wanted, other) for scan, one, other in zip(scans, asked, others, strict=True)]
        wrong = score_holes(pictures, asked)
        assert wrong.ink == 100
        assert wrong.digit > 90
        assert max(wrong.seamless, wrong.repaint) <= 10  # a wide digit hides most of its paper
    plain = [one for one in repaints(10) if one.task in PLAIN]
    papers = [next(paper for paper in PAPERS if paper != one.wanted.paper) for one in plain]
    others = [replace(one.wanted, paper=paper) for one, paper in zip(plain, papers, strict=True)]
    pictures = [written(scan, other, None) for scan, other in zip(real_scans(others), others, strict=True)]
    wrong = score_holes(pictures, plain)
    assert (wrong.paper, wrong.everything, wrong.seamless) == (0, 0, 0)


class Copier:
    """A MoVQ that encodes every fourth pixel and gives it back as a square, darker the lighter the middle is."""

    def encode(self, pictures: Sequence[Image.Image]) -> Tensor:
        pixels = torch.from_numpy(np.stack([np.asarray(each) for each in pictures])).float()
        return pixels.permute(0, 3, 1, 2)[:, :, ::LATENT, ::LATENT].contiguous()

    def decode(self, latents: Tensor) -> list[Image.Image]:
        spilled = latents - (latents[:, :, 5:6, 5:6] > 128).float() * 10
        pixels = spilled.clamp(0, 255).repeat_interleave(LATENT, 2).repeat_interleave(LATENT, 3).byte()
        return [Image.fromarray(each.permute(1, 2, 0).numpy()) for each in pixels]


def test_what_is_kept_is_compared_as_latents_and_as_pixels() -> None:
    movq: Any = Copier()
    dark, light = (Image.new("RGB", (PAPER, PAPER), (level, level, level)) for level in (100, 200))
    given, keep = movq.encode([dark]), kept_mask()
    filled = torch.where(keep > 0, given, movq.encode([light]))
    nudged = filled.clone()
    nudged[0, 0, 0, 0] = torch.nextafter(nudged[0, 0, 0, 0], torch.tensor(1e9))
    kept = measure_kept([dark], [light], {"filled": filled, "nudged": nudged}, movq)
    assert kept.same_latents == {"filled": True, "nudged": False}
    assert kept.levels == {ALONE: 0, REAL: 10, "filled": 10, "nudged": 10}
    assert kept.put_back["filled"] == kept.put_back["nudged"]
    assert 0 < kept.put_back["filled"] < 6  # a latent's width in which the one passes into the other is all there is


def test_whole_demo_of_holes_in_a_few_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = HolesSize(
        pictures=40,
        prior_steps=2,
        decoder_steps=2,
        further_steps=2,
        decoder_batch_size=8,
        sources=1,
        sampling_steps=2,
    )
    monkeypatch.setattr("kcache.demo.holes.run.QUICK", size)
    out = tmp_path / "out"
    ran = CliRunner().invoke(app, ["demo", "--inpaint", "--quick", "--output", str(out)])
    assert ran.exit_code == 0, ran.output
    result = json.loads((out / "inpaint.json").read_text())
    assert result["same_cache"]
    assert "the cache is the same, byte for byte" in ran.output
    assert result["scores"].keys() == set(TASKS)
    for of_task in result["scores"].values():
        real = of_task["unseen real scans through the MoVQ"]
        assert (real["ink"], real["paper"], real["seamless"]) == (100, 100, 100)
    kept = result["kept"]
    assert kept["same_latents"] == {"inpainting decoder": True, "plain decoder, blended": True}
    assert "inpainting decoder: the latents that are kept are those of the picture, bit for bit" in ran.output
    levels = list(kept["levels"].values())
    assert 0 < levels[0] < levels[1] < 10
    # What the pipeline keeps is what the MoVQ makes of it, and a little of what is beside it.
    assert max(levels) < 20
    with Image.open(out / "inpaint.png") as picture:
        assert picture.width == 1540
    told = {run: read_config(out / "runs" / run)["config"] for run in ("inpaint", "plain")}
    assert [told[run]["inpaint"] for run in ("inpaint", "plain")] == [True, False]
    assert len({config["snr_gamma"] for config in told.values()}) == 1
    assert {config["pretrained_decoder_model_name_or_path"] for config in told.values()} == {str(out / "runs/decoder")}
    assert len(list((out / "samples").glob("*/*.png"))) == 4 * len(TASKS) * EACH


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--shapes", "--inpaint"], "are several demos"),
        (["--inpaint", "--online"], "--inpaint was given with --online or --format"),
    ],
)
def test_demos_are_not_mixed(tmp_path: Path, flags: list[str], said: str) -> None:
    ran = CliRunner().invoke(app, ["demo", *flags, "--output", str(tmp_path / "out")])
    assert ran.exit_code != 0
    assert said in str(ran.exception)
