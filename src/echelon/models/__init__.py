"""Loading models, the ones that ship with the package, and the roles of the parts inside them."""

import importlib
from typing import Any

_LAZY = {
    "LoadedModel": "loading", "load": "loading", "embedded_dir": "loading",
    "embedded_encoder_dir": "loading", "load_encoder": "loading",
    "Roles": "families", "roles": "families", "layers": "families",
}  # fmt: skip
__all__ = ["LoadedModel", "Roles", "embedded_dir", "layers", "load", "roles"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"echelon.models.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'echelon.models' has no attribute {name!r}")
