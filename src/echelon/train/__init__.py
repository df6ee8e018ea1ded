"""Training: language models by any optimizer or parameterisation (:mod:`echelon.train.language`), RankGen, and click models."""

import importlib
from typing import Any

_LAZY = {
    "RankGenTrainer": "rankgen", "contrastive_loss": "rankgen", "CTRTrainer": "ctr", "fit_clicks": "ctr", "fit": "language", "new_model": "language",
    "Hyperfit": "hyperfit", "Training": "training", "MethodCallback": "trainer", "learning_rate": "trainer",
    "step_in_backward": "layerwise", "packed_rows": "rows", "document_rows": "rows", "held_out_loss": "rows",
}  # fmt: skip
__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"echelon.train.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'echelon.train' has no attribute {name!r}")
