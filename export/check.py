"""The same batches through every run time, and how far they are from the graph in float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import fx

from edge_sdk.bundle import TRAIN_ONNX, TRAIN_PTE, Bundle, train_inputs, train_outputs
from edge_sdk.errors import ParameterError
from edge_sdk.training.executorch import ExecutorchEngine
from edge_sdk.training.onnx import OnnxEngine
from edge_sdk.training.steps import Engine, Graph, Run
from export.graph import CapturedStep, TrainingSpec, capture

Array = NDArray[np.generic]
Graph64 = Callable[[Sequence[Array]], Sequence[Array]]
TOLERANCE = 1e-5
"""Largest accepted difference, relative to the tensor's norm."""
SHARE = 1e-2
"""A gradient shorter than this part of all of them together is held to that part: what cancels is not known better."""
NUDGE = 1e-6
"""Relative change of inputs and parameters that shows a kink: some float32 rounding errors."""
NUDGES = 8
OUT_OF_REACH = 1e6
"""A clip and a loss bound that no example reaches."""
REDRAWS = 3
"""Batches drawn anew for each one wanted, at most."""


@dataclass(frozen=True)
class Difference:
    """How far one output of one run time is from the reference's: |difference| / |reference|, the worst batch's."""

    tensor: str
    runtime: str
    relative: float


@dataclass(frozen=True)
class Kink:
    """A batch that was drawn anew, and why: an input of a rectifier or a maximum lies so close to where its gradient
    jumps that rounding decides on which side.

    relative: the largest difference of a run time, in `tensor`.  moved: how far that tensor of the float64 reference
    moves when inputs and parameters change by NUDGE.
    """

    batch: int
    tensor: str
    runtime: str
    relative: float
    moved: float


@dataclass(frozen=True)
class Comparison:
    """reference: what the others are compared with.  differences: a row per output and run time.  kinks: batches that
    are not in them."""

    reference: str
    differences: tuple[Difference, ...]
    kinks: tuple[Kink, ...]


def check(bundle: Bundle, spec: TrainingSpec | None, batches: int = 4, tolerance: float = TOLERANCE) -> Comparison:
    """Runs the training graph everywhere it can be run, on `batches` batches.

    spec: the bundle's source; with it the reference is the captured graph in PyTorch, without it the ONNX project's own
    reference implementation of train.onnx; either in float64.
    A batch in which something is past `tolerance` is drawn anew if it lies on a kink: if every tensor that is past
    moves at least half as far in the reference when inputs and parameters are nudged. Of a large model nearly every
    batch does, so from then on a batch has half as many examples, at least one. No more than REDRAWS * batches are
    drawn anew: an error that is there in every batch is not excused, however badly conditioned the model is.
    Raises ParameterError if `spec` is not what the bundle was built from.
    """
    if spec is not None:
        reference, exact = "torch", _torch(bundle, spec)
    else:
        reference, exact = "onnx reference", _onnx_reference(bundle)
    runtimes: dict[str, Graph64] = {}
    runtimes["onnxruntime"] = on_device(bundle, OnnxEngine(bundle, threads=1))
    if TRAIN_PTE in bundle:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its Python binding calls itself experimental
            runtimes["executorch"] = on_device(bundle, ExecutorchEngine(bundle, threads=1))
    outputs = [t.name for t in train_outputs(bundle.manifest)]
    worst = {(name, runtime): 0.0 for name in outputs for runtime in runtimes}
    kinks: list[Kink] = []
    number = 0
    while number < batches + len(kinks):
        feed = batch_of(bundle, number, max(1, bundle.manifest.batch >> len(kinks)))
        expected = dict(zip(outputs, exact(feed), strict=True))
        found = {
            (name, runtime): value
            for runtime, run in runtimes.items()
            for name, value in relative_differences(dict(zip(outputs, run(feed), strict=True)), expected).items()
        }
        past = {key: value for key, value in found.items() if not value <= tolerance}
        if past and len(kinks) < REDRAWS * batches:
            moved = _nudged(bundle, exact, feed, expected)
            if all(value <= 2 * moved[name] for (name, _), value in past.items()):
                tensor, runtime = max(past, key=past.__getitem__)
                kinks.append(Kink(number, tensor, runtime, past[tensor, runtime], moved[tensor]))
                number += 1
                continue
        worst = {key: max(value, found[key]) for key, value in worst.items()}
        number += 1
    rows = (Difference(name, runtime, value) for (name, runtime), value in worst.items())
    return Comparison(reference, tuple(rows), tuple(kinks))


def relative_differences(got: Mapping[str, Array], expected: Mapping[str, Array]) -> dict[str, float]:
    """By name |got - expected| / |expected| in float64; infinite if either is not finite or shapes differ."""
    wide = {name: np.asarray(value, dtype=np.float64) for name, value in expected.items()}
    norms = {name: float(np.linalg.norm(value)) for name, value in wide.items()}
    gradients = [norms[name] for name in norms if name.startswith(("grad.", "local_grad."))]
    least = SHARE * float(np.linalg.norm(gradients)) if gradients else 0.0
    found = {}
    for name, value in wide.items():
        have = np.asarray(got[name], dtype=np.float64)
        if have.shape != value.shape or not (np.isfinite(have).all() and np.isfinite(value).all()):
            found[name] = float("inf")
            continue
        scale = max(norms[name], least if name.startswith(("grad.", "local_grad.")) else 0.0, 1e-6)
        found[name] = float(np.linalg.norm(have - value)) / scale
    return found


def _nudged(bundle: Bundle, exact: Graph64, feed: Sequence[Array], expected: Mapping[str, Array]) -> dict[str, float]:
    """How far each output of the reference moves, at most, under NUDGES random changes by NUDGE of inputs and
    parameters."""
    generator = np.random.default_rng(0)  # noqa: TID251  (no secret: which way to nudge)
    names = [t.name for t in train_inputs(bundle.manifest)]
    kept = {"y", "mask", "clip", "loss_bound", "lr", "mu"}
    moved = dict.fromkeys(expected, 0.0)
    for _ in range(NUDGES):
        nudged = [
            x if name in kept or x.dtype != np.float32
            else x.astype(np.float64) * (1 + NUDGE * generator.choice((-1.0, 1.0), x.shape))
            for name, x in zip(names, feed, strict=True)
        ]  # fmt: skip
        found = dict(zip(expected, exact(nudged), strict=True))
        moved = {name: max(moved[name], value) for name, value in relative_differences(found, expected).items()}
    return moved


def batch_of(bundle: Bundle, number: int, examples: int | None = None) -> list[Array]:
    """Inputs of the training graph: the bundle's parameters and random examples, from batch 1 on a third masked.

    Clip and loss bound are small in even batches and out of reach in odd ones: with the small ones alone most models'
    examples would all be clipped, and all losses be the bound, whatever the graph makes of others.
    examples: how many are not padding; all if not given.
    """
    generator = np.random.default_rng(number)  # noqa: TID251  (examples for a comparison: nothing secret)
    manifest = bundle.manifest
    feed: list[Array] = [bundle.parameters()[p.name] for p in manifest.parameters]
    for tensor in (*manifest.inputs, manifest.label):
        shape = (manifest.batch, *tensor.shape)
        if tensor.dtype == "float32":
            low = 0.0 if tensor is manifest.label else -1.0
            feed.append(generator.uniform(low, 1.0, shape).astype(np.float32))
        else:
            feed.append(generator.integers(0, tensor.below or 2, shape).astype(tensor.dtype))
    mask = np.ones(manifest.batch, dtype=np.float32)
    mask[manifest.batch if examples is None else examples :] = 0.0
    if number and mask[1:].any():
        mask[::3] = 0.0
    feed.append(mask)
    bounds = (OUT_OF_REACH, OUT_OF_REACH) if number % 2 else (0.5, 1.0)
    scalars = {"example": bounds, "device": (0.5,)}  # clip and loss bound; learning rate
    feed += [np.array(value, dtype=np.float32) for value in scalars[manifest.unit]]
    if manifest.options.proximal:
        feed.append(np.array(0.1, dtype=np.float32))
        feed += [bundle.parameters()[p.name] * np.float32(0.9) for p in manifest.of_role("shared", "local")]
    return feed


def _torch(bundle: Bundle, spec: TrainingSpec) -> Graph64:
    manifest = bundle.manifest
    step: CapturedStep = capture(spec, manifest.unit, manifest.batch, manifest.options.proximal)
    expected = [t.name for t in train_inputs(manifest)]
    if list(step.train_inputs) != expected:
        raise ParameterError("the bundle was not built from this source: its parameters or inputs are others")

    graph = _Float64(step.train)

    def run(feed: Sequence[Array]) -> Sequence[Array]:
        with torch.no_grad():
            return [t.numpy() for t in graph.run(*(_double(torch.from_numpy(np.array(x))) for x in feed))]

    return run


class _Float64(fx.Interpreter):
    """A captured graph with float64 wherever it says float32."""

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return _double(super().get_attr(target, args, kwargs))

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(target, _double(args), _double(kwargs))


def _double(value: Any) -> Any:
    """`value` with float64 for float32, in tensors and where it is named, at any depth."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.dtype == torch.float32 else value
    if isinstance(value, tuple | list):
        return type(value)(_double(item) for item in value)
    if isinstance(value, dict):
        return {key: _double(item) for key, item in value.items()}
    return torch.float64 if value is torch.float32 else value


def _onnx_reference(bundle: Bundle) -> Graph64:
    model = onnx.ModelProto.FromString(bundle.file(TRAIN_ONNX))
    _widen(model.graph)
    evaluator = ReferenceEvaluator(model)
    names = [t.name for t in train_inputs(bundle.manifest)]

    def run(feed: Sequence[Array]) -> Sequence[Array]:
        wide = [x.astype(np.float64) if x.dtype == np.float32 else x for x in feed]
        with np.errstate(all="ignore"):
            return list(evaluator.run(None, dict(zip(names, wide, strict=True))))

    return run


def _widen(graph: onnx.GraphProto) -> None:
    """float64 wherever the graph says float32, in place. Graphs of a bundle have no subgraphs."""
    single, double = onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE

    def wide(tensor: onnx.TensorProto) -> None:
        if tensor.data_type == single:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))

    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == single:
            value.type.tensor_type.elem_type = double
    for tensor in graph.initializer:
        wide(tensor)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i == single:
                attribute.i = double
            elif attribute.type == onnx.AttributeProto.TENSOR:
                wide(attribute.t)


def on_device(bundle: Bundle, engine: Engine) -> Graph64:
    """The training graph as a device runs it: by the engine that its trainer uses."""
    graph = engine.load("train")

    def run(feed: Sequence[Array]) -> Sequence[Array]:
        step, results = bound(bundle, graph, feed)
        step()
        return results

    return run


def bound(bundle: Bundle, graph: Graph, feed: Sequence[Array]) -> tuple[Run, list[Array]]:
    """One step on `feed`, and where it leaves its outputs."""
    inputs = {t.name: np.array(x, order="C") for t, x in zip(train_inputs(bundle.manifest), feed, strict=True)}
    results: dict[str, Array] = {t.name: np.empty(t.shape, dtype=t.dtype) for t in train_outputs(bundle.manifest)}
    return graph.bind(inputs, results), list(results.values())
