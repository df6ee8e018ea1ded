"""Answers that are kept: by texts and all else that they depend on, exactly, across processes, and never half."""

import multiprocessing
import os
import signal
import sqlite3
import time

import pytest

from echelon.data.documents import Doc
from echelon.rerank import PRP, Cache, FullRank, Oracle, Request
from echelon.rerank.cache import key_of
from echelon.rerank.executor import execute
from echelon.rerank.questions import Answer
from echelon.rerank.strategies.pairwise import AllPairs
from small_judges import FakeEngine, Says, collection

ANSWERS = [
    Answer((1, 0), (-0.1, -1e-300), "complete", "", 1, 12, 0), Answer((), (), "unparseable", "nothing\n[of] {use} 日本\ud800", 1, 5, 9),
    Answer((0,), (float("-inf"), 0.1 + 0.2, 1 / 3), "repaired", '"', 2, 0, 1),
]  # fmt: skip


@pytest.mark.parametrize("path", [None, "answers.sqlite"])
def test_answers_come_back_exactly(tmp_path, path):
    cache = Cache(path and tmp_path / "new" / path)
    keys = [key_of("judge", "pair", f"query {i}", ["a"]) for i in range(3)]
    cache.put(keys, ANSWERS)
    cache.put(keys[:1], [Answer((0, 1))])  # what is known is not replaced
    assert cache.get([keys[2], key_of("other", "pair", "query 0", ["a"]), *keys]) == [ANSWERS[2], None, *ANSWERS] and len(cache) == 3
    assert cache.get([]) == []
    if path:
        cache.close()
        assert Cache(tmp_path / "new" / path).get(keys) == ANSWERS


def test_thousands_are_looked_up_at_once():
    cache = Cache()
    keys = [key_of("judge", "point", "q", [str(i)]) for i in range(2500)]
    cache.put(keys[::2], [Answer(scores=(float(i),)) for i in range(0, 2500, 2)])
    found = cache.get(keys)
    assert [answer.scores[0] for answer in found[::2]] == list(range(0, 2500, 2)) and found[1::2] == [None] * 1250


def test_a_key_depends_on_everything_and_on_the_order_of_the_texts():
    base = ("judge", "pair", "query", ["a", "b"])
    others = [("judge2", *base[1:]), (base[0], "set", *base[2:]), (*base[:2], "quer", ["ya", "b"])]
    others += [(*base[:3], texts) for texts in (["b", "a"], ["ab"], ["a", "b", ""])]
    assert len({key_of(*one) for one in [base, *others]}) == 7


def test_texts_count_and_ids_do_not():
    asked = []

    def judged(question):
        asked.append(question)
        return Answer((0, 1))

    cache = Cache()
    one = Request.of("query", [Doc("a", "text one"), Doc("b", "text two")], "1")
    execute(Says(judged), AllPairs(), [one], cache)
    execute(Says(judged), AllPairs(), [Request.of("query", [Doc("x", "text two"), Doc("y", "text one")], "2")], cache)
    assert len(asked) == 2
    for other in (Request.of("Query", one.docs, "1"), Request.of("query", [Doc("a", "text one", "Title"), Doc("b", "text two")], "1")):
        execute(Says(judged), AllPairs(), [other], cache)
    assert len(asked) == 6


def test_models_prompts_and_limits_do_not_share_answers():
    cache, docs = Cache(), ["red", "green", "blue"]
    sizes = []
    for reranker in (
        PRP(FakeEngine()), PRP(FakeEngine(), mode="generation"), PRP(FakeEngine(), max_passage_tokens=7), PRP(FakeEngine(), max_query_tokens=7),
        FullRank(FakeEngine()), FullRank(FakeEngine(), constrained=True), FullRank(FakeEngine(), prompt="rankgpt"),
        FullRank(FakeEngine(), identifiers="letter"), FullRank(FakeEngine(), max_new_tokens=5),
    ):  # fmt: skip
        reranker.rerank([Request.of("colour", docs)], cache=cache)
        sizes.append(len(cache))
    assert sizes == sorted(set(sizes))
    PRP(FakeEngine(), batch_size=1, top_k=1, strategy="sliding").rerank([Request.of("colour", docs)], cache=cache)
    assert len(cache) == sizes[-1]


def test_a_read_only_cache_answers_and_takes_nothing(tmp_path):
    requests, qrels = collection(3, 8)
    path = tmp_path / "answers.sqlite"
    PRP(Oracle(qrels)).rerank(requests[:2], cache=path)
    before = path.read_bytes()
    cache = Cache(path, read_only=True)
    found = PRP(Oracle(qrels)).rerank(requests, cache=cache)
    assert found.runs == PRP(Oracle(qrels)).rerank(requests).runs and 0 < found.stats.prompts < PRP(Oracle(qrels)).rerank(requests).stats.prompts
    cache.close()
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match="cannot open the cache .*missing.sqlite"):
        Cache(tmp_path / "missing.sqlite", read_only=True)


def test_files_that_are_no_caches_are_refused_and_left_alone(tmp_path):
    (tmp_path / "text").write_text("this is not a database, but long enough to look at" * 30)
    with pytest.raises(ValueError, match="cannot open the cache .*text: file is not a database"):
        Cache(tmp_path / "text")
    assert (tmp_path / "text").read_text().startswith("this is not")
    other = sqlite3.connect(tmp_path / "other")
    other.execute("CREATE TABLE answers (something TEXT)")
    other.commit()
    with pytest.raises(ValueError, match="cannot open the cache .*other"):
        Cache(tmp_path / "other")
    with pytest.raises(ValueError, match="cannot open the cache"):
        Cache(tmp_path)


def write(path, first, slowly=False):
    cache = Cache(path)
    for i in range(first, first + 200):
        cache.put([key_of("judge", "point", "q", [str(i)])], [Answer(scores=(float(i),))])
        time.sleep(0.01 * slowly)


def test_two_processes_write_one_file(tmp_path):
    path = tmp_path / "answers.sqlite"
    both = [multiprocessing.get_context("fork").Process(target=write, args=(path, first)) for first in (0, 100)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0] and len(Cache(path)) == 300


def test_what_was_put_is_there_after_kill_9(tmp_path):
    path = tmp_path / "answers.sqlite"
    process = multiprocessing.get_context("fork").Process(target=write, args=(path, 0, True))
    process.start()
    while not path.exists() or len(Cache(path)) < 20:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    known = len(Cache(path))
    found = Cache(path).get([key_of("judge", "point", "q", [str(i)]) for i in range(known)])
    assert 20 <= known < 200 and [answer.scores[0] for answer in found] == list(range(known))
