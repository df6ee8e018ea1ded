"""A plain loop of next-token training for models that need no trainer: packed rows, AdamW, a linear warm-up and a cosine to zero."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from echelon.calibrate import calibration_batches
from echelon.calibrate.walker import on_device
from echelon.errors import UserError

_ALL = 10**9
Row = dict[str, Tensor]


def training_rows(data: Any, tokenizer: Any, seqlen: int) -> list[Row]:
    """All of the data as rows of tokens; anything that :func:`echelon.calibrate.calibration_batches` takes."""
    batches = calibration_batches(data, tokenizer, nsamples=_ALL, seqlen=seqlen, batch_size=1).batches
    return [{key: value[place] for key, value in batch.items()} for batch in batches for place in range(len(next(iter(batch.values()))))]


def row_length(model: Any, seqlen: int) -> int:
    """Tokens a row, at most what the model takes."""
    return min(seqlen, getattr(model.config.get_text_config(), "max_position_embeddings", None) or seqlen)


def fit(
    model: nn.Module, rows: Sequence[Row], *, steps: int, learning_rate: float, batch_size: int, micro_batch_size: int, warmup: int, seed: int = 0,
    on_step: Callable[[dict[str, Any]], None] | None = None, after_update: Callable[[], None] | None = None,
) -> list[float]:  # fmt: skip
    """Train what requires gradients, in place; the loss of every step returns.

    Half-precision weights are updated through copies in float32, since small steps would be rounded away. The order of rows and dropout come from ``seed``;
    the global random state stays as it was.

    Args:
        model: gives the mean next-token loss of a batch with labels; it is left in evaluation mode.
        rows: from :func:`training_rows`.
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
    trained = [p for p in model.parameters() if p.requires_grad]
    masters = [p if p.dtype.itemsize >= 4 else p.detach().float().requires_grad_() for p in trained]
    optimizer = torch.optim.AdamW(masters, lr=learning_rate, weight_decay=0.0)
    device, losses, batches = trained[0].device, [], _batches(rows, batch_size, seed)
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
                _update(optimizer, trained, masters)
                if after_update is not None:
                    after_update()
                if on_step is not None:
                    on_step({"step": step + 1, "of": steps, "loss": losses[-1]})
    finally:
        model.eval()
        for p in trained:
            p.grad = None
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
    batch = {key: nn.utils.rnn.pad_sequence([row[key] for row in rows], batch_first=True) for key in rows[0]}
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    labels = batch.get("labels", batch["input_ids"]).masked_fill(mask == 0, -100)
    return batch | {"labels": labels}, int((labels[:, 1:] != -100).sum())


@torch.no_grad()
def _update(optimizer: torch.optim.Optimizer, trained: Sequence[Tensor], masters: Sequence[Tensor]) -> None:
    for p, master in zip(trained, masters, strict=True):
        if master is not p and p.grad is not None:
            master.grad, p.grad = p.grad.float(), None
    optimizer.step()
    optimizer.zero_grad()
    for p, master in zip(trained, masters, strict=True):
        if master is not p:
            p.copy_(master)


def _batches(rows: Sequence[Mapping[str, Tensor]], size: int, seed: int) -> Iterator[list[Any]]:
    """Batches without end, in a new order each time round."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for places in torch.randperm(len(rows), generator=generator).split(size):
            yield [rows[int(place)] for place in places]
