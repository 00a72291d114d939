"""What the coordinator's database holds: its tables, a row of each as a tuple, and the statements by what they record.

A `Transaction` is one connection's; `coordinator.store.Store` opens it. The schema and the statements are SQLAlchemy
Core's common ground, so that they run on PostgreSQL too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import sqlalchemy as sql
from sqlalchemy import BigInteger, Boolean, Column, Float, ForeignKey, Integer, LargeBinary, Table, Text

from coordinator.errors import StoreError
from edge_sdk.errors import ParameterError

SCHEMA_VERSION = 1

Role = Literal["device", "helper"]
TaskState = Literal["running", "paused", "done", "removed"]
"""A removed task's rows stay: devices count rounds and budgets by its name, and its models have their lineage."""

Phase = Literal["COLLECT", "SEALED", "CERTIFIED", "DONE", "ABORTED"]
"""As in docs/protocol.md section 11. OPEN is COLLECT without contributions, RELEASED is CERTIFIED with the answers."""

ACTIVE: tuple[Phase, ...] = ("COLLECT", "SEALED", "CERTIFIED")


metadata = sql.MetaData()

meta = Table("meta", metadata, Column("key", Text, primary_key=True), Column("value", BigInteger, nullable=False))

_devices = Table(
    "devices", metadata,
    Column("key", LargeBinary, primary_key=True),
    Column("role", Text, nullable=False),
    Column("tags", Text, nullable=False),
    Column("enrolled_s", Float, nullable=False),
    Column("revoked_s", Float),
    Column("last_seen_s", Float),
)  # fmt: skip

_tokens = Table(
    "tokens", metadata,
    Column("hash", LargeBinary, primary_key=True),
    Column("role", Text, nullable=False),
    Column("tags", Text, nullable=False),
    Column("made_s", Float, nullable=False),
    Column("expires_s", Float, nullable=False),
    Column("spent_by", LargeBinary),
    Column("spent_s", Float),
)  # fmt: skip

_certificates = Table(
    "certificates", metadata,
    Column("serial", Text, primary_key=True),
    Column("device", LargeBinary, ForeignKey("devices.key"), nullable=False, index=True),
    Column("certificate", LargeBinary, nullable=False),
    Column("issued_s", Float, nullable=False),
    Column("expires_s", Float, nullable=False),
    Column("revoked_s", Float),
)  # fmt: skip

_epochs = Table(
    "epochs", metadata,
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("id", LargeBinary, nullable=False, unique=True),
    Column("signed", LargeBinary, nullable=False),
    Column("roster", LargeBinary, nullable=False),
    Column("installed_s", Float, nullable=False),
)  # fmt: skip

_prekeys = Table(
    "prekeys", metadata,
    Column("member", LargeBinary, primary_key=True),
    Column("serial", BigInteger, primary_key=True, autoincrement=False),
    Column("offer", LargeBinary, nullable=False),
    Column("expires_s", BigInteger, nullable=False),
    Column("tid", LargeBinary),
)  # fmt: skip

_tasks = Table(
    "tasks", metadata,
    Column("name", Text, primary_key=True),
    Column("toml", Text, nullable=False),
    Column("plan", LargeBinary, nullable=False),
    Column("bundle_file", LargeBinary, nullable=False),
    Column("state", Text, nullable=False),
    Column("next_round", BigInteger, nullable=False),
    Column("added_s", Float, nullable=False),
)  # fmt: skip

_waits = Table(
    "waits", metadata,
    Column("task", Text, ForeignKey("tasks.name"), primary_key=True),
    Column("reason", Text, nullable=False),
)  # fmt: skip

_rounds = Table(
    "rounds", metadata,
    Column("tid", LargeBinary, primary_key=True),
    Column("task", Text, ForeignKey("tasks.name"), nullable=False),
    Column("number", BigInteger, nullable=False),
    Column("epoch", BigInteger, ForeignKey("epochs.number"), nullable=False),
    Column("ticket", LargeBinary, nullable=False),
    Column("model", BigInteger, nullable=False),
    Column("phase", Text, nullable=False),
    Column("opened_s", Float, nullable=False),
    Column("ended_s", Float),
    Column("seal", LargeBinary),
    Column("certificate", LargeBinary),
    Column("transcript", LargeBinary),
    Column("notice", LargeBinary),
    Column("reason", Text, nullable=False, default=""),
    sql.UniqueConstraint("task", "number"),
)  # fmt: skip

_contributions = Table(
    "contributions", metadata,
    Column("tid", LargeBinary, ForeignKey("rounds.tid"), primary_key=True),
    Column("slot", Integer, primary_key=True, autoincrement=False),
    Column("sender", Integer, nullable=False),
    Column("digest", LargeBinary, nullable=False),
    Column("header", LargeBinary),
    sql.UniqueConstraint("tid", "sender"),
)  # fmt: skip

_complaints = Table(
    "complaints", metadata,
    Column("tid", LargeBinary, ForeignKey("rounds.tid"), primary_key=True),
    Column("member", Integer, primary_key=True, autoincrement=False),
    Column("sender", Integer, primary_key=True, autoincrement=False),
)  # fmt: skip

_signatures = Table(
    "signatures", metadata,
    Column("tid", LargeBinary, ForeignKey("rounds.tid"), primary_key=True),
    Column("member", Integer, primary_key=True, autoincrement=False),
    Column("signature", LargeBinary, nullable=False),
)  # fmt: skip

_releases = Table(
    "releases", metadata,
    Column("tid", LargeBinary, ForeignKey("rounds.tid"), primary_key=True),
    Column("member", Integer, primary_key=True, autoincrement=False),
    Column("release", LargeBinary, nullable=False),
)  # fmt: skip

_checkpoints = Table(
    "checkpoints", metadata,
    Column("tid", LargeBinary, ForeignKey("rounds.tid"), primary_key=True),
    Column("slots", Integer, nullable=False),
    Column("hash", LargeBinary, nullable=False),
)  # fmt: skip

_anchors = Table(
    "anchors", metadata,
    Column("device", LargeBinary, primary_key=True),
    Column("task", Text, primary_key=True),
    Column("round", BigInteger, nullable=False),
    Column("entries", BigInteger, nullable=False),
    Column("link", LargeBinary, nullable=False),
    Column("forked", Boolean, nullable=False),
)  # fmt: skip

_headers = Table(
    "headers", metadata,
    Column("device", LargeBinary, primary_key=True),
    Column("entries", BigInteger, nullable=False),
    Column("signed", LargeBinary, nullable=False),
)  # fmt: skip

_models = Table(
    "models", metadata,
    Column("task", Text, ForeignKey("tasks.name"), primary_key=True),
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("parameters", LargeBinary, nullable=False),
    Column("memory", LargeBinary),
    Column("parent", LargeBinary),
    Column("tid", LargeBinary, ForeignKey("rounds.tid")),
    Column("clip", Float, nullable=False),
    Column("cohort", Float, nullable=False),
    Column("salt", LargeBinary),
    Column("set_hash", LargeBinary),
    Column("metrics", Text, nullable=False),
    Column("published_s", Float, nullable=False),
)  # fmt: skip


class DeviceRow(NamedTuple):
    """An enrolled device or helper. key: its Ed25519 public key.  tags: what tasks choose by."""

    key: bytes
    role: Role
    tags: frozenset[str]
    enrolled_s: float
    revoked_s: float | None
    last_seen_s: float | None


class TokenRow(NamedTuple):
    """An invitation. hash: of its secret.  spent_by: the key that used it, None while it is good."""

    hash: bytes
    role: Role
    tags: frozenset[str]
    made_s: float
    expires_s: float
    spent_by: bytes | None
    spent_s: float | None


class CertificateRow(NamedTuple):
    """A TLS certificate that was issued. serial: in hexadecimal.  certificate: PEM or DER, as it was given."""

    serial: str
    device: bytes
    certificate: bytes
    issued_s: float
    expires_s: float
    revoked_s: float | None


class EpochRow(NamedTuple):
    """signed: an encoded `Signed` `Epoch`.  roster: the devices' keys, 32 bytes each, ascending."""

    number: int
    id: bytes
    signed: bytes
    roster: tuple[bytes, ...]
    installed_s: float


class TaskRow(NamedTuple):
    """toml: the operator's file.  plan: `coordinator.task.Planned`, encoded.  bundle_file: content hash of the file."""

    name: str
    toml: str
    plan: bytes
    bundle_file: bytes
    state: TaskState
    next_round: int
    added_s: float


class RoundRow(NamedTuple):
    """ticket, seal, transcript, notice: encoded `Signed` messages.  certificate: an encoded `Certificate`.

    epoch: its number.  model: number of the task's model that the ticket starts from.
    """

    tid: bytes
    task: str
    number: int
    epoch: int
    ticket: bytes
    model: int
    phase: Phase
    opened_s: float
    ended_s: float | None
    seal: bytes | None
    certificate: bytes | None
    transcript: bytes | None
    notice: bytes | None
    reason: str


class ContributionRow(NamedTuple):
    """slot: its place in the round's file of vectors.  digest: the header's hash.  header: encoded `Signed`, while the
    round runs."""

    slot: int
    sender: int
    digest: bytes
    header: bytes | None


class AnchorRow(NamedTuple):
    """A device's newest ledger head in a task (docs/protocol.md section 10.3)."""

    device: bytes
    task: str
    round: int
    entries: int
    link: bytes
    forked: bool


class HeaderRow(NamedTuple):
    """A device's header with the most ledger entries, over all tasks, to show it. signed: an encoded `Signed` `Header`,
    about 1 kB.  entries: of the ledger's head that is in it."""

    device: bytes
    entries: int
    signed: bytes


class ModelRow(NamedTuple):
    """A model and where it comes from. What of it may be shown to anyone: all but `salt`, `tid` and `memory`.

    number: sums that are in it, 0 for the bundle's own.  parameters, memory: content hashes of files.
    parent: content hash of the model before.  clip: that the sums in it were clipped to last.
    cohort: contributors that were *planned*.  set_hash: tagged hash of the sealed set with `salt`, so that who knows
    the set can prove it, and nobody can guess it.  metrics: noisy ones, by name.
    """

    task: str
    number: int
    parameters: bytes
    memory: bytes | None
    parent: bytes | None
    tid: bytes | None
    clip: float
    cohort: float
    salt: bytes | None
    set_hash: bytes | None
    metrics: Mapping[str, float]
    published_s: float


class Transaction:
    """Rows to be written together, or read as of one moment. Made by `Store`."""

    def __init__(self, connection: sql.Connection) -> None:
        self._connection = connection

    def _run(self, statement: sql.Executable, parameters: Any = None) -> sql.CursorResult[Any]:
        return self._connection.execute(statement, parameters)

    def _all(self, statement: sql.Select[Any]) -> Sequence[sql.Row[Any]]:
        return self._connection.execute(statement).all()

    def _one(self, statement: sql.Select[Any]) -> sql.Row[Any] | None:
        return self._connection.execute(statement).one_or_none()

    def _put(self, table: Table, key: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        """Insert or replace by primary key, in statements that every database knows."""
        where = sql.and_(*(table.c[name] == value for name, value in key.items()))
        if not self._run(table.update().where(where).values(**values)).rowcount:
            self._run(table.insert().values(**key, **values))

    # --- what changed: the server looks at this number to see what the operator's commands did

    def changes(self) -> int:
        """A number that grows with every change to devices, tasks or epochs."""
        row = self._one(sql.select(meta.c.value).where(meta.c.key == "changes"))
        return int(row[0]) if row else 0

    def _changed(self) -> None:
        self._run(meta.update().where(meta.c.key == "changes").values(value=meta.c.value + 1))

    # --- devices, tokens, certificates

    def add_device(self, key: bytes, role: Role, tags: Iterable[str], now_s: float) -> None:
        """Enrol a device. The same again changes nothing. Raises ParameterError if it is there otherwise or revoked."""
        if len(key) != 32:
            raise ParameterError(f"a device's key has 32 bytes, not {len(key)}")
        before = self.device(key)
        if before is not None:
            if before.revoked_s is not None:
                raise ParameterError(f"device {key.hex()[:16]} was revoked: it needs a new identity")
            if (before.role, before.tags) != (role, frozenset(tags)):
                raise ParameterError(
                    f"device {key.hex()[:16]} is enrolled already, as {before.role} {sorted(before.tags)}"
                )
            return
        self._run(_devices.insert().values(key=key, role=role, tags=_tags_text(tags), enrolled_s=now_s))
        self._changed()

    def revoke(self, key: bytes, now_s: float) -> bool:
        """The device is out, and its certificates are. Returns whether it was in. Raises ParameterError if unknown."""
        before = self.device(key)
        if before is None:
            raise ParameterError(f"device {key.hex()[:16]} is not enrolled")
        if before.revoked_s is not None:
            return False
        self._run(_devices.update().where(_devices.c.key == key).values(revoked_s=now_s))
        own = sql.and_(_certificates.c.device == key, _certificates.c.revoked_s.is_(None))
        self._run(_certificates.update().where(own).values(revoked_s=now_s))
        self._changed()
        return True

    def device(self, key: bytes) -> DeviceRow | None:
        row = self._one(sql.select(_devices).where(_devices.c.key == key))
        return _device(row) if row else None

    def devices(self) -> list[DeviceRow]:
        """All that ever were enrolled, by key."""
        return [_device(row) for row in self._all(sql.select(_devices).order_by(_devices.c.key))]

    def seen(self, keys: Iterable[bytes], now_s: float) -> None:
        """These devices said something."""
        rows = [{"seen": key, "last_seen_s": now_s} for key in keys]
        if rows:  # one statement for all: made anew for each, it took longer than what it writes
            self._run(_devices.update().where(_devices.c.key == sql.bindparam("seen")), rows)

    def add_token(self, token_hash: bytes, role: Role, tags: Iterable[str], now_s: float, expires_s: float) -> None:
        """An invitation. token_hash: of its secret, which is not stored."""
        self._run(
            _tokens.insert().values(
                hash=token_hash, role=role, tags=_tags_text(tags), made_s=now_s, expires_s=expires_s
            )
        )

    def token(self, token_hash: bytes) -> TokenRow | None:
        row = self._one(sql.select(_tokens).where(_tokens.c.hash == token_hash))
        return TokenRow(**{**row._mapping, "tags": _tags_of(row.tags)}) if row else None

    def tokens(self) -> list[TokenRow]:
        rows = self._all(sql.select(_tokens).order_by(_tokens.c.made_s))
        return [TokenRow(**{**row._mapping, "tags": _tags_of(row.tags)}) for row in rows]

    def spend_token(self, token_hash: bytes, key: bytes, now_s: float) -> TokenRow:
        """Use an invitation for `key`, once. The same key again gets the same answer, also after it expired.

        Raises ParameterError if it is unknown, expired, or was used by another key.
        """
        before = self.token(token_hash)
        if before is None:
            raise ParameterError("the token is not one of this coordinator's")
        if before.spent_by is None and now_s >= before.expires_s:
            raise ParameterError("the token has expired")
        unspent = sql.and_(_tokens.c.hash == token_hash, _tokens.c.spent_by.is_(None))
        self._run(_tokens.update().where(unspent).values(spent_by=key, spent_s=now_s))
        after = self.token(token_hash)
        if after is None or after.spent_by != key:
            raise ParameterError("the token was used by another device")
        return after

    def add_certificate(self, row: CertificateRow) -> None:
        self._run(_certificates.insert().values(**row._asdict()))

    def certificates(self, device: bytes | None = None) -> list[CertificateRow]:
        """Those of a device, or all, in the order of issue."""
        query = sql.select(_certificates).order_by(_certificates.c.issued_s)
        if device is not None:
            query = query.where(_certificates.c.device == device)
        return [CertificateRow(**row._mapping) for row in self._all(query)]

    # --- epochs and prekeys

    def add_epoch(self, row: EpochRow) -> None:
        """A new epoch; the same again changes nothing. Raises ParameterError if it is not newer than all others."""
        newest = self.newest_epoch()
        if newest is not None and row.id == newest.id:
            return
        if newest is not None and row.number <= newest.number:
            raise ParameterError(f"epoch {row.number} is not newer than {newest.number}")
        self._run(_epochs.insert().values(**{**row._asdict(), "roster": b"".join(row.roster)}))
        self._changed()

    def newest_epoch(self) -> EpochRow | None:
        row = self._one(sql.select(_epochs).order_by(_epochs.c.number.desc()).limit(1))
        return _epoch(row) if row else None

    def epoch(self, number: int) -> EpochRow:
        row = self._one(sql.select(_epochs).where(_epochs.c.number == number))
        if row is None:
            raise StoreError(f"the store has no epoch {number}, and a row names it")
        return _epoch(row)

    def add_prekey(self, member: bytes, serial: int, offer: bytes, expires_s: int) -> None:
        """An offer that is not there yet (`prekey`)."""
        self._run(_prekeys.insert().values(member=member, serial=serial, offer=offer, expires_s=expires_s))

    def prekey(self, member: bytes, serial: int) -> bytes | None:
        """The offer under this serial, used or not."""
        row = self._one(sql.select(_prekeys.c.offer).where(_prekeys.c.member == member, _prekeys.c.serial == serial))
        return bytes(row[0]) if row else None

    def spare_prekeys(self, member: bytes, after_s: float) -> int:
        """How many unused offers of a member live at least until `after_s`."""
        query = (
            sql.select(sql.func.count()).select_from(_prekeys)
            .where(_prekeys.c.member == member, _prekeys.c.tid.is_(None), _prekeys.c.expires_s >= after_s)
        )  # fmt: skip
        return int(self._connection.execute(query).scalar_one())

    def held_prekeys(self, member: bytes, after_s: float, most: int) -> tuple[int, list[int]]:
        """(The highest serial that is kept of a member, 0 if there is none; its unused ones that live until then.)"""
        newest = sql.select(sql.func.max(_prekeys.c.serial)).where(_prekeys.c.member == member)
        unused = (
            sql.select(_prekeys.c.serial)
            .where(_prekeys.c.member == member, _prekeys.c.tid.is_(None), _prekeys.c.expires_s >= after_s)
            .order_by(_prekeys.c.serial.desc()).limit(most)
        )  # fmt: skip
        found = self._connection.execute(newest).scalar_one()
        return int(found or 0), sorted(int(serial) for (serial,) in self._connection.execute(unused))

    def members_with_prekeys(self, after_s: float) -> frozenset[bytes]:
        """Who has an unused offer that lives at least until `after_s`."""
        query = (
            sql.select(_prekeys.c.member).distinct()
            .where(_prekeys.c.tid.is_(None), _prekeys.c.expires_s >= after_s)
        )  # fmt: skip
        return frozenset(bytes(row.member) for row in self._all(query))

    def next_prekey(self, member: bytes, after_s: float) -> tuple[int, bytes] | None:
        """(serial, offer) of the unused one with the lowest serial that lives until `after_s`."""
        query = (
            sql.select(_prekeys.c.serial, _prekeys.c.offer)
            .where(_prekeys.c.member == member, _prekeys.c.tid.is_(None), _prekeys.c.expires_s >= after_s)
            .order_by(_prekeys.c.serial).limit(1)
        )  # fmt: skip
        row = self._one(query)
        return (row.serial, bytes(row.offer)) if row else None

    def use_prekey(self, member: bytes, serial: int, tid: bytes) -> None:
        """This offer serves this ticket and no other. Raises StoreError if it served one."""
        unused = sql.and_(_prekeys.c.member == member, _prekeys.c.serial == serial, _prekeys.c.tid.is_(None))
        if self._run(_prekeys.update().where(unused).values(tid=tid)).rowcount != 1:
            raise StoreError(f"prekey {serial} of member {member.hex()[:16]} served another ticket")

    def forget_prekeys(self, before_s: float) -> None:
        """Drop offers that expired before, used or not: no ticket can name them, and members have erased them."""
        self._run(_prekeys.delete().where(_prekeys.c.expires_s < before_s))

    # --- tasks

    def add_task(self, row: TaskRow) -> None:
        """Raises ParameterError if a task of this name is there: rounds and budgets are counted by name."""
        self.check_new(row.name)
        self._run(_tasks.insert().values(**row._asdict()))
        self._changed()

    def check_new(self, name: str) -> None:
        """Return if no task has this name or had it, else raise ParameterError."""
        before = self.task(name)
        if before is not None and before.state == "removed":
            raise ParameterError(
                f"task {name!r} was removed, and its name stays taken: devices count rounds and budgets by it; choose "
                "another name"
            )
        if before is not None:
            raise ParameterError(f"there is a task {name!r} already: choose another name")

    def task(self, name: str) -> TaskRow | None:
        row = self._one(sql.select(_tasks).where(_tasks.c.name == name))
        return TaskRow(**row._mapping) if row else None

    def tasks(self) -> list[TaskRow]:
        return [TaskRow(**row._mapping) for row in self._all(sql.select(_tasks).order_by(_tasks.c.added_s))]

    def set_task_state(self, name: str, state: TaskState) -> None:
        """Raises ParameterError on an unknown task, or one that was removed."""
        before = self.task(name)
        if before is None:
            raise ParameterError(f"there is no task {name!r}")
        if before.state == "removed":
            raise ParameterError(f"task {name!r} was removed, for good: add another one, with another name")
        self._run(_tasks.update().where(_tasks.c.name == name).values(state=state))
        self._changed()

    def finish_task(self, name: str) -> None:
        """The task has all its models. One that was removed meanwhile stays so."""
        there = sql.and_(_tasks.c.name == name, _tasks.c.state != "removed")
        if self._run(_tasks.update().where(there).values(state="done")).rowcount:
            self._changed()

    def remove_task(self, name: str) -> None:
        """Take the task back for good: it gets no ticket, devices are told of it no more, and whoever serves ends its
        open rounds. Its rounds and models stay, and so does its name. The same again changes nothing.

        Raises ParameterError on an unknown task.
        """
        there = sql.and_(_tasks.c.name == name, _tasks.c.state != "removed")
        if self._run(_tasks.update().where(there).values(state="removed")).rowcount:
            self._run(_waits.delete().where(_waits.c.task == name))
            self._changed()
        elif self.task(name) is None:
            raise ParameterError(f"there is no task {name!r}")

    def skip_round(self, name: str, *, end_running: bool = False) -> int:
        """Leave out one round number: after the store was put back to an earlier state, devices and members have seen
        tickets that it knows nothing of. Returns the next number. Raises ParameterError on an unknown task.

        end_running: also end the task's rounds that have not ended, without a sum, as a damaged disk may ask for. Only
        while nobody serves: a server would go on with them. One that was certified stays charged for.
        """
        if end_running:
            active = sql.and_(_rounds.c.task == name, _rounds.c.phase.in_(ACTIVE))
            for row in self._all(sql.select(_rounds.c.tid).where(active)):
                self._end(row.tid, phase="ABORTED", reason="ended by the operator")
        bump = _tasks.update().where(_tasks.c.name == name).values(next_round=_tasks.c.next_round + 1)
        if not self._run(bump).rowcount:
            raise ParameterError(f"there is no task {name!r}")
        self._changed()
        return int(self._connection.execute(sql.select(_tasks.c.next_round).where(_tasks.c.name == name)).scalar_one())

    def set_waiting(self, name: str, reason: str) -> None:
        """Why the task has no next ticket, until it has one (`add_round`)."""
        self._put(_waits, {"task": name}, {"reason": reason})

    def waiting(self, name: str) -> str:
        """Why the task had no next ticket when one was last tried; empty if it got it."""
        row = self._one(sql.select(_waits.c.reason).where(_waits.c.task == name))
        return str(row.reason) if row else ""

    # --- rounds

    def add_round(self, row: RoundRow, prekeys: Iterable[tuple[bytes, int]]) -> None:
        """A ticket, with the prekeys (member, serial) that it uses up and its number: its task waits no longer."""
        self._run(_rounds.insert().values(**row._asdict()))
        for member, serial in prekeys:
            self.use_prekey(member, serial, row.tid)
        self._run(_tasks.update().where(_tasks.c.name == row.task).values(next_round=row.number + 1))
        self._run(_waits.delete().where(_waits.c.task == row.task))

    def round(self, tid: bytes) -> RoundRow | None:
        row = self._one(sql.select(_rounds).where(_rounds.c.tid == tid))
        return RoundRow(**row._mapping) if row else None

    def rounds(self, task: str) -> list[RoundRow]:
        """A task's rounds, by number."""
        rows = self._all(sql.select(_rounds).where(_rounds.c.task == task).order_by(_rounds.c.number))
        return [RoundRow(**row._mapping) for row in rows]

    def last_round(self, task: str) -> RoundRow | None:
        row = self._one(sql.select(_rounds).where(_rounds.c.task == task).order_by(_rounds.c.number.desc()).limit(1))
        return RoundRow(**row._mapping) if row else None

    def active_rounds(self) -> list[RoundRow]:
        """Those that have not ended, oldest first."""
        query = sql.select(_rounds).where(_rounds.c.phase.in_(ACTIVE)).order_by(_rounds.c.opened_s, _rounds.c.number)
        return [RoundRow(**row._mapping) for row in self._all(query)]

    def add_contributions(self, tid: bytes, rows: Sequence[ContributionRow]) -> None:
        """Contributions whose bytes are on disk."""
        self._run(_contributions.insert(), [{"tid": tid, **row._asdict()} for row in rows])

    def contributions(self, tid: bytes) -> list[ContributionRow]:
        """By slot."""
        c = _contributions.c
        query = sql.select(c.slot, c.sender, c.digest, c.header).where(c.tid == tid).order_by(c.slot)
        return [ContributionRow(**row._mapping) for row in self._all(query)]

    def contribution_of(self, tid: bytes, sender: int) -> bytes | None:
        """The hash of the header that this sender's receipt is for, also after the round."""
        c = _contributions.c
        row = self._one(sql.select(c.digest).where(c.tid == tid, c.sender == sender))
        return bytes(row[0]) if row else None

    def sends(self, task: str) -> list[tuple[int, int, int]]:
        """(epoch, sender, contributions to the task's rounds of that epoch) of everybody who sent any."""
        c, r = _contributions.c, _rounds.c
        joined = _contributions.join(_rounds, c.tid == r.tid)
        sent = sql.func.count().label("sent")
        query = sql.select(r.epoch, c.sender, sent).select_from(joined).where(r.task == task)
        return [(row.epoch, row.sender, row.sent) for row in self._all(query.group_by(r.epoch, c.sender))]

    def set_checkpoint(self, tid: bytes, slots: int, file_hash: bytes) -> None:
        """The running sums of slots 0 .. slots-1 are in a file of this hash."""
        self._put(_checkpoints, {"tid": tid}, {"slots": slots, "hash": file_hash})

    def checkpoint(self, tid: bytes) -> tuple[int, bytes] | None:
        row = self._one(sql.select(_checkpoints.c.slots, _checkpoints.c.hash).where(_checkpoints.c.tid == tid))
        return (row.slots, bytes(row.hash)) if row else None

    def set_complaints(self, tid: bytes, member: int, senders: Iterable[int]) -> None:
        """Every sender that the member has complained about."""
        mine = sql.and_(_complaints.c.tid == tid, _complaints.c.member == member)
        self._run(_complaints.delete().where(mine))
        rows = [{"tid": tid, "member": member, "sender": sender} for sender in senders]
        if rows:
            self._run(_complaints.insert(), rows)

    def complaints(self, tid: bytes) -> dict[int, frozenset[int]]:
        named: dict[int, set[int]] = {}
        for row in self._all(sql.select(_complaints).where(_complaints.c.tid == tid)):
            named.setdefault(row.member, set()).add(row.sender)
        return {member: frozenset(senders) for member, senders in named.items()}

    def set_sealed(self, tid: bytes, seal: bytes) -> None:
        self._run(_rounds.update().where(_rounds.c.tid == tid).values(phase="SEALED", seal=seal))

    def set_signature(self, tid: bytes, member: int, signature: bytes) -> None:
        self._put(_signatures, {"tid": tid, "member": member}, {"signature": signature})

    def signatures(self, tid: bytes) -> dict[int, bytes]:
        rows = self._all(sql.select(_signatures).where(_signatures.c.tid == tid))
        return {row.member: bytes(row.signature) for row in rows}

    def set_certified(self, tid: bytes, certificate: bytes) -> None:
        self._run(_rounds.update().where(_rounds.c.tid == tid).values(phase="CERTIFIED", certificate=certificate))

    def set_release(self, tid: bytes, member: int, release: bytes) -> None:
        self._put(_releases, {"tid": tid, "member": member}, {"release": release})

    def releases(self, tid: bytes) -> dict[int, bytes]:
        rows = self._all(sql.select(_releases).where(_releases.c.tid == tid))
        return {row.member: bytes(row.release) for row in rows}

    def set_done(self, tid: bytes, transcript: bytes, reason: str, now_s: float) -> None:
        """The round is opened; reason: of groups without a sum, or why there is no model."""
        self._end(tid, phase="DONE", transcript=transcript, reason=reason, ended_s=now_s)

    def set_aborted(self, tid: bytes, notice: bytes, reason: str, now_s: float) -> None:
        self._end(tid, phase="ABORTED", notice=notice, reason=reason, ended_s=now_s)

    def _end(self, tid: bytes, **values: Any) -> None:
        """What only a running round needs is dropped: headers hold proofs of a kilobyte each, releases shares."""
        self._run(_rounds.update().where(_rounds.c.tid == tid).values(**values))
        self._run(_contributions.update().where(_contributions.c.tid == tid).values(header=None))
        for table in (_signatures, _releases, _checkpoints):
            self._run(table.delete().where(table.c.tid == tid))

    def set_anchors(self, rows: Iterable[AnchorRow]) -> None:
        for row in rows:
            values = row._asdict()
            self._put(_anchors, {name: values.pop(name) for name in ("device", "task")}, values)

    def anchors(self) -> list[AnchorRow]:
        return [AnchorRow(**row._mapping) for row in self._all(sql.select(_anchors))]

    def set_headers(self, rows: Sequence[HeaderRow]) -> None:
        """Instead of those devices' earlier ones."""
        if rows:
            self._run(
                _headers.delete().where(_headers.c.device == sql.bindparam("known")),
                [{"known": row.device} for row in rows],
            )
            self._run(_headers.insert(), [row._asdict() for row in rows])

    def headers(self) -> list[HeaderRow]:
        return [HeaderRow(**row._mapping) for row in self._all(sql.select(_headers))]

    # --- models

    def add_model(self, row: ModelRow) -> None:
        """A model whose files are on disk."""
        self._run(
            _models.insert().values(**{**row._asdict(), "metrics": json.dumps(dict(row.metrics), sort_keys=True)})
        )

    def newest_model(self, task: str) -> ModelRow | None:
        row = self._one(sql.select(_models).where(_models.c.task == task).order_by(_models.c.number.desc()).limit(1))
        return _model(row) if row else None

    def model(self, task: str, number: int) -> ModelRow | None:
        row = self._one(sql.select(_models).where(_models.c.task == task, _models.c.number == number))
        return _model(row) if row else None

    def models(self, task: str) -> list[ModelRow]:
        """By number."""
        rows = self._all(sql.select(_models).where(_models.c.task == task).order_by(_models.c.number))
        return [_model(row) for row in rows]

    def newest_models(self, task: str, count: int) -> list[ModelRow]:
        """The last `count`, by number."""
        query = sql.select(_models).where(_models.c.task == task).order_by(_models.c.number.desc()).limit(count)
        return [_model(row) for row in reversed(self._all(query))]

    def blob_names(self) -> set[bytes]:
        """Of every file in `blobs/` that some row names."""
        columns = (_tasks.c.bundle_file, _models.c.parameters, _models.c.memory)
        return {bytes(row[0]) for column in columns for row in self._all(sql.select(column).where(column.is_not(None)))}

    def forget_memory(self, task: str, before: int) -> list[bytes]:
        """Models before this number keep their parameters and no optimiser state. Returns the files to delete."""
        old = sql.and_(_models.c.task == task, _models.c.number < before, _models.c.memory.is_not(None))
        files = [bytes(row[0]) for row in self._all(sql.select(_models.c.memory).where(old))]
        if files:
            self._run(_models.update().where(old).values(memory=None))
            kept = self._all(sql.select(_models.c.memory).where(_models.c.memory.in_(files)))
            files = sorted(set(files) - {bytes(row[0]) for row in kept})
        return files


def _tags_text(tags: Iterable[str]) -> str:
    return json.dumps(sorted(set(tags)))


def _tags_of(text: str) -> frozenset[str]:
    return frozenset(json.loads(text))


def _device(row: sql.Row[Any]) -> DeviceRow:
    return DeviceRow(**{**row._mapping, "tags": _tags_of(row.tags)})


def _epoch(row: sql.Row[Any]) -> EpochRow:
    keys = bytes(row.roster)
    return EpochRow(**{**row._mapping, "roster": tuple(keys[i : i + 32] for i in range(0, len(keys), 32))})


def _model(row: sql.Row[Any]) -> ModelRow:
    return ModelRow(**{**row._mapping, "metrics": json.loads(row.metrics)})
