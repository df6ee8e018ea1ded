"""What GRPO (:mod:`echelon.rerank.training.grpo`) is made of: what a model writes, how likely that is, what it is worth, and the loss."""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from echelon.errors import UserError
from echelon.models.batching import cache_name, padded
from echelon.rerank.training.answers import logits_at


class Completion(NamedTuple):
    """What a model wrote: tokens, the one for the end included, and whether it came to that end."""

    ids: list[int]
    finished: bool


def group_advantages(rewards: Float[Tensor, "groups size"], epsilon: float = 1e-4) -> Float[Tensor, "groups size"]:
    """How far each reward is above its group's mean, in (unbiased) standard deviations; exactly 0 where all of a group are equal."""
    spread = rewards.std(1, keepdim=True) if rewards.shape[1] > 1 else torch.zeros_like(rewards)
    equal = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    return ((rewards - rewards.mean(1, keepdim=True)) / (spread + epsilon)).masked_fill(equal, 0.0)


def grpo_loss(
    new: Float[Tensor, "rows tokens"], old: Float[Tensor, "rows tokens"], reference: Float[Tensor, "rows tokens"] | None,
    advantages: Float[Tensor, " rows"], mask: Bool[Tensor, "rows tokens"], *, epsilon: float = 0.2, beta: float = 0.04,
) -> tuple[Float[Tensor, " rows"], dict[str, Float[Tensor, " rows"]]]:  # fmt: skip
    """Loss of each completion: the clipped policy gradient and the distance from the reference, in the mean over its tokens.

    Args:
        new: log-probabilities of the tokens by the model that is trained.
        old: by the model that wrote them.
        reference: by the reference; None, and there is no such term.
        advantages: of the completions.
        mask: which tokens are a completion's.
        epsilon: the ratio of new to old counts within 1 - epsilon to 1 + epsilon.
        beta: weight of the distance, an estimate of the Kullback-Leibler divergence that is never negative.

    Returns:
        The losses, and each completion's share of ``clipped`` tokens and ``kl``.
    """
    ratio = (new - old).exp()
    gain = advantages[:, None]
    bounded = ratio.clamp(1 - epsilon, 1 + epsilon)
    tokens = -torch.minimum(ratio * gain, bounded * gain)
    apart = torch.zeros_like(new)
    if reference is not None:
        apart = (reference - new).exp() - (reference - new) - 1
        tokens = tokens + beta * apart

    def mean(values: Tensor) -> Tensor:
        return (values * mask).sum(1) / mask.sum(1).clamp_min(1)

    clipped = (ratio * gain > bounded * gain).float()
    return mean(tokens), {"kl": mean(apart.detach()), "clipped": mean(clipped)}


def token_log_probs(
    model: Any, rows: Sequence[tuple[Sequence[int], Sequence[int]]], temperature: float = 1.0
) -> tuple[Float[Tensor, "rows tokens"], Bool[Tensor, "rows tokens"]]:
    """Log-probabilities of the second half of each row behind its first, and which of them are no filling (on the right).

    Args:
        model: a causal language model.
        rows: tokens of a prompt and of a completion, neither of them empty.
        temperature: divides the logits.
    """
    ids, seen = padded([[*prompt, *written] for prompt, written in rows], model.device)
    wanted = torch.zeros_like(seen, dtype=torch.bool)
    for row, (prompt, written) in enumerate(rows):
        wanted[row, len(prompt) - 1 : len(prompt) + len(written) - 1] = True
    logits = logits_at(model, {"input_ids": ids, "attention_mask": seen}, wanted) / temperature
    tokens = torch.tensor([token for _, written in rows for token in written], device=ids.device)
    picked = logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
    lengths = [len(written) for _, written in rows]
    filled = pad_sequence(picked.split(lengths), batch_first=True)
    return filled, torch.arange(filled.shape[1], device=ids.device) < torch.tensor(lengths, device=ids.device)[:, None]


@torch.no_grad()
def sample(
    model: Any, prompt: Sequence[int], count: int, max_new_tokens: int, temperature: float, ends: Collection[int], generator: torch.Generator
) -> list[Completion]:
    """Continuations of one prompt, which is read once for all of them.

    Args:
        model: a causal language model.
        prompt: its tokens.
        count: how many continuations.
        max_new_tokens: tokens of each at most.
        temperature: divides the logits before a token is drawn.
        ends: tokens that end a continuation.
        generator: on the CPU; draws are the same on every device.

    Raises:
        UserError: if a logit is no number.
    """
    cache, name = DynamicCache(config=model.config), cache_name(model)
    logits = model(input_ids=torch.tensor([list(prompt)], device=model.device), use_cache=True, logits_to_keep=1, **{name: cache}).logits[:, -1]
    cache.batch_repeat_interleave(count)
    logits = logits.expand(count, -1)
    written: list[list[int]] = [[] for _ in range(count)]
    open_rows = set(range(count))
    for step in range(max_new_tokens):
        if step:
            fed = torch.tensor([[row[-1]] for row in written], device=model.device)
            logits = model(input_ids=fed, use_cache=True, logits_to_keep=1, **{name: cache}).logits[:, -1]
        likely = (logits.float().cpu() / temperature).softmax(-1)
        if not likely.isfinite().all():
            raise UserError("the model's logits are not finite, so nothing can be drawn; load it in bfloat16 or float32, or lower learning_rate")
        drawn = torch.multinomial(likely, 1, generator=generator)[:, 0].tolist()
        for row, token in enumerate(drawn):
            written[row].append(token)  # rows that have ended are fed on, and cut below
        open_rows -= {row for row in open_rows if drawn[row] in ends}
        if not open_rows:
            break
    cut = [next((place + 1 for place, token in enumerate(row) if token in ends), len(row)) for row in written]
    return [Completion(row[:end], row[end - 1] in ends) for row, end in zip(written, cut, strict=True)]
