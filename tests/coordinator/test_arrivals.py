"""Grants: bounded memory, in order, and nothing is kept of who went away."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.arrivals import Arrivals
from edge_sdk.errors import PeerError
from edge_sdk.protocol.messages import Signed
from edge_sdk.transport.chunks import Blob
from edge_sdk.transport.wire import CHUNK_BYTES, Chunk

HEADER = Signed(b"", bytes(64))
BLOBS = [Blob.of(bytes([k]) * size) for k, size in enumerate((10, 10, 25, 40, CHUNK_BYTES + 5))]
MEMORY = 50


def granted(arrivals: Arrivals, now_s: float) -> list[str]:
    return [device for device, _ in arrivals.pulls(now_s)]


actions = st.lists(
    st.tuples(
        st.sampled_from(["ask", "chunk", "end", "leave", "pulls", "round"]),
        st.sampled_from("abcd"),
        st.integers(0, 3),
        st.floats(0, 40),
    ),
    max_size=40,
)


@settings(max_examples=200)
@given(actions)
def test_memory_is_what_is_granted_and_never_more_than_was_given(steps):
    arrivals, now_s = Arrivals(MEMORY, stall_s=30.0), 0.0
    for action, device, which, seconds in steps:
        now_s += seconds
        blob = BLOBS[which]
        try:
            match action:
                case "ask":
                    arrivals.ask(device, blob.ref, HEADER, bytes([which]), now_s, limit=2)
                case "chunk":
                    arrivals.add(device, blob.chunk(0), now_s)
                case "end":
                    arrivals.end(device, blob.ref.id)
                case "leave":
                    arrivals.leave(device)
                case "pulls":
                    list(arrivals.pulls(now_s))
                case "round":
                    arrivals.end_round(bytes([which]))
        except PeerError:
            pass
        in_use = sum(arrival.ref.size for arrival in arrivals._granted.values())
        assert arrivals.granted_bytes == in_use <= MEMORY
        counts = arrivals._of_device
        assert sum(counts.values()) == len(arrivals)
        assert all(0 < count <= 2 for count in counts.values())
    for device in "abcd":
        for blob in BLOBS:
            arrivals.end(device, blob.ref.id)
    assert (arrivals.granted_bytes, len(arrivals)) == (0, 0)


def test_grants_are_given_in_the_order_of_asking():
    arrivals = Arrivals(MEMORY)
    for device, blob in (("a", BLOBS[3]), ("b", BLOBS[2]), ("c", BLOBS[0])):
        arrivals.ask(device, blob.ref, HEADER, b"", 0.0)
    assert granted(arrivals, 0.0) == ["a"]  # b does not fit beside it, and c waits behind b
    arrivals.end("a", BLOBS[3].ref.id)
    assert granted(arrivals, 0.0) == ["b", "c"]


def test_a_grant_that_brings_nothing_goes_to_who_waits_and_its_device_waits_again():
    arrivals = Arrivals(40, stall_s=30.0)
    arrivals.ask("a", BLOBS[3].ref, HEADER, b"", 0.0)
    assert granted(arrivals, 0.0) == ["a"]
    assert granted(arrivals, 100.0) == ["a"]  # nobody waits: it is asked again
    arrivals.ask("b", BLOBS[3].ref, HEADER, b"", 100.0)
    assert granted(arrivals, 101.0) == ["b"]
    assert arrivals.holds("a", BLOBS[3].ref.id)


def test_who_comes_back_goes_on_where_it_was():
    blob, arrivals = BLOBS[4], Arrivals(1 << 20)
    arrivals.ask("a", blob.ref, HEADER, b"", 0.0)
    assert granted(arrivals, 0.0) == ["a"]
    arrivals.add("a", blob.chunk(0), 0.0)
    arrivals.leave("a")
    assert granted(arrivals, 1.0) == []
    arrivals.ask("a", blob.ref, HEADER, b"", 2.0)
    ((_, pull),) = arrivals.pulls(2.0)
    assert pull.chunks == [1]
    assert arrivals.add("a", blob.chunk(1), 2.0) is not None


def test_who_went_away_gives_its_memory_to_who_waits():
    arrivals = Arrivals(40)
    arrivals.ask("a", BLOBS[3].ref, HEADER, b"", 0.0)
    list(arrivals.pulls(0.0))
    arrivals.leave("a")
    arrivals.ask("b", BLOBS[3].ref, HEADER, b"", 1.0)
    assert granted(arrivals, 1.0) == ["b"]
    assert not arrivals.holds("a", BLOBS[3].ref.id)


@pytest.mark.parametrize("header", [HEADER, None])
def test_chunks_of_another_blob_length_or_device_are_refused(header):
    blob, arrivals = BLOBS[4], Arrivals(1 << 20)
    arrivals.ask("a", blob.ref, header, b"", 0.0)
    list(arrivals.pulls(0.0))
    good = blob.chunk(1)
    for device, chunk in (
        ("b", good),
        ("a", BLOBS[0].chunk(0)),
        ("a", Chunk(good.blob, 1, bytes(good.data) + b"x", good.proof)),
        ("a", Chunk(good.blob, 2, b"x", good.proof)),
        ("a", Chunk(good.blob, 0, good.data, good.proof)),
    ):
        with pytest.raises(PeerError):
            arrivals.add(device, chunk, 0.0)


def test_a_letters_chunks_are_proved_at_once_and_an_uploads_when_the_whole_is_wrong():
    blob = BLOBS[4]
    wrong = Chunk(blob.ref.id, 1, b"other", blob.chunk(1).proof)
    letters, uploads = Arrivals(1 << 20), Arrivals(1 << 20)
    letters.ask("a", blob.ref, None, None, 0.0)
    uploads.ask("a", blob.ref, HEADER, b"", 0.0)
    for arrivals in (letters, uploads):
        list(arrivals.pulls(0.0))
        arrivals.add("a", blob.chunk(0), 0.0)
    with pytest.raises(PeerError, match="root"):
        letters.add("a", wrong, 0.0)
    arrival = uploads.add("a", wrong, 0.0)
    assert arrival.recheck()
    ((_, pull),) = uploads.pulls(0.0)
    assert pull.chunks == [1]
    assert uploads.add("a", blob.chunk(1), 0.0) is arrival
    assert arrival.download.data() == bytes([4]) * (CHUNK_BYTES + 5)
    assert not arrival.recheck()  # nothing was damaged: it is what its device sent


def test_a_second_offer_of_a_blob_changes_neither_its_header_nor_what_was_checked():
    blob, arrivals = BLOBS[4], Arrivals(1 << 20)
    first, other = object(), object()
    arrivals.ask("a", blob.ref, HEADER, b"", 0.0, checked=first)
    arrivals.ask("a", blob.ref, Signed(b"x", bytes(64)), b"", 0.0, checked=other)
    list(arrivals.pulls(0.0))
    arrivals.ask("a", blob.ref, Signed(b"x", bytes(64)), b"", 0.0, checked=other)
    arrivals.add("a", blob.chunk(0), 0.0)
    arrival = arrivals.add("a", blob.chunk(1), 0.0)
    assert (arrival.header, arrival.checked) == (HEADER, first)


def test_a_buffer_that_is_read_when_its_upload_ends_is_nobody_elses_and_counts_until_then():
    blob, arrivals, is_written = BLOBS[4], Arrivals(BLOBS[4].ref.size), False
    for device in "ab":
        arrivals.ask(device, blob.ref, HEADER, b"", 0.0)
    assert granted(arrivals, 0.0) == ["a"]
    arrivals.add("a", blob.chunk(0), 0.0)
    arrival = arrivals.add("a", blob.chunk(1), 0.0)
    view = arrival.download.view()
    arrival.is_free = lambda: is_written
    arrivals.end("a", blob.ref.id)
    assert granted(arrivals, 0.0) == []
    assert arrivals.granted_bytes == blob.ref.size
    is_written = True
    assert granted(arrivals, 0.0) == ["b"]
    assert arrivals.add("b", Chunk(blob.ref.id, 1, memoryview(bytes(5)), []), 0.0) is None
    assert bytes(view[CHUNK_BYTES:]) == bytes(5)  # the same buffer


def test_an_upload_in_the_buffer_of_another_gives_nothing_of_it_out():
    old, new = Blob.of(b"\1" * (CHUNK_BYTES + 5)), Blob.of(b"\2" * (CHUNK_BYTES + 5))
    arrivals = Arrivals(1 << 20)
    for device, blob in (("a", old), ("b", new)):
        arrivals.ask(device, blob.ref, HEADER, b"", 0.0)
        list(arrivals.pulls(0.0))
        arrivals.add(device, blob.chunk(1), 0.0)
        arrival = arrivals.add(device, blob.chunk(0), 0.0)
        assert arrival.download.view() == blob._pieces.read(0, blob.ref.size)
        arrivals.end(device, blob.ref.id)
    assert arrivals._spare != []


def test_buffers_that_are_kept_and_grants_take_no_more_memory_than_was_given():
    size, arrivals = CHUNK_BYTES, Arrivals(4 * CHUNK_BYTES)
    for k in range(4):
        arrivals.ask(f"{k}", Blob.of(bytes([k]) * size).ref, HEADER, b"", 0.0, limit=1)
    list(arrivals.pulls(0.0))
    for k in range(4):
        arrivals.end(f"{k}", Blob.of(bytes([k]) * size).ref.id)
    assert len(arrivals._spare) == 4
    arrivals.ask("letter", Blob.of(b"l" * (size + 1)).ref, None, None, 0.0)
    list(arrivals.pulls(0.0))
    assert sum(map(len, arrivals._spare)) + arrivals.granted_bytes <= arrivals.memory_bytes


def test_what_nobody_touched_is_asked_for_again_when_its_time_comes():
    arrivals = Arrivals(1 << 20)
    arrivals.ask("a", BLOBS[4].ref, HEADER, b"", 0.0)
    assert granted(arrivals, 0.0) == ["a"]
    due_s = arrivals.due_s
    assert granted(arrivals, due_s - 0.1) == []
    assert granted(arrivals, due_s) == ["a"]
    assert arrivals.due_s > due_s
