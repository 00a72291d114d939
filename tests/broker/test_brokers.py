"""The same rules on every broker of ours. What must not happen is shown by what happens after it in the same order."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from parties import DEADLINE_S, Party

from coordinator.broker import Listener, start_broker
from coordinator.broker.mosquitto import LINES_AT_ONCE, _LogReader, find_mosquitto
from coordinator.ca import CertificateAuthority
from coordinator.refusals import LINES, WINDOW_S, Refusals
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


@pytest.mark.parametrize("world", ["amqtt"], indirect=True)
def test_a_message_is_not_held_against_what_others_subscribed_to(world, monkeypatch):
    # amqtt asks this for each subscription and message: with 2,000 devices three quarters of its time.
    monkeypatch.setattr("amqtt.broker.Broker._matches", lambda *_: pytest.fail("a message cost as much as the fleet"))
    hub, bob = connected(world.hub), connected(world.device(world.bob))
    bob.send(b"from bob")
    assert frames(wait_for(hub, lambda item: isinstance(item, Inbound))) == [Inbound(world.bob.name, b"from bob")]
    hub.send(world.bob.name, b"for bob")
    assert frames(wait_for(bob, lambda item: item == b"for bob")) == [b"for bob"]


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
    for _ in range(2):  # amqtt acknowledges a message before it passes it on, and takes messages and these in turn
        mallory.subscribe(f"fl/v1/dn/{world.alice.name}")
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


def test_a_silenced_device_is_not_heard_until_it_is_silenced_no_more(world):
    hub, bob = connected(world.hub), connected(world.device(world.bob))
    alice = connected(world.device(world.alice))

    def until_heard(wanted):
        """Alice and then Bob send, until Alice is heard before Bob or is not."""
        deadline, number = time.monotonic() + DEADLINE_S, 0
        while True:  # the broker hears of it a moment later, and the link comes up again by itself
            assert time.monotonic() < deadline
            number += 1
            alice.send(b"alice")
            bob.send(b"bob %d" % number)
            seen = wait_for(hub, lambda item: isinstance(item, Inbound) and item.frame == b"bob %d" % number)  # noqa: B023
            if (b"alice" in [item.frame for item in frames(seen)]) is wanted:
                return

    world.broker.silence([world.alice.name])
    until_heard(False)
    until_heard(False)
    world.broker.silence([])
    until_heard(True)


def test_a_revoked_device_stays_out_whoever_is_silenced(world):
    world.revoke(world.alice)
    world.broker.silence([world.bob.name])
    world.broker.silence([])
    assert world.client(world.bob).outcome == "connected"
    assert world.client(world.alice).outcome == "refused"


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


def wait_log(caplog, *words):
    """Until a line of the log has all these words."""
    deadline = time.monotonic() + DEADLINE_S
    while not any(all(word in line for word in words) for line in list(caplog.messages)):
        assert time.monotonic() < deadline, caplog.text
        time.sleep(0.02)


def test_who_writes_or_reads_another_s_topics_is_logged_with_what_it_tried(world, caplog):
    name, victim = world.alice.name, world.bob.name
    for topic in (f"fl/v1/up/{victim}", f"fl/v1/dn/{name}", "a, 'b' \u00e9"):
        mallory = world.client(world.alice)
        mallory.publish(topic, b"forged")
        mallory.close()
        wait_log(caplog, f"{name[:16]} may not publish {topic!r}: refused")
    mallory = world.client(world.alice)
    for topic in (f"fl/v1/dn/{victim}", f"fl/v1/up/{name}", "#"):
        mallory.subscribe(topic)
        wait_log(caplog, f"{name[:16]} may not subscribe {topic!r}: refused")


def test_a_will_for_another_s_topic_is_logged_with_it(world, caplog):
    topic = f"fl/v1/up/{world.bob.name}"
    world.client(world.alice, will=(topic, b"forged"))
    wait_log(caplog, world.alice.name[:16], f"refused: its will is for {topic!r}")


def test_nothing_is_logged_of_who_keeps_to_its_topics(world, caplog):
    name = world.alice.name
    hub, alice = connected(world.hub), world.client(world.alice, will=(f"fl/v1/up/{name}", b"gone"))
    alice.subscribe(f"fl/v1/dn/{name}")
    alice.publish(f"fl/v1/up/{name}", b"up")
    wait_for(hub, lambda item: isinstance(item, Inbound))
    hub.send(name, b"down")
    alice.wait_message(b"down")
    world.client(world.bob).publish(f"fl/v1/up/{name}", b"forged")
    wait_log(caplog, world.bob.name[:16], "refused")
    ours = [record.getMessage() for record in caplog.records if record.name == "sordino.broker"]  # amqtt has its own
    assert any(world.bob.name[:16] in line for line in ours)
    assert [line for line in ours if name[:16] in line and world.bob.name[:16] not in line] == []


@pytest.mark.parametrize("world", ["mosquitto"], indirect=True)
def test_a_revoked_device_that_is_still_connected_is_logged_as_that(world, caplog):
    alice = world.client(world.alice)
    assert alice.outcome == "connected"
    world.revoke(world.alice)
    deadline = time.monotonic() + DEADLINE_S
    while not any("it was revoked" in line for line in list(caplog.messages)):  # the broker hears of it a moment later
        assert time.monotonic() < deadline, caplog.text
        alice.publish(f"fl/v1/up/{world.alice.name}", b"after")


def test_one_client_does_not_fill_the_log_with_its_refusals(world, caplog):
    mallory = world.client(world.alice)
    for number in range(5 * LINES):
        mallory.subscribe(f"x/{number}")
    world.client(world.bob).subscribe("last")
    wait_log(caplog, f"{world.bob.name[:16]} may not subscribe 'last'")
    said = [line for line in caplog.messages if world.alice.name[:16] in line and "may not" in line]
    assert len(said) == LINES
    wait_log(caplog, f"{world.alice.name[:16]}: further refusals are only counted")


def test_refusals_that_were_kept_back_are_counted_and_said_again_after_a_while(caplog):
    now_s = 0.0
    refusals = Refusals(logging.getLogger("sordino.broker"), lambda: now_s)
    for _ in range(LINES + 5):
        refusals.topic("a" * 64, "publish", "x")
    now_s = WINDOW_S
    refusals.topic("a" * 64, "publish", "y")
    said = [line for line in caplog.messages if "may not" in line]
    assert (len(said), said[-1]) == (LINES + 1, "aaaaaaaaaaaaaaaa may not publish 'y': refused")
    assert "aaaaaaaaaaaaaaaa was refused 5 more times" in caplog.messages


@pytest.mark.parametrize("world", ["mosquitto"], indirect=True)
def test_a_broker_whose_log_nobody_reads_goes_on(world, monkeypatch):
    """What it says of 4,000 frames is more than any pipe holds."""
    reading = threading.Event()
    monkeypatch.setattr("coordinator.broker.mosquitto._LogReader.read", lambda *_: reading.wait(60) and [])
    try:
        hub, alice = connected(world.hub), connected(world.device(world.alice))
        for number in range(20):
            for _ in range(200):
                hub.send(world.alice.name, b"x")
            hub.send(world.alice.name, b"last %d" % number)
            wait_for(alice, lambda item: item == b"last %d" % number)  # noqa: B023
    finally:
        reading.set()


def test_a_client_that_has_thousands_of_lines_written_takes_little_of_our_time():
    denied = b"Denied PUBLISH from " + b"a" * 64 + b" (d0, q1, r0, m1, 'x', ... (6 bytes))"
    assert len(_LogReader(Refusals(logging.getLogger("sordino.broker"))).read([denied] * 10_000)) == LINES_AT_ONCE


@pytest.mark.parametrize("line", [
    b"Denied PUBLISH from", b"Denied PUBLISH from x (d0, q1, r0, m1, '", b"New client connected from", b"\xff\xfe",
    b"Will message specified (6 bytes) (r0, q1).", b"\tno will", b"a" * 64 + b" 1 ", b"",
])  # fmt: skip
def test_a_line_that_is_not_as_expected_accuses_nobody(line, caplog):
    reader = _LogReader(Refusals(logging.getLogger("sordino.broker")))
    reader.read([line])
    reader.read([b"Sending CONNACK to x (0, 0)", b"\t" + b"fl/v1/up/b (QoS 1)"])
    reader.read([b"a" * 64 + b" 1 fl/v1/dn/" + b"a" * 64])
    assert [line for line in caplog.messages if "its will" in line or "a" * 16 + " may" in line] == (
        ["aaaaaaaaaaaaaaaa may not subscribe '': refused"] if line.endswith(b" 1 ") else []
    )


def test_refusals_are_logged_with_a_reason(world, caplog):
    world.revoke(world.alice)
    deadline = time.monotonic() + DEADLINE_S
    while not any("revoked" in line or "certificate verify failed" in line for line in list(caplog.messages)):
        assert time.monotonic() < deadline, caplog.text
        assert world.client(world.alice).outcome in ("connected", "refused")


def test_a_connection_that_ends_in_its_handshake_is_no_refusal_and_one_that_breaks_the_rules_is(caplog):
    ended = b"OpenSSL Error[0]: error:0A000126:SSL routines::unexpected eof while reading"
    refused = b"OpenSSL Error[0]: error:0A0000C7:SSL routines::peer did not return a certificate"
    unknown = b"Client <unknown> disconnected: Protocol error."
    reader = _LogReader(Refusals(logging.getLogger("sordino.broker")))
    reader.read([ended, unknown])
    assert caplog.messages == []
    reader.read([unknown])  # with a certificate, and no MQTT
    assert caplog.messages == [f"mosquitto: {unknown.decode()}"]
    reader.read([refused, unknown])
    assert caplog.messages[1:] == [f"mosquitto: {refused.decode()}", f"mosquitto: {unknown.decode()}"]
    reader.read([b"Client " + b"a" * 64 + b" disconnected: Protocol error."])  # it may have been reset
    assert len(caplog.messages) == 3


@pytest.mark.parametrize("world", ["mosquitto"], indirect=True)
def test_a_connection_that_just_ends_is_no_refusal(world, caplog):
    client = world.client(world.alice)
    assert client.outcome == "connected"
    client.break_off()
    world.client(world.bob).subscribe("last")
    wait_log(caplog, f"{world.bob.name[:16]} may not subscribe 'last'")
    assert len(caplog.messages) == 1


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


@pytest.mark.parametrize("world", ["mosquitto"], indirect=True)
def test_mosquitto_does_not_speak_to_systemd_in_the_coordinator_s_place(world, monkeypatch):
    world.broker.close()
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/nobody")
    world.broker = start_broker(world.kind, world.listener, None, [])
    environment = Path(f"/proc/{world.broker.pid}/environ").read_bytes().split(b"\0")
    assert any(line.startswith(b"PATH=") for line in environment)
    assert not any(line.startswith(b"NOTIFY_SOCKET=") for line in environment)


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
