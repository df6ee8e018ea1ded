"""Dense retrieval: documents whose vectors are near the query's."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from echelon.data.documents import Doc
from echelon.data.runs import Run
from echelon.errors import UserError
from echelon.registry import method
from echelon.retrieve.base import Encoder, Index, RetrievalMethod, Retriever, Space, with_ids
from echelon.retrieve.filters import Filter
from echelon.retrieve.memory import VectorIndex
from echelon.retrieve.opening import encoder_of


@dataclass(frozen=True)
class DenseRetriever(Retriever):
    """An index, searched by vectors of the encoder that made its own.

    Raises:
        UserError: if another encoder made them.
    """

    source: Index
    encoder: Encoder

    def __post_init__(self) -> None:
        _refuse_wordy(self.source)
        assert self.source.space is not None
        self.source.space.require(Space.of(self.encoder), self.source.place)

    def search(self, queries: Mapping[str, str] | Sequence[str], k: int = 10, filter: str | Filter | None = None) -> Run:
        texts = with_ids(queries)
        if not texts:
            return {}
        vectors = self.encoder.encode_queries(list(texts.values()))
        return {qid: hits.as_dict() for qid, hits in zip(texts, self.source.search(vectors, k, filter), strict=True)}


@method(
    kind="retriever", title="Dense Passage Retrieval for Open-Domain Question Answering", arxiv="2004.04906", year=2020,
    summary="Vectors of query and document, the nearest first.", needs="an encoder; the extra `embedded` brings MiniLM",
)  # fmt: skip
@dataclass(frozen=True)
class Dense(RetrievalMethod):
    """Search among the vectors of an encoder, exact unless the index was made otherwise.

    Attributes:
        encoder: `embedded` (all-MiniLM-L6-v2), a folder, a hub id, `rankgen`, or an encoder; by default the one that the index was made with, else `embedded`.
    """

    encoder: Any = None

    def index(self, corpus: Iterable[Doc]) -> Retriever:
        from echelon.retrieve.encoders import resolve_encoder

        encoder, docs = resolve_encoder("embedded" if self.encoder is None else self.encoder), list(corpus)
        made = VectorIndex(Space.of(encoder))
        made.add(docs, encoder.encode_documents(docs))
        made.commit()
        return DenseRetriever(made, encoder)

    def over(self, index: Index) -> Retriever:
        from echelon.retrieve.encoders import resolve_encoder

        _refuse_wordy(index)
        return DenseRetriever(index, encoder_of(index) if self.encoder is None else resolve_encoder(self.encoder))


def _refuse_wordy(index: Index) -> None:
    if index.space is None:
        raise UserError(f"{index.place} cannot be searched by dense, it holds no vectors; `echelon index --encoder E` makes one that does")
