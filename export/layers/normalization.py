"""Normalisation: what is left of it after the normalising itself is a scale and a shift."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from export.layers.linear import arguments, source_of
from export.layers.recorder import Recorder, aten, rewrites


def _affine(
    recorder: Recorder, normal: Tensor, weight: tuple[Any, Any], bias: tuple[Any, Any], shape: Sequence[int]
) -> Tensor:
    """normal * weight + bias, both broadcast as `shape` says."""
    (wn, w), (bn, b) = weight, bias
    if w is not None:
        normal = recorder.scale(normal, w, source_of(recorder, wn), shape)
    if b is not None:
        normal = recorder.shift(normal, b, source_of(recorder, bn), shape=shape)
    return normal


def _normalise(x: Tensor, axes: list[int], eps: float, centre: bool = True) -> Tensor:
    if centre:
        x = x - x.mean(axes, keepdim=True)
    return x * (x * x).mean(axes, keepdim=True).add(eps).rsqrt()


@rewrites(aten.layer_norm.default)
def layer_norm(recorder: Recorder, node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    (_, x), (_, shape), weight, bias, (_, eps) = arguments(
        node, args, kwargs, "input", "normalized_shape", "weight", "bias", "eps"
    )
    normal = _normalise(x, list(range(-len(shape), 0)), 1e-5 if eps is None else eps)
    return _affine(recorder, normal, weight, bias, shape)


@rewrites(aten.rms_norm.default)
def rms_norm(recorder: Recorder, node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    (_, x), (_, shape), weight, (_, eps) = arguments(node, args, kwargs, "input", "normalized_shape", "weight", "eps")
    eps = 1.1920928955078125e-07 if eps is None else eps  # PyTorch's default: the spacing of float32 at 1
    normal = _normalise(x, list(range(-len(shape), 0)), eps, centre=False)
    return _affine(recorder, normal, weight, (None, None), shape)


@rewrites(aten.group_norm.default)
def group_norm(recorder: Recorder, node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    (_, x), (_, groups), weight, bias, (_, eps) = arguments(
        node, args, kwargs, "input", "num_groups", "weight", "bias", "eps"
    )
    grouped = x.reshape(x.shape[0], groups, -1)
    normal = _normalise(grouped, [2], 1e-5 if eps is None else eps).reshape(x.shape)
    return _affine(recorder, normal, weight, bias, (x.shape[1], *[1] * (x.dim() - 2)))


@rewrites(aten.instance_norm.default)
def instance_norm(recorder: Recorder, node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    (_, x), weight, bias, (_, eps) = arguments(node, args, kwargs, "input", "weight", "bias", "eps")
    normal = _normalise(x, list(range(2, x.dim())), eps)
    return _affine(recorder, normal, weight, bias, (x.shape[1], *[1] * (x.dim() - 2)))


@rewrites(aten._native_batch_norm_legit_no_training.default)
def batch_norm(recorder: Recorder, node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """In evaluation mode: the statistics are constants. Gives a tuple, as the operator does."""
    (_, x), weight, bias, (_, mean), (_, variance), (_, eps) = arguments(
        node, args, kwargs, "input", "weight", "bias", "running_mean", "running_var", "eps"
    )
    shape = (x.shape[1], *[1] * (x.dim() - 2))
    normal = (x - mean.reshape(shape)) * (variance + eps).rsqrt().reshape(shape)
    return (_affine(recorder, normal, weight, bias, shape),)
