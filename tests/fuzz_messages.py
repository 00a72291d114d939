"""Coverage-guided fuzzing of everything that takes bytes from outside: `make fuzz SECONDS=600`.

A finding is any exception other than PeerError (RoundAborted where the code documents it), a state that changed though
the message was refused, or an accepted message that undid something final. An input is three bytes (what to attack,
which kind of message, how to sign) and a body; the body is signed with the right key, so that the search gets past the
signature checks. The corpus starts with a recorded round.
"""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random

import atheris

sys.path.insert(0, str(Path(__file__).parent / "protocol"))
with atheris.instrument_imports(include=["edge_sdk"]):
    import recording

    from edge_sdk.crypto.hashing import content_hash
    from edge_sdk.crypto.merkle import merkle_root
    from edge_sdk.protocol import messages
    from edge_sdk.protocol.contributor import Contribution
    from edge_sdk.protocol.messages import Delivery, Envelope, Epoch, Header, Signed, Ticket, encode, label_of

RECORDINGS = [recording.recording(name) for name in ("everyone", "helpers")]
KINDS = (*messages.SIGNED, *messages.PLAIN)
PLACES = [(rec, target) for rec in RECORDINGS for target in rec.targets]
DECODE, WIRE, EPOCH, TICKET, CONTRIBUTION, SHARES, NESTED = range(7)
"""What is attacked besides the recorded parties: the values of the first byte that follow theirs."""

ENTRIES = len(PLACES) + 2 * (NESTED + 1)
INTACT, OTHER_AUTHOR, OTHER_LABEL, OLD_SIGNATURE = range(4)


def author_of(rec: recording.Recording, kind: type[messages.Message], body: bytes) -> recording.Letter | None:
    """The recorded letter of this kind whose body is nearest: its author signs."""
    letters = [letter for letter in rec.letters if letter.kind is kind]
    tree = recording.parse(body)

    def common(letter: recording.Letter) -> int:
        valid = recording.parse(letter.body)
        if not (isinstance(tree, list) and isinstance(valid, list)):
            return 0
        return sum(a == b for a, b in zip(tree, valid, strict=False))

    return max(letters, key=common, default=None)


def signed_body(rec: recording.Recording, kind: type[messages.Message], mode: int, body: bytes) -> Signed:
    letter = author_of(rec, kind, body)
    author = letter.author if letter and letter.author else rec.coordinator
    if mode % 16 == OTHER_AUTHOR:
        author = rec.signers[mode // 16 % len(rec.signers)]
    label = label_of(KINDS[mode // 16 % len(KINDS)] if mode % 16 == OTHER_LABEL else kind)
    old = letter.body if letter and mode % 16 == OLD_SIGNATURE else body
    return Signed(body, author.sign(label, old))


def wire(rec: recording.Recording, kind: type[messages.Message], mode: int, body: bytes) -> bytes:
    content = body if kind in messages.PLAIN else encode(signed_body(rec, kind, mode, body))
    return encode(Envelope(label_of(kind), content))


def nested(rec: recording.Recording, mode: int, body: bytes) -> bytes:
    """The body as a header, signed by its sender and delivered, or as a prekey offer, signed and in a ticket."""
    outer, inner, field = (Delivery, Header, 1) if mode & 1 else (Ticket, messages.PrekeyOffer, 13)
    valid = recording.parse(next(letter.body for letter in rec.letters if letter.kind is outer))
    signed = signed_body(rec, inner, INTACT, body)
    again = [signed.body, signed.signature]
    nearest = author_of(rec, inner, body)
    for i, item in enumerate(valid[field]):
        pair = item[0] if outer is Delivery else item
        if nearest is not None and pair[0] == nearest.body:
            valid[field][i] = [again, *item[1:]] if outer is Delivery else again
    return wire(rec, outer, INTACT, recording.pack(valid))


def contribution(rec: recording.Recording, mode: int, body: bytes) -> Contribution:
    """A contribution whose header, masked vector or sealed shares are these bytes; bound by the header or not."""
    number = mode // 16 % len(rec.contributions)
    valid = rec.contributions[number]
    if mode % 4 == 0:
        return Contribution(signed_body(rec, Header, INTACT, body), valid.masked, valid.shares)
    masked = body if mode % 4 == 1 else valid.masked
    shares = body if mode % 4 == 2 else valid.shares
    header = recording.parse(valid.header.body)
    if mode & 8:
        size = rec.round.share_bytes
        header[6] = content_hash(masked)
        leaves = [shares[i : i + size] for i in range(0, len(shares), size)] or [b""]
        header[7] = merkle_root(leaves[: len(rec.committee)])
    letter = recording.Letter(Header, recording.pack(header), rec.devices[number])
    return Contribution(letter.signed, masked, shares)


def one_input(data: bytes) -> None:
    if len(data) < 3:
        return
    entry, kind, mode, body = data[0] % ENTRIES, KINDS[data[1] % len(KINDS)], data[2], data[3:]
    if entry < len(PLACES):
        rec, target = PLACES[entry]
        recording.attack(target, wire(rec, kind, mode, body))
        return
    rec, entry = RECORDINGS[(entry - len(PLACES)) % 2], (entry - len(PLACES)) // 2
    if entry == DECODE:
        recording.give_bytes(recording.KINDS[data[1] % len(recording.KINDS)], body)
        recording.give_bytes(None, body)
    elif entry == WIRE:
        for target in rec.targets:
            recording.attack(target, body)
    elif entry == EPOCH:
        recording.give_epoch(rec, signed_body(rec, Epoch, mode, body))
    elif entry == TICKET:
        recording.give_round(rec, signed_body(rec, Ticket, mode, body))
    elif entry == CONTRIBUTION:
        recording.give_contribution(rec, contribution(rec, mode, body))
    elif entry == SHARES:
        header = messages.decode(Header, rec.contributions[mode % len(rec.contributions)].header.body)
        recording.give_shares(rec, header, body)
    else:
        for target in rec.targets:
            recording.attack(target, nested(rec, mode, body))


def change(data: bytes, max_size: int, seed: int) -> bytes:
    """libFuzzer's own changes half of the time; otherwise one that keeps the rest of the body a well-formed message."""
    rng = Random(seed)
    if len(data) < 4 or rng.randrange(2):
        return atheris.Mutate(data, max_size)
    head = bytearray(data[:3])
    if rng.randrange(4) == 0:
        head[rng.randrange(3)] = rng.randrange(256)
    donor = recording.parse(rng.choice(RECORDINGS[0].letters).body)
    body = recording.pack(recording.mutate_tree(rng, recording.parse(data[3:]), donor))
    return (bytes(head) + body)[:max_size]


def write_seeds(folder: Path) -> None:
    """The recorded rounds' messages to the parties in every phase, and the other entries' valid inputs."""
    seeds: list[bytes] = []
    for entry, (rec, _) in enumerate(PLACES):
        for kind in KINDS:
            letters = [letter for letter in rec.letters if letter.kind is kind]
            seeds += [bytes([entry, KINDS.index(kind), INTACT]) + letter.body for letter in letters[:2]]
    for which, rec in enumerate(RECORDINGS):
        first = len(PLACES) + which
        for letter in rec.letters:
            number = KINDS.index(letter.kind)
            seeds.append(bytes([first + 2 * DECODE, recording.KINDS.index(letter.kind), 0]) + letter.body)
            seeds.append(bytes([first + 2 * WIRE, number, 0]) + letter.wire)
            if letter.kind is Epoch:
                seeds.append(bytes([first + 2 * EPOCH, number, INTACT]) + letter.body)
            if letter.kind is Ticket:
                seeds.append(bytes([first + 2 * TICKET, number, INTACT]) + letter.body)
            if letter.kind is Header:
                seeds.append(bytes([first + 2 * CONTRIBUTION, number, 0]) + letter.body)
                seeds.append(bytes([first + 2 * NESTED, number, 1]) + letter.body)
            if letter.kind is messages.PrekeyOffer:
                seeds.append(bytes([first + 2 * NESTED, number, 0]) + letter.body)
        valid = rec.contributions[0]
        for mode in (1, 9):
            seeds.append(bytes([first + 2 * CONTRIBUTION, 0, mode]) + valid.masked)
            seeds.append(bytes([first + 2 * CONTRIBUTION, 0, mode + 1]) + valid.shares)
        seeds.append(bytes([first + 2 * SHARES, 0, 0]) + valid.shares)
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        (folder / content_hash(seed).hex()).write_bytes(seed)


def main() -> None:
    corpus = [Path(argument) for argument in sys.argv[1:] if not argument.startswith("-")]
    if corpus and not corpus[0].is_file():  # a file is a finding to replay
        write_seeds(corpus[0])
    arguments = sys.argv if any(a.startswith("-max_len") for a in sys.argv) else [*sys.argv, "-max_len=65536"]
    atheris.Setup(arguments, one_input, custom_mutator=change)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
