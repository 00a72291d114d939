"""Who and what is refused by whole installations: with a reason in a log, and nothing that it sent is read.

What brokers, enrolment and devices refuse one by one is in tests/broker, tests/coordinator and tests/device.
"""

import shutil
import ssl
import subprocess
import sys
import threading
import time

import paho.mqtt.client as paho
import pytest
from installation import BUNDLE, DEADLINE_S, DEVICES, PUBLISHER, everyone
from paho.mqtt.enums import CallbackAPIVersion

from coordinator.serving import Directory
from coordinator.store import Store
from edge_sdk.bundle import Bundle, write_bundle
from edge_sdk.crypto.identity import Identity
from edge_sdk.protocol import messages
from edge_sdk.protocol.authority import Roster
from edge_sdk.protocol.messages import Signed, Ticket
from edge_sdk.transport import Connected
from edge_sdk.transport.chunks import Blob, parcel_of
from edge_sdk.transport.mqtt import Credentials, MqttHub
from edge_sdk.transport.wire import Enrolment, Leaving, Model, TaskState, Welcome, encode_frame

MALLORY = Identity(b"mallory".ljust(32))


class Client:
    """An MQTT client that keeps to no rules of ours."""

    def __init__(self, it, name, files):
        self.messages, self._done, self._changed = [], set(), threading.Condition()
        self.state = "connecting"
        client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id=name, protocol=paho.MQTTv311, reconnect_on_failure=False
        )
        context = ssl.create_default_context(cafile=it.home / "ca.pem")
        if files is not None:
            context.load_cert_chain(*files)
        client.tls_set_context(context)
        client.on_connect = lambda c, u, f, code, p: self._set("refused" if code.is_failure else "connected")
        client.on_disconnect = lambda c, u, f, code, p: self._set("closed")
        client.on_message = lambda c, u, message: self.messages.append((message.topic, message.payload))
        client.on_subscribe = lambda c, u, mid, codes, p: self._finish(mid)
        client.on_publish = lambda c, u, mid, code, p: self._finish(mid)
        self._client = client
        try:
            client.connect("127.0.0.1", it.broker_port)
        except OSError:
            self.state = "refused"
        else:
            client.loop_start()

    def _set(self, state):
        with self._changed:
            self.state = "refused" if self.state in ("connecting", "refused") else state
            if state == "connected":
                self.state = state
            self._changed.notify_all()

    def _finish(self, mid):
        with self._changed:
            self._done.add(mid)
            self._changed.notify_all()

    def _wait(self, condition):
        with self._changed:
            assert self._changed.wait_for(condition, DEADLINE_S), self.state

    @property
    def outcome(self):
        self._wait(lambda: self.state != "connecting")
        return self.state

    def publish(self, topic, payload):
        mid = self._client.publish(topic, payload, qos=1).mid
        self._wait(lambda: mid in self._done or self.state == "closed")

    def flood(self, topic, payload, count):
        for _ in range(count):
            self._client.publish(topic, payload, qos=0)

    def subscribe(self, topic):
        _, mid = self._client.subscribe(topic, qos=1)
        self._wait(lambda: mid in self._done or self.state == "closed")

    def close(self):
        self._client.disconnect()
        self._client.loop_stop()


def join_by_command(it, name, token):
    """`edge-device join` as somebody types it: its exit code and its last words."""
    done = subprocess.run(
        [sys.executable, "-m", "edge_sdk", "join", token, "--dir", str(it.directory / name)],
        capture_output=True, text=True, check=False, timeout=DEADLINE_S,
    )  # fmt: skip
    return done.returncode, done.stderr


def wait_log(it, *words):
    """Until the coordinator's log has a line with all these words."""
    deadline = time.monotonic() + DEADLINE_S
    while not any(all(word in line for word in words) for line in it.log("coordinator").splitlines()):
        assert time.monotonic() < deadline, it.log("coordinator")
        time.sleep(0.02)


def test_strangers_trespassers_and_used_or_old_tokens_are_refused_while_a_round_goes_on(install, broker):
    it = install("--broker", broker)
    it.populate()
    gate = it.gate("device0")
    it.add_task(rounds=1)
    gate.entered()

    stranger = Client(it, "stranger", None)
    assert stranger.outcome == "refused"
    wait_log(it, "certificate")

    victim, name = it.key("device1").hex(), it.key("device0").hex()
    own = (it.directory / "device0" / "tls.pem", it.directory / "device0" / "tls.key")
    it.kill("device0")  # its place at the broker is the thief's
    thief = Client(it, name, own)
    assert thief.outcome == "connected"
    for topic in (f"fl/v1/dn/{victim}", f"fl/v1/up/{victim}", "fl/v1/up/+", "#"):
        thief.subscribe(topic)
    for topic in (f"fl/v1/up/{victim}", f"fl/v1/dn/{victim}"):
        thief.publish(topic, b"forged")
        thief.publish(topic, encode_frame(Leaving()))
    for action in ("subscribe", "publish"):
        wait_log(it, f"{name[:16]} may not {action}", victim, "refused")

    spent = it.operator("invite")[0]["token"]
    it.join("device9", token=spent)
    code, said = join_by_command(it, "copy", spent)
    assert (code, "spent" in said or "used" in said) == (1, True), said
    wait_log(it, "refused (spent)", "a copied card, or a token that was given twice")
    directory, store = Directory.open(it.home), Store(it.home)
    old = directory.desk(store).invite("device", [], 60, int(time.time()) - 61).text
    store.close()
    code, said = join_by_command(it, "late", old)
    assert (code, "expired" in said) == (1, True), said
    wait_log(it, "refused (expired)")
    assert it.operator("status")[0]["devices"] == DEVICES + 1

    thief.close()
    gate.open()
    it.run("device0")
    it.wait("coordinator", "task_done", task="digits")
    assert it.check() == {0: everyone(it)}
    assert thief.messages == []
    assert [line for line in it.journal.lines("coordinator", "refused") if line["device"] == victim] == []
    assert it.journal.lines("device1", "warned") == []


def test_a_device_that_floods_is_shut_out_by_the_broker_while_a_round_goes_on(install, broker):
    it = install("--broker", broker)
    it.populate()
    gate = it.gate("device0")
    it.add_task(rounds=1)
    gate.entered()
    it.join("mallory")
    name = it.key("mallory").hex()
    mallory = Client(it, name, (it.directory / "mallory" / "tls.pem", it.directory / "mallory" / "tls.key"))
    assert mallory.outcome == "connected"
    mallory.flood(f"fl/v1/up/{name}", b"\xc1" * 20, 5000)
    wait_log(it, name[:16], "it floods: frames that nobody asked for are dropped")
    wait_log(it, name[:16], "the broker keeps it out for a while")
    it.wait("coordinator", "refused", device=name, reason="it floods: frames that nobody asked for are dropped")
    gate.open()
    it.wait("coordinator", "task_done", task="digits")
    mallory.close()
    assert it.check() == {0: everyone(it)}
    assert len([line for line in it.log("coordinator").splitlines() if name[:16] in line]) < 250


@pytest.mark.parametrize("kind", ["mosquitto", "amqtt", "external"])
def test_a_revoked_device_is_shut_out_in_the_middle_of_a_round(install, kind):
    """At the broker; and with a broker that nobody told, in the coordinator."""
    it = install("--broker", kind)
    if kind == "external":
        it.start_amqtt()
    it.populate()
    gate = it.gate("device0")
    it.add_task(rounds=1, open_s=5)
    gate.entered()
    revoked = it.key("device0").hex()
    it.operator("revoke", revoked)
    wait_log(it, f"device {revoked[:16]} is revoked")
    gate.open()
    it.wait("device0", "contributed", round=0)
    if kind == "external":
        it.wait("coordinator", "refused", device=revoked, reason="it is not enrolled, or was revoked")
    elif kind == "amqtt":
        it.wait("device0", "offline")
    it.wait("coordinator", "task_done", task="digits")
    assert it.check() == {0: everyone(it) - {it.key("device0")}}
    assert it.delivered().get("device0") is None
    if kind != "external":
        it.kill("device0")
        place = it.run("device0")
        it.wait("device0", "offline", since=place)
        wait_log(it, "revoked")


def test_a_bundle_of_another_publisher_is_refused_by_every_device(install):
    it = install()
    it.populate("digits", "other")
    bundle = Bundle.read(BUNDLE, bytes.fromhex(PUBLISHER))
    path = it.directory / "other.bundle"
    graphs = {name: bundle.file(name) for name in ("train.onnx", "predict.onnx")}
    path.write_bytes(write_bundle(bundle.manifest, graphs, bundle.parameters(), MALLORY))
    it.add_task(rounds=1, name="other", bundle=path, publisher=MALLORY.public_key.hex(), open_s=1)
    it.wait("coordinator", "round_aborted", task="other")
    for number in range(DEVICES):
        it.wait(f"device{number}", "refused", task="other")
        assert it.journal.lines(f"device{number}", "training") == []
        assert "not by the publisher" in it.journal.lines(f"device{number}", "refused")[0]["reason"]


def test_the_coordinator_of_another_fleet_at_the_same_address_gets_nothing(install):
    it = install()
    it.populate(devices=0)
    names = [f"device{number}" for number in range(DEVICES)]
    for name in names:
        it.join(name, "digits")
    it.processes["coordinator"].stop()
    other = install(where="other", ports=(it.enrolment_port, it.broker_port))
    other.serve()
    it.run("device0")
    it.wait("device0", "offline")
    (said,) = it.journal.lines("device0", "offline")
    assert "certificate" in said["reason"]
    it.kill("device0")
    other.processes["coordinator"].stop()

    # The same with the fleet's CA and all TLS keys stolen, and with all devices on the thief's list.
    for name in ("ca.pem", "ca.key", "server.pem", "server.key", "client.pem", "client.key", "crl.pem"):
        shutil.copy(it.home / name, other.home / name)
    store = Store(other.home)
    with store.transaction() as t:
        for name in names:
            t.add_device(it.key(name), "device", [], time.time())
    other.serve()
    other.add_task(rounds=1)
    for name in names:
        it.run(name)
    for name in names:
        it.wait(name, "warned")
        assert "epoch" in it.journal.lines(name, "warned")[0]["reason"]
    with store.reading() as t:
        assert [t.spare_prekeys(it.key(name), time.time()) for name in names] == [0] * DEVICES
        assert t.rounds("digits") == []
    store.close()
    assert it.journal.lines(event="training") == []


def test_a_ticket_that_the_pinned_coordinator_did_not_sign_is_refused_though_it_came_by_its_broker(install):
    """A thief has the coordinator's TLS key and every message that was ever sent, but not the key that signs."""
    it = install("--broker", "external")
    it.start_amqtt()
    it.populate()
    it.add_task(rounds=1)
    it.wait("coordinator", "task_done", task="digits")
    it.kill("coordinator")

    store, honest = Store(it.home), Directory.open(it.home).identity
    with store.reading() as t:
        row, epoch, model, task = t.last_round("digits"), t.newest_epoch(), t.newest_model("digits"), t.task("digits")
    bundle, parameters = Blob.from_file(store.blob_path(task.bundle_file)), store.blob(model.parameters)
    store.close()
    before = messages.decode(Ticket, messages.decode(Signed, row.ticket).body)
    closes_s = int(time.time()) + 60
    changes = {"round": 1, "previous": row.tid, "parameters": model.parameters}
    changes |= {"closes_s": closes_s, "expires_s": closes_s + 60}
    forged = messages.sign(MALLORY, Ticket(**{f: getattr(before, f) for f in Ticket.__struct_fields__} | changes))
    offered = messages.sign(honest, Model("digits", model.number, before.bundle, model.parameters))
    ticket, _ = parcel_of(messages.encode(forged))
    announced, _ = parcel_of(epoch.signed)
    state = TaskState(messages.encode(offered), bundle.ref, Blob.of(parameters).ref, ticket)
    index, proof = Roster(epoch.roster).enrolment(it.key("device0"))
    welcome = Welcome(int(time.time()), announced, Enrolment(index, list(proof)), [state])

    own = Credentials(it.home / "ca.pem", it.home / "client.pem", it.home / "client.key")
    hub = MqttHub(f"mqtts://127.0.0.1:{it.broker_port}", own)
    try:
        deadline = time.monotonic() + DEADLINE_S
        while not any(isinstance(item, Connected) for item in hub.receive(0.5)):
            assert time.monotonic() < deadline
        place = len(it.journal.said)
        hub.send(it.key("device0").hex(), encode_frame(welcome))
        it.wait("device0", "refused", since=place, task="digits")
    finally:
        hub.close()
    assert "signature" in it.journal.lines("device0", "refused")[0]["reason"]
    assert [line["round"] for line in it.journal.lines("device0", "training")] == [0]
    assert it.ledger("device0")["tasks"]["digits"]["rounds_entered"] == 1
