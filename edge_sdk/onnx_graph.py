"""What is in an ONNX file, read strictly and without the onnx package, and whether a device may run it.

A bundle's graphs are checked here before onnxruntime sees them (docs/bundle.md section 5). The reader knows the few
fields of ModelProto that a plain tensor graph needs. Any other field, a known field with another wire type, or a
singular field that comes twice is refused: a second parser can then not understand something else than this one did.
Refused by name: operators outside `OPERATORS`, other domains than ONNX's own, functions, subgraphs (control flow),
external data, sparse and string tensors, sequences, metadata.
Source: onnx/onnx.proto of ONNX 1.17 to 1.23 (field numbers), the protobuf encoding guide (wire types).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from edge_sdk.errors import PeerError

MIN_OPSET, MAX_OPSET = 17, 24
MAX_FIELDS = 1 << 20
"""Protobuf fields read of one file: bounds the time of the check (about 1 us a field on a desktop core)."""

MAX_RANK = 16

OPERATORS = frozenset(
    """
    Abs Acos Add And ArgMax ArgMin Asin Atan AveragePool BatchNormalization Cast Ceil Celu Clip Concat Constant
    ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DepthToSpace Div Einsum Elu Equal Erf Exp Expand EyeLike
    Flatten Floor GRU Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual
    GroupNormalization HardSigmoid HardSwish Identity InstanceNormalization IsInf IsNaN LSTM LayerNormalization
    LeakyRelu Less LessOrEqual Log LogSoftmax LpNormalization LpPool MatMul Max MaxPool Mean Min Mish Mod Mul Neg Not
    OneHot Or PRelu Pad Pow RMSNormalization RNN Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp
    ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize Round ScatterElements
    ScatterND Selu Shape Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze
    Sub Sum Swish Tan Tanh ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Where Xor
    """.split()  # noqa: SIM905 (a hundred quoted names are harder to read)
)
"""Deterministic functions of tensors. Left out: control flow, sequences, optionals, strings, random numbers (noise is
added after the graph, from a cryptographic generator), Dropout, and operators whose output shape depends on the values
of their inputs by nature (NonZero, Unique, Compress, NonMaxSuppression)."""

DTYPES = {1: "float32", 2: "uint8", 6: "int32", 7: "int64", 9: "bool"}
"""TensorProto.DataType of what may cross the graph's border."""

_ITEM_BYTES = {1: 4, 2: 1, 3: 1, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8}
"""TensorProto.DataType -> bytes an element, of what may occur inside: DTYPES and int8, float16, float64."""

_ATTRIBUTE_TYPES = frozenset({1, 2, 3, 4, 6, 7, 8})  # float, int, string, tensor, floats, ints, strings


class TensorType(NamedTuple):
    """A graph input or output. dtype: as in DTYPES.  shape: with the batch axis, all dimensions fixed."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class GraphSummary:
    """What the check of a file found: its ONNX opset, the operators that occur, and its border."""

    opset: int
    operators: tuple[str, ...]
    inputs: tuple[TensorType, ...]
    outputs: tuple[TensorType, ...]


_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class _Field(NamedTuple):
    name: str
    wires: tuple[int, ...]
    repeated: bool = False


def _int(name: str) -> _Field:
    return _Field(name, (_VARINT,))


def _bytes(name: str, repeated: bool = False) -> _Field:
    return _Field(name, (_BYTES,), repeated)


_Schema = dict[int, _Field | str]
"""Field number -> the field, or why it is refused."""

_MODEL: _Schema = {
    1: _int("ir_version"), 2: _bytes("producer_name"), 3: _bytes("producer_version"), 4: "a domain",
    5: _int("model_version"), 6: "doc_string", 7: _bytes("graph"), 8: _bytes("opset_import", repeated=True),
    14: "metadata", 20: "training_info", 25: "local functions", 26: "device configurations",
}  # fmt: skip
_OPSET: _Schema = {1: _bytes("domain"), 2: _int("version")}
_GRAPH: _Schema = {
    1: _bytes("node", repeated=True), 2: _bytes("name"), 5: _bytes("initializer", repeated=True), 10: "doc_string",
    11: _bytes("input", repeated=True), 12: _bytes("output", repeated=True), 13: _bytes("value_info", repeated=True),
    14: "quantization annotations", 15: "sparse initializers", 16: "metadata",
}  # fmt: skip
_NODE: _Schema = {
    1: _bytes("input", repeated=True), 2: _bytes("output", repeated=True), 3: _bytes("name"), 4: _bytes("op_type"),
    5: _bytes("attribute", repeated=True), 6: "doc_string", 7: _bytes("domain"), 8: "a function overload",
    9: "metadata", 10: "device configurations",
}  # fmt: skip
_ATTRIBUTE: _Schema = {
    1: _bytes("name"), 2: _Field("f", (_FIXED32,)), 3: _int("i"), 4: _bytes("s"), 5: _bytes("t"), 6: "a subgraph",
    7: _Field("floats", (_FIXED32, _BYTES), True), 8: _Field("ints", (_VARINT, _BYTES), True),
    9: _bytes("strings", repeated=True), 10: "tensor lists", 11: "subgraphs", 13: "doc_string", 14: "a type",
    15: "types", 20: _int("type"), 21: "a reference to a function's attribute", 22: "a sparse tensor",
    23: "sparse tensors",
}  # fmt: skip
_TENSOR: _Schema = {
    1: _Field("dims", (_VARINT, _BYTES), True), 2: _int("data_type"), 3: "a segment", 4: "float_data (not raw_data)",
    5: "int32_data (not raw_data)", 6: "strings", 7: "int64_data (not raw_data)", 8: _bytes("name"),
    9: _bytes("raw_data"), 10: "double_data (not raw_data)", 11: "uint64_data (not raw_data)", 12: "doc_string",
    13: "external data", 14: _int("data_location"), 16: "metadata",
}  # fmt: skip
_VALUE_INFO: _Schema = {1: _bytes("name"), 2: _bytes("type"), 3: "doc_string", 4: "metadata"}
_TYPE: _Schema = {
    1: _bytes("tensor_type"), 4: "a sequence", 5: "a map", 6: "a denotation", 7: "an opaque type",
    8: "a sparse tensor", 9: "an optional",
}  # fmt: skip
_TENSOR_TYPE: _Schema = {1: _int("elem_type"), 2: _bytes("shape")}
_SHAPE: _Schema = {1: _bytes("dim", repeated=True)}
_DIM: _Schema = {1: _int("dim_value"), 2: _bytes("dim_param"), 3: "a denotation"}

_Values = dict[str, list[int | memoryview]]


def inspect(model: bytes | memoryview, entry: str) -> GraphSummary:
    """What `model`, the bytes of an ONNX file, holds, if every part of it is allowed.

    entry: the file's name, for errors.
    Raises PeerError that names the file, the place in it and what is refused there.
    """
    return _Reader(entry).model(memoryview(model))


class _Reader:
    def __init__(self, entry: str) -> None:
        self._entry = entry
        self._fields_left = MAX_FIELDS

    def _fault(self, where: str, what: str) -> PeerError:
        return PeerError(f"{self._entry}: {where}: {what}")

    def _varint(self, data: memoryview, at: int, where: str) -> tuple[int, int]:
        value = shift = 0
        while at < len(data) and shift < 70:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if value >> 64:
                    break
                return value, at
            shift += 7
        raise self._fault(where, "not a protobuf message (a broken varint)")

    def _fields(self, data: memoryview, schema: _Schema, where: str) -> _Values:
        """Field name -> its values, in order: integers as unsigned, everything else as the bytes."""
        found: _Values = {}
        at = 0
        while at < len(data):
            self._fields_left -= 1
            if self._fields_left < 0:
                raise self._fault(where, f"more than {MAX_FIELDS} fields")
            tag, at = self._varint(data, at, where)
            number, wire = tag >> 3, tag & 7
            value: int | memoryview
            if wire == _VARINT:
                value, at = self._varint(data, at, where)
            else:
                if wire == _BYTES:
                    length, at = self._varint(data, at, where)
                elif wire in (_FIXED32, _FIXED64):
                    length = 4 if wire == _FIXED32 else 8
                else:
                    raise self._fault(where, f"not a protobuf message (wire type {wire})")
                if length > len(data) - at:
                    raise self._fault(where, f"field {number} is longer than what is left")
                value = data[at : at + length]
                at += length
            field = schema.get(number, f"the unknown field {number}")
            if isinstance(field, str):
                raise self._fault(where, f"{field}: refused")
            if wire not in field.wires:
                raise self._fault(where, f"{field.name} has wire type {wire}")
            values = found.setdefault(field.name, [])
            if values and not field.repeated:
                raise self._fault(where, f"{field.name} comes twice")
            values.append(value)
        return found

    def _text(self, values: _Values, name: str, where: str) -> str:
        content = values.get(name, [memoryview(b"")])[0]
        try:
            return bytes(content).decode("utf-8")  # never an integer: the schema says bytes
        except UnicodeDecodeError as error:
            raise self._fault(where, f"{name} is not UTF-8") from error

    def _number(self, values: _Values, name: str) -> int:
        return values.get(name, [0])[0]  # type: ignore[return-value]  # the schema says varint

    def _messages(self, values: _Values, name: str) -> list[memoryview]:
        return values.get(name, [])  # type: ignore[return-value]  # the schema says bytes

    def _one(self, values: _Values, name: str, where: str) -> memoryview:
        if name not in values:
            raise self._fault(where, f"no {name}")
        return self._messages(values, name)[0]

    def model(self, data: memoryview) -> GraphSummary:
        values = self._fields(data, _MODEL, "model")
        imports = self._messages(values, "opset_import")
        if len(imports) != 1:
            raise self._fault("model", f"{len(imports)} operator sets imported, not ONNX's own alone")
        opset = self._fields(imports[0], _OPSET, "opset_import")
        self._check_domain(self._text(opset, "domain", "opset_import"), "opset_import")
        version = self._number(opset, "version")
        if not MIN_OPSET <= version <= MAX_OPSET:
            raise self._fault("opset_import", f"version {version} is not in [{MIN_OPSET}, {MAX_OPSET}]")
        graph = self._fields(self._one(values, "graph", "model"), _GRAPH, "graph")
        operators: set[str] = set()
        for number, node in enumerate(self._messages(graph, "node")):
            operators.add(self._node(node, f"node {number}"))
        initializers = [
            self._tensor(tensor, f"initializer {number}")
            for number, tensor in enumerate(self._messages(graph, "initializer"))
        ]
        for number, info in enumerate(self._messages(graph, "value_info")):
            self._value_info(info, f"value_info {number}")
        inputs = tuple(self._border(graph, "input"))
        outputs = tuple(self._border(graph, "output"))
        for name in {tensor.name for tensor in inputs} & set(initializers):
            raise self._fault("graph", f"{name!r} is both an input and an initializer")
        return GraphSummary(version, tuple(sorted(operators)), inputs, outputs)

    def _check_domain(self, domain: str, where: str) -> None:
        if domain not in ("", "ai.onnx"):
            raise self._fault(where, f"the operator domain {domain!r} is refused: ONNX's own only")

    def _node(self, data: memoryview, where: str) -> str:
        values = self._fields(data, _NODE, where)
        operator = self._text(values, "op_type", where)
        where = f"{where} ({operator!r})"
        self._check_domain(self._text(values, "domain", where), where)
        if operator not in OPERATORS:
            raise self._fault(where, "the operator is not on the allow-list")
        for attribute in self._messages(values, "attribute"):
            fields = self._fields(attribute, _ATTRIBUTE, where)
            kind, name = self._number(fields, "type"), self._text(fields, "name", where)
            if kind not in _ATTRIBUTE_TYPES:
                raise self._fault(where, f"attribute {name!r} of type {kind}: refused")
            # The two ways to a string tensor that no stored tensor or operator name shows.
            if operator == "Constant" and name.startswith("value_string"):
                raise self._fault(where, "strings: refused")
            if operator == "Cast" and name == "to" and self._number(fields, "i") not in _ITEM_BYTES:
                raise self._fault(where, f"data type {self._number(fields, 'i')}: refused")
            if "t" in fields:
                self._tensor(self._messages(fields, "t")[0], where)
        return operator

    def _tensor(self, data: memoryview, where: str) -> str:
        values = self._fields(data, _TENSOR, where)
        name = self._text(values, "name", where)
        if self._number(values, "data_location") != 0:
            raise self._fault(where, f"tensor {name!r}: external data: refused")
        kind = self._number(values, "data_type")
        if kind not in _ITEM_BYTES:
            raise self._fault(where, f"tensor {name!r}: data type {kind}: refused")
        elements = 1
        for rank, size in enumerate(self._integers(values.get("dims", []), where), start=1):
            if rank > MAX_RANK or size >= 1 << 63:
                raise self._fault(where, f"tensor {name!r}: a shape of more than {MAX_RANK} axes, or a negative one")
            elements *= size
        held = len(self._messages(values, "raw_data")[0]) if "raw_data" in values else 0
        if held != elements * _ITEM_BYTES[kind]:
            raise self._fault(where, f"tensor {name!r}: {held} bytes for {elements} elements of data type {kind}")
        return name

    def _integers(self, values: list[int | memoryview], where: str) -> Iterator[int]:
        """The entries of a repeated integer field, packed or not."""
        for value in values:
            if isinstance(value, int):
                yield value
                continue
            at = 0
            while at < len(value):
                entry, at = self._varint(value, at, where)
                yield entry

    def _value_info(self, data: memoryview, where: str) -> tuple[str, int, list[int | None] | None]:
        """Name, data type, and the shape with None for what is not fixed."""
        values = self._fields(data, _VALUE_INFO, where)
        name = self._text(values, "name", where)
        if "type" not in values:
            return name, 0, None
        where = f"{where} ({name!r})"
        kind = self._fields(self._messages(values, "type")[0], _TYPE, where)
        tensor = self._fields(self._one(kind, "tensor_type", where), _TENSOR_TYPE, where)
        element = self._number(tensor, "elem_type")
        if element not in _ITEM_BYTES:
            raise self._fault(where, f"data type {element}: refused")
        if "shape" not in tensor:
            return name, element, None
        shape: list[int | None] = []
        for dim in self._messages(self._fields(self._messages(tensor, "shape")[0], _SHAPE, where), "dim"):
            fields = self._fields(dim, _DIM, where)
            fixed = "dim_value" in fields and "dim_param" not in fields
            shape.append(self._number(fields, "dim_value") if fixed else None)
        return name, element, shape

    def _border(self, graph: _Values, side: str) -> Iterator[TensorType]:
        for number, info in enumerate(self._messages(graph, side)):
            name, element, shape = self._value_info(info, f"{side} {number}")
            where = f"{side} {number} ({name!r})"
            if element not in DTYPES:
                raise self._fault(where, f"data type {element}: refused")
            fixed = tuple(size for size in shape or [] if size is not None)
            if shape is None or len(fixed) != len(shape):
                raise self._fault(where, "the shape is not fixed")
            yield TensorType(name, DTYPES[element], fixed)
