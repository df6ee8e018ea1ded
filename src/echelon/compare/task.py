"""What a kind of method must say so that the runner can compare its members; one file a kind in ``tasks/``."""

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from echelon.errors import UserError
from echelon.registry import suggest


@dataclass(frozen=True)
class Quality:
    """A metric's value; its direction (None: neither is better); its value for every unit, where it has one."""

    value: float
    unit: str = ""
    higher_is_better: bool | None = True
    per_unit: np.ndarray | None = None
    note: str = ""


@dataclass(frozen=True)
class Outcome:
    """What one run measured.

    Attributes:
        quality: metrics by name.
        cost: figures by name, lower is better.
        budget: ``unit``, ``allowed`` and ``used``.
        samples: objects with ``unit``, ``prompt``, ``reference`` and ``text``, the same units for all methods.
        curves: named lists of [x, y] points.
        tuning: ``chosen`` knobs, what was ``tried``, and what that took; empty where nothing was.
        notes: sentences to be read beside the row.
    """

    quality: dict[str, Quality]
    cost: dict[str, float]
    budget: dict[str, Any]
    samples: list[dict[str, str]] = field(default_factory=list)
    curves: dict[str, list[list[float]]] = field(default_factory=dict)
    tuning: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Task(Protocol):
    """One kind of comparison.

    Attributes:
        kind: registry kind of the methods.
        unit: what is paired in the statistics, as one word.
        cost_axis: name of the cost on the plot.
        primary: metric that the recommendation is about when the recipe names none.
        reference: method that is shown beside the others and never recommended; empty for none.

    A task whose methods may be tuned has ``sweeps = True``; one with costs worth a column beside those per unit names them in ``columns``; one that keeps work
    from run to run has a ``folder``, which is set to a place beside the results before ``prepare``.
    """

    kind: str
    unit: str
    cost_axis: str
    primary: str
    reference: str

    def check(self, recipe: Any) -> None:
        """Raise a ``ValueError`` for anything in the recipe that could not run."""

    def sources(self, recipe: Any) -> list[Path]:
        """Files that the results depend on, besides the model."""

    def prepare(self, recipe: Any) -> Any:
        """Work that all runs share."""

    def run(self, context: Any, entry: Any, seed: int) -> Outcome:
        """One method, one seed."""

    def timing(self, context: Any, entry: Any) -> float:
        """Seconds a unit of a short piece of the work, to be measured again in turn with the other methods."""

    def command(self, recipe: dict[str, Any], method: str, knobs: dict[str, Any]) -> list[str]:
        """The words behind ``echelon`` that use a method as it was compared; none where there is nothing to run."""

    def describe(self, context: Any) -> str:
        """The scale of the comparison, for the report's title."""


def check_keys(legal: Mapping[str, Iterable[str]], recipe: Any) -> None:
    """Refuse keys of a recipe's sections that its task does not know.

    Args:
        legal: the keys of each section, by the section's name.
        recipe: whose sections are looked at.

    Raises:
        UserError: if there is such a key; the nearest legal one is named.
    """
    for where, keys in legal.items():
        for key in getattr(recipe, where):
            if key not in (known := list(keys)):
                raise UserError(f"unknown key {key!r} under {where}{suggest(key, known)}; keys are {', '.join(known)}")


def load_task(name: str) -> Any:
    """The task of this name from ``tasks/``, or of the user's own as ``module:Class``.

    Raises:
        UserError: if there is none.
    """
    module, _, attribute = name.partition(":")
    if attribute:
        try:
            return getattr(importlib.import_module(module), attribute)()
        except (ImportError, AttributeError) as error:
            raise UserError(f"cannot load task {name!r}: {error}") from error
    own = sorted(path.stem for path in (Path(__file__).parent / "tasks").glob("*.py") if path.stem != "__init__")
    if name not in own:
        raise UserError(f"unknown task {name!r}{suggest(name, own)}; tasks are {', '.join(own)}, or module:Class")
    return importlib.import_module(f"echelon.compare.tasks.{name}").Task()
