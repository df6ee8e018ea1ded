"""Suffix identification: fair questions, and accuracies that known scorers must get."""

import numpy as np
import pytest
import torch
from scipy.stats import norm

import small_folders
from echelon.data.text import split_sentences
from echelon.errors import UserError
from echelon.evaluate.suffix_identification import SuffixIdentification, above, baselines, with_interval
from echelon.models import load
from echelon.score import CallableScorer, Cosine, RankGenScorer, Scorer
from small_encoder import encoder, untrained_rankgen

KNOBS = {"questions": 12, "prefix_words": 20, "suffix_words": 8, "negatives": 4, "generator": ""}


@pytest.fixture
def books(tmp_path):
    for number, length in enumerate((60, 30)):
        (tmp_path / f"{number}.txt").write_text(small_folders.document(number, length))
    return tmp_path


def text_of(books, doc_id):
    return " ".join(" ".join(split_sentences((books / doc_id.split("/")[0]).read_text())).split())


def test_a_question_is_whole_sentences_what_followed_and_equally_long_pieces_from_elsewhere(books):
    asked = SuffixIdentification(**KNOBS).ask(books)
    assert 8 <= len(asked) <= 14 and len({question.doc_id for question in asked}) == 2
    for question in asked:
        text = text_of(books, question.doc_id)
        assert f"{question.prefix} {question.gold}" in text
        assert question.prefix.endswith(".") and len(question.prefix.split()) <= 20
        assert len(question.inbook) == 4 and {len(piece.split()) for piece in (question.gold, *question.inbook)} == {8}
        assert len(set(question.inbook)) == 4 and question.gold not in question.inbook
        here = text.index(f"{question.prefix} {question.gold}")
        for piece in question.inbook:
            assert piece in text[: here - 1] or piece in text[here + len(question.prefix) + len(question.gold) :]


def test_questions_are_spread_by_length_and_drawn_from_the_seed(books):
    asked = SuffixIdentification(**KNOBS | {"questions": 24}).ask(books)
    first = sum(question.doc_id.startswith("0") for question in asked)
    assert 0.55 < first / len(asked) < 0.8  # two thirds of the words
    assert asked == SuffixIdentification(**KNOBS | {"questions": 24}).ask(books)
    assert asked != SuffixIdentification(**KNOBS | {"questions": 24, "seed": 1}).ask(books)


def known(asked, right, wrong, made=0.0):
    """A scorer that knows the answers."""
    gold = {(question.prefix, question.gold) for question in asked}
    written = {(question.prefix, question.generated) for question in asked}
    return CallableScorer(
        lambda prefix, texts: [right if (prefix, t) in gold else made if (prefix, t) in written else wrong for t in texts]
    )


def test_an_oracle_its_opposite_and_indifference_get_1_0_and_a_half(books):
    benchmark = SuffixIdentification(**KNOBS)
    asked = benchmark.ask(books)
    told = []
    made = benchmark.evaluate(books, {"oracle": known(asked, 1, 0), "opposite": known(asked, 0, 1), "same": known(asked, 2, 2)}, told.append)
    assert {name: (m["inbook"]["value"], m["inbook_all"]["value"]) for name, m in made.items()} == {
        "oracle": (1, 1), "opposite": (0, 0), "same": (0.5, 0)
    }  # fmt: skip
    assert made["oracle"]["inbook"]["n"] == len(asked) and "generated" not in made["oracle"]
    assert told == ["choosing places", "scoring with oracle", "scoring with opposite", "scoring with same"]


def test_two_way_and_many_way_of_a_scorer_that_is_fooled_by_one_of_four(books):
    benchmark = SuffixIdentification(**KNOBS)
    fooled = {(question.prefix, question.inbook[2]) for question in benchmark.ask(books)}
    gold = {(question.prefix, question.gold) for question in benchmark.ask(books)}
    scorer = CallableScorer(lambda prefix, texts: [2 if (prefix, t) in fooled else 1 if (prefix, t) in gold else 0 for t in texts])
    made = benchmark.evaluate(books, {"fooled": scorer})["fooled"]
    assert made["inbook"]["value"] == pytest.approx(0.75) and made["inbook_all"]["value"] == 0


def test_texts_of_a_model_are_told_apart_too(books, tmp_path_factory):
    folder = small_folders.language_model(tmp_path_factory.mktemp("lm"), positions=128)
    benchmark = SuffixIdentification(**KNOBS | {"generator": folder})
    asked = benchmark.ask(books)
    assert asked == benchmark.ask(books)
    assert all(len(question.generated.split()) <= 8 for question in asked) and len({question.generated for question in asked}) > 1
    made = benchmark.evaluate(books, {"fooled": known(asked, 1, 0, made=3), "oracle": known(asked, 1, 0, made=-1)})
    assert made["fooled"]["generated"]["value"] == 0 and made["fooled"]["inbook"]["value"] == 1
    assert made["oracle"]["generated"]["value"] == 1


def test_a_score_that_is_no_number_loses(books):
    class Broken(Scorer):
        def score(self, items):
            return torch.full((len(items),), float("nan"))

    assert SuffixIdentification(**KNOBS).evaluate(books, {"broken": Broken()})["broken"]["inbook_all"]["value"] == 0


def test_above_counts_ties_half():
    assert above(np.array([[1.0], [2.0]]), np.array([[0.0, 1.0, 2.0], [2.0, 2.0, 5.0]])).tolist() == [[1, 0.5, 0], [0.5, 0.5, 0]]


def test_the_interval_is_that_of_a_mean():
    values = np.random.default_rng(0).normal(0.6, 0.2, 400)
    made = with_interval(values, 0)
    half = norm.ppf(0.975) * values.std() / 20
    assert made["value"] == pytest.approx(values.mean()) and made["n"] == 400
    assert made["low"] == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert made["high"] == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert with_interval(np.ones(5), 0) == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 5}


@pytest.mark.parametrize("content", ["", "One. Two. Three.", "no end"])
def test_documents_that_are_too_short_are_refused(tmp_path, content):
    (tmp_path / "short.txt").write_text(content)
    with pytest.raises(UserError, match=r"short.txt: the documents are too short for prefixes with 4 other places of 8 words"):
        SuffixIdentification(**KNOBS).ask(tmp_path / "short.txt")


@pytest.mark.parametrize("knob", ["questions", "prefix_words", "suffix_words", "negatives"])
def test_numbers_below_one_are_refused(knob):
    with pytest.raises(ValueError, match=f"{knob} is 0; it must be at least 1"):
        SuffixIdentification(**{knob: 0})


def test_the_baselines_all_answer(books, tmp_path_factory):
    folder = small_folders.language_model(tmp_path_factory.mktemp("lm"), positions=128)
    scorers = baselines(load(folder), untrained_rankgen(), encoder())
    assert list(scorers) == ["rankgen", "unigram_overlap", "cosine (untrained encoder)", "likelihood, mean", "likelihood, sum", "likelihood, PMI"]
    assert isinstance(scorers["rankgen"], RankGenScorer) and isinstance(scorers["cosine (untrained encoder)"], Cosine)
    made = SuffixIdentification(**KNOBS).evaluate(books, scorers)
    assert all(0 <= m["inbook"]["low"] <= m["inbook"]["value"] <= m["inbook"]["high"] <= 1 for m in made.values())
