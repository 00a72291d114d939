"""What one client costs the broker, and so the machine: it has bounds, whatever the client does or does not read."""

import asyncio
import contextlib
import socket
import ssl
import time
from collections import OrderedDict
from types import SimpleNamespace

import pytest
from parties import DEADLINE_S, FRAME, MB, Party, Raw, resident, wait_for

from coordinator.broker import start_broker
from coordinator.broker.amqtt import STUCK_S, _Broker, _is_stuck, _pass_on
from coordinator.broker.inside import InsideHub
from edge_sdk.transport.wire import MAX_FRAME_BYTES


@pytest.mark.parametrize(
    ("world", "qos"), [("mosquitto", 1), ("mosquitto", 2), ("amqtt", 0), ("amqtt", 1), ("amqtt", 2)], indirect=["world"]
)
def test_a_device_that_does_not_read_what_it_asks_for_costs_no_more_than_its_share(world, hub, qos):
    raw = Raw(world, world.alice, qos=qos)
    before = resident(world)
    deadline = time.monotonic() + 4 * DEADLINE_S
    for number in range(300 * MB // len(FRAME)):
        while hub.unsent_bytes > 4 * MB:  # as the server looks at it
            assert time.monotonic() < deadline
            time.sleep(0.005)
        hub.send(raw.name, number.to_bytes(4, "big") + FRAME[4:])  # each with memory of its own, as chunks have
    bob = world.client(world.bob)
    assert bob.outcome == "connected"
    bob.publish(f"fl/v1/up/{world.bob.name}", b"here")
    assert wait_for(hub, world.bob.name) == b"here"
    assert resident(world) - before < 130 * MB
    raw.close()


@pytest.mark.parametrize(("world", "qos"), [("mosquitto", 1), ("amqtt", 0), ("amqtt", 1)], indirect=["world"])
def test_a_device_that_sends_what_nobody_takes_costs_no_more_than_the_queue(world, hub, raw, qos):
    before = resident(world)
    raw.socket.settimeout(3.0)
    try:
        for number in range(1, 400 * MB // len(FRAME)):
            raw.publish(FRAME, number if qos else None)
    except OSError:
        pass  # it is held back
    assert resident(world) - before < 200 * MB
    assert wait_for(hub, raw.name) == FRAME  # and what waits comes when there is room again
    bob = world.client(world.bob)
    assert bob.outcome == "connected"
    bob.publish(f"fl/v1/up/{world.bob.name}", b"here")
    assert wait_for(hub, world.bob.name) == b"here"


@pytest.mark.parametrize("world", ["amqtt"], indirect=True)
def test_many_devices_that_send_what_nobody_takes_cost_no_more_than_the_queue_together(world, hub):
    raws = [Raw(world, Party(world.ca, world.directory)) for _ in range(24)]
    before = resident(world)
    for raw in raws:
        raw.socket.setblocking(False)
    progress, deadline = True, time.monotonic() + 2 * DEADLINE_S
    packets = {raw: memoryview(raw.packet(FRAME)) for raw in raws}
    left = dict.fromkeys(raws, 0)
    sent = 0
    while progress and sent < 600 * MB:  # until they all are held back
        progress = False
        quiet_by = time.monotonic() + 1.5
        while not progress and time.monotonic() < quiet_by:
            for raw in raws:
                with contextlib.suppress(ssl.SSLWantWriteError):
                    left[raw] += (count := raw.socket.send(packets[raw][left[raw] :]))
                    left[raw] %= len(packets[raw])
                    sent, progress = sent + count, True
        assert time.monotonic() < deadline
    grown = resident(world) - before
    for raw in raws:
        raw.close()
    assert sent < 600 * MB
    assert grown < 150 * MB


@pytest.mark.parametrize("world", ["amqtt"], indirect=True)
def test_connections_without_a_handshake_are_few_at_a_time_and_end_soon(world, monkeypatch, caplog):
    monkeypatch.setattr("coordinator.broker.connections.MAX_HANDSHAKES", 4)
    monkeypatch.setattr("coordinator.broker.connections.HANDSHAKE_S", 2.0)
    monkeypatch.setattr("coordinator.broker.amqtt.HANDSHAKE_S", 2.0)
    world.broker.close()
    world.broker = start_broker("amqtt", world.listener, None, [])
    idle = [socket.create_connection(("127.0.0.1", world.listener.port)) for _ in range(12)]
    try:
        for connection in idle:
            connection.settimeout(DEADLINE_S)
            assert closed(connection)
    finally:
        for connection in idle:
            connection.close()
    assert sum("4 others are under way" in line for line in caplog.messages) == 8
    deadline = time.monotonic() + DEADLINE_S
    while world.client(world.alice).outcome != "connected":  # what went away counts for HANDSHAKE_S, no longer
        assert time.monotonic() < deadline


@pytest.mark.parametrize("world", ["amqtt"], indirect=True)
def test_a_device_that_takes_nothing_for_long_is_cut_off_and_may_come_again(world, hub, raw, monkeypatch, caplog):
    monkeypatch.setattr("coordinator.broker.amqtt.STUCK_S", 0.3)
    deadline = time.monotonic() + DEADLINE_S
    while not any("is cut off: it does not read" in line for line in list(caplog.messages)):
        assert time.monotonic() < deadline
        if hub.unsent_bytes < 4 * MB:
            hub.send(raw.name, FRAME)
        else:
            time.sleep(0.005)
    assert world.client(world.alice).outcome == "connected"


def test_a_slow_device_is_not_taken_for_one_that_takes_nothing():
    session = SimpleNamespace(attributes={}, inflight_out=OrderedDict.fromkeys([7, 8, 9]))
    assert not _is_stuck(session, 0.0)
    assert not _is_stuck(session, STUCK_S - 1)
    del session.inflight_out[7]  # acknowledged
    assert not _is_stuck(session, STUCK_S + 1)
    assert not _is_stuck(session, 2 * STUCK_S)
    assert _is_stuck(session, 2 * STUCK_S + 2)


@pytest.mark.parametrize(
    ("messages", "size", "behind"),
    [(0, 0, False), (9, MAX_FRAME_BYTES, False), (10, MAX_FRAME_BYTES, True), (3000, 0, False), (6000, 0, True)],
)
def test_devices_wait_while_messages_or_bytes_pile_up_for_the_coordinator(messages, size, behind):
    link = InsideHub()
    for _ in range(messages):
        link.deliver("ab" * 32, bytes(size))
    broker = SimpleNamespace(_queue_bytes=10 * MAX_FRAME_BYTES, _link=link)
    assert _Broker._is_behind(broker) is behind


def test_a_thousand_devices_that_wait_for_the_coordinator_do_not_all_look_whether_it_keeps_up(monkeypatch):
    looks, passed = 0, []

    async def pass_on(self, session, handler, delivery):
        passed.append(session.client_id)
        return True

    def is_behind(self):
        nonlocal looks
        looks += 1
        return looks < 5

    async def run():
        broker = _Broker.__new__(_Broker)
        broker._first_to_wait = asyncio.Lock()
        delivery = asyncio.get_running_loop().create_future()
        delivery.set_result(None)
        sessions = [SimpleNamespace(client_id=str(i)) for i in range(1000)]
        await asyncio.gather(*(broker._handle_message_delivery(session, None, delivery) for session in sessions))

    monkeypatch.setattr("amqtt.broker.Broker._handle_message_delivery", pass_on)
    monkeypatch.setattr(_Broker, "_is_behind", is_behind)
    asyncio.run(run())
    assert passed == [str(i) for i in range(1000)]  # in the order in which they came
    assert looks == 1000 + 4


def closed(connection):
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


@pytest.mark.parametrize("world", ["amqtt"], indirect=True)
def test_a_connection_that_has_nothing_to_say_costs_little_whatever_it_said_before(world, hub):
    parties = [Party(world.ca, world.directory) for _ in range(40)]
    before = resident(world)
    raws = [Raw(world, party) for party in parties]
    for number in range(1, 4):
        for raw in raws:
            raw.publish(FRAME, number)
            assert raw.socket.recv(4) == b"\x40\2" + number.to_bytes(2, "big")
            assert wait_for(hub, raw.name) == FRAME
    cost = (resident(world) - before) / len(raws)
    for raw in raws:
        raw.close()
    assert cost < 320_000  # with this test's own end of it


def test_a_message_that_a_device_does_not_acknowledge_is_no_fault_of_ours():
    async def unanswered(*arguments, retain):
        raise TimeoutError

    assert asyncio.run(_pass_on(SimpleNamespace(mqtt_publish=unanswered), "fl/v1/dn/a", b"", 1)) is None
