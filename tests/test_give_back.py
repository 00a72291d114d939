"""What is not needed goes back to the kernel, and nothing is lost by it."""

import ctypes
import mmap
import sys
from pathlib import Path

import pytest

from edge_sdk import memory

PAGE = mmap.PAGESIZE
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="of Linux's /proc and madvise")


class Library:
    """A C library that counts."""

    def __init__(self):
        self.trims, self.advised = [], []

    def malloc_trim(self, pad):
        self.trims.append(pad.value)

    def madvise(self, begin, length, advice):
        self.advised.append((begin.value, length.value, advice.value))


def test_freed_memory_is_given_back_whole(monkeypatch):
    library = Library()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    memory.give_back()
    assert library.trims == [0]


@pytest.mark.parametrize("fault", [OSError("no such file"), TypeError("None")])
def test_a_system_without_a_c_library_to_be_found_is_left_alone(monkeypatch, fault):
    def refuse(name):
        raise fault

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    memory.give_back()


def test_a_c_library_with_neither_call_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    memory.give_back()


SMAPS = """\
55d0a0000000-55d0a0001000 r--p 00000000 fe:00 11 /usr/bin/python
Rss: 4 kB
Anonymous: 0 kB
Swap: 0 kB
Shared_Hugetlb: 0 kB
Private_Hugetlb: 0 kB
55d0a0001000-55d0a0003000 r-xp 00001000 fe:00 11 /usr/bin/python
Rss: 8 kB
Anonymous: 0 kB
Swap: 0 kB
Shared_Hugetlb: 0 kB
Private_Hugetlb: 0 kB
7f0000000000-7f0000004000 r-xp 00000000 fe:00 12 /lib/with a breakpoint.so
Rss: 16 kB
Anonymous: 4 kB
Swap: 0 kB
Shared_Hugetlb: 0 kB
Private_Hugetlb: 0 kB
7f0000004000-7f0000008000 r-xp 00000000 fe:00 13 /lib/relocated-and-swapped-out.so
Anonymous: 0 kB
Swap: 4 kB
Shared_Hugetlb: 0 kB
Private_Hugetlb: 0 kB
7f0000008000-7f000000a000 rwxp 00000000 fe:00 14 /lib/being-relocated.so
Anonymous: 0 kB
Swap: 0 kB
Shared_Hugetlb: 0 kB
Private_Hugetlb: 0 kB
7f000000a000-7f000000c000 r-xp 00000000 00:00 0
Anonymous: 0 kB
Swap: 0 kB
Shared_Hugetlb: 0 kB
Private_Hugetlb: 0 kB
7f000000c000-7f000000e000 r-xs 00000000 fe:00 15 /lib/shared.so
Anonymous: 0 kB
Swap: 0 kB
Shared_Hugetlb: 0 kB
Private_Hugetlb: 0 kB
7f000000e000-7f0000010000 r-xp 00000000 00:00 0 [vdso]
Anonymous: 0 kB
Swap: 0 kB
Shared_Hugetlb: 0 kB
Private_Hugetlb: 0 kB
7f00000e0000-7f00000f0000 r-xp 00000000 00:0f 9 /anon_hugepage (deleted)
Anonymous: 0 kB
Swap: 0 kB
Shared_Hugetlb: 0 kB
Private_Hugetlb: 2048 kB
7f0000010000-7f0000012000 r-xp 00000000 fe:00 16 /lib/of a kernel that does not tell.so
Rss: 8 kB
7f0000012000-7f0000016000 r-xp 00000000 fe:00 17 /lib/last.so
Anonymous: 0 kB
Swap: 0 kB
Shared_Hugetlb: 0 kB
Private_Hugetlb: 0 kB
"""


def test_only_code_that_its_file_holds_is_given_back():
    assert list(memory._clean_code(SMAPS.splitlines())) == [
        (0x55D0A0001000, 0x55D0A0003000),
        (0x7F0000012000, 0x7F0000016000),
    ]


@LINUX
def test_code_is_given_back_and_still_runs():
    import onnxruntime as ort

    binary = str(Path(ort.capi.onnxruntime_pybind11_state.__file__).resolve())
    memory.give_back()
    after = resident_code(binary)
    ort.get_available_providers()
    ort.SessionOptions()
    assert "CPUExecutionProvider" in ort.get_available_providers()
    assert resident_code(binary) >= after
    memory.give_back()
    assert resident_code(binary) < 2 << 20  # of about 20 MB, of which importing it maps most


@LINUX
def test_code_that_was_changed_in_memory_stays_as_it_is(tmp_path):
    path = tmp_path / "code"
    path.write_bytes(b"\x90" * 2 * PAGE)
    with path.open("r+b") as file:
        view = mmap.mmap(
            file.fileno(), 2 * PAGE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
        )
    view[0:4] = b"\xcc\xcc\xcc\xcc"  # as a debugger does
    address = ctypes.addressof(ctypes.c_char.from_buffer(view))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    assert protect(ctypes.c_void_p(address), ctypes.c_size_t(2 * PAGE), mmap.PROT_READ | mmap.PROT_EXEC) == 0
    memory.give_back()
    assert bytes(view[0:5]) == b"\xcc\xcc\xcc\xcc\x90"


def resident_code(binary):
    """Bytes of a file's code that are mapped in this process."""
    total, inside = 0, False
    with open("/proc/self/smaps", encoding="utf-8") as smaps:
        for line in smaps:
            if line[0] in "0123456789abcdef":
                inside = "r-xp" in line and line.rstrip().endswith(binary)
            elif inside and line.startswith("Rss:"):
                total += int(line.split()[1]) * 1024
    return total
