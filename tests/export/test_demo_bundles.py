"""The demo's checked-in bundles are what their sources make, whatever the processor's vector instructions are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("instructions", ["AUTO", "COMPATIBLE"])
def test_the_checked_in_bundles_are_what_the_sources_make(instructions: str) -> None:
    # MKL is what differs from one processor to the next: COMPATIBLE is the slowest path, AUTO this processor's.
    command = [sys.executable, "-m", "examples.demo.make_bundle", "--check"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "MKL_CBWR": instructions},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
