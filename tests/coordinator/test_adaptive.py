"""The clip goes to the quantile that was asked for, within its bounds, and what a round costs stays what it was."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.adaptive import AdaptiveClip
from edge_sdk.crypto.stream import KeyStream
from edge_sdk.errors import ParameterError
from edge_sdk.privacy.ledger_entry import Release
from edge_sdk.privacy.mechanism import Mechanism, MetricSums, decode, device_metrics, encode
from edge_sdk.privacy.rdp import Sampling

WIDE = AdaptiveClip(1e-6, 1e6)
MEDIAN = MetricSums(100.0, 0.0, 0.0, 50.0)


def share(unclipped, count=100.0):
    return MetricSums(count, 0.0, 0.0, unclipped)


def test_the_update_is_the_papers():
    clip = AdaptiveClip(1e-6, 1e6, quantile=0.4, rate=0.3)
    assert clip.next(2.0, share(70.0)) == pytest.approx(2.0 * math.exp(-0.3 * (0.7 - 0.4)))
    assert clip.next(2.0, share(40.0)) == 2.0


@pytest.mark.parametrize("quantile", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("start", [1e-3, 1.0, 1e3])
def test_without_noise_the_clip_goes_to_the_quantile_of_the_norms(quantile, start):
    norms = np.exp(np.linspace(-2, 2, 1001))
    rule, clip = AdaptiveClip(1e-6, 1e6, quantile), start
    for _ in range(600):
        clip = rule.next(clip, share(float((norms <= clip).sum()), 1001.0))
    assert (norms <= clip).mean() == pytest.approx(quantile, abs=0.01)


def test_through_the_real_mechanism_the_clip_finds_the_median_and_every_round_costs_the_same():
    """100 devices whose changes are 0.5 to 2 long; the first clip is ten times too large."""
    n, d, rounds = 100, 60, 60
    base = Mechanism("device", d, 10.0, 10.0 / 3000, 1e4, n, 18, metric_scale=2.0, loss_bound=1.0)
    base = replace(base, sigma=base.sensitivity_steps)
    cost = Release.of(base, Sampling()).costs("device")[1].values
    directions = KeyStream(bytes(32)).words64(n * d).astype(np.float64).reshape(n, d) - 2.0**63
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    lengths = np.exp(np.linspace(math.log(0.5), math.log(2.0), n))
    rule, clip, seen = AdaptiveClip(0.01, 100.0), base.clip, []
    for number in range(rounds):
        mechanism = base.scaled(clip)
        assert Release.of(mechanism, Sampling()).costs("device")[1].values == pytest.approx(cost, rel=1e-12)
        total = np.zeros(mechanism.length, np.uint32)
        for i in range(n):
            vector = lengths[i] * directions[i]
            metrics = device_metrics(mechanism, vector, 1.0, 0.0, 0.0)
            key = (number * n + i + 1).to_bytes(32, "little")
            total += encode(mechanism, vector, metrics, bytes(32), key)
        decoded = decode(mechanism, total, bytes(32)).metrics
        clip = rule.next(clip, decoded)
        seen.append(clip)
    assert 0.8 < np.mean(seen[-20:]) < 1.25


@given(
    st.floats(1e-6, 1e6),
    st.floats(-1e300, 1e300),
    st.floats(-1e300, 1e300),
    st.floats(0.01, 0.99),
    st.floats(0.01, 2.0),
)
def test_whatever_noise_says_a_step_is_bounded_and_so_is_the_clip(clip, unclipped, count, quantile, rate):
    rule = AdaptiveClip(1e-3, 1e3, quantile, rate)
    moved = rule.next(clip, share(unclipped, count))
    assert 1e-3 <= moved <= 1e3
    inside = min(max(clip, 1e-3), 1e3)
    assert inside * math.exp(-rate) <= moved * (1 + 1e-12)
    assert moved <= inside * math.exp(rate) * (1 + 1e-12)


def test_a_round_whose_noise_left_no_units_moves_nothing():
    for count in (0.0, -3.0):
        assert WIDE.next(2.0, share(5.0, count)) == 2.0


@pytest.mark.parametrize(
    "call",
    [
        lambda: AdaptiveClip(0.0, 1.0),
        lambda: AdaptiveClip(2.0, 1.0),
        lambda: AdaptiveClip(math.nan, 1.0),
        lambda: AdaptiveClip(1.0, math.inf),
        lambda: AdaptiveClip(1.0, 2.0, quantile=0.0),
        lambda: AdaptiveClip(1.0, 2.0, quantile=1.0),
        lambda: AdaptiveClip(1.0, 2.0, quantile=math.nan),
        lambda: AdaptiveClip(1.0, 2.0, rate=0.0),
        lambda: AdaptiveClip(1.0, 2.0, rate=math.nan),
        lambda: WIDE.next(0.0, MEDIAN),
        lambda: WIDE.next(math.nan, MEDIAN),
        lambda: WIDE.next(1.0, share(math.nan)),
        lambda: WIDE.next(1.0, share(1.0, math.inf)),
    ],
)
def test_what_is_no_rule_no_clip_or_no_metric_is_refused(call):
    with pytest.raises(ParameterError):
        call()
