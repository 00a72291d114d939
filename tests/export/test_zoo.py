"""Every model of the zoo as a device would run it, in both run times, against a float64 loop over the examples."""

from __future__ import annotations

import re

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from oracle import (  # noqa: E402
    Batch,
    assert_device_step,
    assert_example_step,
    draw_batch,
    feeds_of,
    onnx_of,
    run_onnx,
)
from zoo import MODELS, SIZE, ZOO, captured, lowered, spec_of  # noqa: E402

from edge_sdk.onnx_graph import inspect  # noqa: E402
from export.graph import capture  # noqa: E402
from export.to_onnx import rows_to_onnx  # noqa: E402

each_model = pytest.mark.parametrize("name", ZOO)


@each_model
def test_the_clipped_sum_is_that_of_the_examples_one_by_one(name: str) -> None:
    spec, step, _, run = captured(name)
    assert_example_step(spec, step, draw_batch(spec, step, SIZE), run)


@each_model
def test_the_clipped_sum_is_the_same_in_executorch(name: str) -> None:
    pytest.importorskip("executorch")
    spec, step, _, _ = captured(name)
    assert_example_step(spec, step, draw_batch(spec, step, SIZE), lowered(name))


@each_model
def test_a_plain_step_is_one_of_sgd_on_the_mean_of_the_examples(name: str) -> None:
    spec = spec_of(name)
    step = capture(spec, "device", SIZE)
    assert_device_step(spec, step, draw_batch(spec, step, SIZE), run_onnx(onnx_of(step)))


@each_model
def test_no_model_needs_the_slow_fallback(name: str) -> None:
    _, step, _, _ = captured(name)
    assert {line.path for line in step.report} == {"fast"}
    assert {line.parameter for line in step.report} == {p.name for p in step.parameters if p.role == "shared"}


@each_model
def test_what_is_masked_out_changes_no_bit_of_the_sum(name: str) -> None:
    """Not even NaN, where the input can hold one."""
    spec, step, _, run = captured(name)
    batch = draw_batch(spec, step, SIZE)
    masked = int((batch.mask == 0).nonzero()[0])
    other = tuple(x.clone() for x in batch.inputs)
    for x in other:
        x[masked] = float("nan") if x.is_floating_point() else x[masked - 1]
    found = run(feeds_of(step, batch, clip=0.5))
    again = run(feeds_of(step, Batch(other, batch.labels, batch.mask), clip=0.5))
    for key in found:
        assert torch.equal(found[key], again[key]), key


@pytest.mark.parametrize("name", [name for name in ZOO if name not in ("gru", "transformer", "lora")])
def test_an_example_that_is_not_finite_is_counted_as_invalid_and_adds_nothing(name: str) -> None:
    spec, step, _, run = captured(name)
    batch = draw_batch(spec, step, SIZE)
    without = batch.mask.clone()
    without[2] = 0.0
    expected = run(feeds_of(step, Batch(batch.inputs, batch.labels, without), clip=0.5))
    broken = tuple(x.clone() for x in batch.inputs)
    for x in broken:
        x[2].view(-1)[:1] = float("inf")
    found = run(feeds_of(step, Batch(broken, batch.labels, batch.mask), clip=0.5))
    assert float(found["invalid"]) == 1.0
    assert float(expected["invalid"]) == 0.0
    for key in found.keys() - {"invalid"}:
        assert torch.equal(found[key], expected[key]), key


@each_model
def test_a_device_would_run_the_graph(name: str) -> None:
    """Only operators and types that the check before onnxruntime lets through, and no bulky constant."""
    _, step, model, _ = captured(name)
    summary = inspect(model, "train.onnx")
    assert tuple(value.name for value in summary.inputs) == step.train_inputs
    assert tuple(value.name for value in summary.outputs) == step.train_outputs
    assert len(model) < 2_000_000


@each_model
def test_for_inference_a_model_takes_any_number_of_rows(name: str) -> None:
    spec = spec_of(name)
    model = spec.model.eval()
    names = [f"x{i}" for i in range(len(spec.inputs))]
    session = onnxruntime.InferenceSession(rows_to_onnx(model, spec.inputs, names), providers=["CPUExecutionProvider"])
    torch.manual_seed(0)
    for rows in (1, 3):
        shapes = [(rows, *x.shape) for x in spec.inputs]
        inputs = [
            torch.randn(shape) if x.is_floating_point() else torch.randint(0, 9, shape)
            for x, shape in zip(spec.inputs, shapes, strict=True)
        ]
        (output,) = session.run(["output"], {n: x.numpy() for n, x in zip(names, inputs, strict=True)})
        torch.testing.assert_close(torch.from_numpy(output), model(*inputs).detach(), rtol=1e-4, atol=1e-5)


@each_model
def test_a_model_is_the_same_at_every_build_and_as_large_as_its_page_says(name: str) -> None:
    first, second = spec_of(name).model.state_dict(), spec_of(name).model.state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(first[key], second[key]) for key in first)
    spec = spec_of(name)
    frozen = tuple(spec.frozen)
    trained = sum(p.numel() for n, p in spec.model.named_parameters() if p.requires_grad and not n.startswith(frozen))
    assert trained == ZOO[name][1]
    page = (MODELS / ZOO[name][0].split(":")[0]).read_text()
    assert f"{trained:,} parameters" in page.replace("\n", " ")


def test_the_zoo_is_every_model_that_the_readme_counts() -> None:
    """Each file's functions whose name begins with `build`; none is left out of the tests here."""
    found = {
        f"{path.name}:{function}"
        for path in MODELS.glob("*.py")
        for function in re.findall(r"^def (build\w*)\(", path.read_text(), re.MULTILINE)
    }
    assert found == {source for source, _ in ZOO.values()}
    numbers = dict(enumerate(["Eight", "Nine", "Ten", "Eleven", "Twelve"], start=8))
    assert f"{numbers[len(ZOO)]} models to start from" in (MODELS.parents[1] / "README.md").read_text()
