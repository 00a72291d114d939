"""A clip that follows a quantile of the units' norms, from the noisy metrics of each round.

Andrew, Thakkar, McMahan and Ramaswamy 2021 (arXiv:1905.03871), with the geometric update. The next clip is computed
from a sum that is private already, so it costs nothing; `Mechanism.scaled` keeps what a round costs the same whatever
the clip, so the account of a plan holds (docs/privacy.md section 2.8).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from edge_sdk.errors import ParameterError
from edge_sdk.privacy.mechanism import LEAST, MOST, MetricSums


@dataclass(frozen=True)
class AdaptiveClip:
    """How the clip moves.

    least, most: its bounds, weight units: with noise in every step it wanders, and a device refuses nothing but its
    noise multiplier.  quantile: the share of units that should be unclipped.  rate: a round multiplies the clip by
    between exp(-rate (1 - quantile)) and exp(rate quantile). Defaults: the paper's.
    """

    least: float
    most: float
    quantile: float = 0.5
    rate: float = 0.2

    def __post_init__(self) -> None:
        """Raises ParameterError that names what is out of range."""
        if not LEAST <= self.least <= self.most <= MOST:
            raise ParameterError(f"the clip's bounds are {self.least} and {self.most}: numbers above 0, in this order")
        if not 0 < self.quantile < 1:
            raise ParameterError(f"quantile is {self.quantile}: above 0 and below 1")
        if not 0 < self.rate <= 2:
            raise ParameterError(f"rate is {self.rate}: above 0, at most 2; 0.2 is usual")

    def next(self, clip: float, metrics: MetricSums) -> float:
        """The next round's clip.

        clip: this round's, weight units.  metrics: noisy, summed over this round's groups.
        C exp(-rate (b - quantile)), b the share of units that were unclipped, taken into [0, 1] because both of its
        terms are noisy. If noise left no units the clip stays.
        Raises ParameterError on a clip that is not above 0, or a NaN or infinite metric.
        """
        if not LEAST <= clip <= MOST:
            raise ParameterError(f"clip is {clip}: a number from {LEAST} to {MOST}")
        if not (math.isfinite(metrics.count) and math.isfinite(metrics.unclipped)):
            raise ParameterError(f"no share of units is {metrics.unclipped} / {metrics.count}")
        moved = clip
        if metrics.count > 0:
            # in this order no quotient overflows, however little noise left of the count
            unclipped = min(max(metrics.unclipped, 0.0), metrics.count) / metrics.count
            moved = clip * math.exp(-self.rate * (unclipped - self.quantile))
        return min(max(moved, self.least), self.most)
