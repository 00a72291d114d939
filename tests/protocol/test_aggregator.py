"""The coordinator's half: what it takes, what it seals, what it certifies and how it ends; its own mistakes too."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stage import (
    CLOSES_S,
    Stage,
    digest_of,
    forge,
    seed,
    send,
    shows,
    stage_of,
    staged,
    ticket_like,
)

from edge_sdk.crypto.hashing import content_hash, derive_key
from edge_sdk.errors import ParameterError, PeerError, RoundAborted, SordinoError
from edge_sdk.protocol import aggregator
from edge_sdk.protocol.aggregator import Aborted, Certified, Collecting, Done, Sealed, phase
from edge_sdk.protocol.contributor import Contribution
from edge_sdk.protocol.messages import (
    Abort,
    Certificate,
    Complaint,
    Delivery,
    GroupResult,
    Receipt,
    Release,
    Seal,
    SealSignature,
    Signed,
    Ticket,
    Transcript,
    encode,
    label_of,
    sign,
    unwrap,
    verify,
    wrap,
)
from edge_sdk.protocol.rounds import Round, seal_hash

BASE = staged(6)
TID = BASE.round.tid


def signature(stage: Stage, n: int, digest: bytes) -> bytes:
    return wrap(SealSignature, sign(stage.fleet.committee[n - 1], SealSignature(stage.round.tid, digest, n)))


def release(stage: Stage, n: int, digest: bytes, value: bytes | None = None) -> bytes:
    message = Release(stage.round.tid, digest, n, [value])
    return wrap(Release, sign(stage.fleet.committee[n - 1], message))


def states() -> dict[str, aggregator.State]:
    stage = BASE.fork()
    stage.inspect()
    sealed = stage.sealed()
    certified = stage.certify(sealed)
    released = stage.release(certified)
    return {
        "OPEN": Collecting(stage.round),
        "COLLECT": stage.collecting,
        "SEALED": sealed,
        "CERTIFIED": certified,
        "RELEASED": released,
        "DONE": stage.open(released),
        "ABORTED": aggregator.abort(sealed, stage.fleet.coordinator, "enough"),
    }


STATES = states()


@pytest.mark.parametrize("name", STATES)
def test_the_phases_have_the_names_of_the_specification(name):
    assert phase(STATES[name]) == name


# --- Contributions -----


@pytest.mark.parametrize("name", ["SEALED", "CERTIFIED", "RELEASED", "DONE", "ABORTED"])
def test_a_contribution_that_comes_first_after_the_seal_is_late(name):
    stage = staged(6, senders=range(5))
    stage.inspect()
    sealed = stage.sealed()
    certified = stage.certify(sealed)
    released = stage.release(certified)
    ended = {"DONE": stage.open(released), "ABORTED": aggregator.abort(sealed, stage.fleet.coordinator, "enough")}
    state = ({"SEALED": sealed, "CERTIFIED": certified, "RELEASED": released} | ended)[name]
    with pytest.raises(RoundAborted, match=f"contribution of sender 5: the round is {name}"):
        aggregator.accept(state, send(stage.fleet, stage.round, 5).contribution, stage.fleet.coordinator, 2)


@pytest.mark.parametrize("name", ["COLLECT", "SEALED", "CERTIFIED", "RELEASED"])
def test_a_contribution_that_is_in_gets_the_same_receipt_again_and_another_one_is_refused(name):
    state, coordinator = STATES[name], BASE.fleet.coordinator
    first = staged(6, senders=()).take(BASE.contributions[0]).receipt
    again = aggregator.accept(state, BASE.contributions[0], coordinator, CLOSES_S)
    assert (again.receipt, again.shares) == (first, None)
    assert again.state is state
    other = send(BASE.fleet, BASE.round, 0, entropy=seed("another")).contribution
    with pytest.raises(PeerError, match="sender 0 already sent another one in this round"):
        aggregator.accept(state, other, coordinator, CLOSES_S)


def test_an_accepted_contribution_is_receipted_by_its_header():
    stage = staged(6, senders=())
    contribution = send(stage.fleet, stage.round, 2).contribution
    accepted = stage.take(contribution)
    kind, signed = unwrap(accepted.receipt)
    assert kind is Receipt
    assert verify(Receipt, stage.fleet.coordinator.public_key, signed) == Receipt(TID, 2, digest_of(contribution))
    assert set(accepted.state.entries) == {2}
    assert accepted.shares is not None
    assert len(accepted.shares) == 6


def _changed(contribution: Contribution, field: str) -> Contribution:
    old = getattr(contribution, field)
    return contribution._replace(**{field: old[:-1] + bytes([old[-1] ^ 1])})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: _changed(c, "masked"), "the masked vector of sender 2 is not the one its header binds"),
        (lambda c: _changed(c, "shares"), "sealed shares of sender 2: they are not the ones that its header binds"),
        (lambda c: c._replace(masked=c.masked[:-4]), "masked vector: 8188 bytes instead of 8192"),
        (lambda c: c._replace(masked=b""), "masked vector: 0 bytes"),
        (lambda c: c._replace(shares=c.shares[:-1]), "sealed shares: .* bytes instead of"),
        (lambda c: c._replace(shares=c.shares + b"\x00"), "sealed shares: .* bytes instead of"),
        (lambda c: c._replace(shares=b""), "sealed shares: 0 bytes"),
        (lambda c: c._replace(header=Signed(c.header.body, bytes(64))), "header: the signature is not valid"),
        (lambda c: c._replace(header=Signed(c.header.body[:-1], c.header.signature)), "header: "),
        (lambda c: c._replace(header=Signed(b"", c.header.signature)), "header: "),
    ],
)
def test_a_contribution_that_is_not_whole_is_refused_by_what_is_wrong(change, match):
    stage = staged(6, senders=(0, 1))
    before = stage.collecting
    with pytest.raises(PeerError, match=match):
        stage.take(change(send(stage.fleet, stage.round, 2).contribution))
    assert stage.collecting is before


def test_shares_in_another_order_are_not_the_ones_that_the_header_binds():
    stage = staged(6, senders=(0, 1))
    contribution = send(stage.fleet, stage.round, 2).contribution
    size = stage.round.share_bytes
    swapped = contribution.shares[size : 2 * size] + contribution.shares[:size] + contribution.shares[2 * size :]
    with pytest.raises(PeerError, match="not the ones that its header binds"):
        stage.take(contribution._replace(shares=swapped))


@pytest.mark.parametrize("now_s", [CLOSES_S, CLOSES_S + 1])
def test_from_its_closing_time_on_no_new_contribution_is_taken_but_an_old_one_is_receipted(now_s):
    stage = staged(6, senders=(0, 1))
    with pytest.raises(RoundAborted, match="the round has closed"):
        aggregator.accept(
            stage.collecting, send(stage.fleet, stage.round, 2).contribution, stage.fleet.coordinator, now_s
        )
    again = aggregator.accept(stage.collecting, stage.contributions[1], stage.fleet.coordinator, now_s)
    assert again.state is stage.collecting


def test_contributions_beyond_n_max_find_the_round_full():
    small = stage_of(BASE.fleet, Round(BASE.fleet.epoch, ticket_like(BASE, n_max=4)))
    for index in range(4):
        small.take(send(small.fleet, small.round, index).contribution)
    with pytest.raises(RoundAborted, match="the round has its 4"):
        small.take(send(small.fleet, small.round, 4).contribution)
    assert aggregator.accept(small.collecting, small.contributions[0], small.fleet.coordinator, 2).shares is None
    sealed = aggregator.seal(small.collecting, small.fleet.coordinator, now_s=2)
    assert isinstance(sealed, Sealed), "at n_max the set may be sealed before the deadline"


@given(st.permutations(range(6)))
@settings(max_examples=10)
def test_the_sealed_set_does_not_hang_on_the_order_of_arrival(order):
    stage = staged(6, senders=())
    for index in order:
        stage.take(BASE.contributions[index])
    assert stage.sealed().digest == BASE.sealed().digest


# --- Out of order -----


def messages() -> dict[str, bytes]:
    sealed = STATES["SEALED"]
    assert isinstance(sealed, Sealed)
    return {
        "complaint": wrap(Complaint, sign(BASE.fleet.committee[0], Complaint(TID, 1, [4]))),
        "sealsignature": signature(BASE, 1, sealed.digest),
        "release": release(BASE, 1, sealed.digest),
        "ticket": wrap(Ticket, BASE.round.signed),
        "seal": wrap(Seal, sealed.seal),
        "abort": BASE.lie(Abort(TID, "no")),
        "receipt": BASE.lie(Receipt(TID, 1, seed("h"))),
        "delivery": wrap(Delivery, Delivery(TID, [])),
        "certificate": wrap(Certificate, Certificate(TID, sealed.digest, [])),
    }


DUE = {
    "OPEN": {"complaint"},
    "COLLECT": {"complaint"},
    "SEALED": {"sealsignature"},
    "CERTIFIED": {"sealsignature", "release"},
    "RELEASED": {"sealsignature", "release"},
    "DONE": set(),
    "ABORTED": set(),
}


@pytest.mark.parametrize("name", STATES)
def test_a_message_that_is_not_due_is_refused_by_name_and_phase(name):
    for kind, data in messages().items():
        if kind not in DUE[name]:
            with pytest.raises(PeerError, match=f"{kind}: not expected while {name}"):
                aggregator.step(STATES[name], data)


@pytest.mark.parametrize("name", ["SEALED", "CERTIFIED", "RELEASED"])
def test_the_same_message_again_changes_nothing(name):
    state = STATES[name]
    assert isinstance(state, Sealed | Certified)
    once = aggregator.step(state, signature(BASE, 2, state.digest))
    assert aggregator.step(once, signature(BASE, 2, state.digest)) == once
    if isinstance(state, Certified):
        assert once is state, "a signature that comes after the certificate adds nothing"
        value = bytes(2 * BASE.round.thresholds.polynomials)
        if name == "CERTIFIED":
            answered = aggregator.step(state, release(BASE, 2, state.digest, value))
            assert aggregator.step(answered, release(BASE, 2, state.digest, value)) == answered


def test_a_complaint_again_changes_nothing_and_another_adds_to_it():
    claim = wrap(Complaint, sign(BASE.fleet.committee[0], Complaint(TID, 1, [4])))
    once = aggregator.step(BASE.collecting, claim)
    assert aggregator.step(once, claim) == once
    more = aggregator.step(once, wrap(Complaint, sign(BASE.fleet.committee[0], Complaint(TID, 1, [2]))))
    assert isinstance(more, Collecting)
    assert more.complaints == {1: {2, 4}}


@pytest.mark.parametrize("tid", [seed("another ticket"), bytes(32)])
def test_a_members_message_for_another_ticket_is_refused(tid):
    sealed, certified = STATES["SEALED"], STATES["CERTIFIED"]
    assert isinstance(sealed, Sealed)
    cases = [
        (sealed, SealSignature(tid, sealed.digest, 1)),
        (certified, SealSignature(tid, sealed.digest, 1)),
        (certified, Release(tid, sealed.digest, 1, [None])),
    ]
    for state, message in cases:
        kind = label_of(type(message))
        with pytest.raises(PeerError, match=f"{kind}: it is for another ticket"):
            aggregator.step(state, wrap(type(message), sign(BASE.fleet.committee[0], message)))


@pytest.mark.parametrize("member", [2, 3, 6])
def test_a_member_cannot_sign_or_answer_in_anothers_name(member):
    sealed, certified = STATES["SEALED"], STATES["CERTIFIED"]
    assert isinstance(sealed, Sealed)
    for state, message in [
        (sealed, SealSignature(TID, sealed.digest, member)),
        (certified, Release(TID, sealed.digest, member, [None])),
    ]:
        with pytest.raises(PeerError, match="the signature is not valid"):
            aggregator.step(state, wrap(type(message), sign(BASE.fleet.committee[0], message)))


# --- Sealing -----


def test_a_seal_holds_the_contributors_by_group_in_ascending_order():
    stage = staged(12, "helpers", helpers=5, groups=2)
    sealed = stage.sealed()
    seal = verify(Seal, stage.fleet.coordinator.public_key, sealed.seal)
    assert seal.tid == stage.round.tid
    for group, entries in enumerate(seal.groups):
        senders = [sender for sender, _ in entries]
        assert senders == sorted(i for i in range(12) if stage.round.epoch.group_of(i, 2) == group)
        assert all(digest == digest_of(stage.contributions[sender]) for sender, digest in entries)
    stage.round.check_partition(seal)
    assert sealed.digest == seal_hash(sealed.seal.body)


def test_a_sender_that_was_left_out_is_not_in_the_state_either():
    stage = staged(6)
    stage.complain([wrap(Complaint, sign(stage.fleet.committee[0], Complaint(TID, 1, [4])))])
    sealed = stage.sealed()
    assert set(sealed.entries) == {0, 1, 2, 3, 5}
    assert sealed.groups == ((0, 1, 2, 3, 5),)


def test_complaints_that_leave_too_few_abort_the_round_with_that_reason():
    """c = 1: two complaints hold an honest one, so the sender stays out even if that ends the round."""
    stage = staged(6, senders=range(3))
    stage.complain(wrap(Complaint, sign(stage.fleet.committee[n - 1], Complaint(TID, n, [1]))) for n in (1, 2))
    ended = aggregator.seal(stage.collecting, stage.fleet.coordinator, CLOSES_S)
    assert isinstance(ended, Aborted)
    assert ended.reason == "no group has 3 contributors: 2 came to 1 groups, 1 more were left out"
    assert verify(Abort, stage.fleet.coordinator.public_key, ended.notice) == Abort(TID, ended.reason)


def test_sealing_the_same_state_again_gives_the_same_set():
    """After a crash between storing and announcing."""
    assert BASE.sealed().seal == BASE.sealed().seal


def test_a_reason_of_any_length_makes_a_valid_notice():
    ended = aggregator.abort(BASE.collecting, BASE.fleet.coordinator, "x" * 10_000)
    assert verify(Abort, BASE.fleet.coordinator.public_key, ended.notice).reason == "x" * 512


# --- Certificate and opening -----


def test_the_certificate_comes_with_the_last_signature_of_the_quorum_and_not_before():
    stage = BASE.fork()
    stage.inspect()
    sealed = stage.sealed()
    state: aggregator.State = sealed
    for count, n in enumerate((6, 2, 5, 1), start=1):
        reply = stage.tell(n, wrap(Seal, sealed.seal))
        state = aggregator.step(state, reply or b"")
        assert isinstance(state, Certified if count == 4 else Sealed)
    assert isinstance(state, Certified)
    assert [n for n, _ in state.certificate.signatures] == [1, 2, 5, 6]


def test_an_opening_that_is_not_final_waits_for_more_answers():
    stage = BASE.fork()
    stage.inspect()
    certified = stage.certify(stage.sealed())
    one = stage.release(certified, 3)
    sums = stage.masked_sums(one.groups)
    assert aggregator.open_round(one, sums, stage.fleet.coordinator, final=False) is one
    two = stage.release(one, 5)
    done = aggregator.open_round(two, sums, stage.fleet.coordinator, final=False)
    assert isinstance(done, Done)
    np.testing.assert_array_equal(done.sums[0].values, stage.true_sum(range(6)))


def test_an_opening_that_is_not_final_waits_if_a_wrong_answer_may_still_be_outvoted():
    stage = BASE.fork()
    stage.inspect()
    certified = stage.certify(stage.sealed())
    wrong = aggregator.step(certified, release(stage, 1, certified.digest, bytes(4096)))
    assert isinstance(wrong, Certified)
    two = stage.release(wrong, 2)
    sums = stage.masked_sums(two.groups)
    assert aggregator.open_round(two, sums, stage.fleet.coordinator, final=False) is two
    done = aggregator.open_round(stage.release(two, 3), sums, stage.fleet.coordinator, final=False)
    assert isinstance(done, Done)
    assert done.sums[0].disagreeing == {1}


def test_a_final_opening_ends_every_group_with_a_sum_or_a_reason_in_a_signed_transcript():
    stage = staged(12, "helpers", helpers=5, groups=2, senders=[i for i in range(12) if i != 7])
    liar_group = stage.round.epoch.group_of(7, 2)
    message = stage.round.layout.encode(np.zeros(5, dtype=np.int64))
    message[0, 5] <<= np.uint32(1)
    stage.take(forge(stage.fleet, stage.round, 7, message=message))
    stage.inspect()
    done = stage.finish()
    transcript = verify(Transcript, stage.fleet.coordinator.public_key, done.transcript)
    assert transcript.tid == stage.round.tid
    assert transcript.seal == transcript.certificate.seal == stage.sealed().digest
    good, bad = transcript.groups[1 - liar_group], transcript.groups[liar_group]
    values = done.sums[1 - liar_group].values
    assert good == GroupResult(6, content_hash(values.astype("<u4").tobytes()), "")
    assert bad == GroupResult(6, None, "no sum passes the checks: the count is 7, not 6")
    assert set(done.sums) | set(done.reasons) == {0, 1}
    assert not set(done.sums) & set(done.reasons)
    assert len(encode(transcript)) < 2_000


def test_masked_vectors_of_another_set_than_the_sealed_one_do_not_open():
    """The coordinator's own mistake, after a bad restart: a vector missing, twice, or of a sender left out."""
    stage = BASE.fork()
    stage.inspect()
    state = stage.release(stage.certify(stage.sealed()))
    for senders in ((0, 1, 2, 3, 4), (0, 1, 2, 3, 4, 5, 5), (0, 1, 2, 3, 4, 4)):
        sums = stage.masked_sums([senders])
        done = aggregator.open_round(state, sums, stage.fleet.coordinator, final=True)
        assert isinstance(done, Done)
        assert not done.sums
        assert "no sum passes the checks" in done.reasons[0]


def test_summing_masked_vectors_refuses_one_of_another_length():
    with pytest.raises(PeerError, match="masked vector: 4 bytes instead of 8192"):
        aggregator.sum_masked(BASE.round, [BASE.contributions[0].masked, bytes(4)])


def test_the_running_sum_does_not_hang_on_order_or_portions():
    vectors = [BASE.contributions[i].masked for i in range(6)]
    whole = aggregator.sum_masked(BASE.round, vectors)
    np.testing.assert_array_equal(aggregator.sum_masked(BASE.round, reversed(vectors)), whole)
    halves = aggregator.sum_masked(BASE.round, vectors[:2]) + aggregator.sum_masked(BASE.round, vectors[2:])
    np.testing.assert_array_equal(halves, whole)
    assert not aggregator.sum_masked(BASE.round, []).any()


def test_a_state_is_not_changed_in_place_by_any_step():
    stage = staged(6, senders=range(4))
    before = stage.collecting
    entries, complaints = dict(before.entries), dict(before.complaints)
    stage.take(send(stage.fleet, stage.round, 4).contribution)
    stage.complain([wrap(Complaint, sign(stage.fleet.committee[0], Complaint(TID, 1, [2])))])
    stage.sealed()
    assert (before.entries, before.complaints) == (entries, complaints)
    sealed = STATES["SEALED"]
    assert isinstance(sealed, Sealed)
    assert sealed.signatures == {}, "Q signatures came to it since"
    certified = STATES["CERTIFIED"]
    assert isinstance(certified, Certified)
    assert certified.answers == {}
    with pytest.raises(AttributeError):
        sealed.digest = bytes(32)  # type: ignore[misc]


@pytest.mark.parametrize("name", STATES)
def test_the_coordinators_secret_is_in_no_repr_and_in_no_error(name):
    secret = derive_key(seed("fleet", 6, "everyone", 0), "coordinator", bytes(4))
    texts = [repr(STATES[name]), repr(BASE.fleet.coordinator)]
    for data in (*messages().values(), b"", b"\xff"):
        try:
            aggregator.step(STATES[name], data)
        except SordinoError as error:
            texts += [str(error), repr(error)]
    try:
        aggregator.seal(BASE.collecting, BASE.fleet.coordinator, 0)
    except ParameterError as error:
        texts.append(str(error))
    assert not [text for text in texts if shows(text, secret)]


@pytest.mark.parametrize("name", STATES)
def test_no_masked_vector_or_share_is_in_the_coordinators_state(name):
    """Bulk belongs on disk: a state stays small, and what is logged of it says nothing of an input."""
    state = STATES[name]
    for contribution in BASE.contributions.values():
        assert not shows(repr(state), contribution.masked[:300])
        assert not shows(repr(state), contribution.shares[-300:])
