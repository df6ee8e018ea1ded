"""What is to be forgotten and what is to stay, as rows of tokens, and the two in pairs."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from echelon.data.files import read_texts
from echelon.data.question_answers import TEMPLATE, prompt_and_text, read_question_answers
from echelon.edit.losses import IGNORED
from echelon.errors import UserError
from echelon.linalg.bases import seed_of, uniform
from echelon.models.batching import padded

Row = dict[str, list[int]]
Batch = dict[str, Tensor]


def unlearning_rows(
    data: Any, tokenizer: PreTrainedTokenizerBase | None = None, *, template: str = TEMPLATE, max_length: int = 500, name: str = "data"
) -> list[Row]:  # fmt: skip
    """Tokens and labels of every text. Questions do not count; answers do, with the token that ends them.

    Args:
        data: a .jsonl with a `question` and an `answer`, or a `text`, in each line; or such rows, strings, or rows with `input_ids` and maybe `labels`.
        tokenizer: for texts.
        template: puts question and answer together; ends with the answer.
        max_length: tokens of a row; what is longer loses its end.
        name: what the data are called in errors.

    Raises:
        ValueError: if texts come without a tokenizer, a row is of neither form, or no token is left that counts.
        UserError: if a file cannot be read.
    """
    rows = [_cut(_tokens(row, tokenizer, template, name), max_length) for row in _given(data)]
    if not any(label != IGNORED for row in rows for label in row["labels"][1:]):
        raise ValueError(f"{name} has {len(rows)} row(s) and no token that counts; give at least one text")
    return rows


def collated(rows: Sequence[Row], device: torch.device | str = "cpu") -> Batch:
    """Rows filled up on the right."""
    ids, mask = padded([row["input_ids"] for row in rows], device)
    return {"input_ids": ids, "attention_mask": mask, "labels": padded([row["labels"] for row in rows], device, IGNORED)[0]}


class PairedRows(Dataset[dict[str, Row]]):
    """Each row to forget once an epoch, in a new order, with a row to retain that is drawn for it from all of them.

    Order and draws depend on seed and epoch alone; HF Trainer calls :meth:`set_epoch`.

    Args:
        forget: rows to forget.
        retain: rows to retain.
        seed: at least 0.
    """

    def __init__(self, forget: Sequence[Row], retain: Sequence[Row], seed: int = 0):
        self.forget, self.retain, self.seed = forget, retain, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        generator = torch.Generator().manual_seed(seed_of(self.seed, "order", epoch))
        self.order = torch.randperm(len(self.forget), generator=generator).tolist()

    def __len__(self) -> int:
        return len(self.forget)

    def __getitem__(self, place: int) -> dict[str, Row]:
        drawn = int(uniform(seed_of(self.seed, "retain", self.epoch, place)) * len(self.retain))
        return {"forget": self.forget[self.order[place]], "retain": self.retain[drawn]}


def collated_pairs(pairs: Sequence[Mapping[str, Row]]) -> dict[str, Batch]:
    """A collator for HF Trainer."""
    return {part: collated([pair[part] for pair in pairs]) for part in ("forget", "retain")}


def _given(data: Any) -> Iterable[Any]:
    if not isinstance(data, str | os.PathLike):
        return data
    try:
        return [{"question": row.question, "answer": row.answer} for row in read_question_answers(data)]
    except UserError as error:
        try:
            return read_texts(data)
        except UserError:
            raise error from None


def _tokens(row: Any, tokenizer: PreTrainedTokenizerBase | None, template: str, name: str) -> Row:
    if isinstance(row, Mapping) and "input_ids" in row:
        ids = torch.as_tensor(row["input_ids"]).tolist()
        return {"input_ids": ids, "labels": torch.as_tensor(row["labels"]).tolist() if "labels" in row else list(ids)}
    if isinstance(row, Mapping) and "question" in row and "answer" in row:
        prompt, text = prompt_and_text(str(row["question"]), str(row["answer"]), template)
    elif isinstance(row, str) or (isinstance(row, Mapping) and "text" in row):
        prompt, text = "", row if isinstance(row, str) else str(row["text"])
    else:
        held = ", ".join(row) if isinstance(row, Mapping) else type(row).__name__
        raise ValueError(f"{name} has a row with {held}; it must have question and answer, text, or input_ids")
    if tokenizer is None:
        raise ValueError(f"{name} holds texts; give the tokenizer of the model")
    head = list(tokenizer(prompt).input_ids) if prompt else []
    if not head and tokenizer.bos_token_id is not None:
        head = [tokenizer.bos_token_id]
    tail = list(tokenizer(text, add_special_tokens=False).input_ids)
    if tokenizer.eos_token_id is not None:
        tail.append(tokenizer.eos_token_id)
    return {"input_ids": head + tail, "labels": [IGNORED] * len(head) + tail}


def _cut(row: Row, length: int) -> Row:
    return {key: value[:length] for key, value in row.items()}
