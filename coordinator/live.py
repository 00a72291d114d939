"""A round while it runs: the protocol's state, its uploads on disk, their running sums, and what members were sent."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from coordinator.errors import StoreError
from coordinator.rounds import NextModel, Repeat, State
from coordinator.rows import ContributionRow
from coordinator.task import Planned, Task
from coordinator.vectors import Vectors
from edge_sdk.crypto.hashing import content_hash
from edge_sdk.crypto.ring import DEGREE
from edge_sdk.errors import PeerError
from edge_sdk.protocol import messages
from edge_sdk.protocol.aggregator import Certified, Collecting, Done, Entry, Sealed
from edge_sdk.protocol.messages import Certificate, Delivery, Header, Seal, SealedShare, Signed, Ticket, wrap
from edge_sdk.protocol.rounds import Round, split_shares
from edge_sdk.transport.chunks import Blob, chunk_count, parcel_of
from edge_sdk.transport.wire import INLINE_BYTES, Letter, encode_frame

log = logging.getLogger(__name__)

CHECKPOINT_SLOTS = 64
"""Uploads after which the running sums are written down: a restart reads no more than these."""

SHARES_BYTES = 8 << 20
"""Sealed shares that are kept in memory, with their proofs, until every member has been sent its own."""

LETTER_BYTES = 256 << 10
"""About how long a delivery gets."""

GATHER_S = 0.2
"""Contributions that come within this time go to members in one delivery."""

LETTERS_AT_ONCE = 4


class Opened(NamedTuple):
    """What an attempt to open gave. files: hashes of the next model's parameters and memory, on disk."""

    state: Certified | Done
    model: NextModel | None
    files: tuple[bytes, bytes] | None
    reason: str
    """Why there is no model though the round is done."""


@dataclass
class Post:
    """What one member was sent of a round. Kept in memory only: after a restart everything is sent again, as often as
    it takes; members give the same answer to the same message."""

    number: int
    device: str
    ticket_sent: bool = False
    shown: int = 0
    """Contributions that it was sent, by slot."""
    seal_sent: bool = False
    certificate_sent: bool = False
    has_signed: bool = False
    has_answered: bool = False
    last_s: float = 0.0
    answer: Repeat | None = None
    """When it is asked again for the answer that it owes."""
    fetch: Repeat | None = None
    """When it is told again of a letter that it does not fetch."""
    pulling: dict[bytes, tuple[Blob, set[int], bytes]] = field(default_factory=dict)
    """Letters too large for a frame, by blob: the blob, the chunks that it has not fetched, the frame that said so."""
    fetched: dict[bytes, Blob] = field(default_factory=dict)
    """The last letter that it fetched: a chunk may have been lost."""

    def again(self) -> None:
        """Send everything anew: it came back, or it does not answer."""
        self.ticket_sent = self.seal_sent = self.certificate_sent = False
        self.shown = 0
        self.pulling.clear()


def slot_bytes(round_: Round) -> int:
    """A contribution's blob: the masked vector, then the sealed shares."""
    return round_.layout.masked_bytes + round_.thresholds.members * round_.share_bytes


def no_sums(round_: Round) -> NDArray[np.uint32]:
    """The running sums before the first upload."""
    return np.zeros((round_.groups, round_.layout.blocks, DEGREE), np.uint32)


@dataclass
class LiveRound:
    """One round of one task between its ticket and its end."""

    task: Task
    planned: Planned
    round: Round
    number_of_model: int
    state: State
    vectors: Vectors
    sums: NDArray[np.uint32]
    """uint32 (groups, blocks, 2048): of the slots below `len(slots)`."""
    slots: list[int] = field(default_factory=list)
    """Slot -> sender."""
    headers: list[Signed] = field(default_factory=list, repr=False)
    """Slot -> signed header."""
    digests: dict[int, bytes] = field(default_factory=dict, repr=False)
    """Sender -> hash of its header, also of those that the seal leaves out."""
    saved: int = 0
    """Slots in the newest checkpoint."""
    full_at_s: float | None = None
    reminder: Repeat | None = None
    """When devices that have not contributed are told of the round again."""
    posts: dict[int, Post] = field(default_factory=dict)
    opening: Future[Opened] | None = None
    tried: tuple[int, bool] | None = None
    """(answers, final) of the last attempt to open."""
    _shares: OrderedDict[int, tuple[SealedShare, ...]] = field(default_factory=OrderedDict)

    def __post_init__(self) -> None:
        for number, member in enumerate(self.round.epoch.members, start=1):
            self.posts.setdefault(number, Post(number, member.key.hex()))

    @property
    def tid(self) -> bytes:
        return self.round.tid

    @property
    def masked_bytes(self) -> int:
        return self.round.layout.masked_bytes

    @property
    def upload_bytes(self) -> int:
        return slot_bytes(self.round)

    # --- contributions

    def take(
        self, sender: int, entry: Entry, upload: memoryview, shares: tuple[SealedShare, ...]
    ) -> tuple[ContributionRow, Callable[[], bool]]:
        """An accepted contribution gets its slot and is added to its group's sum.

        Returns the row, for the transaction, and a call that says whether `upload` is needed no more.
        """
        slot = len(self.slots)
        written = self.vectors.write(slot, upload)
        self.slots.append(sender)
        self.headers.append(entry.header)
        self.digests[sender] = entry.digest
        self._add(entry.group, upload[: self.masked_bytes])
        self._remember(slot, shares)
        return ContributionRow(slot, sender, entry.digest, messages.encode(entry.header)), written

    def _add(self, group: int, masked: memoryview | bytes) -> None:
        total = self.sums[group]
        np.add(total, self.round.layout.from_bytes(masked), out=total)

    def wants_checkpoint(self) -> bool:
        return len(self.slots) - self.saved >= CHECKPOINT_SLOTS

    def save(self) -> tuple[int, bytes]:
        """Write the sums down: (slots in them, hash), for the row that makes them count."""
        self.saved = len(self.slots)
        return self.saved, self.vectors.save_sums(self.saved, self.sums.astype("<u4", copy=False).tobytes())

    def sums_of_sealed(self, groups: Sequence[Sequence[int]]) -> dict[int, NDArray[np.uint32]]:
        """Per group that is not empty, the sum of exactly its senders: the running sum less who was left out.

        Where a vector that is to be taken out again is no longer what came, its group is summed anew without it.
        Raises StoreError if another one that this needs is damaged, too.
        """
        wanted = {sender for senders in groups for sender in senders}
        result = {group: self.sums[group].copy() for group, senders in enumerate(groups) if senders}
        epoch, count = self.round.epoch, self.round.groups
        spoiled = set()
        for slot, sender in enumerate(self.slots):
            group = epoch.group_of(sender, count)
            if sender in wanted or group not in result or group in spoiled:
                continue
            try:
                result[group] -= self.round.layout.from_bytes(self._masked(slot))
            except StoreError as error:
                log.error("%s. It is left out of the sum anyway, which is made anew without it", error)
                spoiled.add(group)
        for group in spoiled:
            result[group][...] = 0
        for slot, sender in enumerate(self.slots):
            group = epoch.group_of(sender, count)
            if sender in wanted and group in spoiled:
                result[group] += self.round.layout.from_bytes(self._masked(slot))
        return result

    def _masked(self, slot: int) -> bytes:
        """The masked vector in a slot. Raises StoreError if it is not what its sender signed."""
        masked = self.vectors.read(slot, 0, self.masked_bytes)
        if content_hash(masked) != messages.decode(Header, self.headers[slot].body).masked:
            raise StoreError(
                f"round {self.tid.hex()[:16]}: the vector in slot {slot} of {self.vectors.path} is not what its sender "
                "signed: the disk is damaged; end the round with skip-round, or restore the file"
            )
        return masked

    def restore(self, rows: Sequence[ContributionRow], checkpoint: tuple[int, bytes] | None) -> None:
        """After a restart: the newest checkpoint, and what came since, each vector held against its header.

        Raises StoreError that names a vector that is not what came.
        """
        self.slots = [row.sender for row in rows]
        if [row.slot for row in rows] != list(range(len(rows))):
            raise StoreError(f"round {self.tid.hex()[:16]}: its slots have gaps")
        if checkpoint is not None:
            saved = self.vectors.load_sums(*checkpoint)
            if saved is not None and len(saved) == self.sums.nbytes:
                self.sums[...] = np.frombuffer(saved, dtype="<u4").reshape(self.sums.shape)
                self.saved = checkpoint[0]
        self.digests = {row.sender: row.digest for row in rows}
        self.headers = [messages.decode(Signed, row.header or b"") for row in rows]
        for row in rows[self.saved :]:
            header = messages.decode(Header, self.headers[row.slot].body)
            masked = self._masked(row.slot)
            self._add(header.group, masked)

    # --- letters to members

    def letters(self, post: Post, now_s: float) -> Iterator[bytes]:
        """Frames that this member is due now, in the order in which it can use them. One large thing at a time."""
        if post.pulling:
            if post.fetch is not None and post.fetch.is_due(now_s):
                yield from (frame for _, _, frame in post.pulling.values())
            return
        if not post.ticket_sent:
            post.ticket_sent = True
            yield self._letter(post, wrap(Ticket, self.round.signed), now_s)
        inspecting = isinstance(self.state, Collecting)
        if inspecting or not (post.has_signed or post.has_answered):
            # No more will come: what is left has to be inspected within grace_s.
            last = self.full_at_s is not None or now_s >= self.round.ticket.closes_s
            yield from self._deliveries(post, now_s, hurry=last or not inspecting)
        if inspecting or post.pulling or post.has_answered:
            return
        if not (post.seal_sent or post.has_signed) and post.shown == len(self.slots):
            post.seal_sent = True
            yield self._letter(post, wrap(Seal, self._seal), now_s)
        if isinstance(self.state, Certified) and not (post.certificate_sent or post.pulling):
            post.certificate_sent = True
            yield self._letter(post, wrap(Certificate, self.state.certificate), now_s)

    def behind(self, present: Container[str]) -> bool:
        """Whether a member that is there has not been sent everything, or owes an answer."""
        inspecting = isinstance(self.state, Collecting)
        return any(
            post.device in present and (post.shown < len(self.slots) if inspecting else not post.has_answered)
            for post in self.posts.values()
        )

    def repeat(self, post: Post, now_s: float) -> None:
        """If the member owes an answer for long, make `letters` say it again: first the last thing, then everything."""
        if isinstance(self.state, Collecting) or post.has_answered or post.pulling:
            return
        if isinstance(self.state, Sealed) and post.has_signed:
            return
        if post.answer is None:
            post.answer = Repeat.after(now_s)
        elif post.answer.is_due(now_s):
            if post.answer.times % 2:
                post.seal_sent = post.certificate_sent = False
            else:
                post.again()

    @property
    def _seal(self) -> Signed:
        if isinstance(self.state, Collecting):
            raise StoreError("the round is not sealed")
        return self.state.seal

    def _deliveries(self, post: Post, now_s: float, *, hurry: bool) -> Iterator[bytes]:
        for _ in range(LETTERS_AT_ONCE):
            pending = len(self.slots) - post.shown
            if post.pulling or not pending:
                return
            size = self.round.share_bytes + 900  # a header with its proof, and the share's own
            most = max(1, LETTER_BYTES // size)
            if pending < most and not hurry and now_s - post.last_s < GATHER_S:
                return
            if pending * size > INLINE_BYTES >= size and pending < most:
                most = max(1, INLINE_BYTES // size)  # a few frames rather than a blob to be fetched
            items = [
                self._item(slot, post.number) for slot in range(post.shown, min(len(self.slots), post.shown + most))
            ]
            post.shown += len(items)
            post.last_s = now_s
            yield self._letter(post, wrap(Delivery, Delivery(self.tid, items)), now_s)

    def _item(self, slot: int, number: int) -> tuple[Signed, SealedShare | None]:
        header = self.headers[slot]
        return header, self._shares_of(slot, header)[number - 1]

    def _shares_of(self, slot: int, header: Signed) -> tuple[SealedShare, ...]:
        shares = self._shares.get(slot)
        if shares is None:
            data = self.vectors.read(slot, self.masked_bytes)
            try:
                shares = split_shares(self.round, messages.decode(Header, header.body), data)
            except PeerError as error:  # they were checked when they came
                raise StoreError(
                    f"round {self.tid.hex()[:16]}: the shares in slot {slot} of {self.vectors.path} are not what their "
                    f"sender signed: the disk is damaged; end the round with skip-round, or restore the file ({error})"
                ) from error
            self._remember(slot, shares)
        return shares

    def _remember(self, slot: int, shares: tuple[SealedShare, ...]) -> None:
        self._shares[slot] = shares
        most = max(1, SHARES_BYTES // (self.upload_bytes - self.masked_bytes))
        while len(self._shares) > most:
            self._shares.popitem(last=False)

    def _letter(self, post: Post, content: bytes, now_s: float) -> bytes:
        parcel, blob = parcel_of(content)
        frame = encode_frame(Letter(parcel))
        if blob is not None:
            post.pulling[blob.ref.id] = (blob, set(range(chunk_count(blob.ref.size))), frame)
            post.fetch = Repeat.after(now_s, 10.0)
        return frame
