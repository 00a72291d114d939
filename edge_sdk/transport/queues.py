"""The two queues between the owner of a link and the thread that carries it: bounded, and with one lock."""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections import deque
from typing import Generic, TypeVar

from edge_sdk.errors import TransportError
from edge_sdk.transport import Connected, Lost
from edge_sdk.transport.wire import MAX_FRAME_BYTES

log = logging.getLogger(__name__)

FRAME_OVERHEAD_BYTES = 256
"""What a queued frame takes besides its bytes, about: a flood of empty frames is bounded too."""

T = TypeVar("T")


class Queues(ABC, Generic[T]):
    """What came for the owner, as items `T` and events, and what the owner sent, as (address, frame).

    While the link is down what is sent is dropped, as is what does not fit in `queue_bytes`. `unsent_bytes` counts what
    was sent until the carrier says that it is taken, not only until it left the queue.
    """

    def __init__(self, queue_bytes: int) -> None:
        self._queue_bytes = queue_bytes
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)
        # Under the lock:
        self._inbox: deque[tuple[int, T | Connected | Lost]] = deque()
        self._inbox_bytes = 0
        self._outbox: deque[tuple[str, bytes]] = deque()
        self._unsent_bytes = 0
        self._room_bytes = -1
        """Whoever waits in `_receive` is woken when no more than this is unsent."""
        self._is_up = False
        self._is_closed = False
        self._dropped = 0
        self._ignored = 0

    @abstractmethod
    def _wake(self) -> None:
        """Something is in the outbox that was empty. Called without the lock, by the owner's thread; never blocks."""

    # For the owner's thread.

    @property
    def unsent_bytes(self) -> int:
        """Handed over to be sent and not yet taken, with some bytes of overhead for each frame."""
        with self._lock:
            return self._unsent_bytes

    @property
    def dropped(self) -> int:
        """Frames that were over the limit, or for which there was no room or no link."""
        with self._lock:
            return self._dropped

    @property
    def ignored(self) -> int:
        """Messages that nobody can have sent under our rules."""
        with self._lock:
            return self._ignored

    def _send(self, address: str, frame: bytes) -> None:
        if len(frame) > MAX_FRAME_BYTES:
            log.warning("dropped a frame of %d bytes to %s: the limit is %d", len(frame), address, MAX_FRAME_BYTES)
        with self._lock:
            if self._is_closed:
                raise TransportError("the link was closed")
            cost = len(frame) + FRAME_OVERHEAD_BYTES
            if not self._is_up or len(frame) > MAX_FRAME_BYTES or self._unsent_bytes + cost > self._queue_bytes:
                self._dropped += 1
                return
            idle = not self._outbox  # else it was woken, or waits for the broker
            self._outbox.append((address, bytes(frame)))
            self._unsent_bytes += cost
        if idle:
            self._wake()

    def _receive(self, timeout_s: float, most: int, room_bytes: int | None = None) -> list[T | Connected | Lost]:
        with self._lock:
            self._room_bytes = -1 if room_bytes is None else room_bytes
            self._arrived.wait_for(lambda: self._inbox or self._is_closed or self._has_room(), timeout_s)
            self._room_bytes = -1
            if self._is_closed:
                raise TransportError("the link was closed")
            taken = [self._inbox.popleft() for _ in range(min(most, len(self._inbox)))]
            self._inbox_bytes -= sum(cost for cost, _ in taken)
        return [item for _, item in taken]

    def _close(self) -> bool:
        """Returns whether the link was up."""
        with self._lock:
            was_up, self._is_closed = self._is_up, True
            self._inbox.clear()
            self._inbox_bytes = 0
            self._arrived.notify_all()
        return was_up

    # With the lock.

    def _put(self, cost: int, item: T | Connected | Lost) -> None:
        self._inbox.append((cost, item))
        self._inbox_bytes += cost
        self._arrived.notify_all()

    def _put_event(self, event: Connected | Lost) -> None:
        # An event replaces one that nobody has read and that says no more than history.
        if self._inbox and isinstance(self._inbox[-1][1], Connected) and isinstance(event, Lost):
            self._inbox.pop()
        if self._inbox and isinstance(self._inbox[-1][1], Lost) and isinstance(event, Lost):
            self._inbox.pop()
        self._put(0, event)

    def _take(self, cost: int) -> None:
        """So much is no longer unsent."""
        self._unsent_bytes = max(0, self._unsent_bytes - cost)
        if self._has_room():
            self._arrived.notify_all()

    def _has_room(self) -> bool:
        return self._unsent_bytes <= self._room_bytes

    def _drop_outbox(self) -> None:
        self._dropped += len(self._outbox)
        self._outbox.clear()
        self._unsent_bytes = 0
