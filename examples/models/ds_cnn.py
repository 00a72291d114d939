"""A depthwise-separable network for keyword spotting, after DS-CNN: 47,052 parameters.

Input: (1, 49, 10) float32, 49 frames of 10 mel-frequency cepstral coefficients (one second of speech, 40 ms windows
every 20 ms). A 10x4 convolution of stride 2, then four blocks of a depthwise 3x3 and a pointwise convolution at 25x5
positions, average pooling, 12 classes (ten words, silence, unknown). Label: a class number.
WIDTH is between the paper's small network (64) and its medium one (172). GroupNorm of 8 groups stands where the paper
has BatchNorm, which mixes the examples of a batch.
Source: Zhang et al. 2017, "Hello Edge: Keyword Spotting on Microcontrollers", arXiv:1711.07128, table 4 and section 4.
"""

from __future__ import annotations

import torch
from torch import nn

from export.graph import TrainingSpec

WIDTH, BLOCKS, GROUPS, CLASSES = 96, 4, 8, 12


def build() -> TrainingSpec:
    """The model with PyTorch's own initial weights from seed 0, for cross entropy."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(1, WIDTH, (10, 4), stride=2, padding=(5, 1), bias=False)]
    layers += [nn.GroupNorm(GROUPS, WIDTH), nn.ReLU()]
    for _ in range(BLOCKS):
        layers += [nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH, bias=False)]
        layers += [nn.GroupNorm(GROUPS, WIDTH), nn.ReLU()]
        layers += [nn.Conv2d(WIDTH, WIDTH, 1, bias=False), nn.GroupNorm(GROUPS, WIDTH), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, CLASSES)]
    return TrainingSpec(
        nn.Sequential(*layers),
        "cross_entropy",
        [torch.zeros(1, 49, 10)],
        torch.zeros((), dtype=torch.long),
        name="ds_cnn",
    )
