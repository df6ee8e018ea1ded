"""A file is whole or absent, whatever happens while it is written; what cannot be read or written is one line."""

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest

from echelon.data.files import append_line, read_text, read_texts, write_whole
from echelon.errors import UserError


def no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_text_and_bytes_are_written_as_they_are_into_folders_that_need_not_exist(tmp_path):
    write_whole(tmp_path / "a" / "b" / "text", "Grüße\n")
    write_whole(tmp_path / "bytes", b"\x00\xff")
    assert (tmp_path / "a" / "b" / "text").read_bytes() == "Grüße\n".encode()
    assert (tmp_path / "bytes").read_bytes() == b"\x00\xff"
    assert stat.S_IMODE((tmp_path / "bytes").stat().st_mode) == 0o644


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [no_space, KeyboardInterrupt])
def test_a_full_disk_or_an_interrupt_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call, error):
    path = tmp_path / "kept"
    write_whole(path, "old")

    def fail(*arguments):
        if error is no_space:
            no_space()
        raise KeyboardInterrupt

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(UserError if error is no_space else KeyboardInterrupt) as caught:
        write_whole(path, "new")
    monkeypatch.undo()
    if error is no_space:
        assert str(caught.value) == f"cannot write {path}: No space left on device"
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["kept"]


def test_killed_while_it_writes_the_file_is_one_of_the_two(tmp_path):
    path = tmp_path / "file"
    code = (
        "import sys; from echelon.data.files import write_whole\n"
        "while True:\n    for letter in 'ab': write_whole(sys.argv[1], letter * 2_000_000)"
    )
    for delay in (0.0, 0.013, 0.05):
        process = subprocess.Popen([sys.executable, "-c", code, str(path)])
        until = time.monotonic() + 30
        while not path.exists() and time.monotonic() < until:
            time.sleep(0.005)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        content = path.read_text()
        assert len(content) == 2_000_000 and set(content) in ({"a"}, {"b"})
        path.unlink()


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/file/inside: "):
        write_whole(tmp_path / "file" / "inside", "x")
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/file/inside: "):
        append_line(tmp_path / "file" / "inside", "x")
    with pytest.raises(UserError, match="Is a directory"):
        write_whole(tmp_path, "x")
    assert tmp_path.is_dir()

    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.mkstemp", read_only)
    with pytest.raises(UserError, match="Read-only file system"):
        write_whole(tmp_path / "other", "x")


def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    got = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_text()), daemon=True)
    reader.start()
    write_whole(tmp_path / "pipe", "through")
    reader.join(timeout=20)
    assert got == ["through"] and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_lines_are_appended_one_by_one_and_a_full_disk_is_one_line(tmp_path, monkeypatch):
    path = tmp_path / "new" / "log"
    append_line(path, "one")
    append_line(path, "two\n")
    assert path.read_text() == "one\ntwo\n"
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(UserError, match=r"cannot write .*log: No space left on device"):
        append_line(path, "three")
    assert path.read_text().startswith("one\ntwo\n")


def test_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "latin").write_bytes("Grüße".encode("latin-1"))
    with pytest.raises(UserError, match=r"cannot read .*absent: No such file"):
        read_text(tmp_path / "absent")
    with pytest.raises(UserError, match=r"cannot read .*: Is a directory"):
        read_text(tmp_path)
    with pytest.raises(UserError, match=r"latin: not UTF-8 text \(byte 2\)"):
        read_text(tmp_path / "latin")


def test_texts_come_line_by_line_and_a_separator_inside_one_does_not_split_it(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "a\u2028b\\nc"}\n\n  \n{"text": "", "more": 1}\n')
    assert read_texts(tmp_path / "t.jsonl") == ["a\u2028b\nc", ""]
    (tmp_path / "empty.jsonl").write_text("")
    assert read_texts(tmp_path / "empty.jsonl") == []


@pytest.mark.parametrize("line", ["{", "[]", '{"txt": "a"}', "3", '"text"', "null"])
def test_a_line_that_is_no_object_with_a_text_is_named_by_its_number(tmp_path, line):
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n' + line + "\n")
    with pytest.raises(UserError, match=r"t.jsonl, line 2: not a JSON object with a 'text'"):
        read_texts(tmp_path / "t.jsonl")
