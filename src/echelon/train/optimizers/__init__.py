"""Optimizers whose state is small: each one a dataclass of knobs and a rule for one parameter."""

import importlib
from typing import Any

_LAZY = {
    "OptimizerMethod": "base", "ProjectedMethod": "base", "Stepper": "base", "AdamW": "adamw", "Adafactor": "adafactor", "GaLore": "galore",
    "DCTAdamW": "dct_adamw", "Trion": "trion", "Fira": "fira", "NormGrowthLimiter": "limiter", "GradNormLoRP": "gradnormlorp",
}  # fmt: skip
__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module 'echelon.train.optimizers' has no attribute {name!r}")
