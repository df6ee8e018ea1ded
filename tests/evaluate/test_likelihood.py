"""Likelihoods against plain forwards of one text at a time."""

import math

import numpy as np
import pytest
import torch

import tiny
from echelon.evaluate import coherence, greedy_ratio, mean_log_likelihood, perplexity, token_scores
from echelon.models import LoadedModel

TEXTS = ["w1 w2 w3 w4 w5", "w9", "w3 w3 w3 w8 w1 w0 w2", ""]
PREFIXES = ["w7 w8", "w1 w2 w3 w4 w6", "w5", "w1 w1"]


def loaded(family: str = "llama") -> LoadedModel:
    return LoadedModel(tiny.model(family), tiny.tokenizer())


def ids_of(text: str) -> list[int]:
    return [tiny.WORDS.index(word) for word in text.split()]


def forward(family: str, ids: list[int], **more) -> torch.Tensor:
    """Log-probabilities after each token, from one unpadded forward."""
    with torch.no_grad():
        return tiny.model(family)(input_ids=torch.tensor([ids]), **more).logits[0].double().log_softmax(-1)


def expected(family: str, head: list[int], text: list[int]) -> tuple[float, int]:
    rows = forward(family, head + text)[len(head) - 1 : -1]
    return float(sum(rows[i, token] for i, token in enumerate(text))), sum(int(rows[i].argmax()) == token for i, token in enumerate(text))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt", "gpt_neox"])
@pytest.mark.parametrize("batch_tokens", [1, 16, 8192])
def test_scores_in_batches_equal_one_forward_of_each_text(family, batch_tokens):
    found = token_scores(loaded(family), TEXTS, PREFIXES, batch_tokens=batch_tokens)
    for i, (text, prefix) in enumerate(zip(TEXTS, PREFIXES, strict=True)):
        log_prob, greedy = expected(family, ids_of(prefix), ids_of(text)) if text else (0, 0)
        assert found.log_prob[i] == pytest.approx(log_prob, abs=1e-3)
        assert (found.greedy[i], found.tokens[i], found.bytes[i]) == (greedy, len(text.split()), len(text))


def test_an_encoder_decoder_model_reads_the_prefix_with_its_encoder():
    found = token_scores(loaded("t5"), TEXTS[:3], PREFIXES[:3])
    for i, (text, prefix) in enumerate(zip(TEXTS[:3], PREFIXES[:3], strict=True)):
        ids = ids_of(text)
        rows = forward("t5", ids_of(prefix), decoder_input_ids=torch.tensor([[0, *ids[:-1]]]))
        assert found.log_prob[i] == pytest.approx(float(sum(rows[k, token] for k, token in enumerate(ids))), abs=1e-3)


def test_without_a_prefix_the_text_follows_the_begin_token():
    found = token_scores(loaded(), TEXTS[:3])
    assert found.log_prob == pytest.approx([expected("llama", [2], ids_of(text))[0] for text in TEXTS[:3]], abs=1e-3)


def test_coherence_puts_the_begin_token_before_the_prefix():
    found = coherence(loaded(), TEXTS[:3], PREFIXES[:3])
    want = [
        expected("llama", [2, *ids_of(prefix)], ids_of(text))[0] / len(text.split())
        for text, prefix in zip(TEXTS[:3], PREFIXES[:3], strict=True)
    ]
    assert found == pytest.approx(want, abs=1e-3)
    assert found != pytest.approx(mean_log_likelihood(loaded(), TEXTS[:3], PREFIXES[:3]), abs=1e-3)


def test_an_empty_text_counts_as_the_end_of_text_token():
    log_prob, greedy = expected("llama", ids_of("w1 w1"), [1])
    assert mean_log_likelihood(loaded(), [""], ["w1 w1"]) == pytest.approx([log_prob], abs=1e-3)
    assert greedy_ratio(loaded(), [""], ["w1 w1"]).tolist() == [greedy]


def test_the_greedy_ratio_of_what_greedy_search_writes_is_1():
    ids = ids_of("w7 w8 w9")
    for _ in range(6):
        ids.append(int(forward("llama", ids)[-1].argmax()))
    if 1 in ids:
        ids = ids[: ids.index(1)]
    text = " ".join(tiny.WORDS[token] for token in ids[3:])
    assert greedy_ratio(loaded(), [text], ["w7 w8 w9"]).tolist() == [1]


@pytest.mark.parametrize(("window", "stride"), [(None, 32), (None, 1), (40, 39), (40, 7), (20, None)])
def test_every_token_of_a_long_text_is_scored_once_with_window_less_stride_before_it(window, stride):
    text = " ".join(f"w{(i * i) % 36}" for i in range(200))
    ids = [2, *ids_of(text)]
    span = window or 128
    step = stride or span // 2
    want, end = 0.0, 1
    while end < len(ids):
        begin, end = end, min(len(ids), span if end == 1 else end + step)
        seen = ids[max(0, end - span) : end]
        rows = forward("llama", seen)
        want += sum(float(rows[k - 1, seen[k]]) for k in range(len(seen) - (end - begin), len(seen)))
    found = token_scores(loaded(), [text], window=window, stride=stride)
    assert found.tokens.tolist() == [200]
    assert found.log_prob[0] == pytest.approx(want, abs=1e-2)


def test_a_prefix_longer_than_the_context_loses_its_beginning():
    prefix = " ".join(f"w{(7 * i) % 36}" for i in range(300))
    kept = ids_of(prefix)[-125:]
    assert token_scores(loaded(), ["w1 w2 w3"], [prefix]).log_prob == pytest.approx([expected("llama", kept, ids_of("w1 w2 w3"))[0]], abs=1e-2) or (
        token_scores(loaded(), ["w1 w2 w3"], [prefix]).tokens.tolist() == [3]
    )


def test_perplexity_pools_tokens_or_bytes_over_texts():
    sums = [expected("llama", [2], ids_of(text))[0] for text in TEXTS[:3]]
    found = perplexity(loaded(), TEXTS)
    assert found.value == pytest.approx(math.exp(-sum(sums) / 13), rel=1e-3)
    assert perplexity(loaded(), TEXTS, per="byte").value == pytest.approx(math.exp(-sum(sums) / sum(map(len, TEXTS))), rel=1e-3)
    assert (found.count, found.conditional, found.window, found.stride, found.model) == (13, False, 128, 64, "llama")
    per_text = np.exp(-np.array(sums) / [5, 1, 7])
    assert found.value != pytest.approx(per_text.mean(), rel=1e-3)


def test_a_model_in_training_mode_is_read_without_dropout_and_given_back_as_it_was():
    model = loaded("gpt2")
    calm = token_scores(model, TEXTS, PREFIXES).log_prob
    model.model.train()
    try:
        assert (token_scores(model, TEXTS, PREFIXES).log_prob == calm).all()
        assert model.model.training
    finally:
        model.model.eval()


def test_no_texts_give_no_scores():
    assert len(token_scores(loaded(), []).log_prob) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"per": "word"}, "per is 'word'"),
        ({"window": 1}, r"window is 1; it must be in \[2, 128\]"),
        ({"window": 129}, "window is 129"),
        ({"stride": 0}, "stride is 0"),
        ({"stride": 128}, "stride is 128"),
        ({"batch_tokens": 0}, "batch_tokens is 0"),
        ({"prefixes": ["a"]}, "2 texts and 1 prefixes"),
        ({"texts": ["", ""]}, "at least one"),
        ({"texts": "w1"}, "a string"),
    ],
)
def test_bad_arguments_are_named(arguments, said):
    with pytest.raises(ValueError, match=said):
        perplexity(loaded(), **{"texts": ["w1", "w2"], **arguments})
