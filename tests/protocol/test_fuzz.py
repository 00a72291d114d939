"""Any bytes whatever, given to any party in any phase: a PeerError with a reason, and the state as it was.

The long run is `make fuzz`; these are the same targets, a few hundred messages each.
"""

from __future__ import annotations

from random import Random

import pytest
import recording
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.errors import PeerError, RoundAborted
from edge_sdk.protocol import aggregator, member
from edge_sdk.protocol.contributor import Contribution
from edge_sdk.protocol.messages import Complaint, Delivery, Epoch, Header, Signed, Ticket, decode, sign, unwrap, wrap
from edge_sdk.protocol.plan import Layout

COMMITTEES = ("everyone", "helpers")
TARGETS = [(name, target) for name in COMMITTEES for target in recording.recording(name).targets]
committees = st.sampled_from(COMMITTEES)
randoms = st.randoms(use_true_random=False)

every_target = pytest.mark.parametrize(
    ("committee", "target"), TARGETS, ids=[f"{name}-{target.name.replace(' ', '-')}" for name, target in TARGETS]
)


@every_target
def test_any_bytes_are_refused_and_change_nothing(committee, target):
    @settings(max_examples=30)
    @given(st.binary(max_size=300))
    def check(data):
        assert recording.attack(target, data)

    check()


@every_target
def test_a_hostile_message_is_taken_whole_or_refused_whole(committee, target):
    rec = recording.recording(committee)

    @settings(max_examples=100)
    @given(randoms)
    def check(rng: Random):
        recording.attack(target, recording.hostile_wire(rng, rec))

    check()


@every_target
def test_every_valid_message_of_the_round_in_every_phase_is_taken_or_refused_whole(committee, target):
    taken = sum(recording.attack(target, letter.wire) is None for letter in recording.recording(committee).letters)
    nothing_due = {"coordinator open", "coordinator aborted", "coordinator done", "contributor idle too late"}
    assert (taken > 0) == (target.name not in nothing_due)


@every_target
def test_every_valid_message_under_another_label_is_refused(committee, target):
    """A body that its author signed as one kind is shown as each other kind, in every phase."""
    rec = recording.recording(committee)
    for letter in rec.letters:
        for kind in recording.messages.SIGNED:
            if kind is not letter.kind and letter.author is not None:
                assert recording.attack(target, wrap(kind, letter.signed))


@settings(max_examples=300)
@given(randoms, committees)
def test_a_hostile_contribution_is_taken_whole_or_refused_whole(rng: Random, committee):
    rec = recording.recording(committee)
    recording.give_contribution(rec, recording.hostile_contribution(rng, rec))


@given(st.binary(max_size=200), st.binary(max_size=64), st.binary(max_size=64), st.binary(max_size=64), committees)
def test_a_contribution_of_arbitrary_bytes_is_refused(body, signature, masked, shares, committee):
    rec = recording.recording(committee)
    assert recording.give_contribution(rec, Contribution(Signed(body, signature), masked, shares))


@settings(max_examples=300)
@given(randoms, committees)
def test_a_hostile_epoch_is_usable_or_refused(rng: Random, committee):
    rec = recording.recording(committee)
    letter = next(x for x in rec.letters if x.kind is Epoch)
    recording.give_epoch(rec, recording.hostile_signed(rng, rec, letter))


@settings(max_examples=300)
@given(randoms, committees)
def test_a_hostile_ticket_is_usable_or_refused(rng: Random, committee):
    rec = recording.recording(committee)
    letter = rng.choice([x for x in rec.letters if x.kind is Ticket])
    recording.give_round(rec, recording.hostile_signed(rng, rec, letter))


@given(st.binary(max_size=200), st.binary(max_size=80), committees)
def test_arbitrary_bytes_are_no_epoch_and_no_ticket(body, signature, committee):
    rec = recording.recording(committee)
    recording.give_epoch(rec, Signed(body, signature))
    recording.give_round(rec, Signed(body, signature))


@settings(max_examples=200)
@given(randoms, committees)
def test_hostile_shares_split_into_one_a_member_or_are_refused(rng: Random, committee):
    rec = recording.recording(committee)
    contribution = recording.hostile_contribution(rng, rec)
    header = decode(Header, rec.contributions[rng.randrange(len(rec.contributions))].header.body)
    recording.give_shares(rec, header, contribution.shares)


@given(st.integers(1, 5000), st.integers(7, 20), st.integers(0, 40_000))
def test_a_masked_vector_of_another_length_is_refused(dimension, delta_bits, length):
    layout = Layout(dimension, delta_bits)
    if length == layout.masked_bytes:
        length += 1
    with pytest.raises(PeerError, match="masked vector"):
        layout.from_bytes(bytes(length))
    assert layout.from_bytes(bytes(layout.masked_bytes)).shape == (layout.blocks, 2048)


@settings(max_examples=60)
@given(randoms, committees)
def test_hostile_messages_in_a_row_leave_a_party_that_still_works(rng: Random, committee):
    """What is accepted becomes the next state, whichever it is; the party goes on refusing in good order."""
    rec = recording.recording(committee)
    target = rng.choice(rec.targets)
    for _ in range(6):
        data = recording.hostile_wire(rng, rec)
        if recording.attack(target, data) is None:
            after = target.step(target.state, data)
            target = recording.Target(target.name, after, target.step, (PeerError, RoundAborted))


@pytest.mark.parametrize("committee", COMMITTEES)
def test_a_share_that_is_no_share_is_complained_about(committee):
    """Wrong lengths, residues that are too large, low-order keys: the delivery is taken, and its sender named."""
    rec = recording.recording(committee)
    target = next(target for target in rec.targets if target.name == "member inspecting nothing yet")
    sender = decode(Header, rec.contributions[2].header.body).sender
    good = [contribution.header for contribution in rec.contributions]
    seen = 0
    for letter in rec.letters:
        items = decode(Delivery, letter.body).items if letter.kind is Delivery else []
        if len(items) == 1 and items[0][0] not in good:
            state, reply = member.step(target.state, letter.wire, rec.epoch, rec.committee[0], recording.NOW_S)
            complaint = decode(Complaint, unwrap(reply)[1].body)
            assert complaint.senders == [sender]
            assert state.sessions[rec.round.tid].shown[sender].share is None
            seen += 1
    assert seen == 10


def test_a_complaint_about_everybody_ends_in_a_seal_or_an_abort():
    """A complaint that passed `step` never breaks `seal`, whoever it names."""
    rec = recording.recording("helpers")
    state: aggregator.State = rec.coordinators[1]
    for number, identity in enumerate(rec.committee, start=1):
        complaint = sign(identity, Complaint(rec.round.tid, number, list(rec.coordinators[1].entries)))
        state = aggregator.step(state, wrap(Complaint, complaint))
    assert isinstance(aggregator.seal(state, rec.coordinator, recording.NOW_S), aggregator.Aborted)
