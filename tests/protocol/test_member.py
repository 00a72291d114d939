"""A committee member: every message may come again, nothing out of order changes it, and what is spent is gone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stage import (
    CLOSES_S,
    EXPIRES_S,
    LATE_S,
    Stage,
    contents_of,
    following,
    forge,
    seed,
    send,
    shows,
    staged,
    ticket_like,
)

from edge_sdk.crypto.hashing import derive_key
from edge_sdk.crypto.identity import Identity
from edge_sdk.crypto.sealing import PREKEY_SEED_BYTES
from edge_sdk.crypto.shamir import PRIME
from edge_sdk.errors import ParameterError, PeerError
from edge_sdk.protocol import member
from edge_sdk.protocol.member import Closed, Committed, Inspecting, MemberState, Released, expire
from edge_sdk.protocol.messages import (
    Abort,
    Complaint,
    Delivery,
    Epoch,
    PrekeyOffer,
    Receipt,
    Release,
    Seal,
    SealSignature,
    Ticket,
    decode,
    sign,
    unwrap,
    wrap,
)
from edge_sdk.protocol.rounds import Round, seal_hash

BASE = staged(6)
TID = BASE.round.tid
TICKET = wrap(Ticket, BASE.round.signed)
DELIVERY = wrap(Delivery, Delivery(TID, BASE.mail[1]))
SEALED = BASE.sealed()
SEAL = wrap(Seal, SEALED.seal)
CERTIFICATE = BASE.certificate_from(SEALED.seal, {n: BASE.signature_of(n, SEALED.seal) for n in (2, 3, 4, 5)})
ABORT = BASE.lie(Abort(TID, "too few came"))
STEPS = {"ticket": TICKET, "delivery": DELIVERY, "seal": SEAL, "certificate": CERTIFICATE}


def at(phase: str) -> Stage:
    """Member 1 in a phase; the others know nothing."""
    stage = BASE.fork()
    path = {
        "new": [],
        "Inspecting": ["ticket", "delivery"],
        "Committed": ["ticket", "delivery", "seal"],
        "Released": ["ticket", "delivery", "seal", "certificate"],
    }
    for name in path.get(phase, ["ticket", "delivery"]):
        stage.tell(1, STEPS[name])
    if phase == "Closed":
        stage.tell(1, ABORT)
    if phase != "new":
        assert type(stage.states[1].sessions[TID]).__name__ == phase
    return stage


PHASES = ("new", "Inspecting", "Committed", "Released", "Closed")


def test_a_member_goes_through_its_phases_and_answers_each_once():
    stage = BASE.fork()
    assert stage.tell(1, TICKET) is None
    assert stage.tell(1, DELIVERY) is None, "every share opens: nothing to complain about"
    signed = unwrap(stage.tell(1, SEAL) or b"")
    assert signed[0] is SealSignature
    assert decode(SealSignature, signed[1].body) == SealSignature(TID, SEALED.digest, 1)
    released = unwrap(stage.tell(1, CERTIFICATE) or b"")
    assert released[0] is Release
    assert decode(Release, released[1].body).seal == SEALED.digest


def test_a_release_is_the_sum_of_the_shares_and_says_nothing_else():
    """Known answer: the sum modulo 65521 of the shares that six forged dealers gave to member 1."""
    stage = staged(6, senders=())
    shares = {}

    def keep(index: int):
        def look(values: np.ndarray) -> np.ndarray:
            shares[index] = values[0]
            return values

        return look

    for index in range(6):
        stage.take(forge(stage.fleet, stage.round, index, values=keep(index)))
    stage.inspect()
    certified = stage.certify(stage.sealed())
    answer = stage.release(certified, 1).answers[1]
    expected = sum(shares.values()) % PRIME
    np.testing.assert_array_equal(np.frombuffer(answer[0] or b"", dtype="<u2"), expected)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("times", [1, 3])
def test_every_message_may_come_again_and_gives_the_same_answer(name, times):
    after = {"ticket": "Inspecting", "delivery": "Inspecting", "seal": "Committed", "certificate": "Released"}[name]
    stage = at(after)
    first = at(after).tell(1, STEPS[name])
    before = contents_of(stage.states[1])
    for _ in range(times):
        assert stage.tell(1, STEPS[name]) == first
    assert contents_of(stage.states[1]) == before


@pytest.mark.parametrize("phase", ["Released", "Closed"])
def test_an_abort_after_the_end_changes_nothing(phase):
    stage = at(phase)
    before = stage.states[1]
    assert stage.tell(1, ABORT) is None
    assert stage.states[1] is before


REFUSED = {
    "new": {"delivery": "does not know", "seal": "does not know", "certificate": "does not know", "abort": "not know"},
    "Inspecting": {"certificate": "certificate: not expected while Inspecting"},
    "Committed": {"delivery": "delivery: not expected while Committed"},
    "Released": {
        "delivery": "delivery: not expected while Released",
        "seal": "seal: not expected while Released",
    },
    "Closed": {
        "delivery": "delivery: not expected while Closed",
        "seal": "seal: not expected while Closed",
        "certificate": "certificate: not expected while Closed",
    },
}


@pytest.mark.parametrize(("phase", "name"), [(p, n) for p, refused in REFUSED.items() for n in refused])
def test_a_message_out_of_order_is_refused_and_the_old_state_stands(phase, name):
    at(phase).refuses(1, (STEPS | {"abort": ABORT})[name], REFUSED[phase][name])


@pytest.mark.parametrize("phase", PHASES)
def test_a_message_that_is_not_for_members_is_refused(phase):
    stage = at(phase)
    others = {
        "receipt": stage.lie(Receipt(TID, 1, seed("h"))),
        "complaint": stage.lie(Complaint(TID, 1, [])),
        "release": stage.lie(Release(TID, SEALED.digest, 2, [None])),
        "sealsignature": stage.lie(SealSignature(TID, SEALED.digest, 2)),
        "prekeyoffer": wrap(PrekeyOffer, stage.round.ticket.prekeys[0]),
        "epoch": wrap(Epoch, stage.round.signed),
    }
    for label, data in others.items():
        stage.refuses(1, data, f"{label}: not a message to a member")


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("what", ["ticket", "seal", "abort"])
def test_a_message_that_the_coordinator_did_not_sign_is_refused(phase, what):
    stranger = Identity(seed("stranger"))
    message = {
        "ticket": BASE.round.ticket,
        "seal": decode(Seal, SEALED.seal.body),
        "abort": Abort(TID, "stop"),
    }[what]
    # Who must have signed a seal or an abort is known from the ticket that it names.
    unknown = phase == "new" and what != "ticket"
    reason = "for a ticket that this member does not know" if unknown else "the signature is not valid"
    at(phase).refuses(1, wrap(type(message), sign(stranger, message)), f"{what}: {reason}")


@given(st.lists(st.sampled_from([*STEPS, "abort"]), max_size=12))
@settings(max_examples=60)
def test_in_any_order_of_messages_a_member_signs_one_set_and_releases_it_once(names):
    """Against a model: what the answers may be follows from the phase alone."""
    stage, replies = BASE.fork(), {"seal": set(), "certificate": set()}
    for name in names:
        before = stage.states[1]
        try:
            reply = stage.tell(1, (STEPS | {"abort": ABORT})[name])
        except PeerError:
            assert stage.states[1] is before
            continue
        if reply is not None:
            replies[name].add(reply)
    assert all(len(answers) <= 1 for answers in replies.values())
    if replies["certificate"]:
        came = iter(names)
        assert all(name in came for name in STEPS), "each step came, in this order"
        session = stage.states[1].sessions[TID]
        assert isinstance(session, Released)
        assert not stage.states[1].prekeys


# --- Deliveries -----


def test_mail_may_come_in_pieces_and_headers_before_shares():
    whole, pieces = at("Inspecting"), BASE.fork()
    pieces.tell(1, TICKET)
    for item in BASE.mail[1]:
        pieces.tell(1, wrap(Delivery, Delivery(TID, [(item[0], None)])))
        pieces.tell(1, wrap(Delivery, Delivery(TID, [item])))
        pieces.tell(1, wrap(Delivery, Delivery(TID, [(item[0], None)])))
    assert contents_of(pieces.states[1]) == contents_of(whole.states[1])


def test_a_member_that_was_shown_a_header_only_signs_but_cannot_answer_for_its_group():
    stage = BASE.fork()
    stage.inspect(2, 3, 4, 5, 6)
    stage.tell(1, TICKET)
    shown = [*BASE.mail[1][:5], (BASE.mail[1][5][0], None)]
    assert stage.tell(1, wrap(Delivery, Delivery(TID, shown))) is None, "it has nothing to complain about"
    certified = stage.release(stage.certify(SEALED))
    assert certified.answers[1] == (None,)
    np.testing.assert_array_equal(stage.open(certified).sums[0].values, stage.true_sum(range(6)))


def test_a_header_that_was_not_shown_is_not_signed_for():
    stage = BASE.fork()
    stage.tell(1, TICKET)
    stage.tell(1, wrap(Delivery, Delivery(TID, BASE.mail[1][:5])))
    stage.refuses(1, SEAL, "the header of sender 5 was not shown to this member")


def test_one_bad_item_refuses_the_whole_delivery():
    stage = BASE.fork()
    stage.tell(1, TICKET)
    header, share = BASE.mail[1][2]
    broken = replace_signature(header)
    stage.refuses(
        1, wrap(Delivery, Delivery(TID, [*BASE.mail[1][:2], (broken, share)])), "header: the signature is not valid"
    )


def replace_signature(signed):
    return type(signed)(signed.body, signed.signature[:-1] + bytes([signed.signature[-1] ^ 1]))


def test_more_headers_than_n_max_are_refused():
    stage = staged(6)
    smaller = Round(stage.fleet.epoch, ticket_like(stage, n_max=4))
    stage.tell(1, wrap(Ticket, smaller.signed))
    items = [(send(stage.fleet, smaller, i).contribution.header, None) for i in range(5)]
    stage.tell(1, wrap(Delivery, Delivery(smaller.tid, items[:4])))
    stage.refuses(1, wrap(Delivery, Delivery(smaller.tid, items)), "more than n_max = 4 contributors")


def test_a_complaint_is_repeated_and_grows_and_is_never_taken_back():
    stage = staged(6, senders=range(4))
    for liar in (4, 5):
        stage.take(forge(stage.fleet, stage.round, liar, sealed=lambda blobs: [blobs[0][::-1], *blobs[1:]]))
    stage.tell(1, wrap(Ticket, stage.round.signed))
    first = stage.tell(1, wrap(Delivery, Delivery(TID, stage.mail[1][:5])))
    assert decode(Complaint, unwrap(first or b"")[1].body) == Complaint(TID, 1, [4])
    assert stage.tell(1, wrap(Delivery, Delivery(TID, stage.mail[1][:5]))) == first
    second = stage.tell(1, wrap(Delivery, Delivery(TID, stage.mail[1][5:])))
    assert decode(Complaint, unwrap(second or b"")[1].body) == Complaint(TID, 1, [4, 5])


def test_an_empty_delivery_changes_nothing():
    stage = at("Inspecting")
    before = contents_of(stage.states[1])
    assert stage.tell(1, wrap(Delivery, Delivery(TID, []))) is None
    assert contents_of(stage.states[1]) == before


# --- Tickets -----


def test_tickets_are_chained_and_rounds_only_go_up():
    stage = at("Inspecting")
    second = following(stage)
    second.refuses(1, wrap(Ticket, ticket_like(second, previous=seed("a fork"))), "it does not follow the ticket")
    second.tell(1, wrap(Ticket, second.round.signed))
    third = following(second)
    third.tell(1, wrap(Ticket, third.round.signed))
    newest = third.states[1].newest
    assert newest == {"reference": (2, third.round.tid)}
    forgotten = replace(third.states[1], sessions={})
    third.states[1] = forgotten
    third.refuses(1, wrap(Ticket, second.round.signed), "round 1 of reference is before the newest, 2")
    assert isinstance(forgotten, MemberState)


def test_a_gap_between_rounds_cannot_be_checked_and_is_taken():
    stage = at("Inspecting")
    later = following(stage, round=7, previous=seed("not seen"))
    later.tell(1, wrap(Ticket, later.round.signed))
    assert later.states[1].newest["reference"][0] == 7


def test_a_later_ticket_closes_an_inspection_and_leaves_what_was_signed():
    """Signed sets may have a certificate somewhere: they stay answerable until they expire."""
    for phase, kept in (("Inspecting", Closed), ("Committed", Committed), ("Released", Released)):
        stage = at(phase)
        later = following(stage)
        later.tell(1, wrap(Ticket, later.round.signed))
        assert isinstance(later.states[1].sessions[TID], kept)
        serials = {0: kept is Committed, 1: True}
        assert set(later.states[1].prekeys) == {serial for serial, held in serials.items() if held}
        if kept is Committed:
            assert later.tell(1, SEAL) is not None
            assert later.tell(1, CERTIFICATE) is not None


def test_a_set_is_not_signed_once_a_later_ticket_of_its_task_was_seen_even_if_its_inspection_stands():
    """Section 4's condition by itself: a later ticket also closes the inspection, so this state cannot come about."""
    stage = at("Inspecting")
    stage.states[1] = replace(stage.states[1], newest={"reference": (1, seed("a later ticket"))})
    stage.refuses(1, SEAL, "seal: a later ticket of this task was seen")


def test_rounds_of_two_tasks_do_not_disturb_each_other():
    stage = at("Inspecting")
    other = following(stage, task="another", round=0, previous=bytes(32))
    other.tell(1, wrap(Ticket, other.round.signed))
    assert {type(session) for session in other.states[1].sessions.values()} == {Inspecting}
    assert other.tell(1, SEAL) is not None
    assert other.tell(1, CERTIFICATE) is not None
    assert isinstance(other.states[1].sessions[other.round.tid], Inspecting)


def test_a_key_that_does_not_serve_takes_no_ticket():
    helpers = staged(9, "helpers", helpers=5)
    outsider = helpers.fleet.devices[0]
    with pytest.raises(PeerError, match="not a member of this epoch's committee"):
        member.step(MemberState(), wrap(Ticket, helpers.round.signed), helpers.fleet.epoch, outsider, 1)


# --- Time -----


@pytest.mark.parametrize("now_s", [EXPIRES_S, EXPIRES_S + 1, 10**9])
def test_from_its_expiry_on_a_ticket_is_neither_taken_nor_signed_nor_released(now_s):
    at("new").refuses(1, TICKET, "ticket: it has expired", now_s)
    at("Inspecting").refuses(1, SEAL, "seal: the ticket has expired", now_s)
    at("Committed").refuses(1, CERTIFICATE, "certificate: the ticket has expired", now_s)


@pytest.mark.parametrize("now_s", [0, CLOSES_S - 1, CLOSES_S, EXPIRES_S - 0.5])
def test_until_its_expiry_a_ticket_is_served(now_s):
    stage = BASE.fork()
    for data in STEPS.values():
        stage.tell(1, data, now_s)
    assert isinstance(stage.states[1].sessions[TID], Released)


def test_what_is_out_is_given_again_after_the_expiry_until_it_is_forgotten():
    stage = at("Released")
    first = stage.tell(1, CERTIFICATE)
    assert stage.tell(1, CERTIFICATE, EXPIRES_S) == first


@pytest.mark.parametrize("phase", PHASES[1:])
def test_expire_forgets_the_session_and_erases_its_prekey(phase):
    stage = at(phase)
    before = stage.states[1]
    assert expire(before, EXPIRES_S - 1) is before
    after = expire(before, EXPIRES_S)
    assert not after.sessions
    assert not after.prekeys
    assert not after.bound
    assert after.newest == {"reference": (0, TID)}
    assert after.next_serial == before.next_serial
    assert expire(after, EXPIRES_S) == after
    stage.states[1] = after
    for name, match in {"ticket": "is spent or was never offered", "seal": "does not know"}.items():
        stage.refuses(1, STEPS[name], match)
    stage.refuses(1, CERTIFICATE, "does not know")
    stage.refuses(1, TICKET, "it has expired", EXPIRES_S)


def test_expire_leaves_other_rounds_and_unused_prekeys_alone():
    stage = at("Inspecting")
    later = following(stage, task="another", round=0, closes_s=5_000, expires_s=6_000)
    later.tell(1, wrap(Ticket, later.round.signed))
    fresh = derive_key(seed("spare"), "prekey", length=PREKEY_SEED_BYTES)
    state, _ = member.offer_prekey(later.states[1], later.fleet.committee[0], seed("fleet"), fresh, LATE_S)
    after = expire(state, EXPIRES_S)
    assert set(after.sessions) == {later.round.tid}
    assert set(after.prekeys) == {1, 2}
    assert after.spare_prekeys == 1


# --- Prekeys -----


def test_prekeys_have_serials_that_only_go_up_and_are_never_given_twice():
    state, identity, serials = MemberState(), BASE.fleet.committee[0], []
    for i in range(3):
        fresh = derive_key(seed("prekey", i), "prekey", length=PREKEY_SEED_BYTES)
        state, signed = member.offer_prekey(state, identity, seed("fleet"), fresh, LATE_S)
        offer = decode(PrekeyOffer, signed.body)
        assert (offer.fleet, offer.member) == (seed("fleet"), identity.public_key)
        serials.append(offer.serial)
    assert serials == [0, 1, 2]
    assert state.spare_prekeys == 3


def test_a_spent_prekey_does_not_free_its_serial():
    released = at("Released").states[1]
    assert released.next_serial == 1
    assert released.spare_prekeys == 0
    _, signed = member.offer_prekey(
        released,
        BASE.fleet.committee[0],
        seed("fleet"),
        derive_key(seed("p"), "prekey", length=PREKEY_SEED_BYTES),
        LATE_S,
    )
    assert decode(PrekeyOffer, signed.body).serial == 1


def test_a_prekey_seed_of_another_length_is_the_callers_fault():
    with pytest.raises(ParameterError, match="a prekey's seed has 96 bytes, not 32"):
        member.offer_prekey(MemberState(), BASE.fleet.committee[0], seed("fleet"), bytes(32), LATE_S)


def test_a_release_leaves_neither_prekey_nor_share_behind():
    stage = at("Committed")
    held = [stage.states[1].prekeys[0], *filter(None, stage.states[1].sessions[TID].shares.values())]
    stage.tell(1, CERTIFICATE)
    kept = all_bytes(stage.states[1])
    assert not [secret for secret in held if secret in kept]
    closed = at("Inspecting")
    closed.tell(1, ABORT)
    kept = all_bytes(closed.states[1])
    assert not [secret for secret in held if secret in kept]


def all_bytes(thing: object) -> bytes:
    """Every byte string that is reachable from a state, one after the other; the round's public parts aside."""
    if isinstance(thing, bytes):
        return thing + b"|"
    if isinstance(thing, dict):
        return b"".join(all_bytes(k) + all_bytes(v) for k, v in thing.items())
    if isinstance(thing, list | tuple | set | frozenset):
        return b"".join(map(all_bytes, thing))
    if isinstance(thing, MemberState | Inspecting | Committed | Released | Closed | member.Shown):
        return b"".join(all_bytes(v) for k, v in vars(thing).items() if k != "round")
    return b""


@pytest.mark.parametrize("phase", PHASES)
def test_no_secret_is_in_the_repr_of_a_state_or_in_an_error(phase):
    stage = at(phase)
    inspecting = at("Inspecting").states[1].sessions[TID]
    assert isinstance(inspecting, Inspecting)
    secrets = [
        BASE.states[1].prekeys[0],
        *(entry.share[:600] for entry in inspecting.shown.values() if entry.share),
        derive_key(seed("fleet", 6, "everyone", 0), "device", bytes(4)),
    ]
    assert len(secrets) == 8
    texts = [repr(stage.states[1]), *map(repr, stage.states[1].sessions.values()), repr(stage.fleet.committee[0])]
    messages = [*STEPS.values(), ABORT, wrap(Ticket, ticket_like(stage, parameters=seed("x"))), b"\x00", TICKET[:-1]]
    for data in messages:
        try:
            stage.fork().tell(1, data)
        except PeerError as error:
            texts += [str(error), repr(error), repr(error.__cause__)]
    assert not [text for text in texts for secret in secrets if shows(text, secret)]


def test_a_complaining_member_shows_no_share_in_its_error_or_complaint():
    """Not even the bad one: a dealer could make it look like a neighbour's."""
    stage = staged(6, senders=())

    def too_large(values: np.ndarray) -> np.ndarray:
        values = values.copy()
        values[0, 0] = PRIME
        return values

    stage.take(forge(stage.fleet, stage.round, 3, values=too_large))
    complaint = stage.inspect(1)[0]
    assert decode(Complaint, unwrap(complaint)[1].body).senders == [3]
    assert len(complaint) < 250


# --- Signatures -----


def test_a_seal_signature_is_over_the_seals_bytes_and_the_ticket():
    stage = at("Inspecting")
    reply = unwrap(stage.tell(1, SEAL) or b"")[1]
    assert reply.signature == stage.signature_of(1, SEALED.seal)
    assert decode(SealSignature, reply.body).seal == seal_hash(SEALED.seal.body)
    later = following(stage)
    assert later.signature_of(1, SEALED.seal) != reply.signature


def test_a_seal_that_is_signed_otherwise_is_the_same_seal():
    """What counts is the body: Ed25519 signatures are unique here, but nothing hangs on that."""
    stage = at("Committed")
    assert isinstance(stage.states[1].sessions[TID], Committed)
    assert stage.states[1].sessions[TID].seal == seal_hash(SEALED.seal.body)
    stage.refuses(1, wrap(Seal, replace_signature(SEALED.seal)), "seal: the signature is not valid")


def test_more_signatures_than_the_quorum_do_no_harm():
    stage = at("Committed")
    everyone = stage.certificate_from(SEALED.seal, {n: stage.signature_of(n, SEALED.seal) for n in range(1, 7)})
    assert stage.tell(1, everyone) is not None
    first = at("Committed").tell(1, CERTIFICATE)
    assert stage.tell(1, CERTIFICATE) == first, "another certificate over the same set gives the same release"


def test_a_member_that_did_not_sign_the_certified_set_does_not_answer_for_it():
    stage = at("Inspecting")
    stage.tell(1, wrap(Seal, stage.seal_of(range(5))))
    stage.refuses(1, CERTIFICATE, "over another set than the one that this member signed")


def test_an_offer_that_nobody_used_is_erased_when_it_expires():
    """Else a coordinator could keep a round's contributions back until it can read the members' disks."""
    fresh = derive_key(seed("unused"), "prekey", length=PREKEY_SEED_BYTES)
    state, _ = member.offer_prekey(MemberState(), BASE.fleet.committee[0], seed("fleet"), fresh, 500)
    assert member.expire(state, 499).prekeys == {0: fresh}
    after = member.expire(state, 500)
    assert (after.prekeys, after.expiry, after.next_serial) == ({}, {}, 1)


def test_a_ticket_lives_no_longer_than_its_epoch_and_its_prekeys():
    assert Round(BASE.round.epoch, ticket_like(BASE, expires_s=LATE_S)).ticket.expires_s == LATE_S
    BASE.refuses(1, wrap(Ticket, ticket_like(BASE, expires_s=LATE_S + 1)), "ticket: it would outlive its epoch")
    fresh = derive_key(seed("short"), "prekey", length=PREKEY_SEED_BYTES)
    _, offer = member.offer_prekey(MemberState(), BASE.fleet.committee[0], BASE.round.epoch.frozen.fleet, fresh, 1_999)
    ticket = ticket_like(BASE, prekeys=[offer, *BASE.round.ticket.prekeys[1:]])
    BASE.refuses(1, wrap(Ticket, ticket), "ticket: it would outlive the prekey of member 1")
