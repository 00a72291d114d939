"""How many uploads a second the coordinator takes, and in how much memory: the real server, on real contributions.

    python benchmarks/coordinator.py --json --n 500 --d 100000 --broker null mosquitto amqtt

Every contribution is made in advance, for a ticket that the server itself issued, and lies on disk as the frames that a
device would send. One row a broker and n:

- `null`: a hub that reads these frames from disk when the server pulls them. Its own time is taken out of the figure.
- `mosquitto`, `amqtt`: on loopback with mutual TLS and topic rules, as `edge-coordinator serve` starts it; another
  process plays all devices, each over a connection of its own. `carried_mb_per_s` is what the broker brings through to
  a hub that only counts (same frames, no coordinator), `ratio` the server's share of that, in pairs of runs one after
  the other. What plays the devices shares this machine's cores with the broker and the server: on few cores that is
  part of the ratio, and `all_cpu_ms_per_upload` and `carried_cpu_ms_per_upload`, the processor time of all three
  processes, say how much of it: their quotient is the ratio that these cores would give if no time were lost.

Measured is from the first upload to the last receipt, with everything that belongs to it: chunks checked, signature and
hashes checked, vector added, written, flushed, row committed, receipt signed, sealed shares sent to five helpers.
`downloads_per_s` is the way back: every device says Hello, is welcomed, and fetches the model of 4 d bytes.
`rss_mb` is the server process's peak (VmHWM), Python and all imports included; `cpu_ms_per_upload` its processor time,
all threads, which a busy machine or disk changes less than `uploads_per_s`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

# A script's own directory comes first in the path, and there this file is `coordinator`.
if __name__ == "__main__":
    sys.path.pop(0)

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256

from coordinator import events
from coordinator.broker import SLACK_BYTES, Kind, Listener, start_broker
from coordinator.ca import CertificateAuthority
from coordinator.optimizer import pack_memory
from coordinator.rows import EpochRow, ModelRow, TaskRow
from coordinator.server import UPLOAD_MEMORY, Server
from coordinator.serving import grantable
from coordinator.store import Store
from coordinator.task import Planned, Task
from edge_sdk.crypto.hashing import derive_key
from edge_sdk.crypto.identity import Identity
from edge_sdk.crypto.sealing import encapsulate
from edge_sdk.crypto.stream import KeyStream
from edge_sdk.enrolment import private_pem, tls_key
from edge_sdk.protocol import authority, contributor, member, messages
from edge_sdk.protocol.messages import Anchor, NoisePlan, Receipt, Signed, unwrap
from edge_sdk.protocol.rounds import Round
from edge_sdk.transport import Connected, Hub, Inbound, Lost
from edge_sdk.transport.chunks import Blob, chunk_count
from edge_sdk.transport.mqtt import Credentials
from edge_sdk.transport.wire import (
    BlobRef,
    Chunk,
    Hello,
    Letter,
    Position,
    Pull,
    Upload,
    Welcome,
    decode_down,
    decode_up,
    encode_frame,
)

ROLES = ("prepare", "null", "server", "sink", "load", "straight", "downloads", "fetch")
HELPERS = 5
IN_FLIGHT = 8
QUEUE_BYTES = UPLOAD_MEMORY + SLACK_BYTES
DAY_S = 86_400
TIME_LIMIT_S = 300.0
SEED = bytes(range(32))
TASK = """
name = "bench"
bundle = "bench.bundle"
publisher = "{zero}"
unit = "device"
rounds = 1
[privacy]
clip = 1.0
delta = 1e-4
noise_multiplier = 1.0
[cohort]
expected = {n}
spread = 0
honest = 2
n_max = {n}
[work]
learning_rate = 0.1
epochs = 1
[schedule]
open_s = {day}
answer_s = {day}
"""


def identity(name: str, number: int = 0) -> Identity:
    return Identity(derive_key(SEED, name, number.to_bytes(4, "little")))


class OneAuthority:
    """Signs whatever roster it is given."""

    public_key = identity("authority").public_key

    def next_epoch(
        self, devices: Any, helpers: Any, groups: Any, previous: EpochRow | None, now_s: float
    ) -> Signed | None:
        roster, key = authority.Roster(devices), identity("authority")
        frozen = authority.freeze(
            key, roster, coordinator=identity("coordinator").public_key, corrupt_devices=1, committee="helpers",
            helpers=helpers, expires_s=int(now_s) + 30 * DAY_S,
        )  # fmt: skip
        return authority.draw(key, frozen, roster, os.urandom(32))


class Quiet:
    """A hub on which nothing happens."""

    unsent_bytes = 0

    def send(self, device: str, frame: bytes) -> None:
        pass

    def receive(self, timeout_s: float, room_bytes: int | None = None) -> list[Inbound | Connected | Lost]:
        return []

    def close(self) -> None:
        pass


def serve(directory: Path, hub: Hub, **arguments: Any) -> Server:
    return Server(
        Store(directory / "store"), hub, identity("coordinator"), OneAuthority(), clock=time.time, entropy=os.urandom,
        **arguments,
    )  # fmt: skip


def prepare(directory: Path, n: int, d: int) -> None:
    """A store with an open round, and n contributions to it as frames in a file."""
    devices, helpers = [identity("device", i) for i in range(n)], [identity("helper", i) for i in range(HELPERS)]
    text = TASK.format(zero="0" * 64, n=n, day=DAY_S)
    task, now_s = Task.from_toml(text), time.time()
    noise = NoisePlan("device", 1.0, 1e-3, 100.0, 0.0, 1.0, 1.0, 1.0)
    plan = Planned(bytes(32), d, n, 2, 1, noise, 1e-4, [(1, 1.0)], [(1, 1.0)], 1.0, 1.0, "")
    store = Store(directory / "store")
    parameters = store.put_blob(np.zeros(d, "<f4").tobytes())
    memory, bundle = store.put_blob(pack_memory(task.optimizer.start(d))), store.put_blob(b"no bundle")
    with store.transaction() as t:
        for key in devices:
            t.add_device(key.public_key, "device", (), now_s)
        for i, key in enumerate(helpers):
            t.add_device(key.public_key, "helper", (), now_s)
            state, expires_s = member.MemberState(), int(now_s) + 30 * DAY_S
            seed = derive_key(SEED, "prekey", i.to_bytes(4, "little"), length=96)
            _, offer = member.offer_prekey(state, key, OneAuthority.public_key, seed, expires_s)
            t.add_prekey(key.public_key, 0, messages.encode(offer), expires_s)
        t.add_task(TaskRow("bench", text, plan.encode(), bundle, "running", 0, now_s))
        t.add_model(ModelRow("bench", 0, parameters, memory, None, None, 1.0, n, None, None, {}, now_s))
    store.close()
    server = serve(directory, Quiet())
    server.step(0.0)
    server.close()
    store = Store(directory / "store")
    with store.reading() as t:
        (row,), epoch_row = t.active_rounds(), t.newest_epoch()
    store.close()
    if epoch_row is None:
        raise SystemExit("no epoch")
    epoch = authority.FleetEpoch(OneAuthority.public_key, messages.decode(Signed, epoch_row.signed))
    round_, roster = Round(epoch, messages.decode(Signed, row.ticket)), authority.Roster(epoch_row.roster)
    terms, inputs, index = contributor.Terms(bytes(32)), KeyStream(os.urandom(32)), []
    with (directory / "frames").open("wb") as file:

        def put(frame: bytes) -> tuple[int, int]:
            place = (file.tell(), len(frame))
            file.write(frame)
            return place

        for key in devices:
            place, proof = roster.enrolment(key.public_key)
            training = contributor.Idle("bench").on_ticket(round_, terms, now_s)
            integers = inputs.words16(d)
            sent = training.contribute(
                integers, contributor.Enrolled(key, place, proof), Anchor(1, key.public_key), os.urandom(32),
                encapsulate, now_s,
            )  # fmt: skip
            blob = Blob.of(sent.contribution.masked + sent.contribution.shares)
            upload = put(encode_frame(Upload(sent.contribution.header, blob.ref)))
            chunks = [put(encode_frame(blob.chunk(i))) for i in range(chunk_count(blob.ref.size))]
            index.append([key.public_key.hex(), blob.ref.id.hex(), blob.ref.size, upload, chunks])
    (directory / "index.json").write_text(json.dumps(index))
    certify(directory / "tls", [key.public_key.hex() for key in (*devices, *helpers)])


def certify(tls: Path, names: list[str]) -> None:
    """A CA, the coordinator's certificates, and one for each of these names; they share a key, which spares time."""
    tls.mkdir(mode=0o700)
    now_s = int(time.time())
    ca = CertificateAuthority.create(tls, "bench", now_s)
    ca.ensure_service_certificates(["127.0.0.1"], now_s)
    ca.write_crl([], now_s)
    key = tls_key(os.urandom(48))
    (tls / "devices.key").write_bytes(private_pem(key))
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, SHA256())
    for name in names:
        (tls / f"{name}.pem").write_bytes(ca.issue_device(request, name, now_s, 30).pem)


class Prepared:
    """The devices' frames on disk, and helpers that fetch what they are sent."""

    def __init__(self, directory: Path) -> None:
        self._fd = os.open(directory / "frames", os.O_RDONLY)
        index = json.loads((directory / "index.json").read_text())
        self.devices = [entry[0] for entry in index]
        self.sizes = {entry[0]: entry[2] for entry in index}
        self.uploads = {entry[0]: entry[3] for entry in index}
        self.chunks = {entry[0]: entry[4] for entry in index}
        self.helpers = [identity("helper", i).public_key.hex() for i in range(HELPERS)]
        self.receipts = 0

    def read(self, place: tuple[int, int]) -> bytes:
        return os.pread(self._fd, place[1], place[0])

    def hello(self) -> list[tuple[str, bytes]]:
        return [(helper, encode_frame(Hello(1, 0, 0, True, []))) for helper in self.helpers]

    def answer(self, device: str, data: bytes) -> list[tuple[int, int] | bytes]:
        """What a device says to a frame: places in the file, or frames."""
        frame = decode_down(data)
        if isinstance(frame, Pull) and device in self.chunks:
            return [self.chunks[device][i] for i in frame.chunks]
        if isinstance(frame, Letter) and isinstance(frame.content, BlobRef):
            return [encode_frame(Pull(frame.content.id, list(range(chunk_count(frame.content.size)))))]
        if isinstance(frame, Letter) and isinstance(frame.content, bytes) and device in self.chunks:
            self.receipts += unwrap(frame.content)[0] is Receipt
        return []


class DiskHub:
    """Gives the server the prepared frames. `seconds`, `cpu_s`: what that took."""

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared
        self._queue: deque[tuple[str, tuple[int, int] | bytes]] = deque(prepared.hello())
        self._queue.extend((device, place) for device, place in prepared.uploads.items())
        self.unsent_bytes = 0
        self.seconds = self.cpu_s = 0.0

    def send(self, device: str, frame: bytes) -> None:
        started, cpu_s = time.perf_counter(), time.thread_time()
        self._queue.extend((device, answer) for answer in self._prepared.answer(device, frame))
        self.seconds += time.perf_counter() - started
        self.cpu_s += time.thread_time() - cpu_s

    def receive(self, timeout_s: float, room_bytes: int | None = None) -> list[Inbound | Connected | Lost]:
        started, cpu_s = time.perf_counter(), time.thread_time()
        batch: list[Inbound | Connected | Lost] = []
        for _ in range(min(256, len(self._queue))):
            device, item = self._queue.popleft()
            batch.append(Inbound(device, item if isinstance(item, bytes) else self._prepared.read(item)))
        self.seconds += time.perf_counter() - started
        self.cpu_s += time.thread_time() - cpu_s
        return batch

    def close(self) -> None:
        pass


def peak_mb() -> float:
    """Peak resident memory of this process since its exec."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def measure_null(directory: Path) -> dict[str, float]:
    prepared = Prepared(directory)
    hub = DiskHub(prepared)
    server = serve(directory, hub)
    n = len(prepared.devices)
    started, begun_cpu = time.perf_counter(), time.process_time()
    while prepared.receipts < n:
        server.step(0.0)
        if time.perf_counter() - started > TIME_LIMIT_S:
            raise SystemExit(f"{prepared.receipts} of {n} receipts after {TIME_LIMIT_S} s")
    seconds = time.perf_counter() - started - hub.seconds
    cpu_s = time.process_time() - begun_cpu - hub.cpu_s
    server.close()
    return {"seconds": seconds, "cpu_s": cpu_s, "rss_mb": peak_mb()}


def serve_downloads(directory: Path, kind: Kind) -> None:
    """The server with a broker, while devices fetch the model: until stdin ends."""
    ended = threading.Event()

    def wait() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=wait, daemon=True).start()
    with linked(directory, kind, QUEUE_BYTES) as hub:
        server = serve(directory, hub)
        server.run(ended.is_set)
        server.close()


def measure_server(directory: Path, kind: Kind) -> None:
    """The server with a broker, until it has taken every upload."""
    n = len(json.loads((directory / "index.json").read_text()))
    taken = 0

    def count(event: events.Event) -> None:
        nonlocal taken
        taken += isinstance(event, events.Contributed)

    with linked(directory, kind, QUEUE_BYTES) as hub:
        counting = Counting(hub)
        memory = grantable(UPLOAD_MEMORY, kind)
        server = serve(directory, counting, on_event=count, upload_memory=memory)
        begun = time.perf_counter()
        server.run(lambda: taken >= n or time.perf_counter() - begun > TIME_LIMIT_S)
        if taken < n:
            raise SystemExit(f"{taken} of {n} uploads after {TIME_LIMIT_S} s")
        tell(counting.first_s, counting.first_cpu_s)
        server.close()


def tell(first_s: float, first_cpu_s: float) -> None:
    """What was measured, since these times. Until stdin ends, all processes are left as they are."""
    seconds, cpu_s = time.perf_counter() - first_s, time.process_time() - first_cpu_s
    print(json.dumps({"seconds": seconds, "cpu_s": cpu_s, "rss_mb": peak_mb()}), flush=True)
    sys.stdin.read()


class Counting:
    """A hub that notes when the first upload came."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self.first_s = self.first_cpu_s = 0.0

    def send(self, device: str, frame: bytes) -> None:
        self._hub.send(device, frame)

    def receive(self, timeout_s: float, room_bytes: int | None = None) -> list[Inbound | Connected | Lost]:
        batch = self._hub.receive(timeout_s, room_bytes)
        if not self.first_s and any(isinstance(i, Inbound) and isinstance(decode_up(i.frame), Upload) for i in batch):
            self.first_s, self.first_cpu_s = time.perf_counter(), time.process_time()
        return batch

    @property
    def unsent_bytes(self) -> int:
        return self._hub.unsent_bytes

    def close(self) -> None:
        self._hub.close()


def measure_sink(directory: Path, kind: Kind) -> None:
    """A broker with a hub that only counts the chunks' bytes."""
    index = json.loads((directory / "index.json").read_text())
    expected = sum(length for entry in index for _, length in entry[4])
    # Nobody grants anything here, and mosquitto drops what is over the limit.
    with linked(directory, kind, 1 << 40 if kind == "mosquitto" else QUEUE_BYTES) as hub:
        received, first_s, first_cpu_s, begun = 0, 0.0, 0.0, time.perf_counter()
        while received < expected:
            for item in hub.receive(0.5):
                if isinstance(item, Inbound):
                    if not first_s:
                        first_s, first_cpu_s = time.perf_counter(), time.process_time()
                    received += len(item.frame)
            if time.perf_counter() - begun > TIME_LIMIT_S:
                raise SystemExit(f"{received} of {expected} bytes")
        tell(first_s, first_cpu_s)


class RawMqtt:
    """As little MQTT 3.1.1 as it takes to play a device, because the generator shares this machine's cores."""

    def __init__(self, url: str, directory: Path, name: str) -> None:
        host, port = url.removeprefix("mqtts://").split(":")
        plain = socket.create_connection((host, int(port)))
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = credentials(directory, name).context().wrap_socket(plain, server_hostname=host)
        self._buffer = bytearray()
        self.outbox: deque[tuple[str, tuple[int, int] | bytes]] = deque()
        self.unacknowledged = 0
        self._next = 0
        self._send(0x10, _text("MQTT") + bytes((4, 2)) + (0).to_bytes(2, "big") + _text(name))
        self._packet()
        self._send(0x82, (1).to_bytes(2, "big") + _text(f"fl/v1/dn/{name}") + b"\1")
        self._packet()

    def fileno(self) -> int:
        return self._socket.fileno()

    def publish(self, device: str, frame: bytes) -> None:
        """QoS 1."""
        self._next = self._next % 65535 + 1
        self.unacknowledged += 1
        self._send(0x32, _text(f"fl/v1/up/{device}") + self._next.to_bytes(2, "big"), frame)

    def receive(self) -> Iterator[tuple[str, bytes]]:
        """What is there, acknowledged, once `select` said that something is."""
        while True:
            kind, body = self._packet()
            if kind >> 4 == 4:
                self.unacknowledged -= 1
            else:
                length = int.from_bytes(body[:2], "big")
                topic, rest = body[2 : 2 + length].decode(), body[2 + length :]
                self._send(0x40, rest[:2])
                yield topic.rsplit("/", 1)[1], rest[2:]
            if not self._buffer and not self._socket.pending():
                return

    def _send(self, kind: int, head: bytes, payload: bytes = b"") -> None:
        length, sizes = len(head) + len(payload), bytearray()
        while True:
            length, low = divmod(length, 128)
            sizes.append(low | (0x80 if length else 0))
            if not length:
                break
        self._socket.sendall(b"".join((bytes((kind,)), sizes, head, payload)))  # a head alone would be a record of TLS

    def _packet(self) -> tuple[int, bytes]:
        size, shift, at = 0, 0, 1
        while True:
            self._fill(at + 1)
            size |= (self._buffer[at] & 127) << shift
            if not self._buffer[at] & 128:
                break
            shift, at = shift + 7, at + 1
        self._fill(at + 1 + size)
        kind, body = self._buffer[0], bytes(self._buffer[at + 1 : at + 1 + size])
        del self._buffer[: at + 1 + size]
        return kind, body

    def _fill(self, count: int) -> None:
        while len(self._buffer) < count:
            part = self._socket.recv(1 << 18)
            if not part:
                os._exit(0)
            self._buffer += part


def _text(text: str) -> bytes:
    return len(text).to_bytes(2, "big") + text.encode()


def load(directory: Path, url: str, straight: bool) -> None:
    """Plays all devices: answers pulls, or, straight, sends every chunk. From a line on stdin until stdin ends."""
    prepared = Prepared(directory)
    links = {name: RawMqtt(url, directory, name) for name in (*prepared.devices, *prepared.helpers)}
    by_fd, poll = {link.fileno(): link for link in links.values()}, select.epoll()
    for fd in by_fd:
        poll.register(fd, select.EPOLLIN)
    print("ready", flush=True)
    sys.stdin.readline()
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    if straight:
        for device, places in prepared.chunks.items():
            links[device].outbox.extend((device, place) for place in places)
    else:
        for name, item in (*prepared.hello(), *prepared.uploads.items()):
            links[name].outbox.append((name, item))
    sending = deque(link for link in links.values() if link.outbox)
    while True:
        for _ in range(min(len(sending), 16)):
            link = sending.popleft()
            device, item = link.outbox.popleft()
            link.publish(device, item if isinstance(item, bytes) else prepared.read(item))
            if link.outbox and link.unacknowledged < IN_FLIGHT:
                sending.append(link)
        for fd, _ in poll.poll(0.0 if sending else 30.0):
            link = by_fd[fd]
            sends = bool(link.outbox) and link.unacknowledged < IN_FLIGHT
            for device, frame in link.receive():
                link.outbox.extend((device, answer) for answer in prepared.answer(device, frame))
            if not sends and link.outbox and link.unacknowledged < IN_FLIGHT:
                sending.append(link)


def fetch(directory: Path, url: str) -> dict[str, float]:
    """Plays all devices at a new model: each says Hello, is told of it and fetches it."""
    names = Prepared(directory).devices
    links = {link.fileno(): link for link in (RawMqtt(url, directory, name) for name in names)}
    poll = select.epoll()
    for fd in links:
        poll.register(fd, select.EPOLLIN)
    print("ready", flush=True)
    sys.stdin.readline()
    begun = time.perf_counter()
    hello = encode_frame(Hello(1, 0, 0, False, [Position("bench", -1)]))
    for name, link in zip(names, links.values(), strict=True):
        link.publish(name, hello)
    left: dict[str, int] = {}
    while len(left) < len(names) or any(left.values()):
        if time.perf_counter() - begun > TIME_LIMIT_S:
            raise SystemExit(f"{sum(map(bool, left.values()))} of {len(names)} downloads after {TIME_LIMIT_S} s")
        for fd, _ in poll.poll(1.0):
            for name, frame in links[fd].receive():
                said = decode_down(frame)
                if isinstance(said, Welcome) and name not in left:
                    model = said.tasks[0].parameters
                    left[name] = chunk_count(model.size)
                    links[fd].publish(name, encode_frame(Pull(model.id, list(range(left[name])))))
                elif isinstance(said, Chunk):
                    left[name] -= 1
    return {"seconds": time.perf_counter() - begun}


class Role:
    """Another process on this file, in one of its roles."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(  # noqa: S603  this file itself
            [sys.executable, __file__, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def line(self) -> str:
        if self.process.stdout is None:
            raise SystemExit("no output")
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args!r} ended with {self.process.wait()}")
        return line

    def go(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.write("\n")
            self.process.stdin.flush()

    def end(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait(30)


def cpu_s(pid: int) -> float:
    """Processor time of another process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def credentials(directory: Path, name: str | None = None) -> Credentials:
    """The coordinator's, or a device's."""
    tls = directory / "tls"
    if name is None:
        return Credentials(tls / "ca.pem", tls / "client.pem", tls / "client.key")
    return Credentials(tls / "ca.pem", tls / f"{name}.pem", tls / "devices.key")


@contextmanager
def linked(directory: Path, kind: Kind, queue_bytes: int) -> Iterator[Hub]:
    """The coordinator's own broker, with its rules, and a link to it. Prints where it is, and its pid if it has one."""
    logging.getLogger("amqtt").setLevel(logging.ERROR)  # as `serve` has it
    listener = Listener(directory / "tls", "127.0.0.1", free_port(), queue_bytes)
    broker = start_broker(kind, listener, None, ())
    try:
        hub = broker.link(credentials(directory))
        print(json.dumps({"url": broker.url, "pid": getattr(broker, "pid", None)}), flush=True)
        try:
            yield hub
        finally:
            hub.close()
    finally:
        broker.close()


def with_broker(kind: str, directory: Path, role: str) -> dict[str, float]:
    """One measurement on a fresh broker: role "server", "sink" or "downloads"."""
    measured = Role("--role", role, "--directory", str(directory), "--broker", kind)
    where = json.loads(measured.line())
    played = {"server": "load", "sink": "straight", "downloads": "fetch"}[role]
    devices = Role("--role", played, "--directory", str(directory), "--url", where["url"])
    devices.line()
    pids = [pid for pid in (where["pid"], measured.process.pid, devices.process.pid) if pid]
    before = {pid: cpu_s(pid) for pid in pids}
    devices.go()
    result: dict[str, float] = json.loads((devices if role == "downloads" else measured).line())
    spent = {pid: cpu_s(pid) - before[pid] for pid in pids}
    devices.end()
    measured.end()
    return {"cpu_s": spent[measured.process.pid], "all_cpu_s": sum(spent.values()), **result}


def renew(directory: Path) -> None:
    """The store as it was prepared."""
    shutil.rmtree(directory / "store")
    shutil.copytree(directory / "fresh", directory / "store")
    os.sync()  # what was prepared is at rest: the disk would write it out while it is measured


def rows(n: int, d: int, brokers: list[str], repeat: int) -> list[dict[str, object]]:
    """Prepare once for this n, then measure each broker `repeat` times, each time on a copy of the store."""
    found: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as root:
        directory = Path(root)
        Role("--role", "prepare", "--directory", root, "--n", str(n), "--d", str(d)).process.wait()
        shutil.copytree(directory / "store", directory / "fresh")
        size = json.loads((directory / "index.json").read_text())[0][2]
        for broker in brokers:
            served, carried, fetched = [], [], []
            for _ in range(repeat):
                renew(directory)
                if broker == "null":
                    served.append(json.loads(Role("--role", "null", "--directory", root).line()))
                else:
                    served.append(with_broker(broker, directory, "server"))
                    carried.append(with_broker(broker, directory, "sink"))
                    renew(directory)
                    fetched.append(with_broker(broker, directory, "downloads"))
            seconds = [result["seconds"] for result in served]
            row: dict[str, object] = {
                "broker": broker, "n": n, "d": d, "upload_bytes": size,
                "uploads_per_s": round(n / median(seconds), 1), "uploads_per_s_range": _range(n / s for s in seconds),
                "mb_per_s": round(n * size / median(seconds) / 1e6, 1),
                "rss_mb": round(max(result["rss_mb"] for result in served), 1),
                "cpu_ms_per_upload": round(1e3 * median(result["cpu_s"] for result in served) / n, 2),
            }  # fmt: skip
            if carried:
                row["carried_mb_per_s"] = round(n * size / median(sink["seconds"] for sink in carried) / 1e6, 1)
                ratios = [sink["seconds"] / mine for sink, mine in zip(carried, seconds, strict=True)]
                for key, measured in (("all_cpu_ms_per_upload", served), ("carried_cpu_ms_per_upload", carried)):
                    row[key] = round(1e3 * median(result["all_cpu_s"] for result in measured) / n, 2)
                row["downloads_per_s"] = round(n / median(result["seconds"] for result in fetched), 1)
                row["cpu_ms_per_download"] = round(1e3 * median(result["cpu_s"] for result in fetched) / n, 2)
                row |= {"ratio": round(median(ratios), 2), "ratio_range": _range(ratios, 2)}
            found.append(row)
    return found


def _range(values: Iterable[float], digits: int = 0) -> list[float]:
    listed = list(values)
    return [round(min(listed), digits), round(max(listed), digits)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, nargs="+", default=[125, 500])
    parser.add_argument("--d", type=int, default=100_000)
    parser.add_argument("--broker", nargs="+", default=["null", "mosquitto", "amqtt"])
    parser.add_argument("--repeat", type=int, default=3, help="of which the medians, and the least and the most")
    parser.add_argument("--json", action="store_true", help="one object a line")
    parser.add_argument("--role", choices=ROLES, help="internal")
    parser.add_argument("--directory", type=Path, help="internal")
    parser.add_argument("--url", help="internal")
    options = parser.parse_args()
    match options.role:
        case "prepare":
            prepare(options.directory, options.n[0], options.d)
        case "null":
            print(json.dumps(measure_null(options.directory)), flush=True)
        case "server":
            measure_server(options.directory, options.broker[0])
        case "sink":
            measure_sink(options.directory, options.broker[0])
        case "downloads":
            serve_downloads(options.directory, options.broker[0])
        case "fetch":
            print(json.dumps(fetch(options.directory, options.url)), flush=True)
        case "load" | "straight":
            load(options.directory, options.url, options.role == "straight")
        case _:
            for n in options.n:
                for row in rows(n, options.d, options.broker, options.repeat):
                    print(
                        json.dumps(row) if options.json else "  ".join(f"{k} {v}" for k, v in row.items()), flush=True
                    )


if __name__ == "__main__":
    main()
