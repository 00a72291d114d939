"""The coordinator's figures against dp-accounting itself, exact sums, and what rounds released."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant, privacy_loss_distribution
from dp_accounting.rdp import RdpAccountant
from scipy.stats import binom, norm

from coordinator import accounting
from coordinator.accounting import (
    CoordinatorGuarantee,
    ReadersGuarantee,
    Record,
    RoundRecord,
    composed,
    planned,
    planned_rdp,
)
from edge_sdk.errors import ParameterError
from edge_sdk.privacy.ledger_entry import noise_of
from edge_sdk.privacy.mechanism import Mechanism
from edge_sdk.privacy.rdp import ORDERS, Sampling, against_coordinator, against_readers

DELTA = 1e-4


def mechanism(unit="example", multiplier=3.0, honest=10, granularity=1e-4):
    draft = Mechanism(
        unit=unit, dimension=1000, clip=0.5, granularity=granularity, sigma=1e4, honest=honest, modulus_bits=22
    )
    return replace(draft, sigma=multiplier * draft.sensitivity_steps)


def dp_accountings(accountant, multiplier, rate, rounds, delta):
    event = GaussianDpEvent(multiplier)
    accountant.compose(SelfComposedDpEvent(PoissonSampledDpEvent(rate, event) if rate < 1 else event, rounds))
    return accountant.get_epsilon(delta)


def rdp_from_order_two():
    # dp-accounting's default orders below 2 do not converge here, and it says so at length
    return RdpAccountant(orders=[2 + x / 10 for x in range(90)] + list(range(11, 257)))


# The demonstration's plan: q = 0.3, 40 rounds, noise multiplier 3, delta 1e-4.


def test_the_demonstrations_plan_is_2_42_by_pld_and_2_70_by_rdp():
    arguments = (mechanism(), Sampling(example=0.3), 40, 40, DELTA)
    by_pld, by_rdp = planned(*arguments), planned_rdp(*arguments)
    assert (round(by_pld.readers.epsilon, 2), round(by_rdp.readers.epsilon, 2)) == (2.42, 2.70)
    assert (by_pld.readers.method, by_rdp.readers.method) == ("pld", "rdp")
    # every device sends in every round: the coordinator sees no less and no more
    assert by_pld.coordinator.epsilon == by_pld.readers.epsilon


def test_a_coin_for_the_whole_device_gives_readers_the_same_and_the_coordinator_none_of_it():
    figures = planned(mechanism("device"), Sampling(device=0.3), 40, 40, DELTA)
    assert round(figures.readers.epsilon, 2) == 2.42
    assert figures.coordinator.epsilon > 9


def test_a_coin_for_the_device_and_one_for_the_example_are_not_one_coin_of_the_product():
    figures = planned(mechanism(), Sampling(device=0.5, example=0.6), 40, 40, DELTA)
    assert figures.readers.epsilon > 3.5
    assert figures.readers.epsilon < figures.coordinator.epsilon


@pytest.mark.parametrize(
    ("multiplier", "rate", "rounds"), [(3.0, 0.3, 40), (1.0, 0.01, 300), (10.0, 1.0, 50), (1.2, 0.1, 20)]
)
def test_figures_agree_with_the_continuous_mechanisms_within_one_percent(multiplier, rate, rounds):
    arguments = (mechanism(multiplier=multiplier), Sampling(example=rate), rounds, rounds, DELTA)
    for figures, accountant in (
        (planned(*arguments), PLDAccountant()),
        (planned_rdp(*arguments), rdp_from_order_two()),
    ):
        theirs = dp_accountings(accountant, multiplier, rate, rounds, DELTA)
        assert figures.readers.epsilon == pytest.approx(theirs, rel=0.01)


@pytest.mark.parametrize(("rate", "rounds"), [(0.3, 40), (0.01, 500), (1.0, 10)])
def test_what_devices_count_is_never_below_the_coordinators_figures(rate, rounds):
    m = mechanism(multiplier=2.0)
    sampling = Sampling(example=rate)
    noise, beta = noise_of(m)
    curve = against_readers(noise, "example", "example", sampling, beta) * rounds
    arguments = (m, sampling, rounds, rounds, DELTA)
    assert curve.epsilon(DELTA) >= planned_rdp(*arguments).readers.epsilon * (1 - 1e-6)
    assert curve.epsilon(DELTA) >= planned(*arguments).readers.epsilon
    theirs = RdpAccountant(orders=ORDERS)
    theirs.compose(SelfComposedDpEvent(PoissonSampledDpEvent(rate, GaussianDpEvent(m.noise_multiplier)), rounds))
    assert (curve.values >= theirs._rdp * (1 - 1e-12)).all()


def test_a_coin_that_readers_know_mixes_over_how_often_it_fell():
    device, example, rounds, multiplier = 0.4, 0.5, 12, 2.0
    epsilon = planned(
        mechanism(multiplier=multiplier), Sampling(device, example), rounds, rounds, DELTA
    ).readers.epsilon
    one = privacy_loss_distribution.from_gaussian_mechanism(multiplier, sampling_prob=example)
    delta = sum(
        binom.pmf(k, rounds, device) * (one.self_compose(k).get_delta_for_epsilon(epsilon) if k else 0.0)
        for k in range(rounds + 1)
    )
    assert delta == pytest.approx(DELTA, rel=0.03)
    assert delta <= DELTA


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_the_exact_epsilon_of_the_discrete_mechanism_is_never_above_the_pld_figure(shift):
    # One coordinate, the coarsest noise there is: two shares of 2 steps. Its delta is above the continuous one's.
    m = Mechanism(unit="device", dimension=1, clip=1.0, granularity=1.0, sigma=2.83, honest=2, modulus_bits=22)
    before = (math.sqrt(4 * shift**2 - 2) - 1) / 2  # c^2 + c + 3/4 = shift^2: rounded, one unit adds just `shift`
    m = replace(m, granularity=1 / (before * (1 + 1e-8)))
    assert m.sensitivity_steps == pytest.approx(shift, rel=1e-6)
    x = np.arange(-40, 41)
    share = np.exp(-(x**2) / (2 * m.share_sigma**2))
    share /= share.sum()
    noise = np.convolve(share, share)

    def exact_delta(epsilon):
        return np.maximum(noise[:-shift] - math.exp(epsilon) * noise[shift:], 0).sum()

    deltas = (1e-2, 1e-3, 1e-4, 1e-5)
    for delta in deltas:
        assert exact_delta(planned(m, Sampling(), 1, 1, delta).coordinator.epsilon) <= delta
    continuous = privacy_loss_distribution.from_gaussian_mechanism(m.noise_multiplier)
    assert any(exact_delta(continuous.get_epsilon_for_delta(delta)) > delta for delta in deltas)


def test_no_rounds_cost_nothing_and_a_negative_number_is_refused():
    figures = planned(mechanism(), Sampling(), 0, 0, DELTA)
    assert (figures.readers.epsilon, figures.coordinator.epsilon) == (0.0, 0.0)
    with pytest.raises(ParameterError):
        planned(mechanism(), Sampling(), -1, 0, DELTA)


def test_roundings_that_use_up_delta_leave_no_figure():
    assert planned(mechanism(), Sampling(), 200, 200, 1e-10).readers.epsilon == math.inf
    assert planned_rdp(mechanism(), Sampling(), 200, 200, 1e-10).readers.epsilon == math.inf


# Rounds that differ, all fixed in advance


def gaussian_delta(distance, epsilon):
    """delta(epsilon) of two unit Gaussians so far apart: Balle and Wang 2018, arXiv:1805.06530, Theorem 5."""
    half, ratio = distance / 2, epsilon / distance
    return norm.cdf(half - ratio) - math.exp(epsilon) * norm.cdf(-half - ratio)


def test_rounds_of_different_noise_compose_to_the_gaussian_whose_distance_is_theirs_together():
    counts = {2.0: 3, 5.0: 10, 12.0: 40}
    events = Counter({(mechanism("device", z), Sampling()): n for z, n in counts.items()})
    epsilon = composed(Counter(), events, DELTA).coordinator.epsilon
    distance = math.sqrt(sum(n / z**2 for z, n in counts.items()))
    assert gaussian_delta(distance, epsilon) <= DELTA
    assert gaussian_delta(distance, epsilon * 0.999) > DELTA


@pytest.mark.parametrize("rates", [(0.6, 0.3), (0.05, 1.0)])
def test_sampled_rounds_of_different_noise_have_the_epsilon_of_their_product_summed_by_brute_force(rates):
    """Two rounds, their outputs on a grid of two dimensions, the larger of both directions."""
    multipliers = (1.3, 2.2)
    without, present = [], []
    for z, rate in zip(multipliers, rates, strict=True):
        x = np.linspace(-8 * z, 8 * z + 1, 1600)
        weight = x[1] - x[0]
        without.append(norm.pdf(x, 0, z) * weight)
        present.append((1 - rate) * without[-1] + rate * norm.pdf(x, 1, z) * weight)
    p, q = np.outer(*present), np.outer(*without)
    events = Counter(
        {(mechanism(multiplier=z), Sampling(example=rate)): 1 for z, rate in zip(multipliers, rates, strict=True)}
    )
    epsilon = composed(events, events, 1e-3).readers.epsilon

    def exact_delta(epsilon):
        grown = math.exp(epsilon)
        return max(np.maximum(p - grown * q, 0).sum(), np.maximum(q - grown * p, 0).sum())

    assert exact_delta(epsilon) <= 1e-3 * (1 + 1e-5)  # the grid's own error
    assert exact_delta(epsilon * 0.995) > 1e-3


def test_equal_rounds_listed_apart_cost_what_they_cost_together():
    m, sampling = mechanism(), Sampling(example=0.3)
    apart = Counter({(m.scaled(0.5 * 1.07**k), sampling): 1 for k in range(40)})
    assert len({step[0].noise_multiplier for step in apart}) > 1  # rounding errors
    together = planned(m, sampling, 40, 40, DELTA)
    assert composed(apart, apart, DELTA).readers.epsilon == pytest.approx(together.readers.epsilon, rel=1e-6)
    # and by composing instead of counting
    halves = Counter({(m, sampling): 20, (mechanism(multiplier=3.0 * (1 + 1e-7)), sampling): 20})
    assert composed(halves, halves, DELTA).readers.epsilon == pytest.approx(together.readers.epsilon, rel=1e-3)


def test_betas_and_corrections_of_rounds_that_differ_add_up():
    coarse = Mechanism(unit="example", dimension=1000, clip=0.5, granularity=0.01, sigma=90.0, honest=500,
                       modulus_bits=22)  # fmt: skip
    events = Counter({(coarse, Sampling(example=0.3)): 100, (mechanism(), Sampling(example=0.3)): 100})
    assert math.isfinite(composed(events, events, 2.1e-10).readers.epsilon)
    assert composed(events, events, 1.9e-10).readers.epsilon == math.inf


def test_what_smoothing_gives_away_is_charged_for_every_round_and_coordinate(monkeypatch):
    """With so little smoothing that it shows: epsilon twice the sum's distance more, and delta less."""
    m = mechanism("device", multiplier=40.0)
    whole = {rounds: planned(m, Sampling(), 0, rounds, DELTA).coordinator.epsilon for rounds in (50, 100)}
    monkeypatch.setattr(accounting, "SMOOTHING", 0.9)
    for rounds, epsilon in whole.items():
        given_away = 2 * rounds * 1000 * 5 * math.exp(-2 * math.pi**2 * 0.9**2)
        found = planned(m, Sampling(), 0, rounds, DELTA).coordinator.epsilon
        assert epsilon + given_away < found < epsilon + 1.2 * given_away
        assert given_away > 0.02


def test_figures_say_against_whom_and_by_which_method():
    text = str(planned(mechanism(), Sampling(example=0.3), 40, 40, DELTA))
    assert text == (
        "epsilon 2.42 at delta 1e-04 against readers (PLD); epsilon 2.42 at delta 1e-04 against the coordinator (PLD)"
    )
    assert ReadersGuarantee(1.0, DELTA, "pld") != CoordinatorGuarantee(1.0, DELTA, "pld")


# What happened


def round_record(included=(), left_out=(), m=None, sampling=None, **changes):
    m = m or mechanism("device")
    return RoundRecord(
        m,
        sampling or Sampling(device=0.3),
        2,
        tuple(map(tuple, included)),
        tuple(left_out),
        **({"steady_noise": True} | changes),
    )


def record(*rounds):
    result = Record()
    for entry in rounds:
        result.add(entry)
    return result


def test_an_empty_record_has_cost_nothing():
    figures = Record().figures(DELTA)
    assert (figures.readers.epsilon, figures.coordinator.epsilon) == (0.0, 0.0)


def test_an_aborted_round_costs_its_senders_against_the_coordinator_and_nothing_against_readers():
    aborted = record(round_record(left_out=range(5)))
    figures = aborted.figures(DELTA)
    assert figures.readers.epsilon == 0.0
    assert figures.coordinator.epsilon == planned_rdp(mechanism("device"), Sampling(), 0, 1, DELTA).coordinator.epsilon


def test_a_sum_that_was_not_published_costs_nothing_against_readers():
    kept, shown = (record(round_record([range(12)], published=published)) for published in (False, True))
    assert kept.figures(DELTA).readers.epsilon == 0.0
    assert shown.figures(DELTA).readers.epsilon > 0
    assert kept.figures(DELTA).coordinator == shown.figures(DELTA).coordinator


def test_a_send_that_was_left_out_is_charged_with_the_least_noise():
    left_out = record(round_record([range(12)], left_out=[99])).figures(DELTA).coordinator.epsilon
    included = record(round_record([range(12)])).figures(DELTA).coordinator.epsilon
    larger = record(round_record([range(50)])).figures(DELTA).coordinator.epsilon
    assert left_out == included  # 12 contributors of whom 2 may be corrupt: just the 10 required
    assert larger < included


def test_the_noise_of_a_larger_group_counts_less_its_corrupt_devices():
    figures = record(round_record([range(42)])).figures(DELTA)
    expected = dp_accountings(rdp_from_order_two(), 3.0 * math.sqrt(40 / 10), 1.0, 1, DELTA)
    assert figures.coordinator.epsilon == pytest.approx(expected, rel=0.01)


def test_the_coordinators_figure_is_of_the_device_that_pays_most():
    often, seldom = [7, *range(100, 111)], range(200, 212)
    rounds = [round_record([often]), round_record([often]), round_record([seldom])]
    two = record(*rounds).figures(DELTA).coordinator.epsilon
    assert two == record(*rounds[:2]).figures(DELTA).coordinator.epsilon
    assert two > record(rounds[2]).figures(DELTA).coordinator.epsilon


def test_a_device_pays_in_its_own_group_only():
    one = record(round_record([range(12)])).figures(DELTA)
    two = record(round_record([range(12), range(12, 24)])).figures(DELTA)
    assert one == two


def test_a_realised_cohort_is_not_used_against_readers():
    small = record(round_record([range(12)], published=True)).figures(DELTA).readers
    assert small == record(round_record([range(500)], published=True)).figures(DELTA).readers


def test_noise_whose_level_shows_the_number_of_contributors_takes_the_coins_amplification_away():
    steady = record(round_record([range(12)], published=True)).figures(DELTA).readers.epsilon
    unsteady = record(round_record([range(12)], published=True, steady_noise=False)).figures(DELTA).readers.epsilon
    assert unsteady > 2 * steady
    assert unsteady == planned_rdp(mechanism("device"), Sampling(), 1, 0, DELTA).readers.epsilon
    # An example's figure lets readers know the coin anyway.
    m, sampling = mechanism(), Sampling(0.3, 0.3)
    assert record(round_record([range(12)], m=m, sampling=sampling, published=True, steady_noise=False)).figures(
        DELTA
    ) == record(round_record([range(12)], m=m, sampling=sampling, published=True)).figures(DELTA)


def test_a_record_of_the_plan_agrees_with_the_plan():
    rounds = [round_record([range(12)], published=True) for _ in range(40)]
    done = record(*rounds)
    assert done.figures(DELTA) == planned_rdp(mechanism("device"), Sampling(device=0.3), 40, 40, DELTA)
    assert done.figures_of_plan(DELTA) == planned(mechanism("device"), Sampling(device=0.3), 40, 40, DELTA)


def test_rounds_that_were_not_one_plan_have_no_figure_by_pld():
    changed = record(round_record([range(12)]), round_record([range(12)], m=mechanism("device", multiplier=4.0)))
    with pytest.raises(ParameterError, match="not one plan"):
        changed.figures_of_plan(DELTA)
    assert changed.figures(DELTA).coordinator.epsilon > 0
    with pytest.raises(ParameterError, match="no round"):
        Record().figures_of_plan(DELTA)


def test_a_published_plan_of_rounds_that_differ_has_figures_by_pld():
    steps = [(mechanism("device", z), Sampling(device=0.3)) for z in (4.0, 4.0, 3.0, 2.0)]
    rounds = [round_record([range(12)], m=m, published=True) for m, _ in steps]
    done = record(*rounds).figures_of_plan(DELTA, steps)
    assert done == composed(Counter(steps), Counter(steps), DELTA)
    assert done.readers.epsilon < record(*rounds).figures(DELTA).readers.epsilon
    assert done.coordinator.epsilon < record(*rounds).figures(DELTA).coordinator.epsilon
    # what happened of it: two rounds
    assert record(*rounds[:2]).figures_of_plan(DELTA, steps) == composed(Counter(steps[:2]), Counter(steps[:2]), DELTA)


def test_an_aborted_rounds_step_is_attempted_again_and_its_senders_pay_twice():
    steps = [(mechanism("device", z), Sampling(device=0.3)) for z in (4.0, 2.0)]
    rounds = [
        round_record(left_out=range(12), m=steps[0][0]),
        round_record([range(12)], m=steps[0][0], published=True),
        round_record([range(12)], m=steps[1][0], published=True),
    ]
    figures = record(*rounds).figures_of_plan(DELTA, steps)
    assert figures == composed(Counter(steps), Counter([steps[0], *steps]), DELTA)


def test_a_plan_whose_clip_was_adapted_costs_what_the_plan_costs():
    m, sampling = mechanism("device"), Sampling(device=0.3)
    rounds = [round_record([range(12)], m=m.scaled(0.5 * 0.93**k), published=True) for k in range(40)]
    expected = planned(m, sampling, 40, 40, DELTA)
    for plan in (None, [(m, sampling)] * 40):
        figures = record(*rounds).figures_of_plan(DELTA, plan)
        assert figures.readers.epsilon == pytest.approx(expected.readers.epsilon, rel=1e-6)
        assert figures.coordinator.epsilon == pytest.approx(expected.coordinator.epsilon, rel=1e-6)


def test_what_is_taken_for_the_same_noise_is_charged_for_the_least_of_it(monkeypatch):
    """A tolerance of one in twenty in place of one in 10^9, so that it shows."""
    monkeypatch.setattr(accounting, "SAME", 0.05)
    steps = [(mechanism("device"), Sampling(device=0.3))] * 3
    weaker = mechanism("device", multiplier=3.0 * 0.951)
    rounds = record(*[round_record([range(12)], m=weaker, published=True) for _ in range(3)])
    figures = rounds.figures_of_plan(DELTA, steps)
    monkeypatch.setattr(accounting, "SAME", 0.0)
    exact = planned(weaker, Sampling(device=0.3), 3, 3, DELTA)
    assert exact.readers.epsilon <= figures.readers.epsilon
    assert exact.coordinator.epsilon <= figures.coordinator.epsilon


def test_more_noise_than_planned_is_charged_as_planned():
    steps = [(mechanism("device"), Sampling(device=0.3))] * 3
    louder = [round_record([range(12)], m=mechanism("device", multiplier=9.0), published=True) for _ in range(3)]
    assert record(*louder).figures_of_plan(DELTA, steps) == composed(Counter(steps), Counter(steps), DELTA)


def test_a_realised_cohorts_noise_counts_against_the_coordinator_only():
    steps = [(mechanism("device"), Sampling(device=0.3))] * 2
    larger = record(*[round_record([range(n)], published=True) for n in (42, 22)]).figures_of_plan(DELTA)
    assert larger.readers == planned(*steps[0], 2, 0, DELTA).readers
    distance = math.sqrt(10 / 40 / 9 + 10 / 20 / 9)
    assert gaussian_delta(distance, larger.coordinator.epsilon) == pytest.approx(DELTA, rel=0.01)


FINE, SPLIT = mechanism("device"), mechanism("device", honest=300, granularity=0.5)


@pytest.mark.parametrize(
    ("step", "changes"),
    [
        (FINE, {"m": mechanism("device", multiplier=2.99)}),
        (FINE, {"sampling": Sampling(device=0.2)}),
        (FINE, {"m": replace(mechanism("device", multiplier=3.1), dimension=1001)}),
        # the same noise in more and smaller shares, which are a little further from one discrete Gaussian
        (SPLIT, {"m": mechanism("device", honest=310, granularity=0.5)}),
    ],
)
def test_a_round_that_is_not_its_step_of_the_plan_leaves_only_figures_by_rdp(step, changes):
    rounds = record(round_record([range(400)], m=step, published=True), round_record([range(400)], m=step))
    assert rounds.figures_of_plan(DELTA, [(step, Sampling(device=0.3))] * 2).readers.epsilon > 0
    rounds = record(rounds.rounds[0], round_record([range(400)], **({"m": step} | changes)))
    with pytest.raises(ParameterError, match=r"step 1 .* by RDP"):
        rounds.figures_of_plan(DELTA, [(step, Sampling(device=0.3))] * 2)
    assert rounds.figures(DELTA).coordinator.epsilon > 0


def test_rounds_of_one_unit_are_not_a_plan_of_the_other():
    rounds = record(round_record([range(12)], m=mechanism("device", multiplier=9.0), published=True))
    with pytest.raises(ParameterError, match="step 0"):
        rounds.figures_of_plan(DELTA, [(mechanism("example"), Sampling(device=0.3))])


def test_by_pld_too_noise_whose_level_shows_the_number_of_contributors_takes_the_coins_amplification_away():
    unsteady = record(*[round_record([range(12)], published=True, steady_noise=False) for _ in range(3)])
    for plan in (None, [(mechanism("device"), Sampling(device=0.3))] * 3):
        assert unsteady.figures_of_plan(DELTA, plan) == planned(mechanism("device"), Sampling(), 3, 3, DELTA)


def test_more_rounds_than_planned_and_noise_steady_in_some_only_leave_only_figures_by_rdp():
    step = (mechanism("device"), Sampling(device=0.3))
    rounds = [round_record([range(12)], published=True) for _ in range(3)]
    with pytest.raises(ParameterError, match="more rounds than the plan's 2"):
        record(*rounds).figures_of_plan(DELTA, [step] * 2)
    with pytest.raises(ParameterError, match="in some rounds only"):
        record(*rounds, round_record([range(12)], published=True, steady_noise=False)).figures_of_plan(DELTA)


@pytest.mark.parametrize("most", [0, 1, 16])
def test_the_device_that_pays_most_by_pld_is_found_or_bounded_however_many_histories_are_compared(monkeypatch, most):
    """Ten devices that sent in rounds of three kinds, some more often in cheap ones, some in dear ones."""
    steps = [(mechanism("device", z), Sampling(device=0.3)) for z in (12.0, 8.0, 6.0)]
    histories = [Counter(dict(zip(steps, (i % 7, i % 4, (3 * i) % 5), strict=True))) for i in range(1, 11)]
    exact = max(accounting._pld_epsilon(accounting._coordinator_events(h), DELTA) for h in histories)
    monkeypatch.setattr(accounting, "MOST_HISTORIES", most)
    found = accounting._largest(histories, DELTA)
    assert found >= exact
    assert found <= exact * {0: 1.5, 1: 1.3, 16: 1.0}[most]
    assert accounting._largest([], DELTA) == 0.0


def test_devices_that_plainly_sent_less_are_not_worked_out(monkeypatch):
    step = (mechanism("device", multiplier=8.0), Sampling(device=0.3))
    tried = []
    real = accounting._pld_epsilon
    monkeypatch.setattr(accounting, "_pld_epsilon", lambda events, delta: tried.append(events) or real(events, delta))
    histories = [Counter({step: sends}) for sends in (2, 20, 4, 8, 1)]
    assert accounting._largest(histories, DELTA) == planned(*step, 0, 20, DELTA).coordinator.epsilon
    assert tried[0] == accounting._coordinator_events(histories[1])
    assert len(tried) == 1 + 2  # and both of `planned`


def test_records_that_cannot_have_happened_are_refused():
    with pytest.raises(ParameterError, match="twice"):
        round_record([range(12)], left_out=[3])
    with pytest.raises(ParameterError, match="h \\+ F = 12"):
        round_record([range(11)])
    with pytest.raises(ParameterError, match="one unit"):
        record(round_record([range(12)]), round_record([range(12)], m=mechanism()))


def test_the_realised_figure_is_never_below_what_its_noise_allows():
    noise, _ = noise_of(mechanism("device"))
    curve = against_coordinator(noise, "device", "device", Sampling()) * 3
    figures = record(*[round_record([range(12)]) for _ in range(3)]).figures(DELTA)
    assert figures.coordinator.epsilon == pytest.approx(curve.epsilon(DELTA), rel=0.01)
