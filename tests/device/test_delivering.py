"""A contribution from the disk to its receipt: charged before it is offered, and over exactly once."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from scripted import EXAMPLES, TASK, World

from edge_sdk import events
from edge_sdk.contributing import Contributing
from edge_sdk.delivering import Deliveries
from edge_sdk.errors import PeerError
from edge_sdk.ledger import Ledger
from edge_sdk.protocol import aggregator
from edge_sdk.protocol.contributor import Idle, Sent
from edge_sdk.protocol.messages import Abort, Header, message_hash, sign, wrap
from edge_sdk.reporting import Reporting
from edge_sdk.rules import RulesFile
from edge_sdk.store import Store
from edge_sdk.transport.wire import Refusal, Upload


def fail(*given):
    raise OSError("the disk failed")


class Waiting:
    """A device, switched off between storing a contribution and charging it; its deliveries after the next start."""

    def __init__(self, world, stack, monkeypatch):
        path, owner = world.directory(), world.identities[0].public_key
        self.world, self.path = world, path
        self.round = world.ticket()
        with monkeypatch.context() as patch:
            patch.setattr(Ledger, "charge", fail)
            world.device(path).run_once(5)
        assert world.heard_of(Upload) == []
        self.store = stack.enter_context(Store(path, owner, world.authority.public_key))
        self.rules = RulesFile(path, owner, self.store)
        stack.callback(self.rules.close)
        self.heard, self.freed = [], []
        self.own = Contributing(TASK, EXAMPLES, self.store, lambda count: bytes(count))
        clock = world.time.clock
        self.deliveries = Deliveries(
            {TASK: self.own}, self.rules, self.store, clock, lambda: 0.5,
            Reporting(self.store, clock, self.heard.append), self.freed.append,
        )  # fmt: skip
        stack.callback(self.deliveries.close)
        assert isinstance(self.own.state, Sent)
        self.contribution = self.own.state.contribution

    def wait(self, seconds):
        self.world.time.now_s += seconds

    @property
    def header(self):
        return message_hash(Header, self.contribution.header.body)

    @property
    def receipt(self):
        collecting = self.world.rounds[self.round.tid]
        taken = aggregator.accept(collecting, self.contribution, self.world.coordinator, self.world.time.now_s)
        return taken.receipt

    @property
    def charged(self):
        return self.rules.read().ledger.account.sends

    @property
    def outcome(self):
        found = self.store.outcomes()[TASK]
        return found.what, found.reason


@pytest.fixture
def waiting(tmp_path, monkeypatch):
    with ExitStack() as stack:
        yield Waiting(World(tmp_path), stack, monkeypatch)


def test_what_cannot_be_charged_is_not_offered_until_it_is(waiting):
    policy = (waiting.path / "policy.toml").read_text()
    (waiting.path / "policy.toml").write_text("protects =")
    assert waiting.deliveries.retry_due_s == 0.0
    waiting.deliveries.retry()
    assert (waiting.deliveries.active, waiting.deliveries.uploads()) == (False, [])
    assert [type(event) for event in waiting.heard] == [events.Warned]
    assert "cannot be charged or read" in waiting.heard[0].reason
    (waiting.path / "policy.toml").write_text(policy)
    waiting.deliveries.retry()
    assert waiting.deliveries.uploads() == []  # it waits before it tries again
    assert waiting.charged == {}
    waiting.wait(10)
    waiting.deliveries.retry()
    assert waiting.charged == {waiting.round.tid: waiting.header}
    assert [upload.header for upload in waiting.deliveries.uploads()] == [waiting.contribution.header]
    assert waiting.deliveries.retry_due_s == float("inf")


def test_without_an_answer_it_is_offered_with_growing_pauses_and_a_pull_begins_them_anew(waiting):
    waiting.deliveries.retry()
    pauses, last_s = [], waiting.world.time.clock.monotonic_s()
    for _ in range(4):
        assert len(waiting.deliveries.uploads()) == 1
        assert waiting.deliveries.uploads() == []
        pauses.append(waiting.deliveries.due_s - last_s)
        last_s = waiting.deliveries.due_s
        waiting.wait(pauses[-1])
    assert pauses == pytest.approx([5.0, 10.0, 20.0, 40.0])
    (upload,) = waiting.deliveries.uploads()
    blob = waiting.deliveries.pulled(upload.blob.id)
    assert blob is not None
    assert blob.ref == upload.blob
    assert waiting.deliveries.due_s - last_s == pytest.approx(5.0)
    assert waiting.deliveries.pulled(bytes(32)) is None
    waiting.deliveries.offer_again()
    assert waiting.deliveries.uploads() == [upload]


def test_its_receipt_ends_it_once_and_nothing_else_does(waiting):
    waiting.deliveries.retry()
    receipt = waiting.receipt
    waiting.deliveries.on_receipt(receipt, bytes(32))
    with pytest.raises(PeerError):
        waiting.deliveries.on_receipt(receipt[:-1] + bytes([receipt[-1] ^ 1]), waiting.round.tid)
    assert (waiting.deliveries.active, waiting.freed) == (True, [])
    for _ in range(2):
        waiting.deliveries.on_receipt(receipt, waiting.round.tid)
    assert waiting.heard == [events.Delivered(TASK, 0)]
    assert (waiting.freed, waiting.outcome[0]) == ([TASK], "delivered")
    assert (waiting.deliveries.active, waiting.deliveries.due_s) == (False, float("inf"))
    assert isinstance(waiting.own.state, Idle)


def test_an_abort_counts_if_the_coordinator_signed_it(waiting):
    waiting.deliveries.retry()
    abort = Abort(waiting.round.tid, "too few contributors")
    with pytest.raises(PeerError):
        waiting.deliveries.on_abort(wrap(Abort, sign(waiting.world.authority, abort)), waiting.round.tid)
    assert waiting.deliveries.active
    waiting.deliveries.on_abort(wrap(Abort, sign(waiting.world.coordinator, abort)), waiting.round.tid)
    assert waiting.heard == [events.Dropped(TASK, 0, "the coordinator aborted the round")]
    assert waiting.freed == [TASK]


def test_a_refusal_ends_it_only_if_it_is_final_and_of_this_contribution(waiting):
    waiting.deliveries.retry()
    waiting.deliveries.on_refusal(Refusal(bytes(32), "late", final=True))
    waiting.deliveries.on_refusal(Refusal(waiting.header, "no slot", final=False))
    assert [type(event) for event in waiting.heard] == [events.Warned]
    assert (waiting.deliveries.active, waiting.freed) == (True, [])
    waiting.deliveries.on_refusal(Refusal(waiting.header, "late", final=True))
    assert waiting.outcome == ("dropped", "the coordinator refused it: late")
    assert (waiting.deliveries.active, waiting.freed) == (False, [TASK])


def test_it_is_given_up_when_its_ticket_ends_and_not_before(waiting):
    waiting.deliveries.retry()
    waiting.world.time.now_s = waiting.round.ticket.expires_s - 1
    waiting.deliveries.expire()
    assert waiting.deliveries.active
    waiting.wait(1)
    waiting.deliveries.expire()
    assert waiting.heard == [events.Dropped(TASK, 0, "the round ended without a receipt")]
    assert (waiting.freed, list((waiting.path / "outbox").iterdir())) == ([TASK], [])


def test_what_cannot_be_read_is_tried_again_and_charged_once(waiting):
    path = waiting.store.outbox_path(waiting.round.tid)
    aside = path.rename(path.with_name("aside"))
    waiting.deliveries.retry()
    assert (waiting.deliveries.active, [type(event) for event in waiting.heard]) == (False, [events.Warned])
    aside.rename(path)
    waiting.wait(10)
    waiting.deliveries.retry()
    assert [upload.header for upload in waiting.deliveries.uploads()] == [waiting.contribution.header]
    assert waiting.charged == {waiting.round.tid: waiting.header}


def test_one_that_may_never_be_sent_is_let_go_when_the_disk_takes_it(waiting, monkeypatch):
    waiting.charged[waiting.round.tid] = bytes(32)  # another contribution to this round: the state was rolled back
    with monkeypatch.context() as patch:
        patch.setattr(Store, "save_idle", fail)
        with pytest.raises(OSError, match="the disk failed"):
            waiting.deliveries.retry()
        assert isinstance(waiting.own.state, Sent)
    waiting.wait(10)
    waiting.deliveries.retry()
    assert isinstance(waiting.own.state, Idle)
    assert [type(event) for event in waiting.heard] == [events.Dropped]
    assert (waiting.deliveries.active, waiting.deliveries.retry_due_s) == (False, float("inf"))
