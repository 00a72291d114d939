"""The process that device_footprint.py measures: a `Device` against files. Prints one JSON object.

With --steps a table of what is resident after each step of the rounds goes to stderr: in all, what of it is this
process's own ("own": RssAnon) and what the kernel can drop at will because it is on disk ("file": RssFile).
"""

from __future__ import annotations

import json
import os
import ssl
import sys
import time
import zipfile
from collections import deque
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

import edge_sdk.transport.mqtt  # noqa: F401  # a device has it loaded
from edge_sdk import contributing, events
from edge_sdk.bundle import SIGNATURE, Bundle
from edge_sdk.config import Config
from edge_sdk.crypto.hashing import content_hash
from edge_sdk.crypto.identity import KEY_BYTES, Identity
from edge_sdk.crypto.sealing import PREKEY_SEED_BYTES
from edge_sdk.device import Device
from edge_sdk.enrolment import Membership
from edge_sdk.ledger import create_ledger
from edge_sdk.privacy.mechanism import METRICS
from edge_sdk.protocol import authority, member
from edge_sdk.protocol.contributor import Training as ProtocolTraining
from edge_sdk.protocol.messages import Header, NoisePlan, Receipt, Signed, Ticket, Work, decode, encode, sign, wrap
from edge_sdk.protocol.messages import message_hash as hash_of
from edge_sdk.protocol.rounds import sign_ticket
from edge_sdk.store import Store
from edge_sdk.transport import Connected, Lost
from edge_sdk.transport.chunks import Blob, chunk_count
from edge_sdk.transport.wire import (
    MAX_PULL,
    Chunk,
    Down,
    Enrolment,
    Hello,
    Letter,
    Model,
    Pull,
    TaskState,
    Upload,
    Welcome,
    decode_up,
    encode_frame,
)

MB = 1_000_000
TASK, ROUNDS, EXAMPLES, RATE = "footprint", 3, 512, 0.25
LIFE_S = 86_400


POLICY = """\
protects = "{unit}"
min_honest = 2
min_noise_multiplier = 0.1
authorities = ["{authority}"]
operators = ["{operator}"]
publishers = ["{publisher}"]
[lifetime]
readers = {{epsilon = 100.0, delta = 1e-6}}
coordinator = {{epsilon = 100.0, delta = 1e-6}}
[tasks.{task}]
"""
"""With budgets that a few rounds of eight devices do not spend."""


def resident_mb(field: str) -> float:
    """A field of this process's /proc/self/status in kB, such as VmRSS, as MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return round(int(line.split()[1]) * 1024 / MB, 1)
    raise OSError(f"the kernel does not tell {field}")


def say_resident(step: str) -> None:
    """One line of the table."""
    total, own, file, peak = (resident_mb(field) for field in ("VmRSS", "RssAnon", "RssFile", "VmHWM"))
    sys.stderr.write(f"{step:24} {total:6.1f}  own {own:5.1f}  file {file:5.1f}  peak {peak:6.1f}\n")


def say_mappings(least_mb: float = 0.3) -> None:
    """What is resident, by what is mapped: the kernel's /proc/self/smaps, summed for each file."""
    found: dict[str, list[int]] = {}
    name = ""
    with Path("/proc/self/smaps").open() as lines:
        for line in lines:
            field, *rest = line.split()
            if not field.endswith(":"):  # a mapping: its addresses, and at the end perhaps its file
                name = rest[-1].rpartition("/")[2] if len(rest) == 5 else "[not named: Python's objects, large blocks]"
            elif field in ("Rss:", "Anonymous:"):
                found.setdefault(name, [0, 0])[field == "Anonymous:"] += int(rest[0]) * 1024
    for name, (total, own) in sorted(found.items(), key=lambda entry: -entry[1][0]):
        if total >= least_mb * MB:
            sys.stderr.write(f"    {name[:55]:56} {total / MB:5.1f}  own {own / MB:5.1f}\n")


def say_steps() -> None:
    """From here on every step of a round says what is resident after it, and the second one's training by what."""
    trained = 0

    def saying(step: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def stepped(*given: object, **named: object) -> object:
            nonlocal trained
            result = call(*given, **named)
            say_resident(step)
            trained += step == "trained"
            if step == "trained" and trained == 2:  # the first has not yet had what noise and mask leave
                say_mappings()
            return result

        return stepped

    parts: list[tuple[Any, str, str]] = [
        (contributing, "read_parameters", "graph loaded"),  # what is asked for next
        (contributing.Contributing, "_train", "trained"),
        (contributing.Contributing, "_run", "trainer freed"),
        (contributing, "encode", "encoded"),
        (ProtocolTraining, "contribute", "masked"),
        (Store, "save_contribution", "stored"),
    ]
    for owner, name, step in parts:
        setattr(owner, name, saying(step, getattr(owner, name)))


class Files:
    """A transport whose other end is a few files and two keys: it keeps nothing that a device would not."""

    def __init__(self, folder: Path, bundle: Path, identity: Identity) -> None:
        self.identity = identity
        self.authority, self.coordinator = Identity(bytes([1]) * 32), Identity(bytes([2]) * 32)
        helpers = [Identity(bytes([3 + i]) * 32) for i in range(3)]
        devices = [identity, *(Identity(bytes([10 + i]) * 32) for i in range(7))]
        self.roster = authority.Roster([device.public_key for device in devices])
        now_s = int(time.time())
        frozen = authority.freeze(
            self.authority, self.roster, coordinator=self.coordinator.public_key, corrupt_devices=1,
            committee="helpers", helpers=[helper.public_key for helper in helpers], expires_s=now_s + LIFE_S,
        )  # fmt: skip
        self.signed_epoch = authority.draw(self.authority, frozen, self.roster, bytes(32))
        self.epoch = authority.FleetEpoch(self.authority.public_key, self.signed_epoch)
        self.offers: list[Signed] = []
        by_key = {helper.public_key: helper for helper in helpers}
        for entry in self.epoch.members:
            _, offer = member.offer_prekey(
                member.MemberState(), by_key[entry.key], self.authority.public_key,
                os.urandom(PREKEY_SEED_BYTES), now_s + LIFE_S,
            )  # fmt: skip
            self.offers.append(offer)
        with zipfile.ZipFile(bundle) as archive:
            self.publisher = archive.read(SIGNATURE)[:KEY_BYTES]
        found = Bundle.read(bundle, self.publisher)
        self.manifest, self.bundle_hash = found.manifest, found.hash
        parameters = folder / "parameters"
        parameters.write_bytes(found.flatten(found.parameters()).astype("<f4").tobytes())
        self.parameters_hash = content_hash(parameters.read_bytes())
        self.blobs = [Blob.from_file(bundle), Blob.from_file(parameters)]
        self.ticket: Signed | None = None
        self.previous = authority.FIRST
        self.inbox: deque[bytes | Connected] = deque([Connected()])
        self.missing: dict[bytes, set[int]] = {}
        self.headers: dict[bytes, Signed] = {}

    def open(self, number: int) -> None:
        """The next round."""
        now_s = int(time.time())
        noise = NoisePlan(
            unit=self.manifest.unit, clip=1.0, granularity=1e-3, sigma=4000.0, metric_scale=0.1, loss_bound=5.0,
            device_rate=1.0, example_rate=RATE if self.manifest.unit == "example" else 1.0,
        )  # fmt: skip
        local = self.manifest.unit == "device"
        round_ = sign_ticket(
            self.coordinator,
            self.epoch,
            Ticket(
                version=1, epoch=self.epoch.id, task=TASK, round=number, previous=self.previous,
                bundle=self.bundle_hash, parameters=self.parameters_hash, dimension=self.manifest.dimension + METRICS,
                n_max=8, honest=5, groups=1, noise=noise,
                work=Work(0.1 if local else 0.0, int(local), 0, 0.0, 0), prekeys=self.offers,
                closes_s=now_s + 600, expires_s=now_s + 1200,
            ),
        )  # fmt: skip
        self.previous, self.ticket = round_.tid, round_.signed

    def send(self, frame: bytes) -> None:
        match decode_up(frame):
            case Hello():
                self._say(self.welcome())
            case Pull(blob=blob, chunks=chunks):
                (served,) = (candidate for candidate in self.blobs if candidate.ref.id == blob)
                for index in chunks:
                    self._say(served.chunk(index))
            case Upload(header=header, blob=ref):
                self.missing[ref.id], self.headers[ref.id] = set(range(chunk_count(ref.size))), header
                self._pull(ref.id)
            case Chunk(blob=blob, index=index):
                self.missing[blob].discard(index)
                if not self.missing[blob]:
                    self._receipt(self.headers[blob])
                elif index % MAX_PULL == MAX_PULL - 1:
                    self._pull(blob)
            case _:
                pass

    def welcome(self) -> Welcome:
        """How things stand."""
        index, proof = self.roster.enrolment(self.identity.public_key)
        model = sign(self.coordinator, Model(TASK, 0, self.bundle_hash, self.parameters_hash))
        state = TaskState(
            encode(model), self.blobs[0].ref, self.blobs[1].ref, None if self.ticket is None else encode(self.ticket)
        )
        return Welcome(int(time.time()), encode(self.signed_epoch), Enrolment(index, list(proof)), [state])

    def _pull(self, blob: bytes) -> None:
        self._say(Pull(blob, sorted(self.missing[blob])[:MAX_PULL]))

    def _receipt(self, signed: Signed) -> None:
        header = decode(Header, signed.body)
        receipt = Receipt(header.tid, header.sender, hash_of(Header, signed.body))
        self._say(Letter(wrap(Receipt, sign(self.coordinator, receipt))))

    def _say(self, frame: Down) -> None:
        self.inbox.append(encode_frame(frame))

    def receive(self, timeout_s: float) -> bytes | Connected | Lost | None:
        if self.inbox:
            return self.inbox.popleft()
        time.sleep(min(timeout_s, 0.01))
        return None

    def close(self) -> None:
        """Nothing to close."""


def main(bundle: Path, folder: Path, *, steps: bool) -> None:
    if steps:
        say_resident("imported")
        say_steps()
    folder.mkdir(mode=0o700)
    seed = os.urandom(32)
    (folder / "identity.key").write_bytes(seed)
    identity = Identity(seed)
    world = Files(folder, bundle, identity)
    membership = Membership(
        version=1, fleet="footprint", role="device", device=identity.public_key.hex(),
        authority=world.authority.public_key.hex(), coordinator=world.coordinator.public_key.hex(),
        publishers=(world.publisher.hex(),), broker="mqtts://localhost", enrolment="https://localhost", ca="00" * 32,
    )  # fmt: skip
    (folder / "enrolment.json").write_bytes(msgspec.json.encode(membership))
    policy = POLICY.format(
        unit=world.manifest.unit, authority=world.authority.public_key.hex(),
        operator=world.coordinator.public_key.hex(), publisher=world.publisher.hex(), task=TASK,
    )  # fmt: skip
    (folder / "policy.toml").write_text(policy)
    create_ledger(folder / "ledger", identity.public_key)
    ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # a device has one, with its fleet's CA and no other
    manifest, samples = world.manifest, np.arange(EXAMPLES)
    inputs = [np.zeros((EXAMPLES, *t.shape), dtype=t.dtype) for t in manifest.inputs]
    for array in inputs:
        array.reshape(EXAMPLES, -1)[:, 0] = samples % 7
    labels = (samples % (manifest.label.below or 2)).astype(manifest.label.dtype)
    found: dict[str, object] = {}
    rounds = iter(range(ROUNDS))
    started_s = 0.0
    times: list[float] = []

    def on_event(event: events.Event) -> None:
        nonlocal started_s
        if steps and isinstance(event, events.Updated | events.Training | events.Delivered):
            say_resident(type(event).__name__.lower())
        if isinstance(event, events.Updated):
            found["rss_idle_mb"] = resident_mb("VmRSS")  # online, with the model on disk, and nothing to do
        if isinstance(event, events.Training):
            started_s = time.perf_counter()
        if isinstance(event, events.Contributed):
            times.append(time.perf_counter() - started_s)
        if isinstance(event, events.Updated | events.Delivered):
            number = next(rounds, None)
            if number is None:
                found["rss_after_mb"] = resident_mb("VmRSS")
                found["own_after_mb"] = resident_mb("RssAnon")
                device.stop()
            else:
                world.open(number)
                world.inbox.append(encode_frame(world.welcome()))

    if steps:
        say_resident("other end and examples")
    device = Device(folder, Config(), on_event=on_event, connect=lambda: world)
    device.register(TASK, (inputs, labels))
    device.run()
    found |= {
        "model": manifest.name, "parameters": manifest.dimension, "batch": manifest.batch,
        "examples": EXAMPLES, "rounds": len(times), "round_s": round(min(times), 3),
        "rss_training_mb": resident_mb("VmHWM"),
    }  # fmt: skip
    print(json.dumps(found))


def run(arguments: list[str]) -> None:
    """What device_footprint.py starts. arguments: the bundle, a directory to make, and perhaps --steps."""
    bundle, folder, *options = arguments
    main(Path(bundle), Path(folder), steps="--steps" in options)
