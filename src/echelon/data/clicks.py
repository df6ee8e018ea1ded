"""Click logs: read from tables of text, turned into ids, or made up.

Criteo's and Avazu's logs may not be passed on, so there is a generator whose ids are as unevenly spread as real ones, and a reader for your own files.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from echelon.data.files import read_text, write_whole
from echelon.errors import UserError

Layout = Literal["auto", "criteo", "generic"]
PAD, UNSEEN = 0, 1  # ids of nothing, and of a value that training did not see (often enough)
SCHEMA = "click_schema.json"
CRITEO_DENSE = tuple(f"I{i}" for i in range(1, 14))
CRITEO_FIELDS = tuple(f"C{i}" for i in range(1, 27))
LABELS = ("label", "click", "clicked")


@dataclass(frozen=True)
class Clicks:
    """A log as tensors.

    Attributes:
        sparse_ids: ids, the slots of all fields side by side.
        dense: plain numbers.
        labels: 1 for a click, else 0.
        source: where it comes from, for reports.

    Raises:
        ValueError: if it has no rows, or its parts are not equally long.
    """

    sparse_ids: Int[Tensor, "rows slots"]
    dense: Float[Tensor, "rows dense"]
    labels: Float[Tensor, " rows"]
    source: str = ""

    def __post_init__(self) -> None:
        if not len(self.labels):
            raise ValueError("the click log is empty; give at least one row")
        if not len(self.sparse_ids) == len(self.dense) == len(self.labels):
            raise ValueError(f"ids, numbers and labels have {len(self.sparse_ids)}, {len(self.dense)} and {len(self.labels)} rows; they must be equally many")

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Int[Tensor, " some"]) -> "Clicks":
        """These rows."""
        return Clicks(self.sparse_ids[rows], self.dense[rows], self.labels[rows], self.source)

    def sample(self, count: int, seed: int = 0) -> "Clicks":
        """So many rows drawn without repetition, in their order; all if there are no more."""
        if count >= len(self):
            return self
        return self.take(torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count].sort().values)

    def split(self, share: float, seed: int = 0) -> tuple["Clicks", "Clicks | None"]:
        """The rest, and this share of the rows, drawn at random; None where it comes to no row."""
        count = min(round(share * len(self)), len(self) - 1)
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.take(order[count:].sort().values), self.take(order[:count].sort().values) if count else None

    def batches(self, size: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu") -> Iterator[dict[str, Tensor]]:
        """Keyword arguments of a click model, in order, or shuffled where there is a generator."""
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        for rows in order.split(size):
            batch = {"sparse_ids": self.sparse_ids[rows], "dense": self.dense[rows], "labels": self.labels[rows]}
            yield {name: value.to(device) for name, value in batch.items()}


@dataclass(frozen=True)
class ClickSchema:
    """How the columns of a table become ids and numbers; it is kept beside the model, as a tokenizer is.

    An empty cell is padding (id 0), a value that was not there in training is id 1. Numbers x become sign(x) log(1 + abs(x)), scaled so that those
    of training lie in [0, 1]; an empty one counts as 0.

    Attributes:
        label: its column.
        dense: columns of numbers.
        fields: columns of ids.
        slots: how many values of each field are kept.
        values: those of each field, in the order of their ids.
        low: smallest number of each dense column, after the logarithm.
        high: largest.
        threshold: a label of at least this is a click; None where labels are 0 and 1.
        separator: between the values of a field that has several.
    """

    label: str
    dense: tuple[str, ...]
    fields: tuple[str, ...]
    slots: tuple[int, ...]
    values: tuple[tuple[str, ...], ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    threshold: float | None = None
    separator: str = "|"

    @property
    def vocab_sizes(self) -> list[int]:
        """Rows of each field's table: its values, and two more."""
        return [len(values) + 2 for values in self.values]

    @classmethod
    def fit(
        cls, table: pd.DataFrame | str | os.PathLike[str], *, layout: Layout = "auto", label: str = "", dense: Sequence[str] = (), several: Sequence[str] = (),
        ignore: Sequence[str] = (), min_count: int = 1, max_slots: int = 8, threshold: float | None = None, separator: str = "|",
    ) -> "ClickSchema":  # fmt: skip
        """Learn the ids of a table.

        Args:
            table: a .csv (or tab-separated, or compressed) file, or what :func:`read_table` made of it.
            layout: ``criteo`` has a label, I1..I13 and C1..C26, with or without a header; in a ``generic`` one every column that is neither the
                label nor named below is a field of ids. ``auto`` looks.
            label: column of the label; by default one named label, click or clicked.
            dense: columns of numbers (generic).
            several: fields that hold several values in a cell (generic).
            ignore: columns to leave out (generic).
            min_count: rarer values have no id of their own.
            max_slots: values kept of a field of ``several``.
            threshold: labels of at least this are clicks.
            separator: between several values.

        Raises:
            UserError: if a column is missing, or there is no row.
        """
        if not isinstance(table, pd.DataFrame):
            table = read_table(table)
        names = list(table.columns)
        if layout == "auto":
            layout = "criteo" if {*CRITEO_DENSE, *CRITEO_FIELDS} <= set(names) else "generic"
        if not label:
            label = next((name for name in LABELS if name in names), LABELS[0])
        if layout == "criteo":
            dense, fields = CRITEO_DENSE, list(CRITEO_FIELDS)
        else:
            fields = [name for name in names if name not in {label, *dense, *ignore}]
        _refuse_missing([label, *dense, *fields, *several, *ignore], names)
        if not fields:
            raise UserError("the click log has no field of ids")
        if not len(table):
            raise UserError("the click log is empty; give at least one row")
        values, slots = [], []
        for name in fields:
            cells = table[name].str.split(separator, regex=False).explode() if name in several else table[name]
            counts = cells[cells != ""].value_counts()
            values.append(tuple(sorted(counts[counts >= min_count].index)))
            slots.append(min(max_slots, int(table[name].str.count(re.escape(separator)).max()) + 1) if name in several else 1)
        numbers = _numbers(table, dense)
        return cls(
            label, tuple(dense), tuple(fields), tuple(slots), tuple(values), tuple(numbers.min(0).tolist()), tuple(numbers.max(0).tolist()), threshold,
            separator,
        )  # fmt: skip

    def read(self, table: pd.DataFrame | str | os.PathLike[str]) -> Clicks:
        """A table as tensors.

        Raises:
            UserError: if a column is missing, a number is none, or a label is neither 0 nor 1.
        """
        source = "a table" if isinstance(table, pd.DataFrame) else os.fspath(table)
        if not isinstance(table, pd.DataFrame):
            table = read_table(table)
        _refuse_missing([self.label, *self.dense, *self.fields], list(table.columns))
        if not len(table):
            raise UserError(f"{source} is empty; give at least one row")
        parts = []
        for name, slots, values in zip(self.fields, self.slots, self.values, strict=True):
            index = {value: number for number, value in enumerate(values, 2)} | {"": PAD}
            if slots == 1:
                parts.append(table[name].map(index).fillna(UNSEEN).to_numpy(np.int64)[:, None])
                continue
            block = np.zeros((len(table), slots), np.int64)
            for row, cell in enumerate(table[name].tolist()):
                for slot, value in enumerate([part for part in cell.split(self.separator) if part][:slots]):
                    block[row, slot] = index.get(value, UNSEEN)
            parts.append(block)
        low, high = np.array(self.low), np.array(self.high)
        dense = (_numbers(table, self.dense) - low) / np.where(high > low, high - low, 1.0)
        labels = pd.to_numeric(table[self.label], errors="coerce").to_numpy(np.float64)
        if self.threshold is not None:
            labels = np.where(np.isnan(labels), np.nan, labels >= self.threshold)
        if not np.isin(labels, (0, 1)).all():
            bad = int(np.flatnonzero(~np.isin(labels, (0, 1)))[0])
            raise UserError(f"{source}, row {bad + 1}: {self.label} is {table[self.label].iloc[bad]!r}; it must be 0 or 1 (or give a threshold)")
        return Clicks(torch.from_numpy(np.concatenate(parts, 1)), torch.from_numpy(dense).float(), torch.from_numpy(labels).float(), source)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write it beside a model."""
        write_whole(Path(folder) / SCHEMA, json.dumps(asdict(self)))

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "ClickSchema":
        """Read what :meth:`save_pretrained` wrote.

        Raises:
            UserError: if it is missing or broken.
        """
        path = Path(folder) / SCHEMA
        try:
            said: dict[str, Any] = json.loads(read_text(path))
            said["values"] = [tuple(values) for values in said["values"]]
            tuples: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in said.items()}
            return cls(**tuples)
        except (ValueError, KeyError, TypeError) as error:
            raise error if isinstance(error, UserError) else UserError(f"cannot read {path}: {error}") from error


def read_table(path: str | os.PathLike[str]) -> pd.DataFrame:
    """A .csv or tab-separated file, possibly compressed, with all cells as text; 40 columns without a header are taken for Criteo's.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        first = pd.read_csv(path, sep="\x00", nrows=1, header=None, dtype=str, quoting=3, engine="python")
        line = str(first.iloc[0, 0])
        mark = "\t" if line.count("\t") > line.count(",") else ","
        cells = line.split(mark)
        bare = len(cells) == 40 and cells[0] in ("0", "1")
        names = ["label", *CRITEO_DENSE, *CRITEO_FIELDS] if bare else None
        return pd.read_csv(path, sep=mark, header=None if bare else 0, names=names, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
        raise UserError(f"cannot read {os.fspath(path)}: {getattr(error, 'strerror', None) or str(error).strip().splitlines()[0]}") from error


def synthetic_log(
    rows: int, fields: int = 8, values: int = 1000, dense: int = 4, *, zipf: float = 1.1, rank: int = 3, noise: float = 0.0, seed: int = 0
) -> tuple[pd.DataFrame, Float[np.ndarray, " rows"]]:
    """A made-up log in the generic layout, columns label, I1.. and C1.., and the true probability of each click.

    The n-th most frequent value of a field is drawn in proportion to n^-zipf. Each value has an effect of its own and a hidden vector; the logit is the
    sum of the effects, of the products of the vectors of all pairs of fields, and of a little from the numbers. About a quarter of the rows are clicks.

    Args:
        rows: how many.
        fields: of ids.
        values: of each field.
        dense: columns of numbers.
        zipf: exponent; 0 is even.
        rank: width of the hidden vectors, which bounds the rank of what can be learnt.
        noise: share of cells that are empty.
        seed: the values' effects depend on it too, so split a log rather than drawing two.
    """
    random = np.random.default_rng(seed)
    frequency = np.arange(1, values + 1) ** -float(zipf)
    ids = random.choice(values, (rows, fields), p=frequency / frequency.sum())
    effects, hidden = random.normal(size=(fields, values)), random.normal(size=(fields, values, rank))
    index = np.arange(fields)
    vectors = hidden[index, ids]
    products = 0.5 * (vectors.sum(1) ** 2 - (vectors**2).sum(1)).sum(1)
    numbers = random.exponential(3.0, (rows, dense))
    logits = effects[index, ids].sum(1) / fields**0.5 + products / (rank * fields * (fields - 1) / 2) ** 0.5
    if dense:
        logits = logits + 0.3 * np.log1p(numbers) @ random.normal(size=dense)
    logits = 1.5 * (logits - np.median(logits)) - 1.2
    chances = 1 / (1 + np.exp(-logits))
    table = pd.DataFrame({"label": (random.random(rows) < chances).astype(int).astype(str)})
    for i in range(dense):
        table[f"I{i + 1}"] = [f"{x:.2f}" for x in numbers[:, i]]
    empty = random.random((rows, fields)) < noise
    for i in range(fields):
        table[f"C{i + 1}"] = np.where(empty[:, i], "", np.char.add("v", ids[:, i].astype(str))).astype(object)
    return table, chances


def _numbers(table: pd.DataFrame, columns: Sequence[str]) -> Float[np.ndarray, "rows dense"]:
    made = np.zeros((len(table), len(columns)))
    for place, name in enumerate(columns):
        cells = pd.to_numeric(table[name].where(table[name] != "", "0"), errors="coerce").to_numpy(np.float64)
        if not np.isfinite(cells).all():
            bad = int(np.flatnonzero(~np.isfinite(cells))[0])
            raise UserError(f"row {bad + 1} of the click log: {name} is {table[name].iloc[bad]!r}; it must be a number or empty")
        made[:, place] = np.sign(cells) * np.log1p(np.abs(cells))
    return made


def _refuse_missing(wanted: Sequence[str], names: Sequence[str]) -> None:
    lacking = [name for name in wanted if name not in names]
    if lacking:
        raise UserError(f"the click log has no column {lacking[0]!r}; it has {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}")
