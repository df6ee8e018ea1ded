"""A limit on how fast the norm of an update may grow from one step to the next; it may fall freely.

Source: the norm-growth limiter of "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?", arXiv 2410.01623. Differs from its code: a
matrix whose norm was zero so far (a factor of LoRA while the other one is zero) starts anew, where the code lets it grow from 1e-8 by one percent a step,
which is off for two thousand steps.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from echelon.train.optimizers.moments import State

GUARD = 1e-8  # added to the last norm, as in the authors' code
NOTHING = 1e-12  # a norm below it counts as zero


@dataclass(frozen=True)
class NormGrowthLimiter:
    """Scale an update down where its Frobenius norm is above ``gamma`` times the last limited norm.

    Attributes:
        gamma: largest growth of the norm from step to step, above 1; infinity is no limit.
        floor: norms up to this one are never limited.
        reference: limit also behind a norm of zero, as the authors' code does.
    """

    gamma: float = 1.01
    floor: float = 0.0
    reference: bool = False

    def __post_init__(self) -> None:
        """Raises: ValueError: if a field is out of range."""
        if not self.gamma > 1:
            raise ValueError(f"gamma is {self.gamma!r}; it must be above 1 (infinity is no limit)")
        if not 0 <= self.floor < math.inf:
            raise ValueError(f"floor is {self.floor!r}; it must be a number of at least 0")

    def __call__(self, update: Float[Tensor, "..."], state: State, key: str = "limited_norm") -> Float[Tensor, "..."]:
        """The update, scaled in place; its new norm goes to ``state[key]`` and stays on the device: nothing waits for it.

        Args:
            update: of one parameter, in float32 or float64.
            state: of that parameter.
            key: where the norm stands in it.
        """
        if self.gamma == math.inf:
            return update
        norm = torch.linalg.vector_norm(update)
        if key in state:
            last = state[key].to(norm)
            limit = (self.gamma * (last + GUARD)).clamp_min(self.floor)
            if not self.reference:
                limit = torch.where(last < NOTHING, math.inf, limit)
            excess = (norm / limit).clamp_min(1.0)
            update.div_(excess)
            norm = norm / excess
        state[key] = norm
        return update
