"""A committee member as a service: in which order it is made, and what it refuses before anything is spent."""

import configparser
import os
import shlex
import stat
import sys
from pathlib import Path

import pytest

from edge_sdk import systemd
from edge_sdk.errors import ParameterError
from edge_sdk.systemd import UNIT, install, unit

PYTHON, PREFIX = "/usr/local/lib/sordino/bin/python3", "/usr"


class Machine:
    """A root directory, and what was done to it, in order."""

    def __init__(self, path, monkeypatch):
        self.path, self.done = path, []
        (path / "run/systemd/system").mkdir(parents=True)
        (path / "etc/systemd/system").mkdir(parents=True)
        self.unit = path / "etc/systemd/system/sordino-helper.service"
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        monkeypatch.setattr(systemd, "join", self.join)

    def join(self, directory, token):
        self.done.append(("join", directory.relative_to(self.path), token))
        return "membership"

    def run(self, command):
        self.done.append((*command, "with unit" if self.unit.exists() else "without"))

    def install(self, **arguments):
        return install("token", **{"root": self.path, "python": PYTHON, "prefix": PREFIX, "run": self.run, **arguments})


@pytest.fixture
def machine(tmp_path, monkeypatch):
    return Machine(tmp_path, monkeypatch)


def read(text):
    parser = configparser.ConfigParser(interpolation=None, strict=True)
    parser.optionxform = str
    parser.read_string(text)
    return parser


def test_it_joins_then_writes_the_unit_then_starts_it(machine):
    assert machine.install() == "membership"
    assert machine.done == [
        ("join", Path("var/lib/sordino-helper"), "token"),
        ("systemctl", "daemon-reload", "with unit"),
        ("systemctl", "enable", "sordino-helper.service", "with unit"),
        ("systemctl", "restart", "sordino-helper.service", "with unit"),
    ]
    assert stat.S_IMODE(machine.unit.stat().st_mode) == 0o644
    assert machine.unit.read_text() == unit(PYTHON, PREFIX)


def test_again_is_the_same_with_the_interpreter_of_now(machine):
    machine.install()
    machine.install(python="/opt/sordino/bin/python3")
    assert machine.done[:4] == machine.done[4:]
    assert "ExecStart=/opt/sordino/bin/python3 " in machine.unit.read_text()


def test_the_unit_runs_this_package_on_its_own_state_and_nothing_else():
    service = read(unit(PYTHON, PREFIX))["Service"]
    command = shlex.split(service["ExecStart"])
    assert command == [PYTHON, "-m", "edge_sdk.helper", "run", "--dir", "/var/lib/sordino-helper", "--json"]
    assert service["StateDirectory"] == "sordino-helper"
    assert service["DynamicUser"] == service["NoNewPrivileges"] == "yes"
    assert service["ProtectSystem"] == "strict"
    assert service["Restart"] == "always"
    assert "{" not in UNIT.format(name="n", state="s", python="p")


@pytest.mark.parametrize(
    ("python", "prefix", "named"),
    [
        ("/home/me/venv/bin/python3", "/usr", "/home/me/venv"),
        ("/usr/local/lib/sordino/bin/python3", "/root/.pyenv/versions/3.11", "/root/.pyenv"),
        ("/var/tmp/try/bin/python3", "/usr", "/var/tmp"),  # noqa: S108  refused
        ("/opt/a b/bin/python3", "/usr", "a b"),
        ("/opt/%h/bin/python3", "/usr", "%h"),
        ("/opt/x\nExecStartPre=/bin/evil/bin/python3", "/usr", "letters"),
    ],
)
def test_an_interpreter_that_the_service_would_not_see_is_refused_before_the_token_is_spent(
    machine, python, prefix, named
):
    with pytest.raises(ParameterError, match=named):
        machine.install(python=python, prefix=prefix)
    assert machine.done == []
    assert not machine.unit.exists()


def test_without_systemd_it_says_what_to_do_instead(machine):
    (machine.path / "run/systemd/system").rmdir()
    with pytest.raises(ParameterError, match="edge-helper join"):
        machine.install()
    assert machine.done == []


def test_without_root_nothing_is_spent(machine, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ParameterError, match="sudo edge-helper install"):
        machine.install()
    assert machine.done == []


def test_what_systemctl_says_is_the_error():
    program = "import sys; sys.exit('Unit not found.')"
    with pytest.raises(ParameterError, match=r"Unit not found\.$"):
        systemd._systemctl([sys.executable, "-c", program])
    systemd._systemctl([sys.executable, "-c", ""])
