"""nDCG@10 as a function of prompts, for every strategy of reranking, at several levels of noise of the judge.

    ECHELON_DATA=... python benchmarks/cost_curves.py

The judge knows the grades and sees them through normal noise, drawn anew for every question (`Oracle`), so that a curve says what a strategy makes of answers
of that quality, whatever model gives them. A model's errors repeat themselves, and asking often does not average them away as it does here: strategies with
many prompts, all pairs above all, look better than they will be. Each query may spend so many prompts; a strategy that cannot go on returns the best order it
has. Strategies that ask everything at once have a single point (`whole list` is full ranking, and also ICR, which takes two passes of the model for it). The
candidates are BM25's first 100 of Cranfield's abstracts, and NovelEval's 20 passages a query ranked by BM25.
"""

import argparse
import json
import os
from pathlib import Path
from statistics import fmean

from echelon.compare.plots import lines
from echelon.data.documents import read_corpus, read_queries
from echelon.data.runs import Qrels, Run, read_qrels
from echelon.evaluate import measures
from echelon.rerank.base import Budget, Request, Strategy, requests_of
from echelon.rerank.executor import execute
from echelon.rerank.oracle import Oracle
from echelon.rerank.strategies.listwise import Knockout, SettlingPasses, Windows
from echelon.rerank.strategies.pairwise import AllPairs, PairHeap, PairPasses
from echelon.rerank.strategies.pointwise import Points
from echelon.rerank.strategies.setwise import SetHeap, SetPasses
from echelon.retrieve.memory import BM25Index

RESULTS = Path(__file__).parent / "results"
STRATEGIES: dict[str, Strategy] = {
    "pointwise": Points(), "all pairs": AllPairs(), "pair heap": PairHeap(), "pair passes": PairPasses(), "set heap of 3": SetHeap(num_child=2),
    "set heap of 20": SetHeap(), "set passes of 3": SetPasses(num_child=2), "set passes of 20": SetPasses(), "windows": Windows(),
    "whole list": Windows(window_size=None), "settling passes": SettlingPasses(), "knockout": Knockout(),
}  # fmt: skip
NOISE = (0.0, 0.5, 1.0, 2.0)
BUDGETS = (1, 2, 3, 5, 8, 12, 20, 30, 50, 80, 120, 200, 300, 500, 800, 1200)
Curves = dict[str, list[list[float]]]


def cranfield(place: Path, depth: int) -> tuple[list[Request], Qrels]:
    """BM25's first documents for each query."""
    index, docs = BM25Index(), list(read_corpus(place))
    index.add(docs)
    index.commit()
    queries, qrels = read_queries(place), read_qrels(place)
    hits = index.search(list(queries.values()), depth)
    run = {qid: found.as_dict() for qid, found in zip(queries, hits, strict=True) if qid in qrels}
    return requests_of(run, queries, {doc.id: doc for doc in docs}), qrels


def noveleval(place: Path) -> tuple[list[Request], Qrels]:
    """All judged passages of each query, ranked by BM25 among themselves."""
    docs, queries, qrels = {doc.id: doc for doc in read_corpus(place)}, read_queries(place), read_qrels(place)
    run: Run = {}
    for qid, judged in qrels.items():
        index = BM25Index()
        index.add([docs[name] for name in judged])
        index.commit()
        run[qid] = {name: 0.0 for name in judged} | index.search([queries[qid]], len(judged))[0].as_dict()
    return requests_of(run, queries, docs), qrels


def curve(strategy: Strategy, requests: list[Request], qrels: Qrels, noise: float, seeds: int) -> list[list[float]]:
    """Mean prompts of a query and nDCG@10, for rising budgets up to what the strategy wants."""
    last, reached = point(strategy, requests, qrels, noise, seeds, None)
    made = []
    for budget in BUDGETS:
        if budget < last:
            spent, quality = point(strategy, requests, qrels, noise, seeds, budget)
            if spent > (made[-1][0] if made else 0):
                made.append([spent, quality])
    return [*made, [last, reached]]


def point(strategy: Strategy, requests: list[Request], qrels: Qrels, noise: float, seeds: int, budget: int | None) -> tuple[float, float]:
    spent, quality = [], []
    for seed in range(seeds if noise else 1):
        oracle = Oracle(qrels, noise=noise, seed=seed)
        run: Run = {}
        for request in requests:
            [ranking], stats, _ = execute(oracle, strategy, [request], budget=None if budget is None else Budget(prompts=budget))
            run[request.qid] = {request.docs[place].id: -float(rank) for rank, place in enumerate(ranking.order)}
            spent.append(stats.prompts)
        quality += measures(run, qrels, ["nDCG@10"])["nDCG@10"].values()
    return fmean(spent), fmean(quality)


def first_stage(requests: list[Request], qrels: Qrels) -> float:
    run = {request.qid: {candidate.doc.id: -float(candidate.rank) for candidate in request.candidates} for request in requests}
    return fmean(measures(run, qrels, ["nDCG@10"])["nDCG@10"].values())


def picture(name: str, found: dict[str, Curves], start: float) -> str:
    """One panel for each level of noise, below each other. A curve begins where it leaves the first stage."""
    panels = []
    for number, (noise, curves) in enumerate(found.items()):
        far = max(point[0] for each in curves.values() for point in each)
        shown = {label: each[max([0, *(place for place, (_, quality) in enumerate(each[:-1]) if quality == start)]) :] for label, each in curves.items()}
        drawn = lines({"first stage": [[1, start], [far, start]], **shown}, f"{name}: nDCG@10, noise of {noise} grades", "prompts per query", True, (960, 400))
        panels.append(drawn.replace("<svg ", f'<svg y="{420 * number}" width="960" height="400" ', 1))
    height = 420 * len(panels)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 {height}" role="img" aria-label="nDCG@10 against prompts, {name}">'
    return f"{head}{''.join(panels)}</svg>\n"


def table(heading: str, found: dict[str, Curves], start: float) -> str:
    """Every strategy at what it asks when nothing stops it."""
    rows = [f"| first stage | 0 | {' | '.join([f'{start:.3f}'] * len(found))} |"]
    for label in next(iter(found.values())):
        ends = [curves[label][-1] for curves in found.values()]
        rows.append(f"| {label} | {ends[0][0]:.1f} | " + " | ".join(f"{end[1]:.3f}" for end in ends) + " |")
    head = "| strategy | prompts | " + " | ".join(f"noise {noise}" for noise in found) + " |"
    return "\n".join([f"### {heading}", "", head, "|---|---:|" + "---:|" * len(found), *rows, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=75, help="of each collection, at most, evenly picked")
    parser.add_argument("--seeds", type=int, default=2, help="of the noise")
    parser.add_argument("--out", type=Path, default=RESULTS)
    told = parser.parse_args()
    place = Path(os.environ["ECHELON_DATA"])
    told.out.mkdir(parents=True, exist_ok=True)
    tables, everything = [], {}
    for name, (requests, qrels) in {"NovelEval": noveleval(place / "noveleval"), "Cranfield": cranfield(place / "cranfield", 100)}.items():
        picked = requests[:: -(-len(requests) // told.queries)]
        held = {request.qid: qrels[request.qid] for request in picked}
        found = {str(noise): {label: curve(each, picked, held, noise, told.seeds) for label, each in STRATEGIES.items()} for noise in NOISE}
        start = first_stage(picked, held)
        everything[name] = {"queries": len(picked), "first_stage": start, "seeds": told.seeds, "curves": found}
        (told.out / f"cost_curves_{name.lower()}.svg").write_text(picture(name, found, start), encoding="utf-8")
        tables.append(table(f"{name}, {len(picked)} queries", found, start))
    (told.out / "cost_curves.json").write_text(json.dumps(everything, indent=1) + "\n")
    about = "nDCG@10 of each strategy when nothing stops it, at several levels of the judge's noise, and its prompts for a query (without noise)."
    about += f" {told.seeds} draws of the noise, new for every question: strategies that ask often average it away, as they could not a model's own errors."
    made = f"# Quality against prompts\n\n    python benchmarks/cost_curves.py\n\n{about}\n\n" + "\n".join(tables)
    (told.out / "cost_curves.md").write_text(made, encoding="utf-8")
    print(made)


if __name__ == "__main__":
    main()
