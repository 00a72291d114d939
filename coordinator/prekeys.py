"""Members' prekey offers: which are kept, and which the next ticket uses up (docs/protocol.md section 5.1).

A member offers ahead of time, and each offer serves one ticket. They come from devices and stay on disk, so what is
kept is bounded: living ones, and so many of each member.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from coordinator.batch import Effect
from coordinator.rows import Transaction
from edge_sdk.crypto.sealing import check_prekey
from edge_sdk.errors import PeerError
from edge_sdk.protocol import messages
from edge_sdk.protocol.messages import PrekeyOffer, Signed, verify
from edge_sdk.protocol.rounds import prekey_public
from edge_sdk.transport.wire import HeldPrekeys

MAX_SPARE_PREKEYS = 256
"""Unused offers that are kept of one member."""


class Offer(NamedTuple):
    """An offer that was checked. signed: encoded.  expires_s: Unix seconds."""

    signed: bytes
    expires_s: int


def new_offers(t: Transaction, fleet: bytes, member: bytes, offers: Iterable[Signed], now_s: float) -> dict[int, Offer]:
    """Those of a member's offers that are to be kept and are not yet, by serial.

    fleet: the authority's public key.  member: its own.
    Raises PeerError if one of them is not this member's offer to this fleet or cannot be sealed to, or if it offered
    another one under the same serial before; then none is kept.
    """
    spare = t.spare_prekeys(member, now_s)
    fresh: dict[int, Offer] = {}
    for signed in offers:
        offer = verify(PrekeyOffer, member, signed)
        if (offer.fleet, offer.member) != (fleet, member):
            raise PeerError(f"prekey {offer.serial}: for another fleet or member")
        data = messages.encode(signed)
        before = fresh[offer.serial].signed if offer.serial in fresh else t.prekey(member, offer.serial)
        if before is not None:
            if before != data:
                raise PeerError(f"prekey {offer.serial}: another one than it offered before: a rolled-back member")
            continue
        if offer.expires_s <= now_s or spare + len(fresh) >= MAX_SPARE_PREKEYS:
            continue
        check_prekey(prekey_public(offer))
        fresh[offer.serial] = Offer(data, offer.expires_s)
    return fresh


def held(t: Transaction, member: bytes, now_s: float) -> HeldPrekeys:
    """What is left of a member's offers, for its Welcome."""
    newest, unused = t.held_prekeys(member, now_s, MAX_SPARE_PREKEYS)
    return HeldPrekeys(newest, unused)


def keeping(member: bytes, fresh: Mapping[int, Offer], now_s: float) -> Effect:
    """What keeps these offers, and forgets all that have expired."""

    def write(t: Transaction) -> None:
        t.forget_prekeys(now_s)  # else offers of short lives would fill the disk: only living ones are counted
        room = MAX_SPARE_PREKEYS - t.spare_prekeys(member, now_s)  # an earlier frame of the batch may have brought some
        for serial, offer in fresh.items():
            if room > 0 and t.prekey(member, serial) is None:
                t.add_prekey(member, serial, offer.signed, offer.expires_s)
                room -= 1

    return write


class Chosen(NamedTuple):
    """One offer of each member, in the committee's order. used: (member, serial)."""

    used: list[tuple[bytes, int]]
    offers: list[Signed]


def choose(t: Transaction, members: Sequence[bytes], expires_s: int) -> Chosen | list[bytes]:
    """An unused offer of each member that lives as long as the ticket, or the members, by key, that have none.

    expires_s: the ticket's, Unix seconds.
    """
    chosen = Chosen([], [])
    for member in members:
        found = t.next_prekey(member, expires_s)
        if found is None:
            ready = t.members_with_prekeys(expires_s)
            return [other for other in members if other not in ready]
        serial, data = found
        chosen.used.append((member, serial))
        chosen.offers.append(messages.decode(Signed, data))
    return chosen
