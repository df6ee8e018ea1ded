"""Noise belongs to a row; its law is the softmax."""

import numpy as np
import pytest
import torch
from scipy import stats

from echelon.generate.sampling import Sampler, stream_of, uniform

LOGITS = torch.linspace(-2, 2, 20)


def draws(sampler, count=20_000):
    scores = LOGITS[None]
    for warper in sampler.warpers():
        scores = warper(torch.zeros(1, 1, dtype=torch.long), scores)
    key = stream_of(0, "law", ())
    return np.bincount(sampler.draw(scores.expand(count, -1), [key] * count, list(range(count))), minlength=20)


@pytest.mark.parametrize(
    "sampler", [Sampler(), Sampler(temperature=0.7), Sampler(top_k=6), Sampler(top_p=0.8), Sampler(min_p=0.2), Sampler(typical_p=0.6)]
)
def test_tokens_follow_the_truncated_softmax(sampler):
    probabilities = (LOGITS.double() / sampler.temperature).softmax(0).numpy()
    order = np.argsort(-probabilities)
    keep = np.ones(20, bool)
    if sampler.top_k:
        keep[order[sampler.top_k :]] = False
    if sampler.top_p < 1:
        keep[order[1 + np.searchsorted(np.cumsum(probabilities[order]), sampler.top_p) :]] = False
    if sampler.min_p:
        keep = probabilities >= sampler.min_p * probabilities.max()
    if sampler.typical_p < 1:
        surprise = -np.log(probabilities)
        order = np.argsort(np.abs(surprise - (probabilities * surprise).sum()))
        keep[order[1 + np.searchsorted(np.cumsum(probabilities[order]), sampler.typical_p) :]] = False
    counts = draws(sampler)
    assert counts[~keep].sum() == 0
    expected = probabilities[keep] / probabilities[keep].sum() * counts.sum()
    assert stats.chisquare(counts[keep], expected).pvalue > 1e-3


def test_streams_and_steps_are_independent_and_repeatable():
    a, b = stream_of(1, 0, ()), stream_of(1, 0, (3, 1))
    assert a == stream_of(1, 0, ()) != b
    assert np.array_equal(uniform(a, 5, 100), uniform(a, 5, 100))
    assert abs(np.corrcoef(uniform(a, 5, 5000), uniform(a, 6, 5000))[0, 1]) < 0.05
    assert abs(np.corrcoef(uniform(a, 5, 5000), uniform(b, 5, 5000))[0, 1]) < 0.05
    assert uniform(a, 0, 100_000).min() > 0 and uniform(a, 0, 100_000).max() < 1


def test_temperature_zero_is_the_argmax():
    assert Sampler(temperature=0).draw(LOGITS[None], [1], [0]) == [19]


@pytest.mark.parametrize(("knob", "value"), [("temperature", -1), ("top_k", -1), ("top_p", 0), ("top_p", 1.1), ("min_p", 2), ("typical_p", 0)])
def test_a_knob_out_of_range_is_named(knob, value):
    with pytest.raises(ValueError, match=f"{knob} is {value}"):
        Sampler(**{knob: value})
