"""A public random rotation: it spreads a vector's weight evenly, so that a small modulus holds every coordinate.

Random signs, then a Walsh-Hadamard transform in blocks of the largest power of two that fits (at most 4096); what the
blocks leave over at the end is covered by one more signed block over the last coordinates, which overlaps the one
before. Every step is orthogonal and nothing is padded. Each coordinate of the result is sub-Gaussian with variance
proxy at most |x|^2 / block (Kairouz, Liu and Steinke 2021, arXiv:2102.06387, section 4.2: Lemma 29 in the numbering of
the authors' code; in blocks the bound is with the block's length, not the vector's).
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from edge_sdk.crypto.hashing import tagged_hash
from edge_sdk.crypto.stream import KeyStream
from edge_sdk.errors import ParameterError

F64 = NDArray[np.float64]
MAX_BLOCK = 4096

_PIECE_BLOCKS = 2
"""Of 4096 coordinates: 64 KiB an array, so that the passes over a piece stay in a small cache."""


def block_length(dimension: int) -> int:
    """The transform's length for vectors of `dimension` >= 1: a power of two, at most 4096."""
    if dimension < 1:
        raise ParameterError(f"a vector of {dimension} coordinates cannot be rotated")
    return min(MAX_BLOCK, 1 << (dimension.bit_length() - 1))


def rotate(vector: F64, seed: bytes) -> F64:
    """The rotated vector, new, float64 (dimension,), of the same norm up to float64 rounding.

    seed: public, the same for all devices of a round: the ticket's hash. Honest data does not depend on it. A device
    that fits its vector to the seed can make its own group's sum wrap, which it could do by lying as well.
    """
    signs = _Signs(vector.size, seed)
    out = vector.copy()
    signs.flip(out, 0)
    _transform_blocks(out)
    block = block_length(vector.size)
    if vector.size % block:
        window = out[-block:]
        signs.flip(window, vector.size)
        _transform(window, block)
    return out


def rotate_back(vector: F64, seed: bytes) -> F64:
    """The inverse of `rotate` with the same seed."""
    signs = _Signs(vector.size, seed)
    out = vector.copy()
    block = block_length(vector.size)
    if vector.size % block:
        window = out[-block:]
        _transform(window, block)
        signs.flip(window, vector.size)
    _transform_blocks(out)
    signs.flip(out, 0)
    return out


class _Signs:
    """+1 or -1 for every coordinate, and after them for the last window: bits of one public stream, lowest bit of a
    byte first."""

    def __init__(self, dimension: int, seed: bytes) -> None:
        total = dimension + block_length(dimension)
        self._bytes = KeyStream(tagged_hash("rotation", seed)).read(-(-total // 8))

    def flip(self, values: F64, first: int) -> None:
        """Multiply `values` by the signs from number `first` on, in place."""
        step = _PIECE_BLOCKS * MAX_BLOCK
        for start in range(0, values.size, step):
            piece = values[start : start + step]
            byte, bit = divmod(first + start, 8)
            bits = np.unpackbits(self._bytes[byte : byte + step // 8 + 1], bitorder="little")[bit : bit + piece.size]
            signs = bits.astype(np.float64)
            signs *= -2.0
            signs += 1.0
            piece *= signs


def _transform_blocks(vector: F64) -> None:
    """The transform of each whole block of a vector, in place."""
    block = block_length(vector.size)
    step, whole = _PIECE_BLOCKS * block, vector.size // block * block
    for start in range(0, whole, step):
        _transform(vector[start : min(start + step, whole)], block)


def _transform(vector: F64, block: int) -> None:
    """The orthonormal Walsh-Hadamard transform of each of the blocks that `vector`, contiguous, is made of, in place.

    H of n = p q is that of p times that of q: two matrix products instead of log2(n) passes over memory, 16 times fewer
    bytes moved at n = 4096.
    """
    left = 1 << (block.bit_length() - 1) // 2
    cube = vector.reshape(-1, left, block // left)
    np.matmul(_hadamard(left), np.matmul(cube, _hadamard(block // left)), out=cube)


@cache
def _hadamard(order: int) -> F64:
    """The orthonormal Hadamard matrix in natural order (Sylvester's), float64 (order, order)."""
    matrix = np.ones((1, 1))
    while len(matrix) < order:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    result: F64 = matrix / np.sqrt(order)
    return result
