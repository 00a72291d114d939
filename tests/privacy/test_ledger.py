"""The ledger under power cuts, changed bytes, rollbacks and retries; what it lets through and what it refuses."""

from __future__ import annotations

import json
import os
import struct
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk import ledger as ledger_module
from edge_sdk.errors import ParameterError
from edge_sdk.ledger import Ledger, create_ledger
from edge_sdk.privacy.ledger_entry import (
    Account,
    Draw,
    Head,
    LedgerDamaged,
    Limits,
    Release,
    Send,
    Spent,
    decode_entry,
    encode_entry,
    next_link,
    takes_part,
)
from edge_sdk.privacy.mechanism import Mechanism
from edge_sdk.privacy.rdp import Budget, BudgetExceeded, Sampling

OWNER, OPERATOR, COIN = b"\x01" * 32, b"\x02" * 32, bytes(32)
WIDE = Limits(Budget(100.0, 1e-6), Budget(100.0, 1e-6))


def mechanism(unit="example", multiplier=3.0, **changes):
    draft = Mechanism(
        unit=unit, dimension=1000, clip=0.5, granularity=1e-4, sigma=1e4, honest=10, modulus_bits=22, **changes
    )
    return replace(draft, sigma=multiplier * draft.sensitivity_steps)


RELEASE = Release.of(mechanism(), Sampling(example=0.3))
ALL_IN = Release.of(mechanism("device"), Sampling())


def tid(number):
    return number.to_bytes(32, "little")


def contribution(number):
    return (number + 1000).to_bytes(32, "little")


def open_ledger(path, lifetime=WIDE, protects="example", tasks=None):
    return Ledger(path, OWNER, protects, lifetime, tasks)


def take_part(ledger, number, release=RELEASE, task="keywords"):
    assert ledger.draw(task, number, tid(number), OPERATOR, release, COIN, 5)
    ledger.charge(tid(number), contribution(number), 6)


def put(path, data):
    """`data` in place of what the file holds, without emptying it first: that would make the disk flush every time."""
    with path.open("r+b") as file:
        file.write(data)
        file.truncate()


@pytest.fixture
def path(tmp_path):
    where = tmp_path / "ledger"
    create_ledger(where, OWNER)
    return where


@pytest.fixture
def three(path):
    """A ledger of three rounds, six entries; (path, its heads after 0..6 entries)."""
    with open_ledger(path) as ledger:
        heads = [ledger.head]
        for number in range(3):
            assert ledger.draw("keywords", number, tid(number), OPERATOR, RELEASE, COIN, 5)
            heads.append(ledger.head)
            ledger.charge(tid(number), contribution(number), 6)
            heads.append(ledger.head)
    return path, heads


# Entries


@given(
    st.builds(
        Draw,
        task=st.text(min_size=1, max_size=16),
        round=st.integers(0, 2**53 - 1),
        tid=st.binary(min_size=32, max_size=32),
        operator=st.binary(min_size=32, max_size=32),
        release=st.just(RELEASE),
        takes_part=st.booleans(),
        time_s=st.integers(0, 2**40 - 1),
    )
    | st.builds(
        Send,
        tid=st.binary(min_size=32, max_size=32),
        contribution=st.binary(min_size=32, max_size=32),
        time_s=st.integers(0, 2**40 - 1),
    )
)
def test_an_entry_is_read_as_it_was_written(entry):
    assert decode_entry(encode_entry(entry)) == entry


def test_the_largest_entry_fits_its_record(path):
    release = Release.of(mechanism(metric_scale=0.05, loss_bound=2.5), Sampling(0.123, 0.456))
    with open_ledger(path) as ledger:
        ledger.draw("x" * 64, 2**53 - 1, tid(1), OPERATOR, release, b"\xff" * 32, 2**40 - 1)
    with open_ledger(path) as ledger:
        assert ledger.head.entries == 1


@given(st.binary(max_size=300))
def test_bytes_that_are_no_entry_are_refused_by_name(data):
    with pytest.raises(LedgerDamaged):
        decode_entry(data)


def test_an_entry_of_a_mechanism_that_cannot_exist_is_refused():
    body = encode_entry(Draw("t", 0, tid(0), OPERATOR, RELEASE, True, 0))
    changed = body.replace(struct.pack(">d", RELEASE.sigma), struct.pack(">d", 0.0))
    assert changed != body
    with pytest.raises(LedgerDamaged, match="does not decode"):
        decode_entry(changed)


def test_an_entry_that_could_not_be_read_again_is_not_written(path):
    with open_ledger(path) as ledger:
        with pytest.raises(ParameterError, match="could not be read again"):
            ledger.draw("keywords", -1, tid(0), OPERATOR, RELEASE, COIN, 5)
        assert ledger.head.entries == 0
        take_part(ledger, 0)


# The coin


@pytest.mark.parametrize(("rate", "last_in"), [(0.5, 2**255 - 1), (0.25, 2**254 - 1), (1.0, 2**256 - 1)])
def test_the_coin_falls_for_the_device_with_exactly_its_rate(rate, last_in):
    assert takes_part(rate, last_in.to_bytes(32, "little"))
    if rate < 1:
        assert not takes_part(rate, (last_in + 1).to_bytes(32, "little"))


@pytest.mark.parametrize(
    ("rate", "coin"), [(0.0, COIN), (1.1, COIN), (float("nan"), COIN), (0.5, b""), (0.5, b"1" * 31)]
)
def test_a_coin_without_a_rate_or_entropy_is_refused(rate, coin):
    with pytest.raises(ParameterError):
        takes_part(rate, coin)


def test_a_coin_is_tossed_once_for_a_ticket_even_across_a_restart(path):
    release = Release.of(mechanism("device"), Sampling(device=0.5))
    tails = b"\xff" * 32
    with open_ledger(path) as ledger:
        assert not ledger.draw("keywords", 0, tid(0), OPERATOR, release, tails, 5)
        assert not ledger.draw("keywords", 0, tid(0), OPERATOR, release, COIN, 5)
    with open_ledger(path) as ledger:
        assert not ledger.draw("keywords", 0, tid(0), OPERATOR, release, COIN, 5)
        with pytest.raises(ParameterError, match="no draw says"):
            ledger.charge(tid(0), contribution(0), 6)
        assert ledger.head.entries == 1


def test_a_round_that_the_coin_left_out_costs_against_readers_and_not_against_the_coordinator(path):
    release = Release.of(mechanism("device"), Sampling(device=0.5))
    with open_ledger(path, protects="device") as ledger:
        ledger.draw("keywords", 0, tid(0), OPERATOR, release, b"\xff" * 32, 5)
        totals = ledger.account.totals()
        assert totals.readers.epsilon > 0
        assert totals.coordinator is None


# Charges


def test_a_contribution_without_a_draw_is_refused(path):
    with open_ledger(path) as ledger, pytest.raises(ParameterError, match="no draw says"):
        ledger.charge(tid(0), contribution(0), 6)


def test_a_retry_of_the_same_contribution_is_free_and_another_one_for_the_ticket_is_refused(three):
    path, heads = three
    with open_ledger(path) as ledger:
        ledger.charge(tid(1), contribution(1), 99)
        assert ledger.head == heads[-1]
        with pytest.raises(ParameterError, match="charged already"):
            ledger.charge(tid(1), contribution(2), 99)
        assert ledger.head == heads[-1]


def test_a_ticket_hash_with_another_content_is_refused(three):
    path, heads = three
    with open_ledger(path) as ledger:
        with pytest.raises(ParameterError, match="another content"):
            ledger.draw("keywords", 1, tid(1), OPERATOR, ALL_IN, COIN, 5)
        assert ledger.head == heads[-1]


def test_the_plan_of_the_demonstration_runs_to_its_end_and_not_a_round_further(path):
    limits = Limits(Budget(2.75, 1e-4), Budget(2.75, 1e-4))
    release = Release.of(mechanism(multiplier=3.0), Sampling(example=0.3))
    with open_ledger(path, limits) as ledger:
        for number in range(40):
            take_part(ledger, number, release)
        with pytest.raises(BudgetExceeded, match=r"the lifetime budget, against readers.*2\.75 at delta 0\.0001"):
            ledger.draw("keywords", 40, tid(40), OPERATOR, release, COIN, 5)
        assert ledger.head.entries == 80
    with open_ledger(path, limits) as ledger, pytest.raises(BudgetExceeded):
        ledger.draw("keywords", 40, tid(40), OPERATOR, release, COIN, 5)


def test_no_coin_is_tossed_when_the_budget_against_the_coordinator_would_not_let_the_device_send(path):
    release = Release.of(mechanism("device"), Sampling(device=0.01))
    limits = Limits(Budget(100.0, 1e-6), Budget(0.1, 1e-6))
    with open_ledger(path, limits, "device") as ledger:
        with pytest.raises(BudgetExceeded, match="against the coordinator"):
            ledger.draw("keywords", 0, tid(0), OPERATOR, release, COIN, 5)
        assert ledger.head.entries == 0


def test_a_draw_made_while_there_was_room_does_not_let_a_later_send_pass_the_budget(path):
    limits = Limits(Budget(100.0, 1e-6), Budget(2.0, 1e-6))
    with open_ledger(path, limits, "device") as ledger:
        assert ledger.draw("a", 0, tid(0), OPERATOR, ALL_IN, COIN, 5)
        assert ledger.draw("b", 0, tid(1), OPERATOR, ALL_IN, COIN, 5)
        ledger.charge(tid(0), contribution(0), 6)
        with pytest.raises(BudgetExceeded, match="the lifetime budget, against the coordinator"):
            ledger.charge(tid(1), contribution(1), 6)
        assert tid(1) not in ledger.account.sends


def test_one_lifetime_budget_is_over_all_tasks(path):
    limits = Limits(Budget(2.75, 1e-4), Budget(2.75, 1e-4))
    release = Release.of(mechanism(multiplier=3.0), Sampling(example=0.3))
    with open_ledger(path, limits) as ledger:
        for number in range(40):
            take_part(ledger, number, release, task=f"task-{number % 4}")
        with pytest.raises(BudgetExceeded, match="lifetime"):
            ledger.draw("a-new-task", 0, tid(40), OPERATOR, release, COIN, 5)


def test_a_tasks_own_budget_stops_it_and_no_other_task(path):
    small = Limits(Budget(1.0, 1e-6), Budget(1.0, 1e-6))
    with open_ledger(path, tasks={"keywords": small}) as ledger:
        allowed = 2  # rounds of this mechanism and rate that epsilon 1 holds
        for number in range(allowed):
            take_part(ledger, number)
        with pytest.raises(BudgetExceeded, match="the budget of task keywords, against"):
            take_part(ledger, allowed)
        take_part(ledger, 2000, task="other")


def test_lowered_limits_hold_for_what_was_spent_before(three):
    path, _ = three
    with (
        open_ledger(path, Limits(Budget(0.1, 1e-6), Budget(0.1, 1e-6))) as ledger,
        pytest.raises(BudgetExceeded, match="spent"),
    ):
        ledger.draw("keywords", 9, tid(9), OPERATOR, RELEASE, COIN, 5)


def test_a_budget_for_whole_devices_takes_no_rounds_of_examples(path):
    with open_ledger(path, protects="device") as ledger:
        with pytest.raises(ParameterError, match="bounds nothing for a whole device"):
            ledger.draw("keywords", 0, tid(0), OPERATOR, RELEASE, COIN, 5)
        take_part(ledger, 1, ALL_IN)


def test_a_ledger_of_examples_is_not_opened_to_protect_devices(three):
    path, _ = three
    with pytest.raises(ParameterError, match="protects devices"):
        open_ledger(path, protects="device")


def test_a_round_of_devices_costs_an_example_twice_the_distance(path):
    account = Account("example", WIDE)
    account.record(Draw("t", 0, tid(0), OPERATOR, ALL_IN, True, 0))
    other = Account("device", WIDE)
    other.record(Draw("t", 0, tid(0), OPERATOR, ALL_IN, True, 0))
    mine, theirs = account.totals().readers.spent.values, other.totals().readers.spent.values
    assert mine == pytest.approx(4 * theirs)


# For people


def test_a_summary_counts_rounds_entered_taken_and_sent_by_task(path):
    half = Release.of(mechanism("device"), Sampling(device=0.5))
    own = Limits(Budget(50.0, 1e-5), Budget(60.0, 1e-5))
    with open_ledger(path, protects="device", tasks={"a": own, "never": own}) as ledger:
        take_part(ledger, 3, ALL_IN, task="a")
        ledger.draw("a", 7, tid(7), OPERATOR, half, b"\xff" * 32, 5)  # the coin says no
        ledger.draw("b", 9, tid(9), OPERATOR, half, COIN, 5)  # it says yes, and nothing is sent yet
        summary = ledger.summary()
        assert (summary.protects, summary.entries, summary.link) == ("device", 4, ledger.head.link.hex())
    counts = {
        name: (use.rounds_entered, use.rounds_taken, use.rounds_sent, use.last_round)
        for name, use in [("all", summary.lifetime), *summary.tasks.items()]
    }
    assert counts == {"all": (3, 2, 1, None), "a": (2, 1, 1, 7), "b": (1, 1, 0, 9), "never": (0, 0, 0, None)}
    assert summary.tasks["b"].readers is summary.tasks["b"].coordinator is None  # no budget of its own
    assert summary.tasks["never"].readers == Spent(0.0, own.readers)
    assert summary.tasks["a"].readers.budget == own.readers
    assert summary.tasks["a"].coordinator.budget == own.coordinator


def test_a_summary_says_of_each_observer_just_what_a_refusal_would_say(path):
    limits = Limits(Budget(2.75, 1e-4), Budget(9.0, 1e-5))
    release = Release.of(mechanism("device", multiplier=3.0), Sampling(device=0.3))
    with open_ledger(path, limits, "device") as ledger:
        assert ledger.summary().lifetime.coordinator == Spent(0.0, limits.coordinator)
        for number in range(40):
            ledger.draw("keywords", number, tid(number), OPERATOR, release, COIN, 5)
            if number % 3 == 0:
                ledger.charge(tid(number), contribution(number), 6)
        lifetime = ledger.summary().lifetime
        with pytest.raises(BudgetExceeded, match=f"of which {lifetime.readers.epsilon:.4g} is spent"):
            ledger.draw("keywords", 40, tid(40), OPERATOR, release, COIN, 5)
    assert 2.6 < lifetime.readers.epsilon <= 2.75
    assert 5 < lifetime.coordinator.epsilon <= 9  # another observer, another figure
    with open_ledger(path, limits, "device") as ledger:
        assert ledger.summary().lifetime == lifetime


def test_a_summary_is_one_object_of_json_with_both_observers_by_name(three):
    path, _ = three
    with open_ledger(path) as ledger:
        told = json.loads(msgspec.json.encode(ledger.summary()))
    assert told["lifetime"]["readers"]["budget"] == {"epsilon": 100.0, "delta": 1e-6}
    assert set(told["tasks"]["keywords"]) == {
        "rounds_entered", "rounds_taken", "rounds_sent", "last_round", "readers", "coordinator",
    }  # fmt: skip


# The chain, anchors


def test_a_ledger_extends_each_of_its_earlier_heads(three):
    path, heads = three
    with open_ledger(path) as ledger:
        assert ledger.head == heads[-1]
        for head in heads:
            ledger.check_extends(head)


def test_a_ledger_that_was_rolled_back_is_told_by_an_anchored_head(three):
    path, heads = three
    whole = path.read_bytes()
    for entries in range(6):
        put(path, whole[: 512 * (1 + entries)])
        with open_ledger(path) as ledger:
            assert ledger.head == heads[entries]
            with pytest.raises(LedgerDamaged, match=f"rolled back: {entries} entries, but 6"):
                ledger.check_extends(heads[-1])


def test_a_ledger_made_anew_is_told_by_an_anchored_head(three):
    path, heads = three
    path.unlink()
    create_ledger(path, OWNER)
    with open_ledger(path) as ledger, pytest.raises(LedgerDamaged, match="rolled back"):
        ledger.check_extends(heads[2])


def test_a_clone_that_went_its_own_way_is_told_by_an_anchored_head(three, tmp_path):
    path, heads = three
    clone = tmp_path / "clone"
    clone.write_bytes(path.read_bytes()[: 512 * 5])
    with open_ledger(clone) as ledger:
        for number in range(5, 10):
            take_part(ledger, number)
        ledger.check_extends(heads[4])
        with pytest.raises(LedgerDamaged, match="forked: entry 6"):
            ledger.check_extends(heads[6])


@pytest.mark.parametrize("head", [Head(-1, bytes(32)), Head(0, b"")])
def test_an_anchor_that_is_none_is_refused(path, head):
    with open_ledger(path) as ledger, pytest.raises(ParameterError):
        ledger.check_extends(head)


def test_a_missing_ledger_is_damage_and_never_an_empty_one(tmp_path):
    with pytest.raises(LedgerDamaged, match="no ledger"):
        open_ledger(tmp_path / "ledger")
    assert not (tmp_path / "ledger").exists()


def test_a_ledger_is_never_created_over_another(three):
    path, _ = three
    before = path.read_bytes()
    with pytest.raises(ParameterError, match="already"):
        create_ledger(path, OWNER)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["ledger"]


def test_another_devices_ledger_is_refused(three):
    path, _ = three
    with pytest.raises(LedgerDamaged, match="not a ledger of this device"):
        Ledger(path, b"\x03" * 32, "example", WIDE)


def test_one_process_has_the_ledger_at_a_time(path):
    with open_ledger(path), pytest.raises(ParameterError, match="another process"):
        open_ledger(path)
    open_ledger(path).close()


# Power cuts and changed bytes


def test_cut_at_every_byte_a_ledger_opens_with_every_whole_entry_or_says_that_it_is_damaged(three, fast_disk):
    path, heads = three
    whole = path.read_bytes()
    for length in range(len(whole) + 1):
        put(path, whole[:length])
        if length < 512:
            with pytest.raises(LedgerDamaged):
                open_ledger(path)
            continue
        with open_ledger(path) as ledger:
            assert ledger.head == heads[(length - 512) // 512]
            assert ledger.cut_bytes == length % 512
        assert path.stat().st_size == length // 512 * 512


def test_a_last_record_of_which_only_the_beginning_reached_the_disk_is_cut(three, fast_disk):
    path, heads = three
    whole = path.read_bytes()
    for kept in range(512 - 32 + 1):
        put(path, whole[:-512] + whole[-512:][:kept].ljust(512, b"\0"))
        with open_ledger(path) as ledger:
            assert ledger.head == heads[-2]
            assert ledger.cut_bytes == 512
            take_part(ledger, 7)  # and goes on
        with open_ledger(path) as ledger:
            assert tid(7) in ledger.account.sends


def test_a_changed_byte_anywhere_is_damage_and_never_a_shorter_ledger(three, fast_disk):
    path, _ = three
    whole = path.read_bytes()
    for position in range(len(whole)):
        changed = bytearray(whole)
        changed[position] ^= 0x40
        put(path, changed)
        with pytest.raises(LedgerDamaged):
            open_ledger(path)
        assert path.read_bytes() == changed


def test_a_record_of_zeros_before_others_is_damage_and_nothing_is_cut(three):
    path, _ = three
    whole = path.read_bytes()
    for start, end in ((1024, 1536), (1536 - 32, 1536), (512, 1024)):
        holed = whole[:start] + bytes(end - start) + whole[end:]
        put(path, holed)
        with pytest.raises(LedgerDamaged):
            open_ledger(path)
        assert path.read_bytes() == holed


def test_entries_in_another_order_are_damage(three):
    path, _ = three
    whole = path.read_bytes()
    records = [whole[i : i + 512] for i in range(0, len(whole), 512)]
    put(path, b"".join([records[0], records[3], records[4], records[1], records[2], *records[5:]]))
    with pytest.raises(LedgerDamaged, match="entry 1 does not follow"):
        open_ledger(path)


def test_a_well_linked_entry_that_no_ledger_would_write_is_damage(path):
    with open_ledger(path) as ledger:
        body = encode_entry(Send(tid(0), contribution(0), 0))
        link = next_link(ledger.head.link, body)
    with path.open("ab") as file:
        file.write(ledger_module._record(body, link))
    with pytest.raises(LedgerDamaged, match="no draw allows"):
        open_ledger(path)


@pytest.fixture
def fast_disk(monkeypatch):
    """For tests of what is read back: nothing there depends on when it became durable."""
    monkeypatch.setattr(ledger_module.os, "fsync", lambda file: None)


class Killed(BaseException):
    """The process ends here."""


@pytest.fixture
def disk(monkeypatch):
    """Counts writes and fsyncs of the ledger, and kills the process where a test says."""

    class Disk:
        calls: ClassVar[list[str]] = []
        kill_at: ClassVar[str | None] = None
        written: ClassVar[int | None] = None

    real_write, real_fsync = os.write, os.fsync

    def write(file, data):
        Disk.calls.append("write")
        if Disk.written is not None:
            real_write(file, data[: Disk.written])
            raise OSError(28, "No space left on device")
        return real_write(file, data)

    def fsync(file):
        if Disk.kill_at == "fsync":
            raise Killed
        real_fsync(file)
        Disk.calls.append("fsync")

    monkeypatch.setattr(ledger_module.os, "write", write)
    monkeypatch.setattr(ledger_module.os, "fsync", fsync)
    Disk.calls = []
    return Disk


def test_a_charge_is_on_the_disk_before_it_returns(three, disk):
    path, _ = three
    with open_ledger(path) as ledger:
        disk.calls.clear()
        ledger.draw("keywords", 8, tid(8), OPERATOR, RELEASE, COIN, 5)
        assert disk.calls == ["write", "fsync"]
        ledger.charge(tid(8), contribution(8), 6)
        assert disk.calls == ["write", "fsync"] * 2


def test_killed_between_write_and_fsync_the_charge_stays_and_the_ledger_takes_no_more(three, disk):
    path, heads = three
    ledger = open_ledger(path)
    ledger.draw("keywords", 8, tid(8), OPERATOR, RELEASE, COIN, 5)
    disk.kill_at = "fsync"
    with pytest.raises(Killed):
        ledger.charge(tid(8), contribution(8), 6)
    disk.kill_at = None
    with pytest.raises(ParameterError, match="open it anew"):
        ledger.charge(tid(8), contribution(8), 6)
    with open_ledger(path) as again:
        assert again.head.entries == len(heads) + 1
        assert again.account.sends[tid(8)] == contribution(8)
        again.charge(tid(8), contribution(8), 6)  # the retry is free
        assert again.head.entries == len(heads) + 1


@pytest.mark.parametrize("written", [0, 1, 300, 511])
def test_a_full_disk_leaves_nothing_that_a_later_entry_could_be_lost_behind(three, disk, written):
    path, heads = three
    ledger = open_ledger(path)
    disk.written = written
    with pytest.raises(OSError, match="No space"):
        ledger.draw("keywords", 8, tid(8), OPERATOR, RELEASE, COIN, 5)
    disk.written = None
    with open_ledger(path) as again:
        assert again.head == heads[-1]
        assert again.cut_bytes == written
        take_part(again, 8)
    with open_ledger(path) as again:
        assert again.head.entries == 8


def test_a_device_that_loses_power_at_once_never_sends_what_it_did_not_charge(tmp_path):
    # The process ends inside fsync; whatever the disk then holds, either the charge is there or nothing was sent.
    path = Path(tmp_path) / "ledger"
    create_ledger(path, OWNER)
    child = os.fork()
    if child == 0:
        with open_ledger(path) as ledger:
            ledger.draw("keywords", 0, tid(0), OPERATOR, RELEASE, COIN, 5)
            ledger_module.os.fsync = lambda file: os._exit(9)
            ledger.charge(tid(0), contribution(0), 6)
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 9
    with open_ledger(path) as ledger:
        assert ledger.account.sends == {tid(0): contribution(0)}


def test_a_ledger_is_its_owners_alone(tmp_path):
    create_ledger(tmp_path / "ledger", OWNER)
    assert (tmp_path / "ledger").stat().st_mode & 0o777 == 0o600
