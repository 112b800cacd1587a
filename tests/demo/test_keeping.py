"""The demo of prior preservation: what is taught, what is asked before and after, and all of it in a few steps."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from kcache.demo.digits import SIDE, is_held_out, vocabulary
from kcache.demo.exam import real_pictures
from kcache.demo.keeping.exam import ALL, NEW, OLD, ONE, SEVENS, STYLE, WORD, judge, questions, write_style
from kcache.demo.keeping.run import KeepingSize
from kcache.store.run_directory import read_config, read_metrics
from kcache_cli.app import app


def test_the_style_is_new_and_the_old_was_trained_on(tmp_path: Path) -> None:
    assert is_held_out(STYLE)
    assert WORD not in vocabulary()
    write_style(tmp_path, 20)
    told = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert [row["text"] for row in told] == [WORD] * 20
    assert len({(tmp_path / row["file_name"]).read_bytes() for row in told}) == 20
    asked = questions(2)
    assert {name: len(of_name) for name, of_name in asked.items()} == {OLD: 100, SEVENS: 40, NEW: 20}
    assert not any(is_held_out(drawing) for name in (OLD, SEVENS) for _, drawing in asked[name])
    assert len({(one.digit, one.ink) for _, one in asked[OLD]}) == 50
    prompts = {prompt for name in (OLD, SEVENS) for prompt, _ in asked[name]}
    assert prompts <= set(vocabulary())
    assert not prompts & {*ONE, *ALL}
    assert {*ONE, *ALL} <= set(vocabulary())


def test_real_pictures_of_what_was_asked_for_are_right() -> None:
    asked = questions(1)
    drawn = {name: real_pictures([drawing for _, drawing in of_name]) for name, of_name in asked.items()}
    assert all(score.ink == score.paper == 100 and score.digit > 90 for score in judge(drawn, asked).values())
    purple = {name: real_pictures([STYLE] * len(of_name)) for name, of_name in asked.items()}
    scores = judge(purple, asked)
    assert scores[SEVENS].everything == 0
    assert scores[NEW].everything > 90


def test_whole_demo_of_prior_preservation_in_a_few_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = KeepingSize(
        pictures=40,
        prior_steps=2,
        decoder_steps=2,
        decoder_batch_size=8,
        further_steps=2,
        class_rows=10,
        samples=1,
        sampling_steps=2,
    )
    monkeypatch.setattr("kcache.demo.keeping.run.QUICK", size)
    few = {name: of_name[::7] for name, of_name in questions(1).items()}
    monkeypatch.setattr("kcache.demo.keeping.run.questions", lambda samples: few)
    monkeypatch.setenv("KCACHE_HOME", str(tmp_path / "home"))
    out = tmp_path / "out"
    ran = CliRunner().invoke(app, ["demo", "--preserve", "--quick", "--output", str(out)])
    assert ran.exit_code == 0, ran.output
    result = json.loads((out / "preserve.json").read_text())
    assert [*result["scores"]] == ["before", "after, alone", "after, one class prompt", "after, ten class prompts"]
    assert all([*of_way] == [OLD, SEVENS, NEW] for of_way in result["scores"].values())
    told = [read_config(out / "runs" / f"style-{count}")["config"] for count in (0, 1, 10)]
    assert [(len(one["class_prompt"]), one["num_class_rows"]) for one in told] == [(0, 100), (1, 10), (10, 1)]
    assert {one["pretrained_prior_model_name_or_path"] for one in told} == {str(out / "runs" / "prior")}
    first = [read_metrics(out / "runs" / f"style-{count}")[0]["loss"] for count in (0, 1, 10)]
    assert first == pytest.approx([first[0]] * 3, rel=1e-5)
    with Image.open(out / "preserve.png") as picture:
        assert picture.width == 1540
    with Image.open(out / "samples" / "before" / NEW / "000.png") as picture:
        assert np.asarray(picture).shape == (SIDE, SIDE, 3)
