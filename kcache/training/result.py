"""What a finished run leaves: the trained network as a pipeline or as adapters, and a card that says how to load it.

Beside a trained network stand the base repository's other components, as links unless copies are asked for, and
`model_index.json`, which is written last: the folder is a pipeline only once it is whole.
"""

import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import diffusers
from diffusers import ModelMixin

from kcache.disk.durable import remove, replace, temporary_folder, temporary_path, write_bytes, write_json, writing
from kcache.disk.filesystems import free_bytes
from kcache.disk.room import Reserve, can_link, check_room
from kcache.encoders.repositories import (
    COMPONENTS,
    PIPELINES,
    Configuration,
    Pipeline,
    Repository,
    pipeline_class,
)
from kcache.errors import ModelError, RunError
from kcache.foreign import reason, told
from kcache.objectives.lora import fuse_lora, load_lora
from kcache.report.figures import plot_run
from kcache.report.model_card import model_card
from kcache.stopping import shielded
from kcache.store.checkpoint import checkpoint_steps
from kcache.store.run_directory import CARD_FILE, CURVES_FILE, PIPELINE_FILE, RAW_FOLDER, read_metrics
from kcache.training.network.objective import load_network
from kcache.training.network.saved import network_bytes, save_network
from kcache.training.optimizer.average import averaged
from kcache.training.run import TrainingRun

logger = logging.getLogger(__name__)

_SMALL = 1 << 16
"""Bytes for what stands beside the weights, for each file of theirs: headers, configurations, state, the card."""


@contextmanager
def room_kept(run: TrainingRun) -> Iterator[None]:
    """Have room in the run directory for what comes last, a checkpoint and the result, while the block runs.

    What would not fit, or could not be made, is found out here, before the first step; in the main process. Raises
    CacheWriteError.
    """
    if not run.accelerator.is_main_process:
        yield
        return
    folder, config = run.output_dir, run.config
    if config.lora_rank is None and not config.export_pipeline:
        run.links = can_link(folder)
        if not run.links:
            logger.warning(
                "%s takes no links: the result gets copies of what %s leaves as it is", folder, run.base.name
            )
    checkpoint = run.checkpoint_files if run.first_step < run.max_steps else {}
    result = [size + _SMALL for size in _result_files(run)]
    what = "a checkpoint and the result" if checkpoint else "the result"
    check_room(folder, [*checkpoint.values(), *result], f"{what} of this run")
    _warn_of_more(run, sum(checkpoint.values()), sum(checkpoint.values()) + sum(result))
    run.reserve = Reserve(folder, checkpoint)
    try:
        yield
    finally:
        run.reserve.give_back()


def _warn_of_more(run: TrainingRun, checkpoint: int, least: int) -> None:
    """Say that the checkpoints on the way will not fit beside the last one and the result."""
    every, limit = run.config.checkpointing_steps, run.config.checkpoints_total_limit
    between = max(0, (run.max_steps - 1) // every - run.first_step // every)
    kept = between if limit is None else min(between, limit)
    free = free_bytes(run.output_dir)
    if kept and free is not None and free < least + kept * checkpoint:
        logger.warning(
            "%s has %s bytes free; the %d checkpoints of this run take about %s bytes each: those on the way that do "
            "not fit will be left out; make room, or give --checkpoints-total-limit 1",
            run.output_dir,
            f"{free:,}",
            between + 1,
            f"{checkpoint:,}",
        )


def _result_files(run: TrainingRun) -> list[int]:
    """About how many bytes each file of the result has."""
    config = run.config
    learnt = next(iter(run.checkpoint_files.values()))
    networks = [learnt, *([learnt] if run.average is not None else [])]
    if config.lora_rank is not None and config.export_pipeline:
        networks.append(network_bytes(run.network))
    others = []
    if config.export_pipeline or not run.links:
        pipeline = PIPELINES[config.stage]
        folders = [run.base.path / name for name in pipeline.components if name != pipeline.network]
        others = [file.stat().st_size for folder in folders for file in _files(folder)]
    return networks + others


def write_result(run: TrainingRun) -> None:
    """Write the result into the run directory: a pipeline that diffusers loads or a LoRA file, README.md and loss.png.

    With a moving average of the weights that is the result, and raw/ holds the weights as they are. With adapters and
    --export-pipeline there is a pipeline, too, whose network has them fused into its weights. No signal interrupts
    what is worth most. Raises RunError, which says where the weights are and how to come to the same result.
    """
    try:
        with shielded():
            run.have_place()
            _write_weights(run)
    except Exception as error:
        steps = checkpoint_steps(run.output_dir)
        kept = (
            f"checkpoint-{steps[-1]} there holds what was trained until that step"
            if steps
            else "no checkpoint is there"
        )
        raise RunError(
            f"the result could not be written into {run.output_dir}: {reason(error)}; {kept}; set that right, and the "
            "same command with --resume-from-checkpoint latest writes the same result"
        ) from error
    if read_metrics(run.output_dir):  # none when a run goes on in another directory from its last step
        with run.decoration(f"{run.output_dir / CURVES_FILE} could not be drawn"):
            plot_run(run.output_dir)


def _write_weights(run: TrainingRun) -> None:
    config, pipeline, folder = run.config, PIPELINES[run.config.stage], run.output_dir
    (folder / PIPELINE_FILE).unlink(missing_ok=True)  # an earlier one, until all of this one is there
    with averaged(run.average, run.network):
        if config.lora_rank is not None:
            _save(run, folder)
        else:
            export_network(folder, pipeline, run.network)
    if run.average is not None:
        _save(run, folder / RAW_FOLDER)
    else:
        remove(folder / RAW_FOLDER)  # of an earlier run in this directory
    if config.lora_rank is not None and config.export_pipeline:
        # Not the network that learned: its own weights may have been rounded to half precision.
        fused = load_network(config.stage, run.base.path)
        load_lora(fused, folder)
        fuse_lora(fused)
        export_network(folder, pipeline, fused)
    if whole := config.lora_rank is None or config.export_pipeline:
        export_components(folder, pipeline, run.base, copy=config.export_pipeline or not run.links)
    # Before the pipeline is one: diffusers finds a decoder's prior by its card.
    with run.decoration(f"{folder / CARD_FILE} could not be written"):
        write_bytes(folder / CARD_FILE, model_card(folder).encode())
    if whole:
        make_pipeline(folder, config.stage, run.base_facts)


def _save(run: TrainingRun, folder: Path) -> None:
    """Put what learned into `folder`, each part of it at once or not at all."""
    with writing(folder), temporary_folder(run.output_dir) as temporary:
        folder.mkdir(exist_ok=True)
        save_network(run.config.stage, run.network, temporary)
        for part in temporary.iterdir():
            replace(part, folder / part.name)
        temporary.rmdir()


def export_network(run_dir: Path, pipeline: Pipeline, network: ModelMixin) -> None:
    """Write a trained network to where `run_dir` has it as a pipeline; raises CacheWriteError."""
    final = run_dir / pipeline.network
    with writing(final), temporary_folder(run_dir) as temporary:
        network.save_pretrained(temporary)
        replace(temporary, final)


def export_components(run_dir: Path, pipeline: Pipeline, base: Repository, *, copy: bool = False) -> None:
    """Put the other components of `base` beside the trained network, as links or copies; raises CacheWriteError."""
    for name in pipeline.components:
        if name != pipeline.network:
            _place(base.path / name, run_dir / name, copy)


def _place(source: Path, target: Path, copy: bool) -> None:
    """Link or copy a component, unless it already stands there, as it does when a run goes on in its base's folder."""
    if target.exists() and target.resolve() == source.resolve() and not (copy and target.is_symlink()):
        return
    with writing(target):
        if copy:
            with temporary_folder(target.parent) as temporary:
                _copy(source, temporary)
                replace(temporary, target)
        else:
            temporary = temporary_path(target.parent)
            temporary.symlink_to(source.resolve(), target_is_directory=True)
            replace(temporary, target)


def _copy(source: Path, target: Path) -> None:
    """Copy what a folder holds into another, without modes and times, which not every file system keeps."""
    for file in _files(source):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)


def _files(folder: Path) -> Iterator[Path]:
    """The files that a copy of a component gets, without pipes and the like; ModelError for one that is unreadable."""
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            yield from _files(entry)
        elif entry.is_file() or entry.is_symlink():
            with told(
                ModelError, f"{entry} cannot be read, and the result gets a copy", "put it back or fetch it again"
            ):
                entry.open("rb").close()
            yield entry


def make_pipeline(run_dir: Path, stage: str, facts: Mapping[str, Configuration]) -> None:
    """Make a pipeline of the components in `run_dir` by its model_index.json.

    `facts` are the configurations of the base, which the trained network's may differ from.
    """
    pipeline = PIPELINES[stage]
    network = Repository(name=str(run_dir), path=run_dir, revision=None).read(pipeline.network)
    components = {
        name: [COMPONENTS[name].library, COMPONENTS[name].class_name or facts[name].values["_class_name"]]
        for name in pipeline.components
    }
    name = pipeline_class(stage, network.values)
    index = {"_class_name": name, "_diffusers_version": diffusers.__version__, **components}
    write_json(run_dir / PIPELINE_FILE, index)
