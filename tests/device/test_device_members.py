"""Committee duty: a helper, and a device that serves while it trains. States go through the disk at every wake-up."""

from __future__ import annotations

import numpy as np
import pytest
from scripted import EXAMPLES, TASK, World
from test_device import SlowExamples, kinds, reasons, stored_rows

from edge_sdk import events
from edge_sdk.config import Config
from edge_sdk.crypto.identity import Identity
from edge_sdk.protocol import aggregator
from edge_sdk.protocol.messages import PrekeyOffer, Release, SealSignature, decode
from edge_sdk.serving import PREKEY_LIFE_S, SPARE_PREKEYS
from edge_sdk.store import glance
from edge_sdk.transport.wire import HeldPrekeys, Hello, Letter, Prekeys, Pull

from scripted import seed  # isort: skip


def helper_world(path) -> tuple[World, Identity]:
    """A world of three helpers of which the first is real."""
    helper = Identity(seed("helper", 0))
    return World(path, real=frozenset([helper.public_key])), helper


def test_a_helper_offers_signs_and_releases_over_several_wake_ups(tmp_path):
    world, helper = helper_world(tmp_path)
    path = world.directory(0, role="helper")
    key = helper.public_key

    def wake(*letters: bytes):
        def hook(event: events.Event) -> None:
            if isinstance(event, events.Welcomed):
                for data in letters:
                    world.send(key, Letter(data))

        report = world.device(path, examples=None, on_event=hook).run_once(60)
        assert report.reason == "done"
        return [event.what for event in report.events if isinstance(event, events.Answered)]

    assert wake() == []
    assert len(world.offers[key]) == SPARE_PREKEYS
    round_ = world.ticket()
    inputs = [np.arange(round_.ticket.dimension) * (number + 1) for number in range(3)]
    for number, integers in enumerate(inputs):
        world.contribute_as(round_, number, integers)
    delivery = world.delivery_to(key, round_)
    assert wake(delivery) == ["joined", "inspected"]
    session = next(iter(secrets_of(path)))
    assert wake(delivery) == []  # the same again changes nothing
    for identity in world.played:
        world.tell(identity, world.delivery_to(identity.public_key, round_))
    seal = world.seal(round_)
    assert wake(seal) == ["signed"]
    assert wake(seal) == []
    signatures = [data for _, data in world.letters]
    assert len(signatures) == 2
    assert signatures[0] == signatures[1]  # byte for byte, after a restart
    world.answer(round_, signatures[0])
    certificate = world.certify(round_)
    assert wake(certificate) == ["released"]
    assert wake(certificate, seal) == []
    releases = [data for _, data in world.letters[2:]]
    assert len(releases) == 2
    assert releases[0] == releases[1]
    world.answer(round_, releases[0])
    done = world.open(round_)
    assert isinstance(done, aggregator.Done)
    assert (done.sums[0].values == sum(inputs) % (1 << round_.layout.modulus_bits)).all()
    assert world.letters_of(SealSignature)
    assert world.letters_of(Release)
    assert not any(session in file.read_bytes() for file in path.iterdir() if file.is_file())


def secrets_of(path) -> list[bytes]:
    """Seeds of prekeys that serve a ticket."""
    import sqlite3

    database = sqlite3.connect(path / "state.db")
    rows = database.execute("SELECT seed FROM prekey WHERE tid IS NOT NULL").fetchall()
    database.close()
    return [seed for (seed,) in rows]


def test_a_device_that_serves_answers_while_it_trains(tmp_path):
    identity = Identity(seed("device", 0))
    world = World(tmp_path, committee="everyone", real=frozenset([identity.public_key]), noise={"example_rate": 1.0})
    path = world.directory()
    key = identity.public_key
    world.device(path).run_once(60)
    round_ = world.ticket()
    for number in (1, 2, 3):
        world.contribute_as(round_, number, np.zeros(round_.ticket.dimension, dtype=np.int64))
    sent = []

    def hook() -> None:
        if not sent:
            sent.append(world.send(key, Letter(world.delivery_to(key, round_))))

    report = world.device(path, examples=SlowExamples(world, 1.0, hook)).run_once(120)
    names = kinds(report)
    inspected = next(
        i for i, event in enumerate(report.events) if isinstance(event, events.Answered) and event.what == "inspected"
    )
    assert names.index("training") < inspected < names.index("contributed")
    assert report.count(events.Delivered) == 1


def test_news_that_come_while_it_trains_are_taken_without_harm(tmp_path):
    """A new epoch, a new model and the next ticket, all in the middle of training: the round is finished, and the next
    one is entered."""
    world = World(tmp_path, noise={"example_rate": 1.0})
    path = world.directory()
    key = world.identities[0].public_key
    first = world.ticket(0)
    sent = []

    def hook() -> None:
        if not sent:
            world.new_epoch(2)
            world.parameters = world.parameters + np.float32(0.1)
            world.model_round = 1
            world.members = dict.fromkeys(world.members, type(next(iter(world.members.values())))())
            world.ticket(1)
            sent.append(world.send(key, world.welcome(key)))

    report = world.device(path, examples=SlowExamples(world, 1.0, hook)).run_once(300)
    assert [event.round for event in report.events if isinstance(event, events.Delivered)] == [0, 1], report.events
    assert len(world.rounds[first.tid].entries) == 1
    assert glance(path).positions == {TASK: 1}


def test_prekeys_are_topped_up_repeated_after_a_hello_and_erased_when_old(tmp_path):
    world, helper = helper_world(tmp_path)
    path, key = world.directory(0, role="helper"), helper.public_key

    def wake() -> list[PrekeyOffer]:
        before = len(world.heard)
        world.device(path, examples=None).run_once(60)
        frames = [frame for _, frame in world.heard[before:] if isinstance(frame, Prekeys)]
        return [decode(PrekeyOffer, signed.body) for frame in frames for signed in frame.offers]

    first = wake()
    assert len(first) == SPARE_PREKEYS
    assert wake() == first  # lost offers are missed by nobody but the coordinator
    world.ticket()
    assert {offer.serial for offer in wake()} == set(range(SPARE_PREKEYS + 1))  # one came to serve, one was added
    assert {offer.serial for offer in wake()} == set(range(1, SPARE_PREKEYS + 1))
    world.tickets.clear()
    world.time.now_s += PREKEY_LIFE_S * 0.9
    later = wake()  # old ones still stand, but a ticket would soon outlive them
    assert len(later) == 2 * SPARE_PREKEYS
    world.time.now_s += PREKEY_LIFE_S * 0.2
    assert {offer.serial for offer in wake()} == {offer.serial for offer in later[SPARE_PREKEYS:]}
    assert glance(path).spare_prekeys == SPARE_PREKEYS
    assert [hello.spare_prekeys for hello in world.heard_of(Hello)][:3] == [0, SPARE_PREKEYS, SPARE_PREKEYS]
    assert key in world.offers


def test_a_member_offers_new_prekeys_for_those_that_the_coordinator_has_no_more(tmp_path):
    world, _ = helper_world(tmp_path)
    path = world.directory(0, role="helper")
    world.device(path, examples=None).run_once(60)
    welcome = world.welcome
    world.welcome = lambda key: welcome(key, prekeys=HeldPrekeys(SPARE_PREKEYS - 1, [5]))
    before = len(world.heard)
    world.device(path, examples=None).run_once(60)
    frames = [frame for _, frame in world.heard[before:] if isinstance(frame, Prekeys)]
    serials = [decode(PrekeyOffer, signed.body).serial for frame in frames for signed in frame.offers]
    assert serials == [5, *range(SPARE_PREKEYS, 2 * SPARE_PREKEYS - 1)]


def test_a_helper_takes_no_ticket_as_a_contributor(tmp_path):
    world, _ = helper_world(tmp_path)
    path = world.directory(0, role="helper")
    device = world.device(path, examples=EXAMPLES)  # whatever is registered
    device.run_once(60)
    world.ticket()
    report = device.run_once(60)
    assert [event.what for event in report.events if isinstance(event, events.Answered)] == ["joined"]
    assert world.heard_of(Pull) == []
    assert world.heard_of(Hello)[0].tasks == []


def test_a_device_that_would_not_serve_offers_nothing(tmp_path):
    identity = Identity(seed("device", 0))
    world = World(tmp_path, committee="everyone", real=frozenset([identity.public_key]))
    report = world.device(world.directory(), config=Config(serve=False)).run_once(60)
    assert report.reason == "done"
    assert world.heard_of(Prekeys) == []
    assert not world.heard_of(Hello)[0].prekeys_wanted


def test_a_long_letter_is_pulled_and_its_long_answer_served(tmp_path):
    """A delivery of many shares does not fit a frame."""
    world, helper = helper_world(tmp_path)
    path, key = world.directory(0, role="helper"), helper.public_key
    world.device(path, examples=None).run_once(60)
    round_ = world.ticket()
    for number in range(3):
        world.contribute_as(round_, number, np.zeros(round_.ticket.dimension, dtype=np.int64))
    reference = world.serve(world.delivery_to(key, round_))

    def hook(event: events.Event) -> None:
        if isinstance(event, events.Welcomed):
            world.send(key, Letter(reference))

    report = world.device(path, examples=None, on_event=hook).run_once(60)
    assert [event.what for event in report.events if isinstance(event, events.Answered)] == ["joined", "inspected"]
    assert report.reason == "done"


@pytest.mark.parametrize("letter", ["seal", "certificate"])
def test_what_is_not_due_is_dropped_and_changes_nothing(tmp_path, letter):
    world, helper = helper_world(tmp_path)
    path, key = world.directory(0, role="helper"), helper.public_key
    world.device(path, examples=None).run_once(60)
    round_ = world.ticket()
    for number in range(3):
        world.contribute_as(round_, number, np.zeros(round_.ticket.dimension, dtype=np.int64))
    for identity in world.played:
        world.tell(identity, world.delivery_to(identity.public_key, round_))
    world.device(path, examples=None).run_once(60)
    data = world.seal(round_)  # of headers that this member was not shown
    if letter == "certificate":
        data = world.certify(round_) if hasattr(world.rounds[round_.tid], "certificate") else b"\x92\xa4seal\xc0"
    before = stored_rows(path)

    def hook(event: events.Event) -> None:
        if isinstance(event, events.Welcomed):
            world.send(key, Letter(data))

    report = world.device(path, examples=None, on_event=hook).run_once(60)
    assert len(reasons(report, events.Warned)) == 1
    assert world.letters == []
    assert stored_rows(path) == before
