"""Rounding is unbiased, and a rounded vector is never longer than the sensitivity that the noise was made for."""

from fractions import Fraction
from itertools import product
from math import ceil, exp, inf, log, nan, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.crypto.stream import KeyStream
from edge_sdk.errors import ParameterError
from edge_sdk.privacy.rounding import round_conditionally, round_stochastically, rounded_norm_bound, square_norm

KEY = b"another key of thirty-two bytes."
HALF = exp(-0.5)  # sqrt(2 ln(1 / beta)) = 1


class Coins:
    """A stream that repeats one 64-bit word."""

    def __init__(self, word):
        self.word = word

    def words64(self, count):
        return np.full(count, self.word, dtype="<u8")


def ways_up(value: float) -> int:
    """How many of the 2^53 coins round `value` up, by bisection on the real function."""
    below = np.floor(value)
    low, high = 0, 1 << 53
    while low < high:
        middle = (low + high) // 2
        up = round_stochastically(np.array([value]), Coins(middle << 11))[0] > below
        low, high = (middle + 1, high) if up else (low, middle)
    return low


def outcomes(values: np.ndarray) -> list[tuple[float, np.ndarray]]:
    """Every rounding of `values` with its probability."""
    fractions = values - np.floor(values)
    result = []
    for ups in product([0, 1], repeat=len(values)):
        chance = float(np.prod([f if up else 1 - f for f, up in zip(fractions, ups, strict=True)]))
        result.append((chance, np.floor(values) + np.array(ups)))
    return result


@pytest.mark.parametrize("value", [0.0, 0.5, 0.25, -0.25, 1 / 3, -1 / 3, 7.9, -7.9, 1e6 + 0.1, -3.0, 2.0**52 - 0.5])
def test_the_chance_to_round_up_is_the_fraction(value):
    assert ways_up(value) == ceil((value - np.floor(value)) * 2.0**53)


@given(st.floats(-(2.0**52), 2.0**52))
def test_the_chance_to_round_up_is_the_fraction_to_53_bits(value):
    assert abs(ways_up(value) / 2.0**53 - (value - np.floor(value))) <= 2.0**-53


def test_the_low_bits_of_a_coin_do_not_matter():
    for low in (0, 2047):
        assert round_stochastically(np.array([0.5]), Coins(((1 << 52) << 11) | low))[0] == 0
        assert round_stochastically(np.array([0.5]), Coins((((1 << 52) - 1) << 11) | low))[0] == 1


def test_rounding_is_unbiased_and_coordinates_are_independent():
    values = np.tile([0.3, -0.3, 0.9, 12.5, -1e4 - 0.01], (200_000, 1))
    rounded = round_stochastically(values.reshape(-1), KeyStream(KEY)).reshape(values.shape)
    errors = rounded - values
    fractions = values[0] - np.floor(values[0])
    spread = np.sqrt(fractions * (1 - fractions))
    assert np.all(np.abs(errors.mean(axis=0)) < 5 * spread / sqrt(len(values)))
    assert np.allclose(errors.std(axis=0), spread, rtol=0.02)
    correlation = np.corrcoef(errors.T) - np.eye(5)
    assert np.abs(correlation).max() < 5 / sqrt(len(values))
    assert abs(np.corrcoef(errors[1:, 0], errors[:-1, 0])[0, 1]) < 5 / sqrt(len(values))


def test_integers_stay_as_they_are():
    values = np.array([0.0, -0.0, 5.0, -5.0, 2.0**52, -(2.0**52)])
    assert round_stochastically(values, Coins((1 << 64) - 1)).tolist() == values.tolist()
    assert round_stochastically(values, Coins(0)).tolist() == values.tolist()


def test_known_bounds():
    assert rounded_norm_bound(3.0, 16, HALF) == pytest.approx(sqrt(9 + 4 + 1 * (3 + 2)))
    assert rounded_norm_bound(10.0, 100, exp(-2)) == pytest.approx(sqrt(100 + 25 + 2 * (10 + 5)))
    assert rounded_norm_bound(0.1, 4, 1e-12) == pytest.approx(2.1)  # each coordinate moves by less than one
    assert rounded_norm_bound(3000.0, 100_000, HALF) == pytest.approx(sqrt(9e6 + 25_000 + 3000 + sqrt(1e5) / 2))


small = st.lists(st.floats(-20, 20), min_size=1, max_size=8)


@given(small, st.sampled_from([0.9, HALF, 0.1, 1e-3, 1e-12]))
def test_the_bound_is_passed_with_probability_at_most_beta(values, beta):
    """Exactly: every rounding of the vector, and the vector's own norm as the bound's norm."""
    vector = np.array(values)
    bound = rounded_norm_bound(float(np.linalg.norm(vector)), len(vector), beta)
    exceeding = sum(chance for chance, rounded in outcomes(vector) if np.linalg.norm(rounded) > bound * (1 + 1e-12))
    assert exceeding <= beta


@given(small)
def test_conditioning_moves_the_mean_by_at_most_0_62_steps_in_all(values):
    """|bias| <= sqrt((1 - p) / p) / 2 in the L2 norm, p >= 1 - beta the chance to be kept (docs/privacy.md, 2.1)."""
    vector = np.array(values)
    bound = rounded_norm_bound(float(np.linalg.norm(vector)), len(vector), HALF)
    kept = [(chance, rounded) for chance, rounded in outcomes(vector) if np.linalg.norm(rounded) <= bound]
    p = sum(chance for chance, _ in kept)
    mean = sum(chance * rounded for chance, rounded in kept) / p
    assert p >= 1 - HALF - 1e-9
    assert np.linalg.norm(mean - vector) <= sqrt(max(0.0, 1 - p) / p) / 2 + 1e-6
    assert np.linalg.norm(mean - vector) <= 0.6208


@given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=200), st.binary(min_size=32, max_size=32))
def test_a_conditional_rounding_never_exceeds_the_bound_and_moves_by_less_than_one(values, key):
    vector = np.array(values)
    bound = rounded_norm_bound(float(np.linalg.norm(vector)), len(vector), HALF)
    rounded = round_conditionally(vector, bound, KeyStream(key))
    assert sum(int(x) ** 2 for x in rounded) <= bound**2
    assert np.abs(rounded - vector).max() < 1


def test_the_bound_holds_where_a_single_draw_would_often_break_it():
    vector = np.full(10_000, 0.5)  # half of all roundings are above the mean of the squared norm
    bound = rounded_norm_bound(float(np.linalg.norm(vector)), len(vector), 0.999)
    once = [np.linalg.norm(round_stochastically(vector, KeyStream(KEY, i))) for i in range(50)]
    assert max(once) > bound
    for i in range(50):
        assert np.linalg.norm(round_conditionally(vector, bound, KeyStream(KEY, i))) <= bound


def test_conditional_rounding_draws_from_the_roundings_within_the_bound_in_their_proportions():
    vector = np.array([0.5, 1.3, -2.2])
    bound = sqrt(9.5)
    due = {tuple(rounded): chance for chance, rounded in outcomes(vector) if np.linalg.norm(rounded) <= bound}
    assert 0 < len(due) < 8
    total = sum(due.values())
    count = 20_000
    stream = KeyStream(KEY)
    seen = dict.fromkeys(due, 0)
    for _ in range(count):
        seen[tuple(round_conditionally(vector, bound, stream))] += 1  # a KeyError: beyond the bound
    chi_square = sum((seen[k] - count * p / total) ** 2 / (count * p / total) for k, p in due.items())
    assert chi_square < len(due) - 1 + 5 * sqrt(2 * (len(due) - 1))


def test_a_vector_that_the_bound_was_not_made_for_is_refused():
    with pytest.raises(ParameterError, match=r"norm below 1\.5"):
        round_conditionally(np.array([5.0]), 1.5, KeyStream(KEY))
    assert round_conditionally(np.array([5.0]), 5.0001, KeyStream(KEY)).tolist() == [5]
    with pytest.raises(
        ParameterError
    ):  # at the bound to the last bit: float64's sum of squares cannot be trusted so far
        round_conditionally(np.array([3.0, 4.0]), 5.0, KeyStream(KEY))
    assert round_conditionally(np.array([3.0, 4.0]), 5.0 * (1 + 1e-9), KeyStream(KEY)).tolist() == [3, 4]


def test_neighbouring_sums_rounded_with_the_same_coins_differ_by_a_rounding_of_the_one_gradient():
    """The coupling of docs/privacy.md section 2.2: its difference is unbiased, next to v, and within the bound."""
    d = 2000
    others = (KeyStream(KEY, 1).words64(d).astype(np.float64) / 2.0**64 - 0.5) * 1e5
    v = KeyStream(KEY, 2).words64(d).astype(np.float64) / 2.0**64 * 6 - 3
    bound = rounded_norm_bound(float(np.linalg.norm(v)), d, 1e-12)
    total = np.zeros(d)
    repeats = 2000
    for i in range(repeats):
        difference = round_stochastically(others + v, KeyStream(KEY, i)) - round_stochastically(
            others, KeyStream(KEY, i)
        )
        assert np.all((difference == np.floor(v)) | (difference == np.ceil(v)))
        assert np.linalg.norm(difference) <= bound
        total += difference
    fractions = v - np.floor(v)
    z = (total / repeats - v) / np.sqrt(np.maximum(fractions * (1 - fractions), 1e-3) / repeats)
    assert np.abs(z).max() < 6
    assert abs(z.mean()) < 5 / sqrt(d)


@pytest.mark.parametrize(
    ("norm", "dimension", "beta"),
    [(-1.0, 1, 0.5), (nan, 1, 0.5), (1.0, 0, 0.5), (1.0, 1, 0.0), (1.0, 1, 1.0), (1.0, 1, nan)],
)
def test_no_bound_without_a_norm_a_dimension_and_a_beta(norm, dimension, beta):
    with pytest.raises(ParameterError, match="no bound"):
        rounded_norm_bound(norm, dimension, beta)


def test_the_bound_grows_as_beta_falls_and_never_passes_one_step_a_coordinate():
    bounds = [rounded_norm_bound(50.0, 1000, beta) for beta in (0.9, 0.5, 0.1, 1e-6, 1e-12, 1e-200)]
    assert bounds == sorted(bounds)
    assert bounds[-1] <= 50 + sqrt(1000)
    assert rounded_norm_bound(0.0, 1, 0.5) <= sqrt(0.25 + sqrt(2 * log(2)) / 2)
    assert rounded_norm_bound(inf, 1, 0.5) == inf


def test_a_norm_does_not_lose_digits_with_the_number_of_coordinates():
    """One large square first: added one by one, each of the others would be lost or rounded the same way."""
    vector = np.full(2_000_001, 1 + 2.0**-20)
    vector[0] = 2.0**26
    exact = Fraction(2) ** 52 + 2_000_000 * Fraction(1 + 2.0**-20) ** 2
    assert abs(Fraction(square_norm(vector)) - exact) <= exact * Fraction(1, 10**13)
