"""The aggregation protocol, sans-IO: both halves side by side (docs/protocol.md).

`reference.run_round` is the whole protocol as one readable function.
"""
