"""Batch norm after a change of weights: its running statistics, measured again."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> list[str]:
    """Replace the running mean and variance of every batch norm by their plain averages over these batches; the names of the norms.

    All else runs in evaluation mode, so that dropout does not disturb them.

    Args:
        model: called as ``model(**batch)``.
        batches: at least one; normally of the training data.

    Raises:
        ValueError: if there are batch norms and no batch.
    """
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None}
    if not norms:
        return []
    modes = {module: module.training for module in model.modules()}
    momenta = {norm: norm.momentum for norm in norms.values()}
    model.eval()
    for norm in norms.values():
        norm.reset_running_stats()
        norm.momentum = None  # the average over all batches so far
        norm.training = True
    try:
        seen = 0
        for batch in batches:
            model(**batch)
            seen += 1
    finally:
        for module, mode in modes.items():
            module.training = mode
        for norm, momentum in momenta.items():
            norm.momentum = momentum
    if not seen:
        raise ValueError("batches is empty; it must hold at least one batch to measure batch norm on")
    return list(norms)
