"""Contrastive search and contrastive decoding against their definitions, written out without cache or batch."""

import pytest
import torch

import tiny
from echelon.generate import Beam, ContrastiveDecoding, ContrastiveSearch, Greedy


def naive_contrastive_search(model, prompt, steps, k=5, alpha=0.6):
    text = list(prompt)
    for _ in range(steps):
        with torch.no_grad():
            p = model(input_ids=torch.tensor([text])).logits[0, -1].float().softmax(-1)
            values, candidates = p.topk(k)
            scores = []
            for value, token in zip(values.tolist(), candidates.tolist(), strict=True):
                hidden = model(input_ids=torch.tensor([[*text, token]]), output_hidden_states=True).hidden_states[-1][0].float()
                hidden = torch.nn.functional.normalize(hidden, dim=-1)
                scores.append((1 - alpha) * value - alpha * (hidden[:-1] @ hidden[-1]).max().item())
        text.append(candidates[scores.index(max(scores))].item())
        if text[-1] == model.config.eos_token_id:
            break
    return text[len(prompt) :]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_contrastive_search_equals_its_definition_for_ragged_prompts(family):
    made = ContrastiveSearch().generate(tiny.model(family), tiny.prompts(), max_new_tokens=12)
    assert made.sequences == [naive_contrastive_search(tiny.model(family), prompt, 12) for prompt in tiny.prompts()]


def test_contrastive_search_without_penalty_is_greedy():
    arguments = (tiny.model("llama"), tiny.prompts())
    assert ContrastiveSearch(penalty_alpha=0.0).generate(*arguments, max_new_tokens=12).sequences == (
        Greedy().generate(*arguments, max_new_tokens=12).sequences
    )


def test_contrastive_decoding_with_one_beam_takes_the_best_difference_among_plausible_tokens():
    expert, amateur = tiny.model("llama"), tiny.model("qwen2")
    made = ContrastiveDecoding(amateur=amateur, num_beams=1, ignore_prefix=False).generate(expert, tiny.prompts(), max_new_tokens=10)
    for prompt, new in zip(tiny.prompts(), made.sequences, strict=True):
        text = list(prompt)
        for token in new:
            with torch.no_grad():
                strong = expert(input_ids=torch.tensor([text])).logits[0, -1].float().softmax(-1)
                weak = (amateur(input_ids=torch.tensor([text])).logits[0, -1].float() / 0.5).softmax(-1)
            score = torch.where(strong >= 0.1 * strong.max(), strong.log() - weak.log(), -torch.inf)
            assert score[token] == pytest.approx(score.max().item(), abs=1e-4)
            text.append(token)


def test_contrastive_decoding_without_weight_and_bound_is_beam_search():
    arguments = (tiny.model("llama"), tiny.prompts())
    plain = ContrastiveDecoding(amateur=tiny.model("qwen2"), st=0.0, plausibility=1e-30, num_beams=3).generate(*arguments, max_new_tokens=8)
    assert plain.sequences == Beam(num_beams=3).generate(*arguments, max_new_tokens=8).sequences


def test_an_amateur_of_another_vocabulary_is_refused():
    import transformers

    other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**tiny.SPECIAL, "vocab_size": 50}, **tiny.WIDE))
    with pytest.raises(ValueError, match="another vocabulary"):
        ContrastiveDecoding(amateur=other).generate(tiny.model("llama"), tiny.prompts(1), max_new_tokens=2)


@pytest.mark.parametrize(
    ("cls", "knobs"),
    [(ContrastiveSearch, {"top_k": 0}), (ContrastiveSearch, {"penalty_alpha": 1.5}), (ContrastiveDecoding, {"plausibility": 0.0}),
     (ContrastiveDecoding, {"amateur_temperature": 0.0}), (ContrastiveDecoding, {"st": -1.0}), (ContrastiveDecoding, {"num_beams": 0})],
)  # fmt: skip
def test_bad_knobs_are_named(cls, knobs):
    with pytest.raises(ValueError, match=next(iter(knobs))):
        cls(**knobs)
