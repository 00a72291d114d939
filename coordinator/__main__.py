"""edge-coordinator: the operator's commands. stdout is data, stderr is progress and log; no prompts.

Commands that change something write it to the store, where the process that serves sees it within a second; it need not
run.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy.exc import DatabaseError, OperationalError

from coordinator.commands import authority, fleet, models, serving, tasks
from edge_sdk.errors import SordinoError

DEFAULT_DIRECTORY = Path("sordino-coordinator")

Run = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit 0: done, 1: failed (the reason is on stderr), 2: usage, 130: interrupted."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(
        level=logging.DEBUG if options.verbose else logging.INFO,
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        force=True,
    )
    for chatty in ("amqtt", "transitions", "asyncio"):
        logging.getLogger(chatty).setLevel(logging.INFO if options.verbose else logging.ERROR)
    run: Run = options.run
    try:
        return run(options)
    except BrokenPipeError:
        # Whoever read stdout has gone; Python would complain about it once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("edge-coordinator: interrupted", file=sys.stderr)
        return 130
    except DatabaseError as error:
        if type(error) not in (DatabaseError, OperationalError):
            raise  # it is ours
        remedy = "" if isinstance(error, OperationalError) else ": put coordinator.db back from a backup"
        print(f"edge-coordinator: the store: {error.orig}{remedy}", file=sys.stderr)
        return 1
    except (SordinoError, OSError) as error:
        print(f"edge-coordinator: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--dir",
        type=Path,
        default=DEFAULT_DIRECTORY,
        metavar="DIR",
        help=f"where all its state is ({DEFAULT_DIRECTORY})",
    )
    common.add_argument("--json", action="store_true", help="one object a line on stdout")
    common.add_argument("--verbose", action="store_true", help="log more to stderr")
    parser = argparse.ArgumentParser(
        prog="edge-coordinator",
        description="Run rounds of private federated learning: see sums, never a device's part.",
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def add(to: Any, name: str, run: Run, text: str) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = to.add_parser(name, help=text, description=text, parents=[common])
        command.set_defaults(run=run)
        return command

    setup = add(commands, "init", serving.init, "make the keys and coordinator.toml")
    serving.add_setup_options(setup)
    serve = add(commands, "serve", serving.serve, "run: broker, enrolment and rounds, until told to stop")
    serving.add_setup_options(serve)

    apart = commands.add_parser("authority", help="a fleet authority whose key lives apart from the coordinator")
    steps = apart.add_subparsers(dest="step", required=True)
    make = add(steps, "init", authority.init, "make the authority's key, and its settings beside it")
    make.add_argument("--out", type=Path, required=True, metavar="KEY", help="where the key goes, with mode 0600")
    roster = add(steps, "roster", authority.roster, "on the coordinator: write who is enrolled")
    roster.add_argument("--out", type=Path, required=True, metavar="FILE")
    epoch = add(steps, "epoch", authority.epoch, "where the key is: freeze that roster, then draw, and sign")
    epoch.add_argument("--key", type=Path, required=True, metavar="KEY", help="from `authority init`")
    epoch.add_argument("--roster", type=Path, required=True, metavar="FILE", help="from `authority roster`")
    epoch.add_argument("--out", type=Path, required=True, metavar="EPOCH")
    install = add(steps, "install", authority.install, "on the coordinator: put a signed epoch in force")
    install.add_argument("epoch", type=Path, metavar="EPOCH", help="from `authority epoch`")

    invite = add(commands, "invite", fleet.invite, "print a token that lets one device join, once")
    invite.add_argument("--role", choices=("device", "helper"), default="device")
    invite.add_argument("--tag", action="append", default=[], metavar="TAG", help="tasks choose devices by tags")
    invite.add_argument("--hours", type=float, metavar="H", help="its life (coordinator.toml says, if not given)")
    invite.add_argument("--count", type=int, default=1, metavar="N", help="print so many, one a line")

    add(commands, "devices", fleet.devices, "who joined, with key, role, tags and when it was last seen")
    revoke = add(commands, "revoke", fleet.revoke, "shut a device out for good")
    revoke.add_argument("device", metavar="DEVICE", help="its public key in hexadecimal, or the first 8 digits or more")
    add(commands, "status", fleet.status, "what runs, who is in, how the tasks stand")

    task = commands.add_parser("task", help="what is trained")
    steps = task.add_subparsers(dest="step", required=True)
    for name, run, text in (
        ("add", tasks.add, "check a task file, plan its privacy, and start it"),
        ("plan", tasks.plan, "say what `task add` would, and start nothing"),
    ):
        new = add(steps, name, run, text)
        new.add_argument("file", type=Path, metavar="FILE", help="TOML; coordinator/task.py shows one in full")
        new.add_argument("--roster", type=int, metavar="N", help="plan for so many devices, not those enrolled now")
    add(steps, "list", tasks.list_, "all tasks")
    for name, run, text in (
        ("pause", tasks.pause, "open no further rounds"),
        ("resume", tasks.resume, "open rounds again"),
        ("remove", tasks.remove, "take a task back for good: devices hear of it no more, its models stay"),
        ("skip-round", tasks.skip_round, "leave out a round number, after the store was put back from a backup"),
    ):
        add(steps, name, run, text).add_argument("task", metavar="TASK")

    model = commands.add_parser("model", help="what came of it")
    steps = model.add_subparsers(dest="step", required=True)
    add(steps, "list", models.list_, "a task's models with their lineage").add_argument("task", metavar="TASK")
    export = add(steps, "export", models.export, "write a model's shared parameters, one flat float32 vector")
    export.add_argument("task", metavar="TASK")
    export.add_argument("--number", type=int, metavar="N", help="which model (the newest)")
    export.add_argument("--out", type=Path, required=True, metavar="FILE", help=".npy, or .f32 for the bare numbers")
    export.add_argument(
        "--bundle", type=Path, metavar="FILE", help="write the task's bundle too, for `edge-export model`"
    )
    report = add(commands, "report", models.report, "one page about a task, in Markdown")
    report.add_argument("task", metavar="TASK")
    return parser


if __name__ == "__main__":
    sys.exit(main())
