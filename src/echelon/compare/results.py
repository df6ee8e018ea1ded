"""Results on disk: ``runs/<key>/`` holds each run, ``results.jsonl`` one line for each."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from echelon.data.files import read_text, write_whole
from echelon.errors import UserError

SCHEMA = 1


def read_results(out: str | Path) -> list[dict[str, Any]]:
    """The lines of ``results.jsonl``; a line that a crash cut short is left out.

    Raises:
        UserError: if there are none, or they come from a later version.
    """
    found = []
    lines = read_text(Path(out) / "results.jsonl").split("\n")
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(json.loads(line))
            except ValueError as error:
                if number < len(lines):
                    raise UserError(f"{out}/results.jsonl, line {number}: not JSON") from error
    for result in found:
        if result.get("schema") != SCHEMA:
            raise UserError(f"{out}/results.jsonl has schema {result.get('schema')!r}; this version reads {SCHEMA}")
    return found


def write_results(out: Path, results: Sequence[dict[str, Any]]) -> None:
    write_whole(out / "results.jsonl", "".join(json.dumps(result) + "\n" for result in results))


def per_unit(out: str | Path, result: dict[str, Any], metric: str) -> np.ndarray | None:
    """A metric's value for every unit of a run, or None where it has only the one over all."""
    place = result["quality"].get(metric, {}).get("per_unit")
    if not place:
        return None
    with np.load(Path(out) / place, allow_pickle=False) as held:
        return held[metric]


def samples(out: str | Path, result: dict[str, Any]) -> list[dict[str, str]]:
    """A run's texts, one a unit."""
    path = Path(out) / "runs" / result["run"]["key"] / "samples.json"
    return json.loads(read_text(path)) if path.is_file() else []
