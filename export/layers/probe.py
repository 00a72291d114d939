"""Where the examples lie in every value, found by changing them and looking (docs/training-graph.md, "Probing").

Shapes alone do not tell: attention flattens time and batch into one axis, in either order. So the graph is run on random
inputs and parameters; then the inputs of half of the examples are replaced, for each bit of the examples' numbers and
for its complement. Where an element changes, its example's number can be read off; an element that changes with both
halves mixes examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from export.errors import UnsupportedModelError
from export.layers.recorder import Layout, Recorder, layer_of

_UNKNOWN = -1


@dataclass(frozen=True)
class Probed:
    """What probing found: a layout per tap, in order."""

    layouts: tuple[Layout, ...]


def probe(
    recorder: Recorder,
    parameters: Mapping[str, Tensor],
    first: Mapping[str, Tensor],
    second: Mapping[str, Tensor],
    batch: int,
) -> Probed:
    """first, second: two independent draws of every example input (batch, ...); parameters: of every other placeholder.

    Raises UnsupportedModelError that names the first layer in which examples mix.
    """
    base = recorder.run({**parameters, **first})
    bits = max(1, (batch - 1).bit_length())
    numbers = torch.arange(batch)
    halves = [(bit, value, ((numbers >> bit) & 1) == value) for bit in range(bits) for value in (0, 1)]
    changed: dict[str, dict[tuple[int, int], Tensor]] = {name: {} for name in base.values}
    tapped: list[dict[tuple[int, int], Tensor]] = [{} for _ in base.taps]
    for bit, value, chosen in halves:
        mixed = {
            name: torch.where(chosen.reshape([-1] + [1] * (x.dim() - 1)), second[name], x) for name, x in first.items()
        }
        run = recorder.run({**parameters, **mixed})
        for name, before in base.values.items():
            changed[name][bit, value] = run.values[name].detach() != before.detach()
        for i, tap in enumerate(base.taps):
            tapped[i][bit, value] = run.taps[i].output.detach() != tap.output.detach()
    for node in recorder.graph.nodes:
        if node.name in changed and node.name not in recorder.examples:
            both = [changed[node.name][bit, 0] & changed[node.name][bit, 1] for bit in range(bits)]
            if batch > 1 and torch.stack(both).any():
                raise UnsupportedModelError(
                    f"{layer_of(node)}: {node.target} mixes the examples of a batch, so none has a gradient of its own. "
                    "Normalise, pool or attend within one example only."
                )
    layouts = [
        _layout(_owners(tapped[i], bits), batch, tap.axis, tap.node) for i, tap in enumerate(base.taps)
    ]
    return Probed(tuple(layouts))


def _owners(changes: Mapping[tuple[int, int], Tensor], bits: int) -> Tensor:
    """The number of the example that each element follows, or -1 where no change showed."""
    number, known = torch.zeros((), dtype=torch.long), torch.ones((), dtype=torch.bool)
    for bit in range(bits):
        one, zero = changes[bit, 1], changes[bit, 0]
        number = number + one.long() * (1 << bit)
        known = known & (one | zero)
    return torch.where(known, number, _UNKNOWN)


def _layout(owners: Tensor, batch: int, hint: int | None, node: str) -> Layout:
    candidates: Sequence[tuple[int, bool]] = [
        (axis, minor)
        for axis, size in enumerate(owners.shape)
        if size % batch == 0
        for minor in ((False,) if size == batch else (False, True))
    ]
    if hint is not None:
        candidates = [(hint, False)]
    known = owners != _UNKNOWN
    if batch > 1 and hint is None and not known.any():
        raise UnsupportedModelError(f"{node}: the output of this layer does not depend on the examples")
    for axis, minor in candidates:
        index = torch.arange(owners.shape[axis])
        expected = index % batch if minor else index // (owners.shape[axis] // batch)
        expected = expected.reshape([-1] + [1] * (owners.dim() - 1 - axis))
        if ((owners == expected) | ~known).all():
            return Layout(axis, minor, batch)
    raise UnsupportedModelError(f"{node}: the examples do not lie along one axis of this layer's output")
