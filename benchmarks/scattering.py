"""What a frozen wavelet scattering front end is worth at a fixed epsilon: Fashion-MNIST, with it and without it.

    python -m benchmarks.scattering --json

Every contender is trained by one plan: privacy unit example, the same clip, noise multiplier, Poisson rate and number
of rounds, so the same epsilon by the project's own accounting (PLD, against readers of the models). "linear on
scattering" is examples/models/scattering.py, its constant part computed once (and kept in float16) under its trained
head; "linear on pixels" is that head on the pixels, each picture normalised as its scattering channels are; "logistic",
"mlp" and "lenet" are those models on plain pixels.

Simulated in one process, with no network and no masks, and otherwise the fleet's own code: two devices hold half of the
training pictures each; in every round each draws its own by Poisson sampling, sums their clipped gradients
(`OnnxTrainer.clipped_sum`) and adds its share of the noise (`mechanism.encode`); the sum modulo 2^b is decoded and
divided by the planned number of pictures. Then momentum SGD. The learning rate is the best of a few on 5,000 training
pictures that are set aside, with the first seed, which epsilon does not account for; every contender has that choice.

One object for each contender: `epsilon`, `delta`, `parameters`, `learning_rate`, `accuracy` (mean on the 10,000 test
pictures), `spread` (standard deviation over the seeds, which are those of sampling and noise), `accuracies`, `seconds`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from coordinator.accounting import planned
from edge_sdk.bundle import Bundle
from edge_sdk.crypto.hashing import tagged_hash
from edge_sdk.crypto.identity import Identity
from edge_sdk.privacy.mechanism import Mechanism, decode, encode
from edge_sdk.privacy.rdp import Sampling
from edge_sdk.training.examples import FetchedExamples
from edge_sdk.training.onnx import OnnxTrainer
from edge_sdk.training.sampling import poisson_sample, shuffle, window_for
from examples.demo.data import Part, load
from examples.models import lenet, logistic, mlp, scattering
from export.build import build
from export.graph import TrainingSpec

BATCH, DEVICES, SET_ASIDE, LOSS_BOUND = 32, 2, 5_000, 10.0
STEPS = 4096
"""The clip in steps of rounding: its error is then far below the noise."""
MODULUS_BITS = 31
PUBLISHER = Identity(tagged_hash("benchmark", b"signs bundles that live as long as this process"))
FRONT_END, PIXELS = "linear on scattering", "linear on pixels"

Pictures = NDArray[np.floating]


@dataclass(frozen=True)
class Plan:
    """What epsilon depends on, and momentum. rate: of each picture in each round."""

    clip: float
    noise_multiplier: float
    rate: float
    rounds: int
    momentum: float
    delta: float

    def mechanism(self, dimension: int) -> Mechanism:
        """One round's, for d parameters. Its sigma is what gives the planned noise multiplier."""
        probe = Mechanism("example", dimension, self.clip, self.clip / STEPS, 2.0 * STEPS, DEVICES, MODULUS_BITS)
        sigma = self.noise_multiplier * probe.sensitivity_steps
        return Mechanism("example", dimension, self.clip, self.clip / STEPS, sigma, DEVICES, MODULUS_BITS)

    def epsilon(self, dimension: int) -> float:
        """Against readers, by PLD."""
        mechanism, sampling = self.mechanism(dimension), Sampling(1.0, self.rate)
        return planned(mechanism, sampling, self.rounds, self.rounds, self.delta).readers.epsilon


@dataclass(frozen=True)
class Contender:
    """A model, and what it sees of the pictures."""

    spec: Callable[[], TrainingSpec]
    view: Callable[[Part], Pictures]
    learning_rates: tuple[float, ...]


def constant_part(part: Part) -> Pictures:
    """(n, 3969) float16: examples/models/scattering.py's model without its last layer."""
    spec = scattering.build()
    assert isinstance(spec.model, nn.Sequential)  # noqa: S101  (for the type checker)
    fixed = spec.model[:-1].eval()
    with torch.no_grad():
        rows = [fixed(torch.from_numpy(part.x[i : i + 256])).half().numpy() for i in range(0, len(part), 256)]
    return np.concatenate(rows)


def normalised(part: Part) -> Pictures:
    """(n, 784) float32: each picture with mean 0 and variance 1."""
    flat = part.x.reshape(len(part), -1)
    return (flat - flat.mean(1, keepdims=True)) / np.sqrt(flat.var(1, keepdims=True) + 1e-5)


def linear(inputs: int, name: str) -> TrainingSpec:
    """The head of the scattering model, PyTorch's own initial weights from seed 0."""
    torch.manual_seed(0)
    head = nn.Linear(inputs, scattering.CLASSES)
    return TrainingSpec(head, "cross_entropy", [torch.zeros(inputs)], torch.zeros((), dtype=torch.long), name=name)


SCATTERED = scattering.CHANNELS * (scattering.SIDE // 2**scattering.DEPTH) ** 2
CONTENDERS = {
    FRONT_END: Contender(lambda: linear(SCATTERED, "scattered"), constant_part, (0.5, 1.0, 2.0, 4.0)),
    PIXELS: Contender(lambda: linear(scattering.SIDE**2, "pixels"), normalised, (0.25, 0.5, 1.0, 2.0, 4.0)),
    "logistic": Contender(logistic.build, lambda part: part.x, (0.5, 1.0, 2.0, 4.0)),
    "mlp": Contender(mlp.build, lambda part: part.x, (0.25, 0.5, 1.0, 2.0)),
    "lenet": Contender(lenet.build, lambda part: part.x, (0.5, 1.0)),
}


class Simulation:
    """One contender under one plan."""

    def __init__(self, contender: Contender, plan: Plan, train: Part, test: Part) -> None:
        made = build(contender.spec(), PUBLISHER, unit="example", batch=BATCH)
        self.bundle = Bundle.read(made.bundle, PUBLISHER.public_key)
        self.plan = plan
        self.mechanism = plan.mechanism(self.bundle.dimension)
        self.seen, self.labels = contender.view(train), train.y
        self.tested, self.test_labels = contender.view(test), test.y
        mixed = shuffle(len(train), tagged_hash("benchmark", b"set aside"))
        self.aside, rest = mixed[:SET_ASIDE], mixed[SET_ASIDE:]
        self.dealt = np.array_split(rest, DEVICES)
        self.planned = plan.rate * len(rest)

    def run(self, learning_rate: float, seed: int) -> OnnxTrainer:
        """A trainer that holds the last model."""
        plan, trainer = self.plan, OnnxTrainer(self.bundle)
        parameters = trainer.shared().astype(np.float64)
        velocity = np.zeros_like(parameters)
        for number in range(plan.rounds):
            ticket = tagged_hash("benchmark", b"round %d %d" % (seed, number))
            total = np.zeros(self.mechanism.length, dtype=np.uint32)
            for device, rows in enumerate(self.dealt):
                drawn = poisson_sample(len(rows), plan.rate, tagged_hash("benchmark", b"draw %d" % device, ticket))
                examples = FetchedExamples(len(rows), partial(self._fetch, rows))
                window = window_for(BATCH, plan.rate)
                found = trainer.clipped_sum(examples, drawn, clip=plan.clip, loss_bound=LOSS_BOUND, window=window)
                secret = tagged_hash("benchmark", b"noise %d" % device, ticket)
                total += encode(self.mechanism, found.gradient, None, ticket, secret)
            total &= np.uint32((1 << MODULUS_BITS) - 1)
            velocity = plan.momentum * velocity + decode(self.mechanism, total, ticket).vector / self.planned
            parameters -= learning_rate * velocity
            trainer.load_shared(parameters.astype(np.float32))
        return trainer

    def _fetch(self, held: NDArray[np.int64], indices: NDArray[np.int64]) -> tuple[list[Pictures], NDArray[np.int64]]:
        rows = held[indices]
        return [self.seen[rows].astype(np.float32)], self.labels[rows]

    def accuracy_aside(self, trainer: OnnxTrainer) -> float:
        """On the training pictures that nobody holds."""
        return _accuracy(trainer, self.seen[self.aside], self.labels[self.aside])

    def accuracy(self, trainer: OnnxTrainer) -> float:
        """On the test set."""
        return _accuracy(trainer, self.tested, self.test_labels)


def _accuracy(trainer: OnnxTrainer, pictures: Pictures, labels: NDArray[np.int64]) -> float:
    return float(np.mean(trainer.predict(pictures.astype(np.float32)).argmax(axis=1) == labels))


def measure(name: str, plan: Plan, seeds: int, train: Part, test: Part) -> dict[str, object]:
    """One row."""
    start = time.perf_counter()
    contender = CONTENDERS[name]
    simulation = Simulation(contender, plan, train, test)
    first = {rate: simulation.run(rate, seed=0) for rate in contender.learning_rates}
    best = max(first, key=lambda rate: simulation.accuracy_aside(first[rate]))
    trained = [first[best], *(simulation.run(best, seed) for seed in range(1, seeds))]
    found = [simulation.accuracy(trainer) for trainer in trained]
    return {
        "model": name,
        "parameters": simulation.bundle.dimension,
        "epsilon": round(plan.epsilon(simulation.bundle.dimension), 3),
        "delta": plan.delta,
        "learning_rate": best,
        "accuracy": round(statistics.fmean(found), 4),
        "spread": round(statistics.stdev(found), 4) if seeds > 1 else None,
        "accuracies": [round(accuracy, 4) for accuracy in found],
        "seconds": round(time.perf_counter() - start, 1),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one object a line")
    parser.add_argument("--model", action="append", choices=CONTENDERS, help="may be repeated; all if not given")
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--noise-multiplier", type=float, default=2.0)
    parser.add_argument("--rate", type=float, default=0.05, help="of each picture in each round (0.05)")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    plan = Plan(options.clip, options.noise_multiplier, options.rate, options.rounds, options.momentum, options.delta)
    data = load("fashion-mnist")
    for name in options.model or CONTENDERS:
        row = measure(name, plan, options.seeds, data.train, data.held_out)
        print(json.dumps(row) if options.json else "  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
