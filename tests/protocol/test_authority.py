"""The fleet authority: what it freezes, what the beacon draws, and what a device accepts of an epoch."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stage import seed

from edge_sdk.crypto.identity import Identity
from edge_sdk.errors import ParameterError, PeerError
from edge_sdk.protocol.authority import (
    FleetEpoch,
    Roster,
    beacon,
    committee_indices,
    draw,
    freeze,
    ranks,
    roster_leaf,
)
from edge_sdk.protocol.messages import Epoch, Frozen, Grouping, Member, Signed, decode, sign

AUTHORITY, COORDINATOR = Identity(seed("authority")), Identity(seed("coordinator"))
DEVICES = [Identity(seed("enrolled", i)) for i in range(40)]
HELPERS = [Identity(seed("box", i)) for i in range(5)]


def roster_of(count: int) -> Roster:
    return Roster([device.public_key for device in DEVICES[:count]])


def frozen_of(count: int, committee: str = "everyone", **changes: object) -> Signed:
    arguments = {"coordinator": COORDINATOR.public_key, "corrupt_devices": 1, "committee": committee}
    arguments |= {"expires_s": 1_000_000} | changes
    return freeze(AUTHORITY, roster_of(count), **arguments)


def epoch_of(
    count: int, committee: str = "everyone", group_counts: tuple[int, ...] = (1,), **changes: object
) -> Signed:
    return draw(AUTHORITY, frozen_of(count, committee, **changes), roster_of(count), seed("entropy"), group_counts)


def changed(signed: Signed, signer: Identity = AUTHORITY, **fields: object) -> Signed:
    """The epoch with some fields changed and signed again; fields of `Frozen` go into it."""
    epoch = decode(Epoch, signed.body)
    inner = {f: fields.pop(f, getattr(epoch.frozen, f)) for f in Frozen.__struct_fields__}
    outer = {f: fields.pop(f, getattr(epoch, f)) for f in ("entropy", "members", "groupings")}
    assert not fields
    return sign(signer, Epoch(Frozen(**inner), **outer))


# --- The beacon's shuffle -----


@given(st.binary(min_size=32, max_size=32), st.sampled_from(["groups", "committee"]), st.integers(1, 3000))
def test_the_shuffle_is_a_permutation(beacon_seed, purpose, size):
    assert np.array_equal(np.sort(ranks(beacon_seed, purpose, size)), np.arange(size))


def test_the_shuffle_follows_from_seed_purpose_and_size_and_differs_between_them():
    first = ranks(seed("a"), "groups", 100)
    assert np.array_equal(first, ranks(seed("a"), "groups", 100))
    assert not np.array_equal(first, ranks(seed("b"), "groups", 100))
    assert not np.array_equal(first, ranks(seed("a"), "committee", 100))


def test_every_device_comes_to_every_place_equally_often():
    """10 devices, 4,000 beacons: 400 expected in each of 100 cells, deviation 19; the chi-square of 81 degrees of
    freedom is below 140 with probability 0.9999. The beacons are fixed, so this passes always or never."""
    size, draws = 10, 4_000
    cells = np.zeros((size, size))
    for i in range(draws):
        cells[np.arange(size), ranks(seed("beacon", i), "groups", size)] += 1
    chi_square = ((cells - draws / size) ** 2 / (draws / size)).sum()
    assert chi_square < 140


def test_a_drawn_committee_holds_every_device_equally_often():
    """20 of 40 in 1,000 epochs: 500 each, deviation 16."""
    frozen = decode(Frozen, frozen_of(40, "drawn", committee_size=20).body)
    served = Counter(i for e in range(1000) for i in committee_indices(frozen, beacon(frozen, seed("epoch", e))))
    assert len(served) == 40
    assert all(abs(count - 500) < 5 * 16 for count in served.values())


@pytest.mark.parametrize("groups", [1, 2, 3, 7, 8])
def test_groups_are_balanced_and_every_device_is_in_one(groups):
    epoch = FleetEpoch(AUTHORITY.public_key, epoch_of(40, "helpers", (groups,), helpers=_keys(HELPERS)))
    sizes = Counter(epoch.group_of(i, groups) for i in range(40))
    assert set(sizes) == set(range(groups))
    assert max(sizes.values()) - min(sizes.values()) <= 1


def test_the_beacon_hangs_on_the_frozen_roster_and_on_the_entropy():
    frozen = decode(Frozen, frozen_of(10).body)
    other = decode(Frozen, frozen_of(11).body)
    assert beacon(frozen, seed("e")) != beacon(other, seed("e"))
    assert beacon(frozen, seed("e")) != beacon(frozen, seed("f"))


def _keys(identities: list[Identity]) -> list[bytes]:
    return [identity.public_key for identity in identities]


# --- Roster -----


def test_a_rosters_order_does_not_hang_on_the_order_of_enrolment():
    keys = _keys(DEVICES[:10])
    assert Roster(keys).root == Roster(keys[::-1]).root
    assert Roster(keys).root != Roster(keys[1:]).root


def test_every_enrolled_device_proves_its_place_and_no_other():
    roster = roster_of(11)
    epoch = FleetEpoch(AUTHORITY.public_key, epoch_of(11))
    for device in DEVICES[:11]:
        index, proof = roster.enrolment(device.public_key)
        epoch.check_enrolment(index, device.public_key, proof)
        for other in {(index + 1) % 11, index ^ 1, 11, 1 << 19} - {index}:
            with pytest.raises(PeerError, match="inclusion proof"):
                epoch.check_enrolment(other, device.public_key, proof)
    assert roster_leaf(1, b"k") != roster_leaf(2, b"k")


def test_a_device_that_is_not_in_the_roster_has_no_proof():
    with pytest.raises(ParameterError, match="is not in the roster"):
        roster_of(5).enrolment(DEVICES[6].public_key)


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ([], "a roster holds 1 to"),
        ([bytes(31)], "a roster key has 32 bytes"),
        ([bytes(32), bytes(32)], "a device is in the roster twice"),
    ],
)
def test_a_roster_that_cannot_be_is_refused(keys, match):
    with pytest.raises(ParameterError, match=match):
        Roster(keys)


# --- Freezing and drawing -----


@pytest.mark.parametrize(
    ("count", "changes", "match"),
    [
        (3, {}, "a fleet of 3 cannot be its own committee"),
        (10, {"corrupt_devices": 0}, "1 to 9"),
        (10, {"corrupt_devices": 10}, "1 to 9"),
        (10, {"corrupt_devices": 4}, "tolerates 3"),
        (10, {"helpers": [bytes(32)]}, "helpers are named exactly when"),
        (10, {"committee": "helpers"}, "helpers are named exactly when"),
        (10, {"committee": "helpers", "helpers": [bytes(32), bytes(32), bytes([1] * 32)]}, "listed twice"),
        (10, {"committee": "helpers", "helpers": [bytes(32), bytes([1] * 32)]}, "pin at least 3"),
        (40, {"committee": "drawn"}, "needs committee_size"),
        (40, {"committee": "drawn", "committee_size": 41}, "cannot draw 41"),
    ],
)
def test_a_fleet_without_a_safe_committee_is_not_frozen(count, changes, match):
    with pytest.raises(ParameterError, match=match):
        frozen_of(count, **changes)


def test_the_beacon_is_drawn_for_the_roster_that_was_frozen_only():
    with pytest.raises(ParameterError, match="not the roster that was frozen"):
        draw(AUTHORITY, frozen_of(10), roster_of(11), seed("e"))
    with pytest.raises(ParameterError, match="32 bytes, not 31"):
        draw(AUTHORITY, frozen_of(10), roster_of(10), bytes(31))
    with pytest.raises(PeerError, match="frozen: the signature is not valid"):
        draw(COORDINATOR, frozen_of(10), roster_of(10), seed("e"))


@pytest.mark.parametrize("counts", [(0,), (-1,), (6,), (65,)])
def test_groups_of_fewer_than_two_devices_are_not_offered(counts):
    with pytest.raises(ParameterError, match="each needs two devices"):
        epoch_of(10, group_counts=counts)


# --- What a device accepts -----


@pytest.mark.parametrize(
    ("count", "committee", "changes", "members"),
    [
        (10, "everyone", {}, 10),
        (40, "drawn", {"committee_size": 20}, 20),
        (10, "helpers", {"helpers": _keys(HELPERS)}, 5),
    ],
)
def test_an_epoch_as_the_authority_makes_it_is_accepted(count, committee, changes, members):
    epoch = FleetEpoch(AUTHORITY.public_key, epoch_of(count, committee, (1, 2), **changes))
    assert len(epoch.members) == epoch.thresholds.members == members
    for number, entry in enumerate(epoch.members, start=1):
        assert epoch.member_number(entry.key) == number
        assert epoch.member_key(number) == entry.key
    for outside in (0, members + 1):
        with pytest.raises(PeerError, match=f"this committee has {members}"):
            epoch.member_key(outside)
    with pytest.raises(ParameterError, match="not a member of this epoch's committee"):
        epoch.member_number(seed("nobody"))


def _swap(members: list[Member]) -> list[Member]:
    return [members[1], members[0], *members[2:]]


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"fleet": COORDINATOR.public_key}, "another fleet's"),
        ({"entropy": seed("chosen to suit")}, "not the one that the beacon draws"),
        ({"number": 2}, "not the one that the beacon draws"),
        ({"coordinator": seed("another")}, "not the one that the beacon draws"),
        ({"roster_size": 41}, "not the one that the beacon draws"),
        ({"committee_size": 21}, "not the one that the beacon draws"),
        ({"corrupt_devices": 20}, "leave no quorum"),
        ({"committee": "everyone"}, "'everyone' means all 40"),
        ({"committee": "helpers"}, "helpers are named exactly when the committee is 'helpers'"),
        ({"groupings": [Grouping(1, 1), Grouping(1, 1)]}, "a number of groups is listed twice"),
        ({"groupings": [Grouping(1, 2)]}, "2 corrupt devices in one of 1 groups is not possible"),
    ],
)
def test_an_epoch_that_does_not_follow_from_its_beacon_is_refused_even_if_the_authority_signed_it(fields, match):
    signed = epoch_of(40, "drawn", committee_size=20)
    with pytest.raises(PeerError, match=match):
        FleetEpoch(AUTHORITY.public_key, changed(signed, **fields))


def test_members_that_the_beacon_did_not_draw_in_that_order_are_refused():
    signed = epoch_of(40, "drawn", committee_size=20)
    members = decode(Epoch, signed.body).members
    doubled = [Member(members[1].key, members[0].index), *members[1:]]
    for lie, match in [
        (_swap(members), "beacon draws"),
        (members[1:], "beacon draws"),
        ([*members, members[0]], "beacon draws"),
        ([Member(members[0].key, None), *members[1:]], "beacon draws"),
        (doubled, "a member is listed twice"),
    ]:
        with pytest.raises(PeerError, match=match):
            FleetEpoch(AUTHORITY.public_key, changed(signed, members=lie))


def test_helpers_that_were_not_pinned_are_refused():
    signed = epoch_of(10, "helpers", helpers=_keys(HELPERS))
    members = decode(Epoch, signed.body).members
    for lie in (members[1:], _swap(members), [Member(seed("mine"), None), *members[1:]]):
        with pytest.raises(PeerError, match="not the pinned helpers"):
            FleetEpoch(AUTHORITY.public_key, changed(signed, members=lie))


def test_an_understated_group_bound_is_refused():
    """4 corrupt devices in 2 groups: one group holds 2 of them whatever the beacon says."""
    signed = epoch_of(40, "helpers", (1, 2), helpers=_keys(HELPERS), corrupt_devices=4)
    with pytest.raises(PeerError, match="1 corrupt devices in one of 2 groups is not possible"):
        FleetEpoch(AUTHORITY.public_key, changed(signed, groupings=[Grouping(1, 4), Grouping(2, 1)]))


@pytest.mark.parametrize("signer", [COORDINATOR, DEVICES[0], HELPERS[0]], ids=["coordinator", "device", "helper"])
def test_an_epoch_of_anyone_else_is_refused(signer):
    with pytest.raises(PeerError, match="epoch: the signature is not valid"):
        FleetEpoch(AUTHORITY.public_key, changed(epoch_of(10), signer=signer))


def test_a_fleet_of_one_kind_never_takes_another_fleets_epoch():
    other = Identity(seed("another authority"))
    signed = changed(epoch_of(10), signer=other, fleet=other.public_key)
    with pytest.raises(PeerError, match="signature is not valid"):
        FleetEpoch(AUTHORITY.public_key, signed)
