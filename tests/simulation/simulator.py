"""A round on a bad network, on the real code: bytes between real parties, and faults that are values.

One queue holds every message that is under way. Messages are numbered in the order in which they leave it; a fault
names the number that it strikes, so that a run follows from its arguments alone and a failing example can be run
again. Parties store their state before they answer. States are immutable: a restart or a rollback is an old one.

Nothing here knows the answer: `Outcome` compares the sums that the coordinator opened with the inputs behind exactly
those headers that were sealed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Literal

import msgspec
import numpy as np
from kyber_py.ml_kem import ML_KEM_768
from numpy.typing import NDArray
from protocol.stage import CLOSES_S, device_at, digest_of, forge, header_of, seed

from edge_sdk.crypto.sealing import Encapsulate
from edge_sdk.crypto.shamir import PRIME
from edge_sdk.crypto.stream import KeyStream
from edge_sdk.errors import PeerError, RoundAborted
from edge_sdk.protocol import aggregator, contributor, member, reference
from edge_sdk.protocol.aggregator import Aborted, Certified, Collecting, Done, Sealed
from edge_sdk.protocol.contributor import Contribution, Idle, Sent, Terms, Training
from edge_sdk.protocol.member import MemberState
from edge_sdk.protocol.messages import (
    Abort,
    Certificate,
    CommitteeKind,
    Complaint,
    Delivery,
    Release,
    Seal,
    SealedShare,
    SealSignature,
    Signed,
    Ticket,
    decode,
    sign,
    unwrap,
    wrap,
)
from edge_sdk.protocol.reference import Fleet
from edge_sdk.protocol.rounds import Round, seal_hash

Party = tuple[Literal["device", "member", "coordinator"], int]
COORDINATOR: Party = ("coordinator", 0)


# --- Faults -----


@dataclass(frozen=True)
class Drop:
    """The message is lost."""

    message: int


@dataclass(frozen=True)
class Duplicate:
    """The message arrives, and once more after `later` others."""

    message: int
    later: int = 0


@dataclass(frozen=True)
class Delay:
    """The message is overtaken by the `by` messages behind it."""

    message: int
    by: int = 3


@dataclass(frozen=True)
class Corrupt:
    """One byte of the message is changed: the one at `byte` modulo its length, by xor with `flip`."""

    message: int
    byte: int = 7
    flip: int = 1


@dataclass(frozen=True)
class Restart:
    """The recipient crashes over the message: before its new state is stored, or after that but before the reply."""

    message: int
    stored: bool = True


@dataclass(frozen=True)
class Rollback:
    """Before the message is delivered, its recipient's disk goes back by so many states."""

    message: int
    states: int = 1


@dataclass(frozen=True)
class Absent:
    """The party hears nothing while the coordinator is in this phase."""

    party: Party
    phase: Literal["OPEN", "COLLECT", "SEALED", "CERTIFIED", "RELEASED"]


Fault = Drop | Duplicate | Delay | Corrupt | Restart | Rollback | Absent

DEVICE_LIES = (
    "inconsistent shares",
    "frames a member",
    "unopenable share",
    "random vector",
    "count 2",
    "another's name",
)
MEMBER_LIES = ("wrong sum", "one wrong value", "complains about all", "signs anything", "silent")


@dataclass(frozen=True)
class Lie:
    """The party's function is replaced by that of a liar: one of DEVICE_LIES or MEMBER_LIES."""

    party: Party
    kind: str


# --- Parties -----


@dataclass
class Device:
    """A data-holding device. It sends the same bytes again whenever it wakes, until a receipt comes."""

    simulation: Simulation
    index: int
    history: list[contributor.State]
    lie: str | None = None
    boots: int = 0

    def receive(self, data: bytes) -> tuple[contributor.State, list[tuple[Party, bytes]]]:
        simulation, state = self.simulation, self.history[-1]
        round_ = simulation.round
        after = contributor.step(state, data, round_.epoch, Terms(round_.ticket.bundle), simulation.now_s)
        if isinstance(after, Training):
            self.boots += 1  # entropy is fresh on every boot: a rolled-back device cannot know what it drew before
            entropy = seed("entropy", self.index, self.boots, round_.tid)
            if self.lie is None:
                integers = simulation.integers(self.index, self.boots)
                enrolled = device_at(simulation.fleet, self.index)
                ledger = reference.stand_in_ledger(enrolled.identity.public_key, round_.ticket.round)
                after = after.contribute(integers, enrolled, ledger, entropy, coins_of(entropy), simulation.now_s)
                simulation.truth[digest_of(after.contribution)] = integers
            else:
                contribution, integers = lying_contribution(simulation, self.index, self.lie, entropy)
                after = Sent(round_, self.index, contribution)
                simulation.truth[digest_of(contribution)] = integers
        return after, self.sends(after)

    def sends(self, state: contributor.State) -> list[tuple[Party, bytes]]:
        return [(COORDINATOR, pack(state.contribution))] if isinstance(state, Sent) else []


@dataclass
class Member:
    simulation: Simulation
    number: int
    history: list[MemberState]
    lie: str | None = None

    def receive(self, data: bytes) -> tuple[MemberState, list[tuple[Party, bytes]]]:
        simulation = self.simulation
        identity = simulation.fleet.committee[self.number - 1]
        before, epoch = self.history[-1], simulation.round.epoch
        try:
            state, reply = member.step(before, data, epoch, identity, simulation.now_s)
        except PeerError:
            kind, message = unwrap(data)
            if self.lie != "signs anything" or kind is not Seal:
                raise
            statement = SealSignature(simulation.round.tid, seal_hash(message.body), self.number)
            state, reply = before, wrap(SealSignature, sign(identity, statement))
        if reply is not None and self.lie is not None:
            reply = lying_reply(simulation, self.number, self.lie, reply)
        if reply is not None and unwrap(reply)[0] is Release:
            seal = decode(Release, unwrap(reply)[1].body).seal
            simulation.released.setdefault(self.number, set()).add(seal)
        return state, [] if reply is None else [(COORDINATOR, reply)]


@dataclass(frozen=True)
class Disk:
    """What the coordinator has stored: the state, the masked vectors and the members' mail, committed together."""

    state: aggregator.State
    masked: Mapping[int, bytes] = field(default_factory=dict)
    mail: Mapping[int, tuple[tuple[Signed, SealedShare | None], ...]] = field(default_factory=dict)


@dataclass
class Coordinator:
    """It announces at every tick what each party still needs to hear, and moves on when its patience ends."""

    simulation: Simulation
    history: list[Disk]
    patience: int
    waited: int = 0

    @property
    def disk(self) -> Disk:
        return self.history[-1]

    def receive(self, data: bytes) -> tuple[Disk, list[tuple[Party, bytes]]]:
        disk, simulation = self.disk, self.simulation
        contribution = unpack(data)
        if contribution is None:
            after = aggregator.step(disk.state, data)
            return (disk if after is disk.state else replace(disk, state=after)), []
        accepted = aggregator.accept(disk.state, contribution, simulation.fleet.coordinator, simulation.now_s)
        sender = header_of(contribution).sender
        if accepted.shares is not None:
            items = enumerate(accepted.shares, start=1)
            mail = {n: (*disk.mail.get(n, ()), (contribution.header, share)) for n, share in items}
            disk = Disk(accepted.state, {**disk.masked, sender: contribution.masked}, mail)
        return disk, [(("device", sender), accepted.receipt)]

    def announce(self) -> list[tuple[Party, bytes]]:
        """What this state has to say, to whom it has not yet said enough."""
        disk, simulation, round_ = self.disk, self.simulation, self.simulation.round
        state = disk.state
        ticket = wrap(Ticket, round_.signed)
        out: list[tuple[Party, bytes]] = []
        if isinstance(state, Collecting):
            out += [(("device", i), ticket) for i in simulation.devices if i not in state.entries]
        for n in simulation.members:
            mail = wrap(Delivery, Delivery(round_.tid, list(disk.mail.get(n, ()))))
            if isinstance(state, Collecting):
                out += [(("member", n), ticket), (("member", n), mail)]
            elif isinstance(state, Sealed) and n not in state.signatures:
                out += [(("member", n), data) for data in (ticket, mail, wrap(Seal, state.seal))]
            elif isinstance(state, Certified) and n not in state.answers:
                certificate = wrap(Certificate, state.certificate)
                out += [(("member", n), data) for data in (ticket, mail, wrap(Seal, state.seal), certificate)]
            elif isinstance(state, Aborted):
                out.append((("member", n), wrap(Abort, state.notice)))
        return out

    def advance(self) -> Disk:
        """The transition that the coordinator makes on its own once it has waited long enough."""
        state, simulation = self.disk.state, self.simulation
        identity = simulation.fleet.coordinator
        after: aggregator.State = state
        if isinstance(state, Collecting):
            simulation.now_s = max(simulation.now_s, CLOSES_S)
            after = aggregator.seal(state, identity, simulation.now_s)
            if isinstance(after, Sealed):
                simulation.seals.add(after.digest)
        elif isinstance(state, Sealed):
            after = aggregator.abort(state, identity, "too few members signed")
        elif isinstance(state, Certified):
            sums = {
                group: aggregator.sum_masked(state.round, (self.disk.masked[sender] for sender in senders))
                for group, senders in enumerate(state.groups)
            }
            simulation.sealed_headers = {sender: entry.digest for sender, entry in state.entries.items()}
            simulation.sealed_groups = state.groups
            after = aggregator.open_round(state, sums, identity, final=True)
        return replace(self.disk, state=after)


@cache
def encapsulated(mlkem_public: bytes, coins: bytes) -> tuple[bytes, bytes]:
    shared, ciphertext = ML_KEM_768._encaps_internal(mlkem_public, coins)
    return shared, ciphertext


def coins_of(entropy: bytes) -> Encapsulate:
    """ML-KEM with coins that follow from the device's entropy, so that a run is the same to the last byte."""
    return lambda mlkem_public: encapsulated(mlkem_public, seed("coins", entropy, mlkem_public))


def pack(contribution: Contribution) -> bytes:
    """An upload as one string of bytes; it is not a message of the protocol."""
    signed, masked, shares = contribution
    return b"upload" + msgspec.msgpack.encode([signed.body, signed.signature, masked, shares])


def unpack(data: bytes) -> Contribution | None:
    if not data.startswith(b"upload"):
        return None
    try:
        body, signature, masked, shares = msgspec.msgpack.decode(data[6:], type=tuple[bytes, bytes, bytes, bytes])
    except msgspec.MsgspecError as error:
        raise PeerError(f"upload: {error}") from error
    return Contribution(Signed(body, signature), masked, shares)


# --- Liars -----


def random_values(shape: tuple[int, ...], *label: object) -> NDArray[np.int64]:
    words = KeyStream(seed("liar", *label)).words64(int(np.prod(shape)))
    return (words % np.uint64(PRIME)).astype(np.int64).reshape(shape)


def lying_contribution(
    simulation: Simulation, index: int, kind: str, entropy: bytes
) -> tuple[Contribution, NDArray[np.int64] | None]:
    """(contribution, the input that it stands for, or None if a group that holds it must not open)."""
    round_ = simulation.round
    integers = simulation.integers(index, 1)
    message = round_.layout.encode(integers)

    def garbled(shares: NDArray[np.int64]) -> NDArray[np.int64]:
        return random_values(shares.shape, index)

    def framing(shares: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.concatenate([random_values(shares[:1].shape, index), shares[1:]])

    def unopenable(blobs: list[bytes]) -> list[bytes]:
        return [blobs[0][::-1], *blobs[1:]]

    changes: dict[str, object] = {}
    truth: NDArray[np.int64] | None = integers
    if kind == "inconsistent shares":
        changes, truth = {"values": garbled}, None
    elif kind == "frames a member":
        changes = {"values": framing}
    elif kind == "unopenable share":
        changes = {"sealed": unopenable}
    elif kind == "random vector":
        noise = KeyStream(seed("vector", index))
        changes = {"masked": lambda vector: noise.read(vector.nbytes).view("<u4").reshape(vector.shape)}
        truth = None
    elif kind == "count 2":
        message.reshape(-1)[round_.ticket.dimension] <<= np.uint32(1)
        truth = None
    elif kind == "pad not zero":
        message[-1, -1] = np.uint32(1 << round_.layout.delta_bits)
        truth = None
    elif kind == "another's name":
        changes = {"sender": 0}
        truth = None
    else:
        raise ValueError(kind)
    return forge(
        simulation.fleet, round_, index, message=message, entropy=entropy, coins=coins_of(entropy), **changes
    ), truth


def lying_reply(simulation: Simulation, number: int, kind: str, reply: bytes) -> bytes | None:
    identity = simulation.fleet.committee[number - 1]
    what, message = unwrap(reply)
    if kind == "silent":
        return None
    if kind == "complains about all":
        state = simulation.coordinator.disk.state
        senders = sorted(state.entries) if isinstance(state, Collecting) else []
        return wrap(Complaint, sign(identity, Complaint(simulation.round.tid, number, senders)))
    if what is Release and kind in ("wrong sum", "one wrong value"):
        release = decode(Release, message.body)
        sums = []
        for group, honest in enumerate(release.sums):
            if honest is None:
                sums.append(None)
                continue
            values = np.frombuffer(honest, dtype="<u2").astype(np.int64)
            if kind == "wrong sum":
                values = random_values(values.shape, number, group)
            else:
                values[number] = (values[number] + 1) % PRIME
            sums.append(values.astype("<u2").tobytes())
        return wrap(Release, sign(identity, Release(release.tid, release.seal, number, sums)))
    return reply


# --- The run -----


@dataclass(frozen=True)
class Outcome:
    """What came out, and whether it is right."""

    result: Done | RoundAborted
    contributors: Mapping[int, tuple[int, ...]]
    """group -> the sealed senders."""
    expected: Mapping[int, NDArray[np.uint32] | None]
    """group -> the sum modulo 2^b of the inputs behind the sealed headers; None if one of them stands for none."""
    released: Mapping[int, frozenset[bytes]]
    """member -> the sets that it released sums for."""
    messages: int
    rolled_back: frozenset[Party]
    seals: frozenset[bytes]
    """Every set that the coordinator sealed: several only if it was rolled back."""
    receipted: frozenset[int]
    """The devices that hold a receipt, and forgot."""

    @property
    def exact(self) -> bool:
        """Every group that was opened holds the true sum."""
        if isinstance(self.result, RoundAborted):
            return True
        return all(
            (truth := self.expected[group]) is not None and np.array_equal(opened.values, truth)
            for group, opened in self.result.sums.items()
        )

    def sets_released(self, *, besides: Iterable[int] = ()) -> int:
        """How many sets members gave sums for, other than the `besides` and those that were rolled back."""
        corrupt = {*besides, *(n for role, n in self.rolled_back if role == "member")}
        return len(frozenset[bytes]().union(*(seals for n, seals in self.released.items() if n not in corrupt)))

    @property
    def opened(self) -> frozenset[int]:
        return frozenset() if isinstance(self.result, RoundAborted) else frozenset(self.result.sums)


class Simulation:
    """One run. Use `simulate`."""

    def __init__(
        self, fleet: Fleet, round_: Round, devices: Iterable[int], lies: Mapping[Party, str], patience: int
    ) -> None:
        self.fleet, self.round = fleet, round_
        self.devices, self.members = list(devices), list(range(1, len(fleet.committee) + 1))
        self.now_s = 1
        self.truth: dict[bytes, NDArray[np.int64] | None] = {}
        self.released: dict[int, set[bytes]] = {}
        self.sealed_headers: dict[int, bytes] = {}
        self.sealed_groups: tuple[tuple[int, ...], ...] = ()
        self.coordinator = Coordinator(self, [Disk(Collecting(round_))], patience)
        self.parties: dict[Party, Device | Member | Coordinator] = {COORDINATOR: self.coordinator}
        for index in self.devices:
            self.parties["device", index] = Device(self, index, [Idle(round_.ticket.task)], lies.get(("device", index)))
        for n in self.members:
            self.parties["member", n] = Member(self, n, [fleet.members[n - 1]], lies.get(("member", n)))
        self.queue: list[tuple[Party, bytes]] = []
        self.messages = 0
        self.rolled_back: set[Party] = set()
        self.seals: set[bytes] = set()

    def integers(self, index: int, boot: int) -> NDArray[np.int64]:
        """Any 32-bit pattern, read as signed: what does not fit into b bits wraps."""
        words = KeyStream(seed("integers", index, boot)).read(4 * self.round.ticket.dimension).view("<i4")
        return words.astype(np.int64)

    def run(self, faults: Iterable[Fault]) -> Outcome:
        faults = list(faults)
        while not isinstance(self.coordinator.disk.state, Done | Aborted):
            self.tick()
            self.drain(faults)
        self.queue += self.coordinator.announce()
        self.drain(faults)
        return self.outcome()

    def tick(self) -> None:
        coordinator = self.coordinator
        if coordinator.waited >= coordinator.patience or self.nothing_left_to_wait_for():
            coordinator.waited = 0
            coordinator.history.append(coordinator.advance())
        coordinator.waited += 1
        self.queue += coordinator.announce()
        for party in self.parties.values():
            if isinstance(party, Device):
                self.queue += party.sends(party.history[-1])

    def nothing_left_to_wait_for(self) -> bool:
        state = self.coordinator.disk.state
        return isinstance(state, Certified) and len(state.answers) == len(self.members)

    def drain(self, faults: list[Fault]) -> None:
        while self.queue:
            recipient, data = self.queue.pop(0)
            number, self.messages = self.messages, self.messages + 1
            strikes = [fault for fault in faults if not isinstance(fault, Absent) and fault.message == number]
            phase = aggregator.phase(self.coordinator.disk.state)
            lost = any(isinstance(f, Absent) and f.party == recipient and f.phase == phase for f in faults)
            answer, stored = True, True
            for fault in strikes:
                match fault:
                    case Drop():
                        lost = True
                    case Duplicate(later=later):
                        self.queue.insert(min(later, len(self.queue)), (recipient, data))
                    case Delay(by=by) if self.queue:
                        self.queue.insert(min(by, len(self.queue)), (recipient, data))
                        lost = True
                    case Corrupt(byte=byte, flip=flip):
                        at = byte % len(data)
                        data = data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :]
                    case Restart():
                        answer, stored = False, fault.stored
                    case Rollback(states=states):
                        self.rolled_back.add(recipient)
                        history = self.parties[recipient].history
                        history.append(history[max(0, len(history) - 1 - states)])  # type: ignore[arg-type]
            if not lost:
                self.deliver(recipient, data, answer=answer, stored=stored)

    def deliver(self, recipient: Party, data: bytes, *, answer: bool, stored: bool) -> None:
        party = self.parties.get(recipient)
        if party is None:
            return
        try:
            state, replies = party.receive(data)
        except (PeerError, RoundAborted):
            return  # the message is dropped and the old state stands; any other error is a failure of the test
        if stored and state is not party.history[-1]:
            if isinstance(state, Disk) and type(state.state) is not type(self.coordinator.disk.state):
                self.coordinator.waited = 0  # a new phase: patience begins again
            party.history.append(state)  # type: ignore[arg-type]
        if answer and stored:
            self.queue += replies

    def outcome(self) -> Outcome:
        state = self.coordinator.disk.state
        released = {n: frozenset(seals) for n, seals in self.released.items()}
        receipted = frozenset(
            party.index
            for party in self.parties.values()
            if isinstance(party, Device) and isinstance(idle := party.history[-1], Idle) and idle.tid == self.round.tid
        )
        common = released, self.messages, frozenset(self.rolled_back), frozenset(self.seals), receipted
        if not isinstance(state, Done):
            reason = state.reason if isinstance(state, Aborted) else "not finished"
            return Outcome(RoundAborted(reason), {}, {}, *common)
        contributors = dict(enumerate(self.sealed_groups))
        expected: dict[int, NDArray[np.uint32] | None] = {}
        for group, senders in contributors.items():
            inputs = [self.truth[self.sealed_headers[sender]] for sender in senders]
            known = [integers for integers in inputs if integers is not None]
            total = np.zeros(self.round.ticket.dimension, dtype=np.int64) + sum(known)
            modulus = 1 << self.round.layout.modulus_bits
            expected[group] = (total % modulus).astype(np.uint32) if len(known) == len(inputs) else None
        return Outcome(state, contributors, expected, *common)


@cache
def prepared(
    devices: int, committee: CommitteeKind, helpers: int, drawn: int | None, groups: int, dimension: int
) -> tuple[Fleet, Round]:
    """A fleet and its first ticket. Simulations share them: nothing in them changes."""
    name = seed("simulated fleet", devices, committee, helpers, drawn)
    fleet = reference.make_fleet(name, devices, committee, helpers=helpers, drawn=drawn, groups=(1, groups))
    return fleet, reference.open_ticket(fleet, seed("simulated ticket"), dimension, n_max=devices, groups=groups)


def simulate(
    devices: int = 6,
    committee: CommitteeKind = "everyone",
    *,
    helpers: int = 0,
    drawn: int | None = None,
    groups: int = 1,
    dimension: int = 3,
    faults: Iterable[Fault] = (),
    lies: Iterable[Lie] = (),
    contributors: Iterable[int] | None = None,
    patience: int = 3,
) -> Outcome:
    """One round on this network.

    contributors: the devices, by roster index, that are there at all; by default every one.
    patience: ticks that the coordinator waits in every phase; at each it says again what was not answered.
    """
    fleet, round_ = prepared(devices, committee, helpers, drawn, groups, dimension)
    chosen = range(devices) if contributors is None else contributors
    simulation = Simulation(fleet, round_, chosen, {lie.party: lie.kind for lie in lies}, patience)
    return simulation.run(faults)
