"""ExecuTorch programs against the captured graphs in PyTorch, and the rewriting that makes them fast, rule by rule."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("executorch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from oracle import TOLERANCE, Batch, draw_batch, load_executorch  # noqa: E402
from torch import Tensor, fx, nn  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402
from torch.nn import functional  # noqa: E402

from export.errors import UnsupportedModelError  # noqa: E402
from export.graph import CapturedStep, TrainingSpec, Unit, capture  # noqa: E402
from export.to_executorch import lower, to_executorch  # noqa: E402

aten = torch.ops.aten
BATCH = 6
pytestmark = pytest.mark.filterwarnings("ignore")  # torch and executorch warn about each other


class Characters(nn.Module):
    """Next character from a GRU over an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.recurrent = nn.GRU(6, 5, batch_first=True)
        self.scores = nn.Linear(5, 11)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.scores(self.recurrent(self.embedding(x))[0])
        return scores


class Transformer(nn.Module):
    """One layer: causal attention with two heads, then GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.positions = nn.Parameter(0.1 * torch.randn(5, 8))
        self.norm, self.inputs, self.outputs = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down, self.scores = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 11)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x) + self.positions
        q, k, v = self.inputs(self.norm(h)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.outputs(mixed.transpose(1, 2).flatten(2))
        scores: Tensor = self.scores(h + self.down(nn.functional.gelu(self.up(h))))
        return scores


def mlp() -> TrainingSpec:
    model = nn.Sequential(nn.Flatten(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 5))
    return TrainingSpec(model, "cross_entropy", [torch.zeros(4, 6)], torch.zeros((), dtype=torch.long))


def lenet() -> TrainingSpec:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
        nn.Flatten(), nn.Linear(54, 12), nn.Tanh(), nn.Linear(12, 5),
    )  # fmt: skip
    return TrainingSpec(model, "cross_entropy", [torch.zeros(1, 14, 14)], torch.zeros((), dtype=torch.long))


def separable() -> TrainingSpec:
    model = nn.Sequential(
        nn.Conv2d(1, 4, (5, 3), stride=2, padding=(2, 1)), nn.GroupNorm(2, 4), nn.SiLU(),
        nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.GroupNorm(1, 4), nn.ReLU6(),
        nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, stride=2, padding=2, dilation=2, groups=3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    )  # fmt: skip
    return TrainingSpec(model, "cross_entropy", [torch.zeros(1, 12, 10)], torch.zeros((), dtype=torch.long))


def characters() -> TrainingSpec:
    text = torch.zeros(4, dtype=torch.long)
    return TrainingSpec(Characters(), "cross_entropy", [text], text)


def transformer() -> TrainingSpec:
    text = torch.zeros(5, dtype=torch.long)
    return TrainingSpec(Transformer(), "cross_entropy", [text], text)


MODELS: dict[str, Callable[[], TrainingSpec]] = {
    "mlp": mlp, "lenet": lenet, "separable": separable, "characters": characters, "transformer": transformer,
}  # fmt: skip
METRICS = ("loss", "correct", "count", "clipped", "invalid")


@dataclass(frozen=True)
class Built:
    """A model's step, and its training program in ExecuTorch."""

    spec: TrainingSpec
    step: CapturedStep
    program: bytes
    run: Callable[[Sequence[Tensor]], list[Tensor]]

    def inputs(self, batch: Batch, scalar: float) -> list[Tensor]:
        parameters = [p.value for p in self.step.parameters]
        scalars = [torch.tensor(scalar)] + [torch.tensor(1.6)] * ("loss_bound" in self.step.train_inputs)
        return [*parameters, *batch.inputs, batch.labels, batch.mask, *scalars]

    def outputs(self, batch: Batch, scalar: float) -> dict[str, Tensor]:
        return dict(zip(self.step.train_outputs, self.run(self.inputs(batch, scalar)), strict=True))


@functools.cache
def built(name: str, unit: Unit = "example") -> Built:
    torch.manual_seed(0)
    spec = MODELS[name]()
    step = capture(spec, unit, BATCH)
    program = to_executorch(step.train, step.train_example)
    return Built(spec, step, program, load_executorch(program))


def assert_close(found: Tensor, wanted: Tensor, what: str) -> None:
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    distance = (found.double() - wanted.double()).norm()
    assert distance <= TOLERANCE * wanted.double().norm(), f"{what}: {distance:.2e} of {wanted.norm():.2e}"


def clip_for(model: Built, batch: Batch) -> float:
    """One that clips two examples and leaves the others, a little above the third largest norm: found by halving."""
    low, high = 0.0, 100.0
    for _ in range(40):
        middle = (low + high) / 2
        outputs = model.step.train(*model.inputs(batch, middle))
        clipped = outputs[model.step.train_outputs.index("clipped")]
        low, high = (middle, high) if clipped > 2 else (low, middle)
    return high * 1.001


@pytest.mark.parametrize("name", MODELS)
def test_clipped_sums_equal_those_of_torch(name: str) -> None:
    model = built(name)
    batch = draw_batch(model.spec, model.step, BATCH)
    clip = clip_for(model, batch)
    wanted = dict(zip(model.step.train_outputs, model.step.train(*model.inputs(batch, clip)), strict=True))
    assert 0 < wanted["clipped"] < wanted["count"] == BATCH - 1
    found = model.outputs(batch, clip)
    for key, value in wanted.items():
        assert_close(found[key], value, key)


def test_steps_of_unit_device_equal_those_of_torch() -> None:
    model = built("mlp", "device")
    batch = draw_batch(model.spec, model.step, BATCH)
    wanted = dict(zip(model.step.train_outputs, model.step.train(*model.inputs(batch, 0.5)), strict=True))
    found = model.outputs(batch, 0.5)
    before = {f"new.{p.name}": p.value for p in model.step.parameters}
    for key, value in wanted.items():
        assert_close(found[key], value, key)
        if key in before:  # the steps themselves, not only where they lead
            assert_close(found[key] - before[key], value - before[key], f"step of {key}")


@pytest.mark.parametrize("name", ["lenet", "transformer"])
def test_predictions_equal_those_of_torch(name: str) -> None:
    step = built(name).step
    batch = draw_batch(built(name).spec, step, BATCH)
    inputs = [*(p.value for p in step.parameters), *batch.inputs]
    wanted = step.predict(*inputs)
    (found,) = load_executorch(to_executorch(step.predict, step.predict_example))(inputs)
    assert_close(found, wanted, "output")


@pytest.mark.parametrize("name", MODELS)
def test_a_masked_example_contributes_nothing_whatever_it_holds(name: str) -> None:
    model = built(name)
    batch = draw_batch(model.spec, model.step, BATCH)
    other = draw_batch(model.spec, model.step, BATCH, seed=2)
    masked = batch.mask == 0
    assert masked.any()
    inputs = []
    for mine, theirs in zip(batch.inputs, other.inputs, strict=True):
        changed = mine.clone()
        changed[masked] = theirs[masked]
        inputs.append(changed)
    assert any(not torch.equal(a, b) for a, b in zip(inputs, batch.inputs, strict=True))
    wanted, found = model.outputs(batch, 0.5), model.outputs(replace(batch, inputs=tuple(inputs)), 0.5)
    for key in wanted:
        assert torch.equal(found[key], wanted[key]), key


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("mlp", "lenet", "separable") for value in (float("nan"), float("inf"))),
        ("mlp", 3e38), ("lenet", -3e38),  # finite, but what is made of it is not
    ],
)  # fmt: skip
def test_an_example_that_is_not_finite_is_counted_and_contributes_nothing(name: str, value: float) -> None:
    """One with a single bad value, one with nothing else: as if both had been masked out."""
    model = built(name)
    batch = draw_batch(model.spec, model.step, BATCH)
    (x,) = batch.inputs
    spoilt = x.clone()
    spoilt[3].view(-1)[7] = value
    spoilt[5] = value
    mask = batch.mask.clone()
    mask[3] = mask[5] = 0
    wanted = model.outputs(replace(batch, mask=mask), 0.5)
    found = model.outputs(replace(batch, inputs=(spoilt,)), 0.5)
    assert found["invalid"] == 2
    assert found["count"] == wanted["count"] == BATCH - 3
    for key in wanted:
        if key != "invalid":
            assert torch.equal(found[key], wanted[key]), key


class Decay(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(-x)


def test_a_nan_that_frozen_layers_swallow_is_seen_at_the_input() -> None:
    """XNNPACK's exp of NaN is 0, and its maximum of NaN and 0 may be 0: behind them, everything is finite."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), Decay(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 5))
    spec = TrainingSpec(model, "cross_entropy", [torch.zeros(1, 6, 6)], torch.zeros((), dtype=torch.long), frozen=["0"])
    step = capture(spec, "example", BATCH)
    program = to_executorch(step.train, step.train_example)
    small = Built(spec, step, program, load_executorch(program))
    batch = draw_batch(spec, step, BATCH)
    spoilt = batch.inputs[0].clone()
    spoilt[3, 0, 2, 2] = float("nan")
    spoilt[5] = float("inf")
    mask = batch.mask.clone()
    mask[3] = mask[5] = 0
    wanted = small.outputs(replace(batch, mask=mask), 0.5)
    found = small.outputs(replace(batch, inputs=(spoilt,)), 0.5)
    assert found["invalid"] == 2
    for key in wanted:
        if key != "invalid":
            assert torch.equal(found[key], wanted[key]), key


@pytest.mark.parametrize("name", ["mlp", "lenet"])
def test_a_batch_of_which_nothing_counts_gives_zeros(name: str) -> None:
    model = built(name)
    batch = draw_batch(model.spec, model.step, BATCH)
    nothing = replace(batch, inputs=(torch.full_like(batch.inputs[0], float("nan")),))
    for key, value in model.outputs(nothing, 0.5).items():
        assert torch.equal(value, torch.full_like(value, BATCH - 1 if key == "invalid" else 0)), key


def test_portable_kernels_alone_give_the_same() -> None:
    model = built("mlp")
    batch = draw_batch(model.spec, model.step, BATCH)
    program = to_executorch(model.step.train, model.step.train_example, backend="portable")
    assert b"XnnpackBackend" not in program
    assert b"XnnpackBackend" in model.program
    found = dict(zip(model.step.train_outputs, load_executorch(program)(model.inputs(batch, 0.5)), strict=True))
    for key, value in model.outputs(batch, 0.5).items():
        assert_close(found[key], value, key)


def test_the_same_graph_gives_the_same_bytes() -> None:
    torch.manual_seed(0)
    step = capture(MODELS["mlp"](), "example", BATCH)
    assert to_executorch(step.train, step.train_example) == built("mlp").program


def test_a_back_end_that_is_none_is_refused_by_its_name() -> None:
    step = built("mlp").step
    with pytest.raises(UnsupportedModelError, match="'vulkan': use xnnpack or portable"):
        to_executorch(step.train, step.train_example, backend="vulkan")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", MODELS)
def test_no_product_is_left_that_xnnpack_takes_only_with_constant_weights(name: str) -> None:
    """And nothing whose portable kernel is slow: each was the largest item of a profile."""
    step = built(name).step
    targets = {node.target for node in lower(step.train, step.train_example).graph.nodes}
    slow = (
        aten.mm.default, aten.addmm.default, aten.linear.default, aten.convolution.default,
        aten.max_pool2d_with_indices.default, aten.sign.default, aten.select.int, aten.slice.Tensor,
        aten.expand.default,
    )  # fmt: skip
    assert not targets.intersection(slow)


@pytest.mark.parametrize("name", MODELS)
def test_rewriting_alone_changes_nothing(name: str) -> None:
    """In PyTorch, on the same values: what differs in ExecuTorch beyond this is its kernels'."""
    model = built(name)
    batch = draw_batch(model.spec, model.step, BATCH)
    inputs = model.inputs(batch, 0.5)
    lowered = lower(model.step.train, model.step.train_example)
    names = model.step.train_outputs
    for key, found, wanted in zip(names, lowered(*inputs), model.step.train(*inputs), strict=True):
        assert_close(found, wanted, key)


# The rules one by one, in PyTorch: cheap, so drawn at random.


def rewritten(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[fx.GraphModule, Tensor]:
    graph = make_fx(function, tracing_mode="fake")(*inputs)
    lowered = lower(graph, inputs)
    return lowered, lowered(*inputs)


geometries = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 4), geometries, st.integers(1, 3), st.tuples(st.integers(0, 3), st.integers(0, 3)), geometries,
)  # fmt: skip
def test_a_depthwise_convolution_of_one_image_is_a_product_with_bands(channels, kernel, stride, padding, dilation):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, channels, 8, 9, generator=generator)
    w = torch.randn(channels, 1, *kernel, generator=generator)

    def convolve(x: Tensor, w: Tensor) -> Tensor:
        return aten.convolution.default(x, w, None, [stride, 1], list(padding), list(dilation), False, [0, 0], channels)

    lowered, found = rewritten(convolve, x, w)
    assert aten.slice.Tensor not in {node.target for node in lowered.graph.nodes}
    torch.testing.assert_close(found, convolve(x, w), rtol=1e-5, atol=2e-5)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3),
    geometries, geometries, st.tuples(st.integers(0, 2), st.integers(0, 2)), geometries,
)  # fmt: skip
def test_convolutions_of_any_geometry_are_products_of_columns(batch, groups, c, o, kernel, stride, padding, dilation):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, groups * c, 9, 8, generator=generator)
    w = torch.randn(groups * o, c, *kernel, generator=generator)
    bias = torch.randn(groups * o, generator=generator)
    geometry = (list(stride), list(padding), list(dilation))

    def convolve(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        return aten.convolution.default(x, w, bias, *geometry, False, [0, 0], groups)

    lowered, found = rewritten(convolve, x, w, bias)
    assert aten.convolution.default not in {node.target for node in lowered.graph.nodes}
    torch.testing.assert_close(found, convolve(x, w, bias), rtol=1e-5, atol=2e-5)

    # The input's gradient, as the training graph has it: a transposed convolution with what the stride left over.
    grad = torch.randn(found.shape, generator=generator)
    rest = [
        x.shape[i + 2] - ((grad.shape[i + 2] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (kernel[i] - 1) + 1)
        for i in range(2)
    ]

    def pull(grad: Tensor, w: Tensor) -> Tensor:
        return aten.convolution.default(grad, w, None, *geometry, True, rest, groups)

    lowered, found = rewritten(pull, grad, w)
    assert aten.convolution.default not in {node.target for node in lowered.graph.nodes}
    wanted = torch.nn.grad.conv2d_input(x.shape, w, grad, stride, padding, dilation, groups)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5)


@settings(max_examples=25, deadline=None)
@given(geometries, st.tuples(st.integers(1, 3), st.integers(1, 3)), st.booleans(), geometries)
def test_max_pooling_of_any_geometry_is_a_maximum_of_windows(kernel, stride, padded, dilation):
    x = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(0))
    padding = [k // 2 if padded else 0 for k in kernel]

    def pool(x: Tensor) -> Tensor:
        return aten.max_pool2d_with_indices.default(x, list(kernel), list(stride), padding, list(dilation))[0]

    lowered, found = rewritten(pool, x)
    assert aten.max_pool2d_with_indices.default not in {node.target for node in lowered.graph.nodes}
    assert torch.equal(found, pool(x))


@settings(max_examples=25, deadline=None)
@given(st.tuples(*[st.integers(-2, 3)] * 4), st.sampled_from([0.0, -1.5]))
def test_padding_below_zero_becomes_a_cut_and_no_other_value_moves(widths, value):
    x = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(0))

    def pad(x: Tensor) -> Tensor:
        return aten.constant_pad_nd.default(x, list(widths), value)

    lowered, found = rewritten(pad, x)
    assert torch.equal(found, pad(x))
    pads = [node for node in lowered.graph.nodes if node.target is aten.constant_pad_nd.default]
    assert all(width >= 0 for node in pads for width in node.args[1])


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(-9, 9), st.integers(-9, 12), st.integers(1, 3)), max_size=4))
def test_chains_of_slices_become_one_copy(slices):
    x = torch.arange(2 * 9 * 8.0).reshape(2, 9, 8)

    def cut(x: Tensor) -> Tensor:
        for dim, start, end, step in slices:
            x = aten.slice.Tensor(x, dim, start, end, step)
        return x + 1

    _, found = rewritten(cut, x)
    assert torch.equal(found, cut(x))


TINY, HUGE = 2.0**-149, 3.4028234663852886e38
EDGES = torch.tensor([[-float("inf"), -HUGE, -1.0, -TINY, -0.0, 0.0, TINY, 1.0, 1.0 + 2.0**-23, HUGE, float("inf")]])


@pytest.mark.parametrize("name", ["gt", "ge", "lt", "le", "eq", "ne"])
def test_comparisons_by_arithmetic_are_exact_to_the_smallest_difference(name: str) -> None:
    """Every pair of finite edge values. (Two equal infinities have no difference but NaN.)"""
    operator = getattr(aten, name)

    def compare(a: Tensor, b: Tensor) -> Tensor:
        return operator.Tensor(a, b).to(torch.float32)

    values = EDGES[:, 1:-1]
    a, b = values, values.t().contiguous()
    lowered, found = rewritten(compare, a, b)
    assert torch.equal(found, compare(a, b))
    assert operator.Tensor not in {node.target for node in lowered.graph.nodes}

    def compare_with(a: Tensor) -> Tensor:
        return operator.Scalar(a, 1.0).to(torch.float32)

    assert torch.equal(rewritten(compare_with, EDGES)[1], compare_with(EDGES))


def test_signs_and_masks_by_arithmetic_are_exact_for_every_number() -> None:
    for function in (torch.sign, lambda x: x.to(torch.bool).to(torch.float32), lambda x: ((x > 0) & (x < 1)).float()):
        _, found = rewritten(function, EDGES)
        assert torch.equal(found, function(EDGES))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_is_the_one_that_was_asked_for(approximate: str) -> None:
    """XNNPACK has the exact one only, and does not look at what the argument says."""
    x = torch.linspace(-6, 6, 201).reshape(3, 67)
    graph = make_fx(lambda x: aten.gelu.default(x, approximate=approximate) + 1, tracing_mode="fake")(x)
    (found,) = load_executorch(to_executorch(graph, (x,)))([x])
    wanted = functional.gelu(x.double(), approximate=approximate) + 1
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)


def test_one_hot_rows_are_exact_and_large_integers_match_none() -> None:
    labels = torch.tensor([[0, 3, 6], [2**24 + 1, -1, 2**40]])

    def one_hot(labels: Tensor) -> Tensor:
        return (labels[:, :, None] == torch.arange(7)).to(torch.float32)

    lowered, found = rewritten(one_hot, labels)
    assert torch.equal(found, one_hot(labels))
    assert aten.eq.Tensor not in {node.target for node in lowered.graph.nodes}


def test_integers_that_float32_would_merge_are_compared_as_integers() -> None:
    a = torch.tensor([[2**24, 2**24 + 1]])

    def same(a: Tensor) -> Tensor:
        return (a[:, :, None] == a[:, None, :]).to(torch.float32)

    assert torch.equal(rewritten(same, a)[1][0], torch.eye(2))


def test_conditions_with_one_element_an_example_stay_conditions() -> None:
    """They decide what counts: NaN must compare as false, which arithmetic would not give."""
    x = torch.tensor([float("nan"), 0.5, 2.0])

    def counts(x: Tensor) -> Tensor:
        return (x <= 1.0).to(torch.float32)

    assert torch.equal(rewritten(counts, x)[1], torch.tensor([0.0, 1.0, 0.0]))


def test_rows_that_do_not_count_are_replaced_and_no_other_value_moves() -> None:
    rows = EDGES.repeat(3, 1).reshape(3, 1, 11)
    rows[1] = float("nan")

    def guard(x: Tensor, rows: Tensor) -> Tensor:
        return torch.where((x > 0).reshape(3, 1, 1), rows, torch.zeros(()))

    lowered, found = rewritten(guard, torch.tensor([1.0, 0.0, 1.0]), rows)
    assert torch.equal(found, guard(torch.tensor([1.0, 0.0, 1.0]), rows))
    assert aten.embedding.default in {node.target for node in lowered.graph.nodes}


@settings(max_examples=25, deadline=None)
@given(st.sets(st.integers(0, 3), min_size=1), st.booleans(), st.sampled_from([torch.sum, torch.mean]))
def test_reductions_over_any_axes_keep_their_shape_and_value(dims, keep, reduction):
    x = torch.randn(3, 4, 2, 5, generator=torch.Generator().manual_seed(0))

    def reduce(x: Tensor) -> Tensor:
        return reduction(x, tuple(dims), keep)

    _, found = rewritten(reduce, x)
    torch.testing.assert_close(found, reduce(x), rtol=1e-5, atol=1e-5)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), st.booleans(), st.booleans())
@settings(max_examples=25, deadline=None)
def test_products_are_the_same_whichever_operand_is_transposed(m, k, n, left, right):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn((k, m) if left else (m, k), generator=generator)
    b = torch.randn((n, k) if right else (k, n), generator=generator)

    def product(a: Tensor, b: Tensor) -> Tensor:
        return torch.mm(a.t() if left else a, b.t() if right else b)

    lowered, found = rewritten(product, a, b)
    torch.testing.assert_close(found, product(a, b), rtol=1e-5, atol=1e-5)
    assert {aten.bmm.default} == {n.target for n in lowered.graph.nodes if "mm" in str(n.target)}


def test_constants_of_the_model_become_constants_of_the_program() -> None:
    table = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    graph = make_fx(lambda x: x @ table, tracing_mode="real")(torch.ones(3, 2))
    lowered = lower(graph, (torch.ones(3, 2),))
    assert torch.equal(lowered(torch.ones(3, 2)), torch.tensor([[4.0, 6.0]] * 3))
