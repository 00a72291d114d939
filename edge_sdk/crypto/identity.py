"""Ed25519 identities and signatures over labelled bytes (docs/protocol.md section 2.4).

A signature is over `frame(label, body)`: what was signed as one kind of message never verifies as another.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from edge_sdk.crypto.hashing import frame
from edge_sdk.errors import ParameterError, PeerError

KEY_BYTES = 32
SIGNATURE_BYTES = 64

_FIELD = 2**255 - 19
_ORDER_8_Y = 0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826
_SMALL_ORDER_Y = frozenset((0, 1, _FIELD - 1, _FIELD, _FIELD + 1, _ORDER_8_Y, _FIELD - _ORDER_8_Y))
"""The y of every point whose order divides 8, with the two encodings that are not reduced. Under such a key one
signature can be valid for any label and body, and RFC 8032 lets a verifier accept it (Chalkias, Garillot, Nikolaenko
2020, "Taming the many EdDSAs")."""


class Identity:
    """A signing key, made from 32 bytes of entropy. Its secret is in no repr and in no exception."""

    __slots__ = ("_private", "public_key")

    def __init__(self, seed: bytes) -> None:
        if len(seed) != KEY_BYTES:
            raise ParameterError(f"an identity's seed has {KEY_BYTES} bytes, not {len(seed)}")
        self._private = Ed25519PrivateKey.from_private_bytes(seed)
        self.public_key: bytes = self._private.public_key().public_bytes_raw()

    def __repr__(self) -> str:
        return f"Identity({self.public_key.hex()[:16]})"

    def __reduce__(self) -> str:
        raise TypeError("an identity is not to be pickled: store its seed, with mode 0600")

    def sign(self, label: str, body: bytes) -> bytes:
        """64 bytes. Deterministic (RFC 8032)."""
        return self._private.sign(frame(label, body))


def check_signature(public_key: bytes, label: str, body: bytes, signature: bytes) -> None:
    """Return if `signature` is `public_key`'s over (`label`, `body`), else raise PeerError that names the label.

    A key of small order is refused: no signature says anything under it.
    """
    y = int.from_bytes(public_key, "little") % 2**255  # the top bit is the sign of x
    if len(public_key) == KEY_BYTES and y in _SMALL_ORDER_Y:
        raise PeerError(f"{label}: key {public_key.hex()[:16]} is a point of small order")
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, frame(label, body))
    except (InvalidSignature, ValueError) as error:
        raise PeerError(f"{label}: the signature is not valid under key {public_key.hex()[:16]}") from error
