"""What changed between two comparisons: the regression check."""

import json
from pathlib import Path

from echelon.compare.recipe import MethodEntry, Recipe
from echelon.compare.results import read_results
from echelon.compare.statistics import summary_of
from echelon.compare.summary import Summary
from echelon.data.files import read_text


def against(old: Path, new: Path) -> list[str]:
    """One line for each metric of a method whose intervals in the two folders lie apart, and for each method that appeared, vanished or failed.

    Raises:
        UserError: if a folder holds no comparison.
    """
    before, after = _read(old), _read(new)
    known = {row.label: row for row in before.rows}
    lines = [f"{label}: only in {old}" for label in known if label not in {row.label for row in after.rows}]
    for row in after.rows:
        if row.label not in known:
            lines.append(f"{row.label}: only in {new}")
            continue
        was = known[row.label]
        if row.status != was.status:
            lines.append(f"{row.label}: {was.status}, now {row.status}" + (f" ({row.error})" if row.error else ""))
        for metric, value in row.values.items():
            earlier = was.values.get(metric)
            if earlier is not None and (value.low > earlier.high or value.high < earlier.low):
                higher = after.metrics[metric].higher_is_better
                better = "" if higher is None else ", better" if (value.mean > earlier.mean) == higher else ", worse"
                lines.append(f"{row.label}: {metric} was {earlier.mean:.3f}, is {value.mean:.3f}{better}")
    return lines


def _read(out: Path) -> Summary:
    told = json.loads(read_text(out / "recipe.json"))
    recipe = Recipe(**{**told, "methods": [MethodEntry(**entry) for entry in told["methods"]]})
    return summary_of(out, recipe, read_results(out))
