"""A committee member (docs/protocol.md section 10): it inspects, signs one set per ticket, releases one sum per group.

One session per ticket: Inspecting -> Committed -> Released, or Closed. What holds across tickets is in `MemberState`:
the prekeys, each good for one ticket, the newest round of every task, and the heads of devices' ledgers. The caller
stores the new state before it sends a reply.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from edge_sdk.crypto.identity import Identity, check_signature
from edge_sdk.crypto.merkle import check_inclusion
from edge_sdk.crypto.sealing import PREKEY_SEED_BYTES, Prekey
from edge_sdk.crypto.shamir import PRIME
from edge_sdk.errors import ParameterError, PeerError
from edge_sdk.protocol.anchors import Anchors
from edge_sdk.protocol.authority import FleetEpoch
from edge_sdk.protocol.messages import (
    Abort,
    Certificate,
    Complaint,
    Delivery,
    Header,
    PrekeyOffer,
    Release,
    Seal,
    SealedShare,
    SealSignature,
    Signed,
    Ticket,
    encode,
    label_of,
    message_hash,
    sign,
    unwrap,
    verify_author,
    wrap,
)
from edge_sdk.protocol.rounds import Round, seal_hash, share_context


@dataclass(frozen=True)
class Shown:
    """A header that this member checked, and its share of it: None if it was not delivered or did not open."""

    header: bytes
    key: bytes
    """Its sender's."""
    share: bytes | None = field(repr=False)
    complained: bool = False


@dataclass(frozen=True)
class Inspecting:
    """The ticket is known, headers and shares come in. Nothing was signed."""

    round: Round
    serial: int
    shown: Mapping[int, Shown] = field(default_factory=dict)


@dataclass(frozen=True)
class Committed:
    """This member signed one set, and will sign no other for this ticket."""

    round: Round
    serial: int
    seal: bytes
    groups: tuple[tuple[int, ...], ...]
    shares: Mapping[int, bytes | None] = field(repr=False)
    signature: Signed


@dataclass(frozen=True)
class Released:
    """The sums are out, prekey and shares are gone. Whoever shows the certificate is given the same release again."""

    round: Round
    seal: bytes
    release: Signed = field(repr=False)


@dataclass(frozen=True)
class Closed:
    """The ticket ended here without a release, and nothing is left that could make one."""

    round: Round
    reason: str


Session = Inspecting | Committed | Released | Closed


@dataclass(frozen=True)
class MemberState:
    """All that a member keeps. `prekeys` are the secret seeds that are still unspent or in use, by serial."""

    next_serial: int = 0
    prekeys: Mapping[int, bytes] = field(default_factory=dict, repr=False)
    expiry: Mapping[int, int] = field(default_factory=dict)
    """serial -> Unix seconds from which its prekey is erased."""
    bound: Mapping[int, bytes] = field(default_factory=dict)
    """serial -> tid: a prekey serves the first ticket that named it and no other."""
    newest: Mapping[str, tuple[int, bytes]] = field(default_factory=dict)
    """task -> (round, tid) of the newest ticket seen."""
    sessions: Mapping[bytes, Session] = field(default_factory=dict)
    anchors: Anchors = field(default_factory=Anchors)
    """Outlive the sessions: a device that forgot a round does not get it again by waiting."""

    @property
    def spare_prekeys(self) -> int:
        return len(self.prekeys) - len(self.bound)


def offer_prekey(
    state: MemberState, identity: Identity, fleet: bytes, seed: bytes, expires_s: int
) -> tuple[MemberState, Signed]:
    """A fresh prekey, signed for publication.

    seed: 96 fresh secret bytes, used for this prekey alone.  expires_s: Unix seconds; `expire` erases it then.
    """
    if len(seed) != PREKEY_SEED_BYTES:
        raise ParameterError(f"a prekey's seed has {PREKEY_SEED_BYTES} bytes, not {len(seed)}")
    public = Prekey(seed).public
    serial = state.next_serial
    offer = PrekeyOffer(fleet, identity.public_key, serial, public.x25519, public.mlkem, expires_s)
    stored = replace(
        state,
        next_serial=serial + 1,
        prekeys={**state.prekeys, serial: seed},
        expiry={**state.expiry, serial: expires_s},
    )
    return stored, sign(identity, offer)


def step(
    state: MemberState, data: bytes, epoch: FleetEpoch, identity: Identity, now_s: float
) -> tuple[MemberState, bytes | None]:
    """One transition on bytes from outside, and the reply. On an error the old state stands (section 10.2).

    epoch: the newest one, for tickets; a session keeps the epoch that its ticket named.
    Every message may come again: it gives the same reply and changes nothing. Raises PeerError.
    """
    kind, message = unwrap(data)
    if isinstance(message, Signed):
        if kind is Ticket:
            return _on_ticket(state, Round(epoch, message), identity, now_s), None
        if kind is Seal:
            return _on_seal(state, message, identity, now_s)
        if kind is Abort:
            return _on_abort(state, message)
    elif isinstance(message, Delivery):
        return _on_delivery(state, message, identity)
    elif isinstance(message, Certificate):
        return _on_certificate(state, message, identity, now_s)
    raise PeerError(f"{label_of(kind)}: not a message to a member")


def expire(state: MemberState, now_s: float) -> MemberState:
    """Forget every session whose ticket has expired, and erase its prekey; erase offers that nobody used in time.

    What must never be done twice stays impossible: the ticket's round is not newer than `newest`, its prekey is gone.
    The ledger heads stay.
    """
    for tid, session in tuple(state.sessions.items()):
        if now_s >= session.round.ticket.expires_s:
            if isinstance(session, Inspecting | Committed):
                state = _erase(state, session.serial)
            state = replace(state, sessions={t: s for t, s in state.sessions.items() if t != tid})
    for serial, expires_s in tuple(state.expiry.items()):
        if now_s >= expires_s:  # of no ticket, for a ticket ends before the prekeys that it names
            state = _erase(state, serial)
    return state


def forget(state: MemberState, sessions: Collection[bytes], serials: Collection[int]) -> MemberState:
    """Forget what would expire later: sessions that ended, by tid, and offers that serve no ticket, by serial.

    What must never be done twice stays impossible, as after `expire`. Raises ParameterError on a session that goes on
    or an offer that serves one.
    """
    for tid in sessions:
        if isinstance(state.sessions[tid], Inspecting | Committed):
            raise ParameterError("a session that goes on")
    if any(serial in state.bound for serial in serials):
        raise ParameterError("a prekey that serves a ticket")
    if sessions:
        state = replace(state, sessions={t: s for t, s in state.sessions.items() if t not in sessions})
    for serial in serials:
        state = _erase(state, serial)
    return state


def _on_ticket(state: MemberState, round_: Round, identity: Identity, now_s: float) -> MemberState:
    ticket, tid = round_.ticket, round_.tid
    if tid in state.sessions:
        return state
    round_number, newest_tid = state.newest.get(ticket.task, (-1, b""))
    if ticket.round == round_number and newest_tid != tid:
        raise PeerError(f"ticket: a second one for round {ticket.round} of {ticket.task}: the coordinator equivocates")
    if ticket.round < round_number:
        raise PeerError(f"ticket: round {ticket.round} of {ticket.task} is before the newest, {round_number}")
    if ticket.round == round_number + 1 and newest_tid and ticket.previous != newest_tid:
        raise PeerError("ticket: it does not follow the ticket that this member saw before it")
    if now_s >= ticket.expires_s:
        raise PeerError("ticket: it has expired")
    offer = round_.prekeys[_number(round_, identity) - 1]
    if offer.serial in state.bound:
        raise PeerError(f"ticket: prekey {offer.serial} already serves another ticket")
    seed = state.prekeys.get(offer.serial)
    if seed is None:
        raise PeerError(f"ticket: prekey {offer.serial} is spent or was never offered")
    if (offer.x25519, offer.mlkem) != Prekey(seed).public:
        raise PeerError(
            f"ticket: prekey {offer.serial} is not the one that this member holds: its state was rolled back"
        )
    for session in tuple(state.sessions.values()):
        if isinstance(session, Inspecting) and session.round.ticket.task == ticket.task:
            state = _close(state, session, "a later ticket came")
    return replace(
        state,
        bound={**state.bound, offer.serial: tid},
        newest={**state.newest, ticket.task: (ticket.round, tid)},
        sessions={**state.sessions, tid: Inspecting(round_, offer.serial)},
    )


def _on_delivery(state: MemberState, delivery: Delivery, identity: Identity) -> tuple[MemberState, bytes | None]:
    session = _session(state, delivery.tid, "delivery")
    if not isinstance(session, Inspecting):
        raise PeerError(f"delivery: not expected while {type(session).__name__}")
    round_ = session.round
    number = _number(round_, identity)
    prekey = Prekey(state.prekeys[session.serial])
    shown = dict(session.shown)
    fresh: list[Header] = []
    for signed, sealed in delivery.items:
        header = round_.check_header(signed)
        digest = message_hash(Header, signed.body)
        before = shown.get(header.sender)
        if before is not None and before.header != digest:
            raise PeerError(f"delivery: sender {header.sender} signed two contributions")
        if before is not None and (sealed is None or before.share is not None or before.complained):
            continue
        if before is None and len(shown) >= round_.ticket.n_max:
            raise PeerError(f"delivery: more than n_max = {round_.ticket.n_max} contributors")
        if before is None:
            fresh.append(header)
        if sealed is None:
            shown[header.sender] = Shown(digest, header.key, None)
        else:
            share = _open_share(round_, header, sealed, prekey, number)
            shown[header.sender] = Shown(digest, header.key, share, complained=share is None)
    anchors = state.anchors.shown(round_.ticket.task, round_.ticket.round, fresh)
    after = _with_session(replace(state, anchors=anchors), replace(session, shown=shown))
    named = sorted(sender for sender, entry in shown.items() if entry.complained or entry.key in anchors.forked)
    if not named:
        return after, None
    return after, wrap(Complaint, sign(identity, Complaint(delivery.tid, number, named)))


def _open_share(round_: Round, header: Header, sealed: SealedShare, prekey: Prekey, number: int) -> bytes | None:
    """The share's bytes, or None if its sender made one that does not open. Raises PeerError if the share is not the
    one that the sender signed: then whoever delivered it is at fault, and there is nothing to complain about."""
    try:
        check_inclusion(header.shares, round_.thresholds.members, number - 1, sealed.sealed, sealed.proof)
    except PeerError as error:
        raise PeerError(f"delivery: the share of sender {header.sender} is not the one it signed ({error})") from error
    context = share_context(header.tid, header.sender, header.key, number, header.masked)
    try:
        share = prekey.open(header.sealing_key, sealed.sealed, *context)
    except PeerError:
        return None
    values = np.frombuffer(share[: len(share) // 2 * 2], dtype="<u2")
    if len(share) != 2 * round_.thresholds.polynomials or (values >= PRIME).any():
        return None
    return share


def _on_seal(state: MemberState, signed: Signed, identity: Identity, now_s: float) -> tuple[MemberState, bytes | None]:
    seal = verify_author(Seal, signed, lambda s: _coordinator(state, s.tid, "seal"))
    session = _session(state, seal.tid, "seal")
    digest = seal_hash(signed.body)
    if isinstance(session, Committed):
        if session.seal != digest:
            raise PeerError("seal: this member has already signed another set for this ticket")
        return state, wrap(SealSignature, session.signature)
    if not isinstance(session, Inspecting):
        raise PeerError(f"seal: not expected while {type(session).__name__}")
    round_ = session.round
    if now_s >= round_.ticket.expires_s:
        raise PeerError("seal: the ticket has expired")
    if state.newest[round_.ticket.task][1] != seal.tid:
        raise PeerError("seal: a later ticket of this task was seen")
    round_.check_partition(seal)
    for entries in seal.groups:
        for sender, header in entries:
            shown = session.shown.get(sender)
            if shown is None or shown.header != header:
                raise PeerError(f"seal: the header of sender {sender} was not shown to this member")
            if shown.key in state.anchors.forked:
                raise PeerError(f"seal: the ledger of sender {sender} was rolled back, or its device cloned")
    signature = sign(identity, SealSignature(seal.tid, digest, _number(round_, identity)))
    groups = tuple(tuple(sender for sender, _ in entries) for entries in seal.groups)
    shares = {sender: session.shown[sender].share for group in groups for sender in group}
    committed = Committed(round_, session.serial, digest, groups, shares, signature)
    return _with_session(state, committed), wrap(SealSignature, signature)


def _on_certificate(
    state: MemberState, certificate: Certificate, identity: Identity, now_s: float
) -> tuple[MemberState, bytes | None]:
    session = _session(state, certificate.tid, "certificate")
    if not isinstance(session, Committed | Released):
        raise PeerError(f"certificate: not expected while {type(session).__name__}")
    if certificate.seal != session.seal:
        raise PeerError("certificate: it is over another set than the one that this member signed")
    check_certificate(session.round, certificate)
    if isinstance(session, Released):
        return state, wrap(Release, session.release)
    if now_s >= session.round.ticket.expires_s:
        raise PeerError("certificate: the ticket has expired")
    sums = [_sum_shares([session.shares[sender] for sender in group]) for group in session.groups]
    release = sign(identity, Release(certificate.tid, session.seal, _number(session.round, identity), sums))
    after = _erase(state, session.serial)
    return _with_session(after, Released(session.round, session.seal, release)), wrap(Release, release)


def _sum_shares(shares: list[bytes | None]) -> bytes | None:
    total: np.ndarray[tuple[int], np.dtype[np.int64]] | None = None
    for share in shares:
        if share is None:
            return None
        values = np.frombuffer(share, dtype="<u2").astype(np.int64)
        total = values if total is None else total + values
    return None if total is None else (total % PRIME).astype("<u2").tobytes()


def _on_abort(state: MemberState, signed: Signed) -> tuple[MemberState, None]:
    abort = verify_author(Abort, signed, lambda a: _coordinator(state, a.tid, "abort"))
    session = _session(state, abort.tid, "abort")
    if isinstance(session, Inspecting | Committed):
        state = _close(state, session, abort.reason)
    return state, None


def check_certificate(round_: Round, certificate: Certificate) -> None:
    """Return if Q distinct members signed the certificate's seal, else raise PeerError."""
    numbers = [number for number, _ in certificate.signatures]
    if len(set(numbers)) != len(numbers):
        raise PeerError("certificate: a member is counted twice")
    if len(numbers) < round_.thresholds.quorum:
        raise PeerError(f"certificate: {len(numbers)} signatures, {round_.thresholds.quorum} needed")
    for number, signature in certificate.signatures:
        body = encode(SealSignature(round_.tid, certificate.seal, number))
        check_signature(round_.epoch.member_key(number), label_of(SealSignature), body, signature)


def _session(state: MemberState, tid: bytes, subject: str) -> Session:
    session = state.sessions.get(tid)
    if session is None:
        raise PeerError(f"{subject}: for a ticket that this member does not know")
    return session


def _coordinator(state: MemberState, tid: bytes, subject: str) -> bytes:
    """The key that signs for this ticket: its own epoch's, though a later epoch may have begun."""
    return _session(state, tid, subject).round.epoch.frozen.coordinator


def _number(round_: Round, identity: Identity) -> int:
    try:
        return round_.epoch.member_number(identity.public_key)
    except ParameterError as error:
        raise PeerError(f"ticket: {error}") from error


def _with_session(state: MemberState, session: Session) -> MemberState:
    return replace(state, sessions={**state.sessions, session.round.tid: session})


def _close(state: MemberState, session: Inspecting | Committed, reason: str) -> MemberState:
    return _with_session(_erase(state, session.serial), Closed(session.round, reason))


def _erase(state: MemberState, serial: int) -> MemberState:
    """The state without this prekey's secret. That it was spent follows from its serial being below next_serial."""
    return replace(
        state,
        prekeys={s: seed for s, seed in state.prekeys.items() if s != serial},
        expiry={s: when for s, when in state.expiry.items() if s != serial},
        bound={s: tid for s, tid in state.bound.items() if s != serial},
    )
