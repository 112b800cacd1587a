"""`kcache train-prior` and `kcache train-decoder`: fine-tune one network from a cache."""

import json
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

import typer

from kcache.config import TrainConfig
from kcache.errors import ConfigError
from kcache_cli.flags import with_flags
from kcache_cli.progress import Report, say, show_training

__all__ = ["DECODER_HELP", "PRIOR_HELP", "refuse_cached_flags", "train_decoder", "train_prior"]

TRAIN_HELP = {
    "output_dir": "Run directory: configuration, metrics, checkpoints and the trained network.",
    "pretrained_prior_model_name_or_path": "Prior pipeline: folder or Hub id. The cache's own when left out.",
    "pretrained_decoder_model_name_or_path": "Decoder pipeline: folder or Hub id. The cache's own when left out.",
    "revision": "Branch, tag or commit of the Hub repositories.",
    "export_pipeline": "Copy the unchanged frozen networks into the result, instead of linking to where they are.",
    "train_batch_size": "Samples per device and forward pass.",
    "gradient_accumulation_steps": "Forward passes per optimizer step.",
    "num_train_epochs": "Passes over the samples.",
    "max_train_steps": "Optimizer steps; overrides --num-train-epochs.",
    "checkpointing_steps": "Optimizer steps between checkpoints.",
    "checkpoints_total_limit": "Keep only the newest so many checkpoints. All are kept when left out.",
    "resume_from_checkpoint": "Path of a checkpoint, or `latest`.",
    "learning_rate": "Peak learning rate of AdamW.",
    "lr_scheduler": "Schedule by its name in diffusers: constant, constant_with_warmup, linear, cosine, ….",
    "lr_warmup_steps": "Optimizer steps of warm-up, for the schedules that have one.",
    "adam_beta1": "Decay of AdamW's mean of gradients.",
    "adam_beta2": "Decay of AdamW's mean of squared gradients.",
    "adam_weight_decay": "Weight decay of AdamW.",
    "adam_epsilon": "Added to AdamW's denominator.",
    "max_grad_norm": "Gradients are scaled down to this norm before each optimizer step.",
    "snr_gamma": "Min-SNR weighting (arXiv 2303.09556), 5.0 in the paper. All timesteps weigh alike when left out.",
    "mixed_precision": "Autocast dtype of forward and backward; weights and optimizer stay float32.",
    "allow_tf32": "Let float32 matrix products use TF32 on CUDA.",
    "residency": "Where the rows wait: whole tables in RAM, or memory-mapped files. `auto` decides by size.",
    "shuffle": "A new permutation of all samples each epoch, or of blocks of neighbours for slow disks.",
    "seed": "Decides order, captions, noise and timesteps.",
    "deterministic": "Use only deterministic CUDA kernels, so that a run can be repeated bit for bit.",
    "where": 'Train only on samples for which this holds, such as "width >= 512 and tokens <= 40".',
    "online": "A source, as for cache-build: run the frozen encoders in the loop instead of reading their rows.",
    "image_column": "Column of the --online source that holds the image.",
    "caption_column": "Column of the --online source that holds the captions.",
}
PRIOR_HELP = TRAIN_HELP | {
    "caption_dropout": "Share of samples that come without their caption, for classifier-free guidance.",
}
DECODER_HELP = TRAIN_HELP | {
    "resolution": "Which latents to read, by their side in pixels. The only ones there are when left out.",
    "image_dropout": "Share of samples that come without their image embedding, for classifier-free guidance.",
}

DECIDED_BY_CACHE = (
    "--dataset-name",
    "--dataset-config-name",
    "--train-data-dir",
    "--max-train-samples",
)
"""Flags of diffusers' training scripts that say what the cache already is."""

CacheArgument = Annotated[str, typer.Argument(metavar="CACHE", help="Folder of the cache to train from.")]


@with_flags(TrainConfig, PRIOR_HELP)
def train_prior(cache: CacheArgument, **settings: Any) -> None:
    """Train the prior: from caption to image embedding.

    \b
    On several processes:
      accelerate launch -m kcache_cli train-prior CACHE --output-dir RUN

    \b
    Examples:
      kcache train-prior caches/photos-768 --output-dir runs/prior --train-batch-size 64 --max-train-steps 10000
      kcache train-prior caches/photos-768 --output-dir runs/prior --resume-from-checkpoint latest
      kcache train-prior caches/photos-768 --output-dir runs/baseline --online photos/ --max-train-steps 100
    """
    _train("prior", cache, settings)


@with_flags(TrainConfig, DECODER_HELP)
def train_decoder(cache: CacheArgument, **settings: Any) -> None:
    """Train the decoder: from image embedding to picture.

    \b
    On several processes:
      accelerate launch -m kcache_cli train-decoder CACHE --output-dir RUN

    \b
    Examples:
      kcache train-decoder caches/photos-768 --output-dir runs/decoder --train-batch-size 8 --max-train-steps 10000
      kcache train-decoder caches/photos --output-dir runs/decoder-512 --resolution 512 --mixed-precision bf16
      kcache train-decoder caches/photos-768 --output-dir runs/decoder --resume-from-checkpoint latest
    """
    _train("decoder", cache, settings)


def refuse_cached_flags(arguments: Sequence[str]) -> None:
    """Refuse flags of diffusers' training scripts that a cache makes meaningless, with the line to type instead."""
    if not arguments or arguments[0] not in ("train-prior", "train-decoder"):
        return
    for argument in arguments[1:]:
        flag = argument.partition("=")[0]
        if flag in DECIDED_BY_CACHE:
            raise ConfigError(
                f"{flag} was given to {arguments[0]}; the cache decides what is trained on; give it when the cache is "
                "built: kcache cache-build SOURCE CACHE, where SOURCE is the data set's folder or Hub id"
            )


def _train(stage: Literal["prior", "decoder"], cache: str, settings: dict[str, Any]) -> None:
    from kcache.trainer import train

    config = TrainConfig(stage=stage, **settings)
    with Report() as report:
        result = train(cache, config, report=partial(show_training, report, stage))
    say(json.dumps(result.__dict__))
