"""The device side of Sordino, and the core that every part shares.

`edge_sdk.crypto` and `edge_sdk.protocol` are sans-IO: entropy and time are arguments. docs/protocol.md is normative.
"""
