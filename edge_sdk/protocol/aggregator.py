"""The coordinator's half: collect, seal, certify, open (docs/protocol.md section 11).

Open -> Collecting -> Sealed -> Certified -> Answered -> Done | Aborted. The caller commits the new state before it
announces anything. Masked vectors and sealed shares are not in the state: they belong on disk, and the running sums
with the set of senders that they include.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_sdk.crypto.hashing import content_hash
from edge_sdk.crypto.identity import Identity
from edge_sdk.crypto.shamir import PRIME
from edge_sdk.errors import ParameterError, PeerError, RoundAborted
from edge_sdk.protocol.anchors import Anchors
from edge_sdk.protocol.contributor import Contribution
from edge_sdk.protocol.messages import (
    Abort,
    Certificate,
    Complaint,
    GroupResult,
    Header,
    Receipt,
    Release,
    Seal,
    SealedShare,
    SealSignature,
    Signed,
    Transcript,
    label_of,
    message_hash,
    sign,
    unwrap,
    verify_author,
    wrap,
)
from edge_sdk.protocol.opening import GroupSum, open_group
from edge_sdk.protocol.rounds import Round, seal_hash, split_shares


@dataclass(frozen=True)
class Entry:
    """One accepted contribution, without its bulk."""

    header: Signed
    digest: bytes
    group: int


@dataclass(frozen=True)
class Collecting:
    """The ticket is out and contributions come in. The phase is called OPEN until the first one has."""

    round: Round
    entries: Mapping[int, Entry] = field(default_factory=dict)
    complaints: Mapping[int, frozenset[int]] = field(default_factory=dict)
    """member -> senders whose share did not open for it."""


@dataclass(frozen=True)
class Sealed:
    """The set is fixed. Members' signatures come in."""

    round: Round
    entries: Mapping[int, Entry]
    seal: Signed
    digest: bytes
    groups: tuple[tuple[int, ...], ...]
    signatures: Mapping[int, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Certified:
    """Q members signed: from here on the sums count as known. Members' summed shares come in."""

    round: Round
    entries: Mapping[int, Entry]
    seal: Signed
    digest: bytes
    groups: tuple[tuple[int, ...], ...]
    certificate: Certificate
    answers: Mapping[int, tuple[bytes | None, ...]] = field(default_factory=dict, repr=False)

    def answers_of(self, group: int) -> dict[int, NDArray[np.int64]]:
        """Member number -> its summed shares of the group, of the members that could give one."""
        return {
            member: np.frombuffer(value, dtype="<u2").astype(np.int64)
            for member, sums in self.answers.items()
            if (value := sums[group]) is not None
        }

    @property
    def openable(self) -> bool:
        """RELEASED: every group that is not empty has the R answers that may open it."""
        needed = self.round.thresholds.answers
        return all(len(self.answers_of(g)) >= needed for g, senders in enumerate(self.groups) if senders)


@dataclass(frozen=True)
class Done:
    """Every group ended: with a sum, or with a reason."""

    round: Round
    sums: Mapping[int, GroupSum]
    reasons: Mapping[int, str]
    transcript: Signed


@dataclass(frozen=True)
class Aborted:
    """The round ended without a sum."""

    round: Round
    reason: str
    notice: Signed


State = Collecting | Sealed | Certified | Done | Aborted


def phase(state: State) -> str:
    """The name of the state in docs/protocol.md: OPEN, COLLECT, SEALED, CERTIFIED, RELEASED, DONE or ABORTED."""
    if isinstance(state, Collecting):
        return "COLLECT" if state.entries else "OPEN"
    if isinstance(state, Certified):
        return "RELEASED" if state.openable else "CERTIFIED"
    return type(state).__name__.upper()


class Accepted(NamedTuple):
    """A contribution was taken. The caller stores the blobs and the state, then sends the receipt."""

    state: State
    receipt: bytes
    shares: tuple[SealedShare, ...] | None
    """By member, each with its proof; None if the contribution had been taken before: there is nothing to add."""


NO_ANCHORS = Anchors()


def accept(
    state: State,
    contribution: Contribution,
    coordinator: Identity,
    now_s: float,
    anchors: Anchors = NO_ANCHORS,
    *,
    checked: Header | None = None,
) -> Accepted:
    """Check a contribution whole and take it. The same one again gives the same receipt.

    anchors: of the headers taken in earlier rounds. Members refuse a set with a device whose ledger was rolled back; a
    coordinator that refuses the device first loses no round to it, and tells it at once. On LedgerForked, a PeerError,
    the caller keeps `anchors.shown` with this header too: the members never see it, and the device stays out.
    checked: what `state.round.check_header` gave for exactly this header, from a caller that asked before it took the
    upload: a signature need not be verified twice.
    Raises PeerError that names what is wrong with it, RoundAborted if it comes late or over n_max.
    """
    round_ = state.round
    header = round_.check_header(contribution.header) if checked is None else checked
    digest = message_hash(Header, contribution.header.body)
    receipt = sign(coordinator, Receipt(round_.tid, header.sender, digest))
    before = state.entries.get(header.sender) if isinstance(state, Collecting | Sealed | Certified) else None
    if before is not None:
        if before.digest != digest:
            raise PeerError(f"contribution: sender {header.sender} already sent another one in this round")
        return Accepted(state, wrap(Receipt, receipt), None)  # also after the seal: the first receipt may be lost
    if not isinstance(state, Collecting):
        raise RoundAborted(f"contribution of sender {header.sender}: the round is {phase(state)}")
    if now_s >= round_.ticket.closes_s:
        raise RoundAborted(f"contribution of sender {header.sender}: the round has closed")
    if len(state.entries) >= round_.ticket.n_max:
        raise RoundAborted(f"contribution of sender {header.sender}: the round has its {round_.ticket.n_max}")
    anchors.check(round_.ticket.task, round_.ticket.round, header)
    round_.layout.from_bytes(contribution.masked)
    if content_hash(contribution.masked) != header.masked:
        raise PeerError(f"contribution: the masked vector of sender {header.sender} is not the one its header binds")
    shares = split_shares(round_, header, contribution.shares)
    entry = Entry(contribution.header, digest, header.group)
    return Accepted(replace(state, entries={**state.entries, header.sender: entry}), wrap(Receipt, receipt), shares)


def step(state: State, data: bytes) -> State:
    """One transition on a member's bytes. On an error the old state stands; the same message again changes nothing.

    Raises PeerError on anything that is not due now.
    """
    kind, message = unwrap(data)
    if isinstance(message, Signed):
        if kind is Complaint and isinstance(state, Collecting):
            return _on_complaint(state, message)
        if kind is SealSignature and isinstance(state, Sealed | Certified):
            return _on_signature(state, message)
        if kind is Release and isinstance(state, Certified):
            return _on_release(state, message)
    raise PeerError(f"{label_of(kind)}: not expected while {phase(state)}")


def _on_complaint(state: Collecting, signed: Signed) -> Collecting:
    round_ = state.round
    complaint = verify_author(Complaint, signed, lambda c: round_.epoch.member_key(c.member))
    _check_tid(round_, complaint.tid, "complaint")
    unknown = set(complaint.senders) - set(state.entries)
    if unknown:
        raise PeerError(f"complaint: sender {min(unknown)} has not contributed")
    named = state.complaints.get(complaint.member, frozenset()) | set(complaint.senders)
    return replace(state, complaints={**state.complaints, complaint.member: named})


def excluded(state: Collecting, *, proved: bool = False) -> frozenset[int]:
    """Senders that complaints leave out of the seal: more than c members name them, or one that names few.

    More than c complaints hold an honest one.  proved: only those. A shorter list may be a corrupt member's that frames
    senders; but an honest one names corrupt senders only, so no more than may be corrupt, and such a list is believed.
    Nobody is blamed either way: a complaint is no proof (docs/decisions/0005-complaints.md).
    """
    thresholds, corrupt = state.round.thresholds, state.round.epoch.frozen.corrupt_devices
    counts: dict[int, int] = {}
    believed: set[int] = set()
    for senders in state.complaints.values():
        for sender in senders:
            counts[sender] = counts.get(sender, 0) + 1
        if len(senders) <= corrupt and not proved:
            believed |= senders
    return frozenset(believed | {sender for sender, count in counts.items() if count > thresholds.corrupt})


def seal(state: Collecting, coordinator: Identity, now_s: float) -> Sealed | Aborted:
    """Fix the set S and its partition: at the deadline, or earlier once n_max contributions are in.

    A group below h + F is left out; if every group is, the round is aborted, which reveals nothing.
    Raises ParameterError before the deadline while there is room.
    """
    round_ = state.round
    if now_s < round_.ticket.closes_s and len(state.entries) < round_.ticket.n_max:
        raise ParameterError("the round is still open: seal at its deadline or at n_max")
    left_out = excluded(state)
    groups = _partition(state, left_out)
    if not any(groups):
        # Believed complaints may shrink a round but not end it: then only what is sure counts.
        left_out = excluded(state, proved=True)
        groups = _partition(state, left_out)
    if not any(groups):
        came = len(state.entries) - len(left_out)
        return abort(
            state, coordinator, f"no group has {round_.min_group} contributors: {came} came to {round_.groups} groups"
            + (f", {len(left_out)} more were left out" if left_out else "")
        )  # fmt: skip
    signed = sign(coordinator, Seal(round_.tid, groups))
    members = tuple(tuple(sender for sender, _ in group) for group in groups)
    kept = {sender: state.entries[sender] for group in members for sender in group}
    return Sealed(round_, kept, signed, seal_hash(signed.body), members)


def _partition(state: Collecting, left_out: frozenset[int]) -> list[list[tuple[int, bytes]]]:
    """The contributions that stay, (sender, header hash) ascending by group; groups below h + F are emptied."""
    groups: list[list[tuple[int, bytes]]] = [[] for _ in range(state.round.groups)]
    for sender in sorted(set(state.entries) - left_out):
        entry = state.entries[sender]
        groups[entry.group].append((sender, entry.digest))
    return [group if len(group) >= state.round.min_group else [] for group in groups]


def _on_signature(state: Sealed | Certified, signed: Signed) -> Sealed | Certified:
    round_ = state.round
    statement = verify_author(SealSignature, signed, lambda s: round_.epoch.member_key(s.member))
    _check_tid(round_, statement.tid, "sealsignature")
    if statement.seal != state.digest:
        raise PeerError(f"sealsignature: member {statement.member} signed another set")
    if isinstance(state, Certified):
        return state
    signatures = {**state.signatures, statement.member: signed.signature}
    if len(signatures) < round_.thresholds.quorum:
        return replace(state, signatures=signatures)
    certificate = Certificate(round_.tid, state.digest, sorted(signatures.items()))
    return Certified(round_, state.entries, state.seal, state.digest, state.groups, certificate)


def _on_release(state: Certified, signed: Signed) -> Certified:
    round_ = state.round
    release = verify_author(Release, signed, lambda r: round_.epoch.member_key(r.member))
    _check_tid(round_, release.tid, "release")
    if release.seal != state.digest:
        raise PeerError(f"release: member {release.member} answers for another set")
    if len(release.sums) != len(state.groups):
        raise PeerError(f"release: {len(release.sums)} groups instead of {len(state.groups)}")
    for group, value in enumerate(release.sums):
        if value is None:
            continue
        if not state.groups[group]:
            raise PeerError(f"release: group {group} is empty")
        if len(value) != 2 * round_.thresholds.polynomials:
            raise PeerError(f"release: group {group} has {len(value)} bytes")
        if (np.frombuffer(value, dtype="<u2") >= PRIME).any():
            raise PeerError(f"release: group {group} holds a value that is not below {PRIME}")
    before = state.answers.get(release.member)
    if before is not None and before != tuple(release.sums):
        raise PeerError(f"release: member {release.member} answered differently before")
    return replace(state, answers={**state.answers, release.member: tuple(release.sums)})


def open_round(
    state: Certified, sums: Mapping[int, NDArray[np.uint32]], coordinator: Identity, *, final: bool
) -> Certified | Done:
    """Open every group that can be opened.

    sums: group -> uint32 (blocks, 2048), the sum modulo 2^32 of the masked vectors of exactly `state.groups[group]`.
    final: no further answer will come (all members answered, or the ticket expired). Before that, a group that fails
    leaves the state as it is: another answer may repair it. Afterwards it ends with its reason, and the others stand.
    """
    # Deterministic, so that a restart searches the same way, and unknown to every member.
    seed = coordinator.sign("subsets", state.digest)
    opened: dict[int, GroupSum] = {}
    reasons: dict[int, str] = {}
    for group, senders in enumerate(state.groups):
        if not senders:
            reasons[group] = "too few contributors: left out"
            continue
        try:
            opened[group] = open_group(state.round, len(senders), sums[group], state.answers_of(group), seed)
        except RoundAborted as error:
            if not final:
                return state
            reasons[group] = str(error)
    results = [
        GroupResult(len(senders), content_hash(opened[g].values.astype("<u4").tobytes()) if g in opened else None,
                    reasons.get(g, ""))
        for g, senders in enumerate(state.groups)
    ]  # fmt: skip
    transcript = Transcript(state.round.tid, state.digest, state.certificate, results)
    return Done(state.round, opened, reasons, sign(coordinator, transcript))


def abort(state: Collecting | Sealed, coordinator: Identity, reason: str) -> Aborted:
    """End the round before its certificate. Afterwards it can only be opened: the sums count as known.

    Raises ParameterError in any other state.
    """
    if not isinstance(state, Collecting | Sealed):
        raise ParameterError(f"a round that is {phase(state)} cannot be aborted: its sums count as known")
    return Aborted(state.round, reason, sign(coordinator, Abort(state.round.tid, reason[:512])))


def sum_masked(round_: Round, vectors: Iterable[bytes]) -> NDArray[np.uint32]:
    """The sum modulo 2^32 of masked vectors, uint32 (blocks, 2048). One vector is in memory at a time."""
    total = np.zeros((round_.layout.blocks, 2048), dtype=np.uint32)
    for vector in vectors:
        total += round_.layout.from_bytes(vector)
    return total


def _check_tid(round_: Round, tid: bytes, subject: str) -> None:
    if tid != round_.tid:
        raise PeerError(f"{subject}: it is for another ticket")
