"""LanceDB tables on object storage, over the S3 protocol, beside the same tables on disk."""

import logging
import time

import numpy as np
import pytest

from echelon.data.documents import Doc
from echelon.errors import UserError
from echelon.retrieve import DiskIndex, LanceIndex, Space, Tokens, lance, make_index, open_index
from small_index import QUERIES, Store, documents, naming


@pytest.fixture(scope="module")
def bucket():
    """The address of a place in a bucket, and how to get there."""
    boto3, server = pytest.importorskip("boto3"), pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    url = "http://{}:{}".format(*running.get_host_and_port())
    keys = {"aws_access_key_id": "name", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=url, **keys).create_bucket(Bucket="collections")
    yield "s3://collections", {"endpoint": url, "allow_http": "true", "aws_access_key_id": "name", "aws_secret_access_key": "secret", "region": "us-east-1"}
    running.stop()


def test_object_storage_and_disk_hold_the_same(bucket, tmp_path):
    place, options = bucket
    docs, found = documents(), []
    for where, how in ((str(tmp_path / "here"), {}), (f"{place}/there", options)):
        store = Store("lance", "texts", where, how)
        with store.make() as index:
            store.add(index, docs[:30])
            store.add(index, docs[30:])
            store.upsert(index, [Doc("d03", "zebra", meta={"year": 2050})])
            assert index.delete(["d05", "nobody"]) == 1
            index.commit()
        with LanceIndex.load(where, Space.of(store.encoder), storage_options=how or None) as again:
            assert len(again) == 39 and again.search(["zebra"], 1, "year > 2000")[0].ids == ("d03",)
            assert again.documents(["d04"]) == [docs[4]] and again.existing(["d05", "d06"]) == {"d06"}
            hits = [*again.search(QUERIES, 8), *again.search(store.encoder.encode_queries(QUERIES), 8, "lang = 'fr'")]
            found.append([(each.ids, each.scores.tolist()) for each in hits])
            np.testing.assert_allclose(again.vectors(["d07"]), store.encoder.encode_documents([docs[7]]))
    assert found[0] == found[1]


def test_a_second_writer_on_object_storage_is_refused(bucket):
    place, options = bucket
    store = Store("lance", "vectors", f"{place}/two", options)
    first = store.make()
    store.add(first, documents(3))
    second = LanceIndex.load(store.place, storage_options=options)
    store.add(second, documents(4)[3:])
    with pytest.raises(UserError, match="has been changed by another writer in the meantime"):
        store.add(first, documents(5)[4:])
    assert len(LanceIndex.load(store.place, storage_options=options)) == 4
    assert first.existing(["d03", "d04"]) == {"d03"}


def test_storage_that_is_not_there_is_one_line(bucket):
    place, options = bucket
    with pytest.raises(UserError, match="s3://collections/none holds no index"):
        LanceIndex.load(f"{place}/none", storage_options=options)
    started = time.monotonic()
    with pytest.raises(UserError, match="cannot open s3://collections/x: ") as error:
        LanceIndex.load(f"{place}/x", storage_options={**options, "endpoint": "http://127.0.0.1:9", "client_max_retries": "0"})
    assert "\n" not in str(error.value) and time.monotonic() - started < 60


def test_the_environment_tells_where_storage_is(bucket, monkeypatch):
    place, options = bucket
    store = Store("lance", "texts", f"{place}/environment", options)
    with store.make() as index:
        store.add(index, documents(5))
    for name, value in options.items():
        monkeypatch.setenv(name.upper() if name.startswith("aws") else f"AWS_{name.upper()}", value)
    with open_index(store.place) as index:
        assert store.ids(index, naming(documents(5)[4]), 1) == ["d04"]


def test_what_was_made_otherwise_is_refused(tmp_path):
    with LanceIndex(tmp_path / "words", tokens=Tokens("english")) as index:
        index.add([Doc("a", "the house")])
        index.commit()
    for options, said in ((dict(space=Space(3)), "was made without vectors"), (dict(tokens=Tokens()), "was made with .*english")):
        with pytest.raises(UserError, match=said):
            LanceIndex(tmp_path / "words", **options)
    with LanceIndex(tmp_path / "vectors", Space(3)) as index:
        index.add([Doc("a", "x")], np.ones((1, 3)))
        index.commit()
        with pytest.raises(UserError, match="cannot be searched by texts; it holds vectors"):
            index.search(["x"])
    with pytest.raises(UserError, match="its dim is 3, the encoder's is 4"):
        LanceIndex.load(tmp_path / "vectors", Space(4))


def test_words_that_came_last_are_found_before_they_are_weighed_anew(tmp_path, monkeypatch):
    monkeypatch.setattr("echelon.retrieve.lance.SMALL", 0)
    docs = documents(80)
    store = Store("lance", "texts", str(tmp_path / "index"))
    with store.make() as index:
        store.add(index, docs[:77])
        store.add(index, docs[77:])
        assert index._table.index_stats("words_idx").num_unindexed_rows == 3
        assert store.ids(index, "only78", 5) == ["d78"] and store.ids(index, naming(docs[2]), 1) == ["d02"]
        store.upsert(index, docs[:20])
        assert index._table.index_stats("words_idx").num_unindexed_rows == 0


def test_now_and_then_small_files_are_joined(tmp_path, monkeypatch):
    monkeypatch.setattr("echelon.retrieve.lance.TIDY", 8)
    with LanceIndex(tmp_path / "index", Space(2)) as index:
        for number in range(16):
            index.add([Doc(f"d{number}", "x")], np.ones((1, 2)))
            index.commit()
        assert index._table.stats()["fragment_stats"]["num_fragments"] <= 2
        assert len(index) == 16 and index.search(np.ones((1, 2), dtype=np.float32), 3)[0].ids == ("d0", "d1", "d10")


@pytest.mark.parametrize(("recall", "least"), [("balanced", 0.95), ("fast", 0.8)])
def test_partitions_find_most_of_what_is_near_also_behind_a_filter_and_as_they_grow(tmp_path, monkeypatch, recall, least):
    monkeypatch.setattr(lance, "CELLS_FROM", 500)
    draw = np.random.default_rng(0)
    centres = draw.normal(size=(40, 16))
    rows = [(centres[draw.integers(0, 40, n)] + 0.4 * draw.normal(size=(n, 16))).astype(np.float32) for n in (2000, 20)]
    docs = [Doc(f"d{n:04}", "x", meta={"year": n % 20}) for n in range(2000)]
    exact, index = (LanceIndex(tmp_path / name, Space(16), recall=name) for name in ("exact", recall))
    for one in (exact, index):
        for start in range(0, 2000, 400):
            one.add(docs[start : start + 400], rows[0][start : start + 400])
            one.commit()
    assert index._cells() == (28, 800) and exact._cells() == (0, 0)  # made at 800 documents, made anew at 3200
    for one in (exact, index):
        one.delete(["d0000"])
        one.add([Doc("new", "x", meta={"year": 1})], rows[1][:1])
        one.commit()
    assert index.search(rows[1][:1], 1)[0].ids == ("new",)
    for wanted in (None, "year = 7"):
        near, found = exact.search(rows[1], 10, wanted), index.search(rows[1], 10, wanted)
        assert all(len(hits) == 10 for hits in found)
        assert np.mean([len(set(a.ids) & set(b.ids)) / 10 for a, b in zip(near, found, strict=True)]) >= least
        known = [dict(zip(hits.ids, hits.scores, strict=True)) for hits in near]
        assert all(abs(known[n].get(name, score) - score) < 1e-5 for n, hits in enumerate(found) for name, score in zip(hits.ids, hits.scores, strict=True))
    monkeypatch.setattr(lance, "GROWN", 2)
    index.add([Doc(f"e{n}", "x") for n in range(20)], rows[1])
    index.commit()
    assert index._cells() == (44, 2020) and sum(i.name.startswith("vector") for i in index._table.list_indices()) == 1
    index.close()
    again = LanceIndex.load(tmp_path / recall)
    assert again.recall == recall and "exact" not in again.capabilities and "exact" in exact.capabilities
    assert len(again.search(rows[1], 10)[3]) == 10


def test_recall_is_one_of_three_and_for_vectors(tmp_path):
    with pytest.raises(UserError, match="recall is 'all'; it must be one of exact, balanced, fast"):
        LanceIndex(tmp_path / "i", Space(16), recall="all")
    with pytest.raises(UserError, match="recall is 'fast'; that is for vectors in LanceDB"):
        make_index(tmp_path / "i", recall="fast")
    index = DiskIndex(tmp_path / "disk", Space(16), recall="fast")
    index.add([Doc("a", "x")], np.ones((1, 16)))
    index.commit()
    index.close()
    with open_index(tmp_path / "disk") as found:
        assert found._table.recall == "fast" and "exact" not in found.capabilities
