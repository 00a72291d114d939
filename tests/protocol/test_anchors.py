"""Heads of devices' ledgers: an honest one is never accused, in whatever order its headers come."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stage import seed

from edge_sdk.errors import PeerError
from edge_sdk.protocol.anchors import Anchored, Anchors
from edge_sdk.protocol.messages import Anchor, Header

KEY, OTHER = seed("a device"), seed("another device")


def header(entries: int, link: object = "honest", key: bytes = KEY) -> Header:
    return Header(seed("tid"), 3, key, [], 0, seed("k"), seed("m"), seed("s"), Anchor(entries, seed(link, entries)))


def seen(*shown: tuple[str, int, Header]) -> Anchors:
    anchors = Anchors()
    for task, number, head in shown:
        anchors = anchors.shown(task, number, [head])
    return anchors


turns = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3), st.integers(0, 2)), max_size=12)


@given(turns, st.randoms(use_true_random=False))
def test_an_honest_device_is_never_accused_in_whatever_order_its_tasks_headers_come(turns, order):
    """A ticket adds an entry before its contribution does; a task's rounds come in order, tasks overtake each other."""
    entries, number, by_task = 0, 0, {task: [] for task in "abc"}
    for task, grown, skipped in turns:
        # Contributions of different tasks may be made at the same head: both draws came before.
        last = by_task[task][-1][2].ledger.entries if by_task[task] else 0
        entries, number = max(entries + grown, last + 1), number + 1 + skipped
        by_task[task].append((task, number, header(entries)))
    anchors = Anchors()
    while any(by_task.values()):
        task, number, head = by_task[order.choice([task for task in "abc" if by_task[task]])].pop(0)
        anchors.check(task, number, head)
        anchors = anchors.shown(task, number, [head])
        anchors.check(task, number, head)  # the same one again
        assert anchors.shown(task, number, [head]) == anchors
    assert anchors.forked == frozenset()


@given(st.integers(0, 20), st.integers(0, 20), st.integers(1, 5), st.booleans())
def test_a_later_round_of_a_task_without_a_longer_ledger_is_a_rollback(before, now, later, same_entries):
    anchors = seen(("a", 7, header(before)))
    head = header(now, "honest" if same_entries else "forgot")
    after = anchors.shown("a", 7 + later, [head])
    if now > before:
        anchors.check("a", 7 + later, head)
        assert after.newest[KEY]["a"] == Anchored(7 + later, head.ledger)
    else:
        with pytest.raises(PeerError, match=r"header of sender 3: .*: it was rolled back or its device cloned"):
            anchors.check("a", 7 + later, head)
        assert after == Anchors(anchors.newest, frozenset({KEY}))


def test_two_entries_at_one_place_are_a_fork_in_any_task_and_round():
    anchors = seen(("a", 7, header(5)), ("b", 2, header(9)))
    for task, number in (("a", 6), ("a", 8), ("b", 1), ("b", 3), ("c", 0)):
        for entries in (5, 9):
            with pytest.raises(PeerError, match=f"entry {entries} of its ledger is another one"):
                anchors.check(task, number, header(entries, "forked"))
    anchors.check("c", 0, header(7))  # between tasks a shorter one may have been made before


def test_an_older_round_shown_late_does_not_replace_the_newest():
    anchors = seen(("a", 7, header(5)))
    assert anchors.shown("a", 6, [header(4)]) == anchors


def test_a_device_that_forked_stays_out_and_takes_nobody_with_it():
    anchors = seen(("a", 1, header(5)), ("a", 1, header(5, key=OTHER)), ("a", 2, header(3)))
    assert anchors.forked == {KEY}
    with pytest.raises(PeerError, match="as an earlier header showed"):
        anchors.check("b", 9, header(1_000))
    assert anchors.shown("b", 9, [header(1_000)]) == anchors
    anchors.check("a", 2, header(6, key=OTHER))


def test_at_most_one_head_is_kept_for_each_device_and_task():
    anchors = seen(*[(task, number, header(10 * number, key=key))
                     for number in range(9) for task in "ab" for key in (KEY, OTHER)])  # fmt: skip
    assert {key: set(heads) for key, heads in anchors.newest.items()} == {KEY: {"a", "b"}, OTHER: {"a", "b"}}


def test_heads_of_one_delivery_are_compared_with_each_other():
    assert Anchors().shown("a", 1, [header(5), header(5, "forked")]).forked == {KEY}
