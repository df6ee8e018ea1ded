"""The scorer protocol: whatever ranks texts for a context ranks through it, and whatever searches, searches through it."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class ScoreItem:
    """A text to be judged in its context.

    Attributes:
        prefix: the context (a prompt, a query).
        text: what is judged (a continuation, a document), without the prefix.
        token_ids: its tokens, where the consumer has them.
        finished: whether the text is complete.
        row: its row in a decoding session, for scorers that look ahead in one.
        group: items of one group compete with each other; the prefix when None.
    """

    prefix: str
    text: str
    token_ids: tuple[int, ...] = ()
    finished: bool = True
    row: int | None = None
    group: Hashable = None

    @property
    def contest(self) -> Hashable:
        return self.prefix if self.group is None else self.group


class Scorer(ABC):
    """Judges texts in their context; a higher score is always better.

    Attributes:
        partial: whether it may judge unfinished text.
        needs_session: whether it must be given a decoding session by :meth:`attach` before it scores.
        score_kind: what its numbers are: ``logit``, ``prob``, ``loglik`` or ``rank``.
        deterministic: whether the same items always get the same scores.
        cost: rough cost of one item in forward passes of a small encoder, for forecasts.
    """

    partial: ClassVar[bool] = True
    needs_session: ClassVar[bool] = False
    score_kind: ClassVar[Literal["logit", "prob", "loglik", "rank"]] = "logit"
    deterministic: ClassVar[bool] = True
    cost: ClassVar[float] = 1.0

    @abstractmethod
    def score(self, items: Sequence[ScoreItem]) -> Float[Tensor, " items"]:
        """One float32 score for each item, in their order; an empty tensor for none."""

    def attach(self, session: Any) -> None:  # noqa: B027 (most scorers have no use for it)
        """Take note of the session that the items' rows belong to."""


class CallableScorer(Scorer):
    """A function ``(prefix, texts) -> numbers`` as a scorer; it is called once for each contest."""

    def __init__(self, function: Callable[[str, list[str]], Sequence[float]]):
        self.function = function

    def score(self, items: Sequence[ScoreItem]) -> Float[Tensor, " items"]:
        made = torch.zeros(len(items))
        for prefix, index in by_prefix(items).items():
            values = torch.as_tensor(self.function(prefix, [items[i].text for i in index]), dtype=torch.float32)
            if values.shape != (len(index),):
                raise ValueError(f"the scoring function gave {tuple(values.shape)} for {len(index)} texts; it must give one number each")
            made[index] = values
        return made


def by_prefix(items: Sequence[ScoreItem]) -> dict[str, list[int]]:
    """Places of the items of each prefix, in order of appearance."""
    places: dict[str, list[int]] = {}
    for place, item in enumerate(items):
        places.setdefault(item.prefix, []).append(place)
    return places


def as_scorer(judge: Any) -> Scorer:
    """A scorer from a scorer, a sentence-transformers ``CrossEncoder`` or a function ``(prefix, texts) -> numbers``.

    Raises:
        ValueError: if it is none of these.
    """
    if isinstance(judge, Scorer):
        return judge
    if hasattr(judge, "predict") and hasattr(judge, "rank"):
        from echelon.score.cross_encoder import CrossEncoderScorer

        return CrossEncoderScorer(judge)
    if callable(judge):
        return CallableScorer(judge)
    raise ValueError(f"{type(judge).__name__} is no scorer; give a Scorer, a CrossEncoder or a function (prefix, texts) -> numbers")


def checked_scores(scorer: Scorer, items: Sequence[ScoreItem], *, allow_invalid: bool = False) -> Float[Tensor, " items"]:
    """A scorer's scores, refused when they could not be ranked.

    Raises:
        ValueError: if their number is wrong, or one is NaN or minus infinity (``allow_invalid`` lets these pass, as minus
            infinity), or an item is unfinished and the scorer judges whole texts only.
    """
    if not scorer.partial and any(not item.finished for item in items):
        raise ValueError(f"{type(scorer).__name__} judges finished texts only; use it to rerank, not inside a search")
    scores = scorer.score(items)
    if scores.shape != (len(items),):
        raise ValueError(f"{type(scorer).__name__} gave scores of shape {tuple(scores.shape)} for {len(items)} texts")
    scores = scores.float().cpu()
    bad = scores.isnan() | (scores == -math.inf)
    if bad.any() and not allow_invalid:
        place = int(bad.nonzero()[0])
        raise ValueError(f"{type(scorer).__name__} gave {scores[place].item()} for {items[place].text[:60]!r}; scores must be numbers")
    return scores.masked_fill(bad, -math.inf)
