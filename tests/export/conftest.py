"""One thread: the machines that run these tests are shared, and sums come out the same every time."""

import functools
import gc
import importlib.util

import pytest

if importlib.util.find_spec("torch") is not None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _one_table_of_onnx_functions():
    """PyTorch's exporter makes its table of some 500 functions anew for every graph, which takes 0.35 s: half of what
    a small graph takes. It depends on the opset alone, and nothing of ours adds to it."""
    if importlib.util.find_spec("onnxscript") is None or importlib.util.find_spec("torch") is None:
        yield
        return
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        yield


@pytest.fixture(scope="session", autouse=True)
def _rare_collections_of_garbage():
    """A graph is some 10^5 objects that refer to each other: looking them through at every 700 new ones is a fifth of
    the time that lowering takes."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    yield
    gc.set_threshold(*before)
