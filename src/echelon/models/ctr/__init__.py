"""Models that predict clicks (DeepFM, DCN, xDeepFM, AutoInt, NFM, FiBiNET), which transformers has none of, in its own form."""

import importlib
from typing import Any

_LAZY = {
    "CTRConfig": "config", "FieldEmbedding": "embedding", "look_up": "embedding",
    "ARCHITECTURES": "architectures", "CTRModel": "architectures", "DeepFM": "architectures", "DCN": "architectures", "XDeepFM": "architectures",
    "AutoInt": "architectures", "NFM": "architectures", "FiBiNET": "architectures",
    "click_metrics": "use", "load_ctr": "use", "new_ctr": "use", "predict": "use",
}  # fmt: skip
__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"echelon.models.ctr.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'echelon.models.ctr' has no attribute {name!r}")
