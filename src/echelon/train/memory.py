"""What training takes in weights, gradients and optimizer state, by the papers' formulas: counted from shapes, before anything is trained.

Papers on memory-efficient training print weights plus optimizer state at two bytes a number, without gradients and activations (as in arXiv 2403.03507,
Table 2, and 2505.22922); :attr:`Memory.published` is that figure. What a run takes is measured by the trainer and stands beside it.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from echelon.train.layers.base import LayerMethod
from echelon.train.optimizers.base import OptimizerMethod, Stepper


@dataclass(frozen=True)
class Memory:
    """Numbers held while training; tied weights count once.

    Attributes:
        weights: all parameters and stored buffers of floating point.
        gradients: those of what is trained; stepping in backward holds one parameter's at a time.
        state: of the optimizer: moments and directions, without counters and the scales of blocks.
        index_bytes: bytes of stored whole numbers, such as the places of a sparse part.
    """

    weights: int
    gradients: int
    state: int
    index_bytes: int = 0

    def bytes(self, number: float = 2, state: float | None = None) -> dict[str, float]:
        """Bytes of each part and their ``total``.

        Args:
            number: bytes of a weight and of its gradient.
            state: bytes of a number of the optimizer's state; as many as of a weight by default.
        """
        parts = {"weights": self.weights * number + self.index_bytes, "gradients": self.gradients * number}
        parts["optimizer_state"] = self.state * (number if state is None else state)
        return parts | {"total": sum(parts.values())}

    @property
    def published(self) -> float:
        """Bytes as papers print them: weights and optimizer state, two bytes a number."""
        parts = self.bytes(2)
        return parts["weights"] + parts["optimizer_state"]


def formula(model: nn.Module, method: OptimizerMethod | LayerMethod, optimizer: OptimizerMethod | None = None) -> Memory:
    """What training a model by a method holds. Nothing is computed and the model is left alone; it may be on the meta device.

    Args:
        model: the model as the method takes it: before its layers are swapped.
        method: an optimizer, or a parameterisation.
        optimizer: that trains the parameterisation; its own by default.

    Raises:
        ValueError: if the method finds no target, or its optimizer is not one of ours.
    """
    shapes = on_meta(model)
    if isinstance(method, LayerMethod):
        method.convert(shapes)
    chosen = (optimizer or method).optimizer(shapes)
    if not isinstance(chosen, Stepper):
        raise ValueError(f"{type(method).__name__} is trained by {type(chosen).__name__}, whose state is not known")
    state = sum(chosen.method.state_numbers(tuple(p.shape), group.get("rank")) for group in chosen.param_groups for p in group["params"])
    stored = {id(tensor): tensor for tensor in shapes.state_dict(keep_vars=True).values()}.values()
    return Memory(
        weights=sum(t.numel() for t in stored if t.is_floating_point()),
        gradients=sum(p.numel() for p in shapes.parameters() if p.requires_grad),
        state=state,
        index_bytes=sum(t.numel() * t.element_size() for t in stored if not t.is_floating_point()),
    )


def on_meta(model: nn.Module) -> nn.Module:
    """A copy of a model with shapes and without values."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty: Tensor = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)
