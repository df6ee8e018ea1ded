"""Measuring texts (repetition, overlap, likelihood, how near they come to what people write) and rankings (against judgements and each other)."""

import importlib
from typing import Any

_LAZY = {
    "corpus_bleu": "text", "distinct_n": "text", "diversity": "text", "mattr": "text", "overlap_f1": "text", "rep_n": "text", "rep_w": "text",
    "self_bleu": "text", "sentence_bleu": "text", "ttr": "text", "unigram_overlap": "text", "pooled_bleu": "text", "rouge_l": "text",
    "Perplexity": "likelihood", "TokenScores": "likelihood", "coherence": "likelihood", "greedy_ratio": "likelihood",
    "mean_log_likelihood": "likelihood", "perplexity": "likelihood", "token_scores": "likelihood",
    "Mauve": "mauve", "divergence_curve": "mauve", "frontier_integral": "mauve", "mauve_from_histograms": "mauve", "mauve_score": "mauve",
    "Measured": "generation", "evaluate_generation": "generation",
    "SuffixIdentification": "suffix_identification", "baselines": "suffix_identification",
    "Measure": "ranking", "measures": "ranking", "parse_measure": "ranking", "kendall_tau": "agreement", "rbo": "agreement",
    "Paired": "significance", "corrected": "significance", "holm": "significance", "paired": "significance",
    "hyperfitting_report": "hyperfitting", "top1_agreement": "hyperfitting",
    "TOFU": "tofu", "forget_quality": "tofu", "model_utility": "tofu", "rouge_l_recall": "tofu",
}  # fmt: skip
__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"echelon.evaluate.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'echelon.evaluate' has no attribute {name!r}")
