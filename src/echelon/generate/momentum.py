"""Momentum decoding: greedy search that pays a graded price for walking back into what was already said.

Source: "Momentum Decoding: Open-ended Text Generation As Graph Exploration", arXiv 2212.02175. Its released code ships the
n-gram-blocking table of the ablation as the default; the default here is the paper's own resistance, f(l) = l.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor

from echelon.generate.base import Candidate, TokenDecoder
from echelon.generate.sampling import within
from echelon.generate.session import DecodeSession
from echelon.registry import method, suggest

RESISTANCES: dict[str, Callable[[int], float]] = {
    "linear": lambda overlap: float(overlap),
    "constant": lambda overlap: 2.0 if overlap else 0.0,
    "log": lambda overlap: math.log(1 + overlap, 6) / 0.2,
    "exp": lambda overlap: 1.5**overlap / 2 if overlap else 0.0,
    "ngram_block": lambda overlap: (0.0, 0.0, 0.0, 0.0, 5.0)[overlap] if overlap < 5 else math.inf,
    "chinese": lambda overlap: (0.0, 1.0, 1.0, 2.0, 3.0, 4.0)[min(overlap, 5)],
}


@method(
    kind="decoder", title="Momentum Decoding: Open-ended Text Generation As Graph Exploration", arxiv="2212.02175", year=2022,
    summary="Greedy search with a graded price on repeating earlier n-grams.",
    published="human preference over contrastive decoding 57/3/40 (win/tie/loss, wikinews, GPT2-XL)",
)  # fmt: skip
@dataclass(frozen=True)
class Momentum(TokenDecoder):
    """Among the likeliest ``momentum_top_k`` tokens take the one with the largest ``p - alpha * f(overlap)``.

    The overlap of a candidate is the length of the longest suffix of the text, candidate included, that the text already
    contains; 0 for a token not seen before. Deterministic, one forward a token.

    Attributes:
        momentum_top_k: candidates at each step, at least 1.
        momentum_alpha: scale of the resistance, at least 0; 0 is greedy.
        resistance: `linear`, `constant`, `log`, `exp`, `ngram_block` (ablation), `chinese` (the 3.5B model's table), or a list
            of values for overlaps 0, 1, 2 ...
        max_overlap: longest overlap that is told apart, at least 1.
        count_prompt: whether the prompt's tokens count as visited.

    Raises:
        ValueError: if a knob is out of range.
    """

    momentum_top_k: int = 5
    momentum_alpha: float = 0.2
    resistance: str | list[float] = "linear"
    max_overlap: int = 5
    count_prompt: bool = True

    def __post_init__(self) -> None:
        self._processor(())

    def _processor(self, prompts: Sequence[Sequence[int]]) -> "MomentumProcessor":
        return MomentumProcessor(self.momentum_top_k, self.momentum_alpha, self.resistance, self.max_overlap, unvisited=prompts)

    def decode(self, session: DecodeSession, max_new_tokens: int) -> list[list[Candidate]]:
        prompts = [] if self.count_prompt else [session.prompt_ids(row) for row in range(session.rows)]
        session.processors.append(self._processor(prompts))
        return super().decode(session, max_new_tokens)


class MomentumProcessor(LogitsProcessor):
    """Momentum decoding as the last logits processor of a greedy ``model.generate``.

    Args:
        top_k: candidates.
        alpha: scale of the resistance.
        resistance: name of a resistance function, its values for overlaps 0, 1, 2 ..., or a callable.
        max_overlap: cap on the overlap.
        pad_token_id: leading tokens with this id are ignored.
        unvisited: prompts whose tokens do not count as visited where a row begins with them.
    """

    def __init__(
        self, top_k: int = 5, alpha: float = 0.2, resistance: str | Sequence[float] | Callable[[int], float] = "linear",
        max_overlap: int = 5, pad_token_id: int | None = None, unvisited: Sequence[Sequence[int]] = (),
    ):  # fmt: skip
        within("momentum_top_k", top_k, 1, math.inf)
        within("momentum_alpha", alpha, 0, math.inf)
        within("max_overlap", max_overlap, 1, math.inf)
        if isinstance(resistance, str) and resistance not in RESISTANCES:
            raise ValueError(f"resistance is {resistance!r}{suggest(resistance, RESISTANCES)}; it must be one of {', '.join(RESISTANCES)}, or a list")
        if isinstance(resistance, str):
            f = RESISTANCES[resistance]
        elif callable(resistance):
            f = resistance
        elif len(resistance) <= max_overlap:
            raise ValueError(f"resistance lists {len(resistance)} values; max_overlap {max_overlap} needs {max_overlap + 1}")
        else:
            f = list(resistance).__getitem__
        self.top_k, self.max_overlap, self.pad_token_id = top_k, max_overlap, pad_token_id
        self.unvisited = sorted((list(prompt) for prompt in unvisited), key=len, reverse=True)
        self.penalty = [alpha * f(overlap) if alpha else 0.0 for overlap in range(max_overlap + 1)]

    def __call__(self, input_ids: Int[Tensor, "rows length"], scores: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows vocab"]:
        probabilities = scores.float().softmax(-1)
        _, candidates = scores.float().topk(min(self.top_k, scores.shape[-1]), dim=-1)
        chosen = torch.full_like(probabilities, -math.inf)
        texts = input_ids.tolist()
        for row, (text, ids) in enumerate(zip(texts, candidates.tolist(), strict=True)):
            seen = self._visited(text)
            values = [probabilities[row, token].item() - self.penalty[overlap(seen, token, self.max_overlap)] for token in ids]
            if max(values) == -math.inf:  # every candidate is blocked: the likeliest is left
                values[0] = 0.0
            best = values.index(max(values))  # the first of equals, in the order of probability
            chosen[row, ids] = torch.tensor(values, device=chosen.device, dtype=chosen.dtype)
            ties = [token for token, value in zip(ids, values, strict=True) if value == values[best] and token != ids[best]]
            if ties:
                chosen[row, ties] = -math.inf
        return chosen

    def _visited(self, text: list[int]) -> list[int]:
        if self.pad_token_id is not None:
            start = next((i for i, token in enumerate(text) if token != self.pad_token_id), len(text))
            text = text[start:]
        prompt = next((prompt for prompt in self.unvisited if text[: len(prompt)] == prompt), [])
        return text[len(prompt) :]


def overlap(text: Sequence[int], token: int, cap: int = 5) -> int:
    """Length of the longest suffix of ``text + [token]`` that stands in ``text`` already, at most ``cap``; 0 if the token is new.

    >>> overlap([1, 2, 3, 4, 1, 2, 3], 4)
    4
    """
    longest = 0
    for end, seen in enumerate(text):
        if seen != token:
            continue
        length = 1
        while length < cap and length <= end and text[end - length] == text[len(text) - length]:
            length += 1
        longest = max(longest, length)
        if longest == cap:
            break
    return longest
