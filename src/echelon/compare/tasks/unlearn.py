"""Ways of unlearning, compared on TOFU: a model that has memorised fictitious authors forgets one, five or ten percent of the questions about them.

Every method trains a LoRA of the same rank on the same layers, for as many passes over what is to be forgotten; the learning rate is a knob of the entry, and
none is chosen here, since every question is either forgotten or tested. ``untouched`` is the model before. What counts is the forget quality, the p-value of a
test that the truth ratios come from a model that never saw the questions, and what is left of the rest. A small model knows neither real authors nor facts of
the world, which pulls TOFU's model utility down before anything is unlearned: the harmonic mean over the questions that stay stands beside it.
"""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echelon.compare.memorised import GENERAL, SHARES, Memorised, Memorising, memorised
from echelon.compare.task import Outcome, Quality, check_keys
from echelon.compare.tuning import is_whole
from echelon.data.question_answers import TEMPLATE, prompt_and_text
from echelon.errors import UserError
from echelon.evaluate.tofu import TOFU, model_utility
from echelon.linalg.checks import number
from echelon.models import LoadedModel, load
from echelon.registry import build, suggest

UNTOUCHED = "untouched"
DATA: dict[str, Any] = {"tofu": None, "questions": 500, "asked": 50, "max_new_tokens": 50}
BUDGET: dict[str, Any] = {
    "forget": [1, 5, 10], "r": 16, "epochs": 5, "batch_size": 8, "memorise_epochs": 10, "memorise_lr": 2e-3, "memorise_batch_size": 16,
}  # fmt: skip
FIXED = ("r", "epochs", "batch_size", "micro_batch_size", "export", "target_modules", "template")
_LEAST = -300.0  # a p-value below that is no number any more
_SHOWN = 8


@dataclass
class Context:
    """Work shared by all runs."""

    made: Memorised
    budget: dict[str, Any]
    asked: int
    max_new_tokens: int
    metrics: list[str]
    before: dict[int, dict[str, Any]]

    @property
    def general(self) -> bool:
        """Whether general knowledge is asked about, which TOFU's model utility alone needs."""
        return not self.metrics or any(metric.startswith("utility") for metric in self.metrics)

    def benchmark(self, percent: int) -> TOFU:
        return TOFU(f"forget{SHARES[percent]}", self.asked, self.max_new_tokens)

    def measure(self, loaded: LoadedModel, percent: int) -> dict[str, Any]:
        benchmark = self.benchmark(percent)
        return benchmark.evaluate(self.made.questions, loaded, self.made.truth_ratios(percent, benchmark), general=self.general)


class Task:
    """Editors on one model.

    Recipe keys: ``data.tofu`` is a folder with TOFU's files; ``data.questions`` of its 4,000 are memorised, a part with TOFU's proportions; of each set
    ``data.asked`` are evaluated (0: all), with answers of at most ``data.max_new_tokens``. ``budget.forget`` are the percentages, out of 1, 5 and 10;
    ``budget.r``, ``budget.epochs`` and ``budget.batch_size`` are those of every method, ``budget.memorise_epochs``, ``budget.memorise_lr`` and
    ``budget.memorise_batch_size`` those of the memorising.
    """

    kind = ""  # untouched is no editor; `check` builds the others
    unit = "model"
    cost_axis = "retain_lost"
    primary = ""
    reference = UNTOUCHED
    columns = ("retain_lost", "trained_parameters")
    folder = Path()

    def check(self, recipe: Any) -> None:
        check_keys({"data": DATA, "budget": BUDGET}, recipe)
        data, budget = {**DATA, **recipe.data}, {**BUDGET, **recipe.budget}
        percents = budget["forget"]
        if not isinstance(percents, list) or not percents or any(percent not in SHARES for percent in percents) or len(set(percents)) < len(percents):
            raise UserError(f"budget.forget is {percents!r}; it must be a list of different ones of 1, 5 and 10 (percent)")
        for where, told, least in (
            ("data", data, {"questions": 100, "asked": 0, "max_new_tokens": 1}),
            ("budget", budget, {"r": 1, "epochs": 1, "batch_size": 1, "memorise_epochs": 1, "memorise_batch_size": 1}),
        ):
            for name, low in least.items():
                if not is_whole(told[name], low):
                    raise UserError(f"{where}.{name} is {told[name]!r}; it must be a whole number of at least {low}")
        number("budget.memorise_lr", budget["memorise_lr"], 0, 1, open_low=True)
        if data["questions"] % 100:
            raise UserError(f"data.questions is {data['questions']}; it must be a multiple of 100, so that one percent is a number of questions")
        legal = [f"{metric}_{SHARES[percent]}" for percent in percents for metric in ("forget_quality", "utility", "retain")]
        for metric in recipe.metrics:
            if metric not in legal:
                raise UserError(f"unknown metric {metric!r}{suggest(metric, legal)}; with these percentages metrics are {', '.join(legal)}")
        for entry in recipe.methods:
            for knob in entry.knobs:
                if knob in FIXED:
                    raise UserError(f"{knob} of {entry.label} is the same for all, or the budget's; leave it out")
            if entry.name != UNTOUCHED:
                build(entry.name, "editor", entry.knobs)
        for path in self.sources(recipe):
            if not path.is_file():
                raise UserError(f"data.tofu: no file {path}; give a folder with TOFU's files")

    def sources(self, recipe: Any) -> list[Path]:
        names = [f"forget{name}_perturbed.jsonl" for name in SHARES.values()]
        return [Path(str({**DATA, **recipe.data}["tofu"])) / name for name in ("retain90.jsonl", "retain_perturbed.jsonl", *names, *GENERAL)]

    def describe(self, context: Context) -> str:
        size = load(str(context.made.full)).model.num_parameters() / 1e6
        percent = max(context.budget["forget"])
        known = context.before[percent]["forget"]["probability"]
        told = f"{len(context.made.retain(percent)) + len(context.made.forget(percent))} questions memorised (probability of an answer {known:.2f}"
        unknown = f"; of real authors' {context.before[percent]['real_authors']['probability']:.2f}" if context.general else ""
        return f"{size:.1f} M parameters, {told}{unknown})"

    def command(self, recipe: dict[str, Any], method: str, knobs: dict[str, Any]) -> list[str]:
        """The command line that unlearns texts of one's own in this way."""
        if method == UNTOUCHED:
            return []
        budget = {**BUDGET, **recipe["budget"]}
        knobs = {**knobs, **{name: budget[name] for name in ("r", "epochs", "batch_size")}}
        told = [word for name, value in knobs.items() for word in (f"--method.{name}", str(value))]
        return ["edit", "--model", "MODEL", "--method", method, *told, "--forget", "FILE", "--retain", "FILE", "--out", "FOLDER"]

    def prepare(self, recipe: Any) -> Context:
        data, budget = {**DATA, **recipe.data}, {**BUDGET, **recipe.budget}
        how = Memorising(
            recipe.model, str(data["tofu"]), data["questions"], budget["memorise_epochs"], budget["memorise_lr"], budget["memorise_batch_size"]
        )  # fmt: skip
        context = Context(memorised(how, budget["forget"], self.folder), budget, data["asked"], data["max_new_tokens"], recipe.metrics, {})
        untouched = load(str(context.made.full))
        context.before = {percent: context.measure(untouched, percent) for percent in budget["forget"]}
        return context

    def run(self, context: Context, entry: Any, seed: int) -> Outcome:
        quality: dict[str, Quality] = {}
        cost: dict[str, float] = {}
        lost: list[float] = []
        for percent in sorted(context.budget["forget"]):
            loaded = load(str(context.made.full))
            found = context.before[percent]
            if entry.name != UNTOUCHED:
                loaded, report = self._edited(context, entry, percent, seed)
                found = context.measure(loaded, percent)
                cost |= {"trained_parameters": float(report["trained_parameters"]), f"edit_seconds_{SHARES[percent]}": report["seconds"]}
            kept = model_utility(list(found["retain"].values()))
            lost.append(model_utility(list(context.before[percent]["retain"].values())) - kept)
            asked = len(found["truth_ratios"])
            note = f"log10 of the p-value over {asked} questions; that of the answers' probability is {found['forget']['probability']:.3f}"
            named = {
                "forget_quality": Quality(max(_LEAST, found["log10_forget_quality"]), "log10 p", True, None, note),
                "retain": Quality(kept, "share", True, None, "harmonic mean of probability, ROUGE-L and truth ratio over questions that stay"),
            }
            if context.general:
                named["utility"] = Quality(found["model_utility"], "share", True, None, "TOFU's model utility")
            quality |= {f"{name}_{SHARES[percent]}": value for name, value in named.items()}
        cost["retain_lost"] = max(0.0, statistics.fmean(lost))
        budget = {"unit": "passes over what is forgotten", "allowed": context.budget["epochs"], "used": context.budget["epochs"]}
        wanted = context.metrics or list(quality)
        return Outcome({name: one for name, one in quality.items() if name in wanted}, cost, budget, self._samples(context, loaded))

    def timing(self, context: Context, entry: Any) -> float:
        """Seconds of one edit of the smallest size."""
        started = time.perf_counter()
        if entry.name != UNTOUCHED:
            self._edited(context, entry, min(context.budget["forget"]), 0)
        return time.perf_counter() - started

    def _edited(self, context: Context, entry: Any, percent: int, seed: int) -> tuple[LoadedModel, dict[str, Any]]:
        budget, loaded = context.budget, load(str(context.made.full))
        fixed = {"r": budget["r"], "epochs": budget["epochs"], "batch_size": budget["batch_size"], "micro_batch_size": budget["batch_size"], "export": "merged"}
        made = build(entry.name, "editor", {**entry.knobs, **fixed}).edit(loaded, context.made.forget(percent), context.made.retain(percent), seed=seed)
        return LoadedModel(made.model.eval(), loaded.tokenizer), made.report

    def _samples(self, context: Context, loaded: LoadedModel) -> list[dict[str, str]]:
        """What the model that forgot most says to some questions, half of which it was to forget."""
        from echelon.generate import Greedy

        percent, half = max(context.budget["forget"]), _SHOWN // 2
        shown = [("forget", row) for row in context.made.forget(percent)[:half]] + [("retain", row) for row in context.made.retain(percent)[:half]]
        prompts = [prompt_and_text(row["question"], row["answer"], TEMPLATE)[0] for _, row in shown]
        texts = Greedy().generate(loaded, prompts, max_new_tokens=context.max_new_tokens).texts
        return [
            {"unit": f"{part} {number}", "prompt": row["question"], "reference": row["answer"], "text": text.strip()}
            for number, ((part, row), text) in enumerate(zip(shown, texts, strict=True))
        ]
