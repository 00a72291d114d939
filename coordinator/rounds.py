"""What a round is made of and what becomes of its sum: pure steps, without clock, disk or network.

From task, epoch, prekeys and model to a ticket; from rows back to the protocol's state; from opened sums to the next
model; and what the round let out, for the account.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from numpy.typing import NDArray

from coordinator.optimizer import F32, Memory
from coordinator.rows import ContributionRow, ModelRow, RoundRow
from coordinator.task import Planned, Task
from edge_sdk.crypto.hashing import derive_key, tagged_hash
from edge_sdk.crypto.stream import KeyStream
from edge_sdk.errors import RoundAborted
from edge_sdk.policy import mechanism_of, sampling_of
from edge_sdk.privacy.ledger_entry import noise_of
from edge_sdk.privacy.mechanism import METRICS, Mechanism, MetricSums, decode
from edge_sdk.privacy.noise import MAX_SIGMA, noise_sampler
from edge_sdk.privacy.rdp import against_coordinator, against_readers
from edge_sdk.protocol import messages
from edge_sdk.protocol.aggregator import Certified, Collecting, Done, Entry, Sealed
from edge_sdk.protocol.authority import FleetEpoch
from edge_sdk.protocol.messages import Certificate, NoisePlan, Release, Seal, Signed, Ticket
from edge_sdk.protocol.rounds import Round, seal_hash

if TYPE_CHECKING:
    from coordinator.accounting import RoundRecord

State = Collecting | Sealed | Certified


# --- the ticket


def noise_at(planned: NoisePlan, clip: float) -> NoisePlan:
    """The plan's noise at another clip: everything in steps stays, so what a round costs does (`Mechanism.scaled`)."""
    factor = clip / planned.clip
    return msgspec.structs.replace(
        planned, clip=clip, granularity=planned.granularity * factor, metric_scale=planned.metric_scale * factor
    )


def ticket_times(task: Task, now_s: float) -> tuple[int, int]:
    """(closes_s, expires_s), Unix seconds: a ticket opened now is open for no less than `open_s`."""
    closes = math.ceil(now_s + task.schedule.open_s)
    return closes, math.ceil(closes + task.schedule.answer_s)


def why_not_yet(task: Task, planned: Planned, epoch: FleetEpoch, takes_part: int, expires_s: int) -> str | None:
    """What a ticket of this epoch would lack, for people, or None.

    takes_part: devices of the roster that may take part in the task.
    """
    if takes_part < task.cohort.expected:
        return f"{takes_part} devices may take part, and the task plans with {task.cohort.expected:g}"
    if planned.groups not in epoch.corrupt_in_group:
        return f"the epoch allows no round of {planned.groups} groups"
    least = planned.groups * (planned.honest + epoch.corrupt_in_group[planned.groups])
    if min(planned.n_max, epoch.frozen.roster_size) < least:
        return f"{least} contributors are needed, and a round takes {min(planned.n_max, epoch.frozen.roster_size)}"
    if expires_s > epoch.frozen.expires_s:
        return "the epoch ends before the ticket would"
    return None


def make_ticket(
    task: Task,
    planned: Planned,
    epoch: FleetEpoch,
    model: ModelRow,
    *,
    number: int,
    previous: bytes,
    offers: Sequence[Signed],
    now_s: float,
) -> Ticket:
    """The task's next ticket. number: of the round.  previous: tid of the ticket before.  offers: one per member."""
    closes_s, expires_s = ticket_times(task, now_s)
    return Ticket(
        version=1,
        epoch=epoch.id,
        task=task.name,
        round=number,
        previous=previous,
        bundle=planned.bundle,
        parameters=model.parameters,
        dimension=planned.dimension,
        n_max=min(planned.n_max, epoch.frozen.roster_size),
        honest=planned.honest,
        groups=planned.groups,
        noise=noise_at(planned.noise, model.clip),
        work=task.ticket_work,
        prekeys=list(offers),
        closes_s=closes_s,
        expires_s=expires_s,
    )


# --- from rows to states


def restore(
    round_: Round,
    row: RoundRow,
    contributions: Iterable[ContributionRow],
    complaints: Mapping[int, frozenset[int]],
    signatures: Mapping[int, bytes],
    releases: Mapping[int, bytes],
) -> State:
    """The protocol's state as it was when the last transaction was written. What is in the rows was checked then."""
    entries = {
        c.sender: Entry(messages.decode(Signed, c.header), c.digest, round_.epoch.group_of(c.sender, round_.groups))
        for c in contributions
        if c.header is not None
    }
    if row.seal is None:
        return Collecting(round_, entries, complaints)
    signed = messages.decode(Signed, row.seal)
    groups = tuple(tuple(s for s, _ in group) for group in messages.decode(Seal, signed.body).groups)
    kept = {sender: entries[sender] for group in groups for sender in group}
    digest = seal_hash(signed.body)
    if row.certificate is None:
        return Sealed(round_, kept, signed, digest, groups, signatures)
    certificate = messages.decode(Certificate, row.certificate)
    answers = {
        member: tuple(messages.decode(Release, messages.decode(Signed, data).body).sums)
        for member, data in releases.items()
    }
    return Certified(round_, kept, signed, digest, groups, certificate, answers)


@dataclass
class Repeat:
    """When to say something again: after `first_s`, then each time after twice as long, up to `most_s`."""

    due_s: float
    first_s: float = 2.0
    most_s: float = 300.0
    times: int = 0

    @classmethod
    def after(cls, now_s: float, first_s: float = 2.0) -> Repeat:
        return cls(now_s + first_s, first_s)

    def is_due(self, now_s: float) -> bool:
        """Whether it is time; then the next time is set."""
        if now_s < self.due_s:
            return False
        self.times += 1
        self.due_s = now_s + min(self.first_s * 2.0 ** min(self.times, 30), self.most_s)
        return True


def seal_due_s(state: Collecting, full_at_s: float | None, grace_s: float) -> float:
    """When the set may be fixed: some time after the last contribution could come, in which members complain.

    full_at_s: when n_max was reached, None if it was not.
    """
    closes_s = float(state.round.ticket.closes_s)
    return min(closes_s, full_at_s if full_at_s is not None else closes_s) + grace_s


# --- from sums to a model


@dataclass(frozen=True)
class NextModel:
    """A model that is not stored yet. metrics: noisy shares and means, by name, for people."""

    parameters: F32 = field(repr=False)
    memory: Memory = field(repr=False)
    clip: float
    metrics: Mapping[str, float]
    steady_noise: bool


def needs_steady_noise(noise: NoisePlan) -> bool:
    """Whether readers' amplification rests on a level of noise that does not show how many took part."""
    return noise.unit == "device" and noise.device_rate < 1.0


def missing_noise(mechanism: Mechanism, missing: int, entropy: bytes) -> NDArray[np.int64]:
    """The noise that `missing` devices would have added, int64 (length,), steps (docs/privacy.md section 4.2).

    entropy: 32 fresh secret bytes. Drawn as few samples of larger variance: sums of so wide discrete Gaussians are one
    to 1e-16, and what is published is a rounded function of it anyway.
    """
    total = np.zeros(mechanism.length, np.int64)
    share = mechanism.share_sigma
    at_once = max(1, math.floor((MAX_SIGMA / share) ** 2 * (1 - 1e-9)))
    part = 0
    while missing > 0:
        shares = min(missing, at_once)
        sampler = noise_sampler(*(share * math.sqrt(shares)).as_integer_ratio())
        total += sampler.sample(KeyStream(derive_key(entropy, "missing noise"), part), mechanism.length)
        missing -= shares
        part += 1
    return total


def next_model(
    task: Task, round_: Round, done: Done, parameters: F32, memory: Memory, number: int, entropy: bytes
) -> NextModel:
    """The model after a round with at least one opened group.

    parameters: float32 (d,), that the optimiser moves.  number: sums that are in them.  entropy: 32 fresh secret bytes.
    Raises RoundAborted if no group was opened, or if the step leaves float32's range.
    """
    if not done.sums:
        raise RoundAborted("no group was opened: " + "; ".join(dict.fromkeys(done.reasons.values())))
    mechanism = mechanism_of(round_)
    steady = needs_steady_noise(round_.ticket.noise)
    totals = {group: opened.values for group, opened in done.sums.items()}
    if steady:
        came = sum(opened.contributors for opened in done.sums.values())
        first, mask = min(totals), (1 << mechanism.modulus_bits) - 1
        noisy = totals[first].astype(np.int64) + missing_noise(mechanism, round_.ticket.n_max - came, entropy)
        totals[first] = (noisy & mask).astype(np.uint32)
    vector, sums = np.zeros(mechanism.dimension), np.zeros(METRICS)
    for total in totals.values():
        decoded = decode(mechanism, total, round_.tid)
        vector += decoded.vector
        if decoded.metrics is not None:
            m = decoded.metrics
            sums += (m.count, m.correct, m.loss, m.unclipped)
    # Divided by what was planned: dividing by what came would publish it.
    vector /= task.expected_units * len(totals) / round_.groups
    update = -vector if mechanism.unit == "example" else vector
    moved, kept = task.optimizer.step(parameters, update, memory, number)
    metrics = MetricSums(*sums.tolist()) if mechanism.metric_scale else None
    clip = mechanism.clip
    if metrics is not None and task.adaptive is not None:
        clip = task.adaptive.next(clip, metrics)
    return NextModel(moved, kept, clip, {} if metrics is None else shown_metrics(metrics), steady)


def shown_metrics(sums: MetricSums) -> dict[str, float]:
    """For people: accuracy, loss and unclipped as shares and mean of the units counted, with the count; all noisy."""
    shown = {"count": sums.count}
    if sums.count > 0:
        shown["accuracy"] = min(max(sums.correct / sums.count, 0.0), 1.0)
        shown["loss"] = max(sums.loss / sums.count, 0.0)
        shown["unclipped"] = min(max(sums.unclipped / sums.count, 0.0), 1.0)
    return shown


def set_hash(salt: bytes, digest: bytes) -> bytes:
    """What public lineage says of the sealed set. salt: 32 secret bytes; without it the few likely sets could be tried.

    digest: `seal_hash`.
    """
    return tagged_hash("public lineage", salt, digest)


# --- the account


@dataclass(frozen=True)
class Spent:
    """Both figures after some rounds, and the method of each. Neither follows from the other."""

    readers: float
    readers_method: str
    coordinator: float
    coordinator_method: str
    delta: float


def spent(task: Task, planned: Planned, published: int, sends: int) -> Spent:
    """Both figures, from what was planned by PLD; beyond the plan by RDP, without loading an accountant.

    published: models.  sends: of the device that sent most often.
    """
    readers, coordinator = planned.readers_epsilon(published), planned.coordinator_epsilon(sends)
    methods = ["pld" if figure is not None else "rdp" for figure in (readers, coordinator)]
    if readers is None or coordinator is None:
        mechanism, sampling = planned.mechanism, planned.sampling
        noise, beta = noise_of(mechanism)
        unit = mechanism.unit
        if readers is None:
            readers = (against_readers(noise, unit, unit, sampling, beta) * published).epsilon(planned.delta)
        if coordinator is None:
            coordinator = (against_coordinator(noise, unit, unit, sampling, beta) * sends).epsilon(planned.delta)
    return Spent(readers, methods[0], coordinator, methods[1], planned.delta)


def round_record(
    round_: Round,
    row: RoundRow,
    contributions: Iterable[ContributionRow],
    device_of: Mapping[int, int],
    published: bool,
) -> RoundRecord:
    """What the round let out, for `coordinator.accounting.Record`. Loads dp-accounting: for reports.

    device_of: roster index in the round's epoch -> a number that stays the device's over epochs.
    """
    from coordinator.accounting import RoundRecord

    included: tuple[tuple[int, ...], ...] = ()
    if row.certificate is not None and row.seal is not None:  # from the certificate on the sums count as known
        groups = messages.decode(Seal, messages.decode(Signed, row.seal).body).groups
        included = tuple(tuple(device_of[sender] for sender, _ in group) for group in groups)
    inside = {device for group in included for device in group}
    return RoundRecord(
        mechanism=mechanism_of(round_),
        sampling=sampling_of(round_),
        corrupt=round_.corrupt,
        included=included,
        left_out=tuple(d for c in contributions if (d := device_of[c.sender]) not in inside),
        published=published,
        steady_noise=needs_steady_noise(round_.ticket.noise),
    )
