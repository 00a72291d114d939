"""What a device tells whoever runs it."""

import pytest

from edge_sdk import events
from edge_sdk.clock import Clock
from edge_sdk.reporting import MAX_SAID, Reporting


class Disk:
    """A store of outcomes, full or not."""

    def __init__(self):
        self.kept, self.full = [], False

    def save_outcome(self, outcome):
        if self.full:
            raise OSError("no space left on device")
        self.kept.append(outcome)


@pytest.fixture
def disk():
    return Disk()


@pytest.fixture
def heard():
    return []


@pytest.fixture
def reporting(disk, heard):
    return Reporting(disk, Clock(lambda: 1700.9, lambda: 0.0), heard.append)


def test_a_warning_that_repeats_is_said_once_and_another_by_itself(reporting, heard):
    for reason in ("disk: full", "disk: full", "dropped: garbage", "disk: full"):
        reporting.warn_once(reason)
    assert heard == [events.Warned("disk: full"), events.Warned("dropped: garbage")]
    reporting.warn("disk: full")
    assert heard[-1] == events.Warned("disk: full")


def test_warnings_that_a_peer_varies_fill_no_memory(reporting, heard):
    for number in range(MAX_SAID + 1):
        reporting.warn_once(str(number))
    assert len(heard) == MAX_SAID + 1
    reporting.warn_once("0")  # forgotten with all the others
    assert len(heard) == MAX_SAID + 2


def test_an_outcome_that_cannot_be_stored_is_warned_of_and_stops_nothing(reporting, disk, heard):
    disk.full = True
    for _ in range(2):
        reporting.outcome("keywords", 7, "refused", "its coin")
    assert heard == [events.Warned("disk: no space left on device")]
    disk.full = False
    reporting.outcome("keywords", 8, "refused", "its coin")
    assert [(outcome.round, outcome.time_s) for outcome in disk.kept] == [(8, 1700)]
