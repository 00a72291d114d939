"""Build the demo's checked-in bundles, or with --check say whether they are what the source makes.

The demo runs without PyTorch, so what it trains is checked in. Two builds by one set of tools give the same bytes;
other versions of the tools (the manifest names them) may write a graph differently, and then --check says which.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from edge_sdk.bundle import Bundle
from edge_sdk.crypto.hashing import tagged_hash
from edge_sdk.crypto.identity import Identity
from export.build import build, load_spec

HERE = Path(__file__).parent

PUBLISHER = Identity(
    tagged_hash("demo", b"a publisher's key that everybody knows: it signs this demo and nothing else")
)

BUNDLES = {"digits": ("digits", 32), "fashion-mnist": ("scattering", 32)}
"""Data set -> (model in examples/models, batch)."""


def main() -> int:
    """Exit status: 1 if --check finds a difference that the tools' versions do not explain."""
    failed = False
    for name, (model, batch) in BUNDLES.items():
        path = HERE / f"{name}.bundle"
        built = build(
            load_spec(str(HERE.parent / "models" / f"{model}.py:build")), PUBLISHER, unit="example", batch=batch
        )
        if "--check" not in sys.argv[1:]:
            path.write_bytes(built.bundle)
            print(f"{path.name}: {len(built.bundle)} bytes")
            continue
        found = Bundle.read(path, PUBLISHER.public_key)
        if path.read_bytes() == built.bundle:
            print(f"{path.name}: the same bytes")
        elif found.manifest.tools != built.manifest.tools:
            print(f"{path.name}: differs, and was made by {msgspec.json.encode(found.manifest.tools).decode()}")
        else:
            print(f"{path.name}: differs from what the source makes: run make bundle")
            failed = True
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
