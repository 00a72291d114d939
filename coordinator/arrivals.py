"""Blobs on their way in: who may send now, who waits, who stalls (docs/services.md section 3).

The coordinator pulls. A pull is a grant: memory for the whole blob is set aside before its first chunk is asked for, so
what uploads take is bounded by the memory that is given here, whatever the fleet does. Pure: time is an argument.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from edge_sdk.errors import PeerError
from edge_sdk.protocol.messages import Header, Signed
from edge_sdk.transport.chunks import Download, check_chunk
from edge_sdk.transport.wire import CHUNK_BYTES, BlobRef, Chunk, Pull

STALL_S = 30.0
"""A grant that brought nothing for so long goes to whoever waits."""

SLOWEST_BYTES_S = 8 << 10
"""A grant that brings less on average goes to whoever waits, too: a chunk now and then must not hold memory for
hours."""

_LEFT_S = float("-inf")
"""In place of when it last sent something, for a device that went away."""


MAX_DAMAGED = 3
"""So often chunks that came damaged are asked for again."""


class Unproved(Download):
    """Takes chunks at their word. For uploads, which are held whole against a signed header anyway: their proofs are
    only looked at if that fails, which halves what there is to hash."""

    def __init__(self, ref: BlobRef, buffer: bytearray | None = None) -> None:
        super().__init__(ref, buffer=buffer)
        self._proofs: dict[int, list[bytes]] = {}

    def _check(self, chunk: Chunk) -> None:
        begin = chunk.index * CHUNK_BYTES
        if chunk.blob != self.ref.id or len(chunk.data) != min(CHUNK_BYTES, self.ref.size - begin):
            raise PeerError(f"chunk: {chunk.index} with {len(chunk.data)} bytes is not one of the blob's")

    def _keep(self, chunk: Chunk) -> None:
        super()._keep(chunk)
        self._proofs[chunk.index] = chunk.proof

    def recheck(self) -> int:
        """Drop the chunks whose proofs do not hold; `pull` asks for them again. Returns how many there were."""
        content, damaged = self.view(), 0
        for index, proof in self._proofs.items():
            data = content[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
            try:
                check_chunk(self.ref, Chunk(self.ref.id, index, data, proof))
            except PeerError:
                self._have[index] = 0
                self._missing += 1
                self._received_bytes -= len(data)
                damaged += 1
        self.ask_again()
        return damaged


def _yes() -> bool:
    return True


@dataclass
class Arrival:
    """One blob of one device.  header, tid: of the contribution that it is; None for a member's letter."""

    device: str
    ref: BlobRef
    header: Signed | None
    tid: bytes | None
    checked: Header | None = None
    """The header's content, if its round has checked it."""
    download: Download | None = field(default=None, repr=False)
    """None while it waits."""
    last_s: float = 0.0
    granted_s: float = 0.0
    damaged: int = 0
    """How often `recheck` found something."""
    is_free: Callable[[], bool] = _yes
    """Whether nobody reads its buffer any more: it may be on its way to the disk when its end comes."""

    def recheck(self) -> bool:
        """Whether it was damaged under way and goes on; else it is what its device sent."""
        if not isinstance(self.download, Unproved) or self.damaged >= MAX_DAMAGED or not self.download.recheck():
            return False
        self.damaged += 1
        return True


Key = tuple[str, bytes]


class Arrivals:
    """Grants, and a queue of those that wait for one, in the order in which they asked."""

    def __init__(self, memory_bytes: int, stall_s: float = STALL_S) -> None:
        """memory_bytes: of all grants together."""
        self.memory_bytes = memory_bytes
        self._stall_s = stall_s
        self._free = memory_bytes
        self._granted: dict[Key, Arrival] = {}
        self._waiting: OrderedDict[Key, Arrival] = OrderedDict()
        self._of_device: Counter[str] = Counter()
        # What `pulls` looks at. It is called between frames: to look at hundreds of grants each time is not cheap.
        self._touched: dict[Key, None] = {}
        self._due_s = float("inf")
        """No other grant has something to ask for before."""
        self._look_s = float("-inf")
        """When the grants are looked through for stalled ones."""
        self._read: list[tuple[Arrival, Download | None]] = []
        """Those that ended and are read yet: their memory counts."""
        self._spare: list[bytearray] = []
        """Buffers of uploads that ended, of one size: new memory for each would be a hundred page faults."""

    def __len__(self) -> int:
        return len(self._granted) + len(self._waiting)

    @property
    def granted_bytes(self) -> int:
        """Memory in use."""
        return self.memory_bytes - self._free

    def ask(
        self,
        device: str,
        ref: BlobRef,
        header: Signed | None,
        tid: bytes | None,
        now_s: float,
        limit: int = 4,
        *,
        checked: Header | None = None,
    ) -> None:
        """A device offers a blob. Asking again changes nothing, but for one that had left: it goes on where it was.

        limit: blobs that one device may have on their way.
        Raises PeerError on more than that, on a second one for a round, or a blob that no grant can hold.
        """
        key = (device, ref.id)
        granted = self._granted.get(key)
        if granted is not None and granted.download is not None and granted.last_s == _LEFT_S:
            granted.last_s = now_s
            granted.download.ask_again()
            self._touched[key] = None
        if key in self._granted or key in self._waiting:
            return
        if ref.size > self.memory_bytes:
            raise PeerError(f"a blob of {ref.size} bytes is more than the {self.memory_bytes} that uploads may take")
        if self._of_device[device] >= limit:
            raise PeerError(f"more than {limit} blobs of this device are on their way already")
        if tid is not None and self._of_device[device]:
            for (other, _), arrival in (*self._granted.items(), *self._waiting.items()):
                if other == device and arrival.tid == tid:
                    raise PeerError("another upload of this device for the same round is on its way")
        self._waiting[key] = Arrival(device, ref, header, tid, checked, last_s=now_s)
        self._of_device[device] += 1

    def holds(self, device: str, blob: bytes) -> bool:
        return (device, blob) in self._granted or (device, blob) in self._waiting

    def is_sending(self, device: str) -> bool:
        """Whether a blob of it is on its way, or waits for a grant."""
        return device in self._of_device

    def pulls(self, now_s: float) -> Iterator[tuple[str, Pull]]:
        """What to ask of whom now: grants to those that wait as far as memory goes, and what granted ones need."""
        self._free_read()
        self._free_stalled(now_s)
        while self._waiting:
            key, arrival = next(iter(self._waiting.items()))
            if arrival.ref.size > self._free:
                break  # in order: a large one is not overtaken for ever by small ones
            del self._waiting[key]
            self._free -= arrival.ref.size
            arrival.download = self._download(arrival)
            arrival.last_s = arrival.granted_s = now_s
            self._granted[key] = arrival
            self._touched[key] = None
        if now_s >= self._due_s:
            self._touched, self._due_s = dict.fromkeys(self._granted), float("inf")
        while self._touched:
            key = next(iter(self._touched))
            del self._touched[key]
            touched = self._granted.get(key)
            if touched is None or touched.download is None or touched.last_s == _LEFT_S:
                continue
            pull = touched.download.pull(now_s)
            self._due_s = min(self._due_s, touched.download.due_s)
            if pull is not None:
                yield touched.device, pull

    def _download(self, arrival: Arrival) -> Download:
        """Its memory was set aside; where it can be, it is that of an upload before."""
        if arrival.header is None:
            made = Download(arrival.ref)
        elif self._spare and len(self._spare[-1]) == arrival.ref.size:
            made = Unproved(arrival.ref, self._spare.pop())
        else:
            self._spare.clear()
            made = Unproved(arrival.ref)
        while self._spare and len(self._spare) * len(self._spare[-1]) > self._free:
            self._spare.pop()
        return made

    def add(self, device: str, chunk: Chunk, now_s: float) -> Arrival | None:
        """Take a chunk. Returns the arrival when it is complete; it stays granted until `end`.

        Raises PeerError if it is not of a blob that this device was granted.
        """
        arrival = self._granted.get((device, chunk.blob))
        if arrival is None or arrival.download is None:
            raise PeerError("chunk: of a blob that it was not asked for")
        if arrival.download.add(chunk, now_s):
            arrival.last_s = now_s
            self._touched[device, chunk.blob] = None
        return arrival if arrival.download.complete else None

    def end(self, device: str, blob: bytes) -> None:
        """It is dealt with, or gone: the memory is free as soon as nobody reads it."""
        waiting = self._waiting.pop((device, blob), None)
        granted = self._granted.pop((device, blob), None)
        if granted is not None:
            self._read.append((granted, granted.download))
            granted.download = None
            self._free_read()
        if waiting is not None or granted is not None:
            self._of_device[device] -= 1
            if not self._of_device[device]:
                del self._of_device[device]

    def _free_read(self) -> None:
        still = []
        for arrival, download in self._read:
            if not arrival.is_free():
                still.append((arrival, download))
                continue
            self._free += arrival.ref.size
            if isinstance(download, Unproved):
                if self._spare and len(self._spare[-1]) != arrival.ref.size:
                    self._spare.clear()
                self._spare.append(download.buffer)
        self._read = still

    def leave(self, device: str) -> None:
        """The device went away. What came of its blobs is kept until somebody else needs the memory."""
        if device not in self._of_device:
            return
        for key in [key for key in self._waiting if key[0] == device]:
            self.end(*key)
        for key, arrival in self._granted.items():
            if key[0] == device:
                arrival.last_s = _LEFT_S
                self._look_s = _LEFT_S

    def end_round(self, tid: bytes) -> None:
        """Nothing of this round is taken any more."""
        both = {**self._granted, **self._waiting}
        for key in [key for key, arrival in both.items() if arrival.tid == tid]:
            self.end(*key)
        self._spare.clear()

    @property
    def due_s(self) -> float:
        """When `pulls` next has something: infinity if nothing is under way."""
        here = (arrival for arrival in self._granted.values() if arrival.last_s != _LEFT_S)
        times = [arrival.download.due_s for arrival in here if arrival.download is not None]
        if self._waiting and next(iter(self._waiting.values())).ref.size <= self._free:
            return 0.0
        return min(times, default=float("inf"))

    def _free_stalled(self, now_s: float) -> None:
        if not self._waiting or now_s < self._look_s:
            return
        self._look_s = now_s + self._stall_s / 30
        for key, arrival in list(self._granted.items()):
            if now_s - arrival.last_s >= self._stall_s or self._drips(arrival, now_s):
                self.end(*key)
                if arrival.last_s != _LEFT_S:
                    arrival.last_s = now_s
                    self._waiting[key] = arrival  # behind the others
                    self._of_device[arrival.device] += 1

    def _drips(self, arrival: Arrival, now_s: float) -> bool:
        age_s = now_s - arrival.granted_s
        came = arrival.download.received_bytes if arrival.download is not None else 0
        return age_s >= self._stall_s and came < age_s * SLOWEST_BYTES_S
