"""The picture of a run: what stands in its files is what is drawn."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from kcache.errors import RunError
from kcache.report.figures import LOOK, POINTS, _draw_run, curve, plot_run, run_panels, smoothed, thinned
from kcache.store.run_directory import CURVES_FILE


@pytest.fixture(autouse=True, scope="module")
def undrawn() -> None:
    """Here figures are drawn."""


BANDS = ["val_loss_t000_249", "val_loss_t250_499", "val_loss_t500_749", "val_loss_t750_999"]


def metrics(steps: int) -> list[dict[str, Any]]:
    return [{"step": i, "loss": 1 / i, "grad_norm": 2.0 * i, "lr": 1e-4 / i} for i in range(1, steps + 1)]


def validation(steps: Sequence[int], cosine: bool, hole: bool = False) -> list[dict[str, Any]]:
    entries = []
    for step in steps:
        bands = {name: 0.1 * (i + 1) + 0.001 * step for i, name in enumerate(BANDS)}
        entries.append({"step": step, "val_loss": 0.25, **bands} | ({"val_cosine": 0.5} if cosine else {}))
    return [entry | {"val_hole": 0.75} for entry in entries] if hole else entries


def write(run_dir: Path, name: str, entries: Sequence[Mapping[str, Any]]) -> None:
    (run_dir / name).write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def panels(
    steps: int, validated: Sequence[int] = (), cosine: bool = False, hole: bool = False
) -> dict[str, dict[str, np.ndarray]]:
    """The lines of each panel, by title and label: (2, n) steps and values."""
    figure = Figure()
    with mpl.rc_context(LOOK):
        _draw_run(figure, "run", metrics(steps), validation(validated, cosine, hole))
    return {
        ax.get_title(loc="left"): {str(line.get_label()): np.array(line.get_data()) for line in ax.lines}
        for ax in figure.axes
    }


def test_every_number_has_its_place() -> None:
    found = panels(30, validated=[10, 20, 30], cosine=True)
    assert list(found) == [
        "Loss",
        "Held-out loss by timestep",
        "Learning rate",
        "Gradient norm before clipping",
        "Held-out cosine to the true embedding",
    ]
    assert np.array_equal(found["Loss"]["held out"], [[10, 20, 30], [0.25] * 3])
    raw = next(iter(found["Loss"].values()))
    assert np.array_equal(raw, [np.arange(1, 31), 1 / np.arange(1, 31)])
    bands = found["Held-out loss by timestep"]
    assert list(bands) == ["0–249", "250–499", "500–749", "750–999"]
    assert bands["500–749"][1] == pytest.approx([0.31, 0.32, 0.33])
    assert next(iter(found["Learning rate"].values()))[1] == pytest.approx(1e-4 / np.arange(1, 31))


def test_what_was_not_measured_has_no_panel() -> None:
    assert list(panels(5)) == ["Loss", "Learning rate", "Gradient norm before clipping"]
    assert "held out" not in panels(5)["Loss"]
    assert len(panels(5, validated=[5])) == 4
    assert "held out, the hole" not in panels(5, validated=[5])["Loss"]
    assert np.array_equal(panels(5, validated=[5], hole=True)["Loss"]["held out, the hole"], [[5], [0.75]])


@pytest.mark.parametrize(("steps", "validated"), [(1, []), (1, [1]), (3, [3]), (2500, [1000, 2000])])
def test_runs_of_any_length_are_drawn(tmp_path: Path, steps: int, validated: list[int]) -> None:
    write(tmp_path, "metrics.jsonl", metrics(steps))
    if validated:
        write(tmp_path, "validation.jsonl", validation(validated, cosine=True))
    assert plot_run(tmp_path) == tmp_path / CURVES_FILE
    with Image.open(tmp_path / CURVES_FILE) as picture:
        assert picture.size == (1800, 1200)
        assert len(np.unique(np.asarray(picture.convert("L")))) > 10
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize("name", ["a $ and $\\frac{", "红狐", "ثعلب", "fox \U0001f98a", "a_b^c"])
def test_a_run_may_have_any_name(tmp_path: Path, name: str) -> None:
    run_dir = tmp_path / name
    run_dir.mkdir()
    write(run_dir, "metrics.jsonl", metrics(3))
    assert plot_run(run_dir).stat().st_size > 10_000


def test_numbers_that_are_none_are_left_out(tmp_path: Path) -> None:
    entries = metrics(3)
    entries[1]["loss"] = float("nan")
    for entry in entries:
        entry["grad_norm"] = float("inf")
    write(tmp_path, "metrics.jsonl", entries)
    assert plot_run(tmp_path).exists()
    steps, values = thinned(np.array([1.0, 2.0, 3.0]), np.array([1.0, np.nan, 3.0]))
    assert (steps.tolist(), values.tolist()) == ([1, 3], [1, 3])


def test_a_run_that_has_not_begun_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"has no steps in its metrics\.jsonl"):
        plot_run(tmp_path)


@pytest.mark.parametrize("count", [0, 1, POINTS, POINTS + 1, 10 * POINTS + 7])
def test_long_curves_become_means_of_neighbours(count: int) -> None:
    values = np.random.default_rng(0).normal(size=count)
    steps, means = thinned(np.arange(1.0, count + 1), values)
    assert len(steps) == len(means) <= POINTS
    if count <= POINTS:
        assert np.array_equal(means, values)
    else:
        width = -(-count // POINTS)
        assert means[1] == pytest.approx(values[width : 2 * width].mean())
        assert steps[1] == pytest.approx(np.arange(width + 1, 2 * width + 1).mean())
        assert means[-1] == pytest.approx(values[(len(means) - 1) * width :].mean())


@pytest.mark.parametrize("count", [0, 1, 2, 10, 500])
def test_smoothing_keeps_a_level_and_calms_noise(count: int) -> None:
    assert smoothed(np.full(count, 3.0)) == pytest.approx(np.full(count, 3.0))
    noise = np.random.default_rng(0).normal(size=count)
    assert len(smoothed(noise)) == count
    if count == 500:
        assert smoothed(noise).std() < 0.3 * noise.std()
        straight = np.arange(500.0)
        assert smoothed(straight)[100:400] == pytest.approx(straight[100:400])


@pytest.mark.parametrize(("steps", "validated"), [(1, []), (30, [10, 20])])
def test_each_panel_can_stand_alone(steps: int, validated: list[int]) -> None:
    drawn = run_panels(metrics(steps), validation(validated, cosine=True))
    assert list(drawn) == list(panels(steps, validated, cosine=True))
    pictures = {curve(title, panel, "").png for title, panel in drawn.items()}
    assert len(pictures) == len(drawn)
    for png in pictures:
        with Image.open(io.BytesIO(png)) as picture:
            assert picture.size == (968, 600)
