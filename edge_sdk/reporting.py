"""What a device tells whoever runs it: events and warnings as they come, and how each task's last round ended."""

from __future__ import annotations

import logging
from collections.abc import Callable

from edge_sdk import events
from edge_sdk.clock import Clock
from edge_sdk.protocol.messages import Ticket
from edge_sdk.store import Outcome, Store

log = logging.getLogger(__name__)

MAX_SAID = 1024
"""Warnings that are remembered: a peer that varies them fills no memory."""


class Reporting:
    """For people: nothing rests on it, so nothing that goes wrong here stops anything."""

    def __init__(self, store: Store, clock: Clock, emit: Callable[[events.Event], None]) -> None:
        """emit: hears every event."""
        self._store, self._clock, self._emit = store, clock, emit
        self._said: set[str] = set()

    def emit(self, event: events.Event) -> None:
        """An event, as it happens."""
        log.debug("%r", event)
        self._emit(event)

    def warn(self, reason: str) -> None:
        """Something was dropped or failed, and nothing was lost by it."""
        log.warning("%s", reason)
        self._emit(events.Warned(reason))

    def warn_once(self, reason: str) -> None:
        """A warning that whatever is tried again would repeat."""
        if reason not in self._said:
            if len(self._said) >= MAX_SAID:
                self._said.clear()
            self._said.add(reason)
            self.warn(reason)

    def outcome(self, task: str, number: int, what: str, reason: str) -> None:
        """Keep what became of the task's last ticket. number: its round.  what: one of `Outcome`'s words."""
        try:
            self._store.save_outcome(Outcome(task, number, what, reason, int(self._clock.time_s())))
        except OSError as error:
            self.warn_once(f"disk: {error}")

    def dropped(self, ticket: Ticket, reason: str) -> None:
        """A round that was entered is given up."""
        self.outcome(ticket.task, ticket.round, "dropped", reason)
        self.emit(events.Dropped(ticket.task, ticket.round, reason))
