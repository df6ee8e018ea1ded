"""What every index owes, whatever stores it, and every registered retriever: exact order, nothing lost, nothing seen too early, clear refusals."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from echelon.data.documents import Doc
from echelon.errors import UserError
from echelon.registry import cards
from echelon.retrieve import BM25, Dense, DenseRetriever, Filter, Hybrid, Index, TextRetriever, VietnameseLegal
from small_index import KINDS, QUERIES, HashingEncoder, Store, documents, naming


@pytest.fixture(params=KINDS, ids=" by ".join)
def store(request, tmp_path):
    return Store(*request.param, str(tmp_path / "index"))


def persistent(store):
    return store.kind not in ("vectors", "bm25")


def test_the_order_is_that_of_a_computation_by_hand(store):
    docs = documents()
    with store.make() as index:
        store.add(index, docs)
        for query, hits in zip(QUERIES, store.search(index, QUERIES, 10), strict=True):
            assert list(hits.ids) == store.expected(docs, query, 10)
            assert hits.scores.dtype == np.float32 and (np.diff(hits.scores) <= 0).all()


def test_in_two_steps_is_as_in_one_and_deleted_is_as_never_added(store, tmp_path):
    docs = documents()
    other = Store(store.kind, store.by, str(tmp_path / "other"))
    with store.make() as stepwise, other.make() as at_once:
        store.add(stepwise, docs[20:30])
        store.add(stepwise, docs[:20])
        store.add(stepwise, docs[30:])
        assert stepwise.delete([doc.id for doc in docs[30:]] + ["unknown"]) == 10
        stepwise.commit()
        other.add(at_once, docs[:30])
        assert len(stepwise) == len(at_once) == 30
        for mine, theirs in zip(store.search(stepwise, QUERIES), other.search(at_once, QUERIES), strict=True):
            if store.kind in ("lance", "tantivy", "disk") and store.by == "texts":  # words of deleted documents count until they are merged away
                assert not set(mine.ids) & {doc.id for doc in docs[30:]}
                continue
            assert mine.ids == theirs.ids
            np.testing.assert_array_equal(mine.scores, theirs.scores)


def test_words_put_in_two_steps_weigh_as_in_one(tmp_path):
    docs = documents()
    for kind in ("lance", "tantivy", "disk"):
        one, other = (Store(kind, "texts", str(tmp_path / f"{kind}{step}")) for step in range(2))
        with one.make() as stepwise, other.make() as at_once:
            one.add(stepwise, docs[25:])
            one.add(stepwise, docs[:25])
            other.add(at_once, docs)
            for mine, theirs in zip(one.search(stepwise, QUERIES), other.search(at_once, QUERIES), strict=True):
                assert mine.ids == theirs.ids
                np.testing.assert_allclose(mine.scores, theirs.scores, rtol=1e-6)


def test_nothing_is_seen_before_a_commit_and_all_of_it_after(store):
    docs = documents(12)
    with store.make() as index:
        store.add(index, docs[:10])
        store.add(index, docs[10:], commit=False)
        index.delete(["d00"])
        assert len(index) == 10 and index.existing(["d00", "d10"]) == {"d00"}
        index.commit()
        assert len(index) == 11 and index.existing(["d00", "d10"]) == {"d10"}
        assert store.ids(index, naming(docs[11]), 1) == ["d11"] and "d00" not in store.ids(index, naming(docs[0]), 12)
        store.upsert(index, [Doc("d03", "zebra", meta={"year": 2050}), Doc("d99", "zebra zebra walrus")])
        assert len(index) == 12 and store.ids(index, "zebra", 1)[0] in ("d03", "d99") and set(store.ids(index, "zebra", 2)) == {"d03", "d99"}
        assert store.ids(index, "zebra", 5, "year = 2050") == ["d03"]
        assert store.ids(index, naming(docs[3]), 1) != ["d03"]
        assert index.documents(["d99", "d03"]) == [Doc("d99", "zebra zebra walrus"), Doc("d03", "zebra")] or store.kind == "tantivy"
        assert index.delete(["d99", "d99", "nobody"]) == 1 and index.delete(["d99"]) == 0
        store.upsert(index, [Doc("d99", "yak")])
        assert len(index) == 12 and store.ids(index, "yak", 1) == ["d99"]


def test_documents_and_vectors_come_back_as_they_were(store):
    docs = [*documents(3), Doc("ünï/1", "Zeile\n\"zwei\" 'drei' \\ 東京", "Ein Titel", {"list": [1, {"a": None}], "n": 2.5, "ok": True})]
    with store.make() as index:
        store.add(index, docs)
        found = index.documents(["ünï/1", "d01"])
        assert found == [docs[3], docs[1]] and [dict(doc.meta) for doc in found] == [docs[3].meta, docs[1].meta]
        with pytest.raises(UserError, match="'nobody' is not in"):
            index.documents(["d01", "nobody"])
        if index.space is None:
            with pytest.raises(UserError, match="holds no vectors"):
                index.vectors(["d01"])
            return
        expected = store.encoder.encode_documents([docs[2], docs[0]])
        if store.kind == "qdrant":
            expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
        np.testing.assert_allclose(index.vectors(["d02", "d00"]), expected, rtol=1e-6)
        assert index.vectors([]).shape == (0, 16)


def test_equal_scores_stand_in_the_order_of_ids_and_k_is_no_more_than_a_limit(store):
    docs = [Doc(f"{name}{number}", "the same words") for number in range(9) for name in "cab"]
    with store.make() as index:
        store.add(index, docs[:13])
        store.add(index, docs[13:])
        names = sorted(doc.id for doc in docs)
        for k in (1, 5, 26, 27, 1000):
            assert store.ids(index, "same", k) == names[:k]


FILTERS = [
    "year >= 1990 and year < 2000", "lang = 'en'", "lang in ('fr', 'de') and draft = true", "draft != true", "weight = 1", "weight = 1.5", "weight <= 0.125",
    "year in (1980, 2019)", "year != 1980", "nothing = 1", "year = '1990'", "tags = 'a'", "lang != 'en'", "lang >= 'en'", "lang = 'it''s'",
]  # fmt: skip


def test_filters_hold_before_the_best_are_taken(store):
    docs = documents()
    with store.make() as index:
        store.add(index, docs)
        for told in FILTERS:
            if store.kind == "qdrant" and told in ("lang != 'en'", "lang >= 'en'"):
                with pytest.raises(UserError, match="Qdrant compares texts only by = and in"):
                    store.ids(index, QUERIES[0], 5, told)
                continue
            passing = {doc.id for doc in docs if Filter.parse(told).matches(doc.meta)}
            everything = [name for name in store.ids(index, "title", 100) if name in passing]
            assert store.ids(index, "title", 5, told) == everything[:5], told
            assert len(everything) == len(passing)


def test_order_and_company_of_queries_do_not_matter(store):
    with store.make() as index:
        store.add(index, documents())
        together = store.search(index, QUERIES, 7)
        for query, hits in zip(QUERIES, together, strict=True):
            alone = store.search(index, [query], 7)[0]
            assert alone.ids == hits.ids
            np.testing.assert_allclose(alone.scores, hits.scores, rtol=store.rounding)
        assert [hits.ids for hits in store.search(index, QUERIES[::-1], 7)] == [hits.ids for hits in together[::-1]]
        assert store.search(index, [], 7) == []


def test_an_empty_index_finds_nothing(store):
    with store.make() as index:
        assert len(index) == 0 and store.ids(index, "river") == [] and index.existing(["d00"]) == set() and index.delete(["d00"]) == 0
        index.commit()
        store.add(index, [])
        assert len(index) == 0
        store.add(index, documents(1))
        assert index.delete(["d00"]) == 1
        index.commit()
        assert len(index) == 0 and store.ids(index, "river") == []


CHILD = """
import json, sys
from small_index import QUERIES, Store
from echelon.retrieve import open_index
found = []
for kind, by, place in json.loads(sys.argv[1]):
    with open_index(place) as index:
        found.append([len(index), [[hits.ids, hits.scores.tolist()] for hits in Store(kind, by, place).search(index, QUERIES)]])
print(json.dumps(found))
"""


def test_another_process_finds_the_same(tmp_path):
    expected, stores = [], [Store(*kind, str(tmp_path / "-".join(kind))) for kind in KINDS]
    for store in stores:
        index = store.make()
        store.add(index, documents())
        expected.append([len(index), [[list(hits.ids), hits.scores.tolist()] for hits in store.search(index, QUERIES)]])
        again = store.reopen(index)
        assert store.ids(again, QUERIES[0]) == expected[-1][1][0][0]
        again.close()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "src")])}
    words = [sys.executable, "-W", "ignore", "-c", CHILD, json.dumps([[store.kind, store.by, store.place] for store in stores])]
    told = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert told.returncode == 0, told.stderr
    for store, (count, hits), (mine, theirs) in zip(stores, json.loads(told.stdout), expected, strict=True):
        assert count == mine and [names for names, _ in hits] == [names for names, _ in theirs]
        for (_, scores), (_, others) in zip(hits, theirs, strict=True):
            np.testing.assert_allclose(scores, others, rtol=store.rounding)


def test_many_read_while_one_writes(store):
    docs = documents()
    if store.kind == "qdrant":
        assert "concurrent_readers" not in store.make().capabilities
        return
    with store.make() as index:
        store.add(index, docs[:20])
        wrong, over = [], threading.Event()

        def read():
            while not over.is_set():
                try:
                    found = store.ids(index, naming(docs[7]), 1)
                    if found != ["d07"]:
                        wrong.append(found)
                except Exception as error:
                    wrong.append(error)

        readers = [threading.Thread(target=read) for _ in range(3)]
        for reader in readers:
            reader.start()
        for start in range(20, 40, 5):
            store.add(index, docs[start : start + 5])
        over.set()
        for reader in readers:
            reader.join()
        assert wrong == [] and len(index) == 40


def test_a_second_writer_is_refused_until_the_first_is_done(store):
    if not persistent(store):
        assert "persistent" not in store.make().capabilities
        return
    first = store.make()
    store.add(first, documents(5))
    with pytest.raises(UserError, match="another (writer|process)"):
        second = store.make()
        store.add(second, documents(6)[5:])
    first.close()
    second = store.make()
    store.add(second, documents(6)[5:])
    assert len(second) == 6
    second.close()


def test_an_index_of_another_encoder_is_refused(store):
    index = store.make()
    store.add(index, documents(3))
    if index.space is None:
        index.close()
        return
    other = HashingEncoder(fingerprint="other")
    for encoder, said in ((other, "its fingerprint is 'hashing', the encoder's is 'other'"), (HashingEncoder(12), "its dim is 16")):
        with pytest.raises(UserError, match=said):
            DenseRetriever(index, encoder)
    index = store.reopen(index)
    index.space.require(index.space, "it")
    index.close()
    if persistent(store):
        store.encoder = HashingEncoder(fingerprint="other")
        with pytest.raises(UserError, match="its fingerprint is 'hashing'"):
            store.make()


def test_bad_documents_are_refused_by_name_and_change_nothing(store):
    good = documents(3)
    with store.make() as index:
        store.add(index, good)
        for docs, said in [
            ([Doc("new", "x"), Doc("d01", "y")], "'d01' is in .* already"), ([Doc("new", "x"), Doc("new", "y")], "'new' is in .* twice"),
            ([Doc("new", "x"), Doc("has space", "y")], "'has space'; it must not be empty or have white space"), ([Doc("", "y")], "the id ''"),
            ([Doc("new", "half \ud800 pair")], "'new' has half of a surrogate pair"),
            ([Doc("new", "x", meta={"when": object()})], "meta of the document 'new'"),
            ([Doc("new", "x", meta={"n": float("nan")})], "meta of the document 'new'"),
        ]:  # fmt: skip
            vectors = np.ones((len(docs), 16)) if index.space is not None else None
            with pytest.raises(UserError, match=said):
                index.add(docs, vectors)
        index.commit()
        assert len(index) == 3 and index.existing(["new", "d01"]) == {"d01"}
        assert [doc.text for doc in index.documents(["d01"])] == [good[1].text]


def test_bad_vectors_and_questions_are_refused(store):
    with store.make() as index:
        store.add(index, documents(3))
        with pytest.raises(UserError, match="k is 0; it must be at least 1"):
            store.search(index, ["river"], 0)
        with pytest.raises(UserError, match="the filter 'year >' cannot be read"):
            store.search(index, ["river"], 1, "year >")
        if index.space is None:
            with pytest.raises(UserError, match="holds no vectors; give none"):
                index.add([Doc("new", "x")], np.ones((1, 16)))
            with pytest.raises(UserError, match="cannot be searched by vectors; it holds texts"):
                index.search(np.ones((1, 16)))
            return
        row = np.ones((1, 16))
        bad = [(row * np.nan, "length nan"), (row * np.inf, "length inf"), (row * 0, "zero"), (row[:, :3], r"shape \(1, 3\)")]
        bad += [(row * 1e30, "no longer than 1e")]
        bad += [(np.ones((2, 16)), "2 vectors for 1 documents"), (None, "holds vectors; give one for each")]
        for vectors, said in bad:
            with pytest.raises(UserError, match=said):
                index.upsert([Doc("new", "x")], vectors)
        for vectors, said in bad[:5]:
            with pytest.raises(UserError, match=said):
                index.search(vectors)
        if index.searches == {"vectors"}:
            with pytest.raises(UserError, match="cannot be searched by texts; it holds vectors"):
                index.search(["river"])
        with pytest.raises(UserError, match="the queries are one text"):
            DenseRetriever(index, store.encoder).search("river")
        index.commit()
        assert len(index) == 3


def test_five_megabytes_of_text_and_ten_thousand_words_of_query_are_nothing_special(store):
    long = Doc("long", "river " * 400_000 + "x" * 2_600_000 + " needle")
    with store.make() as index:
        index.add([*documents(5), long], np.random.default_rng(0).normal(size=(6, 16)) if index.space is not None else None)
        index.commit()
        assert index.documents(["long"]) == [long] and len(index.documents(["long"])[0].text) == len(long.text)
        if store.by == "texts":
            assert store.ids(index, "needle") == ["long"]
            many = " ".join(f"word{number} stone" for number in range(5000))
            assert store.ids(index, many) == store.ids(index, "stone") != []
            assert store.ids(index, "   ?! ") == store.ids(index, "") == []


# registered retrievers


METHODS = {
    "bm25": BM25, "bm25 plus": lambda: BM25("bm25+", 0.9, 0.4), "dense": lambda: Dense(HashingEncoder()),
    "hybrid": lambda: Hybrid((BM25(), Dense(HashingEncoder()))),
    "vietnamese_legal": lambda: VietnameseLegal(HashingEncoder(), split_levels="plain", dedup_threshold=None),
}  # fmt: skip


def test_every_registered_retriever_is_in_this_suite():
    assert {card.name for card in cards("retriever")} <= set(METHODS)


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]()


def test_a_retriever_answers_lists_and_mappings_alike_and_the_company_of_queries_does_not_matter(method):
    found = method.index(iter(documents()))
    by_id = found.search({f"q{place}": query for place, query in enumerate(QUERIES)}, 5)
    assert list(by_id) == [f"q{place}" for place in range(len(QUERIES))] and all(1 <= len(scores) <= 5 for scores in by_id.values())
    assert list(found.search(QUERIES, 5).values()) == list(by_id.values()) and list(found.search(QUERIES, 5)) == list("012345")
    assert all(found.search({"q": query}, 5) == {"q": scores} for query, scores in zip(QUERIES, by_id.values(), strict=True))
    assert all(type(score) is float for scores in by_id.values() for score in scores.values())
    assert all(list(scores.values()) == sorted(scores.values(), reverse=True) for scores in by_id.values())
    assert found.search({}, 5) == {} and found.search({"q": "title"}, 100)["q"].keys() == {doc.id for doc in documents()}
    assert found.search({"q": "title"}, 3, "lang = 'fr'")["q"].keys() <= {doc.id for doc in documents() if doc.meta["lang"] == "fr"}


@pytest.mark.parametrize("name", ["bm25", "dense", "hybrid"])
def test_a_retriever_finds_the_same_in_memory_and_on_disk(name, tmp_path):
    method = METHODS[name]()
    docs, store = documents(), Store("disk", "", str(tmp_path / "index"))
    with store.make() as index:
        store.add(index, docs)
        there, here = method.over(index).search(QUERIES, 8), method.index(docs).search(QUERIES, 8)
        assert [list(scores) for scores in there.values()] == [list(scores) for scores in here.values()]


def test_knobs_that_an_index_cannot_follow_are_refused(tmp_path):
    store = Store("tantivy", "texts", str(tmp_path / "index"))
    with store.make() as index:
        with pytest.raises(UserError, match="k1 is 0.9; .* was made with 1.2"):
            BM25(k1=0.9).over(index)
        with pytest.raises(UserError, match="stemmer is 'english'; .* was made with 'none'"):
            BM25(stemmer="english").over(index)
        with pytest.raises(UserError, match="cannot be searched by dense, it holds no vectors"):
            Dense(HashingEncoder()).over(index)
        assert isinstance(BM25().over(index), TextRetriever)


def test_every_index_says_what_it_can(tmp_path):
    for kind, by in KINDS:
        index = Store(kind, by, str(tmp_path / kind)).make()
        assert isinstance(index, Index) and {"incremental_add", "delete", "filter"} <= index.capabilities
        assert ("returns_vectors" in index.capabilities) == (index.space is not None)
        index.close()
