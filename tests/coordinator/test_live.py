"""The sums of a live round whose file the disk changed: exact all the same, or an error that names the place."""

import os

import pytest
from fleet import Fleet, add_task, assert_exact, enrol, make_devices, make_helpers, rounds_in

from coordinator import events
from coordinator.errors import StoreError
from coordinator.store import Store
from edge_sdk.protocol import messages
from edge_sdk.protocol.messages import Complaint, wrap
from edge_sdk.protocol.plan import delta_bits
from edge_sdk.transport.wire import Letter, encode_frame

DEVICES, HELPERS = 5, 3


def make(directory):
    """A fleet with one task, connected; its server has not stepped."""
    parties, boxes = make_devices(DEVICES), make_helpers(HELPERS)
    store = Store(directory / "fleet")
    enrol(store, parties, boxes)
    add_task(store)
    store.close()
    fleet = Fleet(directory / "fleet", parties + boxes)
    fleet.connect()
    return fleet


def finish(fleet, left_out):
    fleet.run(fleet.saw(events.TaskDone))
    fleet.close()
    (truth,) = rounds_in(fleet.directory)
    assert_exact(truth, fleet.devices, 32 - delta_bits(DEVICES), left_out)


def complained_about(fleet, victim):
    """A round that took everybody, and will leave this device out. Returns the live round and the device's index."""
    fleet.run(lambda: all(d.receipts for d in fleet.devices[:DEVICES]))
    (tid,) = victim.receipts
    live, index = fleet.server._live[tid], victim.enrolled.index
    for helper in fleet.devices[DEVICES : DEVICES + 2]:
        number = live.round.epoch.member_number(helper.identity.public_key)
        complaint = messages.sign(helper.identity, Complaint(tid, number, [index]))
        fleet.links[helper.name].send(encode_frame(Letter(wrap(Complaint, complaint))))
    fleet.turn()
    return live, index


def damage(live, sender):
    """One bit of a vector on disk is another one."""
    vectors = live.vectors
    with (vectors.directory / "vectors").open("r+b") as file:
        file.seek(live.slots.index(sender) * vectors.slot_bytes + 5)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("restart", [False, True])
def test_a_damaged_vector_that_is_to_be_taken_out_again_garbles_no_sum(tmp_path, restart, monkeypatch, caplog):
    monkeypatch.setattr("coordinator.live.CHECKPOINT_SLOTS", 1)
    fleet = make(tmp_path)
    live, index = complained_about(fleet, fleet.devices[2])
    damage(live, index)
    if restart:  # from the checkpoint: the vectors in it are not read
        fleet.restart()
    slot = live.slots.index(index)
    finish(fleet, left_out={index})
    assert f"slot {slot} of {live.vectors.path} is not what its sender signed" in caplog.text


def test_a_sum_that_damaged_vectors_keep_from_being_made_stops_the_server_and_blames_nobody(tmp_path):
    fleet = make(tmp_path)
    live, index = complained_about(fleet, fleet.devices[2])
    other = fleet.devices[3].enrolled.index
    damage(live, index)
    damage(live, other)
    with pytest.raises(StoreError, match=f"slot {live.slots.index(other)} of .* end the round with skip-round"):
        finish(fleet, left_out={index})
    fleet.close()
    (truth,) = rounds_in(fleet.directory)
    assert truth.phase == "CERTIFIED"
