"""Frames: what was encoded decodes to the same, and no bytes from outside give anything but a frame or a PeerError."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.errors import PeerError
from edge_sdk.protocol.messages import Signed
from edge_sdk.transport.wire import (
    CHUNK_BYTES,
    INLINE_BYTES,
    MAX_BLOB_BYTES,
    MAX_FRAME_BYTES,
    MAX_PULL,
    BlobRef,
    Chunk,
    Enrolment,
    Gone,
    HeldPrekeys,
    Hello,
    Leaving,
    Letter,
    Position,
    Prekeys,
    Pull,
    Refusal,
    TaskState,
    Upload,
    Welcome,
    decode_down,
    decode_up,
    encode_frame,
)

hashes = st.binary(min_size=32, max_size=32)
names = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,63}", fullmatch=True)
counters = st.integers(0, (1 << 53) - 1)
proofs = st.lists(hashes, max_size=20)
signed = st.builds(Signed, body=st.binary(max_size=200), signature=st.binary(min_size=64, max_size=64))
refs = st.builds(BlobRef, id=hashes, size=st.integers(1, MAX_BLOB_BYTES))
parcels = st.binary(max_size=200) | refs
indices = st.integers(0, (1 << 20) - 1)
positions = st.builds(Position, task=names, round=st.integers(-1, (1 << 53) - 1))
states = st.builds(TaskState, model=st.binary(max_size=200), bundle=refs, parameters=refs, ticket=st.none() | parcels)
both_ways = [
    st.builds(Letter, content=parcels),
    st.builds(Pull, blob=hashes, chunks=st.lists(indices, min_size=1, max_size=MAX_PULL)),
    st.builds(Chunk, blob=hashes, index=indices, data=st.binary(min_size=1, max_size=300), proof=proofs),
    st.builds(Gone, blob=hashes),
]
ups = st.one_of(
    *both_ways,
    st.builds(
        Hello,
        version=st.just(1),
        epoch=counters,
        spare_prekeys=st.integers(0, 1 << 16),
        prekeys_wanted=st.booleans(),
        tasks=st.lists(positions, max_size=5),
    ),
    st.builds(Prekeys, offers=st.lists(signed, max_size=5)),
    st.builds(Upload, header=signed, blob=refs),
    st.builds(Leaving),
)
downs = st.one_of(
    *both_ways,
    st.builds(
        Welcome,
        time_s=st.integers(0, (1 << 40) - 1),
        epoch=st.none() | parcels,
        enrolment=st.none() | st.builds(Enrolment, index=indices, proof=proofs),
        tasks=st.lists(states, max_size=4),
        shown=st.none() | signed,
        prekeys=st.none() | st.builds(HeldPrekeys, newest=counters, unused=st.lists(counters, max_size=5)),
    ),
    st.builds(Refusal, subject=hashes, reason=st.text(min_size=1, max_size=100), final=st.booleans()),
)


@given(ups)
def test_what_a_device_says_arrives_as_it_was_said(frame):
    assert decode_up(encode_frame(frame)) == frame


@given(downs)
def test_what_the_coordinator_says_arrives_as_it_was_said(frame):
    assert decode_down(encode_frame(frame)) == frame


@pytest.mark.parametrize("decode", [decode_up, decode_down])
@given(data=st.binary(max_size=400))
def test_garbage_is_the_peers_fault(decode, data):
    try:
        decode(data)
    except PeerError as error:
        assert str(error).startswith("frame: ")  # noqa: PT017 - most garbage is refused, some is a frame


@given(frame=ups | downs, at=st.integers(0), value=st.integers(0, 255), cut=st.booleans())
@settings(max_examples=400)
def test_a_damaged_frame_is_another_frame_or_the_peers_fault(frame, at, value, cut):
    data = bytearray(encode_frame(frame))
    at %= len(data)
    data[at] = value
    for decode in (decode_up, decode_down):
        try:
            again = decode(bytes(data[: at + 1 if cut else None]))
        except PeerError as error:
            assert str(error).startswith("frame: ")  # noqa: PT017
        else:
            assert len(encode_frame(again)) <= len(data)


@pytest.mark.parametrize(
    ("frame", "field"),
    [
        (["hello", 2, 0, 0, False, []], "2|1"),
        (["hello", 1, -1, 0, False, []], r"\$\[2\]"),
        (["hello", 1, 0, 0, False, [["a", 0]] * 65], "length <= 64"),
        (["hello", 1, 0, 0, False, [["A/B", 0]]], "regex"),
        (["hello", 1, 0, 0, False], "length"),
        (["hello", 1, 0, 0, False, [], 0], "length"),
        (["pull", bytes(32), []], "length >= 1"),
        (["pull", bytes(32), [0] * (MAX_PULL + 1)], f"length <= {MAX_PULL}"),
        (["pull", bytes(31), [0]], "length >= 32"),
        (["pull", bytes(32), [1 << 20]], r"< 1048576|<= 1048575"),
        (["chunk", bytes(32), 0, b"", []], "length >= 1"),
        (["chunk", bytes(32), 0, bytes(CHUNK_BYTES + 1), []], f"length <= {CHUNK_BYTES}"),
        (["chunk", bytes(32), 0, b"x", [bytes(32)] * 21], "length <= 20"),
        (["letter", bytes(INLINE_BYTES + 1)], f"length <= {INLINE_BYTES}"),
        (["letter", [bytes(32), 0]], ">= 1"),
        (["letter", [bytes(32), MAX_BLOB_BYTES + 1]], f"<= {MAX_BLOB_BYTES}"),
        (["letter", "text"], "str"),
        (["welcome", 0, None, None, []], "welcome"),
        (["refusal", bytes(32), "reason", True], "refusal"),
        (["nonsense"], "nonsense"),
        ([], "length"),
        ({}, "object"),
    ],
)
def test_a_frame_out_of_bounds_is_refused_and_the_error_says_where(frame, field):
    with pytest.raises(PeerError, match=field):
        decode_up(msgspec.msgpack.encode(frame))


def test_a_device_does_not_take_what_only_devices_say():
    for frame in (Leaving(), Prekeys(offers=[])):
        with pytest.raises(PeerError, match="frame: "):
            decode_down(encode_frame(frame))


def test_what_is_over_the_limit_is_not_even_parsed():
    with pytest.raises(PeerError, match=f"{MAX_FRAME_BYTES + 1} bytes is over the limit"):
        decode_up(bytes(MAX_FRAME_BYTES + 1))


def test_deep_nesting_is_refused():
    with pytest.raises(PeerError, match="frame: "):
        decode_up(b"\x91" * 100_000)
