"""``echelon evaluate``: run a benchmark on your own documents."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from echelon.cli.options import parse
from echelon.errors import UserError


@dataclass
class Options:
    """What to measure, and on which documents.

    Attributes:
        data: a .jsonl with a `text` in each line, a .txt, or a folder of these.
        model: language model of the likelihood baselines.
        rankgen: RankGen folder, or `embedded`.
        scorers: comma-separated names out of those compared, to leave the others out.
        json: print JSON.
    """

    data: str | None = None
    model: str = "embedded"
    rankgen: str = "embedded"
    scorers: str | None = None
    json: bool = False


def run(arguments: Sequence[str]) -> int:
    options, benchmark, _ = parse(
        "evaluate", "Run a benchmark on your own documents.", Options, "benchmark", arguments, default_method="suffix_identification"
    )
    if options.data is None:
        raise UserError("--data is missing; give documents that nothing was trained on")
    from echelon.evaluate.suffix_identification import baselines

    compared = baselines(options.model, options.rankgen)
    if options.scorers:
        wanted = [name.strip() for name in options.scorers.split(",")]
        for name in wanted:
            if name not in compared:
                raise UserError(f"unknown scorer {name!r} in --scorers; there are {'; '.join(compared)}")
        compared = {name: compared[name] for name in wanted}

    def tell(step: str) -> None:
        if sys.stderr.isatty():
            print(f"echelon: {step}", file=sys.stderr)

    made = benchmark.evaluate(options.data, compared, tell)
    print(json.dumps(made, indent=2) if options.json else as_table(made))
    return 0


def as_table(made: dict[str, dict[str, dict[str, float]]]) -> str:
    """Accuracies in percent with their intervals, as a Markdown table."""
    columns = list(next(iter(made.values())))
    lines = ["| scorer | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for name, measured in made.items():
        cells = [f"{100 * m['value']:.1f} ({100 * m['low']:.1f} to {100 * m['high']:.1f})" for m in measured.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
