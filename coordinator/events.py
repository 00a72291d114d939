"""What happens, for people: small facts that a terminal, a log or a picture shows. Nothing depends on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from coordinator.rounds import Spent


@dataclass(frozen=True, slots=True)
class EpochBegan:
    """A roster with its committee is in force."""

    number: int
    devices: int
    members: int


@dataclass(frozen=True, slots=True)
class Waiting:
    """No ticket can be issued for the task; said once for each reason."""

    task: str
    reason: str


@dataclass(frozen=True, slots=True)
class RoundOpened:
    """A ticket is out."""

    task: str
    round: int
    n_max: int
    closes_s: int


@dataclass(frozen=True, slots=True)
class Contributed:
    """A contribution is on disk. contributors: with it.  size: bytes, as they travelled."""

    task: str
    round: int
    device: str
    contributors: int
    size: int


@dataclass(frozen=True, slots=True)
class RoundSealed:
    """The set is fixed. left_out: complained about, or in a group that was too small."""

    task: str
    round: int
    contributors: int
    left_out: int


@dataclass(frozen=True, slots=True)
class RoundCertified:
    """A quorum signed: from here on the sums count as known."""

    task: str
    round: int


@dataclass(frozen=True, slots=True)
class ModelPublished:
    """The sum was opened and a new model came of it.

    model: sums that are in it.  contributors: in the sums that were opened; not for readers.  metrics: noisy.
    reason: why groups are missing, if any are.  loss: its name, empty if it is not known.
    """

    task: str
    round: int
    model: int
    contributors: int
    metrics: Mapping[str, float]
    spent: Spent
    clip: float
    seconds: float
    """Since the ticket."""
    reason: str
    loss: str = ""


@dataclass(frozen=True, slots=True)
class RoundAborted:
    """The round ended without a model."""

    task: str
    round: int
    reason: str


@dataclass(frozen=True, slots=True)
class TaskDone:
    """Its last model is published."""

    task: str


@dataclass(frozen=True, slots=True)
class Refused:
    """A frame of a device was dropped, and nothing else happened."""

    device: str
    reason: str


Event = (
    EpochBegan | Waiting | RoundOpened | Contributed | RoundSealed | RoundCertified | ModelPublished | RoundAborted
    | TaskDone | Refused
)  # fmt: skip
