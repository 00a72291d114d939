"""The same rules on every broker of ours. What must not happen is shown by what happens after it in the same order."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from parties import DEADLINE_S, Party

from coordinator.broker import Listener, start_broker
from coordinator.broker.mosquitto import find_mosquitto
from coordinator.ca import CertificateAuthority
from edge_sdk.errors import ParameterError
from edge_sdk.transport import Connected, Inbound, Lost
from edge_sdk.transport.wire import MAX_FRAME_BYTES

EVERYTHING = ["#", "fl/#", "fl/v1/+/+", "fl/v1/dn/+", "+/+/+/+", "$SYS/#"]


def wait_for(link, wanted):
    """Everything that the link gives until `wanted` says yes to an item, that one included."""
    deadline, seen = time.monotonic() + DEADLINE_S, []
    while time.monotonic() < deadline:
        got = link.receive(0.5)
        seen += got if isinstance(got, list) else [got] if got is not None else []
        if any(wanted(item) for item in seen):
            return seen
    raise AssertionError(f"waited in vain: {seen[:20]}")


def connected(link):
    wait_for(link, lambda item: isinstance(item, Connected))
    return link


def frames(items):
    return [item for item in items if isinstance(item, Inbound | bytes)]


def test_frames_travel_both_ways_up_to_the_limit(world):
    hub, alice = connected(world.hub), connected(world.device(world.alice))
    large = os.urandom(MAX_FRAME_BYTES)
    alice.send(large)
    assert frames(wait_for(hub, lambda item: isinstance(item, Inbound))) == [Inbound(world.alice.name, large)]
    hub.send(world.alice.name, large)
    assert frames(wait_for(alice, lambda item: item == large)) == [large]


@pytest.mark.parametrize("who", ["nobody", "other CA", "self-signed name"])
def test_a_stranger_is_refused(world, tmp_path, who):
    connected(world.hub)
    if who == "nobody":
        party = None
    else:
        other = tmp_path / "other"
        other.mkdir()
        ca = CertificateAuthority.create(other, "test", int(time.time()))  # of the same name
        party = Party(ca, other, name=world.alice.name if who == "other CA" else "coordinator")
    stranger = world.client(party)
    assert stranger.outcome == "refused"


def test_the_server_s_certificate_is_none_of_a_client(world):
    party = Party(world.ca, world.directory)
    party.certificate, party.key = world.directory / "server.pem", world.directory / "server.key"
    party.name = "127.0.0.1"
    assert world.client(party).outcome == "refused"


def test_what_a_device_writes_to_other_topics_reaches_nobody(world):
    hub, bob = connected(world.hub), connected(world.device(world.bob))
    for topic in (f"fl/v1/up/{world.bob.name}", f"fl/v1/dn/{world.bob.name}", f"fl/v1/dn/{world.alice.name}",
                  "fl/v1/up/coordinator", f"fl/v1/up/{world.alice.name}/x", "other"):  # fmt: skip
        mallory = world.client(world.alice)
        assert mallory.outcome == "connected"
        mallory.publish(topic, b"forged")
        mallory.close()
    bob.send(b"honest")
    assert frames(wait_for(hub, lambda item: isinstance(item, Inbound) and item.frame == b"honest")) == [
        Inbound(world.bob.name, b"honest")
    ]
    hub.send(world.bob.name, b"last")
    assert frames(wait_for(bob, lambda item: item == b"last")) == [b"last"]
    assert hub.ignored == 0


def test_a_device_hears_nothing_but_its_own_topic_whatever_it_subscribes_to(world):
    hub, bob = connected(world.hub), connected(world.device(world.bob))
    mallory = world.client(world.alice)
    for topic in [
        *EVERYTHING,
        f"fl/v1/dn/{world.bob.name}",
        f"fl/v1/up/{world.bob.name}",
        f"fl/v1/dn/{world.alice.name}",
    ]:
        mallory.subscribe(topic)
    hub.send(world.bob.name, b"for bob")
    wait_for(bob, lambda item: item == b"for bob")
    bob.send(b"from bob")
    wait_for(hub, lambda item: isinstance(item, Inbound))
    hub.send(world.alice.name, b"for alice")
    mallory.wait_message(b"for alice")
    assert set(mallory.messages) == {(f"fl/v1/dn/{world.alice.name}", b"for alice")}


def test_a_device_takes_nobody_s_place_by_its_client_id(world):
    hub, bob = connected(world.hub), connected(world.device(world.bob))
    for name in (world.bob.name, "coordinator"):
        mallory = world.client(world.alice, client_id=name)
        if mallory.outcome == "connected":
            mallory.publish(f"fl/v1/up/{world.bob.name}", b"forged")
    bob.send(b"honest")
    seen = wait_for(hub, lambda item: isinstance(item, Inbound))
    hub.send(world.bob.name, b"answer")
    seen += wait_for(bob, lambda item: item == b"answer")
    assert seen == [Inbound(world.bob.name, b"honest"), b"answer"], "somebody lost the link"


def test_a_will_reaches_only_the_own_topic(world):
    hub, bob = connected(world.hub), connected(world.device(world.bob))
    mallory = world.client(world.alice, will=(f"fl/v1/up/{world.bob.name}", b"forged"))
    if mallory.outcome == "connected":
        mallory.break_off()
    honest = world.client(world.alice, will=(f"fl/v1/up/{world.alice.name}", b"gone"))
    assert honest.outcome == "connected"
    honest.break_off()
    wait_for(hub, lambda item: item == Inbound(world.alice.name, b"gone"))
    bob.send(b"honest")
    seen = wait_for(hub, lambda item: isinstance(item, Inbound) and item.device == world.bob.name)
    assert [item.frame for item in seen if isinstance(item, Inbound) and item.device == world.bob.name] == [b"honest"]


def test_nothing_is_retained(world):
    mallory = world.client(world.alice)
    mallory.publish(f"fl/v1/up/{world.alice.name}", b"retained", retain=True)
    mallory.close()
    hub, bob = connected(world.hub), connected(world.device(world.bob))
    bob.send(b"honest")
    assert frames(wait_for(hub, lambda item: isinstance(item, Inbound))) == [Inbound(world.bob.name, b"honest")]
    assert hub.ignored == 0


def test_a_packet_over_the_limit_ends_the_connection_and_reaches_nobody(world):
    hub, bob = connected(world.hub), connected(world.device(world.bob))
    mallory = world.client(world.alice)
    assert mallory.outcome == "connected"
    mallory.publish(f"fl/v1/up/{world.alice.name}", bytes(2 * MAX_FRAME_BYTES))
    mallory.wait_closed()
    bob.send(b"honest")
    assert frames(wait_for(hub, lambda item: isinstance(item, Inbound))) == [Inbound(world.bob.name, b"honest")]


def test_a_revoked_device_is_out_while_it_is_connected_and_when_it_comes_again(world):
    hub, bob = connected(world.hub), connected(world.device(world.bob))
    alice = world.client(world.alice)
    alice.subscribe(f"fl/v1/dn/{world.alice.name}")
    alice.publish(f"fl/v1/up/{world.alice.name}", b"before")
    wait_for(hub, lambda item: isinstance(item, Inbound))
    world.revoke(world.alice)
    deadline, number, silenced = time.monotonic() + DEADLINE_S, 0, False
    while not silenced:  # the broker hears of it a moment later
        assert time.monotonic() < deadline, "the revoked device is still heard"
        number += 1
        if alice.outcome == "connected":
            alice.publish(f"fl/v1/up/{world.alice.name}", b"after")
        bob.send(b"honest %d" % number)
        seen = wait_for(hub, lambda item: isinstance(item, Inbound) and item.frame == b"honest %d" % number)  # noqa: B023
        silenced = b"after" not in [item.frame for item in frames(seen)]
    hub.send(world.alice.name, b"secret")
    hub.send(world.bob.name, b"undisturbed")
    assert frames(wait_for(bob, lambda item: item == b"undisturbed")) == [b"undisturbed"]
    assert world.client(world.alice).outcome == "refused"
    assert alice.messages == []
    assert (world.kind, alice.outcome) in [("mosquitto", "connected"), ("amqtt", "closed")]


def test_a_device_that_was_revoked_before_the_start_is_out(world):
    world.broker.close()
    world.ca.write_crl([world.alice.serial], int(time.time()))
    world.broker = start_broker(world.kind, world.listener, None, [world.alice.name])
    assert world.client(world.alice).outcome == "refused"
    assert world.client(world.bob).outcome == "connected"


def kill(broker):
    if broker.name == "mosquitto":
        os.kill(broker.pid, signal.SIGKILL)
    else:
        loop, _, _ = broker._running
        loop.call_soon_threadsafe(loop.stop)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of the loop that was killed
def test_a_broker_that_is_killed_is_back_with_its_rules_and_links_come_up_again(world):
    hub, alice = connected(world.hub), connected(world.device(world.alice))
    world.revoke(world.bob)
    kill(world.broker)
    wait_for(hub, lambda item: isinstance(item, Lost))
    connected(hub)
    connected(alice)
    alice.send(b"again")
    assert frames(wait_for(hub, lambda item: isinstance(item, Inbound))) == [Inbound(world.alice.name, b"again")]
    assert world.client(world.bob).outcome == "refused"


def test_refusals_are_logged_with_a_reason(world, caplog):
    with caplog.at_level(logging.WARNING, "sordino.broker"):
        logged = threading.Event()
        handler = logging.Handler()
        handler.emit = lambda record: logged.set()
        logging.getLogger("sordino.broker").addHandler(handler)
        world.revoke(world.alice)
        deadline = time.monotonic() + DEADLINE_S
        while not logged.wait(0.05):
            assert time.monotonic() < deadline
            assert world.client(world.alice).outcome in ("connected", "refused")
        logging.getLogger("sordino.broker").removeHandler(handler)
    assert "revoked" in caplog.text or "certificate verify failed" in caplog.text


def test_a_port_that_is_taken_is_named(world):
    with pytest.raises(ParameterError, match=f"cannot listen on 127.0.0.1:{world.listener.port}"):
        start_broker(world.kind, world.listener, None, [])


def test_a_closed_broker_leaves_its_port(world):
    world.broker.close()
    world.broker.close()
    world.listener.check_free()


STANDS_ALONE = """
import sys, time
from pathlib import Path
from coordinator.broker import Listener, start_broker
broker = start_broker("mosquitto", Listener(Path(sys.argv[1]), "127.0.0.1", int(sys.argv[2])), None, [])
print(broker.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("world", ["mosquitto"], indirect=True)
def test_kill_9_of_the_coordinator_leaves_no_mosquitto(world):
    world.broker.close()
    arguments = [sys.executable, "-c", STANDS_ALONE, str(world.directory), str(world.listener.port)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as coordinator:
        child = int(coordinator.stdout.readline())
        os.kill(child, 0)
        coordinator.kill()
    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            world.listener.check_free()
        except ParameterError:
            assert time.monotonic() < deadline, "mosquitto outlived its coordinator"
        else:
            break


def test_mosquitto_is_there_for_these_tests():
    assert find_mosquitto(), "install it: apt-get install mosquitto"


def test_auto_is_mosquitto_where_there_is_one_and_amqtt_elsewhere(world, monkeypatch):
    world.broker.close()
    if world.kind == "amqtt":
        monkeypatch.setattr("coordinator.broker.mosquitto.find_mosquitto", lambda: None)
    world.broker = start_broker("auto", world.listener, None, [])
    assert world.broker.name == world.kind


def test_a_missing_mosquitto_is_named_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("coordinator.broker.mosquitto.find_mosquitto", lambda: None)
    with pytest.raises(ParameterError, match="apt-get install mosquitto"):
        start_broker("mosquitto", Listener(tmp_path, "127.0.0.1", 1), None, [])


def test_an_external_broker_needs_its_url(tmp_path):
    with pytest.raises(ParameterError, match="needs url"):
        start_broker("external", Listener(tmp_path, "127.0.0.1", 1), None, [])
    assert start_broker("external", Listener(tmp_path, "127.0.0.1", 1), "mqtts://a:1", []).url == "mqtts://a:1"


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("127.0.0.1", "mqtts://127.0.0.1:8883"),
        ("0.0.0.0", "mqtts://127.0.0.1:8883"),  # noqa: S104
        ("::", "mqtts://[::1]:8883"),
        ("fd00::7", "mqtts://[fd00::7]:8883"),
    ],
)
def test_the_coordinator_reaches_a_listener_by_an_address_of_this_machine(tmp_path, address, url):
    assert Listener(tmp_path, address, 8883).local_url == url
