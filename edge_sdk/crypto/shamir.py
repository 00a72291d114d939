"""Packed Shamir sharing over F_65521, with unique decoding of wrong answers (docs/protocol.md section 4).

One polynomial of degree c + rho - 1 carries rho secrets: f(0), f(-1), ..., f(1 - rho) are the secrets, f(1), ..., f(m)
the shares. Any c shares are uniform and independent of the secrets; any c + rho determine them. Shares of several
senders add up to shares of the sums. Sources: Shamir 1979; Franklin and Yung 1992 (packing); Welch and Berlekamp 1986
(decoding).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import NDArray

from edge_sdk.crypto.hashing import tagged_hash
from edge_sdk.crypto.stream import KeyStream, uniform_residues
from edge_sdk.errors import ParameterError

PRIME = 65521
"""The largest prime below 2^16: a share is two bytes, and sums of 8 * 10^5 secrets of deviation 4.5 do not wrap."""

MAX_SUBSETS = 4096
"""How many sets of answers `candidates` tries beyond the unique decoding bound before it gives up."""


def lagrange(sources: Sequence[int], target: int, modulus: int = PRIME) -> list[int]:
    """Coefficients w with f(target) = sum of w[i] f(sources[i]) for every f of degree < len(sources), mod `modulus`.

    modulus: a prime.  Raises ParameterError if two sources agree modulo it.
    """
    weights = []
    for i, source in enumerate(sources):
        numerator = denominator = 1
        for j, other in enumerate(sources):
            if j != i:
                numerator = numerator * (target - other) % modulus
                denominator = denominator * (source - other) % modulus
        if denominator == 0:
            raise ParameterError(f"the points {sources} are not distinct")
        weights.append(numerator * pow(denominator, -1, modulus) % modulus)
    return weights


def _matrix(sources: Sequence[int], targets: Sequence[int]) -> NDArray[np.int64]:
    """`lagrange` for every target: int64 (targets, sources). Liars make the coordinator try thousands of subsets, each
    with its own matrix, so that it is computed by columns and not number by number."""
    points, at = np.array(sources, dtype=np.int64), np.array(targets, dtype=np.int64)
    apart = (points[:, None] - points) % PRIME  # (source j, source i)
    np.fill_diagonal(apart, 1)
    if not apart.all():
        raise ParameterError(f"the points {sources} are not distinct")
    denominators = np.ones_like(points)
    for row in apart:
        denominators = denominators * row % PRIME
    # Row j of `apart` has x_j - x_i where weight i divides by x_i - x_j: one sign for each of the other sources.
    signs = (-1) ** (len(points) - 1)
    inverses = np.array([pow(signs * int(value), -1, PRIME) for value in denominators], dtype=np.int64)
    differences = (at - points[:, None]) % PRIME  # (source, target)
    # Products of all the others, from both ends: a target that is a source itself must not be divided by.
    before, after = np.ones_like(differences), np.ones_like(differences)
    for i in range(1, len(points)):
        before[i] = before[i - 1] * differences[i - 1] % PRIME
        after[-1 - i] = after[-i] * differences[-i] % PRIME
    weights: NDArray[np.int64] = (before * after % PRIME * inverses[:, None] % PRIME).T
    return weights


def _apply(matrix: NDArray[np.int64], values: NDArray[np.int64]) -> NDArray[np.int64]:
    # Products stay below 2^32 and their sums below 2^42. Integers, not BLAS: exact on every machine.
    product: NDArray[np.int64] = np.matmul(matrix, values) % PRIME
    return product


class PackedShamir:
    """The scheme for `members` holders that tolerates `corrupt` curious ones, `packing` secrets a polynomial."""

    def __init__(self, members: int, corrupt: int, packing: int) -> None:
        """Raises ParameterError unless corrupt >= 1, packing >= 1 and corrupt + packing <= members <= 256."""
        if not (corrupt >= 1 and packing >= 1 and corrupt + packing <= members <= 256):
            raise ParameterError(f"no sharing with members={members}, corrupt={corrupt}, packing={packing}")
        self.members, self.corrupt, self.packing = members, corrupt, packing
        self.threshold = corrupt + packing
        self._secret_points = [-slot for slot in range(packing)]
        known = [*self._secret_points, *range(1, corrupt + 1)]
        self._extend = _matrix(known, range(corrupt + 1, members + 1))

    def share(self, secrets: NDArray[np.int64], stream: KeyStream) -> NDArray[np.int64]:
        """Shares of `secrets`: int64 (members, len(secrets) / packing), entries in [0, 65521).

        secrets: int64, a multiple of `packing` many, taken modulo 65521.  stream: secret randomness of this sharing
        alone; the first `corrupt` members' shares are read from it.
        """
        if secrets.ndim != 1 or secrets.size % self.packing:
            raise ParameterError(f"{secrets.shape} secrets do not fill polynomials of {self.packing}")
        polynomials = secrets.size // self.packing
        packed = (secrets % PRIME).reshape(polynomials, self.packing).T
        random = uniform_residues(stream, PRIME, self.corrupt * polynomials).reshape(self.corrupt, polynomials)
        return np.concatenate([random, _apply(self._extend, np.concatenate([packed, random]))])

    def candidates(
        self,
        answers: Mapping[int, NDArray[np.int64]],
        plausible: Callable[[NDArray[np.int64]], bool],
        seed: bytes = b"",
    ) -> Iterator[tuple[NDArray[np.int64], frozenset[int]]]:
        """Secrets that `answers` may stand for, best first, each with the members that it disagrees with.

        answers: member number (1..members) -> its shares, all of one length; at least `threshold` of them.
        plausible: a cheap test of any number of secrets; a subset whose secrets fail it is skipped.
        seed: something that no member knew when it answered.
        The first candidate is the only codeword within (answers - threshold) // 2 wrong members, if there is one.
        Then come those of subsets of `threshold` answers: all of them if they are at most MAX_SUBSETS, else so many
        drawn by the seed and the answers, which a liar cannot foresee. Secrets are int64, centred in [-32760, 32760].
        That a member disagrees proves nothing against it: a dealer's bad shares look the same.
        """
        numbers = sorted(answers)
        if len(numbers) < self.threshold:
            raise ParameterError(f"{len(numbers)} answers, {self.threshold} needed")
        wrong = self._unique_decode(numbers, answers)
        seen: set[frozenset[int]] = set()
        if wrong is not None:
            subset = tuple(n for n in numbers if n not in wrong)[: self.threshold]
            disagree = self._disagreeing(subset, answers)
            seen.add(disagree)
            yield self._secrets(subset, answers), disagree
            if not disagree:
                return  # every subset gives this same polynomial
        for subset in self._subsets(numbers, answers, seed):
            # A few secrets settle it, unless a dealer lied in the others; who disagrees costs more than all secrets.
            if plausible(self._secrets(subset, answers, 8)) and plausible(secrets := self._secrets(subset, answers)):
                disagree = self._disagreeing(subset, answers)
                if disagree not in seen:
                    seen.add(disagree)
                    yield secrets, disagree

    def _subsets(
        self, numbers: list[int], answers: Mapping[int, NDArray[np.int64]], seed: bytes = b""
    ) -> Iterator[tuple[int, ...]]:
        if comb(len(numbers), self.threshold) <= MAX_SUBSETS:
            yield from combinations(numbers, self.threshold)
            return
        stream = KeyStream(tagged_hash("subsets", seed, *(answers[n].astype("<u2").tobytes() for n in numbers)))
        for _ in range(MAX_SUBSETS):
            order = np.argsort(stream.words64(len(numbers)), kind="stable")
            yield tuple(sorted(numbers[i] for i in order[: self.threshold]))

    def _secrets(
        self, subset: Sequence[int], answers: Mapping[int, NDArray[np.int64]], polynomials: int | None = None
    ) -> NDArray[np.int64]:
        """Centred secrets of the first `polynomials` (all of them by default) that go through the subset's answers."""
        values = np.stack([answers[n][:polynomials] for n in subset])
        return _centre(_apply(_matrix(subset, self._secret_points), values).T.reshape(-1))

    def _disagreeing(self, subset: Sequence[int], answers: Mapping[int, NDArray[np.int64]]) -> frozenset[int]:
        """The members whose answers are not on the polynomials through the subset's."""
        values = np.stack([answers[n] for n in subset])
        rest = [n for n in sorted(answers) if n not in subset]
        expected = _apply(_matrix(subset, rest), values)
        return frozenset(n for n, row in zip(rest, expected, strict=True) if not np.array_equal(row, answers[n]))

    def _unique_decode(self, numbers: list[int], answers: Mapping[int, NDArray[np.int64]]) -> frozenset[int] | None:
        """The wrong members, if at most (answers - threshold) // 2 are: column by column, each named one is set aside.

        A column's errors are a subset of the wrong members, so what is left after each step is within the bound again.
        """
        wrong: set[int] = set()
        capacity = (len(numbers) - self.threshold) // 2
        while True:
            good = [n for n in numbers if n not in wrong]
            base, rest = good[: self.threshold], good[self.threshold :]
            predicted = _apply(_matrix(base, rest), np.stack([answers[n] for n in base]))
            differs = (predicted != np.stack([answers[n] for n in rest])).any(axis=0) if rest else np.zeros(1, bool)
            if not differs.any():
                return frozenset(wrong)
            column = int(np.argmax(differs))
            values = [int(answers[n][column]) for n in good]
            positions = error_positions(good, values, self.threshold, capacity - len(wrong))
            if positions is None:
                return None
            wrong.update(good[i] for i in positions)


def _centre(residues: NDArray[np.int64]) -> NDArray[np.int64]:
    return (residues + PRIME // 2) % PRIME - PRIME // 2


def error_positions(points: Sequence[int], values: Sequence[int], degree_bound: int, errors: int) -> list[int] | None:
    """Positions where `values` differ from the one polynomial of degree < degree_bound that misses at most `errors`.

    None if there is no such polynomial.  Requires len(points) >= degree_bound + 2 * errors (then it is unique).
    Welch and Berlekamp: find E of degree `errors`, monic, and Q of degree < degree_bound + errors with
    Q(x) = y E(x) at every point; the polynomial is Q / E.
    """
    if errors < 0:
        return None
    rows = []
    for x, y in zip(points, values, strict=True):
        powers = [pow(x, k, PRIME) for k in range(degree_bound + errors)]
        rows.append([*powers, *(-y * power % PRIME for power in powers[:errors]), y * pow(x, errors, PRIME) % PRIME])
    solution = _solve(np.array(rows, dtype=np.int64))
    if solution is None:
        return None
    quotient = _divide(solution[: degree_bound + errors], [*solution[degree_bound + errors :], 1])
    if quotient is None:
        return None
    positions = [i for i, x in enumerate(points) if _evaluate(quotient, x) != values[i]]
    return positions if len(positions) <= errors else None


def _solve(augmented: NDArray[np.int64]) -> list[int] | None:
    """One solution of the linear system [A | b] modulo PRIME (free unknowns zero), or None."""
    rows, unknowns = augmented.shape[0], augmented.shape[1] - 1
    pivots: list[int] = []
    for column in range(unknowns):
        rank = len(pivots)
        candidates = np.flatnonzero(augmented[rank:, column])
        if not candidates.size:
            continue
        pivot = rank + int(candidates[0])
        augmented[[rank, pivot]] = augmented[[pivot, rank]]
        augmented[rank] = augmented[rank] * pow(int(augmented[rank, column]), -1, PRIME) % PRIME
        factors = augmented[:, column].copy()
        factors[rank] = 0
        augmented[:] = (augmented - factors[:, None] * augmented[rank]) % PRIME
        pivots.append(column)
        if len(pivots) == rows:
            break
    if augmented[len(pivots) :, unknowns].any():
        return None
    solution = [0] * unknowns
    for row, column in enumerate(pivots):
        solution[column] = int(augmented[row, unknowns])
    return solution


def _divide(dividend: Sequence[int], divisor: Sequence[int]) -> list[int] | None:
    """dividend / divisor modulo PRIME, both lowest coefficient first and the divisor monic; None on a remainder."""
    rest, degree = list(dividend), len(divisor) - 1
    quotient = [0] * max(len(rest) - degree, 0)
    for shift in reversed(range(len(quotient))):
        quotient[shift] = rest[shift + degree]
        for i, coefficient in enumerate(divisor):
            rest[shift + i] = (rest[shift + i] - quotient[shift] * coefficient) % PRIME
    return None if any(rest) else quotient


def _evaluate(polynomial: Sequence[int], x: int) -> int:
    value = 0
    for coefficient in reversed(polynomial):
        value = (value * x + coefficient) % PRIME
    return value
