"""Blobs that a device pulls: large ones into files that outlive a restart, messages into memory, both within bounds."""

from __future__ import annotations

import errno
import math
from collections.abc import Callable, Collection
from pathlib import Path

from edge_sdk.errors import PeerError
from edge_sdk.files import has_room
from edge_sdk.transport.chunks import RETRY_S, Download, FileDownload
from edge_sdk.transport.wire import BlobRef, Chunk, Pull

MAX_MEMORY_BYTES = 24 << 20
"""Of all downloads into memory together: two of the longest messages may be under way."""


class Fetches:
    """The downloads of one link. Asking again for what is under way is free, so callers ask until it is there."""

    def __init__(self, directory: Path, max_file_bytes: int, jitter: Callable[[], float]) -> None:
        """directory: for the files, made if it is missing.  jitter: numbers evenly from [0, 1)."""
        directory.mkdir(mode=0o700, exist_ok=True)
        self._directory, self._max_file_bytes, self._jitter = directory, max_file_bytes, jitter
        self._files: dict[bytes, FileDownload] = {}
        self._memory: dict[bytes, Download] = {}
        self._here: dict[bytes, Path] = {}
        self._gone: set[bytes] = set()

    @property
    def active(self) -> bool:
        """Whether anything is under way."""
        return bool(self._files) or any(not download.complete for download in self._memory.values())

    def path_of(self, ref: BlobRef) -> Path:
        """Where the blob lies when it is here."""
        return self._directory / ref.id.hex()

    def file(self, ref: BlobRef) -> Path | None:
        """The blob's file, whole and checked, or None while it is under way.

        Raises PeerError if it is too large or the coordinator does not have it, OSError from the disk.
        """
        if ref.id in self._here:
            return self._here[ref.id]
        self._check(ref, self._max_file_bytes)
        download = self._files.get(ref.id)
        if download is None:
            missing = self.missing_bytes(ref)
            to_come = sum(other.ref.size - other.received_bytes for other in self._files.values())
            if missing and not has_room(self._directory, to_come + missing):
                raise OSError(errno.ENOSPC, f"no room for a download of {ref.size} bytes")
            download = FileDownload(ref, self.path_of(ref), retry_s=self._retry_s())
            self._files[ref.id] = download
        return self._finished(download)

    def missing_bytes(self, ref: BlobRef) -> int:
        """What of the blob's file is not on disk yet, as far as it can be told without reading it."""
        download = self._files.get(ref.id)
        if download is not None:
            return ref.size - download.received_bytes
        try:
            return 0 if self.path_of(ref).stat().st_size == ref.size else ref.size
        except FileNotFoundError:
            return ref.size

    def content(self, ref: BlobRef, max_bytes: int) -> bytes | None:
        """The blob's bytes, or None while it is under way. `forget` it when it is used.

        Raises PeerError as `file`, and if too much is under way already.
        """
        download = self._memory.get(ref.id)
        if download is None:
            self._check(ref, max_bytes)
            held = sum(other.ref.size for other in self._memory.values())
            if held + ref.size > MAX_MEMORY_BYTES:
                raise PeerError(f"blob of {ref.size} bytes: {held} bytes of others are under way")
            download = self._memory[ref.id] = Download(ref, retry_s=self._retry_s())
        return download.data() if download.complete else None

    def add(self, chunk: Chunk, now_s: float) -> bool:
        """Take a chunk. Returns whether a blob is whole now. Raises PeerError if it is not of the blob; others' are
        ignored."""
        file, memory = self._files.get(chunk.blob), self._memory.get(chunk.blob)
        if file is not None:
            file.add(chunk, now_s)
            return self._finished(file) is not None
        return memory is not None and not memory.complete and memory.add(chunk, now_s) and memory.complete

    def gone(self, blob: bytes) -> bool:
        """The coordinator does not have this blob: stop asking until `ask_again`. Returns whether it was wanted."""
        file, memory = self._files.pop(blob, None), self._memory.pop(blob, None)
        if file is not None:
            file.close()
        if file is None and memory is None:
            return False
        self._gone.add(blob)
        return True

    def forget(self, ref: BlobRef) -> None:
        """Nobody needs these bytes any more."""
        self._memory.pop(ref.id, None)

    def keep(self, files: Collection[bytes], names: Collection[str]) -> None:
        """Stop file downloads of other blobs than `files`, and remove every file that is neither theirs nor in `names`.

        names: of files, as `path_of` gives them.
        """
        for blob in self._files.keys() - set(files):
            self._files.pop(blob).close()
        wanted = {blob.hex() for blob in files} | set(names)
        for path in self._directory.iterdir():
            if path.name.split(".")[0] not in wanted:
                path.unlink(missing_ok=True)
        self._here = {blob: path for blob, path in self._here.items() if blob.hex() in wanted}

    def ask_again(self) -> None:
        """After a reconnect: what was under way is lost, and what was gone may be there."""
        self._gone.clear()
        for download in (*self._files.values(), *self._memory.values()):
            download.ask_again()

    def pulls(self, now_s: float) -> list[Pull]:
        """What to ask for now."""
        asked = (download.pull(now_s) for download in (*self._files.values(), *self._memory.values()))
        return [pull for pull in asked if pull is not None]

    @property
    def due_s(self) -> float:
        """When `pulls` next has something; infinity if never."""
        return min((d.due_s for d in (*self._files.values(), *self._memory.values())), default=math.inf)

    def close(self) -> None:
        """What came is kept for the next start."""
        for download in self._files.values():
            download.close()
        self._files.clear()

    def _finished(self, download: FileDownload) -> Path | None:
        if not download.complete:
            return None
        self._files.pop(download.ref.id).close()
        self._here[download.ref.id] = download.path
        return download.path

    def _check(self, ref: BlobRef, max_bytes: int) -> None:
        if ref.id in self._gone:
            raise PeerError(f"blob {ref.id.hex()[:16]}: the coordinator names it but does not have it")
        if ref.size > max_bytes:
            raise PeerError(f"blob {ref.id.hex()[:16]}: {ref.size} bytes, this device takes {max_bytes}")

    def _retry_s(self) -> float:
        return RETRY_S * (0.75 + 0.5 * self._jitter())
