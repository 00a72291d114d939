"""Small bundles made by hand with onnx.helper: softmax regression with a per-example clip, in both privacy units.

Parameters (unit "example"): `scale` frozen (1,), `w` shared (FEATURES, CLASSES), `head` local (CLASSES,), `b` shared
(CLASSES,), `shift` buffer (1,). Scores: ((x * scale + shift) @ w) + b + head. What the graphs must compute is written
again with numpy in `gradients`.
"""

from __future__ import annotations

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from edge_sdk.bundle import (  # noqa: E402
    Manifest,
    Options,
    Tensor,
    parameter_table,
    predict_inputs,
    predict_outputs,
    train_inputs,
    train_outputs,
    write_bundle,
)
from edge_sdk.crypto.identity import Identity  # noqa: E402

FEATURES, CLASSES, BATCH = 5, 3, 4
PUBLISHER = Identity(b"publisher".ljust(32))
OPSET, IR_VERSION = 18, 9
_TYPES = {
    "float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "int32": TensorProto.INT32, "uint8": TensorProto.UINT8,
    "bool": TensorProto.BOOL,
}  # fmt: skip


def draft(unit: str = "example", *, proximal: bool = False, batch: int = BATCH, **changes) -> Manifest:
    fields = {
        "schema": 1,
        "name": "softmax-regression",
        "unit": unit,
        "batch": batch,
        "options": Options(proximal=proximal),
        "parameters": parameter_table([
            ("scale", (1,), "frozen"), ("w", (FEATURES, CLASSES), "shared"), ("head", (CLASSES,), "local"),
            ("b", (CLASSES,), "shared"), ("shift", (1,), "buffer"),
        ]),
        "inputs": (Tensor("x", (FEATURES,), "float32", None),),
        "label": Tensor("y", (), "int64", CLASSES),
        "output": Tensor("output", (CLASSES,), "float32", None),
        "loss": "cross_entropy",
        "tools": {"onnx": onnx.__version__},
    }  # fmt: skip
    return Manifest(**{**fields, **changes})


def initial_parameters(manifest: Manifest, seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    values = {p.name: rng.normal(size=p.shape).astype(np.float32) * np.float32(0.3) for p in manifest.parameters}
    return {**values, "scale": np.full(1, 0.5, np.float32), "shift": np.full(1, 0.25, np.float32)}


def examples(size: int, seed: int = 2) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(size, FEATURES)).astype(np.float32) * 3, rng.integers(0, CLASSES, size)


def model(nodes, inputs, outputs, initializers=(), opset: int = OPSET, domain: str = "") -> bytes:
    """A ModelProto's bytes; inputs and outputs: edge_sdk.onnx_graph.TensorType."""

    def info(tensor):
        return helper.make_tensor_value_info(tensor.name, _TYPES[tensor.dtype], tensor.shape)

    graph = helper.make_graph(
        list(nodes), "graph", [info(t) for t in inputs], [info(t) for t in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in initializers],
    )  # fmt: skip
    imports = [helper.make_opsetid(domain, opset)]
    return helper.make_model(graph, opset_imports=imports, ir_version=IR_VERSION).SerializeToString()


CONSTANTS = [
    ("zero", np.float32(0)), ("one", np.float32(1)), ("tiny", np.float32(1e-30)), ("axis1", np.array([1])),
    ("axis0", np.array([0])), ("depth", np.array(CLASSES)), ("off_on", np.array([0, 1], np.float32)),
]  # fmt: skip


def scores(x: str = "x") -> list:
    n = helper.make_node
    return [
        n("Mul", [x, "scale"], ["scaled"]), n("Add", ["scaled", "shift"], ["features"]),
        n("MatMul", ["features", "w"], ["product"]), n("Add", ["product", "b"], ["biased"]),
        n("Add", ["biased", "head"], ["output"]),
    ]  # fmt: skip


def per_example() -> list:
    """Nodes up to `counts` (B,): 1 where an example counts; `delta` (B, C); `norm` (B,); `x_clean`; the metrics."""
    n = helper.make_node
    return [
        # An example with NaN or infinity is replaced by zeros before anything is computed from it.
        n("Sub", ["x", "x"], ["self_difference"]),  # 0 where finite, else NaN
        n("IsNaN", ["self_difference"], ["not_finite"]),
        n("Cast", ["not_finite"], ["not_finite_f"], to=TensorProto.FLOAT),
        n("ReduceMax", ["not_finite_f", "axis1"], ["bad"], keepdims=0),
        n("Sub", ["one", "bad"], ["good"]), n("Mul", ["good", "mask"], ["counts"]),
        n("Unsqueeze", ["counts", "axis1"], ["counts_column"]),
        n("Greater", ["counts_column", "zero"], ["counts_bool"]),
        n("Where", ["counts_bool", "x", "zero"], ["x_clean"]),
        *scores("x_clean"),
        n("LogSoftmax", ["output"], ["log_p"], axis=1), n("Exp", ["log_p"], ["p"]),
        n("OneHot", ["y", "depth", "off_on"], ["target"], axis=1),
        n("Sub", ["p", "target"], ["delta"]),
        n("Mul", ["log_p", "target"], ["log_likelihoods"]),
        n("ReduceSum", ["log_likelihoods", "axis1"], ["log_likelihood"], keepdims=0),
        n("Neg", ["log_likelihood"], ["losses"]),
        n("ArgMax", ["output"], ["best"], axis=1, keepdims=0), n("Equal", ["best", "y"], ["hit"]),
        n("Cast", ["hit"], ["hit_f"], to=TensorProto.FLOAT), n("Mul", ["hit_f", "counts"], ["hits"]),
        n("ReduceSum", ["hits"], ["correct"], keepdims=0), n("ReduceSum", ["counts"], ["count"], keepdims=0),
        n("Mul", ["bad", "mask"], ["bad_real"]), n("ReduceSum", ["bad_real"], ["invalid"], keepdims=0),
    ]  # fmt: skip


def weighted_gradients(weights: str, shared: tuple[str, str], local: str) -> list:
    """Sum over examples of weights[i] * gradient_i for w and b, and the plain sum over counted examples for head."""
    n = helper.make_node
    return [
        n("Unsqueeze", [weights, "axis1"], ["weights_column"]),
        n("Mul", ["delta", "weights_column"], ["delta_weighted"]),
        n("Transpose", ["features"], ["features_t"], perm=[1, 0]),
        n("MatMul", ["features_t", "delta_weighted"], [shared[0]]),
        n("ReduceSum", ["delta_weighted", "axis0"], [shared[1]], keepdims=0),
        n("Mul", ["delta", "counts_column"], ["delta_counted"]),
        n("ReduceSum", ["delta_counted", "axis0"], [local], keepdims=0),
    ]


def summed(losses: str) -> list:
    """`loss`: over the examples that count."""
    n = helper.make_node
    return [
        n("Mul", [losses, "counts"], ["counted_losses"]), n("ReduceSum", ["counted_losses"], ["loss"], keepdims=0),
    ]  # fmt: skip


def clipping() -> list:
    """`weights` (B,): counts * min(1, clip / norm), the number clipped, and `loss` of what is within `loss_bound`."""
    n = helper.make_node
    return [
        n("Max", ["losses", "zero"], ["losses_above_0"]), n("Min", ["losses_above_0", "loss_bound"], ["losses_within"]),
        *summed("losses_within"),
        n("ReduceSumSquare", ["features", "axis1"], ["features_sq"], keepdims=0),
        n("Add", ["features_sq", "one"], ["features_sq_1"]),  # the bias's input is 1
        n("ReduceSumSquare", ["delta", "axis1"], ["delta_sq"], keepdims=0),
        n("Mul", ["features_sq_1", "delta_sq"], ["norm_sq"]), n("Sqrt", ["norm_sq"], ["norm"]),
        n("Max", ["norm", "tiny"], ["norm_safe"]), n("Div", ["clip", "norm_safe"], ["ratio"]),
        n("Min", ["ratio", "one"], ["scale_down"]), n("Mul", ["scale_down", "counts"], ["weights"]),
        n("Less", ["scale_down", "one"], ["over"]), n("Cast", ["over"], ["over_f"], to=TensorProto.FLOAT),
        n("Mul", ["over_f", "counts"], ["over_real"]), n("ReduceSum", ["over_real"], ["clipped"], keepdims=0),
    ]  # fmt: skip


def train_graph(manifest: Manifest) -> bytes:
    n = helper.make_node
    nodes = per_example()
    if manifest.unit == "example":
        nodes += clipping() + weighted_gradients("weights", ("grad.w", "grad.b"), "local_grad.head")
    else:
        nodes += summed("losses") + weighted_gradients("counts", ("sum.w", "sum.b"), "sum.head")
        nodes += [n("Max", ["count", "one"], ["divisor"]), n("Div", ["lr", "divisor"], ["rate"])]
        nodes.append(n("Identity", ["zero"], ["clipped"]))
        for name in ("w", "b", "head"):
            nodes.append(n("Mul", [f"sum.{name}", "rate"], [f"step.{name}"]))
            moved = f"new.{name}"
            if manifest.options.proximal:
                nodes += [
                    n("Sub", [name, f"anchor.{name}"], [f"away.{name}"]), n("Mul", ["lr", "mu"], [f"pull.{name}"]),
                    n("Mul", [f"away.{name}", f"pull.{name}"], [f"back.{name}"]),
                    n("Sub", [name, f"back.{name}"], [f"pulled.{name}"]),
                    n("Sub", [f"pulled.{name}", f"step.{name}"], [moved]),
                ]  # fmt: skip
            else:
                nodes.append(n("Sub", [name, f"step.{name}"], [moved]))
    return model(nodes, train_inputs(manifest), train_outputs(manifest), CONSTANTS)


def predict_graph(manifest: Manifest) -> bytes:
    return model(scores(), predict_inputs(manifest), predict_outputs(manifest))


def graphs(manifest: Manifest) -> dict[str, bytes]:
    return {"train.onnx": train_graph(manifest), "predict.onnx": predict_graph(manifest)}


def bundle_bytes(unit: str = "example", **options) -> bytes:
    manifest = draft(unit, **options)
    return write_bundle(manifest, graphs(manifest), initial_parameters(manifest), PUBLISHER)


def numpy_scores(parameters, x):
    features = x.astype(np.float64) * parameters["scale"] + parameters["shift"]
    return features, features @ parameters["w"].astype(np.float64) + parameters["b"] + parameters["head"]


def gradients(parameters, x, y):
    """Per example, in float64: gradients of w (n, F, C) and of b and head (n, C), losses (n,), right or not (n,)."""
    features, z = numpy_scores(parameters, x)
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    delta = p - np.eye(CLASSES)[y]
    return features[:, :, None] * delta[:, None, :], delta, -np.log(p[np.arange(len(y)), y]), z.argmax(1) == y
