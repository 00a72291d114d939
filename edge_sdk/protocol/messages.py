"""Every message of the protocol in one schema, and the one door through which bytes come in (section 6).

A message is MessagePack of the fields in order, in the one encoding that this module itself would write: what decodes
but would be written otherwise is refused, so that a hash of the bytes is a hash of the meaning. What has an author
travels as `Signed`; the signature is over the body's bytes under the message's own label.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from edge_sdk.crypto.hashing import tagged_hash
from edge_sdk.crypto.identity import SIGNATURE_BYTES, Identity, check_signature
from edge_sdk.crypto.sealing import MLKEM_PUBLIC_BYTES, X25519_BYTES
from edge_sdk.errors import ParameterError, PeerError

MAX_MEMBERS = 256
MAX_ROSTER = 1 << 20
MAX_CONTRIBUTORS = 10_000
MAX_GROUPS = 64
MAX_MESSAGE_BYTES = 16 << 20
"""Nothing larger is decoded. The masked vector is not a message: it travels as a blob under its content hash."""
MAX_BODY_BYTES = 1 << 20
"""No signed body is larger: the longest, a seal of 10,000 contributors, has 400 kB. Some bodies are parsed to find the
author before a signature is checked, and parsed they take many times their size."""

Hash = Annotated[bytes, Meta(min_length=32, max_length=32)]
Key = Annotated[bytes, Meta(min_length=32, max_length=32)]
Signature = Annotated[bytes, Meta(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)]
Proof = Annotated[list[Hash], Meta(max_length=20)]
RosterIndex = Annotated[int, Meta(ge=0, lt=MAX_ROSTER)]
MemberNumber = Annotated[int, Meta(ge=1, le=MAX_MEMBERS)]
Seconds = Annotated[int, Meta(ge=0, lt=1 << 40)]
Counter = Annotated[int, Meta(ge=0, lt=1 << 53)]
Positive = Annotated[float, Meta(gt=0.0, lt=1e30)]
NonNegative = Annotated[float, Meta(ge=0.0, lt=1e30)]
"""0 or `Positive`. What holds one refuses -0.0 itself: it equals 0.0 and has other bytes."""
Rate = Annotated[float, Meta(gt=0.0, le=1.0)]
Loops = Annotated[int, Meta(ge=0, le=1_000_000)]
Name = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[a-z0-9][a-z0-9._-]*\Z")]
CommitteeKind = Literal["drawn", "everyone", "helpers"]


class Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of every message: positional fields, immutable, nothing optional and nothing unknown."""


class Signed(Message, frozen=True):
    """Bytes with an author. `body` stays as it came: it is what was signed and what is hashed."""

    body: Annotated[bytes, Meta(max_length=MAX_BODY_BYTES)]
    signature: Signature


class Frozen(Message, frozen=True):
    """The authority's roster, fixed before the beacon is drawn (section 7.1). Signed by the fleet authority."""

    version: Literal[1]
    fleet: Key
    number: Counter
    previous: Hash
    coordinator: Key
    roster_root: Hash
    roster_size: Annotated[int, Meta(ge=1, le=MAX_ROSTER)]
    corrupt_devices: Annotated[int, Meta(ge=1, le=MAX_ROSTER)]
    committee: CommitteeKind
    committee_size: Annotated[int, Meta(ge=1, le=MAX_MEMBERS)]
    helpers: Annotated[list[Key], Meta(max_length=MAX_MEMBERS)]
    expires_s: Seconds
    """No ticket of this epoch lives longer: who is revoked in the next one is out by then, whoever holds it back."""


class Grouping(Message, frozen=True):
    """A number of groups that tickets may use, and how many corrupt devices one group can hold (section 7.3)."""

    groups: Annotated[int, Meta(ge=1, le=MAX_GROUPS)]
    corrupt: Annotated[int, Meta(ge=1, le=MAX_ROSTER)]


class Member(Message, frozen=True):
    """A committee member. `index` is its place in the roster; a helper is not in the roster and has none."""

    key: Key
    index: RosterIndex | None


class Epoch(Message, frozen=True):
    """A frozen roster with the beacon drawn for it and the committee that follows. Signed by the fleet authority."""

    frozen: Frozen
    entropy: Hash
    members: Annotated[list[Member], Meta(min_length=1, max_length=MAX_MEMBERS)]
    groupings: Annotated[list[Grouping], Meta(min_length=1, max_length=MAX_GROUPS)]


class PrekeyOffer(Message, frozen=True):
    """One prekey, good for one ticket. Signed by the member."""

    fleet: Key
    member: Key
    serial: Counter
    x25519: Annotated[bytes, Meta(min_length=X25519_BYTES, max_length=X25519_BYTES)]
    mlkem: Annotated[bytes, Meta(min_length=MLKEM_PUBLIC_BYTES, max_length=MLKEM_PUBLIC_BYTES)]
    expires_s: Seconds
    """The member erases the secret at this time, used or not. No ticket that names the offer expires later."""


def _refuse_minus_zero(**fields: float) -> None:
    """Two encodings of one meaning would be two hashes of it. A decoder turns the error into a PeerError."""
    for name, value in fields.items():
        if value == 0.0 and math.copysign(1.0, value) < 0:
            raise ParameterError(f"{name} is -0.0: write 0.0")


class NoisePlan(Message, frozen=True):
    """What every device of the round clips to and adds (docs/protocol.md section 8.2)."""

    unit: Literal["device", "example"]
    clip: Positive
    """L2 bound, weight units."""
    granularity: Positive
    """Weight units per integer step."""
    sigma: Positive
    """Standard deviation of the noise that one group's sum must carry, in integer steps."""
    metric_scale: NonNegative
    """Weight units of one unit of a metric in the vector's extra coordinates; 0 for no metrics and no coordinates."""
    loss_bound: Positive
    """Losses are clipped to [0, loss_bound] before they are summed."""
    device_rate: Rate
    """Probability with which a device takes part: its own coin."""
    example_rate: Rate
    """Probability with which an example is drawn; 1 for unit "device"."""

    def __post_init__(self) -> None:
        _refuse_minus_zero(metric_scale=self.metric_scale)


class Work(Message, frozen=True):
    """What a device does between ticket and contribution (docs/protocol.md section 8.3)."""

    learning_rate: NonNegative
    """Unit "device": of the local SGD steps, above 0. Unit "example": 0, local parameters stay as they are."""
    epochs: Loops
    steps: Loops
    """Unit "device": passes over the data, or steps; exactly one of the two is above 0. Unit "example": both 0."""
    proximal: NonNegative
    """FedProx's mu; 0 for unit "example"."""
    weight_cap: Counter
    """A device's weight is min(1, n / weight_cap) for n examples; 0: every device weighs the same. 0 for unit
    "example"."""

    def __post_init__(self) -> None:
        _refuse_minus_zero(learning_rate=self.learning_rate, proximal=self.proximal)


class Ticket(Message, frozen=True):
    """One round, whole. Signed by the coordinator; `tid = SHA-256` over it names the round from here on."""

    version: Literal[1]
    epoch: Hash
    task: Name
    round: Counter
    previous: Hash
    bundle: Hash
    parameters: Hash
    dimension: Annotated[int, Meta(ge=1, le=1 << 27)]
    n_max: Annotated[int, Meta(ge=2, le=MAX_CONTRIBUTORS)]
    honest: Annotated[int, Meta(ge=2, le=MAX_CONTRIBUTORS)]
    groups: Annotated[int, Meta(ge=1, le=MAX_GROUPS)]
    noise: NoisePlan
    work: Work
    prekeys: Annotated[list[Signed], Meta(min_length=1, max_length=MAX_MEMBERS)]
    closes_s: Seconds
    """Contributions are taken before this time, Unix seconds."""
    expires_s: Seconds
    """Members neither sign nor release from this time on, and erase the round's prekey."""


class Anchor(Message, frozen=True):
    """The head of a device's ledger: how many entries it has, and the chain's hash after the last."""

    entries: Counter
    link: Hash


class Header(Message, frozen=True):
    """What a contributor signs: it binds the masked vector and every sealed share to one ticket and one sender."""

    tid: Hash
    sender: RosterIndex
    key: Key
    enrolment: Proof
    group: Annotated[int, Meta(ge=0, lt=MAX_GROUPS)]
    sealing_key: Key
    masked: Hash
    shares: Hash
    ledger: Anchor
    """The sender's ledger when it made the contribution. Committee members keep it: a disk that went back shows."""


class SealedShare(Message, frozen=True):
    """One share on its way to one member, with the proof that the signed header covers it."""

    sealed: Annotated[bytes, Meta(min_length=1, max_length=1 << 14)]
    proof: Proof


class Delivery(Message, frozen=True):
    """Contributor headers for one member, each with its sealed share, or None where only the header is shown."""

    tid: Hash
    items: Annotated[list[tuple[Signed, SealedShare | None]], Meta(max_length=MAX_CONTRIBUTORS)]


class Complaint(Message, frozen=True):
    """Senders whose share does not open for this member, or whose ledger was rolled back as far as this member saw.

    Signed by the member. It proves nothing against a sender.
    """

    tid: Hash
    member: MemberNumber
    senders: Annotated[list[RosterIndex], Meta(max_length=MAX_CONTRIBUTORS)]


class Receipt(Message, frozen=True):
    """The coordinator holds this contribution durably: its sender may forget it. Signed by the coordinator."""

    tid: Hash
    sender: RosterIndex
    header: Hash


class Seal(Message, frozen=True):
    """The set S with its partition: per group the included headers' (sender, hash), by sender. Signed by the
    coordinator."""

    tid: Hash
    groups: Annotated[
        list[Annotated[list[tuple[RosterIndex, Hash]], Meta(max_length=MAX_CONTRIBUTORS)]],
        Meta(min_length=1, max_length=MAX_GROUPS),
    ]


class SealSignature(Message, frozen=True):
    """One member's one statement for this ticket: this seal and no other. Signed by the member."""

    tid: Hash
    seal: Hash
    member: MemberNumber


class Certificate(Message, frozen=True):
    """Q members' signatures over the same seal. From the first one on, the sums count as known."""

    tid: Hash
    seal: Hash
    signatures: Annotated[list[tuple[MemberNumber, Signature]], Meta(max_length=MAX_MEMBERS)]


class Release(Message, frozen=True):
    """One member's summed shares of each group, 2 bytes each, or None for a group with a share it could not open.
    Signed by the member."""

    tid: Hash
    seal: Hash
    member: MemberNumber
    sums: Annotated[
        list[Annotated[bytes, Meta(min_length=2, max_length=4096)] | None], Meta(min_length=1, max_length=MAX_GROUPS)
    ]


class Abort(Message, frozen=True):
    """The coordinator ends the round without a sum. Signed by the coordinator. It frees no member to sign again."""

    tid: Hash
    reason: Annotated[str, Meta(min_length=1, max_length=512)]


class GroupResult(Message, frozen=True):
    """How one group ended: its number of contributors, and the hash of its opened sum or the reason there is none."""

    contributors: Annotated[int, Meta(ge=0, le=MAX_CONTRIBUTORS)]
    sum: Hash | None
    reason: Annotated[str, Meta(max_length=512)]


class Transcript(Message, frozen=True):
    """What happened, for whoever audits the round. Signed by the coordinator."""

    tid: Hash
    seal: Hash
    certificate: Certificate
    groups: Annotated[list[GroupResult], Meta(min_length=1, max_length=MAX_GROUPS)]


class Envelope(Message, frozen=True):
    """One message on the wire: its label and its bytes. Kinds in `SIGNED` travel as `Signed`, the others plain."""

    kind: Annotated[str, Meta(max_length=32)]
    content: Annotated[bytes, Meta(max_length=MAX_MESSAGE_BYTES)]


SIGNED: tuple[type[Message], ...] = (
    Epoch, PrekeyOffer, Ticket, Header, Complaint, Receipt, Seal, SealSignature, Release, Abort, Transcript,
)  # fmt: skip
PLAIN: tuple[type[Message], ...] = (Delivery, Certificate)
"""Messages without an author of their own: what is in them was signed by others and is checked piece by piece."""

_AT = " - at `$["
"""How msgspec begins the place of an error in a message."""

M = TypeVar("M", bound=Message)
_encoder = msgspec.msgpack.Encoder()
_decoders: dict[type[Message], msgspec.msgpack.Decoder[Message]] = {}


def label_of(kind: type[Message]) -> str:
    """The label under which this kind of message is signed and hashed: its name, in lower case."""
    return kind.__name__.lower()


def encode(message: Message) -> bytes:
    """The message's one encoding."""
    return _encoder.encode(message)


def decode(kind: type[M], data: bytes) -> M:
    """The `kind` of message that `data` is. Raises PeerError that names the field for anything else whatever."""
    label = label_of(kind)
    if len(data) > MAX_MESSAGE_BYTES:
        raise PeerError(f"{label}: {len(data)} bytes is over the limit of {MAX_MESSAGE_BYTES}")
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.msgpack.Decoder(kind)
    try:
        message = decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        # ValueError: text that is not UTF-8.
        raise PeerError(f"{label}: {_named(kind, str(error))}") from error
    if _encoder.encode(message) != data:
        raise PeerError(f"{label}: not in its one canonical encoding")
    return message  # type: ignore[return-value]  # a Decoder(kind) returns a kind


def _named(kind: type[Message], text: str) -> str:
    """A decoding error with the field's name for its place: "... - at `$[3][0]`" becomes "... - at `round[0]`".

    Only the place at its end: what comes before may repeat what was sent.
    """
    said, at, place = text.rpartition(_AT)
    number, bracket, rest = place.partition("]")
    fields = kind.__struct_fields__
    if not (at and bracket and number.isascii() and number.isdigit() and len(number) < 4 and int(number) < len(fields)):
        return text
    return f"{said} - at `{fields[int(number)]}{rest}"


def message_hash(kind: type[Message], body: bytes) -> bytes:
    """SHA-256 over a message's body under its own label: its name everywhere else (`tid` for a ticket)."""
    return tagged_hash(label_of(kind), body)


def wrap(kind: type[Message], message: Message) -> bytes:
    """`message`, a `Signed` for the kinds in SIGNED, as it goes out."""
    return encode(Envelope(label_of(kind), encode(message)))


def unwrap(data: bytes) -> tuple[type[Message], Message]:
    """(kind, message) of what came in: a `Signed`, nothing in it checked yet, or a plain message. Raises PeerError."""
    envelope = decode(Envelope, data)
    for kind in SIGNED:
        if label_of(kind) == envelope.kind:
            return kind, decode(Signed, envelope.content)
    for kind in PLAIN:
        if label_of(kind) == envelope.kind:
            return kind, decode(kind, envelope.content)
    raise PeerError(f"envelope: no message is called {envelope.kind!r}")


def sign(identity: Identity, message: Message) -> Signed:
    """`message` with `identity`'s signature."""
    body = encode(message)
    return Signed(body, identity.sign(label_of(type(message)), body))


def verify(kind: type[M], public_key: bytes, signed: Signed) -> M:
    """The message, if `public_key` signed it as a `kind`. The signature is checked before the body is parsed."""
    check_signature(public_key, label_of(kind), signed.body, signed.signature)
    return decode(kind, signed.body)


def verify_author(kind: type[M], signed: Signed, key_of: Callable[[M], bytes]) -> M:
    """The message, if the author that it names signed it. key_of: the named author's key, or PeerError."""
    message = decode(kind, signed.body)
    check_signature(key_of(message), label_of(kind), signed.body, signed.signature)
    return message
