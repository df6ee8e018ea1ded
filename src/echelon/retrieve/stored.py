"""How an index and its documents are written down, and who may write."""

import contextlib
import fcntl
import json
import os
from pathlib import Path
from typing import Any

from echelon.data.documents import Doc
from echelon.data.files import read_text
from echelon.errors import UserError

MANIFEST = "index.json"


def check_storable(doc: Doc) -> None:
    """Raises: UserError: if a document cannot be written down: its meta is no JSON, or it has half of a surrogate pair in it."""
    try:
        (doc.title + doc.text + meta_to_json(doc)).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the document {doc.id!r} has half of a surrogate pair in it, which is no character") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"the meta of the document {doc.id!r} cannot be stored as JSON: {error}") from error


def meta_to_json(doc: Doc) -> str:
    return json.dumps(dict(doc.meta), ensure_ascii=False, allow_nan=False)


def doc_to_json(doc: Doc) -> str:
    return json.dumps({"id": doc.id, "title": doc.title, "text": doc.text, "meta": dict(doc.meta)}, ensure_ascii=False, allow_nan=False)


def doc_from_json(told: str | bytes) -> Doc:
    return Doc(**json.loads(told))


def manifest(folder: str | Path, backend: str | None = None) -> dict[str, Any] | None:
    """What an index on disk says of itself, or None where there is none.

    Raises:
        UserError: if it cannot be read, is of a later format, or of another kind.
    """
    path = Path(folder) / MANIFEST
    if not path.exists():
        return None
    try:
        told = json.loads(read_text(path))
        version, kind = told["format"], told["backend"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: it is no manifest of an index") from error
    if version != 1:
        raise UserError(f"{folder} has the format {version!r}; this version of echelon reads 1")
    if backend not in (None, kind):
        raise UserError(f"{folder} is an index of the kind {kind!r}, not {backend!r}")
    return told


class WriterLock:
    """A file that one writer at a time holds. The system lets go of it when the writer ends, however it ends."""

    def __init__(self, folder: str | os.PathLike[str]):
        self._path = Path(folder) / "writer.lock"
        self._file: int | None = None

    def take(self) -> bool:
        """Take the lock. Returns whether it was not held before.

        Raises:
            UserError: if another writer holds it, or the folder cannot be written to.
        """
        if self._file is not None:
            return False
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"cannot write {self._path.parent}: {error.strerror or error}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(file, 32).decode(errors="replace").strip()
            os.close(file)
            raise UserError(f"{self._path.parent} is being written by another writer (process {holder or 'unknown'}); wait until it is done") from error
        os.ftruncate(file, 0)
        os.pwrite(file, str(os.getpid()).encode(), 0)
        self._file = file
        return True

    def release(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.close(self._file)
            self._file = None
