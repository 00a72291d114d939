"""Handwritten digits of 8 x 8 pixels, 10 classes: layer norm without parameters, then a linear layer; 650 parameters.

The norm is over one example, so it costs no privacy, and it gives every digit the same ink: at the same epsilon it is
worth a point of accuracy. The model is convex and starts at zero. Input: (1, 8, 8) float32. Label: a class number.
"""

from __future__ import annotations

import torch
from torch import nn

from export.graph import TrainingSpec


def build() -> TrainingSpec:
    """The model at zero, for cross entropy."""
    linear = nn.Linear(64, 10)
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    model = nn.Sequential(nn.Flatten(), nn.LayerNorm(64, elementwise_affine=False), linear)
    return TrainingSpec(
        model, "cross_entropy", [torch.zeros(1, 8, 8)], torch.zeros((), dtype=torch.long), name="digits"
    )
