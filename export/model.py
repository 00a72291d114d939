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


def state_dict(parameters: Mapping[str, F32]) -> dict[str, torch.Tensor]:
    """For `module.load_state_dict(..., strict=False)`: integer buffers are constants of the graph and not in it."""
    import torch  # only here: who unpacks a model for inference needs none

    return {name: torch.from_numpy(np.array(value)) for name, value in parameters.items()}
