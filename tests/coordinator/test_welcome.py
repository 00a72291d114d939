"""What a Welcome says, for rounds and models that are made up."""

from types import SimpleNamespace

import pytest
from fleet import AUTHORITY, COORDINATOR, START_S, LocalAuthority, add_task, enrol, make_devices, make_helpers, seed

from coordinator.epochs import Epochs
from coordinator.rows import HeaderRow
from coordinator.running import RunningTask
from coordinator.shelf import Shelf
from coordinator.store import Store
from coordinator.welcome import INLINE_TICKETS, Standing, welcome
from edge_sdk.crypto.hashing import content_hash
from edge_sdk.protocol import messages
from edge_sdk.protocol.authority import FleetEpoch
from edge_sdk.protocol.messages import Signed
from edge_sdk.transport.chunks import Blob
from edge_sdk.transport.wire import MAX_TASKS, BlobRef, Model

DEVICES = make_devices(5)
HELPERS = make_helpers(3)
LATE = make_devices(6)[5]


@pytest.fixture
def world(tmp_path):
    """A store with a task of two models, an epoch, and a shelf with the files."""
    store = Store(tmp_path / "store")
    enrol(store, DEVICES, HELPERS)
    add_task(store)
    shelf = Shelf(store.blob_path)
    epochs = Epochs(store, LocalAuthority(), shelf, lambda in_force: None)
    with store.reading() as t:
        epochs.renew(t.devices(), [1], int(START_S) + 60, START_S)
    enrol(store, [LATE])
    with store.reading() as t:
        running = RunningTask.restore(t, t.tasks()[0])
        rows = {row.key: row for row in t.devices()}
    running.publish(running.model._replace(number=1, parameters=store.put_blob(b"the second model")))
    shelf.keep([running.row.bundle_file, *(model.parameters for model in running.models)], [epochs.in_force.row.id])

    def say(device, *standings, shown=None, epoch=epochs.in_force):
        return welcome(
            rows[device.identity.public_key], epoch, shown, standings, identity=COORDINATOR, shelf=shelf, now_s=START_S
        )  # fmt: skip

    yield SimpleNamespace(say=say, running=running, shelf=shelf)
    shelf.close()
    store.close()


def ticket(number_of_model, size=100, tid=b"round"):
    """All that is asked of a round."""
    signed = Signed(bytes(size), bytes(64))
    return SimpleNamespace(tid=tid, number_of_model=number_of_model, round=SimpleNamespace(signed=signed))


def model_of(state):
    signed = messages.decode(Signed, state.model)
    return messages.verify(Model, COORDINATOR.public_key, signed)


def test_a_device_of_the_roster_gets_the_epoch_and_its_place(world):
    said = world.say(DEVICES[2])
    epoch = FleetEpoch(AUTHORITY.public_key, messages.decode(Signed, said.epoch))
    assert said.time_s == START_S
    assert epoch.frozen.roster_size == len(DEVICES)
    keys = sorted(device.identity.public_key for device in DEVICES)
    assert keys[said.enrolment.index] == DEVICES[2].identity.public_key


def test_helpers_and_who_was_enrolled_after_the_epoch_have_no_place_in_it(world):
    for device in (HELPERS[0], LATE):
        said = world.say(device)
        assert (said.epoch is not None, said.enrolment) == (True, None)
    assert world.say(DEVICES[0], epoch=None).epoch is None


def test_without_an_open_round_the_newest_model_is_told(world):
    (state,) = world.say(DEVICES[0], Standing(world.running, None)).tasks
    assert state.ticket is None
    assert model_of(state).round == 1
    assert state.parameters == Blob.of(b"the second model").ref


def test_with_a_ticket_comes_the_model_that_it_names_though_a_newer_one_is_out(world):
    (state,) = world.say(DEVICES[0], Standing(world.running, ticket(0))).tasks
    assert messages.decode(Signed, state.ticket) == ticket(0).round.signed
    assert model_of(state).round == 0
    assert state.parameters == world.shelf.file(world.running.models[0].parameters)
    assert model_of(state).parameters == world.running.models[0].parameters != content_hash(b"the second model")


def test_a_model_is_signed_once_and_each_model_by_itself(world, monkeypatch):
    said = [world.say(device, Standing(world.running, None)).tasks[0].model for device in DEVICES[:2]]
    with monkeypatch.context() as patch:
        patch.setattr("edge_sdk.protocol.messages.sign", lambda *_: pytest.fail("signed again"))
        said.append(world.say(DEVICES[2], Standing(world.running, None)).tasks[0].model)
    assert said == said[:1] * 3
    world.running.publish(world.running.model._replace(number=2))
    (state,) = world.say(DEVICES[0], Standing(world.running, None)).tasks
    assert model_of(state).round == 2


def test_tickets_beyond_what_one_frame_takes_are_fetched(world):
    half = INLINE_TICKETS // 2 - 100
    rounds = [ticket(1, half, tid) for tid in (b"one", b"two", b"three")]
    shown = HeaderRow(DEVICES[0].identity.public_key, 1, messages.encode(Signed(bytes(300), bytes(64))))
    standings = [Standing(world.running, live) for live in rounds]
    for header, inline in ((None, 2), (shown, 1)):
        said = world.say(DEVICES[0], *standings, shown=header)
        assert [isinstance(state.ticket, bytes) for state in said.tasks] == [n < inline for n in range(3)]
        for state, live in zip(said.tasks, rounds, strict=True):
            if isinstance(state.ticket, BlobRef):
                assert world.shelf.find(state.ticket.id).ref == Blob.of(messages.encode(live.round.signed)).ref


def test_a_device_is_shown_the_header_that_is_known_of_it(world):
    signed = Signed(seed("header"), bytes(64))
    assert world.say(DEVICES[0]).shown is None
    row = HeaderRow(DEVICES[0].identity.public_key, 1, messages.encode(signed))
    assert world.say(DEVICES[0], shown=row).shown == signed


def test_no_more_tasks_are_told_than_a_frame_may_hold(world):
    said = world.say(DEVICES[0], *[Standing(world.running, None)] * (MAX_TASKS + 1))
    assert len(said.tasks) == MAX_TASKS
