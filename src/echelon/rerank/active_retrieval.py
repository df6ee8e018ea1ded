"""Active retrieval: the documents that an answer cites come first.

Source: "Vietnamese Legal Information Retrieval in Question-Answering System", arXiv 2409.13699, whose body could not be read: rounds, order and parsing are
our reading of its abstract and of public summaries (unconfirmed). Differs from what is told of it: documents are shuffled before they are shown, since
language models prefer certain places.
"""

import contextlib
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

from echelon.errors import UserError
from echelon.linalg.checks import whole
from echelon.llm.base import Engine, Generation
from echelon.llm.citations import parse_citations
from echelon.llm.permutation import plain_characters, without_thought
from echelon.llm.resolving import resolve
from echelon.llm.templates import Rendered, Template, load_template
from echelon.registry import method
from echelon.rerank.base import Asked, Asking, Judge, OutOfBudget, Request, Reranker, RerankResult, Strategy, ordinal
from echelon.rerank.judges import PromptJudge
from echelon.rerank.questions import Answer, Question, Ranking

OrderBy = Literal["first", "count", "score"]


class CitationJudge(PromptJudge):
    """Has a language model answer from numbered documents, and reads which ones it cites.

    It answers lists. Its order holds the cited documents alone, by first citation, and its scores tell how often each document was cited; the status is
    ``partial`` where the model says that the documents do not hold the answer, and ``unparseable`` where it cites none of them.

    Args:
        engine: the model.
        template: the prompt, of the kind ``cite``.
        max_new_tokens: length of the answer, at most.
        max_passage_tokens: tokens kept of a document, in place of the template's own.
    """

    def __init__(self, engine: Engine, template: Template, max_new_tokens: int, max_passage_tokens: int | None = None):
        super().__init__(engine, template, "generation", max_new_tokens=max_new_tokens, max_passage_tokens=max_passage_tokens, chunk=16)
        self.kinds = frozenset(("list",))

    def _read(self, question: Question, prompt: Rendered, written: Generation) -> Answer:
        n = len(question.docs)
        order, status = self.template.parse(written.text, n)
        counts = Counter(_citations(written.text, n))
        scores = tuple(float(counts[place]) for place in range(n))
        return Answer(order, scores, status, written.text, 1, self.engine.prompt_tokens(prompt), written.tokens)


@dataclass(frozen=True)
class CitedFirst(Strategy):
    """Asks for an answer from the first documents; from the next ones where it cites nothing or says that something is missing.

    Attributes:
        top_m: documents of a round.
        max_rounds: rounds, at most.
        order_by: how cited documents are ordered.
        shuffle: whether the documents of a round are shown in random order.
        seed: of that order, which depends on the query's text too.
    """

    top_m: int = 10
    max_rounds: int = 2
    order_by: OrderBy = "first"
    shuffle: bool = True
    seed: int = 0

    kind = "list"

    def ask(self, request: Request) -> Asking:
        n, cited = len(request.candidates), dict[int, float]()  # in the order of their first citation, with how often
        with contextlib.suppress(OutOfBudget):
            for number in range(self.max_rounds):
                shown = list(range(n))[number * self.top_m : (number + 1) * self.top_m]
                if not shown:
                    break
                if self.shuffle:
                    random.Random(f"{self.seed} {number} {request.query}").shuffle(shown)
                (answer,) = yield Asked("list", request, [tuple(shown)])
                cited |= {shown[place]: answer.scores[place] if answer.scores else 1.0 for place in answer.order}
                if answer.order and answer.status in ("complete", "repaired"):
                    break
        return ordinal([*self._ordered(cited), *(place for place in range(n) if place not in cited)])

    def _ordered(self, cited: dict[int, float]) -> list[int]:
        if self.order_by == "first":
            return list(cited)
        return sorted(cited) if self.order_by == "score" else sorted(cited, key=lambda place: -cited[place])


@method(
    kind="reranker", title="Vietnamese Legal Information Retrieval in Question-Answering System", arxiv="2409.13699", year=2024,
    summary="A language model answers and cites; what it cites comes first.", needs="a language model that can answer questions and cite",
)  # fmt: skip
@dataclass(frozen=True)
class ActiveRetrieval(Reranker):
    """Re-ranks by what the answering model used: one prompt for `active_top_m` documents, in place of a forward pass for each.

    Where nothing usable is cited, or the model says that evidence is missing, the next documents are asked about. What is cited comes first, all else follows
    in its old order; with no citations at all nothing changes. Citations of documents that do not exist, and repeated ones, are ignored.

    Attributes:
        active_top_m: documents of a round.
        max_rounds: rounds, at most.
        order_cited_by: order of cited documents: by `first` citation, by `count` of citations, or by `score`, as they came.
        only_cited: leave out what is not cited, for queries with a citation.
        shuffle: show the documents of a round in random order.
        seed: of that order.
        prompt: name of a template of the kind cite, or its file; `active_retrieval_tags` has the model name documents without answering.
        max_new_tokens: length of the answer, at most.
        max_passage_tokens: tokens kept of a document, in place of the template's own number.
    """

    active_top_m: int = 10
    max_rounds: int = 2
    order_cited_by: OrderBy = "first"
    only_cited: bool = False
    shuffle: bool = True
    seed: int = 0
    prompt: str = "active_retrieval"
    max_new_tokens: int = 256
    max_passage_tokens: int | None = None

    def __post_init__(self) -> None:
        """Raises: ValueError: if a knob is out of range."""
        for name in ("active_top_m", "max_rounds", "max_new_tokens"):
            whole(name, getattr(self, name), 1)
        if self.max_passage_tokens is not None:
            whole("max_passage_tokens", self.max_passage_tokens, 1)
        if self.order_cited_by not in get_args(OrderBy):
            raise ValueError(f"order_cited_by is {self.order_cited_by!r}; it must be one of {', '.join(get_args(OrderBy))}")

    @cached_property
    def judge(self) -> Judge:
        if isinstance(self.model, Judge):
            return self.model
        template = load_template(self.prompt)
        if template.kind != "cite":
            raise UserError(f"prompt is {self.prompt!r}, a template for {template.kind} questions; active_retrieval needs one of the kind cite")
        return CitationJudge(resolve(self.model), template, self.max_new_tokens, self.max_passage_tokens)

    @cached_property
    def plan(self) -> Strategy:
        return CitedFirst(self.active_top_m, self.max_rounds, self.order_cited_by, self.shuffle, self.seed)

    def rerank(self, requests: Sequence[Request], *, top_k: int | None = None, trace: bool = False, **settings: Any) -> RerankResult:
        if not self.only_cited:
            return super().rerank(requests, top_k=top_k, trace=trace, **settings)
        made = super().rerank(requests, trace=True, **settings)
        cited: dict[str, set[str]] = {}
        for judgement in made.trace:
            question = judgement.question
            cited.setdefault(question.qid, set()).update(question.docs[place].id for place in judgement.answer.order)
        runs, rankings = {}, {}
        for qid, ranking in made.rankings.items():
            keep = min(len(cited.get(qid, ())) or len(ranking.order), top_k or len(ranking.order))
            rankings[qid] = Ranking(ranking.order[:keep], ranking.scores[:keep], ranking.score_kind)
            runs[qid] = dict(list(made.runs[qid].items())[:keep])
        return replace(made, runs=runs, rankings=rankings, trace=made.trace if trace else [])


def _citations(text: str, n: int) -> list[int]:
    """Places of cited documents, once for each pair of brackets that they stand in."""
    answer = plain_characters(without_thought(text) or "")
    return [place for marked in re.split(r"(?<=[\])])", answer) for place in parse_citations(marked, n).order]
