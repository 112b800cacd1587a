"""Two processes see what one would: the same samples, once each, and the same steps."""

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from counted import counted_cache
from filling import MODEL, decoder_like, fills_holes
from short_runs import LORA_WEIGHTS, WEIGHTS, assert_equal_tensors, config, course, tensor_names

from kcache.objectives.losses import OBJECTIVES, Objective
from kcache.store.cache import Cache
from kcache.store.checkpoint import latest_checkpoint
from kcache.training.trainer import train

STEPS = 7
"""Of 4 of the 10 samples each: the first epoch ends within a step, the second with one."""
NETWORKS = {("prior", False): (2, 3, 5), ("decoder", False): (3,), ("prior", True): (3,)}
"""By stage, and whether adapters are trained, the steps to go on from: where samples stand is the same for all.

They are the last whole one of an epoch, one that ends in the next, and one with which an epoch ends."""
SHAPED: dict[str, Any] = {"resolution": (32, 64), "train_batch_size": 7}
"""Squares at 32 pixels seven at a time, five shapes at 64 two at a time at most, half of the turns mirrored."""
COUNTED: dict[str, Any] = {"snr_gamma": 5.0}
"""From a cache whose samples have weights and repeats."""
HINTED: dict[str, Any] = {
    "hint": "edges", "loss_mask": True, MODEL: "following", "num_validation_images": 0, "val_fraction": 0.1
}  # fmt: skip
"""From a cache whose samples have control images, and of which the usual share would leave one to train on."""
AS_ONE: list[tuple[str, dict[str, Any]]] = [
    ("prior", {}),
    ("decoder", {}),
    ("prior", {"compile": True, "noise_draws": 2, "class_prompt": ("a fox",), "num_class_rows": 3}),
    ("decoder", {"compile": True, "gradient_checkpointing": True}),
    ("decoder", {"inpaint": True, "hole_loss": True, "num_validation_images": 0}),
    ("decoder", {"inpaint": True, "lora_rank": 2, MODEL: "filling", "num_validation_images": 1}),
    ("decoder", SHAPED),
    ("decoder", COUNTED),
    ("decoder", HINTED),
]
"""Stage, and what saves time or memory, draws masks or class rows, or reads hints or pictures of several shapes."""
WATCHED = {
    "lr_scheduler": "linear", "lr_warmup_steps": 1, "val_fraction": 0.3, "validation_steps": 2, "checkpointing_steps": 2
}  # fmt: skip
BEGUN: dict[str, tuple[str, dict[str, Any]]] = {
    "begun": ("prior", {}),
    "streamed": ("prior", {"shuffle": "stream", "residency": "stream"}),
    "shaped": ("decoder", {"resolution": (64,), "flip": False}),
}
"""Runs of two steps: their stage, and which samples they take in which order."""
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

SCRIPT = """
# A process that waits for another for ever would outlive the test.
import faulthandler; faulthandler.dump_traceback_later(280, exit=True)
import hashlib, json, os, sys
from pathlib import Path
from kcache.objectives import blocks as compilation, losses as objectives
from kcache.config import TrainConfig
from kcache.training import result, validation
from kcache.training.trainer import train

result.plot_run = validation.plot_run = lambda run_dir: run_dir  # takes longer than the run
compilation.BACKEND = "eager"  # runs graphs as they are
seen = []

def watch(objective):
    predict = objective.predict
    def watched(self, batch, noise, timesteps):
        seen.extend(hashlib.sha256(row.numpy().tobytes()).hexdigest() for row in batch["image_embeds"])
        return predict(self, batch, noise, timesteps)
    objective.predict = watched

watch(objectives.PriorObjective), watch(objectives.DecoderObjective)
cache, bucketed, counted, controlled, stopped, *runs = sys.argv[1:]
for run in map(json.loads, runs):
    path = bucketed if run["resolution"] else counted if run["snr_gamma"] else controlled if run["hint"] else cache
    train(path, TrainConfig(**run))
    Path(run["output_dir"], f"seen-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(seen))
    seen.clear()
"""
"""What each of two processes does, before it is stopped."""
STOPPED = """
import signal, time
from datetime import timedelta
import torch
from kcache.training import log as run_log, run as training_run, trainer

BOUND = 2  # seconds for which a process waits for another in a collective
take, save, asked, code = trainer.take_step, training_run.save_checkpoint, None, 0

def take_step(*arguments):
    torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=BOUND), torch.distributed.group.WORLD)
    steps.append(len(steps))
    if len(steps) == 12 and os.environ["RANK"] == asked:
        os.kill(os.getpid(), signal.SIGTERM)
    return take(*arguments)

def save_slowly(*arguments):
    time.sleep(2 * BOUND)
    return save(*arguments)

result.plot_run = lambda run_dir: time.sleep(2 * BOUND)
trainer.take_step, training_run.save_checkpoint, run_log.SLOW_SECONDS = take_step, save_slowly, 100
whole, *runs = json.loads(stopped)
for asked, run in zip((None, "0", "1"), (whole, *runs), strict=True):
    steps = []
    try:
        train(cache, TrainConfig(**run))
    except SystemExit as end:
        code = end.code
sys.exit(code)
"""
"""Runs of theirs of which one process is told to stop, the others being none that wait long for it."""


def given(fast: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The settings of a run, with the decoder that they name found in `folder`."""
    return {name: str(folder / value) if name == MODEL else value for name, value in fast.items()}


def settings(output_dir: Path, stage: str, **changes: Any) -> dict[str, Any]:
    return vars(config(output_dir, stage, gradient_accumulation_steps=1, **changes))


def whole_and_parts(folder: Path, stage: str, lora: bool) -> list[dict[str, Any]]:
    """A run that is not interrupted, and those that go on from some of its steps, only whose last step is kept."""
    folder = folder / f"{stage}-{lora}"
    changes = {"max_train_steps": STEPS, "use_ema": True, "lora_rank": 2 if lora else None}
    checkpoints = {step: folder / "whole" / f"checkpoint-{step}" for step in NETWORKS[stage, lora]}
    parts = [
        settings(folder / f"from-{step}", stage, **changes, checkpointing_steps=STEPS, resume_from_checkpoint=str(path))
        for step, path in checkpoints.items()
    ]
    return [settings(folder / "whole", stage, **changes, checkpointing_steps=1), *parts]


@pytest.fixture(scope="module")
def trained(
    oracle: Path, cache: str, bucketed: Path, controlled: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """All that two processes train here, one run after another: to start them takes longer than the runs.

    Each run leaves the samples that its processes saw in seen-RANK.json.
    """
    folder = tmp_path_factory.mktemp("two")
    decoder_like(folder / "filling", oracle, fills_holes)
    (folder / "following").symlink_to(controlled / "following")
    as_one = [(stage, WATCHED | given(fast, folder)) for stage, fast in AS_ONE]
    runs = [settings(folder / f"as-one-{number}", stage, **asked) for number, (stage, asked) in enumerate(as_one)]
    runs += [run for stage, lora in NETWORKS for run in whole_and_parts(folder, stage, lora)]
    for name, (stage, order) in BEGUN.items():
        runs.append(settings(folder / name, stage, max_train_steps=2, checkpointing_steps=2, **order))
    stopped = [{"max_train_steps": 2, "checkpointing_steps": 1}, {"max_train_steps": 1000}, {"max_train_steps": 1000}]
    names = ("whole", "stopped-0", "stopped-1")
    asked = [settings(folder / name, "prior", **few) for name, few in zip(names, stopped, strict=True)]
    (folder / "script.py").write_text(SCRIPT + STOPPED)
    caches = [cache, str(bucketed / "cache"), counted_cache(cache, folder / "counted"), str(controlled / "squares")]
    ended = subprocess.run(
        [*LAUNCHER, str(folder / "script.py"), *caches, *map(json.dumps, [asked, *runs])],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
    )
    (folder / "stderr").write_text(ended.stderr)
    assert "exitcode  : 143" in ended.stderr, ended.stderr[-5000:]  # all trained, and then both were stopped
    return folder


@pytest.fixture(scope="module")
def caches(cache: str, bucketed: Path, controlled: Path, trained: Path) -> dict[str, str]:
    """By the setting that a case begins with, the cache that its run reads."""
    others = {"resolution": bucketed / "cache", "snr_gamma": trained / "counted", "hint": controlled / "squares"}
    return {"": cache} | {setting: str(path) for setting, path in others.items()}


def alone(number: int, caches: dict[str, str], folder: Path) -> tuple[str, str, dict[str, Any]]:
    """What one process trains as two do: the cache, the stage and the settings, without what saves time or memory."""
    stage, fast = AS_ONE[number]
    path = caches.get(next(iter(fast), ""), caches[""])
    return path, stage, WATCHED | given(fast, folder) | {"compile": False, "gradient_checkpointing": False}


@pytest.mark.parametrize("number", range(len(AS_ONE)))
def test_two_processes_train_as_one_with_twice_the_accumulation(
    caches: dict[str, str], trained: Path, tmp_path: Path, number: int
) -> None:
    path, stage, plain = alone(number, caches, trained)
    two, one = trained / f"as-one-{number}", tmp_path / "one"
    train(path, config(one, stage, **plain))
    for of_two, of_one in zip(course(two), course(one), strict=True):
        assert of_two == pytest.approx(of_one, rel=1e-4)
    lines_of_two, lines_of_one = ((run / "validation.jsonl").read_text().splitlines() for run in (two, one))
    assert lines_of_two
    for line_of_two, line_of_one in zip(lines_of_two, lines_of_one, strict=True):
        assert json.loads(line_of_two) == pytest.approx(json.loads(line_of_one), rel=1e-4)
    if AS_ONE[number][1] == SHAPED:
        entry = json.loads(lines_of_two[-1])
        assert entry["val_loss_32px"] < entry["val_loss"] < entry["val_loss_64px"] or (
            entry["val_loss_64px"] < entry["val_loss"] < entry["val_loss_32px"]
        )
    assert tensor_names(two) == tensor_names(one)


@pytest.mark.parametrize("number", [0, 2, 5, 6])
def test_two_processes_hand_over_to_one(caches: dict[str, str], trained: Path, tmp_path: Path, number: int) -> None:
    path, stage, plain = alone(number, caches, trained)
    two = trained / f"as-one-{number}"
    train(path, config(tmp_path, stage, resume_from_checkpoint=str(two / "checkpoint-2"), **plain))
    for of_one, of_two in zip(course(tmp_path), course(two)[2:], strict=True):
        assert of_one == pytest.approx(of_two, rel=1e-4)


@pytest.mark.parametrize(("stage", "lora"), NETWORKS)
def test_two_processes_go_on_from_any_step(trained: Path, stage: str, lora: bool) -> None:
    whole = trained / f"{stage}-{lora}" / "whole"
    weights = LORA_WEIGHTS if lora else WEIGHTS[stage]
    for step in NETWORKS[stage, lora]:
        part = trained / f"{stage}-{lora}" / f"from-{step}"
        assert course(part) == course(whole)[step:]
        for name in (f"checkpoint-{STEPS}/optimizer.safetensors", f"checkpoint-{STEPS}/ema.safetensors", weights):
            assert_equal_tensors(part / name, whole / name)


def test_a_signal_to_one_process_ends_all_and_saving_takes_what_time_it_takes(trained: Path) -> None:
    said = (trained / "stderr").read_text()
    assert said.count("stopped by SIGTERM; go on with: --resume-from-checkpoint latest") == 2
    assert (trained / "whole" / WEIGHTS["prior"]).exists()
    for rank in (0, 1):
        # All have to agree on the step to stop after, which they do every ten steps.
        checkpoint = latest_checkpoint(trained / f"stopped-{rank}")
        assert checkpoint is not None
        assert checkpoint.step == len(course(trained / f"stopped-{rank}")) == 20


@pytest.mark.parametrize(("name", "batch_size"), [("begun", 2), ("streamed", 1), ("shaped", 1)])
def test_one_process_goes_on_where_two_were_and_misses_no_sample(
    cache: str,
    bucketed: Path,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    batch_size: int,
) -> None:
    """Of samples of several shapes batches of one: none waits for others at the end."""
    stage, order = BEGUN[name]
    path = str(bucketed / "cache") if "resolution" in order else cache
    seen = [image for path in trained.glob(f"{name}/seen-*.json") for image in json.loads(path.read_text())]
    samples, objective = len(Cache.open(path, order.get("resolution", ()))), OBJECTIVES[stage]
    predict = objective.predict
    assert 2 * 2 <= len(seen) <= 2 * 4

    def watched(self: Objective, batch: dict[str, torch.Tensor], *inputs: Any) -> torch.Tensor:
        seen.extend(hashlib.sha256(row.numpy().tobytes()).hexdigest() for row in batch["image_embeds"])
        return predict(self, batch, *inputs)

    monkeypatch.setattr(objective, "predict", watched)
    wishes = {"max_train_steps": None, "num_train_epochs": 2, "train_batch_size": batch_size, **order}
    wishes["resume_from_checkpoint"] = str(trained / name / "checkpoint-2")
    with caplog.at_level("WARNING"):
        train(path, config(tmp_path, stage, gradient_accumulation_steps=1, **wishes))
    assert f"4 samples per step, this run takes {batch_size}" in caplog.text
    times = Counter(seen)
    assert len(times) == samples
    assert set(times.values()) == {2}


def test_epochs_are_epochs_after_a_change_of_processes(cache: str, tmp_path: Path) -> None:
    samples = len(Cache.open(cache))
    train(cache, config(tmp_path / "first", max_train_steps=2, checkpointing_steps=2))
    result = train(
        cache,
        config(
            tmp_path / "second",
            gradient_accumulation_steps=1,
            max_train_steps=None,
            num_train_epochs=2,
            resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-2"),
        ),
    )
    assert result.step == 2 + -(-(2 * samples - 8) // 2)
