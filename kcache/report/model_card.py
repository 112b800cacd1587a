"""The README.md of a finished run: a model card that says what was trained, on what, how well, and how to load it.

Derived from the run directory alone. In a card that is published, folders of this machine are named without their path.
The front matter follows the Hub's model cards (https://huggingface.co/docs/hub/model-cards).
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from kcache.config import TrainConfig
from kcache.encoders.repositories import COMPONENTS, FOLLOWING, INPAINTING, PIPELINES, Repository
from kcache.objectives.lora_file import read_adapters
from kcache.report.drawn.sizes import SIDE, UNIT, most_used, trained_shapes, unit_of
from kcache.report.grid import grids_of
from kcache.settings import marks_of
from kcache.store.run_directory import (
    LORA_FILE,
    new_order_of,
    read_config,
    read_metrics,
    read_starts,
    read_validation,
)

_NAMES = {INPAINTING: "inpainting decoder", FOLLOWING: "decoder that reads hints"}
_TAGS = {INPAINTING: ("inpainting",), FOLLOWING: ("controlnet",)}
_LAST_STEPS = 100
"""Steps over which the card averages the loss, which is noisy from step to step."""


def model_card(run_dir: Path, *, repo_id: str | None = None, whole: bool = True) -> str:
    """The card of the run in `run_dir`: front matter, pictures, how to load it, data, results and settings.

    `repo_id` is the Hub repository that the card is for; None is for the folder itself. `whole` says that all
    components of the pipeline stand beside the trained network. Raises RunError where there is no config.json.
    """
    told = read_config(run_dir)
    lora = (run_dir / LORA_FILE).is_file()
    base = _Place(told["base"]["name"], published=repo_id is not None)
    other = _Place(told["counterpart"], published=repo_id is not None)
    stage = told["config"]["stage"]
    origin = f"{base.shown} at {told['base']['revision']}" if told["base"]["revision"] else base.shown
    trained = "Adapters (LoRA)" if lora else f"The {stage}'s weights"
    merged = ["Merged into the weights they stand beside, as a pipeline."] if told["config"]["export_pipeline"] else []
    kind = _kind(told["config"])
    plain = kind == PIPELINES[stage].class_name
    # Drawn as most of what the cache has, not at the default of the decoder's pipeline.
    counts = trained_shapes(told)
    used = most_used(counts) if counts else (SIDE, SIDE) if kind == FOLLOWING else ()
    sides = used if plain else [_drawn(side, run_dir) for side in used]
    size = "".join(f", {name}={side}" for name, side in zip(("height", "width"), sides, strict=False))
    adapters = read_adapters(run_dir) if lora and not plain else None
    widening = {} if adapters is None else adapters.widening
    lines = [
        "---",
        _front_matter(stage, base, other, lora, kind),
        "---",
        "",
        f"# {'LoRA adapters for the' if lora else 'Fine-tuned'} Kandinsky 2.2 {_NAMES.get(kind, stage)}",
        "",
        f"{trained} were trained with kcache, from cached outputs of the frozen encoders, on top of {origin}.",
        *(merged if lora else []),
        *_purpose(kind, told["config"]),
        *_widened(widening),
        *_pictures(run_dir, told),
        "",
        "## Use",
        "",
        "```python",
        *_loading(stage, kind, repo_id or os.fspath(run_dir.resolve()), base, other, lora, whole, widening),
        *_drawing(size, kind),
        "```",
        "",
        "## Training",
        "",
        *_training(run_dir, told, published=repo_id is not None),
        "",
        "| setting | value |",
        "|---|---|",
        *(f"| {name} | `{_cell(value)}` |" for name, value in _settings(told["config"]).items()),
        "",
    ]
    return "\n".join(lines)


class _Place:
    """A repository as a card names it."""

    def __init__(self, name: str, *, published: bool) -> None:
        folder = Path(name).expanduser()
        self.on_hub = not folder.is_dir()
        own = os.fspath(folder.resolve())
        self.shown = name if self.on_hub else f"path/to/{Path(own).name}" if published else own
        self.usable = self.on_hub or not published
        """Whether whoever reads the card can load it by this name."""


def _kind(config: Mapping[str, Any]) -> str:
    """Name of the diffusers class that draws with what a run with these settings trained."""
    if config.get("inpaint"):
        return INPAINTING
    return FOLLOWING if config.get("hint") is not None else PIPELINES[config["stage"]].class_name


def _purpose(kind: str, config: Mapping[str, Any]) -> list[str]:
    if kind == FOLLOWING:
        return [f"It draws by a hint: a picture such as those called `{_cell(config['hint'])}` that it was trained on."]
    if kind == INPAINTING:
        return ["It fills holes in pictures: where a mask is white, they are drawn anew."]
    return []


def _widened(widening: Mapping[str, Any]) -> list[str]:
    """What to know of adapters of a decoder that was widened."""
    if not widening:
        return []
    block = " and `add_embedding.input_hint_block`" if "addition_embed_type" in widening else ""
    return [
        "",
        f"They are for that decoder made wider, to {widening['in_channels']} input channels: their file holds "
        f"`conv_in`{block} whole, too. `load_lora_adapter` does not load them into the decoder as it is, but into "
        "one that is made as wide, as below. `kcache sample --lora` widens it by itself, and `kcache train-decoder "
        "--export-pipeline` merges all of it into a pipeline.",
    ]


def _front_matter(stage: str, base: _Place, other: _Place, lora: bool, kind: str) -> str:
    tags = [*(["lora"] if lora else []), *_TAGS.get(kind, ())]
    front: dict[str, Any] = {
        "library_name": "diffusers",
        "pipeline_tag": "image-to-image" if kind in _TAGS else "text-to-image",
        "tags": ["kandinsky", "kandinsky-2-2", "kcache", *tags],
    }
    if base.on_hub:
        front |= {"base_model": base.shown, "base_model_relation": "adapter" if lora else "finetune"}
    if stage == "decoder" and other.usable:
        # diffusers' AutoPipelineForText2Image reads this line to find the prior that goes with a decoder.
        front["prior"] = [other.shown]
    return ModelCardData(**front).to_yaml()


def _pictures(run_dir: Path, told: Mapping[str, Any]) -> list[str]:
    grids = grids_of(run_dir)
    if not grids:
        return []
    prompts = [f"* {prompt}" for prompt in told["config"]["validation_prompts"]]
    return ["", f"![pictures from the prompts below]({grids[-1].relative_to(run_dir).as_posix()})", "", *prompts]


def _drawn(side: int, run_dir: Path) -> int:
    """A side as the pipeline that fills holes must be given it: others round it up themselves."""
    own = Repository(name=str(run_dir), path=run_dir, revision=None)
    unit = unit_of(own) if (run_dir / "movq" / "config.json").is_file() else UNIT
    return -(-side // unit) * unit


def _drawing(size: str, kind: str) -> list[str]:
    """Python that draws a picture, by a hint or not, or fills the hole of one."""
    if kind == FOLLOWING:
        return [
            "# The hint is scaled to height and width, multiples of 64, with values from 0 to 1.",
            f'hint = VaeImageProcessor(do_normalize=False).preprocess(load_image("hint.png"){size})',
            f'image = decoder(**prior("a red fox in the snow"), hint=hint{size}).images[0]',
        ]
    if kind == INPAINTING:
        return [
            "# A mask is white where the picture is drawn anew; both are scaled to height and width, multiples of 64.",
            'picture, mask = load_image("photo.jpg"), load_image("hole.png")',
            f'image = decoder(**prior("a red fox in the snow"), image=picture, mask_image=mask{size}).images[0]',
        ]
    return [f'image = decoder(**prior("a red fox in the snow"){size}).images[0]']


def _loading(
    stage: str,
    kind: str,
    run: str,
    base: _Place,
    other: _Place,
    lora: bool,
    whole: bool,
    widening: Mapping[str, Any],
) -> list[str]:
    """Python that loads the stock pipelines of both halves, with what was trained in its own."""
    network = PIPELINES[stage].network
    network_class = str(COMPONENTS[network].class_name)
    classes = {half: pipeline.class_name for half, pipeline in PIPELINES.items()} | {stage: kind}
    sources = {"prior": repr(other.shown), "decoder": repr(other.shown)}
    imports, before, after = sorted(classes.values()), list[str](), list[str]()
    adapters = f"{network}.load_lora_adapter({run!r}, prefix=None, weight_name={LORA_FILE!r})"
    if whole and not lora:
        sources[stage] = repr(run)
    elif lora and not widening:
        sources[stage] = repr(base.shown)
        after = [f"{stage}.{adapters}"]
    else:
        imports.append(network_class)
        sources[stage] = f"{base.shown!r}, {network}={network}"
        before = [f"{network} = {network_class}.from_pretrained({run!r}, subfolder={network!r})"]
    if widening:
        wide = "".join(f", {name}={value!r}" for name, value in widening.items())
        before = [
            "# What is wider is random at first, of which diffusers warns; the file of adapters has all of it.",
            f"{network} = {network_class}.from_pretrained(",
            f"    {base.shown!r}, subfolder={network!r}{wide},",
            "    ignore_mismatched_sizes=True, low_cpu_mem_usage=False,",
            ")",
            adapters,
        ]
    return [
        f"from diffusers import {', '.join(imports)}",
        *(["from diffusers.image_processor import VaeImageProcessor"] if kind == FOLLOWING else []),
        *(["from diffusers.utils import load_image"] if kind in _TAGS else []),
        "",
        *before,
        *(f"{half} = {name}.from_pretrained({sources[half]})" for half, name in classes.items()),
        *after,
    ]


def _training(run_dir: Path, told: Mapping[str, Any], *, published: bool) -> list[str]:
    cache, metrics, validations = told["cache"], read_metrics(run_dir), read_validation(run_dir)
    tables = ", ".join(f"{name} `{fingerprint[:16]}`" for name, fingerprint in sorted(cache["tables"].items()))
    where = Path(cache["path"]).name if published else cache["path"]
    lines = [f"* data: {cache['samples']:,} samples of the cache `{where}`, tables {tables}"]
    if shapes := told.get("shapes"):
        sides = ", ".join(f"{height}x{width}" for height, width in (each["shape"] for each in shapes))
        lines.append(f"* shapes, height by width in pixels: {sides}")
    if told.get("mirrored"):
        lines.append("* half of the turns took the mirrored picture")
    if prompts := told["config"].get("class_prompt"):
        rows, weight = told["config"]["num_class_rows"], told["config"]["prior_loss_weight"]
        kept = ", ".join(map(repr, prompts))
        lines.append(f"* class rows: {rows:,} of each of {kept}, drawn by the prior before training; weight {weight:g}")
    for start in read_starts(run_dir):
        if (told_of := new_order_of(start)) is not None:
            lines.append(f"* after step {start['step']:,}: {told_of}")
    if metrics:
        last = [entry["loss"] for entry in metrics[-_LAST_STEPS:]]
        most = "up to " if told.get("shapes") else ""
        lines.append(f"* steps: {metrics[-1]['step']:,} of {most}{told['global_batch']:,} samples each")
        lines.append(f"* loss: {sum(last) / len(last):.4g}, mean of the last {len(last)} steps")
        if beside := [entry["class_loss"] for entry in metrics[-_LAST_STEPS:] if "class_loss" in entry]:
            lines.append(f"* loss of the class rows: {sum(beside) / len(beside):.4g}")
    if validations:
        values = [f"{name} {value:.4g}" for name, value in validations[-1].items() if name.startswith("val_")]
        lines.append(f"* held-out images, at step {validations[-1]['step']:,}: {', '.join(values)}")
    lines.append("* versions: " + ", ".join(f"{name} {version}" for name, version in told["versions"].items()))
    return lines


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that differ from the defaults, and those that everybody asks for."""
    shown = {name: marks.shown for name, marks in marks_of(TrainConfig).items() if marks.shown != "never"}
    return {
        name: config[name]
        for name, when in shown.items()
        if name in config and (when == "always" or _plain(config[name]) != _plain(getattr(TrainConfig, name)))
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(_plain(value))
    return text.replace("|", "\\|").replace("`", "'").replace("\n", " ")
