"""What a Welcome says: where things stand, for one device (docs/services.md section 4)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from coordinator.epochs import InForce
from coordinator.live import LiveRound
from coordinator.rows import DeviceRow, HeaderRow, ModelRow
from coordinator.running import RunningTask
from coordinator.shelf import Shelf
from edge_sdk.crypto.identity import Identity
from edge_sdk.errors import ParameterError
from edge_sdk.protocol import messages
from edge_sdk.protocol.messages import Signed
from edge_sdk.transport.wire import MAX_TASKS, Enrolment, HeldPrekeys, Parcel, TaskState, Welcome

INLINE_TICKETS = 48 << 10
"""Bytes of tickets in one Welcome; further ones are fetched."""


class Standing(NamedTuple):
    """A task that concerns the device, and its round that takes contributions, if there is one."""

    running: RunningTask
    open_round: LiveRound | None


def welcome(
    device: DeviceRow,
    epoch: InForce | None,
    shown: HeaderRow | None,
    standings: Iterable[Standing],
    prekeys: HeldPrekeys | None = None,
    *,
    identity: Identity,
    shelf: Shelf,
    now_s: float,
) -> Welcome:
    """Where things stand for this device.

    epoch: the one in force.  shown: the device's own header with the most entries.  standings: at most MAX_TASKS are
    told.  prekeys: of a member's those that are left.  identity: the coordinator's.  shelf: has the files of all these
    tasks; long tickets are put on it.
    """
    states, inline = [], len(shown.signed) if shown is not None else 0
    for running, live in standings:
        ticket: Parcel | None = None
        model = running.model
        if live is not None:
            data = messages.encode(live.round.signed)
            inline += len(data)
            ticket = shelf.parcel(live.tid, data, inline=inline <= INLINE_TICKETS)
            # Whoever takes the ticket needs the model that it names, though a newer one may be out.
            model = next((m for m in running.models if m.number == live.number_of_model), model)
        states.append(_state(running, model, ticket, identity, shelf))
    return Welcome(
        int(now_s),
        epoch.parcel if epoch is not None else None,
        _enrolment(device, epoch),
        states[:MAX_TASKS],
        messages.decode(Signed, shown.signed) if shown is not None else None,
        prekeys,
    )


def _enrolment(device: DeviceRow, epoch: InForce | None) -> Enrolment | None:
    if epoch is None or device.role != "device":
        return None
    try:
        index, proof = epoch.roster.enrolment(device.key)
    except ParameterError:
        return None  # enrolled after the roster was frozen: the next epoch holds it
    return Enrolment(index, list(proof))


def _state(running: RunningTask, model: ModelRow, ticket: Parcel | None, identity: Identity, shelf: Shelf) -> TaskState:
    bundle, parameters = shelf.file(running.row.bundle_file), shelf.file(model.parameters)
    return TaskState(running.signed(model, identity), bundle, parameters, ticket)
