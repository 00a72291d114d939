"""The order in which a batch becomes true, whatever the order in which it was collected."""

from contextlib import contextmanager

import pytest

from coordinator.batch import Batch
from coordinator.events import TaskDone
from coordinator.rows import ContributionRow


class Recorder:
    """A store, its transaction and a round's vectors, that say what is asked of them."""

    def __init__(self, checkpoint=False):
        self.order, self.checkpoint = [], checkpoint
        self.tid, self.vectors = b"round", self

    @contextmanager
    def transaction(self):
        self.order.append("begin")
        yield self
        self.order.append("end")

    def add_contributions(self, tid, rows):
        self.order.append(("contributions", tid, [row.slot for row in rows]))

    def set_checkpoint(self, tid, slots, name):
        self.order.append(("checkpoint", tid, slots, name))

    def sync(self):
        self.order.append("sync")

    def wants_checkpoint(self):
        return self.checkpoint

    def save(self):
        return 2, b"sums"

    def drop_sums(self, but):
        self.order.append(("drop sums", but))


def contribution(slot):
    return ContributionRow(slot, slot, b"digest", b"header")


def batch_on(recorder):
    return Batch(recorder, recorder.order.append, recorder.order.append)


def test_vectors_are_flushed_before_the_transaction_and_what_follows_comes_after_it():
    recorder = Recorder(checkpoint=True)
    batch = batch_on(recorder)
    batch.say(TaskDone("tiny"))
    batch.write(lambda t: recorder.order.append("an effect"))
    batch.follow(lambda: recorder.order.append("an act"))
    batch.take(recorder, contribution(0))
    batch.take(recorder, contribution(1))
    assert recorder.order == ["vector written"] * 2
    batch.commit()
    assert recorder.order[2:] == [
        "sync", "vectors synced", "sums saved",
        "begin", ("contributions", b"round", [0, 1]), ("checkpoint", b"round", 2, b"sums"), "an effect",
        "before commit", "end", "committed",
        TaskDone("tiny"), "an act", ("drop sums", 2),
    ]  # fmt: skip


def test_the_end_of_a_round_takes_the_checkpoint_of_the_same_step_with_it():
    recorder = Recorder(checkpoint=True)
    batch = batch_on(recorder)
    batch.take(recorder, contribution(0))
    batch.write(lambda t: recorder.order.append("the round ended"))
    batch.commit()
    named = [entry for entry in recorder.order if entry == "the round ended" or entry[0] == "checkpoint"]
    assert named == [("checkpoint", b"round", 2, b"sums"), "the round ended"]


def test_a_batch_is_written_once_and_an_empty_one_takes_no_transaction():
    recorder = Recorder()
    batch = batch_on(recorder)
    batch.write(lambda t: recorder.order.append("an effect"))
    batch.commit()
    recorder.order.clear()
    batch.follow(lambda: recorder.order.append("an act"))
    batch.commit()
    batch.commit()
    assert recorder.order == ["an act"]


def test_what_follows_may_give_cause_for_the_next_batch():
    recorder = Recorder()
    batch = batch_on(recorder)
    batch.follow(lambda: batch.write(lambda t: recorder.order.append("an effect")))
    batch.commit()
    assert recorder.order == []
    batch.commit()
    assert "an effect" in recorder.order


def test_of_a_transaction_that_fails_nothing_follows():
    recorder = Recorder()
    batch = batch_on(recorder)

    def fail(t):
        raise OSError("the disk is full")

    batch.write(fail)
    batch.say(TaskDone("tiny"))
    with pytest.raises(OSError, match="full"):
        batch.commit()
    assert recorder.order == ["begin"]
