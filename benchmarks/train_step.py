"""What one training step with per-example clipping costs, against PyTorch without privacy and against Opacus.

    python benchmarks/train_step.py --json --model mlp --model lenet --backend onnxruntime --batch 32

For every model of examples/models but digits (a linear layer, as logistic is), in one process with one thread: the
captured step in each back end, eager PyTorch's ordinary SGD step (forward, backward, update; nothing clipped),
PyTorch's vmap(grad) with clipping and summing, and Opacus with ghost clipping and its noise off. The contenders take
turns, so that a busy machine disturbs all of them alike; a figure is the median over the turns, in milliseconds. What a
contender cannot do is null, with the reason on stderr; a back end that cannot take part has a row of nulls with its
`reason`, also where its program is not built within `--build-seconds` (ExecuTorch's lowering takes minutes for graphs
of thousands of operators).

`max_rel_error` is the largest distance of a tensor of the clipped sum (unit "device": of the new parameters' change)
from the same computed in float64 one example at a time, over that tensor's norm. Half of the examples are clipped, and
the last one is masked out.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import onnxruntime
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from export.build import load_spec
from export.graph import CapturedStep, TrainingSpec, Unit, capture
from export.losses import Loss, resolve_loss
from export.to_onnx import train_to_onnx

MODELS = Path(__file__).parents[1] / "examples" / "models"
ZOO = {
    "logistic": "logistic.py:build",
    "mlp": "mlp.py:build",
    "lenet": "lenet.py:build",
    "ds_cnn": "ds_cnn.py:build",
    "mobilenet": "mobilenet.py:build",
    "gru": "gru.py:build",
    "transformer": "transformer.py:build",
    "lora": "transformer.py:build_lora",
    "scattering": "scattering.py:build",
}
BACKENDS = ("onnxruntime", "executorch")
LEARNING_RATE = 2.0**-10
LOSS_BOUND = 4.0
LEAST_TURNS = 9
TURN_S = 0.01

Run = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One model, one batch. clip: a bound that half of the examples exceed."""

    spec: TrainingSpec
    step: CapturedStep
    loss: Loss
    unit: Unit
    inputs: tuple[Tensor, ...]
    labels: Tensor
    mask: Tensor
    clip: Tensor
    expected: Mapping[str, Tensor]
    """Output name -> the exact sum (or the exact change of the parameter), float64."""

    @property
    def feeds(self) -> tuple[Tensor, ...]:
        """Every input of the training graph, in order."""
        scalars = (self.clip, torch.tensor(LOSS_BOUND)) if self.unit == "example" else (torch.tensor(LEARNING_RATE),)
        return (*(p.value for p in self.step.parameters), *self.inputs, self.labels, self.mask, *scalars)


class Unable(Exception):
    """A contender that cannot take part, and why."""


def prepare(name: str, unit: Unit, batch: int) -> Case:
    spec = load_spec(f"{MODELS / ZOO[name].split(':')[0]}:{ZOO[name].split(':')[1]}")
    step = capture(spec, unit, batch)
    loss = resolve_loss(spec.loss)
    generator = torch.Generator().manual_seed(1)

    def draw(like: Tensor, below: int) -> Tensor:
        if like.is_floating_point():
            return torch.randn((batch, *like.shape), generator=generator, dtype=like.dtype)
        return torch.randint(0, below, (batch, *like.shape), generator=generator, dtype=like.dtype)

    inputs = tuple(draw(x, spec.vocabulary or 2) for x in spec.inputs)
    labels = draw(spec.label, spec.vocabulary or 10)
    mask = torch.ones(batch)
    if batch > 1:
        mask[-1] = 0.0
    gradients = exact_gradients(spec, step, loss, inputs, labels)
    squares = torch.stack([g.reshape(batch, -1).square().sum(1) for g in gradients.values()])
    norms = squares.sum(0).sqrt()
    clip = norms.median().float()
    if unit == "example":
        weights = mask.double() * (clip.double() / norms).clamp(max=1.0)
        expected = {f"grad.{n}": torch.einsum("b,b...->...", weights, g) for n, g in gradients.items()}
    else:
        weights = mask.double() / mask.double().sum()
        expected = {f"new.{n}": -LEARNING_RATE * torch.einsum("b,b...->...", weights, g) for n, g in gradients.items()}
    return Case(spec, step, loss, unit, inputs, labels, mask, clip, expected)


def exact_gradients(
    spec: TrainingSpec, step: CapturedStep, loss: Loss, inputs: Sequence[Tensor], labels: Tensor
) -> dict[str, Tensor]:
    """Every example's gradient, (B, *shape) float64 for each trained parameter."""

    def double(value: Tensor) -> Tensor:
        return value.double() if value.is_floating_point() else value

    model = copy.deepcopy(spec.model).double()
    state = {p.name: double(p.value) for p in step.parameters}
    names = [p.name for p in step.parameters if p.role == "shared"]
    rows = []
    for i in range(len(labels)):
        leaves = {n: state[n].clone().requires_grad_() for n in names}
        output = functional_call(model, {**state, **leaves}, tuple(double(x[i : i + 1]) for x in inputs))
        value = loss.per_example(output, labels[i : i + 1])[0]
        rows.append(torch.autograd.grad(value, list(leaves.values())))
    return {n: torch.stack([row[k] for row in rows]) for k, n in enumerate(names)}


def error_of(case: Case, outputs: Mapping[str, Tensor]) -> float:
    """The largest relative distance of a tensor from the exact one."""
    before = {f"new.{p.name}": p.value.double() for p in case.step.parameters} if case.unit == "device" else {}
    worst = 0.0
    for name, exact in case.expected.items():
        found = outputs[name].double() - before.get(name, 0.0)
        # A change of a parameter is only as exact as float32 holds the parameter.
        scale = exact.norm() + (before[name].norm() if name in before else 0.0)
        worst = max(worst, float((found - exact).norm() / scale.clamp(min=1e-30)))
    return worst


def on_onnxruntime(case: Case) -> tuple[Run, dict[str, Tensor]]:
    step = case.step
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    model = train_to_onnx(step)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    kept = []
    for name, tensor in zip(step.train_inputs, case.feeds, strict=True):
        kept.append(onnxruntime.OrtValue.ortvalue_from_numpy(tensor.contiguous().numpy()))
        binding.bind_ortvalue_input(name, kept[-1])
    for name in step.train_outputs:
        binding.bind_output(name)

    def run() -> object:
        return session.run_with_iobinding(binding) or kept  # the values must outlive the binding

    run()
    arrays = binding.copy_outputs_to_cpu()
    return run, {n: torch.from_numpy(array) for n, array in zip(step.train_outputs, arrays, strict=True)}


def on_executorch(case: Case, build_seconds: float) -> tuple[Run, dict[str, Tensor]]:
    try:
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime
    except ImportError as error:
        raise Unable(str(error)) from error
    portable_lib._unsafe_reset_threadpool(1)
    program = Runtime.get().load_program(program_of(case, build_seconds))
    method = program.load_method("forward")
    feeds = [tensor.contiguous() for tensor in case.feeds]
    found = [torch.clone(output) for output in method.execute(feeds)]
    return lambda: (method.execute(feeds), program), dict(zip(case.step.train_outputs, found, strict=True))


def program_of(case: Case, seconds: float) -> bytes:
    """The ExecuTorch program, built in a process of its own, which can be given up."""
    context = multiprocessing.get_context("fork")  # the captured graph cannot be pickled
    receive, send = context.Pipe(duplex=False)
    worker = context.Process(target=_build_program, args=(case, send))
    worker.start()
    send.close()
    try:
        if not receive.poll(seconds):
            raise Unable(f"ExecuTorch: the program was not built within {seconds:g} s")
        return bytes(receive.recv_bytes())
    except EOFError as error:
        raise Unable("ExecuTorch: the program was not built, see the traceback") from error
    finally:
        worker.kill()
        worker.join()


def _build_program(case: Case, send: Any) -> None:
    from export.to_executorch import to_executorch

    send.send_bytes(to_executorch(case.step.train, case.step.train_example))


def torch_sgd(case: Case) -> Run:
    """The step that a user has today: no clipping, no mask."""
    model = copy.deepcopy(case.spec.model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    loss = named_loss(case)

    def run() -> None:
        optimizer.zero_grad()
        loss(model(*case.inputs), case.labels).backward()
        optimizer.step()

    return run


def named_loss(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    """PyTorch's own, which it has as one kernel."""
    if case.spec.loss == "cross_entropy":
        return lambda output, y: nn.functional.cross_entropy(output.flatten(0, -2), y.flatten())
    return lambda output, y: case.loss.per_example(output, y).mean()


def torch_vmap(case: Case) -> Run:
    model = copy.deepcopy(case.spec.model)
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    fixed = {n: p.detach() for n, p in model.named_parameters() if not p.requires_grad} | dict(model.named_buffers())

    def single(parameters: dict[str, Tensor], xs: tuple[Tensor, ...], y: Tensor) -> Tensor:
        output = functional_call(model, {**parameters, **fixed}, tuple(x[None] for x in xs))
        return case.loss.per_example(output, y[None])[0]

    gradients_of = vmap(grad(single), in_dims=(None, 0, 0))

    def run() -> dict[str, Tensor]:
        gradients = gradients_of(trained, case.inputs, case.labels)
        squares = torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()])
        weights = case.mask * (case.clip / squares.sum(0).sqrt()).clamp(max=1.0)
        return {n: (weights @ g.flatten(1)).view(g.shape[1:]) for n, g in gradients.items()}

    try:
        found = run()
    except (RuntimeError, NotImplementedError) as error:
        raise Unable(f"vmap: {str(error).splitlines()[0]}") from error
    if not all(torch.isfinite(g).all() for g in found.values()):
        raise Unable("vmap gives no finite gradients")
    return run


class PerExampleLoss(nn.Module):
    """A loss as Opacus wants it: it asks for reduction "none" and then takes one value for each example."""

    reduction = "mean"

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.loss = case.loss

    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        values = self.loss.per_example(output, y)
        return values if self.reduction == "none" else values.mean()


def opacus_ghost(case: Case) -> Run:
    """Opacus's fast gradient clipping with its ghost norms where it has them; noise multiplier 0."""
    try:
        from opacus.grad_sample import GradSampleModuleFastGradientClipping
        from opacus.optimizers import DPOptimizerFastGradientClipping
        from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
        from opacus.validators import ModuleValidator
    except ImportError as error:
        raise Unable(f"Opacus is not installed ({error}): pip install opacus") from error
    try:
        # Its own recurrent and attention layers in place of PyTorch's, as its documentation says.
        model = ModuleValidator.fix(copy.deepcopy(case.spec.model)).train()
        clip = float(case.clip)
        wrapped = GradSampleModuleFastGradientClipping(
            model, batch_first=True, loss_reduction="mean", strict=False, max_grad_norm=clip, use_ghost_clipping=True
        )
        optimizer = DPOptimizerFastGradientClipping(
            torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=LEARNING_RATE),
            noise_multiplier=0.0,
            max_grad_norm=clip,
            expected_batch_size=len(case.labels),
            loss_reduction="mean",
        )
        criterion = DPLossFastGradientClipping(wrapped, optimizer, PerExampleLoss(case), "mean")

        def run() -> None:
            optimizer.zero_grad()
            criterion(wrapped(*case.inputs), case.labels).backward()
            optimizer.step()

        run()
    except Exception as error:  # what Opacus cannot do, it says in many kinds
        raise Unable(f"Opacus: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error
    return run


def take_turns(contenders: Mapping[str, Run], seconds: float) -> dict[str, float]:
    """Medians in milliseconds for one step, over turns taken for `seconds` and at least LEAST_TURNS times.

    In a turn each contender takes steps for TURN_S, as in a training loop: the first, for which the others have filled
    the caches, is not timed.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    steps = {}
    for name, run in contenders.items():
        run()
        start = time.perf_counter()
        run()
        steps[name] = max(1, round(TURN_S / (time.perf_counter() - start)))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < LEAST_TURNS:
        for name, run in contenders.items():
            run()
            start = time.perf_counter()
            for _ in range(steps[name]):
                run()
            times[name].append((time.perf_counter() - start) / steps[name])
    return {name: 1e3 * statistics.median(found) for name, found in times.items()}


def measure(
    name: str, unit: Unit, backends: Sequence[str], batch: int, seconds: float, build_seconds: float
) -> list[dict[str, Any]]:
    """One object for each back end."""
    case = prepare(name, unit, batch)
    contenders: dict[str, Run] = {"torch_sgd": torch_sgd(case)}
    others = {"torch_vmap": torch_vmap, "opacus_ghost": opacus_ghost} if unit == "example" else {}
    errors: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for label, make in others.items():
        try:
            contenders[label] = make(case)
        except Unable as reason:
            print(f"{name}: {reason}", file=sys.stderr)
    for backend in backends:
        try:
            if backend == "onnxruntime":
                contenders[backend], outputs = on_onnxruntime(case)
            else:
                contenders[backend], outputs = on_executorch(case, build_seconds)
            errors[backend] = error_of(case, outputs)
        except Unable as reason:
            print(f"{name}: {reason}", file=sys.stderr)
            reasons[backend] = str(reason)
    ms = take_turns(contenders, seconds)
    rows: list[dict[str, Any]] = []
    opacus = ms.get("opacus_ghost")
    for backend in backends:
        own = ms.get(backend)
        rows.append(
            {
                "model": name,
                "unit": unit,
                "backend": backend,
                "ms": own,
                "torch_sgd_ms": ms["torch_sgd"],
                "torch_vmap_ms": ms.get("torch_vmap"),
                "opacus_ghost_ms": opacus,
                "ratio_to_torch_sgd": own / ms["torch_sgd"] if own else None,
                "ratio_to_opacus": own / opacus if own and opacus else None,
                "max_rel_error": errors.get(backend),
                "reason": reasons.get(backend),
            }
        )
    return rows


def means(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each back end, the geometric means of the two ratios over the models that have them."""
    found = []
    for backend in dict.fromkeys(row["backend"] for row in rows):
        own = [row for row in rows if row["backend"] == backend]
        summary: dict[str, Any] = {"model": "geometric mean", "unit": own[0]["unit"], "backend": backend}
        for key in ("ratio_to_torch_sgd", "ratio_to_opacus"):
            logs = [math.log(row[key]) for row in own if row[key] is not None]
            summary[key] = math.exp(statistics.fmean(logs)) if logs else None
        summary["max_rel_error"] = max((row["max_rel_error"] for row in own if row["max_rel_error"]), default=None)
        found.append(summary)
    return found


COLUMNS = {
    "model": "model",
    "backend": "back end",
    "ms": "ms",
    "torch_sgd_ms": "torch SGD",
    "torch_vmap_ms": "torch vmap",
    "opacus_ghost_ms": "Opacus ghost",
    "ratio_to_torch_sgd": "/ SGD",
    "ratio_to_opacus": "/ Opacus",
    "max_rel_error": "error",
}


def line(row: Mapping[str, Any]) -> str:
    def cell(key: str) -> str:
        value = row.get(key)
        if value is None:
            return "-"
        if isinstance(value, str):
            return value
        return f"{value:.1e}" if key == "max_rel_error" else f"{value:.3f}"

    return f"{cell('model'):15}{cell('backend'):12}" + "".join(f"{cell(key):>13}" for key in list(COLUMNS)[2:])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one object a line")
    parser.add_argument("--model", action="append", choices=ZOO, help="may be repeated; all if not given")
    parser.add_argument("--backend", default="onnxruntime", help=f"of {', '.join(BACKENDS)}, separated by commas")
    parser.add_argument("--unit", default="example", choices=("example", "device"))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=5.0, help="of taking turns, for each model")
    parser.add_argument("--build-seconds", type=float, default=300.0, help="for one ExecuTorch program")
    options = parser.parse_args(arguments)
    backends = options.backend.split(",")
    for backend in backends:
        if backend not in BACKENDS:
            parser.error(f"no back end is called {backend!r}: use {', '.join(BACKENDS)}")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = []
    if not options.json:
        print(line(COLUMNS))
    for name in options.model or ZOO:
        unit = cast(Unit, options.unit)
        for row in measure(name, unit, backends, options.batch, options.seconds, options.build_seconds):
            print(json.dumps(row) if options.json else line(row), flush=True)
            rows.append(row)
    for summary in means(rows):
        print(json.dumps(summary) if options.json else line(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
