"""The whole protocol as one readable function, on the same code that devices and the coordinator run.

docs/protocol.md section 1 walks through it. Tests replace single parties by liars; `examples/one_round.py` prints it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from edge_sdk.crypto.hashing import content_hash, derive_key
from edge_sdk.crypto.identity import Identity
from edge_sdk.crypto.sealing import PREKEY_SEED_BYTES, Encapsulate
from edge_sdk.errors import RoundAborted
from edge_sdk.protocol import aggregator, authority, contributor, member
from edge_sdk.protocol.messages import (
    Anchor,
    Certificate,
    CommitteeKind,
    Delivery,
    NoisePlan,
    Seal,
    SealedShare,
    Signed,
    Ticket,
    Work,
    wrap,
)
from edge_sdk.protocol.rounds import Round, sign_ticket

EXPIRES_S = 1_000_000
"""When epochs and prekeys end in this walk-through, whose clock starts at 0."""

NOISE = NoisePlan("device", 1.0, 1e-4, 100.0, metric_scale=0.0, loss_bound=1.0, device_rate=1.0, example_rate=1.0)
LOCAL_EPOCH = Work(learning_rate=0.1, epochs=1, steps=0, proximal=0.0, weight_cap=0)
GRADIENTS = Work(learning_rate=0.0, epochs=0, steps=0, proximal=0.0, weight_cap=0)

Observer = Callable[[str, str, object], None]
"""(party, what it did or saw, the thing) for whoever wants to watch."""


def _silent(party: str, event: str, thing: object) -> None:
    """The observer that watches nothing."""


@dataclass
class Fleet:
    """Everyone in one place: for this walk-through, tests, vectors and benchmarks."""

    coordinator: Identity
    devices: Sequence[Identity]
    committee: Sequence[Identity]
    roster: authority.Roster
    epoch: authority.FleetEpoch
    members: list[member.MemberState] = field(default_factory=list)

    def enrolled(self, device: Identity) -> contributor.Enrolled:
        index, proof = self.roster.enrolment(device.public_key)
        return contributor.Enrolled(device, index, proof)


def make_fleet(
    entropy: bytes,
    devices: int,
    committee: CommitteeKind = "everyone",
    *,
    helpers: int = 0,
    drawn: int | None = None,
    corrupt: int = 1,
    groups: Sequence[int] = (1,),
) -> Fleet:
    """Section 7: enrol, freeze the roster, draw the beacon, sign the epoch. entropy: 32 bytes."""

    def seed(name: str, number: int = 0) -> bytes:
        return derive_key(entropy, name, number.to_bytes(4, "little"))

    fleet_authority, coordinator = Identity(seed("authority")), Identity(seed("coordinator"))
    identities = [Identity(seed("device", i)) for i in range(devices)]
    boxes = [Identity(seed("helper", i)) for i in range(helpers)]
    roster = authority.Roster([device.public_key for device in identities])
    frozen = authority.freeze(
        fleet_authority,
        roster,
        coordinator=coordinator.public_key,
        corrupt_devices=corrupt,
        committee=committee,
        committee_size=drawn,
        helpers=[box.public_key for box in boxes],
        expires_s=EXPIRES_S,
    )
    signed = authority.draw(fleet_authority, frozen, roster, seed("beacon"), groups)
    epoch = authority.FleetEpoch(fleet_authority.public_key, signed)
    by_key = {identity.public_key: identity for identity in [*identities, *boxes]}
    serving = [by_key[entry.key] for entry in epoch.members]
    return Fleet(coordinator, identities, serving, roster, epoch, [member.MemberState() for _ in serving])


def open_ticket(
    fleet: Fleet,
    entropy: bytes,
    dimension: int,
    *,
    n_max: int,
    groups: int = 1,
    honest: int = 2,
    task: str = "reference",
    number: int = 0,
    previous: bytes = authority.FIRST,
    noise: NoisePlan | None = None,
    work: Work | None = None,
) -> Round:
    """Section 8: every member offers a fresh prekey, the coordinator signs the round.

    work: None for one epoch at rate 0.1 (unit "device"), or for gradients alone (unit "example").
    """
    noise = noise or NOISE
    offers = []
    for i, identity in enumerate(fleet.committee):
        label = (i.to_bytes(4, "little"), task.encode(), number.to_bytes(8, "little"))
        seed = derive_key(entropy, "prekey", *label, length=PREKEY_SEED_BYTES)
        fleet.members[i], offer = member.offer_prekey(
            fleet.members[i], identity, fleet.epoch.frozen.fleet, seed, EXPIRES_S
        )
        offers.append(offer)
    ticket = Ticket(
        version=1,
        epoch=fleet.epoch.id,
        task=task,
        round=number,
        previous=previous,
        bundle=bytes(32),
        parameters=bytes(32),
        dimension=dimension,
        n_max=n_max,
        honest=honest,
        groups=groups,
        noise=noise,
        work=work or (LOCAL_EPOCH if noise.unit == "device" else GRADIENTS),
        prekeys=offers,
        closes_s=1_000,
        expires_s=2_000,
    )
    return sign_ticket(fleet.coordinator, fleet.epoch, ticket)


def stand_in_ledger(key: bytes, round_number: int) -> Anchor:
    """The head that the ledger of the device with this key would have, if it held one entry a round."""
    entries = round_number + 1
    return Anchor(entries, content_hash(key + entries.to_bytes(8, "little")))


S = TypeVar("S", bound=aggregator.State)


def _now(kind: type[S], state: aggregator.State) -> S:
    if not isinstance(state, kind):
        raise RoundAborted(f"the round is {aggregator.phase(state)}")
    return state


def run_round(
    fleet: Fleet,
    round_: Round,
    inputs: Mapping[int, NDArray[np.generic]],
    entropy: bytes,
    encapsulate: Encapsulate,
    *,
    absent: Iterable[int] = (),
    watch: Observer = _silent,
) -> aggregator.Done:
    """One round. Raises RoundAborted where too few contribute, sign or answer.

    inputs: device number -> its integers (dimension,); the other devices do not come.
    absent: member numbers that sleep through it.  entropy: 32 bytes, from which each device's own are derived.
    """
    terms = contributor.Terms(round_.ticket.bundle)
    collecting = aggregator.Collecting(round_)
    stored: dict[int, bytes] = {}
    mail: dict[int, list[tuple[Signed, SealedShare | None]]] = {n: [] for n in range(1, len(fleet.committee) + 1)}

    # 1. Contribute: the only turn of a data-holding device.
    for number, integers in inputs.items():
        device = fleet.enrolled(fleet.devices[number])
        training = contributor.Idle(round_.ticket.task).on_ticket(round_, terms, now_s=0)
        own_entropy = derive_key(entropy, "device entropy", number.to_bytes(4, "little"))
        ledger = stand_in_ledger(device.identity.public_key, round_.ticket.round)
        sent = training.contribute(integers, device, ledger, own_entropy, encapsulate, now_s=1)
        watch(f"device {number}", "sends its contribution", sent.contribution)
        accepted = aggregator.accept(collecting, sent.contribution, fleet.coordinator, now_s=2)
        collecting = _now(aggregator.Collecting, accepted.state)
        stored[device.index] = sent.contribution.masked
        for n, share in enumerate(accepted.shares or (), start=1):
            mail[n].append((sent.contribution.header, share))
        after = contributor.step(sent, accepted.receipt, fleet.epoch, terms, now_s=3)
        watch(f"device {number}", "has its receipt and sleeps", after)

    awake = [n for n in mail if n not in set(absent)]

    def tell(n: int, data: bytes) -> bytes | None:
        i = n - 1
        fleet.members[i], reply = member.step(fleet.members[i], data, fleet.epoch, fleet.committee[i], now_s=4)
        return reply

    # 2. Inspect, then seal: members open their shares; then the set is fixed and each signs it, once.
    for n in awake:
        tell(n, wrap(Ticket, round_.signed))
        complaint = tell(n, wrap(Delivery, Delivery(round_.tid, mail[n])))
        watch(f"member {n}", "opened its shares", len(mail[n]))
        if complaint is not None:
            collecting = _now(aggregator.Collecting, aggregator.step(collecting, complaint))
    state: aggregator.State = aggregator.seal(collecting, fleet.coordinator, now_s=round_.ticket.closes_s)
    sealed = _now(aggregator.Sealed, state)
    watch("coordinator", "fixes the set", sealed)
    for n in awake:
        signature = tell(n, wrap(Seal, sealed.seal))
        state = aggregator.step(state, signature or b"")
        watch(f"member {n}", "signs the set", signature)

    # 3. Release: shown the certificate, each member returns one sum of shares per group.
    certificate = wrap(Certificate, _now(aggregator.Certified, state).certificate)
    for n in awake:
        release = tell(n, certificate)
        state = aggregator.step(state, release or b"")
        watch(f"member {n}", "releases its sums of shares", release)

    # 4. Open: the sums of the shares give the sums of the secrets, and those the sums of the inputs.
    certified = _now(aggregator.Certified, state)
    sums = {
        group: aggregator.sum_masked(round_, (stored[sender] for sender in senders))
        for group, senders in enumerate(certified.groups)
    }
    done = _now(aggregator.Done, aggregator.open_round(certified, sums, fleet.coordinator, final=True))
    watch("coordinator", "opens the sums", done)
    return done
