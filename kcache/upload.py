"""Batches on their way from the host's memory to the device, beside what the device is computing."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from kcache.buffers import BatchMemory

__all__ = ["Upload"]


class Upload:
    """Puts batches on a device. On CUDA they go out of pinned memory in a stream of their own, beside the computation.

    The filling threads call `send`, the caller's thread `receive`.
    """

    def __init__(self, device: torch.device, keep: int) -> None:
        """`keep` is how many unused blocks of host memory of one size wait for reuse."""
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # A block is pinned once and used for many batches: pinning one takes longer than filling it.
        self.memory = BatchMemory(keep) if self._stream is None else BatchMemory(keep, _pinned_block)

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
