"""edge-export: make, check and unpack bundles."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import msgspec

from edge_sdk.bundle import Bundle
from edge_sdk.crypto.identity import Identity
from edge_sdk.errors import ParameterError, SordinoError

if TYPE_CHECKING:
    from rich.console import Console

    from export.build import Built
    from export.check import Kink


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit 0: done, 1: failed (the reason is on stderr), 2: usage."""
    parser = argparse.ArgumentParser(
        prog="edge-export", description="A PyTorch model becomes a bundle to train on devices."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    key = commands.add_parser("key", help="make a publisher's signing key; prints its public half, which devices pin")
    key.add_argument("--out", type=Path, required=True, metavar="FILE", help="where the secret goes, with mode 0600")

    build = commands.add_parser("build", help="a signed bundle from MODULE:FUNCTION, which returns a TrainingSpec")
    build.add_argument("source", metavar="MODULE:FUNCTION", help="for example examples/models/mlp.py:build")
    build.add_argument("--out", type=Path, required=True, metavar="X.bundle")
    build.add_argument("--key", type=Path, required=True, metavar="FILE", help="from `edge-export key`")
    build.add_argument("--unit", choices=("device", "example"), default="example", help="privacy unit (example)")
    build.add_argument("--batch", type=int, default=32, help="examples in one run of the graph (32)")
    build.add_argument("--proximal", action="store_true", help="with FedProx's term (unit device)")
    build.add_argument("--backends", default="onnx", metavar="LIST", help="onnx or onnx,executorch (onnx)")

    check = commands.add_parser("check", help="the same batches in every run time; exit 1 if they differ")
    check.add_argument("bundle", type=Path, metavar="X.bundle")
    check.add_argument("source", nargs="?", metavar="MODULE:FUNCTION", help="with it, PyTorch is the reference")
    check.add_argument("--publisher", metavar="HEX", help="public key that must have signed (default: any)")
    check.add_argument("--tolerance", type=float, default=None, help="relative to each tensor's norm (1e-5)")

    model = commands.add_parser(
        "model",
        help="a trained model: plain inference ONNX, or a state dict",
        description="A trained model: plain inference ONNX, or a state dict. The ONNX takes as many rows as the "
        "bundle's batch, or any number if MODULE:FUNCTION is given, which the bundle was built from.",
    )
    model.add_argument("bundle", type=Path, metavar="X.bundle")
    model.add_argument("parameters", type=Path, metavar="PARAMS", help="shared parameters: .npy, .safetensors or .f32")
    model.add_argument("source", nargs="?", metavar="MODULE:FUNCTION", help="with it, an ONNX takes any number of rows")
    model.add_argument("--out", type=Path, required=True, metavar="FILE", help=".onnx, .safetensors or .pt")
    model.add_argument("--publisher", metavar="HEX", help="public key that must have signed (default: any)")

    for command in (key, build, check, model):
        command.add_argument("--json", action="store_true", help="one object a line on stdout")
    options = parser.parse_args(arguments)
    try:
        run = {"key": _key, "build": _build, "check": _check, "model": _model}[options.command]
        return run(options)
    except SordinoError as error:
        print(f"edge-export: {error}", file=sys.stderr)
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "onnx", "onnxscript", "executorch", "safetensors", "rich"):
            raise
        print(f"edge-export: {error.name} is not installed: pip install 'sordino[export]'", file=sys.stderr)
    except OSError as error:
        print(f"edge-export: {error.strerror}: {error.filename}", file=sys.stderr)
    return 1


def _key(options: argparse.Namespace) -> int:
    seed = os.urandom(32)
    descriptor = os.open(options.out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(seed.hex() + "\n")
    _print(options, {"publisher": Identity(seed).public_key.hex()}, Identity(seed).public_key.hex())
    return 0


def _publisher(path: Path) -> Identity:
    try:
        seed = bytes.fromhex(path.read_text().strip())
        return Identity(seed)
    except (ValueError, UnicodeDecodeError) as error:
        raise ParameterError(f"{path} does not hold a publisher's key: make one with `edge-export key`") from error


def _build(options: argparse.Namespace) -> int:
    from rich.console import Console

    from export.build import BACK_ENDS, build, load_spec, stages
    from export.timing import RUNTIMES, entry_times

    console = Console(stderr=True)
    back_ends = tuple(name.strip() for name in options.backends.split(",") if name.strip())
    unknown = [name for name in back_ends if name not in BACK_ENDS]
    if unknown:
        raise ParameterError(f"there is no back end {unknown[0]!r}: {', '.join(BACK_ENDS)}")
    _check_out(options.out)
    publisher = _publisher(options.key)
    start = time.perf_counter()
    graphs = [stage for stage in stages(back_ends) if stage not in _STAGES]
    with _prints_aside(), _Progress(console, 1 + len(stages(back_ends)) + len(graphs)) as begin:
        begin("loading the model")
        spec = load_spec(options.source)
        built = build(
            spec,
            publisher,
            unit=options.unit,
            batch=options.batch,
            proximal=options.proximal,
            back_ends=back_ends,
            progress=lambda stage: begin(_STAGES.get(stage, f"making {stage}")),
        )
        bundle = Bundle.read(built.bundle, publisher.public_key)
        ms = entry_times(bundle, lambda entry: begin(f"timing {entry}"))
    _write(options.out, built.bundle)
    slow = [row for row in built.step.report if row.path == "fallback"]
    _show(console, f"{spec.name}: unit {options.unit}, batch {options.batch}", built, ms)
    result = {
        "bundle": str(options.out),
        "inputs": [msgspec.to_builtins(tensor) for tensor in built.manifest.inputs],
        "label": msgspec.to_builtins(built.manifest.label),
        "output": msgspec.to_builtins(built.manifest.output),
        "hash": bundle.hash.hex(),
        "publisher": publisher.public_key.hex(),
        "dimension": bundle.dimension,
        "bytes": len(built.bundle),
        "entries": built.sizes,
        "gradients": {row.parameter: {"path": row.path, "reason": row.reason} for row in built.step.report},
        "fallback": [row.parameter for row in slow],
        "warnings": built.warnings,
        "step_ms": {RUNTIMES[Path(entry).suffix]: ms[entry] for entry in ms if entry.startswith("train")},
        "predict_ms": {RUNTIMES[Path(entry).suffix]: ms[entry] for entry in ms if entry.startswith("predict")},
        "build_s": round(time.perf_counter() - start, 1),
    }
    _print(
        options,
        result,
        f"{options.out}: {len(built.bundle):,} bytes, {bundle.dimension:,} shared parameters\n"
        f"bundle {bundle.hash.hex()}",
    )
    return 0


_STAGES = {"capture": "capturing the training step", "sign": "signing"}


class _Progress:
    """A bar on a terminal that is gone at the end; in a file or a pipe a line for each stage."""

    def __init__(self, console: Console, total: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._console = console
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self._bar = Progress(
            *columns, TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal
        )
        self._task = self._bar.add_task("", total=total)
        self._begun = 0

    def __enter__(self) -> Callable[[str], None]:
        self._bar.start()
        return self._begin

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def _begin(self, stage: str) -> None:
        self._bar.update(self._task, description=stage, completed=self._begun)
        self._begun += 1
        if not self._console.is_terminal:
            print(f"edge-export: {stage}", file=sys.stderr, flush=True)


def _show(console: Console, title: str, built: Built, ms: dict[str, float]) -> None:
    """What was built: how each parameter's gradients are had; then the file's entries and what each graph takes."""
    from rich.markup import escape
    from rich.table import Table

    from export.timing import RUNTIMES

    table = Table(
        title=escape(title),
        caption="\n".join(f"[bold yellow]{escape(warning)}[/]" for warning in built.warnings) or None,
    )
    for heading in ("parameter", "shape", "role", "gradients"):
        table.add_column(heading, overflow="fold")
    reports = {row.parameter: row for row in built.step.report}
    for parameter in built.step.parameters:
        row = reports.get(parameter.name)
        how = ""
        if row is not None:
            how = f"{'fast' if row.path == 'fast' else '[bold yellow]FALLBACK[/]'}: {escape(row.reason)}"
        shape = "x".join(map(str, parameter.value.shape)) or "scalar"
        table.add_row(escape(parameter.name), shape, parameter.role, how)
    console.print(table)
    slow = [row for row in built.step.report if row.path == "fallback"]
    for row in slow:
        console.print(
            f"[bold yellow]{escape(row.parameter)}[/] has no fast rule ({escape(row.reason)}): its gradients are "
            "exact, but cost one backward pass for each example."
        )
    arrays = Table(title="one example", caption="arrays of examples have one axis more, the first")
    for heading in ("array", "shape", "type", "values"):
        arrays.add_column(heading, overflow="fold")
    for tensor in (*built.manifest.inputs, built.manifest.label):
        values = "" if tensor.below is None else f"0 to {tensor.below - 1}"
        arrays.add_row(tensor.name, "x".join(map(str, tensor.shape)) or "scalar", tensor.dtype, values)
    console.print(arrays)
    entries = Table(
        title="the bundle",
        caption=f"ms: one run on a batch of {built.manifest.batch}, one thread of this machine; train: a training step",
        show_footer=True,
    )
    entries.add_column("entry", "the whole file")
    entries.add_column("bytes", f"{len(built.bundle):,}", justify="right")
    entries.add_column("run time")
    entries.add_column("ms", justify="right")
    for name, size in built.sizes.items():
        timed = (RUNTIMES[Path(name).suffix], f"{ms[name]:.3f}") if name in ms else ("", "")
        entries.add_row(name, f"{size:,}", *timed)
    console.print(entries)


def _read(path: Path, publisher: str | None) -> Bundle:
    if publisher is None:
        return Bundle.read(path, signer_of(path))
    try:
        key = bytes.fromhex(publisher)
    except ValueError as error:
        raise ParameterError("--publisher is 64 hexadecimal digits") from error
    return Bundle.read(path, key)


def signer_of(path: Path) -> bytes:
    """The key that a bundle says it was signed with: for its maker's own tools. A device pins the key instead."""
    import zipfile
    import zlib

    try:
        with zipfile.ZipFile(path) as archive, archive.open("manifest.sig") as file:
            return file.read(32)  # and not what its header says that it holds
    except (zipfile.BadZipFile, zlib.error, KeyError, NotImplementedError, RuntimeError, EOFError) as error:
        raise ParameterError(f"{path} is not a bundle") from error


def _check(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from export.build import load_spec
    from export.check import TOLERANCE, check

    bundle = _read(options.bundle, options.publisher)
    tolerance = TOLERANCE if options.tolerance is None else options.tolerance
    with _prints_aside():
        found = check(bundle, load_spec(options.source) if options.source else None, tolerance=tolerance)
    failed = [d for d in found.differences if not d.relative <= tolerance]
    if options.json:
        for difference in found.differences:
            print(json.dumps({"reference": found.reference, **vars(difference), "ok": difference not in failed}))
        for kink in found.kinks:
            print(json.dumps({"kink": vars(kink)}))
    else:
        runtimes = list(dict.fromkeys(d.runtime for d in found.differences))
        title = f"largest difference from {found.reference} in float64, relative to each tensor's norm"
        table = Table(title=title, caption="\n".join(map(_kink, found.kinks)) or None)
        table.add_column("tensor")
        for runtime in runtimes:
            table.add_column(runtime, justify="right")
        by_tensor: dict[str, dict[str, float]] = {}
        for difference in found.differences:
            by_tensor.setdefault(difference.tensor, {})[difference.runtime] = difference.relative
        for tensor, row in by_tensor.items():
            table.add_row(
                tensor,
                *(f"[bold red]{row[r]:.1e}[/]" if not row[r] <= tolerance else f"{row[r]:.1e}" for r in runtimes),
            )
        Console().print(table)
    number = len(found.differences)
    verdict = f"{len(failed)} differences are over" if failed else f"all {number} differences are within"
    print(f"edge-export: {verdict} {tolerance:g}", file=sys.stderr)
    return 1 if failed else 0


def _kink(kink: Kink) -> str:
    return (
        f"batch {kink.batch} lay on a kink and was drawn anew: {kink.tensor} in {kink.runtime} is {kink.relative:.1e} "
        f"away, and moves by {kink.moved:.1e} in float64 when inputs and parameters change by 1e-6"
    )


def _model(options: argparse.Namespace) -> int:
    from export.errors import UnsupportedModelError
    from export.model import any_rows_onnx, inference_onnx, read_shared, state_dict, trained_parameters

    suffix = options.out.suffix
    if suffix not in (".onnx", ".safetensors", ".pt"):
        raise ParameterError(f"--out {options.out}: .onnx, .safetensors or .pt")
    _check_out(options.out)
    bundle = _read(options.bundle, options.publisher)
    parameters = trained_parameters(bundle, read_shared(bundle, options.parameters))
    result: dict[str, object] = {}
    if suffix == ".onnx":
        content, rows = inference_onnx(bundle, parameters), bundle.manifest.batch
        result["rows"] = rows
        if options.source:
            from export.build import load_spec

            try:
                with _prints_aside():
                    content = any_rows_onnx(bundle, parameters, load_spec(options.source))
                result["rows"] = None
            except UnsupportedModelError as error:
                print(f"edge-export: {options.out} takes {rows} rows: {error}", file=sys.stderr)
    elif suffix == ".safetensors":
        from safetensors.numpy import save

        content = save(parameters)
    else:
        import torch

        saved = io.BytesIO()
        torch.save(state_dict(parameters), saved)
        content = saved.getvalue()
    _write(options.out, content)
    _print(options, {"out": str(options.out), "bytes": len(content), **result}, str(options.out))
    return 0


def _check_out(path: Path) -> None:
    """Before the work and not after it."""
    if not path.parent.is_dir():
        raise ParameterError(f"--out {path}: there is no folder {path.parent}: make it first, or name another")
    if path.is_dir():
        raise ParameterError(f"--out {path}: this is a folder: name a file in it")


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all: an interrupted build leaves the old file."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)


def _prints_aside() -> contextlib.redirect_stdout[TextIO]:
    """While the user's code runs: what it prints goes to stderr, for stdout holds the result alone."""
    return contextlib.redirect_stdout(sys.stderr)


def _print(options: argparse.Namespace, result: dict[str, object], text: str) -> None:
    print(json.dumps(result) if options.json else text)


if __name__ == "__main__":
    sys.exit(main())
