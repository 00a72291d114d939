"""The fleet authority: from who is enrolled to a signed epoch, here or on a machine of its own (docs/protocol.md 7.1).

Where its key lies beside the coordinator's, `LocalAuthority` signs whenever the server asks. Where it lives apart, the
coordinator writes a roster file, the authority looks at it and answers with an epoch file, and only files travel.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from coordinator.config import AuthorityTable, check_authority, decode_toml
from coordinator.rows import EpochRow
from coordinator.store import Store
from edge_sdk.crypto.identity import Identity, check_signature
from edge_sdk.enrolment import HexKey
from edge_sdk.errors import ParameterError, PeerError
from edge_sdk.files import read_text, reason, write_once, write_whole
from edge_sdk.protocol import messages
from edge_sdk.protocol.authority import FIRST, FleetEpoch, Roster, draw, freeze
from edge_sdk.protocol.messages import MAX_GROUPS, MAX_MEMBERS, MAX_ROSTER, Frozen, Signed, verify

SEED_BYTES = 32
S = TypeVar("S", bound=msgspec.Struct)
MAX_FILE_BYTES = 256 << 20


def sign_epoch(
    authority: Identity,
    settings: AuthorityTable,
    *,
    coordinator: bytes,
    devices: Sequence[bytes],
    helpers: Sequence[bytes],
    groups: Sequence[int],
    number: int,
    previous: bytes,
    now_s: float,
    entropy: Callable[[int], bytes],
    published: Callable[[Signed], None],
) -> Signed:
    """The next epoch: the roster is frozen, signed and published, and only then is the beacon drawn.

    groups: numbers of groups that tasks ask for.  published: is handed the frozen roster before entropy is drawn.
    Raises ParameterError if no safe committee can be made, with what would do.
    """
    roster = Roster(devices)
    # What the configuration merely allows is left out where the roster is too small; what a task needs is an error.
    allowed = {count for count in settings.group_counts if 2 * count <= len(roster)}
    frozen = freeze(
        authority,
        roster,
        coordinator=coordinator,
        corrupt_devices=settings.corrupt_devices,
        committee=settings.committee,
        committee_size=settings.committee_size,
        expires_s=int(now_s + settings.epoch_days * 86_400),
        helpers=helpers if settings.committee == "helpers" else (),
        number=number,
        previous=previous,
    )
    published(frozen)
    return draw(authority, frozen, roster, entropy(32), sorted({1, *allowed, *groups}))


class LocalAuthority:
    """The authority in the coordinator's process: `coordinator.epochs.Authority`. An honest coordinator is assumed."""

    def __init__(
        self, identity: Identity, settings: AuthorityTable, coordinator: bytes, entropy: Callable[[int], bytes]
    ) -> None:
        self._identity = identity
        self._settings = settings
        self._coordinator = coordinator
        self._entropy = entropy

    @property
    def public_key(self) -> bytes:
        return self._identity.public_key

    def next_epoch(
        self,
        devices: Sequence[bytes],
        helpers: Sequence[bytes],
        groups: Sequence[int],
        previous: EpochRow | None,
        now_s: float,
    ) -> Signed | None:
        """Raises ParameterError if no safe committee can be made of these, with what would do."""
        return sign_epoch(
            self._identity,
            self._settings,
            coordinator=self._coordinator,
            devices=devices,
            helpers=helpers,
            groups=groups,
            number=1 if previous is None else previous.number + 1,
            previous=FIRST if previous is None else previous.id,
            now_s=now_s,
            entropy=self._entropy,
            published=lambda _: None,  # nobody else is there to be shown it
        )


@dataclass(frozen=True)
class RemoteAuthority:
    """An authority that lives apart: its epochs come by `authority install`."""

    public_key: bytes

    def next_epoch(
        self,
        devices: Sequence[bytes],
        helpers: Sequence[bytes],
        groups: Sequence[int],
        previous: EpochRow | None,
        now_s: float,
    ) -> Signed | None:
        """None: whatever changed, the old epoch goes on until the authority has signed."""
        return None


# Files between a coordinator and an authority that lives apart.

Keys = Annotated[list[HexKey], Meta(max_length=MAX_ROSTER)]


class RosterBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who is enrolled, as the coordinator says. epoch: the newest one that it has, a Signed Epoch, for the chain."""

    version: Literal[1]
    fleet: Annotated[str, Meta(min_length=1, max_length=64)]
    authority: HexKey
    coordinator: HexKey
    devices: Keys
    helpers: Annotated[list[HexKey], Meta(max_length=MAX_MEMBERS)]
    groups: Annotated[list[Annotated[int, Meta(ge=1, le=MAX_GROUPS)]], Meta(max_length=MAX_GROUPS)]
    epoch: bytes | None


class RosterFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`authority roster` writes it. signature: the coordinator's, over the body as this program encodes it."""

    roster: RosterBody
    signature: Annotated[str, Meta(pattern=r"^[0-9a-f]{128}\Z")]


class EpochFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`authority epoch` writes it. epoch: a Signed Epoch.  devices: the roster that it is over, ascending."""

    version: Literal[1]
    epoch: bytes
    devices: Annotated[list[HexKey], Meta(min_length=1, max_length=MAX_ROSTER)]


class AuthorityState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an authority that lives apart keeps beside its key: whom it serves, and where its chain stands."""

    version: Literal[1]
    coordinator: HexKey
    number: Annotated[int, Meta(ge=1)]
    id: HexKey
    devices: Keys


@dataclass(frozen=True)
class Drawn:
    """What `authority epoch` did, for people. added, removed: since the authority's last epoch."""

    number: int
    devices: int
    members: int
    added: tuple[str, ...]
    removed: tuple[str, ...]


SETTINGS = """\
# What this fleet authority decides, whatever a coordinator asks for.

committee = "everyone"           # who opens sums: "everyone", "helpers", or "drawn" with committee_size
# committee_size = 30
corrupt_devices = 1              # how many devices of the fleet may work together with the coordinator
group_counts = [1]
epoch_days = 30.0
"""


def write_roster(
    path: Path, store: Store, coordinator: Identity, authority: bytes, fleet: str, groups: Sequence[int]
) -> RosterBody:
    """The coordinator's part of an authority that lives apart: say who is enrolled."""
    with store.reading() as rows:
        enrolled = [row for row in rows.devices() if row.revoked_s is None]
        newest = rows.newest_epoch()
    body = RosterBody(
        version=1,
        fleet=fleet,
        authority=authority.hex(),
        coordinator=coordinator.public_key.hex(),
        devices=sorted(row.key.hex() for row in enrolled if row.role == "device"),
        helpers=sorted(row.key.hex() for row in enrolled if row.role == "helper"),
        groups=sorted({1, *groups}),
        epoch=newest.signed if newest is not None else None,
    )
    signature = coordinator.sign("roster", msgspec.json.encode(body)).hex()
    write_whole(path, _pretty(RosterFile(body, signature)), mode=0o644)
    return body


def init_key(path: Path) -> Identity:
    """A fleet authority's key, and beside it its settings. Raises ParameterError if there is a file."""
    if not write_once(path, os.urandom(SEED_BYTES)):
        raise ParameterError(f"{path} is there already: a key is never replaced")
    write_once(settings_path(path), SETTINGS.encode())
    return read_identity(path)


def read_identity(path: Path) -> Identity:
    """A key as `init` and `authority init` make it: 32 bytes. Raises ParameterError that names the file."""
    try:
        return Identity(path.read_bytes())
    except FileNotFoundError as error:
        raise ParameterError(f"{path} is missing") from error
    except (OSError, ParameterError) as error:
        raise ParameterError(f"{path} is not a key: {error}") from error


def settings_path(key: Path) -> Path:
    return key.with_name(key.name + ".toml")


def state_path(key: Path) -> Path:
    return key.with_name(key.name + ".state")


def make_epoch(key: Path, roster_path: Path, out: Path, now_s: float, entropy: Callable[[int], bytes]) -> Drawn:
    """The authority's part: check the roster file, freeze, write OUT.frozen, draw, write OUT.

    The authority's state is on disk before OUT is, so no two epochs of one number leave.
    Raises ParameterError or PeerError that names what does not fit; then no epoch was signed.
    """
    authority = read_identity(key)
    try:
        text = read_text(settings_path(key))
    except (OSError, ParameterError) as error:
        raise ParameterError(f"{settings_path(key)}: {reason(error)}") from error
    settings = decode_toml(text, AuthorityTable, str(settings_path(key)))
    check_authority(settings, text, str(settings_path(key)))
    file = _read(roster_path, RosterFile)
    body = file.roster
    coordinator = bytes.fromhex(body.coordinator)
    check_signature(coordinator, "roster", msgspec.json.encode(body), bytes.fromhex(file.signature))
    if body.authority != authority.public_key.hex():
        raise PeerError(f"{roster_path} is for the authority {body.authority[:16]}, not for this one")
    state = _read(state_path(key), AuthorityState) if state_path(key).exists() else None
    if state is not None and state.coordinator != body.coordinator:
        raise PeerError(
            f"{roster_path} is of coordinator {body.coordinator[:16]}, and this authority serves "
            f"{state.coordinator[:16]}: another coordinator needs another authority"
        )
    number, previous = (state.number, bytes.fromhex(state.id)) if state is not None else (0, FIRST)
    if body.epoch is not None:
        # Signed by this key: if the state is older, it was put back from a backup.
        shown = FleetEpoch(authority.public_key, messages.decode(Signed, body.epoch))
        if shown.number > number:
            number, previous = shown.number, shown.id
    frozen_path = out.with_name(out.name + ".frozen")
    signed = sign_epoch(
        authority,
        settings,
        coordinator=coordinator,
        devices=[bytes.fromhex(device) for device in body.devices],
        helpers=[bytes.fromhex(helper) for helper in body.helpers],
        groups=body.groups,
        number=number + 1,
        previous=previous,
        now_s=now_s,
        entropy=entropy,
        published=lambda frozen: write_whole(frozen_path, messages.encode(frozen), mode=0o644),
    )
    epoch = FleetEpoch(authority.public_key, signed)
    next_state = AuthorityState(1, body.coordinator, epoch.number, epoch.id.hex(), body.devices)
    write_whole(state_path(key), _pretty(next_state))
    write_whole(out, _pretty(EpochFile(1, messages.encode(signed), body.devices)), mode=0o644)
    before = set(state.devices) if state is not None else set()
    return Drawn(
        epoch.number,
        len(body.devices),
        len(epoch.members),
        tuple(sorted(set(body.devices) - before)),
        tuple(sorted(before - set(body.devices))),
    )


def install_epoch(store: Store, path: Path, authority: bytes, coordinator: bytes, now_s: float) -> EpochRow:
    """The coordinator's last part: check the epoch file and put it in force.

    Raises PeerError that names what does not fit, ParameterError if the epoch is not newer than the one in force.
    """
    file = _read(path, EpochFile)
    signed = messages.decode(Signed, file.epoch)
    epoch = FleetEpoch(authority, signed)
    roster = Roster([bytes.fromhex(device) for device in file.devices])
    if epoch.frozen.coordinator != coordinator:
        raise PeerError(f"{path} names the coordinator {epoch.frozen.coordinator.hex()[:16]}, which is not this one")
    if (roster.root, len(roster)) != (epoch.frozen.roster_root, epoch.frozen.roster_size):
        raise PeerError(f"{path}: the devices listed are not those of the signed roster")
    if epoch.frozen.expires_s <= now_s:
        raise PeerError(f"{path}: the epoch has expired")
    row = EpochRow(epoch.number, epoch.id, file.epoch, roster.keys, now_s)
    with store.transaction() as rows:
        known = {device.key: device.role for device in rows.devices()}
        strangers = [key.hex()[:16] for key in roster.keys if known.get(key) != "device"]
        if strangers:
            raise PeerError(f"{path}: {len(strangers)} devices were never enrolled here: {', '.join(strangers[:5])}")
        rows.add_epoch(row)
    return row


def frozen_of(path: Path, authority: bytes) -> Frozen:
    """What `OUT.frozen` holds, for auditors: it was there before the beacon."""
    return verify(Frozen, authority, messages.decode(Signed, path.read_bytes()))


def _pretty(value: msgspec.Struct) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n"


def _read(path: Path, kind: type[S]) -> S:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ParameterError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MB")
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise ParameterError(f"{path}: {error.strerror or error}") from error
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ParameterError(f"{path} is not what it should be: {error}") from error
