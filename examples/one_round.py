"""One aggregation round in one process, and what each party saw of it.

    python examples/one_round.py

Six devices hold a vector each; they are their own committee. One does not come, and one sleeps through the members'
part. The coordinator ends with the exact sum of the five that came, and at no point held anything else of them. The
broker, the disk and the clock are left out: see docs/protocol.md for the same steps in words.
"""

from __future__ import annotations

import os

import numpy as np

from edge_sdk.crypto.sealing import encapsulate
from edge_sdk.protocol import aggregator, contributor, reference
from edge_sdk.protocol.messages import Release, Signed, decode, unwrap

DEVICES = 6
DIMENSION = 1_000
SCALE = 1_000  # fixed point: three decimals


def show(values: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> str:
    return "[" + ", ".join(f"{int(v):>11,}" for v in values[:4]) + ", ...]"


def watch(party: str, event: str, thing: object) -> None:
    """Print what a party just did, with the part of it that the others get to see."""
    line = f"  {party:<12} {event}"
    if isinstance(thing, contributor.Contribution):
        seen = np.frombuffer(thing.masked, dtype="<u4")
        line += f": {thing.size:,} bytes\n{'':15}the coordinator sees {show(seen)}"
    elif isinstance(thing, aggregator.Sealed):
        line += f": devices {', '.join(map(str, thing.groups[0]))} of the roster, hash {thing.digest.hex()[:16]}"
    elif isinstance(thing, int):
        line += f" of {thing} contributions"
    elif isinstance(thing, bytes) and "releases" in event:
        _, signed = unwrap(thing)
        if isinstance(signed, Signed):
            sums = decode(Release, signed.body).sums[0]
            line += f"\n{'':15}the coordinator sees {show(np.frombuffer(sums or b'', dtype='<u2'))} (modulo 65521)"
    print(line)


def main() -> None:
    fleet = reference.make_fleet(os.urandom(32), DEVICES)
    round_ = reference.open_ticket(fleet, os.urandom(32), DIMENSION, n_max=DEVICES)
    numbers = fleet.epoch.thresholds
    print(f"Committee of {numbers.members}: {numbers.corrupt} may be corrupt, {numbers.quorum} sign the set,")
    print(
        f"{numbers.answers} answers open the sum, {numbers.may_be_absent} may sleep. No group below {round_.min_group}."
    )
    print(f"Sums are exact modulo 2^{round_.layout.modulus_bits}. Unmasked, a vector is {DIMENSION * 4:,} bytes.\n")

    print("What each device holds (it never leaves the device):")
    came = range(DEVICES - 1)
    vectors = {}
    for number in came:
        noise = np.frombuffer(os.urandom(8 * DIMENSION), dtype=np.uint64).astype(np.float64) / 2.0**63 - 1.0
        vectors[number] = np.rint(noise * SCALE).astype(np.int64)
        print(f"  device {number}     {show(vectors[number])}")
    print(f"  device {DEVICES - 1}     does not come\n")

    print("The round:")
    done = reference.run_round(fleet, round_, vectors, os.urandom(32), encapsulate, absent=[2], watch=watch)

    opened = done.sums[0].signed(round_.layout.modulus_bits)
    expected = sum(vectors.values())
    print("\nThe coordinator ends with")
    print(f"  opened sum   {show(opened)}")
    print(f"  true sum     {show(np.asarray(expected))}")
    if not np.array_equal(opened, expected):
        raise SystemExit("the opened sum is not the true sum")
    print(f"  equal in all {DIMENSION} places; mean of the {len(came)}: {opened[0] / len(came) / SCALE:+.4f}, ...")


if __name__ == "__main__":
    main()
