"""Attention and recurrence, written out in operations whose gradients are understood."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from export.errors import UnsupportedModelError
from export.layers.linear import arguments, operands, source_of
from export.layers.recorder import Recorder, aten, layer_of, rewrites

_CLOSED = -1e9
"""Added to a score that must not count: its exponential is zero, and yet a sum of it is finite."""


@rewrites(aten.scaled_dot_product_attention.default)
def attention(recorder: Recorder, node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    (_, q), (_, k), (_, v), (_, mask), (_, p), (_, causal), (_, scale), (_, grouped) = arguments(
        node, args, kwargs, "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"
    )
    if p:
        raise UnsupportedModelError(f"{layer_of(node)}: attention dropout of {p}. Set it to 0, or call .eval() on it.")
    if grouped:
        raise UnsupportedModelError(f"{layer_of(node)}: grouped-query attention; repeat the keys and values instead")
    scores = torch.matmul(q * (1.0 / math.sqrt(q.shape[-1]) if scale is None else scale), k.transpose(-2, -1))
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        return torch.matmul(torch.softmax(scores + torch.where(mask, 0.0, _CLOSED).to(scores.dtype), -1), v)
    if mask is None:
        return torch.matmul(torch.softmax(scores, -1), v)
    # As PyTorch: a query that may look nowhere gets zeros, not a NaN that would cost its example.
    open_ = mask if mask.dtype == torch.bool else mask > -math.inf
    scores = scores + (torch.where(mask, 0.0, _CLOSED) if mask.dtype == torch.bool else mask.clamp(min=_CLOSED))
    return torch.matmul(torch.softmax(scores, -1) * open_.any(-1, keepdim=True).to(scores.dtype), v)


@rewrites(aten.gru.input, aten.lstm.input, aten.rnn_tanh.input, aten.rnn_relu.input)
def recurrent(recorder: Recorder, node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """RNN, GRU and LSTM, step by step: the input's product for all steps at once, the state's a step at a time."""
    kind = _KINDS[node.target]
    lstm = kind == "lstm"
    x, start, weights, has_biases, layers, dropout, train, bidirectional, batch_first = args
    if dropout and train and layers > 1:
        raise UnsupportedModelError(f"{layer_of(node)}: dropout of {dropout} between layers. Set it to 0.")
    nodes = operands(node)[2]
    states = [start[0], start[1]] if lstm else [start]
    directions = 2 if bidirectional else 1
    per_layer = 4 if has_biases else 2
    if len(weights) != layers * directions * per_layer:
        raise UnsupportedModelError(f"{layer_of(node)}: projections (proj_size) are not supported")
    if batch_first:
        x = x.transpose(0, 1)
    finals: list[list[Tensor]] = [[] for _ in states]
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            own = slice(index * per_layer, (index + 1) * per_layer)
            hidden = [state[index] for state in states]
            run, last = _one_direction(recorder, x, hidden, weights[own], nodes[own], kind, bool(direction))
            outputs.append(run)
            for i, value in enumerate(last):
                finals[i].append(value)
        x = torch.cat(outputs, -1) if directions == 2 else outputs[0]
    out = x.transpose(0, 1) if batch_first else x
    return (out, *(torch.stack(values) for values in finals))


_KINDS: dict[Any, str] = {
    aten.gru.input: "gru",
    aten.lstm.input: "lstm",
    aten.rnn_tanh.input: "tanh",
    aten.rnn_relu.input: "relu",
    aten.gru_cell.default: "gru",
    aten.lstm_cell.default: "lstm",
    aten.rnn_tanh_cell.default: "tanh",
    aten.rnn_relu_cell.default: "relu",
}


def _one_direction(
    recorder: Recorder,
    x: Tensor,
    hidden: list[Tensor],
    weights: Sequence[Tensor],
    nodes: Sequence[Any],
    kind: str,
    backwards: bool,
) -> tuple[Tensor, list[Tensor]]:
    """x (T, B, p) -> outputs (T, B, h) and the last states. Gate order and equations: torch.nn.RNN, GRU, LSTM."""
    sources: list[fx.Node | None] = [source_of(recorder, n) for n in nodes]
    w_x, w_h = weights[:2]
    b_x, b_h = (weights[2], weights[3]) if len(weights) == 4 else (None, None)
    s_bx, s_bh = (sources[2], sources[3]) if len(weights) == 4 else (None, None)
    from_input = recorder.linear(x, w_x, b_x, (sources[0], s_bx))
    steps = list(from_input.unbind(0))
    outputs: list[Tensor] = []
    h, c = hidden[0], hidden[-1]
    for step in reversed(steps) if backwards else steps:
        from_state = recorder.linear(h, w_h, b_h, (sources[1], s_bh), placed_as=step)
        h, c = _advance(kind, step, from_state, h, c)
        outputs.append(h)
    if backwards:
        outputs.reverse()
    return torch.stack(outputs), [h, c] if kind == "lstm" else [h]


def _advance(kind: str, step: Tensor, from_state: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """One step of a cell: what the input and the state contribute (B, gates * h) -> the next state (and LSTM cell)."""
    if kind == "lstm":
        i, f, g, o = (step + from_state).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c
    if kind == "gru":
        xr, xz, xn = step.chunk(3, -1)
        hr, hz, hn = from_state.chunk(3, -1)
        r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
        n = torch.tanh(xn + r * hn)
        return n + z * (h - n), c
    return torch.tanh(step + from_state) if kind == "tanh" else torch.relu(step + from_state), c


@rewrites(aten.gru_cell.default, aten.lstm_cell.default, aten.rnn_tanh_cell.default, aten.rnn_relu_cell.default)
def cell(recorder: Recorder, node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """One step of a recurrent cell."""
    kind = _KINDS[node.target]
    (xn, x), (_, state), (wxn, w_x), (whn, w_h), (bxn, b_x), (bhn, b_h) = arguments(
        node, args, kwargs, "input", "hx", "w_ih", "w_hh", "b_ih", "b_hh"
    )
    if not recorder.depends[xn]:
        return None
    h, c = state if kind == "lstm" else (state, state)
    step = recorder.linear(x, w_x, b_x, (source_of(recorder, wxn), source_of(recorder, bxn)))
    from_state = recorder.linear(h, w_h, b_h, (source_of(recorder, whn), source_of(recorder, bhn)), placed_as=step)
    h, c = _advance(kind, step, from_state, h, c)
    return (h, c) if kind == "lstm" else h
