"""What export refuses, and how it says so."""

from __future__ import annotations

from edge_sdk.errors import ParameterError


class UnsupportedModelError(ParameterError):
    """The model cannot be trained with per-example clipping as it is. The message names the layer and a remedy."""
