"""A server as an engine: what it says is understood, what fails in passing is asked again, and what fails for good loses nothing."""

import asyncio
import math
import threading
import time

import numpy as np
import pytest

from echelon.llm import Permutation, Prompt, ServerEngine, Unanswered
from echelon.llm.server import read_choices
from stub_server import serving


def chat(text, tokens=3, finish="stop", logprobs=None):
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return {"choices": [choice | ({"logprobs": {"content": logprobs}} if logprobs is not None else {})], "usage": {"completion_tokens": tokens}}



def listed(token, alternatives):
    return {"token": token, "logprob": -0.1, "top_logprobs": [{"token": other, "logprob": value} for other, value in alternatives.items()]}


def engine(url, **knobs):
    return ServerEngine(url, "m", **{"backoff": 0.01, "timeout": 5.0, **knobs})


def asked(*texts, prefix=""):
    return [Prompt((("system", "be kind"), ("user", text)), prefix) for text in texts]


def told(body):
    return body["messages"][-1]["content"]


# -- what is sent and read ------------------------------------------------------------------------------------------------


def test_a_conversation_is_sent_and_its_continuations_are_read():
    def answer(path, body, headers, count):
        return 200, chat(f"{told(body)} {body['seed']} END more", 7, "length" if "long" in told(body) else "stop")

    with serving(answer) as (url, seen):
        made = engine(url, extra={"top_k": 5}).generate(asked("a", "long"), max_new_tokens=9, temperature=0.5, stop=[" END"], n=2, seed=4)
        assert [[text.text for text in texts] for texts in made] == [["a 4", "a 5"], ["long 4", "long 5"]]
        assert all((text.tokens, text.finish) == (7, "stop") for texts in made for text in texts)
        path, body = next(one for one in seen if told(one[1]) == "a" and one[1]["seed"] == 4)
        assert path == "/v1/chat/completions" and body["messages"][0] == {"role": "system", "content": "be kind"} and len(seen) == 4
        assert body == {"model": "m", "max_tokens": 9, "temperature": 0.5, "stop": [" END"], "top_k": 5, "seed": 4, "messages": body["messages"]}
        found = engine(url).generate(asked("long"), max_new_tokens=9)[0][0]
        assert found.finish == "length" and "stop" not in seen[-1][1] and seen[-1][1]["temperature"] == 0
    with pytest.raises(ValueError, match="cannot be held to a constraint"):
        engine(url).generate(asked("a"), max_new_tokens=3, constraint=[Permutation(2)])


def test_models_without_a_chat_template_are_sent_the_text():
    def answer(path, body, headers, count):
        logprobs = {"tokens": [" A"], "top_logprobs": [{" A": -0.5, " B": -1.0, "\n": -3.0}]} if "logprobs" in body else None
        return 200, {"choices": [{"text": " A man", "finish_reason": "length", "logprobs": logprobs}]}

    with serving(answer) as (url, seen):
        made = engine(url, chat=False)
        found = made.generate(asked("which", prefix="Passage"), max_new_tokens=2)[0][0]
        assert (found.text, found.finish, found.tokens) == (" A man", "length", math.ceil(6 / 3.5)) and made.capabilities == {"logprobs"}
        assert seen[0] == ("/v1/completions", {"model": "m", "max_tokens": 2, "temperature": 0.0, "prompt": "be kind\n\nwhich\n\nPassage", "seed": 0})
        assert made.score_choices(asked("which", prefix="Passage"), [[" A", " B", " C"]])[0].tolist() == pytest.approx([-0.5, -1.0, -math.inf])
        assert seen[1][1]["logprobs"] == 20 and seen[1][1]["max_tokens"] == 1 and made.missing == 1


def test_choices_are_scored_where_the_answer_comes_to_them():
    words = [listed("Passage", {"Passage": -0.1, "Both": -2.5, "A": -4.0}), listed(" A", {" A": -0.3, " B": -1.5, " C": -4.0})]

    def answer(path, body, headers, count):
        begun = body.get("continue_final_message")
        return 200, chat("Passage A", logprobs=words[1:] if begun else words[: body["max_tokens"]])

    with serving(answer) as (url, seen):
        made = engine(url)
        scores = made.score_choices(asked("x", "y", prefix="Passage"), [[" A", " B"], [" B", " D"]])
        assert [found.tolist() for found in scores] == [pytest.approx([-0.3, -1.5]), pytest.approx([-1.5, -math.inf])] and scores[0].dtype == np.float32
        assert made.missing == 1 and seen[0][1]["logprobs"] is True and seen[0][1]["top_logprobs"] == 20 and seen[0][1]["max_tokens"] >= 2
        begun = engine(url, prefill=True).score_choices(asked("x", prefix="Passage"), [[" A", " B"]])
        assert begun[0].tolist() == pytest.approx([-0.3, -1.5]) and seen[-1][1]["messages"][-1] == {"role": "assistant", "content": "Passage"}
        assert seen[-1][1]["max_tokens"] == 1 and seen[-1][1]["add_generation_prompt"] is False


def test_what_answers_depend_on_is_in_the_identity():
    knobs = {"prefill": True, "chat": False, "top_logprobs": 5, "context_length": 99, "tokenizer": "t", "extra": {"a": 1}}
    identities = [engine("http://a/v1").identity, engine("http://b/v1").identity, *(engine("http://a/v1", **{k: v}).identity for k, v in knobs.items())]
    assert len(set(identities)) == 8 and engine("http://a/v1", concurrency=3, retries=1).identity == identities[0]


@pytest.mark.parametrize(
    ("positions", "prefix", "choices", "expected"),
    [
        ([("A", {"A": -0.1, " A": -2.0, "B": -1.0})], "", ["A", "B"], [math.log(math.exp(-0.1) + math.exp(-2)), -1.0]),
        ([("Passage ", {"Passage ": 0.0}), ("B", {"A": -1.0, "B": -0.5})], "Passage", [" A", " B"], [-1.0, -0.5]),
        ([("Pass", {"Pass": 0.0}), ("age", {"age": 0.0}), (" ", {" ": 0.0}), ("B", {"A": -1.0, "B": -0.5})], "Passage", [" A", " B"], [-1.0, -0.5]),
        ([("B", {"A": -1.0, "B": -0.5, "Passage": -3.0})], "Passage", [" A", " B"], [-1.0, -0.5]),
        ([("\n", {"\n": 0.0}), ("Yes", {"Yes": -0.2, "No": -2.0})], "", ["Yes", "No"], [-0.2, -2.0]),
        ([("Neither", {"Neither": -0.2, "None": -2.0})], "", ["Yes", "No"], [-math.inf, -math.inf]),
        ([("Actually", {"Actually": -0.2, "B.": -1.0})], "", ["A", "B"], [-math.inf, -1.0]),
        ([("rele", {"rele": -0.2, "irre": -1.0})], "", ["relevant", "irrelevant"], [-0.2, -1.0]),
        ([("1", {"1": -0.1, "2": -1.0})], "", ["12", "13", "2"], [-math.inf, -math.inf, -1.0]),
        ([("1", {"1": -0.1}), ("3", {"2": -1.0, "3": -0.2, "4": -0.3})], "", ["12", "13"], [-1.0, -0.2]),
        ([("Passage", {"Passage": 0.0})], "Passage", [" A", " B"], [-math.inf, -math.inf]),
    ],
)
def test_log_probabilities_are_those_of_the_deciding_token(positions, prefix, choices, expected):
    from os.path import commonprefix

    shared = commonprefix([(prefix + choice).lstrip() for choice in choices])  # noqa: RUF071 (characters are what is meant)
    np.testing.assert_allclose(read_choices(positions, prefix, choices, shared), expected, rtol=1e-6)


@pytest.mark.parametrize("logprobs", [None, "null"])
def test_a_server_without_log_probabilities_says_what_to_do(logprobs):
    said = chat("Yes")
    if logprobs:
        said["choices"][0]["logprobs"] = None
    with serving(lambda *_: (200, said)) as (url, seen):
        with pytest.raises(ValueError, match="gives no log-probabilities.*let it generate the answer instead"):
            engine(url).score_choices(asked("x"), [["Yes", "No"]])
        assert len(seen) == 1 and engine(url).generate(asked("x"), max_new_tokens=3)[0][0].text == "Yes"


@pytest.mark.parametrize("choices", [[], ["one"], ["A", " A"], ["A", " "]])
def test_choices_that_a_server_cannot_tell_apart_are_refused(choices):
    with pytest.raises(ValueError, match="a server can tell two or more different texts apart"):
        engine("http://localhost:1/v1").score_choices(asked("x"), [choices])


# -- what fails -----------------------------------------------------------------------------------------------------------

NONSENSE = [
    b"<html>busy</html>", b"", b"\xff\xfe", b"[" * 20_000, b"null", b"[1, 2]", {}, {"choices": []}, {"choices": [{"message": None}]},
    {"choices": [{"message": {"content": 3}}]},
]  # fmt: skip
PASSING = [(500, b"oops"), (503, b""), (429, b"slow down"), (408, b""), "late", "cut off", *[(200, said) for said in NONSENSE]]


@pytest.mark.parametrize("failure", PASSING, ids=lambda failure: str(failure)[:40])
def test_what_fails_in_passing_is_asked_again(failure):
    def answer(path, body, headers, count):
        if count < 3:
            if failure == "late":
                time.sleep(1.5)
            return (200, b"{", {"content-encoding": "gzip"}) if failure in ("late", "cut off") else failure
        return 200, chat(told(body))

    with serving(answer) as (url, seen):
        made = engine(url, timeout=1.0 if failure == "late" else 5.0, concurrency=2)
        assert [texts[0].text for texts in made.generate(asked("a", "b"), max_new_tokens=3)] == ["a", "b"]
        assert len(seen) == 6


@pytest.mark.parametrize(
    ("failure", "said", "times"),
    [
        ((500, b"the disk\nis full"), r"answered 500: 'the disk is full', 3 times", 3),
        ((200, b"<html>"), r"answered nonsense: .*'<html>', 3 times", 3),
        ("late", r"did not answer within 1 s, 3 times", 3),
        ((404, b'{"error": "no model m"}'), r"answered 404: '\{\"error\": \"no model m\"\}'", 1),
        ((401, b""), r"answered 401: nothing", 1),
    ],
)
def test_what_fails_for_good_is_one_line_and_loses_nothing(failure, said, times):
    def answer(path, body, headers, count):
        if told(body) != "bad":
            return 200, chat(told(body))
        if failure == "late":
            time.sleep(1.5)
            return 200, b""
        return failure

    with serving(answer) as (url, seen):
        made = engine(url, retries=2, concurrency=1, timeout=1.0 if failure == "late" else 5.0)
        with pytest.raises(Unanswered, match=said) as caught:
            made.generate(asked("a", "b", "bad", "c", "d"), max_new_tokens=3)
        assert "\n" not in str(caught.value) and url in str(caught.value)
        answered = caught.value.answered
        assert {place: texts[0].text for place, texts in answered.items()} == {0: "a", 1: "b"} and "2 of 5" in str(caught.value)
        assert sum(told(body) == "bad" for _, body in seen) == times and len(seen) == 2 + times
        with pytest.raises(Unanswered) as caught:
            made.generate(asked("a", "bad"), max_new_tokens=3, n=2)
        assert [text.text for text in caught.value.answered[0]] == ["a", "a"]


def test_requests_under_way_are_waited_for_when_one_fails():
    def answer(path, body, headers, count):
        if told(body) == "bad":
            return 400, b"no"
        time.sleep(0.2)
        return 200, chat(told(body), logprobs=[listed("Yes", {"Yes": -0.1, "No": -2.0})])

    with serving(answer) as (url, _), pytest.raises(Unanswered) as caught:
        engine(url, concurrency=3).score_choices(asked("bad", "a", "b", "z"), [["Yes", "No"]] * 4)
    assert sorted(caught.value.answered) == [1, 2] and caught.value.answered[1].tolist() == pytest.approx([-0.1, -2.0])


def test_a_server_that_is_not_there_is_told_of():
    with serving(lambda *_: (200, {})) as (url, _):
        pass
    with pytest.raises(Unanswered, match=r"/v1/chat/completions cannot be reached: .*\(0 of 2 requests were answered\)"):
        engine(url, retries=1).generate(asked("a", "b"), max_new_tokens=3)


def test_no_more_requests_than_allowed_are_under_way_and_neighbours_follow_each_other():
    now, most, order, lock = [0], [0], [], threading.Lock()

    def answer(path, body, headers, count):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
            order.append(told(body))
        time.sleep(0.02)
        with lock:
            now[0] -= 1
        return 200, chat(told(body))

    texts = [f"{a}{b}" for b in "xyz" for a in "cab"]
    with serving(answer) as (url, _):
        made = engine(url, concurrency=3).generate(asked(*texts), max_new_tokens=1)
        assert [found[0].text for found in made] == texts and 2 <= most[0] <= 3
        order.clear()
        engine(url, concurrency=1).generate(asked(*texts), max_new_tokens=1)
        assert order == sorted(texts)


def test_waits_double_and_heed_the_server_up_to_a_limit():
    times = []

    def answer(path, body, headers, count):
        times.append(time.monotonic())
        return (429, b"", {"retry-after": "3600"}) if told(body) == "heed" else (500, b"")

    with serving(answer) as (url, _):
        with pytest.raises(Unanswered):
            engine(url, backoff=0.1, retries=3).generate(asked("x"), max_new_tokens=1)
        gaps = np.diff(times)
        assert all(low <= gap <= high + 0.3 for gap, low, high in zip(gaps, (0.05, 0.1, 0.2), (0.1, 0.2, 0.4), strict=True))
        times.clear()
        with pytest.raises(Unanswered):
            engine(url, backoff=0.01, max_backoff=0.2, retries=1).generate(asked("heed"), max_new_tokens=1)
        assert 0.2 <= np.diff(times)[0] < 1


def test_the_key_is_sent_and_never_told(monkeypatch):
    def answer(path, body, headers, count):
        return (200, chat("ok")) if headers["authorization"] == "Bearer s3cret" else (401, b"who are you")

    with serving(answer) as (url, _):
        monkeypatch.setenv("MY_KEY", "s3cret")
        made = engine(url, key_variable="MY_KEY")
        assert made.generate(asked("a"), max_new_tokens=1)[0][0].text == "ok" and "s3cret" not in repr(made) + made.identity
        with pytest.raises(Unanswered, match="answered 401"):
            engine(url).generate(asked("a"), max_new_tokens=1)
        with pytest.raises(ValueError, match="NO_SUCH_KEY"):
            engine(url, key_variable="NO_SUCH_KEY").generate(asked("a"), max_new_tokens=1)


def test_it_may_be_called_where_an_event_loop_runs():
    with serving(lambda path, body, headers, count: (200, chat(told(body)))) as (url, _):

        async def notebook():
            return engine(url).generate(asked("a"), max_new_tokens=1)

        assert asyncio.run(notebook())[0][0].text == "a"
        assert engine(url).generate([], max_new_tokens=1) == [] and engine(url).score_choices([], []) == []


def test_tokens_are_estimated_or_counted_by_a_tokenizer():
    from echelon.models import embedded_dir

    rough, exact = engine("http://localhost/v1", context_length=300), engine("http://localhost/v1", tokenizer=str(embedded_dir() / "lm"))
    text = "the wolf ran over the hill and into the wood " * 30
    for made in (rough, exact):
        cut = made.truncate(text, 20)
        assert text.startswith(cut) and 10 <= made.count_tokens(cut) <= 20 and made.truncate("a wolf", 20) == "a wolf" and made.truncate("a wolf", 0) == ""
        assert made.prompt_tokens(asked(text)[0]) >= made.count_tokens(text)
    assert rough.count_tokens("x" * 35) == 10 and exact.count_tokens("the wolf") == 2
    assert (rough.context_length, exact.context_length) == (300, None)
    with pytest.raises(ValueError, match="cannot load tokenizer 'nowhere'"):
        engine("http://localhost/v1", tokenizer="nowhere").count_tokens("x")


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"url": "localhost:8000"}, "url is 'localhost:8000'"), ({"url": "ftp://x/v1"}, "url is 'ftp://x/v1'"), ({"model": ""}, "model is empty"),
        ({"concurrency": 0}, "concurrency is 0"), ({"retries": -1}, "retries is -1"), ({"timeout": 0}, "timeout is 0"),
        ({"timeout": math.nan}, "timeout is nan"), ({"backoff": -1}, "backoff is -1"), ({"top_logprobs": 0}, "top_logprobs is 0"),
    ],
)  # fmt: skip
def test_bad_knobs_are_named(knobs, said):
    with pytest.raises(ValueError, match=said):
        ServerEngine(**{"url": "http://localhost/v1", "model": "m", **knobs})
