"""Depthwise convolutions with the batch as the last axis, against PyTorch's own in float64."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")

import torch
from torch.func import grad, vmap
from torch.nn import functional as F

from export.layers.convolution import convolve, input_gradient, kernel_gradients

pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@st.composite
def geometries(draw):
    kernel, stride, dilation = draw(pairs), draw(pairs), draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    if draw(st.booleans()):
        stride = (1, 1)  # the common case, which has a form of its own
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    padding = tuple(draw(st.integers(0, r)) for r in reach)
    size = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    assume(all(n + 2 * p > r for n, p, r in zip(size, padding, reach, strict=True)))
    batch, channels = draw(st.integers(1, 4)), draw(st.integers(2, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    x = torch.randn((batch, channels, *size), generator=generator, dtype=torch.float64)
    w = torch.randn((channels, 1, *kernel), generator=generator, dtype=torch.float64)
    bias = torch.randn(channels, generator=generator, dtype=torch.float64)
    return x, w, bias, stride, padding, dilation, channels


@settings(max_examples=150, deadline=None)
@given(geometries())
def test_outputs_input_gradients_and_each_examples_kernel_gradients_are_those_of_pytorch(geometry):
    x, w, bias, *options = geometry
    expected = F.conv2d(x, w, bias, *options)
    torch.testing.assert_close(convolve(x, w, bias, *options), expected, rtol=1e-12, atol=1e-12)
    b = torch.cos(expected)

    def weighed(x, w, b):
        return (F.conv2d(x, w, None, *options) * b).sum()

    torch.testing.assert_close(
        input_gradient(x, w, b, *options), grad(weighed)(x, w, b), rtol=1e-12, atol=1e-12, msg="input"
    )
    each = vmap(lambda x, b: grad(weighed, argnums=1)(x[None], w, b[None]))(x, b)
    found = kernel_gradients(x, b, tuple(w.shape[2:]), *options)
    torch.testing.assert_close(found, each, rtol=1e-12, atol=1e-12, msg="kernel")
