"""The benchmarks run to their end, say what report.py shows, and conclude rightly; how fast things are is not tested.

Every script runs once with the least work that it takes, on the scale model.
"""

import importlib
import json
import math
import os
import shlex
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import know_your_data
import numpy as np
import pytest
import shapes
import torch
from build import cut
from end_to_end import break_even
from growth import verdict
from measuring.device import covered, device_kind
from measuring.levers import channels_last
from measuring.models import make_network, read_configs
from measuring.record import write_outcome
from measuring.roofline import KINDS, kind_of
from measuring.summaries import SUMMARIES, command
from measuring.upstream import fastest, time_upstream
from measuring.workload import open_workload
from report import TITLES, demo_lines, name_of, one_line
from train_step import speed_ups

from kcache.objectives import blocks as compilation

# What torch does while it compiles.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = "--images 4 --image-side 64"
RUNS = {
    "train_step-prior": f"--stage prior {SMALL} --batch-size 2 --steps 1 --rounds 1 --workers 1",
    "train_step-decoder-64-lora2": f"--stage decoder {SMALL} --resolution 64 --batch-size 2 --steps 1 --rounds 1 "
    "--workers 1 --lora-rank 2",
    "train_step-prior-levers": f"--stage prior {SMALL} --batch-size 2 --steps 1 --rounds 1 --levers --peak-tflops 1",
    "inpaint": f"{SMALL} --resolution 64 --batch-size 2 --steps 1 --rounds 2",
    "build": f"{SMALL} --resolution 64 --batch-size 2 --rounds 1",
    "end_to_end-prior": f"--stage prior {SMALL} --batch-size 4 --epochs 1 --rounds 1 --price 3.6",
    "shapes": "--resolution 64 128 --images 4 --batch-size 1 --steps 1 --rounds 1 --passes 1",
    "published-prior": f"--stage prior --model-size tiny --mixed-precision no {SMALL} --batch-size 2 --steps 1",
    "growth-5000": "--sizes 500 5000 --batches 2 --rounds 1",
}
UPSTREAM = """
import sys
from tqdm import tqdm
steps = int(sys.argv[sys.argv.index("--max_train_steps") + 1])
for step in tqdm(range(steps), desc="Steps"):
    if step == {last}:
        raise SystemExit("no more steps")
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all benchmarks write into one folder, and the page that report.py makes of it."""
    folder, kept = tmp_path_factory.mktemp("results"), tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        # Kernels take long to make.
        patch.setattr(compilation, "BACKEND", "eager")
        patch.setattr(shapes, "WARM_UP", 1)
        for name, words in RUNS.items():
            script, *_ = name.split("-")
            keep = ["--folder", str(kept)] if script != "growth" else []
            importlib.import_module(script).main([*words.split(), *keep, "--output", str(folder)])
    size = "--rows 256 --batch-size 8 --batches 2 --slow-batches 1 --rounds 1 --format zarr"
    command = [sys.executable, BENCHMARKS / "loader.py", *size.split(), "--output", folder / "loader-cpu.json"]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "set_num_threads", lambda _: None)  # others' tests keep theirs
        importlib.import_module("loader").main(f"{size} --rows 64 --cold --output {folder}".split())
    (folder / "parity-cpu.json").write_bytes((BENCHMARKS / "results" / "parity-cpu.json").read_bytes())
    importlib.import_module("report").main([str(folder)])
    return folder


def outcome(results: Path, name: str) -> dict[str, Any]:
    return json.loads((results / f"{name}-{device_kind()}.json").read_text())


def test_results_say_where_and_how_they_were_measured(results: Path) -> None:
    for name in RUNS:
        found = outcome(results, name)
        assert {"cpu", "date", "commit", "torch", "torch_threads"} <= found["machine"].keys()
        assert found["benchmark"] == name.split("-")[0]
        assert found["command"]
        assert "output" not in found["settings"]


@pytest.mark.parametrize(
    ("name", "cached", "online"),
    [
        (
            "train_step-prior",
            {"cached, packed", "cached, not packed"},
            {"online, packed", "online, not packed", "online, not packed, in step"},
        ),
        ("train_step-decoder-64-lora2", {"cached"}, {"online", "online, in step"}),
    ],
)
def test_a_training_step_is_compared_in_all_ways(results: Path, name: str, cached: set[str], online: set[str]) -> None:
    (case,) = outcome(results, name)["results"]
    limits = {way.replace("cached", "compute only") for way in cached}
    assert case["ways"].keys() == cached | online | limits | {"encoders only"}
    assert {fast: set(slow) for fast, slow in case["speed_up"].items()} == dict.fromkeys(cached, online)
    trained = [row for way, row in case["ways"].items() if way != "encoders only"]
    assert all(row["images_per_second"] > 0 and 0 <= row["waiting_share"] <= 1 for row in trained)
    assert all(row["peak_memory_bytes"] is None or row["peak_memory_bytes"] > 0 for row in trained)
    # Same samples, noise and weights: rows were rounded to float16 in the cache, and nothing else differs.
    losses = [row["loss"] for row in trained]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-3)


def test_a_step_that_fills_holes_is_compared_with_a_plain_one(results: Path) -> None:
    found = outcome(results, "inpaint")["results"]
    plain, filling = found["ways"].values()
    assert filling["loss"] == pytest.approx(plain["loss"], rel=1e-5)  # what is new begins at zero
    first, second = found["of_plain"]["rounds"]
    assert found["of_plain"]["median"] == pytest.approx((first + second) / 2, abs=1e-4)
    assert f"{found['of_plain']['median']:.3f} of a plain step" in (results / "README.md").read_text()


def test_levers_are_compared_with_the_plain_step(results: Path) -> None:
    (case,) = outcome(results, "train_step-prior-levers")["results"]
    plain = case["ways"]["cached, packed"]
    levers = {way: row for way, row in case["ways"].items() if way.startswith("cached + ")}
    if not torch.cuda.is_available():
        names = ["compiled", "noise draws 4", "batch x 4", "compiled, noise draws 4"]
        assert list(levers) == list(case["speed_up"]) == [f"cached + {name}, packed" for name in names]
        assert case["failed"] == {}
    for way, row in levers.items():
        if "draws" in way:
            assert row["draws_per_second"] == pytest.approx(4 * row["images_per_second"], abs=0.1)
        elif "batch" not in way:  # which begins with other images
            assert row["loss"] == pytest.approx(plain["loss"], rel=1e-5)
        assert row["kernel_milliseconds"].keys() == {*KINDS, "other"}
        assert row["kernel_milliseconds"]["matmul"] > 0
        # One TFLOP/s was named as the peak.
        assert row["of_peak"] == pytest.approx(row["teraflops"], abs=1e-3)
    page = (results / "README.md").read_text()
    assert "| of a step |" in page
    # More noise per image is compared by draws, of which each of two images has four.
    name = "cached + noise draws 4, packed"
    (row,) = [line.split(" | ") for line in page.splitlines() if line.startswith(f"| {name} (8 draws a step) | ")][:1]
    assert row[-2] == f"{4 * levers[name]['images_per_second']:,.1f}"
    assert row[-1] == f"{4 * case['speed_up'][name]['cached, packed']:,.2f}× |"


def test_weights_lie_channels_last_while_the_lever_is_set() -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.0, fused=True)
    weight = network[0].weight
    before = weight.detach().clone()

    def step() -> torch.Tensor:
        loss = network(torch.ones(1, 3, 4, 4)).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    plain = step()
    with channels_last(network, optimizer):
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert optimizer.state[weight]["exp_avg"].is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(step(), plain)
    assert weight.is_contiguous()
    assert torch.equal(weight, before)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "matmul"),
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopA_TNN", "matmul"),
        ("aten::addmm", "matmul"),
        ("aten::mkldnn_convolution", "matmul"),
        ("void flash_fwd_kernel<Flash_fwd_kernel_traits>", "attention"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("Memcpy DtoD (Device -> Device)", "copy"),
        ("aten::copy_", "copy"),
        ("void at::native::vectorized_elementwise_kernel<4, GeluBackward>", "other"),
        ("triton_poi_fused_gelu_0", "other"),
    ],
)
def test_kernels_are_told_apart_by_their_names(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_a_build_is_compared_with_its_encoders(results: Path) -> None:
    found = outcome(results, "build")["results"]
    assert {name: table["rows"] for name, table in found["tables"].items()} == {
        "image_embeds": 5, "text": 5, "latents-64": 4
    }  # fmt: skip
    for table in found["tables"].values():
        for per_row in ("rows_per_second", "cpu_milliseconds_per_row"):
            assert table[per_row].keys() == {"encoder alone", "decoding alone", "build"}
            assert min(table[per_row].values()) > 0
        assert sum(table["shares"].values()) == pytest.approx(1, abs=1e-3)
        assert 0 <= table["held_up"] <= table["shares"]["decode"] + 1e-3
    ways = {f"{work}, {padding}" for work in ("encoder alone", "build") for padding in ("full", "trimmed")}
    assert found["levers"]["text_padding"]["rows_per_second"].keys() == ways
    assert 0 < found["levers"]["channels_last"]["largest_difference"] < 1e-4
    assert {form: build["samples"] for form, build in found["builds"].items()} == {"zarr": 4, "webdataset": 4}


def test_short_runs_of_published_sizes_are_compared(results: Path) -> None:
    found = outcome(results, "published-prior")["results"]
    cached, online = found["ways"].values()
    assert cached["loss"] == pytest.approx(online["loss"], rel=1e-3)
    for row in (cached, online):
        assert 0 < row["steps_seconds"] < row["seconds"]
    assert found["speed_up"] == pytest.approx(online["steps_seconds"] / cached["steps_seconds"], rel=0.02, abs=0.02)


def test_a_whole_training_is_extrapolated_linearly(results: Path) -> None:
    found = outcome(results, "end_to_end-prior")["results"]
    for way, row in found["ways"].items():
        before = row["around_seconds"] + (found["build_seconds"] if way == "cached" else 0.0)
        assert found["extrapolated_seconds"][way]["100"] == pytest.approx(before + 100 * row["epoch_seconds"], abs=0.02)
        assert row["epoch_cost"] == pytest.approx(row["epoch_seconds"] / 1000, abs=1e-6)
        assert math.isfinite(row["loss"])
    assert found["break_even_epochs"].keys() == {"online", "online, not packed"}


def test_an_epoch_on_buckets_is_foretold_by_its_passes(results: Path) -> None:
    found = outcome(results, "shapes")["results"]
    (epoch,), shapes = found["epochs"], found["shapes"]
    assert [row["shape"] for row in shapes] == [[64, 128], [64, 64], [128, 64]]
    # Every picture comes once, each in a pass of its own.
    assert [row["batch"] for row in shapes] == [1, 1, 1]
    assert epoch["passes"] == sum(row["samples"] for row in shapes) == 4
    # One epoch between two turns of passes alone: their mean foretells it, and is their median.
    by_passes = sum(row["samples"] * row["milliseconds"] for row in shapes) / 1e3
    pixels = sum(row["samples"] * math.prod(row["shape"]) for row in shapes)
    assert epoch["by_passes_seconds"] == pytest.approx(by_passes, abs=2e-3)
    assert epoch["by_area_seconds"] == pytest.approx(pixels * shapes[1]["nanoseconds_per_pixel"] / 1e9, rel=5e-3)
    for way in ("by_passes", "by_area"):
        quotient = pytest.approx(epoch["seconds"] / epoch[f"{way}_seconds"], rel=0.01)
        assert found["of_foretold"][way]["rounds"] == [quotient]


def test_every_residency_of_buckets_is_asked_what_it_waits_for(results: Path) -> None:
    waits = outcome(results, "shapes")["results"]["waits"]
    assert len(waits) == 3
    for rows in waits.values():
        assert {"ram", "mmap", "stream"} <= rows.keys()
        assert all(0 <= row["waiting_share"] <= 1 for row in rows.values())
        # The same samples, in the same order.
        assert rows["ram"]["loss"] == rows["mmap"]["loss"]


def test_growth_has_a_verdict_on_every_quantity(results: Path) -> None:
    found = outcome(results, "growth-5000")["results"]
    assert [size["samples"] for size in found["sizes"]] == [500, 5000]
    assert len(found["growth"]) == 9
    assert found["growth"]["bytes"]["grows"] == "linear"


def test_reads_from_the_disk_are_told_as_a_share_of_its_rate(results: Path) -> None:
    found = json.loads((results / f"loader-cold-{device_kind()}.json").read_text())
    (ways,) = found["results"].values()
    assert {name: row["ratio"] for name, row in ways.items() if row["ratio"] == 1} == {"files in sequence": 1.0}
    assert ways["loader, mmap, random"]["rows_per_second"] > 0
    assert "| loader, mmap, random |" in (results / "README.md").read_text()


def test_report_shows_every_benchmark(results: Path) -> None:
    page = (results / "README.md").read_text()
    assert all(f"\n## {title}, " in page for name, title in TITLES.items() if name != "demo")
    for picture in ("train_step", "loader", "growth"):
        assert (results / f"{picture}-cpu.png").read_bytes().startswith(b"\x89PNG")
        assert f"]({picture}-cpu.png)" in page
    (case,) = outcome(results, "train_step-prior")["results"]
    assert f"| cached, packed | {case['ways']['cached, packed']['images_per_second']:,.1f} |" in page


@pytest.mark.parametrize("path", sorted((BENCHMARKS / "results").glob("*.json")), ids=lambda path: path.stem)
def test_a_result_is_of_a_command_that_its_script_takes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report, parse, taken = json.loads(path.read_text()), ArgumentParser.parse_args, []

    def parse_only(parser: ArgumentParser, given: list[str] | None = None) -> None:
        taken.append(vars(parse(parser, given)))
        raise InterruptedError

    words = shlex.split(command(name_of(path), report, path.name).split(" > ")[0])
    (script,) = [i for i, word in enumerate(words) if word.endswith(".py")]
    monkeypatch.setattr(ArgumentParser, "parse_args", parse_only)
    monkeypatch.setattr(sys, "argv", words[script:])
    with pytest.raises(InterruptedError):
        importlib.import_module(Path(words[script]).stem).main()
    settings = report.get("settings", report.get("arguments", {}))
    # What is None is chosen later.
    given = {name: str(value) for name, value in taken[0].items() if name in settings and value is not None}
    assert given == {name: str(settings[name]) for name in given}


def test_results_without_a_table_are_told_in_a_line() -> None:
    found = {path: json.loads(path.read_text()) for path in (BENCHMARKS / "results").glob("*.json")}
    lines = {name_of(path): one_line(path, report) for path, report in found.items() if name_of(path) in SUMMARIES}
    assert lines.keys() == SUMMARIES.keys()
    kills = json.loads((BENCHMARKS / "results" / "kills-cpu.json").read_text())
    killed = sum(row["kills"] for form in kills["results"].values() for row in form.values())
    assert f"{killed:,} builders killed" in lines["kills"][0]
    assert kills["commit"] in lines["kills"][1]
    assert " > benchmarks/results/kills-cpu.json" in lines["kills"][2]


def test_near_duplicates_among_drawn_rows_are_counted() -> None:
    found = know_your_data.measure_scale(500, 32, 20)
    assert (found["rows"], found["planted"], found["planted_found"], found["nearest_found"]) == (500, 5, 1, 1)
    true, false = np.array([0.5, 0.7]), np.array([0.1, 0.5])
    assert know_your_data.area_under_curve(true, false) == pytest.approx(7 / 8)


def test_report_shows_what_demos_reached() -> None:
    report = json.loads((BENCHMARKS / "results" / "demo-cpu.json").read_text())
    head, _, *rows = demo_lines(report)
    assert "all three" in head
    assert [line.split(" | ")[0] for line in rows if line] == [f"| {name}" for name in report["results"]]


def test_full_networks_are_as_large_as_the_published_ones() -> None:
    sizes = {
        component: sum(parameter.numel() for parameter in make_network(component, settings, "meta").parameters())
        for component, settings in read_configs("full").items()
    }
    assert sizes == {
        "prior": 1_026_225_920,
        "image_encoder": 1_844_907_264,
        "text_encoder": 694_659_840,
        "unet": 1_253_057_288,
        "movq": 67_832_495,
    }


def test_speed_ups_are_medians_of_rounds() -> None:
    turns = {"cached": [(1.0, 0.0), (2.0, 0.0), (1.0, 0.0)], "online": [(3.0, 0.0), (4.0, 0.0), (9.0, 0.0)]}
    assert speed_ups(turns) == {"cached": {"online": 3.0}}
    levers = {"cached": [(3.0, 0.0)], "cached + compiled": [(2.0, 0.0)], "compute only": [(1.0, 0.0)]}
    assert speed_ups(levers, "cached") == {"cached + compiled": {"cached": 1.5}}


def test_break_even_counts_the_build_and_both_starts() -> None:
    cached, online = {"epoch": 2.0, "around": 5.0}, {"epoch": 6.0, "around": 1.0}
    epochs = break_even(20.0, cached, online)
    assert epochs == 6.0
    assert 20 + 5 + epochs * 2 == 1 + epochs * 6
    assert break_even(20.0, online, cached) is None
    assert break_even(0.0, cached, online | {"around": 9.0}) == 0.0


@pytest.mark.parametrize(("power", "word"), [(0.0, "flat"), (0.5, "less than linear"), (1.0, "linear")])
def test_growth_is_judged_by_the_largest_caches(power: float, word: str) -> None:
    samples = [10.0, 100.0, 1000.0]
    found = verdict(samples, [5.0, *(n**power for n in samples[1:])])
    assert found["grows"] == word
    assert found["slope"] == pytest.approx(power)


def test_time_covered_by_overlapping_spans_is_counted_once() -> None:
    assert covered([]) == 0.0
    assert covered([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 2.5), (2.6, 2.9)]) == 4.0


def test_shards_are_cut_without_losing_rows() -> None:
    shards = list(cut([bytes([n]) for n in range(5)], 2))
    assert [shard.name for shard in shards] == ["00000", "00001", "00002"]
    assert b"".join(key for shard in shards for key in shard.keys) == bytes(range(5))


def test_outcome_goes_into_the_file_that_is_named(tmp_path: Path) -> None:
    write_outcome(tmp_path / "mine.json", "build", {"output": tmp_path, "images": 4}, [1])
    found = json.loads((tmp_path / "mine.json").read_text())
    assert (found["settings"], found["results"]) == ({"images": 4}, [1])
    write_outcome(None, "build", {}, [])


@pytest.mark.parametrize("last", [2, 99])
def test_upstream_is_timed_by_its_progress_bar(last: int, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(UPSTREAM.format(last=last))
    arguments = Namespace(
        model_size="tiny", images=2, image_side=16, folder=tmp_path, mixed_precision="no", upstream_script=script,
        steps=2, workers=1, lora_rank=None, gradient_checkpointing=False,
    )  # fmt: skip
    with open_workload(arguments) as workload:
        told = time_upstream(arguments, workload, 64, 2)
    assert ("no more steps" in str(told)) == (last == 2)
    if last == 99:
        rates = told["images_per_second_by_workers"]
        assert rates.keys() == {"0", "1", "2"}  # the one that was asked for among them
        assert told["images_per_second"] == max(rates.values()) == rates[str(told["dataloader_num_workers"])]


def test_upstream_is_as_fast_as_with_the_workers_that_suit_it() -> None:
    assert fastest({0: 80.0, 2: 2000.0, 16: 90.0}, 1) == {
        "images_per_second": 12.5, "step_milliseconds": 80.0, "dataloader_num_workers": 0,
        "images_per_second_by_workers": {"0": 12.5, "2": 0.5, "16": 11.11},
    }  # fmt: skip


def test_a_case_that_does_not_fit_into_memory_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError

    train_step = importlib.import_module("train_step")
    monkeypatch.setattr(train_step, "measure_case", full)
    train_step.main(["--stage", "prior", "--images", "1", "--image-side", "16", "--output", str(tmp_path)])
    (case,) = outcome(tmp_path, "train_step-prior")["results"]
    assert case["out_of_memory"]
    importlib.import_module("report").main([str(tmp_path)])
    assert "Out of memory." in (tmp_path / "README.md").read_text()
    assert "out of memory" in capsys.readouterr().out
