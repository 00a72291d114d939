"""From a user's function to the bytes of a bundle."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import io
import platform
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import msgspec
import torch

from edge_sdk.bundle import (
    MAX_BATCH,
    PREDICT_ONNX,
    PREDICT_PTE,
    TRAIN_ONNX,
    TRAIN_PTE,
    Manifest,
    Name,
    Options,
    Tensor,
    parameter_table,
    write_bundle,
)
from edge_sdk.crypto.identity import Identity
from edge_sdk.errors import ParameterError, SordinoError
from export.errors import place_of
from export.graph import NOT_USED, CapturedStep, TrainingSpec, Unit, capture
from export.losses import resolve_loss
from export.to_onnx import to_onnx, train_to_onnx

BackEnd = Literal["onnx", "executorch"]
BACK_ENDS: tuple[BackEnd, ...] = ("onnx", "executorch")
_DTYPES = {
    torch.float32: "float32",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.uint8: "uint8",
    torch.bool: "bool",
}


_ALREADY_IN_THE_LOSS = (
    ("cross_entropy", torch.ops.aten.softmax.int, "softmax"),
    ("binary_cross_entropy", torch.ops.aten.sigmoid.default, "sigmoid"),
)

LARGEST_COVERED_BATCH = 40
"""Up to it the worst case of float32's rounding of everybody else's part of the sum is within what the device's
sensitivity analysis leaves for it, but for draws of a probability below 1e-20 (docs/training-graph.md section 5)."""


@dataclass(frozen=True)
class Built:
    """A bundle with what was found while it was made."""

    bundle: bytes
    step: CapturedStep
    manifest: Manifest
    sizes: dict[str, int]
    """Bytes of every entry, in the bundle's order. The file is their sum and the archive's headers."""
    warnings: tuple[str, ...] = ()
    """What the builder should know, though the bundle is good; one sentence or two each."""


def load_spec(reference: str) -> TrainingSpec:
    """The spec that MODULE:FUNCTION returns. MODULE: a dotted name, or the path of a .py file.

    Raises ParameterError that says which half is wrong, or what the user's code raised and in which line.
    """
    module_name, separator, function_name = reference.rpartition(":")
    if not separator or not module_name or not function_name:
        raise ParameterError(f"{reference!r} is not MODULE:FUNCTION, for example examples/models/mlp.py:build")
    if module_name.endswith(".py"):
        path = Path(module_name)
        name = f"source_{path.stem}"  # no other module's: a user's export.py is not this package
        found = importlib.util.spec_from_file_location(name, path)
        if not path.is_file() or found is None or found.loader is None:
            raise ParameterError(f"there is no file {module_name}")
        module = importlib.util.module_from_spec(found)
        sys.modules[name] = module  # before it runs: dataclasses look their module up
        with _blamed(module_name):
            found.loader.exec_module(module)
    else:
        if "" not in sys.path:
            sys.path.insert(0, "")  # as `python -m` would: a module beside the user
        with _blamed(module_name):
            try:
                module = importlib.import_module(module_name)
            except ModuleNotFoundError as error:
                if error.name is None or not module_name.startswith(error.name):
                    raise  # the user's module is there; something that it imports is not
                raise ParameterError(f"there is no module {module_name}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ParameterError(f"{module_name} has no function {function_name}")
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise ParameterError(
            f"{reference} is called without arguments, but: {error}. Give it a default, or name a function without it"
        ) from error
    except ValueError:
        pass  # written in C, without a signature
    with _blamed(reference):
        spec = function()
    if not isinstance(spec, TrainingSpec):
        raise ParameterError(f"{reference} returned {type(spec).__name__}, not an export.graph.TrainingSpec")
    return spec


@contextlib.contextmanager
def _blamed(source: str) -> Iterator[None]:
    """What the user's own code raises, as a ParameterError that names the line in it."""
    try:
        yield
    except SordinoError:
        raise
    except Exception as error:
        raise ParameterError(f"{source} raised {type(error).__name__}: {error}{place_of(error)}") from error


def build(
    spec: TrainingSpec,
    publisher: Identity,
    *,
    unit: Unit,
    batch: int = 32,
    proximal: bool = False,
    back_ends: Sequence[BackEnd] = ("onnx",),
    progress: Callable[[str], None] = lambda stage: None,
) -> Built:
    """A signed bundle of `spec`: the same bytes for the same source and tools.

    unit: the privacy unit; "example" clips inside the graph, "device" takes plain SGD steps.  batch: examples in one
    run of the graph.  proximal: FedProx's term, for unit "device".  back_ends: "onnx" is always among them.  progress:
    is told each of `stages(back_ends)` as it begins.
    Raises UnsupportedModelError that names a layer and a remedy, ParameterError on options that do not go together.
    """
    try:
        msgspec.convert(spec.name, Name)
    except msgspec.ValidationError as error:
        raise ParameterError(
            f"name={spec.name!r}: a model's name is 1 to 64 of a-z, 0-9, '.', '_' and '-', and begins with a-z or 0-9"
        ) from error
    if not 1 <= batch <= MAX_BATCH:
        raise ParameterError(f"a batch of {batch}: a graph takes 1 to {MAX_BATCH} examples")
    if proximal and unit != "device":
        raise ParameterError("the proximal term belongs to local steps: unit 'device' only")
    progress("capture")
    step = capture(spec, unit, batch, proximal)
    graphs = {}
    progress(TRAIN_ONNX)
    graphs[TRAIN_ONNX] = train_to_onnx(step)
    progress(PREDICT_ONNX)
    graphs[PREDICT_ONNX] = to_onnx(step.predict, step.predict_example, step.predict_inputs, ["output"])
    tools = {"python": platform.python_version(), **{name: _public(name) for name in ("torch", "onnx", "onnxscript")}}
    if "executorch" in back_ends:
        progress(TRAIN_PTE)
        from export.to_executorch import to_executorch  # its import alone takes seconds

        graphs[TRAIN_PTE] = to_executorch(step.train, step.train_example)
        progress(PREDICT_PTE)
        graphs[PREDICT_PTE] = to_executorch(step.predict, step.predict_example)
        tools["executorch"] = _public("executorch")
    progress("sign")
    output = step.predict(*step.predict_example)
    classes = output.shape[-1] if resolve_loss(spec.loss).name == "cross_entropy" else None
    names = step.train_inputs[len(step.parameters) : len(step.parameters) + len(spec.inputs)]
    draft = Manifest(
        schema=1,
        name=spec.name,
        unit=unit,
        batch=batch,
        options=Options(proximal),
        parameters=parameter_table((p.name, tuple(p.value.shape), p.role) for p in step.parameters),
        inputs=tuple(
            _tensor(name, x, None if x.is_floating_point() else step.vocabulary)
            for name, x in zip(names, spec.inputs, strict=True)
        ),
        label=_tensor("y", spec.label, classes),
        output=_tensor("output", output[0], None),
        loss=_loss_name(spec),
        tools=tools,
    )
    values = {p.name: p.value.numpy() for p in step.parameters}
    bundle = write_bundle(draft, graphs, values, publisher)
    return Built(bundle, step, draft, _entry_sizes(bundle), tuple(_warnings(step, unit, batch)))


def stages(back_ends: Sequence[BackEnd]) -> tuple[str, ...]:
    """What `build` goes through, in order: "capture", each graph's entry, "sign"."""
    programs = (TRAIN_PTE, PREDICT_PTE) if "executorch" in back_ends else ()
    return ("capture", TRAIN_ONNX, PREDICT_ONNX, *programs, "sign")


def _entry_sizes(bundle: bytes) -> dict[str, int]:
    with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
        return {entry.filename: entry.file_size for entry in archive.infolist()}


def _warnings(step: CapturedStep, unit: Unit, batch: int) -> Iterator[str]:
    shared = {p.name for p in step.parameters if p.role == "shared"}
    idle = [row.parameter for row in step.report if row.reason == NOT_USED and row.parameter in shared]
    if idle:
        yield (
            f"{', '.join(idle)}: the loss does not depend on this, and yet every round sends it and adds noise to it. "
            "Remove it from the model, or name it in `frozen`."
        )
    for loss, operator, name in _ALREADY_IN_THE_LOSS:
        if step.loss.name == loss and step.recorder.output_operator is operator:
            yield f"The model ends in a {name}, and {loss} has one inside: it takes scores. Remove the model's."
    if unit == "example" and batch > LARGEST_COVERED_BATCH:
        yield (
            f"A batch of {batch} is above {LARGEST_COVERED_BATCH}: the worst case of float32's rounding is then not "
            "covered by the clip's slack of 1.001 (docs/training-graph.md section 5). A batch of 32 costs about as "
            "much time for each example."
        )


def _tensor(name: str, example: torch.Tensor, below: int | None) -> Tensor:
    if example.dtype not in _DTYPES:
        raise ParameterError(f"{name} is {example.dtype}: use one of {', '.join(_DTYPES.values())}")
    return Tensor(name, tuple(example.shape), _DTYPES[example.dtype], below)  # type: ignore[arg-type]


def _loss_name(spec: TrainingSpec) -> str:
    """The manifest's names are lower case with dots, dashes and underscores."""
    kept = "".join(c if c.isalnum() or c in "._-" else "-" for c in resolve_loss(spec.loss).name.lower())
    return kept.strip("._-")[:64] or "custom"


def _public(package: str) -> str:
    """A package's version without the build tag, which says where it was built and not what it does."""
    return version(package).partition("+")[0]
