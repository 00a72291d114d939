"""A coordinator on the protocol's own code, turned by the tests: a round at a time, a hub in memory, a clock of theirs.

`World` has the keys of everybody but the device under test. It answers hellos, serves blobs, pulls uploads, takes
contributions and gives receipts, as far as a test lets it (`mute`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
from training import tiny_models as tiny

from edge_sdk.bundle import Bundle, write_bundle
from edge_sdk.clock import Clock
from edge_sdk.config import Config
from edge_sdk.crypto.hashing import content_hash, derive_key
from edge_sdk.crypto.identity import Identity
from edge_sdk.crypto.sealing import PREKEY_SEED_BYTES, encapsulate
from edge_sdk.device import Device
from edge_sdk.enrolment import Membership
from edge_sdk.errors import RoundAborted, SordinoError
from edge_sdk.ledger import create_ledger
from edge_sdk.privacy.mechanism import METRICS
from edge_sdk.protocol import aggregator, authority, member
from edge_sdk.protocol.contributor import Contribution, Enrolled, Idle, Terms
from edge_sdk.protocol.messages import (
    Certificate,
    Delivery,
    Header,
    NoisePlan,
    PrekeyOffer,
    Seal,
    Signed,
    Ticket,
    Work,
    decode,
    encode,
    message_hash,
    sign,
    unwrap,
    verify,
    wrap,
)
from edge_sdk.protocol.reference import stand_in_ledger
from edge_sdk.protocol.rounds import Round, sign_ticket, split_shares
from edge_sdk.transport import Connected, Inbound, Lost
from edge_sdk.transport.chunks import Blob, Download
from edge_sdk.transport.memory import MemoryHub, MemoryTransport
from edge_sdk.transport.wire import (
    Chunk,
    Down,
    Enrolment,
    Gone,
    Hello,
    Leaving,
    Letter,
    Model,
    Prekeys,
    Pull,
    TaskState,
    Up,
    Upload,
    Welcome,
    decode_up,
    encode_frame,
)

TASK = "tiny"
START_S = 1_700_000_000.0
OPEN_S, EXPIRES_S, EPOCH_S = 1_000, 2_000, 10_000_000
EXAMPLES = tiny.examples(24)


def seed(*parts: object) -> bytes:
    return derive_key(bytes(32), "scripted", *(repr(part).encode() for part in parts))


class FakeTime:
    """Both clocks of a device. Time passes only while it waits, or when a test says so."""

    def __init__(self) -> None:
        self.now_s = START_S

    @property
    def clock(self) -> Clock:
        return Clock(lambda: self.now_s, lambda: self.now_s - START_S)


class Turning:
    """A device's transport that lets the coordinator have its turn whenever the device looks."""

    def __init__(self, world: World, inner: MemoryTransport) -> None:
        self._world, self._inner = world, inner
        self.sent: list[bytes] = []

    def send(self, frame: bytes) -> None:
        self._world.before_send(frame)
        self.sent.append(frame)
        self._inner.send(frame)

    def receive(self, timeout_s: float) -> bytes | Connected | Lost | None:
        self._world.turn()
        item = self._inner.receive(0.0)
        if item is None:
            self._world.time.now_s += max(timeout_s, 1e-3)
        return item

    def close(self) -> None:
        self._inner.close()


POLICY = """\
protects = "{protects}"
min_honest = {min_honest}
min_noise_multiplier = {min_noise}
max_device_rate = {max_device_rate}
authorities = ["{authority}"]
operators = ["{operator}"]
publishers = ["{publisher}"]

[lifetime]
readers = {{epsilon = {epsilon}, delta = 1e-6}}
coordinator = {{epsilon = {epsilon}, delta = 1e-6}}

[tasks.{task}]
"""


@dataclass
class World:
    """Everybody but the device. committee: "helpers" (three, played here), or "everyone" with the device in it."""

    path: Path
    committee: str = "helpers"
    unit: str = "example"
    devices: int = 4
    noise: dict[str, object] = field(default_factory=dict)
    work: dict[str, object] = field(default_factory=dict)
    mute: set[type] = field(default_factory=set)
    """Kinds of frames from devices that are not answered."""
    receipts: bool = True
    real: frozenset[bytes] = frozenset()
    """Committee members that are not played here, by key."""
    before_send: Callable[[bytes], None] = lambda frame: None
    shown: Signed | None = None
    """The header that a Welcome shows its device as its own."""

    def __post_init__(self) -> None:
        self.time = FakeTime()
        self.hub = MemoryHub()
        self.authority, self.coordinator = Identity(seed("authority")), Identity(seed("coordinator"))
        self.identities = [Identity(seed("device", i)) for i in range(self.devices)]
        self.helpers = [Identity(seed("helper", i)) for i in range(3)] if self.committee == "helpers" else []
        self.blobs: dict[bytes, Blob] = {}
        self.heard: list[tuple[str, Up]] = []
        self.letters: list[tuple[str, bytes]] = []
        self.offers: dict[bytes, dict[int, Signed]] = {}
        self.uploads: dict[bytes, tuple[str, Upload, Download]] = {}
        self.taken: dict[bytes, Contribution] = {}
        self.faults: list[str] = []
        self.sent_bytes = 0
        self.turning, self.turns = False, 0
        manifest = tiny.draft(self.unit, proximal=self.unit == "device")
        self.bundle_bytes = write_bundle(
            manifest, tiny.graphs(manifest), tiny.initial_parameters(manifest), tiny.PUBLISHER
        )
        self.bundle = Bundle.read(self.bundle_bytes, tiny.PUBLISHER.public_key)
        self.parameters = self.bundle.flatten(self.bundle.parameters())
        self.roster = authority.Roster([identity.public_key for identity in self.identities])
        self.tickets: dict[str, Signed] = {}
        self.previous = authority.FIRST
        self.rounds: dict[bytes, aggregator.State] = {}
        self.new_epoch(1)
        known = {identity.public_key: identity for identity in (*self.identities, *self.helpers)}
        self.played = [known[entry.key] for entry in self.epoch.members if entry.key not in self.real]
        self.members = {identity.public_key: member.MemberState() for identity in self.played}
        self.model_round = 0

    # Set-up.

    def new_epoch(self, number: int) -> None:
        frozen = authority.freeze(
            self.authority,
            self.roster,
            coordinator=self.coordinator.public_key,
            corrupt_devices=1,
            committee=self.committee,  # type: ignore[arg-type]
            helpers=[helper.public_key for helper in self.helpers],
            expires_s=int(START_S) + EPOCH_S,
            number=number,
        )
        self.signed_epoch = authority.draw(self.authority, frozen, self.roster, seed("beacon", number))
        self.epoch = authority.FleetEpoch(self.authority.public_key, self.signed_epoch)

    def directory(self, number: int = 0, role: str = "device", **policy: object) -> Path:
        """A device's directory as `join` leaves it, without TLS."""
        identity = self.identities[number] if role == "device" else self.helpers[number]
        path = self.path / f"{role}{number}"
        path.mkdir(mode=0o700)
        (path / "identity.key").write_bytes(seed(role, number))
        membership = Membership(
            version=1,
            fleet="scripted",
            role=role,  # type: ignore[arg-type]
            device=identity.public_key.hex(),
            authority=self.authority.public_key.hex(),
            coordinator=self.coordinator.public_key.hex(),
            publishers=(tiny.PUBLISHER.public_key.hex(),),
            broker="mqtts://localhost:8883",
            enrolment="https://localhost:8443",
            ca="00" * 32,
        )
        (path / "enrolment.json").write_bytes(msgspec.json.encode(membership))
        self.write_policy(path, **policy)
        create_ledger(path / "ledger", identity.public_key)
        return path

    def write_policy(self, path: Path, **changes: object) -> None:
        values = {
            "protects": self.unit, "min_honest": 2, "min_noise": 0.1, "max_device_rate": 1.0, "epsilon": 50.0,
            "authority": self.authority.public_key.hex(), "operator": self.coordinator.public_key.hex(),
            "publisher": tiny.PUBLISHER.public_key.hex(), "task": TASK,
        }  # fmt: skip
        (path / "policy.toml").write_text(POLICY.format(**{**values, **changes}))

    def connect(self, identity: Identity) -> Turning:
        return Turning(self, self.hub.connect(identity.public_key.hex()))

    def device(self, path: Path, number: int = 0, examples: object = EXAMPLES, **given) -> Device:
        """A device over this world's hub. given: of Device."""
        identity = Identity((path / "identity.key").read_bytes())
        given = {"connect": lambda: self.connect(identity), "clock": self.time.clock, "config": Config(), **given}
        device = Device(path, **given)
        if examples is not None:
            device.register(TASK, examples)
        return device

    # Rounds.

    def ticket(self, number: int = 0, *, to_helpers: bool = True, **changes: object) -> Round:
        """Open a round: every member's newest offer, the model as it stands."""
        noise = {
            "unit": self.unit, "clip": 1.0, "granularity": 1e-3, "sigma": 3000.0, "metric_scale": 0.1,
            "loss_bound": 5.0,
            "device_rate": 1.0, "example_rate": 0.5 if self.unit == "example" else 1.0,
        }  # fmt: skip
        work = {"learning_rate": 0.0, "epochs": 0, "steps": 0, "proximal": 0.0, "weight_cap": 0}
        if self.unit == "device":
            work |= {"learning_rate": 0.1, "epochs": 2, "proximal": 0.5}
        plan = NoisePlan(**{**noise, **self.noise})
        fields = {
            "version": 1, "epoch": self.epoch.id, "task": TASK, "round": number, "previous": self.previous,
            "bundle": self.bundle.hash, "parameters": content_hash(self.parameters.astype("<f4").tobytes()),
            "dimension": self.bundle.dimension + (METRICS if plan.metric_scale else 0), "n_max": self.devices,
            "honest": 2, "groups": 1, "noise": plan, "work": Work(**{**work, **self.work}),
            "prekeys": [self._offer(entry.key) for entry in self.epoch.members],
            "closes_s": int(self.time.now_s) + OPEN_S, "expires_s": int(self.time.now_s) + EXPIRES_S,
        }  # fmt: skip
        round_ = sign_ticket(self.coordinator, self.epoch, Ticket(**{**fields, **changes}))
        self.previous = round_.tid
        self.tickets[TASK] = round_.signed
        self.rounds[round_.tid] = aggregator.Collecting(round_)
        for identity in self.played if to_helpers else ():
            self.tell(identity, wrap(Ticket, round_.signed))
        return round_

    def _offer(self, key: bytes) -> Signed:
        player = next((identity for identity in self.played if identity.public_key == key), None)
        if player is not None:
            fresh = derive_key(seed("prekey", self.members[key].next_serial), "x", key, length=PREKEY_SEED_BYTES)
            expires_s = int(START_S) + EPOCH_S
            self.members[key], offer = member.offer_prekey(
                self.members[key], player, self.authority.public_key, fresh, expires_s
            )
            return offer
        offers = self.offers[key]
        return offers.pop(min(offers))

    def tell(self, player: Identity, data: bytes) -> bytes | None:
        key = player.public_key
        self.members[key], reply = member.step(self.members[key], data, self.epoch, player, self.time.now_s)
        return reply

    def finish(self, round_: Round) -> aggregator.State:
        """Seal, certify, release and open with the members that are played here."""
        for identity in self.played:
            self.tell(identity, self.delivery_to(identity.public_key, round_))
        self.seal(round_)
        self.certify(round_)
        return self.open(round_)

    def seal(self, round_: Round) -> bytes:
        """Fix the set and have the played members sign it. Returns the seal as it goes to others."""
        state = aggregator.seal(self.rounds[round_.tid], self.coordinator, now_s=round_.ticket.closes_s)
        self.rounds[round_.tid] = state
        for identity in self.played:
            self.answer(round_, self.tell(identity, wrap(Seal, state.seal)))
        return wrap(Seal, state.seal)

    def certify(self, round_: Round) -> bytes:
        """Show the certificate to the played members. Returns it as it goes to others."""
        data = wrap(Certificate, self.rounds[round_.tid].certificate)
        for identity in self.played:
            self.answer(round_, self.tell(identity, data))
        return data

    def answer(self, round_: Round, reply: bytes | None) -> None:
        """Take a member's reply."""
        self.rounds[round_.tid] = aggregator.step(self.rounds[round_.tid], reply or b"")

    def open(self, round_: Round) -> aggregator.State:
        state = self.rounds[round_.tid]
        sums = {
            group: aggregator.sum_masked(round_, (self.by_sender[sender].masked for sender in senders))
            for group, senders in enumerate(state.groups)
        }
        self.rounds[round_.tid] = aggregator.open_round(state, sums, self.coordinator, final=True)
        return self.rounds[round_.tid]

    def delivery_to(self, key: bytes, round_: Round) -> bytes:
        """All contributions of the round, for one member."""
        number = self.epoch.member_number(key)
        items = [
            (c.header, split_shares(round_, decode(Header, c.header.body), c.shares)[number - 1])
            for c in self.taken.values()
        ]
        return wrap(Delivery, Delivery(round_.tid, items))

    def contribute_as(self, round_: Round, number: int, integers: np.ndarray) -> None:
        """A contribution of a device that is played here."""
        identity = self.identities[number]
        index, proof = self.roster.enrolment(identity.public_key)
        training = Idle(TASK).on_ticket(round_, Terms(round_.ticket.bundle), self.time.now_s)
        sent = training.contribute(
            integers, Enrolled(identity, index, proof), stand_in_ledger(identity.public_key, round_.ticket.round),
            seed("entropy", number, round_.tid), encapsulate, self.time.now_s,
        )  # fmt: skip
        self._accept(identity.public_key, sent.contribution)

    @property
    def by_sender(self) -> dict[int, Contribution]:
        return {decode(Header, c.header.body).sender: c for c in self.taken.values()}

    # Frames.

    def send(self, key: bytes, frame: Down) -> None:
        self.hub.send(key.hex(), encode_frame(frame))

    def serve(self, data: bytes):
        blob = Blob.of(data)
        self.blobs[blob.ref.id] = blob
        return blob.ref

    def state_of(self, task: str = TASK, **changes: object) -> TaskState:
        """What a Welcome says of the task."""
        parameters = self.parameters.astype("<f4").tobytes()
        model = Model(task, self.model_round, self.bundle.hash, content_hash(parameters))
        ticket = self.tickets.get(task)
        fields = {
            "model": encode(sign(self.coordinator, model)), "bundle": self.serve(self.bundle_bytes),
            "parameters": self.serve(parameters), "ticket": None if ticket is None else encode(ticket),
        }  # fmt: skip
        return TaskState(**{**fields, **changes})

    def welcome(self, key: bytes, **changes: object) -> Welcome:
        enrolment = None
        if key in self.roster.keys:
            index, proof = self.roster.enrolment(key)
            enrolment = Enrolment(index, list(proof))
        fields = {
            "time_s": int(self.time.now_s), "epoch": encode(self.signed_epoch), "enrolment": enrolment,
            "tasks": [self.state_of()], "shown": self.shown,
        }  # fmt: skip
        return Welcome(**{**fields, **changes})

    def turn(self) -> None:
        """Handle everything that devices sent."""
        if self.turning:
            return
        self.turns += 1
        assert self.turns < 50_000, "a test that does not end"
        self.turning = True
        try:
            while True:
                batch = self.hub.receive(0.0)
                if not batch:
                    break
                for item in batch:
                    if isinstance(item, Inbound):
                        frame = decode_up(item.frame)
                        self.heard.append((item.device, frame))
                        if type(frame) not in self.mute:
                            self._handle(bytes.fromhex(item.device), frame)
        finally:
            self.turning = False

    def _handle(self, key: bytes, frame: Up) -> None:
        match frame:
            case Hello():
                self.send(key, self.welcome(key))
            case Pull():
                blob = self.blobs.get(frame.blob)
                for index in frame.chunks if blob is not None else ():
                    self.send(key, blob.chunk(index))
                if blob is None:
                    self.send(key, Gone(frame.blob))
            case Prekeys():
                for signed in frame.offers:
                    offer = verify(PrekeyOffer, key, signed)
                    self.offers.setdefault(key, {})[offer.serial] = signed
            case Upload():
                self._on_upload(key, frame)
            case Chunk():
                self._on_chunk(key, frame)
            case Letter():
                assert isinstance(frame.content, bytes)
                self.letters.append((key.hex(), frame.content))
            case Gone() | Leaving():
                pass

    def _on_upload(self, key: bytes, frame: Upload) -> None:
        digest = message_hash(Header, frame.header.body)
        if digest in self.taken:
            self._accept(key, self.taken[digest])
            return
        download = Download(frame.blob)
        self.uploads[frame.blob.id] = (key.hex(), frame, download)
        self._pull(key, download)

    def _pull(self, key: bytes, download: Download) -> None:
        pull = download.pull(self.time.now_s)
        if pull is not None:
            self.send(key, pull)

    def _on_chunk(self, key: bytes, frame: Chunk) -> None:
        _, upload, download = self.uploads[frame.blob]
        self.sent_bytes += len(frame.data)
        download.add(frame, self.time.now_s)
        if not download.complete:
            self._pull(key, download)
            return
        header = decode(Header, upload.header.body)
        data = download.data()
        masked = self.rounds[header.tid].round.layout.masked_bytes
        self._accept(key, Contribution(upload.header, data[:masked], data[masked:]))

    def _accept(self, key: bytes, contribution: Contribution) -> None:
        header = decode(Header, contribution.header.body)
        try:
            accepted = aggregator.accept(self.rounds[header.tid], contribution, self.coordinator, self.time.now_s)
        except (SordinoError, RoundAborted) as error:
            self.faults.append(str(error))
            return
        self.rounds[header.tid] = accepted.state
        self.taken[message_hash(Header, contribution.header.body)] = contribution
        if self.receipts:
            self.send(key, Letter(accepted.receipt))

    def heard_of(self, kind: type) -> list:
        return [frame for _, frame in self.heard if isinstance(frame, kind)]

    def letters_of(self, kind: type) -> list[Signed]:
        found: Iterable = (unwrap(data) for _, data in self.letters)
        return [message for of, message in found if of is kind]
