"""What the fleet's accuracy is held against: the same training without privacy, and every device by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edge_sdk.bundle import Bundle
from edge_sdk.crypto.hashing import tagged_hash
from edge_sdk.training.examples import ArrayExamples
from edge_sdk.training.onnx import OnnxTrainer
from edge_sdk.training.sampling import poisson_sample
from edge_sdk.training.trainer import F32
from examples.demo.data import Part

NO_CLIP = 1e6
"""Longer than any gradient here."""


@dataclass(frozen=True)
class Recipe:
    """The demo's plan without its privacy: so many steps of momentum SGD on Poisson batches."""

    rounds: int
    rate: float
    lr: float
    momentum: float


def train(bundle: Bundle, part: Part, recipe: Recipe, seed: str) -> F32:
    """Parameters, float32 (d,), after plain training on `part`: neither clipping nor noise."""
    trainer = OnnxTrainer(bundle)
    examples = ArrayExamples(part.x, part.y)
    parameters = trainer.shared().astype(np.float64)
    velocity = np.zeros_like(parameters)
    for number in range(recipe.rounds):
        drawn = poisson_sample(len(part), recipe.rate, tagged_hash("baseline", seed.encode(), b"%d" % number))
        found = trainer.clipped_sum(examples, drawn, clip=NO_CLIP, loss_bound=NO_CLIP)
        velocity = recipe.momentum * velocity + found.gradient / (recipe.rate * len(part))
        parameters -= recipe.lr * velocity
        trainer.load_shared(parameters.astype(np.float32))
    return trainer.shared()


def accuracy(bundle: Bundle, parameters: F32, part: Part) -> float:
    """Share of `part` that the model with these shared parameters classifies right."""
    trainer = OnnxTrainer(bundle)
    trainer.load_shared(parameters)
    return float(np.mean(trainer.predict(part.x).argmax(axis=1) == part.y))


def alone(bundle: Bundle, parts: Sequence[Part], held_out: Part, recipe: Recipe) -> list[float]:
    """Held-out accuracy of each device that trains on its own examples only, without privacy."""
    return [
        accuracy(bundle, train(bundle, part, recipe, f"device {number}"), held_out) for number, part in enumerate(parts)
    ]
