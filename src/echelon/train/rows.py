"""Texts as rows of tokens for language-model training, the order in which they are read, and the loss on held-out ones."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Int
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from echelon.errors import UserError
from echelon.train.optimizers.base import processes


@dataclass(frozen=True)
class Rows:
    """Rows of one length, with pads on the right where documents are shorter.

    Attributes:
        ids: the tokens.
        mask: what is no pad; None where there are none.
        text_tokens: tokens of the whole text, also those that fill no row.
        text_bytes: its length in UTF-8.
    """

    ids: Int[Tensor, "rows seqlen"]
    mask: Bool[Tensor, "rows seqlen"] | None
    text_tokens: int
    text_bytes: int

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, places: Any) -> dict[str, Tensor]:
        """Model inputs of some rows; labels are -100 on pads."""
        ids = self.ids[places].long()
        if self.mask is None:
            return {"input_ids": ids, "labels": ids.clone()}
        mask = self.mask[places]
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}

    def first(self, tokens: int) -> "Rows":
        """As many whole rows as hold at most so many tokens, at least one."""
        count = max(1, tokens // self.ids.shape[1])
        if self.mask is not None:
            count = max(1, int((self.mask.sum(1).cumsum(0) <= tokens).sum()))
        return Rows(self.ids[:count], None if self.mask is None else self.mask[:count], self.text_tokens, self.text_bytes)


def packed_rows(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, seqlen: int) -> Rows:
    """Documents joined with the end-of-text token between them and cut into rows; the last row is dropped where it is not full.

    Args:
        texts: documents.
        tokenizer: its other special tokens are left out.
        seqlen: tokens a row.

    Raises:
        UserError: if there are fewer tokens than one row takes, or there are several documents and no end-of-text token.
    """
    end = tokenizer.eos_token_id
    if end is None and len(texts) > 1:
        raise UserError("the tokenizer has no end-of-text token to put between documents; set its eos_token, or train on one document a row (pack=False)")
    ids: list[int] = []
    for number, text in enumerate(texts):
        ids += ([end] if number else []) + list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    if len(ids) < seqlen:
        raise UserError(f"the data has {len(ids)} tokens; one row takes {seqlen} (seqlen): give more text, or a smaller seqlen")
    whole = len(ids) // seqlen * seqlen
    return Rows(torch.tensor(ids[:whole], dtype=torch.int32).view(-1, seqlen), None, len(ids), sum(len(text.encode()) for text in texts))


def document_rows(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, seqlen: int) -> Rows:
    """One document a row, truncated or padded, as papers on memory-efficient pre-training do it; documents without two tokens are left out.

    Raises:
        UserError: if no document has two tokens.
    """
    found = [list(tokenizer(text, verbose=False).input_ids) for text in texts]
    kept = [ids[:seqlen] for ids in found if len(ids) > 1]
    if not kept:
        raise UserError(f"none of the {len(texts)} documents has two tokens; give more text")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    ids = torch.tensor([row + [pad] * (seqlen - len(row)) for row in kept], dtype=torch.int32)
    mask = torch.arange(seqlen) < torch.tensor([len(row) for row in kept])[:, None]
    return Rows(ids, mask, sum(map(len, found)), sum(len(text.encode()) for text in texts))


class Reading(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows one after the other as training reads them: a new order each time through, all drawn at once from the seed.

    Args:
        rows: what is read.
        count: rows in all.
        seed: of the orders.
    """

    def __init__(self, rows: Rows, count: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.rows = rows
        self.places = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(math.ceil(count / len(rows)))])[:count]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return self.rows.batch(self.places[number])

    def tokens(self, count: int | None = None) -> int:
        """Tokens that are read, or those of the first ``count`` rows, without pads."""
        places = self.places[:count]
        return places.numel() * self.rows.ids.shape[1] if self.rows.mask is None else int(self.rows.mask.sum(1)[places].sum())

    def digest(self) -> str:
        """SHA-256 over the token ids in the order they are read (int32, pads included): equal for runs that saw the same batches."""
        made = hashlib.sha256()
        for places in self.places.split(4096):
            made.update(self.rows.ids[places].numpy().astype("<i4").tobytes())
        return made.hexdigest()


@dataclass(frozen=True)
class HeldOutLoss:
    """Cross-entropy on held-out rows, in natural logarithms.

    Attributes:
        total: sum over all tokens.
        tokens: how many were predicted.
        batch_means: sum of the batches' means.
        batches: how many batches.
        tokens_per_byte: of the text.
    """

    total: float
    tokens: int
    batch_means: float
    batches: int
    tokens_per_byte: float

    @property
    def loss(self) -> float:
        """Mean over tokens."""
        return self.total / self.tokens

    @property
    def legacy(self) -> float:
        """As GaLore, ReLoRA and what was derived from their code report it: the sum of batch means over one more than the number of batches."""
        return self.batch_means / (self.batches + 1)

    def perplexity(self) -> float:
        """Per token."""
        return math.exp(min(self.loss, 700.0))

    def byte_perplexity(self) -> float:
        """Per byte of UTF-8: comparable between tokenizers. Rows' first tokens, which nothing predicts, count as costly as the others."""
        return math.exp(min(self.loss * self.tokens_per_byte, 700.0))


@torch.no_grad()
def held_out_loss(model: Any, rows: Rows, batch_size: int = 8, bf16: bool = False) -> HeldOutLoss:
    """Read held-out rows; under ``torch.distributed`` every process reads its share of the batches and all get the sums (all of a sharded model).

    Args:
        model: a causal language model; its mode is left as it was.
        rows: what to read.
        batch_size: rows a forward; only ``legacy`` depends on it.
        bf16: forward in bfloat16.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    sharded = any(isinstance(p, DTensor) for p in model.parameters())  # then all processes compute together
    rank, world = (dist.get_rank(), dist.get_world_size()) if processes() > 1 and not sharded else (0, 1)
    try:
        for places in list(torch.arange(len(rows)).split(batch_size))[rank::world]:
            batch = {name: value.to(device) for name, value in rows.batch(places).items()}
            labels = batch.pop("labels")[:, 1:]
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits = model(**batch, use_cache=False).logits[:, :-1]
            losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none", ignore_index=-100)
            total, count = losses.double().sum().item(), int((labels != -100).sum())
            sums += torch.tensor([total, count, total / count, 1], dtype=torch.float64)
    finally:
        model.train(training)
    if world > 1:
        sums = sums.to(device)
        dist.all_reduce(sums)
    total, count, means, batches = sums.tolist()
    return HeldOutLoss(total, int(count), means, int(batches), rows.text_tokens / max(1, rows.text_bytes))
