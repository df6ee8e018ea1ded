"""Plots as SVG, written by hand: they need no library, no network and no script, and follow the reader's colours."""

import html
import math
from collections.abc import Sequence

from echelon.compare.summary import Summary
from echelon.compare.table import heading, ranked

# Okabe and Ito's colours, which people with any colour vision can tell apart.
FRONT, OTHER, BASELINE = "#0072B2", "#999999", "#D55E00"
STYLE = (
    "svg text{font:13px system-ui,sans-serif;fill:currentColor}.small{font-size:11px;opacity:.75}.axis{stroke:currentColor;opacity:.45}"
    ".gridline{stroke:currentColor;opacity:.12}"
)


def quality_cost(summary: Summary, metric: str, cost: str) -> str:
    """Scatter of a metric against a cost, with the Pareto front drawn; the cost axis is logarithmic where costs span a decade."""
    rows = [row for row in summary.finished if metric in row.values and cost in row.cost]
    if not rows:
        return ""
    width, height, left, right, top, bottom = 860, 440, 70, 150, 20, 58
    log = min(row.cost[cost] for row in rows) > 0 and max(row.cost[cost] for row in rows) > 10 * min(row.cost[cost] for row in rows)
    xs = [math.log10(row.cost[cost]) if log else row.cost[cost] for row in rows]
    lows, highs = [row.values[metric].low for row in rows], [row.values[metric].high for row in rows]
    x_low, x_high = _padded(min(xs), max(xs))
    y_low, y_high = _padded(min(lows), max(highs))

    def x(value: float) -> float:
        return left + (value - x_low) / (x_high - x_low) * (width - left - right)

    def y(value: float) -> float:
        return height - bottom - (value - y_low) / (y_high - y_low) * (height - top - bottom)

    front = summary.pareto(metric, cost) if summary.metrics[metric].higher_is_better is not None else []
    parts = []
    for tick in _ticks(y_low, y_high):
        parts.append(f'<line class="gridline" x1="{left}" x2="{width - right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text class="small" text-anchor="end" x="{left - 8}" y="{y(tick) + 4:.1f}">{tick:g}</text>')
    for tick in _log_ticks(x_low, x_high) if log else _ticks(x_low, x_high):
        at = math.log10(tick) if log else tick
        parts.append(f'<line class="gridline" x1="{x(at):.1f}" x2="{x(at):.1f}" y1="{top}" y2="{height - bottom}"/>')
        parts.append(f'<text class="small" text-anchor="middle" x="{x(at):.1f}" y="{height - bottom + 18}">{tick:g}</text>')
    parts.append(f'<line class="axis" x1="{left}" x2="{width - right}" y1="{height - bottom}" y2="{height - bottom}"/>')
    parts.append(f'<line class="axis" x1="{left}" x2="{left}" y1="{top}" y2="{height - bottom}"/>')
    place = {row.label: (x(at), y(row.values[metric].mean)) for row, at in zip(rows, xs, strict=True)}
    if len(front) > 1:
        points = " ".join(f"{place[label][0]:.1f},{place[label][1]:.1f}" for label in front)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{FRONT}" stroke-width="2" stroke-dasharray="5 4"/>')
    for row in rows:
        at, level = place[row.label]
        colour = BASELINE if row.label == summary.baseline else FRONT if row.label in front else OTHER
        value = row.values[metric]
        told = html.escape(f"{row.label}: {metric} {value.mean:.3f} [{value.low:.3f}, {value.high:.3f}], {cost} {row.cost[cost]:.3g}")
        bar = f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{y(value.low):.1f}" y2="{y(value.high):.1f}" stroke="{colour}" stroke-width="1.5" opacity=".6"/>'
        parts.append(f'<g>{bar}<circle cx="{at:.1f}" cy="{level:.1f}" r="5.5" fill="{colour}"/><title>{told}</title></g>')
    parts += _labels(place)
    higher = summary.metrics[metric].higher_is_better
    better = "" if higher is None else " (higher is better)" if higher else " (lower is better)"
    name = html.escape(heading(cost)) + (", log scale" if log else "")
    parts.append(f'<text text-anchor="middle" x="{(left + width - right) / 2}" y="{height - 12}">{name}</text>')
    parts.append(
        f'<text text-anchor="middle" transform="translate(18 {(top + height - bottom) / 2}) rotate(-90)">{html.escape(heading(metric))}{better}</text>'
    )
    return _svg(width, height, f"{heading(metric)} against {heading(cost)}", parts)


def bars(summary: Summary, metric: str) -> str:
    """Every method's mean and 95 % interval in one metric."""
    rows = [row for row in ranked(summary) if metric in row.values]
    if not rows:
        return ""
    width, left, right, top, step = 420, 150, 62, 30, 22
    height = top + step * len(rows) + 26
    low, high = _padded(min(row.values[metric].low for row in rows), max(row.values[metric].high for row in rows))

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (width - left - right)

    best = summary.best(metric)
    held = summary.metrics[metric]
    arrow = {True: " ↑", False: " ↓", None: ""}[held.higher_is_better]
    parts = [f'<text x="0" y="15" font-weight="600">{html.escape(heading(metric))}{arrow}</text>']
    parts += [f'<text class="small" text-anchor="end" x="{width}" y="15">{html.escape(held.unit)}</text>']
    for tick in _ticks(low, high, 4):
        parts.append(f'<line class="gridline" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{top - 6}" y2="{height - 22}"/>')
        parts.append(f'<text class="small" text-anchor="middle" x="{x(tick):.1f}" y="{height - 6}">{tick:g}</text>')
    for number, row in enumerate(rows):
        middle = top + step * number + step / 2
        value = row.values[metric]
        colour = BASELINE if row.label == summary.baseline else FRONT if row is best or row.tied_with_best.get(metric) else OTHER
        parts.append(f'<text text-anchor="end" x="{left - 10}" y="{middle + 4:.1f}">{html.escape(_short(row.label))}</text>')
        if value.high > value.low:
            parts.append(
                f'<line x1="{x(value.low):.1f}" x2="{x(value.high):.1f}" y1="{middle:.1f}" y2="{middle:.1f}" stroke="{colour}" stroke-width="5" '
                'stroke-linecap="round" opacity=".35"/>'
            )
        parts.append(f'<circle cx="{x(value.mean):.1f}" cy="{middle:.1f}" r="4.5" fill="{colour}"/>')
        parts.append(f'<text class="small" text-anchor="end" x="{width}" y="{middle + 4:.1f}">{value.mean:.3f}</text>')
    return _svg(width, height, f"{heading(metric)} of every method", parts)


def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    said = html.escape(title)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{said}">'
        f"<title>{said}</title><style>{STYLE}</style>{''.join(parts)}</svg>"
    )


def _labels(places: dict[str, tuple[float, float]]) -> list[str]:
    """Names beside their points, moved down until none lies on another."""
    parts: list[str] = []
    taken: list[tuple[float, float, float]] = []
    for label, (x, y) in sorted(places.items(), key=lambda item: item[1][1]):
        text, at = _short(label), y + 4
        wide = 7.0 * len(text) + 14
        while any(abs(at - other) < 14 and x < right and left < x + wide for left, right, other in taken):
            at += 3
        taken.append((x, x + wide, at))
        if at - y > 18:
            parts.append(f'<line class="axis" x1="{x + 6:.1f}" x2="{x + 11:.1f}" y1="{y:.1f}" y2="{at - 4:.1f}"/>')
        parts.append(f'<text x="{x + 12:.1f}" y="{at:.1f}">{html.escape(text)}</text>')
    return parts


def _short(label: str) -> str:
    return label if len(label) <= 21 else label[:20] + "…"


def _padded(low: float, high: float) -> tuple[float, float]:
    room = (high - low) * 0.06 or max(abs(high), 1e-3) * 0.1
    return low - room, high + room


def _ticks(low: float, high: float, about: int = 6) -> list[float]:
    rough = (high - low) / about
    size = 10 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough)
    return [round(step * i, 10) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(low), math.ceil(high) + 1)
    factors = (1, 2, 5) if high - low < 3 else (1,)
    return [value for decade in decades for value in (float(f"{factor}e{decade}") for factor in factors) if low <= math.log10(value) <= high]


def lines(curves: dict[str, list[list[float]]], title: str, x_title: str = "", log: bool = False, size: tuple[int, int] = (640, 320)) -> str:
    """Named curves in one picture (learning curves, cost curves), a single point as a dot; ``log`` is for the x axis."""
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return ""
    (width, height), left, right, top, bottom = size, 60, 150, 24, 46 if x_title else 30
    scale = math.log10 if log else float
    x_low, x_high = _padded(min(scale(p[0]) for p in points), max(scale(p[0]) for p in points))
    y_low, y_high = _padded(min(p[1] for p in points), max(p[1] for p in points))

    def x(value: float) -> float:
        return left + (scale(value) - x_low) / (x_high - x_low) * (width - left - right)

    def y(value: float) -> float:
        return height - bottom - (value - y_low) / (y_high - y_low) * (height - top - bottom)

    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
    parts = [f'<text x="0" y="14" font-weight="600">{html.escape(title)}</text>']
    for tick in _ticks(y_low, y_high):
        parts.append(f'<line class="gridline" x1="{left}" x2="{width - right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text class="small" text-anchor="end" x="{left - 8}" y="{y(tick) + 4:.1f}">{tick:g}</text>')
    for tick in _log_ticks(x_low, x_high) if log else _ticks(x_low, x_high):
        parts.append(f'<line class="gridline" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{top}" y2="{height - bottom}"/>')
        parts.append(f'<text class="small" text-anchor="middle" x="{x(tick):.1f}" y="{height - bottom + 16}">{tick:g}</text>')
    if x_title:
        parts.append(f'<text text-anchor="middle" x="{(left + width - right) / 2}" y="{height - 8}">{html.escape(x_title)}</text>')
    ends: dict[str, tuple[float, float]] = {}
    for number, (label, curve) in enumerate(curves.items()):
        colour, dashes = colours[number % len(colours)], ' stroke-dasharray="6 3"' if number >= len(colours) else ""
        way = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in curve)
        parts.append(f'<polyline points="{way}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>')
        ends[label] = x(curve[-1][0]), y(curve[-1][1])
        if len(curve) == 1:
            parts.append(f'<circle cx="{ends[label][0]:.1f}" cy="{ends[label][1]:.1f}" r="4" fill="{colour}"/>')
    return _svg(width, height, title, [*parts, *_labels(ends)])
