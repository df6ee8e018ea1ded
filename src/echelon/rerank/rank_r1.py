"""Rank-R1 and setwise ranking: the best of a set, chosen after written reasoning, without it, or by the labels' probabilities.

Source: "Rank-R1: Enhancing Reasoning in LLM-based Document Rerankers via Reinforcement Learning", arXiv 2503.06034; without reasoning this is setwise ranking,
arXiv 2310.09497.
Differs from their code: documents are shuffled by a seed and the question, so that a question has one order; what cannot be read is counted, and as there the
parent stays; likelihoods are the mean over each order and its reverse.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from echelon.linalg.checks import one_of, whole
from echelon.llm.resolving import resolve
from echelon.registry import method
from echelon.rerank.base import Judge, Reranker, Strategy
from echelon.rerank.judges import PromptJudge, template_of
from echelon.rerank.strategies.setwise import SetHeap, SetPasses


@method(
    kind="reranker", name="rank_r1", title="Rank-R1: Enhancing Reasoning in LLM-based Document Rerankers via Reinforcement Learning", arxiv="2503.06034",
    year=2025, summary="Sort by sets of up to 20: a language model reasons and names the most relevant one.",
    needs="a language model with room for 20 passages and its reasoning; without reasoning any (setwise ranking)",
    published="setwise heapsort (c = 2), flan-t5-large, DL19: nDCG@10 0.6697",
)  # fmt: skip
@dataclass(frozen=True)
class RankR1(Reranker):
    """A heap of many children a node, the best of which is asked for at each step; the explanations are in the trace.

    Attributes:
        num_child: children of a node; a set is one more.
        top_k: places that must be exact.
        strategy: `heapsort`, or `bubblesort` (passes of overlapping sets).
        reasoning: have the model reason before it answers.
        num_permutation: orders in which each set is shown, of which the majority wins; odd.
        shuffle: show a set in an order drawn from the seed.
        max_new_tokens: tokens that the model may write.
        max_query_tokens: tokens kept of a query.
        max_passage_tokens: tokens kept of a passage.
        scoring: read what is written (`generation`), or the labels' probabilities (`likelihood`, without reasoning), over each order and its reverse.
        prompt: name of a template for sets, or its file; by default rank_r1_v0.1, or rank_r1_direct without reasoning.
        seed: of the orders.
    """

    num_child: int = 19
    top_k: int = 10
    strategy: Literal["heapsort", "bubblesort"] = "heapsort"
    reasoning: bool = True
    num_permutation: int = 1
    shuffle: bool = True
    max_new_tokens: int = 2048
    max_query_tokens: int = 32
    max_passage_tokens: int = 512
    scoring: Literal["generation", "likelihood"] = "generation"
    prompt: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises: ValueError: if a knob is out of range, or likelihoods are wanted of an answer behind reasoning."""
        one_of("strategy", self.strategy, ("heapsort", "bubblesort"))
        one_of("scoring", self.scoring, ("generation", "likelihood"))
        whole("num_child", self.num_child, 1, 19)  # labels go up to 20
        for name in ("top_k", "num_permutation", "max_new_tokens", "max_query_tokens", "max_passage_tokens"):
            whole(name, getattr(self, name), 1)
        if self.num_permutation % 2 == 0:
            raise ValueError(f"num_permutation is {self.num_permutation!r}; it must be odd, so that there is a majority")
        if self.reasoning and self.scoring == "likelihood":
            raise ValueError("scoring is 'likelihood', which needs reasoning set to false: a label behind reasoning has no probability before it")

    @cached_property
    def judge(self) -> Judge:
        if isinstance(self.model, Judge):
            return self.model
        template = template_of("set", self.prompt or ("rank_r1_v0.1" if self.reasoning else "rank_r1_direct"))
        return PromptJudge(
            resolve(self.model), template, "scoring" if self.scoring == "likelihood" else "generation", max_new_tokens=self.max_new_tokens,
            max_query_tokens=self.max_query_tokens, max_passage_tokens=self.max_passage_tokens,
        )  # fmt: skip

    @cached_property
    def plan(self) -> Strategy:
        kind = SetHeap if self.strategy == "heapsort" else SetPasses
        return kind(self.num_child, self.top_k, self.num_permutation, self.shuffle, self.scoring == "likelihood", self.seed)
