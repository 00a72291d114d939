"""A fleet for tests of the server: contributors and members on the real protocol code, without training or disks.

Devices take frames and give frames; `Fleet` carries them, in one process over a `MemoryHub` or to a server in a child
process that can be killed. Time is a number that the test moves. Whoever contributes remembers what it put in and which
receipts it holds, so that a test can say what the opened sum has to be.
"""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import struct
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent import futures
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coordinator.optimizer import pack_memory
from coordinator.rows import ModelRow, TaskRow
from coordinator.server import Server
from coordinator.store import DATABASE, Store
from coordinator.task import Planned, Task
from edge_sdk.crypto.hashing import content_hash, derive_key
from edge_sdk.crypto.identity import Identity
from edge_sdk.crypto.sealing import encapsulate
from edge_sdk.crypto.stream import KeyStream
from edge_sdk.errors import PeerError, RoundAborted, TransportError
from edge_sdk.protocol import authority, member, messages
from edge_sdk.protocol.authority import FleetEpoch
from edge_sdk.protocol.contributor import Enrolled, Idle, Sent, Terms, check_abort
from edge_sdk.protocol.member import MemberState
from edge_sdk.protocol.messages import (
    Abort,
    Anchor,
    Header,
    NoisePlan,
    Receipt,
    Seal,
    Signed,
    Ticket,
    Transcript,
    message_hash,
    unwrap,
    wrap,
)
from edge_sdk.protocol.rounds import Round
from edge_sdk.transport import Connected, Inbound, Lost
from edge_sdk.transport.chunks import Blob, Download, parcel_of
from edge_sdk.transport.memory import MemoryHub, MemoryTransport
from edge_sdk.transport.wire import (
    BlobRef,
    Chunk,
    Gone,
    Hello,
    Leaving,
    Letter,
    Position,
    Prekeys,
    Pull,
    Refusal,
    Upload,
    Welcome,
    decode_down,
    encode_frame,
)

ENTROPY = bytes(range(32))
START_S = 1_800_000_000.0
DIMENSION = 20
BUNDLE = b"a bundle: the server never looks into it"

TASK = """
name = "{name}"
bundle = "tiny.bundle"
publisher = "{publisher}"
unit = "device"
rounds = {rounds}
{top}

[privacy]
clip = 1.0
delta = 1e-4
noise_multiplier = 3
device_rate = {device_rate}

[cohort]
expected = {expected}
spread = 0
honest = 2
groups = {groups}
n_max = {n_max}

[work]
learning_rate = 0.1
epochs = 1

[optimizer]
kind = "fedavgm"

[schedule]
open_s = 4
grace_s = 0.5
answer_s = 60
{schedule}
"""


def seed(*parts: object) -> bytes:
    """32 bytes that follow from the parts."""
    return derive_key(ENTROPY, "fleet", *(repr(part).encode() for part in parts))


COORDINATOR, AUTHORITY = Identity(seed("coordinator")), Identity(seed("authority"))


class LocalAuthority:
    """The fleet authority in the same process. committee: "everyone", "helpers" or "drawn"."""

    def __init__(self, committee: str = "helpers", corrupt: int = 1, life_s: float = 1e6) -> None:
        self.public_key = AUTHORITY.public_key
        self.committee, self.corrupt, self.life_s = committee, corrupt, life_s

    def next_epoch(self, devices, helpers, groups, previous, now_s):
        roster = authority.Roster(devices)
        number = previous.number + 1 if previous is not None else 1
        frozen = authority.freeze(
            AUTHORITY, roster, coordinator=COORDINATOR.public_key, corrupt_devices=self.corrupt,
            committee=self.committee, helpers=helpers if self.committee == "helpers" else (),
            expires_s=int(now_s + self.life_s), number=number,
            previous=previous.id if previous is not None else authority.FIRST,
        )  # fmt: skip
        return authority.draw(AUTHORITY, frozen, roster, seed("beacon", number), groups)


def noise_plan(device_rate: float = 1.0) -> NoisePlan:
    return NoisePlan("device", 1.0, 1e-3, 100.0, 0.0, 1.0, device_rate, 1.0)


def add_task(
    store: Store, name: str = "tiny", *, rounds: int = 1, n_max: int = 6, groups: int = 1, expected: float = 4,
    dimension: int = DIMENSION, device_rate: float = 1.0, top: str = "", schedule: str = "", now_s: float = START_S,
) -> None:  # fmt: skip
    """A task of unit "device", planned by hand."""
    text = TASK.format(
        name=name, publisher="11" * 32, rounds=rounds, n_max=n_max, groups=groups, expected=expected,
        device_rate=device_rate, top=top, schedule=schedule,
    )  # fmt: skip
    task = Task.from_toml(text)
    plan = Planned(
        bytes(32), dimension, n_max, 2, groups, noise_plan(device_rate), 1e-4, [(rounds, 1.0)], [(rounds, 2.0)], 1.0,
        2.0, "by hand",
    )  # fmt: skip
    parameters = store.put_blob(np.zeros(dimension, "<f4").tobytes())
    memory = store.put_blob(pack_memory(task.optimizer.start(dimension)))
    bundle = store.put_blob(BUNDLE)
    with store.transaction() as t:
        t.add_task(TaskRow(name, text, plan.encode(), bundle, "running", 0, now_s))
        t.add_model(ModelRow(name, 0, parameters, memory, None, None, 1.0, expected, None, None, {}, now_s))


@dataclass
class SimDevice:
    """A device or helper: takes tickets, contributes known integers, serves on a committee."""

    identity: Identity
    tasks: Sequence[str] = ()
    serves: bool = True
    epoch: FleetEpoch | None = None
    enrolled: Enrolled | None = None
    in_roster: bool = False
    idle: dict[str, Idle] = field(default_factory=dict)
    sent: dict[str, tuple[Sent, Blob]] = field(default_factory=dict)
    member: MemberState = field(default_factory=MemberState)
    inputs: dict[bytes, NDArray[np.int64]] = field(default_factory=dict)
    """tid -> what it put in."""
    receipts: dict[bytes, bytes] = field(default_factory=dict)
    """tid -> hash of the header that the receipt names."""
    refusals: list[Refusal] = field(default_factory=list)
    letters: dict[bytes, Download] = field(default_factory=dict)
    tickets: set[bytes] = field(default_factory=set)
    """Of `letters`, those that are a Welcome's ticket."""
    serving: dict[bytes, Blob] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    asked_s: float = 0.0
    said_s: float = START_S
    is_welcome: bool = False
    offers: int = 12
    lie: Callable[[SimDevice, str, bytes], bytes] | None = None
    """Changes a member's reply: (device, kind, reply) -> reply."""
    entries: int = 0
    shown: Signed | None = None
    """The header that the last Welcome showed it as its own."""

    @property
    def name(self) -> str:
        return self.identity.public_key.hex()

    def hello(self, now_s: float) -> list[bytes]:
        """What it says when its link is up."""
        positions = [Position(task, self.idle[task].round if task in self.idle else -1) for task in self.tasks]
        epoch = self.epoch.number if self.epoch is not None else 0
        frames = [encode_frame(Hello(1, epoch, self.member.spare_prekeys, self.serves, positions))]
        self.asked_s, self.said_s, self.is_welcome = 0.0, now_s, False
        for download in self.letters.values():
            download.ask_again()
        if self.serves:
            while self.member.spare_prekeys < self.offers:
                number = self.member.next_serial
                prekey = derive_key(seed("prekey", self.name, number), "prekey", length=96)
                self.member, _ = member.offer_prekey(
                    self.member, self.identity, AUTHORITY.public_key, prekey, int(START_S + 1e6)
                )
            frames.append(encode_frame(Prekeys([self._offer(n) for n in sorted(self.member.prekeys)][:24])))
        return frames + self.tick(now_s)

    def _offer(self, serial: int) -> Signed:
        prekey = member.Prekey(self.member.prekeys[serial]).public
        return messages.sign(
            self.identity,
            messages.PrekeyOffer(
                AUTHORITY.public_key, self.identity.public_key, serial, prekey.x25519, prekey.mlkem, int(START_S + 1e6)
            ),
        )

    def tick(self, now_s: float) -> list[bytes]:
        """What it asks for again: to be heard until it is, and where things stand now and then."""
        if now_s - self.said_s >= (5.0 if self.is_welcome else 1.0):
            return self.hello(now_s)
        frames = []
        if now_s - self.asked_s >= 1.0:
            self.asked_s = now_s
            frames += [encode_frame(Upload(s.contribution.header, blob.ref)) for s, blob in self.sent.values()]
        for download in self.letters.values():
            pull = download.pull(now_s)
            if pull is not None:
                frames.append(encode_frame(pull))
        return frames

    def receive(self, data: bytes, now_s: float) -> list[bytes]:
        """The answers to one frame."""
        frame = decode_down(data)
        try:
            match frame:
                case Welcome():
                    return self._on_welcome(frame, now_s)
                case Letter():
                    if isinstance(frame.content, BlobRef):
                        self.letters.setdefault(frame.content.id, Download(frame.content))
                        return self.tick(now_s)
                    return self._on_letter(frame.content, now_s)
                case Pull():
                    return self._on_pull(frame)
                case Chunk():
                    return self._on_chunk(frame, now_s)
                case Refusal():
                    self._on_refusal(frame)
                case Gone():
                    self.letters.pop(frame.blob, None)
        except (PeerError, RoundAborted) as error:
            self.errors.append(str(error))
        return []

    def _on_welcome(self, welcome: Welcome, now_s: float) -> list[bytes]:
        self.is_welcome, self.shown = True, welcome.shown
        if isinstance(welcome.epoch, bytes):
            epoch = FleetEpoch(AUTHORITY.public_key, messages.decode(Signed, welcome.epoch))
            if self.epoch is None or epoch.number >= self.epoch.number:
                self.epoch = epoch
        self.in_roster = welcome.enrolment is not None
        if welcome.enrolment is not None:
            place = welcome.enrolment
            self.enrolled = Enrolled(self.identity, place.index, tuple(place.proof))
        frames = []
        for state in welcome.tasks:
            if isinstance(state.ticket, BlobRef):
                if state.ticket.id not in self.letters:
                    self.letters[state.ticket.id] = Download(state.ticket)
                self.tickets.add(state.ticket.id)
                frames += self.tick(now_s)
            elif state.ticket is not None:
                frames += self._on_ticket(messages.decode(Signed, state.ticket), now_s)
        return frames

    def _on_ticket(self, signed: Signed, now_s: float) -> list[bytes]:
        if self.epoch is None:
            return []
        round_ = Round(self.epoch, signed)
        if self.serves and any(entry.key == self.identity.public_key for entry in self.epoch.members):
            self._step(wrap(Ticket, signed), now_s)
        task = round_.ticket.task
        if task not in self.tasks or self.enrolled is None or not self.in_roster or task in self.sent:
            return []
        idle = self.idle.get(task, Idle(task))
        if round_.ticket.round <= idle.round:
            return []
        try:
            training = idle.on_ticket(round_, Terms(round_.ticket.bundle), now_s)
        except RoundAborted:
            return []
        stream = KeyStream(seed("input", self.name, round_.tid))
        values = stream.words16(round_.ticket.dimension).astype(np.int64) % 401 - 200
        self.entries += 1
        anchor = Anchor(self.entries, seed("ledger", self.name, self.entries))
        sent = training.contribute(
            values, self.enrolled, anchor, seed("secret", self.name, round_.tid), encapsulate, now_s
        )
        self.inputs[round_.tid] = values
        self.sent[task] = (sent, Blob.of(sent.contribution.masked + sent.contribution.shares))
        self.idle[task] = sent.give_up()
        self.asked_s = now_s
        return [encode_frame(Upload(sent.contribution.header, self.sent[task][1].ref))]

    def _on_letter(self, data: bytes, now_s: float) -> list[bytes]:
        kind, message = unwrap(data)
        if kind is Receipt and isinstance(message, Signed):
            for task, (sent, _) in list(self.sent.items()):
                try:
                    sent.on_receipt(message)
                except PeerError:
                    continue
                self.receipts[sent.round.tid] = message_hash(Header, sent.contribution.header.body)
                del self.sent[task]
            return []
        if kind is Abort and isinstance(message, Signed):
            for task, (sent, _) in list(self.sent.items()):
                try:
                    check_abort(sent.round, message)
                except PeerError:
                    continue
                del self.sent[task]
        return self._step(data, now_s)

    def _step(self, data: bytes, now_s: float) -> list[bytes]:
        if self.epoch is None or not self.serves:
            return []
        self.member, reply = member.step(self.member, data, self.epoch, self.identity, now_s)
        if reply is None:
            return []
        if self.lie is not None:
            reply = self.lie(self, messages.label_of(unwrap(reply)[0]), reply)
        parcel, blob = parcel_of(reply)
        if blob is not None:
            self.serving[blob.ref.id] = blob
        return [encode_frame(Letter(parcel))]

    def _on_pull(self, pull: Pull) -> list[bytes]:
        blobs = {blob.ref.id: blob for _, blob in self.sent.values()} | self.serving
        blob = blobs.get(pull.blob)
        if blob is None:
            return [encode_frame(Gone(pull.blob))]
        return [encode_frame(blob.chunk(index)) for index in pull.chunks]

    def _on_chunk(self, chunk: Chunk, now_s: float) -> list[bytes]:
        download = self.letters.get(chunk.blob)
        if download is None:
            return []
        download.add(chunk, now_s)
        if not download.complete:
            return self.tick(now_s)
        del self.letters[chunk.blob]
        if chunk.blob in self.tickets:
            return self._on_ticket(messages.decode(Signed, download.data()), now_s)
        return self._on_letter(download.data(), now_s)

    def _on_refusal(self, refusal: Refusal) -> None:
        self.refusals.append(refusal)
        for task, (sent, _) in list(self.sent.items()):
            if message_hash(Header, sent.contribution.header.body) == refusal.subject and refusal.final:
                del self.sent[task]


def make_devices(count: int, tasks: Sequence[str] = ("tiny",), serves: bool = False) -> list[SimDevice]:
    return [SimDevice(Identity(seed("device", n)), tasks, serves) for n in range(count)]


def make_helpers(count: int) -> list[SimDevice]:
    return [SimDevice(Identity(seed("helper", n))) for n in range(count)]


def enrol(
    store: Store, devices: Iterable[SimDevice], helpers: Iterable[SimDevice] = (), tags: Iterable[str] = ()
) -> None:
    with store.transaction() as t:
        for device in devices:
            t.add_device(device.identity.public_key, "device", tags, START_S)
        for helper in helpers:
            t.add_device(helper.identity.public_key, "helper", (), START_S)


@dataclass
class Clock:
    now_s: float = START_S

    def __call__(self) -> float:
        return self.now_s


def wait_for_opening(server: Server) -> None:
    """The worker needs real time, and the fleet's clock would run away meanwhile."""
    futures.wait([live.opening for live in server._live.values() if live.opening is not None])


class Fleet:
    """A server and its devices in one process over a MemoryHub."""

    def __init__(self, directory: Path, devices: Sequence[SimDevice], committee: str = "helpers", **server: object):
        self.directory, self.devices, self.committee = directory, list(devices), committee
        self.clock, self.hub = Clock(), MemoryHub()
        self.links: dict[str, MemoryTransport] = {}
        self.events: list[object] = []
        self.arguments = server
        self.server = self.start()

    def start(self) -> Server:
        return Server(
            Store(self.directory), self.hub, COORDINATOR, LocalAuthority(self.committee), clock=self.clock,
            entropy=os.urandom, on_event=self.events.append, **self.arguments,
        )  # fmt: skip

    def restart(self) -> None:
        """The server stops and starts on the same directory: what was in its memory is gone."""
        self.server.close()
        self.server = self.start()

    def connect(self, *devices: SimDevice) -> None:
        for device in devices or self.devices:
            self.links[device.name] = self.hub.connect(device.name)

    def leave(self, device: SimDevice) -> None:
        self.links.pop(device.name).send(encode_frame(Leaving()))

    def turn(self, seconds: float = 0.1) -> None:
        """The server handles what came, the devices what it sent, and time passes."""
        self.server.step(0.0)
        wait_for_opening(self.server)
        for device in self.devices:
            link = self.links.get(device.name)
            if link is None:
                continue
            frames = []
            while (item := link.receive(0.0)) is not None:
                if isinstance(item, Connected):
                    frames += device.hello(self.clock())
                elif not isinstance(item, Lost):
                    frames += device.receive(item, self.clock())
            for frame in frames + device.tick(self.clock()):
                link.send(frame)
        self.clock.now_s += seconds

    def run(self, until: Callable[[], bool], turns: int = 600, seconds: float = 0.1) -> None:
        """Turns until it holds. Raises AssertionError with what happened if it never does."""
        for _ in range(turns):
            if until():
                return
            self.turn(seconds)
        errors = {device.name[:8]: device.errors[-3:] for device in self.devices if device.errors}
        raise AssertionError(f"never happened; events {self.events[-8:]}; errors {errors}")

    def saw(self, kind: type, count: int = 1) -> Callable[[], bool]:
        return lambda: sum(isinstance(event, kind) for event in self.events) >= count

    def close(self) -> None:
        self.server.close()
        self.hub.close()


@dataclass
class Truth:
    """What a round's transcript says, held against what devices put in and were told."""

    task: str
    number: int
    tid: bytes
    phase: str
    included: list[set[int]]
    sums: list[bytes | None]
    senders: set[int]


def rounds_in(directory: Path, task: str = "tiny") -> list[Truth]:
    """The task's ended rounds, from the store."""
    found = []
    store = Store(directory)
    with store.reading() as t:
        for row in t.rounds(task):
            included: list[set[int]] = []
            sums: list[bytes | None] = []
            if row.transcript is not None and row.seal is not None:
                seal = messages.decode(Seal, messages.decode(Signed, row.seal).body)
                included = [{sender for sender, _ in group} for group in seal.groups]
                body = messages.decode(Signed, row.transcript).body
                sums = [result.sum for result in messages.decode(Transcript, body).groups]
            senders = {c.sender for c in t.contributions(row.tid)}
            found.append(Truth(row.task, row.number, row.tid, row.phase, included, sums, senders))
    store.close()
    return found


def assert_exact(
    truth: Truth, devices: Sequence[SimDevice], modulus_bits: int, left_out: set[int] = frozenset()
) -> None:
    """The opened sums are those of exactly the receipted contributions (but `left_out`), each counted once."""
    by_index = {device.enrolled.index: device for device in devices if device.enrolled is not None}
    receipted = {index for index, device in by_index.items() if truth.tid in device.receipts}
    assert truth.phase == "DONE", truth
    assert receipted <= truth.senders, "a receipt was lost"
    together = set().union(*truth.included)
    assert sum(map(len, truth.included)) == len(together), "a sender is in two groups"
    assert together == truth.senders - left_out, "the sealed set is not what was taken"
    for senders, opened in zip(truth.included, truth.sums, strict=True):
        if not senders:
            assert opened is None
            continue
        total = sum(by_index[sender].inputs[truth.tid] for sender in senders) % (1 << modulus_bits)
        assert opened == content_hash(total.astype("<u4").tobytes()), "the opened sum is another one"


# --- a server in a child process, that can be killed


class PipeHub:
    """A hub over a socket to the parent: (device, frame) both ways, and the parent's time with each turn."""

    def __init__(self, end: socket.socket, clock: Clock) -> None:
        self._end, self._clock = end, clock
        self.unsent_bytes = 0

    def send(self, device: str, frame: bytes) -> None:
        write(self._end, device, frame)

    def receive(self, timeout_s: float, room_bytes: int | None = None) -> list[Inbound | Connected | Lost]:
        batch: list[Inbound | Connected | Lost] = []
        while True:
            device, frame = read(self._end)
            if device == TURN:
                (self._clock.now_s,) = struct.unpack("<d", frame)
                return batch
            batch.append(Inbound(device, frame))

    def close(self) -> None:
        self._end.close()


TURN = "0" * 64
"""In place of a device: the parent gives the time and a turn, the child says that it is done."""


def write(end: socket.socket, device: str, frame: bytes) -> None:
    end.sendall(struct.pack("<I", len(frame)) + device.encode() + frame)


def read(end: socket.socket) -> tuple[str, bytes]:
    head = _exactly(end, 68)
    return head[4:].decode(), _exactly(end, struct.unpack("<I", head[:4])[0])


def _exactly(end: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = end.recv(count - len(data))
        if not part:
            raise TransportError("the other end is gone")
        data += part
    return bytes(data)


class KilledFleet:
    """A fleet whose server runs in a child process, and is started again on the same directory when it dies."""

    def __init__(
        self, directory: Path, devices: Sequence[SimDevice], committee: str = "helpers", memory: int = 1 << 24
    ):
        self.directory, self.devices, self.committee, self.memory = directory, list(devices), committee, memory
        self.clock = Clock()
        self.kills: list[tuple[str, int]] = []
        """(point, how often it is passed) at which the next children kill themselves."""
        self.deaths = 0
        self._pid, self._end = 0, None
        self._replies: dict[str, list[bytes]] = {}

    def start(self) -> None:
        parent, child = socket.socketpair()
        for end in (parent, child):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 << 20)
        kill = self.kills.pop(0) if self.kills else None
        self._pid = os.fork()
        if self._pid == 0:
            parent.close()
            self._serve(child, kill)
        child.close()
        self._end = parent
        self._replies.clear()
        for device in self.devices:
            self._send(device, device.hello(self.clock()))

    def _serve(self, end: socket.socket, kill: tuple[str, int] | None) -> None:
        left = dict([kill]) if kill else {}

        def passed(point: str) -> None:
            if point in left:
                left[point] -= 1
                if left[point] <= 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            clock = Clock(self.clock.now_s)
            server = Server(
                Store(self.directory), PipeHub(end, clock), COORDINATOR, LocalAuthority(self.committee), clock=clock,
                entropy=os.urandom, passed=passed, upload_memory=self.memory,
            )  # fmt: skip
            while True:
                server.step(0.0)
                wait_for_opening(server)
                write(end, TURN, b"")
        except TransportError:
            os._exit(0)
        except BaseException:  # noqa: BLE001  the parent asserts that no child ends by itself
            traceback.print_exc()
            os._exit(1)

    def _send(self, device: SimDevice, frames: Iterable[bytes]) -> None:
        for frame in frames:
            write(self._end, device.name, frame)

    def turn(self, seconds: float = 0.1) -> None:
        """Each device in turn says what it has to say, and the server handles it: many small batches."""
        by_name = {device.name: device for device in self.devices}
        for device in self.devices:
            try:
                self._send(device, self._replies.pop(device.name, []) + device.tick(self.clock()))
                write(self._end, TURN, struct.pack("<d", self.clock.now_s))
                while (message := read(self._end))[0] != TURN:
                    name, frame = message
                    self._replies.setdefault(name, []).extend(by_name[name].receive(frame, self.clock()))
            except (TransportError, OSError):
                self._bury()
                self.start()
            self.clock.now_s += seconds / len(self.devices)

    def kill(self) -> None:
        """A real SIGKILL, wherever the child is."""
        os.kill(self._pid, signal.SIGKILL)
        self._bury()
        self.start()

    def _bury(self) -> None:
        self._end.close()
        _, status = os.waitpid(self._pid, 0)
        assert os.WIFSIGNALED(status), f"the server ended by itself: {status}"
        self.deaths += 1

    def run(self, until: Callable[[], bool], turns: int = 600, seconds: float = 0.1) -> None:
        for _ in range(turns):
            if until():
                return
            self.turn(seconds)
        raise AssertionError(f"never happened; {self.deaths} deaths; {[d.errors[-2:] for d in self.devices]}")

    def stop(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        self._end.close()
        os.waitpid(self._pid, 0)


def published(directory: Path, task: str = "tiny") -> int:
    """The task's newest model, as another process sees it."""
    with closing(sqlite3.connect(f"file:{directory / DATABASE}?mode=ro", uri=True)) as connection:
        return connection.execute("SELECT max(number) FROM models WHERE task = ?", (task,)).fetchone()[0]
