"""Poisson draws and shuffles: their distributions, exactly where that can be said."""

from fractions import Fraction
from itertools import chain, permutations
from math import exp, lgamma, log, log1p, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.crypto.hashing import derive_key
from edge_sdk.crypto.stream import KeyStream
from edge_sdk.errors import ParameterError
from edge_sdk.training import sampling
from edge_sdk.training.sampling import batches_by_place, poisson_sample, shuffle, shuffled_batches, window_for
from edge_sdk.training.steps import CLIP_SLACK

SEEDS = [bytes([index]) * 32 for index in range(200)]
entropies = st.binary(min_size=32, max_size=32)


class ScriptedStream:
    """Gives chosen 64-bit words, then fails the test."""

    def __init__(self, words):
        self._words = list(words)

    def words64(self, count):
        taken, self._words = self._words[:count], self._words[count:]
        assert len(taken) == count, "more words read than expected"
        return np.array(taken, dtype=np.uint64)


def scripted(monkeypatch, words):
    monkeypatch.setattr(sampling, "_stream", lambda *arguments: ScriptedStream(words))


@pytest.mark.parametrize(
    "rate", [0.5, 1 / 3, 0.01, 2.0**-12, 1e-9, 2.0**-64, Fraction(1, 3), Fraction(2**64 - 1, 2**64)]
)
def test_an_example_is_in_for_exactly_the_words_below_rate_times_2_64(monkeypatch, rate):
    threshold = Fraction(rate) * 2**64 // 1
    scripted(monkeypatch, [0, threshold - 1, threshold, 2**64 - 1])
    assert poisson_sample(4, rate, bytes(32)).tolist() == [0, 1]
    assert 0 <= Fraction(rate) - Fraction(threshold, 2**64) < Fraction(1, 2**64)


def test_a_float_rate_above_2_to_the_minus_12_is_met_exactly():
    for rate in (np.nextafter(2.0**-12, 1), 0.1, 1 / 3, np.nextafter(1, 0)):
        assert (Fraction(float(rate)) * 2**64).denominator == 1


def test_a_rate_below_the_resolution_draws_nobody(monkeypatch):
    scripted(monkeypatch, [0, 1])
    assert poisson_sample(2, 2.0**-65, bytes(32)).size == 0


@given(st.integers(0, 300), entropies)
def test_rates_zero_and_one_are_nobody_and_everybody(size, entropy):
    assert poisson_sample(size, 0, entropy).size == 0
    assert poisson_sample(size, 1.0, entropy).tolist() == list(range(size))


@given(st.integers(0, 300), st.floats(0, 1), entropies)
def test_a_draw_is_distinct_ascending_and_repeatable(size, rate, entropy):
    drawn = poisson_sample(size, rate, entropy)
    assert drawn.dtype == np.int64
    assert all(0 <= index < size for index in drawn)
    assert (np.diff(drawn) > 0).all()
    assert np.array_equal(drawn, poisson_sample(size, rate, entropy))


def test_segments_follow_one_another_on_one_stream(monkeypatch):
    whole = poisson_sample(1000, 0.3, SEEDS[0])
    words = KeyStream(derive_key(SEEDS[0], "poisson sample")).words64(1000)
    assert np.array_equal(whole, np.flatnonzero(words < np.uint64(Fraction(0.3) * 2**64 // 1)))
    monkeypatch.setattr(sampling, "_SEGMENT", 7)
    assert np.array_equal(whole, poisson_sample(1000, 0.3, SEEDS[0]))


def test_counts_and_pairs_occur_as_often_as_independence_says():
    """Fixed entropy, so this passes or fails for good: every statistic within 4.5 of its standard deviations."""
    size, rate = 500, 0.2
    drawn = np.zeros((len(SEEDS), size))
    for row, seed in enumerate(SEEDS):
        drawn[row, poisson_sample(size, rate, seed)] = 1
    trials = drawn.size
    assert abs(drawn.sum() - trials * rate) < 4.5 * sqrt(trials * rate * (1 - rate))
    pairs = (drawn[:, :-1] * drawn[:, 1:]).sum()
    among = len(SEEDS) * (size - 1)
    assert abs(pairs - among * rate**2) < 4.5 * sqrt(among * rate**2 * (1 - rate**2) * 1.5)
    sizes = drawn.sum(1)
    assert abs(sizes.var() / (size * rate * (1 - rate)) - 1) < 4.5 * sqrt(2 / len(SEEDS))


@pytest.mark.parametrize(("size", "rate"), [(-1, 0.5), (1, -0.1), (1, 1.1), (1, float("nan")), (1, float("inf"))])
def test_a_rate_that_is_no_probability_is_refused(size, rate):
    with pytest.raises(ParameterError, match="no Poisson sample"):
        poisson_sample(size, rate, bytes(32))


draws = st.lists(st.integers(0, 400), unique=True)
widths = st.integers(1, 500) | st.just(1 << 200)


@given(draws, widths, st.integers(1, 9))
def test_batches_by_place_hold_every_drawn_example_once_and_none_of_two_windows(drawn, window, batch):
    found = [one.tolist() for one in batches_by_place(np.array(drawn, dtype=np.int64), window, batch)]
    assert list(chain.from_iterable(found)) == sorted(drawn)
    assert all(1 <= len(one) <= batch for one in found)
    assert all(one[0] // window == one[-1] // window for one in found)


@given(draws, widths, st.integers(1, 9))
def test_no_window_takes_more_batches_than_it_needs(drawn, window, batch):
    found = [int(one[0]) // window for one in batches_by_place(np.array(drawn, dtype=np.int64), window, batch)]
    inside = [index // window for index in drawn]
    assert all(found.count(place) == -(-inside.count(place) // batch) for place in inside)


@given(draws, st.integers(0, 400), widths, st.integers(1, 9))
def test_one_example_more_changes_the_batches_of_its_own_window_alone(drawn, more, window, batch):
    without = np.setdiff1d(np.array(drawn, dtype=np.int64), [more])
    both = [list(batches_by_place(indices, window, batch)) for indices in (without, np.append(without, more))]
    one, other = ([b.tolist() for b in batches if int(b[0]) // window != more // window] for batches in both)
    assert one == other


@given(st.integers(1, 1 << 16), st.floats(0, 1, exclude_min=True))
def test_a_window_has_room_for_a_batch_and_mostly_fills_one(batch, rate):
    window = window_for(batch, rate)
    assert window >= batch
    wanted = Fraction(4 * batch, 5)
    assert window == batch or wanted - 1 <= window * Fraction(rate) <= wanted


def tail(window: int, rate: float, above: int) -> float:
    """P(more than `above` of a window are drawn)."""

    def log_comb(k: int) -> float:
        return lgamma(window + 1) - lgamma(k + 1) - lgamma(window - k + 1)

    wanted = range(above + 1, window + 1)
    return sum(exp(log_comb(k) + k * log(rate) + (window - k) * log1p(-rate)) for k in wanted)


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.3, 0.79])
def test_how_often_a_window_of_batch_32_takes_a_second_run_and_a_fourth(rate):
    window = window_for(32, rate)
    assert tail(window, rate, 32) < 0.1
    assert tail(window, rate, 96) < 1e-25


@pytest.mark.parametrize("batch", [1, 8, 16, 32, 40])
@pytest.mark.parametrize("rate", [0.001, 0.01, 0.1, 0.3, 0.79, 1.0])
def test_float32_sums_of_one_window_err_by_less_than_half_of_the_clips_slack(batch, rate):
    """docs/training-graph.md section 5: at most 2 n B 2^-24 clips for n drawn, and no more than n are ever drawn."""
    drawn = int((CLIP_SLACK - 1) / 2 / (2 * batch * 2.0**-24))
    window = window_for(batch, rate)
    assert drawn >= window or tail(window, rate, drawn) < 1e-20


@pytest.mark.parametrize(("batch", "rate"), [(0, 0.5), (8, 0), (8, -0.1), (8, 1.5), (8, float("nan"))])
def test_a_window_for_no_draw_is_refused(batch, rate):
    with pytest.raises(ParameterError, match="no window"):
        window_for(batch, rate)


@pytest.mark.parametrize(("window", "batch"), [(0, 1), (-1, 1), (1, 0)])
def test_windows_and_batches_hold_something(window, batch):
    with pytest.raises(ParameterError, match=f"no batches of {batch} in windows of {window}"):
        list(batches_by_place(np.arange(3), window, batch))


@pytest.mark.parametrize("length", [0, 16, 31, 33])
def test_entropy_of_another_length_is_refused(length):
    with pytest.raises(ParameterError, match="32 bytes"):
        poisson_sample(3, 0.5, bytes(length))
    with pytest.raises(ParameterError, match="32 bytes"):
        shuffle(3, bytes(length))


@given(st.integers(0, 300), entropies, st.integers(0, 5))
def test_a_shuffle_is_a_permutation(size, entropy, epoch):
    order = shuffle(size, entropy, epoch)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(size))


def test_every_order_of_four_is_equally_likely():
    counts = dict.fromkeys(permutations(range(4)), 0)
    for seed in SEEDS:
        for epoch in range(12):
            counts[tuple(shuffle(4, seed, epoch).tolist())] += 1
    expected = len(SEEDS) * 12 / 24
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_square < 49.7  # 23 degrees of freedom, P = 0.001


def test_equal_words_are_drawn_again(monkeypatch):
    scripted(monkeypatch, [5, 5, 1, 9, 3, 6])
    assert shuffle(3, bytes(32)).tolist() == [1, 2, 0]


def test_epochs_entropies_and_purposes_are_independent():
    orders = {tuple(shuffle(50, seed, epoch).tolist()) for seed in SEEDS[:3] for epoch in range(3)}
    assert len(orders) == 9


@given(st.integers(1, 60), st.integers(1, 17), st.integers(1, 3), entropies)
def test_an_epoch_takes_every_example_once_and_only_its_last_batch_is_short(size, batch, epochs, entropy):
    batches = list(shuffled_batches(size, batch, entropy, epochs=epochs))
    per_epoch = -(-size // batch)
    assert len(batches) == epochs * per_epoch
    for epoch in range(epochs):
        mine = batches[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert all(len(indices) == batch for indices in mine[:-1])
        assert np.array_equal(np.concatenate(mine), shuffle(size, entropy, epoch))


@given(st.integers(1, 60), st.integers(1, 17), st.integers(1, 20), entropies)
def test_steps_are_the_first_ones_of_as_many_epochs_as_it_takes(size, batch, steps, entropy):
    some = list(shuffled_batches(size, batch, entropy, steps=steps))
    many = list(shuffled_batches(size, batch, entropy, epochs=steps))
    assert [indices.tolist() for indices in some] == [indices.tolist() for indices in many[:steps]]


@pytest.mark.parametrize("arguments", [{}, {"epochs": 1, "steps": 1}, {"epochs": 0}, {"steps": 0}, {"steps": -1}])
def test_how_long_to_train_must_be_said_once(arguments):
    with pytest.raises(ParameterError, match="epochs or steps"):
        next(shuffled_batches(3, 2, bytes(32), **arguments))


def test_no_examples_is_the_callers_fault():
    with pytest.raises(ParameterError, match="no examples"):
        next(shuffled_batches(0, 2, bytes(32), epochs=1))
