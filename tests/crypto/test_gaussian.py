"""The sampler gives the discrete Gaussian to 2^-120, the same sample for the same bits, ties included."""

from bisect import bisect_right
from decimal import Decimal, localcontext
from hashlib import sha256
from math import ceil, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.crypto.gaussian import GaussianTable, gaussian_table
from edge_sdk.crypto.stream import KeyStream
from edge_sdk.errors import ParameterError

KEY = b"a fixed key of thirty-two bytes."
SIGMAS = [(9, 2), (1, 1), (1, 2), (7, 3), (9, 1), (1, 3), (3, 1)]
TINY_SIGMAS = [(1, 1000), (1, 20), (1, 13), (1, 10), (1, 6), (23, 100), (3, 10)]
TABLE = GaussianTable(9, 2)
UNDECIDED = -128


def exact_probabilities(numerator: int, denominator: int) -> dict[int, Decimal]:
    """P(k) to 110 digits, from the definition alone and over a wider range than the table's."""
    reach = 20 * numerator // denominator + 40
    with localcontext() as context:
        context.prec = 110
        sigma = Decimal(numerator) / Decimal(denominator)
        weights = {k: (-(Decimal(k) ** 2) / (2 * sigma**2)).exp() for k in range(-reach, reach + 1)}
        total = sum(weights.values())
        return {k: weight / total for k, weight in weights.items()}


def sampled_probabilities(table: GaussianTable) -> dict[int, Decimal]:
    """P(k) of the full 128-bit comparison: the gap between two boundaries."""
    edges = [0, *table.boundaries, 1 << 128]
    with localcontext() as context:
        context.prec = 110
        return {
            k: Decimal(above - below) / Decimal(1 << 128)
            for k, below, above in zip(range(-table.bound, table.bound + 1), edges[:-1], edges[1:], strict=True)
        }


class Bits:
    """A stream in which every sample's 128 bits are chosen; the 16 bits that a sample must ignore are filled."""

    def __init__(self, values, junk=0xBEEF):
        self.prefixes = np.array([value >> 112 for value in values], dtype="<u2")
        open_values = [value for value in values if TABLE.table[value >> 112] == UNDECIDED]
        self.later = [
            np.array([(value >> 64 & (1 << 48) - 1) | junk << 48 for value in open_values], dtype="<u8"),
            np.array([value & (1 << 64) - 1 for value in open_values], dtype="<u8"),
        ]

    def words16(self, count):
        return np.concatenate([self.prefixes, np.zeros(count - len(self.prefixes), dtype="<u2")])

    def words64(self, count):
        words = self.later.pop(0)
        assert len(words) == count
        return words


def quantile(value: int) -> int:
    return bisect_right(TABLE.boundaries, value) - TABLE.bound


@pytest.mark.parametrize(("numerator", "denominator"), SIGMAS + TINY_SIGMAS)
def test_the_table_is_within_2_to_the_minus_120_of_the_exact_distribution(numerator, denominator):
    exact = exact_probabilities(numerator, denominator)
    sampled = sampled_probabilities(GaussianTable(numerator, denominator))
    with localcontext() as context:
        context.prec = 110
        distance = sum(abs(p - sampled.get(k, Decimal(0))) for k, p in exact.items()) / 2
        assert distance < Decimal(2) ** -120


@pytest.mark.parametrize(("numerator", "denominator"), SIGMAS + TINY_SIGMAS)
def test_the_prefix_table_is_right_for_every_one_of_its_words(numerator, denominator):
    table = GaussianTable(numerator, denominator)
    undecided = 0
    for prefix in range(1 << 16):
        lowest = bisect_right(table.boundaries, prefix << 112) - table.bound
        highest = bisect_right(table.boundaries, (prefix + 1 << 112) - 1) - table.bound
        if table.table[prefix] == UNDECIDED:
            undecided += 1
        else:
            assert lowest == highest == table.table[prefix]
    assert undecided <= len(table.boundaries)


def test_about_one_sample_in_1600_reads_on_at_sigma_4_5():
    assert 1 / 1700 < np.mean(TABLE.table == UNDECIDED) < 1 / 1600


@given(st.integers(0, (1 << 128) - 1), st.integers(0, (1 << 16) - 1))
def test_settle_counts_the_boundaries_at_or_below_and_ignores_the_top_of_the_second_word(value, junk):
    prefix, high, low = value >> 112, (value >> 64 & (1 << 48) - 1) | junk << 48, value & (1 << 64) - 1
    assert TABLE.settle(prefix, high, low) == quantile(value)


def test_a_number_on_a_boundary_belongs_to_the_larger_sample_and_one_below_to_the_smaller():
    values = [b + step for b in TABLE.boundaries for step in (-1, 0, 1) if 0 <= b + step < 1 << 128]
    for value in values:
        assert TABLE.settle(value >> 112, value >> 64 & (1 << 48) - 1, value & (1 << 64) - 1) == quantile(value)
    samples = TABLE.sample(Bits(values), len(values))
    assert samples.tolist() == [quantile(value) for value in values]
    for i, boundary in enumerate(TABLE.boundaries):
        assert quantile(boundary) > i - TABLE.bound
        assert boundary == 0 or quantile(boundary - 1) <= i - TABLE.bound


def test_numbers_that_agree_with_a_boundary_in_64_bits_are_settled_by_the_last_64():
    values = []
    for boundary in TABLE.boundaries:
        high = boundary >> 64 << 64
        values += [high, high | (1 << 64) - 1, high | (boundary & (1 << 64) - 1) >> 1, high - (1 if high else 0)]
    samples = TABLE.sample(Bits(values), len(values))
    assert samples.tolist() == [quantile(value) for value in values]


def test_the_extreme_numbers_give_the_extreme_samples():
    # The lowest two boundaries are 0: those samples have a probability below 2^-128, which rounding down makes 0.
    assert TABLE.bound == ceil(13.5 * 4.5)
    assert TABLE.sample(Bits([0, (1 << 128) - 1]), 2).tolist() == [quantile(0), TABLE.bound]
    assert quantile(0) == -TABLE.bound + TABLE.boundaries.count(0)


@pytest.mark.parametrize(("numerator", "denominator"), SIGMAS)
def test_sample_is_settle_on_every_one_of_its_samples(numerator, denominator):
    table = gaussian_table(numerator, denominator)
    count = 30_001
    samples = table.sample(KeyStream(KEY), count)
    stream = KeyStream(KEY)
    words = stream.words16((count + 3) // 4 * 4)[:count]
    undecided = np.flatnonzero(table.table[words] == UNDECIDED)
    high, low = stream.words64(undecided.size), stream.words64(undecided.size)
    assert undecided.size > 0
    expected = [bisect_right(table.boundaries, int(word) << 112) - table.bound for word in words]
    for i, h, lo in zip(undecided, high, low, strict=True):
        expected[i] = table.settle(int(words[i]), int(h), int(lo))
    assert samples.dtype == np.int8
    assert samples.tolist() == expected


@given(st.integers(0, 5000), st.binary(min_size=32, max_size=32))
def test_sample_reads_eight_bytes_for_four_and_sixteen_for_each_open_one(count, key):
    stream, copy = KeyStream(key), KeyStream(key)
    assert len(TABLE.sample(stream, count)) == count
    padded = (count + 3) // 4 * 4
    opened = int((TABLE.table[copy.words16(padded)[:count]] == UNDECIDED).sum())
    copy.read(16 * opened)
    assert stream.read(8).tobytes() == copy.read(8).tobytes()


def test_samples_pass_a_chi_square_test_against_exact_probabilities():
    count = 1 << 20
    samples = TABLE.sample(KeyStream(KEY), count)
    exact = exact_probabilities(9, 2)
    inner = [k for k in exact if exact[k] * count >= 20]
    tail = 1 - sum(exact[k] for k in inner)
    expected = np.array([float(exact[k]) for k in inner] + [float(tail)]) * count
    observed = [int((samples == k).sum()) for k in inner]
    observed.append(count - sum(observed))
    statistic = float(((np.array(observed) - expected) ** 2 / expected).sum())
    freedom = len(inner)
    assert abs(statistic - freedom) < 4 * sqrt(2 * freedom)


@pytest.mark.parametrize(("numerator", "denominator"), SIGMAS)
def test_mean_variance_and_reach_are_those_of_the_distribution(numerator, denominator):
    count = 1 << 18
    table = gaussian_table(numerator, denominator)
    samples = table.sample(KeyStream(KEY, 5), count).astype(np.float64)
    exact = exact_probabilities(numerator, denominator)
    variance = float(sum(p * k * k for k, p in exact.items()))
    fourth = float(sum(p * k**4 for k, p in exact.items()))
    assert abs(samples.mean()) < 5 * sqrt(variance / count)
    assert abs((samples**2).mean() - variance) < 5 * sqrt((fourth - variance**2) / count)
    assert np.abs(samples).max() <= table.bound
    # 2^18 draws reach beyond 3.5 sigma, unless something cuts the tail.
    assert np.abs(samples).max() >= 3.5 * numerator / denominator - 1


def test_streams_of_neighbouring_indices_give_uncorrelated_samples():
    count = 1 << 17
    first, second = (TABLE.sample(KeyStream(KEY, index), count).astype(np.float64) for index in (0, 1))
    for shift in (0, 1, 4):
        correlation = (first * np.roll(second, shift)).mean() / 4.5**2
        assert abs(correlation) < 5 / sqrt(count)
    for shift in (1, 2, 4):
        assert abs((first * np.roll(first, shift)).mean() / 4.5**2) < 5 / sqrt(count)


def test_the_same_key_gives_the_same_samples():
    samples = [GaussianTable(9, 2).sample(KeyStream(KEY), 1000).tolist() for _ in range(2)]
    assert samples[0] == samples[1] != TABLE.sample(KeyStream(bytes(32)), 1000).tolist()


@given(st.integers(1, 1000))
def test_equal_ratios_give_equal_tables(factor):
    if factor <= 20:  # a table costs milliseconds
        assert GaussianTable(3 * factor, 2 * factor).boundaries == GaussianTable(3, 2).boundaries


@pytest.mark.parametrize(("numerator", "denominator"), [(0, 1), (-9, 2), (9, -2), (-9, -2), (9, 0), (91, 10), (10, 1)])
def test_a_sigma_outside_the_range_is_refused(numerator, denominator):
    with pytest.raises(ParameterError, match="sigma"):
        GaussianTable(numerator, denominator)


def test_the_known_answers_of_the_protocol_document():
    boundaries = b"".join(boundary.to_bytes(16, "little") for boundary in TABLE.boundaries)
    assert len(TABLE.boundaries) == 122
    assert sha256(boundaries).hexdigest() == "91870222f672eca0596974a460acc186b3bbe6a6dbf529585c5e46a9454aa987"
    assert TABLE.boundaries[60] == 0x74A6FDB013761516A3A5AC4E33B3C0CE
    assert TABLE.boundaries[61] == 0x8B59024FEC89EAE95C5A53B1CC4C3F31
    assert int((TABLE.table == UNDECIDED).sum()) == 40
    samples = TABLE.sample(KeyStream(bytes(range(32))), 2048)
    assert samples[:16].tolist() == [10, 0, 3, -1, 3, 0, 5, -3, -4, -1, 5, 4, 4, -2, 6, 1]
    assert samples[[121, 243, 1036, 1259]].tolist() == [17, 18, 2, -2]
    assert sha256(samples.tobytes()).hexdigest() == "206ce3f287d54b84efe697d72024f10ba1f89c971376b0190f49ed7d554eedf2"
