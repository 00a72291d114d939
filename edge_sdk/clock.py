"""Where a device's time comes from, and when it is time to say something again."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Clock:
    """Where time comes from. time_s: Unix seconds.  monotonic_s: seconds that never go back."""

    time_s: Callable[[], float] = time.time
    monotonic_s: Callable[[], float] = time.monotonic


class Repeat:
    """When to say something again: at once, then after growing, jittered delays, from the start after progress."""

    def __init__(self, first_s: float, most_s: float, jitter: Callable[[], float]) -> None:
        """first_s, most_s: the first delay and the longest, before they are spread by a quarter either way.

        jitter: numbers evenly from [0, 1).
        """
        self._first_s, self._most_s, self._jitter = first_s, most_s, jitter
        self.due_s = 0.0
        """When, on the monotonic clock."""
        self._tries = 0

    def said(self, now_s: float) -> None:
        """It was said now."""
        delay_s = min(self._first_s * 2.0 ** min(self._tries, 16), self._most_s)
        self._tries += 1
        self.due_s = now_s + delay_s * (0.75 + 0.5 * self._jitter())

    def progress(self, now_s: float) -> None:
        """An answer came, if not the last one."""
        self._tries = 0
        self.said(now_s)

    def restart(self) -> None:
        """Say it at once."""
        self._tries = 0
        self.due_s = 0.0
