"""The bundle against whoever may hand one over: the bytes as they are, and signed content that a device must refuse."""

import hashlib
import io
import json
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from functools import cache

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("onnx")
import onnx
from onnx import TensorProto, helper, numpy_helper
from training import tiny_models as tiny

from edge_sdk import bundle as bundles
from edge_sdk import onnx_graph
from edge_sdk.bundle import Bundle, Options, Tensor, parameter_table, write_archive, write_bundle
from edge_sdk.crypto.hashing import tagged_hash
from edge_sdk.crypto.identity import Identity
from edge_sdk.errors import ParameterError, PeerError

KEY = tiny.PUBLISHER.public_key


@cache
def good(unit: str = "example") -> bytes:
    return tiny.bundle_bytes(unit)


def unpack(archive: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        return {info.filename: opened.read(info) for info in opened.infolist()}


def sign(manifest: bytes, files: dict[str, bytes], publisher: Identity = tiny.PUBLISHER) -> bytes:
    """An archive whose manifest says whatever it says, honestly signed."""
    signature = publisher.public_key + publisher.sign("bundle", manifest)
    return write_archive({"manifest.json": manifest, "manifest.sig": signature, **files})


def resign(change_manifest=lambda manifest: None, change_files=lambda files: None) -> bytes:
    """The good bundle with changes, its hashes and its signature made to fit: what a hostile publisher can send."""
    files = unpack(good())
    manifest = json.loads(files.pop("manifest.json"))
    del files["manifest.sig"]
    change_files(files)
    manifest["entries"] = [
        {"name": name, "sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
        for name, content in files.items()
    ]
    change_manifest(manifest)
    return sign(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode(), files)


def refused(data: bytes, match: str, key: bytes = KEY) -> None:
    with pytest.raises(PeerError, match=match):
        Bundle.read(data, key)


def with_entry(name: str, content: bytes) -> bytes:
    return resign(change_files=lambda files: files.update({name: content}))


# What a good bundle is.


@pytest.mark.parametrize("unit", ["example", "device"])
def test_what_was_written_is_what_is_read(unit, tmp_path):
    manifest = tiny.draft(unit)
    initial = tiny.initial_parameters(manifest)
    path = tmp_path / "model.bundle"
    path.write_bytes(good(unit))
    for source in (good(unit), path, str(path)):
        bundle = Bundle.read(source, KEY)
        assert bundle.file("train.onnx") == tiny.train_graph(manifest)
        assert bundle.file("predict.onnx") == tiny.predict_graph(manifest)
        assert {name: array.tolist() for name, array in bundle.parameters().items()} == {
            name: array.tolist() for name, array in initial.items()
        }
        assert bundle.manifest == msgspec.structs.replace(
            manifest, opset=18, operators=bundle.manifest.operators, entries=bundle.manifest.entries
        )
        assert "train.pte" not in bundle
        with pytest.raises(ParameterError, match=r"no train\.pte"):
            bundle.file("train.pte")


def test_the_same_model_gives_the_same_bytes():
    assert tiny.bundle_bytes() == good()


def test_the_hash_is_of_the_manifest_that_zip_tools_see():
    files = unpack(good())
    bundle = Bundle.read(good(), KEY)
    assert bundle.hash == tagged_hash("bundle", files["manifest.json"])
    assert list(files) == ["manifest.json", "manifest.sig", "train.onnx", "predict.onnx", "parameters.safetensors"]
    manifest = json.loads(files["manifest.json"])
    for entry in manifest["entries"]:
        assert hashlib.sha256(files[entry["name"]]).hexdigest() == entry["sha256"]
    with zipfile.ZipFile(io.BytesIO(good())) as opened:
        assert opened.testzip() is None


def test_optional_executorch_programs_are_carried():
    manifest = tiny.draft()
    files = {**tiny.graphs(manifest), "train.pte": b"program one", "predict.pte": b"program two"}
    data = write_bundle(manifest, files, tiny.initial_parameters(manifest), tiny.PUBLISHER)
    bundle = Bundle.read(data, KEY)
    assert bundle.file("train.pte") == b"program one"
    assert bundle.file("predict.pte") == b"program two"


def test_the_parameters_are_a_safetensors_file():
    safetensors = pytest.importorskip("safetensors.numpy")
    found = safetensors.load(unpack(good())["parameters.safetensors"])
    expected = tiny.initial_parameters(tiny.draft())
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_flatten_and_unflatten_are_inverse_and_keep_the_manifests_order():
    bundle = Bundle.read(good(), KEY)
    initial = bundle.parameters()
    flat = bundle.flatten(initial)
    assert flat.dtype == np.float32
    assert np.array_equal(flat, np.concatenate([initial["w"].ravel(), initial["b"]]))
    assert bundle.dimension == flat.size == 18
    table = {p.name: p.offset for p in bundle.manifest.parameters}
    assert table == {"scale": None, "w": 0, "head": None, "b": 15, "shift": None}
    parts = bundle.unflatten(flat)
    assert parts.keys() == {"w", "b"}
    assert all(np.array_equal(parts[name], initial[name]) for name in parts)


@pytest.mark.parametrize("vector", [np.zeros(17, np.float32), np.zeros((18, 1), np.float32), np.zeros(18)])
def test_unflatten_refuses_another_shape_or_dtype(vector):
    with pytest.raises(ParameterError, match=r"float32 \(18,\)"):
        Bundle.read(good(), KEY).unflatten(vector)


def test_flatten_names_the_parameter_that_is_wrong():
    bundle = Bundle.read(good(), KEY)
    for wrong, match in [({"w": np.zeros((5, 3))}, "'w' is float32"), ({}, "'w' is missing")]:
        with pytest.raises(ParameterError, match=match):
            bundle.flatten(wrong)


def test_initial_parameters_cannot_be_written_to():
    with pytest.raises(ValueError, match="read-only"):
        Bundle.read(good(), KEY).parameters()["w"][0, 0] = 1


# The bytes: anything but what the publisher signed is refused.


@given(st.data())
def test_any_changed_byte_is_refused(data):
    original = good()
    at = data.draw(st.integers(0, len(original) - 1))
    changed = bytearray(original)
    changed[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(PeerError):
        Bundle.read(bytes(changed), KEY)


def test_every_bit_of_the_containers_own_bytes_is_checked():
    """Not by luck of the draw: all of the headers and the directory, where ZIP readers disagree with each other."""
    original = good()
    files = unpack(original)
    content = bytearray(len(original))
    for body in files.values():
        start = original.index(body)
        content[start : start + len(body)] = b"\x01" * len(body)
    own = [at for at in range(len(original)) if not content[at]]
    assert len(own) == sum(30 + 46 + 2 * len(name) for name in files) + 22
    for at in own:
        changed = bytearray(original)
        changed[at] ^= 1 << at % 8
        with pytest.raises(PeerError):
            Bundle.read(bytes(changed), KEY)


@given(st.integers(0, 1 << 20))
def test_any_truncation_is_refused(length):
    with pytest.raises(PeerError):
        Bundle.read(good()[: length % len(good())], KEY)


@given(st.binary(min_size=1, max_size=64), st.booleans())
def test_anything_in_front_or_behind_is_refused(extra, front):
    with pytest.raises(PeerError):
        Bundle.read(extra + good() if front else good() + extra, KEY)


@given(st.data())
def test_any_splice_of_two_bundles_is_refused(data):
    one, other = good("example"), good("device")
    cut = data.draw(st.integers(1, len(one) - 1))
    join = data.draw(st.integers(1, len(other) - 1))
    spliced = one[:cut] + other[join:]
    if spliced not in (one, other):
        with pytest.raises(PeerError):
            Bundle.read(spliced, KEY)


@given(st.binary(max_size=400))
def test_arbitrary_bytes_are_refused(data):
    with pytest.raises(PeerError):
        Bundle.read(data, KEY)


def test_another_publishers_bundle_is_refused_by_name():
    other = Identity(b"another".ljust(32))
    refused(good(), "not by the publisher", key=other.public_key)
    manifest = tiny.draft()
    theirs = write_bundle(manifest, tiny.graphs(manifest), tiny.initial_parameters(manifest), other)
    refused(theirs, "not by the publisher")


def test_reading_a_file_takes_memory_by_its_size_and_not_by_the_limit(tmp_path):
    path = tmp_path / "model.bundle"
    path.write_bytes(good())
    Bundle.read(path, KEY)
    tracemalloc.start()
    Bundle.read(path, KEY)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 1 << 20
    with pytest.raises(PeerError, match="more than 100 bytes"):
        Bundle.read(path, KEY, max_bytes=100)


def test_a_bundle_holds_its_bytes_and_no_second_copy_of_its_parameters():
    table = [(p.name, p.shape, p.role) for p in tiny.draft().parameters]
    large = parameter_table([*table, ("large", (1 << 18,), "buffer")])
    archive = tiny.bundle_bytes(parameters=large)
    Bundle.read(archive, KEY)
    tracemalloc.start()
    bundle = Bundle.read(archive, KEY)
    bundle.parameters()
    held_bytes, _ = tracemalloc.get_traced_memory()
    parameters = bundle.parameters()
    both_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held_bytes < 1 << 19
    assert both_bytes >= 1 << 20
    assert parameters["large"].flags.aligned


def test_one_of_several_pinned_keys_is_enough_and_its_faults_are_told():
    other = Identity(b"another".ljust(32)).public_key
    for keys in ((other, KEY), (KEY, other)):
        assert Bundle.read(good(), *keys).publisher == KEY
        with pytest.raises(PeerError, match=r"^bundle: what follows the last entry") as caught:
            Bundle.read(good() + b"x", *keys)
        assert "publisher" not in str(caught.value)  # the key that did not sign says nothing beside it
    third = Identity(b"third".ljust(32)).public_key
    with pytest.raises(PeerError, match=f"not by the publisher {other[:8].hex()} or {third[:8].hex()}$"):
        Bundle.read(good(), other, third)
    with pytest.raises(ParameterError, match="there is none"):
        Bundle.read(good())


def test_the_pinned_key_written_over_a_foreign_signature_is_refused():
    files = unpack(good())
    files["manifest.sig"] = KEY + Identity(b"another".ljust(32)).sign("bundle", files["manifest.json"])
    refused(write_archive(files), "signature is not valid")


def test_a_signature_made_for_another_purpose_is_refused():
    files = unpack(good())
    files["manifest.sig"] = KEY + tiny.PUBLISHER.sign("ticket", files["manifest.json"])
    refused(write_archive(files), "signature is not valid")


def test_nothing_is_parsed_before_the_signature(monkeypatch):
    def never(*arguments):
        raise AssertionError("parsed before it was verified")

    monkeypatch.setattr(bundles, "_decode_manifest", never)
    monkeypatch.setattr(bundles, "inspect", never)
    files = unpack(good())
    files["manifest.json"] = files["manifest.json"].replace(b'"batch":4', b'"batch":5')
    refused(write_archive(files), "signature is not valid")


def test_no_graph_is_parsed_before_every_hash(monkeypatch):
    def never(*arguments):
        raise AssertionError("parsed before it was verified")

    monkeypatch.setattr(bundles, "inspect", never)
    files = unpack(good())
    files["parameters.safetensors"] = files["parameters.safetensors"][:-1] + b"\x7f"
    refused(write_archive(files), r"parameters\.safetensors: not the content")


def test_swapped_graphs_are_refused():
    files = unpack(good())
    files["train.onnx"], files["predict.onnx"] = files["predict.onnx"], files["train.onnx"]
    refused(write_archive(files), r"train\.onnx: ")
    refused(resign(change_files=lambda f: f.update({"train.onnx": f["predict.onnx"]})), r"train\.onnx: ")


def test_a_bundle_over_the_limit_is_not_read(tmp_path):
    path = tmp_path / "large.bundle"
    path.write_bytes(good())
    for source in (good(), path):
        with pytest.raises(PeerError, match="more than 100 bytes"):
            Bundle.read(source, KEY, max_bytes=100)


def test_a_manifest_of_a_huge_declared_size_is_refused():
    data = bytearray(good())
    for at in (18, 22):
        data[at : at + 4] = struct.pack("<I", 0xFFFFFFFF)
    refused(bytes(data), r"manifest\.json: 4294967295 bytes is over the limit")


@pytest.mark.parametrize("length", [0, 31, 33])
def test_a_key_of_another_length_is_the_callers_fault(length):
    with pytest.raises(ParameterError, match="32 bytes"):
        Bundle.read(good(), bytes(length))


def zipped(edit) -> bytes:
    """The good bundle's entries, written by the standard library instead."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        edit(archive, unpack(good()))
    return buffer.getvalue()


def test_a_compressed_archive_is_refused():
    """The door to a zip bomb: nothing is ever inflated."""

    def deflate(archive, files):
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)

    refused(zipped(deflate), r"manifest\.json: not the archive entry")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("extra", ["train.onnx", "manifest.json", "../../etc/cron.d/x", "/abs", "note.txt"])
def test_an_entry_that_the_manifest_does_not_name_is_refused(extra):
    def append(archive, files):
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)
        archive.writestr(zipfile.ZipInfo(extra), b"more")

    refused(zipped(append), "bundle|manifest")
    files = unpack(good())
    if extra not in files:
        refused(write_archive({**files, extra: b"more"}), "not the archive's directory")


# Signed content: what a publisher, or who stole the key, may not make a device do.


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: m.update(schema=2), "schema"),
        (lambda m: m.update(unit="person"), "unit"),
        (lambda m: m.update(batch=0), "batch"),
        (lambda m: m.update(batch=4.5), "batch"),
        (lambda m: m.update(batch=65536, inputs=[{**m["inputs"][0], "shape": [1 << 20]}]), "more than .* elements"),
        (lambda m: m.update(extra=1), "unknown field"),
        (lambda m: m.pop("loss"), "missing required field"),
        (lambda m: m.pop("opset"), "canonical"),
        (lambda m: m.update(opset=19), "opset 18, not 19"),
        (lambda m: m.update(operators=[*m["operators"], "Loop"]), "operators listed are not those"),
        (lambda m: m.update(operators=m["operators"][1:]), "operators listed are not those"),
        (lambda m: m.update(options={"proximal": True}), "proximal is for unit device"),
        (lambda m: m["parameters"][3].update(offset=14), "offsets"),  # overlaps w
        (lambda m: m["parameters"][3].update(offset=16), "offsets"),  # leaves a hole
        (lambda m: m["parameters"][2].update(offset=0), "offsets"),  # a local one in the shared vector
        (lambda m: m["parameters"][1].update(offset=None), "offsets"),
        (lambda m: m["parameters"][1].update(shape=[5, 4]), "offsets"),
        (lambda m: m["parameters"][1].update(shape=[3, 5]), "input 1 is 'w'|header"),
        (lambda m: m["parameters"][1].update(shape=[1 << 27, 1 << 27]), "offset"),
        (lambda m: m["parameters"][0].update(shape=[1 << 27]), "more than .* elements"),
        (lambda m: m["parameters"][0].update(shape=[1] * 9), "length <= 8"),
        (lambda m: m["parameters"][0].update(shape=[0]), ">= 1"),
        (lambda m: m["parameters"][0].update(shape=[-1]), ">= 1"),
        (lambda m: m["parameters"][0].update(dtype="float64"), "dtype"),
        (lambda m: m["parameters"][0].update(role="trained"), "role"),
        (lambda m: m["parameters"][0].update(name="w"), "named twice"),
        (lambda m: m["parameters"][0].update(name="mask"), "named twice"),
        (lambda m: m["parameters"][0].update(name="../w"), "matching regex"),
        (lambda m: m["parameters"][0].update(name="w\n"), "matching regex"),
        (lambda m: m["parameters"].reverse(), "offsets"),
        (lambda m: m.update(parameters=[p for p in m["parameters"] if p["role"] != "shared"]), "no shared"),
        (lambda m: m["inputs"][0].update(below=3), "bound for integers"),
        (lambda m: m["inputs"][0].update(dtype="string"), "dtype"),
        (lambda m: m["label"].update(name="labels"), "named y"),
        (lambda m: m["output"].update(dtype="int64"), "output is float32"),
        (lambda m: m["entries"].reverse(), "order"),
        (lambda m: m["entries"].append(m["entries"][0]), "order"),
        (lambda m: m["entries"].pop(1), r"predict\.onnx missing"),
        (lambda m: m["entries"][0].update(name="../train.onnx"), "name"),
        (lambda m: m["entries"][0].update(size=(1 << 29) + 1), "size"),
        (lambda m: m["entries"][0].update(size=1 << 29), "ends before"),
        (lambda m: m["entries"][0].update(size=1), "not the"),
        (lambda m: m["entries"][0].update(sha256="0" * 64), "not the content"),
        (lambda m: m["entries"][0].update(sha256="A" * 64), "matching regex"),
    ],
)
def test_a_signed_manifest_that_lies_is_refused(change, match):
    refused(resign(change), match)


@pytest.mark.parametrize(
    "manifest", [b"", b"null", b"[]", b"{}", b"\xff\xfe", b"[" * 5000, b'{"schema":1' + b" " * 9, b'"' + b"a" * 99]
)
def test_a_signed_manifest_that_is_no_manifest_is_refused(manifest):
    refused(sign(manifest, {}), r"manifest\.json")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text + b"\n",
        lambda text: b" " + text,
        lambda text: text.replace(b'"batch":4', b'"batch": 4'),
        lambda text: text.replace(b'"batch":4', b'"batch":9,"batch":4'),
        lambda text: text.replace(b'"batch":4', b'"batch":4.0'),
        lambda text: text.replace(b'"cross', b'"\\u0063ross'),
        lambda text: json.dumps(dict(reversed(json.loads(text).items())), separators=(",", ":")).encode(),
    ],
)
def test_a_signed_manifest_in_another_encoding_is_refused(spoil):
    files = unpack(good())
    manifest = files.pop("manifest.json")
    del files["manifest.sig"]
    assert spoil(manifest) != manifest
    refused(sign(spoil(manifest), files), r"manifest\.json: (not in its one canonical|Expected `int`, got `float`)")


def spoil_parameters(change):
    def edit(files):
        content = bytearray(files["parameters.safetensors"])
        files["parameters.safetensors"] = bytes(change(content) or content)

    return resign(change_files=edit)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_parameters_that_are_not_finite_are_refused_by_name(value):
    def change(content):
        content[-4:] = np.float32(value).tobytes()

    refused(spoil_parameters(change), r"parameters\.safetensors: parameter 'shift' has a value that is not finite")


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c + b"\0\0\0\0",
        lambda c: c[:-4],
        lambda c: c[:8],
        lambda c: c[:3],
        lambda c: bytearray(struct.pack("<Q", 1 << 63)) + c[8:],
        lambda c: bytearray(struct.pack("<Q", 0)) + c[8:],
        lambda c: c.replace(b'"F32"', b'"F16"', 1),
        lambda c: c.replace(b"[0,4]", b"[4,8]", 1),
        lambda c: c.replace(b'"scale"', b'"sCale"', 1),
    ],
)
def test_parameters_other_than_the_tables_are_refused(change):
    refused(spoil_parameters(change), r"parameters\.safetensors: not the")


# Graphs. Each is the good one with one change, in a bundle that is otherwise consistent.


def changed_graph(edit) -> bytes:
    model = onnx.load_from_string(tiny.train_graph(tiny.draft()))
    edit(model)
    return with_entry("train.onnx", model.SerializeToString())


def subgraph():
    return helper.make_graph([], "inner", [], [])


def add_attribute(attribute):
    return lambda m: m.graph.node[0].attribute.append(attribute)


def external(model):
    tensor = model.graph.initializer[0]
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")


def external_by_flag(model):
    model.graph.initializer[0].data_location = TensorProto.EXTERNAL


def external_by_entry(model):
    model.graph.initializer[0].external_data.add(key="location", value="/etc/passwd")


def external_in_an_attribute(model):
    tensor = numpy_helper.from_array(np.zeros(1, np.float32), "c")
    tensor.external_data.add(key="location", value="/etc/passwd")
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=tensor))


def add_node(operator, domain="", **attributes):
    return lambda m: m.graph.node.append(helper.make_node(operator, ["x"], ["more"], domain=domain, **attributes))


def huge_initializer(model):
    model.graph.initializer.append(TensorProto(name="huge", data_type=TensorProto.FLOAT, dims=[1 << 40]))


def typed_data(model):
    model.graph.initializer.append(helper.make_tensor("typed", TensorProto.FLOAT, [1], [1.0]))


def string_tensor(model):
    model.graph.initializer.append(helper.make_tensor("text", TensorProto.STRING, [1], [b"x"]))


def sparse(model):
    model.graph.sparse_initializer.add().dims.append(1)


def local_function(model):
    model.functions.append(helper.make_function("f", "Relu", ["x"], ["y"], [], model.opset_import))


def training_info(model):
    model.training_info.add()


def rename_input(model):
    model.graph.input[1].name = "v"


def swap_inputs(model):
    first, second = model.graph.input[0].SerializeToString(), model.graph.input[4].SerializeToString()
    model.graph.input[0].ParseFromString(second)
    model.graph.input[4].ParseFromString(first)


def symbolic_batch(model):
    model.graph.input[5].type.tensor_type.shape.dim[0].dim_param = "batch"


def overridable(model):
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(15, np.float32).reshape(5, 3), "w"))


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (external, "external data"),
        (external_by_flag, "external data"),
        (external_by_entry, "external data"),
        (external_in_an_attribute, "external data"),
        (add_node("FusedMatMul", "com.microsoft"), "domain 'com.microsoft'"),
        (add_node("Relu", "evil"), "domain 'evil'"),
        (lambda m: m.opset_import.append(helper.make_opsetid("com.microsoft", 1)), "2 operator sets"),
        (lambda m: m.opset_import[0].ParseFromString(helper.make_opsetid("evil", 18).SerializeToString()), "'evil'"),
        (lambda m: setattr(m.opset_import[0], "version", 12), "version 12"),
        (lambda m: setattr(m.opset_import[0], "version", 99), "version 99"),
        (lambda m: m.ClearField("opset_import"), "0 operator sets"),
        *((add_node(name), "allow-list") for name in (
            "If", "Loop", "Scan", "SequenceMap", "RandomNormalLike", "Bernoulli", "Multinomial", "Dropout", "NonZero",
            "Unique", "StringConcat", "ImageDecoder", "QuantizeLinear", "relu", "", "Relu\0",
        )),
        (add_attribute(helper.make_attribute("body", subgraph())), "subgraph"),
        (add_attribute(helper.make_attribute("bodies", [subgraph(), subgraph()])), "subgraphs"),
        (add_attribute(onnx.AttributeProto(name="body", type=onnx.AttributeProto.GRAPH)), "of type 5"),
        (add_attribute(onnx.AttributeProto(name="untyped", i=1)), "of type 0"),
        (add_attribute(onnx.AttributeProto(name="r", ref_attr_name="x", type=2)), "reference to a function"),
        (lambda m: setattr(m.graph.node[0], "overload", "x"), "overload"),
        (local_function, "local functions"),
        (training_info, "training_info"),
        (sparse, "sparse"),
        (huge_initializer, "0 bytes for 1099511627776 elements"),
        (typed_data, "not raw_data"),
        (string_tensor, "strings"),
        (add_node("Constant", value_string="x"), "strings"),
        (add_node("Constant", value_strings=["x"]), "strings"),
        (add_node("Cast", to=TensorProto.STRING), "data type 8"),
        (lambda m: m.graph.initializer[0].dims.extend([1] * 20), "more than 16 axes"),
        (lambda m: m.graph.initializer[0].dims.append(-1), "negative"),
        (lambda m: m.metadata_props.add(key="ort_config", value="{}"), "metadata"),
        (lambda m: setattr(m, "doc_string", "/home/someone"), "doc_string"),
        (lambda m: m.graph.node[0].metadata_props.add(key="a", value="b"), "metadata"),
        (rename_input, "input 1 is 'v'"),
        (swap_inputs, "input 0 is 'shift'"),
        (symbolic_batch, "shape is not fixed"),
        (overridable, "both an input and an initializer"),
        (lambda m: m.graph.input.pop(), "inputs, not"),
        (lambda m: m.graph.output.pop(), "outputs, not"),
        (lambda m: m.graph.ClearField("input"), "0 inputs"),
        (lambda m: m.ClearField("graph"), "no graph"),
    ],
)  # fmt: skip
def test_a_signed_graph_that_a_device_must_not_run_is_refused(edit, match):
    refused(changed_graph(edit), rf"train\.onnx: .*{match}")


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def record(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


@pytest.mark.parametrize(
    ("tail", "match"),
    [
        # A second graph: protobuf would merge it into the first, unseen by a reader that takes either one.
        (record(7, record(1, record(4, b"Loop"))), "graph comes twice"),
        (varint(1 << 3) + varint(3), "ir_version comes twice"),
        (varint(7 << 3) + varint(1), "graph has wire type 0"),
        (varint(26 << 3 | 2) + varint(0), "device configurations"),
        (record(99, b""), "unknown field 99"),
        (record((1 << 32) + 7, b""), "unknown field"),
        (varint(7 << 3 | 3), "wire type 3"),
        (varint(7 << 3 | 2) + varint(1 << 62), "longer than what is left"),
        (varint(7 << 3 | 2) + b"\xff" * 11, "broken varint"),
        (b"\xff" * 9 + b"\x7f", "broken varint"),
        (b"\x80", "broken varint"),
    ],
)
def test_protobuf_that_two_readers_could_understand_differently_is_refused(tail, match):
    refused(with_entry("train.onnx", tiny.train_graph(tiny.draft()) + tail), rf"train\.onnx: model: .*{match}")


@given(st.data())
def test_any_change_of_a_graph_is_understood_or_refused_but_never_an_accident(data):
    graph = bytearray(tiny_graph())
    for _ in range(data.draw(st.integers(1, 3))):
        graph[data.draw(st.integers(0, len(graph) - 1))] = data.draw(st.integers(0, 255))
    del graph[data.draw(st.integers(0, len(graph))) :]
    try:
        summary = onnx_graph.inspect(bytes(graph), "train.onnx")
    except PeerError as error:
        assert str(error).startswith("train.onnx: ")  # noqa: PT017
        return
    assert set(summary.operators) <= onnx_graph.OPERATORS
    # What passes is what the reference parser sees: nothing is hidden from the check.
    model = onnx.load_from_string(bytes(graph))
    assert tuple(sorted({node.op_type for node in model.graph.node})) == summary.operators
    assert [value.name for value in model.graph.input] == [value.name for value in summary.inputs]
    assert not model.functions
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}


@cache
def tiny_graph() -> bytes:
    return tiny.train_graph(tiny.draft())


def test_the_number_of_fields_is_bounded(monkeypatch):
    monkeypatch.setattr(onnx_graph, "MAX_FIELDS", 100)
    refused(good(), "more than 100 fields")


def test_the_allow_list_names_operators_of_onnx_without_subgraphs_or_chance():
    for name in onnx_graph.OPERATORS:
        schema = onnx.defs.get_schema(name, onnx_graph.MAX_OPSET, "")
        kinds = {attribute.type.name for attribute in schema.attributes.values()}
        assert not kinds & {"GRAPH", "GRAPHS", "SPARSE_TENSOR_LIST"}, name
        assert "seed" not in schema.attributes, name


# Writing.


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({"train.onnx": b""}, "needs train.onnx and predict.onnx"),
        ({"extra.onnx": b""}, "no entry 'extra.onnx'"),
        ({"parameters.safetensors": b""}, "written from"),
    ],
)
def test_writing_a_wrong_set_of_entries_is_the_callers_fault(files, match):
    manifest = tiny.draft()
    with pytest.raises(ParameterError, match=match):
        write_bundle(manifest, files, tiny.initial_parameters(manifest), tiny.PUBLISHER)


def test_writing_what_could_not_be_read_is_the_callers_fault():
    manifest = tiny.draft()
    parameters = tiny.initial_parameters(manifest)
    for change, match in [
        ({"scale": np.full(1, np.nan, np.float32)}, "not finite"),
        ({"scale": np.zeros(2, np.float32)}, "'scale' is float32"),
    ]:
        with pytest.raises(ParameterError, match=match):
            write_bundle(manifest, tiny.graphs(manifest), {**parameters, **change}, tiny.PUBLISHER)
    wrong = {"train.onnx": tiny_graph(), "predict.onnx": tiny.predict_graph(tiny.draft(batch=5))}
    with pytest.raises(ParameterError, match=r"predict\.onnx: input 5"):
        write_bundle(manifest, wrong, parameters, tiny.PUBLISHER)


dims = st.lists(st.integers(1, 4), max_size=3)
tables = st.lists(st.tuples(dims, st.sampled_from(["shared", "local", "frozen", "buffer"])), min_size=1, max_size=6)


@given(tables, st.integers(1, 3))
def test_any_table_of_parameters_comes_back_whole(table, batch):
    """A graph may ignore its inputs: Identity and constants are enough to carry any border through the file."""
    names = [f"layer{index}.weight" for index in range(len(table) + 1)]
    shaped = [*table, ([2], "shared")]
    manifest = tiny.draft(
        "device", batch=batch,
        parameters=parameter_table((name, shape, role) for name, (shape, role) in zip(names, shaped, strict=True)),
        inputs=(Tensor("x", (), "uint8", 256),), label=Tensor("y", (2,), "float32", None), options=Options(True),
    )  # fmt: skip
    parameters = tiny.initial_parameters(manifest)
    parameters = {name: parameters[name] for name in names}
    outputs = bundles.train_outputs(manifest)
    nodes = [helper.make_node("Identity", [t.name.removeprefix("new.")], [t.name]) for t in outputs[:-5]]
    nodes += [helper.make_node("Identity", ["mu"], [t.name]) for t in outputs[-5:]]
    files = {
        "train.onnx": tiny.model(nodes, bundles.train_inputs(manifest), outputs),
        "predict.onnx": tiny.model([], bundles.predict_inputs(manifest), bundles.predict_outputs(manifest)),
    }
    bundle = Bundle.read(write_bundle(manifest, files, parameters, tiny.PUBLISHER), KEY)
    found = bundle.parameters()
    assert list(found) == names
    assert all(np.array_equal(found[name], parameters[name]) for name in names)
    assert np.array_equal(bundle.flatten(bundle.unflatten(bundle.flatten(found))), bundle.flatten(found))
    assert bundle.dimension == sum(p.size for p in manifest.parameters if p.role == "shared")


def test_reading_and_training_load_neither_torch_nor_onnx():
    program = (
        "import sys, edge_sdk.bundle, edge_sdk.training.onnx, edge_sdk.training.sampling\n"
        "print([m for m in ('torch', 'onnx', 'onnxscript', 'executorch', 'safetensors') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
