"""The same batches through every run time, and how far they are apart."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from edge_sdk.bundle import TRAIN_ONNX, TRAIN_PTE, Bundle, train_inputs, train_outputs
from edge_sdk.errors import ParameterError
from edge_sdk.training.executorch import ExecutorchEngine
from edge_sdk.training.onnx import OnnxEngine
from edge_sdk.training.steps import Engine, Graph, Run
from export.graph import CapturedStep, TrainingSpec, capture

Array = NDArray[np.generic]
TOLERANCE = 1e-5
"""Largest accepted difference, relative to the tensor's norm."""


@dataclass(frozen=True)
class Difference:
    """How far one output of one run time is from the reference's: |difference| / |reference|, the worst batch's."""

    tensor: str
    runtime: str
    relative: float


def check(bundle: Bundle, spec: TrainingSpec | None, batches: int = 4) -> tuple[list[str], list[Difference]]:
    """Runs the training graph everywhere it can be run.

    spec: the bundle's source; with it the reference is the captured graph in PyTorch, without it the ONNX project's own
    reference implementation.  Returns the run times, reference first, and a row per output and other run time.
    Raises ParameterError if `spec` is not what the bundle was built from.
    """
    runtimes: dict[str, Callable[[Sequence[Array]], Sequence[Array]]] = {}
    if spec is not None:
        runtimes["torch"] = _torch(bundle, spec)
    else:
        evaluator = ReferenceEvaluator(onnx.ModelProto.FromString(bundle.file(TRAIN_ONNX)))
        names = [t.name for t in train_inputs(bundle.manifest)]
        runtimes["onnx reference"] = lambda feed: list(evaluator.run(None, dict(zip(names, feed, strict=True))))
    runtimes["onnxruntime"] = on_device(bundle, OnnxEngine(bundle, threads=1))
    if TRAIN_PTE in bundle:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its Python binding calls itself experimental
            runtimes["executorch"] = on_device(bundle, ExecutorchEngine(bundle, threads=1))
    order = list(runtimes)
    outputs = [t.name for t in train_outputs(bundle.manifest)]
    worst = {(name, runtime): 0.0 for name in outputs for runtime in order[1:]}
    for number in range(batches):
        feed = batch_of(bundle, number)
        reference = runtimes[order[0]](feed)
        for runtime in order[1:]:
            for name, expected, got in zip(outputs, reference, runtimes[runtime](feed), strict=True):
                worst[name, runtime] = max(worst[name, runtime], relative_difference(got, expected))
    return order, [Difference(name, runtime, value) for (name, runtime), value in worst.items()]


def relative_difference(got: Array, expected: Array) -> float:
    """|got - expected| / |expected| in float64; infinite if either is not finite or shapes differ."""
    a, b = np.asarray(got, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("inf")
    return float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-6))


def batch_of(bundle: Bundle, number: int) -> list[Array]:
    """Inputs of the training graph: the bundle's parameters and random examples, from batch 1 on a third masked."""
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
    if number:
        mask[::3] = 0.0
    feed.append(mask)
    scalars = {"example": (0.5, 1.0), "device": (0.5,)}  # clip and loss bound; learning rate
    feed += [np.array(value, dtype=np.float32) for value in scalars[manifest.unit]]
    if manifest.options.proximal:
        feed.append(np.array(0.1, dtype=np.float32))
        feed += [bundle.parameters()[p.name] * np.float32(0.9) for p in manifest.of_role("shared", "local")]
    return feed


def _torch(bundle: Bundle, spec: TrainingSpec) -> Callable[[Sequence[Array]], Sequence[Array]]:
    manifest = bundle.manifest
    step: CapturedStep = capture(spec, manifest.unit, manifest.batch, manifest.options.proximal)
    expected = [t.name for t in train_inputs(manifest)]
    if list(step.train_inputs) != expected:
        raise ParameterError("the bundle was not built from this source: its parameters or inputs are others")

    def run(feed: Sequence[Array]) -> Sequence[Array]:
        with torch.no_grad():
            return [t.numpy() for t in step.train(*(torch.from_numpy(np.array(x)) for x in feed))]

    return run


def on_device(bundle: Bundle, engine: Engine) -> Callable[[Sequence[Array]], Sequence[Array]]:
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
