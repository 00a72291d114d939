"""The broker that devices and coordinator meet at: a mosquitto child, amqtt in this process, or one that is there.

Whichever it is, the rules are the same: TLS both ways, a device is its certificate's CN, it writes `fl/v1/up/<CN>` and
reads `fl/v1/dn/<CN>` and nothing else, the coordinator reads `fl/v1/up/+` and writes below `fl/v1/dn/`. A broker is
never the source of truth: it may lose everything at any time.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from edge_sdk.errors import ParameterError
from edge_sdk.transport import Hub
from edge_sdk.transport.mqtt import Credentials
from edge_sdk.transport.wire import MAX_FRAME_BYTES

Kind = Literal["auto", "mosquitto", "amqtt", "external"]

MAX_PACKET_BYTES = MAX_FRAME_BYTES + 1024
"""An MQTT packet: a frame, its topic and a few bytes of header."""

SLACK_BYTES = 16 << 20
"""What may wait for the coordinator besides the uploads that it asked for."""

DEVICE_BYTES = 16 << 20
"""What may wait for one device; more is dropped, and asked for again. A download asks for 1 MB at a time."""

PATIENCE_S = 3.0
FIRST_BACKOFF_S = 0.5
LONGEST_BACKOFF_S = 30.0
STEADY_S = 60.0
"""A broker that ran for so long is started again at once when it ends."""


@dataclass(frozen=True)
class Listener:
    """Where the broker listens, and the directory with ca.pem, server.pem, server.key and crl.pem.

    queue_bytes: that may wait for the coordinator: all that it may ask for at a time, and SLACK_BYTES.
    """

    directory: Path
    address: str
    port: int
    queue_bytes: int = (32 << 20) + SLACK_BYTES

    @property
    def local_url(self) -> str:
        """For the coordinator on the same machine."""
        return f"mqtts://{_bracketed(self.local_address)}:{self.port}"

    @property
    def local_address(self) -> str:
        """An address of this machine that reaches the listener."""
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.address, self.address)  # noqa: S104 - only compared

    def check_free(self, patience_s: float = 0.0) -> None:
        """Raises ParameterError if something else listens there: it would be taken for our broker.

        patience_s: how long it may take to end. The broker of a coordinator that was killed just now does.
        """
        deadline = time.monotonic() + patience_s
        while True:
            try:
                self._try_to_bind()
            except ParameterError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.05)
            else:
                return

    def _try_to_bind(self) -> None:
        family = socket.AF_INET6 if ":" in self.address else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self.address, self.port))
            except OSError as error:
                raise ParameterError(
                    f"the broker cannot listen on {self.address}:{self.port}: {error.strerror}. Another broker? "
                    "coordinator.toml has [listen] broker_port"
                ) from error


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


class Broker(Protocol):
    """A broker that runs, and is started again when it ends, until it is closed."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def url(self) -> str:
        """Where the coordinator's own machine reaches it."""

    def link(self, credentials: Credentials) -> Hub:
        """The coordinator's link to it. Whoever asks for it closes it, before the broker.

        credentials: the coordinator's.
        """

    def revoke(self, devices: Collection[str]) -> None:
        """From now on these devices (all that were ever revoked, by CN) are kept out, also where they are connected.

        The CA's crl.pem names their certificates already.
        """

    def silence(self, devices: Collection[str]) -> None:
        """Keep these out, and no others any more that are not revoked: they flood. What they sent may still come.

        Not waited for, and forgotten when the coordinator ends.
        """

    def close(self) -> None:
        """End it. Closing twice is harmless."""


def start_broker(kind: Kind, listener: Listener, url: str | None, revoked: Collection[str]) -> Broker:
    """The broker, listening when this returns. kind "auto": mosquitto where there is one, else amqtt.

    url: of the one that is there, for kind "external".
    Raises ParameterError if it does not start, with what it said.
    """
    # Each is imported where it is wanted: amqtt takes memory and half a second.
    if kind == "external":
        from coordinator.broker.external import ExternalBroker

        if url is None:
            raise ParameterError('coordinator.toml: [broker] kind = "external" needs url')
        return ExternalBroker(url, listener.directory)
    from coordinator.broker.mosquitto import Mosquitto, find_mosquitto

    program = find_mosquitto() if kind in ("auto", "mosquitto") else None
    if program is not None:
        return Mosquitto(program, listener, revoked)
    if kind == "mosquitto":
        raise ParameterError(
            "there is no mosquitto in PATH or /usr/sbin: install it (apt-get install mosquitto), or choose "
            'kind = "amqtt" in coordinator.toml'
        )
    from coordinator.broker.amqtt import Amqtt

    return Amqtt(listener, revoked)
