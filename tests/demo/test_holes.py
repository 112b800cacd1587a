"""The demo of filling holes: what is asked for, how it is judged, and all of it in a few steps."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.pipelines.kandinsky2_2.pipeline_kandinsky2_2_inpainting import prepare_mask
from PIL import Image
from typer.testing import CliRunner

from kcache.demo.digits import PAPERS, SIDE, Drawing, is_held_out, on_paper
from kcache.demo.exam import real_pictures
from kcache.demo.holes.exam import EACH, LATENT, PAPER, TASKS, given_pictures, hole, repaints, score_holes
from kcache.demo.holes.run import HolesSize
from kcache.store.run_directory import read_config
from kcache_cli.app import app


def test_what_is_asked_for_was_never_seen_and_what_is_given_was() -> None:
    asked = repaints(20)
    assert len({(one.task, one.source, one.prompt) for one in asked}) == len(asked) == 2 * 20 * EACH
    for one in asked:
        assert is_held_out(one.wanted)
        assert not is_held_out(one.source)
        assert one.source.paper == one.wanted.paper
        assert one.source.ink != one.wanted.ink
        assert (one.source.digit == one.wanted.digit) == (one.task == TASKS[0])
    assert {(one.task, one.source.digit) for one in asked} == {(task, digit) for task in TASKS for digit in range(10)}
    assert len({one.wanted for one in asked if one.task == TASKS[1]}) > 25


def test_a_hole_has_all_of_the_digit_and_leaves_paper_around() -> None:
    mask = np.asarray(hole()) > 0
    assert mask.sum() == SIDE * SIDE
    given = given_pictures(repaints(4))
    for picture, one in zip(given, repaints(4), strict=True):
        kept = np.asarray(picture)[~mask]
        assert (kept == PAPERS[one.source.paper]).all()
    latents = 1 - torch.from_numpy(mask[::LATENT, ::LATENT].astype(np.float32))[None, None]
    grown = prepare_mask(latents)[0, 0]
    grown[1:-1, 1:-1] -= 1
    assert grown[[0, -1]].all()
    assert grown[:, [0, -1]].all()
    assert (grown[1:-1, 1:-1] == 0).sum() == 2  # corners of the four
    assert len(grown) == PAPER // LATENT


def test_holes_are_judged_by_what_is_in_them_and_by_their_edge() -> None:
    asked = repaints(6)
    given = given_pictures(asked)
    wanted = [one.wanted for one in asked]
    scans = real_pictures(wanted)

    def filled(papers: list[str]) -> list[Image.Image]:
        """Real scans on papers, in holes as large as they grow, in the pictures that were given."""
        pictures = []
        for scan, paper, picture in zip(scans, papers, given, strict=True):
            whole = picture.copy()
            inner = on_paper(scan, paper, (SIDE + 2 * LATENT, SIDE + 2 * LATENT))
            whole.paste(inner, ((PAPER - SIDE) // 2 - LATENT,) * 2)
            pictures.append(whole)
        return pictures

    real = score_holes(filled([one.paper for one in wanted]), given, asked)
    assert (real.ink, real.paper, real.seamless, real.seam, real.kept) == (100, 100, 100, 0, 0)
    assert min(real.digit, real.everything) > 90
    others = [next(paper for paper in PAPERS if paper != one.paper) for one in wanted]
    scans = [
        real_pictures([Drawing(digit=one.digit, ink=one.ink, paper=p)])[0]
        for one, p in zip(wanted, others, strict=True)
    ]
    wrong = score_holes(filled(others), given, asked)
    assert (wrong.paper, wrong.everything, wrong.seamless, wrong.kept) == (0, 0, 0, 0)
    as_given = score_holes(given, given, asked)
    assert (as_given.ink, as_given.paper, as_given.seamless) == (0, 100, 100)
    lighter = [Image.eval(picture, lambda level: max(0, level - 10)) for picture in given]
    assert score_holes(lighter, given, asked).kept == pytest.approx(10)


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
        # What the pipeline keeps is what the MoVQ makes of it, and a little of what is beside it.
        assert of_task["inpainting decoder"]["kept"] < 20
    assert 0 < result["round_trip"] < 5
    with Image.open(out / "inpaint.png") as picture:
        assert picture.width == 1540
    told = {run: read_config(out / "runs" / run)["config"] for run in ("inpaint", "plain")}
    assert [told[run]["inpaint"] for run in ("inpaint", "plain")] == [True, False]
    assert {config["pretrained_decoder_model_name_or_path"] for config in told.values()} == {str(out / "runs/decoder")}
    assert len(list((out / "samples").glob("*/*.png"))) == 4 * 2 * EACH


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
