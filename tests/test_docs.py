"""The documents say what is so: their commands and Python run on the tiny pair, their flags and defaults exist."""

import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from accelerate.commands.launch import launch_command_parser
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from test_cli_train import UPSTREAM
from torch.distributed.run import get_args_parser as torchrun_parser

import kcache.trainer
from kcache.config import DECODER_REPO, PRIOR_REPO, TrainConfig
from kcache_cli import app as cli
from kcache_cli.renamed import refusal

ROOT = Path(__file__).parent.parent
GUIDE, README = ROOT / "docs" / "from-diffusers.md", ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md"))]

SMALLER = {
    "768": "64",
    "height=64, width=64": "height=64, width=64, num_inference_steps=2, prior_num_inference_steps=2",
    "--mixed-precision fp16": "--mixed-precision no",
    "--val-fraction 0.02": "--val-fraction 0.4",
    "checkpoint-500": "checkpoint-2",
    "torch.float16": "torch.float32",
    "pipeline.enable_model_cpu_offload()": "",
    'device="cuda"': 'device="cpu"',
}
"""What stands in a document, and what is run instead, so that it is quick and needs no accelerator."""
PROGRAMS = ("kcache ", "accelerate launch ", "torchrun ")
_SHORT = shlex.split("--checkpointing-steps 1 --report-to none --no-push-to-hub --max-train-steps")
ADDED = {
    "cache-build": ["--resolution", "64"],
    "train-prior": [*_SHORT, "2"],
    "train-decoder": [*_SHORT, "2"],
    "sample": shlex.split("--num-inference-steps 2 --prior-num-inference-steps 2 --height 64 --width 64"),
}
"""What is added to each command for the same reasons: the last of a flag's values counts."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced part of a document."""

    place: str
    language: str
    text: str


def blocks_of(document: Path) -> list[Block]:
    """All fenced parts of a document, in order."""
    text = document.read_text()
    return [
        Block(place=f"{document.name}:{text.count(chr(10), 0, fenced.start()) + 1}", language=fenced[1], text=fenced[2])
        for fenced in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


def commands_of(block: Block) -> list[list[str]]:
    """The commands of a block that call kcache or a launcher, each as its words."""
    if block.language not in ("", "bash"):
        return []
    lines = block.text.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith(PROGRAMS)]


def arguments_of(words: list[str]) -> list[str] | None:
    """What `kcache` is given by a command, also by a launcher's; None where something else is launched."""
    if words[0] == "kcache":
        return words[1:]
    if words[0] == "torchrun":
        launched = torchrun_parser().parse_args(words[1:])
    else:
        launched = launch_command_parser().parse_args(words[2:])
    return launched.training_script_args if launched.module and launched.training_script == "kcache_cli" else None


@pytest.fixture
def kcache_command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the `kcache` command in this process and returns its exit status."""
    monkeypatch.delenv("KCACHE_DEBUG", raising=False)

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["kcache", *arguments])
        with pytest.raises(SystemExit) as exited:
            cli.main()
        return int(exited.value.code or 0)

    return run


@pytest.fixture
def configured(kcache_command: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> Callable[..., TrainConfig]:
    """The settings that a trainer's command line comes to."""
    configs: list[TrainConfig] = []

    def train(cache: str, config: TrainConfig, *, report: Any) -> kcache.trainer.TrainResult:
        configs.append(config)
        return kcache.trainer.TrainResult(output_dir="r", step=1, loss=1.0, seconds=1.0, samples_per_second=1.0)

    def configured(*arguments: str) -> TrainConfig:
        assert kcache_command(*arguments) == 0, arguments
        return configs[-1]

    monkeypatch.setattr(kcache.trainer, "train", train)
    return configured


@pytest.fixture
def place(oracle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, where the documents' Hub names and folders are local folders of tiny things."""
    monkeypatch.chdir(tmp_path)
    for name, real in {
        PRIOR_REPO: oracle / "prior",
        "lambdalabs/naruto-blip-captions": oracle / "data",
        "photos": oracle / "data",
    }.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).symlink_to(real)
    shutil.copytree(oracle / "decoder", DECODER_REPO)
    # As on the Hub: it is how diffusers finds the prior of a decoder.
    Path(DECODER_REPO, "README.md").write_text(f"---\nprior:\n- {PRIOR_REPO}\n---\n")
    Path("rates.toml").write_text('[[run]]\nname = "low"\n[[run]]\nname = "high"\nlearning_rate = 1e-3\n')
    return tmp_path


def smaller(text: str) -> str:
    for said, run in SMALLER.items():
        text = text.replace(said, run)
    return text


def run_document(document: Path, command: Callable[..., int], *, together: bool = False) -> list[dict[str, Any]]:
    """Run all commands and Python of a document in order, and return the names that each block of Python leaves.

    `together` lets a block use the names of those before it.
    """
    left: list[dict[str, Any]] = []
    for block in blocks_of(document):
        for words in commands_of(block):
            arguments = arguments_of(shlex.split(smaller(shlex.join(words))))
            if arguments is not None:
                resumed = ["--max-train-steps", "3"] if "--resume-from-checkpoint" in arguments else []
                status = command(*arguments, *ADDED.get(arguments[0], []), *resumed)
                assert status == 0, f"{block.place}: {shlex.join(words)}"
        if block.language == "python":
            names: dict[str, Any] = dict(left[-1]) if together and left else {}
            exec(compile(smaller(block.text), block.place, "exec"), names)  # noqa: S102
            left.append(names)
    return left


def assert_same_weights(network: torch.nn.Module, folder: str) -> None:
    saved = load_file(Path(folder, "diffusion_pytorch_model.safetensors"))
    assert saved.keys() == network.state_dict().keys()
    assert all(torch.equal(value, saved[name]) for name, value in network.state_dict().items())


# diffusers' combined pipeline passes itself an argument that it has deprecated.
@pytest.mark.filterwarnings("ignore:`callback_steps` is deprecated:FutureWarning")
def test_the_guide_runs_and_loads_what_was_trained(place: Path, kcache_command: Callable[..., int]) -> None:
    decoder, prior, checkpoint, lora = run_document(GUIDE, kcache_command)
    assert all(names["image"].size == (64, 64) for names in (decoder, prior, checkpoint, lora))
    assert_same_weights(decoder["pipeline"].unet, "kandi2-decoder-naruto-model/unet")
    assert_same_weights(prior["pipeline"].prior_prior, "kandi2-prior-naruto-model/prior")
    assert_same_weights(checkpoint["pipeline"].unet, "runs/decoder/checkpoint-2/unet")
    for network, run in (("unet", "decoder"), ("prior_prior", "prior")):
        (adapter,) = getattr(lora["pipeline"], network).peft_config.values()
        assert adapter.r == 4
        saved = load_file(Path(f"kandi22-{run}-naruto-lora", "pytorch_lora_weights.safetensors"))
        loaded = dict(getattr(lora["pipeline"], network).named_parameters())
        assert all(torch.equal(loaded[name.replace(".weight", ".default_0.weight")], saved[name]) for name in saved)
    # What the guide says of loading adapters in other ways.
    unet, folder, name = decoder["pipeline"].unet, "kandi22-decoder-naruto-lora", "pytorch_lora_weights.safetensors"
    unet.load_lora_adapter(folder, weight_name=name)
    assert not hasattr(unet, "peft_config")
    with pytest.raises(OSError, match=r"no file named .*\.bin"):
        unet.load_lora_adapter(folder, prefix=None)
    with pytest.raises(ValueError, match="Custom Diffusion"):
        unet.load_attn_procs(folder, weight_name=name)
    # The raw weights beside the average are those of the last step.
    assert_same_weights(UNet2DConditionModel.from_pretrained("runs/decoder/raw/unet"), "runs/decoder/checkpoint-3/unet")
    assert len((place / "runs/decoder/metrics.jsonl").read_text().splitlines()) == 3
    (picture,) = (place / "samples").iterdir()
    with Image.open(picture) as image:
        assert image.size == (64, 64)


def test_the_readme_runs(place: Path, kcache_command: Callable[..., int]) -> None:
    *_, names = run_document(README, kcache_command, together=True)
    assert set(names["batch"]) >= {"image_embeds", "latents"}
    assert len(list((place / "samples").iterdir())) == 1


def pairs() -> Iterator[tuple[str, list[str], list[str]]]:
    """Place, words of one of the scripts' commands, and of the kcache command that the guide gives in its place."""
    blocks = blocks_of(GUIDE)
    for block, following in pairwise(blocks):
        for words in commands_of(block):
            if any(word.endswith(".py") for word in words):
                (instead,) = commands_of(following)
                yield block.place, words, instead


PAIRS = list(pairs())


def test_each_of_the_scripts_has_its_command() -> None:
    scripts = {word for _, words, _ in PAIRS for word in words if word.endswith(".py")}
    assert scripts == {f"train_text_to_image_{name}.py" for name in ("prior", "decoder", "lora_prior", "lora_decoder")}


@pytest.mark.parametrize(("words", "instead"), [pair[1:] for pair in PAIRS], ids=[pair[0] for pair in PAIRS])
def test_commands_side_by_side_say_the_same(
    configured: Callable[..., TrainConfig], words: list[str], instead: list[str]
) -> None:
    launched = launch_command_parser().parse_args(words[2:])
    command = "train-prior" if "prior" in launched.training_script else "train-decoder"
    flags = [argument.partition("=")[0].replace("_", "-") for argument in launched.training_script_args]
    theirs = [
        argument
        for argument, flag in zip(launched.training_script_args, flags, strict=True)
        if refusal(command, flag) is None and flag not in ("--image-column", "--caption-column")
    ]
    expected = configured(command, "CACHE", *theirs, "--mixed-precision", launched.mixed_precision)
    assert configured(*instead[1:]) == expected
    assert instead[1] == command


def table_below(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading of the guide, without its head."""
    lines = GUIDE.read_text().split(f"# {heading}\n", 1)[1].splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("|"))
    rows: list[list[str]] = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def code_in(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", text)


FLAGS = {code_in(row[0])[0].removeprefix("--"): row for row in table_below("All 47 flags")}
DEFAULTS = {field.name: field.default for field in fields(TrainConfig)}


def test_the_table_has_every_flag_of_the_scripts_once() -> None:
    assert sorted(FLAGS) == sorted(UPSTREAM)
    assert len(table_below("All 47 flags")) == len(FLAGS) == 47


@pytest.mark.parametrize("name", FLAGS)
def test_a_row_says_the_flag_and_its_default(name: str) -> None:
    values, outcome = UPSTREAM[name]
    _, kcache_cell, default_cell, _ = FLAGS[name]
    assert kcache_cell.startswith("refused") is isinstance(outcome, str)
    if isinstance(outcome, str):
        assert default_cell == (f"`{DEFAULTS[name]}`" if "without `--online`" in kcache_cell else "")
        return
    ((setting, value),) = outcome.items()
    flag, *choice = code_in(kcache_cell)[0].split()
    assert flag == "--" + setting.replace("_", "-")
    assert choice == ([value] if values == [] and value is not True else [])
    default = DEFAULTS[setting]
    if default is MISSING:
        assert default_cell == ""
    elif default in (None, ()):
        assert default_cell == "none"
    elif isinstance(default, bool):
        assert default_cell == ("on" if default else "off")
    else:
        assert type(default)(code_in(default_cell)[0]) == default


@pytest.mark.parametrize("name", [name for name, row in FLAGS.items() if row[1].startswith("refused")])
def test_a_refused_flag_is_answered_with_the_row(
    name: str, kcache_command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    value = {"dataset_name": "NAME", "dataset_config_name": "CONFIG", "train_data_dir": "FOLDER"}.get(name, "N")
    assert kcache_command("train-prior", "CACHE", "--output-dir=RUN", f"--{name}", value) == 1
    answer = capsys.readouterr().err
    lines = [code for code in code_in("|".join(FLAGS[name][1:])) if " " in code]
    assert lines
    assert [line for line in lines if line not in answer] == []


@pytest.mark.parametrize("row", table_below("What else the guide adds"), ids=lambda row: row[0])
def test_what_is_to_be_added_is_taken(row: list[str], configured: Callable[..., TrainConfig]) -> None:
    command = ["train-decoder", "CACHE", "--output-dir", "RUN"]
    assert configured(*command, *shlex.split(code_in(row[1])[0])) != configured(*command)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_flags_that_are_named_exist(document: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    named = {
        flag
        for code in code_in(prose)
        if not code.startswith("python ")
        for flag in re.findall(r"(?<![\w-])--[a-z0-9][\w-]*", code)
    }
    # The scripts' own flags, and accelerate's, have underscores; --rank is the only one that has none and is not ours.
    ours = {flag for flag in named if "_" not in flag} - {"--rank"}
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    known = {option for command in commands.values() for p in command.params for option in p.opts + p.secondary_opts}
    assert ours - known - {"--help"} == set()
    assert ours


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text()
    headings = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)$", text, re.M)
    }
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in headings
        elif "://" not in target:
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize(("told", "status"), [("fp16", 1), ("bf16", 0), ("no", 0)])
def test_a_precision_that_only_the_launcher_was_told_is_refused(
    configured: Callable[..., TrainConfig],
    kcache_command: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    told: str,
    status: int,
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", told)
    assert kcache_command("train-prior", "CACHE", "--output-dir=RUN", "--mixed-precision=bf16") == status
    assert ("give it --mixed-precision fp16" in capsys.readouterr().err) is bool(status)
