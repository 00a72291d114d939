"""Ledger heads as the coordinator remembers them: at once, and the same after a restart."""

from types import SimpleNamespace

import pytest
from fleet import enrol, make_devices, seed

from coordinator.heads import Heads
from coordinator.store import Store
from edge_sdk.protocol import messages
from edge_sdk.protocol.anchors import LedgerForked
from edge_sdk.protocol.messages import Anchor, Header

DEVICE, OTHER = make_devices(2)
KEY = DEVICE.identity.public_key


def header(entries, history="one", device=DEVICE):
    hashed = bytes(32)
    ledger = Anchor(entries, seed("ledger", history, entries))
    content = Header(hashed, 0, device.identity.public_key, [], 0, hashed, hashed, hashed, ledger)
    return content, messages.sign(device.identity, content)


def ticket(number):
    """All that is asked of one."""
    return SimpleNamespace(task="tiny", round=number)


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "store")
    enrol(store, [DEVICE, OTHER])
    yield store
    store.close()


def write(store, effect):
    with store.transaction() as t:
        effect(t)


def entries_shown(heads):
    row = heads.longest(KEY)
    return row and row.entries


def test_of_a_devices_headers_the_longest_is_shown_in_whatever_order_they_came(store):
    heads = Heads(store)
    assert entries_shown(heads) is None
    assert [heads.note(*header(entries)) for entries in (2, 1, 2, 3)] == [True, False, False, True]
    assert entries_shown(heads) == 3
    assert messages.decode(messages.Signed, heads.longest(KEY).signed) == header(3)[1]


def test_what_was_only_noted_is_not_known_after_a_restart_and_what_was_kept_is(store):
    heads = Heads(store)
    heads.note(*header(2))
    assert entries_shown(Heads(store)) is None
    write(store, heads.keep(ticket(0), [header(2)[1]]))
    again = Heads(store)
    assert entries_shown(again) == 2
    assert again.anchors == heads.anchors
    with pytest.raises(LedgerForked, match="has 2 entries, and had 2 in round 0"):
        again.anchors.check("tiny", 1, header(2)[0])


@pytest.mark.parametrize(("entries", "shown"), [(1, 2), (3, 3)])
def test_a_fork_is_kept_for_good_and_shows_nothing_shorter(store, entries, shown):
    heads = Heads(store)
    heads.note(*header(2))
    write(store, heads.keep(ticket(4), [header(2)[1]]))
    heads.anchors = heads.anchors.shown("other", 0, [header(3)[0]])
    write(store, heads.keep_fork(ticket(5), *header(entries, "another")))
    for known in (heads, Heads(store)):
        assert KEY in known.anchors.forked
        assert entries_shown(known) == shown


def test_of_a_device_that_forked_a_round_keeps_no_head(store):
    heads = Heads(store)
    heads.anchors = heads.anchors.shown("other", 0, [header(1)[0]])
    write(store, heads.keep_fork(ticket(0), *header(1, "another")))
    signed = []
    for one in (header(5), header(1, device=OTHER)):
        heads.note(*one)
        signed.append(one[1])
    write(store, heads.keep(ticket(1), signed))
    assert set(Heads(store).anchors.newest) == {OTHER.identity.public_key}
