"""A ticket, checked: what a round is follows from its bytes and from the epoch, for every party alike."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stage import CLOSES_S, header_of, seed, send, staged, ticket_like

from edge_sdk.crypto.hashing import tagged_hash
from edge_sdk.crypto.merkle import check_inclusion
from edge_sdk.crypto.sealing import OVERHEAD_BYTES
from edge_sdk.errors import ParameterError, PeerError
from edge_sdk.protocol.messages import PrekeyOffer, Seal, Signed, Ticket, decode, sign
from edge_sdk.protocol.plan import delta_bits
from edge_sdk.protocol.rounds import Round, seal_hash, share_context, sign_ticket, split_shares

STAGE = staged(12, "helpers", helpers=5, groups=2)
EPOCH, ROUND = STAGE.fleet.epoch, STAGE.round


def test_a_round_is_what_its_bytes_say():
    again = Round(EPOCH, ROUND.signed)
    assert again.tid == ROUND.tid == tagged_hash("ticket", ROUND.signed.body)
    assert again.layout.delta_bits == delta_bits(12)
    assert again.min_group == ROUND.ticket.honest + EPOCH.corrupt_in_group[2] == 3
    assert again.share_bytes == 2 * 2048 + OVERHEAD_BYTES
    assert [offer.member for offer in again.prekeys] == [m.key for m in EPOCH.members]


@pytest.mark.parametrize(
    "changes",
    [
        {"parameters": seed("m")},
        {"bundle": seed("b")},
        {"round": 1},
        {"dimension": 6},
        {"honest": 3},
        {"closes_s": CLOSES_S - 1},
        {"previous": seed("p")},
        {"task": "other"},
        {"n_max": 11},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_any_other_field_makes_it_another_round(changes):
    assert Round(EPOCH, ticket_like(STAGE, **changes)).tid != ROUND.tid


def test_a_ticket_for_another_epoch_is_refused():
    with pytest.raises(PeerError, match="ticket: the signature is not valid"):
        Round(staged(6).fleet.epoch, ROUND.signed)
    with pytest.raises(PeerError, match="it is for another epoch"):
        Round(EPOCH, ticket_like(STAGE, epoch=staged(6).fleet.epoch.id))


@pytest.mark.parametrize(("n_max", "honest", "fits"), [(12, 5, True), (12, 6, False), (6, 2, True), (5, 2, False)])
def test_groups_of_h_plus_f_must_fit_in_n_max(n_max, honest, fits):
    ticket = ticket_like(STAGE, n_max=n_max, honest=honest)
    if fits:
        assert Round(EPOCH, ticket).min_group * 2 <= n_max
    else:
        with pytest.raises(PeerError, match=f"2 groups of at least {honest + 1} do not fit in n_max {n_max}"):
            Round(EPOCH, ticket)


def test_a_coordinator_is_told_before_anyone_sees_a_ticket_that_devices_would_refuse():
    fields = {name: getattr(ROUND.ticket, name) for name in Ticket.__struct_fields__}
    good = sign_ticket(STAGE.fleet.coordinator, EPOCH, Ticket(**fields))
    assert good.tid == ROUND.tid
    for changes, match in [
        ({"n_max": 13}, "devices would refuse this: ticket: n_max 13 is more than the roster's 12"),
        ({"groups": 3}, "no round of 3 groups"),
        ({"honest": 1}, "devices would refuse this: ticket: "),
        ({"prekeys": fields["prekeys"][:4]}, "4 prekeys for a committee of 5"),
    ]:
        with pytest.raises(ParameterError, match=match):
            sign_ticket(STAGE.fleet.coordinator, EPOCH, Ticket(**(fields | changes)))
    with pytest.raises(ParameterError, match="the signature is not valid"):
        sign_ticket(STAGE.fleet.devices[0], EPOCH, Ticket(**fields))


@given(st.integers(0, 10_000), st.integers(1, 255))
@settings(max_examples=100)
def test_a_ticket_with_any_byte_changed_is_no_ticket(position, flip):
    body, signature = bytearray(ROUND.signed.body), bytearray(ROUND.signed.signature)
    target = body if position % 3 else signature
    target[position % len(target)] ^= flip
    with pytest.raises(PeerError):
        Round(EPOCH, Signed(bytes(body), bytes(signature)))


def unusable(kind: str) -> Signed:
    """Member 1's offer, signed by it, that no device can seal a share to."""
    offer = decode(PrekeyOffer, ROUND.ticket.prekeys[0].body)
    x25519, mlkem = (bytes(32), offer.mlkem) if kind == "low order" else (offer.x25519, b"\xff" * len(offer.mlkem))
    return sign(
        STAGE.fleet.committee[0], PrekeyOffer(offer.fleet, offer.member, offer.serial, x25519, mlkem, offer.expires_s)
    )


@pytest.mark.parametrize(
    ("kind", "match"),
    [("low order", "not a usable X25519 key"), ("no lattice key", "not a valid ML-KEM-768 public key")],
)
def test_an_unusable_prekey_is_found_before_the_ticket_goes_out_and_names_its_member(kind, match):
    """One member's offer could otherwise stop every device of every round."""
    prekeys = [unusable(kind), *ROUND.ticket.prekeys[1:]]
    fields = {name: getattr(ROUND.ticket, name) for name in Ticket.__struct_fields__} | {"prekeys": prekeys}
    with pytest.raises(ParameterError, match=f"devices would refuse this: ticket: member 1: prekey: {match}"):
        sign_ticket(STAGE.fleet.coordinator, EPOCH, Ticket(**fields))
    with pytest.raises(PeerError, match=f"ticket: member 1: prekey: {match}"):
        Round(EPOCH, ticket_like(STAGE, prekeys=prekeys))


# --- Seals -----


def groups_of(senders) -> list[list[tuple[int, bytes]]]:
    return decode(Seal, STAGE.seal_of(senders).body).groups


@given(st.sets(st.integers(0, 11)))
def test_a_partition_is_signable_exactly_if_every_group_is_empty_or_has_h_plus_f(senders):
    seal = Seal(ROUND.tid, groups_of(senders))
    sizes = [len(group) for group in seal.groups]
    if any(sizes) and all(size == 0 or size >= 3 for size in sizes):
        ROUND.check_partition(seal)
    else:
        with pytest.raises(PeerError, match=r"seal: (every group is empty|group . has . contributors, 3 needed)"):
            ROUND.check_partition(seal)


def test_a_partition_names_each_sender_once_in_order_and_in_its_group():
    zero, one = groups_of(range(12))
    cases = [
        ([zero[::-1], one], "group 0 is not in ascending order of distinct senders"),
        ([zero[:3] + zero[2:3], one], "ascending order"),
        ([one, zero], "is not of group 0"),
        ([zero, []][::-1], "is not of group 1"),
        ([zero], "1 groups instead of 2"),
        ([zero, one, []], "3 groups instead of 2"),
        ([[*zero, (12, bytes(32))], one[1:]], "sender 12 is not of group 0"),
        ([[*zero, (1 << 19, bytes(32))], one[1:]], "is not of group 0"),
        ([[], []], "every group is empty"),
    ]
    for groups, match in cases:
        with pytest.raises(PeerError, match=match):
            ROUND.check_partition(Seal(ROUND.tid, groups))
    with pytest.raises(PeerError, match="seal: it is for another ticket"):
        ROUND.check_partition(Seal(seed("tid"), [zero, one]))


def test_a_seal_over_n_max_is_refused_even_if_every_sender_is_enrolled():
    small = Round(EPOCH, ticket_like(STAGE, n_max=6))
    with pytest.raises(PeerError, match="more than n_max = 6 contributors"):
        small.check_partition(Seal(small.tid, groups_of(range(12))))


def test_what_members_sign_hangs_on_every_sender_header_and_group():
    zero, one = groups_of(range(12))
    other_header = [(zero[0][0], seed("h")), *zero[1:]]
    bodies = [
        sign(STAGE.fleet.coordinator, Seal(tid, groups)).body
        for tid, groups in [
            (ROUND.tid, [zero, one]),
            (ROUND.tid, [zero, []]),
            (ROUND.tid, [zero[1:], one]),
            (ROUND.tid, [other_header, one]),
            (ROUND.tid, [one, zero]),
            (ROUND.tid, [zero + one, []]),
            (seed("tid"), [zero, one]),
        ]
    ]
    assert len({seal_hash(body) for body in bodies}) == len(bodies)


# --- Shares -----


def test_split_shares_gives_each_member_its_own_with_a_proof():
    contribution = STAGE.contributions[4]
    header = header_of(contribution)
    shares = split_shares(ROUND, header, contribution.shares)
    assert b"".join(share.sealed for share in shares) == contribution.shares
    for number, share in enumerate(shares):
        check_inclusion(header.shares, 5, number, share.sealed, share.proof)
        with pytest.raises(PeerError):
            check_inclusion(header.shares, 5, (number + 1) % 5, share.sealed, share.proof)


def test_shares_of_another_contribution_are_refused():
    header = header_of(STAGE.contributions[4])
    with pytest.raises(PeerError, match="sealed shares of sender 4: they are not the ones that its header binds"):
        split_shares(ROUND, header, STAGE.contributions[5].shares)


def test_a_shares_context_is_another_for_every_part():
    parts = (ROUND.tid, 3, bytes(32), 2, seed("masked"))
    others = [(seed("t"), *parts[1:]), (ROUND.tid, 4, *parts[2:]), (*parts[:2], seed("k"), *parts[3:])]
    others += [(*parts[:3], 3, parts[4]), (*parts[:4], seed("n"))]
    assert len({share_context(*p) for p in (parts, *others)}) == 6


def test_a_header_is_checked_for_author_round_and_group():
    contribution = send(STAGE.fleet, ROUND, 4).contribution
    assert ROUND.check_header(contribution.header).sender == 4
    other = Round(EPOCH, ticket_like(STAGE, round=1, previous=ROUND.tid))
    with pytest.raises(PeerError, match="header of sender 4: it is for another ticket"):
        other.check_header(contribution.header)
