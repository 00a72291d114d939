"""A trained model back out of the bundle: as a plain inference ONNX, or as a state dict for the user's module."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
from numpy.typing import NDArray

from edge_sdk.bundle import PREDICT_ONNX, Bundle
from edge_sdk.errors import ParameterError

if TYPE_CHECKING:
    import torch

    from export.graph import TrainingSpec

F32 = NDArray[np.float32]


def read_shared(bundle: Bundle, path: Path) -> F32:
    """The shared parameters as one vector, float32 (d,), from a file.

    .npy: the vector (d,).  .safetensors: the shared parameters by name.  .f32: the vector as raw little-endian float32.
    Raises ParameterError that names what does not fit.
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            return bundle.flatten(load_file(path))
        except SafetensorError as error:
            raise ParameterError(f"{path.name} is not a safetensors file: {error}") from error
    if path.suffix == ".npy":
        try:
            with path.open("rb") as file:
                vector = np.lib.format.read_array(file, allow_pickle=False)
        except ValueError as error:
            raise ParameterError(f"{path.name} is not a .npy file: {error}") from error
    elif path.suffix == ".f32":
        content = path.read_bytes()
        vector = np.frombuffer(content[: len(content) // 4 * 4], dtype="<f4")
        if len(content) % 4:
            raise ParameterError(f"{path.name}: {len(content)} bytes are not a number of float32")
    else:
        raise ParameterError(f"{path.name}: parameters are read from .npy, .safetensors or .f32")
    if vector.dtype != np.float32 or vector.shape != (bundle.dimension,):
        raise ParameterError(
            f"{path.name} holds {vector.dtype} {vector.shape}, not this bundle's shared vector, "
            f"float32 ({bundle.dimension},)"
        )
    if not np.isfinite(vector).all():
        raise ParameterError(f"{path.name} holds NaN or infinity")
    return np.ascontiguousarray(vector)


def trained_parameters(bundle: Bundle, shared: F32) -> dict[str, F32]:
    """Every parameter and buffer by name: the shared ones from the vector, the others as the bundle has them."""
    return {**bundle.parameters(), **bundle.unflatten(shared)}


def inference_onnx(bundle: Bundle, parameters: Mapping[str, F32]) -> bytes:
    """A serialised ONNX model: example inputs to `output`, the parameters inside, the batch as in the bundle."""
    model = onnx.ModelProto.FromString(bundle.file(PREDICT_ONNX))
    kept = [value for value in model.graph.input if value.name not in parameters]
    used = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.ascontiguousarray(value), name)
        for name, value in parameters.items()
        if name in used
    )
    del model.graph.input[:]
    model.graph.input.extend(kept)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString(deterministic=True)


def any_rows_onnx(bundle: Bundle, parameters: Mapping[str, F32], spec: TrainingSpec) -> bytes:
    """As `inference_onnx`, for any number of rows; from `spec`, because the bundle's graph has its batch everywhere.

    Raises ParameterError if the bundle was not built from `spec`, UnsupportedModelError if its model fixes the batch.
    """
    import onnxruntime

    from export.forward import copy_of
    from export.to_onnx import rows_to_onnx

    model = copy_of(spec.model).eval()
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if any(shapes.get(name) != value.shape for name, value in parameters.items()):
        raise ParameterError("the bundle was not built from this source: its parameters are others")
    inputs = bundle.manifest.inputs
    if [(tuple(x.shape), str(x.dtype)) for x in spec.inputs] != [(t.shape, f"torch.{t.dtype}") for t in inputs]:
        raise ParameterError("the bundle was not built from this source: its inputs are others")
    model.load_state_dict(state_dict(parameters), strict=False)
    content = rows_to_onnx(model, spec.inputs, [tensor.name for tensor in inputs])
    generator = np.random.default_rng(0)  # noqa: TID251  (for a comparison: nothing secret)
    feed: dict[str, NDArray[np.generic]] = {}
    for tensor in inputs:
        below = 1 if tensor.dtype == "float32" else tensor.below or 2
        feed[tensor.name] = generator.uniform(0, below, (bundle.manifest.batch, *tensor.shape)).astype(tensor.dtype)
    sessions = [
        onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        for graph in (inference_onnx(bundle, parameters), content)
    ]
    (expected,), (found,) = (session.run(["output"], feed) for session in sessions)
    close = 1e-3 * float(np.nan_to_num(np.abs(expected), posinf=0.0).max())
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-3, atol=close, equal_nan=True):
        raise ParameterError("the bundle was not built from this source: its outputs are others")
    return content


def state_dict(parameters: Mapping[str, F32]) -> dict[str, torch.Tensor]:
    """For `module.load_state_dict(..., strict=False)`: integer buffers are constants of the graph and not in it."""
    import torch  # only here: who unpacks a model for inference needs none

    return {name: torch.from_numpy(np.array(value)) for name, value in parameters.items()}
