"""Training language models to rank: listwise with the importance-aware loss, setwise on given answers, and setwise by reward (GRPO)."""

import importlib
from typing import Any

_LAZY = {
    "AnswerTrainer": "answers", "answer_row": "answers", "fit_answers": "answers", "training_text": "answers", "weighted_loss": "answers",
    "LabelledList": "listwise", "importance_weights": "listwise", "label_lists": "listwise", "listwise_rows": "listwise", "train_listwise": "listwise",
    "GRPO": "grpo", "group_advantages": "policy", "grpo_loss": "policy", "token_log_probs": "policy",
    "SetwiseExample": "rank_r1", "answer_reward": "rank_r1", "reasoning_rows": "rank_r1", "setwise_examples": "rank_r1", "train_rank_r1": "rank_r1",
    "train_setwise": "rank_r1",
}  # fmt: skip
__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"echelon.rerank.training.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'echelon.rerank.training' has no attribute {name!r}")
