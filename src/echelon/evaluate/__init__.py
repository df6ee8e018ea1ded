"""Metrics and benchmarks. All fractions are plain fractions; printing multiplies by 100."""

import importlib
from typing import Any

_LAZY = {
    "Mauve": "mauve", "mauve": "mauve", "features": "mauve",
    "Measured": "generation", "evaluate_generation": "generation",
    "TokenScores": "likelihood", "token_scores": "likelihood", "perplexity": "likelihood",
    "SuffixIdentification": "suffix_identification",
    "repetition": "text", "diversity": "text", "repetition_within": "text", "unigram_overlap": "text", "distinct": "text",
    "type_token_ratio": "text", "self_bleu": "text", "corpus_bleu": "text", "sentence_bleu": "text",
}  # fmt: skip
__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"echelon.evaluate.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'echelon.evaluate' has no attribute {name!r}")
