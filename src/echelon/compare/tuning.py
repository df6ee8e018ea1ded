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
    """What sweeps chose, for all runs of a comparison: a sweep is made once for all seeds, and kept.

    Args:
        folder: where they are kept.
        recipe: what the results depend on; where any of it changes, sweeps are made again.
    """

    def __init__(self, folder: Path, recipe: Any):
        self.folder = folder / "sweeps" / _digest(foundations(recipe))

    def tuned(self, entry: Any, loss_of: Callable[[dict[str, Any]], float], on: str = "", **each: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """As the function `tuned`; ``on`` is what else tells this sweep from others of the entry."""
        kept = self.folder / f"{_digest([on, entry.name, entry.knobs, entry.sweep])}.json"
        if not kept.is_file():
            write_whole(kept, json.dumps(tuned(entry, loss_of, **each), indent=2) + "\n")
        knobs, tuning = json.loads(read_text(kept))
        return knobs, tuning


def _digest(told: Any) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def tuned(entry: Any, loss_of: Callable[[dict[str, Any]], float], **each: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """An entry's knobs with those of its sweep that reach the least loss, and what was tried for that; nothing where there is one setting only.

    Args:
        entry: a method of a recipe.
        loss_of: trains with these knobs and measures on what is neither trained on nor tested.
        each: what a try costs, as ``tokens=5000`` or ``steps=20``.

    Raises:
        UserError: if no setting gives a finite loss.
    """
    grid = tries(entry)
    if len(grid) == 1:
        return grid[0], {}
    started = time.perf_counter()
    tried: list[dict[str, Any]] = []
    for knobs in grid:
        one: dict[str, Any] = {"knobs": {name: knobs[name] for name in entry.sweep}, "loss": None}
        try:
            loss = loss_of(knobs)
            one["loss"] = loss if math.isfinite(loss) else None
        except ValueError as error:  # it diverged: a result like another
            one["error"] = str(error)
        tried.append(one)
    if all(one["loss"] is None for one in tried):
        raise UserError(f"no setting of the sweep of {entry.label} trained; the last said: {tried[-1].get('error', 'the loss is not finite')}")
    chosen = min((one for one in tried if one["loss"] is not None), key=lambda one: one["loss"])["knobs"]
    cost = {"seconds": time.perf_counter() - started, **{name: count * len(grid) for name, count in each.items()}}
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
