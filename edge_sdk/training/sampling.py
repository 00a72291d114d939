"""Which examples a step takes: exact Poisson sampling and unbiased shuffling from 32 bytes of entropy.

Secret sampling is what amplifies privacy (docs/protocol.md section 8.2), so the draws come from ChaCha20 and follow
their distributions exactly, up to the distances stated here.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from edge_sdk.crypto.hashing import derive_key
from edge_sdk.crypto.stream import SEED_BYTES, KeyStream
from edge_sdk.errors import ParameterError

_SEGMENT = 1 << 16
"""Words drawn at a time: memory does not grow with the number of examples."""


def _stream(entropy: bytes, purpose: str, index: int = 0) -> KeyStream:
    if len(entropy) != SEED_BYTES:
        raise ParameterError(f"{purpose}: entropy has {SEED_BYTES} bytes, not {len(entropy)}")
    return KeyStream(derive_key(entropy, purpose), index)


def poisson_sample(size: int, rate: float | Fraction, entropy: bytes) -> NDArray[np.int64]:
    """Indices in [0, size), ascending, int64: each in independently with probability `rate`.

    rate: in [0, 1].  entropy: 32 fresh secret bytes, for this draw alone.
    A uniform 64-bit word below floor(rate * 2^64) lets an example in. The probability is `rate` exactly when rate *
    2^64 is an integer (every float64 that is 0 or at least 2^-12), else below it by less than 2^-64: never above, so
    an account made for `rate` holds. The whole draw is within size * 2^-64 of Poisson sampling in total variation.
    Raises ParameterError on a rate outside [0, 1] or NaN, or a negative size.
    """
    if size < 0 or not 0 <= rate <= 1:
        raise ParameterError(f"no Poisson sample of {size} examples at rate {rate}")
    threshold = (Fraction(rate) * (1 << 64)).__floor__()
    if threshold == 1 << 64:  # does not fit a word, and needs no draw
        return np.arange(size, dtype=np.int64)
    stream = _stream(entropy, "poisson sample")
    drawn = [
        np.flatnonzero(stream.words64(min(_SEGMENT, size - start)) < np.uint64(threshold)) + start
        for start in range(0, size, _SEGMENT)
    ]
    return np.concatenate([np.empty(0, dtype=np.int64), *drawn])


def window_for(batch: int, rate: float | Fraction) -> int:
    """How many positions of the data set make a window of which a Poisson draw mostly fills one batch, not quite.

    batch: examples in one run of the graph.  rate: of the draw, in (0, 1].  At least `batch`, else 0.8 batch / rate:
    one window in ten overflows into a second run at batch 32, and two in ten of a batch's rows stay empty.
    Public numbers alone go in: what a window is must not depend on the data.
    Raises ParameterError on a batch below 1 or a rate outside (0, 1] or NaN.
    """
    if batch < 1 or not 0 < rate <= 1:
        raise ParameterError(f"no window for batches of {batch} at rate {rate}")
    return max(batch, (batch * 4 / (5 * Fraction(rate))).__floor__())


def batches_by_place(indices: NDArray[np.int64], window: int, batch: int) -> Iterator[NDArray[np.int64]]:
    """The drawn examples cut into batches, window by window of the data set: [0, window), [window, 2 window), ...

    indices: int64 (n,), distinct, any order.  window: positions.  batch: the most in one batch; a window with more
    takes several.  Ascending throughout.
    One example more or less changes the batches of its own window and no others, wherever it lies. Cut one after the
    other it would shift all that follow it, and with them the rounding of every sum.
    Raises ParameterError on a window or a batch below 1.
    """
    if window < 1 or batch < 1:
        raise ParameterError(f"no batches of {batch} in windows of {window}")
    ascending = np.sort(indices)
    places = ascending // min(window, 1 << 62)  # a window may be wider than int64 goes
    for group in np.split(ascending, np.flatnonzero(np.diff(places)) + 1):
        for start in range(0, len(group), batch):
            yield group[start : start + batch]


def shuffle(size: int, entropy: bytes, epoch: int = 0) -> NDArray[np.int64]:
    """A permutation of range(size), int64, exactly uniform given a uniform stream.

    entropy: 32 bytes.  epoch: another number gives an independent permutation.
    Examples are sorted by 64-bit words. Distinct words leave every order equally likely; if two are equal (probability
    below size^2 * 2^-65) all are drawn again.
    """
    stream = _stream(entropy, "shuffle", epoch)
    while True:
        words = stream.words64(size)
        order = np.argsort(words, kind="stable")
        ordered = words[order]
        if not (ordered[1:] == ordered[:-1]).any():
            return order


def shuffled_batches(
    size: int, batch: int, entropy: bytes, *, epochs: int | None = None, steps: int | None = None
) -> Iterator[NDArray[np.int64]]:
    """Indices of one batch after the other: every example once an epoch, the last batch of an epoch perhaps short.

    Give `epochs`, or `steps` to stop after so many batches, going through as many epochs as that takes.
    Raises ParameterError (at the first batch) unless exactly one of the two is given and positive, or without examples.
    """
    if (epochs is None) == (steps is None) or (epochs or steps or 0) < 1:
        raise ParameterError(f"give epochs or steps, at least 1: not epochs={epochs}, steps={steps}")
    if size < 1:
        raise ParameterError("no examples to train on")
    per_epoch = -(-size // batch)
    total = steps if steps is not None else per_epoch * (epochs or 0)
    order = np.empty(0, dtype=np.int64)
    for step in range(total):
        epoch, position = divmod(step, per_epoch)
        if position == 0:
            order = shuffle(size, entropy, epoch)
        yield order[position * batch : (position + 1) * batch]
