"""HF Trainer on pairs of what is to be forgotten and what is to stay."""

import contextlib
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from echelon.edit.losses import gradient_ascent_loss, inverted_hinge_loss, kl_loss, npo_loss, sequence_log_probs, token_cross_entropy
from echelon.edit.rows import collated_pairs
from echelon.errors import UserError
from echelon.linalg.checks import number, one_of

FORGET_LOSSES = ("ihl", "ga", "gd", "npo", "kl")
NEEDS_REFERENCE = ("npo", "kl")
ForgetLoss = Callable[[Tensor, Tensor], Tensor]


class UnlearnTrainer(Trainer):
    """``Trainer`` whose batches are ``{"forget": batch, "retain": batch}``, as `PairedRows` and `collated_pairs` give them.

    The loss is that of the forget batch plus ``retain_weight`` times that of the retain batch, in two forward passes. `ihl`, `gd` and `npo` keep the
    cross-entropy of the retain batch low; `kl` keeps its predictions near those before unlearning; `ga` leaves it alone.

    Args:
        forget_loss: `ihl`, `ga`, `gd`, `npo`, `kl`, or a function of logits and labels, which then comes with the cross-entropy of the retain batch.
        ihl_margin: see `inverted_hinge_loss`.
        retain_weight: at least 0.
        npo_beta: see `npo_loss`.
        reference: gives the model as it was before unlearning, within a ``with``, for `npo` and `kl`; such as :meth:`echelon.edit.Start.reference`. By default
            the model with its adapter switched off, which is right only where making the adapter left the base as it was.
        others: arguments of ``Trainer``.

    Attributes:
        history: for each forward, the epoch, the forget and the retain part (NaN where there is none).

    Raises:
        ValueError: if a knob is out of range.
    """

    def __init__(
        self, *others: Any, forget_loss: str | ForgetLoss = "ihl", ihl_margin: float = 1.0, retain_weight: float = 1.0, npo_beta: float = 0.1,
        reference: Callable[[], AbstractContextManager[nn.Module]] | None = None, **named: Any,
    ):  # fmt: skip
        if isinstance(forget_loss, str):
            one_of("forget_loss", forget_loss, FORGET_LOSSES)
        number("ihl_margin", ihl_margin, -math.inf, math.inf, open_low=True, open_high=True)
        number("retain_weight", retain_weight, 0, math.inf, open_high=True)
        number("npo_beta", npo_beta, 0, math.inf, open_low=True, open_high=True)
        arguments: TrainingArguments | None = named.get("args")
        if arguments is not None:
            arguments.remove_unused_columns = False  # Trainer would take the pairs for such
        named.setdefault("data_collator", collated_pairs)
        super().__init__(*others, **named)
        self.model_accepts_loss_kwargs = False  # losses are means, which Trainer divides over a step's batches
        self.forget_loss, self.ihl_margin, self.retain_weight, self.npo_beta = forget_loss, ihl_margin, retain_weight, npo_beta
        self.reference = reference or self._without_adapter
        self.history: list[tuple[int, float, float]] = []

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """The loss of one pair of batches."""
        forget, retain = inputs["forget"], inputs["retain"]
        retains = self.retain_weight > 0 and self.forget_loss != "ga"
        before: Tensor | None = None
        if self.forget_loss in NEEDS_REFERENCE and (retains or self.forget_loss == "npo"):
            with self.reference() as untouched:
                before = logits_of(untouched, forget if self.forget_loss == "npo" else retain)
        logits = logits_of(model, forget)
        wanted = self._forget(logits, forget["labels"], before)
        kept = wanted.new_full((), math.nan)
        loss = wanted
        if retains:
            told = logits_of(model, retain)
            kept = kl_loss(told, before, retain["labels"]) if self.forget_loss == "kl" and before is not None else token_cross_entropy(told, retain["labels"])
            loss = wanted + self.retain_weight * kept
        if not math.isfinite(float(loss.detach())):
            raise UserError(f"the loss is {float(loss.detach())} at step {self.state.global_step}; lower the learning rate, or take forget_loss ihl")
        if model.training:
            self.history.append((math.floor(self.state.epoch or 0), float(wanted.detach()), float(kept.detach())))
        return (loss, {"logits": logits}) if return_outputs else loss

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: Trainer does it for single batches."""
        return 0

    def _forget(self, logits: Tensor, labels: Tensor, before: Tensor | None) -> Tensor:
        if not isinstance(self.forget_loss, str):
            return self.forget_loss(logits, labels)
        if self.forget_loss == "ihl":
            return inverted_hinge_loss(logits, labels, margin=self.ihl_margin)
        if self.forget_loss == "npo":
            assert before is not None
            return npo_loss(sequence_log_probs(logits, labels), sequence_log_probs(before, labels), beta=self.npo_beta)
        return gradient_ascent_loss(logits, labels)

    @contextlib.contextmanager
    def _without_adapter(self) -> Any:
        model: Any = self.accelerator.unwrap_model(self.model)
        if not hasattr(model, "disable_adapter"):
            raise ValueError(f"forget_loss is {self.forget_loss!r}; it compares with the model before unlearning: give reference")
        training = model.training
        try:
            model.eval()
            with model.disable_adapter(), torch.no_grad():
                yield model
        finally:
            model.train(training)


def logits_of(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """What a causal model predicts; labels are not its business."""
    return model(**{key: value for key, value in batch.items() if key != "labels"}, use_cache=False).logits
