"""Fira: GaLore's memory, and the part of the gradient that GaLore throws away is applied too, with a borrowed scale.

Source: "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?", arXiv 2410.01623.
Differs from its authors' code: the residual is orthogonal to the kept directions, as in the paper's text (the code takes ``G - scale P P^T G``, which is
``residual="scaled"`` here and what the published C4 numbers were made with); the projected side is remembered, so that square matrices of any ``proj_type``
work; ``eps`` defaults to GaLore's 1e-8 in place of 1e-6; a residual of zero does not switch the next ones off (see
:class:`~echelon.train.optimizers.limiter.NormGrowthLimiter`; ``reference=True`` brings that back).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from echelon.linalg.checks import one_of
from echelon.registry import method
from echelon.train.optimizers.base import ProjectedMethod, decay
from echelon.train.optimizers.limiter import NormGrowthLimiter
from echelon.train.optimizers.moments import State, adam_direction, step_size


@method(
    kind="optimizer", name="fira", title="Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?", arxiv="2410.01623", year=2024,
    summary="GaLore's memory with full-rank steps: the discarded part of the gradient is applied with the scale that Adam has inside.",
    published="C4, LLaMA 60M/130M/350M/1B: perplexity 31.06/22.73/16.85/14.31, GaLore 34.88/25.36/18.95/15.64, full rank 34.06/25.08/18.80/15.56",
)  # fmt: skip
@dataclass(frozen=True)
class Fira(ProjectedMethod):
    """Adam on ``rank`` directions of the gradient; outside them a gradient step times ``|N| / |R|``, Adam's answer ``N`` to the projected gradient ``R``.

    On a PEFT model with LoRA layers the factors are the matrices that are projected (the authors' fine-tuning on Commonsense-170K is that, with ``rank=16`` of
    32 and ``scale=1``); on any other model the weights are. Each matrix keeps one number more than with GaLore.

    Attributes:
        scale: factor of Adam's part of the update; the authors use 0.25 to pre-train and 1 to fine-tune.
        gamma: largest growth of the residual's norm from step to step, above 1; `inf` for no limit.
        scaling: one scale a `column` of the projected gradient (a row, where rows keep their number), or one a `matrix`.
        residual: what lies outside the kept directions, `orthogonal` to them; or `scaled`, which leaves `1 - scale` of what lies inside in it.
        reference: let the limiter act behind a zero residual too.
    """

    lr: float = 0.01
    scale: float = 0.25
    gamma: float = 1.01
    scaling: Literal["column", "matrix"] = "column"
    residual: Literal["orthogonal", "scaled"] = "orthogonal"
    reference: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scale > 0:
            raise ValueError(f"scale is {self.scale!r}; it must be above 0")
        NormGrowthLimiter(self.gamma)
        one_of("scaling", self.scaling, ("column", "matrix"))
        one_of("residual", self.residual, ("orthogonal", "scaled"))
        if self.proj_type == "full" and self.scaling == "column":
            raise ValueError("scaling is 'column' and proj_type 'full', which leaves no column whole; scaling must be 'matrix'")

    def state_numbers(self, shape: tuple[int, ...], rank: int | None = None) -> int:
        return super().state_numbers(shape, rank) + (0 if rank is None or self.gamma == float("inf") else 1)

    def update(self, weight: Float[Tensor, "m n"], gradient: Float[Tensor, "m n"], state: State, knobs: Mapping[str, Any]) -> None:
        projector = self.refresh(gradient, state, knobs)
        low = projector.down(gradient, state)
        direction = adam_direction(low, state, knobs)
        residual = gradient.sub_(projector.up(low, state), alpha=knobs["scale"] if knobs["residual"] == "scaled" else 1.0)
        whole_side = None if knobs["scaling"] == "matrix" else 0 if "left" in state else 1
        residual.mul_(norm_ratio(direction, low, whole_side))
        NormGrowthLimiter(knobs["gamma"], reference=knobs["reference"])(residual, state)
        weight.add_(residual.add_(projector.up(direction, state), alpha=knobs["scale"]), alpha=-step_size(state, knobs))
        decay(weight, knobs)


def norm_ratio(answer: Float[Tensor, "m n"], question: Float[Tensor, "m n"], dim: int | None) -> Float[Tensor, "..."]:
    """``|answer| / (|question| + 1e-8)``, of vectors along ``dim`` or of the whole, in a shape that multiplies the matrix."""
    over = (0, 1) if dim is None else dim
    return torch.linalg.vector_norm(answer, dim=over, keepdim=True) / torch.linalg.vector_norm(question, dim=over, keepdim=True).add_(1e-8)
