"""Some samples of an index."""

from collections.abc import Mapping

import numpy as np

from kcache.store.recipe import kind_of

CAPTION_BOUNDS = "captions"


def chosen_index(index: Mapping[str, np.ndarray], samples: np.ndarray) -> dict[str, np.ndarray]:
    """The index of the chosen `samples` (n,), in that order, of those that `index` is of."""
    before = index[CAPTION_BOUNDS]
    starts, counts = before[samples], np.diff(before)[samples]
    bounds = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    captions = np.repeat(starts - bounds[:-1], counts) + np.arange(bounds[-1])
    chosen = {CAPTION_BOUNDS: bounds}
    for name in index.keys() - chosen.keys():
        of_captions = kind_of(name).per == "caption"
        positions, in_use = (captions, int(before[-1])) if of_captions else (samples, len(before) - 1)
        chosen[name] = np.concatenate([index[name][positions], index[name][in_use:]])
    return chosen
