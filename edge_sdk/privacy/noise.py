"""Discrete Gaussian noise of any standard deviation that a plan needs, from a keyed stream.

P(x) is proportional to exp(-x^2 / (2 sigma^2)) over the integers, for sigma given as a ratio of integers.

Up to sigma = 9 one table does it (`crypto.gaussian`). Above, the integers are cut into bins of L = 2^k consecutive
ones, sigma/8 < L <= sigma/4. A bin is drawn with a probability proportional to the density at its end nearer to zero, a
place in it uniformly, and the result x is kept with probability exp(-(x^2 - m^2) / (2 sigma^2)), m being that nearer
end: rejection sampling, exact, with about 9 in 10 kept. The comparison with that probability is made in float64 and,
where float64 cannot tell (about once in 10^13 samples), with 60 decimal digits and 128 random bits. Per sample the
result is within 2^-120 of the ideal distribution (docs/privacy.md section 3).

Not constant time: see docs/threat-model.md, "Side channels".
"""

from __future__ import annotations

from decimal import Decimal, localcontext
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from edge_sdk.crypto.gaussian import CumulativeTable, gaussian_table
from edge_sdk.crypto.stream import KeyStream
from edge_sdk.errors import ParameterError

MAX_SIGMA = 1 << 24
_TABLE_SIGMA = 9
_MARGIN = 2.0**-44
"""Above every rounding error of the float64 acceptance probability: |t| <= 16 with three roundings, and exp's own."""

_CHUNK = 1 << 16
"""Proposals that are drawn together. It fixes the order in which a stream is read, and with it the noise."""

_PIECE = 1 << 13
"""Proposals that are read and weighed together: 64 KiB an array at most, which stays in a small cache."""


class NoiseSampler:
    """Samples for one sigma = numerator / denominator, in (0, 2^24]."""

    def __init__(self, numerator: int, denominator: int) -> None:
        """Raises ParameterError outside (0, 2^24]."""
        if not (numerator > 0 and denominator > 0 and numerator <= MAX_SIGMA * denominator):
            raise ParameterError(f"sigma = {numerator}/{denominator} is not in (0, {MAX_SIGMA}]")
        self.numerator, self.denominator = numerator, denominator
        self._table: CumulativeTable | None = None
        if numerator <= _TABLE_SIGMA * denominator:
            self._table = gaussian_table(numerator, denominator)
        else:
            self.width_bits = (numerator // (4 * denominator)).bit_length() - 1
            self._bins = CumulativeTable(_bin_weights(numerator, denominator, 1 << self.width_bits))
            self._scale = denominator * denominator / (2 * numerator * numerator)

    def sample(self, stream: KeyStream, count: int) -> NDArray[np.int64]:
        """`count` samples, int64. The same stream gives the same samples."""
        if self._table is not None:
            return self._table.sample(stream, count).astype(np.int64)
        out = np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            kept = self._proposals(stream, min(_CHUNK, (count - done) * 9 // 8 + 64))
            kept = kept[: count - done]
            out[done : done + kept.size] = kept
            done += kept.size
        return out

    def _proposals(self, stream: KeyStream, count: int) -> NDArray[np.int32]:
        """The accepted ones of `count` proposals, all below 2^28 in magnitude."""
        pieces = [slice(start, min(start + _PIECE, count)) for start in range(0, count, _PIECE)]
        bins = self._bins.sample(stream, count)
        proposed = np.empty(count, dtype=np.int32)
        for piece in pieces:
            places = stream.read(4 * (piece.stop - piece.start)).view("<u4")
            proposed[piece] = places & np.uint32((1 << self.width_bits) - 1)
        accepted = np.empty(count, dtype=np.bool_)
        unclear: list[tuple[int, int, int]] = []
        for piece in pieces:
            bin_ = bins[piece].astype(np.int64)
            x = bin_ << self.width_bits
            x += proposed[piece]
            proposed[piece] = x
            nearest = np.maximum(bin_, ~bin_) << self.width_bits
            nearest += bin_ < 0  # a negative bin ends at one below a multiple of the width: m is that multiple plus one
            coins = stream.words64(piece.stop - piece.start)
            x *= x
            x -= nearest * nearest
            chance = x.astype(np.float64)
            chance *= -self._scale
            np.exp(chance, out=chance)
            uniform = coins.astype(np.float64)
            uniform *= 2.0**-64
            np.less(uniform, chance, out=accepted[piece])
            chance -= uniform
            for i in np.flatnonzero(np.abs(chance, out=chance) < _MARGIN):
                unclear.append((piece.start + int(i), int(nearest[i]), int(coins[i])))
        if unclear:
            for (place, end, coin), low in zip(unclear, stream.words64(len(unclear)), strict=True):
                accepted[place] = self.accepts(int(proposed[place]), end, coin << 64 | int(low))
        return proposed[accepted]

    def accepts(self, x: int, nearest: int, coin: int) -> bool:
        """Whether coin / 2^128 < exp(-(x^2 - nearest^2) / (2 sigma^2)), to 60 decimal digits."""
        with localcontext() as context:
            context.prec = 60
            exponent = Decimal((nearest * nearest - x * x) * self.denominator**2) / (2 * self.numerator**2)
            return Decimal(coin) < exponent.exp() * (1 << 128)


def _bin_weights(numerator: int, denominator: int, width: int) -> list[int]:
    """exp(-m^2 / (2 sigma^2)) * 2^192 of the bins -T..T-1 shifted to a table of odd length: bins -T..T.

    Bin j holds [j width, (j+1) width); its nearest integer to zero is m = j width, or -(j+1) width + 1 for j < 0.
    T = ceil(13.5 sigma / width): what lies beyond has probability below 2^-130.
    """
    count = -(-27 * numerator // (2 * denominator * width))
    with localcontext() as context:
        context.prec = 80
        exponent = Decimal(denominator * denominator) / Decimal(2 * numerator * numerator)

        def weight(m: int) -> int:
            return int((-m * m * exponent).exp() * (1 << 192))

        return [weight(j * width if j >= 0 else -(j + 1) * width + 1) for j in range(-count, count + 1)]


@lru_cache(maxsize=16)
def noise_sampler(numerator: int, denominator: int) -> NoiseSampler:
    """The sampler for sigma = numerator / denominator, made once."""
    return NoiseSampler(numerator, denominator)
