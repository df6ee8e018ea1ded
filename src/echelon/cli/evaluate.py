"""``echelon evaluate``: run a benchmark on your own documents."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from echelon.cli.options import parse
from echelon.data.files import read_text
from echelon.errors import UserError


@dataclass
class Options:
    """What to measure, and on which documents.

    Attributes:
        data: a .jsonl with a `text` in each line, a .txt, or a folder of these; for tofu the folder with its files.
        model: language model of the likelihood baselines; for tofu the model after unlearning.
        retain_only: for tofu, a model that was trained without what is to be forgotten, or the JSON that an earlier run printed of it.
        rankgen: RankGen folder, or `embedded`.
        scorers: comma-separated names out of those compared, to leave the others out.
        json: print JSON.
    """

    data: str | None = None
    model: str = "embedded"
    retain_only: str | None = None
    rankgen: str = "embedded"
    scorers: str | None = None
    json: bool = False


def run(arguments: Sequence[str]) -> int:
    options, benchmark, _ = parse(
        "evaluate", "Run a benchmark on your own documents.", Options, "benchmark", arguments, default_method="suffix_identification"
    )
    if options.data is None:
        raise UserError("--data is missing; give documents that nothing was trained on")
    if benchmark.method_name == "tofu":
        return _tofu(options, benchmark)
    if options.retain_only is not None:
        raise UserError(f"--retain_only is for tofu, not for {benchmark.method_name}")
    from echelon.evaluate.suffix_identification import baselines

    compared = baselines(options.model, options.rankgen)
    if options.scorers:
        wanted = [name.strip() for name in options.scorers.split(",")]
        for name in wanted:
            if name not in compared:
                raise UserError(f"unknown scorer {name!r} in --scorers; there are {'; '.join(compared)}")
        compared = {name: compared[name] for name in wanted}

    made = benchmark.evaluate(options.data, compared, _tell)
    print(json.dumps(made, indent=2) if options.json else as_table(made))
    return 0


def _tell(step: str) -> None:
    if sys.stderr.isatty():
        print(f"echelon: {step}", file=sys.stderr)


def _tofu(options: Options, benchmark: Any) -> int:
    from echelon.models import load

    retain_only: Any = options.retain_only
    if retain_only is not None and retain_only.endswith(".json"):
        try:
            retain_only = json.loads(read_text(retain_only))["truth_ratios"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"--retain_only {options.retain_only} holds no truth_ratios; give what `echelon evaluate --method tofu --json` printed") from error
    elif retain_only is not None:
        retain_only = load(retain_only)
    made = benchmark.evaluate(options.data, load(options.model), retain_only, _tell)
    print(json.dumps(made, indent=2) if options.json else tofu_table(made))
    return 0


def tofu_table(made: dict[str, Any]) -> str:
    """What is measured on each set, as a Markdown table, and behind it model utility and forget quality."""
    sets = {name: value for name, value in made.items() if isinstance(value, dict)}
    columns = list(next(iter(sets.values())))
    lines = ["| questions | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    lines += [f"| {name} | " + " | ".join(f"{measured[column]:.4f}" for column in columns) + " |" for name, measured in sets.items()]
    return "\n".join([*lines, "", *(f"{name}: {value:.4g}" for name, value in made.items() if isinstance(value, float))])


def as_table(made: dict[str, dict[str, dict[str, float]]]) -> str:
    """Accuracies in percent with their intervals, as a Markdown table."""
    columns = list(next(iter(made.values())))
    lines = ["| scorer | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for name, measured in made.items():
        cells = [f"{100 * m['value']:.1f} ({100 * m['low']:.1f} to {100 * m['high']:.1f})" for m in measured.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
