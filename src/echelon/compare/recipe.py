"""What a bake-off compares: read from YAML, checked whole before anything runs."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from echelon.compare.task import load_task
from echelon.data.files import read_text
from echelon.errors import UserError
from echelon.registry import build, suggest

BUILT_IN = Path(__file__).parent / "recipes"
TYPES: dict[str, type] = {
    "task": str, "methods": list, "model": str, "data": dict, "budget": dict, "seeds": list, "metrics": list, "baseline": str,
    "timeout": float, "equivalence": float, "isolation": str, "timing_rounds": int,
}  # fmt: skip


@dataclass(frozen=True)
class MethodEntry:
    """A method with its knobs, under a label that is unique in the recipe; each knob in ``sweep`` is chosen from the values there, as its task tells."""

    name: str
    knobs: dict[str, Any] = field(default_factory=dict)
    label: str = ""
    sweep: dict[str, list[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A bake-off.

    Attributes:
        task: name of a task, or ``module:Class``.
        methods: what is compared.
        model: name, folder or hub id.
        data: the task's data settings.
        budget: the task's budget, the same for all methods.
        seeds: every method runs once with each.
        metrics: what is measured; the first one with a direction is what the recommendation is about.
        baseline: label that the others are held against; the first one when empty.
        timeout: seconds after which a run is given up.
        equivalence: relative difference below which two methods count as tied.
        isolation: `process` gives each run its own, `worker` one to all runs (faster to start; its memory is sampled), `none` neither.
        timing_rounds: times that all methods are timed again in turn; 0 leaves it out.
    """

    task: str
    methods: list[MethodEntry]
    model: str = "embedded"
    data: dict[str, Any] = field(default_factory=dict)
    budget: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    metrics: list[str] = field(default_factory=list)
    baseline: str = ""
    timeout: float = 3600.0
    equivalence: float = 0.01
    isolation: str = "process"
    timing_rounds: int = 3

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]


def load_recipe(source: str | Path | Mapping[str, Any]) -> Recipe:
    """A recipe from a YAML file, the name of a built-in one, or a mapping; ``${NAME}`` in it is taken from the environment.

    Raises:
        UserError: if it cannot be read, or is wrong anywhere: the key, its value and what is allowed are named.
        ValueError: from a method whose knob is out of range.
    """
    if isinstance(source, Mapping):
        told, where = dict(source), "the recipe"
    else:
        built_in = sorted(path.stem for path in BUILT_IN.glob("*.yaml"))
        path = BUILT_IN / f"{source}.yaml" if str(source) in built_in else Path(source)
        if path == Path(source) and not path.exists():
            raise UserError(f"no recipe {str(source)!r}{suggest(str(source), built_in)}; give a YAML file, or one of {', '.join(built_in)}")
        where = str(source)
        try:
            told = yaml.safe_load(read_text(path))
        except yaml.YAMLError as error:
            place = getattr(error, "problem_mark", None)
            raise UserError(f"{where} is not YAML" + (f" (line {place.line + 1}: {getattr(error, 'problem', '')})" if place else "")) from error
        if told is None:
            raise UserError(f"{where} is empty; a recipe has at least task and methods")
    if not isinstance(told, dict):
        raise UserError(f"{where} is a {type(told).__name__}; a recipe is a mapping with at least task and methods")
    return _checked(_expanded(told, where), where)


def _expanded(value: Any, where: str) -> Any:
    if isinstance(value, dict):
        return {key: _expanded(item, where) for key, item in value.items()}
    if isinstance(value, list):
        return [_expanded(item, where) for item in value]
    if not isinstance(value, str):
        return value
    for name in re.findall(r"\$\{(\w+)\}", value):
        if name not in os.environ:
            raise UserError(f"{where} uses ${{{name}}}, which is not set" + ("; it names a folder of text collections" if name == "ECHELON_DATA" else ""))
        value = value.replace(f"${{{name}}}", os.environ[name])
    return value


def _checked(told: dict[str, Any], where: str) -> Recipe:
    _known(told, [f.name for f in fields(Recipe)], where)
    for key in ("task", "methods"):
        if key not in told:
            raise UserError(f"{where} lacks {key}")
    for key, kind in TYPES.items():
        legal = (int, float) if kind is float else (kind,)
        if key in told and (not isinstance(told[key], legal) or isinstance(told[key], bool)):
            raise UserError(f"{where}: {key} is {told[key]!r}; it must be a {kind.__name__}")
    task = load_task(told["task"])
    methods = [_method(entry, number, task.kind, where) for number, entry in enumerate(told.pop("methods"), 1)]
    for entry in methods:
        if entry.sweep and not getattr(task, "sweeps", False):
            raise UserError(f"{where}: {entry.label} has a sweep; the methods of this task are not tuned")
    recipe = Recipe(methods=methods, **told)
    labels = [entry.label for entry in methods]
    if not methods:
        raise UserError(f"{where}: methods is empty")
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"{where}: two methods are called {label!r}; give one of them another label")
    if recipe.baseline and recipe.baseline not in labels:
        raise UserError(f"{where}: baseline is {recipe.baseline!r}{suggest(recipe.baseline, labels)}; it must be one of {', '.join(labels)}")
    if not recipe.seeds or any(not isinstance(seed, int) or isinstance(seed, bool) for seed in recipe.seeds) or len(set(recipe.seeds)) < len(recipe.seeds):
        raise UserError(f"{where}: seeds is {recipe.seeds!r}; it must be different whole numbers, at least one")
    if recipe.isolation not in ("process", "worker", "none"):
        raise UserError(f"{where}: isolation is {recipe.isolation!r}; it must be process, worker or none")
    if recipe.timeout <= 0 or not 0 <= recipe.equivalence < 1 or recipe.timing_rounds < 0:
        raise UserError(f"{where}: timeout must be above 0, equivalence in [0, 1), timing_rounds at least 0")
    task.check(recipe)
    return recipe


def _method(told: Any, number: int, kind: str, where: str) -> MethodEntry:
    if isinstance(told, str):
        told = {"name": told}
    if not isinstance(told, dict) or "name" not in told:
        raise UserError(f"{where}: method {number} is {told!r}; it must be a name, or a mapping with a name")
    _known(told, [f.name for f in fields(MethodEntry)], f"{where}, method {number}")
    entry = MethodEntry(told["name"], dict(told.get("knobs") or {}), str(told.get("label") or told["name"]), dict(told.get("sweep") or {}))
    for knob, values in entry.sweep.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{where}: the sweep of {entry.label} has {knob} {values!r}; it must be a list of values")
        if knob in entry.knobs:
            raise UserError(f"{where}: {knob} of {entry.label} stands under knobs and under sweep; leave one of them out")
    if kind:
        build(entry.name, kind, entry.knobs)  # names and ranges of knobs
    return entry


def _known(told: dict[str, Any], legal: list[str], where: str) -> None:
    for key in told:
        if key not in legal:
            raise UserError(f"{where}: unknown key {key!r}{suggest(str(key), legal)}; keys are {', '.join(legal)}")
