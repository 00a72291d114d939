"""What a client can do to the broker by itself: connect twice, fall silent, and flood it with what no quota counts."""

import asyncio
import errno
import threading
from types import SimpleNamespace

import pytest
from parties import DEADLINE_S, FRAME, MB, Party, Raw, packet, resident, text, wait_for

from coordinator.broker.amqtt import Amqtt, TopicRules, _Broker, _pass_on
from coordinator.broker.connections import Handler, Records
from coordinator.broker.inside import InsideHub
from edge_sdk.transport.wire import Leaving, encode_frame

on_amqtt = pytest.mark.parametrize("world", ["amqtt"], indirect=True)
PINGREQ = b"\xc0\0"


class Held:
    """Amqtt's loop, held between two of its steps: what clients send meanwhile it finds all at once."""

    def __init__(self, broker):
        self._go = threading.Event()
        entered = threading.Event()
        loop, _, _ = broker._running
        loop.call_soon_threadsafe(lambda: (entered.set(), self._go.wait(DEADLINE_S)))
        assert entered.wait(DEADLINE_S)

    def release(self):
        self._go.set()


def connecting(world, party):
    """A connection whose CONNECT the broker has yet to answer."""
    return Raw(world, party, wait=False)


@on_amqtt
def test_of_two_connections_of_one_device_at_once_one_stays_and_is_out_when_the_device_is(world, hub, monkeypatch):
    authenticate, entered, both = TopicRules.authenticate, [], threading.Event()

    async def together(self, *, session):
        entered.append(session)
        if len(entered) == 2:
            both.set()
        while len(entered) < 2:
            await asyncio.sleep(0)
        return await authenticate(self, session=session)

    monkeypatch.setattr(TopicRules, "authenticate", together)
    twins = [connecting(world, world.alice) for _ in range(2)]
    ended = []

    def read(raw):
        raw.wait_closed()
        ended.append(raw)

    threads = [threading.Thread(target=read, args=(raw,), daemon=True) for raw in twins]
    for thread in threads:
        thread.start()
    assert both.wait(DEADLINE_S)
    world.broker.silence([world.alice.name])
    for thread in threads:
        thread.join(DEADLINE_S)
    for raw in twins:
        raw.close()
    assert len(ended) == 2


@on_amqtt
def test_a_device_that_is_revoked_while_it_connects_is_out(world, hub, monkeypatch):
    authenticate, entered, go = TopicRules.authenticate, threading.Event(), threading.Event()

    async def slow(self, *, session):
        entered.set()
        await asyncio.to_thread(go.wait, DEADLINE_S)
        return await authenticate(self, session=session)

    monkeypatch.setattr(TopicRules, "authenticate", slow)
    raw = connecting(world, world.alice)
    assert entered.wait(DEADLINE_S)
    world.revoke(world.alice)
    Held(world.broker).release()  # it has heard of that now
    go.set()
    assert raw.wait_closed()[:2] in (b"", b"\x20\2")
    raw.close()


def test_a_device_that_is_back_does_not_wait_for_its_old_connection_to_answer(world, hub):
    old = Raw(world, world.alice)  # somewhere without power: it answers nothing any more
    new = Raw(world, world.alice)
    hub.send(new.name, b"welcome")
    assert new.socket.recv(100).endswith(b"welcome")
    new.close()
    old.close()


@on_amqtt
def test_devices_that_answer_nothing_do_not_keep_others_from_being_silenced(world, hub):
    parties = [Party(world.ca, world.directory) for _ in range(6)]
    raws = [Raw(world, party) for party in parties]
    alice = world.client(world.alice)
    assert alice.outcome == "connected"
    world.broker.silence([world.alice.name, *(raw.name for raw in raws)])
    alice.wait_closed()
    for raw in raws:
        raw.close()


def test_the_broker_ends_though_clients_do_not_take_leave_of_it(world, hub):
    raws = [Raw(world, party) for party in (world.alice, world.bob)]
    world.broker.close()
    assert not world.broker._thread.is_alive()  # it is waited for, but not as long as TLS waits for a client's leave
    for raw in raws:
        raw.close()


def test_who_is_silent_for_longer_than_it_promised_is_given_up_and_its_will_is_heard(world, hub):
    leaving = encode_frame(Leaving())
    raw = Raw(world, world.alice, keepalive=1, will=leaving)
    assert wait_for(hub, raw.name) == leaving
    raw.wait_closed()
    raw.close()


@pytest.mark.parametrize("keepalive", [0, 1])
@on_amqtt
def test_who_says_something_in_time_or_promised_nothing_is_not_given_up(world, hub, keepalive):
    raw = Raw(world, world.alice, keepalive=keepalive, will=b"gone")
    silent = Raw(world, world.bob, keepalive=2, will=b"gone")  # it takes longer to be given up than Alice would
    stop = threading.Event()

    def ping():
        while keepalive and not stop.wait(0.3):
            raw.socket.sendall(PINGREQ)

    pinging = threading.Thread(target=ping)
    pinging.start()
    assert wait_for(hub, silent.name) == b"gone"
    stop.set()
    pinging.join()
    raw.publish(b"here")
    assert wait_for(hub, raw.name) == b"here"
    for each in (raw, silent):
        each.close()


@pytest.mark.parametrize("what", ["ping", "subscribe", "unsubscribe"])
def test_a_client_that_asks_and_does_not_read_the_answers_is_held_back(world, hub, what):
    raw = Raw(world, world.alice)
    own = text(f"fl/v1/dn/{raw.name}")
    one = {
        "ping": PINGREQ,
        "subscribe": packet(0x82, b"\0\1" + own + b"\1"),
        "unsubscribe": packet(0xA2, b"\0\1" + own),
    }
    many = one[what] * (16384 // len(one[what]))
    before = resident(world)
    raw.socket.settimeout(3.0)
    sent = 0
    try:
        while sent < (3 if what == "ping" else 20) * MB:
            raw.socket.sendall(many)
            sent += len(many)
    except OSError:
        pass  # it is held back
    bob = world.client(world.bob)
    assert bob.outcome == "connected"
    assert resident(world) - before < 40 * MB
    raw.close()


def test_a_client_that_never_ends_its_deliveries_of_qos_2_costs_no_more_than_its_share(world, hub):
    raw = Raw(world, world.alice, buffer=1 << 20)  # it takes all that it is asked to go on with
    before = resident(world)
    raw.socket.settimeout(3.0)
    try:
        for number in range(1, 300 * MB // len(FRAME)):
            raw.publish(FRAME, number, qos=2)
    except OSError:
        pass  # it is held back, or was cut off
    bob = world.client(world.bob)
    assert bob.outcome == "connected"
    assert resident(world) - before < 130 * MB
    raw.close()


@pytest.fixture
def broker():
    """Amqtt's broker without a listener, and a loop to call it in."""
    with asyncio.Runner() as runner:

        async def make():
            config = {
                "listeners": {"default": {"type": "tcp"}},
                "plugins": {f"{TopicRules.__module__}.{TopicRules.__qualname__}": {}},
            }
            return _Broker(config, [], InsideHub(), MB)

        broker = runner.run(make())
        broker.run = runner.run
        yield broker


def session_of(broker, name):
    from amqtt.session import Session

    session = Session()
    session.client_id = name

    async def handler():
        return Handler(broker.plugins_manager, session)

    return session, broker.run(handler())


def test_a_subscription_that_is_late_takes_no_place_of_the_device_s_next_connection(broker):
    name = "ab" * 32
    topic = f"fl/v1/dn/{name}"
    old, new = session_of(broker, name), session_of(broker, name)
    broker._sessions[name] = new
    assert broker.run(broker.add_subscription((topic, 1), old[0])) == 0x80
    assert broker.run(broker.add_subscription((topic, 1), new[0])) == 1
    assert [session is new[0] for session, _ in broker._subscriptions[topic]] == [True]


@pytest.mark.parametrize(("asked", "granted"), [(0, 0x80), (1, 1), (2, 1)])
def test_what_goes_to_devices_is_acknowledged_whatever_they_ask_for(broker, asked, granted):
    name = "ab" * 32
    broker._sessions[name] = session_of(broker, name)
    assert broker.run(broker.add_subscription((f"fl/v1/dn/{name}", asked), broker._sessions[name][0])) == granted


def test_a_connection_that_ends_while_it_begins_has_ended(broker):
    _, handler = session_of(broker, "ab" * 32)

    async def end_and_wait():
        await handler.handle_connection_closed()
        await asyncio.wait_for(handler.wait_disconnect(), DEADLINE_S)

    broker.run(end_and_wait())


@pytest.mark.parametrize("error", [OSError(errno.EHOSTUNREACH, "no route"), ConnectionAbortedError()])
def test_a_connection_that_breaks_while_something_is_sent_is_no_fault_of_ours(broker, error):
    async def broken(*arguments, **keywords):
        raise error

    asyncio.run(_pass_on(SimpleNamespace(mqtt_publish=broken), "fl/v1/dn/a", b"", 1))
    _, handler = session_of(broker, "ab" * 32)
    handler.writer = object()

    async def answer():
        await handler._send_packet(SimpleNamespace(to_stream=broken))
        await asyncio.wait_for(handler.wait_disconnect(), DEADLINE_S)

    broker.run(answer())
    assert handler.unanswered == 0


def test_connections_read_into_one_buffer(monkeypatch):
    monkeypatch.setattr("asyncio.sslproto.SSLProtocol.__init__", lambda self: None)  # asyncio's own part
    first, second = (Records().get_buffer(-1) for _ in range(2))
    assert first.obj is second.obj


def test_a_broker_that_ends_at_this_moment_is_told_nothing_and_nobody_fails(tmp_path):
    loop = asyncio.new_event_loop()
    loop.close()
    broker = Amqtt.__new__(Amqtt)
    broker._lock, broker._closing = threading.Lock(), threading.Event()
    broker._thread = threading.Thread(target=lambda: None)
    broker._thread.start()
    broker._revoked = broker._silenced = frozenset()
    broker._running = loop, SimpleNamespace(keep_out=pytest.fail), SimpleNamespace(set=pytest.fail)
    broker.silence(["ab" * 32])
    broker.revoke(["cd" * 32])
    broker.close()
    assert (broker._silenced, broker._revoked) == ({"ab" * 32}, {"cd" * 32})
