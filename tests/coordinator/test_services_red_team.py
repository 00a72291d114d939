"""What an unfriendly device or an unlucky moment could do to the coordinator."""

from __future__ import annotations

from concurrent.futures import Future

import msgspec
import numpy as np
import pytest
from fleet import (
    Fleet,
    LocalAuthority,
    add_task,
    assert_exact,
    enrol,
    make_devices,
    make_helpers,
    rounds_in,
    seed,
)

from coordinator import events
from coordinator import server as server_module
from coordinator.arrivals import Arrivals
from coordinator.errors import StoreError
from coordinator.store import Store
from edge_sdk.crypto.sealing import Prekey
from edge_sdk.protocol import messages
from edge_sdk.protocol.messages import Header, PrekeyOffer, Signed
from edge_sdk.protocol.plan import delta_bits
from edge_sdk.transport.chunks import Blob
from edge_sdk.transport.wire import BlobRef, Letter, Prekeys, Upload, encode_frame

DEVICES, HELPERS = 5, 3


def make(directory, devices=DEVICES, server=None, **task):
    parties, boxes = make_devices(devices), make_helpers(HELPERS)
    store = Store(directory / "fleet")
    enrol(store, parties, boxes)
    add_task(store, **task)
    store.close()
    fleet = Fleet(directory / "fleet", parties + boxes, "helpers", **(server or {}))
    fleet.connect()
    return fleet


class HeldWorker:
    """Opens at once, in the caller's thread; what the round before gave is looked at when the test says so."""

    def __init__(self) -> None:
        self.held: list[tuple[Future, object]] = []
        self.holding = True

    def submit(self, call, *arguments) -> Future:
        future, result = Future(), call(*arguments)
        if self.holding:
            self.held.append((future, result))
        else:
            future.set_result(result)
        return future

    def let_go(self) -> None:
        self.holding = False
        for future, result in self.held:
            future.set_result(result)

    def shutdown(self, wait: bool) -> None:
        """Nothing runs."""


def test_a_round_that_is_opened_beside_the_last_ones_commit_builds_on_its_model(tmp_path, monkeypatch):
    monkeypatch.setattr("fleet.wait_for_opening", lambda server: None)
    bases, inner = [], server_module.rounds.next_model

    def recording(task, round_, done, parameters, memory, number, entropy):
        result = inner(task, round_, done, parameters, memory, number, entropy)
        bases.append((number, parameters.copy(), result.parameters))
        return result

    monkeypatch.setattr(server_module.rounds, "next_model", recording)
    fleet = make(tmp_path, rounds=2, schedule="overlap = true")
    worker = HeldWorker()
    fleet.server._opener.close()
    fleet.server._opener._worker = worker

    def both_answered():
        live = list(fleet.server._live.values())
        return len(live) == 2 and all(getattr(one.state, "openable", False) for one in live)

    fleet.run(both_answered)
    worker.let_go()
    fleet.run(fleet.saw(events.TaskDone))
    fleet.close()
    assert [number for number, _, _ in bases] == [0, 1]
    assert np.array_equal(bases[1][1], bases[0][2]), "the second model does not hold the first round's update"
    for truth in rounds_in(fleet.directory):
        assert_exact(truth, fleet.devices, 32 - delta_bits(DEVICES))


# --- uploads


def offer(fleet, device, header, blob):
    fleet.server._on_frame(device.name, encode_frame(Upload(header, blob)), fleet.clock())


def test_one_device_has_one_upload_of_a_round_on_its_way_whatever_it_offers(tmp_path):
    fleet = make(tmp_path)
    greedy = fleet.devices[0]
    greedy._on_pull = lambda pull: []
    fleet.run(lambda: bool(greedy.sent))
    sent, blob = greedy.sent["tiny"]
    for number in range(10):
        offer(fleet, greedy, sent.contribution.header, BlobRef(seed("blob", number), blob.ref.size))
    assert fleet.server._arrivals._of_device[greedy.name] == 1
    assert fleet.server._arrivals.granted_bytes <= DEVICES * blob.ref.size
    fleet.close()


def test_a_header_that_its_device_did_not_sign_gets_no_memory(tmp_path):
    fleet = make(tmp_path)
    liar = fleet.devices[0]
    liar._on_pull = lambda pull: []
    liar.tick = lambda now_s: []
    receive, liar.receive = liar.receive, lambda frame, now_s: [] if liar.sent else _quiet(receive(frame, now_s))
    fleet.run(lambda: bool(liar.sent))
    sent, blob = liar.sent["tiny"]
    forged = Signed(sent.contribution.header.body, bytes(64))
    offer(fleet, liar, forged, blob.ref)
    header = messages.decode(Header, sent.contribution.header.body)
    elsewhere = messages.sign(
        liar.identity,
        header.__class__(
            *[header.sender + 1 if name == "sender" else getattr(header, name) for name in header.__struct_fields__]
        ),
    )
    offer(fleet, liar, elsewhere, blob.ref)
    assert fleet.server._arrivals._of_device[liar.name] == 0
    fleet.close()


def _quiet(frames):
    return [frame for frame in frames if b"upload" not in frame[:16]]


def test_only_the_committee_is_given_memory_for_letters(tmp_path):
    fleet = make(tmp_path)
    fleet.run(lambda: bool(fleet.server._live))
    stranger, helper = fleet.devices[0], fleet.devices[-1]
    blob = Blob.of(bytes(1 << 20))
    for device in (stranger, helper):
        fleet.server._on_frame(device.name, encode_frame(Letter(blob.ref)), fleet.clock())
    assert not fleet.server._arrivals.holds(stranger.name, blob.ref.id)
    assert fleet.server._arrivals.holds(helper.name, blob.ref.id)
    fleet.close()


def test_a_device_that_drips_its_upload_gives_its_memory_to_who_waits():
    blob = Blob.of(bytes(40 * (120 << 10)))
    other = Blob.of(b"\1" * blob.ref.size)
    arrivals = Arrivals(blob.ref.size, stall_s=30.0)
    header, now_s = Signed(b"", bytes(64)), 0.0
    arrivals.ask("drips", blob.ref, header, b"", now_s)
    list(arrivals.pulls(now_s))
    arrivals.ask("waits", other.ref, header, b"", now_s)
    for index in range(20):
        if not arrivals.holds("drips", blob.ref.id) or any(device == "waits" for device, _ in arrivals.pulls(now_s)):
            break
        arrivals.add("drips", blob.chunk(index), now_s)
        now_s += 29.0
    assert now_s < 120
    assert [device for device, _ in arrivals.pulls(now_s)] in (["waits"], [])
    assert arrivals.granted_bytes == blob.ref.size


def test_a_slow_upload_that_nobody_waits_for_goes_on():
    blob = Blob.of(bytes(10 * (120 << 10)))
    arrivals = Arrivals(blob.ref.size, stall_s=30.0)
    arrivals.ask("slow", blob.ref, Signed(b"", bytes(64)), b"", 0.0)
    for index in range(10):
        list(arrivals.pulls(29.0 * index))
        done = arrivals.add("slow", blob.chunk(index), 29.0 * index)
    assert done is not None


# --- disk


def test_offers_that_have_expired_do_not_stay_on_the_disk(tmp_path):
    fleet = make(tmp_path)
    member = fleet.devices[-1]
    public = Prekey(bytes(96)).public
    serial = 1000
    for _ in range(12):
        offers = []
        for _ in range(32):
            serial += 1
            expires_s = int(fleet.clock()) + 2
            offers.append(
                messages.sign(
                    member.identity,
                    PrekeyOffer(
                        LocalAuthority().public_key,
                        member.identity.public_key,
                        serial,
                        public.x25519,
                        public.mlkem,
                        expires_s,
                    ),
                )
            )
        fleet.server._on_frame(member.name, encode_frame(Prekeys(offers)), fleet.clock())
        fleet.server._commit()
        fleet.clock.now_s += 4
    with fleet.server._store.reading() as t:
        kept = sum(t.prekey(member.identity.public_key, number) is not None for number in range(1000, serial + 1))
    fleet.close()
    assert kept <= 64


# --- unlucky moments


def test_a_round_that_ends_in_the_step_of_its_last_upload_does_not_end_the_server(tmp_path, monkeypatch):
    """No grace, a full round, and complaints that leave too few: taken, sealed and aborted in one step."""
    fleet = make(tmp_path, n_max=3, expected=3)
    fleet.run(lambda: bool(fleet.server._live))
    (live,) = fleet.server._live.values()
    msgspec.structs.force_setattr(live.task.schedule, "grace_s", 0.0)

    def seal_nothing(state, coordinator, now_s):
        return server_module.aggregator.abort(state, coordinator, "no group has 3 contributors")

    with monkeypatch.context() as patched:
        patched.setattr(server_module.aggregator, "seal", seal_nothing)
        fleet.run(fleet.saw(events.RoundAborted))
    fleet.run(fleet.saw(events.TaskDone))
    fleet.close()
    assert [truth.phase for truth in rounds_in(fleet.directory)] == ["ABORTED", "DONE"]


def test_an_upload_that_no_grant_can_hold_is_a_reason_to_wait_and_not_a_round_without_uploads(tmp_path):
    fleet = make(tmp_path, dimension=20_000, server={"upload_memory": 50_000})
    fleet.run(lambda: any("upload_memory_mb" in getattr(event, "reason", "") for event in fleet.events), turns=50)
    assert not fleet.server._live
    fleet.close()
    assert rounds_in(fleet.directory) == []


@pytest.mark.parametrize("part", ["vector", "shares"])
def test_what_the_error_of_a_damaged_disk_names_as_the_remedy_is_one(tmp_path, part, monkeypatch):
    opened = []
    monkeypatch.setattr("fleet.Store", lambda directory: opened.append(Store(directory)) or opened[-1])
    fleet = make(tmp_path)
    fleet.run(fleet.saw(events.Contributed, 3))
    (live,) = fleet.server._live.values()
    fleet.server.close()
    path = live.vectors.directory / "vectors"
    content = bytearray(path.read_bytes())
    content[live.vectors.slot_bytes + 5 if part == "vector" else live.vectors.slot_bytes - 5] ^= 1
    path.write_bytes(content)

    def serve():
        fleet.server = fleet.start()
        fleet.run(fleet.saw(events.TaskDone))

    with pytest.raises(StoreError, match="end the round with skip-round"):
        serve()
    opened[-1].close()
    store = Store(fleet.directory)
    with store.transaction() as t:
        t.skip_round("tiny", end_running=True)
    store.close()
    fleet.server = fleet.start()
    fleet.run(fleet.saw(events.TaskDone))
    fleet.close()
    ended = rounds_in(fleet.directory)
    assert [truth.phase for truth in ended] == ["ABORTED", "DONE"]
    assert_exact(ended[-1], fleet.devices, 32 - delta_bits(DEVICES))
