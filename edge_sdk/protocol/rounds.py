"""A ticket, checked: the one place that decides what a round is (docs/protocol.md section 8)."""

from __future__ import annotations

from itertools import pairwise

from edge_sdk.crypto.hashing import tagged_hash
from edge_sdk.crypto.identity import Identity
from edge_sdk.crypto.merkle import MerkleTree
from edge_sdk.crypto.sealing import OVERHEAD_BYTES, PrekeyPublic, check_prekey
from edge_sdk.errors import ParameterError, PeerError
from edge_sdk.protocol.authority import FleetEpoch
from edge_sdk.protocol.messages import (
    Header,
    PrekeyOffer,
    Seal,
    SealedShare,
    Signed,
    Ticket,
    message_hash,
    sign,
    verify,
)
from edge_sdk.protocol.plan import Layout, Thresholds, delta_bits


class Round:
    """A ticket that the epoch's coordinator signed, with its prekeys checked and its numbers derived."""

    def __init__(self, epoch: FleetEpoch, signed: Signed) -> None:
        """Raises PeerError that names what is wrong with the ticket."""
        ticket = verify(Ticket, epoch.frozen.coordinator, signed)
        if ticket.epoch != epoch.id:
            raise PeerError("ticket: it is for another epoch")
        if ticket.groups not in epoch.corrupt_in_group:
            raise PeerError(f"ticket: the epoch allows no round of {ticket.groups} groups")
        if ticket.n_max > epoch.frozen.roster_size:
            raise PeerError(f"ticket: n_max {ticket.n_max} is more than the roster's {epoch.frozen.roster_size}")
        if not ticket.closes_s < ticket.expires_s:
            raise PeerError("ticket: it expires before it closes")
        if ticket.expires_s > epoch.frozen.expires_s:
            raise PeerError("ticket: it would outlive its epoch")
        self.epoch = epoch
        self.signed = signed
        self.ticket = ticket
        self.tid = message_hash(Ticket, signed.body)
        self.corrupt = epoch.corrupt_in_group[ticket.groups]
        if self.min_group * ticket.groups > ticket.n_max:
            raise PeerError(
                f"ticket: {ticket.groups} groups of at least {self.min_group} do not fit in n_max {ticket.n_max}"
            )
        _check_work(ticket)
        self.prekeys = _check_prekeys(epoch, ticket)
        self.layout = Layout(ticket.dimension, delta_bits(ticket.n_max))
        self.share_bytes = 2 * self.thresholds.polynomials + OVERHEAD_BYTES

    def __repr__(self) -> str:
        return f"Round({self.ticket.task!r}, {self.ticket.round}, tid={self.tid.hex()[:16]})"

    @property
    def thresholds(self) -> Thresholds:
        return self.epoch.thresholds

    @property
    def min_group(self) -> int:
        """h + F: the smallest group a member signs for. h honest devices' noise hides what F corrupt ones know."""
        return self.ticket.honest + self.corrupt

    @property
    def groups(self) -> int:
        return self.ticket.groups

    def check_header(self, signed: Signed) -> Header:
        """A contributor's header for this round, in the group that the beacon gives it, or PeerError."""
        header = self.epoch.verify_header(signed)
        if header.tid != self.tid:
            raise PeerError(f"header of sender {header.sender}: it is for another ticket")
        group = self.epoch.group_of(header.sender, self.groups)
        if header.group != group:
            raise PeerError(f"header of sender {header.sender}: group {header.group}, but the beacon says {group}")
        return header

    def check_partition(self, seal: Seal) -> None:
        """Return if the seal is a set that a member may sign, as far as it can be told without the headers.

        Raises PeerError on another ticket, a number of groups that is not the ticket's, a sender that is listed twice,
        out of order or in a group that is not its own, more than n_max senders, or a group below h + F. A group may be
        empty: it was too small and is left out. Not all may be.
        """
        if seal.tid != self.tid:
            raise PeerError("seal: it is for another ticket")
        if len(seal.groups) != self.groups:
            raise PeerError(f"seal: {len(seal.groups)} groups instead of {self.groups}")
        if sum(map(len, seal.groups)) > self.ticket.n_max:
            raise PeerError(f"seal: more than n_max = {self.ticket.n_max} contributors")
        if not any(seal.groups):
            raise PeerError("seal: every group is empty")
        for group, entries in enumerate(seal.groups):
            senders = [sender for sender, _ in entries]
            if any(b <= a for a, b in pairwise(senders)):
                raise PeerError(f"seal: group {group} is not in ascending order of distinct senders")
            for sender in senders:
                if sender >= self.epoch.frozen.roster_size or self.epoch.group_of(sender, self.groups) != group:
                    raise PeerError(f"seal: sender {sender} is not of group {group}")
            if 0 < len(entries) < self.min_group:
                raise PeerError(f"seal: group {group} has {len(entries)} contributors, {self.min_group} needed")


def _check_work(ticket: Ticket) -> None:
    """Return if the noise plan's unit and what the devices are to do fit together, else raise PeerError."""
    noise, work = ticket.noise, ticket.work
    if noise.unit == "device":
        if noise.example_rate != 1.0:
            raise PeerError(f'ticket: noise.example_rate is {noise.example_rate}: 1 for unit "device", not a draw')
        if not work.learning_rate > 0:
            raise PeerError('ticket: work.learning_rate is 0: unit "device" trains at a rate above 0')
        if (work.epochs > 0) == (work.steps > 0):
            raise PeerError(
                f"ticket: work.epochs is {work.epochs} and work.steps is {work.steps}: exactly one of them is above 0 "
                'for unit "device"'
            )
        return
    # A local parameter that moved along an example's gradient would carry the example into every later gradient of the
    # others, unclipped: the account by example holds while local parameters stay as they are.
    for name in ("learning_rate", "epochs", "steps", "proximal", "weight_cap"):
        value = getattr(work, name)
        if value != 0:
            raise PeerError(f'ticket: work.{name} is {value}: 0 for unit "example", whose round is one step')


def _check_prekeys(epoch: FleetEpoch, ticket: Ticket) -> tuple[PrekeyOffer, ...]:
    offers = ticket.prekeys
    if len(offers) != len(epoch.members):
        raise PeerError(f"ticket: {len(offers)} prekeys for a committee of {len(epoch.members)}")
    checked = []
    for number, (member, signed) in enumerate(zip(epoch.members, offers, strict=True), start=1):
        offer = verify(PrekeyOffer, member.key, signed)
        if (offer.fleet, offer.member) != (epoch.frozen.fleet, member.key):
            raise PeerError(f"ticket: the prekey of member {number} is for another fleet or member")
        if ticket.expires_s > offer.expires_s:
            raise PeerError(f"ticket: it would outlive the prekey of member {number}")
        try:
            check_prekey(prekey_public(offer))
        except PeerError as error:
            raise PeerError(f"ticket: member {number}: {error}") from error
        checked.append(offer)
    return tuple(checked)


def split_shares(round_: Round, header: Header, shares: bytes) -> tuple[SealedShare, ...]:
    """One contribution's sealed shares, by member, each with the proof that the header covers it.

    Raises PeerError on another length than m shares', or if the header's root is not theirs.
    """
    size, members = round_.share_bytes, round_.thresholds.members
    if len(shares) != size * members:
        raise PeerError(f"sealed shares: {len(shares)} bytes instead of {size * members}")
    leaves = [shares[i * size : (i + 1) * size] for i in range(members)]
    tree = MerkleTree(leaves)
    if tree.root != header.shares:
        raise PeerError(f"sealed shares of sender {header.sender}: they are not the ones that its header binds")
    return tuple(SealedShare(leaf, list(tree.proof(i))) for i, leaf in enumerate(leaves))


def prekey_public(offer: PrekeyOffer) -> PrekeyPublic:
    return PrekeyPublic(offer.x25519, offer.mlkem)


def share_context(tid: bytes, sender: int, sender_key: bytes, member: int, masked: bytes) -> tuple[bytes, ...]:
    """What a sealed share is bound to as associated data (section 5.2)."""
    return (tid, sender.to_bytes(4, "little"), sender_key, member.to_bytes(4, "little"), masked)


def seal_hash(seal: bytes) -> bytes:
    """H(S, groups): what members sign, from the seal's body."""
    return tagged_hash("sealed set", seal)


def sign_ticket(coordinator: Identity, epoch: FleetEpoch, ticket: Ticket) -> Round:
    """The coordinator's side of a ticket: sign it and check it as a device would, before anyone sees it.

    Raises ParameterError if the ticket is one that devices would refuse.
    """
    try:
        return Round(epoch, sign(coordinator, ticket))
    except PeerError as error:
        raise ParameterError(f"devices would refuse this: {error}") from error
