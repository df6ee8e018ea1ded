"""What the readers of collections, runs and judgements share: lines with their numbers, files in folders, ids."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from echelon.errors import UserError


def read_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, str]]:
    """Lines with their numbers from 1, blank ones left out, read as they are needed.

    Raises:
        UserError: if the file is missing, unreadable or not UTF-8 text; in the last case the line is named.
    """
    number = 0
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                if "\0" in line:
                    raise UserError(f"cannot read {path}: line {number} has a NUL byte; this is no text")
                if line.strip():
                    yield number, line
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path}: line {number} is not UTF-8 text") from error


def file_in(path: str | os.PathLike[str], names: Sequence[str]) -> Path:
    """The path itself, or, where it is a folder, the first of these files in it.

    Raises:
        UserError: if the folder holds none of them.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    for name in names:
        if (path / name).is_file():
            return path / name
    raise UserError(f"{path} holds no {' or '.join(names)}")


def check_id(told: object, what: str, where: str) -> str:
    """An id as text.

    Raises:
        UserError: if it is no text or whole number, is empty, or has white space in it, which would break a line of a TREC run.
    """
    if not isinstance(told, str | int) or isinstance(told, bool):
        raise UserError(f"{where}: the {what} has the id {told!r}; it must be text")
    name = str(told)
    if [name] != name.split():
        raise UserError(f"{where}: the {what} has the id {name!r}; it must not be empty or have white space in it")
    return name
