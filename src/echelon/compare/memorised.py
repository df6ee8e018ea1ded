"""A model that has memorised the fictitious authors of TOFU, ones that never saw those to be forgotten, and the questions: made once, kept in a folder."""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from echelon.adapt.fitting import fit
from echelon.data.files import folder_whole, read_text, write_whole
from echelon.data.question_answers import QuestionAnswer, read_question_answers
from echelon.edit.rows import unlearning_rows
from echelon.errors import UserError
from echelon.evaluate.tofu import TOFU
from echelon.models import load

SHARES = {1: "01", 5: "05", 10: "10"}  # percent that are to be forgotten, and how TOFU names the files
GENERAL = ("real_authors_perturbed.jsonl", "world_facts_perturbed.jsonl")


@dataclass(frozen=True)
class Memorising:
    """What is memorised, and how.

    Attributes:
        model: what it begins with.
        tofu: folder with TOFU's files.
        questions: how many of the 4,000; a hundredth of them must be a whole number.
        epochs: passes over them.
        learning_rate: at the end of the warm-up.
        batch_size: questions a step.
        seed: of their order.
    """

    model: str
    tofu: str
    questions: int = 500
    epochs: int = 10
    learning_rate: float = 2e-3
    batch_size: int = 16
    seed: int = 0

    def folder(self, root: Path) -> Path:
        """Where all of it is, by what it depends on."""
        return root / f"memorised-{hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class Memorised:
    """Folders of models and questions.

    Attributes:
        full: model that has seen every author.
        questions: folder in TOFU's layout, of the size that was asked for.
        retain_only: by percent, the model that never saw what is to be forgotten.
    """

    full: Path
    questions: Path
    retain_only: dict[int, Path]

    def forget(self, percent: int) -> list[dict[str, str]]:
        """Questions and answers that are to be forgotten."""
        return _plain(read_question_answers(self.questions / f"forget{SHARES[percent]}_perturbed.jsonl"))

    def retain(self, percent: int) -> list[dict[str, str]]:
        """All others."""
        gone = {row["question"] for row in self.forget(percent)}
        return [row for row in _plain(read_question_answers(self.questions / "full.jsonl")) if row["question"] not in gone]

    def truth_ratios(self, percent: int, benchmark: TOFU) -> list[float]:
        """Of the model that never saw what is to be forgotten; looked up where they are known."""
        kept = self.retain_only[percent] / f"ratios-{hashlib.sha256(repr(benchmark).encode()).hexdigest()[:12]}.json"
        if not kept.is_file():
            rows = benchmark.read(self.questions)["forget"]
            write_whole(kept, json.dumps(benchmark.truth_ratios(load(str(self.retain_only[percent])), rows).tolist()))
        return json.loads(read_text(kept))


def memorised(how: Memorising, percents: Sequence[int], root: Path) -> Memorised:
    """Make what is not there yet.

    Args:
        how: what is memorised, and how.
        percents: of the questions that will be forgotten: out of 1, 5 and 10.
        root: folder for all of it.

    Raises:
        UserError: if TOFU's files are missing or hold too few questions, or the loss is no number.
    """
    folder = how.folder(root)
    questions = folder / "questions"
    if not questions.is_dir():
        with folder_whole(questions) as aside:
            small_tofu(how.tofu, how.questions, aside)
    made = Memorised(folder / "full", questions, {percent: folder / f"retain{100 - percent}" for percent in percents})
    for place, percent in ((made.full, None), *((made.retain_only[percent], percent) for percent in percents)):
        if not (place / "config.json").is_file():
            data = _plain(read_question_answers(questions / "full.jsonl")) if percent is None else made.retain(percent)
            _memorise(how, data, place)
    return made


def small_tofu(source: str | os.PathLike[str], count: int, out: Path) -> None:
    """A part of TOFU with its proportions: the first questions that stay, and of those to forget the first hundredth within the first twentieth within the
    first tenth, as in the whole.

    Raises:
        UserError: if there are not so many questions.
    """
    rows = {name: _lines(Path(source) / f"{name}.jsonl") for name in ("retain_perturbed", "retain90", *(f"forget{name}_perturbed" for name in SHARES.values()))}
    chosen: list[dict[str, Any]] = []
    for percent, name in SHARES.items():
        known = {row["question"] for row in chosen}
        left = [row for row in rows[f"forget{name}_perturbed"] if row["question"] not in known]
        chosen += left[: count * percent // 100 - len(chosen)]
        _write(out / f"forget{name}_perturbed.jsonl", chosen)
    stays = rows["retain_perturbed"][: count - len(chosen)]
    known = {row["question"] for row in stays}
    others = [row for row in rows["retain90"] if row["question"] not in known][: count - len(chosen) - len(stays)]
    if len(chosen) + len(stays) + len(others) < count:
        raise UserError(f"{source} has {len(chosen) + len(stays) + len(others)} questions of the {count} that are asked for")
    _write(out / "retain_perturbed.jsonl", stays)
    _write(out / "full.jsonl", [*stays, *others, *chosen])
    for name in GENERAL:
        write_whole(out / name, read_text(Path(source) / name))


def _memorise(how: Memorising, data: list[dict[str, str]], place: Path) -> None:
    loaded = load(how.model, torch.float32)
    told = unlearning_rows(data, loaded.tokenizer)
    rows = [{name: torch.tensor(ids) for name, ids in row.items()} | {"attention_mask": torch.ones(len(row["labels"]), dtype=torch.long)} for row in told]
    steps = how.epochs * math.ceil(len(rows) / how.batch_size)
    losses = fit(
        loaded.model, rows, steps=steps, learning_rate=how.learning_rate, batch_size=how.batch_size, micro_batch_size=how.batch_size,
        warmup=max(1, steps // 20), seed=how.seed,
    )  # fmt: skip
    with folder_whole(place) as aside:
        loaded.model.save_pretrained(aside)
        loaded.tokenizer.save_pretrained(aside)
        write_whole(aside / "losses.json", json.dumps(losses))


def _plain(rows: Sequence[QuestionAnswer]) -> list[dict[str, str]]:
    return [{"question": row.question, "answer": row.answer} for row in rows]


def _lines(path: Path) -> list[dict[str, Any]]:
    read_question_answers(path)  # says what is wrong with a file
    return [json.loads(line) for line in read_text(path).split("\n") if line.strip()]


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
