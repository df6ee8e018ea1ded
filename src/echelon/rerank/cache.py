"""Answers that were paid for once, in an SQLite file: keyed by the model, the prompt and the texts, never by ids."""

import contextlib
import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

from echelon.errors import UserError
from echelon.rerank.questions import Answer

MOST = 500
"""Keys looked up in one statement; SQLite takes 999 in its oldest versions."""


class Cache:
    """Answers by key. Several processes may use one file at a time; what was written is there after kill -9.

    Args:
        path: the file, which is made where it is missing; without one the answers are kept in memory for as long as the object lives.
        read_only: answers are looked up and none are added.

    Raises:
        UserError: if the file cannot be opened or is no cache, or is missing and ``read_only``.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, read_only: bool = False):
        self.path, self.read_only = path, read_only
        try:
            if path is None:
                self._file = sqlite3.connect(":memory:", isolation_level=None)
            else:
                where = Path(path).absolute()
                if not read_only:
                    where.parent.mkdir(parents=True, exist_ok=True)
                self._file = sqlite3.connect(f"{where.as_uri()}?mode={'ro' if read_only else 'rwc'}", uri=True, isolation_level=None, timeout=60)
            if not read_only:
                self._file.execute("PRAGMA journal_mode=WAL")
                self._file.execute("PRAGMA synchronous=NORMAL")
                self._file.execute("CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, answer TEXT NOT NULL) WITHOUT ROWID")
            self._file.execute("SELECT answer FROM answers LIMIT 1")
        except (sqlite3.Error, OSError) as error:
            raise UserError(f"cannot open the cache {path}: {error}; give a file that an earlier run wrote, or a new name") from error

    def get(self, keys: Sequence[bytes]) -> list[Answer | None]:
        """The answer under each key, None where there is none."""
        found: dict[bytes, str] = {}
        for start in range(0, len(keys), MOST):
            some = keys[start : start + MOST]
            found.update(self._file.execute(f"SELECT key, answer FROM answers WHERE key IN ({','.join('?' * len(some))})", some))
        return [_read(found[key]) if key in found else None for key in keys]

    def put(self, keys: Sequence[bytes], answers: Sequence[Answer]) -> None:
        """Add answers, all or none of them; nothing where the cache is read only.

        Raises:
            UserError: if the file cannot be written to.
        """
        if self.read_only or not keys:
            return
        rows = [(key, json.dumps(asdict(answer))) for key, answer in zip(keys, answers, strict=True)]
        try:
            self._file.execute("BEGIN IMMEDIATE")
            self._file.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?)", rows)
            self._file.execute("COMMIT")
        except sqlite3.Error as error:
            with contextlib.suppress(sqlite3.Error):
                self._file.execute("ROLLBACK")
            raise UserError(f"cannot write to the cache {self.path}: {error}") from error

    def __len__(self) -> int:
        return int(self._file.execute("SELECT COUNT(*) FROM answers").fetchone()[0])

    def close(self) -> None:
        self._file.close()


def key_of(identity: str, kind: str, query: str, docs: Sequence[str]) -> bytes:
    """The key of a question: a hash of the judge's identity, the query's text and the documents' texts in their order."""
    return hashlib.sha256(b"".join(map(_digest, (identity, kind, query, *docs)))).digest()


@lru_cache(maxsize=1 << 16)
def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _read(told: str) -> Answer:
    values = json.loads(told)
    return Answer(**{**values, "order": tuple(values["order"]), "scores": tuple(values["scores"])})


@contextlib.contextmanager
def opened(cache: Cache | str | os.PathLike[str] | None) -> Iterator[Cache | None]:
    """A cache as it is, or the one in this file, closed afterwards."""
    if cache is None or isinstance(cache, Cache):
        yield cache
        return
    made = Cache(cache)
    try:
        yield made
    finally:
        made.close()
