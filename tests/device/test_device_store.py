"""The state on disk: what was saved is what is loaded, a crash leaves before or after, erased secrets are gone."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge_sdk.crypto.hashing import derive_key
from edge_sdk.crypto.identity import Identity
from edge_sdk.crypto.sealing import PREKEY_SEED_BYTES, encapsulate
from edge_sdk.errors import ParameterError, PeerError
from edge_sdk.protocol import aggregator, member, reference
from edge_sdk.protocol.authority import draw, freeze
from edge_sdk.protocol.contributor import Idle, Sent, Terms
from edge_sdk.protocol.member import Closed, Committed, Inspecting, MemberState, Released
from edge_sdk.protocol.messages import Certificate, Delivery, Epoch, Grouping, Seal, Ticket, sign, wrap
from edge_sdk.store import Held, Outcome, Store, StoreDamaged, read_outcomes

ENTROPY = bytes(range(32))
ROUND_S = 10


def fleet_of(devices: int = 5, helpers: int = 3) -> reference.Fleet:
    return reference.make_fleet(ENTROPY, devices, "helpers", helpers=helpers)


def signed_epoch(fleet: reference.Fleet):
    """The epoch as its authority signs it: `make_fleet` keeps only the checked one."""
    authority = Identity(derive_key(ENTROPY, "authority", (0).to_bytes(4, "little")))
    epoch = fleet.epoch
    groupings = [Grouping(groups, corrupt) for groups, corrupt in epoch.corrupt_in_group.items()]
    entropy = derive_key(ENTROPY, "beacon", (0).to_bytes(4, "little"))
    return sign(authority, Epoch(epoch.frozen, entropy, list(epoch.members), groupings))


def open_store(path: Path, fleet: reference.Fleet, owner: bytes | None = None) -> Store:
    store = Store(path, owner or fleet.devices[0].public_key, fleet.epoch.frozen.fleet)
    store.save_epoch(signed_epoch(fleet))
    return store


def contribution_of(fleet: reference.Fleet, round_, number: int = 0) -> Sent:
    training = Idle(round_.ticket.task).on_ticket(round_, Terms(round_.ticket.bundle), now_s=0)
    device = fleet.devices[number]
    entropy = derive_key(ENTROPY, "own", number.to_bytes(4, "little"))
    integers = np.arange(round_.ticket.dimension)
    anchor = reference.stand_in_ledger(device.public_key, round_.ticket.round)
    return training.contribute(integers, fleet.enrolled(device), anchor, entropy, encapsulate, now_s=1)


def same_contribution(a: Sent, b: Sent) -> bool:
    return (a.round.tid, a.sender, a.contribution) == (b.round.tid, b.sender, b.contribution)


class TestContributor:
    def test_the_stored_contribution_is_the_same_bytes_after_a_restart(self, tmp_path):
        fleet = fleet_of()
        sent = contribution_of(fleet, reference.open_ticket(fleet, ENTROPY, 40, n_max=5))
        local = {"head": np.arange(3, dtype=np.float32)}
        with open_store(tmp_path, fleet) as store:
            assert store.contributor("reference") == Idle("reference")
            store.save_contribution(sent, local)
        with open_store(tmp_path, fleet) as store:
            loaded = store.contributor("reference")
            assert isinstance(loaded, Sent)
            assert same_contribution(loaded, sent)
            assert store.local("reference", sent.round.ticket.bundle)["head"].tolist() == [0, 1, 2]
            assert store.local("reference", b"another".ljust(32)) == {}
            store.save_idle(loaded.give_up())
            assert store.contributor("reference") == Idle("reference", 0, sent.round.tid)
            assert list((tmp_path / "outbox").iterdir()) == []

    def test_a_contribution_that_was_changed_on_disk_is_damage(self, tmp_path):
        fleet = fleet_of()
        sent = contribution_of(fleet, reference.open_ticket(fleet, ENTROPY, 40, n_max=5))
        with open_store(tmp_path, fleet) as store:
            store.save_contribution(sent, {})
            path = store.outbox_path(sent.round.tid)
            whole = path.read_bytes()
            for changed in (whole[:-1], whole + b"x", bytes([whole[0] ^ 1]) + whole[1:], b""):
                path.write_bytes(changed)
                with pytest.raises(StoreDamaged, match="reference"):
                    store.contributor("reference")
            path.unlink()
            with pytest.raises(StoreDamaged):
                store.contributor("reference")

    def test_files_of_no_contribution_are_removed_at_the_start(self, tmp_path):
        fleet = fleet_of()
        open_store(tmp_path, fleet).close()
        (tmp_path / "outbox" / ("ab" * 32)).write_bytes(b"of a power cut")
        open_store(tmp_path, fleet).close()
        assert list((tmp_path / "outbox").iterdir()) == []


class TestEpochs:
    def test_epochs_only_go_up(self, tmp_path):
        fleet = fleet_of()
        with open_store(tmp_path, fleet) as store:
            assert store.save_epoch(signed_epoch(fleet)).id == fleet.epoch.id
            signed = signed_epoch(fleet)
            other = replace_epoch(fleet, number=0)
            with pytest.raises(PeerError, match="only go up"):
                store.save_epoch(other)
            with pytest.raises(PeerError):
                store.save_epoch(type(signed)(signed.body, bytes(64)))
            assert store.epoch is not None
            assert store.epoch.id == fleet.epoch.id

    def test_an_epoch_stays_as_long_as_a_contribution_is_of_it(self, tmp_path):
        fleet = fleet_of()
        sent = contribution_of(fleet, reference.open_ticket(fleet, ENTROPY, 40, n_max=5))
        with open_store(tmp_path, fleet) as store:
            store.save_contribution(sent, {})
            store.save_epoch(replace_epoch(fleet, number=2))
        with Store(tmp_path, fleet.devices[0].public_key, fleet.epoch.frozen.fleet) as store:
            assert store.epoch is not None
            assert store.epoch.number == 2
            loaded = store.contributor("reference")
            assert isinstance(loaded, Sent)
            assert loaded.round.epoch.number == 1
            store.save_idle(loaded.give_up())
            assert store._one("SELECT count(*) FROM epoch") == (1,)


def replace_epoch(fleet: reference.Fleet, number: int):
    authority = Identity(derive_key(ENTROPY, "authority", (0).to_bytes(4, "little")))
    frozen = freeze(
        authority,
        fleet.roster,
        coordinator=fleet.coordinator.public_key,
        corrupt_devices=1,
        committee="helpers",
        helpers=[entry.key for entry in fleet.epoch.members],
        expires_s=reference.EXPIRES_S,
        number=number,
    )
    return draw(authority, frozen, fleet.roster, bytes(32))


class Stored:
    """Member number 1 of a fleet, whose every state goes through the store and back."""

    def __init__(self, path: Path, fleet: reference.Fleet) -> None:
        self.path, self.fleet = path, fleet
        self.key = fleet.epoch.members[0].key
        self.identity = next(i for i in fleet.committee if i.public_key == self.key)
        self.number = fleet.committee.index(self.identity)

    def open(self) -> Store:
        return open_store(self.path, self.fleet, self.key)

    def step(self, data: bytes, now_s: float = 4) -> bytes | None:
        with self.open() as store:
            before = store.member()
            after, reply = member.step(before, data, self.fleet.epoch, self.identity, now_s)
            store.save_member(before, after)
            assert_same(store.member(), after)
        return reply

    def state(self) -> MemberState:
        with self.open() as store:
            return store.member()


def assert_same(a: MemberState, b: MemberState) -> None:
    """Equal in all that a member knows; sessions' rounds are compared by tid."""
    assert (a.next_serial, a.prekeys, a.expiry, a.bound) == (b.next_serial, b.prekeys, b.expiry, b.bound)
    assert dict(a.newest) == dict(b.newest)
    assert a.anchors == b.anchors
    assert a.sessions.keys() == b.sessions.keys()
    for tid, session in a.sessions.items():
        other = b.sessions[tid]
        assert session.round.tid == other.round.tid == tid
        assert replace(session, round=other.round) == other


def played_round(tmp_path: Path):
    """A round in which member 1 keeps everything on disk; yields its phases."""
    fleet = fleet_of()
    stored = Stored(tmp_path, fleet)
    round_ = reference.open_ticket(fleet, ENTROPY, 40, n_max=5)
    with stored.open() as store:
        store.save_member(MemberState(), fleet.members[stored.number])
    others = [(i, identity) for i, identity in enumerate(fleet.committee) if i != stored.number]

    def tell(data: bytes) -> list[bytes | None]:
        replies = [stored.step(data)]
        for i, identity in others:
            fleet.members[i], reply = member.step(fleet.members[i], data, fleet.epoch, identity, 4)
            replies.append(reply)
        return replies

    tell(wrap(Ticket, round_.signed))
    collecting = aggregator.Collecting(round_)
    for number in range(4):
        sent = contribution_of(fleet, round_, number)
        accepted = aggregator.accept(collecting, sent.contribution, fleet.coordinator, now_s=2)
        collecting = accepted.state
        for place, identity in enumerate(fleet.committee):
            item = (sent.contribution.header, accepted.shares[fleet.epoch.member_number(identity.public_key) - 1])
            data = wrap(Delivery, Delivery(round_.tid, [item]))
            if place == stored.number:
                stored.step(data)
            else:
                fleet.members[place], _ = member.step(fleet.members[place], data, fleet.epoch, identity, 4)
    yield stored, round_
    state = aggregator.seal(collecting, fleet.coordinator, now_s=round_.ticket.closes_s)
    for reply in tell(wrap(Seal, state.seal)):
        state = aggregator.step(state, reply)
    yield stored, round_
    for reply in tell(wrap(Certificate, state.certificate)):
        state = aggregator.step(state, reply)
    yield stored, round_


class TestMember:
    def test_every_state_of_a_round_is_loaded_as_it_was_saved(self, tmp_path):
        # Stored.step compares after every message
        phases = [type(next(iter(stored.state().sessions.values()))) for stored, _ in played_round(tmp_path)]
        assert phases == [Inspecting, Committed, Released]

    def test_the_prekey_and_the_shares_are_nowhere_in_the_files_after_the_release(self, tmp_path):
        pieces: list[bytes] = []
        for step, (stored, round_) in enumerate(played_round(tmp_path)):
            files = b"".join(path.read_bytes() for path in tmp_path.iterdir() if path.is_file())
            session = stored.state().sessions[round_.tid]
            if step == 0:
                assert isinstance(session, Inspecting)
                secrets = [stored.state().prekeys[session.serial], *(s.share for s in session.shown.values())]
                pieces = [secret[i : i + 32] for secret in secrets for i in range(0, len(secret), 32)]
                # the search finds what is there; a few pieces lie across two pages
                assert sum(piece in files for piece in pieces) > 0.95 * len(pieces) > 300
            if step == 2:
                assert isinstance(session, Released)
                assert not any(piece in files for piece in pieces)

    def test_an_expired_offer_is_nowhere_in_the_files(self, tmp_path):
        fleet = fleet_of()
        stored = Stored(tmp_path, fleet)
        seeds = [derive_key(ENTROPY, "seed", bytes([i]), length=PREKEY_SEED_BYTES) for i in range(20)]
        with stored.open() as store:
            state = before = store.member()
            for i, seed in enumerate(seeds):
                state, _ = member.offer_prekey(state, stored.identity, fleet.epoch.frozen.fleet, seed, 100 + i)
            store.save_member(before, state)
            store.save_member(state, member.expire(state, 110))
        files = b"".join(path.read_bytes() for path in tmp_path.iterdir() if path.is_file())
        assert [seed in files for seed in seeds] == [False] * 11 + [True] * 9

    def test_one_more_header_writes_one_more_row(self, tmp_path):
        stored, _ = next(played_round(tmp_path))
        with stored.open() as store:
            before = store.member()
            tid, session = next(iter(before.sessions.items()))
            shown = dict(session.shown)
            shown[99] = next(iter(shown.values()))
            after = replace(before, sessions={tid: replace(session, shown=shown)})
            written: list[str] = []
            store._db.set_trace_callback(written.append)
            store.save_member(before, after)
            store._db.set_trace_callback(None)
        assert sum("shown VALUES" in statement for statement in written) == 1
        assert len(written) < 10

    def test_a_closed_session_keeps_its_reason_and_no_share(self, tmp_path):
        stored, round_ = next(played_round(tmp_path))
        with stored.open() as store:
            before = store.member()
            session = before.sessions[round_.tid]
            assert isinstance(session, Inspecting)
            after = member._close(before, session, "a later ticket came")
            store.save_member(before, after)
            assert store._one("SELECT count(*) FROM shown") == (0,)
            assert_same(store.member(), after)
            assert isinstance(store.member().sessions[round_.tid], Closed)


class TestFile:
    def test_one_process_at_a_time(self, tmp_path):
        fleet = fleet_of()
        with open_store(tmp_path, fleet), pytest.raises(ParameterError, match="another process"):
            open_store(tmp_path, fleet)
        open_store(tmp_path, fleet).close()

    def test_another_devices_state_is_refused(self, tmp_path):
        fleet = fleet_of()
        open_store(tmp_path, fleet).close()
        with pytest.raises(StoreDamaged, match="another device"):
            open_store(tmp_path, fleet, fleet.devices[1].public_key)

    def test_a_later_schema_is_refused(self, tmp_path):
        fleet = fleet_of()
        with open_store(tmp_path, fleet) as store:
            store._run("PRAGMA user_version = 99")
        with pytest.raises(ParameterError, match="later version"):
            open_store(tmp_path, fleet)

    def test_a_file_that_is_no_database_is_damage(self, tmp_path):
        (tmp_path / "state.db").write_bytes(b"not a database" * 100)
        with pytest.raises(StoreDamaged):
            open_store(tmp_path, fleet_of())

    def test_only_the_owner_reads_the_files_and_no_log_is_left_beside(self, tmp_path):
        fleet = fleet_of()
        sent = contribution_of(fleet, reference.open_ticket(fleet, ENTROPY, 40, n_max=5))
        with open_store(tmp_path, fleet) as store:
            store.save_contribution(sent, {})
            assert store._one("PRAGMA secure_delete") == (1,)
            assert store._one("PRAGMA synchronous") == (2,)
            modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
            assert modes == {"state.db": 0o600, "state.db-journal": 0o600, "state.lock": 0o600, "outbox": 0o700}
            assert (tmp_path / "state.db-journal").stat().st_size == 0
            assert store.outbox_path(sent.round.tid).stat().st_mode & 0o777 == 0o600

    def test_outcomes_are_read_beside_the_process_that_writes(self, tmp_path):
        fleet = fleet_of()
        with open_store(tmp_path, fleet) as store:
            outcome = Outcome("digits", 3, "refused", "the lifetime budget", 1_700_000_000)
            store.save_outcome(outcome)
            store.save_model("digits", Held(b"model", "a", "b"))
            assert read_outcomes(tmp_path) == {"digits": outcome} == store.outcomes()
            assert store.models() == {"digits": Held(b"model", "a", "b")}
        with pytest.raises(OSError, match=r"state\.db"):
            read_outcomes(tmp_path / "nowhere")


CHILD = """
import os, signal, sys
sys.path[:0] = {paths!r}
import test_device_store as t
from pathlib import Path
import edge_sdk.files as f

count, after, at = 0, {after}, {at}
def deadly(call):
    def wrapped(*args):
        global count
        count += 1
        if count == at and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = call(*args)
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return wrapped

fleet = t.fleet_of()
sent = t.contribution_of(fleet, t.reference.open_ticket(fleet, t.ENTROPY, 40, n_max=5))
store = t.open_store(Path({directory!r}), fleet)
f.os = type("os", (), {{**vars(os), "fsync": staticmethod(deadly(os.fsync))}})
store._run = deadly(store._run)
store.save_contribution(sent, {{}})
store.save_idle(sent.give_up())
print("done", count)
"""


def run_child(directory: Path, at: int, after: bool) -> subprocess.CompletedProcess[str]:
    here = Path(__file__).resolve()
    script = CHILD.format(paths=[str(here.parent)], after=after, at=at, directory=str(directory))
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)


def test_a_kill_at_any_write_leaves_the_state_from_before_or_after(tmp_path):
    """Real SIGKILLs around every statement and fsync of a contribution that is stored and then forgotten."""
    fleet = fleet_of()
    sent = contribution_of(fleet, reference.open_ticket(fleet, ENTROPY, 40, n_max=5))
    whole = tmp_path / "whole"
    whole.mkdir()
    finished = run_child(whole, at=10_000, after=False)
    assert finished.returncode == 0, finished.stderr
    steps = int(finished.stdout.split()[1])
    assert steps >= 10
    phases = []
    for at in range(1, steps + 1):
        directory = tmp_path / str(at)
        directory.mkdir()
        killed = run_child(directory, at, after=bool(at % 2))
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        with open_store(directory, fleet) as store:
            state = store.contributor("reference")
            if isinstance(state, Sent):
                # encapsulations differ from run to run; that they are the header's was checked by loading
                assert state.contribution.masked == sent.contribution.masked
                phases.append("sent")
            else:
                assert state in (Idle("reference"), Idle("reference", 0, sent.round.tid))
                phases.append("before" if state.round < 0 else "after")
                assert list((directory / "outbox").iterdir()) == []
    assert sorted(set(phases), key=phases.index) == ["before", "sent", "after"]
    assert phases == sorted(phases, key=["before", "sent", "after"].index)


def test_a_hot_journal_is_rolled_back(tmp_path):
    """A kill inside COMMIT leaves the old pages in the journal: the next opening puts them back."""
    fleet = fleet_of()
    with open_store(tmp_path, fleet) as store:
        store.save_outcome(Outcome("digits", 1, "refused", "first", 0))
    pid = os.fork()
    if pid == 0:
        database = sqlite3.connect(tmp_path / "state.db", isolation_level=None)
        database.execute("PRAGMA journal_mode = TRUNCATE")
        database.execute("PRAGMA cache_size = 1")  # spill: pages reach the file before COMMIT
        database.execute("BEGIN IMMEDIATE")
        database.execute("UPDATE outcome SET reason = 'second'")
        for i in range(200):
            database.execute("INSERT INTO local VALUES (?, ?, ?)", (str(i), b"", bytes(4096)))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert (tmp_path / "state.db-journal").stat().st_size > 0
    with open_store(tmp_path, fleet) as store:
        assert store.outcomes()["digits"].reason == "first"
        assert store._one("SELECT count(*) FROM local") == (0,)
