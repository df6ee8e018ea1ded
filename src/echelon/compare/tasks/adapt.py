"""Adapters, compared at equal trained parameters and equal steps on the same batches in the same order, each at its own best learning rate.

The knob that sets an adapter's size is solved for what a LoRA of the budget's rank trains on the same layers, by exact count; where that cannot be met, the
nearest is taken and said. A classifier's new head is trained beside every adapter, at a rate of its own, and not counted. LoRA, rsLoRA, DoRA, PiSSA, VeRA and
AdaLoRA are PEFT's. Learning rates are chosen once for all seeds, on units that are neither trained on nor tested.
"""

import json
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from echelon.compare.adapted import ADALORA, SIZES, Adapted, Batches, adapted, config_of, kind_of, sized, trained_parameters
from echelon.compare.documents import PASSAGES, documents
from echelon.compare.downstream import METRICS, Classified, Downstream, Row, Written
from echelon.compare.task import Outcome, Quality, check_keys
from echelon.compare.tuning import Sweeps, evenly, is_whole, published, tries, tuned, tuning_notes
from echelon.data.e2e import Meaning, read_e2e
from echelon.data.glue import TASKS, read_glue
from echelon.errors import UserError
from echelon.linalg.checks import number
from echelon.models.loading import embedded_encoder_dir
from echelon.registry import card, suggest

DATA: dict[str, Any] = {
    "tasks": ["text"], "train": "passages", "test": "passages", "e2e": None, "glue": None, "units": 100, "tune_units": 50, "max_length": 256,
}  # fmt: skip
BUDGET: dict[str, Any] = {
    "lora_rank": 4, "steps": 100, "tune_steps": None, "batch_size": 8, "warmup": 0.1, "head_lr": 1e-3, "max_new_tokens": 60, "target_modules": "all-linear",
}  # fmt: skip
LR = 1e-3
_TOLERANCE = 0.005  # of the budget, within which nothing is said


@dataclass
class Context:
    """Work shared by all runs; ``sizes`` fills as methods come."""

    tasks: list[Downstream]
    rows: dict[str, list[Row]]
    budget: dict[str, Any]
    allowed: int
    metrics: list[str]
    sweeps: Sweeps
    sizes: dict[str, tuple[dict[str, int], int]] = field(default_factory=dict)


class Task:
    """Adapters on one model.

    Recipe keys: ``data.tasks`` holds ``text`` and ``e2e``, for language models, or ``sst2``, ``rte``, ``mrpc`` and ``cola``, for encoders (``model:
    embedded`` is MiniLM then). ``data.train`` and ``data.test`` of ``text`` are ``passages`` (the two halves of the prose that ships) or files (.txt, .jsonl)
    and folders of them; ``data.e2e`` is a folder with the E2E challenge's ``devset.csv``, which is trained on, and ``testset_w_refs.csv``; ``data.glue`` a
    folder with the other tasks' files. ``data.units`` are tested of each task, spread evenly (0: all), ``data.tune_units`` taken off the training for
    sweeps; rows longer than ``data.max_length`` tokens are cut. ``budget.lora_rank`` is that of the LoRA whose trained parameters every method may have;
    ``budget.tune_steps`` are those of a try, a third of ``budget.steps`` by default. ``lr`` among a method's knobs, or in its sweep, is the optimizer's.
    Sizes and sweeps are kept for all runs of a process, so that isolation ``worker`` solves and tries once.
    """

    kind = ""  # there are two, and AdaLoRA; `check` builds the methods
    unit = "unit"
    cost_axis = "seconds_per_step"
    primary = ""
    reference = ""
    sweeps = True
    folder = Path()
    columns = ("trained_parameters", "adapter_kb", "tuning_seconds")

    def check(self, recipe: Any) -> None:
        check_keys({"data": DATA, "budget": BUDGET}, recipe)
        data, budget = {**DATA, **recipe.data}, {**BUDGET, **recipe.budget}
        tasks = data["tasks"]
        if not isinstance(tasks, list) or not tasks or len(set(map(str, tasks))) < len(tasks):
            raise UserError(f"data.tasks is {tasks!r}; it must be a list of different ones of {', '.join(METRICS)}")
        for task in tasks:
            if task not in METRICS:
                raise UserError(f"unknown task {task!r} in data.tasks{suggest(str(task), METRICS)}; they are {', '.join(METRICS)}")
        if len({task in TASKS for task in tasks}) > 1:
            raise UserError(f"data.tasks is {tasks}; text and e2e are for language models, the others for encoders: compare them in two recipes")
        for name, least in (("units", 0), ("tune_units", 1), ("max_length", 8)):
            if not is_whole(data[name], least):
                raise UserError(f"data.{name} is {data[name]!r}; it must be a whole number of at least {least}")
        for name in ("lora_rank", "steps", "batch_size", "max_new_tokens", *(["tune_steps"] if budget["tune_steps"] is not None else [])):
            if not is_whole(budget[name], 1):
                raise UserError(f"budget.{name} is {budget[name]!r}; it must be a whole number of at least 1")
        number("budget.warmup", budget["warmup"], 0, 1)
        number("budget.head_lr", budget["head_lr"], 0, 1, open_low=True)
        for metric in recipe.metrics:
            if metric not in names(tasks):
                raise UserError(f"unknown metric {metric!r}{suggest(metric, names(tasks))}; with these tasks metrics are {', '.join(names(tasks))}")
        for path in self._files(data):
            if not path.exists():
                raise UserError(f"data: no file {path}; give data.e2e and data.glue the folders with the files of their tasks, data.train and data.test texts")
        for entry in recipe.methods:
            knob = SIZES.get(entry.name, "r")
            for knobs in tries(entry):
                rate = knobs.pop("lr", LR)
                number(f"lr of {entry.label}", rate, 0, float("inf"), open_low=True, open_high=True)
                for fixed, why in ((knob, "solved for the budget"), ("target_modules", "the budget's")):
                    if fixed in knobs:
                        raise UserError(f"{fixed} of {entry.label} is {why}; leave it out")
                config_of(entry.name, knobs, budget["target_modules"])

    def sources(self, recipe: Any) -> list[Path]:
        data = {**DATA, **recipe.data}
        encoder = [embedded_encoder_dir()] if recipe.model == "embedded" and data["tasks"][0] in TASKS else []
        return self._files(data) + encoder

    def describe(self, context: Context) -> str:
        told = ", ".join(f"{task.name} ({len(task.test)} units)" for task in context.tasks)  # type: ignore[attr-defined]
        size = f"{context.tasks[0].fresh(0).model.num_parameters() / 1e6:.1f} M parameters"
        return f"{size}, {context.budget['steps']} steps of {context.budget['batch_size']} rows, {told}"

    def command(self, recipe: dict[str, Any], method: str, knobs: dict[str, Any]) -> list[str]:
        """The command line that trains this adapter on a language model, without the size that was solved for."""
        if {**DATA, **recipe["data"]}["tasks"][0] in TASKS or method == ADALORA:
            return []
        budget = {**BUDGET, **recipe["budget"]}
        rates = [value for name, value in knobs.items() if name.partition(" ")[0] == "lr"]
        told = [(f"--method.{name}", value) for name, value in knobs.items() if name.partition(" ")[0] != "lr"]
        told += [("--method.target_modules", budget["target_modules"]), ("--lr", (rates or [LR])[0])]
        words = [word for name, value in told for word in (name, value if isinstance(value, str) else json.dumps(value))]
        size = ["--steps", str(budget["steps"]), "--batch_size", str(budget["batch_size"])]
        return ["adapt", "--model", recipe["model"], "--method", method, *words, *size, "--data", "FILE", "--out", "FOLDER"]

    def prepare(self, recipe: Any) -> Context:
        data, budget = {**DATA, **recipe.data}, {**BUDGET, **recipe.budget}
        budget["tune_steps"] = budget["tune_steps"] or max(1, budget["steps"] // 3)
        sweeps = any(entry.sweep for entry in recipe.methods)
        tasks = [self._task(name, recipe.model, data, budget, sweeps) for name in data["tasks"]]
        first = tasks[0].fresh(0)
        allowed = trained_parameters(first.model, "lora", {"r": budget["lora_rank"]}, budget["target_modules"], tasks[0].task_type)
        return Context(tasks, {task.name: task.rows(first.tokenizer) for task in tasks}, budget, allowed, recipe.metrics, Sweeps(self.folder, recipe))

    def run(self, context: Context, entry: Any, seed: int) -> Outcome:
        knobs, used = self._sized(context, entry)
        quality: dict[str, Quality] = {}
        cost: dict[str, float] = {"trained_parameters": float(used)}
        samples, curves, told, seconds, orders = [], {}, self._size_notes(context, used, knobs), [], []
        tuning: dict[str, Any] = {"chosen": {}, "tried": [], "at_edge": [], "cost": {"seconds": 0.0, "steps": 0}}
        for task in context.tasks:
            chosen, how = self._tuned(context, task, entry)
            if how:
                behind = "" if len(context.tasks) == 1 else f" on {task.name}"
                tuning["chosen"] |= {name + behind: value for name, value in how["chosen"].items()}
                tuning["tried"] += [{"task": task.name, **one} for one in how["tried"]]
                tuning["at_edge"] += [name + behind for name in how["at_edge"]]
                tuning["cost"] = {key: value + how["cost"][key] for key, value in tuning["cost"].items()}
                told += [f"{task.name}: {note}" for note in tuning_notes(how, "tuning units")]
            made, order = self._train(context, task, entry.name, {**knobs, **chosen}, context.budget["steps"], seed)
            found = task.measure(made.loaded)
            quality |= {f"{metric}_{task.name}": one for metric, one in found.quality.items()}
            samples += found.samples
            curves[f"training loss of {task.name} against steps"] = [[step + 1.0, loss] for step, loss in enumerate(made.losses)]
            seconds += made.seconds
            orders.append(order)
            cost["adapter_kb"] = max(cost.get("adapter_kb", 0.0), saved_bytes(made) / 1e3)
        cost["seconds_per_step"] = statistics.median(seconds)
        if tuning["tried"]:
            cost |= {"tuning_seconds": tuning["cost"]["seconds"], "tuning_steps": tuning["cost"]["steps"]}
        wanted = context.metrics or list(quality)
        return Outcome(
            {name: one for name, one in quality.items() if name in wanted}, cost,
            {"unit": "trained parameters", "allowed": context.allowed, "used": used, "steps": context.budget["steps"], "order": " ".join(orders)},
            samples, curves, tuning if tuning["tried"] else {}, told + ([] if entry.name == ADALORA else published(card(entry.name, kind_of(entry.name)))),
        )  # fmt: skip

    def timing(self, context: Context, entry: Any) -> float:
        """Median seconds of a step over five of them, on the first task."""
        knobs, _ = self._sized(context, entry)
        made, _ = self._train(context, context.tasks[0], entry.name, knobs, 5, 0)
        return statistics.median(made.seconds)

    def _task(self, name: str, model: str, data: dict[str, Any], budget: dict[str, Any], sweeps: bool) -> Downstream:
        aside = data["tune_units"] if sweeps else 0
        if name in TASKS:
            rows = [read_glue(data["glue"], name, part) for part in ("train", "tune", "test")]
            train, tune = _apart(rows[0], rows[1], rows[2], aside, name)
            train, test = evenly(train, budget["steps"] * budget["batch_size"]), evenly(rows[2], data["units"] or len(rows[2]))
            return Classified(name, model, train, tune, test, data["max_length"])
        if name == "e2e":
            meanings, tested = (read_e2e(Path(data["e2e"]) / file) for file in ("devset.csv", "testset_w_refs.csv"))
        else:
            meanings, tested = ([Meaning("", (text,)) for text in documents(data[key], half)] for key, half in (("train", "calibration"), ("test", "test")))
        told, aimed = _apart(meanings, [], tested, aside, name)
        shown = evenly(tested, data["units"] or len(tested))
        return Written(name, model, told, aimed, shown, budget["max_new_tokens"] if name == "e2e" else 0, data["max_length"])

    def _files(self, data: dict[str, Any]) -> list[Path]:
        tasks, found = data["tasks"], []
        if "text" in tasks:
            found += [Path(str(data[key])) for key in ("train", "test") if data[key] != "passages"] or sorted(PASSAGES.glob("*.jsonl"))
        if "e2e" in tasks:
            found += [Path(str(data["e2e"])) / file for file in ("devset.csv", "testset_w_refs.csv")]
        for task in tasks:
            source = TASKS.get(task)
            found += [Path(str(data["glue"])) / file for file in (source.train, source.tune, source.test) if file] if source else []
        return found

    def _sized(self, context: Context, entry: Any) -> tuple[dict[str, Any], int]:
        """An entry's knobs with the one that sets its size, and the trained parameters that this means."""
        knobs = {name: value for name, value in entry.knobs.items() if name != "lr"}
        key = json.dumps([entry.name, knobs], sort_keys=True)
        if key not in context.sizes:
            task = context.tasks[0]
            model, targets = task.fresh(0).model, context.budget["target_modules"]
            most = max(model.config.hidden_size, context.budget["lora_rank"])
            context.sizes[key] = sized(model, entry.name, knobs, targets, context.allowed, most, task.task_type)
        size, used = context.sizes[key]
        return {**knobs, **size}, used

    def _size_notes(self, context: Context, used: int, knobs: dict[str, Any]) -> list[str]:
        told = f"trains {used:,} parameters, {100 * used / context.allowed:.1f} % of what LoRA of rank {context.budget['lora_rank']} does"
        size = ", ".join(f"{name} {value}" for name, value in knobs.items() if name in ("r", "target_r", "num_basis"))
        return [f"{told}, at {size}" + ("" if abs(used / context.allowed - 1) <= _TOLERANCE else "; no setting comes nearer: not quite the same budget")]

    def _tuned(self, context: Context, task: Downstream, entry: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """A method's knobs on a task, and how they were chosen: on the first order of batches, whatever the seed of the run."""
        size, _ = self._sized(context, entry)
        steps = context.budget["tune_steps"]

        def tried_with(knobs: dict[str, Any]) -> dict[str, Any]:
            def make() -> dict[str, Any]:
                return {"loss": task.tuning_loss(self._train(context, task, entry.name, {**size, **knobs}, steps, 0)[0].loaded)}

            return context.sweeps.kept([task.name, entry.name, {**size, **knobs}], make)

        return tuned(entry, tried_with, steps=steps)

    def _train(self, context: Context, task: Downstream, name: str, knobs: dict[str, Any], steps: int, seed: int) -> tuple[Adapted, str]:
        budget, own = context.budget, {knob: value for knob, value in knobs.items() if knob != "lr"}
        batches = Batches(context.rows[task.name], budget["batch_size"], steps, seed)
        config = config_of(name, own, budget["target_modules"], steps=steps, task_type=task.task_type, seed=seed)
        made = adapted(task, batches, config, lr=knobs.get("lr", LR), head_lr=budget["head_lr"], warmup=budget["warmup"], seed=seed)
        return made, batches.digest()


def names(tasks: list[str]) -> list[str]:
    """Metrics of these tasks."""
    return [f"{metric}_{task}" for task in tasks for metric in METRICS[task]]


def saved_bytes(made: Adapted) -> int:
    """Bytes of the adapter's file."""
    with tempfile.TemporaryDirectory() as folder:
        made.tuned.save_pretrained(folder, save_embedding_layers=False)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def _apart(train: list[Any], tune: list[Any], test: list[Any], count: int, name: str) -> tuple[list[Any], list[Any]]:
    """Training units without those that are tested, and so many to tune on: from where there are some, else taken off the training."""
    tested = {_said(unit) for unit in test}
    train = [unit for unit in train if _said(unit) not in tested]
    if not tune and count:
        tune = evenly(train, min(count, len(train) // 2))
        if not tune:
            raise UserError(f"{name} has {len(train)} units to train on; a sweep needs a second one to choose on")
    tune = [unit for unit in evenly(tune, count) if _said(unit) not in tested] if count else []
    chosen = {_said(unit) for unit in tune}
    train = [unit for unit in train if _said(unit) not in chosen]
    if not train:
        raise UserError(f"{name}: all that could be trained on is tested; give other texts")
    return train, tune


def _said(unit: Any) -> Any:
    return (unit.meaning or unit.references) if isinstance(unit, Meaning) else unit.texts
