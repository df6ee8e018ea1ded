"""A plain loop of next-token training for models that need no trainer: packed rows, AdamW, a linear warm-up and a cosine to zero."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from echelon.calibrate.rows import Row, filled_up, shuffled
from echelon.calibrate.walker import on_device
from echelon.errors import UserError
from echelon.models.master_weights import MasterWeights


def fit(
    model: nn.Module, rows: Sequence[Row], *, steps: int, learning_rate: float, batch_size: int, micro_batch_size: int, warmup: int, seed: int = 0,
    on_step: Callable[[dict[str, Any]], None] | None = None, after_update: Callable[[], None] | None = None,
) -> list[float]:  # fmt: skip
    """Train what requires gradients, in place; the loss of every step returns.

    Half-precision weights are updated through copies in float32, since small steps would be rounded away. The order of rows and dropout come from ``seed``;
    the global random state stays as it was.

    Args:
        model: gives the mean next-token loss of a batch with labels; it is left in evaluation mode.
        rows: from :func:`echelon.calibrate.rows.training_rows`.
        steps: updates.
        learning_rate: at the end of the warm-up.
        batch_size: rows a step.
        micro_batch_size: rows a forward; the step is the same whatever it is.
        warmup: steps of it.
        seed: of everything drawn.
        on_step: called with ``{"step", "of", "loss"}``.
        after_update: called behind every update.

    Raises:
        UserError: if the loss is not finite.
    """
    weights = MasterWeights(p for p in model.parameters() if p.requires_grad)
    optimizer = torch.optim.AdamW(weights.copies, lr=learning_rate, weight_decay=0.0)
    device, losses, batches = weights.parameters[0].device, [], shuffled(rows, batch_size, seed)
    model.train()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for step in range(steps):
                for group in optimizer.param_groups:
                    rise = (step + 1) / max(1, warmup)
                    group["lr"] = learning_rate * (rise if step < warmup else 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))
                losses.append(_gradients(model, next(batches), micro_batch_size, device))
                if not math.isfinite(losses[-1]):
                    raise UserError(f"the loss is {losses[-1]} at step {step + 1}; lower the learning rate, {learning_rate:g}")
                weights.step(optimizer)
                if after_update is not None:
                    after_update()
                if on_step is not None:
                    on_step({"step": step + 1, "of": steps, "loss": losses[-1]})
    finally:
        model.eval()
        weights.clear()
    return losses


@torch.no_grad()
def mean_loss(model: nn.Module, rows: Sequence[Row], micro_batch_size: int = 4) -> float:
    """Mean next-token loss over all tokens of some rows, in evaluation mode."""
    model.eval()
    device, total, tokens = next(model.parameters()).device, 0.0, 0
    for start in range(0, len(rows), micro_batch_size):
        batch, count = _labelled(rows[start : start + micro_batch_size])
        total += float(model(**on_device(batch, device)).loss) * count
        tokens += count
    return total / max(1, tokens)


def _gradients(model: nn.Module, rows: Sequence[Row], size: int, device: torch.device) -> float:
    parts = [_labelled(rows[start : start + size]) for start in range(0, len(rows), size)]
    tokens, total = max(1, sum(count for _, count in parts)), 0.0
    for batch, count in parts:
        loss = model(**on_device(batch, device)).loss * (count / tokens)
        loss.backward()
        total += float(loss.detach())
    return total


def _labelled(rows: Sequence[Row]) -> tuple[Row, int]:
    """A batch with labels, filled up on the right, and how many tokens it predicts."""
    batch = filled_up(rows)
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    labels = batch.get("labels", batch["input_ids"]).masked_fill(mask == 0, -100)
    return batch | {"labels": labels}, int((labels[:, 1:] != -100).sum())
