"""The halves of Kandinsky 2.2 that pictures are drawn with: found where a run or a repository has them, and loaded."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file

from kcache.encoders.pretrained import cast_pipeline, load_pretrained, without_bars
from kcache.encoders.repositories import (
    COMPONENTS,
    PIPELINES,
    Repository,
    check_revision,
    find_repository,
    pipeline_class,
)
from kcache.errors import ModelError
from kcache.foreign import told
from kcache.objectives.lora import fuse_lora, load_lora
from kcache.objectives.lora_file import WEIGHTS_FILE, adapted_network, read_adapters
from kcache.store.checkpoint import STATE_FILE, checkpoint_steps
from kcache.store.run_directory import AVERAGE_FILE, CONFIG_FILE, RAW_FOLDER, base_of, is_run, logger, run_of


@dataclass(frozen=True, kw_only=True)
class Half:
    """One half of Kandinsky 2.2 to draw with."""

    repository: Repository
    learned: Path
    """Where its network lies: in the repository, in a checkpoint or in raw/."""


def find_half(half: str, name: str, revision: str | None) -> Half:
    """What `name` is of `half`, "prior" or "decoder": a pipeline, or a network that a run left beside one."""
    check_revision(f"--{half}-revision", name, revision)
    folder, pipeline = Path(name).expanduser(), PIPELINES[half]
    if not _networks_in(folder) and (folder / WEIGHTS_FILE).is_file():
        learned = next(half for half, pipe in PIPELINES.items() if pipe.network == adapted_network(folder))
        base = base_of(folder)
        under = "" if base is None else f" --{learned} {shlex.quote(base[0])}"
        raise ModelError(
            f"{name} holds a LoRA of the {learned} ({WEIGHTS_FILE}) and no whole network; expected a pipeline, "
            f"with the LoRA beside it; type: kcache sample PROMPT{under} --lora {shlex.quote(name)}"
        )
    is_part = (folder / STATE_FILE).is_file() or folder.name == RAW_FOLDER
    if is_part and half in _networks_in(folder):
        return Half(repository=_pipeline_of(folder, half), learned=folder.resolve())
    _check_begun(folder)
    repository = find_repository(name, revision, pipeline.components)
    return Half(repository=repository, learned=repository.path)


def class_of(half: str, found: Half, adapters: Sequence[Path] = ()) -> str:
    """Name of the diffusers class that draws with it, by the network that learned: its base's may be another.

    `adapters`, files or folders of LoRAs, may widen it; raises ModelError where they cannot.
    """
    network = replace(found.repository, path=found.learned).read(PIPELINES[half].network).values
    for path in adapters:
        network = read_adapters(path).applied_to(network)
    return pipeline_class(half, network)


def _pipeline_of(folder: Path, half: str) -> Repository:
    """The pipeline that the network in `folder`, a checkpoint or raw/, goes into: its run's, or that it was begun from.

    Raises ModelError where there is neither.
    """
    run_dir, base = run_of(folder), base_of(folder)
    components = PIPELINES[half].components
    if run_dir is not None and all((run_dir / name).is_dir() for name in components):
        return find_repository(str(run_dir), None, components)
    others = [name for name in components if name != PIPELINES[half].network]
    if base is None:
        raise ModelError(
            f"{folder} holds a network of the {half} alone, and nothing tells what pipeline it was trained in; "
            f"expected it in the directory of its run ({CONFIG_FILE}); put it back there, or put {', '.join(others)} "
            "beside it"
        )
    try:
        return find_repository(*base, components)
    except ModelError as error:
        raise ModelError(
            f"{folder} holds a network of the {half} alone, trained in the pipeline {base[0]}: {error}; put that back, "
            f"or put its {', '.join(others)} beside the network"
        ) from error


def by_network(lora: Sequence[str]) -> Mapping[str, list[Path]]:
    adapters: dict[str, list[Path]] = {"prior": [], "unet": []}
    for path in map(Path, lora):
        whole = [] if (path / WEIGHTS_FILE).is_file() else _networks_in(path)
        if whole:
            raise ModelError(
                f"--lora {path} holds a whole network of the {whole[0]}, and no adapters ({WEIGHTS_FILE}); expected a "
                f"LoRA; type: --{whole[0]} {shlex.quote(str(path))}"
            )
        _check_begun(path)
        adapters[adapted_network(path)].append(path)
    return adapters


def _networks_in(folder: Path) -> list[str]:
    """The halves whose networks lie in `folder`."""
    return [half for half, pipeline in PIPELINES.items() if (folder / pipeline.network / "config.json").is_file()]


def _check_begun(folder: Path) -> None:
    """Raise ModelError where `folder` is a run that has left nothing yet, and say what it has."""
    if not is_run(folder) or (folder / WEIGHTS_FILE).is_file() or _networks_in(folder):
        return
    steps = checkpoint_steps(folder)
    newest = f", or draw with its newest checkpoint: {folder / f'checkpoint-{steps[-1]}'}" if steps else ""
    raise ModelError(
        f"{folder} is the directory of a run that has left no trained network yet; expected one whose training has "
        f"ended; go on with it by the same command and --resume-from-checkpoint latest{newest}"
    )


def load_half(kind: type[Any], half: Half, device: torch.device, network: str, adapters: Sequence[Path]) -> Any:
    given = {}
    if half.learned != half.repository.path:
        kind_of_network = getattr(diffusers, str(COMPONENTS[network].class_name))
        given = {network: load_pretrained(kind_of_network, half.learned / network, torch.float32)}
    loaded = load_pipeline(kind, half.repository.path, **given)
    _take_average(loaded.components[network], half.learned)
    for path in adapters:
        load_lora(loaded.components[network], path)
        _take_average(loaded.components[network], path)
        # Fused in float32, as float16 would round once more; and a layer with one matrix draws faster than with three.
        fuse_lora(loaded.components[network])
    # Bars are for terminals: None hides them elsewhere.
    loaded.set_progress_bar_config(disable=None)
    cast_pipeline(loaded, torch.float16 if device.type == "cuda" else torch.float32)
    return loaded.to(device)


def _take_average(network: torch.nn.Module, checkpoint: Path) -> None:
    """Give `network` the averages of what learned that the folder of a checkpoint has, if it has some."""
    file = checkpoint / AVERAGE_FILE
    if not file.is_file():
        return
    what = f"{file} cannot be taken as the average of {type(network).__name__}'s weights"
    with told(ModelError, what, "expected what a run with --use-ema wrote; give another checkpoint"):
        for name, tensor in load_file(file).items():
            network.get_parameter(name).data.copy_(tensor)
    logger.warning("%s: drawn with the average of its weights, as its run's result", checkpoint)


def load_pipeline(kind: type[Any], folder: Path, *, purpose: str = "", **given: Any) -> Any:
    """The stock pipeline of class `kind` in `folder`, on the CPU and silent, with `given` in place of components.

    Raises ModelError, which says what for: its `purpose`.
    """
    what = f"{folder} cannot be loaded as {kind.__name__}{purpose}"
    with told(ModelError, what, "fetch or export it again, or give a repository that works"), without_bars():
        loaded = kind.from_pretrained(folder, use_safetensors=True, local_files_only=True, **given)
    loaded.set_progress_bar_config(disable=True)
    return loaded
