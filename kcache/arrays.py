"""Reading .npy files that may be anything."""

import tokenize
import warnings
from pathlib import Path

import numpy as np

__all__ = ["read_npy"]

# What numpy's parser of headers lets through besides ValueError.
_HEADER_ERRORS = (
    SyntaxError, tokenize.TokenError, TypeError, LookupError, RecursionError, MemoryError, ArithmeticError, UserWarning,
)  # fmt: skip


def read_npy(path: Path, *, mapped: bool = False) -> np.ndarray:
    """The array in a .npy file, read or memory-mapped; raises OSError, or ValueError for what is no such file.

    Not `np.load`, which opens archives, too, and tries other formats on what it does not know.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # a header of Python 2, which nothing here ever wrote
            if mapped:
                return np.lib.format.open_memmap(path, mode="r")
            with path.open("rb") as file:
                return np.lib.format.read_array(file, allow_pickle=False)
    except _HEADER_ERRORS as error:
        raise ValueError(f"{path.name} has no header of an array: {error}") from error
