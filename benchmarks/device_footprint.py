"""What a device takes: resident memory idle and while it trains, time to import, disk for the packages.

    python benchmarks/device_footprint.py --json
    python benchmarks/device_footprint.py --json --bundle X.bundle
    python benchmarks/device_footprint.py --steps     (on stderr, what is resident after each step of the rounds, and
                                                       at the second one's training by library)
    python benchmarks/device_footprint.py --libraries (on stderr, what the libraries take without this project)

Trains a CNN of LeNet-5's size (examples/models/lenet.py, 61,706 parameters, batch 32), built by `export` if PyTorch is
installed, else the demo's checked-in digits bundle. A real `Device` runs in a process of its own, with everything
that a device with TLS and MQTT loads; what plays the coordinator there is one epoch, one ticket and files. Memory is
the kernel's: VmRSS and its peak VmHWM, in MB of 10^6 bytes. `own_after_mb` is the part of `rss_after_mb` that is the
process's own (RssAnon); the rest is code and data of libraries, on disk, which the kernel drops when it wants room.
Byte code is in place, as an installation has it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
MB = 1_000_000

BUILD = """
import sys
from pathlib import Path
from edge_sdk.crypto.identity import Identity
from export.build import build, load_spec
built = build(load_spec(sys.argv[1]), Identity(bytes(32)), unit="example", batch=32)
Path(sys.argv[2]).write_bytes(built.bundle)
"""


def lenet_bundle(folder: Path) -> Path | None:
    """A LeNet bundle made here, or None without PyTorch."""
    path = folder / "lenet.bundle"
    source = f"{HERE.parent / 'examples' / 'models' / 'lenet.py'}:build"
    ended = subprocess.run(  # noqa: S603
        [sys.executable, "-c", BUILD, source, str(path)], capture_output=True, text=True, check=False
    )
    if ended.returncode and "ModuleNotFoundError" not in ended.stderr:
        raise SystemExit(ended.stderr)
    return path if path.exists() else None


def measure_device(bundle: Path, folder: Path, *, steps: bool = False) -> dict[str, object]:
    """Memory of a process that is a device and nothing else."""
    environment = one_thread(folder)
    script = [sys.executable, "-c", "import sys, footprint_device; footprint_device.run(sys.argv[1:])"]
    for place in ("first", "second"):  # the first leaves the byte code of all that a round loads
        ended = subprocess.run(  # noqa: S603
            [*script, str(bundle.resolve()), str(folder / place), *["--steps"] * steps],
            capture_output=True, text=True, check=False, env=environment, cwd=HERE,
        )  # fmt: skip
        if ended.returncode:
            raise SystemExit(ended.stderr)
    if steps:
        sys.stderr.write(ended.stderr)
    found: dict[str, object] = json.loads(ended.stdout)
    return found


def say_libraries(bundle: Path, folder: Path) -> None:
    """On stderr: what footprint_libraries.py finds."""
    for _ in range(2):  # the first leaves the byte code
        ended = subprocess.run(  # noqa: S603
            [sys.executable, str(HERE / "footprint_libraries.py"), str(bundle.resolve())],
            capture_output=True, text=True, check=False, env=one_thread(folder),
        )  # fmt: skip
        if ended.returncode:
            raise SystemExit(ended.stderr)
    sys.stderr.write(ended.stderr)


def one_thread(folder: Path) -> dict[str, str]:
    """The environment of what is measured."""
    return {**os.environ, **byte_code(folder), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def byte_code(folder: Path) -> dict[str, str]:
    """The environment of a process that finds byte code in `folder` and leaves it there."""
    return {"PYTHONPYCACHEPREFIX": str(folder / "bytecode"), "PYTHONDONTWRITEBYTECODE": ""}


def import_s(folder: Path, runs: int = 5) -> float:
    """Median seconds of `import edge_sdk.device` in a fresh process, byte code in place."""
    code = "import time; t = time.perf_counter(); import edge_sdk.device; print(time.perf_counter() - t)"
    command = [sys.executable, "-c", code]
    environment = {**os.environ, **byte_code(folder)}
    times = [
        float(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)  # noqa: S603
        for _ in range(runs)
    ]
    return round(statistics.median(times), 3)


def installed_mb() -> float:
    """Disk of a device's installation: this project's `edge_sdk` and its base dependencies with theirs."""
    names, todo = set(), ["sordino"]
    while todo:
        name = todo.pop()
        if name in names:
            continue
        names.add(name)
        try:
            wanted = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform
        for requirement in wanted:
            condition = requirement.partition(";")[2]
            if "extra" not in condition and "win32" not in condition and "Windows" not in condition:
                todo.append(re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower())
    total = sum(path.stat().st_size for path in (HERE.parent / "edge_sdk").rglob("*") if path.is_file())
    for name in names - {"sordino"}:
        try:
            files = importlib.metadata.files(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for file in files:
            path = Path(str(file.locate()))
            total += path.stat().st_size if path.is_file() else 0
    return round(total / MB, 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one object on stdout")
    parser.add_argument("--bundle", type=Path, help="train this one (its publisher is not checked)")
    parser.add_argument("--steps", action="store_true", help="what is resident after each step of a round, on stderr")
    parser.add_argument("--libraries", action="store_true", help="what the libraries alone take, on stderr")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        bundle = options.bundle or lenet_bundle(folder) or HERE.parent / "examples" / "demo" / "digits.bundle"
        if options.libraries:
            say_libraries(bundle, folder)
        found = measure_device(bundle, folder, steps=options.steps)
        found |= {"import_s": import_s(folder), "installed_mb": installed_mb()}
    if options.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            print(f"{name:24} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
