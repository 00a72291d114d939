"""A small MobileNetV2 for 32x32 colour images: 97,050 parameters.

A 3x3 stem of 16 channels, six inverted residual blocks (expansion 4; depthwise 3x3; widths 24, 24, 40, 40, 64, 64; the
first of each width has stride 2), a pointwise head of 128, average pooling, 10 classes. GroupNorm of 8 groups stands
where the paper has BatchNorm, which mixes the examples of a batch. Input: (3, 32, 32) float32. Label: a class number.
Source: Sandler et al. 2018, "MobileNetV2: Inverted Residuals and Linear Bottlenecks", arXiv:1801.04381, figure 4.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from export.graph import TrainingSpec

STEM, HEAD, EXPANSION, GROUPS, CLASSES = 16, 128, 4, 8, 10
BLOCKS = ((24, 2), (24, 1), (40, 2), (40, 1), (64, 2), (64, 1))  # width, stride


class InvertedResidual(nn.Module):
    """Pointwise up, depthwise 3x3, pointwise down without a rectifier; added to the input where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        inner = inputs * EXPANSION
        self.residual = stride == 1 and inputs == outputs
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, inner, 1, bias=False),
            nn.GroupNorm(GROUPS, inner),
            nn.ReLU6(),
            nn.Conv2d(inner, inner, 3, stride=stride, padding=1, groups=inner, bias=False),
            nn.GroupNorm(GROUPS, inner),
            nn.ReLU6(),
            nn.Conv2d(inner, outputs, 1, bias=False),
            nn.GroupNorm(GROUPS, outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, inputs, h, w) -> (B, outputs, h / stride, w / stride)."""
        y: Tensor = self.layers(x)
        return x + y if self.residual else y


def build() -> TrainingSpec:
    """The model with PyTorch's own initial weights from seed 0, for cross entropy."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, STEM, 3, padding=1, bias=False), nn.GroupNorm(GROUPS, STEM), nn.ReLU6()]
    width = STEM
    for outputs, stride in BLOCKS:
        layers.append(InvertedResidual(width, outputs, stride))
        width = outputs
    layers += [nn.Conv2d(width, HEAD, 1, bias=False), nn.GroupNorm(GROUPS, HEAD), nn.ReLU6()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(HEAD, CLASSES)]
    return TrainingSpec(
        nn.Sequential(*layers),
        "cross_entropy",
        [torch.zeros(3, 32, 32)],
        torch.zeros((), dtype=torch.long),
        name="mobilenet",
    )
