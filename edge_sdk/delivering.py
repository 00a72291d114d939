"""Contributions that are stored, until the coordinator has them: charged, offered again and again, receipted.

The same bytes every time, also after a restart. The charge is in the ledger before the first of them may leave.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from edge_sdk import events
from edge_sdk.clock import Clock, Repeat
from edge_sdk.contributing import CannotSend, Contributing
from edge_sdk.errors import SordinoError, printable
from edge_sdk.privacy.ledger_entry import LedgerDamaged
from edge_sdk.protocol.contributor import Sent
from edge_sdk.protocol.messages import Header, message_hash
from edge_sdk.reporting import Reporting
from edge_sdk.rules import RulesFile
from edge_sdk.store import Store
from edge_sdk.transport.chunks import Blob
from edge_sdk.transport.wire import Refusal, Upload


@dataclass
class _Delivery:
    """A contribution on its way."""

    sent: Sent
    header: bytes
    blob: Blob
    repeat: Repeat


class Deliveries:
    """The contributions of one device that are stored: those to be charged, and those on their way.

    A delivery ends with a receipt, an abort, a final refusal or the ticket's end. When something is due is said on the
    monotonic clock.
    """

    def __init__(
        self,
        tasks: Mapping[str, Contributing],
        rules: RulesFile,
        store: Store,
        clock: Clock,
        jitter: Callable[[], float],
        reporting: Reporting,
        freed: Callable[[str], None],
    ) -> None:
        """freed: told each task whose delivery ended, which may take its next ticket now.

        What an earlier run left stored waits for `retry`, which charges it: it may have ended before it was.
        """
        self._tasks, self._rules, self._store = tasks, rules, store
        self._clock, self._jitter, self._reporting, self._freed = clock, jitter, reporting, freed
        self._on_way: dict[str, _Delivery] = {}
        self._held = dict.fromkeys(name for name, own in tasks.items() if isinstance(own.state, Sent))
        self._charge = Repeat(10.0, 600.0, jitter)

    @property
    def active(self) -> bool:
        """Whether anything is on its way."""
        return bool(self._on_way)

    def start(self, task: str) -> bool:
        """The task's contribution was just stored: charge it and have it sent. Returns whether it goes out.

        If not, it either may never (it is dropped, with a report), or `retry` tries again.
        Raises LedgerDamaged, and OSError from the disk.
        """
        self._held[task] = None
        self._charge.restart()
        return self._deliver(task)

    def retry(self) -> None:
        """Charge what could not be charged before, if that is due. Not while a round trains: it uses the ledger.

        Raises as `start`.
        """
        now_s = self._clock.monotonic_s()
        if self._held and now_s >= self._charge.due_s:
            self._charge.said(now_s)
            for task in list(self._held):
                self._deliver(task)

    @property
    def retry_due_s(self) -> float:
        """When `retry` next has something to do; infinity if never."""
        return self._charge.due_s if self._held else math.inf

    def expire(self) -> None:
        """Give up what the coordinator can take no longer. Raises OSError from the disk."""
        for task, delivery in list(self._on_way.items()):
            if self._clock.time_s() >= delivery.sent.round.ticket.expires_s:
                self._give_up(task, "the round ended without a receipt")

    def uploads(self) -> list[Upload]:
        """What to offer to the coordinator now."""
        now_s = self._clock.monotonic_s()
        due = [delivery for delivery in self._on_way.values() if now_s >= delivery.repeat.due_s]
        for delivery in due:
            delivery.repeat.said(now_s)
        return [Upload(delivery.sent.contribution.header, delivery.blob.ref) for delivery in due]

    @property
    def due_s(self) -> float:
        """When `uploads` next has something; infinity if never."""
        return min((delivery.repeat.due_s for delivery in self._on_way.values()), default=math.inf)

    def offer_again(self) -> None:
        """After a reconnect: what was offered may be lost."""
        for delivery in self._on_way.values():
            delivery.repeat.restart()

    def pulled(self, blob: bytes) -> Blob | None:
        """The blob of this id that the coordinator pulls, if it is one on its way: then it is not offered meanwhile."""
        for delivery in self._on_way.values():
            if delivery.blob.ref.id == blob:
                delivery.repeat.progress(self._clock.monotonic_s())
                return delivery.blob
        return None

    def on_receipt(self, data: bytes, tid: bytes) -> None:
        """A receipt for a ticket. One that was sent twice, or of a contribution that was given up, changes nothing.

        Raises PeerError if it is not what it seems, OSError from the disk: then the delivery goes on.
        """
        task = self._task_of(tid)
        if task is not None:
            self._tasks[task].answer(data, self._clock.time_s())
            ticket = self._end(task).round.ticket
            self._reporting.outcome(task, ticket.round, "delivered", "the coordinator's receipt is here")
            self._reporting.emit(events.Delivered(task, ticket.round))
            self._freed(task)

    def on_abort(self, data: bytes, tid: bytes) -> None:
        """An abort of a ticket's round, as `on_receipt`."""
        task = self._task_of(tid)
        if task is not None:
            self._tasks[task].answer(data, self._clock.time_s())
            self._dropped(task, "the coordinator aborted the round")

    def on_refusal(self, frame: Refusal) -> None:
        """The coordinator does not take a contribution: now, or ever if it is final. Raises OSError from the disk."""
        for task, delivery in self._on_way.items():
            if delivery.header == frame.subject:
                reason = printable(frame.reason)
                if frame.final:
                    self._give_up(task, f"the coordinator refused it: {reason}")
                else:
                    self._reporting.warn(f"{task}: the coordinator does not take the contribution now: {reason}")
                return

    def close(self) -> None:
        """Let go of files. What is on its way is kept."""
        for delivery in self._on_way.values():
            delivery.blob.close()

    def _deliver(self, task: str) -> bool:
        own = self._tasks[task]
        try:
            sent = own.charge(self._rules.read().ledger, self._clock.time_s())
            blob = Blob.from_file(self._store.outbox_path(sent.round.tid))
        except CannotSend as error:
            if isinstance(own.state, Sent):
                ticket = own.state.round.ticket
                own.leave(own.state)
                self._reporting.dropped(ticket, str(error))
            del self._held[task]
            return False
        except LedgerDamaged:
            raise
        except (SordinoError, OSError) as error:
            self._rules.close()
            self._reporting.warn_once(f"{task}: the contribution that is stored cannot be charged or read: {error}")
            return False
        del self._held[task]
        header = message_hash(Header, sent.contribution.header.body)
        self._on_way[task] = _Delivery(sent, header, blob, Repeat(5.0, 300.0, self._jitter))
        return True

    def _task_of(self, tid: bytes) -> str | None:
        """Whose contribution to this ticket is on its way."""
        return next((task for task, delivery in self._on_way.items() if delivery.sent.round.tid == tid), None)

    def _give_up(self, task: str, reason: str) -> None:
        self._tasks[task].leave(self._on_way[task].sent)
        self._dropped(task, reason)

    def _dropped(self, task: str, reason: str) -> None:
        self._reporting.dropped(self._end(task).round.ticket, reason)
        self._freed(task)

    def _end(self, task: str) -> Sent:
        delivery = self._on_way.pop(task)
        delivery.blob.close()
        return delivery.sent
