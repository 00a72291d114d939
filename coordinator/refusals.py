"""What is said in the log of those that were refused: enough to act on, and never so much that it fills the disk."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

LINES = 10
STRANGERS_LINES = 60
"""So many refusals of one client are said in a window, and of all strangers together; further ones are counted."""

WINDOW_S = 60.0

MOST_CLIENTS = 4096
"""That are kept count of."""

NAME = 16
"""Characters of a name that are said: of a device's, its first digits."""


@dataclass
class _Window:
    begun_s: float
    said: int = 0
    kept_back: int = 0


class Refusals:
    """Says in the log who was refused what, but never so often that one client fills the disk with it."""

    def __init__(self, log: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        """log: where it is said.  clock: seconds."""
        self._log, self._clock = log, clock
        self._lock = threading.Lock()
        self._windows: dict[str, _Window] = {}

    def topic(self, name: str, action: str, topic: str, *, why: str = "refused") -> None:
        """A client wanted a topic that is not its own."""
        self.say(name, f"{name[:NAME]} may not {action} {topic[:128]!r}: {why}")

    def say(self, name: str, text: str) -> None:
        """name: whose fault it is, as far as that is known; "" for all strangers together: they have any number of
        addresses."""
        with self._lock:
            now_s = self._clock()
            window = self._windows.get(name)
            if window is None or now_s - window.begun_s >= WINDOW_S:
                if window is not None and window.kept_back:
                    self._log.warning("%s was refused %d more times", name[:NAME] or "strangers", window.kept_back)
                if len(self._windows) >= MOST_CLIENTS:
                    self._windows.clear()
                window = self._windows[name] = _Window(now_s)
            if window.said == (LINES if name else STRANGERS_LINES):
                window.kept_back += 1
                if window.kept_back == 1:
                    self._log.warning("%s: further refusals are only counted for a while", name[:NAME] or "strangers")
                return
            window.said += 1
            self._log.warning("%s", text)
