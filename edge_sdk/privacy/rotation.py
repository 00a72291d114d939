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
    signs, window_signs = _signs(vector.size, seed)
    out = vector * signs
    block = block_length(vector.size)
    whole = vector.size // block * block
    out[:whole] = _transform(out[:whole].reshape(-1, block)).reshape(-1)
    if whole < vector.size:
        out[-block:] = _transform((out[-block:] * window_signs).reshape(1, block)).reshape(-1)
    return out


def rotate_back(vector: F64, seed: bytes) -> F64:
    """The inverse of `rotate` with the same seed."""
    signs, window_signs = _signs(vector.size, seed)
    out = vector.copy()
    block = block_length(vector.size)
    whole = vector.size // block * block
    if whole < vector.size:
        out[-block:] = _transform(out[-block:].reshape(1, block)).reshape(-1) * window_signs
    out[:whole] = _transform(out[:whole].reshape(-1, block)).reshape(-1)
    out *= signs
    return out


def _signs(dimension: int, seed: bytes) -> tuple[F64, F64]:
    """+1 or -1 for every coordinate, and for the last window: bits of one public stream, lowest bit of a byte first."""
    total = dimension + block_length(dimension)
    bits = np.unpackbits(KeyStream(tagged_hash("rotation", seed)).read(-(-total // 8)), bitorder="little")[:total]
    signs: F64 = 1.0 - 2.0 * bits.astype(np.float64)
    return signs[:dimension], signs[dimension:]


def _transform(rows: F64) -> F64:
    """The orthonormal Walsh-Hadamard transform of each row, (k, block): H of n = p q is that of p times that of q.

    Two matrix products instead of log2(n) passes over memory; 16 times fewer bytes moved at n = 4096.
    """
    count, block = rows.shape
    left = 1 << (block.bit_length() - 1) // 2
    cube = rows.reshape(count, left, block // left)
    product: F64 = np.matmul(_hadamard(left), np.matmul(cube, _hadamard(block // left)))
    return product.reshape(count, block)


@cache
def _hadamard(order: int) -> F64:
    """The orthonormal Hadamard matrix in natural order (Sylvester's), float64 (order, order)."""
    matrix = np.ones((1, 1))
    while len(matrix) < order:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    result: F64 = matrix / np.sqrt(order)
    return result
