"""A device's time at the network: what comes is checked and handled, what is due is done (docs/device.md).

Frames may be lost, repeated or overtaken; everything here may be asked again. What must not be forgotten is in the
store before anything that follows from it is sent. A frame that breaks the protocol is dropped with a warning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from edge_sdk import events
from edge_sdk.clock import Clock, Repeat
from edge_sdk.contributing import Contributing
from edge_sdk.crypto.hashing import content_hash
from edge_sdk.crypto.identity import Identity
from edge_sdk.delivering import Deliveries
from edge_sdk.errors import ParameterError, PeerError
from edge_sdk.fetching import Fetches
from edge_sdk.models import Models
from edge_sdk.protocol.authority import FleetEpoch
from edge_sdk.protocol.contributor import Enrolled, Sent
from edge_sdk.protocol.member import Closed, Committed, Inspecting, Released
from edge_sdk.protocol.messages import (
    MAX_BODY_BYTES,
    MAX_MESSAGE_BYTES,
    Abort,
    Complaint,
    Receipt,
    Signed,
    Ticket,
    decode,
    message_hash,
    unwrap,
    verify,
    wrap,
)
from edge_sdk.reporting import Reporting
from edge_sdk.rounds import Rounds
from edge_sdk.rules import RulesFile
from edge_sdk.serving import Serving
from edge_sdk.store import Store
from edge_sdk.transport import Connected, Lost, Transport
from edge_sdk.transport.chunks import Blob, parcel_of
from edge_sdk.transport.wire import (
    BlobRef,
    Chunk,
    Enrolment,
    Gone,
    Hello,
    Leaving,
    Letter,
    Model,
    Parcel,
    Position,
    Prekeys,
    Pull,
    TaskState,
    Up,
    Welcome,
    decode_down,
    encode_frame,
)

T = TypeVar("T")

AGAIN_S = 5.0
"""A round whose model could not be fetched, for want of disk, is tried again after so long, or when a frame comes."""

HEARTBEAT_S = 120.0
"""A Hello at least so often: whatever news the network lost is then told again."""
LOOK_S = 0.05
"""Between two looks at the network while it trains."""
SKEW_S = 300.0
"""A clock that is off by more is worth a warning: tickets would look closed, or certificates not yet valid."""
FRAMES_AT_ONCE = 256
"""Between two looks at everything else: whoever floods a device must not keep it from training."""
_MAX_LETTERS = 16
_MAX_REPLIES = 8


@dataclass
class _News:
    """What of a Welcome is not taken in yet: parts of it may be blobs that are on their way."""

    epoch: Parcel | None
    enrolment: Enrolment | None
    tasks: list[TaskState]


@dataclass
class Parts:
    """What a loop is made of."""

    identity: Identity
    fleet: bytes
    coordinator: bytes
    store: Store
    serving: Serving
    tasks: dict[str, Contributing]
    rules: RulesFile
    transport: Transport
    fetches: Fetches
    max_bundle_bytes: int
    would_serve: bool
    clock: Clock
    jitter: Callable[[], float]
    conditions: Callable[[], str | None]
    emit: Callable[[events.Event], None]
    stopping: Callable[[], bool]


class Loop:
    """One link's time: what came is handled, what is due is done. Everything that matters is in the store."""

    def __init__(self, parts: Parts) -> None:
        self._p = parts
        self._online = False
        self.welcomed = False
        self._news: _News | None = None
        self._epoch_taken: bytes | None = None
        self._reporting = Reporting(parts.store, parts.clock, parts.emit)
        self._models = Models(parts.store, parts.fetches, parts.rules.read, parts.max_bundle_bytes, parts.emit)
        self._deliveries = Deliveries(
            parts.tasks, parts.rules, parts.store, parts.clock, parts.jitter, self._reporting,
            freed=lambda task: self._rounds.on_freed(task),
        )  # fmt: skip
        self._rounds = Rounds(
            parts.tasks, parts.rules, parts.store, self._models, self._deliveries, parts.clock, self._reporting,
            conditions=parts.conditions, stopping=parts.stopping, look=self._look_while_training,
        )  # fmt: skip
        self._letters: dict[bytes, BlobRef] = {}
        self._replies: dict[bytes, Blob] = {}
        self._offered: set[int] = set()
        self._asked = False
        self._looked_s = 0.0
        self._again_s = 0.0
        """When a round that waits for nothing is tried again."""
        self._hello = Repeat(3.0, 60.0, parts.jitter)
        self.last_frame_s = self._now

    # What the caller turns.

    def turn(self, wait_s: float) -> None:
        """Wait for a frame, at most so long and not past what is due; handle what came; do what is due."""
        self._receive(max(0.0, min(wait_s, self._due_s() - self._now)))
        self._receive_what_came()
        self._tick()
        trained = False
        try:
            trained = self._rounds.train(settled=self._news is None)
        except OSError as error:
            self._reporting.warn_once(f"disk: {error}")
        self._again_s = self._now if trained else self._now + AGAIN_S

    @property
    def busy(self) -> bool:
        """Whether something waits to be done that can be done now."""
        return (
            self._news is not None
            or bool(self._letters)
            or self._deliveries.active
            or self._p.fetches.active
            or self._rounds.ready
        )

    def leave(self) -> None:
        """Say that it goes."""
        self._send(Leaving())

    def close(self) -> None:
        """Let go of files. What was under way is kept."""
        self._p.fetches.close()
        self._deliveries.close()

    def _look_while_training(self) -> None:
        """Called between batches. Letters are answered here, so that a committee does not wait for our training."""
        if self._now - self._looked_s >= LOOK_S:
            self._looked_s = self._now
            self._receive_what_came()
            self._tick()

    # What comes.

    def _receive_what_came(self) -> None:
        for _ in range(FRAMES_AT_ONCE):
            if not self._receive(0.0):
                return

    def _receive(self, wait_s: float) -> bool:
        item = self._p.transport.receive(wait_s)
        if item is None:
            return False
        if isinstance(item, Connected):
            self._on_connected()
        elif isinstance(item, Lost):
            self._online = self.welcomed = False
            self._reporting.emit(events.Offline(item.reason))
        else:
            self.last_frame_s = self._now
            try:
                self._on_frame(item)
            except PeerError as error:
                self._reporting.warn(f"dropped: {error}")
            except OSError as error:  # a full or failing disk: what was not stored was not answered either
                self._reporting.warn_once(f"disk: {error}")
        return True

    def _on_connected(self) -> None:
        self._online, self.welcomed = True, False
        self._offered.clear()
        self._p.fetches.ask_again()
        self._hello.restart()
        self._deliveries.offer_again()
        self._reporting.emit(events.Online())

    def _on_frame(self, data: bytes) -> None:
        frame = decode_down(data)
        if isinstance(frame, Welcome):
            self._on_welcome(frame)
        elif isinstance(frame, Letter):
            self._on_parcel(frame.content)
        elif isinstance(frame, Pull):
            self._on_pull(frame)
        elif isinstance(frame, Chunk):
            if self._p.fetches.add(frame, self._now):
                self._on_whole()
        elif isinstance(frame, Gone):
            if self._p.fetches.gone(frame.blob):
                self._letters.pop(frame.blob, None)
                self._on_whole()
        else:
            self._deliveries.on_refusal(frame)

    def _on_welcome(self, frame: Welcome) -> None:
        if frame.shown is not None and self._p.tasks:  # without tasks it uses no ledger
            self._p.rules.hold_against(frame.shown)
        first, self.welcomed = not self.welcomed, True
        if self._asked:  # one that came unasked puts off no Hello: the coordinator would not know that we are there
            self._hello.restart()
            self._hello.due_s = self._now + HEARTBEAT_S * (0.75 + 0.5 * self._p.jitter())
            self._asked = False
            self._offered.clear()  # what the network lost of them, nobody would miss but the coordinator
        if frame.prekeys is not None:
            self._p.serving.told(frame.prekeys)
        self._news = _News(frame.epoch, frame.enrolment, list(frame.tasks))
        skew_s = frame.time_s - self._p.clock.time_s()
        if abs(skew_s) > SKEW_S:
            self._reporting.warn_once(f"this device's clock is {-skew_s:+.0f} s from the coordinator's: set it")
        self._take_news()
        if first:
            epoch = self._p.store.epoch
            number = None if epoch is None else epoch.number
            serves = self._p.serving.serves(epoch)
            self._reporting.emit(events.Welcomed(number, self._rounds.enrolled is not None, serves, round(skew_s, 1)))

    def _on_whole(self) -> None:
        """A blob is whole, or will never be: whatever waited for it looks again."""
        for blob, ref in list(self._letters.items()):
            content = self._p.fetches.content(ref, MAX_MESSAGE_BYTES)
            if content is not None:
                del self._letters[blob]
                self._p.fetches.forget(ref)
                self._guarded(self._on_letter, content)
        self._take_news()
        self._take_models()

    def _on_parcel(self, parcel: Parcel) -> None:
        if isinstance(parcel, bytes):
            self._on_letter(parcel)
            return
        if len(self._letters) >= _MAX_LETTERS and parcel.id not in self._letters:
            raise PeerError(f"letter: {_MAX_LETTERS} long ones are under way")
        self._letters[parcel.id] = parcel
        try:
            content = self._p.fetches.content(parcel, MAX_MESSAGE_BYTES)
        except PeerError:
            del self._letters[parcel.id]
            raise
        if content is not None:
            self._on_whole()

    def _on_letter(self, data: bytes) -> None:
        kind, message = unwrap(data)
        if isinstance(message, Signed) and kind is Receipt:
            self._deliveries.on_receipt(data, decode(Receipt, message.body).tid)
            return
        if isinstance(message, Signed) and kind is Abort:
            self._on_abort(data, message, decode(Abort, message.body).tid)
            return
        self._serve(data)

    def _on_abort(self, data: bytes, signed: Signed, tid: bytes) -> None:
        self._deliveries.on_abort(data, tid)
        self._rounds.on_abort(signed, tid)
        if tid in self._p.serving.state.sessions:
            self._serve(data)

    def _serve(self, data: bytes) -> None:
        before = self._p.serving.state.sessions
        reply = self._p.serving.handle(data, self._p.store.epoch, self._p.clock.time_s())
        if reply is not None:
            parcel, blob = parcel_of(reply)
            if blob is not None:
                self._replies[blob.ref.id] = blob
                while len(self._replies) > _MAX_REPLIES:
                    del self._replies[next(iter(self._replies))]
            self._send(Letter(parcel))
        for tid, session in self._p.serving.state.sessions.items():
            if before.get(tid) != session:
                what = {Committed: "signed", Released: "released", Closed: "closed"}.get(type(session), "inspected")
                if isinstance(session, Inspecting) and tid not in before:
                    what = "joined"
                elif isinstance(session, Inspecting) and reply is not None and unwrap(reply)[0] is Complaint:
                    what = "complained"
                self._reporting.emit(events.Answered(session.round.ticket.task, session.round.ticket.round, what))

    def _on_pull(self, pull: Pull) -> None:
        blob = self._deliveries.pulled(pull.blob) or self._replies.get(pull.blob)
        if blob is None:
            self._send(Gone(pull.blob))
            return
        for index in pull.chunks:
            try:
                chunk = blob.chunk(index)
            except ParameterError as error:
                raise PeerError(f"pull: {error}") from error
            self._send(chunk)

    # News: the epoch, models, tickets.

    def _take_news(self) -> None:
        """What of the last Welcome is here. Called again whenever a blob is whole."""
        news = self._news
        if news is None:
            return
        if news.epoch is not None:
            content, ready = self._content(news.epoch, MAX_BODY_BYTES + 128)
            if not ready:
                return
            parcel, news.epoch = news.epoch, None
            if content is not None:
                self._guarded(self._take_epoch, content)
            if isinstance(parcel, BlobRef):
                self._p.fetches.forget(parcel)
        self._enrol(news.enrolment)
        self._send_offers()
        news.tasks = [state for state in news.tasks if not self._guarded(self._take_task, state)]
        if not news.tasks:
            self._news = None
        self._take_models()

    def _content(self, parcel: Parcel, max_bytes: int) -> tuple[bytes | None, bool]:
        """(the bytes or None, whether there is nothing more to wait for)."""
        if isinstance(parcel, bytes):
            return parcel, True
        try:
            content = self._p.fetches.content(parcel, max_bytes)
        except PeerError as error:
            self._reporting.warn_once(f"dropped: {error}")
            return None, True
        return content, content is not None

    def _take_epoch(self, content: bytes) -> None:
        digest = content_hash(content)
        if digest != self._epoch_taken:
            signed = decode(Signed, content)
            epoch = FleetEpoch(self._p.fleet, signed)
            if epoch.frozen.coordinator != self._p.coordinator:
                raise PeerError("epoch: its coordinator is not the one that this device was enrolled with")
            self._p.store.save_epoch(signed)
            self._epoch_taken = digest

    def _enrol(self, enrolment: Enrolment | None) -> None:
        epoch = self._p.store.epoch
        self._rounds.enrolled = None
        if epoch is None or enrolment is None:
            return
        try:
            epoch.check_enrolment(enrolment.index, self._p.identity.public_key, enrolment.proof)
        except PeerError as error:
            self._reporting.warn_once(f"dropped: {error}")
            return
        self._rounds.enrolled = Enrolled(self._p.identity, enrolment.index, tuple(enrolment.proof))

    def _take_task(self, state: TaskState) -> bool:
        """Returns whether it was taken whole; else a blob is on its way."""
        epoch = self._p.store.epoch
        ticket: Signed | None = None
        if state.ticket is not None and epoch is not None:
            content, ready = self._content(state.ticket, MAX_BODY_BYTES + 128)
            if not ready:
                return False
            if isinstance(state.ticket, BlobRef):
                self._p.fetches.forget(state.ticket)
            ticket = None if content is None else decode(Signed, content)
        if ticket is not None and self._p.would_serve and self._p.serving.serves(epoch):
            known = message_hash(Ticket, ticket.body) in self._p.serving.state.sessions
            if not known:
                self._guarded(self._serve, wrap(Ticket, ticket))
                self._send_offers()
        model = verify(Model, self._p.coordinator, decode(Signed, state.model))
        if model.task not in self._p.tasks:
            return True
        self._models.want(model, state)
        self._rounds.on_ticket(model.task, ticket)
        return True

    def _take_models(self) -> None:
        for task, reason in self._models.take().items():
            self._reporting.warn_once(f"{task}: {reason}")
            self._rounds.on_model_refused(task, reason)

    # What is due.

    def _tick(self) -> None:
        now_s = self._now
        try:
            self._keep_up()
        except OSError as error:  # a full or failing disk: it is tried again
            self._reporting.warn_once(f"disk: {error}")
        if not self._online:
            return
        if now_s >= self._hello.due_s:
            self._say_hello()
        if not self.welcomed:
            return
        for pull in self._p.fetches.pulls(now_s):
            self._send(pull)
        for upload in self._deliveries.uploads():
            self._send(upload)

    def _keep_up(self) -> None:
        """What is due without the network. Raises OSError from the disk."""
        if self._p.serving.next_expiry_s <= self._p.clock.time_s():
            self._p.serving.expire(self._p.clock.time_s())
        self._deliveries.expire()
        if not self._rounds.training:
            self._rounds.look_at_policy()
            if self._rounds.look_at_disk():
                self._take_models()  # there was no room for them either
            self._deliveries.retry()

    def _due_s(self) -> float:
        """When `_tick` next has something to do, on the monotonic clock."""
        if self._rounds.ready and not self._p.fetches.active:
            return self._again_s
        if not self._online:
            return float("inf")
        due = [self._hello.due_s, self._deliveries.retry_due_s]
        if self.welcomed:
            due += [self._p.fetches.due_s, self._deliveries.due_s]
        return min(due)

    def _say_hello(self) -> None:
        self._hello.said(self._now)
        epoch = self._p.store.epoch
        positions = []
        for task, own in self._p.tasks.items():
            state = own.state
            positions.append(Position(task, state.round.ticket.round if isinstance(state, Sent) else state.round))
        self._asked = True
        self._send(
            Hello(
                version=1,
                epoch=0 if epoch is None else epoch.number,
                spare_prekeys=self._p.serving.spare_prekeys,
                prekeys_wanted=self._p.would_serve,
                tasks=positions,
            )
        )

    def _send_offers(self) -> None:
        """Offers of prekeys, if this device serves: all of them after a Hello, then those that are new."""
        if not (self._p.would_serve and self._p.serving.serves(self._p.store.epoch)):
            return
        fresh = self._p.serving.offers(self._p.clock.time_s(), but=self._offered)
        offers = list(fresh.values())
        for start in range(0, len(offers), 32):
            self._send(Prekeys(offers[start : start + 32]))
        self._offered.update(fresh)

    # Small things.

    @property
    def _now(self) -> float:
        return self._p.clock.monotonic_s()

    def _send(self, frame: Up) -> None:
        self._p.transport.send(encode_frame(frame))

    def _guarded(self, call: Callable[[T], bool | None], subject: T) -> bool:
        """Whether `call` is done with its subject (None says so too). One that the peer broke is, with a warning."""
        try:
            return call(subject) is not False
        except PeerError as error:
            self._reporting.warn_once(f"dropped: {error}")
            return True
