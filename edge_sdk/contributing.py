"""A data-holding device's part in one task: from a ticket to a contribution that is stored and charged.

The order is docs/services.md section 5's: the ticket is checked against the policy, the ledger tosses the coin, the
bundle and the parameters are checked, the device trains, the contribution is stored, the ledger charges it; only then
may its first byte leave. A power cut before it is stored leaves a drawn coin and nothing that was ever sent; one after
it sends the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from edge_sdk.bundle import Bundle, Manifest
from edge_sdk.crypto.hashing import content_hash
from edge_sdk.crypto.sealing import encapsulate
from edge_sdk.errors import ParameterError, PeerError, SordinoError
from edge_sdk.ledger import Ledger
from edge_sdk.memory import give_back, give_back_freed
from edge_sdk.policy import Policy, mechanism_of, sampling_of
from edge_sdk.privacy.ledger_entry import Release
from edge_sdk.privacy.mechanism import METRICS, Mechanism, MetricSums, device_metrics, encode
from edge_sdk.privacy.rdp import BudgetExceeded
from edge_sdk.protocol import contributor
from edge_sdk.protocol.contributor import Enrolled, Idle, Sent, Training
from edge_sdk.protocol.messages import Anchor, Header, Ticket, message_hash
from edge_sdk.protocol.rounds import Round
from edge_sdk.rules import Rules
from edge_sdk.store import Store
from edge_sdk.training.examples import Array, ArrayExamples, Examples
from edge_sdk.training.sampling import poisson_sample, window_for

if TYPE_CHECKING:
    from edge_sdk.training.trainer import F32, F64, Metrics, Trainer

Entropy = Callable[[int], bytes]
"""So many fresh secret bytes: os.urandom."""

Inputs = Array | Sequence[Array]
"""Of a model with one input, or with several."""
Given = Examples | Mapping[str, Array] | tuple[Inputs, Array] | Iterable[tuple[Inputs, Array]]
Source = Given | Callable[[], Given]
"""What an integrator registers: `Examples`; arrays by the names of the model's inputs and "y"; (inputs, labels); pairs
of one example each; or a callable that gives any of these, called anew for each round, so that nothing is held
between rounds."""
FORMS = (
    "examples are (inputs, labels), arrays by the names of the inputs and of the label, pairs of one example each, an "
    "object with __len__ and fetch, or a callable that gives one of these; several inputs are a tuple or a list"
)


def check_form(source: object) -> None:
    """Return if it may be a `Source`, else raise ParameterError that says which forms there are."""
    readable = callable(source) or any(hasattr(source, name) for name in ("fetch", "__iter__", "__getitem__"))
    if isinstance(source, str | bytes) or not readable:
        raise ParameterError(f"{FORMS}: not {type(source).__name__}")


def whole_arrays(given: object) -> tuple[Inputs, Array] | None:
    """(inputs, labels), if that is what it is. In a list, two pairs look the same unless the labels are an array."""
    if isinstance(given, tuple) and len(given) == 2:
        return given
    if isinstance(given, list) and len(given) == 2 and isinstance(given[1], np.ndarray) and given[1].shape[:1] != (2,):
        return given[0], given[1]
    return None


def examples_of(source: Source, manifest: Manifest) -> Examples:
    """The examples, for a model with this manifest.

    Raises ParameterError that names what is missing or not of one length, or what the callable raised; so does the
    result's `fetch`.
    """
    try:
        return _Blamed(_examples_of(source, manifest))
    except SordinoError:
        raise
    except Exception as error:
        raise ParameterError(f"the examples: {type(error).__name__}: {error}") from error


class _Blamed:
    """Examples whose own errors are told apart from the trainer's."""

    def __init__(self, examples: Examples) -> None:
        self._examples, self._size = examples, len(examples)

    def __len__(self) -> int:
        return self._size

    def fetch(self, indices: NDArray[np.int64]) -> tuple[Sequence[Array], Array]:
        try:
            return self._examples.fetch(indices)
        except SordinoError:
            raise
        except Exception as error:
            raise ParameterError(f"the examples: {type(error).__name__}: {error}") from error


def _examples_of(source: Source, manifest: Manifest) -> Examples:
    given = cast("Given", source() if callable(source) and not hasattr(source, "fetch") else source)
    check_form(given)
    if hasattr(given, "fetch"):
        return cast("Examples", given)
    if isinstance(given, Mapping):
        names = [tensor.name for tensor in manifest.inputs]
        for name in (*names, manifest.label.name):
            if name not in given:
                raise ParameterError(f"the examples have no array {name!r}: {', '.join(sorted(given))}")
        return ArrayExamples([_array(given[name]) for name in names], _array(given[manifest.label.name]))
    whole = whole_arrays(given)
    if whole is not None:
        return ArrayExamples(_columns(whole[0], manifest), _array(whole[1]))
    return _stacked(cast("Iterable[object]", given), manifest)


def _array(given: Inputs) -> Array:
    """A list as an array. What is neither stays as it is: a memory map of another library need not fit into memory."""
    return np.asarray(given) if isinstance(given, tuple | list) else cast("Array", given)


def _columns(inputs: Inputs, manifest: Manifest) -> list[Array]:
    if not isinstance(inputs, tuple | list):
        return [cast("Array", inputs)]
    dimensions = len(manifest.inputs[0].shape) + 1
    if len(manifest.inputs) == 1 and not (inputs and all(np.ndim(part) == dimensions for part in inputs)):
        return [np.asarray(inputs)]  # the rows of one input
    return [_array(part) for part in inputs]


def _stacked(pairs: Iterable[object], manifest: Manifest) -> ArrayExamples:
    tensors = (*manifest.inputs, manifest.label)
    columns: list[list[Array]] = [[] for _ in tensors]
    for pair in pairs:
        try:
            x, y = cast("tuple[Inputs, Array]", pair)
            parts = (x, y) if len(manifest.inputs) == 1 else (*x, y)
        except (TypeError, ValueError) as error:
            raise ParameterError(FORMS) from error
        if len(parts) != len(tensors):
            raise ParameterError(f"an example has {len(parts) - 1} inputs, the model {len(manifest.inputs)}")
        for column, value in zip(columns, parts, strict=True):
            column.append(np.asarray(value))
    empty = not columns[0]
    arrays = [
        np.empty((0, *tensor.shape), tensor.dtype) if empty else np.stack(column)
        for tensor, column in zip(tensors, columns, strict=True)
    ]
    return ArrayExamples(arrays[:-1], arrays[-1])


def invalid_among(sums: Metrics) -> str:
    """How many of the examples that were trained on did not count, in words for their owner."""
    total = sums.count + sums.invalid
    return f"{sums.invalid:.0f} of {total:.0f} examples drawn have values that are not finite, and count nothing"


class NoRoom(SordinoError):
    """The disk does not hold what the round needs. Nothing was charged: look again when there is room."""


class CannotSend(SordinoError):
    """A contribution that is stored may never leave: drop it and wait for the next round."""


def read_bundle(path: Path, task: str, policy: Policy, max_bytes: int) -> Bundle:
    """The bundle in a file, if one of the publishers that the policy lists for the task signed it.

    The signature is verified before anything in it is parsed. Raises PeerError that names the fault.
    """
    return Bundle.read(path, *policy.publishers_of(task), max_bytes=max_bytes)


def check_fits(round_: Round, bundle: Bundle) -> None:
    """Return if the ticket asks for what this bundle does, else raise PeerError that names the ticket's field."""
    ticket, manifest = round_.ticket, bundle.manifest
    if bundle.hash != ticket.bundle:
        raise PeerError(f"ticket: bundle {ticket.bundle.hex()[:16]}, but what came is {bundle.hash.hex()[:16]}")
    if manifest.unit != ticket.noise.unit:
        raise PeerError(f'ticket: noise.unit is "{ticket.noise.unit}", but the bundle is for unit "{manifest.unit}"')
    length = dimension_of(manifest, round_)
    if ticket.dimension != length:
        raise PeerError(f"ticket: dimension {ticket.dimension}, but the bundle's vector has {length}")
    if ticket.work.proximal > 0 and not manifest.options.proximal:
        raise PeerError("ticket: work.proximal is above 0, but the bundle has no proximal term")


def stored_bytes(round_: Round, manifest: Manifest | None) -> int:
    """What storing a contribution to the round takes on disk: the masked vector, the shares, and for unit "device" the
    local parameters, in the state and for a moment in its journal too.

    Public numbers, so that whoever sees a device wait for room learns nothing of its data.
    manifest: of the ticket's bundle; None, before it is here, leaves the local parameters to what is spared.
    """
    local = 0
    if manifest is not None and round_.ticket.noise.unit == "device":
        local = 4 * sum(parameter.size for parameter in manifest.of_role("local"))
    return round_.layout.masked_bytes + round_.share_bytes * round_.thresholds.members + 2 * local


def dimension_of(manifest: Manifest, round_: Round) -> int:
    """Integers in this round's vector for a bundle: the shared parameters and the metrics, if the plan has any."""
    return manifest.dimension + (METRICS if round_.ticket.noise.metric_scale else 0)


def read_parameters(content: bytes, expected: bytes, manifest: Manifest) -> F32:
    """Shared parameters, float32 (d,), from their little-endian bytes, if these are the ones of that hash.

    A read-only view of `content` where the machine's order is theirs.  Raises PeerError on another hash or length.
    """
    if content_hash(content) != expected:
        raise PeerError(f"parameters: not those of hash {expected.hex()[:16]}")
    if len(content) != 4 * manifest.dimension:
        raise PeerError(f"parameters: {len(content)} bytes, but the bundle's vector has {4 * manifest.dimension}")
    return np.frombuffer(content, dtype="<f4").astype(np.float32, copy=False)


class Contributing:
    """One task on this device. The state that it holds is the one that is stored."""

    def __init__(
        self,
        task: str,
        source: Source,
        store: Store,
        entropy: Entropy,
        *,
        bundle: bytes | None = None,
        threads: int = 1,
    ) -> None:
        """bundle: hash of the only bundle that is taken for the task; None for any of its publishers'."""
        self.task = task
        self._source, self._store, self._entropy = source, store, entropy
        self._pinned, self._threads = bundle, threads
        self.state: Idle | Sent = store.contributor(task)

    def enter(
        self,
        round_: Round,
        rules: Rules,
        manifest: Manifest | None,
        now_s: float,
        check_room: Callable[[Round], None],
    ) -> Training | None:
        """Take a round's ticket: every check that needs no download, and then the coin. None if the coin says no.

        manifest: of the ticket's bundle, if it is here already.  check_room: raises NoRoom if the disk is too full for
        the round; asked last, and not once the coin is tossed, which is charged whatever comes after it.
        Raises PeerError on a ticket that is wrong or that the policy refuses, BudgetExceeded, RoundAborted if it has
        closed, LedgerDamaged or ParameterError from the ledger. After any of them the round was not entered.
        """
        if isinstance(self.state, Sent):
            raise PeerError(f"ticket: the contribution to round {self.state.round.ticket.round} is still on its way")
        ticket = round_.ticket
        terms = rules.policy.terms(ticket.task, self._pinned or ticket.bundle)
        if manifest is not None:
            terms = replace(terms, dimension=dimension_of(manifest, round_))
        training = self.state.on_ticket(round_, terms, now_s)
        rules.policy.check_round(round_)
        # A ticket that was entered is stored nowhere but in the ledger: another one of its round is refused by that.
        for drawn in rules.ledger.account.draws.values():
            if drawn.task == ticket.task and drawn.round >= ticket.round and drawn.tid != round_.tid:
                kind = "the same round again" if drawn.round == ticket.round else "a round before the last one"
                raise PeerError(f"ticket: round {ticket.round} is {kind}: the ledger holds another ticket's coin")
        release = Release.of(mechanism_of(round_), sampling_of(round_))
        if round_.tid not in rules.ledger.account.draws:
            check_room(round_)
        operator = round_.epoch.frozen.coordinator
        coin = self._entropy(32)
        if rules.ledger.draw(ticket.task, ticket.round, round_.tid, operator, release, coin, int(now_s)):
            return training
        self.leave(training)
        return None

    def check(self, round_: Round, rules: Rules) -> None:
        """Return if the owner still allows a round that was entered, else raise PeerError that names what is not."""
        rules.policy.terms(self.task, self._pinned or round_.ticket.bundle).check(round_)
        rules.policy.check_round(round_)

    def contribute(
        self,
        training: Training,
        device: Enrolled,
        bundle: Bundle,
        parameters: Path,
        ledger: Ledger,
        now: Callable[[], float],
        should_stop: Callable[[], bool],
        warn: Callable[[str], None],
    ) -> Sent:
        """Train, encode, mask, store. When this returns the contribution is durable; `charge` comes next.

        bundle: from `read_bundle`.  parameters: the file of the ticket's, as they came.  now: Unix seconds.
        should_stop: asked between batches, besides the ticket's own end.  warn: hears that examples count for
        nothing, for the owner alone: what is sent looks the same.
        Raises PeerError if bundle, parameters and ticket do not fit together or the graph misbehaves; RoundAborted if
        it was stopped or the round closed; ParameterError on wrong examples; OSError from the disk. Nothing was sent
        then.
        """
        round_ = training.round
        check_fits(round_, bundle)
        mechanism = mechanism_of(round_)

        def stop() -> bool:
            return now() >= round_.ticket.closes_s or should_stop()

        vector, metrics, local = self._run(round_.ticket, mechanism, bundle, parameters, stop, warn)
        give_back_freed()
        noisy = metrics if mechanism.metric_scale else None
        integers = encode(mechanism, vector, noisy, round_.tid, self._entropy(32))
        del vector  # before the mask, which takes several times its size
        anchor = Anchor(*ledger.head)
        sent = training.contribute(integers, device, anchor, self._entropy(32), encapsulate, now())
        self._store.save_contribution(sent, local)
        self.state = sent
        give_back()
        return sent

    def _run(
        self,
        ticket: Ticket,
        mechanism: Mechanism,
        bundle: Bundle,
        parameters: Path,
        stop: Callable[[], bool],
        warn: Callable[[str], None],
    ) -> tuple[F64, MetricSums, dict[str, F32]]:
        """Training, and the local parameters after it, flat. The trainer's memory is free before noise and mask ask for
        theirs."""
        from edge_sdk.training.onnx import OnnxTrainer  # 30 MB that a device without a round need not hold

        trainer = OnnxTrainer(bundle, self._threads)
        give_back()  # 20 MB of code made the session, and is not called again before the next round
        # Read here and bound to no name: neither the file's bytes nor the vector lie beside the trainer's own copy.
        trainer.load_shared(read_parameters(parameters.read_bytes(), ticket.parameters, bundle.manifest))
        kept = self._store.local(self.task, bundle.hash)
        if kept:
            table = bundle.manifest.of_role("local")
            trainer.load_local({p.name: kept[p.name].reshape(p.shape) for p in table})
        vector, metrics = self._train(ticket, mechanism, trainer, stop, warn)
        # Unit "example" leaves local parameters as they are: there is nothing to keep.
        local = trainer.local() if ticket.noise.unit == "device" else {}
        return vector, metrics, {name: value.reshape(-1) for name, value in local.items()}

    def _train(
        self,
        ticket: Ticket,
        mechanism: Mechanism,
        trainer: Trainer,
        stop: Callable[[], bool],
        warn: Callable[[str], None],
    ) -> tuple[F64, MetricSums]:
        """What goes into the vector, float64 (d,), and the metrics beside it."""
        examples = examples_of(self._source, trainer.manifest)
        if not len(examples):
            warn(f"{self.task}: there are no examples: noise alone is sent")
        noise, work = ticket.noise, ticket.work
        if noise.unit == "example":
            drawn = poisson_sample(len(examples), noise.example_rate, self._entropy(32))
            found = trainer.clipped_sum(
                examples,
                drawn,
                clip=noise.clip,
                loss_bound=noise.loss_bound,
                window=window_for(trainer.manifest.batch, noise.example_rate),
                should_stop=stop,
            )
            sums = found.metrics
            self._warn_of_invalid(sums, warn)
            unclipped = sums.count - sums.clipped
            return found.gradient, MetricSums(sums.count, sums.correct, sums.loss, unclipped)
        vector: NDArray[np.float64] = np.zeros(mechanism.dimension)
        sums = _nothing()
        if len(examples):  # without any the device sends noise: going silent would tell
            update = trainer.train(
                examples,
                lr=work.learning_rate,
                entropy=self._entropy(32),
                epochs=work.epochs or None,
                steps=work.steps or None,
                mu=work.proximal,
                should_stop=stop,
            )
            self._warn_of_invalid(update.metrics, warn)
            if update.diverged:
                warn(f"{self.task}: training diverged: noise alone is sent")
            # Before clipping, so that no weight makes one device count for more than the clip.
            weight = min(1.0, len(examples) / work.weight_cap) if work.weight_cap else 1.0
            vector, sums = update.delta.astype(np.float64) * weight, update.metrics
        return vector, device_metrics(mechanism, vector, sums.count, sums.correct, sums.loss)

    def _warn_of_invalid(self, sums: Metrics, warn: Callable[[str], None]) -> None:
        if sums.invalid:
            alone = "" if sums.count else ": noise alone is sent"
            warn(f"{self.task}: {invalid_among(sums)}{alone}")

    def charge(self, ledger: Ledger, now_s: float) -> Sent:
        """Charge the stored contribution, once, however often this is called: afterwards it may be sent.

        Raises CannotSend if it never may; ParameterError, LedgerDamaged or OSError if the ledger cannot be used now.
        """
        if not isinstance(self.state, Sent):
            raise ParameterError(f"{self.task}: there is no contribution to charge")
        tid, header = self.state.round.tid, message_hash(Header, self.state.contribution.header.body)
        draw = ledger.account.draws.get(tid)
        if draw is None or not draw.takes_part:
            raise CannotSend("the ledger knows no coin for it: the ledger was replaced, or the state was")
        if ledger.account.sends.get(tid, header) != header:
            raise CannotSend("another contribution to this round is charged already: this state was rolled back")
        try:
            ledger.charge(tid, header, int(now_s))
        except BudgetExceeded as error:
            raise CannotSend(f"the budget was spent since the coin was tossed: {error}") from error
        return self.state

    def answer(self, data: bytes, now_s: float) -> None:
        """A receipt or an abort for the contribution that was sent: forget it. Raises PeerError if it is not for it."""
        if not isinstance(self.state, Sent):
            raise PeerError(f"{self.task}: no contribution is on its way")
        round_ = self.state.round
        after = contributor.step(self.state, data, round_.epoch, contributor.Terms(round_.ticket.bundle), now_s)
        if isinstance(after, Idle):
            self._settle(after)

    def leave(self, state: Training | Sent) -> None:
        """Give the round up, for good: it stays taken."""
        self._settle(state.give_up())

    def _settle(self, state: Idle) -> None:
        self._store.save_idle(state)
        self.state = state


def _nothing() -> Metrics:
    from edge_sdk.training.trainer import Metrics

    return Metrics()
