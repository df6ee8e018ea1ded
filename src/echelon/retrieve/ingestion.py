"""A corpus on disk into an index, in batches: it is never held whole, and what was put in before a crash stays there."""

import hashlib
import os
from collections.abc import Callable, Iterator
from itertools import dropwhile, islice
from pathlib import Path
from typing import Any

import numpy as np

from echelon.data.documents import Doc, read_corpus
from echelon.data.lines import file_in
from echelon.errors import UserError
from echelon.retrieve.base import Index

LETTERS = 16_000_000  # of text in a batch, at most
HEAD = 1 << 20


def ingest(
    index: Index, corpus: str | os.PathLike[str], encode: Callable[[list[Doc]], Any] | None = None, *, replace: bool = False, batch_size: int = 2000,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
) -> int:  # fmt: skip
    """Put all documents of a corpus into an index, batch by batch, each of which is committed.

    Into a :class:`~echelon.retrieve.DiskIndex` an interrupted run goes on where it was when it is started again with the same file: each commit holds how far
    the file has been read.

    Args:
        index: where they go.
        corpus: the file, or a folder that has it; see :func:`echelon.data.documents.read_corpus`.
        encode: gives the documents' vectors, for an index that holds vectors. It is called with all documents in their order, but for those that an
            interrupted run put in.
        replace: replace documents that are there already, which is an error otherwise.
        batch_size: documents in a batch, or fewer where they have more than 16 million letters together.
        on_progress: is told ``done``, the number of documents read, after each batch.

    Returns:
        How many documents were put in by this call.

    Raises:
        UserError: if the corpus cannot be read, is empty, or has a document that is there already; what was committed before stays.
    """
    from echelon.retrieve.disk import DiskIndex

    source = f"{'upsert' if replace else 'add'} {_identity(corpus)}"
    begun = index.done(source) or 0 if isinstance(index, DiskIndex) else 0
    read = begun
    for batch in _batches(islice(read_corpus(corpus), begun, None), batch_size):
        vectors = encode(batch) if encode is not None else None
        read += len(batch)
        (index.upsert if replace else index.add)(batch, vectors)
        if isinstance(index, DiskIndex):
            index.mark(source, read)
        index.commit()
        if on_progress is not None:
            on_progress({"done": read})
    if isinstance(index, DiskIndex):
        index.mark(None)
    return read - begun


def encode_ahead(
    corpus: str | os.PathLike[str], encoder: Any, folder: str | os.PathLike[str], engine: str, on_progress: Callable[[dict[str, Any]], None] | None = None
) -> Callable[[list[Doc]], Any]:
    """Encode a whole corpus into a folder, by several processes or machines, and give what :func:`ingest` takes for ``encode``.

    Args:
        corpus: as for :func:`ingest`.
        encoder: makes the vectors.
        folder: where they go, shard by shard; an interrupted run goes on there.
        engine: ``pool`` or ``ray``; see :func:`echelon.retrieve.corpus.encode_corpus`.
        on_progress: is told ``step``, ``done`` and ``of``.
    """
    from echelon.retrieve.corpus import encode_corpus

    made = encode_corpus(corpus, encoder, folder, engine=engine, on_progress=on_progress)  # type: ignore[arg-type]
    rows: Iterator[tuple[str, Any]] = (pair for ids, vectors in made.batches() for pair in zip(ids, vectors, strict=True))

    def encode(docs: list[Doc]) -> Any:
        nonlocal rows
        rows = dropwhile(lambda pair: pair[0] != docs[0].id, rows)  # what an interrupted run put in already
        taken = list(islice(rows, len(docs)))
        if [name for name, _ in taken] != [doc.id for doc in docs]:
            raise UserError(f"{corpus} has changed while it was being encoded; start again")
        return np.stack([row for _, row in taken])

    return encode


def check_begun(index: Index, corpus: str | os.PathLike[str]) -> None:
    """Refuse to fill an index from a corpus if it holds something else than the beginning of it.

    Raises:
        UserError: if it does.
    """
    from echelon.retrieve.disk import DiskIndex

    if not isinstance(index, DiskIndex) or index.done(f"add {_identity(corpus)}") is None:
        if isinstance(index, DiskIndex) and index.unfinished:
            raise UserError(f"{index.place} holds the beginning of another corpus, or of this one before it changed; remove it to start anew, or use --add")
        if len(index):
            raise UserError(f"{index.place} holds {len(index)} documents already; --add adds to them, --upsert replaces")


def _identity(corpus: str | os.PathLike[str]) -> str:
    """Tells files apart by their size and their beginning."""
    path = file_in(Path(corpus), ("corpus.jsonl", "corpus.tsv"))
    try:
        with open(path, "rb") as file:
            return f"{path.stat().st_size} {hashlib.sha256(file.read(HEAD)).hexdigest()}"
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _batches(docs: Iterator[Doc], size: int) -> Iterator[list[Doc]]:
    batch: list[Doc] = []
    letters = 0
    for doc in docs:
        batch.append(doc)
        letters += len(doc.text)
        if len(batch) >= size or letters >= LETTERS:
            yield batch
            batch, letters = [], 0
    if batch:
        yield batch
