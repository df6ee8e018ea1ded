"""The one runner behind every bake-off: it knows nothing of any kind of method."""

import contextlib
import hashlib
import json
import os
import random
import selectors
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from echelon.compare.identity import foundations, identities, machine
from echelon.compare.recipe import MethodEntry, Recipe
from echelon.compare.results import SCHEMA, write_results
from echelon.compare.worker import Bench
from echelon.data.files import append_line, locked, read_text, write_whole

Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Run:
    """One method with one seed; ``key`` names its folder and says all that its result depends on."""

    key: str
    entry: MethodEntry
    seed: int


def plan(recipe: Recipe) -> list[Run]:
    """All runs: seeds outermost, methods shuffled within a seed, so that a machine's drift does not fall on one method."""
    depends, runs = foundations(recipe), []
    for seed in recipe.seeds:
        for entry in random.Random(seed).sample(recipe.methods, len(recipe.methods)):
            chosen = {"sweep": entry.sweep} if entry.sweep else {}
            said = json.dumps({**depends, "method": entry.name, "knobs": entry.knobs, **chosen, "seed": seed}, sort_keys=True)
            runs.append(Run(hashlib.sha256(said.encode()).hexdigest()[:16], entry, seed))
    return runs


def compare(recipe: Recipe, out: str | Path, on_progress: Progress | None = None) -> list[dict[str, Any]]:
    """Run what is not finished yet, and return the result of every run in the recipe's order.

    Each result is on disk before the next run begins. Runs that failed are tried again when asked again; finished ones cost nothing.

    Raises:
        UserError: if the folder cannot be written, or another process is at work in it.
    """
    out, tell = Path(out), on_progress or (lambda _: None)
    with locked(out, f"another comparison is writing to {out}; wait for it, or choose another --out"):
        runs = plan(recipe)
        write_whole(out / "recipe.json", json.dumps(recipe.to_dict(), indent=2) + "\n")
        done = {run.key: result for run in runs if (result := _finished(out, run.key)) is not None}
        write_results(out, list(done.values()))
        failed: dict[str, dict[str, Any]] = {}
        started, spent = time.monotonic(), 0
        with contextlib.ExitStack() as stack:
            place = stack.enter_context(_Place(recipe, out))
            for number, run in enumerate(runs):
                if run.key not in done:
                    spent += 1
                    tell({"done": number, "total": len(runs), "label": run.entry.label, "seed": run.seed, "status": "running"})
                    result = _result(recipe, run, place.run(run))
                    ok = result["run"]["status"] == "finished"
                    (done if ok else failed)[run.key] = result
                    if ok:
                        write_whole(out / "runs" / run.key / "result.json", json.dumps(result, indent=2) + "\n")
                    append_line(out / "results.jsonl", json.dumps(result))
                left = sum(other.key not in done and other.key not in failed for other in runs)
                seconds = (time.monotonic() - started) / max(1, spent) * left
                status = "failed" if run.key in failed else "finished"
                tell({"done": number + 1, "total": len(runs), "label": run.entry.label, "seed": run.seed, "status": status, "left_s": seconds})
            results = [_relabelled(done.get(run.key) or failed[run.key], run) for run in runs]
            write_results(out, results)
            _time_again(recipe, [run for run in runs if run.key in done and run.seed == recipe.seeds[0]], out, place, tell)
    return results


def _finished(out: Path, key: str) -> dict[str, Any] | None:
    path = out / "runs" / key / "result.json"
    return json.loads(read_text(path)) if path.is_file() else None


def _relabelled(result: dict[str, Any], run: Run) -> dict[str, Any]:
    """A label is only a name: changing it does not run a method again."""
    return {**result, "run": {**result["run"], "label": run.entry.label}}


def _result(recipe: Recipe, run: Run, answer: dict[str, Any]) -> dict[str, Any]:
    status = "failed" if "error" in answer else "finished"
    head = {"key": run.key, "task": recipe.task, "method": run.entry.name, "label": run.entry.label, "knobs": run.entry.knobs, "seed": run.seed}
    return {
        "schema": SCHEMA, "run": {**head, "status": status, "error": answer.get("error")},
        "quality": answer.get("quality", {}), "cost": answer.get("cost", {}), "budget": answer.get("budget", {}), "curves": answer.get("curves", {}),
        **{part: answer[part] for part in ("tuning", "notes") if answer.get(part)},
        "identity": {**machine(), "files": identities(recipe), "model": recipe.model, "scale": answer.get("scale", "")},
    }  # fmt: skip


def _time_again(recipe: Recipe, runs: list[Run], out: Path, place: "_Place", tell: Progress) -> None:
    """Time all methods in turn (A B C A B C ...): medians then share the machine's drift. Kept in ``timing.json``."""
    names = [run.key for run in runs]
    path = out / "timing.json"
    if not runs or not recipe.timing_rounds or (path.is_file() and json.loads(read_text(path))["keys"] == names):
        return
    measured: dict[str, list[float]] = {run.entry.label: [] for run in runs}
    for number in range(recipe.timing_rounds):
        for run in runs:
            tell({"done": number, "total": recipe.timing_rounds, "label": run.entry.label, "seed": run.seed, "status": "timing"})
            answer = place.timing(run)
            if "seconds" in answer:
                measured[run.entry.label].append(answer["seconds"])
    write_whole(path, json.dumps({"keys": names, "rounds": measured, "ratios": ratios(measured, recipe.baseline)}, indent=2) + "\n")


def ratios(measured: dict[str, list[float]], baseline: str) -> dict[str, float]:
    """Median over the rounds of each method's time over the baseline's in the same round; none where that takes no time, as a first stage does."""
    base = measured.get(baseline) or next(iter(measured.values()))
    if 0 in base:
        return {}
    return {label: statistics.median(a / b for a, b in zip(times, base, strict=False)) for label, times in measured.items() if times}


class _Place:
    """Where runs happen: in this process, in one worker, or in a worker each."""

    def __init__(self, recipe: Recipe, out: Path):
        self.recipe, self.out = recipe, out
        self.bench: Bench | None = None
        self.worker: _Worker | None = None

    def __enter__(self) -> "_Place":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def run(self, run: Run) -> dict[str, Any]:
        return self._ask({"do": "run", "entry": asdict(run.entry), "seed": run.seed, "out": str(self.out), "key": run.key})

    def timing(self, run: Run) -> dict[str, Any]:
        return self._ask({"do": "timing", "entry": asdict(run.entry)}, keep=True)

    def _ask(self, request: dict[str, Any], keep: bool = False) -> dict[str, Any]:
        if self.recipe.isolation == "none":
            self.bench = self.bench or Bench(self.recipe.to_dict(), self.out)
            return self.bench.answer(request)
        self.worker = self.worker or _Worker(self.recipe, self.out)
        answer = self.worker.ask(request, self.recipe.timeout)
        if self.recipe.isolation == "process":
            if "cost" in answer:
                answer["cost"]["peak_rss_bytes"] = max(answer["cost"]["peak_rss_bytes"], answer["cost"]["maxrss_bytes"])
            if not keep:
                self._stop()
        if self.worker is not None and self.worker.over:
            self._stop()
        if "cost" in answer:
            del answer["cost"]["maxrss_bytes"]
        return answer

    def _stop(self) -> None:
        if self.worker is not None:
            self.worker.stop()
            self.worker = None


class _Worker:
    """A worker process, asked by lines of JSON."""

    def __init__(self, recipe: Recipe, out: Path):
        paths = [str(Path(p).resolve()) for p in sys.path if p]  # the worker must find what this process finds, a user's task included
        self.log = open(out / "worker.log", "ab")  # noqa: SIM115 (closed in stop)
        self.log_start = self.log.tell()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "echelon.compare.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, start_new_session=True,
        )  # fmt: skip
        self.over = False
        self._send({"recipe": recipe.to_dict(), "out": str(out)})

    def _send(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()

    def ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        """One answer, with the peak memory of the process tree while it was worked out; or why there is none."""
        assert self.process.stdout is not None
        self._send(request)
        peak, until, held = 0, time.monotonic() + timeout, b""
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while not held.endswith(b"\n"):
                if selector.select(0.05):
                    piece = os.read(self.process.stdout.fileno(), 1 << 16)
                    if not piece:
                        self.over = True
                        return {"error": self._why_dead()}
                    held += piece
                peak = max(peak, _memory(self.process.pid))
                if time.monotonic() > until:
                    self.over = True
                    return {"error": f"gave no answer within the timeout of {timeout:g} s"}
        answer = json.loads(held)
        if "cost" in answer:
            answer["cost"]["peak_rss_bytes"] = peak
        return answer

    def _why_dead(self) -> str:
        code = self.process.wait()
        if code == -signal.SIGKILL:
            return "killed (SIGKILL; usually the machine ran out of memory)"
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        said = Path(self.log.name).read_bytes()[self.log_start :].decode(errors="replace").strip().splitlines()
        return f"its process ended with status {code}" + (f": {said[-1]}" if said else "")

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.log):
            with contextlib.suppress(OSError):
                stream.close()  # type: ignore[union-attr]


def _memory(pid: int) -> int:
    total = 0
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for one in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += one.memory_info().rss
    return total
