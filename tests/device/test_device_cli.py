"""edge-device and edge-helper as people and scripts call them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scripted import EXAMPLES, TASK, World

from edge_sdk import checkup, enrolment, helper, systemd
from edge_sdk.__main__ import main
from edge_sdk.commands import _add_tasks
from edge_sdk.config import Config, examples_source
from edge_sdk.enrolment import Membership, Token
from edge_sdk.errors import ParameterError
from edge_sdk.ledger import Ledger
from edge_sdk.models import read_identity
from edge_sdk.policy import default_policy
from edge_sdk.rules import read_policy


def call(entry, *arguments: str) -> SimpleNamespace:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = entry(arguments)
        except SystemExit as end:
            code = end.code
    lines = [json.loads(line) for line in out.getvalue().splitlines()] if "--json" in arguments else []
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue(), lines=lines)


@pytest.fixture
def lived(tmp_path):
    """A device's directory after one round, with its examples named in device.toml."""
    return after_a_round(World(tmp_path))


def after_a_round(world: World) -> Path:
    path = world.directory()
    np.savez(path / "data.npz", x=EXAMPLES[0], y=EXAMPLES[1])
    (path / "device.toml").write_text(f'[tasks.{TASK}]\nexamples = "data.npz"\n')
    for name in ("identity.key", "ledger", "data.npz"):
        (path / name).chmod(0o600)
    world.ticket()
    world.device(path, examples=None, config=Config.read(path)).run_once(60)
    return path


def test_help_imports_neither_numpy_nor_a_run_time():
    code = (
        "import sys, contextlib, edge_sdk.__main__ as m, edge_sdk.helper as h\n"
        "for entry in (m.main, h.main):\n"
        "    with contextlib.suppress(SystemExit): entry(['--help'])\n"
        "print([name for name in ('torch', 'onnxruntime', 'numpy', 'cryptography', 'paho') if name in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "[]"
    assert "run" in ended.stdout


def test_importing_the_device_loads_no_run_time_and_no_network():
    code = (
        "import sys, edge_sdk.device; print([n for n in ('torch', 'onnx', 'onnxruntime', 'paho') if n in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "[]\n"


def test_status_says_what_became_of_the_last_round(lived):
    found = call(main, "status", "--dir", str(lived), "--json")
    assert found.code == 0
    (status,) = found.lines
    assert (status["role"], status["epoch"], status["fleet"]) == ("device", 1, "scripted")
    (task,) = status["tasks"]
    assert task["task"] == TASK
    assert (task["examples"], task["allowed"], task["round"], task["waiting"], task["model"]) == (
        True,
        True,
        0,
        None,
        0,
    )
    assert task["last"]["what"] == "delivered"
    for line in ("tiny: model of 0 rounds", "round 0 delivered"):
        assert line in call(main, "status", "--dir", str(lived)).out


def test_ledger_names_both_observers_and_never_adds_them_up(lived):
    found = call(main, "ledger", "--dir", str(lived), "--json")
    (ledger,) = found.lines
    assert (found.code, ledger["entries"], ledger["lifetime"]["rounds_sent"]) == (0, 2, 1)
    assert {"readers", "coordinator"} <= ledger["lifetime"].keys()
    assert ledger["lifetime"]["readers"]["epsilon"] > 0
    text = call(main, "ledger", "--dir", str(lived)).out
    assert "against readers of the models" in text
    assert "against the coordinator" in text


def test_ledger_and_status_work_beside_a_device_that_runs(lived):
    policy = read_policy(lived)
    owner = read_identity(lived).public_key
    with Ledger(lived / "ledger", owner, policy.protects, policy.lifetime):
        assert call(main, "ledger", "--dir", str(lived), "--json").code == 0


def test_doctor_finds_nothing_wrong_but_what_a_script_has_not(lived):
    found = call(main, "doctor", "--dir", str(lived), "--json")
    result = {line["check"]: line["ok"] for line in found.lines}
    assert result == {
        "directory": True, "membership": True, "certificate": False, "disk": True, "policy": True, "ledger": True,
        "state": True, "broker": False, "examples": True, "training": True,
    }  # fmt: skip
    assert found.code == 1
    details = {line["check"]: line["detail"] for line in found.lines}
    assert details["examples"] == "tiny: 24"
    assert "ms for 4 examples" in details["training"]


@pytest.mark.parametrize(
    ("spoil", "check", "word"),
    [
        (lambda path: (path / "identity.key").chmod(0o644), "directory", "chmod 600"),
        (lambda path: path.chmod(0o755), "directory", "chmod 700"),
        (lambda path: (path / "identity.key").write_bytes(bytes(32)), "membership", "enrolled with"),
        (lambda path: (path / "policy.toml").write_text("protects = 3"), "policy", "protects"),
        (lambda path: spoil_byte(path / "ledger", 600), "ledger", "does not follow"),
        (lambda path: (path / "ledger").unlink(), "ledger", "no ledger"),
        (lambda path: (path / "data.npz").unlink(), "examples", "data.npz"),
        (lambda path: (path / "state.db").write_bytes(bytes(4096)), "state", "state.db"),
        (lambda path: add(path / "device.toml", '[tasks.other]\nexamples = "data.npz"\n'), "policy", "other"),
    ],
)
def test_doctor_names_what_is_wrong(lived, spoil, check, word):
    spoil(lived)
    found = {finding.check: finding for finding in checkup.doctor(lived)}
    assert found[check].ok is False
    assert word in found[check].detail


@pytest.mark.parametrize("unit", ["example", "device"])
def test_doctor_fails_where_no_example_counts(tmp_path, unit):
    path = after_a_round(World(tmp_path, unit=unit))
    x, y = EXAMPLES
    some = x.copy()
    some[::2] = np.nan

    def found(x, y) -> dict[str, tuple[bool | None, str]]:
        np.savez(path / "data.npz", x=x, y=y)
        return {finding.check: (finding.ok, finding.detail) for finding in checkup.doctor(path)}

    assert found(x, y)["training"][0]
    ok, detail = found(some, y)["training"]
    assert (ok, "of 4 examples drawn have values that are not finite, and count nothing" in detail) == (True, True)
    ok, detail = found(x * np.nan, y)["training"]
    assert (ok, detail) == (False, "tiny: 4 of 4 examples drawn have values that are not finite, and count nothing")
    for check in ("examples", "training"):
        assert found(x[:0], y[:0])[check] == (False, "tiny: data.npz: there are no examples")


@pytest.mark.parametrize(("user", "ok"), [(os.geteuid() + 1, False), (0, True)])
def test_doctor_minds_another_user_s_directory_unless_root_asks(lived, monkeypatch, user, ok):
    monkeypatch.setattr(os, "geteuid", lambda: user)
    found = {finding.check: finding for finding in checkup.doctor(lived)}
    assert found["directory"].ok is ok
    assert ok or "belongs to another user" in found["directory"].detail


def test_root_runs_nothing_of_the_user_whose_directory_it_looks_at(lived, monkeypatch):
    (lived / "evil.py").write_text(
        "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\ndef examples(): ...\n"
    )
    (lived / "device.toml").write_text(f'[tasks.{TASK}]\nexamples = "evil:examples"\n')
    if os.getuid() == 0:
        for path in (lived, *lived.rglob("*")):
            os.chown(path, 12345, -1)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    found = {finding.check: finding for finding in checkup.doctor(lived)}
    for check in ("examples", "training"):
        assert (found[check].ok, "not looked at by root" in found[check].detail) == (None, True)
    assert found["directory"].ok
    assert not (lived / "ran").exists()


@pytest.mark.parametrize("content", [b"\xff\xfe", b"", b"sordino1.\xe9", None])
def test_a_token_file_that_holds_none_is_refused_in_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "token").write_bytes(content)
    done = call(main, "join", "--token-file", str(tmp_path / "token"), "--dir", str(tmp_path / "device"))
    assert done.code == 1
    assert len(done.err.strip().splitlines()) == 1
    assert not (tmp_path / "device").exists()
    assert call(main, "join", "", "--dir", str(tmp_path / "device")).code == 1


def spoil_byte(path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def add(path, text: str) -> None:
    path.write_text(path.read_text() + text)


@pytest.mark.parametrize("name", ["identity.key", "policy.toml", "enrolment.json", "data.npz"])
@pytest.mark.parametrize("fault", ["missing", "a directory", "rubbish"])
def test_an_error_names_its_file_once(lived, name, fault):
    (lived / name).unlink()
    if fault == "a directory":
        (lived / name).mkdir(mode=0o700)
    elif fault == "rubbish":
        (lived / name).write_bytes(b"\xff = {")
    said = [finding.detail for finding in checkup.doctor(lived) if finding.ok is False and name in finding.detail]
    assert said or (name, fault) == ("enrolment.json", "missing")
    for line in said:
        assert line.count(str(lived / name)) <= 1, line
        assert "Errno" not in line


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        ((), 2, "required"),
        (("join",), 2, "one of the arguments"),
        (("join", "not a token"), 1, "not a token"),
        (("run", "--frob"), 2, "unrecognized"),
        (("status", "--dir", "/nowhere"), 1, "has not joined"),
        (("once", "--dir", "/nowhere", "--max-seconds", "1"), 1, "has not joined"),
        (("ledger", "--dir", "/nowhere"), 1, "identity.key"),
    ],
)
def test_exit_codes_tell_a_failure_from_a_wrong_call(arguments, code, word):
    found = call(main, *arguments)
    assert found.code == code
    assert word in found.err


def test_a_helper_has_no_task_commands():
    assert call(helper.main, "once").code == 2
    assert call(helper.main, "status", "--dir", "/nowhere").code == 1


def test_tasks_that_were_named_when_joining_are_in_device_toml_once(tmp_path):
    (tmp_path / "device.toml").write_text("threads = 2\n")
    _add_tasks(tmp_path, {"digits": "digits.npz", "waits": ""})
    _add_tasks(tmp_path, {"digits": "other.npz"})
    config = Config.read(tmp_path)
    assert config.threads == 2
    assert {task: entry.examples for task, entry in config.tasks.items()} == {"digits": "digits.npz"}


def token_for(path, url: str = "https://127.0.0.1:1", role: str = "device") -> str:
    """A token of the fleet that the directory is in. Nothing listens on this port of loopback."""
    membership = Membership.read(path)
    pins = (membership.ca, membership.authority, membership.coordinator, membership.publishers[0])
    ca, authority, coordinator, publisher = (bytes.fromhex(pin) for pin in pins)
    return Token(url, ca, bytes(32), 1 << 32, authority, coordinator, [publisher], role).text


def test_a_file_named_when_joining_is_found_from_where_the_command_is_called(lived, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    np.savez(elsewhere / "more.npz", x=EXAMPLES[0], y=EXAMPLES[1])
    monkeypatch.chdir(elsewhere)
    tasks = ("--task", "more=more.npz", "--task", "sensor=my_sensor:windows")
    assert call(main, "join", token_for(lived), "--dir", str(lived), *tasks).code == 0
    named = {task: entry.examples for task, entry in Config.read(lived).tasks.items()}
    assert named == {TASK: "data.npz", "more": str(elsewhere / "more.npz"), "sensor": "my_sensor:windows"}
    monkeypatch.chdir(tmp_path)
    assert len(examples_source(lived, named["more"])()["y"]) == 24


def test_a_task_named_when_joining_again_is_allowed_too_and_its_owner_is_told(lived):
    policy = lived / "policy.toml"
    before = policy.read_text().rstrip("\n")  # as an editor may leave it
    policy.write_text(before)
    tasks = ("--task", f"{TASK}=data:examples", "--task", "sensor=my_sensor:windows", "--task", "later")
    told = call(main, "join", token_for(lived), "--dir", str(lived), *tasks)
    assert (told.code, f"{policy} allows sensor, later from now on" in told.err) == (0, True)
    assert policy.read_text().startswith(before + "\n")
    allowed = read_policy(lived).tasks
    assert list(allowed) == [TASK, "sensor", "later"]
    assert allowed[TASK].limits is None  # the owner's own word stands
    assert allowed["sensor"].limits == default_policy(["sensor"]).tasks["sensor"].limits
    assert {finding.check: finding for finding in checkup.doctor(lived)}["policy"].ok
    before = policy.read_bytes()
    told = call(main, "join", token_for(lived), "--dir", str(lived), *tasks)
    assert (told.code, "from now on" in told.err, policy.read_bytes()) == (0, False, before)


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda text: text.replace(f"[tasks.{TASK}]", "", 1).replace("protects", "tasks = {}\nprotects", 1), "inline"),
        (lambda text: "protects = 3\n" + text, "policy.toml"),
    ],
)
def test_a_policy_that_a_task_cannot_be_added_to_is_left_alone_and_its_owner_is_told_what_to_write(lived, spoil, word):
    policy, device = lived / "policy.toml", lived / "device.toml"
    policy.write_text(spoil(policy.read_text()))
    before = policy.read_bytes(), device.read_bytes()
    told = call(main, "join", token_for(lived), "--dir", str(lived), "--task", "sensor=my_sensor:windows")
    assert (told.code, word in told.err, str(policy) in told.err) == (1, True, True)
    assert "Traceback" not in told.err
    assert (policy.read_bytes(), device.read_bytes()) == before


@pytest.mark.parametrize(("given", "word"), [("missing.npz", "there is no file"), ("what?", "neither")])
def test_examples_that_cannot_be_there_are_refused_before_the_token_is_spent(lived, tmp_path, given, word):
    done = call(main, "join", token_for(lived), "--dir", str(tmp_path / "new"), "--task", f"digits={given}")
    assert (done.code, word in done.err) == (1, True)
    assert not (tmp_path / "new").exists()


def test_a_token_that_a_joined_directory_has_no_use_for_is_not_used_in_silence(lived):
    before = {path.name: path.read_bytes() for path in lived.iterdir() if path.is_file()}
    told = call(main, "join", token_for(lived), "--dir", str(lived))
    assert (told.code, "the token was not used" in told.err) == (0, True)
    assert "a revoked device needs another directory" in told.err
    assert "rolled back or forked" in told.err
    (line,) = call(main, "join", token_for(lived), "--dir", str(lived), "--json").lines
    assert (line["joined_before"], line["fleet"]) == (True, "scripted")
    assert {path.name: path.read_bytes() for path in lived.iterdir() if path.is_file()} == before


def test_a_token_that_an_installed_helper_has_no_use_for_is_not_used_in_silence(tmp_path, monkeypatch):
    path = World(tmp_path).directory(role="helper")
    token = token_for(path, role="helper")
    monkeypatch.setattr(systemd, "STATE", path)
    monkeypatch.setattr(systemd, "install", lambda token: enrolment.join(systemd.STATE, token))
    told = call(helper.main, "install", token)
    assert (told.code, "has joined already, the token was not used" in told.err) == (0, True)
    assert f"move what is in {path} away" in told.err
    (line,) = call(helper.main, "install", token, "--json").lines
    assert (line["joined_before"], line["role"]) == (True, "helper")

    def first(token):
        (path / "enrolment.json").write_bytes(membership)
        return Membership.read(path)

    membership = (path / "enrolment.json").read_bytes()
    (path / "enrolment.json").unlink()
    monkeypatch.setattr(systemd, "install", first)
    (line,) = call(helper.main, "install", token, "--json").lines
    assert line["joined_before"] is False


def test_device_toml_errors_name_the_field(tmp_path):
    for text, word in (
        ("threads = 0", "threads"),
        ("thread = 1", "thread"),
        ("x", "device.toml"),
        ("[tasks.A]", "tasks"),
    ):
        (tmp_path / "device.toml").write_text(text)
        with pytest.raises(ParameterError, match=word):
            Config.read(tmp_path)


def test_device_toml_may_begin_with_the_mark_that_some_editors_put_in_front(tmp_path):
    (tmp_path / "device.toml").write_text("\ufeffthreads = 2\n", encoding="utf-8")
    assert Config.read(tmp_path).threads == 2
    _add_tasks(tmp_path, {"digits": "digits.npz"})
    assert Config.read(tmp_path).tasks.keys() == {"digits"}
    (tmp_path / "device.toml").write_text("threads = 2\n", encoding="utf-16")
    with pytest.raises(ParameterError, match=r"device\.toml: not UTF-8 .*: save it as UTF-8"):
        Config.read(tmp_path)


def test_examples_come_from_a_function_beside_device_toml(tmp_path):
    (tmp_path / "my_sensor.py").write_text("def windows():\n    return [1, 2], [3]\n")
    assert examples_source(tmp_path, "my_sensor:windows")() == ([1, 2], [3])
    with pytest.raises(ParameterError, match="nothing"):
        examples_source(tmp_path, "my_sensor:nothing")()
    with pytest.raises(ParameterError, match="neither"):
        examples_source(tmp_path, "../my_sensor:windows")


def test_arrays_with_pickles_in_them_are_refused(tmp_path):
    np.savez(tmp_path / "data.npz", x=np.zeros(1), y=np.array([{}], dtype=object))
    with pytest.raises(ParameterError, match=r"data\.npz: 'y' is no array of numbers: .*pickle"):
        examples_source(tmp_path, "data.npz")()


@pytest.mark.parametrize("kind", ["a text", "nothing", "one array", "half"])
def test_what_is_no_npz_file_is_said_without_advice_to_load_pickles(tmp_path, kind):
    path = tmp_path / "data.npz"
    with path.open("wb") as file:
        if kind == "one array":
            np.save(file, np.zeros(3))
        elif kind == "half":
            np.savez(file, x=np.zeros(1000), y=np.zeros(1000))
            file.truncate(8000)
        else:
            file.write(b"hello" if kind == "a text" else b"")
    with pytest.raises(ParameterError) as caught:
        examples_source(tmp_path, "data.npz")()
    assert str(caught.value) == f"{path} is no .npz file, or not a whole one: numpy.savez makes one"


def test_sigterm_ends_a_service_in_good_order(lived):
    """With a broker that cannot be reached; nothing listens on this port of loopback."""
    (lived / "device.toml").write_text('broker = "mqtts://127.0.0.1:1"\n')
    make_certificates(lived)
    child = subprocess.Popen(
        [sys.executable, "-m", "edge_sdk", "run", "--dir", str(lived), "--json", "--verbose"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    line = child.stdout.readline()  # it tried, so its handlers stand
    os.kill(child.pid, signal.SIGTERM)
    _, err = child.communicate(timeout=30)
    assert child.returncode == 0, err
    assert json.loads(line)["event"] == "offline"


@pytest.mark.parametrize("command", [("run",), ("once", "--max-seconds", "60"), ("status",), ("doctor",), ("ledger",)])
def test_a_closed_stdout_ends_any_command_quietly(lived, command):
    (lived / "device.toml").write_text('broker = "mqtts://127.0.0.1:1"\n')
    make_certificates(lived)
    readable, writable = os.pipe()
    os.close(readable)
    with os.fdopen(writable, "wb") as stdout:
        ended = subprocess.run(
            [sys.executable, "-m", "edge_sdk", *command, "--dir", str(lived), "--json"],
            stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60, check=False,
        )  # fmt: skip
    assert ended.returncode == 1, ended.stderr
    assert "Broken pipe" not in ended.stderr
    assert "Traceback" not in ended.stderr
    assert call(main, "status", "--dir", str(lived)).code == 0


def test_a_closed_stdout_ends_a_helper_too(tmp_path):
    path = World(tmp_path).directory(role="helper")
    (path / "device.toml").write_text('broker = "mqtts://127.0.0.1:1"\n')
    make_certificates(path)
    readable, writable = os.pipe()
    os.close(readable)
    with os.fdopen(writable, "wb") as stdout:
        ended = subprocess.run(
            [sys.executable, "-m", "edge_sdk.helper", "run", "--dir", str(path), "--json"],
            stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60, check=False,
        )  # fmt: skip
    assert (ended.returncode, "Broken pipe" in ended.stderr) == (1, False), ended.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full here")
def test_a_stdout_that_cannot_be_written_is_named_and_is_not_retried_as_a_network(lived):
    (lived / "device.toml").write_text('broker = "mqtts://127.0.0.1:1"\n')
    make_certificates(lived)
    for command in ("run", "status"):
        with open("/dev/full", "wb") as stdout:
            ended = subprocess.run(
                [sys.executable, "-m", "edge_sdk", command, "--dir", str(lived), "--json"],
                stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60, check=False,
            )  # fmt: skip
        assert ended.returncode == 1
        assert "stdout: No space left on device" in ended.stderr


def make_certificates(path) -> None:
    """A CA of a test and a certificate of it for this device."""
    import datetime as dt

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization

    from edge_sdk.enrolment import private_pem, tls_key

    key = tls_key(bytes(range(48)))
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, read_identity(path).public_key.hex())])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
        .not_valid_before(now - dt.timedelta(days=1)).not_valid_after(now + dt.timedelta(days=90))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True).sign(key, hashes.SHA256())
    )  # fmt: skip
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    for file, content in (("ca.pem", pem), ("tls.pem", pem), ("tls.key", private_pem(key))):
        (path / file).write_bytes(content)
        (path / file).chmod(0o600)
