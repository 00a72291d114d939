"""Plans hold what they promise, as devices, members and readers would check it; or are refused with a remedy."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.accounting import planned_rdp
from coordinator.planner import (
    MAX_WRAP,
    Cohort,
    FixedNoise,
    Target,
    Work,
    _finest,
    choose_groups,
    make_plan,
    noise_plan,
)
from edge_sdk.errors import ParameterError, PeerError
from edge_sdk.policy import Policy, default_policy, default_policy_toml, mechanism_of, sampling_of
from edge_sdk.privacy.ledger_entry import Account, Draw, Release, Send, noise_of
from edge_sdk.privacy.rdp import Budget, BudgetExceeded, Filter, Sampling, against_coordinator, against_readers
from edge_sdk.protocol import reference
from edge_sdk.protocol.plan import delta_bits

DEMO = Work("example", 2410, 0.5, 40, Sampling(example=0.3), 0.05, 2.0, examples=60)
TWENTY = Cohort(expected=20, spread=1, roster=20, honest=10, corrupt=2)
PHONES = Work("device", 100_000, 1.0, 200, Sampling(device=0.1))
THOUSANDS = Cohort(expected=500, spread=25, roster=5000, honest=100, corrupt=20)


@cache
def demo(method="rdp"):
    return make_plan(DEMO, TWENTY, Target(readers=Budget(2.5, 1e-4), method=method))


def run_filter(budget, cost, rounds):
    state = Filter.for_rounds(budget, cost)
    for _ in range(rounds):
        state = state.spend(cost)
    return state


def test_devices_with_the_targets_budget_run_the_plan_to_its_end_and_noise_is_not_wasted():
    readers, _ = Release.of(demo().mechanism, DEMO.sampling).costs("example")
    state = run_filter(Budget(2.5, 1e-4), readers, DEMO.rounds)
    assert 2.5 * 0.99 <= state.epsilon <= 2.5
    weaker = replace(demo().mechanism, sigma=demo().mechanism.sigma * 0.98)
    noise, beta = noise_of(weaker)
    with pytest.raises(BudgetExceeded):
        run_filter(Budget(2.5, 1e-4), against_readers(noise, "example", "example", DEMO.sampling, beta), DEMO.rounds)


def test_a_plan_by_pld_holds_its_target_by_pld_with_less_noise_and_says_what_ledgers_need():
    plan = demo("pld")
    assert 2.5 * 0.99 <= plan.figures.readers.epsilon <= 2.5 < plan.figures_rdp.readers.epsilon
    assert plan.mechanism.noise_multiplier < demo().mechanism.noise_multiplier
    readers, coordinator = Release.of(plan.mechanism, DEMO.sampling).costs("example")
    run_filter(Budget(plan.ledger_readers, 1e-4), readers, DEMO.rounds)
    run_filter(Budget(plan.ledger_coordinator, 1e-4), coordinator, DEMO.sends)
    with pytest.raises(BudgetExceeded):
        run_filter(Budget(plan.ledger_readers * 0.99, 1e-4), readers, DEMO.rounds)


@pytest.mark.parametrize("work", [DEMO, replace(DEMO, unit="device", sampling=Sampling())], ids=["example", "device"])
def test_a_plan_says_what_a_device_needs_that_counts_by_the_policy_that_it_joins_with(work):
    plan = make_plan(work, TWENTY, FixedNoise(4.0, 1e-4))
    policy = default_policy(["digits"])
    limits = (policy.lifetime, policy.task_limits["digits"])
    assert {budget.delta for each in limits for budget in (each.readers, each.coordinator)} == {plan.policy_delta}
    readers, coordinator = Release.of(plan.mechanism, work.sampling).costs(policy.protects)
    run_filter(Budget(plan.policy_readers, 1e-6), readers, work.rounds)
    run_filter(Budget(plan.policy_coordinator, 1e-6), coordinator, work.sends)
    with pytest.raises(BudgetExceeded):
        run_filter(Budget(plan.policy_readers * 0.99, 1e-6), readers, work.rounds)
    assert plan.ledger_readers < plan.policy_readers
    assert " at delta 1.0e-04; by the policy that a device joins with, which counts at delta 1.0e-06, " in str(plan)


# The demonstration: twenty devices, logistic regression on 8 x 8 digits, a fixed noise multiplier.
DIGITS = Work("example", 650, 0.5, 40, Sampling(example=0.3), metric_scale=0.02, loss_bound=2.5, examples=75)
CLASSROOM = Cohort(expected=19, spread=0.6, roster=20, honest=14, corrupt=2)


@cache
def digits():
    return make_plan(DIGITS, CLASSROOM, FixedNoise(3.0, 1e-4))


def test_the_demonstrations_plan_costs_readers_at_most_two_and_a_half_metrics_and_rounding_counted():
    plan = digits()
    assert plan.mechanism.length == 654
    assert plan.mechanism.noise_multiplier == pytest.approx(3.0, rel=1e-9)
    # the noise against the clip alone is larger, for metrics and rounding are inside the 3
    assert plan.mechanism.sigma * plan.mechanism.granularity / 0.5 > 3.02
    assert plan.figures.readers.method == "pld"
    assert 2.3 < plan.figures.readers.epsilon <= 2.5
    assert plan.figures.coordinator.epsilon <= 2.5  # every device is asked in every round: sampling is of examples
    assert plan.ledger_readers <= 2.75
    assert plan.wrap_probability <= MAX_WRAP
    assert 18 <= CLASSROOM.n_max <= 20


def test_a_plan_with_fixed_noise_is_the_one_that_a_target_of_its_epsilon_asks_for():
    target = Target(readers=Budget(digits().ledger_readers, 1e-4))
    again = make_plan(DIGITS, CLASSROOM, target)
    assert again.mechanism.noise_multiplier == pytest.approx(3.0, rel=3e-3)
    assert again.mechanism.granularity == pytest.approx(digits().mechanism.granularity, rel=3e-3)


def digits_round(plan):
    fleet = reference.make_fleet(bytes(32), 20, corrupt=2)
    return reference.open_ticket(
        fleet, bytes(32), plan.mechanism.length, n_max=CLASSROOM.n_max, honest=plan.cohort.honest,
        noise=noise_plan(plan), task="digits",
    )  # fmt: skip


def test_a_device_that_just_joined_and_allows_the_task_runs_the_demonstrations_plan_to_its_end():
    plan = digits()
    round_ = digits_round(plan)
    frozen = round_.epoch.frozen
    rules = Policy.from_toml(default_policy_toml(frozen.fleet, frozen.coordinator, [bytes(32)], ["digits"]))
    rules.terms("digits", bytes(32)).check(round_)
    rules.check_round(round_)
    account = Account(rules.protects, rules.lifetime, rules.task_limits)
    release = Release.of(mechanism_of(round_), sampling_of(round_))
    for number in range(DIGITS.rounds):
        tid = number.to_bytes(32, "little")
        for entry in (Draw("digits", number, tid, bytes(32), release, True, 0), Send(tid, bytes(32), 0)):
            account.check(entry)
            account.record(entry)
    nothing_allowed = Policy.from_toml(default_policy_toml(frozen.fleet, frozen.coordinator, [bytes(32)], []))
    with pytest.raises(PeerError, match="task digits is not among"):
        nothing_allowed.check_round(round_)


def test_devices_read_in_the_ticket_the_mechanism_and_the_coins_that_were_planned():
    plan = digits()
    round_ = digits_round(plan)
    assert mechanism_of(round_) == plan.mechanism
    assert sampling_of(round_) == DIGITS.sampling
    assert round_.corrupt == CLASSROOM.corrupt


@pytest.mark.parametrize(("multiplier", "groups"), [(5.0, 1), (12.0, 8), (30.0, 64)])
def test_the_fewest_groups_are_chosen_whose_sums_have_room_for_fine_steps_and_the_noise(multiplier, groups):
    crowd = Cohort(expected=9000, spread=30, roster=50_000, honest=40, corrupt=0)
    corrupt = {64: 12, 1: 100, 8: 30}
    chosen = choose_groups(PHONES, crowd, FixedNoise(multiplier, 1e-6), corrupt)
    assert chosen == make_plan(PHONES, chosen.cohort, FixedNoise(multiplier, 1e-6))
    assert (chosen.cohort.groups, chosen.cohort.corrupt) == (groups, corrupt[groups])


def test_where_no_number_of_groups_holds_each_ones_reason_is_given():
    with pytest.raises(ParameterError, match=r"one group: .*contributors.* / 2 groups: .*contributors") as refusal:
        choose_groups(PHONES, replace(THOUSANDS, honest=480), FixedNoise(2.0, 1e-6), {1: 20, 2: 14})
    assert "h + F = 500" in str(refusal.value)
    assert "h + F = 494" in str(refusal.value)


@pytest.mark.parametrize(
    ("work", "cohort", "noise", "says"),
    [
        (DIGITS, replace(CLASSROOM, honest=18), FixedNoise(3.0, 1e-4), r"h \+ F = 20 .* what would do: .*smaller h"),
        (DIGITS, CLASSROOM, FixedNoise(3.0, 1e-11), "no budget lets this plan through.* what would do: .*larger delta"),
        (DIGITS, CLASSROOM, FixedNoise(1e-3, 1e-4), "no budget lets this plan through.* what would do: more noise"),
        (replace(DIGITS, dimension=10**7), CLASSROOM, FixedNoise(9e3, 1e-4), "sums modulo .* what would do"),
    ],
)
def test_a_plan_with_fixed_noise_is_refused_for_the_same_reasons(work, cohort, noise, says):
    with pytest.raises(ParameterError, match=says):
        make_plan(work, cohort, noise)


@pytest.mark.parametrize(
    "target", [{"readers": Budget(1e6, 1e-4)}, {"coordinator": Budget(101, 1e-4)}], ids=["readers", "coordinator"]
)
def test_a_target_that_protects_nobody_is_refused_before_anything_is_searched(target):
    (observer,) = target
    with pytest.raises(ParameterError, match=rf"^{observer}: epsilon (1e\+06|101) protects nobody.*; lower it to 100"):
        Target(**target)


def test_noise_that_protects_nobody_from_readers_is_refused_before_the_figures_that_take_long(monkeypatch):
    monkeypatch.setattr("coordinator.planner.planned", lambda *_: pytest.fail("it works out figures by PLD"))
    says = r"costs epsilon 1\d\d .*against readers.*protects nobody; what would do: more noise"
    with pytest.raises(ParameterError, match=says):
        make_plan(replace(DEMO, rounds=4), TWENTY, FixedNoise(0.15, 1e-4))


def test_the_largest_target_has_a_plan(monkeypatch):
    monkeypatch.setattr("coordinator.planner.planned", planned_rdp)  # by PLD it takes a while
    plan = make_plan(replace(DEMO, rounds=1), TWENTY, Target(readers=Budget(100, 1e-4)))
    assert plan.ledger_readers == pytest.approx(100, rel=2e-3)


def test_a_plan_against_readers_may_trust_the_coordinator():
    rare = replace(PHONES, rounds=5000, sampling=Sampling(device=0.01))
    plan = make_plan(rare, THOUSANDS, Target(readers=Budget(8.0, 1e-6)))
    assert plan.ledger_readers <= 8.01 < 100 < plan.ledger_coordinator


def test_the_modulus_is_the_protocols_and_the_finest_step_that_it_holds_is_taken():
    plan = demo()
    assert plan.mechanism.modulus_bits == 32 - delta_bits(TWENTY.n_max)
    assert plan.wrap_probability <= MAX_WRAP
    assert plan.wrap_probability == plan.mechanism.wrap_probability(20, DEMO.units(20))
    finer = replace(plan.mechanism, granularity=plan.mechanism.granularity / 1.2, sigma=plan.mechanism.sigma * 1.2)
    assert finer.wrap_probability(20, DEMO.units(20)) > MAX_WRAP


def test_both_figures_are_in_the_explanation_each_under_its_name():
    plan = make_plan(PHONES, THOUSANDS, Target(readers=Budget(8.0, 1e-6)))
    text = str(plan)
    assert str(plan.figures.readers) in text
    assert str(plan.figures.coordinator) in text
    assert plan.figures.coordinator.epsilon > 2 * plan.figures.readers.epsilon
    assert "keep the noise of what it publishes at one level" in text
    assert f"{plan.mechanism.honest} devices" in text
    assert "2^20" in text


def test_a_target_against_the_coordinator_needs_more_noise_than_one_against_readers():
    readers_only = make_plan(PHONES, THOUSANDS, Target(readers=Budget(8.0, 1e-6)))
    both = make_plan(PHONES, THOUSANDS, Target(readers=Budget(8.0, 1e-6), coordinator=Budget(8.0, 1e-6)))
    assert both.mechanism.noise_multiplier > 2 * readers_only.mechanism.noise_multiplier
    assert both.figures.coordinator.epsilon <= 8.0
    noise, _ = noise_of(both.mechanism)
    cost = against_coordinator(noise, "device", "device", PHONES.sampling)
    run_filter(Budget(8.0, 1e-6), cost, PHONES.sends)


def test_groups_do_not_change_what_one_device_pays_and_each_carries_the_full_noise():
    roomy = Cohort(expected=2000, spread=40, roster=20_000, honest=100, corrupt=20)
    one, four = (make_plan(PHONES, replace(roomy, groups=g), Target(readers=Budget(8.0, 1e-6))) for g in (1, 4))
    assert four.mechanism.noise_multiplier == pytest.approx(one.mechanism.noise_multiplier, rel=0.01)
    assert four.mechanism.granularity < one.mechanism.granularity  # smaller sums, finer steps
    assert "4 groups with the full noise each" in str(four)


def test_a_group_has_room_for_its_corrupt_devices_beside_the_honest_ones():
    target = Target(readers=Budget(8.0, 1e-6))
    make_plan(PHONES, replace(THOUSANDS, honest=340, corrupt=5), target)
    with pytest.raises(ParameterError, match=r"h \+ F = 360 contributors, and may have only 350"):
        make_plan(PHONES, replace(THOUSANDS, honest=340, corrupt=20), target)


def test_more_devices_than_asked_for_are_pointed_out():
    assert "raising `honest`" in str(make_plan(PHONES, THOUSANDS, Target(readers=Budget(8.0, 1e-6))))
    assert "raising `honest`" not in str(demo())


@pytest.mark.parametrize(
    ("work", "cohort", "target", "says"),
    [
        (PHONES, replace(THOUSANDS, groups=5), Target(readers=Budget(8.0, 1e-6)), "what would do: .*larger cohort"),
        (PHONES, replace(THOUSANDS, honest=60, groups=4), Target(readers=Budget(8.0, 1e-6)), "what would do: 3 groups"),
        (PHONES, replace(THOUSANDS, honest=480), Target(readers=Budget(8.0, 1e-6)), "a smaller h"),
        (replace(DEMO, rounds=10**6), TWENTY, Target(readers=Budget(1e-3, 1e-9)), "fewer rounds, or a larger epsilon"),
        (DEMO, TWENTY, Target(readers=Budget(2.5, 1e-11)), "no noise holds this.*delta"),
        (
            replace(PHONES, dimension=10**8, rounds=20_000, sampling=Sampling()),
            Cohort(9000, 30, 50_000, 2, 20),
            Target(readers=Budget(0.2, 1e-6)),
            r"sums modulo 2\^19 .* what would do: a larger epsilon",
        ),
    ],
)
def test_a_plan_that_cannot_hold_is_refused_with_what_would(work, cohort, target, says):
    with pytest.raises(ParameterError, match=says):
        make_plan(work, cohort, target)


@pytest.mark.parametrize(
    "call",
    [
        lambda: Target(),
        lambda: Target(readers=Budget(1.0, 1e-6), coordinator=Budget(1.0, 1e-5)),
        lambda: FixedNoise(0.0, 1e-4),
        lambda: FixedNoise(math.nan, 1e-4),
        lambda: FixedNoise(1e6, 1e-4),
        lambda: FixedNoise(3.0, 0.0),
        lambda: FixedNoise(3.0, math.nan),
        lambda: Cohort(30, 1, 20, 10, 2),
        lambda: Cohort(0, 1, 20, 10, 2),
        lambda: Cohort(math.nan, 1, 20, 10, 2),
        lambda: Cohort(20, -1, 20, 10, 2),
        lambda: Cohort(20, 1, 20, 1, 2),
        lambda: Cohort(20, 1, 20, 10, 2, groups=0),
        lambda: replace(DEMO, rounds=0),
        lambda: replace(DEMO, examples=0),
        lambda: make_plan(replace(DEMO, clip=0.0), TWENTY, Target(readers=Budget(2.5, 1e-4))),
        lambda: make_plan(replace(DEMO, clip=math.nan), TWENTY, Target(readers=Budget(2.5, 1e-4))),
        lambda: make_plan(replace(DEMO, dimension=0), TWENTY, Target(readers=Budget(2.5, 1e-4))),
    ],
)
def test_requests_out_of_range_are_refused(call):
    with pytest.raises(ParameterError):
        call()


def test_the_rounds_in_which_a_device_sends_are_bounded_by_the_binomial_tail():
    from scipy.stats import binom

    sends = PHONES.sends
    assert binom.sf(sends, 200, 0.1) <= 1e-9 < binom.sf(sends - 1, 200, 0.1)
    assert DEMO.sends == DEMO.rounds


@settings(max_examples=40)
@given(
    st.sampled_from(["device", "example"]),
    st.integers(1, 10**6),
    st.floats(0.3, 30.0),
    st.integers(10, 2000),
    st.integers(1, 4),
    st.floats(1e-6, 1e6),
)
def test_a_mechanism_that_is_chosen_has_the_noise_asked_for_and_does_not_wrap(unit, d, multiplier, size, groups, clip):
    work = Work(unit, d, clip, 10, Sampling(example=0.5), examples=50)
    cohort = Cohort(size, math.sqrt(size) / 10, 5000, max(2, size // (2 * groups)), 0, groups)
    m, refusal = None, ""
    try:
        m = _finest(work, cohort, multiplier, 32 - delta_bits(cohort.n_max))
    except ParameterError as error:
        refusal = str(error)
    if m is None:
        assert "what would do" in refusal
        return
    assert m.noise_multiplier >= multiplier * (1 - 1e-12)
    assert m.noise_multiplier <= multiplier * (1 + 1e-9)
    assert m.wrap_probability(cohort.largest_group, work.units(cohort.largest_group)) <= MAX_WRAP
    assert m.sensitivity_steps <= 1.5 * m.sensitivity / m.granularity
