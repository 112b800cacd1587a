"""Memory for batches that is used again once the caller has let go of it.

A fresh array of some megabytes costs a page fault per 4 kB when it is first written: more than the copy into it.
"""

import threading
import weakref
from collections import defaultdict
from collections.abc import Callable

import numpy as np

__all__ = ["BatchMemory"]


def _block(size: int) -> np.ndarray:
    return np.empty(size, np.uint8)


class BatchMemory:
    """Makes arrays like `np.empty`; their memory comes back by itself when the last reference to them is gone.

    Safe in threads. A tensor made by `torch.from_numpy` holds such a reference, so tensors are the caller's to keep.
    """

    def __init__(self, keep: int, new_block: Callable[[int], np.ndarray] = _block) -> None:
        """`keep` is how many unused blocks of one size wait for reuse; more are given back to the system.

        `new_block` makes a block, (size,) uint8, when none is free: of pinned memory, for example.
        """
        self._keep = keep
        self._new_block = new_block
        self._free: defaultdict[int, list[np.ndarray]] = defaultdict(list)
        self._lock = threading.Lock()

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> np.ndarray:
        """An array of unspecified content."""
        size = _block_size(int(np.prod(shape)) * dtype.itemsize)
        with self._lock:
            waiting = self._free[size]
            block = waiting.pop() if waiting else None
        if block is None:
            block = self._new_block(size)
        array = np.ndarray(shape, dtype, buffer=block)
        weakref.finalize(array, self._take_back, block).atexit = False
        return array

    def _take_back(self, block: np.ndarray) -> None:
        with self._lock:
            if len(self._free[block.size]) < self._keep:
                self._free[block.size].append(block)


def _block_size(size: int) -> int:
    """`size` rounded up to a power of two or one and a half of one: ragged batches then share few sizes."""
    if size <= 4096:
        return 4096
    power = 1 << (size - 1).bit_length()
    return power * 3 // 4 if size <= power * 3 // 4 else power
