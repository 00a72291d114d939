"""What the rounds of a task cost in privacy, by Google's dp-accounting: both figures, from what was released.

`planned` is for a plan fixed in advance and uses privacy loss distributions (PLD), the tighter way. `Record` takes down
what happened, round by round, and sums it by Renyi differential privacy (RDP), whatever the rounds were. Where rounds
were chosen in the light of earlier ones its figure says what was spent; what bounds it is the devices' filters.
Formulas and their reasons: docs/privacy.md section 4. Importing this costs 75 MB: load it when a figure is asked for.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
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
Events = Counter[tuple[Mechanism, Sampling]]

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

    def figures_of_plan(self, delta: float) -> Figures:
        """Both figures by PLD, with planned noise and what happened of the plan.

        Raises ParameterError if rounds differ in mechanism or sampling: then they were not one plan, and only `figures`
        holds.
        """
        if not self.rounds:
            raise ParameterError("no round happened")
        first = self.rounds[0]
        if any((r.mechanism, r.readers_sampling) != (first.mechanism, first.readers_sampling) for r in self.rounds):
            raise ParameterError("the rounds were not one plan fixed in advance: ask for the figures by RDP")
        sends = Counter(sender for r in self.rounds for sender in _senders(r))
        published = sum(r.published for r in self.rounds)
        return planned(first.mechanism, first.readers_sampling, published, max(sends.values(), default=0), delta)

    def _most_charged(self, delta: float) -> Events:
        """The sends of the device with the largest epsilon against the coordinator."""
        sent: dict[int, Events] = {}
        for entry in self.rounds:
            for group in entry.included:
                for sender in group:
                    sent.setdefault(sender, Counter())[entry.realised(len(group)), entry.sampling] += 1
            for sender in entry.left_out:
                sent.setdefault(sender, Counter())[entry.mechanism, entry.sampling] += 1
        histories = {frozenset(counter.items()): counter for counter in sent.values()}
        return max(
            histories.values(), key=lambda history: _coordinator_curve(history).epsilon(delta), default=Counter()
        )


def planned(mechanism: Mechanism, sampling: Sampling, rounds: int, sends: int, delta: float) -> Figures:
    """Both figures by PLD of a plan fixed in advance.

    rounds: published ones.  sends: the most in which one device sends. With unit "device" and a device rate below 1
    it holds if the coordinator keeps the published noise steady (`RoundRecord.steady_noise`).
    """
    known, secret = (1.0, sampling.device) if mechanism.unit == "device" else (sampling.device, sampling.example)
    readers = _pld_epsilon(mechanism, secret, known, rounds, delta)
    secret = 1.0 if mechanism.unit == "device" else sampling.example
    coordinator = _pld_epsilon(mechanism, secret, 1.0, sends, delta)
    return Figures(ReadersGuarantee(readers, delta, "pld"), CoordinatorGuarantee(coordinator, delta, "pld"))


def planned_rdp(mechanism: Mechanism, sampling: Sampling, rounds: int, sends: int, delta: float) -> Figures:
    """Both figures by RDP of the same: what a record of the plan will say."""
    return _rdp_figures(Counter({(mechanism, sampling): rounds}), Counter({(mechanism, sampling): sends}), delta)


def _senders(entry: RoundRecord) -> Iterable[int]:
    yield from entry.left_out
    for group in entry.included:
        yield from group


def _coordinator_curve(history: Events) -> AgainstCoordinator:
    total = AgainstCoordinator()
    for (mechanism, sampling), count in history.items():
        noise, beta = noise_of(mechanism)
        total += against_coordinator(noise, mechanism.unit, mechanism.unit, sampling, beta) * count
    return total


def _rdp_figures(published: Events, sends: Events, delta: float) -> Figures:
    """published: rounds that readers saw.  sends: one device's."""
    if all(m.unit == "device" or s.device == 1.0 for m, s in published):
        rates = [(m, s.device if m.unit == "device" else s.example, n) for (m, s), n in published.items()]
        readers = _rdp_epsilon(rates, delta)
    else:  # dp-accounting's RDP has no coin that the observer knows: our own curves have
        total = AgainstReaders()
        for (mechanism, sampling), count in published.items():
            noise, beta = noise_of(mechanism)
            total += against_readers(noise, mechanism.unit, mechanism.unit, sampling, beta) * count
        readers = total.epsilon(delta)
    rates = [(m, 1.0 if m.unit == "device" else s.example, n) for (m, s), n in sends.items()]
    return Figures(
        ReadersGuarantee(readers, delta, "rdp"), CoordinatorGuarantee(_rdp_epsilon(rates, delta), delta, "rdp")
    )


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


def _pld_epsilon(mechanism: Mechanism, secret_rate: float, known_rate: float, rounds: int, delta: float) -> float:
    """epsilon of `rounds` equal rounds; 0 for none.

    The mechanism is, up to exp(+-t) a coordinate, a randomised rounding of the continuous one whose variance is less by
    SMOOTHING^2: what is proved of that one's privacy loss distribution holds for it (section 4.4).
    """
    if rounds < 0:
        raise ParameterError(f"no number of rounds is {rounds}")
    if rounds == 0:
        return 0.0
    noise, beta = noise_of(mechanism)
    per_round = noise.dimension * (noise.correction + 5 * math.exp(-2 * math.pi**2 * SMOOTHING**2))
    left = (delta - rounds * beta) * math.exp(-rounds * per_round)
    if left <= 0:
        return math.inf
    continuous = math.sqrt(mechanism.sigma**2 - SMOOTHING**2) / mechanism.sensitivity_steps
    total = _round_pld(continuous, secret_rate, known_rate).self_compose(rounds)
    return float(total.get_epsilon_for_delta(left)) + 2 * rounds * per_round


@lru_cache(maxsize=8)
def _round_pld(multiplier: float, secret_rate: float, known_rate: float) -> pld.PrivacyLossDistribution:
    """One round of the continuous mechanism; with probability 1 - known_rate, as everyone sees, nothing happens."""
    one = pld.from_gaussian_mechanism(multiplier, sampling_prob=secret_rate)
    if known_rate == 1.0:
        return one
    return one.compute_mixture(pld.identity(), known_rate)
