"""Choosing knobs from a sweep, before what is tested is looked at, and saying what was tried."""

import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from echelon.compare.identity import foundations
from echelon.data.files import read_text, write_whole
from echelon.errors import UserError
from echelon.registry import Card


def tries(entry: Any) -> list[dict[str, Any]]:
    """The knobs of every setting of an entry's sweep; one without a sweep."""
    return [{**entry.knobs, **dict(zip(entry.sweep, values, strict=True))} for values in itertools.product(*entry.sweep.values())]


class Sweeps:
    """What was tried for all runs of a comparison: each setting once, whatever the seed of a run, and kept, so that a wider sweep tries only what is new.

    Args:
        folder: where they are kept.
        recipe: what the results depend on; where any of it changes, all is tried again.
    """

    def __init__(self, folder: Path, recipe: Any):
        self.folder = folder / "sweeps" / _digest(foundations(recipe))

    def kept(self, key: Any, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was made for this key, with the ``seconds`` that it took; a ValueError that is no UserError is kept too.

        Raises:
            ValueError: if making it does, or did.
        """
        file = self.folder / f"{_digest(key)}.json"
        if not file.is_file():
            started = time.perf_counter()
            try:
                made = make()
            except UserError:  # of a file, a disk, an argument: another time it may not be there
                raise
            except ValueError as error:
                made = {"error": str(error)}
            write_whole(file, json.dumps({"key": key, **made, "seconds": time.perf_counter() - started}))
        told = json.loads(read_text(file))
        if "error" in told:
            raise Failed(told["error"], told["seconds"])
        return told


class Failed(ValueError):
    """A setting that could not be tried to its end.

    Attributes:
        seconds: until it failed.
    """

    def __init__(self, message: str, seconds: float):
        super().__init__(message)
        self.seconds = seconds


def _digest(told: Any) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def tuned(entry: Any, tried_with: Callable[[dict[str, Any]], dict[str, Any]], **each: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """An entry's knobs with those of its sweep that reach the least loss, and what was tried for that; nothing where there is one setting only.

    Args:
        entry: a method of a recipe.
        tried_with: trains with these knobs, by :meth:`Sweeps.kept`: gives the ``loss`` on what is neither trained on nor tested, and the ``seconds``.
        each: what a try costs, as ``tokens=5000`` or ``steps=20``.

    Raises:
        UserError: if no setting gives a finite loss.
    """
    grid = tries(entry)
    if len(grid) == 1:
        return grid[0], {}
    seconds, tried = 0.0, list[dict[str, Any]]()
    for knobs in grid:
        one: dict[str, Any] = {"knobs": {name: knobs[name] for name in entry.sweep}, "loss": None}
        try:
            found = tried_with(knobs)
            one["loss"] = found["loss"] if math.isfinite(found["loss"]) else None
            seconds += found["seconds"]
        except ValueError as error:  # it diverged: a result like another
            one["error"] = str(error)
            seconds += getattr(error, "seconds", 0.0)
        tried.append(one)
    if all(one["loss"] is None for one in tried):
        raise UserError(f"no setting of the sweep of {entry.label} trained; the last said: {tried[-1].get('error', 'the loss is not finite')}")
    chosen = min((one for one in tried if one["loss"] is not None), key=lambda one: one["loss"])["knobs"]
    cost = {"seconds": seconds, **{name: count * len(grid) for name, count in each.items()}}
    return {**entry.knobs, **chosen}, {"chosen": chosen, "tried": tried, "at_edge": at_edge(entry.sweep, chosen), "cost": cost}


def at_edge(sweep: Mapping[str, Sequence[Any]], chosen: Mapping[str, Any]) -> list[str]:
    """The swept knobs whose chosen number is the least or the greatest of those that were tried."""
    numeric = {name: values for name, values in sweep.items() if len(set(values)) > 1 and all(isinstance(v, int | float) for v in values)}
    return [name for name, values in numeric.items() if chosen[name] in (min(values), max(values))]


def tuning_notes(tuning: Mapping[str, Any], on: str) -> list[str]:
    """How knobs were chosen, in words.

    Args:
        tuning: from `tuned`.
        on: what the losses are of, as ``tuning documents``.
    """
    if not tuning:
        return []
    told = ", ".join(f"{said(one['knobs'])} ({'diverged' if one['loss'] is None else format(one['loss'], '.3f')})" for one in tuning["tried"])
    each = ", ".join(f"{count // len(tuning['tried']):,} {name}" for name, count in tuning["cost"].items() if name != "seconds")
    made = [f"tuned: {said(tuning['chosen'])} of {told}; losses on the {on} after {each} each, {tuning['cost']['seconds']:.0f} s together"]
    if tuning["at_edge"]:
        made.append(f"grid too narrow: the best {' and '.join(tuning['at_edge'])} lies at its edge")
    return made


def published(found: Card) -> list[str]:
    """What a method's paper reports, as a note."""
    return [f"published, with other models and budgets (arXiv {found.arxiv}): {found.published}"] if found.published else []


def said(knobs: Mapping[str, Any]) -> str:
    return " ".join(f"{name} {value}" for name, value in knobs.items())


def evenly(texts: Sequence[Any], count: int) -> list[Any]:
    """At most so many of the texts, spread over all of them."""
    return list(texts) if len(texts) <= count else [texts[number * len(texts) // count] for number in range(count)]


def is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
