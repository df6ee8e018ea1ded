"""Training a causal language model to give certain answers, on transformers' Trainer, with a weight for each token of an answer."""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from jaxtyping import Bool, Float, Int
from peft import PeftConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainingArguments

from echelon.data.files import folder_whole, write_whole
from echelon.errors import UserError
from echelon.llm.base import Prompt
from echelon.llm.local import LocalEngine
from echelon.models.batching import padded
from echelon.models.randomness import own_randomness

IGNORED = -100
Weigh = Callable[[str, Sequence[tuple[int, int]]], list[float]]
Row = dict[str, list[Any]]


def training_text(engine: LocalEngine, prompt: Prompt) -> str:
    """A prompt as one text with all of its special tokens: tokenised without further ones it is what the engine gives its model."""
    text, tokenizer = engine.prompt_text(prompt), engine.tokenizer
    begins = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id] and not text.startswith(str(tokenizer.bos_token))
    return f"{tokenizer.bos_token}{text}" if begins else text


def answer_row(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, weigh: Weigh | None = None, max_length: int | None = None) -> Row:
    """Tokens, labels and weights of a prompt and its answer, which the token for the end follows.

    The prompt's tokens are those that it has alone, as when the model is asked; the answer's those that it has behind it, unless the two would melt at the
    seam: then those that it has alone.

    Args:
        tokenizer: a fast one; nothing is added in front of the prompt.
        prompt: as the model is given it, with its own special tokens.
        answer: what the model is to write.
        weigh: gives a weight for each token of the answer from its characters; 1 by default, and always for the end.
        max_length: tokens that the model can read.

    Returns:
        ``input_ids``, ``labels`` (-100 for the prompt) and ``weights`` (0 for the prompt), of one length.

    Raises:
        UserError: if the tokenizer does not tell characters or knows no end, the answer is empty, or the whole is too long.
    """
    if not tokenizer.is_fast:
        raise UserError(f"{type(tokenizer).__name__} does not tell which characters a token stands for; a fast tokenizer is needed")
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no token for the end, so the model cannot be taught to stop; set eos_token")
    if not answer.strip():
        raise UserError(f"the answer to the prompt {prompt[:60]!r} is empty")

    def coded(text: str) -> tuple[list[int], list[tuple[int, int]]]:
        made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return list(made["input_ids"]), [(int(a), int(b)) for a, b in made["offset_mapping"]]

    asked, _ = coded(prompt)
    ids, spans = coded(prompt + answer)
    if ids[: len(asked)] == asked:
        ids, spans = ids[len(asked) :], [(max(0, a - len(prompt)), b - len(prompt)) for a, b in spans[len(asked) :]]
    else:
        ids, spans = coded(answer)
    weights = [1.0] * len(ids) if weigh is None else weigh(answer, spans)
    if max_length is not None and len(asked) + len(ids) + 1 > max_length:
        raise UserError(f"prompt and answer have {len(asked) + len(ids) + 1} tokens, and the model takes {max_length}; cut the passages shorter")
    return {
        "input_ids": [*asked, *ids, tokenizer.eos_token_id],
        "labels": [*[IGNORED] * len(asked), *ids, tokenizer.eos_token_id],
        "weights": [*[0.0] * len(asked), *weights, 1.0],
    }


def collated(rows: Sequence[Mapping[str, Sequence[Any]]]) -> dict[str, Tensor]:
    """Rows filled up on the right, for transformers' Trainer."""
    ids, mask = padded([row["input_ids"] for row in rows])
    labels, _ = padded([row["labels"] for row in rows], pad=IGNORED)
    width = ids.shape[1]
    weights = torch.tensor([[*row["weights"], *[0.0] * (width - len(row["weights"]))] for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "weights": weights}


def logits_at(model: Any, inputs: Mapping[str, Tensor], wanted: Bool[Tensor, "rows length"]) -> Float[Tensor, "wanted vocabulary"]:
    """A causal model's float32 logits behind some of its tokens, row by row; those of all others, most of what a long prompt costs, are not made.

    Args:
        model: the model, also one that PEFT, accelerate or torch has wrapped.
        inputs: of its forward.
        wanted: behind which tokens.
    """
    inner = getattr(model, "module", model)
    head = (inner.get_base_model() if hasattr(inner, "get_base_model") else inner).get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, hidden: (hidden[0][wanted][None], *hidden[1:]))
    try:
        return model(**inputs, use_cache=False).logits[0].float()
    finally:
        hook.remove()


def weighted_loss(
    logits: Float[Tensor, "tokens vocabulary"], wanted: Int[Tensor, " tokens"], weights: Float[Tensor, " tokens"], count: Any = None
) -> Float[Tensor, ""]:
    """Sum of weight times negative log-likelihood, over the number of tokens (and not over their weights).

    Args:
        logits: that predict the tokens.
        wanted: the tokens.
        weights: of the tokens.
        count: how many tokens count in the whole step, of which these may be a part; by default these.
    """
    losses = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
    return (losses * weights).sum() / (len(wanted) if count is None else count)


class AnswerTrainer(Trainer):
    """``Trainer`` for rows of :func:`answer_row`: the mean of a whole step's tokens, also where it is accumulated from several batches."""

    loss_is_scaled_for_ga = True

    def __init__(self, *others: Any, **named: Any):
        arguments: TrainingArguments | None = named.get("args")
        if arguments is not None:
            arguments.remove_unused_columns = False  # the weights are no argument of the model
            arguments.prediction_loss_only = True  # logits are made where they count only
        named.setdefault("data_collator", collated)
        super().__init__(*others, **named)
        self.model_accepts_loss_kwargs = True  # so that a step's tokens are counted

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        counts = inputs["labels"][:, 1:] != IGNORED
        told = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        logits = logits_at(model, told, torch.nn.functional.pad(counts, (0, 1)))
        loss = weighted_loss(logits, inputs["labels"][:, 1:][counts], inputs["weights"][:, 1:][counts], num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over processes
        return (loss, {"logits": logits}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if not math.isfinite(logs.get("loss", 0.0)):
            raise UserError(f"the loss is {logs['loss']} at step {self.state.global_step}; lower learning_rate")
        super().log(logs, start_time)


def fit_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row] | Dataset, out: str | os.PathLike[str], *,
    adapter: PeftConfig | None = None, seed: int = 42, beside: Mapping[str, Any] | None = None, **arguments: Any,
) -> dict[str, Any]:  # fmt: skip
    """Train a model, or an adapter on it, on rows of :func:`answer_row`.

    Args:
        model: trained in place.
        tokenizer: of the model; goes into the folder.
        rows: the data.
        out: a new folder; becomes a model's, or that of PEFT's adapter, when all is done, with ``result.json``.
        adapter: PEFT's config of an adapter that alone is trained.
        seed: of order, dropout and noise.
        beside: what else goes into the result.
        arguments: transformers' ``TrainingArguments``, by their names; without checkpoints unless ``save_strategy`` says otherwise.

    Returns:
        What ``result.json`` holds: ``rows``, ``steps``, ``tokens`` of the answers in all rows, ``loss`` of each logged step.

    Raises:
        UserError: if there are no rows, ``out`` is not empty, or the loss is no number.
    """
    if not len(rows):
        raise UserError("there are no rows to train on; give at least one")
    refuse_full(out)
    data = rows if isinstance(rows, Dataset) else Dataset.from_list(list(rows))
    cuda = torch.cuda.is_available()
    settings = {
        "output_dir": str(out), "seed": seed, "report_to": "none", "save_strategy": "no", "logging_steps": 1, "logging_nan_inf_filter": False,
        "disable_tqdm": True, "use_cpu": not cuda, "bf16": cuda, "dataloader_pin_memory": cuda, **arguments,
    }  # fmt: skip
    was_training, cached = model.training, model.config.use_cache
    with own_randomness(seed):
        trained: Any = model if adapter is None else get_peft_model(model, adapter)
        trainer = AnswerTrainer(model=trained, args=TrainingArguments(**settings), train_dataset=data)
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train()
        finally:
            model.config.use_cache = cached
            model.gradient_checkpointing_disable()
            model.train(was_training)
    result = {
        "rows": len(data), "steps": trainer.state.global_step, "tokens": sum(label != IGNORED for row in data["labels"] for label in row),
        "loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], **(beside or {}),
    }  # fmt: skip
    keep(trained, tokenizer, out, result)
    return result


def refuse_full(out: str | os.PathLike[str], but: Sequence[str] = ()) -> None:
    """Raises: UserError: if a folder for a result is a file, or holds anything but these names: it would go."""
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(path.name not in but for path in folder.iterdir())):
        raise UserError(f"{folder} is not empty; give a new folder")


def keep(
    model: Any, tokenizer: PreTrainedTokenizerBase, out: str | os.PathLike[str], result: Mapping[str, Any], beside: Mapping[str, str] | None = None
) -> None:  # fmt: skip
    """Write an ordinary folder, whole or not at all, with what came of the training and other texts beside it."""
    with folder_whole(out) as folder:
        model.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's, a form that nobody filled in
        tokenizer.save_pretrained(folder)
        for name, text in {"result.json": json.dumps(result, indent=2) + "\n", **(beside or {})}.items():
            write_whole(folder / name, text)
