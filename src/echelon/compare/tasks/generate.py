"""Ways of continuing a text, compared on the same prompts with the same number of new tokens.

Every decoder may write ``max_new_tokens`` tokens for each prompt. What it spends to do so (tokens forwarded, scorer calls, seconds)
is not held equal; it is measured and becomes an axis of the plot. Texts are cut after their last whole sentence on both sides,
the human continuation having first been cut to the same number of tokens.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from echelon.compare.task import Outcome, Quality, check_keys
from echelon.data import passages as shipped
from echelon.data.files import read_texts
from echelon.data.passages import passages
from echelon.data.text import split_sentences, truncate_to_sentence
from echelon.errors import UserError
from echelon.evaluate.generation import METRICS, evaluate_generation
from echelon.models import LoadedModel, load
from echelon.registry import build, suggest

PASSAGES = Path(shipped.__file__).parent
DATA = {"test": "passages", "prompts": 100, "prompt_words": 50}


@dataclass(frozen=True)
class Prompts:
    """What every decoder is given: prompts, and the human text that follows each."""

    units: list[str]
    prompts: list[str]
    references: list[str]


@dataclass(frozen=True)
class Context:
    """Work shared by all runs."""

    loaded: LoadedModel
    texts: Prompts
    max_new_tokens: int
    metrics: list[str]


class Task:
    """Decoders on one model and one set of prompts.

    Recipe keys: ``data.test`` is ``passages`` (the test half of the prose that ships) or a JSON-lines file with a ``text`` in each
    line, from which ``data.prompts`` places are taken at even distances; ``data.prompt_words`` words go in front of each;
    ``budget.max_new_tokens`` tokens are written.
    """

    kind = "decoder"
    unit = "prompt"
    budget_unit = "new tokens per prompt"
    cost_axis = "seconds_per_prompt"
    primary = "similarity"
    reference = ""

    def check(self, recipe: Any) -> None:
        check_keys({"data": DATA, "budget": ("max_new_tokens",)}, recipe)
        data = {**DATA, **recipe.data}
        budget = recipe.budget.get("max_new_tokens", 64)
        for name, value in (("data.prompts", data["prompts"]), ("data.prompt_words", data["prompt_words"]), ("budget.max_new_tokens", budget)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"{name} is {value!r}; it must be a whole number of at least 1")
        if not recipe.metrics:
            raise UserError("metrics is empty; name at least one")
        for metric in recipe.metrics:
            if metric not in METRICS:
                raise UserError(f"unknown metric {metric!r}{suggest(metric, METRICS)}; metrics are {', '.join(METRICS)}")
        if "mauve" in recipe.metrics and data["prompts"] < 100:
            raise UserError(f"data.prompts is {data['prompts']}; the metric mauve needs at least 100")
        if data["test"] != "passages" and not Path(data["test"]).is_file():
            raise UserError(f"data.test: no file {data['test']}; give a JSON-lines file with a 'text' in each line, or passages")

    def sources(self, recipe: Any) -> list[Path]:
        test = recipe.data.get("test", DATA["test"])
        return sorted(PASSAGES.glob("*.jsonl")) if test == "passages" else [Path(test)]

    def describe(self, context: Context) -> str:
        return (
            f"{context.loaded.model.num_parameters() / 1e6:.1f} M parameters, {len(context.texts.prompts)} prompts, "
            f"up to {context.max_new_tokens} new tokens"
        )

    def command(self, recipe: dict[str, Any], method: str, knobs: dict[str, Any]) -> list[str]:
        told = [word for name, value in knobs.items() for word in (f"--method.{name}", str(value))]
        tokens = recipe.get("budget", {}).get("max_new_tokens")
        return ["generate", "--model", str(recipe["model"]), "--method", method, *told, *(["--max_new_tokens", str(tokens)] if tokens else []), "PROMPT"]

    def prepare(self, recipe: Any) -> Context:
        data, budget = {**DATA, **recipe.data}, recipe.budget.get("max_new_tokens", 64)
        loaded = load(recipe.model)
        return Context(loaded, read_prompts(data["test"], data["prompts"], data["prompt_words"], loaded, budget), budget, recipe.metrics)

    def run(self, context: Context, entry: Any, seed: int) -> Outcome:
        started = time.perf_counter()
        result = self._generate(context, entry, seed, len(context.texts.prompts))
        seconds = time.perf_counter() - started
        texts = [truncate_to_sentence(text) for text in result.texts]
        measured = evaluate_generation(
            context.texts.prompts, context.texts.references, {entry.label: texts}, metrics=context.metrics,
            model=context.loaded, seed=seed,
        )[entry.label]  # fmt: skip
        count = len(texts)
        written = [len(ids) for ids in result.sequences]
        return Outcome(
            quality={
                name: Quality(m.value, m.unit, m.higher_is_better, m.per_text, m.note) for name, m in measured.items()
            },
            cost={
                "forward_tokens_per_prompt": result.stats.forward_tokens / count,
                "scorer_calls_per_prompt": result.stats.scorer_calls / count,
                "seconds_per_prompt": seconds / count,
            },
            budget={"unit": self.budget_unit, "allowed": context.max_new_tokens, "used": float(np.mean(written))},
            samples=[
                {"unit": unit, "prompt": prompt, "reference": reference, "text": text}
                for unit, prompt, reference, text in zip(
                    context.texts.units, context.texts.prompts, context.texts.references, texts, strict=True
                )
            ],
        )  # fmt: skip

    def timing(self, context: Context, entry: Any) -> float:
        """Seconds a prompt, over the first eight: short enough to be repeated in turn with the other methods."""
        count = min(8, len(context.texts.prompts))
        started = time.perf_counter()
        self._generate(context, entry, 0, count)
        return (time.perf_counter() - started) / count

    def _generate(self, context: Context, entry: Any, seed: int, count: int) -> Any:
        decoder = build(entry.name, "decoder", entry.knobs)
        return decoder.generate(context.loaded, context.texts.prompts[:count], max_new_tokens=context.max_new_tokens, seed=seed)


def read_prompts(source: str, count: int, words: int, loaded: LoadedModel, new_tokens: int) -> Prompts:
    """Prompts and human continuations from the shipped passages or a JSON-lines file.

    Raises:
        UserError: if the file is no JSON lines with a ``text``, or holds fewer prompts than asked for.
    """
    if source == "passages":
        pairs = [(passage.id, *cut_words(passage.text, words)) for passage in passages("test")]
    else:
        pairs = list(places(read_texts(source), count, words, new_tokens))
    pairs = [(unit, prompt, rest) for unit, prompt, rest in pairs if rest]
    if len(pairs) < count:
        raise UserError(f"data.prompts is {count}, but {source} gives only {len(pairs)} with prompts of {words} words")
    evenly = np.linspace(0, len(pairs) - 1, count).round().astype(int)
    units, prompts, rests = map(list, zip(*(pairs[i] for i in evenly), strict=True))
    references = []
    for rest in rests:
        ids = loaded.tokenizer(rest, add_special_tokens=False).input_ids[:new_tokens]
        references.append(truncate_to_sentence(loaded.tokenizer.decode(ids)))
    return Prompts(units, prompts, references)


def cut_words(text: str, words: int) -> tuple[str, str]:
    """A text's first words, and all that follows them with its leading space."""
    parts = text.split(" ")
    return " ".join(parts[:words]), " " + " ".join(parts[words:]) if parts[words:] else ""


def places(works: list[str], count: int, words: int, new_tokens: int):
    """``count`` places spread evenly over all works: whole sentences up to ``words`` words, and the text that follows."""
    total = sum(len(work) for work in works)
    for number, work in enumerate(works):
        sentences = [" ".join(sentence.split()) for sentence in split_sentences(work)]
        lengths = np.array([len(sentence.split()) for sentence in sentences])
        here = -(-count * len(work) // total) + 1
        last = len(sentences) - int(np.searchsorted(np.cumsum(lengths[::-1]), 2 * new_tokens)) - 1
        first = int(np.searchsorted(np.cumsum(lengths), words)) + 1
        for boundary in np.unique(np.linspace(first, last, here).astype(int)) if last > first else ():
            start = boundary
            while start > 0 and lengths[start - 1 : boundary].sum() <= words:
                start -= 1
            prompt = " ".join(sentences[start + 1 : boundary])
            following = " " + " ".join(sentences[boundary : boundary + new_tokens])
            if prompt:
                yield f"work {number + 1}, sentence {boundary}", prompt, following
