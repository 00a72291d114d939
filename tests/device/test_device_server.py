"""Real devices against the real coordinator: everybody contributes, and everybody is the committee."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent.parent / "coordinator"))

from fleet import AUTHORITY, COORDINATOR, LocalAuthority, rounds_in
from scripted import POLICY, TASK, seed
from training import tiny_models as tiny

from coordinator.events import ModelPublished
from coordinator.optimizer import pack_memory
from coordinator.prekeys import held, keeping, new_offers
from coordinator.rows import ModelRow, TaskRow
from coordinator.server import Server
from coordinator.store import Store
from coordinator.task import Planned, Task
from edge_sdk import contributing, events
from edge_sdk.bundle import Bundle, write_bundle
from edge_sdk.checkup import ledger_summary
from edge_sdk.config import Config
from edge_sdk.crypto.hashing import content_hash
from edge_sdk.crypto.identity import Identity
from edge_sdk.device import Device
from edge_sdk.enrolment import Membership
from edge_sdk.ledger import create_ledger
from edge_sdk.privacy.mechanism import METRICS
from edge_sdk.protocol.member import MemberState
from edge_sdk.protocol.messages import NoisePlan
from edge_sdk.protocol.plan import delta_bits
from edge_sdk.serving import SPARE_PREKEYS, Serving
from edge_sdk.transport.memory import MemoryHub, chance
from edge_sdk.transport.wire import HeldPrekeys

DEVICES, ROUNDS = 4, 2

TASK_TOML = """
name = "tiny"
bundle = "tiny.bundle"
publisher = "{publisher}"
unit = "example"
rounds = {rounds}

[privacy]
clip = 1.0
delta = 1e-4
noise_multiplier = 3
example_rate = 0.5
metric_scale = 0.1
loss_bound = 5.0

[cohort]
expected = 4
spread = 0
honest = 2
n_max = 4
examples = 24

[optimizer]
kind = "fedavg"

[schedule]
open_s = 60
grace_s = 0.3
answer_s = 120
"""


def directory_of(base: Path, number: int) -> Path:
    path = base / f"device{number}"
    path.mkdir(mode=0o700)
    identity = Identity(seed("device", number))
    (path / "identity.key").write_bytes(seed("device", number))
    publisher = tiny.PUBLISHER.public_key.hex()
    membership = Membership(
        version=1, fleet="real", role="device", device=identity.public_key.hex(),
        authority=AUTHORITY.public_key.hex(), coordinator=COORDINATOR.public_key.hex(), publishers=(publisher,),
        broker="mqtts://localhost", enrolment="https://localhost", ca="00" * 32,
    )  # fmt: skip
    (path / "enrolment.json").write_bytes(msgspec.json.encode(membership))
    values = {
        "protects": "example", "min_honest": 2, "min_noise": 0.1, "max_device_rate": 1.0, "epsilon": 50.0, "task": TASK,
        "authority": AUTHORITY.public_key.hex(), "operator": COORDINATOR.public_key.hex(), "publisher": publisher,
    }  # fmt: skip
    (path / "policy.toml").write_text(POLICY.format(**values))
    create_ledger(path / "ledger", identity.public_key)
    return path


@pytest.mark.parametrize("twice", [0.0, 0.3])
def test_rounds_open_with_every_devices_update_in_them(tmp_path, monkeypatch, twice):
    """twice: share of frames that arrive two times."""
    recorded: dict[bytes, list[np.ndarray]] = {}
    inner = contributing.encode

    def recording(mechanism, vector, metrics, tid, entropy):
        integers = inner(mechanism, vector, metrics, tid, entropy)
        recorded.setdefault(tid, []).append(integers.astype(np.uint64))
        return integers

    monkeypatch.setattr(contributing, "encode", recording)
    manifest = tiny.draft("example")
    content = write_bundle(manifest, tiny.graphs(manifest), tiny.initial_parameters(manifest), tiny.PUBLISHER)
    bundle = Bundle.read(content, tiny.PUBLISHER.public_key)
    initial = bundle.flatten(bundle.parameters())
    plan = NoisePlan("example", 1.0, 1e-3, 3000.0, 0.1, 5.0, 1.0, 0.5)

    home = tmp_path / "coordinator"
    store = Store(home)
    text = TASK_TOML.format(publisher=tiny.PUBLISHER.public_key.hex(), rounds=ROUNDS)
    task = Task.from_toml(text)
    planned = Planned(
        bundle.hash, bundle.dimension + METRICS, DEVICES, 2, 1, plan, 1e-4, [(ROUNDS, 1.0)], [(ROUNDS, 2.0)], 1.0, 2.0,
        "by hand",
    )  # fmt: skip
    now_s = time.time()
    with store.transaction() as t:
        for number in range(DEVICES):
            t.add_device(Identity(seed("device", number)).public_key, "device", (), now_s)
    parameters = store.put_blob(initial.astype("<f4").tobytes())
    memory = store.put_blob(pack_memory(task.optimizer.start(bundle.dimension)))
    kept = store.put_blob(content)
    with store.transaction() as t:
        t.add_task(TaskRow(TASK, text, planned.encode(), kept, "running", 0, now_s))
        t.add_model(ModelRow(TASK, 0, parameters, memory, None, None, 1.0, 4, None, None, {}, now_s))

    hub = MemoryHub(chance(bytes(32), duplicate=twice))
    published = []
    server = Server(
        store, hub, COORDINATOR, LocalAuthority("everyone"), clock=time.time, entropy=os.urandom,
        on_event=lambda event: published.append(event) if isinstance(event, ModelPublished) else None,
    )  # fmt: skip
    heard: list[list[events.Event]] = [[] for _ in range(DEVICES)]
    devices = []
    for number in range(DEVICES):
        path = directory_of(tmp_path, number)
        name = Identity(seed("device", number)).public_key.hex()
        device = Device(path, Config(), on_event=heard[number].append, connect=lambda name=name: hub.connect(name))
        device.register(TASK, tiny.examples(24, seed=number))
        devices.append(device)
    threads = [threading.Thread(target=device.run) for device in devices]
    for thread in threads:
        thread.start()
    ends_s = time.monotonic() + 60
    try:
        while len(published) < ROUNDS and time.monotonic() < ends_s:
            server.step(0.02)
    finally:
        for device in devices:
            device.stop()
        for thread in threads:
            thread.join()
        server.close()
        hub.close()
    assert len(published) == ROUNDS, heard
    for number, seen in enumerate(heard):
        delivered = [event.round for event in seen if isinstance(event, events.Delivered)]
        assert delivered == list(range(ROUNDS)), seen
        what = {event.what for event in seen if isinstance(event, events.Answered)}
        assert {"joined", "inspected", "signed"} <= what
        assert ledger_summary(tmp_path / f"device{number}").lifetime.rounds_sent == ROUNDS
    ended = rounds_in(home, TASK)
    assert len(ended) == ROUNDS
    for truth in ended:
        assert truth.phase == "DONE"
        assert len(truth.senders) == len(recorded[truth.tid]) == DEVICES
        total = sum(recorded[truth.tid]) % (1 << (32 - delta_bits(DEVICES)))
        assert truth.sums == [content_hash(total.astype("<u4").tobytes())]


@pytest.fixture
def member(tmp_path):
    """A member, what the coordinator keeps of it, and both ends of an exchange of prekeys."""
    identity = Identity(seed("device", 0))
    store, key, fleet = Store(tmp_path / "store"), identity.public_key, AUTHORITY.public_key
    stored = SimpleNamespace(member=MemberState, save_member=lambda before, after: None)
    serving = Serving(identity, fleet, stored, os.urandom)

    def offer():
        with store.reading() as t:
            fresh = new_offers(t, fleet, key, serving.offers(1.0).values(), 1.0)
        with store.transaction() as t:
            keeping(key, fresh, 1.0)(t)
        return sorted(fresh)

    def use(count):
        with store.transaction() as t:
            for _ in range(count):
                t.use_prekey(key, t.next_prekey(key, 1.0)[0], os.urandom(32))

    def tell():
        with store.reading() as t:
            serving.told(held(t, key, 1.0))

    yield SimpleNamespace(serving=serving, offer=offer, use=use, tell=tell)
    store.close()


def test_a_member_that_missed_as_many_tickets_as_it_has_prekeys_is_told_and_offers_new_ones(member):
    assert member.offer() == list(range(SPARE_PREKEYS))
    member.use(SPARE_PREKEYS)
    assert member.offer() == []  # it saw none of these tickets
    member.tell()
    assert member.serving.spare_prekeys == 0
    assert member.offer() == list(range(SPARE_PREKEYS, 2 * SPARE_PREKEYS))
    member.use(10)
    member.tell()
    assert len(member.offer()) == 10
    member.tell()
    assert (member.offer(), member.serving.spare_prekeys) == ([], SPARE_PREKEYS)
    assert set(range(SPARE_PREKEYS)) <= set(member.serving.state.prekeys)  # their tickets may yet come


def test_an_offer_that_is_on_its_way_is_not_taken_for_used(member):
    member.offer()
    member.serving.told(HeldPrekeys(9, list(range(5, 10))))  # said before the later ones arrived
    assert member.serving.spare_prekeys == SPARE_PREKEYS - 5


def test_a_coordinator_that_says_all_are_used_makes_a_member_keep_no_more_than_its_bound(member, monkeypatch):
    monkeypatch.setattr("edge_sdk.serving.MAX_PREKEYS", 3 * SPARE_PREKEYS)
    for _ in range(10):
        member.offer()
        member.serving.told(HeldPrekeys(1 << 40, []))
    kept = sorted(member.serving.state.prekeys)
    assert kept == list(range(7 * SPARE_PREKEYS, 10 * SPARE_PREKEYS))
