"""The bake-off: a recipe becomes runs, runs become results, results become a table, plots, a report and a recommendation."""

import importlib
from typing import Any

_LAZY = {
    "Recipe": "recipe", "load_recipe": "recipe", "compare": "runner", "read_results": "results",
    "Summary": "summary", "summarise": "statistics", "recommend": "recommendation", "write_report": "report",
}  # fmt: skip
__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"echelon.compare.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'echelon.compare' has no attribute {name!r}")
