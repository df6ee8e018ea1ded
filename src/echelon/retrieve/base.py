"""One protocol for what is searched, whatever stores it: indexes, encoders, retrievers, and methods that make retrievers."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

import numpy as np
from jaxtyping import Float

from echelon.data.documents import Doc
from echelon.data.lines import check_id
from echelon.data.runs import Run
from echelon.errors import UserError
from echelon.retrieve.filters import Filter
from echelon.retrieve.stored import check_storable

Capability = Literal["incremental_add", "delete", "filter", "persistent", "exact", "returns_vectors", "concurrent_readers", "distributed"]
Similarity = Literal["cosine", "dot"]
Recall = Literal["exact", "balanced", "fast"]
Content = Literal["texts", "vectors"]
Vectors = Float[np.ndarray, "n dim"]
LONGEST = 1e18  # of a vector: its square, and so every product of two, fits in single precision
TIES = 10_000


class Encoder(Protocol):
    """What makes vectors of queries and documents.

    Attributes:
        dim: length of a vector.
        similarity: how two are compared.
        fingerprint: names everything that a vector depends on: model, revision, pooling, prompt, maximal length, normalisation.
    """

    @property
    def dim(self) -> int: ...
    @property
    def similarity(self) -> Similarity: ...
    @property
    def fingerprint(self) -> str: ...

    def encode_queries(self, queries: list[str]) -> Vectors:
        """One float32 row for each query."""

    def encode_documents(self, documents: list[Doc]) -> Vectors:
        """One float32 row for each document."""


@dataclass(frozen=True)
class EncoderAround:
    """What does something to texts or vectors on their way to or from another encoder, whose space stays.

    Attributes:
        encoder: the encoder.
    """

    encoder: Any

    @property
    def dim(self) -> int:
        return self.encoder.dim

    @property
    def similarity(self) -> Similarity:
        return self.encoder.similarity

    @property
    def fingerprint(self) -> str:
        return self.encoder.fingerprint


@dataclass(frozen=True)
class Space:
    """Where an index's vectors live.

    Attributes:
        dim: their length.
        similarity: how two are compared.
        fingerprint: of the encoder that made them; empty for vectors of unknown origin, which any encoder of this size may search.
    """

    dim: int
    similarity: Similarity = "cosine"
    fingerprint: str = ""

    def __post_init__(self) -> None:
        """Raises: ValueError: if the length or the similarity is none."""
        if self.dim < 1:
            raise ValueError(f"dim is {self.dim!r}; it must be at least 1")
        if self.similarity not in ("cosine", "dot"):
            raise ValueError(f"similarity is {self.similarity!r}; it must be 'cosine' or 'dot'")

    @classmethod
    def of(cls, encoder: Encoder) -> Self:
        return cls(encoder.dim, encoder.similarity, encoder.fingerprint)

    def require(self, other: "Space", where: str) -> None:
        """Raises: UserError: if vectors of the other space cannot be compared with those of this one."""
        for name in ("fingerprint", "dim", "similarity"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs and not (name == "fingerprint" and "" in (ours, theirs)):
                raise UserError(f"{where} was made by another encoder: its {name} is {ours!r}, the encoder's is {theirs!r}; use the one it was made with")

    def checked(self, vectors: Any, what: str) -> Vectors:
        """Vectors as float32 rows.

        Raises:
            UserError: if their shape is another, or one of them is not finite, longer than 1e18, or zero under cosine, which has no direction.
        """
        made = np.asarray(vectors, dtype=np.float32)
        if made.ndim != 2 or made.shape[1] != self.dim:
            raise UserError(f"the {what} have the shape {made.shape}; it must be (n, {self.dim})")
        with np.errstate(over="ignore", invalid="ignore"):
            lengths = np.sqrt(np.square(made, dtype=np.float64).sum(1))
        for place in np.flatnonzero(~(lengths <= LONGEST))[:1]:
            raise UserError(f"row {place} of the {what} has the length {lengths[place]}; vectors must be finite, and no longer than {LONGEST:g}")
        if self.similarity == "cosine":
            for place in np.flatnonzero(lengths == 0)[:1]:
                raise UserError(f"row {place} of the {what} is zero, which has no cosine with anything")
        return made


@dataclass(frozen=True)
class Hits:
    """What one query found, best first, equal scores by id.

    Attributes:
        ids: of the documents.
        scores: float32, one for each; higher is better.
    """

    ids: tuple[str, ...]
    scores: Float[np.ndarray, " hits"]

    def __len__(self) -> int:
        return len(self.ids)

    def as_dict(self) -> dict[str, float]:
        return dict(zip(self.ids, map(float, self.scores), strict=True))


NOTHING = Hits((), np.zeros(0, np.float32))


def ranked(ids: Sequence[str], scores: Any, k: int) -> Hits:
    """The best ``k``, equal scores by id."""
    values = np.asarray(scores, dtype=np.float32)
    order = sorted(range(len(ids)), key=lambda place: (-values[place], ids[place]))[:k]
    return Hits(tuple(ids[place] for place in order), values[order])


def ranked_with_ties(fetch: Callable[[int], tuple[Sequence[str], Sequence[float]]], k: int) -> Hits:
    """The best ``k`` from an engine that gives its best ``n`` but orders equal scores as it likes.

    More is fetched until the score falls behind the k-th, so that which documents of equal score are found does not depend on the engine. After 10,000 more it
    does: a ranking with so many equal scores says nothing there.
    """
    limit = k + 1
    while True:
        ids, scores = fetch(limit)
        if len(ids) < limit or scores[-1] < scores[k - 1] or limit > k + TIES:
            return ranked(ids, scores, k)
        limit = k + 4 * (limit - k)


class Index(ABC):
    """Documents that can be searched by their text, by vectors, or both.

    What is added, replaced and deleted is staged first. :meth:`commit` puts it into the index, after which searches see it, here and in other processes, and a
    crash does not lose it. Ids are texts without white space. Any number of threads may search while one writes.

    Attributes:
        capabilities: what this kind of index can do.
        searches: by what this index can be searched: ``texts``, ``vectors`` or both.
        space: of its vectors, where it has any.
        encoder: settings of the encoder that makes them, where they are known.
        place: where it lies, for messages.
    """

    capabilities: frozenset[Capability]
    searches: frozenset[Content]
    space: Space | None
    encoder: Any = None
    place: str = "the index"

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._puts: dict[str, tuple[Doc, Any]] = {}
        self._removals: set[str] = set()

    def add(self, docs: Sequence[Doc], vectors: Any = None) -> None:
        """Stage new documents, with a row of ``vectors`` (n, dim) for each where the index holds vectors.

        Raises:
            UserError: if an id is no id, or is there already, in the index or twice among these; if vectors are missing or cannot be stored. Nothing is staged
                then.
        """
        self._stage(docs, vectors, replace=False)

    def upsert(self, docs: Sequence[Doc], vectors: Any = None) -> None:
        """As :meth:`add`, but a document that is there already is replaced; of equal ids among these the last one counts."""
        self._stage(docs, vectors, replace=True)

    def delete(self, ids: Iterable[str]) -> int:
        """Stage the removal of documents. Returns how many of them are there; unknown ids are no error."""
        with self._lock:
            self._open_for_writing()
            wanted = list(dict.fromkeys(ids))
            stored = self._existing(wanted) - self._removals
            there = [name for name in wanted if name in self._puts or name in stored]
            for name in there:
                self._puts.pop(name, None)
            self._removals |= stored
            return len(there)

    def commit(self) -> None:
        """Put everything that is staged into the index; when this returns it stays there.

        Raises:
            UserError: if another process writes to the index.
        """
        with self._lock:
            if self._puts or self._removals:
                self._open_for_writing()
                docs = [doc for doc, _ in self._puts.values()]
                vectors = np.stack([row for _, row in self._puts.values()]) if docs and self.space else None
                self._write(docs, vectors, sorted(self._removals))
                self._puts, self._removals = {}, set()

    def search(self, queries: Any, k: int = 10, filter: str | Filter | None = None) -> list[Hits]:
        """The best ``k`` documents for each query, or as many as there are.

        Args:
            queries: texts, or vectors (n, dim). Texts find documents that share a word with them, vectors find all.
            k: how many.
            filter: what the documents' ``meta`` must be like, such as ``year >= 1990 and lang = 'en'``. It is applied before the best are taken.

        Raises:
            UserError: if the index cannot be searched this way, ``k`` is below 1, or the filter cannot be read.
        """
        if k < 1:
            raise UserError(f"k is {k!r}; it must be at least 1")
        wanted = Filter.parse(filter) if isinstance(filter, str) else filter
        texts = not isinstance(queries, np.ndarray)
        content: Content = "texts" if texts else "vectors"
        if content not in self.searches:
            raise UserError(f"{self.place} cannot be searched by {content}; it holds {' and '.join(sorted(self.searches))}")
        if texts:
            if isinstance(queries, str):
                raise UserError("the queries are one text; give a list of texts")
            return self._search_texts(list(queries), k, wanted)
        assert self.space is not None
        return self._search_vectors(self.space.checked(queries, "query vectors"), k, wanted)

    def vectors(self, ids: Sequence[str]) -> Vectors:
        """The stored vectors of documents.

        Raises:
            UserError: if the index holds none, or a document is not there.
        """
        if self.space is None:
            raise UserError(f"{self.place} holds no vectors")
        found = self._vectors(ids)
        self._refuse_missing(ids, found)
        return np.stack([found[name] for name in ids]) if len(ids) else np.zeros((0, self.space.dim), dtype=np.float32)

    def documents(self, ids: Sequence[str]) -> list[Doc]:
        """The stored documents.

        Raises:
            UserError: if one is not there.
        """
        found = self._documents(ids)
        self._refuse_missing(ids, found)
        return [found[name] for name in ids]

    def existing(self, ids: Iterable[str]) -> set[str]:
        """Those of these ids that are in the index; what is staged does not count."""
        return self._existing(list(ids))

    @abstractmethod
    def __len__(self) -> int:
        """Documents in the index; what is staged does not count."""

    def close(self) -> None:
        """Let others write. What is staged and not committed is dropped."""
        self._puts, self._removals = {}, set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_for_writing(self) -> None:  # noqa: B027 (indexes in memory have no other writers)
        """Make sure that nobody else writes, once."""

    @abstractmethod
    def _existing(self, ids: list[str]) -> set[str]: ...

    @abstractmethod
    def _write(self, docs: list[Doc], vectors: Vectors | None, removed: list[str]) -> None:
        """Remove these ids and put these documents, whose ids may be there already, in one step as far as the store can."""

    @abstractmethod
    def _documents(self, ids: Sequence[str]) -> Mapping[str, Doc]: ...

    def _search_texts(self, queries: list[str], k: int, filter: Filter | None) -> list[Hits]:
        """For an index that :attr:`searches` texts."""
        raise AssertionError(f"{self.place} is not searched by texts")

    def _search_vectors(self, queries: Vectors, k: int, filter: Filter | None) -> list[Hits]:
        """For an index that :attr:`searches` vectors."""
        raise AssertionError(f"{self.place} is not searched by vectors")

    def _vectors(self, ids: Sequence[str]) -> Mapping[str, Any]:
        """For an index with a :attr:`space`."""
        raise AssertionError(f"{self.place} has no vectors")

    def _stage(self, docs: Sequence[Doc], vectors: Any, *, replace: bool) -> None:
        for doc in docs:
            check_id(doc.id, "document", self.place)
            check_storable(doc)
        if (vectors is None) != (self.space is None) and docs:
            raise UserError(f"{self.place} holds {'vectors' if self.space else 'no vectors'}; give {'one for each document' if self.space else 'none'}")
        rows: Any = [None] * len(docs) if vectors is None else self.space.checked(vectors, "vectors") if self.space and len(docs) else []
        if len(rows) != len(docs):
            raise UserError(f"there are {len(rows)} vectors for {len(docs)} documents; it must be one for each")
        names = [doc.id for doc in docs]
        with self._lock:
            self._open_for_writing()
            if not replace:
                seen = (self._existing(names) - self._removals) | self._puts.keys()
                for name in names:
                    if name in seen:
                        raise UserError(f"the document {name!r} is in {self.place} already, or twice among what is added; upsert replaces")
                    seen.add(name)
            for doc, row in zip(docs, rows, strict=True):
                self._puts[doc.id] = (doc, row)
                self._removals.discard(doc.id)

    def _refuse_missing(self, ids: Sequence[str], found: Mapping[str, Any]) -> None:
        for name in ids:
            if name not in found:
                raise UserError(f"the document {name!r} is not in {self.place}")


class Retriever(ABC):
    """Finds documents for queries."""

    @abstractmethod
    def search(self, queries: Mapping[str, str] | Sequence[str], k: int = 10, filter: str | Filter | None = None) -> Run:
        """The best ``k`` documents for each query, best first, with their scores.

        Args:
            queries: texts by id; or a list of texts, whose ids are then their places, ``"0"``, ``"1"`` and so on.
            k: how many documents.
            filter: what the documents' ``meta`` must be like; see :class:`echelon.retrieve.Filter`.
        """


def with_ids(queries: Mapping[str, str] | Sequence[str]) -> dict[str, str]:
    """Queries by id.

    Raises:
        UserError: if they are one text.
    """
    if isinstance(queries, str):
        raise UserError("the queries are one text; give a list, or a mapping from ids to texts")
    return dict(queries) if isinstance(queries, Mapping) else {str(place): query for place, query in enumerate(queries)}


class RetrievalMethod(ABC):
    """Knobs that say how to find; registered under the kind ``retriever``."""

    @abstractmethod
    def over(self, index: Index) -> Retriever:
        """Search an index that is there.

        Raises:
            UserError: if the index cannot be searched this way.
        """

    @abstractmethod
    def index(self, corpus: Iterable[Doc]) -> Retriever:
        """Index a corpus in memory and search it."""
