"""Unigram overlap: how many of a text's words already stand in its prefix."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from echelon.data.text import content_words
from echelon.registry import method
from echelon.score.base import ScoreItem, Scorer


def overlap_precision(prefix: Sequence[str], text: Sequence[str]) -> float:
    """Share of the text's words that are matched in the prefix, counted with multiplicity; 1 if both are empty, 0 if one is."""
    if not text:
        return float(not prefix)
    return (Counter(text) & Counter(prefix)).total() / len(text)


@method(
    kind="scorer", title="RankGen: Improving Text Generation with Large Ranking Models (baseline)", arxiv="2205.09726", year=2022,
    summary="Share of a text's content words that stand in its prefix.",
)  # fmt: skip
@dataclass(frozen=True)
class UnigramOverlap(Scorer):
    """Multiset precision of the text's words against the prefix's, without stop words, articles, case and punctuation."""

    score_kind = "prob"
    cost = 0.0

    def score(self, items: Sequence[ScoreItem]) -> Float[Tensor, " items"]:
        prefixes = {prefix: content_words(prefix) for prefix in {item.prefix for item in items}}
        return torch.tensor([overlap_precision(prefixes[item.prefix], content_words(item.text)) for item in items], dtype=torch.float32)
