"""The server with a fleet on the real protocol: whole rounds, faults, and kills at every point of the write order.

What is asserted of a finished round is `assert_exact`: the opened sum is that of exactly the contributions that were
taken, every receipted one among them, none counted twice.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sqlite3
import time
from contextlib import closing
from functools import partial

import msgspec
import numpy as np
import pytest
from fleet import (
    COORDINATOR,
    START_S,
    Fleet,
    KilledFleet,
    add_task,
    assert_exact,
    enrol,
    make_devices,
    make_helpers,
    published,
    rounds_in,
    seed,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator import events, rounds
from coordinator import vectors as vectors_module
from coordinator.errors import StoreError
from coordinator.quotas import COSTLY, STOCK
from coordinator.store import Store
from coordinator.vectors import Vectors
from coordinator.welcome import INLINE_TICKETS
from edge_sdk.crypto.hashing import content_hash
from edge_sdk.errors import TransportError
from edge_sdk.protocol import messages
from edge_sdk.protocol.messages import MAX_ROSTER, Abort, Anchor, Complaint, Header, Release, Signed, unwrap, wrap
from edge_sdk.protocol.plan import delta_bits
from edge_sdk.transport import Connected
from edge_sdk.transport.memory import MemoryHub, chance
from edge_sdk.transport.wire import (
    INLINE_BYTES,
    MAX_BLOB_BYTES,
    MAX_TASKS,
    BlobRef,
    Chunk,
    Enrolment,
    HeldPrekeys,
    Leaving,
    Letter,
    Model,
    Prekeys,
    Pull,
    TaskState,
    Upload,
    Welcome,
    decode_down,
    decode_up,
    encode_frame,
)

DEVICES, HELPERS = 5, 3


def bits(n_max: int) -> int:
    return 32 - delta_bits(n_max)


def make(directory, devices=DEVICES, helpers=HELPERS, committee="helpers", server=None, tags=(), **task):
    """A fleet with one task, connected; its server has not stepped."""
    parties = make_devices(devices, serves=committee != "helpers")
    boxes = make_helpers(helpers) if committee == "helpers" else []
    store = Store(directory / "fleet")
    enrol(store, parties, boxes, tags)
    add_task(store, **task)
    store.close()
    fleet = Fleet(directory / "fleet", parties + boxes, committee, **(server or {}))
    fleet.connect()
    return fleet


def finish(fleet, rounds=1, left_out=frozenset(), n_max=DEVICES, task="tiny"):
    """Run to the task's end, stop the server, check every round. Returns what is in the store of them."""
    fleet.run(fleet.saw(events.TaskDone))
    fleet.close()
    ended = rounds_in(fleet.directory, task)
    done = [truth for truth in ended if truth.phase == "DONE"]
    assert len(done) == rounds
    for truth in done:
        assert_exact(truth, fleet.devices, bits(n_max), left_out)
    return ended


@pytest.mark.parametrize("committee", ["helpers", "everyone"])
def test_rounds_end_with_the_exact_sum_of_what_was_receipted(tmp_path, committee):
    fleet = make(tmp_path, committee=committee, rounds=2)
    ended = finish(fleet, rounds=2)
    assert [truth.senders for truth in ended] == [set(range(DEVICES))] * 2
    assert all(len(device.receipts) == 2 for device in fleet.devices[:DEVICES])


def test_the_server_is_woken_when_there_is_room_while_something_waits_for_it(tmp_path, monkeypatch):
    fleet = make(tmp_path)
    receive, unsent, asked = fleet.hub.receive, [0], []
    monkeypatch.setattr(type(fleet.hub), "unsent_bytes", property(lambda _: unsent[0]), raising=False)
    monkeypatch.setattr(
        fleet.hub, "receive", lambda timeout_s, room_bytes=None: asked.append(room_bytes) or receive(timeout_s)
    )
    fleet.run(lambda: any(True for _ in fleet.server._presence))
    unsent[0] = 1 << 30  # the broker takes nothing: every Welcome waits
    fleet.server._presence.welcome_all()
    fleet.server.step(0.0)
    assert asked[-1] is not None
    unsent[0] = 0
    fleet.server.step(0.0)
    fleet.server.step(0.0)
    assert asked[-1] is None


def test_members_are_told_which_of_their_prekeys_are_left_and_nobody_else_is(tmp_path):
    fleet = make(tmp_path, rounds=2)
    device, helper = fleet.devices[0], next(one for one in fleet.devices if one.serves)
    finish(fleet, rounds=2)
    said = [decode_down(fleet.server._welcome_frame(one.name)).prekeys for one in (helper, device)]
    unused = sorted(set(range(helper.member.next_serial)) - {0, 1})
    assert said == [HeldPrekeys(unused[-1], unused), None]


def test_a_round_of_several_groups_is_summed_by_group(tmp_path):
    fleet = make(tmp_path, devices=16, n_max=16, expected=16, groups=2)
    (truth,) = finish(fleet, n_max=16)
    assert [len(group) for group in truth.included] == [8, 8]


def test_a_committee_whose_ticket_fits_no_frame_serves_too(tmp_path):
    fleet = make(tmp_path, devices=30, committee="everyone", n_max=4, expected=4)
    for device in fleet.devices[4:]:
        device.tasks = ()
    finish(fleet, n_max=4)


def test_an_upload_that_is_still_being_written_is_not_written_over_by_the_next(tmp_path, monkeypatch):
    taken, written = [], []
    write, write_at = Vectors.write, vectors_module.write_at

    def take(vectors, slot, data):
        taken.append(content_hash(data))
        return write(vectors, slot, data)

    def slow(file, data, offset):
        time.sleep(0.02)  # a slow disk: meanwhile the server goes on
        written.append(content_hash(data))
        write_at(file, data, offset)

    def eager(device, on_ticket, signed, now_s):
        """Offers, and sends without being asked: the next upload's bytes come in the same step as the last one's."""
        frames = on_ticket(signed, now_s)
        return [*frames, encode_frame(device.sent["tiny"][1].chunk(0))] if frames else frames

    monkeypatch.setattr(Vectors, "write", take)
    monkeypatch.setattr(vectors_module, "write_at", slow)
    monkeypatch.setattr("coordinator.server.FRAMES_BETWEEN_PULLS", 1)
    fleet = make(tmp_path, server={"upload_memory": 23_792})  # of one upload, so all of them share one buffer
    for device in fleet.devices:
        device._on_ticket = partial(eager, device, device._on_ticket)
    finish(fleet)
    assert len(set(taken)) == DEVICES
    assert written == taken


@pytest.mark.parametrize("inline", [1500, 2500, 4000])
def test_a_seal_does_not_overtake_the_deliveries_that_a_member_fetches(tmp_path, monkeypatch, inline):
    monkeypatch.setattr("edge_sdk.transport.chunks.INLINE_BYTES", inline)
    monkeypatch.setattr("coordinator.live.INLINE_BYTES", inline)
    monkeypatch.setattr("coordinator.mail.FRAMES_AT_ONCE", 1)  # a broker that takes bulk slowly
    fleet = make(tmp_path, committee="everyone")
    finish(fleet)
    assert [device.errors for device in fleet.devices if device.errors] == []


def test_lost_repeated_and_overtaken_frames_cost_time_and_nothing_else(tmp_path):
    fleet = make(tmp_path, rounds=2, schedule="")
    fleet.hub.fate = chance(seed("faults"), drop=0.15, duplicate=0.15, hold=0.15)
    fleet.run(fleet.saw(events.TaskDone), turns=4000)
    fleet.close()
    for truth in rounds_in(fleet.directory):
        if truth.phase == "DONE":
            assert_exact(truth, fleet.devices, bits(DEVICES))


def test_the_broker_may_forget_everything(tmp_path):
    fleet = make(tmp_path)
    for kind in (events.RoundOpened, events.Contributed, events.RoundSealed, events.RoundCertified):
        fleet.run(fleet.saw(kind))
        fleet.hub.restart_broker()
    finish(fleet)


def test_a_device_that_comes_late_is_told_and_not_counted(tmp_path):
    fleet = make(tmp_path, devices=6, n_max=6, expected=4)
    late = fleet.devices[5]
    fleet.run(lambda: bool(late.sent))
    fleet.leave(late)
    fleet.run(fleet.saw(events.RoundSealed))
    late.asked_s = 0.0
    fleet.connect(late)
    fleet.run(lambda: bool(late.refusals))
    assert "closed" in late.refusals[0].reason
    assert late.refusals[0].final
    (truth,) = finish(fleet, n_max=6)
    assert late.enrolled.index not in truth.senders
    assert late.receipts == {}


def test_members_are_shown_the_last_contribution_at_once_so_that_they_can_complain_before_the_seal(tmp_path):
    fleet = make(tmp_path)
    last = fleet.devices[0]
    fleet.leave(last)
    fleet.run(fleet.saw(events.Contributed, DEVICES - 1), seconds=0.01)
    fleet.connect(last)
    fleet.run(fleet.saw(events.Contributed, DEVICES), seconds=0.01)
    (live,) = fleet.server._live.values()
    assert [post.shown for post in live.posts.values()] == [DEVICES] * HELPERS
    finish(fleet)


def test_no_more_than_n_max_are_taken(tmp_path):
    fleet = make(tmp_path, devices=6, n_max=4, expected=4)
    (truth,) = finish(fleet, n_max=4)
    assert len(truth.senders) == 4
    refused = [device for device in fleet.devices[:6] if device.refusals]
    assert len(refused) == 2
    assert all("has its 4" in device.refusals[0].reason for device in refused)


@pytest.mark.parametrize("restarts", [False, True])
def test_a_round_that_has_its_contributions_is_offered_to_nobody_else(tmp_path, restarts):
    """A device that entered it would toss a coin, charge its ledger and be refused."""
    fleet = make(tmp_path, devices=6, n_max=4, expected=4)
    late = fleet.devices[5]
    link = fleet.links.pop(late.name)
    for frame in late.hello(fleet.clock()):
        link.send(frame)
    told = []

    def hear():
        while (item := link.receive(0.0)) is not None:
            if not isinstance(item, Connected) and isinstance(frame := decode_down(item), Welcome):
                told.append(frame.tasks[0].ticket)

    fleet.run(fleet.saw(events.RoundOpened), seconds=0.01)
    fleet.run(fleet.saw(events.Contributed, 4), seconds=0.01)
    hear()
    assert told
    assert told[-1] is not None
    if restarts:
        fleet.restart()
    for frame in late.hello(fleet.clock()):
        link.send(frame)
    fleet.turn(0.01)
    hear()
    assert told[-1] is None
    assert not any(isinstance(event, events.RoundSealed) for event in fleet.events)
    finish(fleet, n_max=4)


def test_what_a_command_changed_counts_before_the_next_frame_once_the_server_is_told(tmp_path):
    fleet = make(tmp_path)
    fleet.run(fleet.saw(events.RoundOpened))
    revoked = fleet.devices[0]
    store = Store(fleet.directory)
    with store.transaction() as t:
        t.revoke(revoked.identity.public_key, START_S)
    store.close()
    fleet.events.clear()
    fleet.server.look()
    fleet.links[revoked.name].send(revoked.hello(fleet.clock())[0])
    fleet.server.step(0.0)
    assert {e.reason for e in fleet.events if isinstance(e, events.Refused)} == {"it is not enrolled, or was revoked"}
    assert not any(isinstance(e, events.Contributed) and e.device == revoked.name for e in fleet.events)
    fleet.close()


def test_strangers_that_flood_are_said_once(tmp_path, caplog):
    fleet = make(tmp_path)
    strangers = make_devices(DEVICES + 3)[DEVICES:]
    for stranger in strangers:
        link = fleet.hub.connect(stranger.name)
        for _ in range(500):
            link.send(encode_frame(Leaving()))
    for _ in range(10):
        fleet.server.step(0.0)
    floods = [line for line in caplog.messages if "it floods" in line]
    assert len(floods) == 1
    fleet.close()


def test_a_device_that_offers_to_a_round_that_ended_pays_for_it(tmp_path):
    fleet = make(tmp_path, rounds=2)
    device = fleet.devices[0]
    offers = []
    send = fleet.links[device.name].send
    fleet.links[device.name].send = lambda frame: (offers.append(frame), send(frame))
    fleet.run(fleet.saw(events.TaskDone))
    (offer, *_) = [frame for frame in offers if isinstance(decode_up(frame), Upload)]
    forged = decode_up(offer)
    header = messages.decode(Header, forged.header.body)
    unknown = messages.sign(device.identity, msgspec.structs.replace(header, tid=bytes(32)))
    link = fleet.hub.connect(device.name)
    for _ in range(400):
        link.send(encode_frame(Upload(unknown, forged.blob)))
    fleet.events.clear()
    for _ in range(4):
        fleet.server.step(0.0)
    looked_at = [event for event in fleet.events if "never was" in getattr(event, "reason", "")]
    assert len(looked_at) <= 1 + STOCK / (1 + COSTLY)
    fleet.close()


def test_a_stranger_is_refused_and_nothing_of_it_is_read(tmp_path):
    fleet = make(tmp_path)
    stranger = make_devices(DEVICES + 1)[-1]
    fleet.devices.append(stranger)
    fleet.connect(stranger)
    finish(fleet)
    refused = {event.device for event in fleet.events if isinstance(event, events.Refused)}
    assert refused == {stranger.name}
    assert stranger.epoch is None


def test_a_revoked_device_is_refused_at_once_and_out_of_the_next_epoch(tmp_path):
    fleet = make(tmp_path, devices=6, n_max=6, expected=4, rounds=2)
    revoked = fleet.devices[5]
    fleet.run(lambda: bool(revoked.sent))
    store = Store(fleet.directory)
    with store.transaction() as t:
        t.revoke(revoked.identity.public_key, START_S)
    store.close()
    fleet.connect(revoked)
    fleet.run(lambda: any(isinstance(e, events.Refused) and e.device == revoked.name for e in fleet.events))
    fleet.run(fleet.saw(events.TaskDone))
    assert [e.devices for e in fleet.events if isinstance(e, events.EpochBegan)] == [6, 5]
    fleet.close()


def test_who_is_there_and_does_not_contribute_is_told_of_an_open_round_again_and_ever_less_often(tmp_path, monkeypatch):
    monkeypatch.setattr("coordinator.server.REMIND_S", 0.5)
    fleet = make(tmp_path, devices=4, n_max=4)
    silent, done = fleet.devices[:2]
    link = fleet.links.pop(silent.name)
    for frame in silent.hello(fleet.clock()):
        link.send(frame)
    fleet.run(fleet.saw(events.RoundOpened))
    opened_s, told = fleet.clock(), []
    fleet.run(lambda: bool(done.receipts), seconds=0.02)
    other = fleet.links.pop(done.name)
    while fleet.clock() < opened_s + 3.9:
        fleet.turn(0.02)
        while (item := link.receive(0.0)) is not None:
            if not isinstance(item, Connected) and isinstance(frame := decode_down(item), Welcome):
                told += [fleet.clock() - opened_s] if frame.tasks[0].ticket is not None else []
        while (item := other.receive(0.0)) is not None:
            assert not isinstance(decode_down(item), Welcome)
    assert told == pytest.approx([0.0, 0.5, 1.5, 3.5], abs=0.2)
    fleet.close()


def test_a_receipt_is_given_again_also_after_the_round(tmp_path):
    fleet = make(tmp_path)
    device = fleet.devices[0]
    fleet.run(lambda: bool(device.sent))
    upload = encode_frame(Upload(device.sent["tiny"][0].contribution.header, device.sent["tiny"][1].ref))
    fleet.run(lambda: bool(device.receipts))
    before = fleet.links[device.name]
    fleet.run(fleet.saw(events.TaskDone))
    while before.receive(0.0) is not None:
        pass
    before.send(upload)
    fleet.server.step(0.0)
    answers = list(iter(lambda: before.receive(0.0), None))
    assert len(answers) == 1
    assert device.receive(answers[0], fleet.clock()) == []
    assert device.refusals == []
    fleet.close()


def test_a_second_contribution_of_a_sender_is_refused(tmp_path):
    fleet = make(tmp_path)
    device = fleet.devices[0]
    fleet.run(lambda: bool(device.receipts))
    (tid,) = device.receipts
    live = fleet.server._live[tid]
    slot = live.slots.index(device.enrolled.index)
    header = messages.decode(messages.Header, live.headers[slot].body)
    other = messages.sign(device.identity, messages.Header(**{
        name: getattr(header, name) for name in header.__struct_fields__ if name != "masked"
    }, masked=bytes(32)))  # fmt: skip
    fleet.links[device.name].send(encode_frame(Upload(other, _blob_of(live.upload_bytes).ref)))
    fleet.run(lambda: any("already sent another" in getattr(e, "reason", "") for e in fleet.events))
    finish(fleet)


def _blob_of(size):
    from edge_sdk.transport.chunks import Blob

    return Blob.of(bytes(size))


def test_an_upload_that_is_not_what_its_header_binds_is_refused(tmp_path):
    fleet = make(tmp_path, devices=5, expected=4)
    liar = fleet.devices[0]
    fleet.run(lambda: bool(liar.sent))
    sent, blob = liar.sent["tiny"]
    size = blob.ref.size
    liar.sent["tiny"] = (sent, _blob_of(size))
    fleet.server._arrivals.end(liar.name, blob.ref.id)
    liar.asked_s = 0.0
    fleet.run(lambda: bool(liar.refusals))
    (truth,) = finish(fleet)
    assert liar.enrolled.index not in truth.senders


def test_a_chunk_damaged_under_way_is_asked_for_again(tmp_path):
    fleet = make(tmp_path)
    victim, damaged = fleet.devices[0], []
    honest = victim._on_pull

    def damage(pull):
        frames = honest(pull)
        if len(damaged) < 2:
            chunk = decode_up(frames[0])
            damaged.append(chunk)
            data = bytes([chunk.data[0] ^ 1]) + chunk.data[1:]
            return [encode_frame(Chunk(chunk.blob, chunk.index, data, chunk.proof))]
        return frames

    victim._on_pull = damage
    (truth,) = finish(fleet)
    assert len(damaged) == 2
    assert victim.enrolled.index in truth.senders


def test_a_device_that_sends_damaged_chunks_for_ever_is_refused(tmp_path):
    fleet = make(tmp_path, expected=4)
    liar = fleet.devices[0]
    honest = liar._on_pull

    def damage(pull):
        chunks = map(decode_up, honest(pull))
        return [encode_frame(Chunk(c.blob, c.index, bytes(len(c.data)), c.proof)) for c in chunks]

    liar._on_pull = damage
    fleet.run(lambda: bool(liar.refusals))
    (truth,) = finish(fleet)
    assert liar.enrolled.index not in truth.senders


def test_complaints_after_it_was_summed_take_a_contribution_out_again(tmp_path):
    fleet = make(tmp_path)
    victim = fleet.devices[2]
    fleet.run(lambda: all(d.receipts for d in fleet.devices[:DEVICES]))
    (tid,) = victim.receipts
    index = victim.enrolled.index
    for helper in fleet.devices[DEVICES : DEVICES + 2]:
        number = fleet.server._live[tid].round.epoch.member_number(helper.identity.public_key)
        complaint = messages.sign(helper.identity, Complaint(tid, number, [index]))
        fleet.links[helper.name].send(encode_frame(Letter(wrap(Complaint, complaint))))
    fleet.turn()
    fleet.restart()  # the complaints are on disk
    (truth,) = finish(fleet, left_out={index})
    assert truth.included == [set(range(DEVICES)) - {index}]


def test_a_member_that_answers_twice_or_otherwise_changes_nothing(tmp_path):
    fleet = make(tmp_path)
    releases = []

    def lie(device, kind, reply):
        if kind == "release":
            _, signed = unwrap(reply)
            said = messages.decode(Release, signed.body)
            other = Release(said.tid, said.seal, said.member, [bytes(len(said.sums[0]))])
            releases.append(reply)
            fleet.links[device.name].send(encode_frame(Letter(reply)))
            fleet.links[device.name].send(encode_frame(Letter(wrap(Release, messages.sign(device.identity, other)))))
        return reply

    fleet.devices[DEVICES].lie = lie
    finish(fleet)
    assert releases


def test_a_member_that_releases_a_wrong_sum_is_outvoted(tmp_path):
    fleet = make(tmp_path)

    def lie(device, kind, reply):
        if kind != "release":
            return reply
        _, signed = unwrap(reply)
        said = messages.decode(Release, signed.body)
        wrong = (np.frombuffer(said.sums[0], "<u2").astype(int) + 1) % 65521
        other = Release(said.tid, said.seal, said.member, [wrong.astype("<u2").tobytes()])
        return wrap(Release, messages.sign(device.identity, other))

    fleet.devices[DEVICES].lie = lie
    finish(fleet)


def test_two_tasks_run_side_by_side(tmp_path):
    fleet = make(tmp_path, rounds=2)
    store = Store(fleet.directory)
    add_task(store, "second", rounds=2, dimension=3000)
    store.close()
    for device in fleet.devices[:DEVICES]:
        device.tasks = ("tiny", "second")
        fleet.connect(device)
    fleet.run(fleet.saw(events.TaskDone, 2))
    fleet.close()
    for task in ("tiny", "second"):
        ended = rounds_in(fleet.directory, task)
        assert [truth.phase for truth in ended] == ["DONE", "DONE"]
        for truth in ended:
            assert_exact(truth, fleet.devices, bits(DEVICES))


def test_with_overlap_the_next_round_opens_while_the_last_is_being_opened(tmp_path):
    fleet = make(tmp_path, rounds=3, schedule="overlap = true")
    slow = []

    def lie(device, kind, reply):
        if kind == "release" and len(slow) < 2:
            slow.append(reply)
            return wrap(Release, Signed(b"", bytes(64)))
        return reply

    for helper in fleet.devices[DEVICES:]:
        helper.lie = lie
    fleet.run(lambda: len(fleet.server._live) == 2)
    finish(fleet, rounds=3)


def test_without_enough_contributors_the_round_aborts_and_the_model_stays(tmp_path):
    fleet = make(tmp_path)
    for device in fleet.devices[2:DEVICES]:
        device.tasks = ()
    fleet.run(fleet.saw(events.RoundAborted))
    aborted = next(event for event in fleet.events if isinstance(event, events.RoundAborted))
    assert "no group has 3 contributors: 2 came" in aborted.reason
    for device in fleet.devices[:DEVICES]:
        device.tasks = ("tiny",)
    fleet.connect(*fleet.devices[:DEVICES])
    ended = finish(fleet)
    assert ended[0].phase == "ABORTED"
    assert ended[-1].number == len(ended) - 1
    assert published(fleet.directory) == 1


def test_without_a_quorum_the_round_aborts_when_its_ticket_expires(tmp_path):
    fleet = make(tmp_path)
    fleet.run(fleet.saw(events.Contributed, DEVICES))
    for helper in fleet.devices[DEVICES + 1 :]:
        fleet.leave(helper)
    fleet.run(fleet.saw(events.RoundAborted), turns=200, seconds=1.0)
    (aborted,) = [event for event in fleet.events if isinstance(event, events.RoundAborted)]
    assert aborted.reason == "1 members signed in time, 3 needed"
    fleet.close()


def test_members_that_were_away_are_brought_up_to_date(tmp_path):
    fleet = make(tmp_path)
    fleet.run(fleet.saw(events.RoundOpened))
    for helper in fleet.devices[DEVICES:]:
        fleet.leave(helper)
    fleet.run(fleet.saw(events.RoundSealed))
    fleet.connect(*fleet.devices[DEVICES:])
    finish(fleet)


def test_the_seconds_of_a_model_are_those_since_its_ticket(tmp_path):
    """Also of a fast round, whose ticket says when it closes in whole seconds."""
    fleet = make(tmp_path, rounds=2)
    fleet.clock.now_s += 0.1
    finish(fleet, rounds=2)
    store = Store(fleet.directory)
    with store.reading() as t:
        took = [row.ended_s - row.opened_s for row in t.rounds("tiny")]
    store.close()
    assert [e.seconds for e in fleet.events if isinstance(e, events.ModelPublished)] == took


def test_a_fleet_that_is_its_own_committee_goes_on_without_a_device_that_stays_away(tmp_path):
    fleet = make(tmp_path, devices=6, committee="everyone", n_max=6, expected=4, rounds=6)
    away = fleet.devices[5]
    away.offers = 2
    fleet.run(fleet.saw(events.ModelPublished))
    away.offers = 12
    fleet.leave(away)
    fleet.run(fleet.saw(events.ModelPublished, 3), turns=1500)
    assert [e.devices for e in fleet.events if isinstance(e, events.EpochBegan)] == [6, 5]
    fleet.connect(away)
    fleet.run(fleet.saw(events.TaskDone), turns=1500)
    assert [e.devices for e in fleet.events if isinstance(e, events.EpochBegan)] == [6, 5, 6]
    assert len(away.receipts) >= 3
    fleet.close()


def test_uploads_take_no_more_memory_than_they_were_given(tmp_path):
    size = 23_792  # one contribution of the tiny task
    fleet = make(tmp_path, server={"upload_memory": 2 * size})
    most = 0

    def done():
        nonlocal most
        most = max(most, fleet.server._arrivals.granted_bytes)
        return fleet.saw(events.Contributed, DEVICES)()

    fleet.run(done)
    assert 0 < most <= 2 * size
    finish(fleet)


def test_an_upload_that_stalls_loses_its_slot_to_those_that_wait(tmp_path):
    fleet = make(tmp_path, server={"upload_memory": 23_792}, schedule="", top="")
    stalling = fleet.devices[0]
    stalling._on_pull = lambda pull: []  # it offers and never sends
    fleet.server._arrivals._stall_s = 0.3
    (truth,) = finish(fleet)
    assert stalling.enrolled.index not in truth.senders


def test_a_device_without_the_tasks_tag_is_not_asked(tmp_path):
    fleet = make(tmp_path, devices=5, top='participants = ["kitchen"]', tags=["kitchen"], expected=4)
    (outside,) = make_devices(6)[5:]
    store = Store(fleet.directory)
    enrol(store, [outside], tags=["garage"])
    store.close()
    fleet.devices.append(outside)
    fleet.connect(outside)
    (truth,) = finish(fleet, n_max=6)
    assert outside.inputs == {}
    assert len(truth.senders) == 5


def test_a_device_whose_ledger_went_back_is_refused_before_members_see_it(tmp_path):
    fleet = make(tmp_path, rounds=2)
    rolled_back = fleet.devices[0]
    fleet.run(lambda: bool(rolled_back.receipts))
    rolled_back.entries = 0
    fleet.run(lambda: bool(rolled_back.refusals))
    assert "rolled back or cloned" in rolled_back.refusals[0].reason
    fleet.restart()  # it is remembered
    assert rolled_back.identity.public_key in fleet.server._heads.anchors.forked
    ended = finish(fleet, rounds=2)
    assert rolled_back.enrolled.index not in ended[1].senders


def shown_to(fleet, device):
    """The header in the next Welcome, that its own device signed."""
    welcome = decode_down(fleet.server._welcome_frame(device.name))
    if welcome.shown is None:
        return None
    header = messages.verify(Header, device.identity.public_key, welcome.shown)
    assert header.key == device.identity.public_key
    return header


def test_a_device_is_shown_its_own_longest_head_from_its_receipt_on_and_after_every_restart(tmp_path):
    fleet = make(tmp_path, rounds=2)
    devices, helper = fleet.devices[:DEVICES], fleet.devices[DEVICES]
    fleet.run(fleet.saw(events.RoundOpened))
    assert [shown_to(fleet, device) for device in devices] == [None] * DEVICES
    phases = (events.Contributed, events.RoundSealed, events.RoundCertified, events.ModelPublished, events.TaskDone)
    for kind in phases:
        fleet.run(fleet.saw(kind))
        before = [shown_to(fleet, device) for device in devices]
        fleet.restart()
        assert [shown_to(fleet, device) for device in devices] == before
        for device, header in zip(devices, before, strict=True):
            entries = 0 if header is None else header.ledger.entries
            assert len(device.receipts) <= entries <= device.entries, kind
        assert shown_to(fleet, helper) is None
    assert [shown_to(fleet, device).ledger.entries for device in devices] == [2] * DEVICES
    fleet.turn()
    fleet.turn()
    assert [len(device.shown.body) > 0 for device in devices] == [True] * DEVICES
    fleet.close()


def test_of_a_devices_headers_in_several_tasks_it_is_shown_the_one_with_the_most_entries(tmp_path):
    fleet = make(tmp_path, rounds=1)
    store = Store(fleet.directory)
    add_task(store, "other", rounds=3)
    store.close()
    device = fleet.devices[0]
    for other in fleet.devices[:DEVICES]:
        other.tasks = ("tiny", "other")
    fleet.connect()
    for _ in range(2):
        fleet.run(fleet.saw(events.TaskDone))
        fleet.restart()
    fleet.run(fleet.saw(events.TaskDone, 2))
    assert (shown_to(fleet, device).ledger.entries, len(device.receipts)) == (4, 4)
    fleet.restart()
    assert shown_to(fleet, device).ledger.entries == 4
    fleet.close()


def test_a_rolled_back_device_goes_on_being_shown_the_head_that_it_forgot(tmp_path):
    fleet = make(tmp_path, rounds=3)
    rolled_back = fleet.devices[0]
    fleet.run(lambda: len(rolled_back.receipts) == 2)
    rolled_back.entries = 0
    fleet.run(lambda: bool(rolled_back.refusals))
    for _ in range(2):
        assert shown_to(fleet, rolled_back).ledger.entries == 2
        fleet.restart()
    fleet.close()


def test_a_welcome_that_holds_as_much_as_it_may_fits_a_frame():
    """What the limits of its parts add up to."""
    hashed, proof = b"\xff" * 32, [b"\xff" * 32] * 20
    header = Header(hashed, MAX_ROSTER - 1, hashed, proof, 1, hashed, hashed, hashed, Anchor((1 << 53) - 1, hashed))
    shown = messages.sign(COORDINATOR, header)
    model = messages.encode(messages.sign(COORDINATOR, Model("t" * 64, (1 << 53) - 1, hashed, hashed)))
    file = BlobRef(hashed, MAX_BLOB_BYTES)
    ticket = bytes((INLINE_TICKETS - len(messages.encode(shown))) // MAX_TASKS)
    states = [TaskState(model, file, file, ticket)] * MAX_TASKS
    prekeys = HeldPrekeys((1 << 53) - 1, [(1 << 53) - 1] * 256)
    frame = Welcome(1 << 39, bytes(INLINE_BYTES), Enrolment(MAX_ROSTER - 1, proof), states, shown, prekeys)
    assert decode_down(encode_frame(frame)) == frame


def test_skipping_a_round_leaves_out_its_number(tmp_path):
    fleet = make(tmp_path, rounds=2)
    fleet.run(fleet.saw(events.RoundOpened))
    store = Store(fleet.directory)
    with store.transaction() as t:
        assert t.skip_round("tiny") == 2
    store.close()
    assert [truth.number for truth in finish(fleet, rounds=2)] == [0, 2]


def test_a_paused_task_ends_its_round_and_opens_no_other(tmp_path):
    fleet = make(tmp_path, rounds=2)
    fleet.run(fleet.saw(events.RoundOpened))
    store = Store(fleet.directory)
    with store.transaction() as t:
        t.set_task_state("tiny", "paused")
    fleet.run(fleet.saw(events.ModelPublished))
    for _ in range(30):
        fleet.turn()
    assert fleet.saw(events.RoundOpened, 2)() is False
    with store.transaction() as t:
        t.set_task_state("tiny", "running")
    store.close()
    finish(fleet, rounds=2)


def remove(directory, task="tiny"):
    """As the command does, from another process."""
    store = Store(directory)
    with store.transaction() as t:
        t.remove_task(task)
    store.close()


def state_of(directory, task="tiny"):
    store = Store(directory)
    with store.reading() as t:
        state, anchored = t.task(task).state, {row.device for row in t.anchors()}
    store.close()
    return state, anchored


@pytest.mark.parametrize("serves", [True, False])
@pytest.mark.parametrize("phase", [events.RoundOpened, events.Contributed, events.RoundSealed])
def test_a_removed_tasks_round_is_aborted_and_no_other_opens(tmp_path, phase, serves):
    fleet = make(tmp_path, rounds=2)
    fleet.run(fleet.saw(events.RoundOpened))
    for helper in fleet.devices[DEVICES:]:
        fleet.leave(helper)  # or they sign as soon as there is a seal
    fleet.run(fleet.saw(phase))
    (live,) = fleet.server._live.values()
    senders = {fleet.devices[index].identity.public_key for index in live.slots}
    if serves:
        remove(fleet.directory)
        fleet.server.look()
    else:
        fleet.server.close()
        remove(fleet.directory)
        fleet.server = fleet.start()
    fleet.turn()
    assert [e.reason for e in fleet.events if isinstance(e, events.RoundAborted)] == ["the task was removed"]
    fleet.connect(*fleet.devices[DEVICES:])
    for _ in range(30):
        fleet.turn()
    assert not any(device.sent for device in fleet.devices), "a device still offers what nobody will take"
    fleet.restart()
    for _ in range(30):
        fleet.turn()
    fleet.close()
    (truth,) = rounds_in(fleet.directory)
    assert truth.phase == "ABORTED"
    state, anchored = state_of(fleet.directory)
    assert state == "removed"
    assert anchored >= senders, "a ledger that goes back would not give itself away"
    assert list((fleet.directory / "rounds").iterdir()) == []


def test_devices_hear_of_a_removed_tasks_end_before_they_spend_on_it_and_of_the_task_no_more(tmp_path):
    fleet = make(tmp_path, rounds=2)
    trains = fleet.devices[0]
    link = fleet.links.pop(trains.name)  # it trains meanwhile: it is told of the round, and sends nothing yet
    for frame in trains.hello(fleet.clock()):
        link.send(frame)

    def heard():
        while (item := link.receive(0.0)) is not None:
            if not isinstance(item, Connected):
                yield decode_down(item)

    fleet.run(fleet.saw(events.RoundOpened))
    fleet.turn()
    (live,) = fleet.server._live.values()
    (told,) = [frame.tasks for frame in heard() if isinstance(frame, Welcome)][-1]
    remove(fleet.directory)
    fleet.server.look()
    fleet.turn()
    *_, letter, welcome = heard()
    kind, notice = unwrap(letter.content)
    assert (kind, messages.decode(Abort, notice.body).tid) == (Abort, live.tid)
    assert welcome.tasks == []
    for device in fleet.devices[1:]:
        assert decode_down(fleet.server._welcome_frame(device.name)).tasks == []
    assert fleet.server._shelf.find(told.bundle.id) is None
    fleet.close()


def test_a_round_that_was_certified_when_its_task_was_removed_is_opened_and_its_model_kept(tmp_path):
    fleet = make(tmp_path, rounds=1)
    fleet.run(fleet.saw(events.RoundCertified))
    remove(fleet.directory)
    fleet.server.look()
    fleet.restart()
    fleet.run(fleet.saw(events.ModelPublished))
    assert not fleet.saw(events.TaskDone)()
    fleet.close()
    (truth,) = rounds_in(fleet.directory)
    assert_exact(truth, fleet.devices, bits(DEVICES))
    assert (published(fleet.directory), state_of(fleet.directory)[0]) == (1, "removed")


def test_beside_a_removed_task_another_one_goes_on(tmp_path):
    parties, boxes = make_devices(DEVICES, ("tiny", "other")), make_helpers(HELPERS)
    store = Store(tmp_path / "fleet")
    enrol(store, parties, boxes)
    add_task(store, rounds=3)
    add_task(store, "other", rounds=2, now_s=START_S + 1)
    store.close()
    fleet = Fleet(tmp_path / "fleet", parties + boxes)
    fleet.connect()
    fleet.run(fleet.saw(events.Contributed, 2))
    remove(fleet.directory)
    finish(fleet, rounds=2, task="other")
    assert {truth.phase for truth in rounds_in(fleet.directory)} == {"ABORTED"}


@pytest.mark.parametrize("point", ["at once", "before commit", "committed", "answer sent"])
def test_a_kill_while_a_removed_tasks_round_is_ended_ends_it_all_the_same(tmp_path, point):
    fleet = killed(tmp_path)
    fleet.start()

    def rows(query):
        with closing(sqlite3.connect(fleet.directory / "coordinator.db")) as connection:
            return connection.execute(query).fetchall()

    fleet.run(lambda: rows("SELECT count(*) FROM contributions")[0][0] >= 2)
    remove(fleet.directory)
    fleet.kills = [] if point == "at once" else [(point, 1)]
    fleet.kill()  # the next server ends the round in its first step, and is killed there
    fleet.run(lambda: rows("SELECT phase FROM rounds") == [("ABORTED",)] and fleet.deaths == 1 + (point != "at once"))
    for _ in range(10):
        fleet.turn()
    fleet.stop()
    assert rows("SELECT phase, reason FROM rounds") == [("ABORTED", "the task was removed")]
    assert state_of(fleet.directory)[0] == "removed"
    assert not any(device.sent for device in fleet.devices)


def test_a_task_that_cannot_start_says_why_once(tmp_path):
    fleet = make(tmp_path, devices=3, expected=4)
    for _ in range(30):
        fleet.turn()
    assert [e.reason for e in fleet.events if isinstance(e, events.Waiting)] == [
        "3 of 3 devices are ready, and the task plans with 4"
    ]
    fleet.close()


def test_what_a_task_waits_for_is_in_the_store_until_its_round_opens(tmp_path):
    fleet = make(tmp_path)
    store = Store(fleet.directory)

    def waiting():
        with store.reading() as t:
            return t.waiting("tiny")

    fleet.run(lambda: any(isinstance(e, events.Waiting) for e in fleet.events))
    assert waiting() == [e.reason for e in fleet.events if isinstance(e, events.Waiting)][-1]
    fleet.run(fleet.saw(events.RoundOpened))
    assert waiting() == ""
    store.close()
    finish(fleet)


@pytest.mark.parametrize("committee", ["helpers", "everyone"])
def test_a_ticket_leaves_in_the_step_in_which_the_last_prekey_it_waits_for_comes(tmp_path, committee):
    fleet = make(tmp_path, committee=committee)
    *_, first, last = fleet.devices
    offers = {}
    for device in (first, last):
        device.offers, offers[device.name] = 0, 12
    fleet.run(lambda: any("has offered no prekey" in e.reason for e in fleet.events if isinstance(e, events.Waiting)))
    fleet.clock.now_s += 0.01  # of the half second after which it would be tried again
    for device, opened in ((first, False), (last, True)):
        device.offers = 12
        for frame in device.hello(fleet.clock()):
            fleet.links[device.name].send(frame)
        fleet.server.step(0.0)
        assert fleet.saw(events.RoundOpened)() is opened
    finish(fleet)


def test_a_ticket_leaves_in_the_step_in_which_the_last_device_it_waits_for_comes(tmp_path):
    fleet = make(tmp_path, devices=3, expected=4)
    for _ in range(8):
        fleet.turn()
    assert fleet.server._tasks["tiny"].reason.startswith("3 of 3 devices are ready")
    (new,) = make_devices(4)[3:]
    store = Store(fleet.directory)
    enrol(store, [new])
    store.close()
    fleet.devices.append(new)
    fleet.connect(new)
    now_s = fleet.clock.now_s = fleet.server._tasks["tiny"].retry_s - 0.4
    for _ in range(3):  # a hello, the epoch, the helpers' prekeys
        fleet.turn(0.0)
    assert fleet.clock.now_s == now_s
    assert fleet.saw(events.RoundOpened)()
    finish(fleet, n_max=6)


def test_the_pause_between_rounds_is_kept_whatever_comes(tmp_path):
    fleet = make(tmp_path, rounds=2, schedule="pause_s = 20")
    fleet.run(fleet.saw(events.ModelPublished))
    published_s = fleet.clock()
    for device in fleet.devices:
        device.offers = 24
        fleet.leave(device)
    fleet.connect()
    fleet.run(fleet.saw(events.RoundOpened, 2))
    assert fleet.clock() - published_s >= 20
    finish(fleet, rounds=2)


@pytest.mark.parametrize(("loss", "shown"), [("mse", {"loss": 0.5}), ("cross_entropy", {"accuracy": 0.1, "loss": 0.5})])
def test_a_loss_without_right_answers_gives_no_accuracy(tmp_path, monkeypatch, loss, shown):
    inner = rounds.next_model

    def with_metrics(*given):
        return dataclasses.replace(inner(*given), metrics={"accuracy": 0.1, "loss": 0.5})

    monkeypatch.setattr(rounds, "next_model", with_metrics)
    fleet = make(tmp_path)
    running = fleet.server._tasks["tiny"]
    running.planned = msgspec.structs.replace(running.planned, loss=loss)
    fleet.run(fleet.saw(events.ModelPublished))
    (event,) = (event for event in fleet.events if isinstance(event, events.ModelPublished))
    assert (event.metrics, event.loss) == (shown, loss)
    store = Store(fleet.directory)
    with store.reading() as t:
        assert t.newest_model("tiny").metrics == shown
    store.close()
    fleet.close()


def test_the_model_is_the_coordinators_and_its_lineage_tells_no_set(tmp_path):
    fleet = make(tmp_path, rounds=2)
    finish(fleet, rounds=2)
    store = Store(fleet.directory)
    with store.reading() as t:
        first, second, third = t.models("tiny")
        rows = t.rounds("tiny")
    store.close()
    assert second.parent == first.parameters
    assert third.parent == second.parameters
    assert (second.cohort, first.memory, second.memory) == (4.0, None, None)  # old optimiser states are dropped
    assert third.memory is not None
    seals = {messages.decode(Signed, row.seal).body for row in rows}
    assert all(len(model.set_hash) == 32 and model.salt for model in (second, third))
    assert len(seals) == 2
    signed = messages.sign(COORDINATOR, Model("tiny", 2, bytes(32), third.parameters))
    assert messages.verify(Model, COORDINATOR.public_key, signed).round == 2


def test_only_one_server_runs_on_a_store(tmp_path):
    fleet = make(tmp_path)
    with pytest.raises(StoreError, match="another process"):
        fleet.start()
    fleet.close()
    with pytest.raises(TransportError):
        fleet.hub.receive(0.0)


# --- garbage


def test_frames_that_are_not_due_change_nothing(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    fleet = make(tmp_path)
    fleet.run(fleet.saw(events.Contributed, 2))
    device, helper = fleet.devices[0], fleet.devices[DEVICES]
    bad = [
        b"",
        b"\xff" * 100,
        bytes(128 << 10),
        encode_frame(Letter(b"no envelope")),
        encode_frame(Letter(wrap(Release, messages.sign(helper.identity, Release(bytes(32), bytes(32), 1, [b"aa"]))))),
        encode_frame(Chunk(bytes(32), 0, b"x", [])),
        encode_frame(Pull(bytes(32), [0])),
        encode_frame(Prekeys([Signed(b"", bytes(64))])),
        encode_frame(Upload(Signed(b"", bytes(64)), _blob_of(5).ref)),
        encode_frame(Letter(_blob_of(2 << 20).ref)),
        encode_frame(Leaving()),
    ]
    for frame in bad:
        fleet.hub._devices[device.name].send(frame)
    fleet.turn()
    fleet.connect(device)
    finish(fleet)
    lines = [record.getMessage() for record in caplog.records if device.name[:16] in record.getMessage()]
    assert len(lines) >= 6
    assert all(line.startswith(f"device {device.name[:16]}: ") for line in lines)


@pytest.fixture(scope="module")
def collecting(tmp_path_factory):
    """A fleet in the middle of a round, with frames of every kind that it really sent."""
    fleet = make(tmp_path_factory.mktemp("garbage"), devices=6, n_max=6, expected=4, helpers=3)
    sent = []
    original = MemoryHub._put

    def record(hub, item):
        if hasattr(item, "frame"):
            sent.append(item)
        original(hub, item)

    MemoryHub._put = record
    try:
        fleet.run(fleet.saw(events.RoundOpened))
        last = fleet.devices[5]
        fleet.leave(last)
        fleet.run(fleet.saw(events.Contributed, 5))
    finally:
        MemoryHub._put = original
    yield fleet, sent
    fleet.close()


@settings(max_examples=150)
@given(data=st.data())
def test_no_bytes_whatever_end_the_server_or_touch_what_is_stored(collecting, data):
    fleet, sent = collecting
    item = data.draw(st.sampled_from(sent))
    frame = bytearray(item.frame)
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(frame) - 1))
        frame[at] ^= data.draw(st.integers(1, 255))
    device = data.draw(st.sampled_from([d.name for d in fleet.devices]))
    frame = bytes(frame[: data.draw(st.integers(0, len(frame)))]) if data.draw(st.booleans()) else bytes(frame)
    (live,) = fleet.server._live.values()
    before, slots = live.sums.copy(), list(live.slots)
    fleet.server._on_frame(device, frame, fleet.clock())
    fleet.server._commit()
    assert live.slots == slots
    assert (live.sums == before).all()


def test_what_was_recorded_for_garbage_holds_every_kind_of_frame(collecting):
    _, sent = collecting
    kinds = {type(decode_up(item.frame)).__name__ for item in sent}
    assert kinds >= {"Hello", "Prekeys", "Upload", "Chunk", "Leaving"}


# --- restarts and kills


def test_a_restart_in_every_phase_goes_on_with_the_same_round(tmp_path):
    fleet = make(tmp_path, rounds=2)
    kinds = (events.RoundOpened, events.Contributed, events.RoundSealed, events.RoundCertified, events.ModelPublished)
    for kind in kinds:
        fleet.run(fleet.saw(kind))
        fleet.restart()
    ended = finish(fleet, rounds=2)
    assert [truth.number for truth in ended] == [0, 1]


def test_uploads_are_flushed_before_the_rows_that_name_them(tmp_path, monkeypatch):
    order = []
    fdatasync = os.fdatasync

    def spy(fd):
        fdatasync(fd)
        order.append("flushed")

    monkeypatch.setattr("coordinator.vectors.os.fdatasync", spy)
    fleet = make(tmp_path, server={"passed": order.append})
    fleet.run(fleet.saw(events.Contributed, DEVICES))
    fleet.close()
    pending = False
    for point in order:
        if point == "vector written":
            pending = True
        elif point == "flushed":
            pending = False
        elif point == "before commit":
            assert not pending, order
    assert order.count("vector written") == DEVICES


def test_what_a_member_said_counts_after_a_restart_though_it_is_gone(tmp_path):
    """With three helpers all must sign and two must answer: one signs and answers, and is never seen again."""
    fleet = make(tmp_path)
    gone, other, silent = fleet.devices[DEVICES:]
    fleet.run(fleet.saw(events.Contributed, DEVICES))
    fleet.leave(other)
    fleet.leave(silent)
    (live,) = fleet.server._live.values()
    number = live.round.epoch.member_number(gone.identity.public_key)
    fleet.run(lambda: live.posts[number].has_signed)
    fleet.restart()
    (live,) = fleet.server._live.values()
    assert live.posts[number].has_signed
    for helper in (other, silent):
        helper.lie = lambda device, kind, reply: wrap(Release, Signed(b"", bytes(64))) if kind == "release" else reply
    fleet.connect(other, silent)
    fleet.run(lambda: live.posts[number].has_answered or fleet.server._live[live.tid].posts[number].has_answered)
    fleet.leave(gone)
    fleet.restart()
    other.lie = None
    finish(fleet)


def killed(directory, devices=DEVICES, **task):
    parties, boxes = make_devices(devices), make_helpers(HELPERS)
    store = Store(directory / "fleet")
    enrol(store, parties, boxes)
    add_task(store, **task)
    store.close()
    return KilledFleet(directory / "fleet", parties + boxes)


POINTS = [
    ("vector written", 1),
    ("vector written", 3),
    ("vectors synced", 1),
    ("sums saved", 1),
    ("answer sent", 1),
    ("answer sent", 9),
    ("model written", 1),
    *(("before commit", n) for n in (2, 3, 4, 5, 6, 8, 10, 12)),
    *(("committed", n) for n in (1, 2, 3, 4, 5, 6, 8, 10, 12)),
]


@pytest.mark.parametrize("point", POINTS, ids=lambda p: f"{p[0]} {p[1]}".replace(" ", "-"))
def test_a_kill_at_each_point_of_the_write_order_loses_and_repeats_nothing(tmp_path, point, monkeypatch):
    monkeypatch.setattr("coordinator.live.CHECKPOINT_SLOTS", 2)
    fleet = killed(tmp_path)
    fleet.kills = [point]
    fleet.start()
    fleet.run(lambda: published(fleet.directory) == 1)
    fleet.stop()
    assert fleet.deaths == 1, f"{point} was never passed"
    (truth,) = rounds_in(fleet.directory)
    assert_exact(truth, fleet.devices, bits(DEVICES))
    assert truth.senders == set(range(DEVICES))


def test_kills_at_any_time_one_after_another_lose_and_repeat_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("coordinator.live.CHECKPOINT_SLOTS", 2)
    fleet = killed(tmp_path, rounds=2)
    fleet.kills = [("before commit", 3), ("committed", 4), ("answer sent", 5), ("before commit", 2), ("committed", 3)]
    fleet.start()
    turn = 0

    def done():
        nonlocal turn
        turn += 1
        if turn % 7 == 0 and fleet.deaths < 12:
            fleet.kill()
        return published(fleet.directory) == 2

    fleet.run(done)
    fleet.stop()
    assert fleet.deaths >= 8
    for truth in rounds_in(fleet.directory):
        if truth.phase == "DONE":
            assert_exact(truth, fleet.devices, bits(DEVICES))


def test_a_vector_damaged_on_disk_stops_the_server_with_its_place(tmp_path):
    fleet = make(tmp_path)
    fleet.run(fleet.saw(events.Contributed, 3))
    (live,) = fleet.server._live.values()
    path = live.vectors.directory / "vectors"
    fleet.server.close()
    with path.open("r+b") as file:
        file.seek(live.vectors.slot_bytes + 5)
        file.write(b"\x00\x01\x02")
    with pytest.raises(StoreError, match=r"slot 1 of .* is not what its sender signed"):
        fleet.start()
    fleet.hub.close()
