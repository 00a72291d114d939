"""The bundle: a model that a device can train, in one signed file (docs/bundle.md is normative).

A bundle is a ZIP archive with exactly the bytes that `write_bundle` gives: stored entries in a fixed order, fixed
times, nothing in front, between or behind. `Bundle.read` computes these bytes from the manifest and compares, so that
no length, offset or name in the archive is ever believed. The order of its checks: the manifest's signature by the
pinned publisher, the manifest, the hash of every entry, and only then what is in the entries.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import SEEK_END
from math import prod
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from edge_sdk.crypto.hashing import tagged_hash
from edge_sdk.crypto.identity import KEY_BYTES, SIGNATURE_BYTES, Identity, check_signature
from edge_sdk.errors import ParameterError, PeerError
from edge_sdk.onnx_graph import GraphSummary, TensorType, inspect

F32 = NDArray[np.float32]

MAX_BUNDLE_BYTES = 512 << 20
MAX_MANIFEST_BYTES = 1 << 20
MAX_PARAMETERS = 4096
MAX_ELEMENTS = 1 << 27
"""Of all parameters together, and of any one batch: 512 MiB as float32."""

MAX_BATCH = 1 << 16
"""Examples that one run of a graph takes."""

LABEL = "bundle"
MANIFEST, SIGNATURE, PARAMETERS = "manifest.json", "manifest.sig", "parameters.safetensors"
TRAIN_ONNX, PREDICT_ONNX, TRAIN_PTE, PREDICT_PTE = "train.onnx", "predict.onnx", "train.pte", "predict.pte"
ENTRIES = (TRAIN_ONNX, PREDICT_ONNX, TRAIN_PTE, PREDICT_PTE, PARAMETERS)
"""What the manifest lists, in this order. The two .pte files may be left out."""

METRICS = ("loss", "correct", "count", "clipped", "invalid")

Role = Literal["shared", "local", "frozen", "buffer"]
Dtype = Literal["float32", "int64", "int32", "uint8", "bool"]
Name = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[a-z0-9][a-z0-9._-]*\Z")]
# As in PyTorch's qualified names: dots between modules, anything tame in a module's own name.
QualifiedName = Annotated[str, Meta(min_length=1, max_length=256, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*\Z")]
Text = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[ !#-\[\]-~]+\Z")]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Shape = Annotated[tuple[Annotated[int, Meta(ge=1, le=MAX_ELEMENTS)], ...], Meta(max_length=8)]


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of the manifest's parts: immutable, nothing optional, nothing unknown."""


class Parameter(_Part, frozen=True):
    """One parameter or buffer.

    role: "shared" (trained, aggregated), "local" (trained, stays on the device), "frozen", or "buffer" (never trained).
    offset: of its first element in the flat vector of the shared parameters, or None for the other roles.
    """

    name: QualifiedName
    shape: Shape
    dtype: Literal["float32"]
    role: Role
    offset: Annotated[int, Meta(ge=0, lt=MAX_ELEMENTS)] | None

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


class Tensor(_Part, frozen=True):
    """What one example is made of. shape: without the batch axis.

    below: integers must lie in [0, below), the number of classes or the size of a vocabulary; None for float32, bool,
    and integers without such a bound.
    """

    name: QualifiedName
    shape: Shape
    dtype: Dtype
    below: Annotated[int, Meta(ge=1, lt=1 << 31)] | None


class Options(_Part, frozen=True):
    """proximal: the training step has FedProx's term (Li et al. 2020, arXiv:1812.06127); unit "device" only."""

    proximal: bool


class Entry(_Part, frozen=True):
    """A file in the bundle. size: bytes.  sha256: of its content, in hexadecimal."""

    name: Literal["train.onnx", "predict.onnx", "train.pte", "predict.pte", "parameters.safetensors"]
    size: Annotated[int, Meta(ge=1, le=MAX_BUNDLE_BYTES)]
    sha256: Sha256


class Manifest(_Part, frozen=True):
    """What the publisher signs. Stored as JSON with sorted keys and no spaces (RFC 8785 for what occurs in it).

    batch: examples that one run of a graph takes.  label: named "y".  output: of `predict`, named "output".
    loss: its name, for people.  opset, operators: of both ONNX graphs together.  tools: versions that made it.
    """

    schema: Literal[1]
    name: Name
    unit: Literal["device", "example"]
    batch: Annotated[int, Meta(ge=1, le=MAX_BATCH)]
    options: Options
    parameters: Annotated[tuple[Parameter, ...], Meta(min_length=1, max_length=MAX_PARAMETERS)]
    inputs: Annotated[tuple[Tensor, ...], Meta(min_length=1, max_length=16)]
    label: Tensor
    output: Tensor
    loss: Name
    tools: Annotated[dict[Name, Text], Meta(max_length=32)]
    opset: Annotated[int, Meta(ge=1, le=1 << 10)] = 1
    operators: Annotated[tuple[str, ...], Meta(max_length=256)] = ()
    entries: Annotated[tuple[Entry, ...], Meta(max_length=len(ENTRIES))] = ()

    def of_role(self, *roles: Role) -> tuple[Parameter, ...]:
        """The parameters of these roles, in the manifest's order."""
        return tuple(parameter for parameter in self.parameters if parameter.role in roles)

    @property
    def dimension(self) -> int:
        """Length d of the flat vector of the shared parameters."""
        return sum(parameter.size for parameter in self.of_role("shared"))

    def flatten(self, parameters: Mapping[str, F32]) -> F32:
        """The shared ones of `parameters` as one new float32 vector (d,), in the manifest's order.

        parameters: name -> float32 array of the manifest's shape; all shared ones, others are ignored.
        Raises ParameterError that names a parameter that is missing or has another shape or dtype.
        """
        flat = np.empty(self.dimension, dtype=np.float32)
        for name, view in self.unflatten(flat).items():
            view[...] = matching(parameters, name, view.shape)
        return flat

    def unflatten(self, vector: F32) -> dict[str, F32]:
        """Name -> view into `vector` of that name's shape, for the shared parameters. vector: float32 (d,)."""
        if vector.dtype != np.float32 or vector.shape != (self.dimension,):
            raise ParameterError(f"the shared vector is float32 ({self.dimension},), not {vector.dtype} {vector.shape}")
        return split(vector, self.of_role("shared"))


def split(flat: F32, parameters: Iterable[Parameter]) -> dict[str, F32]:
    """Name -> view of its shape, one parameter after the other from the start of `flat`, float32 (>= their sizes,)."""
    views: dict[str, F32] = {}
    at = 0
    for parameter in parameters:
        views[parameter.name] = flat[at : at + parameter.size].reshape(parameter.shape)
        at += parameter.size
    return views


def matching(parameters: Mapping[str, F32], name: str, shape: tuple[int, ...]) -> F32:
    """parameters[name], if it is there and float32 of this shape; else ParameterError that names it."""
    if name not in parameters:
        raise ParameterError(f"parameter {name!r} is missing")
    array = parameters[name]
    if array.dtype != np.float32 or array.shape != shape:
        raise ParameterError(f"parameter {name!r} is float32 {shape}, not {array.dtype} {array.shape}")
    return array


def parameter_table(parameters: Iterable[tuple[str, Sequence[int], Role]]) -> tuple[Parameter, ...]:
    """The table for (name, shape, role) in this order, with the offsets of the shared ones filled in."""
    table, offset = [], 0
    for name, shape, role in parameters:
        entry = Parameter(name, tuple(shape), "float32", role, offset if role == "shared" else None)
        offset += entry.size if role == "shared" else 0
        table.append(entry)
    return tuple(table)


# The graphs' border, which every back end shares (docs/bundle.md section 4).


def batch_inputs(manifest: Manifest) -> tuple[TensorType, ...]:
    """The example inputs of both graphs, with the batch axis."""
    return tuple(TensorType(t.name, t.dtype, (manifest.batch, *t.shape)) for t in manifest.inputs)


def parameter_inputs(manifest: Manifest) -> tuple[TensorType, ...]:
    """The first inputs of both graphs: every parameter and buffer, in the manifest's order."""
    return tuple(TensorType(p.name, "float32", p.shape) for p in manifest.parameters)


def train_inputs(manifest: Manifest) -> tuple[TensorType, ...]:
    """The inputs of the training graph, in order."""
    label = TensorType(manifest.label.name, manifest.label.dtype, (manifest.batch, *manifest.label.shape))
    mask = TensorType("mask", "float32", (manifest.batch,))
    scalars = ["clip", "loss_bound"] if manifest.unit == "example" else ["lr"]
    anchors: tuple[Parameter, ...] = ()
    if manifest.options.proximal:
        scalars.append("mu")
        anchors = manifest.of_role("shared", "local")
    return (
        *parameter_inputs(manifest), *batch_inputs(manifest), label, mask,
        *(TensorType(name, "float32", ()) for name in scalars),
        *(TensorType(f"anchor.{p.name}", "float32", p.shape) for p in anchors),
    )  # fmt: skip


def train_outputs(manifest: Manifest) -> tuple[TensorType, ...]:
    """The outputs of the training graph, in order."""
    prefix = {"shared": "new.", "local": "new."}
    if manifest.unit == "example":
        prefix = {"shared": "grad.", "local": "local_grad."}
    trained = manifest.of_role("shared", "local")
    return (
        *(TensorType(prefix[p.role] + p.name, "float32", p.shape) for p in trained),
        *(TensorType(name, "float32", ()) for name in METRICS),
    )


def predict_inputs(manifest: Manifest) -> tuple[TensorType, ...]:
    """The inputs of the prediction graph, in order."""
    return (*parameter_inputs(manifest), *batch_inputs(manifest))


def predict_outputs(manifest: Manifest) -> tuple[TensorType, ...]:
    """The one output of the prediction graph."""
    return (TensorType("output", manifest.output.dtype, (manifest.batch, *manifest.output.shape)),)


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle that passed every check. Made by `Bundle.read` alone.

    hash: tagged_hash("bundle", manifest.json), the bundle's name in tickets.  publisher: the Ed25519 key that signed.
    """

    manifest: Manifest
    hash: bytes
    publisher: bytes
    _files: Mapping[str, memoryview] = field(repr=False)

    @staticmethod
    def read(source: bytes | Path | str, *publisher_keys: bytes, max_bytes: int = MAX_BUNDLE_BYTES) -> Bundle:
        """The bundle in `source`, if every part of it is as the holder of one of the keys signed it and may be run.

        source: the file's bytes or its path.  publisher_keys: the pinned Ed25519 keys, 32 bytes each, at least one.
        max_bytes: nothing larger is read, at most MAX_BUNDLE_BYTES.
        Raises PeerError that names the entry and its fault; ParameterError on a key of another length; OSError on a
        path that cannot be read.
        """
        if not publisher_keys:
            raise ParameterError("a bundle is read with the keys that may have signed it: there is none")
        for key in publisher_keys:
            if len(key) != KEY_BYTES:
                raise ParameterError(f"a publisher key has {KEY_BYTES} bytes, not {len(key)}")
        limit = min(max_bytes, MAX_BUNDLE_BYTES)
        if not isinstance(source, bytes):
            with Path(source).open("rb") as file:
                size = file.seek(0, SEEK_END)
                file.seek(0)
                source = file.read(min(size, limit) + 1)  # a buffer of this length is made at once
        if len(source) > limit:
            raise PeerError(f"bundle: more than {limit} bytes")
        archive = _Archive(source)
        manifest_bytes = archive.take(MANIFEST, archive.declared_size(MANIFEST, MAX_MANIFEST_BYTES))
        signature = bytes(archive.take(SIGNATURE, KEY_BYTES + SIGNATURE_BYTES))
        publisher_key = signature[:KEY_BYTES]
        if publisher_key not in publisher_keys:
            pinned = " or ".join(key[:8].hex() for key in publisher_keys)
            raise PeerError(f"bundle: signed by {publisher_key[:8].hex()}, not by the publisher {pinned}")
        check_signature(publisher_key, LABEL, bytes(manifest_bytes), signature[KEY_BYTES:])
        manifest = _decode_manifest(bytes(manifest_bytes))
        files: dict[str, memoryview] = {}
        for entry in manifest.entries:
            content = archive.take(entry.name, entry.size)
            if hashlib.sha256(content).hexdigest() != entry.sha256:
                raise PeerError(f"{entry.name}: not the content that the manifest names")
            files[entry.name] = content
        archive.finish()
        _check_graphs(manifest, files)
        _check_parameters(manifest, files[PARAMETERS])
        return Bundle(manifest, bundle_hash(bytes(manifest_bytes)), publisher_key, files)

    @property
    def dimension(self) -> int:
        """Length d of the flat vector of the shared parameters."""
        return self.manifest.dimension

    def __contains__(self, entry: str) -> bool:
        return entry in self._files

    def file(self, entry: str) -> bytes:
        """The content of `entry` ("train.onnx", ...), a new copy. Raises ParameterError if the bundle lacks it."""
        if entry not in self._files:
            raise ParameterError(f"bundle {self.manifest.name!r} has no {entry}")
        return bytes(self._files[entry])

    def parameters(self) -> dict[str, F32]:
        """Name -> initial value, float32, for every parameter and buffer: views of a new copy, read-only.

        Made at each call, so that a device which trains does not hold the initial values beside its own.
        """
        # A copy: float32 at an aligned address, and little endian turned to the machine's order.
        flat = _stored_parameters(self.manifest, self._files[PARAMETERS]).astype(np.float32)
        flat.flags.writeable = False
        return split(flat, self.manifest.parameters)

    def flatten(self, parameters: Mapping[str, F32]) -> F32:
        """`Manifest.flatten`."""
        return self.manifest.flatten(parameters)

    def unflatten(self, vector: F32) -> dict[str, F32]:
        """`Manifest.unflatten`."""
        return self.manifest.unflatten(vector)


def bundle_hash(manifest_bytes: bytes) -> bytes:
    """The bundle's name: 32 bytes, of manifest.json, which names everything else by its hash."""
    return tagged_hash(LABEL, manifest_bytes)


def write_bundle(
    draft: Manifest, graphs: Mapping[str, bytes], parameters: Mapping[str, F32], publisher: Identity
) -> bytes:
    """The bytes of a bundle: the same for the same arguments, everywhere.

    draft: its opset, operators and entries are filled in here.  graphs: entry name -> content; train.onnx and
    predict.onnx, and perhaps the .pte ones.  parameters: name -> initial value, for every parameter and buffer.
    Raises ParameterError if the result is not a bundle that `Bundle.read` accepts, with its reason.
    """
    files = dict(graphs)
    if PARAMETERS in files:
        raise ParameterError(f"{PARAMETERS} is written from `parameters`")
    files[PARAMETERS] = write_safetensors(draft.parameters, parameters)
    for name in files:
        if name not in ENTRIES:
            raise ParameterError(f"a bundle has no entry {name!r}")
    if TRAIN_ONNX not in files or PREDICT_ONNX not in files:
        raise ParameterError(f"a bundle needs {TRAIN_ONNX} and {PREDICT_ONNX}")
    try:
        summaries = [inspect(files[name], name) for name in (TRAIN_ONNX, PREDICT_ONNX)]
        manifest = msgspec.structs.replace(
            draft,
            opset=summaries[0].opset,
            operators=_operators(summaries),
            entries=tuple(
                Entry(name, len(files[name]), hashlib.sha256(files[name]).hexdigest())  # type: ignore[arg-type]
                for name in ENTRIES
                if name in files
            ),
        )
        manifest_bytes = _encoder.encode(manifest)
        signature = publisher.public_key + publisher.sign(LABEL, manifest_bytes)
        contents = {MANIFEST: manifest_bytes, SIGNATURE: signature}
        contents.update((entry.name, files[entry.name]) for entry in manifest.entries)
        bundle = write_archive(contents)
        Bundle.read(bundle, publisher.public_key)
    except PeerError as error:
        raise ParameterError(f"not a bundle: {error}") from error
    return bundle


def _operators(summaries: Sequence[GraphSummary]) -> tuple[str, ...]:
    return tuple(sorted({operator for summary in summaries for operator in summary.operators}))


_encoder = msgspec.json.Encoder(order="sorted")
_decoder = msgspec.json.Decoder(Manifest)


def _decode_manifest(data: bytes) -> Manifest:
    try:
        manifest = _decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise PeerError(f"{MANIFEST}: {error}") from error
    if _encoder.encode(manifest) != data:
        raise PeerError(f"{MANIFEST}: not in its one canonical encoding")
    _check_manifest(manifest)
    return manifest


def _check_manifest(manifest: Manifest) -> None:
    """What the fields' types cannot say."""
    if manifest.parameters != parameter_table((p.name, p.shape, p.role) for p in manifest.parameters):
        raise PeerError(f"{MANIFEST}: the offsets are not those of the shared parameters one after the other")
    if manifest.dimension == 0:
        raise PeerError(f"{MANIFEST}: no shared parameter")
    if sum(parameter.size for parameter in manifest.parameters) > MAX_ELEMENTS:
        raise PeerError(f"{MANIFEST}: the parameters have more than {MAX_ELEMENTS} elements")
    if manifest.label.name != "y" or manifest.output.name != "output":
        raise PeerError(f"{MANIFEST}: the label is named y and the output output")
    if manifest.output.dtype != "float32":
        raise PeerError(f"{MANIFEST}: the output is float32, not {manifest.output.dtype}")
    if manifest.options.proximal and manifest.unit != "device":
        raise PeerError(f"{MANIFEST}: proximal is for unit device")
    for tensor in (*manifest.inputs, manifest.label, manifest.output):
        if manifest.batch * prod(tensor.shape) > MAX_ELEMENTS:
            raise PeerError(f"{MANIFEST}: a batch of {tensor.name!r} has more than {MAX_ELEMENTS} elements")
        if tensor.below is not None and tensor.dtype in ("float32", "bool"):
            raise PeerError(f"{MANIFEST}: {tensor.name!r} is {tensor.dtype} and has a bound for integers")
    for border in (train_inputs(manifest), train_outputs(manifest)):
        names = [tensor.name for tensor in border]
        if len(set(names)) != len(names):
            raise PeerError(f"{MANIFEST}: {sorted(n for n in set(names) if names.count(n) > 1)} named twice")
    names = [entry.name for entry in manifest.entries]
    if names != [name for name in ENTRIES if name in names]:
        raise PeerError(f"{MANIFEST}: the entries are not in their order, or one is listed twice")
    missing = {TRAIN_ONNX, PREDICT_ONNX, PARAMETERS} - set(names)
    if missing:
        raise PeerError(f"{MANIFEST}: {', '.join(sorted(missing))} missing")


def _check_graphs(manifest: Manifest, files: Mapping[str, memoryview]) -> None:
    borders = {
        TRAIN_ONNX: (train_inputs(manifest), train_outputs(manifest)),
        PREDICT_ONNX: (predict_inputs(manifest), predict_outputs(manifest)),
    }
    summaries = []
    for entry, (inputs, outputs) in borders.items():
        summary = inspect(files[entry], entry)
        _check_border(entry, "input", summary.inputs, inputs)
        _check_border(entry, "output", summary.outputs, outputs)
        if summary.opset != manifest.opset:
            raise PeerError(f"{entry}: opset {summary.opset}, not {manifest.opset} as in the manifest")
        summaries.append(summary)
    if _operators(summaries) != manifest.operators:
        raise PeerError(f"{MANIFEST}: the operators listed are not those of the graphs")


def _check_border(entry: str, side: str, found: Sequence[TensorType], expected: Sequence[TensorType]) -> None:
    for number, (have, want) in enumerate(zip(found, expected, strict=False)):
        if have != want:
            raise PeerError(
                f"{entry}: {side} {number} is {have.name!r} {have.dtype} {have.shape}, "
                f"not {want.name!r} {want.dtype} {want.shape} as the manifest says"
            )
    if len(found) != len(expected):
        raise PeerError(f"{entry}: {len(found)} {side}s, not {len(expected)} as the manifest says")


# Parameters: safetensors in one fixed form, so that reading is comparing.


def _safetensors_header(table: Sequence[Parameter]) -> bytes:
    """8 bytes of length, then JSON, padded with spaces to a multiple of 8: a function of the table alone."""
    described, at = {}, 0
    for parameter in table:
        end = at + 4 * parameter.size
        described[parameter.name] = {"dtype": "F32", "shape": parameter.shape, "data_offsets": (at, end)}
        at = end
    text = msgspec.json.encode(described)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_safetensors(table: Sequence[Parameter], parameters: Mapping[str, F32]) -> bytes:
    """`parameters` as a safetensors file, in the table's order. Raises ParameterError that names a wrong parameter."""
    arrays = [matching(parameters, parameter.name, parameter.shape) for parameter in table]
    return _safetensors_header(table) + b"".join(array.astype("<f4").tobytes() for array in arrays)


def _check_parameters(manifest: Manifest, content: memoryview) -> None:
    """Return if `content` is the manifest's parameters and buffers, all finite, else raise PeerError."""
    header = _safetensors_header(manifest.parameters)
    expected = len(header) + 4 * sum(parameter.size for parameter in manifest.parameters)
    if len(content) != expected or content[: len(header)] != header:
        raise PeerError(f"{PARAMETERS}: not the {expected} bytes and the header that the manifest's table gives")
    for name, array in split(_stored_parameters(manifest, content), manifest.parameters).items():
        if not np.isfinite(array).all():
            raise PeerError(f"{PARAMETERS}: parameter {name!r} has a value that is not finite")


def _stored_parameters(manifest: Manifest, content: memoryview) -> F32:
    """Every parameter and buffer, one after the other, as the entry holds them: little endian, at any address."""
    return np.frombuffer(content[len(_safetensors_header(manifest.parameters)) :], dtype="<f4")


# The archive: ZIP (APPNOTE 6.3.10) in one fixed form.

_LOCAL = struct.Struct("<IHHHHHIIIHH")
_CENTRAL = struct.Struct("<IHHHHHHIIIHHHHHII")
_END = struct.Struct("<IHHHHIIH")
_VERSION, _STORED, _MIDNIGHT, _FIRST_OF_1980 = 10, 0, 0, 0x21
_SIZE_AT = _LOCAL.size - 8
"""Where a local header holds the entry's size."""


def _local_header(name: str, crc: int, size: int) -> bytes:
    fields = (0x04034B50, _VERSION, 0, _STORED, _MIDNIGHT, _FIRST_OF_1980, crc, size, size, len(name), 0)
    return _LOCAL.pack(*fields) + name.encode("ascii")


def _directory(entries: Sequence[tuple[str, int, int, int]]) -> bytes:
    """The central directory and the end record. entries: (name, crc, size, offset of the local header)."""
    records = bytearray()
    for name, crc, size, at in entries:
        times = (_MIDNIGHT, _FIRST_OF_1980)
        lengths = (len(name), 0, 0)
        records += _CENTRAL.pack(
            0x02014B50, _VERSION, _VERSION, 0, _STORED, *times, crc, size, size, *lengths, 0, 0, 0, at
        ) + name.encode("ascii")  # fmt: skip
    name, _, size, at = entries[-1]
    start = at + _LOCAL.size + len(name) + size
    return bytes(records) + _END.pack(0x06054B50, 0, 0, len(entries), len(entries), len(records), start, 0)


def write_archive(contents: Mapping[str, bytes]) -> bytes:
    """The ZIP archive of `contents`, in their order. Names: ASCII."""
    archive, entries = bytearray(), []
    for name, content in contents.items():
        crc = zlib.crc32(content)
        entries.append((name, crc, len(content), len(archive)))
        archive += _local_header(name, crc, len(content))
        archive += content
    return bytes(archive + _directory(entries))


class _Archive:
    """Reads an archive front to back and holds every byte of it to what `write_archive` would have written."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)
        self._at = 0
        self._entries: list[tuple[str, int, int, int]] = []

    def declared_size(self, name: str, limit: int) -> int:
        """The size that the header at hand gives its entry: the one length that is believed, and checked by `take`."""
        at = self._at + _SIZE_AT
        size = int.from_bytes(self._data[at : at + 4], "little")
        if size > limit:
            raise PeerError(f"{name}: {size} bytes is over the limit of {limit}")
        return size

    def take(self, name: str, size: int) -> memoryview:
        """The content of the next entry, which must be `name` with `size` bytes."""
        start = self._at + _LOCAL.size + len(name)
        content = self._data[start : start + size]
        if len(content) != size:
            raise PeerError(f"{name}: the bundle ends before it does")
        crc = zlib.crc32(content)
        if self._data[self._at : start] != _local_header(name, crc, size):
            raise PeerError(f"{name}: not the archive entry that a bundle has here")
        self._entries.append((name, crc, size, self._at))
        self._at = start + size
        return content

    def finish(self) -> None:
        """Raise PeerError unless exactly the archive's directory is left."""
        if self._data[self._at :] != _directory(self._entries):
            raise PeerError("bundle: what follows the last entry is not the archive's directory")
