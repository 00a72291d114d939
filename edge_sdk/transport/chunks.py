"""Blobs: byte strings too large for one frame, cut into chunks that the receiver pulls (docs/services.md section 3).

A blob's id is a hash over its size and the Merkle root of its chunks. Each chunk comes with its inclusion proof, so it
is checked by itself: it may come from any connection, in any order, twice, or after a restart. The receiver decides
what it asks for and when; the sender only answers. No clock and no network here: time is an argument, in seconds of
any clock that does not go backwards.
"""

from __future__ import annotations

import math
import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import overload

from edge_sdk.crypto.hashing import HASH_BYTES, tagged_hash
from edge_sdk.crypto.merkle import MerkleTree, root_of
from edge_sdk.errors import ParameterError, PeerError
from edge_sdk.files import sync_directory, write_at
from edge_sdk.transport.wire import CHUNK_BYTES, INLINE_BYTES, MAX_BLOB_BYTES, MAX_PULL, BlobRef, Chunk, Parcel, Pull

RETRY_S = 5.0
"""What did not come is asked for again after this long without a new chunk; doubled each time that nothing came."""
MAX_RETRY_S = 120.0


def _id_of(size: int, root: bytes) -> bytes:
    return tagged_hash("blob", size.to_bytes(8, "little"), root)


def chunk_count(size: int) -> int:
    """Chunks of a blob of `size` bytes."""
    return -(-size // CHUNK_BYTES)


def _length_of(size: int, index: int) -> int:
    return min(CHUNK_BYTES, size - index * CHUNK_BYTES)


class _Pieces(Sequence[bytes]):
    """The chunks of something that is read by place, one at a time."""

    def __init__(self, size: int) -> None:
        if not 1 <= size <= MAX_BLOB_BYTES:
            raise ParameterError(f"a blob has 1 to {MAX_BLOB_BYTES} bytes, not {size}")
        self.size = size

    def __len__(self) -> int:
        return chunk_count(self.size)

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[bytes]: ...
    def __getitem__(self, index: int | slice) -> bytes | Sequence[bytes]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.read(index * CHUNK_BYTES, _length_of(self.size, index))

    def read(self, offset: int, length: int) -> bytes:
        raise NotImplementedError


class _InMemory(_Pieces):
    def __init__(self, data: bytes) -> None:
        super().__init__(len(data))
        self._data = data

    def read(self, offset: int, length: int) -> bytes:
        return self._data[offset : offset + length]


class _InFile(_Pieces):
    def __init__(self, path: Path) -> None:
        # Held open, so that a file that is replaced or deleted is still served as it was.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.close = weakref.finalize(self, os.close, fd)
        self._fd = fd
        try:
            super().__init__(os.fstat(fd).st_size)
        except ParameterError:
            self.close()
            raise

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self._fd, length, offset)


class Blob:
    """The sender's side: a blob that can give any of its chunks."""

    def __init__(self, pieces: _Pieces) -> None:
        self._pieces = pieces
        self._tree = MerkleTree(pieces)
        self.ref = BlobRef(id=_id_of(pieces.size, self._tree.root), size=pieces.size)

    @classmethod
    def of(cls, data: bytes) -> Blob:
        """Raises ParameterError if `data` is empty or longer than MAX_BLOB_BYTES."""
        return cls(_InMemory(data))

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Blob:
        """The file is read once here, to hash it, then chunk by chunk; in memory are 64 bytes per chunk.

        It is held open until `close` or until the blob is forgotten, and must not be written to meanwhile.
        Raises OSError, and ParameterError as `of` does.
        """
        return cls(_InFile(Path(path)))

    def chunk(self, index: int) -> Chunk:
        """The chunk with its proof. Raises ParameterError outside the blob, or if the file has changed."""
        if not 0 <= index < len(self._pieces):
            raise ParameterError(f"chunk {index} is outside a blob of {len(self._pieces)}")
        data = memoryview(self._pieces[index])
        chunk = Chunk(blob=self.ref.id, index=index, data=data, proof=list(self._tree.proof(index)))
        if isinstance(self._pieces, _InFile):
            try:
                check_chunk(self.ref, chunk)
            except PeerError as error:
                raise ParameterError(f"the file of a blob has changed since it was hashed: {error}") from error
        return chunk

    def close(self) -> None:
        """Close the file, if there is one. Closing twice is harmless."""
        if isinstance(self._pieces, _InFile):
            self._pieces.close()


def blob_id(data: bytes) -> bytes:
    """The 32-byte name of `data` as a blob: tagged_hash("blob", size as 8 bytes little endian, Merkle root).

    Raises ParameterError as `Blob.of` does.
    """
    return Blob.of(data).ref.id


def parcel_of(data: bytes) -> tuple[Parcel, Blob | None]:
    """What goes into a frame for `data`: itself where it is short, else its BlobRef.

    Returns the parcel, and with a BlobRef the blob that the caller serves until nobody needs it.
    Raises ParameterError if `data` is longer than MAX_BLOB_BYTES.
    """
    if len(data) <= INLINE_BYTES:
        return data, None
    blob = Blob.of(data)
    return blob.ref, blob


def check_chunk(ref: BlobRef, chunk: Chunk) -> None:
    """Return if `chunk` is of the blob, else raise PeerError that says what is wrong with it."""
    if chunk.blob != ref.id:
        raise PeerError(f"chunk: of blob {chunk.blob.hex()[:16]}, not {ref.id.hex()[:16]}")
    count = chunk_count(ref.size)
    if not 0 <= chunk.index < count:
        raise PeerError(f"chunk: {chunk.index} is outside a blob of {count}")
    if len(chunk.data) != _length_of(ref.size, chunk.index):
        raise PeerError(
            f"chunk: {chunk.index} has {len(chunk.data)} bytes instead of {_length_of(ref.size, chunk.index)}"
        )
    if _id_of(ref.size, root_of(count, chunk.index, chunk.data, chunk.proof)) != ref.id:
        raise PeerError(f"chunk: {chunk.index} is not under the blob's root")


class Receiving(ABC):
    """The receiver's side of a blob: what to ask for and when, and what came. See `Download` and `FileDownload`.

    At most `window` chunks are under way. They are topped up when half of them came. What did not come is asked for
    again when no new chunk has come for a while: `retry_s` at first, doubled each time in vain up to MAX_RETRY_S, and
    never less than three times the longest gap between two chunks so far, so that a slow link is not made slower by
    asking twice. Each time in vain also halves the window; each new chunk widens it by one.
    """

    def __init__(self, ref: BlobRef, window: int, retry_s: float) -> None:
        """window: chunks, 1 to MAX_PULL.  retry_s: seconds, > 0; whoever has many peers adds jitter to it."""
        if not 1 <= window <= MAX_PULL:
            raise ParameterError(f"window: {window} chunks, not 1 to {MAX_PULL}")
        if not (retry_s > 0 and math.isfinite(retry_s)):
            raise ParameterError(f"retry_s: {retry_s} is not a time to wait")
        if not 1 <= ref.size <= MAX_BLOB_BYTES:
            raise ParameterError(f"a blob has 1 to {MAX_BLOB_BYTES} bytes, not {ref.size}")
        self.ref = ref
        self._count = chunk_count(ref.size)
        self._have = bytearray(self._count)
        self._missing = self._count
        self._received_bytes = 0
        self._window, self._width = window, window
        self._retry_s = retry_s
        self._asked: set[int] = set()
        self._cursor = 0
        self._vain = 0
        self._longest_gap_s = 0.0
        self._last_s = 0.0
        self._expires_s = 0.0

    @property
    def complete(self) -> bool:
        """Every chunk is there."""
        return self._missing == 0

    @property
    def received_bytes(self) -> int:
        """Bytes of the blob that are there."""
        return self._received_bytes

    @property
    def due_s(self) -> float:
        """When `pull` next has something: 0.0 for at once, infinity when complete."""
        if self.complete:
            return math.inf
        if self._wants_more():
            return 0.0
        return self._expires_s

    def pull(self, now_s: float) -> Pull | None:
        """What to ask for now, None while nothing is due. What it returns counts as asked for."""
        if self.complete:
            return None
        if self._asked and now_s >= self._expires_s:
            self._asked.clear()
            self._cursor = 0
            self._vain += 1
            self._width = max(1, self._width // 2)
        if not self._wants_more():
            return None
        if not self._asked:
            self._last_s = now_s
        chunks: list[int] = []
        while len(self._asked) < self._width and (index := self._have.find(0, self._cursor)) >= 0:
            self._cursor = index + 1
            if index not in self._asked:
                chunks.append(index)
                self._asked.add(index)
        if not chunks:
            return None
        self._expires_s = now_s + self._patience_s()
        return Pull(blob=self.ref.id, chunks=chunks)

    def ask_again(self) -> None:
        """What is under way is lost, as after a reconnect: `pull` asks for it at once."""
        self._asked.clear()
        self._cursor = 0
        self._vain = 0

    def add(self, chunk: Chunk, now_s: float) -> bool:
        """Take a chunk. Returns whether it was new; one that is there already, or was not asked for, is harmless.

        Raises PeerError if it is not of the blob; then nothing has changed.
        """
        self._check(chunk)
        if self._have[chunk.index]:
            return False
        self._keep(chunk)
        self._mark(chunk.index)
        self._asked.discard(chunk.index)
        self._longest_gap_s = max(self._longest_gap_s, now_s - self._last_s)
        self._last_s = now_s
        self._vain = 0
        self._width = min(self._window, self._width + 1)
        self._expires_s = now_s + self._patience_s()
        if self.complete:
            self._finish()
        return True

    def _check(self, chunk: Chunk) -> None:
        """Raise PeerError unless the chunk is of the blob."""
        check_chunk(self.ref, chunk)

    @abstractmethod
    def data(self) -> bytes:
        """The blob, a copy. Raises ParameterError while it is not complete."""

    @abstractmethod
    def _keep(self, chunk: Chunk) -> None: ...

    @abstractmethod
    def _finish(self) -> None: ...

    def _mark(self, index: int) -> None:
        self._have[index] = 1
        self._missing -= 1
        self._received_bytes += _length_of(self.ref.size, index)

    def _wants_more(self) -> bool:
        return len(self._asked) <= self._width // 2 and self._have.find(0, self._cursor) >= 0

    def _patience_s(self) -> float:
        delay_s: float = max(self._retry_s, 3 * self._longest_gap_s) * 2.0 ** min(self._vain, 10)
        return min(delay_s, max(MAX_RETRY_S, self._retry_s))

    def _check_complete(self) -> None:
        if not self.complete:
            raise ParameterError(f"{self._received_bytes} of the blob's {self.ref.size} bytes are there")


class Download(Receiving):
    """A blob that is received into memory: one buffer of its size, made at once. The caller bounds `ref.size`."""

    def __init__(
        self, ref: BlobRef, window: int = 8, *, retry_s: float = RETRY_S, buffer: bytearray | None = None
    ) -> None:
        """buffer: to be used in place of a new one; nothing of what is in it is given out.

        Raises ParameterError if it is not of the blob's size.
        """
        super().__init__(ref, window, retry_s)
        if buffer is not None and len(buffer) != ref.size:
            raise ParameterError(f"a buffer of {len(buffer)} bytes for a blob of {ref.size}")
        self.buffer = bytearray(ref.size) if buffer is None else buffer
        """Whoever gives it to another download has done with this one and its views."""

    def data(self) -> bytes:
        self._check_complete()
        return bytes(self.buffer)

    def view(self) -> memoryview:
        """As `data`, without the copy: read-only, over the download's own buffer."""
        self._check_complete()
        return memoryview(self.buffer).toreadonly()

    def _keep(self, chunk: Chunk) -> None:
        offset = chunk.index * CHUNK_BYTES
        with memoryview(self.buffer) as whole:  # a bytearray copies what it is assigned once more
            whole[offset : offset + len(chunk.data)] = chunk.data

    def _finish(self) -> None:
        pass


class FileDownload(Receiving):
    """A blob that is received into a file, and carried on after a restart.

    Until it is complete it lies in `path` + ".part", and the proofs of the chunks that came in `path` + ".proofs", each
    in a slot of its own. At the start every chunk that has a proof is hashed again, and counts if the proof leads
    to the blob's id: whatever a kill or a power cut left half written, or another blob left under this
    name, is asked for again. A complete blob is flushed to disk and renamed to `path`; then the proofs are removed.
    """

    def __init__(
        self, ref: BlobRef, path: str | os.PathLike[str], window: int = 8, *, retry_s: float = RETRY_S
    ) -> None:
        """Raises OSError if the files cannot be read or made; their directory must be there."""
        super().__init__(ref, window, retry_s)
        self.path = Path(path)
        self._part = self.path.with_name(self.path.name + ".part")
        self._proofs = self.path.with_name(self.path.name + ".proofs")
        self._slot_bytes = 1 + HASH_BYTES * (self._count - 1).bit_length()
        self._fds: tuple[int, int] | None = None
        if _is_blob(self.path, ref):
            for index in range(self._count):
                self._mark(index)
            self._clear()
            return
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        data = os.open(self._part, flags, 0o600)
        try:
            proofs = os.open(self._proofs, flags, 0o600)
        except OSError:
            os.close(data)
            raise
        self._fds = data, proofs
        self._closer = weakref.finalize(self, _close, data, proofs)
        os.ftruncate(data, ref.size)
        os.ftruncate(proofs, self._slot_bytes * self._count)
        for index in range(self._count):
            if self._is_there(data, proofs, index):
                self._mark(index)
        if self.complete:
            self._finish()

    def data(self) -> bytes:
        self._check_complete()
        return self.path.read_bytes()

    def close(self) -> None:
        """Stop; what came is kept for the next FileDownload of this blob and path. Closing twice is harmless."""
        if self._fds is not None:
            self._closer()
            self._fds = None

    def _keep(self, chunk: Chunk) -> None:
        if self._fds is None:
            raise ParameterError("the download was closed")
        data, proofs = self._fds
        write_at(data, chunk.data, chunk.index * CHUNK_BYTES)
        slot = bytes([1 + len(chunk.proof)]) + b"".join(chunk.proof)
        write_at(proofs, slot, chunk.index * self._slot_bytes)

    def _is_there(self, data: int, proofs: int, index: int) -> bool:
        slot = os.pread(proofs, self._slot_bytes, index * self._slot_bytes)
        if not slot or not 1 <= slot[0] <= 1 + (len(slot) - 1) // HASH_BYTES:
            return False
        ends = range(1, 1 + HASH_BYTES * (slot[0] - 1), HASH_BYTES)
        proof = [slot[at : at + HASH_BYTES] for at in ends]
        content = memoryview(os.pread(data, _length_of(self.ref.size, index), index * CHUNK_BYTES))
        try:
            check_chunk(self.ref, Chunk(blob=self.ref.id, index=index, data=content, proof=proof))
        except PeerError:
            return False
        return True

    def _finish(self) -> None:
        if self._fds is None:
            raise ParameterError("the download was closed")
        os.fsync(self._fds[0])
        os.replace(self._part, self.path)
        sync_directory(self.path.parent)
        self.close()
        self._clear()

    def _clear(self) -> None:
        self._part.unlink(missing_ok=True)
        self._proofs.unlink(missing_ok=True)


def _is_blob(path: Path, ref: BlobRef) -> bool:
    try:
        if path.stat().st_size != ref.size:
            return False
    except FileNotFoundError:
        return False
    blob = Blob.from_file(path)
    blob.close()
    return blob.ref == ref


def _close(*fds: int) -> None:
    for fd in fds:
        os.close(fd)
