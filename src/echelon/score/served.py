"""Cross-encoders that a server serves: vLLM, llama.cpp, text-embeddings-inference behind a proxy, Jina, Cohere, or another with their interface."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from echelon.linalg.checks import one_of, whole
from echelon.llm.base import Unanswered
from echelon.llm.endpoint import Endpoint, Nonsense
from echelon.score.base import ScoreItem, Scorer, by_prefix

KNOWN = ("how many planets orbit the sun", "Eight planets orbit the sun.", "Beat two eggs and a pinch of salt.")


@dataclass(eq=False)
class ServedScorer(Endpoint, Scorer):
    """Scores from a server's ``/rerank`` or ``/score``.

    Servers have been known to load a reranker as something that it is not, and to give it any numbers. So a question with a plain answer is asked first, and
    there is a warning if the answer is not it.

    Attributes:
        path: `rerank` (query and documents, as Jina, Cohere, vLLM and llama.cpp have it) or `score` (two texts, as vLLM has it).
        batch_size: texts of a request.

    Raises:
        UserError: if a knob is out of range.
    """

    path: Literal["rerank", "score"] = "rerank"
    batch_size: int = 32

    score_kind = "prob"  # type: ignore[misc]
    cost = 4.0  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("path", self.path, ("rerank", "score"))
        whole("batch_size", self.batch_size, 1)

    @property
    def identity(self) -> str:
        return f"{self.path} {self.name}{self.beside}"

    def score(self, items: Sequence[ScoreItem]) -> Float[Tensor, " items"]:
        """One number an item.

        Raises:
            Unanswered: if a request fails for good, with the scores that are known.
        """
        if items:
            self._checked  # noqa: B018 (asks once)
        parts = [places[start : start + self.batch_size] for places in by_prefix(items).values() for start in range(0, len(places), self.batch_size)]
        try:
            found = dict(enumerate(self._scored([(items[places[0]].prefix, [items[i].text for i in places]) for places in parts])))
        except Unanswered as error:
            told = {place: score for part, scores in error.answered.items() for place, score in zip(parts[part], scores, strict=True)}
            raise Unanswered(str(error), told) from error
        made = torch.zeros(len(items))
        for part, scores in found.items():
            made[parts[part]] = torch.tensor(scores)
        return made

    def _scored(self, asked: Sequence[tuple[str, list[str]]]) -> list[list[float]]:
        names = ("query", "documents") if self.path == "rerank" else ("text_1", "text_2")
        return self.ask(self.path, [dict(zip(names, both, strict=True)) for both in asked], [_reader(len(texts)) for _, texts in asked])

    @cached_property
    def _checked(self) -> bool:
        query, right, wrong = KNOWN
        [[good, bad]] = self._scored([(query, [right, wrong])])
        if not good > bad:
            told = f"{self.identity} gives {right!r} {good:.3g} and {wrong!r} {bad:.3g} for {query!r}"
            warnings.warn(f"{told}; is it a reranker, and served as one?", stacklevel=4)
        return good > bad


def _reader(count: int) -> Callable[[Any], list[float]]:
    """Reads an answer with a number for each of ``count`` texts, in any order."""

    def read(answer: Any) -> list[float]:
        found = answer if isinstance(answer, list) else answer["results"] if "results" in answer else answer["data"]
        scores = {one["index"]: float(one["relevance_score"] if "relevance_score" in one else one["score"]) for one in found}
        if sorted(scores) != list(range(count)) or len(found) != count or not all(map(math.isfinite, scores.values())):
            raise Nonsense(f"scores of {sorted(scores)} for {count} texts")
        return [scores[place] for place in range(count)]

    return read
