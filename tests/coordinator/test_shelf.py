"""What devices may fetch, and what no longer."""

import pytest

from coordinator.shelf import Shelf
from edge_sdk.transport.chunks import Blob
from edge_sdk.transport.wire import INLINE_BYTES, BlobRef

LONG = bytes(INLINE_BYTES + 1)


@pytest.fixture
def shelf(tmp_path):
    for name in (b"one", b"two"):
        (tmp_path / name.decode()).write_bytes(name * 100)
    shelf = Shelf(lambda name: tmp_path / name.decode())
    yield shelf
    shelf.close()


def test_a_file_is_found_by_its_blob_for_as_long_as_it_is_kept(shelf):
    shelf.keep([b"one", b"two", b"one"], ())
    one, two = shelf.file(b"one"), shelf.file(b"two")
    assert (one, two) == (Blob.of(b"one" * 100).ref, Blob.of(b"two" * 100).ref)
    blob = shelf.find(one.id)
    shelf.keep([b"one"], ())
    assert shelf.find(one.id) is blob, "it was read and hashed again"
    assert shelf.find(two.id) is None
    with pytest.raises(KeyError):
        shelf.file(b"two")


def test_what_is_on_its_way_is_served_to_its_end_though_it_is_kept_no_more(shelf, tmp_path):
    shelf.keep([b"one"], ())
    blob = shelf.find(shelf.file(b"one").id)
    shelf.keep((), ())
    (tmp_path / "one").unlink()
    assert bytes(blob.chunk(0).data) == b"one" * 100


def test_a_message_goes_in_the_frame_if_it_fits_and_may(shelf):
    assert shelf.parcel(b"round", b"short") == b"short"
    apart, long = shelf.parcel(b"round", b"short", inline=False), shelf.parcel(b"epoch", LONG)
    for parcel, message in ((apart, b"short"), (long, LONG)):
        assert isinstance(parcel, BlobRef)
        assert shelf.find(parcel.id).ref == Blob.of(message).ref


def test_a_message_goes_with_its_owner(shelf):
    first, second = shelf.parcel(b"round", LONG), shelf.parcel(b"epoch", LONG + b"\1")
    shelf.keep((), {b"epoch"})
    assert shelf.find(first.id) is None
    assert shelf.find(second.id) is not None


def test_a_message_is_hashed_once_however_many_are_told_of_it(shelf, monkeypatch):
    first = shelf.parcel(b"round", LONG)
    monkeypatch.setattr(Blob, "of", lambda data: pytest.fail("hashed again"))
    assert shelf.parcel(b"round", LONG) == first


def test_a_message_that_was_put_on_the_shelf_still_goes_in_a_frame_that_has_room(shelf):
    assert isinstance(shelf.parcel(b"round", b"short", inline=False), BlobRef)
    assert shelf.parcel(b"round", b"short") == b"short"
