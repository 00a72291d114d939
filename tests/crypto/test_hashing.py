"""Framing is injective, labels separate, and key derivation is HKDF-SHA256 exactly."""

import hashlib
import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st
from official import official

from edge_sdk.crypto import hashing
from edge_sdk.crypto.hashing import PREFIX, content_hash, derive_key, frame, tagged_hash

HKDF_CASES = official("rfc5869_hkdf_sha256")["cases"]
labels = st.text(alphabet=st.characters(max_codepoint=127), max_size=20)
parts = st.lists(st.binary(max_size=40), max_size=5)


def hkdf(salt: bytes, ikm: bytes, info: bytes, length: int) -> bytes:
    """RFC 5869 sections 2.2 and 2.3, from HMAC alone."""
    prk = hmac.digest(salt or bytes(32), ikm, "sha256")
    block, okm = b"", b""
    for counter in range(1, 256):
        if len(okm) >= length:
            break
        block = hmac.digest(prk, block + info + bytes([counter]), "sha256")
        okm += block
    return okm[:length]


def unframe(framed: bytes) -> list[bytes]:
    fields = []
    while framed:
        size = int.from_bytes(framed[:8], "little")
        fields.append(framed[8 : 8 + size])
        assert len(fields[-1]) == size
        framed = framed[8 + size :]
    return fields


@pytest.mark.parametrize("case", HKDF_CASES)
def test_the_librarys_hkdf_gives_the_vectors_of_rfc_5869(case):
    ikm, salt, info = (bytes.fromhex(case[name]) for name in ("ikm", "salt", "info"))
    instance = hashing.HKDF(algorithm=hashing.SHA256(), length=case["length"], salt=salt or None, info=info)
    assert instance.derive(ikm).hex() == case["okm"]
    assert hkdf(salt, ikm, info, case["length"]).hex() == case["okm"]


@given(st.binary(min_size=32, max_size=80), labels, parts, st.integers(1, 200))
def test_derive_key_is_hkdf_with_an_empty_salt_and_the_frame_as_info(secret, label, context, length):
    assert derive_key(secret, label, *context, length=length) == hkdf(b"", secret, frame(label, *context), length)


def test_derive_key_reaches_the_longest_output_of_hkdf_and_no_further():
    assert len(derive_key(bytes(32), "x", length=8160)) == 8160
    with pytest.raises(ValueError, match="8160"):
        derive_key(bytes(32), "x", length=8161)


def test_a_frame_is_the_lengths_and_the_bytes_of_prefix_label_and_parts():
    expected = b"\x0e\0\0\0\0\0\0\0sordino/v1/abc" + b"\x02\0\0\0\0\0\0\0hi" + b"\0\0\0\0\0\0\0\0"
    assert frame("abc", b"hi", b"") == expected


@given(labels, parts)
def test_a_frame_can_be_read_back_so_no_two_inputs_share_one(label, content):
    assert unframe(frame(label, *content)) == [PREFIX + label.encode(), *content]


def test_moving_a_byte_between_parts_or_label_changes_the_hash():
    variants = [("ab", b"cd", b"ef"), ("abc", b"d", b"ef"), ("ab", b"cde", b"f"), ("ab", b"cdef"), ("ab", b"cdef", b"")]
    assert len({tagged_hash(label, *content) for label, *content in variants}) == len(variants)


def test_a_label_outside_ascii_is_refused():
    with pytest.raises(UnicodeEncodeError):
        frame("é")


def test_tagged_hash_is_sha256_of_the_frame():
    assert tagged_hash("a", b"b") == hashlib.sha256(frame("a", b"b")).digest()


def test_content_hash_is_plain_sha256_of_any_buffer():
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    for content in (b"abc", bytearray(b"abc"), memoryview(b"abc")):
        assert content_hash(content).hex() == known


@given(st.binary(min_size=32, max_size=32))
def test_keys_of_different_labels_contexts_and_secrets_differ(secret):
    other = bytes([secret[0] ^ 1]) + secret[1:]
    keys = [derive_key(secret, "a"), derive_key(secret, "b"), derive_key(secret, "a", b""), derive_key(other, "a")]
    assert len(set(keys)) == 4


def test_the_known_answers_of_the_protocol_document():
    content = (b"\x01\x02", b"")
    framed = "0c00000000000000736f7264696e6f2f76312f78020000000000000001020000000000000000"
    assert frame("x", *content).hex() == framed
    assert tagged_hash("x", *content).hex() == "7111fda08b29c7a849dca87a15ffab232800c09cee1a8598fad91a58a0fa9ed4"
    derived = "4b9ae75371b813073e8b94eea726cf6a9610e2e1ce13f04493c9da4ac0a99538"
    assert derive_key(bytes(32), "x", *content).hex() == derived
    assert hkdf(b"", bytes(32), bytes.fromhex(framed), 32).hex() == derived
