"""A checkpoint gives back what was saved, or says that it cannot; it is never half of one."""

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from kcache.disk import durable
from kcache.errors import CacheWriteError, RunError
from kcache.store import checkpoint
from kcache.store.checkpoint import checkpoint_steps, latest_checkpoint, open_checkpoint, save_checkpoint

STATE = {"loader": {"epoch": 3, "samples_consumed": 8}, "lr": 0.1}


FILES = ["state.json", "optimizer.safetensors", "prior/config.json", "prior/diffusion_pytorch_model.safetensors"]


def save(run_dir: Path, step: int, content: bytes = b"weights", total_limit: int | None = None) -> Path:
    def write(folder: Path) -> None:
        for name in FILES[1:]:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content + name.encode() * 20)

    return save_checkpoint(run_dir, step, write, STATE, total_limit)


def test_state_comes_back(tmp_path: Path) -> None:
    opened = open_checkpoint(save(tmp_path, 12))
    assert (opened.path, opened.step, opened.state) == (tmp_path / "checkpoint-12", 12, STATE)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "emptied", "cut", "changed", "unreadable"])
def test_a_damaged_file_is_refused_and_latest_takes_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: str
) -> None:
    save(tmp_path, 5)
    file = save(tmp_path, 10) / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "unreadable":
        file.unlink()
        file.symlink_to(file.name)
    elif damage == "changed":
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        file.write_bytes(b"" if damage == "emptied" else content[:-7])

    with pytest.raises(RunError, match="checkpoint-10"):
        open_checkpoint(tmp_path / "checkpoint-10")
    with caplog.at_level(logging.WARNING):
        latest = latest_checkpoint(tmp_path)
    assert latest is not None
    assert latest.step == 5
    assert "checkpoint-10" in caplog.text


def test_latest_refuses_to_start_anew_when_every_checkpoint_is_broken(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    (save(tmp_path, 5) / "optimizer.safetensors").unlink()
    with pytest.raises(RunError, match="all 1 checkpoints"):
        latest_checkpoint(tmp_path)


def test_the_oldest_go_only_when_the_new_one_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2, total_limit=2)

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_file", full_disk)
        with pytest.raises(CacheWriteError, match="No space"):
            save(tmp_path, 3, total_limit=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]
    save(tmp_path, 10, total_limit=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-2"]


def test_an_older_one_that_cannot_be_removed_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        save(tmp_path, step)

    def in_use(path: Path) -> None:
        raise OSError(39, "Directory not empty", str(path))

    monkeypatch.setattr(durable, "_delete", in_use)
    save(tmp_path, 2, b"later weights")
    save(tmp_path, 3, total_limit=1)
    durable.remove_temporary(tmp_path)
    latest = latest_checkpoint(tmp_path)
    assert latest is not None
    assert (latest.step, checkpoint_steps(tmp_path)) == (3, [3])
    assert "checkpoint-1 could not be removed" in caplog.text


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 4)
    path = save(tmp_path, 4, content=b"later weights")
    assert checkpoint_steps(tmp_path) == [4]
    open_checkpoint(path)
    assert (path / FILES[1]).read_bytes().startswith(b"later weights")


def test_the_newest_is_found_by_number(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        save(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    assert checkpoint_steps(tmp_path) == [9, 10, 100]


def test_what_is_no_checkpoint_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a checkpoint"):
        open_checkpoint(tmp_path / "checkpoint-7")
    path = save(tmp_path, 1)
    shutil.move(path / "state.json", tmp_path / "state.json")
    (path / "state.json").write_text('{"digest": "", "version": 99}')
    with pytest.raises(RunError, match=r"version 99.*version 1"):
        open_checkpoint(path)
