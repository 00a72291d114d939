"""When an epoch is asked for and who is in it, without rounds: rows in, epochs out."""

import pytest
from fleet import START_S, LocalAuthority, enrol, make_devices, make_helpers

from coordinator.epochs import SETTLE_S, Epochs
from coordinator.shelf import Shelf
from coordinator.store import Store
from edge_sdk.errors import ParameterError

NEEDED_S = int(START_S) + 60
DEVICES, HELPERS = 5, 3


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "store")
    yield store
    store.close()


class Asked(LocalAuthority):
    """Remembers what it was asked for. absent: it signs nothing."""

    def __init__(self, *arguments, absent=False, **named):
        super().__init__(*arguments, **named)
        self.absent, self.asked = absent, []

    def next_epoch(self, devices, helpers, groups, previous, now_s):
        self.asked.append((len(devices), len(helpers), groups))
        return None if self.absent else super().next_epoch(devices, helpers, groups, previous, now_s)


def make(store, authority):
    began = []
    return Epochs(store, authority, Shelf(store.blob_path), began.append), began


def rows(store):
    with store.reading() as t:
        return [row for row in t.devices() if row.revoked_s is None]


def renew(epochs, store, groups=(), needed_s=NEEDED_S, now_s=START_S):
    return epochs.renew(rows(store), groups, needed_s, now_s)


def test_an_epoch_is_asked_for_once_and_then_only_when_something_changed(store):
    devices, helpers = make_devices(DEVICES + 1), make_helpers(HELPERS)
    enrol(store, devices[:DEVICES], helpers)
    authority = Asked(life_s=1e4)
    epochs, began = make(store, authority)
    for _ in range(3):
        assert renew(epochs, store) is None
    enrol(store, devices[DEVICES:])
    for _ in range(2):
        assert renew(epochs, store) is None
    with store.transaction() as t:
        t.revoke(devices[0].identity.public_key, START_S)
    for _ in range(2):
        assert renew(epochs, store) is None
    assert renew(epochs, store, needed_s=int(START_S + 1e4) + 1, now_s=START_S + 100) is None
    assert authority.asked == [(5, 3, [1]), (6, 3, [1]), (5, 3, [1]), (5, 3, [1])]
    assert [one.row.number for one in began] == [1, 2, 3, 4]
    assert epochs.in_force == began[-1]
    with store.reading() as t:
        assert t.newest_epoch() == began[-1].row


def test_a_task_of_more_groups_and_another_helper_each_ask_for_an_epoch(store):
    enrol(store, make_devices(8), make_helpers(HELPERS))
    authority = Asked()
    epochs, _ = make(store, authority)
    renew(epochs, store, groups=[1])
    renew(epochs, store, groups=[2, 1])
    renew(epochs, store, groups=[2])
    enrol(store, [], make_helpers(HELPERS + 2)[HELPERS:])
    renew(epochs, store, groups=[2])
    assert authority.asked == [(8, 3, [1]), (8, 3, [1, 2]), (8, 5, [1, 2])]


def test_while_the_authority_signs_nothing_the_old_epoch_goes_on(store):
    devices = make_devices(DEVICES + 1)
    enrol(store, devices[:DEVICES], make_helpers(HELPERS))
    authority = Asked()
    epochs, began = make(store, authority)
    assert renew(epochs, store) is None
    authority.absent = True
    enrol(store, devices[DEVICES:])
    assert renew(epochs, store) == "the fleet authority has not signed the new roster"
    assert epochs.in_force.row.number == 1
    assert len(began) == 1


def test_without_devices_or_a_safe_committee_there_is_no_epoch_and_it_says_why(store):
    epochs, began = make(store, LocalAuthority("everyone"))
    assert renew(epochs, store) == "no device is enrolled"
    enrol(store, make_devices(2))
    assert "4" in renew(epochs, store)
    assert (epochs.in_force, began) == (None, [])


def test_an_epoch_of_another_roster_is_not_taken(store):
    class Liar(LocalAuthority):
        def next_epoch(self, devices, *rest):
            return super().next_epoch(devices[1:], *rest)

    enrol(store, make_devices(DEVICES), make_helpers(HELPERS))
    epochs, began = make(store, Liar())
    with pytest.raises(ParameterError, match="another roster than it was given"):
        renew(epochs, store)
    assert (epochs.in_force, began) == (None, [])
    with store.reading() as t:
        assert t.newest_epoch() is None


def test_an_epoch_that_is_in_force_does_not_begin_again(store):
    enrol(store, make_devices(DEVICES), make_helpers(HELPERS))
    epochs, began = make(store, LocalAuthority())
    renew(epochs, store)
    epochs.begin(began[0].row)
    assert len(began) == 1


# --- a fleet that is its own committee


def offer(store, members, expires_s):
    with store.transaction() as t:
        for member in members:
            t.add_prekey(member.identity.public_key, 0, b"an offer", expires_s)


def test_members_without_a_prekey_are_silent_only_once_they_had_the_time_to_offer_one(store):
    devices = make_devices(DEVICES)
    enrol(store, devices)
    epochs, _ = make(store, LocalAuthority("everyone"))
    renew(epochs, store)
    offer(store, devices[:3], NEEDED_S)
    offer(store, devices[3:4], NEEDED_S - 1)  # not as long as the ticket
    keys = {device.identity.public_key for device in devices[3:]}
    for after_s, silent in ((SETTLE_S - 1, set()), (SETTLE_S, keys)):
        assert epochs.silent(rows(store), NEEDED_S, START_S + after_s) == silent


def test_who_was_left_out_comes_back_when_it_is_seen(store):
    devices = make_devices(DEVICES)
    enrol(store, devices)
    epochs, began = make(store, LocalAuthority("everyone"))
    renew(epochs, store)
    offer(store, devices[1:], NEEDED_S)
    later_s = START_S + SETTLE_S
    for _ in range(2):
        assert renew(epochs, store, now_s=later_s) is None
    with store.transaction() as t:
        t.seen([devices[0].identity.public_key], later_s + 1)
    renew(epochs, store, now_s=later_s + 2)
    assert [len(one.row.roster) for one in began] == [5, 4, 5]


def test_where_helpers_serve_no_device_is_silent(store):
    enrol(store, make_devices(DEVICES), make_helpers(HELPERS))
    epochs, _ = make(store, LocalAuthority())
    renew(epochs, store)
    assert epochs.silent(rows(store), NEEDED_S, START_S + 10 * SETTLE_S) == frozenset()
