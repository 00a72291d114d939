"""The device's examples, and how a batch of them reaches the graph's input buffers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from edge_sdk.bundle import Tensor
from edge_sdk.errors import ParameterError

Array = NDArray[np.generic]


class Examples(Protocol):
    """A device's data set, read by index: it may be larger than memory."""

    def __len__(self) -> int:
        """How many examples there are."""

    def fetch(self, indices: NDArray[np.int64]) -> tuple[Sequence[Array], Array]:
        """The inputs, in the manifest's order, and the labels of these examples.

        indices: int64 (n,), n >= 1.  Each array has n rows, and shape and dtype as in the manifest.
        """


class ArrayExamples:
    """Examples in arrays, one row each: numpy's, memory maps, or what numpy can read, such as PyTorch's tensors."""

    def __init__(self, inputs: Array | Sequence[Array], labels: Array) -> None:
        """inputs: one array, or one for each input of the model.

        Raises ParameterError if one is no array, or the lengths differ.
        """
        self._inputs = list(inputs) if isinstance(inputs, tuple | list) else [cast("Array", inputs)]
        self._labels = labels
        for what, array in (*(("an input", x) for x in self._inputs), ("the labels", labels)):
            if not hasattr(array, "dtype") or not np.shape(array):
                raise ParameterError(
                    f"{what}: {type(array).__name__} is no array with a row for each example. Inputs are one array, or "
                    "a list with one array for each input of the model; numpy.asarray makes one"
                )
        lengths = [len(array) for array in (*self._inputs, labels)]
        if len(set(lengths)) != 1:
            raise ParameterError(f"inputs and labels have {lengths} rows, not all the same number")

    def __len__(self) -> int:
        return len(self._labels)

    def fetch(self, indices: NDArray[np.int64]) -> tuple[Sequence[Array], Array]:
        return [np.asarray(array[indices]) for array in self._inputs], np.asarray(self._labels[indices])


class FetchedExamples:
    """Examples from a callable: `fetch(indices)` as in `Examples`, for data in files or a database."""

    def __init__(self, size: int, fetch: Callable[[NDArray[np.int64]], tuple[Sequence[Array], Array]]) -> None:
        if size < 0:
            raise ParameterError(f"{size} examples")
        self._size, self._fetch = size, fetch

    def __len__(self) -> int:
        return self._size

    def fetch(self, indices: NDArray[np.int64]) -> tuple[Sequence[Array], Array]:
        return self._fetch(indices)


def _of_rows(shape: Sequence[int]) -> str:
    """(n, 1, 8, 8) for rows of shape (1, 8, 8)."""
    return f"(n, {', '.join(map(str, shape))})" if shape else "(n,)"


def fill(buffer: Array, rows: Array, tensor: Tensor) -> None:
    """Copy `rows` to the front of `buffer` and zero the rest: stale rows must not reach the next batch.

    buffer: (batch, *shape).  rows: at most batch rows.
    Raises ParameterError that names the tensor on another shape or dtype or an integer outside [0, below). NaN and
    infinity are the graph's to handle: it counts such an example as invalid.
    """
    if rows.dtype != buffer.dtype or rows.shape[1:] != buffer.shape[1:] or rows.ndim != buffer.ndim:
        remedy = f": convert it with astype('{buffer.dtype}')" if rows.dtype != buffer.dtype else ""
        raise ParameterError(
            f"{tensor.name!r} is {buffer.dtype} {_of_rows(tensor.shape)} in this model, not {rows.dtype} "
            f"{_of_rows(rows.shape[1:])}{remedy}"
        )
    if tensor.below is not None and len(rows):
        low, high = int(np.min(rows)), int(np.max(rows))
        if low < 0 or high >= tensor.below:
            raise ParameterError(f"{tensor.name!r}: {low if low < 0 else high} is not in [0, {tensor.below})")
    buffer[: len(rows)] = rows
    buffer[len(rows) :] = np.zeros((), dtype=buffer.dtype)
