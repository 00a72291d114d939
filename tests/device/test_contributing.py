"""What was freed goes back to the kernel where the C library can, and its absence stops no round."""

import ctypes

import pytest

from edge_sdk import contributing


class Library:
    """A C library that counts."""

    def __init__(self):
        self.trims = []

    def malloc_trim(self, pad):
        self.trims.append(pad.value)


def test_freed_memory_is_given_back_whole(monkeypatch):
    library = Library()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    contributing._give_back()
    assert library.trims == [0]


@pytest.mark.parametrize("fault", [AttributeError("malloc_trim"), OSError("no such file"), TypeError("None")])
def test_another_c_library_is_left_alone(monkeypatch, fault):
    def refuse(name):
        raise fault

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    contributing._give_back()
