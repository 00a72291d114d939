"""Files are whole or as they were, whatever ends the writer; a lock is one process's."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from edge_sdk import files
from edge_sdk.errors import ParameterError
from edge_sdk.files import open_locked, read_text, write_all, write_at, write_once, write_whole

CHILD = """
import os, signal, sys
from pathlib import Path
from edge_sdk import files

left = int(sys.argv[3])


def counted(call):
    def run(*given, **named):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*given, **named)

    return run


for name in ("open", "write", "fsync", "replace", "link", "unlink", "close"):
    setattr(os, name, counted(getattr(os, name)))
getattr(files, sys.argv[1])(Path(sys.argv[2]), b"new ", memoryview(b"content"))
"""


def die_in(call: str, path: Path, point: int) -> int:
    return subprocess.run([sys.executable, "-c", CHILD, call, str(path), str(point)], check=False).returncode


@pytest.mark.parametrize(("call", "old"), [("write_whole", b"old"), ("write_whole", None), ("write_once", None)])
def test_a_writer_killed_before_any_call_leaves_the_old_file_or_the_new_one_whole(tmp_path, call, old):
    outcomes = []
    for point in range(20):
        path = tmp_path / str(point)
        if old is not None:
            path.write_bytes(old)
        code = die_in(call, path, point)
        content = path.read_bytes() if path.exists() else None
        outcomes.append(content)
        assert content in (old, b"new content")
        assert getattr(files, call)(path, b"again") in (None, content is None)  # rubbish of the try is in nobody's way
        assert path.read_bytes() in (b"again", b"new content")
        assert not path.with_name(path.name + ".new").exists()
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert point >= 8
    assert outcomes == sorted(outcomes, key=lambda content: content == b"new content")  # no way back
    assert {*outcomes} == {old, b"new content"}


def test_a_disk_that_is_full_loses_neither_the_old_file_nor_more_room(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, b"old")

    def full(*given: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("write", "fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(OSError, match="No space"):
                write_whole(path, b"new content")
        assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [("file", b"old")]


def test_what_is_flushed_is_the_content_then_the_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def noting_fsync(file: int) -> None:
        calls.append(("fsync", Path(os.readlink(f"/proc/self/fd/{file}")).name))
        fsync(file)

    def noting_replace(source: Path, target: Path) -> None:
        calls.append(("replace", target.name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "replace", noting_replace)
    write_whole(tmp_path / "file", b"x")
    assert calls == [("fsync", "file.new"), ("replace", "file"), ("fsync", tmp_path.name)]


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_the_mode_is_what_was_asked_whatever_was_there(tmp_path, mode):
    before = os.umask(0o022)
    try:
        for call in (write_whole, write_once):
            path = tmp_path / call.__name__
            rest = path.with_name(path.name + ".new")
            rest.write_bytes(b"of a try that was cut short")
            rest.chmod(0o666)
            call(path, b"x", mode=mode)
            assert stat.S_IMODE(path.stat().st_mode) == mode
    finally:
        os.umask(before)


def test_once_means_once(tmp_path):
    assert write_once(tmp_path / "key", b"first") is True
    assert write_once(tmp_path / "key", b"second") is False
    assert (tmp_path / "key").read_bytes() == b"first"


def test_two_that_make_the_same_file_do_not_replace_each_other(tmp_path, monkeypatch):
    """The other one's file comes between our look and our link."""
    path = tmp_path / "key"
    link = os.link

    def late(source: Path, target: Path) -> None:
        path.write_bytes(b"the other's")
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    assert write_once(path, b"ours") is False
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [("key", b"the other's")]


def test_short_writes_are_carried_on(tmp_path, monkeypatch):
    write, pwrite = os.write, os.pwrite
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:3]))
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: pwrite(file, data[:3], offset))
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    write_all(file, b"0123456789")
    write_at(file, memoryview(b"abcde"), 4)
    os.close(file)
    assert (tmp_path / "file").read_bytes() == b"0123abcde9"


def test_a_lock_is_one_holders_and_ends_with_its_descriptor(tmp_path):
    path = tmp_path / "lock"
    with pytest.raises(FileNotFoundError):
        open_locked(path, os.O_RDWR, "busy")
    first = open_locked(path, os.O_RDWR | os.O_CREAT, "busy")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(ParameterError, match="this one is busy"):
        open_locked(path, os.O_RDWR, "this one is busy")
    assert set(os.listdir("/proc/self/fd")) == before  # nothing is left open by the refusal
    os.close(first)
    os.close(open_locked(path, os.O_RDWR, "busy"))
    os.close(open_locked(tmp_path, os.O_RDONLY, "busy"))  # a directory too


def test_the_mark_that_some_editors_put_in_front_is_no_part_of_a_text(tmp_path):
    path = tmp_path / "task.toml"
    for content in ("name = 1\n", "\ufeffname = 1\n"):
        path.write_text(content, encoding="utf-8")
        assert read_text(path) == "name = 1\n"


def test_a_text_in_another_encoding_is_told_with_what_would_do(tmp_path):
    path = tmp_path / "task.toml"
    path.write_text("name = 1\n", encoding="utf-16")
    with pytest.raises(ParameterError, match=r"^not UTF-8 \(byte 0\): save it as UTF-8 in the editor$"):
        read_text(path)
