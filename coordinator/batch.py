"""What a step of the server changes, from the moment it is decided until it is on disk.

Memory changes at once. What has to be written, said or done for it is collected here, and one `commit` writes it in the
only order that a kill may interrupt anywhere: vectors, then rows in one transaction, then whatever rests on these rows.
Why so: docs/decisions/0010-one-loop-one-transaction.md.
"""

from __future__ import annotations

from collections.abc import Callable

from coordinator.events import Event
from coordinator.live import LiveRound
from coordinator.rows import ContributionRow, Transaction
from coordinator.store import Store

Effect = Callable[[Transaction], None]


class Batch:
    """Collects changes; `commit` makes them count. If it raises, memory is ahead of the disk: the server has to end."""

    def __init__(self, store: Store, on_event: Callable[[Event], None], passed: Callable[[str], None]) -> None:
        """on_event: told what was said, once it is on disk.  passed: called at each point of the order, by name."""
        self._store, self._on_event, self._passed = store, on_event, passed
        self._taken: dict[bytes, tuple[LiveRound, list[ContributionRow]]] = {}
        self._effects: list[Effect] = []
        self._after: list[Callable[[], None]] = []

    def take(self, live: LiveRound, row: ContributionRow) -> None:
        """A contribution that has its slot: the round's vectors are flushed before its row is written."""
        self._passed("vector written")
        self._taken.setdefault(live.tid, (live, []))[1].append(row)

    def write(self, effect: Effect) -> None:
        """Rows. Effects are written in the order in which they came, and after all contributions that were taken."""
        self._effects.append(effect)

    def follow(self, act: Callable[[], None]) -> None:
        """What is done once the rows are written, before answers leave."""
        self._after.append(act)

    def say(self, event: Event) -> None:
        """Tell whoever watches, in turn with what else follows."""
        self._after.append(lambda: self._on_event(event))

    def commit(self) -> None:
        """Write everything, then do what follows. What is collected meanwhile is the next batch."""
        taken, effects, after = self._taken, self._effects, self._after
        self._taken, self._effects, self._after = {}, [], []
        first: list[Effect] = []  # a round may have ended since it took them, and takes its rows with it
        for tid, (live, contributions) in taken.items():
            live.vectors.sync()
            self._passed("vectors synced")
            first.append(_adding(tid, contributions))
            if live.wants_checkpoint():
                slots, name = live.save()
                self._passed("sums saved")
                first.append(_checkpointing(tid, slots, name))
                after.append(lambda live=live, slots=slots: live.vectors.drop_sums(but=slots))  # type: ignore[misc]
        if first or effects:
            with self._store.transaction() as t:
                for effect in (*first, *effects):
                    effect(t)
                self._passed("before commit")
            self._passed("committed")
        for act in after:
            act()


def _adding(tid: bytes, contributions: list[ContributionRow]) -> Effect:
    return lambda t: t.add_contributions(tid, contributions)


def _checkpointing(tid: bytes, slots: int, name: bytes) -> Effect:
    return lambda t: t.set_checkpoint(tid, slots, name)
