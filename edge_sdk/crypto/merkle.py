"""Merkle trees with inclusion proofs, as in RFC 9162 section 2.1 (leaf prefix 0x00, node prefix 0x01).

Two uses: the roster's root lets a member check that a sender is enrolled without holding the roster, and the root
over a contribution's sealed shares lets it check that the share it was given is the one that the sender signed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from edge_sdk.errors import ParameterError, PeerError


def _leaf(content: bytes | memoryview) -> bytes:
    digest = hashlib.sha256(b"\x00")
    digest.update(content)
    return digest.digest()


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


class MerkleTree:
    """The tree over `leaves` (at least one), with every level kept so that a proof costs O(log n)."""

    def __init__(self, leaves: Sequence[bytes]) -> None:
        if not leaves:
            raise ParameterError("a Merkle tree needs at least one leaf")
        # An odd node is carried up unchanged: this is the RFC's recursive definition, level by level.
        self._levels = [[_leaf(leaf) for leaf in leaves]]
        while len(self._levels[-1]) > 1:
            below = self._levels[-1]
            above = [_node(below[i], below[i + 1]) for i in range(0, len(below) - 1, 2)]
            if len(below) % 2:
                above.append(below[-1])
            self._levels.append(above)

    @property
    def root(self) -> bytes:
        return self._levels[-1][0]

    def proof(self, index: int) -> tuple[bytes, ...]:
        """The sibling hashes from leaf `index` to the root, lowest first. Raises ParameterError outside the tree."""
        if not 0 <= index < len(self._levels[0]):
            raise ParameterError(f"leaf {index} is outside a tree of {len(self._levels[0])}")
        siblings = []
        for level in self._levels[:-1]:
            if index ^ 1 < len(level):
                siblings.append(level[index ^ 1])
            index >>= 1
        return tuple(siblings)


def merkle_root(leaves: Sequence[bytes]) -> bytes:
    """The 32-byte root over `leaves`. Raises ParameterError if there are none."""
    return MerkleTree(leaves).root


def root_of(size: int, index: int, content: bytes | memoryview, proof: Sequence[bytes]) -> bytes:
    """The 32-byte root of the tree of `size` leaves in which `proof` puts `content` at leaf `index`.

    Anybody can make a proof up: it says something only once the root is compared with one that is trusted.
    Raises PeerError if no such tree has a proof of this length, or if a sibling is not 32 bytes.
    Source: RFC 9162 section 2.1.3.2.
    """
    if not 0 <= index < size:
        raise PeerError(f"inclusion proof: leaf {index} is outside a tree of {size}")
    position, last, value = index, size - 1, _leaf(content)
    for sibling in proof:
        if last == 0:
            raise PeerError("inclusion proof: longer than the tree is high")
        if len(sibling) != 32:
            raise PeerError(f"inclusion proof: a sibling of {len(sibling)} bytes, not 32")
        if position & 1 or position == last:
            value = _node(sibling, value)
            while not position & 1 and position:
                position >>= 1
                last >>= 1
        else:
            value = _node(value, sibling)
        position >>= 1
        last >>= 1
    if last:
        raise PeerError("inclusion proof: shorter than the tree is high")
    return value


def check_inclusion(root: bytes, size: int, index: int, content: bytes, proof: Sequence[bytes]) -> None:
    """Return if `content` is leaf `index` of the tree of `size` leaves with this root, else raise PeerError."""
    if root_of(size, index, content, proof) != root:
        raise PeerError(f"inclusion proof: leaf {index} is not under the root")
