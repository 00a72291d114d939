"""A device's own code, copied into its directory: its examples, and notes of what it put into contributions.

A file `gate` beside it holds a port: then the examples wait there until they are let through, so that a test can act
while the device trains.
"""

import json
import socket
from pathlib import Path

import numpy as np

from edge_sdk.protocol.contributor import Training
from edge_sdk.protocol.messages import Header, message_hash

HERE = Path(__file__).parent
_contribute = Training.contribute


def _noting(training, integers, *others):
    sent = _contribute(training, integers, *others)
    header = message_hash(Header, sent.contribution.header.body).hex()
    with (HERE / "notes.jsonl").open("a") as file:
        file.write(json.dumps({"header": header, "integers": np.asarray(integers).tolist()}) + "\n")
    return sent


Training.contribute = _noting


def examples():
    gate = HERE / "gate"
    if gate.exists():
        with socket.create_connection(("127.0.0.1", int(gate.read_text()))) as held:
            held.recv(1)
    return dict(np.load(HERE / "examples.npz"))
