"""The wheel, installed outside the checkout in an environment of its own: what a device has, and nothing more."""

import json
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from edge_sdk.bundle import Bundle  # noqa: E402
from edge_sdk.crypto.identity import Identity  # noqa: E402
from edge_sdk.training.examples import ArrayExamples  # noqa: E402
from edge_sdk.training.onnx import OnnxTrainer  # noqa: E402
from export.build import build  # noqa: E402
from export.graph import TrainingSpec  # noqa: E402

ROOT = Path(__file__).parent.parent
PUBLISHER = Identity(bytes(range(32)))

TRAIN = """
import json, sys
import numpy as np
from edge_sdk.bundle import Bundle
from edge_sdk.training.examples import ArrayExamples
from edge_sdk.training.onnx import OnnxTrainer

bundle = Bundle.read(sys.argv[1], bytes.fromhex(sys.argv[2]))
data = np.load(sys.argv[3])
examples = ArrayExamples(data["x"], data["y"])
result = OnnxTrainer(bundle).clipped_sum(examples, np.arange(len(examples)), clip=0.5, loss_bound=4.0)
heavy = sorted({"torch", "onnx", "onnxscript", "executorch", "scipy", "pandas"} & set(sys.modules))
print(json.dumps({"norm": float(np.linalg.norm(result.gradient)), "count": result.metrics.count, "heavy": heavy}))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The python of a new environment with the wheel and a device's dependencies."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", folder, ROOT], check=True, cwd=folder)
    (wheel,) = folder.glob("sordino-*.whl")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", wheel], check=True)
    return python


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder with a bundle and data, the clipped sum that this environment gets)."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
    spec = TrainingSpec(model, "cross_entropy", [torch.zeros(8)], torch.zeros((), dtype=torch.long), name="small")
    folder = tmp_path_factory.mktemp("trained")
    built = build(spec, PUBLISHER, unit="example", batch=8)
    (folder / "small.bundle").write_bytes(built.bundle)
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(19, 8)).astype(np.float32), generator.integers(0, 3, 19)
    np.savez(folder / "data.npz", x=x, y=y)
    trainer = OnnxTrainer(Bundle.read(built.bundle, PUBLISHER.public_key))
    return folder, trainer.clipped_sum(ArrayExamples(x, y), np.arange(19), clip=0.5, loss_bound=4.0)


def run(program, folder, *arguments):
    return subprocess.run(
        [program, *arguments], cwd=folder, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"}, check=False
    )


def test_a_device_trains_with_neither_torch_nor_onnx_installed(installed, trained):
    folder, expected = trained
    (folder / "train.py").write_text(TRAIN)
    done = run(installed, folder, "train.py", "small.bundle", PUBLISHER.public_key.hex(), "data.npz")
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    assert got["heavy"] == []
    assert got["count"] == 19
    assert got["norm"] == pytest.approx(float(np.linalg.norm(expected.gradient)), rel=1e-6)
    missing = run(installed, folder, "-c", "import torch")
    assert "No module named 'torch'" in missing.stderr


def test_the_installed_core_runs_a_round(installed, tmp_path):
    script = (
        "import os, numpy as np\n"
        "from edge_sdk.crypto.sealing import encapsulate\n"
        "from edge_sdk.protocol import reference\n"
        "fleet = reference.make_fleet(os.urandom(32), 5)\n"
        "ticket = reference.open_ticket(fleet, os.urandom(32), 50, n_max=5)\n"
        "inputs = {i: np.arange(50) * i for i in range(5)}\n"
        "done = reference.run_round(fleet, ticket, inputs, os.urandom(32), encapsulate)\n"
        "print(bool((done.sums[0].values == np.arange(50) * 10).all()))\n"
    )
    done = run(installed, tmp_path, "-c", script)
    assert done.stdout == "True\n", done.stderr


EVERY_MODULE = """
import importlib, json, pkgutil, sys
import edge_sdk

names = [module.name for module in pkgutil.walk_packages(edge_sdk.__path__, "edge_sdk.")]
for name in names:
    importlib.import_module(name)
roots = {name.partition(".")[0] for name in sys.modules}
others = {"torch", "onnx", "onnxscript", "executorch", "sqlalchemy", "dp_accounting", "scipy", "coordinator", "export"}
print(json.dumps({"file": edge_sdk.__file__, "names": names, "others": sorted(others & roots)}))
"""


def test_every_module_of_a_device_imports_with_a_devices_dependencies_alone(installed, tmp_path):
    done = run(installed, tmp_path, "-c", EVERY_MODULE)
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    assert Path(got["file"]).is_relative_to(installed.parent.parent)  # the wheel's, not the checkout's
    in_the_checkout = {path.relative_to(ROOT).with_suffix("") for path in (ROOT / "edge_sdk").rglob("*.py")}
    in_the_checkout = {path.parent if path.name == "__init__" else path for path in in_the_checkout}
    assert set(got["names"]) == {".".join(path.parts) for path in in_the_checkout} - {"edge_sdk"}
    assert got["others"] == []


@pytest.mark.parametrize(("command", "verbs"), [("edge-device", "join,run,once"), ("edge-helper", "join,install,run")])
def test_the_commands_of_a_device_and_of_a_helper_run_where_there_is_no_torch(installed, tmp_path, command, verbs):
    without = run(installed, tmp_path, "-c", "import torch")
    assert "No module named 'torch'" in without.stderr
    done = run(installed.parent / command, tmp_path, "--help")
    assert done.returncode == 0, done.stderr
    assert f"usage: {command}" in done.stdout
    assert f"{{{verbs}" in done.stdout


def test_the_export_command_says_what_to_install(installed, tmp_path):
    tool = installed.parent / "edge-export"
    assert run(tool, tmp_path, "--help").returncode == 0
    (tmp_path / "key").write_text("00" * 32)
    done = run(tool, tmp_path, "build", "model.py:build", "--key", "key", "--out", "x.bundle")
    assert done.returncode == 1
    assert done.stderr == "edge-export: rich is not installed: pip install 'sordino[export]'\n"
