"""A training run set up: its parts found, checked against each other, loaded and put together."""

from itertools import product
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from kcache.config import TrainConfig
from kcache.config.source import flag_of
from kcache.disk.memo import DigestMemo
from kcache.encoders.repositories import PIPELINES, Repository, check_revision, find_repository
from kcache.encoders.weights import weights_digest
from kcache.errors import CacheIncompleteError, CacheMismatchError, ConfigError, ModelError
from kcache.loader.batches import CacheLoader
from kcache.loader.parts import RowReader, ShapedReader
from kcache.loader.schedule import batches_of
from kcache.loader.turns import draw_turns
from kcache.objectives.blocks import check_attention, check_compiler
from kcache.objectives.inpainting import OWN_MASKS
from kcache.objectives.losses import OBJECTIVES, Objective
from kcache.settings import idle
from kcache.sources import open_source
from kcache.store.cache import Cache
from kcache.store.checkpoint import Checkpoint
from kcache.store.recipe import HINT, KINDS, LOSS_MASKS, MASKS, TEXT, control_kind, controls_of, kind_of
from kcache.store.recorded import MODEL_SETTINGS
from kcache.store.run_directory import logger
from kcache.training.accelerator import make_accelerator, wait_for_all
from kcache.training.network.decoder import check_decoder
from kcache.training.network.limits import check_batch
from kcache.training.network.objective import load_objective
from kcache.training.network.saved import find_adapted
from kcache.training.optimizer.average import make_average
from kcache.training.optimizer.libraries import check_optimizer, check_placement, make_optimizer
from kcache.training.optimizer.schedule import make_schedule
from kcache.training.preservation.rows import TABLE, ClassRows
from kcache.training.resume import (
    adapted_weights,
    check_same_base,
    check_same_run,
    check_same_samples,
    checkpoint_to_resume,
    last_step,
    take_place,
)
from kcache.training.run import TrainingRun
from kcache.training.validation import split_by_key


def prepare_run(cache: str | Path | Cache, config: TrainConfig) -> TrainingRun:
    """Find, check and load everything that training from `cache` needs; what is quickly refused comes first.

    Raises the KcacheError of whatever is missing or does not fit together.
    """
    for reason in idle(config).values():
        logger.warning("%s", reason)
    check_optimizer(config)
    check_attention(config.attention, OBJECTIVES[config.stage].network_class)
    accelerator = make_accelerator(config)
    check_placement(config, accelerator.device, accelerator.num_processes)
    if config.residency == "gpu" and accelerator.device.type == "cpu":
        raise ConfigError(
            "--residency gpu was given, but the run computes on the CPU; expected a GPU that can hold the rows; give "
            "--residency auto, ram or mmap"
        )
    if config.compile:
        check_compiler(accelerator.device)
    cache, held_out = _choose_samples(cache, config)
    base = _find_base(cache, config)
    check_decoder(config, base)
    counterpart_name, counterpart = _find_counterpart(cache, config)
    checkpoint = checkpoint_to_resume(config)
    adapted = find_adapted(config, base, None if checkpoint is None else adapted_weights(checkpoint))
    check_same_base(checkpoint, config, base, adapted)
    controls = control_fields(cache, config)
    parts = cache.by_shape(*_fields(config), *controls)
    new_order = check_same_samples(checkpoint, cache, parts, config)
    batches = batches_of(config.train_batch_size, [(part.shape, part.resolution) for part in parts])
    for part, batch in zip(parts, batches, strict=True):
        noised = part.field(OBJECTIVES[config.stage].noised_field).shape
        check_batch(config, base, noised, batch * (2 if config.class_prompt else 1))
    saved = None if checkpoint is None else checkpoint.path
    kept = _find_class_rows(config, base, accelerator, checkpoint)
    objective = load_objective(config, base, saved, shaped=len(parts) > 1, own_masks=OWN_MASKS in controls)
    check_cache_fits(cache, objective, base)
    names = {part.table_of(field) for part in parts for field in objective.row_shapes}
    tables = {name: cache.recipes[name].fingerprint for name in sorted(names)}
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
        take_place(loader, checkpoint, new_order)
    max_steps = last_step(loader, config, checkpoint)
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
        counterpart_name=counterpart_name,
        counterpart=counterpart,
        average=average,
        held_out=held_out,
        adapted=adapted,
        class_rows=kept,
        new_order=new_order,
        base_facts={name: base.read(name) for name in PIPELINES[config.stage].components},
    )
    if checkpoint is not None:
        run.restore(checkpoint)
    return run


def _choose_samples(cache: str | Path | Cache, config: TrainConfig) -> tuple[Cache, Cache | None]:
    """The samples to train on, and those held out, if any."""
    if isinstance(cache, Cache):
        opened = cache
    else:
        opened = Cache.open(cache, config.resolution, config.aspect_ratio_buckets, config.mirrored)
    if config.where is not None:
        opened = opened.where(config.where)
    having = opened.having(*_fields(config), *control_fields(opened, config))
    if len(having) < len(opened):
        logger.warning(
            "%s of %s samples have no row at the resolutions that are read, as their pictures are too small, and are "
            "left out",
            f"{len(opened) - len(having):,}",
            f"{len(opened):,}",
        )
        opened = having
    return split_by_key(opened, config.val_fraction) if config.val_fraction else (opened, None)


def _fields(config: TrainConfig) -> tuple[str, ...]:
    """The fields that the stage reads."""
    return tuple(field for kind in KINDS if config.stage in kind.readers for field in kind.fields)


def control_fields(cache: Cache, config: TrainConfig) -> tuple[str, ...]:
    """The fields of control images that a run reads: its hint, its loss masks, and masks of the samples' own.

    Raises CacheIncompleteError for one that the cache has not got.
    """
    there = controls_of(cache.recipes)
    asked = {
        "hint": None if config.hint is None else HINT + config.hint,
        "mask_share": MASKS if config.inpaint and config.mask_share != 0 else None,
        "loss_mask": LOSS_MASKS if config.loss_mask else None,
    }
    if config.mask_share is None and MASKS not in there:
        del asked["mask_share"]
    for setting, kind in asked.items():
        if kind is not None and kind not in there:
            hints = [name.removeprefix(HINT) for name in there if name.startswith(HINT)]
            has = f"its hints are {', '.join(hints)}" if hints and setting == "hint" else "it has none"
            raise CacheIncompleteError(
                f"--{setting.replace('_', '-')} {getattr(config, setting)} wants {kind}, of which {cache.path} has no "
                f"rows: {has}; build it again with {flag_of(kind)}, or leave the flag out"
            )
    kinds = [kind for kind in asked.values() if kind is not None]
    if config.online is not None:
        config.check_told(f"--online {config.online}", cache.path, kinds)
    return tuple(control_kind(kind).fields[0] for kind in kinds)


def _find_base(cache: Cache, config: TrainConfig) -> Repository:
    """The repository whose network is trained: the one named, else the one that the cache was built with."""
    # What the cache has not, or has in several resolutions, is said before anything is fetched.
    for kind in KINDS:
        if config.stage in kind.readers:
            for part in cache.by_shape(kind.fields[0]):
                part.table_of(kind.fields[0])
    return _find_half(cache, config, config.stage, config.revision)[1]


def _find_counterpart(cache: Cache, config: TrainConfig) -> tuple[str, Repository | None]:
    """The half that does not learn: the one named, the cache's, or the published one; found if it is to draw."""
    half = PIPELINES[config.stage].other
    if config.validation_prompts:
        return _find_half(cache, config, half)
    origin = cache.models.get(half, {})
    return getattr(config, MODEL_SETTINGS[half]) or str(origin.get("name") or PIPELINES[half].published), None


def _find_half(cache: Cache, config: TrainConfig, half: str, revision: str | None = None) -> tuple[str, Repository]:
    """Name and repository of a half of Kandinsky 2.2: of the one named, else the cache's, else the published one.

    `revision` is what --revision says of it; the half's own flag says so, too.
    """
    flag = f"--{half}-revision"
    own = getattr(config, f"{half}_revision")
    flag, revision = (flag, own) if own is not None else ("--revision", revision)
    given, origin = getattr(config, MODEL_SETTINGS[half]), cache.models.get(half, {})
    name = given or str(origin.get("name") or PIPELINES[half].published)
    check_revision(flag, name, revision)
    if revision is None and name == origin.get("name"):
        revision = origin.get("revision")
    try:
        return name, find_repository(name, revision, PIPELINES[half].components, config.cache_dir)
    except ModelError as error:
        if given is not None:
            raise
        raise ModelError(
            f"{error}; {cache.path} was built with it: give its place now by --{MODEL_SETTINGS[half].replace('_', '-')}"
        ) from error


def check_cache_fits(cache: Cache, objective: Objective, repository: Repository) -> None:
    """Check that `cache` holds what `objective` reads, made by the encoders that `repository` has.

    A decoder repository has no image encoder, so its image_embeds are compared by shape only. Raises
    CacheIncompleteError for a missing table, CacheMismatchError for another encoder or shape, each with what was found
    and what to do.
    """
    if len(cache) == 0:
        raise CacheIncompleteError(f"{cache.path} has no samples; its rejected.jsonl says what was refused and why")
    parts = cache.by_shape(*objective.row_shapes)
    for part, (field, expected) in product(parts, objective.row_shapes.items()):
        if part.is_packed(field):
            continue  # as large as the latents' pictures, or as the latents themselves
        found = part.field(field).shape
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
        for table in dict.fromkeys(part.table_of(field) for part in parts for field in objective.row_shapes):
            component = kind_of(table).component
            if component and (repository.path / component).is_dir():
                _check_encoder(cache, table, repository, component, memo)


def _check_encoder(cache: Cache, table: str, repository: Repository, component: str, memo: DigestMemo) -> None:
    found = cache.recipes[table].weights
    expected = weights_digest(repository, component, memo, known=found)
    if found != expected:
        origins = ", ".join(f"{half}: {model['name']}" for half, model in cache.models.items())
        raise CacheMismatchError(
            f"{table} of {cache.path} was made with the {component} weights {found[:12]}…; "
            f"{repository.name} has {expected[:12]}…; train from the repository that the cache was built with "
            f"({origins}), or build the cache again with this one"
        )


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
