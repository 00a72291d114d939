"""What an unfriendly coordinator or broker, or a bad disk, could do to a device."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from dataclasses import replace
from types import SimpleNamespace

import pytest
from scripted import START_S, TASK, World
from training import tiny_models as tiny

from edge_sdk import events, serving
from edge_sdk.checkup import ledger_summary
from edge_sdk.errors import PeerError
from edge_sdk.fetching import Fetches
from edge_sdk.files import SPARE_DISK_BYTES
from edge_sdk.protocol import reference
from edge_sdk.protocol.member import Closed, MemberState
from edge_sdk.protocol.messages import Ticket, wrap
from edge_sdk.store import Store
from edge_sdk.transport.chunks import Blob
from edge_sdk.transport.wire import Hello, Upload


def reasons(report, kind) -> list[str]:
    return [event.reason for event in report.events if isinstance(event, kind)]


# --- one ticket a round, whatever the coordinator signs


@pytest.mark.parametrize("restart", [False, True])
def test_a_coin_is_not_tossed_again_for_a_second_ticket_of_a_round_that_was_entered(tmp_path, restart):
    """The first ticket's coin said yes, and the device waits for its charger."""
    world = World(tmp_path)
    path = world.directory()
    key = world.identities[0].public_key
    world.ticket(0)
    seen = []

    def hook(event):
        seen.append(event)
        if isinstance(event, events.Waiting) and not restart and sum(e.name == "waiting" for e in seen) == 1:
            world.ticket(0, to_helpers=False, n_max=3, previous=bytes(32))
            world.send(key, world.welcome(key))

    report = world.device(path, conditions=lambda: "not charging", on_event=hook).run_once(60)
    assert report.count(events.Waiting) >= 1
    if restart:
        world.ticket(0, to_helpers=False, n_max=3, previous=bytes(32))
        report = world.device(path).run_once(60)
    assert ledger_summary(path).lifetime.rounds_entered == 1
    assert "same round" in reasons(report, events.Refused)[0]
    assert world.heard_of(Upload) == []


def test_after_a_ticket_that_was_entered_an_earlier_round_is_not(tmp_path):
    world = World(tmp_path)
    path = world.directory()
    world.ticket(7)
    world.device(path, conditions=lambda: "not charging").run_once(60)
    world.ticket(3, to_helpers=False)
    report = world.device(path).run_once(60)
    assert "before the last one" in reasons(report, events.Refused)[0]
    assert ledger_summary(path).lifetime.rounds_entered == 1


# --- the owner's word


def test_a_task_that_its_owner_forbids_after_the_coin_is_not_trained(tmp_path):
    world = World(tmp_path)
    path = world.directory()
    world.ticket()
    answers = iter(["not charging", None])

    def conditions():
        return next(answers, None)

    def hook(event):
        if isinstance(event, events.Waiting):
            world.write_policy(path, task="another")

    world.device(path, conditions=lambda: "not charging").run_once(60)  # the coin is tossed
    report = world.device(path, conditions=conditions, on_event=hook).run_once(60)
    assert report.count(events.Training) == 0
    assert "not among those" in reasons(report, events.Refused)[-1]
    assert world.heard_of(Upload) == []


# --- a full disk


def test_a_disk_that_is_full_does_not_end_the_device(tmp_path, monkeypatch):
    world = World(tmp_path)
    path = world.directory()
    world.ticket()
    full = True

    def fails(inner):
        def call(self, *arguments):
            if full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return inner(self, *arguments)

        return call

    for name in ("save_contribution", "save_outcome", "save_idle"):
        monkeypatch.setattr(Store, name, fails(getattr(Store, name)))
    report = world.device(path).run_once(60)
    assert any("No space" in reason for reason in reasons(report, events.Warned) + reasons(report, events.Refused))
    assert world.heard_of(Upload) == []
    full = False
    assert world.device(path).run_once(60).count(events.Delivered) == 1
    assert ledger_summary(path).lifetime.rounds_sent == 1


@pytest.fixture
def no_room(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 0))


def test_a_device_without_room_for_the_model_does_not_spin_while_the_round_is_open(tmp_path, no_room):
    world = World(tmp_path)
    path = world.directory()
    world.ticket()
    report = world.device(path).run_once(300)
    assert report.reason == "time is up"
    assert sum("no room" in reason for reason in reasons(report, events.Warned)) == 1
    assert world.turns < 1000


def test_a_device_that_is_told_of_every_round_says_that_it_is_there_all_the_same(tmp_path, no_room):
    world = World(tmp_path)
    path, key, told = world.directory(), world.identities[0].public_key, [0.0]
    world.ticket()
    turn = world.turn

    def telling():
        if world.time.now_s >= told[0] + 20:
            told[0] = world.time.now_s
            world.send(key, world.welcome(key))
        turn()

    world.turn = telling
    world.device(path).run_once(600)
    assert 4 <= len(world.heard_of(Hello)) <= 8


def test_downloads_side_by_side_leave_the_spare_disk_together(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    room = SPARE_DISK_BYTES + (3 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(room, 0, room))
    fetches = Fetches(tmp_path / "blobs", 8 << 20, lambda: 0.5)
    first, second = Blob.of(bytes(2 << 20)), Blob.of(b"\1" * (2 << 20))
    assert fetches.file(first.ref) is None
    with pytest.raises(OSError, match="no room"):
        fetches.file(second.ref)
    fetches.close()


class Disk:
    """What `shutil.disk_usage` tells of every directory."""

    def __init__(self, monkeypatch, free: int) -> None:
        usage = namedtuple("usage", "total used free")
        self.free = free
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 0, self.free))


def contribution_bytes(round_) -> int:
    return round_.layout.masked_bytes + round_.share_bytes * round_.thresholds.members


def test_a_ticket_for_which_the_disk_has_no_room_costs_nothing_and_its_owner_is_told_once(tmp_path, monkeypatch):
    world = World(tmp_path)
    path, key = world.directory(), world.identities[0].public_key
    world.device(path).run_once(60)  # the model is here
    round_ = world.ticket()
    disk = Disk(monkeypatch, SPARE_DISK_BYTES + contribution_bytes(round_) - 1)
    empty = (path / "ledger").read_bytes()
    heard = []

    def tell_again(event):
        heard.append(event)
        if isinstance(event, events.Welcomed):
            world.send(key, world.welcome(key))

    for _ in range(2):
        report = world.device(path, on_event=tell_again).run_once(300)
        assert [reason.partition(" for ")[0] for reason in reasons(report, events.Waiting)] == ["the disk has no room"]
        assert (path / "ledger").read_bytes() == empty  # not even a coin
        assert world.device(path).status[TASK].what == "waiting"
    disk.free += 1
    assert world.device(path).run_once(60).count(events.Delivered) == 1
    lifetime = ledger_summary(path).lifetime
    assert (lifetime.rounds_entered, lifetime.rounds_sent) == (1, 1)


def test_a_ticket_that_waited_for_room_is_entered_in_the_same_run_when_there_is_room_for_its_model_too(
    tmp_path, monkeypatch
):
    world = World(tmp_path)
    path = world.directory()
    disk = Disk(monkeypatch, SPARE_DISK_BYTES)
    round_, model = world.ticket(), len(world.bundle_bytes) + 4 * world.bundle.dimension
    turn, seen = world.turn, []

    def freeing():
        elapsed_s = world.time.now_s - START_S
        if elapsed_s >= 30:  # after the Welcome, and before the next one
            disk.free = SPARE_DISK_BYTES + model + contribution_bytes(round_) - (elapsed_s < 80)
        seen.append(((path / "ledger").stat().st_size, elapsed_s))
        turn()

    world.turn = freeing
    report = world.device(path).run_once(300)
    assert (report.count(events.Waiting), report.count(events.Delivered)) == (1, 1)
    assert {size for size, elapsed_s in seen if elapsed_s < 80} == {512}  # no coin
    assert report.seconds < 90  # it does not wait for the next Welcome to look for the model again
    assert ledger_summary(path).lifetime.rounds_entered == 1


def test_a_ticket_that_closes_while_it_waits_for_room_has_cost_nothing(tmp_path, monkeypatch):
    world = World(tmp_path)
    path = world.directory()
    Disk(monkeypatch, 0)
    world.ticket()
    report = world.device(path).run_once(3000)
    assert report.count(events.Waiting) == 1
    assert "has closed" in reasons(report, events.Refused)[-1]
    assert report.seconds < 1500
    assert ledger_summary(path).entries == 0


def test_a_round_whose_coin_is_tossed_already_trains_when_there_is_room_again_and_is_charged_once(
    tmp_path, monkeypatch
):
    world = World(tmp_path)
    path = world.directory()
    world.ticket()
    world.device(path, conditions=lambda: "not charging").run_once(60)
    assert ledger_summary(path).lifetime.rounds_entered == 1
    disk = Disk(monkeypatch, SPARE_DISK_BYTES)
    report = world.device(path).run_once(60)
    assert (report.count(events.Waiting), report.count(events.Training)) == (1, 0)
    disk.free = 1 << 30
    assert world.device(path).run_once(60).count(events.Delivered) == 1
    assert ledger_summary(path).entries == 2


# --- models


def test_an_older_model_that_a_broker_repeats_does_not_replace_the_newest_in_predict(tmp_path):
    world = World(tmp_path)
    path = world.directory()
    device = world.device(path)
    device.run_once(60)
    world.model_round, world.parameters = 1, world.parameters + 1
    device.run_once(60)
    newest = device.predict(TASK, tiny.examples(3)[0])
    world.model_round, world.parameters = 0, world.parameters - 1
    device.run_once(60)
    assert (device.predict(TASK, tiny.examples(3)[0]) == newest).all()


def test_a_coordinator_that_opens_rounds_without_end_is_stopped_by_a_bound(monkeypatch):
    fleet = reference.make_fleet(bytes(32), 4)
    monkeypatch.setattr(serving, "MAX_SESSIONS", 1)
    kept = []
    store = SimpleNamespace(member=MemberState, save_member=lambda before, after: kept.append(after))
    member = serving.Serving(fleet.committee[0], fleet.epoch.frozen.fleet, store, os.urandom)

    def ticket(task):
        fleet.members[0] = member.state
        round_ = reference.open_ticket(fleet, task.encode().ljust(32), 10, n_max=4, task=task)
        member.state = fleet.members[0]  # with the prekey that the ticket names
        return wrap(Ticket, round_.signed)

    member.handle(ticket("one"), fleet.epoch, 1.0)
    second = ticket("two")
    before = list(kept)
    with pytest.raises(PeerError, match="1 rounds are open here already"):
        member.handle(second, fleet.epoch, 1.0)
    assert kept == before
    assert len(member.state.sessions) == 1
    for task in ("two", "three", "four"):  # the others have ended: they hold nobody up, and the oldest are forgotten
        ended = {tid: Closed(session.round, "over") for tid, session in member.state.sessions.items()}
        member.state = replace(member.state, sessions=ended)
        data = second if task == "two" else ticket(task)
        member.handle(data, fleet.epoch, 1.0)
    assert sorted(session.round.ticket.task for session in member.state.sessions.values()) == ["four", "three"]
