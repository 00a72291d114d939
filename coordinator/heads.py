"""Ledger heads that devices signed, and the header of each that shows the most (docs/protocol.md section 10.3).

The heads tell a device whose disk went back from one whose disk did not. The headers are there to be shown to their
devices again: one that forgot what it signed learns it from its own signature. Changes count in memory at once; what is
to be written of them is returned.
"""

from __future__ import annotations

from collections.abc import Sequence

from coordinator.batch import Effect
from coordinator.rows import AnchorRow, HeaderRow, Transaction
from coordinator.store import Store
from edge_sdk.protocol import messages
from edge_sdk.protocol.anchors import Anchored, Anchors
from edge_sdk.protocol.messages import Anchor, Header, Signed, Ticket


class Heads:
    """What is known of the ledgers of all devices that ever contributed."""

    def __init__(self, store: Store) -> None:
        """Starts with what is in the store."""
        newest: dict[bytes, dict[str, Anchored]] = {}
        forked = set()
        with store.reading() as t:
            for row in t.anchors():
                if row.forked:
                    forked.add(row.device)
                else:
                    newest.setdefault(row.device, {})[row.task] = Anchored(row.round, Anchor(row.entries, row.link))
            self._headers = {row.device: row for row in t.headers()}
        self.anchors = Anchors(newest, frozenset(forked))

    def longest(self, device: bytes) -> HeaderRow | None:
        """The header with the most entries that this device, by key, signed as far as is known."""
        return self._headers.get(device)

    def note(self, header: Header, signed: Signed) -> bool:
        """A header whose signature was checked. Returns whether its device has shown none with as many entries."""
        known = self._headers.get(header.key)
        if known is not None and known.entries >= header.ledger.entries:
            return False
        self._headers[header.key] = HeaderRow(header.key, header.ledger.entries, messages.encode(signed))
        return True

    def keep(self, ticket: Ticket, signed: Sequence[Signed]) -> Effect:
        """From now on a device whose ledger forgot this round's entries gives itself away.

        signed: the headers of all contributions that were taken; each was noted.
        """
        headers = [messages.decode(Header, one.body) for one in signed]
        shown = [self._headers[header.key] for header in headers]
        self.anchors = self.anchors.shown(ticket.task, ticket.round, headers)
        rows = [
            AnchorRow(h.key, ticket.task, ticket.round, h.ledger.entries, h.ledger.link, forked=False)
            for h in headers
            if h.key not in self.anchors.forked
        ]

        def write(t: Transaction) -> None:
            t.set_anchors(rows)
            t.set_headers(shown)

        return write

    def keep_fork(self, ticket: Ticket, header: Header, signed: Signed) -> Effect:
        """A header, signed by its device, contradicts what it showed before: for good."""
        self.anchors = self.anchors.shown(ticket.task, ticket.round, [header])
        row = AnchorRow(header.key, "", ticket.round, header.ledger.entries, header.ledger.link, forked=True)
        # Else the one that it contradicts is known, and says as much.
        shown = [self._headers[header.key]] if self.note(header, signed) else []

        def write(t: Transaction) -> None:
            t.set_anchors([row])
            t.set_headers(shown)

        return write
