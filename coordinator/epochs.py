"""Which epoch is in force, who would be in the next one, and when it is due (docs/protocol.md section 7).

The fleet authority draws an epoch, and the coordinator only asks for one: when the roster changed, or the old one would
end under the next ticket. A new one costs every device a look at it, so none is asked for without need.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from coordinator.rows import DeviceRow, EpochRow
from coordinator.shelf import Shelf
from coordinator.store import Store
from edge_sdk.errors import ParameterError
from edge_sdk.protocol import messages
from edge_sdk.protocol.authority import FleetEpoch, Roster
from edge_sdk.protocol.messages import Signed
from edge_sdk.transport.wire import Parcel

SETTLE_S = 30.0
"""How long the members of a new epoch have to offer their first prekeys."""


class Authority(Protocol):
    """The fleet authority, as far as the server needs it. Its key may lie elsewhere."""

    @property
    def public_key(self) -> bytes:
        """The fleet authority's."""

    def next_epoch(
        self,
        devices: Sequence[bytes],
        helpers: Sequence[bytes],
        groups: Sequence[int],
        previous: EpochRow | None,
        now_s: float,
    ) -> Signed | None:
        """A signed epoch of this roster, or None if there is none to be had now: then the old one goes on.

        devices, helpers: keys of those to be in it, none of them revoked.  groups: numbers that tasks ask for.
        Raises ParameterError if no safe committee can be made of them, with what would do.
        """


@dataclass(frozen=True)
class InForce:
    """The epoch that the next ticket is of. parcel: its signed form, as it goes into a Welcome."""

    epoch: FleetEpoch
    row: EpochRow
    roster: Roster
    parcel: Parcel


class Epochs:
    """The fleet's epochs, as far as rounds or devices still need them."""

    def __init__(self, store: Store, authority: Authority, shelf: Shelf, began: Callable[[InForce], None]) -> None:
        """began: told of each epoch that comes into force."""
        self._store, self._authority, self._shelf, self._began = store, authority, shelf, began
        self.in_force: InForce | None = None
        self._checked: dict[int, FleetEpoch] = {}

    def epoch(self, row: EpochRow) -> FleetEpoch:
        """Its content, held against the authority's signature the first time. Raises PeerError if that is not it."""
        if row.number not in self._checked:
            signed = messages.decode(Signed, row.signed)
            self._checked[row.number] = FleetEpoch(self._authority.public_key, signed)
        return self._checked[row.number]

    def begin(self, row: EpochRow) -> None:
        """This epoch of the store is in force from now on. If it is already, nothing changes."""
        if self.in_force is not None and row.id == self.in_force.row.id:
            return
        epoch = self.epoch(row)
        self.in_force = InForce(epoch, row, Roster(row.roster), self._shelf.parcel(row.id, row.signed))
        self._began(self.in_force)

    def silent(self, devices: Iterable[DeviceRow], needed_s: int, now_s: float) -> frozenset[bytes]:
        """Devices, by key, that the next roster is better without: members that are away and have no prekey left that
        lives as long as the next ticket would, and who went that way before and has not been seen since.

        devices: all that are enrolled.  needed_s: when that ticket would expire, Unix seconds.
        """
        current = self.in_force
        if current is None or current.epoch.frozen.committee == "helpers":
            return frozenset()
        roster, since_s = set(current.row.roster), current.row.installed_s
        silent = {
            row.key
            for row in devices
            if row.role == "device" and row.key not in roster and not (row.last_seen_s or 0.0) > since_s
        }
        if now_s >= since_s + SETTLE_S:
            with self._store.reading() as t:
                ready = t.members_with_prekeys(needed_s)
            silent |= {member.key for member in current.epoch.members} - ready
        return frozenset(silent)

    def renew(self, enrolled: Collection[DeviceRow], groups: Iterable[int], needed_s: int, now_s: float) -> str | None:
        """A new epoch if the roster changed or the old one would end too early. Returns why there is none, or None.

        Where devices are the committee, one that is away until its prekeys are used up would stop the fleet. The next
        roster is then without it, until it comes back with new ones.
        enrolled: devices and helpers.  groups: numbers that tasks ask for.  needed_s: as for `silent`.
        Raises ParameterError if the authority signs another roster than it was given.
        """
        silent = self.silent(enrolled, needed_s, now_s)
        devices = sorted(row.key for row in enrolled if row.role == "device" and row.key not in silent)
        helpers = sorted(row.key for row in enrolled if row.role == "helper")
        wanted = sorted({1, *groups})
        current = self.in_force
        if current is not None:
            frozen = current.epoch.frozen
            roster = set(current.row.roster)
            gone = roster - {row.key for row in enrolled}
            lacking = silent & {member.key for member in current.epoch.members}
            same = not gone and not lacking and roster.issuperset(devices)
            same = same and (not frozen.helpers or frozen.helpers == helpers)
            if same and needed_s <= frozen.expires_s and set(wanted) <= set(current.epoch.corrupt_in_group):
                return None
        if not devices:
            return "no device is enrolled"
        previous = current.row if current is not None else None
        try:
            signed = self._authority.next_epoch(devices, helpers, wanted, previous, now_s)
        except ParameterError as error:
            return str(error)
        if signed is None:
            return "the fleet authority has not signed the new roster"
        epoch = FleetEpoch(self._authority.public_key, signed)
        row = EpochRow(epoch.number, epoch.id, messages.encode(signed), tuple(devices), now_s)
        if epoch.frozen.roster_root != Roster(devices).root:
            raise ParameterError("the authority signed another roster than it was given")
        with self._store.transaction() as t:
            t.add_epoch(row)
        self._checked[row.number] = epoch
        self.begin(row)
        return None
