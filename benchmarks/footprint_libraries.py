"""What a device's libraries take without this project: device_footprint.py --libraries starts it, in a fresh process.

Imports and uses once what a device with TLS and MQTT cannot do without, one after the other, runs the training graph of
a bundle, and prints what each step added to the resident memory, in MB of 10^6 bytes: in all, what of it is the
process's own (RssAnon), and what is code and data of libraries on disk (RssFile). Not a line of edge_sdk is imported,
so the sum is what no change of its code goes below.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

MB = 1_000_000
DTYPES = {
    "tensor(float)": "float32", "tensor(uint8)": "uint8", "tensor(int32)": "int32", "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}  # fmt: skip


def resident_mb() -> list[float]:
    """VmRSS, RssAnon, RssFile of this process."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return [int(fields[name].split()[0]) * 1024 / MB for name in ("VmRSS", "RssAnon", "RssFile")]


def use_ssl() -> None:
    import ssl

    ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def use_sqlite() -> None:
    import sqlite3

    with sqlite3.connect(":memory:") as database:
        database.execute("create table a (b)")
        database.execute("insert into a values (1)")


def use_cryptography() -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
    from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    signer = Ed25519PrivateKey.from_private_bytes(bytes(32))
    signer.public_key().verify(signer.sign(b""), b"")
    MLKEM768PrivateKey.from_seed_bytes(bytes(64)).public_key().encapsulate()
    ours, theirs = (X25519PrivateKey.from_private_bytes(bytes([i]) * 32) for i in (1, 2))
    key = HKDF(SHA256(), 32, None, b"").derive(ours.exchange(theirs.public_key()))
    ChaCha20Poly1305(key).encrypt(bytes(12), b"", b"")
    Cipher(ChaCha20(key, bytes(16)), None).encryptor().update(bytes(64))


def use_certificates() -> None:
    """What a certificate's renewal needs."""
    import cryptography.hazmat.primitives.serialization
    import cryptography.x509  # noqa: F401


def train(bundle: Path) -> Iterator[str]:
    """onnxruntime with the options of edge_sdk.training.onnx, step by step."""
    import zipfile

    import numpy as np
    import onnxruntime as ort

    yield "onnxruntime, imported"
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.enable_mem_pattern = False
    with zipfile.ZipFile(bundle) as archive:
        graph = archive.read("train.onnx")
    session = ort.InferenceSession(graph, options, ["CPUExecutionProvider"])
    yield "its first session"
    batch = {given.name: np.ones(given.shape, dtype=DTYPES[given.type]) for given in session.get_inputs()}
    for _ in range(3):
        session.run(None, batch)
    yield "steps of training"


def use(name: str) -> Callable[[], object]:
    return lambda: __import__(name)


def main(bundle: Path) -> None:
    rows = [("the interpreter", resident_mb())]
    libraries: list[tuple[str, Callable[[], object]]] = [
        ("numpy", use("numpy")), ("msgspec", use("msgspec")), ("ssl and a context", use_ssl), ("sqlite3", use_sqlite),
        ("paho", use("paho.mqtt.client")), ("cryptography, all of its use", use_cryptography),
        ("certificates", use_certificates),
    ]  # fmt: skip
    for name, call in libraries:
        call()
        rows.append((name, resident_mb()))
    rows.extend((name, resident_mb()) for name in train(bundle))
    before = [0.0, 0.0, 0.0]
    for name, now in rows:
        say(name, *(after - was for after, was in zip(now, before, strict=True)))
        before = now
    say("sum", *before)


def say(name: str, total: float, own: float, file: float) -> None:
    sys.stderr.write(f"{name:30} {total:6.1f}  own {own:5.1f}  file {file:5.1f}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
