"""The commands `edge-device` and `edge-helper`. stdout is data, stderr is progress and log; no prompts."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import msgspec

from edge_sdk.errors import ParameterError, SordinoError

if TYPE_CHECKING:
    from edge_sdk.device import Device
    from edge_sdk.events import Event
    from edge_sdk.privacy.ledger_entry import Usage

DEFAULT_DIRECTORY = Path("sordino-device")


class _StdoutClosed(Exception):
    """Whoever read stdout has gone. Not an OSError: in a callback that one would be a fault to report."""


def device_main(arguments: Sequence[str] | None = None) -> int:
    """`edge-device`. Exit 0: done, 1: failed (the reason is on stderr), 2: usage."""
    parser, commands = _parser("edge-device", "Train where the data is; send one masked update a round.")
    join = _joining(commands, "join", "join the fleet that a token invites to, once")
    join.add_argument(
        "--task", action="append", default=[], metavar="NAME[=EXAMPLES]",
        help="allow this task, with examples from file.npz or module:function; may be given several times",
    )  # fmt: skip
    run = commands.add_parser("run", help="be a device until told to stop")
    once = commands.add_parser("once", help="one wake-up: connect, do what is due, leave, say what was done")
    once.add_argument("--max-seconds", type=float, default=300.0, metavar="S", help="leave by then (300)")
    status = commands.add_parser("status", help="what this device is, and what became of its last rounds")
    doctor = commands.add_parser("doctor", help="look at everything that has to be right; exit 1 if something is not")
    ledger = commands.add_parser("ledger", help="what was spent of the privacy budgets, against whom")
    return _main(parser, (join, run, once, status, doctor, ledger), arguments)


def helper_main(arguments: Sequence[str] | None = None) -> int:
    """`edge-helper`: an always-on committee member, without examples or tasks."""
    parser, commands = _parser("edge-helper", "An always-on committee member: it holds shares, never data.")
    join = _joining(commands, "join", "join the fleet that a token invites to, once")
    install = _joining(commands, "install", "join, and be a service of this machine from now on (root, systemd)")
    run = commands.add_parser("run", help="serve until told to stop")
    status = commands.add_parser("status", help="what this helper is, and how many prekeys it has out")
    doctor = commands.add_parser("doctor", help="look at everything that has to be right; exit 1 if something is not")
    return _main(parser, (join, install, run, status, doctor), arguments)


def _parser(name: str, description: str) -> tuple[argparse.ArgumentParser, Any]:
    parser = argparse.ArgumentParser(prog=name, description=description)
    return parser, parser.add_subparsers(dest="command", required=True)


def _joining(commands: Any, name: str, what: str) -> argparse.ArgumentParser:
    join: argparse.ArgumentParser = commands.add_parser(name, help=what)
    given = join.add_mutually_exclusive_group(required=True)
    given.add_argument("token", nargs="?", metavar="TOKEN", help="from `edge-coordinator invite`")
    given.add_argument("--token-file", type=Path, metavar="FILE", help="a file that holds it")
    return join


def _main(
    parser: argparse.ArgumentParser, commands: tuple[argparse.ArgumentParser, ...], arguments: Sequence[str] | None
) -> int:
    for command in commands:
        if not command.prog.endswith(" install"):  # whose place is systemd's
            command.add_argument(
                "--dir", type=Path, default=DEFAULT_DIRECTORY, metavar="DIR",
                help=f"where all its state is ({DEFAULT_DIRECTORY})",
            )  # fmt: skip
        command.add_argument("--json", action="store_true", help="one object a line on stdout")
        command.add_argument("--verbose", action="store_true", help="log more to stderr")
    options = parser.parse_args(arguments)
    options.role = parser.prog.removeprefix("edge-")
    logging.basicConfig(
        level=logging.DEBUG if options.verbose else logging.INFO,
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        force=True,
    )
    run: Callable[[argparse.Namespace], int] = {
        "join": _join, "install": _install, "run": _run, "once": _once, "status": _status, "doctor": _doctor,
        "ledger": _ledger,
    }[options.command]  # fmt: skip
    try:
        return run(options)
    except _StdoutClosed:
        return _without_stdout()
    except (SordinoError, OSError) as error:
        if isinstance(error.__cause__, _StdoutClosed):  # an event's line
            return _without_stdout()
        sys.stderr.write(f"{parser.prog}: {error}\n")
        return 1


def _without_stdout() -> int:
    """Quietly, as other tools end in a pipe. What is buffered would be tried again, and complained about, at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), sys.stdout.fileno())
    return 1


def _token(options: argparse.Namespace) -> str:
    """The token that was given. Raises ParameterError if it is for another role: before it is spent."""
    from edge_sdk.enrolment import Token

    token: str = options.token
    if options.token_file is not None:
        token = options.token_file.read_bytes().decode("ascii", "replace")  # what is no token is refused as that
    role = Token.read(token).role
    if role != options.role:
        raise ParameterError(f"this token is for a {role}: `edge-{role} join`")
    return token


def _join(options: argparse.Namespace) -> int:
    from edge_sdk import enrolment

    token = _token(options)
    given = dict(part.partition("=")[::2] for part in getattr(options, "task", ()))
    tasks = {task: _examples_given(options.dir, task, examples) for task, examples in given.items()}
    before = (options.dir / "enrolment.json").exists()
    membership = enrolment.join(options.dir, token, tuple(tasks))
    allowed = _allow_tasks(options.dir, tasks) if tasks else ()
    _add_tasks(options.dir, tasks)
    if allowed:
        limits = "each with what a task may cost by default: read it"
        _tell(f"{options.dir / 'policy.toml'} allows {', '.join(allowed)} from now on, {limits}")
    if options.json:
        _print({**msgspec.to_builtins(membership), "joined_before": before})
    else:
        if before:
            _tell(
                f"{options.dir} has joined already, the token was not used; a revoked device needs another directory, "
                "as does one whose ledger was rolled back or forked"
            )
        _tell(f"{membership.role} {membership.device} of {membership.fleet}")
        if membership.role == "device":  # a helper has no data, and so no policy
            _tell(f"what it may do is in {options.dir / 'policy.toml'}: read it")
    return 0


def _install(options: argparse.Namespace) -> int:
    from edge_sdk import systemd

    token = _token(options)
    # os.path's answers False to a user who may not look there; `install` refuses all but root, and says so.
    before = os.path.exists(systemd.STATE / "enrolment.json")
    membership = systemd.install(token)
    if options.json:
        _print({**msgspec.to_builtins(membership), "joined_before": before})
    else:
        if before:
            _tell(
                f"{systemd.STATE} has joined already, the token was not used; for a revoked helper, stop the service, "
                f"move what is in {systemd.STATE} away and install again"
            )
        _tell(f"{membership.role} {membership.device} of {membership.fleet}: the service {systemd.NAME} runs")
        _tell(f"its log: journalctl -u {systemd.NAME}; its state: edge-helper status --dir {systemd.STATE}")
    return 0


def _examples_given(directory: Path, task: str, examples: str) -> str:
    """What was given on the command line, as device.toml names it: there a file is relative to the directory, and here
    to where the command was called. Raises ParameterError if it can be no examples: before the token is spent."""
    from edge_sdk.config import examples_source

    if examples.endswith(".npz"):
        path = Path(examples).absolute()
        if not path.is_file():
            raise ParameterError(f"--task {task}={examples}: there is no file {path}")
        return str(path)
    if examples:
        examples_source(directory, examples)
    return examples


def _allow_tasks(directory: Path, tasks: Iterable[str]) -> tuple[str, ...]:
    """Allow these tasks in a policy.toml that was there before, as in one that `join` writes. Returns those that are
    new in it."""
    from edge_sdk.files import read_text, write_whole
    from edge_sdk.policy import allow_tasks
    from edge_sdk.rules import read_policy

    path, listed = directory / "policy.toml", read_policy(directory).tasks
    added = tuple(task for task in tasks if task not in listed)
    if added:
        try:
            text = allow_tasks(read_text(path), added)
        except ParameterError as error:
            raise ParameterError(f"{path}: {str(error).removeprefix('policy: ')}") from error
        write_whole(path, text.encode())
    return added


def _add_tasks(directory: Path, tasks: dict[str, str]) -> None:
    """Name the examples of these tasks in device.toml, behind what is there."""
    from edge_sdk.config import Config

    path, known = directory / "device.toml", Config.read(directory).tasks
    added = ""
    for task, examples in tasks.items():
        if examples and task not in known:
            added += f"\n[tasks.{msgspec.json.encode(task).decode()}]\n"
            added += f"examples = {msgspec.json.encode(examples).decode()}\n"
    if added:
        from edge_sdk.files import read_text, write_whole

        write_whole(path, (read_text(path) + added).encode())
        Config.read(directory)


def _device(options: argparse.Namespace) -> Device:
    from edge_sdk.device import Device

    def show(event: Event) -> None:
        if options.json:
            _print(event)
        else:
            logging.getLogger("edge_sdk").info("%s", event)

    device = Device(options.dir, on_event=show)

    def stop(number: int, frame: FrameType | None) -> None:
        device.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    return device


def _run(options: argparse.Namespace) -> int:
    _device(options).run()
    return 0


def _once(options: argparse.Namespace) -> int:
    report = _device(options).run_once(options.max_seconds)
    if options.json:
        _print({"event": "left", "reason": report.reason, "seconds": report.seconds})
    else:
        _tell(f"left after {report.seconds:.1f} s: {report.reason}")
    return 1 if report.reason == "no connection" else 0


def _status(options: argparse.Namespace) -> int:
    from edge_sdk.checkup import status

    found = status(options.dir)
    if options.json:
        _print(found)
        return 0
    _say(f"{found.role} {found.device[:16]} of {found.fleet}, broker {found.broker}")
    serving = f", in {found.open_sessions} open rounds of the committee" if found.open_sessions else ""
    _say(f"epoch {found.epoch if found.epoch is not None else 'unknown yet'}, {found.spare_prekeys} prekeys{serving}")
    for task in found.tasks:
        lacks = [text for has, text in ((task.examples, "no examples"), (task.allowed, "not allowed")) if not has]
        model = "no model yet" if task.model is None else f"model of {task.model} rounds"
        _say(f"{task.task}: {', '.join([model, *lacks])}")
        if task.waiting is not None:
            _say(f"  round {task.waiting} waits for the coordinator's receipt")
        if task.last is not None:
            _say(f"  round {task.last.round} {task.last.what}: {task.last.reason}")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from edge_sdk.checkup import doctor

    failed = False
    for finding in doctor(options.dir):
        failed = failed or finding.ok is False
        if options.json:
            _print(finding)
        else:
            word = {True: "ok", False: "FAILS", None: "-"}[finding.ok]
            _say(f"{finding.check:12} {word:6} {finding.detail}")
    return 1 if failed else 0


def _ledger(options: argparse.Namespace) -> int:
    from edge_sdk.checkup import ledger_summary

    found = ledger_summary(options.dir)
    if options.json:
        _print(found)
        return 0
    _say(f"{found.entries} entries; the budgets are those of one {found.protects}")
    _print_usage("lifetime", found.lifetime)
    for task, usage in found.tasks.items():
        _print_usage(task, usage)
    return 0


def _print_usage(name: str, usage: Usage) -> None:
    _say(f"{name}: {usage.rounds_entered} rounds entered, {usage.rounds_sent} sent")
    for who, spent in (("readers of the models", usage.readers), ("the coordinator", usage.coordinator)):
        if spent is not None:
            budget = spent.budget
            _say(f"  against {who}: epsilon {spent.epsilon:.3f} of {budget.epsilon:g} at delta {budget.delta:g}")


def _print(found: Any) -> None:
    _say(msgspec.json.encode(found).decode())


def _say(line: str) -> None:
    if sys.stdout is None:  # it was closed before we began
        raise OSError("stdout: it is closed")
    try:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    except BrokenPipeError as error:
        raise _StdoutClosed from error
    except OSError as error:
        raise OSError(f"stdout: {error.strerror or error}") from error


def _tell(line: str) -> None:
    sys.stderr.write(line + "\n")
