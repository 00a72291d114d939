"""Pooling, with backward passes made of operators that both run times have."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from export.errors import UnsupportedModelError
from export.layers.convolution import _each, convolve
from export.layers.linear import arguments
from export.layers.recorder import Recorder, aten, layer_of, rewrites


@rewrites(aten.max_pool2d.default, aten.max_pool1d.default)
def max_pool(recorder: Recorder, node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    dims = 2 if node.target is aten.max_pool2d.default else 1
    (_, x), (_, kernel), (_, stride), (_, padding), (_, dilation), (_, ceil) = arguments(
        node, args, kwargs, "self", "kernel_size", "stride", "padding", "dilation", "ceil_mode"
    )
    kernel = _each(kernel, dims)
    stride = _each(stride or kernel, dims)
    padding, dilation = _each(padding or 0, dims), _each(dilation or 1, dims)
    if ceil:
        raise UnsupportedModelError(f"{layer_of(node)}: ceil_mode pooling; pad the input instead")
    if x.dim() == dims + 1:  # no channels: the batch stands in their place
        return max_pool(recorder, node, (x[:, None], *args[1:]), kwargs)[:, 0]
    if dims == 1:
        return max_pool2d(x[:, :, None], (1, *kernel), (1, *stride), (0, *padding), (1, *dilation))[:, :, 0]
    return max_pool2d(x, kernel, stride, padding, dilation)


def max_pool2d(x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any) -> Tensor:
    result: Tensor = _MaxPool.apply(x, kernel, stride, padding, dilation)
    return result


class _MaxPool(torch.autograd.Function):
    """As PyTorch's, ties included: the gradient goes to the first of equal maxima in the window."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any) -> Tensor:
        return F.max_pool2d(x, kernel, stride, padding, dilation)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, *geometry = inputs
        ctx.save_for_backward(x, output)
        ctx.geometry = geometry

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, out = ctx.saved_tensors
        kernel, stride, padding, dilation = ctx.geometry
        (ph, pw), (sh, sw), (dh, dw) = padding, stride, dilation
        if ph or pw:
            x = F.pad(x, (pw, pw, ph, ph), value=torch.finfo(x.dtype).min)
        height, width = out.shape[2:]
        pieces, rest = [], grad
        offsets = [(i * dh, j * dw) for i in range(kernel[0]) for j in range(kernel[1])]
        for position, (top, left) in enumerate(offsets):
            if position == len(offsets) - 1:
                pieces.append(rest)  # what no other place in the window took
                break
            window = x[:, :, top : top + (height - 1) * sh + 1 : sh, left : left + (width - 1) * sw + 1 : sw]
            piece = rest * (window >= out).to(grad.dtype)
            pieces.append(piece)
            rest = rest - piece
        whole = list(x.shape[2:])
        if (sh, sw) == tuple(kernel) and (dh, dw) == (1, 1):
            # Interleave by joining: columns first, then rows. One transposition of six axes is much slower.
            rows = [
                torch.stack(pieces[i * sw : (i + 1) * sw], -1).reshape(*out.shape[:3], width * sw) for i in range(sh)
            ]
            full = torch.stack(rows, 3).reshape(*out.shape[:2], height * sh, width * sw)
            full = F.pad(full, (0, whole[1] - width * sw, 0, whole[0] - height * sh))
        else:
            spread = [
                _spread(piece, whole, top, left, sh, sw) for piece, (top, left) in zip(pieces, offsets, strict=True)
            ]
            full = functools.reduce(torch.add, spread)
        if ph or pw:
            full = full[:, :, ph : whole[0] - ph, pw : whole[1] - pw]
        return full, None, None, None, None


def _spread(piece: Tensor, whole: Sequence[int], top: int, left: int, sh: int, sw: int) -> Tensor:
    """`piece` at the places [top::sh, left::sw] of zeros of shape `whole`."""
    batch, channels, height, width = piece.shape
    if sh > 1 or sw > 1:
        piece = F.pad(piece[:, :, :, None, :, None], (0, sw - 1, 0, 0, 0, sh - 1))
        piece = piece.reshape(batch, channels, height * sh, width * sw)
        piece = piece[:, :, : (height - 1) * sh + 1, : (width - 1) * sw + 1]
    return F.pad(piece, (left, whole[1] - left - piece.shape[3], top, whole[0] - top - piece.shape[2]))


@rewrites(aten.avg_pool2d.default, aten.avg_pool1d.default)
def avg_pool(recorder: Recorder, node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    dims = 2 if node.target is aten.avg_pool2d.default else 1
    (_, x), (_, kernel), (_, stride), (_, padding), (_, ceil), (_, include) = arguments(
        node, args, kwargs, "self", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad"
    )
    divisor = arguments(node, args, kwargs, "divisor_override")[0][1] if dims == 2 else None
    kernel = _each(kernel, dims)
    stride, padding = _each(stride or kernel, dims), _each(padding or 0, dims)
    if ceil or (include is False and any(padding)):
        raise UnsupportedModelError(f"{layer_of(node)}: ceil_mode or count_include_pad=False; pad the input instead")
    if x.dim() == dims + 1:
        return avg_pool(recorder, node, (x[:, None], *args[1:]), kwargs)[:, 0]
    if dims == 1:
        return _avg_pool2d(x[:, :, None], (1, *kernel), (1, *stride), (0, *padding))[:, :, 0]
    pooled = _avg_pool2d(x, kernel, stride, padding)
    return pooled if divisor is None else pooled * (kernel[0] * kernel[1] / divisor)


def _avg_pool2d(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...]) -> Tensor:
    if stride == kernel and not any(padding):
        height, width = x.shape[2] // kernel[0], x.shape[3] // kernel[1]
        tiles = x[:, :, : height * kernel[0], : width * kernel[1]]
        # Scaled after the sum: the mean's own backward pass would divide at every position instead.
        if (height, width) == (1, 1):
            return (tiles.flatten(2).sum(2) * (1.0 / (kernel[0] * kernel[1])))[:, :, None, None]
        sums = tiles.reshape(*x.shape[:2], height, kernel[0], width, kernel[1]).sum((3, 5))
        return sums * (1.0 / (kernel[0] * kernel[1]))
    weight = torch.full((x.shape[1], 1, *kernel), 1.0 / (kernel[0] * kernel[1]), dtype=x.dtype)
    return convolve(x, weight, None, stride, padding, (1, 1), x.shape[1])


@rewrites(aten.adaptive_max_pool2d.default, aten.adaptive_max_pool1d.default)
def adaptive_max_pool(recorder: Recorder, node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    x, kernel = _even(node, args)
    if any(user.args[1] == 1 and user.users for user in node.users):
        raise UnsupportedModelError(
            f"{layer_of(node)}: the places of the maxima have no rule; set return_indices=False"
        )
    unbatched = x.dim() == len(kernel) + 1  # no channels: the batch stands in their place
    if unbatched:
        x = x[:, None]
    if len(kernel) == 1:
        pooled = max_pool2d(x[:, :, None], (1, *kernel), (1, *kernel), (0, 0), (1, 1))[:, :, 0]
    else:
        pooled = max_pool2d(x, kernel, kernel, (0, 0), (1, 1))
    return (pooled[:, 0] if unbatched else pooled), None


def _even(node: fx.Node, args: Sequence[Any]) -> tuple[Tensor, tuple[int, ...]]:
    """The input of an adaptive pool, and the windows that it is cut into."""
    x, size = args[0], list(args[1])
    have = x.shape[-len(size) :]
    if any(h % s for h, s in zip(have, size, strict=True)):
        raise UnsupportedModelError(
            f"{layer_of(node)}: adaptive pooling from {tuple(have)} to {tuple(size)} is uneven; pad the input to a "
            "multiple, or choose a divisor"
        )
    return x, tuple(h // s for h, s in zip(have, size, strict=True))


@rewrites(aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool1d.default)
def adaptive_avg_pool(recorder: Recorder, node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    x, kernel = _even(node, args)
    if x.dim() == len(kernel) + 1:
        return adaptive_avg_pool(recorder, node, (x[:, None], args[1]), kwargs)[:, 0]
    if len(kernel) == 1:
        return _avg_pool2d(x[:, :, None], (1, *kernel), (1, *kernel), (0, 0))[:, :, 0]
    return _avg_pool2d(x, kernel, kernel, (0, 0))
