"""edge-device: a device from the command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from edge_sdk.commands import device_main


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit 0: done, 1: failed (the reason is on stderr), 2: usage."""
    return device_main(arguments)


if __name__ == "__main__":
    sys.exit(main())
