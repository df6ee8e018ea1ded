"""How alike two runs rank, whatever is relevant."""

from bisect import bisect_left
from collections.abc import Sequence

from echelon.data.runs import Run
from echelon.evaluate.ranking import trec_order


def kendall_tau(one: Run, other: Run) -> dict[str, float]:
    """Kendall's tau of the documents that both runs rank, for each query where these are at least two.

    Ranks have no ties (see :func:`echelon.evaluate.ranking.trec_order`), so that all its variants agree.

    Returns:
        By query id: 1 for the same order, -1 for the reverse.
    """
    made = {}
    for qid in one:
        shared = one[qid].keys() & other.get(qid, {}).keys()
        pairs = len(shared) * (len(shared) - 1) // 2
        if pairs:
            place = {doc: number for number, doc in enumerate(trec_order({doc: other[qid][doc] for doc in shared}, qid))}
            made[qid] = 1 - 2 * _inversions([place[doc] for doc in trec_order({doc: one[qid][doc] for doc in shared}, qid)]) / pairs
    return made


def _inversions(places: Sequence[int]) -> int:
    seen: list[int] = []
    count = 0
    for place in places:
        at = bisect_left(seen, place)
        count += len(seen) - at
        seen.insert(at, place)
    return count


def rbo(one: Run, other: Run, p: float = 0.9) -> dict[str, float]:
    """Rank-biased overlap, extrapolated, for each query that both runs have.

    Source: Webber, Moffat and Zobel, "A similarity measure for indefinite rankings", ACM TOIS 28(4), 2010, Eq. 32.

    Args:
        one: query id -> document id -> score.
        other: the same.
        p: persistence in (0, 1); the first ``1 / (1 - p)`` ranks have most of the weight.

    Returns:
        By query id: 1 for the same ranking, 0 for rankings without a document in common.

    Raises:
        ValueError: if ``p`` is out of range.
    """
    if not 0 < p < 1:
        raise ValueError(f"p is {p!r}; it must be in (0, 1)")
    return {qid: _overlap(trec_order(one[qid], qid), trec_order(other[qid], qid), p) for qid in one if one[qid] and other.get(qid)}


def _overlap(one: Sequence[str], other: Sequence[str], p: float) -> float:
    short, long = sorted((one, other), key=len)
    shared, total = 0, 0.0
    seen: set[str] = set()
    overlaps: list[int] = []
    for depth in range(1, len(long) + 1):
        for ranking in (short, long):
            if depth <= len(ranking):
                shared += ranking[depth - 1] in seen
                seen.add(ranking[depth - 1])
        overlaps.append(shared)
    at_short, s, at_end, end = overlaps[len(short) - 1], len(short), shared, len(long)
    for depth, overlap in enumerate(overlaps, 1):
        total += overlap / depth * p**depth
        if depth > s:  # below its end the short ranking goes on agreeing as it did there
            total += at_short * (depth - s) / (s * depth) * p**depth
    return (1 - p) / p * total + ((at_end - at_short) / end + at_short / s) * p**end
