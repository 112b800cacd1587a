"""Two processes see what one would: the same samples, once each, and the same steps."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from training import LORA_WEIGHTS, STAGES, WEIGHTS, assert_equal_tensors, config, course

from kcache.cache import Cache
from kcache.checkpoint import latest_checkpoint
from kcache.trainer import train

SCRIPT = """
# A process that waits for another for ever would outlive the test.
import faulthandler; faulthandler.dump_traceback_later(280, exit=True)
import hashlib, json, os, sys
from pathlib import Path
from kcache import objectives
from kcache.config import TrainConfig
from kcache.trainer import train

seen = []

def watch(objective):
    predict = objective.predict
    def watched(self, batch, noise, timesteps):
        seen.extend(hashlib.sha256(row.numpy().tobytes()).hexdigest() for row in batch["image_embeds"])
        return predict(self, batch, noise, timesteps)
    objective.predict = watched

watch(objectives.PriorObjective), watch(objectives.DecoderObjective)
cache, *runs = sys.argv[1:]
for run in map(json.loads, runs):
    train(cache, TrainConfig(**run))
    Path(run["output_dir"], f"seen-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(seen))
    seen.clear()
"""


STOPPED = """
import faulthandler; faulthandler.dump_traceback_later(280, exit=True)
import os, signal, sys, time
from pathlib import Path
from kcache import run_log, trainer, training_run
from training import config

take, save = trainer.take_step, training_run.save_checkpoint
steps = []

def take_step(*arguments):
    steps.append(len(steps))
    if len(steps) == 12 and os.environ["RANK"] == sys.argv[3]:
        os.kill(os.getpid(), signal.SIGTERM)
    return take(*arguments)

def save_slowly(*arguments):
    time.sleep(3)
    return save(*arguments)

trainer.take_step, training_run.save_checkpoint, run_log.SLOW_SECONDS = take_step, save_slowly, 100
trainer.train(sys.argv[1], config(Path(sys.argv[2]), max_train_steps=1000, gradient_accumulation_steps=1))
"""


def run(cache: str, folder: Path, processes: int, *runs: dict[str, Any]) -> None:
    """Train one run after another in `processes` processes; each leaves the samples that it saw in seen-RANK.json."""
    (folder / "script.py").write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*launcher, str(folder / "script.py"), cache, *map(json.dumps, runs)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"})


def seen(run_dir: Path) -> list[str]:
    """The images that all processes of a run saw, by their embedding."""
    return [image for path in sorted(run_dir.glob("seen-*.json")) for image in json.loads(path.read_text())]


def settings(output_dir: Path, stage: str, **changes: Any) -> dict[str, Any]:
    return vars(config(output_dir, stage, gradient_accumulation_steps=1, **changes))


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_train_as_one_with_twice_the_accumulation(cache: str, tmp_path: Path, stage: str) -> None:
    changes = {"lr_scheduler": "linear", "lr_warmup_steps": 1, "val_fraction": 0.3, "validation_steps": 2}
    train(cache, config(tmp_path / "one", stage, **changes))
    run(cache, tmp_path, 2, settings(tmp_path / "two", stage, **changes))
    for two, one in zip(course(tmp_path / "two"), course(tmp_path / "one"), strict=True):
        assert two == pytest.approx(one, rel=1e-4)
    one_lines, two_lines = ((tmp_path / name / "validation.jsonl").read_text().split("\n") for name in ("one", "two"))
    for two_line, one_line in zip(two_lines[:-1], one_lines[:-1], strict=True):
        assert json.loads(two_line) == pytest.approx(json.loads(one_line), rel=1e-4)


@pytest.mark.parametrize(("stage", "lora"), [("prior", False), ("decoder", False), ("prior", True)])
def test_two_processes_go_on_from_every_step(cache: str, tmp_path: Path, stage: str, lora: bool) -> None:
    steps = 11
    changes = {"max_train_steps": steps, "checkpointing_steps": 1, "use_ema": True, "lora_rank": 2 if lora else None}
    whole = tmp_path / "whole"
    parts = {
        step: settings(
            tmp_path / f"from-{step}", stage, **changes, resume_from_checkpoint=str(whole / f"checkpoint-{step}")
        )
        for step in range(1, steps)
    }
    run(cache, tmp_path, 2, settings(whole, stage, **changes), *parts.values())
    weights = LORA_WEIGHTS if lora else WEIGHTS[stage]
    for step, part in parts.items():
        folder = Path(part["output_dir"])
        assert course(folder) == course(whole)[step:]
        for name in (f"checkpoint-{steps}/optimizer.safetensors", f"checkpoint-{steps}/ema.safetensors", weights):
            assert_equal_tensors(folder / name, whole / name)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_ends_all_and_leaves_a_checkpoint(cache: str, tmp_path: Path, rank: int) -> None:
    (tmp_path / "script.py").write_text(STOPPED)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(
        [*launcher, str(tmp_path / "script.py"), cache, str(tmp_path / "run"), str(rank)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert "exitcode  : 143" in ended.stderr
    assert ended.stderr.count("go on with: --resume-from-checkpoint latest") == 1
    # All have to agree on the step to stop after, which they do every ten steps.
    checkpoint = latest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    assert checkpoint.step == len(course(tmp_path / "run")) == 20


def test_one_process_goes_on_where_two_were_and_misses_no_sample(
    cache: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    samples = len(Cache.open(cache))
    begun = settings(tmp_path / "two", "prior", max_train_steps=2, checkpointing_steps=2)
    left = samples * 2 - 2 * 4
    assert left % 2 == 0
    latest = str(tmp_path / "two" / "checkpoint-2")
    rest = settings(
        tmp_path / "one", "prior", max_train_steps=2 + left // 2, checkpointing_steps=50, resume_from_checkpoint=latest
    )
    run(cache, tmp_path, 2, begun)
    run(cache, tmp_path, 1, rest)
    times = Counter(seen(tmp_path / "two") + seen(tmp_path / "one"))
    assert len(times) == samples
    assert set(times.values()) == {2}
    with caplog.at_level("WARNING"):
        train(cache, config(tmp_path / "here", gradient_accumulation_steps=1, resume_from_checkpoint=latest))
    assert "4 samples per step, this run takes 2" in caplog.text


def test_two_processes_may_hand_over_to_one_with_twice_the_accumulation(cache: str, tmp_path: Path) -> None:
    train(cache, config(tmp_path / "one", checkpointing_steps=2))
    run(cache, tmp_path, 2, settings(tmp_path / "two", "prior", checkpointing_steps=2))
    path = str(tmp_path / "two" / "checkpoint-2")
    train(cache, config(tmp_path / "resumed", resume_from_checkpoint=path))
    for resumed, one in zip(course(tmp_path / "resumed"), course(tmp_path / "one")[2:], strict=True):
        assert resumed == pytest.approx(one, rel=1e-4)


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
