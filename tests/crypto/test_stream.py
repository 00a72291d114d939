"""The keyed stream is ChaCha20 of RFC 8439, and residues are uniform by rejection."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from official import official

from edge_sdk.crypto.stream import KeyStream, uniform_residues
from edge_sdk.errors import ParameterError

CHACHA = official("rfc8439_chacha20_poly1305")["chacha20"]
KEY = bytes(range(32))


class Words:
    """A stream that gives the chosen 16-bit words, then zeros."""

    def __init__(self, words):
        self.words, self.used = list(words), 0

    def words16(self, count):
        chosen = self.words[self.used : self.used + count]
        chosen += [0] * (count - len(chosen))
        self.used += count
        return np.array(chosen, dtype="<u2")


@pytest.mark.parametrize("case", CHACHA, ids=[case["section"] for case in CHACHA])
def test_the_stream_gives_the_keystream_of_rfc_8439(case):
    plaintext = bytes.fromhex(case["plaintext"])
    stream = KeyStream(bytes.fromhex(case["key"]), int.from_bytes(bytes.fromhex(case["nonce"]), "little"))
    stream.read(64 * case["counter"])
    keystream = stream.read(len(plaintext)).tobytes()
    assert bytes(a ^ b for a, b in zip(plaintext, keystream, strict=True)).hex() == case["ciphertext"]


@given(st.lists(st.integers(0, 200), min_size=1, max_size=8), st.integers(0, 2**96 - 1))
def test_reads_follow_one_another(sizes, index):
    stream = KeyStream(KEY, index)
    pieces = [stream.read(size).tobytes() for size in sizes]
    assert b"".join(pieces) == KeyStream(KEY, index).read(sum(sizes)).tobytes()


@given(st.integers(1, 300), st.integers(0, 100))
def test_fill_overwrites_with_the_same_bytes_as_read(size, skipped):
    filling, reading = KeyStream(KEY), KeyStream(KEY)
    filling.read(skipped)
    reading.read(skipped)
    out = np.full(size, 0xA5, dtype=np.uint8)
    filling.fill(out)
    assert np.array_equal(out, reading.read(size))
    assert np.array_equal(filling.read(9), reading.read(9))


def test_words_are_little_endian_whatever_the_machine():
    raw = KeyStream(KEY).read(64).tobytes()
    words16, words64 = KeyStream(KEY).words16(32), KeyStream(KEY).words64(8)
    assert [int(w) for w in words16] == [int.from_bytes(raw[i : i + 2], "little") for i in range(0, 64, 2)]
    assert [int(w) for w in words64] == [int.from_bytes(raw[i : i + 8], "little") for i in range(0, 64, 8)]


def test_streams_of_different_keys_or_indices_share_nothing():
    streams = [KeyStream(KEY), KeyStream(KEY, 1), KeyStream(KEY, 1 << 95), KeyStream(bytes(32))]
    blocks = [stream.read(64 * 20).tobytes() for stream in streams]
    chunks = {block[i : i + 64] for block in blocks for i in range(0, len(block), 64)}
    assert len(chunks) == 80


def test_an_array_from_the_stream_may_be_changed():
    words = KeyStream(KEY).read(8)
    words[:] = 0
    assert not words.any()


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_a_key_of_another_length_is_refused(size):
    with pytest.raises(ParameterError, match=f"32 bytes, not {size}"):
        KeyStream(bytes(size))


@pytest.mark.parametrize("modulus", [0, -1, 65537, 1 << 20])
def test_a_modulus_outside_16_bits_is_refused(modulus):
    with pytest.raises(ParameterError, match="modulus"):
        uniform_residues(KeyStream(KEY), modulus, 1)


def test_words_at_or_above_the_largest_multiple_are_skipped():
    # 65521 fits once: 65520 is the last word kept, 65521..65535 would all have become small residues.
    stream = Words([5, 65521, 65535, 65520, 65525, 0, 65521, 7])
    assert uniform_residues(stream, 65521, 4).tolist() == [5, 65520, 0, 7]


def test_words_are_reduced_when_the_modulus_fits_more_than_once():
    # 6 fits 10922 times: 65532 and above are skipped.
    stream = Words([65531, 65532, 65535, 6, 13, 65533, 5])
    assert uniform_residues(stream, 6, 4).tolist() == [5, 0, 1, 5]


def test_a_run_of_skipped_words_is_read_over():
    stream = Words([65535] * 1000 + list(range(50)))
    assert uniform_residues(stream, 65521, 40).tolist() == list(range(40))


@given(st.integers(1, 1 << 16), st.integers(0, 300), st.binary(min_size=32, max_size=32))
def test_residues_are_the_kept_words_in_order(modulus, count, key):
    words = KeyStream(key).words16(4 * count + 400).tolist()
    limit = 65536 - 65536 % modulus
    assert (
        uniform_residues(KeyStream(key), modulus, count).tolist() == [w % modulus for w in words if w < limit][:count]
    )


def test_residues_modulo_the_prime_pass_a_chi_square_test():
    residues = uniform_residues(KeyStream(KEY), 65521, 1 << 20)
    assert residues.min() >= 0
    assert residues.max() == 65520
    # 431 bins of equal expectation would hide a bias towards 0..14; look at those residues separately too.
    observed = np.bincount(residues // 152, minlength=432)[:431]
    expected = residues.size * 152 / 65521
    statistic = float(((observed - expected) ** 2 / expected).sum())
    assert abs(statistic - 430) < 5 * (2 * 430) ** 0.5
    low = int((residues < 15).sum())
    assert abs(low - residues.size * 15 / 65521) < 5 * (residues.size * 15 / 65521) ** 0.5


def test_the_key_is_in_no_repr_and_no_error():
    key = bytes(range(0x60, 0x80))
    assert key.hex() not in repr(KeyStream(key))
    with pytest.raises(ParameterError) as caught:
        KeyStream(key[:31])
    assert key[:8].hex() not in str(caught.value)
    assert repr(key[:8])[2:-1] not in str(caught.value)


def test_the_known_answers_of_the_protocol_document():
    assert KeyStream(KEY).read(16).tobytes().hex() == "39fd2b7dd9c5196a8dbd0377b8dc4a49"
    assert KeyStream(KEY, 1).read(16).tobytes().hex() == "d838fb09536e2e3a10e8f23f486273a6"
    assert uniform_residues(KeyStream(KEY), 65521, 4).tolist() == [64825, 32043, 50649, 27161]
    assert uniform_residues(KeyStream(KEY), 10, 8).tolist() == [5, 3, 9, 1, 5, 7, 4, 2]
