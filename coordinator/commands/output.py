"""What commands say: stdout is data, stderr is for people."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

import msgspec


def print_object(value: object) -> None:
    """A line of JSON on stdout, at once: whoever reads it may wait for it."""
    print(msgspec.json.encode(value).decode(), flush=True)


def say(*lines: str) -> None:
    """Lines on stderr."""
    for line in lines:
        print(line, file=sys.stderr, flush=True)


def named_metrics(metrics: Mapping[str, float], loss: str) -> list[str]:
    """ "accuracy 0.5", "loss (mse) 0.25" and so on. loss: its name, empty if it is not known."""
    return [f"{key} ({loss}) {value:.4g}" if key == "loss" and loss else f"{key} {value:.4g}"
            for key, value in metrics.items()]  # fmt: skip


def print_result(options: argparse.Namespace, said: dict[str, Any]) -> None:
    """A command's result: a line of JSON, or words."""
    if options.json:
        print_object(said)
    else:
        print(", ".join(f"{key} {value}" for key, value in said.items()))
