"""Who may use which topic: the same on every broker of ours."""

from __future__ import annotations

from typing import Literal

from coordinator.ca import COORDINATOR
from edge_sdk.transport import DEVICE_NAME
from edge_sdk.transport.mqtt import DOWN, UP

Action = Literal["publish", "subscribe", "receive"]


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
