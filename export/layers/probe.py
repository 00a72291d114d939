"""Where the examples lie in every value, found by changing them and looking (docs/training-graph.md, "Probing").

Shapes alone do not tell: attention flattens time and batch into one axis, in either order. So the graph is run on
random inputs, labels and parameters; then those of half of the examples are replaced, for each bit of the examples'
numbers and for its complement. Where an element changes, its example's number can be read off; an element that
changes with both halves mixes examples. The losses are looked at like any other value.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from export.errors import UnsupportedModelError
from export.layers.recorder import Layout, Recorder, layer_of

_UNKNOWN = -1


@dataclass(frozen=True)
class Draws:
    """Two independent draws of every example input, by placeholder, and of the labels: all (B, ...)."""

    first: Mapping[str, Tensor]
    second: Mapping[str, Tensor]
    first_labels: Tensor
    second_labels: Tensor


@dataclass(frozen=True)
class Probed:
    """layouts: one for each tap, in order; None where the examples were not found along one axis."""

    layouts: tuple[Layout | None, ...]


def probe(
    recorder: Recorder,
    parameters: Mapping[str, Tensor],
    draws: Draws,
    losses: Callable[[Tensor, Tensor], Tensor],
    batch: int,
) -> Probed:
    """parameters: of every placeholder that is no example input.  losses: (output, labels) -> (B,).

    Raises UnsupportedModelError that names the first layer in which examples mix, or says that the losses do.
    """
    base = recorder.run({**parameters, **draws.first})
    base_losses = losses(base.first_output, draws.first_labels).detach()
    bits = max(1, (batch - 1).bit_length())
    numbers = torch.arange(batch)
    halves = [(bit, value, ((numbers >> bit) & 1) == value) for bit in range(bits) for value in (0, 1)]
    changed: dict[str, dict[tuple[int, int], Tensor]] = {name: {} for name in base.values}
    tapped: list[dict[tuple[int, int], Tensor]] = [{} for _ in base.taps]
    changed_losses: dict[tuple[int, int], Tensor] = {}
    for bit, value, chosen in halves:
        mixed = {name: _replace(chosen, draws.second[name], x) for name, x in draws.first.items()}
        run = recorder.run({**parameters, **mixed})
        for name, before in base.values.items():
            changed[name][bit, value] = _differs(run.values[name], before)
        for i, tap in enumerate(base.taps):
            tapped[i][bit, value] = _differs(run.taps[i].placed_as, tap.placed_as)
        labels = _replace(chosen, draws.second_labels, draws.first_labels)
        changed_losses[bit, value] = _differs(losses(run.first_output, labels), base_losses)
    for node in recorder.graph.nodes:
        if node.name in changed and node.name not in recorder.examples and _mixes(changed[node.name], bits, batch):
            raise UnsupportedModelError(
                f"{layer_of(node)}: {_operator(node)} mixes the examples of a batch, so none has a gradient of its "
                "own. Normalise, pool or attend within one example only."
            )
    owners = _owners(changed_losses, bits)
    if _mixes(changed_losses, bits, batch) or not ((owners == numbers) | (owners == _UNKNOWN)).all():
        raise UnsupportedModelError(
            "the loss of one example depends on another example or its label, so none has a gradient of its own. The "
            "model's output must have the batch as its first axis, and the loss must treat each of its rows alone."
        )
    return Probed(tuple(_layout(_owners(changes, bits), batch) for changes in tapped))


def _operator(node: fx.Node) -> str:
    """What computed a value; for one of several results, what gave them."""
    return str(node.args[0].target if node.target is operator.getitem else node.target)  # type: ignore[union-attr]


def _replace(chosen: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """new in the chosen examples, old in the others. chosen: (B,) bool."""
    return torch.where(chosen.reshape([-1] + [1] * (old.dim() - 1)), new, old)


def _differs(one: Tensor, other: Tensor) -> Tensor:
    """Elementwise; a NaN is like a NaN."""
    one, other = one.detach(), other.detach()
    return (one != other) & ~((one != one) & (other != other))


def _mixes(changes: Mapping[tuple[int, int], Tensor], bits: int, batch: int) -> bool:
    """Whether any element changes both with some examples and with all of the others."""
    return batch > 1 and any(bool((changes[bit, 0] & changes[bit, 1]).any()) for bit in range(bits))


def _owners(changes: Mapping[tuple[int, int], Tensor], bits: int) -> Tensor:
    """The number of the example that each element follows, or -1 where no change showed."""
    number, known = torch.zeros((), dtype=torch.long), torch.ones((), dtype=torch.bool)
    for bit in range(bits):
        one, zero = changes[bit, 1], changes[bit, 0]
        number = number + one.long() * (1 << bit)
        known = known & (one | zero)
    return torch.where(known, number, _UNKNOWN)


def _layout(owners: Tensor, batch: int) -> Layout | None:
    candidates: Sequence[tuple[int, bool]] = [
        (axis, minor)
        for axis, size in enumerate(owners.shape)
        if size % batch == 0
        for minor in ((False,) if size == batch else (False, True))
    ]
    if batch == 1:
        candidates = sorted(candidates, key=lambda axis_minor: owners.shape[axis_minor[0]] != 1)
    known = owners != _UNKNOWN
    if batch > 1 and not known.any():
        return None
    fitting = []
    for axis, minor in candidates:
        index = torch.arange(owners.shape[axis])
        expected = index % batch if minor else index // (owners.shape[axis] // batch)
        expected = expected.reshape([-1] + [1] * (owners.dim() - 1 - axis))
        if ((owners == expected) | ~known).all():
            fitting.append(Layout(axis, minor, batch))
    # With a batch of one every axis fits, best one of size 1. Otherwise two that fit mean that too little was seen.
    return fitting[0] if fitting and (batch == 1 or len(fitting) == 1) else None
