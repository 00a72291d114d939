"""What the server keeps of a task, and when its next ticket is tried before its time."""

import pytest
from fleet import START_S, LocalAuthority, add_task, enrol, make_devices

from coordinator.rows import ContributionRow, EpochRow, RoundRow
from coordinator.running import MODELS_SERVED, RunningTask
from coordinator.store import Store
from edge_sdk.protocol import messages
from edge_sdk.protocol.authority import FleetEpoch


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "store")
    add_task(store, schedule="pause_s = 20")
    yield store
    store.close()


def restored(store):
    with store.reading() as t:
        (row,) = t.tasks()
        return RunningTask.restore(t, row)


def test_the_newest_models_are_kept_and_the_last_is_the_one(store):
    running = restored(store)
    first = running.model
    assert first.number == 0
    for number in range(1, MODELS_SERVED + 2):
        running.publish(first._replace(number=number))
        assert running.model.number == number
    assert [model.number for model in running.models] == list(range(2, MODELS_SERVED + 2))


def test_a_devices_contributions_are_counted_over_epochs_whatever_its_place_in_the_roster(store):
    devices = sorted(make_devices(6), key=lambda device: device.identity.public_key)
    keys = [device.identity.public_key for device in devices]
    enrol(store, devices)
    authority, previous = LocalAuthority("everyone"), None
    for roster, senders in ((keys, [0, 1]), (keys[1:], [0, 2])):
        signed = authority.next_epoch(roster, [], [1], previous, START_S)
        epoch = FleetEpoch(authority.public_key, signed)
        previous = EpochRow(epoch.number, epoch.id, messages.encode(signed), tuple(roster), START_S)
        tid = bytes([epoch.number]) * 32
        row = RoundRow(tid, "tiny", epoch.number, epoch.number, b"", 0, "DONE", START_S, *[None] * 5, "")
        with store.transaction() as t:
            t.add_epoch(previous)
            t.add_round(row, [])
            t.add_contributions(tid, [ContributionRow(n, s, bytes(32), None) for n, s in enumerate(senders)])
    assert restored(store).sends == {keys[0]: 1, keys[1]: 2, keys[3]: 1}


def test_the_last_prekey_that_is_waited_for_has_the_ticket_tried_at_once_and_no_other_does(store):
    running = restored(store)
    running.retry_s = 5.0
    running.prekeys_came(b"one")
    assert running.retry_s == 5.0, "none was waited for"
    running.lacks_prekeys = {b"one", b"two"}
    tried = []
    for member in (b"three", b"one", b"one", b"two"):
        running.prekeys_came(member)
        tried.append(running.retry_s == 0.0)
    assert tried == [False, False, False, True]


def test_a_device_that_comes_has_it_tried_only_if_devices_are_what_it_lacks(store):
    running = restored(store)
    running.retry_s = 5.0
    running.device_came()
    assert running.retry_s == 5.0
    running.lacks_devices = True
    running.device_came()
    assert running.retry_s == 0.0
    running.try_anew()
    running.retry_s = 5.0
    running.device_came()
    assert running.retry_s == 5.0


def test_nothing_that_comes_cuts_the_pause_short(store):
    running = restored(store)
    running.round_ended(100.0)
    running.lacks_devices, running.lacks_prekeys = True, {b"one"}
    running.device_came()
    running.prekeys_came(b"one")
    assert running.next_s == 120.0
