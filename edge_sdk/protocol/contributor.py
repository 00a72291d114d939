"""The data-holding device: one turn per round (docs/protocol.md section 9).

Idle -> Training -> Sent -> Idle. The state is per task; the caller stores it with `Sent.contribution` before it sends
a byte, and sends those same bytes again until a receipt comes. A second vector under the same mask would show the
difference of the two, so there is no way back from Sent to another contribution of the round.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_sdk.crypto import masks
from edge_sdk.crypto.hashing import content_hash, derive_key
from edge_sdk.crypto.identity import Identity
from edge_sdk.crypto.merkle import merkle_root
from edge_sdk.crypto.sealing import Encapsulate, Sealer
from edge_sdk.crypto.stream import KeyStream
from edge_sdk.errors import ParameterError, PeerError, RoundAborted
from edge_sdk.protocol.authority import FIRST, FleetEpoch
from edge_sdk.protocol.messages import (
    Abort,
    Anchor,
    Header,
    Receipt,
    Signed,
    Ticket,
    label_of,
    message_hash,
    sign,
    unwrap,
    verify,
)
from edge_sdk.protocol.rounds import Round, prekey_public, share_context

ENTROPY_BYTES = 32


class Contribution(NamedTuple):
    """What goes out, as it goes out: the signed header, the masked vector and the sealed shares one after the other."""

    header: Signed
    masked: bytes
    shares: bytes

    @property
    def size(self) -> int:
        """Bytes on the wire without the transport's own."""
        return len(self.header.body) + len(self.header.signature) + len(self.masked) + len(self.shares)


@dataclass(frozen=True)
class Enrolled:
    """This device in this epoch: its identity, its place in the roster and the proof of it."""

    identity: Identity
    index: int
    proof: tuple[bytes, ...]


@dataclass(frozen=True)
class Terms:
    """What this device insists on, whatever a ticket says (its policy; the ledger is another module's)."""

    bundle: bytes
    """Hash of the one bundle that is registered for the task."""
    min_honest: int = 2
    min_noise_multiplier: float = 0.0
    """Smallest noise of a group's sum over what one unit adds to it, metrics too, both in weight units and before
    rounding. Steps alone would bound nothing: the ticket also says how large a step is."""
    dimension: int | None = None
    """Integers that this device's vector for the bundle has; None leaves it to the caller."""

    def check(self, round_: Round) -> None:
        """Return if this device takes part on these terms, else raise PeerError."""
        ticket = round_.ticket
        if ticket.bundle != self.bundle:
            raise PeerError(f"ticket: bundle {ticket.bundle.hex()[:16]} is not the one registered for {ticket.task}")
        if self.dimension is not None and ticket.dimension != self.dimension:
            raise PeerError(f"ticket: dimension {ticket.dimension}, but the bundle's vector has {self.dimension}")
        if ticket.honest < self.min_honest:
            raise PeerError(
                f"ticket: a cohort of {ticket.honest} honest devices is below this device's {self.min_honest}"
            )
        noise = ticket.noise
        # The metrics' coordinates: four at most of up to 1, the loss of up to its bound.
        adds = math.hypot(noise.clip, noise.metric_scale * math.hypot(math.sqrt(3), noise.loss_bound))
        multiplier = noise.sigma * noise.granularity / adds
        if not multiplier >= self.min_noise_multiplier:
            raise PeerError(
                f"ticket: noise of {multiplier:.3g} times what one unit adds is below this device's floor of "
                f"{self.min_noise_multiplier}"
            )


@dataclass(frozen=True)
class Idle:
    """Between rounds. `round` and `tid` are the last ticket's that was taken for this task, whatever became of it."""

    task: str
    round: int = -1
    tid: bytes = FIRST

    def on_ticket(self, round_: Round, terms: Terms, now_s: float) -> Training:
        """Take a ticket. One per (task, round), rounds only go up, adjacent rounds are chained by hash.

        Raises PeerError if the ticket breaks that or the device's terms, RoundAborted if it closed.
        """
        ticket = round_.ticket
        if ticket.task != self.task:
            raise PeerError(f"ticket: it is for task {ticket.task}, not {self.task}")
        if ticket.round <= self.round:
            kind = "the same round again" if ticket.round == self.round else "a round before the last one"
            raise PeerError(f"ticket: round {ticket.round} is {kind}")
        if ticket.round == self.round + 1 and ticket.previous != self.tid:
            raise PeerError("ticket: it does not follow the ticket that this device saw before it")
        terms.check(round_)
        if now_s >= ticket.closes_s:
            raise RoundAborted(f"round {ticket.round} of {ticket.task} has closed")
        return Training(round_)


@dataclass(frozen=True)
class Training:
    """A ticket was taken; the device trains. Nothing secret exists yet."""

    round: Round

    def contribute(
        self,
        integers: NDArray[np.generic],
        device: Enrolled,
        ledger: Anchor,
        entropy: bytes,
        encapsulate: Encapsulate,
        now_s: float,
    ) -> Sent:
        """Mask `integers` (dimension,), share the mask's secret with the committee, sign.

        ledger: the head of this device's ledger, in which this ticket has its entry.
        entropy: 32 fresh secret bytes; the caller forgets them. Everything secret is derived from them together with
        the ticket, the device and the message, so that even repeated entropy masks no two messages alike.
        encapsulate: `sealing.encapsulate`, which draws its own coins.
        Raises ParameterError on a wrong shape, type or length, RoundAborted if the round closed while training.
        """
        ticket, tid = self.round.ticket, self.round.tid
        if len(entropy) != ENTROPY_BYTES:
            raise ParameterError(f"a contribution takes {ENTROPY_BYTES} bytes of entropy, not {len(entropy)}")
        if now_s >= ticket.closes_s:
            raise RoundAborted(f"round {ticket.round} of {ticket.task} closed while this device trained")
        message = self.round.layout.encode(integers)
        seed = contribution_seed(entropy, tid, device.identity.public_key, message)
        secret = masks.expand_secret(seed, tid)
        masks.add_mask(message, secret, seed, tid)
        masked = message.astype("<u4", copy=False).tobytes()
        masked_hash = content_hash(masked)
        values = self.round.thresholds.sharing.share(secret, KeyStream(derive_key(seed, "sharing", tid)))
        rows = values.astype("<u2")
        sealer = Sealer(derive_key(seed, "sealing key", tid), encapsulate)
        shares = [
            sealer.seal(
                prekey_public(offer),
                rows[number - 1].tobytes(),
                *share_context(tid, device.index, device.identity.public_key, number, masked_hash),
            )
            for number, offer in enumerate(self.round.prekeys, start=1)
        ]
        header = Header(
            tid=tid,
            sender=device.index,
            key=device.identity.public_key,
            enrolment=list(device.proof),
            group=self.round.epoch.group_of(device.index, self.round.groups),
            sealing_key=sealer.public_key,
            masked=masked_hash,
            shares=merkle_root(shares),
            ledger=ledger,
        )
        return Sent(self.round, device.index, Contribution(sign(device.identity, header), masked, b"".join(shares)))

    def give_up(self) -> Idle:
        """Leave the round without a contribution. The ticket stays taken: this round is not entered again."""
        return Idle(self.round.ticket.task, self.round.ticket.round, self.round.tid)


@dataclass(frozen=True)
class Sent:
    """The contribution exists and is the only one of this round. Its secrets are gone."""

    round: Round
    sender: int
    contribution: Contribution = field(repr=False)

    def on_receipt(self, signed: Signed) -> Idle:
        """The coordinator holds the contribution durably: forget it. Raises PeerError if the receipt is not for it."""
        receipt = verify(Receipt, self.round.epoch.frozen.coordinator, signed)
        if receipt.tid != self.round.tid or receipt.sender != self.sender:
            raise PeerError("receipt: it is for another round or sender")
        if receipt.header != message_hash(Header, self.contribution.header.body):
            raise PeerError("receipt: it names another contribution: this identity is in use twice")
        return self.give_up()

    def give_up(self) -> Idle:
        """Stop trying to deliver, for example after the round closed."""
        return Idle(self.round.ticket.task, self.round.ticket.round, self.round.tid)


def contribution_seed(entropy: bytes, tid: bytes, sender: bytes, message: NDArray[np.uint32]) -> bytes:
    """32 secret bytes for one message of one sender in one round (section 9.1).

    message: the scaled message, uint32 (blocks, 2048), not yet masked.  A cloned image whose generator repeats itself,
    or a caller that stored its entropy, would otherwise send two messages under one mask: their difference would show.
    """
    content = content_hash(message.astype("<u4", copy=False).reshape(-1).data)
    return derive_key(entropy, "contribution", tid, sender, content)


State = Idle | Training | Sent


def step(state: State, data: bytes, epoch: FleetEpoch, terms: Terms, now_s: float) -> State:
    """One transition on bytes from outside. On an error the old state stands (docs/protocol.md section 9.2).

    Raises PeerError on anything that is not due now, RoundAborted on a ticket that has closed.
    """
    kind, message = unwrap(data)
    if isinstance(message, Signed):
        if isinstance(state, Idle) and kind is Ticket:
            return state.on_ticket(Round(epoch, message), terms, now_s)
        if isinstance(state, Sent) and kind is Receipt:
            return state.on_receipt(message)
        if isinstance(state, Training | Sent) and kind is Abort:
            check_abort(state.round, message)
            return state.give_up()
    raise PeerError(f"{label_of(kind)}: not expected while {type(state).__name__}")


def check_abort(round_: Round, signed: Signed) -> Abort:
    """The coordinator's abort of this round, or PeerError."""
    abort = verify(Abort, round_.epoch.frozen.coordinator, signed)
    if abort.tid != round_.tid:
        raise PeerError("abort: it is for another ticket")
    return abort
