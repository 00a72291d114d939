"""What a device must not forget, on disk: written before anything that follows from it leaves (docs/device.md).

One SQLite file, `state.db`, and beside it the contributions that wait for their receipt, `outbox/`. A crash at any
statement leaves a state from before or after: every change is one transaction, and a contribution's file is durable
before the row that names it.

The journal is a rollback journal (TRUNCATE) and not a write-ahead log: a log keeps the pages that held an erased secret
until it is checkpointed, and nothing here needs readers beside the writer. `secure_delete` overwrites what is erased
inside the file. What a flash card's own wear levelling keeps of it no program can tell.

What is read is rebuilt through the constructors that check it, so a file that was changed is an error and not a state.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_sdk.crypto.hashing import content_hash
from edge_sdk.crypto.sealing import PREKEY_SEED_BYTES
from edge_sdk.crypto.shamir import PRIME
from edge_sdk.errors import ParameterError, PeerError, SordinoError
from edge_sdk.files import has_room, open_locked, write_whole
from edge_sdk.protocol.anchors import Anchored, Anchors
from edge_sdk.protocol.authority import FleetEpoch
from edge_sdk.protocol.contributor import Contribution, Idle, Sent
from edge_sdk.protocol.member import Closed, Committed, Inspecting, MemberState, Released, Session, Shown
from edge_sdk.protocol.messages import Anchor, Epoch, Signed, decode, encode, message_hash
from edge_sdk.protocol.rounds import Round, split_shares

F32 = NDArray[np.float32]
Row = tuple[Any, ...]
K = TypeVar("K")
V = TypeVar("V")

SCHEMA = 1

_TABLES = """
CREATE TABLE device (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    owner BLOB NOT NULL, fleet BLOB NOT NULL, epoch BLOB, next_serial INTEGER NOT NULL
) STRICT;
CREATE TABLE epoch (id BLOB PRIMARY KEY, signed BLOB NOT NULL) STRICT;
CREATE TABLE position (task TEXT PRIMARY KEY, round INTEGER NOT NULL, tid BLOB NOT NULL) STRICT;
CREATE TABLE contribution (
    task TEXT PRIMARY KEY, tid BLOB NOT NULL, epoch BLOB NOT NULL, ticket BLOB NOT NULL, sender INTEGER NOT NULL,
    header BLOB NOT NULL
) STRICT;
CREATE TABLE local (task TEXT PRIMARY KEY, bundle BLOB NOT NULL, parameters BLOB NOT NULL) STRICT;
CREATE TABLE model (
    task TEXT PRIMARY KEY, model BLOB NOT NULL, bundle TEXT NOT NULL, parameters TEXT NOT NULL
) STRICT;
CREATE TABLE outcome (
    task TEXT PRIMARY KEY, round INTEGER NOT NULL, what TEXT NOT NULL, reason TEXT NOT NULL, time_s INTEGER NOT NULL
) STRICT;
CREATE TABLE prekey (
    serial INTEGER PRIMARY KEY, seed BLOB NOT NULL, expires_s INTEGER NOT NULL, tid BLOB
) STRICT;
CREATE TABLE newest (task TEXT PRIMARY KEY, round INTEGER NOT NULL, tid BLOB NOT NULL) STRICT;
CREATE TABLE session (
    tid BLOB PRIMARY KEY, epoch BLOB NOT NULL, ticket BLOB NOT NULL, phase TEXT NOT NULL, serial INTEGER, seal BLOB,
    groups BLOB, answer BLOB, reason TEXT
) STRICT;
CREATE TABLE shown (
    tid BLOB NOT NULL, sender INTEGER NOT NULL, header BLOB NOT NULL, key BLOB NOT NULL, share BLOB,
    complained INTEGER NOT NULL, PRIMARY KEY (tid, sender)
) STRICT;
CREATE TABLE anchor (
    device BLOB NOT NULL, task TEXT NOT NULL, round INTEGER NOT NULL, entries INTEGER NOT NULL, link BLOB NOT NULL,
    PRIMARY KEY (device, task)
) STRICT;
CREATE TABLE forked (device BLOB PRIMARY KEY) STRICT;
"""


class StoreDamaged(SordinoError):
    """The state on disk is not what this device wrote: the disk's fault, or of somebody who can write to it.

    What this device promised is unknown, so it does nothing until its owner has looked.
    """


@dataclass(frozen=True)
class Held:
    """A task's newest model as its coordinator named it.

    model: the Signed `Model`, encoded.  bundle, parameters: names of the files that hold them.
    """

    model: bytes
    bundle: str
    parameters: str


@dataclass(frozen=True)
class Outcome:
    """What became of the last ticket of a task. what: a word, as in events.  time_s: Unix seconds."""

    task: str
    round: int
    what: str
    reason: str
    time_s: int


class Store:
    """One device's state. One process has it at a time; not safe for several threads."""

    def __init__(self, directory: Path, owner: bytes, fleet: bytes) -> None:
        """Open the state in `directory`, or begin an empty one.

        owner, fleet: public keys of the device and of its fleet authority.
        Raises ParameterError if another process has it open or a later version wrote it, StoreDamaged if it is another
        device's or cannot be read, OSError from the disk.
        """
        self._owner, self._fleet = owner, fleet
        self._outbox = directory / "outbox"
        self._epochs: dict[bytes, tuple[FleetEpoch, Signed]] = {}
        busy = "another process works with this device's directory"
        self._lock = open_locked(directory / "state.lock", os.O_RDWR | os.O_CREAT, busy)
        try:
            self._outbox.mkdir(mode=0o700, exist_ok=True)
            self._db = _open(directory / "state.db")
        except BaseException:
            os.close(self._lock)
            raise
        try:
            self._begin()
            self._sweep()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files. Closing twice is harmless."""
        self._db.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    # The epoch.

    @property
    def epoch(self) -> FleetEpoch | None:
        """The newest epoch that this device took."""
        row = self._one("SELECT epoch FROM device")
        return None if row is None or row[0] is None else self._epoch(row[0])

    def save_epoch(self, signed: Signed) -> FleetEpoch:
        """Take an epoch. The one before stays for what still refers to it.

        Raises PeerError on an epoch that the authority did not sign, an older one, or another one of the same number.
        """
        epoch, before = FleetEpoch(self._fleet, signed), self.epoch
        if before is not None:
            if epoch.id == before.id:
                return before
            if epoch.number <= before.number:
                raise PeerError(f"epoch: number {epoch.number} after {before.number}: epochs only go up")
        with self._transaction():
            self._run("INSERT OR REPLACE INTO epoch VALUES (?, ?)", epoch.id, encode(signed))
            self._run("UPDATE device SET epoch = ?", epoch.id)
            self._forget_epochs()
        self._epochs[epoch.id] = epoch, signed
        return epoch

    # The contributor's side.

    def contributor(self, task: str) -> Idle | Sent:
        """Where this device stands in a task. Raises StoreDamaged if the contribution is not what its header binds."""
        row = self._one("SELECT epoch, ticket, sender, header FROM contribution WHERE task = ?", task)
        if row is None:
            row = self._one("SELECT round, tid FROM position WHERE task = ?", task)
            return Idle(task) if row is None else Idle(task, *row)
        with _checked(f"the contribution to {task}"):
            round_ = self._round(*row[:2])
            signed = decode(Signed, row[3])
            header = round_.check_header(signed)
            content = self.outbox_path(round_.tid).read_bytes()
            masked = content[: round_.layout.masked_bytes]
            shares = content[round_.layout.masked_bytes :]
            if content_hash(masked) != header.masked or header.key != self._owner:
                raise PeerError("the file is not the one that the header binds")
            split_shares(round_, header, shares)
            return Sent(round_, row[2], Contribution(signed, masked, shares))

    def positions(self) -> dict[str, Idle]:
        """Where this device stands in every task that it ever took a ticket of. The ledger holds each one's coin."""
        return {row[0]: Idle(*row) for row in self._all("SELECT task, round, tid FROM position")}

    def outbox_path(self, tid: bytes) -> Path:
        """The file of the contribution to this ticket: the masked vector and then the sealed shares."""
        return self._outbox / tid.hex()

    def has_room(self, size: int) -> bool:
        """Whether the disk takes so many bytes more, with some to spare. Raises OSError."""
        return has_room(self._outbox, size)

    def save_contribution(self, sent: Sent, local: Mapping[str, F32]) -> None:
        """The contribution, the position that follows from it and the local parameters after it, in one step.

        When this returns they are durable. local: name -> float32 array; may be empty.
        """
        round_, ticket = sent.round, sent.round.ticket
        write_whole(self.outbox_path(round_.tid), sent.contribution.masked, sent.contribution.shares)
        with self._transaction():
            self._keep_epoch(round_.epoch)
            self._run(
                "INSERT INTO contribution VALUES (?, ?, ?, ?, ?, ?)",
                ticket.task, round_.tid, round_.epoch.id, encode(round_.signed), sent.sender,
                encode(sent.contribution.header),
            )  # fmt: skip
            self._save_position(Idle(ticket.task, ticket.round, round_.tid))
            if local:
                flat = {name: value.astype("<f4").tobytes() for name, value in local.items()}
                packed = msgspec.msgpack.encode(flat)
                self._run("INSERT OR REPLACE INTO local VALUES (?, ?, ?)", ticket.task, ticket.bundle, packed)

    def save_idle(self, state: Idle) -> None:
        """A round is over for this device, or was never entered: the contribution, if there is one, is dropped."""
        held = self._one("SELECT 1 FROM contribution WHERE task = ?", state.task) is not None
        with self._transaction():
            self._run("DELETE FROM contribution WHERE task = ?", state.task)
            self._save_position(state)
            self._forget_epochs()
        if held:
            self._sweep()

    def local(self, task: str, bundle: bytes) -> dict[str, F32]:
        """The local parameters of this device for a task's bundle, flat, by name; empty if it has none yet."""
        row = self._one("SELECT parameters FROM local WHERE task = ? AND bundle = ?", task, bundle)
        return {} if row is None else _unpack_local(task, row[0])

    def model(self, task: str) -> Held | None:
        """The task's newest model that was fetched whole."""
        row = self._one("SELECT model, bundle, parameters FROM model WHERE task = ?", task)
        return None if row is None else Held(*row)

    def save_model(self, task: str, held: Held) -> None:
        """The newest model's files are here."""
        with self._transaction():
            self._run(
                "INSERT OR REPLACE INTO model VALUES (?, ?, ?, ?)", task, held.model, held.bundle, held.parameters
            )

    def models(self) -> dict[str, Held]:
        """Every task's newest model."""
        return {task: Held(*rest) for task, *rest in self._all("SELECT task, model, bundle, parameters FROM model")}

    def save_outcome(self, outcome: Outcome) -> None:
        """For people: what became of a ticket."""
        with self._transaction():
            self._run(
                "INSERT OR REPLACE INTO outcome VALUES (?, ?, ?, ?, ?)",
                outcome.task, outcome.round, outcome.what, outcome.reason, outcome.time_s,
            )  # fmt: skip

    def outcomes(self) -> dict[str, Outcome]:
        """By task."""
        return {row[0]: Outcome(*row) for row in self._all("SELECT task, round, what, reason, time_s FROM outcome")}

    # The member's side.

    def member(self) -> MemberState:
        """The member's state. Raises StoreDamaged on what could not have been written."""
        with _checked("the member's state"):
            prekeys, expiry, bound = {}, {}, {}
            for serial, seed, expires_s, tid in self._all("SELECT serial, seed, expires_s, tid FROM prekey"):
                if len(seed) != PREKEY_SEED_BYTES:
                    raise ParameterError(f"prekey {serial} has {len(seed)} bytes")
                prekeys[serial], expiry[serial] = seed, expires_s
                if tid is not None:
                    bound[serial] = tid
            newest = {task: (number, tid) for task, number, tid in self._all("SELECT task, round, tid FROM newest")}
            sessions = {tid: self._session(tid, *rest) for tid, *rest in self._all("SELECT * FROM session")}
            (serial,) = self._one("SELECT next_serial FROM device") or (0,)
            if any(known >= serial for known in prekeys):
                raise ParameterError("a prekey's serial was not given out yet")
            return MemberState(serial, prekeys, expiry, bound, newest, sessions, self._anchors())

    def save_member(self, before: MemberState, after: MemberState) -> None:
        """Write what differs: a round of 10,000 headers is not written again for one more of them.

        before: the state that is stored now. When this returns `after` is durable and what it lacks is erased.
        """
        if after is before:
            return
        with self._transaction():
            if after.next_serial != before.next_serial:
                self._run("UPDATE device SET next_serial = ?", after.next_serial)
            self._save_prekeys(before, after)
            for task, entry in _changed(before.newest, after.newest):
                self._run("INSERT OR REPLACE INTO newest VALUES (?, ?, ?)", task, *entry)
            for tid in before.sessions.keys() - after.sessions.keys():
                self._run("DELETE FROM session WHERE tid = ?", tid)
                self._run("DELETE FROM shown WHERE tid = ?", tid)
            for tid, session in _changed(before.sessions, after.sessions):
                self._save_session(tid, before.sessions.get(tid), session)
            self._save_anchors(before.anchors, after.anchors)
            self._forget_epochs()

    def _save_prekeys(self, before: MemberState, after: MemberState) -> None:
        for serial in before.prekeys.keys() - after.prekeys.keys():
            self._run("DELETE FROM prekey WHERE serial = ?", serial)
        for serial, seed in _changed(before.prekeys, after.prekeys):
            tid = after.bound.get(serial)
            self._run("INSERT INTO prekey VALUES (?, ?, ?, ?)", serial, seed, after.expiry[serial], tid)
        for serial, tid in _changed(before.bound, after.bound):
            self._run("UPDATE prekey SET tid = ? WHERE serial = ?", tid, serial)

    def _save_session(self, tid: bytes, before: Session | None, after: Session) -> None:
        round_ = after.round
        serial, seal, groups, answer, reason = None, None, None, None, None
        old: Mapping[int, Shown] = before.shown if isinstance(before, Inspecting) else {}
        kept: Mapping[int, Shown] = {}
        if isinstance(after, Inspecting):
            serial, kept = after.serial, after.shown
        elif isinstance(after, Committed):
            # The shares of a signed set are those that were shown: their rows stay.
            serial, seal, kept = after.serial, after.seal, {sender: old[sender] for sender in after.shares}
            groups, answer = msgspec.msgpack.encode(after.groups), encode(after.signature)
        elif isinstance(after, Released):
            seal, answer = after.seal, encode(after.release)
        else:
            reason = after.reason
        self._keep_epoch(round_.epoch)
        self._run(
            "INSERT OR REPLACE INTO session VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            tid, round_.epoch.id, encode(round_.signed), type(after).__name__, serial, seal, groups, answer, reason,
        )  # fmt: skip
        if not kept:
            self._run("DELETE FROM shown WHERE tid = ?", tid)
            return
        for sender in old.keys() - kept.keys():
            self._run("DELETE FROM shown WHERE tid = ? AND sender = ?", tid, sender)
        for sender, entry in _changed(old, kept):
            self._run(
                "INSERT OR REPLACE INTO shown VALUES (?, ?, ?, ?, ?, ?)",
                tid, sender, entry.header, entry.key, entry.share, int(entry.complained),
            )  # fmt: skip

    def _session(
        self, tid: bytes, epoch: bytes, ticket: bytes, phase: str, serial: int | None, seal: bytes | None,
        groups: bytes | None, answer: bytes | None, reason: str | None,
    ) -> Session:  # fmt: skip
        round_ = self._round(epoch, ticket)
        if round_.tid != tid:
            raise ParameterError("a session is not its ticket's")
        if phase == "Closed":
            return Closed(round_, reason or "")
        if phase == "Released" and seal is not None and answer is not None:
            return Released(round_, seal, decode(Signed, answer))
        if serial is None:
            raise ParameterError(f"a session without a prekey is {phase}")
        shown = {}
        for sender, header, key, share, complained in self._all(
            "SELECT sender, header, key, share, complained FROM shown WHERE tid = ?", tid
        ):
            if share is not None:
                values = np.frombuffer(share, dtype="<u2")
                if len(values) != round_.thresholds.polynomials or (values >= PRIME).any():
                    raise ParameterError(f"the share of sender {sender} is not one")
            shown[sender] = Shown(header, key, share, bool(complained))
        if phase == "Inspecting":
            return Inspecting(round_, serial, shown)
        if phase != "Committed" or seal is None or groups is None or answer is None:
            raise ParameterError(f"a session is {phase}")
        partition = msgspec.msgpack.decode(groups, type=tuple[tuple[int, ...], ...])
        shares = {sender: shown[sender].share for group in partition for sender in group}
        return Committed(round_, serial, seal, partition, shares, decode(Signed, answer))

    def _anchors(self) -> Anchors:
        newest: dict[bytes, dict[str, Anchored]] = {}
        for device, task, number, entries, link in self._all("SELECT device, task, round, entries, link FROM anchor"):
            newest.setdefault(device, {})[task] = Anchored(number, Anchor(entries, link))
        return Anchors(newest, frozenset(device for (device,) in self._all("SELECT device FROM forked")))

    def _save_anchors(self, before: Anchors, after: Anchors) -> None:
        if after is before:
            return
        for device, tasks in _changed(before.newest, after.newest):
            for task, (number, anchor) in _changed(before.newest.get(device, {}), tasks):
                self._run(
                    "INSERT OR REPLACE INTO anchor VALUES (?, ?, ?, ?, ?)",
                    device, task, number, anchor.entries, anchor.link,
                )  # fmt: skip
        for device in after.forked - before.forked:
            self._run("INSERT OR IGNORE INTO forked VALUES (?)", device)

    # Below: SQL.

    def _begin(self) -> None:
        version = int((self._one("PRAGMA user_version") or (0,))[0])
        if version > SCHEMA:
            raise ParameterError(f"state.db was written by a later version (schema {version}, this one knows {SCHEMA})")
        if version == 0:
            with self._transaction():
                for statement in _TABLES.strip().split(";\n"):
                    self._run(statement)
                self._run("INSERT INTO device VALUES (1, ?, ?, NULL, 0)", self._owner, self._fleet)
                self._run(f"PRAGMA user_version = {SCHEMA}")
        if self._one("SELECT owner, fleet FROM device") != (self._owner, self._fleet):
            raise StoreDamaged("state.db is another device's or another fleet's")

    def _sweep(self) -> None:
        """Remove files of the outbox that no row names: their transaction never came, or is over."""
        kept = {content.hex() for content in self._waiting()}
        for path in self._outbox.iterdir():
            if path.name not in kept:
                path.unlink()

    def _waiting(self) -> list[bytes]:
        return [tid for (tid,) in self._all("SELECT tid FROM contribution")]

    def _save_position(self, state: Idle) -> None:
        self._run("INSERT OR REPLACE INTO position VALUES (?, ?, ?)", state.task, state.round, state.tid)

    def _keep_epoch(self, epoch: FleetEpoch) -> None:
        """A later epoch may have come while a round of this one was under way."""
        if self._one("SELECT 1 FROM epoch WHERE id = ?", epoch.id) is None:
            if epoch.id not in self._epochs:
                raise ParameterError("a ticket's epoch was not stored: take the epoch first")
            self._run("INSERT INTO epoch VALUES (?, ?)", epoch.id, encode(self._epochs[epoch.id][1]))

    def _forget_epochs(self) -> None:
        self._run(
            "DELETE FROM epoch WHERE id NOT IN (SELECT epoch FROM device WHERE epoch NOT NULL "
            "UNION SELECT epoch FROM contribution UNION SELECT epoch FROM session)"
        )

    def _epoch(self, epoch_id: bytes) -> FleetEpoch:
        if epoch_id not in self._epochs:
            row = self._one("SELECT signed FROM epoch WHERE id = ?", epoch_id)
            with _checked("an epoch"):
                if row is None:
                    raise ParameterError("it is missing")
                signed = decode(Signed, row[0])
                if message_hash(Epoch, signed.body) != epoch_id:
                    raise ParameterError("it is another one")
                self._epochs[epoch_id] = FleetEpoch(self._fleet, signed), signed
        return self._epochs[epoch_id][0]

    def _round(self, epoch_id: bytes, ticket: bytes) -> Round:
        return Round(self._epoch(epoch_id), decode(Signed, ticket))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._run("BEGIN IMMEDIATE")
        try:
            yield
            self._commit()
        except BaseException:
            if self._db.in_transaction:
                self._run("ROLLBACK")
            raise

    def _commit(self) -> None:
        self._run("COMMIT")

    def _run(self, statement: str, *values: object) -> sqlite3.Cursor:
        try:
            return self._db.execute(statement, values)
        except sqlite3.OperationalError as error:  # a full disk, a lock, an I/O error
            raise OSError(f"state.db: {error}") from error
        except sqlite3.DatabaseError as error:
            raise StoreDamaged(f"state.db: {error}") from error

    def _one(self, statement: str, *values: object) -> Row | None:
        found: Row | None = self._run(statement, *values).fetchone()
        return found

    def _all(self, statement: str, *values: object) -> list[Row]:
        return self._run(statement, *values).fetchall()


def read_outcomes(directory: Path) -> dict[str, Outcome]:
    """The outcomes by task, while perhaps another process works with the state. Raises OSError if it cannot be read."""
    rows = _peek(directory, "SELECT task, round, what, reason, time_s FROM outcome")
    return {row[0]: Outcome(*row) for row in rows}


def read_positions(directory: Path) -> dict[str, Idle]:
    """As `Store.positions`, read as `read_outcomes` does; none if there is no state yet."""
    if not (directory / "state.db").exists():
        return {}
    return {row[0]: Idle(*row) for row in _peek(directory, "SELECT task, round, tid FROM position")}


def read_waiting(directory: Path) -> list[Signed]:
    """The headers of contributions that wait for their receipt, read as `read_outcomes` does; none without a state.

    Raises StoreDamaged on what is no header.
    """
    if not (directory / "state.db").exists():
        return []
    with _checked("a contribution's header"):
        return [decode(Signed, header) for (header,) in _peek(directory, "SELECT header FROM contribution")]


def read_model(directory: Path, task: str) -> tuple[Held | None, dict[str, F32]]:
    """A task's newest model and this device's local parameters for it, read as `read_outcomes` does."""
    if not (directory / "state.db").exists():
        return None, {}
    held = [Held(*row) for row in _peek(directory, "SELECT model, bundle, parameters FROM model WHERE task = ?", task)]
    local = _peek(directory, "SELECT parameters FROM local WHERE task = ?", task)
    return (held[0] if held else None), (_unpack_local(task, local[0][0]) if local else {})


@dataclass(frozen=True)
class Glance:
    """What the state says without being opened. Numbers of rounds: -1 for none."""

    epoch: Signed | None
    positions: Mapping[str, int]
    """task -> the newest round that a ticket was taken of."""
    waiting: Mapping[str, int]
    """task -> the round whose contribution waits for its receipt."""
    models: Mapping[str, bytes]
    """task -> the Signed `Model`, encoded."""
    spare_prekeys: int
    open_sessions: int
    """Rounds in which this device serves on the committee and has not released."""


def glance(directory: Path) -> Glance:
    """For `status`, read as `read_outcomes` does. Raises StoreDamaged if the file's pages do not fit together."""
    damage = _peek(directory, "PRAGMA quick_check(1)")
    if damage != [("ok",)]:
        raise StoreDamaged(f"state.db: {damage[0][0]}")
    signed = _peek(directory, "SELECT signed FROM epoch WHERE id = (SELECT epoch FROM device)")
    with _checked("the epoch"):
        epoch = decode(Signed, signed[0][0]) if signed else None
    positions: dict[str, int] = dict(_peek(directory, "SELECT task, round FROM position"))
    waiting = [task for (task,) in _peek(directory, "SELECT task FROM contribution")]
    spare = _peek(directory, "SELECT count(*) FROM prekey WHERE tid IS NULL")[0][0]
    sessions = _peek(directory, "SELECT count(*) FROM session WHERE phase IN ('Inspecting', 'Committed')")[0][0]
    models: dict[str, bytes] = dict(_peek(directory, "SELECT task, model FROM model"))
    return Glance(epoch, positions, {task: positions[task] for task in waiting}, models, spare, sessions)


def _unpack_local(task: str, packed: bytes) -> dict[str, F32]:
    with _checked(f"the local parameters of {task}"):
        found = msgspec.msgpack.decode(packed, type=dict[str, bytes])
        return {name: np.frombuffer(value, dtype="<f4").astype(np.float32) for name, value in found.items()}


def _peek(directory: Path, statement: str, *values: object) -> list[Row]:
    address = f"{(directory / 'state.db').absolute().as_uri()}?mode=ro"
    try:
        with closing(sqlite3.connect(address, uri=True, timeout=10.0)) as database:
            return database.execute(statement, values).fetchall()
    except sqlite3.Error as error:
        raise OSError(f"state.db cannot be read now: {error}") from error


def _open(path: Path) -> sqlite3.Connection:
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))  # the journal gets the same mode
    database = sqlite3.connect(path, isolation_level=None, timeout=10.0)
    try:
        for pragma in ("journal_mode = TRUNCATE", "synchronous = FULL", "secure_delete = ON", "temp_store = MEMORY"):
            database.execute(f"PRAGMA {pragma}")
    except BaseException as error:
        database.close()
        if isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError):
            raise StoreDamaged(f"state.db: {error}") from error
        raise
    return database


def _changed(before: Mapping[K, V], after: Mapping[K, V]) -> list[tuple[K, V]]:
    """The entries of `after` that are not the very ones of `before`: states share what did not change."""
    return [(key, value) for key, value in after.items() if before.get(key) is not value]


@contextmanager
def _checked(subject: str) -> Iterator[None]:
    """What a check finds wrong inside is damage: this device wrote it."""
    try:
        yield
    except (
        PeerError,
        ParameterError,
        msgspec.MsgspecError,
        FileNotFoundError,
        KeyError,
        TypeError,
        ValueError,
    ) as error:
        raise StoreDamaged(f"state.db: {subject}: {error}") from error
