"""A round on stage: the real parties, called one at a time, so that a test can put a liar in the place of one.

Devices are named by their roster index, members by their number. Parties' states are immutable: `Stage.fork` gives an
independent copy for nothing, and a party that is rolled back is an old state put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_sdk.crypto import masks
from edge_sdk.crypto.hashing import content_hash, derive_key
from edge_sdk.crypto.identity import Identity
from edge_sdk.crypto.merkle import merkle_root
from edge_sdk.crypto.sealing import PREKEY_SEED_BYTES, Encapsulate, Sealer, encapsulate
from edge_sdk.crypto.stream import KeyStream
from edge_sdk.errors import PeerError
from edge_sdk.protocol import aggregator, member, reference
from edge_sdk.protocol.aggregator import Certified, Collecting, Done, Sealed
from edge_sdk.protocol.contributor import Contribution, Enrolled, Idle, Sent, Terms, contribution_seed
from edge_sdk.protocol.member import MemberState
from edge_sdk.protocol.messages import (
    Anchor,
    Certificate,
    Delivery,
    Header,
    Message,
    Release,
    Seal,
    SealedShare,
    SealSignature,
    Signed,
    Ticket,
    decode,
    encode,
    label_of,
    message_hash,
    sign,
    unwrap,
    wrap,
)
from edge_sdk.protocol.reference import Fleet
from edge_sdk.protocol.rounds import Round, prekey_public, seal_hash, share_context

CLOSES_S, EXPIRES_S = 1_000, 2_000
LATE_S = 1_000_000  # prekeys and epochs outlive every ticket here
"""The times in every ticket of `reference.open_ticket`."""

ENTROPY = bytes(range(32))


def seed(*parts: object) -> bytes:
    """32 bytes that follow from the parts: tests are the same in every run."""
    return derive_key(ENTROPY, "test", *(repr(part).encode() for part in parts))


def integers_of(index: int, dimension: int) -> NDArray[np.int64]:
    """Device `index`'s input in tests that do not choose one: signed 12-bit integers."""
    return KeyStream(seed("input", index)).words16(dimension).astype(np.int64) % 4096 - 2048


def device_at(fleet: Fleet, index: int) -> Enrolled:
    """The enrolled device of a roster index."""
    by_key = {identity.public_key: identity for identity in fleet.devices}
    return fleet.enrolled(by_key[fleet.roster.keys[index]])


def send(
    fleet: Fleet,
    round_: Round,
    index: int,
    integers: NDArray[np.generic] | None = None,
    entropy: bytes | None = None,
    ledger: Anchor | None = None,
) -> Sent:
    """An honest device's turn."""
    ticket = round_.ticket
    training = Idle(ticket.task).on_ticket(round_, Terms(ticket.bundle), now_s=0)
    if integers is None:
        integers = integers_of(index, ticket.dimension)
    own = entropy or seed("device", index, round_.tid)
    device = device_at(fleet, index)
    ledger = ledger or reference.stand_in_ledger(device.identity.public_key, ticket.round)
    return training.contribute(integers, device, ledger, own, encapsulate, now_s=1)


def forge(
    fleet: Fleet,
    round_: Round,
    index: int,
    *,
    message: NDArray[np.uint32] | None = None,
    secret: NDArray[np.int64] | None = None,
    masked: Callable[[NDArray[np.uint32]], NDArray[np.uint32]] = lambda vector: vector,
    values: Callable[[NDArray[np.int64]], NDArray[np.int64]] = lambda shares: shares,
    sealed: Callable[[list[bytes]], list[bytes]] = lambda blobs: blobs,
    identity: Identity | None = None,
    entropy: bytes | None = None,
    coins: Encapsulate = encapsulate,
    **header_fields: object,
) -> Contribution:
    """A contribution made step by step as `Training.contribute` makes it, each step open to a lie.

    message: scaled blocks.  secret: instead of the short one.  masked, values, sealed: change the masked vector, the
    shares (members, polynomials), the sealed shares.  identity: who signs.  coins: of the encapsulation.
    header_fields: put into the header.
    """
    device = device_at(fleet, index)
    tid, number_of_members = round_.tid, round_.thresholds.members
    own = entropy or seed("device", index, tid)
    blocks = round_.layout.encode(integers_of(index, round_.ticket.dimension)) if message is None else message.copy()
    own = contribution_seed(own, tid, device.identity.public_key, blocks)
    short = masks.expand_secret(own, tid)
    masks.add_mask(blocks, short if secret is None else secret, own, tid)
    vector = masked(blocks).astype("<u4").tobytes()
    shared = round_.thresholds.sharing.share(
        short if secret is None else secret, KeyStream(derive_key(own, "sharing", tid))
    )
    rows = values(shared).astype("<u2")
    sealer = Sealer(derive_key(own, "sealing key", tid), coins)
    blobs = sealed(
        [
            sealer.seal(
                prekey_public(round_.prekeys[n - 1]),
                rows[n - 1].tobytes(),
                *share_context(tid, index, device.identity.public_key, n, content_hash(vector)),
            )
            for n in range(1, number_of_members + 1)
        ]
    )
    header = Header(
        tid=tid,
        sender=index,
        key=device.identity.public_key,
        enrolment=list(device.proof),
        group=round_.epoch.group_of(index, round_.groups),
        sealing_key=sealer.public_key,
        masked=content_hash(vector),
        shares=merkle_root(blobs),
        ledger=reference.stand_in_ledger(device.identity.public_key, round_.ticket.round),
    )
    claimed = Header(**{f: header_fields.get(f, getattr(header, f)) for f in Header.__struct_fields__})
    return Contribution(sign(identity or device.identity, claimed), vector, b"".join(blobs))


def header_of(contribution: Contribution) -> Header:
    return decode(Header, contribution.header.body)


def digest_of(contribution: Contribution) -> bytes:
    return message_hash(Header, contribution.header.body)


Item = tuple[Signed, SealedShare | None]


@dataclass
class Stage:
    """One round with every party's state. What members give away is written down in `released`."""

    fleet: Fleet
    round: Round
    states: dict[int, MemberState]
    collecting: Collecting
    contributions: dict[int, Contribution] = field(default_factory=dict)
    mail: dict[int, list[Item]] = field(default_factory=dict)
    released: list[tuple[int, bytes]] = field(default_factory=list)
    """(member, seal) of every release that left a member, in order."""

    def fork(self) -> Stage:
        return replace(
            self,
            states=dict(self.states),
            contributions=dict(self.contributions),
            mail={n: list(items) for n, items in self.mail.items()},
            released=list(self.released),
        )

    @property
    def members(self) -> list[int]:
        return list(self.states)

    def take(self, contribution: Contribution) -> aggregator.Accepted:
        """The honest coordinator takes a contribution and files its shares."""
        accepted = aggregator.accept(self.collecting, contribution, self.fleet.coordinator, now_s=2)
        self.collecting = accepted.state
        self.contributions[header_of(contribution).sender] = contribution
        for n, share in enumerate(accepted.shares or (), start=1):
            self.mail[n].append((contribution.header, share))
        return accepted

    def tell(self, n: int, data: bytes, now_s: float = 4) -> bytes | None:
        """Member n's real step on these bytes; its new state is kept."""
        epoch = self.round.epoch
        self.states[n], reply = member.step(self.states[n], data, epoch, self.fleet.committee[n - 1], now_s)
        if reply is not None:
            kind, message = unwrap(reply)
            if kind is Release:
                self.released.append((n, decode(Release, message.body).seal))
        return reply

    def refuses(self, n: int, data: bytes, match: str, now_s: float = 4) -> None:
        """Assert that member n raises a PeerError that says `match`, keeps its state and gives nothing away."""
        before, contents = self.states[n], contents_of(self.states[n])
        with pytest.raises(PeerError, match=match):
            self.tell(n, data, now_s)
        assert self.states[n] is before
        assert contents_of(before) == contents

    def inspect(self, *numbers: int) -> list[bytes]:
        """Members learn the ticket and are delivered their mail; their complaints."""
        complaints = []
        for n in numbers or self.members:
            self.tell(n, wrap(Ticket, self.round.signed))
            reply = self.tell(n, wrap(Delivery, Delivery(self.round.tid, self.mail[n])))
            if reply is not None:
                complaints.append(reply)
        return complaints

    def complain(self, complaints: Iterable[bytes]) -> None:
        for complaint in complaints:
            state = aggregator.step(self.collecting, complaint)
            assert isinstance(state, Collecting)
            self.collecting = state

    def lie(self, message: Message) -> bytes:
        """The coordinator signs whatever it likes."""
        return wrap(type(message), sign(self.fleet.coordinator, message))

    def seal_of(self, senders: Iterable[int]) -> Signed:
        """A seal over these senders in the beacon's groups, whether the protocol would allow it or not."""
        groups: list[list[tuple[int, bytes]]] = [[] for _ in range(self.round.groups)]
        for sender in sorted(senders):
            group = self.round.epoch.group_of(sender, self.round.groups)
            groups[group].append((sender, digest_of(self.contributions[sender])))
        return sign(self.fleet.coordinator, Seal(self.round.tid, groups))

    def sealed(self) -> Sealed:
        """The honest coordinator seals at the deadline."""
        state = aggregator.seal(self.collecting, self.fleet.coordinator, now_s=CLOSES_S)
        assert isinstance(state, Sealed), state
        return state

    def certify(self, sealed: Sealed, *numbers: int) -> Certified:
        """These members (all of them by default) sign the set."""
        state: aggregator.State = sealed
        for n in numbers or self.members:
            reply = self.tell(n, wrap(Seal, sealed.seal))
            assert reply is not None
            state = aggregator.step(state, reply)
        assert isinstance(state, Certified)
        return state

    def release(self, certified: Certified, *numbers: int) -> Certified:
        """These members (all of them by default) are shown the certificate and answer."""
        state: aggregator.State = certified
        for n in numbers or self.members:
            reply = self.tell(n, wrap(Certificate, certified.certificate))
            assert reply is not None
            state = aggregator.step(state, reply)
        assert isinstance(state, Certified)
        return state

    def masked_sums(self, groups: Sequence[Sequence[int]]) -> dict[int, NDArray[np.uint32]]:
        return {
            group: aggregator.sum_masked(self.round, (self.contributions[sender].masked for sender in senders))
            for group, senders in enumerate(groups)
        }

    def open(self, certified: Certified) -> Done:
        state = aggregator.open_round(certified, self.masked_sums(certified.groups), self.fleet.coordinator, final=True)
        assert isinstance(state, Done)
        return state

    def finish(self) -> Done:
        """Seal, certify, release and open with everyone awake and honest."""
        return self.open(self.release(self.certify(self.sealed())))

    def true_sum(self, senders: Iterable[int]) -> NDArray[np.uint32]:
        """The sum of the senders' default inputs modulo 2^b."""
        total = sum(integers_of(sender, self.round.ticket.dimension) for sender in senders)
        return (total % (1 << self.round.layout.modulus_bits)).astype(np.uint32)

    def certificate_from(self, seal: Signed, signatures: Mapping[int, bytes]) -> bytes:
        """A certificate on the wire, made of these SealSignature signatures, whether they suffice or not."""
        certificate = Certificate(self.round.tid, seal_hash(seal.body), sorted(signatures.items()))
        return wrap(Certificate, certificate)

    def signature_of(self, n: int, seal: Signed) -> bytes:
        """What a corrupt member signs: any set it is asked to."""
        body = encode(SealSignature(self.round.tid, seal_hash(seal.body), n))
        return self.fleet.committee[n - 1].sign(label_of(SealSignature), body)


def contents_of(state: MemberState) -> object:
    """Everything in a member's state by value, so that a change in place would show."""

    def value(thing: object) -> object:
        if isinstance(thing, Round):
            return thing.tid
        return dict(thing) if isinstance(thing, dict) else thing

    sessions = {
        tid: (type(session), {name: value(thing) for name, thing in vars(session).items()})
        for tid, session in state.sessions.items()
    }
    anchors = {key: dict(heads) for key, heads in state.anchors.newest.items()}, state.anchors.forked
    return state.next_serial, dict(state.prekeys), dict(state.bound), dict(state.newest), sessions, anchors


def stage_of(fleet: Fleet, round_: Round) -> Stage:
    """A stage on which nothing has happened yet."""
    states = dict(enumerate(fleet.members, start=1))
    return Stage(fleet, round_, states, Collecting(round_), mail={n: [] for n in states})


@cache
def _staged(
    devices: int, committee: str, helpers: int, groups: int, dimension: int, corrupt: int, senders: tuple[int, ...]
) -> Stage:
    entropy = seed("fleet", devices, committee, helpers)
    fleet = reference.make_fleet(entropy, devices, committee, helpers=helpers, corrupt=corrupt, groups=(1, groups))
    round_ = reference.open_ticket(fleet, seed("ticket"), dimension, n_max=devices, groups=groups)
    stage = stage_of(fleet, round_)
    for index in senders:
        stage.take(send(fleet, round_, index).contribution)
    return stage


def staged(
    devices: int = 6,
    committee: str = "everyone",
    *,
    helpers: int = 0,
    groups: int = 1,
    dimension: int = 5,
    corrupt: int = 1,
    senders: Iterable[int] | None = None,
) -> Stage:
    """A stage with the senders' (all devices' by default) honest contributions taken; the members know nothing yet."""
    chosen = tuple(range(devices) if senders is None else senders)
    return _staged(devices, committee, helpers, groups, dimension, corrupt, chosen).fork()


def ticket_like(stage: Stage, **changes: object) -> Signed:
    """The stage's ticket with some fields changed, signed by the coordinator. Nothing is checked."""
    ticket = stage.round.ticket
    fields = {name: getattr(ticket, name) for name in Ticket.__struct_fields__}
    return sign(stage.fleet.coordinator, Ticket(**(fields | changes)))


def following(stage: Stage, *numbers: int, **changes: object) -> Stage:
    """The round after the stage's: chained to it, with a fresh prekey of each member (of `numbers`, else the old)."""
    states, offers = dict(stage.states), list(stage.round.ticket.prekeys)
    for n in numbers or stage.members:
        fresh = derive_key(ENTROPY, "next prekey", stage.round.tid, n.to_bytes(4, "little"), length=PREKEY_SEED_BYTES)
        fleet_key = stage.fleet.epoch.frozen.fleet
        states[n], offers[n - 1] = member.offer_prekey(
            states[n], stage.fleet.committee[n - 1], fleet_key, fresh, LATE_S
        )
    fields = {"round": stage.round.ticket.round + 1, "previous": stage.round.tid, "prekeys": offers} | changes
    round_ = Round(stage.round.epoch, ticket_like(stage, **fields))
    return Stage(stage.fleet, round_, states, Collecting(round_), mail={n: [] for n in states})


def shows(text: str, secret: bytes) -> bool:
    """Whether `text` holds 6 or more bytes of the secret in a row: as hex, as numbers or as Python writes bytes."""
    plain = text.lower()
    for start in range(0, len(secret) - 5, 3):
        piece = secret[start : start + 6]
        written = repr(piece)[2:-1].lower()
        if any(form in plain for form in (piece.hex(), piece.hex(" "), written, ", ".join(map(str, piece)))):
            return True
    return False
