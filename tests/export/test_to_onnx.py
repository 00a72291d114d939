"""The ONNX file: the same at every build, complete, and nothing in it but the graph."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

from oracle import onnx_of, session_of  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from edge_sdk.onnx_graph import OPERATORS, inspect  # noqa: E402
from export.graph import CapturedStep, TrainingSpec, Unit, capture  # noqa: E402
from export.to_onnx import OPSET, to_onnx  # noqa: E402

CLASS = torch.zeros((), dtype=torch.long)
UNITS: list[tuple[Unit, bool]] = [("example", False), ("device", False), ("device", True)]


class Plain(nn.Module):
    """A parameter and a buffer that nothing reads, buffers of integers and booleans, two biases in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(1, 2, 3), nn.Linear(32, 3)
        self.again = nn.Parameter(torch.rand(3))
        self.idle = nn.Parameter(torch.rand(2, 2))
        self.register_buffer("order", torch.tensor([2, 1, 0]))
        self.register_buffer("idle_flags", torch.tensor([True, False]))
        self.register_buffer("idle_bytes", torch.zeros(3, dtype=torch.uint8))
        self.register_buffer("idle_numbers", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        return (self.last(torch.relu(self.conv(x)).flatten(1)) + self.again)[:, self.order]


def captured(unit: Unit = "example", proximal: bool = False) -> CapturedStep:
    torch.manual_seed(0)
    return capture(TrainingSpec(Plain(), "cross_entropy", [torch.zeros(1, 6, 6)], CLASS), unit, 4, proximal)


@pytest.fixture(scope="module")
def step() -> CapturedStep:
    return captured()


@pytest.fixture(scope="module")
def model(step: CapturedStep) -> bytes:
    return onnx_of(step)


def test_the_same_model_gives_the_same_bytes(step: CapturedStep, model: bytes) -> None:
    assert onnx_of(step) == model
    assert onnx_of(captured()) == model


@pytest.mark.parametrize(("unit", "proximal"), UNITS)
def test_every_input_and_output_is_there_in_order_with_its_shape_and_type(unit: Unit, proximal: bool) -> None:
    step = captured(unit, proximal)
    session = session_of(onnx_of(step))
    kinds = {
        torch.float32: "tensor(float)",
        torch.int64: "tensor(int64)",
        torch.bool: "tensor(bool)",
        torch.uint8: "tensor(uint8)",
    }
    assert [(i.name, i.type, i.shape) for i in session.get_inputs()] == [
        (name, kinds[x.dtype], list(x.shape)) for name, x in zip(step.train_inputs, step.train_example, strict=True)
    ]
    outputs = {output.name: output for output in session.get_outputs()}
    assert list(outputs) == list(step.train_outputs)
    for p in step.parameters:
        if p.role == "shared":
            prefix = "grad" if unit == "example" else "new"
            assert outputs[f"{prefix}.{p.name}"].shape == list(p.value.shape)
    for name in ("loss", "correct", "count", "clipped", "invalid"):
        assert outputs[name].shape == []


def test_the_names_of_inputs_and_outputs_are_those_of_the_bundle(step: CapturedStep) -> None:
    names = [p.name for p in step.parameters]
    assert step.train_inputs == (*names, "x", "y", "mask", "clip", "loss_bound")
    assert step.predict_inputs == (*names, "x")
    extra = captured("device", proximal=True).train_inputs[len(names) :]
    anchors = [f"anchor.{p.name}" for p in step.parameters if p.role == "shared"]
    assert extra == ("x", "y", "mask", "lr", "mu", *anchors)


def strings_in(message: object) -> list[str]:
    """Every string of a protobuf message, however deep."""
    found: list[str] = []
    for field, value in message.ListFields():  # type: ignore[attr-defined]
        for item in value if field.is_repeated else [value]:
            if field.message_type is not None:
                found += strings_in(item)
            elif isinstance(item, str):
                found.append(item)
    return found


def test_nothing_in_the_file_tells_where_or_by_what_it_was_made(model: bytes) -> None:
    proto = onnx.load_from_string(model)
    assert not proto.doc_string
    assert not proto.metadata_props
    assert not proto.graph.value_info
    assert not proto.functions
    assert not any(node.doc_string or node.metadata_props for node in proto.graph.node)
    texts = strings_in(proto)
    here = [str(Path(torch.__file__).parent), str(Path(__file__).parent), str(Path.home()), torch.__version__]
    for text in texts:
        assert "/" not in text, text
        assert ".py" not in text, text
        assert not any(place in text for place in here), text
    assert proto.producer_name == "sordino"


def test_weights_are_inputs_and_the_file_holds_none(model: bytes) -> None:
    proto = onnx.load_from_string(model)
    assert sum(len(tensor.raw_data) for tensor in proto.graph.initializer) < 1000
    assert not {value.name for value in proto.graph.input} & {tensor.name for tensor in proto.graph.initializer}


def test_the_reader_on_the_device_allows_the_file(step: CapturedStep, model: bytes) -> None:
    summary = inspect(model, "train.onnx")
    assert summary.opset == OPSET
    assert set(summary.operators) <= OPERATORS
    assert [tensor.name for tensor in summary.inputs] == list(step.train_inputs)
    assert [tensor.name for tensor in summary.outputs] == list(step.train_outputs)
    predict = to_onnx(step.predict, step.predict_example, step.predict_inputs, ["output"])
    assert inspect(predict, "predict.onnx").outputs[0].shape == (4, 3)
