"""What the rounds of a task cost in privacy, by Google's dp-accounting: both figures, from what was released.

`planned` and `composed` are for plans fixed in advance and use privacy loss distributions (PLD), the tighter way.
`Record` takes down what happened, round by round, and sums it by Renyi differential privacy (RDP), whatever the rounds
were, or by PLD if they follow a plan. Where rounds were chosen in the light of earlier ones the figure by RDP says what
was spent; what bounds it is the devices' filters.
Formulas and their reasons: docs/privacy.md section 4. Importing this costs 75 MB: load it when a figure is asked for.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import ClassVar, Literal

from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import privacy_loss_distribution as pld
from dp_accounting.rdp import RdpAccountant

from edge_sdk.errors import ParameterError
from edge_sdk.privacy.ledger_entry import noise_of
from edge_sdk.privacy.mechanism import Mechanism
from edge_sdk.privacy.rdp import (
    AgainstCoordinator,
    AgainstReaders,
    Sampling,
    against_coordinator,
    against_readers,
)

Method = Literal["pld", "rdp"]
Step = tuple[Mechanism, Sampling]
"""What one round of a plan lets out."""
Events = Counter[Step]

SAME = 1e-9
"""Noise multipliers that differ by less are one: adaptive clipping leaves them rounding errors apart. Figures by PLD
take so much off each."""

MOST_HISTORIES = 16
"""Devices' histories that are worked out one by one by PLD; all cheaper ones are bounded together."""

SMOOTHING = 1.5
"""Standard deviation, steps, of the part of the noise that the PLD bound gives away (section 4.4)."""

_ORDERS = [*(1 + x / 10 for x in range(10, 110)), *range(12, 65), 128, 256, 512, 1024]


@dataclass(frozen=True)
class _Guarantee:
    """(epsilon, delta) against one observer, and how it was computed."""

    epsilon: float
    delta: float
    method: Method
    observer: ClassVar[str]

    def __str__(self) -> str:
        return f"epsilon {self.epsilon:.2f} at delta {self.delta:.0e} against {self.observer} ({self.method.upper()})"


class ReadersGuarantee(_Guarantee):
    """Against readers of the published models, who do not know who took part. Not the coordinator's figure."""

    observer = "readers"


class CoordinatorGuarantee(_Guarantee):
    """Against the coordinator, committee, broker and network, who see which devices sent. Not the readers' figure."""

    observer = "the coordinator"


@dataclass(frozen=True)
class Figures:
    """Both, always: neither follows from the other."""

    readers: ReadersGuarantee
    coordinator: CoordinatorGuarantee

    def __str__(self) -> str:
        return f"{self.readers}; {self.coordinator}"


@dataclass(frozen=True)
class RoundRecord:
    """What one round let out.

    corrupt: F of a group: of its noise nothing is counted.  included: per group of the sealed set, the senders.
    left_out: senders whose contribution arrived and is in no sum: late, complained about, or the round was aborted.
    published: whether a model that holds the sums was shown to anyone.
    steady_noise: whether the coordinator topped the noise of what it published up to a level that does not depend on
    how many contributed. Without it the level shows the number, and with unit "device" the coin for taking part hides
    nothing from a reader who knows who else did (section 4.2).
    """

    mechanism: Mechanism
    sampling: Sampling
    corrupt: int
    included: tuple[tuple[int, ...], ...] = ()
    left_out: tuple[int, ...] = ()
    published: bool = False
    steady_noise: bool = False

    def __post_init__(self) -> None:
        """Raises ParameterError on a sender that is listed twice, or a group that no member would have signed."""
        senders = [*self.left_out, *(sender for group in self.included for sender in group)]
        if len(set(senders)) != len(senders):
            raise ParameterError("a sender is listed twice")
        least = self.mechanism.honest + self.corrupt
        if any(0 < len(group) < least for group in self.included):
            raise ParameterError(f"a group has fewer than h + F = {least} contributors: it was not opened")

    @property
    def readers_sampling(self) -> Sampling:
        """The coins that amplify against readers."""
        if self.mechanism.unit == "device" and not self.steady_noise:
            return Sampling(1.0, self.sampling.example)
        return self.sampling

    def realised(self, contributors: int) -> Mechanism:
        """The mechanism with the noise that a group of so many carried: F of them may have added none."""
        honest = max(self.mechanism.honest, contributors - self.corrupt)
        sigma = self.mechanism.sigma * math.sqrt(honest / self.mechanism.honest) * (1 - 1e-12)
        return (
            self.mechanism if honest == self.mechanism.honest else replace(self.mechanism, sigma=sigma, honest=honest)
        )


@dataclass
class Record:
    """Rounds as they happened, and what they cost.

    against readers: every round that was published, with the least noise that was required. Whether a device took part
    is secret from readers, so the realised number of contributors may not be used against them.
    against the coordinator: the device that pays most, for every contribution that it sent: with the noise that its
    group carried if it was summed, with the least that was required if not.
    """

    rounds: list[RoundRecord] = field(default_factory=list)

    def add(self, entry: RoundRecord) -> None:
        """Take down one round, also one that was aborted. Raises ParameterError if the unit changes."""
        if self.rounds and entry.mechanism.unit != self.rounds[0].mechanism.unit:
            raise ParameterError("a record is of one unit")
        self.rounds.append(entry)

    def figures(self, delta: float) -> Figures:
        """Both figures by RDP. Zero before the first round."""
        return _rdp_figures(
            Counter((entry.mechanism, entry.readers_sampling) for entry in self.rounds if entry.published),
            self._most_charged(delta),
            delta,
        )

    def figures_of_plan(self, delta: float, plan: Sequence[Step] | None = None) -> Figures:
        """Both figures by PLD, which is sound where every round's cost was fixed before the first one's result.

        plan: what was announced before the first round, for each model to be published. None: every round costs the
        same. Clips may differ, adapted in the light of results, if granularity and metrics were scaled with them
        (`Mechanism.scaled`): what counts is the cost of a round (section 4.4). Against readers the planned noise
        counts, against the coordinator the noise that groups carried. Both hold for what happened of the plan, if who
        sent and how many rounds there were did not depend on results. For training that stopped early because of its
        results the whole plan's figure holds: `composed`.
        Raises ParameterError if a round has less noise than its step of the plan, other coins or another unit; if, with
        no plan, rounds differ in cost; if the published noise was kept steady in some rounds and not in others. Then
        the costs may have been chosen in the light of results, and only `figures`, by RDP, is given.
        """
        if not self.rounds:
            raise ParameterError("no round happened")
        if len({entry.readers_sampling == entry.sampling for entry in self.rounds}) > 1:
            raise ParameterError("the noise was kept at one level in some rounds only: ask for the figures by RDP")
        planned_rounds = [replace(entry, mechanism=step[0]) for entry, step in self._steps(plan)]
        published = Counter((entry.mechanism, entry.readers_sampling) for entry in planned_rounds if entry.published)
        readers = _pld_epsilon(_readers_events(published), delta)
        coordinator = _largest(_histories(planned_rounds), delta)
        return Figures(ReadersGuarantee(readers, delta, "pld"), CoordinatorGuarantee(coordinator, delta, "pld"))

    def _steps(self, plan: Sequence[Step] | None) -> Iterable[tuple[RoundRecord, Step]]:
        """Each round with the plan's step that it attempted: an aborted round's step is attempted again."""
        position = 0
        if plan is None:
            least = min((entry.mechanism for entry in self.rounds), key=lambda m: m.noise_multiplier)
            plan = [(least, self.rounds[0].sampling)] * len(self.rounds)
            if any(not _no_dearer(least, entry.mechanism) for entry in self.rounds):
                raise ParameterError("the rounds were not one plan fixed in advance: ask for the figures by RDP")
        for entry in self.rounds:
            if position == len(plan):
                raise ParameterError(f"there were more rounds than the plan's {len(plan)}: ask for the figures by RDP")
            mechanism, sampling = plan[position]
            if entry.sampling != sampling or not _no_dearer(entry.mechanism, mechanism):
                raise ParameterError(
                    f"the rounds were not the plan fixed in advance: step {position} had other coins or less noise; "
                    f"ask for the figures by RDP"
                )
            yield entry, (mechanism, sampling)
            position += entry.published

    def _most_charged(self, delta: float) -> Events:
        """The sends of the device with the largest epsilon against the coordinator."""
        return max(
            _histories(self.rounds), key=lambda history: _coordinator_curve(history).epsilon(delta), default=Counter()
        )


def planned(mechanism: Mechanism, sampling: Sampling, rounds: int, sends: int, delta: float) -> Figures:
    """Both figures by PLD of a plan of equal rounds. rounds: published ones.  sends: the most of one device."""
    return composed(Counter({(mechanism, sampling): rounds}), Counter({(mechanism, sampling): sends}), delta)


def composed(published: Events, sends: Events, delta: float) -> Figures:
    """Both figures by PLD of a plan whose rounds may differ, all of them fixed in advance.

    published: how many rounds of each kind readers see.  sends: in how many of each kind one device sends, at most.
    With unit "device" and a device rate below 1 it holds if the coordinator keeps the published noise steady
    (`RoundRecord.steady_noise`).
    Raises ParameterError on a negative number.
    """
    readers = _pld_epsilon(_readers_events(published), delta)
    coordinator = _pld_epsilon(_coordinator_events(sends), delta)
    return Figures(ReadersGuarantee(readers, delta, "pld"), CoordinatorGuarantee(coordinator, delta, "pld"))


def planned_rdp(mechanism: Mechanism, sampling: Sampling, rounds: int, sends: int, delta: float) -> Figures:
    """Both figures by RDP of the same: what a record of the plan will say."""
    return _rdp_figures(Counter({(mechanism, sampling): rounds}), Counter({(mechanism, sampling): sends}), delta)


def _no_dearer(mechanism: Mechanism, planned: Mechanism) -> bool:
    """Whether a round of `mechanism` costs no more than one of `planned`, up to SAME, which figures by PLD take off."""
    return (
        mechanism.unit == planned.unit
        and mechanism.noise_multiplier >= planned.noise_multiplier * (1 - SAME)
        and mechanism.length <= planned.length
        and mechanism.sum_correction() <= planned.sum_correction()
    )


def _histories(rounds: Iterable[RoundRecord]) -> list[Events]:
    """What devices sent, each set of sends once."""
    sent: dict[int, Events] = {}
    for entry in rounds:
        for group in entry.included:
            realised = entry.realised(len(group))
            for sender in group:
                sent.setdefault(sender, Counter())[realised, entry.sampling] += 1
        for sender in entry.left_out:
            sent.setdefault(sender, Counter())[entry.mechanism, entry.sampling] += 1
    return list({frozenset(counter.items()): counter for counter in sent.values()}.values())


def _largest(histories: list[Events], delta: float) -> float:
    """The largest epsilon of these by PLD, or a bound on it. 0 for none.

    In order of their epsilons by RDP, which bound what is left: where that is below the largest by PLD so far, it is
    found. Of many that differ little the cheaper ones are bounded by the most that any of them has of each kind.
    """
    bound = {id(history): _coordinator_curve(history).epsilon(delta) for history in histories}
    ranked = sorted(histories, key=lambda history: bound[id(history)], reverse=True)
    largest = 0.0
    for history in ranked[:MOST_HISTORIES]:
        if bound[id(history)] <= largest:
            return largest
        largest = max(largest, _pld_epsilon(_coordinator_events(history), delta))
    rest: Events = Counter()
    for history in ranked[MOST_HISTORIES:]:
        if bound[id(history)] > largest:
            rest |= history
    return max(largest, _pld_epsilon(_coordinator_events(rest), delta))


def _coordinator_curve(history: Events) -> AgainstCoordinator:
    total = AgainstCoordinator()
    for (mechanism, sampling), count in history.items():
        noise, beta = noise_of(mechanism)
        total += against_coordinator(noise, mechanism.unit, mechanism.unit, sampling, beta) * count
    return total


def _rdp_figures(published: Events, sends: Events, delta: float) -> Figures:
    """published: rounds that readers saw.  sends: one device's."""
    if all(known == 1.0 for _, _, known, _ in _readers_events(published)):
        readers = _rdp_epsilon([(m, secret, n) for m, secret, _, n in _readers_events(published)], delta)
    else:  # dp-accounting's RDP has no coin that the observer knows: our own curves have
        total = AgainstReaders()
        for (mechanism, sampling), count in published.items():
            noise, beta = noise_of(mechanism)
            total += against_readers(noise, mechanism.unit, mechanism.unit, sampling, beta) * count
        readers = total.epsilon(delta)
    coordinator = _rdp_epsilon([(m, secret, n) for m, secret, _, n in _coordinator_events(sends)], delta)
    return Figures(ReadersGuarantee(readers, delta, "rdp"), CoordinatorGuarantee(coordinator, delta, "rdp"))


_Event = tuple[Mechanism, float, float, int]
"""(mechanism, rate of the coin that the observer does not know, of the coin that it may know, how often)."""


def _readers_events(published: Events) -> list[_Event]:
    return [
        (m, s.device, 1.0, n) if m.unit == "device" else (m, s.example, s.device, n) for (m, s), n in published.items()
    ]


def _coordinator_events(sends: Events) -> list[_Event]:
    return [(m, 1.0 if m.unit == "device" else s.example, 1.0, n) for (m, s), n in sends.items()]


def _rdp_epsilon(events: list[tuple[Mechanism, float, int]], delta: float) -> float:
    """epsilon of (mechanism, secret rate, count) events, by dp-accounting's RdpAccountant; 0 if nothing happened."""
    events = [event for event in events if event[2]]
    if not events:
        return 0.0
    accountant, rounding, slack = RdpAccountant(orders=_ORDERS), 0.0, 0.0
    for mechanism, rate, count in events:
        noise, beta = noise_of(mechanism)
        rounding += count * beta
        # The sum of discrete Gaussians: at orders of 2 and more its curve is above one's by no more than 3 tau d.
        slack += count * 3 * noise.correction * noise.dimension
        event = GaussianDpEvent(noise.multiplier)
        accountant.compose(SelfComposedDpEvent(event if rate == 1.0 else PoissonSampledDpEvent(rate, event), count))
    return math.inf if rounding >= delta else float(accountant.get_epsilon(delta - rounding)) + slack


def _pld_epsilon(events: list[_Event], delta: float) -> float:
    """epsilon of rounds whose costs were fixed in advance; 0 for none.

    Each mechanism is, up to exp(+-t) a coordinate, a randomised rounding of the continuous one whose variance is less
    by SMOOTHING^2: what is proved of that one's privacy loss distribution holds for it (section 4.4).
    """
    if any(count < 0 for *_, count in events):
        raise ParameterError(f"no number of rounds is {min(count for *_, count in events)}")
    rounding, slack = 0.0, 0.0
    counts: Counter[tuple[float, float, float]] = Counter()
    for mechanism, secret, known, count in events:
        noise, beta = noise_of(mechanism)
        rounding += count * beta
        slack += count * noise.dimension * (noise.correction + 5 * math.exp(-2 * math.pi**2 * SMOOTHING**2))
        continuous = math.sqrt(mechanism.sigma**2 - SMOOTHING**2) / mechanism.sensitivity_steps * (1 - SAME)
        counts[secret, known, continuous] += count
    total = None
    for (secret, known, continuous), count in _merged(counts).items():
        rounds = _round_pld(continuous, secret, known).self_compose(count)
        total = rounds if total is None else total.compose(rounds)
    left = (delta - rounding) * math.exp(-slack)
    if total is None:
        return 0.0
    return float(total.get_epsilon_for_delta(left)) + 2 * slack if left > 0 else math.inf


def _merged(counts: Counter[tuple[float, float, float]]) -> Counter[tuple[float, float, float]]:
    """(secret rate, known rate, multiplier) -> rounds, multipliers within SAME taken as the smallest of them."""
    result: Counter[tuple[float, float, float]] = Counter()
    last = (0.0, 0.0, 0.0)
    for kind in sorted(kind for kind, count in counts.items() if count):
        if kind[:2] != last[:2] or kind[2] > last[2] * (1 + SAME):
            last = kind
        result[last] += counts[kind]
    return result


@lru_cache(maxsize=64)
def _round_pld(multiplier: float, secret_rate: float, known_rate: float) -> pld.PrivacyLossDistribution:
    """One round of the continuous mechanism; with probability 1 - known_rate, as everyone sees, nothing happens."""
    one = pld.from_gaussian_mechanism(multiplier, sampling_prob=secret_rate)
    if known_rate == 1.0:
        return one
    return one.compute_mixture(pld.identity(), known_rate)
