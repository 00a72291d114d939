"""Matrix products, embeddings, scales and shifts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from export.layers.recorder import Recorder, aten, handles


def source_of(recorder: Recorder, node: Any) -> fx.Node | None:
    """`node` if it is a parameter (or a view of one) to be trained: a graph node that no example reaches."""
    if isinstance(node, fx.Node) and not recorder.depends[node] and recorder.roots[node]:
        return node
    return None


def arguments(node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any], *names: str) -> list[tuple[Any, Any]]:
    """(graph node or constant, value) of each named argument, wherever it was given; (None, None) if it was not."""
    schema = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    found = []
    for name in names:
        position = schema.index(name)
        if position < len(args):
            found.append((node.args[position], args[position]))
        elif name in kwargs:
            found.append((node.kwargs[name], kwargs[name]))
        else:
            found.append((None, None))
    return found


def operands(node: fx.Node) -> list[Any]:
    """The node's positional arguments: graph nodes, numbers, lists."""
    return list(node.args)


@handles(aten.linear.default)
def linear(recorder: Recorder, node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    (xn, x), (wn, w), (bn, b) = arguments(node, args, kwargs, "input", "weight", "bias")
    if not recorder.depends[xn] or recorder.depends[wn] or x.dim() < 2:
        return None
    return recorder.linear(x, w, b, (source_of(recorder, wn), source_of(recorder, bn)))


@handles(aten.addmm.default)
def addmm(recorder: Recorder, node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    bn, xn, wn = operands(node)[:3]
    if kwargs or not (isinstance(xn, fx.Node) and recorder.depends[xn]) or recorder.depends[wn] or args[0].dim() != 1:
        return None
    product = recorder.product(args[1], args[2], source_of(recorder, wn))
    return recorder.shift(product, args[0], source_of(recorder, bn))


@handles(aten.mm.default, aten.matmul.default)
def matmul(recorder: Recorder, node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    xn, wn = operands(node)[:2]
    if not recorder.depends[xn] or recorder.depends[wn] or args[1].dim() != 2 or args[0].dim() < 2:
        return None
    return recorder.product(args[0], args[1], source_of(recorder, wn))


@handles(aten.embedding.default)
def embedding(recorder: Recorder, node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    (wn, w), (xn, x) = arguments(node, args, kwargs, "weight", "indices")
    (_, padding), (_, by_frequency), (_, sparse) = arguments(
        node, args, kwargs, "padding_idx", "scale_grad_by_freq", "sparse"
    )
    if not recorder.depends[xn] or recorder.depends[wn] or by_frequency or sparse:
        return None
    return recorder.embedding(w, x, source_of(recorder, wn), -1 if padding is None else padding)


@handles(aten.mul.Tensor)
def mul(recorder: Recorder, node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    left, right = operands(node)[:2]
    if recorder.depends[left]:
        return recorder.scale(args[0], args[1], source_of(recorder, right))
    return recorder.scale(args[1], args[0], source_of(recorder, left))


@handles(aten.add.Tensor)
def add(recorder: Recorder, node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    if kwargs.get("alpha", 1) != 1:
        return None
    left, right = operands(node)[:2]
    if recorder.depends[left]:
        return recorder.shift(args[0], args[1], source_of(recorder, right))
    return recorder.shift(args[1], args[0], source_of(recorder, left))


@handles(aten.sub.Tensor)
def sub(recorder: Recorder, node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    left, right = operands(node)[:2]
    if kwargs or not recorder.depends[left]:
        return None
    return recorder.shift(args[0], args[1], source_of(recorder, right), negative=True)
