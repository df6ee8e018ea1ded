"""Models that read context and text together: cross-encoders and reward models."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from echelon.score.base import ScoreItem, Scorer


class CrossEncoderScorer(Scorer):
    """A sentence-transformers ``CrossEncoder`` (or anything with its ``predict``) on pairs of prefix and text."""

    cost = 4.0

    def __init__(self, model: Any, batch_size: int = 32):
        self.model, self.batch_size = model, batch_size

    def score(self, items: Sequence[ScoreItem]) -> Float[Tensor, " items"]:
        if not items:
            return torch.zeros(0)
        pairs = [(item.prefix, item.text) for item in items]
        return torch.as_tensor(self.model.predict(pairs, batch_size=self.batch_size, show_progress_bar=False), dtype=torch.float32)


class RewardModel(Scorer):
    """A sequence-classification model with one output, on prefix and text as a pair, or as one text with a chat template.

    Args:
        model: an ``AutoModelForSequenceClassification`` with ``num_labels=1``.
        tokenizer: its tokenizer.
        chat: render prefix and text as a user's and an assistant's turn with the tokenizer's template.
        batch_size: texts a forward.

    Raises:
        ValueError: if the model has more than one output.
    """

    cost = 4.0

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, chat: bool = False, batch_size: int = 16):
        if model.config.num_labels != 1:
            raise ValueError(f"the model has {model.config.num_labels} outputs; a reward model has 1")
        self.model, self.tokenizer, self.chat, self.batch_size = model.eval(), tokenizer, chat, batch_size
        if tokenizer.pad_token_id is not None and model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id

    def score(self, items: Sequence[ScoreItem]) -> Float[Tensor, " items"]:
        made = torch.zeros(len(items))
        order = sorted(range(len(items)), key=lambda i: len(items[i].prefix) + len(items[i].text))
        for start in range(0, len(order), self.batch_size):
            index = order[start : start + self.batch_size]
            with torch.no_grad():
                logits = self.model(**self._encode([items[i] for i in index]).to(self.model.device)).logits
            made[index] = logits[:, 0].float().cpu()
        return made

    def _encode(self, items: Sequence[ScoreItem]):
        settings: dict[str, Any] = {"padding": True, "padding_side": "right", "truncation": True, "return_tensors": "pt"}
        settings["max_length"] = min(self.tokenizer.model_max_length, getattr(self.model.config, "max_position_embeddings", 1 << 30))
        if self.chat:
            turns = [[{"role": "user", "content": item.prefix}, {"role": "assistant", "content": item.text}] for item in items]
            rendered = [str(self.tokenizer.apply_chat_template(turn, tokenize=False)) for turn in turns]
            return self.tokenizer(rendered, add_special_tokens=False, **settings)
        return self.tokenizer([item.prefix for item in items], [item.text for item in items], **settings)
