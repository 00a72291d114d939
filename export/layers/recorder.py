"""Runs a captured forward graph and finds every use of every trainable parameter.

The graph is that of `torch.export`: operators with parameters as inputs. Each value is either made from parameters and
constants alone or depends on the examples. Where the two kinds meet, a parameter is *used*: a handler for that operator
runs it, notes the input and taps the output. A parameter with a use that no handler knows is left to the exact, slower
fallback. Nothing is missed, because every edge of the graph is looked at.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from export.errors import UnsupportedModelError
from export.layers.uses import Dense, Indexed, Outer, Use

aten = torch.ops.aten

# A view of a parameter in which every element appears at most once: the gradient's norm is the same seen through it.
INJECTIVE_VIEWS = frozenset(
    {
        aten.t.default, aten.transpose.int, aten.permute.default, aten.view.default, aten.reshape.default,
        aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim,
        aten.squeeze.dims, aten.contiguous.default, aten.clone.default, aten.alias.default, aten.slice.Tensor,
        aten.select.int, aten.narrow.default, aten.flatten.using_ints, aten.unflatten.int,
        aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int, operator.getitem,
        aten.numpy_T.default, aten.mT.default, aten.movedim.int,
    }
)  # fmt: skip


@dataclass
class Tap:
    """One use: how its per-example gradient follows from the output's gradient, and of which (view of a) parameter."""

    layer: str
    source: fx.Node
    inputs: tuple[Tensor, ...]
    output: Tensor
    build: Callable[[Layout, Tensor, tuple[Tensor, ...]], Use]
    placed_as: Tensor
    """Where the examples lie in this, they lie in the output: the output itself, unless that is the same for all of
    them, as a first state's product is."""


@dataclass(frozen=True)
class Layout:
    """Where the examples lie in a tensor: along `axis`, as its slow factor ("major") or its fast one ("minor")."""

    axis: int
    minor: bool
    batch: int

    def batch_first(self, tensor: Tensor) -> Tensor:
        """(B, ...): the example axis split off and moved to the front; what remains keeps its order."""
        size = tensor.shape[self.axis]
        if size == self.batch:
            return tensor if self.axis == 0 else tensor.movedim(self.axis, 0)
        factors = (size // self.batch, self.batch) if self.minor else (self.batch, size // self.batch)
        split = tensor.unflatten(self.axis, factors)
        return split.movedim(self.axis + (1 if self.minor else 0), 0)


@dataclass
class Recording:
    """One run: the output, the taps in order, every example-dependent value, and what needs the fallback."""

    output: Any = None
    taps: list[Tap] = field(default_factory=list)
    values: dict[str, Tensor] = field(default_factory=dict)
    fallback: dict[str, str] = field(default_factory=dict)
    """parameter placeholder -> the operator that no handler knows."""

    @property
    def first_output(self) -> Tensor:
        """What the loss is of."""
        first: Tensor = self.output[0]
        return first


class Recorder:
    """Interprets the graph on given values. `run` may be traced: it only calls tensor operations."""

    def __init__(self, graph: fx.Graph, trainable: Sequence[str], example_inputs: Sequence[str]) -> None:
        """trainable, example_inputs: names of placeholders."""
        self.graph = graph
        self.trainable = frozenset(trainable)
        self.examples = frozenset(example_inputs)
        self.depends: dict[fx.Node, bool] = {}
        """Whether a value depends on the examples."""
        self.roots: dict[fx.Node, frozenset[str]] = {}
        """The trainable placeholders that a value depends on."""
        for node in graph.nodes:
            if node.op == "placeholder":
                self.depends[node] = node.name in self.examples
                self.roots[node] = frozenset({node.name} & self.trainable)
            else:
                inputs = node.all_input_nodes
                self.depends[node] = any(self.depends[n] for n in inputs)
                self.roots[node] = frozenset().union(*(self.roots[n] for n in inputs)) if inputs else frozenset()
                if node.target is aten.detach.default:
                    self.roots[node] = frozenset()  # no gradient passes
        self.output_depends = any(self.depends[node] for node in graph.nodes if node.op == "output")
        self._recording = Recording()
        self._node: fx.Node | None = None
        self._tapped: list[fx.Node] = []
        """The parameters, or views of them, that the rule for the current node has accounted for."""

    @property
    def output_like(self) -> Tensor:
        """A tensor of the output's shape and type, without values."""
        value: Tensor = self._output_node.meta["val"]
        return value

    @property
    def output_operator(self) -> Any:
        """What the output is the result of: an operator, or the name of an input."""
        return self._output_node.target

    @property
    def _output_node(self) -> fx.Node:
        (output,) = (node for node in self.graph.nodes if node.op == "output")
        first: Any = output.args[0][0]
        node: fx.Node = first
        return node

    def run(self, values: Mapping[str, Tensor]) -> Recording:
        """values: placeholder name -> tensor."""
        recording = self._recording = Recording()
        env: dict[fx.Node, Any] = {}
        for node in self.graph.nodes:
            self._node = node
            if node.op == "placeholder":
                env[node] = values[node.name]
            elif node.op == "get_attr":
                env[node] = getattr(self.graph.owning_module, node.target)
            elif node.op == "output":
                recording.output = fx.map_arg(node.args[0], lambda n: env[n])
            elif node.op == "call_function":
                env[node] = self._call(node, env)
            else:
                raise UnsupportedModelError(f"{layer_of(node)}: {node.op} in the captured graph is not supported")
            if self.depends[node] and isinstance(env.get(node), Tensor):
                recording.values[node.name] = env[node]
        return recording

    def _call(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
        args = fx.map_arg(node.args, lambda n: env[n])
        kwargs = fx.map_arg(node.kwargs, lambda n: env[n])
        met = [n for n in _every_input(node) if not self.depends[n] and self.roots[n]]
        rewrite, handler = REWRITES.get(node.target), HANDLERS.get(node.target)
        self._tapped = []
        result = None
        if self.depends[node] and rewrite is not None:
            result = rewrite(self, node, args, kwargs)
        elif self.depends[node] and met and handler is not None:
            result = handler(self, node, args, kwargs)
        if self.depends[node]:
            # A place that no rule accounts for: a learned first state, a learned query, an operator without a rule.
            for source in met:
                if self._tapped.count(source) < met.count(source):
                    for root in self.roots[source]:
                        self._recording.fallback.setdefault(root, f"{node.target} in {layer_of(node)}")
        return call_target(node, *args, **kwargs) if result is None else result

    # What handlers are made of. `source` is the graph node of the parameter or of a view of it; None is not trainable.

    def tap(
        self,
        output: Tensor,
        uses: Sequence[tuple[fx.Node | None, tuple[Tensor, ...], Callable[[Layout, Tensor, tuple[Tensor, ...]], Use]]],
        placed_as: Tensor | None = None,
    ) -> Tensor:
        """Note that `output` came from these uses; gradients with respect to it are what the rules will read."""
        self._tapped += [use[0] for use in uses if use[0] is not None]
        wanted = [use for use in uses if use[0] is not None and self._traceable(use[0])]
        if wanted:
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            layer = layer_of(self._node) if self._node is not None else ""
            shown = output if placed_as is None else placed_as
            self._recording.taps += [
                Tap(layer, source, tuple(t.detach() for t in inputs), output, build, shown)
                for source, inputs, build in wanted
                if source is not None
            ]
        return output

    def _traceable(self, source: fx.Node) -> bool:
        """Whether `source` is a trainable parameter or an injective view of one. Otherwise its roots fall back."""
        if not self.roots[source]:
            return False
        node = source
        while node.op == "call_function":
            if node.target not in INJECTIVE_VIEWS:
                for root in self.roots[source]:
                    self._recording.fallback.setdefault(root, f"a computed weight ({node.target} in {layer_of(node)})")
                return False
            node = node.all_input_nodes[0]
        return True

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        sources: Sequence[fx.Node | None],
        placed_as: Tensor | None = None,
    ) -> Tensor:
        """x (..., p) times weight (q, p) transposed, plus bias (q,)."""
        output = F.linear(x, weight, bias)
        return self.tap(output, [(sources[0], (x,), _outer), (sources[1], (), _last_axis_sum)], placed_as)

    def scale(self, x: Tensor, weight: Tensor, source: fx.Node | None, shape: Sequence[int] | None = None) -> Tensor:
        """x * weight.  shape: what to broadcast the weight as, if not as it is."""
        own, spread = tuple(weight.shape), tuple(weight.shape if shape is None else shape)

        def build(layout: Layout, b: Tensor, inputs: tuple[Tensor, ...]) -> Use:
            return _reduced(layout, b * inputs[0], spread, own)

        return self.tap(x * weight.reshape(spread), [(source, (x,), build)])

    def product(self, x: Tensor, weight: Tensor, source: fx.Node | None) -> Tensor:
        """x (..., p) times weight (p, q)."""

        def build(layout: Layout, b: Tensor, inputs: tuple[Tensor, ...]) -> Use:
            use = _outer(layout, b, inputs)
            return Outer(use.b, use.a)  # the transpose of a linear layer's gradient

        return self.tap(x @ weight, [(source, (x,), build)])

    def shift(
        self,
        x: Tensor,
        bias: Tensor,
        source: fx.Node | None,
        shape: Sequence[int] | None = None,
        negative: bool = False,
    ) -> Tensor:
        """x + bias, or x - bias.  shape: what to broadcast the bias as, if not as it is."""
        own, spread = tuple(bias.shape), tuple(bias.shape if shape is None else shape)
        bias = bias.reshape(spread)

        def build(layout: Layout, b: Tensor, inputs: tuple[Tensor, ...]) -> Use:
            return _reduced(layout, -b if negative else b, spread, own)

        return self.tap(x - bias if negative else x + bias, [(source, (), build)])

    def embedding(self, weight: Tensor, indices: Tensor, source: fx.Node | None, padding: int = -1) -> Tensor:
        """Rows of weight (rows, q) at `indices`.  padding: an index whose row gets no gradient, or -1."""
        rows = weight.shape[0]

        def build(layout: Layout, b: Tensor, inputs: tuple[Tensor, ...]) -> Use:
            if padding >= 0:
                b = b * (inputs[0] != padding).to(b.dtype)[..., None]
            first = layout.batch_first(b)
            index = layout.batch_first(inputs[0][..., None])
            return Indexed(index.flatten(1), first.reshape(first.shape[0], -1, first.shape[-1]), rows)

        return self.tap(F.embedding(indices, weight), [(source, (indices,), build)])


def _outer(layout: Layout, b: Tensor, inputs: tuple[Tensor, ...]) -> Outer:
    a, b = layout.batch_first(inputs[0]), layout.batch_first(b)
    return Outer(a.reshape(a.shape[0], -1, a.shape[-1]), b.reshape(b.shape[0], -1, b.shape[-1]))


def _last_axis_sum(layout: Layout, b: Tensor, inputs: tuple[Tensor, ...]) -> Use:
    b = layout.batch_first(b)
    return Dense(b if b.dim() == 2 else b.flatten(1, -2).sum(1))


def _reduced(layout: Layout, full: Tensor, shape: tuple[int, ...], own: tuple[int, ...]) -> Use:
    """Sum over the output's axes down to `shape`, which was broadcast to it, example by example; then as `own`."""
    if layout.axis >= full.dim() - len(shape) and shape[layout.axis - full.dim() + len(shape)] != 1:
        raise NotPerExampleError
    # Broadcasting aligns at the end. The example axis goes to the front; what the split leaves of it is summed.
    first = layout.batch_first(full)
    leftover = full.shape[layout.axis] != layout.batch
    if leftover:
        first = first.sum(layout.axis + 1)
    kept = first.dim() - 1
    aligned = (1,) * (kept + 1 - len(shape)) + shape if len(shape) <= kept + 1 else shape
    # `aligned` describes full's axes; drop the example axis from it.
    aligned = aligned[: layout.axis] + aligned[layout.axis + 1 :]
    sizes = zip(aligned, first.shape[1:], strict=True)
    reduce = [i + 1 for i, (size, have) in enumerate(sizes) if size == 1 and have != 1]
    if reduce:
        first = first.sum(reduce, keepdim=True)
    return Dense(first.reshape(first.shape[0], *own))


class NotPerExampleError(Exception):
    """This use has no rule for where the examples lie in it: the exact fallback serves the parameter."""


def _every_input(node: fx.Node) -> list[fx.Node]:
    """The nodes among the arguments, one entry for each place."""
    found: list[fx.Node] = []

    def note(n: fx.Node) -> fx.Node:
        found.append(n)
        return n

    fx.map_arg((node.args, dict(node.kwargs)), note)
    return found


Handler = Callable[[Recorder, fx.Node, Sequence[Any], Mapping[str, Any]], Any]
HANDLERS: dict[Any, Handler] = {}
"""Operators with a trainable parameter and the examples as inputs. A handler may decline by returning None."""
REWRITES: dict[Any, Handler] = {}
"""Operators that are run in another form whenever they touch the examples, or refused."""


def handles(*targets: Any) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(targets, handler))
        return handler

    return register


def rewrites(*targets: Any) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        REWRITES.update(dict.fromkeys(targets, handler))
        return handler

    return register


def call_target(node: fx.Node, *args: Any, **kwargs: Any) -> Any:
    """Run the node's operator."""
    target: Any = node.target
    return target(*args, **kwargs)


def layer_of(node: fx.Node) -> str:
    """The user's name for where a node comes from: "features.0 (Conv2d)"."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    if not stack:
        return node.name
    path, kind = stack[-1]
    return f"{path or 'the model itself'} ({str(kind).rsplit('.', 1)[-1]})"
