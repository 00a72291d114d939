"""Which layer of the user's model an operator without an ONNX form comes from.

Looked for only when a graph could not be converted, by converting each operator of the forward pass alone, as capture
runs it, with its gradient. The traced graph could not tell: it holds operators of the backward pass and of
decompositions, in no layer's name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from export.decompositions import DECOMPOSITIONS, simplify
from export.errors import NoOnnxFormError
from export.layers.recorder import HANDLERS, Recorder, layer_of
from export.losses import Loss

Convert = Callable[[fx.GraphModule, Sequence[Tensor]], object]
"""Raises NoOnnxFormError for a graph without an ONNX form; takes tensors like its inputs."""


@dataclass(frozen=True)
class Lacking:
    """What has no ONNX form: operators, by their names in PyTorch; in_gradient: of the backward pass only."""

    operators: str
    in_gradient: bool


def lacking_layers(recorder: Recorder, convert: Convert) -> dict[str, Lacking]:
    """The layers with an operator that has no ONNX form itself, or whose gradient, which training needs, has none.

    Layers as in `layer_of`, in the order of the forward pass.
    """
    found: dict[str, Lacking] = {}
    known: dict[str, Lacking | None] = {}
    for node in recorder.graph.nodes:
        if node.op != "call_function":
            continue
        if not all(isinstance(value.meta.get("val"), Tensor) for value in node.all_input_nodes):
            continue  # a part of what another operator gave
        alone = _Alone(recorder, node)
        if alone.key not in known:
            known[alone.key] = _lacking(alone, alone.inputs, alone.differentiated, convert)
        lacking = known[alone.key]
        if lacking is not None:
            found.setdefault(layer_of(node), lacking)
    return found


def lacking_loss(loss: Loss, output: Tensor, label: Tensor, convert: Convert) -> Lacking | None:
    """Likewise for the loss of the model's output.  output, label: (B, ...), of which only shape and type matter."""
    inputs = [_ones_like(output), _ones_like(label)]
    return _lacking(lambda o, y: (loss.per_example(o, y),), inputs, [0], convert)


class _Alone:
    """One operator of the forward pass as a function of its tensors, run as the recorder runs it."""

    def __init__(self, recorder: Recorder, node: fx.Node) -> None:
        sources = node.all_input_nodes
        graph = fx.Graph()
        places = {source: graph.placeholder(f"input_{i}") for i, source in enumerate(sources)}
        for source, place in places.items():
            place.meta.update(source.meta)
        copied = graph.node_copy(node, lambda n: places[n])
        graph.output((copied,))
        examples = [places[s].name for s in sources if recorder.depends[s]]
        handled = node.target in HANDLERS
        trained = [places[s].name for s in sources if recorder.roots[s] and not recorder.depends[s]]
        self.recorder = Recorder(graph, trained if handled else (), examples)
        self.names = [place.name for place in places.values()]
        self.inputs = [_ones_like(source.meta["val"]) for source in sources]
        # A rule of ours makes a trained parameter's gradient; the other gradients are PyTorch's own.
        self.differentiated = [
            i
            for i, source in enumerate(sources)
            if recorder.roots[source]
            and self.inputs[i].is_floating_point()
            and (recorder.depends[source] or not handled)
        ]
        shapes = [(tuple(x.shape), x.dtype) for x in self.inputs]
        self.key = repr((str(node.target), copied.args, copied.kwargs, shapes, examples, self.differentiated))

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        output = self.recorder.run(dict(zip(self.names, inputs, strict=True))).output
        return tuple(_tensors(output))


def _lacking(
    function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], wanted: Sequence[int], convert: Convert
) -> Lacking | None:
    def forward(*given: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return function(*given)

    def with_gradient(*given: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(given)]
            outputs = function(*leaves)
            smooth = [y for y in outputs if y.requires_grad]
            if not smooth:
                return outputs
            # Some gradient of the outputs that is no constant.
            above = [y.detach().cos() for y in smooth]
            found = torch.autograd.grad(smooth, [leaves[i] for i in wanted], above, allow_unused=True)
        return tuple(value.detach() for value in (*outputs, *found) if value is not None)

    operators = _without_form(with_gradient if wanted else forward, inputs, convert)
    if operators is None:
        return None
    own = _without_form(forward, inputs, convert) if wanted else operators
    return Lacking(own or operators, in_gradient=own is None)


def _without_form(
    function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], convert: Convert
) -> str | None:
    try:
        traced = make_fx(
            function, decomposition_table=DECOMPOSITIONS, tracing_mode="fake", _allow_non_fake_inputs=True
        )(*inputs)
        simplify(traced)
        convert(traced, inputs)
    except NoOnnxFormError as error:
        return error.operators
    except Exception:  # noqa: BLE001  (what cannot be run or converted alone for another reason is not blamed)
        return None
    return None


def _tensors(value: Any) -> list[Tensor]:
    found = value if isinstance(value, tuple | list) else [value]
    flat = [inner for item in found for inner in (item if isinstance(item, tuple | list) else [item])]
    return [item for item in flat if isinstance(item, Tensor)]


def _ones_like(value: Tensor) -> Tensor:
    """Of the captured value's shape and type, but no fake one."""
    return torch.ones(tuple(value.shape), dtype=value.dtype)
