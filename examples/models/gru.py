"""A recurrent next-character model: embedding of 64, one GRU layer of 128 units, 87,041 parameters.

Input: (32,) int64, 32 characters as numbers below 65 (the alphabet of the works of Shakespeare as commonly prepared).
Label: (32,) int64, the same text one character on. The loss of an example is the mean over its 32 characters, and the
example is the unit of clipping.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from export.graph import TrainingSpec

VOCABULARY, STEPS, EMBEDDING, HIDDEN = 65, 32, 64, 128


class NextCharacter(nn.Module):
    """Characters in, scores of the next character out, for every step."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, EMBEDDING)
        self.recurrent = nn.GRU(EMBEDDING, HIDDEN, batch_first=True)
        self.scores = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, STEPS) int64 -> (B, STEPS, VOCABULARY)."""
        states, _ = self.recurrent(self.embedding(x))
        scores: Tensor = self.scores(states)
        return scores


def build() -> TrainingSpec:
    """The model with PyTorch's own initial weights from seed 0, for cross entropy."""
    torch.manual_seed(0)
    text = torch.zeros(STEPS, dtype=torch.long)
    return TrainingSpec(NextCharacter(), "cross_entropy", [text], text, name="gru", vocabulary=VOCABULARY)
