"""The index that `echelon index` makes: a folder with a LanceDB table for documents and vectors and a tantivy index for BM25, kept in step.

tantivy rather than Lance's own full-text search, although that would be one store less and scores exactly where tantivy rounds lengths: nDCG@10 on cranfield,
cacm and vaswani is within 0.006 either way, but tantivy answers several times as fast, and shows new documents, weighed like all others, at once, where Lance
has to rewrite its index for that (``benchmarks/index.py``).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from echelon.data.documents import Doc
from echelon.data.files import write_whole
from echelon.errors import UserError
from echelon.retrieve.base import Hits, Index, Recall, Space, Vectors
from echelon.retrieve.filters import Filter
from echelon.retrieve.lance import LanceIndex, capable
from echelon.retrieve.stored import MANIFEST, WriterLock, manifest
from echelon.retrieve.tantivy import TantivyIndex
from echelon.retrieve.tokens import Tokens

PENDING = "pending.json"


class DiskIndex(Index):
    """Documents, vectors and BM25 in one folder, with a manifest.

    A commit notes in a file which documents it is about to touch, then changes the table, then the BM25 index, then the manifest, and takes the note away. A
    writer that finds a note left by a crash makes the BM25 index agree with the table on these documents, so the two never differ for longer than that.

    Args:
        folder: an index that is there, or where a new one shall be.
        space: of the vectors, for a new index that shall have some; for one that is there it must fit.
        tokens: from texts to words, for a new index.
        encoder: settings of the encoder, kept for those who open it.
        recall: how much of what is near a vector search must find, for a new index; see :class:`~echelon.retrieve.LanceIndex`.
    """

    def __init__(
        self, folder: str | Path, space: Space | None = None, tokens: Tokens | None = None, *, encoder: Any = None, recall: Recall = "exact"
    ):  # fmt: skip
        super().__init__()
        self._folder, self.place = Path(folder), str(folder)
        told = manifest(folder, "disk")
        if told is None:
            if self._folder.exists() and (not self._folder.is_dir() or any(file.name != "writer.lock" for file in self._folder.iterdir())):
                raise UserError(f"{folder} is there and is no index; give a new folder")
            told = {"format": 1, "backend": "disk", "tokens": (tokens or Tokens()).as_json(), "space": asdict(space) if space else None}
            told |= {"encoder": encoder, "recall": recall, "documents": 0, "progress": None}
        self._told, self._recall = told, told.get("recall", "exact")
        self.capabilities = capable(self._recall)
        self.space = Space(**told["space"]) if told["space"] else None
        self.tokens, self.encoder = Tokens(**told["tokens"]), told["encoder"]
        if space is not None:
            if self.space is None:
                raise UserError(f"{folder} was made without vectors")
            self.space.require(space, self.place)
        if tokens is not None and tokens != self.tokens:
            raise UserError(f"{folder} was made with {self.tokens}, not with {tokens}")
        self.searches = frozenset({"texts", "vectors"} if self.space else {"texts"})  # type: ignore[arg-type]
        self._words = TantivyIndex(self._folder / "words", self.tokens, store=False)
        self._lazy_table: LanceIndex | None = None
        self._writer_lock = WriterLock(folder)
        self._mark: dict[str, Any] | None = told["progress"]

    @classmethod
    def load(cls, folder: str | Path, space: Space | None = None) -> Self:
        """Open an index.

        Raises:
            UserError: if there is none, or its vectors are not of this space.
        """
        if manifest(folder, "disk") is None:
            raise UserError(f"{folder} holds no index; `echelon index --corpus F --out {folder}` makes one")
        return cls(folder, space)

    def __len__(self) -> int:
        return len(self._words)

    def close(self) -> None:
        super().close()
        self._words.close()
        if self._lazy_table is not None:
            self._lazy_table.close()
        self._writer_lock.release()

    def done(self, source: str) -> int | None:
        """How many documents of a source an interrupted run has put here; None where no run of this source was interrupted."""
        with self._lock:
            self._open_for_writing()
            return self._told["progress"]["documents"] if self._told["progress"] and self._told["progress"]["source"] == source else None

    def mark(self, source: str | None, documents: int = 0) -> None:
        """Note how far a source has been read; the note is kept together with the next commit. Without a source, the run is over, which is kept at once."""
        with self._lock:
            self._mark = {"source": source, "documents": documents} if source is not None else None
            if source is None:
                self._open_for_writing()
                self._acknowledge()

    @property
    def unfinished(self) -> bool:
        """Whether a run that was to fill it has been interrupted, or still runs."""
        return self._told["progress"] is not None

    @property
    def _table(self) -> LanceIndex:
        if self._lazy_table is None:  # LanceDB takes a second to import, and BM25 does without it
            self._lazy_table = LanceIndex(self._folder / "documents", self.space, recall=self._recall)
        return self._lazy_table

    def _open_for_writing(self) -> None:
        if not self._writer_lock.take():
            return
        try:
            told = manifest(self._folder, "disk")  # as the writer before left it
            if told is None:
                self._acknowledge()
            elif any(told[name] != self._told[name] for name in ("space", "tokens")):
                raise UserError(f"{self.place} has been made otherwise by another writer in the meantime; open it again")
            else:
                self._told, self._mark = told, told["progress"]
            self._table._open_for_writing()
            self._words._open_for_writing()
            self._recover()
        except BaseException:
            self.close()
            raise

    def _recover(self) -> None:
        """Bring the BM25 index in step with the table where a commit was interrupted."""
        path = self._folder / PENDING
        if not path.exists():
            return
        note = json.loads(path.read_text(encoding="utf-8"))
        if self._table.version > note["version"]:
            touched = [*note["removed"], *note["put"]]
            there = self._table._documents(touched)
            self._words._write(list(there.values()), None, [name for name in touched if name not in there])
            if there.keys() >= set(note["put"]):
                self._mark = note["progress"]
        self._acknowledge()
        path.unlink()

    def _acknowledge(self) -> None:
        self._told = self._told | {"documents": len(self._words), "progress": self._mark}
        write_whole(self._folder / MANIFEST, json.dumps(self._told, indent=2))

    def _write(self, docs: list[Doc], vectors: Vectors | None, removed: list[str]) -> None:
        put = [doc.id for doc in docs]
        note = {"version": self._table.version, "put": put, "removed": removed, "progress": self._mark}
        write_whole(self._folder / PENDING, json.dumps(note))
        self._table._write(docs, vectors, removed)
        self._words._write(docs, None, removed)
        self._acknowledge()
        (self._folder / PENDING).unlink()

    def _existing(self, ids: list[str]) -> set[str]:
        return self._words._existing(ids)

    def _documents(self, ids: Sequence[str]) -> Mapping[str, Doc]:
        return self._table._documents(ids)

    def _vectors(self, ids: Sequence[str]) -> Mapping[str, Any]:
        return self._table._vectors(ids)

    def _search_texts(self, queries: list[str], k: int, filter: Filter | None) -> list[Hits]:
        return self._words._search_texts(queries, k, filter)

    def _search_vectors(self, queries: Vectors, k: int, filter: Filter | None) -> list[Hits]:
        return self._table._search_vectors(queries, k, filter)
