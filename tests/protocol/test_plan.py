"""The numbers both sides must agree on, against the printed table and against independent arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.errors import ParameterError, PeerError
from edge_sdk.protocol.plan import (
    PAD_COEFFICIENTS,
    Layout,
    Thresholds,
    corrupt_in_committee,
    corrupt_in_group,
    delta_bits,
    thresholds,
)

BOUND = Fraction(1, 1 << 40)


def numbers(t: Thresholds) -> tuple[int, ...]:
    return t.members, t.corrupt, t.packing, t.quorum, t.answers, t.may_be_absent


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        # (kind, m, roster, corrupt devices) -> m, c, rho, Q, R, may be absent: as docs/protocol.md prints them
        (("everyone", 5, 5, 1), (5, 1, 1, 4, 2, 1)),
        (("everyone", 10, 10, 3), (10, 3, 1, 7, 4, 3)),
        (("everyone", 20, 20, 6), (20, 6, 1, 14, 7, 6)),
        (("helpers", 5, 100, 5), (5, 2, 1, 4, 3, 1)),
        (("drawn", 30, 1000, 50), (30, 15, 8, 23, 23, 7)),
        (("drawn", 30, 200, 10), (30, 15, 8, 23, 23, 7)),
        (("drawn", 30, 1 << 20, (1 << 20) // 20), (30, 15, 8, 23, 23, 7)),
    ],
)
def test_the_printed_table_of_thresholds_is_what_is_derived(row, expected):
    assert numbers(thresholds(*row)) == expected


def test_the_smallest_fleets_that_serve_themselves():
    assert numbers(thresholds("everyone", 4, 4, 1)) == (4, 1, 1, 3, 2, 1)
    assert numbers(thresholds("helpers", 3, 3, 1)) == (3, 1, 1, 3, 2, 0)


@pytest.mark.parametrize("fleet", range(1, 4))
def test_a_fleet_below_four_is_not_its_own_committee(fleet):
    with pytest.raises(
        ParameterError, match=f"a fleet of {fleet} cannot be its own committee: enrol 4, or pin helpers"
    ):
        thresholds("everyone", fleet, fleet, 1)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("everyone", 9, 10, 1), "means all 10"),
        (("everyone", 10, 10, 4), "a committee of everyone .10. tolerates 3"),
        (("everyone", 5, 5, 2), "tolerates 1"),
        (("helpers", 2, 10, 1), "pin at least 3"),
        (("helpers", 1, 10, 1), "pin at least 3"),
        (("drawn", 11, 10, 1), "cannot draw 11 members from a roster of 10"),
        (("drawn", 3, 1000, 50), "leave no quorum: enlarge the committee or pin helpers"),
        (("drawn", 10, 1000, 400), "leave no quorum"),
    ],
)
def test_numbers_without_a_safe_committee_are_refused_with_what_would_do_instead(arguments, match):
    with pytest.raises(ParameterError, match=match):
        thresholds(*arguments)


kinds = st.one_of(
    st.integers(4, 256).flatmap(lambda m: st.tuples(st.just("everyone"), st.just(m), st.just(m), st.just(1))),
    st.tuples(st.just("helpers"), st.integers(3, 256), st.integers(4, 10_000), st.integers(1, 3)),
    st.integers(20, 600).flatmap(
        lambda n: st.tuples(st.just("drawn"), st.integers(3, min(n, 128)), st.just(n), st.integers(1, n // 4))
    ),
)


@given(kinds)
def test_any_thresholds_that_are_given_are_safe(arguments):
    try:
        t = thresholds(*arguments)
    except ParameterError:
        return
    m, c, rho = t.members, t.corrupt, t.packing
    assert c >= 1
    assert 2 * t.quorum - m > c, "two quorums share an honest member"
    assert t.quorum <= m
    assert t.answers == c + rho <= m
    assert t.answers > c, "c members alone never open"
    assert rho & (rho - 1) == 0, "a power of two divides the ring's degree"
    assert t.polynomials * rho == 2048
    assert t.may_be_absent == m - max(t.quorum, t.answers) >= 0
    if arguments[0] != "helpers":
        assert t.answers <= t.quorum, "whoever certified can open"
    sharing = t.sharing
    assert (sharing.members, sharing.threshold) == (m, t.answers)


def binomial_tail(trials: int, p: Fraction, above: int) -> Fraction:
    """P(X > above), summed upwards term by term."""
    terms = (math.comb(trials, k) * p**k * (1 - p) ** (trials - k) for k in range(above + 1, trials + 1))
    return sum(terms, Fraction(0))


def hypergeometric_tail(population: int, marked: int, draws: int, above: int) -> Fraction:
    total = math.comb(population, draws)
    ways = sum(
        math.comb(marked, k) * math.comb(population - marked, draws - k)
        for k in range(above + 1, min(marked, draws) + 1)
    )
    return Fraction(ways, total)


@pytest.mark.parametrize(
    ("roster", "corrupt", "members"),
    [(40, 1, 20), (100, 5, 30), (1000, 50, 30), (1000, 50, 60), (1000, 200, 100), (10_000, 100, 30), (60, 6, 60)],
)
def test_the_committee_bound_is_the_smallest_with_a_tail_of_two_to_the_minus_40(roster, corrupt, members):
    c = corrupt_in_committee(roster, corrupt, members)
    p = Fraction(corrupt, roster)
    assert binomial_tail(members, p, c) <= BOUND
    assert c == 0 or binomial_tail(members, p, c - 1) > BOUND
    # the draw is without replacement: its own tail is within the bound too
    assert hypergeometric_tail(roster, corrupt, members, c) <= BOUND


@given(st.integers(4, 300), st.data())
def test_a_committee_drawn_without_replacement_is_within_the_binomial_bound(roster, data):
    corrupt = data.draw(st.integers(1, roster - 1))
    members = data.draw(st.integers(1, roster))
    assert hypergeometric_tail(roster, corrupt, members, corrupt_in_committee(roster, corrupt, members)) <= BOUND


def test_the_committee_bound_at_its_edges():
    assert corrupt_in_committee(100, 0, 30) == 0
    assert corrupt_in_committee(100, 100, 30) == 30
    assert corrupt_in_committee(10**6, 1, 1) == 1, "one in a million is more than 2^-40"
    assert corrupt_in_committee(1 << 41, 1, 1) == 0


@pytest.mark.parametrize(
    ("roster", "corrupt", "groups"),
    [(12, 1, 2), (40, 2, 4), (100, 5, 4), (101, 7, 8), (1000, 50, 8), (1000, 50, 64), (10_000, 100, 16), (7, 5, 3)],
)
def test_the_group_bound_is_the_smallest_whose_union_of_tails_is_two_to_the_minus_40(roster, corrupt, groups):
    f = corrupt_in_group(roster, corrupt, groups)
    largest = math.ceil(roster / groups)
    assert groups * hypergeometric_tail(roster, corrupt, largest, f) <= BOUND
    assert f == 0 or groups * hypergeometric_tail(roster, corrupt, largest, f - 1) > BOUND
    # with the true sizes, of which some are one smaller
    sizes = [roster // groups + (g < roster % groups) for g in range(groups)]
    assert sum(sizes) == roster
    assert sum(hypergeometric_tail(roster, corrupt, size, f) for size in sizes) <= BOUND


@given(st.integers(4, 400), st.data())
def test_the_group_bound_never_falls_below_what_some_group_must_hold(roster, data):
    corrupt = data.draw(st.integers(1, roster))
    groups = data.draw(st.integers(1, max(1, min(64, roster // 2))))
    f = corrupt_in_group(roster, corrupt, groups)
    assert math.ceil(corrupt / groups) <= f <= min(corrupt, math.ceil(roster / groups)) or groups == 1
    assert groups > 1 or f == corrupt


def test_the_scale_is_the_power_of_two_of_the_printed_formula():
    for n in range(2, 10_001):
        assert delta_bits(n) == math.ceil(math.log2(18 * 4.5 * math.sqrt(n)))


def test_the_scale_leaves_eight_deviations_of_residual_below_half_a_step():
    """Residuals up to 8 sigma sqrt(n) are accepted, and 9 sigma sqrt(n) is half of Delta at least."""
    for n in (2, 9, 39, 159, 639, 2556, 10_000):
        assert 8 * 4.5 * math.sqrt(n) < 2 ** delta_bits(n) / 2


@given(st.integers(1, 1 << 27), st.integers(2, 10_000))
def test_the_layout_keeps_at_least_sixteen_pads_in_as_few_blocks_as_can_be(dimension, n_max):
    layout = Layout(dimension, delta_bits(n_max))
    coefficients = 2048 * layout.blocks
    assert coefficients - dimension - 1 >= PAD_COEFFICIENTS >= 16
    assert coefficients - 2048 < dimension + 1 + PAD_COEFFICIENTS
    assert layout.masked_bytes == 4 * coefficients
    assert layout.modulus_bits + layout.delta_bits == 32


@given(st.lists(st.integers(-(1 << 63), (1 << 63) - 1), min_size=1, max_size=30), st.sampled_from([7, 13]))
def test_an_encoded_vector_is_the_input_modulo_2_to_the_b_then_a_one_then_zeros(values, bits):
    layout = Layout(len(values), bits)
    flat = layout.encode(np.array(values, dtype=np.int64)).reshape(-1)
    assert [int(v) >> bits for v in flat[: len(values)]] == [v % (1 << 32 - bits) for v in values]
    assert not (flat & np.uint32((1 << bits) - 1)).any()
    assert flat[len(values)] == 1 << bits
    assert not flat[len(values) + 1 :].any()


def test_encoding_leaves_the_input_as_it_was():
    integers = np.arange(5, dtype=np.uint32)
    Layout(5, 8).encode(integers)
    assert integers.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "integers",
    [np.zeros(4, np.int32), np.zeros(6, np.int32), np.zeros((5, 1), np.int32), np.zeros(5), np.zeros(5, bool)],
    ids=["short", "long", "two axes", "floats", "booleans"],
)
def test_another_shape_or_type_is_the_callers_fault(integers):
    with pytest.raises(ParameterError, match=r"a contribution is \(5,\) integers, not"):
        Layout(5, 8).encode(integers)


@pytest.mark.parametrize("length", [0, 1, 8191, 8193, 16384])
def test_a_masked_vector_of_another_length_is_the_peers_fault(length):
    with pytest.raises(PeerError, match=f"masked vector: {length} bytes instead of 8192"):
        Layout(5, 8).from_bytes(bytes(length))
