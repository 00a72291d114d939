"""The coordinator's loop: frames in, one transaction, answers out (docs/services.md sections 4 and 5).

Every step handles a batch. What the batch changes is collected; vectors are flushed, then rows are written in one
transaction, then the answers leave. So a kill loses only what nobody was told, and a restart goes on with the same
rounds. If the transaction fails, memory is ahead of the disk: the error ends the server, which starts again from disk.

What the loop needs to know and to decide has modules of its own, and none of them knows the server: who is there
(`presence`), the epoch in force (`epochs`), tasks (`running`) and rounds (`live`), uploads on their way (`arrivals`)
and into a round (`uploads`), prekeys and ledger heads (`prekeys`, `heads`), what goes out (`mail`, `welcome`, `shelf`),
what waits to be written (`batch`). Only opening runs beside the loop (`opening`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from coordinator import events, rounds
from coordinator.arrivals import Arrival, Arrivals
from coordinator.batch import Batch
from coordinator.epochs import Authority, Epochs, InForce
from coordinator.events import Event
from coordinator.heads import Heads
from coordinator.live import LiveRound, Opened, no_sums, slot_bytes
from coordinator.mail import Mail
from coordinator.opening import Opener
from coordinator.prekeys import Chosen, choose, held, keeping, new_offers
from coordinator.presence import Presence
from coordinator.quotas import Quotas
from coordinator.rows import DeviceRow, ModelRow, RoundRow, Transaction
from coordinator.running import RunningTask
from coordinator.shelf import Shelf
from coordinator.store import Store
from coordinator.task import Planned, Task, load
from coordinator.uploads import Uploads
from coordinator.welcome import Standing, welcome
from edge_sdk.crypto.identity import Identity
from edge_sdk.errors import ParameterError, PeerError, RoundAborted
from edge_sdk.protocol import aggregator, messages
from edge_sdk.protocol.aggregator import Aborted, Certified, Collecting, Done, Sealed
from edge_sdk.protocol.authority import FIRST, FleetEpoch
from edge_sdk.protocol.messages import (
    Abort,
    Complaint,
    Header,
    Release,
    SealSignature,
    Signed,
    unwrap,
    wrap,
)
from edge_sdk.protocol.rounds import Round, sign_ticket
from edge_sdk.transport import Connected, Hub, Inbound, Lost
from edge_sdk.transport.chunks import chunk_count
from edge_sdk.transport.wire import (
    BlobRef,
    Chunk,
    Down,
    Gone,
    Hello,
    Leaving,
    Letter,
    Prekeys,
    Pull,
    Upload,
    decode_up,
    encode_frame,
)

log = logging.getLogger(__name__)

UPLOAD_MEMORY = 32 << 20

LOOK_S = 0.5
"""How often the store is asked whether a command changed something."""

MAX_LETTER_BYTES = 1 << 20
"""Of a member's letter: the longest, a release of 64 groups, has 262 kB."""

REMIND_S = 15.0
"""A device that was told of a round and does not offer its upload is told again after this long, then twice as long: a
frame may be lost, and by itself it asks every two minutes."""

FRAMES_BETWEEN_PULLS = 16


def _ignore(_: object) -> None:
    """The default for hooks."""


class Server:
    """One coordinator on one store. Not thread-safe: one thread calls `step`, `run` and `close`."""

    def __init__(
        self,
        store: Store,
        hub: Hub,
        identity: Identity,
        authority: Authority,
        *,
        clock: Callable[[], float],
        entropy: Callable[[int], bytes],
        upload_memory: int = UPLOAD_MEMORY,
        on_event: Callable[[Event], None] = _ignore,
        keep_out: Callable[[frozenset[str]], None] = _ignore,
        passed: Callable[[str], None] = _ignore,
    ) -> None:
        """Takes the store's one place for a server and goes on with every round that is in it.

        identity: the coordinator's.  clock: Unix seconds.  entropy: so many fresh secret bytes (os.urandom).
        upload_memory: bytes that uploads on their way may take.  keep_out: told of the devices, by name, that flood and
        that the broker is to keep out, all of them whenever that changes.  passed: called at each point of the write
        order, by name; tests kill the process there.
        Raises StoreError if another process serves, or the store is damaged.
        """
        store.serve_alone()
        store.sweep()
        self._store, self._hub, self._identity, self._authority = store, hub, identity, authority
        self._clock, self._entropy, self._on_event, self._passed = clock, entropy, on_event, passed
        self._quotas, self._keep_out = Quotas(), keep_out
        self._kept_out: frozenset[str] = frozenset()
        self._devices: dict[str, DeviceRow] = {}
        """Those that are enrolled and not revoked, by name: their keys in hexadecimal."""
        self._seen: set[str] = set()
        """Who said something since the last commit."""
        self._tasks: dict[str, RunningTask] = {}
        self._live: dict[bytes, LiveRound] = {}
        self._changes = -1
        self._look_s = 0.0
        self._held_back = False
        """Whether a member's letters wait for what it fetches."""
        self._batch = Batch(store, on_event, passed)
        self._mail = Mail(hub)
        self._presence = Presence(self._mail, self._welcome_frame)
        self._shelf = Shelf(store.blob_path)
        self._epochs = Epochs(store, authority, self._shelf, self._on_epoch)
        self._heads = Heads(store)
        self._arrivals = Arrivals(upload_memory)
        self._uploads = Uploads(
            store, identity, self._live, arrivals=self._arrivals, heads=self._heads, batch=self._batch, mail=self._mail
        )
        self._opener = Opener(store, identity, entropy, passed)
        self._refresh()
        self._restore_rounds()
        # Over a broker that is not ours devices do not notice a restart, so they will not say Hello. What is sent to
        # one that is away is lost, which is nothing new.
        for device, row in self._devices.items():
            if row.last_seen_s is not None:
                self._presence.presume(device)

    # --- the loop

    def run(self, should_stop: Callable[[], bool]) -> None:
        """Step until `should_stop()`; it is asked at least every half second."""
        while not should_stop():
            self.step(self._patience())

    def step(self, timeout_s: float) -> None:
        """Handle what came within `timeout_s`, and what is due. See the module's docstring for the order."""
        inbound = self._hub.receive(timeout_s, self._mail.room_bytes)
        now_s = self._clock()
        self._look(now_s)
        for handled, item in enumerate(inbound):
            if handled % FRAMES_BETWEEN_PULLS == 0:
                self._send_pulls(now_s)  # so that the next uploads are on their way while these are handled
            match item:
                case Inbound(device, frame):
                    account = self._account(device)
                    if self._quotas.take(account, now_s):
                        self._on_frame(device, frame, now_s)
                    elif self._quotas.dropped(account) == 1:
                        log.warning("device %s: it floods: frames that nobody asked for are dropped", device[:16])
                        self._on_event(events.Refused(device, "it floods: frames that nobody asked for are dropped"))
                case Connected():
                    log.info("connected to the broker")
                    self._presence.doubt()
                case Lost(reason):
                    log.warning("lost the broker: %s", reason)
                    self._presence.doubt()
        self._keep_floods_out(now_s)
        for live in list(self._live.values()):
            self._advance(live, now_s)
        self._commit()
        for running in list(self._tasks.values()):
            self._next_ticket(running, now_s)
        self._write_letters(now_s)
        self._commit()  # what tickets gave cause for; their own rows are written
        self._mail.send_answers(lambda: self._passed("answer sent"))
        self._send_pulls(now_s)
        self._mail.send_bulk()

    def _send_pulls(self, now_s: float) -> None:
        """Grants, and what granted uploads lack. A pull promises nothing, so it need not wait for the transaction."""
        for device, pull in self._arrivals.pulls(now_s):
            self._quotas.expect(device, len(pull.chunks), now_s)
            self._hub.send(device, encode_frame(pull))

    def close(self) -> None:
        """Stop. Nothing needs to be said or written: what counts is on disk."""
        self._opener.close()
        for live in self._live.values():
            live.vectors.close()
        self._shelf.close()
        self._store.close()

    def _patience(self) -> float:
        """How long the loop may wait for frames."""
        now_s = self._clock()
        if self._held_back:
            return 0.01
        due = min(LOOK_S, self._arrivals.due_s - now_s)
        for live in self._live.values():
            if live.opening is not None:
                due = min(due, 0.02)
            elif isinstance(live.state, Collecting):
                grace = live.task.schedule.grace_s
                due = min(due, rounds.seal_due_s(live.state, live.full_at_s, grace) - now_s)
            if live.behind(self._presence):
                due = min(due, 0.1)
        return max(due, 0.0)

    def _commit(self) -> None:
        """Write down what the step changed so far, and do what follows from it."""
        if self._seen:
            keys, now_s = [bytes.fromhex(device) for device in sorted(self._seen)], self._clock()
            for device in self._seen & self._devices.keys():
                self._devices[device] = self._devices[device]._replace(last_seen_s=now_s)
            self._seen.clear()
            self._batch.write(lambda t: t.seen(keys, now_s))
        self._batch.commit()

    # --- what is in the store

    def _refresh(self) -> None:
        """Read what commands may have changed: devices, epochs, tasks."""
        with self._store.reading() as t:
            changes = t.changes()
            if changes == self._changes:
                return
            self._changes = changes
            devices, newest = t.devices(), t.newest_epoch()
            rows = t.tasks()
            new = {row.name: RunningTask.restore(t, row) for row in rows if row.name not in self._tasks}
        self._devices = {row.key.hex(): row for row in devices if row.revoked_s is None}
        for device in set(self._presence) - set(self._devices):
            self._leave(device)
        for row in rows:
            if row.name in self._tasks:
                before, self._tasks[row.name].row = self._tasks[row.name].row, row
                if row.state == "removed" != before.state:
                    log.info("task %s was removed", row.name)
                    self._presence.welcome_all()
                continue
            self._tasks[row.name] = new[row.name]
            self._presence.welcome_all()
        self._fill_shelf()
        if newest is not None:
            self._epochs.begin(newest)

    def _on_epoch(self, in_force: InForce) -> None:
        row = in_force.row
        self._on_event(events.EpochBegan(row.number, len(row.roster), len(in_force.epoch.members)))
        self._presence.welcome_all()

    def _restore_rounds(self) -> None:
        with self._store.reading() as t:
            for row in t.active_rounds():
                epoch = self._epochs.epoch(t.epoch(row.epoch))
                round_ = Round(epoch, messages.decode(Signed, row.ticket))
                contributions = t.contributions(row.tid)
                state = rounds.restore(
                    round_, row, contributions, t.complaints(row.tid), t.signatures(row.tid), t.releases(row.tid)
                )
                task_row = t.task(row.task)
                if task_row is None:
                    continue
                task, planned = load(task_row)
                live = self._new_round(task, planned, round_, row.model, state)
                live.restore(contributions, t.checkpoint(row.tid))
                for signed in live.headers:
                    self._heads.note(messages.decode(Header, signed.body), signed)
                if isinstance(state, Collecting) and len(state.entries) >= round_.ticket.n_max:
                    live.full_at_s = self._clock()
                if isinstance(state, Sealed):
                    for member in state.signatures:
                        live.posts[member].has_signed = True
                if isinstance(state, Certified):
                    for member in state.answers:
                        live.posts[member].has_answered = True
                self._live[row.tid] = live
                log.info("%s of %s goes on with %d contributions", round_, row.task, len(contributions))
        self._fill_shelf()

    def _new_round(self, task: Task, planned: Planned, round_: Round, model: int, state: rounds.State) -> LiveRound:
        vectors = self._store.vectors(round_.tid, round_.ticket.n_max, slot_bytes(round_))
        return LiveRound(task, planned, round_, model, state, vectors, no_sums(round_))

    def _fill_shelf(self) -> None:
        """What devices may fetch now: of every task its bundle and newest models, and what open rounds need."""
        files: list[bytes] = []
        for running in self._told_of():
            files += [running.row.bundle_file, *(model.parameters for model in running.models)]
        files += [live.round.ticket.parameters for live in self._live.values()]
        in_force = self._epochs.in_force
        self._shelf.keep(files, {*self._live, *([in_force.row.id] if in_force is not None else [])})

    def _told_of(self) -> list[RunningTask]:
        """The tasks that devices are told of."""
        return [running for running in self._tasks.values() if not running.is_removed]

    # --- frames

    def _on_frame(self, device: str, data: bytes, now_s: float) -> None:
        """One frame. A bad one is dropped with one line in the log; nothing has changed then."""
        try:
            if device not in self._devices:
                self._refresh()  # it may have joined a moment ago
            if device not in self._devices:
                raise PeerError("it is not enrolled, or was revoked")
            frame = decode_up(data)
            match frame:
                case Hello():
                    self._on_hello(device, frame, now_s)
                case Leaving():
                    self._leave(device)
                case Prekeys():
                    self._quotas.charge(device, now_s)
                    self._on_prekeys(device, frame, now_s)
                case Letter():
                    self._on_letter(device, frame, now_s)
                case Upload():
                    self._uploads.offer(self._devices[device], frame, now_s)
                case Chunk():
                    self._on_chunk(device, frame, now_s)
                case Pull():
                    self._on_pull(device, frame)
                case Gone():
                    self._arrivals.end(device, frame.blob)
        except (PeerError, RoundAborted) as error:
            # Late, or one too many, is nobody's fault. It has us read the store all the same.
            log.log(
                logging.INFO if isinstance(error, RoundAborted) else logging.WARNING,
                "device %s: %s",
                device[:16],
                error,
            )
            self._on_event(events.Refused(device, str(error)))
            self._quotas.charge(self._account(device), now_s)

    def _account(self, device: str) -> str:
        """Whose frames these count as: all that are unknown share one account, for there may be any number of them."""
        return device if device in self._devices else ""

    def _answer(self, device: str, frame: Down) -> None:
        self._mail.answer(device, encode_frame(frame))

    def _on_hello(self, device: str, hello: Hello, now_s: float) -> None:
        before = self._presence.hello(device, (position.task for position in hello.tasks))
        self._seen.add(device)
        if before is None:
            for running in self._tasks.values():
                running.device_came()
        if before is not None and before.heard:
            return  # it was here all the time, and only asks how things stand
        for live in self._live.values():
            for post in live.posts.values():
                if post.device == device:
                    post.again()

    def _leave(self, device: str) -> None:
        self._presence.leave(device)
        self._arrivals.leave(device)
        self._mail.forget(device)
        for live in self._live.values():
            for post in live.posts.values():
                if post.device == device:
                    post.pulling.clear()

    def _welcome_frame(self, device: str) -> bytes | None:
        """Where things stand, for a device that is there and enrolled."""
        present, row = self._presence.get(device), self._devices.get(device)
        if present is None or row is None:
            return None
        standings = []
        for running in self._told_of():
            name = running.task.name
            live = self._open_round(name)
            serves = live is not None and any(post.device == device for post in live.posts.values())
            if serves or (present.trains(name) and running.task.admits(row)):
                standings.append(Standing(running, live))
        epoch, shown, left, now_s = self._epochs.in_force, self._heads.longest(row.key), None, self._clock()
        if epoch is not None and any(member.key == row.key for member in epoch.epoch.members):
            with self._store.reading() as t:
                left = held(t, row.key, now_s)
        said = welcome(row, epoch, shown, standings, left, identity=self._identity, shelf=self._shelf, now_s=now_s)
        return encode_frame(said)

    def _open_round(self, task: str) -> LiveRound | None:
        """The task's round that takes contributions. Not one that is full: a device would spend its budget in vain."""
        now_s = self._clock()
        for live in self._live.values():
            collecting = isinstance(live.state, Collecting) and live.full_at_s is None
            if live.task.name == task and collecting and now_s < live.round.ticket.closes_s:
                return live
        return None

    def _on_prekeys(self, device: str, frame: Prekeys, now_s: float) -> None:
        key = bytes.fromhex(device)
        with self._store.reading() as t:
            fresh = new_offers(t, self._authority.public_key, key, frame.offers, now_s)
        if fresh:
            self._batch.write(keeping(key, fresh, now_s))
            for running in self._tasks.values():
                running.prekeys_came(key)

    # --- uploads

    def _on_chunk(self, device: str, chunk: Chunk, now_s: float) -> None:
        if not self._arrivals.holds(device, chunk.blob):
            return  # late or repeated: what it was for is dealt with
        arrival = self._arrivals.add(device, chunk, now_s)
        if arrival is None or arrival.download is None:
            return
        view = arrival.download.view()
        try:
            if arrival.header is None:
                self._on_member_message(device, bytes(view), now_s)
            else:
                self._take(device, arrival, arrival.header, view, now_s)
        finally:
            if arrival.download is not None and arrival.download.complete:
                self._arrivals.end(device, chunk.blob)

    def _take(self, device: str, arrival: Arrival, signed: Signed, view: memoryview, now_s: float) -> None:
        header = self._uploads.take(self._devices[device], arrival, signed, view, now_s)
        if header is None:
            return
        self._seen.add(device)
        running = self._tasks.get(self._live[header.tid].task.name)
        if running is not None:
            running.sends[header.key] += 1

    # --- members

    def _on_letter(self, device: str, frame: Letter, now_s: float) -> None:
        if isinstance(frame.content, BlobRef):
            if frame.content.size > MAX_LETTER_BYTES:
                raise PeerError(f"letter: {frame.content.size} bytes, {MAX_LETTER_BYTES} at most")
            if not any(post.device == device for live in self._live.values() for post in live.posts.values()):
                raise PeerError("letter: of a device that serves in no round")
            self._arrivals.ask(device, frame.content, None, None, now_s)
            return
        self._on_member_message(device, frame.content, now_s)

    def _on_member_message(self, device: str, data: bytes, now_s: float) -> None:
        kind, message = unwrap(data)
        if kind not in (Complaint, SealSignature, Release) or not isinstance(message, Signed):
            raise PeerError(f"{messages.label_of(kind)}: not a message to a coordinator")
        said: Complaint | SealSignature | Release = messages.decode(kind, message.body)  # type: ignore[assignment]
        live = self._live.get(said.tid)
        if live is None:
            log.debug("device %s: %s for a round that has ended", device[:16], messages.label_of(kind))
            return
        before = live.state
        after = aggregator.step(before, data)
        if not isinstance(after, Collecting | Sealed | Certified):
            raise PeerError(f"{messages.label_of(kind)}: not expected")
        live.state = after
        self._seen.add(device)
        tid, number = live.tid, said.member
        if isinstance(said, Complaint) and isinstance(after, Collecting):
            named = after.complaints[number]
            if not isinstance(before, Collecting) or before.complaints.get(number) != named:
                self._batch.write(lambda t: t.set_complaints(tid, number, named))
        elif isinstance(said, SealSignature):
            live.posts[number].has_signed = True
            signature = message.signature
            self._batch.write(lambda t: t.set_signature(tid, number, signature))
            if isinstance(after, Certified) and isinstance(before, Sealed):
                certificate = messages.encode(after.certificate)
                self._batch.write(lambda t: t.set_certified(tid, certificate))
                self._batch.say(events.RoundCertified(live.task.name, live.round.ticket.round))
        elif isinstance(said, Release):
            live.posts[number].has_signed = live.posts[number].has_answered = True
            release = messages.encode(message)
            self._batch.write(lambda t: t.set_release(tid, number, release))

    def _on_pull(self, device: str, frame: Pull) -> None:
        blob = self._shelf.find(frame.blob)
        for live in self._live.values():
            for post in live.posts.values():
                if post.device == device and frame.blob in post.pulling:
                    blob, missing, _ = post.pulling[frame.blob]
                    missing.difference_update(frame.chunks)
                    post.fetch = rounds.Repeat.after(self._clock(), 10.0)
                    if not missing:
                        del post.pulling[frame.blob]
                        post.fetched = {frame.blob: blob}
                elif post.device == device and frame.blob in post.fetched:
                    blob = post.fetched[frame.blob]
        if blob is None:
            self._answer(device, Gone(frame.blob))
            return
        self._mail.serve(device, blob, [index for index in frame.chunks if index < chunk_count(blob.ref.size)])

    # --- what is due

    def look(self) -> None:
        """A command changed something, as whoever watches the store knows: it counts before the next frame is read."""
        self._look_s = 0.0

    def _look(self, now_s: float) -> None:
        if now_s >= self._look_s:
            self._look_s = now_s + LOOK_S
            self._refresh()

    def _keep_floods_out(self, now_s: float) -> None:
        kept_out = self._quotas.kept_out(now_s) & self._devices.keys()
        if kept_out != self._kept_out:
            for device in sorted(kept_out - self._kept_out):
                log.warning("device %s: it goes on flooding: the broker keeps it out for a while", device[:16])
            self._kept_out = kept_out
            self._keep_out(kept_out)

    def _write_letters(self, now_s: float) -> None:
        self._held_back = False
        for live in self._live.values():
            for post in live.posts.values():
                if post.device not in self._presence:
                    continue
                live.repeat(post, now_s)
                if self._mail.owes(post.device, post.fetched):
                    self._held_back = True  # a seal that comes before the last delivery would be dropped
                    continue
                for frame in live.letters(post, now_s):
                    self._mail.answer(post.device, frame)

    def _advance(self, live: LiveRound, now_s: float) -> None:
        """The round's own next step, if it is due."""
        state, ticket = live.state, live.round.ticket
        running = self._tasks.get(ticket.task)
        if isinstance(state, Collecting | Sealed) and running is not None and running.is_removed:
            self._take_back(live, state, now_s)
        elif isinstance(state, Collecting):
            if live.reminder is None:
                live.reminder = rounds.Repeat.after(now_s, REMIND_S)
            if now_s >= rounds.seal_due_s(state, live.full_at_s, live.task.schedule.grace_s):
                self._seal(live, state, now_s)
            elif live.reminder.is_due(now_s) and live is self._open_round(live.task.name):
                self._remind(live)
        elif isinstance(state, Sealed):
            if now_s >= ticket.expires_s:
                came, needed = len(state.signatures), live.round.thresholds.quorum
                self._abort(live, state, f"{came} members signed in time, {needed} needed", now_s)
        elif live.opening is not None:
            if live.opening.done():
                opened, live.opening = live.opening.result(), None
                self._opened(live, opened, now_s)
        else:
            everyone = len(state.answers) == len(live.posts)
            final = everyone or now_s >= ticket.expires_s
            first = min(other.round.ticket.round for other in self._live.values() if other.task.name == ticket.task)
            if ticket.round != first:
                return  # models follow each other: the round before is still being opened
            if (state.openable or final) and live.tried != (len(state.answers), final):
                live.tried = (len(state.answers), final)
                # Not what the store has: the round before may have ended in this very step, and is not written yet.
                base = running.model if running is not None else None
                live.opening = self._opener.submit(live, state, base, final)

    def _remind(self, live: LiveRound) -> None:
        """Welcome again who is there, may contribute and has neither done so nor begun to."""
        taken = {messages.decode(Header, header.body).key.hex() for header in live.headers}
        for device in self._presence.training(live.task.name):
            may = live.task.admits(self._devices[device])
            if may and device not in taken and not self._arrivals.is_sending(device):
                self._presence.welcome(device)

    # --- a round's seal and end

    def _seal(self, live: LiveRound, state: Collecting, now_s: float) -> None:
        result = aggregator.seal(state, self._identity, now_s)
        self._batch.write(self._heads.keep(live.round.ticket, live.headers))
        if isinstance(result, Aborted):
            self._end_aborted(live, result, now_s)
            return
        live.state, tid = result, live.tid
        seal = messages.encode(result.seal)
        self._batch.write(lambda t: t.set_sealed(tid, seal))
        ticket, kept = live.round.ticket, len(result.entries)
        self._batch.say(events.RoundSealed(ticket.task, ticket.round, kept, len(live.slots) - kept))

    def _take_back(self, live: LiveRound, state: Collecting | Sealed, now_s: float) -> None:
        """The round's task was removed. Once certified its sums count as known, and it is opened instead."""
        if isinstance(state, Collecting):
            self._batch.write(self._heads.keep(live.round.ticket, live.headers))
        aborted = aggregator.abort(state, self._identity, "the task was removed")
        # All that train it are told, not the committee alone: who has not sent yet need not spend on it.
        self._end_aborted(live, aborted, now_s, self._presence.training(live.task.name))

    def _abort(self, live: LiveRound, state: Collecting | Sealed, reason: str, now_s: float) -> None:
        self._end_aborted(live, aggregator.abort(state, self._identity, reason), now_s)

    def _end_aborted(self, live: LiveRound, aborted: Aborted, now_s: float, besides: Iterable[str] = ()) -> None:
        """besides: who is told, by name, besides the committee."""
        ticket, tid = live.round.ticket, live.tid
        notice, reason = messages.encode(aborted.notice), aborted.reason
        self._batch.write(lambda t: t.set_aborted(tid, notice, reason, now_s))
        for device in dict.fromkeys((*(post.device for post in live.posts.values()), *besides)):
            self._answer(device, Letter(wrap(Abort, aborted.notice)))
        self._batch.say(events.RoundAborted(ticket.task, ticket.round, reason))
        self._end(live, now_s)

    def _opened(self, live: LiveRound, opened: Opened, now_s: float) -> None:
        state = live.state
        if not isinstance(opened.state, Done) or not isinstance(state, Certified):
            return  # not with these answers: another one may repair it
        ticket, tid, done = live.round.ticket, live.tid, opened.state
        transcript, reason = messages.encode(done.transcript), opened.reason
        self._batch.write(lambda t: t.set_done(tid, transcript, reason, now_s))
        running = self._tasks.get(ticket.task)
        if opened.model is None or opened.files is None or running is None:
            self._batch.say(events.RoundAborted(ticket.task, ticket.round, reason))
            self._end(live, now_s)
            return
        salt = self._entropy(32)
        before, model = running.model, opened.model
        row = ModelRow(
            ticket.task, before.number + 1, *opened.files, before.parameters, tid, model.clip,
            live.task.cohort.expected, salt, rounds.set_hash(salt, state.digest),
            live.planned.meaningful(model.metrics), now_s,
        )  # fmt: skip
        dropped: list[bytes] = []

        def publish(t: Transaction) -> None:
            t.add_model(row)
            dropped.extend(t.forget_memory(row.task, row.number))
            if row.number >= live.task.rounds:
                t.finish_task(row.task)

        self._batch.write(publish)
        self._batch.follow(lambda: self._store.drop_blobs(dropped))
        running.publish(row)
        came = sum(group.contributors for group in done.sums.values())
        spent = rounds.spent(live.task, live.planned, row.number, max(running.sends.values(), default=0))
        with self._store.reading() as t:
            round_row = t.round(tid)  # not from closes_s, which is in whole seconds
        took_s = now_s - round_row.opened_s if round_row is not None else 0.0
        self._batch.say(
            events.ModelPublished(
                ticket.task,
                ticket.round,
                row.number,
                came,
                row.metrics,
                spent,
                model.clip,
                took_s,
                reason,
                live.planned.loss,
            )
        )
        if row.number >= live.task.rounds and not running.is_removed:
            self._batch.say(events.TaskDone(ticket.task))
        self._end(live, now_s)

    def _end(self, live: LiveRound, now_s: float) -> None:
        """The round is over: after the rows are written its files go."""
        del self._live[live.tid]
        self._arrivals.end_round(live.tid)
        running = self._tasks.get(live.task.name)
        if running is not None:
            running.round_ended(now_s)

        def erase() -> None:
            live.vectors.close()
            self._store.erase_round(live.tid)
            self._fill_shelf()
            self._tell(live.task)

        self._batch.follow(erase)

    def _tell(self, task: Task) -> None:
        """Something of the task changed: say so to those that are present and take part."""
        rounds_of_it = [live for live in self._live.values() if live.task.name == task.name]
        self._presence.tell(task.name, {post.device for live in rounds_of_it for post in live.posts.values()})

    # --- the next ticket

    def _next_ticket(self, running: RunningTask, now_s: float) -> None:
        if running.row.state != "running" or now_s < max(running.next_s, running.retry_s):
            return
        before = [live for live in self._live.values() if live.task.name == running.task.name]
        if before and not (running.task.schedule.overlap and all(isinstance(b.state, Certified) for b in before)):
            return
        if running.model.number + len(before) >= running.task.rounds:
            return
        running.try_anew()
        try:
            reason = self._try_ticket(running, now_s)
        except ParameterError as error:
            reason = str(error)
        if reason is not None:
            running.retry_s = now_s + LOOK_S
            if reason != running.reason:
                name, running.reason = running.task.name, reason
                log.info("task %s waits: %s", name, reason)
                self._batch.write(lambda t: t.set_waiting(name, reason))
                self._batch.say(events.Waiting(name, reason))

    def _try_ticket(self, running: RunningTask, now_s: float) -> str | None:
        """Issue the task's next ticket, or say why not."""
        task = running.task
        _, expires_s = rounds.ticket_times(task, now_s)
        self._refresh()
        devices = self._devices.values()
        silent = self._epochs.silent(devices, expires_s, now_s)
        enrolled = sum(task.admits(row) for row in devices)
        ready = sum(task.admits(row) and row.key not in silent for row in devices)
        if ready < task.cohort.expected:  # no epoch for each device that joins
            running.lacks_devices = True
            return f"{ready} of {enrolled} devices are ready, and the task plans with {task.cohort.expected:g}"
        groups = [running.planned.groups for running in self._told_of()]
        problem = self._epochs.renew(devices, groups, expires_s, now_s)
        in_force = self._epochs.in_force
        if in_force is None:
            return problem or "there is no epoch yet"
        in_roster = set(in_force.row.roster)
        may = sum(row.key in in_roster and task.admits(row) for row in devices)
        reason = rounds.why_not_yet(task, running.planned, in_force.epoch, may, expires_s)
        if reason is not None:
            return f"{reason}; {problem}" if problem else reason
        return self._issue(running, in_force.epoch, expires_s, now_s)

    def _issue(self, running: RunningTask, epoch: FleetEpoch, expires_s: int, now_s: float) -> str | None:
        """A ticket of this epoch, and the round that it opens. Returns why there is none, or None."""
        task, planned = running.task, running.planned
        with self._store.reading() as t:
            chosen = choose(t, [member.key for member in epoch.members], expires_s)
            if not isinstance(chosen, Chosen):
                running.lacks_prekeys.update(chosen)
                return f"member {chosen[0].hex()[:16]} has offered no prekey that lives as long as the ticket"
            last, row = t.last_round(task.name), t.task(task.name)
        if row is None or row.state != "running":
            return "the task was paused" if row is not None and row.state == "paused" else "the task has ended"
        ticket = rounds.make_ticket(
            task, planned, epoch, running.model,
            number=row.next_round, previous=last.tid if last is not None else FIRST, offers=chosen.offers, now_s=now_s,
        )  # fmt: skip
        round_ = sign_ticket(self._identity, epoch, ticket)
        if slot_bytes(round_) > self._arrivals.memory_bytes:
            return (
                f"an upload has {slot_bytes(round_)} bytes, and uploads may take {self._arrivals.memory_bytes}: raise "
                "[limits] upload_memory_mb in coordinator.toml"
            )
        round_row = RoundRow(
            round_.tid, task.name, ticket.round, epoch.number, messages.encode(round_.signed),
            running.model.number, "COLLECT", now_s, None, None, None, None, None, "",
        )  # fmt: skip
        with self._store.transaction() as t:  # at once: another task must not find the same prekeys
            t.add_round(round_row, chosen.used)
            self._passed("before commit")
        self._passed("committed")
        self._live[round_.tid] = self._new_round(task, planned, round_, running.model.number, Collecting(round_))
        running.reason = ""
        self._fill_shelf()
        self._batch.say(events.RoundOpened(task.name, ticket.round, ticket.n_max, ticket.closes_s))
        self._tell(task)
        return None
