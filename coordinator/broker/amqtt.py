"""amqtt inside this process, on a thread of its own, for machines without mosquitto. The same rules, in Python."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import threading
import time
from collections.abc import Callable, Collection, Coroutine
from functools import partial
from typing import Any

import amqtt.broker
from amqtt.adapters import ReaderAdapter, WriterAdapter
from amqtt.contexts import Action, ListenerConfig
from amqtt.errors import AMQTTError, MQTTError, ProtocolHandlerError
from amqtt.mqtt.protocol.broker_handler import BrokerProtocolHandler
from amqtt.plugins.base import BaseAuthPlugin, BaseTopicPlugin
from amqtt.session import Session
from cryptography import x509
from cryptography.x509.oid import NameOID

from coordinator.broker import (
    DEVICE_BYTES,
    FIRST_BACKOFF_S,
    LONGEST_BACKOFF_S,
    PATIENCE_S,
    STEADY_S,
    Listener,
)
from coordinator.broker.connections import (
    HANDSHAKE_S,
    LOOK_S,
    BoundedReader,
    Handler,
    Handshake,
    Records,
    Stream,
    Writer,
    refusals,
)
from coordinator.broker.inside import InsideHub
from coordinator.broker.rules import allowed
from edge_sdk.errors import ParameterError
from edge_sdk.transport.mqtt import DOWN, UP, Credentials

log = logging.getLogger("sordino.broker")

START_S = 20.0
END_S = 10.0
CONNECT_S = 10.0

STUCK_S = 30.0
"""A device that takes nothing for so long, while as much as it may have waits for it, is cut off."""

FRAMES_AT_ONCE = 64
"""For devices, between two looks at everything else."""

MESSAGE_BYTES = 4 << 10
"""What a message takes besides its data, about: packets, and a task that waits for the acknowledgement."""

_OLDEST = "sordino.oldest"

PATIENCE_FACTOR = 1.5
"""How often as long as it promised a client may be silent: MQTT's own rule."""

WATCH_S = 1.0
"""Between two looks who has fallen silent."""

REFUSED = 0x80
"""What a SUBACK says of a subscription that is refused."""


class TopicRules(BaseAuthPlugin, BaseTopicPlugin):  # type: ignore[misc]  # amqtt is untyped
    """amqtt's hooks. Who is connected was decided before, at CONNECT: its client id is its certificate's CN."""

    async def authenticate(self, *, session: Session) -> bool | None:
        return session.ssl_object is not None and _peer_name(session.ssl_object) == session.client_id

    async def topic_filtering(
        self, *, session: Session | None = None, topic: str | None = None, action: Action | None = None
    ) -> bool | None:
        if session is None or session.client_id is None or topic is None or action is None:
            return False
        if allowed(session.client_id, topic, action.value):
            return True
        refusals.topic(session.client_id, action.value, topic)
        return False


async def _pass_on(handler: BrokerProtocolHandler, topic: str, data: bytes, qos: int) -> None:
    try:
        await handler.mqtt_publish(topic, data, qos, retain=False)
    except (OSError, AMQTTError, ProtocolHandlerError) as error:
        # It went away, or is slow: no fault of anybody's, and asyncio would print a traceback.
        log.debug("a message to %s was not acknowledged: %s", topic, error)


class _Subscriptions(dict[str, list[tuple[Session, int]]]):
    """amqtt writes all of them out at each new one, for its log."""

    def __repr__(self) -> str:
        return f"{len(self)} subscriptions"


class _Broker(amqtt.broker.Broker):  # type: ignore[misc]
    """amqtt's broker where it trusts what a CONNECT says: here the certificate decides, before anything is done. And
    where it keeps whatever waits for somebody: here that has bounds, for each client and for all together. And where
    it holds each message against each subscription: here devices write to the coordinator, and it to them."""

    def __init__(self, config: dict[str, Any], revoked: Collection[str], link: InsideHub, queue_bytes: int) -> None:
        """link: the coordinator's.  queue_bytes: that may wait for it."""
        super().__init__(config)
        self._subscriptions = _Subscriptions()
        self._link = link
        self._begun: set[asyncio.Task[None]] = set()
        self.revoked = frozenset(revoked)
        self.silenced: frozenset[str] = frozenset()
        self._queue_bytes = queue_bytes
        self._first_to_wait = asyncio.Lock()
        self._cutting: dict[str, asyncio.Task[None]] = {}

    @staticmethod
    def _create_ssl_context(listener: ListenerConfig) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(listener["certfile"], listener["keyfile"])
        context.load_verify_locations(listener["cafile"])
        context.verify_mode = ssl.CERT_REQUIRED
        context.sslobject_class = Handshake
        return context

    async def _create_server_instance(
        self, listener_name: str, listener_type: Any, address: str | None, port: int, ssl_context: Any
    ) -> asyncio.Server:
        # As asyncio.start_server does it, but for the size of the connections' buffers.
        loop, connected = asyncio.get_running_loop(), partial(self.stream_connected, listener_name=listener_name)

        def connection() -> Records:
            stream = asyncio.StreamReaderProtocol(Stream(), connected)
            return Records(
                loop, stream, ssl_context, None, server_side=True, ssl_handshake_timeout=HANDSHAKE_S,
            )  # fmt: skip

        return await loop.create_server(connection, address, port, reuse_address=True)

    async def stream_connected(self, reader: Stream, writer: asyncio.StreamWriter, listener_name: str) -> None:
        try:
            await self._client_connected(listener_name, BoundedReader(reader), Writer(writer))
        except (OSError, EOFError, TimeoutError) as error:  # of the connection: amqtt would print a traceback
            log.info("a connection ended: %s", error)
        finally:
            writer.close()

    async def _initialize_client_session(
        self, reader: ReaderAdapter, writer: WriterAdapter, remote_address: str, remote_port: int
    ) -> tuple[BrokerProtocolHandler, Session]:
        connecting = Handler.init_from_connect(reader, writer, self.plugins_manager)
        handler, session = await asyncio.wait_for(connecting, CONNECT_S)
        name = None if session.ssl_object is None else _peer_name(session.ssl_object)
        reason = self._refusal(name, session)
        if reason is not None:
            refusals.say(name or "", f"{(name or 'a stranger')[:16]} from {remote_address} refused: {reason}")
            session.parent = 0
            handler.attach(session, reader, writer)
            await handler.mqtt_connack_authorize(authorize=False)
            await writer.close()
            raise MQTTError(reason)
        # Every session is a clean one: nothing is kept for who is not there.
        session.clean_session = True
        session.parent = 0
        if isinstance(reader, BoundedReader):
            reader.session, reader.handler, reader.is_behind = session, handler, self._is_behind
            if session.keep_alive:
                reader.silence_s = PATIENCE_FACTOR * session.keep_alive
        # amqtt would do nothing about who is silent, but stop in the middle of a packet's head, and read its rest as
        # another packet.
        session.keep_alive = 0
        return handler, session

    async def _authenticate(self, session: Session, listener: ListenerConfig) -> bool:
        """The last that is waited for before the session has its place: what was true at CONNECT may not be any more.
        So of two connections of one device that come at once, one stays, and none that was revoked meanwhile."""
        authenticated: bool = await super()._authenticate(session, listener)
        while session.client_id in self._sessions:
            await self.cut(session.client_id)
        reason = self._refusal(session.client_id, session)
        if reason is not None:
            refusals.say(session.client_id, f"{session.client_id[:16]} refused while it connected: {reason}")
            raise MQTTError(reason)
        return authenticated

    async def add_subscription(self, subscription: tuple[str, int], session: Session) -> int:
        topic, qos = subscription
        if qos == 0:  # what is on its way then is counted nowhere
            refusals.say(session.client_id, f"{session.client_id[:16]} may not subscribe with QoS 0: refused")
            return REFUSED
        code: int = await super().add_subscription((topic, 1), session)
        if not self._is_there(session):  # it was cut meanwhile: the place is that of the device's next session
            subscribed = self._subscriptions.get(topic, [])
            subscribed[:] = [(other, its_qos) for other, its_qos in subscribed if other is not session]
            return REFUSED
        return code

    def _is_there(self, session: Session) -> bool:
        there, _ = self._sessions.get(session.client_id, (None, None))
        return there is session

    async def _handle_message_delivery(
        self, client_session: Session, handler: BrokerProtocolHandler, delivery: asyncio.Future[Any]
    ) -> bool:
        """A client's next message. Where the coordinator does not keep up, devices wait, in the order in which they
        came: only the first looks, since a thousand that look twenty times a second leave the broker no time."""
        async with self._first_to_wait:
            while self._is_behind():
                await asyncio.sleep(LOOK_S)
        done: bool = await super()._handle_message_delivery(client_session, handler, delivery)
        # It is in the queue. amqtt's loops hold on to a client's last message until its next one, which may be hours.
        if (message := delivery.result()) is not None:
            message.data = b""
            message.publish_packet.payload = None
        return done

    def _is_behind(self) -> bool:
        return self._link.waiting_bytes >= self._queue_bytes

    async def _broadcast_message(
        self, session: Session | None, topic: str | None, data: bytes | bytearray | None, force_qos: int | None = None
    ) -> None:
        """A message or a will. What devices write is for the coordinator, and for nobody else."""
        if self._link.is_used and topic is not None and topic.startswith(UP):
            self._link.deliver(topic[len(UP) :], bytes(data or b""))
        else:
            await super()._broadcast_message(session, topic, data, force_qos)

    def pass_on(self) -> None:
        """What the coordinator wrote, to the devices that are there."""
        for device, frame in self._link.take(FRAMES_AT_ONCE):
            topic = DOWN + device
            for session, qos in tuple(self._subscriptions.get(topic, ())):
                if not self._is_there(session) or session.transitions.state != "connected":
                    continue
                if allowed(session.client_id, topic, "receive") and self._has_room(session):
                    self._begin(_pass_on(self._get_handler(session), topic, frame, qos))

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._begun.add(task)  # the loop does not keep it
        task.add_done_callback(self._begun.discard)

    def keep_out(self, revoked: frozenset[str], silenced: frozenset[str]) -> None:
        """From now on, also where they are connected."""
        self.revoked, self.silenced = revoked, silenced
        for name in (revoked | silenced) & self._sessions.keys():
            self._begin(self.cut(name))

    async def watch(self) -> None:
        """Cut off who says nothing for longer than it promised: nobody else finds that a device lost its power, and
        its will is not published before."""
        since_s = time.monotonic()
        while True:
            await asyncio.sleep(WATCH_S)
            before_s, since_s = since_s, time.monotonic()
            if since_s - before_s > 2 * WATCH_S:
                continue  # this process stood still: what they said waits to be read
            for name, (_, handler) in tuple(self._sessions.items()):
                reader = handler.reader
                if isinstance(reader, BoundedReader) and reader.is_silent(since_s):
                    log.info("%s is cut off: it said nothing for %.0f s", name[:16], reader.silence_s)
                    self._begin(self.cut(name))

    def _has_room(self, session: Session) -> bool:
        if _waiting_bytes(session) < DEVICE_BYTES:
            return True
        # Dropped: it is asked for again. A slow link is no fault; one that takes nothing at all is given up.
        name = session.client_id
        if _is_stuck(session, time.monotonic()) and name not in self._cutting:
            refusals.say(name, f"{name[:16]} is cut off: it does not read what it asks for")
            self._cutting[name] = asyncio.ensure_future(self._cut_off(name))
        return False

    async def _topic_filtering(self, session: Session, topic: str, action: Action) -> bool:
        # For what does not come or go by the link: who has the coordinator's certificate may do as it does.
        if action is Action.RECEIVE and not self._has_room(session):
            return False
        permitted: bool = await super()._topic_filtering(session, topic, action)
        return permitted

    async def _cut_off(self, name: str) -> None:
        try:
            await self.cut(name)
        finally:
            del self._cutting[name]

    def _refusal(self, name: str | None, session: Session) -> str | None:
        if name is None:
            return "it has no certificate"
        if name in self.revoked:
            return "it was revoked"
        if name in self.silenced:
            return "it floods, and is kept out for a while"
        if session.client_id != name:
            return "its client id is not its certificate's CN"
        if session.will_flag and not allowed(name, session.will_topic or "", "publish"):
            return f"its will is for {(session.will_topic or '')[:128]!r}"
        return None

    async def cut(self, name: str | None) -> None:
        """End the client's connection and session, if it has one."""
        if name is None or name not in self._sessions:
            return
        _, handler = self._sessions[name]
        await self._delete_session(name)
        await handler.handle_connection_closed()
        if isinstance(handler, Handler):
            handler.abort()
        await self._stop_handler(handler)

    async def shutdown(self) -> None:
        for _, handler in tuple(self._sessions.values()):  # the loop ends before they would take leave
            if isinstance(handler, Handler):
                handler.abort()
        await super().shutdown()

    async def retain_message(self, *_: Any) -> None:
        """Nothing is retained."""

    async def _publish_retained_messages_for_subscription(self, *_: Any) -> None:
        """Nothing is retained. amqtt asks for each subscription at each connect."""


def _waiting_bytes(session: Session) -> int:
    """What was passed on to the client, and not acknowledged by it."""
    waiting = session.inflight_out
    if len(waiting) < 64:  # not worth a sum: less than DEVICE_BYTES, whatever they are
        return len(waiting)
    return sum(len(message.data) + MESSAGE_BYTES for message in waiting.values())


def _is_stuck(session: Session, now_s: float) -> bool:
    """Whether what waits longest for the client has been the same for STUCK_S. Asked when something does not fit."""
    oldest = next(iter(session.inflight_out))
    since = session.attributes.get(_OLDEST)
    if since is None or since[0] != oldest:
        since = session.attributes[_OLDEST] = (oldest, now_s)
    return bool(now_s - since[1] >= STUCK_S)


def _peer_name(connection: ssl.SSLObject) -> str | None:
    """The CN of a certificate that the handshake verified."""
    der = connection.getpeercert(binary_form=True)
    if der is None:
        return None
    names = x509.load_der_x509_certificate(der).subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if len(names) == 1 else None


class Amqtt:
    """See `coordinator.broker.Broker`."""

    name = "amqtt"

    def __init__(self, listener: Listener, revoked: Collection[str]) -> None:
        """Listens when this returns. Raises ParameterError with what amqtt said if it does not start."""
        listener.check_free(PATIENCE_S)
        self.url = listener.local_url
        self._listener = listener
        self._lock = threading.Lock()
        self._revoked, self._silenced = frozenset(revoked), frozenset[str]()
        self._link = InsideHub()
        self._running: tuple[asyncio.AbstractEventLoop, _Broker, asyncio.Event] | None = None
        self._closing = threading.Event()
        self._first = threading.Event()
        self._problem = "it took too long"
        self._thread = threading.Thread(target=self._supervise, name="amqtt", daemon=True)
        self._thread.start()
        if not self._first.wait(START_S) or self._running is None:
            self.close()
            raise ParameterError(f"amqtt did not start: {self._problem}")

    def link(self, credentials: Credentials) -> InsideHub:
        """There is one; it needs no credentials."""
        self._link.is_used = True
        return self._link

    def revoke(self, devices: Collection[str]) -> None:
        with self._lock:
            self._revoked = frozenset(devices)
            self._tell()

    def silence(self, devices: Collection[str]) -> None:
        with self._lock:
            self._silenced = frozenset(devices)
            self._tell()

    def _tell(self) -> None:
        if self._running is not None:
            loop, broker, _ = self._running
            _call_soon(loop, partial(broker.keep_out, self._revoked, self._silenced))

    def close(self) -> None:
        self._closing.set()
        with self._lock:
            if self._running is not None:
                loop, _, leave = self._running
                _call_soon(loop, leave.set)
        self._thread.join(END_S)

    def _supervise(self) -> None:
        delay_s = FIRST_BACKOFF_S
        while not self._closing.is_set():
            since = time.monotonic()
            try:
                asyncio.run(self._serve())
            except Exception as error:  # noqa: BLE001 - whatever ended it, it is started again
                self._problem = f"{type(error).__name__}: {error}"
            with self._lock:
                self._running = None
            self._link.down(f"amqtt ended: {self._problem}")
            self._first.set()
            if self._closing.is_set():
                return
            if time.monotonic() - since > STEADY_S:
                delay_s = FIRST_BACKOFF_S
            log.error("amqtt ended: %s. Starting it again in %.1f s", self._problem, delay_s)
            if self._closing.wait(delay_s):
                return
            delay_s = min(2 * delay_s, LONGEST_BACKOFF_S)

    async def _serve(self) -> None:
        directory, address = self._listener.directory, self._listener.address
        host = f"[{address}]" if ":" in address else address
        config: dict[str, Any] = {
            "listeners": {
                "default": {
                    "type": "tcp",
                    "bind": f"{host}:{self._listener.port}",
                    "ssl": True,
                    "cafile": str(directory / "ca.pem"),
                    "certfile": str(directory / "server.pem"),
                    "keyfile": str(directory / "server.key"),
                }
            },
            "plugins": {f"{TopicRules.__module__}.{TopicRules.__qualname__}": {}},
        }
        loop, leave = asyncio.get_running_loop(), asyncio.Event()
        with self._lock:
            broker = _Broker(config, self._revoked, self._link, self._listener.queue_bytes)
        await broker.start()
        with self._lock:
            broker.revoked, broker.silenced = self._revoked, self._silenced
            self._running = loop, broker, leave
            if self._closing.is_set():
                leave.set()
        self._link.up(partial(_call_soon, loop, broker.pass_on))
        self._first.set()
        watching = asyncio.ensure_future(broker.watch())
        try:
            await leave.wait()
        finally:
            watching.cancel()
            await broker.shutdown()


def _call_soon(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop was closed: the broker has ended, and what it was to do is lost
        loop.call_soon_threadsafe(call)
