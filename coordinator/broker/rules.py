"""Who may use which topic, and what is said of those that tried another: the same on every broker of ours."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from coordinator.ca import COORDINATOR
from edge_sdk.transport import DEVICE_NAME
from edge_sdk.transport.mqtt import DOWN, UP

log = logging.getLogger("sordino.broker")

Action = Literal["publish", "subscribe", "receive"]

LINES = 10
STRANGERS_LINES = 60
"""So many refusals of one client are said in a window, and of all strangers together; further ones are counted."""

WINDOW_S = 60.0

MOST_CLIENTS = 4096
"""That are kept count of: names come from certificates, so it takes a fleet of them to get there."""


def allowed(name: str, topic: str, action: Action) -> bool:
    """The topic rules. name: a certificate's CN.  topic: of a message, or to subscribe to."""
    if name == COORDINATOR:
        if action == "subscribe":
            return topic == UP + "+"
        prefix = UP if action == "receive" else DOWN
        return topic.startswith(prefix) and DEVICE_NAME.match(topic[len(prefix) :]) is not None
    if not DEVICE_NAME.match(name):
        return False
    return topic == (UP if action == "publish" else DOWN) + name


@dataclass
class _Window:
    begun_s: float
    said: int = 0
    kept_back: int = 0


class Refusals:
    """Says in the log who was refused what, but never so often that one client fills the disk with it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """clock: seconds."""
        self._clock = clock
        self._lock = threading.Lock()
        self._windows: dict[str, _Window] = {}

    def topic(self, name: str, action: Action, topic: str, *, why: str = "refused") -> None:
        """A client wanted a topic that is not its own."""
        self.say(name, f"{name[:16]} may not {action} {topic[:128]!r}: {why}")

    def say(self, name: str, text: str) -> None:
        """name: whose fault it is, as far as that is known; "" for all strangers together."""
        with self._lock:
            now_s = self._clock()
            window = self._windows.get(name)
            if window is None or now_s - window.begun_s >= WINDOW_S:
                if window is not None and window.kept_back:
                    log.warning("%s was refused %d more times", name[:16] or "strangers", window.kept_back)
                if len(self._windows) >= MOST_CLIENTS:
                    self._windows.clear()
                window = self._windows[name] = _Window(now_s)
            if window.said == (LINES if name else STRANGERS_LINES):
                window.kept_back += 1
                if window.kept_back == 1:
                    log.warning("%s: further refusals are only counted for a while", name[:16] or "strangers")
                return
            window.said += 1
            log.warning("%s", text)
