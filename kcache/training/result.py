"""What a finished run leaves: the trained network as a pipeline or as adapters, and a card that says how to load it.

Beside a trained network stand the base repository's other components, as links unless copies are asked for, and
`model_index.json`, which is written last: the folder is a pipeline only once it is whole.
"""

import shutil
from pathlib import Path
from typing import Any

import diffusers
from diffusers import ModelMixin

from kcache.durable import publish, remove, temporary_path, write_bytes, write_json
from kcache.encoders.repositories import COMPONENTS, PIPELINES, Pipeline, Repository
from kcache.objectives.lora import fuse_lora, load_lora
from kcache.report.figures import plot_run
from kcache.report.model_card import model_card
from kcache.store.run_directory import CARD_FILE, PIPELINE_FILE, RAW_FOLDER, read_metrics
from kcache.training.network import load_network, save_network
from kcache.training.optimizer import averaged
from kcache.training.run import TrainingRun


def write_result(run: TrainingRun) -> None:
    """Write the result into the run directory: a pipeline that diffusers loads or a LoRA file, README.md and loss.png.

    With a moving average of the weights that is the result, and raw/ holds the weights as they are. With adapters and
    --export-pipeline there is a pipeline, too, whose network has them fused into its weights.
    """
    config, pipeline = run.config, PIPELINES[run.config.stage]
    if read_metrics(run.output_dir):  # none when a run goes on in another directory from its last step
        plot_run(run.output_dir)
    if run.average is not None:
        _save(run, run.output_dir / RAW_FOLDER)
    else:
        remove(run.output_dir / RAW_FOLDER)  # of an earlier run in this directory
    with averaged(run.average, run.network):
        if config.lora_rank is not None:
            _save(run, run.output_dir)
        # Before the pipeline is one: diffusers finds a decoder's prior by its card.
        write_bytes(run.output_dir / CARD_FILE, model_card(run.output_dir).encode())
        if config.lora_rank is None:
            export_run(run.output_dir, pipeline, run.network, run.base, copy=config.export_pipeline)
    if config.lora_rank is not None and config.export_pipeline:
        # Not the network that learned: its own weights may have been rounded to half precision.
        fused = load_network(config.stage, run.base.path)
        load_lora(fused, run.output_dir)
        fuse_lora(fused)
        export_run(run.output_dir, pipeline, fused, run.base, copy=True)


def _save(run: TrainingRun, folder: Path) -> None:
    """Put what learned into `folder`, each part of it at once or not at all."""
    folder.mkdir(exist_ok=True)
    temporary = temporary_path(run.output_dir)
    temporary.mkdir()
    save_network(run.config.stage, run.network, temporary)
    for part in temporary.iterdir():
        _replace(part, folder / part.name)
    temporary.rmdir()


def export_run(run_dir: Path, pipeline: Pipeline, network: ModelMixin, base: Repository, *, copy: bool = False) -> None:
    """Make `run_dir` a pipeline: the trained network, the other components of `base`, and model_index.json.

    `copy` takes copies of the other components instead of links.
    """
    (run_dir / PIPELINE_FILE).unlink(missing_ok=True)
    temporary = temporary_path(run_dir)
    network.save_pretrained(temporary)
    _replace(temporary, run_dir / pipeline.network)
    for name in pipeline.components:
        if name != pipeline.network:
            _place(base.path / name, run_dir / name, copy)
    write_json(run_dir / PIPELINE_FILE, _model_index(pipeline, base))


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


def _model_index(pipeline: Pipeline, base: Repository) -> dict[str, Any]:
    components = {
        name: [COMPONENTS[name].library, COMPONENTS[name].class_name or base.read(name).values["_class_name"]]
        for name in pipeline.components
    }
    return {"_class_name": pipeline.class_name, "_diffusers_version": diffusers.__version__, **components}
