"""A device whose whole disk was put back to an earlier state, or copied: it is told by a header of its own."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace
from scripted import World

from edge_sdk import checkup, enrolment, events
from edge_sdk.enrolment import Membership, Token
from edge_sdk.ledger import Ledger
from edge_sdk.privacy.ledger_entry import LedgerDamaged
from edge_sdk.protocol.messages import Anchor, Header, Receipt, Signed, decode, encode, sign
from edge_sdk.rules import read_policy
from edge_sdk.store import Store
from edge_sdk.transport.wire import Hello, Upload, Welcome, decode_down, encode_frame

WHAT_TO_DO = "newest copy of this device's directory back, or enrol it anew"


def contributed(world: World, path: Path, number: int) -> Signed:
    """Take part in a round. Returns the header that the device signed for it."""
    before = set(world.taken)
    world.ticket(number)
    assert world.device(path).run_once(60).count(events.Delivered) == 1
    (new,) = set(world.taken) - before
    return world.taken[new].header


def changed(signed: Signed, **fields: object) -> Signed:
    """With another content under the same signature."""
    return replace(signed, body=encode(replace(decode(Header, signed.body), **fields)))


def put_back(path: Path, copy: Path) -> None:
    shutil.rmtree(path)
    shutil.copytree(copy, path)


@pytest.fixture
def rolled_back(tmp_path) -> tuple[World, Path, Path]:
    """A device put back to after the first of its three rounds, and its newest copy. The world shows its header."""
    world = World(tmp_path)
    path = world.directory()
    contributed(world, path, 0)
    shutil.copytree(path, tmp_path / "old")
    contributed(world, path, 1)
    world.shown = contributed(world, path, 2)
    shutil.copytree(path, tmp_path / "new")
    put_back(path, tmp_path / "old")
    return world, path, tmp_path / "new"


def ledger_finding(path: Path) -> tuple[bool | None, str]:
    """What `doctor` says of the ledger."""
    (found,) = (finding for finding in checkup.doctor(path) if finding.check == "ledger")
    return found.ok, found.detail


def test_doctor_says_what_the_coordinator_told_until_the_newest_copy_is_back(rolled_back):
    world, path, newest = rolled_back
    assert ledger_finding(path)[0]  # nothing on this disk shows it
    with pytest.raises(LedgerDamaged):
        world.device(path).run_once(60)
    ok, detail = ledger_finding(path)
    assert (ok, "rolled back: 2 entries, but 5 were anchored" in detail, WHAT_TO_DO in detail) == (False, True, True)
    for name in ("ledger", "state.db"):
        shutil.copyfile(newest / name, path / name)
    assert ledger_finding(path) == (True, "6 entries, every link is right")
    assert world.device(path).run_once(60).reason == "done"


@pytest.mark.parametrize(
    "content", [b"", b"\xc1", encode(Signed(b"any", bytes(64)))], ids=["empty", "rubbish", "other"]
)
def test_doctor_believes_no_file_that_holds_no_header_of_this_device(rolled_back, content):
    _, path, _ = rolled_back
    (path / "ledger.shown").write_bytes(content)
    ok, detail = ledger_finding(path)
    assert (ok, "ledger.shown" in detail, "remove it" in detail) == (False, True, True)


def test_a_disk_that_is_full_does_not_hide_a_rollback_from_the_run_that_is_told(rolled_back, monkeypatch):
    world, path, _ = rolled_back

    def full(*given: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("edge_sdk.rules.write_whole", full)
    with pytest.raises(LedgerDamaged, match="rolled back: 2 entries"):
        world.device(path).run_once(60)


def test_doctor_holds_the_ledger_against_the_header_that_waits_in_the_outbox(tmp_path):
    """Two copies of a device lived through one round, and the ledger of one came beside the state of the other."""
    world = World(tmp_path)
    path, clone = world.directory(), tmp_path / "clone"
    world.receipts = False
    shutil.copytree(path, clone)
    world.ticket()
    for copy in (path, clone):
        assert world.device(copy).run_once(10).count(events.Contributed) == 1
        assert ledger_finding(copy)[0]
        world.time.now_s += 100
    shutil.copyfile(clone / "ledger", path / "ledger")
    ok, detail = ledger_finding(path)
    assert (ok, "forked: entry 1" in detail, "enrol it anew" in detail) == (False, True, True)


def test_doctor_says_what_to_do_about_a_ledger_that_the_state_knows_more_of(tmp_path):
    world = World(tmp_path)
    path = world.directory()
    before = (path / "ledger").read_bytes()
    contributed(world, path, 0)
    (path / "ledger").write_bytes(before)
    ok, detail = ledger_finding(path)
    assert (ok, "knows nothing of round 0 of tiny" in detail, "newest copy" in detail) == (False, True, True)
    assert "enrol it anew" in detail


@pytest.mark.parametrize("way", ["run", "run_once"])
def test_a_device_whose_whole_disk_went_back_is_told_by_its_own_header_and_enters_nothing(rolled_back, way):
    world, path, newest = rolled_back
    ledger, uploads, heard = (path / "ledger").read_bytes(), len(world.heard_of(Upload)), []
    world.ticket(3)
    with pytest.raises(LedgerDamaged, match=f"rolled back: 2 entries, but 5 were anchored.*{WHAT_TO_DO}"):
        getattr(world.device(path, on_event=heard.append), way)()
    assert (path / "ledger").read_bytes() == ledger  # not even a coin
    assert len(world.heard_of(Upload)) == uploads
    assert {type(event) for event in heard} == {events.Online}
    put_back(path, newest)  # its owner found the newest copy: nothing was lost
    assert world.device(path).run_once(60).count(events.Delivered) == 1


def test_a_run_that_ended_with_a_fork_lets_go_of_the_directory_and_says_where_to_join_anew(tmp_path):
    """In one process, where no lock is given back by its end."""
    world = World(tmp_path)
    path, clone, key = world.directory(), tmp_path / "clone", world.identities[0].public_key
    contributed(world, path, 0)
    shutil.copytree(path, clone)
    world.shown = contributed(world, path, 1)
    world.time.now_s += 100
    world.mute = {Hello}

    def enter(event: events.Event) -> None:
        if isinstance(event, events.Online):
            world.send(key, world.welcome(key, shown=None))

    world.device(clone, on_event=enter).run_once(10)
    world.mute = set()
    device = world.device(clone)
    for way in (device.run, device.run_once):
        with pytest.raises(LedgerDamaged, match=r"forked: entry 3 .* enrol it anew.* in another directory"):
            way()
    policy = read_policy(clone)
    with (
        Store(clone, key, world.authority.public_key),
        Ledger(clone / "ledger", key, policy.protects, policy.lifetime) as ledger,
    ):
        assert ledger.head.entries == 4
    membership = Membership.read(clone)
    pins = [bytes.fromhex(pin) for pin in (membership.ca, membership.authority, membership.coordinator)]
    token = Token("https://localhost:1", pins[0], bytes(32), 1 << 32, *pins[1:], [bytes(32)], "device").text
    assert enrolment.join(clone, token) == membership  # it is that device for good: another one is in another directory


def test_a_device_that_is_told_while_no_round_is_open_takes_no_news_either(rolled_back):
    world, path, _ = rolled_back
    world.tickets.clear()
    world.new_epoch(2)
    state = (path / "state.db").read_bytes()
    with pytest.raises(LedgerDamaged, match="rolled back: 2 entries, but 5"):
        world.device(path).run_once(60)
    assert (path / "state.db").read_bytes() == state


def test_each_header_of_its_own_counts_also_one_that_is_shorter_than_what_it_was_shown_before(tmp_path):
    world = World(tmp_path)
    path = world.directory()
    world.shown = contributed(world, path, 0)
    device, key = world.identities[0], world.identities[0].public_key
    of_a_copy = sign(device, replace(decode(Header, world.shown.body), ledger=Anchor(0, b"c" * 32)))

    def tell(event: events.Event) -> None:
        if isinstance(event, events.Welcomed):
            world.send(key, world.welcome(key, shown=of_a_copy))

    with pytest.raises(LedgerDamaged, match="forked: entry 0"):
        world.device(path, on_event=tell).run_once(60)


def test_a_device_that_nobody_tells_of_its_rollback_goes_on(rolled_back):
    """What the tests above rest on: the state and the ledger agree, so nothing on the disk shows it."""
    world, path, _ = rolled_back
    world.shown = None
    world.ticket(3)
    assert world.device(path).run_once(60).count(events.Delivered) == 1


def test_a_copy_of_a_device_is_told_that_its_ledger_forked_by_a_head_of_the_same_length(tmp_path):
    world = World(tmp_path)
    path, clone = world.directory(), tmp_path / "clone"
    contributed(world, path, 0)
    shutil.copytree(path, clone)
    world.shown = contributed(world, path, 1)
    world.time.now_s += 100
    world.mute = {Hello}  # the copy lives through the same round, and is told only then
    key = world.identities[0].public_key

    def enter(event: events.Event) -> None:
        if isinstance(event, events.Online):
            world.send(key, world.welcome(key, shown=None))

    assert world.device(clone, on_event=enter).run_once(10).count(events.Contributed) == 1
    world.mute = set()
    with pytest.raises(LedgerDamaged, match=r"forked: entry 3 .* enrol it anew"):
        world.device(clone).run_once(60)


FAULTS: dict[str, Callable[[World, Signed], Signed]] = {
    "another device's header": lambda world, own: sign(
        world.identities[1], replace(decode(Header, own.body), key=world.identities[1].public_key)
    ),
    "signed by the coordinator": lambda world, own: sign(world.coordinator, decode(Header, own.body)),
    "naming another device": lambda world, own: sign(
        world.identities[0], replace(decode(Header, own.body), key=world.identities[1].public_key)
    ),
    "a longer head": lambda world, own: changed(own, ledger=Anchor(99, bytes(32))),
    "another link": lambda world, own: changed(own, ledger=Anchor(1, bytes(32))),
    "another signature": lambda world, own: replace(own, signature=bytes(64)),
    "not a header": lambda world, own: sign(world.identities[0], Receipt(bytes(32), 0, bytes(32))),
    "no message": lambda world, own: Signed(b"\xc1", own.signature),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_welcome_that_shows_no_header_of_this_device_is_dropped_and_ends_nothing(tmp_path, fault):
    world = World(tmp_path)
    path = world.directory()
    own = contributed(world, path, 0)
    ledger = (path / "ledger").read_bytes()
    world.shown = FAULTS[fault](world, own)
    world.ticket(1)
    report = world.device(path).run_once(30)
    assert report.reason == "time is up"
    assert not report.count(events.Welcomed)
    assert any("dropped: welcome: " in event.reason for event in report.events if isinstance(event, events.Warned))
    assert (path / "ledger").read_bytes() == ledger
    assert not (path / "ledger.shown").exists()
    world.shown = own
    assert world.device(path).run_once(60).count(events.Delivered) == 1


def test_an_older_header_of_its_own_is_harmless(tmp_path):
    world = World(tmp_path)
    path = world.directory()
    world.shown = contributed(world, path, 0)
    contributed(world, path, 1)
    contributed(world, path, 2)


def test_a_rollback_that_was_told_while_the_policy_was_broken_counts_when_it_is_mended(rolled_back):
    world, path, _ = rolled_back
    (path / "policy.toml").write_text("protects = 3")
    ledger = (path / "ledger").read_bytes()
    world.ticket(3)
    refused: list[events.Event] = []

    def mend(event: events.Event) -> None:
        if isinstance(event, events.Refused) and not refused:
            refused.append(event)
            world.shown = None  # it is not told again
            world.write_policy(path)

    with pytest.raises(LedgerDamaged, match="rolled back: 2 entries, but 5"):
        world.device(path, on_event=mend).run_once(600)
    assert refused
    assert (path / "ledger").read_bytes() == ledger


def test_a_rollback_that_is_told_during_training_ends_the_run_and_nothing_leaves(rolled_back):
    world, path, _ = rolled_back
    own, world.shown = world.shown, None
    uploads = len(world.heard_of(Upload))
    world.ticket(3)

    def tell(event: events.Event) -> None:
        if isinstance(event, events.Training):
            world.shown = own
            world.send(world.identities[0].public_key, world.welcome(world.identities[0].public_key))

    with pytest.raises(LedgerDamaged, match="rolled back"):
        world.device(path, on_event=tell).run_once(60)
    assert len(world.heard_of(Upload)) == uploads


def test_a_helper_has_no_ledger_and_does_not_look_at_what_it_is_shown(tmp_path):
    world = World(tmp_path)
    path = world.directory(0, role="helper")
    world.shown = Signed(b"anything", bytes(64))
    assert world.device(path).run_once(30).count(events.Welcomed) == 1


def test_a_welcome_of_a_coordinator_that_shows_no_header_is_one_too(tmp_path):
    """An older one's frame ends before the field."""
    world = World(tmp_path)
    key = world.identities[0].public_key
    fields = msgspec.msgpack.decode(encode_frame(world.welcome(key)))
    older = msgspec.msgpack.encode(fields[:-1])
    assert decode_down(older) == decode_down(encode_frame(world.welcome(key)))
    assert isinstance(decode_down(older), Welcome)
