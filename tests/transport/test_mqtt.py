"""The links over MQTT, on both brokers: what they carry, what they survive, and whom they refuse."""

import contextlib
import dataclasses
import inspect
import itertools
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import paho.mqtt.client as paho
import pytest
from brokers import Amqtt, BrokerProcess, Mosquitto
from certificates import Authority
from hypothesis import given, settings
from hypothesis import strategies as st
from paho.mqtt.enums import CallbackAPIVersion

from edge_sdk.errors import ParameterError, TransportError
from edge_sdk.transport import Connected, Hub, Inbound, Lost, Transport, mqtt
from edge_sdk.transport.mqtt import DOWN, UP, Backoff, Credentials, MqttHub, MqttTransport
from edge_sdk.transport.wire import CHUNK_BYTES, MAX_FRAME_BYTES, Leaving, encode_frame

DEADLINE_S = 30.0
EAGER = Backoff(first_s=0.02, longest_s=0.1, refused_s=0.02, longest_refused_s=0.1)
LEAVING = encode_frame(Leaving())

_names = itertools.count(1)


def fresh_name() -> str:
    return f"{next(_names):064x}"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module", params=[Mosquitto, Amqtt])
def broker(request, tmp_path_factory, authority) -> Iterator[BrokerProcess]:
    broker = request.param(tmp_path_factory.mktemp("broker"), authority)
    broker.start()
    yield broker
    broker.kill()


@pytest.fixture
def closing() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


class Noting(Backoff):
    """Waits for no time, and notes what the link wanted to wait for: failures in a row, and whether it was refused."""

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "noted", [])
        object.__setattr__(self, "_more", threading.Condition())

    def delay_s(self, failures: int, refused: bool, jitter: float) -> float:
        assert 0 <= jitter < 1
        with self._more:
            self.noted.append((failures, refused))
            self._more.notify_all()
        return 0.01

    def until(self, count: int) -> None:
        with self._more:
            assert self._more.wait_for(lambda: len(self.noted) >= count, DEADLINE_S)


class FakeBroker:
    """Listens and does to each connection what the next of `scripts` does; the last one is for all that follow."""

    def __init__(self, *scripts: Callable[[socket.socket], None]) -> None:
        self._scripts = list(scripts)
        self._server = socket.create_server(("127.0.0.1", 0))
        self._kept: list[socket.socket] = []
        self.url = f"mqtt://127.0.0.1:{self._server.getsockname()[1]}"
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            self._kept.append(connection)
            script = self._scripts.pop(0) if len(self._scripts) > 1 else self._scripts[0]
            with contextlib.suppress(ConnectionError):
                script(connection)

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._thread.join(DEADLINE_S)
        for connection in self._kept:
            connection.close()
        self._server.close()


def accepting(connection: socket.socket) -> None:
    """The broker's part of connecting and subscribing. After it the connection stays open and nobody reads from it."""
    connection.recv(4096)
    connection.sendall(b"\x20\x02\0\0")
    subscribe = connection.recv(4096)
    connection.sendall(b"\x90\x03" + subscribe[2:4] + b"\x01")


def answering(*answers: bytes, end: bool = True) -> Callable[[socket.socket], None]:
    """Each answer follows one packet of the client."""

    def script(connection: socket.socket) -> None:
        for answer in answers:
            connection.recv(4096)
            connection.sendall(answer)
        if end:
            connection.close()

    return script


class Listening:
    """A hub or transport with everything that it ever gave, and a deadline on waiting for more."""

    def __init__(self, link: MqttHub | MqttTransport) -> None:
        self.link = link
        self.seen: list = []

    def until(self, there: Callable[[list], object], what: str = "it") -> list:
        """Receive until `there(seen)` is true. Returns what was seen and forgets it."""
        deadline = time.monotonic() + DEADLINE_S
        while not there(self.seen):
            left = deadline - time.monotonic()
            if left <= 0:
                pytest.fail(f"waited in vain for {what}; seen: {str(self.seen)[-2000:]}")
            got = self.link.receive(left)
            self.seen += got if isinstance(got, list) else [] if got is None else [got]
        seen, self.seen = self.seen, []
        return seen

    def until_connected(self) -> list:
        return self.until(lambda seen: Connected() in seen, "the connection")

    def until_lost(self) -> str:
        return self.until(lambda seen: any(isinstance(s, Lost) for s in seen), "the loss")[-1].reason

    def until_item(self, item: object) -> list:
        return self.until(lambda seen: item in seen, str(item)[:100])


def hub_on(closing: contextlib.ExitStack, url: str, **settings) -> Listening:
    settings = {"credentials": None, "plaintext": True, "backoff": EAGER} | settings
    hub = MqttHub(url, **settings)
    closing.callback(hub.close)
    return Listening(hub)


def device_on(closing: contextlib.ExitStack, url: str, name: str, **settings) -> Listening:
    settings = {"credentials": None, "plaintext": True, "backoff": EAGER} | settings
    device = MqttTransport(url, name, **settings)
    closing.callback(device.close)
    return Listening(device)


@pytest.fixture
def pair(broker, closing) -> tuple[Listening, Listening, str]:
    """A hub and a device, connected; and the device's name."""
    name = fresh_name()
    hub, device = hub_on(closing, broker.url), device_on(closing, broker.url, name)
    hub.until_connected()
    device.until_connected()
    return hub, device, name


@pytest.fixture
def stranger(broker, closing) -> paho.Client:
    """A client that follows none of our rules, connected."""
    client = paho.Client(CallbackAPIVersion.VERSION2, client_id="stranger")
    connected = threading.Event()
    client.on_connect = lambda *_: connected.set()
    client.connect("127.0.0.1", broker.port)
    client.loop_start()
    closing.callback(client.loop_stop)
    closing.callback(client.disconnect)
    assert connected.wait(DEADLINE_S)
    return client


# On both brokers


def test_frames_of_every_size_arrive_both_ways_in_order(pair):
    hub, device, name = pair
    frames = [b"", b"x", bytes(1000), os.urandom(MAX_FRAME_BYTES), *(b"%d" % n for n in range(50))]
    for frame in frames:
        device.link.send(frame)
        hub.link.send(name, frame)
    assert hub.until(lambda seen: len(seen) == len(frames)) == [Inbound(name, frame) for frame in frames]
    assert device.until(lambda seen: len(seen) == len(frames)) == frames


def test_a_device_hears_nothing_that_is_for_another(pair, broker, closing):
    hub, device, name = pair
    other_name = fresh_name()
    other = device_on(closing, broker.url, other_name)
    other.until_connected()
    hub.link.send(other_name, b"for the other")
    hub.link.send(name, b"for the one")
    assert device.until(len) == [b"for the one"]
    assert other.until(len) == [b"for the other"]


def test_the_link_comes_back_after_the_broker_died_with_all_it_knew(pair, broker):
    hub, device, name = pair
    broker.kill()
    hub.until_lost()
    device.until_lost()
    dropped = device.link.dropped
    device.link.send(b"into the void")
    hub.link.send(name, b"into the void")
    assert device.link.dropped == dropped + 1
    assert hub.link.unsent_bytes == 0
    broker.start()
    assert hub.until_connected()[-1] == Connected()
    assert device.until_connected()[-1] == Connected()
    device.link.send(b"again")
    hub.link.send(name, b"and again")
    assert hub.until(len) == [Inbound(name, b"again")]
    assert device.until(len) == [b"and again"]


def test_the_last_will_of_a_device_that_dies_is_that_it_leaves(broker, closing):
    name = fresh_name()
    hub = hub_on(closing, broker.url)
    hub.until_connected()
    script = (
        "import sys; from edge_sdk.transport.mqtt import MqttTransport\n"
        "device = MqttTransport(sys.argv[1], sys.argv[2], None, plaintext=True)\n"
        "device.receive(60); device.send(b'here'); sys.stdin.read()"
    )
    child = subprocess.Popen([sys.executable, "-c", script, broker.url, name], stdin=subprocess.PIPE)
    try:
        hub.until_item(Inbound(name, b"here"))
        child.send_signal(signal.SIGKILL)
        hub.until_item(Inbound(name, LEAVING))
    finally:
        child.kill()
        child.communicate()


def test_a_device_that_closes_in_good_order_sends_what_it_has_and_leaves_no_will(pair, broker, closing):
    hub, device, _ = pair
    frames = [os.urandom(100_000) for _ in range(10)]
    for frame in frames:
        device.link.send(frame)
    device.link.close()
    device.link.close()
    last = device_on(closing, broker.url, fresh_name())
    last.until_connected()
    last.link.send(b"marker")
    seen = hub.until(lambda seen: seen and seen[-1].frame == b"marker")
    assert [item.frame for item in seen] == [*frames, b"marker"]


def test_what_no_device_can_have_sent_is_ignored_and_counted(pair, stranger):
    hub, device, name = pair
    for topic in ("fl/v1/up/short", UP + "AB" * 32, UP + "ab" * 33, UP + "é" * 64):
        stranger.publish(topic, b"hello", qos=1)
    stranger.publish(UP + fresh_name() + "/deeper", b"hello", qos=1)
    stranger.publish(DOWN + name + "/deeper", b"hello", qos=1)
    stranger.publish(UP + name, b"marker", qos=1)
    stranger.publish(DOWN + name, b"marker", qos=1)
    assert hub.until(len) == [Inbound(name, b"marker")]
    assert device.until(len) == [b"marker"]
    assert hub.link.ignored == 4


def test_what_somebody_left_retained_is_not_taken_for_news(broker, stranger, closing):
    name = fresh_name()
    stranger.publish(UP + name, b"stale", qos=1, retain=True).wait_for_publish(DEADLINE_S)
    stranger.publish(DOWN + name, b"stale", qos=1, retain=True).wait_for_publish(DEADLINE_S)
    try:
        hub, device = hub_on(closing, broker.url), device_on(closing, broker.url, name)
        hub.until_connected()
        device.until_connected()
        device.link.send(b"fresh")
        hub.link.send(name, b"fresh")
        assert hub.until(len) == [Inbound(name, b"fresh")]
        assert device.until(len) == [b"fresh"]
        assert hub.link.ignored == 1
    finally:
        for topic in (UP + name, DOWN + name):
            stranger.publish(topic, b"", qos=1, retain=True).wait_for_publish(DEADLINE_S)


def test_frames_over_the_limit_are_dropped_at_the_border(pair, stranger, caplog):
    hub, device, name = pair
    device.link.send(bytes(MAX_FRAME_BYTES + 1))
    assert device.link.dropped == 1
    stranger.publish(UP + name, bytes(MAX_FRAME_BYTES + 1), qos=1)
    stranger.publish(UP + name, b"short", qos=1)
    assert hub.until(len) == [Inbound(name, b"short")]
    assert hub.link.dropped == 1
    assert sum(f"dropped a frame of {MAX_FRAME_BYTES + 1} bytes" in r.getMessage() for r in caplog.records) == 2


def test_unsent_bytes_count_what_the_broker_has_not_taken(pair):
    hub, device, name = pair
    frames = [os.urandom(100_000) for _ in range(60)]
    most = 0
    for frame in frames:
        hub.link.send(name, frame)
        most = max(most, hub.link.unsent_bytes)
    assert most >= 100_000
    device.until(lambda seen: len(seen) == len(frames))
    deadline = time.monotonic() + DEADLINE_S
    while hub.link.unsent_bytes and time.monotonic() < deadline:
        hub.link.receive(0.01)
    assert hub.link.unsent_bytes == 0


def test_whoever_has_more_to_send_is_woken_when_there_is_room(pair):
    hub, _, name = pair
    for _ in range(60):
        hub.link.send(name, os.urandom(100_000))
    woken = threading.Event()

    def wait():
        hub.link.receive(10 * DEADLINE_S, room_bytes=1000)
        woken.set()

    threading.Thread(target=wait, daemon=True).start()
    assert woken.wait(DEADLINE_S)
    assert hub.link.unsent_bytes <= 1000
    assert hub.link.receive(10 * DEADLINE_S, room_bytes=1000) == []  # at once: there is


def test_a_reader_that_falls_behind_holds_the_broker_back_and_loses_nothing(broker, closing):
    name = fresh_name()
    hub = hub_on(closing, broker.url)
    device = device_on(closing, broker.url, name, queue_bytes=400_000)
    hub.until_connected()
    device.until_connected()
    frames = [n.to_bytes(4, "big") + os.urandom(100_000) for n in range(60)]
    for frame in frames:
        hub.link.send(name, frame)
    full = threading.Event()
    most = 0
    received: list[bytes] = []
    while len(received) < len(frames):
        most = max(most, device.link._link._inbox_bytes)
        received += device.until(len)
        full.wait(0.002)  # somewhat slower than the network
    assert received == frames
    assert most <= 800_000


def test_a_name_that_connects_twice_is_heard_where_it_connected_last(broker, closing):
    name = fresh_name()
    hub = hub_on(closing, broker.url)
    hub.until_connected()
    # The first would come back and oust the second, and so on: it waits for longer than this test takes.
    first = device_on(closing, broker.url, name, backoff=Backoff(first_s=3600, longest_s=3600))
    first.until_connected()
    second = device_on(closing, broker.url, name)
    second.until_connected()
    hub.link.send(name, b"hello")
    assert second.until(len) == [b"hello"]
    if isinstance(broker, Mosquitto):  # amqtt leaves the first connection open, and deaf
        assert first.until_lost()


# TLS


def test_mutual_tls_carries_frames(broker, authority, closing):
    name = fresh_name()
    tls = {"plaintext": False}
    hub = hub_on(closing, broker.tls_url, credentials=authority.issue("coordinator"), **tls)
    device = device_on(closing, broker.tls_url, name, credentials=authority.issue(name), **tls)
    hub.until_connected()
    device.until_connected()
    frames = [os.urandom(MAX_FRAME_BYTES) for _ in range(20)]
    for frame in frames:
        device.link.send(frame)
        hub.link.send(name, frame)
    assert hub.until(lambda seen: len(seen) == len(frames)) == [Inbound(name, frame) for frame in frames]
    assert device.until(lambda seen: len(seen) == len(frames)) == frames


def test_a_broker_of_another_authority_is_not_trusted(broker, authority, closing, tmp_path):
    ours = authority.issue("coordinator")
    other = Authority(tmp_path / "other")
    misled = Credentials(other.ca_path, ours.certificate_path, ours.key_path)
    backoff = Noting()
    hub = hub_on(closing, broker.tls_url, credentials=misled, plaintext=False, backoff=backoff)
    assert "certificate verify failed" in hub.until_lost()
    backoff.until(3)
    assert backoff.noted[:3] == [(1, True), (2, True), (3, True)]


def test_a_broker_under_another_name_is_not_trusted(broker, authority, closing):
    # The certificate is for 127.0.0.1 only, so the same broker is not what the URL asks for.
    hub = hub_on(
        closing,
        broker.tls_url.replace("127.0.0.1", "localhost"),
        credentials=authority.issue("coordinator"),
        plaintext=False,
    )
    reason = hub.until_lost()
    assert "localhost" in reason
    assert "certificate" in reason


def test_a_device_of_another_authority_is_refused(broker, authority, closing, tmp_path):
    name = fresh_name()
    theirs = Authority(tmp_path / "other").issue(name)
    device = device_on(
        closing,
        broker.tls_url,
        name,
        credentials=Credentials(authority.ca_path, theirs.certificate_path, theirs.key_path),
        plaintext=False,
    )
    reason = device.until_lost()
    assert "unknown ca" in reason or "may not accept our certificate" in reason
    hub = hub_on(closing, broker.tls_url, credentials=authority.issue("coordinator"), plaintext=False)
    hub.until_connected()
    device.link.send(b"never heard")
    assert device.link.dropped == 1
    assert Connected() not in device.seen


# Against brokers that misbehave, and without any


@pytest.fixture
def fake(closing) -> Callable[..., FakeBroker]:
    def make(*scripts: Callable[[socket.socket], None]) -> FakeBroker:
        broker = FakeBroker(*scripts)
        closing.callback(broker.close)
        return broker

    return make


@pytest.mark.parametrize(
    ("connack", "refused", "reason"),
    [
        (1, False, "protocol"),
        (2, True, "identifier"),
        (3, False, "unavailable"),
        (4, True, "user"),
        (5, True, "author"),
    ],
)
def test_a_connection_that_the_broker_refuses_is_tried_again_later_than_one_that_failed(
    fake, closing, connack, refused, reason
):
    backoff = Noting()
    broker = fake(answering(b"\x20\x02\0" + bytes([connack])))
    device = device_on(closing, broker.url, fresh_name(), backoff=backoff)
    assert reason in device.until_lost().lower()
    backoff.until(3)
    assert backoff.noted[:3] == [(1, refused), (2, refused), (3, refused)]
    assert device.link.receive(0) is None  # the same reason is said once


def test_a_subscription_that_the_broker_refuses_is_a_refusal(fake, closing):
    backoff = Noting()
    broker = fake(answering(b"\x20\x02\0\0", b"\x90\x03\0\x01\x80"))
    device = device_on(closing, broker.url, fresh_name(), backoff=backoff)
    assert "refused the subscription" in device.until_lost()
    backoff.until(1)
    assert backoff.noted[0] == (1, True)


@pytest.mark.parametrize(
    "garbage",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\x20\x00",
        b"\x20\xff\xff\xff\xff\xff",
        b"\x90\x00",
        b"\x30\x00",
        b"\x32\x03\xff\xff\xff",
        b"\x40\x00",
        b"\xf0\x00",
        bytes(64),
    ],
)
def test_a_broker_that_talks_nonsense_cannot_end_the_link(fake, closing, garbage):
    broker = fake(answering(garbage), accepting)
    device = device_on(closing, broker.url, fresh_name())
    device.until_connected()


@given(st.binary(max_size=64))
@settings(max_examples=30)
def test_no_bytes_of_a_broker_end_the_link(garbage):
    with contextlib.ExitStack() as closing:
        broker = FakeBroker(answering(b"\x20\x02\0\0" + garbage), accepting)
        closing.callback(broker.close)
        device_on(closing, broker.url, fresh_name()).until_connected()


def test_a_broker_that_does_not_answer_is_given_up(fake, closing, monkeypatch):
    monkeypatch.setattr(mqtt, "CONNECT_S", 0.2)
    broker = fake(lambda _: None)
    assert "does not answer" in device_on(closing, broker.url, fresh_name()).until_lost()


def test_what_a_stuck_broker_does_not_take_is_bounded(fake, closing, monkeypatch):
    monkeypatch.setattr(mqtt, "FLUSH_S", 0.1)
    device = device_on(closing, fake(accepting).url, fresh_name(), queue_bytes=1 << 20)
    device.until_connected()
    for _ in range(100):
        device.link.send(bytes(100_000))
    assert device.link.unsent_bytes <= 1 << 20
    assert device.link.unsent_bytes > 0
    assert device.link.dropped >= 89
    device.link.close()
    assert not device.link._link._thread.is_alive()


def test_what_was_not_taken_when_the_link_broke_is_not_sent_later(fake, closing, monkeypatch):
    monkeypatch.setattr(mqtt, "FLUSH_S", 0.1)
    heard = []
    end, done = threading.Event(), threading.Event()
    closing.callback(end.set)

    def breaking(connection: socket.socket) -> None:
        accepting(connection)
        end.wait(DEADLINE_S)
        connection.close()

    def listening(connection: socket.socket) -> None:
        accepting(connection)
        heard.append(connection.recv(4096))
        done.set()

    device = device_on(closing, fake(breaking, listening).url, fresh_name())
    device.until_connected()
    for _ in range(40):
        device.link.send(bytes(100_000))
    assert device.link.unsent_bytes > 0
    end.set()
    device.until_lost()
    assert device.link.unsent_bytes == 0
    device.until_connected()
    device.link.send(b"news")
    assert done.wait(DEADLINE_S)
    assert heard[0].endswith(b"news")
    assert len(heard[0]) < 200


def test_a_device_takes_only_what_is_on_its_own_topic(fake, closing):
    name = fresh_name()

    def publish(topic: str, payload: bytes) -> bytes:
        body = len(topic).to_bytes(2, "big") + topic.encode() + payload
        assert len(body) < 128
        return bytes([0x30, len(body)]) + body

    def misdelivering(connection: socket.socket) -> None:
        accepting(connection)
        connection.sendall(
            publish(DOWN + "ab" * 32, b"for another") + publish("x", b"?") + publish(DOWN + name, b"mine")
        )

    device = device_on(closing, fake(misdelivering).url, name)
    assert device.until(lambda seen: any(isinstance(item, bytes) for item in seen)) == [Connected(), b"mine"]


def test_a_packet_that_announces_more_than_a_device_can_hold_ends_the_connection_unread(fake, closing):
    def flooding(connection: socket.socket) -> None:
        accepting(connection)
        connection.sendall(b"\x30\xff\xff\xff\x7f" + bytes(100))  # 256 MB are to follow

    device = device_on(closing, fake(flooding, accepting).url, fresh_name())
    device.until_connected()
    assert "268435455 bytes is over the limit" in device.until_lost()
    device.until_connected()


def over_tls(server: Credentials, script: Callable[[socket.socket], None]) -> Callable[[socket.socket], None]:
    """The script over TLS, for clients of the server's own authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server.certificate_path, server.key_path)
    context.load_verify_locations(server.ca_path)
    context.verify_mode = ssl.CERT_REQUIRED

    def wrapped(connection: socket.socket) -> None:
        with context.wrap_socket(connection.dup(), server_side=True, do_handshake_on_connect=False) as encrypted:
            with contextlib.suppress(ssl.SSLError):
                encrypted.do_handshake()
                script(encrypted)
            connection.recv(1 << 20)  # until the client has read and left: closing sooner could overtake an alert
            with contextlib.suppress(OSError):
                while connection.recv(1 << 20):
                    pass

    return wrapped


def test_frames_that_share_a_record_of_tls_are_all_read_at_once(fake, closing, authority):
    # When the first is read, the others are in TLS's buffer, and the socket has nothing more to wake anybody.
    name = fresh_name()
    topic = (DOWN + name).encode()
    publish = bytes([0x30, 2 + len(topic) + 1, 0, len(topic)]) + topic

    def bundling(connection: socket.socket) -> None:
        accepting(connection)
        connection.sendall(b"".join(publish + bytes([n]) for n in range(50)))

    broker = fake(over_tls(authority.issue("127.0.0.1", server=True), bundling))
    url = broker.url.replace("mqtt:", "mqtts:")
    device = device_on(closing, url, name, credentials=authority.issue(name), plaintext=False)
    device.until_connected()
    assert device.until(lambda seen: len(seen) >= 50) == [bytes([n]) for n in range(50)]


def published(name: str, number: int, payload: bytes) -> bytes:
    """A PUBLISH of QoS 1 to this device."""
    body = len(DOWN + name).to_bytes(2, "big") + (DOWN + name).encode() + number.to_bytes(2, "big") + payload
    length, left = bytearray(), len(body)
    while left or not length:
        left, low = divmod(left, 128)
        length.append(low | (0x80 if left else 0))
    return b"\x32" + bytes(length) + body


def test_over_tls_more_than_is_read_at_once_comes_whole_and_each_frame_is_acknowledged(fake, closing, authority):
    name, heard, done = fresh_name(), bytearray(), threading.Event()
    frames = [bytes([n]) * (CHUNK_BYTES + n) for n in range(12)]
    frames += [b"short %d" % n for n in range(40)]

    def pouring(connection: socket.socket) -> None:
        accepting(connection)
        connection.sendall(b"".join(published(name, n + 1, frame) for n, frame in enumerate(frames)))
        while not heard.endswith(b"\xe0\0") and (part := connection.recv(4096)):
            heard.extend(part)
        done.set()

    broker = fake(over_tls(authority.issue("127.0.0.1", server=True), pouring))
    url = broker.url.replace("mqtt:", "mqtts:")
    device = device_on(closing, url, name, credentials=authority.issue(name), plaintext=False)
    device.until_connected()
    assert device.until(lambda seen: len(seen) >= len(frames)) == frames
    device.link.close()
    assert done.wait(DEADLINE_S)  # what was put off is written before the connection ends, and so is its end
    assert heard == b"".join(b"\x40\2" + (n + 1).to_bytes(2, "big") for n in range(len(frames))) + b"\xe0\0"


def test_over_tls_short_and_long_frames_go_out_in_their_order(fake, closing, authority):
    name, heard, done = fresh_name(), bytearray(), threading.Event()
    frames = [bytes([n]) * (10 if n % 2 else CHUNK_BYTES - 1000 * n) for n in range(8)]

    def listening(connection: socket.socket) -> None:
        accepting(connection)
        while not heard.endswith(frames[-1]) and (part := connection.recv(1 << 16)):
            heard.extend(part)
        done.set()

    broker = fake(over_tls(authority.issue("127.0.0.1", server=True), listening))
    url = broker.url.replace("mqtt:", "mqtts:")
    device = device_on(closing, url, name, credentials=authority.issue(name), plaintext=False)
    device.until_connected()
    for frame in frames:
        device.link.send(frame)
    assert done.wait(DEADLINE_S)
    expected = (published(name, n + 2, frame) for n, frame in enumerate(frames))  # the SUBSCRIBE was number 1
    assert heard == b"".join(packet.replace(DOWN.encode(), UP.encode(), 1) for packet in expected)


def test_what_came_before_tls_broke_is_not_lost(fake, closing, authority):
    name = fresh_name()

    def breaking(connection: ssl.SSLSocket) -> None:
        accepting(connection)
        connection.sendall(b"".join(published(name, n + 1, bytes([n])) for n in range(3)))
        os.write(connection.fileno(), b"no record of TLS at all")

    server = authority.issue("127.0.0.1", server=True)
    broker = fake(over_tls(server, breaking), over_tls(server, accepting))
    url = broker.url.replace("mqtt:", "mqtts:")
    device = device_on(closing, url, name, credentials=authority.issue(name), plaintext=False)
    device.until_connected()
    seen = device.until(lambda seen: any(isinstance(item, Lost) for item in seen))
    assert seen[:3] == [b"\0", b"\1", b"\2"]
    assert "SSL" in seen[3].reason
    device.until_connected()


def test_a_certificate_that_the_broker_says_it_refuses_is_shown_less_often(fake, closing, authority, tmp_path):
    name = fresh_name()
    theirs = Authority(tmp_path / "other").issue(name)
    ours = dataclasses.replace(theirs, ca_path=authority.ca_path)
    broker = fake(over_tls(authority.issue("127.0.0.1", server=True), accepting))
    backoff = Noting()
    url = broker.url.replace("mqtt:", "mqtts:")
    device = device_on(closing, url, name, credentials=ours, plaintext=False, backoff=backoff)
    assert "unknown ca" in device.until_lost()
    backoff.until(2)
    assert backoff.noted[:2] == [(1, True), (2, True)]


def test_a_reader_that_stays_away_loses_frames_and_not_the_link(broker, closing, monkeypatch):
    class Clock:
        ahead_s = 0.0

        def monotonic(self) -> float:
            return time.monotonic() + self.ahead_s

    clock = Clock()
    monkeypatch.setattr(mqtt, "time", clock)
    name = fresh_name()
    hub, device = hub_on(closing, broker.url), device_on(closing, broker.url, name, queue_bytes=400_000)
    hub.until_connected()
    device.until_connected()
    for _ in range(60):
        hub.link.send(name, bytes(100_000))
    deadline = time.monotonic() + DEADLINE_S
    while device.link._link._inbox_bytes < 400_000 and time.monotonic() < deadline:
        hub.link.receive(0.01)
    assert device.link.dropped == 0
    clock.ahead_s = 31.0
    while not device.link.dropped and time.monotonic() < deadline:
        device.link.send(b"awake")
        hub.link.receive(0.01)
    assert device.link.dropped > 0
    device.until(lambda seen: len(seen) >= 4)
    hub.link.send(name, b"again")
    seen = device.until_item(b"again")
    assert not any(isinstance(item, Lost) for item in seen)


def test_the_socket_has_no_delay(fake, closing, monkeypatch):
    options = []
    without_delay = mqtt._without_delay

    def noting(client, data, sock):
        without_delay(client, data, sock)
        options.append(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    monkeypatch.setattr(mqtt, "_without_delay", noting)
    device_on(closing, fake(accepting).url, fresh_name()).until_connected()
    assert options == [1]


def test_after_close_every_call_says_so_and_nothing_is_left_open(fake):
    broker = fake(accepting)
    before = len(os.listdir("/proc/self/fd"))
    hub, device = MqttHub(broker.url, None, plaintext=True), MqttTransport(broker.url, "ab" * 32, None, plaintext=True)
    errors = []

    def wait() -> None:
        try:
            while True:
                device.receive(DEADLINE_S)
        except TransportError as error:
            errors.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    for link in (hub, device):
        link.close()
        link.close()
    waiting.join(DEADLINE_S)
    assert len(errors) == 1
    for call in (
        lambda: device.send(b""),
        lambda: device.receive(0),
        lambda: hub.send("ab" * 32, b""),
        lambda: hub.receive(0),
    ):
        with pytest.raises(TransportError, match="closed"):
            call()
    assert device.unsent_bytes == hub.unsent_bytes == 0
    for link in (hub, device):
        link._link._thread.join(DEADLINE_S)
    assert len(os.listdir("/proc/self/fd")) <= before + 2  # the fake broker's own ends


def test_both_ends_are_what_the_package_promises(fake, closing):
    broker = fake(accepting)
    transport: Transport = device_on(closing, broker.url, fresh_name()).link
    hub: Hub = hub_on(closing, broker.url).link
    for end, protocol in ((transport, Transport), (hub, Hub)):
        for method in ("send", "receive", "close"):
            assert list(inspect.signature(getattr(end, method)).parameters) == [
                name for name in inspect.signature(getattr(protocol, method)).parameters if name != "self"
            ]


@pytest.mark.parametrize(
    ("url", "plaintext", "why"),
    [
        ("mqtt://broker:1883", False, "not encrypted"),
        ("http://broker", True, "starts with mqtts://"),
        ("wss://broker/mqtt", True, "starts with mqtts://"),
        ("broker:1883", True, "starts with mqtts://"),
        ("", True, "starts with mqtts://"),
        ("mqtt://", True, "scheme, host and port"),
        ("mqtt://broker/topic", True, "scheme, host and port"),
        ("mqtt://broker?qos=1", True, "scheme, host and port"),
        ("mqtt://user:password@broker", True, "scheme, host and port"),
        ("mqtt://broker:0", True, "scheme, host and port"),
        ("mqtt://broker:99999", True, "[Pp]ort"),
        ("mqtt://broker:port", True, "[Pp]ort"),
        ("mqtt://[::1", True, "IPv6"),
        ("mqtts://broker", True, "takes credentials"),
    ],
)
def test_a_url_that_cannot_be_meant_is_refused(url, plaintext, why):
    with pytest.raises(ParameterError, match=why):
        MqttHub(url, None, plaintext=plaintext)


def test_credentials_without_encryption_are_a_mistake(authority):
    with pytest.raises(ParameterError, match="takes credentials"):
        MqttHub("mqtt://broker", authority.issue("coordinator"), plaintext=True)


@pytest.mark.parametrize("wrong", [{"keepalive_s": 4}, {"in_flight": 0}, {"queue_bytes": MAX_FRAME_BYTES - 1}])
def test_settings_that_cannot_work_are_refused(wrong):
    with pytest.raises(ParameterError, match=next(iter(wrong))):
        MqttHub("mqtt://broker", None, plaintext=True, **wrong)


@pytest.mark.parametrize("name", ["", "coordinator", "AB" * 32, "ab" * 32 + "/", "ab" * 31 + "+#"])
def test_a_device_has_the_name_of_its_key(fake, closing, name):
    with pytest.raises(ParameterError, match="64 hexadecimal digits"):
        MqttTransport("mqtt://broker", name, None, plaintext=True)
    hub = hub_on(closing, fake(accepting).url)
    with pytest.raises(ParameterError, match="64 hexadecimal digits"):
        hub.link.send(name, b"")


def test_credentials_that_cannot_be_used_are_named(authority, tmp_path):
    good = authority.issue("coordinator")
    other = authority.issue("coordinator")
    empty = tmp_path / "empty.pem"
    empty.touch()
    for bad, named in (
        (dataclasses.replace(good, ca_path=tmp_path / "absent.pem"), "absent.pem"),
        (dataclasses.replace(good, ca_path=empty), "empty.pem"),
        (dataclasses.replace(good, certificate_path=tmp_path / "absent.pem"), "absent.pem"),
        (dataclasses.replace(good, key_path=empty), "empty.pem"),
        (dataclasses.replace(good, key_path=other.key_path), other.key_path.name),
        (authority.issue("coordinator", password=b"secret"), "without a password"),
    ):
        with pytest.raises(ParameterError, match=named):
            MqttHub("mqtts://broker", bad)


def test_tls_older_than_1_2_is_not_spoken_and_names_are_checked(authority):
    context = authority.issue("coordinator").context()
    assert context.minimum_version >= ssl.TLSVersion.TLSv1_2
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname


def test_the_back_off_doubles_up_to_its_bound_and_half_of_it_is_chance():
    backoff = Backoff(first_s=1, longest_s=60, refused_s=30, longest_refused_s=900)
    assert [backoff.delay_s(n, False, 1.0) for n in range(1, 9)] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert [backoff.delay_s(n, True, 1.0) for n in range(1, 8)] == [30, 60, 120, 240, 480, 900, 900]
    assert backoff.delay_s(3, False, 0.0) == 2
    assert backoff.delay_s(10**6, False, 0.5) == 45
