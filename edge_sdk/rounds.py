"""The rounds of a device's tasks, from a ticket that is offered to a contribution that is stored.

A ticket is refused, sat out or entered; what was entered waits for its model and for the owner's conditions, and is
trained or given up. Nothing of it is stored before the contribution is, but the coin.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from edge_sdk import events
from edge_sdk.clock import Clock
from edge_sdk.contributing import Contributing, NoRoom, check_fits, stored_bytes
from edge_sdk.delivering import Deliveries
from edge_sdk.errors import PeerError, RoundAborted, SordinoError
from edge_sdk.files import SPARE_DISK_BYTES
from edge_sdk.models import Here, Models
from edge_sdk.privacy.ledger_entry import LedgerDamaged
from edge_sdk.protocol import contributor
from edge_sdk.protocol.contributor import Enrolled, Sent
from edge_sdk.protocol.messages import Signed, Ticket, message_hash
from edge_sdk.protocol.rounds import Round
from edge_sdk.reporting import Reporting
from edge_sdk.rules import RulesFile
from edge_sdk.store import Store


@dataclass
class _Entered:
    """A round that this device's coin chose. waits: why it does not train now, or "" if nothing is known against it."""

    training: contributor.Training
    enrolled: Enrolled
    waits: str = ""
    aborted: bool = False


class Rounds:
    """At most one round of each task is under way, and one at a time trains.

    What is refused is looked at again when the ticket, the policy file or the enrolment changes; what the disk has no
    room for, when it has.
    """

    def __init__(
        self,
        tasks: Mapping[str, Contributing],
        rules: RulesFile,
        store: Store,
        models: Models,
        deliveries: Deliveries,
        clock: Clock,
        reporting: Reporting,
        *,
        conditions: Callable[[], str | None],
        stopping: Callable[[], bool],
        look: Callable[[], None],
    ) -> None:
        """conditions: why this device may not train now, or None.  stopping: whether the run is to end.

        look: called between two batches, to see what came meanwhile; that may call anything here but `train`.
        """
        self._tasks, self._rules, self._store, self._models = tasks, rules, store, models
        self._deliveries, self._clock, self._reporting = deliveries, clock, reporting
        self._conditions, self._stopping, self._look = conditions, stopping, look
        self.enrolled: Enrolled | None = None
        """This device's place in the epoch's roster, as far as it was told: whoever learns of it sets it."""
        self._tickets: dict[str, Signed] = {}
        self._entered: dict[str, _Entered] = {}
        self._refused: dict[str, tuple[object, ...]] = {}
        self._no_room: dict[str, Round] = {}
        """Rounds that wait for room on the disk: their owner was told."""
        self._training: str | None = None
        self._stamp: tuple[int, ...] = ()

    @property
    def training(self) -> bool:
        """Whether a round trains, and uses the ledger."""
        return self._training is not None

    @property
    def ready(self) -> bool:
        """Whether there is a round that waits for nothing but its model, or for room on the disk."""
        return bool(self._no_room) or any(not entered.waits for entered in self._entered.values())

    def on_ticket(self, task: str, ticket: Signed | None) -> None:
        """The ticket of the task's open round, or that none is open. Raises LedgerDamaged."""
        if ticket is None:
            self._tickets.pop(task, None)
            if task not in self._entered:
                self._no_room.pop(task, None)
        else:
            self._tickets[task] = ticket
            self._consider(task)

    def on_freed(self, task: str) -> None:
        """A delivery is over: the next ticket may have waited for it. Raises as `on_ticket`."""
        if task in self._tickets:
            self._consider(task)

    def look_at_policy(self) -> None:
        """What was refused under another policy is looked at again. Raises as `on_ticket`."""
        if not self._tasks:
            return
        stamp = self._rules.stamp
        if stamp != self._stamp:
            self._stamp = stamp
            for task in list(self._tickets):
                self._consider(task)

    def look_at_disk(self) -> bool:
        """Tickets that were left alone for want of room are looked at again if there is some, or if they closed.

        Returns whether one was entered. Raises as `on_ticket`, and OSError from the disk.
        """
        for task, round_ in list(self._no_room.items()):
            if task not in self._entered and (self._has_room(round_) or self._clock.time_s() >= round_.ticket.closes_s):
                self._consider(task)
                if task in self._entered:
                    return True
        return False

    def on_abort(self, signed: Signed, tid: bytes) -> None:
        """An abort of the round with this ticket. Raises PeerError if the coordinator did not sign it."""
        for entered in self._entered.values():
            if entered.training.round.tid == tid:
                contributor.check_abort(entered.training.round, signed)
                entered.aborted = True

    def on_model_refused(self, task: str, reason: str) -> None:
        """A model of the task cannot be had. The round that was entered is refused, if it waits for one."""
        entered = self._entered.get(task)
        if entered is None or task == self._training:  # what trains holds its own
            return
        here = self._models.here.get(task)
        if here is None or not here.fits(entered.training.round.ticket):
            self._refuse_entered(task, reason)

    def train(self, *, settled: bool) -> bool:
        """One round that was entered and whose model is here, if any. Returns whether there was one.

        settled: whether everything that the coordinator told was taken in, so that no model is still to be heard of.
        Raises LedgerDamaged, and OSError from the disk.
        """
        for task, entered in list(self._entered.items()):
            ticket = entered.training.round.ticket
            if entered.aborted or self._clock.time_s() >= ticket.closes_s:
                reason = (
                    "the coordinator aborted the round" if entered.aborted else "the round closed before it trained"
                )
                self._give_up(task, entered, reason)
                continue
            here = self._models.here.get(task)
            if here is None or not here.fits(ticket):
                if not self._models.wants(task) and settled:
                    self._refuse_entered(task, "the coordinator does not offer the parameters that the ticket names")
                continue
            reason = self._conditions() or ""
            if reason:
                if reason != entered.waits:
                    self._reporting.emit(events.Waiting(task, ticket.round, reason))
                entered.waits = reason
                continue
            entered.waits = ""
            try:
                self._check_room(entered.training.round)
            except NoRoom as error:  # since the coin was tossed
                self._wait_for_room(task, entered.training.round, str(error))
                continue
            self._no_room.pop(task, None)
            self._contribute(task, entered, here)
            return True
        return False

    def _consider(self, task: str) -> None:
        """Enter the round of the task's ticket, if it is new and everything allows it."""
        signed, own = self._tickets[task], self._tasks[task]
        tid = message_hash(Ticket, signed.body)
        entered = self._entered.get(task)
        if task == self._training or (entered is not None and entered.training.round.tid == tid):
            return
        if isinstance(own.state, Sent) or own.state.tid == tid or self._refused.get(task) == self._view(tid):
            return
        if entered is not None:  # its round is over, or the coordinator would not open the next one
            del self._entered[task]
        number = -1
        try:
            epoch = self._store.epoch
            if epoch is None:
                raise PeerError("this device knows no epoch yet")
            round_ = Round(epoch, signed)  # nothing in it is looked at before its signature is
            number = round_.ticket.round
            if self.enrolled is None:
                raise PeerError("this device is not in the epoch's roster yet")
            rules = self._rules.read()
            manifest = self._models.manifest(task, round_.ticket.bundle)
            training = own.enter(round_, rules, manifest, self._clock.time_s(), self._check_room)
        except LedgerDamaged:  # nothing mends a ledger while the device runs
            raise
        except NoRoom as error:
            self._wait_for_room(task, round_, str(error))
            return
        except (SordinoError, OSError) as error:
            if isinstance(error, OSError):
                self._rules.close()
            self._refuse(task, tid, number, str(error))
            return
        self._no_room.pop(task, None)
        if training is None:
            self._reporting.emit(events.SatOut(task, number))
            self._reporting.outcome(task, number, "sat-out", "this device's coin said no")
        else:
            self._entered[task] = _Entered(training, self.enrolled)

    def _contribute(self, task: str, entered: _Entered, here: Here) -> None:
        ticket, own = entered.training.round.ticket, self._tasks[task]
        started_s = self._clock.monotonic_s()
        try:
            rules = self._rules.read()
            own.check(entered.training.round, rules)  # the owner may have changed the policy since the coin was tossed
            self._training = task
            bundle = self._models.bundle(here, rules.policy)
            check_fits(entered.training.round, bundle)
            self._reporting.emit(events.Training(task, ticket.round))
            with self._rules.in_use():
                sent = own.contribute(
                    entered.training, entered.enrolled, bundle, here.parameters, rules.ledger, self._clock.time_s,
                    lambda: self._should_stop(entered), self._reporting.warn,
                )  # fmt: skip
        except RoundAborted as error:
            if entered.aborted or self._clock.time_s() >= ticket.closes_s:
                self._give_up(task, entered, str(error))
            elif not self._stopping():  # the owner's conditions: go on when they allow it
                entered.waits = self._conditions() or "interrupted"
                self._reporting.emit(events.Waiting(task, ticket.round, entered.waits))
            return
        except LedgerDamaged:
            raise
        except (SordinoError, OSError) as error:
            self._refuse_entered(task, str(error))
            return
        finally:
            self._training = None
        del self._entered[task]
        took_s = round(self._clock.monotonic_s() - started_s, 3)
        if self._deliveries.start(task):
            self._reporting.emit(events.Contributed(task, ticket.round, sent.contribution.size, took_s))
            self._reporting.outcome(task, ticket.round, "contributed", "it waits for the receipt")

    def _should_stop(self, entered: _Entered) -> bool:
        """Asked between batches."""
        self._look()
        return entered.aborted or self._stopping() or self._conditions() is not None

    def _give_up(self, task: str, entered: _Entered, reason: str) -> None:
        del self._entered[task]
        self._no_room.pop(task, None)
        self._tasks[task].leave(entered.training)
        self._reporting.dropped(entered.training.round.ticket, reason)

    def _needed_bytes(self, round_: Round) -> int:
        """What goes to the disk before the round's contribution is stored: also what else is on its way there."""
        rounds = {entered.training.round.tid: entered.training.round for entered in self._entered.values()}
        rounds[round_.tid] = round_
        return self._models.missing_bytes + sum(
            stored_bytes(each, self._models.manifest(each.ticket.task, each.ticket.bundle)) for each in rounds.values()
        )

    def _has_room(self, round_: Round) -> bool:
        return self._store.has_room(self._needed_bytes(round_))

    def _check_room(self, round_: Round) -> None:
        """Raises NoRoom, OSError from the disk."""
        if not self._has_room(round_):
            needed_mb = (self._needed_bytes(round_) + SPARE_DISK_BYTES) / 1e6
            raise NoRoom(f"the disk has no room for the round, which needs {needed_mb:.1f} MB free: make room")

    def _wait_for_room(self, task: str, round_: Round, reason: str) -> None:
        before, self._no_room[task] = self._no_room.get(task), round_
        if before is None or before.tid != round_.tid:
            self._reporting.outcome(task, round_.ticket.round, "waiting", reason)
            self._reporting.emit(events.Waiting(task, round_.ticket.round, reason))

    def _refuse_entered(self, task: str, reason: str) -> None:
        round_ = self._entered.pop(task).training.round
        self._refuse(task, round_.tid, round_.ticket.round, reason)

    def _refuse(self, task: str, tid: bytes, number: int, reason: str) -> None:
        self._no_room.pop(task, None)
        self._refused[task] = self._view(tid)
        self._reporting.outcome(task, number, "refused", reason)
        self._reporting.emit(events.Refused(task, number, reason))

    def _view(self, tid: bytes) -> tuple[object, ...]:
        """What a refusal rests on: the ticket is looked at again when any of it is another."""
        return tid, self._stamp, self.enrolled is not None
