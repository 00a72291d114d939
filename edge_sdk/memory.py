"""Memory that a device does not need now goes back to the kernel.

A board that runs a device is small, and a device trains for seconds and waits for hours. Two kinds of pages stay
resident although nobody uses them: what was freed, where the C library keeps it for the next time, and the code of
libraries that ran once, while they were loaded. onnxruntime is the large one: importing it and making a session
touches 20 MB of code (every operator's description, every kernel's registration), of which a step of training needs
about half. The kernel could drop such clean pages by itself, but it takes code that is mapped and was used for worth
keeping, and puts pressure on everything else first.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

_DONTNEED = 4
"""Linux's MADV_DONTNEED, on every architecture but Alpha."""

_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ \d+ *(.?)")
"""A mapping's first line in /proc/self/smaps: its addresses, what may be done with it, where its file begins."""

_CHANGED = frozenset({"Anonymous:", "Swap:", "Shared_Hugetlb:", "Private_Hugetlb:"})
"""Where /proc/self/smaps counts pages that are not, or may not be, what the file has."""


def give_back() -> None:
    """Let the kernel have what was freed, and the code that is not running. Nothing is lost by it: code that is called
    again is mapped again from the page cache, some microseconds for every 64 kB of it.

    Takes milliseconds, most of them to ask the kernel what is mapped. Linux; elsewhere it does what of this there is,
    perhaps nothing. Raises nothing.
    """
    give_back_freed()
    advise = _c_function("madvise")
    if advise is None:
        return
    try:
        with open("/proc/self/smaps", encoding="utf-8", errors="replace") as smaps:
            found = list(_clean_code(smaps))
    except OSError:
        return
    for begin, end in found:
        advise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), ctypes.c_int(_DONTNEED))  # refused where locked


def give_back_freed() -> None:
    """Let the kernel have what was freed. glibc grows by some megabytes with each round otherwise, because a trainer's
    large blocks are carved from its heap once one of them was freed. Raises nothing."""
    trim = _c_function("malloc_trim")
    if trim is not None:
        trim(ctypes.c_size_t(0))


def _c_function(name: str) -> Callable[..., Any] | None:
    """A function of the C library that this process runs on, if it has it."""
    try:
        found: Callable[..., Any] = getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return None
    return found


def _clean_code(smaps: Iterable[str]) -> Iterator[tuple[int, int]]:
    """(begin, end) of the private mappings of files' code in which no page differs from the file.

    One that does (a breakpoint, a relocation in the code, code in huge pages), in memory or swapped out, exists nowhere
    else and would be lost: its mapping is left alone.
    """
    code: tuple[int, int] | None = None
    clean: set[str] = set()
    for line in smaps:
        if (match := _MAPPING.match(line)) is not None:
            code = (int(match[1], 16), int(match[2], 16)) if match[3] == "r-xp" and match[4] == "/" else None
            clean.clear()
        elif code is not None:
            field, *value = line.split()
            if field in _CHANGED and value == ["0", "kB"]:
                clean.add(field)
                if len(clean) == len(_CHANGED):
                    yield code
                    code = None
