"""The models of examples/models as a device would run them: captured, converted and loaded once for all tests."""

from __future__ import annotations

import functools
from pathlib import Path

from oracle import Runner, onnx_of, run_executorch, run_onnx

from export.build import load_spec
from export.graph import CapturedStep, TrainingSpec, capture

MODELS = Path(__file__).parents[2] / "examples" / "models"
ZOO = {
    "logistic": ("logistic.py:build", 7_850),
    "mlp": ("mlp.py:build", 101_770),
    "lenet": ("lenet.py:build", 61_706),
    "ds_cnn": ("ds_cnn.py:build", 47_052),
    "mobilenet": ("mobilenet.py:build", 97_050),
    "gru": ("gru.py:build", 87_041),
    "transformer": ("transformer.py:build", 110_529),
    "lora": ("transformer.py:build_lora", 8_192),
    "scattering": ("scattering.py:build", 39_700),
}
"""Name -> (file and function, trained parameters)."""
SIZE = 4
"""Examples in a batch."""


def spec_of(name: str) -> TrainingSpec:
    return load_spec(f"{MODELS}/{ZOO[name][0]}")


@functools.cache
def captured(name: str) -> tuple[TrainingSpec, CapturedStep, bytes, Runner]:
    """With unit "example": the spec, the step, its ONNX file, and that file in ONNX Runtime."""
    spec = spec_of(name)
    step = capture(spec, "example", SIZE)
    model = onnx_of(step)
    return spec, step, model, run_onnx(model)


@functools.cache
def lowered(name: str) -> Runner:
    """The same step in ExecuTorch."""
    return run_executorch(captured(name)[1])
