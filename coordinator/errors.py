"""The error that the coordinator's store raises."""

from __future__ import annotations

from edge_sdk.errors import SordinoError


class StoreError(SordinoError):
    """The store cannot be used: another version wrote it, another process serves from it, or it is damaged."""
