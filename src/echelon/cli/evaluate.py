"""``echelon evaluate``: run a benchmark on your own documents, or measure runs against judgements."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from echelon.cli.arguments import OneLineParser
from echelon.cli.options import parse
from echelon.data.files import read_text
from echelon.errors import UserError


@dataclass
class Options:
    """What to measure: a benchmark on documents, or runs against judgements.

    Attributes:
        run: a run (TREC, MS MARCO or JSON) to measure against --qrels; given once for each of several, in place of a benchmark.
        qrels: the judgements (TREC, BEIR, MS MARCO or JSON).
        measures: measures of runs, comma-separated, named as in ir_measures: nDCG, AP, RR, R, P, Success, Judged, RBP; as in `AP(rel=2)@100`.
        baseline: the run that others are held against; the first one when not given.
        per_query: file for the value of every run, measure and query, tab-separated.
        data: a .jsonl with a `text` in each line, a .txt, or a folder of these; for tofu the folder with its files.
        model: language model of the likelihood baselines; for tofu the model after unlearning.
        retain_only: for tofu, a model that was trained without what is to be forgotten, or the JSON that an earlier run printed of it.
        rankgen: RankGen folder, or `embedded`.
        scorers: comma-separated names out of those compared, to leave the others out.
        json: print JSON.
    """

    run: str | None = None
    qrels: str | None = None
    measures: str = "nDCG@10,AP,R@100"
    baseline: str | None = None
    per_query: str | None = None
    data: str | None = None
    model: str = "embedded"
    retain_only: str | None = None
    rankgen: str = "embedded"
    scorers: str | None = None
    json: bool = False


ABOUT = "Run a benchmark on your own documents, or measure runs against judgements."
OF_RUNS = ("qrels", "baseline", "per_query")


def run(arguments: Sequence[str]) -> int:
    runs, rest = _runs(arguments)
    if runs and not {"-h", "--help"} & set(rest):
        options, _, _ = parse("evaluate", ABOUT, Options, "", rest)
        if options.data is not None:
            raise UserError("--data is for benchmarks and --run for runs; give one of them")
        from echelon.cli.evaluate_runs import evaluate_runs

        return evaluate_runs(runs, options)
    options, benchmark, _ = parse("evaluate", ABOUT, Options, "benchmark", rest, default_method="suffix_identification")
    for name in OF_RUNS:
        if getattr(options, name) is not None:
            raise UserError(f"--{name} is for runs; give at least one --run")
    if options.data is None:
        raise UserError("--data is missing; give documents that nothing was trained on, or --run and --qrels to measure runs")
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


def _runs(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The value of each ``--run``, which may stand several times, and the other words."""
    parser = OneLineParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--run", action="append", default=[])
    chosen, rest = parser.parse_known_args(list(arguments))
    return chosen.run, rest


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
