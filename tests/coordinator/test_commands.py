"""What commands say, and what they need not load."""

import json
import logging
import os
import resource
import socket
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from coordinator import events
from coordinator.__main__ import main
from coordinator.commands import serving
from coordinator.commands.output import print_result
from coordinator.rounds import Spent
from coordinator.serving import Directory, Service

ROOT = Path(__file__).parents[2]
PUBLISHED = events.ModelPublished(
    "digits", 3, 2, 4, {"loss": 0.25}, Spent(1.0, "pld", 2.5, "rdp", 1e-5), 0.7, 12.34, reason=""
)


def test_the_parser_is_there_before_anything_heavy_is():
    probe = (
        "import sys, coordinator.__main__ as cli; cli._parser(); "
        "print([n for n in ('numpy', 'cryptography', 'amqtt', 'paho', 'dp_accounting', 'coordinator.store') "
        "if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_with_json_each_event_is_one_line_of_stdout_and_stderr_is_empty(capsys):
    show = serving._shower(True)
    show(PUBLISHED)
    show(events.RoundCertified("digits", 3))
    said = capsys.readouterr()
    published, certified = (json.loads(line) for line in said.out.splitlines())
    assert (published["event"], published["metrics"]) == ("model_published", {"loss": 0.25})
    assert published["spent"]["readers_method"] == "pld"
    assert (certified["event"], certified["round"]) == ("round_certified", 3)
    assert said.err == ""


def test_without_json_events_are_text_on_stderr_and_the_frequent_ones_only_in_the_log(capsys, caplog):
    caplog.set_level(logging.DEBUG, "sordino")
    show = serving._shower(False)
    show(events.RoundAborted("digits", 3, "too few"))
    show(PUBLISHED)
    show(events.RoundCertified("digits", 4))
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "round aborted: task digits, round 3, reason too few",
        "digits: model 2 of round 3 after 12.3 s; loss 0.25; epsilon 1 against readers (pld), "
        "2.5 against the coordinator (rdp), delta 1e-05",
    ]
    assert [record.message for record in caplog.records] == ["RoundCertified(task='digits', round=4)"]


def test_a_loss_is_shown_with_its_name(capsys):
    serving._shower(False)(replace(PUBLISHED, loss="mse"))
    assert "; loss (mse) 0.25; epsilon" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("as_json", "line"), [(True, '{"task":"digits","state":"paused"}'), (False, "task digits, state paused")]
)
def test_a_result_is_one_line(capsys, as_json, line):
    print_result(Namespace(json=as_json), {"task": "digits", "state": "paused"})
    said = capsys.readouterr()
    assert (said.out, said.err) == (line + "\n", "")


@pytest.mark.parametrize(
    ("soft", "hard", "after"),
    [
        (1024, 1 << 20, 65_536), (1024, 4096, 4096), (1 << 17, 1 << 20, 1 << 17), (4096, 4096, 4096),
        (1024, resource.RLIM_INFINITY, 65_536), (resource.RLIM_INFINITY, resource.RLIM_INFINITY, None),
    ],
)  # fmt: skip
def test_the_process_that_serves_may_open_many_files(monkeypatch, soft, hard, after):
    limits = {"now": (soft, hard)}
    monkeypatch.setattr(resource, "getrlimit", lambda what: limits["now"])
    monkeypatch.setattr(resource, "setrlimit", lambda what, values: limits.update(now=values))
    serving._allow_descriptors()
    assert limits["now"] == (after if after is not None else soft, hard)


def test_serve_asks_for_many_files_before_it_serves(tmp_path, monkeypatch):
    class Asked(Exception):
        pass

    def ask():
        raise Asked

    monkeypatch.setattr(serving, "_allow_descriptors", ask)
    monkeypatch.setattr("coordinator.serving.Service", lambda *_: pytest.fail("it serves already"))
    with pytest.raises(Asked):
        main(["serve", "--dir", str(tmp_path)])


@pytest.mark.parametrize("revoked", [False, True])
def test_the_server_is_told_of_a_revocation_before_it_reads_another_frame(revoked):
    told, stop = [], object()
    service = Service.__new__(Service)
    service._look_s, service._read_revoked = 0.0, lambda: revoked
    service._server = SimpleNamespace(run=lambda ask: told.append(ask()), look=lambda: told.append("look"))
    service.run(lambda: stop)
    assert told == [*["look"] * revoked, stop]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--committee", "drawn"], "committee_size: given exactly"), (["--publisher", "12"], "64 hexadecimal digits"),
        (["--name", "not a host"], "a host's name or address"),
        (["--broker-port", "8443"], "enrolment_port is the same"),
        (["--broker", "external", "--broker-url", "http://b.example.org:8883"], "starts with mqtts://"),
    ],
)  # fmt: skip
def test_an_init_that_fails_leaves_nothing_behind(tmp_path, capsys, options, said):
    assert main(["init", "--dir", str(tmp_path / "new"), *options]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_nothing_is_written_into_a_directory_that_is_another_users(tmp_path, capsys, monkeypatch):
    assert main(["init", "--dir", str(tmp_path / "fleet")]) == 0
    before = sorted((tmp_path / "fleet").iterdir())
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    assert main(["serve", "--dir", str(tmp_path / "fleet")]) == 1
    assert "another user" in capsys.readouterr().err
    assert sorted((tmp_path / "fleet").iterdir()) == before


def test_a_damaged_database_is_told_in_a_line(tmp_path, capsys):
    assert main(["init", "--dir", str(tmp_path)]) == 0
    (tmp_path / "coordinator.db").write_bytes(os.urandom(8192))
    capsys.readouterr()
    assert main(["status", "--dir", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert said.err == "edge-coordinator: the store: file is not a database: put coordinator.db back from a backup\n"


def test_an_interrupted_command_is_told_in_a_line(tmp_path, capsys, monkeypatch):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr("coordinator.commands.fleet.status", interrupted)
    assert main(["status", "--dir", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "edge-coordinator: interrupted\n"


@pytest.mark.parametrize(("broker", "granted_mb"), [("mosquitto", 32), ("amqtt", 16)])
def test_a_broker_in_the_same_process_holds_uploads_too(tmp_path, monkeypatch, broker, granted_mb):
    given = {}

    def server(*arguments, upload_memory, **others):
        given["memory"] = upload_memory
        return SimpleNamespace(close=lambda: None)

    monkeypatch.setattr("coordinator.serving.Server", server)
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        ports = [str(probe.getsockname()[1]) for probe in (one, two)]
    where = ["--dir", str(tmp_path), "--enrolment-port", ports[0], "--broker-port", ports[1]]
    assert main(["init", *where, "--broker", broker]) == 0
    Service(Directory.open(tmp_path), lambda event: None).close()
    assert given["memory"] == granted_mb << 20
