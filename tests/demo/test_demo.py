"""The demo's pieces: pictures, captions, trained encoders, judge, page; and all of it together, tiny."""

import json
import tomllib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from kcache.config.shapes import Shape
from kcache.demo.digits import (
    FULL,
    INKS,
    PAPERS,
    PARTIAL,
    SIDE,
    Drawing,
    all_drawings,
    coloured,
    is_held_out,
    middle_of,
    on_paper,
    read_scans,
    vocabulary,
    write_digits,
    write_lesson,
)
from kcache.demo.exam import questions, round_trip
from kcache.demo.placing import score_papers
from kcache.demo.result import DemoSize, Measured, Score, StageResult
from kcache.demo.run import run_demo
from kcache.demo.scoring import JUDGES, distance_to_known, read, score, spread
from kcache.demo.shapes import SHAPES, WAYS, ShapesSize, run_shapes
from kcache.demo.stages import repeat, stage_config, train
from kcache.demo.tiny import TEXT_LENGTH, WEIGHTS, demo_models
from kcache.errors import ConfigError
from kcache.store.run_directory import read_config
from kcache_cli.app import app

TINY = DemoSize(
    pictures=64,
    prior_steps=12,
    decoder_steps=12,
    decoder_batch_size=32,
    repeated_steps=10,
    looks=1,
    questions=2,
    samples=2,
    sampling_steps=2,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return demo_models(tmp_path_factory.mktemp("models"))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_pictures_show_what_their_captions_say(tmp_path: Path) -> None:
    write_digits(tmp_path, 30)
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 30
    for row in rows:
        _, ink, _, _, paper, _ = row["text"].split()
        pixels = np.asarray(Image.open(tmp_path / row["file_name"]), np.int64).reshape(-1, 3)
        assert len(pixels) == SIDE * SIDE
        for colour in (INKS[ink], PAPERS[paper]):
            assert np.abs(pixels - colour).max(axis=1).min() <= 16


def test_pictures_are_the_same_every_time(tmp_path: Path) -> None:
    write_digits(tmp_path / "a", 5)
    write_digits(tmp_path / "b", 5)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_more_pictures_than_scans_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="1 to 1797"):
        write_digits(tmp_path, 1798)


def test_captions_are_english_and_all_different() -> None:
    assert Drawing(digit=7, ink="orange", paper="white").caption() == "an orange seven on white paper"
    assert Drawing(digit=1, ink="red", paper="mint").caption(FULL[1]) == "a one in red ink on mint paper"
    assert Drawing(digit=8, ink="red", paper="mint").caption(PARTIAL[1]) == "an eight on mint paper"
    assert len(set(vocabulary())) == len(vocabulary()) == 1584
    assert len({drawing.caption(template) for drawing in all_drawings() for template in FULL}) == 240 * len(FULL)


def test_one_ink_of_each_digit_is_held_out_on_every_paper() -> None:
    held_out = [drawing for drawing in all_drawings() if is_held_out(drawing)]
    assert len(held_out) == 40
    assert {(drawing.digit, drawing.ink) for drawing in held_out if drawing.digit in (5, 8)} == {
        (5, "green"),
        (8, "black"),
    }
    assert len({(drawing.digit, drawing.ink) for drawing in held_out}) == 10


@pytest.fixture(scope="module")
def lesson(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every scan that is not kept for tests, once."""
    folder = tmp_path_factory.mktemp("lesson")
    write_lesson(folder, 1437)
    return folder


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def test_lesson_shows_all_drawings_but_the_held_out(lesson: Path) -> None:
    rows = rows_of(lesson)
    assert len(rows) == len(list(lesson.glob("*.png"))) == 1437
    told = {caption for row in rows for caption in row["text"]}
    for drawing in all_drawings():
        telling = {drawing.caption(template) for template in (*FULL, PARTIAL[0])}
        assert is_held_out(drawing) == telling.isdisjoint(told)


def test_lesson_tells_the_truth_and_shows_nothing_held_out(lesson: Path) -> None:
    rows = rows_of(lesson)[::5]
    # The judge has learned these very scans.
    seen = read([Image.open(lesson / row["file_name"]) for row in rows])
    for row, drawing in zip(rows, seen, strict=True):
        assert len(row["text"]) == 4
        assert set(row["text"]) <= {drawing.caption(template) for template in (*FULL, *PARTIAL)}
        assert not is_held_out(drawing)


def test_a_lesson_draws_a_scan_again_in_another_way(tmp_path: Path) -> None:
    write_lesson(tmp_path, 1440)
    for number in range(3):
        twice = [np.asarray(Image.open(tmp_path / f"{n:05}.png")) for n in (number, 1437 + number)]
        assert (twice[0] != twice[1]).any()
    with pytest.raises(ConfigError, match="expected 1 to 28740"):
        write_lesson(tmp_path, 28741)


def test_scans_are_those_of_the_data_set() -> None:
    counts = [np.bincount(read_scans(test=test)[1]) for test in (False, True)]
    assert sum(counts).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # as its description says
    assert [len(read_scans(test=test)[0]) for test in (False, True)] == [1437, 360]


@pytest.mark.parametrize("judge", JUDGES)
def test_judges_read_scans_that_they_have_not_learned(judge: str) -> None:
    scans, digits = read_scans(test=True)
    wanted = [
        Drawing(digit=int(digit), ink=list(INKS)[i % 6], paper=list(PAPERS)[i % 4]) for i, digit in enumerate(digits)
    ]
    pictures = [coloured(scan, one.ink, one.paper) for scan, one in zip(scans, wanted, strict=True)]
    found = score(read(pictures, JUDGES[judge]), wanted)
    assert found.digit > 97
    assert (found.ink, found.paper) == (100, 100)


def test_copies_are_told_from_new_pictures() -> None:
    known, _ = read_scans(test=False)
    new, _ = read_scans(test=True)
    copies = [coloured(known[0], "red", "mint")] * 3
    others = [coloured(scan, "red", "mint") for scan in new[:3]]
    asked = [Drawing(digit=0, ink="red", paper="mint")] * 3
    assert spread(copies, asked) == 0 < 0.1 < spread(others, asked)
    assert distance_to_known(copies) < 0.02 < 0.05 < distance_to_known(others)


def test_score_counts_what_is_right_and_all_three_together() -> None:
    asked = [Drawing(digit=digit, ink="red", paper="mint") for digit in (1, 2, 3, 4)]
    seen = [
        asked[0],
        Drawing(digit=7, ink="red", paper="mint"),
        Drawing(digit=3, ink="blue", paper="mint"),
        Drawing(digit=7, ink="blue", paper="pink"),
    ]
    assert score(seen, asked) == Score(digit=50, ink=50, paper=75, everything=25)


def test_questions_are_held_out_and_begin_with_one_of_each_digit() -> None:
    asked = questions()
    assert len({prompt for prompt, _ in asked}) == 40
    assert all(is_held_out(drawing) for _, drawing in asked)
    assert [drawing.digit for _, drawing in asked[:10]] == list(range(10))
    assert all(one.paper != other.paper for (_, one), (_, other) in pairwise(asked[:10]))


@torch.no_grad()
def test_towers_match_captions_with_scans_that_they_have_not_seen(models: tuple[Path, Path]) -> None:
    from transformers import (
        CLIPImageProcessorPil,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        CLIPVisionModelWithProjection,
    )

    drawings, pictures = unseen()
    tokenizer = CLIPTokenizer.from_pretrained(models[0] / "tokenizer")
    processor = CLIPImageProcessorPil.from_pretrained(models[0] / "image_processor")
    ids = tokenizer([drawing.caption() for drawing in drawings], padding="max_length", return_tensors="pt").input_ids
    texts = CLIPTextModelWithProjection.from_pretrained(models[0] / "text_encoder")(ids).text_embeds
    images = CLIPVisionModelWithProjection.from_pretrained(models[0] / "image_encoder")(
        **processor(pictures, return_tensors="pt")
    ).image_embeds
    nearest = (images / images.norm(dim=1, keepdim=True)) @ (texts / texts.norm(dim=1, keepdim=True)).T
    found = score([drawings[i] for i in nearest.argmax(1).tolist()], drawings)
    assert min(found.digit, found.ink, found.paper) > 93


def test_movq_gives_unseen_scans_back(models: tuple[Path, Path]) -> None:
    pictures = unseen()[1][::4]
    back = round_trip(pictures, models[1])
    errors = [
        np.square(np.asarray(one, float) - np.asarray(other, float)) for one, other in zip(pictures, back, strict=True)
    ]
    assert 10 * np.log10(255**2 / np.mean(errors)) > 38  # dB


def unseen() -> tuple[list[Drawing], list[Image.Image]]:
    """Every drawing, of a scan that no network has learned."""
    scans, digits = read_scans(test=True)
    of_digit = [scans[digits == digit] for digit in range(10)]
    pictures = [
        coloured(of_digit[drawing.digit][i % 24], drawing.ink, drawing.paper)
        for i, drawing in enumerate(all_drawings())
    ]
    return all_drawings(), pictures


def test_weights_are_small_and_their_training_is_told() -> None:
    names = {path.name for path in WEIGHTS.iterdir()}
    networks = {f"{name}.safetensors" for name in ("text_encoder", "image_encoder", "movq", "prior_statistics")}
    assert names == networks | {"training.json"}
    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) < 4_000_000
    assert set(json.loads((WEIGHTS / "training.json").read_text())) == {"towers", "movq"}


def test_wheels_have_all_that_is_read() -> None:
    package = Path(__file__).parents[2] / "kcache"
    patterns = tomllib.loads((package.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    shipped = {path for pattern in patterns["kcache"] for path in package.glob(pattern)}
    files = {path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {path for path in files if path.suffix != ".py"} == shipped


def test_networks_are_the_same_every_time(models: tuple[Path, Path], tmp_path: Path) -> None:
    again = demo_models(tmp_path)
    assert files_of(models[0]) == files_of(again[0])
    assert files_of(models[1]) == files_of(again[1])


def test_seeds_change_what_is_trained_and_nothing_frozen(models: tuple[Path, Path], tmp_path: Path) -> None:
    first, other = (files_of(folder) for folder in (models[0].parent, demo_models(tmp_path, seed=1)[0].parent))
    changed = {name for name in first if first[name] != other[name]}
    assert changed == {
        "kandinsky-2-2-prior/prior/diffusion_pytorch_model.safetensors",
        "kandinsky-2-2-decoder/unet/diffusion_pytorch_model.safetensors",
    }


def test_tokenizer_knows_every_caption_in_few_tokens(models: tuple[Path, Path]) -> None:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(models[0] / "tokenizer")
    assert tokenizer.model_max_length == TEXT_LENGTH
    for caption in [*vocabulary(), "xylophone 42"]:
        ids = tokenizer(caption).input_ids
        assert len(ids) <= TEXT_LENGTH
        assert ids.index(tokenizer.eos_token_id) == len(ids) - 1  # the unknown token is the end token, as in CLIP
    assert len({tuple(tokenizer(caption).input_ids) for caption in vocabulary()}) == 1584


def test_stock_pipelines_load_and_draw(models: tuple[Path, Path]) -> None:
    from diffusers import KandinskyV22Pipeline, KandinskyV22PriorPipeline

    prior = KandinskyV22PriorPipeline.from_pretrained(models[0], local_files_only=True)
    decoder = KandinskyV22Pipeline.from_pretrained(models[1], local_files_only=True)
    for pipeline in (prior, decoder):
        pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    embeds = prior("a red seven on white paper", num_inference_steps=2, generator=generator)
    images = decoder(*embeds.to_tuple(), height=SIDE, width=SIDE, num_inference_steps=2, generator=generator).images
    assert images[0].size == (SIDE, SIDE)


def test_largest_difference_is_over_the_steps_of_both() -> None:
    cached = Measured(losses=(1.0, 0.5, 0.25, 0.1), samples_per_second=300.0)
    online = Measured(losses=(1.0, 0.75, 0.375), samples_per_second=100.0)
    stage = StageResult(stage="prior", batch_size=2, cached=cached, online=online)
    assert stage.largest_difference == 0.25
    assert stage.speedup == 3.0
    assert (stage.steps, stage.repeated) == (4, 3)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a whole demo, tiny, and what the command printed."""
    out = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kcache.demo.run.QUICK", TINY)
        ran = CliRunner().invoke(
            app, ["demo", "--quick", "--output", str(out), "--seed", "3", "--format", "webdataset"]
        )
    assert ran.exit_code == 0, ran.output
    return out, ran.output


def test_whole_demo_in_a_few_steps(finished: tuple[Path, str]) -> None:
    out, printed = finished
    result = json.loads((out / "result.json").read_text())
    assert (result["images"], result["seed"], result["format"]) == (64, 3, "webdataset")
    assert result["seconds"].keys() == {"pictures", "cache", "prior", "comparison", "decoder", "exam"}
    for stage, compared in zip(result["stages"], result["compared"], strict=True):
        assert len(stage["cached"]["losses"]) == 12
        assert len(stage["online"]["losses"]) == 10
        assert compared["largest_difference"] == 0
        assert stage["cached"]["losses"][-1] < stage["cached"]["losses"][0]
    exam = result["exam"]
    assert [len(paths) for _, paths in exam["drawn"]] == [2, 2]
    assert [(step, len(paths)) for step, paths in result["looks"]] == [(12, 2)]
    for path in (path for _, paths in (*exam["drawn"], *result["looks"]) for path in paths):
        with Image.open(path) as picture:
            assert picture.size == (SIDE, SIDE)
    assert exam["ceiling"]["digit"] > exam["chance"]["digit"]
    assert [judge["judge"] for judge in exam["judges"]] == list(JUDGES)
    assert "equal bit for bit, 10 steps" in printed
    assert f"{exam['ceiling']['everything']:.1f}" in printed


def test_pages_show_the_result(finished: tuple[Path, str]) -> None:
    out, _ = finished
    with Image.open(out / "demo.png") as page:
        assert page.size == (1800, 1537)
    exam = json.loads((out / "result.json").read_text())["exam"]
    html = (out / "report.html").read_text()
    for told in (
        f"{exam['score']['everything']:.1f}", f"{exam['ceiling']['digit']:.1f}",
        f"{exam['real_variety']['spread']:.3f}", f"{exam['drawn_variety']['to_known']:.3f}",
        "equal bit for bit over 10 steps", *JUDGES, "all 240 combinations", "CC BY 4.0",
    ):  # fmt: skip
        assert told in html
    assert html.count("data:image/png;base64,") == 5


def test_nothing_held_out_is_trained_on(finished: tuple[Path, str]) -> None:
    asked = {drawing.caption(template) for _, drawing in questions() for template in (*FULL, PARTIAL[0])}
    told = {caption for row in rows_of(finished[0] / "pictures") for caption in row["text"]}
    assert len(told) > 100
    assert told.isdisjoint(asked)


def test_a_run_with_the_encoders_in_the_loop_is_repeated_from_the_cache(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    cache, pictures = finished[0] / "cache", finished[0] / "pictures"
    config = replace(stage_config("prior", tmp_path / "prior", 3, 64, 0), online=str(pictures))
    result = repeat(cache, config, pictures, train(cache, config), 2)
    assert (len(result.online.losses), result.repeated) == (3, 2)
    assert result.largest_difference == 0


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="not an earlier demo's"):
        run_demo(tmp_path, TINY, say=lambda text: None)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("shape", SHAPES)
def test_a_lesson_has_each_digit_whole_in_the_middle_of_its_paper(tmp_path: Path, shape: Shape) -> None:
    write_lesson(tmp_path / "papers", 60, SHAPES)
    write_lesson(tmp_path / "squares", 60)
    assert rows_of(tmp_path / "papers") == rows_of(tmp_path / "squares")
    height, width = shape
    found = 0
    for path in sorted((tmp_path / "papers").glob("*.png")):
        with Image.open(path) as picture, Image.open(tmp_path / "squares" / path.name) as square:
            assert np.array_equal(np.asarray(middle_of(picture)), np.asarray(square))
            found += picture.size == (width, height)
    assert found == 20


@pytest.mark.parametrize("shape", SHAPES)
def test_where_a_digit_stands_is_judged(shape: Shape) -> None:
    asked, pictures = unseen()
    on_each = [on_paper(picture, drawing.paper, shape) for picture, drawing in zip(pictures, asked, strict=True)]
    real = score_papers(on_each, asked)
    assert real.shape == shape
    assert (real.ink, real.paper, real.whole) == (100, 100, 100)
    assert min(real.digit, real.centred) > 97
    if shape != (SIDE, SIDE):
        longer = 1 if shape[0] < shape[1] else 0
        for pixels in (8, 24):  # off the middle; half of it at either end
            moved = [Image.fromarray(np.roll(np.asarray(each), pixels, axis=longer)) for each in on_each]
            found = score_papers(moved, asked)
            assert found.everything == 0
            assert min(found.whole, found.centred) == 0


def test_whole_demo_of_shapes_in_a_few_steps(tmp_path: Path) -> None:
    size = ShapesSize(pictures=60, prior_steps=2, decoder_steps=6, decoder_batch_size=8, samples=1, sampling_steps=2)
    said: list[str] = []
    result = run_shapes(tmp_path / "out", size, say=said.append)
    rows = {"latents-32": 60, "latents-32x48": 20, "latents-48x32": 20}
    assert result.rows.items() >= rows.items()
    assert [score.shape for scores in result.scores.values() for score in scores] == [*SHAPES] * 3
    assert json.loads((tmp_path / "out" / "shapes.json").read_text())["rows"] == result.rows
    with Image.open(tmp_path / "out" / "shapes.png") as picture:
        assert picture.width == 1540
    told = {way: read_config(tmp_path / "out" / "runs" / way)["cache"]["rows"] for way in WAYS}
    assert told == {"squares": {"latents-32": 60}, "buckets": rows | {"latents-32": 20}}
    drawn = {path.parent.name for path in (tmp_path / "out" / "samples").glob("*/*/*.png")}
    assert drawn == {"32x48", "32x32", "48x32"}
