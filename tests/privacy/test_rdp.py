"""RDP curves against integrals, exact sums and dp-accounting; the conversion against the exact one; the filter."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.rdp import RdpAccountant, compute_epsilon
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate
from scipy.stats import norm

from edge_sdk.errors import ParameterError
from edge_sdk.privacy.rdp import (
    FAVOURITE_SHARE,
    ORDERS,
    ROUNDING_SHARE,
    AgainstCoordinator,
    AgainstReaders,
    Budget,
    BudgetExceeded,
    Filter,
    Noise,
    Sampling,
    _log_deltas,
    against_coordinator,
    against_readers,
)

ALPHA = np.array(ORDERS, dtype=np.float64)
rates = st.floats(1e-4, 0.999)
multipliers = st.floats(0.3, 200)


def sampled(multiplier, rate):
    return against_readers(Noise(multiplier), "device", "device", Sampling(device=rate)).values


def divergence(order, p, q, low, high):
    """D_order(p || q) of two densities on the line, by quadrature."""
    moment, _ = integrate.quad(
        lambda x: math.exp(order * p(x) - (order - 1) * q(x)), low, high, limit=400, epsabs=0, epsrel=1e-11
    )
    return math.log(moment) / (order - 1)


def mixture(weights_and_means, sigma):
    def log_density(x):
        return np.logaddexp.reduce([math.log(w) + norm.logpdf(x, m, sigma) for w, m in weights_and_means])

    return log_density


@pytest.mark.parametrize(("multiplier", "rate"), [(3.0, 0.3), (1.0, 0.01), (0.7, 0.5), (8.0, 0.9)])
@pytest.mark.parametrize("order", [2, 3, 7, 20])
def test_the_sampled_gaussian_is_the_integral_of_its_definition(multiplier, rate, order):
    without, with_one = mixture([(1.0, 0.0)], multiplier), mixture([(1 - rate, 0.0), (rate, 1.0)], multiplier)
    edges = (-15 * multiplier, 15 * multiplier + order)
    ours = sampled(multiplier, rate)[ORDERS.index(order)]
    assert ours == pytest.approx(divergence(order, with_one, without, *edges), rel=1e-7)
    assert ours >= divergence(order, without, with_one, *edges)


@pytest.mark.parametrize(("sigma", "shift", "rate"), [(0.8, 1, 0.2), (2.0, 3, 0.6), (5.0, 2, 0.05)])
def test_the_sampled_discrete_gaussian_has_the_same_moments_for_integer_shifts(sigma, shift, rate):
    x = np.arange(-800, 801)
    p0 = -(x**2) / (2 * sigma**2)
    p0 -= np.logaddexp.reduce(p0)
    p1 = -((x - shift) ** 2) / (2 * sigma**2)
    p1 -= np.logaddexp.reduce(p1)
    both = np.logaddexp(math.log1p(-rate) + p0, math.log(rate) + p1)
    for order in (2, 5, 16):
        ours = sampled(sigma / shift, rate)[ORDERS.index(order)]
        assert ours == pytest.approx(np.logaddexp.reduce(order * both - (order - 1) * p0) / (order - 1), rel=1e-9)
        assert ours >= np.logaddexp.reduce(order * p0 - (order - 1) * both) / (order - 1)


def convolved(sigma, count):
    """Probabilities of -14..14 of a sum of `count` discrete Gaussians."""
    x = np.arange(-15, 16)
    one = np.exp(-(x**2) / (2 * sigma**2))
    one /= one.sum()
    total = one
    for _ in range(count - 1):
        total = np.convolve(total, one)
    half = len(total) // 2
    return total[half - 14 : half + 15]


@pytest.mark.parametrize(("share", "count"), [(0.6, 2), (0.6, 4), (0.8, 3)])
@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_a_sum_of_coarse_discrete_gaussians_costs_no_more_than_its_correction_says(share, count, rate):
    total = convolved(share, count)
    tau = 10 * sum(math.exp(-2 * math.pi**2 * share**2 * k / (k + 1)) for k in range(1, count))
    noise = Noise(share * math.sqrt(count), tau, 1)
    ours = against_readers(noise, "device", "device", Sampling(device=rate)).values
    uncorrected = against_readers(Noise(noise.multiplier), "device", "device", Sampling(device=rate)).values
    p0, p1 = total[1:], total[:-1]
    both = (1 - rate) * p0 + rate * p1
    for order in (2, 3, 4):
        exact = math.log((both**order / p0 ** (order - 1)).sum()) / (order - 1)
        assert exact <= ours[ORDERS.index(order)]
        assert ours[ORDERS.index(order)] > uncorrected[ORDERS.index(order)]


@given(multipliers, rates)
def test_curves_are_never_below_dp_accountings_and_not_above_it_by_more_than_rounding(multiplier, rate):
    theirs = RdpAccountant(orders=ORDERS)
    theirs.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(multiplier)))
    # theirs cancels: its moment is 1 plus something small, known to 1e-13 or so
    slack = 1e-12 / (ALPHA - 1)
    assert (sampled(multiplier, rate) >= theirs._rdp * (1 - 1e-12) - slack).all()
    assert (sampled(multiplier, rate) <= theirs._rdp * (1 + 1e-9) + slack).all()


@given(multipliers)
def test_the_gaussian_without_sampling_costs_alpha_over_two_z_squared(multiplier):
    ours = against_coordinator(Noise(multiplier), "device", "device", Sampling(device=0.1)).values
    np.testing.assert_allclose(ours, ALPHA / (2 * multiplier**2), rtol=1e-10)
    assert (ours >= ALPHA / (2 * multiplier**2)).all()


def test_tiny_rates_do_not_cancel():
    # order 2 in closed form: ln(1 + q^2 (exp(1/z^2) - 1)), here about 1e-20
    q, z = 1e-9, 10.0
    assert sampled(z, q)[0] == pytest.approx(q * q * math.expm1(1 / z**2), rel=1e-10)


@given(multipliers, rates, st.floats(-300, -9), st.integers(1, 10**7))
def test_a_correction_however_small_adds_what_it_says_and_never_takes_away(multiplier, rate, exponent, d):
    """Shares of a few steps have corrections down to 1e-300; those of more have none that float64 knows."""
    tau = 10.0**exponent
    plain = sampled(multiplier, rate)
    corrected = against_readers(Noise(multiplier, tau, d), "device", "device", Sampling(device=rate)).values
    assert np.isfinite(corrected).all()
    assert (corrected >= plain).all()
    most = (2 * ALPHA - 1) * tau * d / (ALPHA - 1)
    assert (corrected <= (plain + most) * (1 + 1e-9)).all()


def test_no_order_overflows_where_noise_is_small():
    values = sampled(0.05, 1e-6)
    assert np.isfinite(values).all()
    assert (np.diff(values) >= 0).all()


@given(multipliers, rates, rates)
def test_more_sampling_never_costs_less(multiplier, a, b):
    low, high = sorted((a, b))
    assert (sampled(multiplier, low) <= sampled(multiplier, high) * (1 + 1e-9)).all()
    assert (sampled(multiplier, high) <= sampled(multiplier, 1.0) * (1 + 1e-9)).all()


@given(st.floats(0.1, 100), st.floats(0, 1), st.integers(1, 10**6))
def test_the_correction_of_the_sum_is_that_of_kairouz_liu_steinke_at_every_order(multiplier, tau, d):
    values = against_coordinator(Noise(multiplier, tau, d), "device", "device", Sampling()).values
    distance = 1 / multiplier
    by_sum = ALPHA * distance**2 / 2 + tau * d
    by_norm = ALPHA / 2 * (distance + tau * math.sqrt(d)) ** 2
    assert (values >= np.minimum(by_sum, by_norm) * (1 - 1e-12)).all()  # Proposition 14
    theorem_1 = min(math.sqrt(distance**2 + tau * d / 2), distance + tau * math.sqrt(d))
    assert (values >= ALPHA * theorem_1**2 / 2 * (1 - 1e-12)).all()
    assert values[0] <= min(by_sum[0], by_norm[0]) * (1 + 1e-9)  # and no more than is needed


def test_a_coin_for_the_device_is_worth_less_to_one_example_than_the_product_of_the_rates():
    # A device with another example whose gradient stands out: when it takes part, a reader sees that it does.
    multiplier, device, example, far = 3.0, 0.5, 0.6, 200.0
    x = np.linspace(-60, 280, 200_001)

    def log_density(weights_and_means):
        return np.logaddexp.reduce([math.log(w) + norm.logpdf(x, mean, multiplier) for w, mean in weights_and_means])

    without = log_density([(1 - device, 0.0), (device, far)])
    with_one = log_density([(1 - device, 0.0), (device * (1 - example), far), (device * example, far + 1)])
    ours = against_readers(Noise(multiplier), "example", "example", Sampling(device, example)).values
    for order in (2, 6):
        exact = math.log(np.trapezoid(np.exp(order * with_one - (order - 1) * without), x)) / (order - 1)
        assert exact == pytest.approx(ours[ORDERS.index(order)], rel=1e-6)
        assert exact > 1.3 * sampled(multiplier, device * example)[ORDERS.index(order)]


def test_an_example_inside_a_clipped_device_moves_it_by_twice_the_clip():
    noise = Noise(4.0)
    ours = against_coordinator(noise, "device", "example", Sampling()).values
    exact = divergence(3, mixture([(1.0, -1.0)], 4.0), mixture([(1.0, 1.0)], 4.0), -80, 80)
    assert ours[ORDERS.index(3)] == pytest.approx(exact, rel=1e-7)


def test_a_round_of_examples_has_no_place_in_an_account_of_devices():
    for against in (against_readers, against_coordinator):
        with pytest.raises(ParameterError, match="bounds nothing for a whole device"):
            against(Noise(3.0), "example", "device", Sampling())


def test_the_coin_for_taking_part_amplifies_against_readers_only():
    coin = Sampling(device=0.1)
    readers = against_readers(Noise(2.0), "device", "device", coin)
    coordinator = against_coordinator(Noise(2.0), "device", "device", coin)
    np.testing.assert_array_equal(
        coordinator.values, against_coordinator(Noise(2.0), "device", "device", Sampling()).values
    )
    assert (readers.values < coordinator.values).all()


def test_figures_against_two_observers_are_never_added():
    readers, coordinator = AgainstReaders(), AgainstCoordinator()
    with pytest.raises(ParameterError, match="two observers"):
        readers + coordinator
    with pytest.raises(ParameterError, match="two observers"):
        Filter(Budget(1.0, 1e-6), 8, readers).spend(coordinator)


def exact_gaussian_delta(epsilon, multiplier):
    """Balle and Wang 2018, arXiv:1805.06530, Theorem 8."""
    a = 1 / (2 * multiplier)
    return norm.cdf(a - epsilon * multiplier) - math.exp(epsilon) * norm.cdf(-a - epsilon * multiplier)


@given(st.floats(0.3, 50), st.sampled_from([1e-3, 1e-5, 1e-8]))
def test_epsilon_is_never_below_the_gaussians_exact_one(multiplier, delta):
    epsilon = against_coordinator(Noise(multiplier), "device", "device", Sampling()).epsilon(delta)
    assert exact_gaussian_delta(epsilon, multiplier) <= delta


@given(multipliers, rates, st.integers(1, 1000), st.floats(1e-10, 1e-3))
def test_conversion_agrees_with_dp_accountings(multiplier, rate, rounds, delta):
    curve = against_readers(Noise(multiplier), "device", "device", Sampling(device=rate)) * rounds
    theirs, order = compute_epsilon(ORDERS, curve.values, delta)
    if theirs > 0:
        assert curve.epsilon(delta) == pytest.approx(theirs, rel=1e-9)
        assert curve.best_order(delta) == order


def test_the_demonstrations_plan_is_2_70_by_rdp():
    curve = against_readers(Noise(3.0), "example", "example", Sampling(example=0.3)) * 40
    assert round(curve.epsilon(1e-4), 2) == 2.70


def test_roundings_beyond_their_bound_come_out_of_delta():
    beta = 1e-12
    curve = against_readers(Noise(3.0), "example", "example", Sampling(), beta) * 1000
    plain = against_readers(Noise(3.0), "example", "example", Sampling()) * 1000
    assert curve.rounding == pytest.approx(1000 * beta)
    assert curve.epsilon(1e-6 + 1e-9) == pytest.approx(plain.epsilon(1e-6))
    assert curve.epsilon(1e-9) == math.inf
    filter_ = Filter.for_rounds(Budget(1e9, 1e-9), curve)
    with pytest.raises(BudgetExceeded, match="too many roundings"):
        filter_.spend(curve)


@given(st.floats(1e-12, 0.5), st.sampled_from(ORDERS))
def test_the_orders_parts_of_delta_and_the_roundings_sum_to_no_more_than_delta(delta, favourite):
    parts = sum((Fraction(math.exp(x)) for x in _log_deltas(delta, favourite)), Fraction())
    assert parts + Fraction(ROUNDING_SHARE * delta) <= Fraction(delta) * (1 + Fraction(1, 10**12))
    assert math.exp(_log_deltas(delta, favourite)[ORDERS.index(favourite)]) == pytest.approx(
        FAVOURITE_SHARE * (1 - ROUNDING_SHARE) * delta
    )


round_kinds = st.builds(
    lambda z, q: against_readers(Noise(z), "device", "device", Sampling(device=q)), st.floats(0.5, 30), rates
)


@given(st.floats(0.1, 20), st.sampled_from([1e-4, 1e-6, 1e-9]), st.lists(round_kinds, min_size=1, max_size=30))
def test_a_filter_lets_through_only_what_its_budget_holds_whatever_rounds_are_chosen(epsilon, delta, kinds):
    budget = Budget(epsilon, delta)
    state = Filter.for_rounds(budget, kinds[0])
    for cost in kinds:
        if state.epsilon_of(state.spent + cost) > epsilon:
            with pytest.raises(BudgetExceeded, match="against readers of the models"):
                state.spend(cost)
            continue
        after = state.spend(cost)
        assert after.epsilon <= epsilon
        assert after.spent.epsilon(delta) <= epsilon  # dividing delta among the orders only costs
        state = after


@pytest.mark.parametrize(("multiplier", "rate", "epsilon"), [(3.0, 0.3, 2.7), (0.8, 0.01, 8.0), (20.0, 1.0, 8.0)])
def test_the_filter_takes_nearly_as_many_equal_rounds_as_planning_them_would(multiplier, rate, epsilon):
    one = against_readers(Noise(multiplier), "device", "device", Sampling(device=rate))
    filter_ = Filter.for_rounds(Budget(epsilon, 1e-5), one)
    rounds = next(n for n in range(1, 10**6) if filter_.epsilon_of(one * n) > epsilon) - 1
    assert (one * rounds).epsilon(1e-5) >= 0.97 * epsilon
    assert (one * (rounds + 1)).epsilon(1e-5) <= 1.03 * epsilon


def test_a_filter_stops_at_its_budget_and_not_beside_it():
    one = against_readers(Noise(3.0), "example", "example", Sampling(example=0.3)) * 40
    needed = Filter(Budget(1.0, 1e-4), 6, AgainstReaders()).epsilon_of(one)
    Filter(Budget(needed * (1 + 1e-9), 1e-4), 6, AgainstReaders()).spend(one)
    with pytest.raises(BudgetExceeded):
        Filter(Budget(needed * (1 - 1e-9), 1e-4), 6, AgainstReaders()).spend(one)


@given(st.floats(1e-6, 1e6), rates, st.sampled_from(ORDERS))
def test_the_larger_direction_is_the_one_that_the_curve_takes(ratio, rate, order):
    # The inequality behind Theorem 5 of Mironov, Talwar and Zhang 2019, pointwise in the density ratio r and 1/r,
    # which an exchange of the two distributions makes equally weighted (weights 1 and r).
    def mixed(r):
        return math.log1p(rate * (r - 1)) if r > 0.5 else math.log(1 - rate + rate * r)

    there, back = mixed(ratio), mixed(1 / ratio)
    forward = np.logaddexp(order * there, math.log(ratio) + order * back)
    reverse = np.logaddexp((1 - order) * there, math.log(ratio) + (1 - order) * back)
    assert forward >= reverse - 1e-9 * (1 + abs(forward))


def test_an_untouched_filter_has_spent_nothing():
    assert Filter.for_rounds(Budget(1.0, 1e-6), AgainstReaders()).epsilon == 0.0


@pytest.mark.parametrize(
    "call",
    [
        lambda: Budget(0.0, 1e-6),
        lambda: Budget(math.nan, 1e-6),
        lambda: Budget(math.inf, 1e-6),
        lambda: Budget(1.0, 0.0),
        lambda: Budget(1.0, 1.0),
        lambda: Noise(0.0),
        lambda: Noise(math.nan),
        lambda: Noise(1.0, -1.0),
        lambda: Noise(1.0, 0.0, 0),
        lambda: Sampling(device=0.0),
        lambda: Sampling(example=1.01),
        lambda: Sampling(device=math.nan),
        lambda: AgainstReaders().epsilon(0.0),
        lambda: AgainstReaders() * -1,
    ],
)
def test_parameters_out_of_range_are_refused(call):
    with pytest.raises(ParameterError):
        call()


def test_the_accountant_of_the_device_adds_less_than_5_mb_to_numpy_and_none_of_the_coordinators_libraries():
    program = """
import json, resource, sys
import numpy, msgspec
before = int(open("/proc/self/statm").read().split()[1])
import edge_sdk.privacy.rdp
after = int(open("/proc/self/statm").read().split()[1])
print(json.dumps([(after - before) * resource.getpagesize(), sorted(m.partition(".")[0] for m in sys.modules)]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True)
    grown, modules = json.loads(done.stdout)
    assert grown < 5 << 20
    assert not {"scipy", "dp_accounting", "cryptography"} & set(modules)
