"""What devices may fetch now: files of the store, and what is too long for a frame (docs/services.md section 3).

Who knows a blob's id may fetch it, so nothing is kept here longer than somebody may need it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from edge_sdk.transport.chunks import Blob
from edge_sdk.transport.wire import INLINE_BYTES, BlobRef, Parcel


class Shelf:
    """Blobs by id. A file is on it by its content hash, a long message on behalf of its owner: a round or an epoch."""

    def __init__(self, path_of: Callable[[bytes], Path]) -> None:
        """path_of: content hash -> the store's file."""
        self._path_of = path_of
        self._files: dict[bytes, Blob] = {}
        self._messages: dict[bytes, bytes] = {}
        """Owner -> id of its blob."""
        self._blobs: dict[bytes, Blob] = {}

    def keep(self, files: Iterable[bytes], owners: Collection[bytes]) -> None:
        """These files, by content hash, are on the shelf from now on, and messages of these owners; nothing else.

        Raises OSError if a file cannot be read.
        """
        wanted = dict.fromkeys(files)
        for name in set(self._files) - set(wanted):
            blob = self._files.pop(name)
            self._blobs.pop(blob.ref.id, None)
        for name in wanted:
            if name not in self._files:
                blob = self._files[name] = Blob.from_file(self._path_of(name))
                self._blobs[blob.ref.id] = blob
        for owner in set(self._messages) - set(owners):
            self._blobs.pop(self._messages.pop(owner), None)

    def file(self, name: bytes) -> BlobRef:
        """What a device asks for to get this file. It was among those that are kept."""
        return self._files[name].ref

    def parcel(self, owner: bytes, message: bytes, *, inline: bool = True) -> Parcel:
        """The message itself if it fits a frame and may be `inline`, else it is put on the shelf to be fetched.

        An owner has one message: it is hashed once, though every welcome names it.
        """
        if inline and len(message) <= INLINE_BYTES:
            return message
        if owner not in self._messages:
            blob = Blob.of(message)
            self._blobs[blob.ref.id] = blob
            self._messages[owner] = blob.ref.id
        return self._blobs[self._messages[owner]].ref

    def find(self, blob: bytes) -> Blob | None:
        """By its id."""
        return self._blobs.get(blob)

    def close(self) -> None:
        """Close the files."""
        for blob in self._files.values():
            blob.close()
