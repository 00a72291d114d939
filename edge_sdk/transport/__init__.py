"""How frames travel between a device and its coordinator. What is in them is not this package's matter.

A transport carries byte strings and promises little: they may be lost, repeated or overtaken, also after the network
said that they arrived. Whoever needs more asks again (docs/services.md section 3).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

DEVICE_NAME = re.compile(r"[0-9a-f]{64}\Z")
"""A device's name at the broker: its identity's public key, 64 lower-case hexadecimal digits."""


@dataclass(frozen=True, slots=True)
class Connected:
    """The link came up, for the first time or again: what was sent before may be lost, so say Hello."""


@dataclass(frozen=True, slots=True)
class Lost:
    """The link went down, or could not come up. The transport tries again by itself, with jittered back-off.

    reason: for people. While it stays down for the same reason, this is said once.
    """

    reason: str


class Transport(Protocol):
    """A device's link to its coordinator. One thread sends and receives; it reconnects until it is closed."""

    def send(self, frame: bytes) -> None:
        """Hand over a frame. It may get lost; while the link is down it does. Never blocks.

        Raises TransportError if it was closed.
        """

    def receive(self, timeout_s: float) -> bytes | Connected | Lost | None:
        """The next frame or event, or None after `timeout_s`. Raises TransportError if it was closed."""

    def close(self) -> None:
        """Leave in good order, with what was sent on its way where that is quick. Closing twice is harmless."""


@dataclass(frozen=True, slots=True)
class Inbound:
    """A frame from a device, which the broker knows by its certificate. device: public key, 64 hexadecimal digits."""

    device: str
    frame: bytes


class Hub(Protocol):
    """The coordinator's end of all devices' links. One thread sends and receives."""

    def send(self, device: str, frame: bytes) -> None:
        """As `Transport.send`, to one device. Nobody hears it if the device is not connected."""

    def receive(self, timeout_s: float, room_bytes: int | None = None) -> list[Inbound | Connected | Lost]:
        """What came: waits up to `timeout_s` for the first, then takes what is there, up to a few hundred.

        room_bytes: it returns, too, as soon as no more than this is unsent. None: not for that.
        Connected and Lost are of the hub's own link to the broker. Raises TransportError if it was closed.
        """

    @property
    def unsent_bytes(self) -> int:
        """Handed to `send` and not yet taken by the broker: whoever sends bulk waits while this is large."""

    def close(self) -> None:
        """As `Transport.close`."""
