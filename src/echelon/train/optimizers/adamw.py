"""AdamW, the baseline: ``torch.optim.AdamW``'s rule, with moments in 32, 16 or 8 bits.

Source: "Decoupled Weight Decay Regularization", arXiv 1711.05101; the eight bits: arXiv 2110.02861.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from echelon.registry import method
from echelon.train.optimizers.base import OptimizerMethod, decay
from echelon.train.optimizers.moments import State, adam_step


@method(
    kind="optimizer", name="adamw", title="Decoupled Weight Decay Regularization", arxiv="1711.05101", year=2017,
    summary="Adam with decoupled weight decay, and moments in 32, 16 or 8 bits.",
)  # fmt: skip
@dataclass(frozen=True)
class AdamW(OptimizerMethod):
    """Decay first, then ``lr`` times the corrected first moment over the corrected root of the second plus ``eps``."""

    def update(self, weight: Float[Tensor, "..."], gradient: Float[Tensor, "..."], state: State, knobs: Mapping[str, Any]) -> None:
        decay(weight, knobs)
        adam_step(weight, gradient, state, knobs, corrected_eps=True)

    def by_number(self, knobs: Mapping[str, Any]) -> bool:
        return True
