"""Vectors that are computed once: an encoder that remembers, in a file, what it has encoded."""

import contextlib
import hashlib
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from echelon.data.documents import Doc
from echelon.errors import UserError
from echelon.retrieve.base import EncoderAround
from echelon.retrieve.text_encoder import Side, Vectors

BLOCK = 1024  # texts that are encoded before what was made is stored


@dataclass(frozen=True)
class CachedEncoder(EncoderAround):
    """An encoder that looks its vectors up by its fingerprint, the side and the text's SHA-256 before it makes them.

    Several processes may use one file at once; what one has stored survives its end, however sudden. The file is SQLite's.

    Attributes:
        encoder: the encoder.
        path: the file; it is made when it is not there.
    """

    path: str

    @property
    def truncated(self) -> dict[Side, int]:
        """Of those texts that had to be encoded, how many lost their end."""
        return getattr(self.encoder, "truncated", {})

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the encoder, so that an index knows it without its cache."""
        return self.encoder.settings

    def longest(self, side: Side) -> int:
        return self.encoder.longest(side)

    def lengths(self, texts: Sequence[str], side: Side) -> list[int]:
        return self.encoder.lengths(texts, side)

    def encode_queries(self, queries: Sequence[str]) -> Vectors:
        """Float32 vectors of queries."""
        return self._looked_up(queries, queries, "query", self.encoder.encode_queries)

    def encode_documents(self, documents: Sequence[Doc]) -> Vectors:
        """Float32 vectors of documents, from title and text."""
        return self._looked_up([doc.content for doc in documents], documents, "document", self.encoder.encode_documents)

    def _looked_up(self, texts: Sequence[str], inputs: Sequence[Any], side: Side, encode: Callable[[list[Any]], Vectors]) -> Vectors:
        """Raises: UserError: if the file cannot be used or is no cache of vectors."""
        keys = [hashlib.sha256(f"{self.fingerprint}\0{side}\0{text}".encode()).digest() for text in texts]
        made: dict[bytes, np.ndarray] = {}
        with self._opened() as file:
            for key in set(keys):
                row = file.execute("SELECT vector FROM vectors WHERE key = ?", (key,)).fetchone()
                if row is not None:
                    if len(row[0]) != 4 * self.dim:
                        raise UserError(f"{self.path} holds a vector of {len(row[0]) // 4} numbers for an encoder of {self.dim}; delete the file")
                    made[key] = np.frombuffer(row[0], np.float32)
            first: dict[bytes, int] = {}
            for i, key in enumerate(keys):
                if key not in made:
                    first.setdefault(key, i)
            missing = list(first.values())
            for start in range(0, len(missing), BLOCK):
                block = missing[start : start + BLOCK]
                vectors = encode([inputs[i] for i in block])
                made |= {keys[i]: vector for i, vector in zip(block, vectors, strict=True)}
                file.executemany("INSERT OR IGNORE INTO vectors VALUES (?, ?)", [(keys[i], made[keys[i]].tobytes()) for i in block])
                file.commit()
        return np.stack([made[key] for key in keys]) if keys else np.zeros((0, self.dim), np.float32)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        try:
            Path(self.path).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot use {self.path} as a cache of vectors: {error.strerror or error}") from error
        try:
            with contextlib.closing(sqlite3.connect(self.path, timeout=60)) as file:
                file.execute("PRAGMA journal_mode = WAL")
                file.execute("CREATE TABLE IF NOT EXISTS vectors (key BLOB PRIMARY KEY, vector BLOB NOT NULL) WITHOUT ROWID")
                yield file
        except sqlite3.Error as error:
            raise UserError(f"cannot use {self.path} as a cache of vectors: {error}") from error
