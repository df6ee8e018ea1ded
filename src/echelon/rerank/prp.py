"""PRP: rank with a language model that only ever answers which of two passages is more relevant.

Source: "Large Language Models are Effective Text Rankers with Pairwise Ranking Prompting", arXiv 2306.17563.
Differs from the common implementation: answers are read from the labels' probabilities by default, in any model; `allpair` orders the whole list, ties by the
first stage; the nodes of one level of the heap are sifted in the same rounds. The paper's limits on tokens are not known; those here are ours.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from echelon.linalg.checks import one_of, whole
from echelon.llm.resolving import resolve
from echelon.registry import method
from echelon.rerank.base import Judge, Reranker, Strategy
from echelon.rerank.judges import PromptJudge, template_of
from echelon.rerank.strategies.pairwise import AllPairs, PairHeap, PairPasses


@method(
    kind="reranker", name="prp", title="Large Language Models are Effective Text Rankers with Pairwise Ranking Prompting", arxiv="2306.17563", year=2023,
    summary="Sort by pairs: a language model says which of two passages is more relevant, asked in both orders.",
    needs="a language model; without log-probabilities mode=generation",
    published="DL19, BM25 top 100, flan-t5-large, heapsort: nDCG@10 0.6571 (BM25 0.5058); Flan-UL2 20B, sliding 10: 72.65 on DL19, 70.46 on DL20 (unconfirmed)",
)  # fmt: skip
@dataclass(frozen=True)
class PRP(Reranker):
    """Pairs are shown in both orders, and one wins if both answers name it; all else is a tie.

    Ties leave the order of the first stage to `allpair` and `sliding`. A heap does not keep it: where a model cannot tell passages apart and most pairs are
    ties, `heapsort` ranks the last documents right behind the first.

    Attributes:
        strategy: `heapsort` (few prompts), `sliding` (passes from the end, one place each), or `allpair` (n (n - 1) prompts that do not wait for each other).
        top_k: places that must be exact.
        mode: read the answer from the labels' probabilities (`scoring`), or let the model write it (`generation`).
        both_orders: ask in both orders; one is half the cost, and follows the model's liking for a place.
        tie_rule: a tie is what both answers do not agree on (`consistency`), or only margins that cancel out (`margin`, ours; needs scoring).
        passes: of sliding; by default top_k.
        early_stop: begin a pass of sliding where the one before first changed something; else at the end.
        max_query_tokens: tokens kept of a query.
        max_passage_tokens: tokens kept of a passage.
        batch_size: prompts that the model is given at a time.
        prompt: name of a template for pairs, or its file.
        cache: answer a comparison that is made again from memory.
    """

    strategy: Literal["heapsort", "allpair", "sliding"] = "heapsort"
    top_k: int = 10
    mode: Literal["scoring", "generation"] = "scoring"
    both_orders: bool = True
    tie_rule: Literal["consistency", "margin"] = "consistency"
    passes: int | None = None
    early_stop: bool = True
    max_query_tokens: int = 128
    max_passage_tokens: int = 300
    batch_size: int = 32
    prompt: str = "prp"
    cache: bool = True

    def __post_init__(self) -> None:
        """Raises: ValueError: if a knob is out of range, or margins are wanted of an answer that is generated."""
        one_of("strategy", self.strategy, ("heapsort", "allpair", "sliding"))
        one_of("mode", self.mode, ("scoring", "generation"))
        one_of("tie_rule", self.tie_rule, ("consistency", "margin"))
        for name in ("top_k", "max_query_tokens", "max_passage_tokens", "batch_size", *(["passes"] if self.passes is not None else [])):
            whole(name, getattr(self, name), 1)
        if self.tie_rule == "margin" and self.mode == "generation":
            raise ValueError("tie_rule is 'margin', which needs mode 'scoring': a generated answer has no margin")

    @property
    def remembers(self) -> bool:  # type: ignore[override]
        return self.cache

    @cached_property
    def judge(self) -> Judge:
        if isinstance(self.model, Judge):
            return self.model
        return PromptJudge(
            resolve(self.model), template_of("pair", self.prompt), self.mode, max_query_tokens=self.max_query_tokens,
            max_passage_tokens=self.max_passage_tokens, chunk=self.batch_size,
        )  # fmt: skip

    @cached_property
    def plan(self) -> Strategy:
        if self.strategy == "allpair":
            return AllPairs(self.both_orders, self.tie_rule)
        if self.strategy == "sliding":
            return PairPasses(self.both_orders, self.tie_rule, self.passes or self.top_k, self.early_stop)
        return PairHeap(self.both_orders, self.tie_rule, self.top_k)
