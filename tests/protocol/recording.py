"""A round recorded in every phase, the parties that can be attacked in it, and mutations that know the encoding.

Shared by the hypothesis tests (test_fuzz.py, test_messages.py) and the coverage-guided run (tests/fuzz_messages.py).
Everything is made from fixed entropy, so that a finding can be replayed. The attacker owns every signing key: what a
mutation breaks is signed again, or nothing behind the signature checks would ever be reached.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from random import Random

import msgspec
import numpy as np
from kyber_py.ml_kem import ML_KEM_768

from edge_sdk.crypto.hashing import content_hash, derive_key, tagged_hash
from edge_sdk.crypto.identity import Identity
from edge_sdk.crypto.merkle import MerkleTree, merkle_root
from edge_sdk.crypto.sealing import Sealer
from edge_sdk.errors import PeerError, RoundAborted
from edge_sdk.protocol import aggregator, authority, contributor, member, messages, reference
from edge_sdk.protocol.messages import (
    Abort,
    Complaint,
    Delivery,
    Envelope,
    Epoch,
    Grouping,
    Header,
    Message,
    PrekeyOffer,
    Receipt,
    Release,
    Seal,
    SealSignature,
    Signed,
    Ticket,
    Transcript,
    encode,
    label_of,
    sign,
    wrap,
)
from edge_sdk.protocol.rounds import Round, prekey_public, share_context, split_shares

ENTROPY = hashlib.sha256(b"recorded round").digest()
DIMENSION = 20
NOW_S = 10.0

KINDS: tuple[type[Message], ...] = tuple(
    kind
    for kind in vars(messages).values()
    if isinstance(kind, type) and issubclass(kind, Message) and kind is not Message
)
"""Every kind of message that the schema has, nested ones included."""


def fixed_encapsulation() -> Callable[[bytes], tuple[bytes, bytes]]:
    """ML-KEM-768 encapsulation whose coins are hashes of a counter: (shared secret, ciphertext)."""
    calls = 0

    def encapsulate(public: bytes) -> tuple[bytes, bytes]:
        nonlocal calls
        calls += 1
        pair: tuple[bytes, bytes] = ML_KEM_768._encaps_internal(
            public, tagged_hash("coins", calls.to_bytes(4, "little"))
        )
        return pair

    return encapsulate


# --- What was recorded ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Letter:
    """One valid message: its kind, its body, and who signs it (None for a kind without an author of its own)."""

    kind: type[Message]
    body: bytes
    author: Identity | None

    @property
    def signed(self) -> Signed:
        assert self.author is not None
        return Signed(self.body, self.author.sign(label_of(self.kind), self.body))

    @property
    def wire(self) -> bytes:
        content = self.body if self.author is None else encode(self.signed)
        return encode(Envelope(label_of(self.kind), content))


@dataclass(frozen=True)
class Target:
    """One party in one phase. `step` takes its state and bytes, and gives the next state."""

    name: str
    state: object
    step: Callable[[object, bytes], object]
    refusals: tuple[type[Exception], ...] = (PeerError,)


@dataclass(frozen=True)
class Recording:
    """A whole round of one fleet, with every state that a party was in."""

    authority: Identity
    coordinator: Identity
    devices: tuple[Identity, ...]
    committee: tuple[Identity, ...]
    epoch: authority.FleetEpoch
    round: Round
    letters: tuple[Letter, ...]
    contributions: tuple[contributor.Contribution, ...]
    targets: tuple[Target, ...]
    coordinators: tuple[aggregator.State, ...]
    """The coordinator before any contribution and in every later phase."""

    @property
    def signers(self) -> tuple[Identity, ...]:
        return (self.authority, self.coordinator, *self.devices, *self.committee)


class Violated(AssertionError):
    """What the protocol promises about any bytes whatever did not hold."""


def attack(target: Target, data: bytes) -> str | None:
    """Give `data` to a party. None if it was accepted, else what the party said.

    Raises Violated if the party's state changed, if it refused without a reason, or if an accepted message undid
    something that is final. Any other exception goes through: it is a finding.
    """
    before = fingerprint(target.state)
    said = None
    try:
        after = target.step(target.state, data)
    except target.refusals as error:
        said = str(error)
        if not said:
            raise Violated(f"{target.name}: refused without a reason") from error
    else:
        _check_forward(target.state, after)
    if fingerprint(target.state) != before:
        raise Violated(f"{target.name}: the old state changed")
    return said


def _check_forward(before: object, after: object) -> None:
    """What is final stays: rounds only go up, a signed set and a certificate are never exchanged for others."""
    if isinstance(before, member.MemberState) and isinstance(after, member.MemberState):
        if after.next_serial < before.next_serial or not set(after.prekeys) <= set(before.prekeys):
            raise Violated("member: a prekey came back")
        for task, (number, tid) in before.newest.items():
            if after.newest[task][0] < number or (after.newest[task][0] == number and after.newest[task][1] != tid):
                raise Violated("member: the newest round went back")
        order = [member.Inspecting, member.Committed, member.Released, member.Closed]
        for tid, old in before.sessions.items():
            new = after.sessions[tid]
            if order.index(type(new)) < order.index(type(old)):
                raise Violated("member: a session went back")
            if (
                isinstance(old, member.Committed | member.Released)
                and isinstance(new, member.Committed | member.Released)
                and new.seal != old.seal
            ):
                raise Violated("member: another set took the signed one's place")
        newest = {tid for _, tid in after.newest.values()}
        if any(isinstance(s, member.Inspecting) and tid not in newest for tid, s in after.sessions.items()):
            raise Violated("member: it could still sign a set of an older ticket")
        secret = [s.serial for s in after.sessions.values() if isinstance(s, member.Inspecting | member.Committed)]
        if not set(secret) <= set(after.prekeys) or set(after.bound) != set(secret):
            raise Violated("member: prekeys and sessions do not agree")
    elif isinstance(before, aggregator.Certified):
        if not isinstance(after, aggregator.Certified) or after.certificate != before.certificate:
            raise Violated("coordinator: the certificate was exchanged")
        if any(after.answers[number] != answer for number, answer in before.answers.items()):
            raise Violated("coordinator: an answer was exchanged")
    elif isinstance(before, aggregator.Sealed):
        if not isinstance(after, aggregator.Sealed | aggregator.Certified) or after.digest != before.digest:
            raise Violated("coordinator: the sealed set was exchanged")
    elif isinstance(before, contributor.Idle):
        if not isinstance(after, contributor.Training) or after.round.ticket.round <= before.round:
            raise Violated("contributor: it took a round that is not newer")
    elif isinstance(before, contributor.Sent | contributor.Training) and (
        not isinstance(after, contributor.Idle) or after.tid != before.round.tid
    ):
        raise Violated("contributor: the round it was in is forgotten")


def fingerprint(value: object) -> bytes:
    """32 bytes that change if anything in a state does."""
    digest = hashlib.sha256()
    _absorb(digest.update, value)
    return digest.digest()


def _absorb(update: Callable[[bytes], None], value: object) -> None:
    update(type(value).__name__.encode() + b"\0")
    match value:
        case None | int() | float() | str():
            update(repr(value).encode() + b"\0")
        case bytes():
            update(len(value).to_bytes(8, "little") + value)
        case Message():
            update(encode(value))
        case Round():
            _absorb(update, [value.signed, value.tid, value.corrupt, value.share_bytes, *value.prekeys])
        case authority.FleetEpoch():
            update(value.id)
        case np.ndarray():
            update(value.tobytes())
        case frozenset():
            _absorb(update, sorted(value))
        case Mapping():
            _absorb(update, list(value.items()))
        case tuple() | list():
            update(len(value).to_bytes(8, "little"))
            for item in value:
                _absorb(update, item)
        case _ if is_dataclass(value):
            for entry in fields(value):
                _absorb(update, getattr(value, entry.name))
        case _:
            raise TypeError(f"a state holds {type(value)}")


@cache
def recording(committee: str = "everyone") -> Recording:
    """The round of five devices that serve themselves, or of eight in two groups with three helpers ('helpers')."""
    if committee == "everyone":
        fleet = reference.make_fleet(ENTROPY, 5)
        groups = 1
    else:
        fleet = reference.make_fleet(ENTROPY, 8, "helpers", helpers=3, groups=(1, 2))
        groups = 2
    return _record(fleet, groups)


def _record(fleet: reference.Fleet, groups: int) -> Recording:
    fleet_authority = Identity(derive_key(ENTROPY, "authority", bytes(4)))
    epoch, coordinator = fleet.epoch, fleet.coordinator
    letters: list[Letter] = []
    targets: list[Target] = []

    def keep(kind: type[Message], signed: Signed, author: Identity) -> bytes:
        letter = Letter(kind, signed.body, author)
        assert letter.signed == signed
        if letter not in letters:
            letters.append(letter)
        return letter.wire

    def keep_plain(message: Message) -> bytes:
        letters.append(Letter(type(message), encode(message), None))
        return letters[-1].wire

    def device_target(name: str, state: contributor.State, now_s: float = NOW_S) -> None:
        terms = contributor.Terms(bytes(32))
        targets.append(
            Target(
                f"contributor {name}",
                state,
                lambda s, data: contributor.step(s, data, epoch, terms, now_s),  # type: ignore[arg-type]
                (PeerError, RoundAborted) if isinstance(state, contributor.Idle) else (PeerError,),
            )
        )

    def member_target(name: str, state: member.MemberState | None = None, now_s: float = NOW_S) -> None:
        targets.append(
            Target(
                f"member {name}",
                state or fleet.members[0],
                lambda s, data: member.step(s, data, epoch, fleet.committee[0], now_s)[0],  # type: ignore[arg-type]
            )
        )

    def coordinator_target(name: str, state: aggregator.State) -> None:
        targets.append(Target(f"coordinator {name}", state, aggregator.step))  # type: ignore[arg-type]

    groupings = [Grouping(count, corrupt) for count, corrupt in epoch.corrupt_in_group.items()]
    beacon_entropy = derive_key(ENTROPY, "beacon", bytes(4))
    stated = Epoch(epoch.frozen, beacon_entropy, list(epoch.members), groupings)
    keep(Epoch, sign(fleet_authority, stated), fleet_authority)

    n_max = len(fleet.devices)
    round_ = reference.open_ticket(fleet, ENTROPY, DIMENSION, n_max=n_max, groups=groups)
    later = reference.open_ticket(
        fleet, ENTROPY, DIMENSION, n_max=n_max, groups=groups, number=1, previous=round_.tid
    )  # fmt: skip
    for one in (round_, later):
        keep(Ticket, one.signed, coordinator)
        for signed, identity in zip(one.ticket.prekeys, fleet.committee, strict=True):
            keep(PrekeyOffer, signed, identity)

    # Contribute.
    idle = contributor.Idle("reference")
    encapsulate = fixed_encapsulation()
    collecting = aggregator.Collecting(round_)
    contributions = []
    mail: list[list[tuple[Signed, messages.SealedShare | None]]] = [[] for _ in fleet.committee]
    device_target("idle", idle)
    device_target("idle too late", idle, round_.ticket.closes_s)
    coordinator_target("open", collecting)
    for number, identity in enumerate(fleet.devices):
        enrolled = fleet.enrolled(identity)
        training = idle.on_ticket(round_, contributor.Terms(bytes(32)), NOW_S)
        own = derive_key(ENTROPY, "device entropy", number.to_bytes(4, "little"))
        ledger = reference.stand_in_ledger(identity.public_key, round_.ticket.round)
        sent = training.contribute(np.arange(DIMENSION) - 7 * number, enrolled, ledger, own, encapsulate, NOW_S)
        contributions.append(sent.contribution)
        keep(Header, sent.contribution.header, identity)
        if number == 1:
            coordinator_target("collecting", collecting)
        accepted = aggregator.accept(collecting, sent.contribution, coordinator, NOW_S)
        collecting = accepted.state
        receipt = messages.decode(Signed, messages.decode(Envelope, accepted.receipt).content)
        keep(Receipt, receipt, coordinator)
        for i, share in enumerate(accepted.shares or ()):
            mail[i].append((sent.contribution.header, share))
        if number == 0:
            device_target("training", training)
            device_target("sent", sent)
            device_target("done", sent.on_receipt(receipt))
    full = collecting
    coordinator_target("full", full)

    bad_dealers = [_deal_badly(fleet, round_, contributions[2], content) for content in _BAD_SHARES]
    bad_dealers += [_deal_badly(fleet, round_, contributions[2], b"", point) for point in _LOW_ORDER]
    for header, _ in bad_dealers:
        keep(Header, header, fleet.devices[2])

    # Inspect.
    def tell(i: int, data: bytes) -> Signed | None:
        fleet.members[i], reply = member.step(fleet.members[i], data, epoch, fleet.committee[i], NOW_S)
        if reply is None:
            return None
        kind, signed = messages.unwrap(reply)
        assert isinstance(signed, Signed)
        keep(kind, signed, fleet.committee[i])
        return signed

    member_target("with prekeys")
    ticket = wrap(Ticket, round_.signed)
    for i in range(len(fleet.committee)):
        tell(i, ticket)
        if i == 0:
            member_target("inspecting nothing yet")
            after, _ = member.step(fleet.members[0], wrap(Ticket, later.signed), epoch, fleet.committee[0], NOW_S)
            member_target("after a later ticket", after)
            tell(i, keep_plain(Delivery(round_.tid, mail[i][:2])))
            tell(i, keep_plain(Delivery(round_.tid, [(header, None) for header, _ in mail[i][2:]])))
            member_target("inspecting")
            member_target("inspecting too late", now_s=round_.ticket.expires_s)
            without_shares = fleet.members[0]
        tell(i, keep_plain(Delivery(round_.tid, mail[i])))
    for dealt in bad_dealers:
        keep_plain(Delivery(round_.tid, [dealt]))
    complaint = sign(fleet.committee[0], Complaint(round_.tid, 1, [fleet.enrolled(fleet.devices[0]).index]))
    collecting = aggregator.step(full, keep(Complaint, complaint, fleet.committee[0]))  # type: ignore[assignment]
    coordinator_target("with a complaint", collecting)

    # Seal, certify, release.
    notice = aggregator.abort(full, coordinator, "an operator ended it")
    ended = keep(Abort, notice.notice, coordinator)
    coordinator_target("aborted", notice)
    sealed = aggregator.seal(full, coordinator, NOW_S)
    assert isinstance(sealed, aggregator.Sealed)
    coordinator_target("sealed", sealed)
    seal = keep(Seal, sealed.seal, coordinator)
    state: aggregator.State = sealed
    for i, identity in enumerate(fleet.committee):
        signature = tell(i, seal)
        assert signature is not None
        state = aggregator.step(state, keep(SealSignature, signature, identity))
        if i == 0:
            coordinator_target("with a signature", state)
            member_target("committed")
            member_target("committed too late", now_s=round_.ticket.expires_s)
            without_shares, _ = member.step(without_shares, seal, epoch, fleet.committee[0], NOW_S)
            member_target("committed without shares", without_shares)
    assert isinstance(state, aggregator.Certified)
    coordinator_target("certified", state)
    certified = state
    certificate = keep_plain(state.certificate)
    aborting = fleet.members[0]
    for i, identity in enumerate(fleet.committee):
        release = tell(i, certificate)
        assert release is not None
        state = aggregator.step(state, keep(Release, release, identity))
        if i == 0:
            coordinator_target("with an answer", state)
            member_target("released")
    fleet.members[0], _ = member.step(aborting, ended, epoch, fleet.committee[0], NOW_S)
    member_target("closed")

    # Open.
    assert isinstance(state, aggregator.Certified)
    places = {fleet.enrolled(device).index: number for number, device in enumerate(fleet.devices)}
    sums = {
        group: aggregator.sum_masked(round_, (contributions[places[sender]].masked for sender in senders))
        for group, senders in enumerate(state.groups)
    }
    done = aggregator.open_round(state, sums, coordinator, final=True)
    assert isinstance(done, aggregator.Done)
    assert not done.reasons
    keep(Transcript, done.transcript, coordinator)
    coordinator_target("done", done)
    return Recording(
        fleet_authority, coordinator, tuple(fleet.devices), tuple(fleet.committee), epoch, round_, tuple(letters),
        tuple(contributions), tuple(targets), (aggregator.Collecting(round_), full, sealed, certified, done, notice),
    )  # fmt: skip


_BAD_SHARES = (b"", b"\x00", bytes(4094), bytes(4095), bytes(4098), b"\xf1\xff" * 2048, b"\xff" * 4096)
"""Plaintexts that open and are not a member's values: a wrong length, or residues that are too large."""

_LOW_ORDER = (bytes(32), b"\x01" + bytes(31), bytes.fromhex("ec" + "ff" * 30 + "7f"))
"""Points of order 1, 2 and 4 on Curve25519 or its twist."""


def _deal_badly(
    fleet: reference.Fleet, round_: Round, valid: contributor.Contribution, content: bytes, point: bytes | None = None
) -> tuple[Signed, messages.SealedShare]:
    """Device 2's header over shares that hold `content` for member 1, who can open it, and member 1's share.

    point: named as the sealing key instead of the true one; then member 1 cannot open it.
    """
    header = messages.decode(Header, valid.header.body)
    sealer = Sealer(hashlib.sha256(content).digest(), fixed_encapsulation())
    context = share_context(round_.tid, header.sender, header.key, 1, header.masked)
    size = round_.share_bytes
    leaves = [valid.shares[i : i + size] for i in range(0, len(valid.shares), size)]
    leaves[0] = sealer.seal(prekey_public(round_.prekeys[0]), content, *context)
    tree = MerkleTree(leaves)
    changed = msgspec.structs.replace(header, sealing_key=point or sealer.public_key, shares=tree.root)
    return sign(fleet.devices[2], changed), messages.SealedShare(leaves[0], list(tree.proof(0)))


# --- Mutations -----------------------------------------------------------------------------------------------------

Tree = object
"""MessagePack as Python values: None, bool, int, float, str, bytes, list; or Raw."""


class Raw(bytes):
    """Bytes that stand in a tree as they are."""


_INTEGERS = (0, 1, -1, 2, 63, 64, 127, 128, 255, 256, 65520, 65521, 65535, 65536, 2**20 - 1, 2**20, 2**31, 2**32 - 1,
             2**32, 2**40 - 1, 2**40, 2**53 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1, -(2**63))  # fmt: skip
_FLOATS = (float("nan"), float("inf"), float("-inf"), -0.0, 0.0, 5e-324, 1e30, 1e29, -1.0, 1.0, 1.7e308)
_TEXTS = ("", "a", "a\n", "A", "\0", "é", "a" * 64, "a" * 65, "drawn", "everyone", "helpers", "example", "\U0001f600")
_RAW = (
    b"\xc1", b"", b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff",
    b"\xd4\x01\x00", b"\xd6\xff\x00\x00\x00\x00", b"\xc7\x00\x05", b"\xd9\x01\xff", b"\xd9\x03\xed\xa0\x80",
    b"\x91" * 3000 + b"\xc0", b"\x81\x00" * 3000 + b"\xc0", b"\x80", b"\x81\xc0\xc0", b"\x82\xa1a\x00\xa1a\x00",
)  # fmt: skip


def parse(data: bytes) -> Tree:
    """The tree of an encoding; of bytes that are none, themselves."""
    try:
        tree: Tree = msgspec.msgpack.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return Raw(data)
    return tree


def pack(tree: Tree) -> bytes:
    """The shortest encoding of a tree."""
    if isinstance(tree, Raw):
        return bytes(tree)
    if isinstance(tree, list):
        return _array_header(len(tree)) + b"".join(map(pack, tree))
    return msgspec.msgpack.encode(tree)


def _array_header(length: int) -> bytes:
    return bytes([0x90 | length]) if length < 16 else b"\xdc" + length.to_bytes(2, "big")


def odd_encodings(tree: Tree) -> Iterable[bytes]:
    """Encodings of the same value, or of one that a careless reader takes for it, that are not the canonical one."""
    match tree:
        case bool() | None:
            yield from (b"\xc2", b"\xc3", b"\x00", b"\x90", b"\xd4\x00\x00")
        case int():
            if tree >= 0:
                yield b"\xcf" + tree.to_bytes(8, "big")
            for code, form in ((0xCC, ">B"), (0xCD, ">H"), (0xCE, ">I"), (0xD0, ">b"), (0xD1, ">h"), (0xD3, ">q")):
                try:
                    yield bytes([code]) + struct.pack(form, tree)
                except struct.error:
                    continue
            yield b"\xcb" + struct.pack(">d", float(tree))
            yield msgspec.msgpack.encode(str(tree))
        case float():
            try:
                yield b"\xca" + struct.pack(">f", tree)
            except OverflowError:
                yield b"\xca\x7f\x80\x00\x00"
            if tree.is_integer() and abs(tree) < 2**63:
                yield msgspec.msgpack.encode(int(tree))
        case bytes() | str():
            data = tree if isinstance(tree, bytes) else tree.encode()
            size = len(data).to_bytes(4, "big")
            yield from (b"\xc6" + size + data, b"\xdb" + size + data, b"\xc9" + size + b"\x01" + data)
            if len(data) < 1 << 16:
                yield from (b"\xc5" + size[2:] + data, b"\xda" + size[2:] + data, b"\xdc" + size[2:] + data)
        case list():
            items = [pack(item) for item in tree]
            size = len(items).to_bytes(4, "big")
            yield b"\xdd" + size + b"".join(items)
            yield b"\xdc" + size[2:] + b"".join(items)
            yield b"\xdf" + size + b"".join(pack(i) + item for i, item in enumerate(items))
            yield b"\xdd\xff\xff\xff\xff" + b"".join(items)
            yield _array_header(len(items) + 1) + b"".join(items)


def mutate_bytes(rng: Random, data: bytes, donors: tuple[bytes, ...] = ()) -> bytes:
    """`data` with one thing wrong: bits, bytes, length, or a piece of something else."""
    at = rng.randrange(len(data) + 1)
    match rng.randrange(8):
        case 0 | 1 if data:
            at = min(at, len(data) - 1)
            return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        case 2 if data:
            at = min(at, len(data) - 1)
            return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        case 3:
            return data[:at]
        case 4:
            return data + bytes([rng.randrange(256)]) * rng.choice((1, 2, 32))
        case 5:
            return data[:at] + data[at + rng.choice((1, 2, 4, 32)) :]
        case 6 if donors:
            donor = rng.choice(donors)
            start = rng.randrange(len(donor) + 1)
            return data[:at] + donor[start : start + rng.choice((1, 4, 32, 64))] + data[at:]
        case _:
            return bytes(len(data)) if rng.randrange(2) else rng.choice(donors or (b"",))


def mutate_tree(rng: Random, tree: Tree, donor: Tree) -> Tree:
    """`tree` with one node changed, or put in another encoding."""
    if isinstance(tree, list) and tree and rng.randrange(8):
        at = rng.randrange(len(tree))
        return [*tree[:at], mutate_tree(rng, tree[at], donor), *tree[at + 1 :]]
    choice = rng.randrange(8)
    if choice == 0:
        return Raw(rng.choice([*odd_encodings(tree), *_RAW]))
    if choice == 1:
        return _piece(rng, donor)
    match tree:
        case Raw():
            return Raw(mutate_bytes(rng, tree))
        case int():
            near = tree + rng.choice((-1, 1))
            return near if choice == 2 and -(2**63) <= near < 2**64 else rng.choice(_INTEGERS)
        case float():
            return rng.choice(_FLOATS)
        case str():
            return rng.choice(_TEXTS)
        case bytes():
            return mutate_bytes(rng, tree, (bytes(32), b"\xff" * 32, b"\x01" + bytes(31)))
        case list():
            at = rng.randrange(len(tree) + 1)
            match rng.randrange(7):
                case 0:
                    return tree[:at]
                case 1:
                    return tree[:at] + tree[at + 1 :]
                case 2 if tree:
                    return [*tree[:at], tree[min(at, len(tree) - 1)], *tree[at:]]
                case 3:
                    return tree[::-1]
                case 4:
                    return [*tree[:at], _piece(rng, donor), *tree[at:]]
                case 5:
                    return tree * rng.choice((2, 30))
                case _:
                    return [tree]
        case _:
            return rng.choice([0, b"", [], bytes(32), False])


def _piece(rng: Random, tree: Tree) -> Tree:
    while isinstance(tree, list) and tree and rng.randrange(4):
        tree = rng.choice(tree)
    return tree


def pick(rng: Random, rec: Recording) -> Letter:
    """A recorded message, every kind as likely as every other."""
    kind = rng.choice((*messages.SIGNED, *messages.PLAIN))
    return rng.choice([letter for letter in rec.letters if letter.kind is kind] or rec.letters)


def hostile_body(rng: Random, rec: Recording, letter: Letter) -> bytes:
    """The letter's body after up to three changes, what is signed inside of it signed again."""
    tree = parse(letter.body)
    donor = parse(rng.choice(rec.letters).body)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        if rng.randrange(3) == 0 and isinstance(tree, list) and letter.kind in (Ticket, Delivery):
            _mutate_inside(rng, rec, letter.kind, tree, donor)
        else:
            tree = mutate_tree(rng, tree, donor)
    data = pack(tree)
    return mutate_bytes(rng, data, tuple(x.body for x in rec.letters)) if rng.randrange(8) == 0 else data


def _mutate_inside(rng: Random, rec: Recording, kind: type[Message], tree: list[Tree], donor: Tree) -> None:
    """Change one prekey offer of a ticket, or one header of a delivery, and sign it with its author's key again."""
    items = next((item for item in reversed(tree) if isinstance(item, list) and item), None)
    if items is None:
        return
    at = rng.randrange(len(items))
    inner = PrekeyOffer if kind is Ticket else Header
    signed = items[at] if kind is Ticket else items[at][0] if isinstance(items[at], list) and items[at] else None
    if not (isinstance(signed, list) and len(signed) == 2 and isinstance(signed[0], bytes)):
        return
    author = next((x.author for x in rec.letters if x.body == signed[0]), None) or rng.choice(rec.signers)
    body = pack(mutate_tree(rng, parse(signed[0]), donor))
    again: Tree = [body, author.sign(label_of(inner), body)]
    items[at] = again if kind is Ticket else [again, *items[at][1:]]


def hostile_signed(rng: Random, rec: Recording, letter: Letter) -> Signed:
    """The letter with a hostile body: mostly signed as it should be, else by somebody else, as another kind, or not."""
    body = hostile_body(rng, rec, letter)
    author = letter.author or rng.choice(rec.signers)
    label = label_of(letter.kind)
    match rng.randrange(12):
        case 0:
            return Signed(body, rng.choice(rec.signers).sign(label, body))
        case 1:
            return Signed(body, author.sign(label_of(rng.choice(messages.SIGNED)), body))
        case 2:
            return Signed(body, mutate_bytes(rng, author.sign(label, body)))
        case 3:
            return Signed(body, author.sign(label, letter.body))
        case _:
            return Signed(body, author.sign(label, body))


def hostile_wire(rng: Random, rec: Recording) -> bytes:
    """One message as it might come in from a party that holds every key and follows no rule."""
    letter = pick(rng, rec)
    if letter.author is None:
        content = hostile_body(rng, rec, letter)
    else:
        signed = hostile_signed(rng, rec, letter)
        tree: Tree = [signed.body, signed.signature]
        content = pack(mutate_tree(rng, tree, tree) if rng.randrange(12) == 0 else tree)
    kind = rng.choice(KINDS) if rng.randrange(12) == 0 else letter.kind
    envelope: Tree = [label_of(kind), content]
    data = pack(mutate_tree(rng, envelope, envelope) if rng.randrange(16) == 0 else envelope)
    return mutate_bytes(rng, data, (letter.wire,)) if rng.randrange(16) == 0 else data


def hostile_contribution(rng: Random, rec: Recording) -> contributor.Contribution:
    """A contribution of arbitrary parts; mostly its header binds them all the same, signed with its sender's key."""
    number = rng.randrange(len(rec.contributions))
    valid, other = rec.contributions[number], rng.choice(rec.contributions)
    masked, shares = valid.masked, valid.shares
    if rng.randrange(2):
        masked = mutate_bytes(rng, masked, (other.masked,))
    if rng.randrange(2):
        shares = mutate_bytes(rng, shares, (other.shares,))
    header = parse(valid.header.body)
    assert isinstance(header, list)
    if rng.randrange(4):
        header[6] = content_hash(masked)
        size = rec.round.share_bytes
        leaves = [shares[i : i + size] for i in range(0, len(shares), size)] or [b""]
        header[7] = merkle_root(leaves[: len(rec.committee)] if rng.randrange(2) else leaves)
    letter = Letter(Header, pack(header), rec.devices[number])
    signed = letter.signed if rng.randrange(3) else hostile_signed(rng, rec, letter)
    return contributor.Contribution(signed, masked, shares)


def give_contribution(rec: Recording, contribution: contributor.Contribution) -> str | None:
    """Offer it to the coordinator in every phase. None if it was accepted while none had come, else the reason."""
    said = None
    for state in reversed(rec.coordinators):
        said = None
        before = fingerprint(state)
        try:
            accepted = aggregator.accept(state, contribution, rec.coordinator, NOW_S)
        except (PeerError, RoundAborted) as error:
            said = str(error)
            if not said:
                raise Violated("accept: refused without a reason") from error
        else:
            sizes = (len(contribution.masked), len(contribution.shares))
            if accepted.shares is not None and sizes != (
                rec.round.layout.masked_bytes,
                rec.round.share_bytes * len(rec.committee),
            ):
                raise Violated("accept: more than the header binds was taken")
            before_it = getattr(state, "entries", {})
            if not before_it.items() <= accepted.state.entries.items():  # type: ignore[union-attr]
                raise Violated("accept: an entry was lost or exchanged")
            if accepted.shares is not None and not isinstance(state, aggregator.Collecting):
                raise Violated("accept: a contribution was added to a set that is fixed")
        if fingerprint(state) != before:
            raise Violated("accept: the old state changed")
    return said


def give_shares(rec: Recording, header: Header, shares: bytes) -> None:
    """Split sealed shares: as many as members, or PeerError."""
    try:
        split = split_shares(rec.round, header, shares)
        if len(split) != len(rec.committee) or b"".join(share.sealed for share in split) != shares:
            raise Violated("split_shares: not one share a member")
    except PeerError as error:
        if not str(error):
            raise Violated("split_shares: refused without a reason") from error


def give_epoch(rec: Recording, signed: Signed) -> None:
    """Take an epoch, and the recorded ticket and headers in it: everything derived from it is usable, or PeerError."""
    try:
        epoch = authority.FleetEpoch(rec.authority.public_key, signed)
    except PeerError as error:
        if not str(error):
            raise Violated("epoch: refused without a reason") from error
        return
    for groups in epoch.corrupt_in_group:
        if not 0 <= epoch.group_of(0, groups) < groups:
            raise Violated("epoch: a device is in no group")
    if epoch.thresholds.sharing.members != len(epoch.members):
        raise Violated("epoch: the sharing is not for its committee")
    if not epoch.frozen.corrupt_devices < epoch.frozen.roster_size:
        raise Violated("epoch: nobody is honest")
    for letter in rec.letters:
        if letter.kind is Ticket:
            give_round(rec, letter.signed, epoch)


def give_round(rec: Recording, signed: Signed, epoch: authority.FleetEpoch | None = None) -> None:
    """Take a ticket: what is derived from it is usable, or PeerError."""
    try:
        round_ = Round(epoch or rec.epoch, signed)
    except PeerError as error:
        if not str(error):
            raise Violated("ticket: refused without a reason") from error
        return
    if not (round_.min_group >= 3 and round_.layout.modulus_bits >= 8 and round_.layout.blocks >= 1):
        raise Violated("ticket: a round that cannot be")
    if len(round_.prekeys) != round_.thresholds.members:
        raise Violated("ticket: not one prekey a member")


def give_bytes(kind: type[Message] | None, data: bytes) -> Message | None:
    """Decode `data` as a `kind`, or unwrap it: the message, whose one encoding it must be, or None if refused."""
    try:
        if kind is None:
            found, message = messages.unwrap(data)
            again = wrap(found, message)
        else:
            message = messages.decode(kind, data)
            again = encode(message)
    except PeerError as error:
        if not str(error) or (kind is not None and not str(error).startswith(f"{label_of(kind)}: ")):
            raise Violated(f"refused without a reason: {error}") from error
        return None
    if again != data:
        raise Violated("what was decoded has another encoding")
    return message


def unused_names() -> tuple[type[Message], ...]:
    """Kinds with an author that no recorded round holds: must be empty, or the fuzz never starts from them."""
    seen = {letter.kind for name in ("everyone", "helpers") for letter in recording(name).letters}
    return tuple(kind for kind in (*messages.SIGNED, *messages.PLAIN) if kind not in seen)
