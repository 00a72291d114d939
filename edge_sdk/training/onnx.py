"""Training with onnxruntime: any stock build runs the bundle's graphs, no training build is needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from edge_sdk.bundle import PREDICT_ONNX, TRAIN_ONNX, Bundle
from edge_sdk.errors import ParameterError, PeerError
from edge_sdk.training.examples import Array
from edge_sdk.training.steps import GraphName, GraphTrainer, Run

# onnxruntime's errors have no base class of their own; a failing run with bound arrays raises a bare RuntimeError.
_ERRORS: tuple[type[Exception], ...] = (
    ort_errors.Fail, ort_errors.InvalidArgument, ort_errors.InvalidGraph, ort_errors.InvalidProtobuf,
    ort_errors.NotImplemented, ort_errors.EPFail, ort_errors.EngineError, ort_errors.RuntimeException, RuntimeError,
)  # fmt: skip

_FATAL_ONLY = 4
"""What fails is raised; a log line beside it could carry values of private examples to a log file."""


class OnnxTrainer(GraphTrainer):
    """A `Trainer` on onnxruntime's CPU provider."""

    def __init__(self, bundle: Bundle, threads: int = 1) -> None:
        """threads: for one operator's work, >= 1. More than one pays for large models on idle machines only."""
        super().__init__(bundle, OnnxEngine(bundle, threads))


class OnnxEngine:
    """Loads a bundle's .onnx files."""

    def __init__(self, bundle: Bundle, threads: int) -> None:
        if threads < 1:
            raise ParameterError(f"{threads} threads")
        self._files = {"train": bundle.file(TRAIN_ONNX), "predict": bundle.file(PREDICT_ONNX)}
        self._threads = threads

    def load(self, graph: GraphName) -> OnnxGraph:
        try:
            return OnnxGraph(graph, ort.InferenceSession(self._files[graph], self._options(), _PROVIDERS))
        except _ERRORS as error:
            raise PeerError(f"{graph}.onnx: onnxruntime does not load it: {error}") from error

    def _options(self) -> ort.SessionOptions:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        # What lives inside a step is kept from step to step. Without the arena it is mapped anew each time: no faster,
        # and 17 MB more at its peak for an MLP of 400,000 parameters (onnxruntime 1.32).
        options.enable_cpu_mem_arena = True
        # A plan is made in the first step and its block lies beside what that step took: 45 MB instead of 24 for a
        # small transformer at batch 32, 168 instead of 85 for a separable CNN, and a step is no faster.
        options.enable_mem_pattern = False
        options.log_severity_level = _FATAL_ONLY
        # Waiting threads sleep: spinning is a battery spent on nothing.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        return options


_PROVIDERS = ["CPUExecutionProvider"]


class OnnxGraph:
    """One session."""

    def __init__(self, name: GraphName, session: ort.InferenceSession) -> None:
        self._name, self._session = name, session

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Run:
        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for name, array in outputs.items():
            binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        return _BoundRun(self, binding, (*inputs.values(), *outputs.values()))

    def run(self, binding: ort.IOBinding) -> None:
        """Run on what is bound. Raises PeerError if an operator fails."""
        try:
            self._session.run_with_iobinding(binding)
        except _ERRORS as error:
            raise PeerError(f"{self._name}.onnx fails on a batch: {error}") from error


@dataclass(frozen=True, slots=True)
class _BoundRun:
    """A graph with its arrays. The binding holds their bare addresses, so they are kept here."""

    graph: OnnxGraph
    binding: ort.IOBinding
    arrays: tuple[Array, ...]

    def __call__(self) -> None:
        self.graph.run(self.binding)
