"""The keyed stream: ChaCha20 (RFC 8439) as a generator, and the exact samplers that read it.

Everything random that a protocol run needs comes from one of these streams, each under a key of its own that names
its purpose (docs/protocol.md section 2.2). There is no other generator in the core.
"""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray

from edge_sdk.errors import ParameterError

SEED_BYTES = 32


class KeyStream:
    """ChaCha20 keystream under `key` (32 bytes), block counter from 0, nonce = `index` as 12 bytes little endian.

    Reads follow one another: reading a then b bytes gives the same bytes as reading a + b. The key is not kept.
    """

    def __init__(self, key: bytes, index: int = 0) -> None:
        if len(key) != SEED_BYTES:
            raise ParameterError(f"a stream key has {SEED_BYTES} bytes, not {len(key)}")
        if not 0 <= index < 1 << 96:
            raise ParameterError(f"a stream index lies in [0, 2^96), not {index}")
        nonce = bytes(4) + index.to_bytes(12, "little")
        self._cipher = Cipher(ChaCha20(key, nonce), mode=None).encryptor()

    def fill(self, out: NDArray[np.uint8]) -> None:
        """Overwrite `out`, a contiguous uint8 array, with the next bytes of the stream."""
        out[:] = 0
        self._cipher.update_into(out.data, out.data)

    def read(self, count: int) -> NDArray[np.uint8]:
        """The next `count` bytes, as a new uint8 array."""
        return np.frombuffer(bytearray(self._cipher.update(bytes(count))), dtype=np.uint8)

    def words16(self, count: int) -> NDArray[np.uint16]:
        """The next `count` little-endian 16-bit words."""
        return self.read(2 * count).view("<u2")

    def words64(self, count: int) -> NDArray[np.uint64]:
        """The next `count` little-endian 64-bit words."""
        return self.read(8 * count).view("<u8")


def uniform_residues(stream: KeyStream, modulus: int, count: int) -> NDArray[np.int64]:
    """`count` independent, exactly uniform integers in [0, modulus), int64; modulus at most 2^16.

    16-bit words are taken in order and those not below the largest multiple of the modulus are skipped: reducing
    every word instead would favour the small residues. Words read beyond the last one used are lost.
    """
    if not 1 <= modulus <= 1 << 16:
        raise ParameterError(f"modulus {modulus} is not in [1, 65536]")
    limit = (1 << 16) // modulus * modulus
    kept = np.empty(0, dtype=np.int64)
    while kept.size < count:
        missing = count - kept.size
        words = stream.words16(missing + (missing >> 8) + 16).astype(np.int64)
        kept = np.concatenate([kept, words[words < limit] % modulus])
    return kept[:count]
