"""The report: one HTML file that opens anywhere, the table as Markdown, the plots as SVG (and PNG where matplotlib is installed)."""

import html
import io
import json
from pathlib import Path
from string import Template
from typing import Any

from echelon.compare import plots
from echelon.compare.recommendation import Recommendation
from echelon.compare.summary import Row, Summary
from echelon.compare.table import cost_cell, cost_columns, heading, legend, markdown, ranked
from echelon.data.files import write_whole

PAGE = Path(__file__).with_name("report.html")
KNOBS_OF = ("decoder", "optimizer", "layer", "retriever", "reranker")
SHOWN = 40  # texts side by side: more would make the page heavy and nobody read them


def write_report(summary: Summary, advice: Recommendation, out: str | Path) -> Path:
    """Write ``report.html``, ``table.md`` and ``plots/``; returns the report's path."""
    out = Path(out)
    write_whole(out / "table.md", f"{advice.text}\n\n{markdown(summary)}")
    if summary.finished:
        drawn = {"quality_cost": plots.quality_cost(summary, summary.primary, summary.cost_axis)}
        drawn |= {metric: plots.bars(summary, metric) for metric in summary.metrics}
        for name, svg in drawn.items():
            if svg:
                write_whole(out / "plots" / f"{name}.svg", svg)
        png(summary, out / "plots" / "quality_cost.png")
    write_whole(out / "report.html", page(summary, advice))
    return out / "report.html"


def page(summary: Summary, advice: Recommendation) -> str:
    """The report as one HTML page."""
    told = f"{summary.recipe['task'].split(':')[0]} on {summary.recipe['model']}"
    front = ", ".join(summary.pareto(summary.primary, summary.cost_axis)) if summary.finished else ""
    return Template(PAGE.read_text(encoding="utf-8")).substitute(
        title=_e(f"Bake-off: {told} ({summary.scale})"),
        heading=_e(f"Bake-off: {told}"),
        scale=_e(f"{summary.scale}. Small models rank methods unlike large ones: read this as a result at this scale."),
        advice=_e(advice.text) + (f"<code>{_e(advice.command)}</code>" if advice.command else ""),
        table=_table(summary),
        legend=_e(legend(summary) + "."),
        scatter=plots.quality_cost(summary, summary.primary, summary.cost_axis) if summary.finished else "",
        front=_e(f"Dashed: the Pareto front ({front}). Orange: the baseline. Bars: 95 % intervals." if front else "No method finished."),
        bars="".join(
            f'<figure>{plots.bars(summary, m)}<figcaption class="note">{_e(held.note)}</figcaption></figure>' for m, held in summary.metrics.items()
        ),
        curves=_curves(summary),
        texts_note=_e(f"The same {summary.units} for all, first seed; {min(SHOWN, len(summary.texts))} of {len(summary.texts)} shown."),
        texts=_texts(summary, advice.label),
        knobs="".join(f"<dt>{_e(row.label)}</dt><dd>{_e(row.method)} {_e(json.dumps(_knobs(row)))}{_notes(row)}</dd>" for row in summary.rows),
        measured="".join(f"<dt>{_e(heading(name))}</dt><dd>{_e(held.note or held.unit)}</dd>" for name, held in summary.metrics.items()),
        identity="".join(f"<dt>{_e(name)}</dt><dd>{_e(_flat(value))}</dd>" for name, value in _identity(summary).items()),
    )


def _table(summary: Summary) -> str:
    costs = cost_columns(summary)
    heads = ["method", *(heading(m) for m in summary.metrics), *(heading(c) for c in costs)]
    lines = ["<table><thead><tr>", *(f'<th scope="col"><button type="button">{_e(head)}</button></th>' for head in heads), "</tr></thead><tbody>"]
    for row in ranked(summary):
        lines.append(f'<tr><td data-value="{_e(row.label)}">{_e(row.label)}{" (baseline)" if row.label == summary.baseline else ""}</td>')
        lines += [_cell(summary, row, metric) for metric in summary.metrics]
        lines += [f'<td data-value="{row.cost.get(name, 0.0):.9g}">{_e(cost_cell(row, name))}</td>' for name in costs]
        lines.append("</tr>")
    for row in summary.failed:
        lines.append(f'<tr class="failed"><td>{_e(row.label)}</td><td colspan="{len(heads) - 1}">failed: {_e(row.error or "no result")}</td></tr>')
    return "".join(lines) + "</tbody></table>"


def _cell(summary: Summary, row: Row, metric: str) -> str:
    if metric not in row.values:
        return '<td data-value="">-</td>'
    value, best = row.values[metric], summary.best(metric)
    state = "" if best is None else ' class="best"' if row is best else ' class="tied"' if row.tied_with_best.get(metric) else ""
    gap = row.versus_baseline.get(metric)
    share = row.first_share.get(metric)
    hint = [f"95 % interval {value.low:.3f} to {value.high:.3f}"]
    hint += [f"against {summary.baseline} {gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}], Holm p {gap.p_holm:.3f}"] if gap else []
    hint += [f"first in {100 * share:.0f} % of draws"] if share is not None else []
    spread = f" <small>±{(value.high - value.low) / 2:.3f}</small>" if value.high > value.low else ""
    return f'<td{state} data-value="{value.mean:.9g}" title="{_e("; ".join(hint))}">{value.mean:.3f}{spread}</td>'


def _texts(summary: Summary, chosen: str | None) -> str:
    parts: list[str] = []
    order = [row.label for row in ranked(summary)]
    for unit, held in list(summary.texts.items())[:SHOWN]:
        parts.append(f"<details{'' if parts else ' open'}><summary>{_e(unit)}: {_e(_cut(held['prompt'], 110))}</summary>")
        parts.append(f"<blockquote>{_e(held['prompt'])}</blockquote><div class=\"texts\">")
        parts.append(f'<article class="human"><h3>human</h3>{_e(held["reference"])}</article>')
        for label in order:
            mark = ' class="chosen"' if label == chosen else ""
            parts.append(f"<article{mark}><h3>{_e(label)}</h3>{_e(held['texts'].get(label, ''))}</article>")
        parts.append("</div></details>")
    return "".join(parts)


def _curves(summary: Summary) -> str:
    names = sorted({name for curves in summary.curves.values() for name in curves})
    drawn = [plots.lines({label: curves[name] for label, curves in summary.curves.items() if name in curves}, name) for name in names]
    figures = "".join(f"<figure>{svg}</figure>" for svg in drawn if svg)
    return f'<h2>Curves</h2><div class="grid">{figures}</div>' if figures else ""


def _knobs(row: Row) -> dict[str, Any]:
    """All of a method's knobs: those of the recipe, and the defaults of the others."""
    from echelon.errors import UserError
    from echelon.registry import named

    try:
        defaults = {knob.name: knob.default for card in named(row.method) if card.kind in KNOBS_OF for knob in card.knobs}
    except UserError:  # a task of the user's own has methods that are not registered
        defaults = {}
    return {**defaults, **row.knobs}


def _notes(row: Row) -> str:
    return "".join(f"<br>{_e(note)}" for note in row.notes)


def _identity(summary: Summary) -> dict[str, Any]:
    told = {name: value for name, value in summary.identity.items() if value is not None}
    recipe = {name: value for name, value in summary.recipe.items() if name != "methods"}
    return {**told, "recipe": json.dumps(recipe)}


def _flat(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def _e(text: str) -> str:
    return html.escape(str(text))


def png(summary: Summary, path: Path) -> None:
    """The quality-cost plot for places that show no SVG, where matplotlib is installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return

    metric, cost = summary.primary, summary.cost_axis
    rows = [row for row in summary.finished if metric in row.values and row.cost.get(cost, 0) > 0]
    if not rows:
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.subplots()
    front = summary.pareto(metric, cost)
    for row in rows:
        value = row.values[metric]
        colour = plots.BASELINE if row.label == summary.baseline else plots.FRONT if row.label in front else plots.OTHER
        axes.errorbar(row.cost[cost], value.mean, [[value.mean - value.low], [value.high - value.mean]], fmt="o", color=colour)
        axes.annotate(row.label, (row.cost[cost], value.mean), xytext=(6, 3), textcoords="offset points", fontsize=9)
    held = [summary.row(label) for label in front]
    axes.plot([row.cost[cost] for row in held], [row.values[metric].mean for row in held], "--", color=plots.FRONT)
    axes.set(xlabel=heading(cost), ylabel=heading(metric), title=summary.scale)
    if max(row.cost[cost] for row in rows) > 10 * min(row.cost[cost] for row in rows):
        axes.set_xscale("log")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    write_whole(path, content.getvalue())
