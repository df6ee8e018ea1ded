"""BM25 on disk, in a tantivy index: documents come and go, commits are atomic, and it may be larger than memory."""

import json
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, Self

from echelon.data.documents import Doc
from echelon.data.files import write_whole
from echelon.errors import UserError
from echelon.retrieve.base import NOTHING, Capability, Hits, Index, Vectors, ranked_with_ties
from echelon.retrieve.filters import Condition, Filter, filterable
from echelon.retrieve.stored import MANIFEST, WriterLock, doc_from_json, doc_to_json, manifest
from echelon.retrieve.tokens import Tokens, needed

HEAP = 64_000_000  # bytes of new documents in memory before they are written out


class TantivyIndex(Index):
    """BM25 as Lucene has it, with k1 = 1.2 and b = 0.75, which tantivy fixes.

    The length of a document is kept in one byte, so scores differ a little from exact ones (of the first ten documents 97 to 99 in a hundred are the same on
    cranfield, cacm and vaswani). Deleted documents count in the weights of words until their segment is merged away. A filter's equalities, and its ranges of
    numbers, are looked up; the rest of it is applied while the ranking is walked down.

    Args:
        folder: an index that is there, or where a new one shall be.
        tokens: from texts to words, for a new index.
        store: keep the documents, so that they can be asked for by id.
    """

    capabilities: frozenset[Capability] = frozenset({"incremental_add", "delete", "filter", "persistent", "concurrent_readers"})
    searches = frozenset({"texts"})  # type: ignore[assignment]
    space = None

    def __init__(self, folder: str | Path, tokens: Tokens | None = None, *, store: bool = True):
        super().__init__()
        self._tantivy = needed("tantivy")
        self._folder, self.place = Path(folder), str(folder)
        told = manifest(folder, "tantivy") or {"format": 1, "backend": "tantivy", "tokens": (tokens or Tokens()).as_json(), "store": store}
        self.tokens = Tokens(**told["tokens"])
        if tokens is not None and tokens != self.tokens:
            raise UserError(f"{folder} was made with {self.tokens}, not with {tokens}")
        self._told, self._store = told, bool(told["store"])
        self._schema = self._made_schema()
        self._writer_lock, self._writer = WriterLock(folder), None
        self._reading = threading.Lock()
        self._index: Any = None
        self._seen: object = None

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Open an index.

        Raises:
            UserError: if there is none.
        """
        if manifest(folder, "tantivy") is None:
            raise UserError(f"{folder} holds no index; `echelon index --corpus F --out {folder}` makes one")
        return cls(folder)

    def __len__(self) -> int:
        searcher = self._searcher()
        return searcher.num_docs if searcher else 0

    def close(self) -> None:
        super().close()
        if self._writer is not None:
            self._writer.rollback()
            self._writer.wait_merging_threads()
            self._writer = None
        self._writer_lock.release()

    def _made_schema(self) -> Any:
        builder = self._tantivy.SchemaBuilder()
        builder.add_text_field("id", stored=True, tokenizer_name="raw", index_option="basic")
        builder.add_text_field("words", tokenizer_name="whitespace", index_option="freq")
        builder.add_json_field("meta", stored=True, fast=True, tokenizer_name="raw", index_option="basic")
        builder.add_bytes_field("body", stored=True, indexed=False)
        return builder.build()

    def _open_for_writing(self) -> None:
        if self._writer_lock.take():
            try:
                if not (self._folder / MANIFEST).exists():
                    write_whole(self._folder / MANIFEST, json.dumps(self._told))
                self._writer = self._opened().writer(heap_size=HEAP, num_threads=1)
            except BaseException:
                self._writer_lock.release()
                raise

    def _opened(self) -> Any:
        if self._index is None:
            try:
                self._index = self._tantivy.Index(self._schema, path=str(self._folder), reuse=True)
            except ValueError as error:
                raise UserError(f"cannot open the index {self.place}: {error}") from error
        return self._index

    def _searcher(self) -> Any:
        """The newest committed state, or None where nothing has been written yet."""
        with self._reading:
            try:
                stat = (self._folder / "meta.json").stat()
            except OSError:
                return None
            index, now = self._opened(), (stat.st_mtime_ns, stat.st_ino, stat.st_size)
            if now != self._seen:
                index.reload()
                self._seen = now
            return index.searcher()

    def _existing(self, ids: list[str]) -> set[str]:
        return set(self._stored(ids, lambda document: None))

    def _documents(self, ids: Sequence[str]) -> Mapping[str, Doc]:
        if not self._store:
            raise UserError(f"{self.place} does not keep its documents")
        return self._stored(ids, lambda document: doc_from_json(bytes(document["body"][0])))

    def _stored(self, ids: Sequence[str], read: Any) -> dict[str, Any]:
        searcher, found = self._searcher(), {}
        for start in range(0, len(ids) if searcher else 0, 1000):
            part = list(dict.fromkeys(ids[start : start + 1000]))
            query = self._tantivy.Query.term_set_query(self._schema, "id", part)
            for _, address in searcher.search(query, len(part), count=False).hits:
                document = searcher.doc(address)
                found[document["id"][0]] = read(document)
        return found

    def _write(self, docs: list[Doc], vectors: Vectors | None, removed: list[str]) -> None:
        assert self._writer is not None
        for name in [*removed, *(doc.id for doc in docs)]:
            self._writer.delete_documents_by_term("id", name)
        for doc in docs:
            document = self._tantivy.Document(id=doc.id, words=" ".join(self.tokens(doc.content)))
            document.add_json("meta", json.dumps(filterable(doc.meta)))
            if self._store:
                document.add_bytes("body", doc_to_json(doc).encode())
            self._writer.add_document(document)
        self._writer.commit()

    def _search_texts(self, queries: list[str], k: int, filter: Filter | None) -> list[Hits]:
        searcher = self._searcher()
        return [self._best(searcher, self.tokens(query), k, filter) for query in queries]

    def _best(self, searcher: Any, words: list[str], k: int, filter: Filter | None) -> Hits:
        if searcher is None or not words or not searcher.num_docs:
            return NOTHING
        kinds, occur = self._tantivy.Query, self._tantivy.Occur
        terms = []
        for word, count in Counter(words).items():
            term = kinds.term_query(self._schema, "words", word, "freq")
            terms.append((occur.Should, kinds.boost_query(term, float(count)) if count > 1 else term))
        query = kinds.boolean_query(terms)
        if filter is not None:
            looked_up = [(occur.Must, kinds.const_score_query(part, 0.0)) for condition in filter.conditions if (part := self._lookup(condition))]
            query = kinds.boolean_query([(occur.Must, query), *looked_up])

        def fetch(limit: int) -> tuple[list[str], list[float]]:
            asked = limit
            while True:
                ids: list[str] = []
                scores: list[float] = []
                hits = searcher.search(query, min(asked, searcher.num_docs), count=False).hits
                for score, address in hits:
                    document = searcher.doc(address)
                    if filter is None or filter.matches(document["meta"][0]):
                        ids.append(document["id"][0])
                        scores.append(score)
                        if len(ids) == limit:
                            return ids, scores
                if len(hits) < asked:
                    return ids, scores
                asked *= 4

        return ranked_with_ties(fetch, k)

    def _lookup(self, condition: Condition) -> Any:
        """A query that finds at least what the condition allows, or None where tantivy cannot look it up."""
        kinds, field = self._tantivy.Query, f"meta.{condition.field}"
        if condition.operator in ("=", "in"):
            terms = [kinds.term_query(self._schema, field, value, "basic") for value in condition.values]
            return kinds.boolean_query([(self._tantivy.Occur.Should, term) for term in terms])
        value = condition.values[0]
        if condition.operator == "!=" or isinstance(value, str):
            return None
        return self._opened().parse_query(f"{field}:{condition.operator}{Decimal(repr(value)):f}", ["words"])
