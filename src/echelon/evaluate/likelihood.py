"""What a language model thinks of texts: log-probabilities of their tokens, perplexity, coherence, greedy ratio."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from echelon.models import LoadedModel


@dataclass(frozen=True)
class TokenScores:
    """Of one text: the log-probability of each token (natural log), and whether it was the model's first choice."""

    log_probabilities: np.ndarray
    greedy: np.ndarray
    bytes: int

    @property
    def mean(self) -> float:
        """Mean log-probability; minus infinity for a text without tokens."""
        return float(self.log_probabilities.mean()) if len(self.log_probabilities) else -math.inf


def token_scores(
    model: LoadedModel, texts: Sequence[str], prefixes: Sequence[str] | None = None, *, stride: int | None = None, batch_tokens: int = 8192
) -> list[TokenScores]:
    """Score every token of each text, given its prefix (which is not scored) and the text before it.

    Args:
        model: a causal language model.
        texts: what is scored.
        prefixes: what stands before each; without, texts begin after the model's own first token where it has one, and otherwise
            their first token is not scored.
        stride: texts longer than the model's context are scored in windows that move on by this many tokens (half the context when
            not given), so every token has at least context - stride tokens before it.
        batch_tokens: tokens a forward, padding included.

    Raises:
        ValueError: if there is not one prefix a text, or the stride is not in [1, context - 1].
    """
    if prefixes is not None and len(prefixes) != len(texts):
        raise ValueError(f"prefixes has {len(prefixes)} entries for {len(texts)} texts")
    tokenizer = model.tokenizer
    limit = getattr(model.model.config.get_text_config(), "max_position_embeddings", None) or 2048
    step = limit // 2 if stride is None else stride
    if not 1 <= step < limit:
        raise ValueError(f"stride is {stride!r}; it must be in [1, {limit - 1}]")
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    windows: list[tuple[int, list[int], int]] = []  # text, ids, how many at the end are scored
    for number, text in enumerate(texts):
        own = list(tokenizer(text, add_special_tokens=False).input_ids)
        head = begin if prefixes is None else begin + list(tokenizer(prefixes[number], add_special_tokens=False).input_ids)
        ids, end = head + own, max(len(head), 1)  # all before `end` is scored, or need not be
        while end < len(ids):
            take = min(len(ids) - end, limit - end if end < limit else step)
            end += take
            windows.append((number, ids[max(0, end - limit) : end], take))
    found: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in texts]
    order = sorted(range(len(windows)), key=lambda i: -len(windows[i][1]))
    made: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    while order:
        size = max(1, batch_tokens // len(windows[order[0]][1]))
        index, order = order[:size], order[size:]
        made |= dict(zip(index, _score([windows[i][1:] for i in index], model), strict=True))
    for i, (number, _, _) in enumerate(windows):
        found[number].append(made[i])
    nothing = [(np.zeros(0), np.zeros(0, dtype=bool))]
    return [
        TokenScores(np.concatenate([a for a, _ in pieces or nothing]), np.concatenate([b for _, b in pieces or nothing]), len(text.encode()))
        for pieces, text in zip(found, texts, strict=True)
    ]


def _score(windows: Sequence[tuple[list[int], int]], model: LoadedModel) -> list[tuple[np.ndarray, np.ndarray]]:
    width, device = max(len(ids) for ids, _ in windows), model.model.device
    ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in windows], device=device)
    seen = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row, _ in windows], device=device)
    with torch.no_grad():
        logits = model.model(input_ids=ids, attention_mask=seen, use_cache=False).logits
    made = []
    for k, (row, take) in enumerate(windows):
        targets = torch.tensor(row[-take:], device=device)
        scores = logits[k, len(row) - take - 1 : len(row) - 1].float().log_softmax(-1)
        made.append((scores.gather(1, targets[:, None])[:, 0].double().cpu().numpy(), (scores.argmax(-1) == targets).cpu().numpy()))
    return made


def perplexity(scores: Sequence[TokenScores], per: str = "token") -> float:
    """exp of minus the summed log-probability over all tokens (or bytes); never a mean of perplexities.

    Raises:
        ValueError: if ``per`` is neither, or there is nothing to count.
    """
    if per not in ("token", "byte"):
        raise ValueError(f"per is {per!r}; it must be 'token' or 'byte'")
    count = sum(len(s.log_probabilities) if per == "token" else s.bytes for s in scores)
    if not count:
        raise ValueError("perplexity needs at least one token")
    return math.exp(-sum(s.log_probabilities.sum() for s in scores) / count)
