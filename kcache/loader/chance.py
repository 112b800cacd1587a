"""What chance decides in training: the order of each epoch, and per sample its noise and all else that is drawn.

Nothing but the seed and the sample's turn can change it. The turn is a sample's running number in the whole training:
optimizer step × global batch + position in the global batch. Each draw is a stream of numpy's Philox generator (Salmon
et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") keyed by (seed, purpose) with the turn, or of an order the
epoch, in its counter: the same on every device, number of processes, thread and residency, and after any interruption.
A sample may take several draws of noise and timestep: the counter holds the draw's number as well, and the first is
what it would be alone.
"""

from itertools import product

import numpy as np

_ORDER, _NOISE, _TIMESTEP, _CAPTION, _CAPTION_DROPOUT, _IMAGE_DROPOUT, _SEED, _STREAM, _PASS, _FLIP, _MASK = range(11)
_OWN_MASK, _ROUNDING = 11, 12
"""What is drawn, by its number in the key: one is never used for two things."""

BLOCK_ROWS = 16
"""Neighbouring samples that "block" shuffling keeps together on disk."""
WINDOW_ROWS = 16_384
"""Samples among which "block" shuffling mixes freely: 1.2 GB of latents at 768 pixels."""

PASSES_DRAWN = 1024
"""Passes whose buckets are drawn together, as a generator takes longer to make than to ask."""


def epoch_order(seed: int, epoch: int, samples: int, shuffle: str, bucket: int = 0) -> np.ndarray:
    """The samples in the order in which epoch `epoch` visits them, each once: (samples,) int64, or int32 where it fits.

    Each of several buckets has an order by its number, below 2³²; what is alone has 0.

    "full" is one uniform permutation. "block" permutes blocks of 16 neighbours, then the samples of each run of 16,384:
    nearly as random (1.9 times as many neighbours in a batch as chance gives), and it reads each part of the disk once.
    The third shuffle, "stream", is no array: see `kcache.loader.streaming.streamed`.
    """
    generator = _stream(seed, _ORDER, epoch, bucket << 32)
    if shuffle == "full":
        order = np.arange(samples, dtype=np.int32 if samples < 1 << 31 else np.int64)
        generator.shuffle(order)  # what `permutation` gives, in half the memory
        return order
    starts = generator.permutation(np.arange(0, samples, BLOCK_ROWS))
    blocks = (starts[:, None] + np.arange(BLOCK_ROWS)).reshape(-1)
    order = blocks[blocks < samples]
    for start in range(0, samples, WINDOW_ROWS):
        generator.shuffle(order[start : start + WINDOW_ROWS])
    return order


def draw_blocks(seed: int, epoch: int, blocks: int, bucket: int = 0) -> np.ndarray:
    """The order in which "stream" shuffling takes its blocks in epoch `epoch`: (blocks,) int32."""
    order = np.arange(blocks, dtype=np.int32)
    _stream(seed, _STREAM, epoch, bucket << 32).shuffle(order)
    return order


def draw_window(seed: int, epoch: int, window: int, lane: int, rows: int, bucket: int = 0) -> np.ndarray:
    """The order of the `rows` of one window of one lane in "stream" shuffling: (rows,) int64; alone, as any other."""
    return _stream(seed, _STREAM, epoch, 1 + lane | bucket << 32, window).permutation(rows)


def draw_passes(seed: int, block: int) -> np.ndarray:
    """What decides the buckets of `PASSES_DRAWN` passes, uniform in [0, 1): (PASSES_DRAWN,) float64."""
    return _stream(seed, _PASS, block).random(PASSES_DRAWN)


def draw_noise(seed: int, turns: np.ndarray, shape: tuple[int, ...], draws: int = 1) -> np.ndarray:
    """Standard normal noise for the samples at `turns` (B,) int64 → (B × draws, *shape) float32, draws of one together.

    Draw k of a sample is the same for any number of `draws`.
    """
    noise = np.empty((len(turns) * draws, *shape), np.float32)
    for row, (turn, number) in zip(noise, product(turns.tolist(), range(draws)), strict=True):
        _stream(seed, _NOISE, turn, number).standard_normal(out=row, dtype=np.float32)
    return noise


def draw_timesteps(seed: int, turns: np.ndarray, num_train_timesteps: int, draws: int = 1) -> np.ndarray:
    """Uniform timesteps in [0, num_train_timesteps) for the samples at `turns` (B,) int64 → (B × draws,) int64.

    They are ordered as `draw_noise` has them.
    """
    numbers = product(turns.tolist(), range(draws))
    drawn = [_stream(seed, _TIMESTEP, turn, number).integers(num_train_timesteps) for turn, number in numbers]
    return np.array(drawn, np.int64)


def draw_choice(seed: int, turns: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Which of its `counts[i]` captions the sample at `turns[i]` takes, each alike: (B,) int64 → (B,) int64."""
    choice = np.zeros(len(turns), np.int64)
    for i in np.flatnonzero(counts > 1).tolist():
        choice[i] = _stream(seed, _CAPTION, int(turns[i])).integers(int(counts[i]))
    return choice


def draw_dropout(seed: int, turns: np.ndarray, what: str, probability: float) -> np.ndarray:
    """Which samples at `turns` (B,) int64 train without their "caption" or "image", by `probability` → (B,) bool."""
    if probability == 0:
        return np.zeros(len(turns), np.bool_)
    purpose = {"caption": _CAPTION_DROPOUT, "image": _IMAGE_DROPOUT}[what]
    return np.array([_stream(seed, purpose, turn).random() < probability for turn in turns.tolist()], np.bool_)


def draw_flip(seed: int, turns: np.ndarray) -> np.ndarray:
    """Which samples at `turns` (B,) int64 take the rows of their mirrored picture, half of them → (B,) bool."""
    return np.array([_stream(seed, _FLIP, turn).random() < 0.5 for turn in turns.tolist()], np.bool_)


def mask_stream(seed: int, turn: int) -> np.random.Generator:
    """What the mask of the sample at `turn` is drawn from, see `kcache.loader.masks`."""
    return _stream(seed, _MASK, turn)


def draw_own_mask(seed: int, turns: np.ndarray, share: float) -> np.ndarray:
    """Which samples at `turns` (B,) int64 take their own mask, if they have one, by `share` → (B,) bool."""
    return np.array([_stream(seed, _OWN_MASK, turn).random() < share for turn in turns.tolist()], np.bool_)


def draw_seed(seed: int, turn: int) -> int:
    """A seed below 2⁶³ for a generator that the network itself draws from, as the dropout of adapters does."""
    return int(_stream(seed, _SEED, turn).integers(2**63))


def draw_rounding(seed: int, step: int, number: int) -> int:
    """A seed below 2⁶³ for rounding parameter `number` after optimizer step `step`."""
    return int(_stream(seed, _ROUNDING, step, number).integers(2**63))


def _stream(seed: int, purpose: int, turn: int, number: int = 0, window: int = 0) -> np.random.Generator:
    # The generator counts in the lowest word of its counter; what tells streams apart is higher, so they never meet.
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=[0, window, turn, number]))
