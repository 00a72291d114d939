"""What a bundle's graphs take on this machine, for the reader's orientation."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator

import numpy as np

from edge_sdk.bundle import TRAIN_PTE, Bundle, predict_inputs, predict_outputs, train_inputs
from edge_sdk.training.executorch import ExecutorchEngine
from edge_sdk.training.onnx import OnnxEngine
from edge_sdk.training.steps import Engine, Graph, Run
from export.check import Array, batch_of, bound

RUNTIMES = {".onnx": "onnxruntime", ".pte": "executorch"}
"""Which run time serves an entry, by its suffix."""
LEAST_RUNS, MOST_RUNS = 3, 20
ENOUGH_S = 0.5


def entry_times(bundle: Bundle, progress: Callable[[str], None] = lambda entry: None) -> dict[str, float]:
    """Entry -> median milliseconds of one run of that graph on one batch, on one thread, after one run to warm up.

    train.*: one training step.  predict.*: the output for a batch.  The back ends' own trainers' engines run them.
    progress: is told each entry before it runs.
    Raises PeerError that names the entry, if a run time does not load it or does not run it.
    """
    feed = dict(zip((t.name for t in train_inputs(bundle.manifest)), batch_of(bundle, 0), strict=True))
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ExecuTorch's Python binding calls itself experimental
        for suffix, engine in _engines(bundle):
            progress(f"train{suffix}")
            found[f"train{suffix}"] = _median_ms(bound(bundle, engine.load("train"), list(feed.values()))[0])
            progress(f"predict{suffix}")
            found[f"predict{suffix}"] = _median_ms(_prediction(bundle, engine.load("predict"), feed))
    return found


def _engines(bundle: Bundle) -> Iterator[tuple[str, Engine]]:
    yield ".onnx", OnnxEngine(bundle, threads=1)
    if TRAIN_PTE in bundle:
        yield ".pte", ExecutorchEngine(bundle, threads=1)


def _prediction(bundle: Bundle, graph: Graph, feed: dict[str, Array]) -> Run:
    inputs = {t.name: np.array(feed[t.name], order="C") for t in predict_inputs(bundle.manifest)}
    outputs: dict[str, Array] = {t.name: np.empty(t.shape, dtype=t.dtype) for t in predict_outputs(bundle.manifest)}
    return graph.bind(inputs, outputs)


def _median_ms(run: Run) -> float:
    run()
    times: list[float] = []
    while len(times) < LEAST_RUNS or (len(times) < MOST_RUNS and sum(times) < ENOUGH_S):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return round(1e3 * statistics.median(times), 3)
