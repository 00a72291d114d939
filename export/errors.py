"""What export refuses, and how it says so."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path

from edge_sdk.errors import ParameterError


class UnsupportedModelError(ParameterError):
    """The model cannot be trained with per-example clipping as it is. The message names the layer and a remedy."""


class NoOnnxFormError(UnsupportedModelError):
    """A graph that cannot become ONNX.  operators: those that stopped it, by their names in PyTorch."""

    def __init__(self, operators: str) -> None:
        super().__init__(f"{operators} has no ONNX form: write the model and the loss in simpler operators")
        self.operators = operators


_NOT_THE_USERS = (Path(__file__).parent, *(Path(sysconfig.get_path(n)) for n in ("stdlib", "purelib", "platlib")))


def first_line(error: BaseException) -> str:
    """What an error says, without PyTorch's advice to its developers and without a last full stop."""
    said = str(error).strip()
    return said.splitlines()[0].removesuffix(".") if said else type(error).__name__


def place_of(error: BaseException) -> str:
    """Where in the user's own code it was raised, as " (net.py, line 12)"; empty if it was not.

    One line of theirs says more than a stack of which all but one are PyTorch's and ours.
    """
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_file() and not any(path.is_relative_to(folder) for folder in _NOT_THE_USERS):
            return f" ({path.name}, line {frame.lineno})"
    return ""
