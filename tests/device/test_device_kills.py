"""A device that is killed before, in and after its send contributes once, with the same bytes, or was never heard."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path


def test_a_kill_at_any_point_leads_to_exactly_one_contribution(tmp_path):
    script = Path(__file__).with_name("kill_points.py")
    ended = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, check=False, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    lives = [json.loads(line) for line in ended.stdout.splitlines()]
    assert len(lives) == lives[0]["of"] >= 30
    for life in lives:
        assert life["killed"] == signal.SIGKILL, life
        sent = {*life["before"], *life["after"]}
        assert len(sent) == 1, life  # header and blob: what was sent again is what was sent first
        assert (life["entered"], life["sent"]) == (1, 1), life  # one coin, one charge
        assert life["outbox"] == 0, life
    # the points lie on both sides of the send, and in it
    assert any(not life["before"] for life in lives)
    assert any(life["before"] and life["after"] for life in lives)
    assert any(life["before"] and not life["after"] for life in lives)
