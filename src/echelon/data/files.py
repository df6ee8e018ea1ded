"""Files that are whole or absent."""

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from echelon.errors import UserError


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file so that a reader, or a crash at any moment, sees the old content or the new, never a part.

    A device or pipe (``/dev/stdout``) is written to as it stands: a rename would put a file in its place.

    Raises:
        UserError: if the folder cannot be written to or the disk is full; the old file stays.
    """
    path, data = Path(path), content.encode() if isinstance(content, str) else content
    with _refusing(path):
        if path.exists() and not path.is_file() and not path.is_dir():
            with open(path, "ab") as device:
                device.write(data)
            return
    with file_whole(path) as file:
        file.write(data)


@contextlib.contextmanager
def file_whole(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A new file to write to, which takes this name, and the place of what was there, when the block ends well; else it goes.

    Raises:
        UserError: if it cannot be written to.
    """
    path, aside = Path(path), ""
    with _refusing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            with open(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(aside, 0o644)
            os.replace(aside, path)
        except BaseException:
            if aside:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(aside)
            raise


@contextlib.contextmanager
def folder_whole(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A new folder to write to, which takes this one's name, and the place of what was there, when the block ends well; else it goes.

    Raises:
        UserError: if it cannot be written to, or the name is a file's.
    """
    folder = Path(folder).absolute()
    aside: Path | None = None
    with _refusing(folder):
        try:
            if folder.exists() and not folder.is_dir():
                raise UserError(f"{folder} is a file; give a folder")
            folder.parent.mkdir(parents=True, exist_ok=True)
            aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
            yield aside
            for file in aside.rglob("*"):
                if file.is_file():
                    with open(file, "rb") as opened:
                        os.fsync(opened.fileno())
            os.chmod(aside, 0o755)
            if folder.exists():
                old = aside.with_name(aside.name + ".old")
                os.replace(folder, old)
                os.replace(aside, folder)
                shutil.rmtree(old)
            else:
                os.replace(aside, folder)
        except BaseException:
            if aside is not None:
                shutil.rmtree(aside, ignore_errors=True)
            raise


@contextlib.contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Tell what the system refuses as an error about this path."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def locked(folder: Path, busy: str) -> Iterator[None]:
    """Hold a folder, made if need be, for this process alone; the lock goes with the process, however that ends.

    Raises:
        UserError: with ``busy``, if another process holds it; or if it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(folder / ".lock", "w")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(busy) from error
        yield


def append_line(path: str | os.PathLike[str], line: str) -> None:
    """Append one line and have it on disk before returning.

    Raises:
        UserError: if the file cannot be written.
    """
    with _refusing(Path(path)):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(line.rstrip("\n") + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_text(path: str | os.PathLike[str]) -> str:
    """A whole text file as UTF-8.

    Raises:
        UserError: if it is missing, unreadable or not UTF-8 text.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path}: not UTF-8 text (byte {error.start})") from error


def read_texts(path: str | os.PathLike[str]) -> list[str]:
    """The ``text`` of every line of a JSON-lines file.

    Raises:
        UserError: if the file cannot be read, or a line is not an object with a text.
    """
    found = []
    for number, line in enumerate(read_text(path).split("\n"), 1):  # splitlines() would also split at U+2028 inside a text
        if line.strip():
            try:
                found.append(str(json.loads(line)["text"]))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}, line {number}: not a JSON object with a 'text'") from error
    return found
