"""Training the setwise reranker Rank-R1: by reward alone (GRPO), or on given answers as its baseline.

Source: "Rank-R1: Enhancing Reasoning in LLM-based Document Rerankers via Reinforcement Learning", arXiv 2503.06034.
Differs from its code: plain torch and PEFT in place of TRL and vLLM; documents are cut, never the prompt; everything drawn comes from a seed and the query.
"""

import os
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, PeftConfig

from echelon.data.documents import Doc
from echelon.errors import UserError
from echelon.linalg.bases import seed_of
from echelon.linalg.checks import whole
from echelon.llm.base import Prompt
from echelon.llm.local import LocalEngine
from echelon.llm.permutation import identifier
from echelon.llm.templates import Template, load_template
from echelon.rerank.training.answers import answer_row, fit_answers, training_text
from echelon.rerank.training.grpo import GRPO

RECIPE = {"learning_rate": 1e-5, "num_train_epochs": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 8}


@dataclass(frozen=True)
class SetwiseExample:
    """A query, documents in the order in which they are shown, and the place of the one that is relevant."""

    query: str
    docs: tuple[Doc, ...]
    answer: int


def setwise_examples(
    rows: Iterable[Mapping[str, Any]], *, num_negatives: int = 19, vary: bool = False, seed: int = 0
) -> list[SetwiseExample]:  # fmt: skip
    """Sets of one relevant document and hard negatives, shuffled.

    Args:
        rows: in Tevatron's form: ``query``, ``positive_passages`` and ``negative_passages``, each a list of ``docid``, ``title`` and ``text``.
        num_negatives: negatives of a set, drawn at random; all of them where there are fewer.
        vary: of the negatives drawn keep n with a probability that grows like n (the recipe v0.2, which draws 9), so that sets of any size are seen.
        seed: of what is drawn, which depends on it and on the row's place.

    Raises:
        UserError: if a row lacks a key, or has no relevant document, or no negative one.
    """
    whole("num_negatives", num_negatives, 1)
    made = []
    for number, row in enumerate(rows):
        try:
            query = str(row["query"])
            good, bad = ([_doc(passage) for passage in row[name]] for name in ("positive_passages", "negative_passages"))
        except (KeyError, TypeError) as error:
            raise UserError(f"row {number + 1} is not in Tevatron's form (query, positive_passages, negative_passages with docid and text): {error}") from error
        known = {doc.id for doc in good}
        bad = list({doc.id: doc for doc in bad if doc.id not in known}.values())
        if not good or not bad:
            raise UserError(f"row {number + 1} ({query[:60]!r}) has {len(good)} relevant and {len(bad)} other documents; it needs one of each")
        chance = random.Random(seed_of(seed, "set", number))
        chosen = chance.choice(good)
        drawn = chance.sample(bad, min(num_negatives, len(bad)))
        if vary:
            [count] = chance.choices(range(1, len(drawn) + 1), weights=range(1, len(drawn) + 1))
            drawn = drawn[:count]
        docs = [chosen, *drawn]
        chance.shuffle(docs)
        made.append(SetwiseExample(query, tuple(docs), docs.index(chosen)))
    return made


def _doc(passage: Mapping[str, Any]) -> Doc:
    return Doc(str(passage["docid"]), str(passage["text"]), str(passage.get("title") or ""))


def answer_reward(template: str | Template = "rank_r1_v0.1") -> Callable[..., list[float]]:
    """The reward: 1 for a completion in which the template's pattern is found, and the first thing that it finds is exactly the label of the right document.

    Everything else earns 0: there is no reward for form alone. Capital letters count here, where ranking overlooks them. The function is one of TRL's kind and
    looks at the column ``answer``.
    """
    pattern = re.compile(load_template(template).pattern, re.DOTALL)

    def rank_r1(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
        found = [pattern.search(text) for text in completions]
        return [float(match is not None and match[1].strip() == label) for match, label in zip(found, answer, strict=True)]

    return rank_r1


def reasoning_rows(engine: LocalEngine, examples: Sequence[SetwiseExample], template: str | Template = "rank_r1_v0.1", **limits: Any) -> list[dict[str, str]]:
    """Rows for :class:`~echelon.rerank.training.grpo.GRPO`, or for TRL: ``prompt``, ``answer`` (the label) and ``query``.

    Args:
        engine: a local model, for its tokenizer and chat template.
        examples: the data.
        template: of kind ``set`` with a pattern.
        limits: ``max_query_tokens`` and ``max_passage_tokens``, in place of the template's own.
    """
    form = _setwise(template)
    made = []
    for example in examples:
        prompt = form.render(engine, example.query, example.docs, **limits)
        made.append({"prompt": training_text(engine, prompt), "answer": _label(form, example), "query": example.query})
    return made


def train_rank_r1(
    engine: LocalEngine, examples: Sequence[SetwiseExample], out: str | os.PathLike[str], *, knobs: GRPO | None = None,
    template: str | Template = "rank_r1_v0.1", adapter: PeftConfig | None = None, seed: int = 0, on_step: Callable[[dict[str, Any]], None] | None = None,
    **limits: Any,
) -> dict[str, Any]:  # fmt: skip
    """Teach a model to reason before it picks a document, from which document is relevant alone. ``out`` becomes a PEFT folder.

    Args:
        engine: the model, which gets an adapter.
        examples: the data.
        out: folder for the result.
        knobs: of GRPO; those of the recipe v0.1 by default.
        template: of the prompts, and what an answer must look like.
        adapter: PEFT's config; the paper's LoRA by default (see :func:`lora`).
        seed: of everything drawn.
        on_step: called with each line of the log.
        limits: ``max_query_tokens`` and ``max_passage_tokens``, in place of the template's own.
    """
    data = reasoning_rows(engine, examples, template, **limits)
    return (knobs or GRPO()).train(
        engine.network, engine.tokenizer, data, answer_reward(template), out, adapter=adapter or lora(), seed=seed, on_step=on_step
    )  # fmt: skip


def train_setwise(
    engine: LocalEngine, examples: Sequence[SetwiseExample], out: str | os.PathLike[str], *, template: str | Template = "rank_r1_direct",
    adapter: PeftConfig | None = None, seed: int = 0, max_query_tokens: int | None = None, max_passage_tokens: int | None = None, **arguments: Any,
) -> dict[str, Any]:  # fmt: skip
    """The baseline: the same prompts without reasoning, and the answer given.

    Args:
        engine: the model, which gets an adapter.
        examples: the data.
        out: folder for the result.
        template: of kind ``set``.
        adapter: PEFT's config; the paper's LoRA by default.
        seed: of order and dropout.
        max_query_tokens: in place of the template's own.
        max_passage_tokens: in place of the template's own.
        arguments: transformers' ``TrainingArguments``, in place of the paper's (one epoch in batches of 16).
    """
    form = _setwise(template)
    rows = []
    for example in examples:
        prompt = form.render(engine, example.query, example.docs, max_query_tokens=max_query_tokens, max_passage_tokens=max_passage_tokens)
        text = training_text(engine, Prompt(prompt.messages))  # the model writes its answer from the first tag on
        rows.append(answer_row(engine.tokenizer, text, f"<answer>{_label(form, example)}</answer>", max_length=engine.context_length))
    return fit_answers(engine.network, engine.tokenizer, rows, out, adapter=adapter or lora(), seed=seed, **{**RECIPE, **arguments})


def lora() -> LoraConfig:
    """The paper's adapter: rank 16 on queries and values."""
    return LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def _setwise(template: str | Template) -> Template:
    form = load_template(template)
    if form.kind != "set" or not form.pattern:
        raise UserError(f"template {form.name!r} asks a {form.kind} question; this training needs one of kind set, with a pattern for the answer")
    return form


def _label(form: Template, example: SetwiseExample) -> str:
    return form.label.replace("{id}", identifier(example.answer, form.identifiers))
