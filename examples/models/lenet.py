"""A convolutional network of LeNet-5's size: 61,706 parameters.

Two 5x5 convolutions (6 channels with padding 2, 16 without), each with a rectifier and 2x2 max pooling, then linear
layers of 120, 84 and 10. Input: a grey image (1, 28, 28) float32. Label: a class number.
Source: LeCun et al. 1998, "Gradient-based learning applied to document recognition", with rectifiers and max pooling in
place of scaled tanh and trainable subsampling.
"""

from __future__ import annotations

import torch
from torch import nn

from export.graph import TrainingSpec


def build() -> TrainingSpec:
    """The model with PyTorch's own initial weights from seed 0, for cross entropy."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, 10),
    )
    return TrainingSpec(
        model, "cross_entropy", [torch.zeros(1, 28, 28)], torch.zeros((), dtype=torch.long), name="lenet"
    )
