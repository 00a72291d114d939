"""`task`: what is trained."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from coordinator.commands.directory import open_store
from coordinator.commands.output import print_object, print_result, say
from edge_sdk.errors import ParameterError

if TYPE_CHECKING:
    from coordinator.serving import Directory
    from coordinator.store import Store


def add(options: argparse.Namespace) -> int:
    """Check a task file, plan its privacy, and start it."""
    return _plan(options, start=True)


def plan(options: argparse.Namespace) -> int:
    """Say what `add` would, and start nothing."""
    return _plan(options, start=False)


def _plan(options: argparse.Namespace, *, start: bool) -> int:
    from coordinator.serving import Directory
    from coordinator.task import add_task, check_task

    directory = Directory.open(options.dir)
    store = open_store(options)
    try:
        checked = check_task(
            store,
            options.file,
            corrupt_devices=_corrupt_devices(directory, store),
            publishers=[bytes.fromhex(key) for key in directory.config.publishers],
            roster=options.roster,
        )
        if start:
            add_task(store, checked, time.time())
    finally:
        store.close()
    planned = checked.planned
    if options.json:
        print_object(
            {
                "task": checked.task.name,
                "bundle": planned.bundle.hex(),
                "dimension": planned.dimension,
                "n_max": planned.n_max,
                "groups": planned.groups,
                "delta": planned.delta,
                "readers_epsilon": planned.readers[-1][1],
                "coordinator_epsilon": planned.coordinator[-1][1],
                "ledger_readers": planned.ledger_readers,
                "ledger_coordinator": planned.ledger_coordinator,
                "policy_delta": planned.policy_delta,
                "policy_readers": planned.policy_readers,
                "policy_coordinator": planned.policy_coordinator,
                "warnings": checked.warnings,
            }
        )
    else:
        print(planned.text)
    say(*(f"warning: {warning}" for warning in checked.warnings))
    return 0


def _corrupt_devices(directory: Directory, store: Store) -> int:
    """F: of the installed epoch where the authority lives apart and decides it, else of coordinator.toml."""
    from edge_sdk.protocol import messages
    from edge_sdk.protocol.messages import Epoch, Signed

    if directory.authority is None:
        with store.reading() as t:
            row = t.newest_epoch()
        if row is not None:
            return messages.decode(Epoch, messages.decode(Signed, row.signed).body).frozen.corrupt_devices
    return directory.config.authority.corrupt_devices


def list_(options: argparse.Namespace) -> int:
    """Print all tasks."""
    store = open_store(options)
    try:
        with store.reading() as rows:
            tasks = [(row, rows.newest_model(row.name)) for row in rows.tasks()]
    finally:
        store.close()
    for row, newest in tasks:
        number = newest.number if newest is not None else 0
        if options.json:
            print_object({"task": row.name, "state": row.state, "model": number, "next_round": row.next_round})
        else:
            print(f"{row.name}: {row.state}, model {number}, next round {row.next_round}")
    return 0


def pause(options: argparse.Namespace) -> int:
    """Open no further rounds."""
    return _set_state(options, "paused")


def resume(options: argparse.Namespace) -> int:
    """Open rounds again."""
    return _set_state(options, "running")


def _set_state(options: argparse.Namespace, state: Any) -> int:
    store = open_store(options)
    try:
        with store.transaction() as rows:
            row = rows.task(options.task)
            if row is not None and row.state == "done":
                raise ParameterError(f"task {options.task} is done: add another one, with another name")
            rows.set_task_state(options.task, state)
    finally:
        store.close()
    print_result(options, {"task": options.task, "state": state})
    return 0


def remove(options: argparse.Namespace) -> int:
    """Take a task back for good; what came of it stays."""
    store = open_store(options)
    try:
        with store.transaction() as rows:
            rows.remove_task(options.task)
            newest = rows.newest_model(options.task)
            rounds = [row for row in rows.active_rounds() if row.task == options.task]
    finally:
        store.close()
    said = {
        "task": options.task,
        "state": "removed",
        "models": newest.number + 1 if newest is not None else 0,
        "aborting": [row.number for row in rounds if row.phase != "CERTIFIED"],
        "opening": [row.number for row in rounds if row.phase == "CERTIFIED"],
    }
    if options.json:
        print_object(said)
        return 0
    shown = {key: ", ".join(map(str, value)) or "none" for key, value in said.items() if isinstance(value, list)}
    print_result(options, said | shown)
    say("nothing was deleted: `model list`, `model export` and `report` go on having them; its name stays taken")
    return 0


def skip_round(options: argparse.Namespace) -> int:
    """Leave out a round number, after the store was put back from a backup."""
    from coordinator.serving import serving_pid

    store = open_store(options)
    try:
        with store.transaction() as rows:
            number = rows.skip_round(options.task, end_running=serving_pid(options.dir) is None)
    finally:
        store.close()
    print_result(options, {"task": options.task, "next_round": number})
    return 0
