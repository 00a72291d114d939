"""Multinomial logistic regression: 784 pixels, 10 classes, 7,850 parameters.

The smallest model worth federating, and a convex one: the optimum does not depend on where it starts, so it starts at
zero. Input: a grey image (1, 28, 28) float32. Label: a class number.
"""

from __future__ import annotations

import torch
from torch import nn

from export.graph import TrainingSpec


def build() -> TrainingSpec:
    """The model at zero, for cross entropy."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return TrainingSpec(
        model, "cross_entropy", [torch.zeros(1, 28, 28)], torch.zeros((), dtype=torch.long), name="logistic"
    )
