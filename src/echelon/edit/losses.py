"""Losses that make a language model unlearn, on logits and labels as transformers has them; they work with any model, adapter and loop.

Logits are (batch, tokens, vocab), labels (batch, tokens) with -100 for what does not count, unshifted: the logits of one place are held against the label of
the next. A batch without any label has loss 0 and gradient 0. Everything is computed in float32.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid
from torch.utils.checkpoint import checkpoint

IGNORED = -100
CHUNK = 1024  # tokens whose probabilities are in memory at a time

Logits = Float[Tensor, "batch tokens vocab"]
Labels = Int[Tensor, "batch tokens"]
Loss = Float[Tensor, ""]


def inverted_hinge_loss(logits: Logits, labels: Labels, *, margin: float = 1.0, chunk: int = CHUNK) -> Loss:
    """Mean of ``max(0, margin + p(y) - p(v*))`` over tokens, where v* is the likeliest token beside the label y.

    At margin 1 it lies in [0, 2]. Its gradient is bounded, goes to nothing as p(y) does, and moves probability from the label to the runner-up and not to the
    whole vocabulary. Where runners-up tie, one of them gets the gradient.

    Source: "Towards Robust and Parameter-Efficient Knowledge Unlearning for LLMs", arXiv 2408.06621. Its code skips the softmax where all logits happen to
    lie in [0, 1]; here it is always taken.

    Args:
        logits: of the model.
        labels: what is to be unlearned.
        margin: below 1, tokens whose label is far enough below the runner-up get no gradient.
        chunk: tokens at a time; the result does not depend on it.

    Raises:
        ValueError: if the vocabulary has fewer than two tokens, or shapes disagree.
    """
    kept, targets = _kept(logits, labels)
    if kept.shape[-1] < 2:
        raise ValueError(f"logits have a vocabulary of {kept.shape[-1]}; a runner-up needs at least 2 tokens")
    return _mean_of_chunks(lambda z, y: _hinge(z, y, margin), chunk, kept, targets)


def token_cross_entropy(logits: Logits, labels: Labels, *, chunk: int = CHUNK) -> Loss:
    """Mean negative log-likelihood of the labels."""
    kept, targets = _kept(logits, labels)
    return _mean_of_chunks(lambda z, y: cross_entropy(z.float(), y, reduction="sum"), chunk, kept, targets)


def gradient_ascent_loss(logits: Logits, labels: Labels) -> Loss:
    """The cross-entropy with its sign turned: without a lower bound."""
    return -token_cross_entropy(logits, labels)


def gradient_difference_loss(logits: Logits, labels: Labels, retain_logits: Logits, retain_labels: Labels, *, retain_weight: float = 1.0) -> Loss:
    """Gradient ascent on what is to be forgotten, and descent on what is to stay."""
    return gradient_ascent_loss(logits, labels) + retain_weight * token_cross_entropy(retain_logits, retain_labels)


def kl_loss(logits: Logits, reference_logits: Logits, labels: Labels, *, chunk: int = CHUNK) -> Loss:
    """Mean over the labelled places of ``KL(reference || model)``: keeps a model near another one.

    The code of TOFU sums over all places, padding and questions among them, and divides by their number; here those that count in every other loss count.
    """
    kept, _ = _kept(logits, labels)
    reference, _ = _kept(reference_logits, labels)

    def divergence(z: Tensor, told: Tensor) -> Tensor:
        told = told.float().log_softmax(-1)
        return (told.exp() * (told - z.float().log_softmax(-1))).sum()

    return _mean_of_chunks(divergence, chunk, kept, reference.detach())


def npo_loss(log_probs: Float[Tensor, " batch"], reference_log_probs: Float[Tensor, " batch"], *, beta: float = 0.1) -> Loss:
    """Negative preference optimisation, ``mean -(2 / beta) log sigmoid(-beta log(p / p_reference))`` of whole sequences.

    Source: "Negative Preference Optimization: From Catastrophic Collapse to Effective Unlearning", arXiv 2404.05868. For small beta its gradient is that of
    gradient ascent on summed log-probabilities; it fades as p falls below the reference.

    Args:
        log_probs: of each sequence under the model, see `sequence_log_probs`.
        reference_log_probs: under the model before unlearning.
        beta: how soon the gradient fades, above 0.
    """
    return -(2 / beta) * logsigmoid(-beta * (log_probs - reference_log_probs.detach())).mean()


def sequence_log_probs(logits: Logits, labels: Labels) -> Float[Tensor, " batch"]:
    """Summed log-probability of the labels of each row."""
    kept, targets = _kept(logits, labels)
    each = -cross_entropy(kept.float(), targets, reduction="none")
    rows = _counted(labels).nonzero()[:, 0]
    return torch.zeros(len(labels), dtype=torch.float32, device=logits.device).index_add(0, rows, each)


def token_counts(labels: Labels) -> Int[Tensor, " batch"]:
    """How many labels of each row are held against a prediction."""
    return _counted(labels).sum(-1)


def _counted(labels: Labels) -> Bool[Tensor, "batch tokens"]:
    return labels[:, 1:] != IGNORED


def _kept(logits: Logits, labels: Labels) -> tuple[Float[Tensor, "kept vocab"], Int[Tensor, " kept"]]:
    """Predictions that count, with what they are held against."""
    if logits.ndim != 3 or logits.shape[:2] != labels.shape:
        raise ValueError(f"logits have shape {tuple(logits.shape)} and labels {tuple(labels.shape)}; they must be (batch, tokens, vocab) and (batch, tokens)")
    counted = _counted(labels)
    return logits[:, :-1][counted], labels[:, 1:][counted]


def _hinge(logits: Float[Tensor, "some vocab"], targets: Int[Tensor, " some"], margin: float) -> Loss:
    p = logits.float().softmax(-1)
    place = targets[:, None]
    runner_up = p.scatter(1, place, -torch.inf).max(1).values  # max and not amax: of a tie one gets the gradient
    return (margin + p.gather(1, place)[:, 0] - runner_up).clamp_min(0).sum()


def _mean_of_chunks(loss: Callable[[Tensor, Tensor], Tensor], chunk: int, kept: Float[Tensor, "kept vocab"], other: Tensor) -> Loss:
    """Probabilities of one chunk are made again in backward, so that those of one chunk are alive at a time."""
    if len(kept) <= chunk:
        return loss(kept, other) / max(1, len(kept))
    parts = [checkpoint(loss, *each, use_reentrant=False, preserve_rng_state=False) for each in zip(kept.split(chunk), other.split(chunk), strict=True)]
    return torch.stack(parts).sum() / len(kept)
