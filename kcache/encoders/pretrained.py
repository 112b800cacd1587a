"""Networks from files: whole, of safetensors only, and without the libraries' progress bars and advice."""

import logging
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars
from transformers.utils import logging as transformers_logging

from kcache.encoders.color import littlecms_version
from kcache.encoders.decoding import decoder_facts, installed
from kcache.errors import ModelError
from kcache.foreign import told

_FETCH = "expected what its config.json describes, as save_pretrained writes it; fetch or export the repository again"


def load_pretrained(kind: type[Any], path: Path, dtype: torch.dtype) -> Any:
    """The network of class `kind` in the folder `path`, on the CPU in `dtype`.

    Raises ModelError when it cannot be loaded or lacks weights.
    """
    # diffusers and transformers name the argument differently.
    dtype_name = "torch_dtype" if issubclass(kind, ModelMixin) else "dtype"
    # That of diffusers would leave out what tells of other shapes; transformers raises, and tells it to its log only.
    other = {} if issubclass(kind, ModelMixin) else {"ignore_mismatched_sizes": True}
    with told(ModelError, f"{path} cannot be loaded as {kind.__name__}", _FETCH), without_bars():
        network, loading = kind.from_pretrained(
            path, use_safetensors=True, local_files_only=True, output_loading_info=True, **{dtype_name: dtype}, **other
        )
    # Both libraries fill what the file lacks with random numbers.
    lacking = [*loading["missing_keys"]]
    lacking += [f"{name} {tuple(found)} for {tuple(wanted)}" for name, found, wanted in loading["mismatched_keys"]]
    if lacking:
        raise ModelError(
            f"{path} lacks weights of {kind.__name__}, or has them in other shapes: {', '.join(lacking[:3])} "
            f"({len(lacking)} in all); expected those that its config.json describes; fetch the repository again"
        )
    return network


def cast_pipeline(pipeline: DiffusionPipeline, dtype: torch.dtype) -> None:
    """Bring the networks of a pipeline into `dtype`."""
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            # Not diffusers' own `to`, which warns of modules that must stay in float32 also where there are none.
            torch.nn.Module.to(component, dtype)


@contextmanager
def without_advice() -> Iterator[None]:
    """Keep transformers' advice to install torchvision off the screen, which importing the stock pipelines draws.

    Nothing here needs torchvision: pictures are prepared by Pillow on every machine. All else is logged as ever.
    """
    logger = logging.getLogger("transformers.utils.import_utils")

    def needs_saying(record: logging.LogRecord) -> bool:
        return "requires torchvision (not installed)" not in record.getMessage()

    logger.addFilter(needs_saying)
    try:
        yield
    finally:
        logger.removeFilter(needs_saying)


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep the libraries' own progress bars off the screen, and leave them as the user has set them."""
    switches = [
        (library.disable_progress_bar, library.enable_progress_bar)
        for library in (diffusers_logging, transformers_logging)
        if library.is_progress_bar_enabled()
    ]
    hub_bars = not are_progress_bars_disabled()  # transformers turns these on and off with its own
    for disable, _ in switches:
        disable()
    try:
        yield
    finally:
        for _, enable in switches:
            enable()
        if not hub_bars:
            disable_progress_bars()


def provenance(device: torch.device) -> dict[str, str]:
    """What rows made on `device` are made with: recorded in each commit, shown, never compared."""
    packages = ("torch", "diffusers", "transformers", "numpy")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})"
    return (
        decoder_facts()
        | {name: installed(name) for name in packages}
        | {"littlecms": littlecms_version(), "python": platform.python_version(), "device": name}
    )
