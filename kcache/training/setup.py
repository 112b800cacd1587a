"""A training run set up: its parts loaded and put together, once they were found and checked against each other."""

from pathlib import Path

import numpy as np
from accelerate import Accelerator

from kcache.config import TrainConfig
from kcache.encoders.repositories import PIPELINES, Repository
from kcache.loader.batches import CacheLoader
from kcache.loader.parts import RowReader, ShapedReader
from kcache.loader.turns import draw_turns
from kcache.objectives.inpainting import OWN_MASKS
from kcache.objectives.losses import Objective
from kcache.sources import open_source
from kcache.store.cache import Cache
from kcache.store.checkpoint import Checkpoint
from kcache.training.accelerator import wait_for_all
from kcache.training.choice import check_cache_fits, choose_run, tables_read
from kcache.training.network.objective import load_objective
from kcache.training.optimizer.average import make_average
from kcache.training.optimizer.libraries import make_optimizer
from kcache.training.optimizer.schedule import make_schedule
from kcache.training.preservation.rows import TABLE, ClassRows
from kcache.training.resume import check_same_run, last_step, take_place
from kcache.training.run import TrainingRun


def prepare_run(cache: str | Path | Cache, config: TrainConfig) -> TrainingRun:
    """Find, check and load everything that training from `cache` needs; what is quickly refused comes first.

    Raises the KcacheError of whatever is missing or does not fit together.
    """
    chosen = choose_run(cache, config)
    accelerator, base, checkpoint = chosen.accelerator, chosen.base, chosen.checkpoint
    cache, parts, saved = chosen.cache, chosen.parts, None if checkpoint is None else checkpoint.path
    kept = _find_class_rows(config, base, accelerator, checkpoint)
    objective = load_objective(config, base, saved, shaped=len(parts) > 1, own_masks=OWN_MASKS in chosen.controls)
    check_cache_fits(cache, objective, base)
    tables = tables_read(parts, objective)
    if kept is not None:
        tables[TABLE] = kept.fingerprint

    global_batch = config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    if checkpoint is not None:
        check_same_run(checkpoint, global_batch, tables, config.new_order)
    objective.to(accelerator.device)
    # Made where the weights lie, and before the objective is wrapped.
    average = make_average(objective.network, config) if config.use_ema else None
    made = make_optimizer(objective.network, config, accelerator.device)
    wait_for_all()  # one may have fetched, read and digested longer than another waits in what follows
    prepared, optimizer = accelerator.prepare(objective.train(), made)
    loader = _make_loader(cache, objective, config, accelerator, kept)
    wait_for_all()  # one may have copied shards longer
    if checkpoint is not None:
        take_place(loader, checkpoint, chosen.new_order)
    max_steps = last_step(loader.batches_until, config, checkpoint)
    run = TrainingRun(
        config=config,
        cache=cache,
        tables=tables,
        base=base,
        accelerator=accelerator,
        raw_objective=objective,
        objective=prepared,
        optimizer=optimizer,
        lr_scheduler=make_schedule(optimizer, config, max_steps),
        loader=loader,
        global_batch=global_batch,
        max_steps=max_steps,
        counterpart_name=chosen.counterpart_name,
        counterpart=chosen.counterpart,
        average=average,
        held_out=chosen.held_out,
        adapted=chosen.adapted,
        class_rows=kept,
        new_order=chosen.new_order,
        base_facts={name: base.read(name) for name in PIPELINES[config.stage].components},
    )
    if checkpoint is not None:
        run.restore(checkpoint)
    return run


def _find_class_rows(
    config: TrainConfig, base: Repository, accelerator: Accelerator, checkpoint: Checkpoint | None
) -> ClassRows | None:
    if not config.class_prompt:
        return None
    # Not at the top: the pipelines bring the encoders' libraries with them, which few runs need.
    from kcache.training.preservation.drawing import class_rows_of

    return class_rows_of(config, base, accelerator, checkpoint)


def _make_loader(
    cache: Cache, objective: Objective, config: TrainConfig, accelerator: Accelerator, kept: ClassRows | None = None
) -> CacheLoader:
    fields = tuple(objective.row_shapes)
    shapes = {part.shape: part.field(objective.noised_field).shape for part in cache.by_shape(*fields)}
    timesteps = objective.scheduler.config.num_train_timesteps

    def draws(turns: np.ndarray, rows: ShapedReader | None = None) -> dict[str, np.ndarray]:
        """The noise has the shape of the batch's own rows."""
        shape = shapes[rows.shape] if rows is not None else next(iter(shapes.values()))
        own = draw_turns(
            config.seed, turns, shape, timesteps, config.noise_draws, drawn=objective.drawn, growth=config.mask_growth,
            own_share=objective.own_share,
        )  # fmt: skip
        if kept is None:
            return own
        draws, dropout = config.noise_draws, config.caption_dropout
        return own | kept.beside(turns, seed=config.seed, timesteps=timesteps, draws=draws, dropout=dropout)

    rows: RowReader = cache
    if config.online is not None:
        # Not at the top: a run from a cache needs neither encoders nor what reads a source.
        from kcache.encoders.online import OnlineEncoders

        source = open_source(config.online, config, need_captions=False)
        rows = OnlineEncoders(cache, source, fields, accelerator.device)
    return CacheLoader(
        rows,
        fields,
        config.train_batch_size,
        seed=config.seed,
        shuffle=config.shuffle,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        device=accelerator.device,
        residency=config.residency,
        stage_bytes=config.stage_bytes,
        stage_dir=config.stage_dir,
        caption_dropout=config.caption_dropout if objective.dropped == "caption" else 0.0,
        image_dropout=config.image_dropout if objective.dropped == "image" else 0.0,
        draws=draws,
    )
