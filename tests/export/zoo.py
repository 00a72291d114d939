"""The models of examples/models as a device would run them: captured, converted and loaded once for all tests."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from oracle import Runner, onnx_of, run_executorch, run_onnx

from export.graph import CapturedStep, TrainingSpec, capture

MODELS = Path(__file__).parents[2] / "examples" / "models"
ZOO = {
    "digits": ("digits.py:build", 1_930),
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


@functools.cache
def module_of(file: str) -> ModuleType:
    """Once, and under a name that nobody else loads it by: a class that was loaded again is another one, and what was
    made of the first cannot be pickled then, as Opacus does."""
    found = importlib.util.spec_from_file_location(f"zoo_{file.removesuffix('.py')}", MODELS / file)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[module.__name__] = module
    found.loader.exec_module(module)
    return module


def spec_of(name: str) -> TrainingSpec:
    file, function = ZOO[name][0].split(":")
    spec = getattr(module_of(file), function)()
    assert isinstance(spec, TrainingSpec)
    return spec


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
