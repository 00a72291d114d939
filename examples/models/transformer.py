"""A tiny causal transformer, and low-rank adapters on it.

Two layers of width 64 (norm before, four heads, a feed-forward width of 256 with GELU), learned positions, 32
characters of an alphabet of 65: 110,529 parameters. `build` trains all of them. `build_lora` freezes them and trains
adapters of rank 4 on the four products of every layer: 8,192 parameters, and as many numbers to mask and send.
Input: (32,) int64. Label: (32,) int64, the same text one character on.
Source: Hu et al. 2021, "LoRA", arXiv:2106.09685, section 4.1 (the second factor starts at zero, scale alpha / r).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from export.graph import TrainingSpec

VOCABULARY, STEPS, WIDTH, HEADS, INNER, LAYERS = 65, 32, 64, 4, 256, 2
RANK, ALPHA = 4, 8.0


class Positions(nn.Module):
    """Adds a learned vector to each place."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(STEPS, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, STEPS, WIDTH) -> the same shape."""
        return x + self.weight


class Attention(nn.Module):
    """Causal multi-head self-attention; queries, keys and values come from one product."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = nn.Linear(WIDTH, 3 * WIDTH)
        self.outputs = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, STEPS, WIDTH) -> the same shape."""
        batch, steps, _ = x.shape
        parts = self.inputs(x).reshape(batch, steps, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        queries, keys, values = parts.unbind(0)
        mixed = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        out: Tensor = self.outputs(mixed.transpose(1, 2).reshape(batch, steps, WIDTH))
        return out


class Layer(nn.Module):
    """Attention, then the feed-forward part, each on a normalised copy of the sum so far."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(WIDTH), Attention()
        self.forward_norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, STEPS, WIDTH) -> the same shape."""
        x = x + self.attention(self.attention_norm(x))
        out: Tensor = x + self.down(functional.gelu(self.up(self.forward_norm(x))))
        return out


class Transformer(nn.Module):
    """Characters in, scores of the next character out, for every place."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(VOCABULARY, WIDTH), Positions()
        self.layers = nn.Sequential(*(Layer() for _ in range(LAYERS)))
        self.norm, self.scores = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, STEPS) int64 -> (B, STEPS, VOCABULARY)."""
        scores: Tensor = self.scores(self.norm(self.layers(self.positions(self.embedding(x)))))
        return scores


class Adapter(nn.Module):
    """A frozen linear layer plus ALPHA / RANK times a product of two thin ones, which are trained."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, RANK, bias=False)
        self.up = nn.Linear(RANK, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        out: Tensor = self.base(x) + self.up(self.down(x)) * (ALPHA / RANK)
        return out


def build() -> TrainingSpec:
    """The whole model with PyTorch's own initial weights from seed 0, for cross entropy."""
    torch.manual_seed(0)
    text = torch.zeros(STEPS, dtype=torch.long)
    return TrainingSpec(Transformer(), "cross_entropy", [text], text, name="transformer", vocabulary=VOCABULARY)


def build_lora() -> TrainingSpec:
    """Adapters on the model of `build`, for cross entropy.

    The base has its first weights, as a stand-in: load trained ones into it before it is adapted.
    """
    torch.manual_seed(0)
    model = Transformer().requires_grad_(False)
    for layer in model.layers:
        assert isinstance(layer, Layer)  # noqa: S101  (a fact for the type checker)
        layer.up, layer.down = Adapter(layer.up), Adapter(layer.down)  # type: ignore[assignment]
        attention = layer.attention
        attention.inputs, attention.outputs = Adapter(attention.inputs), Adapter(attention.outputs)  # type: ignore[assignment]
    text = torch.zeros(STEPS, dtype=torch.long)
    return TrainingSpec(model, "cross_entropy", [text], text, name="lora", vocabulary=VOCABULARY)
