"""What a loader's state says: plain JSON values, which say nothing of processes: any number goes on.

A state of one bucket has version 1, or 2 where its order began anew; one of several buckets has version 3.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from kcache.errors import CacheMismatchError
from kcache.loader.parts import Part, RowReader, ShapedReader
from kcache.loader.schedule import Standing

ONE, ANEW, SEVERAL = 1, 2, 3
_MOST = 1 << 62
"""What a number of a state stays below: turns are counted in 64 bits."""


def changed_samples(state: Mapping[str, Any], rows: RowReader) -> str | None:
    """How `rows` differ from what a loader's `state` was taken with, as far as it says; None where they are the same.

    Raises KeyError, TypeError or ValueError for what is no such state.
    """
    if state["samples_digest"] == rows.samples_digest:
        return None
    if "samples" not in state:
        return f"{len(rows):,} samples now; how many there were is not recorded"
    counts = [("samples", int(state["samples"]), len(rows))]
    counts.append(("captions", int(state["captions"]), int(rows.caption_bounds[-1])))
    told = [f"{then:,} {name} before, {now:,} now" for name, then, now in counts if then != now]
    return ", ".join(told) or f"{len(rows):,} samples as before, but other pictures, captions, weights or repeats"


def changed_shapes(state: Mapping[str, Any], parts: Sequence[ShapedReader]) -> str | None:
    """How the shapes of `parts`, or whether pictures are mirrored, differ from what a loader's `state` was taken with.

    None where they do not, as far as it says. Raises KeyError, TypeError or ValueError for what is no such state.
    """
    buckets = _buckets_of(state) if state["version"] == SEVERAL else []
    then = [(_sides(bucket["shape"]), int(bucket["samples"])) for bucket in buckets]
    now = [(_sides(part.shape), len(part)) for part in parts] if len(parts) > 1 else []
    told = []
    if bool(then) != bool(now):
        told.append("pictures of several shapes before, of one now" if then else "pictures of several shapes now")
    elif then != now:
        before, after = dict(then), dict(now)
        changed = [shape for shape in dict.fromkeys([*before, *after]) if before.get(shape) != after.get(shape)]
        counts = [
            f"{before.get(shape, 0):,} pictures of {shape} before, {after.get(shape, 0):,} now" for shape in changed
        ]
        told.append(", ".join(counts) or "the same shapes in another order")
    if (flip := any(part.flip for part in parts)) != bool(state.get("flip", False)):
        told.append("mirrored pictures now, none before" if flip else "mirrored pictures before, none now")
    return ", ".join(told) or None


def _sides(shape: Sequence[int] | None) -> str:
    height, width = shape or (0, 0)
    return f"{height}x{width}"


class States:
    """The states of a loader that takes the `parts` of `rows` in the order that seed and shuffle decide."""

    def __init__(self, rows: RowReader, parts: Sequence[Part], seed: int, shuffle: str) -> None:
        self._rows = rows
        self._parts = parts
        self._seed = seed
        self._shuffle = shuffle
        self._flip = any(isinstance(part.rows, ShapedReader) and part.rows.flip for part in parts)

    def told(self, standing: Standing) -> dict[str, Any]:
        """The state of a run that stands at `standing`."""
        several = len(self._parts) > 1
        state = {
            "version": SEVERAL if several else ANEW if standing.first_turn else ONE,
            "samples_digest": self._rows.samples_digest,
            "shuffle": self._shuffle,
            "seed": self._seed,
            "epoch": standing.epoch,
            "samples": len(self._rows),
            "captions": int(self._rows.caption_bounds[-1]),
        }
        if several:
            taken = zip(self._buckets(), self._parts, standing.taken, strict=True)
            state["buckets"] = [bucket | {"batch": part.batch, "taken": place} for bucket, part, place in taken]
            state["passes"] = standing.passes
        else:
            state["epoch"], state["samples_consumed"] = divmod(standing.taken[0], len(self._parts[0].course))
            state |= turns_told(self._parts[0])
            if self._shuffle == "stream":
                state["stream"] = asdict(self._parts[0].course.shape)
        if self._flip:
            state["flip"] = True
        if several or standing.first_turn:  # what a kcache that knows of no new order would pass over
            state |= {"first_turn": standing.first_turn, "first_epoch": standing.first_epoch}
        return state

    def read(self, state: Mapping[str, Any]) -> Standing:
        """Where the run stood that `state` is of; raises CacheMismatchError for another order, and for no state."""
        with _understood():
            return self._read(state)

    def _read(self, state: Mapping[str, Any]) -> Standing:
        if state["version"] not in (ONE, ANEW, SEVERAL):
            raise CacheMismatchError(
                f"the loader's state has version {state['version']!r}; this kcache reads {ONE} to {SEVERAL}; go on "
                "with the kcache that wrote it"
            )
        self._check_order(state)
        if (changed := changed_samples(state, self._rows)) is not None:
            raise CacheMismatchError(
                f"the samples are not those that the order was begun with ({changed}); give those, or go on with these "
                "by begin_new_order"
            )
        if state["version"] == SEVERAL:
            return self._of_several(state)
        epoch, consumed = _number(state, "epoch"), _number(state, "samples_consumed")
        turns = len(self._parts[0].course)
        return self._standing(state, epoch + consumed // turns, (epoch * turns + consumed,), 0)

    def _check_order(self, state: Mapping[str, Any]) -> None:
        """Check that the order would be the same."""
        then = state["version"] == SEVERAL
        if then != (len(self._parts) > 1):
            one, many = "samples of one shape", "samples of several shapes"
            raise CacheMismatchError(
                f"the loader's state is of {many if then else one}, this loader has {one if then else many}: the order "
                "would differ; give it the shapes and resolutions that it was begun with, or start anew"
            )
        own: dict[str, Any] = {"seed": self._seed, "shuffle": self._shuffle}
        found = {name: state[name] for name in own}
        own["flip"], found["flip"] = self._flip, bool(state.get("flip", False))
        if then:
            own["buckets"] = self._buckets()
            found["buckets"] = [
                {name: value for name, value in bucket.items() if name not in ("batch", "taken")}
                for bucket in _buckets_of(state)
            ]
        elif self._shuffle == "stream":
            own["stream"], found["stream"] = asdict(self._parts[0].course.shape), state["stream"]
        for name, value in own.items():
            if found[name] != value:
                raise CacheMismatchError(
                    f"the loader's state has {name} {found[name]!r}, this loader has {value!r}: the order would "
                    f"differ; give it the {name} that it was begun with, or start anew"
                )

    def _buckets(self) -> list[dict[str, Any]]:
        """What the order of each bucket depends on."""
        buckets: list[dict[str, Any]] = [
            {"shape": None if part.shape is None else list(part.shape), "samples": len(part.rows)} | turns_told(part)
            for part in self._parts
        ]
        if self._shuffle == "stream":
            for bucket, part in zip(buckets, self._parts, strict=True):
                bucket["stream"] = asdict(part.course.shape)
        return buckets

    def _of_several(self, state: Mapping[str, Any]) -> Standing:
        epoch = _number(state, "epoch")
        taken = tuple(_number(bucket, "taken") for bucket in _buckets_of(state))
        standing = self._standing(state, epoch, taken, _number(state, "passes"))
        for part, place in zip(self._parts, taken, strict=True):
            first, end = standing.first_epoch * len(part.course), (epoch + 1) * len(part.course)
            if not first <= place <= end:
                raise _broken(f"a bucket with {place:,} samples taken", f"{first:,} to {end:,} in epoch {epoch}")
        return standing

    def _standing(self, state: Mapping[str, Any], epoch: int, taken: tuple[int, ...], passes: int) -> Standing:
        first_turn, first_epoch = (_number(state, name, 0) for name in ("first_turn", "first_epoch"))
        given = sum(taken) - first_epoch * sum(len(part.course) for part in self._parts)
        if given < 0 or first_turn + given >= _MOST:
            raise _broken(f"{given:,} samples since turn {first_turn:,}", f"0 or more, and less than {_MOST:,} in all")
        return Standing(first_turn + given, epoch, taken, passes, first_turn, first_epoch)


def epoch_after(state: Mapping[str, Any]) -> int:
    """The first epoch of which a run that stood at `state` had had nothing; raises CacheMismatchError for no state."""
    with _understood():
        epoch = _number(state, "epoch")
        if state["version"] != SEVERAL:
            return epoch + (_number(state, "samples_consumed") > 0)
        taken = [(_number(bucket, "taken"), _turns_of(bucket)) for bucket in _buckets_of(state)]
        return epoch + any(place > epoch * turns for place, turns in taken)


def turns_told(part: Part) -> dict[str, int]:
    """How many turns an epoch has, where that is not one for each sample."""
    return {} if len(part.course) == len(part.rows) else {"turns": len(part.course)}


def _turns_of(bucket: Mapping[str, Any]) -> int:
    return _number(bucket, "turns") if "turns" in bucket else _number(bucket, "samples")


@contextmanager
def _understood() -> Iterator[None]:
    try:
        yield
    except CacheMismatchError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _broken(
            f"no {error}" if isinstance(error, KeyError) else str(error), "what `state_dict` gives"
        ) from error


def _buckets_of(state: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    buckets = state["buckets"]
    if not isinstance(buckets, list) or not all(isinstance(bucket, dict) for bucket in buckets):
        raise _broken(f"buckets {buckets!r}", "a list of objects")
    return buckets


def _number(state: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = state[name] if default is None else state.get(name, default)
    if type(value) is not int or not 0 <= value < _MOST:
        raise _broken(f"{name} {value!r}", f"a whole number, 0 or more and less than {_MOST:,}")
    return value


def _broken(found: str, expected: str) -> CacheMismatchError:
    return CacheMismatchError(
        f"the loader's state has {found}; expected {expected}; go on from an earlier checkpoint, or start anew"
    )
