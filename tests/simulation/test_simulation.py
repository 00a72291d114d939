"""A whole round under faults: the sum that comes out is exact, or none does."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulator import (
    COORDINATOR,
    DEVICE_LIES,
    MEMBER_LIES,
    Absent,
    Corrupt,
    Delay,
    Drop,
    Duplicate,
    Fault,
    Lie,
    Party,
    Restart,
    Rollback,
    prepared,
    simulate,
)

from edge_sdk.errors import RoundAborted
from edge_sdk.protocol.aggregator import Done

FLEETS = {
    "everyone": {"devices": 5},
    "helpers": {"devices": 8, "committee": "helpers", "helpers": 3},
    "drawn": {"devices": 40, "committee": "drawn", "drawn": 20, "contributors": range(7)},
    "two groups": {"devices": 8, "committee": "helpers", "helpers": 4, "groups": 2},
}
SMALL = ("everyone", "helpers", "two groups")


def corrupt_members_allowed(fleet: str) -> int:
    arguments = FLEETS[fleet]
    names = ("devices", "committee", "helpers", "drawn", "groups", "dimension")
    defaults = {"committee": "everyone", "helpers": 0, "drawn": None, "groups": 1, "dimension": 3}
    _, round_ = prepared(*(({**defaults, **arguments})[name] for name in names))
    return round_.thresholds.corrupt


@pytest.mark.parametrize("fleet", FLEETS)
def test_without_faults_every_group_opens_exactly(fleet):
    outcome = simulate(**FLEETS[fleet])
    assert isinstance(outcome.result, Done)
    assert outcome.exact
    assert outcome.result.reasons == {}
    arguments = FLEETS[fleet]
    everyone = sorted(sender for senders in outcome.contributors.values() for sender in senders)
    assert everyone == list(arguments.get("contributors", range(arguments["devices"])))


def test_a_simulation_follows_from_its_arguments():
    faults = [Drop(3), Delay(9, 4), Corrupt(20), Restart(31)]
    first, second = simulate(faults=faults), simulate(faults=faults)
    assert (first.messages, first.seals) == (second.messages, second.seals)
    assert first.contributors == second.contributors
    assert first.opened == second.opened


ONE_FAULT = {
    "dropped": lambda i: Drop(i),
    "doubled": lambda i: Duplicate(i, later=2),
    "overtaken": lambda i: Delay(i, by=5),
    "corrupted": lambda i: Corrupt(i, byte=7919 * i, flip=1 << i % 8),
    "crash before storing": lambda i: Restart(i, stored=False),
    "crash before answering": lambda i: Restart(i, stored=True),
}


@pytest.mark.parametrize("kind", ONE_FAULT)
def test_one_fault_anywhere_changes_nothing(kind):
    """Whatever message is struck, the coordinator's patience repairs it: all contribute and the sum is exact."""
    clean = simulate(devices=4, dimension=1, patience=2)
    for i in range(clean.messages):
        outcome = simulate(devices=4, dimension=1, patience=2, faults=[ONE_FAULT[kind](i)])
        assert outcome.exact, i
        assert outcome.contributors == clean.contributors, i
        assert outcome.opened == {0}, i
        assert outcome.receipted == {0, 1, 2, 3}, i


@pytest.mark.parametrize("states", [1, 2, 5])
def test_one_rollback_anywhere_is_exact_or_aborts_and_gives_one_set_at_most(states):
    """c = 1: whoever is rolled back, a device, a member or the coordinator, is one party only."""
    clean = simulate(devices=4, dimension=1, patience=2)
    opened = 0
    for i in range(clean.messages):
        outcome = simulate(devices=4, dimension=1, patience=2, faults=[Rollback(i, states)])
        assert outcome.exact, i
        assert outcome.sets_released() <= 1, i
        opened += len(outcome.opened)
    assert opened, "some rollbacks are repaired"


messages = st.integers(0, 140)
benign = st.one_of(
    st.builds(Drop, messages),
    st.builds(Duplicate, messages, st.integers(0, 20)),
    st.builds(Delay, messages, st.integers(1, 30)),
    st.builds(Corrupt, messages, st.integers(0, 20_000), st.integers(1, 255)),
    st.builds(Restart, messages, st.booleans()),
    st.builds(
        Absent,
        st.tuples(st.just("member"), st.integers(1, 5)) | st.tuples(st.just("device"), st.integers(0, 7)),
        st.sampled_from(["OPEN", "COLLECT", "SEALED", "CERTIFIED", "RELEASED"]),
    ),
)


@given(
    st.sampled_from(SMALL),
    st.lists(benign, max_size=12),
    st.lists(st.builds(Lie, st.tuples(st.just("device"), st.integers(0, 7)), st.sampled_from(DEVICE_LIES)), max_size=2),
    st.permutations([1, 2, 3]),
    st.lists(st.sampled_from(MEMBER_LIES), max_size=2),
    st.integers(1, 3),
)
@settings(max_examples=120)
def test_exact_sum_or_abort(fleet, faults, device_lies, member_order, member_lies, patience):
    """Never a wrong sum, whatever the network does and up to c members and any devices that lie."""
    allowed = corrupt_members_allowed(fleet)
    lies = [Lie(("member", n), kind) for n, kind in zip(member_order[:allowed], member_lies, strict=False)]
    outcome = simulate(**FLEETS[fleet], faults=faults, lies=[*device_lies, *lies], patience=patience)
    assert outcome.exact
    assert outcome.sets_released(besides={lie.party[1] for lie in lies}) <= 1


@given(
    st.lists(st.builds(Rollback, messages, st.integers(1, 12)), min_size=1, max_size=3),
    st.lists(benign, max_size=8),
    st.integers(1, 3),
)
@settings(max_examples=60)
def test_exact_sum_or_abort_with_rolled_back_parties(rollbacks, faults, patience):
    """Rolled-back members may exceed c = 1 here: then two sets may be certified, but a sum is still never wrong."""
    outcome = simulate(devices=6, faults=[*rollbacks, *faults], patience=patience)
    assert outcome.exact
    if sum(role == "member" for role, _ in outcome.rolled_back) <= 1:
        assert outcome.sets_released() <= 1


def test_devices_whose_receipts_are_lost_until_the_seal_are_given_them_afterwards():
    lost = [Absent(("device", index), "COLLECT") for index in range(5)]
    outcome = simulate(devices=5, faults=lost)
    assert outcome.opened == {0}
    assert outcome.receipted == {0, 1, 2, 3, 4}


@given(st.sampled_from(SMALL), st.data())
@settings(max_examples=30)
def test_devices_that_do_not_come_are_not_in_the_sum_and_the_others_are(fleet, data):
    arguments = FLEETS[fleet]
    there = sorted(data.draw(st.sets(st.integers(0, arguments["devices"] - 1))))
    outcome = simulate(**arguments, contributors=there)
    assert outcome.exact
    sealed = {sender for senders in outcome.contributors.values() for sender in senders}
    assert sealed <= set(there)
    if arguments.get("groups", 1) == 1:
        assert (outcome.opened == {0}) == (len(there) >= 3)
        assert sealed == (set(there) if len(there) >= 3 else set())


def absences(members: int, phases: tuple[str, ...]) -> list[Fault]:
    parties: list[Party] = [("member", n) for n in range(1, members + 1)]
    return [Absent(party, phase) for party in parties for phase in phases]


@pytest.mark.parametrize(
    ("fleet", "quorum", "answers"), [("everyone", 4, 2), ("helpers", 3, 2), ("two groups", 3, 2), ("drawn", 0, 0)]
)
def test_dropouts_at_every_step_are_tolerated_up_to_the_threshold_and_not_beyond(fleet, quorum, answers):
    arguments = FLEETS[fleet]
    m = {"everyone": 5, "helpers": 3, "two groups": 4, "drawn": 20}[fleet]
    if fleet == "drawn":
        fleet_of, round_ = prepared(40, "drawn", 0, 20, 1, 3)
        assert len(fleet_of.committee) == m
        quorum, answers = round_.thresholds.quorum, round_.thresholds.answers
    every = ("OPEN", "COLLECT", "SEALED", "CERTIFIED", "RELEASED")
    before_release = ("OPEN", "COLLECT", "SEALED")
    all_groups = frozenset(range(arguments.get("groups", 1)))

    # absent throughout: the certificate needs Q
    assert simulate(**arguments, faults=absences(m - max(quorum, answers), every)).opened == all_groups
    outcome = simulate(**arguments, faults=absences(m - quorum + 1, every))
    assert isinstance(outcome.result, RoundAborted)
    assert not outcome.released, "an abort before the certificate reveals nothing"
    # there to sign, absent to release: the opening needs R
    assert simulate(**arguments, faults=absences(m - answers, ("CERTIFIED", "RELEASED"))).opened == all_groups
    short = simulate(**arguments, faults=absences(m - answers + 1, ("CERTIFIED", "RELEASED")))
    assert isinstance(short.result, Done)
    assert not short.opened
    assert all(f"{answers - 1} members answered, {answers} needed" in r for r in short.result.reasons.values())
    # late to sign, in time to release: whoever slept until the certificate catches up with it
    assert simulate(**arguments, faults=absences(m - quorum, before_release)).opened == all_groups


@pytest.mark.parametrize("kind", DEVICE_LIES)
def test_a_lying_device_spoils_its_own_group_at_most(kind):
    lie = Lie(("device", 3), kind)
    outcome = simulate(**FLEETS["two groups"], lies=[lie])
    assert outcome.exact
    fleet, round_ = prepared(8, "helpers", 4, None, 2, 3)
    own = round_.epoch.group_of(3, 2)
    assert 1 - own in outcome.opened
    assert len(fleet.committee) == 4


@pytest.mark.parametrize("kind", MEMBER_LIES)
@pytest.mark.parametrize("fleet", SMALL)
def test_a_lying_member_within_the_unique_bound_stops_nothing(fleet, kind):
    outcome = simulate(**FLEETS[fleet], lies=[Lie(("member", 2), kind)])
    assert outcome.exact
    needs_all = fleet == "helpers" and kind in ("silent", "complains about all")  # Q = 3 of 3
    assert bool(outcome.opened) != needs_all


def test_a_coordinator_rolled_back_to_before_the_seal_never_gets_two_sets_out():
    """It has lost contributions that it sealed, the round has closed, and it seals what is left."""
    clean = simulate(devices=5, patience=2)
    resealed = 0
    for i in range(clean.messages // 2, clean.messages):
        for states in (2, 5):
            outcome = simulate(devices=5, faults=[Rollback(i, states)], patience=2)
            assert outcome.exact, i
            assert outcome.sets_released() <= 1, i
            resealed += len(outcome.seals) > 1 and COORDINATOR in outcome.rolled_back
    assert resealed, "some rollback made it seal another set"
