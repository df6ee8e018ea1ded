"""What a bake-off found, as plain numbers: made by ``statistics``, read by table, plots, report and recommendation."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval (equal to the mean where there are no units to draw from), over ``n`` units and ``seeds`` seeds."""

    mean: float
    low: float
    high: float
    n: int
    seeds: int


@dataclass(frozen=True)
class Difference:
    """A paired difference with its 95 % interval; ``p`` of the sign-flip test and the same after Holm's correction over the table."""

    value: float
    low: float
    high: float
    p: float
    p_holm: float = 1.0


@dataclass
class Row:
    """One method. ``versus_best`` is empty for the best; metrics without units have estimates only."""

    label: str
    method: str
    knobs: dict[str, Any]
    status: str = "finished"
    error: str | None = None
    values: dict[str, Estimate] = field(default_factory=dict)
    versus_baseline: dict[str, Difference] = field(default_factory=dict)
    versus_best: dict[str, Difference] = field(default_factory=dict)
    tied_with_best: dict[str, bool] = field(default_factory=dict)
    first_share: dict[str, float] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass
class Metric:
    """A metric's unit, direction (None: neither way is better) and how it was measured."""

    unit: str
    higher_is_better: bool | None
    note: str


@dataclass
class Summary:
    """Everything the report says.

    Attributes:
        rows: in the recipe's order.
        metrics: by name, in the recipe's order.
        primary: metric of the recommendation.
        baseline: label that others are held against.
        cost_axis: cost on the quality-cost plot.
        unit: what is paired.
        scale: model and data in a few words.
        budget: the budget, allowed and used.
        identity: model, data, packages, machine.
        recipe: the recipe itself.
        texts: by unit: ``prompt``, ``reference``, and ``texts`` by label, of the first seed.
        curves: by label: named lists of points.
        reference: method that is shown but is no candidate.
        columns: costs worth a column beside those per unit.
    """

    rows: list[Row]
    metrics: dict[str, Metric]
    primary: str
    baseline: str
    cost_axis: str
    unit: str
    scale: str
    budget: dict[str, Any]
    identity: dict[str, Any]
    recipe: dict[str, Any]
    texts: dict[str, dict[str, Any]] = field(default_factory=dict)
    curves: dict[str, dict[str, list[list[float]]]] = field(default_factory=dict)
    reference: str = ""
    columns: tuple[str, ...] = ()

    @property
    def units(self) -> str:
        """The plural of what is paired."""
        return self.unit[:-1] + "ies" if self.unit.endswith("y") else self.unit + "s"

    @property
    def finished(self) -> list[Row]:
        return [row for row in self.rows if row.status == "finished"]

    @property
    def failed(self) -> list[Row]:
        return [row for row in self.rows if row.status != "finished"]

    def row(self, label: str) -> Row:
        return next(row for row in self.rows if row.label == label)

    def best(self, metric: str, rows: list[Row] | None = None) -> Row | None:
        """The finished row with the best mean, the reference aside; None for a metric without direction."""
        higher = self.metrics[metric].higher_is_better
        held = [row for row in (self.finished if rows is None else rows) if metric in row.values and row.method != self.reference]
        if higher is None or not held:
            return None
        return (max if higher else min)(held, key=lambda row: row.values[metric].mean)

    def pareto(self, metric: str, cost: str) -> list[str]:
        """Labels that no other method beats in metric and cost at once, cheapest first."""
        sign = -1 if self.metrics[metric].higher_is_better is False else 1
        held = [row for row in self.finished if metric in row.values and cost in row.cost and row.method != self.reference]
        front: list[Row] = []
        for row in sorted(held, key=lambda row: (row.cost[cost], -sign * row.values[metric].mean)):
            if not front or sign * row.values[metric].mean > sign * front[-1].values[metric].mean:
                front.append(row)
        return [row.label for row in front]
