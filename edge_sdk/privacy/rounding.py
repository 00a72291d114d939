"""Stochastic rounding to integers, and how far it can stretch a vector (docs/privacy.md section 2).

Source: Kairouz, Liu and Steinke 2021, arXiv:2102.06387, section 4.1 (conditional randomized rounding: Proposition 22 in
the numbering of the authors' code) and Theorem 1. docs/privacy.md repeats the proof, which is short.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from edge_sdk.crypto.stream import KeyStream
from edge_sdk.errors import ParameterError

F64 = NDArray[np.float64]
MAX_TRIES = 512

_PIECE = 1 << 13
"""Coordinates at a time: 64 KiB an array, which stays in a small cache and leaves memory as it was."""


def square_norm(vector: F64 | NDArray[np.int64], unit: float = 1.0) -> float:
    """The sum of the squares of vector / unit, to 1 part in 1e13: numpy adds in pairs and fsum exactly, whatever d is.

    vector: float64, or integers below 2^53 in magnitude.
    Not a product: BLAS adds one after the other, and its other threads spin for 20 ms after each call.
    """
    pieces = (vector[start : start + _PIECE] for start in range(0, vector.size, _PIECE))
    return math.fsum(float(np.square(piece / unit).sum()) for piece in pieces)


def rounded_norm_bound(norm: float, dimension: int, beta: float) -> float:
    """A bound that the norm of a rounded vector passes with probability at most `beta`: steps.

    norm: of the vector before rounding, steps, >= 0.  beta in (0, 1).
    The square root of min( c^2 + d/4 + sqrt(2 ln(1/beta)) (c + sqrt(d)/2), (c + sqrt(d))^2 ).
    """
    if not (norm >= 0 and dimension >= 1 and 0 < beta < 1):
        raise ParameterError(f"no bound for norm {norm}, dimension {dimension}, beta {beta}")
    root = math.sqrt(dimension)
    likely = norm * norm + dimension / 4 + math.sqrt(2 * math.log(1 / beta)) * (norm + root / 2)
    return math.sqrt(min(likely, (norm + root) ** 2))


def round_stochastically(values: F64, stream: KeyStream) -> NDArray[np.int64]:
    """floor(values) plus one with the probability of the fraction, coordinate by coordinate: unbiased to 2^-53.

    values: (d,) float64, magnitudes below 2^53.  The result has the distribution of floor(v + U), U uniform on the
    multiples of 2^-53 in [0, 1) and v within 2^-53 of `values` on the same grid, so that two neighbouring inputs can be
    coupled through one U (docs/privacy.md section 2.2). It is never drawn again.
    """
    rounded = np.empty(values.size, dtype=np.int64)
    for start in range(0, values.size, _PIECE):
        piece, out = values[start : start + _PIECE], rounded[start : start + _PIECE]
        below = np.floor(piece)
        coins = (stream.words64(piece.size) >> np.uint64(11)).astype(np.float64)
        coins *= 2.0**-53
        out[:] = below
        out += coins < piece - below
    return rounded


def round_conditionally(values: F64, bound: float, stream: KeyStream) -> NDArray[np.int64]:
    """`round_stochastically`, drawn again until the norm is at most `bound`: one device's norm is then certain.

    Right for one vector per device; not for a sum of examples, where drawing again would depend on all of them.
    Raises ParameterError if 512 draws all exceed the bound: it was not made for this vector.
    """
    limit = bound * bound * (1 - 1e-9)  # above what float64 can lose in the sum of the squares
    for _ in range(MAX_TRIES):
        rounded = round_stochastically(values, stream)
        if square_norm(rounded) <= limit:
            return rounded
    raise ParameterError(f"no rounding of this vector has a norm below {bound}")
