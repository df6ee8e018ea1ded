"""Echelon: low-rank and ranking methods for language models, compared on your model under one budget."""

import importlib
from typing import Any

from echelon import hooks

__version__ = "0.1.0"
__all__ = ["__version__", "load", "methods"]

_LAZY = {"load": ("echelon.models", "load"), "methods": ("echelon.registry", "cards")}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        module, attribute = _LAZY[name]
        return getattr(importlib.import_module(module), attribute)
    raise AttributeError(f"module 'echelon' has no attribute {name!r}")


hooks.install()
