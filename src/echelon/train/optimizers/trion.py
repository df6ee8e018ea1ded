"""Trion: momentum whose largest cosine coefficients are orthogonalised, as in Muon and Dion.

Source: "FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large Language Models", arXiv 2505.17967. Its released code does not run;
this follows the paper. Differs: every process orthogonalises every matrix and only the indices are shared, where the paper splits the matrices over the
processes; `scaling_type` counts rows and columns of the layer, also where it stores its weight transposed (Conv1D).
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from echelon.linalg.checks import number, one_of, whole
from echelon.linalg.newton_schulz import newton_schulz
from echelon.registry import method
from echelon.train.optimizers.base import Group, Stepper, decay
from echelon.train.optimizers.fixed_basis import FixedBasisMethod
from echelon.train.optimizers.moments import State, read, write


@method(
    kind="optimizer", name="trion", year=2025, arxiv="2505.17967",
    title="FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large Language Models",
    summary="Muon on the largest cosine coefficients of the momentum; what is not applied stays in the momentum.",
)  # fmt: skip
@dataclass(frozen=True)
class Trion(FixedBasisMethod):
    """``B = M + G``; ``b``, the ``rank`` largest coefficients of ``B``; ``M = B - (1 - momentum) back(b)``; the weight moves along ``back(orthogonal(b))``.

    So only what is applied decays in the momentum, which thereby is the error feedback too. All parameters but the target matrices get Adam with
    ``adam_lr``, ``betas`` and ``eps``.

    Attributes:
        lr: learning rate of the target matrices (Muon's; the paper's is not known to us).
        betas: decay of the first and second moment, for Adam.
        eps: added to the root of the second moment, for Adam.
        momentum: share of the applied part that stays in the momentum.
        ns_steps: steps of the Newton-Schulz iteration.
        scaling_type: factor of the step for a layer of m outputs and n inputs: `kj` sqrt(max(1, m/n)), `dion` sqrt(m/n), `kimi` 0.2 sqrt(max(m, n)), or
            `none`.
        adam_lr: learning rate of all other parameters; groups without a rank that name no `lr` of their own get it.
    """

    lr: float = 0.02
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-10
    momentum: float = 0.95
    ns_steps: int = 5
    scaling_type: Literal["kj", "dion", "kimi", "none"] = "kj"
    adam_lr: float = 3e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        number("momentum", self.momentum, 0, 1, open_high=True)
        whole("ns_steps", self.ns_steps, 1)
        one_of("scaling_type", self.scaling_type, ("kj", "dion", "kimi", "none"))
        if not self.adam_lr >= 0:
            raise ValueError(f"adam_lr is {self.adam_lr!r}; it must be at least 0")

    def optimizer(self, parameters: nn.Module | Iterable[Any]) -> Stepper:
        groups = self.groups(parameters) if isinstance(parameters, nn.Module) else list(parameters)
        return super().optimizer([{"lr": self.adam_lr, **group} if isinstance(group, dict) and "rank" not in group else group for group in groups])

    def groups(self, model: nn.Module) -> list[Group]:
        """The target matrices, those stored transposed in a group of their own, and all other parameters that require gradients."""
        targets, *others = super().groups(model)
        transposed = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
        split = [
            {**targets, "params": [pair for pair in targets["params"] if pair[0] not in transposed]},
            {**targets, "params": [pair for pair in targets["params"] if pair[0] in transposed], "transposed": True},
        ]
        return [group for group in split if group["params"]] + others

    def state_numbers(self, shape: tuple[int, ...], rank: int | None = None) -> int:
        """Of a target: its momentum."""
        return super().state_numbers(shape) if rank is None else math.prod(shape)

    def update(self, weight: Float[Tensor, "m n"], gradient: Float[Tensor, "m n"], state: State, knobs: Mapping[str, Any]) -> None:
        shape: tuple[int, int] = tuple(weight.shape)  # type: ignore[assignment]
        moved = read(state, "momentum", gradient).add_(gradient)
        low, indices = self.choose(moved, state, knobs)
        moved.sub_(self.up(low, indices, shape, knobs), alpha=1 - knobs["momentum"])
        write(state, "momentum", moved, knobs["state_bits"])
        decay(weight, knobs)
        outputs, inputs = reversed(shape) if knobs.get("transposed") else shape
        scale = step_scale(outputs, inputs, knobs["scaling_type"])
        weight.sub_(self.up(newton_schulz(low, knobs["ns_steps"]), indices, shape, knobs), alpha=knobs["lr"] * scale)


def step_scale(outputs: int, inputs: int, scaling_type: str) -> float:
    """The factor of a step for a layer of this size."""
    if scaling_type == "kj":
        return max(1.0, outputs / inputs) ** 0.5
    if scaling_type == "dion":
        return (outputs / inputs) ** 0.5
    return 0.2 * max(outputs, inputs) ** 0.5 if scaling_type == "kimi" else 1.0
