"""The rotation is orthogonal at every length, the explicit matrix where one can be written down, and it spreads."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.crypto.hashing import tagged_hash
from edge_sdk.crypto.stream import KeyStream
from edge_sdk.errors import ParameterError
from edge_sdk.privacy.rotation import block_length, rotate, rotate_back

SEED = b"a ticket's hash"
LENGTHS = [1, 2, 3, 4, 5, 7, 8, 12, 31, 64, 100, 4095, 4096, 4097, 6000, 8191, 8192, 8195, 99_999, 100_000]


def some_vector(length: int, key: int = 0) -> np.ndarray:
    """Numbers in [-1, 1) that look random."""
    words = KeyStream(bytes(32), key).words64(length)
    return words.astype(np.float64) / 2.0**63 - 1


def explicit_matrix(length: int, seed: bytes) -> np.ndarray:
    """The rotation as one matrix, from the definition: signs bit by bit, Hadamard entries by the parity of i & j."""
    block = 1 << (length.bit_length() - 1)
    assert block <= 4096
    octets = KeyStream(tagged_hash("rotation", seed)).read((length + block + 7) // 8)
    signs = [-1.0 if octets[i // 8] >> (i % 8) & 1 else 1.0 for i in range(length + block)]
    hadamard = np.array([[(-1.0) ** (i & j).bit_count() for j in range(block)] for i in range(block)]) / block**0.5
    first = np.eye(length)
    first[:block, :block] = hadamard
    whole = first @ np.diag(signs[:length])
    if block < length:
        second = np.eye(length)
        second[length - block :, length - block :] = hadamard @ np.diag(signs[length:])
        whole = second @ whole
    return whole


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 16, 17, 63, 64, 65, 100, 127, 128])
def test_it_is_the_explicit_signed_hadamard_matrix(length):
    vector = some_vector(length)
    assert np.allclose(rotate(vector, SEED), explicit_matrix(length, SEED) @ vector, rtol=0, atol=1e-13)


def test_beyond_4096_coordinates_each_block_is_rotated_by_itself_and_the_rest_by_a_last_window():
    """A coordinate in an early block stays there; one in the tail reaches the last 4096 and no others."""
    length = 3 * 4096 + 10
    for place, low, high in [(5, 0, 4096), (4096, 4096, 8192), (length - 1, length - 4096, length)]:
        unit = np.zeros(length)
        unit[place] = 1.0
        touched = np.flatnonzero(rotate(unit, SEED))
        assert (touched.min(), touched.max()) == (low, high - 1)
        assert len(touched) == 4096


@pytest.mark.parametrize("length", LENGTHS)
def test_norms_and_angles_are_kept_and_back_is_the_inverse(length):
    x, y = some_vector(length, 1), some_vector(length, 2)
    rx, ry = rotate(x, SEED), rotate(y, SEED)
    assert abs(rx @ rx - x @ x) <= 1e-12 * (x @ x)
    assert abs(rx @ ry - x @ y) <= 1e-12 * length
    assert np.abs(rotate_back(rx, SEED) - x).max() < 1e-13
    assert np.abs(rotate(rotate_back(x, SEED), SEED) - x).max() < 1e-13


@given(st.integers(1, 20_000), st.binary(min_size=1, max_size=40))
def test_any_length_and_seed_can_be_undone(length, seed):
    vector = some_vector(length)
    kept = vector.copy()
    assert np.abs(rotate_back(rotate(vector, seed), seed) - vector).max() < 1e-13
    assert np.array_equal(vector, kept)  # the argument is not written to


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300), st.floats(-100, 100))
def test_it_is_linear(values, factor):
    x = np.array(values)
    y = some_vector(len(x))
    together = rotate(x + factor * y, SEED)
    assert np.allclose(together, rotate(x, SEED) + factor * rotate(y, SEED), rtol=0, atol=1e-6)


@pytest.mark.parametrize("length", [4096, 10_000, 100_000])
@pytest.mark.parametrize("shape", ["one coordinate", "constant", "first block", "tail"])
def test_no_coordinate_passes_the_sub_gaussian_bound(length, shape):
    """Twice d Gaussian tails of variance |x|^2 / 4096, at one in a million."""
    vector = np.zeros(length)
    places = {
        "one coordinate": slice(7, 8),
        "constant": slice(None),
        "first block": slice(4096),
        "tail": slice(-3, None),
    }
    vector[places[shape]] = 1.0
    vector /= np.linalg.norm(vector)
    rotated = rotate(vector, SEED)
    assert np.abs(rotated).max() <= np.sqrt(2 * np.log(2 * length / 1e-6) / 4096)


@pytest.mark.parametrize(("length", "block"), [(64, 64), (100, 64)])
def test_over_seeds_a_coordinate_has_mean_zero_and_variance_norm_over_block(length, block):
    vector = np.ones(length)
    rotated = np.array([rotate(vector, bytes([i & 255, i >> 8])) for i in range(4000)])
    assert np.abs(rotated.mean(axis=0)).max() < 5 * rotated.std() / 4000**0.5
    variance = (rotated**2).mean(axis=0)
    assert np.abs(variance - 1).max() < 5 * (2 / 4000) ** 0.5
    bound = length / block  # the proxy |x|^2 / block; here the windows keep each coordinate's own variance at 1
    for t in (1.0, 2.0, 3.0):
        share = (rotated > t).mean()
        assert share <= np.exp(-t * t / (2 * bound))


def test_other_seeds_give_other_rotations():
    vector = some_vector(100)
    assert not np.allclose(rotate(vector, b"a"), rotate(vector, b"b"))
    assert np.array_equal(rotate(vector, b"a"), rotate(vector, b"a"))


@pytest.mark.parametrize(
    ("dimension", "block"), [(1, 1), (2, 2), (3, 2), (4, 4), (4095, 2048), (4096, 4096), (4097, 4096), (10**9, 4096)]
)
def test_blocks_are_the_largest_power_of_two_that_fits_up_to_4096(dimension, block):
    assert block_length(dimension) == block


def test_nothing_to_rotate_is_refused():
    for call in (lambda: block_length(0), lambda: rotate(np.zeros(0), SEED), lambda: rotate_back(np.zeros(0), SEED)):
        with pytest.raises(ParameterError, match="0 coordinates"):
            call()
