"""What a run directory says is read as far as it can be read, and never keeps a run from going on."""

import json
from pathlib import Path
from typing import Any

import pytest

from kcache.config import TrainConfig
from kcache.store.run_directory import (
    METRICS_FILE,
    STARTS_FILE,
    VALIDATION_FILE,
    append_metrics,
    instead_of_pipeline,
    new_order_of,
    read_metrics,
    read_starts,
    read_validation,
    start_run,
)

STEPS = [{"step": step, "loss": 1.0 / step} for step in range(1, 5)]


def config(folder: Path, **settings: Any) -> TrainConfig:
    return TrainConfig(stage="prior", output_dir=str(folder), **settings)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run that was killed after four steps."""
    start_run(config(tmp_path), {}, 0)
    append_metrics(tmp_path, STEPS)
    return tmp_path


LINES = [json.dumps(entry) + "\n" for entry in STEPS]
DAMAGES: list[tuple[str, int, str | None]] = [
    ("".join(LINES) + "\0" * 512, 4, "1 of 5 lines cannot be read"),
    (LINES[0] + "\0" * 512 + "\n" + "".join(LINES[1:]), 4, "1 of 5 lines cannot be read"),
    ("".join(LINES) + '{"step": 5, "lo', 4, None),
    ("".join(LINES).removesuffix("\n"), 4, None),
    ("\n".join(LINES).replace("\n", "\r\n"), 4, None),
    (LINES[0] + 'null\n3\n"a"\n[]\n{}\n' + "".join(LINES[1:]), 4, "5 of 9 lines cannot be read"),
    (LINES[0] + '{"step": true, "loss": 1}\n{"step": 2.5, "loss": 1}\n', 1, "2 of 3 lines cannot be read"),
    (LINES[0] + '{"step": 2, "loss": "1"}\n{"loss": 1}\n', 1, "2 of 3 lines cannot be read"),
    ("".join(reversed(LINES)), 4, None),
    (LINES[1] + "".join(LINES), 4, "1 of steps that come again"),
    ("", 0, None),
]


@pytest.mark.parametrize(("text", "left", "said"), DAMAGES)
def test_a_run_goes_on_whatever_its_log_is(
    run_dir: Path, text: str, left: int, said: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    log = run_dir / METRICS_FILE
    log.write_text(text, newline="")
    assert read_metrics(run_dir) == read_metrics(run_dir) == STEPS[:left]
    assert [record.getMessage() for record in caplog.records] == ([f"{log}: {said}: left out"] if said else [])
    caplog.clear()
    start_run(config(run_dir, resume_from_checkpoint="checkpoint-3"), {}, 3)
    assert read_metrics(run_dir) == STEPS[: min(3, left)]
    aside = run_dir / f"{METRICS_FILE}.damaged"
    if said is None:
        assert not aside.exists()
        return
    assert aside.read_text() == text
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == f"{log}: {said}; the run goes on, and they stay in {aside.name}"
    start_run(config(run_dir, resume_from_checkpoint="checkpoint-3"), {}, 3)
    assert aside.exists()


@pytest.mark.parametrize("name", [METRICS_FILE, VALIDATION_FILE, STARTS_FILE, "config.json"])
@pytest.mark.parametrize("what", ["bytes", "folder", "link", "unreadable"])
def test_a_file_of_a_run_may_be_anything(
    run_dir: Path, name: str, what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = run_dir / name
    if path.exists():
        path.unlink()
    if what == "folder":
        path.mkdir()
        (path / "mine").touch()
    elif what == "link":
        path.symlink_to(run_dir / "gone")
    else:
        path.write_bytes(b"\xff\xfe\n")
    if what == "unreadable":
        read = Path.read_bytes

        def refuse(self: Path) -> bytes:
            if self == path:
                raise PermissionError(13, "Permission denied", str(self))
            return read(self)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", refuse)
            start_run(config(run_dir, resume_from_checkpoint="latest"), {}, 2)
    else:
        start_run(config(run_dir, resume_from_checkpoint="latest"), {}, 2)
    assert path.is_file()
    assert not path.is_symlink()
    assert len(caplog.records) == (name != "config.json" or what in ("folder", "link"))
    if what == "folder":
        assert (run_dir / f"{name}.damaged" / "mine").exists()
    assert json.loads((run_dir / "config.json").read_bytes())["config"]["stage"] == "prior"
    assert read_starts(run_dir)[-1]["step"] == 2
    assert read_validation(run_dir) == []


def test_what_is_set_aside_twice_is_kept_twice(run_dir: Path) -> None:
    for text in ("one\n", "two\n"):
        (run_dir / METRICS_FILE).write_text(text)
        start_run(config(run_dir), {}, 0)
    names = sorted(path.name for path in run_dir.glob("*.damaged*"))
    assert [(run_dir / name).read_text() for name in names] == ["one\n", "two\n"]


def test_a_start_says_of_a_new_order(run_dir: Path) -> None:
    start_run(config(run_dir), {}, 2, {"new_order": {"samples": 12, "before": 10}})
    assert [new_order_of(start) for start in read_starts(run_dir)] == [
        None,
        "in a new order of 12 samples, where there were 10",
    ]


def test_what_is_no_pipeline_is_said(run_dir: Path, tmp_path: Path) -> None:
    (run_dir / "unet").mkdir()
    (run_dir / "movq").symlink_to(tmp_path / "base" / "movq")
    said = instead_of_pipeline(run_dir, [run_dir / "movq" / "config.json"])
    assert said is not None
    assert f"movq is a link to {tmp_path / 'base' / 'movq'}, which is not there any more" in said
    assert "--resume-from-checkpoint latest --pretrained-decoder-model-name-or-path FOLDER" in said
    snapshot = tmp_path / "snapshot" / "prior"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").symlink_to("../blobs/abc")
    said = instead_of_pipeline(snapshot.parent, [snapshot / "config.json"])
    assert said is not None
    assert "prior/config.json is a link to ../blobs/abc, which is not there any more" in said
    assert instead_of_pipeline(tmp_path, [tmp_path / "movq2" / "config.json"]) is None


def test_what_cannot_be_written_of_a_run_is_said_and_the_run_goes_on(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def immutable(self: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted", str(target))

    monkeypatch.setattr(Path, "rename", immutable)
    start_run(config(run_dir), {}, 2)
    said = [record.getMessage().partition(" could not be written")[0] for record in caplog.records]
    assert said == [str(run_dir / name) for name in (METRICS_FILE, VALIDATION_FILE, STARTS_FILE, "config.json")]
