"""The store: what it promises over a crash, and what it refuses."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from contextlib import contextmanager
from threading import Event, Timer

import numpy as np
import pytest
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import IntegrityError
from sqlalchemy.schema import CreateTable

from coordinator import rows
from coordinator import vectors as vectors_module
from coordinator.errors import StoreError
from coordinator.rows import CertificateRow, ContributionRow, EpochRow, HeaderRow, ModelRow, RoundRow, TaskRow
from coordinator.store import Store
from edge_sdk.crypto.hashing import content_hash
from edge_sdk.errors import ParameterError

KEY, OTHER, TID = b"k" * 32, b"o" * 32, b"t" * 32


@pytest.fixture
def store(tmp_path):
    opened = Store(tmp_path / "fleet")
    yield opened
    opened.close()


def task_row(name="digits"):
    return TaskRow(name, "toml", b"plan", b"b" * 32, "running", 0, 1.0)


def epoch_row(number=1):
    return EpochRow(number, bytes([number]) * 32, b"signed", (KEY, OTHER), 1.0)


def round_row(tid=TID, number=0):
    return RoundRow(tid, "digits", number, 1, b"ticket", 0, "COLLECT", 1.0, None, None, None, None, None, "")


@pytest.fixture
def running(store):
    """A store with one open round whose only member used one prekey."""
    with store.transaction() as t:
        t.add_epoch(epoch_row())
        t.add_task(task_row())
        t.add_prekey(KEY, 0, b"offer", 100)
        t.add_round(round_row(), [(KEY, 0)])
    return store


def test_everything_that_was_committed_is_there_after_reopening(running, tmp_path):
    with running.transaction() as t:
        t.add_contributions(TID, [ContributionRow(0, 7, b"d" * 32, b"header")])
        t.set_complaints(TID, 2, [7, 9])
        t.set_sealed(TID, b"seal")
        t.set_signature(TID, 1, b"s1")
        t.set_certified(TID, b"certificate")
        t.set_release(TID, 1, b"r1")
        t.add_model(ModelRow("digits", 0, b"p" * 32, None, None, None, 0.5, 18.0, None, None, {"loss": 0.5}, 2.0))
    running.close()
    again = Store(tmp_path / "fleet")
    with again.reading() as t:
        (row,) = t.active_rounds()
        assert (row.tid, row.phase, row.seal, row.certificate) == (TID, "CERTIFIED", b"seal", b"certificate")
        assert t.contributions(TID) == [ContributionRow(0, 7, b"d" * 32, b"header")]
        assert t.complaints(TID) == {2: frozenset({7, 9})}
        assert (t.signatures(TID), t.releases(TID)) == ({1: b"s1"}, {1: b"r1"})
        assert t.newest_epoch() == epoch_row()
        assert t.task("digits").next_round == 1
        assert t.newest_model("digits").metrics == {"loss": 0.5}
    again.close()


def test_a_transaction_that_fails_writes_nothing(store):
    def fail():
        with store.transaction() as t:
            t.add_device(KEY, "device", ["kitchen"], 1.0)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    with store.reading() as t:
        assert (t.devices(), t.changes()) == ([], 0)


def test_a_newer_schema_is_refused_and_left_alone(tmp_path):
    Store(tmp_path).close()
    with sqlite3.connect(tmp_path / "coordinator.db") as connection:
        connection.execute("UPDATE meta SET value = 99 WHERE key = 'schema'")
    with pytest.raises(StoreError, match=r"schema 99.*newer"):
        Store(tmp_path)


def test_a_directory_from_before_headers_were_kept_opens_and_keeps_them(tmp_path):
    store = Store(tmp_path)
    with store.transaction() as t:
        t.add_device(KEY, "device", ["kitchen"], 1.0)
    store.close()
    with sqlite3.connect(tmp_path / "coordinator.db") as connection:
        connection.execute("DROP TABLE headers")
    for expected in ([], [HeaderRow(KEY, 1, b"one")]):
        store = Store(tmp_path)
        with store.transaction() as t:
            assert (t.headers(), [row.key for row in t.devices()]) == (expected, [KEY])
            t.set_headers([HeaderRow(KEY, 1, b"one")])
        store.close()


def test_a_directory_from_before_waits_were_kept_opens_and_keeps_them(tmp_path):
    store = Store(tmp_path)
    with store.transaction() as t:
        t.add_task(task_row())
    store.close()
    with sqlite3.connect(tmp_path / "coordinator.db") as connection:
        connection.execute("DROP TABLE waits")
    for expected in ("", "for devices"):
        store = Store(tmp_path)
        with store.transaction() as t:
            assert t.waiting("digits") == expected
            t.set_waiting("digits", "for devices")
        store.close()


def test_a_devices_header_takes_the_place_of_its_earlier_one_and_of_no_other(store):
    others = HeaderRow(bytes([2]) * 32, 9, b"other")
    with store.transaction() as t:
        t.set_headers([])
        t.set_headers([HeaderRow(KEY, 1, b"one"), others])
        t.set_headers([HeaderRow(KEY, 2, b"two")])
        assert sorted(t.headers()) == sorted([HeaderRow(KEY, 2, b"two"), others])


def test_a_directory_that_others_can_read_is_refused(tmp_path):
    tmp_path.chmod(0o755)
    with pytest.raises(StoreError, match="chmod 0700"):
        Store(tmp_path)


def test_a_directory_of_another_user_is_refused_with_nothing_written_into_it(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(StoreError, match="another user"):
        Store(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nothing_in_the_directory_can_be_read_by_others(running):
    running.serve_alone()
    running.put_blob(b"model")
    running.vectors(TID, 4, 16).save_sums(0, b"sums")
    for root, directories, files in os.walk(running.directory):
        for name in [*directories, *files]:
            assert os.stat(os.path.join(root, name)).st_mode & 0o077 == 0, name


def test_only_one_process_serves(store):
    store.serve_alone()
    second = Store(store.directory)
    with pytest.raises(StoreError, match="another process"):
        second.serve_alone()
    store.close()
    second.serve_alone()
    second.close()


def test_commands_write_while_another_process_serves(store):
    store.serve_alone()
    second = Store(store.directory)
    with second.transaction() as t:
        t.add_device(KEY, "device", [], 1.0)
    with store.reading() as t:
        assert t.changes() == 1
        assert [row.key for row in t.devices()] == [KEY]
    second.close()


def test_a_token_is_spent_once_and_by_one_key(store):
    with store.transaction() as t:
        t.add_token(b"h" * 32, "device", ["kitchen"], now_s=0, expires_s=10)
        assert t.spend_token(b"h" * 32, KEY, 5).tags == {"kitchen"}
        assert t.spend_token(b"h" * 32, KEY, 50).spent_by == KEY  # its answer was lost
    with pytest.raises(ParameterError, match="another device"), store.transaction() as t:
        t.spend_token(b"h" * 32, OTHER, 5)
    with pytest.raises(ParameterError, match="not one of"), store.transaction() as t:
        t.spend_token(b"x" * 32, OTHER, 5)


def test_an_expired_token_is_refused(store):
    with store.transaction() as t:
        t.add_token(b"h" * 32, "helper", [], now_s=0, expires_s=10)
    with pytest.raises(ParameterError, match="expired"), store.transaction() as t:
        t.spend_token(b"h" * 32, KEY, 10)


def test_a_revoked_device_stays_revoked_and_so_do_its_certificates(store):
    with store.transaction() as t:
        t.add_device(KEY, "device", [], 1.0)
        t.add_certificate(CertificateRow("1f", KEY, b"pem", 1.0, 9.0, None))
        before = t.changes()
        assert t.revoke(KEY, 2.0)
        assert not t.revoke(KEY, 3.0)
        assert t.changes() == before + 1
        assert [c.revoked_s for c in t.certificates(KEY)] == [2.0]
        with pytest.raises(ParameterError, match="new identity"):
            t.add_device(KEY, "device", [], 4.0)
        with pytest.raises(ParameterError, match="not enrolled"):
            t.revoke(OTHER, 4.0)


def test_enrolling_again_changes_nothing_but_not_as_something_else(store):
    with store.transaction() as t:
        t.add_device(KEY, "device", ["a"], 1.0)
        t.add_device(KEY, "device", ["a"], 2.0)
        assert (t.changes(), t.device(KEY).enrolled_s) == (1, 1.0)
        with pytest.raises(ParameterError, match="enrolled already"):
            t.add_device(KEY, "helper", ["a"], 2.0)


def test_a_prekey_serves_one_ticket(running):
    with pytest.raises(StoreError, match="another ticket"), running.transaction() as t:
        t.add_round(round_row(b"u" * 32, 1), [(KEY, 0)])
    with running.reading() as t:
        assert t.round(b"u" * 32) is None
        assert t.next_prekey(KEY, 0) is None


def test_prekeys_are_used_oldest_first_and_not_past_their_time(store):
    with store.transaction() as t:
        for serial, expires in ((3, 50), (1, 10), (2, 90)):
            t.add_prekey(KEY, serial, bytes([serial]), expires)
        assert t.next_prekey(KEY, 10) == (1, b"\x01")
        assert t.next_prekey(KEY, 11) == (2, b"\x02")
        assert (t.spare_prekeys(KEY, 0), t.spare_prekeys(KEY, 60)) == (3, 1)
        t.forget_prekeys(50)
        assert t.prekey(KEY, 1) is None
        assert t.prekey(KEY, 3) == b"\x03"


def test_epochs_only_go_up(store):
    with store.transaction() as t:
        t.add_epoch(epoch_row(2))
        t.add_epoch(epoch_row(2))
        with pytest.raises(ParameterError, match="not newer"):
            t.add_epoch(EpochRow(2, b"z" * 32, b"", (), 1.0))
        with pytest.raises(StoreError, match="no epoch 1"):
            t.epoch(1)


def test_one_round_of_a_number_and_one_contribution_of_a_sender(running):
    with running.transaction() as t:
        t.add_prekey(KEY, 1, b"", 100)
    with pytest.raises(IntegrityError, match="UNIQUE"), running.transaction() as t:
        t.add_round(round_row(b"u" * 32, 0), [(KEY, 1)])
    with running.transaction() as t:
        t.add_contributions(TID, [ContributionRow(0, 7, b"d" * 32, b"h")])
    with pytest.raises(IntegrityError, match="UNIQUE"), running.transaction() as t:
        t.add_contributions(TID, [ContributionRow(1, 7, b"e" * 32, b"h")])


def test_a_skipped_round_number_is_never_used(running):
    with running.transaction() as t:
        assert t.skip_round("digits") == 2
        with pytest.raises(ParameterError, match="no task"):
            t.skip_round("other")


def test_a_removed_task_keeps_its_rows_its_name_and_its_state(running):
    with running.transaction() as t:
        t.add_model(ModelRow("digits", 0, b"p" * 32, None, None, None, 0.5, 18.0, None, None, {}, 2.0))
        t.set_waiting("digits", "for devices")
        before = t.changes()
        t.remove_task("digits")
        assert t.changes() == before + 1
        t.remove_task("digits")  # once more is harmless
        assert t.changes() == before + 1
        assert (t.task("digits").state, t.waiting("digits")) == ("removed", "")
        assert [row.tid for row in t.active_rounds()] == [TID]
        assert len(t.models("digits")) == 1
        t.finish_task("digits")  # a round that was certified gave the last model
        assert t.task("digits").state == "removed"
        assert t.skip_round("digits") == 2  # what a damaged disk may ask for
        with pytest.raises(ParameterError, match="no task 'other'"):
            t.remove_task("other")
        for state in ("running", "paused", "done"):
            with pytest.raises(
                ParameterError, match="task 'digits' was removed, for good: add another one, with another"
            ):
                t.set_task_state("digits", state)
        with pytest.raises(ParameterError, match=r"'digits' was removed, and its name stays taken: .*another name"):
            t.add_task(task_row())


def test_a_task_that_has_all_its_models_is_done(running):
    with running.transaction() as t:
        t.finish_task("digits")
        assert t.task("digits").state == "done"


def test_an_ended_round_keeps_who_sent_what_and_drops_the_rest(running):
    with running.transaction() as t:
        t.add_contributions(TID, [ContributionRow(0, 7, b"d" * 32, b"h")])
        t.set_signature(TID, 1, b"s")
        t.set_checkpoint(TID, 1, b"c" * 32)
        t.set_aborted(TID, b"notice", "nobody came", 5.0)
        assert t.active_rounds() == []
        assert t.contributions(TID) == [ContributionRow(0, 7, b"d" * 32, None)]
        assert t.contribution_of(TID, 7) == b"d" * 32
        assert (t.signatures(TID), t.checkpoint(TID)) == ({}, None)
        assert t.round(TID).reason == "nobody came"


def test_old_optimiser_states_are_forgotten_but_not_one_that_is_still_named(store):
    with store.transaction() as t:
        t.add_task(task_row())
        for number, memory in enumerate([b"a" * 32, b"b" * 32, b"b" * 32]):
            t.add_model(ModelRow("digits", number, b"p" * 32, memory, None, None, 0.5, 18.0, None, None, {}, 2.0))
        assert t.forget_memory("digits", 2) == [b"a" * 32]
        assert [m.memory for m in t.models("digits")] == [None, None, b"b" * 32]


def test_a_damaged_or_missing_blob_is_named(store):
    store.serve_alone()
    name = store.put_blob(b"model")
    assert store.blob(name) == b"model"
    store.blob_path(name).write_bytes(b"modem")
    with pytest.raises(StoreError, match="is damaged"):
        store.blob(name)
    store.drop_blobs([name])
    with pytest.raises(StoreError, match="is missing from"):
        store.blob(name)


def test_slots_hold_what_was_written_and_nothing_of_another_size(store):
    vectors = store.vectors(TID, 3, 8)
    vectors.write(2, b"22222222")
    vectors.write(0, memoryview(b"00000000"))
    vectors.sync()
    assert (vectors.read(2), vectors.read(0, 2, 3)) == (b"22222222", b"000")
    for slot, data in ((3, bytes(8)), (-1, bytes(8)), (1, bytes(7))):
        with pytest.raises(ParameterError, match="slot"):
            vectors.write(slot, data)
    with pytest.raises(StoreError, match="ends before"):
        store.vectors(b"u" * 32, 3, 8).read(0)
    vectors.close()


def test_what_was_allocated_ahead_is_never_over_a_vector(store, monkeypatch):
    monkeypatch.setattr("coordinator.vectors.RESERVE_BYTES", 24)
    vectors = store.vectors(TID, 7, 8)
    vectors.write(6, b"66666666")
    vectors.write(1, b"11111111")
    vectors.close()
    again = store.vectors(TID, 7, 8)
    for slot in (0, 2, 3):
        again.write(slot, b"%d" % slot * 8)
    assert [again.read(slot)[:1] for slot in range(7)] == [b"0", b"1", b"2", b"3", b"\0", b"\0", b"6"]
    assert again.path.stat().st_size == 7 * 8
    again.close()


def test_a_write_that_fails_in_the_background_is_said_by_every_sync_and_read(store, monkeypatch):
    vectors = store.vectors(TID, 3, 8)
    vectors.write(0, b"00000000")
    vectors.sync()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("coordinator.vectors.write_at", full)
        vectors.write(1, b"11111111")
        with pytest.raises(OSError, match="No space left"):
            vectors.sync()
    vectors.write(2, b"22222222")
    for again in (vectors.sync, vectors.sync, lambda: vectors.read(0)):
        with pytest.raises(OSError, match="No space left"):
            again()
    vectors.close()


def test_a_buffer_is_busy_until_it_is_written_and_what_reads_or_syncs_waits_for_it(store, monkeypatch):
    go_on, write_at = Event(), vectors_module.write_at

    def slow(*arguments):
        assert go_on.wait(30)
        write_at(*arguments)

    monkeypatch.setattr("coordinator.vectors.write_at", slow)
    vectors = store.vectors(TID, 2, 8)
    is_written = vectors.write(1, bytearray(b"11111111"))
    assert not is_written()
    Timer(0.01, go_on.set).start()
    assert vectors.read(1) == b"11111111"
    assert is_written()
    vectors.sync()
    vectors.close()


def test_a_file_system_that_allocates_nothing_ahead_takes_vectors_all_the_same(store, monkeypatch):
    def refused(*_):
        raise OSError(95, "not supported")

    monkeypatch.setattr("os.posix_fallocate", refused)
    vectors = store.vectors(TID, 2, 8)
    vectors.write(1, b"11111111")
    vectors.sync()
    assert vectors.read(1) == b"11111111"
    vectors.close()


def test_a_damaged_checkpoint_is_not_used(store):
    vectors = store.vectors(TID, 3, 8)
    sums = np.arange(4, dtype="<u4").tobytes()
    name = vectors.save_sums(2, sums)
    assert vectors.load_sums(2, name) == sums
    assert vectors.load_sums(1, name) is None
    (vectors.directory / "sums-2").write_bytes(sums[:-1])
    assert vectors.load_sums(2, name) is None
    vectors.drop_sums(but=1)
    assert list(vectors.directory.glob("sums-*")) == []


def test_sweeping_removes_what_no_row_names(running):
    running.vectors(TID, 1, 8).close()
    running.vectors(b"u" * 32, 1, 8).close()
    (running.blobs / f"{'ab' * 32}.new").write_bytes(b"half")
    (running.blobs / ("ab" * 32)).write_bytes(b"whole")
    (running.blobs / "README").write_bytes(b"somebody else's")
    running.sweep()
    assert [path.name for path in (running.directory / "rounds").iterdir()] == [TID.hex()]
    assert [path.name for path in running.blobs.iterdir()] == ["README"]


STORES_A_TASK = """
import os, signal, sys
from coordinator.rows import ModelRow, TaskRow
from coordinator.store import Store
store = Store(sys.argv[1])
bundle, parameters, memory = (store.put_blob(name + sys.argv[2].encode()) for name in (b"b", b"p", b"m"))
print("stored", flush=True)
if sys.stdin.readline() == "die\\n":
    os.kill(os.getpid(), signal.SIGKILL)
with store.transaction() as t:
    t.add_task(TaskRow(sys.argv[2], "toml", b"plan", bundle, "running", 0, 1.0))
    t.add_model(ModelRow(sys.argv[2], 0, parameters, memory, None, None, 1.0, 1.0, None, None, {}, 1.0))
store.close()
"""


@contextmanager
def storing(directory, name):
    """A command that has stored a task's files and not yet its rows. Send it "die" or "go on"."""
    arguments = [sys.executable, "-c", STORES_A_TASK, str(directory), name]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as command:
        assert command.stdout.readline() == "stored\n"
        yield lambda word: command.communicate(word + "\n")


def test_files_whose_row_was_never_written_go_at_the_next_start_and_no_others(store):
    with storing(store.directory, "kept") as command:
        command("go on")
    with storing(store.directory, "lost") as command:
        command("die")
    assert len(list(store.blobs.iterdir())) == 6
    store.serve_alone()
    store.sweep()
    assert sorted(path.read_bytes() for path in store.blobs.iterdir()) == [b"bkept", b"mkept", b"pkept"]


def test_files_that_a_command_is_storing_stay_whatever_the_server_deletes(store):
    with storing(store.directory, "new") as command:
        store.serve_alone()
        store.sweep()
        store.drop_blobs([content_hash(b"mnew")])
        command("go on")
    with store.reading() as t:
        assert all(store.blob_path(name).exists() for name in t.blob_names())
        assert len(t.blob_names()) == 3


def test_a_file_that_a_row_names_is_not_dropped(store):
    with storing(store.directory, "kept") as command:
        command("go on")
    store.drop_blobs([content_hash(b"pkept")])
    assert store.blob(content_hash(b"pkept")) == b"pkept"


def test_the_schema_is_one_that_postgresql_takes_too():
    for table in rows.metadata.sorted_tables:
        text = str(CreateTable(table).compile(dialect=postgresql.dialect()))
        assert "BYTEA" in text or table.name in ("meta", "tasks", "waits")
        assert "BLOB" not in text


def test_content_addresses_are_plain_sha256(store):
    assert store.put_blob(b"abc") == content_hash(b"abc")
