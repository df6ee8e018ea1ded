"""Calibration data: what the model is shown, with the count of its tokens and where they came from."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from echelon.data.rankgen_pairs import read_documents
from echelon.errors import UserError


@dataclass(frozen=True)
class Calibration:
    """Batches of model inputs.

    Attributes:
        batches: keyword arguments of the model's forward; ``attention_mask`` tells tokens from pads.
        tokens: how many tokens there are, without pads (positions or patches where the inputs are no text).
        source: where they come from, for the report.
    """

    batches: list[dict[str, Tensor]]
    tokens: int
    source: str


def calibration_batches(
    data: Any, tokenizer: PreTrainedTokenizerBase | None = None, *, nsamples: int = 128, seqlen: int = 2048,
    packing: Literal["packed", "padded"] = "packed", batch_size: int = 8, seed: int = 0,
) -> Calibration:  # fmt: skip
    """Batches from a path, texts, token ids or ready model inputs.

    Args:
        data: a .jsonl, a .txt or a folder of these; a list of texts; a list of token id lists or a tensor of ids; a list of model
            inputs (taken as they are); a dataset with a ``text`` column; or a `Calibration`, returned unchanged.
        tokenizer: for texts.
        nsamples: rows at most.
        seqlen: tokens a row at most.
        packing: ``packed`` joins the texts by blank lines and cuts rows without pads; ``padded`` makes a row of each text.
        batch_size: rows a batch.
        seed: of the choice of rows where there are more than ``nsamples``.

    Raises:
        ValueError: if an argument is out of range, or text comes without a tokenizer.
        UserError: if there is no token.
    """
    if isinstance(data, Calibration):
        return data
    for name, value in (("nsamples", nsamples), ("seqlen", seqlen), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value!r}; it must be at least 1")
    if packing not in ("packed", "padded"):
        raise ValueError(f"packing is {packing!r}; it must be packed or padded")
    source = str(data) if isinstance(data, (str, os.PathLike)) else f"{len(data)} {type(data).__name__} items"
    items: Sequence[Any] = list(read_documents(os.fspath(data)).values()) if isinstance(data, (str, os.PathLike)) else data
    if hasattr(items, "column_names"):
        items = list(items["text"])  # type: ignore[call-overload]
    if not len(items):
        raise UserError("calibration data is empty; give at least one text")
    if isinstance(items[0], Mapping):
        inputs = [{name: torch.as_tensor(value) for name, value in batch.items()} for batch in items]
        return Calibration(inputs, sum(positions(batch) for batch in inputs), source)
    rows = _rows(items, tokenizer, seqlen, packing)
    if not sum(map(len, rows)):
        raise UserError(f"calibration data ({source}) holds no token; give more text")
    if len(rows) > nsamples:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:nsamples].sort().values
        rows = [rows[i] for i in order]
    batches = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        width = max(map(len, batch))
        batches.append({
            "input_ids": torch.tensor([[*row, *[0] * (width - len(row))] for row in batch]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch]),
        })  # fmt: skip
    return Calibration(batches, sum(map(len, rows)), source)


def _rows(items: Sequence[Any], tokenizer: PreTrainedTokenizerBase | None, seqlen: int, packing: str) -> list[list[int]]:
    if not isinstance(items[0], str):
        return [[int(token) for token in row][:seqlen] for row in items if len(row)]
    if tokenizer is None:
        raise ValueError("calibration texts need a tokenizer")
    if packing == "padded":
        return [row for row in (list(tokenizer(text).input_ids)[:seqlen] for text in items) if row]
    ids: list[int] = list(tokenizer("\n\n".join(items)).input_ids)
    # The rest that does not fill a row is left out, unless it is all there is.
    return [ids[start : start + seqlen] for start in range(0, max(len(ids) - seqlen, 0) + 1, seqlen)]


def positions(batch: Mapping[str, Tensor]) -> int:
    """Tokens of a batch that are no pads, or what else it has: images."""
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    if "input_ids" in batch:
        return batch["input_ids"].numel()
    return len(next(iter(batch.values())))
