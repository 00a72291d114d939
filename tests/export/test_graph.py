"""The step as a whole: clipping, masks, invalid examples, both units, roles of parameters, predict."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from oracle import (  # noqa: E402
    Batch,
    Runner,
    assert_device_step,
    assert_example_step,
    check,
    draw_batch,
    expected,
    feeds_of,
    middle_clip,
    onnx_of,
    paths,
    run_fx,
    run_onnx,
)
from torch import Tensor, nn  # noqa: E402

from export.graph import CapturedStep, TrainingSpec, capture  # noqa: E402

CLASS = torch.zeros((), dtype=torch.long)


class Mixed(nn.Module):
    """One layer of each kind of rule: convolution, normalisation, pooling, attention, recurrence, a fallback."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.pool = nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.MaxPool2d(2)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.gru, self.temperature = nn.GRU(4, 5, batch_first=True), nn.Parameter(torch.rand(5) + 1)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.pool(torch.relu(self.norm(self.conv(x)))).flatten(2).transpose(1, 2)
        h = h + self.attention(h, h, h, need_weights=False)[0]
        return self.head(self.gru(h)[0].mean(1) / self.temperature)


def mixed() -> TrainingSpec:
    torch.manual_seed(0)
    return TrainingSpec(Mixed(), "cross_entropy", [torch.zeros(1, 6, 4)], CLASS)


def perceptron(activation: type[nn.Module] = nn.Tanh, **roles: tuple[str, ...]) -> TrainingSpec:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), activation(), nn.Linear(6, 3))
    return TrainingSpec(model, "cross_entropy", [torch.zeros(5)], CLASS, **roles)


SIZE = 6


class Captured:
    """A step and its two runners, made once: capturing is what takes the time."""

    def __init__(self, spec: TrainingSpec, unit: str = "example", proximal: bool = False) -> None:
        self.spec = spec
        self.step: CapturedStep = capture(spec, unit, SIZE, proximal)  # type: ignore[arg-type]
        self.runners: dict[str, Runner] = {"fx": run_fx(self.step), "onnxruntime": run_onnx(onnx_of(self.step))}


@pytest.fixture(scope="module")
def by_example() -> Captured:
    return Captured(mixed())


@pytest.fixture(scope="module")
def by_device() -> Captured:
    return Captured(mixed(), "device")


@pytest.fixture(scope="module")
def small() -> Captured:
    return Captured(perceptron())


@pytest.mark.parametrize("runner", ["fx", "onnxruntime"])
def test_a_step_by_example_equals_the_oracle(by_example: Captured, runner: str) -> None:
    batch = draw_batch(by_example.spec, by_example.step, SIZE)
    assert_example_step(by_example.spec, by_example.step, batch, by_example.runners[runner])
    assert paths(by_example.step)["temperature"] == "fallback"


@pytest.mark.parametrize("runner", ["fx", "onnxruntime"])
def test_a_step_by_device_equals_the_oracle(by_device: Captured, runner: str) -> None:
    batch = draw_batch(by_device.spec, by_device.step, SIZE)
    assert_device_step(by_device.spec, by_device.step, batch, by_device.runners[runner])


def test_a_proximal_step_equals_the_oracle() -> None:
    check(perceptron(local=("2",)), SIZE, unit="device", proximal=True, onnx=True)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), clip=st.floats(1e-6, 1e3), kept=st.integers(0, 2**SIZE - 1))
def test_any_batch_clip_and_mask_equal_the_oracle(small: Captured, seed: int, clip: float, kept: int) -> None:
    batch = draw_batch(small.spec, small.step, SIZE, seed)
    mask = torch.tensor([float(kept >> i & 1) for i in range(SIZE)])
    norms = expected(small.spec, small.step, batch.inputs, batch.labels).norms
    if ((norms - clip).abs() < 1e-5 * norms).any():
        clip *= 1.001  # the count of the clipped is exact only away from the bound
    for run in small.runners.values():
        assert_example_step(small.spec, small.step, Batch(batch.inputs, batch.labels, mask), run, clip)


def test_a_clip_above_every_norm_gives_the_plain_sum(small: Captured) -> None:
    batch = draw_batch(small.spec, small.step, SIZE)
    exact = expected(small.spec, small.step, batch.inputs, batch.labels)
    found = small.runners["onnxruntime"](feeds_of(small.step, batch, clip=float(exact.norms.max()) * 2))
    assert float(found["clipped"]) == 0.0
    for p in small.step.parameters:
        wanted = exact.plain_sum(p.name, batch.mask)
        torch.testing.assert_close(found[f"grad.{p.name}"].double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clip", [1e-6, 1e-2, 1.0])
def test_one_examples_contribution_never_exceeds_the_clip(by_example: Captured, clip: float) -> None:
    batch = draw_batch(by_example.spec, by_example.step, SIZE)
    for i in range(SIZE):
        alone = torch.zeros(SIZE)
        alone[i] = 1.0
        for run in by_example.runners.values():
            found = run(feeds_of(by_example.step, Batch(batch.inputs, batch.labels, alone), clip=clip))
            squares = [g.double().square().sum() for name, g in found.items() if name.startswith("grad.")]
            norm = math.sqrt(float(torch.stack(squares).sum()))
            assert norm <= float(torch.tensor(clip)) * (1 + 1e-4)
            assert float(found["clipped"]) == (1.0 if norm > clip * (1 - 1e-3) else 0.0)


GARBAGE: dict[str, Callable[[Tensor], Tensor]] = {
    "other": lambda x: torch.full_like(x, 3.25),
    "nan": lambda x: torch.full_like(x, math.nan),
    "inf": lambda x: torch.full_like(x, math.inf),
    "one inf": lambda x: torch.where(torch.arange(x.numel()).reshape(x.shape) == 1, -math.inf, x),
    "huge": lambda x: torch.full_like(x, 3e38),
}


def spoiled(batch: Batch, garbage: str, place: int) -> Batch:
    """The batch with one example replaced."""
    (x,) = batch.inputs
    x = x.clone()
    x[place] = GARBAGE[garbage](x[place])
    return Batch((x,), batch.labels, batch.mask)


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor], but: tuple[str, ...] = ()) -> None:
    for name in one:
        if name not in but:
            assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("unit", ["by_example", "by_device"])
def test_what_a_masked_example_holds_changes_no_bit(request: pytest.FixtureRequest, unit: str, garbage: str) -> None:
    captured: Captured = request.getfixturevalue(unit)
    scalars = {"clip": 0.1} if unit == "by_example" else {"lr": 0.1}
    batch = draw_batch(captured.spec, captured.step, SIZE)
    (place,) = torch.nonzero(batch.mask == 0).flatten().tolist()
    labels = batch.labels.clone()
    labels[place] = -7
    for run in captured.runners.values():
        clean = run(feeds_of(captured.step, batch, **scalars))
        dirty = spoiled(Batch(batch.inputs, labels, batch.mask), garbage, place)
        same_bits(clean, run(feeds_of(captured.step, dirty, **scalars)))


@pytest.mark.parametrize("garbage", ["nan", "inf", "one inf", "huge"])
@pytest.mark.parametrize("unit", ["by_example", "by_device"])
def test_an_example_without_a_finite_gradient_is_counted_and_does_nothing_else(
    request: pytest.FixtureRequest, unit: str, garbage: str
) -> None:
    captured: Captured = request.getfixturevalue(unit)
    scalars = {"clip": 0.1} if unit == "by_example" else {"lr": 0.1}
    batch = draw_batch(captured.spec, captured.step, SIZE)
    place = 3
    masked = batch.mask.clone()
    masked[place] = 0.0
    for run in captured.runners.values():
        without = run(feeds_of(captured.step, Batch(batch.inputs, batch.labels, masked), **scalars))
        found = run(feeds_of(captured.step, spoiled(batch, garbage, place), **scalars))
        assert float(found["invalid"]) == 1.0
        same_bits(found, without, but=("invalid",))


@pytest.mark.parametrize("unit", ["example", "device"])
def test_an_infinite_input_with_a_finite_loss_does_nothing(unit: str) -> None:
    """Through a tanh an infinity is a one: the loss is finite, and the first layer's gradient is 0 times infinity."""
    captured = Captured(perceptron(nn.Tanh), unit)
    batch = draw_batch(captured.spec, captured.step, SIZE)
    scalars = {"clip": 0.1} if unit == "example" else {"lr": 0.1}
    for run in captured.runners.values():
        found = run(feeds_of(captured.step, spoiled(batch, "one inf", 4), **scalars))
        assert float(found["invalid"]) == 1.0
        assert all(tensor.isfinite().all() for tensor in found.values())


def test_a_local_gradient_that_is_not_finite_does_not_spoil_the_local_sum() -> None:
    """Only the first layer sees the infinity, and it is the one that stays on the device."""
    captured = Captured(perceptron(nn.Tanh, local=("0",)))
    batch = draw_batch(captured.spec, captured.step, SIZE)
    for run in captured.runners.values():
        found = run(feeds_of(captured.step, spoiled(batch, "one inf", 4), clip=0.1))
        assert float(found["invalid"]) == 1.0
        assert all(tensor.isfinite().all() for tensor in found.values())


def test_a_gradient_whose_square_overflows_does_not_count() -> None:
    spec = TrainingSpec(nn.Linear(3, 1), lambda out, y: out[:, 0] * 1e25, [torch.zeros(3)], torch.zeros(()))
    captured = Captured(spec)
    batch = draw_batch(spec, captured.step, SIZE)
    for run in captured.runners.values():
        found = run(feeds_of(captured.step, batch, clip=1.0))
        assert float(found["count"]) == 0.0
        assert float(found["invalid"]) == float(batch.mask.sum())
        assert all(not tensor.any() for name, tensor in found.items() if name.startswith("grad."))


@pytest.mark.parametrize("bound", [1e-3, 1.0, 1e6])
def test_every_loss_is_taken_into_the_bound_before_the_sum_and_no_gradient_is(bound: float) -> None:
    """The loss metric's sensitivity: a loss of an example's own, far out on both sides."""
    spec = TrainingSpec(nn.Linear(3, 1), lambda out, y: out[:, 0] + y, [torch.zeros(3)], torch.zeros(()))
    captured = Captured(spec)
    batch = draw_batch(spec, captured.step, SIZE)
    losses = torch.tensor([-1e5, 1e5, 0.25, 2.5, -0.5, 7e5])
    labels = losses - spec.model(batch.inputs[0])[:, 0].detach()
    for run in captured.runners.values():
        found = run(feeds_of(captured.step, Batch(batch.inputs, labels, batch.mask), clip=0.5, loss_bound=bound))
        same = run(feeds_of(captured.step, batch, clip=0.5, loss_bound=bound))
        wanted = float((losses.clamp(0.0, bound) * batch.mask).sum())
        assert float(found["loss"]) == pytest.approx(wanted, rel=1e-4)
        assert float(found["count"]) == float(batch.mask.sum())
        assert all(torch.equal(found[name], same[name]) for name in found if name.startswith("grad."))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_an_infinite_loss_makes_its_example_invalid_even_with_a_finite_gradient(value: float) -> None:
    """Counted at the bound it would train on an example of which nothing is known but that it is broken."""
    spec = TrainingSpec(nn.Linear(3, 1), lambda out, y: out[:, 0] + y, [torch.zeros(3)], torch.zeros(()))
    captured = Captured(spec)
    batch = draw_batch(spec, captured.step, SIZE)
    labels, masked = batch.labels.clone(), batch.mask.clone()
    labels[3], masked[3] = value, 0.0
    for run in captured.runners.values():
        found = run(feeds_of(captured.step, Batch(batch.inputs, labels, batch.mask), clip=0.5, loss_bound=1.0))
        without = run(feeds_of(captured.step, Batch(batch.inputs, batch.labels, masked), clip=0.5, loss_bound=1.0))
        assert float(found.pop("invalid")) == 1.0
        assert all(torch.equal(found[name], without[name]) for name in found)


class Centred(nn.Module):
    """The gradient of `layer` is zero: its output enters less its mean, and its input is the same at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(20, 19, bias=False), nn.Linear(19, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x[:, :1].expand(-1, 6, -1)) + x[:, :, :19]
        return self.last((h - h.mean(1, keepdim=True)).tanh().sum(1))


def test_a_gradient_that_cancels_to_zero_is_no_square_root_of_less_than_zero() -> None:
    torch.manual_seed(0)
    spec = TrainingSpec(Centred(), "cross_entropy", [torch.zeros(6, 20)], CLASS, frozen=("last",))
    captured = Captured(spec)
    for seed in range(8):
        batch = draw_batch(spec, captured.step, SIZE, seed)
        for run in captured.runners.values():
            found = run(feeds_of(captured.step, batch, clip=1.0))
            assert float(found["count"]) == float(batch.mask.sum())
            assert float(found["grad.layer.weight"].norm()) < 1e-4


class Differences(nn.Module):
    """Its gradient is a sum over the steps with signs that alternate: nearly equal steps nearly cancel in it."""

    def __init__(self, layer: nn.Module, apart: float = 0.0) -> None:
        super().__init__()
        self.layer = layer
        signs = (1.0 - 2.0 * (torch.arange(16) % 2))[:, None]
        self.register_buffer("signs", signs * (1 + apart * torch.randn(16, 64)))

    def forward(self, x: Tensor) -> Tensor:
        return (self.layer(x) * self.signs).sum(1)


@pytest.mark.parametrize("length", [1.0, 1e2, 1e4])
def test_a_gradient_that_nearly_cancels_exceeds_the_clip_no_more_than_any_other(length: float) -> None:
    """A norm by Gram matrices loses what cancels; the clip must bound what is sent all the same (1.001 is the slack
    that the noise is made for). The steps differ by a few ten-thousandths, which is where the loss is largest."""
    model = Differences(nn.Linear(64, 64, bias=False))
    spec = TrainingSpec(model, lambda out, y: (out * y).sum(1), [torch.zeros(16, 64)], torch.zeros(64))
    captured = Captured(spec)
    worst = 0.0
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        steps = length * torch.randn(SIZE, 1, 64, generator=generator)
        apart = 10.0 ** (-5 + 0.05 * seed) * length * torch.randn(SIZE, 16, 64, generator=generator)
        labels = torch.randn(SIZE, 64, generator=generator)
        for i in range(SIZE):
            batch = Batch([steps + apart], labels, torch.eye(SIZE)[i])
            for run in captured.runners.values():
                found = run(feeds_of(captured.step, batch, clip=1.0))
                assert float(found["count"]) == 1.0
                worst = max(worst, float(found["grad.layer.weight"].double().norm()))
    assert worst <= 1.001


@pytest.mark.parametrize("apart", [1e-5, 3e-5, 1e-4, 3e-4, 1e-3])
def test_rows_of_an_embedding_that_nearly_cancel_exceed_the_clip_no_more_than_others(apart: float) -> None:
    torch.manual_seed(0)
    model = Differences(nn.Embedding(7, 64), apart)
    spec = TrainingSpec(model, lambda out, y: (out * y).sum(1), [torch.zeros(16, dtype=torch.long)], torch.zeros(64))
    captured = Captured(spec)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        indices = torch.randint(0, 7, (SIZE, 1), generator=generator).expand(SIZE, 16)
        labels = 1e4 * torch.randn(SIZE, 64, generator=generator)
        for i in range(SIZE):
            batch = Batch([indices], labels, torch.eye(SIZE)[i])
            for run in captured.runners.values():
                found = run(feeds_of(captured.step, batch, clip=1.0))
                assert float(found["grad.layer.weight"].double().norm()) <= 1.001


@pytest.mark.parametrize("width", [16384, 16385, 300_007])
def test_a_long_gradient_of_equal_elements_exceeds_the_clip_no_more_than_any_other(width: int) -> None:
    """One vector after the other, a run time rounds every addition of equal squares the same way."""
    torch.manual_seed(0)
    spec = TrainingSpec(nn.Linear(width, 2), "cross_entropy", [torch.zeros(width)], CLASS)
    step = capture(spec, "example", 2)
    for run in (run_fx(step), run_onnx(onnx_of(step))):
        for value in (1.0, 0.7, 1.1, 1.37):
            x = torch.full((2, width), value)
            found = run(feeds_of(step, Batch((x,), torch.tensor([0, 1]), torch.tensor([1.0, 0.0])), clip=1e-3))
            whole = torch.cat([found["grad.weight"].flatten(), found["grad.bias"]]).double().norm()
            assert float(whole) <= float(torch.tensor(1e-3)) * (1 + 1e-5)


def test_a_zero_gradient_counts_and_gives_zero() -> None:
    spec = perceptron(nn.ReLU, frozen=("2",))
    with torch.no_grad():
        spec.model[0].bias.fill_(-1e6)  # no unit ever fires
    captured = Captured(spec)
    batch = draw_batch(spec, captured.step, SIZE)
    for run in captured.runners.values():
        found = run(feeds_of(captured.step, batch, clip=0.5))
        assert float(found["count"]) == float(batch.mask.sum())
        assert float(found["clipped"]) == float(found["invalid"]) == 0.0
        assert all(not tensor.any() for name, tensor in found.items() if name.startswith("grad."))


def test_an_empty_batch_gives_zeros_and_moves_nothing(by_example: Captured, by_device: Captured) -> None:
    batch = draw_batch(by_example.spec, by_example.step, SIZE)
    empty = Batch(batch.inputs, batch.labels, torch.zeros(SIZE))
    for run in by_example.runners.values():
        found = run(feeds_of(by_example.step, empty, clip=1.0))
        assert all(not tensor.any() for tensor in found.values())
    for run in by_device.runners.values():
        found = run(feeds_of(by_device.step, empty, lr=1.0))
        for p in by_device.step.parameters:
            assert torch.equal(found[f"new.{p.name}"], p.value)


@pytest.mark.parametrize("unit", ["example", "device"])
def test_a_batch_of_one_equals_the_oracle(unit: str) -> None:
    step = capture(mixed(), unit, 1)
    batch = draw_batch(mixed(), step, 1)
    assert_step = assert_example_step if unit == "example" else assert_device_step
    assert_step(mixed(), step, batch, run_fx(step))


def test_shared_local_frozen_and_unused_parameters_each_get_what_is_theirs() -> None:
    class Personal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.frozen, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
            self.unused = nn.Linear(2, 2)
            self.fixed = nn.Parameter(torch.rand(6), requires_grad=False)
            self.register_buffer("order", torch.tensor([2, 0, 1]))
            self.register_buffer("keep", torch.tensor([True, False, True, True, True, True]))
            self.register_buffer("idle", torch.zeros(2, dtype=torch.int64))

        def forward(self, x: Tensor) -> Tensor:
            h = torch.where(self.keep, self.frozen(self.body(x).tanh()) * self.fixed, 0.0)
            return self.head(h)[:, self.order]

    torch.manual_seed(0)
    spec = TrainingSpec(
        Personal(), "cross_entropy", [torch.zeros(5)], CLASS, local=("head",), frozen=("frozen.weight",)
    )
    step = check(spec, onnx=True)
    roles = {p.name: p.role for p in step.parameters}
    assert roles["head.weight"] == roles["head.bias"] == "local"
    assert roles["frozen.weight"] == roles["fixed"] == "frozen"
    assert roles["frozen.bias"] == roles["unused.weight"] == "shared"
    assert roles["order"] == roles["keep"] == "buffer"
    assert {name for name in step.train_outputs if "." in name} == {
        "grad.body.weight", "grad.body.bias", "grad.frozen.bias", "grad.unused.weight", "grad.unused.bias",
        "local_grad.head.weight", "local_grad.head.bias",
    }  # fmt: skip
    check(spec, unit="device", onnx=True)


def test_local_parameters_are_not_in_the_norm_that_clips_the_shared_ones() -> None:
    spec = perceptron(local=("2",))
    step = capture(spec, "example", SIZE)
    batch = draw_batch(spec, step, SIZE)
    exact = expected(spec, step, batch.inputs, batch.labels)
    everything = torch.stack([g.flatten(1).square().sum(1) for g in exact.gradients.values()]).sum(0).sqrt()
    assert (everything > exact.norms * 1.1).all()
    assert_example_step(spec, step, batch, run_fx(step), middle_clip(exact.norms, batch.mask))


def test_two_inputs_and_a_tuple_of_outputs() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.rest, self.last = nn.Embedding(7, 4), nn.Linear(3, 4), nn.Linear(4, 3)

        def forward(self, words: Tensor, rest: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
            h = self.words(words).mean(1) * self.rest(rest)
            return (self.last(h), h), rest

    torch.manual_seed(0)
    inputs = [torch.zeros(5, dtype=torch.int32), torch.zeros(3)]
    step = check(TrainingSpec(Both(), "cross_entropy", inputs, CLASS), onnx=True)
    names = [p.name for p in step.parameters]
    assert step.train_inputs == (*names, "x0", "x1", "y", "mask", "clip", "loss_bound")
    assert step.train_outputs[-5:] == ("loss", "correct", "count", "clipped", "invalid")


@pytest.mark.parametrize(("loss", "label"), [("binary_cross_entropy", torch.zeros(3)), ("mse", torch.zeros(3))])
def test_losses_on_floats_equal_the_oracle(loss: str, label: Tensor) -> None:
    torch.manual_seed(0)
    check(TrainingSpec(nn.Linear(5, 3), loss, [torch.zeros(5)], label), onnx=True)


def test_a_sequence_of_labels_equals_the_oracle() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
    spec = TrainingSpec(model, "cross_entropy", [torch.zeros(4, dtype=torch.long)], torch.zeros(4, dtype=torch.int32))
    check(spec, onnx=True)


def test_a_users_own_loss_equals_the_oracle() -> None:
    def smoothed(output: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, y, reduction="none", label_smoothing=0.1)

    torch.manual_seed(0)
    check(TrainingSpec(nn.Linear(5, 3), smoothed, [torch.zeros(5)], CLASS), onnx=True)


def test_a_model_that_needs_positive_inputs_is_probed_with_them() -> None:
    class Log(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.log(x))

    step = capture(TrainingSpec(Log(), "cross_entropy", [torch.zeros(5)], CLASS), "example", 4)
    assert set(paths(step).values()) == {"fast"}


def test_weights_that_are_zero_do_not_hide_the_examples() -> None:
    """A last layer that starts at zero, as adapters do: probing changes the parameters too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    for parameter in model[1:].parameters():
        nn.init.zeros_(parameter)
    step = check(TrainingSpec(model, "cross_entropy", [torch.zeros(5)], CLASS))
    assert set(paths(step).values()) == {"fast"}


def test_a_layer_that_hides_its_examples_is_left_to_the_fallback() -> None:
    """Nothing shows where the examples lie behind a rectifier that never fires: exactness does not depend on it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    spec = TrainingSpec(model, "cross_entropy", [torch.zeros(5)], CLASS)
    step = capture(spec, "example", 4)
    assert paths(step)["2.weight"] == "fallback"
    with torch.no_grad():
        model[0].bias.fill_(0.1)  # the parameters are inputs: the same graph must serve these
    fired = capture(spec, "example", 4)
    wakened = CapturedStep(**{**step.__dict__, "parameters": fired.parameters})
    assert_example_step(spec, wakened, draw_batch(spec, wakened, 4), run_fx(wakened))


def test_captured_parameters_do_not_follow_the_model() -> None:
    spec = perceptron()
    step = capture(spec, "example", 4)
    before = step.parameters[0].value.clone()
    with torch.no_grad():
        spec.model[0].weight.add_(1.0)
    assert torch.equal(step.parameters[0].value, before)


class Answer(nn.Module):
    """Dropout, a fixed BatchNorm, tied weights, attention, recurrence: what evaluation mode changes or may fuse."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True)
        self.gru, self.lstm = nn.GRU(4, 4, batch_first=True), nn.LSTM(4, 4, bidirectional=True, batch_first=True)
        self.norm = nn.BatchNorm1d(8).eval()
        self.down, self.scores = nn.Linear(8, 4), nn.Linear(4, 9, bias=False)
        self.scores.weight = self.table.weight

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h, _ = self.lstm(self.gru(self.encoder(self.table(x)))[0])
        return self.scores(self.down(self.norm(h[:, -1]))), h


def test_predict_equals_the_model_in_evaluation_mode() -> None:
    from oracle import session_of

    from export.to_onnx import to_onnx

    torch.manual_seed(0)
    model = Answer()
    spec = TrainingSpec(model, "cross_entropy", [torch.zeros(5, dtype=torch.long)], CLASS)
    step = capture(spec, "example", 4)
    x = torch.randint(0, 9, (4, 5), generator=torch.Generator().manual_seed(5))
    # New values, so that what is tied in the model must be tied in the graph.
    values = {p.name: p.value + 0.25 if p.role != "buffer" else p.value for p in step.parameters}
    with torch.no_grad():
        wanted, _ = torch.func.functional_call(model.eval(), values, (x,))
        answer = step.predict(*(values[p.name] for p in step.parameters), x)
    torch.testing.assert_close(answer, wanted, rtol=1e-5, atol=1e-5)
    session = session_of(to_onnx(step.predict, step.predict_example, step.predict_inputs, ["output"]))
    feeds = {name: tensor.numpy() for name, tensor in {**values, "x": x}.items()}
    torch.testing.assert_close(torch.from_numpy(session.run(None, feeds)[0]), wanted, rtol=1e-5, atol=1e-5)


class InTwoModes(nn.Module):
    """Its evaluation differs in a number only, or in nothing."""

    def __init__(self, differs: bool) -> None:
        super().__init__()
        self.last, self.differs = nn.Linear(5, 3), differs

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x * torch.tensor(0.5 if self.differs and self.training else 1.0))


@pytest.mark.parametrize("differs", [False, True])
def test_predict_is_of_evaluation_mode_where_only_a_constant_differs(differs: bool) -> None:
    torch.manual_seed(0)
    model = InTwoModes(differs)
    step = capture(TrainingSpec(model, "cross_entropy", [torch.zeros(5)], CLASS), "example", 4)
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        answer = step.predict(*(p.value for p in step.parameters), x)
        torch.testing.assert_close(answer, model.eval()(x))
        torch.testing.assert_close(answer, model.last(x))
