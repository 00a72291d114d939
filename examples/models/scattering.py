"""A frozen wavelet scattering front end under a trained linear head: 39,700 parameters.

Handcrafted features make a small private model better than a trained convolutional one: nothing is spent on learning
edges. Depth J = 2, L = 8 angles, second order: 1 + 16 + 64 = 81 channels of 7x7 for a 28x28 image, normalised within
each example in 27 groups, then a linear layer to 10 classes. Everything but the linear layer is constant.
Input: a grey image (1, 28, 28) float32. Label: a class number.

The filters are complex Morlet wavelets sampled in space: centre frequency 3 pi / 4 / 2^j, width 0.8 * 2^j pixels, twice
as long as wide across (slant 1/2), a multiple of the envelope subtracted so that the mean is zero; the low pass is a
Gaussian of 0.8 * 2^J pixels. They are cut off at three widths and applied with zero padding, keeping every second
position as soon as the band allows: the wavelets as ordinary convolutions, the low pass, which is separable and keeps
every fourth position, as one small matrix for columns and for rows.
Source: Tramer and Boneh 2021, arXiv:2011.11660, sections 2 and 3; Oyallon and Mallat 2015, arXiv:1412.8659, for the
filters.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from export.graph import TrainingSpec

DEPTH, ANGLES, SIDE, NORM_GROUPS, CLASSES = 2, 8, 28, 27, 10
WIDTH, SLANT, FREQUENCY = 0.8, 0.5, 3 * math.pi / 4
CHANNELS = 1 + ANGLES * DEPTH + ANGLES * ANGLES * DEPTH * (DEPTH - 1) // 2


def _grid(radius: int) -> tuple[Tensor, Tensor]:
    line = torch.arange(-radius, radius + 1, dtype=torch.float64)
    return line[:, None], line[None, :]


def _on_grid(filters: Tensor) -> Tensor:
    """Float32, rounded to a multiple of 2^-24, and no negative zero.

    The last bits of an exponential differ with the processor's vector instructions, and where the exact value is zero
    they are all there is: rounded, a build gives the same bytes on every machine.
    """
    return (torch.round(filters * 2.0**24) / 2.0**24 + 0.0).float()


def low_pass(side: int, step: int) -> Tensor:
    """(side, SIDE / 4) float32: the weight of each position for each output, along one axis.

    side: positions along the axis, `step` original pixels apart. Every fourth original pixel has an output.
    """
    width = WIDTH * 2**DEPTH
    places = step * torch.arange(side, dtype=torch.float64)
    distance = places[:, None] - 2**DEPTH * torch.arange(SIDE // 2**DEPTH)
    g = torch.exp(-distance * distance / (2 * width * width))
    g = torch.where(distance.abs() <= 3 * width, g, 0.0)
    return _on_grid(g * step / (math.sqrt(2 * math.pi) * width))


def morlets(scale: int) -> Tensor:
    """(2 * ANGLES, 1, n, n) float32: the real parts of all angles at scale 2^scale, then the imaginary parts."""
    width, frequency = WIDTH * 2**scale, FREQUENCY / 2**scale
    y, x = _grid(math.ceil(3 * width))
    found = []
    for k in range(ANGLES):
        angle = math.pi * k / ANGLES
        along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
        envelope = torch.exp(-(along * along + SLANT * SLANT * across * across) / (2 * width * width))
        wave = torch.polar(envelope, frequency * along)
        wave = wave - envelope * (wave.sum() / envelope.sum())
        found.append(wave / (2 * math.pi * width * width / SLANT))
    stacked = torch.stack(found)[:, None]
    return _on_grid(torch.cat([stacked.real, stacked.imag]))


class Scattering(nn.Module):
    """The scattering transform. Its filters are constants: buffers outside the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.fine: Tensor
        self.coarse: Tensor
        self.low_full: Tensor
        self.low_half: Tensor
        self.register_buffer("fine", morlets(0), persistent=False)
        self.register_buffer("coarse", morlets(1), persistent=False)
        self.register_buffer("low_full", low_pass(SIDE, 1), persistent=False)
        self.register_buffer("low_half", low_pass(SIDE // 2, 2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 1, SIDE, SIDE) -> (B, CHANNELS, SIDE / 4, SIDE / 4)."""
        first = self._modulus(x, self.fine, 1)  # (B, ANGLES, 28, 28)
        second = self._modulus(x, self.coarse, 2)  # (B, ANGLES, 14, 14)
        both = self._modulus(first.reshape(-1, 1, SIDE, SIDE), self.coarse, 2)
        both = both.reshape(x.shape[0], ANGLES * ANGLES, SIDE // 2, SIDE // 2)
        full = self._average(torch.cat([x, first], 1), self.low_full)
        half = self._average(torch.cat([second, both], 1), self.low_half)
        return torch.cat([full, half], 1)

    def _modulus(self, x: Tensor, filters: Tensor, stride: int) -> Tensor:
        waves = functional.conv2d(x, filters, stride=stride, padding=filters.shape[-1] // 2)
        real, imaginary = waves[:, :ANGLES], waves[:, ANGLES:]
        return torch.sqrt(real * real + imaginary * imaginary)

    def _average(self, x: Tensor, low: Tensor) -> Tensor:
        side, size = low.shape
        columns = x.reshape(-1, side) @ low
        rows = columns.reshape(-1, side, size).transpose(1, 2).reshape(-1, side) @ low
        return rows.reshape(*x.shape[:2], size, size).transpose(2, 3)


def build() -> TrainingSpec:
    """The front end and a linear head with PyTorch's own initial weights from seed 0, for cross entropy."""
    torch.manual_seed(0)
    side = SIDE // 2**DEPTH
    model = nn.Sequential(
        Scattering(),
        nn.GroupNorm(NORM_GROUPS, CHANNELS, affine=False),
        nn.Flatten(),
        nn.Linear(CHANNELS * side * side, CLASSES),
    )
    return TrainingSpec(
        model, "cross_entropy", [torch.zeros(1, SIDE, SIDE)], torch.zeros((), dtype=torch.long), name="scattering"
    )
