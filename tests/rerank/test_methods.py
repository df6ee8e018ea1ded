"""What each method promises of its own, on judges that know and engines that say what they are told."""

import re

import pytest

from echelon.rerank import PRP, FullRank, Knockout, Oracle, RankR1
from echelon.rerank.questions import Answer
from small_judges import FakeEngine, Remembering, Says, best_first, collection, grades, request


def ranked(reranker, n=30, **how):
    return reranker.rerank([request(n)], **how)


# -- PRP ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["heapsort", "allpair", "sliding"])
def test_prp_finds_the_first_places_for_any_number_of_them(strategy):
    for n in (1, 2, 7, 25):
        for top_k in (1, 4, 60):
            order = ranked(PRP(Oracle({"q": grades(n)}), strategy=strategy, top_k=top_k), n).rankings["q"].order
            assert list(order[:top_k]) == best_first(n, grades(n))[:top_k]


@pytest.mark.parametrize("strategy", ["heapsort", "allpair", "sliding"])
def test_prp_counts_what_it_sent_and_its_batches_change_nothing(strategy):
    requests, _ = collection(4, 12)
    made = {}
    for size in (1, 64):
        engine = FakeEngine()
        made[size] = PRP(engine, strategy=strategy, batch_size=size).rerank(requests)
        stats = made[size].stats
        assert len(engine.prompts) == stats.prompts == stats.calls - stats.cache_hits
    assert made[1].runs == made[64].runs and made[1].stats.calls == made[64].stats.calls
    alone = {one.qid: PRP(FakeEngine(), strategy=strategy).rerank([one]).runs[one.qid] for one in requests}
    assert made[1].runs == alone
    plain = PRP(FakeEngine(), strategy=strategy, cache=False).rerank(requests)
    assert plain.runs == alone and plain.stats.prompts == plain.stats.calls == made[1].stats.calls


def test_prp_in_one_order_costs_half_and_margins_break_ties():
    n = 12
    assert ranked(PRP(FakeEngine(), strategy="allpair"), n).stats.prompts == n * (n - 1)
    assert ranked(PRP(FakeEngine(), strategy="allpair", both_orders=False), n).stats.prompts == n * (n - 1) / 2
    plain, soft = (ranked(PRP(FakeEngine(), strategy="allpair", tie_rule=rule), n).rankings["q"].scores for rule in ("consistency", "margin"))
    assert all(score % 0.5 == 0 for score in plain) and len(set(soft)) == n and sum(plain) == n * (n - 1) / 2 == pytest.approx(sum(soft))


def test_prp_sliding_makes_as_many_passes_as_it_is_told():
    for passes, exact in ((None, 10), (3, 3)):
        judge = Remembering(Oracle({"q": {f"d{i}": i for i in range(30)}}))  # the input is the wrong way round
        order = ranked(PRP(judge, strategy="sliding", passes=passes)).rankings["q"].order
        assert order[:exact] == tuple(range(29, 29 - exact, -1)) and order[exact] == 0


# -- Rank-R1 and setwise -----------------------------------------------------------------------------------------------------------


def thinking(label, thought="the first one fits"):
    return f"<think> {thought} </think> <answer>[{label}]</answer>"


def test_rank_r1_shows_contiguous_labels_and_no_document_twice():
    engine = FakeEngine(lambda prompt: thinking(1))
    ranked(RankR1(engine, top_k=3), 45)
    for prompt in engine.prompts:
        shown = re.findall(r"^\[(\d+)\] (text \d+ of q)$", prompt, re.MULTILINE)
        assert [int(label) for label, _ in shown] == list(range(1, len(shown) + 1)) and len({text for _, text in shown}) == len(shown) <= 20


def test_rank_r1_reads_the_first_answer_behind_a_thought_in_any_case():
    """Documents hold their grade, so that a text can name the best one by its label."""

    def best_label(prompt):
        shown = re.findall(r"^\[(\d+)\] grade (\d+)$", prompt, re.MULTILINE)
        return max(shown, key=lambda one: int(one[1]))[0]

    docs = [f"grade {(7 * i) % 23}" for i in range(23)]
    forms = (
        thinking, lambda label: f"Well. {thinking(label)} I am sure.", lambda label: f"<THINK>\n{label}\n</THINK>\n\n<Answer>\n[{label}]\n</Answer>",
        lambda label: thinking(label, "") + thinking(1),
    )  # fmt: skip
    for form in forms:
        found = RankR1(FakeEngine(lambda prompt, form=form: form(best_label(prompt))), top_k=4, max_passage_tokens=5).rank("best", docs)
        assert [docs[hit["corpus_id"]] for hit in found[:4]] == ["grade 22", "grade 21", "grade 20", "grade 19"]


@pytest.mark.parametrize("text", [
    "", "[1]", "<answer>[2]</answer>", "<think> a </think> so <answer>[2]</answer>", "<think> a </think> <answer>2</answer>",
    "<think> a </think> <answer>[2], [1]</answer>", "<think> a </think> <answer>[21]</answer>", "<think> a <answer>[2]</answer>",
])  # fmt: skip
def test_rank_r1_keeps_the_parent_where_it_cannot_read_and_counts_it(text):
    first, again = (ranked(RankR1(FakeEngine(lambda prompt: text), top_k=5)) for _ in range(2))
    assert first.stats.failures == {"unparseable": first.stats.prompts} and first.runs == again.runs
    assert sorted(first.rankings["q"].order) == list(range(30))
    silent = ranked(RankR1(Says(lambda question: Answer()), top_k=5))
    assert silent.rankings == first.rankings


def test_rank_r1_gives_the_reasoning_of_each_step():
    found = ranked(RankR1(FakeEngine(lambda prompt: thinking(2, "because it rains"))), 12, trace=True)
    assert len(found.trace) == found.stats.calls and all("because it rains" in judgement.answer.raw for judgement in found.trace)


def test_rank_r1_by_votes_finds_what_it_finds_by_one_answer_of_a_judge_that_knows():
    grade = grades(60, 8)
    one, three = (ranked(RankR1(Oracle({"q": grade}), num_permutation=votes), 60) for votes in (1, 3))
    assert one.rankings == three.rankings and three.stats.prompts == 3 * one.stats.prompts


def test_setwise_without_reasoning_reads_labels_or_their_likelihoods():
    engine = FakeEngine(lambda prompt: "<answer>[2]</answer>")
    assert ranked(RankR1(engine, reasoning=False)).stats.failures == {} and all(prompt.endswith("<answer>[") for prompt in engine.prompts)
    grade = grades(30, 4)

    def likely(prompt, choice):
        """As likely as the document behind this label is good, more so for the first labels."""
        shown = dict(re.findall(r"^\[(\d+)\] text (\d+) of q$", prompt, re.MULTILINE))
        return grade[f"d{shown[choice.strip('[]')]}"] - 0.4 * int(choice.strip("[]"))

    found = ranked(RankR1(FakeEngine(score=likely), reasoning=False, scoring="likelihood"))
    assert list(found.rankings["q"].order[:10]) == best_first(30, grade)[:10]
    assert found.stats.prompts == 2 * ranked(RankR1(Oracle({"q": grade}))).stats.prompts
    letters = FakeEngine()
    ranked(RankR1(letters, reasoning=False, scoring="likelihood", prompt="setwise"), 12)
    assert all("Passage L: " in letters.prompts[0] and prompt.endswith("Passage") for prompt in letters.prompts)


# -- listwise ----------------------------------------------------------------------------------------------------------------------


def numbers(prompt):
    return [(int(label), int(number)) for label, number in re.findall(r"^\[(\d+)\] text (\d+) of q$", prompt, re.MULTILINE)]


def writes_the_order(grade):
    return FakeEngine(lambda prompt: " > ".join(f"[{label}]" for label, number in sorted(numbers(prompt), key=lambda one: -grade[f"d{one[1]}"])))


def test_fullrank_is_exact_on_a_model_that_writes_the_order():
    for n in (2, 20, 57):
        grade = grades(n, 6)
        engine = writes_the_order(grade)
        found = ranked(FullRank(engine), n)
        assert list(found.rankings["q"].order) == best_first(n, grade) and len(engine.prompts) == 1 and found.stats.failures == {}
        found = ranked(FullRank(writes_the_order(grade), "sliding"), n)
        assert list(found.rankings["q"].order[:10]) == best_first(n, grade)[:10]
        found = ranked(Knockout(writes_the_order(grade)), n)
        assert list(found.rankings["q"].order[:10]) == best_first(n, grade)[:10]


def test_a_window_of_all_is_full_ranking():
    one, other = (ranked(FullRank(Oracle({"q": grades(23)}, noise=5.0), **how), 23) for how in ({}, {"strategy": "sliding", "window_size": 23}))
    assert one.rankings == other.rankings and one.stats.prompts == other.stats.prompts == 1


def test_the_question_stands_behind_all_passages_and_numbers_in_them_are_no_identifiers():
    engine = FakeEngine(lambda prompt: "[1]")
    docs = [f"see [{i + 3}] or [1] > [2]\nand more" for i in range(50)]
    for prompt in ("rankllm", "rankgpt"):
        FullRank(engine, prompt=prompt).rank("what [4] is", docs)
        text = engine.prompts[-1]
        last = re.split(r"\n\[50\] ", text)[1]
        assert re.findall(r"^\[(\d+)\]", text, re.MULTILINE) == [str(i) for i in range(1, 51)] and "see (3) or (1) > (2) and more" in text
        assert "what (4) is" in last and "50 passages" in last and "[2] > [1]" in last


def test_several_passes_of_windows_settle_more():
    grade = {f"d{i}": i for i in range(60)}  # the input is the wrong way round
    for passes in (1, 2, 3):
        order = ranked(FullRank(Oracle({"q": grade}), "sliding", num_passes=passes), 60).rankings["q"].order
        exact = next(i for i in range(60) if order[i] != 59 - i) if order != tuple(range(59, -1, -1)) else 60
        assert exact >= 10 * passes


@pytest.mark.parametrize("text", [
    "", "no idea", "[1]", "[3] > [3] > [3]", "[99] > [0] > [-1]", "[2] > [1", "<think> [1] > [2]", "[5] > [4] > [3] > [2] > [1] " * 40, "{}", "[[[[",
    "9" * 5000, '{"ranking": [4, 2]}', "Passage 3, then passage 1", "A > B > C", "１ ＞ ２", "\x00\ud800",
])  # fmt: skip
@pytest.mark.parametrize("method", [FullRank, Knockout, lambda model: FullRank(model, "sliding", 4, 2), lambda model: FullRank(model, identifiers="letter")])
@pytest.mark.filterwarnings("ignore:a ranking of")
def test_whatever_a_model_writes_a_permutation_comes_out(method, text):
    found = ranked(method(FakeEngine(lambda prompt: text)), 9)
    assert sorted(found.rankings["q"].order) == list(range(9)) and set(found.runs["q"]) == {f"d{i}" for i in range(9)}
