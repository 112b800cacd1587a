"""The order of "stream" shuffling: nearly as random as a permutation of all samples, and read in blocks of neighbours.

It is made for caches that no machine can hold, and that lie where a request takes long. Blocks of neighbouring samples
are permuted and dealt to lanes in turn; the samples of each window of a lane are shuffled; and position p of the epoch
is the next sample of lane p modulo the lanes. So any window is known alone, without an array of all samples, a few
windows of rows are all that has to be in memory, and processes that share out the lanes never want the same block.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from kcache.loader.chance import draw_blocks, draw_window

_BLOCK_ROWS = 16
"""1.2 MB of latents at 768 pixels: one request, long enough that the time until its first byte counts little."""
_LANES = 64
"""As many processes, or any divisor, can share out the lanes; a batch of 64 takes one sample of each."""
_MOST_BLOCKS, _FEWEST_BLOCKS, _WINDOWS = 64, 16, 4
"""Blocks of a window, by which a batch has hardly more neighbours than chance gives; fewer in small caches, so that no
more than a quarter of one has to be in memory, but never fewer than what mixes well."""
_FEWEST_BESIDE = 4
"""Where other orders are streamed beside it."""


@dataclass(frozen=True, kw_only=True)
class StreamShape:
    """What the order is made of; part of a run's state, as another shape is another order."""

    block_rows: int
    """Neighbouring samples that are read together."""
    lanes: int
    window_blocks: int
    """Blocks of one lane whose samples are shuffled together."""

    @property
    def window_rows(self) -> int:
        """Samples of one window of all lanes together."""
        return self.block_rows * self.lanes * self.window_blocks

    def windows(self, positions: np.ndarray, samples: int) -> np.ndarray:
        """The number of the window that each position of an epoch lies in: (n,) int64 → (n,) int64.

        The last one has what fills no window of every lane any more.
        """
        return np.minimum(
            positions // self.window_rows, samples // self.block_rows * self.block_rows // self.window_rows
        )


def stream_shape(samples: int) -> StreamShape:
    """The shape for a cache of so many samples: 16 × 64 × 64 from 262,144 on.

    Below 16,384 samples there is one window: all of them are shuffled together.
    """
    blocks = min(_MOST_BLOCKS, max(_FEWEST_BLOCKS, samples // (_WINDOWS * _LANES * _BLOCK_ROWS)))
    return StreamShape(block_rows=_BLOCK_ROWS, lanes=_LANES, window_blocks=blocks)


def stream_shapes(counts: Sequence[int]) -> list[StreamShape]:
    """The shapes for samples that are streamed side by side, `counts` in each order: windows of about one cache's."""
    whole, samples = stream_shape(sum(counts)), sum(counts)
    blocks = [max(_FEWEST_BESIDE, -(-whole.window_blocks * count // samples)) for count in counts]
    return [replace(whole, window_blocks=each) for each in blocks] if len(counts) > 1 else [whole]


class StreamOrder:
    """The samples of one epoch in their order: `order[positions]` gives those at some positions of it.

    What is kept grows with the blocks only, four bytes for each. Blocks that fill no window of every lane any more,
    with the block that is shorter, are the last window: shuffled together. Safe in threads.
    """

    def __init__(self, seed: int, epoch: int, samples: int, shape: StreamShape, bucket: int = 0) -> None:
        self._seed = seed
        self._epoch = epoch
        self._samples = samples
        self._shape = shape
        self._bucket = bucket
        self._blocks = draw_blocks(seed, epoch, samples // shape.block_rows, bucket)
        self._last = int(shape.windows(np.array([samples]), samples)[0])
        # Beside a batch at the border of two windows stand those who read ahead.
        self._window = lru_cache(maxsize=4)(self._make_window)

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        """The samples at `positions` (n,) int64 of the epoch: (n,) int64."""
        windows = self._shape.windows(positions, self._samples)
        samples = np.empty(len(positions), np.int64)
        for window in np.unique(windows).tolist():
            mine = windows == window
            samples[mine] = self._window(window)[positions[mine] - window * self._shape.window_rows]
        return samples

    def _make_window(self, window: int) -> np.ndarray:
        """The samples of one window of all lanes, in order: (window_rows,) int64, or (n,) of the last one."""
        shape = self._shape
        blocks = self._blocks[window * shape.lanes * shape.window_blocks :]
        if window < self._last:
            blocks = blocks[: shape.lanes * shape.window_blocks]
        rows = (blocks.astype(np.int64)[:, None] * shape.block_rows + np.arange(shape.block_rows)).reshape(-1)
        if window == self._last:
            short = np.arange(len(self._blocks) * shape.block_rows, self._samples)
            rows = np.concatenate([rows, short])
            return rows[self._drawn(window, shape.lanes, len(rows))]
        lane_rows = shape.window_blocks * shape.block_rows
        # (window_blocks, lanes, block_rows): blocks were dealt in turn
        lanes = rows.reshape(shape.window_blocks, shape.lanes, shape.block_rows).swapaxes(0, 1).reshape(-1, lane_rows)
        orders = [self._drawn(window, lane, lane_rows) for lane in range(shape.lanes)]
        return np.take_along_axis(lanes, np.stack(orders), axis=1).T.reshape(-1)

    def _drawn(self, window: int, lane: int, rows: int) -> np.ndarray:
        return draw_window(self._seed, self._epoch, window, lane, rows, self._bucket)


def share_of_lanes(positions: np.ndarray, lanes: int, rank: int, world_size: int) -> np.ndarray | None:
    """Which of consecutive `positions` are those of process `rank`: (n,) bool, each process having as many.

    None where the processes do not divide the lanes, or the lanes the positions: then no lane is one process's alone.
    """
    if lanes % world_size or len(positions) % lanes:
        return None
    return positions % lanes * world_size // lanes == rank
