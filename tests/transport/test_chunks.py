"""Blobs by chunks: only what is of the blob is taken, and neither the network nor a kill at any write can spoil it."""

import errno
import hashlib
import itertools
import math
import os
import tracemalloc
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.crypto.hashing import tagged_hash
from edge_sdk.crypto.merkle import MerkleTree
from edge_sdk.errors import ParameterError, PeerError
from edge_sdk.transport.chunks import (
    MAX_RETRY_S,
    Blob,
    Download,
    FileDownload,
    blob_id,
    check_chunk,
    parcel_of,
)
from edge_sdk.transport.wire import (
    CHUNK_BYTES,
    INLINE_BYTES,
    MAX_BLOB_BYTES,
    MAX_FRAME_BYTES,
    MAX_PULL,
    BlobRef,
    Chunk,
    decode_up,
    encode_frame,
)

BORDERS = [1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES, 5 * CHUNK_BYTES + 7, 8 * CHUNK_BYTES]
sizes = st.one_of(
    st.integers(1, 64),
    st.builds(lambda chunks, by: max(1, chunks * CHUNK_BYTES + by), st.integers(0, 9), st.integers(-2, 2)),
)


def bytes_of(size: int, seed: int = 0) -> bytes:
    return hashlib.shake_128(seed.to_bytes(4, "little")).digest(size)


def root_by_definition(leaves: list[bytes]) -> bytes:
    """RFC 9162 section 2.1.1, word for word."""
    if len(leaves) == 1:
        return hashlib.sha256(b"\0" + leaves[0]).digest()
    k = 1 << (len(leaves) - 1).bit_length() - 1
    return hashlib.sha256(b"\1" + root_by_definition(leaves[:k]) + root_by_definition(leaves[k:])).digest()


def framed(part: bytes) -> bytes:
    return len(part).to_bytes(8, "little") + part


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def finish(download: Download | FileDownload, blob: Blob, now_s: float = 0.0) -> None:
    """Answer every Pull until the blob is complete."""
    while not download.complete:
        pull = download.pull(now_s)
        assert pull is not None
        for index in pull.chunks:
            download.add(blob.chunk(index), now_s)


@pytest.mark.parametrize("size", BORDERS)
def test_the_id_is_the_hash_of_size_and_root_as_documented(size):
    data = bytes_of(size)
    root = root_by_definition([data[at : at + CHUNK_BYTES] for at in range(0, size, CHUNK_BYTES)])
    expected = hashlib.sha256(framed(b"sordino/v1/blob") + framed(size.to_bytes(8, "little")) + framed(root)).digest()
    assert blob_id(data) == expected
    assert Blob.of(data).ref == BlobRef(id=expected, size=size)


@given(sizes, st.integers(1, MAX_PULL), st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_a_blob_arrives_whatever_is_lost_repeated_or_overtaken(size, window, chance):
    data = bytes_of(size)
    blob = Blob.of(data)
    download = Download(blob.ref, window)
    on_the_way: list[Chunk] = []
    now_s = 0.0
    for _ in range(400):
        if download.complete:
            break
        now_s = max(now_s, download.due_s) if not on_the_way else now_s
        if (pull := download.pull(now_s)) is not None:
            assert 1 <= len(pull.chunks) <= window
            assert pull.blob == blob.ref.id
            for index in pull.chunks:
                if chance.random() < 0.7:
                    on_the_way += [blob.chunk(index)] * chance.choice([1, 1, 1, 2])
        chance.shuffle(on_the_way)
        if on_the_way:
            download.add(on_the_way.pop(), now_s)
    assert download.complete
    assert download.data() == data
    assert bytes(download.view()) == data
    assert download.received_bytes == size
    assert download.pull(now_s) is None
    assert download.due_s == math.inf


@given(sizes, st.data())
@settings(max_examples=60)
def test_a_chunk_that_is_not_of_the_blob_is_refused_and_changes_nothing(size, data):
    blob = Blob.of(bytes_of(size))
    count = -(-size // CHUNK_BYTES)
    index = data.draw(st.integers(0, count - 1))
    good = blob.chunk(index)
    download = Download(blob.ref)
    bad = [
        msgspec.structs.replace(good, data=flipped(good.data, data.draw(st.integers(0, 8 * len(good.data) - 1)))),
        msgspec.structs.replace(good, data=good.data[:-1]),
        msgspec.structs.replace(good, data=bytes(good.data) + b"\0"),
        msgspec.structs.replace(good, blob=flipped(good.blob, data.draw(st.integers(0, 255)))),
        msgspec.structs.replace(good, proof=[*good.proof, bytes(32)]),
        msgspec.structs.replace(good, index=count),
        msgspec.structs.replace(good, index=(1 << 20) - 1),
    ]
    if count > 1:
        other = blob.chunk((index + 1) % count)
        place = data.draw(st.integers(0, len(good.proof) - 1))
        bit = data.draw(st.integers(0, 255))
        spoilt = [*good.proof[:place], flipped(good.proof[place], bit), *good.proof[place + 1 :]]
        bad += [
            msgspec.structs.replace(good, index=other.index),
            msgspec.structs.replace(good, proof=other.proof),
            msgspec.structs.replace(good, proof=good.proof[:-1]),
            msgspec.structs.replace(good, proof=spoilt),
        ]
    for chunk in bad:
        with pytest.raises(PeerError, match=r"^(chunk|inclusion proof): "):
            download.add(chunk, 0.0)
    assert download.received_bytes == 0
    assert download.due_s == 0.0
    download.add(good, 0.0)
    assert download.received_bytes == len(good.data)


@pytest.mark.parametrize("size", BORDERS)
def test_the_same_chunks_under_another_size_are_another_blob(size):
    blob = Blob.of(bytes_of(size))
    for wrong in {size - 1, size + 1, size + CHUNK_BYTES, 2 * size} - {0}:
        with pytest.raises(PeerError):
            check_chunk(BlobRef(id=blob.ref.id, size=wrong), blob.chunk(0))


@pytest.mark.parametrize("lengths", [(CHUNK_BYTES, 8), (CHUNK_BYTES, 6), (CHUNK_BYTES - 1, 7), (7, CHUNK_BYTES)])
def test_a_blob_whose_author_cut_it_elsewhere_is_refused_although_its_proofs_are_right(lengths):
    # Its chunks would lie over one another in the receiver's buffer, or run over its end.
    size = CHUNK_BYTES + 7
    leaves = [bytes_of(length, seed) for seed, length in enumerate(lengths)]
    tree = MerkleTree(leaves)
    ref = BlobRef(id=tagged_hash("blob", size.to_bytes(8, "little"), tree.root), size=size)
    download = Download(ref)
    refused = 0
    for index, leaf in enumerate(leaves):
        try:
            download.add(Chunk(blob=ref.id, index=index, data=leaf, proof=list(tree.proof(index))), 0.0)
        except PeerError as error:
            assert "instead of" in str(error)  # noqa: PT017 - one of the two may have the right length
            refused += 1
    assert refused >= 1
    assert not download.complete


def test_a_chunk_that_came_already_is_harmless():
    blob = Blob.of(bytes_of(3 * CHUNK_BYTES))
    download = Download(blob.ref)
    assert download.add(blob.chunk(1), 0.0) is True
    assert download.add(blob.chunk(1), 0.0) is False
    assert download.received_bytes == CHUNK_BYTES
    assert download.pull(0.0).chunks == [0, 2]


def test_what_is_asked_for_is_topped_up_when_half_of_it_came_and_never_asked_for_twice_in_time():
    blob = Blob.of(bytes_of(10 * CHUNK_BYTES))
    download = Download(blob.ref, window=4, retry_s=5.0)
    assert download.due_s == 0.0
    assert download.pull(100.0).chunks == [0, 1, 2, 3]
    assert download.pull(100.0) is None
    download.add(blob.chunk(0), 101.0)
    assert download.pull(101.0) is None
    download.add(blob.chunk(2), 101.0)
    assert download.due_s == 0.0
    assert download.pull(101.0).chunks == [4, 5]
    assert download.due_s == 106.0
    assert download.pull(105.9) is None


def test_what_did_not_come_is_asked_for_again_with_growing_delays_and_a_narrower_window():
    download = Download(Blob.of(bytes_of(10 * CHUNK_BYTES)).ref, window=8, retry_s=5.0)
    asked, times = [], []
    now_s = 0.0
    for _ in range(9):
        if asked:
            assert download.pull(now_s - 0.001) is None
        pull = download.pull(now_s) or pytest.fail("nothing was due")
        asked.append(pull.chunks)
        times.append(now_s)
        now_s = download.due_s
    assert asked[:5] == [list(range(8)), list(range(4)), [0, 1], [0], [0]]
    waits = [after - before for before, after in itertools.pairwise(times)]
    assert waits == [5.0, 10.0, 20.0, 40.0, 80.0, MAX_RETRY_S, MAX_RETRY_S, MAX_RETRY_S]


def test_a_slow_link_is_given_the_time_that_it_takes():
    blob = Blob.of(bytes_of(20 * CHUNK_BYTES))
    download = Download(blob.ref, window=4, retry_s=5.0)
    download.pull(0.0)
    download.add(blob.chunk(0), 4.0)
    download.add(blob.chunk(1), 12.0)
    download.pull(12.0)
    assert download.due_s == 12.0 + 3 * 8.0


def test_a_new_chunk_ends_the_growth_of_the_delay_and_widens_the_window_by_one():
    blob = Blob.of(bytes_of(20 * CHUNK_BYTES))
    download = Download(blob.ref, window=8, retry_s=5.0)
    download.pull(0.0)
    for now_s in (5.0, 15.0, 35.0):
        last = download.pull(now_s)
    assert last.chunks == [0]
    assert download.due_s == 35.0 + 40.0
    download.add(blob.chunk(0), 36.0)
    assert download.pull(36.0).chunks == [1, 2]
    assert download.due_s == 36.0 + 5.0
    download.add(blob.chunk(1), 36.0)
    assert download.pull(36.0).chunks == [3, 4]


def test_after_a_reconnect_what_was_under_way_is_asked_for_at_once():
    blob = Blob.of(bytes_of(5 * CHUNK_BYTES))
    download = Download(blob.ref, window=3)
    assert download.pull(0.0).chunks == [0, 1, 2]
    download.add(blob.chunk(1), 0.1)
    download.ask_again()
    assert download.due_s == 0.0
    assert download.pull(0.2).chunks == [0, 2, 3]


@pytest.mark.parametrize(
    ("window", "retry_s"), [(0, 1.0), (MAX_PULL + 1, 1.0), (1, 0.0), (1, math.nan), (1, math.inf), (1, -1.0)]
)
def test_a_download_with_impossible_settings_is_the_callers_fault(window, retry_s):
    with pytest.raises(ParameterError):
        Download(Blob.of(b"x").ref, window, retry_s=retry_s)


def test_an_incomplete_blob_is_not_given_out():
    download = Download(Blob.of(bytes_of(2 * CHUNK_BYTES)).ref)
    for give in (download.data, download.view):
        with pytest.raises(ParameterError, match=f"0 of the blob's {2 * CHUNK_BYTES} bytes"):
            give()


def test_no_blob_is_empty_or_over_the_limit(tmp_path):
    with pytest.raises(ParameterError, match="not 0"):
        Blob.of(b"")
    path = tmp_path / "blob"
    path.touch()
    with pytest.raises(ParameterError, match="not 0"):
        Blob.from_file(path)
    os.truncate(path, MAX_BLOB_BYTES + 1)
    with pytest.raises(ParameterError, match=str(MAX_BLOB_BYTES + 1)):
        Blob.from_file(path)
    for size in (0, MAX_BLOB_BYTES + 1):
        with pytest.raises(ParameterError):
            Download(BlobRef(id=bytes(32), size=size))


@pytest.mark.parametrize("index", [-1, 3, 1 << 40])
def test_a_chunk_outside_the_blob_is_the_callers_fault(index):
    with pytest.raises(ParameterError, match="outside a blob of 3"):
        Blob.of(bytes_of(2 * CHUNK_BYTES + 1)).chunk(index)


def test_the_largest_chunk_with_the_longest_proof_fits_a_frame():
    chunk = Chunk(blob=bytes(32), index=(1 << 20) - 1, data=bytes(CHUNK_BYTES), proof=[bytes(32)] * 20)
    frame = encode_frame(chunk)
    assert len(frame) <= MAX_FRAME_BYTES
    assert decode_up(frame) == chunk


def test_a_short_parcel_is_the_data_and_a_long_one_its_blob():
    short, long = bytes_of(INLINE_BYTES), bytes_of(INLINE_BYTES + 1)
    assert parcel_of(short) == (short, None)
    assert parcel_of(b"") == (b"", None)
    ref, blob = parcel_of(long)
    assert ref == blob.ref == BlobRef(id=blob_id(long), size=len(long))
    download = Download(ref)
    finish(download, blob)
    assert download.data() == long


@pytest.mark.parametrize("size", BORDERS)
def test_a_file_is_the_same_blob_as_its_bytes(tmp_path, size):
    data = bytes_of(size)
    path = tmp_path / "blob"
    path.write_bytes(data)
    from_file, in_memory = Blob.from_file(path), Blob.of(data)
    assert from_file.ref == in_memory.ref
    for index in range(-(-size // CHUNK_BYTES)):
        assert from_file.chunk(index) == in_memory.chunk(index)
    from_file.close()
    from_file.close()


def test_a_file_is_not_held_in_memory(tmp_path):
    path = tmp_path / "blob"
    path.write_bytes(bytes(100 * CHUNK_BYTES))
    tracemalloc.start()
    try:
        blob = Blob.from_file(path)
        blob.chunk(7)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 5 * CHUNK_BYTES


def test_a_file_that_is_replaced_is_served_as_it_was(tmp_path):
    path, newer = tmp_path / "blob", tmp_path / "newer"
    path.write_bytes(bytes_of(2 * CHUNK_BYTES, 1))
    newer.write_bytes(bytes_of(2 * CHUNK_BYTES, 2))
    blob = Blob.from_file(path)
    newer.replace(path)
    download = Download(blob.ref)
    finish(download, blob)
    assert download.data() == bytes_of(2 * CHUNK_BYTES, 1)


@pytest.mark.parametrize("change", [lambda f: f.write(b"?"), lambda f: f.truncate(5)])
def test_a_file_that_was_written_to_is_not_sent_as_the_blob(tmp_path, change):
    path = tmp_path / "blob"
    path.write_bytes(bytes_of(2 * CHUNK_BYTES))
    blob = Blob.from_file(path)
    with path.open("r+b") as file:
        change(file)
    with pytest.raises(ParameterError, match="has changed since"):
        blob.chunk(0)


# FileDownload


class KilledError(BaseException):
    """What a kill is to a process: nothing handles it."""


class Killer:
    """Ends the process, as it were, at the n-th call that changes the disk, which by then is done in part."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = math.inf
        self.part = 0.0
        pwrite, unlink = os.pwrite, Path.unlink

        def torn_pwrite(fd: int, data: bytes, offset: int) -> int:
            if self._dies():
                pwrite(fd, bytes(data)[: int(len(data) * self.part)], offset)
                raise KilledError
            return pwrite(fd, data, offset)

        def killed_unlink(path: Path, missing_ok: bool = False) -> None:
            if self._dies():
                raise KilledError
            unlink(path, missing_ok=missing_ok)

        monkeypatch.setattr(os, "pwrite", torn_pwrite)
        monkeypatch.setattr(Path, "unlink", killed_unlink)
        for name in ("ftruncate", "fsync", "replace"):
            monkeypatch.setattr(os, name, self._killed(getattr(os, name)))

    def _killed(self, call):
        def wrapped(*args, **kwargs):
            if self._dies():
                if self.part > 0.5:
                    call(*args, **kwargs)
                raise KilledError
            return call(*args, **kwargs)

        return wrapped

    def _dies(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("size", [1, CHUNK_BYTES, 3 * CHUNK_BYTES + 11])
@pytest.mark.parametrize("part", [0.0, 0.4, 1.0])
def test_a_download_is_carried_on_after_a_kill_at_any_write(tmp_path, monkeypatch, size, part):
    data = bytes_of(size)
    blob = Blob.of(data)
    killer = Killer(monkeypatch)
    for calls in range(40):
        path = tmp_path / f"blob{calls}"
        killer.part, killer.left = part, calls
        taken = 0
        killed = False
        try:
            download = FileDownload(blob.ref, path)
            for index in download.pull(0.0).chunks:
                download.add(blob.chunk(index), 0.0)
                taken = download.received_bytes
        except KilledError:
            killed = True
        killer.left = math.inf
        resumed = FileDownload(blob.ref, path)
        assert resumed.received_bytes >= taken
        finish(resumed, blob)
        assert path.read_bytes() == resumed.data() == data
        assert sorted(p.name for p in tmp_path.glob(f"blob{calls}*")) == [path.name]
        if not killed:
            return
    pytest.fail("it never ran to the end")


def test_what_a_power_cut_left_unwritten_is_asked_for_again(tmp_path):
    # The proofs reached the disk and some of the data did not: of that, the file system shows zeros.
    data = bytes_of(6 * CHUNK_BYTES)
    blob = Blob.of(data)
    path = tmp_path / "blob"
    download = FileDownload(blob.ref, path)
    for index in range(5):
        download.add(blob.chunk(index), 0.0)
    download.close()
    with (tmp_path / "blob.part").open("r+b") as file:
        file.seek(2 * CHUNK_BYTES + 9)
        file.write(bytes(50))
    resumed = FileDownload(blob.ref, path)
    assert resumed.received_bytes == 4 * CHUNK_BYTES
    assert resumed.pull(0.0).chunks == [2, 5]
    finish(resumed, blob, 1000.0)
    assert resumed.data() == data


@given(st.integers(0, 3 * 65 - 1), st.integers(0, 255), st.booleans())
@settings(max_examples=40)
def test_no_change_to_the_proofs_makes_a_chunk_count_that_is_not_there(tmp_path_factory, at, value, cut):
    data = bytes_of(3 * CHUNK_BYTES)
    blob = Blob.of(data)
    path = tmp_path_factory.mktemp("proofs") / "blob"
    download = FileDownload(blob.ref, path)
    download.add(blob.chunk(0), 0.0)
    download.add(blob.chunk(2), 0.0)
    download.close()
    proofs = path.with_name("blob.proofs")
    content = bytearray(proofs.read_bytes())
    content[at] = value
    proofs.write_bytes(bytes(content[: at if cut else None]))
    resumed = FileDownload(blob.ref, path)
    assert resumed.received_bytes <= 2 * CHUNK_BYTES
    finish(resumed, blob)
    assert resumed.data() == data


def test_another_blobs_remains_under_the_name_are_not_taken(tmp_path):
    path = tmp_path / "blob"
    old, new = Blob.of(bytes_of(4 * CHUNK_BYTES, 1)), Blob.of(bytes_of(3 * CHUNK_BYTES, 2))
    download = FileDownload(old.ref, path)
    download.add(old.chunk(0), 0.0)
    download.close()
    second = FileDownload(new.ref, path)
    assert second.received_bytes == 0
    finish(second, new)
    third = FileDownload(old.ref, path)
    assert not third.complete
    finish(third, old)
    assert path.read_bytes() == bytes_of(4 * CHUNK_BYTES, 1)


def test_what_remains_of_a_longer_blob_does_not_lengthen_the_new_one(tmp_path):
    path = tmp_path / "blob"
    old, new = Blob.of(bytes_of(4 * CHUNK_BYTES, 1)), Blob.of(bytes_of(CHUNK_BYTES + 1, 2))
    download = FileDownload(old.ref, path)
    download.add(old.chunk(3), 0.0)
    download.close()
    finish(FileDownload(new.ref, path), new)
    assert path.read_bytes() == bytes_of(CHUNK_BYTES + 1, 2)


def test_another_file_of_the_same_size_is_not_taken_for_the_blob(tmp_path):
    path = tmp_path / "blob"
    path.write_bytes(bytes_of(2 * CHUNK_BYTES, 1))
    blob = Blob.of(bytes_of(2 * CHUNK_BYTES, 2))
    download = FileDownload(blob.ref, path)
    assert not download.complete
    finish(download, blob)
    assert path.read_bytes() == bytes_of(2 * CHUNK_BYTES, 2)


def test_a_blob_gets_its_name_when_its_bytes_are_on_disk_and_keeps_its_proofs_until_then(tmp_path, monkeypatch):
    # No test can pull the plug, so this one holds the order of the calls.
    calls = []
    fsync, replace, unlink = os.fsync, os.replace, Path.unlink

    def noting_fsync(fd: int) -> None:
        calls.append(("fsync", Path(os.readlink(f"/proc/self/fd/{fd}")).name))
        fsync(fd)

    def noting_replace(source: Path, target: Path) -> None:
        calls.append(("replace", Path(target).name))
        replace(source, target)

    def noting_unlink(path: Path, missing_ok: bool = False) -> None:
        calls.append(("unlink", path.name))
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "replace", noting_replace)
    monkeypatch.setattr(Path, "unlink", noting_unlink)
    blob = Blob.of(bytes_of(2 * CHUNK_BYTES))
    finish(FileDownload(blob.ref, tmp_path / "blob"), blob)
    assert calls[:3] == [("fsync", "blob.part"), ("replace", "blob"), ("fsync", tmp_path.name)]
    assert ("unlink", "blob.proofs") in calls[3:]


def test_a_blob_that_is_there_is_complete_at_once(tmp_path):
    path = tmp_path / "blob"
    path.write_bytes(bytes_of(2 * CHUNK_BYTES))
    download = FileDownload(Blob.of(bytes_of(2 * CHUNK_BYTES)).ref, path)
    assert download.complete
    assert download.pull(0.0) is None
    assert download.data() == bytes_of(2 * CHUNK_BYTES)


def test_a_full_disk_leaves_the_chunk_missing(tmp_path, monkeypatch):
    blob = Blob.of(bytes_of(2 * CHUNK_BYTES))
    download = FileDownload(blob.ref, tmp_path / "blob")

    def full(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space left"):
            download.add(blob.chunk(0), 0.0)
    assert download.received_bytes == 0
    finish(download, blob)
    assert download.data() == bytes_of(2 * CHUNK_BYTES)


def test_a_closed_download_takes_nothing_and_keeps_no_file_open(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    blob = Blob.of(bytes_of(2 * CHUNK_BYTES))
    download = FileDownload(blob.ref, tmp_path / "blob")
    download.add(blob.chunk(0), 0.0)
    download.close()
    download.close()
    with pytest.raises(ParameterError, match="closed"):
        download.add(blob.chunk(1), 0.0)
    finish(FileDownload(blob.ref, tmp_path / "blob"), blob)
    with suppress(FileNotFoundError):
        FileDownload(blob.ref, tmp_path / "missing" / "blob")
    assert len(os.listdir("/proc/self/fd")) == before
