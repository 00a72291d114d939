"""A whole installation as processes: a coordinator with its broker, devices and helpers, on loopback.

Processes are those of the field: `python -m coordinator serve`, `python -m edge_sdk run`, `python -m edge_sdk.helper
run`. Tests wait for what they say on stdout, or in a log. A device's examples come from `field_notes.py` in its
directory, as an integrator's own code would; it writes down what the device encoded, so that a test can say what the
opened sum has to be.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from coordinator.__main__ import main as coordinator_main
from coordinator.ca import CertificateAuthority
from coordinator.config import Config
from coordinator.rows import RoundRow
from coordinator.store import Store
from edge_sdk.bundle import Bundle
from edge_sdk.commands import device_main, helper_main
from edge_sdk.crypto.hashing import content_hash
from edge_sdk.enrolment import Membership
from edge_sdk.policy import mechanism_of
from edge_sdk.privacy.mechanism import decode
from edge_sdk.protocol import messages
from edge_sdk.protocol.authority import FleetEpoch, Roster
from edge_sdk.protocol.messages import Seal, Signed, Transcript
from edge_sdk.protocol.rounds import Round
from examples.demo.fleet import Line, Process, Said

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "examples" / "demo" / "digits.bundle"
PUBLISHER = "a9b2780b2d21611cac8c60cc51071dc35fe7ca4b03feb45904871ff11797255f"
DEADLINE_S = 60.0
DEVICES = 5
EXAMPLES = 70
RATE = 0.3

TASK = """
name = "{name}"
bundle = "{bundle}"
publisher = "{publisher}"
unit = "example"
rounds = {rounds}

[privacy]
clip = 0.7
delta = 1e-4
noise_multiplier = 3.0
example_rate = {rate}
metric_scale = 0.1
loss_bound = 1.0

[cohort]
expected = {devices}
spread = 0.0
honest = 2
n_max = {devices}
examples = {examples}

[schedule]
open_s = {open_s}
grace_s = 0.05
answer_s = 600
"""

AMQTT = """
import sys, threading
from pathlib import Path
from coordinator.broker import Listener
from coordinator.broker.amqtt import Amqtt
broker = Amqtt(Listener(Path(sys.argv[1]), "127.0.0.1", int(sys.argv[2])), [])
print("listening", flush=True)
threading.Event().wait()
"""


class Journal:
    """What all processes said, in the order in which it came."""

    def __init__(self) -> None:
        self.said: list[Said] = []
        self._more = threading.Condition()

    def put(self, said: Said) -> None:
        """For the threads that listen."""
        with self._more:
            self.said.append(said)
            self._more.notify_all()

    def wait(self, wanted: Callable[[Said], bool], since: int = 0, deadline_s: float = DEADLINE_S) -> int:
        """Place behind the first wanted line from place `since` on. Raises AssertionError after the deadline."""
        until = time.monotonic() + deadline_s
        with self._more:
            while True:
                for place in range(since, len(self.said)):
                    if wanted(self.said[place]):
                        return place + 1
                since = len(self.said)
                came = self._more.wait(max(0.0, until - time.monotonic()))
                assert came, f"waited in vain; the last lines: {self.said[-12:]}"

    def lines(self, who: str | None = None, event: str | None = None) -> list[Line]:
        """Of one process or all, of one kind or all."""
        with self._more:
            return [
                said.line
                for said in self.said
                if said.line is not None and who in (None, said.who) and event in (None, said.line["event"])
            ]


class Gate:
    """Holds a device inside its own examples: `entered` returns when it is there, `open` lets it go on."""

    def __init__(self, directory: Path) -> None:
        self._file = directory / "gate"
        self._server = socket.create_server(("127.0.0.1", 0))
        self._server.settimeout(DEADLINE_S)
        self._held: socket.socket | None = None
        self._file.write_text(str(self._server.getsockname()[1]))

    def entered(self) -> None:
        self._held, _ = self._server.accept()

    def open(self) -> None:
        """For this time and those that follow."""
        self._file.unlink(missing_ok=True)
        if self._held is not None:
            with contextlib.suppress(OSError):
                self._held.sendall(b"\0")
            self._held.close()
        self._server.close()


class Installation:
    """One coordinator's directory, the devices beside it, and all their processes."""

    def __init__(self, directory: Path, *init: str, ports: tuple[int, int] | None = None) -> None:
        self.directory, self.home = directory, directory / "coordinator"
        self.journal = Journal()
        self.processes: dict[str, Process] = {}
        self.gates: list[Gate] = []
        self._amqtt: subprocess.Popen[bytes] | None = None
        self.enrolment_port, self.broker_port = ports or free_ports(2)
        if "external" in init:
            init = (*init, "--broker-url", f"mqtts://127.0.0.1:{self.broker_port}")
        self.operator(
            "init", "--enrolment-port", str(self.enrolment_port), "--broker-port", str(self.broker_port),
            "--publisher", PUBLISHER, *init,
        )  # fmt: skip

    # What people do.

    def operator(self, *words: str) -> list[Line]:
        """What an `edge-coordinator` command says."""
        return command(coordinator_main, *words, "--dir", str(self.home))

    def join(self, name: str, *tasks: str, token: str | None = None) -> Path:
        """A device that has joined, with examples for these tasks and a policy for a fleet this small."""
        directory = self.directory / name
        directory.mkdir(mode=0o700)
        shutil.copy(Path(__file__).with_name("field_notes.py"), directory)
        dimensions = Bundle.read(BUNDLE, bytes.fromhex(PUBLISHER)).manifest.inputs[0]
        rng = np.random.default_rng(len(list(self.directory.iterdir())))
        np.savez(
            directory / "examples.npz",
            **{dimensions.name: rng.random((EXAMPLES, *dimensions.shape), dtype=np.float32)},
            y=rng.integers(0, 10, EXAMPLES),
        )
        token = token or self.operator("invite")[0]["token"]
        named = [word for task in tasks for word in ("--task", f"{task}=field_notes:examples")]
        command(device_main, "join", token, "--dir", str(directory), *named)
        policy = directory / "policy.toml"
        policy.write_text(policy.read_text().replace("min_honest = 10", "min_honest = 2"))
        return directory

    def join_helper(self, name: str) -> None:
        token = self.operator("invite", "--role", "helper")[0]["token"]
        command(helper_main, "join", token, "--dir", str(self.directory / name))

    def add_task(self, rounds: int, name: str = "digits", **changes: object) -> None:
        values = {
            "name": name, "bundle": BUNDLE, "publisher": PUBLISHER, "rounds": rounds, "devices": DEVICES,
            "rate": RATE, "examples": EXAMPLES, "open_s": 60, **changes,
        }  # fmt: skip
        path = self.directory / f"{name}.toml"
        path.write_text(TASK.format(**values))
        self.operator("task", "add", str(path))

    # Processes.

    def populate(self, *tasks: str, helpers: int = 0, devices: int = DEVICES) -> None:
        """The coordinator serves, devices and helpers have joined; helpers run, and devices where there are none."""
        if "coordinator" not in self.processes:
            self.serve()
        for number in range(helpers):
            self.join_helper(f"helper{number}")
            self.run_helper(f"helper{number}")
        for number in range(devices):
            self.join(f"device{number}", *(tasks or ("digits",)))
            if not helpers:
                self.run(f"device{number}")

    def start(self, name: str, *words: str) -> int:
        """Start it, or start it again. Returns the place in the journal from where on it speaks."""
        if name not in self.processes:
            self.processes[name] = Process(name, words, self.directory / f"{name}.log", self.journal)  # type: ignore[arg-type]
        place = len(self.journal.said)
        self.processes[name].start()
        return place

    def serve(self) -> None:
        """Start the coordinator; it serves when this returns."""
        place = self.start("coordinator", "coordinator", "serve", "--dir", str(self.home), "--json")
        self.wait("coordinator", "serving", since=place)

    def start_amqtt(self) -> None:
        """A broker that runs by itself, with the coordinator's certificates; it listens when this returns.

        One that runs already is killed first.
        """
        self.kill_amqtt()
        names = Config.read(self.home).certificate_names
        CertificateAuthority(self.home).ensure_service_certificates(names, int(time.time()))
        arguments = [sys.executable, "-c", AMQTT, str(self.home), str(self.broker_port)]
        with (self.directory / "amqtt.log").open("ab") as log:
            self._amqtt = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=log)
        assert self._amqtt.stdout is not None
        assert self._amqtt.stdout.readline() == b"listening\n", self.log("amqtt")

    def kill_amqtt(self) -> None:
        if self._amqtt is not None:
            with self._amqtt:
                self._amqtt.kill()
            self._amqtt = None

    def run(self, name: str) -> int:
        """Start a device's service. Returns its place in the journal."""
        return self.start(name, "edge_sdk", "run", "--dir", str(self.directory / name), "--json")

    def run_helper(self, name: str) -> int:
        return self.start(name, "edge_sdk.helper", "run", "--dir", str(self.directory / name), "--json")

    def once(self, name: str) -> int:
        """Start one wake-up of a device. Returns its place in the journal."""
        self.processes.pop(name, None)
        return self.start(name, "edge_sdk", "once", "--dir", str(self.directory / name), "--json")

    def pid(self, name: str) -> int:
        child = self.processes[name].child
        assert child is not None
        return child.pid

    def alive(self, name: str) -> bool:
        child = self.processes[name].child
        return child is not None and child.poll() is None

    def kill(self, name: str) -> None:
        """SIGKILL; it is gone when this returns."""
        self.processes[name].kill()

    def wait(self, who: str, event: str, *, since: int = 0, **fields: object) -> int:
        """Place behind the first such line. Raises AssertionError if the process ends first, or says nothing."""

        def wanted(said: Said) -> bool:
            if said.who != who:
                return False
            if said.line is None:  # it ended, perhaps to be started again
                assert self.alive(who), f"{who} ended: {self.log(who)[-2000:]}"
                return False
            return said.line["event"] == event and fields.items() <= said.line.items()

        try:
            return self.journal.wait(wanted, since)
        except AssertionError as error:
            raise AssertionError(f"no {event} {fields} of {who}: {error}\n{self.log('coordinator')[-3000:]}") from None

    def wait_end(self, name: str) -> int:
        """Exit code of a process that ends by itself."""
        child = self.processes[name].child
        assert child is not None
        return child.wait(DEADLINE_S)

    def log(self, name: str) -> str:
        path = self.directory / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def close(self) -> None:
        for gate in self.gates:
            gate.open()
        for name, process in sorted(self.processes.items(), key=lambda item: item[0] == "coordinator"):
            process.kill() if name != "coordinator" else process.stop()
        self.kill_amqtt()

    def gate(self, name: str) -> Gate:
        """The next time the device asks for its examples, it waits at this gate."""
        gate = Gate(self.directory / name)
        self.gates.append(gate)
        return gate

    # What is true afterwards.

    def key(self, name: str) -> bytes:
        return bytes.fromhex(Membership.read(self.directory / name).device)

    def delivered(self) -> dict[str, list[int]]:
        """Device -> rounds of which it was told that its receipt is there, in its own words."""
        found: dict[str, list[int]] = {}
        for said in self.journal.said:
            if said.line is not None and said.line["event"] == "delivered":
                found.setdefault(said.who, []).append(said.line["round"])
        return found

    def notes(self) -> dict[bytes, np.ndarray]:
        """Hash of a contribution's header -> the integers in it, of every contribution that any device made."""
        found = {}
        for path in self.directory.glob("*/notes.jsonl"):
            for line in path.read_text().splitlines():
                note = json.loads(line)
                found[bytes.fromhex(note["header"])] = np.array(note["integers"], np.int64)
        return found

    def check(self, task: str = "digits") -> dict[int, set[bytes]]:
        """Everything in the store is what it has to be. Returns for each round the keys of those who contributed.

        Of every round that was opened: the signed transcript's sum is that of exactly the contributions in the store,
        each counted once, and the model is its parent less that sum over the planned number of examples. Every receipt
        that a device told of is among the contributions.
        """
        store = Store(self.home)
        try:
            return self._check(store, task)
        finally:
            store.close()

    def _check(self, store: Store, task: str) -> dict[int, set[bytes]]:
        notes, config = self.notes(), Config.read(self.home)
        assert config.authority.key is None
        came: dict[int, set[bytes]] = {}
        with store.reading() as t:
            rows, models = t.rounds(task), {model.tid: model for model in t.models(task)}
            epochs = {row.epoch: t.epoch(row.epoch) for row in rows}
            contributions = {row.tid: t.contributions(row.tid) for row in rows}
        for row in rows:
            round_ = self._round(row, epochs[row.epoch].signed)
            assert Roster(epochs[row.epoch].roster).root == round_.epoch.frozen.roster_root
            taken = {c.sender: c.digest for c in contributions[row.tid]}
            assert len(taken) == len(contributions[row.tid]), "a sender was taken twice"
            came[row.number] = {epochs[row.epoch].roster[sender] for sender in taken}
            if row.phase != "DONE":
                continue
            assert row.seal is not None
            assert row.transcript is not None
            groups = messages.decode(Seal, messages.decode(Signed, row.seal).body).groups
            senders = [sender for group in groups for sender, _ in group]
            assert sorted(senders) == sorted(taken), "the sealed set is not what was taken"
            mechanism = mechanism_of(round_)
            total = sum(notes[taken[sender]] for sender in senders) % (1 << mechanism.modulus_bits)
            total = np.asarray(total, np.uint32)
            (result,) = messages.decode(Transcript, messages.decode(Signed, row.transcript).body).groups
            assert result.sum == content_hash(total.astype("<u4").tobytes()), "the opened sum is another one"
            model = models[row.tid]
            assert model.parent is not None
            parent = np.frombuffer(store.blob(model.parent), "<f4")
            planned = model.cohort * EXAMPLES * RATE
            expected = (parent - decode(mechanism, total, row.tid).vector / planned).astype(np.float32)
            np.testing.assert_array_equal(np.frombuffer(store.blob(model.parameters), "<f4"), expected)
        for name, rounds in self.delivered().items():
            assert len(rounds) == len(set(rounds)), f"{name} was told twice: {rounds}"
            for number in rounds:
                assert self.key(name) in came[number], f"the receipt of {name} in round {number} was lost"
        return came

    def _round(self, row: RoundRow, signed_epoch: bytes) -> Round:
        key = bytes.fromhex(self.operator("status")[0]["authority"])
        return Round(FleetEpoch(key, messages.decode(Signed, signed_epoch)), messages.decode(Signed, row.ticket))

    def ledger(self, name: str) -> Line:
        return command(device_main, "ledger", "--dir", str(self.directory / name))[0]


def everyone(it: Installation) -> set[bytes]:
    """The keys of the devices that `populate` made."""
    return {it.key(f"device{number}") for number in range(DEVICES)}


def command(main: Callable[[list[str]], int], *words: str, code: int = 0) -> list[Line]:
    """What a command says with --json, run in this process: its work is the same, its start is paid once."""
    handlers, level, out = list(logging.root.handlers), logging.root.level, io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            assert main([*words, "--json"]) == code
    finally:
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)
    return [json.loads(line) for line in out.getvalue().splitlines()]


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on at this moment."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [probe.getsockname()[1] for probe in probes]


def children(pid: int) -> list[int]:
    """Processes that a process started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            after = path.read_text().rpartition(")")[2].split()
            if int(after[1]) == pid:
                found.append(int(path.parent.name))
    return found
