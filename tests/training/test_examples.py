"""How rows reach a batch buffer."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.bundle import Tensor
from edge_sdk.errors import ParameterError
from edge_sdk.training.examples import FetchedExamples, fill


@given(st.integers(1, 8), st.integers(0, 8), st.sampled_from(["float32", "int64", "int32", "uint8", "bool"]))
def test_rows_come_first_and_what_was_there_before_is_gone(batch, rows, dtype):
    rows = min(rows, batch)
    buffer = np.ones((batch, 2), dtype=dtype)
    given_rows = np.arange(2 * rows).reshape(rows, 2).astype(dtype)
    fill(buffer, given_rows, Tensor("x", (2,), dtype, None))
    assert np.array_equal(buffer[:rows], given_rows)
    assert not buffer[rows:].any()


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8"])
@pytest.mark.parametrize(("value", "accepted"), [(0, True), (6, True), (7, False), (200, False)])
def test_integers_stay_below_their_bound(dtype, value, accepted):
    buffer = np.zeros((3, 2), dtype=dtype)
    rows = np.array([[1, value]], dtype=dtype)
    tensor = Tensor("tokens", (2,), dtype, 7)
    if accepted:
        fill(buffer, rows, tensor)
        assert buffer[0, 1] == value
    else:
        with pytest.raises(ParameterError, match=rf"'tokens': {value} is not in \[0, 7\)"):
            fill(buffer, rows, tensor)
        assert not buffer.any()


def test_a_negative_integer_is_refused():
    with pytest.raises(ParameterError, match=r"'y': -1 is not in \[0, 7\)"):
        fill(np.zeros(3, np.int64), np.array([3, -1]), Tensor("y", (), "int64", 7))


def test_a_data_set_has_no_negative_size():
    with pytest.raises(ParameterError, match="-1 examples"):
        FetchedExamples(-1, lambda indices: ([], np.empty(0)))
