"""Token scores against one plain forward, in windows and with prefixes."""

import math

import numpy as np
import pytest
import tiny
import torch

from echelon.evaluate import evaluate_generation, perplexity, token_scores
from echelon.models import LoadedModel

TEXTS = ["w1 w2 w3 w4 w5", "w9", "w3 w3 w3 w8 w1 w0 w2", ""]


def loaded(family="llama"):
    return LoadedModel(tiny.model(family), tiny.tokenizer())


def plain(model, ids):
    with torch.no_grad():
        logits = model.model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
    targets = torch.tensor(ids[1:])
    return logits[:-1].gather(1, targets[:, None])[:, 0].numpy(), (logits[:-1].argmax(-1) == targets).numpy()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_scores_equal_one_forward_of_each_text(family):
    model = loaded(family)
    for text, found in zip(TEXTS, token_scores(model, TEXTS, batch_tokens=16), strict=True):
        ids = [2, *model.tokenizer(text).input_ids]
        expected, greedy = plain(model, ids) if len(ids) > 1 else (np.zeros(0), np.zeros(0, bool))
        np.testing.assert_allclose(found.log_probabilities, expected, atol=1e-4)
        assert (found.greedy == greedy).all()


def test_a_prefix_is_seen_and_not_scored():
    model = loaded()
    found = token_scores(model, ["w4 w5"], ["w1 w2 w3"])[0]
    expected, _ = plain(model, [2, *model.tokenizer("w1 w2 w3 w4 w5").input_ids])
    np.testing.assert_allclose(found.log_probabilities, expected[-2:], atol=1e-4)


def test_long_texts_go_in_windows_with_at_least_context_less_stride_before_each_token():
    model, stride = loaded(), 32
    text = " ".join(f"w{(i * i) % 36}" for i in range(300))
    ids = [2, *model.tokenizer(text).input_ids]
    found = token_scores(model, [text], stride=stride)[0].log_probabilities
    assert len(found) == 300
    expected, end = list(plain(model, ids[:128])[0]), 128
    while end < len(ids):
        take = min(stride, len(ids) - end)
        end += take
        expected += list(plain(model, ids[end - 128 : end])[0][-take:])
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_perplexity_pools_tokens_and_bytes():
    scores = token_scores(loaded(), TEXTS)
    total = -sum(s.log_probabilities.sum() for s in scores)
    assert perplexity(scores) == pytest.approx(math.exp(total / 13))
    assert perplexity(scores, "byte") == pytest.approx(math.exp(total / sum(len(t) for t in TEXTS)))
    with pytest.raises(ValueError, match="per is 'word'"):
        perplexity(scores, "word")
    with pytest.raises(ValueError, match="at least one token"):
        perplexity([])


def test_one_call_measures_many_methods_and_empty_texts_do_not_break_it():
    prefixes, references = ["w1 w2", "w3 w4", "w5"], ["w6 w7 w8", "w9", "w1 w2"]
    outputs = {"copy": references, "empty": ["", "", ""]}
    names = ["overlap", "diversity", "repetition", "likelihood", "greedy_ratio", "length"]
    found = evaluate_generation(prefixes, references, outputs, names, model=loaded())
    assert found["copy"]["overlap"].value == 1 and found["empty"]["overlap"].value == 0
    assert found["copy"]["length"].per_text.tolist() == [3, 1, 2]
    assert found["copy"]["likelihood"].value == pytest.approx(np.mean([s.mean for s in token_scores(loaded(), references, prefixes)]))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({"metrics": ["overlapp"]}, "unknown metric 'overlapp'.*did you mean 'overlap'"), ({"references": ["a"]}, "references has 1"),
     ({"outputs": {"x": []}}, r"outputs\['x'\] has 0"), ({"metrics": ["likelihood"]}, "needs a language model"),
     ({"prefixes": [], "references": [], "outputs": {}}, "prefixes is empty")],
)  # fmt: skip
def test_bad_input_is_named(arguments, said):
    with pytest.raises(ValueError, match=said):
        evaluate_generation(**{"prefixes": ["a", "b"], "references": ["c", "d"], "outputs": {"x": ["e", "f"]}, "metrics": ["overlap"]} | arguments)
