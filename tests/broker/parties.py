import os
import socket
import ssl
import threading
import time
from pathlib import Path

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion

from coordinator.broker import Listener, start_broker
from coordinator.ca import CertificateAuthority, read_csr
from edge_sdk import enrolment
from edge_sdk.crypto.identity import Identity
from edge_sdk.transport import Inbound
from edge_sdk.transport.mqtt import Backoff, Credentials, MqttTransport
from edge_sdk.transport.wire import MAX_FRAME_BYTES

DEADLINE_S = 20.0
MB = 1_000_000
FRAME = bytes(MAX_FRAME_BYTES)
QUICK = Backoff(first_s=0.05, longest_s=0.5, refused_s=0.2, longest_refused_s=0.5)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Party:
    """Somebody with a certificate of some CA."""

    def __init__(self, ca, directory, *, number=None, name=None):
        self.identity = Identity(os.urandom(32) if number is None else bytes([number]) * 32)
        self.name = name or self.identity.public_key.hex()
        key = enrolment.tls_key(os.urandom(48))
        csr = read_csr(enrolment._csr(self.identity, key), self.identity.public_key.hex())
        issued = ca.issue_device(csr, self.name, int(time.time()), 30)
        self.serial = issued.serial
        stem = os.urandom(4).hex()
        self.key, self.certificate = directory / f"{stem}.key", directory / f"{stem}.pem"
        self.key.write_bytes(enrolment.private_pem(key))
        self.certificate.write_bytes(issued.pem)


class World:
    def __init__(self, directory: Path, kind: str):
        self.directory = directory
        self.kind = kind
        now = int(time.time())
        self.ca = CertificateAuthority.create(directory, "test", now)
        self.ca.ensure_service_certificates(["127.0.0.1"], now)
        self.ca.write_crl([], now)
        self.listener = Listener(directory, "127.0.0.1", free_port())
        self.broker = start_broker(kind, self.listener, None, [])
        self.alice, self.bob = Party(self.ca, directory), Party(self.ca, directory)
        self.closing = []
        self._hub = None

    @property
    def hub(self):
        if self._hub is None:
            own = Credentials(*(self.directory / name for name in ("ca.pem", "client.pem", "client.key")))
            self._hub = self.keep(self.broker.link(own))
        return self._hub

    def keep(self, link):
        self.closing.append(link)
        return link

    def device(self, party):
        own = Credentials(self.directory / "ca.pem", party.certificate, party.key)
        return self.keep(MqttTransport(self.broker.url, party.name, own, backoff=QUICK))

    def client(self, party=None, **options):
        return self.keep(Client(self, party, **options))

    def revoke(self, *parties):
        self.ca.write_crl([party.serial for party in parties], int(time.time()))
        self.broker.revoke([party.name for party in parties])

    def close(self):
        for link in reversed(self.closing):
            link.close()
        self.broker.close()


class Client:
    """A client that keeps to no rules of ours."""

    def __init__(self, world, party, *, client_id=None, will=None, ca=None):
        self.messages, self.granted = [], {}
        self._changed = threading.Condition()
        self._state = "connecting"
        self._published = set()
        self._paho = paho.Client(
            CallbackAPIVersion.VERSION2, client_id=client_id or (party.name if party else "x"), protocol=paho.MQTTv311,
            reconnect_on_failure=False,
        )  # fmt: skip
        files = (str(party.certificate), str(party.key)) if party else (None, None)
        self._paho.tls_set(str(ca or world.directory / "ca.pem"), *files)
        if will:
            self._paho.will_set(*will, qos=1)
        self._paho.on_connect = lambda c, u, f, code, p: self._set("refused" if code.is_failure else "connected")
        self._paho.on_disconnect = lambda c, u, f, code, p: self._set("closed")
        self._paho.on_message = lambda c, u, message: self._note(self.messages.append, (message.topic, message.payload))
        self._paho.on_subscribe = lambda c, u, mid, codes, p: self._note(self.granted.__setitem__, mid, codes)
        self._paho.on_publish = lambda c, u, mid, code, p: self._note(self._published.add, mid)
        try:
            self._paho.connect("127.0.0.1", world.listener.port)
        except OSError:
            self._state = "refused"
        else:
            self._paho.loop_start()

    def _set(self, state):
        with self._changed:
            self._state = "refused" if self._state in ("connecting", "refused") and state == "closed" else state
            self._changed.notify_all()

    def _note(self, call, *arguments):
        with self._changed:
            call(*arguments)
            self._changed.notify_all()

    def wait(self, condition):
        with self._changed:
            assert self._changed.wait_for(condition, DEADLINE_S), (self._state, self.messages)

    @property
    def outcome(self):
        """'connected' or 'refused', when it is known."""
        self.wait(lambda: self._state != "connecting")
        return self._state

    def subscribe(self, topic):
        _, mid = self._paho.subscribe(topic, qos=1)
        self.wait(lambda: mid in self.granted or self._state == "closed")

    def publish(self, topic, payload, *, retain=False):
        """Returns when the broker took it, or ended the connection over it."""
        mid = self._paho.publish(topic, payload, qos=1, retain=retain).mid
        self.wait(lambda: mid in self._published or self._state == "closed")

    def break_off(self):
        """Leave without a word, so that the will is published."""
        self._paho.socket().shutdown(socket.SHUT_RDWR)
        self.wait(lambda: self._state == "closed")

    def wait_closed(self):
        self.wait(lambda: self._state in ("closed", "refused"))

    def wait_message(self, payload):
        self.wait(lambda: payload in [got for _, got in self.messages])

    def close(self):
        self._paho.disconnect()
        self._paho.loop_stop()
        self._paho._reset_sockets()  # paho leaves the pair that it wakes itself by to its finaliser


class Raw:
    """A device with its own socket, which reads only when it is told to."""

    def __init__(self, world, party, *, qos=1, keepalive=0, will=None, wait=True, buffer=4096):
        self.name = party.name
        context = ssl.create_default_context(cafile=world.directory / "ca.pem")
        context.load_cert_chain(party.certificate, party.key)
        plain = socket.create_connection(("127.0.0.1", world.listener.port))
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self.socket = context.wrap_socket(plain, server_hostname="127.0.0.1")
        self.socket.settimeout(DEADLINE_S)
        flags = 0x02 if will is None else 0x0E
        connect = text("MQTT") + bytes([4, flags]) + keepalive.to_bytes(2, "big") + text(self.name)
        if will is not None:
            connect += text(f"fl/v1/up/{self.name}") + len(will).to_bytes(2, "big") + will
        self.send(0x10, connect)
        if wait:
            assert self.socket.recv(4)[:2] == b"\x20\2"
            self.subscribe(qos)
            assert self.socket.recv(5)[:2] == b"\x90\3"

    def subscribe(self, qos=1):
        self.send(0x82, b"\0\1" + text(f"fl/v1/dn/{self.name}") + bytes([qos]))

    def publish(self, frame, number=None, *, qos=1):
        """With this packet number, else QoS 0."""
        self.socket.sendall(self.packet(frame, number, qos=qos))

    def packet(self, frame, number=None, *, qos=1):
        head = b"" if number is None else number.to_bytes(2, "big")
        return packet(0x30 if number is None else 0x30 | qos << 1, text(f"fl/v1/up/{self.name}") + head + frame)

    def send(self, kind, body):
        self.socket.sendall(packet(kind, body))

    def wait_closed(self):
        """Until the other end ended the connection. Returns what it said before."""
        said = b""
        try:
            while data := self.socket.recv(1 << 16):
                said += data
        except (ConnectionError, ssl.SSLError):
            pass  # without taking leave
        return said

    def close(self):
        self.socket.close()


def packet(kind, body):
    size, sizes = len(body), bytearray()
    while True:
        size, low = divmod(size, 128)
        sizes.append(low | (0x80 if size else 0))
        if not size:
            return bytes([kind]) + sizes + body


def text(words):
    return len(words).to_bytes(2, "big") + words.encode()


def resident(world):
    """Bytes of the process that the broker is in."""
    pid = world.broker.pid if world.kind == "mosquitto" else "self"
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def wait_for(hub, device):
    """Until the hub hears of the device. Returns what it said."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        for item in hub.receive(0.2):
            if isinstance(item, Inbound) and item.device == device:
                return item.frame
    raise AssertionError("waited in vain")
