"""What a strategy asks and a judge answers, in one form for all kinds of questions."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Literal

from echelon.data.documents import Doc

Kind = Literal["point", "pair", "set", "list", "attention"]
Status = Literal["complete", "partial", "repaired", "unparseable"]
ScoreKind = Literal["logit", "prob", "ordinal", "sum"]


@dataclass(frozen=True)
class Question:
    """One question on documents of one query.

    Attributes:
        kind: what is asked: how relevant one document is (``point``), which of two is more relevant (``pair``), which of some is the
            most relevant (``set``), how some rank (``list``), how much attention each of some is paid (``attention``).
        qid: the query's id, for judges that know its judgements.
        query: its text.
        docs: the documents in the order in which they are shown.
    """

    kind: Kind
    qid: str
    query: str
    docs: tuple[Doc, ...]


@dataclass(frozen=True)
class Answer:
    """A judge's answer.

    Attributes:
        order: places of the question's documents, the most relevant first: of both for ``pair`` (none where it did not decide),
            of the best for ``set`` (none where it named none), of all for ``list``, none for the others.
        scores: one number for each document, where the judge has them, higher is better: log-probabilities of the labels for ``pair``
            and ``set``.
        status: how the answer was read.
        raw: what the model wrote, where it wrote.
        prompts: prompts that it took.
        prompt_tokens: their tokens.
        generated_tokens: tokens that the model wrote.
    """

    order: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    status: Status = "complete"
    raw: str = ""
    prompts: int = 1
    prompt_tokens: int = 0
    generated_tokens: int = 0


@dataclass(frozen=True)
class Ranking:
    """What a strategy makes of the answers: all places of the request's documents, best first, and a falling score for each of them."""

    order: tuple[int, ...]
    scores: tuple[float, ...]
    score_kind: ScoreKind = "ordinal"


Asking = Generator[Sequence[Question], list[Answer], Ranking]
"""A strategy at work on one query: it yields questions that do not depend on each other, and is sent their answers in the same order."""
