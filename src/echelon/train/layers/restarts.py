"""Restarts for factored layers: balance the factors, forget the moments, and warm up again.

Source: "Scalable Parameter and Memory Efficient Pretraining for LLM: Recent Algorithmic Advances and Benchmarking", arXiv 2505.22922. The product of two
factors is split evenly (U sqrt(S), sqrt(S) V^T), which makes the factored problem best conditioned (its Lemma 4.1), and moments polluted by spikes or
expressed in old factors are dropped. Differs from its code: every factored layer can be refactored, not only SLTrain's; there is no ramp at the very start. In
bfloat16 new factors are rounded, which changes their product by up to a few thousandths; an optimizer with ``rounding="master"`` splits its float32 copies.
"""

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from echelon.linalg.checks import number, whole
from echelon.train.layers.base import LayerMethod, LearningRate, agree, reset_moments, rewrite, stored


@dataclass(frozen=True)
class Restarts(LayerMethod):
    """Methods whose layers hold two factors, and that may be restarted.

    Attributes:
        refactor_every: optimizer steps between two refactorisations; 0 for none.
        reset_every: optimizer steps between two resets of the optimizer's moments; 0 for none.
        recovery_steps: steps of the linear ramp behind a reset.
        recovery_start: share of the target at which the ramp begins.
        reset_step_counter: let the bias corrections begin anew too.
    """

    refactor_every: int = 0
    reset_every: int = 0
    recovery_steps: int = 10
    recovery_start: float = 0.001
    reset_step_counter: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("refactor_every", "reset_every", "recovery_steps"):
            whole(name, getattr(self, name), 0)
        number("recovery_start", self.recovery_start, 0, 1)

    @abstractmethod
    def factors(self, model: nn.Module) -> Iterable[tuple[nn.Parameter, nn.Parameter]]:
        """The pairs (B, A) whose product may be split anew."""

    def lr_scale(self, step: int, base: LearningRate) -> float:
        """The schedule, with a ramp of ``recovery_steps`` behind every reset: from ``recovery_start`` of what the schedule says at its end."""
        return recovery(step, base, self.reset_every, self.recovery_steps, self.recovery_start)

    def end_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        if self.refactor_every and step % self.refactor_every == 0:
            for pair in self.factors(model):
                kept = [stored(optimizer, factor) for factor in pair]
                refactor(*kept)
                for factor, exact in zip(pair, kept, strict=True):
                    rewrite(optimizer, factor, exact)
        if self.reset_every and step % self.reset_every == 0:
            reset_moments(optimizer, step_counter=self.reset_step_counter)


def recovery(step: int, base: LearningRate, every: int, steps: int, start: float) -> float:
    """A schedule with a linear ramp behind every restart, from ``start`` of what the schedule says at the ramp's end.

    Args:
        step: optimizer steps done.
        base: the schedule.
        every: optimizer steps between two restarts; 0 for none. The first one is after that many.
        steps: of the ramp.
        start: share of its target.
    """
    last = step // every * every if every else 0
    inside = step - last
    if last == 0 or inside >= steps:
        return base(step)
    return base(last + steps) * (start + (1 - start) * inside / max(1, steps - 1))


@torch.no_grad()
def refactor(up: Float[Tensor, "out r"], down: Float[Tensor, "r in"]) -> None:
    """Split the product anew, in place: ``B = U sqrt(S)``, ``A = sqrt(S) V^T``, so that ``B^T B = A A^T = S``, descending.

    By QR of both factors and an SVD of r x r, in float32 at least; the cost is (out + in) r^2. Processes that train together all take the first one's factors,
    since the signs are the SVD routine's.
    """
    dtype = torch.promote_types(up.dtype, torch.float32)
    left, right = torch.linalg.qr(up.to(dtype)), torch.linalg.qr(down.to(dtype).T)
    inner, values, turned = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    root = values.sqrt()
    wide = up.shape[1] - len(values)  # more directions than the matrix has: the rest is zero
    up.copy_(nn.functional.pad(left.Q @ inner * root, (0, wide)))
    down.copy_(nn.functional.pad(root[:, None] * (turned @ right.Q.T), (0, 0, 0, wide)))
    agree(up, down)
