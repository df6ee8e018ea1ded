"""Scorers made of scorers."""

import math
from collections.abc import Callable, Hashable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from echelon.score.base import ScoreItem, Scorer, checked_scores


class _Wrapped(Scorer):
    """One inner scorer whose traits show through."""

    def __init__(self, inner: Scorer):
        self.inner = inner
        self.partial = inner.partial  # type: ignore[misc]
        self.needs_session = inner.needs_session  # type: ignore[misc]
        self.score_kind = inner.score_kind  # type: ignore[misc]
        self.deterministic = inner.deterministic  # type: ignore[misc]

    def attach(self, session) -> None:
        self.inner.attach(session)


class Weighted(Scorer):
    """Weighted sum of scorers.

    Args:
        parts: pairs of scorer and weight.

    Raises:
        ValueError: if there are no parts, or a weight is not finite.
    """

    def __init__(self, parts: Sequence[tuple[Scorer, float]]):
        if not parts:
            raise ValueError("parts is empty; give pairs of scorer and weight")
        for _, weight in parts:
            if not math.isfinite(weight):
                raise ValueError(f"weight is {weight!r}; it must be finite")
        self.parts = list(parts)
        self.partial = all(scorer.partial for scorer, _ in parts)  # type: ignore[misc]
        self.needs_session = any(scorer.needs_session for scorer, _ in parts)  # type: ignore[misc]
        self.deterministic = all(scorer.deterministic for scorer, _ in parts)  # type: ignore[misc]

    def attach(self, session) -> None:
        for scorer, _ in self.parts:
            scorer.attach(session)

    def score(self, items: Sequence[ScoreItem]) -> Float[Tensor, " items"]:
        return sum((weight * checked_scores(scorer, items) for scorer, weight in self.parts), torch.zeros(len(items)))


class Normalised(_Wrapped):
    """z-scores within each contest, so that scorers of different scale can be added; all 0 where all scores are equal."""

    def score(self, items: Sequence[ScoreItem]) -> Float[Tensor, " items"]:
        raw = checked_scores(self.inner, items).double()
        contests: dict[Hashable, list[int]] = {}
        for place, item in enumerate(items):
            contests.setdefault(item.contest, []).append(place)
        made = torch.zeros(len(items))
        for places in contests.values():
            values = raw[places]
            spread = values.std(correction=0)
            if spread > 1e-12 * values.abs().amax():
                made[places] = ((values - values.mean()) / spread).float()
        return made


class LengthPenalised(_Wrapped):
    """The score divided by (number of words)^exponent.

    Args:
        inner: a scorer of sums (such as a summed log-likelihood).
        exponent: 0 changes nothing, 1 gives the mean.
    """

    def __init__(self, inner: Scorer, exponent: float = 1.0):
        super().__init__(inner)
        if not 0 <= exponent < math.inf:
            raise ValueError(f"exponent is {exponent!r}; it must be in [0, inf)")
        self.exponent = exponent

    def score(self, items: Sequence[ScoreItem]) -> Float[Tensor, " items"]:
        words = torch.tensor([max(1, len(item.text.split())) for item in items], dtype=torch.float32)
        return checked_scores(self.inner, items) / words**self.exponent


class Cached(_Wrapped):
    """Judges each (prefix, text) once and remembers its score, for deterministic scorers that judge each text by itself."""

    def __init__(self, inner: Scorer):
        super().__init__(inner)
        if not inner.deterministic:
            raise ValueError(f"{type(inner).__name__} is not deterministic; remembering its scores would change them")
        self._known: dict[tuple[str, str, bool], float] = {}

    def score(self, items: Sequence[ScoreItem]) -> Float[Tensor, " items"]:
        new = {_key(item): item for item in items if _key(item) not in self._known}
        if new:
            self._known |= dict(zip(new, checked_scores(self.inner, list(new.values())).tolist(), strict=True))
        return torch.tensor([self._known[_key(item)] for item in items], dtype=torch.float32)


class Threshold(_Wrapped):
    """1 where the score reaches ``least``, else 0: a verifier made of a scorer.

    Args:
        inner: the scorer.
        least: the lowest score that passes.
    """

    def __init__(self, inner: Scorer, least: float):
        super().__init__(inner)
        if math.isnan(least):
            raise ValueError("least is nan; it must be a number")
        self.least = least
        self.score_kind = "prob"  # type: ignore[misc]

    def score(self, items: Sequence[ScoreItem]) -> Float[Tensor, " items"]:
        return (checked_scores(self.inner, items) >= self.least).float()


def _key(item: ScoreItem) -> tuple[str, str, bool]:
    return item.prefix, item.text, item.finished


class ExactMatch(Scorer):
    """1 for a text that equals its prefix's answer after both are cleaned, else 0.

    Args:
        answers: the answer to each prefix.
        clean: applied to text and answer first; by default surrounding space is removed.
    """

    partial = False
    score_kind = "prob"
    cost = 0.0

    def __init__(self, answers: dict[str, str], clean: Callable[[str], str] = str.strip):
        self.answers, self.clean = answers, clean

    def score(self, items: Sequence[ScoreItem]) -> Float[Tensor, " items"]:
        for item in items:
            if item.prefix not in self.answers:
                raise ValueError(f"no answer is known for {item.prefix[:60]!r}")
        return torch.tensor([float(self.clean(item.text) == self.clean(self.answers[item.prefix])) for item in items])
