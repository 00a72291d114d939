"""Ledger heads of devices, kept where a device's disk does not reach (docs/protocol.md section 10.3).

A device's ledger only grows, and every ticket that it takes adds to it before it contributes. So the heads that it
signs in one task grow from round to round, and two heads of the same length are the same head. A device whose disk went
back to an earlier state, or that runs twice from copies of one card, breaks that and gives itself away.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from edge_sdk.errors import PeerError
from edge_sdk.protocol.messages import Anchor, Header


class LedgerForked(PeerError):
    """A header, signed by its device, shows a ledger that was rolled back or runs twice. Keep it: `Anchors.shown`."""


class Anchored(NamedTuple):
    """The head that a device signed in a round."""

    round: int
    anchor: Anchor


@dataclass(frozen=True)
class Anchors:
    """What devices signed about their ledgers: at most one head for each device and task that was ever seen."""

    newest: Mapping[bytes, Mapping[str, Anchored]] = field(default_factory=dict)
    """device's key -> task -> the head of the newest round."""
    forked: frozenset[bytes] = frozenset()
    """Keys of devices whose heads contradicted each other. For good: a ledger that forgot does not remember later."""

    def check(self, task: str, round_number: int, header: Header) -> None:
        """Return if a header of this round fits what its sender showed before, else raise LedgerForked.

        The header's signature was checked: only its device can contradict itself.
        """
        subject = f"header of sender {header.sender}"
        if header.key in self.forked:
            raise LedgerForked(
                f"{subject}: its ledger was rolled back or its device cloned, as an earlier header showed"
            )
        contradiction = _contradiction(self.newest.get(header.key, {}), task, round_number, header.ledger)
        if contradiction is not None:
            raise LedgerForked(f"{subject}: {contradiction}: it was rolled back or its device cloned")

    def shown(self, task: str, round_number: int, headers: Iterable[Header]) -> Anchors:
        """With these headers of a round seen, whose signatures were checked.

        The same header again changes nothing. Nothing is learned from a head that contradicts the ones before, but that
        its device forked.
        """
        newest, forked = dict(self.newest), set(self.forked)
        for header in headers:
            if header.key in forked:
                continue
            own = newest.get(header.key, {})
            if _contradiction(own, task, round_number, header.ledger) is not None:
                forked.add(header.key)
            elif task not in own or own[task].round < round_number:
                newest[header.key] = {**own, task: Anchored(round_number, header.ledger)}
        return Anchors(newest, frozenset(forked))


def _contradiction(seen: Mapping[str, Anchored], task: str, round_number: int, head: Anchor) -> str | None:
    """What about a device's head in this round cannot be so, if its ledger only grew since the heads that were seen.

    Between tasks only equal lengths are compared: headers of different tasks may arrive in any order.
    """
    for other, (before, anchor) in seen.items():
        if anchor.entries == head.entries and anchor.link != head.link:
            return f"entry {head.entries} of its ledger is another one than in round {before} of {other}"
        if other == task and before < round_number and head.entries <= anchor.entries:
            return f"its ledger has {head.entries} entries, and had {anchor.entries} in round {before}"
    return None
