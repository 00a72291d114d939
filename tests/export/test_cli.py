"""edge-export as a user calls it: in a folder of one's own, by name, with the README's commands."""

import contextlib
import io
import json
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("torch")

from export.__main__ import main

SOURCE = """
from dataclasses import replace

import torch
from torch import nn
from export.graph import TrainingSpec


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    return TrainingSpec(model, "cross_entropy", [torch.zeros(6)], torch.zeros((), dtype=torch.long), name="tiny")


def other():
    torch.manual_seed(0)
    return TrainingSpec(nn.Linear(6, 3), "cross_entropy", [torch.zeros(6)], torch.zeros((), dtype=torch.long))


def normalised():
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    return TrainingSpec(model, "cross_entropy", [torch.zeros(6)], torch.zeros((), dtype=torch.long))


def spoken():
    return replace(build(), name="My Model")


class Fixed(nn.Linear):
    def forward(self, x):
        return super().forward(x.reshape(int(x.shape[0]) if x.shape[0] == 1 else 32, 6))


def fixed():
    return replace(other(), model=Fixed(6, 3))


def rectified_otherwise():
    return replace(build(), model=nn.Sequential(nn.Linear(6, 5), nn.Sigmoid(), nn.Linear(5, 3)))


def of_rows():
    return replace(build(), inputs=[torch.zeros(2, 6)])


def of_size(width):
    return TrainingSpec(nn.Linear(width, 3), "cross_entropy", [torch.zeros(width)], torch.zeros((), dtype=torch.long))


def talking():
    print("a model")
    return replace(build(), model=Talking(6, 3))


class Talking(nn.Linear):
    def forward(self, x):
        print("a batch")
        return super().forward(x)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, x):
        return self.first(x), self.second(x)


def idle():
    return replace(other(), model=TwoHeads())


def idle_and_frozen():
    return replace(idle(), frozen=["second"])


def softened():
    return replace(other(), model=nn.Sequential(nn.Linear(6, 3), nn.Softmax(-1)))


def squashed():
    model = nn.Sequential(nn.Linear(6, 3), nn.Sigmoid())
    return TrainingSpec(model, "binary_cross_entropy", [torch.zeros(6)], torch.zeros(3))


def squashed_for_mse():
    return replace(squashed(), loss="mse")


def raising():
    return torch.load("weights.pt")


def importing():
    import no_such_library


def without_label():
    return TrainingSpec(nn.Linear(6, 3), "mse", [torch.zeros(6)])


number = 3
"""


BUILD = ("build", "tiny.py:build", "--key", "publisher.key")


def edge_export(folder, *arguments):
    """The command in this process, for its import of PyTorch takes seconds; one test below starts a real one."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as end:
            code = end.code
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with a model's source, a key and a bundle."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "tiny.py").write_text(SOURCE)
    np.save(folder / "ones.npy", np.ones(6 * 5 + 5 + 5 * 3 + 3, dtype=np.float32))
    (folder / "unfinished.py").write_text("def build(:\n")
    for name in ("needy.py", "wanting.py"):
        (folder / name).write_text("import torch\nimport no_such_library\n")
    (folder / "named").mkdir()
    (folder / "named" / "export.py").write_text(SOURCE)
    for suffix in ("npy", "safetensors", "f32", "zip"):
        (folder / f"broken.{suffix}").write_bytes(b"PK\3\4x")
    assert edge_export(folder, "key", "--out", "publisher.key").returncode == 0
    done = edge_export(folder, "build", "tiny.py:build", "--key", "publisher.key", "--out", "tiny.bundle", "--json")
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def test_a_key_is_secret_and_is_never_overwritten(built):
    folder, _ = built
    key = folder / "publisher.key"
    assert key.stat().st_mode & 0o777 == 0o600
    before = key.read_bytes()
    again = edge_export(folder, "key", "--out", "publisher.key")
    assert again.returncode == 1
    assert "File exists: publisher.key" in again.stderr
    assert key.read_bytes() == before


def test_build_says_what_it_made(built):
    _, said = built
    assert said["dimension"] == 6 * 5 + 5 + 5 * 3 + 3
    assert said["fallback"] == []
    assert said["warnings"] == []
    assert said["gradients"]["0.weight"] == {"path": "fast", "reason": "outer, 1 use"}
    assert set(said["step_ms"]) == set(said["predict_ms"]) == {"onnxruntime"}
    assert min(*said["step_ms"].values(), *said["predict_ms"].values()) > 0


def test_build_says_what_one_example_is(built):
    folder, said = built
    assert said["inputs"] == [{"name": "x", "shape": [6], "dtype": "float32", "below": None}]
    assert said["label"] == {"name": "y", "shape": [], "dtype": "int64", "below": 3}
    assert said["output"] == {"name": "output", "shape": [3], "dtype": "float32", "below": None}
    done = edge_export(folder, *BUILD, "--out", "told.bundle")
    rows = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in done.stderr.splitlines()]
    assert ["x", "6", "float32"] in [row[:3] for row in rows]
    assert ["y", "scalar", "int64", "0 to 2"] in rows


@pytest.mark.parametrize(
    ("function", "warned"),
    [
        ("idle", "second.weight, second.bias: the loss does not depend on this, and yet every round sends it"),
        ("idle_and_frozen", None),
        ("softened", "The model ends in a softmax, and cross_entropy has one inside: it takes scores."),
        ("squashed", "The model ends in a sigmoid, and binary_cross_entropy has one inside: it takes scores."),
        ("squashed_for_mse", None),
    ],
)
def test_build_warns_of_what_trains_but_not_as_it_was_meant(built, function, warned):
    folder, _ = built
    done = edge_export(
        folder, "build", f"tiny.py:{function}", "--key", "publisher.key", "--out", "doubtful.bundle", "--json"
    )
    assert done.returncode == 0, done.stderr
    warnings = json.loads(done.stdout)["warnings"]
    assert [warning.startswith(warned or "nothing") for warning in warnings] == [True] * bool(warned)


def test_build_gives_the_size_of_every_entry_and_of_the_file(built):
    folder, said = built
    with zipfile.ZipFile(folder / "tiny.bundle") as archive:
        assert said["entries"] == {name: len(archive.read(name)) for name in archive.namelist()}
    assert set(said["entries"]) >= {"train.onnx", "predict.onnx", "parameters.safetensors"}
    assert said["bytes"] == (folder / "tiny.bundle").stat().st_size > sum(said["entries"].values())


def test_the_table_shows_each_entry_with_its_size_and_its_graphs_time_within_80_columns(built, monkeypatch):
    folder, said = built
    monkeypatch.setenv("COLUMNS", "80")
    done = edge_export(folder, "build", "tiny.py:build", "--key", "publisher.key", "--out", "shown.bundle")
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert max(map(len, lines)) <= 80
    rows = {cells[0].strip(): cells[1:] for cells in (line.strip("│ ").split("│") for line in lines) if cells[1:]}
    sizes = {name: int(rows[name][0].replace(",", "")) for name in (*said["entries"], "the whole file")}
    assert sizes == {**said["entries"], "the whole file": said["bytes"]}
    for name in ("train.onnx", "predict.onnx"):
        assert rows[name][1].strip() == "onnxruntime"
        assert float(rows[name][2]) > 0
    assert [cell.strip() for cell in rows["0.weight"]] == ["5x6", "shared", "fast: outer, 1 use"]


def test_in_a_pipe_each_stage_is_a_line_on_stderr_and_stdout_is_the_result_alone(built):
    folder, _ = built
    done = edge_export(folder, "build", "tiny.py:build", "--key", "publisher.key", "--out", "piped.bundle")
    said = [line.removeprefix("edge-export: ") for line in done.stderr.splitlines() if line.startswith("edge-export: ")]
    assert said == [
        "loading the model", "capturing the training step", "making train.onnx", "making predict.onnx", "signing",
        "timing train.onnx", "timing predict.onnx",
    ]  # fmt: skip
    assert len(done.stdout.splitlines()) == 2
    assert "\x1b" not in done.stderr


@pytest.mark.parametrize(
    ("unit", "batch", "warned"), [("example", 41, True), ("example", 40, False), ("device", 41, False)]
)
def test_build_warns_of_a_batch_whose_rounding_the_clips_slack_does_not_cover(built, unit, batch, warned):
    """docs/training-graph.md section 5: up to 40 for unit "example"; unit "device" rounds nobody else's part."""
    folder, _ = built
    options = ("--unit", unit, "--batch", str(batch), "--json")
    done = edge_export(folder, "build", "tiny.py:build", "--key", "publisher.key", "--out", "large.bundle", *options)
    assert done.returncode == 0, done.stderr
    warnings = json.loads(done.stdout)["warnings"]
    assert [warning.startswith("A batch of 41 is above 40: ") for warning in warnings] == [True] * warned
    assert ("A batch of 41 is above 40: " in " ".join(done.stderr.split())) == warned


def test_the_same_source_gives_the_same_bytes_in_another_process(built):
    folder, _ = built
    command = [sys.executable, "-m", "export", "build", "tiny:build", "--key", "publisher.key", "--out", "again.bundle"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (folder / "again.bundle").read_bytes() == (folder / "tiny.bundle").read_bytes()
    assert "fast: outer, 1 use" in done.stderr


def test_check_compares_the_run_times_and_fails_past_the_tolerance(built):
    folder, _ = built
    done = edge_export(folder, "check", "tiny.bundle", "tiny.py:build", "--json")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["tensor"] for row in rows} >= {"grad.0.weight", "grad.2.bias", "loss", "count"}
    assert all(row["reference"] == "torch" and row["ok"] for row in rows)
    assert done.stderr == f"edge-export: all {len(rows)} differences are within 1e-05\n"
    alone = edge_export(folder, "check", "tiny.bundle")
    assert alone.returncode == 0, alone.stderr
    strict = edge_export(folder, "check", "tiny.bundle", "tiny.py:build", "--tolerance", "-1")
    assert strict.returncode == 1
    assert "differences are over -1" in strict.stderr
    other = edge_export(folder, "check", "tiny.bundle", "tiny.py:other")
    assert other.returncode == 1
    assert "was not built from this source" in other.stderr


def test_check_runs_executorch_beside_onnxruntime(built):
    pytest.importorskip("executorch")
    folder, _ = built
    both = ("--backends", "onnx,executorch", "--json")
    done = edge_export(folder, "build", "tiny.py:build", "--key", "publisher.key", "--out", "both.bundle", *both)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert {"train.pte", "predict.pte"} <= set(said["entries"])
    assert set(said["step_ms"]) == set(said["predict_ms"]) == {"onnxruntime", "executorch"}
    checked = edge_export(folder, "check", "both.bundle", "tiny.py:build", "--json")
    assert checked.returncode == 0, checked.stderr
    rows = [json.loads(line) for line in checked.stdout.splitlines()]
    assert {row["runtime"] for row in rows} == {"onnxruntime", "executorch"}


def test_a_trained_model_comes_back_as_onnx_and_as_a_state_dict(built):
    import onnxruntime
    import torch
    from safetensors.numpy import load_file, save_file

    folder, said = built
    vector = np.linspace(-1, 1, said["dimension"], dtype=np.float32)
    np.save(folder / "trained.npy", vector)
    for out in ("trained.onnx", "trained.pt", "trained.safetensors"):
        done = edge_export(folder, "model", "tiny.bundle", "trained.npy", "--out", out, "--json")
        assert done.returncode == 0, done.stderr
        assert ("rows" in json.loads(done.stdout)) == (out == "trained.onnx")
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    model.load_state_dict(torch.load(folder / "trained.pt"))
    x = np.linspace(-2, 2, 32 * 6, dtype=np.float32).reshape(32, 6)
    session = onnxruntime.InferenceSession(folder / "trained.onnx", providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["x"]
    (output,) = session.run(["output"], {"x": x})
    np.testing.assert_allclose(output, model(torch.from_numpy(x)).detach().numpy(), rtol=1e-5, atol=1e-6)
    named = load_file(folder / "trained.safetensors")
    np.testing.assert_array_equal(named["0.weight"].reshape(-1), vector[:30])
    save_file(named, folder / "named.safetensors")
    again = edge_export(folder, "model", "tiny.bundle", "named.safetensors", "--out", "again.onnx")
    assert again.returncode == 0, again.stderr
    assert (folder / "again.onnx").read_bytes() == (folder / "trained.onnx").read_bytes()


def test_with_its_source_the_inference_model_takes_any_number_of_rows(built):
    import onnxruntime

    folder, said = built
    np.save(folder / "trained.npy", np.linspace(-1, 1, said["dimension"], dtype=np.float32))
    x = np.linspace(-2, 2, 32 * 6, dtype=np.float32).reshape(32, 6)

    def unpacked(rows, *source):
        done = edge_export(folder, "model", "tiny.bundle", "trained.npy", *source, "--out", "rows.onnx", "--json")
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        size = (folder / "rows.onnx").stat().st_size
        assert json.loads(done.stdout) == {"out": "rows.onnx", "bytes": size, "rows": rows}
        return onnxruntime.InferenceSession(folder / "rows.onnx", providers=["CPUExecutionProvider"])

    fixed, free = unpacked(32), unpacked(None, "tiny.py:build")
    assert fixed.get_inputs()[0].shape == [32, 6]
    assert free.get_inputs()[0].shape == ["rows", 6]
    (expected,) = fixed.run(["output"], {"x": x})
    for rows in (1, 3):
        (output,) = free.run(["output"], {"x": x[:rows]})
        np.testing.assert_allclose(output, expected[:rows], rtol=1e-5, atol=1e-6)


def test_a_source_may_have_any_name_also_that_of_a_package_here(built):
    folder, said = built
    ours = sys.modules["export"]
    done = edge_export(folder, *("build", "named/export.py:build", *BUILD[2:], "--out", "named.bundle", "--json"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["hash"] == said["hash"]
    assert sys.modules["export"] is ours


def test_what_the_users_code_prints_is_not_in_the_result(built):
    folder, _ = built
    done = edge_export(folder, "build", "tiny.py:talking", "--key", "publisher.key", "--out", "loud.bundle", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bundle"] == "loud.bundle"
    assert "a model" in done.stderr
    assert "a batch" in done.stderr
    done = edge_export(folder, "check", "loud.bundle", "tiny.py:talking", "--json")
    assert done.returncode == 0, done.stderr
    assert all(json.loads(line)["ok"] for line in done.stdout.splitlines())
    np.save(folder / "loud.npy", np.ones(21, dtype=np.float32))
    done = edge_export(folder, "model", "loud.bundle", "loud.npy", "tiny.py:talking", "--out", "loud.onnx", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["out"] == "loud.onnx"


def test_a_model_that_fixes_its_rows_is_unpacked_with_the_bundles_batch_and_that_is_said(built):
    import onnxruntime

    folder, _ = built
    done = edge_export(folder, "build", "tiny.py:fixed", "--key", "publisher.key", "--out", "fixed.bundle")
    assert done.returncode == 0, done.stderr
    np.save(folder / "fixed.npy", np.ones(21, dtype=np.float32))
    command = ("model", "fixed.bundle", "fixed.npy", "tiny.py:fixed", "--out", "fixed.onnx", "--json")
    done = edge_export(folder, *command)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == 32
    assert done.stderr.startswith("edge-export: fixed.onnx takes 32 rows: the model fixes the number of rows: ")
    session = onnxruntime.InferenceSession(folder / "fixed.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == [32, 6]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("build", "tiny.py", "--key", "publisher.key", "--out", "x"), "is not MODULE:FUNCTION"),
        (("build", "none.py:build", "--key", "publisher.key", "--out", "x"), "there is no file none.py"),
        (("build", "none:build", "--key", "publisher.key", "--out", "x"), "there is no module none"),
        (("build", "tiny.py:nothing", "--key", "publisher.key", "--out", "x"), "has no function nothing"),
        (("build", "tiny.py:number", "--key", "publisher.key", "--out", "x"), "has no function number"),
        (("build", "tiny.py:normalised", "--key", "publisher.key", "--out", "x"), "1 (BatchNorm1d): BatchNorm"),
        (("build", "tiny.py:build", "--key", "tiny.py", "--out", "x"), "does not hold a publisher's key"),
        (("build", "tiny.py:build", "--key", "none", "--out", "x"), "No such file or directory: none"),
        (("build", "tiny.py:build", "--key", "publisher.key", "--out", "x", "--proximal"), "unit 'device' only"),
        (("build", "tiny.py:build", "--key", "publisher.key", "--out", "x", "--backends", "tpu"), "no back end 'tpu'"),
        (("build", "tiny.py:of_size", "--key", "publisher.key", "--out", "x"), "is called without arguments"),
        (
            ("build", "tiny.py:raising", "--key", "publisher.key", "--out", "x"),
            "tiny.py:raising raised FileNotFoundError: [Errno 2] No such file or directory: 'weights.pt' (tiny.py, lin",
        ),
        (
            ("build", "tiny.py:without_label", "--key", "publisher.key", "--out", "x"),
            "missing 1 required positional argument: 'label' (tiny.py, line ",
        ),
        (
            ("build", "tiny.py:importing", "--key", "publisher.key", "--out", "x"),
            "raised ModuleNotFoundError: No module named 'no_such_library' (tiny.py, line ",
        ),
        (("build", "needy.py:build", "--key", "publisher.key", "--out", "x"), "'no_such_library' (needy.py, line 2)"),
        (("build", "wanting:build", "--key", "publisher.key", "--out", "x"), "no_such_library' (wanting.py, line 2)"),
        (
            ("build", "unfinished.py:build", "--key", "publisher.key", "--out", "x"),
            "unfinished.py raised SyntaxError: invalid syntax (unfinished.py, line 1)",
        ),
        (("check", "tiny.bundle", "tiny.py:raising"), "tiny.py:raising raised FileNotFoundError"),
        (("check", "tiny.py"), "tiny.py is not a bundle"),
        (("check", "tiny.bundle", "--publisher", "00" * 32), "edge-export: "),
        (("model", "tiny.bundle", "ones.npy", "tiny.py:other", "--out", "x.onnx"), "its parameters are others"),
        (("model", "tiny.bundle", "ones.npy", "tiny.py:of_rows", "--out", "x.onnx"), "its inputs are others"),
        (("model", "tiny.bundle", "ones.npy", "tiny.py:rectified_otherwise", "--out", "x.onnx"), "outputs are others"),
        (("model", "tiny.bundle", "tiny.py", "--out", "x.onnx"), "parameters are read from"),
        (("model", "tiny.bundle", "broken.npy", "--out", "x.onnx"), "broken.npy is not a .npy file"),
        (("model", "tiny.bundle", "broken.safetensors", "--out", "x.onnx"), "is not a safetensors file"),
        (("model", "tiny.bundle", "broken.f32", "--out", "x.onnx"), "5 bytes are not a number of float32"),
        (("check", "broken.zip"), "broken.zip is not a bundle"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, tuple) else value[:20],
)  # fmt: skip
def test_what_cannot_be_done_is_said_in_one_line_and_writes_nothing(built, arguments, reason):
    folder, _ = built
    done = edge_export(folder, *arguments)
    assert done.returncode == 1
    assert reason in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(folder.glob("x*"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("build", "tiny.py:spoken", "--key", "publisher.key", "--out", "x"),
            "name='My Model': a model's name is 1 to 64 of a-z, 0-9, '.', '_' and '-', and begins with a-z or 0-9",
        ),
        ((*BUILD, "--out", "x", "--batch", "100000"), "a batch of 100000: a graph takes 1 to 65536 examples"),
        ((*BUILD, "--out", "x", "--batch", "0"), "a batch of 0: a graph takes 1 to 65536 examples"),
        ((*BUILD, "--out", "none/x"), "--out none/x: there is no folder none: make it first, or name another"),
        ((*BUILD, "--out", "."), "--out .: this is a folder: name a file in it"),
        (
            ("model", "tiny.bundle", "ones.npy", "--out", "none/x.pt"),
            "--out none/x.pt: there is no folder none: make it first, or name another",
        ),
        (("model", "tiny.bundle", "ones.npy", "--out", "x.tflite"), "--out x.tflite: .onnx, .safetensors or .pt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_does_not_go_is_said_before_the_capture_begins(built, arguments, said):
    folder, _ = built
    done = edge_export(folder, *arguments)
    assert done.returncode == 1
    *before, last = done.stderr.splitlines()
    assert last == f"edge-export: {said}"
    assert set(before) <= {"edge-export: loading the model"}
    assert not list(folder.glob("x*"))


def test_wrong_usage_exits_with_2(built):
    folder, _ = built
    assert edge_export(folder, "build").returncode == 2
    assert edge_export(folder).returncode == 2
