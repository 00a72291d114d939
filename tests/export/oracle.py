"""What a training step has to give, computed the slow way: a loop over examples, in float64, with PyTorch's own losses.

Nothing of the package under test is used but the names and roles of the parameters.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn
from torch.func import functional_call

from export.graph import CapturedStep, TrainingSpec, Unit, capture
from export.to_executorch import to_executorch
from export.to_onnx import train_to_onnx

TOLERANCE = 1e-5
"""Of each tensor's norm."""
ROUNDING = 1e-7
"""Of the norm of all tensors together: a gradient that all but cancels is not known better in float32."""
LOOSE = 1e-4
"""Where float32 PyTorch, one example at a time, is no closer to float64 than a third of our distance."""


LOSS_BOUND = 1e4
"""Where a test does not ask for another: above any loss of these models."""


@dataclass(frozen=True)
class Expected:
    """gradients: name -> (B, *shape), every example's own gradient.  The rest: (B,)."""

    gradients: Mapping[str, Tensor]
    losses: Tensor
    correct: Tensor
    norms: Tensor
    """Over all shared parameters."""

    def clipped_sum(self, name: str, mask: Tensor, clip: float) -> Tensor:
        factor = torch.where(self.norms > clip, clip / self.norms, 1.0)
        return _weighted(mask.to(factor.dtype) * factor, self.gradients[name])

    def plain_sum(self, name: str, mask: Tensor) -> Tensor:
        return _weighted(mask, self.gradients[name])


def expected(
    spec: TrainingSpec, step: CapturedStep, inputs: Sequence[Tensor], labels: Tensor, dtype: torch.dtype = torch.float64
) -> Expected:
    """inputs: (B, ...) each.  labels: (B, ...)."""
    model = copy.deepcopy(spec.model).to(dtype)
    for module in model.modules():
        if isinstance(module, nn.modules.instancenorm._InstanceNorm):
            module.register_forward_hook(_with_contiguous_gradient)
    state = {p.name: as_dtype(p.value, dtype) for p in step.parameters}
    names = [p.name for p in step.parameters if p.role in ("shared", "local")]
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    losses, correct = [], []
    for i in range(labels.shape[0]):
        leaves = {name: state[name].clone().requires_grad_() for name in names}
        output = functional_call(model, {**state, **leaves}, tuple(as_dtype(x[i : i + 1], dtype) for x in inputs))
        while isinstance(output, tuple | list):
            output = output[0]
        label = as_dtype(labels[i : i + 1], dtype)
        loss = LOSSES[spec.loss](output, label) if isinstance(spec.loss, str) else spec.loss(output, label)[0]
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        for name, g in zip(names, found, strict=True):
            rows[name].append(torch.zeros_like(state[name]) if g is None else g)
        losses.append(loss.detach())
        correct.append(_correct(spec.loss, output.detach()[0], label[0]))
    gradients = {name: torch.stack(g) for name, g in rows.items()}
    shared = [p.name for p in step.parameters if p.role == "shared"]
    squares = torch.stack([gradients[name].reshape(len(losses), -1).square().sum(1) for name in shared])
    return Expected(gradients, torch.stack(losses), torch.tensor(correct, dtype=dtype), squares.sum(0).sqrt())


def _with_contiguous_gradient(module: nn.Module, args: object, output: Tensor) -> None:
    """torch 2.13.0 on a CPU reads an instance norm's output gradient in the wrong order if that is channels last.

    F.instance_norm(x, bias=b) with such a gradient g then gives b a gradient that is not g.sum((0, 2, 3)).
    """
    if output.requires_grad:
        output.register_hook(lambda g: g.contiguous())


def _cross_entropy(output: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.flatten(0, -2), y.flatten().long())


LOSSES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": _cross_entropy,
    "binary_cross_entropy": nn.functional.binary_cross_entropy_with_logits,
    "mse": nn.functional.mse_loss,
}
"""The means over one example, as PyTorch has them."""


def _correct(loss: object, output: Tensor, y: Tensor) -> float:
    if loss == "cross_entropy":
        return float((output.argmax(-1) == y).double().mean())
    if loss == "binary_cross_entropy":
        return float(((output > 0) == (y > 0.5)).double().mean())
    return 0.0


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _weighted(weights: Tensor, rows: Tensor) -> Tensor:
    return (weights.to(rows.dtype).reshape([-1] + [1] * (rows.dim() - 1)) * rows).sum(0)


@dataclass(frozen=True)
class Batch:
    """inputs: (B, ...) each.  labels: (B, ...).  mask: (B,) of 0 and 1."""

    inputs: tuple[Tensor, ...]
    labels: Tensor
    mask: Tensor


def draw_batch(spec: TrainingSpec, step: CapturedStep, size: int, seed: int = 1) -> Batch:
    """Random examples, the second of them masked out if there is one."""
    generator = torch.Generator().manual_seed(seed)
    inputs = tuple(
        torch.randn(size, *x.shape, generator=generator)
        if x.is_floating_point()
        else torch.randint(0, step.vocabulary or 2, (size, *x.shape), generator=generator, dtype=x.dtype)
        for x in spec.inputs
    )
    if spec.label.is_floating_point():
        labels = torch.rand(size, *spec.label.shape, generator=generator)
    else:
        labels = torch.randint(0, 3, (size, *spec.label.shape), generator=generator, dtype=spec.label.dtype)
    mask = torch.ones(size)
    mask[1:2] = 0.0
    return Batch(inputs, labels, mask)


Runner = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def run_fx(step: CapturedStep) -> Runner:
    """The captured graph in PyTorch."""

    def run(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            return dict(zip(step.train_outputs, step.train(*(feeds[n] for n in step.train_inputs)), strict=True))

    return run


def onnx_of(step: CapturedStep) -> bytes:
    return train_to_onnx(step)


def run_onnx(model: bytes) -> Runner:
    """The same graph in ONNX Runtime, one thread."""
    session = session_of(model)
    names = [output.name for output in session.get_outputs()]

    def run(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        arrays = session.run(names, {name: np.asarray(tensor) for name, tensor in feeds.items()})
        return {name: torch.from_numpy(np.array(array)) for name, array in zip(names, arrays, strict=True)}

    return run


def session_of(model: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run_executorch(step: CapturedStep) -> Runner:
    """The same graph in ExecuTorch, lowered with XNNPACK as a build lowers it."""
    run = load_executorch(to_executorch(step.train, step.train_example))

    def named(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(zip(step.train_outputs, run([feeds[n].contiguous() for n in step.train_inputs]), strict=True))

    return named


def load_executorch(program: bytes) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """The program's one method: inputs to outputs, in the program's order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch and executorch warn about each other
        from executorch.runtime import Runtime

        loaded = Runtime.get().load_program(program)
    method = loaded.load_method("forward")

    def run(inputs: Sequence[Tensor], kept: object = (program, loaded)) -> list[Tensor]:
        # A method runs in its program's memory without keeping it alive: `kept` does.
        return [output.clone() for output in method.execute(list(inputs))]

    return run


def feeds_of(step: CapturedStep, batch: Batch, **scalars: float | Tensor) -> dict[str, Tensor]:
    """Every input of the step by its name."""
    names = ["x"] if len(batch.inputs) == 1 else [f"x{i}" for i in range(len(batch.inputs))]
    found = {p.name: p.value for p in step.parameters}
    found |= dict(zip(names, batch.inputs, strict=True)) | {"y": batch.labels, "mask": batch.mask}
    if "loss_bound" in step.train_inputs:
        found["loss_bound"] = torch.tensor(LOSS_BOUND)
    return found | {name: torch.as_tensor(value) for name, value in scalars.items()}


def middle_clip(norms: Tensor, mask: Tensor) -> float:
    """A bound that clips about half of the examples and is not close to any norm."""
    kept = norms[mask > 0].sort().values
    half = len(kept) // 2
    if len(kept) <= 1:
        return float(kept.sum()) * 0.5 or 1.0
    return float((kept[half - 1] + kept[half]) / 2) or 1.0


def assert_example_step(
    spec: TrainingSpec,
    step: CapturedStep,
    batch: Batch,
    run: Runner,
    clip: float | None = None,
) -> None:
    """Every output of a unit="example" step equals the oracle's; the loss bound is one that some losses exceed."""
    exact = expected(spec, step, batch.inputs, batch.labels)
    bound = float(np.float32(middle_clip(exact.norms, batch.mask) if clip is None else clip))
    loss_bound = float(np.float32(middle_clip(exact.losses.clamp(min=0.0), batch.mask)))
    found = run(feeds_of(step, batch, clip=bound, loss_bound=loss_bound))
    wanted = {}
    for p in step.parameters:
        if p.role == "shared":
            wanted[f"grad.{p.name}"] = exact.clipped_sum(p.name, batch.mask, bound)
        elif p.role == "local":
            wanted[f"local_grad.{p.name}"] = exact.plain_sum(p.name, batch.mask)

    def plain() -> dict[str, Tensor]:
        float32 = expected(spec, step, batch.inputs, batch.labels, torch.float32)
        return {
            name: float32.clipped_sum(name.removeprefix("grad."), batch.mask, bound)
            if name.startswith("grad.")
            else float32.plain_sum(name.removeprefix("local_grad."), batch.mask)
            for name in wanted
        }

    assert_gradients(found, wanted, plain)
    _assert_metrics(found, exact, exact.losses.clamp(0.0, loss_bound), batch.mask)
    assert float(found["clipped"]) == float((batch.mask * (exact.norms > bound)).sum())


def assert_device_step(
    spec: TrainingSpec,
    step: CapturedStep,
    batch: Batch,
    run: Runner,
    lr: float = 0.25,
    mu: float | None = None,
) -> None:
    """Every output of a unit="device" step equals the oracle's: one plain SGD step on the mean of the counted losses.

    mu: the proximal term's weight; the anchors are the parameters with something added.
    """
    exact = expected(spec, step, batch.inputs, batch.labels)
    scalars: dict[str, float | Tensor] = {"lr": lr}
    trainable = [p for p in step.parameters if p.role in ("shared", "local")]
    anchors = {p.name: p.value + 0.5 for p in trainable}
    if mu is not None:
        scalars |= {"mu": mu} | {f"anchor.{name}": anchor for name, anchor in anchors.items()}
    found = run(feeds_of(step, batch, **scalars))
    count = max(float(batch.mask.sum()), 1.0)
    for p in trainable:
        g = exact.plain_sum(p.name, batch.mask) / count
        if mu is not None:
            g = g + mu * (p.value.double() - anchors[p.name].double())
        wanted = p.value.double() - lr * g
        # The new parameter is the old one and a change: float32 holds it to the larger of the two.
        scale = max(float(wanted.norm()), float(p.value.norm()), lr * float(g.norm()))
        assert float((found[f"new.{p.name}"].double() - wanted).norm()) <= TOLERANCE * scale, p.name
    _assert_metrics(found, exact, exact.losses, batch.mask)
    assert float(found["clipped"]) == 0.0


def _assert_metrics(found: Mapping[str, Tensor], exact: Expected, losses: Tensor, mask: Tensor) -> None:
    loss = float((losses * mask).sum())
    assert abs(float(found["loss"]) - loss) <= TOLERANCE * max(abs(loss), 1e-2)
    assert abs(float(found["correct"]) - float((exact.correct * mask).sum())) <= 1e-5
    assert float(found["count"]) == float(mask.sum())
    assert float(found["invalid"]) == 0.0


def assert_gradients(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], plain: Callable[[], Mapping[str, Tensor]]
) -> None:
    """Each tensor to TOLERANCE of its norm, or to LOOSE where plain float32 is no better.

    A tensor whose true gradient is zero, as that of an attention's key bias, is held to the norm of all of them.
    """
    names = {name for name in found if name.startswith(("grad.", "local_grad."))}
    assert names == set(wanted)
    everything = float(torch.stack([w.norm() for w in wanted.values()]).norm())
    float32: Mapping[str, Any] | None = None
    for name, w in wanted.items():
        assert found[name].shape == w.shape, name
        error, norm = float((found[name].double() - w).norm()), float(w.norm())
        if error <= max(TOLERANCE * norm, ROUNDING * everything):
            continue
        if norm <= 1e-6 * everything and error <= 1e-6 * everything:
            continue
        float32 = plain() if float32 is None else float32
        theirs = float((float32[name].double() - w).norm())
        message = f"{name}: {error:.2e} away, plain float32 is {theirs:.2e} away; the norm is {norm:.2e}"
        assert error <= min(LOOSE * norm, 3 * theirs), message


def check(
    spec: TrainingSpec,
    size: int = 4,
    unit: Unit = "example",
    onnx: bool = False,
    executorch: bool = False,
    proximal: bool = False,
    seed: int = 1,
) -> CapturedStep:
    """Capture, run and compare: in PyTorch, and in ONNX Runtime and ExecuTorch too if asked."""
    step = capture(spec, unit, size, proximal)
    batch = draw_batch(spec, step, size, seed)
    runners = [run_fx(step)]
    if onnx:
        runners.append(run_onnx(onnx_of(step)))
    if executorch:
        runners.append(run_executorch(step))
    for run in runners:
        if unit == "example":
            assert_example_step(spec, step, batch, run)
        else:
            assert_device_step(spec, step, batch, run, mu=0.5 if proximal else None)
    return step


def paths(step: CapturedStep) -> dict[str, str]:
    """Parameter -> "fast" or "fallback"."""
    return {line.parameter: line.path for line in step.report}
