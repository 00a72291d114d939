"""Losses as one value for each example, with what counts as a correct answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from export.errors import UnsupportedModelError


@dataclass(frozen=True)
class Loss:
    """per_example: (output, y) -> (B,).  correct: (output, y) -> (B,), the share of its answers that are right."""

    name: str
    per_example: Callable[[Tensor, Tensor], Tensor]
    correct: Callable[[Tensor, Tensor], Tensor]


def _rest_mean(values: Tensor) -> Tensor:
    """(B, ...) -> (B,)."""
    return values.flatten(1).mean(1) if values.dim() > 1 else values


def _same_shape(loss: str, wanted: torch.Size, output: Tensor, y: Tensor, why: str) -> None:
    """Broadcasting would pair every output with every label of the batch."""
    if y.shape != wanted:
        raise UnsupportedModelError(
            f"{loss}: labels of {tuple(y.shape)} for an output of {tuple(output.shape)}, both with the batch as the "
            f"first axis: labels of {tuple(wanted)} are needed, {why}"
        )


_OF_THE_OUTPUT = "the output's shape: give the spec's label, and the device's, that shape, or reshape the output"


def cross_entropy(output: Tensor, y: Tensor) -> Tensor:
    """output: (B, ..., classes) scores, y: (B, ...) class numbers; the mean over the middle axes (a sequence's steps).

    A label that is no class makes its example's loss NaN: the example is counted as invalid and contributes nothing.
    """
    _same_shape(
        "cross_entropy", output.shape[:-1], output, y,
        "one class number for each place of the output, whose last axis is the classes (PyTorch's own loss has them as "
        "the second)",
    )  # fmt: skip
    if y.is_floating_point():
        raise UnsupportedModelError(f"cross_entropy: labels of {y.dtype}; use class numbers, int64 or int32")
    if output.shape[-1] == 1:
        raise UnsupportedModelError(
            "cross_entropy: the output has one class, so that every loss is 0: give it one score for each class, or "
            "use binary_cross_entropy"
        )
    classes = torch.arange(output.shape[-1], dtype=y.dtype)
    chosen = (y.unsqueeze(-1) == classes).to(output.dtype)
    known = chosen.sum(-1)  # 1, or 0 for a label that is no class
    values, _ = _NegativeLogLikelihood.apply(output, chosen)
    return _rest_mean(values / known)


class _NegativeLogLikelihood(torch.autograd.Function):
    """output, chosen: (..., classes); chosen is one-hot. The loss (...), and the log-probabilities for its gradient.

    The gradient in its closed form, softmax - chosen: differentiated step by step it is five operators more.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(output: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        logs = torch.log_softmax(output, -1)
        return -(logs * chosen).sum(-1), logs

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(inputs[1], output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Any:
        chosen, logs = ctx.saved_tensors
        return (logs.exp() - chosen) * grad.unsqueeze(-1), None


def binary_cross_entropy(output: Tensor, y: Tensor) -> Tensor:
    """output: (B, ...) scores (before the sigmoid), y: the same shape in [0, 1]; the mean over the rest."""
    _same_shape("binary_cross_entropy", output.shape, output, y, _OF_THE_OUTPUT)
    values: Tensor = _BinaryCrossEntropy.apply(output, y.to(output.dtype))
    return _rest_mean(values)


class _BinaryCrossEntropy(torch.autograd.Function):
    """max(o, 0) - o y + log(1 + exp(-|o|)), elementwise: no overflow for any score.

    The gradient in its closed form, sigmoid(o) - y: the parts have no derivative at a score of zero, where a last layer
    that starts at zero puts every score.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(output: Tensor, y: Tensor) -> Tensor:
        return torch.relu(output) - output * y + torch.log1p(torch.exp(-output.abs()))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        output, y = ctx.saved_tensors
        return (torch.sigmoid(output) - y) * grad, None


def mse(output: Tensor, y: Tensor) -> Tensor:
    """The mean squared difference over all but the batch axis."""
    _same_shape("mse", output.shape, output, y, _OF_THE_OUTPUT)
    difference = output - y.to(output.dtype)
    return _rest_mean(difference * difference)


def _argmax_matches(output: Tensor, y: Tensor) -> Tensor:
    return _rest_mean((output.argmax(-1) == y).to(output.dtype))


def _sign_matches(output: Tensor, y: Tensor) -> Tensor:
    return _rest_mean(((output > 0) == (y > 0.5)).to(output.dtype))


def _none(output: Tensor, y: Tensor) -> Tensor:
    return torch.zeros(output.shape[0], dtype=output.dtype)


LOSSES = {
    "cross_entropy": Loss("cross_entropy", cross_entropy, _argmax_matches),
    "binary_cross_entropy": Loss("binary_cross_entropy", binary_cross_entropy, _sign_matches),
    "mse": Loss("mse", mse, _none),
}


def resolve_loss(loss: str | Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """A loss by its name, or a user's own per-example callable.

    What goes by a known name is that loss: labels are checked, and answers counted, by the name in the manifest.
    """
    if callable(loss):
        name = getattr(loss, "__name__", type(loss).__name__)
        known = LOSSES.get(name.lower())
        if known is not None and known.per_example is loss:
            return known
        return Loss(f"own-{name}" if known is not None else name, loss, _none)
    if loss not in LOSSES:
        raise UnsupportedModelError(f"no loss is called {loss!r}: use {', '.join(LOSSES)} or a callable")
    return LOSSES[loss]
