"""The CRC-32C of bytes, and that of many rows behind each other from each row's own: one check for all of them."""

from functools import lru_cache

import numpy as np

# It takes 1.7 µs for 74 kB where the crc32c and google-crc32c packages take 3.0, and 10 for 512 kB where they take 19.
from awscrt.checksums import crc32c as crc32c

_POLYNOMIAL = 0x82F63B78
"""Castagnoli's, its bits reversed, as in RFC 3720, appendix B.4."""


def joined_crc32c(checksums: np.ndarray, length: int) -> int:
    """The CRC-32C of rows of `length` bytes each that follow one another, from each row's own, (n,) uint32.

    crc(A ‖ B) = crc(A)·x^(8·|B|) + crc(B) over the polynomials modulo Castagnoli's, as zlib's crc32_combine has it for
    another polynomial. No error of up to three bits goes unnoticed in fewer than 2^31 bits, so that one check of a
    whole batch finds as much as one of each row (Koopman, "32-bit cyclic redundancy codes for internet applications").
    """
    if not len(checksums):
        return 0
    terms, starts = _terms(length, len(checksums))
    return int(np.bitwise_xor.reduce(terms[starts + checksums.astype("<u4").view(np.uint8)]))


@lru_cache(maxsize=16)
def _terms(length: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """What each value of each byte of `count` checksums adds to that of all, and where each byte's 256 values start."""
    bits = (np.arange(256)[:, None] >> np.arange(8)).astype(np.uint32) & 1
    columns = _advances(length, count).reshape(-1, 1, 8)  # by byte
    terms = np.bitwise_xor.reduce(columns * bits, axis=2)  # a look-up for each byte takes a third of eight bits' sums
    return terms.reshape(-1), np.arange(0, terms.size, 256)


def _advances(length: int, count: int) -> np.ndarray:
    """What each bit of the i-th of `count` checksums becomes when what is behind it is appended, (count, 32) uint32."""
    step, advances = _advance(length), np.empty((count, 32), np.uint32)
    advances[-1] = np.uint32(1) << np.arange(32, dtype=np.uint32)
    for i in range(count - 1, 0, -1):
        advances[i - 1] = _applied(step, advances[i])
    return advances


def _advance(length: int) -> np.ndarray:
    """What each bit of a checksum becomes when `length` zero bytes are appended, (32,) uint32."""
    power = np.concatenate([[_POLYNOMIAL], 1 << np.arange(31)]).astype(np.uint32)  # one zero bit
    advance = np.uint32(1) << np.arange(32, dtype=np.uint32)
    bits = 8 * length
    while bits:
        if bits & 1:
            advance = _applied(power, advance)
        power, bits = _applied(power, power), bits >> 1
    return advance


def _applied(columns: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The linear map that sends bit j to `columns[j]`, applied to each of the values; both uint32."""
    bits = (values[:, None] >> np.arange(32, dtype=np.uint32)) & 1
    applied: np.ndarray = np.bitwise_xor.reduce(bits * columns, axis=1)
    return applied
