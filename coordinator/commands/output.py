"""What commands say: stdout is data, stderr is for people."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import msgspec


def print_object(value: object) -> None:
    """A line of JSON on stdout, at once: whoever reads it may wait for it."""
    print(msgspec.json.encode(value).decode(), flush=True)


def say(*lines: str) -> None:
    """Lines on stderr."""
    for line in lines:
        print(line, file=sys.stderr, flush=True)


def print_result(options: argparse.Namespace, said: dict[str, Any]) -> None:
    """A command's result: a line of JSON, or words."""
    if options.json:
        print_object(said)
    else:
        print(", ".join(f"{key} {value}" for key, value in said.items()))
