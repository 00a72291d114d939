"""Interpolation as products with constant matrices; and what has no gradient that the run times know, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from export.errors import UnsupportedModelError
from export.layers.recorder import Recorder, aten, call_target, layer_of, rewrites

_RESAMPLINGS = (
    aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_nearest3d.vec,
    aten._upsample_nearest_exact1d.vec, aten._upsample_nearest_exact2d.vec, aten._upsample_nearest_exact3d.vec,
    aten.upsample_linear1d.vec, aten.upsample_bilinear2d.vec, aten.upsample_trilinear3d.vec,
    aten.upsample_bicubic2d.vec,
)  # fmt: skip


@rewrites(*_RESAMPLINGS)
def resample(recorder: Recorder, node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Every one of them is linear and works along one axis after the other, so each axis is a product with a matrix.

    Its gradient is the product with the transpose: no run time has the operators' own backward passes.
    """
    x: Tensor = args[0]
    shape = tuple(x.shape)
    for axis in range(2, x.dim()):
        matrix = torch.tensor(_matrix(node, args, kwargs, shape, axis), dtype=x.dtype)
        x = (x.movedim(axis, -1) @ matrix).movedim(-1, axis)
    return x


def _matrix(
    node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any], shape: Sequence[int], axis: int
) -> list[list[float]]:
    """(before, after): what the operator makes of each unit vector along `axis`. Constant along the other axes."""
    size = shape[axis]
    with _disable_current_modes(), torch.no_grad():  # a value now, and no part of the graph that is being traced
        view = [size, 1, *(size if a == axis else 1 for a in range(2, len(shape)))]
        probe = torch.eye(size).reshape(view).expand(size, 1, *shape[2:]).contiguous()
        found: Tensor = call_target(node, probe, *args[1:], **kwargs).movedim(axis, -1)
        rows: list[list[float]] = found.reshape(size, -1, found.shape[-1])[:, 0].tolist()
    return rows


_FOLD = "Run its slices as a batch of images through Conv2d and pool or sum over the depth afterwards"
_UNTRAINABLE = {
    aten.conv_transpose1d.default: "Use nn.Upsample and then nn.Conv1d",
    aten.conv_transpose2d.input: "Use nn.Upsample and then nn.Conv2d",
    aten.conv_transpose3d.input: _FOLD,
    aten.conv3d.default: _FOLD,
    aten.conv3d.padding: _FOLD,
    aten.max_pool3d.default: "Pool its slices as a batch of images by nn.MaxPool2d, then the depth by .amax",
    aten.avg_pool3d.default: "Reshape to the windows and take .mean over them",
    aten.adaptive_max_pool3d.default: "Reshape to the windows and take .amax over them",
    aten.adaptive_avg_pool3d.default: "Reshape to the windows and take .mean over them",
}


@rewrites(*_UNTRAINABLE)
def untrainable(recorder: Recorder, node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """They run, but no gradient passes. Behind frozen layers, and in `predict`, they stay."""
    if not recorder.roots[node]:
        return None
    target: Any = node.target
    name = target.__name__.split(".")[0]
    raise UnsupportedModelError(
        f"{layer_of(node)}: {name} has no gradient in ONNX. {_UNTRAINABLE[target]}; or freeze the layer and what comes "
        "before it."
    )
