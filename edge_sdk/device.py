"""A device, for people who embed it: join, register examples, run; the one place where transport, trainer, store and
protocol meet (docs/device.md).

    device = Device("/var/lib/sordino")
    device.join(token)
    device.register("keywords", examples=(windows, labels))
    device.run()                        # a service, or
    device.run_once(max_seconds=300)    # one wake-up: connect, do what is due, leave
    device.predict("keywords", window)  # with the newest model, online or not

One thread does it all, over `transport.receive`. While it trains it looks at what came between two batches, so that a
committee member answers although its own model takes long.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edge_sdk import events
from edge_sdk.clock import Clock
from edge_sdk.config import Config, TaskName, examples_source
from edge_sdk.contributing import Contributing, Source, check_form
from edge_sdk.crypto.hashing import HASH_BYTES
from edge_sdk.errors import ParameterError, SordinoError, TransportError
from edge_sdk.events import Event
from edge_sdk.fetching import Fetches
from edge_sdk.memory import give_back
from edge_sdk.rules import RulesFile
from edge_sdk.serving import Serving
from edge_sdk.store import Outcome, Store, read_outcomes
from edge_sdk.transport import Transport

if TYPE_CHECKING:
    from edge_sdk.enrolment import Membership
    from edge_sdk.training.trainer import F32

from edge_sdk.loop import Loop, Parts
from edge_sdk.models import Predictor, read_identity

log = logging.getLogger(__name__)

LINGER_S = 2.0
"""How long a wake-up stays after the last frame: a letter that answers ours may be on its way."""
PATIENCE_S = 1.0
"""The longest wait at once: how soon a service ends when it is asked to."""
RENEWAL_S = 6 * 3600.0
"""Between two looks at the certificate's age."""


@dataclass(frozen=True)
class WakeUp:
    """What `run_once` did. reason: why it left: "done", "time is up", "no connection" or "stopped"."""

    reason: str
    seconds: float
    events: tuple[Event, ...]

    def count(self, kind: type[Event]) -> int:
        """How many events of a kind there were."""
        return sum(isinstance(event, kind) for event in self.events)


class CallbackFailed(SordinoError):
    """`on_event` or `conditions` raised: the embedding program's fault. `__cause__` is what it raised."""


def _nothing(event: Event) -> None:
    """The hook that hears nothing."""


def _always() -> str | None:
    """Conditions that always allow training."""
    return None


class _Callbacks:
    """What the embedding program has us call. An OSError of its own (a full log, a closed pipe) would look like our
    disk's or the network's, which are tried again for ever; so what a callback raises is kept, and ends the run when
    the turn is over: nothing that is half done is cut short."""

    def __init__(self, on_event: Callable[[Event], None], conditions: Callable[[], str | None]) -> None:
        self._on_event, self._conditions = on_event, conditions
        self._failure: CallbackFailed | None = None

    @property
    def failed(self) -> bool:
        """Whether one raised. None is called again."""
        return self._failure is not None

    def emit(self, event: Event) -> None:
        if not self.failed:
            try:
                self._on_event(event)
            except Exception as error:  # noqa: BLE001  # it is raised by `check`
                self._fail("on_event", error)

    def conditions(self) -> str | None:
        if not self.failed:
            try:
                return self._conditions()
            except Exception as error:  # noqa: BLE001  # it is raised by `check`
                self._fail("conditions", error)
        return "a callback failed"

    def check(self) -> None:
        """Raises CallbackFailed if one raised."""
        if self._failure is not None:
            raise self._failure

    def _fail(self, name: str, error: Exception) -> None:
        self._failure = CallbackFailed(f"{name}: {type(error).__name__}: {error}")
        self._failure.__cause__ = error


@dataclass
class _Registered:
    source: Source
    bundle: bytes | None


class Device:
    """A device with its directory. `run`, `run_once` and `join` are one thread's; `predict` and `stop` are anyone's."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        config: Config | None = None,
        *,
        on_event: Callable[[Event], None] = _nothing,
        conditions: Callable[[], str | None] = _always,
        connect: Callable[[], Transport] | None = None,
        clock: Clock | None = None,
        entropy: Callable[[int], bytes] = os.urandom,
    ) -> None:
        """directory: of this device alone.  config: in place of its device.toml.

        on_event: called with every event, in the thread that runs.  conditions: why this device may not train now (not
        charging, too warm), or None; asked before a round and between batches.  connect: another transport than MQTT.
        clock, entropy: for tests.  What on_event or conditions raises ends `run` and `run_once`, as CallbackFailed.
        Raises ParameterError on a device.toml that cannot be read.
        """
        self.directory = Path(directory)
        self.config = Config.read(self.directory) if config is None else config
        self._on_event, self._conditions, self._connect = on_event, conditions, connect
        self._clock, self._entropy = clock or Clock(), entropy
        self._registered: dict[str, _Registered] = {}
        self._stop = threading.Event()
        self._predictor: Predictor | None = None
        self._predicting = threading.Lock()
        for task, entry in self.config.tasks.items():
            pinned = None if entry.bundle is None else bytes.fromhex(entry.bundle)
            self._registered[task] = _Registered(examples_source(self.directory, entry.examples), pinned)

    def join(self, token: str, tasks: tuple[str, ...] = ()) -> Membership:
        """Join the fleet that the token invites to, once; repeating it is harmless. See `edge_sdk.enrolment.join`.

        tasks: names of those that the owner allows from the start, besides the registered ones. A directory that has
        joined is left as it is: its owner may have struck one of them from policy.toml since.
        """
        from edge_sdk import enrolment

        names = dict.fromkeys((*self._registered, *tasks))
        return enrolment.join(self.directory, token, tuple(names))

    def register(self, task: str, examples: Source, *, bundle: bytes | None = None) -> None:
        """Offer examples for a task. policy.toml still says whether the task is allowed.

        examples: `Examples`; arrays by input name and "y"; (inputs, labels); pairs of one example each; or a callable
        that gives any of these, called for each round.  bundle: hash of the only bundle to train; None for any that one
        of the task's publishers signed.
        Raises ParameterError on what is no task's name, no form of examples or no hash.
        """
        try:
            msgspec.convert(task, TaskName)
        except msgspec.ValidationError as error:
            raise ParameterError(f"{task!r} is no task's name: {error}") from error
        check_form(examples)
        if isinstance(examples, Iterator):
            raise ParameterError("examples: an iterator gives its pairs to one round only: give a list, or a callable")
        if bundle is not None and not (isinstance(bundle, bytes) and len(bundle) == HASH_BYTES):
            raise ParameterError(f"bundle: its hash is {HASH_BYTES} bytes, not {bundle!r}")
        self._registered[task] = _Registered(examples, bundle)

    def stop(self) -> None:
        """Ask `run` or `run_once` to end, from any thread or a signal handler: it does within about a second.

        If none goes on, the next one ends at once. The one after that runs again.
        """
        self._stop.set()

    def run(self) -> None:
        """Be a device until `stop`.

        Raises ParameterError if it has not joined, StoreDamaged, LedgerDamaged, CallbackFailed.
        """
        callbacks = _Callbacks(self._on_event, self._conditions)
        with self._loop(callbacks, self._stop.is_set) as loop:
            looked_s = -RENEWAL_S
            while not (self._stop.is_set() or callbacks.failed):
                if self._clock.monotonic_s() - looked_s >= RENEWAL_S:
                    looked_s = self._clock.monotonic_s()
                    self._renew(callbacks.emit)
                loop.turn(PATIENCE_S)
            loop.leave()
        callbacks.check()

    def run_once(self, max_seconds: float = 300.0, *, linger_s: float = LINGER_S) -> WakeUp:
        """One wake-up: connect, say hello, do what is due, leave. For cron, timers and phone job schedulers.

        max_seconds: leave by then, also in the middle of training (nothing is lost but the training).  linger_s: stay
        so long after the last frame came.  Errors as `run`.
        """
        seen: list[Event] = []

        def note(event: Event) -> None:
            seen.append(event)
            self._on_event(event)

        callbacks = _Callbacks(note, self._conditions)
        started_s = self._clock.monotonic_s()
        ends_s = started_s + max_seconds

        def over() -> bool:
            return self._stop.is_set() or self._clock.monotonic_s() >= ends_s

        reason = ""
        self._renew(callbacks.emit)
        with self._loop(callbacks, over) as loop:
            while not (reason or callbacks.failed):
                left_s = ends_s - self._clock.monotonic_s()
                quiet_s = self._clock.monotonic_s() - loop.last_frame_s
                if self._stop.is_set():
                    reason = "stopped"
                elif left_s <= 0:
                    connected = any(isinstance(event, events.Online) for event in seen)
                    reason = "time is up" if connected else "no connection"
                elif loop.welcomed and not loop.busy and quiet_s >= linger_s:
                    reason = "done"
                else:
                    until_quiet_s = linger_s - quiet_s if loop.welcomed and not loop.busy else PATIENCE_S
                    loop.turn(min(left_s, PATIENCE_S, max(until_quiet_s, 0.0)))
            loop.leave()
        callbacks.check()
        return WakeUp(reason, round(self._clock.monotonic_s() - started_s, 3), tuple(seen))

    def predict(self, task: str, *inputs: Any) -> F32:
        """The newest model's output, float32 (n, *output shape), for n examples; works offline and beside `run`.

        inputs: one array for each input of the model, n rows each, or lists of numbers.
        Raises ParameterError on wrong inputs, or if no model of the task is here yet.
        """
        with self._predicting:
            if self._predictor is None:
                self._predictor = Predictor(self.directory, self.config.max_download_mb << 20, self.config.threads)
            return self._predictor.trainer(task).predict(*inputs)

    @property
    def status(self) -> dict[str, Outcome]:
        """What became of each task's last ticket. Raises OSError if there is no state yet."""
        return read_outcomes(self.directory)

    @contextmanager
    def _loop(self, callbacks: _Callbacks, over: Callable[[], bool]) -> Iterator[Loop]:
        from edge_sdk.enrolment import Membership

        membership = Membership.read(self.directory)
        identity = read_identity(self.directory)
        if identity.public_key.hex() != membership.device:
            raise ParameterError("identity.key is not the key that this device enrolled with")
        fleet, helper = bytes.fromhex(membership.authority), membership.role == "helper"
        with ExitStack() as stack:
            stack.callback(self._stop.clear)  # it is this run's, also where it came when the run had ended by itself
            store = stack.enter_context(Store(self.directory, identity.public_key, fleet))
            rules = RulesFile(self.directory, identity.public_key, store)
            stack.callback(rules.close)
            tasks: dict[str, Contributing] = {}
            if self._registered and not helper:
                with suppress(ParameterError, OSError):  # a policy may be mended while the device runs; a ledger not
                    rules.read()
                for task, entry in self._registered.items():
                    tasks[task] = Contributing(
                        task, entry.source, store, self._entropy, bundle=entry.bundle, threads=self.config.threads
                    )
            serving = Serving(identity, fleet, store, self._entropy, spare_prekeys=self.config.spare_prekeys)
            transport = self._connect() if self._connect is not None else self._mqtt(membership)
            stack.callback(transport.close)
            max_bytes = self.config.max_download_mb << 20
            fetches = Fetches(self.directory / "blobs", max_bytes, self._jitter)
            loop = Loop(
                Parts(
                    identity=identity,
                    fleet=fleet,
                    coordinator=bytes.fromhex(membership.coordinator),
                    store=store,
                    serving=serving,
                    tasks=tasks,
                    rules=rules,
                    transport=transport,
                    fetches=fetches,
                    max_bundle_bytes=max_bytes,
                    would_serve=self.config.serve or helper,
                    clock=self._clock,
                    jitter=self._jitter,
                    conditions=callbacks.conditions,
                    emit=callbacks.emit,
                    stopping=lambda: callbacks.failed or over(),
                )
            )
            stack.callback(loop.close)
            give_back()  # what started it is not called again
            try:
                yield loop
            except TransportError as error:
                callbacks.emit(events.Offline(str(error)))
                raise

    def _mqtt(self, membership: Membership) -> Transport:
        from edge_sdk.transport.mqtt import Credentials, MqttTransport

        credentials = Credentials(self.directory / "ca.pem", self.directory / "tls.pem", self.directory / "tls.key")
        return MqttTransport(self.config.broker or membership.broker, membership.device, credentials)

    def _renew(self, emit: Callable[[Event], None]) -> None:
        """A fresh certificate, if the old one nears its end. Without one it goes on with the old."""
        from edge_sdk import enrolment

        if not (self.directory / "tls.pem").exists():
            return
        try:
            if enrolment.renewal_due(self.directory, self._clock.time_s()):
                enrolment.renew(self.directory)
        except (SordinoError, OSError) as error:
            log.warning("the certificate could not be renewed: %s", error)
            emit(events.Warned(f"the certificate could not be renewed: {error}"))

    def _jitter(self) -> float:
        return int.from_bytes(self._entropy(4), "little") / 2**32
