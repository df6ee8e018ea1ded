"""Several rankings made into one, and hits on chunks made into hits on documents.

Sources: reciprocal ranks from "Reciprocal Rank Fusion outperforms Condorcet and Individual Rank Learning Methods" (Cormack, Clarke, Büttcher, SIGIR 2009);
CombSUM and CombMNZ from "Combination of Multiple Searches" (Fox, Shaw, TREC-2, 1994); Borda from "Models for Metasearch" (Aslam, Montague, SIGIR 2001);
inverse squares from "Search by Multiple Modes" (Mourão et al., 2014). ``rrf_norm`` is our reading (unconfirmed) of the normalised order of "Vietnamese Legal
Information Retrieval in Question-Answering System", arXiv 2409.13699.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Literal, get_args

from echelon.data.runs import Run, sorted_docs

Fusion = Literal["rrf", "rrf_norm", "weighted", "isr", "combsum", "combmnz", "borda", "interleave"]
Normalization = Literal["min_max", "z_score", "none"]
Aggregate = Literal["max", "sum", "mean"]
Part = tuple[dict[str, float], float]
"""What one list says of each of its documents, and what it says of all others."""


def fuse(
    runs: Sequence[Run], method: Fusion = "rrf", weights: Sequence[float] | None = None, k: float = 60, *, kappa: float = 0.1,
    normalization: Normalization = "min_max", depth: int | Sequence[int] | None = None,
) -> Run:  # fmt: skip
    """One run from several, query by query.

    Each list is put in order (score down, then id up) and cut at ``depth`` first. A document's score is the sum over lists of what follows, w being the list's
    weight, r the document's place from 1, n the length of the list and c the number of documents in all lists together:

    - ``rrf``: w / (k + r); absent: 0.
    - ``rrf_norm``: w / (kappa + (r - 1) / max(n - 1, 1)); absent: as for the last place, w / (kappa + 1).
    - ``weighted``: w times the normalised score; absent: w times the lowest normalised score of the list (with ``min_max`` 0).
    - ``combsum``: the same, but absent: 0.
    - ``combmnz``: ``combsum`` times the number of lists that have the document.
    - ``isr``: w / r², absent: 0; the sum times the number of lists that have the document.
    - ``borda``: w (c - r + 1); absent: w (c - n + 1) / 2, the points that are left, shared evenly.
    - ``interleave``: no sum; the best place in any list counts, and of equal places the one in the list of more weight.

    Sums are exact in double precision and thus the same in whatever order the lists are given. ``rrf_norm`` gives a list of 5 the same say as one of 100; it is
    not invariant when a list is made longer, since all places scale. ``rrf`` orders like ``borda`` for large ``k`` where all lists hold the same documents.

    Args:
        runs: one run of each retriever. A query that one of them lacks is an empty list there, which is fine.
        method: see above.
        weights: one number >= 0 for each run; all 1 by default.
        k: of ``rrf``, >= 0: how little the first places stand out.
        kappa: of ``rrf_norm``, > 0: the same.
        normalization: of scores, per query and list, for ``weighted``, ``combsum`` and ``combmnz``: to [0, 1] (equal scores, and a single one, become 1), to
            mean 0 and standard deviation 1 (equal scores become 0), or as they are.
        depth: documents of each list that count: one number for all or one for each; all by default.

    Returns:
        For each query all documents of its lists with their scores, best first, equal scores by id.

    Raises:
        ValueError: if there are no runs, a setting is out of range, or a score is not finite.
    """
    if not runs:
        raise ValueError("there are no runs to fuse; give at least one")
    shares, depths = check_fusion(len(runs), method, weights, k, kappa, normalization, depth)
    part_of: dict[Fusion, Callable[[list[str], dict[str, float], int], Part]] = {
        "rrf": lambda docs, _, total: ({doc: 1 / (k + rank) for rank, doc in enumerate(docs, 1)}, 0.0),
        "rrf_norm": lambda docs, _, total: ({doc: 1 / (kappa + place / max(len(docs) - 1, 1)) for place, doc in enumerate(docs)}, 1 / (kappa + 1)),
        "isr": lambda docs, _, total: ({doc: 1 / rank**2 for rank, doc in enumerate(docs, 1)}, 0.0),
        "borda": lambda docs, _, total: ({doc: total - place for place, doc in enumerate(docs)}, (total - len(docs) + 1) / 2),
        "weighted": lambda docs, scores, total: _normalised(docs, scores, normalization),
        "combsum": lambda docs, scores, total: (_normalised(docs, scores, normalization)[0], 0.0),
        "combmnz": lambda docs, scores, total: (_normalised(docs, scores, normalization)[0], 0.0),
    }
    fused: Run = {}
    for qid in dict.fromkeys(qid for run in runs for qid in run):
        lists = [run.get(qid, {}) for run in runs]
        _refuse_unfinite(lists, qid)
        ranked = [sorted_docs(scores)[:most] for scores, most in zip(lists, depths, strict=True)]
        union = set().union(*ranked)
        if method == "interleave":
            made = _interleaved(ranked, shares)
        else:
            parts = [part_of[method](docs, scores, len(union)) for docs, scores in zip(ranked, lists, strict=True)]
            made = {doc: math.fsum(w * values.get(doc, absent) for w, (values, absent) in zip(shares, parts, strict=True)) for doc in union}
            if method in ("isr", "combmnz"):
                made = {doc: score * sum(doc in values for values, _ in parts) for doc, score in made.items()}
        fused[qid] = {doc: made[doc] for doc in sorted_docs(made)}
    return fused


def collapse(run: Run, parent_of: Mapping[str, str] | Callable[[str], str], how: Aggregate = "max") -> Run:
    """Hits on documents from hits on their chunks. To be done before fusion, which would count a long document once for each chunk.

    Args:
        run: scores of chunks.
        parent_of: a chunk's document, as a mapping or a function.
        how: a document's score from those of its chunks: its best one (which keeps the order of documents), their sum or their mean.

    Raises:
        ValueError: if ``how`` is none of these, or a chunk has no document.
    """
    if how not in get_args(Aggregate):
        raise ValueError(f"how is {how!r}; it must be one of {', '.join(get_args(Aggregate))}")
    made: Run = {}
    for qid, scores in run.items():
        of_document: dict[str, list[float]] = {}
        for chunk, score in scores.items():
            parent = parent_of(chunk) if callable(parent_of) else parent_of.get(chunk)
            if parent is None:
                raise ValueError(f"the chunk {chunk!r}, found for the query {qid!r}, has no document")
            of_document.setdefault(parent, []).append(score)
        whole = {"max": max, "sum": math.fsum, "mean": fmean}[how]
        total = {doc: float(whole(found)) for doc, found in of_document.items()}  # type: ignore[operator]
        made[qid] = {doc: total[doc] for doc in sorted_docs(total)}
    return made


def check_fusion(
    count: int, method: str, weights: Sequence[float] | None, k: float, kappa: float, normalization: str, depth: int | Sequence[int] | None,
    names: tuple[str, str, str] = ("method", "k", "depth"),
) -> tuple[list[float], list[int | None]]:  # fmt: skip
    """A weight and a depth for each of ``count`` lists; ``names`` are what the caller calls three of the settings.

    Raises:
        ValueError: if a setting is out of range.
    """
    for name, value, legal in ((names[0], method, get_args(Fusion)), ("normalization", normalization, get_args(Normalization))):
        if value not in legal:
            raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(legal)}")
    for name, number, low, fits in ((names[1], k, "at least 0", k >= 0), ("kappa", kappa, "above 0", kappa > 0)):
        if not fits or not math.isfinite(number):
            raise ValueError(f"{name} is {number!r}; it must be {low}")
    shares = [1.0] * count if weights is None else [float(weight) for weight in weights]
    depths: list[int | None] = [depth] * count if depth is None or isinstance(depth, int) else list(depth)
    for name, given in (("weights", len(shares)), (names[2], len(depths))):
        if given != count:
            raise ValueError(f"{name} has {given} numbers for {count} lists; it must have one each")
    if any(not 0 <= weight < math.inf for weight in shares) or not any(shares):
        raise ValueError(f"weights are {shares!r}; they must be numbers >= 0, one of them above 0")
    if any(most is not None and most < 1 for most in depths):
        raise ValueError(f"{names[2]} is {depth!r}; it must be at least 1")
    return shares, depths


def _refuse_unfinite(lists: Sequence[Mapping[str, float]], qid: str) -> None:
    for scores in lists:
        if not all(map(math.isfinite, scores.values())):
            doc = next(doc for doc, score in scores.items() if not math.isfinite(score))
            raise ValueError(f"the score of {doc!r} for the query {qid!r} is {scores[doc]!r}; scores must be finite")


def _normalised(docs: list[str], scores: Mapping[str, float], how: Normalization) -> Part:
    if not docs:
        return {}, 0.0
    values = [scores[doc] for doc in docs]
    low, high = values[-1], values[0]
    if how == "none":
        return dict(zip(docs, values, strict=True)), low
    if how == "min_max":
        return {doc: (value - low) / (high - low) if high > low else 1.0 for doc, value in zip(docs, values, strict=True)}, 0.0
    mean = fmean(values)
    spread = math.sqrt(fmean((value - mean) ** 2 for value in values))
    made = {doc: (value - mean) / spread if high > low else 0.0 for doc, value in zip(docs, values, strict=True)}
    return made, made[docs[-1]]


def _interleaved(ranked: Sequence[Sequence[str]], weights: Sequence[float]) -> dict[str, float]:
    best: dict[str, tuple[int, float]] = {}
    for docs, weight in zip(ranked, weights, strict=True):
        for rank, doc in enumerate(docs):
            best[doc] = min(best.get(doc, (rank, -weight)), (rank, -weight))
    turns = sorted(set(best.values()), reverse=True)
    score = {turn: float(number) for number, turn in enumerate(turns, 1)}
    return {doc: score[turn] for doc, turn in best.items()}
