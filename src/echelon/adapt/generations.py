"""Lets an optimizer move the rows of one parameter as if those that were added at the same time were a parameter of their own.

A parameter that is added to an optimizer later breaks learning-rate schedulers and DistributedDataParallel. One that has room from the start does not; then the
rows that wait must stay where they are, and those that came later need their own learning rate and their own count of steps in Adam's bias correction.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Rows(NamedTuple):
    """The rows of a parameter at one optimizer step.

    Attributes:
        parameter: what the optimizer was given.
        dim: 0, or 1 where they are columns.
        awake: which of them the step moves.
        since: first step that moved each; 0 for those that were there from the start, which the optimizer moves as it does.
        rate: learning rate of those that came later, over the highest of their group; none for that of the group.
        step: number of this step, from 0.
    """

    parameter: Tensor
    dim: int
    awake: Bool[Tensor, " r"]
    since: Int[Tensor, " r"]
    rate: Float[Tensor, " r"] | None
    step: int


def step_by_generation(optimizer: torch.optim.Optimizer, rows: Callable[[], Iterable[Rows]]) -> list[Any]:
    """From now on move rows as they say at each step; handles that undo it.

    Updates are exactly those of separate parameters for optimizers that are element-wise and count no steps, and but for ``eps`` those of Adam and AdamW.

    Args:
        optimizer: of torch, or one whose state has torch's names.
        rows: called before each step; parameters that the optimizer does not have are passed over.
    """
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    kept: list[tuple[Rows, Tensor]] = []

    def before(*_: Any) -> None:
        kept[:] = [(part, part.parameter.detach().clone()) for part in rows() if part.parameter in groups]

    @torch.no_grad()
    def after(*_: Any) -> None:
        for part, old in kept:
            new, group, state = part.parameter, groups[part.parameter], optimizer.state.get(part.parameter, {})
            shape = (-1, 1) if part.dim == 0 else (1, -1)
            awake, late = part.awake.view(shape), (part.since > 0).view(shape)
            factor, pace = (value.to(old.dtype).view(shape) for value in (_correction(part, group, state), _pace(part, group)))
            decoupled = group.get("decoupled_weight_decay", True)
            decay = -group["lr"] * group.get("weight_decay", 0.0) * old if decoupled else torch.zeros_like(old)
            own = old + pace * (factor * (new - old - decay) + decay)
            new.copy_(torch.where(awake, torch.where(late, own, new), old))
            for value in state.values():
                if isinstance(value, Tensor) and value.shape == new.shape and value.is_floating_point():
                    value.masked_fill_(~awake, 0)  # weight decay may have left something
        kept.clear()

    return [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]


def restarted(since: Int[Tensor, " r"], step: int, warmup: int, total: int) -> Float[Tensor, " r"]:
    """Share of the highest learning rate: up in ``warmup`` steps from the one in which each row came, then down to zero at the last step, both linearly."""
    age, left = step - since, total - step
    return torch.where(age < warmup, age / max(1, warmup), left / (left + age - warmup).clamp(min=1)).clamp(min=0)


def _pace(rows: Rows, group: dict[str, Any]) -> Float[Tensor, " r"]:
    """Learning rate over that of the group."""
    if rows.rate is None or not group["lr"]:
        return torch.ones(len(rows.since), device=rows.since.device)
    return rows.rate * (group.get("initial_lr", group["lr"]) / group["lr"])


def _correction(rows: Rows, group: dict[str, Any], state: dict[str, Any]) -> Float[Tensor, " r"]:
    """What turns Adam's correction for all steps into that for a row's own; one for other optimizers."""
    if not {"exp_avg", "exp_avg_sq", "step"} <= set(state) or "betas" not in group:
        return torch.ones(len(rows.since), device=rows.since.device)
    own, steps, (first, second) = (rows.step + 1 - rows.since).clamp(min=1).double(), float(state["step"]), group["betas"]
    return (1 - first**steps) / (1 - first**own) * ((1 - second**own) / (1 - second**steps)).sqrt()
