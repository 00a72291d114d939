"""coordinator.toml: what an operator decides once. `edge-coordinator init` writes it, with what everything means."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from coordinator.broker import Kind
from coordinator.toml_file import place, tables
from edge_sdk.enrolment import HexKey, Url
from edge_sdk.errors import ParameterError
from edge_sdk.files import read_text, reason
from edge_sdk.protocol.messages import MAX_GROUPS, MAX_MEMBERS, MAX_ROSTER, CommitteeKind

NAME = "coordinator.toml"
S = TypeVar("S", bound=msgspec.Struct)

Port = Annotated[int, Meta(ge=1, le=65535)]
Host = Annotated[str, Meta(min_length=1, max_length=253, pattern=r"^[A-Za-z0-9.:_-]+\Z")]


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of the file's tables: nothing unknown."""


class Listen(_Table, frozen=True):
    """Where the coordinator is found."""

    address: Host = "127.0.0.1"
    names: Annotated[tuple[Host, ...], Meta(min_length=1, max_length=16)] = ("127.0.0.1",)
    enrolment_port: Port = 8443
    broker_port: Port = 8883


class BrokerTable(_Table, frozen=True):
    """Which broker. url: of one that is there already."""

    kind: Kind = "auto"
    url: Url | None = None


class AuthorityTable(_Table, frozen=True):
    """What the fleet authority decides. key: its public key, where it lives apart; then it decides there."""

    key: HexKey | None = None
    committee: CommitteeKind = "everyone"
    committee_size: Annotated[int, Meta(ge=4, le=MAX_MEMBERS)] | None = None
    corrupt_devices: Annotated[int, Meta(ge=1, le=MAX_ROSTER)] = 1
    group_counts: tuple[Annotated[int, Meta(ge=1, le=MAX_GROUPS)], ...] = (1,)
    epoch_days: Annotated[float, Meta(gt=0.0, le=366.0)] = 30.0


class Limits(_Table, frozen=True):
    """Sizes and lifetimes."""

    upload_memory_mb: Annotated[int, Meta(ge=1, le=65536)] = 32
    certificate_days: Annotated[int, Meta(ge=1, le=3650)] = 365
    token_hours: Annotated[float, Meta(gt=0.0, le=8784.0)] = 72.0


class Config(_Table, frozen=True):
    """See `TEMPLATE`."""

    fleet: Annotated[str, Meta(min_length=1, max_length=40, pattern=r"^[a-z0-9][a-z0-9._-]*\Z")]
    publishers: Annotated[tuple[HexKey, ...], Meta(min_length=1, max_length=16)]
    listen: Listen = Listen()
    broker: BrokerTable = BrokerTable()
    authority: AuthorityTable = AuthorityTable()
    limits: Limits = Limits()

    @classmethod
    def from_toml(cls, text: str, source: str = NAME) -> Config:
        """Raises ParameterError with the file, the line, the key and what would do."""
        config = decode_toml(text, cls, source)
        if (config.broker.kind == "external") != (config.broker.url is not None):
            raise ParameterError(f'{source}, {place(text, ("broker", "url"))}: given exactly when kind is "external"')
        if config.broker.url is not None and not config.broker.url.startswith("mqtts://"):
            raise ParameterError(f"{source}, {place(text, ('broker', 'url'))}: a broker's URL starts with mqtts://")
        if config.listen.enrolment_port == config.listen.broker_port:
            raise ParameterError(f"{source}, {place(text, ('listen', 'broker_port'))}: enrolment_port is the same")
        check_authority(config.authority, text, source)
        return config

    @classmethod
    def read(cls, directory: Path) -> Config:
        """Raises ParameterError as `from_toml`, or if there is none."""
        path = directory / NAME
        try:
            text = read_text(path)
        except FileNotFoundError as error:
            raise ParameterError(f"{path} is missing: `edge-coordinator init --dir {directory}` makes it") from error
        except (OSError, ParameterError) as error:
            raise ParameterError(f"{path}: {reason(error)}") from error
        return cls.from_toml(text, str(path))

    @property
    def enrolment_url(self) -> str:
        """What tokens name."""
        return f"https://{_bracketed(self.listen.names[0])}:{self.listen.enrolment_port}"

    @property
    def broker_url(self) -> str:
        """What devices are told."""
        return self.broker.url or f"mqtts://{_bracketed(self.listen.names[0])}:{self.listen.broker_port}"

    @property
    def certificate_names(self) -> list[str]:
        """What the server's certificate is for: what devices call this machine, and how the coordinator reaches it."""
        own = [] if self.listen.address in ("0.0.0.0", "::") else [self.listen.address]  # noqa: S104 - only compared
        return list(dict.fromkeys([*self.listen.names, *own, "127.0.0.1", "::1", "localhost"]))


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def check_authority(table: AuthorityTable, text: str, source: str) -> None:
    """Raises ParameterError if the authority's settings do not fit together."""
    if (table.committee == "drawn") != (table.committee_size is not None):
        where = place(text, ("authority", "committee_size"))
        raise ParameterError(f'{source}, {where}: given exactly when committee is "drawn"; 30 is usual')


def decode_toml(text: str, kind: type[S], source: str) -> S:
    """A file's tables as a struct. Raises ParameterError with the line and the key."""
    given = tables(text, source)
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `$")
        keys = re.findall(r"[A-Za-z0-9_-]+", re.sub(r"\[[^\]]*\]", "", path))  # without places in lists
        what = what.replace("matching regex '^[0-9a-f]{64}\\\\Z'", "of 64 hexadecimal digits, small letters")
        what = what.replace("matching regex '^[A-Za-z0-9.:_-]+\\\\Z'", "that is a host's name or address")
        named = re.fullmatch(r"Object (contains unknown|missing required) field `(.+)`", what)
        if named is not None:
            keys.append(named[2])
            what = "there is no such key: remove it" if "unknown" in named[1] else "missing: add it"
        raise ParameterError(f"{source}, {place(text, tuple(keys))}: {what[:1].lower()}{what[1:]}") from error


TEMPLATE = """\
# The coordinator of this fleet. Changes count from the next start of `edge-coordinator serve`.

fleet = {fleet}

# Who may sign bundles: public keys that every device of this fleet pins. Tokens carry them, so a device that joined
# before a key was added has to be told by its owner (policy.toml).
publishers = {publishers}

[listen]
# This machine only; "0.0.0.0" for all its networks.
address = {address}
# What devices call this machine, best first: host names or addresses.
names = {names}
enrolment_port = {enrolment_port}
broker_port = {broker_port}

[broker]
# "mosquitto", "amqtt" (slower; needs nothing else), "auto" (the first of them that is there), or "external": one that
# you run, and whose rules you keep (docs/operating.md).
kind = {broker}
{broker_url}

[authority]
# The fleet authority's public key, if it lives apart from this directory. Then what follows is decided there.
{authority}
# Who opens sums: "everyone" (4 devices or more), "helpers" (3 edge-helpers or more), "drawn" (with committee_size).
committee = {committee}
{committee_size}
# How many devices of the fleet may work together with the coordinator.
corrupt_devices = {corrupt_devices}
# Numbers of groups that tasks may use, beside those that they ask for.
group_counts = [1]
# A revoked device is out of committees and cohorts after this at the latest.
epoch_days = 30.0

[limits]
# For uploads on their way; more wait. The broker may hold as much, and 16 MB, for the coordinator; amqtt, which is in
# the same process, holds half of it.
upload_memory_mb = 32
# Devices renew by themselves after two thirds.
certificate_days = 365
# An invitation's life, if `invite` does not say.
token_hours = 72.0
"""


def template(
    *,
    fleet: str,
    publishers: list[str],
    listen: Listen,
    broker: BrokerTable,
    authority: AuthorityTable,
) -> str:
    """The text of a new coordinator.toml. Raises ParameterError if it would be refused when it is read."""
    size = authority.committee_size
    quoted = msgspec.json.encode  # a JSON string is a TOML string, for what these may hold
    text = TEMPLATE.format(
        fleet=quoted(fleet).decode(),
        publishers=quoted(publishers).decode(),
        address=quoted(listen.address).decode(),
        names=quoted(listen.names).decode(),
        enrolment_port=listen.enrolment_port,
        broker_port=listen.broker_port,
        broker=quoted(broker.kind).decode(),
        broker_url=f"url = {quoted(broker.url).decode()}"
        if broker.url
        else '# url = "mqtts://broker.example.org:8883"',
        authority=f'key = "{authority.key}"' if authority.key else '# key = "..."',
        committee=quoted(authority.committee).decode(),
        committee_size=f"{'# ' if size is None else ''}committee_size = {size or 30}",
        corrupt_devices=authority.corrupt_devices,
    )
    Config.from_toml(text, NAME)
    return text
