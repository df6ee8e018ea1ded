"""From results to what they allow to be said: paired intervals, tests, ties, ranks."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from echelon.compare.recipe import Recipe
from echelon.compare.results import per_unit, samples
from echelon.compare.summary import Difference, Estimate, Metric, Row, Summary
from echelon.compare.task import load_task
from echelon.data.files import read_text
from echelon.evaluate.significance import DRAWS, holm, resampled, sign_flip

Values = Callable[[dict[str, Any], str], np.ndarray | None]


def summary_of(out: Path, recipe: Recipe, results: Sequence[dict[str, Any]]) -> Summary:
    """The summary of a comparison that lies in ``out``."""
    task = load_task(recipe.task)
    timing = json.loads(read_text(out / "timing.json")) if (out / "timing.json").is_file() else None
    summary = summarise(results, lambda result, metric: per_unit(out, result, metric), recipe, timing=timing, reference=task.reference)
    summary.unit, summary.cost_axis, summary.columns = task.unit, task.cost_axis, tuple(getattr(task, "columns", ()))
    if not any(summary.metrics[name].higher_is_better is not None for name in (summary.primary,) if name in summary.metrics):
        summary.primary = task.primary
    for result in results:
        if result["run"]["status"] == "finished" and result["run"]["seed"] == recipe.seeds[0]:
            for sample in samples(out, result):
                held = summary.texts.setdefault(sample["unit"], {"prompt": sample["prompt"], "reference": sample["reference"], "texts": {}})
                held["texts"][result["run"]["label"]] = sample["text"]
            summary.curves[result["run"]["label"]] = result.get("curves", {})
    return summary


def summarise(
    results: Sequence[dict[str, Any]], values: Values, recipe: Recipe, *, timing: dict[str, Any] | None = None, draws: int = DRAWS, seed: int = 0,
    reference: str = "",
) -> Summary:  # fmt: skip
    """Estimates of every method, and differences to the baseline and to the best.

    Units are drawn with replacement, the same ones for all methods, with seeds drawn inside; with one seed an interval covers units only.

    Args:
        results: what the runner returned.
        values: the per-unit values of a result's metric, or None.
        recipe: the recipe.
        timing: seconds by label and round, whose median replaces the ``seconds_per_*`` cost.
        draws: bootstrap and sign-flip draws.
        seed: of both.
        reference: method that is no candidate for the best.
    """
    metrics: dict[str, Metric] = {}
    for result in results:
        for name, quality in result["quality"].items():
            metrics.setdefault(name, Metric(quality["unit"], quality["higher_is_better"], quality.get("note", "")))
    order = [name for name in recipe.metrics if name in metrics] + [name for name in metrics if name not in recipe.metrics]
    metrics = {name: metrics[name] for name in order}
    rows, runs = [], {}
    for entry in recipe.methods:
        mine = [result for result in results if result["run"]["label"] == entry.label]
        good = [result for result in mine if result["run"]["status"] == "finished"]
        bad = [result["run"]["error"] for result in mine if result["run"]["status"] != "finished"]
        row = Row(entry.label, entry.name, entry.knobs, "failed" if bad or not good else "finished", bad[0] if bad else None)
        rows.append(row)
        if row.status == "finished":
            runs[entry.label] = good
            row.knobs = {**entry.knobs, **good[0].get("tuning", {}).get("chosen", {})}
            row.notes = good[0].get("notes", [])
            names = {name for result in good for name in result["cost"]}
            row.cost = {name: float(np.median([result["cost"][name] for result in good if name in result["cost"]])) for name in sorted(names)}
            times = (timing or {}).get("rounds", {}).get(entry.label)
            for name in [name for name in row.cost if name.startswith("seconds_per_")] if times else []:
                row.cost[name] = float(np.median(times))
    baseline = recipe.baseline or recipe.methods[0].label
    directed = [name for name, metric in metrics.items() if metric.higher_is_better is not None]
    summary = Summary(
        rows, metrics, directed[0] if directed else next(iter(metrics), ""), baseline, "wall_s", "unit",
        next((result["identity"].get("scale", "") for result in results if result["identity"].get("scale")), ""),
        next((result["budget"] for result in results if result["budget"]), {}), dict(results[0]["identity"]) if results else {}, recipe.to_dict(),
        reference=reference,
    )  # fmt: skip
    for name in metrics:
        _measure(summary, name, runs, values, recipe.equivalence, np.random.default_rng(seed), draws)
    _holm(summary)
    return summary


def _measure(
    summary: Summary, name: str, runs: dict[str, list[dict[str, Any]]], values: Values, equivalence: float, generator: np.random.Generator, draws: int
) -> None:
    held: dict[str, np.ndarray] = {}  # label -> (seeds, units)
    for label, results in runs.items():
        arrays = [values(result, name) for result in results if name in result["quality"]]
        if arrays and all(array is not None for array in arrays) and len({len(array) for array in arrays if array is not None}) == 1:
            held[label] = np.stack([array for array in arrays if array is not None]).astype(np.float64)
        elif arrays:
            points = [result["quality"][name]["value"] for result in results if name in result["quality"]]
            mean = float(np.mean(points))
            summary.row(label).values[name] = Estimate(mean, min(points), max(points), 1, len(points))
    shapes = {array.shape[1] for array in held.values()}
    if not held or len(shapes) > 1:
        return
    draw = {label: means for label, means in zip(held, resampled(list(held.values()), generator, draws), strict=True)}
    for label, array in held.items():
        low, high = np.quantile(draw[label], [0.025, 0.975])
        summary.row(label).values[name] = Estimate(float(array.mean()), float(low), float(high), array.shape[1], array.shape[0])
    higher, best = summary.metrics[name].higher_is_better, summary.best(name)
    for label in held:
        row = summary.row(label)
        if summary.baseline in held and label != summary.baseline:
            row.versus_baseline[name] = _difference(held, draw, label, summary.baseline, generator)
        if best is not None and best.label in held and row.method != summary.reference:
            if label != best.label:
                row.versus_best[name] = difference = _difference(held, draw, label, best.label, generator)
                near = max(abs(difference.low), abs(difference.high)) <= equivalence * abs(best.values[name].mean)
                row.tied_with_best[name] = near or difference.low <= 0 <= difference.high
            else:
                row.tied_with_best[name] = True
    if best is not None:
        candidates = [label for label in held if summary.row(label).method != summary.reference]
        stacked = np.stack([draw[label] for label in candidates])
        winners = (stacked if higher else -stacked).argmax(0)
        for place, label in enumerate(candidates):
            summary.row(label).first_share[name] = float((winners == place).mean())


def _difference(
    held: dict[str, np.ndarray], draw: dict[str, np.ndarray], label: str, other: str, generator: np.random.Generator
) -> Difference:
    gaps = draw[label] - draw[other]
    low, high = np.quantile(gaps, [0.025, 0.975])
    paired = held[label].mean(0) - held[other].mean(0)
    return Difference(float(paired.mean()), float(low), float(high), sign_flip(paired, generator, len(gaps)))


def _holm(summary: Summary) -> None:
    """Correct all comparisons with the baseline together, and all with the best."""
    for where in ("versus_baseline", "versus_best"):
        places = [(getattr(row, where), name) for row in summary.rows for name in getattr(row, where)]
        corrected = holm([table[name].p for table, name in places])
        for (table, name), p in zip(places, corrected, strict=True):
            old = table[name]
            table[name] = Difference(old.value, old.low, old.high, old.p, p)
