"""Cross-encoders on a server: what is sent and read, what is refused, and what is not asked twice."""

import pytest
import torch

from echelon.errors import UserError
from echelon.llm import Unanswered
from echelon.rerank import CrossEncoder, Request
from echelon.score import ScoreItem
from echelon.score.served import KNOWN, ServedScorer
from stub_server import serving

DOCS = [f"{'b' * n} {n}" for n in (3, 1, 5, 2, 4)]


def letters(path, body, headers=None, count=0):
    """As many points as there are letters b, in the form of the path; the known question is answered well."""
    query, texts = (body["query"], body["documents"]) if path.endswith("/rerank") else (body["text_1"], body["text_2"])
    points = [text.count("b") / 10 for text in texts] if query != KNOWN[0] else [0.9, 0.1]
    key = "relevance_score" if path.endswith("/rerank") else "score"
    made = [{"index": place, key: score} for place, score in enumerate(points)]
    return 200, {"results" if key == "relevance_score" else "data": sorted(made, key=lambda one: -one[key])}


def scorer(url, **knobs):
    return ServedScorer(url, "m", **{"backoff": 0.01, "timeout": 5.0, "retries": 1, **knobs})


@pytest.mark.parametrize("path", ["rerank", "score"])
def test_texts_of_a_query_go_out_together_and_come_back_in_any_order(path):
    items = [ScoreItem(query, text) for text in DOCS for query in ("one", "two")]
    with serving(letters) as (url, seen):
        found = scorer(url, path=path, batch_size=3, extra={"truncate": True}).score(items)
    assert found.dtype == torch.float32 and found.tolist() == pytest.approx([0.3, 0.3, 0.1, 0.1, 0.5, 0.5, 0.2, 0.2, 0.4, 0.4])
    names = ("query", "documents") if path == "rerank" else ("text_1", "text_2")
    assert all(place == f"/v1/{path}" and body["model"] == "m" and body["truncate"] is True for place, body in seen)
    sent = [(body[names[0]], body[names[1]]) for _, body in seen]
    assert sent[0] == (KNOWN[0], list(KNOWN[1:])) and sorted(sent[1:]) == sorted((q, part) for q in ("one", "two") for part in (DOCS[:3], DOCS[3:]))
    assert scorer(url).score([]).shape == (0,)


def test_a_list_without_a_name_is_read_too():
    with serving(lambda path, body, *_: (200, [{"index": 1, "score": 0.2}, {"index": 0, "score": 0.7}])) as (url, _):
        assert scorer(url).score([ScoreItem("q", "a"), ScoreItem("q", "b")]).tolist() == pytest.approx([0.7, 0.2])


@pytest.mark.parametrize(
    "answer",
    [{}, {"results": []}, {"results": [{"index": 0, "relevance_score": 0.1}] * 2}, {"results": [{"index": n, "score": float("nan")} for n in (0, 1)]},
     {"results": [{"index": n, "score": 0.1} for n in (0, 2)]}, {"data": "nothing"}, b"<html>"],
)  # fmt: skip
def test_nonsense_is_asked_again_and_then_told_of(answer):
    with serving(lambda *_: (200, answer)) as (url, seen), pytest.raises(Unanswered, match="answered nonsense"):
        scorer(url).score([ScoreItem("q", "a"), ScoreItem("q", "b")])
    assert len(seen) == 2


def test_a_server_that_fails_a_plain_question_is_warned_of():
    def answer(path, body, headers, count):
        return 200, {"results": [{"index": place, "relevance_score": 0.5} for place in range(len(body["documents"]))]}

    said = "gives 'Eight planets orbit the sun.' 0.5 and .* is it a reranker, and served as one"
    with serving(answer) as (url, _), pytest.warns(UserWarning, match=said):
        assert scorer(url).score([ScoreItem("q", "a")]).tolist() == [0.5]


def test_it_reranks_by_its_address_and_what_was_answered_is_not_asked_again(tmp_path):
    broken = [True]

    def answer(path, body, headers, count):
        return (400, b"no") if body["query"] == "two" and broken[0] else letters(path, body)

    requests = [Request.of(query, DOCS, qid=query) for query in ("one", "two")]
    with serving(answer) as (url, seen):
        reranker = CrossEncoder(f"{url}#m")
        with pytest.raises(Unanswered, match="/v1/rerank answered 400: 'no'"):
            reranker.rerank(requests, cache=tmp_path / "answers.db")
        broken[0] = False
        before = len(seen)
        found = CrossEncoder(f"{url}#m").rerank(requests, cache=tmp_path / "answers.db")
        assert [body["query"] for _, body in seen[before:]] == [KNOWN[0], "two"] and found.score_kind == "prob" and found.stats.cache_hits == 5
        assert all(ranking.order == (2, 4, 0, 3, 1) for ranking in found.rankings.values())
        other = CrossEncoder(f"{url}#n").rerank(requests[:1], cache=tmp_path / "answers.db")
        assert other.stats.cache_hits == 0  # another model's answers are not these


def test_bad_knobs_are_named():
    for knobs, said in (({"path": "embed"}, "path is 'embed'"), ({"batch_size": 0}, "batch_size is 0"), ({"retries": -1}, "retries is -1")):
        with pytest.raises(ValueError, match=said):
            ServedScorer("http://localhost:1/v1", "m", **knobs)
    with pytest.raises(UserError, match="names no model"):
        CrossEncoder("http://localhost:1/v1").rank("q", DOCS)
    with pytest.raises(ValueError, match="max_length is 9"):
        CrossEncoder("http://localhost:1/v1#m", max_length=9)
