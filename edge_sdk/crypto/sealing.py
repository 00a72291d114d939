"""Shares sealed to one-use hybrid prekeys: X25519 and ML-KEM-768, HKDF-SHA256, ChaCha20-Poly1305 (docs section 5).

A sealed share stays secret while either the elliptic-curve or the lattice problem does. Every key is used once: the
sender's X25519 key is fresh for a contribution, the member's prekey is deleted after its one round, and the AEAD key
is bound to both parties' keys, the ciphertext of the encapsulation and the caller's context.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from edge_sdk.crypto.hashing import derive_key, frame
from edge_sdk.errors import ParameterError, PeerError

X25519_BYTES = 32
MLKEM_PUBLIC_BYTES = 1184
MLKEM_CIPHERTEXT_BYTES = 1088
TAG_BYTES = 16
PREKEY_SEED_BYTES = 96
OVERHEAD_BYTES = MLKEM_CIPHERTEXT_BYTES + TAG_BYTES
_NONCE = bytes(12)  # the key is used for one message only

Encapsulate = Callable[[bytes], tuple[bytes, bytes]]
"""ML-KEM public key (1184 bytes) -> (shared secret, ciphertext). Entropy, so it is an argument: see `encapsulate`."""


class PrekeyPublic(NamedTuple):
    """The public half of a prekey: X25519 (32 bytes) and ML-KEM-768 (1184 bytes)."""

    x25519: bytes
    mlkem: bytes


def encapsulate(mlkem_public: bytes) -> tuple[bytes, bytes]:
    """ML-KEM-768 encapsulation with the operating system's entropy: (shared secret 32 bytes, ciphertext 1088 bytes).

    The library offers no encapsulation with given coins, so this is the one function of the core that draws entropy
    itself. It is never called here: callers pass it in, and test vectors pass one with fixed coins.
    Raises PeerError if the key is not a valid ML-KEM-768 key (FIPS 203 section 7.2).
    """
    try:
        return MLKEM768PublicKey.from_public_bytes(mlkem_public).encapsulate()
    except ValueError as error:
        raise PeerError("prekey: not a valid ML-KEM-768 public key") from error


def check_prekey(prekey: PrekeyPublic) -> None:
    """Return if shares can be sealed to `prekey`, else raise PeerError: a low-order point, or no ML-KEM key.

    One member's unusable prekey would stop every device of the round, so it is found when it is offered.
    """
    # Any clamped scalar shows a low order: the product is zero for exactly those points. This one is no secret.
    _exchange(X25519PrivateKey.from_private_bytes(bytes(X25519_BYTES)), prekey.x25519, "prekey")
    try:
        MLKEM768PublicKey.from_public_bytes(prekey.mlkem)
    except ValueError as error:
        raise PeerError("prekey: not a valid ML-KEM-768 public key") from error


class Sealer:
    """Seals one contribution's shares under one fresh X25519 key."""

    __slots__ = ("_encapsulate", "_private", "public_key")

    def __init__(self, seed: bytes, encapsulate: Encapsulate) -> None:
        """seed: 32 fresh secret bytes."""
        if len(seed) != X25519_BYTES:
            raise ParameterError(f"a sealing seed has {X25519_BYTES} bytes, not {len(seed)}")
        self._private = X25519PrivateKey.from_private_bytes(seed)
        self.public_key: bytes = self._private.public_key().public_bytes_raw()
        self._encapsulate = encapsulate

    def seal(self, prekey: PrekeyPublic, plaintext: bytes, *context: bytes) -> bytes:
        """`plaintext` for the holder of `prekey`: ML-KEM ciphertext, then the AEAD's output, 1104 bytes longer.

        context: bound as associated data, the same parts in the same order when opening.
        Raises PeerError if `prekey` has a low-order X25519 point or an invalid ML-KEM key.
        """
        shared_elliptic = _exchange(self._private, prekey.x25519, "prekey")
        shared_lattice, ciphertext = self._encapsulate(prekey.mlkem)
        key = _aead_key(shared_elliptic + shared_lattice, self.public_key, prekey, ciphertext)
        return ciphertext + ChaCha20Poly1305(key).encrypt(_NONCE, plaintext, frame("sealed share", *context))


class Prekey:
    """A one-use prekey, made from its secret seed: 96 bytes, 32 for X25519 then 64 for ML-KEM (FIPS 203's d, z)."""

    __slots__ = ("_elliptic", "_lattice", "public")

    def __init__(self, seed: bytes) -> None:
        if len(seed) != PREKEY_SEED_BYTES:
            raise ParameterError(f"a prekey's seed has {PREKEY_SEED_BYTES} bytes, not {len(seed)}")
        self._elliptic = X25519PrivateKey.from_private_bytes(seed[:X25519_BYTES])
        self._lattice = MLKEM768PrivateKey.from_seed_bytes(seed[X25519_BYTES:])
        self.public = PrekeyPublic(
            self._elliptic.public_key().public_bytes_raw(), self._lattice.public_key().public_bytes_raw()
        )

    def __repr__(self) -> str:
        return f"Prekey({self.public.x25519.hex()[:16]})"

    def open(self, sender_public: bytes, sealed: bytes, *context: bytes) -> bytes:
        """The plaintext of `sealed`, made by the Sealer with this public key and context.

        Raises PeerError on any failure: a length, a low-order point, or a tag (a wrong key, sender or context).
        """
        if len(sealed) < OVERHEAD_BYTES:
            raise PeerError(f"sealed share: {len(sealed)} bytes is too short")
        ciphertext, body = sealed[:MLKEM_CIPHERTEXT_BYTES], sealed[MLKEM_CIPHERTEXT_BYTES:]
        shared_elliptic = _exchange(self._elliptic, sender_public, "sealed share")
        shared_lattice = self._lattice.decapsulate(ciphertext)
        key = _aead_key(shared_elliptic + shared_lattice, sender_public, self.public, ciphertext)
        try:
            return ChaCha20Poly1305(key).decrypt(_NONCE, body, frame("sealed share", *context))
        except InvalidTag as error:
            raise PeerError("sealed share: does not open under this prekey, sender and context") from error


def _exchange(private: X25519PrivateKey, public: bytes, subject: str) -> bytes:
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:  # wrong length, or an all-zero result: a point of low order (RFC 7748 section 6.1)
        raise PeerError(f"{subject}: not a usable X25519 key (low order or wrong length)") from error


def _aead_key(shared: bytes, sender: bytes, prekey: PrekeyPublic, ciphertext: bytes) -> bytes:
    return derive_key(shared, "share key", sender, prekey.x25519, prekey.mlkem, ciphertext)
