"""What export refuses, and how it says so."""

from __future__ import annotations

from edge_sdk.errors import ParameterError


class UnsupportedModelError(ParameterError):
    """The model cannot be trained with per-example clipping as it is. The message names the layer and a remedy."""


class NoOnnxFormError(UnsupportedModelError):
    """A graph that cannot become ONNX.  operators: those that stopped it, by their names in PyTorch."""

    def __init__(self, operators: str) -> None:
        super().__init__(f"{operators} has no ONNX form: write the model and the loss in simpler operators")
        self.operators = operators
