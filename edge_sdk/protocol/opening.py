"""Opening a group: from members' sums to the sum of the messages, or a reason (docs/protocol.md section 12)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edge_sdk.crypto.masks import SEGMENT_BLOCKS, SIGMA_DENOMINATOR, SIGMA_NUMERATOR, remove_mask
from edge_sdk.crypto.ring import DEGREE
from edge_sdk.errors import ParameterError, RoundAborted
from edge_sdk.protocol.plan import RESIDUAL_FACTOR
from edge_sdk.protocol.rounds import Round

_VARIANCE_TOLERANCE = 4
"""The variance of a block's residuals, and of the summed secret, is accepted within n sigma^2 (1 +- 1/4): eight of its
standard deviations."""


@dataclass(frozen=True)
class GroupSum:
    """An opened group: the sum of its contributions modulo 2^b, all checks passed."""

    values: NDArray[np.uint32] = field(repr=False)
    """(dimension,) uint32 in [0, 2^b)."""
    contributors: int
    residual_variance: float
    """Over sigma^2 n: near 1."""
    disagreeing: frozenset[int]
    """Members whose answer is not on the accepted polynomials. That is no proof against them."""

    def signed(self, modulus_bits: int) -> NDArray[np.int64]:
        """The values centred around zero: int64 in [-2^(b-1), 2^(b-1))."""
        half = 1 << (modulus_bits - 1)
        return (self.values.astype(np.int64) + half) % (1 << modulus_bits) - half


def open_group(
    round_: Round,
    contributors: int,
    masked_sum: NDArray[np.uint32],
    answers: Mapping[int, NDArray[np.int64]],
    seed: bytes = b"",
) -> GroupSum:
    """The group's sum, from R or more members' summed shares.

    contributors: |S_g|.  masked_sum: uint32 (blocks, 2048), the sum modulo 2^32 of the group's masked vectors; kept.
    answers: member number -> int64 (polynomials,) in [0, 65521).  seed: as in `PackedShamir.candidates`.
    Raises RoundAborted with the reason if no candidate passes every check; then no value of the sum is given.
    """
    thresholds = round_.thresholds
    if masked_sum.shape != (round_.layout.blocks, DEGREE) or masked_sum.dtype != np.uint32:
        raise ParameterError(f"a masked sum is uint32 ({round_.layout.blocks}, {DEGREE}), not {masked_sum.shape}")
    if len(answers) < thresholds.answers:
        raise RoundAborted(f"{len(answers)} members answered, {thresholds.answers} needed")

    expected = _expected_energy(contributors)

    def small(secrets: NDArray[np.int64]) -> bool:
        return _within(int(np.abs(secrets).max()), contributors)

    reasons = []
    for secret_sum, disagreeing in thresholds.sharing.candidates(answers, small, seed):
        if not small(secret_sum):
            reasons.append("the summed secret is not short")
            continue
        if abs(int(secret_sum @ secret_sum) - expected) * _VARIANCE_TOLERANCE > expected:
            reasons.append("the summed secret's variance is not that of its contributors' secrets")
            continue
        noisy = masked_sum.copy()
        remove_mask(noisy, secret_sum, round_.tid)
        values, variance, reason = _read(round_, contributors, noisy)
        if reason is None:
            return GroupSum(values[: round_.ticket.dimension], contributors, variance, disagreeing)
        reasons.append(reason)
    detail = reasons[0] if reasons else f"more than {(len(answers) - thresholds.answers) // 2} answers disagree"
    raise RoundAborted(f"no sum passes the checks: {detail}")


def _within(magnitude: int, contributors: int) -> bool:
    """magnitude <= 8 sigma sqrt(n), in integers."""
    return (magnitude * SIGMA_DENOMINATOR) ** 2 <= (RESIDUAL_FACTOR * SIGMA_NUMERATOR) ** 2 * contributors


def _expected_energy(contributors: int) -> int:
    """2048 n sigma^2, exactly: 2048 is a multiple of the square of sigma's denominator."""
    return contributors * SIGMA_NUMERATOR**2 * (DEGREE // SIGMA_DENOMINATOR**2)


def _read(round_: Round, contributors: int, noisy: NDArray[np.uint32]) -> tuple[NDArray[np.uint32], float, str | None]:
    """Round every coefficient to a multiple of Delta, in place: (values, residual variance, why not or None)."""
    bits = np.uint32(round_.layout.delta_bits)
    half = np.uint32(1 << (round_.layout.delta_bits - 1))
    low = np.uint32((1 << round_.layout.delta_bits) - 1)
    expected = _expected_energy(contributors)
    total, reason = 0.0, None
    for start in range(0, len(noisy), SEGMENT_BLOCKS):
        segment = noisy[start : start + SEGMENT_BLOCKS]
        segment += half
        residuals = (segment & low).astype(np.float64)
        residuals -= float(half)
        segment >>= bits
        energy = np.einsum("ij,ij->i", residuals, residuals)  # exact: integers below 2^53
        total += float(energy.sum())
        if not _within(int(max(residuals.max(), -residuals.min())), contributors):
            reason = reason or "a residual is too large"
        if (np.abs(energy - expected) * _VARIANCE_TOLERANCE > expected).any():
            reason = reason or "a block's residual variance is not that of its contributors' errors"
    values = noisy.reshape(-1)
    dimension = round_.ticket.dimension
    if values[dimension + 1 :].any():
        reason = reason or "the padding is not zero"
    if int(values[dimension]) != contributors:
        reason = reason or f"the count is {int(values[dimension])}, not {contributors}"
    return values, total / (expected * len(noisy)), reason
