"""The session is exact: what it says does not depend on caching, chunks, forks, padding or company."""

import pytest
import torch

import tiny
from echelon.generate import DecodeSession, Sampler

FAMILIES = list(tiny.FAMILIES)


def opened(family="llama", prompts=None, **arguments):
    session = DecodeSession(tiny.model(family), tiny.tokenizer(), **arguments)
    session.prefill(tiny.prompts() if prompts is None else prompts)
    return session


def written(session):
    return [session.new_ids(row) for row in range(session.rows)]


def reference_logits(family, prompt, new):
    """The model on the whole text at once, one row, no padding, no cache."""
    model = tiny.model(family)
    with torch.no_grad():
        if family == "t5":
            return model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[0, *new]])).logits[0].float()
        return model(input_ids=torch.tensor([[*prompt, *new]]), use_cache=False).logits[0].float()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers_generate_for_ragged_prompts(family):
    session = opened(family)
    session.extend(12)
    model = tiny.model(family)
    for prompt, new in zip(tiny.prompts(), written(session), strict=True):
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)[0].tolist()
        assert new == (out[1:] if family == "t5" else out[len(prompt) :])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_usable_cache_writes_the_same(family):
    with_cache, without = opened(family, sampler=Sampler(), seed=5), opened(family, sampler=Sampler(), seed=5, use_cache=False)
    with_cache.extend(8)
    without.extend(8)
    assert written(with_cache) == written(without)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_five_and_five_tokens_are_ten(family):
    once, twice = opened(family, sampler=Sampler(), seed=3), opened(family, sampler=Sampler(), seed=3)
    once.extend(10)
    first = twice.extend(5)
    second = twice.extend(5)
    assert written(once) == written(twice) == [a + b for a, b in zip(first, second, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_fork_then_keep_equals_never_forking(family):
    plain, forked = opened(family), opened(family)
    plain.extend(8)
    forked.extend(4)
    forked.fork(3)
    forked.keep([3 * request + 1 for request in range(4)])
    forked.extend(4)
    assert written(plain) == written(forked)


@pytest.mark.parametrize("family", ["llama", "opt", "t5"])
@pytest.mark.parametrize("max_rows", [1, 3])
def test_chunks_change_nothing(family, max_rows):
    def run(limit):
        session = opened(family, sampler=Sampler(), seed=11, max_rows=limit)
        session.extend(3)
        session.fork([2, 1, 3, 1])
        session.extend(4)
        session.keep([6, 0, 3, 3])
        session.extend(2)
        return written(session), session.next_logits()

    whole, logits = run(None)
    parts, same = run(max_rows)
    assert whole == parts
    torch.testing.assert_close(logits, same, atol=1e-4, rtol=1e-4)


def test_other_rows_and_their_order_never_change_a_text():
    alone = []
    for number, prompt in enumerate(tiny.prompts()):
        session = opened(prompts=[prompt], sampler=Sampler(), seed=2, request_ids=[number])
        session.extend(9)
        alone += written(session)
    together = opened(sampler=Sampler(), seed=2)
    together.extend(9)
    assert written(together) == alone
    backwards = opened(prompts=tiny.prompts()[::-1], sampler=Sampler(), seed=2, request_ids=[3, 2, 1, 0])
    backwards.extend(9)
    assert written(backwards) == alone[::-1]


def test_forked_children_differ_from_each_other_and_survive_pruning_unchanged():
    def children(kept):
        session = opened(prompts=tiny.prompts(1), sampler=Sampler(), seed=4)
        session.fork(6)
        session.keep(kept)
        session.extend(8)
        return written(session)

    everyone = children(range(6))
    assert len({tuple(ids) for ids in everyone}) > 1
    assert children([4, 1]) == [everyone[4], everyone[1]]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("use_cache", [True, False])
def test_peek_and_score_tokens_agree_with_the_whole_text_and_leave_no_trace(family, use_cache):
    session = opened(family, sampler=Sampler(), seed=8, use_cache=use_cache)
    untouched = opened(family, sampler=Sampler(), seed=8, use_cache=use_cache)
    session.extend(3)
    untouched.extend(3)
    extra = [[5, 6], [7], [8, 9, 10], []]
    state = torch.random.get_rng_state()
    peeked, scored = session.peek(extra), session.score_tokens(extra)
    assert torch.equal(state, torch.random.get_rng_state())
    for row, (prompt, more) in enumerate(zip(tiny.prompts(), extra, strict=True)):
        logits = reference_logits(family, prompt, [*session.new_ids(row), *more])
        torch.testing.assert_close(peeked[row], logits[-1], atol=2e-4, rtol=1e-4)
        expected = logits.log_softmax(-1)[-1 - len(more) : -1].gather(1, torch.tensor(more, dtype=torch.long)[:, None])[:, 0]
        torch.testing.assert_close(scored[row], expected, atol=2e-4, rtol=1e-4)
    session.extend(4)
    untouched.extend(4)
    assert written(session) == written(untouched)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_rollback_then_extend_writes_the_same_again(family):
    session = opened(family, sampler=Sampler(), seed=6)
    session.extend(7)
    before = written(session)
    counts = [min(k, len(ids)) for k, ids in zip([4, 0, 2, 7], before, strict=True)]
    session.rollback(counts)
    assert written(session) == [ids[: len(ids) - k] for ids, k in zip(before, counts, strict=True)]
    session.extend(counts)
    assert written(session) == before


def test_a_finished_row_idles_while_others_go_on():
    free = opened()
    free.extend(10)
    ending = free.new_ids(1)[2]
    session = opened(eos_token_ids=[ending, 39])  # a model may have several end tokens
    session.extend(10)
    for ids, unbounded in zip(written(session), written(free), strict=True):
        end = unbounded.index(ending) + 1 if ending in unbounded else unbounded.index(39) + 1 if 39 in unbounded else 10
        assert ids == unbounded[:end]
    assert session.finished[1]
    assert session.extend(3)[1] == []


def test_an_end_token_in_the_prompt_does_not_end_the_text():
    session = opened(prompts=[[5, 1, 6]])
    session.extend(4)
    assert len(session.new_ids(0)) >= 1


def test_only_new_tokens_are_forwarded_after_a_fork():
    session = opened(prompts=[list(range(4, 34))])
    session.next_logits()
    assert session.stats.forward_tokens == session.stats.prefill_tokens == 30
    session.fork(8)
    session.extend(5)
    assert session.stats.forward_tokens == 30 + 8 * 4  # the last token of each row waits until something needs it


def test_events_carry_every_token_once():
    seen = []
    session = opened(prompts=tiny.prompts(2), on_event=seen.append)
    session.extend(4)
    for request in range(2):
        assert [event.token_id for event in seen if event.request == request] == session.new_ids(request)


def test_stopping_criteria_see_a_row_without_padding():
    lengths = []

    def long_enough(ids, scores):
        lengths.append(ids.shape)
        return ids.shape[1] >= 8

    session = opened(stop=[long_enough])
    session.extend(20)
    assert [len(session.prompt_ids(r)) + len(session.new_ids(r)) for r in range(4)] == [8, 8, 8, 10]
    assert all(shape[0] == 1 for shape in lengths)


def test_too_long_a_prompt_loses_its_beginning():
    prompt = [4 + i % 30 for i in range(200)]
    with pytest.warns(UserWarning, match="longer than 118 tokens lose their beginning"):
        session = DecodeSession(tiny.model("llama"))
        session.prefill([prompt], room=10)
    assert session.prompt_ids(0) == prompt[-118:]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.extend(-1), "n is -1"),
        (lambda s: s.fork(0), "times is 0"),
        (lambda s: s.keep([4]), "row 4 does not exist"),
        (lambda s: s.rollback(1), "cannot roll row 0 back by 1"),
        (lambda s: s.prefill([[]]), "prompt 0 is empty"),
        (lambda s: s.peek([[1]]), "extra ids are given for 1 rows"),
        (lambda s: DecodeSession(tiny.model("llama"), max_rows=0), "max_rows is 0"),
        (lambda s: DecodeSession(tiny.model("llama")).prefill(["text"]), "need a tokenizer"),
    ],
)
def test_bad_calls_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(opened())
