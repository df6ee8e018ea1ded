"""Full ranking and sliding windows: a language model writes the order of all passages, or of a window that moves from the back to the front.

Source: "Sliding Windows Are Not the End: Exploring Full Ranking with Long-Context Large Language Models", arXiv 2412.14574. With sliding windows and the prompt
`rankgpt` this is RankGPT, arXiv 2304.09542.
Differs from their code: every list of two or more is asked about, whatever its length; passages are cut by tokens, never the prompt; the model may stop.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from echelon.linalg.checks import one_of, whole
from echelon.llm.resolving import resolve
from echelon.registry import method
from echelon.rerank.base import Judge, Reranker, Strategy
from echelon.rerank.judges import PromptJudge, template_of
from echelon.rerank.strategies.listwise import Windows


@method(
    kind="reranker", name="fullrank", title="Sliding Windows Are Not the End: Exploring Full Ranking with Long-Context Large Language Models",
    arxiv="2412.14574", year=2024, summary="A language model writes the order of all passages at once, or of windows from the back (RankGPT).",
    needs="a language model whose context holds all candidates; for sliding a window of them",
    published="RankMistral100, full, BM25 top 100: nDCG@10 72.55 on DL19, 71.29 on DL20",
)  # fmt: skip
@dataclass(frozen=True)
class FullRank(Reranker):
    """One long prompt for all candidates, or windows; what the model leaves out keeps its place behind the rest.

    Attributes:
        strategy: `full`, or `sliding`, which is better unless the model was trained on full lists.
        window_size: passages of a window.
        stride: how far a window is in front of the one before.
        num_passes: how many times the windows, or the full list, are gone through.
        max_passage_tokens: tokens kept of a passage.
        prompt: `rankllm` (one turn), `rankgpt` (several), another template for lists, or its file.
        identifiers: `number` the passages, or `letter` them (26 at most).
        constrained: let the model write nothing but complete orders (local models).
        max_new_tokens: tokens that the model may write; by default those of a complete order.
    """

    strategy: Literal["full", "sliding"] = "full"
    window_size: int = 20
    stride: int = 10
    num_passes: int = 1
    max_passage_tokens: int = 100
    prompt: str = "rankllm"
    identifiers: Literal["number", "letter"] = "number"
    constrained: bool = False
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        """Raises: ValueError: if a knob is out of range."""
        one_of("strategy", self.strategy, ("full", "sliding"))
        one_of("identifiers", self.identifiers, ("number", "letter"))
        whole("window_size", self.window_size, 2)
        whole("stride", self.stride, 1, self.window_size)
        for name in ("num_passes", "max_passage_tokens", *(["max_new_tokens"] if self.max_new_tokens is not None else [])):
            whole(name, getattr(self, name), 1)
        if self.identifiers == "letter" and self.strategy == "sliding" and self.window_size > 26:
            raise ValueError(f"window_size is {self.window_size!r}; with letters it must be at most 26")

    @cached_property
    def judge(self) -> Judge:
        if isinstance(self.model, Judge):
            return self.model
        return PromptJudge(
            resolve(self.model), template_of("list", self.prompt, self.identifiers), "generation",
            max_new_tokens=self.max_new_tokens, max_passage_tokens=self.max_passage_tokens, constrained=self.constrained,
        )  # fmt: skip

    @cached_property
    def plan(self) -> Strategy:
        return Windows(self.window_size if self.strategy == "sliding" else None, self.stride, self.num_passes)
