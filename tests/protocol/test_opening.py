"""`open_group`: each of its checks refuses what it is there for, at its exact bound, and nothing else."""

from __future__ import annotations

from math import isqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from stage import integers_of, seed, staged

from edge_sdk.crypto import masks
from edge_sdk.crypto.stream import KeyStream
from edge_sdk.errors import ParameterError, RoundAborted
from edge_sdk.protocol import reference
from edge_sdk.protocol.opening import GroupSum, _within, open_group
from edge_sdk.protocol.rounds import Round

DIMENSION, SENDERS = 2060, 6
"""Two blocks: the payload ends in the second."""


class Summed:
    """What the coordinator holds at the opening of six honest contributions, and what is behind it."""

    def __init__(self, round_: Round) -> None:
        self.round = round_
        self.total = np.zeros((self.round.layout.blocks, 2048), dtype=np.uint32)
        self.secret = np.zeros(2048, dtype=np.int64)
        for i in range(SENDERS):
            own = seed("summed", i)
            message, secret = (
                self.round.layout.encode(integers_of(i, DIMENSION)),
                masks.expand_secret(own, self.round.tid),
            )
            masks.add_mask(message, secret, own, self.round.tid)
            self.total += message
            self.secret += secret
        self.answers = self.answers_for(self.secret)
        modulus = 1 << self.round.layout.modulus_bits
        self.expected = (sum(integers_of(i, DIMENSION) for i in range(SENDERS)) % modulus).astype(np.uint32)

    def answers_for(self, secret: NDArray[np.int64]) -> dict[int, NDArray[np.int64]]:
        shares = self.round.thresholds.sharing.share(secret, KeyStream(seed("opening shares")))
        return {n: shares[n - 1] for n in range(1, len(shares) + 1)}

    def open(self, total: NDArray[np.uint32] | None = None, answers: dict | None = None, n: int = SENDERS) -> GroupSum:
        return open_group(
            self.round, n, self.total if total is None else total, self.answers if answers is None else answers
        )

    def noise(self) -> NDArray[np.int64]:
        """The summed error of every coefficient."""
        total = self.total.copy()
        masks.remove_mask(total, self.secret, self.round.tid)
        delta = 1 << self.round.layout.delta_bits
        return (total.astype(np.int64) + delta // 2) % delta - delta // 2


SUMMED = Summed(staged(6, dimension=DIMENSION, senders=()).round)
BITS = SUMMED.round.layout.delta_bits


def test_six_honest_contributions_open_to_their_sum():
    opened = SUMMED.open()
    np.testing.assert_array_equal(opened.values, SUMMED.expected)
    assert opened.contributors == SENDERS
    assert opened.disagreeing == frozenset()
    assert abs(opened.residual_variance - 1) < 0.1
    assert opened.values.dtype == np.uint32


def test_the_callers_masked_sum_is_kept():
    before = SUMMED.total.copy()
    SUMMED.open()
    np.testing.assert_array_equal(SUMMED.total, before)
    with pytest.raises(RoundAborted):
        SUMMED.open(n=5)
    np.testing.assert_array_equal(SUMMED.total, before)


def test_signed_values_are_centred():
    stage_bits = SUMMED.round.layout.modulus_bits
    total = sum(integers_of(i, DIMENSION) for i in range(SENDERS))
    np.testing.assert_array_equal(SUMMED.open().signed(stage_bits), total)
    edges = GroupSum(np.array([0, 1, 7, 8, 15], dtype=np.uint32), 2, 1.0, frozenset())
    assert edges.signed(4).tolist() == [0, 1, 7, -8, -1]


@pytest.mark.parametrize("claimed", [0, 1, 2, 5, 7, 12])
def test_another_number_of_contributors_than_the_vectors_hold_does_not_open(claimed):
    with pytest.raises(RoundAborted, match="no sum passes the checks"):
        SUMMED.open(n=claimed)


def shifted(position: int, shift: int) -> NDArray[np.uint32]:
    """The masked sum with `shift` added to one coefficient modulo 2^32."""
    total = SUMMED.total.copy()
    total.reshape(-1)[position : position + 1] += np.array([shift % (1 << 32)], dtype=np.uint32)
    return total


@given(
    st.integers(0, 4095),
    st.one_of(st.integers(0, (1 << 32) - 1), st.integers(-200, 200), st.integers(-9, 9).map(lambda k: k << BITS)),
)
@settings(max_examples=200)
def test_one_changed_coefficient_opens_only_as_another_value_of_the_payload(position, shift):
    """Whatever is added to one coefficient: the residual shows it, unless it comes near a multiple of Delta, and then
    it is another input in the payload, and refused in the count and in the pads."""
    modulus = 1 << 32 - BITS
    steps, residual = divmod(int(SUMMED.noise().reshape(-1)[position]) + shift + (1 << BITS - 1), 1 << BITS)
    residual -= 1 << BITS - 1
    accepted = _within(abs(residual), SENDERS) and (position < DIMENSION or steps % modulus == 0)
    if not accepted:
        with pytest.raises(RoundAborted, match="no sum passes the checks"):
            SUMMED.open(shifted(position, shift))
        return
    expected = SUMMED.expected.copy()
    if position < DIMENSION:
        expected[position] = (int(expected[position]) + steps) % modulus
    np.testing.assert_array_equal(SUMMED.open(shifted(position, shift)).values, expected)


@pytest.mark.parametrize("position", [DIMENSION + 1, DIMENSION + 2, 4094, 4095])
@pytest.mark.parametrize("value", [1, 2, -1])
def test_a_pad_that_is_not_zero_is_refused(position, value):
    with pytest.raises(RoundAborted, match="the padding is not zero"):
        SUMMED.open(shifted(position, value << BITS))


@pytest.mark.parametrize("value", [-6, -1, 1])
def test_a_count_that_is_not_the_groups_is_refused(value):
    with pytest.raises(RoundAborted, match=f"the count is {6 + value}, not 6"):
        SUMMED.open(shifted(DIMENSION, value << BITS))


def test_a_residual_is_accepted_up_to_eight_deviations_and_not_beyond():
    bound = isqrt(8 * 8 * 81 * SENDERS // 4)
    assert bound == int(8 * 4.5 * SENDERS**0.5)
    noise = SUMMED.noise()
    for position in (0, 2059, 4095):
        for sign in (1, -1):
            at_bound = sign * bound - int(noise.reshape(-1)[position])
            np.testing.assert_array_equal(SUMMED.open(shifted(position, at_bound)).values, SUMMED.expected)
            with pytest.raises(RoundAborted, match="a residual is too large"):
                SUMMED.open(shifted(position, at_bound + sign))


@given(st.integers(0, 100), st.integers(1, 10_000))
def test_the_bound_is_eight_sigma_root_n_exactly(offset, contributors):
    exact = isqrt(64 * 81 * contributors // 4)  # floor of 36 sqrt(n)
    assert _within(exact, contributors)
    assert _within(max(0, exact - offset), contributors)
    assert not _within(exact + 1 + offset, contributors)


def test_a_block_whose_errors_are_too_small_or_too_large_is_refused():
    """No single coefficient is out of bounds: the block's energy is."""
    noise = SUMMED.noise()
    for block in (0, 1):
        smaller = SUMMED.total.copy()
        smaller[block] -= (noise[block] // 2).astype(np.uint32)
        larger = SUMMED.total.copy()
        larger[block] += (np.sign(noise[block]) * 4).astype(np.uint32)
        for total in (smaller, larger):
            with pytest.raises(RoundAborted, match="a block's residual variance"):
                SUMMED.open(total)


def test_a_secret_that_is_not_short_is_refused_even_if_it_unmasks():
    """A contributor's secret of 100 in every coefficient: residuals are fine, but the mask is not an RLWE mask."""
    bound = isqrt(64 * 81 * SENDERS // 4)
    for magnitude, accepted in ((bound, True), (bound + 1, False)):
        secret = SUMMED.secret.copy()
        secret[5] = magnitude
        total = SUMMED.total.copy()
        masks.remove_mask(total, SUMMED.secret - secret, SUMMED.round.tid)
        if accepted:
            np.testing.assert_array_equal(SUMMED.open(total, SUMMED.answers_for(secret)).values, SUMMED.expected)
        else:
            with pytest.raises(RoundAborted, match="the summed secret is not short"):
                SUMMED.open(total, SUMMED.answers_for(secret))


@pytest.mark.parametrize("factor", [0, 2])
def test_a_secret_whose_variance_is_not_its_contributors_is_refused_even_if_it_unmasks(factor):
    """Every coefficient is short, but together they are not the sum of six secrets of deviation 4.5."""
    secret = np.clip(SUMMED.secret * factor, -80, 80)
    total = SUMMED.total.copy()
    masks.remove_mask(total, SUMMED.secret - secret, SUMMED.round.tid)
    with pytest.raises(RoundAborted, match="the summed secret's variance is not that of its contributors' secrets"):
        SUMMED.open(total, SUMMED.answers_for(secret))


@given(st.sets(st.integers(1, 6), min_size=2), st.sets(st.integers(1, 6)), st.integers(1, 65520))
@settings(max_examples=60)
def test_whoever_answers_and_whoever_lies_the_sum_is_exact_or_there_is_none(answering, lying, shift):
    answers = {n: SUMMED.answers[n].copy() for n in answering}
    for n in lying & answering:
        answers[n][n * 31] = (answers[n][n * 31] + shift) % 65521
    honest = len(answering - lying)
    try:
        opened = SUMMED.open(answers=answers)
    except RoundAborted:
        assert honest < 2
        return
    np.testing.assert_array_equal(opened.values, SUMMED.expected)
    assert opened.disagreeing == lying & answering
    assert honest >= 2


def drawn_thirty() -> Summed:
    """The table's drawn committee: m = 30, c = 15, rho = 8, R = 23."""
    fleet = reference.make_fleet(seed("thirty"), 200, "drawn", drawn=30, corrupt=10)
    round_ = reference.open_ticket(fleet, seed("thirty"), DIMENSION, n_max=200)
    assert (round_.thresholds.members, round_.thresholds.answers) == (30, 23)
    return Summed(round_)


def test_three_wrong_answers_of_thirty_are_decoded_and_a_fourth_is_found_by_search_or_aborts():
    """floor((30 - 23) / 2) = 3. Of 2,035,800 subsets of 23 only 2,600 avoid four liars, of eight liars none."""
    summed = drawn_thirty()
    for liars in ((1,), (1, 2), (1, 2, 3), (28, 29, 30)):
        answers = {n: (values + 1) % 65521 if n in liars else values for n, values in summed.answers.items()}
        opened = summed.open(answers=answers)
        np.testing.assert_array_equal(opened.values, summed.expected)
        assert opened.disagreeing == set(liars)
    four = summed.open(answers={n: (v + n) % 65521 if n <= 4 else v for n, v in summed.answers.items()})
    np.testing.assert_array_equal(four.values, summed.expected)
    with pytest.raises(RoundAborted, match="no sum passes the checks: more than 3 answers disagree"):
        summed.open(answers={n: (v + n) % 65521 if n <= 8 else v for n, v in summed.answers.items()})


@pytest.mark.parametrize("answering", [(), (3,)])
def test_fewer_than_r_answers_open_nothing(answering):
    with pytest.raises(RoundAborted, match=f"{len(answering)} members answered, 2 needed"):
        SUMMED.open(answers={n: SUMMED.answers[n] for n in answering})


@pytest.mark.parametrize(
    "total",
    [
        np.zeros((1, 2048), np.uint32),
        np.zeros((2, 2048), np.int64),
        np.zeros(4096, np.uint32),
        np.zeros((3, 2048), np.uint32),
    ],
    ids=["one block", "int64", "flat", "three blocks"],
)
def test_a_masked_sum_of_another_shape_is_the_callers_fault(total):
    with pytest.raises(ParameterError, match=r"a masked sum is uint32 \(2, 2048\)"):
        SUMMED.open(total)


def test_the_opened_values_are_in_no_repr_and_an_abort_gives_none():
    opened = SUMMED.open()
    assert str(int(opened.values[0])) not in repr(opened)
    with pytest.raises(RoundAborted) as caught:
        SUMMED.open(shifted(4095, 1 << BITS))
    assert caught.value.args == ("no sum passes the checks: the padding is not zero",)
