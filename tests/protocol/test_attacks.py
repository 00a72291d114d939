"""Each attack of docs/threat-model.md, by name: the liar is told PeerError, or the round aborts, and nothing leaks.

"Nothing leaks" is checked on what leaves the members: no honest member releases a sum for the attacked set, and a
refused message leaves the state that was there. Where an attack needs more liars than the protocol tolerates, the
test shows that too: otherwise a harness that cannot see an attack would pass.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from stage import (
    CLOSES_S,
    EXPIRES_S,
    LATE_S,
    Stage,
    device_at,
    digest_of,
    following,
    forge,
    header_of,
    integers_of,
    seed,
    send,
    staged,
    ticket_like,
)

from edge_sdk.crypto import masks
from edge_sdk.crypto.hashing import derive_key
from edge_sdk.crypto.identity import Identity
from edge_sdk.crypto.sealing import PREKEY_SEED_BYTES
from edge_sdk.crypto.shamir import PRIME, lagrange
from edge_sdk.crypto.stream import KeyStream
from edge_sdk.errors import ParameterError, PeerError, RoundAborted
from edge_sdk.protocol import aggregator, authority, contributor, member, reference
from edge_sdk.protocol.aggregator import Aborted
from edge_sdk.protocol.anchors import Anchors, LedgerForked
from edge_sdk.protocol.contributor import Contribution, Idle, Terms, Training
from edge_sdk.protocol.messages import (
    Abort,
    Anchor,
    Certificate,
    Complaint,
    Delivery,
    Epoch,
    Grouping,
    Member,
    NoisePlan,
    PrekeyOffer,
    Receipt,
    Release,
    Seal,
    SealedShare,
    SealSignature,
    Signed,
    Ticket,
    Work,
    decode,
    sign,
    unwrap,
    wrap,
)
from edge_sdk.protocol.opening import open_group
from edge_sdk.protocol.rounds import Round, split_shares

LOW_ORDER_POINTS = [
    bytes(32),
    (1).to_bytes(32, "little"),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    bytes.fromhex("ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
    bytes.fromhex("edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
    bytes.fromhex("eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
]
"""The points of order 1, 2, 4 and 8 on Curve25519 and its twist, and 0, 1 written as p, p + 1: cr.yp.to/ecdh.html."""


def releases_for(stage: Stage) -> set[bytes]:
    """The sets for which some member gave its sums away."""
    return {seal for _, seal in stage.released}


def attempt_many_sets(stage: Stage, seals: list[Signed], choice: dict[int, int], corrupt: set[int]) -> Stage:
    """The coordinator shows honest member n the seal `choice[n]`; corrupt ones sign all. Every certificate that the
    signatures allow, and every one that they do not, is then shown to every honest member."""
    stage = stage.fork()
    signatures: list[dict[int, bytes]] = [{n: stage.signature_of(n, s) for n in corrupt} for s in seals]
    for n, chosen in choice.items():
        reply = stage.tell(n, wrap(Seal, seals[chosen]))
        assert reply is not None
        signatures[chosen][n] = unwrap(reply)[1].signature
        for other, signed in enumerate(seals):
            if other != chosen:
                with pytest.raises(PeerError, match="already signed another set"):
                    stage.tell(n, wrap(Seal, signed))
    for signed, collected in zip(seals, signatures, strict=True):
        for n in choice:
            try:
                stage.tell(n, stage.certificate_from(signed, collected))
            except PeerError as error:
                assert "needed" in str(error) or "another set" in str(error)  # noqa: PT017
    return stage


def inspected(stage: Stage) -> Stage:
    stage.inspect()
    return stage


def refused_everywhere(stage: Stage, contribution: Contribution, match: str) -> None:
    """The coordinator does not take it; and if a lying coordinator did, no member takes its header either."""
    before = stage.collecting
    with pytest.raises(PeerError, match=match):
        stage.take(contribution)
    assert stage.collecting is before
    for n in stage.members:
        stage.tell(n, wrap(Ticket, stage.round.signed))
        stage.refuses(n, wrap(Delivery, Delivery(stage.round.tid, [(contribution.header, None)])), match)


def opens_exactly(stage: Stage, done: aggregator.Done, group: int, senders: tuple[int, ...]) -> None:
    np.testing.assert_array_equal(done.sums[group].values, stage.true_sum(senders))


# --- Two sets for one ticket -----


def test_a_device_both_included_and_excluded_is_never_in_two_certified_sets():
    """S and S without one device would give that device's input alone, as their difference."""
    stage = inspected(staged(6))
    everyone, without = stage.seal_of(range(6)), stage.seal_of([0, 1, 2, 3, 5])
    outcomes = set()
    for picks in product((0, 1), repeat=5):  # c = 1: member 6 signs both
        after = attempt_many_sets(stage, [everyone, without], dict(enumerate(picks, start=1)), corrupt={6})
        assert len(releases_for(after)) <= 1
        outcomes.add(len(after.released))
    assert outcomes == {3, 4, 5}, "of five honest members three or more see the same set: with the corrupt one, Q = 4"


@pytest.mark.parametrize(
    ("devices", "helpers", "rolled_back"), [(6, 0, 1), (10, 0, 3), (9, 5, 2)], ids=["6", "10", "helpers"]
)
def test_two_sealed_sets_for_one_ticket_do_not_both_reach_a_quorum(devices, helpers, rolled_back):
    stage = inspected(staged(devices, "helpers" if helpers else "everyone", helpers=helpers))
    assert stage.round.thresholds.corrupt == rolled_back
    seals = [stage.seal_of(range(devices)), stage.seal_of(range(devices - 1))]
    members = stage.members
    honest, corrupt = members[rolled_back:], set(members[:rolled_back])
    for first in range(len(honest) + 1):  # members differ only in their number: how many see which set is all there is
        choice = {n: int(i >= first) for i, n in enumerate(honest)}
        assert len(releases_for(attempt_many_sets(stage, seals, choice, corrupt))) <= 1


def test_the_harness_sees_two_sets_when_more_members_are_corrupt_than_the_committee_tolerates():
    """m = 5 helpers, c = 2, Q = 4: with 3 corrupt ones both sets are certified. The bound above is tight."""
    stage = inspected(staged(9, "helpers", helpers=5))
    seals = [stage.seal_of(range(9)), stage.seal_of(range(8))]
    after = attempt_many_sets(stage, seals, {4: 0, 5: 1}, corrupt={1, 2, 3})
    assert len(releases_for(after)) == 2


def test_two_partitions_for_one_ticket_do_not_both_reach_a_quorum():
    """The same contributors as two groups, and with one group left out: the same sums would be known twice."""
    stage = inspected(staged(12, "helpers", helpers=5, groups=2))
    first_group = [i for i in range(12) if stage.round.epoch.group_of(i, 2) == 0]
    seals = [stage.seal_of(range(12)), stage.seal_of(first_group)]
    for picks in product((0, 1), repeat=3):
        after = attempt_many_sets(stage, seals, dict(zip((3, 4, 5), picks, strict=True)), corrupt={1, 2})
        assert len(releases_for(after)) <= 1


def test_a_partition_that_is_not_the_beacons_is_signed_by_nobody():
    stage = inspected(staged(12, "helpers", helpers=5, groups=2))
    groups = decode(Seal, stage.seal_of(range(12)).body).groups
    moved = [sorted([*groups[0], groups[1][0]]), groups[1][1:]]
    merged = [sorted([*groups[0], *groups[1]]), []]
    swapped = [groups[1], groups[0]]
    for partition in (moved, merged, swapped):
        for n in stage.members:
            stage.refuses(n, stage.lie(Seal(stage.round.tid, partition)), "is not of group")
    overlapping = [groups[0], sorted([*groups[1][1:], groups[0][0]])]
    stage.refuses(1, stage.lie(Seal(stage.round.tid, overlapping)), "is not of group 1")
    one_group = [sorted([*groups[0], *groups[1]])]
    stage.refuses(1, stage.lie(Seal(stage.round.tid, one_group)), "1 groups instead of 2")
    doubled = [[groups[0][0], *groups[0][:-1]], groups[1]]
    stage.refuses(1, stage.lie(Seal(stage.round.tid, doubled)), "ascending order of distinct senders")
    longer = [[groups[0][0], *groups[0]], groups[1]]
    stage.refuses(1, stage.lie(Seal(stage.round.tid, longer)), "more than n_max = 12")
    assert not stage.released


def test_after_a_certificate_was_shown_to_some_an_abort_frees_nobody_to_sign_another_set():
    stage = inspected(staged(6))
    sealed = stage.sealed()
    certified = stage.certify(sealed, 1, 2, 3, 4)
    certificate = wrap(Certificate, certified.certificate)
    first = stage.tell(1, certificate)
    for n in stage.members:
        assert stage.tell(n, stage.lie(Abort(stage.round.tid, "never mind"))) is None
    assert stage.tell(1, certificate) == first, "a release that is out stays the same release"
    other = wrap(Seal, stage.seal_of(range(5)))
    for n in stage.members:
        stage.refuses(n, other, "not expected while (Released|Closed)")
        stage.tell(n, wrap(Ticket, stage.round.signed))  # the ticket again does not reopen it
        stage.refuses(n, other, "not expected while (Released|Closed)")
    for n in (2, 3, 4, 5, 6):  # those that believed the abort have no prekey and no share left to release with
        stage.refuses(n, certificate, "not expected while Closed")
        assert not stage.states[n].prekeys
    assert releases_for(stage) == {sealed.digest}


def test_an_abort_before_the_certificate_leaves_nothing_that_could_release():
    stage = inspected(staged(6))
    sealed = stage.sealed()
    certified = stage.fork().certify(sealed)
    for n in stage.members:
        stage.tell(n, wrap(Seal, sealed.seal))
        stage.tell(n, stage.lie(Abort(stage.round.tid, "too few came")))
        stage.refuses(n, wrap(Certificate, certified.certificate), "not expected while Closed")
        assert not stage.states[n].prekeys
    assert not stage.released


@pytest.mark.parametrize("forged", ["too few", "one member twice", "another's signature", "another set", "stranger"])
def test_a_forged_certificate_releases_nothing(forged):
    stage = inspected(staged(6))
    sealed = stage.sealed()
    for n in stage.members:
        stage.tell(n, wrap(Seal, sealed.seal))
    good = {n: stage.signature_of(n, sealed.seal) for n in (2, 3, 4, 5)}
    signatures, match = {
        "too few": (list(good.items())[:3], "3 signatures, 4 needed"),
        "one member twice": ([*list(good.items())[:3], (2, good[2])], "counted twice"),
        "another's signature": ([*list(good.items())[:3], (5, good[2])], "signature is not valid"),
        "another set": (
            [(n, stage.signature_of(n, stage.seal_of(range(5)))) for n in (2, 3, 4, 5)],
            "signature is not valid",
        ),
        "stranger": ([*list(good.items())[:3], (7, good[2])], "this committee has 6"),
    }[forged]
    stage.refuses(1, wrap(Certificate, Certificate(stage.round.tid, sealed.digest, signatures)), match)
    other = stage.seal_of(range(5))
    certificate = stage.certificate_from(other, {n: stage.signature_of(n, other) for n in (2, 3, 4, 5)})
    stage.refuses(1, certificate, "another set than the one that this member signed")
    assert not stage.released


# --- Merging the two turns -----


def test_one_answer_per_member_without_a_certificate_leaks_a_linear_combination():
    """The protocol that we do not have: each member answers the first set that it is asked for, and only that one.

    m = 6 members at +-1, +-2, +-3, polynomials of degree 3 (R = 4, c = 0), and the sets S1, S2, S1 + S2. No set has
    four answers, but f1(0) from +-1 and +-3, and f2(0) from +-2 and +-3, take the members +-3 in the same proportion
    once scaled by 8 and 5/4; so that their answer, which is f1 + f2, serves both.
    """
    stream = KeyStream(seed("merged protocol"))
    f1, f2 = ([int(word) % PRIME for word in stream.words16(4)] for _ in range(2))

    def at(polynomial: list[int], x: int) -> int:
        return sum(c * pow(x, k, PRIME) for k, c in enumerate(polynomial)) % PRIME

    answers = {x: at(f1, x) for x in (1, -1)} | {x: at(f2, x) for x in (2, -2)}
    answers |= {x: (at(f1, x) + at(f2, x)) % PRIME for x in (3, -3)}

    eight, five_quarters = 8, 5 * pow(4, -1, PRIME) % PRIME
    for_s1 = dict(zip((1, -1, 3, -3), lagrange([1, -1, 3, -3], 0), strict=True))
    for_s2 = dict(zip((2, -2, 3, -3), lagrange([2, -2, 3, -3], 0), strict=True))
    for x in (3, -3):
        assert eight * for_s1[x] % PRIME == five_quarters * for_s2[x] % PRIME
    weights = {x: eight * for_s1[x] % PRIME for x in (1, -1, 3, -3)}
    weights |= {x: five_quarters * for_s2[x] % PRIME for x in (2, -2)}
    combined = sum(weights[x] * answers[x] for x in answers) % PRIME
    assert combined == (eight * f1[0] + five_quarters * f2[0]) % PRIME


def test_the_linear_combination_gets_no_answer_from_a_member_that_wants_a_certificate():
    """The same three sets put to six real members, however they are spread over them, with the one corrupt member
    signing all: at most one set is ever released, by all of whom it takes R to read it."""
    stage = inspected(staged(6))
    seals = [stage.seal_of([0, 1, 2]), stage.seal_of([3, 4, 5]), stage.seal_of(range(6))]
    after = attempt_many_sets(stage, seals, {1: 0, 2: 0, 3: 1, 4: 1, 5: 2, 6: 2}, corrupt=set())
    assert not after.released
    for ones in range(6):
        for twos in range(6 - ones):
            picks = [0] * ones + [1] * twos + [2] * (5 - ones - twos)
            after = attempt_many_sets(stage, seals, dict(enumerate(picks, start=1)), corrupt={6})
            assert len(releases_for(after)) <= 1
            if max(ones, twos, 5 - ones - twos) < 3:
                assert not after.released


# --- Groups -----


def test_corrupt_devices_concentrated_in_one_group_are_refused_by_coordinator_and_members():
    """A device that claims another group than the beacon's could join those that surround a victim."""
    stage = staged(12, "helpers", helpers=5, groups=2, senders=())
    for index in range(3):
        true = stage.round.epoch.group_of(index, 2)
        refused_everywhere(stage, forge(stage.fleet, stage.round, index, group=1 - true), "but the beacon says")
    refused_everywhere(stage, forge(stage.fleet, stage.round, 0, group=63), "but the beacon says")


def test_a_coordinator_that_picks_its_groups_gets_no_signature():
    """It leaves the beacon's groups as they are but writes the victim into a group of its own making."""
    stage = inspected(staged(12, "helpers", helpers=5, groups=2))
    groups = decode(Seal, stage.seal_of(range(12)).body).groups
    victim, accomplices = groups[0][0], groups[1][:2]
    chosen = [sorted([victim, *accomplices]), groups[1][2:]]
    for n in stage.members:
        stage.refuses(n, stage.lie(Seal(stage.round.tid, chosen)), "is not of group 0")


# --- Tickets -----


def test_different_models_to_different_devices_are_two_tickets_and_a_device_or_member_takes_one():
    stage = staged(6)
    other = ticket_like(stage, parameters=seed("a model that isolates one device"))
    terms = Terms(stage.round.ticket.bundle)
    idle = contributor.step(Idle("reference"), wrap(Ticket, stage.round.signed), stage.fleet.epoch, terms, 0)
    assert isinstance(idle, Training)
    with pytest.raises(PeerError, match="not expected while Training"):
        contributor.step(idle, wrap(Ticket, other), stage.fleet.epoch, terms, 0)
    with pytest.raises(PeerError, match="the same round again"):
        contributor.step(idle.give_up(), wrap(Ticket, other), stage.fleet.epoch, terms, 0)
    for n in stage.members:
        stage.tell(n, wrap(Ticket, stage.round.signed))
        stage.refuses(n, wrap(Ticket, other), "the coordinator equivocates")


def test_contributions_under_different_models_are_not_summed_by_any_member():
    stage = staged(6, senders=(0, 1, 2, 3))
    other = Round(stage.fleet.epoch, ticket_like(stage, parameters=seed("another model")))
    refused_everywhere(stage, send(stage.fleet, other, 4).contribution, "it is for another ticket")


def test_masked_vectors_of_different_models_do_not_open_even_with_all_their_secrets():
    """tid chooses the public polynomial: the masks of two tickets have no common secret sum."""
    stage = staged(6, senders=())
    other = Round(stage.fleet.epoch, ticket_like(stage, parameters=seed("another model")))
    total = np.zeros((stage.round.layout.blocks, 2048), dtype=np.uint32)
    secrets = np.zeros(2048, dtype=np.int64)
    for index in range(6):
        round_ = stage.round if index < 3 else other
        own = seed("device", index, round_.tid)
        total += round_.layout.from_bytes(send(stage.fleet, round_, index, entropy=own).contribution.masked)
        secrets += masks.expand_secret(own, round_.tid)
    shares = stage.round.thresholds.sharing.share(secrets, KeyStream(seed("any")))
    answers = {n: shares[n - 1] for n in stage.members}
    for round_ in (stage.round, other):
        with pytest.raises(RoundAborted, match="no sum passes the checks"):
            open_group(round_, 6, total, answers)


def test_a_prekey_used_twice_is_refused_while_it_serves_and_after_it_was_spent():
    stage = staged(6)
    for n in stage.members:
        stage.tell(n, wrap(Ticket, stage.round.signed))
    again = following(stage, 2, 3, 4, 5, 6)  # member 1's prekey is the old one
    again.refuses(1, wrap(Ticket, again.round.signed), "already serves another ticket")
    inspected(stage).finish()
    spent = following(stage, 2, 3, 4, 5, 6)
    spent.refuses(1, wrap(Ticket, spent.round.signed), "is spent or was never offered")
    expired = replace(stage, states={n: member.expire(s, EXPIRES_S) for n, s in stage.states.items()})
    late = following(expired, 2, 3, 4, 5, 6, closes_s=3_000, expires_s=4_000)
    late.refuses(1, wrap(Ticket, late.round.signed), "is spent or was never offered", now_s=EXPIRES_S)
    late.refuses(1, wrap(Ticket, stage.round.signed), "has expired", now_s=EXPIRES_S)
    late.refuses(1, wrap(Ticket, stage.round.signed), "is spent or was never offered")  # a clock that was set back


def test_a_prekey_used_by_two_tasks_serves_the_first():
    stage = staged(6)
    second = Round(stage.fleet.epoch, ticket_like(stage, task="another"))
    for n in stage.members:
        stage.tell(n, wrap(Ticket, stage.round.signed))
        stage.refuses(n, wrap(Ticket, second.signed), "already serves another ticket")


def test_an_invented_prekey_serial_is_refused():
    """A member whose state was rolled back may have published a prekey that it no longer knows."""
    stage = staged(6)
    seed96 = derive_key(seed("other"), "prekey", length=PREKEY_SEED_BYTES)
    fleet_key, identity = stage.fleet.epoch.frozen.fleet, stage.fleet.committee[0]
    before = member.MemberState()
    _, same_serial = member.offer_prekey(before, identity, fleet_key, seed96, LATE_S)
    prekeys = [same_serial, *stage.round.ticket.prekeys[1:]]
    stage.refuses(1, wrap(Ticket, ticket_like(stage, prekeys=prekeys)), "its state was rolled back")
    _, unknown = member.offer_prekey(member.MemberState(next_serial=77), identity, fleet_key, seed96, LATE_S)
    prekeys = [unknown, *stage.round.ticket.prekeys[1:]]
    stage.refuses(1, wrap(Ticket, ticket_like(stage, prekeys=prekeys)), "never offered")


NOISE, WORK = reference.NOISE, reference.LOCAL_EPOCH


def noise(**changes: object) -> NoisePlan:
    return msgspec.structs.replace(NOISE, **changes)


def work(**changes: object) -> Work:
    return msgspec.structs.replace(WORK, **changes)


def examples(**changes: object) -> dict[str, object]:
    """A ticket of unit "example", whose work is changed."""
    return {"noise": noise(unit="example", example_rate=0.5),
            "work": msgspec.structs.replace(reference.GRADIENTS, **changes)}  # fmt: skip


def field(name: str) -> str:
    """A refusal of the ticket that says which field it was."""
    return rf"^ticket: .*{name}"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"noise": noise(sigma=99.9)}, "is below this device's floor of 0.01"),
        # Steps can be made small, and the clip large: what protects is the noise over the clip.
        ({"noise": noise(granularity=1e-9)}, "is below this device's floor of 0.01"),
        ({"noise": noise(clip=1e20)}, "is below this device's floor of 0.01"),
        ({"noise": noise(sigma=0.0)}, field("noise")),
        ({"noise": noise(sigma=-100.0)}, field("noise")),
        ({"noise": noise(sigma=math.nan)}, field("noise")),
        ({"noise": noise(sigma=math.inf)}, field("noise")),
        ({"noise": noise(clip=math.nan)}, field("noise")),
        ({"noise": noise(unit="nothing")}, field("noise")),
        # Metrics are in the same noised vector: they count.
        ({"noise": noise(metric_scale=0.1)}, "is below this device's floor of 0.01"),
        ({"noise": noise(metric_scale=1e-3, loss_bound=1e4)}, "is below this device's floor of 0.01"),
        ({"noise": noise(metric_scale=-0.1)}, field("noise")),
        ({"noise": noise(metric_scale=math.nan)}, field("noise")),
        ({"noise": noise(loss_bound=0.0)}, field("noise")),
        ({"noise": noise(device_rate=0.0)}, field("noise")),
        ({"noise": noise(device_rate=1.1)}, field("noise")),
        ({"noise": noise(device_rate=math.nan)}, field("noise")),
        ({"noise": noise(example_rate=0.5)}, field(r"noise\.example_rate")),
        ({"work": work(learning_rate=0.0)}, field(r"work\.learning_rate")),
        ({"work": work(learning_rate=-0.1)}, field("work")),
        ({"work": work(learning_rate=math.nan)}, field("work")),
        ({"work": work(epochs=0)}, field(r"work\.epochs is 0 and work\.steps is 0")),
        ({"work": work(steps=1)}, field(r"work\.epochs is 1 and work\.steps is 1")),
        ({"work": work(proximal=math.inf)}, field("work")),
        ({"work": work(weight_cap=-1)}, field("work")),
        (examples(learning_rate=0.1), field(r"work\.learning_rate")),
        (examples(epochs=1), field(r"work\.epochs")),
        (examples(steps=1), field(r"work\.steps")),
        (examples(proximal=0.1), field(r"work\.proximal")),
        (examples(weight_cap=1), field(r"work\.weight_cap")),
        ({"honest": 3}, "cohort of 3 honest devices is below this device's 4"),
        ({"honest": 1}, field("honest")),
        ({"honest": 0}, field("honest")),
        ({"honest": -3}, field("honest")),
        ({"honest": 6}, "do not fit in n_max"),
        ({"n_max": 7}, "n_max 7 is more than the roster's 6"),
        ({"n_max": 1}, field("n_max")),
        ({"groups": 3}, "no round of 3 groups"),
        ({"groups": 0}, field("groups")),
        ({"expires_s": CLOSES_S}, "expires before it closes"),
        ({"epoch": seed("other epoch")}, "it is for another epoch"),
        ({"prekeys": []}, field("prekeys")),
        ({"version": 2}, field("version")),
        ({"dimension": 0}, field("dimension")),
        ({"task": "Reference"}, field("task")),
        ({"task": "another"}, "it is for task another"),
    ],
)
def test_a_forged_plan_is_refused_before_training(changes, match):
    stage = staged(6)
    terms = Terms(stage.round.ticket.bundle, min_honest=4, min_noise_multiplier=0.01)
    ticket = ticket_like(stage, **({"honest": 4, "noise": NOISE} | changes))
    with pytest.raises(PeerError, match=match):
        contributor.step(Idle("reference"), wrap(Ticket, ticket), stage.fleet.epoch, terms, 0)


def test_a_plan_within_the_terms_is_taken():
    """The control of the test above: what it changes is what is refused."""
    stage = staged(6)
    terms = Terms(stage.round.ticket.bundle, min_honest=4, min_noise_multiplier=0.01)
    for changes in ({"noise": NOISE}, {"work": work(epochs=0, steps=7, proximal=0.1, weight_cap=600)},
                    examples()):  # fmt: skip
        ticket = ticket_like(stage, **({"honest": 4} | changes))
        after = contributor.step(Idle("reference"), wrap(Ticket, ticket), stage.fleet.epoch, terms, 0)
        assert isinstance(after, Training)


@pytest.mark.parametrize("make", [lambda: noise(metric_scale=-0.0), lambda: work(learning_rate=-0.0),
                                  lambda: work(proximal=-0.0)])  # fmt: skip
def test_minus_zero_is_the_callers_mistake_before_it_is_sent(make):
    with pytest.raises(ParameterError, match=r"is -0\.0: write 0\.0"):
        make()


@pytest.mark.parametrize("author", ["device", "member", "stranger", "authority"])
def test_a_ticket_signed_by_someone_else_is_refused(author):
    stage = staged(6)
    signer = {
        "device": stage.fleet.devices[0],
        "member": stage.fleet.committee[3],
        "stranger": Identity(seed("stranger")),
        "authority": Identity(derive_key(seed("fleet", 6, "everyone", 0), "authority", bytes(4))),
    }[author]
    forged = wrap(Ticket, sign(signer, stage.round.ticket))
    with pytest.raises(PeerError, match="ticket: the signature is not valid"):
        contributor.step(Idle("reference"), forged, stage.fleet.epoch, Terms(stage.round.ticket.bundle), 0)
    stage.refuses(1, forged, "ticket: the signature is not valid")


def test_a_hostile_bundle_is_refused_before_training():
    stage = staged(6)
    hostile = wrap(Ticket, ticket_like(stage, bundle=seed("a bundle that does not clip")))
    with pytest.raises(PeerError, match="is not the one registered for reference"):
        contributor.step(Idle("reference"), hostile, stage.fleet.epoch, Terms(stage.round.ticket.bundle), 0)


# --- The committee -----


def drawn_fleet() -> tuple[reference.Fleet, Identity]:
    entropy = seed("drawn fleet")
    fleet = reference.make_fleet(entropy, 40, "drawn", drawn=20)
    return fleet, Identity(derive_key(entropy, "authority", bytes(4)))


def test_a_coordinator_that_picks_its_committee_needs_the_authoritys_signature():
    fleet, fleet_authority = drawn_fleet()
    outside = [key for key in fleet.roster.keys if key not in {m.key for m in fleet.epoch.members}]
    picked = Member(outside[0], fleet.roster.enrolment(outside[0])[0])
    members = sorted([*fleet.epoch.members[1:], picked], key=lambda m: m.index or 0)
    groupings = [Grouping(groups, corrupt) for groups, corrupt in fleet.epoch.corrupt_in_group.items()]
    chosen = Epoch(fleet.epoch.frozen, seed("entropy"), members, groupings)
    with pytest.raises(PeerError, match="epoch: the signature is not valid"):
        authority.FleetEpoch(fleet_authority.public_key, sign(fleet.coordinator, chosen))
    # even the authority cannot name a committee that its own beacon does not draw
    with pytest.raises(PeerError, match="not the one that the beacon draws"):
        authority.FleetEpoch(fleet_authority.public_key, sign(fleet_authority, chosen))


@pytest.mark.parametrize("lie", ["own key", "two swapped", "one left out", "one twice", "another fleet's"])
def test_a_ticket_for_a_committee_of_the_coordinators_choice_is_refused(lie):
    stage = staged(6)
    prekeys = list(stage.round.ticket.prekeys)
    fleet_key, seed96 = stage.fleet.epoch.frozen.fleet, derive_key(seed("x"), "prekey", length=PREKEY_SEED_BYTES)
    match = "prekeyoffer: the signature is not valid"
    if lie == "own key":
        _, prekeys[0] = member.offer_prekey(member.MemberState(), stage.fleet.coordinator, fleet_key, seed96, LATE_S)
    elif lie == "two swapped":
        prekeys[0], prekeys[1] = prekeys[1], prekeys[0]
    elif lie == "one left out":
        prekeys, match = prekeys[1:], "5 prekeys for a committee of 6"
    elif lie == "one twice":
        prekeys[1] = prekeys[0]
    else:
        _, prekeys[0] = member.offer_prekey(
            member.MemberState(), stage.fleet.committee[0], seed("fleet"), seed96, LATE_S
        )
        match = "for another fleet or member"
    forged = wrap(Ticket, ticket_like(stage, prekeys=prekeys))
    with pytest.raises(PeerError, match=match):
        contributor.step(Idle("reference"), forged, stage.fleet.epoch, Terms(stage.round.ticket.bundle), 0)
    stage.refuses(2, forged, match)


def test_a_certificate_of_another_committee_releases_nothing():
    stage = inspected(staged(6))
    sealed = stage.sealed()
    stage.tell(1, wrap(Seal, sealed.seal))
    strangers = {n: Identity(seed("stranger", n)) for n in (1, 2, 3, 4)}
    signatures = [
        (n, sign(who, SealSignature(stage.round.tid, sealed.digest, n)).signature) for n, who in strangers.items()
    ]
    stage.refuses(
        1, wrap(Certificate, Certificate(stage.round.tid, sealed.digest, signatures)), "signature is not valid"
    )


# --- Replays and copies -----


def test_a_contribution_replayed_in_its_round_is_counted_once():
    stage = staged(6)
    before, mail = stage.collecting, {n: len(items) for n, items in stage.mail.items()}
    first = staged(6, senders=()).take(stage.contributions[2]).receipt
    again = stage.take(stage.contributions[2])
    assert again.state is before
    assert again.receipt == first
    assert again.shares is None
    assert {n: len(items) for n, items in stage.mail.items()} == mail
    inspected(stage)
    for n in stage.members:  # and the members' delivery twice
        state = stage.states[n]
        stage.tell(n, wrap(Delivery, Delivery(stage.round.tid, stage.mail[n])))
        assert stage.states[n] == state
    opens_exactly(stage, stage.finish(), 0, tuple(range(6)))


def test_a_contribution_replayed_in_another_round_is_refused():
    stage = staged(6)
    inspected(stage).finish()
    later = following(stage)
    refused_everywhere(later, stage.contributions[2], "it is for another ticket")


def test_a_contribution_replayed_after_the_seal_gets_its_receipt_again_and_changes_nothing():
    stage = staged(6)
    sealed = stage.sealed()
    again = aggregator.accept(sealed, stage.contributions[2], stage.fleet.coordinator, now_s=CLOSES_S)
    assert again.state is sealed
    assert again.shares is None


def test_a_contribution_that_comes_first_after_the_seal_is_late():
    stage = staged(6, senders=(0, 1, 2, 3))
    sealed = stage.sealed()
    late = send(stage.fleet, stage.round, 5).contribution
    with pytest.raises(RoundAborted, match="the round is SEALED"):
        aggregator.accept(sealed, late, stage.fleet.coordinator, now_s=CLOSES_S)


@pytest.mark.parametrize("where", ["with the victim", "instead of the victim"])
def test_an_upload_copied_under_another_name_does_not_open(where):
    """To double a victim's input, or to be told about it alone: but its shares are sealed in the victim's name."""
    stage = staged(6, senders=(0, 1, 2, 3) if where == "with the victim" else (1, 2, 3))
    victim = send(stage.fleet, stage.round, 0).contribution
    copied = header_of(victim)
    copy = forge(
        stage.fleet,
        stage.round,
        4,
        sealing_key=copied.sealing_key,
        masked=lambda _: stage.round.layout.from_bytes(victim.masked),
        sealed=lambda _: list(_blobs(stage.round, victim)),
    )
    assert copy.masked == victim.masked
    assert copy.shares == victim.shares
    stage.take(copy)
    complaints = stage.inspect()
    assert len(complaints) == 6, "the share opens for no member"
    stage.complain(complaints)
    done = stage.finish()
    assert done.sums[0].contributors == len(stage.contributions) - 1
    opens_exactly(stage, done, 0, tuple(i for i in stage.contributions if i != 4))


def test_a_lying_coordinator_that_seals_a_copied_upload_gets_no_sum_of_it():
    stage = staged(6, senders=(0, 1, 2, 3))
    victim = stage.contributions[0]
    stage.take(
        forge(
            stage.fleet,
            stage.round,
            4,
            sealing_key=header_of(victim).sealing_key,
            masked=lambda _: stage.round.layout.from_bytes(victim.masked),
            sealed=lambda _: list(_blobs(stage.round, victim)),
        )
    )
    stage.inspect()  # the complaints are dropped by the coordinator
    certified = stage.release(stage.certify(stage.sealed()))
    assert all(sums == (None,) for sums in certified.answers.values()), "no member has a sum to give"
    assert not stage.open(certified).sums


def _blobs(round_: Round, contribution: Contribution) -> list[bytes]:
    return [share.sealed for share in split_shares(round_, header_of(contribution), contribution.shares)]


def test_an_upload_copied_with_its_header_needs_the_victims_signature():
    stage = staged(6, senders=(0, 1, 2, 3))
    victim, mallory = stage.contributions[0], device_at(stage.fleet, 4)
    renamed = sign(mallory.identity, _header_with(victim, sender=4))
    refused_everywhere(stage, victim._replace(header=renamed), "inclusion proof")
    kept = sign(mallory.identity, header_of(victim))
    refused_everywhere(stage, victim._replace(header=kept), "signature is not valid")


def _header_with(contribution: Contribution, **fields: object):
    header = header_of(contribution)
    return type(header)(**{f: fields.get(f, getattr(header, f)) for f in type(header).__struct_fields__})


def test_a_copied_share_opens_for_nobody():
    """Mallory puts the victim's sealed shares, or one member's to another, into an upload of its own."""
    stage = staged(6, senders=(0, 1, 2, 3))
    victims = _blobs(stage.round, stage.contributions[0])
    stage.take(forge(stage.fleet, stage.round, 4, sealed=lambda own: [victims[0], *own[1:]]))
    stage.take(forge(stage.fleet, stage.round, 5, sealed=lambda own: [own[1], own[0], *own[2:]]))
    complaints = stage.inspect()
    named = {c.member: c.senders for c in (decode(Complaint, unwrap(b)[1].body) for b in complaints)}
    assert named == {1: [4, 5], 2: [5]}


def test_a_share_that_its_sender_did_not_sign_is_the_couriers_fault():
    """A coordinator that swaps shares on the way cannot make a member complain about the sender."""
    stage = staged(6)
    other = stage.mail[2]
    stage.tell(1, wrap(Ticket, stage.round.signed))
    for item, foreign in zip(stage.mail[1][:2], other[:2], strict=True):
        swapped = Delivery(stage.round.tid, [(item[0], foreign[1])])
        stage.refuses(1, wrap(Delivery, swapped), "is not the one it signed")
    header, share = stage.mail[1][0]
    assert share is not None
    flipped = SealedShare(bytes([share.sealed[0] ^ 1]) + share.sealed[1:], share.proof)
    stage.refuses(1, wrap(Delivery, Delivery(stage.round.tid, [(header, flipped)])), "is not the one it signed")


# --- Cohorts and enrolment -----


@pytest.mark.parametrize("contributors", [0, 1, 2])
def test_a_cohort_below_h_plus_f_is_aborted_and_signed_by_no_member(contributors):
    stage = staged(6, senders=range(contributors))
    assert stage.round.min_group == 3
    assert isinstance(aggregator.seal(stage.collecting, stage.fleet.coordinator, CLOSES_S), Aborted)
    stage.inspect()
    for n in stage.members:
        match = "every group is empty" if contributors == 0 else f"has {contributors} contributors, 3 needed"
        stage.refuses(n, wrap(Seal, stage.seal_of(range(contributors))), match)
    assert not stage.released


def test_a_cohort_that_the_coordinator_shrinks_below_h_plus_f_is_signed_by_no_member():
    stage = inspected(staged(6))
    for n in stage.members:
        stage.refuses(n, wrap(Seal, stage.seal_of([4])), "has 1 contributors, 3 needed")
        stage.refuses(n, wrap(Seal, stage.seal_of([0, 4])), "has 2 contributors, 3 needed")


def test_one_group_below_h_plus_f_is_left_out_and_the_other_opens():
    everyone = staged(12, "helpers", helpers=5, groups=2, senders=())
    of = [[i for i in range(12) if everyone.round.epoch.group_of(i, 2) == g] for g in (0, 1)]
    stage = inspected(staged(12, "helpers", helpers=5, groups=2, senders=[*of[0][:2], *of[1]]))
    for n in stage.members:
        stage.refuses(n, wrap(Seal, stage.seal_of(stage.contributions)), "group 0 has 2 contributors, 3 needed")
    done = stage.finish()
    assert done.reasons == {0: "too few contributors: left out"}
    opens_exactly(stage, done, 1, tuple(of[1]))


@pytest.mark.parametrize("lie", ["unenrolled", "another's index", "no such index", "no proof", "long proof"])
def test_a_sybil_header_is_refused(lie):
    stage = staged(6, senders=(0, 1, 2))
    sybil = Identity(seed("sybil"))
    if lie == "unenrolled":
        contribution = forge(stage.fleet, stage.round, 4, identity=sybil, key=sybil.public_key)
    elif lie == "another's index":
        contribution = forge(stage.fleet, stage.round, 4, sender=5)
    elif lie == "no such index":
        contribution = forge(stage.fleet, stage.round, 4, sender=6)
    elif lie == "no proof":
        contribution = forge(stage.fleet, stage.round, 4, enrolment=[])
    else:
        proof = list(device_at(stage.fleet, 4).proof)
        contribution = forge(stage.fleet, stage.round, 4, enrolment=[*proof, bytes(32)])
    refused_everywhere(stage, contribution, "inclusion proof")


def test_a_device_that_signs_for_another_is_refused():
    stage = staged(6, senders=(0, 1, 2))
    thief = device_at(stage.fleet, 5).identity
    refused_everywhere(stage, forge(stage.fleet, stage.round, 4, identity=thief), "header: the signature is not valid")


def test_a_device_of_another_epoch_is_not_enrolled_in_this_one():
    stage, foreign = staged(6, senders=(0, 1, 2)), staged(9, "helpers", helpers=5, senders=())
    sybil = device_at(foreign.fleet, 4)
    contribution = forge(
        stage.fleet,
        stage.round,
        4,
        identity=sybil.identity,
        key=sybil.identity.public_key,
        enrolment=list(sybil.proof),
    )
    refused_everywhere(stage, contribution, "inclusion proof")


def test_sybil_headers_do_not_fill_a_cohort():
    """Two honest devices and headers that nobody enrolled: the member never has three to sign for."""
    stage = staged(6, senders=(0, 1))
    sybil = forge(stage.fleet, stage.round, 4, identity=Identity(seed("s")), key=Identity(seed("s")).public_key)
    stage.inspect()
    seal = stage.lie(
        Seal(stage.round.tid, [[*((i, digest_of(stage.contributions[i])) for i in (0, 1)), (4, digest_of(sybil))]])
    )
    for n in stage.members:
        stage.refuses(n, wrap(Delivery, Delivery(stage.round.tid, [(sybil.header, None)])), "inclusion proof")
        stage.refuses(n, seal, "the header of sender 4 was not shown")


@pytest.mark.parametrize("point", LOW_ORDER_POINTS, ids=lambda p: p.hex()[:8])
def test_a_low_order_point_as_the_senders_key_makes_a_share_that_members_complain_about(point):
    """With it the elliptic half of the key would be known to everyone."""
    stage = staged(6, senders=(0, 1, 2))
    stage.take(forge(stage.fleet, stage.round, 4, sealing_key=point))
    stage.complain(stage.inspect(1, 2))
    assert aggregator.excluded(stage.collecting) == {4}


@pytest.mark.parametrize("point", LOW_ORDER_POINTS, ids=lambda p: p.hex()[:8])
def test_a_low_order_point_as_a_prekey_is_refused_by_the_device(point):
    stage = staged(6, senders=())
    offer = decode(PrekeyOffer, stage.round.ticket.prekeys[0].body)
    bad = sign(
        stage.fleet.committee[0], PrekeyOffer(offer.fleet, offer.member, offer.serial, point, offer.mlkem, LATE_S)
    )
    with pytest.raises(PeerError, match="X25519"):
        send(stage.fleet, Round(stage.fleet.epoch, ticket_like(stage, prekeys=_with_first(stage, bad))), 0)


def test_an_invalid_lattice_prekey_is_refused_by_the_device():
    """Coefficients above 3328: FIPS 203's check of an encapsulation key fails."""
    stage = staged(6, senders=())
    offer = decode(PrekeyOffer, stage.round.ticket.prekeys[0].body)
    bad = sign(
        stage.fleet.committee[0],
        PrekeyOffer(offer.fleet, offer.member, offer.serial, offer.x25519, b"\xff" * 1184, LATE_S),
    )
    with pytest.raises(PeerError, match="ML-KEM"):
        send(stage.fleet, Round(stage.fleet.epoch, ticket_like(stage, prekeys=_with_first(stage, bad))), 0)


def _with_first(stage: Stage, offer: Signed) -> list[Signed]:
    return [offer, *stage.round.ticket.prekeys[1:]]


# --- Dealers and members that lie -----


def two_groups(**kinds: object) -> tuple[Stage, int, int]:
    """(stage of 12 devices in 2 groups, a device that lies, its group): all others have sent."""
    empty = staged(12, "helpers", helpers=5, groups=2, senders=())
    liar = 7
    group = empty.round.epoch.group_of(liar, 2)
    stage = staged(12, "helpers", helpers=5, groups=2, senders=[i for i in range(12) if i != liar])
    return stage, liar, group


def random_shares(values: NDArray[np.int64]) -> NDArray[np.int64]:
    words = KeyStream(seed("random shares")).words64(values.size)
    return (words % np.uint64(PRIME)).astype(np.int64).reshape(values.shape)


def others_of(stage: Stage, group: int, *, without: int) -> tuple[int, ...]:
    return tuple(i for i in range(12) if stage.round.epoch.group_of(i, 2) == group and i != without)


def test_a_dealer_with_inconsistent_shares_garbles_its_own_group_and_no_other():
    stage, liar, group = two_groups()
    stage.take(forge(stage.fleet, stage.round, liar, values=random_shares))
    assert inspected(stage).collecting.complaints == {}, "no single member can tell"
    done = stage.finish()
    assert set(done.reasons) == {group}
    assert "no sum passes the checks" in done.reasons[group]
    opens_exactly(stage, done, 1 - group, others_of(stage, 1 - group, without=liar))


def test_a_dealer_that_is_inconsistent_towards_one_member_is_corrected_and_the_member_is_not_blamed():
    """It frames member 3: its answer disagrees, the sum is exact, and nothing signed says anything against it."""
    stage, liar, group = two_groups()

    def frame(values: NDArray[np.int64]) -> NDArray[np.int64]:
        values = values.copy()
        values[2] = random_shares(values)[2]
        return values

    stage.take(forge(stage.fleet, stage.round, liar, values=frame))
    done = inspected(stage).finish()
    assert done.sums[group].disagreeing == {3}
    opens_exactly(stage, done, group, tuple(sorted((*others_of(stage, group, without=liar), liar))))
    assert done.reasons == {}
    # no verdict: the framed member serves the next round like any other
    later = following(stage)
    assert later.tell(3, wrap(Ticket, later.round.signed)) is None


def test_a_dealer_that_frames_more_members_than_can_be_corrected_never_gives_a_wrong_sum():
    stage, liar, group = two_groups()

    def frame(values: NDArray[np.int64]) -> NDArray[np.int64]:
        values = values.copy()
        values[:3] = random_shares(values)[:3]  # 3 of 5 wrong, and R = 3
        return values

    stage.take(forge(stage.fleet, stage.round, liar, values=frame))
    done = inspected(stage).finish()
    assert set(done.sums) == {1 - group}


def corrupt_blob(member_number: int):
    def change(blobs: list[bytes]) -> list[bytes]:
        i = member_number - 1
        return [*blobs[:i], blobs[i][:-1] + bytes([blobs[i][-1] ^ 1]), *blobs[i + 1 :]]

    return change


def out_of_range(values: NDArray[np.int64]) -> NDArray[np.int64]:
    values = values.copy()
    values[2, -1] = PRIME
    return values


@pytest.mark.parametrize(
    "lie", [{"sealed": corrupt_blob(3)}, {"values": out_of_range}], ids=["unopenable share", "value out of range"]
)
def test_a_dealer_whose_share_is_unusable_for_one_member_is_left_out_on_its_complaint(lie):
    stage, liar, group = two_groups()
    stage.take(forge(stage.fleet, stage.round, liar, **lie))
    complaints = stage.inspect()
    assert [decode(Complaint, unwrap(c)[1].body) for c in complaints] == [Complaint(stage.round.tid, 3, [liar])]
    stage.complain(complaints)
    done = stage.finish()
    opens_exactly(stage, done, group, others_of(stage, group, without=liar))
    opens_exactly(stage, done, 1 - group, others_of(stage, 1 - group, without=liar))


@pytest.mark.parametrize(
    "lie", [{"sealed": corrupt_blob(3)}, {"values": out_of_range}], ids=["unopenable share", "value out of range"]
)
def test_a_dealer_whose_complaint_is_lost_costs_one_answer_of_its_group_only(lie):
    stage, liar, group = two_groups()
    stage.take(forge(stage.fleet, stage.round, liar, **lie))
    stage.inspect()
    certified = stage.release(stage.certify(stage.sealed()))
    assert certified.answers[3][group] is None
    assert certified.answers[3][1 - group] is not None
    done = stage.open(certified)
    opens_exactly(stage, done, group, tuple(sorted((*others_of(stage, group, without=liar), liar))))


@given(
    st.tuples(
        *[st.lists(st.sets(st.integers(0, 11), max_size=1) | st.sets(st.integers(0, 11)), max_size=3) for _ in "12"]
    )
)
def test_corrupt_members_that_complain_exclude_at_most_f_honest_senders_each(lists):
    """c = 2 of 5 helpers are corrupt and F = 1: whatever they claim, in however many messages."""
    stage = staged(12, "helpers", helpers=5)
    limit = stage.round.epoch.frozen.corrupt_devices
    named: list[set[int]] = [set().union(*claims) for claims in lists]
    for n, claims in enumerate(lists, start=1):
        for senders in claims:
            claim = Complaint(stage.round.tid, n, sorted(senders))
            stage.complain([wrap(Complaint, sign(stage.fleet.committee[n - 1], claim))])
    left_out = aggregator.excluded(stage.collecting)
    assert left_out == set().union(*(senders for senders in named if len(senders) <= limit))
    assert len(left_out) <= 2 * limit
    assert len(stage.sealed().entries) == 12 - len(left_out)


def test_complaints_of_corrupt_members_alone_do_not_end_a_round():
    """A cohort that has h + F and nobody to spare: leaving the framed sender out would end the round."""
    stage = staged(12, "helpers", helpers=5, senders=range(4))
    for n, framed in ((1, 0), (2, 3)):
        claim = Complaint(stage.round.tid, n, [framed])
        stage.complain([wrap(Complaint, sign(stage.fleet.committee[n - 1], claim))])
    assert aggregator.excluded(stage.collecting) == {0, 3}
    assert aggregator.excluded(stage.collecting, proved=True) == frozenset()
    opens_exactly(stage, inspected(stage).finish(), 0, (0, 1, 2, 3))


def test_corrupt_members_that_complain_about_everyone_exclude_nobody():
    stage = staged(12, "helpers", helpers=5)
    for n in (1, 2):
        claim = Complaint(stage.round.tid, n, list(range(12)))
        stage.complain([wrap(Complaint, sign(stage.fleet.committee[n - 1], claim))])
    assert aggregator.excluded(stage.collecting) == frozenset()
    opens_exactly(stage, inspected(stage).finish(), 0, tuple(range(12)))


def test_a_sender_that_more_than_c_members_name_is_left_out_however_much_they_name():
    stage = staged(12, "helpers", helpers=5)
    for n in (1, 2, 3):
        claim = Complaint(stage.round.tid, n, [4, 6, n])
        stage.complain([wrap(Complaint, sign(stage.fleet.committee[n - 1], claim))])
    assert aggregator.excluded(stage.collecting) == {4, 6}


@pytest.mark.parametrize("lie", ["another member", "stranger", "unknown sender", "other ticket"])
def test_a_forged_complaint_is_refused(lie):
    stage = staged(12, "helpers", helpers=5, senders=range(11))
    author, claim = stage.fleet.committee[0], Complaint(stage.round.tid, 1, [4])
    match = "signature is not valid"
    if lie == "another member":
        author = stage.fleet.committee[1]
    elif lie == "stranger":
        claim, match = Complaint(stage.round.tid, 6, [4]), "this committee has 5"
    elif lie == "unknown sender":
        claim, match = Complaint(stage.round.tid, 1, [11]), "sender 11 has not contributed"
    else:
        claim, match = Complaint(seed("tid"), 1, [4]), "it is for another ticket"
    with pytest.raises(PeerError, match=match):
        aggregator.step(stage.collecting, wrap(Complaint, sign(author, claim)))


WRONG_SUMS = ["random", "zeros", "shifted", "one value", "colluding", "colluding short", "silent"]


def wrong_sum(kind: str, n: int, honest: bytes) -> bytes | None:
    """What lying member n answers instead of `honest`. Colluding ones add one polynomial of degree 1 (R = 2)."""
    values = np.frombuffer(honest, dtype="<u2").astype(np.int64)
    stream = KeyStream(seed("lie", kind))
    if kind == "random":
        values = KeyStream(seed("lie", n)).words16(values.size).astype(np.int64)
    elif kind == "zeros":
        values = np.zeros_like(values)
    elif kind == "shifted":
        values = values + 1
    elif kind == "one value":
        values[n * 7] += n
    elif kind == "silent":
        return None
    else:
        slope = stream.words16(values.size).astype(np.int64)
        offset = stream.words16(values.size).astype(np.int64)
        if kind == "colluding short":  # a secret sum that is short, so that only the residuals can tell
            offset = offset % 3 - 1
        values = values + offset + n * slope
    return (values % PRIME).astype("<u2").tobytes()


@pytest.mark.parametrize("kind", WRONG_SUMS)
@pytest.mark.parametrize("liars", range(7))
def test_a_share_sum_that_is_wrong_on_purpose_is_corrected_or_aborts_the_group(kind, liars):
    """6 answers, R = 2: two wrong ones decode uniquely. Beyond, only a subset that passes every check is opened."""
    stage = inspected(staged(6))
    certified = stage.certify(stage.sealed())
    honest = stage.release(certified)
    answers = {n: sums if n > liars else (wrong_sum(kind, n, sums[0] or b""),) for n, sums in honest.answers.items()}
    state: aggregator.State = certified
    for n, sums in answers.items():
        release = Release(stage.round.tid, certified.digest, n, list(sums))
        state = aggregator.step(state, wrap(Release, sign(stage.fleet.committee[n - 1], release)))
    assert isinstance(state, aggregator.Certified)
    done = stage.open(state)
    if done.sums:
        opens_exactly(stage, done, 0, tuple(range(6)))
    if liars <= 4:  # two honest answers are R: a subset that passes is there
        assert done.sums
        assert done.sums[0].disagreeing == (frozenset() if kind == "silent" else frozenset(range(1, liars + 1)))
    if liars == 6:
        assert not done.sums


@given(st.integers(0, 5), st.integers(1, 2047), st.integers(1, PRIME - 1))
@settings(max_examples=25)
def test_with_no_answer_to_spare_one_wrong_value_aborts(liar, position, shift):
    """Only R of the members answer and one of them is wrong in one value: nothing is left to correct it with."""
    stage = certified_stage()
    stage, certified = stage[0].fork(), stage[1]
    others = [n for n in stage.members if n != liar + 1][:1]
    full = stage.release(certified, liar + 1, *others)
    values = np.frombuffer(full.answers[liar + 1][0] or b"", dtype="<u2").astype(np.int64)
    values[position] = (values[position] + shift) % PRIME
    state = replace(full, answers={**full.answers, liar + 1: (values.astype("<u2").tobytes(),)})
    done = stage.open(state)
    assert not done.sums
    assert "no sum passes the checks" in done.reasons[0]


_certified: list[tuple[Stage, aggregator.Certified]] = []


def certified_stage() -> tuple[Stage, aggregator.Certified]:
    if not _certified:
        stage = inspected(staged(6))
        _certified.append((stage, stage.certify(stage.sealed())))
    return _certified[0]


@pytest.mark.parametrize("lie", ["stranger's key", "other set", "other ticket", "two groups", "short", "out of range"])
def test_a_forged_release_is_refused(lie):
    stage, certified = certified_stage()
    stage = stage.fork()
    author, size = stage.fleet.committee[0], 2 * stage.round.thresholds.polynomials
    fields = {"tid": stage.round.tid, "seal": certified.digest, "member": 1, "sums": [bytes(size)]}
    match = {
        "stranger's key": "signature is not valid",
        "other set": "answers for another set",
        "other ticket": "for another ticket",
        "two groups": "2 groups instead of 1",
        "short": "has 2 bytes",
        "out of range": f"not below {PRIME}",
    }[lie]
    if lie == "stranger's key":
        author = Identity(seed("stranger"))
    elif lie == "other set":
        fields["seal"] = seed("seal")
    elif lie == "other ticket":
        fields["tid"] = seed("tid")
    else:
        fields["sums"] = {"two groups": [bytes(size)] * 2, "short": [bytes(2)], "out of range": [b"\xff" * size]}[lie]
    with pytest.raises(PeerError, match=match):
        aggregator.step(certified, wrap(Release, sign(author, Release(**fields))))


def test_a_member_that_answers_twice_differently_is_held_to_its_first_answer():
    stage, certified = certified_stage()
    stage = stage.fork()
    state = stage.release(certified, 1)
    other = Release(stage.round.tid, certified.digest, 1, [bytes(2 * stage.round.thresholds.polynomials)])
    with pytest.raises(PeerError, match="member 1 answered differently before"):
        aggregator.step(state, wrap(Release, sign(stage.fleet.committee[0], other)))


def with_value(stage: Stage, position: int, value: int) -> NDArray[np.uint32]:
    """The liar's message with one coefficient set to `value` instead, in units of Delta."""
    message = stage.round.layout.encode(integers_of(7, stage.round.ticket.dimension))
    message.reshape(-1)[position] = np.uint32(value << stage.round.layout.delta_bits)
    return message


def garbling(stage: Stage, kind: str) -> Contribution:
    dimension, delta_bits = stage.round.ticket.dimension, stage.round.layout.delta_bits
    blocks = stage.round.layout.blocks

    def half_step(vector: NDArray[np.uint32]) -> NDArray[np.uint32]:
        vector[0, 0] += np.uint32(1 << (delta_bits - 1))
        return vector

    lies: dict[str, dict[str, object]] = {
        "random vector": {
            "masked": lambda vector: np.frombuffer(KeyStream(seed("garbage")).read(vector.nbytes), dtype="<u4").reshape(
                vector.shape
            )
        },
        "first pad not zero": {"message": with_value(stage, dimension + 1, 1)},
        "last pad not zero": {"message": with_value(stage, 2048 * blocks - 1, -1 & (1 << 32 - delta_bits) - 1)},
        "count 2": {"message": with_value(stage, dimension, 2)},
        "count 0": {"message": with_value(stage, dimension, 0)},
        "off by half a step": {"masked": half_step},
        "secret not short": {"secret": np.full(2048, 300, dtype=np.int64)},
        "mask of another secret": {"values": lambda values: (values + 1) % PRIME},
    }
    return forge(stage.fleet, stage.round, 7, **lies[kind])


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("random vector", "residual"),
        ("first pad not zero", "the padding is not zero"),
        ("last pad not zero", "the padding is not zero"),
        ("count 2", "the count is 7, not 6"),
        ("count 0", "the count is 5, not 6"),
        ("off by half a step", "a residual is too large"),
        ("secret not short", "the summed secret is not short"),
        ("mask of another secret", "residual"),
    ],
)
def test_a_contributor_that_garbles_aborts_its_own_group_and_the_other_opens_exactly(kind, reason):
    stage, liar, group = two_groups()
    stage.take(garbling(stage, kind))
    done = inspected(stage).finish()
    assert set(done.reasons) == {group}
    assert reason in done.reasons[group]
    opens_exactly(stage, done, 1 - group, others_of(stage, 1 - group, without=liar))


def test_the_forger_without_a_lie_makes_an_honest_contribution():
    """The control of every test that forges: what it changes is what was refused."""
    stage, liar, group = two_groups()
    stage.take(forge(stage.fleet, stage.round, liar))
    done = inspected(stage).finish()
    assert done.reasons == {}
    opens_exactly(stage, done, group, tuple(sorted((*others_of(stage, group, without=liar), liar))))
    honest = send(stage.fleet, stage.round, liar).contribution
    assert forge(stage.fleet, stage.round, liar).masked == honest.masked


# --- Clones and rollbacks -----


def test_a_cloned_card_gets_one_contribution_in_and_learns_that_it_is_a_clone():
    """Two boots of one image: one identity, fresh entropy each."""
    stage = staged(6, senders=(0, 1, 2))
    first = send(stage.fleet, stage.round, 4, entropy=seed("first boot"))
    second = send(stage.fleet, stage.round, 4, entropy=seed("second boot"))
    receipt = stage.take(first.contribution).receipt
    before = stage.collecting
    with pytest.raises(PeerError, match="sender 4 already sent another one in this round"):
        stage.take(second.contribution)
    assert stage.collecting is before
    terms = Terms(stage.round.ticket.bundle)
    with pytest.raises(PeerError, match="this identity is in use twice"):
        contributor.step(second, receipt, stage.fleet.epoch, terms, 3)
    assert isinstance(contributor.step(first, receipt, stage.fleet.epoch, terms, 3), Idle)
    # a coordinator that shows both to a member is refused, in either order
    stage.tell(1, wrap(Ticket, stage.round.signed))
    stage.tell(1, wrap(Delivery, Delivery(stage.round.tid, [(first.contribution.header, None)])))
    stage.refuses(
        1,
        wrap(Delivery, Delivery(stage.round.tid, [(second.contribution.header, None)])),
        "sender 4 signed two contributions",
    )
    both = [(second.contribution.header, None), (first.contribution.header, None)]
    stage.tell(2, wrap(Ticket, stage.round.signed))
    stage.refuses(2, wrap(Delivery, Delivery(stage.round.tid, both)), "sender 4 signed two contributions")


def test_a_cloned_card_shown_to_the_members_in_two_halves_gets_no_second_set_certified():
    stage = staged(6, senders=(0, 1, 2, 3))
    twins = [send(stage.fleet, stage.round, 4, entropy=seed("boot", boot)).contribution for boot in (1, 2)]
    halves = {1: 0, 2: 0, 3: 0, 4: 1, 5: 1, 6: 1}
    seals = []
    for twin in twins:
        entries = [(i, digest_of(c)) for i, c in stage.contributions.items()] + [(4, digest_of(twin))]
        seals.append(sign(stage.fleet.coordinator, Seal(stage.round.tid, [entries])))
    for n, half in halves.items():
        stage.inspect(n)
        shares = split_shares(stage.round, header_of(twins[half]), twins[half].shares)
        stage.tell(n, wrap(Delivery, Delivery(stage.round.tid, [(twins[half].header, shares[n - 1])])))
        stage.refuses(n, wrap(Seal, seals[1 - half]), "the header of sender 4 was not shown")
    for half, signed in enumerate(seals):
        signatures = {}
        for n in (n for n in halves if halves[n] == half):
            reply = stage.tell(n, wrap(Seal, signed))
            assert reply is not None
            signatures[n] = unwrap(reply)[1].signature
        for n in signatures:
            stage.refuses(n, stage.certificate_from(signed, signatures), "3 signatures, 4 needed")
    assert not stage.released


def test_a_receipt_that_is_not_the_coordinators_does_not_make_a_device_forget():
    stage = staged(6, senders=(0, 1, 2))
    sent = send(stage.fleet, stage.round, 4)
    terms = Terms(stage.round.ticket.bundle)
    receipt = Receipt(stage.round.tid, 4, digest_of(sent.contribution))
    forged = wrap(Receipt, sign(Identity(seed("broker")), receipt))
    with pytest.raises(PeerError, match="receipt: the signature is not valid"):
        contributor.step(sent, forged, stage.fleet.epoch, terms, 3)
    for other in (Receipt(stage.round.tid, 3, receipt.header), Receipt(seed("tid"), 4, receipt.header)):
        with pytest.raises(PeerError, match="for another round or sender"):
            contributor.step(sent, stage.lie(other), stage.fleet.epoch, terms, 3)


def test_a_rolled_back_device_cannot_contribute_a_second_time():
    """Its disk is from before the round: it trains again, with fresh entropy, and is refused everywhere."""
    stage = staged(6)
    again = send(stage.fleet, stage.round, 2, integers_of(9, 5), entropy=seed("after the rollback")).contribution
    inspected(stage)
    before = stage.collecting
    with pytest.raises(PeerError, match="already sent another one"):
        stage.take(again)
    assert stage.collecting is before
    for n in stage.members:
        stage.refuses(
            n, wrap(Delivery, Delivery(stage.round.tid, [(again.header, None)])), "sender 2 signed two contributions"
        )
    opens_exactly(stage, stage.finish(), 0, tuple(range(6)))


# --- Ledgers that forgot: heads anchored with members -----


def a_round_later(stage: Stage, ledger: Anchor, liar: int, *numbers: int, **changes: object) -> Stage:
    """The next round: `liar` contributes with this ledger, the others honestly; `numbers` know the ticket."""
    later = following(stage, **changes)
    for index in range(len(stage.fleet.devices)):
        head = ledger if index == liar else None
        later.take(send(later.fleet, later.round, index, ledger=head).contribution)
    for n in numbers or later.members:
        later.tell(n, wrap(Ticket, later.round.signed))
    return later


def head_of(stage: Stage, index: int) -> Anchor:
    return header_of(stage.contributions[index]).ledger


@pytest.mark.parametrize("entries", ["as many as before", "as many, another last one", "fewer", "none"])
def test_a_device_whose_ledger_was_rolled_back_is_left_out_and_never_opened(entries):
    """Its disk is from before an earlier round: it would spend again what it forgot that it had spent."""
    stage = inspected(staged(6))
    stage.finish()
    spent = head_of(stage, 2)
    head = {
        "as many as before": spent,
        "as many, another last one": Anchor(spent.entries, seed("after the rollback")),
        "fewer": Anchor(spent.entries - 1, seed("after the rollback")),
        "none": Anchor(0, bytes(32)),
    }[entries]
    later = a_round_later(stage, head, 2)
    with_it = later.seal_of(range(6))
    complaints = later.inspect()
    assert [decode(Complaint, unwrap(c)[1].body).senders for c in complaints] == [[2]] * 6
    for n in later.members:
        later.refuses(n, wrap(Seal, with_it), "the ledger of sender 2 was rolled back, or its device cloned")
    later.complain(complaints)
    assert aggregator.excluded(later.collecting, proved=True) == {2}
    opens_exactly(later, later.finish(), 0, (0, 1, 3, 4, 5))
    assert {seal for _, seal in later.released} == {later.sealed().digest}


def test_a_cloned_card_that_serves_two_tasks_is_left_out_of_the_second():
    """Each copy writes a ledger of its own: of the same length, with other entries."""
    stage = inspected(staged(6))
    stage.finish()
    clone = Anchor(head_of(stage, 4).entries, seed("the clone's entry"))
    later = a_round_later(stage, clone, 4, task="another", round=0, previous=authority.FIRST)
    complaints = later.inspect()
    assert len(complaints) == 6
    later.complain(complaints)
    opens_exactly(later, later.finish(), 0, (0, 1, 2, 3, 5))


def test_a_device_that_gave_itself_away_in_another_task_is_not_sealed_where_it_came_first():
    """The first task's header is shown, then the clone's in the second: neither set gets this member's signature."""
    stage = inspected(staged(6))
    clone = Anchor(head_of(stage, 4).entries, seed("the clone's entry"))
    later = a_round_later(stage, clone, 4, task="another", round=0, previous=authority.FIRST)
    assert len(later.inspect()) == 6
    stage.states = later.states
    for n in stage.members:
        stage.refuses(n, wrap(Seal, stage.seal_of(range(6))), "the ledger of sender 4")
        complaint = stage.tell(n, wrap(Delivery, Delivery(stage.round.tid, [])))
        assert complaint is not None
        assert decode(Complaint, unwrap(complaint)[1].body).senders == [4]


@pytest.mark.parametrize(("devices", "helpers"), [(6, 0), (10, 0), (6, 5), (6, 7)])
def test_a_rollback_past_a_certified_set_reaches_no_second_quorum(devices, helpers):
    """The first set was seen by Q members and no more. All others, and c corrupt ones of the Q, sign the second."""
    stage = staged(devices, "helpers" if helpers else "everyone", helpers=helpers)
    quorum, corrupt = stage.round.thresholds.quorum, stage.round.thresholds.corrupt
    saw = stage.members[:quorum]
    stage.inspect(*saw)
    stage.release(stage.certify(stage.sealed(), *saw), *saw)
    later = a_round_later(stage, Anchor(head_of(stage, 2).entries, seed("rolled back")), 2)
    later.inspect()
    signed = later.seal_of(range(devices))
    signatures = {n: later.signature_of(n, signed) for n in saw[:corrupt]}
    for n in saw[corrupt:]:
        later.refuses(n, wrap(Seal, signed), "the ledger of sender 2")
    for n in set(later.members) - set(saw):
        reply = later.tell(n, wrap(Seal, signed))
        assert reply is not None
        signatures[n] = unwrap(reply)[1].signature
    assert len(signatures) < quorum
    for n in later.members:
        with pytest.raises(PeerError):
            later.tell(n, later.certificate_from(signed, signatures))
    assert later.released == []


def test_a_rolled_back_device_does_not_come_back_by_waiting():
    """Neither when its ledger has grown again, nor when the sessions that showed it have expired."""
    stage = inspected(staged(6))
    later = a_round_later(stage, Anchor(0, bytes(32)), 2)
    assert len(later.inspect()) == 6
    later.states = {n: member.expire(state, EXPIRES_S) for n, state in later.states.items()}
    assert not any(state.sessions for state in later.states.values())
    third = a_round_later(later, Anchor(1_000, seed("grown")), 2, closes_s=EXPIRES_S + 1, expires_s=EXPIRES_S + 2)
    complaints = third.inspect()
    assert [decode(Complaint, unwrap(c)[1].body).senders for c in complaints] == [[2]] * 6


def test_a_head_that_is_shown_without_its_share_counts():
    """Or a coordinator would show the members only headers until the set is sealed."""
    stage = staged(6)
    stage.mail = {n: [(header, None) for header, _ in items] for n, items in stage.mail.items()}
    stage.inspect()
    later = a_round_later(stage, Anchor(0, bytes(32)), 2)
    later.mail = {n: [(header, None) for header, _ in items] for n, items in later.mail.items()}
    assert len(later.inspect()) == 6
    for n in later.members:
        later.refuses(n, wrap(Seal, later.seal_of(range(6))), "the ledger of sender 2")


def test_ledger_heads_outlive_the_sessions_that_showed_them():
    stage = inspected(staged(6))
    stage.states = {n: member.expire(state, EXPIRES_S) for n, state in stage.states.items()}
    assert not any(state.sessions for state in stage.states.values())
    again = Anchor(head_of(stage, 2).entries, head_of(stage, 2).link)
    later = a_round_later(stage, again, 2, closes_s=EXPIRES_S + 1, expires_s=EXPIRES_S + 2)
    assert len(later.inspect()) == 6


def test_a_lying_coordinator_cannot_make_a_device_look_rolled_back():
    """Heads are signed by the device and bound to one ticket; shown again or out of order they say the same."""
    stage = inspected(staged(6))
    stage.finish()
    later = inspected(a_round_later(stage, Anchor(2, seed("next")), 2))  # no complaint
    old = stage.contributions[2].header
    moved = sign(
        stage.fleet.coordinator, msgspec.structs.replace(header_of(later.contributions[2]), ledger=Anchor(0, bytes(32)))
    )
    for n in later.members:
        later.refuses(n, wrap(Delivery, Delivery(later.round.tid, [(old, None)])), "for another ticket")
        later.refuses(n, wrap(Delivery, Delivery(later.round.tid, [(moved, None)])), "signature is not valid")
        assert later.tell(n, wrap(Delivery, Delivery(later.round.tid, later.mail[n]))) is None
        assert later.states[n].anchors.forked == frozenset()
    opens_exactly(later, later.finish(), 0, tuple(range(6)))


def test_a_device_in_two_tasks_is_not_taken_for_a_clone_whatever_arrives_first():
    """It drew for both tickets, then contributed to both: one ledger, and the shorter head may be shown last."""
    stage = staged(6, senders=())
    heads = [Anchor(entries, seed("one ledger", entries)) for entries in range(9)]
    other = following(stage, task="another", round=0, previous=authority.FIRST)
    for index in range(6):
        stage.take(send(stage.fleet, stage.round, index, ledger=heads[2]).contribution)
        other.take(send(other.fleet, other.round, index, ledger=heads[2 + index % 2]).contribution)
    stage.states = other.states
    assert stage.inspect() == []
    other.states = stage.states
    assert other.inspect() == []
    after = following(other, task="reference", round=1, previous=stage.round.tid)
    for index in range(6):
        after.take(send(after.fleet, after.round, index, ledger=heads[5]).contribution)
    assert after.inspect() == []


def test_an_honest_coordinator_refuses_a_rolled_back_device_before_members_have_to():
    """So that a liar cannot have its set refused by the members that saw its other head."""
    stage = staged(6)
    headers = [header_of(stage.contributions[i]) for i in range(6)]
    anchors = Anchors().shown(stage.round.ticket.task, stage.round.ticket.round, headers)
    later = following(stage)
    coordinator = stage.fleet.coordinator
    for head in (head_of(stage, 2), Anchor(0, bytes(32))):
        rolled_back = send(later.fleet, later.round, 2, ledger=head).contribution
        with pytest.raises(LedgerForked, match=r"header of sender 2: .* rolled back or its device cloned"):
            aggregator.accept(later.collecting, rolled_back, coordinator, 2, anchors)
    # The members never see what was refused, so the coordinator keeps it: a longer ledger does not let the device in.
    known = anchors.shown("reference", 1, [header_of(rolled_back)])
    grown = send(later.fleet, later.round, 2, ledger=Anchor(1_000, seed("grown"))).contribution
    with pytest.raises(LedgerForked, match="as an earlier header showed"):
        aggregator.accept(later.collecting, grown, coordinator, 2, known)
    honest = send(later.fleet, later.round, 2).contribution
    accepted = aggregator.accept(later.collecting, honest, coordinator, 2, anchors)
    again = aggregator.accept(
        accepted.state, honest, coordinator, 2, anchors.shown("reference", 1, [header_of(honest)])
    )
    assert again.receipt == accepted.receipt


@pytest.mark.parametrize(("devices", "c"), [(6, 1), (10, 3)])
def test_rolled_back_members_count_as_corrupt_and_up_to_c_of_them_change_nothing(devices, c):
    """Members put back to before they signed sign again, with the real code; the others do not."""
    stage = inspected(staged(devices))
    seals = [stage.seal_of(range(devices)), stage.seal_of(range(devices - 1))]
    for split in range(devices - c + 1):
        attempt = stage.fork()
        honest = attempt.members[c:]
        signatures: list[dict[int, bytes]] = [{}, {}]
        for which, signed in enumerate(seals):
            for n in attempt.members[:c]:
                attempt.states[n] = stage.states[n]  # the rollback
                reply = attempt.tell(n, wrap(Seal, signed))
                assert reply is not None
                signatures[which][n] = unwrap(reply)[1].signature
        for i, n in enumerate(honest):
            reply = attempt.tell(n, wrap(Seal, seals[int(i >= split)]))
            assert reply is not None
            signatures[int(i >= split)][n] = unwrap(reply)[1].signature
        quorum = stage.round.thresholds.quorum
        assert sum(len(collected) >= quorum for collected in signatures) <= 1
        for signed, collected in zip(seals, signatures, strict=True):
            for n in honest:
                if len(collected) < quorum:
                    with pytest.raises(PeerError):
                        attempt.tell(n, attempt.certificate_from(signed, collected))
        assert len(releases_for(attempt)) <= 1


def test_a_member_rolled_back_to_before_a_prekey_does_not_reuse_its_serial_unnoticed():
    stage = staged(6)
    old = member.MemberState()
    fleet_key = stage.fleet.epoch.frozen.fleet
    after, _ = member.offer_prekey(
        old, stage.fleet.committee[0], fleet_key, derive_key(seed("new"), "prekey", length=PREKEY_SEED_BYTES), LATE_S
    )
    stage.states[1] = after  # offers serial 0 again, with another seed; the ticket names the lost one
    stage.refuses(1, wrap(Ticket, stage.round.signed), "its state was rolled back")


def test_a_rolled_back_coordinator_cannot_certify_another_set():
    """It sealed, its disk went back to before that, and one more contribution came: the members know better."""
    stage = staged(6, senders=range(5))
    late = send(stage.fleet, stage.round, 5).contribution
    inspected(stage)
    backup = stage.collecting
    first = stage.sealed()
    for n in (1, 2, 3):
        stage.tell(n, wrap(Seal, first.seal))
    stage.collecting = backup
    shares = stage.take(late).shares
    assert shares is not None
    second = stage.sealed()
    assert second.digest != first.digest
    signatures = {}
    for n in stage.members:
        item = Delivery(stage.round.tid, [(late.header, shares[n - 1])])
        if n <= 3:
            stage.refuses(n, wrap(Delivery, item), "not expected while Committed")
            stage.refuses(n, wrap(Seal, second.seal), "already signed another set")
        else:
            stage.tell(n, wrap(Delivery, item))
            reply = stage.tell(n, wrap(Seal, second.seal))
            assert reply is not None
            signatures[n] = unwrap(reply)[1].signature
    for n in (4, 5, 6):
        stage.refuses(n, stage.certificate_from(second.seal, signatures), "3 signatures, 4 needed")
    assert not stage.released


def test_a_rolled_back_coordinator_that_sees_a_signature_over_another_set_is_told_so():
    stage = inspected(staged(6))
    other = stage.seal_of(range(5))
    reply = stage.tell(1, wrap(Seal, other))
    assert reply is not None
    sealed = stage.sealed()
    with pytest.raises(PeerError, match="member 1 signed another set"):
        aggregator.step(sealed, reply)


def test_a_coordinator_cannot_seal_early():
    stage = staged(6, senders=range(4))
    with pytest.raises(ParameterError, match="still open"):
        aggregator.seal(stage.collecting, stage.fleet.coordinator, now_s=CLOSES_S - 1)


def test_a_later_ticket_ends_the_earlier_ones_inspection():
    """Otherwise a coordinator could keep a round open for as long as it likes."""
    stage = inspected(staged(6))
    later = following(stage)
    for n in stage.members:
        later.tell(n, wrap(Ticket, later.round.signed))
        later.refuses(n, wrap(Seal, stage.seal_of(range(6))), "not expected while Closed")


def test_the_stage_without_a_lie_opens_exactly():
    """The control of everything above."""
    stage = inspected(staged(6))
    opens_exactly(stage, stage.finish(), 0, tuple(range(6)))
    assert releases_for(stage) == {stage.sealed().digest}


def test_corrupt_members_that_frame_every_honest_sender_cannot_end_the_round():
    """Four of ten members lie, each about a list short enough to be believed: together they would empty the round."""
    stage = staged(10, corrupt=3)
    honest = [s for s in sorted(stage.collecting.entries) if s not in (0, 1, 2)]
    for member_number, start in ((1, 0), (2, 3), (3, 6)):
        frame = sign(stage.fleet.committee[member_number - 1],
                     Complaint(stage.round.tid, member_number, honest[start : start + 3]))  # fmt: skip
        stage.complain([wrap(Complaint, frame)])
    assert len(aggregator.excluded(stage.collecting)) == 7
    sealed = aggregator.seal(stage.collecting, stage.fleet.coordinator, CLOSES_S)
    assert isinstance(sealed, aggregator.Sealed)
    assert sealed.groups == (tuple(range(10)),)
