"""`kcache train-prior` and `kcache train-decoder`: fine-tune one network from a cache."""

import json
import os
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from kcache.config import TrainConfig
from kcache.errors import ConfigError, RunError
from kcache_cli.config_file import ConfigOption
from kcache_cli.flags import with_flags
from kcache_cli.progress import Report, count_text, say, show_training

TRAIN_HELP = {
    "output_dir": "Run directory: configuration, metrics, checkpoints and the trained network.",
    "pretrained_prior_model_name_or_path": "Prior pipeline: folder or Hub id. The cache's own when left out.",
    "pretrained_decoder_model_name_or_path": "Decoder pipeline: folder or Hub id. The cache's own when left out.",
    "revision": "Branch, tag or commit of the Hub repositories.",
    "cache_dir": "Folder for downloaded repositories. The Hub's own (HF_HOME) when left out.",
    "export_pipeline": "Copy the unchanged frozen networks into the result, instead of linking to where they are.",
    "train_batch_size": "Samples per device and forward pass.",
    "gradient_accumulation_steps": "Forward passes per optimizer step.",
    "num_train_epochs": "Passes over the samples.",
    "max_train_steps": "Optimizer steps; overrides --num-train-epochs.",
    "checkpointing_steps": "Optimizer steps between checkpoints.",
    "checkpoints_total_limit": "Keep only the newest so many checkpoints. All are kept when left out.",
    "resume_from_checkpoint": "Path of a checkpoint, or `latest`.",
    "learning_rate": "Peak learning rate of AdamW.",
    "lr_scheduler": "Schedule by its name in diffusers.",
    "lr_warmup_steps": "Optimizer steps of warm-up, for the schedules that have one.",
    "adam_beta1": "Decay of AdamW's mean of gradients.",
    "adam_beta2": "Decay of AdamW's mean of squared gradients.",
    "adam_weight_decay": "Weight decay of AdamW.",
    "adam_epsilon": "Added to AdamW's denominator.",
    "max_grad_norm": "Gradients are scaled down to this norm before each optimizer step.",
    "use_8bit_adam": "Keep AdamW's state in 8 bits; needs the package bitsandbytes.",
    "use_ema": "Average the weights over the steps. The average is the result, and the raw weights stay beside it.",
    "ema_decay": "Share of itself that the average keeps in a step, once it is warm.",
    "lora_rank": "Train low-rank adapters of this rank. The network's own weights are trained when left out.",
    "lora_alpha": "The adapters' output is scaled by alpha / rank. As large as the rank when left out.",
    "lora_dropout": "Share of the adapters' inputs that are zeroed in training.",
    "lora_target_modules": "A layer that gets adapters, such as to_q; repeat it. All of the attention when left out.",
    "snr_gamma": "Min-SNR weighting (arXiv 2303.09556), 5.0 in the paper. All timesteps weigh alike when left out.",
    "mixed_precision": "Autocast dtype of forward and backward; weights and optimizer stay float32.",
    "allow_tf32": "Let float32 matrix products use TF32 on CUDA.",
    "gradient_checkpointing": "Compute activations again in the backward pass: less memory, more time.",
    "attention": "Who computes attention: torch's own kernels, or xformers.",
    "compile": "Let torch.compile make kernels for the network's blocks: the first steps wait for them.",
    "validation_epochs": "Passes over the samples between validations; there is always one at the end.",
    "validation_steps": "Optimizer steps between validations; overrides --validation-epochs.",
    "val_fraction": "Share of the images held out for validation, the same ones in every run.",
    "validation_prompts": "A prompt that is drawn at each validation, always from the same noise; repeat it.",
    "num_validation_images": "Pictures per validation prompt.",
    "report_to": "Tracker beside metrics.jsonl: tensorboard (if installed), wandb, comet_ml, …, `all` or `none`.",
    "tracker_project_name": "What the tracker calls the project.",
    "logging_dir": "Folder in the run directory for trackers that write files.",
    "push_to_hub": "Upload the result to the Hub when training is done; set HF_TOKEN, or run `hf auth login`, before.",
    "hub_model_id": "Repository to upload to, such as me/fox. Yours, named like the run directory, when left out.",
    "residency": "Where the rows wait: whole tables on the GPU or in RAM, or mapped files. `auto` decides by size.",
    "shuffle": "A new permutation of all samples each epoch, or of blocks of neighbours for slow disks.",
    "seed": "Decides order, captions, noise and timesteps.",
    "deterministic": "Use only deterministic CUDA kernels, so that a run can be repeated bit for bit.",
    "where": 'Train only on samples for which this holds, such as "width >= 512 and tokens <= 40".',
    "online": "A source, as for cache-build: run the frozen encoders in the loop instead of reading their rows.",
    "image_column": "Column of the --online source that holds the image.",
    "caption_column": "Column of the --online source that holds the captions.",
}
PRIOR_HELP = TRAIN_HELP | {
    "packing": "Leave the padding of captions out of the network: less arithmetic, the same result.",
    "noise_draws": "Draws of noise and timestep per caption and step; packed, they share the work on its text.",
    "caption_dropout": "Share of samples that come without their caption, for classifier-free guidance.",
}
DECODER_HELP = TRAIN_HELP | {
    "resolution": "Which latents to read, by their side in pixels. The only ones there are when left out.",
    "image_dropout": "Share of samples that come without their image embedding, for classifier-free guidance.",
}

CacheArgument = Annotated[str, typer.Argument(metavar="CACHE", help="Folder of the cache to train from.")]
SweepOption = Annotated[
    Path | None,
    typer.Option(
        "--sweep",
        metavar="FILE",
        help="TOML file with a [[run]] table per run: its name, and the settings that differ. Trains them one after "
        "another into folders of --output-dir, and compares them. Runs that are finished are not run again.",
    ),
]


@with_flags(TrainConfig, PRIOR_HELP)
def train_prior(
    context: typer.Context,
    cache: CacheArgument,
    *,
    config: ConfigOption = None,
    sweep: SweepOption = None,
    **settings: Any,
) -> None:
    """Train the prior: from caption to image embedding.

    \b
    On several processes:
      accelerate launch -m kcache_cli train-prior CACHE --output-dir RUN

    \b
    Examples:
      kcache train-prior caches/photos-768 --output-dir runs/prior --train-batch-size 64 --max-train-steps 10000
      kcache train-prior caches/photos-768 --output-dir runs/prior --resume-from-checkpoint latest
      kcache train-prior caches/photos-768 --output-dir runs/lora --lora-rank 16 --validation-prompts "a red fox"
      kcache train-prior --config run.toml --learning-rate 3e-5
      kcache train-prior caches/photos-768 --output-dir runs/rates --sweep rates.toml --val-fraction 0.02
      kcache train-prior caches/photos-768 --output-dir runs/baseline --online photos/ --max-train-steps 100
    """
    _train("prior", context, cache, sweep, settings)


@with_flags(TrainConfig, DECODER_HELP)
def train_decoder(
    context: typer.Context,
    cache: CacheArgument,
    *,
    config: ConfigOption = None,
    sweep: SweepOption = None,
    **settings: Any,
) -> None:
    """Train the decoder: from image embedding to picture.

    \b
    On several processes:
      accelerate launch -m kcache_cli train-decoder CACHE --output-dir RUN

    \b
    Examples:
      kcache train-decoder caches/photos-768 --output-dir runs/decoder --train-batch-size 8 --max-train-steps 10000
      kcache train-decoder caches/photos --output-dir runs/decoder-512 --resolution 512 --mixed-precision bf16
      kcache train-decoder caches/photos-768 --output-dir runs/lora --lora-rank 16 --validation-prompts "a red fox"
      kcache train-decoder --config run.toml --learning-rate 3e-5
      kcache train-decoder caches/photos-768 --output-dir runs/rates --sweep rates.toml --val-fraction 0.02
      kcache train-decoder caches/photos-768 --output-dir runs/decoder --resume-from-checkpoint latest
    """
    _train("decoder", context, cache, sweep, settings)


def _train(
    stage: Literal["prior", "decoder"], context: typer.Context, cache: str, sweep: Path | None, settings: dict[str, Any]
) -> None:
    if context.args:
        raise typer.BadParameter(
            f"found {', '.join(map(repr, [cache, *context.args]))} where one CACHE is expected; a flag takes one "
            "value: for several prompts, repeat it: --validation-prompts 'a red fox' --validation-prompts 'an owl'"
        )
    lists = {name: tuple(value) for name, value in settings.items() if isinstance(value, list)}
    config = TrainConfig(stage=stage, **(settings | lists))
    _check_launcher(config)
    if sweep is None:
        _run(cache, config)
    else:
        _sweep(cache, config, sweep)


def _check_launcher(config: TrainConfig) -> None:
    """Raise ConfigError when accelerate's launcher was told another precision: the run would not compute in it."""
    told = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if told not in ("no", config.mixed_precision):
        raise ConfigError(
            f"accelerate's launcher, or its configuration file, says mixed precision {told}, the run "
            f"{config.mixed_precision}; expected the run's own flag, which it keeps in its config.json; give it "
            f"--mixed-precision {told}, or say no to the launcher: accelerate launch --mixed_precision no"
        )


def _run(cache: str, config: TrainConfig) -> None:
    from kcache.training.trainer import train

    with Report() as report:
        result = train(cache, config, report=partial(show_training, report, config.stage))
    _say_once(json.dumps(asdict(result)))


def _sweep(cache: str, config: TrainConfig, sweep: Path) -> None:
    from kcache.training.sweep import run_sweep

    with Report() as report:
        result = run_sweep(cache, config, sweep, report=partial(show_training, report), say=report.note)
    _say_once(result.table)
    failed = [run.name for run in result.runs if run.error is not None]
    if failed:
        raise RunError(
            f"{len(failed)} of {count_text(len(result.runs), 'run')} failed: {', '.join(failed)}; the reasons are "
            "above; set them right and give the same command again: finished runs are not run again"
        )


def _say_once(text: str) -> None:
    """Print data in the first of the processes that train together, which all have the same to say."""
    if int(os.environ.get("RANK", "0")) == 0:
        say(text)
