"""The captured graphs as ONNX, for stock ONNX Runtime."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch
from onnxscript.optimizer import fold_constants_ir
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules import common
from torch import Tensor, fx, nn

from export.errors import NoOnnxFormError, UnsupportedModelError, first_line
from export.graph import CapturedStep
from export.losses import LOSSES
from export.origin import Lacking, lacking_layers, lacking_loss

OPSET = 20
"""Served by ONNX Runtime 1.17 and later, which Debian and Raspberry Pi OS ship."""


def to_onnx(
    graph: fx.GraphModule, example: Sequence[Tensor], input_names: Sequence[str], output_names: Sequence[str]
) -> bytes:
    """A serialised ModelProto: weights are inputs, every input and output is there by its name, nothing else is.

    The same graph gives the same bytes: what names files, lines or times is removed.
    """
    converted = _convert(graph, example, input_names, output_names)
    _optimise(converted.model)
    model: onnx.ModelProto = converted.model_proto
    _strip(model)
    _keep_inputs(model, example, input_names)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString(deterministic=True)


def train_to_onnx(step: CapturedStep) -> bytes:
    """`step.train` as `to_onnx` makes it.

    Raises UnsupportedModelError that names the layer, or the loss, whose operator or gradient has no ONNX form.
    """
    try:
        return to_onnx(step.train, step.train_example, step.train_inputs, step.train_outputs)
    except NoOnnxFormError as error:
        raise UnsupportedModelError("; ".join(_blame(step)) or str(error)) from error


def rows_to_onnx(model: nn.Module, inputs: Sequence[Tensor], input_names: Sequence[str]) -> bytes:
    """A serialised ModelProto of `model` as it is, weights inside: any number of rows to `output`, the first output.

    inputs: one example each, without the batch axis.  Raises UnsupportedModelError where the rows' number is fixed.
    """
    two = tuple(x.unsqueeze(0).expand(2, *x.shape).contiguous() for x in inputs)
    rows = torch.export.Dim("rows", min=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(model, two, dynamic_shapes=tuple({0: rows} for _ in two))
        except Exception as error:  # torch.export has no base class for what it refuses
            raise UnsupportedModelError(f"the model fixes the number of rows: {first_line(error)}") from error
    converted = _convert_program(program, input_names, ["output"])
    del converted.model.graph.outputs[1:]
    _optimise(converted.model)
    proto: onnx.ModelProto = converted.model_proto
    _strip(proto)
    for value in (*proto.graph.input, *proto.graph.output):
        first = value.type.tensor_type.shape.dim[0]
        if not first.dim_param:
            raise UnsupportedModelError(f"the model fixes the number of rows: {value.name} has {first.dim_value}")
        first.dim_param = "rows"
    onnx.checker.check_model(proto, full_check=True)
    return proto.SerializeToString(deterministic=True)


def _blame(step: CapturedStep) -> Iterator[str]:
    for layer, lacking in lacking_layers(step.recorder, _try).items():
        remedy = ", or freeze all layers before it, so that no gradient has to pass" if lacking.in_gradient else ""
        yield f"{layer}: {_needs(lacking)}. Write the layer in simpler operators{remedy}"
    label = step.train_example[step.train_inputs.index("y")]
    of_loss = lacking_loss(step.loss, step.recorder.output_like, label, _try)
    if of_loss is not None:
        yield (
            f"the loss ({step.loss.name}): {_needs(of_loss)}. Write it in simpler operators (products, sums, exp, log, "
            f"clamp, torch.where), or use {', '.join(LOSSES)}"
        )


def _needs(lacking: Lacking) -> str:
    return f"{'its gradient' if lacking.in_gradient else 'it'} needs {lacking.operators}, which has no ONNX form"


def _try(graph: fx.GraphModule, example: Sequence[Tensor]) -> None:
    """Raises NoOnnxFormError where `to_onnx` would."""
    outputs: Any = next(node for node in graph.graph.nodes if node.op == "output").args[0]
    _convert(graph, example, [f"in_{i}" for i in range(len(example))], [f"out_{i}" for i in range(len(outputs))])


def _convert(
    graph: fx.GraphModule, example: Sequence[Tensor], input_names: Sequence[str], output_names: Sequence[str]
) -> Any:
    return _convert_program(torch.export.export(graph, tuple(example)), input_names, output_names)


def _convert_program(
    program: torch.export.ExportedProgram, input_names: Sequence[str], output_names: Sequence[str]
) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger = logging.getLogger("torch.onnx")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            return torch.onnx.export(
                program,
                (),
                dynamo=True,
                optimize=False,
                verbose=False,
                opset_version=OPSET,
                input_names=list(input_names),
                output_names=list(output_names),
            )
        except torch.onnx.OnnxExporterError as error:
            raise NoOnnxFormError(_operators(error)) from error
        finally:
            logger.setLevel(level)


_RULES = (
    common.add_0_rule,
    common.cast_cast_rule,
    common.collapse_slice_rule,
    common.collapse_slice2_rule,
    common.div_by_1_rule,
    common.flatten_to_reshape_rule,
    common.materialize_reshape_shape_rule,
    common.mul_by_1_rule,
    common.no_op_cast_rule,
    common.no_op_expand_rule,
    common.no_op_transpose_rule,
    common.one_reshape_matmul_reshape_rule,
    common.reshape_reshape_rule,
    common.squeeze_reshape_1d_rule,
    common.sub_0_rule,
    common.transpose_transpose_rule,
    common.two_reshapes_matmul_reshape_rule,
    common.unsqueeze_unsqueeze_rule,
)
"""Of onnxscript's rules those that apply to training graphs. Its rule that joins slices into a Split compares all pairs
of nodes: for MobileNet it took 80 of 90 s."""


def _optimise(model: ir.Model) -> None:
    """What `torch.onnx.export(optimize=True)` does, with _RULES only. In place."""
    ir.passes.Sequential(
        passes.InlinePass(),
        ir.passes.PassManager(
            [
                _Fold(),
                RewritePass(_RULES),
                passes.RemoveUnusedNodesPass(),
                passes.RemoveUnusedFunctionsPass(),
                passes.RemoveUnusedOpsetsPass(),
            ],
            steps=2,
            early_stop=True,
        ),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    )(model)


class _Fold(ir.passes.InPlacePass):
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        folded = fold_constants_ir(model)
        return ir.passes.PassResult(model, bool(folded.modified))


def _operators(error: BaseException) -> str:
    """Names the operators that stopped the exporter, from the chain of its errors."""
    chain: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        chain.append(str(cause))
        cause = cause.__cause__
    names = sorted(set(re.findall(r"OpOverload\(op='([^']+)'", "\n".join(chain))))
    return ", ".join(names) or chain[-1].strip().splitlines()[0]


def _strip(model: onnx.ModelProto) -> None:
    """Remove what is not the graph: source lines, module paths, inferred shapes of inner values."""
    del model.metadata_props[:]
    model.ClearField("doc_string")
    model.producer_name = "sordino"
    model.ClearField("producer_version")
    model.graph.name = "graph"
    model.graph.ClearField("doc_string")
    del model.graph.metadata_props[:]
    del model.graph.value_info[:]
    for node in model.graph.node:
        del node.metadata_props[:]
        node.ClearField("doc_string")
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        del value.metadata_props[:]
        value.ClearField("doc_string")


def _keep_inputs(model: onnx.ModelProto, example: Sequence[Tensor], names: Sequence[str]) -> None:
    """Declare every input in order, also those that the graph turned out not to read."""
    present = {value.name: value for value in model.graph.input}
    proto = onnx.TensorProto
    kinds = {torch.float32: proto.FLOAT, torch.int64: proto.INT64, torch.int32: proto.INT32}
    kinds |= {torch.uint8: proto.UINT8, torch.bool: proto.BOOL}
    ordered = [
        present.get(name) or onnx.helper.make_tensor_value_info(name, kinds[tensor.dtype], list(tensor.shape))
        for name, tensor in zip(names, example, strict=True)
    ]
    copies = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in ordered]
    del model.graph.input[:]
    model.graph.input.extend(copies)
