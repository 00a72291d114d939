"""Randomly drawn architectures: whatever the layers, their options and their order, the step equals the oracle.

A drawn model is a tuple of plain values (`Plan`), so that hypothesis can make a failing one smaller and print it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")
pytest.importorskip("executorch")

from hypothesis import assume, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from oracle import (  # noqa: E402
    Expected,
    assert_device_step,
    assert_example_step,
    draw_batch,
    expected,
    onnx_of,
    run_executorch,
    run_fx,
    run_onnx,
)
from torch import Tensor, nn  # noqa: E402

from export.graph import TrainingSpec, Unit, capture  # noqa: E402

FX_EXAMPLES = 25 if settings.default.max_examples <= 100 else settings.default.max_examples
"""A capture takes about a second; the profile "explore" draws as many as it says."""
RUN_TIME_EXAMPLES = max(4, FX_EXAMPLES // 8)

Shape = tuple[int, ...]
Layer = tuple[Any, ...]
"""A kind and its options."""


@dataclass(frozen=True)
class Plan:
    """A model and how it is trained.

    shape: of one example; channels first for images (3 axes), steps first for sequences (2 axes).
    tokens: whether the input is (steps,) integers that an embedding makes a sequence of.
    """

    shape: Shape
    tokens: bool
    layers: tuple[Layer, ...]
    loss: str
    unit: Unit
    batch: int
    kept: str
    seed: int


class Lambda(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Affine(nn.Module):
    """A scale and a shift that broadcast over some of the axes."""

    def __init__(self, shape: Shape, kept: tuple[bool, ...]) -> None:
        super().__init__()
        size = tuple(n if keep else 1 for n, keep in zip(shape, kept, strict=True))
        self.scale, self.shift = nn.Parameter(torch.rand(size) + 0.5), nn.Parameter(torch.randn(size) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module], *args: Any, **options: Any) -> None:
        super().__init__()
        self.inner = kind(*args, batch_first=options.pop("batch_first"), **options)

    def forward(self, x: Tensor) -> Tensor:
        if self.inner.batch_first:
            return self.inner(x)[0]
        return self.inner(x.transpose(0, 1))[0].transpose(0, 1)


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, batch_first: bool, causal: bool, bias: bool) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(width, heads, bias=bias, batch_first=batch_first)
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.full((x.shape[1], x.shape[1]), -math.inf).triu(1) if self.causal else None
        h = x if self.inner.batch_first else x.transpose(0, 1)
        y, _ = self.inner(h, h, h, attn_mask=mask, need_weights=False)
        return y if self.inner.batch_first else y.transpose(0, 1)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU, "relu in place": lambda: nn.ReLU(inplace=True), "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh,
    "elu": nn.ELU, "leaky": lambda: nn.LeakyReLU(0.1), "softmax": lambda: nn.Softmax(-1), "hardswish": nn.Hardswish,
    "softplus": nn.Softplus, "relu6": nn.ReLU6,
}  # fmt: skip

RECURRENT = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN}


def build(layer: Layer, shape: Shape) -> nn.Module:
    """The module that a layer's plain values stand for, on examples of this shape."""
    kind, *options = layer
    match kind:
        case "activation":
            return ACTIVATIONS[options[0]]()
        case "affine":
            return Affine(shape, options[0])
        case "residual":
            return Residual(nn.Sequential(*(build(inner, shape) for inner in options[0])))
        case "linear":
            return nn.Linear(shape[-1], options[0], bias=options[1])
        case "twice":
            inner = nn.Linear(shape[-1], shape[-1])
            return nn.Sequential(inner, nn.Tanh(), inner)
        case "weight norm":
            return nn.utils.parametrizations.weight_norm(nn.Linear(shape[-1], options[0]))
        case "layer norm":
            return nn.LayerNorm(shape[-options[0] :], elementwise_affine=options[1])
        case "rms norm":
            return nn.RMSNorm(shape[-1])
        case "group norm":
            return nn.GroupNorm(options[0], shape[0], affine=options[1])
        case "instance norm":
            return nn.InstanceNorm2d(shape[0], affine=options[0])
        case "conv":
            out, kernel, stride, padding, dilation, groups, bias = options
            return nn.Conv2d(shape[0], out, kernel, stride, padding, dilation, groups, bias)
        case "conv1d":  # over the steps
            out, kernel, stride, padding, dilation, groups, bias = options
            conv = nn.Conv1d(shape[1], out, kernel, stride, padding, dilation, groups, bias)
            return nn.Sequential(Lambda(lambda x: x.transpose(1, 2)), conv, Lambda(lambda x: x.transpose(1, 2)))
        case "max pool":
            return nn.MaxPool2d(*options)
        case "average pool":
            return nn.AvgPool2d(*options)
        case "attention":
            return SelfAttention(shape[1], *options)
        case "recurrent":
            name, width, both, first, bias = options
            return Recurrent(RECURRENT[name], shape[1], width, bidirectional=both, batch_first=first, bias=bias)
        case "to vector":
            return {"flatten": nn.Flatten(), "mean": Lambda(lambda x: x.flatten(2).mean(2))}[options[0]]
        case "to sequence":
            return Lambda(lambda x: x.flatten(2).transpose(1, 2))
    raise AssertionError(kind)


def shape_after(module: nn.Module, shape: Shape) -> Shape:
    with torch.no_grad():
        return tuple(module(torch.zeros(2, *shape)).shape[1:])


def model_of(plan: Plan) -> nn.Module:
    torch.manual_seed(plan.seed)
    width = plan.shape[-1]
    layers: list[nn.Module] = [nn.Embedding(7, width)] if plan.tokens else []
    shape = plan.shape
    for layer in plan.layers:
        layers.append(build(layer, shape))
        shape = shape_after(layers[-1], shape)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(math.prod(shape), 3))


def divisors(n: int) -> st.SearchStrategy[int]:
    return st.sampled_from([d for d in range(1, n + 1) if n % d == 0])


@st.composite
def convolutions(draw: st.DrawFn, channels: int, sizes: Shape) -> Layer:
    """A layer's options; the image stays at least 1 in each direction."""
    groups = draw(divisors(channels))
    out = groups * draw(st.integers(1, 2))
    options: list[tuple[int, ...]] = []
    for size in sizes:
        padding = draw(st.integers(0, 2))
        kernel = draw(st.integers(1, min(4, size + 2 * padding)))
        dilation = draw(st.integers(1, 2)) if (kernel - 1) * 2 < size + 2 * padding else 1
        options.append((kernel, draw(st.integers(1, 3)), padding, dilation))
    kernel, stride, padding, dilation = (tuple(axis) for axis in zip(*options, strict=True))
    return out, kernel, stride, padding, dilation, groups, draw(st.booleans())


@st.composite
def pools(draw: st.DrawFn, sizes: Shape, dilates: bool) -> Layer:
    options: list[tuple[int, ...]] = []
    for size in sizes:
        kernel = draw(st.integers(1, min(3, size)))
        dilation = draw(st.integers(1, 2)) if dilates and (kernel - 1) * 2 < size else 1
        options.append((kernel, draw(st.integers(1, 3)), draw(st.integers(0, kernel // 2)), dilation))
    kernel, stride, padding, dilation = (tuple(axis) for axis in zip(*options, strict=True))
    return (kernel, stride, padding, dilation) if dilates else (kernel, stride, padding)


@st.composite
def layers(draw: st.DrawFn, shape: Shape, keeps_shape: bool = False) -> Layer:
    """One layer that takes examples of this shape."""
    names = ["activation", "affine", "layer norm"]
    if len(shape) == 3:
        names += ["group norm", "instance norm"]
    else:
        names += ["rms norm", "twice"]
    if len(shape) == 2:
        names += ["attention"]
    if not keeps_shape:
        more = {1: ["linear", "weight norm"], 2: ["linear", "conv1d", "recurrent", "to vector"], 3: []}
        names += ["residual", *more[len(shape)]]
        if len(shape) == 3:
            names += ["conv", "conv", "max pool", "average pool", "to vector", "to sequence"]
    name = draw(st.sampled_from(names))
    flag = st.booleans()
    match name:
        case "activation":
            return name, draw(st.sampled_from(sorted(ACTIVATIONS)))
        case "affine":
            return name, tuple(draw(flag) for _ in shape)
        case "layer norm":
            return name, draw(st.integers(1, len(shape))), draw(flag)
        case "group norm":
            return name, draw(divisors(shape[0])), draw(flag)
        case "instance norm":
            return name, draw(flag)
        case "linear":
            return name, draw(st.integers(1, 6)), draw(flag)
        case "weight norm":
            return name, draw(st.integers(1, 6))
        case "attention":
            return name, draw(divisors(shape[1])), draw(flag), draw(flag), draw(flag)
        case "recurrent":
            kind = draw(st.sampled_from(sorted(RECURRENT)))
            return name, kind, draw(st.integers(1, 4)), draw(flag), draw(flag), draw(flag)
        case "residual":
            return name, tuple(draw(layers(shape, keeps_shape=True)) for _ in range(draw(st.integers(1, 2))))
        case "conv1d":
            return name, *draw(convolutions(shape[1], shape[:1]))
        case "conv":
            return name, *draw(convolutions(shape[0], shape[1:]))
        case "max pool" | "average pool":
            return name, *draw(pools(shape[1:], name == "max pool"))
        case "to vector":
            return name, draw(st.sampled_from(["flatten", "mean"]))
    return (name,)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Images up to 3 x 8 x 8, sequences up to 6 x 6, vectors up to 8; up to five layers."""
    rank = draw(st.integers(1, 3))
    bounds = {1: [(2, 8)], 2: [(1, 6), (2, 6)], 3: [(1, 3), (2, 8), (2, 8)]}[rank]
    shape = tuple(draw(st.integers(low, high)) for low, high in bounds)
    tokens = rank == 2 and draw(st.booleans())
    chosen: list[Layer] = []
    now = shape
    for _ in range(draw(st.integers(1, 5))):
        layer = draw(layers(now))
        after = shape_after(build(layer, now), now)
        if math.prod(after) > 400:
            break
        chosen.append(layer)
        now = after
    return Plan(
        shape,
        tokens,
        tuple(chosen),
        draw(st.sampled_from(["cross_entropy", "binary_cross_entropy", "mse"])),
        draw(st.sampled_from(["example", "example", "device"])),
        draw(st.integers(1, 5)),
        draw(st.sampled_from(["", "local", "frozen"])),
        draw(st.integers(0, 99)),
    )


def well_conditioned(exact: Expected, plain: Expected) -> bool:
    """Whether PyTorch itself gets these gradients right in float32.

    A normalisation of what another one made constant divides rounding errors by rounding errors, for instance.
    """
    everything = float(torch.stack([g.norm() for g in exact.gradients.values()]).norm())
    for name, g in exact.gradients.items():
        error = float((plain.gradients[name].double() - g).norm())
        if error > 1e-5 * float(g.norm()) and error > 1e-7 * everything:
            return False
    return torch.allclose(plain.norms.double(), exact.norms, rtol=1e-5, atol=0.0)


def assert_step_equals_the_oracle(plan: Plan, run_times: bool) -> None:
    model = model_of(plan)
    x = torch.zeros(plan.shape[0], dtype=torch.long) if plan.tokens else torch.zeros(plan.shape)
    y = torch.zeros((), dtype=torch.long) if plan.loss == "cross_entropy" else torch.zeros(3)
    last = str(len(model) - 1)
    roles = {plan.kept: (f"{last}.bias",)} if plan.kept else {}
    spec = TrainingSpec(model, plan.loss, [x], y, **roles)
    step = capture(spec, plan.unit, plan.batch)
    batch = draw_batch(spec, step, plan.batch, plan.seed)
    exact, plain = (expected(spec, step, batch.inputs, batch.labels, dtype) for dtype in (torch.float64, torch.float32))
    assume(well_conditioned(exact, plain))
    runners = [run_onnx(onnx_of(step)), run_executorch(step)] if run_times else [run_fx(step)]
    for run in runners:
        (assert_example_step if plan.unit == "example" else assert_device_step)(spec, step, batch, run)


@settings(max_examples=FX_EXAMPLES)
@given(plan=plans())
def test_any_drawn_model_equals_a_loop_over_the_examples(plan: Plan) -> None:
    assert_step_equals_the_oracle(plan, run_times=False)


@settings(max_examples=RUN_TIME_EXAMPLES)
@given(plan=plans())
def test_any_drawn_model_is_the_same_in_onnx_runtime_and_in_executorch(plan: Plan) -> None:
    assert_step_equals_the_oracle(plan, run_times=True)
