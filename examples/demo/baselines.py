"""What the fleet's accuracy is held against: the same training without privacy, and every device by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from edge_sdk.bundle import Bundle
from edge_sdk.crypto.hashing import tagged_hash
from edge_sdk.training.examples import ArrayExamples
from edge_sdk.training.onnx import OnnxTrainer
from edge_sdk.training.sampling import poisson_sample, window_for
from edge_sdk.training.trainer import F32
from examples.demo.data import Part

NO_CLIP = 1e6
"""Longer than any gradient here."""


@dataclass(frozen=True)
class Recipe:
    """The demo's plan without its noise: so many steps of momentum SGD on Poisson batches."""

    rounds: int
    rate: float
    lr: float
    momentum: float
    clip: float = NO_CLIP


def train(bundle: Bundle, part: Part, recipe: Recipe, seed: str) -> F32:
    """Parameters, float32 (d,), after training on `part` without noise."""
    trainer = OnnxTrainer(bundle)
    examples = ArrayExamples(part.x, part.y)
    window = window_for(bundle.manifest.batch, recipe.rate)  # full batches
    parameters = trainer.shared().astype(np.float64)
    velocity = np.zeros_like(parameters)
    for number in range(recipe.rounds):
        drawn = poisson_sample(len(part), recipe.rate, tagged_hash("baseline", seed.encode(), b"%d" % number))
        found = trainer.clipped_sum(examples, drawn, clip=recipe.clip, loss_bound=NO_CLIP, window=window)
        velocity = recipe.momentum * velocity + found.gradient / (recipe.rate * len(part))
        parameters -= recipe.lr * velocity
        trainer.load_shared(parameters.astype(np.float32))
    return trainer.shared()


def accuracy(bundle: Bundle, parameters: F32, part: Part) -> float:
    """Share of `part` that the model with these shared parameters classifies right."""
    trainer = OnnxTrainer(bundle)
    trainer.load_shared(parameters)
    return float(np.mean(trainer.predict(part.x).argmax(axis=1) == part.y))


def without_noise(bundle: Bundle, part: Part, held_out: Part, recipe: Recipe, clip: float) -> float:
    """Held-out accuracy without privacy: with gradients as they are or clipped, whichever does better.

    Clipping is not only a price: where steps are long it keeps single pictures from throwing the model about, and the
    unclipped run can end below the private one.
    """
    return max(
        accuracy(bundle, train(bundle, part, replace(recipe, clip=at), "all"), held_out) for at in (NO_CLIP, clip)
    )


def alone(bundle: Bundle, parts: Sequence[Part], held_out: Part, recipe: Recipe) -> list[float]:
    """Held-out accuracy of each device that trains on its own examples only, without privacy."""
    return [
        accuracy(bundle, train(bundle, part, recipe, f"device {number}"), held_out) for number, part in enumerate(parts)
    ]
