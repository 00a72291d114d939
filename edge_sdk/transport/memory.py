"""A hub and devices in one process, without a network: for tests and rehearsals, with faults on demand.

It promises as little as a real broker does, and a test says what goes wrong: each frame's fate is asked of a
function, links go down and up by call. The same calls in the same order give the same deliveries. Hub and
transports may live in different threads.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from edge_sdk.crypto.hashing import tagged_hash
from edge_sdk.errors import ParameterError, TransportError
from edge_sdk.transport import DEVICE_NAME, Connected, Inbound, Lost
from edge_sdk.transport.wire import MAX_FRAME_BYTES, Leaving, encode_frame

log = logging.getLogger(__name__)

BATCH = 256
"""Frames that the hub gives at once."""


class Fate(Enum):
    """What becomes of a frame on its way."""

    ARRIVE = "arrive"
    DROP = "drop"
    DUPLICATE = "duplicate"
    HOLD = "hold"
    """It is overtaken: it arrives after the next frame of its link and direction, if one follows."""


@dataclass(frozen=True, slots=True)
class Passing:
    """A frame on its way. up: from the device.  number: of this device's frames in this direction, from 0."""

    device: str
    up: bool
    number: int
    frame: bytes


def arrive(passing: Passing) -> Fate:
    """No faults."""
    return Fate.ARRIVE


def chance(
    entropy: bytes, *, drop: float = 0.0, duplicate: float = 0.0, hold: float = 0.0
) -> Callable[[Passing], Fate]:
    """Faults with these probabilities, drawn for each frame from `entropy`, the device, direction and number.

    They do not depend on how threads take turns. Raises ParameterError if the probabilities sum to more than 1.
    """
    if min(drop, duplicate, hold) < 0 or not drop + duplicate + hold <= 1:
        raise ParameterError(f"drop {drop}, duplicate {duplicate} and hold {hold} are not probabilities of one choice")

    def fate(passing: Passing) -> Fate:
        place = f"{passing.device} {passing.up} {passing.number}".encode()
        coin = int.from_bytes(tagged_hash("memory faults", entropy, place)[:8], "little") / 2**64
        if coin < drop:
            return Fate.DROP
        if coin < drop + duplicate:
            return Fate.DUPLICATE
        if coin < drop + duplicate + hold:
            return Fate.HOLD
        return Fate.ARRIVE

    return fate


class _Way:
    """One direction of one device's link: what was held back, and how many frames passed."""

    def __init__(self) -> None:
        self.number = 0
        self.held: list[bytes] = []


class MemoryTransport:
    """A device's end. Made by `MemoryHub.connect`."""

    def __init__(self, hub: MemoryHub, device: str) -> None:
        self.device = device
        self._hub = hub
        self._inbox: deque[bytes | Connected | Lost] = deque([Connected()] if hub._is_up else [])
        self._arrived = threading.Condition(hub._lock)
        self._up, self._down = _Way(), _Way()
        self._is_up = hub._is_up
        self._is_closed = False

    def send(self, frame: bytes) -> None:
        with self._hub._lock:
            if self._is_closed:
                raise TransportError("the link was closed")
            if self._is_up and self._hub._is_up:
                for arrived in self._hub._pass(self.device, self._up, True, frame):
                    self._hub._put(Inbound(self.device, arrived))

    def receive(self, timeout_s: float) -> bytes | Connected | Lost | None:
        with self._hub._lock:
            self._arrived.wait_for(lambda: self._inbox or self._is_closed, timeout_s)
            if self._is_closed:
                raise TransportError("the link was closed")
            return self._inbox.popleft() if self._inbox else None

    def close(self) -> None:
        with self._hub._lock:
            self._is_closed = True
            self._is_up = False
            self._inbox.clear()
            self._hub._forget(self)
            self._arrived.notify_all()

    def _put(self, item: bytes | Connected | Lost) -> None:
        if isinstance(item, bytes) and len(self._inbox) >= self._hub._max_queued:
            self._hub.dropped += 1
            return
        self._inbox.append(item)
        self._arrived.notify_all()

    def _take_down(self, reason: str) -> None:
        self._is_up = False
        self._up.held.clear()
        self._down.held.clear()
        self._inbox.clear()
        self._put(Lost(reason))

    def _bring_up(self) -> None:
        self._is_up = True
        self._put(Connected())


class MemoryHub:
    """The coordinator's end and the broker in one.

    fate: asked once for every frame.  max_queued: frames that wait at one end; further ones are dropped.
    `dropped` counts what the queues and the frame limit dropped (not what `fate` did). `unsent_bytes` is 0, or what a
    test sets it to.
    """

    def __init__(self, fate: Callable[[Passing], Fate] = arrive, *, max_queued: int = 1 << 16) -> None:
        self.fate = fate
        self.unsent_bytes = 0
        self.dropped = 0
        self._max_queued = max_queued
        self._lock = threading.RLock()
        self._arrived = threading.Condition(self._lock)
        self._inbox: deque[Inbound | Connected | Lost] = deque([Connected()])
        self._devices: dict[str, MemoryTransport] = {}
        self._is_up = True
        self._is_closed = False

    def connect(self, device: str) -> MemoryTransport:
        """A new link of this device (64 lower-case hexadecimal digits). An older one is taken over, as brokers do.

        Raises ParameterError on another name, TransportError if the hub was closed.
        """
        if not DEVICE_NAME.match(device):
            raise ParameterError(f"{device!r} is not a device's name: 64 hexadecimal digits")
        with self._lock:
            if self._is_closed:
                raise TransportError("the hub was closed")
            older = self._devices.pop(device, None)
            if older is not None:
                older._take_down("another connection took over")
            transport = self._devices[device] = MemoryTransport(self, device)
            return transport

    def send(self, device: str, frame: bytes) -> None:
        with self._lock:
            if self._is_closed:
                raise TransportError("the hub was closed")
            transport = self._devices.get(device)
            if transport is not None and transport._is_up and self._is_up:
                for arrived in self._pass(device, transport._down, False, frame):
                    transport._put(arrived)

    def receive(self, timeout_s: float, room_bytes: int | None = None) -> list[Inbound | Connected | Lost]:
        with self._lock:
            if room_bytes is None:  # there always is
                self._arrived.wait_for(lambda: self._inbox or self._is_closed, timeout_s)
            if self._is_closed:
                raise TransportError("the hub was closed")
            return [self._inbox.popleft() for _ in range(min(BATCH, len(self._inbox)))]

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            for transport in self._devices.values():
                transport._take_down("the hub was closed")
            self._devices.clear()
            self._inbox.clear()
            self._arrived.notify_all()

    def disconnect(self, device: str, reason: str = "the link broke") -> None:
        """The device's link breaks: frames on their way to it are lost, and its last will, a Leaving, is published."""
        with self._lock:
            transport = self._devices[device]
            if transport._is_up:
                transport._take_down(reason)
                self._put(Inbound(device, encode_frame(Leaving())))

    def reconnect(self, device: str) -> None:
        """The device's link is up again, after `disconnect`."""
        with self._lock:
            transport = self._devices[device]
            if not transport._is_up:
                transport._bring_up()

    def stop_broker(self) -> None:
        """The broker dies with all that it held; no last will is published."""
        with self._lock:
            if not self._is_up:
                return
            self._is_up = False
            self._inbox.clear()
            self._put(Lost("the broker is gone"))
            for transport in self._devices.values():
                if transport._is_up:
                    transport._take_down("the broker is gone")

    def start_broker(self) -> None:
        """It is back and knows nothing; hub and devices reconnect."""
        with self._lock:
            if self._is_up:
                return
            self._is_up = True
            self._put(Connected())
            for transport in self._devices.values():
                transport._bring_up()

    def restart_broker(self) -> None:
        """`stop_broker`, `start_broker`."""
        with self._lock:
            self.stop_broker()
            self.start_broker()

    def _pass(self, device: str, way: _Way, up: bool, frame: bytes) -> list[bytes]:
        """The frames that arrive now that this one was sent."""
        if len(frame) > MAX_FRAME_BYTES:
            log.warning("dropped a frame of %d bytes %s device %s", len(frame), "from" if up else "to", device)
            self.dropped += 1
            return []
        frame = bytes(frame)
        fate = self.fate(Passing(device, up, way.number, frame))
        way.number += 1
        if fate is Fate.DROP:
            return []
        if fate is Fate.HOLD:
            way.held.append(frame)
            return []
        released, way.held = way.held, []
        return [frame] * (2 if fate is Fate.DUPLICATE else 1) + released

    def _put(self, item: Inbound | Connected | Lost) -> None:
        if isinstance(item, Inbound) and len(self._inbox) >= self._max_queued:
            self.dropped += 1
            return
        self._inbox.append(item)
        self._arrived.notify_all()

    def _forget(self, transport: MemoryTransport) -> None:
        if self._devices.get(transport.device) is transport:
            del self._devices[transport.device]
