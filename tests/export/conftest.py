"""One thread: the machines that run these tests are shared, and sums come out the same every time."""

import importlib.util

if importlib.util.find_spec("torch") is not None:
    import torch

    torch.set_num_threads(1)
