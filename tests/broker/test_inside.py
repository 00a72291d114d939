"""The link to a broker in the own process keeps a hub's promises: what is dropped, what wakes, what is told."""

import threading

import pytest
from parties import DEADLINE_S

from coordinator.broker.inside import InsideHub
from edge_sdk.errors import ParameterError, TransportError
from edge_sdk.transport import Connected, Inbound, Lost
from edge_sdk.transport.mqtt import BATCH
from edge_sdk.transport.queues import FRAME_OVERHEAD_BYTES
from edge_sdk.transport.wire import MAX_FRAME_BYTES

ALICE, BOB = "aa" * 32, "bb" * 32


@pytest.fixture
def woken():
    return []


@pytest.fixture
def hub(woken):
    hub = InsideHub(queue_bytes=2 * (MAX_FRAME_BYTES + FRAME_OVERHEAD_BYTES))
    hub.up(lambda: woken.append(1))
    assert hub.receive(0) == [Connected()]
    return hub


def test_what_is_sent_is_taken_in_order_by_one_call_for_all_that_waits(hub, woken):
    for number in range(3):
        hub.send(ALICE if number % 2 else BOB, b"%d" % number)
    assert len(woken) == 1
    assert hub.unsent_bytes == 3 * (1 + FRAME_OVERHEAD_BYTES)
    assert hub.take(2) == [(BOB, b"0"), (ALICE, b"1")]
    assert len(woken) == 2  # by itself, for the rest
    assert hub.take(2) == [(BOB, b"2")]
    assert hub.unsent_bytes == 0
    hub.send(ALICE, b"3")
    assert len(woken) == 3


def test_what_is_over_the_limit_or_the_queue_is_dropped_and_counted(hub):
    hub.send(ALICE, bytes(MAX_FRAME_BYTES + 1))
    assert hub.dropped == 1
    hub.send(ALICE, bytes(MAX_FRAME_BYTES))
    hub.send(ALICE, bytes(MAX_FRAME_BYTES))
    hub.send(ALICE, b"")
    assert hub.dropped == 2
    assert [len(frame) for _, frame in hub.take(9)] == [MAX_FRAME_BYTES] * 2


def test_while_the_broker_is_down_nothing_is_kept(hub):
    hub.send(ALICE, b"lost")
    hub.down("it crashed")
    hub.down("it did not start again")
    hub.send(ALICE, b"dropped")
    assert hub.receive(0) == [Lost("it crashed")]
    assert (hub.dropped, hub.unsent_bytes) == (2, 0)
    hub.up(lambda: None)
    assert hub.take(9) == []
    assert hub.receive(0) == [Connected()]


def test_what_devices_say_comes_in_order_and_in_batches_and_is_counted_while_it_waits(hub):
    for number in range(BATCH + 1):
        hub.deliver(ALICE, b"%d" % number)
    hub.deliver(BOB, b"last")
    first = hub.receive(0)
    assert first == [Inbound(ALICE, b"%d" % number) for number in range(BATCH)]
    assert hub.waiting_bytes == 3 + 4 + 2 * FRAME_OVERHEAD_BYTES
    assert hub.receive(0) == [Inbound(ALICE, b"%d" % BATCH), Inbound(BOB, b"last")]
    assert hub.waiting_bytes == 0


@pytest.mark.parametrize("name", ["coordinator", "aa" * 31, "AA" * 32, "aa" * 32 + "/x", "aa" * 32 + "\n", ""])
def test_what_comes_under_a_name_that_no_device_has_is_ignored(hub, name):
    hub.deliver(name, b"x")
    assert (hub.receive(0), hub.ignored) == ([], 1)
    with pytest.raises(ParameterError, match="not a device's name"):
        hub.send(name, b"x")


def test_a_frame_over_the_limit_is_ignored(hub):
    hub.deliver(ALICE, bytes(MAX_FRAME_BYTES + 1))
    assert (hub.receive(0), hub.ignored, hub.waiting_bytes) == ([], 1, 0)


def waiting(hub, *arguments):
    """What another thread's `receive` gives, when it is asked for."""
    found = []
    thread = threading.Thread(target=lambda: found.append(hub.receive(*arguments)))
    thread.start()

    def result():
        thread.join(DEADLINE_S)
        return found[0]

    return result


def test_receive_returns_when_something_comes_and_when_there_is_room(hub):
    result = waiting(hub, DEADLINE_S)
    hub.deliver(ALICE, b"x")
    assert result() == [Inbound(ALICE, b"x")]
    hub.send(ALICE, bytes(1000))
    hub.send(ALICE, bytes(1000))
    assert hub.receive(0, 1000) == []
    result = waiting(hub, DEADLINE_S, 1000 + FRAME_OVERHEAD_BYTES)
    hub.take(1)
    assert result() == []


def test_a_closed_hub_says_so_and_keeps_nothing(hub, woken):
    hub.deliver(ALICE, b"x")
    hub.close()
    hub.close()
    hub.deliver(ALICE, b"y")
    hub.up(lambda: woken.append(1))
    hub.down("it ended")
    assert hub.waiting_bytes == 0
    with pytest.raises(TransportError):
        hub.receive(0)
    with pytest.raises(TransportError):
        hub.send(ALICE, b"x")
    assert woken == []
