"""Training a model to rank a whole list at once: complete labels from any teacher, and a loss that cares more about the top.

Source: "Sliding Windows Are Not the End: Exploring Full Ranking with Long-Context Large Language Models", arXiv 2412.14574.
Differs from its code: a label ends with the token for the end; what separates two ranks is found by its characters, so that any tokenizer will do; labels
come from passes over what is left, at 45 calls for 100 passages in place of 81.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from peft import PeftConfig

from echelon.data.documents import Doc
from echelon.errors import UserError
from echelon.linalg.checks import one_of
from echelon.llm.local import LocalEngine
from echelon.llm.permutation import ranking_text
from echelon.llm.templates import Template, load_template
from echelon.rerank.base import Judge, Request, Reranker
from echelon.rerank.executor import execute
from echelon.rerank.strategies.listwise import SettlingPasses
from echelon.rerank.training.answers import IGNORED, Row, answer_row, fit_answers, training_text

RECIPE = {
    "learning_rate": 5e-6, "lr_scheduler_type": "cosine", "warmup_steps": 50, "num_train_epochs": 4, "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 32, "neftune_noise_alpha": 5.0, "gradient_checkpointing": True,
}  # fmt: skip


@dataclass(frozen=True)
class LabelledList:
    """A query, its documents as the first stage ranked them, and their places in the order in which they should stand.

    Raises:
        UserError: if the order is no permutation of the documents' places.
    """

    query: str
    docs: tuple[Doc, ...]
    order: tuple[int, ...]

    def __post_init__(self) -> None:
        if sorted(self.order) != list(range(len(self.docs))):
            raise UserError(f"the order of the {len(self.docs)} documents of query {self.query!r} is no permutation of their places: {self.order}")


def label_lists(teacher: Judge | Reranker, requests: Sequence[Request], *, window_size: int = 20, stride: int = 10) -> list[LabelledList]:
    """Complete orders from a teacher.

    Args:
        teacher: a reranker, whose ranking is the label; or a judge of lists, which is asked in passes of windows, each over the documents that the ones before
            left: with m = (n - window_size) / stride + 1 passes, m (m + 1) / 2 calls for n documents.
        requests: queries and candidates, best first.
        window_size: documents of a window, for a judge.
        stride: how far a window is in front of the one before.
    """
    if isinstance(teacher, Reranker):
        found = teacher.rerank(requests, depth=max([1, *(len(request.docs) for request in requests)])).rankings
        rankings = [found[request.qid] for request in requests]
    else:
        rankings = execute(teacher, SettlingPasses(window_size, stride), requests)[0]
    return [LabelledList(request.query, request.docs, ranking.order) for request, ranking in zip(requests, rankings, strict=True)]


def importance_weights(label: str, spans: Sequence[tuple[int, int]], separator: str = ">") -> list[float]:
    """A weight for each token of a label such as ``[3] > [1] > [2]``: 1 + 1 / log2(rank + 1) for what names a passage, 1 for what separates two.

    The rank grows by 1 behind each separator, whatever the identifiers look like. A token over several of them counts for the first that it names.

    Args:
        label: the label.
        spans: first and last-plus-one character of each token.
        separator: one character.
    """
    rank, ranks = 1, list[int]()
    for char in label:
        ranks.append(0 if char == separator or char.isspace() else rank)
        rank += char == separator
    named = (next((rank for rank in ranks[start:end] if rank), 0) for start, end in spans)
    return [1 + 1 / math.log2(rank + 1) if rank else 1.0 for rank in named]


def listwise_rows(
    engine: LocalEngine, lists: Sequence[LabelledList], *, template: str | Template = "rankllm", loss_weighting: Literal["importance", "none"] = "importance",
    max_passage_tokens: int = 100,
) -> list[Row]:  # fmt: skip
    """Prompts with their labels as rows to train on.

    Args:
        engine: a local model, for its tokenizer and chat template.
        lists: the data. Lists of one document teach nothing and are left out.
        template: of kind ``list``.
        loss_weighting: `importance`, or `none` for the plain loss.
        max_passage_tokens: tokens kept of a passage.

    Raises:
        UserError: if the template is of another kind, or a prompt and its label exceed the model's context.
    """
    one_of("loss_weighting", loss_weighting, ("importance", "none"))
    form = load_template(template)
    if form.kind != "list":
        raise UserError(f"template {form.name!r} asks a {form.kind} question; training on lists needs one of kind list")
    rows = []
    for labelled in lists:
        if len(labelled.docs) < 2:
            continue
        label = ranking_text(labelled.order, form.identifiers)
        room = engine.count_tokens(label) + 2
        prompt = form.render(engine, labelled.query, labelled.docs, max_passage_tokens=max_passage_tokens, max_new_tokens=room)
        weigh = importance_weights if loss_weighting == "importance" else None
        rows.append(answer_row(engine.tokenizer, training_text(engine, prompt), label, weigh, engine.context_length))
    return rows


def train_listwise(
    engine: LocalEngine, lists: Sequence[LabelledList], out: str | os.PathLike[str], *, template: str | Template = "rankllm",
    loss_weighting: Literal["importance", "none"] = "importance", max_passage_tokens: int = 100, adapter: PeftConfig | None = None, seed: int = 42,
    **arguments: Any,
) -> dict[str, Any]:  # fmt: skip
    """Fine-tune a model, or an adapter on it, to rank whole lists; ``out`` is then a folder that every reranker takes for a model.

    Args:
        engine: the model to train, in place.
        lists: the data (see :func:`label_lists`).
        out: folder for the result.
        template: of the prompts; rank with the same.
        loss_weighting: `importance` or `none`.
        max_passage_tokens: tokens kept of a passage.
        adapter: PEFT's config of an adapter that alone is trained.
        seed: of order, dropout and noise.
        arguments: transformers' ``TrainingArguments``, in place of the paper's recipe (:data:`RECIPE`: four epochs in batches of 32, with NEFTune).

    Returns:
        As :func:`~echelon.rerank.training.answers.fit_answers`, with ``tokens_per_passage``: times the loss it is the loss of a passage, which compares between
        tokenizers that cut numbers in different ways.

    Raises:
        UserError: as :func:`listwise_rows` and :func:`~echelon.rerank.training.answers.fit_answers` do.
    """
    rows = listwise_rows(engine, lists, template=template, loss_weighting=loss_weighting, max_passage_tokens=max_passage_tokens)
    passages = sum(len(labelled.docs) for labelled in lists if len(labelled.docs) > 1)
    tokens = sum(label != IGNORED for row in rows for label in row["labels"])
    beside = {"tokens_per_passage": tokens / max(1, passages)}
    return fit_answers(engine.network, engine.tokenizer, rows, out, adapter=adapter, seed=seed, beside=beside, **{**RECIPE, **arguments})
