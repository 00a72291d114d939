"""Training steps on any engine that runs the bundle's graphs (docs/bundle.md section 4).

All parameters live in flat float32 buffers that are made once. The graphs read and write views of them in place, so a
step allocates nothing of the model's size: for unit "device" two buffers take turns as input and output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isfinite, sqrt
from typing import Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edge_sdk.bundle import (
    METRICS,
    Bundle,
    Manifest,
    Tensor,
    matching,
    predict_inputs,
    predict_outputs,
    split,
    train_inputs,
    train_outputs,
)
from edge_sdk.errors import ParameterError, PeerError, RoundAborted
from edge_sdk.training.examples import Array, Examples, fill
from edge_sdk.training.sampling import batches_by_place, shuffled_batches
from edge_sdk.training.trainer import F32, F64, ClippedSum, Metrics, Trainer, Update, never_stop

CLIP_SLACK = 1.001
"""How far float32 rounding may carry a clipped gradient's norm over the clip; the noise is made for it."""

_SEGMENT = 1 << 14
_LEAST, _MOST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)

GraphName = Literal["train", "predict"]
Run = Callable[[], None]


class Graph(Protocol):
    """One loaded graph."""

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Run:
        """A call that runs the graph on what is in `inputs` then, and leaves the results in `outputs`.

        All inputs and outputs in the graph's order: C-contiguous arrays of its shapes and dtypes, which stay where they
        are and which the call keeps alive. The call raises PeerError if the graph fails.
        """


class Engine(Protocol):
    """A back end that loads a bundle's graphs."""

    def load(self, graph: GraphName) -> Graph:
        """Raises PeerError if the graph is not one that this engine runs."""


class GraphTrainer(Trainer):
    """A `Trainer` on an engine. It starts from the bundle's initial parameters and does not keep the bundle."""

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        self._manifest = manifest = bundle.manifest
        self._engine = engine
        self._dimension = manifest.dimension
        # The shared ones in front: the flat shared vector is then a slice, not a gathering.
        self._local_table = manifest.of_role("local")
        trained = (*manifest.of_role("shared"), *self._local_table)
        size = sum(parameter.size for parameter in trained)
        self._sides = [np.zeros(size, dtype=np.float32) for _ in range(2 if manifest.unit == "device" else 1)]
        self._side = 0
        # Unit "device": the parameters from before training (FedProx's anchor). Else: one batch's gradients.
        self._scratch = np.zeros(size, dtype=np.float32)
        fixed = manifest.of_role("frozen", "buffer")
        self._fixed = split(np.zeros(sum(parameter.size for parameter in fixed), dtype=np.float32), fixed)
        self._views = [split(side, trained) for side in self._sides]
        for name, value in bundle.parameters().items():
            (self._fixed if name in self._fixed else self._views[0])[name][...] = value
        batch = manifest.batch
        self._inputs = {t.name: np.zeros((batch, *t.shape), dtype=t.dtype) for t in manifest.inputs}
        self._label = np.zeros((batch, *manifest.label.shape), dtype=manifest.label.dtype)
        self._mask = np.zeros(batch, dtype=np.float32)
        self._scalars = {name: np.zeros((), dtype=np.float32) for name in ("clip", "loss_bound", "lr", "mu")}
        self._metrics = {name: np.zeros((), dtype=np.float32) for name in METRICS}
        self._steps = self._bind_training(engine.load("train"), split(self._scratch, trained))
        self._output = np.zeros((batch, *manifest.output.shape), dtype=np.float32)
        self._predictions: list[Run] = []  # bound at the first use: many devices never predict

    def _bind_training(self, graph: Graph, scratch: Mapping[str, F32]) -> list[Run]:
        roles = {parameter.name: parameter.role for parameter in self._manifest.parameters}
        bound = []
        for side, views in enumerate(self._views):
            arrays: dict[str, Array] = {**self._fixed, **views, **self._inputs, **self._scalars, **self._metrics}
            arrays |= {self._manifest.label.name: self._label, "mask": self._mask}
            for name in views:
                if self._manifest.unit == "device":
                    arrays[f"anchor.{name}"] = scratch[name]
                    arrays[f"new.{name}"] = self._views[1 - side][name]
                else:
                    arrays[f"{'grad' if roles[name] == 'shared' else 'local_grad'}.{name}"] = scratch[name]
            inputs = {tensor.name: arrays[tensor.name] for tensor in train_inputs(self._manifest)}
            outputs = {tensor.name: arrays[tensor.name] for tensor in train_outputs(self._manifest)}
            bound.append(graph.bind(inputs, outputs))
        return bound

    @property
    def manifest(self) -> Manifest:
        """The bundle's."""
        return self._manifest

    def load_shared(self, vector: F32) -> None:
        """Set the shared parameters.

        vector: float32 (d,), copied.  Raises ParameterError on another dtype or shape, PeerError on NaN or infinity (it
        is the coordinator's model).
        """
        if vector.dtype != np.float32 or vector.shape != (self._dimension,):
            raise ParameterError(
                f"the shared vector is float32 ({self._dimension},), not {vector.dtype} {vector.shape}"
            )
        if not np.isfinite(vector).all():
            raise PeerError(f"shared parameters: element {int(np.argmin(np.isfinite(vector)))} is not finite")
        self._sides[self._side][: self._dimension] = vector

    def shared(self) -> F32:
        """The shared parameters: float32 (d,), a copy."""
        return self._sides[self._side][: self._dimension].copy()

    def load_local(self, parameters: Mapping[str, F32]) -> None:
        """Set the local parameters. parameters: name -> float32 array, all of them and no others.

        Raises ParameterError that names what is missing, not local, of another shape or dtype, or not finite.
        """
        names = {parameter.name for parameter in self._local_table}
        for name in parameters:
            if name not in names:
                raise ParameterError(f"{name!r} is not a local parameter")
        values = [(p.name, matching(parameters, p.name, p.shape)) for p in self._local_table]
        for name, value in values:
            if not np.isfinite(value).all():
                raise ParameterError(f"local parameter {name!r} has a value that is not finite")
        for name, value in values:
            self._views[self._side][name][...] = value

    def local(self) -> dict[str, F32]:
        """The local parameters: name -> float32 array, copies."""
        return {parameter.name: self._views[self._side][parameter.name].copy() for parameter in self._local_table}

    def train(
        self,
        examples: Examples,
        *,
        lr: float,
        entropy: bytes,
        epochs: int | None = None,
        steps: int | None = None,
        mu: float = 0.0,
        should_stop: Callable[[], bool] = never_stop,
    ) -> Update:
        """Plain SGD over shuffled batches, from the loaded parameters; afterwards the trainer holds the trained ones.

        lr: learning rate, > 0.  entropy: 32 bytes, for the order of the examples.  epochs or steps: how long, exactly
        one of them.  mu: weight of the proximal term, >= 0; the anchor is the parameters from before.  should_stop:
        asked before every step.
        Raises ParameterError on a bundle of unit "example", a wrong argument or a wrong example; RoundAborted when
        should_stop says so; PeerError if the graph misbehaves. After any of them the parameters are those from before.
        """
        self._require_unit("device")
        self._set("lr", lr)
        if not 0 <= mu <= _MOST or (mu > 0 and not self._manifest.options.proximal):
            raise ParameterError(f"mu = {mu}: at least 0, and 0 for a bundle without the proximal term")
        self._scalars["mu"][...] = mu
        before = self._scratch
        np.copyto(before, self._sides[self._side])
        metrics, taken = Metrics(), 0
        try:
            for batch in shuffled_batches(len(examples), self._manifest.batch, entropy, epochs=epochs, steps=steps):
                self._check_stop(should_stop, taken)
                self._fill(examples, batch)
                self._steps[self._side]()
                self._side = 1 - self._side
                metrics += self._read_metrics(len(batch))
                taken += 1
        except BaseException:
            np.copyto(self._sides[self._side], before)
            raise
        after = self._sides[self._side]
        delta = after[: self._dimension] - before[: self._dimension]
        diverged = not (np.isfinite(after).all() and np.isfinite(delta).all())
        if diverged:
            # Zero and not an error: a device that goes silent when its data diverge tells something about them.
            np.copyto(after, before)
            delta[:] = 0
        return Update(delta, metrics, taken, diverged)

    def clipped_sum(
        self,
        examples: Examples,
        indices: NDArray[np.int64],
        *,
        clip: float,
        loss_bound: float,
        window: int | None = None,
        local_lr: float = 0.0,
        should_stop: Callable[[], bool] = never_stop,
    ) -> ClippedSum:
        """The sum of the examples' gradients, each clipped to L2 norm `clip` over all shared parameters together.

        indices: int64 (n,), distinct, any number of them: from `sampling.poisson_sample`. Their order does not matter;
        none at all gives zeros.  clip: > 0, weight units.  loss_bound: > 0; each example's loss is taken into
        [0, loss_bound] before it enters the sum, its gradient is not changed by that.  window: positions of the data
        set, from `sampling.window_for`; the batch size if not given.  local_lr: learning rate of one step, afterwards,
        along the local parameters' mean gradient; 0 leaves them, above 0 the accounts of later rounds do not hold
        (docs/bundle.md section 6).  should_stop: asked before every chunk.
        The drawn examples of each window run in chunks of at most the batch size, and chunks are added up in float64.
        Within a chunk the sum is float32, and one example more shifts those after it in its window: what its presence
        changes besides its own gradient is the rounding of that window's chunks, of n examples at most 2 n batch 2^-24
        clip together and in practice a thousandth of it (docs/training-graph.md section 5), and nothing elsewhere.
        Raises ParameterError on a bundle of unit "device", a wrong argument or a wrong example; RoundAborted when
        should_stop says so; PeerError if the graph fails, or a sum of its gradients or losses is larger than clipping
        allows.
        """
        self._require_unit("example")
        self._set("clip", clip)
        self._set("loss_bound", loss_bound)
        if loss_bound * self._manifest.batch > _MOST / 2:
            raise ParameterError(f"loss_bound = {loss_bound}: the sum over a batch would not fit a float32")
        if not (isfinite(local_lr) and local_lr >= 0):
            raise ParameterError(f"local_lr = {local_lr} is not a number >= 0")
        self._check_indices(indices, len(examples))
        total = np.zeros(len(self._scratch), dtype=np.float64)
        metrics = Metrics()
        size = self._manifest.batch
        for chunk, batch in enumerate(batches_by_place(indices, size if window is None else window, size)):
            self._check_stop(should_stop, chunk)
            self._fill(examples, batch)
            self._steps[0]()
            found = self._read_metrics(len(batch))
            norm = _accumulate(total[: self._dimension], self._scratch[: self._dimension])
            self._check_clipped(norm, found.count, clip)
            self._check_losses(found.loss, found.count, loss_bound)
            _accumulate(total[self._dimension :], self._scratch[self._dimension :])
            metrics += found
        self._step_local(total[self._dimension :], metrics.count, local_lr)
        return ClippedSum(total[: self._dimension], metrics)

    def predict(self, *inputs: ArrayLike) -> F32:
        """The model's output, float32 (n, *output shape), for n examples.

        inputs: one array for each input of the model, n rows each, or lists of numbers. Raises ParameterError on wrong
        ones.
        """
        table = self._manifest.inputs
        arrays = [_as_rows(given, tensor) for given, tensor in zip(inputs, table, strict=False)]
        lengths = {len(rows) if rows.ndim else -1 for rows in arrays}
        if len(inputs) != len(table) or len(lengths) != 1 or -1 in lengths:
            raise ParameterError(f"predict takes {len(table)} arrays with the same number of rows")
        if not self._predictions:
            self._predictions = self._bind_prediction(self._engine.load("predict"))
        size = len(arrays[0])
        result = np.empty((size, *self._manifest.output.shape), dtype=np.float32)
        for start in range(0, size, self._manifest.batch):
            rows = min(self._manifest.batch, size - start)
            for tensor, array in zip(table, arrays, strict=True):
                fill(self._inputs[tensor.name], array[start : start + rows], tensor)
            self._predictions[self._side]()
            result[start : start + rows] = self._output[:rows]
        return result

    def _bind_prediction(self, graph: Graph) -> list[Run]:
        bound = []
        for views in self._views:
            arrays: dict[str, Array] = {**self._fixed, **views, **self._inputs}
            inputs = {tensor.name: arrays[tensor.name] for tensor in predict_inputs(self._manifest)}
            outputs = {tensor.name: self._output for tensor in predict_outputs(self._manifest)}
            bound.append(graph.bind(inputs, outputs))
        return bound

    def _require_unit(self, unit: str) -> None:
        if self._manifest.unit != unit:
            raise ParameterError(f"bundle {self._manifest.name!r} is for unit {self._manifest.unit}, not {unit}")

    def _set(self, name: str, value: float) -> None:
        if not _LEAST <= value <= _MOST:
            raise ParameterError(f"{name} = {value} is not a positive float32")
        self._scalars[name][...] = value

    def _check_stop(self, should_stop: Callable[[], bool], done: int) -> None:
        if should_stop():
            raise RoundAborted(f"training was stopped after {done} batches")

    def _check_indices(self, indices: NDArray[np.int64], size: int) -> None:
        if indices.dtype != np.int64 or indices.ndim != 1:
            raise ParameterError(f"indices are int64 (n,), not {indices.dtype} {indices.shape}")
        if indices.size and not 0 <= int(indices.min()) <= int(indices.max()) < size:
            raise ParameterError(f"an index is not in [0, {size})")
        ordered = np.sort(indices)  # not np.unique: that loads numpy.ma, 2 MB
        if (ordered[1:] == ordered[:-1]).any():
            # Twice in the sum, an example would have twice the sensitivity that the noise is made for.
            raise ParameterError("an example is drawn twice")

    def _fill(self, examples: Examples, indices: NDArray[np.int64]) -> None:
        inputs, labels = examples.fetch(indices)
        if len(inputs) != len(self._manifest.inputs):
            raise ParameterError(f"{len(inputs)} inputs for a model of {len(self._manifest.inputs)}")
        arrays: Sequence[Array] = (*inputs, labels)
        for tensor, rows in zip((*self._manifest.inputs, self._manifest.label), arrays, strict=True):
            if len(rows) != len(indices):
                raise ParameterError(f"{tensor.name!r}: {len(rows)} rows for {len(indices)} examples")
            fill(self._inputs.get(tensor.name, self._label), rows, tensor)
        self._mask[: len(indices)] = 1
        self._mask[len(indices) :] = 0

    def _read_metrics(self, examples: int) -> Metrics:
        values = {name: float(self._metrics[name]) for name in METRICS}
        count = values["count"]
        # One comparison each, false for NaN. `correct` may be a sum of fractions: leave it its rounding.
        right = (
            0 <= count <= examples
            and count + values["invalid"] == examples
            and 0 <= values["clipped"] <= count
            and 0 <= values["correct"] <= count * (1 + 1e-5)
        )
        if not right:
            raise PeerError(f"the training graph's counts for {examples} examples do not add up: {values}")
        return Metrics(**values)

    def _check_clipped(self, norm: float, count: float, clip: float) -> None:
        """Each of `count` gradients is at most `clip` long, so their sum is at most the product (false for NaN)."""
        if not norm <= count * clip * CLIP_SLACK:
            raise PeerError(f"the training graph does not clip: a sum of norm {norm:.6g} for {count:g} times {clip:g}")

    def _check_losses(self, loss: float, count: float, bound: float) -> None:
        """Each of `count` losses is in [0, bound] (false for NaN)."""
        if not 0 <= loss <= count * bound * CLIP_SLACK:
            raise PeerError(f"the training graph does not clip: losses of {loss:.6g} for {count:g} times {bound:g}")

    def _step_local(self, gradient: NDArray[np.float64], count: float, lr: float) -> None:
        local = self._sides[0][self._dimension :]
        if lr == 0 or count == 0 or not len(local):
            return
        with np.errstate(over="ignore", invalid="ignore"):
            stepped = (local - lr * gradient / count).astype(np.float32)
        if np.isfinite(stepped).all():  # else the step diverged: better none
            local[:] = stepped


def _as_rows(given: ArrayLike, tensor: Tensor) -> Array:
    """An array is taken as it is. A list has no dtype of its own, so numbers in one are the tensor's floats."""
    try:
        rows = np.asarray(given)
    except (TypeError, ValueError, RuntimeError) as error:  # rows of several lengths; what another library refuses
        raise ParameterError(f"{tensor.name!r}: {error}") from error
    if tensor.dtype == "float32" and rows.dtype.kind in "iuf" and not hasattr(given, "dtype"):
        with np.errstate(over="ignore"):
            rows = rows.astype(np.float32)
    return rows


def _accumulate(total: F64, part: F32) -> float:
    """total += part, and the L2 norm of `part` in float64: in segments that stay in the cache, one widening for both.

    Not np.dot: its BLAS may start threads of its own, which costs more than the work.
    """
    squares = 0.0
    for start in range(0, len(part), _SEGMENT):
        wide = part[start : start + _SEGMENT].astype(np.float64)
        total[start : start + _SEGMENT] += wide
        np.square(wide, out=wide)
        squares += float(wide.sum())
    return sqrt(squares)
