"""The directory that a command works on."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from edge_sdk.errors import ParameterError

if TYPE_CHECKING:
    from coordinator.store import Store


def open_store(options: argparse.Namespace) -> Store:
    """Raises ParameterError if nothing was initialised here: a store that is empty is made by `init` alone."""
    from coordinator.config import NAME
    from coordinator.store import Store

    if not (options.dir / NAME).exists():
        raise ParameterError(f"{options.dir / NAME} is missing: `edge-coordinator init --dir {options.dir}` makes it")
    return Store(options.dir)
