"""`init` and `serve`: the directory made, and the process that serves from it."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import resource
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

import msgspec

from coordinator.commands.output import named_metrics, print_object, say
from edge_sdk.errors import ParameterError

if TYPE_CHECKING:
    from coordinator.events import Event


def add_setup_options(parser: argparse.ArgumentParser) -> None:
    """What `init` needs to know; `serve` takes the same, and looks at it in an empty directory only."""
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
    add_setup_options(parser)
    return vars(parser.parse_args([]))


def init(options: argparse.Namespace) -> int:
    """Make the keys and coordinator.toml. Says so on stderr when it is `serve` that finds nothing there."""
    from coordinator import serving
    from coordinator.config import AuthorityTable, BrokerTable, Listen

    if options.address in ("0.0.0.0", "::") and not options.name:  # noqa: S104 - to ask for a name
        raise ParameterError("--name is needed with this address: what do devices call this machine?")
    directory = serving.init(
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
        print_object(made)
    else:
        say(f"made {options.dir}: its settings are in {options.dir / 'coordinator.toml'}", *directory.assumptions)
    return 0


DESCRIPTORS = 65_536
"""As the unit of systemd has it. Each connection to amqtt is one of this process's."""


def _allow_descriptors() -> None:
    """As many descriptors as are wanted, or as the system allows. The usual soft limit, 1,024, is there for programs
    that use `select`, and a stranger's connections reach it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def serve(options: argparse.Namespace) -> int:
    """Broker, enrolment and rounds, until SIGTERM or SIGINT."""
    from coordinator.config import NAME
    from coordinator.serving import Directory, Service

    if not (options.dir / NAME).exists():
        init(options)
    elif given := [name for name, default in _setup_defaults().items() if getattr(options, name) != default]:
        logging.getLogger("sordino").warning(
            "%s is there already and counts; not looked at: %s", options.dir / NAME, ", ".join(sorted(given))
        )
    _allow_descriptors()
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
                print_object(ready)
            say(
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
            print_object({"event": name, "time_s": round(time.time(), 3), **_plain(event)})
            return
        match event:
            case events.Contributed() | events.RoundCertified():
                logging.getLogger("sordino").debug("%s", event)
            case events.ModelPublished():
                shown = ", ".join(named_metrics(event.metrics, event.loss))
                spent = event.spent
                say(
                    f"{event.task}: model {event.model} of round {event.round} after {event.seconds:.1f} s; {shown}; "
                    f"epsilon {spent.readers:.3g} against readers ({spent.readers_method}), "
                    f"{spent.coordinator:.3g} against the coordinator ({spent.coordinator_method}), "
                    f"delta {spent.delta:g}"
                )
            case _:
                say(name.replace("_", " ") + ": " + ", ".join(f"{k} {v}" for k, v in _plain(event).items()))

    return show


def _snake(name: str) -> str:
    return "".join("_" + c.lower() if c.isupper() else c for c in name).lstrip("_")


def _plain(event: Event) -> dict[str, Any]:
    """An event's fields, as JSON has them."""
    plain = msgspec.to_builtins(event)
    assert isinstance(plain, dict)  # noqa: S101 - events are dataclasses
    return plain
