"""Files that a power cut leaves whole, and locks between processes. What was written is durable when a call returns.

A file is written under another name in the same directory (its own and ".new"), flushed, and given its name in one
step; then the directory is flushed, without which the name itself may be lost. What a cut leaves under the other name
is removed by the next try. One process at a time writes a path.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import suppress
from pathlib import Path

from edge_sdk.errors import ParameterError

Data = bytes | memoryview

SPARE_DISK_BYTES = 16 << 20
"""Left free by whatever writes much: ledger and state must still be written."""


def has_room(directory: Path, size: int) -> bool:
    """Whether so many bytes more in the directory leave `SPARE_DISK_BYTES` free. Raises OSError."""
    return shutil.disk_usage(directory).free >= size + SPARE_DISK_BYTES


def write_whole(path: Path, *parts: Data, mode: int = 0o600) -> None:
    """Make or replace the file: whoever reads it, also after a power cut, sees the old or the new one, whole.

    parts: its content, one after the other.  mode: of the new file, less the umask.
    Raises OSError; then the old file is as it was.
    """
    fresh = _written(path, parts, mode)
    try:
        os.replace(fresh, path)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_once(path: Path, *parts: Data, mode: int = 0o600) -> bool:
    """Make the file, unless there is one: a key or a ledger is never replaced. Returns whether it was made.

    Arguments and errors as `write_whole`.
    """
    if path.exists():
        with suppress(OSError):  # none, or a file system that is read-only
            _fresh(path).unlink()  # of a try that was cut short: a second name of a key
        return False
    fresh = _written(path, parts, mode)
    try:
        os.link(fresh, path)  # unlike a rename, this never replaces a file
    except FileExistsError:
        return False
    finally:
        fresh.unlink()
    sync_directory(path.parent)
    return True


def sync_directory(path: Path) -> None:
    """What was made, renamed or removed in the directory is on disk. Raises OSError."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_all(file: int, data: Data) -> None:
    """Every byte, at the descriptor's position: one `write` may take less. Raises OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def write_at(file: int, data: Data, offset: int) -> None:
    """As `write_all`, at `offset`."""
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written


def open_locked(path: Path, flags: int, busy: str) -> int:
    """A descriptor of the file or directory that no other process has locked; closing it gives the lock back.

    flags: of `os.open`; what O_CREAT makes is its owner's alone.  busy: what the error says.
    Raises ParameterError with `busy` if another process has it, OSError.
    """
    file = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException as error:
        os.close(file)
        if isinstance(error, BlockingIOError):
            raise ParameterError(busy) from error
        raise
    return file


def read_text(path: Path) -> str:
    """The text of a file that people write, without the byte order mark that some editors put in front.

    Raises OSError, and ParameterError if it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ParameterError(f"not UTF-8 (byte {error.start}): save it as UTF-8 in the editor") from error


def reason(error: Exception) -> str:
    """What went wrong, for a message that names the file already: an OSError's own text repeats its path."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _fresh(path: Path) -> Path:
    return path.with_name(path.name + ".new")


def _written(path: Path, parts: tuple[Data, ...], mode: int) -> Path:
    fresh = _fresh(path)
    fresh.unlink(missing_ok=True)  # of a try that was cut short; its mode may be another
    file = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        try:
            for part in parts:
                write_all(file, part)
            os.fsync(file)
        finally:
            os.close(file)
    except BaseException:
        fresh.unlink(missing_ok=True)  # on a full disk the half of a file is in everybody's way
        raise
    return fresh
