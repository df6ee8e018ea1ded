"""Weights in training, those in half precision with copies in float32: small steps would be rounded away."""

from collections.abc import Iterable

import torch
from torch import nn


class MasterWeights:
    """What an optimizer is given in place of some parameters.

    Args:
        parameters: what is trained.

    Attributes:
        copies: the parameters, or copies in float32 of those in half precision.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self.parameters = list(parameters)
        self.copies = [p if p.dtype.itemsize >= 4 else p.detach().float().requires_grad_() for p in self.parameters]

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """One step of an optimizer of the copies, with the parameters' gradients, which are then gone."""
        apart = [(p, copy) for p, copy in zip(self.parameters, self.copies, strict=True) if copy is not p]
        for p, copy in apart:
            copy.grad, p.grad = None if p.grad is None else p.grad.float(), None
        optimizer.step()
        optimizer.zero_grad()
        for p, copy in apart:
            p.copy_(copy)

    def clear(self) -> None:
        """Drop the parameters' gradients."""
        for p in self.parameters:
            p.grad = None
