"""How large a model is or would be, and the knob that makes it as large as it may be."""

import copy
import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from echelon.models.modules import Spec, install

if TYPE_CHECKING:
    from echelon.compress.base import Compressor, Job

TOLERANCE = 0.005  # of the target


class Size(NamedTuple):
    """Parameters, and the bytes of all that is stored; tied tensors count once.

    A module that stores a matrix in fewer bits says by ``packed_parameters`` how many numbers its buffers stand for; they count as parameters.
    """

    parameters: int
    bytes: int


def size(model: nn.Module, modules: Mapping[str, Spec] | None = None, cache: dict[str, tuple[int, int]] | None = None) -> Size:
    """The size of a model as it is, or as it would be with these modules, exactly and without making them.

    Args:
        model: the model.
        modules: name and spec of the modules that would be replaced.
        cache: made by the caller and given again, saves building the same specs twice.
    """
    modules = modules or {}
    roots = {name for name in modules if not any(name.startswith(other + ".") for other in modules)}
    kept: dict[int, Tensor] = {}
    replaced = {id(module) for name in roots for module in model.get_submodule(name).modules()}
    for module in model.modules():
        if id(module) not in replaced:
            kept |= {id(tensor): tensor for tensor in _stored(module)}
    parameters = sum(t.numel() for t in kept.values() if isinstance(t, nn.Parameter))
    parameters += sum(_packed(module) for module in model.modules() if id(module) not in replaced)
    total = sum(t.numel() * t.element_size() for t in kept.values())
    for root in sorted(roots):
        own = {name.removeprefix(root).removeprefix("."): spec for name, spec in modules.items() if name == root or name.startswith(root + ".")}
        key = root + json.dumps(own, sort_keys=True)
        if cache is None or key not in cache:
            made = _built(model.get_submodule(root), own)
            if cache is not None:
                cache[key] = made
        else:
            made = cache[key]
        parameters, total = parameters + made[0], total + made[1]
    return Size(parameters, total)


def solve(
    compressor: "Compressor", job: "Job", state: Any, *, parameters: int | None = None, bytes: int | None = None
) -> "Compressor":
    """The compressor with its ``budget_knob`` set so that the model gets this size, to within 0.5 %.

    Only :meth:`Compressor.specs` is called again and again; what was prepared is used as it is.

    Args:
        compressor: whose knob is to be set.
        job: the model and all that belongs to it.
        state: what :meth:`Compressor.prepare` returned.
        parameters: target for the parameters of the whole model.
        bytes: target for its stored bytes, in place of that.

    Raises:
        ValueError: if no setting comes near enough; the nearest sizes are named.
    """
    target, field = (parameters, "parameters") if parameters is not None else (bytes, "bytes")
    if target is None:
        raise ValueError("give a target: parameters or bytes")
    low, high = compressor.budget_range
    whole = isinstance(low, int) and isinstance(high, int)
    cache: dict[str, tuple[int, int]] = {}
    tried: dict[float, int] = {}

    def at(value: float) -> int:
        """The size under this setting; one that the method refuses leaves too little of the model and counts as nothing."""
        if value not in tried:
            try:
                specs = dataclasses.replace(compressor, **{compressor.budget_knob: value}).specs(job.quiet(), state)  # type: ignore[type-var]
            except ValueError:
                return 0
            tried[value] = getattr(size(job.model, specs, cache), field)
        return tried[value]

    rising = at(high) >= at(low)
    for _ in range(60):
        middle = (low + high) // 2 if whole else (low + high) / 2
        if middle in (low, high) or abs(at(middle) - target) <= 1e-4 * target:
            break
        if (at(middle) < target) == rising:
            low = middle
        else:
            high = middle
    if not tried:
        raise ValueError(f"cannot reach {target:,} {field} by {compressor.budget_knob}: no setting from {low} to {high} is possible")
    best = min(tried, key=lambda value: abs(tried[value] - target))
    if abs(tried[best] - target) > TOLERANCE * target:
        below = max((s for s in tried.values() if s < target), default=None)
        above = min((s for s in tried.values() if s > target), default=None)
        near = " and ".join(f"{s:,}" for s in (below, above) if s is not None)
        told = f"cannot reach {target:,} {field} by {compressor.budget_knob}; the nearest it gives are {near}"
        raise ValueError(f"{told} (coarse rounding of ranks widens the steps)")
    return dataclasses.replace(compressor, **{compressor.budget_knob: best})  # type: ignore[type-var]


def _packed(module: nn.Module) -> int:
    return getattr(module, "packed_parameters", 0)


def _stored(module: nn.Module) -> list[Tensor]:
    buffers = [t for name, t in module._buffers.items() if t is not None and name not in module._non_persistent_buffers_set]
    return [p for p in module._parameters.values() if p is not None] + buffers


def _built(module: nn.Module, specs: Mapping[str, Spec]) -> tuple[int, int]:
    """Parameters and bytes of a module rebuilt by specs (``""`` is the module itself), on the meta device."""
    ghosts: dict[int, Any] = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        ghost: Tensor = tensor.detach().to("meta")
        ghosts[id(tensor)] = nn.Parameter(ghost, requires_grad=False) if isinstance(tensor, nn.Parameter) else ghost
    holder = nn.Module()
    holder.it = copy.deepcopy(module, ghosts)
    with torch.device("meta"):
        install(holder, {f"it.{name}".rstrip("."): spec for name, spec in specs.items()})
    stored = {id(tensor): tensor for part in holder.modules() for tensor in _stored(part)}
    parameters = sum(t.numel() for t in stored.values() if isinstance(t, nn.Parameter)) + sum(map(_packed, holder.modules()))
    return parameters, sum(t.numel() * t.element_size() for t in stored.values())
