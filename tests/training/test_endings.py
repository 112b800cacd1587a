"""The end of a run: nothing between its last step and its result costs the work, and nothing that decorates it does."""

import errno
import os
import shutil
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import endings
import pytest
from accelerate.tracking import TensorBoardTracker
from short_runs import LORA_WEIGHTS, WEIGHTS, assert_equal_weights, config

import kcache.training.result
import kcache.training.trainer
from kcache.disk.room import Reserve
from kcache.errors import CacheWriteError, ModelError, RunError
from kcache.objectives.losses import PriorObjective
from kcache.store.checkpoint import latest_checkpoint
from kcache.store.run_directory import read_metrics, read_validation
from kcache.training.trainer import train
from kcache.training.validation import Validation

LATEST = {"resume_from_checkpoint": "latest"}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={endings.DISK_BYTES}", "none", str(folder)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("nothing may be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def moments(cache: str, settings: Any) -> list[str]:
    """The moments of a run that nothing happens to."""
    seen: list[str] = []
    assert endings.trained(cache, settings, lambda _, name: seen.append(name)) == 0
    return seen


@pytest.mark.parametrize(("stage", "lora"), [("prior", False), ("prior", True)])
def test_a_disk_that_fills_up_costs_neither_the_last_step_nor_a_byte_of_the_result(
    cache: str, disk: Path, stage: str, lora: bool
) -> None:
    settings = endings.settings(disk / "whole", stage, lora, max_train_steps=4, checkpointing_steps=3)
    seen = moments(cache, settings)
    expected = endings.weights(disk / "whole")
    subprocess.run(["rm", "-r", str(disk / "whole")], check=True)
    # In the last steps, in the last checkpoint, before the result and in it.
    chosen = [seen.index("save_checkpoint") - 1, len(seen) - 1 - seen[::-1].index("save_checkpoint")]
    chosen += [seen.index("write_result"), seen.index("_save" if lora else "export_network")]
    for moment in chosen:
        run_dir = disk / f"run-{moment}"
        settings = endings.settings(run_dir, stage, lora, max_train_steps=4, checkpointing_steps=3)
        code = endings.trained(cache, settings, lambda count, _, at=moment: endings.fill(disk) if count == at else None)
        assert endings.complaint(run_dir, expected, 4) is None
        assert code in (0, 1)
        (disk / endings.FILLER).unlink()
        train(cache, endings.settings(run_dir, stage, lora, max_train_steps=4, checkpointing_steps=3, **LATEST))
        assert endings.weights(run_dir) == expected
        subprocess.run(["rm", "-r", str(run_dir)], check=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_result_that_is_being_written_is_finished_first(cache: str, tmp_path: Path, number: signal.Signals) -> None:
    def act(_: int, name: str) -> None:
        if name in ("write_result", "export_network", "make_pipeline"):
            os.kill(os.getpid(), number)

    assert endings.trained(cache, config(tmp_path), act) == 128 + number
    assert (tmp_path / "model_index.json").exists()


def test_a_result_that_cannot_be_written_names_the_checkpoint_and_is_written_later(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(kcache.training.result, "replace", refusing(OSError(errno.EIO, os.strerror(errno.EIO))))
        with pytest.raises(RunError, match=r"Input/output error.*checkpoint-4 .*--resume-from-checkpoint latest"):
            train(cache, config(tmp_path))
    assert not list(tmp_path.glob(".*"))
    train(cache, config(tmp_path, **LATEST))
    assert (tmp_path / WEIGHTS["prior"]).exists()


def refusing(error: Exception) -> Callable[..., Any]:
    def refused(*_: Any, **__: Any) -> Any:
        raise error

    return refused


def test_what_only_decorates_costs_itself(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = refusing(ValueError("no such backend"))
    for target in ("validation.plot_run", "result.plot_run", "result.model_card", "validation.append_validation"):
        monkeypatch.setattr(f"kcache.training.{target}", broken)
    monkeypatch.setattr("kcache.training.log.append_metrics", broken)
    monkeypatch.setattr("kcache.training.validation.drawing", broken)
    monkeypatch.setattr("kcache.report.pictures.PromptPictures.prepare", lambda _: None)
    monkeypatch.setattr("kcache.report.pictures.PromptPictures.draw", broken)
    monkeypatch.setattr(TensorBoardTracker, "log", broken)
    monkeypatch.setattr(TensorBoardTracker, "finish", broken)
    looking = {"val_fraction": 0.3, "validation_prompts": ("a fox",), "validation_steps": 2, "report_to": "tensorboard"}
    train(cache, config(tmp_path, **looking), report=broken)
    assert (tmp_path / WEIGHTS["prior"]).exists()
    said = [record.getMessage() for record in caplog.records]
    for what in (
        "loss.png could not be drawn", "README.md could not be written", "validation.jsonl could not be written",
        "metrics.jsonl could not be written", "no curves can be drawn", "the pictures of step 2 could not be drawn",
        "tensorboard could not be told", "tensorboard could not finish", "progress could not be shown",
    ):  # fmt: skip
        assert len([line for line in said if f"{what} " in line and "(no such backend); the work goes on" in line]) == 1


def test_a_tracker_that_cannot_begin_costs_itself(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(TensorBoardTracker, "start", refusing(RuntimeError("no network")))
    train(cache, config(tmp_path, report_to="tensorboard", max_train_steps=1))
    assert "tensorboard could not be begun (no network); the work goes on" in caplog.text


def test_without_symbolic_links_the_result_has_copies(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "symlink", refusing(OSError(errno.EOPNOTSUPP, "Operation not supported")))
    monkeypatch.setattr(os, "chmod", refusing(OSError(errno.EPERM, "Operation not permitted")))
    train(cache, config(tmp_path, "decoder", max_train_steps=1))
    assert "takes no links: the result gets copies" in caplog.text
    assert not (tmp_path / "movq").is_symlink()
    assert (tmp_path / "movq" / "config.json").exists()
    assert (tmp_path / "model_index.json").exists()


@pytest.mark.parametrize("what", ["free", "limit", "quota"])
def test_what_the_output_folder_cannot_take_is_refused_before_the_first_step(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    if what == "free":
        monkeypatch.setattr("kcache.disk.room.free_bytes", lambda _: 100_000)
    elif what == "limit":
        monkeypatch.setattr("kcache.disk.room.resource.getrlimit", lambda _: (204_800, 204_800))
    else:
        monkeypatch.setattr("kcache.disk.room._allocate", refusing(OSError(errno.EDQUOT, "Disk quota exceeded")))
    monkeypatch.setattr(kcache.training.trainer, "take_step", refusing(AssertionError("it began")))
    with pytest.raises(CacheWriteError) as refused:
        train(cache, config(tmp_path / "run", "decoder"))
    assert {"free": "100,000 bytes free", "limit": "ulimit -f", "quota": "quota"}[what] in str(refused.value)
    assert list((tmp_path / "run").iterdir()) == []


def test_room_that_is_kept_is_nobody_elses_and_leaves_nothing(disk: Path) -> None:
    reserve = Reserve(disk, {"a": 10_000_000})
    endings.fill(disk)
    file = reserve.take("a")
    assert file is not None
    file.write(bytes(9_000_000))
    file.close()
    reserve.give_back()
    assert [path.name for path in disk.iterdir()] == [endings.FILLER]
    with pytest.raises(CacheWriteError, match="No space left on device"):
        Reserve(disk, {"a": 100_000_000})


@pytest.mark.parametrize(("umask", "mode"), [(0o002, 0o664), (0o077, 0o600)])
def test_all_files_have_the_mode_that_the_umask_gives(cache: str, tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        train(cache, config(tmp_path / "whole", max_train_steps=1, use_ema=True))
        train(cache, config(tmp_path / "adapters", max_train_steps=1, lora_rank=2, export_pipeline=True))
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*.safetensors") if not path.is_symlink()]
    assert {LORA_WEIGHTS, "optimizer.safetensors", "ema.safetensors"} <= {path.name for path in files}
    assert {oct(stat.S_IMODE(path.stat().st_mode)) for path in files} == {oct(mode)}


def test_a_checkpoint_on_the_way_that_cannot_be_written_is_said_and_the_run_goes_on(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save = kcache.training.run.save_checkpoint

    def saved(run_dir: Path, step: int, *rest: Any) -> Any:
        if step == 2:
            raise CacheWriteError("no room")
        return save(run_dir, step, *rest)

    monkeypatch.setattr(kcache.training.run, "save_checkpoint", saved)
    train(cache, config(tmp_path, checkpointing_steps=2))
    assert "NO CHECKPOINT after step 2: no room; the run goes on" in caplog.text
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == 4


def test_a_line_that_is_cut_off_by_a_full_disk_is_taken_back(disk: Path) -> None:
    from kcache.store.run_directory import append_metrics

    append_metrics(disk, [{"step": 1, "loss": 1.0}])
    endings.fill(disk)
    with pytest.raises(OSError, match="No space left"):
        append_metrics(disk, [{"step": 2, "loss": "x" * 5000}])
    (disk / endings.FILLER).unlink()
    append_metrics(disk, [{"step": 2, "loss": 2.0}])
    assert [entry["step"] for entry in read_metrics(disk)] == [1, 2]


def test_what_fails_leaves_the_last_whole_step_and_the_run_goes_on_as_if_it_had_not(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"val_fraction": 0.3, "validation_steps": 2}
    train(cache, config(tmp_path / "whole", **settings))
    count, forward = 0, PriorObjective.forward

    def forward_until_the_sixth(*given: Any) -> Any:  # the second batch of the third step
        nonlocal count
        count += 1
        if count == 6:
            raise OSError(errno.ESTALE, "Stale file handle")
        return forward(*given)

    validation = refusing(OSError(errno.ESTALE, "Stale file handle"))
    for kind, name, fails in ((PriorObjective, "forward", forward_until_the_sixth), (Validation, "totals", validation)):
        with monkeypatch.context() as patch:
            patch.setattr(kind, name, fails)
            with pytest.raises(OSError, match="Stale"):
                train(cache, config(tmp_path / name, **settings))
        checkpoint = latest_checkpoint(tmp_path / name)
        assert checkpoint is not None
        assert checkpoint.step == 2
        train(cache, config(tmp_path / name, **settings, **LATEST))
        assert_equal_weights(tmp_path / name, tmp_path / "whole", "prior")


def test_weights_that_are_not_finite_are_no_checkpoint(cache: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="finite"):
        train(cache, config(tmp_path, learning_rate=1e30, max_train_steps=12))
    assert latest_checkpoint(tmp_path) is None


def test_a_signal_breaks_off_what_only_looks(cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = Validation._batches

    def asked_to_stop(self: Validation) -> Iterator[Any]:
        os.kill(os.getpid(), signal.SIGTERM)
        yield from batches(self)

    monkeypatch.setattr(Validation, "_batches", asked_to_stop)
    with pytest.raises(SystemExit) as caught:
        train(cache, config(tmp_path, val_fraction=0.3, validation_steps=2))
    assert caught.value.code == 128 + signal.SIGTERM
    assert read_validation(tmp_path) == []
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == 2


def test_a_folder_and_a_base_that_go_away_meanwhile_do_not_cost_the_run(
    cache: str, oracle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, run_dir = shutil.copytree(oracle / "prior", tmp_path / "base"), tmp_path / "run"

    def act(_: int, name: str) -> None:
        if name == "take_step" and base.exists():
            base.rename(tmp_path / "elsewhere")
            run_dir.rename(tmp_path / "moved")

    settings = config(run_dir, pretrained_prior_model_name_or_path=str(base), checkpointing_steps=2)
    assert endings.trained(cache, settings, act) == 0
    assert f"{run_dir} was moved or removed: it is made anew" in caplog.text
    assert {"checkpoint-2", "checkpoint-4", "prior", "config.json", "model_index.json"} <= {
        path.name for path in run_dir.iterdir()
    }


def test_what_copies_cannot_be_made_of_is_found_before_the_first_step(
    cache: str, oracle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = shutil.copytree(oracle / "prior", tmp_path / "base")
    os.mkfifo(base / "scheduler" / "pipe")
    settings = {"pretrained_prior_model_name_or_path": str(base), "export_pipeline": True, "max_train_steps": 1}
    train(cache, config(tmp_path / "run", **settings))
    assert [path.name for path in (tmp_path / "run/scheduler").iterdir()] == ["scheduler_config.json"]
    (base / "scheduler" / "more.bin").symlink_to("nowhere")
    monkeypatch.setattr(kcache.training.trainer, "take_step", refusing(AssertionError("it began")))
    with pytest.raises(ModelError, match=r"more.bin cannot be read, and the result gets a copy"):
        train(cache, config(tmp_path / "next", **settings))
