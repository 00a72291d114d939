"""The coordinator's figures against dp-accounting itself, exact sums, and what rounds released."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant, privacy_loss_distribution
from dp_accounting.rdp import RdpAccountant
from scipy.stats import binom

from coordinator.accounting import (
    CoordinatorGuarantee,
    ReadersGuarantee,
    Record,
    RoundRecord,
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
