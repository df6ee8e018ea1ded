"""Adafactor, a baseline: second moments as an outer product of row and column means.

Source: "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", arXiv 1804.04235, with a given learning rate and no scaling by the parameter.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from echelon.registry import method
from echelon.train.optimizers.base import OptimizerMethod, decay
from echelon.train.optimizers.moments import State, adafactor_direction, adafactor_numbers


@method(
    kind="optimizer", name="adafactor", title="Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", arxiv="1804.04235", year=2018,
    summary="Second moments factored into row and column means.",
)  # fmt: skip
@dataclass(frozen=True)
class Adafactor(OptimizerMethod):
    """A first moment is kept where ``betas[0]`` is above 0; ``betas[1]`` and ``eps`` are not used (the decay is 1 - t^-0.8)."""

    betas: tuple[float, float] = (0.0, 0.999)

    def update(self, weight: Float[Tensor, "..."], gradient: Float[Tensor, "..."], state: State, knobs: Mapping[str, Any]) -> None:
        update = adafactor_direction(gradient, state, knobs)
        decay(weight, knobs)
        weight.sub_(update)

    def state_numbers(self, shape: tuple[int, ...], rank: int | None = None) -> int:
        return adafactor_numbers(shape, self.betas[0] > 0)
