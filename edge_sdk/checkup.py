"""What a device's directory tells about the device: its status, and whether everything is as it has to be.

Nothing here changes anything or asks for a lock, so it works beside a device that runs.
"""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import numpy as np

from edge_sdk.config import Config, examples_source
from edge_sdk.contributing import examples_of, invalid_among, read_bundle, read_parameters, whole_arrays
from edge_sdk.enrolment import Membership
from edge_sdk.errors import ParameterError, SordinoError
from edge_sdk.ledger import Ledger
from edge_sdk.models import read_identity
from edge_sdk.privacy.ledger_entry import Summary
from edge_sdk.protocol.messages import Epoch, Signed, decode
from edge_sdk.rules import check_remembers, head_in, read_policy, read_shown
from edge_sdk.store import Outcome, glance, read_model, read_outcomes, read_positions, read_waiting
from edge_sdk.transport.wire import Model

LEAST_DISK_BYTES = 64 << 20
"""Free space below which `doctor` complains: a ledger that cannot grow ends this device's rounds."""
NETWORK_S = 10.0
_PORTS = {"mqtts": 8883, "wss": 443}
_PRIVATE = ("identity.key", "tls.key", "state.db", "ledger")


class TaskStatus(msgspec.Struct, frozen=True):
    """One task. examples: whether this device has any.  allowed: whether policy.toml lists it.

    round: the newest that a ticket was taken of.  waiting: the one whose contribution waits for its receipt.
    model: rounds in the newest model that is here.  last: what became of the last ticket.
    """

    task: str
    examples: bool
    allowed: bool
    round: int | None
    waiting: int | None
    model: int | None
    last: Outcome | None


class Status(msgspec.Struct, frozen=True):
    """A device at a glance."""

    fleet: str
    role: str
    device: str
    broker: str
    epoch: int | None
    coordinator: str
    spare_prekeys: int
    open_sessions: int
    tasks: tuple[TaskStatus, ...]


def status(directory: Path) -> Status:
    """Raises ParameterError if it has not joined or a file cannot be read, StoreDamaged."""
    membership, config = Membership.read(directory), Config.read(directory)
    policy = read_policy(directory) if membership.role == "device" else None
    if (directory / "state.db").exists():
        seen, outcomes = glance(directory), read_outcomes(directory)
    else:
        seen, outcomes = None, {}
    allowed = set(policy.tasks) if policy is not None else set()
    names = sorted({*config.tasks, *allowed, *outcomes, *(seen.positions if seen is not None else ())})
    epoch = None
    if seen is not None and seen.epoch is not None:
        epoch = decode(Epoch, seen.epoch.body).frozen.number
    tasks = []
    for name in names:
        model = None
        if seen is not None and name in seen.models:
            model = decode(Model, decode(Signed, seen.models[name]).body).round
        tasks.append(
            TaskStatus(
                task=name,
                examples=name in config.tasks,
                allowed=name in allowed,
                round=None if seen is None else seen.positions.get(name),
                waiting=None if seen is None else seen.waiting.get(name),
                model=model,
                last=outcomes.get(name),
            )
        )
    return Status(
        fleet=membership.fleet,
        role=membership.role,
        device=membership.device,
        broker=config.broker or membership.broker,
        epoch=epoch,
        coordinator=membership.coordinator,
        spare_prekeys=0 if seen is None else seen.spare_prekeys,
        open_sessions=0 if seen is None else seen.open_sessions,
        tasks=tuple(tasks),
    )


def ledger_summary(directory: Path) -> Summary:
    """What this device spent, from a copy of its ledger: the ledger itself may be in use.

    Raises ParameterError if it has not joined or on a policy that cannot be read, LedgerDamaged.
    """
    with _ledger_copy(directory) as ledger:
        return ledger.summary()


@contextmanager
def _ledger_copy(directory: Path) -> Iterator[Ledger]:
    owner, policy = read_identity(directory).public_key, read_policy(directory)
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / "ledger"
        if (directory / "ledger").exists():
            shutil.copyfile(directory / "ledger", copy)  # append-only: a copy is the ledger of a moment ago
        with Ledger(copy, owner, policy.protects, policy.lifetime, policy.task_limits) as ledger:
            yield ledger


class Finding(msgspec.Struct, frozen=True):
    """One thing that `doctor` looked at. ok: None where it could not be told, and why is in `detail`."""

    check: str
    ok: bool | None
    detail: str


def doctor(directory: Path) -> Iterator[Finding]:
    """Every check, in an order in which the first that fails is the one to mend."""
    checks: tuple[tuple[str, Callable[[Path], str]], ...] = (
        ("directory", _check_modes),
        ("membership", _check_membership),
        ("certificate", _check_certificate),
        ("disk", _check_disk),
        ("policy", _check_policy),
        ("ledger", _check_ledger),
        ("state", _check_state),
        ("broker", _check_broker),
        ("examples", _check_examples),
        ("training", _check_training),
    )
    for name, check in checks:
        try:
            yield Finding(name, True, check(directory))
        except _Unknown as error:
            yield Finding(name, None, str(error))
        except (SordinoError, OSError) as error:
            yield Finding(name, False, str(error))


class _Unknown(Exception):
    """A check that has nothing to look at yet."""


def _check_modes(directory: Path) -> str:
    owner = (
        directory.stat().st_uid if os.geteuid() == 0 and directory.is_dir() else os.geteuid()
    )  # root looks at anyone's
    open_to_others = []
    for path, wrong in ((directory, 0o077), *((directory / name, 0o077) for name in _PRIVATE)):
        try:
            found = path.stat()
        except FileNotFoundError:
            continue
        if stat.S_IMODE(found.st_mode) & wrong:
            mode = "700" if path == directory else "600"
            open_to_others.append(f"{path} can be read by others: chmod {mode} it")
        if found.st_uid != owner:
            open_to_others.append(f"{path} belongs to another user")
    if open_to_others:
        raise ParameterError("; ".join(open_to_others))
    if not directory.is_dir():
        raise ParameterError(f"there is no directory {directory}")
    return "readable by its owner only"


def _check_membership(directory: Path) -> str:
    membership = Membership.read(directory)
    if read_identity(directory).public_key.hex() != membership.device:
        raise ParameterError("identity.key is not the key that this device enrolled with")
    return f"{membership.role} {membership.device[:16]} of {membership.fleet}"


def _check_certificate(directory: Path) -> str:
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import serialization

    from edge_sdk.crypto.hashing import content_hash

    membership = Membership.read(directory)
    try:
        certificate = x509.load_pem_x509_certificate((directory / "tls.pem").read_bytes())
        ca = x509.load_pem_x509_certificate((directory / "ca.pem").read_bytes())
        key = serialization.load_pem_private_key((directory / "tls.key").read_bytes(), None)
    except (ValueError, TypeError) as error:
        raise ParameterError(f"tls.pem, ca.pem or tls.key cannot be read: {error}") from error
    if content_hash(ca.public_bytes(serialization.Encoding.DER)).hex() != membership.ca:
        raise ParameterError("ca.pem is not the certificate that this device's token pinned")
    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise ParameterError("tls.pem was not issued by ca.pem") from error
    names = [str(name.value) for name in certificate.subject if name.oid == x509.NameOID.COMMON_NAME]
    if certificate.public_key() != key.public_key() or names != [membership.device]:
        raise ParameterError("tls.pem, tls.key and identity.key do not belong together")
    now_s = time.time()
    start_s, end_s = certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()
    if now_s < start_s:
        raise ParameterError("the clock is before the certificate's first day: set the clock (`timedatectl`)")
    if now_s >= end_s:
        raise ParameterError("the certificate has expired, or the clock is wrong: join again with a new token")
    return f"valid for {(end_s - now_s) / 86_400:.0f} days more"


def _check_disk(directory: Path) -> str:
    free = shutil.disk_usage(directory).free
    if free < LEAST_DISK_BYTES:
        raise ParameterError(f"{free >> 20} MB are free, {LEAST_DISK_BYTES >> 20} are needed")
    return f"{free >> 20} MB free"


def _check_policy(directory: Path) -> str:
    membership, config = Membership.read(directory), Config.read(directory)
    if membership.role == "helper":
        raise _Unknown("a helper has no tasks")
    policy = read_policy(directory)
    if membership.authority not in policy.authorities or membership.coordinator not in policy.operators:
        raise ParameterError("policy.toml does not list the authority and operator that this device enrolled with")
    for task in config.tasks:
        if task not in policy.tasks:
            raise ParameterError(f"device.toml has examples for {task}, but policy.toml has no [tasks.{task}]")
    return f"allows {', '.join(sorted(policy.tasks)) or 'no task'}"


def _check_ledger(directory: Path) -> str:
    if Membership.read(directory).role == "helper":
        raise _Unknown("a helper spends nothing")
    owner = read_identity(directory).public_key
    # Before the copy: a device that runs adds to its ledger first.
    positions, shown = read_positions(directory), read_shown(directory, owner)
    heads = [head_in(header, owner) for header in read_waiting(directory)]
    with _ledger_copy(directory) as ledger:
        check_remembers(ledger, positions)
        for head in heads if shown is None else [shown, *heads]:
            ledger.check_extends(head)
        return f"{ledger.head.entries} entries, every link is right"


def _check_state(directory: Path) -> str:
    if not (directory / "state.db").exists():
        raise _Unknown("the device has not run yet")
    seen = glance(directory)
    return f"{seen.spare_prekeys} prekeys offered, {len(seen.waiting)} contributions wait for a receipt"


def _check_broker(directory: Path) -> str:
    from edge_sdk.transport.mqtt import Credentials

    config = Config.read(directory)
    url = config.broker or Membership.read(directory).broker
    parts = urlsplit(url)
    if parts.scheme not in _PORTS or parts.hostname is None:
        raise ParameterError(f"the broker's URL is {url!r}: mqtts://HOST:PORT or wss://HOST:PORT/PATH")
    context = Credentials(directory / "ca.pem", directory / "tls.pem", directory / "tls.key").context()
    started_s = time.monotonic()
    address = (parts.hostname, parts.port or _PORTS[parts.scheme])
    try:
        with (
            socket.create_connection(address, NETWORK_S) as plain,
            context.wrap_socket(plain, server_hostname=parts.hostname) as link,
        ):
            version, took_s = link.version(), time.monotonic() - started_s
            # With TLS 1.3 a broker that refuses our certificate says so after the handshake.
            link.settimeout(1.0)
            try:
                refused = link.recv(1) == b""
            except TimeoutError:
                refused = False
    except ssl.SSLError as error:
        raise ParameterError(f"{url}: {error.reason or error}") from error
    except OSError as error:
        raise ParameterError(f"{url} cannot be reached: {error}") from error
    if refused:
        raise ParameterError(f"{url} closed the connection: this device's certificate may be revoked")
    return f"{url} by {version} in {took_s * 1000:.0f} ms"


def _run_nothing_of_another(directory: Path) -> None:
    """Examples may be a function of the directory's owner: root, who looks after a service, must not run it."""
    if os.geteuid() == 0 and directory.stat().st_uid != 0:
        raise _Unknown("not looked at by root: ask as the directory's own user")


def _check_examples(directory: Path) -> str:
    _run_nothing_of_another(directory)
    config = Config.read(directory)
    if not config.tasks:
        raise _Unknown("device.toml names no examples")
    found = []
    for task, entry in config.tasks.items():
        try:
            given = examples_source(directory, entry.examples)()
        except SordinoError:
            raise
        except Exception as error:  # it is the owner's function
            raise ParameterError(f"{task}: {entry.examples}: {type(error).__name__}: {error}") from error
        size = _length_of(given)
        if size == 0:
            raise ParameterError(f"{task}: {entry.examples}: there are no examples")
        found.append(task if size is None else f"{task}: {size}")
    return ", ".join(found)


def _length_of(given: Any) -> int | None:
    if isinstance(given, dict):
        return len(next(iter(given.values()), ()))
    whole = whole_arrays(given)
    if whole is not None:
        return len(whole[1])
    return len(given) if hasattr(given, "__len__") else None


def _check_training(directory: Path) -> str:
    from edge_sdk.training.onnx import OnnxTrainer

    _run_nothing_of_another(directory)
    config = Config.read(directory)
    if not config.tasks:
        raise _Unknown("device.toml names no examples")
    max_bytes = config.max_download_mb << 20
    found = []
    for task, entry in config.tasks.items():
        held, _ = read_model(directory, task)
        if held is None:
            continue
        blobs = directory / "blobs"
        bundle = read_bundle(blobs / held.bundle, task, read_policy(directory), max_bytes)
        model = decode(Model, decode(Signed, held.model).body)
        trainer = OnnxTrainer(bundle, config.threads)
        content = (blobs / held.parameters).read_bytes()
        trainer.load_shared(read_parameters(content, model.parameters, bundle.manifest))
        examples = examples_of(examples_source(directory, entry.examples), bundle.manifest)
        batch = np.arange(min(len(examples), bundle.manifest.batch), dtype=np.int64)
        if not len(batch):
            raise ParameterError(f"{task}: {entry.examples}: there are no examples")
        for _ in range(2):  # the first step warms up
            started_s = time.perf_counter()
            if bundle.manifest.unit == "example":
                sums = trainer.clipped_sum(examples, batch, clip=1.0, loss_bound=1.0).metrics
            else:
                sums = trainer.train(examples, lr=1e-6, entropy=bytes(32), steps=1).metrics
            took_s = time.perf_counter() - started_s
        if not sums.count:
            raise ParameterError(f"{task}: {invalid_among(sums)}")
        found.append(f"{task}: {took_s * 1000:.2f} ms for {len(batch)} examples")
        if sums.invalid:
            found.append(invalid_among(sums))
    if not found:
        raise _Unknown("no model is here yet")
    return ", ".join(found)
