"""The task file: what is read from it, and how it says what is wrong."""

from __future__ import annotations

import inspect
import re
import textwrap
from itertools import pairwise

import msgspec
import pytest
from training import tiny_models as tiny

import coordinator.task
from coordinator import accounting
from coordinator.errors import StoreError
from coordinator.store import Store
from coordinator.task import Planned, Task, check_task, load, weaknesses
from coordinator.task import add_task as add_checked
from edge_sdk.crypto.identity import Identity
from edge_sdk.errors import ParameterError, PeerError


def example() -> str:
    """The example of the module's docstring."""
    lines = inspect.getdoc(coordinator.task).split("\n")
    return textwrap.dedent("\n".join(line for line in lines if line.startswith("    ") or not line.strip()))


SMALL = f"""
name = "tiny"
bundle = "tiny.bundle"
publisher = "{tiny.PUBLISHER.public_key.hex()}"
unit = "example"
rounds = 4

[privacy]
clip = 0.5
delta = 1e-4
noise_multiplier = 3
metric_scale = 0.05
example_rate = 0.3

[cohort]
expected = 18.5
spread = 0.5
honest = 14
n_max = 20
examples = 70

[optimizer]
kind = "fedavgm"

[schedule]
open_s = 60
answer_s = 600
"""


def changed(old: str, new: str) -> str:
    assert old in SMALL
    return SMALL.replace(old, new)


def scheduled(fields: str) -> str:
    return changed("[optimizer]", f"[optimizer]\nschedule = {{{fields}}}")


@pytest.mark.parametrize(
    "fields",
    ["kind = 'cosine', over = 3, warmup = 1", "kind = 'cosine', over = 1, floor = 0.1",
     "kind = 'step', every = 1, factor = 0.5", "warmup = 2"],
)  # fmt: skip
def test_a_schedule_with_its_numbers_moves_every_model(fields):
    schedule = Task.from_toml(scheduled(fields)).optimizer.schedule
    assert all(schedule.factor_at(number) > 0 for number in range(4))


def test_a_task_from_before_its_schedules_numbers_were_asked_for_goes_on_as_it_did(store, directory):
    add_task(store, directory / "task.toml")
    with store.reading() as t:
        row = t.task("tiny")
    task, _ = load(row._replace(toml=scheduled("kind = 'cosine', floor = 0.5")))
    assert [task.optimizer.schedule.factor_at(number) for number in range(3)] == [1.0, 0.5, 0.5]


def test_the_documented_example_is_a_task():
    task = Task.from_toml(example())
    assert (task.name, task.privacy.noise_multiplier, task.optimizer.schedule.floor) == ("digits", 3.0, 0.1)
    assert task.expected_units == pytest.approx(18.5 * 70 * 0.3)
    assert task.adaptive.next.__self__.least == 0.05


def test_every_commented_key_of_the_example_is_one():
    """Whatever is commented out there is read where it fits: nothing in it was renamed away."""
    device = example().replace('unit = "example"', 'unit = "device"').replace("noise_multiplier", "# noise_multiplier")
    lines = []
    for line in device.split("\n"):
        if line.startswith(("example_rate", "examples")):
            continue
        lines.append(line[2:] if line.startswith("# ") and not line.startswith(("# steps", "# noise")) else line)
    task = Task.from_toml("\n".join(lines))
    assert (task.participants, task.privacy.target.coordinator) == (("kitchen",), 10.0)
    assert (task.work.epochs, task.work.weight_cap, task.cohort.mean_weight) == (1, 100, 0.5)
    assert task.schedule.overlap
    assert task.expected_units == 18.5 * 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (changed("clip = 0.5", "clip = -1"), r"t.toml, line 9: \[privacy\] clip: expected `float` > 0"),
        (changed("clip = 0.5", "clip = nan"), r"line 9: \[privacy\] clip"),
        (changed("clip = 0.5", "clip = inf"), r"line 9: \[privacy\] clip"),
        (changed("clip = 0.5", 'clip = "a"'), r"line 9: \[privacy\] clip: expected `float`, got `str`"),
        (changed("clip = 0.5", "clap = 0.5"), r"line \d+: \[privacy\] cl.p: (missing; add it|there is no such key)"),
        (changed("rounds = 4", "rounds = 4\nfast = true"), r"line 7: fast: there is no such key"),
        (changed("rounds = 4", ""), r"rounds: missing; add it"),
        (changed("noise_multiplier = 3", ""), r"line 8: \[privacy\]: no noise is given; add"),
        (
            changed("[cohort]", "[privacy.target]\nreaders = 1.0\n\n[cohort]"),
            r"line 11: .*noise_multiplier: .*leave one",
        ),
        (changed("examples = 70", ""), r"line 15: \[cohort\] examples: missing"),
        (changed("n_max = 20", "n_max = 15"), r"line 19: \[cohort\] n_max: 15 is below .*raise it"),
        (changed("answer_s = 600", "answer_s = 2"), r"line 27: \[schedule\] answer_s: .*raise it"),
        (changed('kind = "fedavgm"', 'kind = "sgd"'), r"line 23: \[optimizer\] kind: invalid enum value 'sgd'"),
        (changed("[optimizer]", "[work]\nepochs = 1\n[optimizer]"), r"\[work\] epochs: 1: .*one step; leave it out"),
        (changed('"example"', '"device"'), r"example_rate: for unit .example. only; leave it out"),
        (changed('name = "tiny"', 'name = "Tiny!"'), r"line 2: name: "),
        (
            changed("clip = 0.5", "clip = 1e-9"),
            r"line 9: \[privacy\] clip: 1e-09 is nothing .*raise it to 1e-06 or more",
        ),
        (changed("clip = 0.5", "clip = 1e7"), r"line 9: \[privacy\] clip: 1e\+07 bounds nothing.*lower it to 1e\+06"),
        (
            changed("[cohort]", "[privacy.adaptive]\nleast = 1e-9\nmost = 2\n[cohort]"),
            r"line 16: \[privacy.adaptive\] least: 1e-09 is nothing .*raise it",
        ),
        (
            changed("[cohort]", "[privacy.adaptive]\nleast = 0.1\nmost = 1e9\n[cohort]"),
            r"line 17: \[privacy.adaptive\] most: 1e\+09 bounds nothing.*lower it",
        ),
        (
            changed("example_rate = 0.3", "example_rate = 1e-6"),
            r"line 13: \[privacy\] example_rate: 1e-06 of 18.5 x 70 examples is 0.0013 a round.*raise it to 0.0008",
        ),
        (changed("delta = 1e-4", "delta = 0.5"), r"line 10: \[privacy\] delta: 0.5 is over 1 / 18.5.*lower it to 0.05"),
        (changed("rounds = 4", "rounds = "), r"not TOML: .*line 6"),
        (
            changed("[cohort]", "[privacy.adaptive]\nleast = 1\nmost = 2\n[cohort]"),
            r"line 9: \[privacy\] clip: 0.5 is outside \[1.0, 2.0\]",
        ),
        (changed("[optimizer]", "[optimizer]\nschedule = {kind = 'up'}"), r"line 23: \[optimizer.schedule\] kind"),
        (scheduled("kind = 'cosine'"), r"line 23: \[optimizer.schedule\] over: missing; 'cosine' needs it"),
        (scheduled("kind = 'step', every = 2"), r"line 23: \[optimizer.schedule\] factor: missing; 'step' needs it"),
        (scheduled("kind = 'step', factor = 0.5"), r"line 23: \[optimizer.schedule\] every: missing; 'step' needs it"),
        (
            scheduled("kind = 'cosine', over = 2, warmup = 1"),
            r"line 23: \[optimizer.schedule\] over: 2: the rate is 0 before 4 models; raise it, or give floor",
        ),
    ],
)
def test_a_fault_is_named_with_its_line_and_what_would_do(text, message):
    with pytest.raises(ParameterError, match=message):
        Task.from_toml(text, "t.toml")


@pytest.fixture
def store(tmp_path):
    opened = Store(tmp_path / "fleet")
    yield opened
    opened.close()


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "tiny.bundle").write_bytes(tiny.bundle_bytes("example"))
    (tmp_path / "task.toml").write_text(SMALL)
    return tmp_path


def add_task(store, path, **given):
    checked = check_task(store, path, corrupt_devices=2, **given)
    add_checked(store, checked, 1.0)
    return checked.planned


def test_a_task_is_planned_once_and_found_again(store, directory):
    planned = add_task(store, directory / "task.toml")
    with store.reading() as t:
        row, model = t.task("tiny"), t.newest_model("tiny")
    task, again = load(row)
    assert again == planned
    assert (task.rounds, planned.n_max, planned.honest, planned.noise.example_rate) == (4, 20, 14, 0.3)
    assert planned.dimension == len(store.blob(model.parameters)) // 4 + 4
    assert store.blob(row.bundle_file) == (directory / "tiny.bundle").read_bytes()
    assert (model.number, model.parent, model.clip) == (0, None, 0.5)


def test_a_task_file_may_begin_with_the_mark_that_some_editors_put_in_front(store, directory):
    path = directory / "task.toml"
    path.write_text("\ufeff" + SMALL.lstrip(), encoding="utf-8")
    add_task(store, path)
    with store.reading() as t:
        assert t.task("tiny").toml == SMALL.lstrip()
    path.write_text(SMALL, encoding="utf-16")
    with pytest.raises(ParameterError, match=r"task\.toml: not UTF-8 .*: save it as UTF-8"):
        check_task(store, path, corrupt_devices=2)


def test_a_task_that_devices_take_part_in_as_they_joined_has_no_warnings(store, directory):
    assert check_task(store, directory / "task.toml", corrupt_devices=2).warnings == []


@pytest.mark.parametrize(("loss", "answers"), [("cross_entropy", True), ("binary_cross_entropy", True), ("", True),
                                               ("mse", False), ("own-cross_entropy", False)])  # fmt: skip
def test_a_plan_knows_by_its_bundles_loss_whether_answers_can_be_right(store, directory, loss, answers):
    """A plan from before the loss was kept says what it did."""
    planned = add_task(store, directory / "task.toml")
    assert planned.loss == "cross_entropy"
    assert msgspec.structs.replace(planned, loss=loss).has_answers is answers


def test_a_plan_from_before_the_loss_was_kept_is_read(store, directory):
    planned = add_task(store, directory / "task.toml")
    fields = msgspec.msgpack.decode(planned.encode())
    assert Planned.decode(msgspec.msgpack.encode(fields[:-1])) == msgspec.structs.replace(planned, loss="")


@pytest.mark.parametrize(
    ("unit", "devices", "delta", "roster", "lower"),
    [
        ("example", 100, "0.02", None, "0.01"), ("example", 100, "0.01", None, None),
        ("example", 0, "0.02", 100, "0.01"), ("example", 0, "0.02", None, None),
    ],
)  # fmt: skip
def test_a_delta_that_lets_somebodys_data_out_is_refused(store, directory, unit, devices, delta, roster, lower):
    (directory / "task.toml").write_text(changed("delta = 1e-4", f"delta = {delta}"))
    with store.transaction() as t:
        for number in range(devices):
            t.add_device(bytes([number]) * 32, "device", [], 1.0)
    if lower is None:
        (warning,) = check_task(store, directory / "task.toml", corrupt_devices=2, roster=roster).warnings
        assert "task.toml, line 10: [privacy] delta: " in warning
        return
    with pytest.raises(
        ParameterError, match=rf"line 10: \[privacy\] delta: .*over 1 / 100 devices.*lower it to {lower}"
    ):
        check_task(store, directory / "task.toml", corrupt_devices=2, roster=roster)


def test_only_devices_that_the_task_admits_count_among_those_whom_delta_protects(store, directory):
    (directory / "task.toml").write_text(
        changed("delta = 1e-4", "delta = 0.01").replace("rounds = 4", 'rounds = 4\nparticipants = ["oven"]')
    )
    with store.transaction() as t:
        for number in range(200):
            t.add_device(bytes([number]) * 32, "device", ["oven"] if number < 20 else [], 1.0)
    (warning,) = check_task(store, directory / "task.toml", corrupt_devices=2).warnings
    assert "over 1 / 1,400 examples" in warning


@pytest.mark.parametrize(
    ("old", "new", "warning"),
    [
        ("delta = 1e-4", "delta = 1e-3",
         r"line 10: \[privacy\] delta: 0.001 is over 1 / 1,295 examples.*0.0007 or less"),
        ("clip = 0.5", "clip = 1e-5", r"line 9: \[privacy\] clip: 1e-05 is far below"),
        ("clip = 0.5", "clip = 1e4", r"line 9: \[privacy\] clip: 10000 is far above"),
        ("metric_scale = 0.05", "metric_scale = 0.5",
         r"line 12: \[privacy\] metric_scale: metrics make the noise 2.24 times .*lower it"),
    ],
)  # fmt: skip
def test_what_is_merely_weak_is_warned_of_with_its_line(store, directory, old, new, warning):
    text = changed(old, new).replace("metric_scale = 0.05", "metric_scale = 0") if "clip" in old else changed(old, new)
    (directory / "task.toml").write_text(text)
    (found,) = check_task(store, directory / "task.toml", corrupt_devices=2).warnings
    assert re.match(r"task\.toml, " + warning, found)


def test_a_plan_whose_figure_against_the_coordinator_protects_nobody_says_whom_it_trusts(store, directory):
    checked = check_task(store, directory / "task.toml", corrupt_devices=2)
    planned = msgspec.structs.replace(checked.planned, ledger_coordinator=120.0)
    (warning,) = weaknesses(checked.task, checked.text, "task.toml", planned, 20)
    assert "epsilon 120 against the coordinator protects nobody" in warning


def test_an_n_max_is_taken_as_it_is_given_however_few_are_expected(store, directory):
    (directory / "task.toml").write_text(changed("n_max = 20", "n_max = 30"))
    assert add_task(store, directory / "task.toml").n_max == 30


@pytest.mark.parametrize(
    ("devices", "n_max", "roster", "says"),
    [
        (19, 20, None, "20, and 19 devices are enrolled: a round takes 19 and is sealed then, until more join"),
        (0, 20, 19, "20, and the plan is for a roster of 19: a round takes 19 and is sealed then, however many join"),
        (25, 20, None, None), (0, 20, None, None), (0, 20, 30, None), (19, None, None, None),
        (5, 20, None, None),  # no round opens before more have joined: `status` says so
    ],
)  # fmt: skip
def test_an_n_max_that_the_roster_caps_is_said(store, directory, devices, n_max, roster, says):
    text = SMALL if n_max else changed("n_max = 20\n", "")
    (directory / "task.toml").write_text(text.replace("honest = 14", "honest = 12"))
    with store.transaction() as t:
        for number in range(devices):
            t.add_device(bytes([number]) * 32, "device", [], 1.0)
    checked = check_task(store, directory / "task.toml", corrupt_devices=2, roster=roster)
    assert checked.warnings == ([] if says is None else [f"task.toml, line 19: [cohort] n_max: {says}"])


def test_a_tag_that_no_enrolled_device_bears_is_said(store, directory):
    (directory / "task.toml").write_text(changed("rounds = 4", 'rounds = 4\nparticipants = ["oven", "hall", "attic"]'))
    with store.transaction() as t:
        t.add_device(b"1" * 32, "device", ["oven"], 1.0)
        t.add_device(b"2" * 32, "helper", ["hall"], 1.0)
        t.add_device(b"3" * 32, "device", ["attic"], 1.0)
        t.revoke(b"3" * 32, 2.0)
    assert check_task(store, directory / "task.toml", corrupt_devices=2).warnings == [
        "participants: no enrolled device bears the tag 'hall'",
        "participants: no enrolled device bears the tag 'attic'",
    ]


@pytest.mark.parametrize(
    ("old", "new", "warnings"),
    [
        ("honest = 14", "honest = 9", ["refuses this: min_honest is 10, and the task's honest is 9"]),
        ("noise_multiplier = 3", "noise_multiplier = 0.99",
         ["refuses this: min_noise_multiplier is 1, and the task's noise is 0.99 times what one unit adds",
          "tasks.tiny.limits.readers"]),
        ("rounds = 4", "rounds = 120",
         ["refuses this before its end: tasks.tiny.limits.readers has epsilon 4 at delta 1e-06, and the task needs"]),
        ("rounds = 4", "rounds = 900", ["tasks.tiny.limits.readers", "tasks.tiny.limits.coordinator",
                                        "lifetime.readers", "lifetime.coordinator"]),
    ],
)  # fmt: skip
def test_what_devices_refuse_as_they_joined_is_said_with_the_key_of_their_policy(store, directory, old, new, warnings):
    (directory / "task.toml").write_text(changed(old, new))
    found = check_task(store, directory / "task.toml", corrupt_devices=2).warnings
    assert len(found) == len(warnings)
    assert all(warning in line for warning, line in zip(warnings, found, strict=True))
    assert all(line.startswith("the policy.toml that a device joins with refuses this") for line in found)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("honest = 14", "honest = 18", r"line \d+: \[cohort\] honest: a group needs h \+ F = 20 .*what would do"),
        ("noise_multiplier = 3\n", "target = {readers = 1e-9}\n",
         r"line \d+: \[privacy\] target: no noise holds this.*what would do"),
        ("noise_multiplier = 3\n", "target = {readers = 1e6}\n",
         r"line \d+: \[privacy\] target: readers: epsilon 1e\+06 protects nobody.*lower it to 100"),
        ("noise_multiplier = 3", "noise_multiplier = 0.05",
         r"line \d+: \[privacy\] noise_multiplier: .*protects nobody; what would do: more noise"),
        ("noise_multiplier = 3", "noise_multiplier = 20000", r"line \d+: \[privacy\] noise_multiplier: expected"),
        ("clip = 0.5", "clip = 1e-300", r"line \d+: \[privacy\] clip: 1e-300 is nothing"),
        ("examples = 70", "examples = 1e29", r"line \d+: \[cohort\] examples: expected"),
        ('bundle = "tiny.bundle"', 'bundle = "a\\u0000b"', r"line \d+: bundle: .*null"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_named_with_its_line(store, directory, old, new, message):
    text = (directory / "task.toml").read_text()
    assert old in text
    (directory / "task.toml").write_text(text.replace(old, new))
    with pytest.raises(ParameterError, match=rf"^task\.toml, {message}"):
        add_task(store, directory / "task.toml")
    with store.reading() as t:
        assert t.tasks() == []


def test_a_bundle_for_the_other_unit_is_named_with_the_line_of_the_unit(store, directory):
    (directory / "tiny.bundle").write_bytes(tiny.bundle_bytes("device"))
    with pytest.raises(ParameterError, match=r"^task\.toml, line \d+: unit: 'example', and the bundle was built for"):
        add_task(store, directory / "task.toml")


def test_figures_grow_with_the_rounds_and_end_with_the_plan(store, directory):
    planned = add_task(store, directory / "task.toml")
    epsilons = [planned.readers_epsilon(k) for k in range(5)]
    assert epsilons[0] == 0.0
    assert all(a < b for a, b in pairwise(epsilons))
    assert planned.readers_epsilon(5) is None
    assert planned.coordinator_epsilon(4) == pytest.approx(planned.readers_epsilon(4), rel=1e-6)  # device_rate is 1


def test_where_every_device_is_asked_both_observers_figures_are_worked_out_once(store, directory, monkeypatch):
    asked = []
    figures = accounting.planned
    monkeypatch.setattr(accounting, "planned", lambda *given: asked.append(given[2:4]) or figures(*given))
    planned = add_task(store, directory / "task.toml")
    assert asked == [(1, 0), (2, 0), (3, 0), (4, 0)]
    assert planned.coordinator == planned.readers


def test_against_the_coordinator_figures_end_with_the_sends_that_a_devices_coin_allows(store, directory):
    """Beyond them, and that is one device in 10^9, the figure by RDP holds: by PLD it would take minutes."""
    (directory / "task.toml").write_text(
        changed("example_rate = 0.3", "device_rate = 0.05\nexample_rate = 0.3").replace("rounds = 4", "rounds = 40")
    )
    planned = add_task(store, directory / "task.toml")
    (sends, epsilon) = planned.coordinator[-1]
    assert sends == 14
    assert planned.readers[-1][0] == 40
    assert epsilon > planned.readers[-1][1]
    assert planned.coordinator_epsilon(15) is None


def test_a_name_serves_one_task(store, directory):
    add_task(store, directory / "task.toml")
    with pytest.raises(ParameterError, match="already"):
        add_task(store, directory / "task.toml")


def test_a_bundle_of_another_publisher_is_refused(store, directory):
    (directory / "task.toml").write_text(SMALL.replace(tiny.PUBLISHER.public_key.hex(), "11" * 32))
    with pytest.raises(PeerError, match=r"line 3: bundle: signed by .*not by the publisher"):
        add_task(store, directory / "task.toml")
    with store.reading() as t:
        assert t.tasks() == []


def test_a_missing_bundle_is_named_with_its_line(store, directory):
    (directory / "tiny.bundle").unlink()
    with pytest.raises(ParameterError, match=r"line 3: bundle: .*relative to the task file"):
        add_task(store, directory / "task.toml")


def test_a_plan_that_does_not_hold_is_refused_with_what_would(store, directory):
    (directory / "task.toml").write_text(SMALL.replace("spread = 0.5", "spread = 3"))
    with pytest.raises(ParameterError, match="what would do"):
        add_task(store, directory / "task.toml")


def test_a_damaged_plan_is_the_stores_fault():
    with pytest.raises(StoreError, match="plan"):
        Planned.decode(b"\x90")


def without_publisher(directory):
    path = directory / "task.toml"
    path.write_text("\n".join(line for line in path.read_text().split("\n") if not line.startswith("publisher")))
    return path


def test_a_task_without_a_publisher_takes_the_fleets_and_says_who_signed(directory, store):
    keys = [Identity(b"s" * 32).public_key, tiny.PUBLISHER.public_key]
    planned = add_task(store, without_publisher(directory), publishers=keys)
    assert planned.publisher == tiny.PUBLISHER.public_key


@pytest.mark.parametrize("publishers", [[], [Identity(b"s" * 32).public_key]])
def test_a_bundle_that_no_publisher_of_the_fleet_signed_is_refused(publishers, directory, store):
    with pytest.raises(PeerError, match=r"task.toml, line 3: bundle: "):
        add_task(store, without_publisher(directory), publishers=publishers)
    with store.reading() as t:
        assert t.tasks() == []
