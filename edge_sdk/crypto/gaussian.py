"""Discrete Gaussian samples of a small, fixed standard deviation: the mask's secrets and errors.

P(k) is proportional to exp(-k^2 / (2 sigma^2)) over the integers. A sample compares a uniform 128-bit number with the
cumulative distribution; most of the time its first 16 bits settle it, so they go through a table and only the few
words that a boundary cuts (about one in 1600 at sigma = 4.5) read the other 112. The result is that of the full
128-bit comparison: at most 2^-120 from the ideal distribution per sample (docs/protocol.md section 2.3).

The table look-up and the rare second reading depend on secret values: this is not constant time
(docs/threat-model.md, "Side channels").
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal, localcontext
from functools import cache

import numpy as np
from numpy.typing import NDArray

from edge_sdk.crypto.stream import KeyStream
from edge_sdk.errors import ParameterError

PRECISION_BITS = 128
_UNDECIDED = -128


class CumulativeTable:
    """Samples small integers with probabilities given as integer weights, by one 128-bit comparison each."""

    def __init__(self, weights: Sequence[int]) -> None:
        """weights: of the values -(len // 2), -(len // 2) + 1, ...: at most 255, none zero, best of 192 bits."""
        if not 1 <= len(weights) <= 255 or min(weights) <= 0:
            raise ParameterError(f"a table takes 1 to 255 positive weights, not {len(weights)}")
        self.bound = len(weights) // 2
        total = sum(weights)
        scale = 1 << PRECISION_BITS
        # boundaries[i] = 2^128 * P(sample <= i - bound), rounded down: a uniform u below it gives a smaller sample.
        cumulative = 0
        self.boundaries: list[int] = []
        for weight in weights[:-1]:
            cumulative += weight
            self.boundaries.append(cumulative * scale // total)
        self._high = np.array([b >> 64 for b in self.boundaries], dtype=np.uint64)
        self._low = [b & ((1 << 64) - 1) for b in self.boundaries]
        first = np.searchsorted(self._high, np.arange(1 << 16, dtype=np.uint64) << np.uint64(48), side="left")
        last = np.append(first[1:], len(self.boundaries))
        # Between two words without a boundary inside, the sample is the same whatever the other bits are. A boundary
        # that is exactly a word would count as inside: undecided, then settled like any other.
        table = np.where(first == last, first - self.bound, _UNDECIDED)
        self.table: NDArray[np.int8] = table.astype(np.int8)

    def settle(self, prefix: int, high: int, low: int) -> int:
        """The sample for u = prefix * 2^112 + (high mod 2^48) * 2^64 + low: how many boundaries are <= u."""
        value = (prefix << 112) | ((high & ((1 << 48) - 1)) << 64) | low
        return sum(boundary <= value for boundary in self.boundaries) - self.bound

    def sample(self, stream: KeyStream, count: int) -> NDArray[np.int8]:
        """`count` samples, int8. Reads ceil(count/4)*8 bytes, then 16 for each sample that its prefix leaves open."""
        words = stream.words16((count + 3) // 4 * 4)[:count]
        samples = self.table[words]
        undecided = np.flatnonzero(samples == _UNDECIDED)
        if undecided.size:
            high = stream.words64(undecided.size)
            low = stream.words64(undecided.size)
            top = words[undecided].astype(np.uint64) << np.uint64(48) | high & np.uint64((1 << 48) - 1)
            below = np.searchsorted(self._high, top, side="right")
            samples[undecided] = below - self.bound
            # u and a boundary agree in 64 bits about once in 2^50 samples; then the last 64 decide.
            for i in np.flatnonzero(self._high[np.maximum(below, 1) - 1] == top):
                samples[undecided[i]] = self.settle(int(words[undecided[i]]), int(high[i]), int(low[i]))
        return samples


class GaussianTable(CumulativeTable):
    """The table for one sigma, given as a ratio of integers so that it is the same on every machine."""

    def __init__(self, numerator: int, denominator: int) -> None:
        """sigma = numerator / denominator, in (0, 9]. Raises ParameterError outside."""
        if not (numerator > 0 and denominator > 0 and numerator <= 9 * denominator):
            raise ParameterError(f"sigma = {numerator}/{denominator} is not in (0, 9]")
        super().__init__(_weights(numerator, denominator))


def _weights(numerator: int, denominator: int) -> list[int]:
    """exp(-k^2 / (2 sigma^2)) * 2^192 as integers, k = -T..T, with T = ceil(13.5 sigma): P(|k| > T) < 2^-130.

    T is less where these integers reach zero before it.
    """
    bound = -(-27 * numerator // (2 * denominator))
    with localcontext() as context:
        context.prec = 80
        exponent = Decimal(denominator * denominator) / Decimal(2 * numerator * numerator)
        half = [int((-k * k * exponent).exp() * (1 << 192)) for k in range(bound + 1)]
    # A tiny sigma's outer weights are zero; kept, they would put boundaries at 2^128, which no 128-bit number reaches.
    half = [weight for weight in half if weight]
    return half[:0:-1] + half


@cache
def gaussian_table(numerator: int, denominator: int) -> GaussianTable:
    """The table for sigma = numerator / denominator, made once per process."""
    return GaussianTable(numerator, denominator)
