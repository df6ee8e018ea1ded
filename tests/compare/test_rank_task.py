"""Search and reranking as a bake-off: the measures of the very runs, one candidate list for all rerankers, costs that are the reranker's own."""

import json
import statistics
import time
from typing import get_args

import ir_measures
import numpy as np
import pytest

from echelon.compare import compare, load_recipe
from echelon.compare.recommendation import recommend
from echelon.compare.statistics import summary_of
from echelon.compare.tasks.rank import Task, kind_of, read_collection
from echelon.data.documents import Doc, read_corpus, read_queries
from echelon.data.runs import read_qrels, read_run, write_run
from echelon.errors import UserError
from echelon.rerank import Pointwise
from echelon.rerank.base import requests_of
from echelon.retrieve import BM25, Dense, fuse
from echelon.retrieve.fusion import Fusion

WORDS = ["harbour", "lantern", "orchard", "granite", "violin", "meadow", "copper", "winter"]


def put(folder, prefix, count):
    """Documents of two words each, and a query for each pair of words: its document is relevant, those with one of the words a little."""
    folder.mkdir()
    pairs = [(WORDS[i], WORDS[(i + step) % 8]) for step in (1, 3) for i in range(8)][:count]
    (folder / "corpus.jsonl").write_text(
        "".join(json.dumps({"_id": f"{prefix}{n}", "title": "", "text": f"The {a} and the {b} by the road."}) + "\n" for n, (a, b) in enumerate(pairs))
    )
    (folder / "queries.jsonl").write_text("".join(json.dumps({"_id": f"q{n}", "text": f"{b} with {a}"}) + "\n" for n, (a, b) in enumerate(pairs)))
    lines = ["query-id\tcorpus-id\tscore\n"]
    for n, pair in enumerate(pairs[:-1]):  # the last query has no judgements
        lines += [f"q{n}\t{prefix}{m}\t{len({*pair} & {*other})}\n" for m, other in enumerate(pairs) if {*pair} & {*other} or m % 5 == 0]
    (folder / "qrels.tsv").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rank")
    put(folder / "one", "a", 12)
    put(folder / "two", "b", 6)
    return folder


@pytest.fixture(scope="module")
def told(place):
    return {
        "task": "rank", "isolation": "none", "timing_rounds": 1, "baseline": "bm25", "budget": {"depth": 5, "rerank": 3},
        "data": {"collections": [str(place / "one"), {"path": str(place / "two"), "candidates": "judged"}]},
        "metrics": ["nDCG@10", "AP", "R@2 one", "nDCG@10 two"],
        "methods": ["first_stage", "bm25", {"name": "bm25", "label": "bm25 flat", "knobs": {"b": 0.0, "k1": 0.0}},
                    {"name": "pointwise", "knobs": {"scoring": "query_likelihood"}}, {"name": "cross_encoder", "knobs": {"max_length": 32}}],
    }  # fmt: skip


@pytest.fixture(scope="module")
def done(told, tmp_path_factory):
    out, recipe = tmp_path_factory.mktemp("out"), load_recipe(told)
    results = compare(recipe, out)
    assert all(result["run"]["status"] == "finished" for result in results), [result["run"]["error"] for result in results]
    return summary_of(out, recipe, results)


def by_hand(place, name, measure, run):
    """The measure's values for each judged query, by ir_measures."""
    qrels = read_qrels(place / name)
    found = {told.query_id: told.value for told in ir_measures.iter_calc([ir_measures.parse_measure(measure)], qrels, run)}
    return [found.get(qid, 0.0) for qid in qrels]


def searched(place, name, method, k):
    judged = {qid: text for qid, text in read_queries(place / name).items() if qid in read_qrels(place / name)}
    return method.index(read_corpus(place / name)).search(judged, k)


def among_candidates(place, name, method, k):
    """Each query's judged documents as a collection of their own; what is not found follows in the order of the judgements."""
    docs, queries, run = {doc.id: doc for doc in read_corpus(place / name)}, read_queries(place / name), {}
    for qid, judged in read_qrels(place / name).items():
        found = method.index([docs[name] for name in judged]).search({qid: queries[qid]}, k)[qid]
        order = [*found, *(name for name in judged if name not in found)]
        run[qid] = {name: float(-rank) for rank, name in enumerate(order[:k])}
    return run


@pytest.mark.parametrize(("label", "method"), [("bm25", BM25()), ("bm25 flat", BM25(b=0.0, k1=0.0))])
def test_retrievers_are_measured_on_all_documents_or_on_each_querys_candidates(place, done, label, method):
    one, two = searched(place, "one", method, 5), among_candidates(place, "two", method, 5)
    values, row = {}, done.row(label)
    for measure in ("nDCG@10", "AP", "R@2"):
        values[measure] = by_hand(place, "one", measure, one), by_hand(place, "two", measure, two)
    assert len(values["AP"][0]) == 11 and len(values["AP"][1]) == 5
    both = {measure: [*one, *two] for measure, (one, two) in values.items()}
    expected = {"nDCG@10": both["nDCG@10"], "AP": both["AP"], "R@2 one": values["R@2"][0], "nDCG@10 two": values["nDCG@10"][1]}
    for metric, each in expected.items():
        assert row.values[metric].mean == pytest.approx(statistics.fmean(each), abs=1e-9) and row.values[metric].n == len(each)
    assert row.cost["index_s"] > 0 and row.cost["seconds_per_query"] > 0


def test_the_first_stage_is_bm25_and_has_nothing_to_win(done):
    for metric in done.metrics:
        assert done.row("first_stage").values[metric] == done.row("bm25").values[metric]
        assert done.row("first_stage").versus_baseline[metric].p_holm == 1


def test_a_reranker_gets_the_first_stages_candidates_and_its_costs_are_counted(place, done):
    reranker, runs, prompts = Pointwise(scoring="query_likelihood"), {}, 0
    for name, first in (("one", searched(place, "one", BM25(), 5)), ("two", among_candidates(place, "two", BM25(), 5))):
        result = reranker.rerank(requests_of(first, read_queries(place / name), {doc.id: doc for doc in read_corpus(place / name)}), depth=3)
        runs[name], prompts = result.runs, prompts + result.stats.prompts
    row = done.row("pointwise")
    both = [value for name in runs for value in by_hand(place, name, "nDCG@10", runs[name])]
    assert row.values["nDCG@10"].mean == pytest.approx(statistics.fmean(both)) and row.cost["prompts_per_query"] == prompts / 16
    assert 0 < row.cost["prompts_per_query"] <= 3 and row.cost["tokens_per_query"] > 0 and row.cost["seconds_per_query"] > 0
    assert row.values["AP"].mean != done.row("bm25").values["AP"].mean
    assert done.row("cross_encoder").cost["prompts_per_query"] == row.cost["prompts_per_query"] and "tokens_per_query" not in done.row("cross_encoder").cost


def test_the_report_says_what_was_measured_and_the_recommendation_what_to_run(done):
    assert done.unit == "query" and done.primary == "nDCG@10"
    assert done.scale == "one (11 queries, 12 documents), two (5 queries, 6 documents); best 5 measured, rerankers order 3"
    assert done.metrics["R@2 one"].note == "R@2 over 11 queries of one" and len(done.texts) == 15
    assert done.texts["one q0"]["texts"]["bm25"].startswith("1. [relevant] The harbour and the lantern")
    assert recommend(done, "nDCG@10", "").command.startswith("echelon search --index INDEX --method bm25")
    words = Task().command({"model": "M", "budget": {"rerank": 7}}, "pointwise", {"scoring": "yes_no"})
    assert words[0] == "rerank" and words[-8:] == ["--depth", "7", "--model", "M", "--method", "pointwise", "--method.scoring", "yes_no"]
    assert Task().command({}, "first_stage", {}) == Task().command({}, "hybrid", {"retrievers": ["bm25", {"name": "dense"}]}) == []


def test_the_order_of_a_given_run_is_the_first_stage_and_retrievers_stay_among_its_documents(place, told, tmp_path):
    first = searched(place, "one", BM25(b=0.0), 4)
    write_run(tmp_path / "first.run", {qid: {doc: -score for doc, score in scores.items()} for qid, scores in first.items()})
    data = {"collections": [{"path": str(place / "one"), "candidates": str(tmp_path / "first.run")}]}
    recipe = load_recipe({**told, "data": data, "metrics": ["nDCG@10", "R@100"], "methods": ["first_stage", "bm25"], "baseline": "first_stage"})
    done = summary_of(tmp_path / "out", recipe, compare(recipe, tmp_path / "out"))
    given = by_hand(place, "one", "nDCG@10", read_run(tmp_path / "first.run"))
    assert done.row("first_stage").values["nDCG@10"].mean == pytest.approx(statistics.fmean(given))
    assert done.row("bm25").values["nDCG@10"].mean > done.row("first_stage").values["nDCG@10"].mean
    assert done.row("bm25").values["R@100"].mean == pytest.approx(done.row("first_stage").values["R@100"].mean)


def test_fusions_take_retrievers_with_knobs_and_equal_encoders_are_one(place, told, tmp_path, monkeypatch):
    encoded = []

    class Letters:
        dim, similarity, fingerprint = 26, "cosine", "letters"

        def encode_queries(self, queries):
            return np.array([[1 + query.count(chr(97 + n)) for n in range(26)] for query in queries], dtype=np.float32)

        def encode_documents(self, documents):
            encoded.extend(doc.text for doc in documents)
            time.sleep(0.2)
            return self.encode_queries([doc.text for doc in documents])

    monkeypatch.setattr("echelon.retrieve.encoders.resolve_encoder", lambda spec, **_: spec if hasattr(spec, "dim") else Letters())
    parts = [{"name": "bm25", "knobs": {"b": 0.0}}, {"name": "dense", "knobs": {"encoder": "letters"}}]
    fused = [{"name": "hybrid", "label": how, "knobs": {"retrievers": parts, "fusion": how}} for how in ("rrf", "borda")]
    recipe = load_recipe({**told, "baseline": "rrf", "data": {"collections": [str(place / "one")]}, "metrics": ["nDCG@10"], "methods": [parts[1], *fused]})
    done = summary_of(tmp_path, recipe, compare(recipe, tmp_path))
    assert done.failed == [] and sorted(encoded) == sorted(doc.text for doc in read_corpus(place / "one"))
    assert all(row.cost["index_s"] >= 0.2 for row in done.rows)  # vectors that another method made are paid for all the same
    runs = [searched(place, "one", method, 100) for method in (BM25(b=0.0), Dense(Letters()))]
    for how in ("rrf", "borda"):
        run = {qid: dict(list(scores.items())[:5]) for qid, scores in fuse(runs, how).items()}
        assert done.row(how).values["nDCG@10"].mean == pytest.approx(statistics.fmean(by_hand(place, "one", "nDCG@10", run)), abs=1e-9)


def test_queries_can_be_fewer_and_candidates_come_from_a_run(place, tmp_path):
    write_run(tmp_path / "given.run", {"q0": {"a3": 2.0, "a1": 1.0, "a0": 0.5}, "q5": {"a2": 1.0}})
    held = read_collection("one", place / "one", str(tmp_path / "given.run"), 3, 2)
    assert list(held.queries) == ["q0", "q5", "q10"] and held.candidates == {"q0": ["a3", "a1"], "q5": ["a2"], "q10": []}
    assert held.ranked == {"q0": {"a3": 2.0, "a1": 1.0}, "q5": {"a2": 1.0}, "q10": {}}
    write_run(tmp_path / "bad.run", {"q0": {"x": 2.0}})
    with pytest.raises(UserError, match="the candidate 'x' of query 'q0' is not in the corpus"):
        read_collection("one", place / "one", str(tmp_path / "bad.run"), None, 5)


def test_the_prose_that_ships_is_a_collection_in_which_titles_find_their_passages():
    held = read_collection("passages", None, None, 8, 5)
    assert len(held.documents) == 216 and len(held.queries) == 8
    for qid, title in held.queries.items():
        assert held.qrels[qid] == {qid: 1} and held.documents[qid].title == "" and title not in ("", held.documents[qid].text)
    assert Doc("p001", held.documents["p001"].text) == held.documents["p001"]


def test_the_built_in_recipes_are_sound(monkeypatch, tmp_path):
    monkeypatch.setenv("ECHELON_DATA", str(tmp_path))
    for name in ("cranfield", "vaswani", "cacm", "noveleval"):
        put(tmp_path / name, "d", 4)
    for name in ("rank", "rank_llm", "rank_quick"):
        recipe = load_recipe(name)
        kinds = {kind_of(entry.name) for entry in recipe.methods if entry.name != "first_stage"}
        assert kinds == ({"reranker"} if name == "rank_llm" else {"retriever", "reranker"})
    fusions = {entry.knobs["fusion"] for entry in load_recipe("rank").methods if entry.name == "hybrid"}
    assert fusions == set(get_args(Fusion))


@pytest.mark.parametrize(("change", "message"), [
    ({"data": {"collection": []}}, "unknown key 'collection' under data.*did you mean 'collections'"),
    ({"data": {"collections": []}}, "data.collections is .*; it must be a list of folders"),
    ({"data": {"collections": ["/no/such"]}}, "data.collections: no folder /no/such"),
    ({"data": {"collections": ["{place}"]}}, "holds no corpus.jsonl or corpus.tsv"),
    ({"data": {"collections": ["passages", "passages"]}}, "two collections are called 'passages'"),
    ({"data": {"collections": [{"path": "passages", "candidate": "judged"}]}}, "it must be a folder, or a mapping with path and candidates"),
    ({"data": {"collections": [{"path": "passages", "candidates": "/no.run"}]}}, "the candidates of passages are '/no.run'"),
    ({"data": {"queries": 0}}, "data.queries is 0"), ({"budget": {"depth": "many"}}, "budget.depth is 'many'"),
    ({"budget": {"tokens": 3}}, "unknown key 'tokens' under budget"),
    ({"data": {"first_stage": "bm52"}}, "unknown retriever 'bm52'.*did you mean 'bm25'"),
    ({"data": {"first_stage": {"knobs": {}}}}, "it must be a retriever's name"),
    ({"metrics": ["nDGC@10"]}, "unknown measure 'nDGC'"), ({"metrics": ["AP on"], "data": {"collections": ["passages"]}}, "names the collection 'on'"),
    ({"methods": ["bm52"]}, "unknown retriever or reranker 'bm52'.*did you mean 'bm25'"),
    ({"methods": [{"name": "bm25", "knobs": {"k": 1}}]}, "unknown knob 'k' of bm25"),
    ({"methods": [{"name": "prp", "knobs": {"top_k": 0}}]}, "top_k is 0"),
    ({"methods": [{"name": "hybrid", "knobs": {"retrievers": ["bm25", {"knobs": {}}]}}]}, "retrievers of hybrid is .*; it must be a retriever's name"),
    ({"methods": [{"name": "hybrid", "knobs": {"retrievers": ["bm25", {"name": "dens"}]}}]}, "unknown retriever 'dens' .did you mean 'dense'"),
])  # fmt: skip
def test_what_is_wrong_is_named(told, place, change, message):
    if change.get("data", {}).get("collections") == ["{place}"]:
        change = {"data": {"collections": [str(place)]}}
    with pytest.raises(ValueError, match=message):
        load_recipe({**told, "baseline": "", **({"metrics": []} if "data" in change else {}), **change})
