"""The commands of `edge-coordinator`: each takes what its words mean and returns the exit code.

What a command alone needs is imported when it runs: most of them are done sooner than all of it is loaded.
"""
