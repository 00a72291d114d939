"""Differential privacy on the device: real vectors become noisy integers, in the only right order.

`mechanism` is the one entrance. Sans-IO: entropy is an argument. docs/privacy.md says what each step is for.
"""
