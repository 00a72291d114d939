"""The distributed discrete Gaussian mechanism: a real vector in, noisy integers out, and back (docs/privacy.md).

The one entrance to clipping, rotation, scaling, rounding, noise and wrapping, in the only order in which the proof
holds (Kairouz, Liu and Steinke 2021, arXiv:2102.06387, Algorithm 1). `encode` runs on a device, `decode` where the sum
is.
"""

from __future__ import annotations

import math
from dataclasses import asdict, astuple, dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edge_sdk.crypto.hashing import derive_key
from edge_sdk.crypto.stream import KeyStream
from edge_sdk.errors import ParameterError
from edge_sdk.privacy.noise import MAX_SIGMA, noise_sampler
from edge_sdk.privacy.rotation import block_length, rotate, rotate_back
from edge_sdk.privacy.rounding import round_conditionally, round_stochastically, rounded_norm_bound, square_norm

F64 = NDArray[np.float64]
Unit = Literal["device", "example"]

METRICS = 4
"""Extra coordinates: the fields of `MetricSums`."""

CONDITIONAL_BETA = math.exp(-0.5)
"""Share of roundings that may be drawn again (the paper's choice)."""

UNCONDITIONAL_BETA = 1e-12
"""Added to delta for every round of unit "example"."""

FLOAT32_SLACK = 1.001
"""What one example adds to sums that the graph makes in float32 may exceed its bounds by so much, through rounding."""

MIN_SHARE_SIGMA = 2.0
"""Least noise of one device, steps. Here `sum_correction` is below 1e-16 a coordinate; at 1.0 it would be 5e-4."""

MAX_HONEST = 1 << 20
LEAST, MOST = 1e-100, 1e100
"""Range of the real parameters: squares and quotients of such numbers neither vanish nor overflow."""

_MOST_STEPS = 2.0**40
"""Coordinates below this stay below 2^52 through both passes of the rotation, each of which adds at most 6 bits."""


@dataclass(frozen=True)
class Mechanism:
    """A checked set of parameters. All members agree on them through the ticket.

    unit: whose data is hidden: all of a "device"'s, or one "example".  dimension: d, without metrics.
    clip: L2 bound of one unit's vector, weight units.  metric_scale: a, weight units; 0 for no metrics.
    loss_bound: losses are clipped to [0, loss_bound].  granularity: weight units of one integer step.
    sigma: standard deviation of one group's total noise, steps.  honest: h, devices that carry it.
    modulus_bits: b, sums are modulo 2^b.
    """

    unit: Unit
    dimension: int
    clip: float
    granularity: float
    sigma: float
    honest: int
    modulus_bits: int
    metric_scale: float = 0.0
    loss_bound: float = 1.0

    def __post_init__(self) -> None:
        """Raises ParameterError that names the first parameter that is out of range."""
        if self.unit not in ("device", "example"):
            raise ParameterError(f"unit is {self.unit!r}: device or example")
        for name in ("dimension", "honest", "modulus_bits"):
            value = getattr(self, name)
            if type(value) is not int:  # a NaN would pass any comparison below
                raise ParameterError(f"{name} is {value!r}: an integer")
        if self.dimension < 1:
            raise ParameterError(f"dimension is {self.dimension}: at least 1")
        for name in ("clip", "granularity", "sigma", "loss_bound"):
            value = getattr(self, name)
            if not LEAST <= value <= MOST:
                raise ParameterError(f"{name} is {value}: a number from {LEAST} to {MOST}")
        if not (self.metric_scale == 0 or LEAST <= self.metric_scale <= MOST):
            raise ParameterError(f"metric_scale is {self.metric_scale}: 0, or a number from {LEAST} to {MOST}")
        if not 2 <= self.honest <= MAX_HONEST:
            raise ParameterError(f"honest is {self.honest}: 2 to {MAX_HONEST}; one device's noise alone hides nothing")
        if not 2 <= self.modulus_bits <= 31:
            raise ParameterError(f"modulus_bits is {self.modulus_bits}: 2 to 31")
        if not MIN_SHARE_SIGMA <= self.share_sigma <= MAX_SIGMA:
            raise ParameterError(
                f"sigma = {self.sigma} shared by {self.honest} is {self.share_sigma:.3g} steps a device: "
                f"{MIN_SHARE_SIGMA} to {MAX_SIGMA}; choose a finer granularity"
            )
        if not self.sensitivity / self.granularity < _MOST_STEPS:
            raise ParameterError(f"granularity is {self.granularity}: too fine for a clip of {self.clip}")

    @property
    def length(self) -> int:
        """Coordinates of the integer vector: d, and the metrics if there are any."""
        return self.dimension + (METRICS if self.metric_scale else 0)

    @property
    def sensitivity(self) -> float:
        """L2 norm of what one unit adds, before rounding, weight units: sqrt(C^2 + a^2 (3 + L^2)).

        For unit "example" FLOAT32_SLACK times that: gradients, losses and fractions of correct labels are float32 sums.
        """
        a = self.metric_scale
        norm = math.hypot(self.clip, a, a, a * self.loss_bound, a)
        return norm * FLOAT32_SLACK if self.unit == "example" else norm

    @property
    def beta(self) -> float:
        """What the rounding's bound may fail with: for "example" it goes into delta, for "device" it never fails."""
        return CONDITIONAL_BETA if self.unit == "device" else UNCONDITIONAL_BETA

    @property
    def sensitivity_steps(self) -> float:
        """L2 norm of what one unit adds, after rounding, steps: the proof's Delta_2."""
        # 1e-9: the rotation's float64 rounding
        return rounded_norm_bound(self.sensitivity / self.granularity * (1 + 1e-9), self.length, self.beta)

    @property
    def noise_multiplier(self) -> float:
        """The group's noise over what one unit adds: what the accountants take."""
        return self.sigma / self.sensitivity_steps

    @property
    def share_sigma(self) -> float:
        """One device's noise, steps: total / h in variance, so that any h of them carry all of it.

        The least float64 with share^2 h >= sigma^2. The root's and the quotient's rounding can lose two units in the
        last place, so the search starts below them and compares in integers.
        """
        total, unit = self.sigma.as_integer_ratio()
        share = self.sigma / math.sqrt(self.honest) * (1 - 2.0**-50)
        while True:
            part, whole = share.as_integer_ratio()
            if (part * unit) ** 2 * self.honest >= (total * whole) ** 2:
                return share
            share = math.nextafter(share, math.inf)

    def scaled(self, clip: float) -> Mechanism:
        """The mechanism with another clip, and granularity and metric_scale in proportion.

        Everything in steps stays, to 1 part in 1e15: the noise multiplier, the sensitivity, the bound on wrapping; so
        does what a round costs. A metric's noise stays what it was, the vector's follows the clip. Scale the plan's
        mechanism, not the last round's: then errors do not add up.
        Raises ParameterError on a clip that is not above 0, or if granularity or metric_scale leaves its range.
        """
        if not LEAST <= clip <= MOST:
            raise ParameterError(f"clip is {clip}: a number from {LEAST} to {MOST}")
        factor = clip / self.clip
        return replace(self, clip=clip, granularity=self.granularity * factor, metric_scale=self.metric_scale * factor)

    def sum_correction(self) -> float:
        """tau: how far a sum of h discrete Gaussians is from one, as max-divergence per coordinate.

        10 * sum over k = 1..h-1 of exp(-2 pi^2 s^2 k / (k + 1)), s the share's sigma (the same paper, Theorem 1). It
        counts for each of `length` coordinates.
        """
        exponent = -2 * math.pi**2 * self.share_sigma**2
        return 10 * sum(math.exp(exponent * k / (k + 1)) for k in range(1, self.honest))

    def wrap_probability(self, contributors: int, units: int | None = None) -> float:
        """A bound on the probability that some coordinate of a sum of `contributors` wraps modulo 2^b.

        contributors: devices that send, at least 1.  units: for "example", how many examples the sum holds (needed: a
        device's sum has no bound of its own); for "device" there are as many as contributors.

        Rotated coordinates are sub-Gaussian with proxy (u c)^2 / block for u aligned vectors of norm c, rounding adds
        at most n / 4, noise n share^2 (it comes from every contributor): a union bound over the coordinates. A
        conditional rounding may be off by 0.62 steps in the mean (docs/privacy.md section 2.1): taken off the room.
        Wrapping costs accuracy, never privacy.
        """
        if self.unit == "device":
            units = contributors
        if contributors < 1 or units is None or units < 0:
            raise ParameterError(f"no bound for {contributors} contributors with {units} {self.unit}s")
        spread = (units * self.sensitivity / self.granularity) ** 2 / block_length(self.length)
        variance = spread + contributors * (0.25 + self.share_sigma**2)
        room = 2.0 ** (self.modulus_bits - 1) - 1 - (contributors if self.unit == "device" else 0)
        if room <= 0:
            return 1.0
        return min(1.0, 2.0 * self.length * math.exp(-room * room / (2 * variance)))


@dataclass(frozen=True, slots=True)
class MetricSums:
    """The metrics of a contribution, or noisy ones of a group's sum. One unit adds at most (1, 1, loss_bound, 1).

    Unit "device": see `device_metrics`. Unit "example": sums over the examples of one draw that counted, `unclipped`
    being those that were not scaled down.
    """

    count: float
    """Units."""
    correct: float
    """Of them, how many were predicted right."""
    loss: float
    """Their losses, each taken into [0, loss_bound]."""
    unclipped: float
    """Of them, how many had a norm of at most the clip (Andrew et al. 2021, arXiv:1905.03871)."""


@dataclass(frozen=True)
class Decoded:
    """What a group's sum says.  vector: (d,) float64, weight units.  metrics: noisy, or None if the plan has none."""

    vector: F64 = field(repr=False)
    metrics: MetricSums | None


def clip_l2(vector: F64, bound: float) -> F64:
    """`vector` scaled down, if needed, so that its L2 norm is at most `bound` (1 + 1e-12). New, float64.

    The norm is taken of the vector over its largest magnitude: squares of large numbers overflow, of small ones vanish.
    Raises ParameterError on a NaN or an infinity, which would pass any norm test, and on a bound that is not above 0.
    Source: Abadi et al. 2016, arXiv:1607.00133, Algorithm 1.
    """
    if not (math.isfinite(bound) and bound > 0):
        raise ParameterError(f"a clip bound is finite and above 0, not {bound}")
    if not np.isfinite(vector).all():
        raise ParameterError("the vector holds NaN or infinity")
    norm, largest = _norm(vector)
    if norm * largest <= bound:
        return vector.astype(np.float64)
    scaled: F64 = vector / largest
    scaled *= bound / norm
    return scaled


def _norm(vector: F64) -> tuple[float, float]:
    """(norm of the vector over its largest magnitude, the magnitude). Their product is the norm."""
    largest = max(float(vector.max(initial=0.0)), -float(vector.min(initial=0.0)))
    if largest == 0.0:
        return 0.0, 0.0
    return math.sqrt(square_norm(vector, largest)), largest


def device_metrics(mechanism: Mechanism, vector: F64, count: float, correct: float, loss: float) -> MetricSums:
    """One device's metrics for unit "device": (1, share correct, mean loss, whether the vector is within the clip).

    vector: what `encode` is given.  count, correct, loss: sums over its examples. All zero if none counted. The mean
    loss is taken into [0, loss_bound]; NaN and infinity, which training that diverged leaves, count as loss_bound: a
    device that goes silent then would tell of it.
    Raises ParameterError if `count` is no number of examples, or more were correct; on NaN or infinity in the vector;
    for unit "example".
    """
    if mechanism.unit != "device":
        raise ParameterError('for unit "example" the metrics are the training graph\'s sums')
    if not 0 <= count < math.inf:
        raise ParameterError(f"no number of examples is {count}")
    if count == 0:
        return MetricSums(0.0, 0.0, 0.0, 0.0)
    if not 0 <= correct <= count * FLOAT32_SLACK:
        raise ParameterError(f"{correct} of {count} examples cannot be correct")
    mean = loss / count
    bounded = min(max(mean, 0.0), mechanism.loss_bound) if math.isfinite(mean) else mechanism.loss_bound
    if not np.isfinite(vector).all():
        raise ParameterError("the vector holds NaN or infinity")
    norm, largest = _norm(vector)
    return MetricSums(1.0, min(correct / count, 1.0), bounded, float(norm * largest <= mechanism.clip))


def encode(
    mechanism: Mechanism,
    vector: F64,
    metrics: MetricSums | None,
    public_seed: bytes,
    entropy: bytes,
) -> NDArray[np.uint32]:
    """One device's contribution: uint32 (length,) in [0, 2^b).

    vector: float64 (d,), weight units. unit "device": the model's change, clipped here. unit "example": the sum of
    gradients that were each clipped inside the graph; it is not clipped again, however many there are, and zeros if
    none were drawn: an empty draw sends noise.
    metrics: as `MetricSums` says for the unit. None exactly if the mechanism has no metrics.
    public_seed: the ticket's hash.  entropy: 32 fresh secret bytes, never used for another vector or seed.
    Raises ParameterError on a wrong shape, NaN or infinity; then nothing may be sent.
    """
    if vector.shape != (mechanism.dimension,) or vector.dtype != np.float64:
        raise ParameterError(f"the vector is float64 ({mechanism.dimension},), not {vector.dtype} {vector.shape}")
    if (metrics is None) != (mechanism.metric_scale == 0.0):
        raise ParameterError("metrics are given exactly if the plan has a metric_scale")
    full = np.zeros(mechanism.length)
    full[: mechanism.dimension] = clip_l2(vector, mechanism.clip) if mechanism.unit == "device" else vector
    if metrics is not None:
        full[mechanism.dimension :] = _bounded(mechanism, metrics)
        full[mechanism.dimension :] *= mechanism.metric_scale
    largest = max(float(full.max()), -float(full.min()))
    if not largest < mechanism.granularity * _MOST_STEPS:  # true of a NaN too
        fault = "too large for this granularity" if math.isfinite(largest) else "not finite: NaN or infinity"
        raise ParameterError(f"the vector is {fault}")
    full = rotate(full, public_seed)
    full /= mechanism.granularity
    rounding = KeyStream(derive_key(entropy, "rounding", public_seed))
    if mechanism.unit == "device":
        integers = round_conditionally(full, mechanism.sensitivity_steps, rounding)
    else:
        integers = round_stochastically(full, rounding)
    del full  # before the noise, which is as long
    noise = KeyStream(derive_key(entropy, "noise", public_seed))
    integers += noise_sampler(*mechanism.share_sigma.as_integer_ratio()).sample(noise, mechanism.length)
    integers &= (1 << mechanism.modulus_bits) - 1  # two's complement: modulo 2^b for negative numbers too
    return integers.astype(np.uint32)


def decode(mechanism: Mechanism, total: NDArray[np.uint32], public_seed: bytes) -> Decoded:
    """A group's sum modulo 2^b, uint32 (length,), back in weight units: an estimate of the sum of what was encoded.

    Unbiased for unit "example". For "device" conditional rounding may shift the mean by at most 0.62 steps a device, in
    the L2 norm of the whole vector (docs/privacy.md section 2.1).
    Raises ParameterError on another shape or dtype.
    """
    if total.shape != (mechanism.length,) or total.dtype != np.uint32:
        raise ParameterError(f"a sum is uint32 ({mechanism.length},), not {total.dtype} {total.shape}")
    modulus, half = 1 << mechanism.modulus_bits, 1 << (mechanism.modulus_bits - 1)
    centred = (total.astype(np.int64) + half) % modulus - half
    values = rotate_back(centred.astype(np.float64) * mechanism.granularity, public_seed)
    metrics = None
    if mechanism.metric_scale:
        metrics = MetricSums(*(float(x) / mechanism.metric_scale for x in values[mechanism.dimension :]))
    return Decoded(values[: mechanism.dimension], metrics)


def _bounded(mechanism: Mechanism, metrics: MetricSums) -> F64:
    """The metrics, checked to be within what their number of units can add, and held to it.

    For "example" this sees only the sums. That no single example adds more than (1, 1, loss_bound, 1) is the graph's
    part, to float32's rounding. Holding a sum to a multiple of the count does not let one example change it by more: if
    it adds l <= L to a sum s of n, min(s + l, (n + 1) L) - min(s, n L) lies between 0 and L.
    """
    if not all(math.isfinite(value) and value >= 0 for value in astuple(metrics)):
        raise ParameterError("the metrics hold a negative number, NaN or infinity")
    units = 1.0 if mechanism.unit == "device" else metrics.count
    most = MetricSums(units, units, units * mechanism.loss_bound, units)
    for name, bound in asdict(most).items():
        if getattr(metrics, name) > bound * FLOAT32_SLACK:
            raise ParameterError(f"the metrics exceed what {units:g} units can add: {name}")
    return np.minimum(astuple(metrics), astuple(most))
