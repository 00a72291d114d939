"""Additive masks from Ring-LWE: c = a*s + e + m mod 2^32 (docs/protocol.md section 3).

Masked messages add up: the sum of the c is a mask of the sum of the m under the sum of the s, with the sum of the e
on top. Whoever learns only the sum of the s learns only the sum of the m. Sources: Stevens et al., "Efficient
Differentially Private Secure Aggregation for Federated Learning via Hardness of Learning with Errors", USENIX Security
2022, arXiv:2112.06872; with one wake-up, Karthikeyan and Polychroniadou, "OPA", CRYPTO 2025, arXiv:2410.22303.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge_sdk.crypto.gaussian import GaussianTable, gaussian_table
from edge_sdk.crypto.hashing import derive_key, tagged_hash
from edge_sdk.crypto.ring import DEGREE, ShortFactor, public_blocks
from edge_sdk.crypto.stream import KeyStream
from edge_sdk.errors import ParameterError

SIGMA_NUMERATOR, SIGMA_DENOMINATOR = 9, 2
"""Standard deviation of every coefficient of s and e: 4.5. A constant of the protocol version, never negotiated."""

SEGMENT_BLOCKS = 16
"""Errors are drawn in segments of so many blocks, each from the stream of its own index, so that memory stays flat."""


def _table() -> GaussianTable:
    return gaussian_table(SIGMA_NUMERATOR, SIGMA_DENOMINATOR)


def expand_secret(entropy: bytes, round_id: bytes) -> NDArray[np.int64]:
    """The secret s of one contribution: int64 (2048,), discrete Gaussian of standard deviation 4.5.

    entropy: 32 fresh secret bytes.  round_id: the ticket's hash, so that the same entropy in another round, a fault
    of the caller's, still gives another s.
    """
    stream = KeyStream(derive_key(entropy, "mask secret", round_id))
    return _table().sample(stream, DEGREE).astype(np.int64)


def add_mask(message: NDArray[np.uint32], secret: NDArray[np.int64], entropy: bytes, round_id: bytes) -> None:
    """message += a*s + e modulo 2^32, in place.

    message: uint32 (blocks, 2048), already scaled.  secret: from `expand_secret` with the same entropy and round_id.
    Two messages must never be masked with the same entropy and round_id: their difference would show.
    """
    factor = ShortFactor(secret)
    public = _public_stream(round_id)
    error_key = derive_key(entropy, "mask errors", round_id)
    product = np.empty((SEGMENT_BLOCKS, DEGREE), dtype=np.uint32)
    for index, segment in enumerate(_segments(message)):
        factor.multiply_into(public_blocks(public, len(segment)), product[: len(segment)])
        segment += product[: len(segment)]
        errors = _table().sample(KeyStream(error_key, index), segment.size)
        segment += errors.reshape(segment.shape).astype(np.uint32)


def remove_mask(masked_sum: NDArray[np.uint32], secret_sum: NDArray[np.int64], round_id: bytes) -> None:
    """masked_sum -= a*secret_sum modulo 2^32, in place: what stays is the sum of the messages plus small errors.

    masked_sum: uint32 (blocks, 2048).  secret_sum: int64 (2048,), coefficients of magnitude at most 10^6.
    """
    factor = ShortFactor(secret_sum)
    public = _public_stream(round_id)
    product = np.empty((SEGMENT_BLOCKS, DEGREE), dtype=np.uint32)
    for segment in _segments(masked_sum):
        factor.multiply_into(public_blocks(public, len(segment)), product[: len(segment)])
        segment -= product[: len(segment)]


def _public_stream(round_id: bytes) -> KeyStream:
    """The public polynomial comes from a hash of the ticket and from nobody's choice: a chosen `a` would leak s."""
    return KeyStream(tagged_hash("public polynomial", round_id))


def _segments(blocks: NDArray[np.uint32]) -> list[NDArray[np.uint32]]:
    if blocks.ndim != 2 or blocks.shape[1] != DEGREE or blocks.dtype != np.uint32:
        raise ParameterError(f"blocks are uint32 (count, {DEGREE}), not {blocks.dtype} {blocks.shape}")
    return [blocks[i : i + SEGMENT_BLOCKS] for i in range(0, len(blocks), SEGMENT_BLOCKS)]
