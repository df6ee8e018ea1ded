"""Ragged rows as tensors, and how a model wants its cache handed over."""

import inspect
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel


def padded(
    rows: Sequence[Sequence[int]], device: torch.device | str = "cpu", pad: int = 0
) -> tuple[Int[Tensor, "rows width"], Int[Tensor, "rows width"]]:
    """Token ids filled up on the right, and the mask that hides the filling."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return ids, mask


def cache_name(model: PreTrainedModel) -> str:
    """What the model's forward calls its cache: ``past_key_values``, or ``cache`` from transformers 5.24 on."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]  # PEFT takes **kwargs
    return "cache" if "cache" in inspect.signature(inner.forward).parameters else "past_key_values"
