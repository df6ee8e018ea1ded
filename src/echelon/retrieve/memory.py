"""Indexes in memory: exact search by vectors, and BM25 in any of its variants."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np

from echelon.data.documents import Doc
from echelon.data.files import folder_whole, read_text
from echelon.errors import UserError
from echelon.retrieve.base import NOTHING, Capability, Hits, Index, Space, Vectors, ranked
from echelon.retrieve.filters import Filter
from echelon.retrieve.stored import MANIFEST, doc_from_json, doc_to_json, manifest
from echelon.retrieve.tokens import Tokens, needed

Variant = Literal["lucene", "robertson", "atire", "bm25l", "bm25+"]
BLOCK = 1 << 25  # scores held at once
PLAIN = Tokens()


class MemoryIndex(Index):
    """What both have in common: documents by id, kept in the order of their ids, and a folder to save them in."""

    def __init__(self) -> None:
        super().__init__()
        self._docs: dict[str, Doc] = {}

    def __len__(self) -> int:
        return len(self._docs)

    def _existing(self, ids: list[str]) -> set[str]:
        return {name for name in ids if name in self._docs}

    def _documents(self, ids: Sequence[str]) -> Mapping[str, Doc]:
        return self._docs

    def _merged(self, docs: list[Doc], removed: list[str]) -> dict[str, Doc]:
        gone = set(removed)
        held = {name: doc for name, doc in self._docs.items() if name not in gone} | {doc.id: doc for doc in docs}
        return dict(sorted(held.items()))

    def _save(self, folder: str | Path, settings: dict[str, Any], vectors: Vectors | None) -> None:
        with folder_whole(folder) as place:
            (place / MANIFEST).write_text(json.dumps({"format": 1, "backend": "memory", **settings}), encoding="utf-8")
            with open(place / "documents.jsonl", "w", encoding="utf-8") as file:
                file.writelines(doc_to_json(doc) + "\n" for doc in self._docs.values())
            if vectors is not None:
                np.save(place / "vectors.npy", vectors, allow_pickle=False)


def _saved(folder: str | Path, what: str) -> tuple[dict[str, Any], list[Doc]]:
    told = manifest(folder, "memory")
    if told is None or what not in told:
        raise UserError(f"{folder} holds no index of this kind")
    return told, [doc_from_json(line) for line in read_text(Path(folder) / "documents.jsonl").split("\n") if line]


@dataclass(frozen=True)
class _Rows:
    """Vectors in the order of their ids; replaced as a whole, so that searches see one state."""

    ids: np.ndarray
    vectors: Vectors
    lengths: np.ndarray  # of the vectors under cosine, else 1
    unsure: float  # by how much single precision may be wrong for a query of length 1
    metas: tuple[Mapping[str, Any], ...]


class VectorIndex(MemoryIndex):
    """Exact search by vectors.

    Products are taken in single precision for all documents, and again in double precision for those that could be among the best, so that neither the
    company of a query nor the order of documents changes a score.
    """

    capabilities: frozenset[Capability] = frozenset({"incremental_add", "delete", "filter", "exact", "returns_vectors", "concurrent_readers"})
    searches = frozenset({"vectors"})  # type: ignore[assignment]
    space: Space

    def __init__(self, space: Space):
        super().__init__()
        self.space = space
        self._rows = _Rows(np.array([], dtype=object), np.zeros((0, space.dim), np.float32), np.zeros(0), 0.0, ())

    def save(self, folder: str | Path) -> None:
        """Write what is committed to a folder, which appears whole."""
        self._save(folder, {"space": asdict(self.space)}, self._rows.vectors)

    @classmethod
    def load(cls, folder: str | Path, space: Space | None = None) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            UserError: if it cannot be read, or was made with another encoder than ``space`` tells of.
        """
        told, docs = _saved(folder, "space")
        made = cls(Space(**told["space"]))
        made.place = str(folder)
        if space is not None:
            made.space.require(space, made.place)
        made.add(docs, np.load(Path(folder) / "vectors.npy", allow_pickle=False))
        made.commit()
        return made

    def _write(self, docs: list[Doc], vectors: Vectors | None, removed: list[str]) -> None:
        held = self._merged(docs, removed)
        row_of = {name: row for name, row in zip(self._rows.ids, self._rows.vectors, strict=True) if name in held}
        if vectors is not None:
            row_of |= {doc.id: row for doc, row in zip(docs, vectors, strict=True)}
        rows = np.stack([row_of[name] for name in held]) if held else np.zeros((0, self.space.dim), np.float32)
        lengths = np.sqrt(np.square(rows, dtype=np.float64).sum(1))
        cosine = self.space.similarity == "cosine"
        unsure = 1e-6 * self.space.dim**0.5 * (1.0 if cosine else float(lengths.max(initial=0)))
        metas = tuple(doc.meta for doc in held.values())
        self._rows = _Rows(np.array(list(held), dtype=object), rows, lengths if cosine else np.ones(len(rows)), unsure, metas)
        self._docs = held

    def _search_vectors(self, queries: Vectors, k: int, filter: Filter | None) -> list[Hits]:
        rows, found = self._rows, []
        if filter is not None:
            kept = np.flatnonzero([filter.matches(meta) for meta in rows.metas])
            rows = _Rows(rows.ids[kept], rows.vectors[kept], rows.lengths[kept], rows.unsure, ())
        if self.space.similarity == "cosine":
            queries = queries / np.sqrt(np.square(queries, dtype=np.float64).sum(1, keepdims=True))
        step = max(1, BLOCK // max(len(rows.ids), 1))
        for start in range(0, len(queries), step):
            block = queries[start : start + step]
            rough = (block.astype(np.float32) @ rows.vectors.T) / rows.lengths.astype(np.float32)
            found += [self._best(query, scores, rows, k) for query, scores in zip(block, rough, strict=True)]
        return found

    def _best(self, query: np.ndarray, rough: np.ndarray, rows: _Rows, k: int) -> Hits:
        count = len(rough)
        if count > k:
            unsure = rows.unsure * np.linalg.norm(query)
            near = np.flatnonzero(rough >= np.partition(rough, count - k)[count - k] - unsure)
        else:
            near = np.arange(count)
        exact = (rows.vectors[near].astype(np.float64) * query.astype(np.float64)).sum(1) / rows.lengths[near]
        return ranked(rows.ids[near].tolist(), exact, k)

    def _vectors(self, ids: Sequence[str]) -> Mapping[str, Any]:
        place = {name: number for number, name in enumerate(self._rows.ids)}
        return {name: self._rows.vectors[place[name]] for name in ids if name in place}


class BM25Index(MemoryIndex):
    """BM25 over words, through bm25s, which cannot add: every commit weighs all documents anew.

    Documents are found that share a word with the query whose weight is above zero. A word that the query has twice counts twice.

    Args:
        variant: the formula; "Which BM25 Do You Mean? A Large-Scale Reproducibility Study of Scoring Variants" (Kamphuis et al., ECIR 2020) compares them.
        k1: how much repetition of a word in a document counts, >= 0.
        b: how much the length of a document counts, in [0, 1].
        delta: what a word adds at least, for bm25l and bm25+, >= 0.
        tokens: from texts to words; any function that does that.
    """

    capabilities: frozenset[Capability] = frozenset({"incremental_add", "delete", "filter", "exact", "concurrent_readers"})
    searches = frozenset({"texts"})  # type: ignore[assignment]
    space = None

    def __init__(self, variant: Variant = "lucene", k1: float = 1.2, b: float = 0.75, delta: float = 0.5, tokens: Callable[[str], list[str]] = PLAIN):
        super().__init__()
        check_bm25(variant, k1, b, delta)
        needed("bm25s")
        self.variant, self.k1, self.b, self.delta, self.tokens = variant, k1, b, delta, tokens
        self._vocabulary: dict[str, int] = {}
        self._words: dict[str, np.ndarray] = {}
        self._model: tuple[Any, list[str], tuple[Mapping[str, Any], ...]] | None = None

    def save(self, folder: str | Path) -> None:
        """Write what is committed to a folder, which appears whole.

        Raises:
            UserError: if the words come from a function that cannot be written down.
        """
        if not isinstance(self.tokens, Tokens):
            raise UserError("an index with a tokeniser of its own cannot be saved; save the documents, and index them again")
        knobs = {"variant": self.variant, "k1": self.k1, "b": self.b, "delta": self.delta}
        self._save(folder, {"bm25": knobs, "tokens": self.tokens.as_json()}, None)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what :meth:`save` wrote, and weigh its words again.

        Raises:
            UserError: if it cannot be read.
        """
        told, docs = _saved(folder, "bm25")
        made = cls(**told["bm25"], tokens=Tokens(**told["tokens"]))
        made.place = str(folder)
        made.add(docs)
        made.commit()
        return made

    def _write(self, docs: list[Doc], vectors: Vectors | None, removed: list[str]) -> None:
        held, vocabulary = self._merged(docs, removed), dict(self._vocabulary)
        new = {doc.id: np.array([vocabulary.setdefault(word, len(vocabulary)) for word in self.tokens(doc.content)], dtype=np.int32) for doc in docs}
        words = {name: new[name] if name in new else self._words[name] for name in held}
        self._model = (self._weighed(list(words.values()), vocabulary), list(held), tuple(doc.meta for doc in held.values())) if vocabulary and held else None
        self._vocabulary, self._words, self._docs = vocabulary, words, held

    def _weighed(self, words: list[np.ndarray], vocabulary: dict[str, int]) -> Any:
        bm25s = needed("bm25s")
        model = bm25s.BM25(method=self.variant, k1=self.k1, b=self.b, delta=self.delta)
        model.index((words, vocabulary), create_empty_token=False, show_progress=False)
        return model

    def _search_texts(self, queries: list[str], k: int, filter: Filter | None) -> list[Hits]:
        if self._model is None:
            return [NOTHING for _ in queries]
        model, ids, metas = self._model
        kept = np.array([filter.matches(meta) for meta in metas]) if filter is not None else np.ones(len(ids), dtype=bool)
        return [self._best(model, self.tokens(query), ids, kept, k) for query in queries]

    def _best(self, model: Any, words: list[str], ids: list[str], kept: np.ndarray, k: int) -> Hits:
        known = [model.vocab_dict[word] for word in words if word in model.vocab_dict]
        if not known:
            return NOTHING
        scores = model.get_scores_from_ids(known)
        without = model.nonoccurrence_array[known].sum() if model.nonoccurrence_array is not None else 0  # the score of a document with none of the words
        found = np.flatnonzero((scores > without) & kept)
        if len(found) > k:
            found = found[scores[found] >= np.partition(scores[found], len(found) - k)[len(found) - k]]
        return ranked([ids[place] for place in found], scores[found], k)


def check_bm25(variant: str, k1: float, b: float, delta: float) -> None:
    """Raises: ValueError: if a knob of BM25 is out of range."""
    if variant not in get_args(Variant):
        raise ValueError(f"method is {variant!r}; it must be one of {', '.join(get_args(Variant))}")
    for name, value, fits, legal in (("k1", k1, k1 >= 0, "at least 0"), ("b", b, 0 <= b <= 1, "in [0, 1]"), ("delta", delta, delta >= 0, "at least 0")):
        if not fits or value == float("inf"):
            raise ValueError(f"{name} is {value!r}; it must be {legal}")
