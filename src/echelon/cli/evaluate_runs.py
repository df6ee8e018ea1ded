"""``echelon evaluate --run``: runs against judgements and against each other."""

import json
import re
import statistics
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from echelon.data.files import write_whole
from echelon.data.runs import Qrels, Run, read_qrels, read_run
from echelon.errors import UserError
from echelon.registry import suggest


def evaluate_runs(paths: Sequence[str], options: Any) -> int:
    """Measure the runs in these files and print what was found.

    Args:
        paths: of the runs.
        options: with ``qrels``, ``measures``, ``baseline``, ``per_query`` and ``json``.
    """
    if options.qrels is None:
        raise UserError("--qrels is missing; give the judgements that the runs are measured against")
    from echelon.evaluate.ranking import parse_measure

    names = [name.strip() for name in re.split(r",(?![^(]*\))", options.measures)]
    for name in names:
        parse_measure(name)
    labels = _labels(paths)
    baseline = _picked(options.baseline, paths, labels)
    qrels = read_qrels(options.qrels)
    runs = {label: read_run(path) for label, path in zip(labels, paths, strict=True)}
    found = Found.of(runs, qrels, names, baseline)
    if options.per_query is not None:
        lines = (
            f"{label}\t{name}\t{qid}\t{value!r}\n" for label, held in found.values.items() for name, each in held.items() for qid, value in each.items()
        )  # fmt: skip
        write_whole(options.per_query, "run\tmeasure\tquery\tvalue\n" + "".join(lines))
    print(json.dumps(found.told(), indent=2) if options.json else found.table())
    return 0


@dataclass(frozen=True)
class Found:
    """What was measured.

    Attributes:
        values: by run, measure and query.
        baseline: run that the others are held against.
        against: by run and measure, all corrected together by Holm.
        agreement: by run, with the baseline: mean Kendall's tau and mean rank-biased overlap over queries.
    """

    values: dict[str, dict[str, dict[str, float]]]
    baseline: str
    against: dict[str, dict[str, Any]]
    agreement: dict[str, dict[str, float]]

    @classmethod
    def of(cls, runs: dict[str, Run], qrels: Qrels, names: Sequence[str], baseline: str) -> "Found":
        import numpy as np

        from echelon.evaluate.agreement import kendall_tau, rbo
        from echelon.evaluate.ranking import measures
        from echelon.evaluate.significance import corrected, paired

        values = {}
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for label, run in runs.items():
                try:
                    values[label] = measures(run, qrels, names)
                except UserError as error:
                    raise UserError(f"{label}: {error}") from error
                _tell_unmatched(label, run, qrels)
        for message in dict.fromkeys(str(one.message) for one in said):
            print(f"echelon: {message}", file=sys.stderr)
        arrays = {label: {name: np.array(list(each.values())) for name, each in held.items()} for label, held in values.items()}
        others = [label for label in runs if label != baseline]
        places = [(label, name) for label in others for name in names]
        family = corrected([paired(arrays[label][name], arrays[baseline][name]) for label, name in places])
        against: dict[str, dict[str, Any]] = {label: {} for label in others}
        for (label, name), one in zip(places, family, strict=True):
            against[label][name] = one
        agreement: dict[str, dict[str, float]] = {label: {} for label in others}
        for label in others:
            for name, each in (("Kendall's tau", kendall_tau(runs[label], runs[baseline])), ("RBO(p=0.9)", rbo(runs[label], runs[baseline]))):
                if each:
                    agreement[label][name] = statistics.fmean(each.values())
        return cls(values, baseline, against, agreement)

    @property
    def queries(self) -> int:
        return len(next(iter(self.values[self.baseline].values())))

    def means(self) -> dict[str, dict[str, float]]:
        return {label: {name: statistics.fmean(each.values()) for name, each in held.items()} for label, held in self.values.items()}

    def told(self) -> dict[str, Any]:
        """All of it but the single queries, for JSON."""
        against = {label: {name: asdict(one) for name, one in held.items()} for label, held in self.against.items()}
        return {"queries": self.queries, "mean": self.means(), "baseline": self.baseline, "against_baseline": against, "agreement": self.agreement}

    def table(self) -> str:
        """Means as a Markdown table, and behind it, where there are several runs, their differences to the baseline."""
        means = self.means()
        columns = list(means[self.baseline])
        lines = ["| run | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
        lines += [f"| {label} | " + " | ".join(f"{held[name]:.4f}" for name in columns) + " |" for label, held in means.items()]
        if self.against:
            lines += ["", f"Against {self.baseline}, over {self.queries} queries (p of both tests, and of the second after Holm's correction):", ""]
            lines += ["| run | measure | difference | 95 % interval | t-test | sign-flip | Holm | win/tie/loss |", "|---|---|" + "---:|" * 6]
            lines += [
                f"| {label} | {name} | {one.difference:+.4f} | {one.low:+.4f} to {one.high:+.4f} | {one.p_t:.2g} | {one.p_sign_flip:.2g} "
                f"| {one.p_holm:.2g} | {one.wins}/{one.ties}/{one.losses} |"
                for label, held in self.against.items() for name, one in held.items()
            ]  # fmt: skip
            lines += ["", *(
                f"{label} ranks as {self.baseline} with " + ", ".join(f"{name} {value:.3f}" for name, value in held.items())
                for label, held in self.agreement.items() if held
            )]  # fmt: skip
        return "\n".join(lines).rstrip()


def _labels(paths: Sequence[str]) -> list[str]:
    """Names of the files without their ending, or whole paths where those are not unique."""
    for place, path in enumerate(paths):
        if path in paths[:place]:
            raise UserError(f"--run {path} is given twice")
    stems = [Path(path).stem for path in paths]
    return list(paths) if len(set(stems)) < len(stems) else stems


def _picked(told: str | None, paths: Sequence[str], labels: Sequence[str]) -> str:
    if told is None:
        return labels[0]
    if told in paths:
        return labels[list(paths).index(told)]
    if told not in labels:
        raise UserError(f"--baseline is {told!r}{suggest(told, [*labels, *paths])}; it must be one of the runs: {', '.join(labels)}")
    return told


def _tell_unmatched(label: str, run: Run, qrels: Qrels) -> None:
    unknown, missing = [qid for qid in run if qid not in qrels], [qid for qid in qrels if qid not in run]
    if unknown:
        print(f"echelon: {label}: {len(unknown)} queries have no judgements and are left out ({unknown[0]}, ...)", file=sys.stderr)
    if missing:
        print(f"echelon: {label}: {len(missing)} of {len(qrels)} judged queries are not in the run and count 0 ({missing[0]}, ...)", file=sys.stderr)
