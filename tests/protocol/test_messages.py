"""The schema: one encoding a message, and nothing else comes in."""

from __future__ import annotations

from random import Random
from typing import Any

import msgspec
import pytest
import recording
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import inspect

from edge_sdk.crypto.identity import Identity
from edge_sdk.errors import PeerError
from edge_sdk.protocol import messages
from edge_sdk.protocol.messages import (
    MAX_MESSAGE_BYTES,
    PLAIN,
    SIGNED,
    Abort,
    Certificate,
    Complaint,
    Envelope,
    Grouping,
    Header,
    Message,
    NoisePlan,
    Receipt,
    Release,
    Seal,
    SealSignature,
    Signed,
    Ticket,
    Transcript,
    Work,
    decode,
    encode,
    label_of,
    message_hash,
    sign,
    unwrap,
    verify,
    verify_author,
    wrap,
)

ALICE, BOB = Identity(b"\x01" * 32), Identity(b"\x02" * 32)
KIND_IDS = [kind.__name__ for kind in recording.KINDS]


def values(kind: inspect.Type) -> st.SearchStrategy[Any]:
    """Values of a schema type, inside its limits."""
    match kind:
        case inspect.NoneType():
            return st.none()
        case inspect.IntType(ge=low, le=high, lt=below):
            return st.integers(low, high if high is not None else below - 1)  # type: ignore[operator]
        case inspect.FloatType(gt=above, lt=below, le=most) if above is not None:
            return st.floats(above, most or below, exclude_min=True, exclude_max=most is None)
        case inspect.FloatType(ge=least, lt=below):
            return st.floats(least, below, exclude_max=True).map(abs)  # minus zero is refused
        case inspect.StrType(pattern=None, min_length=low, max_length=high):
            return st.text(min_size=low or 0, max_size=min(high or 40, 40))
        case inspect.StrType(max_length=high):
            return st.from_regex(r"\A[a-z0-9][a-z0-9._-]{0,63}\Z")
        case inspect.BytesType(min_length=low, max_length=high):
            return st.binary(min_size=low or 0, max_size=high if low == high else (low or 0) + 40)
        case inspect.LiteralType(values=choices):
            return st.sampled_from(choices)
        case inspect.ListType(item_type=item, min_length=low):
            return st.lists(values(item), min_size=low or 0, max_size=(low or 0) + 3)
        case inspect.TupleType(item_types=items):
            return st.tuples(*map(values, items))
        case inspect.UnionType(types=kinds):
            return st.one_of(*map(values, kinds))
        case inspect.StructType(cls=cls, fields=fields):
            return st.builds(cls, *(values(field.type) for field in fields))
        case _:
            raise NotImplementedError(kind)


def message_of(kind: type[Message]) -> st.SearchStrategy[Message]:
    return values(inspect.type_info(kind))


def refused(kind: type[Message], data: bytes) -> str:
    with pytest.raises(PeerError) as caught:
        decode(kind, data)
    assert str(caught.value).startswith(f"{label_of(kind)}: ")
    return str(caught.value)


@pytest.mark.parametrize("kind", recording.KINDS, ids=KIND_IDS)
def test_what_is_encoded_decodes_to_the_same_message(kind):
    @settings(max_examples=40)
    @given(message_of(kind))
    def check(message):
        data = encode(message)
        assert decode(kind, data) == message
        assert encode(decode(kind, data)) == data

    check()


@pytest.mark.parametrize("kind", recording.KINDS, ids=KIND_IDS)
def test_any_bytes_decode_to_a_message_or_a_peer_error(kind):
    @settings(max_examples=60)
    @given(st.binary(max_size=200))
    def check(data):
        recording.give_bytes(kind, data)

    check()


@pytest.mark.parametrize("kind", recording.KINDS, ids=KIND_IDS)
def test_a_mutated_encoding_is_refused_or_is_the_canonical_one_of_another_message(kind):
    @settings(max_examples=120)
    @given(message_of(kind), message_of(kind), st.randoms(use_true_random=False))
    def check(message, other, rng):
        tree = recording.parse(encode(message))
        for _ in range(rng.choice((1, 1, 2))):
            tree = recording.mutate_tree(rng, tree, recording.parse(encode(other)))
        recording.give_bytes(kind, recording.pack(tree))

    check()


@pytest.mark.parametrize("kind", recording.KINDS, ids=KIND_IDS)
def test_every_node_has_one_encoding_only(kind):
    """Each node of a message in every other form that MessagePack has for it: none of them decodes."""

    @settings(max_examples=5)
    @given(message_of(kind))
    def check(message):
        data = encode(message)
        for odd in one_odd_node(recording.parse(data)):
            if odd != data:
                refused_or_different(kind, odd, message)

    check()


def one_odd_node(tree):
    """Encodings of the tree in which exactly one node is in another form."""
    yield from recording.odd_encodings(tree)
    if isinstance(tree, list):
        for i, item in enumerate(tree[:20]):
            for odd in one_odd_node(item):
                yield recording.pack([*tree[:i], recording.Raw(odd), *tree[i + 1 :]])


def refused_or_different(kind, data, message):
    decoded = recording.give_bytes(kind, data)
    assert decoded is None or decoded != message, "two encodings of one message"


NOISE = ["device", 1.0, 1e-4, 100.0, 0.05, 2.0, 1.0, 0.3]
"""A plan's fields; and a work's."""
WORK = [0.1, 1, 0, 0.01, 600]


@pytest.mark.parametrize("field", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), float("-inf"), -0.0, 0.0, -1.0, 1e30, 1.8e308], ids=str
)  # fmt: skip
def test_a_noise_plan_holds_positive_finite_numbers_only(field, value):
    parts = [*NOISE]
    parts[field] = value
    assert f"`{NoisePlan.__struct_fields__[field]}`" in refused(NoisePlan, msgspec.msgpack.encode(parts))


@pytest.mark.parametrize(("kind", "fields", "at"), [(NoisePlan, NOISE, 4), (Work, WORK, 0), (Work, WORK, 3)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), -0.0, -1.0, 1e30], ids=str)
def test_a_number_that_may_be_zero_is_finite_and_has_one_zero(kind, fields, at, value):
    parts = [*fields]
    parts[at] = 0.0
    assert encode(decode(kind, msgspec.msgpack.encode(parts))) == msgspec.msgpack.encode(parts)
    parts[at] = value
    assert kind.__struct_fields__[at] in refused(kind, msgspec.msgpack.encode(parts))


@pytest.mark.parametrize("field", [6, 7])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.0, 0.0, -1.0, 1.0 + 2.0**-52], ids=str)
def test_a_rate_is_above_0_and_at_most_1(field, value):
    parts = [*NOISE]
    parts[field] = value
    assert f"`{NoisePlan.__struct_fields__[field]}`" in refused(NoisePlan, msgspec.msgpack.encode(parts))


@pytest.mark.parametrize("value", [1, True, b"\x00", "1", None, [1.0]], ids=repr)
def test_a_float_is_not_taken_from_another_type(value):
    refused(NoisePlan, msgspec.msgpack.encode(["device", value, *NOISE[2:]]))


@pytest.mark.parametrize(
    ("kind", "fields", "says"),
    [
        (Grouping, [0, 1], "`groups`"),
        (Grouping, [65, 1], "`groups`"),
        (Grouping, [1, 0], "`corrupt`"),
        (Grouping, [-1, 1], "`groups`"),
        (Grouping, [1.0, 1], "`groups`"),
        (Grouping, [True, 1], "`groups`"),
        (Grouping, ["1", 1], "`groups`"),
        (Grouping, [2**64 - 1, 1], "`groups`"),
        (Grouping, [1], "at least length 2"),
        (Grouping, [1, 1, 1], "at most length 2"),
        (Grouping, {"groups": 1, "corrupt": 1}, "Expected `array`"),
        (SealSignature, [bytes(31), bytes(32), 1], "`tid`"),
        (SealSignature, [bytes(33), bytes(32), 1], "`tid`"),
        (SealSignature, ["0" * 32, bytes(32), 1], "`tid`"),
        (SealSignature, [bytes(32), bytes(32), 0], "`member`"),
        (SealSignature, [bytes(32), bytes(32), 257], "`member`"),
        (Receipt, [bytes(32), 1 << 20, bytes(32)], "`sender`"),
        (Receipt, [bytes(32), -1, bytes(32)], "`sender`"),
        (Seal, [bytes(32), []], "`groups`"),
        (Seal, [bytes(32), [[]] * 65], "`groups`"),
        (Seal, [bytes(32), [[[0, bytes(32), 0]]]], "`groups[0][0]`"),
        (Release, [bytes(32), bytes(32), 1, [b"\0"]], "`sums[0]`"),
        (Release, [bytes(32), bytes(32), 1, [bytes(4097)]], "`sums[0]`"),
        (Abort, [bytes(32), ""], "`reason`"),
        (Abort, [bytes(32), "a" * 513], "`reason`"),
        (Abort, [bytes(32), b"reason"], "`reason`"),
        (Certificate, [bytes(32), bytes(32), [[1, bytes(63)]]], "`signatures[0][1]`"),
        (Complaint, [bytes(32), 1, list(range(10_001))], "`senders`"),
        (Signed, [b"", bytes(65)], "`signature`"),
    ],
)
def test_a_field_outside_its_limits_is_named(kind, fields, says):
    assert says in refused(kind, msgspec.msgpack.encode(fields))


@pytest.mark.parametrize("name", ["", "A", "a b", "a\n", "-a", "é", "a" * 65, "a/b", "a\0"])
def test_a_task_has_a_plain_name(name):
    ticket = next(x for x in recording.recording().letters if x.kind is Ticket)
    tree = recording.parse(ticket.body)
    tree[2] = name
    assert "`task`" in refused(Ticket, recording.pack(tree))


@pytest.mark.parametrize(
    "value", ["`$[99]", " - at `$[99]`", " - at `$[1]`", " - at `$[-1]`", " - at `$[\u0663]`", "`$[" + "9" * 5000 + "]"]
)
def test_a_value_that_looks_like_a_place_is_an_error_like_another(value):
    plan = msgspec.msgpack.encode([value, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    with pytest.raises(PeerError, match="noiseplan: ") as refused:
        decode(NoisePlan, plan)
    if len(value) < 100:
        assert str(refused.value).endswith("at `unit`")
    with pytest.raises(PeerError):
        decode(Signed, msgspec.msgpack.encode(value))


@pytest.mark.parametrize("header", [b"\xdd\xff\xff\xff\xff", b"\xdd\x7f\xff\xff\xff", b"\xdc\xff\xff"])
@pytest.mark.parametrize("kind", recording.KINDS, ids=KIND_IDS)
def test_a_declared_length_is_not_believed(kind, header):
    """2^32 - 1 announced items take no memory: the limit, or the end of the data, is met first."""
    tree = recording.parse(encode(example(kind)))
    refused(kind, header + recording.pack(tree)[1:])
    for i, item in enumerate(tree):
        if isinstance(item, list):
            refused(kind, recording.pack([*tree[:i], recording.Raw(header), *tree[i + 1 :]]))


def example(kind: type[Message]) -> Message:
    """One message of the kind, from the recorded round where it holds one."""
    for letter in recording.recording().letters:
        if letter.kind is kind:
            return decode(kind, letter.body)
    rec = recording.recording()
    ticket, seal = rec.round.ticket, rec.letters[0]
    nested: dict[type[Message], Message] = {
        Signed: seal.signed,
        Envelope: Envelope("ticket", b"\x90"),
        NoisePlan: ticket.noise,
        Work: ticket.work,
        messages.Anchor: messages.Anchor(3, bytes(32)),
        Grouping: Grouping(1, 1),
        messages.Frozen: rec.epoch.frozen,
        messages.Member: rec.epoch.members[0],
        messages.SealedShare: messages.SealedShare(bytes(40), [bytes(32)]),
        messages.GroupResult: messages.GroupResult(3, None, "a reason"),
    }
    return nested[kind]


@pytest.mark.parametrize("code", [b"\x91", b"\x81\x00", b"\x81\x90"])
@pytest.mark.parametrize("kind", recording.KINDS, ids=KIND_IDS)
def test_deep_nesting_ends_in_a_peer_error(kind, code):
    refused(kind, code * 100_000 + b"\xc0")
    tree = recording.parse(encode(example(kind)))
    refused(kind, recording.pack([recording.Raw(code * 100_000 + b"\xc0"), *tree[1:]]))


def test_a_message_over_the_size_limit_is_refused_before_it_is_parsed():
    assert str(MAX_MESSAGE_BYTES) in refused(Abort, bytes(MAX_MESSAGE_BYTES + 1))


def test_text_that_is_not_utf8_is_refused():
    for text in (b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\xf4\x90\x80\x80"):
        refused(Abort, b"\x92\xc4\x20" + bytes(32) + bytes([0xA0 | len(text)]) + text)


def test_every_kind_that_travels_is_recorded():
    assert recording.unused_names() == ()


def test_every_label_is_distinct():
    labels = [label_of(kind) for kind in recording.KINDS]
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize("kind", SIGNED + PLAIN, ids=label_of)
def test_a_wrapped_message_unwraps_to_its_kind(kind):
    message = example(kind)
    sent = sign(ALICE, message) if kind in SIGNED else message
    assert unwrap(wrap(kind, sent)) == (kind, sent)


@pytest.mark.parametrize("kind", sorted(set(recording.KINDS) - set(SIGNED) - set(PLAIN), key=label_of), ids=label_of)
def test_a_kind_that_does_not_travel_does_not_unwrap(kind):
    with pytest.raises(PeerError, match="no message is called"):
        unwrap(wrap(kind, example(kind)))


def test_a_signature_is_good_for_its_kind_and_author_only():
    for signed_kind in SIGNED:
        signed = sign(ALICE, example(signed_kind))
        assert verify(signed_kind, ALICE.public_key, signed) == example(signed_kind)
        with pytest.raises(PeerError, match="signature is not valid"):
            verify(signed_kind, BOB.public_key, signed)
        for other in SIGNED:
            if other is not signed_kind:
                with pytest.raises(PeerError, match=f"{label_of(other)}: the signature is not valid"):
                    verify(other, ALICE.public_key, signed)


def test_a_body_that_the_author_signed_but_is_none_of_the_kind_is_refused():
    for kind in SIGNED:
        for body in (b"", b"\xc0", b"\x90", encode(NOISE)):
            signed = Signed(body, ALICE.sign(label_of(kind), body))
            with pytest.raises(PeerError, match=f"^{label_of(kind)}: "):
                verify(kind, ALICE.public_key, signed)


def test_the_named_author_must_have_signed():
    statement = SealSignature(bytes(32), bytes(32), 1)
    keys = {1: ALICE.public_key, 2: BOB.public_key}
    assert verify_author(SealSignature, sign(ALICE, statement), lambda s: keys[s.member]) == statement
    with pytest.raises(PeerError, match="signature is not valid"):
        verify_author(SealSignature, sign(BOB, statement), lambda s: keys[s.member])


def test_a_hash_is_of_its_kind():
    hashes = {message_hash(kind, b"body") for kind in recording.KINDS}
    assert len(hashes) == len(recording.KINDS)


@given(st.binary(max_size=120))
def test_any_bytes_unwrap_or_are_refused(data):
    recording.give_bytes(None, data)


@settings(max_examples=300)
@given(st.randoms(use_true_random=False), st.sampled_from(["everyone", "helpers"]))
def test_a_mutated_wire_message_unwraps_canonically_or_is_refused(rng: Random, committee):
    recording.give_bytes(None, recording.hostile_wire(rng, recording.recording(committee)))


def test_no_message_holds_a_place_for_what_is_not_in_the_schema():
    for kind in recording.KINDS:
        data = encode(example(kind))
        tree = recording.parse(data)
        for extra in (None, 0, b"", []):
            refused(kind, recording.pack([*tree, extra]))
        refused(kind, data + b"\x00")
        refused(kind, data[:-1])


def test_headers_and_transcripts_are_whole_in_the_recording():
    """The fuzz starts from messages with every optional part present."""
    rec = recording.recording("helpers")
    kinds = {x.kind: decode(x.kind, x.body) for x in rec.letters}
    assert kinds[Header].enrolment
    assert all(result.sum is not None for result in kinds[Transcript].groups)
    assert len(kinds[Certificate].signatures) >= rec.round.thresholds.quorum
