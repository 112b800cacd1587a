"""The documents say what is so: their commands and Python run on the tiny pair, their flags and defaults exist."""

import re
import shlex
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from accelerate.commands.launch import launch_command_parser
from crc32c import crc32c
from diffusers import UNet2DConditionModel
from documents import ROOT, blocks_of, commands_of, run_document
from PIL import Image
from safetensors.torch import load_file
from torch.distributed.run import get_args_parser as torchrun_parser
from upstream_flags import UPSTREAM

import kcache.training.trainer
import kcache_cli.train
from kcache import Cache
from kcache.config import TrainConfig
from kcache.settings import marks_of
from kcache.store.run_directory import read_metrics
from kcache_cli import app as cli
from kcache_cli.upstream_flags import refusal

GUIDE, README = ROOT / "docs" / "from-diffusers.md", ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture
def configured(kcache_command: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> Callable[..., TrainConfig]:
    """The settings that a trainer's command line comes to."""
    configs: list[TrainConfig] = []

    def train(cache: str, config: TrainConfig, *, report: Any) -> kcache.training.trainer.TrainResult:
        configs.append(config)
        return kcache.training.trainer.TrainResult(
            output_dir="r", step=1, loss=1.0, seconds=1.0, samples_per_second=1.0
        )

    def configured(*arguments: str) -> TrainConfig:
        assert kcache_command(*arguments) == 0, arguments
        return configs[-1]

    monkeypatch.setattr(kcache.training.trainer, "train", train)
    monkeypatch.setattr(kcache_cli.train, "_check_cache", lambda _: None)
    return configured


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
    sizes = []
    for picture in (place / "samples").iterdir():
        with Image.open(picture) as image:
            sizes.append(image.size)
    assert sizes == [(64, 64)] * 2


def test_the_document_on_going_on_runs_and_names_every_setting(
    place_with_cache: Path, kcache_command: Callable[..., int]
) -> None:
    document = ROOT / "docs" / "resuming.md"
    kept, others = document.read_text().partition("\n## When the data")[0].split("All others may change:")
    marks = marks_of(TrainConfig)
    wanted = {name for name in marks if marks[name].kept and marks[name].flag}
    assert wanted <= set(re.findall(r"`(\w+)`", kept))
    assert set(re.findall(r"`(\w+)`", others)) - {"constant", "constant_with_warmup"} == set(marks) - wanted - {"stage"}
    assert kcache_command("train-prior", "caches/photos-64", "--output-dir=runs/prior", "--max-train-steps=1") == 0
    run_document(document, kcache_command)


def test_the_document_on_streaming_runs(place_with_cache: Path, kcache_command: Callable[..., int]) -> None:
    run_document(ROOT / "docs" / "streaming.md", kcache_command)
    assert {"wait_store", "wait_verification", "wait_copying"} <= read_metrics(Path("runs/prior"))[-1].keys()


def test_a_dry_run_prints_what_its_document_shows(
    place_with_cache: Path, kcache_command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    document = ROOT / "docs" / "before-you-start.md"
    run_document(document, kcache_command)
    shown = next(block.text for block in blocks_of(document) if block.language == "text")
    printed = capsys.readouterr().out
    # What would have to change depends on what there is, and there is enough for the tiny pair.
    as_words = [
        re.sub(r"[\d.,]+|\b[kMG]?B\b|: it (does not fit; .*|fits)", "", text).split() for text in (shown, printed)
    ]
    kinds = {"rows:", "optimizer", "weights", "activations", "checkpoints", "not"}
    assert kinds <= set(as_words[0]) & set(as_words[1])
    assert sorted(set(as_words[0]) - set(as_words[1])) == []
    assert not Path("runs").exists()


def test_the_readme_runs(place: Path, kcache_command: Callable[..., int]) -> None:
    *_, names = run_document(README, kcache_command, together=True)
    assert set(names["batch"]) >= {"image_embeds", "latents"}
    assert sorted(path.name[:4] for path in (place / "samples").iterdir()) == ["0000", "0001", "0002", "0003", "0004"]


def pairs() -> Iterator[tuple[str, list[str], list[str]]]:
    """Place, words of one of the scripts' commands, and of the kcache command that the guide gives in its place."""
    blocks = blocks_of(GUIDE)
    for block, following in pairwise(blocks):
        for words in commands_of(block):
            if any(word.endswith(".py") for word in words):
                (instead,) = commands_of(following)
                yield block.place, words, instead


PAIRS = list(pairs())


# webdataset leaves files for the garbage collector to close.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_cache_format_reads_what_kcache_reads(place_with_cache: Path, kcache_command: Callable[..., int]) -> None:
    *_, names = run_document(ROOT / "docs" / "cache-format.md", kcache_command, together=True)
    assert names["broken"] == []
    assert crc32c(b"123456789") == 0xE3069283
    with tarfile.open(ROOT / "tests" / "data" / "schema-1.tar.xz") as archive:
        archive.extractall("of-version-1", filter="data")
    for folder in ("caches/photos-64", "published/photos-64", "of-version-1/zarr", "of-version-1/webdataset"):
        reader, cache = names["Reader"](folder), Cache.open(folder)
        assert reader.manifest["schema_version"] == (1 if folder.startswith("of-version-1") else 2)
        for number in range(len(cache)):
            for (_, field), row in reader.sample(number).items():
                expected = cache.read([number], [field])[field]
                assert np.array_equal(row.reshape(expected.shape), expected)
        entry = cache.index["latents-64"][2]
        file = cache.field_files("latents").files[entry["shard"]].path
        content = bytearray(file.read_bytes())
        content[int(entry["latents"]["offset"]) + 5] ^= 1
        file.unlink()
        file.write_bytes(content)
        with pytest.raises(ValueError, match="damaged"):
            names["Reader"](folder).sample(2)


def test_your_own_loop_trains_like_the_command(place_with_cache: Path, kcache_command: Callable[..., int]) -> None:
    document = ROOT / "docs" / "your-own-loop.md"
    left = run_document(document, kcache_command, together=True)
    assert left[-1]["batch"]["latents"].shape[0] == 4
    assert left[-1]["decoder_loader"].consumed == 16
    assert left[-1]["again"].consumed == 16 + 4
    assert set(left[-1]["measured"]) >= {"val_loss", "val_loss_t000_249"}
    arguments = ["--max-train-steps=2", "--learning-rate=1e-5", "--report-to=none", "--checkpointing-steps=9"]
    decoder = ["--train-batch-size=8", "--mixed-precision=bf16", "--snr-gamma=5"]
    assert kcache_command("train-prior", "caches/photos-64", "--output-dir=p", "--train-batch-size=64", *arguments) == 0
    assert kcache_command("train-decoder", "caches/photos-64", "--output-dir=d", *decoder, *arguments) == 0
    for names, run in zip(left, ("p", "d"), strict=False):
        assert [float(loss) for loss in names["losses"]] == [step["loss"] for step in read_metrics(Path(run))]


def test_cached_equals_online_as_it_says(place_with_cache: Path, kcache_command: Callable[..., int]) -> None:
    (names,) = run_document(ROOT / "docs" / "cached-equals-online.md", kcache_command)
    assert names["largest"] == 0  # the cache holds float32


def test_several_processes_as_it_says(place: Path, kcache_command: Callable[..., int]) -> None:
    run_document(ROOT / "docs" / "multi-gpu.md", kcache_command)
    for run, steps in (("prior", 3), ("decoder", 2)):
        assert len((place / "runs" / run / "metrics.jsonl").read_text().splitlines()) == steps


def test_clusters_as_it_says(place_with_cache: Path, kcache_command: Callable[..., int]) -> None:
    run_document(ROOT / "docs" / "clusters.md", kcache_command)
    assert len((place_with_cache / "runs" / "decoder" / "metrics.jsonl").read_text().splitlines()) == 3


def test_caches_lie_in_object_stores_as_it_says(place: Path, s3: str, kcache_command: Callable[..., int]) -> None:
    assert s3 == "s3://caches"  # as the document has it
    (names,) = run_document(ROOT / "docs" / "object-stores.md", kcache_command)
    assert names["rows"]["latents"].shape[0] == 3
    assert not list(place.glob("s3*"))


def test_pictures_of_any_shape_as_it_says(place: Path, kcache_command: Callable[..., int]) -> None:
    (names,) = run_document(ROOT / "docs" / "shapes.md", kcache_command)
    assert len({part.shape for part in names["cache"].by_shape("latents")}) > 1
    with Image.open(*(place / "samples").glob("*.png")) as picture:
        assert picture.size == (128, 64)


def test_a_prior_keeps_what_it_knew_as_it_says(place_with_cache: Path, kcache_command: Callable[..., int]) -> None:
    run_document(ROOT / "docs" / "prior-preservation.md", kcache_command)
    assert "class_loss" in read_metrics(Path("runs/mydog"))[0]
    assert len(Cache.open("caches/both")) == len(Cache.open("caches/mydog")) + 2


def test_what_embeddings_say_as_it_says(place_with_cache: Path, kcache_command: Callable[..., int]) -> None:
    run_document(ROOT / "docs" / "know-your-data.md", kcache_command)
    assert Path("duplicates.jsonl").is_file()


def test_a_whole_network_trains_in_less_memory_as_it_says(
    place_with_cache: Path, kcache_command: Callable[..., int]
) -> None:
    run_document(ROOT / "docs" / "memory.md", kcache_command)
    weights = load_file("runs/decoder/unet/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_samples_count_more_and_come_again_as_it_says(
    place_with_cache: Path, kcache_command: Callable[..., int]
) -> None:
    for name in ("photos", "me"):
        shutil.copytree("caches/photos-64", f"caches/{name}")
    run_document(ROOT / "docs" / "weights.md", kcache_command)
    assert len(Cache.open("caches/all")) == len(Cache.open("caches/me"))


# diffusers' combined pipeline passes itself an argument that it has deprecated.
@pytest.mark.filterwarnings("ignore:`callback_steps` is deprecated:FutureWarning")
def test_holes_are_filled_as_it_says(place: Path, kcache_command: Callable[..., int]) -> None:
    masks, pipeline = run_document(ROOT / "docs" / "inpainting.md", kcache_command)
    assert masks["masks"].shape == (8, 1, 96, 96)
    assert type(pipeline["pipeline"]).__name__ == "KandinskyV22InpaintCombinedPipeline"
    assert_same_weights(pipeline["pipeline"].unet, "runs/inpaint/unet")
    assert pipeline["pipeline"].unet.config.in_channels == 9
    assert pipeline["image"].size == (64, 64)
    assert len(list((place / "samples").iterdir())) == 2


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
        if not code.startswith("python ") and "hf download" not in code
        for flag in re.findall(r"(?<![\w-])--[a-z0-9][\w-]*", code)
    }
    # The scripts' own flags, and accelerate's, have underscores; --rank is the only one that has none and is not ours.
    ours = {flag for flag in named if "_" not in flag} - {"--rank"}
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    known = {option for command in commands.values() for p in command.params for option in p.opts + p.secondary_opts}
    known |= {option for action in torchrun_parser()._actions for option in action.option_strings}
    if document.name == "how-we-measure.md":
        known |= set(re.findall(r'"(--[a-z-]+)"', "".join(p.read_text() for p in ROOT.glob("benchmarks/**/*.py"))))
    assert ours - known - {"--help", "--install-completion"} == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_are_named_exist(document: Path) -> None:
    named = re.findall(r"\b(?:tests|benchmarks|kcache|cli|docs)/[\w/.-]+\.(?:py|md|sh)\b", document.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", document.read_text()):
        if "://" not in target:
            name, _, heading = target.partition("#")
            linked = document.parent / name if name else document
            assert linked.exists(), target
            assert not heading or heading in anchors(linked), target


def anchors(document: Path) -> set[str]:
    """What links can name in a document: its headings, as GitHub spells them."""
    titles = re.findall(r"^#+ (.*)$", document.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


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


def test_every_benchmark_is_explained() -> None:
    page = (ROOT / "docs" / "how-we-measure.md").read_text()
    scripts = {path.name for path in ROOT.glob("benchmarks/*.py") if "__main__" in path.read_text()}
    explained = {name for name in scripts if f"`benchmarks/{name}`" in page}
    assert scripts - explained == {"pretrain_demo.py", "report.py"}  # these measure nothing
