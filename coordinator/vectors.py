"""A round's uploads on disk, and the running sums beside them (docs/services.md section 5)."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from coordinator.errors import StoreError
from edge_sdk.crypto.hashing import content_hash
from edge_sdk.errors import ParameterError
from edge_sdk.files import sync_directory, write_at, write_whole

RESERVE_BYTES = 16 << 20
"""By how much a round's file of vectors grows at once."""


@dataclass
class Vectors:
    """The uploads of one round in slots of one size, in the order in which they were taken, and their running sums.

    A slot counts when a row names it; what a crash left in a slot that no row names is written over.
    """

    directory: Path
    slots: int
    slot_bytes: int
    writer: Executor
    """One thread: while it writes an upload, the next ones are read and checked."""

    def __post_init__(self) -> None:
        fresh = not self.path.exists()
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._last: Future[None] | None = None
        self._failed: OSError | None = None
        self._reserved = os.fstat(self._fd).st_size
        if fresh:
            os.fsync(self._fd)
            sync_directory(self.directory)

    @property
    def path(self) -> Path:
        return self.directory / "vectors"

    def write(self, slot: int, data: bytes | memoryview) -> Callable[[], bool]:
        """Begin to write one upload. It is not on disk before `sync`, which says if it cannot be written.

        Returns a call that says whether `data`, which must stay as it is until then, is needed no more.
        Raises ParameterError on another slot or size.
        """
        if not 0 <= slot < self.slots or len(data) != self.slot_bytes:
            raise ParameterError(f"slot {slot} of {self.slots}, {len(data)} bytes of {self.slot_bytes}")
        self._last = self.writer.submit(self._write, slot * self.slot_bytes, data)
        return self._last.done

    def _write(self, offset: int, data: bytes | memoryview) -> None:
        try:
            self._reserve(offset + self.slot_bytes)
            write_at(self._fd, data, offset)
            if hasattr(os, "posix_fadvise"):
                # Linux begins to write the range out, so that `sync` finds most of a batch on disk: three quarters of
                # an upload's waiting. Only advice: what counts is `sync`.
                os.posix_fadvise(self._fd, offset, self.slot_bytes, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            self._failed = self._failed or error

    def _reserve(self, end: int) -> None:
        """Have the file system allocate a stretch at once rather than page by page: half of what a write takes."""
        if end <= self._reserved:
            return
        first, most = self._reserved, self.slots * self.slot_bytes
        self._reserved = min(max(end, first + RESERVE_BYTES), most)
        if hasattr(os, "posix_fallocate"):
            with suppress(OSError):  # whether there is room for this upload, its own write says
                os.posix_fallocate(self._fd, first, self._reserved - first)

    def sync(self) -> None:
        """Everything written is on disk: one flush for all of it. Raises OSError if something is not."""
        if self._last is not None:
            self._settle()
            os.fdatasync(self._fd)
            self._last = None

    def _settle(self) -> None:
        """Every write has been made: they are made in order, so it is the last one that is waited for."""
        if (last := self._last) is not None:
            last.result()
        if self._failed is not None:
            raise self._failed

    def read(self, slot: int, start: int = 0, length: int | None = None) -> bytes:
        """`length` bytes of a slot from `start`, or all of it. Raises StoreError if the file is too short."""
        self._settle()
        wanted = self.slot_bytes - start if length is None else length
        data = os.pread(self._fd, wanted, slot * self.slot_bytes + start)
        if len(data) != wanted:
            raise StoreError(f"{self.path} ends before slot {slot} does")
        return data

    def save_sums(self, slots: int, sums: bytes) -> bytes:
        """The running sums of the first `slots` uploads, flushed. Returns the hash for the row that names it.

        The older checkpoint stays until `drop_sums`: the row still names it.
        """
        write_whole(self.directory / f"sums-{slots}", sums)
        return content_hash(sums)

    def load_sums(self, slots: int, expected: bytes) -> bytes | None:
        """What `save_sums` stored, or None if it is not there or damaged: then it is summed anew."""
        try:
            data = (self.directory / f"sums-{slots}").read_bytes()
        except FileNotFoundError:
            return None
        return data if content_hash(data) == expected else None

    def drop_sums(self, but: int) -> None:
        """Delete checkpoints but this one."""
        for path in self.directory.glob("sums-*"):
            if path.name != f"sums-{but}":
                path.unlink(missing_ok=True)

    def close(self) -> None:
        if self._fd >= 0:
            if self._last is not None:
                self._last.result()
            os.close(self._fd)
            self._fd = -1
