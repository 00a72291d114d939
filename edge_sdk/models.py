"""The newest model of each task: fetched, checked, named in the store, run by `predict`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edge_sdk import events
from edge_sdk.bundle import Bundle, Manifest
from edge_sdk.contributing import read_bundle, read_parameters
from edge_sdk.crypto.identity import Identity
from edge_sdk.errors import ParameterError, PeerError
from edge_sdk.fetching import Fetches
from edge_sdk.files import reason
from edge_sdk.policy import Policy
from edge_sdk.protocol.messages import Signed, Ticket, decode
from edge_sdk.rules import Rules, read_policy
from edge_sdk.store import Held, Store, read_model
from edge_sdk.transport.wire import BlobRef, Model, TaskState

if TYPE_CHECKING:
    from edge_sdk.training.trainer import Trainer


@dataclass(frozen=True)
class Here:
    """A model whose files are here and were checked."""

    model: Model
    bundle: Path
    parameters: Path
    manifest: Manifest

    def fits(self, ticket: Ticket) -> bool:
        """Whether it is the one that the ticket names."""
        return (self.model.bundle, self.model.parameters) == (ticket.bundle, ticket.parameters)


@dataclass
class _Wanted:
    """A model that is being fetched."""

    signed: bytes
    model: Model
    bundle: BlobRef
    parameters: BlobRef
    announced: bool = False


class Models:
    """Follows the models of this device's tasks.

    Every newest model is fetched, whatever the coin says about its round: what a device downloads tells nobody whether
    it takes part, and `predict` has it.
    """

    def __init__(
        self,
        store: Store,
        fetches: Fetches,
        rules: Callable[[], Rules],
        max_bundle_bytes: int,
        emit: Callable[[events.Event], None],
    ) -> None:
        self._store, self._fetches, self._rules, self._emit = store, fetches, rules, emit
        self._max_bundle_bytes = max_bundle_bytes
        self._wanted: dict[str, _Wanted] = {}
        self.here: dict[str, Here] = {}

    def wants(self, task: str) -> bool:
        """Whether a model of the task is on its way."""
        return task in self._wanted

    @property
    def missing_bytes(self) -> int:
        """What of the models that are on their way, of all tasks, the disk does not hold yet."""
        refs = {ref for wanted in self._wanted.values() for ref in (wanted.bundle, wanted.parameters)}
        return sum(self._fetches.missing_bytes(ref) for ref in refs)

    def want(self, model: Model, state: TaskState) -> None:
        """The task's newest model is this one, whose signature was checked."""
        here, wanted = self.here.get(model.task), self._wanted.get(model.task)
        if here is not None and here.model == model:
            self._wanted.pop(model.task, None)
        elif wanted is None or wanted.model != model:
            self._wanted[model.task] = _Wanted(state.model, model, state.bundle, state.parameters)

    def manifest(self, task: str, bundle: bytes) -> Manifest | None:
        """Of this bundle, if it is here."""
        here = self.here.get(task)
        return here.manifest if here is not None and here.model.bundle == bundle else None

    def bundle(self, here: Here, policy: Policy) -> Bundle:
        """The bundle of a model that is here, if the policy still lists its publisher, else raise PeerError."""
        return read_bundle(here.bundle, here.model.task, policy, self._max_bundle_bytes)

    def take(self) -> dict[str, str]:
        """Look for the files of what is wanted; take what is whole. Returns tasks whose model is refused, and why.

        Raises OSError from the disk.
        """
        refused = {}
        for task, wanted in list(self._wanted.items()):
            try:
                here = self._look(task, wanted)
            except (PeerError, ParameterError) as error:
                del self._wanted[task]
                refused[task] = f"the model is refused: {error}"
                continue
            if here is not None:
                del self._wanted[task]
                self.here[task] = here
                held, before = Held(wanted.signed, here.bundle.name, here.parameters.name), self._store.model(task)
                if before is not None and _round_of(before) > wanted.model.round:
                    continue  # for a round that started from it, or a repetition: `predict` keeps the newer one
                if before != held:
                    self._store.save_model(task, held)
                self._emit(events.Updated(task, wanted.model.round))
        refs = [ref for wanted in self._wanted.values() for ref in (wanted.bundle, wanted.parameters)]
        names = [name for held in self._store.models().values() for name in (held.bundle, held.parameters)]
        names += [path.name for here in self.here.values() for path in (here.bundle, here.parameters)]
        self._fetches.keep([ref.id for ref in refs], names)
        return refused

    def _look(self, task: str, wanted: _Wanted) -> Here | None:
        before = self.here.get(task)
        bundle, parameters = self._fetches.file(wanted.bundle), self._fetches.file(wanted.parameters)
        if not wanted.announced:
            wanted.announced = True
            for content, path, ref in (
                ("bundle", bundle, wanted.bundle),
                ("parameters", parameters, wanted.parameters),
            ):
                if path is None:
                    self._emit(events.Fetching(task, content, ref.size))
        if bundle is None or parameters is None:
            return None
        if before is not None and before.bundle == bundle and before.model.bundle == wanted.model.bundle:
            manifest = before.manifest  # checked when it came: the file's name is its hash
        else:
            found = read_bundle(bundle, task, self._rules().policy, self._max_bundle_bytes)
            if found.hash != wanted.model.bundle:
                raise PeerError(
                    f"bundle: {found.hash.hex()[:16]}, but the model is of {wanted.model.bundle.hex()[:16]}"
                )
            manifest = found.manifest
        read_parameters(parameters.read_bytes(), wanted.model.parameters, manifest)
        return Here(wanted.model, bundle, parameters, manifest)


def _round_of(held: Held) -> int:
    return decode(Model, decode(Signed, held.model).body).round  # verified when it came


class Predictor:
    """Runs the newest models, from the files, beside whoever writes them."""

    def __init__(self, directory: Path, max_bytes: int, threads: int) -> None:
        self._directory, self._max_bytes, self._threads = directory, max_bytes, threads
        self._trainers: dict[str, tuple[Held, dict[str, bytes], Trainer]] = {}

    def trainer(self, task: str) -> Trainer:
        """Holding the newest parameters. Raises ParameterError if there is no model yet."""
        for left in (1, 0):
            try:
                return self._read(task)
            except FileNotFoundError:  # a newer model came between two reads
                if not left:
                    raise
        raise AssertionError

    def _read(self, task: str) -> Trainer:
        from edge_sdk.training.onnx import OnnxTrainer

        held, local = read_model(self._directory, task)
        if held is None:
            raise ParameterError(f"{task}: no model is here yet")
        values = {name: value.tobytes() for name, value in local.items()}
        before = self._trainers.get(task)
        if before is not None and before[:2] == (held, values):
            return before[2]
        blobs = self._directory / "blobs"
        bundle = read_bundle(blobs / held.bundle, task, read_policy(self._directory), self._max_bytes)
        model = decode(Model, decode(Signed, held.model).body)  # verified when it came
        trainer = OnnxTrainer(bundle, self._threads)
        content = (blobs / held.parameters).read_bytes()
        trainer.load_shared(read_parameters(content, model.parameters, bundle.manifest))
        table = bundle.manifest.of_role("local")
        if local.keys() == {parameter.name for parameter in table}:
            trainer.load_local({p.name: local[p.name].reshape(p.shape) for p in table})
        self._trainers[task] = held, values, trainer
        return trainer


def read_identity(directory: Path) -> Identity:
    """The device's key. Raises ParameterError if it is missing or not one."""
    path = directory / "identity.key"
    try:
        return Identity(path.read_bytes())
    except (OSError, ParameterError) as error:
        raise ParameterError(f"{path}: {reason(error)}") from error
