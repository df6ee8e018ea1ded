"""What every reranker is made of: requests, a judge that answers questions, a strategy that asks them, and the reranker that joins the two."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, Any, ClassVar, overload

from echelon.data.documents import Doc
from echelon.data.runs import Run, falling, sorted_docs
from echelon.errors import UserError
from echelon.rerank.costs import Budget, Forecast, Stats
from echelon.rerank.questions import Answer, Asking, Kind, Question, Ranking, ScoreKind

if TYPE_CHECKING:
    import pandas

    from echelon.rerank.cache import Cache


@dataclass(frozen=True)
class Candidate:
    """A document to be ranked, with its score and its rank (from 1) in the first stage."""

    doc: Doc
    score: float
    rank: int


@dataclass(frozen=True)
class Request:
    """A query and its candidates, best first.

    Attributes:
        qid: the query's id.
        query: its text.
        candidates: what the first stage found.

    Raises:
        ValueError: if two candidates have one id.
    """

    qid: str
    query: str
    candidates: tuple[Candidate, ...]

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for candidate in self.candidates:
            if candidate.doc.id in seen:
                raise UserError(f"query {self.qid!r} has the document {candidate.doc.id!r} twice; the ids of its candidates must differ")
            seen.add(candidate.doc.id)

    @classmethod
    def of(cls, query: str, documents: Sequence[str | Doc], qid: str | None = None) -> "Request":
        """Documents in the order given, as candidates; texts without an id are called by their place.

        Args:
            query: its text, which is its id too unless one is given.
            documents: best first.
            qid: the query's id.
        """
        docs = [doc if isinstance(doc, Doc) else Doc(str(place), doc) for place, doc in enumerate(documents)]
        return cls(query if qid is None else qid, query, tuple(Candidate(doc, float(-place), place + 1) for place, doc in enumerate(docs)))

    @cached_property
    def docs(self) -> tuple[Doc, ...]:
        return tuple(candidate.doc for candidate in self.candidates)


def requests_of(run: Run, queries: Mapping[str, str], documents: Mapping[str, Doc]) -> list[Request]:
    """A run as requests, in the run's order of queries.

    Args:
        run: what the first stage found.
        queries: text of each query.
        documents: at least those that the run names, by id.

    Raises:
        UserError: if a query or a document is unknown.
    """
    made = []
    for qid, scores in run.items():
        if qid not in queries:
            raise UserError(f"the run has the query {qid!r}, which the queries lack")
        names = sorted_docs(scores)
        for name in names:
            if name not in documents:
                raise UserError(f"the run has the document {name!r} for the query {qid!r}, which the corpus lacks")
        made.append(Request(qid, queries[qid], tuple(Candidate(documents[name], scores[name], rank) for rank, name in enumerate(names, 1))))
    return made


class Asked(Sequence[Question]):
    """Questions of one kind on documents of one request, given by the documents' places; a question is made when it is looked at.

    Strategies yield them: a query that compares 100 documents in all pairs then costs no 9,900 objects.
    """

    __slots__ = ("kind", "places", "request")

    def __init__(self, kind: Kind, request: Request, places: Sequence[tuple[int, ...]]):
        self.kind, self.request, self.places = kind, request, places

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Question: ...
    @overload
    def __getitem__(self, index: slice) -> "Asked": ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return Asked(self.kind, self.request, self.places[index])
        docs = self.request.docs
        return Question(self.kind, self.request.qid, self.request.query, tuple(docs[place] for place in self.places[index]))


class OutOfBudget(Exception):
    """Thrown into a strategy whose questions cannot be paid for: it returns the best order that it has."""


@dataclass(frozen=True)
class Judgement:
    """One answered question, and whether the answer was known already."""

    question: Question
    answer: Answer
    known: bool


@dataclass(frozen=True)
class RerankResult:
    """What a reranker made of its requests.

    Attributes:
        runs: scores that fall strictly, also in single precision, for a TREC file.
        rankings: places of each query's candidates, best first, with the scores as they are: those of ties are equal.
        stats: what it cost.
        score_kind: what the scores are.
        trace: every question with its answer, if it was asked for.
    """

    runs: Run
    rankings: dict[str, Ranking]
    stats: Stats
    score_kind: ScoreKind
    trace: list[Judgement] = field(default_factory=list)


class Judge(ABC):
    """Answers questions of some kinds.

    Attributes:
        kinds: the kinds.
        identity: names all that an answer depends on besides the question (model, prompt, decoding), for the cache.
        chunk: how many questions it likes to be asked at a time.
        free: whether each answer takes one prompt and no tokens and is complete, so that nothing need be added up.
    """

    kinds: frozenset[Kind]
    identity: str
    chunk: int = 4096
    free: bool = False

    @abstractmethod
    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """An answer to each question, which depends on nothing but the question."""

    def answer_all(self, asked: Sequence[Sequence[Question]]) -> list[Answer]:
        """The answers to the questions of several queries, in one list."""
        return self.answer([question for questions in asked for question in questions])

    def prompts(self, docs: int) -> int:
        """Prompts that a question on so many documents takes."""
        return 1

    def cost(self, question: Question) -> Forecast:
        """What a question will cost, for forecasts."""
        return Forecast(self.prompts(len(question.docs)))

    def query_key(self, request: Request) -> str:
        """All that an answer depends on of the query."""
        return request.query

    def doc_key(self, doc: Doc) -> str:
        """All that an answer depends on of a document."""
        return doc.content


class Strategy(ABC):
    """Decides which questions to ask, and makes a ranking of the answers.

    Attributes:
        kind: the kind of its questions.
    """

    kind: ClassVar[Kind]

    @abstractmethod
    def ask(self, request: Request) -> Asking:
        """A generator for one query: it yields questions that do not depend on each other and is sent their answers.

        It returns its ranking; when :class:`OutOfBudget` is thrown into it, the best one that it has.
        """

    def forecast(self, n: int) -> Forecast:
        """Prompts and rounds for ``n`` documents; where they depend on the answers, those that a perfect judge of a random order would take."""
        from echelon.rerank.executor import rehearse

        questions, rounds = rehearse(self, n)
        return Forecast(len(questions), rounds)


def ordinal(order: Iterable[int]) -> Ranking:
    """A ranking of which only the order counts: scores n, n - 1, ..., 1."""
    order = tuple(order)
    return Ranking(order, tuple(float(n) for n in range(len(order), 0, -1)))


@dataclass(frozen=True)
class Reranker(ABC):
    """Orders the candidates of queries anew: a judge, a strategy, and one executor for all of them.

    Every output is a permutation of the candidates; documents below ``depth`` follow in their order; equal scores keep the order of the input.

    Attributes:
        model: `embedded`, a model folder, a hub id, a server (`http://host:port/v1#model`), an engine, or a judge.
    """

    model: Any = "embedded"

    remembers: ClassVar[bool] = True
    """Whether a question that is asked again is answered from memory."""

    @property
    @abstractmethod
    def judge(self) -> Judge:
        """Who answers; made from the model when it is first needed."""

    @property
    @abstractmethod
    def plan(self) -> Strategy:
        """Its strategy, with the knobs filled in."""

    def rank(self, query: str, documents: Sequence[str | Doc], *, top_k: int | None = None, return_documents: bool = False) -> list[dict[str, Any]]:
        """Documents for one query, best first, with the keys that sentence-transformers' ``CrossEncoder.rank`` gives.

        Args:
            query: its text; a judge that goes by ids is given it for an id.
            documents: texts or documents.
            top_k: how many to return; all by default.
            return_documents: with their texts.

        Returns:
            ``corpus_id`` (the place in ``documents``), ``score``, and ``text`` where asked for.
        """
        request = Request.of(query, documents)
        ranking = self.rerank([request], depth=max(1, len(documents)), top_k=top_k).rankings[request.qid]
        made: list[dict[str, Any]] = [{"corpus_id": place, "score": score} for place, score in zip(ranking.order, ranking.scores, strict=True)]
        if return_documents:
            made = [{**hit, "text": request.docs[hit["corpus_id"]].content} for hit in made]
        return made

    def rerank(
        self, requests: Sequence[Request], *, depth: int = 100, top_k: int | None = None, cache: "Cache | str | PathLike[str] | None" = None,
        budget: Budget | None = None, progress: Callable[[int, int], None] | None = None, trace: bool = False,
    ) -> RerankResult:  # fmt: skip
        """Rank the candidates of many queries, their questions put together in batches.

        Args:
            requests: the queries; their ids must differ.
            depth: candidates of each that are ranked; the others follow.
            top_k: documents of each to keep; all by default.
            cache: answers that are known, a :class:`~echelon.rerank.cache.Cache` or the path of its file. A run that was killed goes on where it was.
            budget: when to stop asking.
            progress: called with the number of queries done and of all.
            trace: keep every question with its answer.

        Raises:
            UserError: if an argument is out of range, two requests have one id, or the judge does not answer the strategy's questions.
        """
        from echelon.rerank.cache import opened
        from echelon.rerank.executor import execute

        self._check(requests, depth, top_k)
        with opened(cache) as known:
            cut = [Request(r.qid, r.query, r.candidates[:depth]) if len(r.candidates) > depth else r for r in requests]
            rankings, stats, told = execute(self.judge, self.plan, cut, known, budget, progress, remember=self.remembers, trace=trace)
        runs: Run = {}
        whole: dict[str, Ranking] = {}
        for request, ranking in zip(requests, rankings, strict=True):
            ranking = _extended(ranking, len(request.candidates))
            order, scores = ranking.order[:top_k], ranking.scores[:top_k]
            whole[request.qid] = Ranking(order, scores, ranking.score_kind)
            runs[request.qid] = {request.docs[place].id: score for place, score in zip(order, falling(scores), strict=True)}
        kinds = {ranking.score_kind for ranking in rankings}
        return RerankResult(runs, whole, stats, kinds.pop() if len(kinds) == 1 else "ordinal", told)

    def estimate(self, requests: Sequence[Request], *, depth: int = 100) -> Forecast:
        """What :meth:`rerank` will cost, without a cache: exact where the questions do not depend on the answers, else as for a perfect judge.

        Tokens are those of some of the questions, scaled up.
        """
        from echelon.rerank.executor import estimate

        self._check(requests, depth, None)
        return estimate(self.judge, self.plan, requests, depth)

    def _check(self, requests: Sequence[Request], depth: int, top_k: int | None) -> None:
        for name, value in (("depth", depth), ("top_k", top_k)):
            if value is not None and value < 1:
                raise UserError(f"{name} is {value!r}; it must be at least 1")
        if len({request.qid for request in requests}) < len(requests):
            names = [request.qid for request in requests]
            raise UserError(f"the query {next(n for n in names if names.count(n) > 1)!r} is requested twice; ids must differ")
        if self.plan.kind not in self.judge.kinds:
            raise UserError(
                f"{type(self.judge).__name__} answers {', '.join(sorted(self.judge.kinds))} questions, and {type(self).__name__} asks {self.plan.kind} ones"
            )

    def to_pyterrier(self) -> "Callable[[pandas.DataFrame], pandas.DataFrame]":
        """A function for ``pyterrier.apply.generic`` (see :mod:`echelon.rerank.adapters`)."""
        from echelon.rerank.adapters import DataFrameReranker

        return DataFrameReranker(self)

    def to_langchain(self, top_n: int | None = None) -> Any:
        """An object with LangChain's ``compress_documents`` (see :mod:`echelon.rerank.adapters`)."""
        from echelon.rerank.adapters import DocumentCompressor

        return DocumentCompressor(self, top_n)


def _extended(ranking: Ranking, n: int) -> Ranking:
    """A ranking of the first documents, with the others behind them: scores go on falling by 1, and whole ordinal ones end at 1."""
    done = len(ranking.order)
    if done == n:
        return ranking
    if ranking.score_kind == "ordinal":
        return ordinal((*ranking.order, *range(done, n)))
    last = math.floor(ranking.scores[-1]) if done else 0
    tail = tuple(float(last - step) for step in range(1, n - done + 1))
    return Ranking((*ranking.order, *range(done, n)), ranking.scores + tail, ranking.score_kind)
