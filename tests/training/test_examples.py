"""How rows reach a batch buffer."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.bundle import Tensor
from edge_sdk.errors import ParameterError
from edge_sdk.training.examples import ArrayExamples, FetchedExamples, fill


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


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (np.zeros((2, 3)), "float64 (n, 3): convert it with astype('float32')"),
        (np.zeros((2, 3, 1), np.float32), "float32 (n, 3, 1)"),
        (np.zeros(2, np.float32), "float32 (n,)"),
    ],
)
def test_rows_of_another_kind_are_refused_with_what_would_do(rows, said):
    with pytest.raises(ParameterError) as caught:
        fill(np.zeros((4, 3), np.float32), rows, Tensor("x", (3,), "float32", None))
    assert str(caught.value) == f"'x' is float32 (n, 3) in this model, not {said}"


X, Y = np.arange(12, dtype=np.float32).reshape(4, 3), np.arange(4)


class Borrowed:
    """An array of another library: numpy can read it."""

    def __init__(self, values):
        self.values, self.dtype, self.shape = values, f"other.{values.dtype}", values.shape

    def __len__(self):
        return len(self.values)

    def __getitem__(self, indices):
        return Borrowed(self.values[indices])

    def __array__(self, dtype=None, copy=None):
        return self.values


@pytest.mark.parametrize(
    "inputs", [X, Borrowed(X), [X], (Borrowed(X),)], ids=["an array", "another's", "a list", "a tuple"]
)
def test_arrays_of_any_library_come_as_numpys(inputs):
    examples = ArrayExamples(inputs, Borrowed(Y))
    (rows,), labels = examples.fetch(np.array([2, 0]))
    assert len(examples) == 4
    assert type(rows) is type(labels) is np.ndarray
    assert np.array_equal(rows, X[[2, 0]])
    assert np.array_equal(labels, [2, 0])


@pytest.mark.parametrize(
    ("inputs", "labels", "what"),
    [
        (X.tolist(), Y, "an input: list is no array"),
        (X, Y.tolist(), "the labels: list is no array"),
        (X, np.array(3), "the labels: ndarray is no array"),
        (None, Y, "an input: NoneType is no array"),
    ],
)
def test_what_is_no_array_of_rows_is_refused_in_a_line(inputs, labels, what):
    with pytest.raises(ParameterError, match=f"^{what} with a row for each example"):
        ArrayExamples(inputs, labels)


def test_a_data_set_has_no_negative_size():
    with pytest.raises(ParameterError, match="-1 examples"):
        FetchedExamples(-1, lambda indices: ([], np.empty(0)))
