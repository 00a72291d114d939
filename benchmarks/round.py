"""How long a round takes end to end, and where the time goes: coordinator, broker, devices and helpers as processes.

    python benchmarks/round.py --json --devices 50 --d 100000 --helpers 5 --broker mosquitto --rounds 3

The bundle is a linear classifier of about d parameters, made here (it needs the package `onnx`, not PyTorch); each
device has a few made-up examples, so that what is measured is the round and not the training. Everything else is what
runs in the field: `edge-coordinator serve`, `edge-device run`, `edge-helper run`, mutual TLS on loopback, ledgers,
receipts. All share this machine's cores, which a fleet does not: `devices_cpu_s` is spread over all devices there.

One round goes before and is not in the median: devices fetch the bundle and load onnxruntime then (`first_round_s`).
Phases are differences between the coordinator's own events: ticket out, first and last contribution durable, set
sealed (`grace_s` of it is waiting, by the task), quorum signed, model published. `busy` is the CPU time of all these
processes over wall time and cores; `idle` is what the machine's cores had to spare. Near 1 and 0 the machine bounds the
round; what is idle was waiting; what is neither went to something else on this machine, and spoils the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# A script's own directory comes first in the path, and there `coordinator` is another file.
if __name__ == "__main__":
    sys.path.pop(0)
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from edge_sdk import enrolment
from edge_sdk.bundle import (
    Manifest,
    Options,
    Tensor,
    parameter_table,
    predict_inputs,
    predict_outputs,
    train_inputs,
    train_outputs,
    write_bundle,
)
from edge_sdk.crypto.identity import Identity
from examples.demo.fleet import Line, Process, Said, call

CLASSES, BATCH, EXAMPLES, RATE = 10, 8, 8, 0.5
GRACE_S = 0.1
PUBLISHER = Identity(b"benchmarks/round.py".ljust(32))
OPSET, IR_VERSION = 18, 9
MB = 1_000_000

TASK = """
name = "bench"
bundle = "bench.bundle"
publisher = "{publisher}"
unit = "example"
rounds = {rounds}
[privacy]
clip = 1.0
delta = 1e-6
noise_multiplier = 8.0
example_rate = {rate}
[cohort]
expected = {devices}
spread = 0
honest = {honest}
n_max = {devices}
examples = {examples}
[schedule]
open_s = 600
grace_s = {grace}
answer_s = 600
"""

PHASES = ("ticket to first", "first to last", "last to sealed", "sealed to certified", "certified to published")


def linear_bundle(d: int) -> tuple[bytes, int]:
    """A bundle with one linear layer of about d parameters, and its number of features."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    features = max(1, round(d / CLASSES) - 1)
    draft = Manifest(
        schema=1, name="linear", unit="example", batch=BATCH, options=Options(proximal=False),
        parameters=parameter_table([("w", (features, CLASSES), "shared"), ("b", (CLASSES,), "shared")]),
        inputs=(Tensor("x", (features,), "float32", None),), label=Tensor("y", (), "int64", CLASSES),
        output=Tensor("output", (CLASSES,), "float32", None), loss="cross_entropy", tools={"onnx": onnx.__version__},
    )  # fmt: skip
    kinds = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
    n = helper.make_node

    def model(nodes: list[Any], inputs: Any, outputs: Any) -> bytes:
        constants = {
            "zero": np.float32(0), "one": np.float32(1), "tiny": np.float32(1e-30), "axis1": np.array([1]),
            "axis0": np.array([0]), "depth": np.array(CLASSES), "off_on": np.array([0, 1], np.float32),
        }  # fmt: skip
        used = {name for node in nodes for name in node.input}
        graph = helper.make_graph(
            nodes, "graph",
            [helper.make_tensor_value_info(t.name, kinds[t.dtype], t.shape) for t in inputs],
            [helper.make_tensor_value_info(t.name, kinds[t.dtype], t.shape) for t in outputs],
            [numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items() if name in used],
        )  # fmt: skip
        imports = [helper.make_opsetid("", OPSET)]
        made: bytes = helper.make_model(graph, opset_imports=imports, ir_version=IR_VERSION).SerializeToString()
        return made

    scores = [n("MatMul", ["x", "w"], ["product"]), n("Add", ["product", "b"], ["output"])]
    train = [
        *scores,
        n("LogSoftmax", ["output"], ["log_p"], axis=1), n("Exp", ["log_p"], ["p"]),
        n("OneHot", ["y", "depth", "off_on"], ["target"], axis=1), n("Sub", ["p", "target"], ["delta"]),
        # The gradient of one example is (x, 1) times delta: its norm is the product of theirs.
        n("ReduceSumSquare", ["x", "axis1"], ["x_sq"], keepdims=0), n("Add", ["x_sq", "one"], ["x_sq_1"]),
        n("ReduceSumSquare", ["delta", "axis1"], ["delta_sq"], keepdims=0), n("Mul", ["x_sq_1", "delta_sq"], ["sq"]),
        n("Sqrt", ["sq"], ["norm"]), n("Max", ["norm", "tiny"], ["norm_safe"]), n("Div", ["clip", "norm_safe"], ["r"]),
        n("Min", ["r", "one"], ["scale"]), n("Mul", ["scale", "mask"], ["weights"]),
        n("Unsqueeze", ["weights", "axis1"], ["column"]), n("Mul", ["delta", "column"], ["weighted"]),
        n("Transpose", ["x"], ["x_t"], perm=[1, 0]), n("MatMul", ["x_t", "weighted"], ["grad.w"]),
        n("ReduceSum", ["weighted", "axis0"], ["grad.b"], keepdims=0),
        n("Mul", ["log_p", "target"], ["lls"]), n("ReduceSum", ["lls", "axis1"], ["ll"], keepdims=0),
        n("Neg", ["ll"], ["losses"]), n("Max", ["losses", "zero"], ["losses_0"]),
        n("Min", ["losses_0", "loss_bound"], ["within"]), n("Mul", ["within", "mask"], ["counted"]),
        n("ReduceSum", ["counted"], ["loss"], keepdims=0), n("ReduceSum", ["mask"], ["count"], keepdims=0),
        n("ArgMax", ["output"], ["best"], axis=1, keepdims=0), n("Equal", ["best", "y"], ["hit"]),
        n("Cast", ["hit"], ["hit_f"], to=TensorProto.FLOAT), n("Mul", ["hit_f", "mask"], ["hits"]),
        n("ReduceSum", ["hits"], ["correct"], keepdims=0), n("Less", ["scale", "one"], ["over"]),
        n("Cast", ["over"], ["over_f"], to=TensorProto.FLOAT), n("Mul", ["over_f", "mask"], ["overs"]),
        n("ReduceSum", ["overs"], ["clipped"], keepdims=0), n("Identity", ["zero"], ["invalid"]),
    ]  # fmt: skip
    graphs = {
        "train.onnx": model(train, train_inputs(draft), train_outputs(draft)),
        "predict.onnx": model(scores, predict_inputs(draft), predict_outputs(draft)),
    }
    start = {"w": np.zeros((features, CLASSES), np.float32), "b": np.zeros(CLASSES, np.float32)}
    return write_bundle(draft, graphs, start, PUBLISHER), features


class Fleet:
    """All processes of one run, in one directory, with a deadline for the whole."""

    def __init__(self, folder: Path, deadline_s: float) -> None:
        self.folder, self.home = folder, folder / "coordinator"
        self._said: queue.Queue[Said] = queue.Queue()
        self._until_s = time.monotonic() + deadline_s
        self.processes: dict[str, Process] = {}

    def start(self, name: str, *command: str) -> None:
        self.processes[name] = Process(name, command, self.folder / f"{name}.log", self._said)
        self.processes[name].start()

    def events(self) -> Iterator[tuple[str, Line]]:
        """What any process says. Raises SystemExit if one ends, or when the time is up."""
        while True:
            try:
                said = self._said.get(timeout=max(0.0, self._until_s - time.monotonic()))
            except queue.Empty:
                log = (self.folder / "coordinator.log").read_text()
                raise SystemExit(f"not done in time; the coordinator's log ends with\n{log[-2000:]}") from None
            if said.line is None:
                raise SystemExit(f"{said.who} ended: {(self.folder / f'{said.who}.log').read_text()[-2000:]}")
            yield said.who, said.line

    def pids(self, prefix: str) -> list[int]:
        return [p.child.pid for name, p in self.processes.items() if name.startswith(prefix) and p.child is not None]

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds so far, user and system, by kind of process, and those that the machine was idle."""
        (coordinator,) = self.pids("coordinator")
        by_kind = {
            "coordinator": [coordinator], "broker": children(coordinator), "devices": self.pids("device"),
            "helpers": self.pids("helper"),
        }  # fmt: skip
        return {**{kind: sum(map(process_cpu_s, pids)) for kind, pids in by_kind.items()}, "idle": idle_s()}

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()


@contextmanager
def running(folder: Path, deadline_s: float) -> Iterator[Fleet]:
    fleet = Fleet(folder, deadline_s)
    try:
        yield fleet
    finally:
        fleet.close()


def children(pid: int) -> list[int]:
    """Processes that this one started. mosquitto is the coordinator's; amqtt is in its own process."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        found += map(int, path.read_text().split())
    return found


def idle_s() -> float:
    """Seconds that all cores together have been idle, also while they waited for a disk."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    return (int(fields[4]) + int(fields[5])) / os.sysconf("SC_CLK_TCK")


def process_cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_rss_mb(pid: int) -> float:
    """Peak resident memory, MB of 10^6 bytes."""
    return int(Path(f"/proc/{pid}/status").read_text().split("VmHWM:")[1].split()[0]) * 1024 / MB


def free_ports(count: int) -> list[str]:
    import socket

    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [str(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def set_up(fleet: Fleet, options: argparse.Namespace, features: int) -> None:
    """A coordinator that serves, devices and helpers that joined and run, and a task."""
    folder, home, devices = fleet.folder, str(fleet.home), options.devices
    enrolment_port, broker_port = free_ports(2)
    call(
        "coordinator", "init", "--dir", home, "--json", "--broker", options.broker, "--enrolment-port", enrolment_port,
        "--broker-port", broker_port, "--publisher", PUBLISHER.public_key.hex(),
        "--committee", "helpers" if options.helpers else "everyone",
    )  # fmt: skip
    fleet.start("coordinator", "coordinator", "serve", "--dir", home, "--json")
    for _, line in fleet.events():
        if line["event"] == "serving":
            break
    honest = min(10, devices - 2)
    (folder / "bench.toml").write_text(
        TASK.format(
            publisher=PUBLISHER.public_key.hex(), rounds=options.rounds + 1, rate=RATE, devices=devices, honest=honest,
            examples=EXAMPLES, grace=GRACE_S,
        )
    )  # fmt: skip

    def join(name: str, token: str) -> None:
        directory = folder / name
        enrolment.join(directory, token, ["bench"])
        if name.startswith("helper"):
            fleet.start(name, "edge_sdk.helper", "run", "--dir", str(directory), "--json")
            return
        x = (np.arange(EXAMPLES * features).reshape(EXAMPLES, features) % 7 < 3).astype(np.float32)
        np.savez_compressed(directory / "examples.npz", x=x, y=np.arange(EXAMPLES) % CLASSES)
        with (directory / "device.toml").open("a") as file:
            file.write('\n[tasks.bench]\nexamples = "examples.npz"\n')
        policy = directory / "policy.toml"
        policy.write_text(policy.read_text().replace("min_honest = 10", f"min_honest = {honest}"))
        fleet.start(name, "edge_sdk", "run", "--dir", str(directory), "--json")

    with ThreadPoolExecutor(2) as pool:
        joining = []
        for role, count in (("helper", options.helpers), ("device", devices)):
            if count:
                invite = ("coordinator", "invite", "--dir", home, "--json", "--role", role, "--count", str(count))
                tokens = [line["token"] for line in call(*invite)]
                joining += [pool.submit(join, f"{role}{number}", token) for number, token in enumerate(tokens)]
        for done in joining:
            done.result()
    waiting = {name for name in fleet.processes if name != "coordinator"}
    for who, line in fleet.events():
        waiting -= {who} if line["event"] == "welcomed" else set()
        if not waiting:
            break
    call("coordinator", "task", "add", str(folder / "bench.toml"), "--dir", home, "--json")


def measure(fleet: Fleet) -> tuple[list[list[float]], dict[str, float], list[Line], list[float]]:
    """Times of each round's events, CPU by kind after the first round, all contributions, the devices' own times."""
    rounds: list[list[float]] = []
    before: dict[str, float] = {}
    contributions: list[Line] = []
    trained: list[float] = []
    for who, line in fleet.events():
        event = line["event"]
        if who.startswith("device"):
            if event == "contributed" and len(rounds) > 1:
                trained.append(line["train_s"])
            elif event in ("refused", "warned"):
                raise SystemExit(f"{who}: {line['reason']}")
        elif event == "round_opened":
            rounds.append([line["time_s"]])
            if len(rounds) == 2:
                before = fleet.cpu_s()
        elif event == "contributed":
            contributions.append(line)
            if len(rounds[-1]) < 3:
                rounds[-1].append(line["time_s"])
            rounds[-1][2:] = [line["time_s"]]
        elif event in ("round_sealed", "round_certified", "model_published"):
            rounds[-1].append(line["time_s"])
        elif event == "round_aborted":
            raise SystemExit(f"round {line['round']} was aborted: {line['reason']}")
        elif event == "task_done":
            after = fleet.cpu_s()
            used = {kind: after[kind] - before[kind] for kind in after}
            return rounds, used, contributions, trained
    raise AssertionError("events never end")


def run(options: argparse.Namespace) -> dict[str, Any]:
    content, features = linear_bundle(options.d)
    with tempfile.TemporaryDirectory() as place, running(Path(place), options.deadline_s) as fleet:
        (fleet.folder / "bench.bundle").write_bytes(content)
        began_s = time.monotonic()
        set_up(fleet, options, features)
        set_up_s = time.monotonic() - began_s
        rounds, used, contributions, trained = measure(fleet)
        (pid,) = fleet.pids("coordinator")
        rss_mb = peak_rss_mb(pid)
    measured = rounds[1:]
    walls = [times[-1] - times[0] for times in measured]
    wall_s = statistics.median(walls)
    phases = {
        phase: round(statistics.median(times[i + 1] - times[i] for times in measured), 3)
        for i, phase in enumerate(PHASES)
    }
    d, cores, span_s = CLASSES * (features + 1), os.cpu_count() or 1, measured[-1][-1] - measured[0][0]
    idle = used.pop("idle") / span_s / cores
    busy = sum(used.values()) / span_s / cores
    cpu = {f"{kind}_cpu_s": round(seconds / len(measured), 3) for kind, seconds in used.items()}
    return {
        "devices": options.devices, "helpers": options.helpers, "broker": options.broker, "d": d,
        "rounds": len(measured), "wall_s": round(wall_s, 3), "slowest_s": round(max(walls), 3), "phases_s": phases,
        "grace_s": GRACE_S, "first_round_s": round(rounds[0][-1] - rounds[0][0], 3), "set_up_s": round(set_up_s, 1),
        **cpu, "device_s": round(statistics.median(trained), 3), "coordinator_rss_mb": round(rss_mb, 1),
        "upload_bytes": contributions[-1]["size"], "model_bytes": 4 * d,
        "up_mb": round(options.devices * contributions[-1]["size"] / MB, 2),
        "down_mb": round(options.devices * 4 * d / MB, 2),
        "cores": cores, "busy": round(busy, 2), "idle": round(idle, 2),
    }  # fmt: skip


def show(row: dict[str, Any]) -> None:
    committee = f"{row['helpers']} helpers" if row["helpers"] else "every device in the committee"
    print(f"{row['devices']} devices, {committee}, {row['broker']}, d = {row['d']:,}; {row['cores']} cores\n")
    print(f"a round    {row['wall_s']:8.3f} s   median of {row['rounds']}, slowest {row['slowest_s']:.3f}")
    for phase, seconds in row["phases_s"].items():
        print(f"  {phase:24}{seconds:8.3f} s   {seconds / row['wall_s']:4.0%}")
    print(f"           (the first one took {row['first_round_s']:.3f} s; grace_s is {row['grace_s']})\n")
    print("CPU seconds of a round, all processes of a kind together")
    for kind in ("coordinator", "broker", "devices", "helpers"):
        print(f"  {kind:24}{row[f'{kind}_cpu_s']:8.3f} s")
    print(f"  of {row['cores']} cores, busy {row['busy']:.0%} and idle {row['idle']:.0%}\n")
    print(f"bytes      {row['upload_bytes']:,} up and {row['model_bytes']:,} down for each device, ", end="")
    print(f"{row['up_mb']} and {row['down_mb']} MB in all")
    print(f"memory     {row['coordinator_rss_mb']} MB in the coordinator at its peak")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=50)
    parser.add_argument("--d", type=int, default=100_000, help="about so many parameters")
    parser.add_argument("--helpers", type=int, default=5, help="0: every device is a committee member")
    parser.add_argument("--broker", choices=("mosquitto", "amqtt"), default="mosquitto")
    parser.add_argument("--rounds", type=int, default=3, help="measured, after one that is not")
    parser.add_argument("--deadline-s", type=float, default=300.0, help="give up after this time")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.devices < 4 or options.rounds < 1 or options.d < 2 * CLASSES or options.helpers in (1, 2):
        parser.error("at least 4 devices, 1 round, 20 parameters, and 3 helpers or none")
    row = run(options)
    if options.json:
        print(json.dumps(row))
    else:
        show(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
