"""The server optimisers against their definitions, and what they refuse."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.optimizer import Optimizer, Schedule, pack_memory, unpack_memory
from edge_sdk.errors import ParameterError, PeerError, RoundAborted

KINDS = ("fedavg", "fedavgm", "fedadam", "fedyogi")


def by_hand(kind, lr, beta1, beta2, tau, start, updates):
    """Algorithm 2 of arXiv:2003.00295, one coordinate at a time, in Python's own floats."""
    x, m, v = list(start), [0.0] * len(start), [tau**2] * len(start)
    for update in updates:
        for i, u in enumerate(update):
            if kind == "fedavg":
                x[i] += lr * u
            elif kind == "fedavgm":
                m[i] = beta1 * m[i] + u
                x[i] += lr * m[i]
            else:
                m[i] = beta1 * m[i] + (1 - beta1) * u
                if kind == "fedadam":
                    v[i] = beta2 * v[i] + (1 - beta2) * u * u
                else:
                    sign = (v[i] > u * u) - (v[i] < u * u)
                    v[i] -= (1 - beta2) * u * u * sign
                x[i] += lr * m[i] / (math.sqrt(v[i]) + tau)
    return x


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25)
@given(updates=st.lists(st.lists(st.floats(-8, 8), min_size=3, max_size=3), min_size=1, max_size=6))
def test_each_rule_is_the_papers(kind, updates):
    optimizer = Optimizer(kind=kind, learning_rate=0.3, momentum=0.8, beta2=0.95, tau=1e-2)
    parameters = np.array([1.0, -2.0, 0.5], np.float32)
    memory = optimizer.start(3)
    expected = by_hand(kind, 0.3, 0.8, 0.95, 1e-2, parameters.tolist(), updates)
    for number, update in enumerate(updates):
        parameters, memory = optimizer.step(parameters, np.array(update), memory, number)
        memory = unpack_memory(pack_memory(memory))
    # Yogi's sign may fall otherwise where v and u^2 are equal in float64 and differ by float32's rounding
    assert parameters == pytest.approx(expected, rel=2e-4, abs=2e-4 if kind != "fedyogi" else 2e-2)
    assert parameters.dtype == np.float32


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_changes_nothing_that_it_was_given(kind):
    optimizer = Optimizer(kind=kind)
    parameters, memory = np.ones(4, np.float32), optimizer.start(4)
    before = {name: array.copy() for name, array in memory.items()}
    optimizer.step(parameters, np.full(4, 0.5), memory, 0)
    assert (parameters == 1).all()
    assert all((memory[name] == before[name]).all() for name in before)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["parameters", "update", "momentum"])
def test_nan_and_infinity_are_refused_by_name(bad, place):
    optimizer = Optimizer(kind="fedavgm")
    arrays = {"parameters": np.zeros(3, np.float32), "update": np.zeros(3), "momentum": np.zeros(3, np.float32)}
    arrays[place][1] = bad
    with pytest.raises(ParameterError, match=place):
        optimizer.step(arrays["parameters"], arrays["update"], {"momentum": arrays["momentum"]}, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_out_of_float32s_range_leaves_the_model(kind):
    with pytest.raises(RoundAborted, match="float32"):
        Optimizer(kind=kind, learning_rate=1e6).step(
            np.full(2, 3e38, np.float32), np.full(2, 1e60), Optimizer(kind=kind).start(2), 0
        )


def test_a_memory_of_another_rule_or_size_is_refused():
    update, parameters = np.zeros(3), np.zeros(3, np.float32)
    with pytest.raises(ParameterError, match="memory"):
        Optimizer(kind="fedadam").step(parameters, update, Optimizer(kind="fedavgm").start(3), 0)
    with pytest.raises(ParameterError, match="memory"):
        Optimizer(kind="fedavgm").step(parameters, update, Optimizer(kind="fedavgm").start(4), 0)
    with pytest.raises(ParameterError, match="float64"):
        Optimizer().step(parameters, update.astype(np.float32), {}, 0)


def test_schedules_say_what_they_are():
    assert [Schedule().factor_at(n) for n in (0, 9)] == [1.0, 1.0]
    step = Schedule(kind="step", every=2, factor=0.5)
    assert [step.factor_at(n) for n in range(5)] == [1.0, 1.0, 0.5, 0.5, 0.25]
    cosine = Schedule(kind="cosine", over=4, floor=0.1)
    assert [cosine.factor_at(n) for n in (0, 2, 4, 9)] == pytest.approx([1.0, 0.55, 0.1, 0.1])
    warm = Schedule(kind="step", every=1, factor=0.5, warmup=1)
    assert [warm.factor_at(n) for n in range(3)] == [0.5, 1.0, 0.5]


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x81\xa1a\xc4\x03abc", b"\x93\x01\x02\x03"])
def test_a_damaged_memory_is_refused(data):
    with pytest.raises(PeerError, match="optimiser state"):
        unpack_memory(data)
