"""The coordinator's process: its directory, and everything that `edge-coordinator serve` runs in it.

The directory holds coordinator.toml; coordinator.key (Ed25519 seed), the CA's and TLS files (`coordinator.ca`), and
where they do not live apart authority.key and publisher.key; the store; what the broker is told. All of it is the
owner's alone.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from coordinator.authority import SEED_BYTES, LocalAuthority, RemoteAuthority, read_identity
from coordinator.broker import SLACK_BYTES, Broker, Listener, start_broker
from coordinator.ca import CertificateAuthority
from coordinator.config import NAME, AuthorityTable, BrokerTable, Config, Listen, template
from coordinator.enrolment import Desk, EnrolmentService, Pins
from coordinator.errors import StoreError
from coordinator.events import Event
from coordinator.server import Server
from coordinator.store import Store, check_ours
from edge_sdk.crypto.identity import Identity
from edge_sdk.enrolment import Admission, EnrolRequest, RenewRequest, private_directory
from edge_sdk.errors import ParameterError
from edge_sdk.files import write_once
from edge_sdk.transport.mqtt import Credentials

log = logging.getLogger("sordino.coordinator")

LOOK_S = 0.5
"""How often the store is asked whether a command changed who is revoked."""

DEFAULTS = Config("sordino", ())

SERVING = "serving"
"""A file that the serving process holds a lock on, and writes its process id into."""


def grantable(upload_memory: int, broker: str) -> int:
    """Of the memory for uploads, what may be granted at a time: a broker inside this process holds each upload, too,
    until it is read.

    broker: its name.
    """
    return upload_memory // 2 if broker == "amqtt" else upload_memory


@dataclass(frozen=True)
class Directory:
    """An initialised directory, opened: its configuration and the keys that lie in it."""

    path: Path
    config: Config
    identity: Identity
    authority: Identity | None
    """None where it lives apart."""
    ca: CertificateAuthority

    @classmethod
    def open(cls, path: Path) -> Directory:
        """Raises ParameterError if it was not initialised, or that names the file which is wrong; StoreError if it is
        not ours."""
        config = Config.read(path)
        check_ours(path)
        authority = None
        if config.authority.key is None:
            authority = read_identity(path / "authority.key")
        elif (path / "authority.key").exists():
            raise ParameterError(
                f"{path / 'authority.key'} is here although {NAME} says that the authority lives apart: "
                "take the key away, or remove [authority] key"
            )
        return cls(path, config, read_identity(path / "coordinator.key"), authority, CertificateAuthority(path))

    @property
    def authority_key(self) -> bytes:
        """The fleet authority's public key."""
        return (
            self.authority.public_key if self.authority is not None else bytes.fromhex(self.config.authority.key or "")
        )

    @property
    def assumptions(self) -> list[str]:
        """What is taken on trust because keys lie together; for status and reports."""
        together = []
        if self.authority is not None:
            together.append("the fleet authority's key lies beside the coordinator's")
        if (self.path / "publisher.key").exists():
            together.append("a publisher's key lies beside the coordinator's")
        return [f"an honest coordinator is assumed: {reason}" for reason in together]

    def desk(self, store: Store) -> Desk:
        """Makes tokens and certificates."""
        config = self.config
        pins = Pins(
            config.enrolment_url,
            self.authority_key,
            self.identity.public_key,
            tuple(bytes.fromhex(key) for key in config.publishers),
        )
        return Desk(
            store,
            self.ca,
            pins,
            fleet=config.fleet,
            broker_url=config.broker_url,
            certificate_days=config.limits.certificate_days,
        )


def init(
    path: Path,
    now_s: int,
    *,
    fleet: str = "sordino",
    listen: Listen = DEFAULTS.listen,
    broker: BrokerTable = DEFAULTS.broker,
    authority: AuthorityTable = DEFAULTS.authority,
    publishers: Iterable[str] = (),
) -> Directory:
    """Make the directory's keys and coordinator.toml. What a crash left out, another call makes.

    publishers: public keys, hexadecimal; none: a publisher's key is made here.  authority.key: given if the fleet
    authority lives apart; else its key is made here.
    Raises ParameterError if there is a coordinator.toml already, or on values that it cannot hold.
    """
    if (path / NAME).exists():
        raise ParameterError(f"{path / NAME} is there already: edit it")
    keys, seed, own = list(publishers), "", path / "publisher.key"
    if not keys:
        seed = own.read_text().strip() if own.exists() else os.urandom(SEED_BYTES).hex()
        keys = [Identity(bytes.fromhex(seed)).public_key.hex()]
    text = template(fleet=fleet, publishers=keys, listen=listen, broker=broker, authority=authority)
    private_directory(path)  # from here on it is known to be good
    if seed:
        write_once(own, seed.encode() + b"\n")  # the format of `edge-export key`, whose --key takes this file
    write_once(path / "coordinator.key", os.urandom(SEED_BYTES))
    if authority.key is None:
        write_once(path / "authority.key", os.urandom(SEED_BYTES))
    CertificateAuthority.create(path, fleet, now_s)
    write_once(path / NAME, text.encode())  # last: it says that the rest is there
    return Directory.open(path)


def serving_pid(path: Path) -> int | None:
    """The process that serves from the directory, if one does."""
    try:
        handle = os.open(path / SERVING, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        text = os.read(handle, 32)
        return int(text) if text.isdigit() else None
    finally:
        os.close(handle)
    return None


@contextmanager
def _marked(path: Path) -> Iterator[None]:
    """Show others that this process serves. Raises StoreError if another does, before a second broker is started."""
    handle = os.open(path / SERVING, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    patience_s = time.monotonic() + 1.0
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:  # or somebody just looks, for a moment
                if time.monotonic() > patience_s:
                    raise StoreError(f"another process ({serving_pid(path)}) serves from {path}") from error
                time.sleep(0.02)
        os.ftruncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())
        yield
    finally:
        os.close(handle)


class Service:
    """Broker, enrolment service and server over one directory. One thread makes, runs and closes it."""

    def __init__(self, directory: Directory, on_event: Callable[[Event], None]) -> None:
        """Everything listens when this returns; the server goes on with the rounds of the store.

        Raises ParameterError or StoreError with what keeps it from starting, and nothing is left running.
        """
        self.directory = directory
        config, path = directory.config, directory.path
        now_s = int(time.time())
        directory.ca.ensure_service_certificates(config.certificate_names, now_s)
        with ExitStack() as stack:
            self._store = Store(path)
            stack.callback(self._store.close)
            stack.enter_context(_marked(path))
            self._changes = -1
            self._look_s = 0.0
            self._revoked: frozenset[str] = frozenset()
            self._read_revoked()
            upload_memory = config.limits.upload_memory_mb << 20
            listener = Listener(
                path, config.listen.address, config.listen.broker_port, queue_bytes=upload_memory + SLACK_BYTES
            )
            self.broker: Broker = start_broker(config.broker.kind, listener, config.broker.url, self._revoked)
            stack.callback(self.broker.close)
            own = Credentials(path / "ca.pem", path / "client.pem", path / "client.key")
            hub = self.broker.link(own)
            stack.callback(hub.close)
            self._desk = directory.desk(self._store)
            authority: LocalAuthority | RemoteAuthority
            if directory.authority is not None:
                settings, key = config.authority, directory.identity.public_key
                authority = LocalAuthority(directory.authority, settings, key, os.urandom)
            else:
                authority = RemoteAuthority(directory.authority_key)
            self._server = Server(
                self._store,
                hub,
                directory.identity,
                authority,
                clock=time.time,
                entropy=os.urandom,
                upload_memory=grantable(upload_memory, self.broker.name),
                on_event=on_event,
                keep_out=self.broker.silence,
            )
            stack.callback(self._server.close)
            enrolment = EnrolmentService(config.listen.address, config.listen.enrolment_port, path, self._decide)
            stack.callback(enrolment.close)
            self._stack = stack.pop_all()

    def run(self, should_stop: Callable[[], bool]) -> None:
        """Serve until `should_stop()`, which is asked at least every half second."""
        _notify("READY=1")

        def look() -> bool:
            now_s = time.monotonic()
            if now_s >= self._look_s:
                self._look_s = now_s + LOOK_S
                if self._read_revoked():
                    self._server.look()
                _notify("WATCHDOG=1")
            return should_stop()

        self._server.run(look)
        _notify("STOPPING=1")

    def close(self) -> None:
        """End everything, the enrolment service first and the broker last. Closing twice is harmless."""
        self._stack.close()

    def _decide(self, request: EnrolRequest | RenewRequest) -> Admission:
        decide = self._desk.enrol if isinstance(request, EnrolRequest) else self._desk.renew
        return decide(request, int(time.time()))  # type: ignore[arg-type]

    def _read_revoked(self) -> bool:
        """Tell the broker of devices that a command revoked. Returns whether a command changed anything."""
        with self._store.reading() as rows:
            changes = rows.changes()
            if changes == self._changes:
                return False
            revoked = frozenset(row.key.hex() for row in rows.devices() if row.revoked_s is not None)
            serials = [int(row.serial, 16) for row in rows.certificates() if row.revoked_s is not None]
        first, self._changes = self._changes == -1, changes
        if first or revoked != self._revoked:
            self.directory.ca.write_crl(serials, int(time.time()))
            for device in sorted(revoked - self._revoked):
                log.info("device %s is revoked", device[:16])
            self._revoked = revoked
            if not first:
                self.broker.revoke(revoked)
        return True


def _notify(state: str) -> None:
    """Tell systemd, if it started us with Type=notify (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notifier:
        try:
            notifier.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)
        except OSError as error:
            log.warning("systemd cannot be told %s: %s", state, error)
