"""A multilayer perceptron: 784-128-10 with a rectifier, 101,770 parameters.

Input: a grey image (1, 28, 28) float32. Label: a class number. A step size of 0.1 to 0.5 suits it with clipping at 1.
"""

from __future__ import annotations

import torch
from torch import nn

from export.graph import TrainingSpec


def build() -> TrainingSpec:
    """The model with PyTorch's own initial weights from seed 0, for cross entropy."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
    return TrainingSpec(model, "cross_entropy", [torch.zeros(1, 28, 28)], torch.zeros((), dtype=torch.long), name="mlp")
