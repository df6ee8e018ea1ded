"""Knockout: groups are ordered by a language model, and the better half of each goes on until one group is left.

Ours, after the tournaments that others have run over listwise prompts; it asks about as much as sliding windows, but in a few rounds of questions that do not
wait for each other.
"""

from dataclasses import dataclass
from functools import cached_property

from echelon.linalg.checks import whole
from echelon.llm.resolving import resolve
from echelon.registry import method
from echelon.rerank.base import Judge, Reranker, Strategy
from echelon.rerank.judges import PromptJudge, template_of
from echelon.rerank.strategies import listwise


@method(
    kind="reranker", name="knockout", title="Knockout over listwise prompts (ours)", year=2025,
    summary="Groups ordered by a language model, the better half of each going on: few rounds, and all groups of one at once.",
    needs="a language model whose context holds a group of passages",
)  # fmt: skip
@dataclass(frozen=True)
class Knockout(Reranker):
    """As many groups as it takes, of nearly equal size; the first half of a group's size in places is exact for a judge that does not contradict itself.

    Attributes:
        window_size: passages of a group at most.
        max_passage_tokens: tokens kept of a passage.
        prompt: name of a template for lists, or its file.
        constrained: let the model write nothing but complete orders (local models).
    """

    window_size: int = 20
    max_passage_tokens: int = 100
    prompt: str = "rankllm"
    constrained: bool = False

    def __post_init__(self) -> None:
        """Raises: ValueError: if a knob is out of range."""
        whole("window_size", self.window_size, 2)
        whole("max_passage_tokens", self.max_passage_tokens, 1)

    @cached_property
    def judge(self) -> Judge:
        if isinstance(self.model, Judge):
            return self.model
        return PromptJudge(
            resolve(self.model), template_of("list", self.prompt), "generation", max_passage_tokens=self.max_passage_tokens, constrained=self.constrained
        )  # fmt: skip

    @cached_property
    def plan(self) -> Strategy:
        return listwise.Knockout(self.window_size)
