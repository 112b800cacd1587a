"""Names for content: the keys of images and captions, many of them in arrays."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, overload

import numpy as np

KEY_BYTES = 16
_UNPACKED = 4096
"""Keys that are taken out of an array at a time, where they are wanted one by one."""
_SORTED_FROM = 100_000
"""Keys from which on they are sorted before they are looked for."""


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
            yield from unpack_keys(self.packed[first : first + _UNPACKED])

    def __add__(self, other: "Keys") -> "Keys":
        return Keys(np.concatenate([self.packed, other.packed]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Keys) and np.array_equal(self.packed, other.packed)

    __hash__ = None  # type: ignore[assignment]  # they are as long as they are

    @cached_property
    def high(self) -> np.ndarray:
        """(n,) uint64: the first half of each key, in whose order the keys are but for the few that share it."""
        return self.packed.view(">u8")[:, 0].astype(np.uint64)

    @property
    def low(self) -> np.ndarray:
        """(n,) of big-endian uint64: the second half of each key."""
        return self.packed.view(">u8")[:, 1]

    def in_order(self) -> tuple[np.ndarray, np.ndarray]:
        """The order of the keys by their bytes, equal ones as they stand, and which are new in it: (n,) int64, bool."""
        order = np.argsort(self.high, kind="stable")
        high = self.high[order]
        new = np.ones(len(self), np.bool_)
        np.not_equal(high[1:], high[:-1], out=new[1:])
        if not new.all():
            low = self.low[order]
            if (low[1:] < low[:-1])[~new[1:]].any():
                order = np.lexsort((self.low, self.high))
                low = self.low[order]
            new[1:] |= low[1:] != low[:-1]
        return order, new

    def unique(self) -> "Keys":
        """Each key once, in order of first use."""
        order, new = self.in_order()
        if new.all():
            return self
        first = np.zeros(len(self), np.bool_)
        first[order[new]] = True
        return self[first]

    def find(self, keys: "Keys") -> np.ndarray:
        """Where `keys` stand among these, which are sorted and unique: (n,) int64, -1 for what is not among them."""
        if not len(self) or not len(keys):
            return np.full(len(keys), -1)
        if len(keys) < _SORTED_FROM:
            at = np.searchsorted(self.high, keys.high)
        else:  # in order, so that each look-up is near the one before: a fifth of the time for a hundred million
            order = np.argsort(keys.high)
            at = np.empty(len(keys), np.int64)
            at[order] = np.searchsorted(self.high, keys.high[order])
        while True:
            here = np.minimum(at, len(self) - 1)
            near = self.high[here] == keys.high
            found = near & (self.low[here] == keys.low)
            if not (further := near & ~found & (at < len(self))).any():
                return np.where(found, here, -1)
            at[further] += 1

    def among(self, known: Iterable[bytes]) -> np.ndarray:
        """(n,) bool: which of these keys are among `known`, in whatever order those are."""
        others = Keys.of(known)
        if not len(others) or not len(self):
            return np.zeros(len(self), np.bool_)
        order, new = others.in_order()
        if not new.all() or (order[1:] < order[:-1]).any():
            others = others[order[new]]
        return others.find(self) >= 0


class Positions:
    """A number for each key, of equal ones that of the last: sorted when it is first asked for."""

    def __init__(self, keys: Keys, numbers: np.ndarray | None = None) -> None:
        """`numbers` (n,) int64 of the `keys`; None for where they stand."""
        self._given = keys, numbers

    def find(self, keys: Iterable[bytes]) -> np.ndarray:
        """The number of each of `keys`: (n,) int64, -1 for what has none."""
        known, numbers = self._sorted
        return numbers[known.find(Keys.of(keys))]

    @cached_property
    def _sorted(self) -> tuple[Keys, np.ndarray]:
        keys, numbers = self._given
        order, new = keys.in_order()
        last = order[np.append(new[1:], True)[: len(new)]]
        # Behind the numbers that of what is not found, which is looked for at -1.
        return keys[last], np.append(last if numbers is None else numbers[last], -1)


def unpack_keys(packed: np.ndarray) -> list[bytes]:
    """The keys that `pack_keys` packed; raises ValueError for what is no array of keys."""
    if packed.dtype != np.uint8 or packed.shape[1:] != (KEY_BYTES,):
        raise ValueError(f"it holds {packed.shape} of {packed.dtype}; expected keys, (n, {KEY_BYTES}) of uint8")
    content = packed.tobytes()
    return [content[i : i + KEY_BYTES] for i in range(0, len(content), KEY_BYTES)]


def mirrored_key(key: bytes) -> bytes:
    """The key of the mirror image of the picture that has `key`; of that of a mirror image, the picture's."""
    return mirrored_keys(Keys.of([key]))[0]


def mirrored_keys(keys: Keys) -> Keys:
    """The keys of the mirror images of pictures: each differs by the same bits, and so leads back."""
    return Keys(keys.packed ^ np.frombuffer(_MIRROR, np.uint8))


_MIRROR = content_key(b"kcache: the mirror image")
EMPTY_CAPTION_KEY = caption_key("")
"""Key of the reserved row of `text`: the caption "", which guidance drops to."""
ZERO_IMAGE_KEY = content_key(b"kcache: all-zero pixels")
"""Key of the reserved row of `image_embeds`: the all-zero pixel tensor, which no image file gives."""
