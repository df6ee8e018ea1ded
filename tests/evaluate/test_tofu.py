"""TOFU's measures against closed forms: models that guess, the likelihood of an answer taken apart by hand, and exact p-values."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import hmean

import small_models
import tiny
from echelon.data.question_answers import prompt_and_text, read_question_answers
from echelon.errors import UserError
from echelon.evaluate.tofu import TOFU, forget_quality, model_utility, rouge_l_recall
from echelon.models import LoadedModel

TEMPLATE = "w1 {question} w2 {answer}"
ROW = {"question": "w3 w4", "answer": "w5 w6", "paraphrased_answer": "w6 w5 w7", "perturbed_answer": ["w8", "w9 w10", "w11 w12 w13"]}


@pytest.fixture
def folder(tmp_path):
    general = {key: value for key, value in ROW.items() if key != "paraphrased_answer"}
    for name, rows in {
        "forget10": [ROW, ROW | {"question": "w20", "paraphrased_answer": "w21"}], "retain": [ROW | {"question": "w30"}], "real_authors": [general],
        "world_facts": [general | {"answer": "w14", "perturbed_answer": ["w15", "w16"]}],
    }.items():  # fmt: skip
        (tmp_path / f"{name}_perturbed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def loaded(guessing=False):
    model = small_models.model("llama")
    if guessing:
        model.lm_head.weight.data.zero_()
    return LoadedModel(model, tiny.tokenizer())


def normalised(model, question, answer):
    """Probability of an answer to the power of one over its tokens, token by token."""
    prompt, text = prompt_and_text(question, answer, TEMPLATE)
    before, ids = (model.tokenizer(part, add_special_tokens=False).input_ids for part in (prompt, text))
    total = 0.0
    for place, token in enumerate(ids):
        with torch.no_grad():
            total += float(model.model(torch.tensor([before + ids[:place]])).logits[0, -1].double().log_softmax(-1)[token])
    return math.exp(total / len(ids))


def test_every_figure_of_a_real_model_by_hand(folder):
    model, made = loaded(), TOFU(template=TEMPLATE, max_new_tokens=4).evaluate(folder, loaded())
    names = ("forget10", "retain", "real_authors", "world_facts")
    forget, retain, authors, facts = (read_question_answers(folder / f"{name}_perturbed.jsonl") for name in names)
    assert made["forget"]["probability"] == pytest.approx(np.mean([normalised(model, row.question, row.answer) for row in forget]), rel=1e-4)
    assert made["retain"]["probability"] == pytest.approx(normalised(model, "w30", "w5 w6"), rel=1e-4)
    ratios = []
    for row in (*forget, *retain, *authors, *facts):
        wrong = [normalised(model, row.question, answer) for answer in row.perturbed]
        ratios.append(np.mean(wrong) / normalised(model, row.question, row.paraphrased or row.answer))
    assert made["truth_ratios"] == pytest.approx(ratios[:2], rel=1e-4)
    assert made["forget"]["truth_ratio"] == pytest.approx(np.mean([min(r, 1 / r) for r in ratios[:2]]), rel=1e-4)
    assert [made[name]["truth_ratio"] for name in ("retain", "real_authors", "world_facts")] == pytest.approx([max(0, 1 - r) for r in ratios[2:]], abs=1e-4)
    for name, (row,) in (("real_authors", authors), ("world_facts", facts)):
        right = normalised(model, row.question, row.answer)
        expected = right / (right + sum(normalised(model, row.question, answer) for answer in row.perturbed))
        assert made[name]["probability"] == pytest.approx(expected, rel=1e-4)


def test_without_general_knowledge_all_else_is_the_same(folder):
    benchmark = TOFU(template=TEMPLATE, max_new_tokens=2)
    whole, part = benchmark.evaluate(folder, loaded(), loaded()), benchmark.evaluate(folder, loaded(), loaded(), general=False)
    assert part == {name: value for name, value in whole.items() if name not in ("real_authors", "world_facts", "model_utility")}


def test_a_model_that_guesses(folder):
    made = TOFU(template=TEMPLATE, max_new_tokens=2).evaluate(folder, loaded(guessing=True), loaded(guessing=True))
    assert made["forget"] == pytest.approx({"probability": 1 / tiny.VOCAB, "rouge_l": 0, "truth_ratio": 1}, rel=1e-5)
    assert made["real_authors"]["probability"] == pytest.approx(1 / 4) and made["world_facts"]["probability"] == pytest.approx(1 / 3)
    assert made["retain"]["truth_ratio"] == pytest.approx(0, abs=1e-6) and made["model_utility"] == 0
    assert made["forget_quality"] == 1 and made["log10_forget_quality"] == 0


def test_what_a_model_answers_is_compared_word_by_word(folder):
    model = loaded()
    ids = model.tokenizer("w1 w30 w2", add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        word = model.tokenizer.decode([int(model.model(ids).logits[0, -1].argmax())])
    assert word.startswith("w")
    (folder / "retain_perturbed.jsonl").write_text(json.dumps(ROW | {"question": "w30", "answer": f"x {word.upper()}, y"}) + "\n")
    assert TOFU(template=TEMPLATE, max_new_tokens=1).evaluate(folder, model)["retain"]["rouge_l"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(("reference", "text", "expected"), [
    ("The cat sat on the mat.", "the CAT, sat on a mat", 5 / 6), ("a b c d", "d c b a", 1 / 4), ("a b", "", 0), ("...", "a", 0), ("a b c", "x a y b z c", 1),
])  # fmt: skip
def test_rouge_l_recall(reference, text, expected):
    assert rouge_l_recall(reference, text) == pytest.approx(expected)


def test_utility_is_the_harmonic_mean():
    values = [0.9, 0.2, 0.5, 0.7, 0.4, 0.99, 0.1, 0.3, 0.8]
    assert model_utility(values) == pytest.approx(hmean(values)) and model_utility([*values, 0.0]) == 0


def test_forget_quality_is_an_exact_p_value():
    same = list(np.linspace(0.1, 2, 30))
    assert forget_quality(same, same)["forget_quality"] == 1
    apart = forget_quality(np.arange(20) / 20, 2 + np.arange(20) / 20)
    assert apart["ks_statistic"] == 1 and apart["forget_quality"] == pytest.approx(2 / math.comb(40, 20))
    assert apart["log10_forget_quality"] == pytest.approx(math.log10(2 / math.comb(40, 20)))
    with pytest.raises(ValueError, match="retain_only has shape"):
        forget_quality(same, [])


def test_truth_ratios_of_an_earlier_run_serve_as_well_as_the_model(folder):
    benchmark, other = TOFU(template=TEMPLATE, max_new_tokens=1), loaded(guessing=True)
    first = benchmark.evaluate(folder, loaded(), other)
    again = benchmark.evaluate(folder, loaded(), [1.0, 1.0])
    assert first["ks_statistic"] == again["ks_statistic"] and first["forget_quality"] == pytest.approx(again["forget_quality"])


def test_a_model_whose_probabilities_vanish_still_has_finite_ratios(folder):
    model = loaded()
    model.model.lm_head.weight.data *= 1e4
    made = TOFU(template=TEMPLATE, max_new_tokens=1).evaluate(folder, model)
    assert np.isfinite(made["truth_ratios"]).all() and 0 <= made["forget"]["truth_ratio"] <= 1 and 0 <= made["real_authors"]["probability"] <= 1


def test_bad_knobs_and_files(tmp_path, folder):
    with pytest.raises(ValueError, match="forget is 'forget20'; it must be one of forget01, forget05, forget10"):
        TOFU(forget="forget20")
    with pytest.raises(ValueError, match="questions is -1"):
        TOFU(questions=-1)
    with pytest.raises(ValueError, match="it must hold {question} once and end with {answer}"):
        TOFU(template="{question}")
    with pytest.raises(UserError, match="forget05_perturbed.jsonl"):
        TOFU(forget="forget05").read(tmp_path)
    (folder / "retain_perturbed.jsonl").write_text('{"question": "w1", "answer": "w2"}\n')
    with pytest.raises(UserError, match="question 1: it has no 'perturbed_answer'"):
        TOFU().read(folder)
    (folder / "retain_perturbed.jsonl").write_text('{"question": "w1"}\n')
    with pytest.raises(UserError, match="line 1: not a JSON object with a 'question' and an 'answer'"):
        TOFU().read(folder)


@pytest.mark.skipif("ECHELON_DATA" not in os.environ, reason="ECHELON_DATA does not name the folder of public collections")
def test_the_public_files_are_read_whole():
    data = Path(os.environ["ECHELON_DATA"]) / "tofu"
    for forget, count in (("forget01", 40), ("forget05", 200), ("forget10", 400)):
        sets = TOFU(forget=forget).read(data)
        assert {name: len(rows) for name, rows in sets.items()} == {"forget": count, "retain": 400, "real_authors": 100, "world_facts": 117}
        assert all(row.paraphrased for row in sets["forget"])
    assert len(TOFU(questions=5).read(data)["retain"]) == 5
    full, kept = ({row.question for row in read_question_answers(data / f"{name}.jsonl")} for name in ("full", "retain90"))
    assert full - kept == {row.question for row in sets["forget"]}
