"""The owner's rules for a round: policy.toml and the ledger that it bounds, held against what others saw of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from edge_sdk.errors import ParameterError, PeerError
from edge_sdk.files import read_text, reason, write_whole
from edge_sdk.ledger import PUT_BACK, Ledger
from edge_sdk.policy import Policy
from edge_sdk.privacy.ledger_entry import Head, LedgerDamaged
from edge_sdk.protocol.contributor import Idle
from edge_sdk.protocol.messages import Header, Signed, decode, encode, verify
from edge_sdk.store import Store

SHOWN = "ledger.shown"
"""The file of the header that told a run that its ledger went back or forked. For `doctor`: what it says is this
device's own word, and is held against the ledger again."""


@dataclass(frozen=True)
class Rules:
    """What decides whether a round is entered: the owner's policy, and the account that it bounds."""

    policy: Policy
    ledger: Ledger


class RulesFile:
    """policy.toml and the ledger that it bounds, read again when the file changes."""

    def __init__(self, directory: Path, owner: bytes, store: Store) -> None:
        """owner: this device's public key. Nothing is opened before `read`."""
        self._directory, self._owner, self._store = directory, owner, store
        self._stamp: tuple[int, ...] | None = None
        self._rules: Rules | None = None
        self._in_use = False
        self._shown: tuple[Head, Signed] | None = None
        """The longest head of its ledger that this device signed, as far as it was told, and in which header."""

    @property
    def stamp(self) -> tuple[int, ...]:
        """Differs when the file was changed."""
        try:
            found = (self._directory / "policy.toml").stat()
        except OSError:
            return ()
        return found.st_mtime_ns, found.st_size, found.st_ino

    def read(self) -> Rules:
        """The rules as the file has them now, or within `in_use` those that are in use.

        Raises ParameterError on a policy that cannot be read, LedgerDamaged, OSError.
        """
        stamp = self.stamp
        if self._rules is None or (stamp != self._stamp and not self._in_use):
            self.close()
            policy = read_policy(self._directory)
            path = self._directory / "ledger"
            ledger = Ledger(path, self._owner, policy.protects, policy.lifetime, policy.task_limits)
            try:
                check_remembers(ledger, self._store.positions())
            except BaseException:
                ledger.close()
                raise
            self._rules, self._stamp = Rules(policy, ledger), stamp
        if self._shown is not None:
            self._check_extends(self._rules.ledger, *self._shown)
        return self._rules

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """While a round trains: a file that was changed is left for later, or the ledger would be closed under it."""
        self._in_use = True
        try:
            yield
        finally:
            self._in_use = False

    def hold_against(self, shown: Signed) -> None:
        """Hold the ledger against a header of ours that the coordinator knows: it tells that all of the disk went back.

        Only what this device signed counts, so that no coordinator can end an honest one.
        Raises PeerError if it is no header of ours, LedgerDamaged if the ledger is not the one that it was made with.
        """
        try:
            head = head_in(shown, self._owner)
        except PeerError as error:
            raise PeerError(f"welcome: what it shows is no header of this device: {error}") from error
        if self._shown is None or head.entries > self._shown[0].entries:
            self._shown = head, shown
        with suppress(ParameterError):  # a policy to be mended: `read` looks again before anything is entered
            self._check_extends(self.read().ledger, head, shown)

    def _check_extends(self, ledger: Ledger, head: Head, shown: Signed) -> None:
        try:
            ledger.check_extends(head)
        except LedgerDamaged:
            with suppress(OSError):  # the run ends with it all the same
                write_whole(self._directory / SHOWN, encode(shown))
            raise

    def close(self) -> None:
        """Let go of the ledger; `read` opens it anew, which a failed write to it asks for."""
        if self._rules is not None:
            self._rules.ledger.close()
            self._rules = None


def head_in(signed: Signed, owner: bytes) -> Head:
    """The ledger's head in a contribution's header, if the device with this public key signed it as its own.

    Raises PeerError.
    """
    header = verify(Header, owner, signed)
    if header.key != owner:
        raise PeerError("the header names another device")
    return Head(header.ledger.entries, header.ledger.link)


def read_shown(directory: Path, owner: bytes) -> Head | None:
    """The head that ended an earlier run, if one did. Raises ParameterError on a file that no run wrote, OSError."""
    path = directory / SHOWN
    try:
        return head_in(decode(Signed, path.read_bytes()), owner)
    except FileNotFoundError:
        return None
    except PeerError as error:
        raise ParameterError(f"{path} is no header of this device, which never wrote it: remove it") from error


def check_remembers(ledger: Ledger, positions: Mapping[str, Idle]) -> None:
    """Return if the ledger holds the coin of every task's newest ticket, else raise LedgerDamaged.

    The coin is on disk before the state says that the ticket was taken. So a ledger that lacks it is an old copy that
    was put back, or another one: its budget would be spent twice. That all of the disk went back, only the committee
    can tell (docs/protocol.md section 10.3).
    positions: of the device's state, by task.
    """
    for task, position in positions.items():
        if position.tid not in ledger.account.draws:
            raise LedgerDamaged(
                f"the ledger was rolled back or replaced: it knows nothing of round {position.round} of {task}, which "
                f"this device took part in or sat out. {PUT_BACK}"
            )


def read_policy(directory: Path) -> Policy:
    """The directory's policy.toml. Raises ParameterError that names the file and the line or field."""
    path = directory / "policy.toml"
    try:
        return Policy.from_toml(read_text(path))
    except OSError as error:
        raise ParameterError(f"{path}: {reason(error)}") from error
    except ParameterError as error:
        raise ParameterError(f"{path}: {str(error).removeprefix('policy: ')}") from error
