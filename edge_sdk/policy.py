"""What this device insists on, whatever a ticket says. Its owner writes it, in TOML; no coordinator changes it.

A policy in full:

    protects = "example"            # whose data the budgets are of: "example" or all of the "device"'s
    min_honest = 10                 # devices that must carry the noise, besides the corrupt ones that are allowed for
    min_noise_multiplier = 0.5      # noise of a sum over the clip
    max_device_rate = 1.0           # take part at most this often
    authorities = ["<public key in hex>"]
    operators = ["<public key in hex>"]
    publishers = ["<public key in hex>"]

    [lifetime]
    readers = {epsilon = 8.0, delta = 1e-6}
    coordinator = {epsilon = 20.0, delta = 1e-6}

    [tasks.keywords]                # only the tasks listed are taken part in
    operators = ["<public key in hex>"]         # fewer than above, if given
    [tasks.keywords.limits]
    readers = {epsilon = 2.7, delta = 1e-6}
    coordinator = {epsilon = 10.0, delta = 1e-6}
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta

from edge_sdk.errors import ParameterError, PeerError
from edge_sdk.privacy.ledger_entry import Limits
from edge_sdk.privacy.mechanism import METRICS, Mechanism, Unit
from edge_sdk.privacy.rdp import Sampling
from edge_sdk.protocol.contributor import Terms
from edge_sdk.protocol.rounds import Round

HexKey = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
_TASK_PATTERN = r"^[a-z0-9][a-z0-9._-]*\Z"
TaskName = Annotated[str, Meta(min_length=1, max_length=64, pattern=_TASK_PATTERN)]

_DEFAULT = """\
# What this device insists on, whatever a coordinator asks for. Yours to change; no coordinator can.

# Whose data the budgets below are of. "example": one training example of this device at a time. "device": all of them
# together, which is right where they are all one person's; rounds that protect single examples are refused then.
protects = "{protects}"

# Devices that must carry the noise of every sum, besides the corrupt ones that are allowed for.
min_honest = 10

# Least noise of a sum, in units of what one example, or one device, can add to it.
min_noise_multiplier = 1.0

# Take part in at most this share of a task's rounds.
max_device_rate = 1.0

# Who may say which devices belong to the fleet, who may run rounds, and who may sign what is run on this device.
authorities = {authorities}
operators = {operators}
publishers = {publishers}

# What all tasks together may cost over this device's life, against two observers: whoever reads the published models,
# and the coordinator, who also sees in which rounds this device sent. Neither bounds the other.
[lifetime]
readers = {{epsilon = 8.0, delta = 1e-6}}
coordinator = {{epsilon = 12.0, delta = 1e-6}}

# Tasks that this device takes part in, each with what it alone may cost. A task that is not here is refused.
"""

_DEFAULT_TASK = """
[tasks."{task}".limits]
readers = {{epsilon = 4.0, delta = 1e-6}}
coordinator = {{epsilon = 8.0, delta = 1e-6}}
"""


def mechanism_of(round_: Round) -> Mechanism:
    """The mechanism that a ticket asks for: the one place where its numbers become one.

    Raises PeerError that names the ticket's field if there is no such mechanism.
    """
    ticket, noise = round_.ticket, round_.ticket.noise
    metrics = METRICS if noise.metric_scale else 0
    if ticket.dimension <= metrics:
        raise PeerError(f"ticket: dimension is {ticket.dimension}, of which {metrics} are metrics: nothing is left")
    try:
        return Mechanism(
            unit=noise.unit,
            dimension=ticket.dimension - metrics,
            clip=noise.clip,
            granularity=noise.granularity,
            sigma=noise.sigma,
            honest=ticket.honest,
            modulus_bits=round_.layout.modulus_bits,
            metric_scale=noise.metric_scale,
            loss_bound=noise.loss_bound,
        )
    except ParameterError as error:
        raise PeerError(f"ticket: {error}") from error


def sampling_of(round_: Round) -> Sampling:
    """The coins that a ticket asks for. Raises PeerError that names the ticket's field on a rate outside (0, 1]."""
    noise = round_.ticket.noise
    try:
        return Sampling(device=noise.device_rate, example=noise.example_rate)
    except ParameterError as error:
        raise PeerError(f"ticket: {error}") from error


def default_policy_toml(
    authority: bytes, operator: bytes, publishers: Iterable[bytes], tasks: Iterable[str], protects: Unit = "example"
) -> str:
    """The policy that a freshly joined device starts with: TOML with comments, for its owner to read and change.

    authority, operator, publishers: public keys.  tasks: those that the owner allows by name; none is a device that
    waits. There is no wildcard: whoever may open tasks could otherwise spend the whole lifetime's budget unasked.
    Raises ParameterError on a key that is not 32 bytes, no publisher, or a name that is no task's or comes twice.
    """
    names = list(tasks)
    added = _default_tasks(names)
    text = _DEFAULT.format(
        protects=protects,
        authorities=_hex_list("authority", [authority]),
        operators=_hex_list("operator", [operator]),
        publishers=_hex_list("publisher", list(publishers)),
    ) + "".join(added)
    if not names:
        text += "\n[tasks]\n"
    Policy.from_toml(text)
    return text


def allow_tasks(text: str, tasks: Iterable[str]) -> str:
    """A policy's TOML with the tasks that it does not list behind what is there, each with what a task may cost on a
    device that joins. What it lists already stays as its owner has it, and so does the lifetime's budget.

    Raises ParameterError on a policy that cannot be read, a name that is no task's, or TOML to which nothing can be
    added: with what its owner has to write.
    """
    listed = Policy.from_toml(text).tasks
    added = "".join(_default_tasks(name for name in dict.fromkeys(tasks) if name not in listed))
    if not added:
        return text
    longer = (text if text.endswith("\n") else text + "\n") + added
    try:
        Policy.from_toml(longer)
    except ParameterError as error:
        raise ParameterError(
            f"policy: nothing can be added to it, for its tasks stand in an inline table. Write there, in TOML: {added}"
        ) from error
    return longer


def _default_tasks(names: Iterable[str]) -> list[str]:
    for name in (names := list(names)):
        if not re.match(_TASK_PATTERN, name):  # before it is written into TOML, where it could say anything
            raise ParameterError(f"policy: {name!r} is no task's name")
    return [_DEFAULT_TASK.format(task=name) for name in names]


def default_policy(tasks: Iterable[str]) -> Policy:
    """The same, of a device with stand-ins for keys: for whoever plans for devices that join. Errors as above."""
    nobody = bytes(32)
    return Policy.from_toml(default_policy_toml(nobody, nobody, [nobody], tasks))


def _hex_list(role: str, keys: list[bytes]) -> str:
    if any(len(key) != 32 for key in keys):
        raise ParameterError(f"policy: the key of an {role} is 32 bytes")
    return "[" + ", ".join(f'"{key.hex()}"' for key in keys) + "]"


@dataclass(frozen=True)
class OwnTerms(Terms):
    """`Terms` whose refusals name the key of policy.toml that asks for so much."""

    honest_key: str = "min_honest"
    noise_key: str = "min_noise_multiplier"

    def check(self, round_: Round) -> None:
        Terms(self.bundle, dimension=self.dimension).check(round_)
        for key, terms in (
            (self.honest_key, Terms(self.bundle, min_honest=self.min_honest)),
            (self.noise_key, Terms(self.bundle, min_noise_multiplier=self.min_noise_multiplier)),
        ):
            try:
                terms.check(round_)
            except PeerError as error:
                raise PeerError(f"{error} (policy.toml: {key})") from error


class TaskPolicy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What holds for one task in addition."""

    limits: Limits | None = None
    operators: tuple[HexKey, ...] | None = None
    publishers: tuple[HexKey, ...] | None = None
    min_honest: Annotated[int, Meta(ge=2)] = 2
    min_noise_multiplier: Annotated[float, Meta(ge=0)] = 0.0


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """See the module's docstring. Nothing that is not listed is allowed."""

    protects: Unit
    lifetime: Limits
    authorities: Annotated[tuple[HexKey, ...], Meta(min_length=1)]
    operators: Annotated[tuple[HexKey, ...], Meta(min_length=1)]
    publishers: Annotated[tuple[HexKey, ...], Meta(min_length=1)]
    tasks: Mapping[TaskName, TaskPolicy]
    min_honest: Annotated[int, Meta(ge=2)]
    min_noise_multiplier: Annotated[float, Meta(gt=0)]
    max_device_rate: Annotated[float, Meta(gt=0, le=1)] = 1.0

    @classmethod
    def from_toml(cls, text: str) -> Policy:
        """Raises ParameterError that names the line or the field."""
        try:
            return msgspec.toml.decode(text, type=cls)
        except (msgspec.MsgspecError, ValueError) as error:
            raise ParameterError(f"policy: {error}") from error

    @property
    def task_limits(self) -> dict[str, Limits]:
        """The budgets of single tasks, for the ledger."""
        return {name: task.limits for name, task in self.tasks.items() if task.limits is not None}

    def terms(self, task: str, bundle: bytes) -> Terms:
        """What the protocol checks of each ticket. Raises PeerError on a task that is not listed.

        bundle: hash of the one registered for the task.
        """
        own = self._task(task)
        return OwnTerms(
            bundle=bundle,
            min_honest=max(self.min_honest, own.min_honest),
            min_noise_multiplier=max(self.min_noise_multiplier, own.min_noise_multiplier),
            honest_key=_stricter(task, "min_honest", self.min_honest, own.min_honest),
            noise_key=self._noise_key(task, own),
        )

    def publishers_of(self, task: str) -> tuple[bytes, ...]:
        """Public keys, at least one, whose bundles may run for this task. Raises PeerError if it has none."""
        own = self._task(task)
        allowed = tuple(
            bytes.fromhex(key) for key in self.publishers if own.publishers is None or key in own.publishers
        )
        if not allowed:
            raise PeerError(f"ticket: no publisher of task {task} is on this device's list")
        return allowed

    def check_round(self, round_: Round) -> None:
        """Return if this device may take part as far as the policy goes beyond `terms`; budgets are the ledger's.

        Raises PeerError that names what is not allowed, or the ticket's field that makes no mechanism.
        """
        ticket, frozen = round_.ticket, round_.epoch.frozen
        own = self._task(ticket.task)
        _listed("fleet authority", frozen.fleet, self.authorities, None)
        _listed("operator", frozen.coordinator, self.operators, own.operators)
        if self.protects == "device" and ticket.noise.unit == "example":
            raise PeerError(
                'ticket: unit "example" protects no whole device, and this policy does (policy.toml: protects)'
            )
        mechanism, sampling = mechanism_of(round_), sampling_of(round_)
        floor = max(self.min_noise_multiplier, own.min_noise_multiplier)
        if not mechanism.noise_multiplier >= floor:
            raise PeerError(
                f"ticket: noise of {mechanism.noise_multiplier:.3g} times what one unit adds is below this device's "
                f"floor of {floor} (policy.toml: {self._noise_key(ticket.task, own)})"
            )
        if not sampling.device <= self.max_device_rate:
            raise PeerError(
                f"ticket: device_rate {sampling.device} is more often than this device takes part: "
                f"{self.max_device_rate} (policy.toml: max_device_rate)"
            )

    def _task(self, task: str) -> TaskPolicy:
        own = self.tasks.get(task)
        if own is None:
            raise PeerError(
                f"ticket: task {task} is not among those that this device takes part in (policy.toml: tasks)"
            )
        return own

    def _noise_key(self, task: str, own: TaskPolicy) -> str:
        return _stricter(task, "min_noise_multiplier", self.min_noise_multiplier, own.min_noise_multiplier)


def _stricter(task: str, key: str, general: float, own: float) -> str:
    """Where in policy.toml the larger of two floors stands."""
    return f"tasks.{task}.{key}" if own > general else key


def _listed(role: str, key: bytes, allowed: tuple[str, ...], narrower: tuple[str, ...] | None) -> None:
    if key.hex() not in allowed or (narrower is not None and key.hex() not in narrower):
        raise PeerError(f"ticket: {role} {key.hex()[:16]} is not on this device's list")
