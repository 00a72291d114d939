"""A device that is killed, for real, at every point where something becomes durable or leaves; then started again.

Run by test_device_kills.py in a process of its own, because it forks: `python kill_points.py DIRECTORY`. For each point
it prints one JSON object: what the device sent before and after, and what its ledger says.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from scripted import World  # noqa: E402

import edge_sdk.training.onnx  # noqa: E402, F401  (once, not in every child)
from edge_sdk.checkup import ledger_summary  # noqa: E402
from edge_sdk.crypto.hashing import content_hash  # noqa: E402
from edge_sdk.protocol.messages import encode  # noqa: E402
from edge_sdk.store import Store  # noqa: E402
from edge_sdk.transport.wire import Upload, decode_up  # noqa: E402


class Reaper:
    """Kills this process before or after the `at`th durable or outgoing thing. Points are numbered from 1."""

    def __init__(self, at: int | None) -> None:
        self.at, self.passed = at, 0

    def point(self) -> None:
        self.passed += 1
        if self.passed == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, call: Callable) -> Callable:
        def wrapped(*given):
            self.point()
            result = call(*given)
            self.point()
            return result

        return wrapped


def live(directory: Path, log: Path, at: int | None) -> int:
    """One life of the device, up to point `at`. Returns how many points there were."""
    reaper = Reaper(at)
    world = World(directory)
    path = directory / "device0"
    if not path.exists():
        world.directory()
    world.ticket()
    os.fsync = reaper.around(os.fsync)  # store, ledger and downloads all use it
    Store._commit = reaper.around(Store._commit)
    sink = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def before_send(frame: bytes) -> None:
        reaper.point()
        sent = decode_up(frame)
        if isinstance(sent, Upload):
            # Written when it leaves: whoever has it could have read it.
            os.write(sink, (content_hash(encode(sent.header)).hex() + sent.blob.id.hex() + "\n").encode())

    world.before_send = before_send
    report = world.device(path).run_once(120)
    assert report.reason == "done", report
    return reaper.passed


def in_child(call: Callable[[], int]) -> tuple[int, int]:
    """(signal or 0, the number that it gave)."""
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.write(writable, str(call()).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writable)
    with os.fdopen(readable) as pipe:
        number = pipe.read()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status), 0
    assert os.WEXITSTATUS(status) == 0
    return 0, int(number)


def main(base: Path) -> None:
    whole = base / "whole"
    whole.mkdir()
    _, points = in_child(lambda: live(whole, whole / "log", None))
    for at in range(1, points + 1):
        directory = base / str(at)
        directory.mkdir()
        first, second = directory / "first", directory / "second"
        killed, _ = in_child(lambda d=directory, log=first, at=at: live(d, log, at))
        in_child(lambda d=directory, log=second: live(d, log, None))
        lifetime = ledger_summary(directory / "device0").lifetime
        print(  # noqa: T201
            json.dumps(
                {
                    "at": at,
                    "of": points,
                    "killed": killed,
                    "before": first.read_text().split() if first.exists() else [],
                    "after": second.read_text().split() if second.exists() else [],
                    "entered": lifetime.rounds_entered,
                    "sent": lifetime.rounds_sent,
                    "outbox": len(list((directory / "device0" / "outbox").iterdir())),
                }
            )
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
