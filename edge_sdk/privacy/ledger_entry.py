"""The device's account of what it spent: its entries, their one encoding, their chain, and what they add up to.

The pure part. `edge_sdk.ledger` keeps the entries in a file. docs/privacy.md section 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta

from edge_sdk.crypto.hashing import tagged_hash
from edge_sdk.errors import ParameterError, SordinoError
from edge_sdk.privacy.mechanism import Mechanism, Unit
from edge_sdk.privacy.rdp import (
    AgainstCoordinator,
    AgainstReaders,
    Budget,
    BudgetExceeded,
    Filter,
    Noise,
    Sampling,
    against_coordinator,
    against_readers,
)

Hash = Annotated[bytes, Meta(min_length=32, max_length=32)]
Name = Annotated[str, Meta(min_length=1, max_length=64)]
Seconds = Annotated[int, Meta(ge=0, lt=1 << 40)]

MAX_ENTRY_BYTES = 478
"""What fits a record of 512 bytes beside its length and the chain's hash."""

COIN_BYTES = 32


class LedgerDamaged(SordinoError):
    """The ledger is not what this device wrote: the disk's fault, or of somebody who can write to it.

    What was spent is unknown, so take part in nothing until its owner has looked.
    """


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A budget against each observer. They bound different things, and neither follows from the other."""

    readers: Budget
    coordinator: Budget


class Release(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a round lets out of a device, as its ticket and its own settings say: enough to work the cost out anew.

    The fields are those of `Mechanism` and `Sampling`.
    """

    unit: Literal["device", "example"]
    dimension: Annotated[int, Meta(ge=1, le=1 << 27)]
    clip: float
    granularity: float
    sigma: float
    honest: Annotated[int, Meta(ge=2, le=1 << 20)]
    modulus_bits: Annotated[int, Meta(ge=2, le=31)]
    metric_scale: float
    loss_bound: float
    device_rate: float
    example_rate: float

    @classmethod
    def of(cls, mechanism: Mechanism, sampling: Sampling) -> Release:
        """The release of `mechanism` with these coins. Raises ParameterError on more than 2^20 honest devices."""
        release = cls(
            unit=mechanism.unit,
            dimension=mechanism.dimension,
            clip=float(mechanism.clip),
            granularity=float(mechanism.granularity),
            sigma=float(mechanism.sigma),
            honest=mechanism.honest,
            modulus_bits=mechanism.modulus_bits,
            metric_scale=float(mechanism.metric_scale),
            loss_bound=float(mechanism.loss_bound),
            device_rate=float(sampling.device),
            example_rate=float(sampling.example),
        )
        release.costs(mechanism.unit)
        return release

    @property
    def mechanism(self) -> Mechanism:
        """Raises ParameterError if there is no such mechanism."""
        return Mechanism(
            unit=self.unit,
            dimension=self.dimension,
            clip=self.clip,
            granularity=self.granularity,
            sigma=self.sigma,
            honest=self.honest,
            modulus_bits=self.modulus_bits,
            metric_scale=self.metric_scale,
            loss_bound=self.loss_bound,
        )

    @property
    def sampling(self) -> Sampling:
        """Raises ParameterError on a rate outside (0, 1]."""
        return Sampling(self.device_rate, self.example_rate)

    def costs(self, protects: Unit) -> tuple[AgainstReaders, AgainstCoordinator]:
        """What one round costs in an account that protects such a unit: for tossing the coin, and for sending.

        Raises ParameterError on a unit "example" in an account of devices.
        """
        return _costs(self, protects)


@lru_cache(maxsize=64)
def _costs(release: Release, protects: Unit) -> tuple[AgainstReaders, AgainstCoordinator]:
    noise, beta = noise_of(release.mechanism)
    sampling = release.sampling
    return (
        against_readers(noise, release.unit, protects, sampling, beta),
        against_coordinator(noise, release.unit, protects, sampling, beta),
    )


def noise_of(mechanism: Mechanism) -> tuple[Noise, float]:
    """(the noise of one group's sum, what a round adds to delta)."""
    noise = Noise(mechanism.noise_multiplier, mechanism.sum_correction(), mechanism.length)
    return noise, mechanism.beta if mechanism.unit == "example" else 0.0


class Draw(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="draw"):
    """The device tossed its coin for a round. Written before anything follows from it; costs against readers."""

    task: Name
    round: Annotated[int, Meta(ge=0, lt=1 << 53)]
    tid: Hash
    operator: Hash
    """The coordinator's public key."""
    release: Release
    takes_part: bool
    time_s: Seconds


class Send(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="send"):
    """The device is about to send. Written before the first byte leaves; costs against the coordinator, for good."""

    tid: Hash
    contribution: Hash
    """Hash of the contribution's header: another contribution for this ticket is never sent."""
    time_s: Seconds


Entry = Draw | Send

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Draw | Send] = msgspec.msgpack.Decoder(Draw | Send)


def encode_entry(entry: Entry) -> bytes:
    """The entry's one encoding."""
    return _encoder.encode(entry)


def decode_entry(data: bytes) -> Entry:
    """The entry that `data` is. Raises LedgerDamaged on anything that `encode_entry` would not write."""
    try:
        entry = _decoder.decode(data)
        if isinstance(entry, Draw):
            entry.release.costs(entry.release.unit)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise LedgerDamaged(f"an entry does not decode: {error}") from error
    if len(data) > MAX_ENTRY_BYTES or _encoder.encode(entry) != data:
        raise LedgerDamaged("an entry is too long or not in its one encoding")
    return entry


def first_link(owner: bytes) -> bytes:
    """Where the chain of the device with this public key starts: 32 bytes."""
    return tagged_hash("ledger", owner)


def next_link(previous: bytes, body: bytes) -> bytes:
    """The chain's hash after the entry with this encoding: 32 bytes."""
    return tagged_hash("ledger entry", previous, body)


class Head(NamedTuple):
    """Where a ledger stands: what committee members keep for it, so that a rollback shows."""

    entries: int
    link: bytes


@dataclass(frozen=True)
class Spent:
    """What is spent of a budget: epsilon at the budget's delta, as the filter counts it. Infinite if delta is used up.

    Of two observers' the larger is not "the" epsilon, and their sum is nothing.
    """

    epsilon: float
    budget: Budget


@dataclass(frozen=True)
class Usage:
    """A device's rounds, of one task or of all, and what they cost against each observer."""

    rounds_entered: int
    """Tickets for which it tossed its coin: what readers are charged for."""
    rounds_taken: int
    """Of them, those in which the coin said that it takes part."""
    rounds_sent: int
    """Of them, those for which a contribution was charged, whatever became of it: the coordinator's charge."""
    last_round: int | None
    """The highest number among a task's; None for all tasks together, whose numbers are not comparable."""
    readers: Spent | None
    """Against readers of the models. None for a task without a budget of its own."""
    coordinator: Spent | None
    """Against the coordinator, committee, broker and network. None for a task without a budget of its own."""


@dataclass(frozen=True)
class Summary:
    """A ledger at a glance.

    protects: whose data the budgets are of.  entries, link: its head, link in hex.  lifetime: over all tasks.  tasks:
    every task that has a budget or an entry.
    """

    protects: Unit
    entries: int
    link: str
    lifetime: Usage
    tasks: Mapping[str, Usage]


def takes_part(rate: float, coin: bytes) -> bool:
    """Whether the device takes part: with probability floor(rate * 2^256) / 2^256, never above `rate`.

    coin: 32 fresh secret bytes, used for nothing else.
    Raises ParameterError on another length or a rate outside (0, 1].
    """
    if len(coin) != COIN_BYTES or not 0 < rate <= 1:
        raise ParameterError(f"a coin is {COIN_BYTES} bytes for a rate in (0, 1], not {len(coin)} for {rate}")
    numerator, denominator = rate.as_integer_ratio()
    return int.from_bytes(coin, "little") * denominator < numerator << (8 * COIN_BYTES)


@dataclass
class Totals:
    """The filters of one pair of budgets. They are set up by the first round that they see."""

    limits: Limits
    readers: Filter[AgainstReaders] | None = None
    coordinator: Filter[AgainstCoordinator] | None = None

    def check(self, readers: AgainstReaders | None, coordinator: AgainstCoordinator | None) -> None:
        """Return if there is room for both, else raise BudgetExceeded."""
        if readers is not None:
            (self.readers or Filter.for_rounds(self.limits.readers, readers)).spend(readers)
        if coordinator is not None:
            (self.coordinator or Filter.for_rounds(self.limits.coordinator, coordinator)).spend(coordinator)

    def record(self, readers: AgainstReaders | None, coordinator: AgainstCoordinator | None) -> None:
        """Add what has happened, budget or no budget: limits may be lowered after it was spent."""
        if readers is not None:
            before = self.readers or Filter.for_rounds(self.limits.readers, readers)
            self.readers = Filter(before.budget, before.favourite, before.spent + readers)
        if coordinator is not None:
            by = self.coordinator or Filter.for_rounds(self.limits.coordinator, coordinator)
            self.coordinator = Filter(by.budget, by.favourite, by.spent + coordinator)

    def spent(self) -> tuple[Spent, Spent]:
        """(against readers, against the coordinator). Zero before the first charge."""
        return (
            Spent(self.readers.epsilon if self.readers else 0.0, self.limits.readers),
            Spent(self.coordinator.epsilon if self.coordinator else 0.0, self.limits.coordinator),
        )


@dataclass
class Account:
    """What a device spent, summed over its entries.

    protects: whose data the budgets are of: all of the "device"'s (rounds of unit "example" are refused), or one
    "example".  lifetime: over all tasks.  tasks: of some tasks by themselves, in addition.
    """

    protects: Unit
    lifetime: Limits
    tasks: Mapping[str, Limits] = field(default_factory=dict)
    draws: dict[bytes, Draw] = field(default_factory=dict, repr=False)
    sends: dict[bytes, bytes] = field(default_factory=dict, repr=False)
    _lifetime: Totals = field(init=False, repr=False)
    _tasks: dict[str, Totals] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._lifetime = Totals(self.lifetime)
        self._tasks = {task: Totals(limits) for task, limits in self.tasks.items()}

    def totals(self, task: str | None = None) -> Totals | None:
        """The lifetime's filters, or a task's; None for a task without limits of its own."""
        return self._lifetime if task is None else self._tasks.get(task)

    def check(self, entry: Entry) -> None:
        """Return if `entry` may be written.

        Raises BudgetExceeded that names the budget; ParameterError if it does not follow from what is written: a second
        draw for a ticket, a send without a draw that came up, another contribution for the same ticket.
        """
        if isinstance(entry, Draw):
            if entry.tid in self.draws:
                raise ParameterError("the coin for this ticket was tossed before: its outcome stands")
            readers, coordinator = entry.release.costs(self.protects)
            self._refuse_over(entry, readers, coordinator)  # no coin is tossed whose outcome could not be acted on
            return
        draw = self.draws.get(entry.tid)
        if draw is None or not draw.takes_part:
            raise ParameterError("no draw says that this device takes part in this ticket's round")
        if entry.tid in self.sends:
            raise ParameterError("a contribution for this ticket is charged already: only its bytes may be sent")
        self._refuse_over(draw, None, draw.release.costs(self.protects)[1])

    def record(self, entry: Entry) -> None:
        """Add an entry that is written. Raises LedgerDamaged if it cannot follow those before it."""
        if isinstance(entry, Draw):
            if entry.tid in self.draws:
                raise LedgerDamaged("two draws for one ticket")
            try:
                readers, _ = entry.release.costs(self.protects)
            except ParameterError as error:
                raise ParameterError(f"the budget protects devices, but task {entry.task}: {error}") from error
            for _, totals in self._concerned(entry):
                totals.record(readers, None)
            self.draws[entry.tid] = entry
            return
        draw = self.draws.get(entry.tid)
        if draw is None or not draw.takes_part or entry.tid in self.sends:
            raise LedgerDamaged("a send that no draw allows")
        _, coordinator = draw.release.costs(self.protects)
        for _, totals in self._concerned(draw):
            totals.record(None, coordinator)
        self.sends[entry.tid] = entry.contribution

    def summary(self, head: Head) -> Summary:
        """What is spent and how often the device took part; `head` is the ledger's."""
        names = {*self.tasks, *(draw.task for draw in self.draws.values())}
        return Summary(
            protects=self.protects,
            entries=head.entries,
            link=head.link.hex(),
            lifetime=self._usage(list(self.draws.values()), self._lifetime, None),
            tasks={name: self._task_usage(name) for name in sorted(names)},
        )

    def _task_usage(self, name: str) -> Usage:
        draws = [draw for draw in self.draws.values() if draw.task == name]
        return self._usage(draws, self._tasks.get(name), max((draw.round for draw in draws), default=None))

    def _usage(self, draws: list[Draw], totals: Totals | None, last_round: int | None) -> Usage:
        readers, coordinator = totals.spent() if totals is not None else (None, None)
        return Usage(
            rounds_entered=len(draws),
            rounds_taken=sum(draw.takes_part for draw in draws),
            rounds_sent=sum(draw.tid in self.sends for draw in draws),
            last_round=last_round,
            readers=readers,
            coordinator=coordinator,
        )

    def _refuse_over(self, draw: Draw, readers: AgainstReaders | None, coordinator: AgainstCoordinator) -> None:
        for name, totals in self._concerned(draw):
            try:
                totals.check(readers, coordinator)
            except BudgetExceeded as error:
                raise BudgetExceeded(f"{name}, {error}") from error

    def _concerned(self, draw: Draw) -> list[tuple[str, Totals]]:
        result = [("the lifetime budget", self._lifetime)]
        if draw.task in self._tasks:
            result.append((f"the budget of task {draw.task}", self._tasks[draw.task]))
        return result
