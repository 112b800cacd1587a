"""Rows that an encoder made and that cannot be stored, and why."""

from collections.abc import Mapping

import numpy as np

from kcache.store.recipe import Recipe


def refusal_reasons(
    recipe: Recipe, values: Mapping[str, np.ndarray], stored: Mapping[str, np.ndarray], offsets: np.ndarray | None
) -> list[str | None]:
    """Why each row cannot be stored, None where it can: NaN or infinity from the encoder, or beyond the stored dtype.

    `values` are the encoder's results in float32, `stored` the same in the stored dtype; `offsets` bound ragged rows.
    """
    rows = len(next(iter(values.values()))) if offsets is None else len(offsets) - 1
    reasons: list[str | None] = [None] * rows
    for f in recipe.fields:
        bounds = offsets if f.ragged and offsets is not None else np.arange(rows + 1)
        bad = ~np.isfinite(stored[f.name]).reshape(len(stored[f.name]), -1).all(axis=1)
        for unit in np.flatnonzero(bad).tolist():
            row = int(np.searchsorted(bounds, unit, side="right")) - 1
            if np.isfinite(values[f.name][unit]).all():
                largest = float(np.abs(values[f.name][unit]).max())
                reasons[row] = (
                    f"{f.name} holds {largest:g}, more than {recipe.stored_dtype} can; build with --dtype float32"
                )
            else:
                reasons[row] = f"{f.name} came out of {recipe.encoder} as NaN or infinity, in float32 too"
    return reasons
