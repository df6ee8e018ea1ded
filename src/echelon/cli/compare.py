"""``echelon compare``: run a bake-off and write its report."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echelon.cli.options import parse
from echelon.cli.progress import progress, quiet_libraries
from echelon.errors import UserError


@dataclass
class Options:
    """Where the results go, and what is asked of them.

    Attributes:
        out: folder for results, table, plots and report; a comparison that was interrupted goes on there.
        in_process: run everything in this process (no isolation, no memory figures).
        dry_run: list the runs that would be done, and stop.
        pick: a metric: print the command line of the method that is best at it.
        limit: bounds on costs for the recommendation and --pick, as in `seconds_per_prompt<=2x,scorer_calls_per_prompt<=20`.
        against: folder of an earlier comparison: print what changed since.
        json: print the results as JSON lines in place of the table.
    """

    out: str = "runs"
    in_process: bool = False
    dry_run: bool = False
    pick: str | None = None
    limit: str = ""
    against: str | None = None
    json: bool = False


def run(arguments: Sequence[str]) -> int:
    options, _, words = parse(
        "compare", "Run a bake-off and write its report.", Options, "", arguments,
        positional=("recipe", "a YAML file, or the name of a built-in recipe (default: quick)"),
    )  # fmt: skip
    if len(words) > 1:
        raise UserError(f"one recipe at a time; got {', '.join(words)}")
    import dataclasses

    from echelon.compare import load_recipe

    quiet_libraries()
    recipe = load_recipe(words[0] if words else "quick")
    if options.in_process:
        recipe = dataclasses.replace(recipe, isolation="none")
    out = Path(options.out)
    if options.dry_run:
        return _dry_run(recipe, out)
    from rich.console import Console

    from echelon.compare import recommend, write_report
    from echelon.compare.runner import compare
    from echelon.compare.statistics import summary_of
    from echelon.compare.table import notes, terminal

    try:
        with progress() as bar:
            task = bar.add_task("starting", total=None)

            def show(event: dict[str, Any]) -> None:
                name = f"timing {event['label']}" if event["status"] == "timing" else event["label"]
                bar.update(task, description=name, completed=event["done"], total=event["total"])

            results = compare(recipe, out, show)
    except KeyboardInterrupt:
        print(f"echelon: stopped; finished runs are in {out}, and the same command goes on from there", file=sys.stderr)
        return 130
    summary = summary_of(out, recipe, results)
    advice = recommend(summary, options.pick or summary.primary, options.limit)
    write_report(summary, advice, out)
    if options.pick:
        if advice.command is None:
            raise UserError(advice.text)
        print(advice.command)
        return 0
    if options.json:
        for result in results:
            print(json.dumps(result, sort_keys=True))
    else:
        Console(width=None if sys.stdout.isatty() else 160).print(terminal(summary))
        print("".join(f"- {note}\n" for note in notes(summary)), end="")
        print(advice.text)
        print(f"\nreport: {out / 'report.html'}", file=sys.stderr)
    if options.against:
        from echelon.compare.against import against

        changes = against(Path(options.against), out)
        print("\n".join(changes) if changes else f"nothing changed since {options.against}")
    return 0


def _dry_run(recipe: Any, out: Path) -> int:
    from echelon.compare.runner import plan

    for run in plan(recipe):
        state = "finished" if (out / "runs" / run.key / "result.json").is_file() else "to do"
        print(f"{run.key}  {state:8}  seed {run.seed}  {run.entry.label}  {run.entry.knobs or ''}".rstrip())
    return 0
