"""Parameterisations: linear layers that are trained as something smaller than their matrix, and made dense again."""

import importlib
from typing import Any

_LAZY = {
    "LayerMethod": "base", "merge": "base", "reset_moments": "base", "Restarts": "restarts", "refactor": "restarts", "LowRank": "low_rank",
    "LoRA": "lora", "ReLoRA": "lora",
    "SLTrain": "sltrain", "SparseLowRankLinear": "sltrain", "SST": "sst", "SpectralLinear": "sst", "truncate": "sst", "LorentzLinear": "lorentz",
    "TRP": "trp", "decompose": "trp", "Maestro": "maestro", "ordered_dropout": "ordered", "set_rank_budget": "ordered", "export": "ordered",
    "reestimate_batch_norm": "batch_norm",
}  # fmt: skip
__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module 'echelon.train.layers' has no attribute {name!r}")
