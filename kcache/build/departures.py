"""Who leaves a cache when it is built again, and who stays beyond the samples that are looked at.

A cache becomes what its source offers. What is no longer offered may be meant to leave, or the source may be half
copied, not mounted or another one: so whoever leaves is counted and named, and most of a cache leave only when asked.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from kcache.errors import CacheCorruptError, CacheMismatchError, CacheNotFoundError, ConfigError
from kcache.places import Place
from kcache.store.manifest import read_manifest
from kcache.store.recipe import TEXT, kind_of
from kcache.store.samples import Picture, Refusal, Sample, picture_list, read_refused, sample_list, stored_samples

if TYPE_CHECKING:
    import pyarrow

    from kcache.build.survey import Survey

Earlier = TypeVar("Earlier", Picture, Sample)
_EXAMPLES = 3


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


def _earlier(cache: Place) -> "pyarrow.Table | None":
    """The samples of the finished cache in the folder; None where there is none. Raises CacheCorruptError."""
    try:
        return stored_samples(cache, read_manifest(cache))
    except CacheNotFoundError:
        return None


def beside_earlier(job: "Survey") -> "Survey":
    """The job in view of the samples that its cache has: which of them leave, or stay beyond --max-train-samples.

    Raises ConfigError where those that stay lack rows, which are not among the pictures that are looked at, or are not
    known.
    """
    try:
        table = _earlier(job.folder)
    except CacheCorruptError as error:
        if job.config.max_train_samples is not None:
            raise ConfigError(
                f"{error}; which samples stay beyond --max-train-samples is not known: leave it out"
            ) from error
        return replace(job, notes=(*job.notes, f"whether samples leave the cache is not known: {error}"))
    if table is None:
        return job
    if job.config.max_train_samples is not None:
        earlier = sample_list(table)
        kept = kept_beyond(earlier, job.samples)
        _check_kept(job, kept)
        staying = {sample.name for sample in kept}
        now = [refusal for refusal in job.refused if refusal.name not in staying]
        judged = {sample.name for sample in job.samples} | staying | {refusal.name for refusal in now}
        beyond = [refusal for refusal in _earlier_refusals(job.folder) if refusal.name not in judged]
        job = replace(job, samples=united(earlier, job.samples), refused=[*now, *beyond])
    before = picture_list(table)
    who = leaving(before, job.samples, job.refused)
    return replace(job, before=before, leaving=who, notes=(*job.notes, *who.notes))


def _earlier_refusals(folder: Place) -> list[Refusal]:
    try:
        return list(read_refused(folder))
    except CacheCorruptError:
        return []  # it is derived, and written anew by this build


def _check_kept(job: "Survey", kept: Sequence[Sample]) -> None:
    tables = job.committed().tables if kept else {}
    lacking = [name for name, state in tables.items() if not state.stored.key_set.issuperset(kind_of(name).keys(kept))]
    if TEXT.name in tables and not all(sample.captions for sample in kept):
        lacking.append(f"{TEXT.name} (no captions)")
    if lacking:
        raise ConfigError(
            f"--max-train-samples is {job.config.max_train_samples}, and of the {len(kept):,} samples of {job.folder} "
            f"beyond these, which stay, rows are missing in {', '.join(lacking)}; expected all of them, as a cache is "
            "whole or none; build without --max-train-samples, or into another folder"
        )


def leaving(earlier: Sequence[Earlier], offered: Sequence[Sample], refused: Sequence[Refusal]) -> Leaving:
    """Which of the `earlier` samples of a cache it will not have when it is made of those `offered`."""
    absent = _absent(earlier, offered)
    if not absent:
        return Leaving(had=len(earlier))
    new, unread = _new_names(earlier, offered), {refusal.name for refusal in refused}
    names = [sample.name for sample in absent]
    return Leaving(
        had=len(earlier),
        gone=tuple(name for name in names if name not in new and name not in unread),
        changed=tuple(name for name in names if name in new),
        refused=tuple(name for name in names if name in unread and name not in new),
    )


def kept_beyond(earlier: Sequence[Sample], looked_at: Sequence[Sample]) -> list[Sample]:
    """The `earlier` samples that stay beside those `looked_at`, the first of a source: all but replaced pictures."""
    new = _new_names(earlier, looked_at)
    return [sample for sample in _absent(earlier, looked_at) if sample.name not in new]


def united(earlier: Sequence[Sample], looked_at: Sequence[Sample]) -> list[Sample]:
    """Those `looked_at` and, behind them, those that stay; in their old order all, where none is new."""
    together = [*looked_at, *kept_beyond(earlier, looked_at)]
    known = {_identity(sample): number for number, sample in enumerate(earlier)}
    places = [known.get(_identity(sample)) for sample in together]
    if len(together) == len(earlier) and None not in places and len(set(places)) == len(places):
        return [sample for _, sample in sorted(zip(places, together, strict=True), key=lambda pair: pair[0] or 0)]
    return together


def _identity(sample: Sample) -> tuple[str, bytes, tuple[bytes, ...]]:
    return sample.name, sample.image_key, sample.caption_keys


def _absent(earlier: Sequence[Earlier], offered: Sequence[Sample]) -> list[Earlier]:
    """Those of `earlier` that no offered sample continues: by its picture, under whatever name."""
    same = {(sample.name, sample.image_key) for sample in offered}
    if all((sample.name, sample.image_key) in same for sample in earlier):
        return []
    room = Counter(sample.image_key for sample in offered)
    room.subtract(sample.image_key for sample in earlier if (sample.name, sample.image_key) in same)
    absent = []
    for sample in earlier:
        if (sample.name, sample.image_key) in same:
            continue
        if room[sample.image_key] > 0:  # renamed
            room[sample.image_key] -= 1
        else:
            absent.append(sample)
    return absent


def _new_names(earlier: Sequence[Earlier], offered: Sequence[Sample]) -> set[str]:
    """The names under which pictures are offered that no earlier sample shows: another picture of the name is old."""
    known = {sample.image_key for sample in earlier}
    return {sample.name for sample in offered if sample.image_key not in known}


def _some(names: Sequence[str]) -> str:
    return ", ".join([*names[:_EXAMPLES], *(["…"] if len(names) > _EXAMPLES else [])])
