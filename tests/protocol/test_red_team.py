"""Attacks that were found by looking for them: each was a success before its defence was written.

Those of the design's list are in test_attacks.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import pytest
from protocol.stage import CLOSES_S, EXPIRES_S, following, seed, shows, staged, ticket_like

from edge_sdk.crypto import shamir
from edge_sdk.crypto.stream import KeyStream
from edge_sdk.errors import PeerError
from edge_sdk.protocol import contributor, member, plan
from edge_sdk.protocol.contributor import Idle, Terms
from edge_sdk.protocol.messages import (
    MAX_BODY_BYTES,
    MAX_CONTRIBUTORS,
    MAX_GROUPS,
    MAX_MEMBERS,
    Abort,
    Certificate,
    Release,
    Seal,
    Signed,
    Ticket,
    decode,
    encode,
    unwrap,
    wrap,
)


def lines_run(function: Callable[[], object], filename: str) -> int:
    """How many lines of a file the call executes: a measure of work that is the same on every machine."""
    count = 0

    def trace(frame, event, _):
        nonlocal count
        if frame.f_code.co_filename != filename:
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


# --- One party makes another compute --------------------------------------------------------------------------------


@pytest.mark.parametrize("first_wrong", [0, 8])
def test_a_dealer_that_garbles_its_group_does_not_occupy_the_coordinator(monkeypatch, first_wrong):
    """A committee of 256 needs 44 + 64 answers. With a number by number interpolation, each of 4,096 subsets took
    64 x 108 x 108 multiplications in Python: four minutes for every group, and again for every further answer."""
    thresholds = plan.thresholds("drawn", 256, 2_000, 100)
    assert (thresholds.answers, thresholds.packing) == (108, 64)
    secrets = np.arange(2048) % 9 - 4
    dealt = thresholds.sharing.share(secrets, KeyStream(seed("shares")))
    for n in range(0, 256, 2):  # half of the shares are off their polynomials: far beyond the decoding bound
        dealt[n, first_wrong:] = (dealt[n, first_wrong:] + 1 + n) % shamir.PRIME
    answers = {n: dealt[n - 1] for n in range(1, 257)}
    judged = []

    def small(values):
        judged.append(len(values))
        return int(np.abs(values).max()) < 100

    def work(subsets):
        monkeypatch.setattr(shamir, "MAX_SUBSETS", subsets)
        return lines_run(lambda: list(thresholds.sharing.candidates(answers, small)), shamir.__file__)

    per_subset = (work(12) - work(4)) / 8  # the attempt at unique decoding comes once
    assert len(judged) >= 12 + 4
    assert per_subset < 5_000


def test_a_device_prepares_its_shares_for_a_large_committee_in_few_steps():
    thresholds = plan.thresholds("drawn", 256, 2_000, 100)
    assert lines_run(lambda: thresholds.sharing, shamir.__file__) < 5_000


def test_a_seal_that_nobody_signed_is_refused_by_its_size_before_it_is_parsed():
    """Its author is known only after it was parsed: 16 MB of it took 120 MB of a member's memory."""
    stage = staged()
    stage.inspect()
    unsigned = encode(Seal(stage.round.tid, [[(sender, bytes(32)) for sender in range(6_000)]] * MAX_GROUPS))
    # As it would travel, written without the schema that forbids it.
    signed = b"\x92\xc6" + len(unsigned).to_bytes(4, "big") + unsigned + b"\xc4\x40" + bytes(64)
    envelope = b"\x92\xa4seal\xc6" + len(signed).to_bytes(4, "big") + signed
    stage.refuses(1, envelope, f"<= {MAX_BODY_BYTES}")


def test_the_longest_honest_bodies_are_within_the_limit():
    offer = staged().round.ticket.prekeys[0]
    fields = {name: getattr(staged().round.ticket, name) for name in Ticket.__struct_fields__}
    bodies = [
        encode(Seal(bytes(32), [[(2**20 - 1, bytes(32)) for _ in range(MAX_CONTRIBUTORS)]])),
        encode(Ticket(**(fields | {"prekeys": [offer] * MAX_MEMBERS}))),
        encode(Release(bytes(32), bytes(32), 1, [bytes(4096)] * MAX_GROUPS)),
    ]
    for body in bodies:
        assert decode(Signed, encode(Signed(body, bytes(64)))).body == body
    assert max(map(len, bodies)) * 2 < MAX_BODY_BYTES


# --- The coordinator writes what a device cannot give ---------------------------------------------------------------


def test_a_dimension_that_is_not_the_bundles_is_refused_before_training():
    """It ended as the caller's fault, after the training, when the integers did not fit."""
    stage = staged(dimension=5)
    ticket = stage.round.ticket
    terms = Terms(ticket.bundle, dimension=ticket.dimension)
    data = wrap(Ticket, stage.round.signed)
    assert contributor.step(Idle(ticket.task), data, stage.fleet.epoch, terms, 0).round.tid == stage.round.tid
    other = wrap(Ticket, ticket_like(stage, dimension=6))
    with pytest.raises(PeerError, match="dimension 6, but the bundle's vector has 5"):
        contributor.step(Idle(ticket.task), other, stage.fleet.epoch, terms, 0)


# --- What is written to a log ---------------------------------------------------------------------------------------


def test_the_summed_shares_of_a_release_are_in_no_repr_of_a_members_state():
    """R members' logs beside the recorded contributions would open the sum for whoever reads logs."""
    stage = staged()
    stage.inspect()
    certified = stage.certify(stage.sealed())
    reply = stage.tell(1, wrap(Certificate, certified.certificate))
    _, signed = unwrap(reply)
    total = decode(Release, signed.body).sums[0]
    assert shows(repr(signed), total[:300]), "the search itself finds it"
    assert not shows(repr(stage.states[1]), total[:300])
    assert not shows(repr(stage.release(certified)), total[:300])


# --- Attacks that were tried and do not work ------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["inspecting", "committed", "released", "aborted"])
def test_a_ticket_replayed_after_its_session_was_forgotten_opens_no_second_session(phase):
    """Not even for a member whose clock was set back: the prekey is gone."""
    stage = staged()
    stage.inspect()
    if phase != "inspecting":
        sealed = stage.sealed()
        for n in stage.members:
            stage.tell(n, wrap(Seal, sealed.seal))
    if phase == "released":
        stage.release(stage.certify(sealed))
    if phase == "aborted":
        stage.tell(1, stage.lie(Abort(stage.round.tid, "over")))
    stage.states[1] = member.expire(stage.states[1], EXPIRES_S)
    assert not stage.states[1].sessions
    assert not stage.states[1].prekeys
    stage.refuses(1, wrap(Ticket, stage.round.signed), "is spent or was never offered", now_s=4)


def test_after_the_last_round_number_a_task_is_over_for_a_member_and_no_other_task_is():
    """A coordinator that signs round 2^53 - 1 ends its own task (threat model, denial of service)."""
    stage = staged()
    last = following(stage, round=2**53 - 1)
    last.inspect()
    again = following(last, round=2**53 - 1)
    again.refuses(1, wrap(Ticket, again.round.signed), "a second one for round")
    other = following(last, task="another", round=0)
    other.inspect()
    assert other.round.tid in other.states[1].sessions


def test_a_set_sealed_before_the_deadline_opens_like_any_other_and_nothing_else_does():
    """Members do not ask for the deadline: a coordinator may leave anyone out anyway, so that it gains nothing."""
    stage = staged(6)
    stage.inspect()
    early = stage.seal_of(range(4))
    assert stage.tell(1, wrap(Seal, early), now_s=CLOSES_S - 1) is not None
    stage.refuses(1, wrap(Seal, stage.sealed().seal), "already signed another set", now_s=CLOSES_S + 1)
