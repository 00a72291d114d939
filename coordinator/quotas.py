"""How many frames of one device are looked at: so that one that floods takes nobody else's turn.

Frames that were asked for are free: a device that uploads sends as many as it can. All others it has a stock of, which
fills up again with time. What comes beyond it is dropped unread, and who goes on is kept out at the broker for a while:
there the frames of all devices wait in one queue, and only the broker can keep one from filling it. Pure: time is an
argument.
"""

from __future__ import annotations

from dataclasses import dataclass

FRAMES_S = 100.0
"""A device that fetches a model at 350 MB/s asks so often."""

STOCK = 1000.0

COSTLY = 10.0
"""What a frame costs that was refused with a line in the log, or has us read the store."""

MOST_EXPECTED = 1024
"""Chunks that were asked for and may still come."""

PATIENCE = 250
"""So many frames are dropped before the device is kept out."""

SILENCE_S = 60.0


@dataclass
class _Account:
    left: float
    since_s: float
    expected: int = 0
    dropped: int = 0
    """Since the stock was full last."""


class Quotas:
    """One account for each device that ever sent something."""

    def __init__(self, stock: float = STOCK) -> None:
        self._stock = stock
        self._accounts: dict[str, _Account] = {}
        self._kept_out: dict[str, float] = {}
        """Device -> until when."""

    def take(self, device: str, now_s: float) -> bool:
        """A frame came. Returns whether it is to be looked at."""
        account = self._account(device, now_s)
        if account.expected:
            account.expected -= 1
            return True
        if account.left >= 1.0:
            account.left -= 1.0
            return True
        account.dropped += 1
        if account.dropped >= PATIENCE and device not in self._kept_out:
            self._kept_out[device] = now_s + SILENCE_S
        return False

    def dropped(self, device: str) -> int:
        """Frames of the device since it last kept to what it may send."""
        account = self._accounts.get(device)
        return account.dropped if account is not None else 0

    def expect(self, device: str, frames: int, now_s: float) -> None:
        """So many were asked of it."""
        account = self._account(device, now_s)
        account.expected = min(account.expected + frames, MOST_EXPECTED)

    def charge(self, device: str, now_s: float) -> None:
        """One that was looked at was a costly one."""
        account = self._account(device, now_s)
        account.left = max(-self._stock, account.left - COSTLY)  # below nothing: it is paid off before the next one

    def kept_out(self, now_s: float) -> frozenset[str]:
        """Who floods, and is to be kept out now."""
        for device in [device for device, until_s in self._kept_out.items() if now_s >= until_s]:
            del self._kept_out[device]
            self._accounts[device].dropped = 0
        return frozenset(self._kept_out)

    def _account(self, device: str, now_s: float) -> _Account:
        account = self._accounts.get(device)
        if account is None:
            account = self._accounts[device] = _Account(self._stock, now_s)
        # A clock may be put back: then it begins anew from there.
        account.left = min(self._stock, account.left + FRAMES_S * max(0.0, now_s - account.since_s))
        account.since_s = now_s
        if account.left == self._stock:
            account.dropped = 0
        return account
