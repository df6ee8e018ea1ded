"""Ordering documents anew: judges answer questions, strategies ask them, one executor runs them for all queries."""

import importlib
from typing import Any

_LAZY = {
    "ActiveRetrieval": "active_retrieval", "Answer": "questions", "Asked": "base", "Asking": "base", "Budget": "costs", "Cache": "cache", "Candidate": "base",
    "CrossEncoder": "cross_encoder", "Forecast": "costs", "FullRank": "fullrank", "ICR": "icr", "Judge": "base", "Knockout": "knockout", "Oracle": "oracle",
    "OutOfBudget": "base", "PRP": "prp", "Pointwise": "pointwise", "PromptJudge": "judges", "Question": "questions", "RankR1": "rank_r1",
    "Ranking": "questions", "Request": "base", "RerankResult": "base", "Reranker": "base", "ScorerJudge": "judges", "Stats": "costs", "Strategy": "base",
    "execute": "executor", "ordinal": "base", "requests_of": "base",
}  # fmt: skip
__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"echelon.rerank.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'echelon.rerank' has no attribute {name!r}")
