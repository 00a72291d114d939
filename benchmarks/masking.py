"""What one aggregation costs each party, in CPU seconds and bytes, on the real code in one process.

    python benchmarks/masking.py --json --n 100 --d 1000000 --dropout 0.05

`--dropout` of the n invited devices never send, and one committee member sleeps through the round. Times are
`time.process_time` of the calls alone: medians over the devices and over the members, sums over the uploads. The floor,
measured between the devices in the same run, is what any mask costs: a ChaCha20 stream as long as the vector and one
addition.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from edge_sdk.crypto.sealing import encapsulate
from edge_sdk.crypto.stream import KeyStream
from edge_sdk.protocol import aggregator, contributor, member, reference
from edge_sdk.protocol.messages import Certificate, Delivery, Seal, SealedShare, Signed, Ticket, wrap

T = TypeVar("T")
COMMITTEES = ("helpers", "drawn", "everyone")


def timed(call: Callable[[], T]) -> tuple[float, T]:
    start = time.process_time()
    value = call()
    return time.process_time() - start, value


def floor(key: bytes, vector: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The least that a mask can cost: as many ChaCha20 bytes as the vector has, and an addition."""
    mask = np.empty(vector.size, dtype="<u4")
    KeyStream(key).fill(mask.view(np.uint8))
    mask += vector
    return mask


def measure(n: int, d: int, dropout: float, committee: str, groups: int) -> dict[str, object]:
    """One round at this size: the object that the command prints."""
    kinds: dict[str, dict[str, int]] = {
        "helpers": {"helpers": 5},
        "drawn": {"drawn": 30, "corrupt": max(1, n // 20)},
        "everyone": {},
    }
    fleet = reference.make_fleet(os.urandom(32), n, committee, groups=(1, groups), **kinds[committee])  # type: ignore[arg-type]
    round_ = reference.open_ticket(fleet, os.urandom(32), d, n_max=n, groups=groups)
    terms = contributor.Terms(round_.ticket.bundle)
    inputs = KeyStream(os.urandom(32))
    contributors = fleet.devices[: n - round(dropout * n)]

    client_s, floor_s, ingest_s, client_bytes = [], [], [], 0
    collecting = aggregator.Collecting(round_)
    sums = {g: np.zeros((round_.layout.blocks, 2048), dtype=np.uint32) for g in range(groups)}
    expected = {g: np.zeros(d, dtype=np.uint32) for g in range(groups)}
    members = range(1, len(fleet.committee) + 1)
    mail: dict[int, list[tuple[Signed, SealedShare | None]]] = {number: [] for number in members}
    for device in contributors:
        integers = inputs.read(4 * d).view(np.uint32)
        seconds, _ = timed(lambda x=integers: floor(bytes(32), x))  # type: ignore[misc]
        floor_s.append(seconds)
        enrolled = fleet.enrolled(device)
        head = reference.stand_in_ledger(device.public_key, round_.ticket.round)
        entropy = os.urandom(32)
        training = contributor.Idle(round_.ticket.task).on_ticket(round_, terms, 0)
        seconds, sent = timed(
            lambda t=training, x=integers, e=enrolled, h=head, s=entropy: t.contribute(x, e, h, s, encapsulate, 1)  # type: ignore[misc]
        )
        client_s.append(seconds)
        contribution = sent.contribution
        client_bytes = contribution.size
        group = round_.epoch.group_of(enrolled.index, groups)

        start = time.process_time()
        accepted = aggregator.accept(collecting, contribution, fleet.coordinator, 2)
        sums[group] += round_.layout.from_bytes(contribution.masked)
        ingest_s.append(time.process_time() - start)
        if not isinstance(accepted.state, aggregator.Collecting):
            raise SystemExit("the round did not stay open")
        collecting = accepted.state
        expected[group] += integers
        for number, share in enumerate(accepted.shares or (), start=1):
            mail[number].append((contribution.header, share))

    state: aggregator.State = aggregator.seal(collecting, fleet.coordinator, round_.ticket.closes_s)
    if not isinstance(state, aggregator.Sealed):
        raise SystemExit(f"the round was not sealed: {state}")
    awake = list(members)[1:]
    steps = [wrap(Ticket, round_.signed), None, wrap(Seal, state.seal), None]
    member_s, member_bytes = dict.fromkeys(awake, 0.0), 0
    for position, step_bytes in enumerate(steps):
        if position == 3:
            if not isinstance(state, aggregator.Certified):
                raise SystemExit("the round was not certified")
            step_bytes = wrap(Certificate, state.certificate)
        for number in awake:
            data = step_bytes or wrap(Delivery, Delivery(round_.tid, mail[number]))
            seconds, (fleet.members[number - 1], reply) = timed(
                lambda i=number - 1, b=data: member.step(fleet.members[i], b, fleet.epoch, fleet.committee[i], 3)  # type: ignore[misc]
            )
            member_s[number] += seconds
            member_bytes += len(data)
            if reply is not None:
                state = aggregator.step(state, reply)
    if not isinstance(state, aggregator.Certified):
        raise SystemExit("too few members answered")
    certified = state
    open_s, done = timed(lambda: aggregator.open_round(certified, sums, fleet.coordinator, final=True))
    if not isinstance(done, aggregator.Done):
        raise SystemExit("the round did not open")
    modulus = (1 << round_.layout.modulus_bits) - 1
    exact = not done.reasons and all(
        np.array_equal(result.values, expected[g] & np.uint32(modulus)) for g, result in done.sums.items()
    )
    client, least = statistics.median(client_s), statistics.median(floor_s)
    return {
        "n": n,
        "d": d,
        "dropout": dropout,
        "contributors": len(contributors),
        "committee": committee,
        "members": len(fleet.committee),
        "groups": groups,
        "modulus_bits": round_.layout.modulus_bits,
        "client_cpu_s": round(client, 5),
        "client_bytes": client_bytes,
        "member_cpu_s": round(statistics.median(member_s.values()), 5),
        "member_bytes_down": member_bytes // len(awake),
        "ingest_cpu_s": round(sum(ingest_s), 5),
        "open_cpu_s": round(open_s, 5),
        "exact": exact,
        "floor_cpu_s": round(least, 5),
        "client_over_floor": round(client / least, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=100, help="devices invited (100)")
    parser.add_argument("--d", type=int, default=1_000_000, help="vector length (1,000,000)")
    parser.add_argument("--dropout", type=float, default=0.05, help="share of them that never send (0.05)")
    parser.add_argument("--committee", choices=COMMITTEES, default="helpers")
    parser.add_argument("--groups", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one object on one line")
    arguments = parser.parse_args()
    result = measure(arguments.n, arguments.d, arguments.dropout, arguments.committee, arguments.groups)
    if arguments.json:
        print(json.dumps(result))
    else:
        width = max(map(len, result))
        for name, value in result.items():
            print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    main()
