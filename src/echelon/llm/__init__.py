"""Language models that answer prompts, here or on a server, and the prompts."""

import importlib
from typing import Any

_LAZY = {
    "Engine": "base", "Generation": "base", "Permutation": "base", "Prompt": "base", "Unanswered": "base", "LocalEngine": "local",
    "ServerEngine": "server", "resolve": "resolving", "Rendered": "templates", "Template": "templates", "load_template": "templates",
    "template_names": "templates", "Parsed": "permutation", "parse_permutation": "permutation", "ranking_text": "permutation",
    "parse_citations": "citations",
}  # fmt: skip
__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"echelon.llm.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'echelon.llm' has no attribute {name!r}")
