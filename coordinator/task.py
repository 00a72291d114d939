"""A task: one TOML file that says what is trained, by whom, how privately, and when. Checked before it counts.

A task file in full. What is commented out has the default that is said, or is for the other unit:

    name = "digits"               # in every ticket: small letters, digits, dots, dashes; never used for another task
    bundle = "digits.bundle"      # what `edge-export build` made; a path from this file's directory
    # publisher = "0000000000000000000000000000000000000000000000000000000000000000"   # who signed it; if not
                                  # given, one of coordinator.toml's publishers, whom devices pin, did
    unit = "example"              # whose data is hidden: one "example", or all of a "device"'s; as in the bundle
    rounds = 40                   # models to publish; then the task is done
    # participants = ["kitchen"]  # tags: devices that bear one of them take part; without it all devices do

    [privacy]
    clip = 0.5                    # L2 bound of what one unit adds, weight units
    delta = 1e-4                  # at which figures are given; below 1 / the number of people
    noise_multiplier = 3.0        # noise over all that one unit adds; or, in its place, a [privacy.target]
    metric_scale = 0.02           # weight of metrics in the vector; 0 if not given: no metrics, no accuracy to watch
    loss_bound = 2.5              # losses are clipped to [0, loss_bound]; 1 if not given
    # device_rate = 1.0           # a device's own coin for taking part; 1 if not given
    example_rate = 0.3            # unit "example": each example's coin; 1 if not given

    # [privacy.target]            # in place of noise_multiplier: the least noise that holds these, at least one of them
    # readers = 2.5               # epsilon against readers of the models
    # coordinator = 10.0          # epsilon against the coordinator, who sees who sent
    # method = "pld"              # "rdp", if not given, as devices' ledgers count; "pld" is tighter

    [privacy.adaptive]            # the clip follows a quantile of the norms; needs metric_scale; without it it stays
    least = 0.05                  # never below
    most = 5.0                    # never above
    quantile = 0.5                # share of units that should be within the clip
    rate = 0.2

    [cohort]
    expected = 18.5               # contributors of a round, on average
    spread = 0.5                  # their standard deviation
    honest = 14                   # devices that carry the noise, besides the corrupt ones that the fleet allows for
    # groups = 1                  # each with the full noise
    n_max = 20                    # contributors at which a round is sealed early; if not given, expected + 6 spread
    examples = 70                 # unit "example": how many a device has on average
    # mean_weight = 0.5           # unit "device" with weight_cap: a device's weight on average; 1 if not given

    [work]                        # what a device does; may be left out for unit "example"
    # learning_rate = 0.05        # unit "device": of its steps
    # epochs = 1                  # unit "device": passes over the data,
    # steps = 10                  # or steps: one of the two
    # proximal = 0.01             # unit "device": FedProx's mu; 0 if not given
    # weight_cap = 100            # unit "device": one of n examples weighs min(1, n / weight_cap); 1 if not given

    [optimizer]                   # fedavg at 1 if not given
    kind = "fedavgm"              # fedavg, fedavgm, fedadam, fedyogi
    learning_rate = 1.0
    momentum = 0.9
    # beta2 = 0.99
    # tau = 1e-3
    schedule = {kind = "cosine", over = 40, floor = 0.1}    # constant, step {every, factor}, cosine; each with warmup

    [schedule]                    # all in seconds
    open_s = 3600                 # a ticket takes contributions so long, or up to n_max
    grace_s = 5.0                 # then members may still complain of shares; 5 if not given
    answer_s = 86400              # then members have so long to sign and release before the ticket expires
    # pause_s = 60.0              # between a round's end and the next ticket; 0 if not given
    # overlap = true              # issue the next ticket while the last sum is being opened; false if not given
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from coordinator.adaptive import AdaptiveClip
from coordinator.errors import StoreError
from coordinator.optimizer import Optimizer, pack_memory
from coordinator.rows import DeviceRow, ModelRow, TaskRow
from coordinator.store import Store
from coordinator.toml_file import KeyPath, place, tables
from edge_sdk.bundle import Bundle
from edge_sdk.errors import ParameterError, PeerError
from edge_sdk.files import read_text, reason
from edge_sdk.policy import default_policy
from edge_sdk.privacy.mechanism import METRICS, Mechanism
from edge_sdk.privacy.rdp import Budget, Sampling
from edge_sdk.protocol import messages
from edge_sdk.protocol.messages import MAX_CONTRIBUTORS, MAX_GROUPS, MAX_ROSTER, Loops, NoisePlan, Work
from edge_sdk.protocol.plan import corrupt_in_group, delta_bits

log = logging.getLogger(__name__)

Above0 = Annotated[float, Meta(gt=0.0, lt=1e30)]
AtLeast0 = Annotated[float, Meta(ge=0.0, lt=1e30)]
Rate = Annotated[float, Meta(gt=0.0, le=1.0)]
Tag = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[a-z0-9][a-z0-9._-]*\Z")]

MAX_OPEN_S = 90 * 86400
LEAST_CLIP, MOST_CLIP = 1e-6, 1e6
"""Less is rounded away beside parameters of about 1, whose steps as float32 are 1e-7; more bounds nothing."""

USUAL_CLIP = (1e-3, 1e3)
"""Outside it a clip is no mistake for certain, but probably."""

MOST_FOR_METRICS = 1.5
"""What metrics may add to the noise, as a factor, without a warning."""

FIGURE_POINTS = 64
"""Rounds for which figures by PLD are worked out in advance; between two of them the next one's figure is said."""


WITH_ANSWERS = ("cross_entropy", "binary_cross_entropy")
"""Losses of bundles (docs/bundle.md section 2) whose graphs count right answers."""


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of the file's tables: nothing unknown."""


class TargetTable(_Table, frozen=True):
    """Epsilons to hold, at the task's delta."""

    readers: Above0 | None = None
    coordinator: Above0 | None = None
    method: Literal["rdp", "pld"] = "rdp"


class AdaptiveTable(_Table, frozen=True):
    """`coordinator.adaptive.AdaptiveClip`."""

    least: Above0
    most: Above0
    quantile: Annotated[float, Meta(gt=0.0, lt=1.0)] = 0.5
    rate: Annotated[float, Meta(gt=0.0, le=2.0)] = 0.2


class PrivacyTable(_Table, frozen=True):
    """See the module's docstring."""

    clip: Annotated[float, Meta(gt=0.0, le=1e9)]
    delta: Annotated[float, Meta(gt=0.0, lt=1.0)]
    noise_multiplier: Annotated[float, Meta(gt=0.0, le=10_000.0)] | None = None
    target: TargetTable | None = None
    metric_scale: AtLeast0 = 0.0
    loss_bound: Above0 = 1.0
    device_rate: Rate = 1.0
    example_rate: Rate = 1.0
    adaptive: AdaptiveTable | None = None


class CohortTable(_Table, frozen=True):
    """See the module's docstring."""

    expected: Annotated[float, Meta(ge=2.0, le=float(MAX_CONTRIBUTORS))]
    spread: AtLeast0
    honest: Annotated[int, Meta(ge=2, le=MAX_CONTRIBUTORS)]
    groups: Annotated[int, Meta(ge=1, le=MAX_GROUPS)] = 1
    n_max: Annotated[int, Meta(ge=2, le=MAX_CONTRIBUTORS)] | None = None
    examples: Annotated[float, Meta(ge=0.0, lt=2.0**32)] = 0.0
    mean_weight: Rate = 1.0


class WorkTable(_Table, frozen=True):
    """`edge_sdk.protocol.messages.Work`."""

    learning_rate: AtLeast0 = 0.0
    epochs: Loops = 0
    steps: Loops = 0
    proximal: AtLeast0 = 0.0
    weight_cap: Annotated[int, Meta(ge=0, lt=1 << 53)] = 0


class ScheduleTable(_Table, frozen=True):
    """Seconds, and whether rounds overlap."""

    open_s: Annotated[float, Meta(ge=1.0, le=float(MAX_OPEN_S))]
    answer_s: Annotated[float, Meta(ge=1.0, le=float(MAX_OPEN_S))]
    grace_s: Annotated[float, Meta(ge=0.0, le=86400.0)] = 5.0
    pause_s: Annotated[float, Meta(ge=0.0, le=float(MAX_OPEN_S))] = 0.0
    overlap: bool = False


class Task(_Table, frozen=True):
    """A task file whose parts fit together. `Task.from_toml` makes it."""

    name: messages.Name
    bundle: Annotated[str, Meta(min_length=1)]
    unit: Literal["device", "example"]
    rounds: Annotated[int, Meta(ge=1, le=1_000_000)]
    privacy: PrivacyTable
    cohort: CohortTable
    schedule: ScheduleTable
    publisher: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")] | None = None
    participants: tuple[Tag, ...] = ()
    work: WorkTable = WorkTable()
    optimizer: Optimizer = Optimizer()

    @classmethod
    def from_toml(cls, text: str, source: str = "task") -> Task:
        """The task in a file's text. source: the file's name, for messages.

        Raises ParameterError "<source>, line <n>: [<table>] <key>: <what is wrong>; <remedy>".
        """
        task = cls.from_checked(text, source)
        for path, fault in _faults(task):
            raise ParameterError(f"{source}, {place(text, path)}: {fault}")
        return task

    @classmethod
    def from_checked(cls, text: str, source: str = "task") -> Task:
        """The same for a text whose parts fitted when it came in, by whatever was asked for then."""
        given = tables(text, source)
        try:
            # not strict: 1 is a number where 1.0 is meant
            return msgspec.convert(given, cls)
        except msgspec.ValidationError as error:
            raise ParameterError(_explained(source, text, str(error))) from error

    def admits(self, device: DeviceRow) -> bool:
        """Whether an enrolled device may take part: helpers do not, and tags choose if the task names any."""
        return device.role == "device" and (not self.participants or not device.tags.isdisjoint(self.participants))

    @property
    def adaptive(self) -> AdaptiveClip | None:
        table = self.privacy.adaptive
        return None if table is None else AdaptiveClip(table.least, table.most, table.quantile, table.rate)

    @property
    def expected_units(self) -> float:
        """What a round's sum is divided by: *planned* examples, devices or weights. How many came stays secret."""
        if self.unit == "example":
            return self.cohort.expected * self.cohort.examples * self.privacy.example_rate
        return self.cohort.expected * self.cohort.mean_weight

    @property
    def ticket_work(self) -> Work:
        w = self.work
        return Work(w.learning_rate, w.epochs, w.steps, w.proximal, w.weight_cap)


def _faults(task: Task) -> list[tuple[KeyPath, str]]:
    """What the fields' types cannot say: (where, what and what would do)."""
    found: list[tuple[KeyPath, str]] = []
    privacy, cohort, work, schedule = task.privacy, task.cohort, task.work, task.schedule

    def fault(wrong: bool, path: str, text: str) -> None:
        if wrong:
            found.append((tuple(path.split(".")), text))

    clips = {"privacy.clip": privacy.clip}
    if privacy.adaptive is not None:
        clips |= {"privacy.adaptive.least": privacy.adaptive.least, "privacy.adaptive.most": privacy.adaptive.most}
    for path, clip in clips.items():
        fault(clip < LEAST_CLIP, path, f"{clip:g} is nothing to float32; raise it to {LEAST_CLIP:g} or more")
        fault(
            clip > MOST_CLIP, path, f"{clip:g} bounds nothing, and the noise grows with it; lower it to {MOST_CLIP:g}"
        )
    if privacy.delta > 1 / cohort.expected:
        fault(True, "privacy.delta", _excess(privacy.delta, cohort.expected, "contributors of a round"))
    both = privacy.noise_multiplier is not None and privacy.target is not None
    neither = privacy.noise_multiplier is None and privacy.target is None
    fault(both, "privacy.noise_multiplier", "there is a target too; leave one of the two out")
    fault(neither, "privacy", "no noise is given; add noise_multiplier, or a [privacy.target]")
    if privacy.target is not None:
        empty = privacy.target.readers is None and privacy.target.coordinator is None
        fault(empty, "privacy.target", "it names no epsilon; add readers or coordinator")
    if privacy.adaptive is not None:
        least, most = privacy.adaptive.least, privacy.adaptive.most
        fault(privacy.metric_scale == 0, "privacy.adaptive", "it reads the metrics; set privacy.metric_scale above 0")
        fault(not least <= privacy.clip <= most, "privacy.clip", f"{privacy.clip} is outside [{least}, {most}]")
    if task.unit == "example":
        fault(cohort.examples == 0, "cohort.examples", "missing; say how many examples a device has on average")
        if 0 < task.expected_units < 1:
            examples = f"{privacy.example_rate:g} of {cohort.expected:g} x {cohort.examples:g} examples"
            enough = _one_digit(min(1.0, privacy.example_rate / task.expected_units), math.ceil)
            little = f"{examples} is {task.expected_units:.2g} a round: nothing to learn from; raise it to {enough:g}"
            fault(True, "privacy.example_rate", f"{little} or more")
        fault(cohort.mean_weight != 1, "cohort.mean_weight", 'for unit "device" only; leave it out')
        for name in ("learning_rate", "epochs", "steps", "proximal", "weight_cap"):
            value = getattr(work, name)
            fault(value != 0, f"work.{name}", f'{value}: a round of unit "example" is one step; leave it out')
    else:
        fault(privacy.example_rate != 1, "privacy.example_rate", 'for unit "example" only; leave it out')
        fault(work.learning_rate == 0, "work.learning_rate", "missing; the rate of the devices' own steps")
        one = (work.epochs > 0) == (work.steps > 0)
        fault(one, "work.epochs", "exactly one of epochs and steps is above 0; remove or add one")
        weighed = work.weight_cap == 0 and cohort.mean_weight != 1
        fault(weighed, "cohort.mean_weight", "every device weighs 1 without work.weight_cap; leave it out or set that")
    if cohort.n_max is not None:
        few = cohort.n_max < cohort.expected
        fault(few, "cohort.n_max", f"{cohort.n_max} is below the expected {cohort.expected:g}; raise it")
        none = cohort.groups * cohort.honest >= cohort.n_max
        fault(none, "cohort.honest", f"{cohort.groups} x {cohort.honest} and corrupt devices do not fit in n_max")
    rate = task.optimizer.schedule
    if (lacks := rate.lacks) is not None:
        fault(True, f"optimizer.schedule.{lacks}", f"missing; {rate.kind!r} needs it")
    elif rate.kind == "cosine":
        early = f"{rate.over}: the rate is 0 before {task.rounds} models; raise it, or give floor"
        fault(rate.factor_at(task.rounds - 1) == 0, "optimizer.schedule.over", early)
    short = schedule.answer_s <= schedule.grace_s
    fault(short, "schedule.answer_s", f"members must have longer than grace_s = {schedule.grace_s:g}; raise it")
    return found


def _excess(delta: float, people: float, who: str) -> str:
    """What is wrong with a delta that is over 1 / people."""
    return (
        f"{delta:g} is over 1 / {people:,g} {who}: to publish all that one of them has would be as private; lower it "
        f"to {_one_digit(1 / people, math.floor):g} or less, 1e-06 as a rule"
    )


def _one_digit(value: float, towards: Callable[[float], int]) -> float:
    """A number above 0 with all but its first digit rounded off. towards: math.floor or math.ceil."""
    scale = 10.0 ** math.floor(math.log10(value))
    return towards(value / scale) * scale


def _explained(source: str, text: str, error: str) -> str:
    """msgspec's message with the place in the file instead of its own."""
    what, _, where = error.partition(" - at `$")
    path = tuple(re.findall(r"[A-Za-z0-9_-]+", where))
    unknown = re.fullmatch(r"Object contains unknown field `(.+)`", what, re.DOTALL)
    if unknown:
        return f"{source}, {place(text, (*path, unknown[1]))}: there is no such key; remove it"
    missing = re.fullmatch(r"Object missing required field `(.+)`", what)
    if missing:
        return f"{source}, {place(text, (*path, missing[1]))}: missing; add it"
    return f"{source}, {place(text, path)}: {what[:1].lower()}{what[1:]}"


class Planned(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What planning made of a task: all that tickets need, and figures, so that the server plans nothing.

    bundle: its hash.  dimension: of the integer vector.  readers, coordinator: (rounds, epsilon by PLD) at `delta`,
    for so many published models, or for a device that sent in so many rounds; ascending, up to the task's rounds, or to
    as many as a device sends in but once in 10^9.  ledger_readers, ledger_coordinator: budgets that a device's ledger
    needs, at `delta`.  text: for people.
    """

    bundle: bytes
    dimension: int
    n_max: int
    honest: int
    groups: int
    noise: NoisePlan
    delta: float
    readers: list[tuple[int, float]]
    coordinator: list[tuple[int, float]]
    ledger_readers: float
    ledger_coordinator: float
    text: str
    publisher: bytes = b""
    """Public key of who signed the bundle."""
    policy_delta: float = 0.0
    policy_readers: float = 0.0
    policy_coordinator: float = 0.0
    """Budgets that a ledger needs at `policy_delta`, by what a device joins with; infinite if none is enough."""
    loss: str = ""
    """The name of the bundle's loss; empty in plans from before it was kept."""

    @property
    def has_answers(self) -> bool:
        """Whether an answer can be right, so that there is an accuracy: not in a regression."""
        return self.loss in ("", *WITH_ANSWERS)

    def meaningful(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """A model's metrics less the accuracy where there is none: it would be noise around 0."""
        return {name: value for name, value in metrics.items() if name != "accuracy" or self.has_answers}

    @property
    def mechanism(self) -> Mechanism:
        """The plan's, at its own clip."""
        noise = self.noise
        return Mechanism(
            unit=noise.unit,
            dimension=self.dimension - (METRICS if noise.metric_scale else 0),
            clip=noise.clip,
            granularity=noise.granularity,
            sigma=noise.sigma,
            honest=self.honest,
            modulus_bits=32 - delta_bits(self.n_max),
            metric_scale=noise.metric_scale,
            loss_bound=noise.loss_bound,
        )

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.noise.device_rate, self.noise.example_rate)

    def readers_epsilon(self, published: int) -> float | None:
        """Epsilon by PLD against readers after so many models; None beyond the plan."""
        return _at(self.readers, published)

    def coordinator_epsilon(self, sends: int) -> float | None:
        """Epsilon by PLD against the coordinator, of a device that sent so often; None beyond the plan."""
        return _at(self.coordinator, sends)

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @staticmethod
    def decode(data: bytes) -> Planned:
        """Raises StoreError on anything but what `encode` gave."""
        try:
            return msgspec.msgpack.decode(data, type=Planned)
        except msgspec.MsgspecError as error:
            raise StoreError(f"a task's plan is damaged, or of another version: {error}") from error


def _at(table: Sequence[tuple[int, float]], rounds: int) -> float | None:
    if rounds == 0:
        return 0.0
    return next((epsilon for most, epsilon in table if most >= rounds), None)


class PlanFault(ParameterError):
    """The task cannot be planned. path: the key that asks for too much."""

    def __init__(self, path: KeyPath, text: str) -> None:
        super().__init__(text)
        self.path = path


@contextmanager
def _about(*path: str) -> Iterator[None]:
    try:
        yield
    except ParameterError as error:
        raise PlanFault(path, str(error)) from error


def plan(task: Task, bundle: Bundle, roster: int, corrupt_devices: int) -> Planned:
    """Work out a task's noise, integers and figures. Loads dp-accounting (75 MB): not for the process that serves.

    roster: devices enrolled, or to be enrolled.  corrupt_devices: F, as the fleet's epochs have it.
    Raises PlanFault that says which requirement fails, what would meet it, and where the task asks for it.
    """
    from coordinator import accounting, planner  # 75 MB, so only here

    privacy, table, built_for = task.privacy, task.cohort, bundle.manifest.unit
    if built_for != task.unit:
        raise PlanFault(("unit",), f"{task.unit!r}, and the bundle was built for {built_for!r}: build another")
    if task.work.proximal and not bundle.manifest.options.proximal:
        raise PlanFault(("work", "proximal"), "above 0, and the bundle was built without FedProx's term: build another")
    with _about("cohort", "expected"):
        cohort = planner.Cohort(
            expected=table.expected,
            spread=table.spread,
            roster=max(2, roster),
            honest=table.honest,
            corrupt=max(1, corrupt_in_group(roster, corrupt_devices, table.groups)),
            groups=table.groups,
            most=table.n_max,
        )
    with _about("cohort", "examples"):
        work = planner.Work(
            unit=task.unit, dimension=bundle.dimension, clip=privacy.clip, rounds=task.rounds,
            sampling=Sampling(privacy.device_rate, privacy.example_rate), metric_scale=privacy.metric_scale,
            loss_bound=privacy.loss_bound, examples=table.examples,
        )  # fmt: skip
    with _about("cohort", "honest"):
        planner.check_cohort(work, cohort)
    if privacy.noise_multiplier is not None:
        target: planner.Target | planner.FixedNoise = planner.FixedNoise(privacy.noise_multiplier, privacy.delta)
    else:
        wanted = privacy.target or TargetTable()
        readers, coordinator = (
            None if epsilon is None else Budget(epsilon, privacy.delta)
            for epsilon in (wanted.readers, wanted.coordinator)
        )
        with _about("privacy", "target"):
            target = planner.Target(readers, coordinator, wanted.method)
    with _about("privacy", "noise_multiplier" if privacy.target is None else "target"):
        made = planner.make_plan(work, cohort, target)
    observed = (made.mechanism, work.sampling)
    against_readers = [
        (k, accounting.planned(*observed, k, 0, privacy.delta).readers.epsilon) for k in _points(task.rounds)
    ]
    if privacy.device_rate == 1:
        against_coordinator = against_readers  # every device sends in every round: both see the same
    else:
        against_coordinator = [
            (k, accounting.planned(*observed, 0, k, privacy.delta).coordinator.epsilon) for k in _points(work.sends)
        ]
    return Planned(
        bundle=bundle.hash,
        dimension=made.mechanism.length,
        n_max=cohort.n_max,
        honest=table.honest,
        groups=table.groups,
        noise=planner.noise_plan(made),
        delta=privacy.delta,
        readers=against_readers,
        coordinator=against_coordinator,
        ledger_readers=made.ledger_readers,
        ledger_coordinator=made.ledger_coordinator,
        text=str(made),
        policy_delta=made.policy_delta,
        policy_readers=made.policy_readers,
        policy_coordinator=made.policy_coordinator,
        loss=bundle.manifest.loss,
    )


def _points(rounds: int) -> list[int]:
    """Numbers of rounds at which figures are worked out, ascending; the last one is `rounds`."""
    return sorted({math.ceil(rounds * k / FIGURE_POINTS) for k in range(1, FIGURE_POINTS + 1)})


def refusals(task: Task, planned: Planned) -> list[str]:
    """What a device would refuse by the policy that it joins with, for people: a fleet of such devices never starts."""
    policy = default_policy([task.name])
    multiplier, found = planned.mechanism.noise_multiplier, []
    if planned.honest < policy.min_honest:
        found.append(f"refuses this: min_honest is {policy.min_honest}, and the task's honest is {planned.honest}")
    if multiplier < policy.min_noise_multiplier:
        found.append(
            f"refuses this: min_noise_multiplier is {policy.min_noise_multiplier:g}, and the task's noise is "
            f"{multiplier:.3g} times what one unit adds"
        )
    for key, limits in ((f"tasks.{task.name}.limits", policy.task_limits[task.name]), ("lifetime", policy.lifetime)):
        for observer, allowed, needed in (
            ("readers", limits.readers, planned.policy_readers),
            ("coordinator", limits.coordinator, planned.policy_coordinator),
        ):
            if needed > allowed.epsilon:
                found.append(
                    f"refuses this before its end: {key}.{observer} has epsilon {allowed.epsilon:g} at delta "
                    f"{allowed.delta:g}, and the task needs {needed:.3g}"
                )
    return [f"the policy.toml that a device joins with {fault}" for fault in found]


def weaknesses(task: Task, text: str, source: str, planned: Planned, people: float) -> list[str]:
    """What of a task that can be planned is probably no wish of anybody's, with its place, for people.

    text, source: the file's, and its name.  people: devices whom delta protects, as far as is known.
    """
    from coordinator.planner import MAX_EPSILON  # whoever planned has loaded it

    privacy, found = task.privacy, []

    def weak(key: str, fault: str) -> None:
        found.append(f"{source}, {place(text, ('privacy', key))}: {fault}")

    protected = people * (task.cohort.examples if task.unit == "example" else 1)
    if privacy.delta > 1 / protected:
        weak(
            "delta",
            f"{privacy.delta:g} is over 1 / {protected:,.0f} examples that it protects; as a rule it is "
            f"{_one_digit(1 / protected, math.floor):g} or less here",
        )
    least, most = USUAL_CLIP
    if not least <= privacy.clip <= most:
        far = "below" if privacy.clip < least else "above"
        cost = "next to nothing of them is left" if privacy.clip < least else "the noise grows with it"
        weak("clip", f"{privacy.clip:g} is far {far} what gradients and updates measure as a rule, 0.01 to 10: {cost}")
    whole = math.hypot(privacy.clip, privacy.metric_scale * math.sqrt(METRICS - 1 + privacy.loss_bound**2))
    if whole > MOST_FOR_METRICS * privacy.clip:
        weak(
            "metric_scale",
            f"metrics make the noise {whole / privacy.clip:.3g} times what the model alone needs; lower it, or "
            "loss_bound",
        )
    if planned.ledger_coordinator > MAX_EPSILON:
        weak(
            "target" if privacy.target is not None else "noise_multiplier",
            f"epsilon {planned.ledger_coordinator:.3g} against the coordinator protects nobody from it: whoever runs "
            "it is trusted",
        )
    return found


def capped(task: Task, enrolled: int, roster: int | None) -> str | None:
    """What becomes of an n_max that is larger than the fleet, for people; None if nothing is known to cap it.

    enrolled: devices.  roster: those that were planned for, if that was said.
    """
    n_max = task.cohort.n_max
    if n_max is None:
        return None
    takes = "a round takes {} and is sealed then"
    if roster is not None and roster < n_max:
        return f"{n_max}, and the plan is for a roster of {roster}: {takes.format(roster)}, however many join"
    if task.cohort.expected <= enrolled < n_max:  # with fewer no round opens, and `status` says why
        return f"{n_max}, and {enrolled} devices are enrolled: {takes.format(enrolled)}, until more join"
    return None


def _most_contributors(task: Task) -> int:
    """n_max, of a roster that is large enough. Six spreads: `coordinator.planner.SPREADS`, which is not loaded here."""
    cohort = task.cohort
    return cohort.n_max or max(2, min(MAX_CONTRIBUTORS, math.ceil(cohort.expected + 6 * cohort.spread)))


@dataclass(frozen=True)
class Checked:
    """A task file that holds, planned, with all that the store takes of it. text, content: the file's, the bundle's.

    warnings: what may keep its rounds from opening all the same, for people.
    """

    task: Task
    text: str
    planned: Planned
    bundle: Bundle
    content: bytes
    warnings: list[str]


def check_task(
    store: Store,
    path: Path,
    *,
    corrupt_devices: int,
    publishers: Sequence[bytes] = (),
    roster: int | None = None,
) -> Checked:
    """Check the task file at `path` and plan it. Nothing is changed.

    publishers: those that devices pin when they join; one of them signed the bundle unless the task names another.
    roster: devices to plan for; None: those enrolled now, or, if there are fewer, as many as the task's n_max asks.
    Raises ParameterError with the place and the remedy; PeerError that names the fault of the bundle.
    """
    try:
        text = read_text(path)
    except (OSError, ParameterError) as error:
        raise ParameterError(f"{path}: {reason(error)}") from error
    task = Task.from_toml(text, path.name)
    with store.reading() as t:
        t.check_new(task.name)  # before the planning, which takes its time
        enrolled = [row for row in t.devices() if row.role == "device" and row.revoked_s is None]
    try:
        content = (path.parent / task.bundle).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        where = place(text, ("bundle",))
        raise ParameterError(f"{path.name}, {where}: {error}; the path is relative to the task file") from error
    try:
        bundle, publisher = _read_bundle(content, task, publishers)
    except PeerError as error:
        fault = str(error).removeprefix("bundle: ")  # the place says so
        raise PeerError(f"{path.name}, {place(text, ('bundle',))}: {fault}") from error
    people = max(float(roster or sum(task.admits(row) for row in enrolled)), task.cohort.expected)
    if task.privacy.delta > 1 / people:
        where = place(text, ("privacy", "delta"))
        raise ParameterError(f"{path.name}, {where}: {_excess(task.privacy.delta, people, 'devices')}")
    planned_for = max(len(enrolled), _most_contributors(task)) if roster is None else roster
    try:
        planned = plan(task, bundle, min(planned_for, MAX_ROSTER), corrupt_devices)
    except PlanFault as fault:
        raise ParameterError(f"{path.name}, {place(text, fault.path)}: {fault}") from fault
    planned = msgspec.structs.replace(planned, publisher=publisher)
    borne = frozenset[str]().union(*(row.tags for row in enrolled))
    warnings = [
        f"participants: no enrolled device bears the tag {tag!r}" for tag in task.participants if tag not in borne
    ]
    if (cap := capped(task, len(enrolled), roster)) is not None:
        warnings.append(f"{path.name}, {place(text, ('cohort', 'n_max'))}: {cap}")
    weak = weaknesses(task, text, path.name, planned, people)
    return Checked(task, text, planned, bundle, content, [*warnings, *weak, *refusals(task, planned)])


def add_task(store: Store, checked: Checked, now_s: float) -> None:
    """Put a task into the store, where a running server finds it. Raises ParameterError if its name was taken."""
    task, planned = checked.task, checked.planned
    bundle_file = store.put_blob(checked.content)
    initial = checked.bundle.flatten(checked.bundle.parameters())
    parameters = store.put_blob(initial.astype("<f4").tobytes())
    memory = store.put_blob(pack_memory(task.optimizer.start(len(initial))))
    with store.transaction() as t:
        t.add_task(TaskRow(task.name, checked.text, planned.encode(), bundle_file, "running", 0, now_s))
        t.add_model(
            ModelRow(
                task.name, 0, parameters, memory, None, None, task.privacy.clip, task.cohort.expected, None, None, {},
                now_s,
            )
        )  # fmt: skip


def _read_bundle(content: bytes, task: Task, publishers: Sequence[bytes]) -> tuple[Bundle, bytes]:
    """The bundle and who signed it: the task's publisher, or else one of `publishers`. Raises PeerError."""
    pinned = [bytes.fromhex(task.publisher)] if task.publisher else list(publishers)
    if task.publisher and publishers and pinned[0] not in publishers:
        log.warning("publisher %s is not one of coordinator.toml's: devices refuse it unless their policy lists it",
                    task.publisher)  # fmt: skip
    if not pinned:
        raise PeerError("no publisher is known: name one in the task, or in coordinator.toml")
    bundle = Bundle.read(content, *pinned)
    return bundle, bundle.publisher


def load(row: TaskRow) -> tuple[Task, Planned]:
    """A task from the store. It was checked when it came in."""
    return Task.from_checked(row.toml, row.name), Planned.decode(row.plan)
