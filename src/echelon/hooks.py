"""Tells transformers about compressed models as soon as it is imported, without importing it."""

import importlib
import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import Any

_WATCHED = "transformers.quantizers.auto"
_RELOAD = "echelon.models.reload"


class _AfterImport(importlib.abc.MetaPathFinder):
    """Imports the reloading code right behind the module where quantizers are registered."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != _WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_then_register(module: ModuleType) -> None:
                execute(module)
                importlib.import_module(_RELOAD)

            spec.loader.exec_module = execute_then_register  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Register at once if transformers is there, otherwise when it comes; a second call does nothing."""
    if _WATCHED in sys.modules:
        importlib.import_module(_RELOAD)
    elif not any(type(finder).__name__ == "_AfterImport" for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
