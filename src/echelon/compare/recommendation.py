"""The line that says which method to use, made from the numbers alone."""

import re
import shlex
from dataclasses import dataclass

from echelon.compare.summary import Row, Summary
from echelon.compare.task import load_task
from echelon.errors import UserError
from echelon.registry import suggest


@dataclass(frozen=True)
class Recommendation:
    """What to use; ``label`` and ``command`` are None when nothing can be recommended."""

    text: str
    label: str | None
    command: str | None


@dataclass(frozen=True)
class Limit:
    """A bound on a cost; with ``relative`` it is a multiple of the baseline's."""

    cost: str
    most: float
    relative: bool


def parse_limits(told: str, costs: list[str]) -> list[Limit]:
    """Bounds such as ``seconds_per_prompt<=2x, scorer_calls_per_prompt<=20``.

    Raises:
        UserError: if one is not of this form, or names an unknown cost.
    """
    made = []
    for part in filter(None, (part.strip() for part in told.split(","))):
        found = re.fullmatch(r"(\w+)\s*<=\s*([0-9.]+(?:e-?[0-9]+)?)(x?)", part)
        if not found:
            raise UserError(f"limit {part!r} is not of the form COST<=NUMBER, or COST<=NUMBERx for a multiple of the baseline's")
        if found[1] not in costs:
            raise UserError(f"limit {part!r}: unknown cost {found[1]!r}{suggest(found[1], costs)}; costs are {', '.join(costs)}")
        made.append(Limit(found[1], float(found[2]), bool(found[3])))
    return made


def recommend(summary: Summary, metric: str, limits: str = "") -> Recommendation:
    """Best method on a metric among those within the limits, cheapest of those tied with it.

    Raises:
        UserError: if the metric is unknown, has no direction, or a limit is wrong.
    """
    directed = [name for name, held in summary.metrics.items() if held.higher_is_better is not None]
    if not summary.finished:
        why = "; ".join(f"{row.label}: {row.error}" for row in summary.failed)
        return Recommendation(f"Nothing can be recommended: every method failed ({why}).", None, None)
    if metric not in directed:
        raise UserError(f"metric {metric!r}{suggest(metric, directed)} cannot be ranked by; metrics with a direction are {', '.join(directed)}")
    costs = sorted({name for row in summary.finished for name in row.cost})
    bounds = parse_limits(limits, costs)
    candidates = [row for row in summary.finished if metric in row.values and row.method != summary.reference]
    allowed = [row for row in candidates if all(_within(summary, row, bound) for bound in bounds)]
    under = f"Under {limits}" if limits else f"With {_budget(summary)}"
    if not allowed:
        return Recommendation(f"{under}, no method is left.", None, None)
    best = summary.best(metric, allowed)
    assert best is not None
    tied = [row for row in allowed if row is best or _tied(summary, row, best, metric)]
    # A cheaper method is preferred only if it saves something worth naming.
    cheapest = min(tied, key=lambda row: row.cost.get(summary.cost_axis, 0.0))
    axis = summary.cost_axis
    chosen = cheapest if cheapest.cost.get(axis, 0.0) < 0.9 * best.cost.get(axis, 0.0) else best
    value = chosen.values[metric]
    text = [f"{under}, use {chosen.label}: {metric} {value.mean:.3f} [{value.low:.3f}, {value.high:.3f}]"]
    if chosen is not best:
        text[0] += f", not told apart from the highest-ranked {best.label} ({best.values[metric].mean:.3f}) and cheaper"
    others = [row.label for row in tied if row not in (chosen, best)]
    if others:
        text.append(f"The data do not separate it from {', '.join(others)}")
    text += _against_baseline(summary, chosen, metric)
    if chosen is best and not others:
        rest = [row for row in allowed if row is not best]
        second = summary.best(metric, rest)
        if second is not None and metric in second.versus_best and summary.best(metric) is best:
            gap = second.versus_best[metric]
            text.append(f"Second is {second.label}, behind by {abs(gap.value):.3f} [{_range(gap.low, gap.high)}], p {_p(gap.p_holm)}")
    if metric in summary.metrics and value.n == 1:
        text.append(f"{metric} is one number for all texts, so differences in it are not tested")
    dominated = [row.label for row in summary.finished if row.label not in summary.pareto(metric, axis) and row not in tied and row.method != summary.reference]
    if dominated:
        text.append(f"Dominated in {metric} and {axis}: {', '.join(dominated)}")
    if summary.failed:
        text.append("Failed: " + ", ".join(f"{row.label} ({row.error})" for row in summary.failed))
    if value.seeds == 1 and value.n > 1:
        text.append(f"One seed: intervals cover {summary.units} only")
    return Recommendation(". ".join(text) + ".", chosen.label, command(summary, chosen))


def command(summary: Summary, row: Row) -> str | None:
    """The command line that uses this method, as its task gives it."""
    words = load_task(summary.recipe["task"]).command(summary.recipe, row.method, row.knobs)
    return shlex.join(["echelon", *words]) if words else None


def _within(summary: Summary, row: Row, bound: Limit) -> bool:
    most = bound.most
    if bound.relative:
        base = summary.row(summary.baseline)
        if bound.cost not in base.cost:
            raise UserError(f"limit on {bound.cost} is relative to {summary.baseline}, which has no such figure")
        most *= base.cost[bound.cost]
    return row.cost.get(bound.cost, float("inf")) <= most


def _tied(summary: Summary, row: Row, best: Row, metric: str) -> bool:
    """Tied by the paired test against the overall best; against a best under limits only where intervals overlap."""
    if summary.best(metric) is best:
        return row.tied_with_best.get(metric, False)
    a, b = row.values[metric], best.values[metric]
    return a.n > 1 and a.low <= b.high and b.low <= a.high


def _against_baseline(summary: Summary, row: Row, metric: str) -> list[str]:
    gap = row.versus_baseline.get(metric)
    if gap is None:
        return []
    sure = "" if gap.p_holm < 0.05 else ", which the data do not establish"
    return [f"Against {summary.baseline}: {gap.value:+.3f} [{_range(gap.low, gap.high)}], p {_p(gap.p_holm)}{sure}"]


def _budget(summary: Summary) -> str:
    budget = summary.budget
    return f"{budget['allowed']:g} {budget['unit']}" if budget else "the given budget"


def _range(low: float, high: float) -> str:
    return f"{low:+.3f}, {high:+.3f}"


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"
