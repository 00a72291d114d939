"""The coordinator's link to a broker in its own process: what is for it is handed over.

Over a connection to itself each frame would be framed, encrypted, sent, read, decrypted and acknowledged by two threads
of one interpreter: more than half of what an upload cost (docs/decisions/0015-the-link-inside.md).
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

from edge_sdk.errors import ParameterError, TransportError
from edge_sdk.transport import DEVICE_NAME, Connected, Inbound, Lost
from edge_sdk.transport.mqtt import BATCH, FRAME_OVERHEAD_BYTES
from edge_sdk.transport.wire import MAX_FRAME_BYTES

log = logging.getLogger("sordino.broker")


class InsideHub:
    """A `Hub`. One thread calls what a hub has, the broker's thread the rest.

    As over MQTT nothing is promised: while the broker is down frames are dropped, and more than `queue_bytes` of them
    that wait for it are dropped, too.
    """

    def __init__(self, queue_bytes: int = 32 << 20) -> None:
        self.is_used = False
        """Whether a coordinator has it. Until then one may connect to the broker as to any other."""
        self._queue_bytes = queue_bytes
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)
        # Under the lock:
        self._inbox: deque[tuple[int, Inbound | Connected | Lost]] = deque()
        self._inbox_bytes = 0
        self._outbox: deque[tuple[str, bytes]] = deque()
        self._unsent_bytes = 0
        self._room_bytes = -1
        """Whoever waits in `receive` is woken when no more than this is unsent."""
        self._wake: Callable[[], None] | None = None
        """Has the broker's thread call `take`; None while the broker is down."""
        self._is_closed = False
        self._dropped = 0
        self._ignored = 0

    # For the coordinator.

    def send(self, device: str, frame: bytes) -> None:
        """Raises ParameterError if `device` is no device's name, TransportError if the hub was closed."""
        if not DEVICE_NAME.match(device):
            raise ParameterError(f"{device!r} is not a device's name: 64 hexadecimal digits")
        if len(frame) > MAX_FRAME_BYTES:
            log.warning("dropped a frame of %d bytes to %s: the limit is %d", len(frame), device, MAX_FRAME_BYTES)
        cost = len(frame) + FRAME_OVERHEAD_BYTES
        with self._lock:
            if self._is_closed:
                raise TransportError("the link was closed")
            if self._wake is None or len(frame) > MAX_FRAME_BYTES or self._unsent_bytes + cost > self._queue_bytes:
                self._dropped += 1
                return
            idle = not self._outbox  # else it was woken
            self._outbox.append((device, bytes(frame)))
            self._unsent_bytes += cost
            if idle:
                self._wake()

    def receive(self, timeout_s: float, room_bytes: int | None = None) -> list[Inbound | Connected | Lost]:
        with self._lock:
            self._room_bytes = -1 if room_bytes is None else room_bytes
            self._arrived.wait_for(lambda: self._inbox or self._is_closed or self._has_room(), timeout_s)
            self._room_bytes = -1
            if self._is_closed:
                raise TransportError("the link was closed")
            taken = [self._inbox.popleft() for _ in range(min(BATCH, len(self._inbox)))]
            self._inbox_bytes -= sum(cost for cost, _ in taken)
        return [item for _, item in taken]

    @property
    def unsent_bytes(self) -> int:
        with self._lock:
            return self._unsent_bytes

    @property
    def dropped(self) -> int:
        """Frames that were over the limit, or for which there was no room or no broker."""
        with self._lock:
            return self._dropped

    @property
    def ignored(self) -> int:
        """Messages on topics that no device has."""
        with self._lock:
            return self._ignored

    def close(self) -> None:
        with self._lock:
            self._is_closed, self._wake = True, None
            self._inbox.clear()
            self._inbox_bytes = 0
            self._arrived.notify_all()

    def _has_room(self) -> bool:
        # With the lock.
        return self._unsent_bytes <= self._room_bytes

    # For the broker.

    def up(self, wake: Callable[[], None]) -> None:
        """The broker listens. wake: has its thread call `take` soon; it is called from any thread, and must not block
        or raise."""
        with self._lock:
            if not self._is_closed:
                self._wake = wake
                self._put(0, Connected())

    def down(self, reason: str) -> None:
        """The broker ended. What it was to take is lost. Nothing is said if it was not up."""
        with self._lock:
            was_up, self._wake = self._wake is not None, None
            self._dropped += len(self._outbox)
            self._outbox.clear()
            self._unsent_bytes = 0
            if was_up:
                self._put(0, Lost(reason))

    def take(self, most: int) -> list[tuple[str, bytes]]:
        """Frames for devices, the oldest first. It was woken for all that there are."""
        with self._lock:
            taken = [self._outbox.popleft() for _ in range(min(most, len(self._outbox)))]
            self._unsent_bytes -= sum(len(frame) + FRAME_OVERHEAD_BYTES for _, frame in taken)
            if self._outbox and self._wake is not None:
                self._wake()
            if self._has_room():
                self._arrived.notify_all()
        return taken

    def deliver(self, device: str, frame: bytes) -> None:
        """A frame from a device. Whether there is room for it is the caller's matter: see `waiting_bytes`."""
        if not DEVICE_NAME.match(device) or len(frame) > MAX_FRAME_BYTES:
            with self._lock:
                self._ignored += 1
            return
        with self._lock:
            if not self._is_closed:
                self._put(len(frame) + FRAME_OVERHEAD_BYTES, Inbound(device, frame))

    @property
    def waiting_bytes(self) -> int:
        """Delivered and not yet received."""
        with self._lock:
            return self._inbox_bytes

    def _put(self, cost: int, item: Inbound | Connected | Lost) -> None:
        # With the lock.
        self._inbox.append((cost, item))
        self._inbox_bytes += cost
        self._arrived.notify_all()
