"""A finished run as a pipeline: a run directory that diffusers loads as it is.

Beside the trained network stand the base repository's other components, as links unless copies are asked for, and
`model_index.json`, which is written last: the folder is a pipeline only once it is whole.
"""

import shutil
from pathlib import Path
from typing import Any

import diffusers
from diffusers import ModelMixin

from kcache.durable import publish, remove, temporary_path, write_json
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


def export_run(run_dir: Path, network_name: str, network: ModelMixin, base: Repository, *, copy: bool = False) -> None:
    """Make `run_dir` a pipeline: the trained network, the other components of `base`, and model_index.json.

    `network_name` is "prior" or "unet". `copy` takes copies of the other components instead of links.
    """
    (run_dir / "model_index.json").unlink(missing_ok=True)
    temporary = temporary_path(run_dir)
    network.save_pretrained(temporary)
    _replace(temporary, run_dir / network_name)
    others = [name for name in COMPONENTS[network_name] if name != network_name]
    for name in others:
        _place(base.path / name, run_dir / name, copy)
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
