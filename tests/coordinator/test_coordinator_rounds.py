"""What a round is made of and what becomes of its sum, against the protocol's own code and against definitions."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from fleet import TASK, make_devices, seed
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator import rounds
from coordinator.rounds import Repeat, next_model, noise_at
from coordinator.rows import ContributionRow, ModelRow, RoundRow
from coordinator.task import AdaptiveTable, Planned, Task
from edge_sdk.crypto.hashing import content_hash
from edge_sdk.errors import RoundAborted
from edge_sdk.policy import mechanism_of
from edge_sdk.privacy.mechanism import METRICS, Mechanism, MetricSums, device_metrics, encode
from edge_sdk.protocol import messages, reference
from edge_sdk.protocol.aggregator import Collecting, Done
from edge_sdk.protocol.messages import NoisePlan, Signed
from edge_sdk.protocol.opening import GroupSum

D = 40


def task_of(**replaced) -> Task:
    text = TASK.format(
        name="tiny", publisher="11" * 32, rounds=3, n_max=8, groups=1, expected=5, device_rate=1.0, top="", schedule=""
    )
    task = Task.from_toml(text)
    return msgspec.structs.replace(task, **replaced)


def round_of(
    unit="device", metric_scale=0.0, device_rate=1.0, example_rate=1.0, groups=1, sigma=8.0, devices=9, n_max=8
):
    """A real ticket whose noise is small, so that sums can be compared with what was put in."""
    noise = NoisePlan(unit, 10.0, 1e-3, sigma, metric_scale, 4.0, device_rate, example_rate)
    fleet = reference.make_fleet(seed("rounds"), devices, groups=(1, groups), corrupt=2 if devices > 6 else 1)
    dimension = D + (METRICS if metric_scale else 0)
    return reference.open_ticket(
        fleet, seed("ticket", unit), dimension, n_max=n_max, groups=groups, honest=2, task="tiny", noise=noise
    )


def opened(round_, vectors, metrics=None, groups=None) -> Done:
    """What opening gives for these vectors: encoded and summed as devices and masks do."""
    mechanism = mechanism_of(round_)
    placed = groups or {0: range(len(vectors))}
    sums, reasons = {}, {}
    for group in range(round_.groups):
        members = list(placed.get(group, ()))
        if not members:
            reasons[group] = "too few contributors: left out"
            continue
        total = np.zeros(mechanism.length, np.uint32)
        for i in members:
            own = metrics[i] if metrics is not None else None
            total += encode(mechanism, vectors[i], own, round_.tid, seed("encode", i, round_.tid))
        total &= np.uint32((1 << mechanism.modulus_bits) - 1)
        sums[group] = GroupSum(total, len(members), 1.0, frozenset())
    return Done(round_, sums, reasons, Signed(b"", bytes(64)))


def vectors_of(count, scale=1.0):
    generator = np.random.default_rng(count)
    return [generator.normal(size=D) * scale for _ in range(count)]


PLAIN = {"kind": "fedavg", "learning_rate": 1.0}


def with_optimizer(task, **fields):
    return msgspec.structs.replace(task, optimizer=msgspec.structs.replace(task.optimizer, **fields))


def test_unit_device_moves_by_the_sum_over_the_planned_cohort():
    task, vectors = with_optimizer(task_of(), **PLAIN), vectors_of(4)
    parameters = np.arange(D, dtype=np.float32)
    model = next_model(task, round_of(), opened(round_of(), vectors), parameters, {}, 0, bytes(32))
    expected = parameters + sum(vectors) / 5  # five were planned, four came: who looks must not see it
    assert model.parameters == pytest.approx(expected, abs=8e-3 * 4)
    assert (model.metrics, model.clip, model.steady_noise) == ({}, 10.0, False)


def test_unit_device_with_weights_divides_by_the_planned_weight():
    base = with_optimizer(task_of(), **PLAIN)
    task = msgspec.structs.replace(base, cohort=msgspec.structs.replace(base.cohort, mean_weight=0.25))
    vectors = vectors_of(4)
    model = next_model(task, round_of(), opened(round_of(), vectors), np.zeros(D, np.float32), {}, 0, bytes(32))
    assert model.parameters == pytest.approx(sum(vectors) / (5 * 0.25), abs=0.1)


def test_unit_example_moves_against_the_gradient_over_the_planned_examples():
    base = with_optimizer(task_of(unit="example"), **PLAIN)
    task = msgspec.structs.replace(
        base,
        cohort=msgspec.structs.replace(base.cohort, examples=20.0),
        privacy=msgspec.structs.replace(base.privacy, example_rate=0.5),
    )
    round_, vectors = round_of("example", example_rate=0.5), vectors_of(4, scale=30.0)
    model = next_model(task, round_, opened(round_, vectors), np.zeros(D, np.float32), {}, 0, bytes(32))
    assert model.parameters == pytest.approx(-sum(vectors) / (5 * 20 * 0.5), abs=8e-3)


def test_a_group_without_a_sum_takes_its_share_of_the_plan_along():
    task, vectors = with_optimizer(task_of(), **PLAIN), vectors_of(3)
    round_ = round_of(groups=2, devices=16, n_max=16)
    done = opened(round_, vectors, groups={1: range(3)})
    model = next_model(task, round_, done, np.zeros(D, np.float32), {}, 0, bytes(32))
    assert model.parameters == pytest.approx(sum(vectors) / (5 * 1 / 2), abs=0.1)


def test_without_any_sum_there_is_no_model():
    round_ = round_of()
    done = Done(round_, {}, {0: "no sum passes the checks"}, Signed(b"", bytes(64)))
    with pytest.raises(RoundAborted, match="no sum passes"):
        next_model(task_of(), round_, done, np.zeros(D, np.float32), {}, 0, bytes(32))


def test_metrics_come_out_of_the_same_sum():
    round_, vectors = round_of(metric_scale=2.0), vectors_of(4)
    mechanism = mechanism_of(round_)
    metrics = [device_metrics(mechanism, v, 10.0, 10.0 - i, 5.0) for i, v in enumerate(vectors)]
    done = opened(round_, vectors, metrics)
    model = next_model(with_optimizer(task_of(), **PLAIN), round_, done, np.zeros(D, np.float32), {}, 0, bytes(32))
    assert model.metrics["count"] == pytest.approx(4, abs=0.05)
    assert model.metrics["accuracy"] == pytest.approx(0.85, abs=0.02)
    assert model.metrics["loss"] == pytest.approx(0.5, abs=0.02)
    assert model.metrics["unclipped"] == pytest.approx(1.0, abs=0.02)


def test_metrics_of_a_sum_that_noise_left_nothing_of_are_not_divided():
    assert rounds.shown_metrics(MetricSums(-0.5, 1.0, 1.0, 1.0)) == {"count": -0.5}
    assert rounds.shown_metrics(MetricSums(2.0, 3.0, -1.0, 1.0)) == {
        "count": 2.0, "accuracy": 1.0, "loss": 0.0, "unclipped": 0.5,
    }  # fmt: skip


def test_the_next_clip_follows_the_quantile():
    base = with_optimizer(task_of(), **PLAIN)
    task = msgspec.structs.replace(
        base, privacy=msgspec.structs.replace(base.privacy, adaptive=AdaptiveTable(0.1, 100.0, 0.5, 0.2))
    )
    round_, vectors = round_of(metric_scale=2.0), vectors_of(4)
    mechanism = mechanism_of(round_)
    metrics = [device_metrics(mechanism, v, 1.0, 1.0, 0.0) for v in vectors]
    model = next_model(task, round_, opened(round_, vectors, metrics), np.zeros(D, np.float32), {}, 0, bytes(32))
    assert model.clip == pytest.approx(10 * np.exp(-0.2 * 0.5), rel=0.01)  # all were unclipped: it shrinks


@settings(max_examples=20)
@given(clip=st.floats(1e-3, 1e3))
def test_another_clip_changes_no_step_and_so_no_cost(clip):
    planned = NoisePlan("device", 2.0, 1e-3, 100.0, 0.5, 4.0, 1.0, 1.0)
    scaled = noise_at(planned, clip)
    base = {"unit": "device", "dimension": D, "honest": 4, "modulus_bits": 20, "loss_bound": 4.0}

    def of(noise):
        return Mechanism(
            clip=noise.clip, granularity=noise.granularity, sigma=noise.sigma, metric_scale=noise.metric_scale, **base
        )

    assert of(scaled).noise_multiplier == pytest.approx(of(planned).noise_multiplier, rel=1e-9)
    assert of(scaled) == of(planned).scaled(clip)


def test_missing_shares_are_made_up_for_to_one_level():
    """Whether 4 or 6 of 8 came, what is published carries the noise of 8 shares."""
    round_ = round_of(device_rate=0.5, sigma=2000.0, devices=9, n_max=8)
    mechanism = mechanism_of(round_)
    task = with_optimizer(task_of(), **PLAIN)
    levels = []
    for came in (4, 6):
        done = opened(round_, [np.zeros(D)] * came)
        samples = []
        for k in range(200):
            model = next_model(task, round_, done, np.zeros(D, np.float32), {}, 0, seed("noise", came, k))
            samples.append(model.parameters * 5 / mechanism.granularity)
            assert model.steady_noise
        added = np.std(np.array(samples) - np.mean(samples, axis=0))
        levels.append(added**2 / mechanism.share_sigma**2)
    assert levels == pytest.approx([4, 2], rel=0.1)


def test_no_noise_is_added_where_the_account_does_not_rest_on_it():
    task, round_ = with_optimizer(task_of(), **PLAIN), round_of(sigma=2000.0)
    done = opened(round_, vectors_of(4))
    first, second = (
        next_model(task, round_, done, np.zeros(D, np.float32), {}, 0, bytes([k]) * 32).parameters for k in (1, 2)
    )
    assert (first == second).all()


def test_missing_noise_is_drawn_in_parts_where_one_would_be_too_wide():
    mechanism = Mechanism("device", 2000, 1.0, 1e-7, 1.4e7, 2, 30)
    noise = rounds.missing_noise(mechanism, 9, bytes(32))
    assert np.std(noise) == pytest.approx(3 * mechanism.share_sigma, rel=0.06)
    assert (rounds.missing_noise(mechanism, 0, bytes(32)) == 0).all()


def test_repeats_come_after_growing_delays_up_to_the_longest():
    repeat, times, now = Repeat.after(0.0, 1.0), [], 0.0
    repeat.most_s = 5.0
    while len(times) < 6:
        if repeat.is_due(now):
            times.append(now)
        now += 0.25
    assert np.diff(times).tolist() == [2.0, 4.0, 5.0, 5.0, 5.0]


def test_the_published_set_hash_needs_its_salt():
    assert rounds.set_hash(b"a" * 32, b"s" * 32) != rounds.set_hash(b"b" * 32, b"s" * 32)
    assert rounds.set_hash(b"a" * 32, b"s" * 32) != rounds.set_hash(b"a" * 32, b"t" * 32)
    assert rounds.set_hash(b"a" * 32, b"s" * 32) != content_hash(b"a" * 32 + b"s" * 32)


def test_a_ticket_is_open_no_shorter_than_the_task_says():
    task = task_of()
    closes, expires = rounds.ticket_times(task, 1000.3)
    assert closes >= 1000.3 + task.schedule.open_s
    assert expires - closes >= task.schedule.answer_s


def planned_of(**fields) -> Planned:
    base = {
        "bundle": bytes(32), "dimension": D, "n_max": 8, "honest": 2, "groups": 1,
        "noise": NoisePlan("device", 1.0, 1e-3, 100.0, 0.0, 1.0, 1.0, 1.0), "delta": 1e-4,
        "readers": [(1, 0.5), (3, 1.0)], "coordinator": [(1, 0.6), (3, 1.2)],
        "ledger_readers": 1.0, "ledger_coordinator": 1.0, "text": "",
    }  # fmt: skip
    return Planned(**{**base, **fields})


@pytest.mark.parametrize(
    ("plan", "takes_part", "expires_s", "reason"),
    [
        ({}, 4, 0, "4 devices may take part, and the task plans with 5"),
        ({"groups": 3}, 9, 0, "no round of 3 groups"),
        ({"honest": 7}, 9, 0, "9 contributors are needed, and a round takes 8"),
        ({}, 9, 1 << 30, "the epoch ends"),
        ({}, 9, 0, None),
    ],
)
def test_why_there_is_no_ticket(plan, takes_part, expires_s, reason):
    epoch = round_of().epoch
    found = rounds.why_not_yet(task_of(), planned_of(**plan), epoch, takes_part, expires_s)
    assert (found is None) if reason is None else (reason in found)


def test_figures_are_the_plans_and_beyond_it_by_rdp_and_never_less():
    planned, task = planned_of(), task_of()
    inside = rounds.spent(task, planned, published=2, sends=1)
    assert (inside.readers, inside.readers_method) == (1.0, "pld")
    assert (inside.coordinator, inside.coordinator_method) == (0.6, "pld")
    beyond = rounds.spent(task, planned, published=3, sends=9)
    assert (beyond.readers_method, beyond.coordinator_method) == ("pld", "rdp")
    assert beyond.coordinator > 0
    further = rounds.spent(task, planned, published=3, sends=10)
    assert further.coordinator > beyond.coordinator
    assert rounds.spent(task, planned, 0, 0).readers == 0.0


def test_what_is_in_rows_is_the_state_that_was_stored():
    round_ = round_of()
    row = RoundRow(round_.tid, "tiny", 0, 1, b"", 0, "COLLECT", 0.0, None, None, None, None, None, "")
    signed = messages.sign(make_devices(1)[0].identity, messages.Receipt(bytes(32), 0, bytes(32)))
    contribution = ContributionRow(0, 3, b"d" * 32, messages.encode(signed))
    state = rounds.restore(round_, row, [contribution], {2: frozenset({3})}, {}, {})
    assert isinstance(state, Collecting)
    assert state.entries[3].digest == b"d" * 32
    assert state.entries[3].group == round_.epoch.group_of(3, 1)
    assert state.complaints == {2: frozenset({3})}


def test_the_account_charges_a_device_that_was_sealed_but_not_certified_as_left_out():
    round_ = round_of()
    seal = messages.Seal(round_.tid, [[(i, bytes(32)) for i in range(5)]])
    signed = messages.encode(Signed(messages.encode(seal), bytes(64)))
    rows = [ContributionRow(i, i, bytes(32), None) for i in range(6)]
    numbers = {i: 100 + i for i in range(6)}
    base = (round_.tid, "tiny", 0, 1, b"", 0, "ABORTED", 0.0, 1.0)
    sealed = rounds.round_record(round_, RoundRow(*base, signed, None, None, None, ""), rows, numbers, published=False)
    assert (sealed.included, len(sealed.left_out)) == ((), 6)
    certified = rounds.round_record(
        round_, RoundRow(*base, signed, b"certificate", None, None, ""), rows, numbers, published=True
    )
    assert certified.included == ((100, 101, 102, 103, 104),)
    assert certified.left_out == (105,)


def test_the_ticket_names_what_the_model_and_the_plan_say():
    fleet = reference.make_fleet(seed("rounds"), 9, corrupt=2)
    model = ModelRow("tiny", 4, b"p" * 32, None, None, None, 2.0, 5.0, None, None, {}, 0.0)
    ticket = rounds.make_ticket(
        task_of(), planned_of(n_max=100), fleet.epoch, model, number=7, previous=b"t" * 32, offers=[], now_s=10.0
    )
    assert (ticket.round, ticket.previous, ticket.parameters) == (7, b"t" * 32, b"p" * 32)
    assert (ticket.n_max, ticket.noise.clip, ticket.noise.granularity) == (9, 2.0, 2e-3)
