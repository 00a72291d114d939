"""The ledger on disk: what this device spent, written before anything leaves (docs/privacy.md section 5).

Append-only, in records of 512 bytes, the least that a disk writes whole: the length of an entry's encoding (2 bytes,
little endian), the encoding, zeros, and in the last 32 bytes the chain's hash after it. The first record is the header.
Every append is fsynced before it returns. Records of one size leave no doubt where one ends: a length that was damaged
cannot make those after it look like the rest of an unfinished one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from edge_sdk.errors import ParameterError
from edge_sdk.files import open_locked, write_all, write_once
from edge_sdk.privacy.ledger_entry import (
    MAX_ENTRY_BYTES,
    Account,
    Draw,
    Entry,
    Head,
    LedgerDamaged,
    Limits,
    Release,
    Send,
    Summary,
    decode_entry,
    encode_entry,
    first_link,
    next_link,
    takes_part,
)
from edge_sdk.privacy.mechanism import Unit

_MAGIC = b"sordino ledger 1\n"
_OWNER_BYTES = 32
_RECORD_BYTES = 512
_LENGTH_BYTES = 2
_LINK_BYTES = 32
_ANEW = "enrol it anew, with a new identity: `edge-device join` with a new token, in another directory"
PUT_BACK = f"Put the newest copy of this device's directory back, or {_ANEW}"
"""What the owner of a device can do whose ledger went back. Of one that forked no copy is the newest."""


def create_ledger(path: Path, owner: bytes) -> None:
    """An empty ledger for the device with this public key (32 bytes), durable when this returns.

    Once in a device's life, when it gets its identity: a ledger made anew forgets everything.
    Raises ParameterError if there is one already, OSError from the disk.
    """
    if len(owner) != _OWNER_BYTES:
        raise ParameterError(f"a ledger's owner is a public key of {_OWNER_BYTES} bytes, not {len(owner)}")
    # Its owner's alone: it says which rounds this device took part in.
    if not write_once(path, _header(owner), mode=0o600):
        raise ParameterError(f"there is a ledger at {path.name} already")


def is_ledger_of(path: Path, owner: bytes) -> bool:
    """Whether the file begins as a ledger of the device with this public key does. Raises OSError."""
    with path.open("rb") as file:
        return file.read(_RECORD_BYTES) == _header(owner)


class Ledger:
    """An open ledger: one process has it at a time. Not safe for several threads."""

    def __init__(
        self, path: Path, owner: bytes, protects: Unit, lifetime: Limits, tasks: Mapping[str, Limits] | None = None
    ) -> None:
        """Open, check every link, and cut a last record that a power cut left unfinished.

        Raises LedgerDamaged if the file is missing, another device's or changed; ParameterError if another process has
        it open, or on entries that `protects` cannot account for.
        """
        self.account = Account(protects, lifetime, dict(tasks or {}))
        self.cut_bytes = 0
        """Bytes of an unfinished record that opening cut off. Their append never returned, so nothing was sent."""
        self._links = [first_link(owner)]
        try:
            self._file = open_locked(path, os.O_RDWR, f"another process has the ledger {path.name} open")
        except FileNotFoundError as error:
            raise LedgerDamaged(f"there is no ledger at {path.name}: what this device spent is unknown") from error
        try:
            self._load(owner)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file. Closing twice is harmless."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    @property
    def head(self) -> Head:
        """Where the ledger stands, for committee members to keep."""
        return Head(len(self._links) - 1, self._links[-1])

    def summary(self) -> Summary:
        """What is spent of each budget against each observer, and in how many rounds: for people, and for `status`."""
        return self.account.summary(self.head)

    def check_extends(self, anchored: Head) -> None:
        """Return if this ledger is a continuation of the one whose head was anchored.

        Raises LedgerDamaged if it is shorter (rolled back) or another one (forked: a cloned device), with what its
        owner can do; ParameterError on a head that is none.
        """
        if anchored.entries < 0 or len(anchored.link) != _LINK_BYTES:
            raise ParameterError("an anchored head has a number of entries and 32 bytes")
        if anchored.entries >= len(self._links):
            raise LedgerDamaged(
                f"the ledger was rolled back: {self.head.entries} entries, but {anchored.entries} were anchored. "
                f"{PUT_BACK}"
            )
        if self._links[anchored.entries] != anchored.link:
            raise LedgerDamaged(
                f"the ledger forked: entry {anchored.entries} is not the one that was anchored. An old copy of this "
                f"device's directory was used, or two copies are: {_ANEW}"
            )

    def draw(
        self, task: str, number: int, tid: bytes, operator: bytes, release: Release, coin: bytes, time_s: int
    ) -> bool:
        """Toss this device's coin for a ticket, once: whether it takes part. The charge against readers is durable.

        Asked again about the same ticket, with whatever coin, it tells the first outcome: a device that tossed again
        after a crash would take part more often than its rate.
        coin: 32 fresh secret bytes.
        Raises BudgetExceeded with the budget that does not allow it (nothing is written); ParameterError on a ticket of
        the same hash with another content; OSError from the disk, after which the ledger must be opened anew.
        """
        before = self.account.draws.get(tid)
        if before is not None:
            if (before.task, before.round, before.operator, before.release) != (task, number, operator, release):
                raise ParameterError("a ticket of this hash was drawn for with another content")
            return before.takes_part
        outcome = takes_part(release.device_rate, coin)
        self._append(Draw(task, number, tid, operator, release, outcome, time_s))
        return outcome

    def charge(self, tid: bytes, contribution: bytes, time_s: int) -> None:
        """Charge a contribution; when this returns the charge is durable and the contribution may leave.

        contribution: hash of its header. The same one again is free: a retry sends the same bytes.
        Raises BudgetExceeded (nothing is written); ParameterError without a draw that came up, or on another
        contribution for the same ticket; OSError from the disk, after which the ledger must be opened anew.
        """
        before = self.account.sends.get(tid)
        if before is not None and before == contribution:
            return
        self._append(Send(tid, contribution, time_s))

    def _append(self, entry: Entry) -> None:
        if self._file < 0:
            raise ParameterError("the ledger is closed, or a write to it failed: open it anew")
        self.account.check(entry)
        body = encode_entry(entry)
        try:
            decode_entry(body)
        except LedgerDamaged as error:
            raise ParameterError(f"not written, for it could not be read again: {error}") from error
        link = next_link(self._links[-1], body)
        record = _record(body, link)
        try:
            write_all(self._file, record)
            os.fsync(self._file)
        except BaseException:
            # After a failed fsync the kernel may have dropped the pages and a second one would succeed: only reading
            # the file again tells what is there.
            self.close()
            raise
        self._links.append(link)
        self.account.record(entry)

    def _load(self, owner: bytes) -> None:
        data = _read_all(self._file)
        if data[:_RECORD_BYTES] != _header(owner):
            raise LedgerDamaged("the file is not a ledger of this device")
        for start in range(_RECORD_BYTES, len(data), _RECORD_BYTES):
            record = data[start : start + _RECORD_BYTES]
            length = int.from_bytes(record[:_LENGTH_BYTES], "little")
            body = record[_LENGTH_BYTES : _LENGTH_BYTES + length]
            link = next_link(self._links[-1], body)
            if length > MAX_ENTRY_BYTES or record != _record(body, link):
                if start + _RECORD_BYTES < len(data) or not _unfinished(record):
                    raise LedgerDamaged(
                        f"entry {len(self._links)} does not follow from those before it: it was changed"
                    )
                self.cut_bytes = len(record)
                os.ftruncate(self._file, start)
                os.fsync(self._file)
                break
            self.account.record(decode_entry(body))
            self._links.append(link)
        os.lseek(self._file, len(self._links) * _RECORD_BYTES, os.SEEK_SET)


def _unfinished(record: bytes) -> bool:
    """Whether this last record is what an interrupted append leaves: it ends early, or was never written and is zeros.

    Anything else was changed after it was written; then a charge may be lost, and the ledger is not to be used. A disk
    writes sectors whole, so part of a chain's hash is a change too.
    """
    return len(record) < _RECORD_BYTES or not any(record[-_LINK_BYTES:])


def _header(owner: bytes) -> bytes:
    return (_MAGIC + owner).ljust(_RECORD_BYTES, b"\0")


def _record(body: bytes, link: bytes) -> bytes:
    return (len(body).to_bytes(_LENGTH_BYTES, "little") + body).ljust(_RECORD_BYTES - _LINK_BYTES, b"\0") + link


def _read_all(file: int) -> bytes:
    parts = []
    while part := os.read(file, 1 << 20):
        parts.append(part)
    return b"".join(parts)
