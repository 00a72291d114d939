"""`invite`, `devices`, `revoke` and `status`: who is in."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from coordinator.commands.directory import open_store
from coordinator.commands.output import named_metrics, print_object, print_result, say
from edge_sdk.errors import ParameterError

if TYPE_CHECKING:
    from coordinator.rows import EpochRow
    from coordinator.task import Planned, Task


def invite(options: argparse.Namespace) -> int:
    """Print tokens that let one device each join, once."""
    from coordinator.serving import Directory

    if not 1 <= options.count <= 10_000:
        raise ParameterError(f"--count {options.count}: 1 to 10000")
    directory = Directory.open(options.dir)
    store = open_store(options)
    try:
        desk, now_s = directory.desk(store), int(time.time())
        hours = directory.config.limits.token_hours if options.hours is None else options.hours
        if not 0 < hours <= 8784:
            raise ParameterError(f"--hours {hours}: above 0, at most 8784")
        for _ in range(options.count):
            token = desk.invite(options.role, options.tag, max(1, int(hours * 3600)), now_s)
            if options.json:
                print_object(
                    {"token": token.text, "role": token.role, "tags": options.tag, "expires_s": token.expires_s}
                )
            else:
                print(token.text)
    finally:
        store.close()
    if not options.json:
        say(f"for one {options.role} each, {hours:g} hours long: `edge-{options.role} join TOKEN`")
    return 0


def devices(options: argparse.Namespace) -> int:
    """Print who ever joined: those that are in before those that were revoked, who is away longest first."""
    store = open_store(options)
    try:
        with store.reading() as rows:
            found = rows.devices()
    finally:
        store.close()
    found.sort(key=lambda row: (row.revoked_s is not None, row.last_seen_s or 0.0, row.enrolled_s))
    for row in found:
        if options.json:
            print_object(
                {
                    "device": row.key.hex(),
                    "role": row.role,
                    "tags": sorted(row.tags),
                    "enrolled_s": row.enrolled_s,
                    "last_seen_s": row.last_seen_s,
                    "revoked": row.revoked_s is not None,
                    "revoked_s": row.revoked_s,
                }
            )
        else:
            tags = ", ".join(sorted(row.tags)) or "no tags"
            seen = f"last seen {_when(row.last_seen_s)}" if row.last_seen_s is not None else "never seen"
            out = f"; revoked {_when(row.revoked_s)}" if row.revoked_s is not None else ""
            print(f"{row.key.hex()} {row.role} ({tags}): enrolled {_when(row.enrolled_s)}, {seen}{out}")
    return 0


def _when(at_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(at_s))


def revoke(options: argparse.Namespace) -> int:
    """Shut a device out for good."""
    store = open_store(options)
    try:
        prefix = options.device.lower()
        with store.transaction() as rows:
            found = [row for row in rows.devices() if row.key.hex().startswith(prefix)]
            if len(prefix) < 8 or len(found) != 1:
                raise ParameterError(f"{options.device!r} names {len(found)} devices: give 8 digits or more, of one")
            new = rows.revoke(found[0].key, time.time())
        print_result(options, {"device": found[0].key.hex(), "revoked": True, "was_enrolled": new})
    finally:
        store.close()
    return 0


def status(options: argparse.Namespace) -> int:
    """Print what runs, who is in and how the tasks stand."""
    from coordinator.serving import Directory, serving_pid
    from coordinator.task import load

    directory = Directory.open(options.dir)
    config, now_s = directory.config, time.time()
    store = open_store(options)
    try:
        with store.reading() as rows:
            devices, tokens, epoch = rows.devices(), rows.tokens(), rows.newest_epoch()
            tasks: list[dict[str, Any]] = []
            ending = {row.task for row in rows.active_rounds()}
            for row in rows.tasks():
                if row.state == "removed" and row.name not in ending:
                    continue
                task, planned = load(row)
                newest, last = rows.newest_model(row.name), rows.last_round(row.name)
                tasks.append(
                    {
                        "task": row.name,
                        "state": row.state,
                        "model": newest.number if newest is not None else 0,
                        "rounds": task.rounds,
                        "n_max": task.cohort.n_max or planned.n_max,
                        "n_max_in_force": min(planned.n_max, len(epoch.roster)) if epoch is not None else None,
                        "n_max_capped": _capped(task, planned, epoch),
                        "waiting": rows.waiting(row.name) if row.state == "running" else "",
                        "round": last.number if last is not None else None,
                        "phase": last.phase if last is not None else None,
                        "reason": last.reason if last is not None else "",
                        "contributions": len(rows.contributions(last.tid)) if last is not None else 0,
                        "metrics": dict(newest.metrics) if newest is not None else {},
                        "loss": planned.loss,
                        "readers_epsilon": planned.readers_epsilon(newest.number if newest is not None else 0),
                        "delta": planned.delta,
                    }
                )
    finally:
        store.close()
    enrolled = [row for row in devices if row.revoked_s is None]
    answer = {
        "fleet": config.fleet,
        "serving": serving_pid(options.dir),
        "coordinator": directory.identity.public_key.hex(),
        "authority": directory.authority_key.hex(),
        "publishers": list(config.publishers),
        "broker_url": config.broker_url,
        "enrolment_url": config.enrolment_url,
        "assumptions": directory.assumptions,
        "devices": sum(row.role == "device" for row in enrolled),
        "helpers": sum(row.role == "helper" for row in enrolled),
        "revoked": len(devices) - len(enrolled),
        "seen_last_hour": sum((row.last_seen_s or 0) > now_s - 3600 for row in enrolled),
        "invitations": sum(token.spent_by is None and token.expires_s > now_s for token in tokens),
        "epoch": epoch.number if epoch is not None else None,
        "epoch_devices": len(epoch.roster) if epoch is not None else 0,
        "tasks": tasks,
    }
    if options.json:
        print_object(answer)
        return 0
    running = f"serving (process {answer['serving']})" if answer["serving"] else "not serving"
    print(f"fleet {config.fleet}: {running}; broker {config.broker_url}, enrolment {config.enrolment_url}")
    for assumption in directory.assumptions:
        print(f"  {assumption}")
    print(
        f"  {answer['devices']} devices and {answer['helpers']} helpers enrolled, {answer['seen_last_hour']} seen in "
        f"the last hour, {answer['revoked']} revoked, {answer['invitations']} invitations open"
    )
    print(f"  epoch {answer['epoch']} of {answer['epoch_devices']} devices" if epoch is not None else "  no epoch yet")
    for line in tasks:
        shown = "".join(f"; {metric}" for metric in named_metrics(line["metrics"], line["loss"]))
        print(f"  task {line['task']}: {line['state']}, model {line['model']} of {line['rounds']}{shown}")
        if line["phase"] is not None:
            print(f"    round {line['round']}: {line['phase']} {line['reason']}".rstrip())
        if line["waiting"]:
            print(f"    waiting: {line['waiting']}")
        if line["n_max_capped"]:
            print(f"    {line['n_max_capped']}")
    return 0


def _capped(task: Task, planned: Planned, epoch: EpochRow | None) -> str:
    """Why rounds are sealed before the n_max that the operator asked for, empty if they are not."""
    asked, cap, why = task.cohort.n_max, planned.n_max, f"the plan is for a roster of {planned.n_max}"
    if epoch is not None and len(epoch.roster) < cap:
        cap = len(epoch.roster)
        why = f"the epoch has {cap} devices"
    if asked is None or cap >= asked:
        return ""
    return f"a round takes {cap} contributors and is sealed then: n_max is {asked}, and {why}"
