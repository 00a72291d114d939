"""The opened sum is the true sum modulo 2^b: over dimensions, numbers of contributors, groups, inputs and answers."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from protocol.stage import seed, send, stage_of
from simulator import prepared

from edge_sdk.crypto import masks
from edge_sdk.crypto.sealing import encapsulate
from edge_sdk.crypto.stream import KeyStream
from edge_sdk.errors import RoundAborted
from edge_sdk.protocol import aggregator, reference
from edge_sdk.protocol.opening import open_group
from edge_sdk.protocol.plan import MIN_FLEET, PAD_COEFFICIENTS, delta_bits
from edge_sdk.protocol.rounds import Round


def run(
    devices: int,
    inputs: dict[int, NDArray[np.generic]],
    dimension: int,
    *,
    committee: str = "everyone",
    helpers: int = 0,
    drawn: int | None = None,
    groups: int = 1,
    absent: tuple[int, ...] = (),
) -> tuple[Round, aggregator.Done, dict[int, list[int]]]:
    """(round, how it ended, device numbers by group) of `reference.run_round`; inputs by device number."""
    name = seed("exact", devices, committee, helpers, drawn)
    fleet = reference.make_fleet(name, devices, committee, helpers=helpers, drawn=drawn, groups=(1, groups))
    round_ = reference.open_ticket(fleet, seed("ticket"), dimension, n_max=devices, groups=groups)
    done = reference.run_round(fleet, round_, inputs, seed("run"), encapsulate, absent=absent)
    by_group: dict[int, list[int]] = {g: [] for g in range(groups)}
    for number in inputs:
        index = fleet.enrolled(fleet.devices[number]).index
        by_group[round_.epoch.group_of(index, groups)].append(number)
    return round_, done, by_group


def true_sum(round_: Round, vectors: list[NDArray[np.generic]]) -> NDArray[np.uint32]:
    total = sum(vector.astype(np.int64) for vector in vectors)
    return (total % (1 << round_.layout.modulus_bits)).astype(np.uint32)


def full_range(label: object, dimension: int) -> NDArray[np.int32]:
    """Any 32-bit patterns, as signed integers."""
    return KeyStream(seed("full range", label)).read(4 * dimension).view("<i4")


def assert_exact(round_: Round, done: aggregator.Done, by_group: dict, inputs: dict) -> None:
    for group, numbers in by_group.items():
        if len(numbers) >= round_.min_group:
            opened = done.sums[group]
            assert opened.contributors == len(numbers)
            np.testing.assert_array_equal(opened.values, true_sum(round_, [inputs[n] for n in numbers]))
        else:
            assert done.reasons[group] == "too few contributors: left out"


@given(
    st.integers(1, 5000) | st.sampled_from([2048 * k - PAD_COEFFICIENTS - 1 + j for k in (1, 2) for j in (-1, 0, 1)]),
    st.sets(st.integers(0, 6), min_size=3),
    st.sets(st.integers(1, 7), max_size=2),
    st.data(),
)
@settings(max_examples=40)
def test_any_inputs_of_any_contributors_before_any_members_sum_exactly(dimension, senders, absent, data):
    """Extreme inputs at chosen places, full-range ones elsewhere; 7 devices, of whose committee 2 may be absent."""
    inputs = {n: full_range(n, dimension).copy() for n in senders}
    for n in senders:
        place = data.draw(st.integers(0, dimension - 1))
        inputs[n][place] = data.draw(st.sampled_from([-(1 << 31), (1 << 31) - 1, -1, 0, 1]))
    assert_exact(*(result := run(7, inputs, dimension, absent=tuple(absent))), inputs)
    assert result[0].thresholds.may_be_absent == 2


@pytest.mark.parametrize(
    "dtype",
    [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64],
    ids=lambda t: t.__name__,
)
def test_every_integer_type_is_taken_modulo_the_modulus(dtype):
    limits = np.iinfo(dtype)
    vector = np.array([limits.min, limits.max, 0, 1, limits.max // 2], dtype=dtype)
    round_, done, _ = run(4, dict.fromkeys(range(4), vector), 5)
    expected = [4 * int(value) % (1 << round_.layout.modulus_bits) for value in vector]
    assert done.sums[0].values.tolist() == expected


@pytest.mark.parametrize("dimension", [100_000, 100_337, 1_000_000])
def test_large_vectors_sum_exactly(dimension):
    inputs = {n: full_range(n, dimension) for n in range(3)}
    round_, done, by_group = run(4, inputs, dimension)
    assert_exact(round_, done, by_group, inputs)
    assert done.sums[0].values.shape == (dimension,)


def test_a_thousand_contributors_sum_exactly():
    inputs = {n: full_range(n, 3) for n in range(1000)}
    round_, done, by_group = run(1000, inputs, 3, committee="helpers", helpers=3)
    assert_exact(round_, done, by_group, inputs)
    assert done.sums[0].contributors == 1000


def test_the_smallest_cohort_that_is_opened_is_h_plus_f_with_h_2():
    """Two honest devices and the one that may be corrupt. Two contributors alone abort."""
    for committee, helpers in (("everyone", 0), ("helpers", 3)):
        inputs = {n: full_range(n, 9) for n in range(3)}
        assert_exact(*run(MIN_FLEET, inputs, 9, committee=committee, helpers=helpers), inputs)
        with pytest.raises(RoundAborted, match="the round is ABORTED"):
            run(MIN_FLEET, {n: inputs[n] for n in (0, 1)}, 9, committee=committee, helpers=helpers)


@pytest.mark.parametrize("groups", range(1, 9))
def test_each_group_of_the_partition_sums_exactly_by_itself(groups):
    devices = 40
    inputs = {n: full_range(n, 7) for n in range(devices) if n % 9 != 4}
    round_, done, by_group = run(devices, inputs, 7, committee="helpers", helpers=3, groups=groups)
    assert_exact(round_, done, by_group, inputs)
    assert len(done.sums) == groups


def test_groups_that_are_too_small_are_left_out_and_the_others_sum_exactly():
    """Ten senders in four groups of at least three: one group is too small wherever the beacon puts them."""
    inputs = {n: full_range(n, 7) for n in range(10)}
    round_, done, by_group = run(40, inputs, 7, committee="helpers", helpers=3, groups=4)
    assert_exact(round_, done, by_group, inputs)
    assert done.reasons
    assert done.sums


@pytest.mark.parametrize(
    ("devices", "committee", "helpers", "drawn"),
    [(5, "everyone", 0, None), (10, "everyone", 0, None), (9, "helpers", 5, None), (40, "drawn", 0, 20)],
)
def test_as_many_absent_members_as_the_table_allows_change_nothing(devices, committee, helpers, drawn):
    inputs = {n: full_range(n, 11) for n in range(4)}
    arguments = {"committee": committee, "helpers": helpers, "drawn": drawn}
    round_, done, by_group = run(devices, inputs, 11, **arguments)
    absent = tuple(range(1, round_.thresholds.may_be_absent + 1))
    assert_exact(round_, done, by_group, inputs)
    without = run(devices, inputs, 11, **arguments, absent=absent)
    np.testing.assert_array_equal(without[1].sums[0].values, done.sums[0].values)
    with pytest.raises(RoundAborted):
        run(devices, inputs, 11, **arguments, absent=(*absent, round_.thresholds.members))


@pytest.mark.parametrize(("devices", "committee", "helpers"), [(6, "everyone", 0), (9, "helpers", 5)])
def test_any_r_members_open_the_same_sum(devices, committee, helpers):
    fleet, round_ = prepared(devices, committee, helpers, None, 1, 5)
    stage = stage_of(fleet, round_)
    vectors = {index: full_range(index, 5) for index in range(devices)}
    for index in range(devices):
        stage.take(send(fleet, round_, index, vectors[index]).contribution)
    stage.inspect()
    certified = stage.certify(stage.sealed())
    full = stage.release(certified)
    sums, expected = stage.masked_sums(full.groups), true_sum(round_, list(vectors.values()))
    answers = full.answers_of(0)
    for members in combinations(answers, round_.thresholds.answers):
        opened = open_group(round_, devices, sums[0], {n: answers[n] for n in members})
        np.testing.assert_array_equal(opened.values, expected)
    for members in combinations(answers, round_.thresholds.answers - 1):
        with pytest.raises(RoundAborted, match="members answered"):
            open_group(round_, devices, sums[0], {n: answers[n] for n in members})


@pytest.mark.parametrize("contributors", [2, 3, 100, 1000, 10_000])
def test_masks_of_many_contributors_open_exactly_without_the_rest_of_the_protocol(contributors):
    """`open_group` alone, on sums of masks."""
    fleet, round_ = prepared(10_000, "helpers", 3, None, 1, 3)
    assert len(fleet.devices) == round_.ticket.n_max == 10_000
    opened, expected = opened_from_masks(round_, contributors)
    np.testing.assert_array_equal(opened.values, expected)
    assert abs(opened.residual_variance - 1) < 0.2


@pytest.mark.parametrize("n_max", [9, 39, 159, 639])
def test_masks_open_exactly_where_the_scale_is_tightest(n_max):
    """81 sqrt(n_max) just below a power of two: one contributor more and Delta would double."""
    assert delta_bits(n_max + 1) == delta_bits(n_max) + 1
    _, round_ = prepared(n_max, "helpers", 3, None, 1, 3)
    opened, expected = opened_from_masks(round_, n_max)
    np.testing.assert_array_equal(opened.values, expected)


def opened_from_masks(round_: Round, contributors: int):
    total = np.zeros((round_.layout.blocks, 2048), dtype=np.uint32)
    secrets = np.zeros(2048, dtype=np.int64)
    expected = np.zeros(round_.ticket.dimension, dtype=np.int64)
    for i in range(contributors):
        own = seed("mask", i)
        vector = full_range(i, round_.ticket.dimension)
        message, secret = round_.layout.encode(vector), masks.expand_secret(own, round_.tid)
        masks.add_mask(message, secret, own, round_.tid)
        total += message
        secrets += secret
        expected += vector
    shares = round_.thresholds.sharing.share(secrets, KeyStream(seed("sharing")))
    answers = {n: shares[n - 1] for n in range(1, round_.thresholds.answers + 1)}
    modulus = 1 << round_.layout.modulus_bits
    return open_group(round_, contributors, total, answers), (expected % modulus).astype(np.uint32)
