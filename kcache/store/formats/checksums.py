"""The CRC-32C of bytes, and that of many rows behind each other from each row's own: one check for all of them."""

import hashlib
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

_BLOCK_BYTES = 4 << 20


def crc32c(content: Any, before: int = 0) -> int:
    """The CRC-32C of a buffer's bytes, `before` being that of what precedes them."""
    return _computing()(content, before)


@cache
def _computing() -> Callable[[Any, int], int]:
    # It takes 1.7 µs for 74 kB where the crc32c and google-crc32c packages take 3.0, and 10 for 512 kB where they take
    # 19; loading it is a seventh of what importing kcache would take, and many commands check nothing.
    from awscrt.checksums import crc32c as computed

    return computed


def file_sums(path: Path) -> tuple[int, int, str]:
    """Bytes, crc32c and sha256 (hex) of a file, read once."""
    size, checksum, digest = 0, 0, hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            size, checksum = size + len(block), crc32c(block, checksum)
            digest.update(block)
    return size, checksum, digest.hexdigest()


def joined_crc32c(checksums: np.ndarray, length: int) -> int:
    """The CRC-32C of rows of `length` bytes each that follow one another, from each row's own, (n,) uint32.

    crc(A ‖ B) = crc(A)·x^(8·|B|) + crc(B) over the polynomials modulo Castagnoli's, as zlib's crc32_combine has it for
    another polynomial; to join 64 rows by 64 calls of `combine_crc32c` takes four times as long. No error of up to
    three bits goes unnoticed in fewer than 2^31 bits, so that one check of a whole batch finds as much as one of each
    row (Koopman, "32-bit cyclic redundancy codes for internet applications").
    """
    if not len(checksums):
        return 0
    terms, starts = _terms(length, len(checksums))
    return int(np.bitwise_xor.reduce(terms[starts + checksums.astype("<u4").view(np.uint8)]))


@lru_cache(maxsize=16)
def _terms(length: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """What each value of each byte of `count` checksums adds to that of all, and where each byte's 256 values start."""
    from awscrt.checksums import combine_crc32c

    # What each bit of the i-th checksum becomes when the rows behind it are appended.
    advances = [[combine_crc32c(1 << bit, 0, i * length) for bit in range(32)] for i in reversed(range(count))]
    bits = (np.arange(256)[:, None] >> np.arange(8)).astype(np.uint32) & 1
    columns = np.array(advances, np.uint32).reshape(-1, 1, 8)  # by byte
    terms = np.bitwise_xor.reduce(columns * bits, axis=2)  # a look-up for each byte takes a third of eight bits' sums
    return terms.reshape(-1), np.arange(0, terms.size, 256)
