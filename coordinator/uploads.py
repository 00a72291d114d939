"""A contribution's way from its offer to its receipt (docs/services.md sections 3 and 4).

An offer is looked at before it is given memory, and looked at again when it is whole: the round may have ended
meanwhile. Whoever is refused for good is told so, since a device keeps its contribution until it knows what became of
it; and whoever asks again after a contribution was taken gets its receipt again.
"""

from __future__ import annotations

from collections.abc import Mapping

from coordinator import events
from coordinator.arrivals import Arrival, Arrivals
from coordinator.batch import Batch
from coordinator.heads import Heads
from coordinator.live import LiveRound
from coordinator.mail import Mail
from coordinator.rows import DeviceRow
from coordinator.store import Store
from edge_sdk.crypto.identity import Identity
from edge_sdk.errors import PeerError, RoundAborted
from edge_sdk.protocol import aggregator, messages
from edge_sdk.protocol.aggregator import Collecting
from edge_sdk.protocol.anchors import LedgerForked
from edge_sdk.protocol.contributor import Contribution
from edge_sdk.protocol.messages import Header, Receipt, Signed, message_hash, wrap
from edge_sdk.transport.wire import Down, Letter, Refusal, Upload, encode_frame


class Uploads:
    """Takes contributions into rounds. Answers leave when what they say is on disk: they are the mail's, not sent."""

    def __init__(
        self,
        store: Store,
        identity: Identity,
        rounds: Mapping[bytes, LiveRound],
        *,
        arrivals: Arrivals,
        heads: Heads,
        batch: Batch,
        mail: Mail,
    ) -> None:
        """identity: the coordinator's.  rounds: those that run, by tid; looked at anew each time."""
        self._store, self._identity, self._rounds = store, identity, rounds
        self._arrivals, self._heads, self._batch, self._mail = arrivals, heads, batch, mail

    def offer(self, device: DeviceRow, frame: Upload, now_s: float) -> None:
        """A device has a contribution: it waits for memory, or is answered at once.

        Raises RoundAborted if the round takes none of it now, PeerError if the offer is not an honest one.
        """
        header = messages.decode(Header, frame.header.body)
        digest = message_hash(Header, frame.header.body)
        if header.key != device.key:
            raise PeerError("upload: its header names another device")
        name, live = device.key.hex(), self._rounds.get(header.tid)
        if self._receipt_again(name, header, digest, live):
            return
        refusal = _why_not(device, live, now_s)
        if refusal is not None:
            self._arrivals.end(name, frame.blob.id)
            self._answer(name, Refusal(digest, refusal, final=True))
            raise RoundAborted(f"upload: {refusal}")
        if live is not None and frame.blob.size != live.upload_bytes:
            self._answer(name, Refusal(digest, "the upload has not the ticket's size", final=True))
            raise PeerError(f"upload: {frame.blob.size} bytes instead of {live.upload_bytes}")
        if live is None or self._arrivals.holds(name, frame.blob.id):
            checked = None  # and not needed: the header that came first stays
        else:
            try:
                checked = live.round.check_header(frame.header)  # memory is for those who may contribute
            except PeerError as error:
                self._answer(name, Refusal(digest, str(error)[:512], final=True))
                raise
        self._arrivals.ask(name, frame.blob, frame.header, header.tid, now_s, checked=checked)

    def take(
        self, device: DeviceRow, arrival: Arrival, signed: Signed, upload: memoryview, now_s: float
    ) -> Header | None:
        """A whole upload: into the round, or back with the reason.

        signed: the header that it was offered with.  upload: the arrival's content; the arrival is told for how long it
        is read. Returns the header, or None if the round has had this contribution already.
        Raises RoundAborted and PeerError as `offer` does; LedgerForked is kept for good.
        """
        header = messages.decode(Header, signed.body)
        digest = message_hash(Header, signed.body)
        name, live = device.key.hex(), self._rounds.get(header.tid)
        refusal = _why_not(device, live, now_s)
        if live is not None and refusal is None and len(upload) != live.upload_bytes:
            refusal = "the upload has not the ticket's size"
        if live is None or refusal is not None:
            refusal = refusal or "the round has ended"
            self._answer(name, Refusal(digest, refusal, final=True))
            raise RoundAborted(f"upload: {refusal}")
        contribution = Contribution(signed, upload[: live.masked_bytes], bytes(upload[live.masked_bytes :]))  # type: ignore[arg-type]
        try:
            accepted = aggregator.accept(
                live.state, contribution, self._identity, now_s, self._heads.anchors, checked=arrival.checked
            )
        except LedgerForked:
            self._batch.write(self._heads.keep_fork(live.round.ticket, header, signed))
            self._answer(name, Refusal(digest, "its ledger was rolled back or cloned: enrol it anew", final=True))
            raise
        except (PeerError, RoundAborted) as error:
            if isinstance(error, PeerError) and arrival.recheck():
                raise PeerError("upload: chunks were damaged under way, and are asked for again") from error
            self._answer(name, Refusal(digest, str(error)[:512], final=True))
            raise
        if accepted.shares is None or not isinstance(accepted.state, Collecting):
            self._answer(name, Letter(accepted.receipt))
            return None
        live.state = accepted.state
        row, arrival.is_free = live.take(header.sender, live.state.entries[header.sender], upload, accepted.shares)
        self._batch.take(live, row)
        self._heads.note(header, signed)
        ticket = live.round.ticket
        if len(live.slots) >= ticket.n_max:
            live.full_at_s = now_s
        self._batch.say(events.Contributed(ticket.task, ticket.round, name, len(live.slots), arrival.ref.size))
        self._answer(name, Letter(accepted.receipt))
        return header

    def _receipt_again(self, device: str, header: Header, digest: bytes, live: LiveRound | None) -> bool:
        """Answer with the receipt if this contribution was taken, also after the round: the first may be lost.

        Raises PeerError if another one of this sender was.
        """
        taken = live.digests.get(header.sender) if live is not None else self._taken(header)
        if taken is None:
            return False
        if taken != digest:
            self._answer(device, Refusal(digest, "another contribution of this device was taken", final=True))
            raise PeerError(f"upload: sender {header.sender} already sent another one in this round")
        receipt = messages.sign(self._identity, Receipt(header.tid, header.sender, digest))
        self._answer(device, Letter(wrap(Receipt, receipt)))
        return True

    def _taken(self, header: Header) -> bytes | None:
        with self._store.reading() as t:
            return t.contribution_of(header.tid, header.sender)

    def _answer(self, device: str, frame: Down) -> None:
        self._mail.answer(device, encode_frame(frame))


def _why_not(device: DeviceRow, live: LiveRound | None, now_s: float) -> str | None:
    """Why this round takes no contribution of this device now, for people, or None."""
    if live is None:
        return "the round has ended, or never was"
    if not isinstance(live.state, Collecting) or now_s >= live.round.ticket.closes_s:
        return "the round has closed"
    if len(live.state.entries) >= live.round.ticket.n_max:
        return f"the round has its {live.round.ticket.n_max} contributions"
    if not live.task.admits(device):
        return "this device does not bear the task's tags"
    return None
