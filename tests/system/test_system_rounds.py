"""Whole rounds with real processes: what comes out is the sum of what was receipted, whoever is killed on the way.

Each test ends with `Installation.check`, which says what that means.
"""

import os
import random
import signal
import time

from installation import DEVICES, PUBLISHER, children, everyone

from edge_sdk.bundle import Bundle

ROUNDS_OF_KILLS = 3
HELPERS = 5


def test_a_task_runs_to_its_end_and_the_model_is_what_the_opened_sums_say(install, broker):
    it = install("--broker", broker)
    it.populate()
    it.add_task(rounds=4)
    it.wait("coordinator", "task_done", task="digits")
    assert it.check() == dict.fromkeys(range(4), everyone(it))
    published = it.journal.lines("coordinator", "model_published")
    assert [(line["round"], line["model"], line["contributors"]) for line in published] == [
        (number, number + 1, DEVICES) for number in range(4)
    ]
    for which in ("readers", "coordinator"):
        spent = [line["spent"][which] for line in published]
        assert 0 < spent[0] < spent[1] < spent[2] < spent[3]
    assert all(line["spent"]["coordinator"] >= line["spent"]["readers"] for line in published)
    bundle, out = it.directory / "out.bundle", it.directory / "model.f32"
    it.operator("model", "export", "digits", "--out", str(out), "--bundle", str(bundle))
    manifest = Bundle.read(bundle.read_bytes(), bytes.fromhex(PUBLISHER)).manifest
    assert out.stat().st_size == 4 * manifest.dimension


def test_kill_9_of_the_coordinator_at_drawn_moments_goes_on_with_the_same_round(install, broker):
    it = install("--broker", broker)
    it.populate()
    it.add_task(rounds=ROUNDS_OF_KILLS + 1)
    draw, place = random.Random(broker), 0
    for number in range(ROUNDS_OF_KILLS):
        kind, fields = draw.choice([
            ("round_opened", {}), ("round_sealed", {}), ("round_certified", {}),
            *(("contributed", {"contributors": came}) for came in range(1, DEVICES + 1)),
        ])  # fmt: skip
        place = it.wait("coordinator", kind, since=place, round=number, **fields)
        time.sleep(0.05 * draw.random())  # so that it is no commit point
        it.kill("coordinator")
        it.serve()
    it.wait("coordinator", "task_done", task="digits")
    assert it.check() == dict.fromkeys(range(ROUNDS_OF_KILLS + 1), everyone(it))
    opened = [line["round"] for line in it.journal.lines("coordinator", "round_opened")]
    assert len(opened) == len(set(opened))
    assert it.journal.lines("coordinator", "round_aborted") == []


def test_a_broker_that_dies_with_all_it_knew_in_the_middle_of_a_round_costs_time_alone(install, broker):
    # amqtt is a thread of the coordinator's: only one that runs elsewhere can be killed alone.
    it = install("--broker", "mosquitto" if broker == "mosquitto" else "external")
    if broker == "amqtt":
        it.start_amqtt()
    it.populate()
    gate = it.gate("device0")
    it.add_task(rounds=2)
    gate.entered()
    it.wait("coordinator", "contributed", round=0, contributors=DEVICES - 1)
    coordinator = it.pid("coordinator")
    if broker == "mosquitto":
        (child,) = children(coordinator)
        os.kill(child, signal.SIGKILL)
    else:
        it.start_amqtt()  # in place of the one that runs
    gate.open()
    it.wait("coordinator", "task_done", task="digits")
    assert it.pid("coordinator") == coordinator
    assert it.check() == dict.fromkeys(range(2), everyone(it))
    if broker == "mosquitto":
        assert len(children(coordinator)) == 1
        assert "mosquitto ended (signal 9)" in it.log("coordinator")


def test_a_device_killed_while_it_trains_or_sends_contributes_once_and_its_ledger_agrees(install, broker):
    it = install("--broker", broker)
    it.populate()
    training, sending = it.gate("device0"), it.gate("device1")
    it.add_task(rounds=2)
    training.entered()
    it.kill("device0")
    training.open()
    it.run("device0")

    sending.entered()
    it.wait("coordinator", "contributed", round=0, contributors=DEVICES - 1)
    os.kill(it.pid("coordinator"), signal.SIGSTOP)  # so that no receipt can come
    sending.open()
    it.wait("device1", "contributed", round=0)
    it.kill("device1")
    os.kill(it.pid("coordinator"), signal.SIGCONT)
    it.run("device1")

    it.wait("coordinator", "task_done", task="digits")
    assert it.check() == dict.fromkeys(range(2), everyone(it))
    assert len(it.notes()) == 2 * DEVICES, "a contribution was made twice"
    for name in ("device0", "device1", "device2"):
        spent = it.ledger(name)["tasks"]["digits"]
        assert (spent["rounds_entered"], spent["rounds_sent"]) == (2, 2)
    assert it.delivered()["device1"] == [0, 1]


def test_with_helpers_a_device_takes_part_by_one_wake_up_and_leaves(install, broker):
    it = install("--broker", broker, "--committee", "helpers")
    it.populate(helpers=HELPERS)
    it.add_task(rounds=1)
    it.wait("coordinator", "round_opened", round=0)
    names = [f"device{number}" for number in range(DEVICES)]
    for name in names:
        it.once(name)
    assert [it.wait_end(name) for name in names] == [0] * DEVICES
    it.wait("coordinator", "task_done", task="digits")
    for name in names:
        it.wait(name, "left", reason="done")
        said = [line["event"] for line in it.journal.lines(name)]
        assert [event for event in said if event in ("contributed", "delivered", "left", "answered")] == [
            "contributed", "delivered", "left",
        ]  # fmt: skip
    assert it.check() == {0: everyone(it)}
    place = it.once("device0")
    assert it.wait_end("device0") == 0
    it.wait("device0", "left", since=place, reason="done")
    assert it.delivered()["device0"] == [0]
