"""Scoring texts in their context: the protocol in which both wings meet, and its scorers."""

import importlib
from typing import Any

_LAZY = {
    "ScoreItem": "base", "Scorer": "base", "CallableScorer": "base", "as_scorer": "base", "checked_scores": "base",
    "Weighted": "combine", "Normalised": "combine", "LengthPenalised": "combine", "Cached": "combine", "Threshold": "combine",
    "ExactMatch": "combine", "Cosine": "cosine", "UnigramOverlap": "overlap", "CrossEncoderScorer": "cross_encoder", "RewardModel": "cross_encoder",
    "LogLikelihood": "likelihood", "SelfEval": "likelihood", "RankGenEncoder": "rankgen", "RankGenScorer": "rankgen", "resolve": "resolving",
}  # fmt: skip
__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"echelon.score.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'echelon.score' has no attribute {name!r}")
