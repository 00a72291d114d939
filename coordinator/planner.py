"""From a target to a plan: how much noise, how fine the integers, how many contributors; or why not, and what would do.

`make_plan` is arithmetic and takes no chances: a plan that it returns holds its targets, devices with the budgets that
it names run it to the end, members sign its rounds, and its sums wrap with the probability that it states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from coordinator.accounting import Figures, Method, planned, planned_rdp
from edge_sdk.errors import ParameterError
from edge_sdk.policy import default_policy
from edge_sdk.privacy.ledger_entry import noise_of
from edge_sdk.privacy.mechanism import METRICS, MIN_SHARE_SIGMA, UNCONDITIONAL_BETA, Mechanism, Unit
from edge_sdk.privacy.noise import MAX_SIGMA
from edge_sdk.privacy.rdp import (
    AgainstCoordinator,
    AgainstReaders,
    Budget,
    Filter,
    Noise,
    Sampling,
    against_coordinator,
    against_readers,
)
from edge_sdk.protocol.messages import MAX_CONTRIBUTORS, MAX_GROUPS, NoisePlan
from edge_sdk.protocol.plan import delta_bits

MAX_WRAP = 2.0**-40
"""Largest probability, a round and group, that some coordinate of a sum wraps. It costs accuracy, never privacy."""

SPREADS = 6
"""n_max lies so many standard deviations above the expected cohort: a round seals early, or overflows a group, once in
10^9 if the number is normal. Where a coin for taking part hides devices from readers, the least cohort lies so far
below too: a round that ends, or does not, because one device came shows that it came."""

LOW_SPREADS = 3
"""Elsewhere a cohort that is too small costs the round and nothing else: one round in 700 may abort."""

MAX_MULTIPLIER = 10_000.0
MAX_EPSILON = 100.0
"""A target of more is refused, and so is a plan that costs more against readers: with somebody's data the models may be
e^100 times as likely as without, which protects nobody, and figures by PLD take minutes there. Against the coordinator
alone a plan may cost more: it may be one that is trusted."""

_MOST_SEARCHED = 1e6
"""Where the search for a filter's budget gives up."""

MAX_INFLATION = 1.5
"""Most that rounding may stretch what one unit adds."""

_OVERSHOOT = 1e-3
"""Relative width to which the noise multiplier is searched."""


@dataclass(frozen=True)
class Cohort:
    """Who is expected, and what is asked of them.

    expected: contributors of a round, on average.  spread: their standard deviation.  roster: devices enrolled.
    honest: h.  groups: G.  corrupt: F_G, corrupt devices that one group can hold (the epoch says).
    most: at which a round is to be sealed early, None: so many that it hardly ever is.
    """

    expected: float
    spread: float
    roster: int
    honest: int
    corrupt: int
    groups: int = 1
    most: int | None = None

    def __post_init__(self) -> None:
        """Raises ParameterError that names what is out of range."""
        if not (0 < self.expected <= self.roster and 0 <= self.spread < math.inf):
            raise ParameterError(f"a cohort of {self.expected} +- {self.spread} from a roster of {self.roster}")
        if self.honest < 2 or self.corrupt < 0 or not 1 <= self.groups <= MAX_GROUPS:
            raise ParameterError(f"honest {self.honest}, corrupt {self.corrupt}, groups {self.groups}")

    @property
    def n_max(self) -> int:
        """Contributors at which a round is sealed early."""
        most = math.ceil(self.expected + SPREADS * self.spread) if self.most is None else self.most
        return max(2, min(self.roster, MAX_CONTRIBUTORS, most))

    @property
    def largest_group(self) -> int:
        """A size that no group passes but once in 10^9: its share of n_max and six standard deviations."""
        share = self.n_max / self.groups
        return self.n_max if self.groups == 1 else min(self.n_max, math.ceil(share + SPREADS * math.sqrt(share)))

    def smallest_group(self, spreads: float) -> float:
        """A size that groups fall below no more often than a normal number so many standard deviations below its mean.

        Within the group: the cohort's own spread, and how the beacon divides it.
        """
        share = self.expected / self.groups
        spread = math.hypot(self.spread / self.groups, math.sqrt(share * (1 - 1 / self.groups)))
        return share - spreads * spread


@dataclass(frozen=True)
class Work:
    """What is to be trained.

    dimension: d, parameters that are shared.  clip, metric_scale: weight units.  rounds: published models.
    examples: for unit "example", how many a device has on average: their gradients add up in the sum.
    """

    unit: Unit
    dimension: int
    clip: float
    rounds: int
    sampling: Sampling
    metric_scale: float = 0.0
    loss_bound: float = 1.0
    examples: float = 0.0

    def __post_init__(self) -> None:
        """Raises ParameterError without a round, or without examples where they count; `Mechanism` checks the rest."""
        if self.rounds < 1:
            raise ParameterError(f"rounds is {self.rounds}: at least 1")
        if self.unit == "example" and not 0 < self.examples < 2**32:
            raise ParameterError(f"examples is {self.examples}: say how many a device has on average, at most 2^32")

    def units(self, contributors: int) -> int:
        """Most vectors of one unit that a sum of so many contributions holds, but once in 10^9."""
        if self.unit == "device":
            return contributors
        drawn = self.examples * self.sampling.example * contributors
        spread = math.sqrt(drawn * (1 - self.sampling.example))
        return math.ceil(drawn + SPREADS * spread)

    @property
    def low_spreads(self) -> int:
        """How far below the expected cohort the least one has to lie, in standard deviations."""
        return SPREADS if self.unit == "device" and self.sampling.device < 1 else LOW_SPREADS

    @property
    def sends(self) -> int:
        """Rounds in which one device takes part: no more but once in 10^9 devices, by the binomial tail."""
        p, n = self.sampling.device, self.rounds
        if p == 1.0:
            return n
        tail, sends = 0.0, n
        while sends > 0:
            tail += math.exp(
                math.lgamma(n + 1) - math.lgamma(sends + 1) - math.lgamma(n - sends + 1)
                + sends * math.log(p) + (n - sends) * math.log1p(-p)
            )  # fmt: skip
            if tail > 1e-9:
                return sends
            sends -= 1
        return 1


@dataclass(frozen=True)
class Target:
    """Budgets to hold, at least one.  method: "rdp" as devices' filters count, or "pld", which is tighter.

    With "pld" devices have to be given larger budgets than these: the plan says how large.
    """

    readers: Budget | None = None
    coordinator: Budget | None = None
    method: Method = "rdp"

    def __post_init__(self) -> None:
        """Raises ParameterError without a budget, above MAX_EPSILON, and on two deltas: figures are compared at one."""
        if self.readers is None and self.coordinator is None:
            raise ParameterError("a target names a budget against readers, against the coordinator, or both")
        for observer, budget in (("readers", self.readers), ("coordinator", self.coordinator)):
            if budget is not None and budget.epsilon > MAX_EPSILON:
                raise ParameterError(
                    f"{observer}: epsilon {budget.epsilon:g} protects nobody: what is seen may be e^{budget.epsilon:g} "
                    f"times as likely with somebody's data as without; lower it to {MAX_EPSILON:g} at the most, and to "
                    "10 or less for a promise that says something"
                )
        if self.readers and self.coordinator and self.readers.delta != self.coordinator.delta:
            raise ParameterError("give both budgets one delta")

    @property
    def delta(self) -> float:
        budget = self.readers or self.coordinator
        return budget.delta if budget else math.nan


@dataclass(frozen=True)
class FixedNoise:
    """In place of a target: the noise, over all that one unit adds, metrics and rounding included. The figures follow.

    delta: at which they are given.
    """

    multiplier: float
    delta: float

    def __post_init__(self) -> None:
        """Raises ParameterError that names what is out of range."""
        if not 0 < self.multiplier <= MAX_MULTIPLIER:
            raise ParameterError(f"the noise multiplier is {self.multiplier}: above 0, at most {MAX_MULTIPLIER:g}")
        if not 0 < self.delta < 1:
            raise ParameterError(f"delta is {self.delta}: above 0 and below 1")


@dataclass(frozen=True)
class Plan:
    """A plan that holds. `str()` of it is the explanation for people."""

    work: Work
    cohort: Cohort
    mechanism: Mechanism
    wrap_probability: float
    figures: Figures
    """By PLD, the plan being fixed in advance."""
    figures_rdp: Figures
    ledger_readers: float
    """epsilon that a device's filter needs for the whole plan."""
    ledger_coordinator: float
    policy_delta: float
    """At which a device counts by the policy that it joins with."""
    policy_readers: float
    """epsilon that such a device's filter needs; infinite if no budget is enough."""
    policy_coordinator: float

    def __str__(self) -> str:
        m, c, w = self.mechanism, self.cohort, self.work
        noise = m.share_sigma * m.granularity * math.sqrt(c.expected)
        rounding = m.sensitivity_steps / (m.sensitivity / m.granularity) - 1
        lines = [
            f"{w.rounds} rounds of unit {w.unit!r}, {w.dimension} parameters, about {c.expected:g} contributors of "
            f"{c.roster}, at most {c.n_max} (sealed early beyond), {_groups(c.groups)}.",
            f"Against readers of the models, who do not know who took part: {self.figures.readers}; "
            f"{self.figures_rdp.readers.epsilon:.2f} by RDP.",
            f"Against the coordinator, who sees who sent, for a device that sends in {w.sends} rounds: "
            f"{self.figures.coordinator}; {self.figures_rdp.coordinator.epsilon:.2f} by RDP.",
            f"A device's ledger, which holds whatever the coordinator does, needs budgets of "
            f"{budget_text(self.ledger_readers)} and {budget_text(self.ledger_coordinator)} for it at delta "
            f"{self.figures.readers.delta:.1e}; by the policy that a device joins with, which counts at delta "
            f"{self.policy_delta:.1e}, {budget_text(self.policy_readers)} and {budget_text(self.policy_coordinator)}.",
            f"Noise of {m.noise_multiplier:.3g} times what one unit adds: {m.sigma:.4g} steps in each group's sum, "
            f"carried by any {m.honest} devices, {m.share_sigma:.4g} steps each. The sum of all contributions is off "
            f"by {noise:.3g} a parameter (standard deviation), at a clip of {m.clip:g}.",
            f"A step is {m.granularity:.3g}: sums modulo 2^{m.modulus_bits} (n_max leaves no more) wrap with "
            f"probability {self.wrap_probability:.1e} a round and group at most; rounding stretches one unit by "
            f"{rounding:.2%}.",
        ]
        if w.unit == "device" and w.sampling.device < 1:
            lines.append(
                "The figure against readers needs the coordinator to keep the noise of what it publishes at one level, "
                "and who took part, and how many, unpublished."
            )
        if w.unit == "example" and w.sampling.device < 1:
            lines.append(
                "The coin for taking part counts for little against readers: a device's other examples show how it "
                "fell."
            )
        spare = c.smallest_group(w.low_spreads) - c.corrupt
        if spare >= 2 * m.honest:
            lines.append(
                f"Groups seldom have fewer than {spare:.0f} honest devices: raising `honest` towards that lowers the "
                f"noise of the sum by up to {1 - math.sqrt(m.honest / spare):.0%}, and devices insist on more company."
            )
        return "\n".join(lines)


def make_plan(work: Work, cohort: Cohort, target: Target | FixedNoise) -> Plan:
    """The least noise that holds the target, or the noise that is fixed, in the finest steps that the modulus holds.

    Raises ParameterError that says which requirement fails, and what would meet it.
    """
    check_cohort(work, cohort)
    bits = 32 - delta_bits(cohort.n_max)
    multiplier = target.multiplier if isinstance(target, FixedNoise) else _search(work, cohort, target, bits)
    mechanism = _finest(work, cohort, multiplier, bits)
    arguments = (mechanism, work.sampling, work.rounds, work.sends, target.delta)
    noise = noise_of(mechanism)
    needs = _ledger_needs(work, _round_costs(work, *noise, work.unit), target.delta)
    if math.inf in needs:
        raise ParameterError(
            f"no budget lets this plan through: {work.rounds} rounds with noise of {mechanism.noise_multiplier:.3g} "
            f"times what one unit adds, at delta {target.delta:.1e}; what would do: more noise, fewer rounds, or a "
            f"larger delta"
        )
    if needs[0] > MAX_EPSILON * (1 + _OVERSHOOT):
        raise ParameterError(
            f"noise of {mechanism.noise_multiplier:.3g} times what one unit adds costs epsilon {needs[0]:.3g} in "
            f"{work.rounds} rounds, against readers of the models, and more than {MAX_EPSILON:g} protects nobody; what "
            "would do: more noise, or fewer rounds"
        )
    policy = default_policy([])
    delta = policy.lifetime.readers.delta
    joined = _ledger_needs(work, _round_costs(work, *noise, policy.protects), delta)
    return Plan(
        work, cohort, mechanism, _wrap(mechanism, work, cohort),
        planned(*arguments), planned_rdp(*arguments), *needs, delta, *joined,
    )  # fmt: skip


def choose_groups(work: Work, cohort: Cohort, target: Target | FixedNoise, corrupt_in_group: Mapping[int, int]) -> Plan:
    """The plan with the fewest groups, of those that an epoch allows.

    Fewer groups leave room for more honest devices in each, so for less noise in all; more groups make the sums smaller
    and the steps finer, and a liar spoils less. cohort: its groups and corrupt are replaced.  corrupt_in_group: the
    epoch's G -> F_G (`FleetEpoch.corrupt_in_group`).
    Raises ParameterError with each grouping's reason if none holds.
    """
    reasons = []
    for groups, corrupt in sorted(corrupt_in_group.items()):
        try:
            return make_plan(work, replace(cohort, groups=groups, corrupt=corrupt), target)
        except ParameterError as error:
            reasons.append(f"{'one group' if groups == 1 else f'{groups} groups'}: {error}")
    raise ParameterError("no number of groups holds this plan. " + " / ".join(reasons))


def noise_plan(plan: Plan) -> NoisePlan:
    """The plan's part of every ticket; `honest`, `n_max` and `groups` are the ticket's own (`plan.cohort`)."""
    m, sampling = plan.mechanism, plan.work.sampling
    return NoisePlan(
        unit=m.unit, clip=m.clip, granularity=m.granularity, sigma=m.sigma, metric_scale=m.metric_scale,
        loss_bound=m.loss_bound, device_rate=sampling.device, example_rate=sampling.example,
    )  # fmt: skip


def _search(work: Work, cohort: Cohort, target: Target, bits: int) -> float:
    """The least noise multiplier that holds the target."""
    multiplier = _least_multiplier(work, target, lambda z: _holds(work, target, Noise(z), _beta(work)))

    def holds(z: float) -> bool:
        mechanism = _finest(work, cohort, z, bits)
        if target.method == "rdp":
            return _holds(work, target, *noise_of(mechanism))
        figures = planned(mechanism, work.sampling, work.rounds, work.sends, target.delta)
        return (target.readers is None or figures.readers.epsilon <= target.readers.epsilon) and (
            target.coordinator is None or figures.coordinator.epsilon <= target.coordinator.epsilon
        )

    if target.method == "pld":
        multiplier = _bisect(multiplier / 2, multiplier, holds)  # the filters needed more noise than PLD does
    while not holds(multiplier):
        multiplier *= 1 + _OVERSHOOT  # the search knew nothing of the sum's correction: very small shares
    return multiplier


def check_cohort(work: Work, cohort: Cohort) -> None:
    """Return if groups of this cohort hardly ever are too small to be opened, else raise ParameterError."""
    spreads, least = work.low_spreads, cohort.honest + cohort.corrupt
    smallest = cohort.smallest_group(spreads)
    if smallest < least:
        fewer = (replace(cohort, groups=groups) for groups in range(cohort.groups - 1, 0, -1))
        groups = next((c.groups for c in fewer if c.smallest_group(spreads) >= least), 0)
        would = f"{_groups(groups)}, or " if groups else ""
        raise ParameterError(
            f"a group needs h + F = {least} contributors, and may have only {max(smallest, 0):.1f} (expected "
            f"{cohort.expected:g} +- {cohort.spread:g} in {_groups(cohort.groups)}; h is `honest`, F the corrupt "
            f"devices that may be in it, {cohort.corrupt}); what would do: {would}a larger cohort, a smaller h, or "
            "fewer corrupt devices to allow for ([authority] corrupt_devices)"
        )
    if cohort.n_max < cohort.groups * least:
        raise ParameterError(
            f"{cohort.groups} groups of at least {least} do not fit in n_max {cohort.n_max}; what would do: fewer "
            f"groups, or more devices"
        )


def _groups(number: int) -> str:
    return "one group" if number == 1 else f"{number} groups with the full noise each"


def _beta(work: Work) -> float:
    return UNCONDITIONAL_BETA if work.unit == "example" else 0.0


def _holds(work: Work, target: Target, noise: Noise, beta: float) -> bool:
    """Whether devices' filters with these budgets let the whole plan through."""
    readers, coordinator = _round_costs(work, noise, beta, work.unit)
    if target.readers is not None:
        total = readers * work.rounds
        if Filter.for_rounds(target.readers, readers).epsilon_of(total) > target.readers.epsilon:
            return False
    if target.coordinator is not None:
        sent = coordinator * work.sends
        if Filter.for_rounds(target.coordinator, coordinator).epsilon_of(sent) > target.coordinator.epsilon:
            return False
    return True


def _round_costs(work: Work, noise: Noise, beta: float, protects: Unit) -> tuple[AgainstReaders, AgainstCoordinator]:
    return (
        against_readers(noise, work.unit, protects, work.sampling, beta),
        against_coordinator(noise, work.unit, protects, work.sampling, beta),
    )


def _ledger_needs(work: Work, costs: tuple[AgainstReaders, AgainstCoordinator], delta: float) -> tuple[float, float]:
    """The least budgets, at `delta`, with which a filter lets the plan through; infinite where none does."""
    readers, coordinator = costs
    rounds, sends = work.rounds, work.sends

    def readers_hold(epsilon: float) -> bool:
        return Filter.for_rounds(Budget(epsilon, delta), readers).epsilon_of(readers * rounds) <= epsilon

    def coordinator_holds(epsilon: float) -> bool:
        return Filter.for_rounds(Budget(epsilon, delta), coordinator).epsilon_of(coordinator * sends) <= epsilon

    return (
        _bisect(1e-4, _MOST_SEARCHED, readers_hold) if readers_hold(_MOST_SEARCHED) else math.inf,
        _bisect(1e-4, _MOST_SEARCHED, coordinator_holds) if coordinator_holds(_MOST_SEARCHED) else math.inf,
    )


def _least_multiplier(work: Work, target: Target, holds: Callable[[float], bool]) -> float:
    if not holds(MAX_MULTIPLIER):
        raise ParameterError(
            f"no noise holds this: {work.rounds} rounds at delta {target.delta:.1e}; what would do: fewer rounds, or a "
            f"larger epsilon or delta"
        )
    return _bisect(1e-2, MAX_MULTIPLIER, holds)


def _bisect(low: float, high: float, holds: Callable[[float], bool]) -> float:
    """The least number, to 1 part in 1000, that holds; `high` must, and so must all above one that does."""
    while high > low * (1 + _OVERSHOOT):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _finest(work: Work, cohort: Cohort, multiplier: float, bits: int) -> Mechanism:
    """The mechanism with this noise multiplier and the smallest step whose sums hardly wrap."""
    whole = math.hypot(work.clip, work.metric_scale * math.sqrt(METRICS - 1 + work.loss_bound**2))
    if not (math.isfinite(whole) and whole > 0):
        raise ParameterError(f"clip is {work.clip}: a finite number above 0")
    last: Mechanism | None = None
    # From one step for the whole clip down to 2^-40 of it.
    for eighths in range(-8 * 4, 8 * 40):
        mechanism = _with_step(work, cohort, multiplier, bits, whole * 2.0 ** (-eighths / 8))
        if mechanism is None:
            continue
        if _wrap(mechanism, work, cohort) > MAX_WRAP:
            if last is not None:
                break
            continue
        last = mechanism
    if last is None or last.sensitivity_steps > MAX_INFLATION * last.sensitivity / last.granularity:
        raise ParameterError(
            f"sums modulo 2^{bits} (all that n_max {cohort.n_max} leaves) cannot hold {cohort.largest_group} "
            f"contributions with noise of {multiplier:.3g} times what one unit adds, carried by {cohort.honest}, in "
            f"steps fine enough for {work.dimension} parameters; what would do: a larger epsilon or fewer rounds (less "
            f"noise), a larger h (smaller shares), a smaller cohort or more groups, or fewer shared parameters"
        )
    return last


def _wrap(mechanism: Mechanism, work: Work, cohort: Cohort) -> float:
    return mechanism.wrap_probability(cohort.largest_group, work.units(cohort.largest_group))


def _with_step(work: Work, cohort: Cohort, multiplier: float, bits: int, granularity: float) -> Mechanism | None:
    """The mechanism with this step; None if its noise is out of the sampler's range."""

    def build(sigma: float) -> Mechanism:
        return Mechanism(
            unit=work.unit, dimension=work.dimension, clip=work.clip, granularity=granularity, sigma=sigma,
            honest=cohort.honest, modulus_bits=bits, metric_scale=work.metric_scale, loss_bound=work.loss_bound,
        )  # fmt: skip

    root = math.sqrt(cohort.honest)
    probe = build(2 * MIN_SHARE_SIGMA * root)
    sigma = multiplier * probe.sensitivity_steps
    if not MIN_SHARE_SIGMA * root <= sigma <= MAX_SIGMA * root * (1 - 1e-9):
        return None
    return build(sigma)


def budget_text(value: float) -> str:
    """Rounded up to two decimals: a budget of what it says is enough."""
    return f"{math.ceil(value * 100) / 100:.2f}" if math.isfinite(value) else "more than any budget"
