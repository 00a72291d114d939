"""A device's policy: what its TOML may say, and what it refuses in a ticket that the protocol finds in order."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache

import msgspec
import numpy as np
import pytest

from edge_sdk.errors import ParameterError, PeerError
from edge_sdk.ledger import Ledger, create_ledger
from edge_sdk.policy import Policy, default_policy_toml, mechanism_of, sampling_of
from edge_sdk.privacy.ledger_entry import Account, Draw, Limits, Release, Send
from edge_sdk.privacy.mechanism import Mechanism, MetricSums, encode
from edge_sdk.privacy.rdp import Budget, Sampling
from edge_sdk.protocol import reference
from edge_sdk.protocol.messages import NoisePlan, Signed
from edge_sdk.protocol.rounds import Round

ENTROPY = bytes(range(32))
PUBLISHER = b"\x07" * 32
NOTHING = MetricSums(0.0, 0.0, 0.0, 0.0)


def mechanism(unit="example", multiplier=3.0, honest=3):
    draft = Mechanism(
        unit=unit, dimension=97, clip=0.5, granularity=1e-4, sigma=1e4, honest=honest, modulus_bits=24,
        metric_scale=0.05, loss_bound=2.0,
    )  # fmt: skip
    return replace(draft, sigma=multiplier * draft.sensitivity_steps)


@cache
def fleet():
    return reference.make_fleet(ENTROPY, 8)


@cache
def round_of(mechanism, task="keywords", dimension=None, device_rate=1.0, example_rate=1.0, devices=8, **changes):
    noise = NoisePlan(
        mechanism.unit, mechanism.clip, mechanism.granularity, mechanism.sigma,
        mechanism.metric_scale, mechanism.loss_bound, device_rate, example_rate,
    )  # fmt: skip
    noise = msgspec.structs.replace(noise, **changes)
    return reference.open_ticket(
        reference.make_fleet(ENTROPY, devices),
        ENTROPY,
        dimension or mechanism.length,
        n_max=devices,
        honest=mechanism.honest,
        noise=noise,
        task=task,
    )


def toml(**changes):
    fields = {
        "protects": '"example"',
        "min_honest": "3",
        "min_noise_multiplier": "0.5",
        "authorities": f'["{fleet().epoch.frozen.fleet.hex()}"]',
        "operators": f'["{fleet().coordinator.public_key.hex()}", "{"ab" * 32}"]',
        "publishers": f'["{PUBLISHER.hex()}"]',
    } | changes
    lines = [f"{name} = {value}" for name, value in fields.items() if value is not None]
    return (
        "\n".join(lines)
        + """
[lifetime]
readers = {epsilon = 8.0, delta = 1e-6}
coordinator = {epsilon = 20.0, delta = 1e-6}
[tasks.keywords]
[tasks.keywords.limits]
readers = {epsilon = 2.75, delta = 1e-4}
coordinator = {epsilon = 2.75, delta = 1e-4}
[tasks.narrow]
operators = ["ABAB"]
[tasks.strict]
min_honest = 5
min_noise_multiplier = 4.0
publishers = []
""".replace("ABAB", "ab" * 32)
    )


def policy(**changes):
    return Policy.from_toml(toml(**changes))


def test_a_policy_is_read_whole():
    read = policy(max_device_rate="0.5")
    assert read.lifetime == Limits(Budget(8.0, 1e-6), Budget(20.0, 1e-6))
    assert read.task_limits == {"keywords": Limits(Budget(2.75, 1e-4), Budget(2.75, 1e-4))}
    assert read.max_device_rate == 0.5


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"min_honest": "1"}, "min_honest"),
        ({"min_honest": None}, "min_honest"),
        ({"min_noise_multiplier": "0.0"}, "min_noise_multiplier"),
        ({"min_noise_multiplier": "nan"}, "min_noise_multiplier"),
        ({"max_device_rate": "0.0"}, "max_device_rate"),
        ({"max_device_rate": "1.5"}, "max_device_rate"),
        ({"protects": '"both"'}, "protects"),
        ({"authorities": "[]"}, "authorities"),
        ({"operators": '["abc"]'}, "operators"),
        ({"publishers": None}, "publishers"),
        ({"min_honnest": "3"}, "min_honnest"),
    ],
)
def test_a_policy_with_a_mistake_is_refused_by_the_fields_name(changes, named):
    with pytest.raises(ParameterError, match=named):
        policy(**changes)


@pytest.mark.parametrize(
    "broken",
    [
        toml().replace("epsilon = 8.0", "epsilon = -8.0"),
        toml().replace("epsilon = 8.0", "epsilon = inf"),
        toml().replace("delta = 1e-6", "delta = 1.0"),
        toml().replace("[lifetime]\nreaders", "[lifetime]\nreader"),
        toml().replace("coordinator = {epsilon = 20.0, delta = 1e-6}\n", ""),
        toml().replace("[lifetime]", "[lifetime"),
        toml().replace("[tasks.keywords]\n", "[tasks.KEYWORDS]\n"),
        "",
    ],
)
def test_a_policy_that_says_no_budget_is_refused(broken):
    with pytest.raises(ParameterError, match="policy: "):
        Policy.from_toml(broken)


def test_the_policy_in_the_modules_text_is_one():
    import edge_sdk.policy

    text = (edge_sdk.policy.__doc__ or "").partition("A policy in full:\n")[2]
    read = Policy.from_toml(text.replace("<public key in hex>", "cd" * 32))
    assert read.tasks["keywords"].operators == ("cd" * 32,)


def test_a_round_within_the_policy_is_allowed():
    policy().check_round(round_of(mechanism()))
    assert PUBLISHER in policy().publishers_of("keywords")
    policy().terms("keywords", bytes(32)).check(round_of(mechanism()))


def test_an_authority_that_is_not_listed_is_refused():
    with pytest.raises(PeerError, match="fleet authority"):
        policy(authorities=f'["{"cd" * 32}"]').check_round(round_of(mechanism()))


def test_an_operator_that_is_not_listed_is_refused():
    with pytest.raises(PeerError, match="operator"):
        policy(operators=f'["{"cd" * 32}"]').check_round(round_of(mechanism()))


def test_a_task_may_have_fewer_operators_than_the_device():
    with pytest.raises(PeerError, match="operator"):
        policy().check_round(round_of(mechanism(), "narrow"))


def test_a_tasks_list_does_not_add_to_the_devices():
    assert policy(publishers=f'["{"cd" * 32}"]').publishers_of("keywords") == (b"\xcd" * 32,)
    with pytest.raises(PeerError, match="no publisher of task strict"):
        policy().publishers_of("strict")


def test_a_task_that_is_not_listed_is_refused_everywhere():
    for refused in (
        lambda: policy().check_round(round_of(mechanism(), "other")),
        lambda: policy().terms("other", bytes(32)),
        lambda: policy().publishers_of("other"),
    ):
        with pytest.raises(PeerError, match="task other is not among"):
            refused()


def test_noise_below_the_floor_is_refused_with_all_that_one_unit_adds_counted():
    weak = mechanism(multiplier=0.49)
    with pytest.raises(PeerError, match=r"below this device's floor of 0\.5"):
        policy().check_round(round_of(weak))
    # The clip alone would let it pass: metrics and rounding add to what one example moves.
    assert weak.sigma * weak.granularity / weak.clip > 0.5


def test_a_stricter_task_raises_the_floors():
    terms = policy().terms("strict", bytes(32))
    assert (terms.min_honest, terms.min_noise_multiplier) == (5, 4.0)
    with pytest.raises(PeerError, match="floor of 4"):
        policy().check_round(round_of(mechanism(), "strict"))


def test_a_cohort_below_the_least_is_refused_by_the_terms():
    small = mechanism(honest=2)
    with pytest.raises(PeerError, match="cohort of 2 honest devices"):
        policy().terms("keywords", bytes(32)).check(round_of(small))


def test_a_refusal_names_the_key_of_the_policy_that_asks_for_more():
    def refusal(check):
        with pytest.raises(PeerError) as refused:
            check()
        return str(refused.value).rpartition(" (policy.toml: ")[2]

    def terms(task, bundle=bytes(32)):
        return policy(min_honest="4").terms(task, bundle)

    small, weak = round_of(mechanism(honest=3)), round_of(mechanism(honest=6, multiplier=0.49))
    assert refusal(lambda: terms("keywords").check(small)) == "min_honest)"
    assert refusal(lambda: terms("strict").check(small)) == "tasks.strict.min_honest)"
    assert refusal(lambda: terms("keywords").check(weak)) == "min_noise_multiplier)"
    assert refusal(lambda: terms("strict").check(weak)) == "tasks.strict.min_noise_multiplier)"
    assert refusal(lambda: policy().check_round(weak)) == "min_noise_multiplier)"
    assert refusal(lambda: terms("keywords", b"b" * 32).check(small)).startswith("ticket: bundle ")


def test_rounds_of_examples_are_refused_where_whole_devices_are_protected():
    with pytest.raises(PeerError, match="protects no whole device"):
        policy(protects='"device"').check_round(round_of(mechanism()))


def test_taking_part_more_often_than_allowed_is_refused():
    with pytest.raises(PeerError, match=r"ticket: device_rate 0\.51 .*0\.5"):
        policy(max_device_rate="0.5").check_round(round_of(mechanism(), device_rate=0.51))
    policy(max_device_rate="0.5").check_round(round_of(mechanism(), device_rate=0.5, example_rate=0.9))


@pytest.mark.parametrize("unit", ["device", "example"])
@pytest.mark.parametrize("metric_scale", [0.0, 0.05])
def test_the_mechanism_of_a_round_is_the_one_that_its_ticket_was_made_from(unit, metric_scale):
    asked = replace(mechanism(unit), metric_scale=metric_scale)
    round_ = round_of(asked, example_rate=1.0 if unit == "device" else 0.3, device_rate=0.7)
    assert mechanism_of(round_) == asked
    assert sampling_of(round_) == Sampling(0.7, 1.0 if unit == "device" else 0.3)
    assert encode(asked, np.zeros(97), NOTHING if metric_scale else None, round_.tid, ENTROPY).shape == (
        round_.ticket.dimension,
    )
    assert round_.ticket.dimension == 97 + (4 if metric_scale else 0)


def test_the_modulus_of_a_rounds_mechanism_is_what_its_n_max_leaves():
    for devices, bits in [(8, 24), (16, 23)]:
        assert mechanism_of(round_of(mechanism(), devices=devices)).modulus_bits == bits


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sigma": 0.001}, "sigma"),
        ({"sigma": 1e20}, "sigma"),
        ({"granularity": 1e-29}, "granularity"),
        ({"granularity": 1e-200}, "granularity"),
        ({"clip": 1e-300}, "clip"),
        ({"loss_bound": 1e-300}, "loss_bound"),
        ({"metric_scale": 1e-300}, "metric_scale"),
        ({"metric_scale": 1e29, "loss_bound": 1e29}, "granularity"),
        ({"dimension": 4}, "dimension"),
        ({"dimension": 1}, "dimension"),
    ],
)
def test_a_ticket_whose_numbers_make_no_mechanism_is_the_coordinators_fault_by_the_fields_name(changes, named):
    round_ = round_of(mechanism(), **changes)
    for refused in (lambda: mechanism_of(round_), lambda: policy().check_round(round_)):
        with pytest.raises(PeerError, match=rf"ticket: {named}\b"):
            refused()


def test_policy_round_and_ledger_fit_together(tmp_path):
    rules, round_ = policy(), round_of(mechanism(), example_rate=0.3)
    rules.check_round(round_)
    create_ledger(tmp_path / "ledger", fleet().devices[0].public_key)
    owner = fleet().devices[0].public_key
    with Ledger(tmp_path / "ledger", owner, rules.protects, rules.lifetime, rules.task_limits) as ledger:
        release = Release.of(mechanism_of(round_), sampling_of(round_))
        assert isinstance(round_, Round)
        assert isinstance(round_.signed, Signed)
        ticket = round_.ticket
        operator = round_.epoch.frozen.coordinator
        assert ledger.draw(ticket.task, ticket.round, round_.tid, operator, release, os.urandom(32), 5)
        ledger.charge(round_.tid, bytes(32), 6)
        assert ledger.account.totals("keywords").coordinator.epsilon > 0


# What a freshly joined device starts with


def joined(tasks=("digits",), **changes):
    frozen = fleet().epoch.frozen
    return Policy.from_toml(default_policy_toml(frozen.fleet, frozen.coordinator, [PUBLISHER], tasks, **changes))


def test_the_default_policy_lists_exactly_what_it_was_given():
    read = joined(["digits", "voice.v2"])
    assert read.authorities == (fleet().epoch.frozen.fleet.hex(),)
    assert read.operators == (fleet().coordinator.public_key.hex(),)
    assert read.publishers == (PUBLISHER.hex(),)
    assert set(read.tasks) == {"digits", "voice.v2"}
    assert (read.protects, joined(protects="device").protects) == ("example", "device")
    assert joined([]).tasks == {}


def test_the_default_policy_is_cautious():
    read = joined()
    assert (read.min_honest, read.min_noise_multiplier) == (10, 1.0)
    task = read.task_limits["digits"]
    for limits in (read.lifetime, task):
        assert limits.readers.delta <= 1e-6
        assert limits.coordinator.delta <= 1e-6
    assert task.readers.epsilon < read.lifetime.readers.epsilon <= 8
    assert task.coordinator.epsilon < read.lifetime.coordinator.epsilon <= 12


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"authority": bytes(31)}, "authority"),
        ({"operator": b""}, "operator"),
        ({"publishers": [bytes(33)]}, "publisher"),
        ({"publishers": []}, "publishers"),
        ({"tasks": ["*"]}, "task"),
        ({"tasks": [""]}, "task"),
        ({"tasks": ["x" * 65]}, "task"),
        ({"tasks": ['a"]\nmin_honest = 2\n["']}, "task"),
        ({"tasks": ["a\n"]}, "task"),
        ({"tasks": ["a", "a"]}, "twice"),
        ({"protects": 'device"\nmin_honest = 2 #'}, "policy"),
    ],
)
def test_a_default_policy_of_what_cannot_be_written_is_refused(changes, named):
    arguments = {"authority": bytes(32), "operator": bytes(32), "publishers": [bytes(32)], "tasks": ["a"]} | changes
    with pytest.raises(ParameterError, match=named):
        default_policy_toml(**arguments)


@pytest.mark.parametrize(("unit", "sampling"), [("example", Sampling(example=0.3)), ("device", Sampling(device=0.3))])
def test_the_default_policy_lets_a_plan_of_forty_rounds_run_to_its_end_where_the_task_is_allowed(unit, sampling):
    rules = joined()
    account = Account(rules.protects if unit == "example" else unit, rules.lifetime, rules.task_limits)
    release = Release.of(mechanism(unit, multiplier=3.0, honest=14), sampling)
    for number in range(40):
        tid = number.to_bytes(32, "little")
        entry = Draw("digits", number, tid, bytes(32), release, takes_part=True, time_s=0)
        account.check(entry)
        account.record(entry)
        if unit == "example" or number % 3 == 0:
            account.check(Send(tid, bytes(32), 0))
            account.record(Send(tid, bytes(32), 0))


def test_the_default_policy_refuses_a_task_that_the_owner_did_not_allow():
    ten = round_of(mechanism(honest=6), "digits")
    with pytest.raises(PeerError, match="cohort of 6"):
        joined().terms("digits", bytes(32)).check(ten)
    joined().check_round(ten)
    with pytest.raises(PeerError, match="task keywords is not among"):
        joined().check_round(round_of(mechanism()))
    with pytest.raises(PeerError, match="floor of 1"):
        joined().check_round(round_of(mechanism(multiplier=0.9), "digits"))
