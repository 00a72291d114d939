"""What the privacy mechanism costs a device and the coordinator, in CPU milliseconds, and its import in megabytes.

    python benchmarks/privacy.py --json

One row for each d: `encode_ms` on a device, with its steps timed by themselves on the same data (`clip_ms`, `rotate_ms`
with scaling, `round_ms`, `noise_ms`), and `decode_ms` of one group's sum. Medians of `time.process_time` over the
repeats. `import_mb`: resident memory that `edge_sdk.privacy.mechanism` adds in a fresh process that has imported numpy
and `edge_sdk.crypto` already; `first_mb`, the tables and matrices that the first small encode makes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

from edge_sdk.crypto.stream import KeyStream
from edge_sdk.privacy.mechanism import Mechanism, clip_l2, decode, encode
from edge_sdk.privacy.noise import noise_sampler
from edge_sdk.privacy.rotation import rotate
from edge_sdk.privacy.rounding import round_conditionally, round_stochastically

IMPORT = """
import numpy, edge_sdk.errors, edge_sdk.crypto.stream, edge_sdk.crypto.gaussian, edge_sdk.crypto.hashing

def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024

before = resident()
from edge_sdk.privacy import mechanism
after = resident()
plan = mechanism.Mechanism("device", 4096, 1.0, 1e-3, 1e3, 10, 18)
mechanism.encode(plan, numpy.ones(4096), None, bytes(32), bytes(32))
print(after - before, resident() - after)
"""


def median_ms(call: Callable[[], object], repeats: int) -> float:
    """CPU milliseconds of `call`, the median; one call before to make its tables."""
    call()
    spent = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        spent.append(1e3 * (time.process_time() - start))
    return round(statistics.median(spent), 3)


def import_cost() -> tuple[float, float]:
    """Megabytes that the import adds, and that the first encode adds to it."""
    run = subprocess.run([sys.executable, "-c", IMPORT], check=True, capture_output=True, text=True)  # noqa: S603
    added, first = map(float, run.stdout.split())
    return round(added, 2), round(first, 2)


def measure(d: int, unit: str, multiplier: float, bits: int, honest: int, repeats: int) -> dict[str, object]:
    """One row: a plan of `honest` devices with its noise `multiplier` times the sensitivity of 3,000 steps or more."""
    steps = max(3000.0, 10 * d**0.5)
    plan = Mechanism(unit, d, 1.0, 1 / steps, multiplier * steps, honest, bits)  # type: ignore[arg-type]
    vector = KeyStream(os.urandom(32)).words64(d).astype(np.float64) / 2.0**63 - 1.0
    seed, entropy = os.urandom(32), os.urandom(32)
    clipped = clip_l2(vector, plan.clip)
    scaled = rotate(clipped, seed) / plan.granularity
    sampler = noise_sampler(*plan.share_sigma.as_integer_ratio())

    def rotated() -> object:
        result = rotate(clipped, seed)
        result /= plan.granularity
        return result

    def rounded() -> object:
        if plan.unit == "device":
            return round_conditionally(scaled, plan.sensitivity_steps, KeyStream(entropy))
        return round_stochastically(scaled, KeyStream(entropy))

    given = vector if plan.unit == "device" else clipped  # examples were clipped in the graph
    message = encode(plan, given, None, seed, entropy)
    return {
        "d": d,
        "unit": unit,
        "sigma_steps": round(plan.sigma),
        "encode_ms": median_ms(lambda: encode(plan, given, None, seed, entropy), repeats),
        "clip_ms": median_ms(lambda: clip_l2(vector, plan.clip), repeats) if plan.unit == "device" else 0.0,
        "rotate_ms": median_ms(rotated, repeats),
        "round_ms": median_ms(rounded, repeats),
        "noise_ms": median_ms(lambda: sampler.sample(KeyStream(entropy), d), repeats),
        "decode_ms": median_ms(lambda: decode(plan, message, seed), repeats),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="vector lengths")
    parser.add_argument("--unit", choices=("device", "example"), default="device")
    parser.add_argument("--multiplier", type=float, default=1.0, help="noise over sensitivity (1)")
    parser.add_argument("--bits", type=int, default=18, help="modulus bits (18)")
    parser.add_argument("--honest", type=int, default=100, help="devices that carry the noise (100)")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="one object a line")
    arguments = parser.parse_args()
    import_mb, first_mb = import_cost()
    for d in arguments.d:
        row = measure(d, arguments.unit, arguments.multiplier, arguments.bits, arguments.honest, arguments.repeats)
        row |= {"import_mb": import_mb, "first_mb": first_mb}
        if arguments.json:
            print(json.dumps(row), flush=True)
        else:
            print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
