"""Per-example gradients without per-example backward passes ("book-keeping", Bu et al. 2022, arXiv:2210.00038).

One backward pass gives, for every use of a parameter, the gradient b of the summed loss with respect to that use's
output; example i's own part of it is row i, because examples do not mix. With the use's input a, that determines
example i's gradient G_i without another pass. A use comes in one of two forms:

- `Outer`: G_i = sum over t of b[i,t] a[i,t]^T (matrix products, embeddings). Its norm can be had from Gram matrices
  without forming G_i (ghost norms, Li et al. 2021, arXiv:2110.05679), the weighted sum is one matrix product.
- `Dense`: G_i itself, where it is small or had for free (biases, scales, convolution kernels).

Everything here is plain tensor arithmetic on batch-first tensors and is traced into the training graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GRAM_ERROR = 3e-7
"""Twice the largest error of a squared norm by Gram matrices that was measured, as a part of (sum of |a| |b|)^2: T from
2 to 512, PyTorch and ONNX Runtime. It is added. Where the steps of a gradient nearly cancel, what is left of the sum is
rounding error, and a norm that comes out too small would let the example through the clip. Elsewhere it changes the
norm by a few parts in a million."""


_LONGEST, _STAGE = 1 << 14, 1 << 10
"""Terms that are added up in one go, and in the first stage of two."""


@dataclass(frozen=True)
class Outer:
    """a: (B, T, p), b: (B, T, q); the gradient of a (q, p) parameter, or of one of `shape` with as many elements."""

    a: Tensor
    b: Tensor
    shape: tuple[int, ...] | None = None

    @property
    def ghost(self) -> bool:
        """Whether Gram matrices are the cheaper way to the norm than forming G: multiplications, and memory moved."""
        steps, p, q = self.a.shape[1], self.a.shape[2], self.b.shape[2]
        return steps == 1 or 2 * steps * steps * (p + q) < 2 * steps * p * q

    def dense(self) -> Dense:
        g = torch.bmm(self.b.transpose(1, 2), self.a)
        return Dense(g if self.shape is None else g.reshape(-1, *self.shape))

    def squared_norms(self) -> Tensor:
        """(B,): at least |G_i|^2 = sum over t, u of <a[i,t], a[i,u]> <b[i,t], b[i,u]>; see GRAM_ERROR."""
        if self.a.shape[1] == 1:
            return self.bounds()
        gram_a = torch.bmm(self.a, self.a.transpose(1, 2))
        gram_b = torch.bmm(self.b, self.b.transpose(1, 2))
        lengths = ((self.a * self.a).sum(2) * (self.b * self.b).sum(2)).sqrt()
        return (gram_a * gram_b).sum((1, 2)) + _gram_error(lengths)

    def bounds(self) -> Tensor:
        """(B,): at least |G_i|^2, without Gram matrices; NaN where a or b is. Cauchy and Schwarz; exact for one t."""
        return _squared(self.a) * _squared(self.b)

    def weighted_sum(self, weights: Tensor, counted: Tensor) -> Tensor:
        """(q, p): sum over i of weights[i] G_i. What a row that does not count holds, NaN even, is replaced first."""
        if self.a.shape[1] == 1:
            scaled = _scaled(self.b.flatten(0, 1), weights, counted)
            flat = guard(self.a.flatten(0, 1), counted)
        else:
            scaled = _scaled(self.b, weights, counted).flatten(0, 1)
            flat = guard(self.a, counted).flatten(0, 1)
        g = torch.mm(scaled.t(), flat)
        return g if self.shape is None else g.reshape(self.shape)


@dataclass(frozen=True)
class Dense:
    """g: (B, *shape), the examples' gradients of a parameter of that shape."""

    g: Tensor

    def squared_norms(self) -> Tensor:
        return _squared(self.g)

    def bounds(self) -> Tensor:
        return self.squared_norms()

    def weighted_sum(self, weights: Tensor, counted: Tensor) -> Tensor:
        if self.g.dim() == 2:
            # A bias: a linear layer's weight needs the same rows scaled.
            return _scaled(self.g, weights, counted).sum(0)
        flat = guard(self.g.reshape(self.g.shape[0], -1), counted)
        return torch.mm(weights[None, :], flat).reshape(self.g.shape[1:])


@dataclass(frozen=True)
class Indexed:
    """An embedding: G_i has row indices[i, t] += b[i, t].  indices: (B, T) integers, b: (B, T, q)."""

    indices: Tensor
    b: Tensor
    rows: int

    def squared_norms(self) -> Tensor:
        if self.b.shape[1] == 1:
            return _squared(self.b)
        same = (self.indices[:, :, None] == self.indices[:, None, :]).to(self.b.dtype)
        squared = (torch.bmm(self.b, self.b.transpose(1, 2)) * same).sum((1, 2))
        return squared + _gram_error((self.b * self.b).sum(2).sqrt())

    def bounds(self) -> Tensor:
        return self.b.shape[1] * _squared(self.b)

    def dense(self) -> Dense:
        return Dense(torch.bmm(self._one_hot().transpose(1, 2), self.b))

    def weighted_sum(self, weights: Tensor, counted: Tensor) -> Tensor:
        scaled = _scaled(self.b, weights, counted).flatten(0, 1)
        # A product with a one-hot matrix: both back ends do it well, and neither scatters with addition well.
        return torch.mm(self._one_hot().flatten(0, 1).t(), scaled)

    def _one_hot(self) -> Tensor:
        table = torch.arange(self.rows, device=self.indices.device, dtype=self.indices.dtype)
        return (self.indices[:, :, None] == table).to(self.b.dtype)


Use = Outer | Dense | Indexed


def guard(rows: Tensor, counted: Tensor) -> Tensor:
    """`rows` with zeros in the examples that do not count. counted: (B,) bool. A product with 0 would keep a NaN."""
    return torch.where(counted.reshape([-1] + [1] * (rows.dim() - 1)), rows, torch.zeros((), dtype=rows.dtype))


def _gram_error(lengths: Tensor) -> Tensor:
    """(B,): what rounding may take from a squared norm by Gram matrices. lengths: (B, T), |a[i,t]| |b[i,t]|."""
    total = lengths.sum(1)
    return GRAM_ERROR * total * total


def _squared(rows: Tensor) -> Tensor:
    """(B,): the squared norm of each row."""
    flat = rows.reshape(rows.shape[0], -1)
    return _sum(flat * flat)


def _sum(terms: Tensor) -> Tensor:
    """(B,): the sum of each row of (B, n), long rows in two stages.

    ONNX Runtime adds a row up one vector after the other. Of equal terms each addition may round the same way: n =
    10^6 came out 1.9e-3 too small (PyTorch, which adds in pairs: 1e-7), and an example that is built so would pass the
    clip by half of that. The error grows with n; 16384 terms are within 3e-5.
    """
    size = terms.shape[1]
    if size <= _LONGEST:
        return terms.sum(1)
    whole = size // _STAGE * _STAGE
    found = _sum(terms[:, :whole].reshape(-1, whole // _STAGE, _STAGE).sum(2))
    return found if whole == size else found + terms[:, whole:].sum(1)


def _scaled(rows: Tensor, weights: Tensor, counted: Tensor) -> Tensor:
    return guard(rows * weights.reshape([-1] + [1] * (rows.dim() - 1)), counted)


def merge(uses: list[Use]) -> Use:
    """All uses of one parameter as one: its gradient is their sum, so norms need the cross terms too."""
    if len(uses) > 1 and all(isinstance(use, Outer) for use in uses):
        outers = [use for use in uses if isinstance(use, Outer)]
        a, b = torch.cat([use.a for use in outers], 1), torch.cat([use.b for use in outers], 1)
        merged: Use = Outer(a, b, outers[0].shape)
    elif len(uses) > 1 and all(isinstance(use, Indexed) for use in uses):
        tables = [use for use in uses if isinstance(use, Indexed)]
        merged = Indexed(
            torch.cat([use.indices for use in tables], 1), torch.cat([use.b for use in tables], 1), tables[0].rows
        )
    elif len(uses) > 1:
        merged = Dense(torch.stack([to_dense(use).g for use in uses]).sum(0))
    else:
        (merged,) = uses
    if isinstance(merged, Outer) and not merged.ghost:
        return merged.dense()
    return merged


def to_dense(use: Use) -> Dense:
    return use if isinstance(use, Dense) else use.dense()
