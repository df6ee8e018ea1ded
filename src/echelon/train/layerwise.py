"""Steps inside backward: each parameter is updated and its gradient freed as soon as it is complete, so that one gradient is alive at a time.

Source: the per-layer updates of "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", arXiv 2403.03507 (section 4.3), after LOMO,
arXiv 2306.09782. Differs from GaLore's code, which steps once a micro-batch and so ignores gradient accumulation: here a step is one of the optimizer.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from echelon.errors import UserError
from echelon.train.optimizers.base import Stepper, processes


def step_in_backward(optimizer: Stepper, accumulate: int = 1, *, max_grad_norm: float = 0.0, max_parameter_norm: float = 0.0) -> Callable[[], None]:
    """Let backward step one of our optimizers.

    ``optimizer.step()`` may still be called behind every step: it finds no gradients, or those of an accumulation that broke off, which it steps. With
    ``accumulate`` above 1 gradients live from the first micro-batch to the last one, each only until its own update.

    Args:
        optimizer: its parameters' gradients go; each is checked for NaN right before its own update, when others may have been updated already.
        accumulate: backward passes a step.
        max_grad_norm: of all gradients together; cannot be known here and must be 0.
        max_parameter_norm: clip the norm of each parameter's gradient; 0 for no limit.

    Returns:
        A function that takes the hooks off again.

    Raises:
        ValueError: if an argument is out of range, or ``max_grad_norm`` is given.
        UserError: under ``torch.distributed`` with several processes, or if the optimizer steps in backward already.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate is {accumulate!r}; it must be at least 1")
    if max_grad_norm:
        raise ValueError(
            f"max_grad_norm is {max_grad_norm!r}; steps in backward never see all gradients together: set it to 0, or give max_parameter_norm"
        )
    if not max_parameter_norm >= 0:
        raise ValueError(f"max_parameter_norm is {max_parameter_norm!r}; it must be at least 0")
    if processes() > 1:
        raise UserError(f"steps in backward do not work with {processes()} processes, whose gradients are averaged behind it; train on one, or do without")
    if optimizer.passes is not None:
        raise UserError("this optimizer steps in backward already")
    optimizer.passes = 0
    optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]  # else a GradScaler stops at an assertion instead of our message
    running = -1  # the backward that has been seen

    def ready(parameter: Tensor) -> None:
        nonlocal running
        task = torch._C._current_graph_task_id()
        if task != running:  # the first gradient of this backward
            running = task
            torch.autograd.Variable._execution_engine.queue_callback(done)  # type: ignore[attr-defined]
        assert optimizer.passes is not None
        if optimizer.passes + 1 == accumulate:
            update(parameter)

    def done() -> None:
        assert optimizer.passes is not None
        optimizer.passes += 1
        if optimizer.passes == accumulate:
            for parameter in parameters:
                if parameter.grad is not None:  # it had a part in earlier micro-batches only
                    update(parameter)
            optimizer.passes = 0

    def update(parameter: Tensor) -> None:
        if max_parameter_norm:
            torch.nn.utils.clip_grad_norm_([parameter], max_parameter_norm)
        optimizer.step_one(parameter)
        parameter.grad = None

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    hooks = [p.register_post_accumulate_grad_hook(ready) for p in parameters]

    def remove() -> None:
        for hook in hooks:
            hook.remove()
        optimizer.passes = None
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]

    return remove
