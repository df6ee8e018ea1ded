"""Measures of rankings against judgements, query by query, under the names of ir_measures and with the meaning of trec_eval.

Whatever holds a run is put into one matrix of grades (queries, depth) and measured there at once. As in trec_eval a run is sorted by its scores in single
precision, equal ones by document id from the end; ranks and the order of insertion do not count. Documents without a judgement are not relevant.
Runs written by :func:`echelon.data.runs.write_run` have no equal scores.
"""

import ast
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from echelon.data.runs import Qrels, Run
from echelon.errors import UserError
from echelon.registry import suggest

NAMES = ("nDCG@10", "AP", "R@100")
ALIASES = {"NDCG": "nDCG", "MAP": "AP", "MRR": "RR", "Recall": "R", "Precision": "P"}
NEEDS_CUTOFF = ("P", "R", "Success")
UNJUDGED = np.iinfo(np.int32).min  # grade of what nobody judged, and of places behind a ranking's end


@dataclass(frozen=True)
class Measure:
    """A measure with its parameters.

    Attributes:
        name: ``nDCG``, ``RR`` (reciprocal rank), ``AP`` (average precision), ``R`` (recall), ``P`` (precision), ``Success``, ``Judged`` (share of the
            ranking's top that is judged) or ``RBP`` (rank-biased precision).
        cutoff: ranks that count; None for all.
        rel: grade from which a document is relevant. nDCG uses all grades above 0.
        dcg: gain of a grade in nDCG: ``log2`` the grade itself, as trec_eval; ``exp-log2`` ``2 ** grade - 1``, as Burges and gdeval.
        p: persistence of RBP.
    """

    name: str
    cutoff: int | None = None
    rel: int = 1
    dcg: Literal["log2", "exp-log2"] = "log2"
    p: float = 0.8


def parse_measure(told: str) -> Measure:
    """A measure from its name, as in ``nDCG@10``, ``AP(rel=2)@1000``, ``nDCG(dcg='exp-log2')@10`` or ``RBP(p=0.5)``.

    Raises:
        UserError: if there is no such measure or parameter, or its value is out of range.
    """
    try:
        node: ast.expr = ast.parse(told.strip(), mode="eval").body
        cutoff = None
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            cutoff, node = ast.literal_eval(node.right), node.left
        parameters: dict[str, Any] = {}
        if isinstance(node, ast.Call) and not node.args:
            parameters = {str(word.arg): ast.literal_eval(word.value) for word in node.keywords}
            node = node.func
        if not isinstance(node, ast.Name):
            raise ValueError
    except (SyntaxError, ValueError) as error:
        raise UserError(f"measure {told!r} cannot be read; write it as nDCG@10 or AP(rel=2)@100") from error
    name = ALIASES.get(node.id, node.id)
    if name not in KERNELS:
        raise UserError(f"unknown measure {node.id!r}{suggest(node.id, [*KERNELS, *ALIASES])}; measures are {', '.join(KERNELS)}")
    legal = {"nDCG": ["dcg"], "Judged": [], "RBP": ["rel", "p"]}.get(name, ["rel"])
    for parameter in parameters:
        if parameter not in legal:
            raise UserError(f"measure {told!r}: {name} has no {parameter!r}; it has {' and '.join(legal) or 'none'}")
    if cutoff is None and name in NEEDS_CUTOFF:
        raise UserError(f"measure {told!r} needs a cut-off, as in {name}@10")
    for what, value in (("cut-off", cutoff), ("rel", parameters.get("rel"))):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise UserError(f"measure {told!r}: {what} is {value!r}; it must be a whole number of at least 1")
    if parameters.get("dcg", "log2") not in ("log2", "exp-log2"):
        raise UserError(f"measure {told!r}: dcg is {parameters['dcg']!r}; it must be 'log2' or 'exp-log2'")
    p = parameters.get("p", 0.5)
    if not isinstance(p, int | float) or not 0 < p < 1:
        raise UserError(f"measure {told!r}: p is {p!r}; it must be in (0, 1)")
    return Measure(name, cutoff, **parameters)


def measures(run: Run, qrels: Qrels, names: Sequence[str] = NAMES, *, missing_as_zero: bool = True) -> dict[str, dict[str, float]]:
    """Each measure's value for each query that has judgements, in the order of the qrels.

    Args:
        run: query id -> document id -> score. Queries without judgements are left out.
        qrels: query id -> document id -> grade. A query without relevant documents gets 0, as in trec_eval, with a warning.
        names: measures, see :func:`parse_measure`.
        missing_as_zero: judged queries that the run lacks count 0; else they are left out.

    Returns:
        By name as given, then by query id.

    Raises:
        UserError: if there is no such measure, the qrels are empty, no query of the run is judged, or a score is not a number.
    """
    parsed = {name: parse_measure(name) for name in names}
    if not any(qrels.values()):
        raise UserError("qrels are empty; nothing can be measured without judgements")
    if not any(qid in qrels for qid in run):
        raise UserError(f"no query of the run is judged (it has {_some(run)}; the qrels {_some(qrels)}); do both belong to one collection?")
    qids = [qid for qid in qrels if qrels[qid] and (missing_as_zero or qid in run)]
    lists = _graded({qid: run.get(qid, {}) for qid in qids}, qrels)
    bare = [qid for qid, best in zip(qids, lists.ideal[:, 0], strict=True) if best <= 0]
    if bare:
        warnings.warn(f"{len(bare)} of {len(qids)} queries have no relevant document and count 0 ({_some(bare)})", stacklevel=2)
    return {name: dict(zip(qids, map(float, KERNELS[measure.name](lists, measure)), strict=True)) for name, measure in parsed.items()}


@dataclass(frozen=True)
class _Graded:
    """What all measures are made of.

    Attributes:
        grades: grade of the document at each rank; ``UNJUDGED`` where there is none.
        lengths: documents that each ranking has.
        ideal: each query's grades, falling, filled up with ``UNJUDGED``.
    """

    grades: Int[np.ndarray, "queries depth"]
    lengths: Int[np.ndarray, " queries"]
    ideal: Int[np.ndarray, "queries judged"]


def _graded(run: Run, qrels: Qrels) -> _Graded:
    depth = max(1, *map(len, run.values()))
    grades = np.full((len(run), depth), UNJUDGED, dtype=np.int32)
    ideal = np.full((len(run), max(len(qrels[qid]) for qid in run)), UNJUDGED, dtype=np.int32)
    for row, (qid, scores) in enumerate(run.items()):
        judged = qrels[qid]
        grades[row, : len(scores)] = [judged.get(doc, UNJUDGED) for doc in trec_order(scores, qid)]
        ideal[row, : len(judged)] = sorted(judged.values(), reverse=True)
    return _Graded(grades, np.array([len(scores) for scores in run.values()]), ideal)


def trec_order(scores: Mapping[str, float], qid: str = "") -> list[str]:
    """Document ids as trec_eval ranks them: by score in single precision, equal ones by id from the end.

    Raises:
        UserError: if a score is not a number.
    """
    docs = sorted(scores, reverse=True)
    with np.errstate(over="ignore"):
        single = np.array([scores[doc] for doc in docs], dtype=np.float32)
    if np.isnan(single).any():
        raise UserError(f"query {qid}: the score of {docs[int(np.isnan(single).argmax())]!r} is not a number")
    return [docs[place] for place in np.argsort(-single, kind="stable")]


def _ndcg(lists: _Graded, measure: Measure) -> Float[np.ndarray, " queries"]:
    found, best = (_dcg(grades[:, : measure.cutoff], measure.dcg) for grades in (lists.grades, lists.ideal))
    return _ratio(found, best)


def _dcg(grades: Int[np.ndarray, "queries depth"], dcg: str) -> Float[np.ndarray, " queries"]:
    gains = np.maximum(grades, 0).astype(np.float64)
    if dcg == "exp-log2":
        gains = np.exp2(gains) - 1
    return gains @ (1 / np.log2(np.arange(2, gains.shape[1] + 2)))


def _hits(lists: _Graded, measure: Measure) -> Float[np.ndarray, "queries depth"]:
    """1 at the ranks of relevant documents within the cut-off, 0 at others."""
    return (lists.grades[:, : measure.cutoff] >= measure.rel).astype(np.float64)


def _relevant(lists: _Graded, measure: Measure) -> Float[np.ndarray, " queries"]:
    return (lists.ideal >= measure.rel).sum(1).astype(np.float64)


def _ratio(above: Float[np.ndarray, " queries"], below: Float[np.ndarray, " queries"]) -> Float[np.ndarray, " queries"]:
    """Their quotient, 0 where there is nothing to divide by."""
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def _average_precision(lists: _Graded, measure: Measure) -> Float[np.ndarray, " queries"]:
    hits = _hits(lists, measure)
    return _ratio((hits * hits.cumsum(1) / np.arange(1, hits.shape[1] + 1)).sum(1), _relevant(lists, measure))


def _reciprocal_rank(lists: _Graded, measure: Measure) -> Float[np.ndarray, " queries"]:
    hits = _hits(lists, measure)
    return hits.max(1) / (hits.argmax(1) + 1)


def _judged(lists: _Graded, measure: Measure) -> Float[np.ndarray, " queries"]:
    """Of the ranks that a short ranking has, as in ir_measures."""
    judged = (lists.grades[:, : measure.cutoff] != UNJUDGED).sum(1).astype(np.float64)
    return _ratio(judged, np.minimum(lists.lengths, measure.cutoff or lists.grades.shape[1]).astype(np.float64))


def _rank_biased_precision(lists: _Graded, measure: Measure) -> Float[np.ndarray, " queries"]:
    hits = _hits(lists, measure)
    return hits @ ((1 - measure.p) * measure.p ** np.arange(hits.shape[1]))


KERNELS: dict[str, Callable[[_Graded, Measure], Float[np.ndarray, " queries"]]] = {
    "nDCG": _ndcg,
    "AP": _average_precision,
    "RR": _reciprocal_rank,
    "R": lambda lists, measure: _ratio(_hits(lists, measure).sum(1), _relevant(lists, measure)),
    "P": lambda lists, measure: _hits(lists, measure).sum(1) / (measure.cutoff or 1),
    "Success": lambda lists, measure: _hits(lists, measure).max(1),
    "Judged": _judged,
    "RBP": _rank_biased_precision,
}


def _some(ids: Mapping[str, Any] | Sequence[str]) -> str:
    """The first few ids, for a message."""
    return ", ".join(list(ids)[:3]) + (", ..." if len(ids) > 3 else "")
