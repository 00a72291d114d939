"""A PyTorch model and a loss become one training step as an ordinary inference graph (docs/training-graph.md).

`capture` exports the forward pass, finds every use of every trainable parameter (`layers.recorder`), finds where the
examples lie (`layers.probe`), and traces forward, one batch backward pass, per-example norms, clipping and the weighted
sums into one graph of plain operators. ONNX and ExecuTorch are made from that graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.func import grad, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.parameter import is_lazy

import export.layers.activations
import export.layers.convolution
import export.layers.linear
import export.layers.normalization
import export.layers.pooling
import export.layers.resampling
import export.layers.sequence  # noqa: F401  (the handlers register themselves)
from export.decompositions import DECOMPOSITIONS, simplify
from export.errors import UnsupportedModelError, first_line, place_of
from export.forward import aliases, capture_forward, check_inputs, check_repeats, copy_of
from export.layers.probe import Draws, probe
from export.layers.recorder import (
    INJECTIVE_VIEWS,
    Layout,
    NotPerExampleError,
    Recorder,
    Recording,
    Tap,
    aten,
    call_target,
    layer_of,
)
from export.layers.uses import Dense, Use, guard, merge, to_dense
from export.losses import Loss, resolve_loss

Unit = Literal["device", "example"]
Role = Literal["shared", "local", "frozen", "buffer"]
_DTYPES = (torch.float32, torch.int64, torch.int32)
_PRODUCTS = {
    aten.linear.default: 1, aten.matmul.default: 1, aten.mm.default: 1, aten.addmm.default: 2,
    aten.conv1d.default: 1, aten.conv2d.default: 1, aten.conv1d.padding: 1, aten.conv2d.padding: 1,
}  # fmt: skip
"""Products, and which argument is the weight."""
NOT_USED = "not used: its gradient is zero"
"""The reason in the report of a parameter that the loss does not depend on."""
_LARGEST = 3.0e38  # below float32's largest: what is above it, or NaN, does not count


@dataclass(frozen=True)
class TrainingSpec:
    """What a user's function returns.

    model: in the mode (train or eval) that training is to see.  loss: a name ("cross_entropy",
    "binary_cross_entropy", "mse") or a callable (output, y) -> (B,) losses, one for each example.
    inputs: one example input tensor each, without the batch axis (values do not matter, shape and dtype do).
    label: likewise one label.  local, frozen: names or prefixes of parameters that stay on the device, or do not train.
    """

    model: nn.Module
    loss: str | Callable[[Tensor, Tensor], Tensor]
    inputs: Sequence[Tensor]
    label: Tensor
    local: Sequence[str] = ()
    frozen: Sequence[str] = ()
    name: str = "model"
    vocabulary: int | None = None
    """For integer inputs: they lie in [0, vocabulary). Found from the embedding if not given."""


@dataclass(frozen=True)
class Parameter:
    """One tensor of the model: its fully qualified name, its role and its first value."""

    name: str
    role: Role
    value: Tensor


@dataclass(frozen=True)
class LayerReport:
    """How one parameter's per-example gradients are had: a "fast" rule or the "fallback", and why."""

    parameter: str
    path: Literal["fast", "fallback"]
    reason: str


@dataclass(frozen=True)
class CapturedStep:
    """The training step and the predict graph as fx graphs of plain operators, with names for inputs and outputs."""

    train: fx.GraphModule
    predict: fx.GraphModule
    parameters: tuple[Parameter, ...]
    train_inputs: tuple[str, ...]
    train_outputs: tuple[str, ...]
    train_example: tuple[Tensor, ...] = field(repr=False)
    recorder: Recorder = field(repr=False)
    """The forward pass that was captured."""
    loss: Loss
    predict_inputs: tuple[str, ...] = ()
    predict_example: tuple[Tensor, ...] = field(repr=False, default=())
    report: tuple[LayerReport, ...] = ()
    vocabulary: int | None = None
    """Integer inputs lie below it."""


def capture(spec: TrainingSpec, unit: Unit, batch: int, proximal: bool = False) -> CapturedStep:
    """One training step of `spec` at a fixed batch size.

    Raises UnsupportedModelError, naming the layer and a remedy, for a model that cannot be clipped per example.
    """
    if batch < 1:
        raise UnsupportedModelError(f"a batch of {batch}")
    builder = _Builder(spec, unit, batch, proximal)
    return builder.build()


class _Builder:
    def __init__(self, spec: TrainingSpec, unit: Unit, batch: int, proximal: bool) -> None:
        self.spec, self.unit, self.batch, self.proximal = spec, unit, batch, proximal
        self.loss: Loss = resolve_loss(spec.loss)
        _check_spec(spec)
        self.vocabulary = spec.vocabulary or _smallest_table(spec.model)
        self.inputs = [x.detach().unsqueeze(0).expand(batch, *x.shape).contiguous() for x in spec.inputs]
        self.label = spec.label.detach().unsqueeze(0).expand(batch, *spec.label.shape).contiguous()
        for tensor in self.inputs:
            if tensor.dtype not in _DTYPES:
                raise UnsupportedModelError(f"an input of {tensor.dtype}: use float32, int64 or int32")
        if self.label.dtype not in _DTYPES:
            raise UnsupportedModelError(f"a label of {self.label.dtype}: use float32, int64 or int32")
        self.parameters = _parameters(spec)
        self.trainable = [p for p in self.parameters if p.role in ("shared", "local")]
        if not any(p.role == "shared" for p in self.trainable):
            raise UnsupportedModelError(
                "no parameter is shared, for all are frozen (by requires_grad, or by the spec's `frozen`) or local: "
                "there is nothing to aggregate"
            )
        check_inputs(spec.model, self.inputs)
        check_repeats(spec.model, self.inputs)
        self.forward = forward = capture_forward(spec.model, self.inputs)
        self.placeholder_of, self.constants = forward.placeholder_of, forward.constants
        self.example_nodes = list(forward.examples)
        trained = [self.placeholder_of[p.name] for p in self.trainable if p.name in self.placeholder_of]
        self.recorder = Recorder(forward.graph, trained, self.example_nodes)
        if not self.recorder.output_depends:
            raise UnsupportedModelError("the model's output does not depend on its inputs")
        # The fallback differentiates the same graph for one example: every rewriting holds there too.
        one = capture_forward(spec.model, [x[:1] for x in self.inputs])
        self.single = Recorder(one.graph, (), self.example_nodes)
        self.layouts = self._probe()

    def _probe(self) -> tuple[Layout | None, ...]:
        generator = torch.Generator().manual_seed(0)  # probing only: nothing secret, the same at every build

        def floats(like: Tensor) -> Tensor:
            return torch.randn(like.shape, generator=generator, dtype=like.dtype)

        def pair(like: Tensor, high: int, draw: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
            if like.is_floating_point():
                return draw(like), draw(like)
            first = torch.randint(0, high, like.shape, generator=generator, dtype=like.dtype)
            step = torch.randint(1, max(high, 2), like.shape, generator=generator, dtype=like.dtype)
            return first, (first + step) % high  # another value everywhere: every change shows

        values = {
            self.placeholder_of[p.name]: p.value + 0.05 * floats(p.value) if p.role != "buffer" else p.value
            for p in self.parameters
            if p.name in self.placeholder_of
        }
        values.update(self.constants)

        def draws(draw: Callable[[Tensor], Tensor]) -> tuple[Draws, Recording]:
            pairs = [pair(x, self.vocabulary or 2, draw) for x in self.inputs]
            first = dict(zip(self.example_nodes, (one for one, _ in pairs), strict=True))
            second = dict(zip(self.example_nodes, (two for _, two in pairs), strict=True))
            base = self._first_run({**values, **first})
            classes = base.first_output.shape[-1] if base.first_output.dim() > self.label.dim() else 2
            labels = pair(self.label, classes, lambda y: torch.rand(y.shape, generator=generator))
            return Draws(first, second, *labels), base

        found, base = draws(floats)
        if self._losses(base.first_output, found.first_labels).isnan().any():
            # A logarithm or a root may want positive inputs.
            found, base = draws(lambda x: 0.01 + torch.rand(x.shape, generator=generator))
            if self._losses(base.first_output, found.first_labels).isnan().any():
                where = next((layer_of(n) for n in self.recorder.graph.nodes if _has_nan(base, n.name)), "the loss")
                raise UnsupportedModelError(
                    f"{where}: NaN for random inputs, normal or in (0, 1), so it cannot be seen whether examples mix. "
                    "Keep logarithms, roots and divisions away from their poles."
                )
        layouts = probe(self.recorder, values, found, self._losses, self.batch).layouts
        # Once more with large inputs: a branch that small ones do not take may mix what they do not.
        first, second = (
            {n: x * 30 if x.is_floating_point() else x for n, x in drawn.items()}
            for drawn in (found.first, found.second)
        )
        large = Draws(first, second, found.first_labels, found.second_labels)
        probe(self.recorder, values, large, self._losses, self.batch)
        self._check_alone(values, found.first, base)
        return layouts

    def _first_run(self, values: Mapping[str, Tensor]) -> Recording:
        try:
            return self.recorder.run(values)
        except UnsupportedModelError:
            raise
        except Exception as error:  # an operator may raise anything for values that it does not take
            integers = any(not x.is_floating_point() for x in self.inputs)
            drawn = f"integers in [0, {self.vocabulary or 2})" if integers else "normal numbers"
            remedy = "the spec's `vocabulary` says below what they lie" if integers else "a model has to take them"
            raise UnsupportedModelError(
                f"the model fails on random inputs, {drawn}: {first_line(error)}; {remedy}"
            ) from error

    def _check_alone(self, values: Mapping[str, Tensor], inputs: Mapping[str, Tensor], base: Recording) -> None:
        """The graph for one example must say the same as the graph for a batch: the fallback differentiates it."""
        for i in (0, self.batch - 1):
            one = {name: x[i : i + 1] for name, x in inputs.items()}
            alone = self.single.run({**values, **one}).first_output.detach()
            among = base.first_output[i : i + 1].detach()
            if alone.shape != among.shape or not torch.allclose(
                alone, among, rtol=1e-3, atol=1e-3 * float(among.abs().nan_to_num(0, 0, 0).max()), equal_nan=True
            ):
                raise UnsupportedModelError(
                    "the model's output for an example alone is not the one for the same example in a batch: the "
                    "batch must be the first axis of the output, and no parameter may have an axis of the batch's size"
                )

    def _losses(self, output: Tensor, label: Tensor) -> Tensor:
        if output.shape[:1] != (self.batch,):
            raise UnsupportedModelError(
                f"the model's output is {tuple(output.shape)} for a batch of {self.batch}: the batch must be its first "
                "axis, as it is the inputs' (a recurrent layer or attention: batch_first=True)"
            )
        try:
            losses = self.loss.per_example(output, label)
        except UnsupportedModelError:
            raise
        except Exception as error:  # the user's code may raise anything
            raise UnsupportedModelError(
                f"the loss ({self.loss.name}) fails for an output of {tuple(output.shape)} {output.dtype} and labels "
                f"of {tuple(label.shape)} {label.dtype}: {first_line(error)}{place_of(error)}. It is called with "
                "(output, y) of a batch and must give one float for each example."
            ) from error
        if not isinstance(losses, Tensor) or losses.shape != (self.batch,) or not losses.is_floating_point():
            given = f"{tuple(losses.shape)} {losses.dtype}" if isinstance(losses, Tensor) else type(losses).__name__
            raise UnsupportedModelError(
                f"the loss gives {given} for a batch of {self.batch}: it must give one float for each example; do not "
                "reduce over the batch (PyTorch's losses: reduction='none')"
            )
        return losses

    def build(self) -> CapturedStep:
        names = [p.name for p in self.parameters]
        count = len(self.inputs)
        input_names = ["x"] if count == 1 else [f"x{i}" for i in range(count)]
        values = [p.value for p in self.parameters]
        if self.unit == "example":
            # Tensors of their own: the tracer would take one that comes twice for one input.
            extra_names, extra = ["clip", "loss_bound"], [torch.ones(()), torch.ones(())]
        else:
            extra_names, extra = ["lr"], [torch.ones(())]
            if self.proximal:
                extra_names += ["mu", *(f"anchor.{p.name}" for p in self.trainable)]
                extra += [torch.ones(()), *(p.value.clone() for p in self.trainable)]
        example = (*values, *self.inputs, self.label, torch.ones(self.batch), *extra)
        output_names: list[str] = []
        report: list[LayerReport] = []

        def step(*flat: Tensor) -> tuple[Tensor, ...]:
            parameters = dict(zip(names, flat[: len(names)], strict=True))
            rest = flat[len(names) :]
            inputs, label, mask, scalars = rest[:count], rest[count], rest[count + 1], rest[count + 2 :]
            outputs = self._step(parameters, inputs, label, mask, scalars, report)
            output_names[:] = outputs.keys()
            return tuple(outputs.values())

        train = make_fx(step, decomposition_table=DECOMPOSITIONS, tracing_mode="fake", _allow_non_fake_inputs=True)(
            *example
        )
        simplify(train)

        # The same rules as in training: what PyTorch fuses in evaluation mode has no form in either back end.
        answer = capture_forward(copy_of(self.spec.model).eval(), self.inputs, self.forward)
        recorder = Recorder(answer.graph, (), answer.examples)

        def forward(*flat: Tensor) -> Tensor:
            given = dict(zip(names, flat, strict=False))
            placed = {answer.placeholder_of[n]: v for n, v in given.items() if n in answer.placeholder_of}
            inputs = dict(zip(answer.examples, flat[len(names) :], strict=True))
            return recorder.run({**answer.constants, **placed, **inputs}).first_output

        with torch.no_grad():
            predict_example = (*values, *self.inputs)
            predict = make_fx(
                forward, decomposition_table=DECOMPOSITIONS, tracing_mode="fake", _allow_non_fake_inputs=True
            )(*predict_example)
            simplify(predict)
        return CapturedStep(
            train,
            predict,
            tuple(self.parameters),
            (*names, *input_names, "y", "mask", *extra_names),
            tuple(output_names),
            example,
            self.recorder,
            self.loss,
            (*names, *input_names),
            predict_example,
            tuple(dict.fromkeys(report)),
            self.vocabulary,
        )

    def _step(
        self,
        parameters: Mapping[str, Tensor],
        inputs: Sequence[Tensor],
        label: Tensor,
        mask: Tensor,
        scalars: Sequence[Tensor],
        report: list[LayerReport],
    ) -> dict[str, Tensor]:
        values = {self.placeholder_of[n]: v for n, v in parameters.items() if n in self.placeholder_of}
        values.update(self.constants)
        values.update(zip(self.example_nodes, inputs, strict=True))
        with torch.enable_grad():
            recording = self.recorder.run(values)
            output = recording.first_output
            losses = self._losses(output, label)
            uses = self._uses(recording, losses, values, report)
        losses = losses.detach()
        for p in self.trainable:
            if p.name not in uses:
                uses[p.name] = self._fallback(p.name, parameters, inputs, label, recording, report)
        shared = [p for p in self.trainable if p.role == "shared"]
        gradients: dict[str, Tensor]
        # The loss alone does not tell: a rectifier or a pool swallows a NaN that its gradient still has.
        clipping = self.unit == "example"
        squared = torch.stack([uses[p.name].squared_norms() for p in shared]).sum(0) if clipping else losses.abs()
        finite = [uses[p.name].bounds() for p in self.trainable if not (clipping and p.role == "shared")]
        # Nor does every gradient: frozen layers may swallow it first (a run time's exp of NaN may be 0).
        finite += [
            (x - x).reshape(self.batch, -1).sum(1)
            for node, x in zip(self.example_nodes, inputs, strict=True)
            if x.is_floating_point() and not self._enters_a_trained_product(node)
        ]
        counted = (mask > 0) & (torch.stack([squared, losses.abs(), *finite]).sum(0) <= _LARGEST)
        if clipping:
            clip, loss_bound = scalars
            losses = torch.minimum(losses.clamp(min=0.0), loss_bound)  # the loss metric's sensitivity
            norms = squared.clamp(min=0.0).sqrt()  # never below zero but for a run time's own ways of adding
            weights = torch.where(counted, clip / torch.maximum(norms, clip), torch.zeros(()))
            plain = counted.to(losses.dtype)
            gradients = {
                f"{'grad' if p.role == 'shared' else 'local_grad'}.{p.name}": uses[p.name].weighted_sum(
                    weights if p.role == "shared" else plain, counted
                )
                for p in self.trainable
            }
            clipped = (plain * (norms > clip).to(losses.dtype)).sum()
        else:
            plain = counted.to(losses.dtype)
            weights = plain / plain.sum().clamp(min=1.0)
            clipped = torch.zeros(())
            gradients = {}
            for p in self.trainable:
                g = uses[p.name].weighted_sum(weights, counted)
                if self.proximal:
                    anchor = scalars[2 + [q.name for q in self.trainable].index(p.name)]
                    g = g + scalars[1] * (parameters[p.name] - anchor)
                gradients[f"new.{p.name}"] = parameters[p.name] - scalars[0] * g
        total = plain.sum()
        correct = self.loss.correct(output.detach(), label)
        return {
            **gradients,
            "loss": guard(losses, counted).sum(),
            "correct": guard(correct.to(losses.dtype), counted).sum(),
            "count": total,
            "clipped": clipped,
            "invalid": (mask > 0).to(losses.dtype).sum() - total,
        }

    def _enters_a_trained_product(self, example: str) -> bool:
        """Whether an input goes only into a product with a trained weight: its NaN is in that gradient's norm then."""
        (node,) = (n for n in self.recorder.graph.nodes if n.name == example)
        while len(node.users) == 1:
            (user,) = node.users
            if user.target in INJECTIVE_VIEWS:
                node = user
                continue
            if user.target not in _PRODUCTS:
                return False
            weight = user.args[_PRODUCTS[user.target]]
            return weight is not node and bool(self.recorder.roots[weight]) and not self.recorder.depends[weight]
        return False

    def _uses(
        self, recording: Recording, losses: Tensor, values: Mapping[str, Tensor], report: list[LayerReport]
    ) -> dict[str, Use]:
        """Per parameter, all its uses as one. Parameters in the recording's fallback are left out."""
        by_name = {self.placeholder_of[p.name]: p.name for p in self.trainable if p.name in self.placeholder_of}
        for tap, layout in zip(recording.taps, self.layouts, strict=True):
            if layout is None:
                for root in self.recorder.roots[tap.source]:
                    recording.fallback.setdefault(root, f"the examples' place was not found in {tap.layer}")
        taps = [
            (tap, layout)
            for tap, layout in zip(recording.taps, self.layouts, strict=True)
            if layout is not None and not self.recorder.roots[tap.source] & recording.fallback.keys()
        ]
        outputs = list({id(tap.output): tap.output for tap, _ in taps}.values())
        found = torch.autograd.grad(losses.sum(), outputs, allow_unused=True) if outputs else ()
        gradient_of = {id(o): torch.zeros_like(o) if g is None else g for o, g in zip(outputs, found, strict=True)}
        gathered: dict[str, list[tuple[Tap, Use]]] = {}
        for tap, layout in taps:
            (root,) = self.recorder.roots[tap.source]
            try:
                use = tap.build(layout, gradient_of[id(tap.output)].detach(), tap.inputs)
            except NotPerExampleError:
                recording.fallback[root] = f"the examples' place in {tap.layer}"
                continue
            gathered.setdefault(root, []).append((tap, use))
        uses: dict[str, Use] = {}
        for root, pairs in gathered.items():
            if root in recording.fallback:
                continue
            name = by_name[root]
            sources = {tap.source for tap, _ in pairs}
            if len(sources) == 1:
                (source,) = sources
                merged = merge([use for _, use in pairs])
                if source.op != "placeholder":
                    merged = self._through_views(to_dense(merged), source, values[root])
            else:
                # Views of one parameter may overlap, so the norm is only known on the parameter itself.
                parts = [self._through_views(to_dense(use), tap.source, values[root]) for tap, use in pairs]
                merged = merge(list(parts))
            uses[name] = merged
            kinds = sorted({type(use).__name__.lower() for _, use in pairs})
            report.append(LayerReport(name, "fast", f"{'+'.join(kinds)}, {len(pairs)} use{'s' * (len(pairs) > 1)}"))
        for p in self.trainable:
            placeholder = self.placeholder_of.get(p.name)
            if placeholder not in gathered and placeholder not in recording.fallback:
                zero = torch.zeros((self.batch, *p.value.shape))
                uses[p.name] = Dense(zero)
                report.append(LayerReport(p.name, "fast", NOT_USED))
        return uses

    def _through_views(self, use: Dense, source: fx.Node, parameter: Tensor) -> Dense:
        """A gradient with respect to a view of a parameter, as one with respect to the parameter."""
        chain = [source]
        while chain[-1].op == "call_function":
            chain.append(chain[-1].all_input_nodes[0])
        chain.reverse()

        def view(value: Tensor) -> Any:
            env: dict[fx.Node, Any] = {chain[0]: value}
            for node in chain[1:]:
                args = fx.map_arg(node.args, lambda n: env[n])
                env[node] = call_target(node, *args, **node.kwargs)
            return env[source]

        pull: Any = vjp(view, parameter)[1]
        return Dense(vmap(lambda g: pull(g)[0])(use.g))

    def _fallback(
        self,
        name: str,
        parameters: Mapping[str, Tensor],
        inputs: Sequence[Tensor],
        label: Tensor,
        recording: Recording,
        report: list[LayerReport],
    ) -> Use:
        """Exact for whatever PyTorch can differentiate: one gradient for each example."""
        values = {self.placeholder_of[n]: v for n, v in parameters.items() if n in self.placeholder_of}
        values.update(self.constants)

        def single(value: Tensor, xs: tuple[Tensor, ...], y: Tensor) -> Tensor:
            examples = {node: x[None] for node, x in zip(self.example_nodes, xs, strict=True)}
            output = self.single.run({**values, self.placeholder_of[name]: value, **examples}).first_output
            return self.loss.per_example(output, y[None])[0]

        reason = recording.fallback.get(self.placeholder_of[name], "")
        report.append(LayerReport(name, "fallback", reason))
        g = vmap(grad(single), in_dims=(None, 0, 0))(parameters[name], tuple(inputs), label)
        return Dense(g.detach())


def _check_spec(spec: TrainingSpec) -> None:
    """What a type checker would have said, for those who use none."""
    model: object = spec.model
    if not isinstance(model, nn.Module):
        given = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise UnsupportedModelError(f"model is {given}: give an instance of torch.nn.Module")
    inputs: object = spec.inputs
    if isinstance(inputs, Tensor):
        raise UnsupportedModelError("inputs is one tensor: give a list, with one for each argument of forward")
    for what, example in (*(("an input", x) for x in spec.inputs), ("a label", spec.label)):
        if not isinstance(example, Tensor):
            raise UnsupportedModelError(f"{what} that is {type(example).__name__}: give it as a tensor")
    for field_name, patterns in (("local", spec.local), ("frozen", spec.frozen)):
        names: object = patterns
        if isinstance(names, str) or not all(isinstance(name, str) for name in patterns):
            raise UnsupportedModelError(
                f"{field_name} is {names!r}: give a list of names of parameters, or of layers, as strings"
            )
    below: object = spec.vocabulary
    if below is not None and not (type(below) is int and below >= 1):
        raise UnsupportedModelError(
            f"vocabulary is {below!r}: integer inputs lie in [0, vocabulary), so a number from 1"
        )
    for name, value in (*spec.model.named_parameters(), *spec.model.named_buffers()):
        if is_lazy(value):
            raise UnsupportedModelError(
                f"{name} has no shape yet, for its layer is a lazy one: run the model once on a batch, or give the "
                "layer its size"
            )
        if value.device.type != "cpu":
            raise UnsupportedModelError(f"{name} is on {value.device}: move the model to the CPU, model.cpu()")


def _parameters(spec: TrainingSpec) -> list[Parameter]:
    def matches(name: str, patterns: Sequence[str]) -> bool:
        return any(name == p or name.startswith(p.rstrip(".") + ".") for p in patterns)

    found: list[Parameter] = []
    for name, value in spec.model.named_parameters():
        if value.dtype != torch.float32:
            raise UnsupportedModelError(f"parameter {name} is {value.dtype}: only float32 can be trained")
        frozen = not value.requires_grad or matches(name, spec.frozen)
        role: Role = "frozen" if frozen else "local" if matches(name, spec.local) else "shared"
        found.append(Parameter(name, role, value.detach().clone()))
    kept = spec.model.state_dict(keep_vars=True).keys()
    for name, buffer in spec.model.named_buffers():
        if name in kept:
            found.append(Parameter(name, "buffer", buffer.detach().clone()))
    for p in found:
        if not p.value.isfinite().all():
            remedy = ", or register it with persistent=False, as a constant" if p.role == "buffer" else ""
            raise UnsupportedModelError(
                f"{p.name} holds NaN or infinity before any training: initialise it with finite values{remedy}"
            )
    names = aliases(spec.model)
    known = [p.name for p in found] + [name for name, first in names.items() if name != first]
    for name, first in names.items():
        for patterns in (spec.local, spec.frozen):
            if matches(name, patterns) and not matches(first, patterns):
                raise UnsupportedModelError(f"{name!r} is the same tensor as {first!r}: name both, or neither")
    for pattern in (*spec.local, *spec.frozen):
        if not any(matches(name, [pattern]) for name in known):
            raise UnsupportedModelError(
                f"{pattern!r} is no parameter or layer of the model; give a whole name or a layer's, of "
                f"{', '.join(known)}"
            )
    return found


def _has_nan(recording: Recording, name: str) -> bool:
    return name in recording.values and bool(recording.values[name].isnan().any())


def _smallest_table(model: nn.Module) -> int | None:
    sizes = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    return min(sizes, default=None)
