"""Who leaves a cache when it is built again, and who stays beyond the samples that are looked at.

A cache becomes what its source offers. What is no longer offered may be meant to leave, or the source may be half
copied, not mounted or another one: so whoever leaves is counted and named, and most of a cache leave only when asked.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kcache.errors import CacheCorruptError, CacheMismatchError, CacheNotFoundError, ConfigError
from kcache.places import Place
from kcache.store.digests import Keys, content_key
from kcache.store.formats.columns import Samples, counts_so_far
from kcache.store.manifest import read_manifest
from kcache.store.recipe import TEXT, controls_of, kind_of
from kcache.store.samples import Refusal, Sample, read_refused, samples_in_columns

if TYPE_CHECKING:
    from kcache.build.survey import Survey

_EXAMPLES = 3
_SAID = ("name", "image_key", "caption_keys", "weight", "repeats", "control_keys")
"""All that a source says of a sample."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Leaving:
    """The samples of a finished cache that a build leaves out, by name."""

    had: int = 0
    """Samples that the cache has."""
    gone: tuple[str, ...] = ()
    """Whose pictures the source does not offer any more."""
    changed: tuple[str, ...] = ()
    """Under whose names the source offers pictures that are new to the cache."""
    refused: tuple[str, ...] = ()
    """Whose names are now among what the source cannot offer."""

    def __len__(self) -> int:
        return len(self.gone) + len(self.changed) + len(self.refused)

    @property
    def most(self) -> bool:
        """Whether more leave than stay."""
        return 2 * len(self) > self.had

    @property
    def counts(self) -> dict[str, int]:
        """How many samples there were, and how many leave by each way."""
        ways = {"gone": self.gone, "changed": self.changed, "refused": self.refused}
        return {"had": self.had, **{name: len(names) for name, names in ways.items()}}

    @property
    def text(self) -> str:
        """Who leaves and why, in words, without an end; "" where nobody does."""
        groups = (
            (self.gone, "is not in this source any more", "are not in this source any more"),
            (self.changed, "is another picture now", "are other pictures now"),
            (self.refused, "is refused now", "are refused now"),
        )
        parts = [(names, one if len(names) == 1 else many) for names, one, many in groups if names]
        if len(parts) == 1:
            [(names, how)] = parts
            why = f"{'it' if len(names) == 1 else 'they'} {how} ({_some(names)})"
        else:
            why = ", ".join(f"{len(names):,} {how} ({_some(names)})" for names, how in parts)
        return f"{len(self):,} of {self.had:,} samples {'leaves' if len(self) == 1 else 'leave'} the cache: {why}"

    @property
    def notes(self) -> tuple[str, ...]:
        """A sentence; none where nobody leaves."""
        return (f"{self.text}; the rows stay until `kcache cache-gc`",) if len(self) else ()

    def check(self, cache: Place) -> None:
        """Raise CacheMismatchError when most of the samples of `cache` would leave it."""
        if self.most:
            raise CacheMismatchError(
                f"{cache} would lose most of its samples: {self.text}; expected at least half of them in the source: "
                "is it complete, mounted, and the one meant? Build with --replace if they are to leave; to keep them, "
                "build another folder and unite both by `kcache cache-merge`, or add by --max-train-samples, which "
                "removes nothing"
            )


NOBODY = Leaving()


def _earlier(cache: Place) -> Samples | None:
    """The samples of the finished cache in the folder; None where there is none. Raises CacheCorruptError."""
    try:
        return samples_in_columns(cache, read_manifest(cache))
    except CacheNotFoundError:
        return None


def beside_earlier(job: "Survey") -> "Survey":
    """The job in view of the samples that its cache has: which of them leave, or stay beyond --max-train-samples.

    Raises ConfigError where those that stay lack rows, which are not among the pictures that are looked at, or are not
    known.
    """
    try:
        before = _earlier(job.folder)
    except CacheCorruptError as error:
        if job.config.max_train_samples is not None:
            raise ConfigError(
                f"{error}; which samples stay beyond --max-train-samples is not known: leave it out"
            ) from error
        return replace(job, notes=(*job.notes, f"whether samples leave the cache is not known: {error}"))
    if before is None:
        return job
    if job.config.max_train_samples is not None:
        kept = kept_beyond(before, job.samples)
        _check_kept(job, kept)
        now = _not_called(job.refused, _names(kept))
        judged = _names(job.samples) + _names(kept) + _keys_of((refusal.name,) for refusal in now)
        beyond = _not_called(_earlier_refusals(job.folder), judged)
        job = replace(job, samples=united(before, job.samples), refused=[*now, *beyond])
    who = leaving(before, job.samples, job.refused)
    return replace(job, before=before, leaving=who, notes=(*job.notes, *who.notes))


def _not_called(refused: Sequence[Refusal], names: Keys) -> list[Refusal]:
    """Those of `refused` whose names are none of `names`, which `_names` gave."""
    known = _keys_of((refusal.name,) for refusal in refused).among(names)
    return [refusal for refusal, is_known in zip(refused, known.tolist(), strict=True) if not is_known]


def _earlier_refusals(folder: Place) -> list[Refusal]:
    try:
        return list(read_refused(folder))
    except CacheCorruptError:
        return []  # it is derived, and written anew by this build


def _check_kept(job: "Survey", kept: Samples) -> None:
    tables = job.committed().tables if len(kept) else {}
    known = replace(job.wants, controls=controls_of(job.earlier))  # whether these have others nobody looked
    lacking = [
        name
        for name, state in tables.items()
        if (kind_of(name).per == "control" and kind_of(name).name not in known.controls)
        or not known.keys(name, kept).among(state.stored.known).all()
    ]
    if TEXT.name in tables and not np.diff(kept.caption_bounds).all():
        lacking.append(f"{TEXT.name} (no captions)")
    if lacking:
        raise ConfigError(
            f"--max-train-samples is {job.config.max_train_samples}, and of the {len(kept):,} samples of {job.folder} "
            f"beyond these, which stay, rows are missing in {', '.join(lacking)}; expected all of them, as a cache is "
            "whole or none; build without --max-train-samples, or into another folder"
        )


def leaving(earlier: Sequence[Sample], offered: Sequence[Sample], refused: Sequence[Refusal]) -> Leaving:
    """Which of the `earlier` samples of a cache it will not have when it is made of those `offered`."""
    before = Samples.of(earlier)
    if Samples.of(offered).begin_with(before):
        return Leaving(had=len(before))
    absent = before.where(_absent(before, Samples.of(offered)))
    if not absent:
        return Leaving(had=len(before))
    unread = {refusal.name for refusal in refused}
    new = _names(absent).among(_new_names(before, Samples.of(offered))).tolist()
    names = list(zip((sample.name for sample in absent), new, strict=True))
    return Leaving(
        had=len(before),
        gone=tuple(name for name, is_new in names if not is_new and name not in unread),
        changed=tuple(name for name, is_new in names if is_new),
        refused=tuple(name for name, is_new in names if name in unread and not is_new),
    )


def kept_beyond(earlier: Sequence[Sample], looked_at: Sequence[Sample]) -> Samples:
    """The `earlier` samples that stay beside those `looked_at`, the first of a source: all but replaced pictures."""
    before, now = Samples.of(earlier), Samples.of(looked_at)
    return before.where(_absent(before, now) & ~_names(before).among(_new_names(before, now)))


def united(earlier: Sequence[Sample], looked_at: Sequence[Sample]) -> Samples:
    """Those `looked_at` and, behind them, those that stay; in their old order all, where none is new."""
    before = Samples.of(earlier)
    together = Samples([*Samples.of(looked_at).tables, *kept_beyond(before, looked_at).tables])
    known, found = (_keys(samples, *_SAID).unique() for samples in (before, together))
    if len(known) == len(before) == len(found) == len(together) and found.among(known).all():
        return before
    return together


def _absent(earlier: Samples, offered: Samples) -> np.ndarray:
    """(n,) bool: those of `earlier` that no offered sample continues: by its picture, under whatever name."""
    same = _keys(earlier, "name", "image_key").among(_keys(offered, "name", "image_key"))
    absent = ~same
    if absent.any():
        # Of a picture that is offered more often than under its earlier names, as many were renamed.
        others = earlier.image_keys[~same]
        room = _count(others, offered.image_keys) - _count(others, earlier.image_keys[same])
        absent[~same] = counts_so_far(others) > room
    return absent


def _count(keys: Keys, among: Keys) -> np.ndarray:
    """(n,) int64: how often each of `keys` is `among` others."""
    order, new = among.in_order()
    counts = np.diff(np.append(np.flatnonzero(new), len(among)))
    return np.append(counts, 0)[among[order[new]].find(keys)]


def _new_names(earlier: Samples, offered: Samples) -> Keys:
    """The names under which pictures are offered that no earlier sample shows: another picture of the name is old."""
    return _names(offered.where(~offered.image_keys.among(earlier.image_keys)))


def _names(samples: Sequence[Sample]) -> Keys:
    return _keys(Samples.of(samples), "name")


def _keys(samples: Samples, *columns: str) -> Keys:
    """A key for what `columns` say of each sample."""
    values = (zip(*(table[name].to_pylist() for name in columns), strict=True) for table in samples.tables)
    return Keys.joined(_keys_of(rows).packed for rows in values)


def _keys_of(values: Iterable[tuple[Any, ...]]) -> Keys:
    """A key for each of some values, whose letters and bytes tell them apart."""
    return Keys.of(content_key(repr(value).encode()) for value in values)


def _some(names: Sequence[str]) -> str:
    return ", ".join([*names[:_EXAMPLES], *(["…"] if len(names) > _EXAMPLES else [])])
