"""The ring Z_2^32[X]/(X^2048 + 1): one short polynomial times many uniform ones, exactly, by floating-point FFT.

A negacyclic product of real polynomials of degree N is a cyclic one of N/2 complex numbers: fold the upper half into
the imaginary part, twist by exp(i*pi*k/N), transform, multiply, transform back, untwist. Multiplication by a fixed
polynomial is linear, so many blocks share one transform of the short factor.

**Exactness.** Brent, Percival and Zimmermann 2007 ("Error bounds on complex floating-point multiplication", Theorem
5.1) bound the error of such a product in float64, for any input, by |a| |s| ((1+u)^(3n) (1+u*sqrt(5))^(3n+1)
(1+t)^(3n) - 1) with u = 2^-53, n = log2(N/2) = 10 and t the error of the roots of unity (at most 2u here). The twists
are three further multiplications. (The theorem is for radix 2. numpy's transform takes radix 4 and 8 passes, which are
two and three such stages with the same additions and fewer multiplications, so that the bound covers them.) With |a|
at most 2^31 sqrt(N), the error stays below 1/2, so that rounding gives the exact integers, whenever |s| <= MAX_NORM. A
longer s is split into limbs that satisfy the bound, and the products are added modulo 2^32.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from edge_sdk.crypto.stream import KeyStream
from edge_sdk.errors import ParameterError

DEGREE = 2048
_HALF = DEGREE // 2
_CHUNK_BLOCKS = 16  # 256 KiB of complex numbers: stays in the second-level cache of a Pi

_STAGES = 10
_UNIT = 2.0**-53
_RELATIVE_ERROR = math.expm1(
    3 * _STAGES * math.log1p(_UNIT)
    + (3 * _STAGES + 1 + 3) * math.log1p(math.sqrt(5) * _UNIT)
    + (3 * _STAGES + 3) * math.log1p(2 * _UNIT)
)
MAX_NORM = 0.49 / (2.0**31 * math.sqrt(DEGREE) * _RELATIVE_ERROR)
"""Largest Euclidean norm of a short factor for which one float64 product is proved exact: about 264."""

_LIMB = 10
"""Limbs lie in [-5, 4]: their norm is at most 5 * sqrt(2048) = 226.3 < MAX_NORM whatever the polynomial is."""

# 1.5 * 2^52: adding it to a float64 of magnitude below 2^51 rounds it to the nearest integer and leaves that integer,
# modulo 2^32, in the low half of the bits.
_ROUND = 6755399441055744.0

_TWIST = np.exp(1j * np.pi / DEGREE * np.arange(_HALF))
_UNTWIST = _TWIST.conj()


class ShortFactor:
    """A short polynomial, transformed once: int64 coefficients (2048,), each of magnitude at most 10^6.

    Raises ParameterError on another shape, type or size.
    """

    __slots__ = ("_limbs",)

    def __init__(self, coefficients: NDArray[np.int64]) -> None:
        if coefficients.shape != (DEGREE,) or coefficients.dtype != np.int64:
            raise ParameterError(f"a factor is int64 ({DEGREE},), not {coefficients.dtype} {coefficients.shape}")
        # Not by abs(): that of the smallest int64 is negative.
        if coefficients.max() > 10**6 or coefficients.min() < -(10**6):
            raise ParameterError("a short factor's coefficients must not pass 10^6")
        self._limbs: list[tuple[int, NDArray[np.complex128]]] = []
        rest, weight = coefficients, 1
        while float(np.linalg.norm(rest.astype(np.float64))) > MAX_NORM:
            limb = (rest + _LIMB // 2) % _LIMB - _LIMB // 2
            self._limbs.append((weight, _transform(limb)))
            rest, weight = (rest - limb) // _LIMB, weight * _LIMB
        self._limbs.append((weight, _transform(rest)))

    def __repr__(self) -> str:
        return f"ShortFactor(limbs={len(self._limbs)})"

    def multiply_into(self, blocks: NDArray[np.uint32], out: NDArray[np.uint32]) -> None:
        """out = this factor times each block, modulo 2^32 and X^2048 + 1.  Both uint32, (blocks, 2048).

        `out` may be `blocks`.  Raises ParameterError on another shape or type.
        """
        for array in (blocks, out):
            if array.dtype != np.uint32 or array.ndim != 2 or array.shape != (len(blocks), DEGREE):
                raise ParameterError(f"blocks are uint32 (count, {DEGREE}), not {array.dtype} {array.shape}")
        for start in range(0, len(blocks), _CHUNK_BLOCKS):
            chunk = slice(start, start + _CHUNK_BLOCKS)
            self._multiply_chunk(blocks[chunk], out[chunk])

    def _multiply_chunk(self, blocks: NDArray[np.uint32], out: NDArray[np.uint32]) -> None:
        signed = blocks.view(np.int32)  # centred: half the norm of the unsigned representatives
        spectrum = np.empty((len(blocks), _HALF), dtype=np.complex128)
        spectrum.real = signed[:, :_HALF]
        spectrum.imag = signed[:, _HALF:]
        spectrum *= _TWIST
        np.fft.fft(spectrum, out=spectrum)
        for position, (weight, factor) in enumerate(self._limbs):
            last = position == len(self._limbs) - 1
            product = np.multiply(spectrum, factor, out=spectrum if last else None)
            np.fft.ifft(product, norm="forward", out=product)  # "forward": the 1/1024 is in the factor already
            product *= _UNTWIST
            rounded = product.view(np.float64)
            rounded += _ROUND
            integers = rounded.view(np.int64)
            if position == 0:
                out[:, :_HALF] = integers[:, 0::2]
                out[:, _HALF:] = integers[:, 1::2]
            else:
                out[:, :_HALF] += integers[:, 0::2].astype(np.uint32) * np.uint32(weight)
                out[:, _HALF:] += integers[:, 1::2].astype(np.uint32) * np.uint32(weight)


def _transform(coefficients: NDArray[np.int64]) -> NDArray[np.complex128]:
    folded = coefficients[:_HALF] + 1j * coefficients[_HALF:]
    return np.fft.fft(folded * _TWIST) / _HALF


def public_blocks(stream: KeyStream, count: int) -> NDArray[np.uint32]:
    """The next `count` uniform ring elements of the public polynomial, uint32 (count, 2048), little endian words."""
    out = np.empty((count, DEGREE), dtype="<u4")
    stream.fill(out.reshape(-1).view(np.uint8))
    return out.astype(np.uint32, copy=False)
