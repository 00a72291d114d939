"""The fleet authority's part: freeze a roster, draw the beacon, sign the epoch and its committee (section 7.1).

The authority's key is not the coordinator's. What it decides is who is enrolled, how many may be corrupt and what kind
of committee serves; who serves and who shares a group with whom is then the beacon's, drawn after the roster was fixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from edge_sdk.crypto.hashing import tagged_hash
from edge_sdk.crypto.identity import Identity, check_signature
from edge_sdk.crypto.merkle import MerkleTree, check_inclusion
from edge_sdk.crypto.stream import KeyStream
from edge_sdk.errors import ParameterError, PeerError
from edge_sdk.protocol import plan
from edge_sdk.protocol.messages import (
    MAX_GROUPS,
    MAX_ROSTER,
    CommitteeKind,
    Epoch,
    Frozen,
    Grouping,
    Header,
    Member,
    Signed,
    decode,
    encode,
    label_of,
    message_hash,
    sign,
    verify,
)

FIRST = bytes(32)
"""What the first epoch and the first ticket of a chain name as the one before them."""


class Roster:
    """The enrolled devices' public keys in ascending order: a device's index is its place."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        """Raises ParameterError on a repeated key, a wrong length, or a roster that is empty or too large."""
        if not 1 <= len(keys) <= MAX_ROSTER:
            raise ParameterError(f"a roster holds 1 to {MAX_ROSTER} devices, not {len(keys)}")
        if any(len(key) != 32 for key in keys):
            raise ParameterError("a roster key has 32 bytes")
        self.keys = tuple(sorted(keys))
        if len(set(self.keys)) != len(self.keys):
            raise ParameterError("a device is in the roster twice")
        self._tree = MerkleTree([roster_leaf(i, key) for i, key in enumerate(self.keys)])
        self._index = {key: i for i, key in enumerate(self.keys)}

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def root(self) -> bytes:
        return self._tree.root

    def enrolment(self, key: bytes) -> tuple[int, tuple[bytes, ...]]:
        """(index, inclusion proof) of a device. Raises ParameterError if it is not enrolled."""
        if key not in self._index:
            raise ParameterError(f"device {key.hex()[:16]} is not in the roster")
        index = self._index[key]
        return index, self._tree.proof(index)


def roster_leaf(index: int, key: bytes) -> bytes:
    """The leaf's content: the index is in it, so that a proof names the place and not only the key."""
    return index.to_bytes(4, "little") + key


def freeze(
    authority: Identity,
    roster: Roster,
    *,
    coordinator: bytes,
    corrupt_devices: int,
    committee: CommitteeKind,
    committee_size: int | None = None,
    expires_s: int,
    helpers: Sequence[bytes] = (),
    number: int = 1,
    previous: bytes = FIRST,
) -> Signed:
    """The roster, fixed and signed, before any beacon exists. Publish it first; then `draw`.

    corrupt_devices: how many of the roster may collude with the coordinator, at least 1.
    committee_size: members to draw; for 'everyone' and 'helpers' it follows.  number, previous: the epoch chain.
    expires_s: Unix seconds; no ticket of the epoch lives longer, so freeze the next one before.
    Raises ParameterError if the numbers leave no safe committee.
    """
    if (committee == "helpers") != bool(helpers):
        raise ParameterError("helpers are named exactly when the committee is 'helpers'")
    if len(set(helpers)) != len(helpers):
        raise ParameterError("a helper is listed twice")
    if committee == "drawn":
        if committee_size is None:
            raise ParameterError("a drawn committee needs committee_size")
        size = committee_size
    else:
        size = len(helpers) if committee == "helpers" else len(roster)
    if not 1 <= corrupt_devices < len(roster):
        raise ParameterError(f"corrupt_devices is {corrupt_devices}: 1 to {len(roster) - 1} for this roster")
    plan.thresholds(committee, size, len(roster), corrupt_devices)
    return sign(
        authority,
        Frozen(
            version=1,
            fleet=authority.public_key,
            number=number,
            previous=previous,
            coordinator=coordinator,
            roster_root=roster.root,
            roster_size=len(roster),
            corrupt_devices=corrupt_devices,
            committee=committee,
            committee_size=size,
            helpers=sorted(helpers),
            expires_s=expires_s,
        ),
    )


def draw(
    authority: Identity, frozen: Signed, roster: Roster, entropy: bytes, group_counts: Sequence[int] = (1,)
) -> Signed:
    """The signed epoch: the beacon is a hash of the frozen roster and `entropy`, the committee follows from it.

    entropy: 32 bytes drawn after the freeze was published (or of a public beacon that came after it).
    group_counts: numbers of groups that tickets may use; how many corrupt devices one group can hold is derived.
    """
    fixed = verify(Frozen, authority.public_key, frozen)
    if (roster.root, len(roster)) != (fixed.roster_root, fixed.roster_size):
        raise ParameterError("this is not the roster that was frozen")
    if len(entropy) != 32:
        raise ParameterError(f"the beacon's entropy has 32 bytes, not {len(entropy)}")
    counts = sorted({1, *group_counts})
    if not all(1 <= count <= min(MAX_GROUPS, len(roster) // 2) for count in counts):
        raise ParameterError(f"groups {counts}: each needs two devices, and there are at most {MAX_GROUPS}")
    if fixed.committee == "helpers":
        members = [Member(key, None) for key in fixed.helpers]
    else:
        members = [Member(roster.keys[i], i) for i in committee_indices(fixed, beacon(fixed, entropy))]
    groupings = [
        Grouping(count, max(1, plan.corrupt_in_group(len(roster), fixed.corrupt_devices, count))) for count in counts
    ]
    return sign(authority, Epoch(fixed, entropy, members, groupings))


def beacon(frozen: Frozen, entropy: bytes) -> bytes:
    """32 bytes that nobody knew when the roster was fixed."""
    return tagged_hash("beacon", encode(frozen), entropy)


def ranks(seed: bytes, purpose: str, size: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """A permutation of range(size) drawn by `seed` for `purpose`: ranks[index] is the index's place.

    Indices are ordered by a 64-bit word each of the purpose's stream, ties by index.
    """
    words = KeyStream(tagged_hash("shuffle", purpose.encode(), seed)).words64(size)
    places = np.empty(size, dtype=np.int64)
    places[np.argsort(words, kind="stable")] = np.arange(size)
    return places


def committee_indices(frozen: Frozen, seed: bytes) -> list[int]:
    """The roster indices that serve, ascending: everyone, or the first `committee_size` of the beacon's shuffle."""
    if frozen.committee == "everyone":
        return list(range(frozen.roster_size))
    places = ranks(seed, "committee", frozen.roster_size)
    return sorted(int(i) for i in np.flatnonzero(places < frozen.committee_size))


class FleetEpoch:
    """An epoch whose signature was checked, with what follows from it.

    That the committee is the beacon's and the thresholds hold is recomputed. The authority's word is taken for the keys
    at the drawn places and, within its possible range, for how many corrupt devices a group can hold.
    """

    def __init__(self, authority_key: bytes, signed: Signed) -> None:
        """Raises PeerError if the authority did not sign it or if what it states does not follow from the beacon."""
        epoch = verify(Epoch, authority_key, signed)
        frozen = epoch.frozen
        if frozen.fleet != authority_key:
            raise PeerError("epoch: it is another fleet's")
        if frozen.corrupt_devices >= frozen.roster_size:
            # beyond it the tail that bounds a drawn committee's corrupt members would mean nothing
            raise PeerError(f"epoch: {frozen.corrupt_devices} corrupt devices in a roster of {frozen.roster_size}")
        try:
            self.thresholds = plan.thresholds(
                frozen.committee, frozen.committee_size, frozen.roster_size, frozen.corrupt_devices
            )
        except ParameterError as error:
            raise PeerError(f"epoch: {error}") from error
        self.id = message_hash(Epoch, signed.body)
        self.number = frozen.number
        self.frozen = frozen
        self.beacon = beacon(frozen, epoch.entropy)
        self.members = tuple(epoch.members)
        keys = [member.key for member in self.members]
        if (frozen.committee == "helpers") != bool(frozen.helpers):
            raise PeerError("epoch: helpers are named exactly when the committee is 'helpers'")
        if frozen.committee == "helpers":
            expected: list[int | None] = [None] * len(frozen.helpers)
            if keys != frozen.helpers:
                raise PeerError("epoch: the members are not the pinned helpers")
        else:
            expected = list(committee_indices(frozen, self.beacon))
        if [member.index for member in self.members] != expected or len(keys) != frozen.committee_size:
            raise PeerError("epoch: the committee is not the one that the beacon draws")
        if len(set(keys)) != len(keys):
            raise PeerError("epoch: a member is listed twice")
        if len({grouping.groups for grouping in epoch.groupings}) != len(epoch.groupings):
            raise PeerError("epoch: a number of groups is listed twice")
        self.corrupt_in_group = {grouping.groups: grouping.corrupt for grouping in epoch.groupings}
        for groups, corrupt in self.corrupt_in_group.items():
            if not -(-frozen.corrupt_devices // groups) <= corrupt <= frozen.corrupt_devices:
                raise PeerError(f"epoch: {corrupt} corrupt devices in one of {groups} groups is not possible")

    def __repr__(self) -> str:
        return f"FleetEpoch(number={self.number}, id={self.id.hex()[:16]})"

    @cached_property
    def _group_ranks(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return ranks(self.beacon, "groups", self.frozen.roster_size)

    def group_of(self, index: int, groups: int) -> int:
        """The group, 0-based, of a roster index when a round has `groups` of them."""
        return int(self._group_ranks[index]) % groups

    def member_number(self, key: bytes) -> int:
        """A member's number, from 1, by its key. Raises ParameterError if it does not serve in this epoch."""
        for number, member in enumerate(self.members, start=1):
            if member.key == key:
                return number
        raise ParameterError(f"key {key.hex()[:16]} is not a member of this epoch's committee")

    def member_key(self, number: int) -> bytes:
        """Raises PeerError outside 1..m."""
        if not 1 <= number <= len(self.members):
            raise PeerError(f"member {number}: this committee has {len(self.members)}")
        return self.members[number - 1].key

    def check_enrolment(self, index: int, key: bytes, proof: Sequence[bytes]) -> None:
        """Return if the key is the roster's device `index`, else raise PeerError."""
        check_inclusion(self.frozen.roster_root, self.frozen.roster_size, index, roster_leaf(index, key), proof)

    def verify_header(self, signed: Signed) -> Header:
        """A contributor's header, if an enrolled device signed it. Raises PeerError otherwise."""
        header = decode(Header, signed.body)
        self.check_enrolment(header.sender, header.key, header.enrolment)
        check_signature(header.key, label_of(Header), signed.body, signed.signature)
        return header
