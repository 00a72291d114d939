"""The ExecuTorch engine against the onnxruntime one, on the same small model written once more in torch."""

import subprocess
import sys
import warnings
from importlib.util import find_spec

import numpy as np
import pytest

pytest.importorskip("onnx")
from training import tiny_models as tiny

from edge_sdk.bundle import Bundle, write_bundle
from edge_sdk.errors import ParameterError, PeerError
from edge_sdk.training.examples import ArrayExamples
from edge_sdk.training.executorch import ExecutorchTrainer
from edge_sdk.training.onnx import OnnxTrainer

KEY = tiny.PUBLISHER.public_key
X, Y = tiny.examples(10)
EXAMPLES = ArrayExamples(X, Y)

installed = find_spec("executorch") is not None and find_spec("torch") is not None
needs_executorch = pytest.mark.skipif(not installed, reason="needs torch and executorch")
quiet = pytest.mark.filterwarnings("ignore")  # torch and executorch warn about each other


def programs(unit: str) -> dict[str, bytes]:
    """train.pte and predict.pte of the tiny model, portable kernels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        from executorch.exir import to_edge

    manifest = tiny.draft(unit)

    class Predict(torch.nn.Module):
        def forward(self, scale, w, head, b, shift, x):
            return (x * scale + shift) @ w + b + head

    def common(scale, w, head, b, shift, x, y, mask):
        bad = torch.isnan((x - x).sum(1)).float()
        counts = mask * (1 - bad)
        x = torch.where(counts[:, None] > 0, x, torch.zeros_like(x))
        features = x * scale + shift
        log_p = torch.log_softmax(features @ w + b + head, 1)
        target = (torch.arange(tiny.CLASSES) == y[:, None]).float()
        hits = (log_p.argmax(1) == y).float()
        metrics = -(log_p * target).sum(1) * counts, (hits * counts).sum(), counts.sum(), (bad * mask).sum()
        return features, log_p.exp() - target, counts, metrics

    class TrainExample(torch.nn.Module):
        def forward(self, scale, w, head, b, shift, x, y, mask, clip, loss_bound):
            features, delta, counts, metrics = common(scale, w, head, b, shift, x, y, mask)
            norm = torch.sqrt(((features**2).sum(1) + 1) * (delta**2).sum(1))
            ratio = torch.clamp(clip / torch.clamp(norm, min=1e-30), max=1.0)
            weighted = delta * (ratio * counts)[:, None]
            clipped = ((ratio < 1).float() * counts).sum()
            sums = features.t() @ weighted, (delta * counts[:, None]).sum(0), weighted.sum(0)
            loss = torch.minimum(torch.clamp(metrics[0], min=0.0), loss_bound).sum()
            return *sums, loss, metrics[1], metrics[2], clipped, metrics[3]

    class TrainDevice(torch.nn.Module):
        def forward(self, scale, w, head, b, shift, x, y, mask, lr):
            features, delta, counts, metrics = common(scale, w, head, b, shift, x, y, mask)
            delta = delta * counts[:, None]
            rate = lr / torch.clamp(metrics[2], min=1.0)
            step = rate * delta.sum(0)
            new = w - rate * (features.t() @ delta), head - step, b - step
            return *new, metrics[0].sum(), metrics[1], metrics[2], 0.0 * metrics[3], metrics[3]

    dtypes = {"float32": torch.float32, "int64": torch.int64}

    def lower(module, inputs):
        given = tuple(torch.ones(t.shape, dtype=dtypes[t.dtype]) for t in inputs)
        return bytes(to_edge(torch.export.export(module, given)).to_executorch().buffer)

    train = TrainExample() if unit == "example" else TrainDevice()
    return {
        "train.pte": lower(train, tiny.train_inputs(manifest)),
        "predict.pte": lower(Predict(), tiny.predict_inputs(manifest)),
    }


def bundle(unit: str, files: dict[str, bytes]) -> Bundle:
    manifest = tiny.draft(unit)
    data = write_bundle(manifest, {**tiny.graphs(manifest), **files}, tiny.initial_parameters(manifest), tiny.PUBLISHER)
    return Bundle.read(data, KEY)


def close(found, expected):
    return np.linalg.norm(found - expected) <= 2e-6 * np.linalg.norm(expected)


@needs_executorch
@quiet
def test_executorch_sums_as_onnxruntime_does():
    both = bundle("example", programs("example"))
    found = ExecutorchTrainer(both).clipped_sum(EXAMPLES, np.arange(10), clip=2.0, loss_bound=1.5, local_lr=0.1)
    expected = OnnxTrainer(both).clipped_sum(EXAMPLES, np.arange(10), clip=2.0, loss_bound=1.5)
    assert close(found.gradient, expected.gradient)
    assert found.metrics.loss == pytest.approx(expected.metrics.loss, rel=1e-5)
    assert (found.metrics.count, found.metrics.clipped) == (10, expected.metrics.clipped)


@needs_executorch
@quiet
def test_executorch_trains_and_predicts_as_onnxruntime_does():
    both = bundle("device", programs("device"))
    engines = ExecutorchTrainer(both), OnnxTrainer(both)
    found, expected = (engine.train(EXAMPLES, lr=0.1, entropy=bytes(32), epochs=3) for engine in engines)
    assert close(found.delta, expected.delta)
    assert close(engines[0].predict(X), engines[1].predict(X))
    assert close(engines[0].local()["head"], engines[1].local()["head"])


@needs_executorch
@quiet
@pytest.mark.parametrize("program", [b"\0", b"not a program at all, but long enough", b"\0\0\0\0ET12" + bytes(64)])
def test_a_program_that_does_not_load_is_the_publishers_fault(program):
    with pytest.raises(PeerError, match=r"train\.pte: ExecuTorch does not load it"):
        ExecutorchTrainer(bundle("example", {"train.pte": program, "predict.pte": program}))


@needs_executorch
@quiet
def test_a_program_with_another_border_is_the_publishers_fault():
    swapped = programs("device")
    trainer = ExecutorchTrainer(bundle("device", {**swapped, "train.pte": swapped["predict.pte"]}))
    with pytest.raises(PeerError, match=r"train\.pte"):
        trainer.train(EXAMPLES, lr=0.1, entropy=bytes(32), steps=1)


def test_a_bundle_without_programs_says_so():
    with pytest.raises(ParameterError, match=r"has no train\.pte"):
        ExecutorchTrainer(Bundle.read(tiny.bundle_bytes(), KEY))


def test_without_executorch_the_error_says_what_to_do():
    """In a fresh process in which neither torch nor executorch can be imported."""
    program = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['executorch'] = None\n"
        "from edge_sdk.training.executorch import ExecutorchEngine\n"
        "class Bundle:\n"
        "    def file(self, name): return b''\n"
        "try:\n"
        "    ExecutorchEngine(Bundle(), 1)\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "pip install torch executorch, or use edge_sdk.training.onnx" in result.stdout
