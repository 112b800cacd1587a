"""The command line: flags become settings, errors become exit codes, data goes to stdout."""

import dataclasses
import io
import json
import re
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

import kcache.build.build
from kcache.build.build import BuildResult, TableResult
from kcache.build.work.progress import BuildProgress
from kcache.config import BuildConfig, TrainConfig
from kcache.demo.digits import write_digits
from kcache.demo.tiny import demo_models
from kcache.errors import CacheCorruptError, CacheNotFoundError, ConfigError
from kcache.store.likeness.duplicates import DUPLICATE
from kcache.tally import counted
from kcache.training.log import Progress as TrainProgress
from kcache.upkeep.verify import VerifyProgress
from kcache_cli import app as cli
from kcache_cli.flags import check_folder
from kcache_cli.progress import Report, bytes_text, duration_text, rate_text, show_build, show_training
from kcache_cli.sample import file_name
from kcache_cli.verify import show_verify

COMMANDS = (
    "cache-build", "cache-info", "cache-duplicates", "cache-verify", "cache-convert", "cache-merge", "cache-gc",
    "train-prior", "train-decoder", "sample", "report", "demo",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Ran:
    """What one run of the command left: exit status and the two streams."""

    status: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the `kcache` command in this process."""
    monkeypatch.delenv("KCACHE_DEBUG", raising=False)

    def command(*arguments: str) -> Ran:
        monkeypatch.setattr(sys, "argv", ["kcache", *arguments])
        with pytest.raises(SystemExit) as exited:
            cli.main()
        captured = capsys.readouterr()
        return Ran(exited.value.code or 0, captured.out, captured.err)  # type: ignore[arg-type]

    return command


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with four pictures (pictures/) and the demo's networks (models/)."""
    folder = tmp_path_factory.mktemp("inputs")
    write_digits(folder / "pictures", 4)
    demo_models(folder / "models")
    return folder


def build_arguments(inputs: Path, cache: Path) -> list[str]:
    models = inputs / "models"
    return [
        "cache-build",
        str(inputs / "pictures"),
        str(cache),
        f"--pretrained-prior-model-name-or-path={models / 'kandinsky-2-2-prior'}",
        f"--pretrained_decoder_model_name_or_path={models / 'kandinsky-2-2-decoder'}",
        "--resolution=32",
        "--batch-size=4",
        "--device=cpu",
    ]


def result_of(rejected: int = 0, encoded: int = 4) -> BuildResult:
    seconds = {"decode": 0.5, "encode": 4.0, "write": 0.5, "held_up": 0.005}
    tables = {"text": TableResult(encoded=encoded, present=2, bytes=1_500, seconds=seconds)}
    return BuildResult(cache="c", samples=4, rejected=rejected, tables=tables, seconds=1.0, notes=("a note",))


def test_underscores_in_flags_become_dashes_and_values_stay() -> None:
    given = ["train-prior", "my_cache", "--train_batch_size=4", "--online", "a_b", "--x=a_b", "--", "--a_b"]
    assert cli.dashed(given) == [
        "train-prior", "my_cache", "--train-batch-size=4", "--online", "a_b", "--x=a_b", "--", "--a_b"
    ]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_examples(command: str) -> None:
    result = CliRunner().invoke(cli.app, [command, "--help"])
    assert result.exit_code == 0
    assert f"Examples:\n    kcache {command}" in result.stdout


def test_every_setting_is_a_flag() -> None:
    train_fields = {field.name for field in dataclasses.fields(TrainConfig)} - {"stage"}
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    flags = {name: {option.name: option for option in command.params} for name, command in commands.items()}
    given = {"source", "cache", "config", "sweep", "dry_run", "device_memory", "strict", "as_json"}
    of_prior = {"caption_dropout", "packing", "noise_draws", "class_prompt", "num_class_rows", "prior_loss_weight"}
    of_decoder = {"aspect_ratio_buckets", "resolution", "image_dropout", "inpaint", "mask_growth", "hole_loss"}
    of_decoder |= {"hint", "loss_mask", "mask_share"}
    assert set(flags["cache-build"]) - given == {field.name for field in dataclasses.fields(BuildConfig)}
    assert set(flags["train-decoder"]) - given == train_fields - of_prior
    assert set(flags["train-prior"]) - given == train_fields - of_decoder
    assert flags["train-prior"]["seed"].help == "Decides order, captions, noise and timesteps."
    assert flags["cache-duplicates"]["cosine"].default == DUPLICATE


def test_flags_reach_the_build(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def build(source: str, cache: str, config: BuildConfig, **_: Any) -> BuildResult:
        calls.append((source, cache, config))
        return result_of()

    monkeypatch.setattr(kcache.build.build, "build_cache", build)
    ran = run(
        "cache-build", "s", "c", "--resolution", "512", "--resolution", "768", "--max_train_samples=3", "--rehash"
    )
    assert ran.status == 0
    assert calls == [("s", "c", BuildConfig(resolution=(512, 768), max_train_samples=3, rehash=True))]


def test_build_then_nothing_to_do_then_info(run: Any, inputs: Path, tmp_path: Path) -> None:
    arguments = build_arguments(inputs, tmp_path / "cache")
    first, second = run(*arguments), run(*arguments)
    assert first.status == second.status == 0
    assert "latents-32: 4 encoded, 0 present before" in first.out
    assert "0 to do" in second.out
    assert "0 to do" not in first.out

    about = json.loads(run("cache-info", str(tmp_path / "cache"), "--json").out)
    assert about["samples"] == 4
    assert set(about["tables"]) == {"image_embeds", "text", "latents-32"}
    assert about["bytes"] == sum(table["bytes"] for table in about["tables"].values())
    assert "latents (4, 8, 8) float16" in run("cache-info", str(tmp_path / "cache")).out


def test_rejected_inputs_are_named(run: Any, inputs: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    write_digits(pictures, 2)
    (pictures / "0001.png").write_bytes(b"not a picture")
    arguments = build_arguments(inputs, tmp_path / "cache")
    arguments[1] = str(pictures)
    assert run(*arguments, "--strict").status == 3
    assert "0001.png: decode: " in run("cache-info", str(tmp_path / "cache")).out


def test_dry_run_writes_nothing(run: Any, inputs: Path, tmp_path: Path) -> None:
    ran = run(*build_arguments(inputs, tmp_path / "cache"), "--dry-run")
    assert "latents-32: 4 rows to encode (the table is new: 4 images)" in ran.out
    assert "decoder: saves " in ran.out
    assert not (tmp_path / "cache").exists()


def test_caches_are_converted_merged_and_cleaned(run: Any, inputs: Path, tmp_path: Path) -> None:
    cache, tars, merged = (str(tmp_path / name) for name in ("cache", "tars", "merged"))
    run(*build_arguments(inputs, tmp_path / "cache"))
    assert run("cache-convert", cache, tars, "--format", "webdataset").out.startswith(f"{tars}: 4 samples")
    assert json.loads(run("cache-merge", merged, cache, cache, "--json").out)["samples"] == 4
    counted = run(
        "cache-merge", str(tmp_path / "counted"), cache, "--weight", f"{cache}=0.5", "--repeats", f"{cache}=3"
    )
    assert counted.status == 0
    said = run("cache-info", str(tmp_path / "counted")).out
    assert "  12 turns an epoch: a sample comes 3 times\n  weights of samples: 0.5 to 0.5, mean 0.5\n" in said
    assert "turns" not in run("cache-info", cache).out
    for wrong, told in {
        "elsewhere=2": "names none of the caches", f"{cache}=0.5": "has no such number; expected a whole number",
        cache: "names none", f"{cache}=0": "repeats of a cache are 0",
    }.items():  # fmt: skip
        assert told in run("cache-merge", str(tmp_path / "new"), cache, f"--repeats={wrong}").err
    (tmp_path / "merged" / ".tmp-1-dead").write_bytes(b"half a file")
    assert "1 path would be removed" in run("cache-gc", merged, "--dry-run").out
    assert json.loads(run("cache-gc", merged, "--json").out)["paths"] == [".tmp-1-dead"]
    for flag in ("--format=tar", "--stage=both", "--resolution=0"):
        assert run("cache-convert", cache, str(tmp_path / "new"), "--format=zarr", flag).status == 2
    decoder = ("cache-convert", cache, str(tmp_path / "decoder"), "--format=zarr", "--stage=decoder")
    assert run(*decoder, "--resolution=32", "--worker=1/2", "--take-over").status == 0
    assert set(json.loads(run("cache-info", str(tmp_path / "decoder"), "--json").out)["tables"]) == {
        "image_embeds",
        "latents-32",
    }
    assert "--resolution 64 asks for latents" in run(*decoder, "--resolution=64").err
    assert "--worker is '2/2'" in run(*decoder, "--worker=2/2").err
    assert run("cache-merge", str(tmp_path / "new"), cache, tars).status == 1


def test_another_recipe_is_said_once_and_before_the_work(run: Any, inputs: Path, tmp_path: Path) -> None:
    arguments = build_arguments(inputs, tmp_path / "cache")
    run(*arguments)
    said = run(*arguments, "--dtype", "float32").err
    notes = ["imagefolder: 4 images", *(f"{name} in the cache is of another recipe" for name in ("latents-32", "text"))]
    assert [said.count(note) for note in notes] == [1, 1, 1]
    assert max(map(said.index, notes)) < said.index("loading ")
    planned = run(*arguments, "--dtype", "float32", "--alpha", "drop", "--dry-run")
    assert (planned.out + planned.err).count("preprocess.alpha: white → drop") == 2


def test_a_rehearsed_compaction_says_what_it_would_free(run: Any, inputs: Path, tmp_path: Path) -> None:
    pictures, cache = tmp_path / "pictures", str(tmp_path / "cache")
    write_digits(pictures, 2)
    arguments = build_arguments(inputs, tmp_path / "cache")
    arguments[1] = str(pictures)
    run(*arguments, "--stage", "decoder")
    (pictures / "0001.png").write_bytes((pictures / "0000.png").read_bytes())
    run(*arguments, "--stage", "decoder")
    planned = run("cache-gc", cache, "--compact", "--dry-run").out
    assert "0 paths would be removed" in planned
    assert "would be freed by writing shards again without their unused rows" in planned
    assert "0 paths removed" not in run("cache-gc", cache, "--compact").out


def test_errors_are_one_message_and_an_exit_code(run: Any, tmp_path: Path) -> None:
    ran = run("cache-info", str(tmp_path / "nothing"))
    assert ran.status == 1
    assert ran.out == ""
    assert ran.err.startswith("kcache: ")
    assert "Traceback" not in ran.err


def test_debug_shows_the_traceback(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KCACHE_DEBUG", "1")
    ran = run("cache-info", str(tmp_path / "nothing"))
    assert ran.status == 1
    assert "Traceback" in ran.err
    assert CacheNotFoundError.__name__ in ran.err


@pytest.mark.parametrize(
    ("error", "status"), [(CacheCorruptError("cut off"), 4), (OSError(28, "No space left on device", "c/x"), 1)]
)
def test_errors_have_their_own_status(run: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int) -> None:
    def build(*arguments: Any, **settings: Any) -> None:
        raise error

    monkeypatch.setattr(kcache.build.build, "build_cache", build)
    assert run("cache-build", "s", "c").status == status


@pytest.mark.parametrize(
    "arguments",
    [("cache-build", "s", "c", "--no-such-flag"), ("cache-build", "s"), ("cache-build", "s", "c", "--stage=x")],
)
def test_wrong_usage_is_two(run: Any, arguments: tuple[str, ...]) -> None:
    assert run(*arguments).status == 2


def test_settings_that_contradict_are_refused(run: Any) -> None:
    ran = run("cache-build", "s", "c", "--batch-size", "0")
    assert ran.status == 1
    assert "--batch-size is 0; expected 1 or more" in ran.err


def test_a_folder_that_takes_no_files_is_refused_first(run: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for command in (("sample", "a fox", "--prior=nowhere", "--output-dir"), ("demo", "--output")):
        for folder, said in (("file", "is a file"), ("file/x", "is a file")):
            ran = run(*command, str(tmp_path / folder))
            assert ran.status == 1
            assert f"kcache: {command[-1]} is {tmp_path / folder}, but {tmp_path / 'file'} {said}" in ran.err
    check_folder("--output", tmp_path / "new" / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_where_the_system_refuses_files_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(**settings: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(ConfigError, match=rf"--output is {tmp_path}/x, but .* into {tmp_path} \(Permission denied\)"):
        check_folder("--output", tmp_path / "x")


def test_strict_prints_the_result_before_it_exits_with_three(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kcache.build.build, "build_cache", lambda *_, **__: result_of(rejected=2))
    ran = run("cache-build", "s", "c", "--strict", "--json")
    assert ran.status == 3
    assert json.loads(ran.out)["rejected"] == 2
    assert json.loads(ran.out)["tables"]["text"]["seconds"]["held_up"] == 0.005
    ran = run("cache-build", "s", "c")
    assert ran.status == 0
    shares = "80% of the time encoding, 10% waiting for decoded inputs (0.1% with enough for a batch at hand)"
    assert f"text: {shares}, 10% writing" in ran.out


def test_without_a_terminal_progress_is_plain_lines_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with Report() as report:
        for done in range(1, 1001):
            progress = BuildProgress(table="text", done=done, total=1000, seconds=done / 500, busy={"encode": 0.9})
            show_build(report, progress)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "text: 1 of 1,000, 500 rows/s (encode 90%), 2.0 s left",
        "text: 1,000 of 1,000, 500 rows/s (encode 90%)",
    ]


def test_a_small_cache_is_not_verified_as_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Report() as report:
        show_verify(report, VerifyProgress(done=34_842, total=34_800, seconds=0.5))
    assert capsys.readouterr().err == "verify: 35 of 35 kB, 69.7 kB/s\n"


def test_all_that_takes_long_says_what_time_is_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("kcache_cli.progress.time.monotonic", lambda: now[0])
    with Report() as report:
        show_build(report, BuildProgress(table="text", done=2, total=8, seconds=100.0, busy={}, who="2 actors"))
        now[0] = 100.0
        show_verify(report, VerifyProgress(done=10**9, total=3 * 10**9, seconds=10.0))
        for step in (10, 11):
            now[0] += 200.0
            told = TrainProgress(step=step, max_steps=12, loss=1.0, lr=1e-4, samples_per_second=0.25, waits={})
            show_training(report, "prior", told)
    assert capsys.readouterr().err.splitlines() == [
        "text: 2 of 8, 50.0 s/row, 5 min 00 s left, by 2 actors",
        "verify: 1,000 of 3,000 MB, 100.0 MB/s, 20.0 s left",
        "prior: 10 of 12, loss 1.0000, lr 1.0e-04, 4.0 s/sample",
        "prior: 11 of 12, loss 1.0000, lr 1.0e-04, 4.0 s/sample, 3 min 20 s/step, 3 min 20 s left",
    ]


def test_on_a_terminal_the_same_is_beside_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kcache_cli.progress.Console", partial(Console, force_terminal=True, width=200))
    shown = io.StringIO()
    monkeypatch.setattr("sys.stderr", shown)
    with Report() as report:
        show_verify(report, VerifyProgress(done=10**9, total=3 * 10**9, seconds=10.0))
    text = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", shown.getvalue())
    assert re.search(r"1,000/3,000 MB.*100\.0 MB/s, 20\.0 s left", text)


def test_numbers_for_people() -> None:
    assert [rate_text(rate, "row") for rate in (0.0, 0.005, 0.0813, 0.999, 1.0, 12.34, 1234.5)] == [
        "0 rows/s", "3 min 20 s/row", "12.3 s/row", "1.0 s/row", "1 rows/s", "12.3 rows/s", "1,234 rows/s",
    ]  # fmt: skip
    assert [bytes_text(count) for count in (999, 25_100_000, 3_000_000_000_000)] == ["999 B", "25.1 MB", "3.0 TB"]
    assert [counted(count, "row") for count in (0, 1, 1797)] == ["0 rows", "1 row", "1,797 rows"]
    assert [duration_text(seconds) for seconds in (0.42, 60, 200, 7500)] == [
        "0.4 s",
        "1 min 00 s",
        "3 min 20 s",
        "2 h 05 min",
    ]


@pytest.mark.parametrize(("prompt", "name"), [("A Red/Fox..", "0007-a-red-fox.png"), ("狐", "0007-picture.png")])
def test_pictures_are_named_after_prompts(prompt: str, name: str) -> None:
    assert file_name(7, prompt) == name
