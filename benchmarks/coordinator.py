"""How many uploads a second the coordinator takes, and in how much memory: the real server, on real contributions.

    python benchmarks/coordinator.py --json --n 500 --d 100000 --broker null mosquitto amqtt

Every contribution is made in advance, for a ticket that the server itself issued, and lies on disk as the frames that a
device would send. One row a broker and n:

- `null`: a hub that reads these frames from disk when the server pulls them. Its own time is taken out of the figure.
- `mosquitto`, `amqtt`: on loopback with mutual TLS, as `edge-coordinator serve` has it (no topic rules); another
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
from pathlib import Path
from statistics import median
from typing import Any

# A script's own directory comes first in the path, and there this file is `coordinator`.
if __name__ == "__main__":
    sys.path.pop(0)

import numpy as np

from coordinator import events
from coordinator.broker.mosquitto import find_mosquitto
from coordinator.ca import CertificateAuthority
from coordinator.optimizer import pack_memory
from coordinator.rows import EpochRow, ModelRow, TaskRow
from coordinator.server import Server
from coordinator.store import Store
from coordinator.task import Planned, Task
from edge_sdk.crypto.hashing import derive_key
from edge_sdk.crypto.identity import Identity
from edge_sdk.crypto.sealing import encapsulate
from edge_sdk.crypto.stream import KeyStream
from edge_sdk.protocol import authority, contributor, member, messages
from edge_sdk.protocol.messages import Anchor, NoisePlan, Receipt, Signed, unwrap
from edge_sdk.protocol.rounds import Round
from edge_sdk.transport import Connected, Hub, Inbound, Lost
from edge_sdk.transport.chunks import Blob, chunk_count
from edge_sdk.transport.mqtt import Credentials, MqttHub
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

    def receive(self, timeout_s: float) -> list[Inbound | Connected | Lost]:
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

    def receive(self, timeout_s: float) -> list[Inbound | Connected | Lost]:
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


def _set_at_end(ended: threading.Event) -> None:
    sys.stdin.read()
    ended.set()


def serve_downloads(directory: Path, url: str) -> None:
    """The server behind a broker, while devices fetch the model: until stdin ends."""
    hub = MqttHub(url, credentials(directory))
    server = serve(directory, hub)
    ended = threading.Event()
    threading.Thread(target=_set_at_end, args=(ended,), daemon=True).start()
    print("ready", flush=True)
    server.run(ended.is_set)
    server.close()
    hub.close()


def measure_server(directory: Path, url: str) -> dict[str, float]:
    """The server behind a broker, until it has taken every upload."""
    n = len(json.loads((directory / "index.json").read_text()))
    taken, first = 0, 0.0

    def count(event: events.Event) -> None:
        nonlocal taken
        taken += isinstance(event, events.Contributed)

    hub = MqttHub(url, credentials(directory))
    counting = Counting(hub)
    server = serve(directory, counting, on_event=count)
    print("ready", flush=True)
    begun = time.perf_counter()
    server.run(lambda: taken >= n or time.perf_counter() - begun > TIME_LIMIT_S)
    if taken < n:
        raise SystemExit(f"{taken} of {n} uploads after {TIME_LIMIT_S} s; the hub dropped {hub.dropped}")
    first = counting.first_s
    seconds, cpu_s = time.perf_counter() - first, time.process_time() - counting.first_cpu_s
    server.step(0.1)
    server.close()
    hub.close()
    return {"seconds": seconds, "cpu_s": cpu_s, "rss_mb": peak_mb()}


class Counting:
    """A hub that notes when the first upload came."""

    def __init__(self, hub: MqttHub) -> None:
        self._hub = hub
        self.first_s = self.first_cpu_s = 0.0

    def send(self, device: str, frame: bytes) -> None:
        self._hub.send(device, frame)

    def receive(self, timeout_s: float) -> list[Inbound | Connected | Lost]:
        batch = self._hub.receive(timeout_s)
        if not self.first_s and any(isinstance(i, Inbound) and isinstance(decode_up(i.frame), Upload) for i in batch):
            self.first_s, self.first_cpu_s = time.perf_counter(), time.process_time()
        return batch

    @property
    def unsent_bytes(self) -> int:
        return self._hub.unsent_bytes

    def close(self) -> None:
        self._hub.close()


def measure_sink(directory: Path, url: str) -> dict[str, float]:
    """A hub that only counts the chunks' bytes."""
    index = json.loads((directory / "index.json").read_text())
    expected = sum(length for entry in index for _, length in entry[4])
    hub = MqttHub(url, credentials(directory))
    print("ready", flush=True)
    received, first, first_cpu_s, begun = 0, 0.0, 0.0, time.perf_counter()
    while received < expected:
        for item in hub.receive(0.5):
            if isinstance(item, Inbound):
                if not first:
                    first, first_cpu_s = time.perf_counter(), time.process_time()
                received += len(item.frame)
        if time.perf_counter() - begun > TIME_LIMIT_S:
            raise SystemExit(f"{received} of {expected} bytes; the hub dropped {hub.dropped}")
    seconds, cpu_s = time.perf_counter() - first, time.process_time() - first_cpu_s
    hub.close()
    return {"seconds": seconds, "cpu_s": cpu_s, "rss_mb": peak_mb()}


class RawMqtt:
    """As little MQTT 3.1.1 as it takes to play devices, because the generator shares this machine's cores."""

    def __init__(self, url: str, directory: Path, name: str, topics: str) -> None:
        host, port = url.removeprefix("mqtts://").split(":")
        plain = socket.create_connection((host, int(port)))
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = credentials(directory).context().wrap_socket(plain, server_hostname=host)
        self._buffer = bytearray()
        self.outbox: deque[tuple[str, tuple[int, int] | bytes]] = deque()
        self.unacknowledged = 0
        self._next = 0
        self._send(0x10, _text("MQTT") + bytes((4, 2)) + (0).to_bytes(2, "big") + _text(name))
        self._packet()
        self._send(0x82, (1).to_bytes(2, "big") + _text(f"fl/v1/dn/{topics}") + b"\1")
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


def load(directory: Path, url: str, straight: bool, together: bool) -> None:
    """Plays all devices: answers pulls, or, straight, sends every chunk. From a line on stdin until stdin ends.

    together: over one connection. Else each has its own, as in a fleet.
    """
    prepared = Prepared(directory)
    names = [*prepared.devices, *prepared.helpers]
    if together:
        links, window = dict.fromkeys(names, RawMqtt(url, directory, "load", "+")), 128
    else:
        links, window = {name: RawMqtt(url, directory, name, name) for name in names}, 8
    distinct = {link.fileno(): link for link in links.values()}
    poll = select.epoll()
    for fd in distinct:
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
    sending = deque(link for link in distinct.values() if link.outbox)
    while True:
        for _ in range(min(len(sending), 16)):
            link = sending.popleft()
            device, item = link.outbox.popleft()
            link.publish(device, item if isinstance(item, bytes) else prepared.read(item))
            if link.outbox and link.unacknowledged < window:
                sending.append(link)
        for fd, _ in poll.poll(0.0 if sending else 30.0):
            link = distinct[fd]
            sends = bool(link.outbox) and link.unacknowledged < window
            for device, frame in link.receive():
                link.outbox.extend((device, answer) for answer in prepared.answer(device, frame))
            if not sends and link.outbox and link.unacknowledged < window:
                sending.append(link)


def fetch(directory: Path, url: str) -> dict[str, float]:
    """Plays all devices at a new model: each says Hello, is told of it and fetches it."""
    names = Prepared(directory).devices
    links = {link.fileno(): link for link in (RawMqtt(url, directory, name, name) for name in names)}
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


AMQTT = """
import asyncio, json, logging, sys
from coordinator.broker.amqtt import Directed
async def main():
    logging.getLogger("amqtt").setLevel(logging.ERROR)
    await Directed(json.loads(sys.argv[1])).start()
    await asyncio.Event().wait()
asyncio.run(main())
"""


def credentials(directory: Path) -> Credentials:
    tls = directory / "tls"
    return Credentials(tls / "ca.pem", tls / "client.pem", tls / "client.key")


def start_broker(kind: str, directory: Path) -> tuple[subprocess.Popen[bytes], str]:
    port, tls = free_port(), directory / "tls"
    tls.mkdir(mode=0o700, exist_ok=True)
    now_s = int(time.time())
    CertificateAuthority.create(tls, "bench", now_s).ensure_service_certificates(["127.0.0.1"], now_s)
    if kind == "mosquitto":
        program = find_mosquitto()
        if program is None:
            raise SystemExit("mosquitto is not installed")
        config = directory / "mosquitto.conf"
        config.write_text(
            f"listener {port} 127.0.0.1\nallow_anonymous true\npersistence false\nset_tcp_nodelay true\nuser root\n"
            f"max_queued_messages 0\nmax_inflight_messages 0\nrequire_certificate true\ncafile {tls}/ca.pem\n"
            f"certfile {tls}/server.pem\nkeyfile {tls}/server.key\n"
        )
        command = [program, "-c", str(config)]
    else:
        files = {"cafile": f"{tls}/ca.pem", "certfile": f"{tls}/server.pem", "keyfile": f"{tls}/server.key"}
        listener = {"type": "tcp", "bind": f"127.0.0.1:{port}", "ssl": True, **files}
        anonymous = {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}}
        command = [sys.executable, "-c", AMQTT, json.dumps({"listeners": {"default": listener}, "plugins": anonymous})]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: S603  made here
    for _ in range(200):
        try:
            socket.create_connection(("127.0.0.1", port), 0.2).close()
            return process, f"mqtts://127.0.0.1:{port}"
        except OSError:
            time.sleep(0.05)
    process.kill()
    raise SystemExit(f"{kind} does not listen")


def with_broker(kind: str, directory: Path, role: str, together: bool) -> dict[str, float]:
    """One measurement on a fresh broker: role "server" or "sink"."""
    process, url = start_broker(kind, directory)
    where = ("--directory", str(directory), "--url", url)
    try:
        measured = Role("--role", role, *where)
        measured.line()
        generator = Role("--role", "straight" if role == "sink" else "load", *where, *["--together"] * together)
        generator.line()
        others = process.pid, generator.process.pid
        before = sum(map(cpu_s, others))
        generator.go()
        result: dict[str, float] = json.loads(measured.line())
        result["all_cpu_s"] = result["cpu_s"] + sum(map(cpu_s, others)) - before
        generator.end()
        measured.end()
        return result
    finally:
        process.kill()
        process.wait()


def with_downloads(kind: str, directory: Path) -> dict[str, float]:
    """One measurement of downloads, on a fresh broker."""
    process, url = start_broker(kind, directory)
    where = ("--directory", str(directory), "--url", url)
    try:
        server = Role("--role", "downloads", *where)
        server.line()
        devices = Role("--role", "fetch", *where)
        devices.line()
        before = cpu_s(server.process.pid)
        devices.go()
        result: dict[str, float] = json.loads(devices.line())
        result["cpu_s"] = cpu_s(server.process.pid) - before
        devices.end()
        server.end()
        return result
    finally:
        process.kill()
        process.wait()


def rows(n: int, d: int, brokers: list[str], repeat: int, together: bool) -> list[dict[str, object]]:
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
                shutil.rmtree(directory / "store")
                shutil.copytree(directory / "fresh", directory / "store")
                os.sync()  # what was prepared is at rest: the disk would write it out while it is measured
                if broker == "null":
                    served.append(json.loads(Role("--role", "null", "--directory", root).line()))
                else:
                    served.append(with_broker(broker, directory, "server", together))
                    carried.append(with_broker(broker, directory, "sink", together))
                    shutil.rmtree(directory / "store")
                    shutil.copytree(directory / "fresh", directory / "store")
                    fetched.append(with_downloads(broker, directory))
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
    parser.add_argument("--together", action="store_true", help="all devices over one connection: a cheaper generator")
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
            print(json.dumps(measure_server(options.directory, options.url)), flush=True)
        case "sink":
            print(json.dumps(measure_sink(options.directory, options.url)), flush=True)
        case "downloads":
            serve_downloads(options.directory, options.url)
        case "fetch":
            print(json.dumps(fetch(options.directory, options.url)), flush=True)
        case "load" | "straight":
            load(options.directory, options.url, options.role == "straight", options.together)
        case _:
            for n in options.n:
                for row in rows(n, options.d, options.broker, options.repeat, options.together):
                    print(
                        json.dumps(row) if options.json else "  ".join(f"{k} {v}" for k, v in row.items()), flush=True
                    )


if __name__ == "__main__":
    main()
