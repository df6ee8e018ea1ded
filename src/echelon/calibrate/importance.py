"""How much each weight matters, by its own size, by what runs through it, or by how the loss depends on it."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from echelon.calibrate.gradients import collect_gradients
from echelon.calibrate.observing import InputObserver
from echelon.calibrate.walker import on_device
from echelon.linalg.checks import one_of
from echelon.models.modules import dense_weight

Importance = Literal["taylor", "magnitude", "wanda"]


def weight_importance(
    model: PreTrainedModel, names: Sequence[str], kind: Importance, batches: Sequence[Mapping[str, Tensor]] = ()
) -> dict[str, Float[Tensor, "out in"]]:  # fmt: skip
    """A score of every weight of some linear layers, in float32 on the CPU; the model stays as it was.

    Sources: the first-order term of "LLM-Pruner", arXiv 2305.11627, and "A Simple and Effective Pruning Approach for Large Language Models" (Wanda),
    arXiv 2306.11695.

    Args:
        model: a causal language model.
        names: of ``nn.Linear`` or ``Conv1D``.
        kind: ``taylor``, the weight times the loss's gradient, summed over the data; ``magnitude``; or ``wanda``, the weight times the norm of its input.
        batches: ``input_ids`` and ``attention_mask``; ``magnitude`` needs none.

    Raises:
        ValueError: if the kind is unknown or needs data.
    """
    one_of("kind", kind, ("taylor", "magnitude", "wanda"))
    sizes = {name: dense_weight(model.get_submodule(name)).detach().abs().float().cpu() for name in names}
    if kind == "magnitude" or not names:
        return sizes
    if not batches:
        raise ValueError(f"importance is {kind!r}, which needs data; give some, or use 'magnitude'")
    if kind == "taylor":
        labelled = [{**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)} for batch in batches]
        found = collect_gradients(model, names, labelled).sums
        return {name: size * found.pop(name).abs() for name, size in sizes.items()}
    observer, training = InputObserver({name: model.get_submodule(name) for name in names}, _Squares), model.training
    model.eval()
    try:
        with torch.no_grad(), observer:
            for batch in batches:
                observer.batch(batch["attention_mask"])
                model(**on_device(dict(batch), model.device))
    finally:
        model.train(training)
    return {name: size * observer.moments[observer.leader[name]].sum.sqrt().float().cpu() for name, size in sizes.items()}


class _Squares:
    """Sums of squares of a layer's inputs."""

    def __init__(self, width: int, device: Any) -> None:
        self.sum = torch.zeros(width, dtype=torch.float64, device=device)

    def update(self, x: Float[Tensor, "*batch in"], mask: Bool[Tensor, "*batch"] | None = None) -> None:
        self.sum += (x if mask is None else x[mask]).reshape(-1, x.shape[-1]).double().square().sum(0)
