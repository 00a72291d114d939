"""Training with ExecuTorch: optional, for devices whose build of it is faster or smaller than onnxruntime.

Its Python binding needs torch, so nothing is imported before an `ExecutorchTrainer` is made. On a phone the same .pte
files run in ExecuTorch's C++, Java or Swift runtime without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from edge_sdk.bundle import PREDICT_PTE, TRAIN_PTE, Bundle
from edge_sdk.errors import ParameterError, PeerError
from edge_sdk.training.examples import Array
from edge_sdk.training.steps import GraphName, GraphTrainer, Run


class ExecutorchTrainer(GraphTrainer):
    """A `Trainer` on ExecuTorch's runtime. The bundle must have been built with ExecuTorch as a target."""

    def __init__(self, bundle: Bundle, threads: int = 1) -> None:
        """threads: of ExecuTorch's one pool, which all of a process shares, >= 1.

        Raises ParameterError if the bundle has no .pte files or ExecuTorch is not installed.
        """
        super().__init__(bundle, ExecutorchEngine(bundle, threads))


class ExecutorchEngine:
    """Loads a bundle's .pte files."""

    def __init__(self, bundle: Bundle, threads: int) -> None:
        if threads < 1:
            raise ParameterError(f"{threads} threads")
        self._files = {"train": bundle.file(TRAIN_PTE), "predict": bundle.file(PREDICT_PTE)}
        try:
            self._torch: Any = import_module("torch")
            self._runtime: Any = import_module("executorch.runtime").Runtime.get()
            pool: Any = import_module("executorch.extension.pybindings.portable_lib")
        except ImportError as error:
            raise ParameterError(
                "ExecuTorch is not installed: pip install torch executorch, or use edge_sdk.training.onnx"
            ) from error
        if hasattr(pool, "_unsafe_reset_threadpool"):
            pool._unsafe_reset_threadpool(threads)

    def load(self, graph: GraphName) -> ExecutorchGraph:
        try:
            program = self._runtime.load_program(self._files[graph])
            return ExecutorchGraph(graph, self._torch, program, program.load_method("forward"))
        except (RuntimeError, KeyError) as error:
            raise PeerError(f"{graph}.pte: ExecuTorch does not load it: {error}") from error


@dataclass(frozen=True, slots=True)
class ExecutorchGraph:
    """One loaded method. program: kept alive, because the method runs in its memory."""

    name: GraphName
    torch: Any
    program: Any
    method: Any

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Run:
        # Views of the same memory, given anew at each run, as the runtime keeps no addresses between runs.
        given = [self.torch.from_numpy(array) for array in inputs.values()]
        wanted = [self.torch.from_numpy(array) for array in outputs.values()]

        def run() -> None:
            try:
                found = self.method.execute(given)
            except RuntimeError as error:
                raise PeerError(f"{self.name}.pte fails on a batch: {error}") from error
            shapes = [(tuple(tensor.shape), tensor.dtype) for tensor in found]
            if shapes != [(tuple(tensor.shape), tensor.dtype) for tensor in wanted]:
                raise PeerError(f"{self.name}.pte: {len(found)} outputs of other shapes than the manifest's")
            for target, tensor in zip(wanted, found, strict=True):
                target.copy_(tensor)

        return run
