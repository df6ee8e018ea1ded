"""From what users write to a scorer."""

import dataclasses
from pathlib import Path
from typing import Any

from echelon.errors import UserError
from echelon.models import LoadedModel
from echelon.registry import cards, get, suggest
from echelon.score.base import Scorer, as_scorer


def resolve(spec: Any, model: LoadedModel | None = None) -> Scorer:
    """A scorer from its name, a RankGen folder, or an object that :func:`echelon.score.as_scorer` takes.

    Args:
        spec: ``embedded`` (the RankGen that ships), the name of a scorer with its default knobs, the folder of a RankGen, or an object.
        model: the language model at hand, which a ``likelihood`` scorer then uses in place of loading its own.

    Raises:
        UserError: if it is neither; the nearest name is suggested.
    """
    if not isinstance(spec, (str, Path)):
        return as_scorer(spec)
    names = [card.name for card in cards("scorer")]
    if str(spec) == "embedded" or (str(spec) not in names and Path(spec).is_dir()):
        return get("rankgen", "scorer")(str(spec))
    if str(spec) not in names:
        raise UserError(f"unknown scorer {str(spec)!r}{suggest(str(spec), names)}; give a RankGen folder, embedded, {', '.join(names)}")
    made = get(str(spec), "scorer")()
    return dataclasses.replace(made, model=model) if model is not None and str(spec) == "likelihood" else made
