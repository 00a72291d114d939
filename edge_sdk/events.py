"""What a device tells whoever runs it, as it happens: small frozen records, the same for hooks, logs and `--json`."""

from __future__ import annotations

import re

import msgspec


def _tag(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name).lower()


class Event(msgspec.Struct, frozen=True, tag_field="event", tag=_tag):
    """Base of all events."""

    @property
    def name(self) -> str:
        """As in JSON: the class's name in lower case."""
        return _tag(type(self).__name__)


class Online(Event, frozen=True):
    """The link to the broker is up."""


class Offline(Event, frozen=True):
    """The link is down; it comes back by itself."""

    reason: str


class Welcomed(Event, frozen=True):
    """The coordinator said where things stand."""

    epoch: int | None
    enrolled: bool
    """In the epoch's roster: it may contribute."""
    serves: bool
    """In the epoch's committee."""
    clock_skew_s: float
    """The coordinator's clock less this device's."""


class Refused(Event, frozen=True):
    """This device takes no part in a round: the policy, a budget, or what is wrong with the ticket."""

    task: str
    round: int
    reason: str


class SatOut(Event, frozen=True):
    """This device's own coin said no."""

    task: str
    round: int


class Waiting(Event, frozen=True):
    """A round could be contributed to, but not now."""

    task: str
    round: int
    reason: str


class Fetching(Event, frozen=True):
    """A blob is on its way. content: "bundle" or "parameters"."""

    task: str
    content: str
    size: int


class Training(Event, frozen=True):
    """Local training begins."""

    task: str
    round: int


class Contributed(Event, frozen=True):
    """The contribution is stored and charged; from here on it is sent until there is a receipt."""

    task: str
    round: int
    size: int
    """Bytes to send."""
    train_s: float


class Delivered(Event, frozen=True):
    """The coordinator's signed receipt is here: it holds the contribution durably."""

    task: str
    round: int


class Dropped(Event, frozen=True):
    """A round that was entered is given up."""

    task: str
    round: int
    reason: str


class Updated(Event, frozen=True):
    """The task's newest model is here, whole: `predict` uses it."""

    task: str
    round: int


class Answered(Event, frozen=True):
    """A committee member's duty was done.

    what: "joined", "inspected", "complained", "signed", "released" or "closed".
    """

    task: str
    round: int
    what: str


class Warned(Event, frozen=True):
    """Something was refused or failed, and nothing was lost by it; or examples of this device count for nothing."""

    reason: str


AnyEvent = (
    Online | Offline | Welcomed | Refused | SatOut | Waiting | Fetching | Training | Contributed | Delivered | Dropped
    | Updated | Answered | Warned
)  # fmt: skip
