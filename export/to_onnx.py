"""The captured graphs as ONNX, for stock ONNX Runtime."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import onnx
import torch
from torch import Tensor, fx

OPSET = 20
"""Served by ONNX Runtime 1.17 and later, which Debian and Raspberry Pi OS ship."""


def to_onnx(
    graph: fx.GraphModule, example: Sequence[Tensor], input_names: Sequence[str], output_names: Sequence[str]
) -> bytes:
    """A serialised ModelProto: weights are inputs, every input and output is there by its name, nothing else is.

    The same graph gives the same bytes: what names files, lines or times is removed.
    """
    program = torch.export.export(graph, tuple(example))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger = logging.getLogger("torch.onnx")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            converted: Any = torch.onnx.export(
                program,
                (),
                dynamo=True,
                optimize=True,
                verbose=False,
                opset_version=OPSET,
                input_names=list(input_names),
                output_names=list(output_names),
            )
        finally:
            logger.setLevel(level)
    model: onnx.ModelProto = converted.model_proto
    _strip(model)
    _keep_inputs(model, example, input_names)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString(deterministic=True)


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
