"""Likelihood under a language model, and the model's own opinion of a text."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from echelon.models import LoadedModel, load
from echelon.models.batching import cache_name, padded
from echelon.registry import method
from echelon.score.base import ScoreItem, Scorer, by_prefix


@method(
    kind="scorer", title="Language-model likelihood (baseline of RankGen; length_penalty as in BRIO)", arxiv="2205.09726", year=2022,
    summary="Log-probability of a text given its prefix under a causal language model.", needs="a causal language model",
    name="likelihood",
)  # fmt: skip
@dataclass(frozen=True)
class LogLikelihood(Scorer):
    """``log p(text | prefix)``, as a sum, a mean, a length-penalised sum, or less the unconditional one (PMI).

    Text is tokenised on its own and put behind the prefix's tokens, so its tokens do not depend on the prefix. Where the item brings
    its token ids and the model wrote them itself, these are used.

    Attributes:
        model: a loaded model, or a name for `echelon.models.load`.
        reduce: `mean` over tokens, `sum`, `pmi` (sum minus the sum without the prefix), or `length` (sum / tokens^length_penalty).
        length_penalty: exponent for `length`, at least 0.
        batch_tokens: tokens a forward, padding included.

    Raises:
        ValueError: if a knob is out of range.
    """

    model: Any = "embedded"
    reduce: Literal["mean", "sum", "pmi", "length"] = "mean"
    length_penalty: float = 1.0
    batch_tokens: int = 8192

    score_kind = "loglik"
    cost = 2.0

    def __post_init__(self) -> None:
        if self.reduce not in ("mean", "sum", "pmi", "length"):
            raise ValueError(f"reduce is {self.reduce!r}; it must be mean, sum, pmi or length")
        if not 0 <= self.length_penalty < math.inf:
            raise ValueError(f"length_penalty is {self.length_penalty!r}; it must be in [0, inf)")
        if self.batch_tokens < 1:
            raise ValueError(f"batch_tokens is {self.batch_tokens!r}; it must be at least 1")

    @cached_property
    def loaded(self) -> LoadedModel:
        return load(self.model) if isinstance(self.model, str) else self.model

    def score(self, items: Sequence[ScoreItem]) -> Float[Tensor, " items"]:
        tokenizer = self.loaded.tokenizer
        heads = {prefix: self._head(prefix) for prefix in by_prefix(items)}
        texts = [list(tokenizer(item.text, add_special_tokens=False).input_ids) for item in items]
        sums = self._sums([(heads[item.prefix], text) for item, text in zip(items, texts, strict=True)])
        lengths = torch.tensor([max(1, len(text)) for text in texts], dtype=torch.float64)
        if self.reduce == "mean":
            sums = sums / lengths
        elif self.reduce == "length":
            sums = sums / lengths**self.length_penalty
        elif self.reduce == "pmi":
            sums = sums - self._sums([(self._head(""), text) for text in texts])
        return sums.float()

    def _head(self, prefix: str) -> list[int]:
        tokenizer = self.loaded.tokenizer
        ids = list(tokenizer(prefix).input_ids)
        if not ids:
            start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
            ids = [] if start is None else [start]
        if not ids:
            raise ValueError("an empty prefix needs a tokenizer with a token to begin a text with")
        return ids

    def _sums(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Float[Tensor, " pairs"]:
        """Summed log-probability of each text; a prefix that several texts share is forwarded once."""
        limit = getattr(self.loaded.model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
        groups: dict[tuple[int, ...], list[int]] = {}
        # Too long a pair loses the beginning of its prefix, and only then the end of its text.
        texts = [text[: limit - 1] for _, text in pairs]
        for i, (head, _) in enumerate(pairs):
            groups.setdefault(tuple(head[-max(1, limit - len(texts[i])) :]), []).append(i)
        made = torch.zeros(len(pairs), dtype=torch.float64)
        alone = [(list(head), index[0]) for head, index in groups.items() if len(index) == 1]
        for batch in self._batches(alone, [len(head) + len(texts[i]) for head, i in alone]):
            made[[i for _, i in batch]] = self._forward([head for head, _ in batch], [texts[i] for _, i in batch])
        for shared, index in groups.items():
            if len(index) > 1:
                for few in self._batches(index, [len(shared) + len(texts[i]) for i in index]):
                    made[few] = self._forward([list(shared[-1:])] * len(few), [texts[i] for i in few], behind=shared[:-1])
        return made

    def _batches(self, items: Sequence[Any], lengths: Sequence[int]) -> Iterator[list[Any]]:
        """Longest first, as many at a time as ``batch_tokens`` allows."""
        order = sorted(range(len(items)), key=lambda k: -lengths[k])
        while order:
            size = max(1, self.batch_tokens // max(1, lengths[order[0]]))
            yield [items[k] for k in order[:size]]
            order = order[size:]

    @torch.inference_mode()
    def _forward(self, heads: list[list[int]], texts: list[list[int]], behind: Sequence[int] = ()) -> Float[Tensor, " texts"]:
        """Log-probability of each text behind its head; ``behind`` stands before all heads."""
        model = self.loaded.model
        ids, seen = padded([head + text for head, text in zip(heads, texts, strict=True)], model.device)
        arguments: dict[str, Any] = {"use_cache": False}
        if behind:
            cache = model(input_ids=torch.tensor([list(behind)], device=model.device), use_cache=True).past_key_values
            cache.batch_repeat_interleave(len(texts))
            seen = torch.cat([seen.new_ones(len(texts), len(behind)), seen], dim=1)
            arguments = {cache_name(model): cache, "use_cache": True}
        logits = model(input_ids=ids, attention_mask=seen, **arguments).logits
        made = torch.zeros(len(texts), dtype=torch.float64)
        for k, (head, text) in enumerate(zip(heads, texts, strict=True)):
            if text:
                scores = logits[k, len(head) - 1 : len(head) - 1 + len(text)].float()
                made[k] = -torch.nn.functional.cross_entropy(scores, torch.tensor(text, device=scores.device), reduction="sum").double()
        return made


class SelfEval(Scorer):
    """Asks the writing model itself: log-odds of ``yes`` against ``no`` after the text and a question.

    It looks ahead in the decoding session that writes the texts (their keys and values are reused), so items must carry their rows.

    Args:
        question: what is put behind the text.
        yes: the answer whose log-probability counts for the text.
        no: the one that counts against it.
    """

    needs_session = True
    cost = 1.0

    def __init__(self, question: str = "\nIs this text good? Answer:", yes: str = " yes", no: str = " no"):
        self.question, self.yes, self.no = question, yes, no
        self.session: Any = None

    def attach(self, session: Any) -> None:
        self.session = session

    def score(self, items: Sequence[ScoreItem]) -> Float[Tensor, " items"]:
        if not items:
            return torch.zeros(0)
        if self.session is None or any(item.row is None for item in items):
            raise ValueError("SelfEval needs the session that wrote the texts; use it inside a search, or call attach() and give rows")
        encode = self.session.tokenizer
        question, yes, no = (list(encode(text, add_special_tokens=False).input_ids) for text in (self.question, self.yes, self.no))
        if not yes or not no or yes[0] == no[0]:
            raise ValueError(f"yes ({self.yes!r}) and no ({self.no!r}) must begin with different tokens")
        logits = self.session.peek([question] * self.session.rows).log_softmax(-1)
        odds = logits[:, yes[0]] - logits[:, no[0]]
        return odds[[item.row for item in items]].float().cpu()
