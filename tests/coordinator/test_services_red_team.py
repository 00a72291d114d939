"""What an unfriendly device, or an unlucky moment, could do to the coordinator: each test is an attack that must fail."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np
import pytest
from fleet import (
    COORDINATOR,
    START_S,
    Clock,
    Fleet,
    LocalAuthority,
    add_task,
    assert_exact,
    enrol,
    make_devices,
    make_helpers,
    rounds_in,
    seed,
)

from coordinator import events
from coordinator import server as server_module
from coordinator.arrivals import Arrivals
from coordinator.store import Store
from edge_sdk.crypto.identity import Identity
from edge_sdk.crypto.sealing import Prekey
from edge_sdk.protocol import messages
from edge_sdk.protocol.messages import Header, PrekeyOffer, Signed
from edge_sdk.protocol.plan import delta_bits
from edge_sdk.transport.chunks import Blob
from edge_sdk.transport.wire import BlobRef, Letter, Prekeys, Upload, encode_frame

DEVICES, HELPERS = 5, 3


def make(directory, devices=DEVICES, server=None, **task):
    parties, boxes = make_devices(devices), make_helpers(HELPERS)
    store = Store(directory / "fleet")
    enrol(store, parties, boxes)
    add_task(store, **task)
    store.close()
    fleet = Fleet(directory / "fleet", parties + boxes, "helpers", **(server or {}))
    fleet.connect()
    return fleet


class HeldWorker:
    """Opens at once, in the caller's thread; what the round before gave is looked at when the test says so."""

    def __init__(self) -> None:
        self.held: list[tuple[Future, object]] = []
        self.holding = True

    def submit(self, call, *arguments) -> Future:
        future, result = Future(), call(*arguments)
        if self.holding:
            self.held.append((future, result))
        else:
            future.set_result(result)
        return future

    def let_go(self) -> None:
        self.holding = False
        for future, result in self.held:
            future.set_result(result)

    def shutdown(self, wait: bool) -> None:
        """Nothing runs."""


def test_a_round_that_is_opened_beside_the_last_ones_commit_builds_on_its_model(tmp_path, monkeypatch):
    monkeypatch.setattr("fleet.wait_for_opening", lambda server: None)
    bases, inner = [], server_module.rounds.next_model

    def recording(task, round_, done, parameters, memory, number, entropy):
        result = inner(task, round_, done, parameters, memory, number, entropy)
        bases.append((number, parameters.copy(), result.parameters))
        return result

    monkeypatch.setattr(server_module.rounds, "next_model", recording)
    fleet = make(tmp_path, rounds=2, schedule="overlap = true")
    worker = HeldWorker()
    fleet.server._worker.shutdown()
    fleet.server._worker = worker

    def both_answered():
        live = list(fleet.server._live.values())
        return len(live) == 2 and all(getattr(one.state, "openable", False) for one in live)

    fleet.run(both_answered)
    worker.let_go()
    fleet.run(fleet.saw(events.TaskDone))
    fleet.close()
    assert [number for number, _, _ in bases] == [0, 1]
    assert np.array_equal(bases[1][1], bases[0][2]), "the second model does not hold the first round's update"
    for truth in rounds_in(fleet.directory):
        assert_exact(truth, fleet.devices, 32 - delta_bits(DEVICES))
