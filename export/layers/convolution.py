"""Convolutions in one and two dimensions: stride, padding, dilation, groups, depthwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from export.layers.linear import arguments, source_of
from export.layers.recorder import Layout, NotPerExampleError, Recorder, aten, rewrites
from export.layers.uses import Dense, Outer, Use


@rewrites(aten.conv2d.default, aten.conv1d.default, aten.conv2d.padding, aten.conv1d.padding)
def convolution(recorder: Recorder, node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    (xn, x), (wn, w), (bn, b), (_, stride), (_, padding), (_, dilation), (_, groups) = arguments(
        node, args, kwargs, "input", "weight", "bias", "stride", "padding", "dilation", "groups"
    )
    dims = w.dim() - 2
    if not recorder.depends[xn] or recorder.depends[wn] or x.dim() != w.dim():
        return None
    stride, dilation, groups = _each(stride, dims), _each(dilation, dims), groups or 1
    if padding == "valid":
        padding = 0
    elif padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, w.shape[2:], strict=True)]
        if any(t % 2 for t in total):  # the odd one goes to the end
            x = F.pad(x, [size for t in reversed(total) for size in (t // 2, t - t // 2)])
            total = [0] * dims
        padding = [t // 2 for t in total]
    padding = _each(padding or 0, dims)
    if dims == 1:
        output = convolve(x[:, :, None], w[:, :, None], b, (1, *stride), (0, *padding), (1, *dilation), groups)
        output = output[:, :, 0]
    else:
        output = convolve(x, w, b, stride, padding, dilation, groups)
    kernel = tuple(w.shape[2:])

    def weight_use(layout: Layout, grad: Tensor, inputs: tuple[Tensor, ...]) -> Use:
        a = inputs[0]
        if _pointwise(w, stride, padding, groups):
            a, b = (_together(layout, t.flatten(2).transpose(1, 2)) for t in (a, grad))
            return Outer(a.flatten(1, 2), b.flatten(1, 2), tuple(w.shape))
        if dims == 1:
            g = kernel_gradients(
                a[:, :, None], grad[:, :, None], (1, *kernel), (1, *stride), (0, *padding), (1, *dilation), groups
            )
            return Dense(summed(layout, g[:, :, :, 0]))
        return Dense(summed(layout, kernel_gradients(a, grad, kernel, stride, padding, dilation, groups)))

    def bias_use(layout: Layout, grad: Tensor, inputs: tuple[Tensor, ...]) -> Use:
        return Dense(summed(layout, grad.flatten(2).sum(2)))

    return recorder.tap(output, [(source_of(recorder, wn), (x,), weight_use), (source_of(recorder, bn), (), bias_use)])


def _together(layout: Layout, images: Tensor) -> Tensor:
    """(B, images of one example, ...) of (B or more images, ...): a model may see a video as a batch of frames."""
    if layout.axis != 0:
        raise NotPerExampleError
    return images[:, None] if images.shape[0] == layout.batch else layout.batch_first(images)


def summed(layout: Layout, images: Tensor) -> Tensor:
    """(B, ...): the sum over each example's images, which is most often one."""
    together = _together(layout, images)
    return images if together.shape[1] == 1 else together.sum(1)


def _each(value: Any, dims: int) -> tuple[int, ...]:
    values = [1] if value is None else [value] if isinstance(value, int) else list(value)
    return tuple(values * dims if len(values) == 1 else values)


def convolve(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """A 2-d convolution whose backward pass is traced in the form that is fast at run time."""
    result: Tensor = _Convolution.apply(x, w, bias, stride, padding, dilation, groups)
    return result


class _Convolution(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, w: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
    ) -> Tensor:
        if _batched_rows(x, w, padding, dilation, groups):
            return _depthwise(x, w, bias, stride, padding, dilation)
        return F.conv2d(x, w, bias, stride, padding, dilation, groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, w, _, *geometry = inputs
        ctx.save_for_backward(x, w)
        ctx.geometry = geometry

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, w = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        of_x = of_w = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = input_gradient(x, w, grad, stride, padding, dilation, groups)
        # The rest only in the fallback, which differentiates the parameters themselves.
        if ctx.needs_input_grad[1]:
            of_w = kernel_gradients(x, grad, tuple(w.shape[2:]), stride, padding, dilation, groups).sum(0)
        if ctx.needs_input_grad[2]:
            of_bias = grad.sum((0, 2, 3))
        return of_x, of_w, of_bias, None, None, None, None


def _pointwise(w: Tensor, stride: tuple[int, ...], padding: tuple[int, ...], groups: int) -> bool:
    """Whether the kernel covers one position only: then the convolution is a matrix product at every position."""
    return groups == 1 and not any(padding) and all(s == 1 for s in (*w.shape[2:], *stride))


def input_gradient(
    x: Tensor,
    w: Tensor,
    grad: Tensor,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """Of the shape of x, the convolution's input."""
    if _pointwise(w, stride, padding, groups):
        return F.conv2d(grad, w.transpose(0, 1))
    if _batched_rows(x, w, padding, dilation, groups):
        return _depthwise_input_gradient(x, w, grad, stride, padding, dilation)
    # Measured in ONNX Runtime: 7 times faster than a plain convolution with the kernel turned round.
    rest = [
        x.shape[i + 2] - ((grad.shape[i + 2] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (w.shape[i + 2] - 1) + 1)
        for i in range(2)
    ]
    return F.conv_transpose2d(grad, w, None, stride, padding, rest, groups, dilation)


def kernel_gradients(
    x: Tensor,
    grad: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """(B, O, C/groups, kh, kw): every example's own kernel gradient.

    Depthwise by shifts (`_depthwise_kernel_gradients`), anything else by one grouped convolution.

    The examples become groups: each one's input is correlated with its own output gradient, stride and dilation
    changing places (Rochette et al. 2019, arXiv:1912.06015). No patches are copied out.
    """
    batch, channels = x.shape[:2]
    out = grad.shape[1]
    if groups == channels == out:
        return _depthwise_kernel_gradients(x, grad, kernel, stride, padding, dilation)
    per_group = channels // groups
    images = x.reshape(batch * groups, per_group, *x.shape[2:]).transpose(0, 1)
    filters = grad.reshape(batch * out, 1, *grad.shape[2:])
    g = F.conv2d(images, filters, None, dilation, padding, stride, batch * groups)[:, :, : kernel[0], : kernel[1]]
    g = g.reshape(per_group, batch, out, *kernel)
    return g.permute(1, 2, 0, 3, 4)


# Depthwise convolutions. A run time that does them channel by channel and example by example spends its time on
# copying patches out: 0.3 to 1.7 us each in ONNX Runtime, for some hundred multiplications. With the batch as the last
# axis a channel of all examples is one image whose pixels are a batch wide. Without a stride the convolution of that
# image is the same one with its columns a batch apart, and patches are copied by whole rows: half the time of what
# follows. With a stride, pixels of a row are copied one batch at a time anyway; then the columns that the kernel sees
# are cut out and the vertical part of the kernel is a banded matrix: more multiplications, less time.


MOST_ROWS = 64
"""Of an image: a banded matrix has a column for each, and only the kernel's height of them are not zero."""


def _batched_rows(x: Tensor, w: Tensor, padding: tuple[int, ...], dilation: tuple[int, ...], groups: int) -> bool:
    """Whether a convolution is depthwise and gains by rows of a whole batch: few rows, padding within the kernel's
    reach."""
    return (
        groups == x.shape[1] == w.shape[0]
        and x.shape[2] <= MOST_ROWS
        and all(p <= d * (k - 1) for p, d, k in zip(padding, dilation, w.shape[2:], strict=True))
    )


def _batch_last(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (C, H, W * B)."""
    batch, channels, height, width = x.shape
    return x.reshape(batch, -1).t().reshape(channels, height, width * batch)


def _batch_first(x: Tensor, batch: int) -> Tensor:
    """(C, H, W * B) -> (B, C, H, W)."""
    channels, height, columns = x.shape
    return x.reshape(-1, batch).t().reshape(batch, channels, height, columns // batch)


def _unstrided(x: Tensor, w: Tensor, bias: Tensor | None, padding: Sequence[int], dilation: tuple[int, ...]) -> Tensor:
    """A depthwise convolution of stride 1, as that of one image whose pixels are a batch wide."""
    batch, channels = x.shape[:2]
    margin, apart = (padding[0], padding[1] * batch), (dilation[0], dilation[1] * batch)
    output = F.conv2d(_batch_last(x)[None], w, bias, 1, margin, apart, channels)
    return _batch_first(output.squeeze(0), batch)  # not output[0], which would be a lookup that copies


def _windows(x: Tensor, batch: int, count: int, stride: int, starts: Sequence[int]) -> Tensor:
    """x (C, H, W * B) -> (C, starts, H, count * B): `count` columns, `stride` apart, from each start."""
    channels, height, _ = x.shape
    if stride == 1:
        return torch.stack([x[:, :, start * batch : (start + count) * batch] for start in starts], 1)
    columns = x.reshape(channels, height, -1, batch)
    found = [columns[:, :, start : start + (count - 1) * stride + 1 : stride] for start in starts]
    return torch.stack(found, 1).reshape(channels, len(starts), height, count * batch)


def bands_of(w: Tensor, rows: int, height: int, stride: int, dilation: int, above: int = 0) -> Tensor:
    """(C, kw, rows, height): for each column of the kernel, the matrix from `height` input rows to output rows.

    above: rows of zeros that the input has above these.
    """
    channels, _, kh, kw = w.shape
    target = torch.arange(rows)[:, None] * stride + torch.arange(kh)[:, None, None] * dilation - above
    places = (target == torch.arange(height)).to(w.dtype).reshape(kh, rows * height)
    columns = w.reshape(channels, kh, kw).transpose(1, 2).reshape(1, channels * kw, kh)
    return torch.bmm(columns, places[None]).reshape(channels, kw, rows, height)


def _depthwise_columns(
    x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...]
) -> Tensor:
    """(C, kw, padded H, W' * B): the input as each column of the kernel sees it, W' output columns."""
    batch, _, _, width = x.shape
    (ph, pw), starts = padding, [j * dilation[1] for j in range(kernel[1])]
    padded = _batch_last(x)
    if ph or pw:
        padded = F.pad(padded, (pw * batch, pw * batch, ph, ph))
    count = (width + 2 * pw - starts[-1] - 1) // stride[1] + 1
    return _windows(padded, batch, count, stride[1], starts)


def _depthwise(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Tensor:
    channels, _, kh, kw = w.shape
    if stride == (1, 1):
        return _unstrided(x, w, bias, padding, dilation)
    columns = _depthwise_columns(x, (kh, kw), stride, padding, dilation)
    height = columns.shape[2]
    rows = (height - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    bands = bands_of(w, rows, height, stride[0], dilation[0]).transpose(1, 2)
    product = torch.bmm(bands.reshape(channels, rows, kw * height), columns.reshape(channels, kw * height, -1))
    out = _batch_first(product, x.shape[0])
    return out if bias is None else out + bias[:, None, None]


def _depthwise_input_gradient(
    x: Tensor, w: Tensor, grad: Tensor, stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...]
) -> Tensor:
    batch, channels, height, width = x.shape
    kw, rows, (ph, pw) = w.shape[3], grad.shape[2], padding
    if stride == (1, 1):
        margin = [d * (k - 1) - p for d, k, p in zip(dilation, w.shape[2:], padding, strict=True)]
        turned = w.reshape(channels, -1).flip(1).reshape(w.shape)
        return _unstrided(grad, turned, None, margin, dilation)
    spread = _batch_last(grad)
    if stride[1] > 1:
        spread = spread.reshape(channels, rows, grad.shape[3], batch)
        spread = F.pad(spread, (0, (stride[1] - 1) * batch))
        spread = spread.reshape(channels, rows, -1)[:, :, : ((grad.shape[3] - 1) * stride[1] + 1) * batch]
    reach = dilation[1] * (kw - 1)
    after = width + pw - spread.shape[2] // batch
    spread = F.pad(spread, ((reach - pw) * batch, after * batch))
    columns = _windows(spread, batch, width, 1, [reach - j * dilation[1] for j in range(kw)])
    bands = bands_of(w, rows, height, stride[0], dilation[0], ph)
    bands = bands.permute(0, 3, 1, 2).reshape(channels, height, kw * rows)
    return _batch_first(torch.bmm(bands, columns.reshape(channels, kw * rows, -1)), batch)


def _depthwise_kernel_gradients(
    x: Tensor,
    grad: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Tensor:
    """(B, C, 1, kh, kw): for each place in the kernel, the shifted input times the output gradient, summed."""
    batch, channels, rows, _ = grad.shape
    g = _batch_last(grad)
    starts = [i * dilation[0] for i in range(kernel[0])]
    if stride == (1, 1):
        # Of the input a copy for each column of the kernel, of the gradient one for each row.
        padded = F.pad(_batch_last(x), (padding[1] * batch, padding[1] * batch, padding[0], padding[0]))
        height, reach = padded.shape[1], padded.shape[1] - rows
        g = F.pad(g, (0, 0, reach, reach))
        seen = [padded[:, :, j * dilation[1] * batch :][:, :, : g.shape[2]] for j in range(kernel[1])]
        shifted = [g[:, reach - start : reach - start + height] for start in starts]
        pairs = [(a, b) for b in shifted for a in seen]
        places = [(a * b).reshape(channels, -1, batch).sum(1) for a, b in pairs]
        return torch.stack(places, 1).permute(2, 0, 1).reshape(batch, channels, 1, *kernel)
    columns = _depthwise_columns(x, kernel, stride, padding, dilation)
    height = columns.shape[2]
    if stride[0] == 1:
        # The gradient is shifted rather than the input, of which there is a copy for each column of the kernel.
        reach = height - rows
        g = F.pad(g, (0, 0, reach, reach))
        pairs = [(columns, g[:, reach - start : reach - start + height]) for start in starts]
    else:
        last = (rows - 1) * stride[0] + 1
        pairs = [(columns[:, :, start : start + last : stride[0]], g) for start in starts]
    sums = [(x.reshape(channels, kernel[1], -1, batch) * b.reshape(channels, 1, -1, batch)).sum(2) for x, b in pairs]
    return torch.stack(sums, 1).permute(3, 0, 1, 2).reshape(batch, channels, 1, *kernel)
