"""Judges that ask models: a language model by prompts from a template, or a scorer of pairs."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from echelon.errors import UserError
from echelon.llm.base import Engine, Generation, Identifiers, Prompt, Unanswered
from echelon.llm.permutation import ranking_text
from echelon.llm.templates import Rendered, Template, load_template
from echelon.rerank.base import Forecast, Judge
from echelon.rerank.questions import Answer, Kind, Question
from echelon.score.base import ScoreItem, Scorer, checked_scores

Mode = Literal["scoring", "generation"]
FLOOR = -1e4
"""Stands for the log-probability of a label that a server did not tell: below all that are told, and a number."""


class PromptJudge(Judge):
    """Asks a language model, one prompt a question, by a template that says what kind of question it is.

    By scoring, the answers of the template are compared by their log-probabilities: a pair of equal ones is a tie, the first of equal ones is the best of a
    set, and a point scores the log-odds of its first answer, or the mean log-probability of a token where it has only one. By generation the model writes
    greedily, and the template reads what it wrote.

    Args:
        engine: the model.
        template: the prompt.
        mode: how an answer is read.
        max_new_tokens: tokens that the model may write; for lists by default those of a complete ranking.
        max_query_tokens: in place of the template's own.
        max_passage_tokens: in place of the template's own.
        constrained: have the engine write nothing but complete rankings.
        chunk: questions at a time.

    Raises:
        UserError: if the engine cannot be constrained, or the template has nothing to score.
    """

    def __init__(
        self, engine: Engine, template: Template, mode: Mode, *, max_new_tokens: int | None = None, max_query_tokens: int | None = None,
        max_passage_tokens: int | None = None, constrained: bool = False, chunk: int = 64,
    ):  # fmt: skip
        self.engine, self.template, self.mode, self.chunk = engine, template, mode, chunk
        self.kinds = frozenset((template.kind,)) - {"cite"}  # type: ignore[assignment]
        self.max_new_tokens, self.constrained = max_new_tokens, constrained
        self.limits = {"max_query_tokens": max_query_tokens, "max_passage_tokens": max_passage_tokens}
        self._warned: set[str] = set()
        if mode == "scoring" and (template.kind == "list" or not template.answers):
            raise UserError(f"template {template.name!r} has no answers to score; generate, or give another prompt")
        if constrained and "constrained" not in engine.capabilities:
            raise UserError(f"{type(engine).__name__} cannot be constrained to rankings; set constrained to false, or use a local model")

    @cached_property
    def identity(self) -> str:  # type: ignore[override]
        told = (self.template.hash, self.mode, self.max_new_tokens, self.constrained, sorted(self.limits.items()))
        return f"{self.engine.identity} {told}"

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        prompts = [self._rendered(question) for question in questions]
        groups: dict[int, list[int]] = {}  # what may be written depends on the question alone, not on what is asked along with it
        for place, question in enumerate(questions):
            groups.setdefault(self._room(question), []).append(place)
        answers: dict[int, Answer] = {}
        for room, places in groups.items():
            try:
                found = dict(enumerate(self._found([questions[place] for place in places], [prompts[place] for place in places], room)))
            except Unanswered as error:
                read = {places[i]: self._answered(questions[places[i]], prompts[places[i]], one) for i, one in error.answered.items()}
                raise Unanswered(str(error), answers | read) from error
            answers |= {places[i]: self._answered(questions[places[i]], prompts[places[i]], one) for i, one in found.items()}
        return [answers[place] for place in range(len(questions))]

    def cost(self, question: Question) -> Forecast:
        return Forecast(1, 1, self._tokens(self._rendered(question)), self._room(question))

    def _rendered(self, question: Question) -> Rendered:
        made = self.template.render(self.engine, question.query, question.docs, max_new_tokens=self._room(question), **self.limits)
        if made.shrunk_to is not None:
            self._warn("shrunk", f"the context does not hold {len(question.docs)} passages; they were cut to {made.shrunk_to} tokens each")
        return made

    def _found(self, questions: Sequence[Question], prompts: Sequence[Rendered], room: int) -> Sequence[Any]:
        """Log-probabilities of each question's answers, or what was written."""
        if self.mode == "scoring":
            return self.engine.score_choices(prompts, [self._choices(*both) for both in zip(questions, prompts, strict=True)])
        constraint = [self.template.constraint(len(question.docs)) for question in questions] if self.constrained else None
        return self.engine.generate(prompts, max_new_tokens=room, constraint=constraint)

    def _answered(self, question: Question, prompt: Rendered, found: Any) -> Answer:
        return self._scored(question, prompt, found) if self.mode == "scoring" else self._read(question, prompt, found[0])

    def _choices(self, question: Question, prompt: Rendered) -> list[str]:
        return self.template.choices(len(question.docs), prompt.query)

    def _tokens(self, prompt: Prompt) -> int:
        """As the template has counted them: of the bare prompt, which the engine remembers."""
        return self.engine.prompt_tokens(Prompt(prompt.messages, prompt.answer_prefix))

    def _room(self, question: Question) -> int:
        """Tokens that the model may write: for a list those of its ranking, and one more for each passage where the text is not its own choice."""
        if self.mode == "scoring":
            return 0
        if self.max_new_tokens is not None or question.kind != "list":
            return self.max_new_tokens or 8
        n = len(question.docs)
        names = self.template.identifiers if n <= 26 else "number"  # more letters than there are is for the template to refuse
        return self.engine.count_tokens(ranking_text(range(n), names)) + (n if self.constrained else 1)

    def _scored(self, question: Question, prompt: Rendered, found: np.ndarray) -> Answer:
        if np.isnan(found).any():
            raise UserError(f"{self.engine.identity} gave a log-probability that is no number; load the model in float32 or bfloat16")
        scores = np.maximum(found.astype(float), FLOOR).tolist()
        order: tuple[int, ...] = ()
        if question.kind == "pair" and scores[0] != scores[1]:
            order = (0, 1) if scores[0] > scores[1] else (1, 0)
        elif question.kind == "set":
            order = (scores.index(max(scores)),)
        elif question.kind == "point":
            if len(scores) > 1:
                scores = [scores[0] - float(np.logaddexp.reduce(scores[1:]))]
            else:
                scores = [scores[0] / max(1, self.engine.count_tokens(self._choices(question, prompt)[0]))]
        return Answer(order, tuple(scores), prompt_tokens=self._tokens(prompt))

    def _read(self, question: Question, prompt: Rendered, written: Generation) -> Answer:
        order, status = self.template.parse(written.text, len(question.docs))
        if question.kind == "list" and status == "partial" and written.finish == "length":
            self._warn("unfinished", f"a ranking of {len(question.docs)} was not finished in {written.tokens} tokens; raise max_new_tokens")
        scores = (float(not order[0]),) if question.kind == "point" and order else ()
        return Answer(order, scores, status, written.text, 1, self._tokens(prompt), written.tokens)

    def _warn(self, which: str, told: str) -> None:
        if which not in self._warned:
            self._warned.add(which)
            warnings.warn(told, stacklevel=2)


class ScorerJudge(Judge):
    """Has each document scored with the query by a scorer, such as a cross-encoder; it sorts what it is given by length, so it is given much.

    Args:
        scorer: the scorer.
        identity: names its model, for the cache; without one nothing can be kept in a file.
    """

    kinds = frozenset(("point",))
    chunk = 1 << 14

    def __init__(self, scorer: Scorer, identity: Callable[[], str] | None = None):
        self.scorer, self._identity = scorer, identity

    @cached_property
    def identity(self) -> str:  # type: ignore[override]
        if self._identity is None:
            raise UserError(f"{type(self.scorer).__name__} has no name to keep its scores under; rank without a cache")
        return self._identity()

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        try:
            scores = checked_scores(self.scorer, [ScoreItem(question.query, question.docs[0].content) for question in questions])
        except Unanswered as error:
            raise Unanswered(str(error), {place: Answer(scores=(score,)) for place, score in error.answered.items()}) from error
        return [Answer(scores=(score,)) for score in scores.tolist()]


def template_of(kind: Kind, source: str, identifiers: Identifiers | None = None) -> Template:
    """A template by its name or file, which must be one for this kind of questions, with its passages numbered or lettered.

    Raises:
        UserError: if there is none, or it is for others.
    """
    template = load_template(source)
    if template.kind != kind:
        raise UserError(f"prompt is {source!r}, a template for {template.kind} questions; this method asks {kind} ones")
    return template if identifiers is None else replace(template, identifiers=identifiers)
