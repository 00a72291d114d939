"""The noise is the discrete Gaussian at any sigma, the same for the same stream, exact where float64 cannot tell."""

from decimal import Decimal, localcontext
from hashlib import sha256
from itertools import pairwise
from math import erfc, exp, sqrt

import numpy as np
import pytest

from edge_sdk.crypto.stream import KeyStream
from edge_sdk.errors import ParameterError
from edge_sdk.privacy import noise
from edge_sdk.privacy.noise import MAX_SIGMA, NoiseSampler, noise_sampler

KEY = b"a fixed key of thirty-two bytes."
SIGMAS = [(1, 2), (1, 1), (2, 1), (9, 1), (901, 100), (12, 1), (16, 1), (63, 2), (32, 1), (33, 1), (100, 1), (150, 1)]
LARGE = [(1000, 1), (4096, 1), (12345678, 1000), (100_000, 1)]
BINNED = [(901, 100), (12, 1), (31, 2), (32, 1), (100, 1)]


def draw(numerator: int, denominator: int, count: int, index: int = 0) -> np.ndarray:
    return NoiseSampler(numerator, denominator).sample(KeyStream(KEY, index), count)


def exact_probabilities(numerator: int, denominator: int, reach: int) -> dict[int, Decimal]:
    """P(k) for |k| <= reach to 60 digits, from the definition alone."""
    with localcontext() as context:
        context.prec = 60
        exponent = Decimal(denominator**2) / Decimal(2 * numerator**2)
        weights = [(-k * k * exponent).exp() for k in range(reach + 1)]
        total = 2 * sum(weights) - weights[0]
        return {k: weights[abs(k)] / total for k in range(-reach, reach + 1)}


def chi_square_z(observed: np.ndarray, expected: np.ndarray) -> float:
    """How many standard deviations chi-square lies above its mean; cells with little mass are pooled into one."""
    rare = expected < 20
    seen = np.append(observed[~rare], observed[rare].sum())
    due = np.append(expected[~rare], expected[rare].sum())
    if due[-1] == 0:
        assert seen[-1] == 0, "values where there should be none"
        seen, due = seen[:-1], due[:-1]
    freedom = len(due) - 1
    return float(((seen - due) ** 2 / due).sum() - freedom) / sqrt(2 * freedom)


@pytest.mark.parametrize(("numerator", "denominator"), SIGMAS)
def test_every_value_comes_as_often_as_the_definition_says(numerator, denominator):
    count = 400_000
    samples = draw(numerator, denominator, count)
    reach = max(15 * numerator // denominator, 8)
    expected = np.array([float(p) for p in exact_probabilities(numerator, denominator, reach).values()]) * count
    assert np.abs(samples).max() <= reach
    observed = np.bincount(samples + reach, minlength=2 * reach + 1)
    assert abs(chi_square_z(observed, expected)) < 5


@pytest.mark.parametrize(("numerator", "denominator"), LARGE)
def test_large_sigmas_fill_cells_and_residues_as_the_definition_says(numerator, denominator):
    """Cells of width / 8 cut every bin in eight; residues modulo 16 see the lowest bits."""
    count, sigma = 1_000_000, numerator / denominator
    sampler = noise_sampler(numerator, denominator)
    samples = sampler.sample(KeyStream(KEY), count)
    reach = int(8 * sigma)
    x = np.arange(-reach, reach + 1)
    density = np.exp(-(x.astype(float) ** 2) / (2 * sigma**2))
    density /= density.sum()
    kept = samples[np.abs(samples) <= reach]
    assert len(kept) == count
    cell = max(1, (1 << sampler.width_bits) // 8)
    expected = np.bincount((x + reach) // cell, weights=density) * count
    observed = np.bincount((kept + reach) // cell, minlength=len(expected))
    assert abs(chi_square_z(observed, expected)) < 5
    residues = np.bincount(samples & 15, minlength=16)
    assert abs(chi_square_z(residues, np.full(16, count / 16))) < 5


@pytest.mark.parametrize(("numerator", "denominator"), [*SIGMAS, *LARGE, (MAX_SIGMA, 1)])
def test_moments_and_tails(numerator, denominator):
    count, sigma = 400_000, numerator / denominator
    samples = draw(numerator, denominator, count, index=1).astype(float)
    if sigma >= 1:  # below, the discrete Gaussian's own variance is less than sigma^2
        variance, fourth = sigma**2, 3 * sigma**4
    else:
        exact = exact_probabilities(numerator, denominator, 20)
        variance, fourth = (float(sum(k**power * p for k, p in exact.items())) for power in (2, 4))
    assert abs(samples.mean()) < 5 * sqrt(variance / count)
    assert abs((samples**2).mean() - variance) < 5 * sqrt((fourth - variance**2) / count)
    assert abs((samples**3).mean()) < 5 * sqrt(15 * max(variance, sigma**2) ** 3 / count)
    assert abs(np.corrcoef(samples[:-1], samples[1:])[0, 1]) < 5 / sqrt(count)
    if sigma > 100:
        beyond = np.count_nonzero(np.abs(samples) > 4 * sigma)
        expected = count * erfc(4 / sqrt(2))
        assert abs(beyond - expected) < 5 * sqrt(expected)


@pytest.mark.parametrize(("numerator", "denominator"), [(901, 100), (21, 2)])
def test_bin_times_place_times_coin_is_the_discrete_gaussian_to_100_bits(numerator, denominator):
    """No sampling: the bins' own table, and the exact comparison's own threshold for every value."""
    sampler = NoiseSampler(numerator, denominator)
    width = 1 << sampler.width_bits
    edges = [0, *sampler._bins.boundaries, 1 << 128]
    reach = sampler._bins.bound * width
    chances: dict[int, Decimal] = {}
    with localcontext() as context:
        context.prec = 60
        for place, (below, above) in enumerate(pairwise(edges)):
            j = place - sampler._bins.bound
            nearest = j * width if j >= 0 else -(j + 1) * width + 1
            for x in range(j * width, (j + 1) * width):
                low, high = 0, 1 << 128  # the number of coins that accept x
                while low < high:
                    middle = (low + high) // 2
                    low, high = (middle + 1, high) if sampler.accepts(x, nearest, middle) else (low, middle)
                chances[x] = Decimal(above - below) * low / (1 << 256)
        total = sum(chances.values())
        exact = exact_probabilities(numerator, denominator, 2 * reach)
        for x, chance in chances.items():
            assert abs(chance / total - exact[x]) < Decimal(2) ** -100, x


class Chosen:
    """A stream whose places and coins are given."""

    def __init__(self, places, coins, low=0):
        self.places, self.coins, self.low, self.later = places, coins, low, []

    def read(self, count):
        assert count == 4 * len(self.places)
        return np.array(self.places, dtype="<u4").view(np.uint8)

    def words64(self, count):
        if self.coins is None:
            self.later.append(count)
            return np.full(count, self.low, dtype="<u8")
        coins, self.coins = self.coins, None
        return np.array(coins, dtype="<u8")


def with_bins(numerator, denominator, bins):
    sampler = NoiseSampler(numerator, denominator)
    sampler._bins = type("Bins", (), {"sample": lambda self, stream, count: np.array(bins, dtype=np.int8)})()
    return sampler


@pytest.mark.parametrize(("numerator", "denominator"), [(12, 1), (100, 1), (100_000, 1), (MAX_SIGMA, 1)])
def test_a_bin_holds_its_own_integers_and_no_others_on_both_sides_of_zero(numerator, denominator):
    top = NoiseSampler(numerator, denominator)._bins.bound
    width = 1 << NoiseSampler(numerator, denominator).width_bits
    bins = [-top, -2, -1, 0, 1, top] * 2
    places = [0] * 6 + [width - 1] * 6
    sampler = with_bins(numerator, denominator, bins)
    got = sampler._proposals(Chosen(places, [0] * 12), 12)  # a coin of zero accepts everything
    assert got.tolist() == [j * width for j in bins[:6]] + [(j + 1) * width - 1 for j in bins[:6]]
    high_bits = [place + 5 * width for place in places]  # only the low bits name a place
    assert sampler._proposals(Chosen(high_bits, [0] * 12), 12).tolist() == got.tolist()


def test_the_end_of_a_bin_nearer_to_zero_is_always_kept_and_the_others_not_always():
    sampler = with_bins(100, 1, [-3, -1, 0, 2] * 2)
    width = 1 << sampler.width_bits
    near = [width - 1, width - 1, 0, 0]
    far = [0, 0, width - 1, width - 1]
    stream = Chosen(near + far, [(1 << 64) - 1] * 8)
    assert sampler._proposals(stream, 8).tolist() == [-2 * width - 1, -1, 0, 2 * width]


@pytest.mark.parametrize(("numerator", "denominator"), BINNED)
def test_the_bins_are_between_an_eighth_and_a_quarter_of_sigma(numerator, denominator):
    width = 1 << NoiseSampler(numerator, denominator).width_bits
    assert numerator < 8 * width * denominator
    assert 4 * width * denominator <= numerator


@pytest.mark.parametrize(("numerator", "denominator"), [*BINNED, (100_000, 1), (MAX_SIGMA, 1), (123456789, 1000)])
def test_float64_and_60_digits_accept_the_same(monkeypatch, numerator, denominator):
    sampler = noise_sampler(numerator, denominator)
    quick = sampler._proposals(KeyStream(KEY, 2), 4000)
    monkeypatch.setattr(noise, "_MARGIN", 2.0)  # every coin is unclear
    assert np.array_equal(sampler._proposals(KeyStream(KEY, 2), 4000), quick)
    assert 0.85 * 4000 < len(quick) < 4000


@pytest.mark.parametrize(("numerator", "denominator"), [(12, 1), (100_000, 1)])
def test_a_coin_next_to_the_threshold_is_settled_by_the_exact_comparison(numerator, denominator):
    """The threshold's first 64 bits are the coin: its next 64 bits, zero here, decide. Float64 is not asked within
    2^-50 of it, where its own errors could be, and is asked at 2^-42."""
    sampler = with_bins(numerator, denominator, [1] * 7)
    width = 1 << sampler.width_bits
    x = 2 * width - 1
    with localcontext() as context:
        context.prec = 60
        exponent = Decimal((width * width - x * x) * denominator**2) / (2 * numerator**2)
        threshold = int(exponent.exp() * (1 << 128))
    top = threshold >> 64
    offsets = (-(1 << 22), -(1 << 14), -1, 0, 1, 1 << 14, 1 << 22)
    stream = Chosen([width - 1] * 7, [top + offset for offset in offsets])
    assert sampler._proposals(stream, 7).tolist() == [x] * 4  # up to the threshold itself
    assert stream.later == [5]
    low = threshold & ((1 << 64) - 1)
    for more, kept in [(low - 1, 1), (low + 1, 0)]:  # the first 64 bits agree with the threshold
        assert len(with_bins(numerator, denominator, [1])._proposals(Chosen([width - 1], [top], more), 1)) == kept
    assert sampler.accepts(x, width, threshold)
    assert not sampler.accepts(x, width, threshold + 1)


def test_acceptance_stays_within_the_margin_of_float64():
    """The largest exponent that a proposal can have is far inside what the margin was made for."""
    for numerator, denominator in [*BINNED, (MAX_SIGMA, 1)]:
        sampler = NoiseSampler(numerator, denominator)
        width, reach = 1 << sampler.width_bits, sampler._bins.bound << sampler.width_bits
        assert ((reach + width) ** 2 - reach**2) * sampler._scale < 16


@pytest.mark.parametrize(
    ("numerator", "denominator", "digest"),
    [
        (9, 2, "2e1fb90819d8e9b4"),
        (17, 2, "650b2022da60b5fa"),
        (30, 1, "720e35f359225e81"),
        (12345678, 1000, "31edc27d062b6cc1"),
        (100_000, 1, "2ff88b9e502b6450"),
    ],
)
def test_the_same_stream_gives_the_same_noise_on_every_machine(numerator, denominator, digest):
    samples = draw(numerator, denominator, 70_000)  # more than one chunk
    assert sha256(samples.astype("<i8").tobytes()).hexdigest()[:16] == digest


def test_other_entropy_gives_other_noise():
    assert not np.array_equal(draw(100, 1, 100, 0), draw(100, 1, 100, 1))


@pytest.mark.parametrize("chunk", [1, 37, 1 << 20])
def test_the_distribution_does_not_depend_on_the_chunk(monkeypatch, chunk):
    monkeypatch.setattr(noise, "_CHUNK", chunk)
    count = 20_000 if chunk > 1 else 2000
    samples = draw(12, 1, count)
    expected = np.array([float(p) for p in exact_probabilities(12, 1, 180).values()]) * count
    assert abs(chi_square_z(np.bincount(samples + 180, minlength=361), expected)) < 5


@pytest.mark.parametrize("count", [0, 1, 2, 63, 65_535, 65_536, 65_537])
@pytest.mark.parametrize(("numerator", "denominator"), [(3, 1), (40, 1)])
def test_as_many_samples_as_asked_for(numerator, denominator, count):
    samples = draw(numerator, denominator, count)
    assert samples.shape == (count,)
    assert samples.dtype == np.int64


def test_what_lies_beyond_the_bins_is_negligible():
    for numerator, denominator in [*BINNED, (100_000, 1), (MAX_SIGMA, 1)]:
        sampler = NoiseSampler(numerator, denominator)
        beyond = sampler._bins.bound << sampler.width_bits
        assert beyond * denominator >= 13.5 * numerator
    assert 2 * exp(-(13.5**2) / 2) < 2.0**-130


@pytest.mark.parametrize(("numerator", "denominator"), [(0, 1), (-1, 1), (1, 0), (1, -1), (MAX_SIGMA + 1, 1)])
def test_a_sigma_that_is_not_positive_or_too_large_is_refused(numerator, denominator):
    with pytest.raises(ParameterError, match="sigma"):
        NoiseSampler(numerator, denominator)
