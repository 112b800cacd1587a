"""The report of a run: all that a run leaves is in it, and whatever a run leaves gives one."""

import io
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from short_runs import config
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

from kcache.config import TrainConfig
from kcache.errors import RunError
from kcache.report.drawn.strips import STEPS, drawn_blocks, drawn_prompts, spread
from kcache.report.grid import HELD_OUT, pictures_of, save_pictures
from kcache.report.neighbours import nearest, neighbours_section
from kcache.report.page import Figure, Section, Table, Text, write_page
from kcache.report.run import read_run, run_sections
from kcache.store.cache import Cache
from kcache.training.trainer import train

TITLES = ["Overview", "Course", "Validation", "Pictures", "Speed and memory", "Settings", "Versions and machine"]
PROMPTS = ("a red <b>circle</b>", "a blue square")


@pytest.fixture(scope="module")
def trained(cache: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps, each validated and drawn; it was stopped and resumed between them."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    settings = {"val_fraction": 0.3, "validation_steps": 1, "validation_prompts": PROMPTS, "checkpointing_steps": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kcache.report.pictures.PRIOR_STEPS", 2)
        patch.setattr("kcache.report.pictures.DECODER_STEPS", 2)
        train(cache, config(folder, max_train_steps=1, **settings))
        train(cache, config(folder, max_train_steps=2, resume_from_checkpoint="latest", **settings))
    return folder


def written(folder: Path, metrics: Sequence[Mapping[str, Any]] = (), **settings: Any) -> Path:
    """A run directory as a run leaves it that crashed after the steps of `metrics`."""
    told = {
        "config": asdict(TrainConfig(stage="prior", output_dir=str(folder), **settings)),
        "cache": {"path": "/caches/<script>alert(1)</script>", "samples": 1797, "tables": {"text": "ab" * 32}},
        "base": {"name": "models/prior", "revision": None},
        "versions": {"kcache": "1.0"},
        "max_steps": 9,
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(told))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    return folder


def steps(*losses: float) -> list[dict[str, Any]]:
    return [
        {"step": i, "loss": loss, "grad_norm": 1.0, "lr": 1e-4, "samples_per_second": 100.0 * i}
        for i, loss in enumerate(losses, 1)
    ]


def report(folder: Path) -> dict[str, Section]:
    """The sections by title; that they can be written as a page is part of each test."""
    sections = run_sections(read_run(folder))
    assert [section.title for section in sections] == TITLES
    write_page(folder / "report.html", "run", sections)
    return {section.title: section for section in sections}


def texts(section: Section) -> str:
    return "\n".join(block.text for block in section.blocks if isinstance(block, Text))


def figures(section: Section) -> list[Figure]:
    return [block for block in section.blocks if isinstance(block, Figure)]


def tables(section: Section) -> list[Table]:
    return [block for block in section.blocks if isinstance(block, Table)]


def values(section: Section) -> dict[str, str]:
    """What the tables of two columns say."""
    return {row[0]: row[1] for table in tables(section) for row in table.rows if len(table.head) == 2}


def draw_grid(run_dir: Path, step: int, prompts: Sequence[str], side: int = 64) -> Path:
    """Pictures as a run leaves them, the i-th of the grey 10 i; the path of their grid."""
    return save_pictures(
        run_dir, step, [Image.new("RGB", (side, side), (10 * i,) * 3) for i in range(len(prompts))], prompts
    )


@pytest.fixture(scope="module")
def found(trained: Path) -> dict[str, Section]:
    """The report of the finished run."""
    return report(trained)


def test_a_finished_run_tells_all(found: dict[str, Section], cache: str) -> None:
    overview = values(found["Overview"])
    assert overview["State"] == "finished: 2 of 2 steps"
    assert overview["Cache"] == str(Path(cache).resolve())
    assert "val_cosine" in overview["Held out, at step 2"]
    assert len(figures(found["Course"])) == 3
    assert len(figures(found["Validation"])) == 2
    (validated,) = tables(found["Validation"])
    assert [row[0] for row in validated.rows] == ["1", "2"]
    assert validated.head[:3] == ["Step", "val_loss", "t000–249"]
    assert [figure.caption for figure in figures(found["Pictures"])] == list(PROMPTS)
    speed = values(found["Speed and memory"])
    assert speed["Share of time waiting for batches"].endswith("%")
    assert float(speed["Memory at most"].removesuffix(" GB")) > 0.01
    assert speed["Images per optimizer step"] == "4"
    assert [row[1] for row in tables(found["Speed and memory"])[1].rows] == ["begun", "1"]
    machine = values(found["Versions and machine"])
    assert machine["device"] == "cpu"
    assert {"kcache", "torch", "diffusers", "python", "system", "cores", "processes"} <= machine.keys()


def test_what_was_set_is_told_from_defaults(found: dict[str, Section]) -> None:
    given, kept = tables(found["Settings"])
    assert ["max_train_steps", "2", "none"] in given.rows
    assert ["validation_prompts", "\n".join(PROMPTS), "none"] in given.rows
    assert ["learning_rate", "0.0001"] in kept.rows
    assert ["lora_target_modules", "none"] in kept.rows  # a tuple, which JSON has as a list
    assert {row[0] for row in [*given.rows, *kept.rows]} == set(TrainConfig.__dataclass_fields__)


def test_a_run_that_has_just_begun_has_a_report(tmp_path: Path) -> None:
    found = report(written(tmp_path / "run", val_fraction=0.5, validation_prompts=PROMPTS))
    assert values(found["Overview"])["State"] == "no step is recorded yet"
    assert "no step in metrics.jsonl" in texts(found["Course"])
    assert "not come to a validation yet" in texts(found["Validation"])
    assert "has not come to drawing any yet" in texts(found["Pictures"])
    assert texts(found["Speed and memory"]) == "No step is recorded yet."


def test_a_crashed_run_has_a_report(tmp_path: Path) -> None:
    folder = written(tmp_path / "run", steps(0.5, 0.25))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    (folder / "checkpoint-2").mkdir()
    found = report(folder)
    overview = values(found["Overview"])
    assert overview["State"] == "no result yet: 2 of 9 steps; the newest checkpoint is of step 2"
    assert overview["Loss"] == "0.375, mean of the last 2 of 2 steps"
    assert overview["Speed"] == "150.0 images/s, median over the steps"
    assert "held nothing out" in texts(found["Validation"])
    assert "was not asked for any" in texts(found["Pictures"])
    assert values(found["Speed and memory"])["Memory at most"] == "not recorded"
    assert "not recorded" in texts(found["Speed and memory"])
    assert "<script>" not in (folder / "report.html").read_text()


def test_a_run_of_one_step_has_a_report(tmp_path: Path) -> None:
    found = report(written(tmp_path / "run", steps(0.5)))
    assert len(figures(found["Course"])) == 3
    assert values(found["Overview"])["State"] == "no result yet: 1 of 9 steps; no checkpoint"


def test_losses_that_are_no_numbers_are_counted(tmp_path: Path) -> None:
    nan = float("nan")
    found = report(written(tmp_path / "run", steps(0.5, nan, nan)))
    assert "The loss of 2 of 3 steps is not finite, the first of step 2" in texts(found["Course"])
    assert values(found["Overview"])["Loss"] == "0.5, mean of the last 1 of 3 steps"


def test_a_run_may_have_no_finite_loss(tmp_path: Path) -> None:
    found = report(written(tmp_path / "run", steps(float("nan"))))
    assert "The loss of 1 of 1 steps is not finite" in texts(found["Course"])
    assert "Loss" not in values(found["Overview"])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.jsonl", "no JSON\n"), ("metrics.jsonl", '{"loss": 1}\n'),
        ("metrics.jsonl", '{"step": 1, "loss": "a"}\n'), ("metrics.jsonl", '{"step": 1, "loss": 1, "lr": null}\n'),
        ("metrics.jsonl", "\0" * 4096), ("metrics.jsonl", b"\xff\xfe{}\n"), ("metrics.jsonl", "[" * 99_999 + "\n"),
        ("metrics.jsonl", '{"step": 1, "loss": 1' + "0" * 400 + "}\n"), ("metrics.jsonl", '{"step": -1, "loss": 1}\n'),
        ("validation.jsonl", "[1]\n"), ("validation.jsonl", '{"step": 1}\n'), ("starts.jsonl", '{"time": "now"}\n'),
    ],
)  # fmt: skip
def test_what_cannot_be_read_of_a_log_is_left_out_and_said(
    tmp_path: Path, name: str, content: str | bytes, caplog: pytest.LogCaptureFixture
) -> None:
    folder = written(tmp_path / "run", steps(0.5))
    whole = (folder / name).read_bytes() if (folder / name).exists() else b""
    (folder / name).write_bytes(whole + (content if isinstance(content, bytes) else content.encode()))
    overview = values(report(folder)["Overview"])
    count = 2 if whole else 1
    assert overview["Left out"] == f"{folder / name}: 1 of {count} lines cannot be read"
    assert [record.getMessage() for record in caplog.records] == [f"{overview['Left out']}: left out"]
    assert read_run(folder).metrics == steps(0.5)


def test_a_log_may_be_no_file(tmp_path: Path) -> None:
    folder = written(tmp_path / "run")
    (folder / "metrics.jsonl").unlink()
    (folder / "metrics.jsonl").mkdir()
    assert values(report(folder)["Overview"])["Left out"] == f"{folder / 'metrics.jsonl'} is no file"


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"config": 3}'])
def test_settings_that_cannot_be_read_are_refused(tmp_path: Path, content: str) -> None:
    folder = written(tmp_path / "run", steps(0.5))
    (folder / "config.json").write_text(content)
    with pytest.raises(RunError, match=r"config\.json (cannot be read|does not say)"):
        read_run(folder)


def test_pictures_over_the_steps_stand_beside_each_other(tmp_path: Path) -> None:
    for step in range(1, 21):
        draw_grid(tmp_path, step, ["a", "b", "b"])
    settings = {"validation_prompts": ["a", "b"], "num_validation_images": 1}
    assert drawn_prompts({"config": settings | {"num_validation_images": 2}}) == ["a", "a", "b", "b"]
    shapes = {"rows": {"latents-640x896": 3, "latents-896x640": 1, "latents-512x1088": 2, "latents-768": 0}}
    assert drawn_prompts({"config": settings, "cache": shapes}) == ["a", "a", "b", "b"]
    text, *strips = drawn_blocks(tmp_path, {"config": {"validation_prompts": ["a", "b", "b"]}})
    assert isinstance(text, Text)
    assert "after step 1, 5, 9, 12, 16, 20 (of 20 times" in text.text
    assert [strip.caption for strip in strips if isinstance(strip, Figure)] == ["a", "b", "b"]
    for number, strip in enumerate(strips):
        assert isinstance(strip, Figure)
        with Image.open(io.BytesIO(strip.png)) as picture:
            assert picture.size == (STEPS * 156 - 4, 152)
            assert np.asarray(picture)[76, 76].tolist() == [10 * number] * 3


@pytest.mark.parametrize(
    ("kind", "said"),
    [({"inpaint": True}, "its hole, and that filled"), ({"hint": "depth"}, "its hint, and what is drawn by it")],
)
def test_of_held_out_pictures_only_what_was_drawn_is_shown_step_by_step(
    tmp_path: Path, kind: dict[str, Any], said: str
) -> None:
    config = {"val_fraction": 0.1, **kind}
    (text,) = drawn_blocks(tmp_path, {"config": config | {"num_validation_images": 0}})
    assert isinstance(text, Text)
    assert "was not asked for any (--num-validation-images)" in text.text
    (text,) = drawn_blocks(tmp_path, {"config": config})
    assert isinstance(text, Text)
    assert "not come to drawing any yet" in text.text
    for step in (1, 2):
        levels = (10, 20, 100 * step, 30, 40, 50 * step)
        drawn = [Image.new("RGB", (152, 152), (level,) * 3) for level in levels]
        save_pictures(tmp_path, step, drawn, ["a"] * 3 + ["b"] * 3, HELD_OUT)
    text, *strips = drawn_blocks(tmp_path, {"config": config})
    assert isinstance(text, Text)
    assert f"{said} after step 1, 2" in text.text
    for strip, levels in zip(strips, [(10, 20, 100, 200), (30, 40, 50, 100)], strict=True):
        assert isinstance(strip, Figure)
        with Image.open(io.BytesIO(strip.png)) as picture:
            assert tuple(np.asarray(picture)[76, 76::156, 0].tolist()) == levels


def test_large_pictures_are_also_shown_large(tmp_path: Path) -> None:
    draw_grid(tmp_path, 5, ["a", "b"], side=256)
    first, _, *strips = drawn_blocks(tmp_path, {"config": {"validation_prompts": ["a", "b"]}})
    assert isinstance(first, Figure)
    assert first.caption == "After step 5."
    assert len(strips) == 2


def test_grids_of_other_prompts_are_shown_as_they_are(tmp_path: Path) -> None:
    draw_grid(tmp_path, 1, ["a", "b"])
    draw_grid(tmp_path, 2, ["a", "b", "c"])
    blocks = drawn_blocks(tmp_path, {"config": {"validation_prompts": ["a", "b", "c"]}})
    assert [block.caption for block in blocks if isinstance(block, Figure)] == ["After step 2.", "After step 1."]


def test_grids_without_single_pictures_are_shown_as_they_are(tmp_path: Path) -> None:
    shutil.rmtree(draw_grid(tmp_path, 1, ["a", "b"]).with_suffix(""))
    grid = draw_grid(tmp_path, 2, ["a", "b"])
    newest, first = drawn_blocks(tmp_path, {"config": {"validation_prompts": ["a", "b"]}})
    assert isinstance(newest, Figure)
    assert isinstance(first, Figure)
    assert (newest.caption, first.caption) == ("After step 2.", "After step 1.")
    with Image.open(io.BytesIO(newest.png)) as shown, Image.open(grid) as drawn:
        assert np.array_equal(np.asarray(shown), np.asarray(drawn))


def test_pictures_that_are_broken_are_named(tmp_path: Path) -> None:
    first, second = (draw_grid(tmp_path, step, ["a"]) for step in (1, 2))
    (path,) = pictures_of(first)
    path.write_bytes(path.read_bytes()[:60])
    broken, steps_text, strip = drawn_blocks(tmp_path, {"config": {"validation_prompts": ["a"]}})
    assert isinstance(broken, Text)
    assert broken.text.startswith("step-000001/00.png cannot be shown: ")
    assert isinstance(steps_text, Text)
    assert "after step 2" in steps_text.text
    assert isinstance(strip, Figure)
    second.write_bytes(b"")
    whole, _ = drawn_blocks(tmp_path, {"config": {"validation_prompts": ["a", "b"]}})
    assert isinstance(whole, Text)
    assert whole.text.startswith("pictures/step-000002.png cannot be shown: ")


@pytest.mark.parametrize(("count", "expected"), [(0, []), (1, [0]), (3, [0, 1, 2]), (100, [0, 25, 50, 74, 99])])
def test_of_many_a_few_are_taken(count: int, expected: list[int]) -> None:
    assert spread(list(range(count)), 5) == expected


def ignore(name: str, done: int, total: int) -> None:
    """Takes reports of progress and does nothing."""


def test_nearest_pictures_are_the_most_alike(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kcache.report.neighbours.ROWS_PER_READ", 5)
    opened = Cache.open(cache)
    rows = opened.read(range(len(opened)), ["image_embeds"])["image_embeds"].astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    asked = rows[[7, 2]]
    samples, cosines = nearest(opened, asked.astype(np.float32), ignore)
    assert samples.tolist() == np.argsort(-(asked @ rows.T), axis=1, kind="stable")[:, :3].tolist()
    assert samples[:, 0].tolist() == [7, 2]
    assert cosines[:, 0] == pytest.approx([1, 1])
    assert cosines == pytest.approx(-np.sort(-(asked @ rows.T), axis=1)[:, :3], abs=1e-5)


def test_newest_pictures_are_compared_one_by_one(trained: Path, cache: str, oracle: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trained, tmp_path / "run", symlinks=True)
    files = [oracle / "data" / name for name in ("img_03.png", "img_06.png")]
    pictures = [Image.open(path).convert("RGB").resize((64, 64)) for path in files]
    save_pictures(folder, 2, pictures, PROMPTS)
    intro, table = neighbours_section(read_run(folder), "cpu", ignore).blocks
    assert isinstance(intro, Text)
    assert "pictures of step-000002.png" in intro.text
    assert isinstance(table, Table)

    network = CLIPVisionModelWithProjection.from_pretrained(oracle / "prior" / "image_encoder")
    processor = CLIPImageProcessorPil.from_pretrained(oracle / "prior" / "image_processor")
    with torch.inference_mode():
        embeds = network(**processor(images=pictures, return_tensors="pt")).image_embeds.numpy()
    opened = Cache.open(cache)
    samples, cosines = nearest(opened, embeds / np.linalg.norm(embeds, axis=1, keepdims=True), ignore)
    told = opened.samples
    names, captions = told["name"].to_pylist(), told["captions"].to_pylist()
    assert [row[3:] for row in table.rows] == [[names[i], captions[i][0]] for i in samples.ravel().tolist()]
    assert [float(row[2]) for row in table.rows] == pytest.approx(cosines.ravel(), abs=6e-4)
    assert [row[:2] for row in table.rows] == [
        ["1", PROMPTS[0]],
        ["", ""],
        ["", ""],
        ["2", PROMPTS[1]],
        ["", ""],
        ["", ""],
    ]


def test_neighbours_say_what_is_missing(trained: Path, tmp_path: Path) -> None:
    def said(folder: Path) -> str:
        (block,) = neighbours_section(read_run(folder), "cpu", ignore).blocks
        assert isinstance(block, Text)
        assert block.text.startswith("Not compared: ")
        return block.text

    folder = written(tmp_path / "run", steps(0.5), validation_prompts=("a",))
    assert "the run has drawn no pictures" in said(folder)
    grid = draw_grid(folder, 1, ["a", "b"])
    assert "beside step-000001.png lie 2 single pictures, not one for each of the 1 prompts" in said(folder)
    shutil.rmtree(grid.with_suffix(""))
    assert "lie 0 single pictures" in said(folder)
    draw_grid(folder, 1, ["a"])
    assert "is not a finished cache: there is nothing at that path" in said(folder)
    folder = shutil.copytree(trained, tmp_path / "trained", symlinks=True)
    (folder / "pictures" / "step-000002" / "01.png").write_bytes(b"")
    assert "step-000002/01.png cannot be shown" in said(folder)


def test_another_image_encoder_is_not_compared_with(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kcache.report.neighbours.weights_digest", lambda *_, **__: "0" * 64)
    (block,) = neighbours_section(read_run(trained), "cpu", ignore).blocks
    assert isinstance(block, Text)
    assert "is not the one that the cache was built with" in block.text
