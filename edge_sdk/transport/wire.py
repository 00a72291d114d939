"""What travels between a device and its coordinator: frames (docs/services.md section 3).

A frame is one MQTT message. Most frames carry or fetch things that are signed or addressed by their hash, so a frame
itself needs no signature: its sender is who the broker's certificate check says it is, and a lie in
an unsigned field costs time, never a sum. Every frame is idempotent: it may be lost, repeated and overtaken.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from edge_sdk.errors import PeerError
from edge_sdk.protocol.messages import Counter, Hash, Message, Name, Proof, RosterIndex, Seconds, Signed

CHUNK_BYTES = 120 << 10
"""A blob's chunk. With its frame it fits 128 KiB, what the strictest broker takes (AWS IoT Core)."""

INLINE_BYTES = 32 << 10
"""What is larger travels as a blob that the receiver pulls."""

MAX_FRAME_BYTES = 128 << 10
MAX_BLOB_BYTES = 1 << 30
MAX_TASKS = 64
MAX_PULL = 32
"""Chunks that one Pull may ask for: 4 MB."""


class Model(Message, frozen=True):
    """A task's newest model. Signed by the coordinator, so that no broker can swap it."""

    task: Name
    round: Counter
    """Rounds whose sums are in it; 0 for the bundle's initial parameters."""
    bundle: Hash
    """`edge_sdk.bundle.Bundle.hash`."""
    parameters: Hash
    """content_hash of the shared parameters as little-endian float32."""


class BlobRef(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A blob by its content: `id` is `chunks.blob_id`, over its size and the Merkle root of its chunks."""

    id: Hash
    size: Annotated[int, Meta(ge=1, le=MAX_BLOB_BYTES)]


Inline = Annotated[bytes, Meta(max_length=INLINE_BYTES)]
Parcel = Inline | BlobRef
"""Bytes, in place where they are few, else to be pulled."""


class Frame(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag_field="frame", tag=str.lower):
    """Base of all frames."""


class Position(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Where a device stands in a task: the newest round that it took a ticket of, -1 for none."""

    task: Name
    round: Annotated[int, Meta(ge=-1, lt=1 << 53)]


class Hello(Frame, frozen=True):
    """Device to coordinator, at every (re)connect and after anything was lost. Answered by a Welcome."""

    version: Literal[1]
    epoch: Counter
    """Number of the newest epoch that it holds, 0 for none."""
    spare_prekeys: Annotated[int, Meta(ge=0, le=1 << 16)]
    prekeys_wanted: bool
    """Whether it would serve on a committee if the epoch says so."""
    tasks: Annotated[list[Position], Meta(max_length=MAX_TASKS)]
    """Tasks for which it has examples."""


class TaskState(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A task as it stands. model: a Signed `Model`, encoded.  ticket: a Signed `Ticket`, encoded, of its open round."""

    model: Inline
    bundle: BlobRef
    parameters: BlobRef
    ticket: Parcel | None


class Enrolment(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A device's place in the newest epoch's roster."""

    index: RosterIndex
    proof: Proof


class HeldPrekeys(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Of one member's prekey offers, those that the coordinator has left: the others went into tickets."""

    newest: Counter
    """The highest serial that it has seen; 0 before the first."""
    unused: Annotated[list[Counter], Meta(max_length=256)]
    """Serials of living offers that no ticket has named."""


class Welcome(Frame, frozen=True):
    """Coordinator to device: where things stand. Also sent unasked when they change (a new epoch, round or model)."""

    time_s: Seconds
    """The coordinator's clock, Unix seconds: to warn of a wrong clock, never to set one."""
    epoch: Parcel | None
    """A Signed `Epoch`, encoded; None while there is none."""
    enrolment: Enrolment | None
    """None for a helper, or for a device that the newest epoch does not hold yet."""
    tasks: Annotated[list[TaskState], Meta(max_length=MAX_TASKS)]
    """Those that the device named in its Hello, and for a committee member every one that has a round open."""
    shown: Signed | None = None
    """Of the device's own Signed `Header`s that the coordinator knows, the one whose ledger has the most entries: a
    device whose whole disk was put back to an earlier state is told so by its own signature."""
    prekeys: HeldPrekeys | None = None
    """For a member of the newest epoch: one that missed tickets does not know which of its offers they used up."""


class Prekeys(Frame, frozen=True):
    """Member to coordinator: fresh prekey offers, each a Signed `PrekeyOffer`. Repeating them is harmless."""

    offers: Annotated[list[Signed], Meta(max_length=64)]


class Letter(Frame, frozen=True):
    """A message of docs/protocol.md as `messages.wrap` gives it, either way."""

    content: Parcel


class Upload(Frame, frozen=True):
    """Device to coordinator: a contribution is ready. The blob holds the masked vector and then the sealed shares.

    The coordinator pulls it when it has room (a Pull is the grant), or answers with a Refusal. Repeated until a
    Receipt.
    """

    header: Signed
    blob: BlobRef


class Pull(Frame, frozen=True):
    """Send these chunks of a blob. The receiver asks for a window at a time, and again for what did not come."""

    blob: Hash
    chunks: Annotated[list[Annotated[int, Meta(ge=0, lt=1 << 20)]], Meta(min_length=1, max_length=MAX_PULL)]


class Chunk(Frame, frozen=True):
    """One chunk with the proof that it belongs to the blob: it is checked by itself, whoever sent it."""

    blob: Hash
    index: Annotated[int, Meta(ge=0, lt=1 << 20)]
    data: Annotated[memoryview, Meta(min_length=1, max_length=CHUNK_BYTES)]
    """Of a decoded frame: a view of the frame, which spares the copy."""
    proof: Proof


class Gone(Frame, frozen=True):
    """The sender of this does not have the blob (any more)."""

    blob: Hash


class Refusal(Frame, frozen=True):
    """Coordinator to device: an upload is not taken. subject: the contribution's header hash.

    final: trying again is of no use in this round.
    """

    subject: Hash
    reason: Annotated[str, Meta(min_length=1, max_length=512)]
    final: bool


class Leaving(Frame, frozen=True):
    """Device to coordinator: it goes to sleep. Also the device's last will at the broker."""


Up = Hello | Prekeys | Letter | Upload | Pull | Chunk | Gone | Leaving
Down = Welcome | Letter | Pull | Chunk | Gone | Refusal

_Direction = TypeVar("_Direction")
_encoder = msgspec.msgpack.Encoder()
_up: msgspec.msgpack.Decoder[Up] = msgspec.msgpack.Decoder(Up)
_down: msgspec.msgpack.Decoder[Down] = msgspec.msgpack.Decoder(Down)


def encode_frame(frame: Up | Down) -> bytes:
    """The frame as it travels."""
    return _encoder.encode(frame)


def decode_up(data: bytes) -> Up:
    """What a device sent. Raises PeerError that names the field."""
    return _decode(_up, data)


def decode_down(data: bytes) -> Down:
    """What the coordinator sent. Raises PeerError that names the field."""
    return _decode(_down, data)


def _decode(decoder: msgspec.msgpack.Decoder[_Direction], data: bytes) -> _Direction:
    if len(data) > MAX_FRAME_BYTES:
        raise PeerError(f"frame: {len(data)} bytes is over the limit of {MAX_FRAME_BYTES}")
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise PeerError(f"frame: {error}") from error
