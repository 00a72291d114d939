"""The errors, named by who is at fault, so that the caller knows what to do. One that a single module raises derives
from these and lives there."""

MAX_TEXT = 500
"""Characters of a peer's words that are repeated."""


def printable(text: str) -> str:
    """A peer's words, fit for a log: no more than MAX_TEXT characters, and what is not to be seen escaped. Else one
    device writes lines in another's name, or fills the disk with its own."""
    cut = _cut(text)
    if cut.isprintable():
        return cut
    return _cut("".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut))


def _cut(text: str) -> str:
    """What is wrong comes last in most messages, so both ends are kept."""
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 103]}...{text[-100:]}"


class SordinoError(Exception):
    """Base of every error this project raises."""


class ParameterError(SordinoError, ValueError):
    """The caller's fault. Fix the call; never retry."""


class PeerError(SordinoError):
    """The peer broke the protocol. Drop its message and keep the state from before it.

    Its text is made `printable`: it often repeats what the peer sent, and ends in a log.
    """

    def __init__(self, text: str = "") -> None:
        super().__init__(printable(text))


class RoundAborted(SordinoError):
    """Expected: too few contributors, too late, or a sum that fails its checks. Wait for the next round."""


class TransportError(SordinoError):
    """The network. Back off and reconnect."""
