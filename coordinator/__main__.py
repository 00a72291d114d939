"""edge-coordinator: the operator's commands. stdout is data, stderr is progress and log; no prompts.

Commands that change something write it to the store, where the process that serves sees it within a second; it need not
run.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import msgspec
from sqlalchemy.exc import OperationalError

from edge_sdk.errors import ParameterError, SordinoError

if TYPE_CHECKING:
    from coordinator.events import Event
    from coordinator.serving import Directory
    from coordinator.store import ModelRow, Store

DEFAULT_DIRECTORY = Path("sordino-coordinator")
LISTED_ROUNDS = 5

Run = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit 0: done, 1: failed (the reason is on stderr), 2: usage."""
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
    except OperationalError as error:
        print(f"edge-coordinator: the store: {error.orig}", file=sys.stderr)
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

    setup = add(commands, "init", _init, "make the keys and coordinator.toml")
    _setup_options(setup)
    serve = add(commands, "serve", _serve, "run: broker, enrolment and rounds, until told to stop")
    _setup_options(serve)

    authority = commands.add_parser("authority", help="a fleet authority whose key lives apart from the coordinator")
    steps = authority.add_subparsers(dest="step", required=True)
    make = add(steps, "init", _authority_init, "make the authority's key, and its settings beside it")
    make.add_argument("--out", type=Path, required=True, metavar="KEY", help="where the key goes, with mode 0600")
    roster = add(steps, "roster", _authority_roster, "on the coordinator: write who is enrolled")
    roster.add_argument("--out", type=Path, required=True, metavar="FILE")
    epoch = add(steps, "epoch", _authority_epoch, "where the key is: freeze that roster, then draw, and sign")
    epoch.add_argument("--key", type=Path, required=True, metavar="KEY", help="from `authority init`")
    epoch.add_argument("--roster", type=Path, required=True, metavar="FILE", help="from `authority roster`")
    epoch.add_argument("--out", type=Path, required=True, metavar="EPOCH")
    install = add(steps, "install", _authority_install, "on the coordinator: put a signed epoch in force")
    install.add_argument("epoch", type=Path, metavar="EPOCH", help="from `authority epoch`")

    invite = add(commands, "invite", _invite, "print a token that lets one device join, once")
    invite.add_argument("--role", choices=("device", "helper"), default="device")
    invite.add_argument("--tag", action="append", default=[], metavar="TAG", help="tasks choose devices by tags")
    invite.add_argument("--hours", type=float, metavar="H", help="its life (coordinator.toml says, if not given)")
    invite.add_argument("--count", type=int, default=1, metavar="N", help="print so many, one a line")

    revoke = add(commands, "revoke", _revoke, "shut a device out for good")
    revoke.add_argument("device", metavar="DEVICE", help="its public key in hexadecimal, or the first 8 digits or more")
    add(commands, "status", _status, "what runs, who is in, how the tasks stand")

    task = commands.add_parser("task", help="what is trained")
    tasks = task.add_subparsers(dest="step", required=True)
    new = add(tasks, "add", _task_add, "check a task file, plan its privacy, and start it")
    new.add_argument("file", type=Path, metavar="FILE", help="TOML; coordinator/task.py shows one in full")
    new.add_argument("--roster", type=int, metavar="N", help="plan for so many devices, not those enrolled now")
    add(tasks, "list", _task_list, "all tasks")
    for name, run, text in (
        ("pause", _task_pause, "open no further rounds"),
        ("resume", _task_resume, "open rounds again"),
        ("skip-round", _task_skip, "leave out a round number, after the store was put back from a backup"),
    ):
        add(tasks, name, run, text).add_argument("task", metavar="TASK")

    model = commands.add_parser("model", help="what came of it")
    models = model.add_subparsers(dest="step", required=True)
    add(models, "list", _model_list, "a task's models with their lineage").add_argument("task", metavar="TASK")
    export = add(models, "export", _model_export, "write a model's shared parameters, one flat float32 vector")
    export.add_argument("task", metavar="TASK")
    export.add_argument("--number", type=int, metavar="N", help="which model (the newest)")
    export.add_argument("--out", type=Path, required=True, metavar="FILE", help=".npy, or .f32 for the bare numbers")
    export.add_argument(
        "--bundle", type=Path, metavar="FILE", help="write the task's bundle too, for `edge-export model`"
    )
    report = add(commands, "report", _report, "one page about a task, in Markdown")
    report.add_argument("task", metavar="TASK")
    return parser


def _setup_options(parser: argparse.ArgumentParser) -> None:
    setup = parser.add_argument_group("the first time")
    setup.add_argument("--fleet", default="sordino", metavar="NAME", help="the fleet's name (sordino)")
    setup.add_argument("--address", default="127.0.0.1", metavar="ADDRESS", help="to listen on (127.0.0.1)")
    setup.add_argument(
        "--name", action="append", metavar="HOST",
        help="what devices call this machine, best first; may be given several times (the address)",
    )  # fmt: skip
    setup.add_argument("--enrolment-port", type=int, default=8443, metavar="PORT")
    setup.add_argument("--broker-port", type=int, default=8883, metavar="PORT")
    setup.add_argument("--broker", choices=("auto", "mosquitto", "amqtt", "external"), default="auto")
    setup.add_argument("--broker-url", metavar="URL", help="of a broker that is there, with --broker external")
    setup.add_argument("--publisher", action="append", default=[], metavar="HEX", help="who may sign bundles")
    setup.add_argument("--authority", metavar="HEX", help="the fleet authority's public key, if it lives apart")
    setup.add_argument("--committee", choices=("everyone", "helpers", "drawn"), default="everyone")
    setup.add_argument("--committee-size", type=int, metavar="M", help="for --committee drawn")
    setup.add_argument("--corrupt-devices", type=int, default=1, metavar="F")


def _setup_defaults() -> dict[str, Any]:
    parser = argparse.ArgumentParser(add_help=False)
    _setup_options(parser)
    return vars(parser.parse_args([]))


# Setting up and serving


def _init(options: argparse.Namespace) -> int:
    from coordinator.config import AuthorityTable, BrokerTable, Listen
    from coordinator.serving import init

    if options.address in ("0.0.0.0", "::") and not options.name:  # noqa: S104 - to ask for a name
        raise ParameterError("--name is needed with this address: what do devices call this machine?")
    directory = init(
        options.dir,
        int(time.time()),
        fleet=options.fleet,
        listen=Listen(
            options.address, tuple(options.name or [options.address]), options.enrolment_port, options.broker_port
        ),
        broker=BrokerTable(options.broker, options.broker_url),
        authority=AuthorityTable(options.authority, options.committee, options.committee_size, options.corrupt_devices),
        publishers=options.publisher,
    )
    made = {
        "directory": str(options.dir),
        "fleet": directory.config.fleet,
        "coordinator": directory.identity.public_key.hex(),
        "authority": directory.authority_key.hex(),
        "publishers": list(directory.config.publishers),
        "assumptions": directory.assumptions,
    }
    if options.json and options.command == "init":
        _line(made)
    else:
        _say(f"made {options.dir}: its settings are in {options.dir / 'coordinator.toml'}", *directory.assumptions)
    return 0


def _serve(options: argparse.Namespace) -> int:
    from coordinator.config import NAME
    from coordinator.serving import Directory, Service

    if not (options.dir / NAME).exists():
        _init(options)
    elif given := [name for name, default in _setup_defaults().items() if getattr(options, name) != default]:
        logging.getLogger("sordino").warning(
            "%s is there already and counts; not looked at: %s", options.dir / NAME, ", ".join(sorted(given))
        )
    stopping = False

    def stop(_: int, __: FrameType | None) -> None:
        nonlocal stopping
        stopping = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        directory = Directory.open(options.dir)
        service = Service(directory, _shower(options.json))
        try:
            ready = {
                "event": "serving",
                "fleet": directory.config.fleet,
                "broker": service.broker.name,
                "broker_url": directory.config.broker_url,
                "enrolment_url": directory.config.enrolment_url,
                "pid": os.getpid(),
            }
            if options.json:
                _line(ready)
            _say(
                f"fleet {ready['fleet']}: broker {ready['broker']} at {ready['broker_url']}, "
                f"enrolment at {ready['enrolment_url']}",
                *directory.assumptions,
            )
            service.run(lambda: stopping)
        finally:
            service.close()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def _shower(as_json: bool) -> Callable[[Event], None]:
    """What is done with events: a line of JSON on stdout, or of text on stderr."""
    from coordinator import events

    def show(event: Event) -> None:
        name = _snake(type(event).__name__)
        if as_json:
            _line({"event": name, "time_s": round(time.time(), 3), **_plain(event)})
            return
        match event:
            case events.Contributed() | events.RoundCertified():
                logging.getLogger("sordino").debug("%s", event)
            case events.ModelPublished():
                shown = ", ".join(f"{key} {value:.4g}" for key, value in event.metrics.items())
                spent = event.spent
                _say(
                    f"{event.task}: model {event.model} of round {event.round} after {event.seconds:.1f} s; {shown}; "
                    f"epsilon {spent.readers:.3g} against readers ({spent.readers_method}), "
                    f"{spent.coordinator:.3g} against the coordinator ({spent.coordinator_method}), "
                    f"delta {spent.delta:g}"
                )
            case _:
                _say(name.replace("_", " ") + ": " + ", ".join(f"{k} {v}" for k, v in _plain(event).items()))

    return show


def _snake(name: str) -> str:
    return "".join("_" + c.lower() if c.isupper() else c for c in name).lstrip("_")


def _plain(event: Event) -> dict[str, Any]:
    """An event's fields, as JSON has them."""
    plain = msgspec.to_builtins(event)
    assert isinstance(plain, dict)  # noqa: S101 - events are dataclasses
    return plain


# The fleet authority


def _authority_init(options: argparse.Namespace) -> int:
    from coordinator.authority import init_key, settings_path

    key = init_key(options.out).public_key.hex()
    if options.json:
        _line({"authority": key, "key": str(options.out), "settings": str(settings_path(options.out))})
    else:
        print(key)
        _say(f"what it decides is in {settings_path(options.out)}; coordinators take it by `init --authority {key}`")
    return 0


def _authority_roster(options: argparse.Namespace) -> int:
    from coordinator.authority import write_roster
    from coordinator.serving import Directory
    from coordinator.task import load

    directory = Directory.open(options.dir)
    store = _store(options)
    try:
        with store.reading() as rows:
            groups = [load(row)[1].groups for row in rows.tasks() if row.state != "done"]
        body = write_roster(
            options.out, store, directory.identity, directory.authority_key, directory.config.fleet, groups
        )
    finally:
        store.close()
    _done(options, {"out": str(options.out), "devices": len(body.devices), "helpers": len(body.helpers)})
    return 0


def _authority_epoch(options: argparse.Namespace) -> int:
    from coordinator.authority import make_epoch

    drawn = make_epoch(options.key, options.roster, options.out, time.time(), os.urandom)
    _done(
        options,
        {
            "out": str(options.out), "number": drawn.number, "devices": drawn.devices, "members": drawn.members,
            "added": list(drawn.added), "removed": list(drawn.removed),
        },
    )  # fmt: skip
    return 0


def _authority_install(options: argparse.Namespace) -> int:
    from coordinator.authority import install_epoch
    from coordinator.serving import Directory

    directory = Directory.open(options.dir)
    store = _store(options)
    try:
        row = install_epoch(store, options.epoch, directory.authority_key, directory.identity.public_key, time.time())
    finally:
        store.close()
    _done(options, {"number": row.number, "devices": len(row.roster)})
    return 0


# Who is in


def _invite(options: argparse.Namespace) -> int:
    from coordinator.serving import Directory

    if not 1 <= options.count <= 10_000:
        raise ParameterError(f"--count {options.count}: 1 to 10000")
    directory = Directory.open(options.dir)
    store = _store(options)
    try:
        desk, now_s = directory.desk(store), int(time.time())
        hours = directory.config.limits.token_hours if options.hours is None else options.hours
        if not 0 < hours <= 8784:
            raise ParameterError(f"--hours {hours}: above 0, at most 8784")
        for _ in range(options.count):
            token = desk.invite(options.role, options.tag, max(1, int(hours * 3600)), now_s)
            if options.json:
                _line({"token": token.text, "role": token.role, "tags": options.tag, "expires_s": token.expires_s})
            else:
                print(token.text)
    finally:
        store.close()
    if not options.json:
        _say(f"for one {options.role} each, {hours:g} hours long: `edge-{options.role} join TOKEN`")
    return 0


def _revoke(options: argparse.Namespace) -> int:
    store = _store(options)
    try:
        prefix = options.device.lower()
        with store.transaction() as rows:
            found = [row for row in rows.devices() if row.key.hex().startswith(prefix)]
            if len(prefix) < 8 or len(found) != 1:
                raise ParameterError(f"{options.device!r} names {len(found)} devices: give 8 digits or more, of one")
            new = rows.revoke(found[0].key, time.time())
        _done(options, {"device": found[0].key.hex(), "revoked": True, "was_enrolled": new})
    finally:
        store.close()
    return 0


def _status(options: argparse.Namespace) -> int:
    from coordinator.serving import Directory, serving_pid
    from coordinator.task import load

    directory = Directory.open(options.dir)
    config, now_s = directory.config, time.time()
    store = _store(options)
    try:
        with store.reading() as rows:
            devices, tokens, epoch = rows.devices(), rows.tokens(), rows.newest_epoch()
            tasks: list[dict[str, Any]] = []
            for row in rows.tasks():
                task, planned = load(row)
                newest, last = rows.newest_model(row.name), rows.last_round(row.name)
                tasks.append(
                    {
                        "task": row.name,
                        "state": row.state,
                        "model": newest.number if newest is not None else 0,
                        "rounds": task.rounds,
                        "round": last.number if last is not None else None,
                        "phase": last.phase if last is not None else None,
                        "reason": last.reason if last is not None else "",
                        "contributions": len(rows.contributions(last.tid)) if last is not None else 0,
                        "metrics": dict(newest.metrics) if newest is not None else {},
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
        _line(answer)
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
        shown = ", ".join(f"{key} {value:.4g}" for key, value in line["metrics"].items())
        print(f"  task {line['task']}: {line['state']}, model {line['model']} of {line['rounds']}; {shown}")
        if line["phase"] is not None:
            print(f"    round {line['round']}: {line['phase']} {line['reason']}")
    return 0


# Tasks and models


def _task_add(options: argparse.Namespace) -> int:
    from coordinator.serving import Directory
    from coordinator.task import Task, add_task

    directory = Directory.open(options.dir)
    store = _store(options)
    try:
        planned = add_task(
            store,
            options.file,
            corrupt_devices=_corrupt_devices(directory, store),
            now_s=time.time(),
            publishers=[bytes.fromhex(key) for key in directory.config.publishers],
            roster=options.roster,
        )
    finally:
        store.close()
    if options.json:
        _line(
            {
                "task": Task.from_toml(options.file.read_text(encoding="utf-8")).name,
                "bundle": planned.bundle.hex(),
                "dimension": planned.dimension,
                "n_max": planned.n_max,
                "groups": planned.groups,
                "delta": planned.delta,
                "readers_epsilon": planned.readers[-1][1],
                "coordinator_epsilon": planned.coordinator[-1][1],
                "ledger_readers": planned.ledger_readers,
                "ledger_coordinator": planned.ledger_coordinator,
            }
        )
    else:
        print(planned.text)
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


def _task_list(options: argparse.Namespace) -> int:
    store = _store(options)
    try:
        with store.reading() as rows:
            tasks = [(row, rows.newest_model(row.name)) for row in rows.tasks()]
    finally:
        store.close()
    for row, newest in tasks:
        number = newest.number if newest is not None else 0
        if options.json:
            _line({"task": row.name, "state": row.state, "model": number, "next_round": row.next_round})
        else:
            print(f"{row.name}: {row.state}, model {number}, next round {row.next_round}")
    return 0


def _task_pause(options: argparse.Namespace) -> int:
    return _set_state(options, "paused")


def _task_resume(options: argparse.Namespace) -> int:
    return _set_state(options, "running")


def _set_state(options: argparse.Namespace, state: Any) -> int:
    store = _store(options)
    try:
        with store.transaction() as rows:
            row = rows.task(options.task)
            if row is not None and row.state == "done":
                raise ParameterError(f"task {options.task} is done: add another one, with another name")
            rows.set_task_state(options.task, state)
    finally:
        store.close()
    _done(options, {"task": options.task, "state": state})
    return 0


def _task_skip(options: argparse.Namespace) -> int:
    from coordinator.serving import serving_pid

    store = _store(options)
    try:
        with store.transaction() as rows:
            number = rows.skip_round(options.task, end_running=serving_pid(options.dir) is None)
    finally:
        store.close()
    _done(options, {"task": options.task, "next_round": number})
    return 0


def _model_list(options: argparse.Namespace) -> int:
    store = _store(options)
    try:
        models = _models(store, options.task)
    finally:
        store.close()
    for model in models:
        if options.json:
            _line(
                {
                    "task": model.task,
                    "model": model.number,
                    "parameters": model.parameters.hex(),
                    "parent": model.parent.hex() if model.parent is not None else None,
                    "cohort_planned": model.cohort,
                    "set_hash": model.set_hash.hex() if model.set_hash is not None else None,
                    "metrics": dict(model.metrics),
                    "clip": model.clip,
                    "published_s": model.published_s,
                }
            )
        else:
            shown = ", ".join(f"{key} {value:.4g}" for key, value in model.metrics.items())
            print(f"{model.number}: {model.parameters.hex()[:16]} {shown}")
    return 0


def _models(store: Store, task: str) -> list[ModelRow]:
    with store.reading() as rows:
        if rows.task(task) is None:
            raise ParameterError(f"there is no task {task!r}")
        return rows.models(task)


def _model_export(options: argparse.Namespace) -> int:
    import io

    import numpy as np

    from edge_sdk.files import write_whole

    if options.out.suffix not in (".npy", ".f32"):
        raise ParameterError(f"--out {options.out}: .npy, or .f32 for the bare little-endian numbers")
    store = _store(options)
    try:
        models = {model.number: model for model in _models(store, options.task)}
        number = max(models) if options.number is None else options.number
        if number not in models:
            raise ParameterError(f"task {options.task} has no model {number}: 0 to {max(models)}")
        content = store.blob(models[number].parameters)
        if options.bundle is not None:
            with store.reading() as rows:
                row = rows.task(options.task)
            assert row is not None  # noqa: S101 - it was there a moment ago, and no task is ever removed
            write_whole(options.bundle, store.blob(row.bundle_file), mode=0o644)
    finally:
        store.close()
    if options.out.suffix == ".npy":
        file = io.BytesIO()
        np.save(file, np.frombuffer(content, dtype="<f4"), allow_pickle=False)
        write_whole(options.out, file.getvalue(), mode=0o644)
    else:
        write_whole(options.out, content, mode=0o644)
    said = {
        "task": options.task,
        "model": number,
        "parameters": models[number].parameters.hex(),
        "out": str(options.out),
    }
    _done(options, said)
    return 0


def _report(options: argparse.Namespace) -> int:
    from coordinator.report import collect, markdown
    from coordinator.serving import Directory

    directory = Directory.open(options.dir)
    store = _store(options)
    try:
        page = markdown(collect(store, options.task, directory.authority_key, directory.assumptions, time.time()))
    finally:
        store.close()
    if options.json:
        _line({"task": options.task, "markdown": page})
    else:
        print(page, end="")
    return 0


# What all of them need


def _store(options: argparse.Namespace) -> Store:
    from coordinator.config import NAME
    from coordinator.store import Store

    if not (options.dir / NAME).exists():
        raise ParameterError(f"{options.dir / NAME} is missing: `edge-coordinator init --dir {options.dir}` makes it")
    return Store(options.dir)


def _line(value: object) -> None:
    print(msgspec.json.encode(value).decode(), flush=True)


def _say(*lines: str) -> None:
    for line in lines:
        print(line, file=sys.stderr, flush=True)


def _done(options: argparse.Namespace, said: dict[str, Any]) -> None:
    """A command's result: a line of JSON, or words."""
    if options.json:
        _line(said)
    else:
        print(", ".join(f"{key} {value}" for key, value in said.items()))


if __name__ == "__main__":
    sys.exit(main())
