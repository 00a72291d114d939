"""A task while the server has it: its newest models, who sent how often, and what its next ticket waits for."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from coordinator.rows import ModelRow, TaskRow, Transaction
from coordinator.task import Planned, Task, load
from edge_sdk.crypto.identity import Identity
from edge_sdk.protocol import messages
from edge_sdk.transport.wire import Model

MODELS_SERVED = 3
"""Newest models of a task that devices can fetch: who began before the last one was published ends in peace."""


@dataclass
class RunningTask:
    """One task. A paused or ended one is still here: its devices may yet ask for its model. So is one that was removed,
    for a round of it that was certified gives a model yet."""

    row: TaskRow
    task: Task
    planned: Planned
    models: list[ModelRow]
    """The newest ones, at least one, by number."""
    sends: Counter[bytes] = field(default_factory=Counter)
    """Contributions of each device, by key."""
    next_s: float = 0.0
    """No ticket before this time: the pause between rounds."""
    retry_s: float = 0.0
    """None is tried before this time, unless what lacked has come."""
    reason: str = ""
    """Why there is no ticket, as it was said last."""
    lacks_devices: bool = False
    lacks_prekeys: set[bytes] = field(default_factory=set)
    """Members whose prekey the next ticket waits for, by key."""
    _signed: dict[int, bytes] = field(default_factory=dict, repr=False)

    @classmethod
    def restore(cls, t: Transaction, row: TaskRow) -> RunningTask:
        """The task of this row, with what the store has of it."""
        task, planned = load(row)
        models = t.newest_models(row.name, MODELS_SERVED)
        sends: Counter[bytes] = Counter()
        rosters: dict[int, tuple[bytes, ...]] = {}
        for epoch, sender, count in t.sends(row.name):
            if epoch not in rosters:
                rosters[epoch] = t.epoch(epoch).roster
            sends[rosters[epoch][sender]] += count
        return cls(row, task, planned, models, sends)

    @property
    def is_removed(self) -> bool:
        """Whether no device is told of it any more."""
        return self.row.state == "removed"

    @property
    def model(self) -> ModelRow:
        """The newest one."""
        return self.models[-1]

    def publish(self, model: ModelRow) -> None:
        """A round gave the next model."""
        self.models = [*self.models, model][-MODELS_SERVED:]
        self._signed = {row.number: self._signed[row.number] for row in self.models if row.number in self._signed}

    def signed(self, model: ModelRow, identity: Identity) -> bytes:
        """One of its models as a signed `Model`, encoded. Made once, for every welcome names it.

        identity: the coordinator's.
        """
        if model.number not in self._signed:
            named = Model(self.task.name, model.number, self.planned.bundle, model.parameters)
            self._signed[model.number] = messages.encode(messages.sign(identity, named))
        return self._signed[model.number]

    # --- what the next ticket waits for

    def try_anew(self) -> None:
        """A ticket is tried now: what it lacks is found out again."""
        self.lacks_devices = False
        self.lacks_prekeys.clear()

    def device_came(self) -> None:
        """A device said Hello that was not there: if the ticket lacks devices, it is tried at once."""
        if self.lacks_devices:
            self.retry_s = 0.0

    def prekeys_came(self, member: bytes) -> None:
        """A member offered new prekeys: if it was the last one that the ticket waits for, that is tried at once."""
        last = self.lacks_prekeys == {member}  # not at each one's: who joined meanwhile would be an epoch each
        self.lacks_prekeys.discard(member)
        if last or self.lacks_devices:
            self.retry_s = 0.0

    def round_ended(self, now_s: float) -> None:
        """The pause begins."""
        self.next_s, self.retry_s = now_s + self.task.schedule.pause_s, 0.0
