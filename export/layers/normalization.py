"""Normalisation, with backward passes in closed form: differentiated step by step they take twice the operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from export.layers.convolution import summed
from export.layers.linear import arguments, source_of
from export.layers.recorder import Layout, Recorder, aten, rewrites
from export.layers.uses import Dense, Use


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


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) over the last `axes` axes; without the mean if not `centre`. Also 1 / sqrt."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, axes: int, eps: float, centre: bool) -> tuple[Tensor, Tensor]:
        over = list(range(-axes, 0))
        if centre:
            x = x - x.mean(over, keepdim=True)
        inverse = (x * x).mean(over, keepdim=True).add(eps).rsqrt()
        return x * inverse, inverse

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        _, axes, _, centre = inputs
        ctx.save_for_backward(*output)
        ctx.over, ctx.centre = list(range(-axes, 0)), centre

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Any:
        normal, inverse = ctx.saved_tensors
        rest = normal * (grad * normal).mean(ctx.over, keepdim=True)
        if ctx.centre:
            rest = rest + grad.mean(ctx.over, keepdim=True)
        return (grad - rest) * inverse, None, None, None


def _normalise(x: Tensor, axes: int, eps: float, centre: bool = True) -> Tensor:
    normal, _ = _Normalise.apply(x, axes, eps, centre)
    result: Tensor = normal
    return result


class _GroupNorm(torch.autograd.Function):
    """x (N, C, P) normalised over each group's channels and P, times w (C,), plus b (C,).

    Gives also x less its group's mean (N, C, P), and 1 / sqrt(variance + eps) for each channel (N, C). Scale and
    inverse make one factor for a channel; the sums over P that the backward pass needs are the gradients of w and b.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, w: Tensor | None, b: Tensor | None, groups: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, channels, _ = x.shape
        grouped = x.reshape(rows, groups, -1)
        grouped = grouped - grouped.mean(2, keepdim=True)
        inverse = (grouped * grouped).mean(2, keepdim=True).add(eps).rsqrt()
        inverse = inverse.expand(-1, -1, channels // groups).reshape(rows, channels)
        centred = grouped.reshape(x.shape)
        y = centred * (inverse if w is None else inverse * w)[:, :, None]
        return (y if b is None else y + b[:, None]), centred, inverse

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        _, w, _, groups, _ = inputs
        _, centred, inverse = output
        ctx.save_for_backward(centred, inverse, w)
        ctx.groups = groups

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor, __: Tensor) -> Any:
        centred, inverse, w = ctx.saved_tensors
        rows, channels, places = centred.shape
        of_w, of_b = _affine_gradients(grad, centred, inverse)
        weighted_w, weighted_b = (of_w, of_b) if w is None else (of_w * w, of_b * w)

        def group_mean(values: Tensor) -> Tensor:
            size = channels // ctx.groups
            means = values.reshape(rows, ctx.groups, size).sum(2, keepdim=True) * (1.0 / (size * places))
            return means.expand(-1, -1, size).reshape(rows, channels)

        slope = inverse * inverse * group_mean(weighted_w)
        factor = inverse if w is None else inverse * w
        rest = centred * slope[:, :, None] + (inverse * group_mean(weighted_b))[:, :, None]
        of_x = grad * factor[:, :, None] - rest
        _, wants_w, wants_b, *_ = ctx.needs_input_grad
        return of_x, of_w.sum(0) if wants_w else None, of_b.sum(0) if wants_b else None, None, None


def _affine_gradients(grad: Tensor, centred: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Of a scale and a shift for each channel, (N, C) each, from the gradient of what they gave, (N, C, P)."""
    return (grad * centred).sum(2) * inverse, grad.sum(2)


def _group_norm(
    recorder: Recorder, x: Tensor, weight: tuple[Any, Any], bias: tuple[Any, Any], groups: int, eps: float
) -> Tensor:
    (wn, w), (bn, b) = weight, bias
    flat = x.flatten(2) if x.dim() > 2 else x[:, :, None]
    y, centred, inverse = _GroupNorm.apply(flat, w, b, groups, eps)

    def of_w(layout: Layout, grad: Tensor, inputs: tuple[Tensor, ...]) -> Use:
        return Dense(summed(layout, _affine_gradients(grad.reshape(inputs[0].shape), *inputs)[0]))

    def of_b(layout: Layout, grad: Tensor, inputs: tuple[Tensor, ...]) -> Use:
        return Dense(summed(layout, grad.reshape(*grad.shape[:2], -1).sum(2)))

    y = y.reshape(x.shape)
    return recorder.tap(y, [(source_of(recorder, wn), (centred, inverse), of_w), (source_of(recorder, bn), (), of_b)])


@rewrites(aten.layer_norm.default)
def layer_norm(recorder: Recorder, node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    (_, x), (_, shape), weight, bias, (_, eps) = arguments(
        node, args, kwargs, "input", "normalized_shape", "weight", "bias", "eps"
    )
    normal = _normalise(x, len(shape), 1e-5 if eps is None else eps)
    return _affine(recorder, normal, weight, bias, shape)


@rewrites(aten.rms_norm.default)
def rms_norm(recorder: Recorder, node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    (_, x), (_, shape), weight, (_, eps) = arguments(node, args, kwargs, "input", "normalized_shape", "weight", "eps")
    eps = 1.1920928955078125e-07 if eps is None else eps  # PyTorch's default: the spacing of float32 at 1
    normal = _normalise(x, len(shape), eps, centre=False)
    return _affine(recorder, normal, weight, (None, None), shape)


@rewrites(aten.group_norm.default)
def group_norm(recorder: Recorder, node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    (_, x), (_, groups), weight, bias, (_, eps) = arguments(
        node, args, kwargs, "input", "num_groups", "weight", "bias", "eps"
    )
    return _group_norm(recorder, x, weight, bias, groups, 1e-5 if eps is None else eps)


@rewrites(aten.instance_norm.default)
def instance_norm(recorder: Recorder, node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    (_, x), weight, bias, (_, eps) = arguments(node, args, kwargs, "input", "weight", "bias", "eps")
    return _group_norm(recorder, x, weight, bias, x.shape[1], eps)


@rewrites(aten._native_batch_norm_legit_no_training.default)
def batch_norm(recorder: Recorder, node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """In evaluation mode: the statistics are constants. Gives a tuple, as the operator does."""
    (_, x), weight, bias, (_, mean), (_, variance), (_, eps) = arguments(
        node, args, kwargs, "input", "weight", "bias", "running_mean", "running_var", "eps"
    )
    shape = (x.shape[1], *[1] * (x.dim() - 2))
    normal = (x - mean.reshape(shape)) * (variance + eps).rsqrt().reshape(shape)
    return (_affine(recorder, normal, weight, bias, shape),)
