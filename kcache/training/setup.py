"""A training run set up: its parts found, checked against each other, loaded and put together."""

import math
from functools import partial
from pathlib import Path

from accelerate import Accelerator

from kcache.config import TrainConfig
from kcache.encoders.repositories import PIPELINES, Repository, find_repository, weights_digest
from kcache.errors import CacheIncompleteError, CacheMismatchError
from kcache.loader.batches import CacheLoader, RowReader
from kcache.loader.chance import draw_turns
from kcache.objectives.blocks import check_attention, check_compiler
from kcache.objectives.losses import OBJECTIVES, Objective
from kcache.sources import open_source
from kcache.store.cache import Cache
from kcache.store.checkpoint import Checkpoint
from kcache.store.digests import DigestMemo
from kcache.store.manifest import MODEL_SETTINGS
from kcache.store.recipe import KINDS, TEXT, kind_of
from kcache.training.accelerator import make_accelerator, wait_for_all
from kcache.training.network import find_adapted, load_objective
from kcache.training.optimizer import check_optimizer, make_average, make_optimizer, make_schedule
from kcache.training.resume import check_same_base, check_same_run, checkpoint_to_resume
from kcache.training.run import TrainingRun
from kcache.training.validation import split_by_key


def prepare_run(cache: str | Path | Cache, config: TrainConfig) -> TrainingRun:
    """Find, check and load everything that training from `cache` needs; what is quickly refused comes first.

    Raises the KcacheError of whatever is missing or does not fit together.
    """
    check_optimizer(config)
    check_attention(config.attention, OBJECTIVES[config.stage].network_class)
    accelerator = make_accelerator(config)
    if config.compile:
        check_compiler(accelerator.device)
    cache, held_out = _choose_samples(cache, config)
    base = _find_base(cache, config)
    counterpart_name, counterpart = _find_counterpart(cache, config)
    checkpoint, adapted = checkpoint_to_resume(config), find_adapted(config, base)
    check_same_base(checkpoint, config, adapted)
    objective = load_objective(config, base, None if checkpoint is None else checkpoint.path)
    check_cache_fits(cache, objective, base)
    tables = {name: cache.recipes[name].fingerprint for name in map(cache.table_of, objective.row_shapes)}

    global_batch = config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    if checkpoint is not None:
        check_same_run(checkpoint, global_batch, tables)
    max_steps = config.max_train_steps or _steps_until(config.num_train_epochs * len(cache), global_batch, checkpoint)
    objective.to(accelerator.device)
    # Made where the weights lie, and before the objective is wrapped.
    average = make_average(objective.network, config) if config.use_ema else None
    made = make_optimizer(objective.network, config, accelerator.device)
    wait_for_all()  # one may have fetched, read and digested longer than another waits in what follows
    prepared, optimizer = accelerator.prepare(objective.train(), made)
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
        loader=_make_loader(cache, objective, config, accelerator),
        global_batch=global_batch,
        max_steps=max_steps,
        counterpart_name=counterpart_name,
        counterpart=counterpart,
        average=average,
        held_out=held_out,
        adapted=adapted,
    )
    if checkpoint is not None:
        run.restore(checkpoint)
    return run


def _choose_samples(cache: str | Path | Cache, config: TrainConfig) -> tuple[Cache, Cache | None]:
    """The samples to train on, and those held out, if any."""
    opened = cache if isinstance(cache, Cache) else Cache.open(cache, config.resolution)
    if config.where is not None:
        opened = opened.where(config.where)
    return split_by_key(opened, config.val_fraction) if config.val_fraction else (opened, None)


def _find_base(cache: Cache, config: TrainConfig) -> Repository:
    """The repository whose network is trained: the one named, else the one that the cache was built with."""
    # What the cache has not, or has in several resolutions, is said before anything is fetched.
    for kind in KINDS:
        if config.stage in kind.readers:
            cache.table_of(kind.fields[0])
    name, revision = getattr(config, MODEL_SETTINGS[config.stage]), config.revision
    if name is None:
        origin = cache.models[config.stage]
        name, revision = str(origin["name"]), revision or origin["revision"]
    return find_repository(name, revision, PIPELINES[config.stage].components, config.cache_dir)


def _find_counterpart(cache: Cache, config: TrainConfig) -> tuple[str, Repository | None]:
    """The half that does not learn: the one named, the cache's, or the published one; found if it is to draw."""
    half = PIPELINES[config.stage].other
    origin = cache.models.get(half, {})
    name = getattr(config, MODEL_SETTINGS[half]) or str(origin.get("name") or PIPELINES[half].published)
    if not config.validation_prompts:
        return name, None
    # A --revision is of the repository that is trained, and names nothing in this one.
    revision = origin.get("revision") if origin.get("name") == name else None
    return name, find_repository(name, revision, PIPELINES[half].components, config.cache_dir)


def _steps_until(samples: int, global_batch: int, checkpoint: Checkpoint | None) -> int:
    """Optimizer steps until `samples` have been seen, those before the checkpoint counted as they were."""
    if checkpoint is None:
        return math.ceil(samples / global_batch)
    return checkpoint.step + math.ceil(max(0, samples - checkpoint.state["samples_seen"]) / global_batch)


def check_cache_fits(cache: Cache, objective: Objective, repository: Repository) -> None:
    """Check that `cache` holds what `objective` reads, made by the encoders that `repository` has.

    A decoder repository has no image encoder, so its image_embeds are compared by shape only. Raises
    CacheIncompleteError for a missing table, CacheMismatchError for another encoder or shape, each with what was found
    and what to do.
    """
    if len(cache) == 0:
        raise CacheIncompleteError(f"{cache.path} has no samples; its rejected.jsonl says what was refused and why")
    for field, expected in objective.row_shapes.items():
        found = cache.field(field).shape
        fits = len(found) == len(expected) and all(e in (None, f) for f, e in zip(found, expected, strict=True))
        if not fits:
            wanted = ", ".join("any" if side is None else str(side) for side in expected)
            raise CacheMismatchError(
                f"{cache.path} has {field} of shape {found}; {repository.name} wants ({wanted}); "
                "build the cache with the encoders that belong to this model, or train the model they belong to"
            )
    if objective.most_tokens is not None:
        longest, most = cache.recipes[TEXT.name].batch_shape[1], objective.most_tokens
        if longest > most:
            raise CacheMismatchError(
                f"{cache.path} has captions of up to {longest} tokens; {repository.name} takes {most}; "
                "build the cache with the tokenizer that belongs to this model"
            )
    with DigestMemo() as memo:
        for table in dict.fromkeys(map(cache.table_of, objective.row_shapes)):
            component = kind_of(table).component
            if (repository.path / component).is_dir():
                _check_encoder(cache, table, repository, component, memo)


def _check_encoder(cache: Cache, table: str, repository: Repository, component: str, memo: DigestMemo) -> None:
    found, expected = cache.recipes[table].weights, weights_digest(repository, component, memo)
    if found != expected:
        origins = ", ".join(f"{half}: {model['name']}" for half, model in cache.models.items())
        raise CacheMismatchError(
            f"{table} of {cache.path} was made with the {component} weights {found[:12]}…; "
            f"{repository.name} has {expected[:12]}…; train from the repository that the cache was built with "
            f"({origins}), or build the cache again with this one"
        )


def _make_loader(cache: Cache, objective: Objective, config: TrainConfig, accelerator: Accelerator) -> CacheLoader:
    fields = tuple(objective.row_shapes)
    draws = partial(
        draw_turns,
        config.seed,
        shape=cache.field(objective.noised_field).shape,
        num_train_timesteps=objective.scheduler.config.num_train_timesteps,
        draws=config.noise_draws,
    )
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
        caption_dropout=config.caption_dropout if objective.dropped == "caption" else 0.0,
        image_dropout=config.image_dropout if objective.dropped == "image" else 0.0,
        draws=draws,
    )
