"""GaLore: train every weight, and keep Adam's moments for a low-rank projection of each gradient.

Source: "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", arXiv 2403.03507.
As in its authors' code, Adam's bias corrections stand in the step size and decay comes behind the update. Differs from that code: the projected side is
remembered, so that ``reverse_std`` works on wide matrices; the default ``eps`` is the paper's 1e-8; convolutions are no targets.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from echelon.linalg.checks import one_of
from echelon.linalg.projection import projected_numbers
from echelon.registry import method
from echelon.train.optimizers.base import ProjectedMethod, decay
from echelon.train.optimizers.moments import State, adafactor_direction, adafactor_numbers, adam_direction, step_size


@method(
    kind="optimizer", name="galore", title="GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", arxiv="2403.03507", year=2024,
    summary="Train all weights; keep Adam's moments for a low-rank projection of each gradient.",
    published="C4, LLaMA 60M/130M/350M/1B: perplexity 34.88/25.36/18.95/15.64, full rank 34.06/25.08/18.80/15.56",
)  # fmt: skip
@dataclass(frozen=True)
class GaLore(ProjectedMethod):
    """Project ``G`` (m, n) on ``rank`` directions of its shorter side, chosen every ``update_proj_gap`` steps; run Adam there; project back.

    Moments are not touched when directions change. Global gradient clipping belongs before the step.

    Attributes:
        scale: factor of the update of projected matrices.
        base: the optimizer on the projected gradient: `adamw`, or `adafactor` (set betas to 0,0.999 to leave its first moment out).
    """

    lr: float = 0.01
    scale: float = 0.25
    base: Literal["adamw", "adafactor"] = "adamw"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scale > 0:
            raise ValueError(f"scale is {self.scale!r}; it must be above 0")
        one_of("base", self.base, ("adamw", "adafactor"))

    def state_numbers(self, shape: tuple[int, ...], rank: int | None = None) -> int:
        if self.base == "adamw":
            return super().state_numbers(shape, rank)
        if rank is None:
            return adafactor_numbers(shape, self.betas[0] > 0)
        basis, low = projected_numbers((shape[0], shape[1]), rank, self.proj_type, self.projection)
        return basis + adafactor_numbers(low, self.betas[0] > 0)

    def update(self, weight: Float[Tensor, "m n"], gradient: Float[Tensor, "m n"], state: State, knobs: Mapping[str, Any]) -> None:
        projector = self.refresh(gradient, state, knobs)
        low = projector.down(gradient, state)
        if knobs["base"] == "adamw":
            projector.add_up(weight, adam_direction(low, state, knobs), state, -knobs["scale"] * step_size(state, knobs))
            decay(weight, knobs)
        else:
            low = adafactor_direction(low, state, knobs)
            decay(weight, knobs)
            projector.add_up(weight, low, state, -knobs["scale"])

    def by_number(self, knobs: Mapping[str, Any]) -> bool:
        return "rank" not in knobs and knobs["base"] == "adamw"

    def update_plain(self, weight: Float[Tensor, "..."], gradient: Float[Tensor, "..."], state: State, knobs: Mapping[str, Any]) -> None:
        if knobs["base"] == "adamw":
            super().update_plain(weight, gradient, state, knobs)
        else:
            decay(weight, knobs)
            weight.sub_(adafactor_direction(gradient, state, knobs))
