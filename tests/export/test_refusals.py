"""What cannot be clipped per example is refused, by the layer's name and with a remedy; nothing is silently wrong."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")

from oracle import check, onnx_of, paths  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from export.errors import UnsupportedModelError  # noqa: E402
from export.graph import TrainingSpec, capture  # noqa: E402

CLASS = torch.zeros((), dtype=torch.long)
VECTOR, IMAGE, TOKENS = torch.zeros(5), torch.zeros(2, 6, 6), torch.zeros(4, dtype=torch.long)


class Model(nn.Module):
    """A linear layer with something before it."""

    def __init__(self, before: Callable[[Tensor], Any] | nn.Module, width: int = 5) -> None:
        super().__init__()
        self.before, self.last = before, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.before(x))


def refusal(model: nn.Module, x: Tensor = VECTOR, loss: Any = "cross_entropy", y: Tensor = CLASS, **rest: Any) -> str:
    torch.manual_seed(0)
    with pytest.raises(UnsupportedModelError) as caught:
        capture(TrainingSpec(model, loss, [x], y, **rest), "example", 4)
    return str(caught.value)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(2), nn.BatchNorm2d(2, track_running_stats=False).eval()])
def test_batch_norm_that_uses_the_batch(norm: nn.Module) -> None:
    message = refusal(nn.Sequential(nn.Sequential(nn.Conv2d(2, 2, 3), norm), nn.Flatten(), nn.Linear(32, 3)), IMAGE)
    assert "0.1 (BatchNorm2d)" in message
    assert "GroupNorm" in message


def test_instance_norm_with_running_statistics() -> None:
    norm = nn.InstanceNorm2d(2, track_running_stats=True)
    message = refusal(nn.Sequential(norm, nn.Flatten(), nn.Linear(72, 3)), IMAGE)
    assert "0 (InstanceNorm2d)" in message
    assert "track_running_stats=False" in message


@pytest.mark.parametrize(
    "layer", [nn.Dropout(0.2), nn.AlphaDropout(0.2), nn.FeatureAlphaDropout(0.2), nn.RReLU()], ids=repr
)
def test_layers_that_need_randomness(layer: nn.Module) -> None:
    message = refusal(nn.Sequential(nn.Linear(5, 4), layer, nn.Linear(4, 3)))
    assert f"1 ({type(layer).__name__})" in message
    assert ("Its p is 0.2: set it to 0" in message) == (not isinstance(layer, nn.RReLU))
    assert ".eval()" in message
    layer.eval()
    capture(
        TrainingSpec(nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.2).eval()), "cross_entropy", [VECTOR], CLASS),
        "example",
        4,
    )


def test_dropout_in_attention_and_between_recurrent_layers() -> None:
    encoder = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
    encoder.self_attn.dropout = 0.1
    assert "self_attn" in refusal(nn.Sequential(encoder, nn.Flatten(), nn.Linear(24, 3)), torch.zeros(4, 6))

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.last = nn.GRU(6, 4, 2, dropout=0.3, batch_first=True), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.gru(x)[0][:, -1])

    assert "gru (GRU): dropout of 0.3" in refusal(Recurrent(), torch.zeros(4, 6))


def test_random_numbers_in_forward() -> None:
    message = refusal(Model(lambda x: x + torch.randn_like(x)))
    assert "aten.randn_like.default would need randomness inside the graph. Random numbers have to be an in" in message


def test_control_flow_on_the_data_names_the_layer() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    message = refusal(Model(nn.Sequential(nn.Identity(), Branch())))
    assert "before.1 (Branch)" in message
    assert "torch.where" in message


@pytest.mark.parametrize(
    "before",
    [
        lambda x: x * x.max().item(),
        lambda x: x * x[x > 0].sum(),
        lambda x: torch.cond(x.sum() > 0, lambda a: a * 2.0, lambda a: a + 1.0, (x,)),
    ],
    ids=["a number from the data", "a shape from the data", "torch.cond"],
)
@pytest.mark.filterwarnings("ignore")
def test_values_and_shapes_that_depend_on_the_data(before: Callable[[Tensor], Tensor]) -> None:
    message = refusal(Model(before))
    assert "the model itself (Model)" in message
    assert "torch.where" in message


def test_no_grad_inside_forward() -> None:
    def half_stopped(x: Tensor) -> Tensor:
        with torch.no_grad():
            y = x.tanh()
        return x * y

    assert ".detach()" in refusal(nn.Sequential(nn.Linear(5, 5), Model(half_stopped)))


def softmax_of_the_batch(x: Tensor) -> Tensor:
    return torch.softmax(x, 0)


MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x - x.mean(0),
    "softmax": softmax_of_the_batch,
    "maximum": lambda x: x - x.amax(0),
    "maximum alone": lambda x: x + 0 * x.amax(0) + (x > x.amax(0) * 0.99),
    "cumulative sum": lambda x: x.cumsum(0),
    "sum over everything": lambda x: x / x.abs().sum(),
    "the others' product": lambda x: x @ x.t() @ x,
    "a neighbour": lambda x: x + x.roll(1, 0),
    "sorting": lambda x: x.sort(0).values,
    "a rare case": lambda x: torch.where(x > 1.5, x.flip(0), x),
    "integers": lambda x: x + (x > 0).sum(0),
}


@pytest.mark.parametrize("kind", MIXING)
def test_values_that_mix_examples(kind: str) -> None:
    message = refusal(nn.Sequential(nn.Linear(5, 5), Model(MIXING[kind])))
    assert "1 (Model): aten." in message
    assert "mixes the examples" in message


def test_attention_across_the_batch() -> None:
    class Across(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.last = nn.MultiheadAttention(6, 2, batch_first=False), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:  # (B, T, 6) where (T, B, 6) is meant
            return self.last(self.attention(x, x, x, need_weights=False)[0].mean(1))

    message = refusal(Across(), torch.zeros(4, 6))
    assert "attention (MultiheadAttention)" in message
    assert "mixes the examples" in message


def test_recurrence_along_the_batch() -> None:
    class Along(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.last = nn.GRU(6, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.gru(x)[0].mean(1))

    message = refusal(Along(), torch.zeros(4, 6))
    assert "gru (GRU)" in message
    assert "mixes the examples" in message


@pytest.mark.parametrize("shift", [lambda x: x.flip(0), lambda x: x.roll(1, 0)], ids=["flipped", "rolled"])
@pytest.mark.parametrize("late", [False, True])
def test_examples_in_another_order_than_their_labels(shift: Callable[[Tensor], Tensor], late: bool) -> None:
    """Every value depends on one example only, and yet the loss of each on two."""

    class Order(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return shift(self.last(x)) if late else self.last(shift(x))

    assert "another example" in refusal(Order())


def test_an_output_with_the_steps_first() -> None:
    class StepsFirst(nn.Module):
        """As many steps as examples: the shapes fit, the examples do not."""

        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(x).transpose(0, 1)

    assert "first axis" in refusal(StepsFirst(), torch.zeros(4, 6), y=torch.zeros(4, dtype=torch.long))


def test_a_parameter_with_an_axis_of_the_batch() -> None:
    class PerPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.place, self.last = nn.Parameter(torch.randn(4, 5)), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(x + self.place)

    assert "axis of the batch's size" in refusal(PerPlace())


def own(output: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, y, reduction="none")


LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "mean over the batch": (nn.functional.cross_entropy, "do not reduce over the batch"),
    "sum, repeated": (lambda o, y: own(o, y).sum().expand(4), "another example"),
    "weights by the batch": (lambda o, y: own(o, y) / own(o, y).sum(), "another example"),
    "weights by the labels of the batch": (lambda o, y: own(o, y) * (y == y[:, None]).sum(0), "another example"),
    "the neighbour's label": (lambda o, y: own(o, y.roll(1, 0)), "another example"),
    "contrast": (lambda o, y: own(o @ o.t(), torch.arange(4)), "another example"),
    "integers": (lambda o, y: (o.argmax(-1) != y).long(), "one float for each"),
    "a column": (lambda o, y: own(o, y)[:, None], "one float for each"),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_losses_of_more_than_one_example(kind: str) -> None:
    loss, reason = LOSSES[kind]
    assert reason in refusal(nn.Linear(5, 3), loss=loss)


@pytest.mark.parametrize(
    ("loss", "width", "y", "wrong"),
    [
        ("cross_entropy", 3, torch.zeros(1, dtype=torch.long), "(4, 1)"),
        ("cross_entropy", 3, torch.zeros(3), "(4, 3)"),
        ("cross_entropy", 3, torch.zeros(()), "torch.float32"),
        ("binary_cross_entropy", 1, torch.zeros(()), "(4,)"),
        ("mse", 1, torch.zeros(()), "(4,)"),
        ("mse", 4, torch.zeros(1), "(4, 1)"),
    ],
)
def test_labels_that_broadcasting_would_pair_with_every_output(loss: str, width: int, y: Tensor, wrong: str) -> None:
    message = refusal(nn.Linear(5, width), loss=loss, y=y)
    assert wrong in message
    assert loss in message
    assert "the batch as the first axis: labels of " in message or "class numbers, int64" in message


def test_unknown_losses() -> None:
    assert "cross_entropy, binary_cross_entropy, mse" in refusal(nn.Linear(5, 3), loss="hinge")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_parameters_of_another_dtype(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    model[1].to(dtype)
    message = refusal(model)
    assert "1.weight" in message
    assert str(dtype) in message


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.uint8, torch.bool, torch.complex64])
def test_inputs_and_labels_of_another_dtype(dtype: torch.dtype) -> None:
    assert f"an input of {dtype}" in refusal(nn.Linear(5, 3), torch.zeros(5, dtype=dtype))
    assert f"a label of {dtype}" in refusal(nn.Linear(5, 3), y=torch.zeros((), dtype=dtype))


def test_examples_that_are_no_tensors() -> None:
    assert "a label that is float: give it as a tensor" in refusal(nn.Linear(5, 3), y=1.0)  # type: ignore[arg-type]
    assert "an input that is list: give it as a tensor" in refusal(nn.Linear(5, 3), [0.0] * 5)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match="inputs is one tensor: give a list, with one for each argument"):
        capture(TrainingSpec(nn.Linear(5, 3), "cross_entropy", VECTOR, CLASS), "example", 4)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (
            torch.zeros(4),
            "1 (Linear): the model does not take these inputs, (4, 4) torch.float32: mat1 and mat2 shapes cannot be "
            "multiplied (4x4 and 5x3)",
        ),
        (
            torch.zeros(5, dtype=torch.long),
            "1 (Linear): the model does not take these inputs, (4, 5) torch.int64: mat1 and mat2 must have the same "
            "dtype, but got Long and Float",
        ),
    ],
)
def test_inputs_that_the_model_does_not_take(x: Tensor, said: str, capfd: pytest.CaptureFixture[str]) -> None:
    message = refusal(nn.Sequential(nn.Identity(), nn.Linear(5, 3)), x)
    assert message.startswith(said + ". They are the spec's `inputs`, one for each argument of forward, with a batch ")
    assert "torch.where" not in message
    assert capfd.readouterr() == ("", "")


def test_more_inputs_than_forward_has_arguments() -> None:
    with pytest.raises(UnsupportedModelError, match=re.escape("these inputs, (4, 5) torch.float32, (4, 5) torch.fl")):
        capture(TrainingSpec(nn.Linear(5, 3), "cross_entropy", [VECTOR, VECTOR], CLASS), "example", 4)


def test_the_trial_of_the_inputs_leaves_the_model_and_the_random_numbers_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Dropout())
    state = torch.random.get_rng_state()
    with pytest.raises(UnsupportedModelError, match="BatchNorm in training mode"):
        capture(TrainingSpec(model, "cross_entropy", [VECTOR], CLASS), "example", 4)
    assert model[1].num_batches_tracked == 0
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_of_the_model_that_are_not_finite(value: float) -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 3))
    with torch.no_grad():
        model[1].weight[2, 0] = value
    assert "1.weight holds NaN or infinity before any training: initialise" in refusal(model)
    model = nn.Sequential(nn.Linear(5, 3))
    model.register_buffer("scale", torch.tensor(value))
    assert "scale holds NaN or infinity" in refusal(model)


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda o: o, "takes 1 positional argument but 2 were given"),
        (lambda o, y, w: o, "missing 1 required positional argument: 'w'"),
        (lambda o, y: (o - y).sum(1), "The size of tensor a (3) must match the size of tensor b (4)"),
    ],
    ids=["too few", "too many", "shapes"],
)
def test_a_loss_that_does_not_take_the_output_and_the_labels(loss: Callable[..., Tensor], said: str) -> None:
    message = refusal(nn.Linear(5, 3), loss=loss)
    assert message.startswith(
        "the loss (<lambda>) fails for an output of (4, 3) torch.float32 and labels of (4,) torch.i"
    )
    assert said in message
    assert "called with (output, y)" in message


def test_a_loss_that_gives_no_tensor() -> None:
    message = refusal(nn.Linear(5, 3), loss=lambda o, y: 0.5)
    assert "the loss gives float for a batch of 4: it must give one float for each example" in message


def test_nothing_to_aggregate() -> None:
    assert "nothing to aggregate" in refusal(nn.Linear(5, 3), frozen=("weight", "bias"))
    assert "nothing to aggregate" in refusal(nn.Linear(5, 3), local=("weight", "bias"))
    assert "nothing to aggregate" in refusal(nn.Flatten())


def test_roles_of_parameters_that_do_not_exist() -> None:
    message = refusal(nn.Sequential(nn.Linear(5, 3)), local=("head",))
    assert "'head'" in message
    assert "0.weight, 0.bias" in message
    assert "'0.w'" in refusal(nn.Sequential(nn.Linear(5, 3)), frozen=("0.w",))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.scores = nn.Embedding(9, 4), nn.Linear(4, 9)
        self.scores.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(self.table(x).mean(1))


def test_a_role_for_one_name_of_a_tied_weight() -> None:
    """`local=("scores",)` would share the table, which is the same tensor."""
    message = refusal(Tied(), TOKENS, local=("scores",))
    assert "'scores.weight' is the same tensor as 'table.weight'" in message
    both = TrainingSpec(Tied(), "cross_entropy", [TOKENS], CLASS, frozen=("scores.weight", "table"))
    roles = {p.name: p.role for p in capture(both, "example", 4).parameters}
    assert roles == {"table.weight": "frozen", "scores.bias": "shared"}


def test_state_that_changes_while_the_model_runs() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(5, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.last(x)

    assert "calls" in refusal(Counting())
    table = nn.Sequential(nn.Embedding(9, 4, max_norm=1.0), nn.Flatten(), nn.Linear(16, 3))
    message = refusal(table, TOKENS)
    assert "0.weight" in message
    assert "max_norm" in message


def test_outputs_that_are_no_tensor_or_do_not_depend_on_the_input() -> None:
    class Other(nn.Module):
        def __init__(self, output: Callable[[Tensor, Tensor], Any]) -> None:
            super().__init__()
            self.last, self.prior, self.output = nn.Linear(5, 3), nn.Parameter(torch.rand(3)), output

        def forward(self, x: Tensor) -> Any:
            return self.output(self.last(x), self.prior.expand(x.shape[0], -1))

    assert "dict" in refusal(Other(lambda y, prior: {"scores": y}))
    assert "does not depend on its inputs" in refusal(Other(lambda y, prior: prior))


def test_values_that_are_not_numbers_for_any_random_input() -> None:
    message = refusal(nn.Sequential(nn.Linear(5, 5), Model(lambda x: torch.log(-x.abs()))))
    assert "1 (Model): NaN" in message


@pytest.mark.parametrize(
    ("layer", "remedy"),
    [
        (nn.MaxPool2d(2, ceil_mode=True), "pad the input"),
        (nn.AvgPool2d(2, padding=1, count_include_pad=False), "pad the input"),
        (nn.AdaptiveAvgPool2d(4), "uneven"),
        (nn.AdaptiveMaxPool2d(4), "uneven"),
    ],
    ids=repr,
)
def test_pools_without_a_rule(layer: nn.Module, remedy: str) -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 2), layer, nn.Flatten(), nn.LazyLinear(3))
    model(IMAGE[None])
    message = refusal(model, IMAGE)
    assert f"1 ({type(layer).__name__})" in message
    assert remedy in message


VIDEO = torch.zeros(2, 4, 6, 6)


@pytest.mark.parametrize(
    ("layer", "x", "remedy"),
    [
        (nn.ConvTranspose1d(2, 2, 3), torch.zeros(2, 5), r"Use nn\.Upsample and then nn\.Conv1d"),
        (nn.ConvTranspose2d(2, 2, 3, stride=2), IMAGE, r"Use nn\.Upsample and then nn\.Conv2d"),
        (nn.ConvTranspose3d(2, 2, 3), VIDEO, "images through Conv2d"),
        (nn.Conv3d(2, 2, 3), VIDEO, "images through Conv2d"),
        (nn.Conv3d(2, 2, 3, padding="same"), VIDEO, "images through Conv2d"),
    ],
    ids=repr,
)
def test_convolutions_without_a_rule(layer: nn.Module, x: Tensor, remedy: str) -> None:
    model = nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(3))
    model(x[None])
    message = refusal(model, x)
    assert f"0 ({type(layer).__name__})" in message
    assert re.search(remedy, message)
    assert "or freeze the layer and what comes before it" in message


@pytest.mark.parametrize(
    "layer",
    [nn.MaxPool3d(2), nn.AvgPool3d(2), nn.AdaptiveMaxPool3d(1), nn.AdaptiveAvgPool3d(1)],
    ids=repr,
)
def test_pools_in_three_dimensions(layer: nn.Module) -> None:
    model = nn.Sequential(nn.PReLU(), layer, nn.Flatten(), nn.LazyLinear(3))
    model(VIDEO[None])
    message = refusal(model, VIDEO)
    assert f"1 ({type(layer).__name__})" in message
    assert "has no gradient in ONNX. " in message


def test_what_has_no_gradient_in_onnx_stays_behind_frozen_layers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(2, 2, 3), nn.MaxPool3d(2), nn.Flatten(), nn.Linear(8, 3))
    spec = TrainingSpec(model, "cross_entropy", [VIDEO], CLASS, frozen=("0",))
    assert paths(check(spec, onnx=True)) == {"3.weight": "fast", "3.bias": "fast"}


def test_the_places_of_an_adaptive_maximum() -> None:
    class Places(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool, self.last = (
                nn.Conv2d(2, 2, 1),
                nn.AdaptiveMaxPool2d(2, return_indices=True),
                nn.Linear(8, 3),
            )

        def forward(self, x: Tensor) -> Tensor:
            values, places = self.pool(self.conv(x))
            return self.last((values + places).flatten(1))

    assert "pool (AdaptiveMaxPool2d): the places" in refusal(Places(), IMAGE)


def test_a_recurrent_projection() -> None:
    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.last = nn.LSTM(6, 4, proj_size=3, batch_first=True), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.lstm(x)[0][:, -1])

    assert "lstm (LSTM)" in refusal(Projected(), torch.zeros(4, 6))


class Warp(nn.Module):
    """An image looked up at places that are a function of it. The forward pass has an ONNX form."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.grid_sample(x, x.permute(0, 2, 3, 1).tanh(), align_corners=False)


class GammaWeight(nn.Module):
    """A weight that is computed by an operator without an ONNX form."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(5))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.lgamma(self.scale)


def without_a_form(model: nn.Module, x: Tensor = VECTOR, loss: Any = "cross_entropy", **roles: Any) -> str:
    step = capture(TrainingSpec(model, loss, [x], CLASS, **roles), "example", 4)
    with pytest.raises(UnsupportedModelError) as caught:
        onnx_of(step)
    return str(caught.value)


def test_an_operator_that_onnx_lacks_is_named_with_its_layer_and_a_remedy() -> None:
    inner = nn.Sequential(nn.Tanh(), Model(lambda x: torch.lgamma(x.exp())))
    message = without_a_form(nn.Sequential(nn.Linear(5, 5), inner))
    assert message == "1.1 (Model): it needs prims.lgamma, which has no ONNX form. Write the layer in simpler operators"
    message = without_a_form(nn.Sequential(nn.Linear(5, 5), GammaWeight()))
    assert message.startswith("1 (GammaWeight): it needs prims.lgamma, ")
    assert message.count("ONNX") == 1


def test_an_operator_whose_gradient_onnx_lacks_is_named_with_its_layer_and_a_remedy() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 2, 1), Warp(), nn.Flatten(), nn.Linear(72, 3))
    message = without_a_form(model, IMAGE)
    assert message.startswith("1 (Warp): its gradient needs aten.grid_sampler_2d_backward, which has no ONNX form. ")
    assert "freeze all layers before it" in message
    assert message.count("ONNX") == 1
    check(TrainingSpec(model, "cross_entropy", [IMAGE], CLASS, frozen=("0",)), onnx=True)


def gamma_loss(output: Tensor, y: Tensor) -> Tensor:
    return torch.lgamma(1 + output.exp()).sum(1) + own(output, y)


def margin_loss(output: Tensor, y: Tensor) -> Tensor:
    return nn.functional.multi_margin_loss(output, y, reduction="none")


@pytest.mark.parametrize(
    ("loss", "needs"),
    [(gamma_loss, "it needs prims.lgamma"), (margin_loss, "its gradient needs aten.multi_margin_loss_backward")],
)
def test_a_loss_that_onnx_lacks_is_named_with_a_remedy(loss: Callable[[Tensor, Tensor], Tensor], needs: str) -> None:
    message = without_a_form(nn.Linear(5, 3), loss=loss)
    assert message.startswith(f"the loss ({loss.__name__}): {needs}, which has no ONNX form. ")
    assert "cross_entropy, binary_cross_entropy, mse" in message
    assert message.count("ONNX") == 1


class Counting(nn.Module):
    """Adds the number of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.calls


class Remembering(nn.Module):
    """Its state is the last batch's last one."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.state = nn.GRUCell(5, 5), torch.zeros(1, 5)

    def forward(self, x: Tensor) -> Tensor:
        after = self.cell(x, self.state.expand(x.shape[0], -1))
        self.state = after[-1:].detach()
        return after


class Shaken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * random.random()


@pytest.mark.parametrize(
    ("layer", "named"),
    [(Counting(), "1 (Counting)"), (Remembering(), "1.cell (GRUCell)"), (Shaken(), "1 (Shaken)")],
    ids=["a counter", "a state", "Python's random numbers"],
)
def test_what_is_kept_in_an_attribute_or_drawn_elsewhere_would_be_a_constant(layer: nn.Module, named: str) -> None:
    message = refusal(nn.Sequential(nn.Linear(5, 5), layer, nn.Linear(5, 3)))
    assert message.startswith(f"{named}: its output is another when it is run again on the same inputs. ")
    assert "inputs of the model, or remove them" in message


class Showing(nn.Module):
    """Keeps what it computed last, for whoever wants to look, and reads it nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.shown = self.last(x)
        return self.shown


@pytest.mark.parametrize("ran_before", [False, True])
def test_a_model_may_keep_what_it_computed(ran_before: bool) -> None:
    torch.manual_seed(0)
    model = Showing()
    if ran_before:
        model(VECTOR[None])
    step = capture(TrainingSpec(model, "cross_entropy", [VECTOR], CLASS), "example", 4)
    x = torch.randn(4, 5)
    values = [p.value for p in step.parameters]
    torch.testing.assert_close(step.predict(*values, x), model.last(x))


def test_the_line_of_the_users_code_is_named_and_nothing_else_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    class Foreign(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.from_numpy(x.numpy() * 2)

    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("not today")

    for layer in (Branch(), Foreign(), Failing()):
        assert re.search(r" \(test_refusals\.py, line \d+\)\. ", refusal(Model(layer)))
    assert capfd.readouterr() == ("", "")


def test_a_spec_of_other_types() -> None:
    message = refusal(nn.Linear)  # type: ignore[arg-type]
    assert message == "model is the class Linear: give an instance of torch.nn.Module"
    message = refusal(nn.Linear(5, 3), frozen="weight")
    assert message == "frozen is 'weight': give a list of names of parameters, or of layers, as strings"
    message = refusal(nn.Sequential(nn.Linear(5, 3)), local=[0])
    assert message == "local is [0]: give a list of names of parameters, or of layers, as strings"


@pytest.mark.parametrize("vocabulary", [0, -1, "9", True])
def test_a_vocabulary_that_is_no_number_from_one(vocabulary: Any) -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(16, 3))
    assert refusal(model, TOKENS, vocabulary=vocabulary).startswith(f"vocabulary is {vocabulary!r}: integer inputs lie")


def test_a_vocabulary_beyond_the_embedding() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(16, 3))
    assert refusal(model, TOKENS, vocabulary=1000) == (
        "the model fails on random inputs, integers in [0, 1000): index out of range in self; the spec's `vocabulary` "
        "says below what they lie"
    )


def test_one_class_for_cross_entropy() -> None:
    message = refusal(nn.Linear(5, 1))
    assert message.startswith("cross_entropy: the output has one class, so that every loss is 0: ")
    assert message.endswith("or use binary_cross_entropy")


def test_a_model_without_values() -> None:
    message = refusal(nn.Sequential(nn.LazyLinear(3)))
    assert message.startswith("0.weight has no shape yet, for its layer is a lazy one: run the model once on a batch")
    assert refusal(nn.Linear(5, 3, device="meta")) == "weight is on meta: move the model to the CPU, model.cpu()"


def test_an_output_whose_first_axis_is_not_the_batch() -> None:
    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.last = nn.GRU(6, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.gru(x)[0][-1])

    message = refusal(TimeFirst(), torch.zeros(7, 6))
    assert message.startswith("the model's output is (7, 3) for a batch of 4: the batch must be its first axis")
    assert "batch_first=True" in message


def test_an_empty_batch_size() -> None:
    with pytest.raises(UnsupportedModelError, match="batch of 0"):
        capture(TrainingSpec(nn.Linear(5, 3), "cross_entropy", [VECTOR], CLASS), "example", 0)
