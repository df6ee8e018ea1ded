"""BM25: documents that share words with the query, rare words and short documents first."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

from echelon.data.documents import Doc
from echelon.data.runs import Run
from echelon.errors import UserError
from echelon.registry import method
from echelon.retrieve.base import Index, RetrievalMethod, Retriever, with_ids
from echelon.retrieve.filters import Filter
from echelon.retrieve.memory import BM25Index, Variant, check_bm25
from echelon.retrieve.tokens import Stemmer, StopWords, Tokens


@dataclass(frozen=True)
class TextRetriever(Retriever):
    """An index, searched by words."""

    source: Index

    def search(self, queries: Mapping[str, str] | Sequence[str], k: int = 10, filter: str | Filter | None = None) -> Run:
        texts = with_ids(queries)
        return {qid: hits.as_dict() for qid, hits in zip(texts, self.source.search(list(texts.values()), k, filter), strict=True)}


@method(kind="retriever", title="Okapi at TREC-3", year=1994, summary="Words that query and document share, weighed by rarity, repetition and length.")
@dataclass(frozen=True)
class BM25(RetrievalMethod):
    """BM25 in the variants that "Which BM25 Do You Mean?" (Kamphuis et al., ECIR 2020) compares, over title and text.

    An index on disk has its words and its formula fixed (Lucene's with k1 1.2 and b 0.75); there the knobs may be left as they are, or say the same.

    Attributes:
        method: the formula: lucene, robertson, atire, bm25l or bm25+.
        k1: how much repetition of a word in a document counts, >= 0.
        b: how much the length of a document counts, in [0, 1].
        delta: what a word adds at least, for bm25l and bm25+, >= 0.
        stopwords: frequent words that are left out: none, or the 33 of english.
        stemmer: language whose endings are cut off words, such as english; or none.
    """

    method: Variant = "lucene"
    k1: float = 1.2
    b: float = 0.75
    delta: float = 0.5
    stopwords: StopWords = "none"
    stemmer: Stemmer = "none"

    def __post_init__(self) -> None:
        """Raises: ValueError: if a knob is out of range."""
        check_bm25(self.method, self.k1, self.b, self.delta)
        Tokens(self.stopwords, self.stemmer)

    def index(self, corpus: Iterable[Doc]) -> Retriever:
        made = BM25Index(self.method, self.k1, self.b, self.delta, Tokens(self.stopwords, self.stemmer))
        made.add(list(corpus))
        made.commit()
        return TextRetriever(made)

    def over(self, index: Index) -> Retriever:
        if "texts" not in index.searches:
            raise UserError(f"{index.place} cannot be searched by bm25, it holds vectors only; use dense")
        fixed = {"method": "lucene", "k1": 1.2, "b": 0.75}
        if isinstance(index, BM25Index):
            fixed = {"method": index.variant, "k1": index.k1, "b": index.b, "delta": index.delta}
        tokens = getattr(index, "tokens", None)
        if isinstance(tokens, Tokens):
            fixed |= tokens.as_json()
        for knob in fields(self):
            mine, theirs = getattr(self, knob.name), fixed.get(knob.name, knob.default)
            if mine not in (knob.default, theirs):
                raise UserError(f"{knob.name} is {mine!r}; {index.place} was made with {theirs!r}, which stays")
        return TextRetriever(index)
