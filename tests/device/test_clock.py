"""When something is said again: within bounds of its delays, never sooner than an answer deserves."""

import pytest

from edge_sdk.clock import Repeat


def delays(repeat, count):
    """Seconds between sayings, if each is said exactly when it is due."""
    found, now_s = [], 1000.0
    for _ in range(count):
        repeat.said(now_s)
        found.append(repeat.due_s - now_s)
        now_s = repeat.due_s
    return found


def test_the_first_time_is_at_once():
    assert Repeat(3.0, 60.0, lambda: 0.5).due_s == 0.0


@pytest.mark.parametrize(("jitter", "spread"), [(0.0, 0.75), (0.5, 1.0), (1.0, 1.25)])
def test_delays_double_up_to_the_longest_and_are_spread_by_a_quarter(jitter, spread):
    expected = [3.0, 6.0, 12.0, 24.0, 48.0, 60.0, 60.0]
    assert delays(Repeat(3.0, 60.0, lambda: jitter), 7) == pytest.approx([delay * spread for delay in expected])


def test_delays_stay_the_longest_however_often_it_was_said():
    assert delays(Repeat(3.0, 60.0, lambda: 0.5), 2000)[-1] == 60.0


def test_progress_waits_the_first_delay_and_a_restart_not_at_all():
    repeat = Repeat(3.0, 60.0, lambda: 0.5)
    delays(repeat, 5)
    repeat.progress(2000.0)
    assert repeat.due_s == 2003.0
    repeat.restart()
    assert repeat.due_s == 0.0
    assert delays(repeat, 1) == [3.0]
