"""`edge-export check` against graphs that are wrong, and against batches where nobody is."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

from onnx import helper, numpy_helper  # noqa: E402
from torch import nn  # noqa: E402

import export.check  # noqa: E402
from edge_sdk.bundle import PREDICT_ONNX, TRAIN_ONNX, Bundle, write_bundle  # noqa: E402
from edge_sdk.crypto.identity import Identity  # noqa: E402
from edge_sdk.errors import ParameterError  # noqa: E402
from export.build import Built, build  # noqa: E402
from export.check import TOLERANCE, batch_of, check  # noqa: E402
from export.graph import TrainingSpec  # noqa: E402

PUBLISHER = Identity(b"publisher".ljust(32))
BATCH = 4


def perceptron() -> TrainingSpec:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))
    return TrainingSpec(model, "cross_entropy", [torch.zeros(3)], torch.zeros((), dtype=torch.long))


@cache
def built_perceptron() -> Built:
    return build(perceptron(), PUBLISHER, unit="example", batch=BATCH)


def bundle_with(change: Callable[[onnx.ModelProto], None] | None = None, built: Built | None = None) -> Bundle:
    """Of the perceptron, or of `built`, signed, with a training graph that was changed."""
    built = built or built_perceptron()
    bundle = Bundle.read(built.bundle, PUBLISHER.public_key)
    if change is None:
        return bundle
    model = onnx.ModelProto.FromString(bundle.file(TRAIN_ONNX))
    change(model)
    files = {TRAIN_ONNX: model.SerializeToString(), PREDICT_ONNX: bundle.file(PREDICT_ONNX)}
    return Bundle.read(write_bundle(built.manifest, files, bundle.parameters(), PUBLISHER), PUBLISHER.public_key)


def scaled(output: str, factor: float) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            for i, name in enumerate(node.output):
                if name == output:
                    node.output[i] = "honest"
            for i, name in enumerate(node.input):
                if name == output:
                    node.input[i] = "honest"
        model.graph.initializer.append(numpy_helper.from_array(np.array(factor, np.float32), "factor"))
        model.graph.node.append(helper.make_node("Mul", ["honest", "factor"], [output]))

    return change


def worst(bundle: Bundle, spec: TrainingSpec | None) -> float:
    return max(d.relative for d in check(bundle, spec).differences)


@pytest.mark.parametrize("with_source", [True, False])
def test_an_honest_bundle_is_within_the_tolerance(with_source: bool) -> None:
    spec = perceptron()
    found = check(bundle_with(), spec if with_source else None)
    assert found.reference == ("torch" if with_source else "onnx reference")
    assert not found.kinks
    assert {d.runtime for d in found.differences} == {"onnxruntime"}
    assert 0 < max(d.relative for d in found.differences) < 1e-6


@pytest.mark.parametrize(
    ("output", "factor"),
    [("grad.0.weight", 1 + 5e-5), ("grad.0.bias", -1.0), ("grad.2.weight", 0.0), ("loss", 1 + 5e-5), ("clipped", 2.0)],
)
def test_a_graph_that_is_wrong_is_never_excused_as_a_kink(output: str, factor: float) -> None:
    spec = perceptron()
    found = check(bundle_with(scaled(output, factor)), spec)
    assert [d.tensor for d in found.differences if not d.relative <= TOLERANCE] == [output]
    assert not found.kinks


def test_a_source_with_another_layer_is_found_by_its_values() -> None:
    """The same names and shapes: the reference has a tanh where the bundle has a rectifier."""
    spec = perceptron()
    bundle = bundle_with()
    spec.model[1] = nn.Tanh()
    assert worst(bundle, spec) > 1e-2


def untrained_perceptron() -> TrainingSpec:
    """All classes are as likely: every loss is log 3, above 1, and every gradient's norm above 0.8."""
    spec = perceptron()
    for parameter in spec.model[2].parameters():
        nn.init.zeros_(parameter)
    return spec


def always_clipped(model: onnx.ModelProto) -> None:
    """Every gradient is made as long as the clip, also a shorter one."""
    (longer,) = (node for node in model.graph.node if node.op_type == "Max" and "clip" in node.input)
    (norms,) = (name for name in longer.input if name != "clip")
    longer.input[:] = [norms, norms]


def always_bound(model: onnx.ModelProto) -> None:
    """Every loss is the bound, also a smaller one."""
    (lesser,) = (node for node in model.graph.node if node.op_type == "Min" and "loss_bound" in node.input)
    (losses,) = (name for name in lesser.input if name != "loss_bound")
    lesser.op_type = "Max"
    lesser.input[:] = ["loss_bound", "no_losses"]
    zeros = helper.make_node("Mul", [losses, "nought"], ["no_losses"])
    model.graph.initializer.append(numpy_helper.from_array(np.array(0.0, np.float32), "nought"))
    model.graph.node.insert(list(model.graph.node).index(lesser), zeros)


@pytest.mark.parametrize(("change", "wrong"), [(always_clipped, "grad.2.bias"), (always_bound, "loss")])
def test_what_happens_within_the_bounds_is_compared_too(change: Callable[[onnx.ModelProto], None], wrong: str) -> None:
    spec = untrained_perceptron()
    built = build(spec, PUBLISHER, unit="example", batch=BATCH)
    honest = Bundle.read(built.bundle, PUBLISHER.public_key)
    assert worst(honest, spec) < 1e-6
    found = check(bundle_with(change, built), spec)
    assert wrong in [d.tensor for d in found.differences if not d.relative <= TOLERANCE]


def on_a_kink(bundle: Bundle) -> list[np.ndarray]:
    """Batch 0, whose first example gives a first unit with weights 1, 1, -1 and no bias 0 in float32 and more in
    float64."""
    feed = batch_of(bundle, 0)
    names = [p.name for p in bundle.manifest.parameters]
    weight, bias = feed[names.index("0.weight")].copy(), feed[names.index("0.bias")].copy()
    weight[0], bias[0] = [1, 1, -1], 0
    feed[names.index("0.weight")], feed[names.index("0.bias")] = weight, bias
    x = feed[len(names)]
    x[0] = [1, 2.0**-25, 1]
    return feed


def test_a_batch_on_a_kink_is_drawn_anew_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = perceptron()
    bundle = bundle_with()
    asked = []

    def draw(bundle: Bundle, number: int, examples: int | None = None) -> list[np.ndarray]:
        asked.append((number, examples))
        return on_a_kink(bundle) if number == 1 else batch_of(bundle, number, examples)

    monkeypatch.setattr(export.check, "batch_of", draw)
    found = check(bundle, spec)
    (kink,) = found.kinks
    assert kink.batch == 1
    assert kink.tensor.startswith("grad.0.")
    assert TOLERANCE < kink.relative <= 2 * kink.moved
    assert max(d.relative for d in found.differences) < 1e-6
    assert asked == [(0, 4), (1, 4), (2, 2), (3, 2), (4, 2)]


def test_a_wrong_graph_on_a_kink_is_still_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kink explains the first layer's difference; it does not explain the loss."""
    spec = perceptron()
    bundle = bundle_with(scaled("loss", 1.001))
    monkeypatch.setattr(export.check, "batch_of", lambda bundle, number, examples=None: on_a_kink(bundle))
    found = check(bundle, spec)
    assert not found.kinks
    assert [d for d in found.differences if d.tensor == "loss" and d.relative > TOLERANCE]


def test_kinks_without_end_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = perceptron()
    monkeypatch.setattr(export.check, "batch_of", lambda bundle, number, examples=None: on_a_kink(bundle))
    found = check(bundle_with(), spec, batches=2)
    assert len(found.kinks) == 6
    assert max(d.relative for d in found.differences) > TOLERANCE


def test_a_batch_is_full_if_nothing_else_is_asked_for() -> None:
    assert batch_of(bundle_with(), 0)[-3].sum() == BATCH


@pytest.mark.parametrize("examples", [1, 2, 4])
@pytest.mark.parametrize("number", [0, 1])
def test_a_batch_has_no_more_examples_than_asked_for_and_never_none(number: int, examples: int) -> None:
    bundle = bundle_with()
    mask = batch_of(bundle, number, examples)[-3]
    assert mask.shape == (BATCH,)
    assert 1 <= mask.sum() <= examples
    assert not mask[examples:].any()


def test_a_source_with_other_parameters_is_refused() -> None:
    other = TrainingSpec(nn.Linear(3, 3), "cross_entropy", [torch.zeros(3)], torch.zeros((), dtype=torch.long))
    with pytest.raises(ParameterError, match="was not built from this source"):
        check(bundle_with(), other)
