"""Momentum decoding is greedy search that pays for repeating itself; checked against the rule written out naively."""

import math

import pytest
import torch

import tiny
from echelon.generate import Greedy, Momentum, MomentumProcessor
from echelon.generate.momentum import RESISTANCES, overlap


def naive_overlap(text, token, cap=5):
    """The definition, word for word."""
    if token not in text:
        return 0
    fits = [i for i in range(1, cap + 1) if i - 1 <= len(text)]
    spans = [i for i in fits if any(text[j : j + i] == [*text[len(text) - i + 1 :], token] for j in range(len(text) - i + 1))]
    return max(spans)


def naive_decode(model, prompt, steps, k=5, alpha=0.2):
    text = list(prompt)
    for _ in range(steps):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([text])).logits[0, -1].float()
        p = logits.softmax(-1)
        candidates = logits.topk(k).indices.tolist()
        scores = [p[v].item() - alpha * naive_overlap(text, v) for v in candidates]
        text.append(candidates[scores.index(max(scores))])
        if text[-1] == model.config.eos_token_id:
            break
    return text[len(prompt) :]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox", "qwen2"])
def test_it_equals_the_rule_written_out(family):
    made = Momentum().generate(tiny.model(family), tiny.prompts(), max_new_tokens=20)
    assert made.sequences == [naive_decode(tiny.model(family), prompt, 20) for prompt in tiny.prompts()]


def test_overlap_examples_and_the_definition_agree():
    assert overlap([1, 2, 3, 4, 1, 2, 3], 4) == 4
    assert overlap([5, 5, 5, 5], 5) == 4
    assert overlap([1, 2, 3], 9) == 0
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        text = torch.randint(0, 3, (12,), generator=generator).tolist()
        assert overlap(text, 1) == naive_overlap(text, 1)


@pytest.mark.parametrize("knobs", [{"momentum_alpha": 0.0}, {"momentum_top_k": 1}])
def test_without_resistance_or_choice_it_is_greedy(knobs):
    arguments = (tiny.model("llama"), tiny.prompts())
    assert Momentum(**knobs).generate(*arguments, max_new_tokens=16).sequences == Greedy().generate(*arguments, max_new_tokens=16).sequences


def test_an_exact_5_gram_is_never_repeated_while_a_candidate_is_new():
    model = tiny.model("llama")
    processor = MomentumProcessor()
    for prompt in tiny.prompts():
        text = list(prompt)
        for _ in range(60):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([text[-100:]])).logits[:, -1].float()
            token = int(processor(torch.tensor([text]), logits).argmax())
            candidates = logits[0].topk(5).indices.tolist()
            assert token in candidates
            if any(c not in text for c in candidates):
                assert overlap(text, token) < 5
            text.append(token)


def test_padding_is_not_text():
    logits = torch.randn(1, tiny.VOCAB, generator=torch.Generator().manual_seed(3))
    logits[0, 0] = 9.0  # the pad id itself is a candidate, and was never written
    bare, padded = torch.tensor([[7, 8, 9]]), torch.tensor([[0, 0, 0, 7, 8, 9]])
    processor = MomentumProcessor(pad_token_id=0)
    assert torch.equal(processor(bare, logits), processor(padded, logits))


def test_the_prompt_need_not_count_as_visited():
    prompt, model = [[4, 5, 6, 7, 8, 4, 5, 6, 7]], tiny.model("llama")
    text = Momentum(count_prompt=False).generate(model, prompt, max_new_tokens=6).sequences[0]
    free, expected = list(prompt[0]), []
    for _ in range(6):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([free])).logits[0, -1].float()
        p, candidates = logits.softmax(-1), logits.topk(5).indices.tolist()
        scores = [p[v].item() - 0.2 * naive_overlap(expected, v) for v in candidates]
        expected.append(candidates[scores.index(max(scores))])
        free.append(expected[-1])
    assert text == expected[: len(text)]


def test_resistances_are_the_published_ones():
    values = {name: [f(i) for i in range(6)] for name, f in RESISTANCES.items()}
    assert values["linear"] == [0, 1, 2, 3, 4, 5]
    assert values["constant"] == [0, 2, 2, 2, 2, 2]
    assert values["log"] == pytest.approx([0, *(math.log(1 + i) / math.log(6) / 0.2 for i in range(1, 6))])
    assert values["exp"] == pytest.approx([0, 0.75, 1.125, 1.6875, 2.53125, 3.796875])
    assert values["ngram_block"] == [0, 0, 0, 0, 5, math.inf]
    assert values["chinese"] == [0, 1, 1, 2, 3, 4]


def test_a_blocked_list_of_candidates_falls_back_to_the_likeliest():
    text = torch.tensor([[7, 8, 9, 10, 11, 7, 8, 9, 10]])
    logits = torch.full((1, tiny.VOCAB), -50.0)
    logits[0, 11] = 5.0
    made = MomentumProcessor(top_k=1, resistance=[0, 0, 0, 0, 0, math.inf])(text, logits)
    assert int(made.argmax()) == 11


@pytest.mark.parametrize(
    "knobs", [{"momentum_top_k": 0}, {"momentum_alpha": -1}, {"max_overlap": 0}, {"resistance": "liner"}, {"resistance": [0, 1]}]
)
def test_bad_knobs_are_named(knobs):
    with pytest.raises(ValueError, match=next(iter(knobs))):
        Momentum(**knobs)


def test_sampling_arguments_are_refused():
    ids = torch.tensor([tiny.prompts()[0]])
    with pytest.raises(ValueError, match="do_sample and num_beams"):
        tiny.model("llama").generate(ids, custom_generate=Momentum(), do_sample=True, max_new_tokens=3)
