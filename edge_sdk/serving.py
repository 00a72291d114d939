"""A committee member's part of a device or a helper: prekeys offered ahead of time, letters answered.

What a letter changes is stored before its reply leaves: a member that forgot what it signed could sign another set.
"""

from __future__ import annotations

from collections.abc import Callable, Container

from edge_sdk.crypto.identity import Identity
from edge_sdk.crypto.sealing import PREKEY_SEED_BYTES, Prekey
from edge_sdk.errors import ParameterError, PeerError
from edge_sdk.protocol import member
from edge_sdk.protocol.authority import FleetEpoch
from edge_sdk.protocol.member import Closed, MemberState, Released
from edge_sdk.protocol.messages import PrekeyOffer, Signed, Ticket, sign, unwrap
from edge_sdk.store import Store
from edge_sdk.transport.wire import HeldPrekeys

SPARE_PREKEYS = 24
"""Offers that are kept out. Each serves one ticket; when they run out there is no round, never a long-term key."""

PREKEY_LIFE_S = 14 * 86_400
"""What nobody used by then is erased: a card that is found later opens nothing."""


MAX_SESSIONS = 256
"""Rounds that a member serves at a time, and again of those that ended and are kept to answer once more: a coordinator
that opens rounds without end fills no disk."""

MAX_PREKEYS = 512
"""Secrets that are kept. Of more, the oldest go that tickets which this member missed have used up."""


class Serving:
    """The member's side of this device. The state that it holds is the one that is stored."""

    def __init__(
        self,
        identity: Identity,
        fleet: bytes,
        store: Store,
        entropy: Callable[[int], bytes],
        *,
        spare_prekeys: int = SPARE_PREKEYS,
        prekey_life_s: int = PREKEY_LIFE_S,
    ) -> None:
        """fleet: public key of the fleet authority."""
        if not 1 <= spare_prekeys <= 64:
            raise ParameterError(f"spare_prekeys is {spare_prekeys}: 1 to 64")
        self._identity, self._fleet, self._store, self._entropy = identity, fleet, store, entropy
        self._spare, self._life_s = spare_prekeys, prekey_life_s
        self._spent: frozenset[int] = frozenset()
        """Offers that tickets have used up which did not come here, by serial. Not stored: every Welcome says it."""
        self.state: MemberState = store.member()

    def serves(self, epoch: FleetEpoch | None) -> bool:
        """Whether this device is in the epoch's committee."""
        return epoch is not None and any(entry.key == self._identity.public_key for entry in epoch.members)

    def handle(self, data: bytes, epoch: FleetEpoch | None, now_s: float) -> bytes | None:
        """One letter of the coordinator, and the reply to it. Raises PeerError; then nothing has changed."""
        if epoch is None:
            raise PeerError("letter: this device knows no epoch yet")
        ended = [session for session in self.state.sessions.values() if isinstance(session, Released | Closed)]
        if len(self.state.sessions) - len(ended) >= MAX_SESSIONS and unwrap(data)[0] is Ticket:
            raise PeerError(f"ticket: {MAX_SESSIONS} rounds are open here already; the oldest must end or expire first")
        after, reply = member.step(self.state, data, epoch, self._identity, now_s)
        if len(ended) > MAX_SESSIONS:
            oldest = min(ended, key=lambda session: session.round.ticket.expires_s)
            after = member.forget(after, [oldest.round.tid], ())
        self._keep(after)
        return reply

    def told(self, held: HeldPrekeys) -> None:
        """What the coordinator has left of our offers: the others went into tickets, though we may have missed these.

        They stay, for a ticket may yet come, but are counted and offered no more.
        """
        left = frozenset(held.unused)
        self._spent = frozenset(s for s in self.state.prekeys if s <= held.newest and s not in left)

    def offers(self, now_s: float, but: Container[int] = ()) -> dict[int, Signed]:
        """Every offer that is out and unused, by serial, topped up to the full number first. The same ones each time.

        Those in the last third of their life are kept but do not count: a ticket would soon outlive them.
        but: serials to leave out; each offer costs a key pair and a signature.
        """
        state = self.state
        fresh_until = now_s + self._life_s / 3
        good = sum(state.expiry[serial] > fresh_until for serial in self._unused(state))
        for _ in range(self._spare - good):
            seed = self._entropy(PREKEY_SEED_BYTES)
            state, _ = member.offer_prekey(state, self._identity, self._fleet, seed, int(now_s) + self._life_s)
        missed = sorted(serial for serial in state.prekeys if serial in self._spent and serial not in state.bound)
        self._keep(member.forget(state, (), missed[: max(0, len(state.prekeys) - MAX_PREKEYS)]))
        unused = sorted(serial for serial in self._unused(self.state) if serial not in but)
        return {serial: self._offer(serial) for serial in unused if state.expiry[serial] > now_s}

    @property
    def spare_prekeys(self) -> int:
        """Offers that are out and, as far as is known, unused."""
        return len(self._unused(self.state))

    def _unused(self, state: MemberState) -> list[int]:
        return [serial for serial in state.prekeys if serial not in state.bound and serial not in self._spent]

    def _offer(self, serial: int) -> Signed:
        public = Prekey(self.state.prekeys[serial]).public
        owner, expires_s = self._identity.public_key, self.state.expiry[serial]
        return sign(self._identity, PrekeyOffer(self._fleet, owner, serial, public.x25519, public.mlkem, expires_s))

    def expire(self, now_s: float) -> None:
        """Forget what has expired, and erase its secrets."""
        self._keep(member.expire(self.state, now_s))

    @property
    def next_expiry_s(self) -> float:
        """When `expire` next has something to do, Unix seconds; infinity if never."""
        tickets = [session.round.ticket.expires_s for session in self.state.sessions.values()]
        return min([*tickets, *self.state.expiry.values()], default=float("inf"))

    def _keep(self, after: MemberState) -> None:
        self._store.save_member(self.state, after)
        self.state = after
