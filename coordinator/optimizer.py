"""Server optimisers: what becomes of the average update (Reddi et al. 2021, arXiv:2003.00295, Algorithm 2).

All work on one flat float32 vector. An update points where the model is to move: for unit "device" the average change
of the devices' models, for unit "example" minus the average gradient. What an optimiser remembers are named vectors
that are stored beside the model: it has no state of its own, so a restart goes on where the last model was published.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from edge_sdk.errors import ParameterError, PeerError, RoundAborted

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Memory = Mapping[str, F32]
"""Name -> float32 (d,): what the optimiser carries from round to round."""

Share = Annotated[float, Meta(ge=0.0, lt=1.0)]
Rate = Annotated[float, Meta(gt=0.0, le=1e6)]


class Schedule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the learning rate goes with the number of models published so far.

    kind "constant"; "step": times `factor` after every `every` models; "cosine": from 1 down to `floor` over `over`
    models, half a cosine (Loshchilov and Hutter 2017, arXiv:1608.03983), and `floor` from then on. A kind's own numbers
    have to be given, but for `floor` (`lacks`).
    warmup: models over which the rate first rises in equal steps, whatever the kind.
    """

    kind: Literal["constant", "step", "cosine"] = "constant"
    every: Annotated[int, Meta(ge=1)] | None = None
    factor: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    over: Annotated[int, Meta(ge=1)] | None = None
    floor: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0
    warmup: Annotated[int, Meta(ge=0)] = 0

    @property
    def lacks(self) -> str | None:
        """A number that its kind needs and that is not given."""
        needed = {"constant": (), "step": ("every", "factor"), "cosine": ("over",)}[self.kind]
        return next((name for name in needed if getattr(self, name) is None), None)

    def factor_at(self, number: int) -> float:
        """What the learning rate is multiplied by for the model after `number` (0 for the first).

        What is lacking counts as 1, as it did in tasks that were added before it was asked for.
        """
        if number < self.warmup:
            return (number + 1) / (self.warmup + 1)
        done = number - self.warmup
        if self.kind == "step":
            return (self.factor or 1.0) ** (done // (self.every or 1))
        if self.kind == "cosine":
            along = min(done / (self.over or 1), 1.0)
            return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * along)) / 2
        return 1.0


class Optimizer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One of four rules, with its numbers; what a rule does not use is ignored.

    kind: "fedavg": x + lr u.  "fedavgm": v = momentum v + u, x + lr v (Hsu et al. 2019, arXiv:1909.06335).
    "fedadam", "fedyogi": Algorithm 2, without bias correction: m = momentum m + (1 - momentum) u,
    x + lr m / (sqrt(v) + tau); v starts at tau^2.
    learning_rate: eta.  momentum: beta_1.  beta2: of the squares.  tau: adaptivity, the paper's 1e-3.
    """

    kind: Literal["fedavg", "fedavgm", "fedadam", "fedyogi"] = "fedavg"
    learning_rate: Rate = 1.0
    momentum: Share = 0.9
    beta2: Share = 0.99
    tau: Annotated[float, Meta(gt=0.0, le=1e6)] = 1e-3
    schedule: Schedule = Schedule()

    def start(self, dimension: int) -> dict[str, F32]:
        """What is remembered before the first update."""
        if self.kind == "fedavg":
            return {}
        if self.kind == "fedavgm":
            return {"momentum": np.zeros(dimension, np.float32)}
        squares = np.full(dimension, self.tau**2, np.float32)
        return {"momentum": np.zeros(dimension, np.float32), "squares": squares}

    def step(self, parameters: F32, update: F64, memory: Memory, number: int) -> tuple[F32, dict[str, F32]]:
        """The next model and what to remember: new arrays.

        parameters: float32 (d,).  update: float64 (d,), the average.  memory: of the last step, or `start`'s.
        number: models published so far.
        Raises ParameterError on another shape or dtype, NaN or infinity, or a memory that another rule left;
        RoundAborted if the step leaves float32's range: the model stays.
        """
        if parameters.dtype != np.float32 or update.dtype != np.float64 or parameters.shape != update.shape:
            raise ParameterError(
                f"parameters float32 and update float64 of one shape, not {parameters.dtype} {parameters.shape} and "
                f"{update.dtype} {update.shape}"
            )
        fresh = self.start(len(parameters))
        if memory.keys() != fresh.keys() or any(memory[name].shape != parameters.shape for name in fresh):
            raise ParameterError(f"the memory holds {sorted(memory)}, {self.kind} of {len(parameters)} needs its own")
        given: dict[str, F32 | F64] = {"parameters": parameters, "update": update, **memory}
        for name, array in given.items():
            if not np.isfinite(array).all():
                raise ParameterError(f"{name}: NaN or infinity")
        rate = self.learning_rate * self.schedule.factor_at(number)
        with np.errstate(over="ignore", invalid="ignore"):  # looked for below
            change, after = self._move(update, memory)
            moved = (parameters + rate * change).astype(np.float32)
            kept = {name: array.astype(np.float32) for name, array in after.items()}
        if not all(np.isfinite(array).all() for array in (moved, *kept.values())):
            raise RoundAborted(f"{self.kind}: the step leaves float32's range; the learning rate {rate:g} is too large")
        return moved, kept

    def _move(self, update: F64, memory: Memory) -> tuple[F64, dict[str, F64]]:
        if self.kind == "fedavg":
            return update, {}
        momentum = self.momentum * memory["momentum"].astype(np.float64)
        if self.kind == "fedavgm":
            momentum += update
            return momentum, {"momentum": momentum}
        momentum += (1 - self.momentum) * update
        squares, square = memory["squares"].astype(np.float64), update * update
        if self.kind == "fedadam":
            squares = self.beta2 * squares + (1 - self.beta2) * square
        else:
            squares = squares - (1 - self.beta2) * square * np.sign(squares - square)
        return momentum / (np.sqrt(squares) + self.tau), {"momentum": momentum, "squares": squares}


def pack_memory(memory: Memory) -> bytes:
    """What is stored beside the model."""
    return msgspec.msgpack.encode({name: array.astype("<f4").tobytes() for name, array in sorted(memory.items())})


def unpack_memory(data: bytes) -> dict[str, F32]:
    """The reverse. Raises PeerError on anything else: the disk's fault."""
    try:
        packed = msgspec.msgpack.decode(data, type=dict[str, bytes])
        return {name: np.frombuffer(value, dtype="<f4").astype(np.float32) for name, value in packed.items()}
    except (msgspec.MsgspecError, ValueError) as error:
        raise PeerError(f"optimiser state: {error}") from error
