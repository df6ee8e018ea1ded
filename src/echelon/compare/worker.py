"""The process in which runs happen: it reads one request a line and writes one answer a line, and the results into files.

``python -m echelon.compare.worker`` is started by the runner, so that a crash, a leak or a thread setting stays in here.
"""

import contextlib
import io
import json
import math
import os
import resource
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from echelon.compare.recipe import MethodEntry, Recipe
from echelon.compare.task import Outcome, load_task
from echelon.data.files import write_whole


class Bench:
    """A task and its prepared context, made when first needed."""

    def __init__(self, recipe: dict[str, Any], out: str | Path):
        self.recipe = Recipe(**{**recipe, "methods": [MethodEntry(**entry) for entry in recipe["methods"]]})
        self.task = load_task(self.recipe.task)
        if hasattr(self.task, "folder"):
            self.task.folder = Path(out) / "shared"
        self._context: Any = None

    @property
    def context(self) -> Any:
        if self._context is None:
            self._context = self.task.prepare(self.recipe)
        return self._context

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Run or time one method; an exception becomes an ``error``."""
        entry = MethodEntry(**request["entry"])
        try:
            context = self.context
            started = time.perf_counter()
            if request["do"] == "timing":
                return {"seconds": self.task.timing(context, entry)}
            outcome = self.task.run(context, entry, request["seed"])
            return store(outcome, Path(request["out"]), request["key"], time.perf_counter() - started) | {"scale": self.task.describe(context)}
        except KeyboardInterrupt:
            raise
        except Exception as error:  # whatever a method raises is a row of the table, not the end of the comparison
            said = " ".join(str(error).split())
            return {"error": said if isinstance(error, ValueError) and said else f"{type(error).__name__}: {said}".removesuffix(": ")}


def store(outcome: Outcome, out: Path, key: str, seconds: float) -> dict[str, Any]:
    """Write arrays and samples into the run's folder; the rest is returned as plain values."""
    folder = out / "runs" / key
    arrays = {name: quality.per_unit for name, quality in outcome.quality.items() if quality.per_unit is not None}
    for name, quality in outcome.quality.items():
        if not math.isfinite(quality.value):
            return {"error": f"{name} is {quality.value}"}
        if quality.per_unit is not None and not np.isfinite(quality.per_unit).all():
            return {"error": f"{name} is not finite for unit {int((~np.isfinite(quality.per_unit)).argmax())}"}
    if arrays:
        packed = io.BytesIO()
        np.savez(packed, **arrays)  # type: ignore[arg-type]
        write_whole(folder / "per_unit.npz", packed.getvalue())
    write_whole(folder / "samples.json", json.dumps(outcome.samples))
    measured = {
        name: {
            "value": q.value, "unit": q.unit, "higher_is_better": q.higher_is_better, "n": 1 if q.per_unit is None else len(q.per_unit),
            "note": q.note, "per_unit": f"runs/{key}/per_unit.npz" if name in arrays else None,
        }
        for name, q in outcome.quality.items()
    }  # fmt: skip
    cost = {**outcome.cost, "wall_s": seconds, "maxrss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    made = {"quality": measured, "cost": cost, "budget": outcome.budget, "curves": outcome.curves}
    return made | ({"tuning": outcome.tuning} if outcome.tuning else {}) | ({"notes": outcome.notes} if outcome.notes else {})


def main() -> None:
    """Serve until the runner closes the pipe or dies."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not end up between the answers
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        bench = Bench(**json.loads(sys.stdin.readline()))
        for line in sys.stdin:
            print(json.dumps(bench.answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
