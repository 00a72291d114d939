"""A broker that the operator runs. It has to keep the rules of docs/operating.md itself; we only connect."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path

from edge_sdk.transport.mqtt import Credentials, MqttHub

log = logging.getLogger("sordino.broker")


class ExternalBroker:
    """See `coordinator.broker.Broker`."""

    name = "external"

    def __init__(self, url: str, directory: Path) -> None:
        self.url = url
        self._directory = directory

    def link(self, credentials: Credentials) -> MqttHub:
        return MqttHub(self.url, credentials)

    def revoke(self, devices: Collection[str]) -> None:
        """The coordinator drops what revoked devices send; that the broker keeps them out is its operator's matter."""
        log.warning(
            "%d devices are revoked: load %s into the broker at %s", len(devices), self._directory / "crl.pem", self.url
        )

    def silence(self, devices: Collection[str]) -> None:
        """Only the broker could keep them out: what they send is dropped here, but takes a share of its queue."""
        for device in devices:
            log.warning("device %s floods the broker at %s, which is its operator's to stop", device[:16], self.url)

    def close(self) -> None:
        """It is not ours to end."""
