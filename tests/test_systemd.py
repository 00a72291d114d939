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

ROOTS = Path("/") / "root"
PYTHON, LIBRARIES = "/usr/local/lib/sordino/bin/python3", ["/usr", "/usr/local/lib/sordino/lib/x.py"]


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

    def pause(self, seconds):
        self.done.append(("pause",))

    def install(self, **arguments):
        return install(
            "token",
            **{
                "root": self.path,
                "python": PYTHON,
                "libraries": LIBRARIES,
                "run": self.run,
                "pause": self.pause,
                **arguments,
            },
        )


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
        ("pause",),
        ("systemctl", "is-active", "--quiet", "sordino-helper.service", "with unit"),
    ]
    assert stat.S_IMODE(machine.unit.stat().st_mode) == 0o644
    assert machine.unit.read_text() == unit(PYTHON, LIBRARIES)


def test_again_is_the_same_with_the_interpreter_of_now(machine):
    machine.install()
    machine.install(python="/opt/sordino/bin/python3")
    assert machine.done[:6] == machine.done[6:]
    assert "ExecStart=/opt/sordino/bin/python3 " in machine.unit.read_text()


def test_the_unit_runs_this_package_on_its_own_state_and_nothing_else():
    service = read(unit(PYTHON, LIBRARIES))["Service"]
    command = shlex.split(service["ExecStart"])
    assert command == [PYTHON, "-m", "edge_sdk.helper", "run", "--dir", "/var/lib/sordino-helper", "--json"]
    assert service["StateDirectory"] == "sordino-helper"
    assert service["DynamicUser"] == service["NoNewPrivileges"] == "yes"
    assert service["ProtectSystem"] == "strict"
    assert service["Restart"] == "always"
    assert "{" not in UNIT.format(name="n", state="s", python="p")


@pytest.mark.parametrize(
    ("python", "library", "named"),
    [
        ("/home/me/venv/bin/python3", "/usr", "/home/me/venv"),
        ("/usr/local/lib/sordino/bin/python3", "/run/user/1000/python", "/run/user/1000"),
        ("/var/tmp/try/bin/python3", "/usr", "/var/tmp"),  # noqa: S108  refused
        ("/usr/bin/python3", f"{ROOTS}/site-packages/numpy/__init__.py", "site-packages/numpy"),
        ("/opt/a b/bin/python3", "/usr", "a b"),
        ("/opt/%h/bin/python3", "/usr", "%h"),
        ("/opt/x\nExecStartPre=/bin/evil/bin/python3", "/usr", "letters"),
    ],
)
def test_an_interpreter_that_the_service_would_not_see_is_refused_before_the_token_is_spent(
    machine, python, library, named
):
    with pytest.raises(ParameterError, match=named):
        machine.install(python=python, libraries=["/usr", library])
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


def test_a_link_to_where_the_service_does_not_see_is_followed(machine, tmp_path):
    (tmp_path / "python3").symlink_to("/home/me/python3")
    with pytest.raises(ParameterError, match="does not see"):
        machine.install(python=str(tmp_path / "python3"))


def test_what_is_imported_is_looked_for_where_it_is():
    found = systemd._libraries()
    assert any(path.endswith("numpy/__init__.py") for path in found)
    assert str(Path(systemd.__file__).parent / "__init__.py") in found


def test_a_service_that_does_not_stay_is_no_success(machine):
    def run(command):
        machine.run(command)
        if "is-active" in command:
            raise ParameterError("exit status 3")

    with pytest.raises(ParameterError, match="journalctl -u sordino-helper"):
        machine.install(run=run)


def test_what_systemctl_says_is_the_error():
    program = "import sys; sys.exit('Unit not found.')"
    with pytest.raises(ParameterError, match=r"Unit not found\.$"):
        systemd._systemctl([sys.executable, "-c", program])
    systemd._systemctl([sys.executable, "-c", ""])
