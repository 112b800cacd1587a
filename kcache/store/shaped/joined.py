"""Entries of pictures, and those of the mirrored ones behind them, asked as one array is; neither is copied."""

from typing import Any

import numpy as np


class Joined:
    """Two arrays of entries, one behind the other."""

    def __init__(self, first: Any, second: Any) -> None:
        """Both are asked as arrays (n,) of the same dtype are."""
        self._parts = first, second
        self._border = len(first)

    @property
    def parts(self) -> tuple[Any, Any]:
        """The two of them."""
        return self._parts

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self._parts[0].dtype)

    @property
    def unread(self) -> int:
        """Bytes of both that nobody has asked for yet."""
        return sum(getattr(part, "unread", 0) for part in self._parts)

    def __len__(self) -> int:
        return self._border + len(self._parts[1])

    def __getitem__(self, rows: Any) -> Any:
        if isinstance(rows, str):
            return np.concatenate([part[rows] for part in self._parts])
        numbers = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else np.asarray(rows)
        is_first = numbers < self._border
        if is_first.all():
            return self._parts[0][numbers]
        found = np.empty(numbers.shape, self.dtype)
        found[is_first] = self._parts[0][numbers[is_first]]
        found[~is_first] = self._parts[1][numbers[~is_first] - self._border]
        return found
