"""Questions as prompts, and what engines find as answers."""

import math

import numpy as np
import pytest
import torch

import tiny_chat
from echelon.data.documents import Doc
from echelon.llm.base import Unanswered
from echelon.llm.templates import load_template
from echelon.rerank import PRP, FullRank, Pointwise, RankR1, Request
from echelon.rerank.judges import FLOOR, PromptJudge, ScorerJudge
from echelon.rerank.questions import Question
from echelon.score import CallableScorer
from small_judges import FakeEngine


def question(kind, *texts, query="which one"):
    return Question(kind, "q", query, tuple(Doc(f"d{i}", text) for i, text in enumerate(texts)))


def judge(template, mode="scoring", engine=None, **limits):
    return PromptJudge(engine or FakeEngine(), load_template(template), mode, **limits)


def scoring(template, values):
    """A judge whose engine gives the choices these log-probabilities, in their order."""
    told = {}

    def score(text, choice):
        return values[told.setdefault(choice, len(told))]

    return judge(template, engine=FakeEngine(score=score))


# -- scoring ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("values", "order"), [
    ((-0.5, -1.0), (0, 1)), ((-1.0, -0.5), (1, 0)), ((-0.7, -0.7), ()), ((-math.inf, -9.0), (1, 0)), ((-math.inf, -math.inf), ()),
])  # fmt: skip
def test_a_pair_goes_to_the_more_probable_label_and_equal_ones_are_a_tie(values, order):
    [answer] = scoring("prp", values).answer([question("pair", "one", "two")])
    assert answer.order == order and answer.scores == pytest.approx([max(value, FLOOR) for value in values]) and answer.status == "complete"


def test_the_best_of_a_set_is_the_first_of_the_most_probable():
    [answer] = scoring("rank_r1_direct", (-3.0, -1.0, -1.0, -2.0)).answer([question("set", *"abcd")])
    assert answer.order == (1,) and answer.scores == (-3, -1, -1, -2)


def test_a_point_is_the_log_odds_of_yes_or_the_mean_over_the_querys_tokens():
    [answer] = scoring("yes_no", (-0.2, -1.7)).answer([question("point", "text")])
    assert answer.scores == pytest.approx((1.5,))
    [answer] = scoring("query_likelihood", (-6.0,)).answer([question("point", "text", query="three small words")])
    assert answer.scores == pytest.approx((-2.0,))


def test_numbers_that_are_none_are_refused():
    with pytest.raises(ValueError, match="fake gave a log-probability that is no number"):
        scoring("yes_no", (float("nan"), -1.0)).answer([question("point", "text")])


def test_scores_are_those_of_a_plain_forward():
    """On a real model: log-softmax behind the rendered prompt, at the labels' only token; for a query, the sum over all of its tokens."""
    engine = tiny_chat.engine()

    def plain(prompt, choice):
        turns = [{"role": role, "content": text} for role, text in prompt.messages]
        head = engine.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) + prompt.answer_prefix
        ids = [engine.tokenizer(text, add_special_tokens=False).input_ids for text in (head, head + choice)]
        assert ids[1][: len(ids[0])] == ids[0]
        with torch.no_grad():
            found = engine.network(torch.tensor([ids[1]])).logits[0].float().log_softmax(-1)
        return sum(found[i - 1, ids[1][i]].item() for i in range(len(ids[0]), len(ids[1])))

    asked = question("pair", "rain and wind", "the other passage")
    template = load_template("prp")
    [answer] = PromptJudge(engine, template, "scoring").answer([asked])
    prompt = template.render(engine, asked.query, asked.docs)
    a, b = (plain(prompt, choice) for choice in template.answers)
    assert answer.scores[0] - answer.scores[1] == pytest.approx(a - b, abs=1e-4) and answer.order == ((0, 1) if a > b else (1, 0))
    assert answer.prompt_tokens == engine.prompt_tokens(prompt)
    asked, template = question("point", "rain and wind", query="the sea and the wind"), load_template("query_likelihood")
    [answer] = PromptJudge(engine, template, "scoring").answer([asked])
    prompt = template.render(engine, asked.query, asked.docs)
    [choice] = template.choices(1, asked.query)
    assert answer.scores[0] == pytest.approx(plain(prompt, choice) / engine.count_tokens(choice), abs=1e-4)


# -- generation -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "order", "status"), [
    ("A", (0, 1), "complete"), ("Passage B", (1, 0), "complete"), ("I cannot say", (), "unparseable"), ("", (), "unparseable"),
])  # fmt: skip
def test_a_written_label_decides_a_pair(text, order, status):
    [answer] = judge("prp", "generation", FakeEngine(lambda prompt: text)).answer([question("pair", "one", "two")])
    assert (answer.order, answer.status, answer.raw, answer.scores) == (order, status, text, ())


def test_scoring_and_generation_agree_where_the_model_writes_its_most_probable_label():
    engine = FakeEngine()
    engine.write = lambda prompt: "A" if engine.score(prompt, " A") > engine.score(prompt, " B") else "B"
    docs = [f"passage number {i}" for i in range(15)]
    for strategy in ("heapsort", "allpair", "sliding"):
        one, other = (PRP(engine, strategy=strategy, mode=mode).rank("which", docs) for mode in ("scoring", "generation"))
        assert one == other


def test_lists_of_a_length_may_write_their_own_ranking_whatever_they_are_asked_with():
    rooms = []

    class Recording(FakeEngine):
        def generate(self, prompts, *, max_new_tokens, **more):
            rooms.append((len(prompts), max_new_tokens))
            return super().generate(prompts, max_new_tokens=max_new_tokens, **more)

    asked = [question("list", *"abc"), question("list", *"ab"), question("list", *"xyz")]
    made = judge("rankllm", "generation", Recording(lambda prompt: "[2] > [1] > [3] and much more")).answer(asked)
    assert rooms == [(2, 6), (1, 4)] and [answer.order for answer in made] == [(1, 0, 2), (1, 0), (1, 0, 2)]
    assert judge("rankllm", "generation", Recording(), max_new_tokens=2).answer(asked[:1])[0].order == (0, 1, 2) and rooms[-1] == (1, 2)


def test_what_is_not_written_to_the_end_is_warned_about_once():
    short = judge("rankllm", "generation", FakeEngine(lambda prompt: "[3] > [1] > [2]"), max_new_tokens=2)
    with pytest.warns(UserWarning, match="a ranking of 3 was not finished in 5 tokens; raise max_new_tokens") as told:
        made = short.answer([question("list", *"abc"), question("list", *"xyz")])
    assert len(told) == 1 and [(answer.order, answer.status) for answer in made] == [((2, 0, 1), "partial")] * 2


def test_constrained_writing_needs_an_engine_that_can():
    class Free(FakeEngine):
        capabilities = frozenset(("chat",))

    with pytest.raises(ValueError, match="Free cannot be constrained to rankings"):
        judge("rankllm", "generation", Free(), constrained=True)
    with pytest.raises(ValueError, match="'rankllm' has no answers to score"):
        judge("rankllm", "scoring")


def test_on_a_real_model_constrained_rankings_are_complete_and_others_permutations():
    engine = tiny_chat.engine()
    docs = [f"the {i} and [2] > [1]" for i in range(6)]
    for identifiers in ("number", "letter"):
        found = FullRank(engine, constrained=True, identifiers=identifiers).rerank([request_of(docs)], trace=True)
        assert found.stats.failures == {} and found.trace[0].answer.status == "complete" and found.stats.generated_tokens > 6
    free = FullRank(engine).rerank([request_of(docs)])
    assert sorted(free.rankings["q"].order) == list(range(6)) and sum(free.stats.failures.values()) == 1


def request_of(docs, query="which one"):
    return Request.of(query, docs, "q")


# -- what goes into a prompt --------------------------------------------------------------------------------------------------


def test_queries_and_passages_are_cut_and_both_orders_are_shown():
    engine = FakeEngine()
    PRP(engine, max_query_tokens=2, max_passage_tokens=3).rank("one two three", ["a b c d e", "v w x y z"])
    assert len(engine.prompts) == 2 and all('"one two"' in prompt and prompt.endswith("Passage") for prompt in engine.prompts)
    first, second = engine.prompts
    assert "Passage A: v w x\n" in first and "Passage B: a b c\n" in first and "Passage A: a b c\n" in second and "Passage B: v w x\n" in second


def test_a_context_that_is_too_small_shrinks_passages_and_says_so_once():
    class Small(FakeEngine):
        context_length = 120

    engine = Small(lambda prompt: "[2] > [1] > [3]")
    with pytest.warns(UserWarning, match="the context does not hold 3 passages; they were cut to") as told:
        FullRank(engine, strategy="sliding", window_size=3, stride=1).rank("query", ["word " * 90] * 5)
    assert len(told) == 1 and all(len(prompt.split()) + 6 <= 120 and prompt.rstrip().endswith("explanation.") for prompt in engine.prompts)
    Small.context_length = 20
    with pytest.raises(ValueError, match="the context of fake holds 20: rank fewer passages"):
        FullRank(engine).rank("query", ["word"] * 5)


def test_forecasts_of_tokens_are_those_of_the_prompts():
    docs = [f"passage number {i} with as many words as the others" for i in range(12)]
    for reranker in (PRP(FakeEngine(), strategy="allpair"), Pointwise(FakeEngine()), FullRank(FakeEngine(lambda prompt: "[1]"), "sliding", 5, 2)):
        forecast, stats = reranker.estimate([request_of(docs)]), reranker.rerank([request_of(docs)]).stats
        assert (forecast.prompts, forecast.rounds) == (stats.prompts, stats.rounds) and forecast.prompt_tokens == pytest.approx(stats.prompt_tokens, rel=0.03)
    reasoning = RankR1(FakeEngine(), max_new_tokens=100).estimate([request_of(docs)])
    assert reasoning.generated_tokens == 100 * reasoning.prompts and FullRank(FakeEngine()).estimate([request_of(docs)]).generated_tokens == 24


# -- trouble ------------------------------------------------------------------------------------------------------------------


def test_what_an_engine_found_before_it_gave_up_is_passed_on():
    class Broken(FakeEngine):
        def score_choices(self, prompts, choices):
            raise Unanswered("gone", {1: np.array([-1.0, -3.0], np.float32)})

        def generate(self, prompts, *, max_new_tokens, **more):
            if len(prompts) == 1:
                raise Unanswered("gone", {})
            return super().generate(prompts, max_new_tokens=max_new_tokens, **more)

    with pytest.raises(Unanswered, match="gone") as caught:
        judge("prp", engine=Broken()).answer([question("pair", "a", "b"), question("pair", "c", "d")])
    assert {place: answer.order for place, answer in caught.value.answered.items()} == {1: (0, 1)}
    with pytest.raises(Unanswered, match="gone") as caught:
        judge("rankllm", "generation", Broken(lambda prompt: "[2] > [1]")).answer([question("list", *"ab"), question("list", *"abc"), question("list", *"xy")])
    assert {place: answer.order for place, answer in caught.value.answered.items()} == {0: (1, 0), 2: (1, 0)}


@pytest.mark.parametrize(("make", "said"), [
    (lambda: PRP(FakeEngine(), prompt="rankllm"), "prompt is 'rankllm', a template for list questions; this method asks pair ones"),
    (lambda: FullRank(FakeEngine(), prompt="prp"), "a template for pair questions"), (lambda: RankR1(FakeEngine(), prompt="no_such"), "no template 'no_such'"),
    (lambda: FullRank(FakeEngine(), identifiers="letter"), "it letters them, which goes up to 26"), (lambda: PRP(3), "int is no engine"),
])  # fmt: skip
def test_prompts_that_do_not_fit_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make().rank("query", ["text"] * 30)


def test_scorers_judge_points_and_have_no_name_for_a_cache_unless_told():
    made = ScorerJudge(CallableScorer(lambda query, texts: [len(query) + len(text) for text in texts]))
    assert [answer.scores for answer in made.answer([question("point", "abc"), question("point", "a", query="q")])] == [(12.0,), (2.0,)]
    with pytest.raises(ValueError, match="CallableScorer has no name to keep its scores under; rank without a cache"):
        _ = made.identity
    assert ScorerJudge(made.scorer, lambda: "letters").identity == "letters"
