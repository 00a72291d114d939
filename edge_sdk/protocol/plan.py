"""Every number that both sides must agree on, derived and never typed in (docs/protocol.md sections 3.4 and 7).

All of it is exact integer arithmetic, so that two implementations cannot differ in the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import numpy as np
from numpy.typing import NDArray

from edge_sdk.crypto.masks import SIGMA_DENOMINATOR, SIGMA_NUMERATOR
from edge_sdk.crypto.ring import DEGREE
from edge_sdk.crypto.shamir import PackedShamir
from edge_sdk.errors import ParameterError, PeerError
from edge_sdk.protocol.messages import CommitteeKind

FAILURE_BITS = 40
"""-log2 of the probability that a drawn committee, or a drawn group, holds more corrupt devices than its bound says."""

PAD_COEFFICIENTS = 16
"""Zero coefficients after the payload, at least: they are checked at the opening."""

RESIDUAL_FACTOR = 8
"""Residuals and coefficients of the summed secret are accepted up to 8 sigma sqrt(n)."""

MIN_FLEET = 4
"""The smallest fleet whose members are their own committee: below it one curious device is too much."""


def corrupt_in_committee(roster: int, corrupt: int, members: int) -> int:
    """Smallest c with P(more than c of `members` drawn are corrupt) <= 2^-40, by the binomial tail.

    roster: devices enrolled.  corrupt: of them, how many may be.  The draw is without replacement: its exact tail is
    the hypergeometric one, which is thinner (Hoeffding 1963, Theorem 4, for convex functions; the tests compare the two
    for many sizes).
    """
    total, tail, c = roster**members, 0, members
    # P(X > c) grows as c falls: add terms from the top until the next one would pass the bound.
    while c > 0:
        tail += comb(members, c) * corrupt**c * (roster - corrupt) ** (members - c)
        if tail << FAILURE_BITS > total:
            return c
        c -= 1
    return 0


def corrupt_in_group(roster: int, corrupt: int, groups: int) -> int:
    """Smallest F with P(some group of the roster holds more than F of the `corrupt`) <= 2^-40, by hypergeometric tails.

    The largest group has ceil(roster / groups) devices; the union bound is over the groups. One group: F = corrupt.
    """
    if groups == 1:
        return corrupt
    size = -(-roster // groups)
    total, tail, bound = comb(roster, corrupt), 0, min(size, corrupt)
    ways = comb(size, bound) * comb(roster - size, corrupt - bound)
    while bound > 0:
        tail += ways
        if tail * groups << FAILURE_BITS > total:
            return bound
        # from the ways to hold `bound` corrupt devices to those for one fewer, exactly
        ways = ways * bound * (roster - size - corrupt + bound) // ((size - bound + 1) * (corrupt - bound + 1))
        bound -= 1
    return 0


@dataclass(frozen=True)
class Thresholds:
    """The committee's numbers (docs/protocol.md section 7.2)."""

    members: int
    corrupt: int
    """c: members that may be corrupt, together with the coordinator and every contributor's neighbour."""
    packing: int
    """rho: secrets in a polynomial."""

    @property
    def quorum(self) -> int:
        """Q: signatures in a certificate. Two quorums share more than c members, so at least one honest one."""
        return (self.members + self.corrupt) // 2 + 1

    @property
    def answers(self) -> int:
        """R: members' sums that open a group."""
        return self.corrupt + self.packing

    @property
    def may_be_absent(self) -> int:
        return self.members - max(self.quorum, self.answers)

    @property
    def sharing(self) -> PackedShamir:
        return PackedShamir(self.members, self.corrupt, self.packing)

    @property
    def polynomials(self) -> int:
        """Values that one member holds of one contribution."""
        return DEGREE // self.packing


def thresholds(kind: CommitteeKind, members: int, roster: int, corrupt: int) -> Thresholds:
    """The thresholds of a committee of `members`, for a roster of which `corrupt` devices may be corrupt.

    Raises ParameterError, with what would do instead, if no safe thresholds exist.
    """
    packing = 1
    if kind == "everyone":
        if members < MIN_FLEET:
            raise ParameterError(f"a fleet of {members} cannot be its own committee: enrol {MIN_FLEET}, or pin helpers")
        if members != roster:
            raise ParameterError(f"'everyone' means all {roster} of the roster, not {members}")
        c = max(1, (members - 1) // 3)
        if corrupt > c:
            raise ParameterError(f"{corrupt} corrupt devices: a committee of everyone ({members}) tolerates {c}")
    elif kind == "helpers":
        if members < 3:
            raise ParameterError(f"{members} helpers cannot outvote a corrupt one: pin at least 3")
        c = (members - 1) // 2
    else:
        if members > roster:
            raise ParameterError(f"cannot draw {members} members from a roster of {roster}")
        c = max(1, corrupt_in_committee(roster, corrupt, members))
        spare = (members + c) // 2 + 1 - c
        packing = 1 << (min(spare, DEGREE).bit_length() - 1) if spare > 0 else 1
    result = Thresholds(members, c, packing)
    if result.may_be_absent < 0 or result.answers > members:
        raise ParameterError(
            f"{members} members of which {c} may be corrupt leave no quorum: enlarge the committee or pin helpers"
        )
    return result


def delta_bits(n_max: int) -> int:
    """log2 of the scale Delta = 2^ceil(log2(18 sigma sqrt(n_max))): the message's lowest bit in a coefficient."""
    bits = 0
    # 4^bits >= (18 sigma)^2 n_max, without a root or a logarithm
    while (SIGMA_DENOMINATOR**2 << 2 * bits) < (18 * SIGMA_NUMERATOR) ** 2 * n_max:
        bits += 1
    return bits


@dataclass(frozen=True)
class Layout:
    """How a vector lies in ring elements: payload, one count, zero pads (docs/protocol.md section 3.3)."""

    dimension: int
    delta_bits: int

    @property
    def modulus_bits(self) -> int:
        """b: sums are exact modulo 2^b."""
        return 32 - self.delta_bits

    @property
    def blocks(self) -> int:
        return -(-(self.dimension + 1 + PAD_COEFFICIENTS) // DEGREE)

    @property
    def masked_bytes(self) -> int:
        return 4 * DEGREE * self.blocks

    def encode(self, integers: NDArray[np.generic]) -> NDArray[np.uint32]:
        """The scaled message of one contribution: uint32 (blocks, 2048).

        integers: (dimension,), any integer type, taken modulo 2^b.
        Raises ParameterError on another shape or type.
        """
        if integers.shape != (self.dimension,) or integers.dtype.kind not in "iu":
            raise ParameterError(
                f"a contribution is ({self.dimension},) integers, not {integers.dtype} {integers.shape}"
            )
        flat = np.zeros(self.blocks * DEGREE, dtype=np.uint32)
        flat[: self.dimension] = integers.astype(np.uint32)
        flat[self.dimension] = 1
        flat <<= np.uint32(self.delta_bits)
        return flat.reshape(self.blocks, DEGREE)

    def from_bytes(self, masked: bytes | bytearray | memoryview) -> NDArray[np.uint32]:
        """A masked vector as it travels, as uint32 (blocks, 2048), read-only. Raises PeerError on another length."""
        if len(masked) != self.masked_bytes:
            raise PeerError(f"masked vector: {len(masked)} bytes instead of {self.masked_bytes}")
        return np.frombuffer(masked, dtype="<u4").reshape(self.blocks, DEGREE)
