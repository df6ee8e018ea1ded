"""The comparison as a table: for the terminal and as Markdown."""

from rich.table import Table

from echelon.compare.summary import Row, Summary


def cell(summary: Summary, row: Row, metric: str) -> str:
    """A mean with half the width of its interval; ``*`` for the best, ``=`` for those tied with it."""
    if metric not in row.values:
        return "-"
    value = row.values[metric]
    spread = f" ±{(value.high - value.low) / 2:.3f}" if value.n > 1 or value.seeds > 1 else ""
    best = summary.best(metric)
    mark = "" if best is None else " *" if row is best else " =" if row.tied_with_best.get(metric) else ""
    return f"{value.mean:.3f}{spread}{mark}"


def cost_columns(summary: Summary) -> list[str]:
    """The costs worth a column: those per unit, and memory where it was measured for each run."""
    names = {name for row in summary.finished for name in row.cost}
    per_unit = sorted((name for name in names if "_per_" in name), key=lambda name: (name != summary.cost_axis, name))
    memory = ["peak_rss_bytes"] if "peak_rss_bytes" in names and summary.recipe.get("isolation") == "process" else []
    return per_unit + [name for name in summary.columns if name in names] + memory


def cost_cell(row: Row, name: str) -> str:
    if name not in row.cost:
        return "-"
    return f"{row.cost[name] / 2**20:.0f} MiB" if name.endswith("_bytes") else f"{row.cost[name]:.3g}"


def heading(name: str) -> str:
    return name.removesuffix("_bytes").replace("_", " ")


def legend(summary: Summary) -> str:
    base = f"±: half a 95 % interval over {summary.units}"
    return f"{base}; *: best; =: not told apart from the best; metrics without * or = have no better direction, or no {summary.units} to test"


def notes(summary: Summary) -> list[str]:
    """What stands beside single rows, one line each."""
    return [f"{row.label}: {note}" for row in ranked(summary) for note in row.notes]


def terminal(summary: Summary) -> Table:
    """A rich table, best first by the primary metric; failed runs last."""
    table = Table(title=f"{summary.recipe['task']} on {summary.recipe['model']}: {summary.scale}", caption=legend(summary))
    costs = cost_columns(summary)
    table.add_column("method", no_wrap=True)
    for metric, held in summary.metrics.items():
        arrow = {True: " ↑", False: " ↓", None: ""}[held.higher_is_better]
        table.add_column(heading(metric) + arrow, justify="right")
    for name in costs:
        table.add_column(heading(name), justify="right")
    for row in ranked(summary):
        cells = [cell(summary, row, metric) for metric in summary.metrics]
        style = "bold" if row is summary.best(summary.primary) else None
        table.add_row(row.label, *cells, *(cost_cell(row, name) for name in costs), style=style)
    for row in summary.failed:
        table.add_row(row.label, f"failed: {row.error}", style="red")
    return table


def ranked(summary: Summary) -> list[Row]:
    """Finished rows, best first by the primary metric."""
    metric = summary.metrics.get(summary.primary)
    sign = -1 if metric is not None and metric.higher_is_better is False else 1
    held = [row for row in summary.finished if summary.primary in row.values]
    rest = [row for row in summary.finished if summary.primary not in row.values]
    return sorted(held, key=lambda row: -sign * row.values[summary.primary].mean) + rest


def markdown(summary: Summary) -> str:
    """The same as a Markdown table."""
    costs = cost_columns(summary)
    head = ["method", *map(heading, summary.metrics), *map(heading, costs)]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for row in ranked(summary):
        cells = [_plain(row.label), *(cell(summary, row, m) for m in summary.metrics), *(cost_cell(row, c) for c in costs)]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [f"| {_plain(row.label)} | failed: {_plain(row.error or '')} |" + " |" * (len(head) - 2) for row in summary.failed]
    told = "".join(f"\n- {note}" for note in notes(summary))
    return "\n".join(lines) + f"\n\n{legend(summary)}. {summary.scale}.\n" + differences(summary) + (f"{told}\n" if told else "")


def differences(summary: Summary) -> str:
    """A Markdown table of what each method differs by from the baseline, with its interval and its p-value; nothing where there is nothing to test."""
    metrics = [name for name in summary.metrics if any(name in row.versus_baseline for row in summary.finished)]
    if not metrics:
        return ""
    lines = ["| method | " + " | ".join(map(heading, metrics)) + " |", "|---|" + "---:|" * len(metrics)]
    for row in ranked(summary):
        gaps = [row.versus_baseline.get(metric) for metric in metrics]
        if any(gaps):
            cells = [f"{gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}] p {gap.p_holm:.2g}" if gap else "-" for gap in gaps]
            lines.append("| " + " | ".join([_plain(row.label), *cells]) + " |")
    about = f"Against {_plain(summary.baseline)}: difference, 95 % interval, and p of the sign-flip test after Holm's correction over this table."
    return f"\n{about}\n\n" + "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
