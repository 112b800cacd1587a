"""What is expected of any command line: completion, examples that can be typed, hints for misspelt words, progress."""

import shlex
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from documents import arguments_of
from small_builds import copy_pictures

import kcache.build.survey
from kcache.disk.memo import DigestMemo
from kcache.sources import open_source
from kcache.upkeep.merge import merge_caches
from kcache_cli import app as cli
from kcache_cli.progress import Report, show_counts

GROUP: Any = typer.main.get_command(cli.app)
COMMANDS: dict[str, Any] = GROUP.commands


@pytest.fixture
def completions(
    kcache_command: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], list[str]]:
    """What bash is offered for the last word of a line."""

    def completions(line: str) -> list[str]:
        monkeypatch.setenv("_KCACHE_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
        kcache_command()
        return capsys.readouterr().out.split()

    return completions


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("kcache cache-b", ["cache-build"]),
        ("kcache doc", ["doctor"]),
        ("kcache cache-build photos c --form", ["--format"]),
        ("kcache cache-build photos c --format ", ["zarr", "webdataset"]),
        ("kcache cache-build photos c --stage ", ["prior", "decoder", "all"]),
        ("kcache cache-build photos c --dtype ", ["float16", "float32"]),
        ("kcache cache-convert a b --format ", ["zarr", "webdataset"]),
        ("kcache cache-convert a b --stage ", ["prior", "decoder", "all"]),
        ("kcache train-decoder c --residency ", ["auto", "gpu", "ram", "mmap", "stream"]),
        ("kcache train-prior c --mixed-precision b", ["bf16"]),
        ("kcache cache-info cach", []),  # nothing, so that bash offers files and folders
    ],
)
def test_bash_completes(completions: Callable[[str], list[str]], line: str, offered: list[str]) -> None:
    assert completions(line) == offered


def test_completion_can_be_installed(kcache_command: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert kcache_command("--help") == 0
    assert "--install-completion" in capsys.readouterr().out


def examples() -> list[tuple[str, str]]:
    """Command, and each line of its help that could be typed."""
    programs = ("kcache ", "accelerate ", "torchrun ")
    lines = [(name, line.strip()) for name, command in COMMANDS.items() for line in (command.help or "").splitlines()]
    return [(name, line) for name, line in lines if line.startswith(programs)]


def test_every_command_has_examples() -> None:
    assert {name for name, _ in examples()} == set(COMMANDS)


@pytest.mark.parametrize(("name", "line"), examples(), ids=[line for _, line in examples()])
def test_an_example_can_be_typed(name: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text('cache = "caches/photos"\noutput_dir = "runs/prior"\n')
    arguments = arguments_of(shlex.split(line.split(" | ")[0]))
    assert arguments is not None
    assert arguments[0] == name
    with GROUP.context_class(GROUP) as above, COMMANDS[name].make_context(name, arguments[1:], above):
        pass


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["cahce-build", "a", "b"], "Did you mean 'cache-build'?"),
        (["build", "a", "b"], "Did you mean 'cache-build'?"),
        (["cache-build", "a", "b", "--resoluton", "64"], "--resolution"),
        (["train-prior", "c", "--output-dir", "r", "--lerning_rate", "3"], "--learning-rate"),
        (["cache-convert", "a", "b", "--format", "tar"], "'zarr', 'webdataset'"),
    ],
)
def test_what_is_misspelt_is_answered_with_what_is_near(
    kcache_command: Callable[..., int], capsys: pytest.CaptureFixture[str], arguments: list[str], hint: str
) -> None:
    assert kcache_command(*arguments) == 2
    assert hint in capsys.readouterr().err


def test_counts_are_shown_with_their_rate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter([10.0, 12.0, 13.0, 14.0])
    monkeypatch.setattr("kcache_cli.progress.time.monotonic", lambda: next(clock))
    shown: list[tuple[Any, ...]] = []
    report = Report()
    monkeypatch.setattr(report, "show", lambda *arguments: shown.append(arguments))
    show = show_counts(report, "written")
    show("text", 8, 8)
    show("latents-64", 5, 10)
    show("latents-64", 10, 10)
    assert shown == [
        ("text", 8, 8, "written, 4/s"),
        ("latents-64", 5, 10, "written, 5/s, 1.0 s left"),
        ("latents-64", 10, 10, "written, 5/s"),
    ]


def test_merging_counts_its_shards(cache: str, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    merge_caches(tmp_path / "all", [cache, cache], report=lambda *progress: told.append(progress))
    assert [done for name, done, _ in told if name == "text"] == [0, 1, 2]


def test_looking_through_many_images_is_reported(oracle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kcache.build.survey, "_REPORT_SECONDS", 0.0)
    source, said = open_source(str(copy_pictures(oracle, tmp_path / "pictures", 3))), list[str]()
    with DigestMemo(tmp_path / "memo") as memo:
        list(kcache.build.survey._offered(source, memo, False, said.append, array("q"), []))
    assert [line.split(" images")[0] for line in said] == [f"looked through {i} of 3" for i in range(3)]
