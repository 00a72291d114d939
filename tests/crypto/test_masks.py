"""Masks come off with the secret, add up under the sum of the secrets, and are unrelated across rounds and entropy."""

from hashlib import sha256

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.crypto.gaussian import gaussian_table
from edge_sdk.crypto.hashing import derive_key, tagged_hash
from edge_sdk.crypto.masks import (
    SEGMENT_BLOCKS,
    SIGMA_DENOMINATOR,
    SIGMA_NUMERATOR,
    add_mask,
    expand_secret,
    remove_mask,
)
from edge_sdk.crypto.ring import DEGREE, ShortFactor, public_blocks
from edge_sdk.crypto.stream import KeyStream
from edge_sdk.errors import ParameterError

ROUND = b"\x11" * 32
ENTROPY = bytes(range(32))
BOUND = gaussian_table(9, 2).bound


def message_of(blocks: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << 32, (blocks, DEGREE), dtype=np.uint32)


def masked(message: np.ndarray, entropy: bytes = ENTROPY, round_id: bytes = ROUND) -> tuple[np.ndarray, np.ndarray]:
    """The masked message, and the secret that takes the mask off."""
    out, secret = message.copy(), expand_secret(entropy, round_id)
    add_mask(out, secret, entropy, round_id)
    return out, secret


def residual(opened: np.ndarray, message: np.ndarray) -> np.ndarray:
    return (opened - message).view(np.int32).astype(np.float64)


def looks_uniform(words: np.ndarray) -> bool:
    """Top bytes by chi-square with 255 degrees of freedom, mean +- 6 deviations."""
    counts = np.bincount((words.reshape(-1) >> np.uint32(24)).astype(np.int64), minlength=256)
    expected = words.size / 256
    return abs(float(((counts - expected) ** 2 / expected).sum()) - 255) < 6 * (2 * 255) ** 0.5


def test_sigma_is_4_5():
    assert SIGMA_NUMERATOR / SIGMA_DENOMINATOR == 4.5


@pytest.mark.parametrize("blocks", [0, 1, 15, 16, 17, 35])
def test_the_mask_comes_off_and_leaves_gaussian_errors(blocks):
    message = message_of(blocks)
    opened, secret = masked(message)
    remove_mask(opened, secret, ROUND)
    errors = residual(opened, message)
    assert np.abs(errors).max(initial=0) <= BOUND
    if blocks:
        count = errors.size
        assert abs(errors.mean()) < 5 * 4.5 / count**0.5
        assert abs(errors.var() - 4.5**2) < 5 * 4.5**2 * (2 / count) ** 0.5


def test_a_masked_message_is_a_times_s_plus_e_plus_the_message():
    # Built again from the parts that docs/protocol.md names, streams and labels included.
    message = message_of(SEGMENT_BLOCKS + 3)
    out, secret = masked(message)
    expected = np.empty_like(message)
    public = public_blocks(KeyStream(tagged_hash("public polynomial", ROUND)), len(message))
    ShortFactor(secret).multiply_into(public, expected)
    key, table = derive_key(ENTROPY, "mask errors", ROUND), gaussian_table(9, 2)
    for index, start in enumerate(range(0, len(message), SEGMENT_BLOCKS)):
        segment = expected[start : start + SEGMENT_BLOCKS]
        errors = table.sample(KeyStream(key, index), segment.size).astype(np.int64).reshape(segment.shape)
        segment += (errors % (1 << 32)).astype(np.uint32)
    expected += message
    assert np.array_equal(out, expected)
    assert np.array_equal(
        secret, table.sample(KeyStream(derive_key(ENTROPY, "mask secret", ROUND)), DEGREE).astype(np.int64)
    )


def test_the_secret_is_short_gaussian_and_a_function_of_entropy_and_round():
    secrets = [expand_secret(bytes([i]) * 32, ROUND) for i in range(40)]
    together = np.concatenate(secrets).astype(np.float64)
    assert all(secret.dtype == np.int64 and secret.shape == (DEGREE,) for secret in secrets)
    assert abs(together.var() - 4.5**2) < 5 * 4.5**2 * (2 / together.size) ** 0.5
    assert np.abs(together).max() <= BOUND
    assert np.array_equal(secrets[3], expand_secret(b"\3" * 32, ROUND))


@given(st.integers(1, 12), st.integers(0, 2**32))
@settings(max_examples=15)
def test_the_sum_of_masked_messages_opens_with_the_sum_of_the_secrets(senders, seed):
    messages = [message_of(3, seed + i) for i in range(senders)]
    total, secret_sum = np.zeros((3, DEGREE), np.uint32), np.zeros(DEGREE, np.int64)
    for i, message in enumerate(messages):
        out, secret = masked(message, bytes([i]) * 32)
        total += out
        secret_sum += secret
    remove_mask(total, secret_sum, ROUND)
    errors = residual(total, sum(messages[1:], start=messages[0]))
    assert np.abs(errors).max() <= 8 * 4.5 * senders**0.5
    assert abs(errors.var() / (senders * 4.5**2) - 1) < 5 * (2 / errors.size) ** 0.5


def test_a_thousand_masks_add_up_without_losing_a_bit():
    # 1000 secrets have a norm that needs limbs; errors grow as the root of the number of senders.
    secret_sum = sum(
        (expand_secret(i.to_bytes(32, "little"), ROUND) for i in range(1000)), start=np.zeros(DEGREE, np.int64)
    )
    public = public_blocks(KeyStream(tagged_hash("public polynomial", ROUND)), 2)
    total = np.zeros((2, DEGREE), np.uint32)
    for i in range(1000):
        product = np.empty_like(total)
        ShortFactor(expand_secret(i.to_bytes(32, "little"), ROUND)).multiply_into(public, product)
        total += product
    remove_mask(total, secret_sum, ROUND)
    assert not total.any()


def test_without_the_secret_a_masked_zero_looks_uniform():
    out, secret = masked(np.zeros((32, DEGREE), np.uint32))
    assert looks_uniform(out)
    wrong = secret.copy()
    wrong[0] += 1
    remove_mask(out, wrong, ROUND)
    assert looks_uniform(out)


@pytest.mark.parametrize(
    ("entropy", "round_id"),
    [(ENTROPY, b"\x12" * 32), (b"\1" + ENTROPY[1:], ROUND), (ENTROPY, ROUND[:31]), (ENTROPY, ROUND + b"\0")],
)
def test_another_round_or_other_entropy_gives_an_unrelated_mask(entropy, round_id):
    zero = np.zeros((32, DEGREE), np.uint32)
    (first, s), (second, t) = masked(zero), masked(zero, entropy, round_id)
    assert looks_uniform(first - second)
    assert abs((s * t).mean()) < 5 * 4.5**2 / DEGREE**0.5
    assert not np.array_equal(s, t)


def test_a_mask_of_another_round_does_not_come_off():
    out, secret = masked(np.zeros((32, DEGREE), np.uint32))
    remove_mask(out, secret, b"\x12" * 32)
    assert looks_uniform(out)


def test_errors_of_neighbouring_segments_are_independent():
    blocks = 2 * SEGMENT_BLOCKS
    out, secret = masked(np.zeros((blocks, DEGREE), np.uint32))
    remove_mask(out, secret, ROUND)
    errors = residual(out, np.zeros_like(out))
    first, second = errors[:SEGMENT_BLOCKS].reshape(-1), errors[SEGMENT_BLOCKS:].reshape(-1)
    assert abs((first * second).mean()) < 5 * 4.5**2 / first.size**0.5
    pairs = {row.tobytes() for row in errors}
    assert len(pairs) == blocks


@pytest.mark.parametrize(("short", "long"), [(16, 33), (32, 40)])
def test_whole_segments_do_not_depend_on_what_follows(short, long):
    message = message_of(long)
    assert np.array_equal(masked(message)[0][:short], masked(message[:short])[0])


def test_the_error_is_not_of_the_secrets_stream():
    out, secret = masked(np.zeros((1, DEGREE), np.uint32))
    remove_mask(out, secret, ROUND)
    errors = residual(out, np.zeros_like(out))[0]
    assert abs((errors * secret).mean()) < 5 * 4.5**2 / DEGREE**0.5


@pytest.mark.parametrize(
    "layout",
    [
        np.zeros((2, DEGREE), np.int32),
        np.zeros((2, DEGREE), np.uint64),
        np.zeros((2, DEGREE), np.float32),
        np.zeros((2, DEGREE), ">u4"),
        np.zeros((2, DEGREE // 2), np.uint32),
        np.zeros(DEGREE, np.uint32),
        np.zeros((1, 1, DEGREE), np.uint32),
    ],
    ids=range(7),
)
def test_another_memory_layout_is_refused_and_nothing_is_written(layout):
    with pytest.raises(ParameterError, match="blocks are uint32"):
        add_mask(layout, expand_secret(ENTROPY, ROUND), ENTROPY, ROUND)
    with pytest.raises(ParameterError, match="blocks are uint32"):
        remove_mask(layout, expand_secret(ENTROPY, ROUND), ROUND)
    assert not layout.any()


@pytest.mark.parametrize("secret", [np.zeros(DEGREE, np.int8), np.zeros(7, np.int64), np.full(DEGREE, 10**6 + 1)])
def test_a_secret_of_another_shape_type_or_size_is_refused_before_anything_is_written(secret):
    message = np.zeros((2, DEGREE), np.uint32)
    with pytest.raises(ParameterError, match="factor"):
        add_mask(message, secret, ENTROPY, ROUND)
    with pytest.raises(ParameterError, match="factor"):
        remove_mask(message, secret, ROUND)
    assert not message.any()


def test_a_mask_is_added_through_a_strided_view():
    wide, message = message_of(40), message_of(40)[::2].copy()
    view = wide[::2]
    add_mask(view, expand_secret(ENTROPY, ROUND), ENTROPY, ROUND)
    assert np.array_equal(wide[::2], masked(message)[0])
    assert np.array_equal(wide[1::2], message_of(40)[1::2])


def test_the_known_answers_of_the_protocol_document():
    # d = 5, n_max = 100: Delta = 2^10, then the count and the pads.
    entropy, tid = bytes(range(32)), bytes(32)
    secret = expand_secret(entropy, tid)
    assert secret[:8].tolist() == [-4, -1, -6, -3, 8, -1, -4, -5]
    message = np.zeros((1, DEGREE), np.uint32)
    message[0, :6] = [1 << 10, (1 << 32) - (1 << 10), 2 << 10, 3 << 10, 4 << 10, 1 << 10]
    add_mask(message, secret, entropy, tid)
    assert message[0, :4].tolist() == [0x60BC149A, 0x698C2541, 0x393EF1C1, 0xB4D83FA9]
    digest = "9a92c5898a2d45fe988f589d124797ebf1cda45f32dc537e72bae12776f029b2"
    assert sha256(message.astype("<u4").tobytes()).hexdigest() == digest
