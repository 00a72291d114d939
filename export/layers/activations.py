"""Activations whose backward operator says less than their forward one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from export.layers.linear import arguments
from export.layers.recorder import Recorder, aten, rewrites


@rewrites(aten.threshold.default)
def threshold(recorder: Recorder, node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """x where it is above the threshold, a value elsewhere.

    Its backward operator is that of ReLU, and is given x here where ReLU gives its output: in another form the two stay
    apart, and the decomposition of ReLU's may rely on an output that is never negative.
    """
    (_, x), (_, bound), (_, value) = arguments(node, args, kwargs, "self", "threshold", "value")
    return torch.where(x > bound, x, torch.full((), value, dtype=x.dtype))
