"""Our clipped sums in ONNX Runtime equal those from Opacus's per-example gradients, for every layer that it serves.

Opacus (Yousefpour et al. 2021, arXiv:2109.12298) is what PyTorch's users clip with today, and its rules for the layers
are written independently of ours. Its `grad_sample` is taken in float64, clipped and summed here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")
pytest.importorskip("opacus")

from opacus.grad_sample import GradSampleModule  # noqa: E402
from opacus.layers import DPRNN  # noqa: E402
from opacus.validators import ModuleValidator  # noqa: E402
from oracle import (  # noqa: E402
    LOSSES,
    ROUNDING,
    TOLERANCE,
    Batch,
    Runner,
    as_dtype,
    draw_batch,
    feeds_of,
    middle_clip,
    onnx_of,
    paths,
    run_onnx,
)
from torch import Tensor, nn  # noqa: E402
from zoo import SIZE, ZOO, captured  # noqa: E402

from export.graph import CapturedStep, TrainingSpec, capture  # noqa: E402

pytestmark = [
    # Opacus hooks every layer; the first has an input without a gradient.
    pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients are computed:UserWarning"),
    pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning"),
]

CLASS = torch.zeros((), dtype=torch.long)
PARTS = ("qlinear", "klinear", "vlinear")


def opacus_gradients(spec: TrainingSpec, batch: Batch, batch_first: bool = True) -> dict[str, Tensor]:
    """Parameter -> (B, *shape) float64.  batch_first: where every layer has the examples; else they are second.

    Opacus replaces recurrent layers and attention by its own, with PyTorch's weights (`ModuleValidator.fix`). Its
    recurrent layers keep PyTorch's names; its attention has three projections where PyTorch has one.
    """
    assert isinstance(spec.loss, str)
    model = ModuleValidator.fix(copy.deepcopy(spec.model))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and not name.startswith(tuple(spec.frozen)))
    for parent in model.modules():
        for name, child in parent.named_children():
            if type(child) is nn.RNN:  # which `fix` forgets
                setattr(parent, name, DPRNN(child.input_size, child.hidden_size, batch_first=child.batch_first))
                getattr(parent, name).load_state_dict(child.state_dict())
    assert not ModuleValidator.validate(model.double().train())
    wrapped = GradSampleModule(model, batch_first=batch_first, loss_reduction="sum")
    output = wrapped(*(as_dtype(x, torch.float64) for x in batch.inputs))
    loss, labels = LOSSES[spec.loss], as_dtype(batch.labels, torch.float64)
    torch.stack([loss(output[i : i + 1], labels[i : i + 1]) for i in range(len(labels))]).sum().backward()
    found = {name: p.grad_sample for name, p in wrapped._module.named_parameters() if p.requires_grad}
    for name in [name for name in found if f"{PARTS[0]}." in name]:
        packed = name.replace(f"{PARTS[0]}.", "in_proj_")
        found[packed] = torch.cat([found.pop(name.replace(PARTS[0], part)) for part in PARTS], 1)
    assert {len(g) for g in found.values()} == {len(labels)}
    return found


def assert_equal_to_opacus(spec: TrainingSpec, step: CapturedStep, run: Runner, batch_first: bool = True) -> None:
    """Each tensor of the clipped sum, of a batch of which some examples are clipped and one is masked out."""
    batch = draw_batch(spec, step, SIZE)
    theirs = opacus_gradients(spec, batch, batch_first)
    assert theirs.keys() == {p.name for p in step.parameters if p.role == "shared"}
    norms = torch.stack([g.reshape(SIZE, -1).square().sum(1) for g in theirs.values()]).sum(0).sqrt()
    clip = float(torch.tensor(middle_clip(norms, batch.mask)))  # what float32 makes of it
    weights = batch.mask.double() * (clip / norms).clamp(max=1.0)
    assert 0 < int((batch.mask * (norms > clip)).sum()) < int(batch.mask.sum())
    found = run(feeds_of(step, batch, clip=clip))
    wanted = {name: torch.tensordot(weights, g, 1) for name, g in theirs.items()}
    assert_close({name: found[f"grad.{name}"] for name in wanted}, wanted)
    assert float(found["clipped"]) == float((batch.mask * (norms > clip)).sum())


def assert_close(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    everything = float(torch.stack([w.norm() for w in wanted.values()]).norm())
    for name, w in wanted.items():
        assert found[name].shape == w.shape, name
        # A tensor whose gradient is zero but for rounding, as an attention's key bias, has no norm to compare with.
        allowed = max(TOLERANCE * float(w.norm()), ROUNDING * everything)
        assert float((found[name].double() - w).norm()) <= allowed, name


@pytest.mark.parametrize("name", ZOO)
def test_every_model_of_the_zoo(name: str) -> None:
    spec, step, _, run = captured(name)
    assert_equal_to_opacus(spec, step, run)


class First(nn.Module):
    """The states of a recurrent layer, without the last one."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class SideBySide(nn.Module):
    """A layer, then several others side by side on its output, then a classifier of all of theirs.

    One capture serves them all, and a tensor's name says which of them differs.
    """

    def __init__(self, first: nn.Module, layers: Mapping[str, nn.Module], x: Tensor) -> None:
        super().__init__()
        self.first, self.layers = first, nn.ModuleDict(layers)
        self.last = nn.Linear(self._features(x[None]).shape[1], 3)

    def _features(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return torch.cat([layer(h).flatten(1).tanh() for layer in self.layers.values()], 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self._features(x))


def on_vectors() -> tuple[nn.Module, Tensor, dict[str, nn.Module]]:
    return nn.Linear(6, 6), torch.zeros(6), {"linear": nn.Linear(6, 5), "no_bias": nn.Linear(6, 5, bias=False)}


def on_sequences() -> tuple[nn.Module, Tensor, dict[str, nn.Module]]:
    layers = {
        "linear": nn.Linear(6, 5),
        "no_bias": nn.Linear(6, 5, bias=False),
        "layer_norm": nn.LayerNorm(6),
        "layer_norm_over_two_axes": nn.LayerNorm((4, 6)),
        "rms_norm": nn.RMSNorm(6, eps=1e-5),
    }
    return nn.Linear(6, 6), torch.zeros(4, 6), layers


def on_signals() -> tuple[nn.Module, Tensor, dict[str, nn.Module]]:
    layers = {
        "plain": nn.Conv1d(4, 5, 3),
        "all_options": nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2),
        "depthwise": nn.Conv1d(4, 4, 3, padding=1, groups=4, bias=False),
        "group_norm": nn.GroupNorm(2, 4),
        "instance_norm": nn.InstanceNorm1d(4, affine=True),
    }
    return nn.Conv1d(4, 4, 1), torch.zeros(4, 11), layers


def on_images() -> tuple[nn.Module, Tensor, dict[str, nn.Module]]:
    layers = {
        "plain": nn.Conv2d(4, 5, 3),
        "stride": nn.Conv2d(4, 5, 3, stride=(2, 3)),
        "padding": nn.Conv2d(4, 5, (3, 2), padding=(2, 1)),
        "same": nn.Conv2d(4, 5, (3, 2), padding="same"),
        "dilation": nn.Conv2d(4, 5, 3, dilation=(2, 1)),
        "groups": nn.Conv2d(4, 6, 3, groups=2, bias=False),
        "depthwise": nn.Conv2d(4, 8, 3, padding=1, groups=4),
        "all_options": nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2),
        "linear": nn.Linear(7, 5),
        "group_norm": nn.GroupNorm(2, 4),
        "instance_norm": nn.InstanceNorm2d(4, affine=True),
        "layer_norm": nn.LayerNorm((8, 7)),
    }
    return nn.Conv2d(4, 4, 1), torch.zeros(4, 8, 7), layers


def on_steps() -> tuple[nn.Module, Tensor, dict[str, nn.Module]]:
    layers = {
        "gru": First(nn.GRU(6, 5, batch_first=True)),
        "lstm": First(nn.LSTM(6, 5, batch_first=True)),
        "rnn": First(nn.RNN(6, 5, batch_first=True)),
        "deep": First(nn.GRU(6, 3, 2, batch_first=True, bidirectional=True)),
    }
    return nn.Linear(6, 6), torch.zeros(3, 6), layers


@pytest.mark.parametrize("make", [on_vectors, on_sequences, on_signals, on_images, on_steps])
def test_layers_with_their_options(make: Callable[[], tuple[nn.Module, Tensor, dict[str, nn.Module]]]) -> None:
    torch.manual_seed(0)
    first, x, layers = make()
    check(SideBySide(first, layers, x), x)


def test_embedding() -> None:
    """Without `padding_idx`: Opacus 1.6 gives that row a gradient, PyTorch and we do not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 6), nn.LayerNorm(6), nn.Flatten(), nn.Linear(30, 3))
    check(model, torch.zeros(5, dtype=torch.long))


class Attend(nn.Module):
    """Self-attention between two linear layers, steps before examples throughout; scores for every step."""

    def __init__(self, causal: bool, bias: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)
        self.attention, self.causal = nn.MultiheadAttention(6, 2, bias=bias), causal

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.transpose(0, 1))
        mask = torch.ones(len(h), len(h), dtype=torch.bool).triu(1) if self.causal else None
        return self.last(self.attention(h, h, h, need_weights=False, attn_mask=mask)[0]).transpose(0, 1)


@pytest.mark.parametrize(("causal", "bias"), [(False, True), (True, False)])
def test_attention_with_the_steps_first(causal: bool, bias: bool) -> None:
    """With the examples first, the output of Opacus 1.6's attention is not PyTorch's if it has several heads."""
    torch.manual_seed(0)
    check(Attend(causal, bias), torch.zeros(5, 6), y=torch.zeros(5, dtype=torch.long), batch_first=False)


@pytest.mark.parametrize("loss", ["binary_cross_entropy", "mse"])
def test_losses(loss: str) -> None:
    torch.manual_seed(0)
    check(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), torch.zeros(6), loss, torch.zeros(3))


def check(
    model: nn.Module, x: Tensor, loss: str = "cross_entropy", y: Tensor = CLASS, batch_first: bool = True
) -> None:
    spec = TrainingSpec(model, loss, [x], y)
    step = capture(spec, "example", SIZE)
    assert set(paths(step).values()) == {"fast"}
    assert_equal_to_opacus(spec, step, run_onnx(onnx_of(step)), batch_first)
