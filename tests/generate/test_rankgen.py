"""RankGen as a decoder: which scorer it takes, what that scorer is shown, and the switches for the paper's own habits."""

import copy

import pytest
import torch

import small_folders
import tiny
from echelon.errors import UserError
from echelon.generate import DecodeSession, RankGen, RankGenRerank, Sampler, SegmentBeam
from echelon.models import LoadedModel, load
from echelon.score import LogLikelihood, RankGenScorer, Scorer, UnigramOverlap, resolve
from small_encoder import untrained_rankgen


class Noting(Scorer):
    """Prefers texts by the sum of their token ids, and notes what it was asked."""

    def __init__(self):
        self.asked = []

    def score(self, items):
        self.asked += items
        return torch.tensor([float(sum(item.token_ids)) for item in items])


LOADED = (tiny.model("llama"), tiny.prompts(3), tiny.tokenizer())


def test_a_scorer_comes_by_name_from_a_folder_or_as_an_object(tmp_path):
    lm = LoadedModel(tiny.model("llama"), tiny.tokenizer())
    ranker = untrained_rankgen()
    ranker.save_pretrained(tmp_path / "ranker")
    assert isinstance(resolve("unigram_overlap"), UnigramOverlap)
    assert isinstance(resolve("embedded"), RankGenScorer) and isinstance(resolve("rankgen"), RankGenScorer)
    likelihood = resolve("likelihood", lm)
    assert isinstance(likelihood, LogLikelihood) and likelihood.loaded is lm
    from_folder = RankGen(str(tmp_path / "ranker"), num_samples=3, segment_tokens=4).generate(*LOADED, max_new_tokens=8, seed=1)
    as_object = RankGen(RankGenScorer(ranker), num_samples=3, segment_tokens=4).generate(*LOADED, max_new_tokens=8, seed=1)
    assert from_folder.sequences == as_object.sequences
    assert from_folder.scores == pytest.approx(as_object.scores, abs=1e-4)
    with pytest.raises(UserError, match="unknown scorer 'unigram_overlp'.*did you mean 'unigram_overlap'"):
        resolve("unigram_overlp")
    with pytest.raises(UserError, match="there is neither rankgen.json nor config.json"):
        RankGen(str(tmp_path)).generate(*LOADED, max_new_tokens=4)


def test_scores_are_the_rankers_own_dot_products_with_the_prompt_alone():
    ranker = untrained_rankgen()
    made = RankGen(RankGenScorer(ranker), beam_size=2, num_samples=3, segment_tokens=4).generate(*LOADED, max_new_tokens=10, seed=1)
    for prompt, candidates in zip(tiny.prompts(3), made.candidates, strict=True):
        prefix = ranker.encode([tiny.tokenizer().decode(prompt)], "prefix")[0]
        for candidate in candidates:
            assert candidate.score == pytest.approx((ranker.encode([candidate.text], "suffix")[0] @ prefix).item(), abs=1e-4)


def test_the_order_of_kept_texts_changes_nothing_that_is_drawn_scored_or_kept():
    found = []
    for order in ([0, 1], [1, 0]):
        session = DecodeSession(tiny.model("llama"), tiny.tokenizer(), sampler=Sampler(top_p=0.9), seed=5)
        session.prefill(tiny.prompts(1))
        session.fork(2)
        session.extend(4)
        session.keep(order)
        session.fork(3)
        session.extend(4)
        scorer = Noting()
        kept, scores = SegmentBeam(scorer, beam_size=2)._select(session, {0}, ["the prompt"], {}, True, None)
        assert {item.prefix for item in scorer.asked} == {"the prompt"}
        assert {item.text for item in scorer.asked} == {session.text(row) for row in range(6)}
        found.append((sorted(session.text(row) for row in range(6)), [session.text(row) for row in kept], scores))
    assert found[0] == found[1] and len(set(found[0][0])) == 6


def test_a_prompt_that_holds_an_end_token_is_continued_all_the_same():
    prompts = [[*tiny.prompts(1)[0], 1, 7], tiny.prompts(1)[0]]
    made = RankGen(Noting(), num_samples=3, segment_tokens=4).generate(tiny.model("llama"), prompts, tiny.tokenizer(), max_new_tokens=12, seed=1)
    for ids in made.sequences:
        assert len(ids) == 12 or ids[-1] == 1
    assert len(made.sequences[1]) >= 1  # a second prompt has its whole budget too


def test_a_budget_below_one_segment_is_one_round():
    made = RankGen(Noting(), beam_size=1, num_samples=4, segment_tokens=20).generate(*LOADED, max_new_tokens=3, seed=1)
    assert made.stats.rounds == 1 and all(len(ids) <= 3 for ids in made.sequences)
    assert made.sequences == RankGenRerank(Noting(), num_samples=4).generate(*LOADED, max_new_tokens=3, seed=1).sequences


def test_the_default_run_is_six_rounds_of_twenty_tokens_and_a_rest():
    assert (RankGen.default_max_new_tokens, RankGen().beam_size, RankGen().num_samples, RankGen().segment_tokens, RankGenRerank().num_samples) == (
        115, 2, 10, 20, 20
    )  # fmt: skip
    model = copy.deepcopy(tiny.model("llama"))
    model.generation_config.eos_token_id = None
    scorer = Noting()
    made = RankGen(scorer).generate(model, [[5, 6]], tiny.tokenizer())
    assert made.stats.rounds == 6 and made.stats.scorer_calls == 6 * 20
    assert [len(item.token_ids) for item in scorer.asked[::20]] == [20, 40, 60, 80, 100, 115]


@pytest.mark.parametrize("kind", [RankGen, RankGenRerank])
def test_compatible_with_the_paper_an_unset_top_k_is_50_and_a_set_one_stays(kind):
    assert kind().sampler == Sampler(top_p=0.9)
    assert kind(paper_compat=True).sampler == Sampler(top_p=0.9, top_k=50)
    assert kind(paper_compat=True, top_k=7).sampler == kind(top_k=7).sampler == Sampler(top_p=0.9, top_k=7)
    with pytest.raises(ValueError, match="top_p is 0"):
        kind(top_p=0)
    with pytest.raises(ValueError, match="temperature is 0"):
        kind(temperature=0)


def test_compatible_with_the_paper_equal_reranked_texts_all_stay():
    cold = {"temperature": 1e-6, "segment_tokens": 6, "beam_size": 3, "num_samples": 2}
    once = RankGen(Noting(), **cold).generate(*LOADED, max_new_tokens=6)
    every = RankGen(Noting(), **cold, paper_compat=True).generate(*LOADED, max_new_tokens=6)
    assert [len(group) for group in once.candidates] == [1, 1, 1] and [len(group) for group in every.candidates] == [3, 3, 3]
    assert once.texts == every.texts


def test_a_sliding_prefix_holds_completed_sentences_and_the_text_behind_them_is_judged(tmp_path):
    model, _ = load(small_folders.language_model(tmp_path, positions=256))
    scorer = Noting()
    made = RankGen(scorer, beam_size=2, num_samples=3, segment_tokens=12, sliding=True).generate(
        LoadedModel(model, small_folders.tokenizer()), ["Sea waits. Lamp burns. Gull calls."], max_new_tokens=100, seed=3
    )
    words = {word for item in scorer.asked for word in item.prefix.split()}
    assert len({item.prefix for item in scorer.asked}) > 1 and max(len(item.prefix.split()) for item in scorer.asked) <= 256
    assert words and made.texts[0]
    whole = RankGen(Noting(), beam_size=2, num_samples=3, segment_tokens=12).generate(
        LoadedModel(model, small_folders.tokenizer()), ["Sea waits. Lamp burns. Gull calls."], max_new_tokens=100, seed=3
    )
    assert whole.sequences == made.sequences  # this scorer looks at token ids alone: sliding changes only what is shown


def test_without_a_tokenizer_there_is_no_text_to_score():
    with pytest.raises(ValueError, match="rankgen scores text and needs a tokenizer; inside model.generate give it as text_codec"):
        RankGen(Noting()).generate(tiny.model("llama"), tiny.prompts(1), max_new_tokens=3)
