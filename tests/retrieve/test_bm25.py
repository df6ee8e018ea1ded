"""BM25 against its formulas, its published figures, and itself on disk; and the words it sees."""

import csv
import json
import math
import os
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import ir_measures
import numpy as np
import pytest
from ir_measures import AP, R, nDCG

from echelon.data.documents import Doc, read_corpus, read_queries
from echelon.errors import UserError
from echelon.retrieve import BM25, BM25Index, DiskIndex, LanceIndex, QdrantIndex, Space, TantivyIndex, Tokens, VectorIndex
from small_index import QUERIES, documents

data = pytest.mark.skipif("ECHELON_DATA" not in os.environ, reason="ECHELON_DATA is not set: no collections to search")


def by_hand(docs, query, variant, k1, b, delta):
    """Each variant as "Which BM25 Do You Mean?" writes it, for documents that share a word with the query."""
    words = [doc.content.lower().split() for doc in docs]
    mean = sum(map(len, words)) / len(docs)
    scores = {}
    for doc, mine in zip(docs, words, strict=True):
        held = [(sum(word in other for other in words), Counter(mine)[word]) for word in query.lower().split()]
        if any(f for _, f in held):
            norm = 1 - b + b * len(mine) / mean
            scores[doc.id] = sum(share(variant, len(docs), holders, f, norm, k1, delta) for holders, f in held if holders)
    return scores


def share(variant, count, holders, f, norm, k1, delta):
    """What one word adds that ``holders`` of ``count`` documents have, and this one ``f`` times."""
    if variant == "lucene":
        return math.log(1 + (count - holders + 0.5) / (holders + 0.5)) * f / (f + k1 * norm)
    if variant == "robertson":
        return max(0.0, math.log((count - holders + 0.5) / (holders + 0.5))) * f / (f + k1 * norm)
    if variant == "atire":
        return math.log(count / holders) * f * (k1 + 1) / (f + k1 * norm)
    if variant == "bm25l":
        return math.log((count + 1) / (holders + 0.5)) * (k1 + 1) * (f / norm + delta) / (k1 + f / norm + delta)
    return math.log((count + 1) / holders) * (f * (k1 + 1) / (f + k1 * norm) + delta)


@pytest.mark.parametrize("variant", ["lucene", "robertson", "atire", "bm25l", "bm25+"])
def test_every_variant_is_its_formula(variant):
    docs = [Doc(doc.id, doc.content.replace("\n", " ")) for doc in documents()]
    index = BM25Index(variant, 0.9, 0.4, 0.7)
    index.add(docs)
    index.commit()
    for query in QUERIES:
        expected = by_hand(docs, query, variant, 0.9, 0.4, 0.7)
        found = index.search([query], 100)[0].as_dict()
        without_weight = {name for name, score in expected.items() if score == 0}
        assert found.keys() == expected.keys() - without_weight
        if variant in ("bm25l", "bm25+"):  # the share of words that a document lacks is the same constant for all; bm25s takes mean lengths for it
            np.testing.assert_allclose([found[n] - max(found.values()) for n in found], [expected[n] - max(expected.values()) for n in found], atol=2e-5)
        else:
            np.testing.assert_allclose([found[n] for n in found], [expected[n] for n in found], rtol=1e-5)


def test_words_are_lower_case_composed_and_whole():
    tokens = Tokens()
    assert tokens("It's Boundary-Layer flow, Mach 2.5: ÜBER_groß!") == ["it", "s", "boundary", "layer", "flow", "mach", "2", "5", "über_groß"]
    assert tokens(unicodedata.normalize("NFD", "Điều kiện hôn_nhân")) == tokens("Điều kiện hôn_nhân") == ["điều", "kiện", "hôn_nhân"]
    assert tokens("東京 都") == ["東京", "都"] and tokens("x" * 1001 + " y") == ["y"] and tokens("") == tokens(" .,\n") == []
    assert Tokens("english")("the house of the rising sun is not a home") == ["house", "rising", "sun", "home"]
    assert Tokens(stemmer="english")("running houses were generously built") == ["run", "hous", "were", "generous", "built"]
    assert Tokens(stemmer="german")("Häuser häusern") == ["haus", "haus"]


def test_saving_that_fails_leaves_what_was_saved_before(tmp_path, monkeypatch):
    index = VectorIndex(Space(2))
    index.add([Doc("a", "x")], np.ones((1, 2)))
    index.commit()
    index.save(tmp_path / "index")
    index.add([Doc("b", "x")], np.ones((1, 2)))
    index.commit()
    monkeypatch.setattr("numpy.save", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        index.save(tmp_path / "index")
    monkeypatch.undo()
    assert len(VectorIndex.load(tmp_path / "index")) == 1 and [file.name for file in tmp_path.iterdir()] == ["index"]
    with pytest.raises(UserError, match="its fingerprint is 'f', the encoder's is 'g'"):
        VectorIndex(Space(2, fingerprint="f")).save(tmp_path / "other")
        VectorIndex.load(tmp_path / "other", Space(2, fingerprint="g"))


@pytest.mark.parametrize(("package", "extra", "make"), [
    ("bm25s", "retrieval", lambda folder: BM25Index()), ("tantivy", "retrieval", lambda folder: TantivyIndex(folder)), ("lancedb", "retrieval", LanceIndex),
    ("tantivy", "retrieval", lambda folder: Tokens(stemmer="english")("x")), ("qdrant_client", "qdrant", lambda folder: QdrantIndex(folder, "c", Space(2))),
])  # fmt: skip
def test_what_is_not_installed_is_one_line_with_its_extra(tmp_path, monkeypatch, package, extra, make):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"needs {package.replace('_', '-')}, which is not installed; install it with: pip install 'echelon\[{extra}\]'"):
        make(tmp_path / "index")


def test_a_tokeniser_of_ones_own_is_used_and_cannot_be_saved(tmp_path):
    index = BM25Index(tokens=lambda text: text.split("|"))
    index.add([Doc("a", "ba na|na"), Doc("b", "na")])
    index.commit()
    assert index.search(["ba na"])[0].ids == ("a",)
    with pytest.raises(UserError, match="cannot be saved"):
        index.save(tmp_path / "index")


@pytest.mark.parametrize(
    ("knobs", "said"),
    [(dict(method="okapi"), "method is 'okapi'; it must be one of lucene"), (dict(k1=-1), "k1 is -1"), (dict(k1=math.nan), "k1 is nan"),
     (dict(b=1.5), r"b is 1.5; it must be in \[0, 1\]"), (dict(delta=math.inf), "delta is inf"), (dict(stemmer="en"), "stemmer is 'en'"),
     (dict(stopwords="klingon"), "stopwords is 'klingon'; it must be one of none, english")],
)  # fmt: skip
def test_knobs_out_of_range_are_named(knobs, said):
    with pytest.raises(ValueError, match=said):
        BM25(**knobs)


@pytest.mark.parametrize("options", [dict(dim=0), dict(dim=3, similarity="l2")])
def test_a_space_that_is_none_is_named(options):
    with pytest.raises(ValueError, match="it must be"):
        Space(**options)


def test_dot_products_are_not_cosines(tmp_path):
    rows = np.array([[1, 0], [3, 3], [0, 2], [-1, 0]], dtype=np.float32)
    for index in (VectorIndex(Space(2, "dot")), DiskIndex(tmp_path / "index", Space(2, "dot"))):
        index.add([Doc(name, "x") for name in "abcd"], rows)
        index.commit()
        hits = index.search(np.array([[2, 1]]), 4)[0]
        assert hits.ids == ("b", "a", "c", "d")
        np.testing.assert_allclose(hits.scores, [9, 2, 2, -2], rtol=1e-6)
        assert index.search(np.array([[0, 0]]), 4)[0].ids == tuple("abcd")
        index.close()


def test_nearly_equal_products_are_told_apart():
    draw = np.random.default_rng(0)
    rows = (draw.normal(size=(1, 64)) + 1e-6 * draw.normal(size=(3000, 64))).astype(np.float32)
    index = VectorIndex(Space(64))
    index.add([Doc(f"{number:04}", "x") for number in range(3000)], rows)
    index.commit()
    wide = rows.astype(np.float64)
    wide /= np.linalg.norm(wide, axis=1, keepdims=True)
    scores = (wide @ wide[7]).astype(np.float32)
    assert list(index.search(rows[7:8], 20)[0].ids) == [f"{place:04}" for place in np.lexsort((np.arange(3000), -scores))[:20]]


def judged(name):
    folder = Path(os.environ["ECHELON_DATA"]) / name
    with open(folder / "qrels.tsv", encoding="utf-8") as file:
        qrels = [ir_measures.Qrel(row["query-id"], row["corpus-id"], int(row["score"])) for row in csv.DictReader(file, delimiter="\t")]
    return list(read_corpus(folder)), read_queries(folder), qrels


def measured(run, qrels, *names):
    return tuple(ir_measures.calc_aggregate(names, qrels, run)[name] for name in names)


@data
@pytest.mark.parametrize(("name", "plain", "stemmed"), [("cranfield", (0.360, 0.277), (0.382, 0.304)), ("cacm", (0.448, 0.316), (0.498, 0.345))])
def test_memory_and_disk_reach_the_same_figures(name, plain, stemmed, tmp_path):
    docs, queries, qrels = judged(name)
    for knobs, expected in ((dict(), plain), (dict(stemmer="english"), stemmed)):
        run = BM25(**knobs).index(docs).search(queries, 1000)
        assert measured(run, qrels, nDCG @ 10, AP) == pytest.approx(expected, abs=0.001)
        with TantivyIndex(tmp_path / str(knobs), Tokens(**knobs)) as index:
            index.add(docs)
            index.commit()
            there = BM25().over(index).search(queries, 10)
        assert measured(there, qrels, nDCG @ 10) == pytest.approx(expected[:1], abs=0.01)
        overlap = [len({*list(run[q])[:10]} & there[q].keys()) / 10 for q in queries if len(there[q]) == 10]
        assert np.mean(overlap) > 0.96


@data
def test_hotpotqa_reaches_the_figures_of_its_readme():
    folder = Path(os.environ["ECHELON_DATA"]) / "hotpotqa"
    rows = [json.loads(line) for name in ("a100", "b500") for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    pool = {}
    for row in rows:
        for title, sentences in row["context"]:
            pool.setdefault((title, "".join(sentences)), Doc(f"p{len(pool)}", "".join(sentences), title))
    queries, qrels = {}, []
    for row in rows:
        gold = {title for title, _ in row["supporting_facts"]}
        mine = {pool[title, "".join(sentences)].id for title, sentences in row["context"] if title in gold}
        queries |= {row["_id"]: row["question"]} if mine else {}
        qrels += [ir_measures.Qrel(row["_id"], name, 1) for name in mine]
    assert (len(pool), len(queries)) == (5895, 522)
    run = BM25(k1=0.9, b=0.4).index(pool.values()).search(queries, 10)
    assert measured(run, qrels, nDCG @ 10, R @ 10) == pytest.approx((0.869, 0.960), abs=0.01)


@data
def test_noveleval_reaches_the_published_figure_among_the_twenty_passages_of_each_query():
    folder = Path(os.environ["ECHELON_DATA"]) / "noveleval"
    docs, queries = list(read_corpus(folder / "corpus.tsv")), read_queries(folder / "queries.tsv")
    qrels = list(ir_measures.read_trec_qrels(str(folder / "qrels.txt")))
    run = {qid: BM25().index([doc for doc in docs if doc.id.startswith(f"{qid}-")]).search({qid: query}, 20)[qid] for qid, query in queries.items()}
    assert measured(run, qrels, nDCG @ 10) == pytest.approx((0.5577,), abs=0.01)
