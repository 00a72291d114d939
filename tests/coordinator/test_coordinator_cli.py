"""The operator's commands: each as a process or through `main`, with what it says and what it leaves."""

import contextlib
import json
import logging
import math
import queue
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from coordinator import report
from coordinator.__main__ import _parser, main
from coordinator.config import Config
from coordinator.rows import EpochRow, RoundRow
from coordinator.serving import serving_pid
from coordinator.store import Store
from coordinator.task import Planned
from edge_sdk import enrolment
from edge_sdk.bundle import Bundle
from edge_sdk.device import Device
from edge_sdk.errors import ParameterError
from edge_sdk.transport import Connected
from edge_sdk.transport.mqtt import Backoff, Credentials, MqttTransport

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "examples" / "demo" / "digits.bundle"
PUBLISHER = "a9b2780b2d21611cac8c60cc51071dc35fe7ca4b03feb45904871ff11797255f"
DEADLINE_S = 60.0
TASK = f"""
name = "digits"
bundle = "{BUNDLE}"
publisher = "{PUBLISHER}"
unit = "example"
rounds = 4

[privacy]
clip = 0.7
delta = 1e-4
noise_multiplier = 3.0
example_rate = 0.3
metric_scale = 0.01
loss_bound = 3.0

[cohort]
expected = 4
spread = 0.0
honest = 2
n_max = 4
examples = 72

[schedule]
open_s = 60
grace_s = 0.05
answer_s = 600
"""


def free_ports(count):
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@pytest.fixture(autouse=True)
def _logging_as_it_was():
    """`main` sets logging up for a process of its own."""
    handlers, level = list(logging.root.handlers), logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


class Operator:
    """Somebody with a directory, who types commands."""

    def __init__(self, directory, capsys):
        self.directory, self._capsys = directory, capsys
        self.ports = free_ports(2)
        self.serving = None

    def __call__(self, *words, code=0):
        """What a command says with --json: its objects; or with another exit code, its last words."""
        self._capsys.readouterr()
        got = main([*map(str, words), "--dir", str(self.directory), "--json"])
        said = self._capsys.readouterr()
        assert got == code, said.err
        return [json.loads(line) for line in said.out.splitlines()] if code == 0 else said.err

    @property
    def setup(self):
        ports = ["--enrolment-port", str(self.ports[0]), "--broker-port", str(self.ports[1])]
        return [*ports, "--publisher", PUBLISHER]

    def init(self, *more):
        return self("init", *self.setup, *more)[0]

    def serve(self, *more):
        """A process, as systemd or a shell would start it; it serves when this returns."""
        words = [sys.executable, "-m", "coordinator", "serve", "--dir", str(self.directory), "--json", *more]
        log = self.directory.with_suffix(".log").open("ab")
        self.serving = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT)
        log.close()
        self._said = queue.SimpleQueue()
        threading.Thread(target=self._listen, args=(self.serving.stdout, self._said), daemon=True).start()
        return self.events("serving")[-1]

    @staticmethod
    def _listen(stdout, said):
        with stdout:
            for line in stdout:
                said.put(json.loads(line))
        said.put(None)

    def events(self, last):
        """Events until one of this kind, that one included."""
        seen, deadline = [], time.monotonic() + DEADLINE_S
        with contextlib.suppress(queue.Empty):
            while (event := self._said.get(timeout=max(0.0, deadline - time.monotonic()))) is not None:
                seen.append(event)
                if event["event"] == last:
                    return seen
        log = self.directory.with_suffix(".log").read_text()
        raise AssertionError(f"no {last!r} but {[event['event'] for event in seen]}; log: {log[-2000:]}")

    def end(self, how=signal.SIGTERM):
        if self.serving is not None:
            self.serving.send_signal(how)
            code = self.serving.wait(DEADLINE_S)
            self.serving = None
            return code
        return None

    def invite(self, *more):
        return self("invite", *more)[0]["token"]


@pytest.fixture
def operator(tmp_path, capsys):
    operator = Operator(tmp_path / "fleet", capsys)
    yield operator
    operator.end(signal.SIGKILL)


@pytest.fixture
def task_file(tmp_path):
    path = tmp_path / "digits.toml"
    path.write_text(TASK)
    return path


# Setting up


def test_init_makes_keys_that_only_their_owner_reads_and_says_what_is_taken_on_trust(operator):
    made = operator("init")[0]
    keys = ["ca.key", "coordinator.key", "authority.key", "publisher.key"]
    assert all(stat.S_IMODE((operator.directory / key).stat().st_mode) == 0o600 for key in keys)
    assert stat.S_IMODE(operator.directory.stat().st_mode) == 0o700
    assert len(made["assumptions"]) == 2
    assert all("an honest coordinator is assumed" in line for line in made["assumptions"])
    assert operator("status")[0]["assumptions"] == made["assumptions"]


def test_with_keys_that_live_apart_nothing_is_assumed_and_no_key_of_theirs_is_here(operator):
    made = operator.init("--authority", "ab" * 32)
    assert made["assumptions"] == []
    assert (made["authority"], made["publishers"]) == ("ab" * 32, [PUBLISHER])
    assert not (operator.directory / "authority.key").exists()
    assert not (operator.directory / "publisher.key").exists()


def test_init_replaces_nothing(operator):
    operator.init()
    before = {path.name: path.read_bytes() for path in operator.directory.iterdir()}
    assert "is there already" in operator("init", code=1)
    assert {path.name: path.read_bytes() for path in operator.directory.iterdir()} == before


def test_an_init_that_was_cut_short_is_finished_by_the_next_with_the_same_keys(operator):
    operator.init()
    kept = (operator.directory / "coordinator.key").read_bytes()
    for name in ("coordinator.toml", "ca.pem", "authority.key"):
        (operator.directory / name).unlink()
    operator.init()
    assert (operator.directory / "coordinator.key").read_bytes() == kept


@pytest.mark.parametrize("words", [["status"], ["invite"], ["task", "list"], ["revoke", "ab" * 32]])
def test_commands_in_an_empty_directory_say_that_init_is_missing(operator, words):
    assert "edge-coordinator" in operator(*words, code=1)
    assert not (operator.directory / "coordinator.db").exists()


def test_a_directory_that_others_can_read_is_refused(operator):
    operator.directory.mkdir(mode=0o755)
    (operator.directory / "something").touch()
    assert "chmod 700" in operator("init", code=1)


def test_an_address_of_all_networks_needs_a_name(operator):
    assert "--name is needed" in operator("init", "--address", "0.0.0.0", code=1)  # noqa: S104
    operator.init("--address", "0.0.0.0", "--name", "fleet.example.org")  # noqa: S104
    assert operator("status")[0]["broker_url"].startswith("mqtts://fleet.example.org:")


@pytest.mark.parametrize("words", [[], ["fly"], ["task"], ["invite", "--role", "king"], ["revoke"]])
def test_usage_is_exit_code_2(words):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2


# coordinator.toml


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("broker_port = ", "broker_port = 0 #", r"line \d+: \[listen\] broker_port: .*>= 1"),
        ("broker_port = ", "brocker_port = 1 #", r"line \d+: \[listen\] brocker_port: there is no such key"),
        ('fleet = "sordino"', "", "fleet: missing: add it"),
        ('fleet = "sordino"', 'fleet = "So rdino"', "line 3: fleet"),
        ('kind = "auto"', 'kind = "rabbit"', r"line \d+: \[broker\] kind"),
        ('kind = "auto"', 'kind = "external"', r"line \d+: \[broker\] url: given exactly when"),
        (
            'committee = "everyone"',
            'committee = "drawn"',
            r"line \d+: \[authority\] committee_size: given exactly when",
        ),
        ("corrupt_devices = 1", "corrupt_devices = -1", r"line \d+: \[authority\] corrupt_devices: .*>= 1"),
        (
            "epoch_days = 30.0",
            'epoch_days = "long"',
            r"line \d+: \[authority\] epoch_days: expected `float`, got `str`",
        ),
        ("publishers = [", 'publishers = ["xyz", ', r"line \d+: publishers"),
        ("[limits]", "[limits", "not TOML"),
        ("[limits]", "[unlimited]", r"line \d+: unlimited|line \d+: \[unlimited\]|unlimited: there is no such key"),
    ],
)
def test_an_error_in_coordinator_toml_names_line_and_key(operator, old, new, message):
    operator("init")
    path = operator.directory / "coordinator.toml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(ParameterError, match=message):
        Config.read(operator.directory)
    assert "coordinator.toml" in operator("status", code=1)


def test_coordinator_toml_may_begin_with_the_mark_that_some_editors_put_in_front(operator):
    operator("init")
    path = operator.directory / "coordinator.toml"
    text, before = path.read_text(), Config.read(operator.directory)
    path.write_text("\ufeff" + text, encoding="utf-8")
    assert Config.read(operator.directory) == before
    path.write_text(text, encoding="utf-16")
    with pytest.raises(ParameterError, match=r"coordinator\.toml: not UTF-8 .*: save it as UTF-8"):
        Config.read(operator.directory)


# Who is in


def test_invitations_are_counted_and_differ(operator):
    operator.init()
    said = operator("invite", "--count", "3", "--tag", "kitchen", "--hours", "1")
    assert len({line["token"] for line in said}) == 3
    assert all(line["tags"] == ["kitchen"] and line["role"] == "device" for line in said)
    assert operator("status")[0]["invitations"] == 3
    assert "--count" in operator("invite", "--count", "0", code=1)
    assert "--hours" in operator("invite", "--hours", "-1", code=1)


def test_without_json_invite_prints_tokens_alone_on_stdout(operator, capsys):
    operator.init()
    capsys.readouterr()
    assert main(["invite", "--dir", str(operator.directory), "--count", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [enrolment.Token.read(line).role for line in lines] == ["device", "device"]


def test_revoke_needs_an_unambiguous_device(operator):
    operator.init()
    store = Store(operator.directory)
    with store.transaction() as rows:
        for key in (b"\xab\xcd" * 16, b"\xab\xce" * 16):
            rows.add_device(key, "device", [], 1.0)
    store.close()
    assert "names 0 devices" in operator("revoke", "ffffffff", code=1)
    assert "names 2 devices" in operator("revoke", "ab", code=1)
    assert "names 1 devices" in operator("revoke", "abcd", code=1)  # of one, but too short to be meant
    assert operator("revoke", "ABCDABCD")[0] == {"device": "abcd" * 16, "revoked": True, "was_enrolled": True}
    assert operator("revoke", "abcdabcd")[0]["was_enrolled"] is False
    assert (operator("status")[0]["devices"], operator("status")[0]["revoked"]) == (1, 1)


def test_devices_are_listed_with_who_is_away_longest_first_and_who_was_revoked_last(operator, capsys):
    operator.init()
    assert operator("devices") == []
    store = Store(operator.directory)
    with store.transaction() as rows:
        for key, role, tags in (
            (b"\x01", "device", ["oven", "kitchen"]),
            (b"\x02", "helper", []),
            (b"\x03", "device", []),
        ):
            rows.add_device(key * 32, role, tags, 60.0)
        rows.seen([b"\x01" * 32], 3600.0)
        rows.seen([b"\x03" * 32], 120.0)
        rows.revoke(b"\x03" * 32, 7200.0)
    store.close()
    first, second, third = operator("devices")
    assert [first["device"], second["device"], third["device"]] == ["02" * 32, "01" * 32, "03" * 32]
    assert second == {
        "device": "01" * 32, "role": "device", "tags": ["kitchen", "oven"], "enrolled_s": 60.0, "last_seen_s": 3600.0,
        "revoked": False, "revoked_s": None,
    }  # fmt: skip
    assert (third["revoked"], third["revoked_s"]) == (True, 7200.0)
    assert main(["devices", "--dir", str(operator.directory)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{'02' * 32} helper (no tags): enrolled 1970-01-01 00:01 UTC, never seen",
        f"{'01' * 32} device (kitchen, oven): enrolled 1970-01-01 00:01 UTC, last seen 1970-01-01 01:00 UTC",
        f"{'03' * 32} device (no tags): enrolled 1970-01-01 00:01 UTC, last seen 1970-01-01 00:02 UTC; "
        "revoked 1970-01-01 02:00 UTC",
    ]


# Tasks and models


def test_a_task_from_its_file_to_an_exported_model(operator, task_file, tmp_path):
    operator.init()
    planned = operator("task", "add", task_file)[0]
    assert planned["task"] == "digits"
    assert 0 < planned["readers_epsilon"] < planned["ledger_readers"]
    assert operator("task", "list") == [{"task": "digits", "state": "running", "model": 0, "next_round": 0}]
    assert operator("task", "pause", "digits")[0]["state"] == "paused"
    assert operator("task", "resume", "digits")[0]["state"] == "running"
    assert operator("task", "skip-round", "digits")[0]["next_round"] == 1
    out, bundle_out = tmp_path / "model.npy", tmp_path / "out.bundle"
    operator("model", "export", "digits", "--out", out, "--bundle", bundle_out)
    bundle = Bundle.read(bundle_out.read_bytes(), bytes.fromhex(PUBLISHER))
    assert np.array_equal(np.load(out), bundle.flatten(bundle.parameters()))
    operator("model", "export", "digits", "--out", tmp_path / "model.f32", "--number", "0")
    assert np.array_equal(np.fromfile(tmp_path / "model.f32", dtype="<f4"), np.load(out))
    assert [line["model"] for line in operator("model", "list", "digits")] == [0]
    page = operator("report", "digits")[0]["markdown"]
    assert "Nothing yet: no device sent anything" in page
    for who, delta in (("ledger", planned["delta"]), ("policy", planned["policy_delta"])):
        readers, coordinator = (
            math.ceil(planned[f"{who}_{observer}"] * 100) / 100 for observer in ("readers", "coordinator")
        )
        assert f"{readers:.2f} against readers and {coordinator:.2f} against the coordinator" in page
        assert f"at delta {delta:g}" in page
    assert "the fleet authority's key lies beside" in page


def test_a_report_names_no_budget_by_a_policy_that_the_plan_does_not_know_and_none_where_none_is_enough(
    operator, task_file
):
    operator.init()
    operator("task", "add", task_file)
    store = Store(operator.directory)
    found = report.collect(store, "digits", bytes(32), (), time.time())
    store.close()

    def page(**changes):
        return report.markdown(replace(found, planned=msgspec.structs.replace(found.planned, **changes)))

    assert "by the policy that a device joins with" not in page(policy_delta=0.0)  # an earlier version's plan
    assert "of more than any budget against readers" in page(policy_readers=math.inf)


def publish(directory, metrics, task="digits"):
    """A model as the server would write it, with its round left out."""
    store = Store(directory)
    with store.transaction() as rows:
        before = rows.newest_model(task)
        rows.add_model(before._replace(number=before.number + 1, parent=before.parameters, metrics=metrics))
    store.close()


@pytest.mark.parametrize(
    ("loss", "metrics", "shown", "columns"),
    [
        ("mse", {"count": 4.0, "loss": 0.25}, "count 4, loss (mse) 0.25", "| cohort planned | loss (mse) | set hash |"),
        ("cross_entropy", {"accuracy": 0.5, "loss": 0.25}, "accuracy 0.5, loss (cross_entropy) 0.25",
         "| cohort planned | accuracy | loss (cross_entropy) | set hash |"),
    ],
)  # fmt: skip
def test_metrics_are_called_what_they_are(operator, task_file, capsys, loss, metrics, shown, columns):
    operator.init()
    operator("task", "add", task_file)
    with sqlite3.connect(operator.directory / "coordinator.db") as connection:
        (plan,) = connection.execute("SELECT plan FROM tasks").fetchone()
        plan = msgspec.structs.replace(Planned.decode(plan), loss=loss).encode()
        connection.execute("UPDATE tasks SET plan = ?", (plan,))
    publish(operator.directory, metrics)
    line = operator("model", "list", "digits")[-1]
    assert (line["loss"], line["metrics"]) == (loss, metrics)
    assert operator("status")[0]["tasks"][0]["loss"] == loss
    for words in (["model", "list", "digits"], ["status"]):
        assert main([*words, "--dir", str(operator.directory)]) == 0
    listed, *status = capsys.readouterr().out.splitlines()[1:]
    assert listed.endswith(" " + shown)
    assert status[-1] == "  task digits: running, model 1 of 4; " + shown.replace(", ", "; ")
    page = operator("report", "digits")[0]["markdown"].splitlines()
    (head,) = (line for line in page if columns in line)
    assert page[-1].count("|") == head.count("|")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task", "pause", "other"], "no task 'other'"),
        (["task", "skip-round", "other"], "no task 'other'"),
        (["model", "list", "other"], "no task 'other'"),
        (["report", "other"], "no task 'other'"),
        (["model", "export", "digits", "--out", "x.npy", "--number", "7"], "no model 7: 0 to 0"),
        (["model", "export", "digits", "--out", "x.onnx"], r".npy, or .f32"),
        (["task", "add", "nowhere.toml"], "nowhere.toml"),
    ],
)
def test_what_is_not_there_is_named(operator, task_file, words, message):
    operator.init()
    operator("task", "add", task_file)
    assert message in operator(*words, code=1)


def test_status_says_what_a_running_task_waits_for_and_nothing_that_is_not_there(operator, task_file, capsys):
    def last_lines():
        capsys.readouterr()
        assert main(["status", "--dir", str(operator.directory)]) == 0
        return capsys.readouterr().out.splitlines()[-2:]

    operator.init()
    operator("task", "add", task_file)
    assert last_lines() == ["  no epoch yet", "  task digits: running, model 0 of 4"]
    operator.serve()
    operator.events("waiting")
    operator.end()
    reason = "0 of 0 devices are ready, and the task plans with 4"
    assert operator("status")[0]["tasks"][0]["waiting"] == reason
    assert last_lines() == ["  task digits: running, model 0 of 4", f"    waiting: {reason}"]
    operator("task", "pause", "digits")
    assert operator("status")[0]["tasks"][0]["waiting"] == ""


def test_status_says_where_the_roster_caps_n_max(operator, task_file, capsys):
    operator.init()
    task_file.write_text(TASK.replace("n_max = 4", "n_max = 6"))
    operator("task", "add", task_file)
    assert operator("status")[0]["tasks"][0]["n_max"] == 6
    assert operator("status")[0]["tasks"][0]["n_max_in_force"] is None  # no epoch yet
    store = Store(operator.directory)
    with store.transaction() as rows:
        rows.add_epoch(EpochRow(1, bytes(32), b"", tuple(bytes([n]) * 32 for n in range(5)), 1.0))
    store.close()
    assert operator("status")[0]["tasks"][0]["n_max_in_force"] == 5
    assert main(["status", "--dir", str(operator.directory)]) == 0
    line = "    a round takes 5 contributors and is sealed then: n_max is 6, and the epoch has 5 devices"
    assert capsys.readouterr().out.splitlines()[-1] == line


def test_status_says_where_the_plan_caps_n_max(operator, task_file, capsys):
    operator.init()
    task_file.write_text(TASK.replace("n_max = 4", "n_max = 6"))
    operator("task", "add", task_file, "--roster", "5")
    assert main(["status", "--dir", str(operator.directory)]) == 0
    line = "    a round takes 5 contributors and is sealed then: n_max is 6, and the plan is for a roster of 5"
    assert capsys.readouterr().out.splitlines()[-1] == line


def test_a_plan_is_what_add_says_and_starts_nothing(operator, task_file, capsys):
    operator.init()
    planned = operator("task", "plan", task_file)
    assert main(["task", "plan", "--dir", str(operator.directory), str(task_file)]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("4 rounds of unit 'example', ")
    (warning,) = planned[0]["warnings"]
    assert "min_honest is 10, and the task's honest is 2" in warning
    assert said.err.splitlines() == [f"warning: {warning}"]
    assert operator("task", "list") == []
    assert list((operator.directory / "blobs").iterdir()) == []
    assert operator("task", "add", task_file) == planned


def test_a_removed_task_is_gone_for_devices_and_its_models_stay(operator, task_file, tmp_path, capsys):
    operator.init()
    operator("task", "add", task_file)
    publish(operator.directory, {"loss": 0.25})
    before = operator("model", "list", "digits")
    removed = {"task": "digits", "state": "removed", "models": 2, "aborting": [], "opening": []}
    assert operator("task", "remove", "digits") == [removed]
    assert operator("task", "remove", "digits") == [removed]  # whoever was interrupted says it again
    assert operator("status")[0]["tasks"] == []
    assert operator("task", "list") == [{"task": "digits", "state": "removed", "model": 1, "next_round": 0}]
    assert operator("model", "list", "digits") == before
    operator("model", "export", "digits", "--out", tmp_path / "model.npy", "--bundle", tmp_path / "out.bundle")
    assert ": removed, 1 of 4 models published" in operator("report", "digits")[0]["markdown"]
    for step in ("pause", "resume"):
        assert "'digits' was removed, for good: add another one, with another name" in operator(
            "task", step, "digits", code=1
        )
    for step in ("add", "plan"):
        said = operator("task", step, task_file, code=1)
        assert "task 'digits' was removed, and its name stays taken: devices count rounds and budgets by it" in said
    assert "no task 'other'" in operator("task", "remove", "other", code=1)
    task_file.write_text(TASK.replace('"digits"\nbundle', '"digits2"\nbundle'))
    operator("task", "add", task_file)
    assert [line["task"] for line in operator("status")[0]["tasks"]] == ["digits2"]
    assert main(["task", "remove", "digits2", "--dir", str(operator.directory)]) == 0
    said = capsys.readouterr()
    assert said.out == "task digits2, state removed, models 1, aborting none, opening none\n"
    assert "`model list`, `model export` and `report` go on having them" in said.err


@pytest.mark.parametrize(("phase", "ends"), [("COLLECT", "aborting"), ("SEALED", "aborting"), ("CERTIFIED", "opening")])
def test_what_becomes_of_a_removed_tasks_open_round_is_said_while_it_is_open(operator, task_file, phase, ends):
    operator.init()
    operator("task", "add", task_file)
    store = Store(operator.directory)
    with store.transaction() as rows:
        rows.add_epoch(EpochRow(1, bytes(32), b"", (), 1.0))
        row = RoundRow(b"t" * 32, "digits", 7, 1, b"", 0, phase, 1.0, None, None, None, None, None, "")
        rows.add_round(row, [])
    said = operator("task", "remove", "digits")[0]
    assert {name: said[name] for name in ("aborting", "opening")} == {"aborting": [], "opening": [], ends: [7]}
    assert [line["state"] for line in operator("status")[0]["tasks"]] == ["removed"]
    with store.transaction() as rows:
        rows.set_aborted(row.tid, b"", "the task was removed", 2.0)
    store.close()
    assert operator("status")[0]["tasks"] == []


def test_a_task_that_is_removed_while_the_coordinator_serves_waits_for_nothing_any_more(operator, task_file):
    operator.init()
    operator("task", "add", task_file)
    operator.serve()
    operator.events("waiting")
    operator("task", "remove", "digits")
    operator.end()
    assert operator("status")[0]["tasks"] == []
    operator.serve()
    operator.end()
    assert operator("task", "list")[0]["state"] == "removed"


def test_a_name_that_is_taken_is_told_before_anything_is_planned(operator, task_file, monkeypatch):
    operator.init()
    operator("task", "add", task_file)
    monkeypatch.setattr("coordinator.task.plan", lambda *_: pytest.fail("it plans"))
    for step in ("add", "plan"):
        assert "there is a task 'digits' already" in operator("task", step, task_file, code=1)


def test_a_task_is_added_once_and_a_bundle_of_another_publisher_not_at_all(operator, task_file, tmp_path):
    operator.init()
    operator("task", "add", task_file)
    assert "there is a task 'digits' already" in operator("task", "add", task_file, code=1)
    other = tmp_path / "other.toml"
    other.write_text(TASK.replace(PUBLISHER, "cd" * 32).replace('"digits"', '"other"'))
    assert "not by the publisher" in operator("task", "add", other, code=1)
    assert len(operator("task", "list")) == 1


def test_an_authority_that_lives_apart_by_its_commands(operator, tmp_path):
    key, roster, epoch = (tmp_path / name for name in ("fleet.key", "roster.json", "epoch.json"))
    made = operator("authority", "init", "--out", key)[0]
    operator.init("--authority", made["authority"])
    store = Store(operator.directory)
    with store.transaction() as rows:
        for i in range(5):
            rows.add_device(bytes([i]) * 32, "device", [], 1.0)
    store.close()
    assert operator("authority", "roster", "--out", roster)[0]["devices"] == 5
    said = operator("authority", "epoch", "--key", key, "--roster", roster, "--out", epoch)[0]
    assert (said["number"], said["members"], len(said["added"])) == (1, 5, 5)
    assert operator("authority", "install", epoch)[0] == {"number": 1, "devices": 5}
    assert operator("status")[0]["epoch"] == 1


# Serving


def link(operator, directory):
    membership = enrolment.Membership.read(directory)
    own = Credentials(*(directory / name for name in ("ca.pem", "tls.pem", "tls.key")))
    quick = Backoff(first_s=0.05, longest_s=0.3, refused_s=0.1, longest_refused_s=0.3)
    return MqttTransport(membership.broker, membership.device, own, backoff=quick)


def wait_connected(transport):
    deadline = time.monotonic() + DEADLINE_S
    while not isinstance(transport.receive(0.5), Connected):
        assert time.monotonic() < deadline


def test_serve_in_an_empty_directory_lets_a_device_in_and_a_revoked_one_out(operator, tmp_path):
    ready = operator.serve(*operator.setup)
    assert (ready["event"], ready["pid"]) == ("serving", operator.serving.pid)
    assert operator("status")[0]["serving"] == serving_pid(operator.directory) == operator.serving.pid
    device = tmp_path / "device"
    membership = enrolment.join(device, operator.invite("--tag", "kitchen"))
    assert operator("status")[0]["devices"] == 1
    transport = link(operator, device)
    wait_connected(transport)
    operator("revoke", membership.device)
    transport.close()
    # The broker hears of it within a second; a connection of before is heard by nobody (tests/broker).
    deadline, refused = time.monotonic() + DEADLINE_S, False
    while not refused:
        assert time.monotonic() < deadline
        again = link(operator, device)
        refused = not isinstance(again.receive(2.0), Connected)
        again.close()
    with pytest.raises(enrolment.Refused, match="revoked"):
        enrolment.renew(device)
    assert operator.end() == 0
    assert operator("status")[0]["serving"] is None


def test_serve_says_which_options_came_too_late(operator):
    operator.init()
    operator.serve("--broker", "amqtt")
    assert operator.end() == 0
    log = operator.directory.with_suffix(".log").read_text()
    assert "coordinator.toml is there already and counts; not looked at: broker" in log


def test_only_one_process_serves_and_the_other_disturbs_nothing(operator):
    operator.serve(*operator.setup)
    words = [sys.executable, "-m", "coordinator", "serve", "--dir", str(operator.directory)]
    second = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False, timeout=DEADLINE_S)
    assert second.returncode == 1
    assert f"another process ({operator.serving.pid}) serves" in second.stderr
    assert operator.serving.poll() is None
    socket.create_connection(("127.0.0.1", operator.ports[1]), timeout=5).close()


def test_a_port_that_is_taken_is_named_and_nothing_is_left_running(operator):
    operator.init()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", operator.ports[0]))
        taken.listen()
        words = [sys.executable, "-m", "coordinator", "serve", "--dir", str(operator.directory)]
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False, timeout=DEADLINE_S)
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{operator.ports[0]}" in done.stderr
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", operator.ports[1]))


@pytest.mark.parametrize("broker", ["mosquitto", "amqtt"])
def test_a_fleet_trains_and_kill_9_of_the_coordinator_loses_nothing(operator, task_file, tmp_path, broker):
    operator.init("--broker", broker)
    operator.serve()
    rng = np.random.default_rng(1)
    examples = (rng.random((70, 1, 8, 8), dtype=np.float32), rng.integers(0, 10, 70))
    devices, threads = [], []
    for number, line in enumerate(operator("invite", "--count", "4")):
        directory = tmp_path / f"device{number}"
        enrolment.join(directory, line["token"], ["digits"])
        policy = directory / "policy.toml"
        policy.write_text(policy.read_text().replace("min_honest = 10", "min_honest = 2"))
        membership = enrolment.Membership.read(directory)
        device = Device(directory, connect=lambda directory=directory: link(operator, directory))
        device.register("digits", examples)
        assert membership.role == "device"
        devices.append(device)
        threads.append(threading.Thread(target=device.run, daemon=True))
        threads[-1].start()
    try:
        operator("task", "add", task_file)
        seen = operator.events("model_published")
        operator.end(signal.SIGKILL)
        operator.serve()
        seen += operator.events("task_done")
    finally:
        for device in devices:
            device.stop()
        for thread in threads:
            thread.join(DEADLINE_S)
    assert not any(thread.is_alive() for thread in threads)
    assert "round_aborted" not in [event["event"] for event in seen]
    models = operator("model", "list", "digits")
    assert [model["model"] for model in models] == [0, 1, 2, 3, 4]
    assert [model["parent"] for model in models[1:]] == [model["parameters"] for model in models[:-1]]
    page = operator("report", "digits")[0]["markdown"]
    assert "| readers of the models |" in page
    assert "4 of 4 models published; rounds: 4 DONE" in page
    out = tmp_path / "model.npy"
    operator("model", "export", "digits", "--out", out)
    assert np.load(out).dtype == np.float32
    assert operator.end() == 0


def documented():
    """Every command of the operator's that a page shows, without its comment."""
    pages = [ROOT / "docs" / "operating.md", ROOT / "hardware" / "systemd" / "sordino-coordinator.service"]
    for page in pages:
        for line in page.read_text().splitlines():
            before, found, after = line.partition("edge-coordinator ")
            if found and before.startswith(("    ", "ExecStart=")):
                yield after.partition(" > ")[0].partition("#")[0].split()


@pytest.mark.parametrize("words", list(documented()), ids=" ".join)
def test_every_command_in_the_documentation_is_one(words):
    assert _parser().parse_args(words).run is not None


def test_the_documentation_has_commands():
    assert len(list(documented())) > 15
