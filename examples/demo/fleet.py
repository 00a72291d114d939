"""Processes: started, watched, killed and started again. What they say on stdout is JSON, one object a line."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Line = dict[str, Any]


@dataclass(frozen=True)
class Said:
    """A line of a process, or its end. who: the process's name."""

    who: str
    line: Line | None


@dataclass
class Process:
    """One command that is kept in its own directory, with its log beside it."""

    name: str
    command: Sequence[str]
    log: Path
    said: queue.Queue[Said] = field(repr=False)
    child: subprocess.Popen[str] | None = field(default=None, repr=False)

    def start(self) -> None:
        """Start it, or start it again after it ended."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # 20 devices share a machine
        with self.log.open("ab") as log:
            child = subprocess.Popen(  # noqa: S603  # our own commands
                [sys.executable, "-m", *self.command],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True, env=environment,
            )  # fmt: skip
        self.child = child
        threading.Thread(target=self._listen, args=(child,), daemon=True).start()

    @property
    def ended(self) -> bool:
        """Whether the child that was started last is not running."""
        return self.child is None or self.child.poll() is not None

    def kill(self) -> None:
        """Pull the plug: SIGKILL."""
        self._end(signal.SIGKILL)

    def stop(self, patience_s: float = 10.0) -> None:
        """Ask it to end, and end it if it does not."""
        self._end(signal.SIGTERM, patience_s)

    def _end(self, how: signal.Signals, patience_s: float = 10.0) -> None:
        if self.child is None or self.child.poll() is not None:
            return
        self.child.send_signal(how)
        try:
            self.child.wait(patience_s)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()

    def _listen(self, child: subprocess.Popen[str]) -> None:
        assert child.stdout is not None  # noqa: S101  # asked for above
        with child.stdout:
            for text in child.stdout:
                try:
                    line = json.loads(text)
                except ValueError:
                    continue  # the last line of a process that was killed
                self.said.put(Said(self.name, line))
        self.said.put(Said(self.name, None))


def call(*command: str) -> list[Line]:
    """Run a command to its end and give what it said. Raises RuntimeError with its last words if it failed."""
    done = subprocess.run(  # noqa: S603  # our own commands
        [sys.executable, "-m", *command], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:2])} failed: {done.stderr.strip().splitlines()[-1:] or done.stdout}")
    return [json.loads(text) for text in done.stdout.splitlines()]
