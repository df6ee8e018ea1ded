"""Pointwise ranking by a language model: how likely it says yes, or how likely the query is for the passage.

Sources: the yes/no question as in "Holistic Evaluation of Language Models", arXiv 2211.09110, here as the log-odds of the two answers; query likelihood as in
"Improving Passage Retrieval with Zero-Shot Question Generation", arXiv 2204.07496, here for any language model, as the mean log-probability of a query's token.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from echelon.linalg.checks import one_of, whole
from echelon.llm.resolving import resolve
from echelon.registry import method
from echelon.rerank.base import Judge, Reranker, Strategy
from echelon.rerank.judges import PromptJudge, template_of
from echelon.rerank.strategies.pointwise import Points


@method(
    kind="reranker", name="pointwise", title="Improving Passage Retrieval with Zero-Shot Question Generation (UPR), and yes/no likelihood", arxiv="2204.07496",
    year=2022, summary="Score each passage by itself: log-odds of a yes, or the likelihood of the query behind the passage.",
    needs="a language model with log-probabilities; for query likelihood one on this machine",
)  # fmt: skip
@dataclass(frozen=True)
class Pointwise(Reranker):
    """One prompt a passage, none of which waits for another; the scores of queries can be compared with each other as far as the model is calibrated.

    Attributes:
        scoring: `yes_no`, or `query_likelihood`.
        prompt: name of a template for points, or its file; by default yes_no or query_likelihood.
        max_query_tokens: tokens kept of a query.
        max_passage_tokens: tokens kept of a passage.
    """

    scoring: Literal["yes_no", "query_likelihood"] = "yes_no"
    prompt: str | None = None
    max_query_tokens: int = 128
    max_passage_tokens: int = 300

    def __post_init__(self) -> None:
        """Raises: ValueError: if a knob is out of range."""
        one_of("scoring", self.scoring, ("yes_no", "query_likelihood"))
        whole("max_query_tokens", self.max_query_tokens, 1)
        whole("max_passage_tokens", self.max_passage_tokens, 1)

    @cached_property
    def judge(self) -> Judge:
        if isinstance(self.model, Judge):
            return self.model
        return PromptJudge(
            resolve(self.model), template_of("point", self.prompt or self.scoring), "scoring", max_query_tokens=self.max_query_tokens,
            max_passage_tokens=self.max_passage_tokens,
        )  # fmt: skip

    @cached_property
    def plan(self) -> Strategy:
        return Points("logit")
