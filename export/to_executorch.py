"""The captured graphs as ExecuTorch programs, for a stock runtime with its XNNPACK delegate.

XNNPACK is made for constant weights. In a training step the weights are inputs, and then it multiplies matrices in one
form only, `bmm`; reductions, selections, comparisons and strided slices it has hardly any. `lower` therefore writes the
graph anew, in forms that are fast (measured in docs/training-graph.md):

- every product and every convolution as `bmm`; the columns of a convolution as one `as_strided` copy,
- comparisons that become numbers, as arithmetic: clamp((a - b) * big, 0, 1),
- the rows of examples that do not count, replaced by copying rows instead of selecting elements,
- sums as means or products with ones, strided slices and pooling windows as `as_strided` copies.

The meaning stays: the same inputs and outputs in the same order, the same values but for rounding, and no value of one
example in the result of another.
"""

from __future__ import annotations

import functools
import logging
import math
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from export.decompositions import simplify
from export.errors import UnsupportedModelError
from export.layers.convolution import MOST_ROWS, bands_of

aten = torch.ops.aten

Backend = Literal["xnnpack", "portable"]

_BIG = 2.0**126
"""Multiplied by it twice, the smallest positive float32, 2^-149, is more than 1."""
_MOST_RANK = 6
"""XNNPACK's limit on axes (XNN_MAX_TENSOR_DIMS)."""
_MOST_CONSTANT = 1 << 16
"""Elements; what is larger stays computed at run time, so that the file stays small."""
_EXACT_INTEGERS = 1 << 24
"""Integers below are exact in float32."""


def to_executorch(graph: fx.GraphModule, example: Sequence[Tensor], backend: Backend = "xnnpack") -> bytes:
    """A serialised ExecuTorch program (.pte) with one method, `forward`.

    graph: `CapturedStep.train` or `.predict`.  example: its inputs; shapes and dtypes matter, values do not.
    backend: "xnnpack" delegates what it can, "portable" nothing.
    Inputs and outputs are those of the graph, in its order. The same graph gives the same bytes.
    Raises UnsupportedModelError for a graph with an operator that ExecuTorch's kernels lack.
    """
    with _quiet():
        from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge
        from executorch.exir.passes import MemoryPlanningPass

        if backend not in ("xnnpack", "portable"):
            raise UnsupportedModelError(f"no ExecuTorch back end is called {backend!r}: use xnnpack or portable")
        program = torch.export.export(lower(graph, example), tuple(example))
        # Not to_edge_transform_and_lower: it traces the graph twice more, to keep operators that XNNPACK wants whole.
        # Of those nothing is left, and the bytes are the same.
        edge = to_edge(program, compile_config=EdgeCompileConfig())
        if backend == "xnnpack":
            edge = edge.to_backend(_partitioner())
        # Inputs and outputs stay where the caller has them: parameters are not copied in and out at every step.
        planning = MemoryPlanningPass(alloc_graph_input=False, alloc_graph_output=False)
        return bytes(edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=planning)).buffer)


def _partitioner() -> Any:
    """XNNPACK's rules for what it takes, less what it would refuse when the program is loaded, and less what it would
    only copy: a change of shape is free outside of a delegate, where tensors share their memory."""
    from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    def ranks_fit(node: fx.Node) -> bool:
        values = [n.meta.get("val") for n in (node, *node.all_input_nodes)]
        return all(v.dim() <= _MOST_RANK for v in values if isinstance(v, Tensor))

    def at_the_border(node: fx.Node) -> bool:
        source = node
        while source.op == "call_function" and "view_copy" in str(source.target):
            source = source.all_input_nodes[0]
        return source.op == "placeholder" or all(user.op == "output" for user in node.users)

    def narrowed(config: Any) -> Any:
        class Narrowed(config):  # type: ignore[misc]
            def check_constraints(self, node: fx.Node, ep: Any) -> bool:
                if not ranks_fit(node) or (self.target_name == "view_copy.default" and at_the_border(node)):
                    return False
                return bool(super().check_constraints(node, ep))

        return Narrowed

    return XnnpackPartitioner(configs=[narrowed(config) for config in ALL_PARTITIONER_CONFIGS])


@contextmanager
def _quiet() -> Iterator[None]:
    """Neither warnings nor log lines: they speak of the converter's insides, not of the user's model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        level = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)


def lower(graph: fx.GraphModule, example: Sequence[Tensor]) -> fx.GraphModule:
    """`graph` in forms that ExecuTorch and XNNPACK run fast. Itself a graph of plain operators on the same inputs."""
    attributes = [node.target for node in graph.graph.nodes if node.op == "get_attr"]
    constants = {name: getattr(graph, name) for name in dict.fromkeys(attributes)}

    def run(*flat: Tensor) -> Any:
        rewriter = _Rewriter(graph, dict(zip(constants, flat[len(example) :], strict=True)))
        return rewriter.run(*flat[: len(example)])

    with torch.no_grad():
        lowered = make_fx(run, tracing_mode="fake")(*example, *constants.values())
    for node, (name, value) in zip(
        [n for n in lowered.graph.nodes if n.op == "placeholder"][len(example) :], constants.items(), strict=True
    ):
        lowered.register_buffer(name, value.detach())
        with lowered.graph.inserting_before(node):
            attribute = lowered.graph.get_attr(name)
        attribute.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(attribute)
        lowered.graph.erase_node(node)
    simplify(lowered)  # its views are reshapes then
    _clean(lowered)
    _fold(lowered)
    _clean(lowered)
    return lowered


def _clean(module: fx.GraphModule) -> None:
    """`simplify`, and of a chain of changes of shape only the last."""
    for node in list(module.graph.nodes):
        if node.target is aten.reshape.default:
            source = node.args[0]
            while source.op == "call_function" and source.target in (aten.reshape.default, aten.view.default):
                source = source.args[0]
            shape = node.meta["val"].shape
            if source.meta["val"].shape == shape:
                node.replace_all_uses_with(source)
                module.graph.erase_node(node)
            else:
                node.args = (source, list(shape))
    simplify(module)


def _fold(module: fx.GraphModule) -> None:
    """What depends on no input is computed now and becomes a constant of the program."""
    known: dict[fx.Node, Any] = {}
    names: dict[tuple[Any, ...], str] = {}
    for node in list(module.graph.nodes):
        if node.op == "get_attr":
            known[node] = getattr(module, node.target)
        elif node.op == "call_function" and all(n in known for n in node.all_input_nodes):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: known[n])
            value = node.target(*args, **kwargs)
            if not isinstance(value, Tensor) or value.numel() <= _MOST_CONSTANT:
                known[node] = value
    for node, value in known.items():
        outside = [user for user in node.users if user not in known and user.op != "output"]
        if node.op == "get_attr" or not isinstance(value, Tensor) or not outside:
            continue
        value = value.contiguous().clone()
        key = (value.dtype, tuple(value.shape), value.numpy().tobytes())
        if key not in names:
            names[key] = f"constant_{len(names)}"
            module.register_buffer(names[key], value)
        with module.graph.inserting_after(node):
            constant = module.graph.get_attr(names[key])
            constant.meta["val"] = node.meta.get("val")
        # An output stays computed: a program may not return its own constant.
        node.replace_all_uses_with(constant, delete_user_cb=lambda user: user.op != "output")
    module.graph.eliminate_dead_code()


Rule = Callable[["_Rewriter", fx.Node, Sequence[Any], dict[str, Any]], Any]
_RULES: dict[Any, Rule] = {}


def _rule(*targets: Any) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        for target in targets:
            _RULES[target] = rule
        return rule

    return register


class _Rewriter(fx.Interpreter):
    """Runs the graph with the rules in place of the operators. A rule that returns None leaves its operator alone."""

    def __init__(self, module: fx.GraphModule, constants: dict[Any, Tensor]) -> None:
        super().__init__(module, garbage_collect_values=False)
        self._constants = constants

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "get_attr":
            return self._constants[n.target]
        if n.op == "call_function" and n.target in _RULES:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            result = _RULES[n.target](self, n, args, kwargs)
            if result is not None:
                return result
        return super().run_node(n)


def _argument(node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any], name: str) -> Any:
    """An operator's argument by its name in the schema, or its default."""
    for position, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.name == name:
            return args[position] if position < len(args) else kwargs.get(name, argument.default_value)
    raise KeyError(name)


def _is_float(*values: Any) -> bool:
    return all(isinstance(v, Tensor) and v.dtype == torch.float32 for v in values)


# Products


@_rule(aten.mm.default)
def _mm(rewriter: _Rewriter, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return _product(rewriter, node.args[0], node.args[1]) if _is_float(*args[:2]) else None


@_rule(aten.addmm.default)
def _addmm(rewriter: _Rewriter, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if kwargs or not _is_float(*args):
        return None
    return _product(rewriter, node.args[1], node.args[2]) + args[0]


def _product(rewriter: _Rewriter, left: Any, right: Any) -> Tensor:
    """(m, k) times (k, n) as `bmm`, transposing what is smaller: the operands, or the operands' product."""
    a, b = rewriter.env[left], rewriter.env[right]
    # An operand that was transposed already comes the other way round for nothing.
    turned = [_transposed(rewriter, operand) for operand in (left, right)]
    direct = sum(v.numel() for v, t in zip((a, b), turned, strict=True) if t is not None)
    swapped = sum(v.numel() for v, t in zip((a, b), turned, strict=True) if t is None)
    if direct <= swapped + a.shape[0] * b.shape[1]:
        return _one_product(a, b)
    a, b = (_permuted(v, (1, 0)) if t is None else t for v, t in zip((a, b), turned, strict=True))
    return _permuted(_one_product(b, a), (1, 0))


def _one_product(a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a.reshape(1, *a.shape), b.reshape(1, *b.shape)).reshape(a.shape[0], b.shape[1])


def _transposed(rewriter: _Rewriter, node: Any) -> Tensor | None:
    if not isinstance(node, fx.Node) or node.target is not aten.permute.default:
        return None
    source: Any
    order: Any
    source, order = node.args
    value: Tensor = rewriter.env[source]
    return value if [d % 2 for d in order] == [1, 0] else None


# Convolutions


@_rule(aten.convolution.default)
def _convolution(rewriter: _Rewriter, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    x, w, bias, stride, padding, dilation, transposed, rest, groups = args
    if not _is_float(x, w) or x.dim() != 4:
        return None
    stride, padding, dilation, rest = (_pair(v) for v in (stride, padding, dilation, rest))
    if transposed:
        y = _backward_of_convolution(x, w, stride, padding, dilation, rest, groups)
    else:
        y = _forward_convolution(x, w, stride, padding, dilation, groups)
    return y if bias is None else y + bias.reshape(1, -1, 1, 1)


def _pair(value: Any) -> tuple[int, int]:
    first, *others = value
    return (first, others[0] if others else first)


def _forward_convolution(x: Tensor, w: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> Tensor:
    """x (N, C, H, W), w (O, C/groups, kh, kw) -> (N, O, H', W').

    Either each example's columns times the weights, repeated, or all examples' columns at once and the result
    transposed: whichever copies less.
    """
    (n, c), (o, per_group, kh, kw) = x.shape[:2], w.shape
    if n == per_group == 1 and c == o and stride[1] == 1 and x.shape[2] <= MOST_ROWS:
        return _banded_convolution(x, w, stride, padding, dilation)
    if any(padding):
        x = functional.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    height, width = x.shape[2:]
    out_h = (height - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    out_w = (width - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    size, places = per_group * kh * kw, out_h * out_w
    plain = kh == kw == 1 and stride == (1, 1)
    kernel = w.reshape(groups, o // groups, size)
    inside = (kh, kw, out_h, out_w)
    steps = (dilation[0] * width, dilation[1], stride[0] * width, stride[1])
    if n * w.numel() <= n * o * places:
        if plain:
            columns = x.reshape(n * groups, size, places)
        else:
            columns = _strided(
                x, (n * groups, per_group, *inside), (per_group * height * width, height * width, *steps)
            )
        y = torch.bmm(_repeat(kernel, n), columns.reshape(n * groups, size, places))
        return y.reshape(n, o, out_h, out_w)
    columns = _strided(
        x,
        (groups, per_group, kh, kw, n, out_h, out_w),
        (per_group * height * width, height * width, *steps[:2], c * height * width, *steps[2:]),
    )
    y = torch.bmm(kernel, columns.reshape(groups, size, n * places))
    return _permuted(y.reshape(o, n, places), (1, 0, 2)).reshape(n, o, out_h, out_w)


def _banded_convolution(x: Tensor, w: Tensor, stride: Any, padding: Any, dilation: Any) -> Tensor:
    """The depthwise convolution of one image, x (1, C, H, W), w (C, 1, kh, kw): a copy of the image for each column of
    the kernel only, and its rows by the product with a banded matrix. Stride along the columns 1."""
    channels, height, (kh, kw) = x.shape[1], x.shape[2], w.shape[2:]
    if padding[1]:
        x = functional.pad(x, (padding[1], padding[1]))
    whole = x.shape[3]
    count = whole - dilation[1] * (kw - 1)
    rows = (height + 2 * padding[0] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    columns = _strided(x, (channels, kw, height, count), (height * whole, dilation[1], whole, 1))
    bands = bands_of(w, rows, height, stride[0], dilation[0], padding[0])
    kernel = _permuted(bands, (0, 2, 1, 3)).reshape(channels, rows, kw * height)
    return torch.bmm(kernel, columns.reshape(channels, kw * height, count)).reshape(1, channels, rows, count)


def _repeat(w: Tensor, n: int) -> Tensor:
    """(groups, p, q) -> (n * groups, p, q)."""
    if n == 1:
        return w
    return (w.reshape(1, *w.shape) * torch.ones(n, 1, 1, 1)).reshape(n * w.shape[0], *w.shape[1:])


def _permuted(x: Tensor, order: Sequence[int]) -> Tensor:
    """As ExecuTorch permutes: into new memory, in order."""
    result: Tensor = aten.permute_copy.default(x, list(order))
    return result


@_rule(aten.permute.default)
def _permute(rewriter: _Rewriter, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    x, order = args
    order = [d % x.dim() for d in order]
    kept = [d for d in order if x.shape[d] != 1]
    if kept == sorted(kept):  # only axes of length 1 move
        return x.reshape([x.shape[d] for d in order])
    return _permuted(x, order)


def _strided(x: Tensor, shape: Sequence[int], strides: Sequence[int], offset: int = 0) -> Tensor:
    """One copying kernel in place of several slices, which XNNPACK does not make faster."""
    result: Tensor = aten.as_strided_copy.default(x.contiguous(), list(shape), list(strides), offset)
    return result


def _backward_of_convolution(
    g: Tensor, w: Tensor, stride: Any, padding: Any, dilation: Any, rest: Any, groups: int
) -> Tensor:
    """A transposed convolution: every place's columns from one product, then added where they overlap.

    g (N, O, H', W'), w (O, C/groups, kh, kw) -> (N, C, H, W).
    """
    n, o, out_h, out_w = g.shape
    per_group, kh, kw = w.shape[1:]
    places = out_h * out_w
    # Kernel columns first: then the addition along a row takes contiguous pieces, and along a column too.
    kernel = _permuted(w.reshape(groups, o // groups, per_group, kh, kw), (0, 4, 3, 2, 1))
    kernel = kernel.reshape(groups, kw * kh * per_group, o // groups)
    columns = torch.bmm(_repeat(kernel, n), g.reshape(n * groups, o // groups, places))
    if kh == kw == 1 and stride == (1, 1):
        whole = columns.reshape(n, groups * per_group, out_h, out_w)
    else:
        wide, tall = (
            (size - 1) * s + d * (k - 1) + 1
            for size, s, d, k in ((out_w, stride[1], dilation[1], kw), (out_h, stride[0], dilation[0], kh))
        )
        columns = columns.reshape(n * groups, kw, kh * per_group * out_h, out_w)
        rows = _overlap_add(columns, wide, stride[1], dilation[1])
        rows = rows.reshape(n * groups, kh, per_group, out_h, wide)
        whole = _overlap_add_rows(rows, tall, stride[0], dilation[0]).reshape(n, groups * per_group, tall, wide)
    for dim, (p, r) in enumerate(zip(padding, rest, strict=True), 2):
        whole = _part(whole, dim, p, whole.shape[dim] - max(p - r, 0))
    bottom, right = (max(r - p, 0) for p, r in zip(padding, rest, strict=True))
    if bottom or right:
        whole = functional.pad(whole, (0, right, 0, bottom))
    return whole


def _part(x: Tensor, dim: int, start: int, stop: int) -> Tensor:
    """A slice, copied into new memory."""
    if (start, stop) == (0, x.shape[dim]):
        return x
    result: Tensor = aten.slice_copy.Tensor(x, dim, start, stop)
    return result


def _overlap_add(columns: Tensor, whole: int, stride: int, dilation: int) -> Tensor:
    """(M, k, R, n) -> (M, R, whole): piece j goes to the places j * dilation + stride * (0 ... n-1)."""
    m, k, r, n = columns.shape
    pieces = []
    for j in range(k):
        piece = _part(columns, 1, j, j + 1).reshape(m, r, n)
        if stride > 1:
            piece = functional.pad(piece.reshape(m, r, n, 1), (0, stride - 1)).reshape(m, r, n * stride)
            piece = _part(piece, 2, 0, (n - 1) * stride + 1)
        piece = functional.pad(piece, (j * dilation, whole - j * dilation - piece.shape[-1]))
        pieces.append(piece)
    return functools.reduce(torch.add, pieces)


def _overlap_add_rows(rows: Tensor, whole: int, stride: int, dilation: int) -> Tensor:
    """(M, k, C, n, W) -> (M, C, whole, W), as above along the axis before the last."""
    m, k, c, n, w = rows.shape
    pieces = []
    for i in range(k):
        piece = _part(rows, 1, i, i + 1).reshape(m, c, n * w)
        if stride > 1:
            piece = functional.pad(piece.reshape(m, c, n, w), (0, (stride - 1) * w)).reshape(m, c, n * stride * w)
            piece = _part(piece, 2, 0, ((n - 1) * stride + 1) * w)
        piece = functional.pad(piece, (i * dilation * w, whole * w - i * dilation * w - piece.shape[-1]))
        pieces.append(piece)
    return functools.reduce(torch.add, pieces).reshape(m, c, whole, w)


# Pooling, slices, joins


@_rule(aten.max_pool2d_with_indices.default)
def _max_pool(rewriter: _Rewriter, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The windows' k * k elements as strided copies, which the backward pass takes too, and their maximum."""
    x, kernel, stride, padding, dilation, ceil = (
        _argument(node, args, kwargs, name)
        for name in ("self", "kernel_size", "stride", "padding", "dilation", "ceil_mode")
    )
    if ceil or any(user.args[1] == 1 and user.users for user in node.users) or x.dim() != 4 or not _is_float(x):
        return None
    kernel, padding, dilation = _pair(kernel), _pair(padding), _pair(dilation)
    stride = _pair(stride) if stride else kernel
    if any(padding):
        x = functional.pad(x, (padding[1], padding[1], padding[0], padding[0]), value=torch.finfo(x.dtype).min)
    height, width = ((x.shape[2 + i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2))
    best: Tensor | None = None
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            window = _window(
                x, (0, 0, i * dilation[0], j * dilation[1]), (1, 1, *stride), (*x.shape[:2], height, width)
            )
            best = window if best is None else torch.maximum(best, window)
    return best, None


def _window(x: Tensor, starts: Sequence[int], steps: Sequence[int], shape: Sequence[int]) -> Tensor:
    own = [math.prod(x.shape[i + 1 :]) for i in range(x.dim())]
    offset = sum(start * stride for start, stride in zip(starts, own, strict=True))
    return _strided(x, tuple(shape), tuple(s * o for s, o in zip(steps, own, strict=True)), offset)


@_rule(aten.slice.Tensor)
def _slice(rewriter: _Rewriter, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A chain of slices with steps becomes one copy from where the chain began."""
    chain = [node]
    while chain[-1].args[0].target is aten.slice.Tensor:  # type: ignore[union-attr]
        chain.append(chain[-1].args[0])  # type: ignore[arg-type]
    base = rewriter.env[chain[-1].args[0]]  # type: ignore[index]
    starts, steps, shape = [0] * base.dim(), [1] * base.dim(), list(base.shape)
    for link in reversed(chain):
        dim, start, end, step = (
            _argument(link, link.args, dict(link.kwargs), name) for name in ("dim", "start", "end", "step")
        )
        dim %= base.dim()
        start, end, step = slice(start, end, step).indices(shape[dim])
        starts[dim] += start * steps[dim]
        steps[dim] *= step
        shape[dim] = max(0, -(-(end - start) // step))
    if 0 in shape:
        return None
    if all(step == 1 for step in steps):
        dim, start, end = (_argument(node, args, kwargs, name) for name in ("dim", "start", "end"))
        start, end, _ = slice(start, end).indices(args[0].shape[dim])
        return _part(args[0], dim % args[0].dim(), start, end)
    return _window(base, starts, steps, shape)


@_rule(aten.select.int)
def _select(rewriter: _Rewriter, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    x, dim, index = args
    dim %= x.dim()
    index %= x.shape[dim]
    return _part(x, dim, index, index + 1).reshape([s for i, s in enumerate(x.shape) if i != dim])


@_rule(aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default)
def _reshape(rewriter: _Rewriter, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return args[0].reshape(node.target(*args, **kwargs).shape)  # type: ignore[operator]


@_rule(aten.split_with_sizes.default, aten.split.Tensor, aten.unbind.int)
def _split(rewriter: _Rewriter, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    dim = _argument(node, args, kwargs, "dim") % x.dim()
    pieces, start = [], 0
    for piece in node.target(*args, **kwargs):  # type: ignore[operator]
        size = 1 if node.target is aten.unbind.int else piece.shape[dim]
        pieces.append(_part(x, dim, start, start + size).reshape(piece.shape))
        start += size
    return pieces


@_rule(aten.cat.default)
def _cat(rewriter: _Rewriter, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Pieces of few elements each are joined end to end and then transposed: copying them singly is slow."""
    pieces, dim = args[0], _argument(node, args, kwargs, "dim")
    first = pieces[0]
    dim %= first.dim()
    inner = math.prod(first.shape[dim:])
    if len(pieces) == 1:
        return first
    if inner >= 4 or any(p.shape != first.shape for p in pieces) or not _is_float(*pieces):
        return None
    outer, count = first.numel() // inner, len(pieces)
    joined = torch.cat([p.reshape(1, outer, inner) for p in pieces])
    return _permuted(joined, (1, 0, 2)).reshape(*first.shape[:dim], count * first.shape[dim], *first.shape[dim + 1 :])


@_rule(aten.expand.default)
def _expand(rewriter: _Rewriter, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    shape = tuple(node.target(*args, **kwargs).shape)  # type: ignore[operator]
    if shape == tuple(x.shape):
        return x
    if not _is_float(x) or len(shape) > _MOST_RANK:
        return None
    own = (1,) * (len(shape) - x.dim()) + tuple(x.shape)
    return x.reshape(own) * torch.ones([s if o == 1 else 1 for s, o in zip(shape, own, strict=True)])


@_rule(aten.full_like.default, aten.zeros_like.default, aten.ones_like.default)
def _filled(rewriter: _Rewriter, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    value = args[1] if node.target is aten.full_like.default else node.target is aten.ones_like.default
    return torch.full(args[0].shape, value, dtype=kwargs.get("dtype") or args[0].dtype)


@_rule(aten.constant_pad_nd.default)
def _pad(rewriter: _Rewriter, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Padding below zero cuts off: ExecuTorch's kernel refuses it, at the first step and not before."""
    x, widths = args[0], list(args[1])
    for i, (before, after) in enumerate(zip(widths[::2], widths[1::2], strict=True)):
        dim = x.dim() - 1 - i
        x = _part(x, dim, max(-before, 0), x.shape[dim] + min(after, 0))
    widths = [max(width, 0) for width in widths]
    return functional.pad(x, widths, value=_argument(node, args, kwargs, "value")) if any(widths) else x


# Reductions


@_rule(aten.sum.dim_IntList, aten.mean.dim)
def _reduce(rewriter: _Rewriter, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    dims, keep = (_argument(node, args, kwargs, name) for name in ("dim", "keepdim"))
    dims = sorted(d % x.dim() for d in dims or range(x.dim()))
    size = math.prod(x.shape[d] for d in dims)
    if (
        kwargs.get("dtype")
        or not _is_float(x)
        or x.dim() < 2
        or dims != list(range(dims[0], dims[-1] + 1))
        or size == 0
    ):
        return None
    shape = [1 if d in dims else s for d, s in enumerate(x.shape)]
    if not keep:
        shape = [s for d, s in enumerate(x.shape) if d not in dims]
    before, after = math.prod(x.shape[: dims[0]]), math.prod(x.shape[dims[-1] + 1 :])
    scale = 1.0 / size if node.target is aten.mean.dim else 1.0
    if size == 1:
        return x.reshape(shape)
    if after == 1:
        # The one reduction that XNNPACK has: global average pooling. The "channels" are the sums.
        total = x.reshape(1, before, 1, size).mean((2, 3), keepdim=True).reshape(shape)
        return total if node.target is aten.mean.dim else total * float(size)
    ones = torch.full((before, 1, size), scale)
    return torch.bmm(ones, x.reshape(before, size, after)).reshape(shape)


# Selections and comparisons as arithmetic


def _step(d: Tensor) -> Tensor:
    """1 where d > 0, else 0."""
    return _huge(d).clamp(0.0, 1.0)


def _huge(d: Tensor) -> Tensor:
    """d times 2^252: at least 1 for the smallest positive float32, infinite for most."""
    big = torch.full((), _BIG)  # a tensor: the converter makes float64 of so large a Python number
    return d * big * big


_COMPARISONS: dict[Any, Callable[[Any, Any], Tensor]] = {}
for _names, _form in (
    (("gt",), lambda a, b: _step(a - b)),
    (("ge",), lambda a, b: 1.0 - _step(b - a)),
    (("lt",), lambda a, b: _step(b - a)),
    (("le",), lambda a, b: 1.0 - _step(a - b)),
    (("eq",), lambda a, b: 1.0 - _step((a - b).abs())),
    (("ne",), lambda a, b: _step((a - b).abs())),
):
    for _name in _names:
        for _overload in ("Tensor", "Scalar"):
            _COMPARISONS[getattr(getattr(aten, _name), _overload)] = _form


@_rule(aten._to_copy.default)
def _to_copy(rewriter: _Rewriter, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A comparison that becomes a number. Vectors with one element for each example stay comparisons: those decide
    what counts, and have to be right for NaN too."""
    if kwargs.get("dtype") != torch.float32 or args[0].dim() < 2 or args[0].dtype != torch.bool:
        return None
    return _as_number(rewriter, node.args[0])


def _as_number(rewriter: _Rewriter, node: Any) -> Tensor | None:
    """A condition as 1.0 or 0.0, by arithmetic alone, or None."""
    left, right = (rewriter.env[v] if isinstance(v, fx.Node) else v for v in (*node.args, None)[:2])
    if node.target is aten._to_copy.default:
        return _step(left.abs()) if _is_float(left) else None
    if node.target in (aten.bitwise_and.Tensor, aten.logical_and.default):
        both = [_as_number(rewriter, v) for v in node.args]
        return None if both[0] is None or both[1] is None else both[0] * both[1]
    form = _COMPARISONS.get(node.target)
    if form is None:
        return None
    if _is_float(left) and (_is_float(right) or isinstance(right, int | float)):
        return form(left, right)
    if node.target is aten.eq.Tensor and any(_counts_up(v) for v in node.args[:2]):
        difference = left.to(torch.float32) - right.to(torch.float32)
        return 1.0 - (difference * difference).clamp(0.0, 1.0)
    return None


def _counts_up(node: Any) -> bool:
    """Whether its values are 0, 1, ... below what float32 holds exactly: no other integer rounds to one of them."""
    return (
        isinstance(node, fx.Node)
        and node.target in (aten.arange.start_step, aten.arange.default, aten.arange.start)
        and node.meta["val"].numel() < _EXACT_INTEGERS
    )


@_rule(aten.sign.default)
def _sign(rewriter: _Rewriter, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return _huge(args[0]).clamp(-1.0, 1.0) if _is_float(args[0]) and args[0].dim() >= 2 else None


@_rule(aten.where.self)
def _where(rewriter: _Rewriter, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Rows of examples that do not count become zeros: rows are copied, those from a row of zeros.

    Never by a product with zero, which would keep a NaN.
    """
    condition, rows, other = args
    batch = rows.shape[0] if rows.dim() else 0
    if (
        rows.dim() < 2
        or rows.shape != node.meta["val"].shape
        or tuple(condition.shape) != (batch, *[1] * (rows.dim() - 1))
        or not _is_float(rows, other)
        or not _is_zero(node.args[2])
    ):
        return None
    condition = condition.reshape(batch)
    index = torch.where(condition, torch.arange(batch), torch.full((), batch, dtype=torch.int64))
    flat = rows.reshape(batch, -1)
    return functional.embedding(index, torch.cat([flat, torch.zeros(1, flat.shape[1])])).reshape(rows.shape)


def _is_zero(node: Any) -> bool:
    if not isinstance(node, fx.Node):
        return False
    return node.target is aten.zeros.default or (node.target is aten.full.default and bool(node.args[1] == 0))


@_rule(operator.getitem)
def _getitem(rewriter: _Rewriter, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return args[0][args[1]]


@_rule(aten.pow.Tensor_Scalar)
def _power(rewriter: _Rewriter, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    x, exponent = args
    if exponent == 2:
        return x * x
    if exponent == 3:
        return x * x * x
    return torch.rsqrt(x) if exponent == -0.5 else None


@_rule(aten.reciprocal.default)
def _reciprocal(rewriter: _Rewriter, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return torch.ones(()) / args[0] if _is_float(args[0]) else None


@_rule(aten.gelu.default)
def _gelu(rewriter: _Rewriter, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The approximation by tanh is written out: XNNPACK's delegate does not read that argument and gives the exact
    function, 5e-4 away."""
    x = args[0]
    if _argument(node, args, kwargs, "approximate") != "tanh":
        return None
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * (x * x * x))))
