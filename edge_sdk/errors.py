"""The errors, named by who is at fault, so that the caller knows what to do. One that a single module raises derives
from these and lives there."""


class SordinoError(Exception):
    """Base of every error this project raises."""


class ParameterError(SordinoError, ValueError):
    """The caller's fault. Fix the call; never retry."""


class PeerError(SordinoError):
    """The peer broke the protocol. Drop its message and keep the state from before it."""


class RoundAborted(SordinoError):
    """Expected: too few contributors, too late, or a sum that fails its checks. Wait for the next round."""


class TransportError(SordinoError):
    """The network. Back off and reconnect."""
