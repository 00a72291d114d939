"""Backward operators in terms of forward ones that both back ends have, and the clean-up of a traced graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import core_aten_decompositions

aten = torch.ops.aten


def _threshold_backward(grad: Tensor, self: Tensor, threshold: float) -> Tensor:
    """ReLU's: `self` is its output, never negative, so "not zero" is the mask.

    A product, where ONNX Runtime's selection is 25 times slower; a cast, where its sign is 6 times slower.
    """
    if threshold == 0:
        return grad * self.to(torch.bool).to(grad.dtype)
    return grad * (self > threshold).to(grad.dtype)


def _hardtanh_backward(grad: Tensor, self: Tensor, min_val: float, max_val: float) -> Tensor:
    """ReLU6's too."""
    return grad * ((self > min_val) & (self < max_val)).to(grad.dtype)


def _select_backward(grad: Tensor, input_sizes: Sequence[int], dim: int, index: int) -> Tensor:
    """PyTorch's own is a selection between the gradient and zeros as large as the input, which the file then holds."""
    dim, rank = dim % len(input_sizes), len(input_sizes)
    index %= input_sizes[dim]
    return _padded(grad.unsqueeze(dim), dim, index, input_sizes[dim] - index - 1, rank)


def _slice_backward(grad: Tensor, input_sizes: Sequence[int], dim: int, start: int, end: int, step: int) -> Tensor:
    """Likewise."""
    dim, rank = dim % len(input_sizes), len(input_sizes)
    size, length = input_sizes[dim], grad.shape[dim]
    start = max(start + size, 0) if start < 0 else min(start, size)
    if step > 1:
        spread = _padded(grad.unsqueeze(dim + 1), dim + 1, 0, step - 1, rank + 1).flatten(dim, dim + 1)
        length = max((length - 1) * step + 1, 0)
        grad = spread.narrow(dim, 0, length)
    return _padded(grad, dim, start, size - start - length, rank)


def _padded(values: Tensor, dim: int, before: int, after: int, rank: int) -> Tensor:
    return (
        aten.constant_pad_nd.default(values, [0, 0] * (rank - dim - 1) + [before, after]) if before or after else values
    )


def _copy(self: Tensor, src: Tensor, non_blocking: bool = False) -> Tensor:
    """`src` as `self`: the ONNX exporter forgets to broadcast it."""
    return src.to(self.dtype).expand(self.shape)


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    **core_aten_decompositions(),
    aten.threshold_backward.default: _threshold_backward,
    aten.hardtanh_backward.default: _hardtanh_backward,
    aten.select_backward.default: _select_backward,
    aten.slice_backward.default: _slice_backward,
    aten.copy.default: _copy,
}
DECOMPOSITIONS.pop(aten.addmm.default, None)  # both back ends have it

_IDENTITY = (aten.detach.default, aten.alias.default, aten.clone.default, aten.lift_fresh_copy.default)
_RESHAPES = (aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims)
_VIEWS = (aten.view.default, aten._unsafe_view.default)


def simplify(module: fx.GraphModule) -> None:
    """Remove what does nothing, share what is computed twice, drop what nobody reads. In place."""
    from torch._functorch.compile_utils import fx_graph_cse

    graph = module.graph
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _IDENTITY:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.op == "call_function" and node.target in _VIEWS:
            # Strides were those of the traced tensors; at run time a kernel may choose others, and neither back end
            # has strides at all.
            node.target = aten.reshape.default
    _join_views(graph)
    module.graph = fx_graph_cse(graph)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()


def _join_views(graph: fx.Graph) -> None:
    """A reshape or a permutation of another one is one; what changes nothing goes. So equal values meet in one form."""
    for node in list(graph.nodes):
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        source, before = node.args[0], node.args[0].meta.get("val")
        after = node.meta.get("val")
        if not isinstance(before, Tensor) or not isinstance(after, Tensor):
            continue
        if node.target in _RESHAPES:
            while source.target in _RESHAPES and isinstance(source.all_input_nodes[0].meta.get("val"), Tensor):
                source = source.all_input_nodes[0]
            if tuple(source.meta["val"].shape) == tuple(after.shape):
                node.replace_all_uses_with(source)
            elif source is not node.args[0]:
                node.target, node.args = aten.reshape.default, (source, list(after.shape))
        elif node.target is aten.permute.default:
            axes: Any = node.args[1]
            order = [axis % before.dim() for axis in axes]
            if source.target is aten.permute.default:
                inner: Any = source.args[1]
                order, source = [inner[axis] % before.dim() for axis in order], source.all_input_nodes[0]
            if order == sorted(order):
                node.replace_all_uses_with(source)
            else:
                node.args = (source, order)
