"""Questions on Vietnamese law: statutes split along their structure, BM25 and vectors, and a fusion by normalised places.

Source: "Vietnamese Legal Information Retrieval in Question-Answering System", arXiv 2409.13699. Its body could not be read: the steps are rebuilt from the
abstract and public summaries (unconfirmed). Its re-ranking by what the answer used is :class:`echelon.rerank.ActiveRetrieval`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from echelon.data.documents import Doc
from echelon.data.runs import Run, sorted_docs
from echelon.errors import UserError
from echelon.registry import method
from echelon.retrieve.base import EncoderAround, Index, RetrievalMethod, Retriever, Space, with_ids
from echelon.retrieve.bm25 import TextRetriever
from echelon.retrieve.chunking import Chunker, near_duplicates
from echelon.retrieve.dense import DenseRetriever
from echelon.retrieve.filters import Filter
from echelon.retrieve.fusion import check_fusion
from echelon.retrieve.hybrid import KNOBS, FusedRetriever
from echelon.retrieve.memory import BM25Index, VectorIndex
from echelon.retrieve.vietnamese import STOP_WORDS, VietnameseWords, normalize_vietnamese, segmenter_named, without_boilerplate


@dataclass(frozen=True)
class Prepared(EncoderAround):
    """An encoder whose texts are prepared first.

    Attributes:
        encoder: the encoder.
        prepare: from a text to what it reads.
        name: of the preparation, which becomes part of the fingerprint; empty for one that leaves prepared texts as they are.
    """

    prepare: Callable[[str], str]
    name: str = ""

    @property
    def fingerprint(self) -> str:
        return self.encoder.fingerprint + f"+{self.name}" * bool(self.name)

    def lengths(self, texts: Sequence[str], side: Literal["query", "document"]) -> list[int]:
        return self.encoder.lengths([self.prepare(text) for text in texts], side)

    def encode_queries(self, queries: list[str]) -> np.ndarray:
        return self.encoder.encode_queries([self.prepare(query) for query in queries])

    def encode_documents(self, documents: list[Doc]) -> np.ndarray:
        return self.encoder.encode_documents([replace(doc, text=self.prepare(doc.text), title=self.prepare(doc.title)) for doc in documents])


@dataclass(frozen=True)
class Distinct(Retriever):
    """A retriever of whose hits, best first, those are left out that are near duplicates of one before them.

    Attributes:
        retriever: who searches.
        vectors: an index that has their vectors.
        threshold: cosine from which on two are near duplicates.
        prepare: what queries go through first.
    """

    retriever: Retriever
    vectors: Index
    threshold: float | None
    prepare: Callable[[str], str] = str

    def search(self, queries: Mapping[str, str] | Sequence[str], k: int = 10, filter: str | Filter | None = None) -> Run:
        run = self.retriever.search({qid: self.prepare(query) for qid, query in with_ids(queries).items()}, k, filter)
        return run if self.threshold is None else {qid: self._distinct(scores, self.threshold) for qid, scores in run.items()}

    def _distinct(self, scores: dict[str, float], threshold: float) -> dict[str, float]:
        ids = sorted_docs(scores)
        leaders = near_duplicates(self.vectors.vectors(ids), threshold)
        return {name: scores[name] for place, name in enumerate(ids) if leaders[place] == place}


@method(
    kind="retriever", title="Vietnamese Legal Information Retrieval in Question-Answering System", arxiv="2409.13699", year=2024,
    summary="Statutes in chunks along their structure; BM25 and vectors, fused by normalised places.",
    needs="an encoder that reads Vietnamese, such as BAAI/bge-m3; a word segmenter helps (pyvi or underthesea)",
)  # fmt: skip
@dataclass(frozen=True)
class VietnameseLegal(RetrievalMethod):
    """The whole recipe: one spelling, chunks, two searches, near duplicates out, chunks collapsed to documents, fusion.

    The shipped encoder is an English one, good for trying things out. For texts in other languages take `split_levels="plain"`. An index that is there is
    searched as it stands: it should hold what :meth:`chunks` made, whose `meta` names each chunk's document; a document without that stands for itself.

    Attributes:
        encoder: `embedded`, a folder, a hub id (`BAAI/bge-m3`), or an encoder; by default the one that an index was made with, else `embedded`.
        segmenter: what joins the syllables of a word by `_` for BM25: `none`, `pyvi`, `underthesea`, or a function. Its name is kept with every chunk.
        segment_for_encoder: whether the encoder reads segmented text too, as PhoBERT and its kin want; multilingual ones must not.
        stop_words: whether frequent words without meaning are left out of BM25.
        max_chunk_tokens: tokens of a chunk, at most, in the encoder's own count; fewer where it reads fewer.
        overlap: tokens that neighbouring windows of a unit that is too long share.
        split_levels: kinds of units: `vi-legal`, `plain`, or levels.
        fusion: how the two lists become one.
        rrf_k: of `rrf`, >= 0.
        kappa: of `rrf_norm`, > 0.
        weights: of BM25 and of vectors, >= 0.
        depth_per_retriever: chunks that each of the two is asked for.
        dedup_threshold: cosine from which on a chunk is left out of a list that has a better one like it, in [0, 1]; none leaves all in.
    """

    encoder: Any = None
    segmenter: Any = "none"
    segment_for_encoder: bool = False
    stop_words: bool = True
    max_chunk_tokens: int = 256
    overlap: int = 32
    split_levels: Any = "vi-legal"
    fusion: Literal["rrf_norm", "rrf", "weighted"] = "rrf_norm"
    rrf_k: float = 60
    kappa: float = 0.1
    weights: tuple[float, float] = (0.5, 0.5)
    depth_per_retriever: int = 50
    dedup_threshold: float | None = 0.95

    def __post_init__(self) -> None:
        """Raises: ValueError: if a knob is out of range."""
        Chunker(None, self.max_chunk_tokens, self.overlap, self.split_levels)
        if self.fusion not in ("rrf_norm", "rrf", "weighted"):
            raise ValueError(f"fusion is {self.fusion!r}; it must be one of rrf_norm, rrf, weighted")
        check_fusion(2, self.fusion, self.weights, self.rrf_k, self.kappa, "min_max", self.depth_per_retriever, KNOBS)
        if self.dedup_threshold is not None:
            near_duplicates(np.zeros((0, 1), np.float32), self.dedup_threshold)
        if not callable(self.segmenter) and self.segmenter not in ("none", "pyvi", "underthesea"):
            raise ValueError(f"segmenter is {self.segmenter!r}; it must be one of none, pyvi, underthesea, or a function")

    @cached_property
    def segment(self) -> Callable[[str], str]:
        return self.segmenter if callable(self.segmenter) else segmenter_named(self.segmenter)

    @property
    def segmenter_name(self) -> str:
        return getattr(self.segmenter, "__qualname__", type(self.segmenter).__name__) if callable(self.segmenter) else self.segmenter

    def chunks(self, corpus: Iterable[Doc]) -> list[Doc]:
        """Documents, normalised, without boilerplate and in chunks. Their ``meta`` has ``parent``, where they stand, and the ``segmenter``."""
        return self._chunks(corpus, self._prepared("embedded" if self.encoder is None else self.encoder))

    def index(self, corpus: Iterable[Doc]) -> Retriever:
        encoder = self._prepared("embedded" if self.encoder is None else self.encoder)
        chunks = self._chunks(corpus, encoder)
        words = BM25Index(tokens=VietnameseWords(self.segment, STOP_WORDS if self.stop_words else frozenset()))
        words.add(chunks)
        vectors = VectorIndex(Space.of(encoder))
        vectors.add(chunks, encoder.encode_documents(chunks))
        for index in (words, vectors):
            index.commit()
        parents = {chunk.id: str(chunk.meta["parent"]) for chunk in chunks}
        return self._fused(TextRetriever(words), DenseRetriever(vectors, encoder), vectors, lambda found: parents)

    def over(self, index: Index) -> Retriever:
        from echelon.retrieve.opening import encoder_of

        if index.searches != {"texts", "vectors"}:
            raise UserError(f"{index.place} holds {' and '.join(sorted(index.searches))}; vietnamese_legal needs texts and vectors")
        if self.segmenter != "none":
            raise UserError(f"segmenter is {self.segmenter_name!r}, but the words of {index.place} are not segmented; leave it none, or index in memory")
        encoder = self._prepared(encoder_of(index) if self.encoder is None else self.encoder)

        def parents(found: list[str]) -> Mapping[str, str]:
            return {doc.id: str(doc.meta.get("parent", doc.id)) for doc in index.documents(found)}

        return self._fused(TextRetriever(index), DenseRetriever(index, encoder), index, parents)

    def _prepared(self, encoder: Any) -> Prepared:
        from echelon.retrieve.encoders import resolve_encoder

        if self.segment_for_encoder:
            return Prepared(resolve_encoder(encoder), lambda text: self.segment(normalize_vietnamese(text)), f"segmented by {self.segmenter_name}")
        return Prepared(resolve_encoder(encoder), normalize_vietnamese)

    def _chunks(self, corpus: Iterable[Doc], encoder: Prepared) -> list[Doc]:
        if not hasattr(encoder.encoder, "lengths"):
            raise UserError(f"{type(encoder.encoder).__name__} cannot count tokens, which chunks need; give an encoder that has lengths(texts, side)")
        most = min(self.max_chunk_tokens, encoder.encoder.longest("document"))
        chunker = Chunker(encoder, most, min(self.overlap, most // 2), self.split_levels)
        clean = (Doc(doc.id, without_boilerplate(normalize_vietnamese(doc.text)), normalize_vietnamese(doc.title), doc.meta) for doc in corpus)
        return [replace(chunk, meta={**chunk.meta, "segmenter": self.segmenter_name}) for chunk in chunker.documents(clean)]

    def _fused(self, words: Retriever, dense: Retriever, vectors: Index, parents: Callable[[list[str]], Mapping[str, str]]) -> Retriever:
        pair = [Distinct(words, vectors, self.dedup_threshold, normalize_vietnamese), Distinct(dense, vectors, self.dedup_threshold)]
        return FusedRetriever(pair, self.fusion, self.weights, self.rrf_k, self.kappa, "min_max", self.depth_per_retriever, parents)
