"""What rounds cost: Renyi differential privacy of the mechanism, against two observers, and the filter that says stop.

Two observers, two types of curve, never added to each other: `AgainstReaders` (who see the published models) and
`AgainstCoordinator` (who also sees which devices sent). docs/privacy.md section 4 derives every formula here. numpy and
the standard library only: this runs on the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Generic, Literal, Self, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_sdk.errors import ParameterError, SordinoError

F64 = NDArray[np.float64]
Unit = Literal["device", "example"]

ORDERS: tuple[int, ...] = (*range(2, 65), 128, 256)
"""Renyi orders alpha. Integers: there the moments of discrete Gaussians are known exactly."""

ROUNDING_SHARE = 0.01
"""Part of a budget's delta that is kept for roundings that pass their bound (unit "example")."""

FAVOURITE_SHARE = 0.9
"""Part of a budget's other delta that goes to the order which suits the first round best; all others share the rest."""

_ALPHA: F64 = np.array(ORDERS, dtype=np.float64)
_UPWARD = 1 + 1e-11
"""Above the relative rounding error of every figure here: a curve is never below its exact value."""


class BudgetExceeded(SordinoError):
    """Expected: the round would pass a budget of this device. Nothing was spent; take no part in the round."""


class Budget(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """(epsilon, delta): what all rounds together may cost against one observer."""

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        """Raises ParameterError unless epsilon is finite and above 0 and delta in (0, 1)."""
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise ParameterError(f"epsilon is {self.epsilon}: a finite number above 0")
        if not 0 < self.delta < 1:
            raise ParameterError(f"delta is {self.delta}: above 0 and below 1")


@dataclass(frozen=True)
class Noise:
    """The noise of one group's sum, seen from one unit.

    multiplier: z, standard deviation over what one unit adds (L2).  correction: tau, per coordinate (Theorem 1 of
    Kairouz, Liu and Steinke 2021, arXiv:2102.06387).  dimension: coordinates.
    """

    multiplier: float
    correction: float = 0.0
    dimension: int = 1

    def __post_init__(self) -> None:
        """Raises ParameterError that names what is out of range."""
        if not (math.isfinite(self.multiplier) and self.multiplier > 0):
            raise ParameterError(f"the noise multiplier is {self.multiplier}: a finite number above 0")
        if not (math.isfinite(self.correction) and self.correction >= 0) or self.dimension < 1:
            raise ParameterError(f"no noise has correction {self.correction} in {self.dimension} dimensions")

    @property
    def concentrated_epsilon(self) -> float:
        """eps such that the divergence is at most (1/2) eps^2 alpha at every order from 2 on.

        min( sqrt(D^2 + tau d), D + tau sqrt(d) ) with D = 1/z. The first term covers the same paper's Proposition 14,
        alpha D^2 / 2 + tau d, at these orders, and is not below its Theorem 1, which has tau d / 2 under the root.
        """
        distance = 1 / self.multiplier
        return min(
            math.sqrt(distance**2 + self.correction * self.dimension),
            distance + self.correction * math.sqrt(self.dimension),
        )

    def replaced(self) -> Noise:
        """The noise seen from one example of a device whose whole vector is clipped.

        The example's removal replaces the vector by another one, up to twice as far away as zero is.
        """
        return Noise(self.multiplier / 2, self.correction, self.dimension)


@dataclass(frozen=True)
class Sampling:
    """Who takes part, by coins that a device tosses.  device: for itself.  example: for each of its examples."""

    device: float = 1.0
    example: float = 1.0

    def __post_init__(self) -> None:
        """Raises ParameterError unless both are in (0, 1]."""
        for name, rate in (("device", self.device), ("example", self.example)):
            if not 0 < rate <= 1:
                raise ParameterError(f"the {name} sampling rate is {rate}: above 0, at most 1")


@dataclass(frozen=True, eq=False)
class Curve:
    """Renyi divergence at every order of ORDERS, and the probability of roundings beyond their bound. Base class.

    values: float64 (len(ORDERS),), nats.  rounding: sum of the rounds' beta; it adds to delta.
    """

    values: F64 = field(default_factory=lambda: np.zeros(len(ORDERS)), repr=False)
    rounding: float = 0.0

    def __add__(self, other: Self) -> Self:
        """The cost of both. Raises ParameterError if `other` is against another observer."""
        if type(self) is not type(other):
            raise ParameterError(f"{type(self).__name__} and {type(other).__name__} are never added: two observers")
        return type(self)(self.values + other.values, self.rounding + other.rounding)

    def __mul__(self, rounds: int) -> Self:
        """The cost of `rounds` such rounds. Raises ParameterError on a negative number."""
        if rounds < 0:
            raise ParameterError(f"no number of rounds is {rounds}")
        return type(self)(self.values * rounds, self.rounding * rounds)

    def epsilon(self, delta: float) -> float:
        """epsilon at `delta`, for rounds that were planned in advance; infinity if the roundings alone pass delta.

        Source: Canonne, Kamath and Steinke 2020, arXiv:2004.00010, Proposition 12. The best order is chosen freely:
        for rounds chosen in the light of earlier ones use a `Filter`.
        """
        if not 0 < delta < 1:
            raise ParameterError(f"delta is {delta}: above 0 and below 1")
        if delta <= self.rounding:
            return math.inf
        return _epsilon(self.values, math.log(delta - self.rounding))

    def best_order(self, delta: float) -> int:
        """The order at which this curve gives the smallest epsilon at `delta`."""
        return ORDERS[int(np.argmin(_epsilons(self.values, math.log(delta))))]


class AgainstReaders(Curve):
    """Cost against whoever reads the published models and does not know who took part."""

    observer = "readers of the models"


class AgainstCoordinator(Curve):
    """Cost against the coordinator, the committee, the broker and the network, who see which devices sent."""

    observer = "the coordinator"


C = TypeVar("C", AgainstReaders, AgainstCoordinator)


def against_readers(noise: Noise, unit: Unit, protects: Unit, sampling: Sampling, beta: float = 0.0) -> AgainstReaders:
    """One round in which the device tossed its coin, whatever fell.

    unit: the task's.  protects: whose data the account is of.  beta: `Mechanism.beta` of an "example" task, else 0.
    The coin for taking part amplifies in full where the device's one vector is all that it decides about. An example's
    own sampling is worth less beside it: the other examples of the device show which way the coin fell, so the bound
    lets the reader know it (section 4.3).
    Raises ParameterError on an "example" task in an account of a device.
    """
    if _same_unit(unit, protects) and unit == "device":
        values = _curve(noise, sampling.device, 1.0)
    elif unit == "device":
        values = _curve(noise.replaced(), 1.0, sampling.device)
    else:
        values = _curve(noise, sampling.example, sampling.device)
    return AgainstReaders(values, beta)


def against_coordinator(
    noise: Noise, unit: Unit, protects: Unit, sampling: Sampling, beta: float = 0.0
) -> AgainstCoordinator:
    """One round in which the device sent. Arguments and errors as for `against_readers`; the coin does not help."""
    if _same_unit(unit, protects) and unit == "device":
        values = _curve(noise, 1.0, 1.0)
    elif unit == "device":
        values = _curve(noise.replaced(), 1.0, 1.0)
    else:
        values = _curve(noise, sampling.example, 1.0)
    return AgainstCoordinator(values, beta)


@dataclass(frozen=True)
class Filter(Generic[C]):
    """A budget and what was spent of it. Holds for rounds that anybody chooses in the light of earlier results.

    Feldman and Zrnic 2021 (arXiv:2008.11193) and Lecuyer 2021 (arXiv:2103.01379) prove it for one order. Which order
    fits in the end may depend on results, so each has its own part of delta: `favourite` FAVOURITE_SHARE of it, the
    others equal parts of what is left (section 4.4). `favourite` is fixed before the first result: see `for_rounds`.
    """

    budget: Budget
    favourite: int
    spent: C

    @classmethod
    def for_rounds(cls, budget: Budget, first: C) -> Filter[C]:
        """An untouched filter whose favourite is the order that lets most rounds like `first` through."""
        log_delta = math.log(FAVOURITE_SHARE * (1 - ROUNDING_SHARE) * budget.delta)
        room = np.maximum(budget.epsilon - _epsilons(np.zeros(len(ORDERS)), log_delta), 0.0)
        rounds = room / np.maximum(first.values, np.finfo(np.float64).tiny)
        return cls(budget, ORDERS[int(np.argmax(rounds))], first * 0)

    @property
    def epsilon(self) -> float:
        """What is spent, on the scale of the budget's epsilon: it may grow up to that."""
        return self.epsilon_of(self.spent)

    def epsilon_of(self, spent: C) -> float:
        """The smallest epsilon with which this budget would allow `spent`. 0 if nothing is."""
        if not spent.values.any():
            return 0.0
        if spent.rounding > ROUNDING_SHARE * self.budget.delta:
            return math.inf
        return _epsilon(spent.values, _log_deltas(self.budget.delta, self.favourite))

    def spend(self, cost: C) -> Filter[C]:
        """The filter after a round of this cost. Raises BudgetExceeded if every order is over the budget then."""
        total = self.spent + cost
        needed = self.epsilon_of(total)
        if needed > self.budget.epsilon:
            reason = "too many roundings" if math.isinf(needed) else f"epsilon would be {needed:.4g}"
            raise BudgetExceeded(
                f"against {cost.observer}: {reason}; the budget is {self.budget.epsilon:.4g} at delta "
                f"{self.budget.delta:.3g}, of which {self.epsilon:.4g} is spent"
            )
        return Filter(self.budget, self.favourite, total)


def _same_unit(unit: Unit, protects: Unit) -> bool:
    if unit == "example" and protects == "device":
        raise ParameterError('a round of unit "example" bounds nothing for a whole device: use an "example" account')
    return unit == protects


def _epsilons(values: F64, log_delta: F64 | float) -> F64:
    result: F64 = values + np.log1p(-1 / _ALPHA) - (log_delta + np.log(_ALPHA)) / (_ALPHA - 1)
    return result


def _epsilon(values: F64, log_delta: F64 | float) -> float:
    return max(0.0, float(_epsilons(values, log_delta).min()))


@lru_cache(maxsize=64)
def _log_deltas(delta: float, favourite: int) -> F64:
    """ln of each order's part of delta. They and the roundings' part sum to delta."""
    divided = delta * (1 - ROUNDING_SHARE)
    parts = np.full(len(ORDERS), divided * (1 - FAVOURITE_SHARE) / (len(ORDERS) - 1))
    parts[ORDERS.index(favourite)] = divided * FAVOURITE_SHARE
    return _read_only(np.log(parts))


@lru_cache(maxsize=256)
def _curve(noise: Noise, secret_rate: float, known_rate: float) -> F64:
    """Divergence of (1 - p) P + p ((1 - q) P + q P'), the coin p known to the observer, the coin q secret.

    The moment is 1 - p + p A(q) with A = E_P[((1 - q + q P'/P))^alpha], worked out as 1 + p (A - 1): all terms of A - 1
    are positive, so nothing cancels however small it is.
    """
    if secret_rate == 1.0:
        log_moment = (_ALPHA - 1) * _ALPHA * noise.concentrated_epsilon**2 / 2
        if known_rate == 1.0:
            return _read_only(log_moment / (_ALPHA - 1) * _UPWARD)
        excess = _log_expm1(log_moment)
    else:
        excess = np.array([_log_excess(order, secret_rate, noise.multiplier) for order in ORDERS])
        if noise.correction:
            # A sum of discrete Gaussians is within exp(+-t) of one: the moment within exp(t (2 alpha - 1)).
            slack = noise.correction * noise.dimension * (2 * _ALPHA - 1)
            excess = np.logaddexp(excess + slack, _log_expm1(slack))
    return _read_only(np.logaddexp(0.0, math.log(known_rate) + excess) / (_ALPHA - 1) * _UPWARD)


def _log_excess(order: int, rate: float, multiplier: float) -> float:
    """ln(A - 1), A = sum over k of C(alpha, k) q^k (1-q)^(alpha-k) exp(k (k-1) / (2 z^2)).

    Mironov, Talwar and Zhang 2019, arXiv:1908.10530, section 3.3, less the sum of the binomial weights, which is 1.
    """
    k = np.arange(2, order + 1, dtype=np.float64)
    terms = _log_binomials(order) + k * math.log(rate) + (order - k) * math.log1p(-rate)
    terms += _log_expm1(k * (k - 1) / (2 * multiplier**2))
    top = float(terms.max())
    return top + math.log(float(np.exp(terms - top).sum()))


def _log_expm1(x: F64) -> F64:
    """ln(exp(x) - 1) for x > 0, without overflow."""
    large, small = np.maximum(x, 30.0), np.minimum(x, 30.0)  # np.where works both out: keep each in its range
    result: F64 = np.where(x > 30, large + np.log1p(-np.exp(-large)), np.log(np.expm1(small)))
    return result


@cache
def _log_binomials(order: int) -> F64:
    """ln C(order, k) for k = 2..order."""
    return np.array([math.log(math.comb(order, k)) for k in range(2, order + 1)])


def _read_only(values: F64) -> F64:
    values.flags.writeable = False
    return values
