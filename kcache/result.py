"""What a finished run leaves: the trained network as a pipeline or as adapters, and a card that says how to load it."""

from pathlib import Path

from kcache.adapters import fuse_lora, load_lora
from kcache.curves import plot_run
from kcache.durable import publish, remove, temporary_path, write_bytes
from kcache.export import export_run
from kcache.modelcard import model_card
from kcache.network import load_network, save_network
from kcache.optimizer import averaged
from kcache.run_directory import read_metrics
from kcache.training_run import TrainingRun

__all__ = ["leave_result"]

RAW_FOLDER = "raw"
"""Where the weights as they were at the last step lie, when the result is their average."""


def leave_result(run: TrainingRun) -> None:
    """Write the result into the run directory: a pipeline that diffusers loads or a LoRA file, README.md and loss.png.

    With a moving average of the weights that is the result, and raw/ holds the weights as they are. With adapters and
    --export-pipeline there is a pipeline, too, whose network has them fused into its weights.
    """
    config, name = run.config, run.raw_objective.network_name
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
        write_bytes(run.output_dir / "README.md", model_card(run.output_dir).encode())
        if config.lora_rank is None:
            export_run(run.output_dir, name, run.network, run.base, copy=config.export_pipeline)
    if config.lora_rank is not None and config.export_pipeline:
        # Not the network that learned: its own weights may have been rounded to half precision.
        fused = load_network(config.stage, run.base.path)
        load_lora(fused, run.output_dir)
        fuse_lora(fused)
        export_run(run.output_dir, name, fused, run.base, copy=True)


def _save(run: TrainingRun, folder: Path) -> None:
    """Put what learned into `folder`, each part of it at once or not at all."""
    folder.mkdir(exist_ok=True)
    temporary = temporary_path(run.output_dir)
    temporary.mkdir()
    save_network(run.network, run.raw_objective.network_name, temporary)
    for part in temporary.iterdir():
        remove(folder / part.name)
        publish(part, folder / part.name)
    temporary.rmdir()
