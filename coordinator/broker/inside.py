"""The coordinator's link to a broker in its own process: what is for it is handed over.

Over a connection to itself each frame would be framed, encrypted, sent, read, decrypted and acknowledged by two threads
of one interpreter: more than half of what an upload cost (docs/decisions/0015-the-link-inside.md).
"""

from __future__ import annotations

from collections.abc import Callable

from edge_sdk.errors import ParameterError
from edge_sdk.transport import DEVICE_NAME, Connected, Inbound, Lost
from edge_sdk.transport.mqtt import BATCH
from edge_sdk.transport.queues import FRAME_OVERHEAD_BYTES, Queues
from edge_sdk.transport.wire import MAX_FRAME_BYTES


class InsideHub(Queues[Inbound]):
    """A `Hub` that promises as little as the one over MQTT. One thread calls what a hub has, the broker's the rest."""

    def __init__(self, queue_bytes: int = 32 << 20) -> None:
        """queue_bytes: of frames that wait for the broker; more are dropped."""
        super().__init__(queue_bytes)
        self.is_used = False
        """Whether a coordinator has it. Until then one may connect to the broker as to any other."""
        self._wake_broker: Callable[[], None] | None = None

    # For the coordinator.

    def send(self, device: str, frame: bytes) -> None:
        """Raises ParameterError if `device` is no device's name, TransportError if the hub was closed."""
        if not DEVICE_NAME.match(device):
            raise ParameterError(f"{device!r} is not a device's name: 64 hexadecimal digits")
        self._send(device, frame)

    def receive(self, timeout_s: float, room_bytes: int | None = None) -> list[Inbound | Connected | Lost]:
        return self._receive(timeout_s, BATCH, room_bytes)

    def close(self) -> None:
        self._close()

    def _wake(self) -> None:
        wake = self._wake_broker
        if wake is not None:  # else it went down just now, and dropped what was sent
            wake()

    # For the broker.

    def up(self, wake: Callable[[], None]) -> None:
        """The broker listens. wake: has its thread call `take` soon; it is called from any thread, and must not block
        or raise."""
        with self._lock:
            if not self._is_closed:
                self._wake_broker, self._is_up = wake, True
                self._put_event(Connected())

    def down(self, reason: str) -> None:
        """The broker ended. What it was to take is lost. Nothing is said if it was not up."""
        with self._lock:
            was_up, self._is_up, self._wake_broker = self._is_up, False, None
            self._drop_outbox()
            if was_up and not self._is_closed:
                self._put_event(Lost(reason))

    def take(self, most: int) -> list[tuple[str, bytes]]:
        """Frames for devices, the oldest first. The broker was woken once for all that there are."""
        with self._lock:
            taken = [self._outbox.popleft() for _ in range(min(most, len(self._outbox)))]
            self._take(sum(len(frame) + FRAME_OVERHEAD_BYTES for _, frame in taken))
            more = bool(self._outbox)
        if more:
            self._wake()
        return taken

    def deliver(self, device: str, frame: bytes) -> None:
        """A frame from a device. Whether there is room for it is the caller's matter: see `waiting_bytes`."""
        with self._lock:
            if not DEVICE_NAME.match(device) or len(frame) > MAX_FRAME_BYTES:
                self._ignored += 1
            elif not self._is_closed:
                self._put(len(frame) + FRAME_OVERHEAD_BYTES, Inbound(device, frame))

    @property
    def waiting_bytes(self) -> int:
        """Delivered and not yet received."""
        with self._lock:
            return self._inbox_bytes
