"""TOFU: has a model forgotten what it was to forget, and does it still know the rest?

Source: "TOFU: A Task of Fictitious Unlearning for LLMs", arXiv 2401.06121. Differs from its code: answers are compared word by word without stemming; the
forget quality compares the truth ratios of the paper, where the code takes geometric means for it (and arithmetic ones everywhere else); answers are read
without the token that ends them; all of a set's questions are asked unless `questions` says otherwise.
"""

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.special import logsumexp
from scipy.stats import ks_2samp

from echelon.data.question_answers import TEMPLATE, QuestionAnswer, check_template, prompt_and_text, read_question_answers
from echelon.errors import UserError
from echelon.evaluate.likelihood import mean_log_likelihood
from echelon.evaluate.text import longest_common_subsequence
from echelon.models import LoadedModel
from echelon.registry import method

FORGET_SETS = ("forget01", "forget05", "forget10")
_FILES = {"retain": "retain_perturbed.jsonl", "real_authors": "real_authors_perturbed.jsonl", "world_facts": "world_facts_perturbed.jsonl"}
_GENERAL = ("real_authors", "world_facts")
_BATCH = 64  # answers written at a time
_LARGEST = 700.0  # logarithm up to which a ratio and its inverse are finite


@method(
    kind="benchmark", title="TOFU: A Task of Fictitious Unlearning for LLMs", arxiv="2401.06121", year=2024, name="tofu",
    summary="Unlearning: how near a model's truth ratios are to those of one that never saw the forgotten authors, and what it still knows.",
    needs="TOFU's files, a model trained on them, and for the forget quality one trained on the retain set alone",
)  # fmt: skip
@dataclass(frozen=True)
class TOFU:
    """Probability, ROUGE-L recall and truth ratio on four sets of questions, model utility and forget quality.

    Attributes:
        forget: which questions were to be forgotten: `forget01`, `forget05` or `forget10`.
        questions: how many of each set are asked, the first ones; 0 for all.
        max_new_tokens: tokens of an answer that is written for ROUGE.
        template: puts question and answer together, as in training; ends with the answer.
        batch_tokens: tokens a forward, padding included.
    """

    forget: str = "forget10"
    questions: int = 0
    max_new_tokens: int = 200
    template: str = TEMPLATE
    batch_tokens: int = 8192

    def __post_init__(self) -> None:
        """Raises: ValueError: if a knob is out of range."""
        if self.forget not in FORGET_SETS:
            raise ValueError(f"forget is {self.forget!r}; it must be one of {', '.join(FORGET_SETS)}")
        for name, least in (("questions", 0), ("max_new_tokens", 1), ("batch_tokens", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least {least}")
        check_template(self.template)

    def evaluate(
        self, data: str | os.PathLike[str], model: LoadedModel, retain_only: LoadedModel | Sequence[float] | None = None,
        on_progress: Callable[[str], None] | None = None, *, general: bool = True,
    ) -> dict[str, Any]:  # fmt: skip
        """Measure one model.

        Args:
            data: folder with TOFU's files.
            model: the model after unlearning.
            retain_only: a model that was trained without what is to be forgotten, or its ``truth_ratios`` from an earlier call; without, there is no forget
                quality.
            on_progress: told what is being done.
            general: whether real authors and facts of the world are asked about too; without them there is no model utility.

        Returns:
            For each of ``forget``, ``retain``, ``real_authors`` and ``world_facts`` the means ``probability``, ``rouge_l`` and ``truth_ratio``;
            ``model_utility``, the harmonic mean of the nine that are not the forget set's; ``truth_ratios`` of the forget set, one for each question; and
            with ``retain_only``, ``forget_quality``, the p-value of a two-sided Kolmogorov-Smirnov test, with ``log10_forget_quality`` and ``ks_statistic``.

        Raises:
            UserError: if a file is missing or holds something else.
        """
        tell = on_progress or (lambda _: None)
        sets = {name: rows for name, rows in self.read(data).items() if general or name not in _GENERAL}
        made: dict[str, Any] = {}
        for name, rows in sets.items():
            tell(f"asking {len(rows)} questions of {name}")
            ratios = self.truth_ratios(model, rows)
            truth = np.minimum(ratios, 1 / ratios) if name == "forget" else np.maximum(0, 1 - ratios)
            means = (self._probabilities(model, rows, name in _GENERAL), self._rouge(model, rows), truth)
            made[name] = dict(zip(("probability", "rouge_l", "truth_ratio"), (float(values.mean()) for values in means), strict=True))
            if name == "forget":
                made["truth_ratios"] = ratios.tolist()
        if general:
            made["model_utility"] = model_utility([value for name in _FILES for value in made[name].values()])
        if retain_only is not None:
            tell("comparing truth ratios")
            other = self.truth_ratios(retain_only, sets["forget"]) if isinstance(retain_only, LoadedModel) else np.asarray(retain_only)
            made |= forget_quality(made["truth_ratios"], other)
        return made

    def read(self, data: str | os.PathLike[str]) -> dict[str, list[QuestionAnswer]]:
        """The four sets.

        Raises:
            UserError: if a file is missing, or a question has no wrong answers.
        """
        found = {}
        for name, file in ({"forget": f"{self.forget}_perturbed.jsonl"} | _FILES).items():
            rows = read_question_answers(Path(data) / file)
            found[name] = rows[: self.questions or None]
            for number, row in enumerate(rows, 1):
                if not row.perturbed:
                    raise UserError(f"{Path(data) / file}, question {number}: it has no 'perturbed_answer', which TOFU's truth ratio needs")
        return found

    def truth_ratios(self, model: Any, rows: Sequence[QuestionAnswer]) -> Float[np.ndarray, " rows"]:
        """Mean of the wrong answers' probabilities over that of the right one in other words, each to the power of one over its tokens.

        A question without a paraphrase is held against its answer.
        """
        right = self._likelihoods(model, rows, [(row.paraphrased or row.answer,) for row in rows])
        wrong = np.array([logsumexp(each) - math.log(len(each)) for each in self._wrong(model, rows)])
        return np.exp(np.clip(wrong - right, -_LARGEST, _LARGEST))

    def _probabilities(self, model: Any, rows: Sequence[QuestionAnswer], against_wrong: bool) -> Float[np.ndarray, " rows"]:
        right = self._likelihoods(model, rows, [(row.answer,) for row in rows])
        if against_wrong:
            right = right - [logsumexp([one, *wrong]) for one, wrong in zip(right, self._wrong(model, rows), strict=True)]
        return np.exp(right)

    def _wrong(self, model: Any, rows: Sequence[QuestionAnswer]) -> list[Float[np.ndarray, " wrong"]]:
        """Mean log-probabilities of each question's wrong answers."""
        ends = np.cumsum([len(row.perturbed) for row in rows])
        return np.split(self._likelihoods(model, rows, [row.perturbed for row in rows]), ends[:-1])

    def _likelihoods(self, model: Any, rows: Sequence[QuestionAnswer], answers: Sequence[Sequence[str]]) -> Float[np.ndarray, " answers"]:
        """Mean log-probability of every token of each answer, one behind the other."""
        made = [prompt_and_text(row.question, answer, self.template) for row, each in zip(rows, answers, strict=True) for answer in each]
        prompts, texts = zip(*made, strict=True)
        return mean_log_likelihood(model, list(texts), list(prompts), batch_tokens=self.batch_tokens)

    def _rouge(self, model: LoadedModel, rows: Sequence[QuestionAnswer]) -> Float[np.ndarray, " rows"]:
        from echelon.generate import Greedy

        made = []
        for start in range(0, len(rows), _BATCH):
            here = rows[start : start + _BATCH]
            prompts = [prompt_and_text(row.question, row.answer, self.template)[0] for row in here]
            texts = Greedy().generate(model, prompts, max_new_tokens=self.max_new_tokens).texts
            made += [rouge_l_recall(row.answer, text) for row, text in zip(here, texts, strict=True)]
        return np.array(made)


def rouge_l_recall(reference: str, text: str) -> float:
    """Length of the longest common subsequence of words over the reference's words; letters and digits in lower case count, everything else parts words.

    >>> rouge_l_recall("The cat sat.", "the dog sat")
    0.6666666666666666
    """
    wanted, found = (re.findall(r"[a-z0-9]+", each.lower()) for each in (reference, text))
    if not wanted:
        return 0.0
    return longest_common_subsequence(wanted, found) / len(wanted)


def model_utility(values: Sequence[float]) -> float:
    """Harmonic mean; 0 as soon as one value is."""
    return len(values) / sum(1 / value for value in values) if min(values) > 0 else 0.0


def forget_quality(ratios: Any, retain_only: Any) -> dict[str, float]:
    """Kolmogorov-Smirnov test of whether two models' truth ratios come from one distribution: a high p-value means that what was to go cannot be seen.

    Args:
        ratios: of the model after unlearning.
        retain_only: of a model that never saw what was to be forgotten.

    Raises:
        ValueError: if either is empty or holds something that is not finite.
    """
    for name, values in (("ratios", np.asarray(ratios, float)), ("retain_only", np.asarray(retain_only, float))):
        if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
            raise ValueError(f"{name} has shape {values.shape}; it must be a list of at least one finite truth ratio")
    test: Any = ks_2samp(ratios, retain_only)
    p = float(test.pvalue)
    return {"forget_quality": p, "log10_forget_quality": math.log10(p) if p > 0 else -math.inf, "ks_statistic": float(test.statistic)}
