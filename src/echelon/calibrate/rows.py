"""Data as rows of tokens to train on, in batches of a new order each time round."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from echelon.calibrate.tokens import calibration_batches

ALL = 10**9
"""Rows that are asked for where all are wanted."""
Row = dict[str, Tensor]


def row_length(model: Any, seqlen: int) -> int:
    """Tokens a row, at most what the model takes."""
    return min(seqlen, getattr(model.config.get_text_config(), "max_position_embeddings", None) or seqlen)


def rows_of(batches: Sequence[Row]) -> list[Row]:
    """Batches taken apart."""
    return [{key: value[place] for key, value in batch.items()} for batch in batches for place in range(len(next(iter(batch.values()))))]


def training_rows(data: Any, tokenizer: Any, seqlen: int) -> list[Row]:
    """All of the data as rows of tokens; anything that :func:`echelon.calibrate.calibration_batches` takes."""
    return rows_of(calibration_batches(data, tokenizer, nsamples=ALL, seqlen=seqlen, batch_size=1).batches)


def shuffled(rows: Sequence[Row], size: int, seed: int) -> Iterator[list[Row]]:
    """Batches without end, in a new order each time round."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for places in torch.randperm(len(rows), generator=generator).split(size):
            yield [rows[int(place)] for place in places]


def filled_up(rows: Sequence[Row]) -> Row:
    """One batch, with zeros on the right of what is shorter."""
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    return {
        key: torch.stack(values) if len({value.shape for value in values}) == 1 else nn.utils.rnn.pad_sequence(values, batch_first=True)
        for key, values in columns.items()
    }
