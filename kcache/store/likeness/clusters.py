"""Rows of length 1 divided into clusters: spherical k-means (Dhillon and Modha 2001), by cosines."""

import numpy as np

from kcache.disk.scratch import spans
from kcache.store.likeness.cosines import unit

_TOGETHER = 8192
"""Rows that are compared with all middles at a time."""


def nearest_middles(rows: np.ndarray, middles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The middle with the largest cosine to each of `rows` (n, D), and that cosine: (n,) int64 and (n,) float32."""
    numbers, cosines = np.empty(len(rows), np.int64), np.empty(len(rows), np.float32)
    for span in spans(len(rows), _TOGETHER):
        found = rows[span] @ middles.T
        numbers[span] = found.argmax(1)
        cosines[span] = np.take_along_axis(found, numbers[span, None], 1)[:, 0]
    return numbers, cosines


def moved(rows: np.ndarray, middles: np.ndarray, rounds: int) -> np.ndarray:
    """Middles (k, D), each moved to the middle of the rows that are nearest to it, `rounds` times or until they stay.

    One without a row stays where it is. All are of length 1, float32.
    """
    before = np.full(len(rows), -1)
    for _ in range(rounds):
        numbers, _ = nearest_middles(rows, middles)
        if np.array_equal(numbers, before):
            break
        before, order = numbers, np.argsort(numbers, kind="stable")
        used, starts = np.unique(numbers[order], return_index=True)
        ends = [*starts[1:].tolist(), len(rows)]
        sums = [rows[order[first:last]].sum(0) for first, last in zip(starts.tolist(), ends, strict=True)]
        middles = middles.copy()
        middles[used] = unit(np.stack(sums))
    return middles


def far_apart(rows: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """At most `count` of `rows` (n, D) to begin with, drawn by k-means++: the farther from those drawn, the likelier.

    There are fewer where no other row differs from all that are drawn. (Arthur and Vassilvitskii 2007.)
    """
    chosen = [int(rng.integers(len(rows)))]
    distances = np.ones(len(rows))
    while len(chosen) < count:
        distances = np.minimum(distances, 1 - (rows @ rows[chosen[-1]]).astype(np.float64)).clip(0)
        distances[distances < 1e-6] = 0  # rounding: these are the same
        if not (total := distances.sum()):
            break
        chosen.append(int(rng.choice(len(rows), p=distances / total)))
    return rows[chosen]
