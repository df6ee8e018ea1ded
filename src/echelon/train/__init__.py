"""Training: RankGen on your own corpus."""

import importlib
from typing import Any

_LAZY = {"RankGenTrainer": "rankgen", "contrastive_loss": "rankgen", "CTRTrainer": "ctr", "fit": "ctr"}
__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"echelon.train.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'echelon.train' has no attribute {name!r}")
