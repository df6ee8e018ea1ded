"""Adam's moments on any shape, stored in 32, 16 or 8 bits, and the one Adam core of all our optimizers."""

import math
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from echelon.linalg.blockwise import dequantize, quantize

State = MutableMapping[str, Tensor]
SMALLEST_8_BIT = 4096  # tensors with fewer numbers stay in float32


def read(state: State, name: str, like: Float[Tensor, "..."], signed: bool = True) -> Float[Tensor, "..."]:
    """A stored moment to compute with; zeros in the shape of ``like`` where there is none yet."""
    if name not in state:
        return torch.zeros_like(like)
    if f"{name}_scale" in state:
        return dequantize(state[name], state[f"{name}_scale"], signed).to(like.dtype)
    return state[name].to(like.dtype)  # the stored tensor itself where it has that dtype


def write(state: State, name: str, value: Float[Tensor, "..."], bits: int, signed: bool = True) -> None:
    """Store a moment: as it is, in bfloat16, or block-wise in eight bits (from 4096 numbers on)."""
    if bits == 8 and value.numel() >= SMALLEST_8_BIT:
        state[name], state[f"{name}_scale"] = quantize(value, signed)
    elif bits == 16:
        state[name] = value.bfloat16()
    else:
        state[name] = value


def adam_direction(gradient: Float[Tensor, "..."], state: State, knobs: Mapping[str, Any], corrected_eps: bool = False) -> Float[Tensor, "..."]:
    """``M / (sqrt(V) + eps)`` after one update of both moments; the bias corrections are left to :func:`step_size`.

    Args:
        gradient: of any shape, in the dtype to compute in.
        state: holds ``step``, counted from 1, and ``exp_avg`` and ``exp_avg_sq``.
        knobs: ``betas``, ``eps`` and ``state_bits``.
        corrected_eps: compare ``eps`` with the corrected root of V, as ``torch.optim.Adam`` does; without it, with the uncorrected one.
    """
    direction = torch.zeros_like(gradient, memory_format=torch.contiguous_format)
    _step(direction, gradient, state, knobs, corrected_eps, -1.0)
    return direction


def adam_step(weight: Float[Tensor, "..."], gradient: Float[Tensor, "..."], state: State, knobs: Mapping[str, Any], corrected_eps: bool = False) -> None:
    """Take :func:`step_size` times :func:`adam_direction` from a weight, in place and without a copy of either."""
    if weight.is_contiguous():
        _step(weight, gradient, state, knobs, corrected_eps, step_size(state, knobs))
    else:
        weight.sub_(adam_direction(gradient, state, knobs, corrected_eps), alpha=step_size(state, knobs))


def _step(target: Tensor, gradient: Tensor, state: State, knobs: Mapping[str, Any], corrected_eps: bool, size: float) -> None:
    """Update both moments, and take ``size * M / (sqrt(V) + eps)`` from the target.

    One pass of torch's fused kernel, which reads all tensors as they lie in memory; its own bias corrections are undone by the arguments.
    """
    (beta1, beta2), bits = knobs["betas"], knobs["state_bits"]
    gradient = gradient.contiguous()
    mean, square = read(state, "exp_avg", gradient).contiguous(), read(state, "exp_avg_sq", gradient, signed=False).contiguous()
    count = int(state["step"])
    first, root = 1 - beta1**count, math.sqrt(1 - beta2**count)
    counter = torch.tensor(float(count), device=target.device)
    eps = knobs["eps"] if corrected_eps else knobs["eps"] / root
    torch._fused_adam_(  # type: ignore[attr-defined]
        [target], [gradient], [mean], [square], [], [counter],
        lr=size * first / root, beta1=beta1, beta2=beta2, weight_decay=0.0, eps=eps, amsgrad=False, maximize=False,
    )  # fmt: skip
    write(state, "exp_avg", mean, bits)
    write(state, "exp_avg_sq", square, bits, signed=False)


def step_size(state: State, knobs: Mapping[str, Any]) -> float:
    """``lr sqrt(1 - beta2^t) / (1 - beta1^t)``."""
    (beta1, beta2), count = knobs["betas"], int(state["step"])
    return knobs["lr"] * math.sqrt(1 - beta2**count) / (1 - beta1**count)


def adafactor_direction(gradient: Float[Tensor, "..."], state: State, knobs: Mapping[str, Any]) -> Float[Tensor, "..."]:
    """Adafactor's update times the learning rate: factored second moments (a full one for vectors), clipped to a root mean square of 1.

    The decay is ``1 - t^-0.8``; with ``betas[0]`` above 0 a first moment is kept over the scaled updates.

    Source: "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", arXiv 1804.04235, with neither relative steps nor scaling by the parameter.
    """
    beta1, decay = knobs["betas"][0], 1 - int(state["step"]) ** -0.8
    square = gradient.square().add_(1e-30)
    if gradient.ndim >= 2:
        rows, columns = read(state, "rows", square.mean(-1)), read(state, "columns", square.mean(-2))
        rows.lerp_(square.mean(-1), 1 - decay)
        columns.lerp_(square.mean(-2), 1 - decay)
        write(state, "rows", rows, 32)
        write(state, "columns", columns, 32)
        update = gradient * (rows / rows.mean(-1, keepdim=True)).rsqrt()[..., None] * columns.rsqrt()[..., None, :]
    else:
        kept = read(state, "exp_avg_sq", square, signed=False)
        kept.lerp_(square, 1 - decay)
        write(state, "exp_avg_sq", kept, 32, signed=False)
        update = gradient * kept.rsqrt()
    update.div_((update.square().mean().sqrt()).clamp_min(1.0)).mul_(knobs["lr"])
    if beta1 > 0:
        mean = read(state, "exp_avg", update)
        mean.lerp_(update, 1 - beta1)
        write(state, "exp_avg", mean, knobs["state_bits"])
        update = mean.clone() if knobs["state_bits"] == 32 else mean
    return update


def adafactor_numbers(shape: tuple[int, ...], momentum: bool) -> int:
    """How many numbers Adafactor keeps: rows and columns of a matrix, all of a vector, and as many as it has for a first moment."""
    whole = math.prod(shape)
    second = whole // shape[-1] + whole // shape[-2] if len(shape) >= 2 else whole
    return second + (whole if momentum else 0)
