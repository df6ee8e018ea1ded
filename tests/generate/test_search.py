"""Search with a scorer: what is scored, what is kept, and the cases where it must equal something simpler."""

import itertools

import pytest
import torch

import tiny
from echelon.generate import BestOfN, DecodeSession, Nucleus, RankGen, RankGenRerank, Sampler, SegmentBeam
from echelon.score import Scorer

FAMILIES = list(tiny.FAMILIES)


class LetterCount(Scorer):
    """Counts one word; notes everything that it was asked."""

    def __init__(self, word="w3"):
        self.word, self.asked = word, []

    def score(self, items):
        self.asked.append(list(items))
        return torch.tensor([item.text.count(self.word) + 0.001 * len(item.text) for item in items], dtype=torch.float32)


def opened(family="llama", prompts=None, **arguments):
    session = DecodeSession(tiny.model(family), tiny.tokenizer(), sampler=Sampler(top_p=0.9), **arguments)
    session.prefill(tiny.prompts() if prompts is None else prompts)
    return session


@pytest.mark.parametrize("family", FAMILIES)
def test_one_beam_and_one_segment_is_the_best_of_the_same_samples(family):
    scorer = LetterCount()
    found = SegmentBeam(scorer, beam_size=1, num_samples=6, segment_tokens=12).run(opened(family, seed=4), 12)
    session = opened(family, seed=4)
    session.fork(6)
    session.extend(12)
    for request, candidates in enumerate(found):
        rows = [row for row, meta in enumerate(session.meta) if meta.request == request]
        texts = [session.text(row) for row in rows]
        scores = [text.count("w3") + 0.001 * len(text) for text in texts]
        assert candidates[0].text == texts[scores.index(max(scores))]
        assert candidates[0].score == pytest.approx(max(scores))


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_one_beam_and_one_sample_is_plain_sampling_without_a_scorer_call(family):
    scorer = LetterCount()
    loaded = (tiny.model(family), tiny.prompts(), tiny.tokenizer())
    searched = RankGen(scorer, beam_size=1, num_samples=1, segment_tokens=5).generate(*loaded, max_new_tokens=14, seed=2)
    assert searched.sequences == Nucleus(top_p=0.9).generate(*loaded, max_new_tokens=14, seed=2).sequences
    assert not scorer.asked and searched.stats.scorer_calls == 0


def test_kept_texts_are_sorted_and_none_that_was_dropped_is_better():
    trace = []
    SegmentBeam(LetterCount(), beam_size=2, num_samples=4, segment_tokens=4).run(opened(seed=1), 12, trace)
    assert len(trace) == 3
    for groups in trace:
        for group in groups:
            kept = [c["score"] for c in group if c["kept"]]
            assert min(kept) >= max(c["score"] for c in group if not c["kept"] and c["text"] not in {k["text"] for k in group if k["kept"]})


def test_candidates_of_a_round_are_n_for_each_unfinished_text_and_one_for_each_finished():
    scorer = LetterCount()
    session = opened(seed=1, eos_token_ids=[34, 35, 36, 37, 38])
    trace = []
    SegmentBeam(scorer, beam_size=3, num_samples=4, segment_tokens=3, dedupe=False).run(session, 15, trace)
    ended = tuple(f"w{token - 4}" for token in (34, 35, 36, 37, 38))
    assert all(len(group) == 12 for group in trace[0])
    finished_seen = 0
    for before, after in itertools.pairwise(trace):
        for old, new in zip(before, after, strict=True):
            kept = [c for c in old if c["kept"]]
            finished = sum(c["text"].endswith(ended) for c in kept)
            finished_seen += 0 < finished < 3
            assert len(new) == 4 * (3 - finished) + finished
    assert finished_seen  # the case was met at all


def test_the_scorer_sees_the_prompt_and_the_whole_continuation():
    scorer = LetterCount()
    session = opened(seed=3)
    SegmentBeam(scorer, beam_size=2, num_samples=3, segment_tokens=4).run(session, 12)
    prompts = {session.decode(prompt) for prompt in tiny.prompts()}
    assert {item.prefix for asked in scorer.asked for item in asked} == prompts
    whole = [item for item in scorer.asked[-1] if len(item.token_ids) == 12]
    assert whole and all(item.finished and item.text == session.decode(item.token_ids) for item in whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompts_text_does_not_depend_on_the_other_prompts(family):
    prompts = tiny.prompts(3)
    model, tokenizer = tiny.model(family), tiny.tokenizer()
    decoder = RankGen(LetterCount(), beam_size=2, num_samples=3, segment_tokens=4)
    together = decoder.generate(model, prompts, tokenizer, max_new_tokens=10, seed=6)
    alone = decoder.generate(model, prompts[:1], tokenizer, max_new_tokens=10, seed=6)
    chunked = decoder.generate(model, prompts, tokenizer, max_new_tokens=10, seed=6, max_rows=4)
    assert together.sequences[0] == alone.sequences[0]
    assert together.sequences == chunked.sequences


def test_equal_texts_are_kept_once_unless_compatible_with_the_paper():
    greedy_like = {"temperature": 1e-6, "beam_size": 2, "num_samples": 3, "segment_tokens": 4}
    model, tokenizer, prompts = tiny.model("llama"), tiny.tokenizer(), tiny.prompts(2)
    once = RankGen(LetterCount(), **greedy_like).generate(model, prompts, tokenizer, max_new_tokens=8)
    twice = RankGen(LetterCount(), **greedy_like, paper_compat=True).generate(model, prompts, tokenizer, max_new_tokens=8)
    assert [len(c) for c in once.candidates] == [1, 1]
    assert [len(c) for c in twice.candidates] == [2, 2]
    assert RankGen(paper_compat=True).sampler.top_k == 50 and RankGen().sampler.top_k == 0


def test_rerank_equals_best_of_n():
    model, tokenizer, prompts = tiny.model("gpt2"), tiny.tokenizer(), tiny.prompts(2)
    made = RankGenRerank(LetterCount(), num_samples=5).generate(model, prompts, tokenizer, max_new_tokens=9, seed=8)
    found = BestOfN(LetterCount(), num_samples=5).run(opened("gpt2", prompts, seed=8), 9)
    assert made.texts == [candidates[0].text for candidates in found]
    assert made.stats.scorer_calls == 10


def test_the_prompt_is_forwarded_once_however_many_samples_come_of_it():
    model, tokenizer, prompts = tiny.model("llama"), tiny.tokenizer(), tiny.prompts(1)
    spent = RankGen(LetterCount(), beam_size=2, num_samples=5, segment_tokens=4).generate(model, prompts, tokenizer, max_new_tokens=8).stats
    assert spent.prefill_tokens == len(prompts[0])
    assert spent.forward_tokens <= len(prompts[0]) + 10 * 8


def test_only_committed_text_is_streamed():
    events = []
    decoder = RankGen(LetterCount(), beam_size=2, num_samples=3, segment_tokens=3)
    made = decoder.generate(tiny.model("llama"), tiny.prompts(2), tiny.tokenizer(), max_new_tokens=9, on_event=events.append)
    for request in range(2):
        assert "".join(e.text for e in events if e.request == request and e.kind == "segment") == made.texts[request]
    assert [e.text for e in events if e.kind == "final"] == made.texts
    assert not [e for e in events if e.kind == "token"]  # samples that may yet be dropped are nobody's business


def test_a_nan_score_is_refused_with_the_scorer_named():
    class Broken(Scorer):
        def score(self, items):
            return torch.full((len(items),), float("nan"))

    with pytest.raises(ValueError, match=r"Broken gave nan for"):
        RankGen(Broken()).generate(tiny.model("llama"), tiny.prompts(1), tiny.tokenizer(), max_new_tokens=4)


def test_the_sliding_prefix_moves_with_completed_sentences():
    from echelon.generate.search import _Slider

    start = _Slider("One a. Two b. Three c.", 256)
    moved = start.after(" Four d. Five e. And")
    assert moved.prefix == "Three c. Four d. Five e."
    assert moved.fresh.strip() == "And"
    assert _Slider("A b c. D e f.", 4).after(" G h. I").prefix == "e f. G h."


@pytest.mark.parametrize(
    ("knobs", "said"),
    [({"beam_size": 0}, "beam_size is 0"), ({"num_samples": 0}, "num_samples is 0"), ({"segment_tokens": 0}, "segment_tokens is 0")],
)
def test_numbers_below_one_are_refused(knobs, said):
    with pytest.raises(ValueError, match=said):
        RankGen(**knobs)


def test_no_prompts_give_no_texts():
    assert RankGen(LetterCount()).generate(tiny.model("llama"), [], tiny.tokenizer()).texts == []
