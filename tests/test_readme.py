"""What the README tells a reader to type does what it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    """A folder of one's own with the examples in it, after the commands for ML engineers, in their order."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "examples").symlink_to(ROOT / "examples")
    (section,) = re.findall(r"## ML engineers\n(.*?)\n## ", README, re.DOTALL)
    commands = [line.split() for line in section.splitlines() if line.startswith("    edge-export ")]
    assert [command[1] for command in commands] == ["key", "build", "check"]
    said = {}
    for _, *arguments in commands:
        done = subprocess.run(
            [sys.executable, "-m", "export", *arguments], cwd=folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        said[arguments[0]] = done.stdout
    return folder, said


def test_the_commands_for_ml_engineers_work_in_a_fresh_folder(user):
    folder, said = user
    assert (folder / "mlp.bundle").stat().st_size > 400_000
    assert "101,770 shared parameters" in said["build"]
    assert "grad.1.weight" in said["check"]


def test_the_lines_for_device_integrators_train(user, monkeypatch):
    folder, said = user
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(folder)
    generator = np.random.default_rng(0)
    names = {
        "os": os,
        "publisher_key": bytes.fromhex(said["key"].strip()),
        "images": generator.normal(size=(100, 1, 28, 28)).astype(np.float32),
        "labels": generator.integers(0, 10, 100),
    }
    exec(code, names)  # noqa: S102
    assert names["update"].gradient.shape == (101_770,)
    assert 0 < np.linalg.norm(names["update"].gradient) <= 0.5 * 1.001 * len(names["drawn"])
