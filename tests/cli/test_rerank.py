"""``echelon rerank``, as a user types it: runs in and out, costs, what is wrong in one line, and going on after kill -9."""

import json
import os
import signal
import time

import pytest

import tiny_chat
from echelon.data.documents import Doc
from echelon.data.runs import read_run, sorted_docs, write_run
from echelon.rerank import PRP, Cache, FullRank, requests_of

QUERIES = {f"q{i}": f"what is number {i}" for i in range(4)}
DOCS = {f"d{i}": Doc(f"d{i}", f"this is passage {i} of rain and wind", "Title" * (i % 2)) for i in range(12)}
RUN = {qid: {f"d{(3 * i + 5 * k) % 12}": 20.0 - k for k in range(9)} for i, qid in enumerate(QUERIES)}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rerank")
    tiny_chat.model().save_pretrained(folder / "lm")
    tiny_chat.tokenizer().save_pretrained(folder / "lm")
    rows = [{"_id": doc.id, "title": doc.title, "text": doc.text} for doc in DOCS.values()]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"_id": "other", "text": "not in the run"}]))
    (folder / "queries.tsv").write_text("".join(f"{qid}\t{text}\n" for qid, text in [*QUERIES.items(), ("q9", "not in the run")]))
    write_run(folder / "bm25.run", RUN)
    return folder


def words(place, out, *more, run="bm25.run"):
    files = ["--run", place / run, "--corpus", place / "corpus.jsonl", "--queries", place / "queries.tsv"]
    return ["rerank", *files, "--model", place / "lm", "--out", out, *more]


def engine(place):
    return str(place / "lm")


def test_a_run_goes_in_and_another_comes_out(echelon, place, tmp_path):
    ran = echelon(*words(place, tmp_path / "new.run", "--depth", "6", "--method", "prp", "--method.top_k", "3", "--json"))
    assert ran.code == 0, ran.err
    expected = PRP(engine(place), top_k=3).rerank(requests_of(RUN, QUERIES, DOCS), depth=6)
    assert read_run(tmp_path / "new.run") == expected.runs
    for qid, scores in expected.runs.items():
        assert sorted_docs(scores)[6:] == list(RUN[qid])[6:] and set(scores) == set(RUN[qid])
    told = json.loads(ran.out)
    stats = expected.stats
    assert (told["queries"], told["prompts"], told["cache_hits"], told["prompt_tokens"]) == (4, stats.prompts, stats.cache_hits, stats.prompt_tokens)
    assert {line.split()[5][:12] for line in (tmp_path / "new.run").read_text().splitlines()} == {"echelon-prp-"}


def test_what_it_cost_is_told(echelon, place, tmp_path):
    ran = echelon(*words(place, tmp_path / "new.run", "--method", "fullrank", "--method.max_new_tokens", "3"))
    assert ran.code == 0
    first, questions, prompts, failures = ran.out.splitlines()
    assert first.startswith(f"{tmp_path / 'new.run'}: 4 queries ranked by fullrank in ")
    assert questions == "questions: 4 in 1 rounds, 0 of them answered from the cache"
    assert prompts.startswith("prompts: 4, with ") and prompts.endswith(" written") and failures == "answers not read completely: 4 unparseable"


def test_a_forecast_asks_nothing(echelon, place, tmp_path):
    told = json.loads(echelon(*words(place, tmp_path / "new.run", "--dry_run", "--json", "--method", "fullrank")).out)
    forecast = FullRank(engine(place)).estimate(requests_of(RUN, QUERIES, DOCS))
    assert (told["prompts"], told["rounds"], told["prompt_tokens"]) == (4, 1, forecast.prompt_tokens) and not (tmp_path / "new.run").exists()
    line = echelon(*words(place, tmp_path / "new.run", "--method.strategy", "allpair", "--dry-run")).out
    assert line.startswith("prp on 4 queries: about 288 prompts in ") and line.endswith(" written\n")


def test_a_budget_cuts_short_and_says_so(echelon, place, tmp_path):
    ran = echelon(*words(place, tmp_path / "new.run", "--max_prompts", "150", "--method.strategy", "allpair"))
    assert ran.code == 0 and "prompts: 144," in ran.out and ran.out.endswith("cut short by --max_prompts: 2 queries\n")
    made = read_run(tmp_path / "new.run")
    assert [sorted_docs(made[qid]) == list(RUN[qid]) for qid in QUERIES].count(True) >= 2


def test_a_cache_makes_the_second_time_free(echelon, place, tmp_path):
    for out, asked in (("one.run", True), ("two.run", False)):
        told = json.loads(echelon(*words(place, tmp_path / out, "--cache", tmp_path / "answers.sqlite", "--json")).out)
        assert (told["prompts"] > 0) == asked and told["cache_hits"] >= (0 if asked else told["calls"])
    assert (tmp_path / "one.run").read_bytes() == (tmp_path / "two.run").read_bytes()


def test_after_kill_9_it_goes_on_where_it_was(process, echelon, place, tmp_path):
    slow = ["--cache", tmp_path / "answers.sqlite", "--method.strategy", "allpair", "--method.batch_size", "1", "--depth", "5", "--json"]
    running = process.start(*words(place, tmp_path / "new.run", *slow))
    while running.poll() is None and known(tmp_path / "answers.sqlite") < 10:
        time.sleep(0.01)
    os.kill(running.pid, signal.SIGKILL)
    running.communicate()
    kept = known(tmp_path / "answers.sqlite")
    assert 10 <= kept < 80 and not (tmp_path / "new.run").exists()
    told = json.loads(echelon(*words(place, tmp_path / "new.run", *slow)).out)
    assert told["cache_hits"] == kept and told["prompts"] == 80 - kept
    assert echelon(*words(place, tmp_path / "whole.run", *slow[2:])).code == 0
    assert (tmp_path / "new.run").read_bytes() == (tmp_path / "whole.run").read_bytes()


def known(path):
    try:
        return len(Cache(path, read_only=True))
    except ValueError:  # not there yet
        return 0


@pytest.mark.parametrize(("more", "said"), [
    (["--run", "/no/such.run"], "cannot read /no/such.run"), (["--queries", "/no/such.tsv"], "cannot read /no/such.tsv"),
    (["--corpus", "/no/such.jsonl"], "cannot read /no/such.jsonl"), (["--model", "/no/such"], "cannot load model '/no/such'"),
    (["--depth", "0"], "depth is 0; it must be at least 1"), (["--max_prompts", "-1"], "the budget of prompts is -1"),
    (["--method", "prq"], "unknown reranker 'prq' (did you mean 'prp'?)"), (["--method.strategy", "bubble"], "strategy is 'bubble'"),
    (["--method.prompt", "rankllm"], "prompt is 'rankllm', a template for list questions"), (["--out", "/"], "--out is '/', which cannot be written to"),
    (["--out", "/proc/no/such/run"], "cannot write /proc/no/such/run"), (["--depht", "3"], "unknown option '--depht' (did you mean '--depth'?)"),
])  # fmt: skip
def test_what_is_wrong_is_named(echelon, place, tmp_path, more, said):
    assert said in echelon(*words(place, tmp_path / "new.run", *more)).refused()
    assert not (tmp_path / "new.run").exists()


def test_what_is_missing_is_named(echelon, place):
    given = words(place, "out.run")
    for name, said in [("corpus", "give the documents by --corpus or by --index"), *((n, f"--{n} is missing; give ") for n in ("run", "queries", "out"))]:
        at = given.index(f"--{name}")
        assert said in echelon(*given[:at], *given[at + 2 :]).refused()
    assert "not by both" in echelon(*given, "--index", "I").refused()


@pytest.mark.parametrize(("lines", "said"), [
    ("q0 Q0 d0 1 2.5 tag\nq0 Q0 d1 2\n", "line 2: 4 columns"), ("q0 Q0 d0 1 high tag\n", "line 1: the score of 'd0' is 'high'"),
    ("q0 Q0 d0 1 2 tag\nq0 Q0 d0 2 1 tag\n", "the document 'd0' is there twice"), ("q7 Q0 d0 1 2 tag\n", "the run has the query 'q7', which the queries lack"),
    ("q0 Q0 d77 1 2 tag\n", "the run has the document 'd77' for the query 'q0', which the corpus lacks"), ("", "bad.run is empty"),
])  # fmt: skip
def test_runs_that_do_not_fit_are_refused_in_one_line(echelon, place, tmp_path, lines, said):
    (place / "bad.run").write_text(lines)
    assert said in echelon(*words(place, tmp_path / "new.run", run="bad.run")).refused()
    assert not (tmp_path / "new.run").exists()


def test_files_that_are_no_cache_are_refused_before_anything_is_asked(echelon, place, tmp_path):
    (tmp_path / "notes.txt").write_text("notes " * 100)
    assert "cannot open the cache" in echelon(*words(place, tmp_path / "new.run", "--cache", tmp_path / "notes.txt")).refused()
    assert (tmp_path / "notes.txt").read_text() == "notes " * 100


def test_help_names_methods_and_knobs(echelon):
    ran = echelon("rerank", "--method", "rank_r1", "--help")
    assert ran.code == 0 and "knockout" in ran.out and "--method.num_child" in ran.out and "--max_prompts" in ran.out
