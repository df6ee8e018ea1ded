"""One question for each document."""

import math
from dataclasses import dataclass

from echelon.errors import UserError
from echelon.rerank.base import Asked, Asking, Request, Strategy
from echelon.rerank.questions import Ranking, ScoreKind


@dataclass(frozen=True)
class Points(Strategy):
    """Sort by the scores that the documents are given one by one.

    Attributes:
        score_kind: what they are.
    """

    score_kind: ScoreKind = "logit"

    kind = "point"

    def ask(self, request: Request) -> Asking:
        n = len(request.candidates)
        answers = yield Asked("point", request, [(place,) for place in range(n)])
        scores = [answer.scores[0] if answer.scores else -math.inf for answer in answers]
        if any(math.isnan(score) for score in scores):
            raise UserError(f"a document of query {request.qid!r} has a score that is no number")
        finite = [score for score in scores if math.isfinite(score)]
        least = min(finite, default=0.0) - 1  # of those that got no score
        scores = [score if math.isfinite(score) else least for score in scores]
        order = sorted(range(n), key=lambda place: -scores[place])
        return Ranking(tuple(order), tuple(scores[place] for place in order), self.score_kind)
