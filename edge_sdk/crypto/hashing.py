"""Domain-separated hashing and key derivation (docs/protocol.md section 2.1)."""

from __future__ import annotations

import hashlib

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from edge_sdk.errors import ParameterError

HASH_BYTES = 32
PREFIX = b"sordino/v1/"


def frame(label: str, *parts: bytes) -> bytes:
    """`label` and `parts` as one byte string that no other label or split of the parts can give.

    Every part is preceded by its length (8 bytes, little endian); the label by the project's prefix.
    """
    framed = bytearray()
    for part in (PREFIX + label.encode("ascii"), *parts):
        framed += len(part).to_bytes(8, "little")
        framed += part
    return bytes(framed)


def tagged_hash(label: str, *parts: bytes) -> bytes:
    """SHA-256 of `frame(label, *parts)`: 32 bytes. A hash made for one purpose is never valid for another."""
    return hashlib.sha256(frame(label, *parts)).digest()


def content_hash(content: bytes | bytearray | memoryview) -> bytes:
    """Plain SHA-256, the address of a blob: the same hash that any tool prints for the file."""
    return hashlib.sha256(content).digest()


def derive_key(secret: bytes, label: str, *context: bytes, length: int = 32) -> bytes:
    """HKDF-SHA256 (RFC 5869) with an empty salt and info = frame(label, *context).

    secret: input keying material of at least 32 bytes.  length: bytes of output, at most 8160.
    Raises ParameterError on a shorter secret or a longer output.
    """
    if len(secret) < 32 or not 0 < length <= 255 * HASH_BYTES:
        raise ParameterError(f"a key of {length} bytes from {len(secret)}: 32 or more are needed, 8160 can be had")
    return HKDF(algorithm=SHA256(), length=length, salt=None, info=frame(label, *context)).derive(secret)
