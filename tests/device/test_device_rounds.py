"""A ticket on this device: entered, refused or put off; trained once everything that it needs is here."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from scripted import EXAMPLES, TASK, World, seed

from edge_sdk import events
from edge_sdk.contributing import Contributing
from edge_sdk.crypto.hashing import content_hash
from edge_sdk.errors import PeerError
from edge_sdk.models import Here
from edge_sdk.protocol.contributor import Enrolled, Sent
from edge_sdk.protocol.messages import Abort, sign
from edge_sdk.reporting import Reporting
from edge_sdk.rounds import Rounds
from edge_sdk.rules import RulesFile
from edge_sdk.store import Store
from edge_sdk.transport.wire import Model


class Offered:
    """Models, in the place of those that are fetched."""

    def __init__(self, world):
        self._world, self.here, self.wanted = world, {}, False
        self.missing_bytes = 0

    def come(self):
        parameters = self._world.parameters.astype("<f4").tobytes()
        bundle, vector = self._world.path / "a.bundle", self._world.path / "a.f32"
        bundle.write_bytes(self._world.bundle_bytes)
        vector.write_bytes(parameters)
        model = Model(TASK, 0, self._world.bundle.hash, content_hash(parameters))
        self.here[TASK] = Here(model, bundle, vector, self._world.bundle.manifest)

    def wants(self, task):
        return self.wanted

    def manifest(self, task, bundle):
        return self._world.bundle.manifest

    def bundle(self, here, policy):
        return self._world.bundle


class Outbox(list):
    """Deliveries, as far as a round sees them."""

    def start(self, task):
        self.append(task)
        return True


class Device:
    """A device's rounds, and everything that they ask for in the hands of a test."""

    def __init__(self, world, stack):
        self.world, self.path, self.key = world, world.directory(), world.identities[0].public_key
        self.store = stack.enter_context(Store(self.path, self.key, world.authority.public_key))
        self.store.save_epoch(world.signed_epoch)
        rules = RulesFile(self.path, self.key, self.store)
        stack.callback(rules.close)
        self.own = Contributing(TASK, EXAMPLES, self.store, lambda count: seed("entropy")[:count])
        self.models, self.outbox, self.heard = Offered(world), Outbox(), []
        self.condition, self.look = None, lambda: None
        clock = world.time.clock
        self.rounds = Rounds(
            {TASK: self.own}, rules, self.store, self.models, self.outbox, clock,
            Reporting(self.store, clock, self.heard.append),
            conditions=lambda: self.condition, stopping=lambda: False, look=lambda: self.look(),
        )  # fmt: skip

    def enrol(self):
        index, proof = self.world.roster.enrolment(self.key)
        self.rounds.enrolled = Enrolled(self.world.identities[0], index, tuple(proof))

    def enter(self):
        self.enrol()
        round_ = self.world.ticket()
        self.rounds.on_ticket(TASK, round_.signed)
        assert (self.rounds.ready, self.heard) == (True, [])
        return round_

    @property
    def reasons(self):
        return [event.reason for event in self.heard]


@pytest.fixture
def device(tmp_path):
    with ExitStack() as stack:
        yield Device(World(tmp_path), stack)


def test_what_was_refused_is_looked_at_again_only_when_something_it_rests_on_changed(device):
    ticket = device.world.ticket().signed
    device.rounds.look_at_policy()
    for _ in range(2):
        device.rounds.on_ticket(TASK, ticket)
        device.rounds.on_freed(TASK)
        device.rounds.look_at_policy()
    assert device.reasons == ["this device is not in the epoch's roster yet"]
    device.enrol()
    device.world.write_policy(device.path, min_honest=3)
    device.rounds.look_at_policy()
    assert len(device.heard) == 2
    assert "below this device's 3" in device.reasons[1]
    device.world.write_policy(device.path)
    device.rounds.look_at_policy()
    assert (device.rounds.ready, len(device.heard)) == (True, 2)


def test_a_ticket_that_is_offered_no_longer_is_not_entered_when_the_policy_allows_it(device):
    device.enrol()
    device.world.write_policy(device.path, min_honest=3)
    device.rounds.on_ticket(TASK, device.world.ticket().signed)
    device.rounds.on_ticket(TASK, None)
    device.world.write_policy(device.path)
    device.rounds.look_at_policy()
    device.rounds.on_freed(TASK)
    assert (device.rounds.ready, len(device.heard)) == (False, 1)


def test_a_round_waits_for_its_model_while_it_may_still_come(device):
    device.enter()
    device.rounds.train(settled=False)
    device.models.wanted = True
    device.rounds.train(settled=True)
    assert (device.rounds.ready, device.heard) == (True, [])
    device.models.wanted = False
    device.rounds.train(settled=True)
    assert device.reasons == ["the coordinator does not offer the parameters that the ticket names"]
    assert not device.rounds.ready


def test_conditions_are_said_once_and_a_round_that_they_held_up_is_trained_once(device):
    device.enter()
    device.models.come()
    for condition in ("not charging", "not charging", "too warm"):
        device.condition = condition
        device.rounds.train(settled=True)
        assert not device.rounds.ready
    assert device.reasons == ["not charging", "too warm"]
    assert device.outbox == []
    device.condition = None
    for _ in range(2):
        device.rounds.train(settled=True)
    assert [type(event) for event in device.heard[2:]] == [events.Training, events.Contributed]
    assert device.outbox == [TASK]
    assert isinstance(device.own.state, Sent)
    assert (device.rounds.ready, device.rounds.training) == (False, False)


def test_an_abort_that_comes_between_two_batches_ends_the_training(device):
    round_ = device.enter()
    device.models.come()
    seen = []

    def look():
        seen.append(device.rounds.training)
        abort = Abort(round_.tid, "too few contributors")
        with pytest.raises(PeerError):
            device.rounds.on_abort(sign(device.world.authority, abort), round_.tid)
        device.rounds.on_abort(sign(device.world.coordinator, abort), round_.tid)

    device.look = look
    device.rounds.train(settled=True)
    assert seen == [True]
    assert [type(event) for event in device.heard] == [events.Training, events.Dropped]
    assert (device.outbox, device.rounds.ready, device.rounds.training) == ([], False, False)
    assert device.store.outcomes()[TASK].what == "dropped"


def test_a_newer_model_that_is_refused_does_not_end_a_round_that_trains(device):
    device.enter()
    device.models.come()

    def look():
        device.models.here.clear()
        device.rounds.on_model_refused(TASK, "too large")

    device.look = look
    device.rounds.train(settled=True)
    assert [type(event) for event in device.heard] == [events.Training, events.Contributed]


def test_a_newer_model_that_is_refused_ends_a_round_only_if_its_own_is_not_here(device):
    device.rounds.on_model_refused(TASK, "no round was entered")
    device.enter()
    device.models.come()
    device.rounds.on_model_refused(TASK, "too large")
    assert (device.rounds.ready, device.heard) == (True, [])
    device.models.here.clear()
    device.rounds.on_model_refused(TASK, "too large")
    assert (device.rounds.ready, device.reasons) == (False, ["too large"])
