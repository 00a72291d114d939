"""What a trainer is to the device's loop, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edge_sdk.bundle import Manifest
from edge_sdk.training.examples import Examples

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


def never_stop() -> bool:
    """The default `should_stop`: no."""
    return False


@dataclass(frozen=True, slots=True)
class Metrics:
    """Sums over the examples of one call. They describe private data: they leave the device only inside the noise.

    loss: sum over the examples counted; for unit "example" of losses taken into [0, loss_bound], for unit "device" as
    they are, and infinite if that overflowed float32.  correct: sum of the share of each example's
    labels that were predicted right.  count: examples that counted.  clipped: of those, how many were scaled down.
    invalid: examples with NaN or infinity somewhere, which contributed nothing.
    """

    loss: float = 0.0
    correct: float = 0.0
    count: float = 0.0
    clipped: float = 0.0
    invalid: float = 0.0

    def __add__(self, other: Metrics) -> Metrics:
        return Metrics(
            self.loss + other.loss,
            self.correct + other.correct,
            self.count + other.count,
            self.clipped + other.clipped,
            self.invalid + other.invalid,
        )


@dataclass(frozen=True, slots=True)
class Update:
    """What local training changed (unit "device").

    delta: float32 (d,), the shared parameters after minus before.  steps: how many were taken.  diverged: a parameter
    became NaN or infinite; then delta is zero and the trainer has its parameters from before.
    """

    delta: F32
    metrics: Metrics
    steps: int
    diverged: bool


@dataclass(frozen=True, slots=True)
class ClippedSum:
    """The sum of clipped per-example gradients (unit "example"). gradient: float64 (d,)."""

    gradient: F64
    metrics: Metrics


class Trainer(Protocol):
    """Holds one model's parameters on the device and runs its bundle's graphs. Not for several threads at a time."""

    @property
    def manifest(self) -> Manifest:
        """The bundle's."""

    def load_shared(self, vector: F32) -> None:
        """Set the shared parameters. vector: float32 (d,), finite; copied."""

    def shared(self) -> F32:
        """The shared parameters: float32 (d,), a copy."""

    def load_local(self, parameters: Mapping[str, F32]) -> None:
        """Set the local parameters, all of them, by name."""

    def local(self) -> dict[str, F32]:
        """The local parameters, by name; copies."""

    def train(
        self,
        examples: Examples,
        *,
        lr: float,
        entropy: bytes,
        epochs: int | None = None,
        steps: int | None = None,
        mu: float = 0.0,
        should_stop: Callable[[], bool] = never_stop,
    ) -> Update:
        """Plain SGD over shuffled batches (unit "device")."""

    def clipped_sum(
        self,
        examples: Examples,
        indices: NDArray[np.int64],
        *,
        clip: float,
        loss_bound: float,
        window: int | None = None,
        local_lr: float = 0.0,
        should_stop: Callable[[], bool] = never_stop,
    ) -> ClippedSum:
        """The clipped gradient sum over the examples `indices` (unit "example")."""

    def predict(self, *inputs: ArrayLike) -> F32:
        """The model's output for any number of examples."""
