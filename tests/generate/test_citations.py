"""What may not be quoted is not: by transformers' generate and by our own decoders, in batches, beams, and with pads in front."""

import math

import pytest
import torch
from transformers import LogitsProcessorList

import tiny
from echelon.generate import Greedy, Nucleus
from echelon.generate.citations import CitationBlocker, Citations

PAD = 0


def grams(sequences, n):
    return {tuple(sequence[i : i + n]) for sequence in sequences for i in range(len(sequence) - n + 1)}


def quoting(prompt_lengths=(6, 3, 1), length=30):
    """Prompts, and training sequences that hold what the model would write behind them."""
    prompts = [[4 + (7 * i + 3 * j) % 36 for j in range(n)] for i, n in enumerate(prompt_lengths)]
    written = Greedy().generate(tiny.model("llama"), prompts, max_new_tokens=length).sequences
    return prompts, [prompt + ids for prompt, ids in zip(prompts, written, strict=True)]


def by_transformers(prompts, blocker, **how):
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    made = tiny.model("llama").generate(
        ids, attention_mask=mask, max_new_tokens=30, do_sample=False, pad_token_id=PAD, eos_token_id=None,
        logits_processor=LogitsProcessorList([blocker]), **how,
    )  # fmt: skip
    return [row[width - len(p) :].tolist() for row, p in zip(made, prompts, strict=True)]


@pytest.mark.parametrize("limit", [1, 2, 5])
@pytest.mark.parametrize("how", [{"use_cache": True}, {"use_cache": False}, {"num_beams": 3}])
def test_no_run_longer_than_the_limit_is_quoted_batched_and_left_padded(limit, how):
    prompts, training = quoting()
    forbidden = grams(training, limit + 1)
    blocker = CitationBlocker(training, limit, pad_token_id=PAD)
    together = by_transformers(prompts, blocker, **how)
    for prompt, text in zip(prompts, together, strict=True):
        for end in range(len(prompt) + 1, len(text) + 1):  # every step: what it wrote ends no forbidden run
            assert tuple(text[end - limit - 1 : end]) not in forbidden or end <= limit
        assert by_transformers([prompt], blocker, **how) == [text]
    free = by_transformers(prompts, CitationBlocker([], limit), **how)
    assert any(grams([text], limit + 1) & forbidden for text in free)  # it would have quoted


def test_with_and_without_cache_and_in_our_own_decoders_it_does_the_same():
    prompts, training = quoting()
    blocker = CitationBlocker(training, 3, pad_token_id=PAD)
    cached = by_transformers(prompts, blocker, use_cache=True)
    assert cached == by_transformers(prompts, blocker, use_cache=False)
    session = Greedy().open(tiny.model("llama"), None, processors=[blocker], eos_token_ids=[])
    session.prefill(prompts, room=30)
    session.extend(30)
    assert [prompt + session.new_ids(row) for row, prompt in enumerate(prompts)] == cached
    sampled = Nucleus(top_p=1.0).open(tiny.model("llama"), None, processors=[blocker], seed=3, eos_token_ids=[])
    sampled.prefill(prompts, room=30)
    sampled.extend(30)
    assert not any(grams([prompt[-3:] + sampled.new_ids(row)], 4) & grams(training, 4) for row, prompt in enumerate(prompts))


def test_scores_are_as_they_came_where_no_run_matches_and_never_all_forbidden():
    blocker = CitationBlocker([[1, 2, 3], [1, 2, 0], [7, 8, 1]], 2)
    scores = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    assert blocker(torch.tensor([[0, 3, 1], [2, 2, 2]]), scores) is scores
    held = scores.clone()
    found = blocker(torch.tensor([[3, 1, 2], [2, 2, 2]]), scores)
    assert torch.equal(found[1], scores[1]) and found[0, [3, 0]].tolist() == [-math.inf] * 2 and torch.equal(found[0, 1:3], scores[0, 1:3])
    assert torch.equal(scores, held)  # the caller's are left alone
    others = scores.masked_fill(torch.tensor([[False, True, True, False], [False] * 4]), -math.inf)  # what is left is forbidden by the runs
    assert torch.equal(blocker(torch.tensor([[3, 1, 2], [2, 2, 2]]), others), others)
    assert blocker(torch.tensor([[1, 7, 8]]), scores[:1])[0].isinf().tolist() == [False, True, False, False]
    every = CitationBlocker([[1, token] for token in range(4)], 1)
    assert torch.equal(every(torch.tensor([[1]]), scores[:1]), scores[:1])


def test_short_contexts_match_nothing_and_pads_are_no_text():
    blocker, padded = CitationBlocker([[0, 0, 5, 6]], 3), CitationBlocker([[0, 0, 5, 6]], 3, pad_token_id=0)
    scores = torch.zeros(1, 8)
    assert blocker(torch.tensor([[5]]), scores) is scores
    assert blocker(torch.tensor([[0, 0, 5]]), scores)[0, 6] == -math.inf  # without a pad token these are three tokens of text
    assert padded(torch.tensor([[0, 0, 5]]), scores) is scores
    assert CitationBlocker([[5, 9]], 1)(torch.tensor([[5]]), scores) is scores  # a token that the model does not have


def test_runs_lie_within_one_sequence_and_are_as_long_as_they_can_be():
    sequences = [[1, 2, 3, 4], [3, 4, 5, 1, 2], [9, 1, 2, 3, 9]]
    generator = torch.Generator().manual_seed(1)
    for length in (1, 2, 3):
        citations = Citations(sequences, length)
        for _ in range(20):
            text = torch.randint(1, 6, (12,), generator=generator).tolist()
            expected = []
            for i in range(len(text)):
                fits = [n for n in range(length, len(text) - i + 1) if any(tuple(text[i : i + n]) in grams([s], n) for s in sequences)]
                expected.append(max(fits, default=0))
                behind = {s[j + length] for s in sequences for j in range(len(s) - length) if s[j : j + length] == text[i : i + length]}
                assert len(text[i : i + length]) < length or citations.following(text[: i + length]) == behind
            assert citations.runs(text) == expected
    assert Citations([], 2).runs([1, 2]) == [0, 0] and Citations(sequences, 2).following([]) == set()


def test_bad_limits_are_refused():
    for limit in (0, 1.5, True):
        with pytest.raises(ValueError, match=f"max_citation is {limit}"):
            CitationBlocker([[1, 2]], limit)
    with pytest.raises(ValueError, match="max_citation is 3; the citations were made for 2"):
        CitationBlocker(Citations([[1, 2, 3]], 2), 3)
    with pytest.raises(ValueError, match="length is 0"):
        Citations([], 0)
