"""One pass over data: what the inputs of a model's layers look like, layer by layer."""

import importlib
from typing import Any

_LAZY = {
    "Moments": "moments", "Statistics": "statistics", "collect": "statistics", "InputObserver": "observing",
    "GradientCollector": "gradients", "Gradients": "gradients", "collect_gradients": "gradients",
    "Calibration": "tokens", "calibration_batches": "tokens", "Block": "walker", "LayerWalker": "walker", "StoredStates": "stored",
}  # fmt: skip
__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"echelon.calibrate.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'echelon.calibrate' has no attribute {name!r}")
