"""The trainers' flags: those of diffusers' scripts mean what they meant, files of flags, sweeps."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from upstream_flags import CACHE_DECIDES, UPSTREAM

import kcache.training.sweep
import kcache.training.trainer
import kcache_cli.train
from kcache.config import TrainConfig
from kcache.errors import ConfigError
from kcache_cli import app as cli
from kcache_cli.upstream_flags import translated

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the `kcache` command in this process: exit status, stdout and stderr."""
    monkeypatch.delenv("KCACHE_DEBUG", raising=False)

    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kcache", *arguments])
        with pytest.raises(SystemExit) as exited:
            cli.main()
        captured = capsys.readouterr()
        return int(exited.value.code or 0), captured.out, captured.err

    return command


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, TrainConfig]]:
    """What the trainer is called with, instead of training."""
    calls = []

    def train(cache: str, config: TrainConfig, *, report: Any) -> kcache.training.trainer.TrainResult:
        calls.append((cache, config))
        return kcache.training.trainer.TrainResult(
            output_dir="r", step=2, loss=0.5, seconds=1.0, samples_per_second=4.0
        )

    monkeypatch.setattr(kcache.training.trainer, "train", train)
    monkeypatch.setattr(kcache_cli.train, "_check_cache", lambda _: None)
    return calls


@pytest.mark.parametrize("cache", ["none", "memory://none/c"])
def test_a_cache_that_is_not_there_is_said_before_torch_is_loaded(
    run: Run, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    monkeypatch.setitem(sys.modules, "kcache.training.trainer", None)
    status, _, err = run("train-prior", cache, "--output-dir=r")
    assert (status, "is not a finished cache" in err) == (1, True), err


STREAM = ["--output-dir=r", "--shuffle=stream", "--residency=stream"]


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_too_small_a_stage_is_said_before_torch_is_loaded(cache: str, stage: str) -> None:
    said = "import sys\nfrom kcache_cli import app\nsys.argv[0] = 'kcache'\ntry:\n    app.main()\nfinally:\n"
    said += "    print('torch' in sys.modules)"
    command = [sys.executable, "-c", said, f"train-{stage}", cache, *STREAM, "--stage-bytes=1000"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (1, "False\n"), ran.stderr
    assert "--stage-bytes is 1,000 bytes; expected at least" in ran.stderr


def test_only_what_is_sure_is_said_of_a_stage(run: Run, calls: list[Any], cache: str, monkeypatch: Any) -> None:
    [status, _, err] = run("train-prior", cache, *STREAM, "--stage-bytes=100000000")
    assert status == 0, err
    for more in (["--where=width > 1"], ["--val-fraction=0.5"]):
        assert run("train-prior", cache, *STREAM, "--stage-bytes=1000", *more)[0] == 0
    assert len(calls) == 3


def test_the_scripts_have_47_flags() -> None:
    assert len(UPSTREAM) == 47


@pytest.mark.parametrize("dashes", [False, True])
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("name", UPSTREAM)
def test_flags_of_the_scripts_are_taken_or_answered(
    run: Run, calls: list[tuple[str, TrainConfig]], name: str, joined: bool, dashes: bool
) -> None:
    values, outcome = UPSTREAM[name]
    flag = "--" + (name.replace("_", "-") if dashes else name)
    given = [f"{flag}={values[0]}"] if joined and values else [flag, *values]
    status, out, err = run("train-decoder", "c", "--output_dir=r", *given)
    if isinstance(outcome, str):
        assert (status, calls) == (1, [])
        assert outcome in err
        assert "hf_secret" not in out + err
    else:
        settings: dict[str, Any] = {"stage": "decoder", "output_dir": "r"} | outcome
        assert calls == [("c", TrainConfig(**settings))]
        assert (status, json.loads(out)["step"]) == (0, 2)


def test_of_several_processes_the_first_prints_the_result(
    run: Run, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run("train-prior", "c", "--output-dir=r") == (0, "", "")
    assert len(calls) == 1


def test_the_prior_has_no_resolution(run: Run) -> None:
    status, _, err = run("train-prior", "c", "--output-dir=r", "--resolution", "768")
    assert status == 1
    assert "kcache train-decoder CACHE --output-dir RUN --resolution 768" in err


def test_the_decoder_has_no_class_prompt(run: Run) -> None:
    status, _, err = run("train-decoder", "c", "--output-dir=r", "--class_prompt", "a fox")
    assert status == 1
    assert "kcache sample PROMPT PROMPT --output-dir CLASS" in err


def test_what_follows_two_dashes_is_no_flag() -> None:
    assert translated(["train-prior", "--rank=4", "--", "--rank"]) == ["train-prior", "--lora-rank=4", "--", "--rank"]
    assert translated(["sample", "--rank"]) == ["sample", "--rank"]


def test_flags_that_repeat_make_one_setting(run: Run, calls: list[tuple[str, TrainConfig]]) -> None:
    prompts = ["--validation-prompts", "a fox", "--validation_prompts=an owl"]
    run("train-prior", "c", "--output-dir=r", *prompts, "--lora-rank=2", "--lora-target-modules", "to_q")
    assert calls[0][1].validation_prompts == ("a fox", "an owl")
    assert calls[0][1].lora_target_modules == ("to_q",)


@pytest.mark.parametrize(
    "arguments", [["c", "--validation_prompts", "a", "b"], ["--validation-prompts", "a", "b", "c"]]
)
def test_several_values_after_one_flag_are_answered(run: Run, arguments: list[str]) -> None:
    status, _, err = run("train-prior", "--output-dir=r", *arguments)
    assert status == 2
    assert "repeat it" in err


def test_a_file_gives_flags_and_the_command_line_wins(
    run: Run, calls: list[tuple[str, TrainConfig]], tmp_path: Path
) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        'cache = "c"\noutput_dir = "r"\nlearning-rate = 1\nseed = 3\nuse_ema = true\nallow_tf32 = true\n'
        'validation_prompts = ["a fox", "an owl"]\nmixed_precision = "bf16"\nresolution = 512\n'
    )
    run("train-decoder", "--config", str(path))
    run(
        "train-decoder",
        "other",
        "--seed=4",
        "--resolution=512",
        "--resolution=768",
        "--no-flip",
        "--no-use-ema",
        "--validation-prompts=a cat",
        f"--config={path}",
    )
    given: dict[str, Any] = {"stage": "decoder", "output_dir": "r", "learning_rate": 1.0, "mixed_precision": "bf16"}
    given["allow_tf32"] = True
    assert calls == [
        ("c", TrainConfig(**given, seed=3, use_ema=True, validation_prompts=("a fox", "an owl"), resolution=(512,))),
        (
            "other",
            TrainConfig(
                **given, seed=4, use_ema=False, validation_prompts=("a cat",), resolution=(512, 768), flip=False
            ),
        ),
    ]
    assert isinstance(calls[0][1].learning_rate, float)


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("learning_rat = 1", "'learning_rat' is no setting; expected the name of a flag, perhaps learning_rate"),
        ("stage = 'prior'", "'stage' is no setting"),
        ("resolution = 512", "the prior learns image embeddings"),
        ("image_dropout = 0.1", "'image_dropout' is no setting"),
        ("[adam]\nbeta1 = 0.8", "'adam' is no setting"),
        ("seed = 1.5", "seed is 1.5; expected a whole number"),
        ("seed = true", "seed is True; expected a whole number"),
        ("learning_rate = '1e-5'", "learning_rate is '1e-5'; expected a number"),
        ("use_ema = 1", "use_ema is 1; expected true or false"),
        ("attention = 'flash'", 'attention is \'flash\'; expected one of "sdpa", "xformers"'),
        ("validation_prompts = 'a fox'", "expected a list, each item a string"),
        ("where = ['width > 1']", "expected a string"),
        ("cache = 3", "cache is 3; expected a string"),
        ("max_grad_norm = 1\nmax-grad-norm = 2", "max_grad_norm is given twice"),
        ("rank = 4", "write lora-rank"),
        ("hub_token = 'hf_secret'", "hf auth login"),
        ("train_data_dir = 'photos'", CACHE_DECIDES),
        ("seed = 1\nuse_ema = yes", "(at line 2, column 11)"),
    ],
)
def test_files_of_flags_are_read_strictly(run: Run, tmp_path: Path, line: str, answer: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(line)
    status, out, err = run("train-prior", "c", "--output-dir=r", "--config", str(path))
    assert (status, out) == (1, "")
    assert str(path) in err
    assert answer in err
    assert "hf_secret" not in err


def test_a_file_that_is_not_there_is_named(run: Run, tmp_path: Path) -> None:
    status, _, err = run("train-prior", "--config", str(tmp_path / "none.toml"))
    assert status == 1
    assert "none.toml cannot be read (No such file or directory)" in err


def test_without_a_cache_or_an_output_dir_nothing_is_trained(run: Run, calls: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('cache = "c"')
    assert run("train-prior", "--output-dir=r")[0] == run("train-prior", "--config", str(path))[0] == 2
    assert calls == []


@pytest.mark.parametrize("failed", [False, True])
def test_a_sweep_is_handed_on_and_its_comparison_printed(
    run: Run, monkeypatch: pytest.MonkeyPatch, failed: bool
) -> None:
    def run_sweep(
        cache: str, config: TrainConfig, sweep: Path, *, report: Any, say: Any
    ) -> kcache.training.sweep.SweepResult:
        assert (cache, config.output_dir, config.stage, sweep) == ("c", "r", "decoder", Path("s.toml"))
        say("slow: trained before")
        outcome = kcache.training.sweep.SweptRun(name="slow", settings={"seed": 1}, error="no room" if failed else None)
        return kcache.training.sweep.SweepResult(runs=(outcome,), table="| run | loss |")

    monkeypatch.setattr(kcache.training.sweep, "run_sweep", run_sweep)
    monkeypatch.setattr(kcache_cli.train, "_check_cache", lambda _: None)
    status, out, err = run("train-decoder", "c", "--output-dir=r", "--sweep", "s.toml")
    assert status == (1 if failed else 0)
    assert out == "| run | loss |\n"
    assert "slow: trained before" in err
    assert ("1 of 1 run failed: slow" in err) is failed


def test_a_choice_that_is_none_is_answered_in_one_sentence(run: Run) -> None:
    status, _, err = run("train-prior", "c", "--output-dir=r", "--lr-scheduler=steep")
    assert status == 2
    assert "Invalid value for '--lr-scheduler': 'steep' is not one of 'linear'" in err


def test_translated_refuses_before_anything_is_parsed() -> None:
    with pytest.raises(ConfigError, match="VALUE CACHE"):
        translated(["train-prior", "--dataset-name", "--seed=1"])
