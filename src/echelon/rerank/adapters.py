"""Rerankers where other tools expect theirs; neither tool is needed for it."""

from typing import TYPE_CHECKING, Any

from echelon.data.documents import Doc
from echelon.errors import UserError
from echelon.rerank.base import Request, Reranker

if TYPE_CHECKING:
    import pandas


class DataFrameReranker:
    """A function from data frame to data frame, as ``pyterrier.apply.generic`` takes it.

    The columns ``qid``, ``query``, ``docno`` and ``text`` are read; of each query the rows are taken by falling ``score`` where there is one, else as they
    stand. The frame that is returned has the same rows and columns with ``score`` and ``rank`` (from 0) made new, the queries in their order, best row first.

    Args:
        reranker: what ranks.
    """

    def __init__(self, reranker: Reranker):
        self.reranker = reranker

    def __call__(self, frame: "pandas.DataFrame") -> "pandas.DataFrame":
        """Raises: UserError: if a column is missing, a query has two texts, or a document is there twice for a query."""
        for column in ("qid", "query", "docno", "text"):
            if column not in frame.columns:
                raise UserError(f"the data frame lacks the column {column!r}; it has {', '.join(map(str, frame.columns))}")
        frame = frame.reset_index(drop=True)
        requests, rows = [], []
        for qid, part in frame.groupby("qid", sort=False):
            if part["query"].nunique() > 1:
                raise UserError(f"the query {qid!r} has {part['query'].nunique()} texts; it must have one")
            if "score" in part.columns:
                part = part.sort_values("score", ascending=False, kind="stable")
            docs = [Doc(name, text) for name, text in zip(part["docno"].astype(str), part["text"].astype(str), strict=True)]
            requests.append(Request.of(str(part["query"].iloc[0]), docs, str(qid)))
            rows.append(part)
        made = self.reranker.rerank(requests, depth=max(map(len, rows), default=1))
        order = [part.index[place] for request, part in zip(requests, rows, strict=True) for place in made.rankings[request.qid].order]
        frame = frame.loc[order].copy()
        frame["score"] = [score for request in requests for score in made.runs[request.qid].values()]
        frame["rank"] = [rank for request in requests for rank in range(len(request.candidates))]
        return frame

    transform = __call__


class DocumentCompressor:
    """``compress_documents`` as LangChain's retrievers with compression call it, on anything with ``page_content``.

    Args:
        reranker: what ranks.
        top_n: documents to keep; all by default.
    """

    def __init__(self, reranker: Reranker, top_n: int | None = None):
        self.reranker, self.top_n = reranker, top_n

    def compress_documents(self, documents: Any, query: str, callbacks: Any = None) -> list[Any]:
        """The same documents, best first."""
        hits = self.reranker.rank(query, [document.page_content for document in documents], top_k=self.top_n)
        return [documents[hit["corpus_id"]] for hit in hits]
