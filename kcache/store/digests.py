"""Names for content: the keys of images and captions, many of them in arrays."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, overload

import numpy as np

from kcache.disk.scratch import kept, release, spans

KEY_BYTES = 16
_UNPACKED = 4096
"""Keys that are taken out of an array at a time, where they are wanted one by one."""
_TOGETHER = 1 << 22
"""Keys that are looked for, or moved, at a time: what that takes of memory does not grow with how many there are."""
_STEP = 1 << 12
"""Of sorted keys each so manieth is at hand, to know where to look."""
_WIDE = 1 << 20
"""A multiple of `_STEP`: sorted keys that are looked through at a time for many others."""
_MANY = 1 << 14
"""Keys from which on looking for them means looking through all."""


def content_key(content: bytes) -> bytes:
    """The key of an input (16 bytes): the first half of the sha256 of its bytes, e.g. of an undecoded image file."""
    return hashlib.sha256(content).digest()[:KEY_BYTES]


def caption_key(caption: str) -> bytes:
    """The key of a caption (16 bytes): `content_key` of its UTF-8; raises UnicodeEncodeError on lone surrogates."""
    return content_key(caption.encode())


def pack_keys(keys: Iterable[bytes]) -> np.ndarray:
    """Keys as they stand in files: (n, 16) uint8."""
    return Keys.of(keys).packed


class Keys(Sequence[bytes]):
    """Keys in one array, with no Python object for each: a hundred million take 1.6 GB."""

    def __init__(self, packed: np.ndarray) -> None:
        """`packed` as `pack_keys` gives it."""
        self.packed = np.ascontiguousarray(packed)

    @classmethod
    def of(cls, keys: Iterable[bytes]) -> "Keys":
        """The keys as they are, or packed."""
        return keys if isinstance(keys, Keys) else cls(np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES))

    @classmethod
    def joined(cls, runs: Iterable[np.ndarray]) -> "Keys":
        """The keys of `runs`, packed, one after the other; in a file where they are many."""
        return cls(kept(runs, np.empty((0, KEY_BYTES), np.uint8)))

    @classmethod
    def checked(cls, packed: np.ndarray) -> "Keys":
        """What `packed` holds; raises ValueError for what is no array of keys."""
        if packed.dtype != np.uint8 or packed.shape[1:] != (KEY_BYTES,):
            raise ValueError(f"it holds {packed.shape} of {packed.dtype}; expected keys, (n, {KEY_BYTES}) of uint8")
        return cls(packed)

    def __len__(self) -> int:
        return len(self.packed)

    @overload
    def __getitem__(self, at: int) -> bytes: ...
    @overload
    def __getitem__(self, at: slice | np.ndarray) -> "Keys": ...
    def __getitem__(self, at: Any) -> "bytes | Keys":
        found = self.packed[at]
        return found.tobytes() if found.ndim == 1 else Keys(found)

    def __iter__(self) -> Iterator[bytes]:
        for first in range(0, len(self), _UNPACKED):
            content = self.packed[first : first + _UNPACKED].tobytes()
            yield from (content[i : i + KEY_BYTES] for i in range(0, len(content), KEY_BYTES))

    def __add__(self, other: "Keys") -> "Keys":
        both = Keys.joined(keys.packed[span] for keys in (self, other) for span in spans(len(keys), _TOGETHER))
        release(self.packed)
        release(other.packed)
        return both

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Keys) and np.array_equal(self.packed, other.packed)

    __hash__ = None  # type: ignore[assignment]  # they are as long as they are

    def high(self, at: Any = slice(None)) -> np.ndarray:
        """(k,) uint64: the first half of keys, in whose order these are but for the few that share it."""
        return self.packed.view(">u8")[at, 0].astype(np.uint64)

    def low(self, at: Any = slice(None)) -> np.ndarray:
        """(k,) uint64: the second half of keys."""
        return self.packed.view(">u8")[at, 1].astype(np.uint64)

    def taken(self, at: np.ndarray) -> "Keys":
        """The keys at some places, in a file where they are many."""
        found = Keys.joined(self.packed[at[span]] for span in spans(len(at), _TOGETHER))
        release(self.packed)
        return found

    def where(self, chosen: np.ndarray) -> "Keys":
        """Those that `chosen` (n,) of bool is true of, in a file where they are many."""
        found = Keys.joined(self.packed[span][chosen[span]] for span in spans(len(self), _TOGETHER))
        release(self.packed)
        return found

    def in_order(self) -> tuple[np.ndarray, np.ndarray]:
        """The order of the keys by their bytes, equal ones as they stand, and which are new in it: (n,) int64, bool."""
        order, bounds = self._by_first_byte()
        new = np.ones(len(self), np.bool_)
        for first, last in pairwise(bounds):
            rows = order[first:last]
            inner, new[first:last] = self[rows]._sorted()
            order[first:last] = rows[inner]
        release(self.packed)
        return order, new

    def _by_first_byte(self) -> tuple[np.ndarray, list[int]]:
        """The order of the keys by their first byte, and where in it each of them begins and the last one ends."""
        if len(self) < _MANY:
            return np.arange(len(self)), [0, len(self)]
        counts = np.zeros(256, np.int64)
        for span in spans(len(self), _TOGETHER):
            counts += np.bincount(self.packed[span, 0], minlength=256)
        bounds = np.cumsum([0, *counts.tolist()])
        order, ends = np.empty(len(self), np.int64), bounds[:-1].copy()
        for span in spans(len(self), _TOGETHER):
            run = self.packed[span, 0]
            inner, counts = np.argsort(run, kind="stable"), np.bincount(run, minlength=256)
            starts = np.cumsum(counts) - counts
            order[np.repeat(ends - starts, counts) + np.arange(len(run))] = inner + span.start
            ends += counts
        return order, bounds.tolist()

    def _sorted(self) -> tuple[np.ndarray, np.ndarray]:
        """`in_order` of keys that are few."""
        high, new = self.high(), np.ones(len(self), np.bool_)
        order = np.argsort(high, kind="stable")
        high = high[order]
        np.not_equal(high[1:], high[:-1], out=new[1:])
        if not new.all():
            low = self.low(order)
            if (low[1:] < low[:-1])[~new[1:]].any():
                order = np.lexsort((self.low(), self.high()))
                low = self.low(order)
            new[1:] |= low[1:] != low[:-1]
        return order, new

    def unique(self) -> "Keys":
        """Each key once, in order of first use."""
        order, new = self.in_order()
        if new.all():
            return self
        first = np.zeros(len(self), np.bool_)
        first[order[new]] = True
        return self.where(first)

    def ascending(self) -> "Keys":
        """Each key once, sorted: these, where they are so."""
        if self._ascend:
            return self
        order, new = self.in_order()
        return self.taken(order if new.all() else order[new])

    @cached_property
    def _ascend(self) -> bool:
        for first in range(0, len(self) - 1, _WIDE):
            span = slice(first, first + _WIDE + 1)
            high = self.high(span)
            rising, equal = high[1:] > high[:-1], high[1:] == high[:-1]
            if equal.any():
                low = self.low(span)
                rising |= equal & (low[1:] > low[:-1])
            if not rising.all():
                return False
            if len(self) >= _MANY:
                release(self.packed)
        return True

    def find(self, keys: "Keys") -> np.ndarray:
        """Where `keys` stand among these, which are sorted and unique: (n,) int64, -1 for what is not among them."""
        found = np.empty(len(keys), np.int64)
        for span, at in self.looked_up(keys):
            found[span] = at
        return found

    def among(self, known: Iterable[bytes]) -> np.ndarray:
        """(n,) bool: which of these keys are among `known`, in whatever order those are."""
        found = np.empty(len(self), np.bool_)
        for span, at in Keys.of(known).ascending().looked_up(self):
            np.greater_equal(at, 0, out=found[span])
        return found

    def looked_up(self, keys: "Keys") -> Iterator[tuple[slice, np.ndarray]]:
        """`find`, for some of `keys` after the other: which these are, and where they stand."""
        for span in spans(len(keys), _TOGETHER):
            found = np.full(span.stop - span.start, -1)
            if len(self):
                run = Keys(keys.packed[span])
                order = np.argsort(run.high())
                found[order] = self._look_up(run.high(order), run.low(order))
            if len(keys) >= _MANY:
                release(keys.packed)
                release(self.packed)
            yield span, found

    def _look_up(self, high: np.ndarray, low: np.ndarray) -> np.ndarray:
        """`find` for keys in the order of their first halves: this many are looked for in one go through these."""
        wide = _WIDE if len(high) >= _MANY else _STEP
        # What is equal to the border of a run begins in the run before, or there.
        runs = np.maximum(np.searchsorted(self._borders[:: wide // _STEP], high) - 1, 0)
        at = np.empty(len(high), np.int64)
        for first, last in pairwise([0, *(np.flatnonzero(np.diff(runs)) + 1).tolist(), len(high)]):
            start = int(runs[first]) * wide
            at[first:last] = start + np.searchsorted(self.high(slice(start, start + wide)), high[first:last])
        while True:
            here = np.minimum(at, len(self) - 1)
            near = self.high(here) == high
            found = near & (self.low(here) == low)
            if not (further := near & ~found & (at < len(self))).any():
                return np.where(found, here, -1)
            at[further] += 1

    @cached_property
    def _borders(self) -> np.ndarray:
        """(k,) uint64: the first half of each `_STEP`th key."""
        return self.high(slice(None, None, _STEP))


class Positions:
    """A number for each key, of equal ones that of the last: sorted when it is first asked for."""

    def __init__(self, keys: Keys, numbers: np.ndarray | None = None) -> None:
        """`numbers` (n,) int64 of the `keys`; None for where they stand."""
        self._given = keys, numbers

    def find(self, keys: Iterable[bytes]) -> np.ndarray:
        """The number of each of `keys`: (n,) int64, -1 for what has none."""
        known, numbers = self._sorted
        at = known.find(Keys.of(keys))
        there = at >= 0
        at[there] = numbers[at[there]]
        return at

    @cached_property
    def _sorted(self) -> tuple[Keys, np.ndarray]:
        keys, numbers = self._given
        last = latest(*keys.in_order())
        return keys.taken(last), kept([last if numbers is None else numbers[last]], last[:0])


def latest(order: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Of what `Keys.in_order` gave: where the last one of equal keys stands, in the order of the keys; (k,) int64."""
    return order if new.all() else order[np.append(new[1:], True)]


def unpack_keys(packed: np.ndarray) -> list[bytes]:
    """The keys that `pack_keys` packed; raises ValueError for what is no array of keys."""
    return list(Keys.checked(packed))


def mirrored_key(key: bytes) -> bytes:
    """The key of the mirror image of the picture that has `key`; of that of a mirror image, the picture's."""
    return mirrored_keys(Keys.of([key]))[0]


def mirrored_keys(keys: Keys) -> Keys:
    """The keys of the mirror images of pictures: each differs by the same bits, and so leads back."""
    return Keys(keys.packed ^ np.frombuffer(_MIRROR, np.uint8))


def control_row_keys(images: Keys, controls: Keys, without: bytes | None) -> Keys:
    """The keys of rows of control images `controls` that go with `images`, both (n): of the pair of their contents.

    Those of `NO_CONTROL` have the key `without`; a mirror image's is the `mirrored_keys` of these.
    """
    return Keys.joined(
        _pair_keys(images.packed[span], controls.packed[span], without or NO_CONTROL)
        for span in spans(len(images), _TOGETHER)
    )


def _pair_keys(images: np.ndarray, controls: np.ndarray, without: bytes) -> np.ndarray:
    content, size = np.concatenate([images, controls], axis=1).tobytes(), 2 * KEY_BYTES
    found = b"".join(content_key(content[at : at + size]) for at in range(0, len(content), size))
    keys = np.frombuffer(found, np.uint8).reshape(-1, KEY_BYTES)
    return np.where(controls.any(axis=1, keepdims=True), keys, np.frombuffer(without, np.uint8))


NO_CONTROL = bytes(KEY_BYTES)
"""Stands for the key of a control image that a sample does not have; no content has this key."""
_MIRROR = content_key(b"kcache: the mirror image")
EMPTY_CAPTION_KEY = caption_key("")
"""Key of the reserved row of `text`: the caption "", which guidance drops to."""
ZERO_IMAGE_KEY = content_key(b"kcache: all-zero pixels")
"""Key of the reserved row of `image_embeds`: the all-zero pixel tensor, which no image file gives."""
