"""The links over MQTT, on paho-mqtt: `MqttTransport` for a device, `MqttHub` for the coordinator.

MQTT 3.1.1 everywhere, QoS 1, clean sessions, nothing retained: brokers differ above that, and nothing here needs
more, because every frame is repeated until it is answered (docs/services.md section 3). What the broker kept
for a client that went away would be stale, so it is asked to keep nothing.

One thread per link owns the paho client and runs its own loop around it, by the interface that paho has for external
event loops. paho's own thread (`loop_start`) would do with less code, but it hides why a connection failed, waits
without jitter, reads on when nobody takes what was read, and keeps without bound what could not be sent.

No WebSockets: paho 2.2 loses a message of which the socket takes only a part (its issue 887), as with ours it often
would.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from edge_sdk.errors import ParameterError
from edge_sdk.transport import DEVICE_NAME, Connected, Inbound, Lost
from edge_sdk.transport.queues import FRAME_OVERHEAD_BYTES, Queues
from edge_sdk.transport.wire import MAX_FRAME_BYTES, Leaving, encode_frame

log = logging.getLogger(__name__)

UP = "fl/v1/up/"
DOWN = "fl/v1/dn/"

CONNECT_S = 10.0
"""Seconds for TCP and TLS, and again for the broker's answers to CONNECT and SUBSCRIBE."""
STEADY_S = 30.0
"""A link that was up for so long was a good one: the next back-off starts from the beginning."""
FLUSH_S = 2.0
"""Seconds that `close` gives to what is still on its way out."""
BATCH = 256
"""Frames that the hub gives at once."""
READ_BYTES = 128 << 10
"""What is read at once: some records of TLS, which have 16 KiB each."""
WRITE_BYTES = 4 << 10
"""What is not longer than this waits for others that are written in the same pass."""
PACKETS_AT_ONCE = 64
"""Packets between two looks at everything else."""
MAX_PACKET_BYTES = 1 << 20
"""Of an MQTT packet to a device. One that announces more, up to 256 MB in MQTT 3.1.1, ends the connection unread."""

_PORTS = {"mqtts": 8883, "mqtt": 1883}

_UNAVAILABLE = 136
"""paho's reason code for an MQTT 3.1.1 broker that says "server unavailable"."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Credentials:
    """PEM files for mutual TLS: whom to trust, and who we are. They are read again at every connection attempt."""

    ca_path: Path
    certificate_path: Path
    key_path: Path

    def context(self) -> _Context:
        """TLS 1.2 or later; the broker's certificate must be of our CA and for the name in the URL.

        Raises ParameterError that names the file that cannot be used.
        """
        context = _Context(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_verify_locations(cafile=self.ca_path)
        except OSError as error:
            raise ParameterError(f"the CA's certificate {self.ca_path}: {error}") from error
        try:
            context.load_cert_chain(self.certificate_path, self.key_path, password=_no_password)
        except (OSError, ValueError) as error:
            raise ParameterError(f"certificate {self.certificate_path} with key {self.key_path}: {error}") from error
        return context


class _Stream(ssl.SSLSocket):
    """A non-blocking TLS socket that reads what is there at once, and writes what is short together.

    paho reads a packet's head byte by byte and its body record by record, and writes each acknowledgement by itself:
    for a coordinator that was half of what an upload cost on this link. `flush` writes what waits; `close` too, if it
    can be written at once.
    """

    # Not in __init__: SSLContext makes the object without calling it.
    _buffer: memoryview | None = None
    _begin = 0
    _end = 0
    _failed: OSError | None = None
    _unwritten: bytearray | None = None

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        """Up to `buflen` bytes, none at the end. They are a view that is good until the next call: paho copies it."""
        if self._begin == self._end:
            self._fill()
        begin, self._begin = self._begin, min(self._begin + buflen, self._end)
        return self._buffer[begin : self._begin]  # type: ignore[index, return-value]

    def _fill(self) -> None:
        if self._failed is not None:
            raise self._failed
        if self._buffer is None:
            self._buffer = memoryview(bytearray(READ_BYTES))
        self._begin = self._end = 0
        self._end = got = self.recv_into(self._buffer, READ_BYTES)
        while got and self._end < READ_BYTES:
            try:
                got = self.recv_into(self._buffer[self._end :], READ_BYTES - self._end)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return
            except OSError as error:
                self._failed = error  # said once what came before it was read: it may be the broker's last word
                return
            self._end += got

    def pending(self) -> int:
        return self._end - self._begin + super().pending()

    def send(self, data: Any, flags: int = 0) -> int:
        if self._unwritten is None:
            self._unwritten = bytearray()
        if len(data) > WRITE_BYTES or len(self._unwritten) > WRITE_BYTES:
            self.flush()
            if len(data) > WRITE_BYTES:
                return super().send(data)
        self._unwritten += data
        return len(data)

    def flush(self) -> None:
        """Raises SSLWantWriteError or SSLWantReadError if the socket takes no more now, OSError if it is broken."""
        while self._unwritten:
            sent = super().send(self._unwritten)
            del self._unwritten[:sent]

    def close(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.flush()
        super().close()


class _Context(ssl.SSLContext):
    """Remembers its last socket: paho leaves that of a failed handshake to the garbage collector."""

    last: ssl.SSLSocket | None = None

    def wrap_socket(self, *args: Any, **kwargs: Any) -> ssl.SSLSocket:
        self.last = super().wrap_socket(*args, **kwargs)
        return self.last


class _PahoErrors(logging.Handler):
    """What paho logs as errors. Its on_log callback would format each of several lines that it has for a packet."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__()
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        self._tell(record.getMessage())


class _Bounded(paho.Client):
    """paho reads a packet of any length into memory; what a broker announces must not be what a small device holds."""

    def _sock_recv(self, bufsize: int) -> bytes:
        if bufsize > MAX_PACKET_BYTES:
            raise ConnectionError(f"a packet of {bufsize} bytes is over the limit of {MAX_PACKET_BYTES}")
        return super()._sock_recv(bufsize)


def _no_password() -> str:
    # OpenSSL would ask at the terminal.
    raise ValueError("the key is encrypted; it must be readable without a password")


@dataclass(frozen=True, slots=True)
class Backoff:
    """Seconds between attempts to connect: doubled each time up to `longest_s`, of which a random half is waited off.

    refused_s, longest_refused_s: the same, after the broker said that it refuses us (our certificate, our name, our
    topic), or we refused its certificate: seconds will not change that, and each attempt costs both a handshake.
    """

    first_s: float = 1.0
    longest_s: float = 60.0
    refused_s: float = 30.0
    longest_refused_s: float = 900.0

    def delay_s(self, failures: int, refused: bool, jitter: float) -> float:
        """What to wait after so many failures in a row (>= 1). jitter: uniform in [0, 1)."""
        first_s, longest_s = (self.refused_s, self.longest_refused_s) if refused else (self.first_s, self.longest_s)
        doubled_s: float = first_s * 2.0 ** min(failures - 1, 30)
        return min(longest_s, doubled_s) * (0.5 + 0.5 * jitter)


class _Refused(Exception):
    """The broker does not want us, or we do not trust it."""


class _Link(Queues[T]):
    """A connection to the broker that is kept up by a thread of its own. `T` is what a frame becomes for the reader.

    accept: turns topic and payload into an item for the reader, None for what is not meant for us. It runs on the
    network thread and must not block.
    """

    def __init__(
        self,
        url: str,
        credentials: Credentials | None,
        *,
        client_id: str,
        subscription: str,
        accept: Callable[[str, bytes], T | None],
        will: tuple[str, bytes] | None,
        plaintext: bool,
        keepalive_s: int,
        in_flight: int,
        queue_bytes: int,
        backoff: Backoff,
        bounded: bool,
    ) -> None:
        """bounded: whether a packet over MAX_PACKET_BYTES ends the connection. Not for the coordinator, whose link any
        device could end then: its broker bounds packets."""
        self._bounded = bounded
        self._host, self._port, encrypted = _address_of(url, plaintext)
        if encrypted != (credentials is not None):
            raise ParameterError(
                f"{url}: an encrypted link takes credentials, and only an encrypted one has use for them"
            )
        if credentials is not None:
            credentials.context()
        if keepalive_s < 5 or in_flight < 1 or queue_bytes < MAX_FRAME_BYTES:
            raise ParameterError(
                f"keepalive_s {keepalive_s} (5 or more), in_flight {in_flight} (1 or more), "
                f"queue_bytes {queue_bytes} ({MAX_FRAME_BYTES} or more)"
            )
        self._credentials = credentials
        self._client_id = client_id
        self._subscription = subscription
        self._accept = accept
        self._will = will
        self._keepalive_s = keepalive_s
        self._in_flight = in_flight
        self._backoff = backoff
        super().__init__(queue_bytes)
        self._waits_for_room = False  # under the lock
        # Of the network thread alone:
        self._sent: dict[int, int] = {}
        self._answered = False
        self._subscribed = False
        self._refusal: str | None = None
        self._last_error = ""
        self._said: str | None = None
        self._up_since_s = math.inf
        self._overdue = False

        self._paho_log = logging.Logger("paho", logging.ERROR)
        self._paho_log.addHandler(_PahoErrors(self._on_error))

        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"mqtt {client_id[:16]}", daemon=True)
        self._thread.start()

    # For the owner's thread.

    def send(self, topic: str, frame: bytes) -> None:
        self._send(topic, frame)

    def receive(self, timeout_s: float, most: int, room_bytes: int | None = None) -> list[T | Connected | Lost]:
        taken = self._receive(timeout_s, most, room_bytes)
        with self._lock:
            has_room = self._waits_for_room and self._inbox_bytes < self._queue_bytes
        if has_room:
            self._wake()
        return taken

    def close(self) -> None:
        was_up = self._close()
        self._closing.set()
        self._wake()
        # A thread that is inside a connection attempt ends by itself when that does; nobody needs to wait for it.
        self._thread.join(FLUSH_S + 1.0 if was_up else 0.5)

    # For the network thread.

    def _run(self) -> None:
        failures = 0
        while not self._closing.is_set():
            self._up_since_s = math.inf
            refused = False
            try:
                reason = self._live()
            except _Refused as error:
                reason, refused = str(error), True
            except Exception as error:  # noqa: BLE001 - on bytes that it did not expect paho raises anything
                reason, refused = f"{type(error).__name__}: {error}", _is_refusal(error)
            if self._closing.is_set():
                break
            self._down(reason)
            steady = time.monotonic() - self._up_since_s >= STEADY_S
            failures = 1 if steady else failures + 1
            jitter = int.from_bytes(os.urandom(4), "little") / 2**32
            self._closing.wait(self._backoff.delay_s(failures, refused, jitter))
        with self._lock:
            self._outbox.clear()
            self._unsent_bytes = 0
        self._wake_in.close()
        with self._lock:
            self._wake_out.close()

    def _live(self) -> str:
        """One connection, from the attempt to its end. Returns why it ended."""
        self._sent.clear()
        self._answered = False
        self._subscribed = False
        self._refusal = None
        self._last_error = ""
        context = None
        if self._credentials is not None:
            context = self._credentials.context()
            context.sslsocket_class = _Stream
        client = self._client(context)
        try:
            client.connect(self._host, self._port, keepalive=self._keepalive_s)
            self._carry(client)
        finally:
            # Without a DISCONNECT, so that the broker publishes the will. After one there is no socket any more.
            if (sock := client.socket()) is not None:
                sock.close()
            if context is not None and context.last is not None:
                context.last.close()
        if self._refusal is not None:
            raise _Refused(self._refusal)
        reason = self._last_error or "the broker closed the connection"
        if context is not None and not self._answered:
            # In TLS 1.3 a client hears only after its handshake that its certificate was refused, and often hears no
            # more than the connection's end, which can have other causes: no reason to wait as after a refusal.
            reason += " (before it answered: it may not accept our certificate)"
        return reason

    def _client(self, context: ssl.SSLContext | None) -> paho.Client:
        # A new one for each connection: nothing of the last one is sent again behind our back.
        kind = _Bounded if self._bounded else paho.Client
        client = kind(
            CallbackAPIVersion.VERSION2,
            client_id=self._client_id,
            clean_session=True,
            protocol=paho.MQTTv311,
            reconnect_on_failure=False,
        )
        if context is not None:
            client.tls_set_context(context)
        if self._will is not None:
            topic, payload = self._will
            client.will_set(topic, payload, qos=1, retain=False)
        client.connect_timeout = CONNECT_S
        client.max_inflight_messages = self._in_flight
        client.on_socket_open = _without_delay
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        client.enable_logger(self._paho_log)
        return client

    def _carry(self, client: paho.Client) -> None:
        """Move frames both ways until the connection ends or we are to leave."""
        poll = select.poll()
        poll.register(self._wake_in, select.POLLIN)
        answer_by_s = time.monotonic() + CONNECT_S
        paused_since_s: float | None = None
        leave_by_s: float | None = None
        while (sock := client.socket()) is not None and self._refusal is None:
            now_s = time.monotonic()
            if not self._subscribed and now_s > answer_by_s:
                self._last_error = "the broker does not answer"
                return
            if self._closing.is_set():
                leave_by_s = leave_by_s or now_s + FLUSH_S
                if not self._subscribed or now_s >= leave_by_s or not self.unsent_bytes:
                    client.disconnect()
                    return

            # Whoever does not take what came stops us from reading, so that TCP holds the broker back. If that lasts,
            # what comes is read and dropped: an unread PINGRESP would end the link.
            if not self._is_full():
                paused_since_s = None
            elif paused_since_s is None:
                paused_since_s = now_s
            self._overdue = paused_since_s is not None and now_s - paused_since_s >= self._keepalive_s / 2
            reading = select.POLLIN if paused_since_s is None or self._overdue else 0
            try:
                writing = select.POLLOUT if not _is_flushed(sock) or client.want_write() else 0
            except OSError as error:
                self._last_error = f"failed to write: {error}"
                self._note(client.loop_read())  # the broker may have said why
                return
            fd = sock.fileno()
            poll.register(fd, reading | writing)
            # TLS may hold bytes that the socket no longer has.
            waiting = reading != 0 and _buffered_bytes(sock) > 0
            # A steady link wakes the processor for its keepalive alone.
            tick_ms = 100 if not self._subscribed or leave_by_s is not None else min(5000, self._keepalive_s * 250)
            ready = dict(poll.poll(0 if waiting else tick_ms))
            poll.unregister(fd)

            if self._wake_in.fileno() in ready:
                with contextlib.suppress(BlockingIOError):
                    self._wake_in.recv(4096)
            events = ready.get(fd, 0)
            if waiting or events & (select.POLLIN | select.POLLHUP | select.POLLERR | select.POLLNVAL):
                self._read(client, sock)
            if events & select.POLLOUT:
                self._note(client.loop_write())
            self._publish(client)
            self._note(client.loop_misc())

    def _read(self, client: paho.Client, sock: Any) -> None:
        """What came, as far as there is room for it."""
        for _ in range(PACKETS_AT_ONCE):
            self._note(client.loop_read())
            if client.socket() is not sock or _buffered_bytes(sock) == 0 or self._is_full():
                return

    def _note(self, result: MQTTErrorCode) -> None:
        """Keep what paho says of the connection's end; what it logged before that says more."""
        if result not in (MQTTErrorCode.MQTT_ERR_SUCCESS, MQTTErrorCode.MQTT_ERR_NO_CONN) and not self._last_error:
            self._last_error = paho.error_string(result)

    def _publish(self, client: paho.Client) -> None:
        while len(self._sent) < self._in_flight and client.socket() is not None:
            with self._lock:
                if not self._outbox:
                    return
                topic, frame = self._outbox.popleft()
            info = client.publish(topic, frame, qos=1)
            if info.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
                return  # The connection is gone, and so is the frame.
            self._sent[info.mid] = len(frame) + FRAME_OVERHEAD_BYTES

    def _is_full(self) -> bool:
        with self._lock:
            self._waits_for_room = self._inbox_bytes >= self._queue_bytes
            return self._waits_for_room

    def _up(self) -> None:
        self._up_since_s = time.monotonic()
        self._said = None
        log.info("connected to %s:%d as %s", self._host, self._port, self._client_id)
        with self._lock:
            self._is_up = True
            self._put_event(Connected())

    def _down(self, reason: str) -> None:
        with self._lock:
            self._is_up = False
            self._drop_outbox()
            self._dropped += len(self._sent)
            self._sent.clear()
            if reason == self._said:
                return
            self._said = reason
            self._put_event(Lost(reason))
        log.warning("no link to %s:%d: %s", self._host, self._port, reason)

    def _wake(self) -> None:
        # Full means that the thread has yet to wake; closed, that it has ended.
        with contextlib.suppress(BlockingIOError, OSError):
            self._wake_out.send(b"\0")

    # paho's callbacks, on the network thread. They must not raise.

    def _on_connect(
        self,
        client: paho.Client,
        _data: Any,
        _flags: paho.ConnectFlags,
        code: ReasonCode,
        _properties: Properties | None,
    ) -> None:
        self._answered = True
        if code.value == _UNAVAILABLE:
            self._last_error = f"the broker: {code}"
            return
        if code.is_failure:
            self._refusal = f"the broker refused the connection: {code}"
            return
        client.subscribe(self._subscription, qos=1)

    def _on_subscribe(
        self, _client: paho.Client, _data: Any, _mid: int, codes: list[ReasonCode], _properties: Properties | None
    ) -> None:
        if any(code.is_failure for code in codes):
            self._refusal = f"the broker refused the subscription to {self._subscription}"
        elif not self._subscribed:
            self._subscribed = True
            self._up()

    def _on_message(self, _client: paho.Client, _data: Any, message: paho.MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:
            topic = ""
        payload = message.payload
        if len(payload) > MAX_FRAME_BYTES:
            log.warning("dropped a frame of %d bytes on %r: the limit is %d", len(payload), topic, MAX_FRAME_BYTES)
            with self._lock:
                self._dropped += 1
            return
        # Nobody of ours retains: what is retained was left by somebody to be found at every reconnect.
        item = None if message.retain else self._accept(topic, bytes(payload))
        with self._lock:
            if item is None:
                self._ignored += 1
            elif self._inbox_bytes >= self._queue_bytes * (1 if self._overdue else 2):
                # One call of paho's reads several packets: what comes with the frame that filled the queue is kept.
                self._dropped += 1
            else:
                self._put(len(payload) + FRAME_OVERHEAD_BYTES, item)

    def _on_publish(
        self, _client: paho.Client, _data: Any, mid: int, _code: ReasonCode, _properties: Properties | None
    ) -> None:
        cost = self._sent.pop(mid, 0)
        with self._lock:
            self._take(cost)

    def _on_error(self, text: str) -> None:
        self._last_error = text
        if _sounds_like_refusal(text):
            self._refusal = text


class MqttTransport:
    """A device's link: a `Transport`.

    Frames that were received wait in a queue of `queue_bytes`. While it is full nothing is read, so the broker holds
    back what is for us; after half the keepalive what comes is dropped, as is what is sent while as much waits to go
    out.
    """

    def __init__(
        self,
        url: str,
        device: str,
        credentials: Credentials | None,
        *,
        plaintext: bool = False,
        keepalive_s: int = 60,
        in_flight: int = 8,
        queue_bytes: int = 8 << 20,
        backoff: Backoff = Backoff(),
    ) -> None:
        """Starts to connect, and returns at once.

        url: mqtts://host[:port]; with `plaintext`, for tests on loopback, mqtt://host[:port] and no credentials.
        device: its name, the certificate's CN.  in_flight: frames sent and not yet acknowledged by the broker.
        Raises ParameterError on a wrong argument, or if the credentials cannot be read.
        """
        if not DEVICE_NAME.match(device):
            raise ParameterError(f"{device!r} is not a device's name: 64 hexadecimal digits")
        own, self._up = DOWN + device, UP + device
        self._link: _Link[bytes] = _Link(
            url,
            credentials,
            client_id=device,
            subscription=own,
            accept=lambda topic, payload: payload if topic == own else None,
            will=(self._up, encode_frame(Leaving())),
            bounded=True,
            plaintext=plaintext,
            keepalive_s=keepalive_s,
            in_flight=in_flight,
            queue_bytes=queue_bytes,
            backoff=backoff,
        )

    def send(self, frame: bytes) -> None:
        self._link.send(self._up, frame)

    def receive(self, timeout_s: float) -> bytes | Connected | Lost | None:
        items = self._link.receive(timeout_s, 1)
        return items[0] if items else None

    @property
    def unsent_bytes(self) -> int:
        """Handed to `send` and not yet taken by the broker, with some bytes of overhead for each frame."""
        return self._link.unsent_bytes

    @property
    def dropped(self) -> int:
        """Frames that were over the limit, or for which there was no room or no link."""
        return self._link.dropped

    def close(self) -> None:
        self._link.close()


class MqttHub:
    """The coordinator's link: a `Hub`. Its queues are as `MqttTransport` says.

    `send` drops a frame if `queue_bytes` of others wait for the broker: whoever sends much looks at `unsent_bytes`
    first.
    """

    def __init__(
        self,
        url: str,
        credentials: Credentials | None,
        *,
        client_id: str = "coordinator",
        plaintext: bool = False,
        keepalive_s: int = 60,
        in_flight: int = 64,
        queue_bytes: int = 32 << 20,
        backoff: Backoff = Backoff(longest_s=5.0),
    ) -> None:
        """As `MqttTransport`. client_id: a second link of this name takes the first one's place at the broker."""
        self._link: _Link[Inbound] = _Link(
            url,
            credentials,
            client_id=client_id,
            subscription=UP + "+",
            accept=_inbound,
            will=None,
            bounded=False,
            plaintext=plaintext,
            keepalive_s=keepalive_s,
            in_flight=in_flight,
            queue_bytes=queue_bytes,
            backoff=backoff,
        )

    def send(self, device: str, frame: bytes) -> None:
        """Raises ParameterError if `device` is no device's name, TransportError if the hub was closed."""
        if not DEVICE_NAME.match(device):
            raise ParameterError(f"{device!r} is not a device's name: 64 hexadecimal digits")
        self._link.send(DOWN + device, frame)

    def receive(self, timeout_s: float, room_bytes: int | None = None) -> list[Inbound | Connected | Lost]:
        return self._link.receive(timeout_s, BATCH, room_bytes)

    @property
    def unsent_bytes(self) -> int:
        return self._link.unsent_bytes

    @property
    def dropped(self) -> int:
        """Frames that were over the limit, or for which there was no room or no link."""
        return self._link.dropped

    @property
    def ignored(self) -> int:
        """Messages that no device can have sent under our rules: on another topic, or retained."""
        return self._link.ignored

    def close(self) -> None:
        self._link.close()


def _inbound(topic: str, payload: bytes) -> Inbound | None:
    device = topic.removeprefix(UP)
    if device == topic or not DEVICE_NAME.match(device):
        return None
    return Inbound(device, payload)


def _address_of(url: str, plaintext: bool) -> tuple[str, int, bool]:
    """Host, port, and whether the link is encrypted. Raises ParameterError."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ParameterError(f"{url!r}: {error}") from error
    if parts.scheme not in _PORTS:
        raise ParameterError(f"{url!r}: a broker's URL starts with mqtts://")
    if parts.scheme == "mqtt" and not plaintext:
        raise ParameterError(f"{url!r} is not encrypted: use mqtts://")
    if not parts.hostname or port == 0 or "@" in parts.netloc or parts.path not in ("", "/"):
        raise ParameterError(f"{url!r}: scheme, host and port are all that it may have")
    if parts.query or parts.fragment:
        raise ParameterError(f"{url!r}: scheme, host and port are all that it may have")
    return parts.hostname, port or _PORTS[parts.scheme], parts.scheme == "mqtts"


def _without_delay(_client: paho.Client, _data: Any, sock: Any) -> None:
    """Without TCP_NODELAY a small frame waits for the acknowledgement of the one before: 40 ms on Linux."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _buffered_bytes(sock: Any) -> int:
    """Bytes that TLS has decrypted and nobody has read: poll does not know of them."""
    pending = getattr(sock, "pending", None)
    return 0 if pending is None else int(pending())


def _is_flushed(sock: Any) -> bool:
    """Whether nothing waits to be written. Raises OSError if nothing can be written any more."""
    flush = getattr(sock, "flush", None)
    if flush is not None:
        try:
            flush()
        except ssl.SSLWantWriteError:
            return False
        except ssl.SSLWantReadError:
            pass  # once something was read it goes on
    return True


def _is_refusal(error: Exception) -> bool:
    if isinstance(error, ParameterError):  # our own credentials, unreadable by now
        return True
    return isinstance(error, ssl.SSLError) and _sounds_like_refusal(str(error))


def _sounds_like_refusal(text: str) -> bool:
    """Whether an error of TLS is about a certificate, ours or theirs: the peer says so in an alert."""
    return "[SSL" in text and ("alert" in text.lower() or "certificate" in text.lower())
