"""Each layer with its options: clipped sums of per-example gradients equal a float64 loop over the examples."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")
pytest.importorskip("executorch")

from oracle import check, paths  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from export.graph import TrainingSpec  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

CLASS = torch.zeros((), dtype=torch.long)
FRAMES = torch.zeros(3, 2, 6, 5)
ON_THE_FALLBACK = (
    "bilinear", "weight_norm", "a weight computed", "divided by", "learned", "with a factor", "from the other side",
    "two tables",
)  # fmt: skip


class Then(nn.Module):
    """A trainable layer, the layer under test, and a linear classifier: gradients pass through all three."""

    def __init__(
        self, first: nn.Module, layer: nn.Module, example: Tensor, pick: Callable[[Any], Tensor] | None = None
    ):
        super().__init__()
        self.first, self.layer, self.pick = first, layer, pick
        self.last = nn.Linear(self._features(example[None]).shape[1], 3)

    def _features(self, x: Tensor) -> Tensor:
        h = self.layer(self.first(x))
        return (h if self.pick is None else self.pick(h)).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self._features(x))


def on_images(layer: nn.Module, channels: int = 4, size: tuple[int, int] = (8, 7)) -> TrainingSpec:
    x = torch.zeros(2, *size)
    return TrainingSpec(Then(nn.Conv2d(2, channels, 1), layer, x), "cross_entropy", [x], CLASS)


def on_signals(layer: nn.Module, channels: int = 4, size: int = 11) -> TrainingSpec:
    x = torch.zeros(2, size)
    return TrainingSpec(Then(nn.Conv1d(2, channels, 1), layer, x), "cross_entropy", [x], CLASS)


def on_vectors(layer: nn.Module, width: int = 6) -> TrainingSpec:
    x = torch.zeros(5)
    return TrainingSpec(Then(nn.Linear(5, width), layer, x), "cross_entropy", [x], CLASS)


def on_sequences(layer: nn.Module, shape: tuple[int, ...] = (4, 6), pick: Any = None) -> TrainingSpec:
    """(B, 4, 6) by default: as many steps as examples, so that shapes alone do not tell the axes apart."""
    x = torch.zeros(*shape)
    return TrainingSpec(Then(nn.Linear(shape[-1], shape[-1]), layer, x, pick), "cross_entropy", [x], CLASS)


def on_tokens(layer: nn.Module, length: int = 5) -> TrainingSpec:
    x = torch.zeros(length, dtype=torch.long)
    return TrainingSpec(Then(nn.Identity(), layer, x), "cross_entropy", [x], CLASS)


class Apply(nn.Module):
    """A function of the input and of named parameters."""

    def __init__(self, function: Callable[..., Tensor], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.rand(shape) + 0.5))
        self.names = list(shapes)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *(getattr(self, name) for name in self.names))


class Attend(nn.Module):
    """nn.MultiheadAttention over its input, with the options that a call takes."""

    def __init__(self, width: int = 6, mask: str | None = None, weights: bool = False, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, **options)
        self.mask, self.weights = mask, weights

    def forward(self, x: Tensor) -> Tensor:
        if not self.attention.batch_first:
            x = x.transpose(0, 1)
        steps = x.shape[1] if self.attention.batch_first else x.shape[0]
        calls: dict[str, Any] = {"need_weights": self.weights}
        if self.mask == "causal":
            calls |= {"attn_mask": torch.ones(steps, steps, dtype=torch.bool).triu(1), "is_causal": True}
        elif self.mask == "float":
            calls["attn_mask"] = torch.arange(steps * steps, dtype=torch.float32).reshape(steps, steps) / 10
        elif self.mask == "padding":
            rows = x if self.attention.batch_first else x.transpose(0, 1)
            calls["key_padding_mask"] = rows[:, :, 0] > 0.8
        attended, _ = self.attention(x, x, x, **calls)
        return attended if self.attention.batch_first else attended.transpose(0, 1)


class CrossAttend(nn.Module):
    """Queries of one kind, keys and values of others: the packed projection is used in slices."""

    def __init__(self, same_keys: bool, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 3, batch_first=True, **options)
        self.same_keys = same_keys

    def forward(self, x: Tensor) -> Tensor:
        keys = x.tanh()
        return self.attention(x[:, :2], keys, keys if self.same_keys else x.cos(), need_weights=False)[0]


class Sdpa(nn.Module):
    """scaled_dot_product_attention on three projections."""

    def __init__(self, mask: str | None = None, **options: Any) -> None:
        super().__init__()
        self.project = nn.Linear(6, 18)
        self.mask, self.options = mask, options

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).reshape(*x.shape[:2], 3, 2, 3).permute(2, 0, 3, 1, 4).unbind(0)
        options = dict(self.options)
        if self.mask == "data":
            options["attn_mask"] = (x[:, :, 0] > -0.3)[:, None, None, :]
        elif self.mask == "nothing to see":
            options["attn_mask"] = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(-1)
        elif self.mask == "minus infinity":
            options["attn_mask"] = torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v, **options)
        return y.transpose(1, 2).flatten(2)


class ClassToken(nn.Module):
    """A learned token before every sequence, and learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.positions = nn.Parameter(torch.randn(1, 5, 6))

    def forward(self, x: Tensor) -> Tensor:
        y = (torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions).tanh()
        return y[:, 0] * y[:, 1:].mean(1)


class LearnedState(nn.Module):
    """A GRU whose first state is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(1, 1, 5))
        self.gru = nn.GRU(6, 5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x, self.start.expand(-1, x.shape[0], -1).contiguous())[0]


class LearnedQueries(nn.Module):
    """Attention of learned queries over the input, with a learned bias on the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, 1, 3, 6))
        self.bias = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        q = self.queries.expand(x.shape[0], -1, -1, -1)
        return nn.functional.scaled_dot_product_attention(q, x[:, None], x[:, None], attn_mask=self.bias)


class TwoTables(nn.Module):
    """A sum of token and position embeddings, as in a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(9, 4), nn.Embedding(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.tokens(x) + self.positions(torch.arange(x.shape[1]))


class Tied(nn.Module):
    """One table for the tokens and for the scores, used from both sides and as a second embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.scores = nn.Linear(4, 9, bias=False)
        self.scores.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(self.table(x).tanh() + self.table(x.flip(1)).sin())


class Frames(nn.Module):
    """A video as a batch of frames: the examples are the slow factor of the first axis."""

    def __init__(self, frames: nn.Module, last: bool = False) -> None:
        super().__init__()
        self.frames, self.last = frames, last

    def forward(self, x: Tensor) -> Tensor:
        if self.last:  # and here the fast one
            y = self.frames(x.transpose(0, 1).flatten(0, 1))
            return y.unflatten(0, (x.shape[1], x.shape[0])).transpose(0, 1)
        return self.frames(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class TimeFirst(nn.Module):
    """Steps before examples, as recurrent layers have them by default."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x.transpose(0, 1))
        return (y[0] if isinstance(y, tuple) else y).transpose(0, 1)


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x + self.inner(x), x - 2 * self.inner(x)], 1)


class Twice(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inner(x).tanh() + x)


def first(pair: tuple[Tensor, ...]) -> Tensor:
    return pair[0]


def straight_through(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


def overwrite(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0] = 0
    y += 1
    return y.relu_()


class Windows(nn.Module):
    """A recurrent layer over one step, whose batch is windows of examples with the examples as the fast factor."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(6, 5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.gru(x.transpose(0, 1).flatten(0, 1)[:, None])
        return y[:, 0].unflatten(0, (x.shape[1], x.shape[0])).transpose(0, 1)


class Cells(nn.Module):
    """Recurrent cells, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.rnn, self.lstm = nn.GRUCell(6, 5), nn.RNNCell(5, 4), nn.LSTMCell(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        g, r, state = None, None, None
        for step in x.unbind(1):
            g = self.gru(step, g)
            r = self.rnn(g, r)
            state = self.lstm(r, state)
        return torch.cat([*state, r], 1)


def settled(norm: nn.Module) -> nn.Module:
    """A BatchNorm with statistics of its own, in evaluation mode."""
    generator = torch.Generator().manual_seed(3)
    norm.running_mean = torch.randn(norm.num_features, generator=generator)
    norm.running_var = torch.rand(norm.num_features, generator=generator) + 0.5
    return norm.eval()


CASES: dict[str, Callable[[], TrainingSpec]] = {
    "linear, 2-d": lambda: on_vectors(nn.Linear(6, 4)),
    "linear, 2-d, no bias": lambda: on_vectors(nn.Linear(6, 4, bias=False)),
    "linear, 3-d": lambda: on_sequences(nn.Linear(6, 5)),
    "linear, 3-d, no bias": lambda: on_sequences(nn.Linear(6, 5, bias=False)),
    "linear, 3-d, formed gradients": lambda: on_sequences(nn.Linear(3, 2), (9, 3)),
    "linear, 4-d": lambda: on_sequences(nn.Linear(6, 4), (4, 2, 6)),
    "linear, one feature": lambda: on_vectors(nn.Linear(6, 1)),
    "linear, time first": lambda: on_sequences(TimeFirst(nn.Linear(6, 4))),
    "linear, flattened steps": lambda: on_sequences(Frames(nn.Linear(6, 4))),
    "linear, flattened steps, examples fast": lambda: on_sequences(Frames(nn.Linear(6, 4), last=True)),
    "linear, used twice": lambda: on_vectors(Twice(nn.Linear(6, 6))),
    "linear, used twice on sequences": lambda: on_sequences(Twice(nn.Linear(6, 6))),
    "bilinear": lambda: on_vectors(Apply(lambda x, w: torch.einsum("bi,oij,bj->bo", x, w, x.tanh()), w=(3, 6, 6))),
    "conv2d": lambda: on_images(nn.Conv2d(4, 3, 3)),
    "conv2d, no bias, not square": lambda: on_images(nn.Conv2d(4, 3, (3, 2), bias=False)),
    "conv2d, stride that leaves a rest": lambda: on_images(nn.Conv2d(4, 3, 3, stride=(2, 3))),
    "conv2d, padding": lambda: on_images(nn.Conv2d(4, 3, (3, 5), padding=(1, 3))),
    "conv2d, same": lambda: on_images(nn.Conv2d(4, 3, 3, padding="same", dilation=(1, 2))),
    "conv2d, same, uneven": lambda: on_images(nn.Conv2d(4, 3, (2, 4), padding="same")),
    "conv2d, valid": lambda: on_images(nn.Conv2d(4, 3, 3, padding="valid")),
    "conv2d, dilation": lambda: on_images(nn.Conv2d(4, 3, 3, dilation=(2, 1), padding=2)),
    "conv2d, stride and dilation": lambda: on_images(nn.Conv2d(4, 3, 2, stride=2, dilation=(3, 2), padding=1)),
    "conv2d, groups": lambda: on_images(nn.Conv2d(4, 6, 3, groups=2, padding=1)),
    "conv2d, depthwise": lambda: on_images(nn.Conv2d(4, 4, 3, groups=4, padding=1, stride=2)),
    "conv2d, depthwise, dilation": lambda: on_images(nn.Conv2d(4, 4, (3, 2), groups=4, dilation=2, bias=False)),
    "conv2d, depthwise, multiplier": lambda: on_images(nn.Conv2d(4, 8, 3, groups=4)),
    "conv2d, pointwise": lambda: on_images(nn.Conv2d(4, 8, 1)),
    "conv2d, pointwise, stride": lambda: on_images(nn.Conv2d(4, 8, 1, stride=2)),
    "conv2d, pointwise, padding": lambda: on_images(nn.Conv2d(4, 3, 1, padding=1)),
    "conv2d, one channel": lambda: on_images(nn.Conv2d(1, 3, 3), channels=1),
    "conv2d, kernel as large as the image": lambda: on_images(nn.Conv2d(4, 3, (8, 7))),
    "conv2d, reflecting padding": lambda: on_images(nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect")),
    "conv2d, used twice": lambda: on_images(Twice(nn.Conv2d(4, 4, 3, padding=1))),
    "conv2d, pointwise, used twice": lambda: on_images(Twice(nn.Conv2d(4, 4, 1))),
    "conv2d, frames": lambda: TrainingSpec(
        Then(nn.Identity(), Frames(nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 1))), FRAMES),
        "cross_entropy", [FRAMES], CLASS),
    "conv2d, frames, examples fast": lambda: TrainingSpec(
        Then(nn.Identity(), Frames(nn.Conv2d(2, 3, 3), last=True), FRAMES), "cross_entropy", [FRAMES], CLASS),
    "conv1d": lambda: on_signals(nn.Conv1d(4, 3, 3)),
    "conv1d, stride, padding, dilation": lambda: on_signals(nn.Conv1d(4, 3, 3, stride=2, padding=3, dilation=2)),
    "conv1d, same, uneven": lambda: on_signals(nn.Conv1d(4, 3, 4, padding="same")),
    "conv1d, groups, no bias": lambda: on_signals(nn.Conv1d(4, 6, 3, groups=2, bias=False)),
    "conv1d, depthwise": lambda: on_signals(nn.Conv1d(4, 4, 5, groups=4, padding=2)),
    "conv1d, pointwise": lambda: on_signals(nn.Conv1d(4, 8, 1)),
    "embedding": lambda: on_tokens(nn.Embedding(7, 4)),
    "embedding, padding": lambda: on_tokens(nn.Embedding(4, 3, padding_idx=1)),
    "embedding, of one token": lambda: on_tokens(nn.Embedding(7, 4), length=1),
    "embedding, two tables": lambda: on_tokens(TwoTables()),
    "embedding, tied to the scores": lambda: on_tokens(Tied()),
    "embedding, time first": lambda: on_tokens(TimeFirst(nn.Embedding(7, 4)), length=4),
    "layer norm": lambda: on_sequences(nn.LayerNorm(6)),
    "layer norm, two axes": lambda: on_sequences(nn.LayerNorm((4, 6))),
    "layer norm, plain": lambda: on_sequences(nn.LayerNorm(6, elementwise_affine=False)),
    "layer norm, no bias": lambda: on_vectors(nn.LayerNorm(6, bias=False)),
    "layer norm, flattened steps": lambda: on_sequences(Frames(nn.LayerNorm(6))),
    "layer norm, time first": lambda: on_sequences(TimeFirst(nn.LayerNorm(6))),
    "group norm": lambda: on_images(nn.GroupNorm(2, 4)),
    "group norm, plain": lambda: on_images(nn.GroupNorm(4, 4, affine=False)),
    "group norm, vectors": lambda: on_vectors(nn.GroupNorm(3, 6)),
    "group norm, signals": lambda: on_signals(nn.GroupNorm(1, 4, eps=1e-3)),
    "group norm, frames": lambda: TrainingSpec(
        Then(nn.Identity(), Frames(nn.GroupNorm(1, 2)), torch.zeros(4, 2, 3, 5)),
        "cross_entropy", [torch.zeros(4, 2, 3, 5)], CLASS),
    "rms norm": lambda: on_sequences(nn.RMSNorm(6)),
    "rms norm, two axes": lambda: on_sequences(nn.RMSNorm((4, 6), eps=1e-4)),
    "rms norm, plain": lambda: on_vectors(nn.RMSNorm(6, elementwise_affine=False)),
    "instance norm": lambda: on_images(nn.InstanceNorm2d(4)),
    "instance norm, affine": lambda: on_images(nn.InstanceNorm2d(4, affine=True)),
    "instance norm, channels last after it": lambda: on_images(
        nn.Sequential(nn.InstanceNorm2d(4, affine=True), nn.ELU(), Apply(lambda x: x.flatten(2).transpose(1, 2)))),
    "instance norm, signals": lambda: on_signals(nn.InstanceNorm1d(4, affine=True)),
    "batch norm, fixed": lambda: on_images(settled(nn.BatchNorm2d(4))),
    "batch norm, fixed, signals": lambda: on_signals(settled(nn.BatchNorm1d(4))),
    "batch norm, fixed, vectors, plain": lambda: on_vectors(settled(nn.BatchNorm1d(6, affine=False))),
    "scale, shift": lambda: on_sequences(Apply(lambda x, a, b: x * a + b, a=(6,), b=(6,))),
    "scale, shift of one number": lambda: on_sequences(Apply(lambda x, a, b: a * x + b, a=(), b=(1,))),
    "scale, shift by step": lambda: on_sequences(Apply(lambda x, a, b: x * a - b, a=(4, 1), b=(4, 6))),
    "scale, shift with leading ones": lambda: on_sequences(Apply(lambda x, a, b: b + x * a, a=(1, 1, 6), b=(1, 4, 1))),
    "scale that widens": lambda: on_vectors(Apply(lambda x, a: x[:, :, None] * a, a=(4,))),
    "scale that widens before the batch": lambda: on_vectors(Apply(lambda x, a: (x * a).sum(0), a=(3, 1, 6))),
    "shift, time first": lambda: on_sequences(TimeFirst(Apply(lambda x, a: (x + a).tanh(), a=(4, 1, 6)))),
    "shift, flattened steps": lambda: on_sequences(Frames(Apply(lambda x, a: (x + a).tanh(), a=(6,)))),
    "shift by a view": lambda: on_sequences(Apply(lambda x, a: (x + a[:4]).tanh(), a=(9, 6))),
    "shift with a factor": lambda: on_vectors(Apply(lambda x, a: torch.add(x, a, alpha=3).tanh(), a=(6,))),
    "shift from the other side": lambda: on_vectors(Apply(lambda x, a, b: (a - x) * (1 - b), a=(6,), b=(6,))),
    "two shifts in a row": lambda: on_vectors(Apply(lambda x, a, b: (x + a + b).tanh(), a=(6,), b=(6,))),
    "divided by": lambda: on_vectors(Apply(lambda x, a: x / a, a=(6,))),
    "a power, divided by": lambda: on_vectors(Apply(lambda x, a: x.abs() ** a, a=(6,))),
    "product on the right": lambda: on_sequences(Apply(lambda x, w: x @ w, w=(6, 3))),
    "product on both sides": lambda: on_sequences(Apply(lambda x, w: (x @ w).tanh() @ w.t(), w=(6, 3))),
    "views that overlap": lambda: on_vectors(Apply(lambda x, w: x[:, :3] @ w[:3] + x[:, 3:] @ w[1:], w=(4, 5))),
    "views that do not overlap": lambda: on_vectors(Apply(lambda x, w: x @ w[:, :2] @ w[:2, 2:], w=(6, 5))),
    "views of three kinds": lambda: on_vectors(
        Apply(lambda x, w: (x @ w).tanh() @ w.transpose(0, 1)[:, :4] + w.reshape(-1)[5:9], w=(6, 5))),
    "a view by split": lambda: on_vectors(Apply(lambda x, w: x @ w.split(2, 1)[1] + w.unbind(0)[2][:2], w=(6, 5))),
    "a weight computed": lambda: on_vectors(Apply(lambda x, w: x @ w.exp(), w=(6, 3))),
    "a weight computed of two": lambda: on_vectors(Apply(lambda x, v, w: x @ torch.cat([v, w], 1), v=(6, 2), w=(6, 1))),
    "a stopped weight": lambda: on_vectors(Apply(lambda x, v, w: x @ v + x @ w.detach(), v=(6, 3), w=(6, 3))),
    "weight_norm": lambda: on_vectors(nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))),
    "attention": lambda: on_sequences(Attend(batch_first=True)),
    "attention, time first": lambda: on_sequences(Attend()),
    "attention, with weights": lambda: on_sequences(Attend(weights=True)),
    "attention, no bias": lambda: on_sequences(Attend(batch_first=True, bias=False)),
    "attention, causal": lambda: on_sequences(Attend(batch_first=True, mask="causal")),
    "attention, float mask": lambda: on_sequences(Attend(mask="float")),
    "attention, padding": lambda: on_sequences(Attend(batch_first=True, mask="padding")),
    "attention, extra key, learned": lambda: on_sequences(Attend(batch_first=True, add_bias_kv=True)),
    "attention, cross, keys are values": lambda: on_sequences(CrossAttend(True)),
    "attention, cross, three kinds": lambda: on_sequences(CrossAttend(False)),
    "attention, other widths": lambda: on_sequences(CrossAttend(False, kdim=6, vdim=6, bias=False)),
    "sdpa": lambda: on_sequences(Sdpa()),
    "sdpa, causal, scale": lambda: on_sequences(Sdpa(is_causal=True, scale=0.3)),
    "sdpa, mask of the data": lambda: on_sequences(Sdpa("data")),
    "sdpa, a query that sees nothing": lambda: on_sequences(Sdpa("nothing to see")),
    "sdpa, minus infinity": lambda: on_sequences(Sdpa("minus infinity")),
    "learned queries and score bias": lambda: on_sequences(LearnedQueries()),
    "transformer layer": lambda: on_sequences(nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True)),
    "transformer layer, time first": lambda: on_sequences(TimeFirst(nn.TransformerEncoderLayer(6, 3, 8, 0.0))),
    "learned token and positions": lambda: on_sequences(ClassToken()),
    "gru": lambda: on_sequences(nn.GRU(6, 5, batch_first=True), pick=first),
    "gru, last state": lambda: on_sequences(nn.GRU(6, 5, batch_first=True), pick=lambda y: y[1][-1]),
    "gru, time first": lambda: on_sequences(TimeFirst(nn.GRU(6, 5))),
    "gru, two layers, both ways": lambda: on_sequences(
        nn.GRU(6, 3, 2, batch_first=True, bidirectional=True), pick=first),
    "gru, no bias": lambda: on_sequences(nn.GRU(6, 5, bias=False, batch_first=True), pick=first),
    "gru, one step": lambda: on_sequences(nn.GRU(6, 5, batch_first=True), (1, 6), first),
    "gru, one step, examples fast": lambda: on_sequences(
        Windows(), (3, 6)),
    "gru, learned state": lambda: on_sequences(LearnedState()),
    "recurrent cells": lambda: on_sequences(Cells()),
    "lstm": lambda: on_sequences(nn.LSTM(6, 4, batch_first=True), pick=first),
    "lstm, last cell": lambda: on_sequences(nn.LSTM(6, 4, batch_first=True), pick=lambda y: y[1][1][0]),
    "lstm, two layers, both ways, no bias": lambda: on_sequences(
        nn.LSTM(6, 3, 2, bias=False, batch_first=True, bidirectional=True), pick=first),
    "lstm, time first": lambda: on_sequences(TimeFirst(nn.LSTM(6, 4))),
    "rnn": lambda: on_sequences(nn.RNN(6, 4, 2, batch_first=True), pick=first),
    "rnn, relu, both ways": lambda: on_sequences(
        nn.RNN(6, 4, nonlinearity="relu", bidirectional=True, batch_first=True), pick=first),
    "max pool": lambda: on_images(nn.MaxPool2d(2)),
    "max pool, overlapping": lambda: on_images(nn.MaxPool2d(3, 2)),
    "max pool, padding": lambda: on_images(nn.MaxPool2d((3, 2), (2, 1), (1, 1))),
    "max pool, dilation": lambda: on_images(nn.MaxPool2d(2, dilation=(3, 2), stride=1)),
    "max pool, stride past the window": lambda: on_images(nn.MaxPool2d(2, 3)),
    "max pool, ties": lambda: on_images(nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 2, 1))),
    "max pool, signals": lambda: on_signals(nn.MaxPool1d(3, 2, 1)),
    "max pool, no channels": lambda: on_sequences(nn.MaxPool1d(2)),
    "average pool": lambda: on_images(nn.AvgPool2d(2)),
    "average pool, overlapping": lambda: on_images(nn.AvgPool2d(3, (2, 1), 1)),
    "average pool, divisor": lambda: on_images(nn.AvgPool2d(2, divisor_override=3)),
    "average pool, signals": lambda: on_signals(nn.AvgPool1d(3, 2, 1)),
    "adaptive pool": lambda: on_images(nn.AdaptiveAvgPool2d((2, 1)), size=(8, 7)),
    "adaptive pool, one side kept": lambda: on_images(nn.AdaptiveAvgPool2d((None, 7))),
    "adaptive pool, signals": lambda: on_signals(nn.AdaptiveAvgPool1d(3), size=12),
    "adaptive max pool": lambda: on_images(nn.AdaptiveMaxPool2d((4, 1)), size=(8, 7)),
    "adaptive max pool, signals": lambda: on_signals(nn.AdaptiveMaxPool1d(3), size=12),
    "adaptive max pool, no channels": lambda: on_sequences(nn.AdaptiveMaxPool1d(2)),
    "upsample": lambda: on_images(nn.Upsample(scale_factor=2), size=(3, 2)),
    "upsample to a size that is no multiple": lambda: on_images(nn.Upsample((5, 3)), size=(3, 2)),
    "upsample, exactly nearest": lambda: on_images(nn.Upsample((5, 3), mode="nearest-exact"), size=(3, 2)),
    "upsample, bilinear": lambda: on_images(nn.Upsample(scale_factor=(2, 1.5), mode="bilinear"), size=(3, 2)),
    "upsample, bilinear, corners": lambda: on_images(
        nn.Upsample((5, 3), mode="bilinear", align_corners=True), size=(3, 2)),
    "upsample, bicubic": lambda: on_images(nn.Upsample(scale_factor=2, mode="bicubic"), size=(3, 2)),
    "downsample, bilinear": lambda: on_images(nn.Upsample(scale_factor=0.5, mode="bilinear")),
    "upsample, linear": lambda: on_signals(nn.Upsample(scale_factor=2, mode="linear"), size=4),
    "mean over positions": lambda: on_images(Apply(lambda x: x.mean((2, 3)))),
    "largest over positions": lambda: on_images(Apply(lambda x: x.amax((2, 3)))),
    "residual and concatenation": lambda: on_images(Residual(nn.Conv2d(4, 4, 3, padding=1))),
    "in place": lambda: on_images(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1))),
    "overwritten": lambda: on_vectors(nn.Sequential(Apply(overwrite), nn.Linear(6, 3), Apply(overwrite))),
    "straight through": lambda: on_vectors(nn.Sequential(Apply(straight_through), nn.Linear(6, 3))),
    "constants": lambda: on_vectors(Apply(lambda x: x * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) + torch.ones(6))),
}  # fmt: skip

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "ReLU": nn.ReLU, "ReLU6": nn.ReLU6, "GELU": nn.GELU, "GELU tanh": lambda: nn.GELU("tanh"), "SiLU": nn.SiLU,
    "Tanh": nn.Tanh, "Sigmoid": nn.Sigmoid, "ELU": nn.ELU, "SELU": nn.SELU, "CELU": nn.CELU, "LeakyReLU": nn.LeakyReLU,
    "Softplus": nn.Softplus, "Softsign": nn.Softsign, "Mish": nn.Mish, "Hardswish": nn.Hardswish,
    "Hardsigmoid": nn.Hardsigmoid, "Hardtanh": nn.Hardtanh, "Softmax": lambda: nn.Softmax(-1),
    "LogSoftmax": lambda: nn.LogSoftmax(1), "PReLU": nn.PReLU, "PReLU by channel": lambda: nn.PReLU(6),
    "GLU": lambda: nn.GLU(1), "Threshold": lambda: nn.Threshold(0.0, 0.0),
    "Threshold up": lambda: nn.Threshold(0.3, 2.0), "LogSigmoid": nn.LogSigmoid,
    "Tanhshrink": nn.Tanhshrink, "Hardshrink": nn.Hardshrink, "Softshrink": nn.Softshrink,
}  # fmt: skip


class Bank(nn.Module):
    """Many models over one input, their outputs added: each keeps its own parameters, under its own name."""

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleDict({name.replace(".", " "): model for name, model in models.items()})

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([model(x) for model in self.models.values()]).sum(0)


def banks(cases: Collection[str], most: int) -> dict[str, list[str]]:
    """Cases that take the same input, together: one graph of many layers takes a fraction of many graphs' time."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name in cases:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (x,) = CASES[name]().inputs
        groups.setdefault((tuple(x.shape), x.dtype), []).append(name)
    chunks = [names[i : i + most] for names in groups.values() for i in range(0, len(names), most)]
    return {f"{names[0]} ... {names[-1]}": names for names in chunks}


def bank_of(names: Sequence[str]) -> TrainingSpec:
    torch.manual_seed(0)
    specs = {name: CASES[name]() for name in names}
    one = next(iter(specs.values()))
    return TrainingSpec(Bank({name: spec.model for name, spec in specs.items()}), "cross_entropy", one.inputs, CLASS)


BANKS = banks(CASES, 16)


@pytest.mark.parametrize("bank", BANKS)
def test_clipped_gradients_in_each_run_time_equal_a_loop_over_the_examples_in_float64(bank: str) -> None:
    step = check(bank_of(BANKS[bank]), onnx=True, executorch=True)
    for parameter, path in paths(step).items():
        name = parameter.split(".")[1]
        assert path == "fast" or any(word in name for word in ON_THE_FALLBACK), f"{parameter} is not on the fast path"


class Activations(nn.Module):
    """Six features for each activation, each with its own rows of the layers before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.within = nn.ModuleDict({name: make() for name, make in ACTIVATIONS.items()})
        self.before = nn.Linear(5, 6 * len(self.within))
        self.after = nn.Linear(self._within(torch.zeros(1, 5)).shape[1], 3)

    def _within(self, x: Tensor) -> Tensor:
        parts = (2 * self.before(x)).chunk(len(self.within), 1)
        return torch.cat([act(part) for act, part in zip(self.within.values(), parts, strict=True)], 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self._within(x))


def test_activations_equal_a_loop_over_the_examples_in_float64() -> None:
    torch.manual_seed(0)
    step = check(TrainingSpec(Activations(), "cross_entropy", [torch.zeros(5)], CLASS), onnx=True, executorch=True)
    slow = {parameter for parameter, path in paths(step).items() if path == "fallback"}
    assert slow == {"within.PReLU.weight", "within.PReLU by channel.weight"}
