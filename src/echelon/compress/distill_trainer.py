"""Feature distillation under transformers' Trainer: mixed precision, several devices, accumulation, checkpoints."""

from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from echelon.compress.distill import FeatureDistiller


class DistillationTrainer(Trainer):
    """A ``Trainer`` of the student that adds the distiller's terms to the loss in training, but not in evaluation.

    The teacher is no part of the model: it is neither wrapped, nor trained, nor saved. The log shows the mean of each term, before weighting.

    Args:
        args: as for ``Trainer``, the student as ``model``.
        distiller: whose student is this model.
        kwargs: as for ``Trainer``.

    Raises:
        ValueError: if the distiller has another student.
    """

    def __init__(self, *args: Any, distiller: FeatureDistiller, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if distiller.student is not self.model:
            raise ValueError("the distiller's student is not the model to train; make the distiller with the very same object")
        self.distiller = distiller
        self._noted: dict[str, list[Tensor]] = {}
        distiller.teacher.to(self.args.device)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None) -> Any:
        """The task's loss as ``Trainer`` computes it, plus the other terms where gradients are wanted."""
        if not (model.training and torch.is_grad_enabled()):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        shown = dict(inputs)
        with self.distiller.watching() as features:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        terms = self.distiller.terms(features, shown, outputs.get("logits") if isinstance(outputs, dict) else None)
        # A loss that was divided by all tokens of the accumulated batches is not divided again; the terms are means of one batch.
        scaled = (self.model_accepts_loss_kwargs and num_items_in_batch is not None) or self.compute_loss_func is not None
        share = self.current_gradient_accumulation_steps if scaled else 1
        for name, (weight, value) in terms.items():
            loss = loss + weight * value / share
            self._noted.setdefault(name, []).append(value.detach())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs |= {name: float(torch.stack(values).mean()) for name, values in self._noted.items()}
            self._noted.clear()
        super().log(logs, *args, **kwargs)
