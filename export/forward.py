"""The forward pass of a model as one functional graph, or a refusal that names the layer and a remedy.

`torch.export` gives the operators; in-place ones are turned into ordinary ones, because gradients are read off values
that must not change afterwards. What cannot be differentiated example by example, or would not do the same in every
run, is refused here, while the graph still says what the user wrote.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as module_hooks
from torch.utils._pytree import tree_leaves

from export.errors import UnsupportedModelError, first_line, place_of
from export.layers.recorder import REWRITES, layer_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Forward:
    """graph: placeholders for parameters, buffers, constants and inputs; one output, the model's first.

    placeholder_of: qualified name -> placeholder; a tensor that goes by several names has one placeholder.
    constants: placeholder -> tensor.  examples: the placeholders of the inputs, in order.
    written: the forward pass as torch.export gave it, in a form that is equal for equal ones.
    """

    graph: fx.Graph
    placeholder_of: Mapping[str, str]
    constants: Mapping[str, Tensor]
    examples: tuple[str, ...]
    written: Hashable


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy, also of a model that holds what its last run computed, as one that shows its attention does."""
    held = tree_leaves([list(vars(module).values()) for module in model.modules()])
    computed = {id(value): value.detach().clone() for value in held if isinstance(value, Tensor) and not value.is_leaf}
    return copy.deepcopy(model, computed)  # deepcopy refuses tensors that were computed, unless it is told their copy


def check_inputs(model: nn.Module, inputs: Sequence[Tensor]) -> None:
    """Run `model` once as it is, for what torch.export says of inputs that do not fit is long and names another cause.

    inputs: (B, ...); integers are taken as 0, because an example's values do not matter and may lie outside of a table.
    Raises UnsupportedModelError that names the layer which does not take them.
    """
    tried = copy_of(model)  # a layer may count the batches that it has seen
    entered: list[str] = []
    with warnings.catch_warnings(), _watched(tried, entered), torch.random.fork_rng(devices=()):
        warnings.simplefilter("ignore")  # whatever matters comes again in the capture
        try:
            tried(*(x if x.is_floating_point() else torch.zeros_like(x) for x in inputs))
        except Exception as error:  # the user's code may raise anything
            given = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in inputs)
            raise UnsupportedModelError(
                f"{entered[-1] if entered else 'the model'}: the model does not take these inputs, {given}: "
                f"{first_line(error)}{place_of(error)}. They are the spec's `inputs`, one for each argument of "
                "forward, with a batch axis before their own."
            ) from error


def check_repeats(model: nn.Module, inputs: Sequence[Tensor]) -> None:
    """Run `model` twice on the same random inputs, for what it keeps between two runs would be constant in the graph.

    inputs: (B, ...), of which only shape and dtype matter.
    Raises UnsupportedModelError that names the layer whose output is another the second time.
    """
    tried = copy_of(model)
    outputs: list[tuple[str, Tensor]] = []
    for name, module in tried.named_modules():
        module.register_forward_hook(
            lambda module, args, output, name=name: outputs.extend(
                (_called(name, module), value.detach().clone())
                for value in tree_leaves(output)
                if isinstance(value, Tensor) and value.is_floating_point()
            )
        )
    state = {name: value.clone() for name, value in tried.named_buffers()}
    runs = []
    with warnings.catch_warnings(), torch.random.fork_rng(devices=()):
        warnings.simplefilter("ignore")  # whatever matters comes again in the capture
        drawn = [torch.rand(x.shape) if x.is_floating_point() else torch.zeros_like(x) for x in inputs]
        for _ in range(2):
            torch.manual_seed(0)
            try:
                tried(*drawn)
            except Exception:  # noqa: BLE001  (the user's code may want other values than these; capture has none)
                return
            runs.append(outputs.copy())
            outputs.clear()
    if any(not torch.equal(value, state[name]) for name, value in tried.named_buffers() if name in state):
        return  # a buffer changes: the capture refuses that by the buffer's name, or has a remedy for the layer
    first, second = runs
    for (layer, one), (_, two) in zip(first, second, strict=False):
        close = 1e-4 * float(one.abs().nan_to_num(0, 0, 0).max()) if one.numel() else 0.0
        if one.shape != two.shape or not torch.allclose(one, two, rtol=1e-4, atol=close, equal_nan=True):
            raise UnsupportedModelError(
                f"{layer}: its output is another when it is run again on the same inputs. What a layer keeps "
                "between two runs in an attribute of its own (a counter, the last batch's state), and random "
                "numbers that are not PyTorch's, would be constants in the graph: make them inputs of the "
                "model, or remove them."
            )


def _called(name: str, module: nn.Module) -> str:
    return f"{name or 'the model itself'} ({type(module).__name__})"


def capture_forward(model: nn.Module, inputs: Sequence[Tensor], known: Forward | None = None) -> Forward:
    """`model` on a batch: inputs (B, ...).

    known: a capture of the same model in another mode, with the same inputs; where the modes do not differ, as for most
    models in training and evaluation, it is the answer, and half of the time is saved.
    Raises UnsupportedModelError for control flow that depends on the data, randomness, BatchNorm in training mode,
    buffers that change, torch.no_grad inside forward, and outputs that are not tensors.
    """
    entered: list[str] = []
    with warnings.catch_warnings(), _watched(model, entered):
        warnings.simplefilter("ignore")  # about torch's own tree specifications, and about a GRU's weight list
        try:
            with _quiet():
                program = torch.export.export(model, tuple(inputs))
        except Exception as error:  # torch.export has no base class for what it refuses
            raise UnsupportedModelError(
                f"{entered[-1] if entered else 'the model'}: the forward pass cannot be captured as one graph: "
                f"{first_line(error)}{place_of(error)}. Control flow that depends on the data, and other libraries "
                "than PyTorch, have no place in a training graph: use torch.where, fixed loops and PyTorch's operators."
            ) from error
        for node in program.graph.nodes:
            _refuse(node)
        if program.call_spec.out_spec is not None and program.call_spec.out_spec.type is dict:
            raise UnsupportedModelError(
                "the model returns a dict: return a tensor, or a tuple whose first is the output"
            )
        written = _written(program)
        if known is not None and known.written == written:
            return known
        program = program.run_decompositions({})  # nothing is decomposed: it only makes the graph functional
    signature = program.graph_signature
    for name in (*signature.buffers_to_mutate.values(), *signature.parameters_to_mutate.values()):
        raise UnsupportedModelError(
            f"{name}: the model changes this tensor while it runs; a training step on a device keeps no such state. "
            "Call .eval() on the layer, or remove the update (an embedding's max_norm is one)."
        )
    named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants = {node: program.constants[name] for node, name in signature.inputs_to_lifted_tensor_constants.items()}
    for node, name in signature.inputs_to_buffers.items():
        if name in signature.non_persistent_buffers:  # a part of the code, not of the model's state
            constants[node] = program.constants[name]
    graph = program.graph_module.graph
    for node in graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            # A view was enough for the strides of this run; the operators that are run in another form have others.
            node.target = aten.reshape.default
    placeholder_of = _join_aliases(model, graph, {name: node for node, name in named.items()})
    _keep_first_output(graph, signature.user_outputs)
    return Forward(graph, placeholder_of, constants, tuple(signature.user_inputs), written)


def _written(program: torch.export.ExportedProgram) -> Hashable:
    """Operators and their arguments in order, nodes by number; what the inputs stand for; the constants' bytes."""
    number: dict[fx.Node, int] = {}
    lines = []
    for node in program.graph.nodes:
        args = fx.map_arg((node.args, dict(node.kwargs)), lambda n: f"\0{number[n]}")  # no operator takes such a string
        lines.append((node.op, str(node.target), repr(args)))
        number[node] = len(number)
    inputs = tuple((i.kind.name, i.arg.name, i.target, i.persistent) for i in program.graph_signature.input_specs)
    constants = tuple(
        (name, str(value.dtype), tuple(value.shape), value.detach().flatten().view(torch.uint8).numpy().tobytes())
        for name, value in sorted(program.constants.items())
        if isinstance(value, Tensor)
    )
    return tuple(lines), inputs, constants


def aliases(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer -> the first name of the same tensor, itself for most."""
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for name, value in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        found[name] = first.setdefault(id(value), name)
    return found


def _join_aliases(model: nn.Module, graph: fx.Graph, placeholder_of: dict[str, str]) -> dict[str, str]:
    """One placeholder for a tensor that goes by several names, as tied weights do."""
    nodes = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    for name, first in aliases(model).items():
        if name != first and name in placeholder_of and first in placeholder_of:
            alias = nodes[placeholder_of.pop(name)]
            alias.replace_all_uses_with(nodes[placeholder_of[first]])
            graph.erase_node(alias)
    return placeholder_of


def _keep_first_output(graph: fx.Graph, user_outputs: Sequence[Any]) -> None:
    (output,) = (node for node in graph.nodes if node.op == "output")
    by_name = {node.name: node for node in output.args[0] if isinstance(node, fx.Node)}
    if not user_outputs or user_outputs[0] not in by_name:
        raise UnsupportedModelError("the model's first output is not a tensor")
    output.args = ((by_name[user_outputs[0]],),)
    graph.eliminate_dead_code()


@contextlib.contextmanager
def _watched(model: nn.Module, entered: list[str]) -> Iterator[None]:
    """Keeps `entered` the stack of layers whose forward is running; where it fails, the failing one stays on top."""
    names = {module: name for name, module in model.named_modules()}

    def before(module: nn.Module, args: Any) -> None:
        entered.append(_called(names.get(module, ""), module))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        entered.pop()

    handles = (
        module_hooks.register_module_forward_pre_hook(before),
        module_hooks.register_module_forward_hook(after),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the graph and the log lines that torch.export prints before it raises: its error says the same."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _refuse(node: fx.Node) -> None:
    """Raise for an operator that has no place in a training step of independent examples."""
    if node.op != "call_function":
        return
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        if "grad_enabled" in str(node.target):
            raise UnsupportedModelError(
                f"{layer_of(node)}: torch.no_grad() inside forward is not captured; call .detach() on its result"
            )
        raise UnsupportedModelError(
            f"{layer_of(node)}: {node.target} is control flow, which a training graph cannot hold; use torch.where"
        )
    if _depends_on_data(node.meta.get("val")):
        raise UnsupportedModelError(
            f"{layer_of(node)}: {node.target} gives a number or a shape that depends on the data. A training graph has "
            "fixed shapes and no control flow: use torch.where, or multiply by a mask."
        )
    given = _given(node)
    if node.target is aten.batch_norm.default and given["training"]:
        raise UnsupportedModelError(
            f"{layer_of(node)}: BatchNorm in training mode mixes the examples of a batch, so no example has a gradient "
            "of its own to clip. Use GroupNorm or LayerNorm, or call .eval() on it to keep its statistics fixed."
        )
    if node.target is aten.instance_norm.default and given["running_mean"] is not None:
        raise UnsupportedModelError(f"{layer_of(node)}: running statistics mix examples; use track_running_stats=False")
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and node.target not in REWRITES:
        training = given.get("train", given.get("training", True))
        share = given.get("dropout_p", given.get("dropout", given.get("p")))
        if training and share != 0:
            remedy = "Random numbers have to be an input of the model."
            if share is not None:
                remedy = f"Its p is {share}: set it to 0, or call .eval() on the layer."
            elif "training" in given:
                remedy = "Call .eval() on the layer."
            raise UnsupportedModelError(
                f"{layer_of(node)}: {node.target} would need randomness inside the graph. {remedy}"
            )


def _given(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator by name, defaults included."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {}
    found = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    found.update({a.name: value for a, value in zip(schema.arguments, node.args, strict=False)})
    found.update(node.kwargs)
    return found


def _depends_on_data(value: Any) -> bool:
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return True
    if isinstance(value, Tensor):
        return any(isinstance(size, torch.SymInt) for size in value.shape)
    return isinstance(value, tuple | list) and any(_depends_on_data(v) for v in value)
