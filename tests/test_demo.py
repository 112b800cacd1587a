"""The demo's pieces: the pictures, the tiny networks, the page that shows the result."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kcache.demo.digits import INKS, PAPERS, SIDE, caption_of, vocabulary, write_digits
from kcache.demo.picture import draw_result
from kcache.demo.result import DemoResult, Measured, StageResult
from kcache.demo.run import run_demo
from kcache.demo.tiny import TEXT_LENGTH, demo_models
from kcache.errors import ConfigError


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
    assert caption_of(7, "orange", "white") == "an orange seven on white paper"
    assert len(set(vocabulary())) == len(vocabulary()) == 240


def test_networks_are_the_same_every_time(models: tuple[Path, Path], tmp_path: Path) -> None:
    again = demo_models(tmp_path)
    assert files_of(models[0]) == files_of(again[0])
    assert files_of(models[1]) == files_of(again[1])


def test_tokenizer_knows_every_caption_in_few_tokens(models: tuple[Path, Path]) -> None:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(models[0] / "tokenizer")
    assert tokenizer.model_max_length == TEXT_LENGTH
    for caption in [*vocabulary(), "xylophone 42"]:
        ids = tokenizer(caption).input_ids
        assert len(ids) <= TEXT_LENGTH
        assert ids.index(tokenizer.eos_token_id) == len(ids) - 1  # the unknown token is the end token, as in CLIP
    assert len({tuple(tokenizer(caption).input_ids) for caption in vocabulary()}) == 240


def test_stock_pipelines_load_and_draw(models: tuple[Path, Path]) -> None:
    from diffusers import KandinskyV22Pipeline, KandinskyV22PriorPipeline

    prior = KandinskyV22PriorPipeline.from_pretrained(models[0], local_files_only=True)
    decoder = KandinskyV22Pipeline.from_pretrained(models[1], local_files_only=True)
    for pipeline in (prior, decoder):
        pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    embeds = prior(caption_of(7, "red", "white"), num_inference_steps=2, generator=generator)
    images = decoder(*embeds.to_tuple(), height=SIDE, width=SIDE, num_inference_steps=2, generator=generator).images
    assert images[0].size == (SIDE, SIDE)


def test_largest_difference_is_over_all_steps() -> None:
    cached = Measured(losses=(1.0, 0.5, 0.25), samples_per_second=300.0)
    online = Measured(losses=(1.0, 0.75, 0.375), samples_per_second=100.0)
    stage = StageResult(stage="prior", cached=cached, online=online)
    assert stage.largest_difference == 0.25
    assert stage.speedup == 3.0


def test_page_is_drawn(tmp_path: Path) -> None:
    write_digits(tmp_path, 3)
    shown = tuple((tmp_path / f"000{i}.png", "a caption that is long enough to wrap") for i in range(3))
    run = Measured(losses=(1.0, 0.5), samples_per_second=10.0)
    result = DemoResult(
        images=3,
        captions=3,
        build_seconds=1.0,
        rebuild_seconds=0.1,
        cache_bytes=1000,
        batch_size=2,
        steps=2,
        stages=tuple(StageResult(stage=stage, cached=run, online=run) for stage in ("prior", "decoder")),
        inputs=shown,
        outputs=shown,
        picture=tmp_path / "page.png",
        seconds=2.0,
    )
    draw_result(result, result.picture)
    with Image.open(result.picture) as page:
        assert page.size == (1800, 1275)


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="not an earlier demo's"):
        run_demo(tmp_path, 2, say=lambda text: None)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
