"""What a run is made of, found and checked against each other, before anything is loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from accelerate import Accelerator

from kcache.config import TrainConfig
from kcache.config.source import flag_of
from kcache.disk.memo import DigestMemo
from kcache.encoders.repositories import PIPELINES, Repository, check_revision, find_repository
from kcache.encoders.weights import weights_digest, weights_files
from kcache.errors import CacheIncompleteError, CacheMismatchError, ConfigError, ModelError
from kcache.loader.schedule import batches_of
from kcache.objectives.blocks import check_attention, check_compiler
from kcache.objectives.losses import OBJECTIVES, Objective
from kcache.settings import idle
from kcache.store.cache import Cache
from kcache.store.checkpoint import Checkpoint
from kcache.store.recipe import HINT, KINDS, LOSS_MASKS, MASKS, TEXT, control_kind, controls_of, kind_of
from kcache.store.recorded import MODEL_SETTINGS
from kcache.store.run_directory import logger
from kcache.training.accelerator import make_accelerator
from kcache.training.network.decoder import check_decoder
from kcache.training.network.limits import check_batch
from kcache.training.network.saved import find_adapted
from kcache.training.optimizer.libraries import check_optimizer, check_placement
from kcache.training.resume import (
    NewOrder,
    adapted_weights,
    check_same_base,
    check_same_samples,
    checkpoint_to_resume,
)
from kcache.training.validation import split_by_key


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a run is made of: all that is known of it before a weight or a row is read."""

    accelerator: Accelerator
    cache: Cache
    """The samples to train on."""
    held_out: Cache | None
    base: Repository
    counterpart_name: str
    counterpart: Repository | None
    checkpoint: Checkpoint | None
    adapted: Mapping[str, str] | None
    controls: tuple[str, ...]
    """The fields of control images that are read."""
    parts: Sequence[Cache]
    """The samples by shape."""
    batches: Sequence[int]
    """Samples of a batch of each of these."""
    new_order: NewOrder | None


def choose_run(cache: str | Path | Cache, config: TrainConfig, *, unread: bool = False) -> Choice:
    """Find and check everything that training from `cache` needs; what is quickly refused comes first.

    `unread` leaves out what reads weights: whether those that adapters go on with are the ones that they were trained
    on. Raises the KcacheError of whatever is missing or does not fit together.
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
    weights_files(base, PIPELINES[config.stage].network)  # that there are some, before anything is made of them
    known = None if checkpoint is None else adapted_weights(checkpoint)
    adapted = None if unread else find_adapted(config, base, known)
    check_same_base(checkpoint, config, base, adapted)
    controls = control_fields(cache, config)
    parts = cache.by_shape(*_fields(config), *controls)
    new_order = check_same_samples(checkpoint, cache, parts, config)
    batches = batches_of(config.train_batch_size, [(part.shape, part.resolution) for part in parts])
    for part, batch in zip(parts, batches, strict=True):
        noised = part.field(OBJECTIVES[config.stage].noised_field).shape
        check_batch(config, base, noised, batch * (2 if config.class_prompt else 1))
    return Choice(
        accelerator=accelerator,
        cache=cache,
        held_out=held_out,
        base=base,
        counterpart_name=counterpart_name,
        counterpart=counterpart,
        checkpoint=checkpoint,
        adapted=adapted,
        controls=controls,
        parts=parts,
        batches=batches,
        new_order=new_order,
    )


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


def tables_read(parts: Sequence[Cache], objective: Objective) -> dict[str, str]:
    """Each table of `parts` that `objective` reads, and its fingerprint."""
    names = {part.table_of(field) for part in parts for field in objective.row_shapes}
    return {name: parts[0].recipes[name].fingerprint for name in sorted(names)}


def check_cache_fits(cache: Cache, objective: Objective, repository: Repository, *, unread: bool = False) -> None:
    """Check that `cache` holds what `objective` reads, made by the encoders that `repository` has.

    `unread` leaves out whether the encoders' weights are the same, which would have to be read. A decoder repository
    has no image encoder, so its image_embeds are compared by shape only. Raises CacheIncompleteError for a missing
    table, CacheMismatchError for another encoder or shape, each with what was found and what to do.
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
    if unread:
        return
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
