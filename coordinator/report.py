"""One page about a task, in Markdown: what was trained, what it cost, what it came from, who is trusted with what."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass

from coordinator import rounds
from coordinator.accounting import Figures, Record
from coordinator.planner import budget_text
from coordinator.rows import ModelRow, RoundRow
from coordinator.store import Store
from coordinator.task import Planned, Task, load
from edge_sdk.errors import ParameterError
from edge_sdk.protocol import messages
from edge_sdk.protocol.authority import FleetEpoch
from edge_sdk.protocol.messages import Signed
from edge_sdk.protocol.rounds import Round

MAX_ROUNDS_SHOWN = 200


@dataclass(frozen=True)
class TaskReport:
    """What a report says. ended: rounds by how they ended.  figures: of what happened, None before the first sum."""

    task: Task
    planned: Planned
    state: str
    models: Sequence[ModelRow]
    rounds: Sequence[RoundRow]
    figures: Figures | None
    assumptions: Sequence[str]
    committee: str
    made_s: float


def collect(store: Store, name: str, authority: bytes, assumptions: Sequence[str], now_s: float) -> TaskReport:
    """Read all that a report needs. Loads dp-accounting. Raises ParameterError on an unknown task."""
    with store.reading() as rows:
        row = rows.task(name)
        if row is None:
            raise ParameterError(f"there is no task {name!r}")
        task, planned = load(row)
        models, all_rounds = rows.models(name), rows.rounds(name)
        published = {model.tid for model in models if model.tid is not None}
        epochs: dict[int, tuple[FleetEpoch, tuple[bytes, ...]]] = {}
        device_numbers: dict[bytes, int] = {}
        record = Record()
        for round_row in all_rounds:
            if round_row.epoch not in epochs:
                epoch_row = rows.epoch(round_row.epoch)
                epoch = FleetEpoch(authority, messages.decode(Signed, epoch_row.signed))
                epochs[round_row.epoch] = epoch, epoch_row.roster
            epoch, roster = epochs[round_row.epoch]
            contributions = rows.contributions(round_row.tid)
            if not contributions and round_row.tid not in published:
                continue  # nobody sent: it cost nothing
            device_of = {index: device_numbers.setdefault(key, len(device_numbers)) for index, key in enumerate(roster)}
            round_ = Round(epoch, messages.decode(Signed, round_row.ticket))
            record.add(rounds.round_record(round_, round_row, contributions, device_of, round_row.tid in published))
        newest = rows.newest_epoch()
    committee = "none yet"
    if newest is not None:
        last = FleetEpoch(authority, messages.decode(Signed, newest.signed))
        t = last.thresholds
        committee = (
            f"{last.frozen.committee}: {t.members} members, {t.quorum} sign, {t.answers} open, up to {t.corrupt} may "
            f"be corrupt; of {last.frozen.roster_size} devices up to {last.frozen.corrupt_devices} may work together "
            "with the coordinator"
        )
    figures = _figures(record, planned.delta)
    return TaskReport(task, planned, row.state, models, all_rounds, figures, tuple(assumptions), committee, now_s)


def _figures(record: Record, delta: float) -> Figures | None:
    if not record.rounds:
        return None
    try:
        return record.figures_of_plan(delta)
    except ParameterError:  # rounds that no one plan covers: the looser method holds for them
        return record.figures(delta)


def markdown(report: TaskReport) -> str:
    """The page."""
    task, planned, models = report.task, report.planned, report.models
    newest = models[-1]
    named = {"accuracy": "accuracy"} if planned.has_answers else {}
    named["loss"] = f"loss ({planned.loss})" if planned.loss else "loss"
    by_phase: dict[str, int] = {}
    for row in report.rounds:
        by_phase[row.phase] = by_phase.get(row.phase, 0) + 1
    lines = [
        f"# Task {task.name}",
        "",
        f"As of {_time(report.made_s)}: {report.state}, {newest.number} of {task.rounds} models published"
        + (f"; rounds: {', '.join(f'{n} {phase}' for phase, n in sorted(by_phase.items()))}" if by_phase else "")
        + ".",
        "",
        "## What is trained",
        "",
        f"- bundle `{planned.bundle.hex()}`, signed by publisher `{planned.publisher.hex()}`",
        f"- unit of privacy: one {'example' if task.unit == 'example' else 'device, with all its data'}",
        f"- clip {newest.clip:g}, noise {planned.mechanism.noise_multiplier:.4g} times what one unit adds, carried by "
        f"any {planned.honest} devices of a group",
        f"- cohort planned: {task.cohort.expected:g} +- {task.cohort.spread:g} contributors, {planned.groups} "
        f"group{'s' if planned.groups > 1 else ''}, sealed at {planned.n_max}",
        f"- optimiser: {task.optimizer.kind}, rate {task.optimizer.learning_rate:g}",
        "",
        "## What it cost",
        "",
    ]
    if report.figures is None:
        lines += ["Nothing yet: no device sent anything.", ""]
    else:
        readers, coordinator = report.figures.readers, report.figures.coordinator
        lines += [
            "| against | epsilon | delta | method |",
            "|---|---|---|---|",
            f"| readers of the models | {readers.epsilon:.4g} | {readers.delta:g} | {readers.method} |",
            f"| the coordinator, who sees who sent (device that sent most) | {coordinator.epsilon:.4g} | "
            f"{coordinator.delta:g} | {coordinator.method} |",
            "",
            "Two figures about two observers: neither follows from the other. The first holds only while it stays "
            "unpublished who took part in which round. The second shows how often the busiest device sent, so leave it "
            "out where devices' own coins hide them and this page is published.",
            "",
        ]
    lines += [
        "For the whole task a device's own ledger needs budgets of "
        f"{_budgets(planned.ledger_readers, planned.ledger_coordinator, planned.delta)}{_by_policy(planned)}; it "
        "refuses what goes beyond its owner's budget, whatever this page says.",
        "",
        "## Who is trusted",
        "",
        f"- committee: {report.committee}",
        *(f"- {assumption}" for assumption in report.assumptions),
        *([] if report.assumptions else ["- the fleet authority's and the publisher's keys are not on this machine"]),
        "- what the cryptography does not cover is in docs/threat-model.md",
        "",
        "## Lineage",
        "",
        "Metrics are sums of noisy values, inside the same budget. The set hash is salted: with the salt, which stays "
        "with the coordinator, an auditor can check who was in; without it nobody can guess.",
        "",
        f"| model | published | parameters | parent | cohort planned | {' | '.join(named.values())} | set hash |",
        "|---|---|---|---|---|---|" + "---|" * len(named),
    ]
    if len(models) > MAX_ROUNDS_SHOWN:
        earlier = len(models) - MAX_ROUNDS_SHOWN
        lines.append(f"| ... | {earlier} earlier ones in `model list` | | | | |" + " |" * len(named))
    for model in models[-MAX_ROUNDS_SHOWN:]:
        lines.append(
            f"| {model.number} | {_time(model.published_s)} | {_hash(model.parameters)} | {_hash(model.parent)} | "
            f"{model.cohort:g} | {' | '.join(_metric(model, name) for name in named)} | {_hash(model.set_hash)} |"
        )
    return "\n".join(lines) + "\n"


def _budgets(readers: float, coordinator: float, delta: float) -> str:
    return (
        f"{budget_text(readers)} against readers and {budget_text(coordinator)} against the coordinator, "
        f"at delta {delta:g}"
    )


def _by_policy(planned: Planned) -> str:
    """At the delta that devices count at. A plan that an earlier version made says nothing of it."""
    if not planned.policy_delta:
        return ""
    needed = _budgets(planned.policy_readers, planned.policy_coordinator, planned.policy_delta)
    return f"; by the policy that a device joins with, of {needed}"


def _time(unix_s: float) -> str:
    return dt.datetime.fromtimestamp(unix_s, dt.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _hash(value: bytes | None) -> str:
    return "" if value is None else f"`{value.hex()[:16]}`"


def _metric(model: ModelRow, name: str) -> str:
    return f"{model.metrics[name]:.4g}" if name in model.metrics else ""
