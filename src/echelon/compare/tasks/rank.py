"""Retrievers and rerankers, compared on test collections with judgements.

A retriever searches each collection itself. A reranker orders what the first stage found there, the same candidates for all; what it spends to do so (prompts,
tokens, seconds) is not held equal, it is measured and becomes an axis of the plot. A collection may bring its own candidates: then a retriever searches among
those of each query. Units are queries, those of all collections together.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from echelon.compare.documents import PASSAGES
from echelon.compare.task import Outcome, Quality, check_keys
from echelon.data.documents import CORPUS, QUERIES, Doc, read_corpus, read_queries
from echelon.data.lines import file_in
from echelon.data.passages import passages
from echelon.data.runs import QRELS, Qrels, Run, read_qrels, read_run, sorted_docs
from echelon.errors import UserError
from echelon.evaluate.ranking import measures, parse_measure
from echelon.registry import build, card, cards, suggest

DATA: dict[str, Any] = {"collections": ["passages"], "queries": None, "first_stage": "bm25", "vectors": None}
BUDGET = {"depth": 100, "rerank": None}
METRICS = ("nDCG@10", "AP", "R@100")
FIRST_STAGE = "first_stage"
SHOWN = 10  # queries of a collection whose best documents are in the report


@dataclass(frozen=True)
class Collection:
    """Documents, judged queries, and their judgements.

    Attributes:
        name: the folder's, or ``passages``.
        documents: by id.
        queries: texts by id.
        qrels: grades of documents, for these queries.
        candidates: documents of each query that are ranked, where these are given; else all may be found.
        ranked: the order in which they were given, where they have one: the first stage.
    """

    name: str
    documents: dict[str, Doc]
    queries: dict[str, str]
    qrels: Qrels
    candidates: dict[str, list[str]] | None = None
    ranked: Run | None = None


@dataclass
class Context:
    """Work shared by all runs.

    Attributes:
        collections: what is searched.
        depth: documents of each query that count.
        rerank: how many of them rerankers order; the others follow.
        model: the recipe's.
        metrics: what is measured.
        vectors: file of documents' vectors; in memory alone when None.
        first: what the first stage found in each collection, the best ``depth`` for each query.
        encoders: of all retrievers, by name.
    """

    collections: list[Collection]
    depth: int
    rerank: int
    model: str
    metrics: list[str]
    vectors: str | None
    first: list[Run] = field(default_factory=list)
    encoders: dict[str, "DocumentsOnce"] = field(default_factory=dict)

    def sharing(self, method: Any) -> Any:
        """The same retriever, with encoders that all retrievers share."""
        if hasattr(method, "parts"):
            return replace(method, retrievers=[self.sharing(part) for part in method.parts])
        if not hasattr(method, "encoder"):
            return method
        name = method.encoder or "embedded"
        if name not in self.encoders:
            self.encoders[name] = DocumentsOnce(name, self.vectors)
        return replace(method, encoder=self.encoders[name])


class DocumentsOnce:
    """An encoder that makes a document's vector once, for all retrievers. Queries are encoded anew: that is part of a search's cost.

    Attributes:
        saved: seconds that were not spent again.
    """

    def __init__(self, name: str, path: str | None):
        from echelon.retrieve import CachedEncoder, resolve_encoder

        encoder = resolve_encoder(name)
        self.dim, self.similarity, self.fingerprint = encoder.dim, encoder.similarity, encoder.fingerprint
        self.encode_queries = encoder.encode_queries
        self.saved = 0.0
        self._encode = encoder.encode_documents if path is None else CachedEncoder(encoder, path).encode_documents
        self._known: dict[str, tuple[np.ndarray, float]] = {}

    def encode_documents(self, documents: list[Doc]) -> np.ndarray:
        """Float32 vectors [n, dim]."""
        texts = {doc.content: doc for doc in documents}
        new = [doc for text, doc in texts.items() if text not in self._known]
        self.saved += sum(self._known[text][1] for text in texts if text in self._known)
        if new:
            started = time.perf_counter()
            vectors = self._encode(new)
            each = (time.perf_counter() - started) / len(new)
            self._known |= {doc.content: (vector, each) for doc, vector in zip(new, vectors, strict=True)}
        return np.stack([self._known[doc.content][0] for doc in documents])


class Task:
    """Rankings of the same documents for the same queries.

    Recipe keys:

    - ``data.collections`` is a list of folders (corpus, queries and qrels as BEIR or TREC write them), or ``passages`` (titles of the prose that ships, each of
      which must find its passage); in place of a folder a mapping with ``path`` and ``candidates``, which is ``judged`` (each query's judged documents) or the
      file of a run, whose order then is the first stage. ``data.queries`` takes so many of each collection, evenly picked.
    - ``data.first_stage`` is the retriever whose candidates rerankers get, a name or a mapping with ``name`` and ``knobs``; so may retrievers of ``hybrid`` be.
    - ``data.vectors`` is a file in which documents' vectors are kept from one comparison to the next; ``index_s`` is then without what was kept.
    - ``budget.depth`` documents of each query are measured, ``budget.rerank`` of them reordered.
    - A metric is a measure named as in ir_measures, over all queries, or a measure and a collection (``AP cranfield``).
    - ``model`` is for rerankers whose knobs name none. An entry ``first_stage`` shows the first stage as it is.
    """

    kind = ""  # of two kinds; `check` builds the methods
    unit = "query"
    cost_axis = "seconds_per_query"
    primary = "nDCG@10"
    reference = FIRST_STAGE
    columns = ("index_s",)

    def check(self, recipe: Any) -> None:
        check_keys({"data": DATA, "budget": BUDGET}, recipe)
        for name, value in {"data.queries": recipe.data.get("queries"), **{f"budget.{key}": recipe.budget.get(key) for key in BUDGET}}.items():
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise UserError(f"{name} is {value!r}; it must be a whole number of at least 1")
        places = _places(recipe)
        for name, (path, candidates) in places.items():
            if path is not None and not path.is_dir():
                raise UserError(f"data.collections: no folder {path}; give one with corpus, queries and qrels, or passages")
            if path is not None:
                _files(path)
            if candidates not in (None, "judged") and not Path(candidates).is_file():
                raise UserError(f"data.collections: the candidates of {name} are {candidates!r}; give judged, or the file of a run")
        for metric in recipe.metrics or METRICS:
            measure, _, name = metric.partition(" ")
            parse_measure(measure)
            if name and name not in places:
                raise UserError(f"metric {metric!r} names the collection {name!r}{suggest(name, places)}; collections are {', '.join(places)}")
        _retriever(*_named(recipe.data.get("first_stage", DATA["first_stage"]), "data.first_stage"))
        for entry in recipe.methods:
            if entry.name != FIRST_STAGE and kind_of(entry.name) == "retriever":
                _retriever(entry.name, entry.knobs)
            elif entry.name != FIRST_STAGE:
                build(entry.name, "reranker", entry.knobs)

    def sources(self, recipe: Any) -> list[Path]:
        found = []
        for path, candidates in _places(recipe).values():
            found += sorted(PASSAGES.glob("*.jsonl")) if path is None else _files(path)
            found += [Path(candidates)] if candidates not in (None, "judged") else []
        return found

    def describe(self, context: Context) -> str:
        told = ", ".join(f"{held.name} ({len(held.queries)} queries, {len(held.documents)} documents)" for held in context.collections)
        return f"{told}; best {context.depth} measured, rerankers order {context.rerank}"

    def command(self, recipe: dict[str, Any], method: str, knobs: dict[str, Any]) -> list[str]:
        if method == FIRST_STAGE or any(isinstance(part, dict) for part in knobs.get("retrievers", ())):
            return []
        told = [word for name, value in knobs.items() for word in (f"--method.{name}", str(value))]
        if kind_of(method) == "retriever":
            return ["search", "--index", "INDEX", "--method", method, *told, "QUERY"]
        budget, model = {**BUDGET, **recipe.get("budget", {})}, recipe.get("model", "embedded")
        named = ["--model", model] if model != "embedded" and "model" not in knobs else []
        files = ["--run", "RUN", "--corpus", "CORPUS", "--queries", "QUERIES", "--out", "OUT", "--depth", str(budget["rerank"] or budget["depth"])]
        return ["rerank", *files, *named, "--method", method, *told]

    def prepare(self, recipe: Any) -> Context:
        budget = {**BUDGET, **recipe.budget}
        depth = budget["depth"]
        collections = [read_collection(name, *place, recipe.data.get("queries"), depth) for name, place in _places(recipe).items()]
        rerank = min(depth, budget["rerank"] or depth)
        context = Context(collections, depth, rerank, recipe.model, list(recipe.metrics or METRICS), recipe.data.get("vectors"))
        stage = context.sharing(_retriever(*_named(recipe.data.get("first_stage", DATA["first_stage"]), "data.first_stage")))
        context.first = [held.ranked or _Searched(stage, held).search(held.queries, depth) for held in collections]
        return context

    def run(self, context: Context, entry: Any, seed: int) -> Outcome:
        runs, cost, notes = self._ranked(context, entry, seed)
        quality = {}
        for metric in context.metrics:
            measure, _, name = metric.partition(" ")
            told = [
                value for held, run in zip(context.collections, runs, strict=True) if name in ("", held.name)
                for value in measures(run, held.qrels, [measure])[measure].values()
            ]  # fmt: skip
            quality[metric] = Quality(fmean(told), "", True, np.array(told), f"{measure} over {len(told)} queries" + (f" of {name}" if name else ""))
        lengths = [len(scores) for run in runs for scores in run.values()]
        budget = {"unit": "documents per query", "allowed": context.depth, "used": fmean(lengths)}
        samples = [sample for held, run in zip(context.collections, runs, strict=True) for sample in _samples(held, run)]
        return Outcome(quality, cost, budget, samples, notes=notes)

    def timing(self, context: Context, entry: Any) -> float:
        """Seconds a query, over the first eight of the first collection."""
        held, first = context.collections[0], context.first[0]
        few = dict(list(held.queries.items())[:8])
        if entry.name == FIRST_STAGE:
            return 0.0
        if kind_of(entry.name) == "retriever":
            searched = _Searched(context.sharing(_retriever(entry.name, entry.knobs)), held)
            started = time.perf_counter()
            searched.search(few, context.depth)
        else:
            reranker = _reranker(context, entry, 0)
            from echelon.rerank.base import requests_of

            requests = requests_of({qid: first[qid] for qid in few}, held.queries, held.documents)
            reranker.rerank(requests[:1], depth=1)  # the model is loaded
            started = time.perf_counter()
            reranker.rerank(requests, depth=context.rerank)
        return (time.perf_counter() - started) / len(few)

    def _ranked(self, context: Context, entry: Any, seed: int) -> tuple[list[Run], dict[str, float], list[str]]:
        """A run for each collection, what they cost, and what is to be said of it."""
        queries = sum(len(held.queries) for held in context.collections)
        if entry.name == FIRST_STAGE:
            return context.first, {"seconds_per_query": 0.0}, []
        if kind_of(entry.name) == "retriever":
            method, runs, seconds, building = context.sharing(_retriever(entry.name, entry.knobs)), list[Run](), 0.0, 0.0
            saved = sum(encoder.saved for encoder in context.encoders.values())
            for held in context.collections:
                started = time.perf_counter()
                searched = _Searched(method, held)
                building += time.perf_counter() - started
                started = time.perf_counter()
                runs.append(searched.search(held.queries, context.depth))
                seconds += time.perf_counter() - started
            building += sum(encoder.saved for encoder in context.encoders.values()) - saved
            return runs, {"seconds_per_query": seconds / queries, "index_s": building}, []
        from echelon.rerank.base import requests_of

        reranker, results = _reranker(context, entry, seed), []
        for held, first in zip(context.collections, context.first, strict=True):
            results.append(reranker.rerank(requests_of(first, held.queries, held.documents), depth=context.rerank))
        stats = [result.stats for result in results]
        cost = {f"{name}_per_query": sum(getattr(one, name) for one in stats) / queries for name in ("seconds", "prompts")}
        if tokens := sum(one.prompt_tokens + one.generated_tokens for one in stats):  # scorers do not count theirs
            cost["tokens_per_query"] = tokens / queries
        failures = {status: sum(one.failures.get(status, 0) for one in stats) for one in stats for status in one.failures}
        asked = sum(one.calls for one in stats)
        return [result.runs for result in results], cost, [f"{count} of {asked} answers were {status}" for status, count in failures.items()]


class _Searched:
    """A retriever over a collection, or over each query's candidates where the collection gives them."""

    def __init__(self, method: Any, held: Collection):
        self.held = held
        if held.candidates is None:
            self.whole = method.index(held.documents.values())
        else:
            self.parts = {qid: method.index([held.documents[name] for name in names]) for qid, names in held.candidates.items()}

    def search(self, queries: Mapping[str, str], k: int) -> Run:
        """The best ``k``; candidates that were not found follow in their order."""
        candidates = self.held.candidates
        if candidates is None:
            return self.whole.search(queries, k)
        run: Run = {}
        for qid, text in queries.items():
            scores = self.parts[qid].search({qid: text}, k)[qid]
            least = min(scores.values(), default=0.0)
            rest = [name for name in candidates[qid] if name not in scores]
            run[qid] = scores | {name: least - place for place, name in enumerate(rest[: k - len(scores)], 1)}
        return run


def kind_of(name: str) -> str:
    """Whether a method is a retriever or a reranker.

    Raises:
        UserError: if it is neither.
    """
    pool = {known.name: kind for kind in ("retriever", "reranker") for known in cards(kind)}
    if name not in pool:
        raise UserError(f"unknown retriever or reranker {name!r}{suggest(name, [*pool, FIRST_STAGE])}; see `echelon methods`, or give {FIRST_STAGE}")
    return pool[name]


def read_collection(name: str, path: Path | None, candidates: str | None, queries: int | None, depth: int) -> Collection:
    """A collection with its judged queries, so many of them at most, evenly picked, and the first ``depth`` candidates of a run.

    Raises:
        UserError: if a file cannot be read, no query is judged, or a candidate is no document.
    """
    if path is None:
        held = {passage.id: passage for passage in passages()}
        documents = {doc: Doc(doc, passage.text) for doc, passage in held.items()}
        texts, qrels = {doc: passage.title for doc, passage in held.items()}, {doc: {doc: 1} for doc in held}
    else:
        documents = {doc.id: doc for doc in read_corpus(path)}
        texts, qrels = read_queries(path), read_qrels(path)
    judged = [qid for qid in texts if any(grade > 0 for grade in qrels.get(qid, {}).values())]
    if not judged:
        raise UserError(f"{path}: no query has a relevant document")
    picked = judged if queries is None or queries >= len(judged) else [judged[place] for place in np.linspace(0, len(judged) - 1, queries).round().astype(int)]
    qrels = {qid: qrels[qid] for qid in picked}
    queries_held = {qid: texts[qid] for qid in picked}
    if candidates is None:
        return Collection(name, documents, queries_held, qrels)
    run = None if candidates == "judged" else read_run(candidates)
    ranked = None if run is None else {qid: {doc: run[qid][doc] for doc in sorted_docs(run[qid])[:depth]} if qid in run else {} for qid in picked}
    given = {qid: list(qrels[qid]) if ranked is None else list(ranked[qid]) for qid in picked}
    for qid, names in given.items():
        for doc in names:
            if doc not in documents:
                raise UserError(f"{path}: the candidate {doc!r} of query {qid!r} is not in the corpus")
    return Collection(name, documents, queries_held, qrels, given, ranked)


def _places(recipe: Any) -> dict[str, tuple[Path | None, str | None]]:
    """Folder and candidates of each collection, by name."""
    told = recipe.data.get("collections", DATA["collections"])
    if not isinstance(told, list) or not told:
        raise UserError(f"data.collections is {told!r}; it must be a list of folders")
    found: dict[str, tuple[Path | None, str | None]] = {}
    for one in told:
        held = {"path": one} if isinstance(one, str) else one
        if not isinstance(held, dict) or not isinstance(held.get("path"), str) or set(held) - {"path", "candidates"}:
            raise UserError(f"data.collections has {one!r}; it must be a folder, or a mapping with path and candidates")
        path = None if held["path"] == "passages" else Path(held["path"])
        name = "passages" if path is None else path.name
        if name in found:
            raise UserError(f"data.collections: two collections are called {name!r}")
        found[name] = (path, held.get("candidates"))
    return found


def _files(path: Path) -> list[Path]:
    return [file_in(path, names) for names in (CORPUS, QUERIES, QRELS)]


def _named(told: Any, where: str) -> tuple[str, dict[str, Any]]:
    """Name and knobs, from a name or a mapping."""
    held = {"name": told} if isinstance(told, str) else told
    if not isinstance(held, dict) or "name" not in held or set(held) - {"name", "knobs"}:
        raise UserError(f"{where} is {told!r}; it must be a retriever's name, or a mapping with name and knobs")
    return held["name"], held.get("knobs") or {}


def _retriever(name: str, knobs: Mapping[str, Any]) -> Any:
    """A retriever; those of a list in its knobs may be mappings."""
    made = dict(knobs)
    if isinstance(made.get("retrievers"), list):
        made["retrievers"] = [_retriever(*_named(part, f"retrievers of {name}")) for part in made["retrievers"]]
    return build(name, "retriever", made)


def _reranker(context: Context, entry: Any, seed: int) -> Any:
    legal = [knob.name for knob in card(entry.name, "reranker").knobs]
    knobs: dict[str, Any] = {"seed": seed} if "seed" in legal else {}
    if context.model != "embedded" and "model" in legal:
        knobs["model"] = context.model
    return build(entry.name, "reranker", {**knobs, **entry.knobs})


def _samples(held: Collection, run: Run) -> list[dict[str, str]]:
    """The best five documents of some queries, those that are relevant marked."""
    made = []
    for qid in list(held.queries)[:SHOWN]:
        grades = held.qrels[qid]
        lines = []
        for rank, doc in enumerate(sorted_docs(run.get(qid, {}))[:5], 1):
            lines.append(f"{rank}. {'[relevant] ' if grades.get(doc, 0) > 0 else ''}{_shown(held.documents[doc])}")
        relevant = "; ".join(_shown(held.documents[doc]) for doc in [doc for doc, grade in grades.items() if grade > 0 and doc in held.documents][:5])
        made.append({"unit": f"{held.name} {qid}", "prompt": held.queries[qid], "reference": relevant, "text": "\n".join(lines)})
    return made


def _shown(doc: Doc) -> str:
    words = (doc.title or doc.text).split()
    return " ".join(words[:12]) + (" ..." if len(words) > 12 else "")
