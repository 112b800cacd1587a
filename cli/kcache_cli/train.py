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
from kcache.tally import counted
from kcache.urls import hub_cache
from kcache_cli.config_file import ConfigOption
from kcache_cli.dry_run import Asked, DeviceMemoryOption, DryRunOption, JsonOption, dry_run_text
from kcache_cli.flags import with_flags
from kcache_cli.progress import Report, say, show_training

CacheArgument = Annotated[str, typer.Argument(metavar="CACHE", help="Folder or URL of the cache to train from.")]
SweepOption = Annotated[
    Path | None,
    typer.Option(
        "--sweep",
        metavar="FILE",
        help="TOML file with a [[run]] table per run: its name, and the settings that differ. Trains them one after "
        "another into folders of --output-dir, and compares them. Runs that are finished are not run again.",
    ),
]


@with_flags(TrainConfig, "prior")
def train_prior(
    context: typer.Context,
    cache: CacheArgument,
    *,
    config: ConfigOption = None,
    sweep: SweepOption = None,
    dry_run: DryRunOption = False,
    device_memory: DeviceMemoryOption = None,
    as_json: JsonOption = False,
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
      kcache train-prior caches/photos-768 --output-dir runs/prior --train-batch-size 64 --dry-run
      kcache train-prior caches/photos-768 --output-dir runs/rates --sweep rates.toml --val-fraction 0.02
      kcache train-prior caches/photos-768 --output-dir runs/baseline --online photos/ --max-train-steps 100
    """
    asked = Asked(dry_run, device_memory, as_json)
    _train("prior", context, cache, sweep, asked, settings)


@with_flags(TrainConfig, "decoder")
def train_decoder(
    context: typer.Context,
    cache: CacheArgument,
    *,
    config: ConfigOption = None,
    sweep: SweepOption = None,
    dry_run: DryRunOption = False,
    device_memory: DeviceMemoryOption = None,
    as_json: JsonOption = False,
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
      kcache train-decoder caches/photos-768 --output-dir runs/decoder --dry-run --device-memory 24GB
      kcache train-decoder caches/photos-768 --output-dir runs/rates --sweep rates.toml --val-fraction 0.02
      kcache train-decoder caches/photos-768 --output-dir runs/decoder --resume-from-checkpoint latest
    """
    asked = Asked(dry_run, device_memory, as_json)
    _train("decoder", context, cache, sweep, asked, settings)


def _train(
    stage: Literal["prior", "decoder"],
    context: typer.Context,
    cache: str,
    sweep: Path | None,
    asked: Asked,
    settings: dict[str, Any],
) -> None:
    if context.args:
        raise typer.BadParameter(
            f"found {', '.join(map(repr, [cache, *context.args]))} where one CACHE is expected; a flag takes one "
            "value: for several prompts, repeat it: --validation-prompts 'a red fox' --validation-prompts 'an owl'"
        )
    lists = {name: tuple(value) for name, value in settings.items() if isinstance(value, list)}
    config = TrainConfig(stage=stage, **(settings | lists))
    _check_launcher(config)
    _check_cache(cache)
    _check_stage(cache, config)
    if asked.check(sweep):
        _say_once(dry_run_text(cache, config, asked))
    elif sweep is None:
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


def _check_cache(cache: str) -> None:
    """Say that there is no cache before torch is loaded, which takes long; of the Hub's, loading them tells."""
    from kcache.places import place_of
    from kcache.store.manifest import read_manifest

    if hub_cache(cache) is None:
        read_manifest(place_of(cache))


def _check_stage(cache: str, config: TrainConfig) -> None:
    """Raise ConfigError for fewer --stage-bytes than streaming needs, before torch is loaded, which takes long.

    Of a selection, which may need less, and of a cache on the Hub, setting up the run tells.
    """
    is_sure = config.residency == "stream" and config.where is None and not config.val_fraction
    if config.stage_bytes is None or not is_sure or hub_cache(cache) is not None:
        return
    from kcache import Cache
    from kcache.loader.schedule import batches_of
    from kcache.loader.streaming.fetches import Layout
    from kcache.loader.streaming.ration import needs, rations
    from kcache.loader.streaming.streamed import stream_shapes
    from kcache.store.recipe import KINDS

    opened = Cache.open(cache, config.resolution, config.aspect_ratio_buckets, config.mirrored)
    fields = [name for kind in KINDS if config.stage in kind.readers for name in kind.fields]
    parts, processes = opened.by_shape(*fields), int(os.environ.get("WORLD_SIZE", "1"))
    batches = batches_of(config.train_batch_size, [(part.shape, part.resolution) for part in parts])
    shapes, sharers = stream_shapes([len(part) for part in parts]), processes if len(parts) == 1 else 1
    orders = [
        needs(Layout(part, fields, shape), shape, len(part), batch, sharers)
        for part, shape, batch in zip(parts, shapes, batches, strict=True)
    ]
    rations(orders, processes, config.stage_bytes)


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
            f"{len(failed)} of {counted(len(result.runs), 'run')} failed: {', '.join(failed)}; the reasons are "
            "above; set them right and give the same command again: finished runs are not run again"
        )


def _say_once(text: str) -> None:
    """Print data in the first of the processes that train together, which all have the same to say."""
    if int(os.environ.get("RANK", "0")) == 0:
        say(text)
