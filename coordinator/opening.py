"""Opens rounds beside the loop: from members' sums to the next model, in one thread (docs/protocol.md section 12).

Opening a garbled group takes seconds, and making a model reads and writes large files; the loop must not wait for
either. The thread changes nothing that the loop looks at: it is given what it needs, writes files that no row names
yet, and what comes of it counts when the loop has taken it up.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import numpy as np

from coordinator import rounds
from coordinator.live import LiveRound, Opened
from coordinator.optimizer import pack_memory, unpack_memory
from coordinator.rows import ModelRow
from coordinator.store import Store
from edge_sdk.crypto.identity import Identity
from edge_sdk.errors import RoundAborted
from edge_sdk.protocol import aggregator
from edge_sdk.protocol.aggregator import Certified


class Opener:
    """One round is opened at a time, in the order in which they were submitted."""

    def __init__(
        self,
        store: Store,
        identity: Identity,
        entropy: Callable[[int], bytes],
        passed: Callable[[str], None],
    ) -> None:
        """identity: the coordinator's.  entropy: so many fresh secret bytes.  passed: told when a model is on disk."""
        self._store, self._identity, self._entropy, self._passed = store, identity, entropy, passed
        self._worker: Executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="opening")

    def submit(self, live: LiveRound, state: Certified, base: ModelRow | None, final: bool) -> Future[Opened]:
        """Open a round with the answers that it has.

        live: takes no contributions any more, so its sums stay as they are.  base: the model that the sum moves, None
        if there is none.  final: no more answers will come.
        The future raises StoreError if a vector or model is no longer what was stored.
        """
        return self._worker.submit(self._open, live, state, base, final)

    def close(self) -> None:
        """Wait for what runs."""
        self._worker.shutdown(wait=True)

    def _open(self, live: LiveRound, state: Certified, base: ModelRow | None, final: bool) -> Opened:
        result = aggregator.open_round(state, live.sums_of_sealed(state.groups), self._identity, final=final)
        if isinstance(result, Certified):
            return Opened(result, None, None, "")
        if base is None:
            return Opened(result, None, None, "the task has no model")
        parameters = np.frombuffer(self._store.blob(base.parameters), dtype="<f4").astype(np.float32)
        memory = unpack_memory(self._store.blob(base.memory)) if base.memory is not None else {}
        try:
            model = rounds.next_model(live.task, live.round, result, parameters, memory, base.number, self._entropy(32))
        except RoundAborted as error:
            return Opened(result, None, None, str(error))
        files = (
            self._store.put_blob(model.parameters.astype("<f4").tobytes()),
            self._store.put_blob(pack_memory(model.memory)),
        )
        self._passed("model written")
        return Opened(result, model, files, "; ".join(dict.fromkeys(result.reasons.values())))
