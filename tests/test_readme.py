"""What the README tells its three readers to type does what it says."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MODULES = {"edge-export": "export", "edge-coordinator": "coordinator", "edge-device": "edge_sdk"}


def section(title):
    (found,) = re.findall(rf"## {title}\n(.*?)\n## ", README, re.DOTALL)
    return found


def commands_of(title):
    """The indented lines of a section that are our commands, as words."""
    words = [line.split() for line in section(title).splitlines() if line.startswith("    ")]
    return [w for w in words if w[0] in MODULES]


def codes_of(title):
    return re.findall(r"```python\n(.*?)```", section(title), re.DOTALL)


def code_of(title):
    (found,) = codes_of(title)
    return found


def run(folder, words):
    """One of the README's commands, as a new user would, in `folder`: what it printed."""
    command = [sys.executable, "-m", MODULES[words[0]], *words[1:]]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of one's own with the examples in it."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


@pytest.fixture(scope="module")
def exported(folder):
    """After the commands for ML engineers, in their order: what each printed."""
    commands = commands_of("ML engineers")
    assert [words[1] for words in commands] == ["key", "build", "check"]
    return {words[1]: run(folder, words) for words in commands}


@pytest.fixture(scope="module")
def operated(folder, exported):
    """After the commands for operators, `serve` still running: what each printed."""
    commands = commands_of("Operators")
    assert [words[1] for words in commands] == ["init", "serve", "invite", "task", "status"]
    publisher = exported["key"].strip()
    said = {}
    said["init"] = run(folder, [publisher if word == "PUBLISHER" else word for word in commands[0]])
    # On other ports than the README's: somebody may use those here.
    settings = folder / "sordino-coordinator" / "coordinator.toml"
    text = settings.read_text()
    for port in ("8443", "8883"):
        assert port in text
        text = text.replace(port, str(free_port()))
    settings.write_text(text)
    assert commands[1][-1] == "&"
    server = subprocess.Popen(
        [sys.executable, "-m", "coordinator", *commands[1][1:-1], "--json"],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        assert json.loads(server.stdout.readline())["event"] == "serving"
        assert "    cp examples/demo/digits.toml .\n" in section("Operators")
        (folder / "digits.toml").write_bytes((folder / "examples" / "demo" / "digits.toml").read_bytes())
        said |= {words[1]: run(folder, words) for words in commands[2:]}
        yield said
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)
        server.stdout.close()


def free_port():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def digits(count):
    generator = np.random.default_rng(0)
    images = generator.uniform(size=(count, 1, 8, 8)).astype(np.float32)
    return images, generator.integers(0, 10, count)


def test_the_commands_for_ml_engineers_work_in_a_fresh_folder(folder, exported):
    assert (folder / "digits.bundle").stat().st_size > 10_000
    assert "1,930 shared parameters" in exported["build"]
    assert "grad.1.weight" in exported["check"]


def test_the_model_of_ones_own_can_be_captured():
    from export.graph import capture

    names = {}
    code, _ = codes_of("ML engineers")
    exec(code, names)  # noqa: S102
    step = capture(names["build"](), "example", 4)
    assert {line.path for line in step.report} == {"fast"}


def test_the_lines_for_ml_engineers_train(folder, exported, monkeypatch):
    monkeypatch.chdir(folder)
    images, labels = digits(100)
    publisher_key = bytes.fromhex(exported["key"].strip())
    names = {"publisher_key": publisher_key, "images": images, "labels": labels}
    _, code = codes_of("ML engineers")
    exec(code, names)  # noqa: S102
    assert names["update"].gradient.shape == (1_930,)
    assert 0 < np.linalg.norm(names["update"].gradient) <= 0.5 * 1.001 * len(names["drawn"])


def test_the_commands_for_operators_start_a_fleet(operated):
    assert operated["invite"].startswith("sordino1.")
    assert "epsilon 2.41 at delta 1e-04 against readers" in operated["task"]
    assert "an honest coordinator is assumed" in operated["status"]


def test_the_commands_and_lines_for_integrators_make_a_device(folder, operated, monkeypatch):
    images, labels = digits(70)
    np.savez(folder / "examples.npz", x=images, y=labels)
    commands = commands_of("Device integrators")
    assert [words[1] for words in commands] == ["join", "doctor", "once"]
    for words in commands:
        run(folder, [operated["invite"].strip() if word == "TOKEN" else word for word in words])
    monkeypatch.chdir(folder)
    names = {"images": images, "labels": labels}
    exec(code_of("Device integrators"), names)  # noqa: S102
    assert names["report"].reason == "done"
    assert names["scores"].shape == (5, 10)
