"""A finished run as a pipeline: a run directory that diffusers loads as it is.

Beside the trained network stand the base repository's other components, as links unless copies are asked for, and
`model_index.json`, which is written last: the folder is a pipeline only once it is whole.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from diffusers import ModelMixin

from kcache.durable import publish, remove, temporary_path, write_bytes, write_json
from kcache.repositories import Repository, component_config

__all__ = ["COMPONENTS", "export_run"]

COMPONENTS = {
    "prior": ("prior", "image_encoder", "text_encoder", "tokenizer", "image_processor", "scheduler"),
    "unet": ("unet", "movq", "scheduler"),
}
"""What a pipeline consists of, by the name of the network that learns."""

_PIPELINE_CLASSES = {"prior": "KandinskyV22PriorPipeline", "unet": "KandinskyV22Pipeline"}
_COMPONENT_CLASSES = {
    "prior": ("diffusers", "PriorTransformer"),
    "image_encoder": ("transformers", "CLIPVisionModelWithProjection"),
    "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    # This name on every machine: the class that transformers resolves it to depends on what is installed.
    "image_processor": ("transformers", "CLIPImageProcessor"),
    "unet": ("diffusers", "UNet2DConditionModel"),
    "movq": ("diffusers", "VQModel"),
}

_LOAD_PRIOR = """\
from diffusers import AutoPipelineForText2Image, DiffusionPipeline

prior = DiffusionPipeline.from_pretrained({run!r})
components = {{"prior_" + name: component for name, component in prior.components.items()}}
pipeline = AutoPipelineForText2Image.from_pretrained({decoder!r}, **components)
image = pipeline("a red fox in the snow").images[0]
"""
_LOAD_DECODER = """\
from diffusers import AutoPipelineForText2Image

pipeline = AutoPipelineForText2Image.from_pretrained({run!r})
image = pipeline("a red fox in the snow").images[0]
"""


def export_run(
    run_dir: Path,
    network_name: str,
    network: ModelMixin,
    base: Repository,
    *,
    counterpart: str,
    copy: bool = False,
    facts: Mapping[str, Any],
) -> None:
    """Make `run_dir` a pipeline: the trained network, the other components of `base`, README.md and model_index.json.

    `network_name` is "prior" or "unet". `counterpart` is the repository of the other half of Kandinsky 2.2, for the
    README, where AutoPipelineForText2Image looks up the prior of a decoder. `copy` takes copies of the other components
    instead of links. `facts` are lines of the README about the run.
    """
    (run_dir / "model_index.json").unlink(missing_ok=True)
    temporary = temporary_path(run_dir)
    network.save_pretrained(temporary)
    _replace(temporary, run_dir / network_name)
    others = [name for name in COMPONENTS[network_name] if name != network_name]
    for name in others:
        _place(base.path / name, run_dir / name, copy)
    write_bytes(run_dir / "README.md", _readme(run_dir, network_name, base, counterpart, copy, facts).encode())
    write_json(run_dir / "model_index.json", _model_index(network_name, base))


def _place(source: Path, target: Path, copy: bool) -> None:
    """Link or copy a component, unless it already stands there, as it does when a run goes on in its base's folder."""
    if target.exists() and target.resolve() == source.resolve() and not (copy and target.is_symlink()):
        return
    temporary = temporary_path(target.parent)
    if copy:
        shutil.copytree(source, temporary)
    else:
        temporary.symlink_to(source.resolve(), target_is_directory=True)
    _replace(temporary, target)


def _replace(temporary: Path, final: Path) -> None:
    remove(final)
    publish(temporary, final)


def _model_index(network_name: str, base: Repository) -> dict[str, Any]:
    scheduler = component_config(base, "scheduler")["_class_name"]
    classes = {**_COMPONENT_CLASSES, "scheduler": ("diffusers", scheduler)}
    return {
        "_class_name": _PIPELINE_CLASSES[network_name],
        "_diffusers_version": diffusers.__version__,
        **{name: list(classes[name]) for name in COMPONENTS[network_name]},
    }


def _readme(
    run_dir: Path, network_name: str, base: Repository, counterpart: str, copy: bool, facts: Mapping[str, Any]
) -> str:
    run = os.fspath(run_dir.resolve())
    other = os.fspath(Path(counterpart).resolve()) if Path(counterpart).is_dir() else counterpart
    front: dict[str, Any] = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["kandinsky", "kcache"],
    }
    if base.revision is not None:
        front["base_model"] = base.name
    if network_name == "unet":
        # diffusers reads this line to find the prior that goes with a decoder.
        front["prior"] = [other]
    load = _LOAD_PRIOR if network_name == "prior" else _LOAD_DECODER
    others = ", ".join(f"`{name}/`" for name in COMPONENTS[network_name] if name != network_name)
    origin = f"{base.name} at {base.revision}" if base.revision else os.fspath(base.path)
    kept = "copies" if copy else "links to those"
    return "\n".join(
        [
            "---",
            *(f"{key}: {json.dumps(value)}" for key, value in front.items()),
            "---",
            "",
            f"# Kandinsky 2.2 {'prior' if network_name == 'prior' else 'decoder'}, fine-tuned with kcache",
            "",
            f"`{network_name}/` was trained here. {others} are unchanged: {kept} of {origin}.",
            "",
            *(f"* {name}: {value}" for name, value in facts.items()),
            "",
            "```python",
            load.format(run=run, decoder=other).rstrip(),
            "```",
            "",
        ]
    )
