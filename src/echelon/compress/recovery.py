"""Training a compressed model on a little text: choosing what may change, and a plain loop that needs no trainer."""

import itertools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from echelon.calibrate import calibration_batches
from echelon.calibrate.rows import ALL, filled_up, row_length, rows_of, shuffled
from echelon.calibrate.tokens import positions
from echelon.calibrate.walker import on_device
from echelon.errors import UserError
from echelon.models.master_weights import MasterWeights
from echelon.models.modules import factored

FLOOR = 0.1  # share of the learning rate at which the cosine ends


def select_trainable(model: nn.Module, predicate: Callable[[str], bool]) -> list[str]:
    """Let exactly those parameters train whose name the predicate says yes to; their names are returned.

    With gradient checkpointing of the re-entrant kind and frozen embeddings, call ``model.enable_input_require_grads()`` too.
    """
    chosen = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(predicate(name))
        chosen += [name] if parameter.requires_grad else []
    return chosen


def low_rank_parameters(model: nn.Module, norms: bool = True) -> set[str]:
    """Names of the parameters in factored layers, their biases included, and of the norms if wanted."""
    names = {f"{name}.{inner}" for name, module in factored(model) for inner, _ in module.named_parameters()}
    if norms:
        for name, module in model.named_modules():
            if "norm" in type(module).__name__.lower():
                names |= {f"{name}.{inner}" for inner, _ in module.named_parameters(recurse=False)}
    return names


def next_token_loss(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean cross-entropy of the next token; pads do not count."""
    labels = batch["input_ids"]
    if "attention_mask" in batch:
        labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
    return model(**batch, labels=labels).loss


def recover(
    model: PreTrainedModel,
    data: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    steps: int,
    learning_rate: float = 5e-5,
    seed: int = 0,
    trainable: Callable[[str], bool] | None = None,
    loss: Callable[[PreTrainedModel, Mapping[str, Tensor]], Tensor] = next_token_loss,
    batch_size: int = 4,
    seqlen: int = 1024,
    warmup: int | None = None,
    weight_decay: float = 0.0,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Fine-tune a model in place with AdamW, a linear warm-up and a cosine down to a tenth of the learning rate.

    Weights in half precision are updated through copies in float32, since small steps would otherwise be rounded away. Dropout draws from
    ``seed``; the global random state is left as it was. Gradients are not clipped.

    Args:
        model: the model; it is left in evaluation mode if it was in it.
        data: anything that :func:`echelon.calibrate.calibration_batches` takes; all of it is used, in a new order each epoch.
        tokenizer: for texts.
        steps: updates.
        learning_rate: at the end of the warm-up.
        seed: of the order of rows and of dropout.
        trainable: says by name which parameters train, see :func:`select_trainable`; None for those that require gradients.
        loss: of a batch.
        batch_size: rows a step.
        seqlen: tokens a row, at most what the model takes.
        warmup: steps of it; None for a twentieth.
        weight_decay: decoupled, on all that is trained. On two factors it shrinks the singular values of their product.
        on_progress: called with ``{"step", "done", "of", "loss"}``.

    Returns:
        Steps, tokens, seconds, number of trained parameters, and the mean loss over the first and the last tenth of the steps.

    Raises:
        ValueError: if an argument is out of range, nothing is trainable, or text comes without a tokenizer.
        UserError: if the loss is not finite, or there is no data.
    """
    for name, value, least in (("steps", steps, 1), ("batch_size", batch_size, 1), ("seqlen", seqlen, 2), ("weight_decay", weight_decay, 0)):
        if value < least:
            raise ValueError(f"{name} is {value!r}; it must be at least {least}")
    if not learning_rate > 0:
        raise ValueError(f"learning_rate is {learning_rate!r}; it must be above 0")
    warm = max(1, steps // 20) if warmup is None else warmup
    if not 0 <= warm <= steps:
        raise ValueError(f"warmup is {warmup!r}; it must be from 0 to steps, {steps}")
    shown = calibration_batches(data, tokenizer, nsamples=ALL, seqlen=row_length(model, seqlen))
    rows = rows_of(shown.batches)
    if trainable is not None:
        select_trainable(model, trainable)
    weights = MasterWeights(parameter for parameter in model.parameters() if parameter.requires_grad)
    if not weights.parameters:
        raise ValueError("no parameter is trainable; nothing can be recovered")
    optimizer = torch.optim.AdamW(weights.copies, lr=learning_rate, weight_decay=weight_decay)
    losses: list[float] = []
    tokens, started, training = 0, time.monotonic(), model.training
    model.train()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for number, batch in enumerate(map(filled_up, itertools.islice(shuffled(rows, batch_size, seed), steps))):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * _schedule(number, steps, warm)
                here = loss(model, on_device(batch, model.device))
                if not math.isfinite(value := float(here.detach())):
                    raise UserError(f"the loss is {value} at step {number + 1} of the recovery; lower the learning rate, {learning_rate:g}")
                here.backward()
                weights.step(optimizer)
                losses.append(value)
                tokens += positions(batch)
                if on_progress is not None:
                    on_progress({"step": "recovery", "done": number + 1, "of": steps, "loss": value})
    finally:
        model.train(training)
        weights.clear()
    tenth = max(1, steps // 10)
    return {
        "steps": steps, "tokens": tokens, "seconds": time.monotonic() - started, "learning_rate": learning_rate, "source": shown.source,
        "trained_parameters": sum(p.numel() for p in weights.parameters),
        "loss_first": sum(losses[:tenth]) / tenth, "loss_last": sum(losses[-tenth:]) / tenth,
    }  # fmt: skip


def _schedule(step: int, steps: int, warm: int) -> float:
    if step < warm:
        return (step + 1) / warm
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
