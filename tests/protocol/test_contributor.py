"""The data-holding device: one ticket a round, one contribution a ticket, and nothing left of its secrets."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stage import (
    CLOSES_S,
    Stage,
    device_at,
    digest_of,
    following,
    header_of,
    integers_of,
    seed,
    send,
    shows,
    staged,
    ticket_like,
)

from edge_sdk.crypto import masks
from edge_sdk.crypto.hashing import content_hash, derive_key
from edge_sdk.crypto.sealing import Prekey, encapsulate
from edge_sdk.errors import ParameterError, PeerError, RoundAborted
from edge_sdk.protocol.authority import FIRST
from edge_sdk.protocol.contributor import Idle, Sent, State, Terms, Training, contribution_seed, step
from edge_sdk.protocol.messages import (
    Abort,
    Anchor,
    Certificate,
    Complaint,
    Delivery,
    Header,
    Receipt,
    Release,
    Seal,
    SealSignature,
    Ticket,
    sign,
    wrap,
)
from edge_sdk.protocol.rounds import Round, split_shares

LEDGER = Anchor(5, seed("ledger head"))
STAGE = staged(6)
TERMS = Terms(STAGE.round.ticket.bundle)
TICKET = wrap(Ticket, STAGE.round.signed)
SENT = send(STAGE.fleet, STAGE.round, 3)


def to(state: State, data: bytes, now_s: float = 1, stage: Stage = STAGE) -> State:
    return step(state, data, stage.fleet.epoch, TERMS, now_s)


def states() -> dict[str, State]:
    training = to(Idle("reference"), TICKET)
    assert isinstance(training, Training)
    return {"Idle": Idle("reference"), "Training": training, "Sent": SENT}


def receipt_for(sent: Sent) -> bytes:
    return STAGE.lie(Receipt(STAGE.round.tid, sent.sender, digest_of(sent.contribution)))


def test_a_device_takes_a_ticket_contributes_and_forgets():
    training = to(Idle("reference"), TICKET)
    assert isinstance(training, Training)
    sent = training.contribute(integers_of(3, 5), device_at(STAGE.fleet, 3), LEDGER, seed("own"), encapsulate, 1)
    after = to(sent, receipt_for(sent))
    assert after == Idle("reference", 0, STAGE.round.tid)


MEMBERS_MESSAGES = [Delivery, Certificate, Complaint, SealSignature, Release]


@pytest.mark.parametrize("name", ["Idle", "Training", "Sent"])
def test_a_message_that_is_not_due_is_refused_by_name(name):
    state = states()[name]
    due = {"Idle": {"ticket"}, "Training": {"abort"}, "Sent": {"abort", "receipt"}}[name]
    seal = STAGE.seal_of(range(6))
    messages = {
        "ticket": TICKET,
        "receipt": receipt_for(SENT),
        "abort": STAGE.lie(Abort(STAGE.round.tid, "enough")),
        "seal": wrap(Seal, seal),
        "delivery": wrap(Delivery, Delivery(STAGE.round.tid, [])),
        "certificate": STAGE.certificate_from(seal, {}),
        "complaint": STAGE.lie(Complaint(STAGE.round.tid, 1, [])),
        "sealsignature": STAGE.lie(SealSignature(STAGE.round.tid, seed("seal"), 1)),
        "release": STAGE.lie(Release(STAGE.round.tid, seed("seal"), 1, [None])),
        "header": wrap(Header, SENT.contribution.header),
    }
    for kind, data in messages.items():
        if kind in due:
            assert to(state, data) != state
        else:
            with pytest.raises(PeerError, match=f"{kind}: not expected while {name}"):
                to(state, data)


@pytest.mark.parametrize("name", ["Training", "Sent"])
def test_an_abort_ends_the_round_but_not_the_memory_of_its_ticket(name):
    after = to(states()[name], STAGE.lie(Abort(STAGE.round.tid, "too few came")))
    assert after == Idle("reference", 0, STAGE.round.tid)
    with pytest.raises(PeerError, match="the same round again"):
        to(after, TICKET)


@pytest.mark.parametrize("name", ["Training", "Sent"])
def test_an_abort_of_another_round_or_author_is_refused(name):
    state = states()[name]
    with pytest.raises(PeerError, match="abort: it is for another ticket"):
        to(state, STAGE.lie(Abort(seed("tid"), "no")))
    with pytest.raises(PeerError, match="abort: the signature is not valid"):
        to(state, wrap(Abort, sign(STAGE.fleet.devices[0], Abort(STAGE.round.tid, "no"))))


# --- The chain of tickets -----


def ticket(number: int, previous: bytes, **changes: object) -> Round:
    return Round(STAGE.fleet.epoch, ticket_like(STAGE, round=number, previous=previous, **changes))


@given(st.lists(st.integers(0, 6), min_size=1, max_size=12))
@settings(max_examples=40)
def test_rounds_only_go_up_whatever_order_tickets_come_in(numbers):
    state, taken = Idle("reference"), []
    for number in numbers:
        follows = state.tid if state.round + 1 == number else seed("unseen")
        try:
            training = to(state, wrap(Ticket, ticket(number, follows).signed))
        except PeerError:
            assert number <= state.round
            continue
        assert isinstance(training, Training)
        state = training.give_up()
        taken.append(number)
    assert all(a < b for a, b in pairwise(taken))


def test_adjacent_rounds_must_be_chained_and_a_gap_cannot_be_checked():
    after = Idle("reference", 4, seed("tid of round 4"))
    assert isinstance(to(after, wrap(Ticket, ticket(5, seed("tid of round 4")).signed)), Training)
    with pytest.raises(PeerError, match="it does not follow the ticket that this device saw before it"):
        to(after, wrap(Ticket, ticket(5, seed("a fork")).signed))
    assert isinstance(to(after, wrap(Ticket, ticket(6, seed("not seen")).signed)), Training)


def test_the_first_round_of_a_task_follows_the_first_of_all():
    with pytest.raises(PeerError, match="does not follow"):
        to(Idle("reference"), wrap(Ticket, ticket(0, seed("a fork")).signed))
    assert isinstance(to(Idle("reference"), wrap(Ticket, ticket(0, FIRST).signed)), Training)


def test_a_round_before_the_last_one_and_the_same_round_are_told_apart():
    after = Idle("reference", 4, seed("tid"))
    with pytest.raises(PeerError, match="round 3 is a round before the last one"):
        to(after, wrap(Ticket, ticket(3, FIRST).signed))
    with pytest.raises(PeerError, match="round 4 is the same round again"):
        to(after, wrap(Ticket, ticket(4, FIRST).signed))


@pytest.mark.parametrize("now_s", [CLOSES_S, CLOSES_S + 1, 10**9])
def test_a_late_ticket_is_an_expected_abort_and_nobodys_fault(now_s):
    with pytest.raises(RoundAborted, match="round 0 of reference has closed"):
        to(Idle("reference"), TICKET, now_s)
    assert isinstance(to(Idle("reference"), TICKET, CLOSES_S - 0.001), Training)


def test_a_round_that_closes_while_the_device_trains_is_left_without_a_contribution():
    training = Training(STAGE.round)
    with pytest.raises(RoundAborted, match="closed while this device trained"):
        training.contribute(integers_of(3, 5), device_at(STAGE.fleet, 3), LEDGER, seed("e"), encapsulate, CLOSES_S)


def test_the_devices_own_terms_come_before_the_clock():
    """A ticket that breaks the terms is the peer's fault even if it is late: it must not look like bad luck."""
    with pytest.raises(PeerError, match="is not the one registered"):
        step(Idle("reference"), TICKET, STAGE.fleet.epoch, Terms(seed("bundle")), CLOSES_S)


# --- The contribution -----


def contribute(entropy: bytes, round_: Round = STAGE.round, integers=None) -> Sent:
    return send(STAGE.fleet, round_, 3, integers, entropy)


@pytest.mark.parametrize("length", [0, 16, 31, 33, 64])
def test_entropy_of_another_length_is_the_callers_fault(length):
    with pytest.raises(ParameterError, match=f"takes 32 bytes of entropy, not {length}"):
        Training(STAGE.round).contribute(
            integers_of(3, 5), device_at(STAGE.fleet, 3), LEDGER, bytes(length), encapsulate, 1
        )


@pytest.mark.parametrize("integers", [np.zeros(4, int), np.zeros(6, int), np.zeros((5, 1), int), np.zeros(5)])
def test_integers_of_another_shape_or_type_are_the_callers_fault(integers):
    with pytest.raises(ParameterError, match="a contribution is"):
        contribute(seed("e"), integers=integers)


def test_the_callers_integers_stay_as_they_were():
    integers = integers_of(3, 5).astype(np.uint32)
    before = integers.copy()
    contribute(seed("e"), integers=integers)
    np.testing.assert_array_equal(integers, before)


def test_a_contribution_is_bound_together_by_its_header():
    sent = contribute(seed("e"))
    header = header_of(sent.contribution)
    device = device_at(STAGE.fleet, 3)
    assert (header.tid, header.sender, header.key) == (STAGE.round.tid, 3, device.identity.public_key)
    assert header.group == STAGE.round.epoch.group_of(3, 1)
    assert header.masked == content_hash(sent.contribution.masked)
    assert STAGE.round.check_header(sent.contribution.header) == header
    assert len(split_shares(STAGE.round, header, sent.contribution.shares)) == 6
    assert len(sent.contribution.masked) == STAGE.round.layout.masked_bytes
    assert sent.contribution.size == sum(
        map(len, (header_bytes(sent), sent.contribution.masked, sent.contribution.shares))
    )


def header_bytes(sent: Sent) -> bytes:
    return sent.contribution.header.body + sent.contribution.header.signature


def own_seed(entropy: bytes) -> bytes:
    """What `contribute(entropy)` derives everything from."""
    message = STAGE.round.layout.encode(integers_of(3, 5))
    return contribution_seed(entropy, STAGE.round.tid, device_at(STAGE.fleet, 3).identity.public_key, message)


def test_the_same_entropy_masks_no_two_messages_alike():
    """A cloned image with a bad generator, or entropy that a caller kept: c1 - c2 must not be Delta (x1 - x2)."""
    first, again = contribute(seed("e")), contribute(seed("e"))
    assert first.contribution.masked == again.contribution.masked
    other = send(STAGE.fleet, STAGE.round, 3, integers_of(3, 5) + np.eye(1, 5, 2, dtype=np.int64)[0], seed("e"))
    clone = send(STAGE.fleet, STAGE.round, 4, integers_of(3, 5), seed("e"))
    one = STAGE.round.layout.from_bytes(first.contribution.masked)
    for two in (other, clone):
        difference = one - STAGE.round.layout.from_bytes(two.contribution.masked)
        scaled = (difference & np.uint32((1 << STAGE.round.layout.delta_bits) - 1)) == 0
        assert scaled.mean() < 0.1


def test_one_unmasks_to_its_own_input_with_its_own_secret():
    """A known answer from the inside: c - a s = Delta x + e with small e."""
    sent = contribute(seed("e"))
    vector = STAGE.round.layout.from_bytes(sent.contribution.masked).copy()
    masks.remove_mask(vector, masks.expand_secret(own_seed(seed("e")), STAGE.round.tid), STAGE.round.tid)
    bits = STAGE.round.layout.delta_bits
    half = np.uint32(1 << bits - 1)
    flat = ((vector + half) >> np.uint32(bits)).reshape(-1)
    modulus = 1 << STAGE.round.layout.modulus_bits
    assert flat[:5].tolist() == [int(v) % modulus for v in integers_of(3, 5)]
    assert flat[5] == 1
    assert not flat[6:].any()


def test_every_member_finds_its_own_share_and_no_other_in_what_it_is_sent():
    sent = contribute(seed("e"))
    header = header_of(sent.contribution)
    sharing = STAGE.round.thresholds.sharing
    rows = {}
    for n, share in enumerate(split_shares(STAGE.round, header, sent.contribution.shares), start=1):
        context = (STAGE.round.tid, (3).to_bytes(4, "little"), header.key, n.to_bytes(4, "little"), header.masked)
        prekey = Prekey(STAGE.states[n].prekeys[0])
        rows[n] = np.frombuffer(prekey.open(header.sealing_key, share.sealed, *context), dtype="<u2").astype(np.int64)
        for other in set(STAGE.members) - {n}:
            with pytest.raises(PeerError):
                Prekey(STAGE.states[other].prekeys[0]).open(header.sealing_key, share.sealed, *context)
    secret, disagreeing = next(sharing.candidates(rows, lambda _: True))
    np.testing.assert_array_equal(secret, masks.expand_secret(own_seed(seed("e")), STAGE.round.tid))
    assert disagreeing == frozenset()


def test_two_devices_or_two_rounds_or_two_entropies_never_share_a_mask():
    other_round = ticket(1, STAGE.round.tid)
    zeros = np.zeros(5, dtype=np.int64)
    vectors = {
        (label, round_.tid): contribute(seed(label), round_, zeros).contribution.masked
        for label in ("e", "f")
        for round_ in (STAGE.round, other_round)
    }
    assert len(set(vectors.values())) == 4
    for a, b in [(0, 1), (0, 2), (0, 3)]:
        x, y = (np.frombuffer(list(vectors.values())[i], dtype="<u4") for i in (a, b))
        assert (x == y).mean() < 0.01


def test_the_same_entropy_and_input_give_the_same_masked_vector():
    """So that vectors can be made; the sealed shares differ by the encapsulation's own coins."""
    first, second = contribute(seed("e")), contribute(seed("e"))
    assert first.contribution.masked == second.contribution.masked
    assert first.contribution.shares != second.contribution.shares


def test_a_sent_contribution_cannot_be_made_again_from_its_state():
    """No secret is kept, and the state offers no way back: a retry can only send the same bytes."""
    sent = contribute(seed("e"))
    assert set(vars(sent)) == {"round", "sender", "contribution"}
    assert not hasattr(sent, "contribute")
    with pytest.raises(PeerError, match="ticket: not expected while Sent"):
        to(sent, TICKET)
    with pytest.raises(AttributeError):
        sent.contribution = contribute(seed("f")).contribution  # type: ignore[misc]


def test_a_receipt_that_came_twice_finds_the_device_asleep():
    sent = contribute(seed("e"))
    after = to(sent, receipt_for(sent))
    with pytest.raises(PeerError, match="receipt: not expected while Idle"):
        to(after, receipt_for(sent))


def test_no_secret_is_in_the_repr_of_any_state_or_in_any_error():
    own = seed("a secret entropy")
    device = device_at(STAGE.fleet, 3)
    sent = contribute(own)
    secret = masks.expand_secret(own_seed(own), STAGE.round.tid)
    identity_seed = next(
        derive_key(seed("fleet", 6, "everyone", 0), "device", i.to_bytes(4, "little"))
        for i, identity in enumerate(STAGE.fleet.devices)
        if identity.public_key == device.identity.public_key
    )
    secrets = [
        own,
        identity_seed,
        derive_key(own, "mask secret", STAGE.round.tid),
        derive_key(own, "mask errors", STAGE.round.tid),
        derive_key(own, "sharing", STAGE.round.tid),
        derive_key(own, "sealing key", STAGE.round.tid),
        secret.astype(np.int8).tobytes(),
        sent.contribution.masked[:4096],
    ]
    texts = [repr(state) for state in (*states().values(), sent, device, TERMS)]
    for broken in (lambda: contribute(own[:31]), lambda: contribute(own, integers=np.zeros(4, int))):
        with pytest.raises(ParameterError) as caught:
            broken()
        texts += [str(caught.value), repr(caught.value)]
    with pytest.raises(PeerError) as refused:
        to(sent, TICKET)
    texts.append(repr(refused.value))
    assert not [(text, value) for text in texts for value in secrets if shows(text, value)]
    assert shows(repr(own), own), "the search itself finds a secret"
    assert shows(own.hex(), own)


def test_states_are_immutable():
    for state in states().values():
        with pytest.raises(AttributeError):
            state.round = 7  # type: ignore[misc, assignment]
    assert replace(Idle("reference"), round=3) == Idle("reference", 3)


def test_a_device_goes_from_round_to_round():
    state: State = Idle("reference")
    stage = STAGE
    for number in range(3):
        training = to(state, wrap(Ticket, stage.round.signed), stage=stage)
        assert isinstance(training, Training)
        sent = training.contribute(integers_of(3, 5), device_at(stage.fleet, 3), LEDGER, seed(number), encapsulate, 1)
        receipt = stage.lie(Receipt(stage.round.tid, 3, digest_of(sent.contribution)))
        state = to(sent, receipt, stage=stage)
        assert state == Idle("reference", number, stage.round.tid)
        stage = following(stage)
