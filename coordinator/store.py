"""What the coordinator knows, on disk: rows in SQLite through SQLAlchemy Core, bulk in files (docs/services.md 5).

The order is always: files written and flushed, then one transaction of rows, then whatever is announced. A row never
names a file that is not there; a file that no row names is rubbish of a crash and is removed at the next start, unless
a command is storing files just then.

`Store.transaction()` gives a `Transaction` (rows.py), whose methods are named for what they record; `Store.reading()`
the same without writing. Several processes may have the store open (the operator's commands beside the server): rows
are SQLite's matter. Only one may serve: `Store.serve_alone()`.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sql

from coordinator.errors import StoreError
from coordinator.rows import SCHEMA_VERSION, Transaction, meta, metadata
from coordinator.vectors import Vectors
from edge_sdk.crypto.hashing import content_hash
from edge_sdk.errors import ParameterError
from edge_sdk.files import open_locked, sync_directory, write_whole

DATABASE = "coordinator.db"

_BLOB_NAME = re.compile(r"[0-9a-f]{64}(\.new)?$")


def check_ours(directory: Path) -> None:
    """Before anything is written into it: root's files would lock its owner out.

    Raises StoreError if the directory is another user's, or can be read by others.
    """
    status = directory.stat()
    if status.st_uid != os.geteuid():
        raise StoreError(f"{directory} belongs to another user (uid {status.st_uid}): run this as that user")
    if status.st_mode & 0o077:
        raise StoreError(f"{directory} can be read by others: chmod 0700 it")


class Store:
    """The coordinator's directory: `coordinator.db`, `blobs/` by content hash, `rounds/` by ticket."""

    def __init__(self, directory: str | os.PathLike[str], url: str | None = None) -> None:
        """Open it, or make it. url: of another database than the directory's own (PostgreSQL).

        Raises StoreError if a newer version wrote it, or as `check_ours` does.
        """
        self.directory = Path(directory)
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_ours(self.directory)
        self.blobs, self._rounds = self.directory / "blobs", self.directory / "rounds"
        for path in (self.blobs, self._rounds):
            path.mkdir(mode=0o700, exist_ok=True)
        if url is None:
            path = self.directory / DATABASE
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))  # SQLite would make it 0644
            url = f"sqlite:///{path}"
        self._engine = sql.create_engine(url)
        if self._engine.dialect.name == "sqlite":
            _prepare_sqlite(self._engine)
        self._served: int | None = None
        self._writing: int | None = None
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="vectors")
        self._check_schema()

    def _check_schema(self) -> None:
        with self._engine.begin() as connection:
            if not sql.inspect(connection).has_table("meta"):
                metadata.create_all(connection)
                connection.execute(
                    meta.insert(), [{"key": "schema", "value": SCHEMA_VERSION}, {"key": "changes", "value": 0}]
                )
                return
            found = connection.execute(sql.select(meta.c.value).where(meta.c.key == "schema")).scalar_one()
            if found == SCHEMA_VERSION:
                metadata.create_all(connection)  # tables that came later: no schema of this number lacks a column
        if found != SCHEMA_VERSION:
            raise StoreError(
                f"{self.directory} was written by schema {found}, this program reads {SCHEMA_VERSION}: "
                + ("install a newer sordino" if found > SCHEMA_VERSION else "this version cannot upgrade it")
            )

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Rows that are written together: on disk when the block ends, not at all if it raises."""
        with self._engine.begin() as connection:
            yield Transaction(connection)

    @contextmanager
    def reading(self) -> Iterator[Transaction]:
        """As `transaction`, without taking the writer's place."""
        with self._engine.connect().execution_options(reading=True) as connection:
            yield Transaction(connection)

    def serve_alone(self) -> None:
        """Take the place of the one process that serves. Raises StoreError if another has it."""
        busy = f"another process serves from {self.directory}"
        try:
            self._served = open_locked(self.directory / "serving.lock", os.O_RDWR | os.O_CREAT, busy)
        except ParameterError as error:
            raise StoreError(busy) from error

    def close(self) -> None:
        self._engine.dispose()
        self._writer.shutdown()
        for fd in (self._served, self._writing):
            if fd is not None:
                os.close(fd)
        self._served = self._writing = None

    # --- blobs

    def put_blob(self, data: bytes | memoryview) -> bytes:
        """Store bytes under their content hash, flushed to disk. Returns the hash.

        From here on, until `close`, no server deletes files: the row that will name this one is not written yet.
        """
        if self._writing is None and self._served is None:  # who serves is the one who deletes, and knows what it does
            self._writing = self._lock_blobs(fcntl.LOCK_SH)
        name = content_hash(data)
        path = self.blob_path(name)
        if not (path.exists() and path.stat().st_size == len(data)):
            write_whole(path, data)
        return name

    def blob_path(self, name: bytes) -> Path:
        return self.blobs / name.hex()

    def blob(self, name: bytes) -> bytes:
        """Raises StoreError if it is not there or not what it was."""
        try:
            data = self.blob_path(name).read_bytes()
        except FileNotFoundError as error:
            raise StoreError(f"blob {name.hex()} is missing from {self.blobs}") from error
        if content_hash(data) != name:
            raise StoreError(f"blob {name.hex()} in {self.blobs} is damaged")
        return data

    def drop_blobs(self, names: Iterable[bytes]) -> None:
        """Delete files that no row names any more; while a command stores some, `sweep` will."""
        with self._named_blobs() as named:
            for name in set(names) - named if named is not None else ():
                self.blob_path(name).unlink(missing_ok=True)

    @contextmanager
    def _named_blobs(self) -> Iterator[set[bytes] | None]:
        """The files that rows name; while the block runs nobody stores more. None if somebody is storing some now."""
        try:
            fd = self._lock_blobs(fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        try:
            with self.reading() as t:
                named = t.blob_names()
            yield named
        finally:
            os.close(fd)

    def _lock_blobs(self, how: int) -> int:
        fd = os.open(self.directory / "blobs.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, how)
        except OSError:
            os.close(fd)
            raise
        return fd

    # --- a round's vectors and sums

    def vectors(self, tid: bytes, slots: int, slot_bytes: int) -> Vectors:
        """The file of a round's uploads; made if it is not there."""
        directory = self._rounds / tid.hex()
        if not directory.exists():
            directory.mkdir(mode=0o700)
            sync_directory(self._rounds)
        return Vectors(directory, slots, slot_bytes, self._writer)

    def erase_round(self, tid: bytes) -> None:
        """The round ended: its uploads and sums go. Once more is harmless."""
        shutil.rmtree(self._rounds / tid.hex(), ignore_errors=True)

    def sweep(self) -> None:
        """Remove what a crash left: rounds that ended, files half written, and those whose row was never written.

        Only for the process that serves, before it has stored anything.
        """
        with self.reading() as t:
            running = {row.tid.hex() for row in t.active_rounds()}
        for path in self._rounds.iterdir():
            if path.name not in running:
                shutil.rmtree(path, ignore_errors=True)
        with self._named_blobs() as named:
            if named is None:
                return
            kept = {name.hex() for name in named}
            for path in self.blobs.iterdir():
                if _BLOB_NAME.match(path.name) and path.name not in kept:
                    path.unlink(missing_ok=True)


def _prepare_sqlite(engine: sql.Engine) -> None:
    @sql.event.listens_for(engine, "connect")
    def connect(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # pysqlite would begin transactions by its own idea of when
        cursor = connection.cursor()
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=20000"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @sql.event.listens_for(engine, "begin")
    def begin(connection: sql.Connection) -> None:
        # A writer that begins as a reader can lose its place to another one, and fails then.
        reading = connection.get_execution_options().get("reading", False)
        connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")
