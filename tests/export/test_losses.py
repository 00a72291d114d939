"""Losses by example: PyTorch's values and gradients, for every score a float can hold."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from oracle import Batch, check, draw_batch, feeds_of, run_fx  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from export.errors import UnsupportedModelError  # noqa: E402
from export.graph import TrainingSpec, capture  # noqa: E402
from export.losses import resolve_loss  # noqa: E402

WIDTH = 4
scores = st.lists(st.floats(-1e4, 1e4, width=32), min_size=WIDTH, max_size=WIDTH)
targets = st.lists(st.floats(0, 1, width=32), min_size=WIDTH, max_size=WIDTH)


def value_and_gradient(loss: object, output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    output = output.clone().requires_grad_()
    value = loss(output, y)  # type: ignore[operator]
    (gradient,) = torch.autograd.grad(value.sum(), output)
    return value.detach(), gradient


def close(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-5, atol=1e-5)


@given(rows=st.lists(scores, min_size=1, max_size=3), label=st.integers(0, WIDTH - 1))
def test_cross_entropy_is_pytorchs(rows: list[list[float]], label: int) -> None:
    output, y = torch.tensor(rows), torch.full((len(rows),), label)
    exact = value_and_gradient(lambda o, t: nn.functional.cross_entropy(o, t, reduction="none"), output.double(), y)
    close(value_and_gradient(resolve_loss("cross_entropy").per_example, output, y), exact)


def test_cross_entropy_of_a_sequence_is_the_mean_over_its_steps() -> None:
    output = torch.randn(2, 5, 3, WIDTH, generator=torch.Generator().manual_seed(0))
    y = torch.randint(0, WIDTH, (2, 5, 3), generator=torch.Generator().manual_seed(1))
    wanted = nn.functional.cross_entropy(output.movedim(-1, 1), y, reduction="none").mean((1, 2))
    torch.testing.assert_close(resolve_loss("cross_entropy").per_example(output, y), wanted)


@given(row=scores, target=targets)
def test_binary_cross_entropy_is_pytorchs(row: list[float], target: list[float]) -> None:
    output, y = torch.tensor([row]), torch.tensor([target])

    def theirs(o: Tensor, t: Tensor) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(o, t, reduction="none").mean(1)

    exact = value_and_gradient(theirs, output.double(), y.double())
    found = value_and_gradient(resolve_loss("binary_cross_entropy").per_example, output, y)
    torch.testing.assert_close(found[0].double(), exact[0], rtol=1e-5, atol=1e-5)
    away = output != 0  # at zero any subgradient of the two rectified parts is one
    torch.testing.assert_close(found[1].double()[away], exact[1][away], rtol=1e-5, atol=1e-5)


def test_the_gradient_of_binary_cross_entropy_at_a_score_of_zero_is_half_less_the_label() -> None:
    output, y = torch.zeros(1, 3), torch.tensor([[0.0, 1.0, 0.25]])
    _, gradient = value_and_gradient(resolve_loss("binary_cross_entropy").per_example, output, y)
    torch.testing.assert_close(gradient, (0.5 - y) / 3)


@given(row=scores, target=scores)
def test_mse_is_pytorchs(row: list[float], target: list[float]) -> None:
    output, y = torch.tensor([row]), torch.tensor([target])
    exact = value_and_gradient(lambda o, t: ((o - t) ** 2).mean(1), output.double(), y.double())
    close(value_and_gradient(resolve_loss("mse").per_example, output, y), exact)


@pytest.mark.parametrize(("name", "output", "y", "share"), [
    ("cross_entropy", [[0.0, 2.0, 1.0]], [1], 1.0),
    ("cross_entropy", [[0.0, 2.0, 1.0]], [2], 0.0),
    ("cross_entropy", [[[0.0, 2.0], [3.0, 1.0]]], [[1, 1]], 0.5),
    ("binary_cross_entropy", [[1.0, -1.0, 2.0, -3.0]], [[1.0, 0.0, 0.0, 0.0]], 0.75),
    ("mse", [[1.0]], [[1.0]], 0.0),
])  # fmt: skip
def test_the_share_that_is_right(name: str, output: list[list[float]], y: list[float], share: float) -> None:
    assert resolve_loss(name).correct(torch.tensor(output), torch.tensor(y)).tolist() == [share]


@pytest.mark.parametrize("label", [-1, -100, 3, 2**40])
def test_a_label_that_is_no_class_makes_its_example_invalid_and_no_other(label: int) -> None:
    """PyTorch's ignore_index is not meant: what says nothing must not count as an example that was right or wrong."""
    spec = TrainingSpec(nn.Linear(5, 3), "cross_entropy", [torch.zeros(5)], torch.zeros((), dtype=torch.long))
    step = capture(spec, "example", 4)
    batch = draw_batch(spec, step, 4)
    labels, masked = batch.labels.clone(), batch.mask.clone()
    labels[2], masked[2] = label, 0.0
    run = run_fx(step)
    found = run(feeds_of(step, Batch(batch.inputs, labels, batch.mask), clip=0.1))
    without = run(feeds_of(step, Batch(batch.inputs, batch.labels, masked), clip=0.1))
    assert float(found.pop("invalid")) == 1.0
    assert all(torch.equal(found[name], without[name]) for name in found)


WEIGHTS = torch.tensor([1.0, 2.0, 0.5])


@pytest.mark.parametrize("loss", [
    nn.CrossEntropyLoss(reduction="none"),
    nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1),
    nn.CrossEntropyLoss(reduction="none", ignore_index=1),
    lambda o, y: nn.functional.cross_entropy(o, y, WEIGHTS.to(o.dtype), reduction="none"),
    lambda o, y: nn.functional.cross_entropy(o, y, WEIGHTS.to(o.dtype), reduction="none", label_smoothing=0.2),
    lambda o, y: nn.functional.nll_loss(o.log_softmax(-1), y, reduction="none"),
    lambda o, y: nn.functional.huber_loss(o[:, 0], y.to(o.dtype), reduction="none"),
], ids=["plain", "smoothing", "ignore_index", "weights", "weights and smoothing", "nll", "huber"])  # fmt: skip
def test_pytorchs_losses_with_their_options_as_a_callable(loss: object) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    check(TrainingSpec(model, loss, [torch.zeros(5)], torch.zeros((), dtype=torch.long)), onnx=True)  # type: ignore[arg-type]


def test_a_sequence_whose_steps_are_partly_ignored() -> None:
    def loss(output: Tensor, y: Tensor) -> Tensor:
        kept = (y != 0).to(output.dtype)
        steps = nn.functional.cross_entropy(output.transpose(1, 2), y, ignore_index=0, reduction="none")
        return steps.sum(1) / kept.sum(1).clamp(min=1.0)

    torch.manual_seed(0)
    spec = TrainingSpec(nn.Linear(5, 3), loss, [torch.zeros(4, 5)], torch.zeros(4, dtype=torch.long))
    check(spec, onnx=True)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_loss_module_that_reduces_is_told_how_not_to(reduction: str) -> None:
    loss = nn.CrossEntropyLoss(reduction=reduction)
    spec = TrainingSpec(nn.Linear(5, 3), loss, [torch.zeros(5)], torch.zeros((), dtype=torch.long))
    with pytest.raises(UnsupportedModelError, match="reduction='none'"):
        capture(spec, "example", 4)


def test_a_callable_of_a_known_name_does_not_pass_for_the_loss_of_that_name() -> None:
    def cross_entropy(output: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, y, ignore_index=0, reduction="none")

    assert resolve_loss(cross_entropy).name == "own-cross_entropy"
    known = resolve_loss("cross_entropy")
    assert resolve_loss(known.per_example) is known


def test_names_that_are_no_loss() -> None:
    with pytest.raises(UnsupportedModelError, match="'nll'"):
        resolve_loss("nll")
