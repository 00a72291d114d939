"""One client's connection to amqtt, with bounds: amqtt reads, keeps and answers whatever a client does or does not do.

Nothing here knows the broker.
"""

from __future__ import annotations

import asyncio
import asyncio.sslproto
import logging
import math
import ssl
import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any, SupportsIndex

from amqtt.adapters import StreamReaderAdapter, StreamWriterAdapter
from amqtt.mqtt.connect import ConnectPacket
from amqtt.mqtt.disconnect import DisconnectPacket
from amqtt.mqtt.protocol.broker_handler import BrokerProtocolHandler
from amqtt.mqtt.publish import PublishPacket
from amqtt.session import Session

from coordinator.broker import MAX_PACKET_BYTES
from coordinator.refusals import Refusals

log = logging.getLogger("sordino.broker")

HANDSHAKE_S = 15.0
"""Longer than a device waits for its own end of it."""
MAX_HANDSHAKES = 512
"""Begun within HANDSHAKE_S and not done; further ones are ended at once. A stranger's connections must not use up this
process's descriptors."""

UNREAD_PACKETS = 64
"""Of one client, read and not yet passed on, or not answered since it does not take the answers: then its socket is not
read, so that TCP holds it back. While the coordinator does not keep up, one that is not passed on is enough: a fleet's
clients have as much as this times their number."""

READS_AT_ONCE = 32
"""From what a client sent, before others have their turn: amqtt makes a task of each packet, and what was read does not
count before that ran."""

READ_BYTES = 17 << 10
"""Of one client's connection at once: a record of TLS."""

LOOK_S = 0.05
"""Between two looks whether there is room."""

LONGEST_LOOK_S = 1.0
"""Between two looks of one of many who look, after several in vain."""

refusals = Refusals(log)
"""Of all clients. amqtt makes its plugins itself: there is no other way to hand them one."""


class Stream(asyncio.StreamReader):
    """Knows when something came last: a packet may take a slow link longer than its client may be silent."""

    heard_s = math.inf

    def feed_data(self, data: Iterable[SupportsIndex]) -> None:
        self.heard_s = time.monotonic()
        super().feed_data(data)


class BoundedReader(StreamReaderAdapter):  # type: ignore[misc]
    """A packet announces its length, up to 256 MB, and is then read whole: more than a frame ends the connection. And
    amqtt reads on whatever becomes of what it read: here it waits."""

    session: Session | None = None
    handler: Handler | None = None
    is_behind: Callable[[], bool] = staticmethod(lambda: False)
    """Whether as much waits for the coordinator as may, of all clients."""
    silence_s = math.inf
    """How long the client may say nothing, by its own CONNECT."""
    _is_held = False
    _reads = 0

    def __init__(self, stream: Stream) -> None:
        super().__init__(stream)
        self._stream = stream

    def is_silent(self, now_s: float) -> bool:
        """Whether the client says nothing for too long, and is not held back."""
        return not self._is_held and now_s - self._stream.heard_s > self.silence_s

    async def read(self, n: int = -1) -> bytes:
        if n > MAX_PACKET_BYTES:
            raise ConnectionError(f"a packet of {n} bytes is over the limit of {MAX_PACKET_BYTES}")
        self._reads += 1
        if self._reads % READS_AT_ONCE == 0:
            await asyncio.sleep(0)
        wait_s = LOOK_S
        while self._is_full():
            self._is_held = True
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, LONGEST_LOOK_S)
        if self._is_held:
            self._is_held, self._stream.heard_s = False, time.monotonic()
        data: bytes = await super().read(n)
        return data

    def _is_full(self) -> bool:
        if self.session is None or self.handler is None:
            return False
        unpassed = self.session.delivered_message_queue.qsize()
        return max(unpassed, self.handler.unanswered) >= UNREAD_PACKETS or (unpassed > 0 and self.is_behind())


class Writer(StreamWriterAdapter):  # type: ignore[misc]
    def abort(self) -> None:
        """End the connection at once. When it is closed, asyncio gives the client half a minute to take leave."""
        self.is_closed = True
        self._writer.transport.abort()


class Handler(BrokerProtocolHandler):  # type: ignore[misc]
    """amqtt's end of one connection, where it keeps without bound what a client asks and does not take the answer of,
    and where it forgets the end of a connection that ends while it begins."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._answering = 0
        self._gone: asyncio.Future[DisconnectPacket | None] = asyncio.get_running_loop().create_future()

    @property
    def unanswered(self) -> int:
        """Packets of the client whose answer is not written."""
        asked: int = self._pending_subscriptions.qsize() + self._pending_unsubscriptions.qsize()
        return self._answering + asked

    def abort(self) -> None:
        if isinstance(self.writer, Writer):
            self.writer.abort()

    async def wait_disconnect(self) -> DisconnectPacket | None:
        return await self._gone

    async def handle_disconnect(self, disconnect: DisconnectPacket | None) -> None:
        """Also for a connection that just ended. The first time counts."""
        if not self._gone.done():
            self._gone.set_result(disconnect)

    async def handle_connect(self, connect: ConnectPacket) -> None:
        await self.handle_connection_closed()  # it may not say CONNECT twice

    async def stop(self) -> None:
        await self.handle_connection_closed()
        if self._reader_ready is not None and not self._reader_ready.is_set():
            # The reader's task is cancelled before its first step, and says neither that it began nor that it ended.
            self._reader_ready.set()
            self._reader_stopped.set()
        await super().stop()

    async def handle_publish(self, publish_packet: PublishPacket) -> None:
        if publish_packet.qos > 1:  # amqtt would keep it until the client says that it may go
            name = self.session.client_id
            refusals.say(name, f"{name[:16]} is cut off: it publishes with QoS {publish_packet.qos}")
            self.abort()
            return
        await super().handle_publish(publish_packet)

    async def _send_packet(self, packet: Any) -> None:
        answers = not isinstance(packet, PublishPacket)  # those have a bound of their own: `_has_room`
        self._answering += answers
        try:
            await super()._send_packet(packet)
        except OSError as error:  # amqtt expects two of the ways in which a connection ends, and prints the others
            log.debug("a connection ended: %s", error)
            await self.handle_connection_closed()
        finally:
            self._answering -= answers


_shaking: weakref.WeakKeyDictionary[Handshake, float] = weakref.WeakKeyDictionary()
"""When those began that are not done. A client that just goes away leaves its entry to the garbage collector, so what
counts is their age."""


def _are_too_many(now_s: float) -> bool:
    return sum(now_s - begun_s < HANDSHAKE_S for begun_s in list(_shaking.values())) >= MAX_HANDSHAKES


class Handshake(ssl.SSLObject):
    """A handshake that says why it failed: asyncio drops the error, and with it who was refused for what."""

    def do_handshake(self) -> None:
        try:
            if self not in _shaking:
                now_s = time.monotonic()
                if _are_too_many(now_s):
                    raise ssl.SSLError(1, f"{MAX_HANDSHAKES} others are under way")
                _shaking[self] = now_s
            super().do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):  # it goes on
            raise
        except ssl.SSLError as error:
            _shaking.pop(self, None)
            refusals.say("", f"a client was refused in its TLS handshake: {error}")
            raise
        _shaking.pop(self, None)


class Records(asyncio.sslproto.SSLProtocol):
    """asyncio keeps a buffer of 256 kB for each connection, for as long as it lasts. Here all have one: what is read
    into it is given to OpenSSL before the loop reads from another connection."""

    max_size = READ_BYTES
    _shared = bytearray(READ_BYTES)

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._ssl_buffer, self._ssl_buffer_view = self._shared, memoryview(self._shared)
