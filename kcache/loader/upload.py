"""Batches on their way from the host's memory to the device, beside what the device is computing.

Their memory is used again once the caller has let go of it: a fresh array of some megabytes costs a page fault per 4 kB
when it is first written, which is more than the copy into it.
"""

import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch


class Upload:
    """Puts batches on a device. On CUDA they go out of pinned memory in a stream of their own, beside the computation.

    The filling threads call `send`, the caller's thread `receive`.
    """

    def __init__(self, device: torch.device, keep: int) -> None:
        """`keep` is how many unused blocks of host memory of one size wait for reuse."""
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # A block is pinned once and used for many batches: pinning one takes longer than filling it.
        self.memory = BatchMemory(keep, None if self._stream is None else _pinned_block)

    def send(self, arrays: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The arrays, or tensors, as tensors on the device; what is there already stays where it is."""
        batch = {name: torch.as_tensor(array) for name, array in arrays.items()}
        if self._stream is None:
            return {name: tensor.to(self._device) for name, tensor in batch.items()}
        staged = {name: self._staged(tensor) for name, tensor in batch.items()}
        with torch.cuda.stream(self._stream):
            sent = {name: tensor.to(self._device, non_blocking=True) for name, tensor in staged.items()}
        # Waiting here, where nobody waits for this thread, means that the pinned memory may be filled again as soon as
        # it is let go of, and that the caller's stream need not wait for this one.
        self._stream.synchronize()
        return sent

    def receive(self, batch: Mapping[str, torch.Tensor]) -> None:
        """Tell the allocator that the caller's stream uses `batch` too, which was allocated in the stream of `send`.

        Without that it would give the memory of a batch that the caller dropped to the next one, while the caller's
        kernels still read it.
        """
        if self._stream is not None:
            for tensor in batch.values():
                tensor.record_stream(torch.cuda.current_stream(self._device))

    def _staged(self, tensor: torch.Tensor) -> torch.Tensor:
        """A host tensor in pinned memory, where it is not there already."""
        if tensor.is_cuda or tensor.is_pinned():
            return tensor
        staged = torch.from_numpy(self.memory.empty(tuple(tensor.shape), tensor.numpy().dtype))
        return staged.copy_(tensor)


def _pinned_block(size: int) -> np.ndarray:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()


class BatchMemory:
    """Makes arrays like `np.empty`; their memory comes back by itself when the last reference to them is gone.

    Safe in threads. A tensor made by `torch.from_numpy` holds such a reference, so tensors are the caller's to keep.
    """

    def __init__(self, keep: int, new_block: Callable[[int], np.ndarray] | None = None) -> None:
        """`keep` is how many unused blocks of one size wait for reuse; more are given back to the system.

        `new_block` makes a block, (size,) uint8, when none is free: of pinned memory, for example.
        """
        self._keep = keep
        self._new_block = new_block or partial(np.empty, dtype=np.uint8)
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
